"""Kernels that propose one step from where a chain is: Langevin, Barker and random-walk proposals."""

import blackjax

from ebm_ppl.checks import as_floats, check_positive
from ebm_ppl.kernels import composed
from ebm_ppl.kernels.mcmc import check_mass, from_blackjax
from ebm_ppl.types import Array, Kernel


def mala(step_size: float | Array) -> Kernel:
    """Metropolis-adjusted Langevin: ``x' = x - eps grad U(x) + sqrt(2 eps) xi``, accepted or rejected exactly.

    Args:
        step_size: ``eps > 0``, in squared units of ``x``. Around .57 acceptance is optimal in high dimension;
            :func:`ebm_ppl.tune_step_size` finds it.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant. One gradient per step. A proposal with a NaN or infinite energy is
        rejected, and counted in ``info.num_nonfinite``.

    Raises:
        TypeError: an argument is no real number.
        ValueError: ``step_size`` is not finite and positive.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), mala(step_size=0.3))
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 100)
        >>> sampler.position.shape
        (8, 2)

    References:
        Roberts, Tweedie (1996), Exponential convergence of Langevin distributions and their discrete approximations.
    """
    return from_blackjax(blackjax.mala, step_size=step_size)


def barker(step_size: float | Array, *, inverse_mass_matrix: Array | None = None) -> Kernel:
    """The Barker proposal: a step of random size whose sign prefers to go downhill, accepted or rejected exactly.

    Each coordinate moves by ``b z`` with ``z ~ N(0, eps^2)`` and ``P(b = +1) = 1 / (1 + exp(z dU/dx))``. The gradient
    decides about signs only, so that a step size that is too large costs less than it costs :func:`mala`.

    Args:
        step_size: ``eps > 0``, in units of ``x``. Around .4 to .6 acceptance is usual.
        inverse_mass_matrix: As in :func:`hmc`.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant. One gradient per step.

    Raises:
        TypeError: an argument is no real number.
        ValueError: ``step_size`` is not finite and positive, or the matrix has the wrong rank.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), barker(step_size=1.0))
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 100)
        >>> bool((info.acceptance_rate > 0.3).all())
        True

    References:
        Livingstone, Zanella (2022), The Barker proposal: combining robustness and efficiency in gradient-based MCMC,
        arXiv:1908.11812.
    """
    return from_blackjax(blackjax.barker, step_size=step_size, inverse_mass_matrix=check_mass(inverse_mass_matrix))


def random_walk(sigma: float | Array) -> Kernel:
    """Random-walk Metropolis: ``x' = x + sigma xi`` with Gaussian ``xi``, accepted or rejected exactly.

    No gradients: for energies that have none, or whose gradients mislead.

    Args:
        sigma: Standard deviation of the step, positive, in units of ``x``: one number, one per number of the flattened
            event ``(d,)``, or a square root ``(d, d)`` of its covariance. Around .25 acceptance is optimal in high
            dimension.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant. One energy per step.

    Raises:
        TypeError: an argument is no real number.
        ValueError: ``sigma`` has another rank, or is not finite (and, unless a matrix, positive).

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), random_walk(sigma=1.0))
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 100)
        >>> int(info.num_gradients[0]), int(info.num_energies[0])
        (0, 101)

    References:
        Metropolis, Rosenbluth, Rosenbluth, Teller, Teller (1953), Equation of state calculations by fast computing
        machines.
    """
    scale = as_floats("sigma", sigma)
    if scale.ndim > 2 or (scale.ndim == 2 and scale.shape[0] != scale.shape[1]):
        raise ValueError(f"sigma: got shape {scale.shape}, expected a number, (d,) or (d, d).")
    if scale.ndim < 2:
        scale = check_positive("sigma", scale)
    return from_blackjax(composed.random_walk, sigma=scale)
