"""How the chains are spread over modes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ebm_ppl.plots.style import COLOURS, events_of, kernel_steps, new_figure, require_group, require_variable, styled


def mode_occupancy(
    tree: xr.DataTree,
    labels: Any,
    *,
    weights: Mapping[Any, float] | None = None,
    group: str = "negative_phase",
) -> Figure:
    """Share of the chains in every mode, draw by draw or over training, against the weights that the modes should have.

    Shares that stand still say nothing by themselves: chains that never leave the mode they started in keep the weights
    of their starts, which are the data's. The title of a plot over draws says how many chains ever changed their mode.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree`.
        labels: The mode of each draw, ``(chain, draw)`` whole numbers or strings; a function from rows of events
            ``(row, *event)`` to labels ``(row,)``; or, for a plot over training, names of those variables of the group
            ``training`` that hold the shares.
        weights: Weights that the modes should have, by label (by variable, over training).
        group: Group of the events.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no such group or variable, the labels do not fit the draws, there are more than eight
            modes, or ``weights`` names an unknown one.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((16, 1)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 50)
        >>> tree = ebm.diagnostics.to_datatree(draws)
        >>> figure = mode_occupancy(tree, lambda x: x[:, 0] > 0, weights={True: 0.5, False: 0.5})
    """
    if not callable(labels) and np.ndim(labels) == 1 and all(isinstance(name, str) for name in labels):
        shares, steps, x_label, title = _over_training(tree, labels)
    else:
        shares, steps, x_label, title = _over_draws(tree, labels, group)
    if len(shares) > len(COLOURS):
        raise ValueError(f"labels: got {len(shares)} modes, expected at most {len(COLOURS)}; merge the small ones.")
    unknown = set(weights or {}) - set(shares)
    if unknown:
        raise ValueError(f"weights: got {sorted(map(str, unknown))}, expected some of {sorted(map(str, shares))}.")
    with styled():
        figure = new_figure()
        axes = figure.subplots()
        for (mode, share), colour in zip(shares.items(), COLOURS, strict=False):
            axes.plot(steps, share, color=colour, label=f"{mode}: mean {share.mean():.3g}")
            if weights and mode in weights:
                axes.axhline(weights[mode], color=colour, linestyle="--", linewidth=1.2)
        if weights:
            axes.plot([], [], color="0.3", linestyle="--", linewidth=1.2, label="weight it should have")
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of the chains")
        axes.set_title(title)
        figure.legend(loc="outside right upper", title="mode")
        figure.set_size_inches(7.6, 4.0)
    return figure


def _over_training(tree: Any, names: Sequence[str]) -> tuple[dict[Any, np.ndarray], np.ndarray, str, str]:
    dataset = require_group(tree, "training")
    shares = {name: require_variable(dataset, "training", name) for name in names}
    (dim,) = {str(dataset[name].dims[0]) for name in names} or {"step"}
    steps = dataset[dim].values if dim in dataset.coords else np.arange(dataset.sizes[dim])
    return shares, steps, "update", "over training"


def _over_draws(tree: Any, labels: Any, group: str) -> tuple[dict[Any, np.ndarray], np.ndarray, str, str]:
    dataset = require_group(tree, group)
    shape = (dataset.sizes.get("chain", 0), dataset.sizes.get("draw", 0))
    found = _of_events(labels, events_of(tree, group)) if callable(labels) else np.asarray(labels)
    if found.shape != shape or found.dtype.kind not in "biuUS":
        raise ValueError(
            f"labels: got {found.dtype} labels of shape {found.shape}, expected whole numbers or strings of shape {shape}, "
            "(chain, draw)."
        )
    shares = {mode.item(): (found == mode).mean(axis=0) for mode in np.unique(found)}
    moved = int((found != found[:, :1]).any(axis=1).sum())
    unit, name = kernel_steps(dataset)
    return shares, unit * np.arange(shape[1]), name, f"{moved} of {shape[0]} chains ever changed their mode"


def _of_events(function: Callable[[Any], Any], events: np.ndarray) -> np.ndarray:
    rows = events.reshape(-1, *events.shape[2:])
    labels = np.asarray(function(rows))
    if labels.shape != rows.shape[:1]:
        raise ValueError(
            f"labels: the function returned shape {labels.shape} for {len(rows)} events, expected ({len(rows)},)."
        )
    return labels.reshape(events.shape[:2])
