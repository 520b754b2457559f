"""A quadratic energy with its exact log Z is the Normal it equals, to every part of NumPyro that takes a distribution.

Every model is written once, as a function of ``site(loc, scale)``, and run with the Normal and with EBMs. The random
streams coincide, so results agree draw by draw and not only in law.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.distributions import constraints, transforms
from numpyro.infer import (
    AIES,
    ESS,
    HMC,
    HMCECS,
    MCMC,
    NUTS,
    SA,
    SVI,
    BarkerMH,
    HMCGibbs,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    init_to_feasible,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
    log_likelihood,
    psis_diagnostic,
)
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.inspect import get_dependencies, get_model_relations
from numpyro.infer.reparam import TransformReparam
from numpyro.infer.util import initialize_model, log_density
from numpyro.util import format_shapes

import ebm_ppl as ebm
from ebm_ppl.distributions import find_ebms
from ebm_ppl.testing import cdf_test, t_test_chain_means

BASE_SCALE = 3.0


class ExactSimulator(eqx.Module):
    """Draws of one row of the Normal, with its very random stream where the row is the only one."""

    loc: jax.Array
    scale: jax.Array

    def __call__(self, key, potential, num_samples):
        loc, scale = (jnp.ravel(value)[potential.row] for value in (self.loc, self.scale))
        return loc + scale * jax.random.normal(key, (num_samples,))


def quadratic(x, parameters):
    loc, scale, base_scale = parameters
    return 0.5 * ((x - loc) / scale) ** 2 - 0.5 * (x / base_scale) ** 2


def energy_site(loc, scale, base, closure=False):
    """``N(loc, scale^2)`` as an EBM; a batch of parameters becomes a condition."""
    loc, scale = jnp.broadcast_arrays(*(jnp.asarray(value, float) for value in (loc, scale)))
    if base == "normal":
        base_scale, log_z, base = BASE_SCALE, jnp.log(scale / BASE_SCALE), dist.Normal(0.0, BASE_SCALE)
    else:
        base_scale, log_z = jnp.inf, jnp.log(scale) + 0.5 * jnp.log(2 * jnp.pi)
        base = dist.ImproperUniform(constraints.real, (), ())
    settings = {"log_normalizer": log_z, "sampler": ExactSimulator(loc, scale)}
    if loc.ndim:
        condition = (loc, scale, jnp.full(loc.shape, base_scale))
        return ebm.EBM(quadratic, base, condition=condition, **settings)
    parameters = (loc, scale, jnp.asarray(base_scale, float))
    if closure:
        return ebm.EBM(lambda x: quadratic(x, parameters), base, **settings)
    return ebm.EBM(Partial(quadratic, parameters=parameters), base, **settings)


EBMS = {
    "all in the energy": lambda loc, scale: energy_site(loc, scale, "improper"),
    "tilted Normal": lambda loc, scale: energy_site(loc, scale, "normal"),
    "closure": lambda loc, scale: energy_site(loc, scale, "improper", closure=True),
}
TILTED = EBMS["tilted Normal"]

# --- Models, each a function of the site ----------------------------------------------------------------------------

DATA = np.random.default_rng(0).normal(0.8, 0.6, size=6)


def data():
    """In the precision of the session: 32 bits, or 64 where trajectories are compared."""
    return jnp.asarray(DATA, float)


def covariate():
    return jnp.linspace(-1.0, 1.0, 6)


def likelihood(site):
    def model(observe=True):
        y = data() if observe else None
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 0.5))
        with numpyro.plate("rows", 6):
            numpyro.sample("y", site(mu, jnp.exp(log_scale)), obs=y)

    return model


def regression(site):
    """Every row has a law of its own."""

    def model(observe=True):
        y = data() if observe else None
        slope = numpyro.sample("slope", dist.Normal(0.0, 2.0))
        growth = numpyro.sample("growth", dist.Normal(0.0, 0.5))
        with numpyro.plate("rows", 6):
            numpyro.sample("y", site(slope * covariate(), jnp.exp(growth * covariate())), obs=y)

    return model


def prior(site):
    def model(observe=True):
        y = data() if observe else None
        x = numpyro.sample("x", site(1.0, 0.5))
        with numpyro.plate("rows", 6):
            numpyro.sample("y", dist.Normal(x, 0.7), obs=y)

    return model


def hierarchy(site):
    """The EBM is latent, its parameters are latent, and it is what another site depends on."""

    def model(observe=True):
        y = data() if observe else None
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with numpyro.plate("rows", 6):
            z = numpyro.sample("z", site(0.4, scale))
            numpyro.sample("y", dist.Normal(z, 0.5), obs=y)

    return model


def subsampled(site):
    def model(observe=True):
        y = data() if observe else None
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("rows", 6, subsample_size=4):
            batch = numpyro.subsample(y, event_dim=0) if y is not None else None
            numpyro.sample("y", site(mu, 0.7), obs=batch)

    return model


def masked(site):
    def model(observe=True):
        y = data() if observe else None
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("rows", 6), handlers.mask(mask=covariate() > -0.5), handlers.scale(scale=2.5):
            numpyro.sample("y", site(mu, 0.7), obs=y)

    return model


def partly_observed(site):
    def model(observe=True):
        y = data() if observe else None
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("rows", 6):
            numpyro.sample("y", site(mu, 0.7), obs=y, obs_mask=covariate() > -0.5)

    return model


def vector(site):
    def model(observe=True):
        y = data() if observe else None
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        with numpyro.plate("rows", 2):
            event = site(mu, 0.7).expand([2, 3]).to_event(1)
            numpyro.sample("y", event, obs=None if y is None else y.reshape(2, 3))

    return model


def mixture(site):
    def model(observe=True):
        y = data() if observe else None
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        weights = dist.Categorical(jnp.array([0.3, 0.7]))
        with numpyro.plate("rows", 6):
            components = [site(mu, 0.5), dist.Normal(-1.0, 1.0)]
            numpyro.sample("y", dist.MixtureGeneral(weights, components), obs=y)

    return model


def mixture_same_family(site):
    def model(observe=True):
        y = data() if observe else None
        mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
        weights = dist.Categorical(jnp.array([0.3, 0.7]))
        with numpyro.plate("rows", 6):
            components = site(jnp.stack([mu, -1.0 * jnp.ones_like(mu)]), jnp.array([0.5, 1.0]))
            numpyro.sample("y", dist.MixtureSameFamily(weights, components), obs=y)

    return model


def transformed(site):
    def model(observe=True):
        y = data() if observe else None
        shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
        transform = [transforms.AffineTransform(shift, 0.6), transforms.ExpTransform()]
        x = numpyro.sample("x", dist.TransformedDistribution(site(0.2, 0.8), transform))
        with numpyro.plate("rows", 6):
            exponential = dist.TransformedDistribution(site(jnp.log(x), 0.4), transforms.ExpTransform())
            numpyro.sample("y", exponential, obs=None if y is None else jnp.exp(y))

    return model


def repeated(site):
    def model(observe=True):
        y = data() if observe else None
        x = numpyro.sample("x", site(1.0, 0.5), sample_shape=(3,))
        with numpyro.plate("rows", 6):
            numpyro.sample("y", dist.Normal(x.mean(), 0.7), obs=y)

    return model


MODELS = [
    likelihood,
    regression,
    prior,
    hierarchy,
    subsampled,
    masked,
    partly_observed,
    vector,
    mixture,
    mixture_same_family,
    transformed,
    repeated,
]
# Rows of a condition and components of a mixture draw from streams of their own: there only the laws agree.
OTHER_STREAMS = [regression, mixture_same_family]


def slow_unless(condition, *values):
    """Parameters of a test that runs by default only where the condition holds: each run compiles the model anew."""
    return pytest.param(*values, marks=() if condition else pytest.mark.slow, id="-".join(map(name_of, values)))


def name_of(value):
    named = [name for name, site in EBMS.items() if site is value]
    return named[0] if named else value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


def models(*default):
    return pytest.mark.parametrize("build", [slow_unless(build in default, build) for build in MODELS])


# Every model with one EBM, and two models with all of them.
cases = pytest.mark.parametrize(
    ("build", "site"),
    [
        pytest.param(build, site, id=f"{name_of(build)}-{name_of(site)}")
        for build, site in itertools.product(MODELS, EBMS.values())
        if site is TILTED or build in (hierarchy, mixture)
    ],
)


def agree(ours, theirs, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)


def both(function, site=TILTED):
    """What a function of a site gives for the EBM and for the Normal."""
    return function(site), function(dist.Normal)


def latents(build):
    """Values of the latent sites, and the log joint as a function of them."""
    fixed = {"rows": jnp.array([0, 2, 3, 5])} if build is subsampled else {}
    trace = handlers.trace(handlers.seed(build(dist.Normal), 3)).get_trace()
    values = {
        name: node["value"] for name, node in trace.items() if node["type"] == "sample" and not node["is_observed"]
    }
    joint = lambda site: lambda values: log_density(handlers.substitute(build(site), fixed), (), {}, values)[0]
    return values, joint


# --- The log joint and its parts -------------------------------------------------------------------------------------


@cases
def test_log_joint_and_its_gradient(build, site):
    values, joint = latents(build)
    ours, theirs = both(lambda site: jax.jit(jax.value_and_grad(joint(site))), site)
    for factor in (1.0, 0.6):
        scaled = jax.tree.map(lambda value, factor=factor: factor * value, values)
        agree(ours(scaled), theirs(scaled), rtol=1e-3, atol=1e-4)


@cases
def test_trace_of_the_prior(build, site):
    def trace(site):
        found = handlers.trace(handlers.seed(build(site), 5)).get_trace(False)
        samples = {name: node for name, node in found.items() if node["type"] == "sample"}
        fields = {name: {key: node[key] for key in ("is_observed", "scale", "infer")} for name, node in samples.items()}
        stacks = {name: [frame.name for frame in node["cond_indep_stack"]] for name, node in samples.items()}
        return found, fields, stacks, {name: node["value"] for name, node in samples.items()}

    (trace_ours, *ours), (trace_theirs, *theirs) = both(trace, site)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, theirs)
    assert format_shapes(trace_ours) == format_shapes(trace_theirs)
    agree(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    if build not in OTHER_STREAMS:
        agree(ours[2], theirs[2])
    assert any(find_ebms(node["fn"]) for node in trace_ours.values() if node["type"] == "sample")


@models(likelihood, regression, hierarchy, transformed)
def test_log_likelihood_of_every_row(build):
    values, _ = latents(build)
    samples = {
        name: value * jnp.linspace(0.5, 1.0, 3).reshape(3, *(1,) * jnp.ndim(value)) for name, value in values.items()
    }

    def rows(site, parallel):
        return log_likelihood(handlers.seed(build(site), 0), samples, parallel=parallel)

    expected = rows(dist.Normal, True)
    agree(rows(TILTED, True), expected)
    agree(rows(TILTED, False), expected)


# --- Variational inference -------------------------------------------------------------------------------------------


def fit(build, site, guide_class, loss, num_steps=25):
    model = build(site)
    guide = guide_class(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.05), loss)
    result = svi.run(jax.random.key(1), num_steps, progress_bar=False)
    return guide, result.params, result.losses


def same_path(build, guide_class, loss):
    (_, params, losses), (_, other_params, other_losses) = both(lambda site: fit(build, site, guide_class, loss))
    agree(losses, other_losses, rtol=1e-3, atol=1e-3)
    agree(params, other_params, rtol=1e-3, atol=1e-3)
    assert np.ptp(losses) > 0.0


GUIDES = [
    AutoNormal,
    AutoDelta,
    AutoMultivariateNormal,
    AutoLaplaceApproximation,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoDAIS,
]
LOSSES = [Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO(), RenyiELBO(alpha=0.5, num_particles=2)]


@pytest.mark.slow
@pytest.mark.parametrize("guide_class", GUIDES)
def test_every_guide_follows_the_same_path_to_the_posterior(guide_class):
    same_path(likelihood, guide_class, Trace_ELBO())


@pytest.mark.parametrize("loss", [slow_unless(loss is not LOSSES[1], loss) for loss in LOSSES[1:]])
def test_every_objective_follows_the_same_path_to_the_posterior(loss):
    same_path(likelihood, AutoNormal, loss)


@models(prior)
def test_every_model_follows_the_same_path_to_the_posterior(build):
    same_path(build, AutoNormal, Trace_ELBO())


@pytest.mark.slow
def test_guides_made_of_parts():
    def guide_class(model):
        guide = AutoGuideList(model)
        guide.append(AutoNormal(handlers.block(model, expose=["mu"])))
        guide.append(AutoDelta(handlers.block(model, expose=["log_scale"])))
        return guide

    same_path(likelihood, guide_class, Trace_ELBO())


def test_laplace_approximation_is_exact_where_the_posterior_is_gaussian():
    """It differentiates the model twice. The posterior has precision 1/0.5^2 + 6/0.7^2."""

    def answers(site):
        guide, params, _ = fit(prior, site, AutoLaplaceApproximation, Trace_ELBO(), num_steps=150)
        draws = guide.sample_posterior(jax.random.key(2), params, sample_shape=(4,))
        return draws, guide.get_posterior(params).scale_tril, guide.median(params), guide.quantiles(params, [0.1, 0.9])

    ours, theirs = both(answers)
    agree(ours, theirs, rtol=1e-3, atol=1e-3)
    precision = 1 / 0.5**2 + 6 / 0.7**2
    assert float(ours[1].squeeze()) == pytest.approx(precision**-0.5, rel=1e-3)
    assert float(ours[2]["x"]) == pytest.approx((1.0 / 0.5**2 + float(DATA.sum()) / 0.7**2) / precision, abs=0.02)


@pytest.mark.slow
def test_importance_weights_of_a_guide():
    def khat(site):
        model = likelihood(site)
        guide = AutoNormal(model, init_scale=0.4)
        svi = SVI(model, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(1)))
        return psis_diagnostic(jax.random.key(3), params, model, guide, num_particles=200)

    ours, theirs = both(khat)
    assert ours == pytest.approx(theirs, abs=1e-2)


@pytest.mark.parametrize("site", [dist.Normal, TILTED, EBMS["closure"]], ids=name_of)
def test_maximum_likelihood_of_learned_parameters(site):
    def model():
        loc = numpyro.param("loc", 0.0)
        scale = numpyro.param("scale", 1.5, constraint=constraints.positive)
        with numpyro.plate("rows", 6):
            numpyro.sample("y", site(loc, scale), obs=data())

    svi = SVI(model, lambda: None, numpyro.optim.Adam(0.05), Trace_ELBO())
    params = svi.run(jax.random.key(0), 400, progress_bar=False).params
    assert float(params["loc"]) == pytest.approx(float(DATA.mean()), abs=1e-4)
    assert float(params["scale"]) == pytest.approx(float(DATA.std()), abs=1e-4)


def test_a_guide_made_of_an_ebm_learns_by_the_score_function(key):
    """Its draws are not reparametrised. q = N(m, s^2) of a N(0, 1) target: the gradients of KL are m and s - 1/s."""

    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0))

    def guide():
        loc, scale = numpyro.param("loc", 0.7), numpyro.param("scale", 1.4)
        numpyro.sample("x", TILTED(loc, scale))

    def gradient(key):
        loss = lambda params: TraceGraph_ELBO().loss(key, params, model, guide)
        return jax.grad(loss)({"loc": jnp.float32(0.7), "scale": jnp.float32(1.4)})

    gradients = jax.jit(jax.vmap(gradient))(jax.random.split(key, 4000))
    t_test_chain_means(gradients["loc"], 0.7, name="location").raise_if_failed()
    t_test_chain_means(gradients["scale"], 1.4 - 1 / 1.4, name="scale").raise_if_failed()


# --- Markov chains ---------------------------------------------------------------------------------------------------


def run(kernel, num_warmup=40, num_samples=10, num_chains=1):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(2))
    return mcmc.get_samples()


KERNELS = {
    "NUTS": lambda model: run(NUTS(model, max_tree_depth=4)),
    "NUTS, dense mass": lambda model: run(NUTS(model, dense_mass=True, max_tree_depth=4)),
    "HMC": lambda model: run(HMC(model, step_size=0.1, num_steps=5, trajectory_length=None)),
    "BarkerMH": lambda model: run(BarkerMH(model), num_warmup=50, num_samples=50),
    "SA": lambda model: run(SA(model), num_warmup=50, num_samples=50),
    "AIES": lambda model: run(AIES(model), num_chains=8),
    "ESS": lambda model: run(ESS(model), num_chains=8),
}


def same_steps(kernel):
    # In 64 bits rounding does not grow into another trajectory.
    with jax.enable_x64(True):
        ours, theirs = both(kernel)
    agree(ours, theirs, rtol=1e-6, atol=1e-8)
    assert all(np.ptp(np.asarray(value), axis=0).max() > 0.0 for value in ours.values())


@pytest.mark.parametrize("name", [slow_unless(name == "NUTS", name) for name in KERNELS])
def test_every_kernel_takes_the_same_steps(name):
    same_steps(lambda site: KERNELS[name](likelihood(site)))


# HMC has no subsampling, and obs_mask leaves values without a density, over which no two chains wander alike.
NUTS_MODELS = [build for build in MODELS if build not in (likelihood, subsampled, partly_observed)]


@pytest.mark.slow
@pytest.mark.parametrize("build", NUTS_MODELS, ids=name_of)
def test_nuts_takes_the_same_steps_on_every_model(build):
    same_steps(lambda site: KERNELS["NUTS"](build(site)))


@pytest.mark.slow
def test_hmc_with_energy_conserving_subsampling():
    def kernel(site):
        proxy = HMCECS.taylor_proxy({"mu": jnp.asarray(0.5)})
        hmc = HMC(subsampled(site), step_size=0.1, num_steps=3, trajectory_length=None)
        return run(HMCECS(hmc, num_blocks=2, proxy=proxy))

    same_steps(kernel)


@pytest.mark.slow
def test_hmc_within_gibbs():
    """The EBM site is drawn by Gibbs given the rest, the scale by HMC."""

    def gibbs(rng_key, gibbs_sites, hmc_sites):
        scale = hmc_sites["scale"]
        variance = 1 / (1 / scale**2 + 1 / 0.25)
        mean = variance * (0.4 / scale**2 + data() / 0.25)
        return {"z": mean + jnp.sqrt(variance) * jax.random.normal(rng_key, (6,))}

    def kernel(site):
        return run(HMCGibbs(NUTS(hierarchy(site), max_tree_depth=4), gibbs_fn=gibbs, gibbs_sites=["z"]))

    same_steps(kernel)


@pytest.mark.slow
def test_moments_of_a_latent_ebm_by_nuts(key):
    """64 independent chains against the closed form, which owes nothing to the Normal's own runs."""
    mcmc = MCMC(
        NUTS(prior(TILTED)),
        num_warmup=200,
        num_samples=60,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key)
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    precision = 1 / 0.5**2 + 6 / 0.7**2
    mean = (1.0 / 0.5**2 + float(DATA.sum()) / 0.7**2) / precision
    t_test_chain_means(x, mean, name="mean").raise_if_failed()
    t_test_chain_means((x - mean) ** 2, 1 / precision, name="variance").raise_if_failed()


