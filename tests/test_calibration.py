"""Simulation-based calibration: uniform ranks for a right posterior, and every seeded fault caught."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import ebm_ppl as ebm
from ebm_ppl.handlers import constant_normalizer
from ebm_ppl.targets.tabulated import TabulatedLaw
from ebm_ppl.testing import CHECKS, rank_test, simulation_based_calibration

NUM_SIMULATIONS = 2000
NOISE = 0.5


# --- Ranks of a conjugate model: no Monte Carlo but the draws themselves ----------------------------------------------


def simulate_normal(key):
    mean, noise = jax.random.normal(key, (2,))
    return mean, mean + noise


def normal_quantities(mean, y):
    return {"mean": mean, "log likelihood": -0.5 * (y - mean) ** 2}


def normal_posterior(key, y, *, num_draws, shift=0.0, scale=1.0):
    return y / 2 + shift + scale * jnp.sqrt(0.5) * jax.random.normal(key, (num_draws,))


def normal_ranks(key, infer, num_draws=99, **settings):
    infer = functools.partial(infer, num_draws=num_draws)
    return simulation_based_calibration(
        key,
        simulate_normal,
        infer,
        normal_quantities,
        num_simulations=NUM_SIMULATIONS,
        num_draws=num_draws,
        **settings,
    )


def test_exact_posterior_draws_rank_the_truth_uniformly(key):
    for name, ranks in normal_ranks(key, normal_posterior).items():
        rank_test(ranks, 99, name=name).raise_if_failed()


def test_bins_of_unequal_width_have_their_own_probabilities(key):
    """51 ranks in 20 bins are no equal bins."""
    num_draws = 50
    ranks = normal_ranks(key, normal_posterior, num_draws)["mean"]
    assert set(np.unique(ranks)) == set(range(num_draws + 1))
    rank_test(ranks, num_draws).raise_if_failed()


@pytest.mark.parametrize(
    "fault",
    [{"shift": 0.2}, {"scale": 0.75}, pytest.param({"scale": 1.3}, marks=pytest.mark.slow)],
    ids=["shifted", "too narrow", "too wide"],
)
def test_a_posterior_that_is_slightly_wrong_is_caught(key, fault):
    infer = functools.partial(normal_posterior, **fault)
    assert not rank_test(normal_ranks(key, infer)["mean"], 99).passed


def test_the_prior_in_place_of_the_posterior_is_caught_by_the_log_likelihood_alone(key):
    """Ranks of the parameters cannot see it: this is why quantities may depend on the data."""
    ranks = normal_ranks(key, lambda key, y, *, num_draws: jax.random.normal(key, (num_draws,)))
    rank_test(ranks["mean"], 99).raise_if_failed()
    assert not rank_test(ranks["log likelihood"], 99).passed


def test_ties_of_a_discrete_quantity_are_broken_at_random(key):
    def sign(mean, y):
        return {"sign": jnp.sign(mean)}

    infer = functools.partial(normal_posterior, num_draws=19)
    ranks = simulation_based_calibration(
        key, simulate_normal, infer, sign, num_simulations=NUM_SIMULATIONS, num_draws=19
    )
    rank_test(ranks["sign"], 19).raise_if_failed()


@pytest.mark.slow
def test_blocks_change_nothing(key):
    one = normal_ranks(key, normal_posterior, block_size=NUM_SIMULATIONS)
    other = normal_ranks(key, normal_posterior, block_size=300)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_rank_test_enters_the_ledger():
    count, spent = CHECKS.count, CHECKS.spent
    check = rank_test(np.arange(100), 99, alpha=1e-9)
    assert check.passed
    assert CHECKS.count == count + 1
    assert CHECKS.spent == pytest.approx(spent + 1e-9)


# --- What is refused ---------------------------------------------------------------------------------------------------


def test_wrong_number_of_draws():
    infer = functools.partial(normal_posterior, num_draws=10)
    with pytest.raises(ValueError, match=r"infer: got arrays with leading axes \[\(10,\)\], expected 9 draws"):
        simulation_based_calibration(
            jax.random.key(0), simulate_normal, infer, normal_quantities, num_simulations=2, num_draws=9
        )


@pytest.mark.parametrize(
    ("quantities", "text"),
    [
        (lambda mean, y: {"pair": jnp.stack([mean, y])}, r"'pair' has shape \(2,\), expected a scalar"),
        (lambda mean, y: {"root": jnp.sqrt(mean)}, r"'root' is NaN in \d+ of 50 simulations, the first at index \d+"),
    ],
)
def test_bad_quantities(quantities, text):
    infer = functools.partial(normal_posterior, num_draws=9)
    with pytest.raises(ValueError, match=text):
        simulation_based_calibration(
            jax.random.key(0), simulate_normal, infer, quantities, num_simulations=50, num_draws=9
        )


@pytest.mark.parametrize("name", ["num_simulations", "num_draws", "block_size"])
def test_counts_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}: got 0, expected a whole number >= 1"):
        simulation_based_calibration(
            jax.random.key(0), simulate_normal, normal_posterior, normal_quantities, **{name: 0}
        )


def test_bad_ranks():
    with pytest.raises(ValueError, match="num_bins: got 20, expected at most the 10 possible ranks"):
        rank_test(np.arange(10), 9)
    with pytest.raises(ValueError, match="ranks from 0 to 99"):
        rank_test(np.array([100]), 99)
    with pytest.raises(ValueError, match=r"got shape \(2, 3\)"):
        rank_test(np.zeros((2, 3), int), 99)


# --- NUTS over a latent with an EBM prior ------------------------------------------------------------------------------


def quartic(x):
    return x**4


def flat(x):
    return 0.0 * x


PRIOR = TabulatedLaw(lambda x: -(x**4) - 0.5 * (x - 0.5) ** 2, -4.0, 4.0)


def simulate_latent(key):
    prior_key, noise_key = jax.random.split(key)
    x = PRIOR.sample(prior_key, ())
    return x, x + NOISE * jax.random.normal(noise_key)


def latent_quantities(x, y):
    return {"x": x, "log likelihood": -0.5 * ((y - x) / NOISE) ** 2}


def latent_ranks(key, energy, has_data=True, num_draws=49):
    def model(y):
        x = numpyro.sample("x", ebm.EBM(energy, dist.Normal(0.5, 1.0)))
        numpyro.sample("y", dist.Normal(x, NOISE).mask(has_data), obs=y)

    def infer(key, y):
        kernel = NUTS(constant_normalizer(model))
        mcmc = MCMC(kernel, num_warmup=100, num_samples=4 * num_draws, thinning=4, progress_bar=False)
        mcmc.run(key, y)
        return mcmc.get_samples()["x"]

    return simulation_based_calibration(
        key, simulate_latent, infer, latent_quantities, num_simulations=NUM_SIMULATIONS, num_draws=num_draws
    )


def test_nuts_on_an_ebm_prior_is_calibrated(key):
    for name, ranks in latent_ranks(key, quartic).items():
        rank_test(ranks, 49, 10, name=name).raise_if_failed()


@pytest.mark.slow
def test_an_ebm_prior_without_its_energy_is_caught(key):
    assert not rank_test(latent_ranks(key, flat)["x"], 49, 10).passed


@pytest.mark.slow
def test_nuts_that_ignores_the_data_is_caught_by_the_log_likelihood_alone(key):
    ranks = latent_ranks(key, quartic, has_data=False)
    rank_test(ranks["x"], 49, 10).raise_if_failed()
    assert not rank_test(ranks["log likelihood"], 49, 10).passed
