"""The figures of chains, energies, modes and log Z: what they show, read from their artists, and what they refuse."""

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ebm_ppl import diagnostics, plots
from ebm_ppl.normalizer import LogNormalizer
from ebm_ppl.plots.style import COLOURS
from tests.test_plots import run


def iid(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def autoregressive(shape, rho, seed=0):
    """Stationary AR(1) chains with N(0, 1) margins, along the second axis."""
    x = np.random.default_rng(seed).normal(size=shape)
    for step in range(1, shape[1]):
        x[:, step] = rho * x[:, step - 1] + np.sqrt(1.0 - rho**2) * x[:, step]
    return x


def estimate(value, reliable=True, error=0.05):
    return LogNormalizer(*map(jnp.asarray, (value, error, 500.0, 0.2, 100, reliable)))


def written(figure):
    """All that a figure says."""
    texts = [figure.get_suptitle(), *(text.get_text() for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
        texts += [label.get_text() for label in axes.get_xticklabels()]
        legend = axes.get_legend()
        texts += [] if legend is None else [text.get_text() for text in legend.get_texts()]
    return " | ".join(texts)


@pytest.fixture(scope="module")
def tree():
    """32 chains of 100 independent draws in the plane, and a few estimates."""
    history = {
        "log_z": np.linspace(3.0, 1.0, 50),
        "mode_a": np.linspace(0.0, 1.0, 50),
        "mode_b": np.linspace(1.0, 0.0, 50),
    }
    log_z = {"forward": estimate(1.2), "reverse": estimate(1.4), "bridge": estimate(1.3, reliable=False)}
    tree = run(iid(32, 100, 2), history=history, log_z=log_z, num_steps=5)
    tree["smc"] = xr.DataTree(xr.Dataset({"log_z": ("replicate", 1.3 + 0.2 * iid(8))}))
    return tree


def energy(x):
    return 0.5 * jnp.sum(x**2)


FIGURES = {
    "rank": plots.rank,
    "trace": plots.trace,
    "autocorrelation": plots.autocorrelation,
    "ess_evolution": plots.ess_evolution,
    "energy_histogram": lambda tree, **options: plots.energy_histogram(tree, np.arange(10.0), **options),
    "energy_drift": plots.energy_drift,
    "mode_occupancy": lambda tree, **options: plots.mode_occupancy(tree, lambda x: x[:, 0] > 0, **options),
    "density": lambda tree, **options: plots.density(tree, energy, resolution=20, **options),
}


# --- every figure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FIGURES, "log_normalizer"])
def test_every_figure_is_closed_labelled_and_stored(tmp_path, tree, name):
    before = pyplot.get_fignums()
    figure = {**FIGURES, "log_normalizer": plots.log_normalizer}[name](tree)
    assert isinstance(figure, Figure)
    assert pyplot.get_fignums() == before  # a notebook would show it twice
    panels = [axes for axes in figure.axes if axes.axison and axes.get_visible()]
    assert panels[0].get_xlabel()
    assert panels[0].get_ylabel()
    path = tmp_path / "figure.png"
    figure.savefig(path, dpi=40)
    picture = matplotlib.image.imread(path)[..., :3]
    assert np.ptp(picture) > 0.5
    # What is cut off at the rim would be ink on it.
    rim = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert rim.min() > 0.9


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_refuses_a_tree_without_its_group(tree, name):
    with pytest.raises(ValueError, match=r"group: got 'posterior', expected one of .*; pass posterior="):
        FIGURES[name](tree, group="posterior")
    with pytest.raises(TypeError, match="tree: got dict, expected a DataTree"):
        FIGURES[name]({})


def test_colours_can_be_told_apart_by_everyone():
    """Under simulated deuteranopia (Viénot, Brettel and Mollon 1999) no two are near, and none is lost on white."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    seen = np.array([[1.0, 0.0, 0.0], [0.494207, 0.0, 1.24827], [0.0, 0.0, 1.0]])
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS])
    dichromat = rgb @ (np.linalg.inv(to_lms) @ seen @ to_lms).T
    distance = np.linalg.norm(dichromat[:, None] - dichromat[None], axis=-1)[np.triu_indices(len(COLOURS), 1)]
    assert distance.min() > 0.12
    assert np.linalg.norm(1.0 - dichromat, axis=-1).min() > 0.4


# --- rank ----------------------------------------------------------------------------------------------------------


def leaves_the_band(figure):
    """Whether a line of a rank plot is outside its band somewhere."""
    (axes,) = figure.axes
    vertices = axes.collections[0].get_paths()[0].vertices
    x = np.unique(vertices[:, 0])
    low, high = (np.array([pick(vertices[vertices[:, 0] == at, 1]) for at in x]) for pick in (np.min, np.max))
    outside = False
    for line in axes.get_lines():
        at, value = (np.asarray(data, float) for data in line.get_data())
        inner = (at > x[0]) & (at < x[-1])
        below, above = np.interp(at, x, low) - 0.01 > value, np.interp(at, x, high) + 0.01 < value
        outside |= bool(((below | above) & inner).any())
    return outside


@pytest.mark.parametrize(("num_chains", "shown"), [(8, 8), (2, 2), (100, 32)])
def test_rank_shows_a_few_chains_spread_over_all(tree, num_chains, shown):
    (axes,) = plots.rank(tree, num_chains=num_chains).axes
    assert "potential" in axes.get_title()
    assert len(axes.get_lines()) == shown


def test_rank_of_the_coordinates(tree):
    assert len(plots.rank(tree, group="negative_phase", var_names="x").axes) == 2
    one = plots.rank(tree, group="negative_phase", var_names="x", coords={"x_dim_0": [1]})
    assert len(one.axes) == 1


def test_independent_draws_stay_within_the_band():
    """ArviZ's own band for several chains is left by about nine in ten plots of eight chains; this one by one of 100."""
    assert not any(leaves_the_band(plots.rank(run(iid(8, 50, 1, seed=seed)))) for seed in range(5))


def test_a_shifted_chain_leaves_the_band():
    position = iid(8, 200, 1)
    position[3] += 1.5
    assert leaves_the_band(plots.rank(run(position), group="negative_phase", var_names="x"))


def test_ranks_are_thinned_by_the_effective_sample_size(monkeypatch):
    """Chains of one law, slowly mixing: the draws that are left know nothing of each other."""
    tree = run(autoregressive((8, 1000, 1), 0.9))
    figure = plots.rank(tree, group="negative_phase", var_names="x")
    assert not leaves_the_band(figure)
    # tau = (1 + .9) / (1 - .9) = 19 draws; every draw twice that from the next is left.
    factor = int(figure.get_suptitle().split("one draw in ")[1])
    assert 28 <= factor <= 50
    assert "too few" not in figure.get_suptitle()
    # The fault, seeded: draws that are taken for independent leave the band, although the chains sample one law.
    monkeypatch.setattr("ebm_ppl.plots.ranks.smallest_ess", lambda dataset: 8000.0)
    assert leaves_the_band(plots.rank(tree, group="negative_phase", var_names="x"))


def test_rank_says_when_its_band_does_not_hold():
    slow = plots.rank(run(autoregressive((4, 100, 1), 0.98)), group="negative_phase", var_names="x")
    assert "too few effective draws" in slow.get_suptitle()
    position = iid(4, 100, 1)
    position[1] = 0.5
    frozen = plots.rank(run(position), group="negative_phase", var_names="x")
    assert "a chain is frozen: the band does not hold" in frozen.get_suptitle()


def test_rank_refuses_what_the_tree_does_not_have(tree):
    with pytest.raises(KeyError, match="energy"):
        plots.rank(tree, var_names="energy")
    for num_chains in (0, 1):
        with pytest.raises(ValueError, match=f"num_chains: got {num_chains}"):
            plots.rank(tree, num_chains=num_chains)
    one = xr.DataTree.from_dict({"negative_phase_stats": tree["negative_phase_stats"].to_dataset().isel(chain=[0])})
    with pytest.raises(ValueError, match="tree: got 1 chain"):
        plots.rank(one)


# --- trace, autocorrelation, effective sample size -----------------------------------------------------------------


def test_trace_shows_the_values_of_chains_spread_over_all(tree):
    figure = plots.trace(tree, num_chains=3)
    (axes,) = figure.axes
    shown = [line.get_ydata() for line in axes.get_lines() if len(line.get_ydata()) == 100]
    np.testing.assert_allclose(shown, tree["negative_phase_stats"]["potential"].values[[0, 15, 31]])
    assert axes.get_xlabel() == "draw, one per 5 kernel steps"
    assert axes.get_ylabel() == "energy (nats)"
    assert {to_hex(line.get_color()).upper() for line in axes.get_lines()} <= set(COLOURS)


def test_autocorrelation_of_an_autoregression_and_its_band():
    """rho^lag, and a band of two standard errors of white noise over all draws (ArviZ takes the lags for the draws)."""
    figure = plots.autocorrelation(
        run(autoregressive((4, 3000, 1), 0.8)), group="negative_phase", var_names="x", max_lag=20
    )
    (axes,) = figure.axes
    lines = [line for line in axes.get_lines() if np.ptp(line.get_ydata()) > 0]
    assert len(lines) == 4
    np.testing.assert_array_equal(lines[0].get_xdata(), np.arange(21))
    mean = np.mean([line.get_ydata() for line in lines], axis=0)
    np.testing.assert_allclose(mean, 0.8 ** np.arange(21), atol=0.08)
    band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((-1.96 / 3000**0.5, 1.96 / 3000**0.5), rel=1e-6)


def test_autocorrelation_stops_where_there_is_only_noise(tree):
    (axes,) = plots.autocorrelation(tree).axes
    assert max(line.get_xdata()[-1] for line in axes.get_lines()) == 33
    with pytest.raises(ValueError, match="tree: got 5 draws per chain, expected at least 6"):
        plots.autocorrelation(run(iid(4, 5, 1)))
    with pytest.raises(ValueError, match="max_lag: got 0"):
        plots.autocorrelation(tree, max_lag=0)


def test_effective_sample_size_grows_with_the_draws(tree):
    figure = plots.ess_evolution(tree, num_points=5)
    (axes,) = figure.axes
    bulk, tail, threshold = axes.get_lines()
    assert bulk.get_xdata()[-1] == 3200
    expected = float(diagnostics.ess(tree["negative_phase_stats"]["potential"].values))
    assert bulk.get_ydata()[-1] == pytest.approx(expected, rel=1e-6)
    assert bulk.get_ydata()[0] < 0.4 * expected
    assert len(tail.get_ydata()) == 5
    assert set(np.asarray(threshold.get_ydata())) == {diagnostics.ESS_MIXED}
    assert "bulk" in written(figure)


def test_a_frozen_chain_has_no_effective_sample_size_to_plot():
    position = iid(4, 200, 1)
    position[1] = 0.5
    with pytest.raises(ValueError, match="a chain that never moves, whose effective sample size is 0"):
        plots.ess_evolution(run(position), group="negative_phase", var_names="x")
    with pytest.raises(ValueError, match="tree: got 50 draws per chain for 20 points"):
        plots.ess_evolution(run(iid(4, 50, 1)))


@pytest.mark.parametrize("name", ["rank", "trace", "autocorrelation", "ess_evolution"])
def test_what_cannot_be_read_is_refused(name):
    plot = getattr(plots, name)
    with pytest.raises(ValueError, match=r"var_names: got 64 series, expected at most 12; choose with coords"):
        plot(run(iid(4, 100, 8, 8)), group="negative_phase", var_names="x")
    position = iid(4, 100, 1)
    position[1, 2] = np.nan
    with pytest.raises(ValueError, match="tree: got 1 NaN or infinite values"):
        plot(run(position), group="negative_phase", var_names="x")
    history = run(iid(4, 100, 1), history={"loss": np.arange(5.0)})
    with pytest.raises(ValueError, match=r"group: got 'training' with dimensions .'step'., expected chain and draw"):
        plot(history, group="training", var_names="loss")


def test_superchains_do_not_get_in_the_way():
    assert len(plots.trace(run(iid(4, 100, 1), superchain_ids=[0, 0, 1, 1])).axes) == 1


# --- energies ------------------------------------------------------------------------------------------------------


def test_histograms_share_their_bins_and_hold_all_energies(tree):
    data = np.random.default_rng(1).exponential(2.0, size=500)
    figure = plots.energy_histogram(tree, data, num_bins=17)
    (axes,) = figure.axes
    outlines = [patch.get_data() for patch in axes.patches if not patch.get_fill()]
    assert len(outlines) == 2
    negatives = tree["negative_phase_stats"]["potential"].values.ravel()
    for (values, edges, _), energies in zip(outlines, (data, negatives), strict=True):
        assert len(values) == 17
        assert float((values * np.diff(edges)).sum()) == pytest.approx(1.0)
        np.testing.assert_allclose(values, np.histogram(energies, edges, density=True)[0])
    np.testing.assert_array_equal(outlines[0].edges, outlines[1].edges)
    means = [line.get_xdata()[0] for line in axes.get_lines()]
    np.testing.assert_allclose(means, [data.mean(), negatives.mean()])
    assert f"{data.mean() - negatives.mean():+.3g} nats" in axes.get_title()


def test_data_energies_may_be_a_group(tree):
    tree = tree.copy()
    tree["data_stats"] = xr.DataTree(xr.Dataset({"potential": ("row", np.arange(20.0))}))
    one, other = plots.energy_histogram(tree, "data_stats"), plots.energy_histogram(tree, np.arange(20.0))
    assert written(one) == written(other)
    with pytest.raises(ValueError, match="group: got 'data', expected one of"):
        plots.energy_histogram(tree, "data")
    with pytest.raises(ValueError, match=r"its group 'training' has .*, expected 'potential'"):
        plots.energy_histogram(tree, "training")


@pytest.mark.parametrize(
    ("data", "message"), [([], "data: got no energies"), ([1.0, np.nan], "data: got 1 of 2 energies that are NaN")]
)
def test_bad_data_energies_are_refused(tree, data, message):
    with pytest.raises(ValueError, match=message):
        plots.energy_histogram(tree, np.array(data))


def test_drift_is_the_paired_change_since_the_end_of_training():
    potential = iid(16, 40) + np.linspace(0.0, -3.0, 40)
    start = iid(16, seed=1)
    figure = plots.energy_drift(run(iid(16, 40, 1), potential, num_steps=5), start=start)
    (axes,) = figure.axes
    zero, mean = axes.get_lines()
    np.testing.assert_array_equal(mean.get_xdata(), 5 * np.arange(41))
    expected = np.insert((potential - start[:, None]).mean(axis=0), 0, 0.0)
    np.testing.assert_allclose(mean.get_ydata(), expected, atol=1e-12)
    assert set(zero.get_ydata()) == {0.0}
    last = potential[:, -1] - start
    score = last.mean() / (last.std(ddof=1) / 4.0)
    assert f"{last.mean():+.3g} nats, {score:+.1f} standard errors" in axes.get_title()
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.y0 < mean.get_ydata().min()
    assert axes.get_xlabel() == "kernel steps beyond training"


def test_drift_without_a_start_counts_from_the_first_draw():
    potential = iid(8, 10)
    (axes,) = plots.energy_drift(run(iid(8, 10, 1), potential)).axes
    np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), (potential - potential[:, :1]).mean(axis=0), atol=1e-12)
    assert "first draw" in axes.get_ylabel()
    assert axes.get_xlabel() == "draws beyond training"
    (axes,) = plots.energy_drift(run(iid(8, 10, 1), potential), num_steps=7).axes
    assert axes.get_lines()[1].get_xdata()[-1] == 63


def test_drift_that_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="tree: got 1 chains of 10 draws"):
        plots.energy_drift(run(iid(1, 10, 1)))
    with pytest.raises(ValueError, match="start: got 3 energies, expected one for each of 8 chains"):
        plots.energy_drift(run(iid(8, 10, 1)), start=np.zeros(3))
    with pytest.raises(ValueError, match="start: got 1 of 8 energies that are NaN"):
        plots.energy_drift(run(iid(8, 10, 1)), start=np.array([np.inf] + [0.0] * 7))
    with pytest.raises(ValueError, match="num_steps: got 0"):
        plots.energy_drift(run(iid(8, 10, 1)), num_steps=0)


