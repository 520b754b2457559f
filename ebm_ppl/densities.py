"""Log densities of one event, as functions."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ebm_ppl.types import Event, Scalar

LogDensity = Callable[[Event], Scalar]
"""Log density of ONE event, up to a constant."""


def as_constant(log_density: LogDensity, event: Event) -> LogDensity:
    """The same function with everything that it holds or closes over as a constant of differentiation.

    Args:
        log_density: Of one event.
        event: An event, for its shapes.

    Example:
        >>> import jax
        >>> slope = lambda w: jax.grad(as_constant(lambda x: -w * x**2, 1.0))(1.0)
        >>> float(slope(2.0)), float(jax.grad(slope)(2.0))
        (-4.0, 0.0)
    """
    # Wrapped, because a module that holds traced arrays has no hash.
    converted, held = jax.closure_convert(lambda event: log_density(event), event)
    held: Any = jax.lax.stop_gradient(held)
    return lambda event: converted(event, *held)


class LikeEnergy(eqx.Module):
    """An energy of one event that is to another potential what a bridge, or a shift by a constant, is to it.

    It has the coding, the support and the reference of the other, which kernels ask for and a function alone cannot say.

    Attributes:
        energy: A function of one event.
        like: A potential, or anything else with some of ``site_values``, ``support`` and ``reference``; what it does not
            have is ``None``.

    Example:
        >>> import ebm_ppl as ebm
        >>> LikeEnergy(lambda x: 0.5 * x.sum(), ebm.potentials.Ising((2, 2), coupling=0.4)).site_values
        (-1, 1)
    """

    energy: Callable[[Event], Scalar]
    like: Any

    @property
    def site_values(self) -> Any:
        """Coding of the other potential, or ``None``."""
        return getattr(self.like, "site_values", None)

    @property
    def support(self) -> Any:
        """Support of the other potential, or ``None``."""
        return getattr(self.like, "support", None)

    @property
    def reference(self) -> Any:
        """What the other potential would start or propose from, or ``None``."""
        return getattr(self.like, "reference", None)

    def __call__(self, event: Event) -> Scalar:
        """The energy of one event."""
        return self.energy(event)
