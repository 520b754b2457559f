"""Objectives with weighted negatives, and the log Z that comes with them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.diffusion import DiffusionSampler
from ebm_ppl.kernels import reweighted as reweighted_module
from ebm_ppl.objectives import (
    importance_sampled_likelihood,
    jarzynski_chains,
    jarzynski_contrastive_divergence,
    persistent_contrastive_divergence,
)
from ebm_ppl.testing import t_test_chain_means
from ebm_ppl.weights import effective_size, log_mean_weight, resampled
from tests.wells import GRID, Wells, check_mean_gradient, exact_gradient, log_normalizer
from tests.wells import PARAMETERS as EXACT_PARAMETERS

PARAMETERS = jnp.asarray(EXACT_PARAMETERS, jnp.float32)
BATCH = jnp.array([-1.2, -0.9, 0.4, 0.8, 0.9, 1.0, 1.1, 1.3])


def replicates(gradient, key, num=64):
    """Independent gradients, one after the other."""
    return np.asarray(jax.jit(lambda keys: jax.lax.map(gradient, keys))(jax.random.split(key, num)))


# Arithmetic.


def test_the_mean_weight_and_its_variance():
    weight = np.array([[0.2, 3.0, 0.0, 1.1], [1.0, 1.0, 1.0, 1.0]])
    with np.errstate(divide="ignore"):
        log_weight = jnp.asarray(np.log(weight), jnp.float32)
    value, variance = log_mean_weight(log_weight)
    ess = weight.sum(axis=1) ** 2 / (weight**2).sum(axis=1)
    np.testing.assert_allclose(value, np.log(weight.mean(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(variance, 1 / ess - 1 / 4, atol=1e-6)
    np.testing.assert_allclose(effective_size(log_weight), ess, rtol=1e-5)
    assert np.isnan(log_mean_weight(jnp.full(3, -jnp.inf))[1])


def test_resampling_keeps_weights_on_average_and_nothing_dead(key):
    weight = jnp.array([0.0, 0.43, 0.34, 0.23, 0.0])
    particles = {"x": jnp.arange(5), "y": jnp.arange(5.0)[:, None]}
    run = jax.jit(lambda k, is_due: resampled(k, particles, jnp.log(weight), is_due))
    found = jax.vmap(run, in_axes=(0, None))(jax.random.split(key, 4000), True)
    np.testing.assert_array_equal(found["x"], found["y"][..., 0])
    counts = np.stack([(np.asarray(found["x"]) == i).mean(axis=1) for i in range(5)], axis=1)
    assert not counts[:, [0, 4]].any()
    for column, expected in zip(counts.T[1:4], weight[1:4], strict=True):
        t_test_chain_means(column, float(expected)).raise_if_failed()
    same = run(key, False)
    np.testing.assert_array_equal(same["x"], particles["x"])


# Importance sampling.


class Points(eqx.Module):
    """A "distribution" whose draws are the grid of the quadrature."""

    def sample_and_log_prob(self, key, num_samples):
        grid = jnp.asarray(GRID)
        return grid, jnp.full(grid.shape, -jnp.log(grid.size * (grid[1] - grid[0])))

    def log_prob(self, x):
        return jnp.zeros(x.shape)


def test_importance_weights_on_a_grid_give_the_exact_likelihood_and_gradient(key):
    with jax.enable_x64(True):
        parameters, batch = jnp.asarray(EXACT_PARAMETERS), jnp.asarray(np.asarray(BATCH), jnp.float64)

        def loss(p):
            return importance_sampled_likelihood(Wells(p), None, batch, key, proposal=Points(), num_samples=GRID.size)[
                0
            ]

        value, gradient = jax.jit(jax.value_and_grad(loss))(parameters)
        exact = jax.jit(lambda p: jax.vmap(Wells(p))(batch).mean() + log_normalizer(p))(parameters)
    np.testing.assert_allclose(value, exact, rtol=1e-10)
    np.testing.assert_allclose(gradient, exact_gradient(parameters, batch), rtol=1e-9)


def importance_gradients(key, fault=None):
    proposal = dist.Normal(0.0, 1.2)

    def gradient(key):
        def loss(p):
            if fault is None:
                return importance_sampled_likelihood(Wells(p), None, BATCH, key, proposal=proposal, num_samples=4096)[0]
            draws = proposal.sample(key, (4096,))
            log_weight = -jax.vmap(Wells(p))(draws)
            if fault == "equal weights":
                return jax.vmap(Wells(p))(BATCH).mean() + log_weight.mean()
            return jax.vmap(Wells(p))(BATCH).mean() + jax.nn.logsumexp(log_weight)

        return jax.grad(loss)(PARAMETERS)

    return replicates(gradient, key)


def test_the_importance_weighted_gradient_is_the_exact_one(key):
    exact = exact_gradient(PARAMETERS, BATCH)
    checks = check_mean_gradient(importance_gradients(key), exact)
    assert max(check.power for check in checks) < 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("fault", ["equal weights", "no proposal density"])
def test_wrong_importance_weights_are_seen_by_the_same_check(key, fault):
    with pytest.raises(AssertionError, match="FAILED"):
        check_mean_gradient(importance_gradients(key, fault), exact_gradient(PARAMETERS, BATCH))


def test_the_error_of_log_z_is_right_and_collapse_is_said(key):
    def run(key, scale, place):
        _, (_, metrics) = importance_sampled_likelihood(
            lambda x: 0.5 * jnp.sum((x - place) ** 2), None, jnp.zeros((2, 3)), key,
            proposal=dist.Normal(0.0, scale).expand([3]).to_event(1), num_samples=400,
        )  # fmt: skip
        return metrics

    keys = jax.random.split(key, 300)
    every = jax.jit(jax.vmap(run, in_axes=(0, None, None)))
    metrics = every(keys, 1.3, 0.0)
    np.testing.assert_allclose(metrics["log_normalizer_error"].mean(), metrics["log_normalizer"].std(), rtol=0.2)
    np.testing.assert_allclose(metrics["log_normalizer"].mean(), 1.5 * np.log(2 * np.pi), atol=0.02)
    assert not metrics["is_collapsed"].any()
    lost = every(keys, 0.1, 40.0)
    assert lost["is_collapsed"].all()
    assert np.isfinite(lost["log_normalizer"]).all()


def test_importance_training_reaches_maximum_likelihood_and_a_new_proposal_does_not_recompile(key):
    data = 1.5 + 0.5 * jax.random.normal(key, (200, 2))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 150))
    state = ebm.init_train(Gaussian(jnp.zeros(2), jnp.zeros(2)), optimizer)
    traces = 0

    def counted(*args, **options):
        nonlocal traces
        traces += 1
        return importance_sampled_likelihood(*args, **options)

    counts = []
    for place in (0.5, 1.4):
        proposal = dist.Normal(jnp.full(2, place), jnp.full(2, 1.2)).to_event(1)
        objective = functools.partial(counted, proposal=proposal, num_samples=512)
        state, history = ebm.fit(key, state, data, objective, optimizer, num_steps=150)
        counts.append(traces)
    assert counts[0] == counts[1]
    np.testing.assert_allclose(state.potential.place, data.mean(axis=0), atol=0.03)
    np.testing.assert_allclose(jnp.exp(-state.potential.log_precision), data.var(axis=0), rtol=0.1)
    likelihood = -dist.Normal(data.mean(axis=0), data.std(axis=0)).log_prob(data).sum(axis=1).mean()
    np.testing.assert_allclose(history["loss"][-20:].mean(), likelihood, atol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"proposal": dist.Normal(0.0, 1.0), "num_samples": 1}, ValueError, "num_samples: got 1"),
        ({"proposal": dist.Normal(0.0, jnp.ones(2)), "num_samples": 9}, ValueError, "proposal: got batch_shape"),
        ({"proposal": "normal", "num_samples": 9}, TypeError, "proposal: got str"),
        (
            {"proposal": dist.Normal(0.0, 1.0).expand([2]).to_event(1), "num_samples": 9},
            ValueError,
            r"proposal: got events of shape \(2,\), expected that of the rows",
        ),
    ],
)
def test_bad_proposals_are_refused(key, options, error, text):
    with pytest.raises(error, match=text):
        importance_sampled_likelihood(lambda x: x**2, None, jnp.zeros(4), key, **options)


# Weighted kernels under persistent contrastive divergence.


@pytest.mark.slow
def test_persistent_negatives_of_a_weighting_kernel_are_weighted(key):
    """The gradient in the log precision is (4 e^a - 1) / 2 for rows at +-2; untrained trajectories alone say other."""
    batch = jnp.array([[-2.0], [2.0]])
    kernel = kernels.diffusion(DiffusionSampler(1, num_steps=4, key=jax.random.key(0), width=8, depth=1))
    plain = kernels.raw_diffusion(kernel.keywords["sampler"])

    def gradients(kernel):
        sampler = ebm.init_sampler(jnp.zeros((1024, 1)), kernel)

        def gradient(key):
            def loss(value):
                potential = Gaussian(value[None], jnp.zeros(1))
                return persistent_contrastive_divergence(potential, sampler, batch, key, num_steps=1)[0]

            return jax.grad(loss)(jnp.full((), 0.7))

        return replicates(gradient, key)[:, None]

    exact = 2.0 * np.exp(0.7) - 0.5
    (check,) = check_mean_gradient(gradients(kernel), [exact])
    assert check.power < 0.15
    with pytest.raises(AssertionError, match="FAILED"):
        check_mean_gradient(gradients(plain), [exact])


# Jarzynski.


class Gaussian(eqx.Module):
    log_precision: jax.Array
    place: jax.Array

    def __call__(self, x):
        return 0.5 * jnp.sum(jnp.exp(self.log_precision) * (x - self.place) ** 2)

    @property
    def log_normalizer(self):
        return 0.5 * jnp.sum(jnp.log(2 * jnp.pi) - self.log_precision)


def ratios_along_a_path(key, kernel, path, exact, *, num_chains=32, num_replicates=1000):
    """Estimates of Z over exact Z, ``(replicate, step of the path)``, from chains that the path does not depend on."""

    def run(key):
        sampler = jarzynski_chains(key, dist.Normal(0.0, 1.5), kernel, num_chains)

        def move(carry, step):
            index, potential, log_z = step
            moved, _ = ebm.advance(jax.random.fold_in(key, index), potential, carry, 2)
            estimate, _ = log_mean_weight(moved.log_weight)
            carry = carry._replace(position=moved.position, log_weight=moved.log_weight, auxiliary=moved.auxiliary)
            return carry, jnp.exp(estimate - log_z)

        after, ratios = jax.lax.scan(move, sampler, (jnp.arange(exact.shape[0]), path, exact))
        return ratios, after.auxiliary.variance[0] > 0

    ratios, was_resampled = jax.jit(jax.vmap(run))(jax.random.split(key, num_replicates))
    assert was_resampled.mean() > 0.3
    return np.asarray(ratios)


def wells_path():
    parameters = np.array([[2.0 + 0.3 * i, 1.0, 0.3 - 0.05 * i] for i in range(8)])
    with jax.enable_x64(True):
        exact = np.asarray([log_normalizer(jnp.asarray(p)) for p in parameters])
    return Wells(jnp.asarray(parameters, jnp.float32)), jnp.asarray(exact, jnp.float32)


def gaussian_path():
    log_precision = jnp.linspace(-0.5, 3.0, 8)[:, None]
    path = Gaussian(log_precision, 0.5 * jnp.ones((8, 1)))
    return path, 0.5 * (jnp.log(2 * jnp.pi) - log_precision[:, 0])


def check_ratios(ratios):
    checks = [t_test_chain_means(ratios[:, step], 1.0) for step in (0, 3, ratios.shape[1] - 1)]
    for check in checks:
        check.raise_if_failed()
    return checks


@pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(kernels.mala(0.05), id="mala"),
        pytest.param(kernels.random_walk(0.5), id="random_walk", marks=pytest.mark.slow),
    ],
)
def test_the_running_normalizer_is_unbiased_along_a_fixed_path(key, kernel):
    checks = check_ratios(ratios_along_a_path(key, kernel, *wells_path()))
    assert checks[-1].power < 0.1


def test_unadjusted_steps_are_weighted_for_their_bias(key, monkeypatch):
    kernel = kernels.unadjusted_langevin(0.05)
    check_ratios(ratios_along_a_path(key, kernel, *gaussian_path()))
    monkeypatch.setattr(
        reweighted_module, "_reverse_ratio", lambda before, after, step_size: jnp.zeros_like(after.logdensity)
    )
    ratios = ratios_along_a_path(key, kernels.unadjusted_langevin(0.05), *gaussian_path())
    with pytest.raises(AssertionError, match="FAILED"):
        check_ratios(ratios)


@pytest.mark.parametrize("fault", ["energy", "weights without resampling"])
def test_a_wrong_weight_is_seen_by_the_same_check(key, fault, monkeypatch):
    if fault == "energy":
        monkeypatch.setattr(reweighted_module, "_energies", lambda potential, state: -0.9 * state.logdensity)
    else:
        monkeypatch.setattr(reweighted_module, "resampled", lambda key, particles, log_weight, is_due: particles)
    ratios = ratios_along_a_path(key, kernels.random_walk(0.5), *wells_path())
    with pytest.raises(AssertionError, match="FAILED"):
        check_ratios(ratios)


def test_a_kernel_without_an_accept_step_does_not_pass_for_one(key):
    sampler = jarzynski_chains(key, dist.Normal(0.0, 1.0), kernels.langevin(0.1), 16)
    objective = functools.partial(jarzynski_contrastive_divergence, jax.tree_util.Partial(jnp.square), num_steps=1)
    loss, (after, metrics) = jax.jit(objective)(sampler, BATCH, key)
    assert np.isnan(loss)
    assert np.isnan(after.log_weight).all()
    assert np.isnan(metrics["log_normalizer"])
    assert metrics["is_collapsed"]


def lagging_gradients(objective, key):
    """Chains at N(0, 1.5^2) are asked for the gradient of wells that they have never seen, after hardly a move."""

    def gradient(key):
        start_key, key = jax.random.split(key)
        sampler = jarzynski_chains(start_key, dist.Normal(0.0, 1.5), kernels.mala(1e-6), 8192)
        return jax.grad(lambda p: objective(Wells(p), sampler, BATCH, key)[0])(PARAMETERS)

    return replicates(gradient, key)


def test_weights_make_up_for_the_lag_of_the_chains(key):
    exact = exact_gradient(PARAMETERS, BATCH)
    objective = functools.partial(jarzynski_contrastive_divergence, num_steps=1)
    checks = check_mean_gradient(lagging_gradients(objective, key), exact)
    assert max(check.power for check in checks) < 0.1 * np.linalg.norm(exact)


def test_chains_without_weights_lag_in_the_same_check(key):
    def unweighted(potential, sampler, batch, key):
        plain = ebm.init_sampler(sampler.position, kernels.mala(1e-6))
        return persistent_contrastive_divergence(potential, plain, batch, key, num_steps=1)

    with pytest.raises(AssertionError, match="FAILED"):
        check_mean_gradient(lagging_gradients(unweighted, key), exact_gradient(PARAMETERS, BATCH))


def train_tracked(key, num_held_out, num_chains):
    """Errors of the running log Z in units of their stated error, over independent runs of training."""
    data = jnp.array([1.0, -1.0]) + 0.5 * jax.random.normal(key, (256, 2))
    reference = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 300))
    objective = functools.partial(jarzynski_contrastive_divergence, num_steps=2, num_held_out=num_held_out)
    sampler = jarzynski_chains(key, reference, kernels.mala(0.1), num_chains)
    state = ebm.init_train(Gaussian(jnp.zeros(2), jnp.zeros(2)), optimizer, sampler)
    state, history = ebm.fit(key, state, data, objective, optimizer, num_steps=300, target_acceptance=0.6)
    error = history["log_normalizer"][-1] - float(state.potential.log_normalizer)
    return error, history, state, data


@pytest.mark.slow
def test_training_reaches_maximum_likelihood_and_knows_its_normalizer(key):
    error, history, state, data = train_tracked(key, None, 256)
    np.testing.assert_allclose(state.potential.place, data.mean(axis=0), atol=0.06)
    np.testing.assert_allclose(jnp.exp(-state.potential.log_precision), data.var(axis=0), rtol=0.15)
    assert history["log_normalizer_error"][-1] < 0.15
    assert abs(error) < 5 * history["log_normalizer_error"][-1]
    likelihood = -dist.Normal(data.mean(axis=0), data.std(axis=0)).log_prob(data).sum(axis=1).mean()
    np.testing.assert_allclose(history["loss"][-1], likelihood, atol=5 * history["log_normalizer_error"][-1])
    assert not history["is_collapsed"].any()


@pytest.mark.slow
def test_the_chains_of_the_gradient_would_not_know_it(key):
    """The same run measured on the chains of the gradient: every pull of the gradient counts as a loss of Z."""
    error, history, _, _ = train_tracked(key, 0, 32)
    assert error < -3 * history["log_normalizer_error"][-1]


def test_restarted_chains_weigh_what_fresh_draws_weigh(key):
    """Weights are totals: a draw of the reference that has seen nothing enters with weight one at any time."""
    sampler = jarzynski_chains(key, dist.Normal(0.0, 1.0), kernels.mala(0.1), 64)
    old = sampler.auxiliary._replace(log_weight=jnp.full(64, 5.0))
    sampler = sampler._replace(log_weight=old.log_weight, auxiliary=old)
    again = ebm.replay.restart(key, sampler, jnp.linspace(-1.0, 1.0, 64), 1.0)
    np.testing.assert_array_equal(again.auxiliary.log_weight, 0.0)
    np.testing.assert_allclose(again.auxiliary.energy, 0.5 * jnp.linspace(-1.0, 1.0, 64) ** 2 + 0.9189385, rtol=1e-5)


@pytest.mark.parametrize(
    ("num_held_out", "error", "text"),
    [(7, ValueError, "num_held_out: got 7 of 8"), (1, ValueError, "num_held_out: got 1"), (0.5, TypeError, "num_held")],
)
def test_bad_groups_are_refused(key, num_held_out, error, text):
    sampler = jarzynski_chains(key, dist.Normal(0.0, 1.0), kernels.mala(0.1), 8)
    with pytest.raises(error, match=text):
        jarzynski_contrastive_divergence(lambda x: x**2, sampler, BATCH, key, num_steps=1, num_held_out=num_held_out)


def test_other_samplers_and_bad_chains_are_refused(key):
    plain = ebm.init_sampler(jnp.zeros(8), kernels.mala(0.1))
    with pytest.raises(TypeError, match="sampler: got chains that carry no weights"):
        jarzynski_contrastive_divergence(lambda x: x**2, plain, BATCH, key, num_steps=1)
    with pytest.raises(TypeError, match="sampler: got NoneType"):
        jarzynski_contrastive_divergence(lambda x: x**2, None, BATCH, key, num_steps=1)
    for options, error, text in [
        ({"min_ess": 1.5}, ValueError, "min_ess: got 1.5"),
        ({"kernel": kernels.tempered_smc(inner=kernels.mala(0.1))}, TypeError, "kernel: got a kernel that draws"),
        ({"reference": lambda key, n: None}, TypeError, "reference: got function"),
        ({"num_chains": 0}, ValueError, "num_chains: got 0"),
    ]:
        complete = {"reference": dist.Normal(0.0, 1.0), "kernel": kernels.mala(0.1), "num_chains": 8, **options}
        with pytest.raises(error, match=text):
            jarzynski_chains(key, **complete)
