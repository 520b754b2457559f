"""``exact_normalizer``: with log Z computed, an EBM is an ordinary distribution for every algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, RenyiELBO, Trace_ELBO
from numpyro.infer.util import log_density

import ebm_ppl as ebm
from ebm_ppl.diagnostics import from_numpyro
from ebm_ppl.handlers import constant_normalizer, exact_normalizer
from ebm_ppl.likelihood import log_likelihood
from ebm_ppl.testing import t_test_chain_means

DATA = 0.5 * jax.random.normal(jax.random.key(1), (100, 1))


def model(y):
    log_precision = numpyro.sample("lp", dist.Normal(0.0, 1.0))
    flat = dist.ImproperUniform(constraints.real, (), (1,))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", ebm.EBM(lambda y: 0.5 * jnp.exp(log_precision) * jnp.sum(y**2), flat), obs=y)


def equal(y):
    log_precision = numpyro.sample("lp", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(-log_precision / 2)).expand([1]).to_event(1), obs=y)


def formula(site):
    """Log Z of a Gaussian energy, from its value at one."""
    return 0.5 * jnp.log(jnp.pi / site.energy(jnp.ones(1)))


@pytest.mark.parametrize("options", [{}, {"log_normalizer": formula}, {"log_normalizer": {"y": formula}}])
def test_the_log_joint_and_its_gradient_are_those_of_the_normal(options):
    ours, theirs = exact_normalizer(model, **options), equal
    for lp in (-2.0, 0.3, 2.5):
        both = [
            jax.value_and_grad(lambda lp, m=m: log_density(m, (DATA,), {}, {"lp": lp})[0])(lp) for m in (ours, theirs)
        ]
        np.testing.assert_allclose(both[0], both[1], rtol=2e-4)


@pytest.mark.slow
def test_nuts_finds_the_doubly_intractable_posterior(key):
    mcmc = MCMC(
        NUTS(exact_normalizer(model)),
        num_warmup=150,
        num_samples=100,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, DATA)
    assert int(mcmc.get_extra_fields()["diverging"].sum()) == 0
    grid = np.linspace(-1.0, 3.0, 20001)
    log_posterior = -(grid**2) / 2 + 50 * grid - 0.5 * np.exp(grid) * float((np.asarray(DATA, np.float64) ** 2).sum())
    weights = np.exp(log_posterior - log_posterior.max())
    mean = (weights * grid).sum() / weights.sum()
    t_test_chain_means(mcmc.get_samples(group_by_chain=True)["lp"], mean, name="mean").raise_if_failed()


@pytest.mark.slow
def test_algorithms_that_need_the_value_get_it():
    """A gradient-only log Z gives 1.53 here."""

    def guide(y):
        numpyro.sample("lp", dist.Normal(numpyro.param("loc", 1.0), numpyro.param("s", 0.14)))

    losses = {}
    for name, m in (("ours", exact_normalizer(model)), ("theirs", equal)):
        svi = SVI(m, guide, optax.adam(0.01), RenyiELBO(alpha=0.5, num_particles=4))
        result = svi.run(jax.random.key(0), 100, DATA, progress_bar=False)
        losses[name] = (float(result.params["loc"]), float(result.losses[-1]))
    np.testing.assert_allclose(losses["ours"], losses["theirs"], rtol=1e-3)


def test_discrete_energies_learn_by_summation():
    """Independent bits with a learned field: the estimate is the logit of their mean."""
    bits = jnp.asarray(np.random.default_rng(0).random((300, 3)) < 0.7, jnp.int32)

    def ising(bits):
        h = numpyro.param("h", 0.0)
        base = dist.Bernoulli(0.5).expand([3]).to_event(1)
        with numpyro.plate("rows", len(bits)):
            numpyro.sample("x", ebm.EBM(lambda x: -h * jnp.sum(x), base), obs=bits)

    svi = SVI(exact_normalizer(ising), lambda bits: None, optax.adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 300, bits, progress_bar=False)
    mean = float(bits.mean())
    assert float(result.params["h"]) == pytest.approx(np.log(mean / (1 - mean)), abs=1e-3)
    exact = -dist.Bernoulli(mean).log_prob(bits).sum()
    assert float(result.losses[-1]) == pytest.approx(float(exact), rel=1e-4)


def test_a_formula_for_a_site_that_is_not_there_is_refused():
    wrapped = exact_normalizer(model, log_normalizer={"yy": lambda site: 0.0})
    with pytest.raises(ValueError, match=r"got a formula for \['yy'\], expected names among \['y'\]"):
        log_density(wrapped, (DATA,), {}, {"lp": 1.0})


def test_mixtures_get_their_relative_weights():
    def mixture():
        narrow = ebm.EBM(lambda x: 0.5 * 100.0 * x**2, dist.ImproperUniform(constraints.real, (), ()))
        weights = dist.Categorical(jnp.array([0.3, 0.7]))
        numpyro.sample("x", dist.MixtureGeneral(weights, [narrow, dist.Normal(0.0, 1.0)], support=constraints.real))

    expected = jnp.log(
        0.3 * jnp.exp(dist.Normal(0.0, 0.1).log_prob(0.05)) + 0.7 * jnp.exp(dist.Normal(0.0, 1.0).log_prob(0.05))
    )
    ours, _ = log_density(exact_normalizer(mixture), (), {}, {"x": 0.05})
    assert float(ours) == pytest.approx(float(expected), rel=1e-4)


def test_rows_get_a_normaliser_each():
    c = jnp.array([-1.0, 0.0, 2.0])

    def rows():
        energy = lambda x, c: 0.5 * jnp.exp(c) * x**2
        flat = dist.ImproperUniform(constraints.real, (), ())
        numpyro.sample("x", ebm.EBM(energy, flat, condition=c), obs=jnp.ones(3))

    ours, _ = log_density(exact_normalizer(rows), (), {}, {})
    assert float(ours) == pytest.approx(float(dist.Normal(0.0, jnp.exp(-c / 2)).log_prob(1.0).sum()), rel=1e-4)


def test_what_cannot_be_computed_is_refused_with_alternatives():
    def wide():
        w = numpyro.param("w", 1.0)
        base = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
        numpyro.sample("x", ebm.EBM(lambda x: w * jnp.sum(x**2), base), obs=jnp.zeros(3))

    with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x': got an EBM of 3 dimensions.*Exchange"):
        handlers.seed(exact_normalizer(wide), 0)()

    def many():
        base = dist.Bernoulli(0.5).expand([64]).to_event(1)
        numpyro.sample("x", ebm.EBM(lambda x: 1.0 * jnp.sum(x), base), obs=jnp.zeros(64, int))

    with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x': log Z cannot be summed over states.*max_states"):
        exact_normalizer(many)()
    with pytest.raises(TypeError, match="log_normalizer: got float"):
        exact_normalizer(model, log_normalizer=0.3)


def test_an_unreliable_integral_is_nan():
    """An energy unbounded below has no normaliser, and no number stands in for it."""

    def improper():
        numpyro.sample("x", ebm.EBM(lambda x: 0.0 * x, dist.ImproperUniform(constraints.real, (), ())), obs=0.1)

    assert np.isnan(float(log_density(exact_normalizer(improper), (), {}, {})[0]))


# --- Log likelihoods -----------------------------------------------------------------------------------------------


def run(kernel_model, key):
    mcmc = MCMC(NUTS(kernel_model), num_warmup=50, num_samples=20, num_chains=2, progress_bar=False)
    mcmc.run(key, DATA)
    return mcmc


# NumPyro says that two chains will be drawn one after the other on one device.
@pytest.mark.filterwarnings("ignore:There are not enough devices")
def test_log_likelihood_of_an_exact_site_is_the_normals(key):
    mcmc = run(exact_normalizer(model, log_normalizer=formula), key)
    tree = from_numpyro(mcmc, log_likelihood=True)
    ours = tree["log_likelihood"]["y"]
    assert ours.shape == (2, 20, 100)
    theirs = numpyro.infer.log_likelihood(equal, mcmc.get_samples(group_by_chain=True), DATA, batch_ndims=2)["y"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)
    assert ours.attrs["log_z_se"] == 0.0
    assert tree["log_likelihood"].attrs["left_out"] == ""
    # By quadrature, with its error.
    result = log_likelihood(exact_normalizer(model), mcmc.get_samples(), DATA)
    np.testing.assert_allclose(result.values["y"], np.asarray(ours).reshape(40, 100), rtol=1e-3, atol=1e-3)
    assert 0.0 < result.log_z_se["y"] < 1e-3


@pytest.mark.filterwarnings("ignore:There are not enough devices")
def test_sites_whose_log_z_has_no_value_stay_out(key):
    def mixed(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(y)):
            base = dist.Normal(0.0, 1.0).expand([1]).to_event(1)
            numpyro.sample("unknown", ebm.EBM(lambda y: jnp.sum(y**2), base), obs=y)
            numpyro.sample("known", dist.Normal(z, 1.0).expand([1]).to_event(1), obs=y)

    mcmc = run(constant_normalizer(mixed), key)
    tree = from_numpyro(mcmc, log_likelihood=True)
    assert list(tree["log_likelihood"].data_vars) == ["known"]
    assert tree["log_likelihood"].attrs["left_out"] == "unknown"
    assert "log_likelihood" not in from_numpyro(mcmc).children


def test_the_error_of_log_z_is_carried():
    class Estimate:
        value, standard_error = jnp.array(0.3), jnp.array(0.05)

    def measured(y):
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        site = ebm.EBM(lambda y: y**2, dist.Normal(0.0, 1.0), log_normalizer=Estimate)
        numpyro.sample("y", site.expand([3]), obs=y)

    result = log_likelihood(measured, {"z": jnp.zeros(4)}, jnp.zeros(3))
    assert result.log_z_se == {"y": pytest.approx(0.05)}
    assert result.values["y"].shape == (4, 3)


def test_an_ebm_without_a_policy_still_refuses():
    with pytest.raises(ebm.UnknownNormalizerError):
        log_likelihood(model, {"lp": jnp.zeros(4)}, DATA)
