"""BlackJAX runs under ArviZ's names, and the guards against what ArviZ does not see in them."""

import functools
from types import SimpleNamespace

import arviz_stats
import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from ebm_ppl.diagnostics import from_blackjax, summary

CHAINS, DRAWS = 8, 300
ONES = np.ones(2, np.float32)


def logdensity(x):
    return -0.5 * jnp.sum(x**2)


def broken(x):
    return jnp.where(jnp.sum(x) > -100.0, jnp.nan, 0.0)


# By name: the sampler for a step size, the step size, and what its statistics hold beside lp and diverging.
ALGORITHMS = {
    "mala": (lambda step: blackjax.mala(logdensity, step), 0.5, {"acceptance_rate", "n_grad"}),
    "barker": (lambda step: blackjax.barker(logdensity, step), 0.5, {"acceptance_rate", "n_grad"}),
    "random_walk": (
        lambda step: blackjax.additive_step_random_walk.normal_random_walk(logdensity, step * ONES),
        1.0,
        {"acceptance_rate", "n_grad"},
    ),
    "hmc": (lambda step: blackjax.hmc(logdensity, step, ONES, 3), 0.9, {"acceptance_rate", "energy", "n_steps"}),
    "nuts": (
        lambda step: blackjax.nuts(logdensity, step, ONES, max_num_doublings=4),
        0.8,
        {"acceptance_rate", "energy", "n_steps", "tree_depth"},
    ),
    "ghmc": (
        lambda step: blackjax.ghmc(logdensity, step, ONES, 0.5, 0.3),
        0.5,
        {"acceptance_rate", "energy", "n_steps"},
    ),
    "mclmc": (lambda step: blackjax.mclmc(logdensity, L=2.0, step_size=step), 0.5, {"energy_error"}),
    "adjusted_mclmc": (
        lambda step: blackjax.adjusted_mclmc(logdensity, step_size=step, num_integration_steps=4),
        0.5,
        {"acceptance_rate", "n_steps"},
    ),
}
BROKEN = {"broken": (lambda step: blackjax.mala(broken, step), 0.5, set())}


@functools.cache
def compiled(name):
    build, *_ = {**ALGORITHMS, **BROKEN}[name]

    def scan(key, step_size):
        algorithm = build(step_size)
        start_key, init_key, run_key = jax.random.split(key, 3)
        position = jax.random.normal(start_key, (CHAINS, 2))
        start = jax.vmap(algorithm.init)(position, jax.random.split(init_key, CHAINS))

        def step(state, key):
            state, info = jax.vmap(algorithm.step)(jax.random.split(key, CHAINS), state)
            return state, (state, info)

        return start, *jax.lax.scan(step, start, jax.random.split(run_key, DRAWS))[1]

    return jax.jit(scan)


@functools.cache
def run(name, step_size=None):
    """A scan over a population: the states that the chains started in, and arrays (draw, chain, ...)."""
    step_size = {**ALGORITHMS, **BROKEN}[name][1] if step_size is None else step_size
    return jax.tree.map(np.asarray, compiled(name)(jax.random.key(0), step_size))


@pytest.fixture(scope="module")
def walk():
    """Ten draws of a run."""
    _, states, infos = run("hmc")
    return jax.tree.map(lambda x: x[::30], (states, infos))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_sampler_under_names_that_arviz_knows(name):
    *_, expected = ALGORITHMS[name]
    _, states, infos = run(name)
    tree = from_blackjax(states, infos, axes=("draw", "chain"), attrs={"seed": 0})
    assert tree["posterior"]["x"].dims == ("chain", "draw", "x_dim_0")
    np.testing.assert_array_equal(tree["posterior"]["x"], np.swapaxes(states.position, 0, 1))
    stats = tree["sample_stats"]
    assert set(stats.data_vars) == {"lp", "diverging"} | expected
    assert all(variable.shape == (CHAINS, DRAWS) for variable in stats.data_vars.values())
    np.testing.assert_allclose(stats["lp"], -0.5 * (tree["posterior"]["x"].values ** 2).sum(axis=-1), rtol=1e-4)
    assert (stats["diverging"].dtype, bool(stats["diverging"].any())) == (bool, False)
    if "acceptance_rate" in expected:
        assert bool(((stats["acceptance_rate"] >= 0) & (stats["acceptance_rate"] <= 1.00001)).all())
    assert (tree.attrs["inference_library"], tree.attrs["seed"]) == ("ebm_ppl", 0)


