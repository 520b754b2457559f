"""Maximum likelihood by negatives: contrastive divergence from data, and from persistent chains.

The gradient of the negative log-likelihood of ``p = exp(-U) / Z`` is ``E_data[grad U] - E_p[grad U]``. Both objectives
here replace the second expectation by chains; it is unbiased only when the negatives are stationary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebm_ppl.sampling import advance, chains_at, check_probability, gather_chains, restart, scatter_chains
from ebm_ppl.types import Array, Batch, Info, Key, Metrics, Potential, PyTree, SamplerState, Scalar

FROZEN = 1e-3
"""A chain whose acceptance rate over a whole phase is below this counts as frozen."""

Restart = Callable[[Key, int], PyTree]
"""Fresh chain positions: a function ``(key, num_chains) -> (chain, *event)``, such as a draw of the base."""


def contrastive_divergence(
    potential: Potential, sampler: SamplerState, batch: Batch, key: Key, *, num_steps: int
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Contrastive divergence (CD-k): negatives are ``num_steps`` kernel steps from the batch itself.

    ``loss = mean U(batch) - mean U(negatives)``, the negatives constant. Its gradient is that of the log-likelihood only
    in the limit of many steps; chains started at data sit at the data's mode weights whatever the model says.

    Args:
        potential: Energy of one event, base included.
        sampler: Supplies the kernel and its tunables; its positions are not used and pass through.
        batch: Rows ``(row, *event)``.
        key: Random key.
        num_steps: Kernel steps (k).

    Returns:
        ``(loss, (sampler, metrics))``. The loss is an energy gap, not a likelihood. Metrics: ``energy_data``,
        ``energy_negative``, ``energy_gap``, ``energy_gap_error`` (standard error of the gap; NaN with one row or one
        chain), ``acceptance_rate``, ``num_divergent`` (chains), ``num_nonfinite`` (proposals with a NaN or infinite
        energy, all rejected), ``frozen_fraction`` (chains that did not move, or had no chance to).

    Raises:
        TypeError: ``sampler`` is not a sampler state or the energy is not real floating.
        ValueError: ``num_steps < 1``, or the energy does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> batch = jnp.ones((8, 2))
        >>> sampler = ebm.init_sampler(batch, ebm.kernels.mala(step_size=0.1))
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> loss, (sampler, metrics) = contrastive_divergence(energy, sampler, batch, jax.random.key(0), num_steps=5)
        >>> sorted(metrics)[:2]
        ['acceptance_rate', 'energy_data']

    References:
        Hinton (2002), Training products of experts by minimizing contrastive divergence, equation 5 without its third
        term.
    """
    _require_sampler(sampler)
    if jax.tree.structure(batch) == jax.tree.structure(sampler.position):
        batch = jax.tree.map(lambda row, chain: row.astype(chain.dtype), batch, sampler.position)
    moved, info = advance(key, potential, chains_at(batch, sampler.kernel), num_steps)
    loss, metrics = energy_gap(potential, batch, moved, info, paired=True)
    return loss, (sampler, metrics)


