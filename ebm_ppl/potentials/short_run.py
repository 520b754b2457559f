"""An energy that was trained by short runs, together with the sampler that it belongs to."""

import functools
import inspect
import types
from typing import Any

import equinox as eqx
import jax
from jax.tree_util import Partial

from ebm_ppl.partials import function_behind
from ebm_ppl.potentials.combinators import Fixed
from ebm_ppl.types import Event, Kernel, Potential, PyTree, Scalar, ShortRunKernel


class ShortRun(eqx.Module):
    """An energy with the short run that it was trained by: start, kernel with its tunables, and number of steps.

    Training with short runs fits the law of ``x_k``, the end of ``k`` steps from a fixed start, to the data, and says
    nothing of ``exp(-U)``, which need not even have a finite integral. The two belong together: the energy alone is no
    model. As a potential this is the energy; as a part of a NumPyro model it is refused wherever a density is needed,
    and simulated by :func:`ebm_ppl.handlers.simulate`. Where :func:`ebm_ppl.diagnostics.sampling_times` shows that
    nothing changes after ``k`` steps, ``plain`` may be taken for a density.

    Args:
        potential: Energy of one event, base included.
        kernel: :func:`ebm_ppl.kernels.short_run`. It is no part of what is trained.

    Raises:
        TypeError: the potential is not callable, or the kernel is not such a one.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = ebm.kernels.short_run(10, dist.Normal(0.0, 1.0), step_size=0.1)
        >>> model = ShortRun(lambda x: -0.2 * x**2, kernel)  # exp(-U) has no integral, ten steps have a law
        >>> ebm.draw_short_run(jax.random.key(0), model, 100).shape, model.num_steps
        ((100,), 10)

    References:
        Nijkamp, Hill, Zhu, Wu (2019), arXiv:1904.09770; Agoritsas, Catania, Decelle, Seoane (2023), arXiv:2301.09428.
    """

    potential: Potential
    kernel: Fixed

    def __init__(self, potential: Potential, kernel: Kernel):
        if not callable(potential):
            raise TypeError(f"potential: got {type(potential).__name__}, expected a callable energy of one event.")
        if not isinstance(function_behind(kernel), ShortRunKernel):
            raise TypeError(f"kernel: got {type(kernel).__name__}, expected ebm.kernels.short_run(...).")
        self.potential, self.kernel = potential, Fixed(kernel)

    @property
    def plain(self) -> Potential:
        """The energy by itself."""
        return self.potential

    @property
    def sampler(self) -> Kernel:
        """The short run."""
        return self.kernel.value

    @property
    def num_steps(self) -> int:
        """``k``."""
        return function_behind(self.sampler).num_steps

    @property
    def support(self) -> Any:
        """That of the energy; ``None`` where it declares none."""
        return getattr(self.potential, "support", None)

    @property
    def reference(self) -> Any:
        """That of the energy; ``None`` where it has none."""
        return getattr(self.potential, "reference", None)

    @property
    def site_values(self) -> tuple[int, ...] | None:
        """That of the energy; ``None`` where it has none."""
        return getattr(self.potential, "site_values", None)

    def __call__(self, event: Event) -> Scalar:
        """The energy of one event."""
        return self.potential(event)


def not_a_density(num_steps: int) -> str:
    """What there is to say of such an energy.

    Example:
        >>> not_a_density(10)
        'this is a 10-step sampler, not a density'
    """
    return f"this is a {num_steps}-step sampler, not a density"


def find_short_runs(tree: PyTree) -> list[ShortRun]:
    """All energies of short runs among the parts of a pytree, such as a sum of potentials, and of functions around them.

    Bound methods, partial functions, wrappers and closures are looked into, a few levels deep. What a function finds in
    other ways, such as in a list, is not seen.

    Example:
        >>> import numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = ebm.kernels.short_run(10, dist.Normal(0.0, 1.0), step_size=0.1)
        >>> model = ebm.potentials.temper(ShortRun(lambda x: x**2, kernel), 2.0)
        >>> len(find_short_runs(model)), len(find_short_runs(lambda x: model(x))), find_short_runs(abs)
        (1, 1, [])
    """
    return _found(tree, 3)


def _found(tree: PyTree, depth: int) -> list[ShortRun]:
    # The function of a Partial is no leaf of it.
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, ShortRun | Partial))
    found = [leaf for leaf in leaves if isinstance(leaf, ShortRun)]
    # A module may wrap a function that it holds taken apart.
    for function in [*leaves, tree] if depth else ():
        if callable(function) and not isinstance(function, ShortRun):
            for part in _parts_of(function):
                found += [run for run in _found(part, depth - 1) if not any(run is other for other in found)]
    return found


def _parts_of(function: Any) -> list[Any]:
    """What a function holds: the object of a method, the function of a partial or a wrapper, and what it closes over."""
    if isinstance(function, functools.partial | Partial):
        return [function.func, *function.args, *function.keywords.values()]
    parts = [getattr(function, name, None) for name in ("__self__", "__wrapped__")]
    if isinstance(function, types.FunctionType):
        held = inspect.getclosurevars(function)
        parts += [*held.nonlocals.values(), *held.globals.values()]
    return [part for part in parts if part is not None and not isinstance(part, types.ModuleType | type)]
