"""Replica exchange: every rung keeps its law, modes mix, and the ladder tunes itself between phases."""

import functools
import warnings

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special
import scipy.stats

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.adaptation import set_tunables, tunables
from ebm_ppl.kernels import tempering
from ebm_ppl.ladder import tune_ladder
from ebm_ppl.targets.mixture import GaussianMixturePotential
from ebm_ppl.targets.tabulated import TabulatedLaw
from ebm_ppl.testing import cdf_test, t_test_chain_means

WEIGHTS, MEANS, SCALES = np.array([0.3, 0.7]), np.array([-2.0, 2.0]), np.array([0.4, 0.7])
MIXTURE = GaussianMixturePotential(jnp.asarray(WEIGHTS), jnp.asarray(MEANS), jnp.asarray(SCALES), 1.5)
REFERENCE = dist.Normal(0.5, 3.0)
LADDER, BRIDGE = (1.0, 0.4, 0.1), (1.0, 0.3, 0.0)


def log_mixture(x):
    x = np.asarray(x)[..., None]
    return scipy.special.logsumexp(np.log(WEIGHTS) + scipy.stats.norm.logpdf(x, MEANS, SCALES), axis=-1)


@functools.cache
def law(inverse_temperature, has_reference):
    """The exact law of one rung."""

    def log_density(x):
        tempered = inverse_temperature * log_mixture(x)
        return tempered + has_reference * (1 - inverse_temperature) * scipy.stats.norm.logpdf(x, 0.5, 3.0)

    return TabulatedLaw(log_density, -40.0, 40.0, 2**15 + 1)


def exact_chains(key, kernel, ladder, has_reference, num_chains=10_000):
    """Chains all of whose replicas are exact draws of their rungs."""
    keys = jax.random.split(key, len(ladder))
    draws = [law(b, has_reference).sample(k, (num_chains,)) for b, k in zip(ladder, keys, strict=True)]
    sampler = ebm.init_sampler(draws[0], kernel)
    return sampler._replace(auxiliary=sampler.auxiliary._replace(replicas=jnp.stack(draws[1:], axis=1)))


def laws_hold(sampler, ladder, has_reference):
    rungs = np.concatenate([sampler.position[:, None], sampler.auxiliary.replicas], axis=1).T
    return [cdf_test(x, law(b, has_reference).cdf) for x, b in zip(rungs, ladder, strict=True)]


INNER = {
    "mala": lambda: kernels.mala(0.25),
    "random_walk": lambda: kernels.random_walk(1.0),
    "hmc": lambda: kernels.hmc(0.5, 2),
    # A momentum in its state: starts anew after every swap.
    "ghmc": lambda: kernels.from_blackjax(
        blackjax.ghmc, step_size=0.4, momentum_inverse_scale=jnp.ones(1), alpha=0.5, delta=0.2
    ),
}
# Each compiles a program of its own.
QUICK = [("mala", False), ("mala", True)]


@pytest.mark.parametrize(
    ("name", "has_reference"),
    [
        (name, has) if (name, has) in QUICK else pytest.param(name, has, marks=pytest.mark.slow)
        for name in INNER
        for has in (False, True)
    ],
)
def test_every_rung_keeps_its_law_from_an_exact_start(key, name, has_reference):
    ladder = BRIDGE if has_reference else LADDER
    reference = REFERENCE if has_reference else None
    power = 0.5 if name == "mala" else 0.0
    kernel = kernels.replica_exchange(ladder, inner=INNER[name](), reference=reference, step_size_power=power)
    sampler, info = ebm.advance(key, MIXTURE, exact_chains(key, kernel, ladder, has_reference), 6)
    for check in laws_hold(sampler, ladder, has_reference):
        check.raise_if_failed()
    assert bool(info.has_moved.mean() > 0.9)
    assert 0.2 < float(info.acceptance_rate.mean()) < 0.99
    for pair in range(2):
        assert 0.05 < float(info.statistics[f"swap_rate_{pair}"].mean()) < 0.95
    assert len(np.unique(sampler.auxiliary.label[:, 0])) == 3  # replicas do arrive


