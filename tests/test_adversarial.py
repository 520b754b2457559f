"""The energy's half of the adversarial game, and regularisers: closed forms, equality with CD and PCD, and faults."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.diffusion import DiffusionSampler
from ebm_ppl.info import step_info
from ebm_ppl.objectives import (
    contrastive_divergence,
    energy_l2,
    generalized_contrastive_divergence,
    gradient_penalty,
    persistent_contrastive_divergence,
    stateless,
)
from ebm_ppl.potentials import Fixed, Tilted
from ebm_ppl.types import SamplerState
from tests.wells import GRID, PARAMETERS, Wells, exact_gradient

KEY = jax.random.key(0)
BATCH = np.array([-1.2, -0.9, 0.4, 0.8, 0.9, 1.0, 1.1, 1.3])


class Still(NamedTuple):
    position: Any


def still(potential):
    """A kernel that leaves every chain where it is, so that negatives are an exhaustive list with its weights."""

    def step(rng_key, state):
        return state, step_info(jax.tree.leaves(state.position)[0].shape[0], acceptance_rate=1.0)

    return SamplingAlgorithm(lambda position, rng_key=None: Still(position), step)


STILL = Partial(still)


def run(objective, parameters, sampler, key):
    def loss(p):
        return objective(Wells(p), sampler, jnp.asarray(BATCH, jnp.float32), key)

    return jax.value_and_grad(loss, has_aux=True)(parameters)


def test_with_a_markov_kernel_it_is_contrastive_divergence_bit_for_bit(key):
    sampler = ebm.init_sampler(jnp.linspace(-1.0, 1.0, 6), kernels.unadjusted_langevin(0.05))
    outputs = []
    for objective in (
        functools.partial(generalized_contrastive_divergence, start="data"),
        contrastive_divergence,
        functools.partial(generalized_contrastive_divergence, start="sampler"),
        persistent_contrastive_divergence,
    ):
        objective = functools.partial(objective, num_steps=4)
        compiled = jax.jit(functools.partial(run, objective))
        (loss, (after, metrics)), gradient = compiled(jnp.asarray(PARAMETERS, jnp.float32), sampler, key)
        metrics.pop("energy_l2", None)
        outputs.append((loss, after.position, metrics, gradient))
    jax.tree.map(np.testing.assert_array_equal, *outputs[:2])
    jax.tree.map(np.testing.assert_array_equal, *outputs[2:])
    assert outputs[0][0] != outputs[2][0]


def table_gradient(table, batch, log_weight, objective):
    """Gradient of the objective in a table of energies, negatives being all states with their weights."""
    sampler = SamplerState(jnp.arange(float(len(table))), jnp.asarray(log_weight), STILL)

    def loss(table):
        return objective(lambda x: table[x.astype(int)], sampler, batch, jax.random.key(0))[0]

    return np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(table)))


# Twelve states: probabilities of the data are whole counts, those of the sampler are weights.
COUNTS = np.array([1, 2, 3, 5, 8, 1, 1, 7, 4, 6, 9, 3])
DATA = COUNTS / COUNTS.sum()


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_against_a_fixed_sampler_the_best_energy_is_a_hyperbolic_tangent(weight):
    proposal = np.roll(DATA, 3)
    with jax.enable_x64(True):
        batch = jnp.asarray(np.repeat(np.arange(12.0), COUNTS))
        objective = functools.partial(generalized_contrastive_divergence, energy_weight=weight)
        gradient = functools.partial(table_gradient, batch=batch, log_weight=np.log(proposal), objective=objective)
        best = -np.tanh(0.5 * np.log(DATA / proposal)) / (2 * weight)
        np.testing.assert_allclose(gradient(best), 0.0, atol=1e-12)
        # The loss is quadratic, so one step of each state's own curvature finds the minimum from anywhere.
        found = -gradient(np.zeros(12)) / (2 * weight * (DATA + proposal))
        np.testing.assert_allclose(found, best, atol=1e-6)
        # Negative controls: half the weight, and a penalty of the rows only.
        halved = functools.partial(generalized_contrastive_divergence, energy_weight=weight / 2)
        one_sided = energy_l2(persistent_steps(1), weight, at="data")
        for wrong in (halved, one_sided):
            assert np.abs(table_gradient(best, batch, np.log(proposal), wrong)).max() > 1e-3


def persistent_steps(num_steps):
    return functools.partial(persistent_contrastive_divergence, num_steps=num_steps)


@pytest.mark.parametrize("weight", [1.0, 0.01])
def test_the_game_is_at_rest_at_the_regularised_equilibrium(weight):
    """log q + log Z = tanh((log p - log q) / 2) / (2 w) where the sampler has answered with q = exp(-U) / Z."""

    def residual(logits):
        law = logits - np.logaddexp.reduce(logits)
        difference = law - np.tanh(0.5 * (np.log(DATA) - law)) / (2 * weight)
        return difference - difference.mean() + logits.mean()

    solution = scipy.optimize.root(residual, np.log(DATA) - np.log(DATA).mean(), tol=1e-13)
    law = solution.x - np.logaddexp.reduce(solution.x)
    assert np.abs(residual(solution.x)).max() < 1e-9
    with jax.enable_x64(True):
        batch = jnp.asarray(np.repeat(np.arange(12.0), COUNTS))
        energies = -np.tanh(0.5 * (np.log(DATA) - law)) / (2 * weight)
        objective = functools.partial(generalized_contrastive_divergence, energy_weight=weight)
        # The sampler is the Gibbs law of the energies themselves: both players rest.
        np.testing.assert_allclose(table_gradient(energies, batch, -energies, objective), 0.0, atol=1e-6)
        unregularised = functools.partial(generalized_contrastive_divergence)
        assert np.abs(table_gradient(energies, batch, -energies, unregularised)).max() > 1e-4
    divergence = np.sum(DATA * (np.log(DATA) - law))
    assert divergence < {1.0: 0.5, 0.01: 1e-3}[weight]  # without a weight the game ends at the data
    assert np.ptp(energies) <= 1 / weight


@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_the_game_played_ends_at_the_regularised_equilibrium(weight):
    """Gradient steps of the energy against a sampler that answers each of them: twelve states, to 1e-6."""
    with jax.enable_x64(True):
        batch = jnp.asarray(np.repeat(np.arange(12.0), COUNTS))
        data = jnp.asarray(DATA)
        base = jnp.log(jnp.asarray(np.linspace(1.0, 2.0, 12) / np.linspace(1.0, 2.0, 12).sum()))

        def loss(table, answer):
            potential = Tilted(Partial(lambda t, x: t[x.astype(int)], table), Fixed(_Table(base)))
            sampler = SamplerState(jnp.arange(12.0), base - answer, STILL)
            return generalized_contrastive_divergence(potential, sampler, batch, KEY, energy_weight=weight)[0]

        @jax.jit
        def play(table):
            def update(table, _):
                law = jax.nn.softmax(base - table)
                # Of the energy's quadratic loss the curvature at each state; half of it, for the sampler answers too.
                return table - jax.grad(loss)(table, table) / (4.0 * weight * (data + law)), None

            return jax.lax.scan(update, table, length=4000)[0]

        table = play(jnp.zeros(12))
        law = jax.nn.softmax(base - table)
        best = -jnp.tanh(0.5 * jnp.log(data / law)) / (2.0 * weight)
        np.testing.assert_allclose(table, best, atol=1e-6)
        assert jnp.abs(table).max() <= 1 / (2 * weight)
        # log q - log base + log Z is minus the energy, and the price of the penalty is not nothing.
        log_z = jax.nn.logsumexp(base - table)
        np.testing.assert_allclose(jnp.log(law) - base + log_z, -best, atol=1e-6)
        assert jnp.abs(law - data).max() > 1e-3


class _Table(NamedTuple):
    """A base over twelve states."""

    log_mass: Any

    def log_prob(self, x):
        return self.log_mass[x.astype(int)]


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_the_gaussian_saddle(variance):
    """U = a x^2 / 2 against q = N(0, u), data N(0, v): the gradient is (v - u) / 2, zero at u = v whatever a is."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    with jax.enable_x64(True):
        batch = jnp.asarray(np.sqrt(1.3) * np.array([-1.0, 1.0]))
        sampler = SamplerState(jnp.asarray(np.sqrt(variance) * nodes), jnp.log(jnp.asarray(weights)), STILL)

        def loss(a):
            return generalized_contrastive_divergence(
                lambda x: 0.5 * a * x**2, sampler, batch, jax.random.key(0), energy_weight=0.0
            )[0]

        np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.7), 0.5 * (1.3 - variance), rtol=1e-9)


