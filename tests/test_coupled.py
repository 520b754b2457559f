"""Coupled chains follow their kernel and meet; contrastive divergence from them has no bias."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.kernels.coupled import CoupledKernel, Pairs, coupled
from ebm_ppl.objectives import contrastive_divergence, coupled_contrastive_divergence
from ebm_ppl.objectives import coupled as objective_module
from ebm_ppl.potentials import RBM
from ebm_ppl.testing import t_test_chain_means
from tests.wells import GRID, Wells, check_mean_gradient, exact_draws, exact_gradient, grid_probabilities
from tests.wells import PARAMETERS as EXACT_PARAMETERS

PARAMETERS = jnp.asarray(EXACT_PARAMETERS, jnp.float32)
ROWS = jnp.array([-1.2, -0.9, 0.4, 0.8, 0.9, 1.0, 1.1, 1.3])
BATCH = jnp.tile(ROWS, 64)
WALK = kernels.random_walk(1.0)


def wells_gradients(objective, key, *, num_replicates=64):
    """Gradients in the wells' parameters, and the metrics, of independent calls on the same rows."""
    sampler = ebm.init_sampler(BATCH, WALK)

    def gradient(key):
        def loss(p):
            loss, (_, metrics) = objective(Wells(p), sampler, BATCH, key)
            return loss, metrics

        return jax.grad(loss, has_aux=True)(PARAMETERS)

    found = jax.jit(lambda keys: jax.lax.map(gradient, keys))(jax.random.split(key, num_replicates))
    return np.asarray(found[0]), found[1]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_steps": 1}, id="one"),
        pytest.param({"num_steps": 5, "num_averaged": 5}, id="average", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_has_no_bias_although_chains_start_at_the_data(key, options):
    """The bias of CD-1 in the tilt is .62; the rows have four fifths of their mass in the wrong well."""
    objective = functools.partial(coupled_contrastive_divergence, **options)
    gradients, metrics = wells_gradients(objective, key)
    assert not metrics["num_unmet"].any()
    checks = check_mean_gradient(gradients, exact_gradient(PARAMETERS, ROWS))
    assert checks[2].power < 0.5


def test_the_bias_of_plain_contrastive_divergence_is_seen_by_the_same_check(key):
    gradients, _ = wells_gradients(functools.partial(contrastive_divergence, num_steps=1), key)
    with pytest.raises(AssertionError, match="FAILED"):
        check_mean_gradient(gradients, exact_gradient(PARAMETERS, ROWS))


def test_pairs_cut_off_before_they_meet_are_counted_and_their_bias_is_seen(key):
    objective = functools.partial(coupled_contrastive_divergence, num_steps=1, max_steps=2)
    gradients, metrics = wells_gradients(objective, key)
    assert (metrics["num_unmet"] > 10).all()
    assert (metrics["num_steps"] == 2).all()
    with pytest.raises(AssertionError, match="FAILED"):
        check_mean_gradient(gradients, exact_gradient(PARAMETERS, ROWS))


def test_a_coupling_that_is_not_faithful_is_seen_by_the_same_check(key, monkeypatch):
    """The second chain takes over the first one's position more often than the overlap of their proposals allows."""

    def hasty(kernel, potential):
        init, step = coupled(kernel, potential)

        def rush(key, pairs):
            pairs = step(key, pairs)
            is_near = jnp.abs(pairs.first.position - pairs.second.position) < 0.5
            second = jax.tree.map(lambda a, b: jnp.where(is_near, a, b), pairs.first, pairs.second)
            return pairs._replace(second=second, has_met=pairs.has_met | is_near)

        return CoupledKernel(init, rush)

    monkeypatch.setattr(objective_module, "coupled", hasty)
    gradients, _ = wells_gradients(functools.partial(coupled_contrastive_divergence, num_steps=1), key)
    with pytest.raises(AssertionError, match="FAILED"):
        check_mean_gradient(gradients, exact_gradient(PARAMETERS, ROWS))


@pytest.mark.parametrize("kernel", [kernels.mala(0.1), WALK, kernels.random_walk(jnp.array([0.7]))])
def test_each_chain_of_a_pair_follows_its_kernel(key, kernel):
    """From exact draws, five steps later both are still exact draws; of a law that is shifted by .3 they are not."""

    def moments(key, shift):
        first, second = exact_draws(key, 4096).reshape(2, 2048, 1)
        init, step = coupled(kernel, lambda x: Wells(PARAMETERS)(x[0] - shift))
        pairs = Pairs(init(first, key), init(second, key), jnp.zeros(2048, bool), jnp.zeros(2048))
        for index in range(5):
            pairs = jax.jit(step)(jax.random.fold_in(key, index), pairs)
        return [np.stack([x.position, x.position**2], axis=1) for x in pairs[:2]], pairs.has_met

    probabilities = grid_probabilities()
    exact = np.sum(probabilities * GRID), np.sum(probabilities * GRID**2)
    found, has_met = moments(key, 0.0)
    assert 0.2 < has_met.mean() < 1.0
    for chain in found:
        for column, value in zip(chain[..., 0].T, exact, strict=True):
            t_test_chain_means(column, value).raise_if_failed()
    for chain in moments(key, 0.3)[0]:
        assert not t_test_chain_means(chain[:, 0, 0], exact[0]).passed


def test_chains_that_have_met_are_one_from_then_on(key):
    init, step = coupled(kernels.mala(0.1), lambda x: jnp.sum(x**2))
    start = 0.3 * jax.random.normal(key, (2, 200, 3))
    pairs = Pairs(init(start[0], key), init(start[1], key), jnp.zeros(200, bool), jnp.zeros(200))
    before = pairs.has_met
    for index in range(30):
        pairs = jax.jit(step)(jax.random.fold_in(key, index), pairs)
        same = (pairs.first.position == pairs.second.position).all(axis=1)
        np.testing.assert_array_equal(same, pairs.has_met)
        assert not (before & ~pairs.has_met).any()
        before = pairs.has_met
    assert before.mean() > 0.9


STATES = jnp.array(list(itertools.product([0.0, 1.0], repeat=5)))
VISIBLE = STATES[jnp.array([0, 3, 7, 12, 21, 30, 31, 31])]


@pytest.mark.parametrize("scan", ["block", pytest.param("sequential", marks=pytest.mark.slow)])
def test_the_gradient_of_an_rbm_has_no_bias(key, scan):
    """Along four fixed directions of its parameters; plain CD-1 fails on the same rows."""
    rbm = RBM(
        3.0 * jax.random.normal(jax.random.key(1), (5, 3)),
        jnp.array([0.2, -0.3, 0.1, 0.4, -0.2]),
        jnp.array([0.3, -0.2, 0.1]),
    )
    batch = jnp.tile(VISIBLE, (32, 1))
    sampler = ebm.init_sampler(batch, kernels.gibbs(scan))
    directions = jax.random.normal(jax.random.key(2), (4, 23))

    def exact(rbm):
        return jax.vmap(rbm)(VISIBLE).mean() + jax.nn.logsumexp(-jax.vmap(rbm)(STATES))

    def gradients(objective):
        def gradient(key):
            return directions @ ravel_pytree(jax.grad(lambda r: objective(r, sampler, batch, key)[0])(rbm))[0]

        return np.asarray(jax.jit(lambda keys: jax.lax.map(gradient, keys))(jax.random.split(key, 64)))

    expected = directions @ ravel_pytree(jax.grad(exact)(rbm))[0]
    check_mean_gradient(gradients(functools.partial(coupled_contrastive_divergence, num_steps=1)), expected)
    with pytest.raises(AssertionError, match="FAILED"):
        check_mean_gradient(gradients(functools.partial(contrastive_divergence, num_steps=1)), expected)


def shifted_gaussian(parameters, x):
    return 0.5 * jnp.exp(parameters[0]) * jnp.sum((x - parameters[1:].reshape(x.shape)) ** 2)


@pytest.mark.slow
def test_training_reaches_maximum_likelihood(key):
    data = 1.0 + 0.7 * jax.random.normal(key, (128, 1, 2))
    sampler = ebm.init_sampler(data[:1], kernels.mala(0.3))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 150))
    state = ebm.init_train(Partial(shifted_gaussian, jnp.zeros(3)), optimizer, sampler)
    objective = functools.partial(coupled_contrastive_divergence, num_steps=2, num_averaged=3)
    state, history = ebm.fit(key, state, data, objective, optimizer, num_steps=150)
    (parameters,) = state.potential.args
    np.testing.assert_allclose(parameters[1:], data.mean(axis=0)[0], atol=0.05)
    np.testing.assert_allclose(jnp.exp(-parameters[0]), data.var(axis=0).mean(), rtol=0.15)
    assert not history["num_unmet"].any()


