"""ArviZ's traces, autocorrelations and effective sample sizes, of a few chains and variables at a time."""

from collections.abc import Mapping
from typing import Any

import arviz_plots
import xarray as xr
from matplotlib.figure import Figure

from ebm_ppl.checks import check_count
from ebm_ppl.plots.panels import few, label_panels, name_draws, plotted, smallest_ess
from ebm_ppl.plots.style import require_group


def trace(
    tree: xr.DataTree,
    *,
    group: str = "negative_phase_stats",
    var_names: Any = "potential",
    coords: Mapping[str, Any] | None = None,
    num_chains: int = 4,
) -> Figure:
    """ArviZ's trace plot of a few chains.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree` or ``from_blackjax``.
        group: Group of the variables.
        var_names: Variables to show.
        coords: Coordinates to show, by dimension.
        num_chains: Chains to show, spread over all of them.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no such group, there are more than 12 series, or a value is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 200)
        >>> figure = trace(ebm.diagnostics.to_datatree(draws))
    """
    dataset = few(tree, group, var_names, coords, num_chains)
    figure = plotted(arviz_plots.plot_trace, dataset, group)
    label_panels(figure, x=name_draws(dataset))
    return figure


def autocorrelation(
    tree: xr.DataTree,
    *,
    group: str = "negative_phase_stats",
    var_names: Any = "potential",
    coords: Mapping[str, Any] | None = None,
    num_chains: int = 4,
    max_lag: int = 100,
) -> Figure:
    """ArviZ's autocorrelation of a few chains, each about its own mean, with the band of white noise.

    It is blind to chains that each stay in a mode of their own: about its own mean every one looks fine.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree` or ``from_blackjax``.
        group: Group of the variables.
        var_names: Variables to show.
        coords: Coordinates to show, by dimension.
        num_chains: Chains to show, spread over all of them.
        max_lag: Largest lag, in draws; at most a third of the draws is shown, beyond which there is only noise.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no such group, there are more than 12 series or fewer than 6 draws, or a value is not
            finite.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 200)
        >>> figure = autocorrelation(ebm.diagnostics.to_datatree(draws))
    """
    dataset = few(tree, group, var_names, coords, num_chains)
    num_draws = dataset.sizes["draw"]
    if num_draws < 6:
        raise ValueError(f"tree: got {num_draws} draws per chain, expected at least 6.")
    lags = min(check_count("max_lag", max_lag), num_draws // 3)
    # ArviZ 0.8 takes the number of lags for that of the draws in its band, so the band is ours.
    hidden = {"credible_interval": False}
    figure = plotted(arviz_plots.plot_autocorr, dataset, group, max_lag=lags + 1, visuals=hidden)
    label_panels(figure, x=f"lag ({name_draws(dataset)})", y="autocorrelation")
    for axes in figure.axes:
        if axes.axison and axes.get_visible():
            axes.axhspan(-1.96 / num_draws**0.5, 1.96 / num_draws**0.5, color="0.85", zorder=0)
            axes.set_ylim(min(-0.2, axes.get_ylim()[0]), 1.05)
    return figure


def ess_evolution(
    tree: xr.DataTree,
    *,
    group: str = "negative_phase_stats",
    var_names: Any = "potential",
    coords: Mapping[str, Any] | None = None,
    num_points: int = 20,
) -> Figure:
    """ArviZ's effective sample size against the number of draws: straight lines when chains mix, flat ones when not.

    Args:
        tree: From :func:`ebm_ppl.diagnostics.to_datatree` or ``from_blackjax``.
        group: Group of the variables.
        var_names: Variables to show.
        coords: Coordinates to show, by dimension.
        num_points: Points per line.

    Returns:
        A matplotlib figure.

    Raises:
        ValueError: the tree has no such group, there are more than 12 series or fewer than 4 draws per point, a value is
            not finite, or a chain never moved (ArviZ would count every one of its draws as effective).

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 200)
        >>> figure = ess_evolution(ebm.diagnostics.to_datatree(draws))
    """
    dataset = few(tree, group, var_names, coords, require_group(tree, group).sizes.get("chain", 1))
    points, num_draws = check_count("num_points", num_points, minimum=2), dataset.sizes["draw"]
    if num_draws < 4 * points:
        raise ValueError(f"tree: got {num_draws} draws per chain for {points} points, expected at least 4 for each.")
    if not smallest_ess(dataset) > 0:
        raise ValueError(
            "tree: got a chain that never moves, whose effective sample size is 0 and not what ArviZ would show; see "
            "diagnostics.summary(tree)."
        )
    figure = plotted(arviz_plots.plot_ess_evolution, dataset, group, n_points=points)
    label_panels(figure, x=f"draws of all {dataset.sizes['chain']} chains", y="effective sample size")
    for axes in figure.axes:
        lines = axes.get_lines()
        axes.set_ylim(bottom=0)
        axes.set_ylabel("effective sample size" if axes is figure.axes[0] else "")
        if axes is figure.axes[0]:
            axes.legend(lines, ["bulk", "tail", "the least to go by"], loc="upper left", fontsize=11, frameon=False)
    return figure
