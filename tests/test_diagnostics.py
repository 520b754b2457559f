"""Conversion to ArviZ and the verdict on mixing, against chains whose law is known."""

import arviz_stats
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from jax.tree_util import Partial
from numpyro.infer import MCMC, NUTS

import ebm_ppl as ebm
from ebm_ppl import diagnostics, kernels
from ebm_ppl.diagnostics import energy_gap, summary, to_datatree
from ebm_ppl.sampling import Draws
from ebm_ppl.testing import binomial_test


def energy(x):
    return 0.5 * jnp.sum(x**2)


def trace(position, potential=None, *, acceptance=0.7, gradients=2, divergent=None):
    """Draws with the given positions ``(chain, draw, *event)``, as if some kernel had made them."""
    shape = position.shape[:2]
    if potential is None:
        potential = 0.5 * (position.reshape(*shape, -1) ** 2).sum(axis=-1)
    divergent = np.zeros(shape, bool) if divergent is None else divergent
    return Draws(
        position=position,
        potential=potential,
        acceptance_rate=np.full(shape, acceptance),
        is_divergent=divergent,
        num_gradients=np.full(shape, gradients),
        log_weight=np.zeros(shape),
        num_energies=np.zeros(shape, int),
        num_nonfinite=np.zeros(shape, int),
        statistics={},
    )


