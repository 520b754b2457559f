"""Contrastive divergence without bias, from pairs of coupled chains that start at the data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count
from ebm_ppl.kernels.coupled import Pairs, coupled, is_equal
from ebm_ppl.objectives.contrastive import rows_like_chains
from ebm_ppl.partials import as_constants
from ebm_ppl.sampling import chains_at, check_sampler, is_discrete_kernel
from ebm_ppl.types import Array, Batch, Key, Metrics, Potential, SamplerState, Scalar


def coupled_contrastive_divergence(
    potential: Potential,
    sampler: SamplerState,
    batch: Batch,
    key: Key,
    *,
    num_steps: int = 1,
    num_averaged: int = 1,
    max_steps: int = 1000,
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Contrastive divergence whose bias is estimated and taken off: its expected gradient is that of the log-likelihood.

    From each row two chains start, ``x`` one step ahead of ``y``, coupled so that each follows the kernel and that at some
    step ``tau`` ``x_tau = y_{tau - 1}``, after which they are one. With ``k = num_steps`` and ``f = U``,

        E_p[f] = E[ f(x_k) + sum_{t = k + 1}^{tau - 1} ( f(x_t) - f(y_{t - 1}) ) ]

    exactly, for every ``k``: the sum is zero for chains that met by ``k + 1``, and estimates the rest of the way for the
    others. Averaging the estimates of ``m = num_averaged`` successive ``k`` gives each pair of the sum the weight ``min(1,
    (t - k) / m)``, and much less noise for the price of ``m`` steps more. The right ``k`` is one by which most chains have
    met; a small one is as unbiased, and noisy.

    The bound ``max_steps`` is what an unlucky pair may cost. Pairs that have not met by then end their sum early, which
    biases the gradient; they are counted in ``num_unmet``, and only a zero there means that nothing was cut off. The sum's
    variance need not be small: it has the length of the rarest meeting, and chains in two wells that a kernel hardly
    crosses between need as long as it takes to cross.

    The loop ends when all pairs have met. Gradients are added up as it goes, so that memory does not grow with its length;
    derivatives of second order of this loss are not available.

    Args:
        potential: Energy of one event, base included.
        sampler: Supplies the kernel: ``kernels.mala``, ``kernels.random_walk``, or a discrete kernel such as
            ``kernels.gibbs("block")`` for an RBM. Its positions are not used and pass through.
        batch: Rows ``(row, *event)``.
        key: Random key.
        num_steps: The step ``k`` from which on chains count.
        num_averaged: ``m``, how many successive ``k`` are averaged.
        max_steps: Most steps of a pair, at least ``num_steps + num_averaged``.

    Returns:
        ``(loss, (sampler, metrics))``. The loss is an energy gap, unbiased for ``mean U(batch) - E_p[U]``. Metrics:
        ``energy_data``, ``energy_negative``, ``energy_gap``, ``energy_gap_error`` (NaN with one row), ``acceptance_rate``
        (over all steps), ``num_unmet`` (pairs), ``meeting_time`` (mean of ``tau``, unmet pairs counted with
        ``max_steps``) and ``num_steps`` (of the longest pair).

    Raises:
        TypeError: ``sampler`` is not a sampler state, its kernel cannot be coupled, or a count is not a whole number.
        ValueError: a count is too small, or the energy does not fit one event.

    Example:
        >>> import functools, jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> batch = jax.random.normal(jax.random.key(0), (64, 2))
        >>> sampler = ebm.init_sampler(batch, ebm.kernels.mala(step_size=0.5))
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> objective = jax.jit(functools.partial(coupled_contrastive_divergence, energy, num_steps=5))
        >>> loss, (sampler, metrics) = objective(sampler, batch, jax.random.key(1))
        >>> int(metrics["num_unmet"])
        0

    References:
        Qiu, Zhang, Wang (2020), Unbiased contrastive divergence algorithm for training energy-based latent variable
        models, ICLR; Jacob, O'Leary, Atchadé (2020), Unbiased Markov chain Monte Carlo methods with couplings,
        arXiv:1708.03625, section 2 (the average over k).
    """
    batch = rows_like_chains(batch, sampler)
    num_steps, num_averaged = check_count("num_steps", num_steps), check_count("num_averaged", num_averaged)
    check_count("max_steps", max_steps, num_steps + num_averaged)
    check_sampler(potential, chains_at(batch, sampler.kernel))

    # What the energy holds, a module or a closure, as an argument: the loop sees constants, the loss the parameters.
    event = jax.tree.map(lambda x: x[0], batch)
    energy, held = jax.closure_convert(lambda event: potential(event), event)
    fixed = jax.lax.stop_gradient(held)
    # Discrete kernels ask the potential for more than its energy.
    target = as_constants(potential) if is_discrete_kernel(sampler.kernel) else lambda event: energy(event, *fixed)
    run = _run(key, target, energy, fixed, sampler, batch, num_steps, num_averaged, max_steps)
    data = jax.vmap(potential)(batch)
    # Linear in the parameters: zero, with the gradient that was added up.
    slope = sum(jnp.vdot(g, x - jax.lax.stop_gradient(x)) for g, x in zip(run.gradient, held, strict=True))
    # A kernel with parts that accept whatever they propose has no acceptance rate, and another law than the energy's.
    bias = jnp.where(jnp.isnan(run.acceptance_rate), jnp.nan, 0.0)
    loss = data.mean() - (run.energy.mean() + slope / data.size + bias).astype(data.dtype)
    metrics = {
        "energy_data": data.mean(),
        "energy_negative": run.energy.mean(),
        "energy_gap": loss,
        "energy_gap_error": jnp.sqrt((data - run.energy).var(ddof=1) / data.size),
        "acceptance_rate": run.acceptance_rate / run.time,
        "num_unmet": jnp.sum(~run.pairs.has_met),
        "meeting_time": run.meeting_time.mean(),
        "num_steps": run.time,
    }
    return loss, (sampler, jax.lax.stop_gradient(metrics))


