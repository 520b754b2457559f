"""What a ``DataTree`` holds of a run, group by group, and that a netCDF file gives it back bit for bit."""

import json

import arviz_stats
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from jax.tree_util import Partial
from numpyro.infer import HMC, MCMC, init_to_value

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.diagnostics import rhat, summary, to_datatree
from ebm_ppl.kernels.smc import run_tempered_smc
from ebm_ppl.normalizer import LogNormalizer
from ebm_ppl.provenance import normalizer_kinds
from ebm_ppl.sampling import Draws


def energy(x):
    return 0.5 * jnp.sum(x**2)


def trace(position):
    """Draws at the given positions, a pytree of ``(chain, draw, *event)``, as if some kernel had made them."""
    leaves = jax.tree.leaves(position)
    shape = leaves[0].shape[:2]
    potential = sum(0.5 * (leaf.reshape(*shape, -1) ** 2).sum(axis=-1) for leaf in leaves)
    zeros = np.zeros(shape, int)
    return Draws(position, potential, np.ones(shape), zeros > 0, zeros + 2, np.zeros(shape), zeros, zeros, {})


def iid(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def stored(tree, path):
    """The tree as a netCDF file gives it back."""
    tree.to_netcdf(path, engine="h5netcdf")
    with xr.open_datatree(path, engine="h5netcdf") as opened:
        return opened.load()


def assert_bit_identical(one, other):
    """The same groups, variables, coordinates, dtypes, bytes and attributes."""
    assert set(one.groups) == set(other.groups)
    for name in one.groups:
        left, right = one[name].to_dataset(), other[name].to_dataset()
        assert set(left.variables) == set(right.variables)
        assert set(left.coords) == set(right.coords)
        for key in left.variables:
            a, b = left[key], right[key]
            assert a.dims == b.dims
            if a.dtype.kind in "OU":
                assert a.values.tolist() == b.values.tolist()
            else:
                assert a.dtype == b.dtype, (name, key)
                assert a.values.tobytes() == b.values.tobytes(), (name, key)
            assert dict(a.attrs) == dict(b.attrs)
        assert set(left.attrs) == set(right.attrs)
        for key, value in left.attrs.items():
            assert np.array_equal(np.atleast_1d(right.attrs[key]), np.atleast_1d(value)), (name, key)


@pytest.fixture(scope="module")
def runs():
    """Eight SMC runs from N(0, 2^2) to N(1, 1) on the plane, log Z = log(2 pi)."""
    start = dist.Normal(0.0, 2.0).expand([2]).to_event(1)

    def run(key):
        draw_key, run_key = jax.random.split(key)
        draws = start.sample(draw_key, (64,))
        return run_tempered_smc(
            run_key, draws, start.log_prob, lambda x: -energy(x - 1.0), kernel=kernels.mala(step_size=0.5), num_steps=2
        )

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 8))


@pytest.fixture(scope="module")
def estimates():
    def one(value, reliable, khat=jnp.nan):
        return LogNormalizer(*map(jnp.asarray, (value, 0.01, 500.0, khat, 1234, reliable)))

    return {"forward": one(1.5, True), "reverse": one(1.75, False, 0.25)}


@pytest.fixture(scope="module")
def sampled():
    sampler = ebm.init_sampler(jnp.asarray(iid(6, 2), jnp.float32), kernels.mala(step_size=0.5))
    return ebm.draw(jax.random.key(0), energy, sampler, 30, num_steps=2)


@pytest.fixture(scope="module")
def mcmc():
    def model(data):
        tilt = numpyro.sample("tilt", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(data)):
            site = ebm.EBM(lambda x: -tilt * x, dist.Normal(0.0, 1.0), log_normalizer=tilt**2 / 2)
            numpyro.sample("x", site, obs=data)

    kernel = HMC(model, num_steps=2, trajectory_length=None, init_strategy=init_to_value(values={"tilt": 0.0}))
    mcmc = MCMC(kernel, num_warmup=10, num_samples=10, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), jnp.linspace(0.0, 1.0, 5), extra_fields=("num_steps", "accept_prob"))
    return mcmc


# --- superchains ---------------------------------------------------------------------------------------------------


def test_superchains_are_a_coordinate_of_the_chains(sampled):
    tree = to_datatree(sampled[1], superchain_ids=[7, 7, 7, 2, 2, 2])
    for group in ("negative_phase", "negative_phase_stats"):
        ids = tree[group].coords["superchain_ids"]
        assert (ids.dims, ids.values.tolist()) == (("chain",), [7, 7, 7, 2, 2, 2])
        assert np.issubdtype(ids.dtype, np.integer)
        # Thinning chains keeps them, and no diagnostic takes them for a variable.
        assert tree[group].to_dataset().isel(chain=[0, 5]).coords["superchain_ids"].values.tolist() == [7, 2]
        assert "superchain_ids" not in tree[group].data_vars
    assert np.isfinite(summary(tree).rhat)


