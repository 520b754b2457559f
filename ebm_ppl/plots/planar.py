"""The density of a potential in the plane, and where chains go in it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ebm_ppl.checks import check_count, check_potential, map_energy
from ebm_ppl.plots.style import COLOURS, events_of, new_figure, spread, styled
from ebm_ppl.types import Potential


def density(
    tree: xr.DataTree,
    potential: Potential,
    *,
    group: str = "negative_phase",
    limits: tuple[float, float, float, float] | None = None,
    num_chains: int = 4,
    num_draws: int = 100,
    resolution: int = 150,
) -> Figure:
    """The density ``exp(-U)`` of events in the plane, on a logarithmic scale, with the paths of a few chains on top.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree`; events ``(2,)``.
        potential: Energy of one event, base included.
        group: Group of the events.
        limits: Of the picture, ``(left, right, bottom, top)``; what holds all draws, and a tenth more, when ``None``.
        num_chains: Chains to show, spread over all of them.
        num_draws: Draws of each to show, the last ones.
        resolution: Points along each side.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no such group, events are not of shape ``(2,)``, ``limits`` are not increasing, or the
            energy is nowhere finite in them.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), energy, sampler, 50)
        >>> figure = density(ebm.diagnostics.to_datatree(draws), energy, resolution=30)
    """
    events = events_of(tree, group)
    if events.shape[2:] != (2,):
        raise ValueError(f"tree: got events of shape {events.shape[2:]}, expected (2,), points of the plane.")
    check_potential(potential, jnp.asarray(events[0, 0]))
    points = check_count("resolution", resolution, minimum=2)
    left, right, bottom, top = _around(events) if limits is None else limits
    if not (left < right and bottom < top):
        raise ValueError(f"limits: got {limits}, expected left < right and bottom < top.")
    x, y = np.linspace(left, right, points), np.linspace(bottom, top, points)
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(events.dtype)
    energy = np.asarray(map_energy(potential, jnp.asarray(grid)), np.float64).reshape(points, points)
    if not np.isfinite(energy).any():
        raise ValueError("potential: got no finite energy within the limits, expected some.")
    with styled():
        figure = new_figure(6.4, 5.0)
        axes = figure.subplots()
        # Below e^-10 of the peak there is nothing to see; NaN, an energy that is none, stays white.
        depth = np.clip(np.nanmin(np.where(np.isfinite(energy), energy, np.nan)) - energy, -10.0, 0.0)
        image = axes.imshow(
            depth, origin="lower", extent=(left, right, bottom, top), aspect="auto", cmap="Greys", vmin=-10.0, vmax=2.0
        )
        chosen = spread(len(events), check_count("num_chains", num_chains))
        for chain, colour in zip(chosen, np.resize(COLOURS[:6], len(chosen)), strict=True):
            path = events[chain, -check_count("num_draws", num_draws) :]
            axes.plot(*path.T, color=colour, linewidth=0.9, alpha=0.8)
            axes.plot(*path.T, color=colour, linestyle="", marker=".", markersize=3)
            axes.plot(*path[-1], color=colour, marker="o", markersize=9, markeredgecolor="white", linestyle="")
        axes.set_xlim(left, right)
        axes.set_ylim(bottom, top)
        axes.set_xlabel("first coordinate")
        axes.set_ylabel("second coordinate")
        axes.set_title(f"{len(chosen)} of {len(events)} chains, the ends marked")
        bar = figure.colorbar(image, ax=axes, boundaries=np.linspace(-10.0, 0.0, 101), ticks=[-10, -5, 0])
        bar.set_label("log density, less its peak (nats)")
    return figure


def _around(events: np.ndarray) -> tuple[Any, ...]:
    points = events.reshape(-1, 2)
    if not np.isfinite(points).all():
        raise ValueError("tree: got draws that are not finite, expected finite ones, or limits=... to show the rest.")
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.1 * np.maximum(high - low, 1e-6)
    return low[0] - margin[0], high[0] + margin[0], low[1] - margin[1], high[1] + margin[1]