def wrong_weight(trade):
    return lambda key, energy, ladder, state: trade(key, 0.3 * energy, ladder, state)


def wrong_sign(trade):
    return lambda key, energy, ladder, state: trade(key, -energy, ladder, state)


def always(trade):
    return lambda key, energy, ladder, state: trade(key, 0.0 * energy, ladder, state)


def stale_cache(keep):
    """Replicas that change places and leave their energies behind."""

    def reorder(self, key, state, order, parts):
        return keep(self, key, state, order, parts)._replace(logdensity=state.logdensity)

    return reorder


@pytest.mark.parametrize(
    "fault",
    [wrong_weight, stale_cache, *(pytest.param(fault, marks=pytest.mark.slow) for fault in (wrong_sign, always))],
    ids=lambda fault: fault.__name__,
)
def test_a_seeded_fault_is_caught(key, monkeypatch, fault):
    if fault is stale_cache:
        monkeypatch.setattr(tempering.Rungs, "reorder", fault(tempering.Rungs.reorder))
    else:
        monkeypatch.setattr(tempering, "_trade", fault(tempering._trade))
    kernel = kernels.replica_exchange(LADDER, inner=kernels.mala(0.25), step_size_power=0.5)
    sampler = exact_chains(key, kernel, LADDER, False)
    # Compiled here: what was compiled elsewhere does not know of the fault.
    sampler, _ = jax.jit(lambda sampler: ebm.advance(key, MIXTURE, sampler, 6))(sampler)
    assert not all(check.passed for check in laws_hold(sampler, LADDER, False))


def test_modes_mix_where_mala_is_stuck(key):
    """All chains start in the right-hand mode; the share of the left-hand one is .3."""
    potential = GaussianMixturePotential(jnp.asarray(WEIGHTS), jnp.array([-4.0, 4.0]), jnp.asarray(SCALES), 0.0)
    start = jnp.full(64, 4.0)
    stuck, _ = ebm.advance(key, potential, ebm.init_sampler(start, kernels.mala(0.3)), 300)
    assert bool((stuck.position > 0).all())
    kernel = kernels.replica_exchange(
        (1.0, 0.35, 0.1, 0.0), inner=kernels.mala(0.3), reference=dist.Normal(0.0, 5.0), step_size_power=0.7
    )
    sampler, _ = ebm.advance(key, potential, ebm.init_sampler(start, kernel), 300)
    sampler, draws = ebm.draw(key, potential, sampler, 300)
    t_test_chain_means(draws.position < 0, 0.3).raise_if_failed()
    assert float(((draws.position < 0).mean(axis=1)).std()) < 0.2
    assert int(sampler.auxiliary.round_trips.min()) > 5
    rate = float(draws.statistics["round_trips"].sum(axis=1).mean())
    assert 5 < rate <= float(sampler.auxiliary.round_trips.mean())


def test_neighbours_take_turns_and_round_trips_are_those_of_the_labels(key):
    ladder = (1.0, 0.7, 0.5, 0.3)
    algorithm = kernels.replica_exchange(ladder, inner=kernels.mala(0.3))(lambda x: 0.5 * x**2)

    def body(state, key):
        state, info = algorithm.step(key, state)
        return state, (state.auxiliary.label, info.statistics["round_trips"])

    state = algorithm.init(jax.random.normal(key, (8,)), key)
    state, (labels, trips) = jax.jit(lambda state: jax.lax.scan(body, state, jax.random.split(key, 400)))(state)
    labels = np.concatenate([np.tile(np.arange(4), (1, 8, 1)), labels])
    assert (np.sort(labels, axis=2) == np.arange(4)).all()
    changed = labels[1:] != labels[:-1]
    # Pairs (0, 1) and (2, 3) ...
    assert (changed[0::2, :, 0] == changed[0::2, :, 1]).all()
    assert (changed[0::2, :, 2] == changed[0::2, :, 3]).all()
    assert (changed[1::2, :, 1] == changed[1::2, :, 2]).all()  # ... and then (1, 2).
    assert not changed[1::2, :, [0, 3]].any()
    for chain in range(8):
        count = 0
        for replica in range(4):
            last = None
            for rung in np.argmax(labels[1:, chain] == replica, axis=1):
                if rung == 0:
                    count += last == "hot"
                    last = "cold"
                elif rung == 3 and last is not None:
                    last = "hot"
        assert count == int(state.auxiliary.round_trips[chain]) == int(trips[:, chain].sum())
    assert int(state.auxiliary.round_trips.sum()) > 50


