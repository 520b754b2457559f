"""log Z read off chains that were weighted during training: no bias, an error that covers, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.kernels.reweighted import ChainWeights
from ebm_ppl.normalizer import tracked
from ebm_ppl.objectives import jarzynski_chains, jarzynski_contrastive_divergence
from ebm_ppl.testing import t_test_chain_means
from tests.wells import Wells, exact_draws, log_normalizer

RUNS = 200


@functools.cache
def trainings(*, step_size, num_updates=60, num_chains=300, num_held_out=None, min_ess=0.5, rate=0.15, runs=RUNS):
    """Independent trainings of a double well from the same data: what they tracked, and by how much it is off."""
    data = exact_draws(jax.random.key(9), 256)

    def train(key):
        first, then = jax.random.split(key)
        kernel = kernels.mala(step_size=step_size)
        sampler = jarzynski_chains(first, dist.Normal(0.0, 1.2), kernel, num_chains, min_ess=min_ess)

        def update(carry, key):
            parameters, sampler = carry

            def loss(parameters):
                return jarzynski_contrastive_divergence(
                    Wells(parameters), sampler, data, key, num_steps=1, num_held_out=num_held_out
                )

            (_, (sampler, _)), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
            return (parameters - rate * gradient, sampler), None

        start = jnp.array([0.2, 0.5, 0.0]), sampler
        (parameters, sampler), _ = jax.lax.scan(update, start, jax.random.split(then, num_updates))
        return tracked(sampler, Wells(parameters)), parameters, sampler.auxiliary

    found, parameters, weights = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(3), runs))
    with jax.enable_x64(True):
        exact = np.asarray(jax.jit(jax.vmap(log_normalizer))(jnp.asarray(np.asarray(parameters, float))))
    return found, np.asarray(found.value, float) - exact, weights


def test_z_is_tracked_without_bias_to_the_energy_after_the_last_update():
    found, error, _ = trainings(step_size=0.05)
    check = t_test_chain_means(np.exp(error), 1.0, name="E[Z estimate / Z]").raise_if_failed()
    assert check.power < 0.05
    assert found.reliable.mean() > 0.9
    assert np.isnan(np.square(error / np.asarray(found.standard_error))).sum() == 0


CASES = {"mixing": {"step_size": 0.05}, "hardly moving": {"step_size": 1e-5, "min_ess": 0.8}}


@pytest.mark.parametrize("case", ["mixing", pytest.param("hardly moving", marks=pytest.mark.slow)])
def test_the_error_is_that_of_independent_trainings(case):
    """Also where chains that share an ancestor stay alike, and resampling comes often."""
    found, error, _ = trainings(**CASES[case])
    z = error / np.asarray(found.standard_error, float)
    assert (np.abs(z) < 1.96).mean() > 0.88
    assert 0.7 < np.square(z).mean() < 1.4


@pytest.mark.slow
def test_an_error_that_forgets_ancestors_is_too_small():
    found, error, weights = trainings(**CASES["hardly moving"])
    independent = np.asarray(weights.variance[:, -1], float)
    assert np.square(error).mean() > 1.5 * independent.mean()
    assert np.square(error).mean() < 1.4 * np.square(found.standard_error).mean()


@pytest.mark.slow
def test_chains_of_the_gradient_drift():
    """Why only held-out chains are read: the others give a log Z that is too low."""
    data = exact_draws(jax.random.key(9), 256)

    def train(key):
        sampler = jarzynski_chains(key, dist.Normal(0.0, 1.2), kernels.mala(step_size=0.05), 60)

        def update(carry, key):
            parameters, sampler = carry
            loss = lambda p: jarzynski_contrastive_divergence(
                Wells(p), sampler, data, key, num_steps=1, num_held_out=30
            )
            (_, (sampler, _)), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
            return (parameters - 0.15 * gradient, sampler), None

        carry = jnp.array([0.2, 0.5, 0.0]), sampler
        (parameters, sampler), _ = jax.lax.scan(update, carry, jax.random.split(key, 100))
        weights = sampler.auxiliary
        energy = jax.vmap(Wells(parameters))(sampler.position)
        log_weight = weights.log_weight + weights.energy - energy
        return jax.nn.logsumexp(log_weight[:30]) - jnp.log(30.0), tracked(sampler, Wells(parameters)).value, parameters

    learning, held_out, parameters = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 400))
    with jax.enable_x64(True):
        exact = np.asarray(jax.vmap(log_normalizer)(jnp.asarray(np.asarray(parameters, float))))
    t_test_chain_means(np.exp(np.asarray(held_out) - exact), 1.0, name="held out").raise_if_failed()
    assert not t_test_chain_means(np.exp(np.asarray(learning) - exact), 1.0, name="learning").passed


def chains(key, num_chains=100):
    return jarzynski_chains(key, dist.Normal(0.0, 1.5), kernels.mala(step_size=0.3), num_chains)


def test_the_value_follows_the_potential_and_has_its_gradient(key):
    sampler = chains(key)

    def value(precision):
        return tracked(sampler, lambda x: 0.5 * precision * x**2 + 2.0).value

    found, slope = jax.jit(jax.value_and_grad(value))(0.8)
    position = sampler.position[50:]
    log_weight = -dist.Normal(0.0, 1.5).log_prob(position) - 0.4 * position**2 - 2.0
    np.testing.assert_allclose(found, jax.nn.logsumexp(log_weight) - jnp.log(50.0), rtol=1e-5)
    np.testing.assert_allclose(slope, -0.5 * jnp.sum(jax.nn.softmax(log_weight) * position**2), rtol=1e-4)


def test_a_far_energy_and_few_ancestors_are_unreliable(key):
    sampler = chains(key)
    assert not tracked(sampler, lambda x: 0.5 * (x - 9.0) ** 2).reliable
    assert tracked(sampler, lambda x: 0.5 * (x / 1.4) ** 2).reliable
    one = sampler._replace(auxiliary=sampler.auxiliary._replace(ancestor=jnp.repeat(jnp.array([0, 99]), 50)))
    alike = tracked(one, lambda x: 0.5 * (x / 1.4) ** 2)
    assert not alike.reliable
    assert alike.standard_error > 0.5


def test_resampling_carries_ancestors_within_their_group(key):
    sampler = chains(key, 60)

    @jax.jit
    def update(sampler, place, key):
        energy = lambda x: 2.0 * (x - place) ** 2
        return jarzynski_contrastive_divergence(energy, sampler, jnp.zeros(3), key, num_steps=1)[1][0]

    for place in (0.0, 1.0, 2.0):
        sampler = update(sampler, place, jax.random.fold_in(key, int(place)))
    assert isinstance(sampler.auxiliary, ChainWeights)
    ancestor = np.asarray(sampler.auxiliary.ancestor)
    assert 1 < len(np.unique(ancestor)) < 60
    assert ((ancestor < 30) == (np.arange(60) < 30)).all()
    tracked(sampler, lambda x: 2.0 * (x - 2.0) ** 2)
    with pytest.raises(ValueError, match=r"num_held_out: got 40, but \d+ chains descend across that line"):
        tracked(sampler, lambda x: x**2, num_held_out=40)


def test_bad_arguments_are_refused(key):
    with pytest.raises(TypeError, match="sampler: got chains that carry no weights"):
        tracked(ebm.init_sampler(jnp.zeros(99), kernels.mala(step_size=0.1)), lambda x: x**2)
    for count in (0, 24, 100):
        with pytest.raises(ValueError, match=rf"num_held_out: got {count} of 100 chains, expected at least 25"):
            tracked(chains(key), lambda x: x**2, num_held_out=count)
    with pytest.raises(ValueError, match="potential"):
        tracked(chains(key), lambda x: x * jnp.ones(2))
