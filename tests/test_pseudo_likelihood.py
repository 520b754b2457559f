"""Pseudo-likelihood and ratio matching against the enumerated law of every site, and the faults that must not pass."""

import functools
import importlib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import ebm_ppl as ebm
from ebm_ppl import targets
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.objectives import pseudo_likelihood as pseudo_likelihood_loss
from ebm_ppl.objectives import ratio_matching, stateless
from ebm_ppl.targets.discrete import all_states
from ebm_ppl.testing import t_test_chain_means
from tests.wells import check_gradient_of_scale, check_mean_gradient

KEY = jax.random.key(0)
module = importlib.import_module("ebm_ppl.objectives.pseudo_likelihood")  # its name in the package is the function


class Chain(eqx.Module):
    """An energy that says nothing about itself, of three sites with any two values."""

    weights: jax.Array

    def __call__(self, x):
        return jnp.sum(jnp.sin(self.weights @ x))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def symmetric(size):
    weights = np.triu(np.random.default_rng(1).normal(size=(size, size)), 1)
    return jnp.asarray(weights + weights.T)


def tilted_bits():
    base: Any = dist.Bernoulli(logits=normal(3, seed=4)).to_event(1)
    return ebm.potentials.tilt(Chain(normal(2, 3)), base)


CASES = {
    # how to build the potential in either precision, the values of a site, the shape of an event, and options
    "ising": (lambda: ebm.potentials.Ising((3, 3), 0.4, normal(3, 3)), (-1, 1), (3, 3), {}),
    "potts": (lambda: ebm.potentials.Potts((2, 2), 3, 0.8, normal(3), periodic=False), (0, 1, 2), (2, 2), {}),
    "bits": (lambda: ebm.potentials.BoltzmannMachine(symmetric(4), normal(4)), (0, 1), (4,), {}),
    "spins": (lambda: ebm.potentials.BoltzmannMachine(symmetric(4), normal(4), "spin"), (-1, 1), (4,), {}),
    "rbm": (lambda: ebm.potentials.RBM(normal(5, 3), normal(5), normal(3)), (0, 1), (5,), {}),
    "tempered ising": (lambda: ebm.potentials.temper(ebm.potentials.Ising((2, 2), 0.4), 2.0), (-1, 1), (2, 2), {}),
    "given values": (lambda: Chain(normal(2, 3)), (-1, 3), (3,), {"values": (3, -1)}),
    "three values": (lambda: Chain(normal(2, 3)), (-1, 0.5, 3), (3,), {"values": (-1, 0.5, 3)}),
    "tilted": (tilted_bits, (0, 1), (3,), {}),
}
BINARY = ["spins", "rbm", "given values", "tilted"]


def conditionals(potential, states, values):
    """Log probabilities ``(state, site)`` of every site's own value under the others, from those of all states."""
    shape = (len(values),) * states[0].size
    log_prob = jax.nn.log_softmax(-jax.vmap(potential)(states)).reshape(shape)
    own = [log_prob - jax.nn.logsumexp(log_prob, axis=i, keepdims=True) for i in range(len(shape))]
    return jnp.stack(own, axis=-1).reshape(len(states), len(shape))


def exact_pseudo_likelihood(potential, states, values):
    return -conditionals(potential, states, values).sum(axis=1)


def exact_ratio_matching(potential, states, values):
    return ((1.0 - jnp.exp(conditionals(potential, states, values))) ** 2).sum(axis=1)


EXACT = {pseudo_likelihood_loss: exact_pseudo_likelihood, ratio_matching: exact_ratio_matching}


def states_of(values, shape):
    """All of them, whole numbers where the values are."""
    digits = all_states(tuple(range(len(values))), shape)
    return np.asarray(values)[digits]


def values_and_gradients(losses, potential):
    """Of losses of the potential alone, in the parameters that training moves."""
    parameters, rest = eqx.partition(potential, ebm.potentials.trainable(potential))

    @jax.jit
    def evaluate(p):
        return [jax.value_and_grad(lambda p, loss=loss: loss(eqx.combine(p, rest)))(p) for loss in losses]

    return [
        (np.asarray(value), np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)]))
        for value, gradient in evaluate(parameters)
    ]


def found_and_exact(objective, name):
    """Value and gradient of the mean over a few states.

    Not over all of them: uniform data have a symmetry of the values, under which a reversed ratio is a right one.
    """
    build, values, shape, options = CASES[name]
    with jax.enable_x64(True):
        potential, states = build(), jnp.asarray(states_of(values, shape))
        chosen = np.random.default_rng(9).choice(len(states), 5, replace=False)
        return values_and_gradients(
            [
                lambda u: objective(u, states[chosen], KEY, **options),
                lambda u: EXACT[objective](u, states, values)[chosen].mean(),
            ],
            potential,
        )