# --- modes ---------------------------------------------------------------------------------------------------------


def test_occupancy_is_the_share_of_the_chains():
    position = np.where(np.arange(10) < 3, -2.0, 2.0)[:, None, None] * np.ones((10, 20, 1))
    position[0, 10:] = 2.0  # one chain crosses
    tree = run(position, num_steps=4)
    figure = plots.mode_occupancy(tree, lambda x: np.where(x[:, 0] > 0, "right", "left"), weights={"left": 0.25})
    (axes,) = figure.axes
    left, dashed, right, _ = axes.get_lines()
    np.testing.assert_allclose(left.get_ydata(), np.where(np.arange(20) < 10, 0.3, 0.2))
    np.testing.assert_allclose(right.get_ydata(), np.where(np.arange(20) < 10, 0.7, 0.8))
    np.testing.assert_array_equal(left.get_xdata(), 4 * np.arange(20))
    assert set(dashed.get_ydata()) == {0.25}
    # Shares that stand still say nothing where no chain ever leaves its mode.
    assert axes.get_title() == "1 of 10 chains ever changed their mode"
    assert {"left: mean 0.25", "right: mean 0.75"} <= {text.get_text() for text in figure.legends[0].get_texts()}
    by_labels = plots.mode_occupancy(tree, (position[..., 0] > 0).astype(int))
    np.testing.assert_array_equal(by_labels.axes[0].get_lines()[1].get_ydata(), right.get_ydata())