@pytest.mark.parametrize("has_reference", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_goes_with_a_replica_is_right_and_costs_no_gradient(key, has_reference):
    """The energies and gradients that states carry, after many swaps, are those of their rungs."""
    ladder = BRIDGE if has_reference else LADDER
    inverse = jnp.array(ladder)[:, None]
    kernel = kernels.replica_exchange(ladder, inner=kernels.mala(0.1), reference=REFERENCE if has_reference else None)
    algorithm = kernel(MIXTURE)
    state = algorithm.init(jax.random.normal(key, (32,)), key)
    state, info = jax.jit(
        lambda state: jax.lax.scan(lambda s, k: algorithm.step(k, s), state, jax.random.split(key, 200))
    )(state)

    def log_density(b, x):
        return -b * MIXTURE(x) + ((1 - b) * REFERENCE.log_prob(x) if has_reference else 0.0)

    value, slope = jax.vmap(jax.vmap(jax.value_and_grad(log_density, 1)), (0, 0))(
        jnp.broadcast_to(inverse, state.inner.position.shape), state.inner.position
    )
    np.testing.assert_allclose(state.inner.logdensity, value, atol=1e-4)
    np.testing.assert_allclose(state.inner.logdensity_grad, slope, atol=1e-3)
    np.testing.assert_array_equal(state.inner.position[0], state.position)
    assert (np.asarray(info.num_gradients) == 3 + has_reference).all()
    assert (np.asarray(info.num_energies) == 0).all()


def test_replicas_survive_an_update_and_steps_and_ladders_do_not_recompile(key):
    """One changed argument of persistent contrastive divergence."""
    traces = 0

    def energy(x):
        nonlocal traces
        traces += 1
        return jnp.sum((x**2 - 1.0) ** 2)

    run = jax.jit(functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=3))
    batch, counts, sampler = jnp.ones((8, 2)), [], None
    for step_size, hot in ((0.1, 0.2), (0.05, 0.2), (0.05, 0.1)):
        kernel = kernels.replica_exchange((1.0, 0.5, hot), inner=kernels.mala(step_size))
        start = ebm.init_sampler(jnp.ones((16, 2)), kernel)
        sampler = start if sampler is None else sampler._replace(kernel=kernel)
        before = sampler
        loss, (sampler, _) = run(jax.tree_util.Partial(energy), sampler, batch, key)
        counts.append(traces)
        assert bool(jnp.isfinite(loss))
        assert sampler.auxiliary.replicas.shape == (16, 2, 2)
        assert bool((sampler.auxiliary.replicas != before.auxiliary.replicas).any())
    assert counts[0] > 0
    assert counts == counts[:1] * 3
    assert int(sampler.auxiliary.parity[0]) == 1  # nine steps, not three times three


