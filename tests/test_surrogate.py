"""The surrogate log Z: right near its pool, and a refusal away from it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

import ebm_ppl as ebm
from ebm_ppl.handlers import make_pools, surrogate_normalizer
from ebm_ppl.infer import SurrogateNUTS
from ebm_ppl.testing import t_test_chain_means

DATA = 0.5 * jax.random.normal(jax.random.key(1), (100, 1))


def model(y):
    log_precision = numpyro.sample("lp", dist.Normal(0.0, 1.0))
    nuisance = numpyro.sample("nuisance", dist.Normal(0.0, 1.0))
    exact = lambda key, potential, num: jnp.exp(-log_precision / 2) * jax.random.normal(key, (num, 1))
    flat = dist.ImproperUniform(constraints.real, (), (1,))
    with numpyro.plate("rows", len(y)):
        energy = lambda y: 0.5 * jnp.exp(log_precision) * jnp.sum(y**2)
        numpyro.sample("y", ebm.EBM(energy, flat, sampler=exact), obs=y)
    numpyro.sample("z", dist.Normal(nuisance, 1.0), obs=0.4)


def exact_posterior():
    grid = np.linspace(-1.0, 3.0, 20001)
    squares = float((np.asarray(DATA, np.float64) ** 2).sum())
    log_density = -(grid**2) / 2 + 50 * grid - 0.5 * np.exp(grid) * squares
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean = (weights * grid).sum()
    return mean, np.sqrt((weights * (grid - mean) ** 2).sum())


def pools(key, at=1.19, num_draws=20_000):
    return make_pools(key, model, DATA, at={"lp": at}, num_draws=num_draws)


def test_log_normalizer_is_that_of_the_model_up_to_a_constant(key):
    wrapped = surrogate_normalizer(model, pools(key, num_draws=100_000))
    values = [0.9, 1.19, 1.5]
    ours = [float(log_density(wrapped, (DATA,), {}, {"lp": lp, "nuisance": 0.0})[0]) for lp in values]
    squares = float((np.asarray(DATA) ** 2).sum())
    exact = [-(lp**2) / 2 + 50 * lp - 0.5 * np.exp(lp) * squares for lp in values]
    np.testing.assert_allclose(np.diff(ours), np.diff(exact), atol=0.35)


# NumPyro donates its buffers to the compiled loop, and under vmap one of them cannot be used.
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_nuts_under_the_surrogate_finds_the_posterior(key):
    mean, sd = exact_posterior()
    assert (mean, sd) == (pytest.approx(1.188, abs=3e-3), pytest.approx(0.141, abs=3e-3))

    # Each chain has a pool of its own, so that the error of the pools is part of what the t-test sees.
    def chain(key):
        pool_key, key = jax.random.split(key)
        kernel = NUTS(surrogate_normalizer(model, pools(pool_key, num_draws=8000)), find_heuristic_step_size=False)
        mcmc = MCMC(kernel, num_warmup=150, num_samples=150, progress_bar=False)
        mcmc.run(key, DATA, extra_fields=("diverging",))
        return mcmc.get_samples(), mcmc.get_extra_fields()["diverging"]

    samples, diverging = jax.vmap(chain)(jax.random.split(key, 64))
    assert not bool(diverging.any())
    t_test_chain_means(samples["lp"], mean, name="mean").raise_if_failed()
    t_test_chain_means((samples["lp"] - mean) ** 2, sd**2, name="variance").raise_if_failed()
    assert samples["y$surrogate_ess"].shape == (64, 150)
    assert float(samples["y$surrogate_ess"].min()) > 800


def test_away_from_the_pool_the_density_is_nan(key):
    wrapped = surrogate_normalizer(model, pools(key))
    assert np.isnan(float(log_density(wrapped, (DATA,), {}, {"lp": -4.0, "nuisance": 0.0})[0]))


def test_a_pool_in_the_wrong_place_stops_the_run(key):
    """Plain NUTS returns a posterior cut off at the edge of the pool, with divergences; the kernel made for it refuses."""
    misplaced = pools(key, at=3.2, num_draws=2000)
    start = {"lp": jnp.array(3.0), "nuisance": jnp.array(0.0)}
    mcmc = MCMC(SurrogateNUTS(model, misplaced), num_warmup=50, num_samples=200, progress_bar=False)
    with pytest.raises(Exception, match="left the region where the pool represents the EBM"):
        mcmc.run(key, DATA, init_params=start)
    plain = MCMC(NUTS(surrogate_normalizer(model, misplaced)), num_warmup=50, num_samples=200, progress_bar=False)
    plain.run(key, DATA, init_params=start)
    assert int(plain.get_extra_fields()["diverging"].sum()) > 0


def test_pools_from_chains_when_no_sampler_is_attached(key):
    def bare(y):
        scale = numpyro.sample("s", dist.LogNormal())
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", ebm.EBM(lambda y: scale * y, dist.Gamma(2.0, 1.0)), obs=y)

    with pytest.raises(NotImplementedError, match="no sampler attached"):
        make_pools(key, bare, jnp.ones(3), at={"s": 1.0})
    mala = ebm.kernels.mala(step_size=0.3)
    pool = make_pools(key, bare, jnp.ones(3), at={"s": 1.0}, kernel=mala, num_draws=2000, num_steps=100)["y"]
    assert pool.events.shape == pool.log_density.shape == (2000,)
    assert float(pool.events.mean()) == pytest.approx(1.0, abs=0.1)  # Gamma(2, 2)


def test_refusals(key):
    with pytest.raises(ValueError, match=r"at: got no value for \{lp\}"):
        make_pools(key, model, DATA, at={})
    with pytest.raises(ValueError, match="no EBM that depends on a latent site"):
        make_pools(key, lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)), at={})
    with pytest.raises(ValueError, match=r"pools: got pools for \[\], expected one for site 'y'"):
        surrogate_normalizer(model, {})(DATA)
    with pytest.raises(TypeError, match="pools: got NoneType"):
        surrogate_normalizer(model)
    with pytest.raises(ValueError, match=r"min_ess: got 2\.0"):
        surrogate_normalizer(model, {}, min_ess=2.0)
    wrong = {"y": pools(key)["y"]._replace(events=jnp.zeros((5, 2)))}
    with pytest.raises(ValueError, match=r"draws of shape \(2,\) for site 'y', expected \(1,\)"):
        log_density(surrogate_normalizer(model, wrong), (DATA,), {}, {"lp": 1.0, "nuisance": 0.0})