def test_occupancy_over_training(tree):
    (axes,) = plots.mode_occupancy(tree, ["mode_a", "mode_b"], weights={"mode_a": 0.8}).axes
    np.testing.assert_array_equal(axes.get_lines()[0].get_ydata(), np.linspace(0.0, 1.0, 50))
    np.testing.assert_array_equal(axes.get_lines()[0].get_xdata(), np.arange(50))
    assert axes.get_xlabel() == "update"
    with pytest.raises(ValueError, match=r"its group 'training' has .*, expected 'mode_c'"):
        plots.mode_occupancy(tree, ["mode_c"])
    with pytest.raises(ValueError, match=r"group: got 'training', expected one of .*pass history="):
        plots.mode_occupancy(run(iid(4, 10, 1)), ["mode_a"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((4, 9), int), r"labels: got int64 labels of shape \(4, 9\), expected .* of shape \(4, 10\)"),
        (np.zeros((4, 10)), "labels: got float64 labels"),
        (lambda x: np.zeros((3, 2), int), r"labels: the function returned shape \(3, 2\) for 40 events"),
        (np.arange(40).reshape(4, 10), "labels: got 40 modes, expected at most 8"),
    ],
)
def test_bad_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        plots.mode_occupancy(run(iid(4, 10, 1)), labels)


