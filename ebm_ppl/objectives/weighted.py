"""Maximum likelihood with weighted negatives: both its gradient, and an estimate of log Z that comes with it."""

from typing import Any

import jax
import jax.numpy as jnp

from ebm_ppl.checks import as_rows, check_count, check_markov_kernel, check_potential
from ebm_ppl.kernels.reweighted import ChainWeights, reweighted
from ebm_ppl.objectives.contrastive import energy_gap, require_sampler
from ebm_ppl.proposals import check_proposal, sample_and_log_prob
from ebm_ppl.replay import scatter_chains, take_chains
from ebm_ppl.sampling import advance, init_sampler
from ebm_ppl.types import Array, Batch, Kernel, Key, Metrics, Potential, SamplerState, Scalar
from ebm_ppl.weights import effective_size, is_collapsed, log_mean_weight, variance_by_ancestor


def importance_sampled_likelihood(
    potential: Potential,
    sampler: Any,
    batch: Batch,
    key: Key,
    *,
    proposal: Any,
    num_samples: int,
) -> tuple[Scalar, tuple[Any, Metrics]]:
    """The negative log-likelihood with log Z by importance sampling from a normalised proposal.

    ``loss = mean U(batch) + log mean_i exp(-U(x_i)) / g(x_i)`` with draws ``x_i`` of ``g``. Its gradient weights the
    negatives by ``exp(-U) / g``, normalised by their sum. The estimate of ``Z`` has no bias; that of ``log Z`` and of the
    gradient have one of order ``1 / num_samples`` that grows with the variance of the weights, downwards for ``log Z``. So
    the proposal must cover the density and be close to it; a mode that it leaves out is invisible in every metric.

    The proposal is a constant. To learn it along, fit it between calls (:mod:`ebm_ppl.flows`) and pass the new one: in a
    ``functools.partial`` its arrays do not recompile :func:`ebm_ppl.fit`.

    Args:
        potential: Energy of one event, base included.
        sampler: Not used; passes through.
        batch: Rows ``(row, *event)``.
        key: Random key.
        proposal: NumPyro or distrax distribution of one event, or a flow.
        num_samples: Draws of the proposal, at least 2.

    Returns:
        ``(loss, (sampler, metrics))``. Metrics: ``energy_data``, ``log_normalizer``, ``log_normalizer_error`` (a standard
        error, itself an estimate from the weights), ``negative_ess`` (effective number of draws) and ``is_collapsed`` (1
        where that is less than a tenth of them: gradient and error are then those of a few lucky draws).

    Raises:
        TypeError: ``proposal`` has no density or nothing to draw with.
        ValueError: ``proposal`` has a batch shape, other events than the rows, or ``num_samples < 2``.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> loss, (_, metrics) = importance_sampled_likelihood(
        ...     lambda x: 0.5 * x**2, None, jnp.zeros(4), jax.random.key(0),
        ...     proposal=dist.Normal(0.0, 1.5), num_samples=1000)
        >>> bool(abs(metrics["log_normalizer"] - 0.9189) < 0.1)  # log sqrt(2 pi)
        True

    References:
        Bengio, Senécal (2003), Quick training of probabilistic neural nets by importance sampling, AISTATS.
    """
    check_proposal("proposal", proposal)
    num_samples = check_count("num_samples", num_samples, 2)
    batch = as_rows("batch", batch)
    draws, log_prob = jax.lax.stop_gradient(sample_and_log_prob(proposal, key, num_samples))
    found, expected = draws.shape[1:], jax.tree.map(lambda x: x.shape[1:], batch)
    if found != expected:
        raise ValueError(f"proposal: got events of shape {found}, expected that of the rows, {expected}.")
    check_potential(potential, jax.ShapeDtypeStruct(found, draws.dtype))
    energy_data = jax.vmap(potential)(batch).mean()
    log_weight = -jax.vmap(potential)(draws) - log_prob
    log_normalizer, variance = log_mean_weight(log_weight)
    loss = energy_data + log_normalizer
    metrics = {
        "energy_data": energy_data,
        "log_normalizer": log_normalizer,
        "log_normalizer_error": jnp.sqrt(variance),
        "negative_ess": effective_size(log_weight),
        "is_collapsed": is_collapsed(log_weight),
    }
    return loss, (sampler, jax.lax.stop_gradient(metrics))


def jarzynski_chains(
    key: Key, reference: Any, kernel: Kernel, num_chains: int, *, min_ess: float | Array = 0.5
) -> SamplerState:
    """The sampler of :func:`jarzynski_contrastive_divergence`: draws of a reference, to be weighted from then on.

    Args:
        key: Random key.
        reference: Normalised distribution of one event, such as the base of a tilted energy. It should cover the density
            where training starts.
        kernel: Moves the chains: with an accept step, or ``kernels.unadjusted_langevin``.
        num_chains: How many.
        min_ess: Fraction in (0, 1) of the chains below which their effective size calls for resampling.

    Returns:
        A sampler state whose ``log_weight`` has the running ``Z`` as its mean exponential.

    Raises:
        TypeError: ``reference`` has no density, or ``kernel`` starts its chains anew or gives them auxiliaries.
        ValueError: ``reference`` cannot be sampled, or a number is out of range.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = ebm.kernels.mala(step_size=0.1)
        >>> jarzynski_chains(jax.random.key(0), dist.Normal(0.0, 1.0), kernel, 32).num_chains
        32
    """
    check_markov_kernel("kernel", kernel)
    kernel = reweighted(kernel, reference, min_ess=min_ess)
    draws, _ = sample_and_log_prob(reference, key, check_count("num_chains", num_chains))
    return init_sampler(draws, kernel)


