"""What training reports about its chains at no cost: their age, the drift of their energy, and how fast they forget."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.diagnostics import autocorrelation_time
from ebm_ppl.objectives import contrastive_divergence, persistent_contrastive_divergence
from ebm_ppl.replay import gather_chains, restart, scatter_chains
from ebm_ppl.testing import t_test_chain_means
from tests.test_swap import EVERY, KERNELS, tilted

MALA = kernels.mala(step_size=0.3)


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


# --- energies that kernels hold anyway -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_energies_of_a_phase_are_those_of_its_ends(key, name):
    """A kernel that caches something else under the name of a log density would make the drift a fiction."""
    energy = tilted(2.0)
    start = ebm.init_sampler(jax.random.normal(key, (8, 2)), KERNELS[name]())
    after, info = ebm.advance(key, energy, start, 3)
    if info.potential_before is None or info.potential_after is None:
        assert info.potential_before is info.potential_after
        return
    np.testing.assert_allclose(info.potential_before, jax.vmap(energy)(start.position), rtol=1e-5)
    np.testing.assert_allclose(info.potential_after, jax.vmap(energy)(after.position), rtol=1e-5)


@pytest.mark.parametrize("name", ["mala", "hmc", "nuts", "unadjusted_langevin", "isir", "barker"])
def test_the_usual_kernels_hold_them(key, name):
    start = ebm.init_sampler(jnp.zeros((4, 2)), KERNELS[name]())
    assert jax.eval_shape(lambda: ebm.advance(key, quadratic, start, 1)[1].potential_after).shape == (4,)


def at_stationarity(key, *, num_chains=40_000, num_steps=4, step_size=0.2):
    """One phase of ULA on a standard normal from its stationary law: energies are squares of an autoregression."""
    decay = 1.0 - step_size
    key, start_key = jax.random.split(key)
    start = jax.random.normal(start_key, (num_chains,)) / np.sqrt(1.0 - step_size / 2.0)
    sampler = ebm.init_sampler(start, kernels.unadjusted_langevin(step_size=step_size))
    _, (_, metrics) = persistent_contrastive_divergence(
        lambda x: 0.5 * x**2, sampler, jnp.zeros(2), key, num_steps=num_steps
    )
    return metrics, decay, num_steps


def test_autocorrelation_is_that_of_the_chain(key):
    metrics, decay, num_steps = at_stationarity(key)
    expected = decay ** (2 * num_steps)  # the correlation of squares of a Gaussian pair is the square of theirs
    # Delta method for a correlation of two chi-square variables with one degree of freedom: below 3 / sqrt(n).
    assert abs(metrics["energy_autocorrelation"] - expected) < 5 * 3.0 / np.sqrt(40_000)
    assert 0.1 < expected < 0.5  # far from both of what forgetting all and nothing would give
    time = autocorrelation_time({"energy_autocorrelation": np.full(7, expected)}, num_steps)
    np.testing.assert_allclose(time, (1 + decay**2) / (1 - decay**2), rtol=1e-6)


def test_drift_is_zero_at_stationarity_and_not_on_the_way(key):
    phases = jax.jit(jax.vmap(lambda key: at_stationarity(key, num_chains=1000)[0]["energy_drift"]))(
        jax.random.split(key, 64)
    )
    t_test_chain_means(np.array(phases), 0.0, name="drift at stationarity").raise_if_failed()
    metrics, *_ = at_stationarity(key)
    assert abs(metrics["energy_drift"]) < 6 * metrics["energy_drift_error"]
    far = ebm.init_sampler(jnp.full((64, 2), 4.0), MALA)
    _, (_, metrics) = persistent_contrastive_divergence(quadratic, far, jnp.zeros((2, 2)), key, num_steps=5)
    assert metrics["energy_drift"] < -20 * metrics["energy_drift_error"]


def test_all_states_report_the_same_phase(key):
    sampler = ebm.init_sampler(jax.random.normal(key, (32, 2)), MALA)
    found = []
    for all_states in (False, True):
        _, (after, metrics) = persistent_contrastive_divergence(
            quadratic, sampler, jnp.zeros((2, 2)), key, num_steps=6, all_states=all_states
        )
        change = jax.vmap(quadratic)(after.position) - jax.vmap(quadratic)(sampler.position)
        np.testing.assert_allclose(metrics["energy_drift"], change.mean(), rtol=1e-4)
        found.append(set(metrics))
    assert found[0] == found[1]


# --- time that chains need to forget ---------------------------------------------------------------------------------


def test_time_averages_over_a_window_and_knows_its_ends():
    ends = autocorrelation_time({"energy_autocorrelation": np.array([-0.1, 1.0])}, 5, window=1)
    assert ends.tolist() == [1.0, np.inf]
    noisy = 0.5 + 0.3 * np.where(np.arange(200) % 2, 1.0, -1.0)
    smooth = autocorrelation_time({"energy_autocorrelation": noisy}, 5, window=100)
    np.testing.assert_allclose(
        smooth[60:140], 80 * [autocorrelation_time({"energy_autocorrelation": np.array([0.5])}, 5)[0]]
    )


def test_time_needs_a_run_with_chains():
    with pytest.raises(ValueError, match="history: has no 'energy_autocorrelation'"):
        autocorrelation_time({"loss": np.zeros(3)}, 5)
    with pytest.raises(ValueError, match="num_steps"):
        autocorrelation_time({"energy_autocorrelation": np.zeros(3)}, 0)


# --- age -------------------------------------------------------------------------------------------------------------


def ages(sampler):
    assert sampler.age is not None
    return np.asarray(sampler.age)


def test_age_counts_kernel_steps(key):
    sampler = ebm.init_sampler(jnp.zeros((6, 2)), MALA)
    assert ages(sampler).tolist() == [0] * 6
    sampler, _ = ebm.advance(key, quadratic, sampler, 4)
    sampler, _ = ebm.draw(key, quadratic, sampler, 3, num_steps=2)
    assert ages(sampler).tolist() == [10] * 6
    index, some = gather_chains(key, sampler, 2)
    some, _ = ebm.advance(key, quadratic, some, 5)
    sampler = scatter_chains(sampler, index, some)
    assert sorted(ages(sampler).tolist()) == [10] * 4 + [15] * 2
    young = restart(key, sampler, jnp.ones((6, 2)), 0.5)
    restarted = (young.position == 1.0).all(axis=1)
    assert 0 < restarted.sum() < 6
    np.testing.assert_array_equal(ages(young), jnp.where(restarted, 0, ages(sampler)))


def test_age_of_negatives_in_training(key):
    sampler = ebm.init_sampler(jnp.zeros((8, 2)), MALA)
    rows = jnp.ones((8, 2))
    for _ in range(3):
        _, (sampler, metrics) = persistent_contrastive_divergence(quadratic, sampler, rows, key, num_steps=5)
    assert metrics["chain_age"] == 15.0
    _, (_, metrics) = contrastive_divergence(quadratic, sampler, rows, key, num_steps=5)
    assert metrics["chain_age"] == 5.0
    persistent = functools.partial(persistent_contrastive_divergence, num_steps=5, restart_probability=1.0)
    _, (_, metrics) = persistent(quadratic, sampler, rows, key, restart_from=lambda key, n: jnp.zeros((n, 2)))
    assert metrics["chain_age"] == 5.0


# --- in a run --------------------------------------------------------------------------------------------------------


def run(objective, key, sampler, num_steps=20, scale=1.0):
    potential = ebm.potentials.tilt(jax.tree_util.Partial(lambda a, x: a * jnp.sum(x**2), jnp.asarray(scale)), BASE)
    optimizer = optax.sgd(1e-3)
    state = ebm.init_train(potential, optimizer, sampler)
    return ebm.fit(key, state, BASE.sample(key, (64,)), objective, optimizer, num_steps=num_steps, report_every=10)


BASE = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def test_history_has_them_all(key):
    objective = functools.partial(persistent_contrastive_divergence, num_steps=3)
    state, history = run(objective, key, ebm.init_sampler(BASE.sample(key, (64,)), MALA))
    np.testing.assert_array_equal(history["chain_age"], 3 * np.arange(1, 21))
    assert ages(state.sampler).tolist() == [60] * 64
    assert np.isfinite(history["energy_drift"]).all()
    assert (np.abs(history["energy_autocorrelation"]) <= 1 + 1e-5).all()
    assert {"acceptance_rate", "energy_gap", "frozen_fraction", "num_nonfinite", "num_divergent"} <= set(history)


def test_collapsed_weights_are_said_once(key):
    """One proposal far from the energy carries all the weight of the gradient."""
    objective = functools.partial(
        ebm.objectives.importance_sampled_likelihood,
        proposal=dist.Normal(0.0, 30.0).expand([2]).to_event(1),
        num_samples=64,
    )
    with pytest.warns(RuntimeWarning, match="fewer than a tenth of the negatives") as caught:
        run(objective, key, None, scale=100.0)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(functools.partial(objective, proposal=BASE), key, None)