def test_weights_of_unknown_modes_are_refused():
    with pytest.raises(ValueError, match=r"weights: got \['c'\], expected some of \['False', 'True'\]"):
        plots.mode_occupancy(run(iid(4, 10, 1)), lambda x: x[:, 0] > 0, weights={"c": 1.0})


# --- log Z ---------------------------------------------------------------------------------------------------------


def test_log_z_in_a_panel_for_each_group_that_has_it(tree):
    figure = plots.log_normalizer(tree, exact=1.31)
    tracked, running, named = figure.axes
    np.testing.assert_array_equal(tracked.get_lines()[0].get_ydata(), np.linspace(3.0, 1.0, 50))
    runs = tree["smc"]["log_z"].values
    np.testing.assert_array_equal(running.get_lines()[0].get_ydata(), runs)
    line = running.get_lines()[1].get_ydata()
    expected = [np.log(np.exp(runs[: count + 1]).mean()) for count in range(8)]
    np.testing.assert_allclose(line, expected, rtol=1e-12)
    ratio = np.exp(runs)
    error = ratio.std(ddof=1) / np.sqrt(8) / ratio.mean()
    assert f"{expected[-1]:.5g} ± {error:.2g}" in running.get_title()
    assert all(axes.get_lines()[-1].get_ydata()[0] == 1.31 for axes in figure.axes)
    ticks = [label.get_text() for label in named.get_xticklabels()]
    assert ticks == ["forward", "reverse", "bridge\n(not reliable)"]