def jarzynski_contrastive_divergence(
    potential: Potential,
    sampler: SamplerState,
    batch: Batch,
    key: Key,
    *,
    num_steps: int,
    num_held_out: int | None = None,
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Persistent contrastive divergence with weights that make up for the lag of the chains, and a running log Z.

    When the energy changes, each chain is weighted by ``exp(U_before(x) - U_now(x))``; moves leave the weights alone, and
    resampling takes place where they have become uneven. The weighted chains stand for the energy as it is now, so that
    their gradient is that of the log-likelihood up to a bias of order one over their number, however few steps they make.
    Weights do not help chains that never saw a mode: they carry weight to where chains are.

    The gradient pulls the density down where its own chains happen to be, and measured on the same chains each such pull
    counts as a loss of ``Z``: an error of order one over their number per update, which adds up. Hence ``num_held_out``
    chains that no gradient sees, from which ``E[Z estimate / Z] = 1`` at every update.

    Args:
        potential: Energy of one event, base included.
        sampler: From :func:`jarzynski_chains`. Chains that have been moved or weighted otherwise are not what they seem.
        batch: Rows ``(row, *event)``.
        key: Random key.
        num_steps: Kernel steps (k) per call.
        num_held_out: How many of the chains, the last ones, serve log Z alone; half of them when ``None``. With 0 log Z
            comes from the chains of the gradient, and drifts as said above.

    Returns:
        ``(loss, (sampler, metrics))``. The value of the loss is an estimate of the negative log-likelihood, ``energy_data +
        log_normalizer``; its gradient is that of the energy gap. Metrics: those of
        :func:`ebm_ppl.objectives.persistent_contrastive_divergence`, ``log_normalizer``, ``log_normalizer_error`` (a
        standard error that takes chains for independent after each resampling, so that it is too small where they hardly
        move), ``held_out_ess`` (of the chains behind log Z) and ``is_collapsed`` (1 where one of the two groups is worth
        less than a tenth of its number: the energy moves too fast for its chains).

    Raises:
        TypeError: ``sampler`` is not from :func:`jarzynski_chains`.
        ValueError: ``num_steps < 1``, or ``num_held_out`` leaves fewer than two chains to the gradient or to log Z.

    Example:
        >>> import functools, jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = ebm.kernels.mala(step_size=0.3)
        >>> sampler = jarzynski_chains(jax.random.key(0), dist.Normal(0.0, 1.5), kernel, 2000)
        >>> def energy(x): return 0.5 * x**2
        >>> objective = jax.jit(functools.partial(jarzynski_contrastive_divergence, energy, num_steps=2))
        >>> loss, (sampler, metrics) = objective(sampler, jnp.zeros(4), jax.random.key(1))
        >>> bool(abs(metrics["log_normalizer"] - 0.9189) < 0.1)  # log sqrt(2 pi)
        True

    References:
        Carbone, Hua, Coste, Vanden-Eijnden (2023), Efficient training of energy-based models using Jarzynski equality,
        arXiv:2305.19414 (with one group of chains).
    """
    require_sampler(sampler)
    if not isinstance(sampler.auxiliary, ChainWeights):
        raise TypeError(
            "sampler: got chains that carry no weights, expected the result of ebm_ppl.objectives.jarzynski_chains."
        )
    num_held_out = _check_held_out(num_held_out, sampler.num_chains)
    num_learning = sampler.num_chains - num_held_out
    learning_key, held_out_key = jax.random.split(key)
    first = jnp.arange(num_learning)
    learning, info = advance(learning_key, potential, take_chains(sampler, first), num_steps)
    loss, metrics = energy_gap(potential, batch, learning, info)
    sampler, measured = scatter_chains(sampler, first, learning), learning
    if num_held_out:
        last = jnp.arange(num_learning, num_learning + num_held_out)
        measured, _ = advance(held_out_key, potential, take_chains(sampler, last), num_steps)
        sampler = scatter_chains(sampler, last, measured)
    log_normalizer, variance = log_mean_weight(measured.log_weight)
    # Chains that hardly move stay what their ancestors were; the larger of the two errors is honest for them too.
    by_ancestor = variance_by_ancestor(measured.log_weight, measured.auxiliary.ancestor, sampler.num_chains)
    metrics |= {
        "log_normalizer": log_normalizer,
        "log_normalizer_error": jnp.sqrt(jnp.maximum(variance + measured.auxiliary.variance.max(), by_ancestor)),
        "held_out_ess": effective_size(measured.log_weight),
        "is_collapsed": is_collapsed(learning.log_weight) | is_collapsed(measured.log_weight),
    }
    value = metrics["energy_data"] + log_normalizer.astype(loss.dtype)
    return loss + jax.lax.stop_gradient(value - loss), (sampler, jax.lax.stop_gradient(metrics))


def _check_held_out(num_held_out: int | None, num_chains: int) -> int:
    if num_held_out is None:
        num_held_out = num_chains // 2
    check_count("num_held_out", num_held_out, 0)
    if num_held_out == 1 or num_chains - num_held_out < 2:
        raise ValueError(
            f"num_held_out: got {num_held_out} of {num_chains} chains, expected 0 or at least 2, with 2 or more left for "
            "the gradient."
        )
    return num_held_out
