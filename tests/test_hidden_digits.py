"""What an estimate of log Z cannot know, it says: digits behind a large constant, mass that a reference leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import ebm_ppl as ebm
from ebm_ppl import kernels, normalizer
from ebm_ppl.diagnostics import check_energy_drift, check_energy_gap, check_ksd

MALA = kernels.mala(step_size=0.5)


def raised(constant):
    """log Z = -log(2) / 2 - constant."""
    return ebm.EBM(lambda x: 0.5 * x**2 + constant, dist.Normal(0.0, 1.0))


def exact_draws(key, num_draws=1000):
    return np.sqrt(0.5) * jax.random.normal(key, (num_draws,))


@pytest.mark.parametrize("constant", [0.0, 1e5, 1e6])
def test_a_constant_in_the_energy_is_in_the_error(key, constant):
    truth = -0.5 * np.log(2.0) - constant
    site, samples = raised(constant), exact_draws(key)
    found = {
        "annealed": normalizer.annealed_importance(key, site, kernel=MALA, num_temperatures=50),
        "reverse": normalizer.reverse_annealed_importance(key, site, samples, kernel=MALA, num_temperatures=50),
        "flow": normalizer.flow_importance(key, site, dist.Normal(0.0, 1.0), num_particles=2000),
        "bridge": normalizer.bridge_sampling(key, site, samples[None]),
    }
    for name, one in found.items():
        error = float(one.standard_error)
        assert abs(float(one.value) - truth) < 4.0 * error, (name, one)
        assert error > 0.5 * np.spacing(np.float32(constant)) or constant == 0.0
        assert bool(one.reliable) == (constant < 4e5), (name, one)
        assert float(one.ess) <= 2000.0 or name == "bridge"


@pytest.mark.parametrize("constant", [0.0, 1e5])
def test_bounds_hold_around_a_constant(key, constant):
    bounds = normalizer.bidirectional(key, raised(constant), exact_draws(key), kernel=MALA, num_temperatures=50)
    truth = -0.5 * np.log(2.0) - constant
    assert float(bounds.lower) <= truth <= float(bounds.upper)


def test_a_sum_of_states_says_how_exact_it_is():
    def of(constant):
        return ebm.EBM(lambda x: 0.0 * jnp.sum(x) + constant, dist.Bernoulli(jnp.full(3, 0.5)).to_event(1))

    exact, hidden = normalizer.enumerate_states(of(1.0)), normalizer.enumerate_states(of(1e6))
    assert (float(exact.standard_error), bool(exact.reliable)) == (0.0, True)
    assert (float(hidden.standard_error) > 0.05, bool(hidden.reliable)) == (True, False)


@pytest.mark.parametrize(
    ("site", "reference"),
    [
        (ebm.EBM(lambda x: 0.0 * x, dist.Normal(0.0, 3.0)), dist.Uniform(-4.0, 4.0)),
        (ebm.EBM(lambda x: 0.0 * x.astype(float), dist.DiscreteUniform(0, 3)), dist.Bernoulli(0.5)),
        (ebm.EBM(lambda x: 0.0 * x, dist.Gamma(2.0, 1.0)), dist.Uniform(0.0, 30.0)),
    ],
    ids=["normal", "discrete", "gamma"],
)
def test_a_reference_that_leaves_mass_out_is_refused(key, site, reference):
    kernel = kernels.gibbs() if site.support.is_discrete else MALA
    with pytest.raises(ValueError, match="does not cover the support"):
        normalizer.annealed_importance(key, site, reference=reference, kernel=kernel)


def test_few_chains_or_rows_that_may_differ_by_chance_do_not_pass():
    rng = np.random.default_rng(0)
    gaps = [check_energy_gap(rng.normal(20.0, 1.0, size=2), rng.normal(size=(4, 100))).status for _ in range(50)]
    assert "pass" not in gaps
    drifts = [check_energy_drift(4.0 + rng.normal(size=4), rng.normal(size=(4, 100))) for _ in range(50)]
    assert all(one.status != "pass" or abs(one.value) <= 5.0 for one in drifts)
    assert sum(one.status == "not assessable" for one in drifts) > 10


def test_a_bootstrap_too_small_to_fail_is_refused(key):
    draws = 3.0 * jax.random.normal(key, (32, 10))
    with pytest.raises(ValueError, match="num_bootstrap: got 500, expected a whole number >= 1000"):
        check_ksd(key, lambda x: 0.5 * x**2, draws, num_bootstrap=500)