def test_value_metrics_and_closures(key):
    """A closure over a parameter has the same gradient as a module that holds it; metrics are what they say."""
    rows = ROWS[:4]
    sampler = ebm.init_sampler(rows, kernels.mala(0.1))

    @jax.jit
    def both(p, key):
        run = functools.partial(coupled_contrastive_divergence, num_steps=2)
        as_module = jax.value_and_grad(lambda p: run(Wells(p), sampler, rows, key), has_aux=True)(p)
        as_closure = jax.grad(lambda p: run(lambda x: Wells(p)(x), sampler, rows, key)[0])(p)
        return as_module, as_closure

    ((loss, (after, metrics)), gradient), other = both(PARAMETERS, key)
    np.testing.assert_allclose(gradient, other, rtol=1e-4)
    np.testing.assert_allclose(loss, metrics["energy_gap"], rtol=1e-6)
    np.testing.assert_allclose(metrics["energy_gap"], metrics["energy_data"] - metrics["energy_negative"], rtol=1e-5)
    np.testing.assert_array_equal(after.position, rows)
    assert 1 <= metrics["meeting_time"] <= metrics["num_steps"]
    assert 0 < metrics["acceptance_rate"] <= 1


def test_float64(key):
    with jax.enable_x64(True):
        rows = jnp.linspace(-1.0, 1.0, 4, dtype=jnp.float64)
        sampler = ebm.init_sampler(rows, WALK)
        potential = Wells(jnp.asarray(EXACT_PARAMETERS))
        loss, _ = jax.jit(coupled_contrastive_divergence)(potential, sampler, rows, key)
    assert loss.dtype == jnp.float64


