"""What ArviZ's plots of chains are given, and what is done to their panels."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ebm_ppl.checks import check_count
from ebm_ppl.diagnostics.guarded import ess
from ebm_ppl.plots.style import kernel_steps, released, require_group, spread, styled

MAX_PANELS = 12
"""More series than this are unreadable in one figure."""

_ENERGIES = {"potential": "energy (nats)", "lp": "log density (nats)", "energy": "Hamiltonian (nats)"}


def few(tree: xr.DataTree, group: str, var_names: Any, coords: Mapping[str, Any] | None, num_chains: int) -> xr.Dataset:
    """The chosen variables, at the chosen coordinates, of some chains spread over all."""
    dataset = require_group(tree, group)
    names = [var_names] if isinstance(var_names, str) else list(dataset.data_vars if var_names is None else var_names)
    dataset = dataset[names].sel(dict(coords or {}))
    if not {"chain", "draw"} <= set(dataset.dims):
        raise ValueError(
            f"group: got {group!r} with dimensions {sorted(map(str, dataset.dims))}, expected chain and draw."
        )
    panels = sum(v.size // (v.sizes["chain"] * v.sizes["draw"]) for v in dataset.data_vars.values())
    if panels > MAX_PANELS:
        raise ValueError(
            f"var_names: got {panels} series, expected at most {MAX_PANELS}; choose with coords={{'x_dim_0': [0, 1]}}, or "
            "show group='negative_phase_stats', var_names='potential'."
        )
    nonfinite = sum(int((~np.isfinite(v.values)).sum()) for v in dataset.data_vars.values())
    if nonfinite:
        raise ValueError(f"tree: got {nonfinite} NaN or infinite values in {names}, expected finite ones to plot.")
    return dataset.isel(chain=spread(dataset.sizes["chain"], check_count("num_chains", num_chains)))


def smallest_ess(dataset: xr.Dataset) -> float:
    """Over all series, bulk and tail; zero where a chain is frozen."""
    arrays = [v.transpose("chain", "draw", ...).values for v in dataset.data_vars.values()]
    return float(min(np.min(ess(x, method=method)) for x in arrays for method in ("bulk", "tail")))


def plotted(plot: Any, dataset: xr.Dataset, group: str, **options: Any) -> Figure:
    """The figure of an ArviZ plot in this package's style, with panels of one size."""
    with styled():
        options.setdefault("col_wrap", 3)
        tree = xr.DataTree.from_dict({group: dataset.drop_vars("superchain_ids", errors="ignore")})
        figure = released(plot(tree, group=group, backend="matplotlib", **options))
    for legend in figure.legends:
        legend.remove()
    # Panels of one size whatever their number, and room for what is written around them.
    grid: Any = figure.axes[0].get_gridspec()
    figure.set_size_inches(4.2 * grid.ncols + 1.4, 3.2 * grid.nrows + 0.8)
    figure.set_layout_engine("constrained")
    return figure


def label_panels(figure: Figure, x: str, y: str | None = None) -> None:
    """Name the axes of every panel: those below by ``x``, those on the left by ``y``, or by what each panel shows."""
    panels: list[Any] = [axes for axes in figure.axes if axes.axison and axes.get_visible()]
    lowest = {axes.get_subplotspec().colspan.start: axes for axes in panels}
    for axes in panels:
        column = axes.get_subplotspec().colspan.start
        axes.set_xlabel(x if lowest[column] is axes else "")
        name = axes.get_title().split("\n")[0]
        if column == 0 or (y is None and name in _ENERGIES):
            axes.set_ylabel(_ENERGIES.get(name, "value") if y is None else y)
        axes.tick_params(labelbottom=True)
        axes.locator_params(axis="x", nbins=5)


def name_draws(dataset: xr.Dataset) -> str:
    """What the axis of draws is called."""
    num_steps, _ = kernel_steps(dataset)
    return "draw" if num_steps == 1 else f"draw, one per {num_steps} kernel steps"
