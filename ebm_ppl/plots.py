"""Figures people look at. Needs the ``plots`` extra; each function returns a figure and shows nothing by itself."""

from collections.abc import Mapping
from typing import Any

import arviz_plots
import matplotlib.figure
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ebm_ppl.checks import check_count


def image_grid(
    images: Any, *, columns: int = 10, title: str | None = None, vmin: float = -1.0, vmax: float = 1.0
) -> Figure:
    """A grid of grey images.

    Args:
        images: ``(image, height, width)``.
        columns: Images per row.
        title: Above the grid.
        vmin: Value shown black.
        vmax: Value shown white.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: ``images`` is not a stack of images.

    Example:
        >>> import numpy as np
        >>> figure = image_grid(np.zeros((20, 8, 8)), columns=5)
    """
    figure = Figure(figsize=(columns * 0.55, np.ceil(len(images) / columns) * 0.55 + 0.3), layout="constrained")
    _draw_grid(figure, images, columns, title, vmin, vmax)
    return figure


def _draw_grid(figure: Any, images: Any, columns: int, title: str | None, vmin: float, vmax: float) -> None:
    images = np.asarray(images)
    if images.ndim != 3 or not len(images):
        raise ValueError(f"images: got shape {images.shape}, expected (image, height, width).")
    rows = -(-len(images) // check_count("columns", columns))
    # One array with a one-pixel gutter draws faster than hundreds of axes.
    height, width = images.shape[1] + 1, images.shape[2] + 1
    canvas = np.full((rows * height - 1, columns * width - 1), np.nan)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        canvas[row * height : (row + 1) * height - 1, column * width : (column + 1) * width - 1] = image
    axes = figure.subplots()
    axes.imshow(canvas, cmap="gray", vmin=vmin, vmax=vmax, interpolation="nearest")
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=10)


def inpainting(
    data: Any, negatives: Any, rows: Mapping[str, Any], *, columns: int = 12, vmin: float = -1.0, vmax: float = 1.0
) -> Figure:
    """Data and negatives side by side above a strip of inpaintings.

    Args:
        data: Training images ``(image, height, width)``.
        negatives: Samples of the model, as many.
        rows: Label to images ``(image, height, width)``, one row each, all showing the same images; NaN pixels are shown
            as missing.
        columns: Images per inpainting row.
        vmin: Value shown black.
        vmax: Value shown white.

    Returns:
        A matplotlib figure.

    Example:
        >>> import numpy as np
        >>> blank = np.zeros((20, 8, 8))
        >>> figure = inpainting(blank, blank, {"truth": blank, "filled in": blank})
    """
    figure = Figure(figsize=(9.0, 4.2 + 0.72 * len(rows)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.0, 0.72 * len(rows)])
    left, right = top.subfigures(1, 2)
    _draw_grid(left, data, 10, "data", vmin, vmax)
    _draw_grid(right, negatives, 10, "negatives: samples of the energy-based model", vmin, vmax)
    axes = bottom.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        strip = [
            np.pad(np.asarray(image, float), ((0, 0), (0, 1)), constant_values=np.nan) for image in images[:columns]
        ]
        colours = matplotlib.colormaps["gray"].with_extremes(bad="#d9b8b0")
        axis.imshow(np.concatenate(strip, axis=1)[:, :-1], cmap=colours, vmin=vmin, vmax=vmax, interpolation="nearest")
        axis.set_axis_off()
        axis.text(-0.01, 0.5, label, transform=axis.transAxes, ha="right", va="center", fontsize=9)
    return figure


def rank(
    tree: xr.DataTree, *, group: str = "negative_phase_stats", var_names: Any = "potential", num_chains: int = 8
) -> Figure:
    """ArviZ's rank plot of a few chains: uniform bands when the chains sample the same law.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree`.
        group: Group of the variables.
        var_names: Variables to show.
        num_chains: Chains to show, spread over all of them; ranks of hundreds cannot be read.

    Returns:
        A matplotlib figure.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 200)
        >>> figure = rank(ebm.diagnostics.to_datatree(draws))
    """
    total = tree[group].sizes["chain"]
    chosen = np.unique(np.linspace(0, total - 1, min(num_chains, total)).astype(int))
    few = xr.DataTree.from_dict({group: tree[group].to_dataset().isel(chain=chosen)})
    collection = arviz_plots.plot_rank(few, group=group, var_names=var_names, backend="matplotlib")
    return collection.viz["figure"].item()