def test_the_energy_is_that_of_the_state_the_chain_went_to():
    """BlackJAX's HMC reports the Hamiltonian of the proposal also where it was rejected; E-BFMI would be wrong."""
    start, states, infos = run("hmc", 1.5)
    stored = from_blackjax(states, infos, axes=("draw", "chain"))["sample_stats"]["energy"].values.T
    before = np.concatenate([start.logdensity[None], states.logdensity[:-1]])
    rejected = ~np.asarray(infos.is_accepted)
    kept = -before + 0.5 * (np.asarray(infos.momentum) ** 2).sum(axis=-1)
    expected = np.where(rejected, kept, infos.energy)
    assert rejected.mean() > 0.1
    np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-5)
    # The fault, seeded: what BlackJAX reports is elsewhere, by many nats, and moves E-BFMI.
    assert np.abs(np.asarray(infos.energy) - expected).max() > 1.0


def test_an_impossible_proposal_leaves_the_energy_unknown(walk):
    states, infos = jax.tree.map(np.array, walk)
    infos.acceptance_rate[2, 1], infos.is_accepted[2, 1] = 0.0, False
    energy = from_blackjax(states, infos, axes=("draw", "chain"))["sample_stats"]["energy"].values
    assert [tuple(index) for index in np.argwhere(np.isnan(energy))] == [(1, 2)]


# --- axes ----------------------------------------------------------------------------------------------------------


def test_axes_say_what_comes_first(walk):
    states, infos = walk
    one = from_blackjax(states, infos, axes=("draw", "chain"))
    swapped = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), (states, infos))
    other = from_blackjax(*swapped, axes=["chain", "draw"])
    for group in ("posterior", "sample_stats"):
        xr.testing.assert_equal(one[group].to_dataset(), other[group].to_dataset())
    single = from_blackjax(*jax.tree.map(lambda x: x[:, 2], (states, infos)), axes=("draw",))
    assert single["posterior"]["x"].shape == (1, 10, 2)
    np.testing.assert_array_equal(single["posterior"]["x"][0], one["posterior"]["x"][2])
    np.testing.assert_array_equal(single["sample_stats"]["n_steps"][0], one["sample_stats"]["n_steps"][2])


def test_positions_alone_and_fields_of_infos():
    position = np.random.default_rng(0).normal(size=(30, 4, 2)).astype(np.float32)
    tree = from_blackjax(position, axes=("draw", "chain"))
    assert set(tree.children) == {"posterior"}
    assert tree["posterior"]["x"].shape == (4, 30, 2)
    rates = np.random.default_rng(0).uniform(size=(30, 4)).astype(np.float32)
    tree = from_blackjax(position, {"acceptance_rate": rates}, axes=("draw", "chain"), site="theta")
    np.testing.assert_array_equal(tree["sample_stats"]["acceptance_rate"], rates.T)
    # What bare positions cannot tell is absent: neither a log density nor a count of gradients.
    assert set(tree["sample_stats"].data_vars) == {"acceptance_rate", "diverging"}
    assert set(tree["posterior"].data_vars) == {"theta"}


def test_pytrees_of_positions():
    rng = np.random.default_rng(0)
    position = {"mu": rng.normal(size=(20, 4)), "tau": [rng.normal(size=(20, 4, 3))]}
    position = jax.tree.map(np.float32, position)
    states = blackjax.mala.init(np.zeros(2, np.float32), logdensity)._replace(
        position=position, logdensity=np.zeros((20, 4), np.float32), logdensity_grad=position
    )
    infos = {"acceptance_rate": np.ones((20, 4), np.float32)}
    tree = from_blackjax(states, infos, axes=("draw", "chain"))
    assert {name: v.shape for name, v in tree["posterior"].data_vars.items()} == {"mu": (4, 20), "tau.0": (4, 20, 3)}
    prefixed = from_blackjax(states.position, axes=("draw", "chain"), site="z")
    assert set(prefixed["posterior"].data_vars) == {"z.mu", "z.tau.0"}