def test_estimates_that_are_not_reliable_are_open_and_bounds_a_band(tree):
    named = plots.log_normalizer(tree).axes[2]
    points = [container.lines[0] for container in named.containers]
    assert [float(point.get_ydata()[0]) for point in points] == pytest.approx([1.2, 1.4, 1.3])
    assert [point.get_markerfacecolor() == "white" for point in points] == [False, False, True]
    bars = [container.lines[2][0].get_segments()[0][:, 1] for container in named.containers]
    np.testing.assert_allclose(bars, [[1.1, 1.3], [1.3, 1.5], [1.2, 1.4]], rtol=1e-6)
    band = named.patches[0].get_extents().transformed(named.transData.inverted())
    assert (band.y0, band.y1) == pytest.approx((1.2, 1.4))
    assert "between the two" in written(named.figure)


def test_bounds_that_cross_are_called_that():
    crossed = {"forward": estimate(1.5), "reverse": estimate(1.2)}
    assert "bounds cross" in written(plots.log_normalizer(run(iid(4, 10, 1), log_z=crossed)))
    # By less than their errors they may.
    touching = {"forward": estimate(1.3), "reverse": estimate(1.2)}
    assert "between the two" in written(plots.log_normalizer(run(iid(4, 10, 1), log_z=touching)))


