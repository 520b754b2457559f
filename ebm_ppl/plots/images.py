"""Grids of images, and images filled in."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ebm_ppl.checks import check_count
from ebm_ppl.plots.style import events_of

_MISSING = np.array([0.85, 0.66, 0.62])
"""Colour of missing pixels."""


def image_grid(
    images: Any,
    *,
    columns: int = 10,
    title: str | None = None,
    vmin: float = -1.0,
    vmax: float = 1.0,
    group: str = "negative_phase",
    shape: tuple[int, int] | None = None,
) -> Figure:
    """A grid of grey images; NaN pixels are shown as missing.

    Args:
        images: ``(image, height, width)``, or a ``DataTree``, of which the last draw of every chain is shown.
        columns: Images per row.
        title: Above the grid.
        vmin: Value shown black.
        vmax: Value shown white.
        group: Group of a tree.
        shape: Height and width of the events of a tree that are vectors.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: ``images`` is not a stack of images, has no such group, or ``columns`` is below 1.

    Example:
        >>> import numpy as np
        >>> figure = image_grid(np.zeros((20, 8, 8)), columns=5)
    """
    if isinstance(images, xr.DataTree):
        last = events_of(images, group)[:, -1]
        if shape is not None and np.prod(shape) == np.prod(last.shape[1:]):
            last = last.reshape(-1, *shape)
        images = last
    canvas = _canvas(_stack("images", images), check_count("columns", columns), vmin, vmax)
    figure = Figure(figsize=(canvas.shape[1] / 16, canvas.shape[0] / 16 + 0.3), layout="constrained")
    _show(figure.subplots(), canvas, title)
    return figure


def inpainting(
    data: Any, negatives: Any, rows: Mapping[str, Any], *, columns: int = 12, vmin: float = -1.0, vmax: float = 1.0
) -> Figure:
    """Data and negatives side by side above one row of images per way of filling in.

    Args:
        data: Training images ``(image, height, width)``.
        negatives: Samples of the model, as many.
        rows: Label to images ``(image, height, width)``, one row each, all showing the same images; NaN pixels are shown
            as missing.
        columns: Images per row.
        vmin: Value shown black.
        vmax: Value shown white.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: an argument is not a stack of images, or there are no rows.

    Example:
        >>> import numpy as np
        >>> blank = np.zeros((20, 8, 8))
        >>> figure = inpainting(blank, blank, {"truth": blank, "filled in": blank})
    """
    if not rows:
        raise ValueError("rows: got none, expected at least one labelled row of images.")
    columns = check_count("columns", columns)
    grids = [_canvas(_stack(*named), 10, vmin, vmax) for named in (("data", data), ("negatives", negatives))]
    strips = {
        label: _canvas(_stack(f"rows[{label!r}]", images)[:columns], columns, vmin, vmax)
        for label, images in rows.items()
    }
    # Heights in proportion to the pictures, so that nothing is stretched and no gap opens.
    grid_height = 0.5 * 9.0 * max(grid.shape[0] / grid.shape[1] for grid in grids)
    strip_height = 8.2 * max(strip.shape[0] / strip.shape[1] for strip in strips.values())
    heights = [grid_height, *[strip_height] * len(strips)]
    # The labels on the left lie outside their axes.
    figure = Figure(figsize=(9.6, sum(heights) + 0.5), layout=ConstrainedLayoutEngine(rect=(0.06, 0.0, 0.94, 1.0)))
    layout = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    titles = ("data", "negatives: samples of the energy-based model")
    for column, (grid, title) in enumerate(zip(grids, titles, strict=True)):
        _show(figure.add_subplot(layout[0, column]), grid, title)
    for row, (label, strip) in enumerate(strips.items(), start=1):
        axes = figure.add_subplot(layout[row, :])
        _show(axes, strip)
        axes.text(-0.01, 0.5, label, transform=axes.transAxes, ha="right", va="center", fontsize=9)
    return figure


def _stack(name: str, images: Any) -> np.ndarray:
    images = np.asarray(images, float)
    if images.ndim != 3 or not images.size:
        raise ValueError(f"{name}: got shape {images.shape}, expected (image, height, width).")
    return images


def _canvas(images: np.ndarray, columns: int, vmin: float, vmax: float) -> np.ndarray:
    """All images in one RGB array with white one-pixel gutters; one picture draws faster than hundreds of axes."""
    rows = -(-len(images) // columns)
    height, width = images.shape[1] + 1, images.shape[2] + 1
    canvas = np.ones((rows * height - 1, columns * width - 1, 3))
    grey = np.clip((images - vmin) / (vmax - vmin), 0.0, 1.0)
    colours = np.where(np.isnan(images)[..., None], _MISSING, grey[..., None])
    for index, image in enumerate(colours):
        row, column = divmod(index, columns)
        canvas[row * height : (row + 1) * height - 1, column * width : (column + 1) * width - 1] = image
    return canvas


def _show(axes: Any, canvas: np.ndarray, title: str | None = None) -> None:
    axes.imshow(canvas, interpolation="nearest")
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=10)