def test_nested_rhat_from_a_file(tmp_path):
    """Superchains at different places, each of chains that agree: from the file as from the memory, and above one."""
    ids = np.repeat([0, 1, 2, 3], 4)
    tree = to_datatree(trace(iid(16, 50, 1) + ids[:, None, None]), superchain_ids=ids)
    again = stored(tree, tmp_path / "run.nc")

    def nested(tree):
        group = tree["negative_phase"]
        values = arviz_stats.rhat_nested(  # pyright: ignore[reportPrivateImportUsage]
            group["x"].values[..., 0], superchain_ids=group.coords["superchain_ids"].values, chain_axis=0, draw_axis=1
        )
        return float(values)

    assert nested(again) == nested(tree) > 1.2


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1, 2], ValueError, r"superchain_ids: got shape \(3,\), expected \(6,\)"),
        (np.zeros((6, 1), int), ValueError, r"superchain_ids: got shape \(6, 1\)"),
        (np.zeros(6), TypeError, "superchain_ids: got dtype float64, expected one whole number per chain"),
        ([True] * 6, TypeError, "superchain_ids: got dtype bool"),
    ],
)
def test_bad_superchains_are_refused(sampled, ids, error, message):
    with pytest.raises(error, match=message):
        to_datatree(sampled[1], superchain_ids=ids)


# --- events of several arrays --------------------------------------------------------------------------------------


def test_events_of_several_arrays_have_a_variable_each():
    position = {"a": iid(4, 10), "b": [iid(4, 10, 3, 2, seed=1)]}
    position["a"][2, 3] = np.nan
    tree = to_datatree(trace(position), site="z")
    assert set(tree["negative_phase"].data_vars) == {"z.a", "z.b.0"}
    assert tree["negative_phase"]["z.b.0"].shape == (4, 10, 3, 2)
    np.testing.assert_array_equal(tree["negative_phase"]["z.a"], position["a"])
    assert np.argwhere(~tree["negative_phase_stats"]["is_finite"].values).tolist() == [[2, 3]]


def test_every_array_of_an_event_is_judged():
    position = {"a": iid(4, 1000), "b": iid(4, 1000, 2, seed=1)}
    assert summary(to_datatree(trace(position))).mixing == "yes"
    position["b"][:, :, 1] = position["b"][:, :1, 1]
    found = summary(to_datatree(trace(position)))
    assert (found.mixing, found.rhat, found.ess_bulk) == ("no", np.inf, 0.0)


# --- smc -----------------------------------------------------------------------------------------------------------


