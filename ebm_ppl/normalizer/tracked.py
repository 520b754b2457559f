"""log Z read off chains that were weighted while their energy was trained."""

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count, check_potential, is_traced
from ebm_ppl.kernels.reweighted import ChainWeights
from ebm_ppl.normalizer.pareto import pareto_khat
from ebm_ppl.normalizer.result import MAX_KHAT, LogNormalizer
from ebm_ppl.proposals import event_like
from ebm_ppl.types import Array, Potential, SamplerState
from ebm_ppl.weights import effective_size, log_mean_weight, variance_by_ancestor

MAX_VARIANCE = 0.02
"""Relative variance of Z above which an estimate is not to be believed, nor its error."""


def tracked(sampler: SamplerState, potential: Potential, *, num_held_out: int | None = None) -> LogNormalizer:
    """``log Z`` of ``exp(-U)`` from the chains of :func:`ebm_ppl.objectives.jarzynski_contrastive_divergence`.

    Their weights follow the energy from the reference, whose Z is one, to where they last moved; from there they are taken
    to ``potential`` by ``exp(U_last - U)`` at one evaluation per chain. Conditional on the energies of the training
    ``E[Z estimate / Z] = 1`` for chains that no gradient has seen, and these alone are used.

    Errors made along the way stay. Resampling turns them into numbers of descendants, and they are added up by ancestor:
    the standard error is the larger of the one that takes the descendants of each chain of the start for one observation,
    and of the one that takes chains for independent after each resampling. The first is right also where chains hardly
    move; where a long training has left few ancestors it is near one, and the result is not reliable. What no chain has
    ever met, such as a mode that appeared away from all of them, leaves no trace.

    Args:
        sampler: From :func:`ebm_ppl.objectives.jarzynski_chains`, after training: ``state.sampler``.
        potential: Energy of one event, base included, as it is now: ``state.potential``. (The chains have not seen the last
            update.)
        num_held_out: As given to the objective: so many chains, the last ones, that no gradient has seen; half of them when
            ``None``.

    Returns:
        The estimate, with a gradient: that of ``log Z`` where the weighted chains stand for the law. ``ess`` is the number
        of independent weights whose mean had its error. ``reliable`` where all weights are finite, the standard error is
        below 0.14, and the present weights have an effective size of a tenth of their number and a k-hat below 0.5. No
        gradient evaluations are counted, as training had paid for them.

    Raises:
        TypeError: ``sampler`` carries no weights, or ``potential`` is no energy.
        ValueError: fewer than 25 chains are held out, or those are not the chains that were.

    Example:
        >>> import functools, jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = ebm.kernels.mala(step_size=0.3)
        >>> sampler = ebm.objectives.jarzynski_chains(jax.random.key(0), dist.Normal(0.0, 1.5), kernel, 2000)
        >>> def energy(x): return 0.5 * x**2
        >>> objective = jax.jit(functools.partial(ebm.objectives.jarzynski_contrastive_divergence, energy, num_steps=2))
        >>> loss, (sampler, metrics) = objective(sampler, jnp.zeros(4), jax.random.key(1))
        >>> result = tracked(sampler, lambda x: 0.5 * x**2 + 1.0)  # an update later
        >>> bool(abs(result.value - (0.9189 - 1.0)) < 4 * result.standard_error), bool(result.reliable)
        (True, True)

    References:
        Carbone, Hua, Coste, Vanden-Eijnden (2023), arXiv:2305.19414; Chan, Lai (2013), A general theory of particle filters
        in hidden Markov models and some applications, arXiv:1312.5114 (the error by ancestors); Lee, Whiteley (2018),
        Variance estimation in the particle filter, arXiv:1509.00394.
    """
    weights = getattr(sampler, "auxiliary", None)
    if not isinstance(weights, ChainWeights):
        raise TypeError(
            "sampler: got chains that carry no weights, expected those of a training with "
            "ebm_ppl.objectives.jarzynski_contrastive_divergence."
        )
    check_potential(potential, event_like(sampler.position))
    num_held_out = _check_held_out(weights.ancestor, num_held_out)
    held_out: ChainWeights = jax.tree.map(lambda x: jax.lax.stop_gradient(x[-num_held_out:]), weights)
    position = jax.tree.map(lambda x: jax.lax.stop_gradient(x[-num_held_out:]), sampler.position)
    energy = jax.vmap(potential)(position)
    log_weight = held_out.log_weight + held_out.energy - energy.astype(held_out.energy.dtype)
    value, now = log_mean_weight(log_weight)
    fixed = jax.lax.stop_gradient(log_weight)
    variance = jnp.maximum(
        held_out.variance.max() + now, variance_by_ancestor(fixed, held_out.ancestor, sampler.num_chains)
    )
    variance = jax.lax.stop_gradient(variance)
    khat = pareto_khat(fixed)
    is_sound = jnp.isfinite(value) & jnp.all(jnp.isfinite(fixed)) & (effective_size(fixed) >= num_held_out / 10)
    return LogNormalizer(
        value=value,
        standard_error=jnp.sqrt(variance),
        ess=1.0 / (variance + 1.0 / num_held_out),
        pareto_khat=khat,
        num_gradients=jnp.zeros((), jnp.int32),
        reliable=is_sound & (variance < MAX_VARIANCE) & (khat < MAX_KHAT),
    )


def _check_held_out(ancestor: Array, num_held_out: int | None) -> int:
    num_chains = ancestor.shape[0]
    num_held_out = num_chains // 2 if num_held_out is None else check_count("num_held_out", num_held_out, 0)
    if not 25 <= num_held_out < num_chains:
        raise ValueError(
            f"num_held_out: got {num_held_out} of {num_chains} chains, expected at least 25 and not all of them. Log Z on "
            "chains whose gradient has been followed drifts; train with more chains, and num_held_out=... of them."
        )
    if is_traced(ancestor):
        return num_held_out
    first = num_chains - num_held_out
    is_held_out = np.arange(num_chains) >= first
    mixed = int(np.sum((np.asarray(ancestor) >= first) != is_held_out))
    if mixed:
        raise ValueError(
            f"num_held_out: got {num_held_out}, but {mixed} chains descend across that line, expected the number that the "
            "objective was given: chains that a gradient has seen would be counted, and log Z be too low."
        )
    return num_held_out
