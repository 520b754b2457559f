"""Maximum likelihood by negatives: contrastive divergence from data, and from persistent chains.

The gradient of the negative log-likelihood of ``p = exp(-U) / Z`` is ``E_data[grad U] - E_p[grad U]``. Both objectives
here replace the second expectation by chains; it is unbiased only when the negatives are stationary.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_rows, check_count, check_potential, check_probability
from ebm_ppl.info import moved, step_info
from ebm_ppl.partials import function_behind
from ebm_ppl.replay import gather_chains, restart, scatter_chains
from ebm_ppl.sampling import advance, chains_at, draw
from ebm_ppl.types import Array, Batch, Info, Key, Metrics, PairedKernel, Potential, PyTree, SamplerState, Scalar
from ebm_ppl.weights import COLLAPSED, normalized_weights

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
        energy, all rejected), ``frozen_fraction`` (chains that did not move, or had no chance to), ``negative_ess``
        (effective number of negatives: that of the chains, unless their kernel weights them), ``is_collapsed`` (1 where
        that is below a tenth of the chains), ``chain_age`` (mean kernel steps since the chains started). From kernels
        whose states hold their energies, at no cost: ``energy_drift``, mean change of the energy over the phase, many of
        its ``energy_drift_error`` from zero where chains are still on their way, and ``energy_autocorrelation``, the
        correlation over chains between the energies before and after the phase, which
        :func:`ebm_ppl.diagnostics.autocorrelation_time` turns into a number of kernel steps.

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
        ['acceptance_rate', 'chain_age']

    References:
        Hinton (2002), Training products of experts by minimizing contrastive divergence, equation 5 without its third
        term.
    """
    rows, negatives, info = chains_from_rows(potential, sampler, batch, key, num_steps)
    loss, metrics = energy_gap(potential, rows, negatives, info, paired=True)
    return loss, (sampler, metrics)


def chains_from_rows(
    potential: Potential, sampler: SamplerState, batch: Batch, key: Key, num_steps: int
) -> tuple[Batch, SamplerState, Info]:
    """The negative phase of :func:`contrastive_divergence`: rows in the dtype of the chains, chains moved from them, info.

    Raises:
        TypeError: ``sampler`` is not a sampler state or the energy is not real floating.
        ValueError: ``num_steps < 1``, or the energy does not fit one event.
    """
    batch = rows_like_chains(batch, sampler)
    negatives, info = advance(key, potential, chains_at(batch, sampler.kernel), num_steps)
    return batch, negatives, info