@pytest.mark.parametrize(
    "strategy",
    [
        init_to_uniform,
        init_to_feasible,
        init_to_median,
        init_to_sample,
        init_to_value(values={"z": jnp.linspace(0.1, 0.6, 6)}),
    ],
    ids=["uniform", "feasible", "median", "sample", "value"],
)
def test_every_initialisation_starts_at_the_same_point(strategy):
    start = lambda site: initialize_model(jax.random.key(4), hierarchy(site), init_strategy=strategy).param_info.z
    agree(*both(start))


def test_without_a_closed_form_mean_the_start_is_the_median_of_draws():
    start = lambda strategy: initialize_model(jax.random.key(4), prior(TILTED), init_strategy=strategy).param_info.z
    agree(start(init_to_mean), start(init_to_median))


# --- Prediction ------------------------------------------------------------------------------------------------------


@models(hierarchy, transformed)
def test_prior_predictive(build):
    def draws(site, parallel):
        return Predictive(build(site), num_samples=7, parallel=parallel)(jax.random.key(5), False)

    ours, theirs = draws(TILTED, True), draws(dist.Normal, True)
    if build is hierarchy:
        agree(ours, draws(TILTED, False))
    assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
    if build not in OTHER_STREAMS:
        agree(ours, theirs)


@models(hierarchy)
def test_posterior_predictive(build):
    values, _ = latents(build)
    draws = {name: v + 0.1 * jnp.arange(4.0).reshape(4, *(1,) * jnp.ndim(v)) for name, v in values.items()}
    draws.pop("y_unobserved", None)
    by_chain = {name: value.reshape(2, 2, *value.shape[1:]) for name, value in draws.items()}

    def predict(site, posterior=draws, **settings):
        return Predictive(build(site), posterior, **settings)(jax.random.key(5), False)

    expected = predict(dist.Normal)
    assert "y" in expected
    for settings in ({}, {"parallel": True}, {"infer_discrete": False, "return_sites": list(expected)}):
        ours = predict(TILTED, **settings)
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, expected)
        if build not in OTHER_STREAMS:
            agree(ours, expected)
    ours = predict(TILTED, by_chain, batch_ndims=2)["y"]
    assert ours.shape == (2, 2, *expected["y"].shape[1:])


