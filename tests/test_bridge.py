"""Bridge sampling: the identity, its error for independent and for correlated draws, and what it must flag."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl import targets
from ebm_ppl.normalizer import bridge_sampling
from ebm_ppl.normalizer.bisection import bracket_sign_change
from ebm_ppl.normalizer.fitted_normal import fit_normal
from ebm_ppl.testing import t_test_chain_means

# Most of the time here is XLA's. Values do not depend on how hard it tries.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
bridge = sys.modules["ebm_ppl.normalizer.bridge"]


def site(name):
    target = targets.get(name)
    return ebm.EBM(target.potential, target.base), target


# --- the parts -----------------------------------------------------------------------------------------------------


def test_a_sign_change_is_bracketed_to_rounding():
    low, high = bracket_sign_change(lambda x: x - jnp.array([0.3, -700.0, 0.0]), jnp.full(3, -1e3), jnp.full(3, 1e3))
    np.testing.assert_allclose(low, [0.3, -700.0, 0.0], atol=1e-4)
    assert (low <= high).all()


def test_a_fitted_normal_is_that_of_the_moments(key):
    points = jax.random.normal(key, (500, 2, 2)) * jnp.array([[1.0, 3.0], [0.1, 2.0]]) + 1.0
    fitted = fit_normal(points)
    flat = np.asarray(points).reshape(500, 4)
    exact = dist.MultivariateNormal(flat.mean(axis=0), np.cov(flat.T) + 1e-4 * np.cov(flat.T).trace() / 4 * np.eye(4))
    draws, log_prob = fitted.sample_and_log_prob(key, 7)
    assert draws.shape == (7, 2, 2)
    np.testing.assert_allclose(log_prob, exact.log_prob(draws.reshape(7, 4)), rtol=1e-3)
    scalars = fit_normal(jnp.arange(10.0))
    assert scalars.sample_and_log_prob(key, 3)[0].shape == (3,)


# --- independent draws ---------------------------------------------------------------------------------------------

RUNS = 100


def z_scores(name, key, num_samples=1000, **options):
    """Errors of independent runs in units of the stated one, and how many were reliable."""
    found, target = site(name)
    samples = target.sample(key, RUNS * num_samples).reshape(RUNS, num_samples, *target.event_shape)
    run = lambda key, samples: bridge_sampling(key, found, samples, **options)
    result = fast_jit(jax.vmap(run))(jax.random.split(key, RUNS), samples)
    z = (np.asarray(result.value, float) - target.log_normalizer) / np.asarray(result.standard_error, float)
    return z, np.asarray(result.reliable)


OTHERS = ("gumbel", "student_t", "ring", "dirichlet", "many_well", "double_well", "gaussian_10")


@pytest.mark.parametrize("name", ["gaussian_mixture", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_value_is_right_and_so_is_its_error(name, key):
    z, reliable = z_scores(name, key)
    t_test_chain_means(z, 0.0, name="mean error").raise_if_failed()
    t_test_chain_means(np.square(z), 1.0, name="squared error").raise_if_failed()
    assert reliable.mean() > 0.9


def no_jacobian(key, monkeypatch):
    densities = bridge.row_densities

    def without(ebm, reference, row):
        start, end = densities(ebm, reference, row)
        return start, lambda point: end(point) - point

    monkeypatch.setattr(bridge, "row_densities", without)
    return z_scores("gamma", key)[0]


def distorted_proposal_density(key, monkeypatch):
    density = bridge.log_density
    monkeypatch.setattr(bridge, "log_density", lambda *args: 1.02 * density(*args))
    return z_scores("gaussian_mixture", key)[0]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [no_jacobian, distorted_proposal_density])
def test_seeded_faults_are_caught(fault, key, monkeypatch):
    z = fault(key, monkeypatch)
    means = t_test_chain_means(z, 0.0, name="mean error"), t_test_chain_means(np.square(z), 1.0, name="squared error")
    assert not all(check.passed for check in means)


def test_a_given_proposal_uses_every_sample_and_a_perfect_one_has_no_error(key):
    gaussian = ebm.EBM(lambda x: 0.5 * x**2, dist.ImproperUniform(constraints.real, (), ()))
    samples = jax.random.normal(key, (100,))
    found = bridge_sampling(key, gaussian, samples, proposal=dist.Normal(0.0, 1.0), num_proposals=300)
    np.testing.assert_allclose(found.value, 0.5 * math.log(2 * math.pi), rtol=1e-5)
    assert found.standard_error < 1e-5
    np.testing.assert_allclose(found.ess, 400, rtol=0.2)
    assert np.isnan(found.pareto_khat)
    assert found.num_gradients == 0


@pytest.mark.slow
def test_rows_images_and_bits(key):
    rows = ebm.EBM(
        lambda x, c: 0.5 * jnp.sum((x - c) ** 2), dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2),
        condition=jnp.array([0.0, 1.0, 3.0]),
    )  # fmt: skip
    exact = 2 * (-0.5 * math.log(2.0) - jnp.array([0.0, 1.0, 3.0]) ** 2 / 4)
    means = jnp.array([0.0, 0.5, 1.5])[:, None, None]
    samples = means + math.sqrt(0.5) * jax.random.normal(key, (4, 200, 3, 2, 1))
    found = bridge_sampling(key, rows, samples)
    assert found.value.shape == found.reliable.shape == (3,)
    assert (np.abs(found.value - exact) < 5 * found.standard_error).all()
    assert found.reliable.all()
    target = targets.get_discrete("rbm_12x6")
    bits = ebm.EBM(target.potential, dist.ImproperUniform(constraints.boolean, (), (12,)))
    samples = target.sample(key, 2000)
    proposal = dist.Bernoulli(probs=samples[:1000].mean(axis=0)).to_event(1)
    found = bridge_sampling(key, bits, samples[1000:], proposal=proposal, num_proposals=4000)
    assert abs(found.value - target.log_normalizer) < 5 * found.standard_error < 0.25
    assert found.reliable
    stuck = bridge_sampling(key, bits, jnp.repeat(samples[:1], 1000, axis=0), proposal=proposal)
    assert not stuck.reliable


def test_the_gradient_is_the_mean_over_the_samples(key):
    samples = 0.7 * jax.random.normal(key, (200,))

    def value(precision, samples):
        found = ebm.EBM(lambda x: 0.5 * precision * x**2, dist.Normal(0.0, 1.0))
        return bridge_sampling(key, found, samples).value

    slope, into = fast_jit(jax.grad(value, (0, 1)))(1.0, samples)
    np.testing.assert_allclose(slope, -0.5 * np.mean(np.square(samples[100:])), rtol=1e-5)
    assert (into == 0.0).all()


# --- chains --------------------------------------------------------------------------------------------------------


def autoregressive(key, correlation, chains, draws):
    """Stationary chains of the standard normal law, ``(chain, draw)``."""
    first, *noise = jax.random.normal(key, (draws, chains))

    def step(x, noise):
        x = correlation * x + math.sqrt(1 - correlation**2) * noise
        return x, x

    return jnp.concatenate([first[None], jax.lax.scan(step, first, jnp.stack(noise))[1]]).T


def chain_z_scores(key):
    gaussian = ebm.EBM(lambda x: 0.5 * x**2, dist.ImproperUniform(constraints.real, (), ()))

    def run(key):
        samples = autoregressive(key, 0.9, 4, 500)
        return bridge_sampling(key, gaussian, samples, proposal=dist.Normal(0.5, 1.5), num_proposals=2000)

    found = fast_jit(lambda keys: jax.lax.map(run, keys, batch_size=25))(jax.random.split(key, 100))
    return (np.asarray(found.value, float) - 0.5 * math.log(2 * math.pi)) / np.asarray(found.standard_error, float)


@pytest.mark.slow
def test_correlated_draws_have_a_larger_error(key, monkeypatch):
    z = chain_z_scores(key)
    t_test_chain_means(z, 0.0, name="mean error").raise_if_failed()
    assert 0.8 < np.square(z).mean() < 1.35  # the effective size is itself an estimate
    monkeypatch.setattr(bridge, "_size", lambda series, tolerance=0.0: jnp.asarray(float(series.size)))
    assert np.square(chain_z_scores(key)).mean() > 2.0


def two_modes(key, weight, chains=8, draws=250):
    """Draws of a normal mixture at -3 and 3 whose chains never cross: so many of the chains on the left."""
    side = jnp.where(jnp.arange(chains) < round(weight * chains), -3.0, 3.0)
    return side[:, None] + jax.random.normal(key, (chains, draws))


TWO = ebm.EBM(
    lambda x: -jnp.logaddexp(-0.5 * (x - 3.0) ** 2, -0.5 * (x + 3.0) ** 2),
    dist.ImproperUniform(constraints.real, (), ()),
)
TWO_LOG_Z = math.log(2.0) + 0.5 * math.log(2 * math.pi)


def test_what_gives_draws_away_is_flagged(key):
    run = fast_jit(lambda key, samples, scale: bridge_sampling(key, TWO, samples, proposal=dist.Normal(1.0, scale)))
    # Chains that never cross are too unlike each other to be many draws.
    assert not run(key, two_modes(key, 0.5), 3.0).reliable
    # A proposal that reaches what no sample ever did.
    one_mode = run(key, two_modes(key, 0.0), 1.8)
    assert not one_mode.reliable
    # Frozen chains, and a proposal with hardly any overlap.
    assert not run(key, jnp.repeat(two_modes(key, 0.5)[:, :1], 250, axis=1), 3.0).reliable
    assert not run(key, two_modes(key, 0.5), 0.02).reliable
    mixed = jax.random.permutation(key, two_modes(key, 0.5).ravel()).reshape(8, 250)
    good = run(key, mixed, 3.0)
    assert good.reliable
    assert abs(good.value - TWO_LOG_Z) < 5 * good.standard_error


def test_a_mode_that_nobody_visited_leaves_no_trace(key):
    """The limitation that the docstring states: the value is that of the part that was seen."""
    found = bridge_sampling(key, TWO, 3.0 + 0.9 * jax.random.truncated_normal(key, -3.0, 3.0, (8, 250)))
    assert abs(found.value - (TWO_LOG_Z - math.log(2.0))) < 0.1


def false_alarms(key, runs=400):
    """How often independent draws of two modes are called unreliable."""

    def run(key):
        side = 3.0 * jax.random.rademacher(key, (400,), float)
        samples = side + jax.random.normal(jax.random.fold_in(key, 1), (400,))
        return bridge_sampling(key, TWO, samples, proposal=dist.Normal(1.0, 3.0)).reliable

    return int((~fast_jit(jax.vmap(run))(jax.random.split(key, runs))).sum())


@pytest.mark.slow
def test_good_draws_are_seldom_flagged(key):
    assert false_alarms(key) <= 8


def test_bad_arguments_are_refused(key):
    gaussian = ebm.EBM(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"samples: got shape \(20,\), expected at least 100 along the sample axis"):
        bridge_sampling(key, gaussian, jnp.zeros(20))
    with pytest.raises(ValueError, match=r"samples: got shape \(4, 20\), expected at least 50 along the draw axis"):
        bridge_sampling(key, gaussian, jnp.zeros((4, 20)))
    with pytest.raises(ValueError, match=r"samples: got shape \(4, 5, 6\), expected \(sample\)"):
        bridge_sampling(key, gaussian, jnp.zeros((4, 5, 6)))
    with pytest.raises(ValueError, match=r"samples: got 1 of 100 events NaN or infinite, the first at index 3"):
        bridge_sampling(key, gaussian, jnp.zeros(100).at[3].set(jnp.nan))
    vector = ebm.EBM(lambda x: 0.5 * jnp.sum(x**2), dist.Normal(0.0, 1.0).expand([60]).to_event(1))
    with pytest.raises(ValueError, match=r"samples: got 100 draws in 60 .*expected at least 240.*proposal=\.\.\."):
        bridge_sampling(key, vector, jnp.zeros((100, 60)))
    with pytest.raises(ValueError, match=r"proposal: got events of shape \(\), expected .*\(60,\)"):
        bridge_sampling(key, vector, jnp.zeros((100, 60)), proposal=dist.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="log_prob"):
        bridge_sampling(key, gaussian, jnp.zeros(100), proposal=3.0)
    bits = ebm.EBM(lambda x: 0.3 * jnp.sum(x), dist.Bernoulli(0.5).expand([4]).to_event(1))
    with pytest.raises(TypeError, match=r"proposal: got none for the discrete support"):
        bridge_sampling(key, bits, jnp.zeros((100, 4), int))
    circle = ebm.EBM(lambda x: -jnp.cos(x), dist.VonMises(0.0, 1.0))
    with pytest.raises(NotImplementedError, match="one to one"):
        bridge_sampling(key, circle, jnp.zeros(100))
    with pytest.raises(ValueError, match=r"num_proposals: got 3"):
        bridge_sampling(key, gaussian, jnp.zeros(100), num_proposals=3)
