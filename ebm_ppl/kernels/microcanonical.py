"""Microcanonical Langevin: velocities of fixed length that gradients turn, with and without an accept step."""

import math

from ebm_ppl.checks import check_count, check_one, check_positive
from ebm_ppl.kernels import composed
from ebm_ppl.kernels.mcmc import from_blackjax
from ebm_ppl.types import Array, Kernel


def unadjusted_mclmc(
    step_size: float | Array, decoherence_length: float | Array, *, inverse_mass_matrix: float | Array = 1.0
) -> Kernel:
    """Microcanonical Langevin Monte Carlo without an accept step; also called ``mclmc``.

    BIASED: the stationary law differs from ``exp(-U)`` by an error that grows with the step size, and its acceptance rate
    is NaN because nothing is rejected but steps to a NaN or infinite energy, after which the chain goes on in another
    direction. Use :func:`adjusted_mclmc` where the law matters. The direction of each chain starts anew every phase.

    Args:
        step_size: ``eps > 0``, in units of ``x``; velocities have length 1, so steps are of the order ``sqrt(d)``.
        decoherence_length: ``L > 0``, in units of ``x``: the distance over which a direction is forgotten, of the order
            of the size of the typical set.
        inverse_mass_matrix: Variances of the flattened event, one number or ``(d,)``.

    Returns:
        A kernel for events of at least two numbers. Two gradients per step.

    Raises:
        TypeError: an argument is no real number.
        ValueError: an argument is not finite and positive.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.ones((8, 2)), unadjusted_mclmc(step_size=0.3, decoherence_length=1.5))
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 100)
        >>> bool(jnp.isnan(info.acceptance_rate).all())
        True

    References:
        Robnik, De Luca, Silverstein, Seljak (2023), Microcanonical Hamiltonian Monte Carlo, arXiv:2212.08549.
    """
    return from_blackjax(
        composed.mclmc,
        step_size=step_size,
        L=check_positive("decoherence_length", decoherence_length),
        inverse_mass_matrix=check_positive("inverse_mass_matrix", inverse_mass_matrix),
    )


mclmc = unadjusted_mclmc


def adjusted_mclmc(
    step_size: float | Array,
    num_integration_steps: int,
    *,
    decoherence_factor: float | Array = math.inf,
    inverse_mass_matrix: float | Array = 1.0,
) -> Kernel:
    """Microcanonical Langevin trajectories of fixed length, each accepted or rejected exactly.

    Every step draws a fresh direction, so nothing but the position survives it.

    Args:
        step_size: ``eps > 0``, in units of ``x``; velocities have length 1.
        num_integration_steps: Integrator steps per proposal, ``>= 1``.
        decoherence_factor: Distance over which a direction is forgotten, in lengths of the trajectory; infinite for none.
        inverse_mass_matrix: Variances of the flattened event, one number or ``(d,)``.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant, for events of at least two numbers. Two gradients per integrator step.

    Raises:
        TypeError: an argument is no number, or no whole number where one is expected.
        ValueError: an argument is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> kernel = adjusted_mclmc(step_size=0.8, num_integration_steps=3)
        >>> sampler = ebm.init_sampler(jnp.ones((8, 2)), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 100)
        >>> int(info.num_gradients[0])
        601

    References:
        Robnik, Cohn-Gordon, Seljak (2025), Metropolis adjusted microcanonical Hamiltonian Monte Carlo, arXiv:2503.01707.
    """
    factor = check_one("decoherence_factor", decoherence_factor, lambda x: x > 0.0, "a number > 0, or infinity")
    return from_blackjax(
        composed.adjusted_mclmc,
        step_size=step_size,
        num_integration_steps=check_count("num_integration_steps", num_integration_steps),
        L_proposal_factor=factor,
        inverse_mass_matrix=check_positive("inverse_mass_matrix", inverse_mass_matrix),
    )
