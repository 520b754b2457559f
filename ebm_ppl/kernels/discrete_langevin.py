"""Discrete Langevin: every site moves at once, by a proposal that factorises over sites and follows the gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_positive
from ebm_ppl.kernels.discrete import Sites, Values, check_values, squared_distances
from ebm_ppl.kernels.informed import check_informed, informed_algorithm
from ebm_ppl.partials import function_behind
from ebm_ppl.types import Array, Kernel, Key, Potential, PyTree, Scalar


def discrete_langevin(step_size: float | Array, *, values: Sequence[int | float] | None = None) -> Kernel:
    """Metropolis-adjusted discrete Langevin: all sites are proposed at once, and accepted or rejected exactly together.

    ``q(x' | x) = prod_i softmax_k( -1/2 grad_i U(x) (v_k - x_i) - (v_k - x_i)^2 / (2 eps) )`` at ``v_k = x'_i``, the law of
    a Langevin step with the proposal confined to the values that a site may take; ``x'`` is accepted with probability
    ``min(1, exp(U(x) - U(x')) q(x | x') / q(x' | x))``. Labels without an order are linearised as indicator vectors, two
    of which are ``2`` apart in squared distance, where the potential has an energy of those (``potentials.Potts``).
    Proposals with a non-finite energy are rejected and counted.

    Args:
        step_size: ``eps > 0``, in squared units of ``x``: spins need four times that of bits. Tune it to an acceptance
            around .6 with :func:`ebm_ppl.tune_step_size`.
        values: What a site may be, such as ``(0, 1)`` or ``(-1, 1)``; needed where neither the potential nor the support
            of its base says so.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant, and is reversible; one gradient per step. Positions are integers or
        floats.

    Raises:
        TypeError: ``values`` are not numbers. When it runs: the potential cannot be evaluated at floating numbers.
        ValueError: ``step_size`` is not one finite positive number. When it runs: states that are not in the coding.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> ising = ebm.potentials.Ising((4, 4), coupling=0.2)
        >>> sampler = ebm.init_sampler(jnp.ones((8, 4, 4)), discrete_langevin(step_size=1.5))
        >>> sampler, info = ebm.advance(jax.random.key(0), ising, sampler, 20)
        >>> int(info.num_gradients[0])
        21

    References:
        Zhang, Liu, Liu (2022), A Langevin-like sampler for discrete distributions, arXiv:2206.09914.
    """
    return _kernel(step_size, values, is_adjusted=True)


def unadjusted_discrete_langevin(step_size: float | Array, *, values: Sequence[int | float] | None = None) -> Kernel:
    """Discrete Langevin with no accept step.

    BIASED: its stationary law differs from ``exp(-U)`` unless ``step_size`` is small, and its acceptance rate is NaN
    because nothing is ever rejected. Use :func:`discrete_langevin` where the law matters.

    Args:
        step_size: As for :func:`discrete_langevin`; part of the model when training relies on it.
        values: As for :func:`discrete_langevin`.

    Raises:
        TypeError: as :func:`discrete_langevin`.
        ValueError: as :func:`discrete_langevin`.

    Example:
        >>> kernel = unadjusted_discrete_langevin(step_size=0.2, values=(0, 1))

    References:
        Zhang, Liu, Liu (2022), arXiv:2206.09914.
    """
    return _kernel(step_size, values, is_adjusted=False)


def _kernel(step_size: Any, values: Sequence[int | float] | None, *, is_adjusted: bool) -> Kernel:
    step_size = check_positive("step_size", step_size)
    if step_size.ndim:
        raise ValueError(f"step_size: got shape {step_size.shape}, expected one number for all chains.")
    return Partial(_DiscreteLangevin(check_values(values), is_adjusted), step_size=step_size)


@dataclass(frozen=True)
class _DiscreteLangevin:
    """The static half of the kernel; a :class:`~ebm_ppl.types.DiscreteKernel`."""

    values: Values | None
    is_adjusted: bool

    def check_position(self, potential: Potential, position: PyTree) -> None:
        """Raise where the chains are not in the coding, or the energy has no gradient."""
        check_informed("discrete_langevin", self.values, potential, position)

    def __call__(self, potential: Potential, step_size: Array) -> SamplingAlgorithm:
        def log_proposal(sites: Sites, flat: Array, gains: Array) -> Array:
            distances = squared_distances(potential, sites, flat)
            return jax.nn.log_softmax(0.5 * gains - distances / (2.0 * step_size.astype(sites.dtype)), axis=1)

        def propose(
            sites: Sites, key: Key, flat: Array, digits: Array, gains: Array
        ) -> tuple[Array, Scalar, Callable[[Array], Scalar]]:
            forth = log_proposal(sites, flat, gains)
            chosen = jax.random.categorical(key, forth, axis=1)
            proposed = sites.values[chosen]

            def log_back(new_gains: Array) -> Scalar:
                return _total(log_proposal(sites, proposed, new_gains), digits)

            return proposed, _total(forth, chosen), log_back

        return informed_algorithm("discrete_langevin", self.values, potential, propose, is_adjusted=self.is_adjusted)


def _total(log_proposal: Array, digits: Array) -> Array:
    """Log probability of a whole proposal: the sum over sites."""
    return jnp.sum(jnp.take_along_axis(log_proposal, digits[:, None], axis=1))


def is_unadjusted(kernel: Kernel) -> bool:
    """Whether a kernel is one of :func:`unadjusted_discrete_langevin`, whose law is not that of the energy."""
    func = function_behind(kernel)
    return isinstance(func, _DiscreteLangevin) and not func.is_adjusted
