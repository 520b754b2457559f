"""Estimates of log Z as they accumulate, and the bounds on it."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ebm_ppl.plots.style import COLOURS, new_figure, styled


def log_normalizer(tree: xr.DataTree, *, exact: float | None = None) -> Figure:
    """Running estimates of log Z with their errors, one panel for each group of the tree that has any.

    ``training`` shows ``log_z`` as tracked over the updates; ``smc`` the logarithm of the mean of ``Z`` over the first
    replicates, ever more of them, with two standard errors; ``log_z`` the estimates by name with two standard errors, open
    where one is not reliable, and between ``forward`` and ``reverse`` the band that the two leave for log Z: the first is
    below it in expectation, the second above if its samples were exact.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree`.
        exact: The right value, where it is known.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no group with an estimate, ``log_z`` has one normaliser per row, or no estimate is finite.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> estimate = ebm.normalizer.LogNormalizer(*map(jnp.array, (-1.10, 0.02, 500.0, 0.2, 100, True)))
        >>> sampler = ebm.init_sampler(jnp.ones((4,)), ebm.kernels.mala(step_size=0.1))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: x**2, sampler, 10)
        >>> figure = log_normalizer(ebm.diagnostics.to_datatree(draws, log_z={"forward": estimate}))
    """
    if not isinstance(tree, xr.DataTree):
        raise TypeError(f"tree: got {type(tree).__name__}, expected a DataTree from diagnostics.to_datatree.")
    panels = []
    if "training" in tree.children and "log_z" in tree["training"].data_vars:
        panels.append((_over_training, tree["training"].to_dataset()))
    if "smc" in tree.children and "log_z" in tree["smc"].data_vars:
        panels.append((_over_replicates, tree["smc"].to_dataset()))
    if "log_z" in tree.children:
        panels.append((_by_name, tree["log_z"].to_dataset()))
    if not panels:
        raise ValueError(
            f"tree: its groups {sorted(tree.children)} hold no estimate of log Z; pass smc=..., log_z=... or a history "
            "with 'log_z' to diagnostics.to_datatree."
        )
    with styled():
        figure = new_figure(1.2 + 4.6 * len(panels), 4.0)
        for axes, (draw, dataset) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            draw(axes, dataset)
            if exact is not None:
                axes.axhline(exact, color="black", linestyle="--", linewidth=1.4, label="exact")
            axes.set_ylabel("log Z (nats)")
            axes.ticklabel_format(axis="y", useOffset=False)
            axes.margins(y=0.1)
            if axes.get_legend_handles_labels()[0]:
                axes.legend()
    return figure


def _over_training(axes: Axes, dataset: xr.Dataset) -> None:
    values = dataset["log_z"]
    axes.plot(values[values.dims[0]].values, values.values, color=COLOURS[0], label="tracked")
    axes.set_xlabel("update")
    axes.set_title("tracked over training")


def _over_replicates(axes: Axes, dataset: xr.Dataset) -> None:
    """``log mean Z`` of the first ``r`` runs; its error by the delta method, ``sd(Z) / (mean(Z) sqrt r)``."""
    runs = _finite(dataset["log_z"].values)
    count = np.arange(1, len(runs) + 1)
    weight = np.exp(runs - runs.max())
    mean = np.cumsum(weight) / count
    variance = np.maximum(np.cumsum(weight**2) / count - mean**2, 0.0) * count / np.maximum(count - 1, 1)
    value = np.log(mean) + runs.max()
    error = np.where(count > 1, np.sqrt(variance / count) / mean, np.nan)
    axes.plot(count, runs, linestyle="", marker="o", color="0.6", markersize=5, label="single runs")
    axes.fill_between(count, value - 2 * error, value + 2 * error, color=COLOURS[0], alpha=0.25, linewidth=0)
    axes.plot(count, value, color=COLOURS[0], label="running mean ± 2 errors")
    axes.set_xlabel("independent SMC runs")
    axes.set_title(f"SMC: {value[-1]:.5g} ± {error[-1]:.2g}")
    axes.locator_params(axis="x", integer=True)


def _by_name(axes: Axes, dataset: xr.Dataset) -> None:
    if dataset["value"].ndim != 1:
        raise ValueError(
            f"tree: its group 'log_z' has dimensions {dataset['value'].dims}, expected one value per estimator."
        )
    names = [str(name) for name in dataset["estimator"].values]
    has_bounds = {"forward", "reverse"} <= set(names)
    forward, reverse = (names.index(name) for name in ("forward", "reverse")) if has_bounds else (0, 0)
    values, errors = _finite(dataset["value"].values), dataset["standard_error"].values
    low, high = values[forward], values[reverse]
    for place, (value, error, sound) in enumerate(zip(values, errors, dataset["reliable"].values, strict=True)):
        face: Any = COLOURS[place % len(COLOURS)]
        axes.errorbar(
            place, value, 2 * error, color=face, marker="o", markersize=9, mfc=face if sound else "white", capsize=6
        )
        if not sound:
            names[place] += "\n(not reliable)"
    if has_bounds:
        crosses = low - high > 2 * np.hypot(*(errors[place] for place in (forward, reverse)))
        axes.axhspan(low, high, color="0.85", zorder=0, label="bounds cross" if crosses else "between the two")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_title("estimates ± 2 errors")


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(
            f"tree: got {int((~np.isfinite(values)).sum())} of {values.size} estimates of log Z that are not finite."
        )
    return values
