"""Faults of energies, chains and step sizes: each is raised, or shows in the report of the chains it befell."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax.tree_util import Partial

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials
from ebm_ppl.diagnostics import find_escape

NORMAL = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


def scaled(scale, x):
    return scale * quadratic(x)


def chains(kernel, num_chains=64):
    return ebm.init_sampler(jax.random.normal(jax.random.key(0), (num_chains, 2)), kernel)


MOVES = {
    "mala": kernels.mala(step_size=0.3),
    "barker": kernels.barker(step_size=0.5),
    "random_walk": kernels.random_walk(sigma=0.5),
    "hmc": kernels.hmc(step_size=0.3, num_integration_steps=3),
}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("name", MOVES)
def test_a_region_without_an_energy_is_never_entered_and_counted(name, bad, key):
    def energy(x):
        return jnp.where(x[0] > 0.5, bad, quadratic(x))

    sampler = ebm.init_sampler(jnp.zeros((64, 2)), MOVES[name])
    moved, draws = ebm.draw(key, energy, sampler, 30)
    assert bool(jnp.isfinite(draws.potential).all())
    assert float(moved.position[:, 0].max()) <= 0.5
    assert int(draws.num_nonfinite.sum()) + int(draws.is_divergent.sum()) > 0


def test_chains_that_start_outside_the_support_are_refused_with_their_number():
    site = ebm.potentials.tilt(Partial(lambda rate, x: rate * x, jnp.ones(())), dist.Exponential(1.0))
    sampler = ebm.init_sampler(jnp.array([1.0, -1.0, -2.0, 3.0]), MOVES["mala"])
    with pytest.raises(ebm.NonFiniteEnergyError, match="not finite at 2 of 4 chains, the first at index 1"):
        ebm.init_train(site, optax.sgd(0.1), sampler)


def test_an_energy_without_a_floor_is_found_although_its_chains_look_stable(key):
    def bottomless(x):
        return -jnp.sum(x**4)

    moved, info = ebm.advance(key, bottomless, ebm.init_sampler(jnp.zeros((64, 2)), kernels.mala(step_size=0.01)), 20)
    assert bool(jnp.isfinite(moved.position).all())
    assert not bool(info.is_divergent.any())
    assert find_escape(key, bottomless, np.asarray(moved.position)) is not None
    assert find_escape(key, quadratic, np.asarray(moved.position)) is None


@pytest.mark.parametrize("energy", [
    lambda x: jnp.sum(x) * 0.0,
    potentials.MLP(2, key=jax.random.key(3), width=8, activation=jnp.tanh, zero_init=False),
], ids=["flat", "bounded units"])  # fmt: skip
def test_an_energy_that_never_rises_has_no_integral_without_a_base(energy, key):
    rows = np.asarray(chains(MOVES["mala"]).position)
    assert find_escape(key, energy, rows) is not None
    assert find_escape(key, potentials.tilt(energy, NORMAL), rows) is None


def train(potential, start, num_steps=3, step_size=0.5):
    optimizer = optax.sgd(1e-3)
    state = ebm.init_train(potential, optimizer, ebm.init_sampler(start, kernels.mala(step_size=step_size)))
    objective = functools.partial(objectives.persistent_contrastive_divergence, num_steps=5)
    return ebm.fit(
        jax.random.key(1), state, start, objective, optimizer, num_steps=num_steps, batch_size=8, progress_bar=False
    )


def logarithmic(rate, x):
    return rate * jnp.sum(x - jnp.log(x))  # NaN beyond zero, where MALA proposes now and then


def test_proposals_without_an_energy_are_told_in_training_unless_the_support_says_why():
    start = jnp.full((16, 1), 0.7)
    potential = Partial(logarithmic, jnp.ones(()))
    with pytest.warns(RuntimeWarning, match=r"[1-9]\d* proposals had a NaN or infinite energy and were rejected"):
        train(potential, start)
    base = dist.Exponential(1.0).expand([1]).to_event(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, history = train(potentials.tilt(potential, base), start)
    assert history["num_nonfinite"].sum() > 0


def raised(rate, x):
    return rate * quadratic(x) + 2e5


def test_energies_too_large_for_single_precision_are_told():
    told = r"energies reached 2\.0e\+05, and float32 resolves differences of such to 0\.016 only"
    with pytest.warns(RuntimeWarning, match=told):
        train(Partial(raised, jnp.ones(())), jnp.zeros((16, 2)))


@pytest.mark.parametrize("step_size", [0.0, -0.3, jnp.nan, jnp.inf])
@pytest.mark.parametrize("make", [
    lambda step_size: kernels.mala(step_size),
    lambda step_size: kernels.hmc(step_size, num_integration_steps=3),
    lambda step_size: kernels.barker(step_size),
], ids=["mala", "hmc", "barker"])  # fmt: skip
def test_a_step_size_that_is_none_is_raised_where_it_is_known(make, step_size):
    with pytest.raises(ValueError, match="step_size: got"):
        make(step_size)


@pytest.mark.parametrize("step_size", [0.0, jnp.nan])
@pytest.mark.parametrize("name", ["mala", "hmc"])
def test_and_within_a_program_its_chains_count_as_frozen(name, step_size, key):
    """HMC with a step of size zero accepts everything and stands still: movement is what counts."""
    objective = functools.partial(objectives.persistent_contrastive_divergence, num_steps=3)

    @jax.jit
    def run(step_size):
        kernel = Partial(MOVES[name].func, **{**MOVES[name].keywords, "step_size": step_size})
        _, (moved, metrics) = objective(quadratic, chains(kernel), jnp.ones((4, 2)), key)
        return moved, metrics

    moved, metrics = run(jnp.asarray(step_size))
    assert float(metrics["frozen_fraction"]) == 1.0
    assert bool(jnp.isfinite(moved.position).all())
    assert float(run(jnp.asarray(0.3))[1]["frozen_fraction"]) < 0.5


# Not NUTS nor replica exchange, which scan over keys under vmap: JAX's check calls that a reuse whatever the keys are, as
# jax.vmap(lambda key: jax.lax.scan(lambda c, k: (c + jax.random.normal(k), None), 0.0, jax.random.split(key, 2)))(keys)
# shows.
ALL = MOVES | {
    "isir": kernels.isir(NORMAL, num_proposals=4),
    "tempered_smc": kernels.tempered_smc(inner=MOVES["mala"], reference=NORMAL, num_steps=1),
    "cycle": kernels.cycle(MOVES["mala"], MOVES["random_walk"]),
}


@pytest.mark.parametrize("name", ALL)
def test_no_kernel_uses_a_random_key_twice(name):
    with jax.debug_key_reuse(True):
        ebm.advance(jax.random.key(1), quadratic, chains(ALL[name], 8), 2)


LADDER = kernels.replica_exchange([1.0, 0.5], inner=MOVES["mala"])


@pytest.mark.parametrize("kernel", [MOVES["mala"], LADDER], ids=["mala", "replica_exchange"])
def test_no_traced_number_outlives_its_trace(kernel):
    with jax.checking_leaks():
        ebm.draw(jax.random.key(1), quadratic, chains(kernel, 8), 2)


def test_nor_does_one_of_training():
    potential = Partial(scaled, jnp.ones(()))
    optimizer = optax.sgd(0.1)
    state = ebm.init_train(potential, optimizer, chains(MOVES["mala"], 8))
    objective = functools.partial(objectives.persistent_contrastive_divergence, num_steps=1)
    with jax.checking_leaks():
        ebm.fit(jax.random.key(1), state, jnp.ones((8, 2)), objective, optimizer, num_steps=2, batch_size=4)
