"""ArviZ's rank plot, of draws that are far enough apart for its band."""

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import arviz_plots
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ebm_ppl.checks import check_count
from ebm_ppl.plots.panels import few, label_panels, plotted, smallest_ess
from ebm_ppl.plots.style import require_group

MIN_THINNED = 20
"""Draws per chain that thinning for ranks leaves at least."""

MAX_RANKED = 500
"""Draws per chain that a rank plot shows at most; the simulation of its band takes longer with more."""

# ArviZ's own band is made and not shown. ArviZ 1.x has another method by default, whose marks are not ranks.
_CHEAP_BAND: dict[str, Any] = {"stats": {"ecdf_pit": {"n_chains": 1, "n_simulations": 10}}}
if "method" in inspect.signature(arviz_plots.plot_rank).parameters:
    _CHEAP_BAND |= {"method": "envelope", "thin": False}


def rank(
    tree: xr.DataTree,
    *,
    group: str = "negative_phase_stats",
    var_names: Any = "potential",
    coords: Mapping[str, Any] | None = None,
    num_chains: int = 8,
) -> Figure:
    """ArviZ's rank plot of a few chains: they stay within the band when the chains sample the same law.

    The band is that of independent draws. Autocorrelation takes chains out of it that mix slowly and sample the right law
    all the same, so that the draws are thinned first to two autocorrelation times, taken from their effective sample
    size (the smaller of bulk and tail); the title says so. The band holds for all chains of a panel at once, in about
    98 of 100.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree` or ``from_blackjax``.
        group: Group of the variables.
        var_names: Variables to show.
        coords: Coordinates to show, by dimension.
        num_chains: Chains to show, spread over all of them; ranks of hundreds cannot be read.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no such group, there are fewer than two chains to compare, more than 12 series, or a value
            is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 200)
        >>> figure = rank(ebm.diagnostics.to_datatree(draws))

    References:
        Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity, arXiv:2103.10522.
    """
    check_count("num_chains", num_chains, minimum=2)
    total = require_group(tree, group).sizes.get("chain", 0)
    if total == 1:
        raise ValueError("tree: got 1 chain, expected at least 2; ranks compare chains.")
    dataset = few(tree, group, var_names, coords, num_chains)
    num_draws, effective = dataset.sizes["draw"], smallest_ess(dataset)
    spent = dataset.sizes["chain"] * num_draws / effective if effective > 0 else 1.0
    # Draws one autocorrelation time apart still know of each other, those two apart hardly do.
    needed = int(np.ceil(2.0 * spent)) if spent > 1.2 else 1
    factor = max(1, -(-num_draws // MAX_RANKED), min(needed, num_draws // MIN_THINNED))
    thinned = dataset.isel(draw=slice(None, None, factor))
    with_own_band = {"visuals": {"credible_interval": False, "remove_axis": False}, **_CHEAP_BAND}
    figure = plotted(arviz_plots.plot_rank, thinned, group, **with_own_band)
    at, half_width = _rank_band(dataset.sizes["chain"], thinned.sizes["draw"])
    for axes in figure.axes:
        if axes.axison and axes.get_visible():
            axes.fill_between(at, -half_width, half_width, color="0.88", linewidth=0, zorder=0)
    note = "" if factor == 1 else f", one draw in {factor}"
    if not effective > 0:
        note = ", a chain is frozen: the band does not hold"
    elif needed > factor:
        note += ": too few effective draws for the band"
    label_panels(figure, x="rank among all chains, as a fraction", y="share ranked below,\nless the expected")
    figure.suptitle(f"{dataset.sizes['chain']} of {total} chains{note}", fontsize=12)
    return figure


@functools.cache
def _rank_band(num_chains: int, num_draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Half the width of the band that all chains of independent draws of one law keep within, in 99 of 100 cases.

    ArviZ's band for several chains is too narrow for more than four: with eight chains of independent draws, nine of ten
    plots leave it (release 0.8). Here ranks are dealt to the chains at random. Deviations count in units of their standard
    deviation, which is taken for larger than it is at the ends, where they jump.
    """
    total = num_chains * num_draws
    place = np.unique(np.linspace(1, total - 1, min(total - 1, 200)).astype(int))
    share = place / total
    scale = np.sqrt(share * (1.0 - share) + 0.01)
    rng, owners = np.random.default_rng(0), np.repeat(np.arange(num_chains), num_draws)
    largest = np.empty(1000)
    for index in range(len(largest)):
        dealt = rng.permutation(owners)
        counts = np.stack([np.cumsum(dealt == chain)[place - 1] for chain in range(num_chains)])
        largest[index] = np.max(np.abs(counts / num_draws - share) / scale)
    half_width = np.quantile(largest, 0.99) * scale
    return np.concatenate([[0.0], share, [1.0]]), np.concatenate([half_width[:1], half_width, half_width[-1:]])