def test_with_the_best_sampler_the_gradient_is_that_of_the_likelihood():
    with jax.enable_x64(True):
        parameters, grid = jnp.asarray(PARAMETERS), jnp.asarray(GRID)
        sampler = SamplerState(grid, -jax.vmap(Wells(parameters))(grid), STILL)

        @jax.jit
        @jax.grad
        def gradient(p, scale):
            weighted = sampler._replace(log_weight=scale * sampler.log_weight)
            return generalized_contrastive_divergence(Wells(p), weighted, jnp.asarray(BATCH), jax.random.key(0))[0]

        exact = exact_gradient(parameters, BATCH)
        np.testing.assert_allclose(gradient(parameters, 1.0), exact, rtol=1e-8, atol=1e-10)
        # A sampler that is a little too cold is another game.
        assert not np.allclose(gradient(parameters, 1.02), exact, rtol=1e-3)


def test_a_diffusion_sampler_gives_fresh_draws(key):
    diffuser = DiffusionSampler((), num_steps=2, key=key, width=4, depth=1)
    sampler = ebm.init_sampler(jnp.full(64, 9.0), kernels.raw_diffusion(diffuser))
    objective = functools.partial(generalized_contrastive_divergence, energy_weight=0.5)
    loss, (after, metrics) = eqx.filter_jit(objective)(lambda x: x**2, sampler, jnp.ones(8), key)
    energies = np.asarray(after.position) ** 2
    assert not np.isin(9.0, after.position)
    np.testing.assert_allclose(metrics["energy_negative"], energies.mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, 1.0 - energies.mean() + 0.5 * (1.0 + (energies**2).mean()), rtol=1e-5)


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