def test_a_negative_phase_has_a_potential():
    _, states, infos = run("mala")
    tree = from_blackjax(states, infos, axes=("draw", "chain"), group="negative_phase")
    assert set(tree.children) == {"negative_phase", "negative_phase_stats"}
    assert "lp" not in tree["negative_phase_stats"].data_vars
    np.testing.assert_array_equal(tree["negative_phase_stats"]["potential"], -states.logdensity.T)
    assert summary(tree).num_gradients == CHAINS * DRAWS


def test_a_run_comes_back_from_a_file(tmp_path, walk):
    tree = from_blackjax(*walk, axes=("draw", "chain"))
    tree.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "run.nc", engine="h5netcdf") as again:
        for group in tree.children:
            xr.testing.assert_identical(again[group].to_dataset().load(), tree[group].to_dataset())


# --- sequential Monte Carlo ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tempered():
    """Three runs of BlackJAX's tempered SMC from N(0, 2^2) to N(1, 1) on the plane, four fixed temperatures."""

    def log_start(x):
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, 0.0, 2.0))

    def one(key):
        algorithm = blackjax.tempered_smc(
            log_start,
            lambda x: logdensity(x - 1.0) - log_start(x),
            blackjax.mala.build_kernel(),
            blackjax.mala.init,
            {"step_size": jnp.full(1, 0.5)},
            blackjax.smc.resampling.systematic,
            num_mcmc_steps=2,
        )
        start_key, *keys = jax.random.split(key, 5)
        state = algorithm.init(2.0 * jax.random.normal(start_key, (128, 2)))

        def step(state, inputs):
            return algorithm.step(inputs[0], state, inputs[1])

        return jax.lax.scan(step, state, (jnp.stack(keys), jnp.array([0.1, 0.3, 0.6, 1.0])))

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 3)))


def test_particles_keep_their_weights(tempered):
    states, infos = tempered
    tree = from_blackjax(states, infos, axes=("replicate", "particle"))
    group = tree["smc"]
    assert set(tree.children) == {"smc"}
    assert group["x"].dims == ("replicate", "particle", "x_dim_0")
    np.testing.assert_allclose(np.exp(group["log_weight"]).mean(axis=1), 1.0, rtol=1e-5)
    assert float(group["log_weight"].std()) > 0.05  # they do matter
    np.testing.assert_allclose(group["log_z"], np.asarray(infos.log_likelihood_increment).sum(axis=1), rtol=1e-6)
    assert bool((abs(group["log_z"] - np.log(2 * np.pi)) < 1.0).all())
    assert group["num_temperatures"].values.tolist() == [4, 4, 4]
    one = from_blackjax(*jax.tree.map(lambda x: x[1], (states, infos)), axes=("particle",))["smc"]
    np.testing.assert_array_equal(one["x"][0], group["x"][1])
    assert float(one["log_z"][0]) == float(group["log_z"][1])


def test_a_weight_of_zero_is_one(tempered):
    states = jax.tree.map(np.array, tempered[0])
    states.weights[0, 3] = 0.0
    group = from_blackjax(states, axes=("replicate", "particle"))["smc"]
    assert float(group["log_weight"][0, 3]) == -np.inf
    assert set(group.data_vars) == {"x", "log_weight"}


def test_particles_that_have_not_arrived_are_refused(tempered):
    states, infos = tempered
    with pytest.raises(ValueError, match=r"states: got particles at tempering_param 0\.5.*expected those at 1"):
        from_blackjax(states._replace(tempering_param=jnp.array([1.0, 0.5, 1.0])), axes=("replicate", "particle"))
    last = infos._replace(log_likelihood_increment=infos.log_likelihood_increment[:, -1])
    with pytest.raises(ValueError, match=r"infos: got log likelihood increments of shape \(3,\)"):
        from_blackjax(states, last, axes=("replicate", "particle"))