class _Run(NamedTuple):
    """Pairs ``(x_t, y_{t - 1})`` at step ``time = t``, and sums over the steps before.

    Attributes:
        time: ``t``.
        pairs: The pairs.
        energy: Estimate of the mean energy by each pair.
        gradient: Gradient of the sum of these in what the energy holds.
        meeting_time: Step at which each pair met; the last one so far for those that have not.
        acceptance_rate: Sum over steps of the mean over chains.
    """

    time: Array
    pairs: Pairs
    energy: Array
    gradient: list[Array]
    meeting_time: Array
    acceptance_rate: Array


def _run(
    key: Key,
    target: Potential,
    energy: Callable[..., Scalar],
    held: list[Array],
    sampler: SamplerState,
    batch: Batch,
    num_steps: int,
    num_averaged: int,
    max_steps: int,
) -> _Run:
    """Pairs from the rows until all have met, and the last that is averaged has been passed."""
    init, step = coupled(sampler.kernel, target)
    init_key, key = jax.random.split(key)
    start = init(batch, init_key)
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    is_apart = jnp.zeros(num_rows, bool)
    # One step of the first chains alone: what a pair that starts together does with its second is dropped.
    ahead = step(jax.random.fold_in(key, 0), Pairs(start, start, is_apart, jnp.zeros(num_rows)))
    has_met = jax.vmap(is_equal)(ahead.first.position, start.position)
    pairs = Pairs(ahead.first, start, has_met, ahead.acceptance_rate)

    def terms(held: list[Array], pairs: Pairs, alone: Array, pair: Array) -> tuple[Scalar, Array]:
        """What step ``t`` adds, in total and by pair."""
        first, second = (jax.vmap(lambda event: energy(event, *held))(chains.position) for chains in pairs[:2])
        added = (alone + pair) * first - pair * second
        return added.sum(), added

    def advance(run: _Run) -> _Run:
        since = (run.time - num_steps).astype(run.energy.dtype)
        alone = jnp.where((since >= 0) & (since < num_averaged), 1.0 / num_averaged, 0.0)
        pair = jnp.where(run.pairs.has_met, 0.0, jnp.clip(since / num_averaged, 0.0, 1.0))
        gradient, added = jax.grad(terms, has_aux=True)(held, run.pairs, alone, pair)
        pairs = step(jax.random.fold_in(key, run.time), run.pairs)
        return _Run(
            time=run.time + 1,
            pairs=pairs,
            energy=run.energy + added,
            gradient=jax.tree.map(jnp.add, run.gradient, gradient),
            meeting_time=jnp.where(run.pairs.has_met, run.meeting_time, run.time + 1),
            acceptance_rate=run.acceptance_rate + pairs.acceptance_rate.mean(),
        )

    def is_unfinished(run: _Run) -> Array:
        is_needed = (run.time < num_steps + num_averaged) | ~run.pairs.has_met.all()
        return is_needed & (run.time < max_steps)

    dtype = jax.eval_shape(terms, held, pairs, 0.0, 0.0)[0].dtype
    begin = _Run(
        time=jnp.ones((), jnp.int32),
        pairs=pairs,
        energy=jnp.zeros(num_rows, dtype),
        gradient=jax.tree.map(jnp.zeros_like, held),
        meeting_time=jnp.ones(num_rows, jnp.int32),
        acceptance_rate=pairs.acceptance_rate.mean(),
    )
    return jax.lax.stop_gradient(jax.lax.while_loop(is_unfinished, advance, begin))
