"""A run on several devices is that on one: same results, and every device holds and computes its part only."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import ebm_ppl as ebm
import ebm_ppl.sharding  # now: what is imported after the plugin of type checks has other messages
from ebm_ppl.meshes import everywhere, mesh_of, num_parts, on_host, over_chains
from tests.benchmarks import scaling
from tests.distributed import launch, scenarios

NUM_DEVICES = 4


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Without a mesh and on four devices, in one process of four."""
    folder = tmp_path_factory.mktemp("devices")
    names = ("advance", "train")
    return launch.run_on_devices(folder, "0,4", *names, seconds=600), json.loads((folder / "facts.json").read_text())


def of(results, name):
    return {path: array for path, array in results.items() if path.startswith(f"{name}[")}


def test_chains_are_the_same_to_the_last_bit(found):
    one, four = (of(found[0][number], "advance") for number in ("0", "4"))
    assert np.array_equal(one["advance['position']"], four["advance['position']"])
    assert np.array_equal(one["advance['draws']"], four["advance['draws']"])
    assert max(scenarios.differences(one, four).values()) < 1e-6


def test_training_agrees_to_rounding(found):
    one, four = (of(found[0][number], "train") for number in ("0", "4"))
    assert max(scenarios.differences(one, four).values()) < 1e-5