def test_particles_and_what_happened_to_each_run(sampled, runs):
    group = to_datatree(sampled[1], site="image", smc=runs)["smc"]
    assert group["image"].dims == ("replicate", "particle", "image_dim_0")
    assert group["image"].shape == (8, 64, 2)
    np.testing.assert_array_equal(group["image"], runs.position)
    np.testing.assert_array_equal(group["log_weight"], runs.log_weight)
    per_run = {name: group[name] for name in group.data_vars if name not in ("image", "log_weight")}
    assert {"log_z", "log_z_se", "ess", "acceptance_rate", "num_temperatures", "n_grad"} <= set(per_run)
    assert all(variable.dims == ("replicate",) for variable in per_run.values())
    np.testing.assert_array_equal(group["log_z"], runs.log_normalizer)
    np.testing.assert_array_equal(group["n_grad"], np.asarray(runs.info.num_gradients).sum(axis=1))
    np.testing.assert_allclose(group["acceptance_rate"], np.asarray(runs.info.acceptance_rate).mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(group["ess"], 64 * np.asarray(runs.ess_minimum), rtol=1e-6)
    assert bool((group["ess"] <= 64).all())
    assert group.attrs["site"] == "image"
    # And it says what it should: log Z is log 2 pi, and the particles sit at (1, 1).
    score = (float(group["log_z"].mean()) - np.log(2 * np.pi)) / (float(group["log_z"].std(ddof=1)) / np.sqrt(8))
    assert abs(score) < 5
    assert abs(float(group["image"].mean()) - 1.0) < 0.2


def test_the_flags_of_a_run_are_its_own(sampled, runs):
    """Properties of a result count its particles; on stacked results they would count the replicates."""
    group = to_datatree(sampled[1], smc=runs)["smc"]
    for replicate in range(8):
        one = jax.tree.map(lambda x, index=replicate: x[index], runs)
        assert bool(group["is_collapsed"][replicate]) == bool(one.is_collapsed)
        assert bool(group["is_uncovered"][replicate]) == bool(one.is_uncovered)
    assert group["is_collapsed"].dtype == bool
    # Outside fraction .1 is too much for 64 particles and not for 8, which is what the stack would be taken for.
    wide = runs._replace(outside_fraction=jnp.full(8, 0.1))
    assert bool(to_datatree(sampled[1], smc=wide)["smc"]["is_uncovered"].all())
    assert not bool(wide.is_uncovered.any())


def test_particles_may_be_pytrees(sampled, runs):
    group = to_datatree(sampled[1], smc=runs._replace(position={"a": runs.position, "b": runs.log_weight}))["smc"]
    assert {"x.a", "x.b"} <= set(group.data_vars)


def test_bad_runs_are_refused(sampled, runs):
    with pytest.raises(TypeError, match=r"smc: got dict, expected a kernels\.smc\.SMCResult"):
        to_datatree(sampled[1], smc={"x": 1})
    with pytest.raises(ValueError, match=r"smc: got log weights of shape \(64,\).*expected \(replicate, particle\)"):
        to_datatree(sampled[1], smc=jax.tree.map(lambda x: x[0], runs))


# --- log_z ---------------------------------------------------------------------------------------------------------


def test_estimates_of_log_z_side_by_side(sampled, estimates):
    group = to_datatree(sampled[1], site="image", log_z=estimates)["log_z"]
    assert set(group.data_vars) == set(LogNormalizer._fields)
    assert group["estimator"].values.tolist() == ["forward", "reverse"]
    assert group["value"].sel(estimator="reverse").item() == 1.75
    assert group["reliable"].values.tolist() == [True, False]
    assert group["num_gradients"].values.tolist() == [1234, 1234]
    assert np.isnan(group["pareto_khat"].sel(estimator="forward"))
    assert group.attrs["site"] == "image"


def test_estimates_with_one_normaliser_per_row(sampled, estimates):
    batched = jax.tree.map(lambda x: jnp.broadcast_to(x, (3, 2)), estimates)
    group = to_datatree(sampled[1], log_z=batched)["log_z"]
    assert group["value"].dims == ("estimator", "row_dim_0", "row_dim_1")
    assert group["value"].shape == (2, 3, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda _: {}, ValueError, r"log_z: got entries of shapes \[\], expected at least one"),
        (lambda e: {"forward": 1.0}, TypeError, "log_z: got {'forward': 'float'}, expected names and LogNormalizers"),
        (lambda e: e["forward"], TypeError, "log_z: got .*LogNormalizer.*, expected names"),
        (
            lambda e: {**e, "rows": jax.tree.map(lambda x: jnp.broadcast_to(x, (2,)), e["forward"])},
            ValueError,
            r"log_z: got entries of shapes \[\(\), \(2,\)\], expected .* all of one shape",
        ),
    ],
)
def test_bad_estimates_are_refused(sampled, estimates, change, error, message):
    with pytest.raises(error, match=message):
        to_datatree(sampled[1], log_z=change(estimates))


# --- attributes ----------------------------------------------------------------------------------------------------


def test_attributes_say_how_the_draws_were_made(sampled):
    sampler, draws = sampled
    potential = Partial(lambda p, x: p * jnp.sum(x**2), jnp.array(0.5))
    tree = to_datatree(draws, sampler=sampler, potential=potential, num_steps=2, start="rows of the data")
    for group in ("negative_phase", "negative_phase_stats"):
        attrs = tree[group].attrs
        assert (attrs["kernel"], attrs["num_steps"], attrs["start"]) == ("mala", 2, "rows of the data")
        assert attrs["step_size"] == pytest.approx(0.5)
        assert len(attrs["parameters_sha256"]) == 64
    assert tree.attrs["inference_library_version"] == ebm.__version__
    # What is not known is absent, not empty.
    assert not {"kernel", "num_steps", "start", "parameters_sha256"} & set(to_datatree(draws)["negative_phase"].attrs)


def test_the_fingerprint_is_that_of_the_parameters(sampled):
    def fingerprint(value):
        potential = Partial(lambda p, x: p["a"] * jnp.sum(x**2), value)
        return to_datatree(sampled[1], potential=potential)["negative_phase"].attrs["parameters_sha256"]

    one = fingerprint({"a": jnp.ones(3), "b": jnp.zeros(2)})
    assert one == fingerprint({"a": jnp.ones(3), "b": jnp.zeros(2)})
    others = (
        {"a": jnp.ones(3).at[1].set(1.0000001), "b": jnp.zeros(2)},  # one unit in the last place
        {"a": jnp.ones((3, 1)), "b": jnp.zeros(2)},
        {"a": jnp.ones(3, jnp.int32), "b": jnp.zeros(2)},
        {"a": jnp.zeros(2), "b": jnp.ones(3)},
        {"a": jnp.ones(3), "c": jnp.zeros(2)},
    )
    assert one not in [fingerprint(other) for other in others]