@pytest.mark.parametrize(
    ("kernel", "options", "error", "text"),
    [
        (kernels.hmc(0.1, 3), {}, TypeError, "sampler: got a kernel whose chains cannot be coupled"),
        (kernels.unadjusted_langevin(0.1), {}, TypeError, "sampler: got a kernel whose chains cannot be coupled"),
        (
            kernels.unadjusted_discrete_langevin(0.1, values=(0, 1)),
            {},
            TypeError,
            "whose law is not that of the energy",
        ),
        (kernels.random_walk(jnp.eye(2)), {}, TypeError, r"sampler: got a kernel .* \(no matrix\)"),
        (WALK, {"num_steps": 0}, ValueError, "num_steps: got 0"),
        (WALK, {"num_averaged": 0}, ValueError, "num_averaged: got 0"),
        (WALK, {"num_steps": 5, "num_averaged": 3, "max_steps": 7}, ValueError, "max_steps: got 7.*>= 8"),
    ],
)
def test_bad_options_are_refused(key, kernel, options, error, text):
    sampler = ebm.init_sampler(jnp.zeros((4, 2)), kernel)
    with pytest.raises(error, match=text):
        coupled_contrastive_divergence(lambda x: jnp.sum(x**2), sampler, jnp.zeros((4, 2)), key, **options)


def test_a_missing_sampler_is_refused(key):
    with pytest.raises(TypeError, match="sampler: got NoneType"):
        coupled_contrastive_divergence(lambda x: x**2, None, ROWS, key)