def persistent_contrastive_divergence(
    potential: Potential,
    sampler: SamplerState,
    batch: Batch,
    key: Key,
    *,
    num_steps: int,
    num_chains: int | None = None,
    restart_probability: float | Array = 0.0,
    restart_age: int | None = None,
    restart_from: Restart | Literal["batch"] | None = None,
    all_states: bool = False,
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Persistent contrastive divergence (PCD-k): negatives continue the chains of the sampler.

    ``loss = mean U(batch) - mean U(negatives)``, the negatives constant and weighted by the sampler's log weights. Its
    gradient is that of the log-likelihood while the chains keep up with the moving energy; chains that cannot cross
    between modes keep wrong mode weights with a healthy acceptance rate and energy gap.

    A kernel that weights its chains (``kernels.tempered_smc``, ``kernels.diffusion``) gives weights that are normalised
    here. A ratio of weighted sums has a bias of order ``1 / negative_ess``, and where that metric falls to a few chains the
    gradient is the energy of those few.

    Args:
        potential: Energy of one event, base included.
        sampler: The persistent chains (the bank).
        batch: Rows ``(row, *event)``.
        key: Random key.
        num_steps: Kernel steps (k) per call.
        num_chains: Move only this many chains of the bank, chosen at random (a replay buffer); all when ``None``.
        restart_probability: Probability in [0, 1] with which each moved chain first restarts.
        restart_age: Chains that are so many kernel steps old restart too: every ``P`` updates with ``P num_steps``.
        restart_from: Where restarts come from, a function ``(key, num_chains) -> positions``, or ``"batch"``: chain ``i``
            starts at row ``i`` modulo the number of rows, and with antithetic noise both of a pair at one row. Needed
            where chains restart.
        all_states: Negatives are all ``num_steps`` states that each chain passes through, not only the last. They are
            less noisy where neighbouring states differ, and lag further behind the energy. Memory grows by a factor of
            ``num_steps``: all states are kept, and the energy and its gradient are evaluated at each of them.

    Returns:
        ``(loss, (sampler, metrics))`` with the moved chains, and the metrics of :func:`contrastive_divergence`.

    Restarts are what lies between the classical algorithms: with probability 0 this is PCD-k; with probability 1 from the
    batch, with one chain per row, CD-k, and with one step of Langevin of step size ``h`` its gradient is ``h`` times that
    of score matching up to order ``h^2``; with probability 1 from noise, training of a short run
    (:func:`ebm_ppl.kernels.short_run`).

    Raises:
        TypeError: ``sampler`` is not a sampler state or the energy is not real floating.
        ValueError: ``num_steps < 1``, ``num_chains`` exceeds the bank, ``restart_probability`` is outside [0, 1],
            ``restart_age`` is below 1, restarts come without ``restart_from``, or the energy does not fit one event.

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
        Boltzmann machines using approximations to the likelihood gradient; Domingo-Enrich, Bietti, Gabrie, Bruna,
        Vanden-Eijnden (2021), arXiv:2107.05134, for restarts at data.
    """
    require_sampler(sampler)
    num_steps = check_count("num_steps", num_steps)
    choose_key, restart_key, fresh_key, key = jax.random.split(key, 4)
    index, moving = None, sampler
    if num_chains is not None:
        index, moving = gather_chains(choose_key, sampler, num_chains)
    check_probability("restart_probability", restart_probability)
    if restart_age is not None:
        check_count("restart_age", restart_age)
    if not isinstance(all_states, bool | np.bool_):
        raise TypeError(f"all_states: got {all_states!r}, expected True or False.")
    if restart_from is not None:
        fresh = _fresh_starts(fresh_key, restart_from, batch, moving)
        moving = restart(restart_key, moving, fresh, restart_probability, max_age=restart_age)
    elif restart_age is not None or not isinstance(restart_probability, int | float) or restart_probability != 0.0:
        given = f"restart_probability {restart_probability}" if restart_age is None else f"restart_age {restart_age}"
        raise ValueError(
            f"restart_from: got None with {given}, expected a function (key, num_chains) -> positions, such as a draw of "
            "the base, or 'batch'."
        )
    if all_states:
        moving, negatives, info = _trace(key, potential, moving, num_steps)
    else:
        moving, info = advance(key, potential, moving, num_steps)
        negatives = moving
    loss, metrics = energy_gap(potential, batch, negatives, info)
    sampler = moving if index is None else scatter_chains(sampler, index, moving)
    return loss, (sampler, metrics)


def _fresh_starts(key: Key, source: Restart | Literal["batch"], batch: Batch, chains: SamplerState) -> PyTree:
    if not (isinstance(source, str) and source == "batch"):
        if not callable(source):
            raise ValueError(
                f"restart_from: got {source!r}, expected a function (key, num_chains) -> positions, or 'batch'."
            )
        return source(key, chains.num_chains)
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    # Chains whose noise comes in pairs, one in each half, go to one row together.
    func = function_behind(chains.kernel)
    period = chains.num_chains // 2 if isinstance(func, PairedKernel) and func.antithetic else chains.num_chains
    index = jnp.arange(chains.num_chains) % period % num_rows
    return jax.tree.map(lambda rows: rows[index], rows_like_chains(batch, chains))


def _trace(
    key: Key, potential: Potential, sampler: SamplerState, num_steps: int
) -> tuple[SamplerState, SamplerState, Info]:
    """All states of ``num_steps`` steps as negatives, ``(chain, step, *event)``, and the report of the phase."""
    after, draws = draw(key, potential, sampler, num_steps)
    has_moved = jax.vmap(moved, in_axes=(None, 1), out_axes=1)(sampler.position, draws.position)
    info = step_info(
        sampler.num_chains,
        acceptance_rate=draws.acceptance_rate.mean(axis=1),
        is_divergent=draws.is_divergent.any(axis=1),
        num_gradients=draws.num_gradients.sum(axis=1),
        num_energies=draws.num_energies.sum(axis=1),
        num_nonfinite=draws.num_nonfinite.sum(axis=1),
        has_moved=has_moved.any(axis=1),
    )
    info = info._replace(potential_before=jax.vmap(potential)(sampler.position), potential_after=draws.potential[:, -1])
    # Only weights of one step can be compared with each other.
    log_weight = jax.nn.log_softmax(draws.log_weight, axis=0)
    return after, SamplerState(draws.position, log_weight, sampler.kernel, age=after.age), info


def energy_gap(
    potential: Potential, batch: Batch, negatives: SamplerState, info: Info, *, paired: bool = False
) -> tuple[Scalar, Metrics]:
    """The contrastive loss ``mean U(batch) - sum_i w_i U(negative_i)`` and its metrics.

    Differentiable in the potential; the negatives and their weights ``w = softmax(log_weight)`` are constants.

    Args:
        potential: Energy of one event.
        batch: Rows ``(row, *event)``.
        negatives: Weighted negatives ``(chain, *event)``, or several of each chain: ``(chain, step, *event)`` with log
            weights ``(chain, step)``.
        info: Of the phase that made them.
        paired: Negative ``i`` started at row ``i``, so the error of the gap is that of the mean difference.

    Returns:
        The loss and the metrics of :func:`contrastive_divergence`.

    Raises:
        TypeError: the batch is no arrays of real numbers.
        ValueError: it has no rows, or the energy does not fit one of them.
    """
    batch = as_rows("batch", batch)
    _refuse_complex(batch)
    if jax.tree.structure(batch) != jax.tree.structure(negatives.position):
        # Other containers may do as well, and an energy may leave out what it does not need.
        check_potential(potential, jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), batch))
    log_weight = jax.lax.stop_gradient(negatives.log_weight)
    energy_of_each = potential
    for _ in log_weight.shape:
        energy_of_each = jax.vmap(energy_of_each)
    data = jax.vmap(potential)(batch)
    negative = energy_of_each(jax.lax.stop_gradient(negatives.position))
    weight = normalized_weights(log_weight, axis=None).astype(negative.dtype)
    loss, metrics = gap_of_energies(data, negative, weight, info, paired=paired)
    if negatives.age is not None:
        metrics["chain_age"] = negatives.age.mean()
    return loss, metrics


def gap_of_energies(
    data: Array, negative: Array, weight: Array, info: Info, *, paired: bool = False
) -> tuple[Scalar, Metrics]:
    """:func:`energy_gap` from energies ``(row,)``, and ``(chain, *several)`` with their weights, whose sum is 1."""
    energy_data, energy_negative = data.mean(), jnp.sum(weight * negative)
    loss = energy_data - energy_negative
    chain_weight = weight.reshape(weight.shape[0], -1).sum(axis=1)
    concentration = jnp.sum(chain_weight**2)  # one over the effective number of negatives
    if paired:
        error = jnp.sqrt((data - negative).var(ddof=1) / data.size)
    else:
        # The delta method for a ratio of sums over independent chains. A chain that weighs all leaves 0 / 0.
        residual = (weight * (negative - energy_negative)).reshape(weight.shape[0], -1).sum(axis=1)
        negative_variance = jnp.sum(residual**2) / (1.0 - concentration)
        error = jnp.sqrt(data.var(ddof=1) / data.size + negative_variance)
    metrics = {
        "energy_data": energy_data,
        "energy_negative": energy_negative,
        "energy_gap": loss,
        "energy_gap_error": error,
        "acceptance_rate": info.acceptance_rate.mean(),
        "num_divergent": info.is_divergent.sum(),
        "num_nonfinite": info.num_nonfinite.sum(),
        "frozen_fraction": ((info.acceptance_rate < FROZEN) | ~info.has_moved).mean(),
        "negative_ess": 1.0 / concentration,
        "is_collapsed": ~(concentration * (COLLAPSED * chain_weight.size) <= 1.0),
        **_energies_of_phase(info),
    }
    return loss, jax.lax.stop_gradient(metrics)


def _energies_of_phase(info: Info) -> Metrics:
    """How the energies of the chains changed over the phase, and how much of them it forgot."""
    before, after = info.potential_before, info.potential_after
    if before is None or after is None:
        return {}
    change = after - before
    return {
        "energy_drift": change.mean(),
        "energy_drift_error": jnp.sqrt(change.var(ddof=1) / change.size),
        "energy_autocorrelation": jnp.corrcoef(before, after)[0, 1],
    }


def rows_like_chains(batch: Batch, sampler: SamplerState) -> Batch:
    """Rows in the dtype of the chains, for chains to start at.

    Raises:
        TypeError: ``sampler`` is not a sampler state, or the batch no arrays of numbers.
        ValueError: the batch has no rows.
    """
    require_sampler(sampler)
    batch = as_rows("batch", batch)
    if jax.tree.structure(batch) != jax.tree.structure(sampler.position):
        return batch
    _refuse_complex(batch)
    return jax.tree.map(lambda row, chain: row.astype(chain.dtype), batch, sampler.position)


def _refuse_complex(batch: Batch) -> None:
    for rows in jax.tree.leaves(batch):
        if jnp.issubdtype(rows.dtype, jnp.complexfloating):
            raise TypeError(f"batch: got dtype {rows.dtype}, expected real numbers.")


def require_sampler(sampler: SamplerState | None) -> None:
    """A sampler state.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(sampler, SamplerState):
        raise TypeError(
            f"sampler: got {type(sampler).__name__}, expected the result of ebm.init_sampler; "
            "this objective needs negatives."
        )
