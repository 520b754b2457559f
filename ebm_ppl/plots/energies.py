"""Energies of data and negatives, and where the energy of training chains goes when they run on."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ebm_ppl.checks import check_count
from ebm_ppl.plots.style import COLOURS, kernel_steps, new_figure, require_group, require_variable, styled


def energy_histogram(
    tree: xr.DataTree, data: Any, *, group: str = "negative_phase_stats", num_bins: int = 40
) -> Figure:
    """Energies of the data against those of the negatives, as densities over the same bins, with their means.

    Where the two differ, the negatives do not represent the model or the model does not fit. Where they agree little
    follows: chains that stay at the data's mode weights agree with the data whatever the model says.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree`.
        data: Energies of the data ``(row,)`` under the same potential, or the name of the group whose ``potential`` they
            are.
        group: Group of the negatives' ``potential``.
        num_bins: Bins.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no such group, it has no ``potential``, there are no energies, or one is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), energy, sampler, 200)
        >>> data = jax.random.normal(jax.random.key(1), (500, 2))
        >>> figure = energy_histogram(ebm.diagnostics.to_datatree(draws), jax.vmap(energy)(data))
    """
    energies = {
        "data": _finite("data", _potential(tree, data) if isinstance(data, str) else data),
        "negatives": _finite("tree", _potential(tree, group)),
    }
    pooled = np.concatenate(list(energies.values()))
    bins = np.histogram_bin_edges(pooled, check_count("num_bins", num_bins))
    with styled():
        figure = new_figure()
        axes = figure.subplots()
        for (name, values), colour, hatch in zip(energies.items(), COLOURS, (None, "///"), strict=False):
            share, _ = np.histogram(values, bins, density=True)
            label = f"{name}, mean {values.mean():.4g}"
            axes.stairs(share, bins, fill=True, alpha=0.35, color=colour, hatch=hatch)
            axes.stairs(share, bins, color=colour, linewidth=1.8, label=label)
            axes.axvline(values.mean(), color=colour, linestyle="--" if hatch else "-")
        axes.set_xlabel("energy (nats)")
        axes.set_ylabel("density (per nat)")
        gap = energies["data"].mean() - energies["negatives"].mean()
        axes.set_title(f"energy gap, data less negatives: {gap:+.3g} nats")
        axes.legend()
    return figure


def energy_drift(
    tree: xr.DataTree,
    *,
    start: Any = None,
    group: str = "negative_phase_stats",
    num_steps: int | None = None,
) -> Figure:
    """What becomes of the energy of training chains that run on beyond the ``k`` steps of training, at frozen parameters.

    The mean over the chains of their change of energy since, with two standard errors over chains. It stays at zero where
    the chains had arrived at the law of the model; a short run that only looks like data after ``k`` steps leaves.

    Args:
        tree: From draws that continue the chains of training.
        start: Energies of these chains ``(chain,)`` at the end of training, before the first draw. The first draw itself
            when ``None``, which hides what happens before it.
        group: Group of ``potential``.
        num_steps: Kernel steps between draws; from the attributes of the group when ``None``.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no such group or ``potential``, there are fewer than two chains or draws, ``start`` is of
            another length, or an energy is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), ebm.kernels.mala(step_size=0.1))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 50, num_steps=2)
        >>> figure = energy_drift(ebm.diagnostics.to_datatree(draws, num_steps=2), start=jnp.zeros(8))
    """
    dataset = require_group(tree, group)
    energies = np.asarray(require_variable(dataset, group, "potential"), np.float64)
    if min(energies.shape) < 2:
        raise ValueError(
            f"tree: got {energies.shape[0]} chains of {energies.shape[1]} draws, expected at least 2 of each."
        )
    _finite("tree", energies)
    if num_steps is None:
        unit, name = kernel_steps(dataset)
    else:
        unit, name = check_count("num_steps", num_steps), "kernel steps"
    if start is None:
        change, steps = energies - energies[:, :1], unit * np.arange(energies.shape[1])
        since = "since the first draw"
    else:
        before = _finite("start", start)
        if before.shape != energies.shape[:1]:
            raise ValueError(f"start: got {before.size} energies, expected one for each of {energies.shape[0]} chains.")
        change, steps = energies - before[:, None], unit * np.arange(1, energies.shape[1] + 1)
        change, steps = np.pad(change, ((0, 0), (1, 0))), np.insert(steps, 0, 0)
        since = "since the end of training"
    mean = change.mean(axis=0)
    error = change.std(axis=0, ddof=1) / np.sqrt(len(change))
    with styled():
        figure = new_figure()
        axes = figure.subplots()
        axes.axhline(0.0, color="0.4", linestyle=":", linewidth=1.2, label="no drift")
        axes.fill_between(steps, mean - 2 * error, mean + 2 * error, color=COLOURS[0], alpha=0.25, linewidth=0)
        axes.plot(steps, mean, color=COLOURS[0], label=f"mean of {len(change)} chains ± 2 standard errors")
        axes.set_xlabel(f"{'draws' if name == 'draw' else name} beyond training")
        axes.set_ylabel(f"change of energy (nats)\n{since}")
        z = mean[-1] / error[-1] if error[-1] > 0 else np.nan
        axes.set_title(f"at the end {mean[-1]:+.3g} nats, {z:+.1f} standard errors")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _potential(tree: xr.DataTree, group: str) -> np.ndarray:
    return require_variable(require_group(tree, group), group, "potential")


def _finite(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64).ravel()
    if not values.size:
        raise ValueError(f"{name}: got no energies, expected at least one.")
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name}: got {bad} of {values.size} energies that are NaN or infinite, expected finite ones.")
    return values