def test_log_z_that_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"hold no estimate of log Z; pass smc=\.\.\., log_z="):
        plots.log_normalizer(run(iid(4, 10, 1)))
    with pytest.raises(TypeError, match="tree: got dict"):
        plots.log_normalizer({})
    rows = {"forward": LogNormalizer(*(jnp.broadcast_to(x, (2,)) for x in estimate(1.0)))}
    with pytest.raises(ValueError, match=r"its group 'log_z' has dimensions .* expected one value per estimator"):
        plots.log_normalizer(run(iid(4, 10, 1), log_z=rows))
    with pytest.raises(ValueError, match="1 of 1 estimates of log Z that are not finite"):
        plots.log_normalizer(run(iid(4, 10, 1), log_z={"forward": estimate(jnp.nan)}))


# --- the plane -----------------------------------------------------------------------------------------------------


def test_density_shows_the_potential_and_the_paths(tree):
    figure = plots.density(tree, energy, limits=(-3.0, 3.0, -2.0, 2.0), num_chains=3, resolution=31)
    axes = figure.axes[0]
    (image,) = axes.get_images()
    assert list(image.get_extent()) == [-3.0, 3.0, -2.0, 2.0]
    depth = np.asarray(image.get_array())
    assert depth[15, 15] == pytest.approx(0.0)
    assert depth[15, 0] == pytest.approx(-4.5, abs=1e-5)  # (-3, 0)
    assert depth[0, 15] == pytest.approx(-2.0, abs=1e-5)  # (0, -2)
    paths, _, ends = axes.get_lines()[:3]
    position = tree["negative_phase"]["x"].values
    np.testing.assert_array_equal(paths.get_xydata(), position[0])
    np.testing.assert_array_equal(ends.get_xydata()[0], position[0, -1])
    assert len(axes.get_lines()) == 9
    few = plots.density(tree, energy, num_draws=7, resolution=5).axes[0].get_lines()[0]
    np.testing.assert_array_equal(few.get_xydata(), position[0, -7:])
    assert "nats" in figure.axes[1].get_ylabel()


def test_density_holds_all_draws_and_leaves_what_is_no_energy_white(tree):
    figure = plots.density(tree, lambda x: jnp.where(x[0] > 0.0, energy(x), jnp.nan), resolution=20)
    axes = figure.axes[0]
    points = tree["negative_phase"]["x"].values.reshape(-1, 2)
    assert axes.get_xlim()[0] < points[:, 0].min() < points[:, 0].max() < axes.get_xlim()[1]
    assert axes.get_ylim()[0] < points[:, 1].min() < points[:, 1].max() < axes.get_ylim()[1]
    shown = np.ma.masked_invalid(axes.get_images()[0].get_array())
    assert bool(shown.mask[:, 0].all())
    assert not bool(shown.mask[:, -1].any())


def test_what_has_no_picture_in_the_plane_is_refused(tree):
    with pytest.raises(ValueError, match=r"tree: got events of shape \(3,\), expected \(2,\)"):
        plots.density(run(iid(4, 10, 3)), energy)
    with pytest.raises(ValueError, match=r"limits: got \(1.0, 0.0, 0.0, 1.0\)"):
        plots.density(tree, energy, limits=(1.0, 0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="potential: got no finite energy within the limits"):
        plots.density(tree, lambda x: jnp.sum(x) * jnp.nan, resolution=5)
    with pytest.raises(ValueError, match="potential: returned shape"):
        plots.density(tree, lambda x: x)
    position = iid(4, 10, 2)
    position[0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="tree: got draws that are not finite"):
        plots.density(run(position), energy)
    several = run(iid(4, 10, 2))
    several["negative_phase"]["y"] = several["negative_phase"]["x"]
    del several["negative_phase"].attrs["site"]
    with pytest.raises(ValueError, match="expected events that are one array"):
        plots.density(several, energy)