def test_the_energy_penalty_as_a_wrapper_is_that_of_the_generalised_objective(key):
    sampler = ebm.init_sampler(jnp.linspace(-1.0, 1.0, 6), kernels.unadjusted_langevin(0.05))
    batch = jnp.asarray(BATCH, jnp.float32)
    wrapped = energy_l2(persistent_steps(3), 0.3)
    ours = functools.partial(generalized_contrastive_divergence, num_steps=3, energy_weight=0.3)
    data_only = energy_l2(functools.partial(contrastive_divergence, num_steps=3), 0.3, at="data")

    @jax.jit
    def everything(sampler, batch, key):
        return [
            objective(quadratic, sampler, batch, key) for objective in (wrapped, ours, persistent_steps(3), data_only)
        ]

    *outputs, (plain, _), (_, (_, metrics)) = everything(sampler, batch, key)
    jax.tree.map(np.testing.assert_array_equal, *((x[0], x[1][0].position, x[1][1]) for x in outputs))
    penalty = outputs[0][1][1]["energy_l2"]
    np.testing.assert_allclose(outputs[0][0] - plain, 0.3 * penalty, rtol=1e-5)
    # Contrastive divergence keeps its negatives to itself; taking the sampler's chains for them would be wrong in silence.
    with pytest.raises(ValueError, match="objective: returned no negatives"):
        energy_l2(functools.partial(contrastive_divergence, num_steps=3), 0.3)(quadratic, sampler, batch, key)
    np.testing.assert_allclose(metrics["energy_l2"], np.mean((0.5 * BATCH**2) ** 2), rtol=1e-5)