def test_nonfinite_energies_are_rejected_counted_and_not_swapped(key):
    def cliff(x):
        return jnp.where(jnp.abs(x) > 1.0, jnp.nan, 0.5 * x**2)

    kernel = kernels.replica_exchange((1.0, 0.5, 0.2), inner=kernels.mala(0.3), step_size_power=1.0)
    sampler, info = ebm.advance(key, cliff, ebm.init_sampler(jnp.zeros(64), kernel), 30)
    assert bool((jnp.abs(sampler.auxiliary.replicas) <= 1.0).all())
    assert int(info.num_nonfinite.min()) > 0
    assert not bool(info.is_divergent.any())


def gaussian(x):
    return 0.5 * jnp.sum(x**2)


def test_tuned_rungs_reject_equally(key):
    """For a Gaussian the ladder on paper is geometric; a bad one becomes it, and nothing recompiles for it."""
    kernel = kernels.replica_exchange((1.0, 0.97, 0.9, 0.02), inner=kernels.mala(0.5), step_size_power=1.0)
    sampler = tune_ladder(key, gaussian, ebm.init_sampler(jnp.ones((64, 2)), kernel), 0.3, num_steps=60)
    np.testing.assert_allclose(tunables(sampler)["inverse_temperatures"], 0.02 ** (np.arange(4) / 3), rtol=0.15)
    with pytest.warns(RuntimeWarning, match="The rejection rates add up to .* about 1. rungs reach it"):
        tune_ladder(key, gaussian, sampler, 0.85, num_steps=60, num_rounds=1)


@pytest.mark.slow
def test_a_ladder_that_ends_at_the_reference_is_tuned(key):
    kernel = kernels.replica_exchange(
        (1.0, 0.9, 0.8, 0.7, 0.0), inner=kernels.mala(0.2), reference=dist.Normal(0.0, 6.0), step_size_power=0.5
    )
    sampler = ebm.init_sampler(jnp.ones(128), kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = tune_ladder(key, MIXTURE, sampler, 0.5, num_rounds=8)
    _, info = ebm.advance(key, MIXTURE, sampler, 300)
    rates = np.array([info.statistics[f"swap_rate_{pair}"].mean() for pair in range(4)])
    assert np.ptp(rates) < 0.15, rates
    assert bool(jnp.all(jnp.diff(tunables(sampler)["inverse_temperatures"]) < 0))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: kernels.replica_exchange((1.0,), inner=kernels.mala(0.1)), ValueError, "at least 2 rungs"),
        (lambda: kernels.replica_exchange((0.9, 0.5), inner=kernels.mala(0.1)), ValueError, "fall from 1"),
        (lambda: kernels.replica_exchange((1.0, 0.5, 0.5), inner=kernels.mala(0.1)), ValueError, "fall from 1"),
        (lambda: kernels.replica_exchange((1.0, -0.1), inner=kernels.mala(0.1)), ValueError, "fall from 1 to >= 0"),
        (
            lambda: kernels.replica_exchange((1.0, 0.0), inner=kernels.mala(0.1)),
            ValueError,
            "got 0 without a reference",
        ),
        (lambda: kernels.replica_exchange((1.0, 0.5), inner="mala"), TypeError, "inner: got str"),
        (
            lambda: kernels.replica_exchange((1.0, 0.5), inner=kernels.mala(0.1), step_size_factors=(1.0, 2.0, 3.0)),
            ValueError,
            "step_size_factors: got shape",
        ),
        (
            lambda: kernels.replica_exchange((1.0, 0.5), inner=kernels.mala(0.1), reference=len),
            TypeError,
            "reference: got",
        ),
        (
            lambda: tune_ladder(jax.random.key(0), gaussian, ebm.init_sampler(jnp.ones((4, 2)), kernels.mala(0.1))),
            ValueError,
            "expected inverse_temperatures",
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_ladder_is_a_tunable():
    sampler = ebm.init_sampler(jnp.ones(4), kernels.replica_exchange((1.0, 0.5), inner=kernels.mala(0.1)))
    changed = set_tunables(sampler, inverse_temperatures=jnp.array([1.0, 0.25]))
    assert tunables(changed)["inverse_temperatures"].tolist() == [1.0, 0.25]