def persistent_contrastive_divergence(
    potential: Potential,
    sampler: SamplerState,
    batch: Batch,
    key: Key,
    *,
    num_steps: int,
    num_chains: int | None = None,
    restart_probability: float | Array = 0.0,
    restart_from: Restart | None = None,
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Persistent contrastive divergence (PCD-k): negatives continue the chains of the sampler.

    ``loss = mean U(batch) - mean U(negatives)``, the negatives constant and weighted by the sampler's log weights. Its
    gradient is that of the log-likelihood while the chains keep up with the moving energy; chains that cannot cross
    between modes keep wrong mode weights with a healthy acceptance rate and energy gap.

    Args:
        potential: Energy of one event, base included.
        sampler: The persistent chains (the bank).
        batch: Rows ``(row, *event)``.
        key: Random key.
        num_steps: Kernel steps (k) per call.
        num_chains: Move only this many chains of the bank, chosen at random (a replay buffer); all when ``None``.
        restart_probability: Probability in [0, 1] with which each moved chain first restarts.
        restart_from: Where restarts come from; needed when ``restart_probability`` is not zero.

    Returns:
        ``(loss, (sampler, metrics))`` with the moved chains, and the metrics of :func:`contrastive_divergence`.

    Raises:
        TypeError: ``sampler`` is not a sampler state or the energy is not real floating.
        ValueError: ``num_steps < 1``, ``num_chains`` exceeds the bank, ``restart_probability`` is outside [0, 1] or
            comes without ``restart_from``, or the energy does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((16, 2)), ebm.kernels.mala(step_size=0.1))
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> loss, (sampler, metrics) = persistent_contrastive_divergence(
        ...     energy, sampler, jnp.ones((8, 2)), jax.random.key(0), num_steps=5)
        >>> sampler.position.shape
        (16, 2)

    References:
        Younes (1999), On the convergence of Markovian stochastic algorithms; Tieleman (2008), Training restricted
        Boltzmann machines using approximations to the likelihood gradient.
    """
    _require_sampler(sampler)
    choose_key, restart_key, fresh_key, key = jax.random.split(key, 4)
    index, moving = None, sampler
    if num_chains is not None:
        index, moving = gather_chains(choose_key, sampler, num_chains)
    check_probability("restart_probability", restart_probability)
    if restart_from is not None:
        fresh = restart_from(fresh_key, moving.num_chains)
        moving = restart(restart_key, moving, fresh, restart_probability)
    elif not isinstance(restart_probability, int | float) or restart_probability != 0.0:
        raise ValueError(
            f"restart_from: got None with restart_probability {restart_probability}, expected a function "
            "(key, num_chains) -> positions, such as a draw of the base."
        )
    moving, info = advance(key, potential, moving, num_steps)
    loss, metrics = energy_gap(potential, batch, moving, info)
    sampler = moving if index is None else scatter_chains(sampler, index, moving)
    return loss, (sampler, metrics)


def energy_gap(
    potential: Potential, batch: Batch, negatives: SamplerState, info: Info, *, paired: bool = False
) -> tuple[Scalar, Metrics]:
    """The contrastive loss ``mean U(batch) - sum_i w_i U(negative_i)`` and its metrics.

    Differentiable in the potential; the negatives and their weights ``w = softmax(log_weight)`` are constants.

    Args:
        potential: Energy of one event.
        batch: Rows ``(row, *event)``.
        negatives: Weighted negatives.
        info: Of the phase that made them.
        paired: Negative ``i`` started at row ``i``, so the error of the gap is that of the mean difference.

    Returns:
        The loss and the metrics of :func:`contrastive_divergence`.
    """
    data = jax.vmap(potential)(batch)
    negative = jax.vmap(potential)(jax.lax.stop_gradient(negatives.position))
    weight = jax.nn.softmax(jax.lax.stop_gradient(negatives.log_weight)).astype(negative.dtype)
    energy_data, energy_negative = data.mean(), jnp.sum(weight * negative)
    loss = energy_data - energy_negative
    if paired:
        error = jnp.sqrt((data - negative).var(ddof=1) / data.size)
    else:
        concentration = jnp.sum(weight**2)  # one over the effective number of negatives
        negative_variance = jnp.sum(weight * (negative - energy_negative) ** 2) / (1.0 - concentration)
        error = jnp.sqrt(data.var(ddof=1) / data.size + negative_variance * concentration)
    metrics = {
        "energy_data": energy_data,
        "energy_negative": energy_negative,
        "energy_gap": loss,
        "energy_gap_error": error,
        "acceptance_rate": info.acceptance_rate.mean(),
        "num_divergent": info.is_divergent.sum(),
        "num_nonfinite": info.num_nonfinite.sum(),
        "frozen_fraction": ((info.acceptance_rate < FROZEN) | ~info.has_moved).mean(),
    }
    return loss, jax.lax.stop_gradient(metrics)


def _require_sampler(sampler: SamplerState | None) -> None:
    if not isinstance(sampler, SamplerState):
        raise TypeError(
            f"sampler: got {type(sampler).__name__}, expected the result of ebm.init_sampler; "
            "this objective needs negatives."
        )