def test_no_gradient_of_a_penalty_reaches_the_negatives():
    def loss(position, log_weight):
        sampler = SamplerState(position, log_weight, STILL)
        objective = gradient_penalty(energy_l2(persistent_steps(1), 1.0), 1.0, at="negatives")
        return objective(quadratic, sampler, jnp.zeros(2), jax.random.key(0))[0]

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.array([1.0, 2.0]), jnp.zeros(2)):
        np.testing.assert_array_equal(gradient, 0.0)


def test_the_gradient_penalty_lies_between_rows_and_negatives(key):
    """U = x^2 with all rows at 1 and all negatives at 3: slopes 2 x for x uniform between them."""
    sampler = SamplerState(jnp.full(16, 3.0), jnp.zeros(16), STILL)
    batch = jnp.full(40_000, 1.0)

    @jax.jit
    def penalties(key, target):
        def penalty(at):
            objective = gradient_penalty(persistent_steps(1), 1.0, at=at, target=target)
            return objective(lambda x: x**2, sampler, batch, key)[1][1]["gradient_penalty"]

        return [penalty(at) for at in ("interpolates", "data", "negatives")]

    between, at_rows, at_negatives = penalties(key, 1.0)
    # E (2 x - 1)^2 = 4 E x^2 - 4 E x + 1 over [1, 3]; its standard deviation is below 8.
    np.testing.assert_allclose(between, 4 * 26 / 6 - 8 + 1, atol=6 * 8 / np.sqrt(40_000))
    np.testing.assert_allclose([at_rows, at_negatives], [1.0, 25.0], rtol=1e-6)
    np.testing.assert_allclose(penalties(key, 0.0)[1:], [4.0, 36.0], rtol=1e-6)


def test_negatives_without_weight_are_not_penalised(key):
    sampler = SamplerState(jnp.array([3.0, 1e6]), jnp.array([0.0, -jnp.inf]), STILL)
    objective = gradient_penalty(persistent_steps(1), 1.0, at="negatives", target=0.0)
    _, (_, metrics) = eqx.filter_jit(objective)(quadratic, sampler, jnp.ones(100), key)
    np.testing.assert_allclose(metrics["gradient_penalty"], 9.0, rtol=1e-6)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_gradient_penalty_on_events_of_any_shape_has_the_right_gradient(key, target):
    """U = a sum x^2 / 2 at the data: the penalty is mean (a |x| - target)^2."""
    with jax.enable_x64(True):
        rows = jax.random.normal(key, (5, 2, 3))
        norms = np.sqrt(np.sum(np.asarray(rows) ** 2, axis=(1, 2)))
        plain = stateless(lambda potential, batch, key: jnp.zeros(()))
        objective = gradient_penalty(plain, 3.0, at="data", target=target)

        @jax.jit
        @jax.value_and_grad
        def compute(a):
            return objective(lambda x: 0.5 * a * jnp.sum(x**2), None, rows, key)[0]

        loss, gradient = compute(0.7)
        np.testing.assert_allclose(loss, 3.0 * np.mean((0.7 * norms - target) ** 2), rtol=1e-9)
        np.testing.assert_allclose(gradient, 3.0 * np.mean(2.0 * norms * (0.7 * norms - target)), rtol=1e-9)
        # An energy that starts at zero has no slope, and the root of that no derivative: finite all the same.
        assert np.isfinite(compute(0.0)[1])


def test_nan_slopes_are_not_hidden(key):
    plain = stateless(lambda potential, batch, key: jnp.zeros(()))
    loss, _ = gradient_penalty(plain, 1.0, at="data")(
        lambda x: jnp.where(x > 0, jnp.nan * x, x), None, jnp.ones(3), key
    )
    assert np.isnan(loss)