def iid(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def autoregressive(rng, shape, rho):
    """Stationary AR(1) chains with N(0, 1) margins, along the second axis."""
    x = rng.normal(size=shape)
    for step in range(1, shape[1]):
        x[:, step] = rho * x[:, step - 1] + np.sqrt(1.0 - rho**2) * x[:, step]
    return x


def judge(position, **kwargs):
    return summary(to_datatree(trace(position, **kwargs)))


# --- to_datatree ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mcmc():
    def model(y):
        x = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    mcmc = MCMC(
        NUTS(model), num_warmup=100, num_samples=150, num_chains=4, chain_method="vectorized", progress_bar=False
    )
    mcmc.run(jax.random.key(0), jnp.ones(2), extra_fields=("num_steps", "accept_prob", "diverging"))
    return mcmc


@pytest.fixture(scope="module")
def sampled():
    sampler = ebm.init_sampler(jnp.asarray(iid(4, 2, 3), jnp.float32), kernels.mala(step_size=0.5))
    return ebm.draw(jax.random.key(0), energy, sampler, 30, num_steps=2)


def test_groups_names_and_values(sampled):
    sampler, draws = sampled
    tree = to_datatree(draws, site="image", sampler=sampler)
    assert set(tree.children) == {"negative_phase", "negative_phase_stats"}
    phase, stats = tree["negative_phase"], tree["negative_phase_stats"]
    assert phase["image"].dims == ("chain", "draw", "image_dim_0", "image_dim_1")
    np.testing.assert_array_equal(phase["image"], draws.position)
    counts = {"n_grad", "n_energy", "n_nonfinite"}
    assert set(stats.data_vars) == {"potential", "acceptance_rate", "diverging", "is_finite", "log_weight"} | counts
    assert all(variable.dims == ("chain", "draw") for variable in stats.data_vars.values())
    np.testing.assert_allclose(stats["potential"], 0.5 * (np.asarray(draws.position) ** 2).sum(axis=(2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(stats["acceptance_rate"], draws.acceptance_rate)
    # Two MALA steps per draw, one gradient each.
    assert bool((stats["n_grad"] == 2).all())
    assert bool(stats["is_finite"].all())
    assert not bool(stats["diverging"].any())


def test_attributes_name_site_kernel_and_versions(sampled):
    sampler, draws = sampled
    tree = to_datatree(draws, site="image", sampler=sampler, attrs={"git": "abc", "seed": 3})
    assert tree.attrs["inference_library"] == "ebm_ppl"
    assert tree.attrs["jax_version"] == jax.__version__
    assert tree.attrs["numpyro_version"] == numpyro.__version__
    assert tree.attrs["git"] == "abc"
    for group in ("negative_phase", "negative_phase_stats"):
        assert tree[group].attrs["site"] == "image"
        assert tree[group].attrs["step_size"] == pytest.approx(0.5)


def test_non_finite_draws_are_marked():
    position = iid(2, 5, 3)
    position[1, 2, 0] = np.nan
    draws = trace(position)
    draws.potential[0, 4] = np.inf
    marked = to_datatree(draws)["negative_phase_stats"]["is_finite"].values
    assert [tuple(index) for index in np.argwhere(~marked)] == [(0, 4), (1, 2)]


def test_many_chains_of_few_draws_are_no_mistake():
    """ArviZ warns of more chains than draws, which is how a negative phase is run; warnings are errors here."""
    assert to_datatree(trace(iid(64, 3, 2)))["negative_phase"].sizes["chain"] == 64


def test_training_history_runs_along_step(sampled):
    history = {"loss": np.arange(5.0), "acceptance_rate": jnp.linspace(0.0, 1.0, 5)}
    tree = to_datatree(sampled[1], history=history)
    assert tree["training"]["loss"].dims == ("step",)
    np.testing.assert_array_equal(tree["training"]["loss"], np.arange(5.0))
    np.testing.assert_allclose(tree["training"]["acceptance_rate"], np.linspace(0, 1, 5), rtol=1e-6)


def test_history_of_a_real_fit():
    sampler = ebm.init_sampler(jnp.zeros((8, 2)), kernels.mala(step_size=0.5))
    potential = Partial(lambda p, x: 0.5 * jnp.sum((x - p) ** 2), jnp.zeros(2))
    optimizer = optax.sgd(0.1)
    state = ebm.init_train(potential, optimizer, sampler)
    objective = Partial(ebm.objectives.persistent_contrastive_divergence, num_steps=2)
    data = jnp.asarray(iid(32, 2), jnp.float32)
    _, history = ebm.fit(
        jax.random.key(0), state, data, objective, optimizer, num_steps=6, batch_size=8, progress_bar=False
    )
    training = to_datatree(trace(iid(4, 10, 2)), history=history)["training"]
    assert training.sizes["step"] == 6
    assert set(training.data_vars) == set(history)


def test_posterior_from_numpyro_joins_the_tree(sampled, mcmc):
    tree = to_datatree(sampled[1], posterior=mcmc)
    assert {"posterior", "sample_stats", "observed_data", "negative_phase"} <= set(tree.children)
    assert tree["posterior"]["z"].shape == (4, 150, 2)
    np.testing.assert_array_equal(tree["posterior"]["z"], mcmc.get_samples(group_by_chain=True)["z"])
    np.testing.assert_array_equal(tree["observed_data"]["y"], np.ones(2))


def test_netcdf_round_trip(tmp_path, sampled, mcmc):
    sampler, draws = sampled
    tree = to_datatree(
        draws, site="image", sampler=sampler, history={"loss": np.arange(5.0)}, posterior=mcmc, attrs={"seed": 3}
    )
    path = tmp_path / "run.nc"
    tree.to_netcdf(path, engine="h5netcdf")
    with xr.open_datatree(path, engine="h5netcdf") as stored:
        assert set(stored.children) == set(tree.children)
        for name, group in tree.children.items():
            xr.testing.assert_identical(stored[name].to_dataset().load(), group.to_dataset())
        assert stored.attrs["inference_library"] == "ebm_ppl"
        assert int(stored.attrs["seed"]) == 3
        again = summary(stored)
    assert again == summary(tree)


@pytest.mark.parametrize("draws", [None, np.zeros((4, 10)), {"x": 1}])
def test_only_draws_are_converted(draws):
    with pytest.raises(TypeError, match=r"draws: got .*, expected the result of ebm\.draw"):
        to_datatree(draws)


# --- summary: chains that mix --------------------------------------------------------------------------------------


def test_independent_draws_mix():
    found = judge(iid(4, 1000, 2))
    assert found.mixing == "yes"
    assert (found.num_chains, found.num_draws, found.num_gradients) == (4, 1000, 8000)
    assert found.rhat < 1.005
    assert 3000 < found.ess_bulk < 5000
    assert found.ess_per_gradient == pytest.approx(found.ess_bulk / 8000)
    assert found.acceptance_rate == pytest.approx(0.7)
    assert (found.frozen_fraction, found.num_nonfinite, found.num_divergent) == (0.0, 0, 0)
    for line in ("4 x 1000", "acceptance", "yes"):
        assert line in str(found)


def test_effective_sample_size_of_an_autoregression():
    """ESS / N = (1 - rho) / (1 + rho) for AR(1), here for the position alone (the energy mixes faster)."""
    position = autoregressive(np.random.default_rng(0), (16, 4000, 1), 0.8)
    found = judge(position)
    assert found.ess_bulk == pytest.approx(16 * 4000 * 0.2 / 1.8, rel=0.1)


def test_false_alarms_on_stationary_chains_of_adequate_length():
    """50 traces of 4 AR(1) chains with about 2,000 effective draws each; measured false-alarm rate 0 of 500.

    At 900 effective draws (rho = 0.8) it is 13 of 200: R-hat then exceeds 1.01 by chance.
    """
    rng = np.random.default_rng(1)
    positions = [autoregressive(rng, (4, 2000, 2), 1 / 3) for _ in range(50)]
    verdicts = [judge(position).mixing for position in positions]
    assert verdicts.count("yes") == 50


def test_a_flat_energy_is_no_frozen_chain():
    """Energy zero everywhere is a legitimate target (the base, or a uniform law): only positions can be frozen."""
    position = np.random.default_rng(0).uniform(size=(4, 1000, 2))
    assert judge(position, potential=np.zeros((4, 1000))).mixing == "yes"


def test_real_chains_of_a_gaussian_mix():
    sampler = ebm.init_sampler(jnp.asarray(iid(8, 2), jnp.float32), kernels.hmc(0.5, 3))
    _, draws = ebm.draw(jax.random.key(0), energy, sampler, 400)
    assert summary(to_datatree(draws)).mixing == "yes"


def test_numpyro_posterior_is_judged_by_its_own_statistics(sampled, mcmc):
    found = summary(to_datatree(sampled[1], posterior=mcmc), group="posterior")
    assert (found.num_chains, found.num_draws) == (4, 150)
    extra = mcmc.get_extra_fields()
    assert found.num_gradients == int(extra["num_steps"].sum())
    assert found.acceptance_rate == pytest.approx(float(extra["accept_prob"].mean()), rel=1e-5)
    assert found.frozen_fraction == 0.0
    assert found.rhat < 1.05


def test_absent_statistics_are_unknown_not_zero():
    tree = to_datatree(trace(iid(4, 1000, 2)))
    del tree["negative_phase_stats"]
    found = summary(tree)
    assert found.mixing == "yes"
    assert np.isnan(found.acceptance_rate)
    assert np.isnan(found.ess_per_gradient)


# --- summary: chains that do not -----------------------------------------------------------------------------------


def test_a_kernel_that_accepts_everything_and_never_moves_is_frozen():
    """HMC with a step below the float spacing: acceptance 1, and ArviZ counts every draw as effective."""
    sampler = ebm.init_sampler(jnp.ones((4, 2)), kernels.hmc(1e-12, 2))
    _, draws = ebm.draw(jax.random.key(0), energy, sampler, 100)
    found = summary(to_datatree(draws))
    assert found.acceptance_rate == pytest.approx(1.0)
    assert (found.mixing, found.ess_bulk, found.rhat, found.frozen_fraction) == ("no", 0.0, np.inf, 1.0)
    assert "100% of the chains frozen" in found.reason
    # The control: what the guard is for.
    constant = np.asarray(draws.position[..., 0], np.float64)
    assert float(arviz_stats.ess(constant, method="bulk")) == 400


def test_one_frozen_chain_among_good_ones():
    position = iid(8, 500, 3)
    position[2] = position[2, 0]
    found = judge(position)
    assert (found.mixing, found.ess_bulk, found.rhat) == ("no", 0.0, np.inf)
    assert found.frozen_fraction == 1 / 8


def test_one_frozen_coordinate():
    position = iid(4, 500, 3)
    position[:, :, 1] = position[:, :1, 1]
    assert judge(position).mixing == "no"


def test_constant_chains():
    found = judge(np.ones((4, 500, 2)))
    assert (found.mixing, found.ess_bulk, found.rhat, found.frozen_fraction) == ("no", 0.0, np.inf, 1.0)


def test_two_modes_that_no_chain_leaves():
    """Each chain is perfect by itself; R-hat sees that they disagree."""
    position = 0.3 * iid(4, 1000, 1) + np.array([-2.0, -2.0, 2.0, 2.0])[:, None, None]
    found = judge(position, potential=iid(4, 1000, seed=1))
    assert found.mixing == "no"
    assert found.rhat > 1.5
    assert "R-hat" in found.reason


def test_chains_with_different_spread_only():
    """Equal means: the folded R-hat must see it."""
    position = iid(4, 1000, 1) * np.array([0.3, 1.0, 1.0, 3.0])[:, None, None]
    assert judge(position, potential=iid(4, 1000, seed=1)).mixing == "no"


def test_a_slow_drift_is_seen_within_the_chains():
    position = iid(4, 1000, 1) + np.linspace(-1.0, 1.0, 1000)[None, :, None]
    assert judge(position).mixing == "no"


def test_disagreement_in_the_energy_alone():
    potential = iid(4, 1000) + np.array([0.0, 0.0, 3.0, 3.0])[:, None]
    assert judge(iid(4, 1000, 2, seed=1), potential=potential).mixing == "no"


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["position", "potential"])
def test_one_non_finite_number(value, where):
    draws = trace(iid(4, 1000, 2))
    getattr(draws, where)[1, 7] = value
    found = summary(to_datatree(draws))
    assert (found.mixing, found.num_nonfinite, found.ess_bulk) == ("no", 1, 0.0)
    assert "1 non-finite draws" in found.reason


def test_divergences_are_a_fault_and_counted():
    divergent = np.zeros((4, 1000), bool)
    divergent[1, [3, 5, 7]] = True
    found = judge(iid(4, 1000, 2), divergent=divergent)
    assert (found.mixing, found.num_divergent) == ("no", 3)
    assert "3 divergent draws" in found.reason


# --- summary: not assessable ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chains", [1, 2, 3])
def test_too_few_chains(num_chains):
    found = judge(iid(num_chains, 2000, 2))
    assert found.mixing == "not assessable"
    assert "at least 4 chains" in found.reason
    assert np.isnan(found.rhat) == (num_chains == 1)


@pytest.mark.parametrize("num_draws", [1, 2, 3, 4, 19])
def test_too_few_draws(num_draws):
    found = judge(iid(8, num_draws, 2))
    assert found.mixing == "not assessable"
    assert "of 20 draws" in found.reason


def test_few_draws_of_a_rejecting_chain_are_not_called_frozen():
    """At acceptance 0.5 one chain in 16 rejects four proposals running; that says too few draws, not frozen."""
    position = iid(16, 5, 1)
    position[3] = position[3, 0]
    found = judge(position)
    assert found.mixing == "not assessable"
    assert found.frozen_fraction == 1 / 16


def test_too_few_effective_draws():
    found = judge(iid(4, 60, 1), potential=np.zeros((4, 60)))
    assert found.ess_bulk < 400
    assert found.rhat <= 1.01
    assert found.mixing == "not assessable"
    assert "draw more" in found.reason


def test_one_frozen_chain_by_itself_is_still_a_fault():
    assert judge(np.ones((1, 500, 2))).mixing == "no"


# --- summary: arguments --------------------------------------------------------------------------------------------


def test_var_names_select_variables():
    tree = to_datatree(trace(iid(4, 1000, 2)), site="alpha")
    tree["negative_phase"]["fixed"] = xr.DataArray(np.ones((4, 1000)), dims=("chain", "draw"))
    assert summary(tree).mixing == "no"
    assert summary(tree, var_names=["alpha"]).mixing == "yes"
    assert summary(tree, var_names="alpha").mixing == "yes"


@pytest.mark.parametrize("var_names", [["y"], "y", ["x", "y"], []])
def test_unknown_variables_are_refused(var_names):
    with pytest.raises(ValueError, match=r"var_names: got .*, expected some of \['x'\]"):
        summary(to_datatree(trace(iid(4, 50, 2))), var_names=var_names)


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match=r"group: got 'posterior', expected one of \['negative_phase'"):
        summary(to_datatree(trace(iid(4, 50, 2))), group="posterior")


# --- energy_gap ----------------------------------------------------------------------------------------------------


def test_gap_in_closed_form():
    """Data N(0, I), negatives N(0, 4 I) in 3 dimensions under the energy x'x / 2: the gap is 3 (1 - 4) / 2."""
    data = jnp.asarray(iid(4000, 3), jnp.float32)
    gap = energy_gap(energy, data, trace(2.0 * iid(64, 50, 3, seed=1)))
    # Var(x'x / 2) is 3/2 and 16 times that.
    expected_error = np.sqrt(1.5 / 4000 + 24.0 / (64 * 50))
    assert gap.standard_error == pytest.approx(expected_error, rel=0.25)
    assert abs(gap.value + 4.5) < 5 * expected_error
    assert "±" in str(gap)


def test_error_of_the_gap_covers_under_autocorrelation():
    """rho = 0.9: an error that took the draws for independent would cover about 0.6 instead of 0.95."""
    rng = np.random.default_rng(0)
    scores, naive = [], []
    for _ in range(400):
        data = rng.normal(size=(5000, 1)).astype(np.float32)
        draws = trace(autoregressive(rng, (64, 50, 1), 0.9))
        gap = energy_gap(energy, data, draws)
        scores.append(gap.value / gap.standard_error)
        naive.append(gap.value / np.hypot(np.sqrt(0.5 / 5000), draws.potential.std() / np.sqrt(64 * 50)))
    covered, naively = (int((np.abs(values) < 1.96).sum()) for values in (scores, naive))
    # P(|t| < 1.96) is 0.946 with 63 degrees of freedom and 0.950 with 4999; both enter.
    binomial_test(covered, 400, 0.947, name="coverage").raise_if_failed()
    assert naively < 300


def test_one_chain_or_one_row_has_no_error():
    data = jnp.ones((5, 2))
    assert np.isnan(energy_gap(energy, data, trace(iid(1, 100, 2))).standard_error)
    assert np.isnan(energy_gap(energy, data[:1], trace(iid(8, 100, 2))).standard_error)
    assert np.isfinite(energy_gap(energy, data[:1], trace(iid(1, 100, 2))).value)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (np.zeros((0, 2), np.float32), ValueError, r"data: got shape \(0, 2\), which is empty"),
        (np.array([[0.0, 1.0], [np.nan, 0.0]]), ValueError, "data: got 1 of 2 rows that are NaN.*index 1"),
        (np.zeros((3, 2), int), TypeError, "data: got dtype int"),
    ],
)
def test_bad_data_are_refused(data, error, message):
    with pytest.raises(error, match=message):
        energy_gap(energy, data, trace(iid(4, 10, 2)))


def test_thresholds_are_those_of_the_literature():
    assert (diagnostics.RHAT_MIXED, diagnostics.ESS_MIXED) == (1.01, 400.0)
