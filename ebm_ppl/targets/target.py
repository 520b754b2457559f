"""What a target is: an energy, its base, its exact log normaliser and an exact sampler of the same law."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import cast

import equinox as eqx
import jax.numpy as jnp
from numpyro.distributions import Distribution, ImproperUniform, biject_to
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import Transform

from ebm_ppl.checks import check_count
from ebm_ppl.types import Array, Event, Key, Potential, Scalar


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A density ``p(x) = base(x) exp(-U(x)) / Z`` of which everything is known.

    Parameters are held in the float precision that JAX has when the target is built; a target works in either.

    Attributes:
        name: Its name in the registry.
        potential: Energy ``U`` of one event, a pytree: rebuilding a target does not recompile what runs on it.
        base: NumPyro distribution of one event. ``ImproperUniform(support, (), event_shape)``, the constant 1 on the
            support, when ``U`` carries the whole density.
        log_normalizer: ``log Z = log ∫ base(x) exp(-U(x)) dx``, with respect to Lebesgue measure on the event; on the
            simplex, on its first ``K - 1`` coordinates.
        sampler: ``(key, n) -> (n, *event_shape)``, i.i.d. draws that never evaluate ``potential``, so that the two
            can disagree. Use :meth:`sample`.
        expectations: Description -> (function of one event, its exact expectation).
    """

    name: str
    potential: Potential
    base: Distribution
    log_normalizer: float
    sampler: Callable[[Key, int], Array]
    expectations: Mapping[str, tuple[Callable[[Event], Scalar], float]]

    def __post_init__(self) -> None:
        if self.base.batch_shape != ():
            raise ValueError(f"base: got batch_shape {self.base.batch_shape}, expected (); use base.to_event().")

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.base.event_shape

    @property
    def support(self) -> Constraint:
        """Set on which the density is positive."""
        return cast(Constraint, self.base.support)

    def sample(self, key: Key, n: int) -> Array:
        """Exact i.i.d. draws, ``(n, *event_shape)``.

        Args:
            key: JAX random key.
            n: Number of draws, at least 1.

        Raises:
            ValueError: ``n`` is below 1.

        Example:
            >>> import jax, ebm_ppl.targets
            >>> ebm_ppl.targets.get("ring").sample(jax.random.key(0), 3).shape
            (3, 2)
        """
        return self.sampler(key, check_count("n", n))

    def logdensity(self, event: Event) -> Scalar:
        """Normalised log density of one event, ``log base(x) - U(x) - log Z``; ``-inf`` outside the support.

        Args:
            event: ``event_shape``.

        Returns:
            Scalar; NaN where the event is.

        Example:
            >>> import ebm_ppl.targets
            >>> float(ebm_ppl.targets.get("truncated_normal").logdensity(3.0))
            -inf
        """
        event = jnp.asarray(event)
        value = log_base(self.base, event) - self.potential(event) - self.log_normalizer
        is_inside = self.support(event) | jnp.any(jnp.isnan(event))
        return jnp.where(is_inside, value, -jnp.inf)

    @cached_property
    def _transform(self) -> Transform:
        return biject_to(self.support)

    @cached_property
    def unconstrained_potential(self) -> "UnconstrainedPotential":
        """The same law as an energy of ``z`` in R^d, ``x = T(z)``, which any kernel on R^d can sample.

        ``exp(-V(z))`` with ``V(z) = U(T(z)) - log base(T(z)) - log |det J_T(z)|`` integrates to the same ``Z``. Where
        the support is R^d already, ``T`` is the identity and ``V = U - log base``.

        Example:
            >>> import jax.numpy as jnp, ebm_ppl.targets
            >>> gamma = ebm_ppl.targets.get("gamma")  # on x > 0, with x = exp(z)
            >>> float(gamma.unconstrained_potential(jnp.array(0.0))) == float(gamma.potential(jnp.array(1.0)))
            True
        """
        return UnconstrainedPotential(self.potential, self.base, self._transform)

    def constrain(self, unconstrained: Array) -> Array:
        """``x = T(z)``: ``(*batch, *unconstrained_shape) -> (*batch, *event_shape)``."""
        return jnp.asarray(self._transform(unconstrained))

    def unconstrain(self, event: Array) -> Array:
        """``z = T^-1(x)``: ``(*batch, *event_shape) -> (*batch, *unconstrained_shape)``."""
        return jnp.asarray(self._transform.inv(event))

    def with_base(self, base: Distribution) -> "Target":
        """The same law with ``base`` as its base: density moves between base and energy and nothing else may change.

        The energy becomes ``U + log base - log old_base``; log Z, the sampler and the expectations are kept.

        Args:
            base: NumPyro distribution with the support and event shape of this target.

        Raises:
            ValueError: the event shape differs, or ``base`` has a batch shape.

        Example:
            >>> import numpyro.distributions as dist, ebm_ppl.targets
            >>> target = ebm_ppl.targets.get("double_well")
            >>> split = target.with_base(dist.Normal(0.0, 2.0))
            >>> abs(float(split.logdensity(0.5) - target.logdensity(0.5))) < 1e-5
            True
        """
        if base.event_shape != self.event_shape:
            raise ValueError(f"base: got event_shape {base.event_shape}, expected {self.event_shape}.")
        return dataclasses.replace(self, potential=_Resplit(self.potential, self.base, base), base=base)


class UnconstrainedPotential(eqx.Module):
    """``V(z) = U(T(z)) - log base(T(z)) - log |det J_T(z)|``. See :attr:`Target.unconstrained_potential`."""

    potential: Potential
    base: Distribution
    transform: Transform

    def __call__(self, unconstrained: Array) -> Scalar:
        """Energy of one unconstrained point."""
        event = self.transform(unconstrained)
        log_volume = self.transform.log_abs_det_jacobian(unconstrained, event)
        return self.potential(event) - log_base(self.base, event) - log_volume


class _Resplit(eqx.Module):
    """``U + log new_base - log old_base``."""

    potential: Potential
    old_base: Distribution
    new_base: Distribution

    def __call__(self, event: Event) -> Scalar:
        return self.potential(event) + log_base(self.new_base, event) - log_base(self.old_base, event)


def log_base(base: Distribution, event: Event) -> Scalar:
    """Log density of the base at an event of its support; an improper base is the constant 1."""
    if isinstance(base, ImproperUniform):
        return jnp.zeros((), jnp.result_type(event, jnp.bfloat16))
    return jnp.asarray(base.log_prob(event))