def test_fresh_wrappers_of_fresh_partials_do_not_recompile(key):
    traces = []

    @eqx.filter_jit
    def compute(objective, sampler, batch, key):
        traces.append(None)
        return objective(quadratic, sampler, batch, key)[0]

    sampler = ebm.init_sampler(jnp.zeros(4), kernels.mala(0.1))
    for weight in (0.1, 0.2):
        objective = gradient_penalty(energy_l2(persistent_steps(2), weight), weight)
        compute(objective, sampler, jnp.ones(3), key)
    assert len(traces) == 1


class Gaussian(eqx.Module):
    """U(x) = x'LL'x / 2."""

    factor: jax.Array

    def __call__(self, x):
        return 0.5 * jnp.sum((self.factor.T @ x) ** 2)


def test_a_gaussian_trained_by_fit_has_the_covariance_of_its_data(key):
    factor = jnp.array([[0.9, 0.0], [0.5, 0.7]])
    data = jax.random.normal(key, (1000, 2)) @ factor.T
    base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    sampler = ebm.init_sampler(base.sample(key, (1000,)), kernels.mala(0.3))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 300))
    found = []
    for weight in (0.0, 0.3):
        objective = functools.partial(
            generalized_contrastive_divergence, num_steps=3, energy_weight=jnp.asarray(weight)
        )
        state = ebm.init_train(Gaussian(jnp.eye(2)), optimizer, sampler)
        state, history = ebm.fit(key, state, data, objective, optimizer, num_steps=300, progress_bar=False)
        found.append(np.linalg.inv(state.potential.factor @ state.potential.factor.T))
        assert {"energy_gap", "energy_l2"} <= set(history)
    sample = np.cov(np.asarray(data).T, bias=True)
    np.testing.assert_allclose(found[0], sample, atol=0.1)
    assert np.trace(found[1]) > 1.3 * np.trace(found[0])  # the penalty flattens, and a fit must show it


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda s, k: generalized_contrastive_divergence(quadratic, s, jnp.ones(3), k, start="noise"), ValueError,
         "start: got 'noise'"),
        (lambda s, k: generalized_contrastive_divergence(quadratic, s, jnp.ones(3), k, num_steps=0), ValueError,
         "num_steps: got 0"),
        (lambda s, k: generalized_contrastive_divergence(quadratic, None, jnp.ones(3), k), TypeError,
         "sampler: got NoneType"),
        (lambda s, k: generalized_contrastive_divergence(quadratic, None, jnp.ones(3), k, start="data"), TypeError,
         "sampler: got NoneType"),
        (lambda s, k: generalized_contrastive_divergence(quadratic, s, jnp.ones(3), k, energy_weight=-1.0), ValueError,
         "energy_weight: got -1.0"),
        (lambda s, k: energy_l2(3, 1.0), TypeError, "objective: got int"),
        (lambda s, k: energy_l2(contrastive_divergence, "one"), TypeError, "weight: got 'one'"),
        (lambda s, k: energy_l2(contrastive_divergence, -0.1), ValueError, "weight: got -0.1"),
        (lambda s, k: energy_l2(contrastive_divergence, 1.0, at="chains"), ValueError, "at: got 'chains'"),
        (lambda s, k: gradient_penalty(contrastive_divergence, 1.0, at="chains"), ValueError, "at: got 'chains'"),
        (lambda s, k: gradient_penalty(contrastive_divergence, 1.0, target=np.nan), ValueError, "target: got nan"),
        (lambda s, k: gradient_penalty(functools.partial(contrastive_divergence, num_steps=1), 1.0)(
            quadratic, s, jnp.ones(3), k), ValueError, "objective: returned no negatives"),
        (lambda s, k: gradient_penalty(stateless(lambda u, b, k: u(b[0])), 1.0)(quadratic, None, jnp.ones(3), k),
         ValueError, "objective: returned no negatives"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(key, call, error, text):
    sampler = ebm.init_sampler(jnp.zeros(4), kernels.mala(0.1))
    with pytest.raises(error, match=text):
        call(sampler, key)