def is_same(found, exact, rtol):
    return all(np.allclose(f, e, rtol=rtol, atol=rtol * np.abs(e).max()) for f, e in zip(found, exact, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_pseudo_likelihood_is_that_of_the_enumerated_conditionals(name):
    assert is_same(*found_and_exact(pseudo_likelihood_loss, name), rtol=1e-9)


@pytest.mark.parametrize("name", BINARY)
def test_ratio_matching_is_that_of_the_enumerated_conditionals(name):
    assert is_same(*found_and_exact(ratio_matching, name), rtol=1e-9)


FAULTS = {
    "reversed ratio": lambda logits: -logits,
    "one value off": lambda logits: jnp.roll(logits, 1),
    "half": lambda logits: 0.5 * logits,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("objective", EXACT)
def test_wrong_conditionals_are_seen(monkeypatch, objective, fault):
    right = module.site_logits
    monkeypatch.setattr(module, "site_logits", lambda *args: FAULTS[fault](right(*args)))
    found, exact = found_and_exact(objective, "given values")
    assert not is_same(found[1:], exact[1:], rtol=0.1)


def test_a_site_left_out_is_seen(monkeypatch):
    def all_but_one(key, rows, num_sites):
        return jnp.broadcast_to(jnp.arange(1, rows.shape[1]), (rows.shape[0], rows.shape[1] - 1))

    monkeypatch.setattr(module, "_choose_sites", all_but_one)
    assert not is_same(*found_and_exact(pseudo_likelihood_loss, "spins"), rtol=0.01)


@pytest.mark.parametrize("objective", EXACT)
def test_the_gradient_of_the_expectation_vanishes_at_the_truth_alone(objective):
    """On every state of a 3 x 3 lattice with its exact probability."""
    target = targets.get_discrete("ising_3x3")
    with jax.enable_x64(True):
        states, weights = jnp.asarray(target.states), jnp.asarray(target.probabilities)

        def expected(parameters):
            potential = ebm.potentials.Ising((3, 3), *parameters)
            return weights @ jax.vmap(lambda row: objective(potential, row[None], KEY))(states)

        gradient = jax.jit(jax.grad(expected))
        np.testing.assert_allclose(gradient(jnp.array([0.4, 0.1])), 0.0, atol=1e-12)
        assert (np.abs(gradient(jnp.array([0.3, 0.2]))) > 0.01).all()


def test_ratio_matching_is_a_squared_distance_of_conditionals_up_to_a_constant():
    """``E_p sum_i (g - g_p)^2`` of the probabilities of the flipped value, at two models of one truth."""
    with jax.enable_x64(True):
        states = jnp.asarray(states_of((-1, 1), (4,)))
        truth = ebm.potentials.BoltzmannMachine(symmetric(4), normal(4), "spin")
        weights = jax.nn.softmax(-jax.vmap(truth)(states))

        def both(bias):
            model = ebm.potentials.BoltzmannMachine(0.5 * symmetric(4), bias, "spin")
            flipped, flipped_truth = (1.0 - jnp.exp(conditionals(u, states, (-1, 1))) for u in (model, truth))
            losses = jax.vmap(lambda row: ratio_matching(model, row[None], KEY))(states)
            return weights @ losses, weights @ ((flipped - flipped_truth) ** 2).sum(axis=1)

        losses, distances = jax.jit(jax.vmap(both))(normal(3, 4, seed=8))
    np.testing.assert_allclose(np.diff(losses), np.diff(distances), rtol=1e-9)


def test_some_sites_stand_for_all(key):
    """Two of four sites per row, over independent choices: unbiased, and no site twice."""
    with jax.enable_x64(True):
        potential, states = CASES["bits"][0](), jnp.asarray(states_of((0, 1), (4,))[[1, 6, 11]])

        @jax.jit
        def gradients(keys):
            def gradient(key, num_sites):
                def loss(bias):
                    machine = eqx.tree_at(lambda u: u.biases, potential, bias)
                    return pseudo_likelihood_loss(machine, states, key, num_sites=num_sites)

                return jax.grad(loss)(potential.biases)

            some = jax.vmap(lambda key: (gradient(key, 2), module._choose_sites(key, states, 2)))(keys)
            return *some, gradient(keys[0], None)

        found, sites, exact = gradients(jax.random.split(key, 4096))
    checks = check_mean_gradient(found, exact)
    assert np.linalg.norm([check.power for check in checks]) < 0.4 * np.linalg.norm(exact)
    sites = np.asarray(sites)
    assert (sites[..., 0] != sites[..., 1]).all()
    t_test_chain_means((sites == 3).mean(axis=(1, 2)), 0.25, name="site").raise_if_failed()
    with pytest.raises(AssertionError):  # without scaling the sum up
        check_mean_gradient(0.5 * np.asarray(found), exact)


def test_integers_and_floats_are_the_same_rows():
    rbm = ebm.potentials.RBM(normal(5, 3), normal(5), normal(3))
    rows = [jnp.asarray(states_of((0, 1), (5,))[::3], dtype) for dtype in (jnp.int8, jnp.int32, jnp.float32)]
    losses = jax.jit(lambda rows: [[objective(rbm, x, KEY) for x in rows] for objective in EXACT])(rows)
    for of_one in np.asarray(losses):
        np.testing.assert_allclose(of_one, of_one[0], rtol=1e-5)


def test_training_on_integers_reaches_the_pseudo_likelihood_estimate(key):
    """A stationary point of the enumerated pseudo-likelihood of the rows; couplings within their error of the truth."""
    target = targets.get_discrete("ising_3x3")
    data = target.sample(key, 2000)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 200))
    state = ebm.init_train(ebm.potentials.Ising((3, 3), 0.0), optimizer)
    state, history = ebm.fit(key, state, data, stateless(pseudo_likelihood_loss), optimizer, num_steps=200)
    counts = jnp.asarray(np.bincount(target.index(data), minlength=512) / 2000)
    states = jnp.asarray(target.states)
    (exact,) = values_and_gradients(
        [lambda potential: counts @ exact_pseudo_likelihood(potential, states, (-1, 1))], state.potential
    )
    np.testing.assert_allclose(exact[1], 0.0, atol=2e-3)
    np.testing.assert_allclose(history["loss"][-1], exact[0], rtol=1e-4)
    np.testing.assert_allclose([state.potential.coupling, state.potential.field], [0.4, 0.1], atol=0.05)


@pytest.mark.slow
def test_training_stops_at_rows_in_another_coding(key):
    optimizer = optax.adam(0.05)
    state = ebm.init_train(ebm.potentials.Ising((2, 2), 0.1), optimizer)
    with pytest.raises(TrainingFailure):
        ebm.fit(key, state, jnp.zeros((4, 2, 2), int), stateless(pseudo_likelihood_loss), optimizer, num_steps=2)


ISING = ebm.potentials.Ising((2, 2), coupling=0.1)
POTTS = ebm.potentials.Potts((2, 2), 3, coupling=0.1)
SPINS = jnp.ones((4, 2, 2), int)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda f: f(ISING, 0 * SPINS, KEY), ValueError, "batch: got 4 of 4 rows outside the coding"),
    (lambda f: f(ISING, SPINS, KEY, values=(0, 1)), ValueError, "expected one coding"),
    (lambda f: f(lambda x: 1.0 * x.sum(), SPINS, KEY), ValueError, r"got none.*Pass .*values=\(0, 1\)"),
    (lambda f: f(ISING, SPINS, KEY, values=(1,)), ValueError, "values: got .*at least two different"),
    (lambda f: f(ISING, SPINS, KEY, num_sites=5), ValueError, "num_sites: got 5, expected at most the 4 sites"),
    (lambda f: f(ISING, SPINS, KEY, num_sites=0), ValueError, "num_sites: got 0"),
    (lambda f: f(ISING, (SPINS,), KEY), TypeError, "batch: .* got a pytree"),
    (lambda f: f(ISING, SPINS == 1, KEY), TypeError, "batch: got dtype bool"),
    (lambda f: f(ISING, SPINS[:0], KEY), ValueError, "batch: got shape .* which is empty"),
    (lambda f: f(ISING, SPINS[:, 0], KEY), ValueError, "could not be evaluated on one event"),
])  # fmt: skip
@pytest.mark.parametrize("objective", EXACT)
def test_bad_arguments_are_refused(objective, call, error, text):
    with pytest.raises(error, match=text):
        call(objective)


def test_ratio_matching_is_for_two_values():
    with pytest.raises(ValueError, match=r"got sites of 3 values, expected two\. Use pseudo_likelihood"):
        jax.eval_shape(lambda rows: ratio_matching(POTTS, rows, KEY), SPINS)


@pytest.mark.parametrize("objective", EXACT)
def test_a_row_in_another_coding_makes_a_compiled_loss_nan(objective):
    loss = jax.jit(lambda rows: objective(ISING, rows, KEY))
    assert np.isnan(loss(SPINS.at[1, 0, 0].set(0)))
    assert np.isfinite(loss(SPINS))


@pytest.mark.parametrize("objective", EXACT)
@pytest.mark.parametrize(("shape", "dtype"), [((), jnp.int32), ((4, 4, 1), jnp.float32), ((3,), jnp.float64)])
def test_every_event_shape_and_precision_has_a_gradient_under_jit_and_vmap(objective, shape, dtype):
    check_gradient_of_scale(functools.partial(objective, values=(0, 1)), jnp.sum, shape, dtype, KEY)