def test_prediction_from_a_guide():
    def predict(site):
        model, guide = prior(site), AutoNormal(prior(site))
        svi = SVI(model, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
        params = svi.get_params(svi.init(jax.random.key(1)))
        through_guide = Predictive(model, guide=guide, params=params, num_samples=3, parallel=True)
        return through_guide(jax.random.key(5), False), Predictive(guide, params=params, num_samples=3)(
            jax.random.key(6)
        )

    agree(*both(predict), rtol=1e-3, atol=1e-3)


def test_rows_of_a_condition_are_drawn_from_their_own_law(key):
    """Streams differ from the Normal's here, so the law is compared: row by row, and between rows."""
    loc, scale = 3.0 * covariate(), jnp.exp(covariate())

    def model():
        with numpyro.plate("rows", 6):
            numpyro.sample("y", TILTED(loc, scale))

    draws = Predictive(model, num_samples=4000, parallel=True)(key)["y"]
    assert draws.shape == (4000, 6)
    z = np.asarray((draws - loc) / scale)
    for row in range(6):
        cdf_test(z[:, row], scipy.stats.norm.cdf, name=f"row {row}").raise_if_failed()
    t_test_chain_means(z[:, 1:] * z[:, :-1], 0.0, name="rows are independent").raise_if_failed()


# --- Inspection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", MODELS, ids=name_of)
def test_relations_and_dependencies(build):
    ours, theirs = both(lambda site: get_model_relations(build(site)))
    named = {name: kind.replace("EBM", "Normal") for name, kind in ours["sample_dist"].items()}
    assert {**ours, "sample_dist": named} == theirs
    assert "EBM" in ours["sample_dist"].values() or build in (mixture, mixture_same_family, transformed)
    ours, theirs = both(lambda site: get_dependencies(build(site)))
    assert ours == theirs


@pytest.mark.parametrize("build", [likelihood, hierarchy, partly_observed], ids=name_of)
def test_the_drawing_of_a_model(build):
    ours, theirs = both(lambda site: numpyro.render_model(build(site), render_distributions=True).source)
    assert "EBM" in ours
    assert sorted(ours.replace("EBM", "Normal").splitlines()) == sorted(theirs.splitlines())


def test_the_drawing_of_learned_parameters():
    def build(site):
        def model():
            loc = numpyro.param("loc", 0.0)
            numpyro.sample("y", site(loc, 1.0), obs=0.5)

        return model

    ours, theirs = both(lambda site: numpyro.render_model(build(site), render_params=True).source)
    assert "loc -> y" in ours
    assert sorted(ours.splitlines()) == sorted(theirs.splitlines())


# --- Handlers --------------------------------------------------------------------------------------------------------


def with_parameters(site):
    """For the handlers that turn parameters into latent sites."""

    def model():
        loc = numpyro.param("mu", 0.3)
        x = numpyro.sample("x", site(loc, 0.7))
        with numpyro.plate("rows", 6):
            numpyro.sample("y", site(x, 0.5), obs=data())

    return model


def guide_of_prior():
    numpyro.sample("x", dist.Normal(0.2, 0.1))


def guide_trace():
    return handlers.trace(handlers.seed(guide_of_prior, 9)).get_trace()


HANDLED = {
    "block": (prior, lambda model: handlers.block(model, hide=["x"])),
    "condition": (prior, lambda model: handlers.condition(model, {"x": jnp.asarray(0.3)})),
    "do": (hierarchy, lambda model: handlers.do(model, {"z": jnp.ones(6)})),
    "do on a cause": (hierarchy, lambda model: handlers.do(model, {"scale": jnp.asarray(2.0)})),
    "infer_config": (prior, lambda model: handlers.infer_config(model, lambda site: {"note": site["name"]})),
    "lift": (with_parameters, lambda model: handlers.lift(model, prior=dist.Normal(0.0, 2.0))),
    "mask": (likelihood, lambda model: handlers.mask(model, mask=False)),
    "reparam": (transformed, lambda model: handlers.reparam(model, config={"x": TransformReparam()})),
    "replay": (prior, lambda model: handlers.replay(model, guide_trace())),
    "scale": (likelihood, lambda model: handlers.scale(model, scale=0.3)),
    "scope": (hierarchy, lambda model: handlers.scope(model, prefix="outer")),
    "substitute": (prior, lambda model: handlers.substitute(model, {"x": jnp.asarray(0.3)})),
    "substitute a parameter": (with_parameters, lambda model: handlers.substitute(model, {"mu": jnp.asarray(2.0)})),
    "uncondition": (likelihood, handlers.uncondition),
}


@pytest.mark.parametrize("name", HANDLED)
@pytest.mark.parametrize("site", [TILTED, EBMS["closure"]], ids=name_of)
def test_every_handler_sees_the_normal(name, site):
    build, wrap = HANDLED[name]

    def answers(site):
        model = handlers.seed(wrap(build(site)), 8)
        trace = handlers.trace(model).get_trace()
        values = {n: node["value"] for n, node in trace.items() if node["type"] in ("sample", "param", "deterministic")}
        samples = {n: node for n, node in trace.items() if node["type"] == "sample"}
        flags = {n: (node["is_observed"], node["infer"], node["scale"]) for n, node in samples.items()}
        given = {n: value for n, value in values.items() if trace[n]["type"] != "deterministic"}
        return flags, values, log_density(model, (), {}, given)[0]

    (flags, *ours), (other_flags, *theirs) = both(answers, site)
    assert jax.tree.map(str, flags) == jax.tree.map(str, other_flags)
    agree(ours, theirs)


def test_seeds_give_the_same_draws_and_other_seeds_give_others():
    def draw(site, seed):
        return handlers.trace(handlers.seed(prior(site), seed)).get_trace(False)["x"]["value"]

    agree(*both(lambda site: draw(site, 3)))
    assert not np.allclose(draw(TILTED, 3), draw(TILTED, 4))
