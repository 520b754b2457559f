"""Log-likelihoods of data, and the errors of the data and of log Z in them and in their differences."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.errors import NonFiniteEnergyError, UnknownNormalizerError
from ebm_ppl.normalizer import (
    LogNormalizer,
    LogNormalizerBounds,
    MeanLogLikelihood,
    compare_log_likelihoods,
    data_likelihood,
    likelihood_rows,
    log_likelihood,
)
from ebm_ppl.testing import binomial_test, t_test_chain_means

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def estimate(value, error, reliable: Any = True):
    """What a normaliser returns."""
    shape = jnp.shape(value)
    fields = value, error, 812.0, jnp.nan, 7, reliable
    return LogNormalizer(*(jnp.broadcast_to(jnp.asarray(field), shape) for field in fields))


def normal(mean=0.0, log_normalizer=None):
    """N(mean, 1) as an energy on the line; its log Z is ``log(2 pi) / 2``."""
    line = dist.ImproperUniform(constraints.real, (), ())
    return ebm.EBM(lambda x: 0.5 * (x - mean) ** 2, line, log_normalizer=log_normalizer)


def rows(means):
    line = dist.ImproperUniform(constraints.real, (), ())
    return ebm.EBM(lambda x, mean: 0.5 * (x - mean) ** 2, line, condition=jnp.asarray(means))


DATA = np.random.default_rng(0).normal(size=200)


def test_the_mean_is_that_of_the_log_density():
    exact = np.asarray(dist.Normal(0.0, 1.0).log_prob(DATA))
    found = log_likelihood(normal(), DATA, HALF_LOG_2PI)
    np.testing.assert_allclose(found.value, exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.data_error, exact.std(ddof=1) / math.sqrt(200), rtol=1e-5)
    np.testing.assert_allclose(found.standard_error, found.data_error)
    assert found.log_normalizer_error == 0.0
    assert found.num_rows == 200
    assert found.reliable
    own = log_likelihood(normal(log_normalizer=HALF_LOG_2PI), DATA)
    assert all(np.array_equal(a, b) for a, b in zip(own, found, strict=True))
    images = ebm.EBM(lambda x: jnp.sum(x**2), dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2))
    found = log_likelihood(images, np.ones((9, 2, 1)), 0.5)
    np.testing.assert_allclose(found.value, 2 * (-HALF_LOG_2PI - 0.5) - 2 - 0.5, rtol=1e-6)


def test_the_error_of_one_log_z_does_not_average_out():
    few, many = (log_likelihood(normal(), DATA[:n], estimate(HALF_LOG_2PI, 0.1)) for n in (20, 200))
    for found in (few, many):
        np.testing.assert_allclose(found.log_normalizer_error, 0.1, rtol=1e-6)
        np.testing.assert_allclose(found.standard_error, math.hypot(found.data_error, 0.1), rtol=1e-5)
    assert many.data_error < few.data_error


def test_the_errors_of_rows_average_out_and_one_for_all_of_them_does_not():
    means = np.linspace(-1.0, 1.0, 200)
    own = log_likelihood(rows(means), DATA + means, estimate(jnp.full(200, HALF_LOG_2PI), 0.1))
    shared = log_likelihood(rows(means), DATA + means, estimate(HALF_LOG_2PI, 0.1))
    np.testing.assert_allclose(own.value, shared.value)
    np.testing.assert_allclose(own.log_normalizer_error, 0.1 / math.sqrt(200), rtol=1e-5)
    np.testing.assert_allclose(shared.log_normalizer_error, 0.1, rtol=1e-6)


def coverage(key, combine, *, num_rows, num_estimates, of_pair=False):
    """Replicates whose 95 % interval has the true mean in it: rows and log Z are drawn anew in each."""
    data_key, *log_z_keys = jax.random.split(key, 3)
    data = jax.random.normal(data_key, (400, num_rows))
    means = jnp.zeros(num_rows)

    def one(data, first, second):
        shape = (num_estimates,) if num_estimates > 1 else ()
        log_zs = (estimate((HALF_LOG_2PI + 0.3 * x[:num_estimates]).reshape(shape), 0.3) for x in (first, second))
        a, b = (rows(means) if num_estimates > 1 else normal() for _ in range(2))
        if not of_pair:
            return combine(a, data, next(log_zs))
        first_log_z, second_log_z = log_zs
        shifted = (
            ebm.EBM(lambda x, c: 0.5 * (x - 1.0) ** 2, b.base, condition=means) if num_estimates > 1 else normal(1.0)
        )
        return combine(a, shifted, data, first_log_normalizer=first_log_z, second_log_normalizer=second_log_z)

    noise = (jax.random.normal(k, (400, num_rows)) for k in log_z_keys)
    found = jax.jit(jax.vmap(one))(data, *noise)
    truth = 0.5 if of_pair else -HALF_LOG_2PI - 0.5
    return int((jnp.abs(found.value - truth) <= 1.96 * found.standard_error).sum())


CASES = [(60, 1, False), (60, 60, False), (60, 1, True), (60, 60, True)]


@pytest.mark.parametrize(("num_rows", "num_estimates", "of_pair"), CASES)
def test_errors_cover(key, num_rows, num_estimates, of_pair):
    combine = compare_log_likelihoods if of_pair else log_likelihood
    count = coverage(key, combine, num_rows=num_rows, num_estimates=num_estimates, of_pair=of_pair)
    binomial_test(count, 400, 0.945, name="coverage").raise_if_failed()


def test_errors_that_leave_out_log_z_or_count_it_wrongly_do_not_cover(key, monkeypatch):
    def without(*args):
        found = log_likelihood(*args)
        return found._replace(standard_error=found.data_error)

    assert not binomial_test(coverage(key, without, num_rows=60, num_estimates=1), 400, 0.945).passed
    average = data_likelihood._average

    def averaged_out(log_density, normalizer_variance, shared_variance, reliable):
        return average(log_density, normalizer_variance / log_density.size, 0.0 * shared_variance, reliable)

    monkeypatch.setattr(data_likelihood, "_average", averaged_out)
    assert not binomial_test(coverage(key, log_likelihood, num_rows=60, num_estimates=1), 400, 0.945).passed


def test_the_error_of_each_part_is_the_spread_of_that_part(key):
    """With a log Z of its own for each row, the spread of the rows shows both; the two parts are told apart."""
    data = DATA[:40]

    def one(noise):
        return log_likelihood(rows(jnp.zeros(40)), data, estimate(HALF_LOG_2PI + noise, 0.8))

    found = jax.jit(jax.vmap(one))(0.8 * jax.random.normal(key, (300, 40)))
    exact = float(np.var(dist.Normal(0.0, 1.0).log_prob(data), ddof=1)) / 40
    t_test_chain_means(np.square(found.data_error), exact, name="data").raise_if_failed()
    t_test_chain_means(np.square(found.standard_error), exact + 0.64 / 40, name="total").raise_if_failed()


def test_comparison_is_paired():
    """Rows of very unlike difficulty: the difference is constant, and its error nil, where each mean has a large one."""
    wide = ebm.EBM(lambda x: 0.5 * x**2 + 3.0, dist.ImproperUniform(constraints.real, (), ()))
    found = compare_log_likelihoods(
        normal(), wide, 100 * DATA, first_log_normalizer=HALF_LOG_2PI, second_log_normalizer=HALF_LOG_2PI
    )
    np.testing.assert_allclose(found.value, 3.0, rtol=1e-3)
    assert found.standard_error < 1e-3
    assert log_likelihood(normal(), 100 * DATA, HALF_LOG_2PI).standard_error > 100.0


def test_comparison_with_a_baseline():
    data = np.random.default_rng(1).normal(size=(100, 3))
    site = ebm.EBM(lambda x: 0.5 * jnp.sum(x**2), dist.ImproperUniform(constraints.real_vector, (), (3,)))
    baseline = dist.MultivariateNormal(jnp.ones(3), 2.0 * jnp.eye(3))
    log_z = estimate(3 * HALF_LOG_2PI, 0.02)
    found = compare_log_likelihoods(site, baseline, data, first_log_normalizer=log_z)
    terms = np.asarray(dist.Normal(0.0, 1.0).log_prob(data).sum(axis=1) - baseline.log_prob(data))
    np.testing.assert_allclose(found.value, terms.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.data_error, terms.std(ddof=1) / 10, rtol=1e-4)
    np.testing.assert_allclose(found.log_normalizer_error, 0.02, rtol=1e-5)
    back = compare_log_likelihoods(baseline, site, data, second_log_normalizer=log_z)
    np.testing.assert_allclose(back.value, -found.value, rtol=1e-5)
    np.testing.assert_allclose(back.standard_error, found.standard_error, rtol=1e-5)


def test_both_errors_of_log_z_count():
    options = {
        "first_log_normalizer": estimate(HALF_LOG_2PI, 0.3),
        "second_log_normalizer": estimate(HALF_LOG_2PI, 0.4),
    }
    found = compare_log_likelihoods(normal(), normal(1.0), DATA, **options)
    np.testing.assert_allclose(found.log_normalizer_error, 0.5, rtol=1e-5)


def test_doubt_about_log_z_is_passed_on():
    doubtful = estimate(HALF_LOG_2PI, 0.1, reliable=False)
    for found in (
        log_likelihood(normal(), DATA, doubtful),
        log_likelihood(normal(log_normalizer=doubtful), DATA),
        log_likelihood(rows(DATA), DATA, estimate(jnp.full(200, HALF_LOG_2PI), 0.1, jnp.arange(200) != 7)),
        compare_log_likelihoods(normal(), dist.Normal(0.0, 1.0), DATA, first_log_normalizer=doubtful),
    ):
        assert not found.reliable
        assert repr(found).endswith("UNRELIABLE log Z")


def test_discrete_data_and_a_gradient():
    bits = ebm.EBM(lambda x: 0.3 * jnp.sum(x), dist.Bernoulli(0.5).expand([4]).to_event(1))
    data = np.random.default_rng(0).integers(0, 2, size=(50, 4))
    log_z = ebm.normalizer.enumerate_states(bits)
    exact = dist.Bernoulli(logits=-0.3).log_prob(data).sum(axis=1)
    np.testing.assert_allclose(log_likelihood(bits, data, log_z).value, exact.mean(), rtol=1e-5)

    def of(precision):
        site = ebm.EBM(lambda x: 0.5 * precision * x**2, dist.ImproperUniform(constraints.real, (), ()))
        return log_likelihood(site, DATA, HALF_LOG_2PI - 0.5 * jnp.log(precision)).value

    np.testing.assert_allclose(jax.grad(of)(2.0), 0.25 - 0.5 * np.mean(DATA**2), rtol=1e-4)


def test_one_row_has_no_error_of_its_own():
    found = log_likelihood(normal(), DATA[:1], HALF_LOG_2PI)
    assert np.isfinite(found.value)
    assert np.isnan(found.data_error)
    assert np.isnan(found.standard_error)


def test_a_likelihood_prints_in_one_line():
    found = MeanLogLikelihood(*map(jnp.asarray, (-1.234, 0.02, 0.016, 0.012, 360, True)))
    text = "-1.234 ± 0.020 nats per row (data 0.016, log Z 0.012; 360 rows)"
    assert repr(found) == str(found) == text
    assert repr(found._replace(reliable=jnp.array(False))) == text + ", UNRELIABLE log Z"


def test_bad_data_and_missing_log_z_are_refused(monkeypatch):
    site = normal(log_normalizer=HALF_LOG_2PI)
    with pytest.raises(UnknownNormalizerError, match=r"ebm: got an EBM whose log Z is unknown.*annealed_importance"):
        log_likelihood(normal(), DATA)
    with pytest.raises(UnknownNormalizerError, match=r"known up to a constant only \(policy 'constant'\)"):
        log_likelihood(normal().with_normalizer(0.0, "constant"), DATA)
    with pytest.raises(UnknownNormalizerError, match=r"second: got an EBM whose log Z is unknown"):
        compare_log_likelihoods(site, normal(), DATA)
    with pytest.raises(ValueError, match=r"data: got 2 of 3 events NaN or infinite, the first at index 1"):
        log_likelihood(site, np.array([0.0, np.nan, np.inf]))
    with pytest.raises(ValueError, match=r"data: got shape \(0,\), which is empty"):
        log_likelihood(site, np.zeros(0))
    with pytest.raises(ValueError, match=r"data: got shape \(3, 1\), expected \(row\)"):
        log_likelihood(site, np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"data: got 1 of 2 events outside the support, the first at index 1"):
        log_likelihood(ebm.EBM(lambda x: x, dist.Exponential(1.0)), np.array([1.0, -1.0]), 0.0)
    with pytest.raises(ValueError, match=r"data: got shape \(3,\), expected \(2\)"):
        log_likelihood(rows([0.0, 1.0]), np.zeros(3), 0.0)
    with pytest.raises(TypeError, match=r"data: got dtype int32, expected floating"):
        log_likelihood(site, np.arange(3))
    with pytest.raises(ValueError, match=r"log_normalizer: got shape \(2,\)"):
        log_likelihood(site, DATA, jnp.zeros(2))
    one = estimate(0.0, 0.1)
    lower, upper, confidence, gap, reliable = map(jnp.asarray, (0.0, 1.0, 0.9, 0.0, True))
    bounds = LogNormalizerBounds(lower, upper, confidence, one, one, gap, reliable)
    with pytest.raises(TypeError, match=r"log_normalizer: got bounds .* bounds.reverse"):
        log_likelihood(site, DATA, bounds)
    broken = ebm.EBM(lambda x: jnp.where(x > 2.0, jnp.nan, x**2), dist.Normal(0.0, 1.0))
    with pytest.raises(NonFiniteEnergyError, match=r"not finite at 1 of 2 rows, the first at index 1"):
        log_likelihood(broken, np.array([0.0, 3.0]), 0.0)


def test_what_cannot_be_compared_is_refused():
    site = normal(log_normalizer=HALF_LOG_2PI)
    with pytest.raises(TypeError, match=r"second: got the support .*, expected two densities or two probabilities"):
        compare_log_likelihoods(site, dist.Bernoulli(0.5), DATA)
    with pytest.raises(TypeError, match=r"second: got str, expected an EBM, or a distribution"):
        compare_log_likelihoods(site, "normal", DATA)
    with pytest.raises(TypeError, match=r"second: got an EBM inside ExpandedDistribution"):
        compare_log_likelihoods(site, site.expand([200]), DATA)
    with pytest.raises(TypeError, match=r"second_log_normalizer: got a log Z for Normal"):
        compare_log_likelihoods(site, dist.Normal(0.0, 1.0), DATA, second_log_normalizer=0.0)
    with pytest.raises(ValueError, match=r"second: got a log density that is not finite at \d+ of 200 rows"):
        compare_log_likelihoods(site, dist.Uniform(0.0, 9.0), DATA)
    with pytest.raises(ValueError, match=r"second: got log densities of shape .*to_event"):
        compare_log_likelihoods(site, dist.Normal(0.0, 1.0).expand([200, 200]), DATA)


def test_memory_is_bounded_by_blocks_that_change_nothing(monkeypatch):
    monkeypatch.setattr(likelihood_rows, "BLOCK_ROWS", 7)
    found = log_likelihood(normal(), DATA[:199], HALF_LOG_2PI)  # of a length that no other test has compiled
    np.testing.assert_allclose(found.value, np.mean(dist.Normal(0.0, 1.0).log_prob(DATA[:199])), rtol=1e-6)
