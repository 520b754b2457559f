"""Numbers that must be finite, chains that must move, and what is said when they are not or do not."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import map_energy
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.meshes import on_host
from ebm_ppl.potentials import trainable
from ebm_ppl.regions import is_whole_space
from ebm_ppl.training.batches import Batches
from ebm_ppl.training.state import TrainState
from ebm_ppl.types import Array, Key, Potential, PyTree


def is_finite(tree: PyTree) -> Array:
    """Whether every floating leaf is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves], bool).all()


def is_healthy(state: TrainState) -> Array:
    """Finite parameters and chains. Constants of a potential may be infinite, and so may a dead particle's log weight."""
    healthy = is_finite(eqx.filter(state.potential, trainable(state.potential)))
    if state.sampler is None:
        return healthy
    healthy &= is_finite(state.sampler.position) & ~jnp.isnan(state.sampler.log_weight).any()
    if state.sampler_optimizer_state is not None:
        healthy &= is_finite(eqx.filter(state.sampler.kernel, trainable(state.sampler.kernel)))
    return healthy


TOO_LARGE = 1e5
"""Energies of which single precision resolves differences to .01 only: accept steps and gaps are made of such."""


def has_walls(state: TrainState) -> bool:
    """Whether the potential says that its events do not fill all space, so that proposals beyond are nothing unusual."""
    support = getattr(state.potential, "support", None)
    if support is None or state.sampler is None or getattr(support, "is_discrete", False):
        return False
    return not is_whole_space(support, jax.tree.map(lambda x: x[0], state.sampler.position))


def unhealthy(metrics: dict[str, np.ndarray], start: int, *, is_walled: bool = False) -> dict[str, str]:
    """What the host must hear about one report's worth of updates, by kind."""
    found = {}
    where = f"updates {start} to {start + len(metrics['loss']) - 1}"
    if "frozen_fraction" in metrics and (metrics["frozen_fraction"] >= 0.5).all():
        found["frozen"] = (
            f"{where}: {metrics['frozen_fraction'].mean():.0%} of the chains were frozen (acceptance rate zero), so the "
            "gradient is wrong. Use a smaller step size, tune it with ebm_ppl.tune_step_size, or pass target_acceptance "
            "to fit."
        )
    if "num_divergent" in metrics and metrics["num_divergent"].any():
        found["divergent"] = (
            f"{where}: {int(metrics['num_divergent'].sum())} chain phases diverged or became non-finite. Use a smaller "
            "step size."
        )
    elif "num_nonfinite" in metrics and metrics["num_nonfinite"].any() and not is_walled:
        found["nonfinite"] = (
            f"{where}: {int(metrics['num_nonfinite'].sum())} proposals had a NaN or infinite energy and were rejected, so "
            "the chains never see that region. If it is meant, say so by a base with that support "
            "(ebm_ppl.potentials.tilt); else look for an overflow, a logarithm or a root in the energy."
        )
    sizes = [np.abs(metrics[name]).max() for name in ("energy_data", "energy_negative") if name in metrics]
    if sizes and max(sizes) > TOO_LARGE and metrics["loss"].dtype.itemsize < 8:
        found["large"] = (
            f"{where}: energies reached {max(sizes):.1e}, and float32 resolves differences of such to "
            f"{np.spacing(np.float32(max(sizes))):.2g} only, which accept steps and gaps are made of. Penalise large "
            "energies (ebm_ppl.objectives.energy_l2), use a smaller learning rate, or train with jax_enable_x64."
        )
    if "is_collapsed" in metrics and metrics["is_collapsed"].mean() >= 0.5:
        found["collapsed"] = (
            f"{where}: in {metrics['is_collapsed'].mean():.0%} of them fewer than a tenth of the negatives carried the "
            "weight, so the gradient is that of a few. Use more of them, a proposal or kernel closer to the energy, or a "
            "smaller learning rate."
        )
    return found


def warn_of_new(found: dict[str, str], known: set[str]) -> set[str]:
    """Warn once of each kind, and return the kinds found."""
    for kind in found.keys() - known:
        warnings.warn(found[kind], RuntimeWarning, stacklevel=3)
    return set(found)


def training_failure(
    key: Key, state: TrainState, failed: TrainState, batches: Batches, history: dict[str, Any]
) -> TrainingFailure:
    """Find what failed by looking again, on the host, at the last good state and the batch of the failing update."""
    step = int(state.step)
    data_key = jax.random.split(key)[0]
    batch, _ = batches.take(data_key, state.step, batches.begin(data_key, state.step))
    bad_rows = batches.rows(data_key, state.step)[_non_finite_rows(state.potential, batch)]
    bad_chains = np.zeros(0, int)
    if state.sampler is not None:
        bad_chains = np.flatnonzero(~np.isfinite(on_host(map_energy(state.potential, state.sampler.position))))
    sites = _non_finite_sites(failed)
    message = (
        f"update {step} produced a non-finite {', '.join(sites) or 'loss or gradient'}; training stopped before it. "
        f"Batch rows with a non-finite energy: {bad_rows.tolist()[:10] or 'none'}; chains: "
        f"{bad_chains.tolist()[:10] or 'none'}. "
        "The last good state is in `.state`. Usual remedies: a smaller learning rate or step size, gradient clipping "
        "(optax.clip_by_global_norm), an energy tilted by a base so that it cannot run away to minus infinity."
    )
    return TrainingFailure(
        message, step=step, sites=sites, state=state, rows=bad_rows, chains=bad_chains, history=history
    )


def _non_finite_sites(state: TrainState) -> tuple[str, ...]:
    """Names of the arrays of both players that an update left non-finite."""
    players = {"potential": eqx.filter(state.potential, trainable(state.potential))}
    if state.sampler is not None:
        players["sampler.position"] = state.sampler.position
        if state.sampler_optimizer_state is not None:
            players["sampler.kernel"] = eqx.filter(state.sampler.kernel, trainable(state.sampler.kernel))
    found = [
        player + jax.tree_util.keystr(path)
        for player, tree in players.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not bool(is_finite(leaf))
    ]
    if state.sampler is not None and bool(jnp.isnan(state.sampler.log_weight).any()):
        found.append("sampler.log_weight")
    return tuple(found)


def _non_finite_rows(potential: Potential, rows: PyTree) -> np.ndarray:
    """Which rows have a non-finite energy; none where rows are not events of the potential, such as labelled data."""
    try:
        return ~np.isfinite(on_host(map_energy(potential, rows)))
    except (TypeError, ValueError, IndexError):
        return np.zeros(jax.tree.leaves(rows)[0].shape[0], bool)
