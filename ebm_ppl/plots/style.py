"""What all figures share: colours that everyone can tell apart, letters that survive a thumbnail, and refusals."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#882255")
"""Okabe and Ito's palette, less its yellow, which is lost on white, and with Tol's wine red in its place."""

_STYLE = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "font.size": 12.0,
    "axes.titlesize": 12.0,
    "axes.labelsize": 12.0,
    "legend.fontsize": 11.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
}

_REMEDIES = {
    "negative_phase": "diagnostics.to_datatree(draws) makes it",
    "negative_phase_stats": "diagnostics.to_datatree(draws) makes it",
    "training": "pass history=... to diagnostics.to_datatree",
    "smc": "pass smc=... to diagnostics.to_datatree",
    "log_z": "pass log_z=... to diagnostics.to_datatree",
    "posterior": "pass posterior=... to diagnostics.to_datatree, or convert a run with diagnostics.from_blackjax",
    "sample_stats": "collect extra_fields in MCMC.run, or pass infos to diagnostics.from_blackjax",
}


@contextmanager
def styled() -> Iterator[None]:
    """The project's style, for the figures made inside."""
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float = 6.4, height: float = 4.0) -> Figure:
    """A figure that pyplot does not know, so that a notebook shows it once."""
    return Figure(figsize=(width, height), layout="constrained")


def released(collection: Any) -> Figure:
    """The figure of an ArviZ plot, which pyplot would otherwise keep and a notebook show twice."""
    figure = collection.viz["figure"].item()
    pyplot.close(figure)
    return figure


def require_group(tree: Any, group: str) -> xr.Dataset:
    """One group of a tree.

    Raises:
        TypeError: ``tree`` is no ``DataTree``.
        ValueError: it has no such group, with what makes one.
    """
    if not isinstance(tree, xr.DataTree):
        raise TypeError(f"tree: got {type(tree).__name__}, expected a DataTree from diagnostics.to_datatree.")
    if group not in tree.children:
        remedy = f"; {_REMEDIES[group]}" if group in _REMEDIES else ""
        raise ValueError(f"group: got {group!r}, expected one of {sorted(tree.children)}{remedy}.")
    return tree[group].to_dataset()


def require_variable(dataset: xr.Dataset, group: str, name: str) -> np.ndarray:
    """Values of one variable of a group.

    Raises:
        ValueError: the group has no such variable.
    """
    if name not in dataset.data_vars:
        raise ValueError(f"tree: its group {group!r} has {sorted(map(str, dataset.data_vars))}, expected {name!r}.")
    return dataset[name].values


def events_of(tree: Any, group: str) -> np.ndarray:
    """Positions ``(chain, draw, *event)`` of a group that has one variable, or names its site."""
    dataset = require_group(tree, group)
    names = [str(name) for name in dataset.data_vars]
    site = dataset.attrs.get("site", names[0] if len(names) == 1 else None)
    if site not in names:
        raise ValueError(f"tree: its group {group!r} has {names}, expected events that are one array.")
    return dataset[site].values


def spread(total: int, shown: int) -> np.ndarray:
    """At most ``shown`` indices, evenly spread over ``total``."""
    return np.unique(np.linspace(0, total - 1, min(shown, total)).astype(int))


def kernel_steps(dataset: xr.Dataset) -> tuple[int, str]:
    """Kernel steps per draw, where the attributes say so, and what the axis of draws is to be called."""
    num_steps = dataset.attrs.get("num_steps")
    return (1, "draw") if num_steps is None else (int(num_steps), "kernel steps")
