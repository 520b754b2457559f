"""``estimated_normalizer``: value, gradient and error of log Z from weighted particles."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, RenyiELBO, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import compute_log_probs

import ebm_ppl as ebm
from ebm_ppl.handlers import estimated_normalizer
from ebm_ppl.testing import t_test_chain_means

MALA = ebm.kernels.mala(step_size=0.5)
DATA = 0.7 + jnp.linspace(-1.0, 1.0, 20)


def tilted(data):
    """Log Z = w^2 / 2."""
    w = numpyro.param("w", 0.0)
    with numpyro.plate("rows", len(data)):
        numpyro.sample("x", ebm.EBM(lambda x: -w * x, dist.Normal(0.0, 1.0)), obs=data)


def test_the_estimate_of_z_and_the_gradient_of_log_z_are_right(key):
    model = estimated_normalizer(tilted, kernel=MALA, num_particles=64, num_temperatures=4)

    def log_z(w, key):
        trace = compute_log_probs(handlers.seed(model, key), (DATA,), {}, {"w": w})[1]
        return trace["x"]["fn"].base_dist.log_normalizer

    keys = jax.random.split(key, 400)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(log_z), in_axes=(None, 0)))(0.8, keys)
    t_test_chain_means(np.exp(np.asarray(value, np.float64) - 0.32), 1.0, name="Z").raise_if_failed()
    assert float(slope.mean()) == pytest.approx(0.8, abs=0.02)
    trace = handlers.trace(handlers.seed(model, 0)).get_trace(DATA)
    site = trace["x"]["fn"].base_dist
    assert site.normalizer_kind == "estimate"
    assert 0.0 <= float(site.log_normalizer_error) < 0.1


def latent(y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("x", ebm.EBM(lambda x: -w * x, dist.Normal(0.0, 1.0)), obs=y)


@pytest.mark.slow
def test_objectives_that_need_the_value_learn():
    """Posterior of the tilt: N(n m / (n + 1), 1 / (n + 1)). A gradient-only log Z leaves importance weights wrong."""
    model = estimated_normalizer(latent, kernel=MALA, num_particles=256, num_temperatures=4)
    for loss in (RenyiELBO(alpha=0.5, num_particles=4), Trace_ELBO(num_particles=4)):
        svi = SVI(model, AutoNormal(model), optax.adam(optax.exponential_decay(0.03, 100, 0.5)), loss)
        result = svi.run(jax.random.key(0), 400, DATA, progress_bar=False)
        assert bool(jnp.isfinite(result.losses).all())
        assert float(result.params["w_auto_loc"]) == pytest.approx(20 * 0.7 / 21, abs=0.08)
        assert float(result.params["w_auto_scale"]) == pytest.approx(21**-0.5, abs=0.08)


def test_rows_have_an_estimate_each(key):
    c = jnp.array([0.2, 0.5, 1.0])

    def rows():
        w = numpyro.param("w", 1.0)
        numpyro.sample("x", ebm.EBM(lambda x, c: -w * c * x, dist.Normal(0.0, 1.0), condition=c), obs=jnp.ones(3))

    model = estimated_normalizer(rows, kernel=MALA, num_particles=4000, num_temperatures=8)
    site = handlers.trace(handlers.seed(model, key)).get_trace()["x"]["fn"]
    np.testing.assert_allclose(site.log_normalizer, c**2 / 2, atol=0.05)


def test_mcmc_is_refused():
    mcmc = MCMC(NUTS(estimated_normalizer(latent, kernel=MALA)), num_warmup=2, num_samples=2, progress_bar=False)
    with pytest.raises(ebm.UnknownNormalizerError, match=r"estimated_normalizer draws random numbers.*as inside MCMC"):
        mcmc.run(jax.random.key(0), DATA)


def test_degenerate_particles_have_no_value_but_a_gradient():
    def far():
        w = numpyro.param("w", 40.0)
        numpyro.sample("x", ebm.EBM(lambda x: 500.0 * (x - w) ** 2, dist.Normal(0.0, 1.0)), obs=40.0)

    model = estimated_normalizer(far, kernel=MALA, num_particles=50, num_temperatures=1)
    density = lambda w: compute_log_probs(handlers.seed(model, 0), (), {}, {"w": w})[0]["x"]
    value, gradient = jax.value_and_grad(density)(40.0)
    assert np.isnan(float(value))
    assert np.isfinite(float(gradient))


def test_refusals():
    with pytest.raises(TypeError, match="kernel: got float"):
        estimated_normalizer(tilted, kernel=0.1)
    with pytest.raises(ValueError, match="num_particles: got 1"):
        estimated_normalizer(tilted, kernel=MALA, num_particles=1)

    def improper():
        base = dist.ImproperUniform(dist.constraints.real, (), ())
        numpyro.sample("x", ebm.EBM(lambda x: numpyro.param("w", 1.0) * x**2, base), obs=0.1)

    with pytest.raises(ValueError, match="base: got ImproperUniform, which cannot be sampled"):
        handlers.seed(estimated_normalizer(improper, kernel=MALA), 0)()