# --- the guards ----------------------------------------------------------------------------------------------------


def test_a_run_that_mixes():
    _, states, infos = run("nuts")
    found = summary(from_blackjax(states, infos, axes=("draw", "chain")), group="posterior")
    assert found.mixing == "yes"
    assert found.num_gradients == int(infos.num_integration_steps.sum())
    assert found.ess_per_gradient == pytest.approx(found.ess_bulk / found.num_gradients)


def test_a_frozen_run_that_accepts_everything():
    """HMC with a step below the float spacing: acceptance 1, and ArviZ counts every draw as effective."""
    _, states, infos = run("hmc", 1e-12)
    tree = from_blackjax(states, infos, axes=("draw", "chain"))
    found = summary(tree, group="posterior")
    assert found.acceptance_rate == pytest.approx(1.0)
    assert (found.mixing, found.ess_bulk, found.rhat, found.frozen_fraction) == ("no", 0.0, np.inf, 1.0)
    assert float(arviz_stats.ess(tree["posterior"]["x"].values[:1, :, 0].astype(float), method="bulk")) == DRAWS


def test_a_run_of_nans():
    _, states, infos = run("broken")
    found = summary(from_blackjax(states, infos, axes=("draw", "chain")), group="posterior")
    assert found.mixing == "no"
    assert (found.frozen_fraction, found.num_divergent, found.acceptance_rate) == (1.0, CHAINS * DRAWS, 0.0)


def test_two_modes_that_show_in_the_log_density_alone():
    position = np.random.default_rng(0).normal(size=(4, 1000, 1))
    heights = np.random.default_rng(1).normal(size=(4, 1000)) + np.array([0.0, 0.0, 3.0, 3.0])[:, None]
    tree = from_blackjax(
        position.astype(np.float32), {"logdensity": heights.astype(np.float32)}, axes=("chain", "draw")
    )
    assert "lp" in tree["sample_stats"].data_vars
    assert summary(tree, group="posterior").mixing == "no"
    del tree["sample_stats"]["lp"]
    assert summary(tree, group="posterior").mixing == "yes"


def test_one_chain_is_not_assessable(walk):
    tree = from_blackjax(*jax.tree.map(lambda x: x[:, 0], walk), axes=("draw",))
    assert summary(tree, group="posterior").mixing == "not assessable"


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axes", [(), ("chain",), ("draw", "draw"), ("draws", "chain"), ("particle", "replicate"), "draw"]
)
def test_unknown_axes_are_refused(axes):
    with pytest.raises(ValueError, match=r"axes: got .*expected one of"):
        from_blackjax(np.zeros((3, 4, 2)), axes=axes)


def test_axes_of_the_wrong_kind_are_refused(tempered):
    with pytest.raises(ValueError, match=r"axes: got .* for states that are particles, expected one of"):
        from_blackjax(tempered[0], axes=("draw", "chain"))
    with pytest.raises(ValueError, match=r"axes: got .* for states that are chains, expected one of"):
        from_blackjax(np.zeros((3, 4), np.float32), axes=("particle",))


def test_bad_states_are_refused():
    particles = SimpleNamespace(_asdict=lambda: {"particles": np.zeros(3)})
    with pytest.raises(
        TypeError, match=r"states: got SimpleNamespace with .'particles'., expected BlackJAX states with"
    ):
        from_blackjax(particles, axes=("particle",))
    with pytest.raises(ValueError, match="group: got 'prior', expected 'posterior' or 'negative_phase'"):
        from_blackjax(np.zeros((3, 4)), axes=("draw", "chain"), group="prior")
    with pytest.raises(ValueError, match=r"states.*: got shape \(3,\), expected leading axes \('draw', 'chain'\)"):
        from_blackjax(np.zeros(3, np.float32), axes=("draw", "chain"))
    with pytest.raises(ValueError, match=r"infos\.acceptance_rate: got \(5, 3\) chains and draws, expected \(4, 3\)"):
        from_blackjax(
            np.zeros((3, 4), np.float32), {"acceptance_rate": np.zeros((3, 5), np.float32)}, axes=("draw", "chain")
        )
