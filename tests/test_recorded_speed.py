"""The recorded figures of speed and growth say what the documentation says they do. None of these looks at a time."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.benchmarks import growth, log_normalizer_speed, statistical_speed

TABLES = Path(__file__).resolve().parents[1] / "docs" / "tables"


def recorded(name):
    return json.loads((TABLES / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("benchmark", "find"),
    [
        (statistical_speed, lambda done: done),
        (log_normalizer_speed, lambda done: done["comparison"]),
        (growth, lambda done: done),
    ],
)
def test_tables_are_what_the_benchmarks_make_of_their_numbers(benchmark, find):
    name = benchmark.__name__.rpartition(".")[2]
    assert (TABLES / f"{name}.inc").read_text() == benchmark.table(find(recorded(name)))


# --- weights of two modes


def test_the_exact_weight_is_that_of_draws(key):
    draws = np.asarray(statistical_speed.TARGET.sample(key, 200_000))
    share = (np.sum(draws - statistical_speed.CUT, axis=1) < 0).mean()
    assert abs(share - statistical_speed.LIGHT) < 6 * np.sqrt(0.21 / 200_000)  # failing by chance: 2e-9


def test_an_error_is_that_of_the_second_half_and_pieces_count_by_their_size():
    light = statistical_speed.LIGHT
    weights = np.array([0.9, 0.9, light, light + 0.1])
    errors = statistical_speed.errors_of(weights, np.zeros(4))
    np.testing.assert_allclose(errors, [0.9 - light, 0.9 - light, 0.45 - 0.5 * light, 0.05])
    sized = statistical_speed.errors_of(weights, np.log([1.0, 1.0, 3.0, 1.0]))
    np.testing.assert_allclose(sized[-1], 0.025)


@pytest.mark.parametrize(
    ("errors", "first"), [([0.1, 0.01], 1), ([0.01, 0.1], None), ([0.01, 0.01], 0), ([0.01, np.nan, 0.0], 2)]
)
def test_the_goal_is_reached_where_the_error_stays_within_it(errors, first):
    assert statistical_speed.first_kept(np.array(errors)) == first


@pytest.mark.parametrize("name", ["replica exchange", "SMC", "flow-assisted", "diffusion"])
def test_global_methods_find_the_weights_with_every_seed(name):
    done = recorded("statistical_speed")
    local = [done[f"MALA/{seed}"]["evaluations"] for seed in range(statistical_speed.SEEDS)]
    local = [np.inf if count is None else count for count in local]
    runs = [done[f"{name}/{seed}"] for seed in range(statistical_speed.SEEDS)]
    assert all(one["reached"] for one in runs)
    assert np.median([one["evaluations"] for one in runs]) < 0.5 * np.median(local)


# --- log Z of the many-well energy


@pytest.mark.parametrize("name", list(log_normalizer_speed.METHODS))
def test_log_z_is_within_a_tenth_of_a_nat(name):
    one = recorded("log_normalizer_speed")["comparison"]["methods"][name]
    errors = np.array(one["errors"])
    assert len(errors) >= 20
    assert np.sqrt(np.mean(errors**2)) <= log_normalizer_speed.GOAL
    assert abs(errors.mean()) < 5.0 * errors.std(ddof=1) / np.sqrt(len(errors))


# --- growth


def test_an_exponent_is_that_of_the_larger_half():
    sizes = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert growth.exponent(sizes, np.array([9.0, 9.0, 16.0, 64.0, 256.0])) == pytest.approx(2.0)


def test_memory_grows_with_chains_and_not_with_their_steps():
    done = recorded("growth")
    assert growth.is_memory_independent_of_k(done)
    assert 0.8 < growth.exponent(*growth.values(done, "chains", "temporary_bytes")) < 1.2
    assert abs(growth.exponent(*growth.values(done, "rows", "temporary_bytes"))) < 0.01
    dearer = {
        name: {**one, "temporary_bytes": 1000 * int(name.split("/")[1])} for name, one in done.items() if "k/" in name
    }
    assert not growth.is_memory_independent_of_k(dearer)


def test_a_long_training_holds_its_arrays_and_its_memory():
    long = recorded("growth")["steady/0"]
    assert long["live_arrays"][0] == long["live_arrays"][1]
    assert long["resident_bytes"][1] < 1.02 * long["resident_bytes"][0]


def test_peaks_are_those_of_this_process():
    before = growth.settle()
    array = jax.block_until_ready(jax.numpy.ones(50_000_000))
    peak, held = growth.resident("VmHWM"), growth.resident()
    assert peak >= held > before + 0.9 * array.nbytes