@pytest.mark.parametrize(("num_steps", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_steps_between_draws_must_be_a_positive_number(sampled, num_steps, error):
    with pytest.raises(error, match="num_steps: got"):
        to_datatree(sampled[1], num_steps=num_steps)


def test_the_root_names_how_log_z_was_treated(sampled, mcmc):
    tree = to_datatree(sampled[1], posterior=mcmc, attrs={"seed": 3})
    assert json.loads(tree.attrs["normalizer_kind"]) == {"x": "exact"}
    assert (tree.attrs["inference_library"], tree.attrs["seed"]) == ("ebm_ppl", 3)
    assert "normalizer_kind" not in to_datatree(sampled[1]).attrs


def test_the_energy_is_never_where_arviz_reads_a_hamiltonian(sampled, mcmc):
    tree = to_datatree(sampled[1], posterior=mcmc)
    assert "potential" in tree["negative_phase_stats"].data_vars
    for group in tree.children.values():
        assert "energy" not in group.data_vars


# --- the file ------------------------------------------------------------------------------------------------------


def test_every_group_comes_back_from_a_file_bit_for_bit(tmp_path, sampled, runs, estimates, mcmc):
    sampler, draws = sampled
    draws = draws._replace(is_divergent=draws.is_divergent.at[1, 3].set(True))
    history = {"loss": np.arange(5.0), "is_bad": np.arange(5) > 3, "evaluation_step": np.array([2, 4])}
    tree = to_datatree(
        draws,
        site="image",
        sampler=sampler,
        history=history,
        posterior=mcmc,
        log_likelihood=True,
        superchain_ids=np.repeat([0, 1], 3),
        smc=runs,
        log_z=estimates,
        potential=Partial(lambda p, x: p * x, jnp.ones(2)),
        num_steps=2,
        start="data",
        attrs={"seed": 3, "note": "å"},
    )
    expected = {"negative_phase", "negative_phase_stats", "training", "smc", "log_z"}
    expected |= {"posterior", "sample_stats", "observed_data", "log_likelihood"}
    assert set(tree.children) == expected
    again = stored(tree, tmp_path / "run.nc")
    assert_bit_identical(tree, again)
    assert again["negative_phase_stats"]["diverging"].dtype == bool
    assert int(again["negative_phase_stats"]["diverging"].sum()) == 1
    assert summary(again) == summary(tree)
    # A second generation is the same again.
    assert_bit_identical(tree, stored(again, tmp_path / "again.nc"))


def test_the_check_of_a_file_sees_one_bit():
    """The fault that the test above must catch, seeded."""
    tree = to_datatree(trace(iid(4, 10, 2)))
    other = tree.copy(deep=True)
    other["negative_phase"]["x"].values[0, 0, 0] = np.nextafter(other["negative_phase"]["x"].values[0, 0, 0], 9.0)
    with pytest.raises(AssertionError):
        assert_bit_identical(tree, other)


def test_rhat_of_a_file_is_that_of_the_memory(tmp_path):
    position = iid(4, 100, 3)
    position[2, :, 1] = 0.0
    tree = to_datatree(trace(position))
    again = stored(tree, tmp_path / "run.nc")
    np.testing.assert_array_equal(rhat(again["negative_phase"]["x"].values), rhat(position))
    assert rhat(position)[1] == np.inf


# --- how log Z was treated -----------------------------------------------------------------------------------------


def test_the_treatment_of_log_z_is_read_from_the_policy():
    def model(data):
        tilt = numpyro.sample("tilt", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(data)):
            numpyro.sample("x", ebm.EBM(lambda x: -tilt * x, dist.Normal(0.0, 1.0)), obs=data)

    def fixed(data):
        with numpyro.plate("rows", len(data)):
            numpyro.sample("y", ebm.EBM(lambda x: x**4, dist.Normal(0.0, 1.0)), obs=data)

    arguments = (jnp.zeros(3),)
    assert normalizer_kinds(model, arguments) == {}  # nothing has treated it
    assert normalizer_kinds(ebm.handlers.exact_normalizer(model), arguments) == {"x": "exact"}
    assert normalizer_kinds(ebm.handlers.constant_normalizer(fixed), arguments) == {"y": "constant"}
    assert normalizer_kinds(lambda data: numpyro.sample("z", dist.Normal(0.0, 1.0)), arguments) == {}


def test_inference_without_log_z_has_no_treatment_to_name():
    """The exchange algorithm cancels log Z; its run is converted all the same."""

    def model(data):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        with numpyro.plate("rows", len(data)):
            numpyro.sample("x", ebm.EBM(lambda x: rate * x**2, dist.Normal(0.0, 1.0)), obs=data)

    kernel = ebm.infer.Exchange(model)
    arguments = (jnp.zeros(3),)
    assert normalizer_kinds(kernel.model, arguments) in ({}, {"x": "constant"})