def test_every_device_holds_its_part(found):
    moved, trained = found[1]["advance"], found[1]["train"]
    assert moved["['position']"] == [scenarios.NUM_CHAINS // NUM_DEVICES, 2]
    assert moved["['draws']"] == [scenarios.NUM_CHAINS // NUM_DEVICES, 10, 2]
    assert trained["['state'].sampler.position"] == [scenarios.NUM_CHAINS // NUM_DEVICES, 2]
    assert trained["['state'].potential.potential.layers[0].weight"] == [16, 2]


def test_chains_do_not_communicate_and_training_sums_gradients_only(found):
    programs = found[1]["programs"]
    assert launch.collectives(programs["advance"]) == []
    kinds = launch.collectives(programs["update"])
    # Nothing is larger than a batch of 64 rows of two numbers, or than the parameters.
    assert max(size for _, size in kinds) <= 64 * 2
    assert any(kind == "all-reduce" for kind, _ in kinds)
    assert len(kinds) <= scaling.COLLECTIVES
    # The indices of the rows of a batch, one by one whole number each; never chains.
    assert all(size <= 64 for kind, size in kinds if kind != "all-reduce")


def test_collectives_are_found_in_a_program():
    text = (
        "  %x = (f32[8,2]{1,0}, f32[]) all-reduce(%a, %b), dims\n %y = f32[64]{0} all-gather-start(%x)\n %z = add(1)\n"
    )
    assert launch.collectives(text) == [("all-reduce", 16), ("all-gather", 64)]


@pytest.mark.slow
def test_on_one_and_two_devices_too_and_smc_in_all_its_forms(tmp_path):
    results = launch.run_on_devices(tmp_path, "0,1,2,4", "advance", "train", "temper", "temper_many", seconds=3000)
    assert np.isfinite(results["0"]["temper['estimate'].value"])
    for number in ("1", "2", "4"):
        assert np.array_equal(results["0"]["advance['draws']"], results[number]["advance['draws']"])
        assert np.array_equal(results["0"]["temper_many['position']"], results[number]["temper_many['position']"])
        difference = scenarios.differences(results["0"], results[number])
        # A small difference of two numbers of size one.
        gap = difference.pop("temper_many['particles'].reversal_gap")
        assert gap < 1e-3
        assert max(difference.values()) < 1e-5


@pytest.mark.slow
def test_other_kernels_are_the_same_to_the_last_bit(tmp_path):
    results = launch.run_on_devices(tmp_path, "0,2,4", "kernels", seconds=3000)
    assert len(results["0"]) == 5
    for number in ("2", "4"):
        difference = scenarios.differences(results["0"], results[number])
        assert max(difference.values()) == 0.0


@pytest.mark.slow
def test_a_diagnosis_is_the_same(tmp_path):
    results = launch.run_on_devices(tmp_path, "0,4", "diagnose", seconds=3000)
    difference = scenarios.differences(results["0"], results["4"])
    assert all(difference[name] == 0.0 for name in difference if "values" not in name)
    assert max(difference.values()) < 1e-3


@pytest.mark.slow
def test_parameters_are_split_with_their_moments(tmp_path):
    results = launch.run_on_devices(tmp_path, "0", "train", "parameters", seconds=3000)
    held = json.loads((tmp_path / "facts.json").read_text())["parameters"]
    for when in ("before", "after"):
        for part in ("potential.potential", "optimizer_state[0].mu.potential", "average.parameters.potential"):
            assert held[f"['{when}'].{part}.layers[0].weight"] == [8, 2]
    split = {f"train{path}": array for path, array in results["parameters"].items()}
    whole = {path: array for path, array in results["0"].items() if path in split}
    assert max(scenarios.differences(whole, split).values()) < 1e-5


# --- on the one device of this process -------------------------------------------------------------------------------


@pytest.fixture
def mesh():
    return jax.make_mesh((1,), ("chain",), devices=jax.devices()[:1])


def test_the_mesh_is_known_inside_programs(mesh):
    x = ebm.sharding.replicate(jnp.zeros(3), mesh)
    assert mesh_of(x) is not None
    assert mesh_of(jnp.zeros(3)) is None
    seen = []
    # An outer product, a loop over it and a map: what is made of an array on a mesh is on that mesh.
    step = lambda total, row: (seen.append(mesh_of(row)) or total + row.sum(), None)
    jax.jit(lambda x: jax.lax.scan(step, 0.0, jnp.outer(x, jnp.arange(3.0))))(x)
    jax.jit(jax.vmap(lambda x: seen.append(mesh_of(x))))(x)
    jax.jit(lambda key: seen.append(mesh_of(jax.random.normal(key, (4,)))))(
        ebm.sharding.replicate(jax.random.key(0), mesh)
    )
    assert seen
    assert all(found is not None and found.axis_names == ("chain",) for found in seen)


def test_placement_without_a_mesh_is_none():
    x = jnp.arange(3.0)
    assert over_chains(x) is x
    assert everywhere(x) is x
    assert num_parts(x) == 1


def test_gather_keeps_keys_and_what_is_no_array():
    found = ebm.sharding.gather({"key": jax.random.key(3), "x": jnp.ones(2), "name": "a"})
    assert isinstance(found["x"], np.ndarray)
    assert found["name"] == "a"
    assert jnp.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(jax.random.key(3)))
    assert on_host(2.0) == 2.0


def test_explicit_axes_are_taken_as_automatic(mesh):
    placed = ebm.sharding.shard(jnp.zeros((4, 2)), mesh)
    assert placed.sharding.mesh.axis_types == (jax.sharding.AxisType.Auto,)
    again = ebm.sharding.shard(placed, mesh)
    assert again.sharding == placed.sharding


def test_what_cannot_be_split_is_refused(mesh):
    sampler = scenarios.sampler()
    with pytest.raises(TypeError, match=r"mesh: got int, expected one such as jax.make_mesh"):
        ebm.sharding.shard(sampler, 4)
    with pytest.raises(ValueError, match=r"mesh: got axes \('x',\), expected one named \"chain\""):
        ebm.sharding.shard(sampler, jax.make_mesh((1,), ("x",), devices=jax.devices()[:1]))
    for wrong in (jax.random.key(0), scenarios.network(), [], {"x": jnp.zeros(())}, "rows"):
        with pytest.raises(TypeError, match=r"tree: got .*ebm_ppl.sharding.replicate"):
            ebm.sharding.shard(wrong, mesh)
    with pytest.raises(TypeError, match="parameters: got a rule with SamplerState"):
        ebm.sharding.shard(sampler, mesh, parameters=lambda path, leaf: None)
    with pytest.raises(TypeError, match=r"parameters: the rule gave str for \.potential\.layers\[0\]\.weight"):
        ebm.sharding.shard(scenarios.state(), mesh, parameters=lambda path, leaf: "chain")
    with pytest.raises(ValueError, match=r"parameters: .* does not fit \.potential.*weight"):
        ebm.sharding.shard(scenarios.state(), mesh, parameters=lambda path, leaf: PartitionSpec(None, None, "chain"))
    with pytest.raises(ValueError, match="got a rbg key"):
        ebm.sharding.replicate(jax.random.key(0, impl="rbg"), mesh)


def test_random_numbers_that_depend_on_devices_are_refused(mesh):
    with (
        jax.threefry_partitionable(False),
        pytest.raises(ValueError, match="mesh: jax_threefry_partitionable is off"),
    ):
        ebm.sharding.replicate(jax.random.key(0), mesh)


def test_numbers_that_the_devices_do_not_divide_are_refused():
    """By sizes alone: of the mesh only its shape is looked at before anything is placed."""
    devices = np.array(jax.devices()[:1] * 3)
    mesh = jax.sharding.Mesh(devices, ("chain",))
    with pytest.raises(ValueError, match="got 64 chains for 3 devices, expected a multiple of 3: 63 or 66 of them"):
        ebm.sharding.shard(scenarios.sampler(), mesh)
    with pytest.raises(ValueError, match="got 2 rows for 3 devices, expected a multiple of 3: 3 of them"):
        ebm.sharding.shard(jnp.zeros((2, 1)), mesh)


def test_a_batch_that_the_devices_do_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr("ebm_ppl.training.inputs.num_parts", lambda *trees: 3)
    with pytest.raises(ValueError, match="batch_size: got 64 rows for 3 devices, expected a multiple of 3"):
        scenarios.fit(scenarios.state(), scenarios.rows())


def test_a_failure_on_a_mesh_names_its_rows(mesh):
    """What failed is looked for again outside of compiled programs, where the placement is another kind of type."""

    def objective(potential, sampler, batch, key):
        return jnp.where(batch[:, 0] > 2.5, jnp.nan, potential(batch[0])).sum(), (sampler, {})

    potential = jax.tree_util.Partial(lambda scale, x: jnp.where(x[0] < 2.5, scale * x[0], jnp.inf), jnp.ones(()))
    state = ebm.sharding.shard(ebm.init_train(potential, scenarios.OPTIMIZER), mesh)
    data = ebm.sharding.shard(jnp.arange(8.0)[:, None] / 2, mesh)
    with pytest.raises(ebm.TrainingFailure) as failure:
        ebm.fit(jax.random.key(0), state, data, objective, scenarios.OPTIMIZER, num_steps=2, batch_size=4)
    assert set(failure.value.rows.tolist()) <= {5, 6, 7}
    assert failure.value.rows.size


# --- the planning model ----------------------------------------------------------------------------------------------


def test_the_tables_are_what_the_benchmark_makes_of_its_numbers():
    folder = launch.ROOT / "docs" / "tables"
    done = json.loads((folder / "scaling.json").read_text())
    assert (folder / "scaling.inc").read_text() == scaling.scaling_table(done)
    assert (folder / "scaling_constants.inc").read_text() == scaling.constants_table(done)
    assert (folder / "scaling_predictions.inc").read_text() == scaling.predictions_table()


def test_the_planning_model():
    machine = scaling.Machine(flops=1e12, latency=1e-6, bandwidth=1e9)
    job = scaling.Job(parameters=1e6, chains=1000, dimension=100, steps=9)
    assert scaling.communicate(job, 1, machine) == 0.0
    # 52 operations per parameter and chain: ten gradients of chains, and two in the parameters.
    assert np.isclose(scaling.compute(job, 4, machine), 250 * 52e6 / 1e12)
    # Three quarters of four megabytes and of 400 kilobytes, and of ten single numbers, there and back; twelve latencies
    # of two steps each way.
    assert np.isclose(scaling.communicate(job, 4, machine), 1.5 * (4e-3 + 4e-4 + 4e-8) + 12 * 4e-6)
    assert np.isclose(scaling.communicate(job._replace(gathers=False), 4, machine), 1.5 * (4e-3 + 4e-8) + 12 * 4e-6)
