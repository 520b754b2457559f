"""``constant_normalizer``: exact where log Z is a constant, and a refusal everywhere else."""

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
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints, transforms
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.infer.reparam import LocScaleReparam, TransformReparam
from numpyro.infer.util import log_density

import ebm_ppl as ebm
from ebm_ppl.handlers import constant_normalizer, negative_phase, policy, surrogate_normalizer
from ebm_ppl.provenance import ebm_dependencies
from ebm_ppl.testing import t_test_chain_means

# Energy a x^2 / 2 on N(0, 1) is N(0, 1 / (1 + a)): what every EBM below equals up to its constant.
TILT = 3.0


def quadratic(x):
    return 0.5 * TILT * jnp.sum(x**2)


def tilted(batch=()):
    site = ebm.EBM(quadratic, dist.Normal(0.0, 1.0))
    return site.expand(batch) if batch else site


def exact(batch=()):
    site = dist.Normal(0.0, (1.0 + TILT) ** -0.5)
    return site.expand(batch) if batch else site


def scaled(scale):
    return ebm.EBM(lambda x: scale * jnp.sum(x**2), dist.Normal(0.0, 1.0))


def joint(model, values=None, args=()):
    return float(log_density(model, args, {}, values or {})[0])


def nuts(model, key, *args, num_warmup=250, num_samples=60, **settings):
    """64 vectorised chains: short, and independent of each other."""
    mcmc = MCMC(
        NUTS(constant_normalizer(model), **settings),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=64,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, *args)
    assert int(mcmc.get_extra_fields()["diverging"].sum()) == 0
    return mcmc.get_samples(group_by_chain=True)


# --- Exact inference -----------------------------------------------------------------------------------------------


def test_nuts_over_a_latent_on_the_positive_half_line(key):
    """Gamma(3, 2); a forgotten Jacobian would give Gamma(2, 2), with mean 1."""

    def model():
        energy = lambda x: 2.0 * x - 2.0 * jnp.log(x)
        numpyro.sample("x", ebm.EBM(energy, dist.ImproperUniform(constraints.positive, (), ())))

    x = np.asarray(nuts(model, key)["x"])
    assert x.min() > 0.0
    t_test_chain_means(x, 1.5, name="mean").raise_if_failed()
    t_test_chain_means((x - 1.5) ** 2, 0.75, name="variance").raise_if_failed()
    median = scipy.stats.gamma(3.0, scale=0.5).median()
    t_test_chain_means(x < median, 0.5, name="below the median").raise_if_failed()


@pytest.mark.slow
def test_nuts_over_a_latent_image_with_a_likelihood(key):
    """Prior N(m, S) by tilting one Gaussian with another, two of three coordinates observed with noise, plus a latent
    scale that has nothing to do with the energy."""
    precision = np.array([[3.0, 1.0, 0.5], [1.0, 2.0, 0.8], [0.5, 0.8, 1.5]])
    shift, noise, y = np.array([1.0, -1.0, 0.5]), 0.5, np.array([0.7, -1.2])

    def model(y):
        energy = lambda x: 0.5 * x @ jnp.asarray(precision, x.dtype) @ x - x @ jnp.asarray(shift, x.dtype)
        x = numpyro.sample("x", ebm.EBM(energy, dist.Normal(0.0, 1.0).expand([3]).to_event(1)))
        numpyro.sample("unrelated", dist.LogNormal(0.0, 0.5))
        numpyro.sample("y", dist.Normal(x[:2], noise).to_event(1), obs=y)

    observed = np.eye(3)[:2]
    posterior_precision = precision + np.eye(3) + observed.T @ observed / noise**2
    covariance = np.linalg.inv(posterior_precision)
    mean = covariance @ (shift + observed.T @ y / noise**2)

    samples = nuts(model, key, jnp.asarray(y, jnp.float32))
    x = np.asarray(samples["x"], np.float64)
    for i in range(3):
        t_test_chain_means(x[..., i], mean[i], name=f"mean {i}").raise_if_failed()
        for j in range(i + 1):
            products = (x[..., i] - mean[i]) * (x[..., j] - mean[j])
            t_test_chain_means(products, covariance[i, j], name=f"covariance {i}{j}").raise_if_failed()
    t_test_chain_means(np.log(samples["unrelated"]), 0.0, name="log scale").raise_if_failed()


def test_svi_finds_the_mode_of_the_closed_form_posterior():
    def model(y):
        x = numpyro.sample("x", tilted())
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)

    wrapped = constant_normalizer(model)
    mode = 2.0 / 0.25 / (1.0 + TILT + 4.0)
    optimizer = numpyro.optim.Adam(0.1)
    guide = AutoDelta(wrapped)
    result = SVI(wrapped, guide, optimizer, Trace_ELBO()).run(jax.random.key(0), 300, 2.0, progress_bar=False)
    assert float(guide.median(result.params)["x"]) == pytest.approx(mode, abs=1e-3)
    guide = AutoNormal(wrapped)
    result = SVI(wrapped, guide, optimizer, Trace_ELBO(num_particles=32)).run(
        jax.random.key(0), 300, 2.0, progress_bar=False
    )
    assert float(result.params["x_auto_loc"]) == pytest.approx(mode, abs=0.05)
    assert float(result.params["x_auto_scale"]) == pytest.approx((1.0 + TILT + 4.0) ** -0.5, rel=0.15)


# --- The log joint, up to one constant -----------------------------------------------------------------------------


def plates(site):
    def model():
        with numpyro.plate("rows", 4):
            numpyro.sample("x", site())

    return model, {"x": (4,)}


def subsampled(site):
    def model():
        with numpyro.plate("rows", 12, subsample_size=4):
            numpyro.sample("x", site(), obs=jnp.arange(4.0) / 4)
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    return model, {"z": ()}


def masked(site):
    def model():
        with numpyro.plate("rows", 4), handlers.mask(mask=jnp.array([True, False, True, True])):
            numpyro.sample("x", site())

    return model, {"x": (4,)}


def scaled_by(site):
    def model():
        with handlers.scale(scale=2.5):
            numpyro.sample("x", site())

    return model, {"x": ()}


def conditioned(site):
    def model():
        x = numpyro.sample("x", site())
        numpyro.sample("y", dist.Normal(x, 1.0))

    return handlers.condition(model, {"y": jnp.float32(0.3)}), {"x": ()}


def reparametrised(site):
    def model():
        loc = numpyro.sample("loc", dist.Normal(1.0, 2.0))
        x = numpyro.sample("x", site())
        numpyro.sample("y", dist.Normal(loc + x, 1.0), obs=jnp.float32(0.4))

    return handlers.reparam(model, {"loc": LocScaleReparam(0.0)}), {"loc_decentered": (), "x": ()}


def transformed(site):
    def model():
        scale = numpyro.sample("scale", dist.LogNormal())
        # A latent in the transform moves no log Z: the change of variables accounts for it.
        numpyro.sample("x", dist.TransformedDistribution(site(), transforms.AffineTransform(1.0, scale)))

    return model, {"scale": (), "x": ()}


def transform_reparametrised(site):
    model, _ = transformed(site)
    return handlers.reparam(model, {"x": TransformReparam()}), {"scale": (), "x_base": ()}


def vector_event(site):
    def model():
        with numpyro.plate("rows", 2):
            numpyro.sample("x", site((2, 3)).to_event(1))

    return model, {"x": (2, 3)}


def partly_observed(site):
    def model():
        with numpyro.plate("rows", 3):
            observed = jnp.array([0.1, jnp.nan, 0.2])
            numpyro.sample("x", site(), obs=observed, obs_mask=jnp.array([True, False, True]))

    return model, {"x_unobserved": (3,)}


def deterministic(site):
    def model():
        x = numpyro.sample("x", site())
        z = numpyro.deterministic("z", jnp.sin(x))
        numpyro.factor("likelihood", -(z**2))

    return model, {"x": ()}


MODELS = [
    plates,
    subsampled,
    masked,
    scaled_by,
    conditioned,
    reparametrised,
    transformed,
    transform_reparametrised,
    vector_event,
    partly_observed,
    deterministic,
]


@pytest.mark.parametrize("build", MODELS)
def test_log_joint_differs_from_the_exact_model_by_one_constant(build):
    rng = np.random.default_rng(0)
    ours, shapes = build(tilted)
    theirs, _ = build(exact)
    ours, theirs = (handlers.seed(model, 0) for model in (constant_normalizer(ours), theirs))
    differences = []
    for _ in range(3):
        values = {
            name: jnp.asarray(np.exp(0.3 * rng.normal(size=shape)), jnp.float32) for name, shape in shapes.items()
        }
        differences.append(joint(ours, values) - joint(theirs, values))
    np.testing.assert_allclose(differences, differences[0], atol=2e-5)
    # That constant is log Z, once per row that counts.
    count = {"plates": 4, "subsampled": 12, "masked": 3, "scaled_by": 2.5, "vector_event": 6, "partly_observed": 3}
    log_z = -0.5 * np.log(1.0 + TILT)
    assert differences[0] == pytest.approx(count.get(build.__name__, 1) * log_z, abs=2e-5)


def test_handlers_outside_act_as_well():
    """Scale, mask, condition and scope around the wrapped model see its sites as NumPyro's own."""
    model = constant_normalizer(plates(tilted)[0])
    x = jnp.arange(4.0) / 4
    plain = joint(model, {"x": x})
    assert joint(handlers.scale(model, scale=3.0), {"x": x}) == pytest.approx(3 * plain, rel=1e-6)
    assert joint(handlers.mask(model, mask=False), {"x": x}) == 0.0
    assert joint(handlers.condition(model, {"x": x})) == pytest.approx(plain, rel=1e-6)
    assert joint(handlers.scope(model, prefix="p"), {"p/x": x}) == pytest.approx(plain, rel=1e-6)


def test_the_value_of_the_log_joint_is_the_unnormalised_one():
    expected = tilted().unnormalized_log_prob(0.7)
    assert joint(constant_normalizer(lambda: numpyro.sample("x", tilted())), {"x": 0.7}) == pytest.approx(
        float(expected)
    )
    trace = handlers.trace(handlers.substitute(constant_normalizer(lambda: numpyro.sample("x", tilted())), {"x": 0.7}))
    site = trace.get_trace()["x"]["fn"]
    assert site.normalizer_kind == "constant"


def test_a_given_normalizer_is_kept_and_may_depend_on_latents():
    """Doubly intractable in form, but with log Z given: the exact posterior."""
    y = jnp.asarray(np.random.default_rng(0).normal(size=20), jnp.float32)

    def ours():
        log_precision = numpyro.sample("log_precision", dist.Normal(0.0, 1.0))
        energy = lambda x: 0.5 * jnp.exp(log_precision) * x**2
        base = dist.ImproperUniform(constraints.real, (), ())
        normalizer = 0.5 * (jnp.log(2 * jnp.pi) - log_precision)
        with numpyro.plate("rows", 20):
            numpyro.sample("y", ebm.EBM(energy, base, log_normalizer=normalizer), obs=y)

    def theirs():
        log_precision = numpyro.sample("log_precision", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", 20):
            numpyro.sample("y", dist.Normal(0.0, jnp.exp(-0.5 * log_precision)), obs=y)

    assert ebm_dependencies(ours)["y"].is_normalized
    for value in (-2.0, 0.0, 1.3):
        values = {"log_precision": jnp.float32(value)}
        assert joint(constant_normalizer(ours), values) == pytest.approx(joint(theirs, values), rel=1e-5)


def test_mixture_with_a_normalised_component_is_exact():
    def build(component):
        def model():
            weights = dist.Categorical(jnp.array([0.4, 0.6]))
            numpyro.sample("x", dist.MixtureGeneral(weights, [component, dist.Normal(2.0, 1.0)]))

        return model

    normalised = ebm.EBM(quadratic, dist.Normal(0.0, 1.0), log_normalizer=-0.5 * np.log(1 + TILT))
    for x in (-1.0, 0.5, 2.0):
        values = {"x": jnp.float32(x)}
        ours = joint(constant_normalizer(build(normalised)), values)
        assert ours == pytest.approx(joint(build(exact()), values), rel=1e-5)


def test_one_model_with_several_ebms():
    def model():
        numpyro.sample("a", tilted())
        numpyro.sample("b", tilted((2,)).to_event(1))
        numpyro.sample("c", ebm.EBM(quadratic, dist.Normal(0.0, 1.0), log_normalizer=5.0), obs=0.2)

    values = {"a": jnp.float32(0.1), "b": jnp.zeros(2)}
    expected = tilted().unnormalized_log_prob(jnp.array([0.1, 0.0, 0.0, 0.2])).sum() - 5.0
    assert joint(constant_normalizer(model), values) == pytest.approx(float(expected), rel=1e-5)


def test_network_energies_pass():
    network = eqx.nn.MLP(3, "scalar", 8, 1, key=jax.random.key(0))

    def model(network):
        numpyro.sample("x", ebm.EBM(network, dist.Normal(0.0, 1.0).expand([3]).to_event(1)))

    x = jnp.ones(3)
    expected = dist.Normal(0.0, 1.0).log_prob(x).sum() - network(x)
    assert joint(constant_normalizer(model), {"x": x}, (network,)) == pytest.approx(float(expected), rel=1e-5)


def test_discrete_and_spherical_latents_pass_although_nothing_can_initialise_them():
    def model():
        numpyro.sample("bits", ebm.EBM(lambda s: -jnp.sum(1.0 * s), dist.Bernoulli(probs=0.5).expand([3]).to_event(1)))
        numpyro.sample("u", ebm.EBM(lambda u: -5.0 * u[0], dist.ImproperUniform(constraints.sphere, (), (3,))))

    values = {"bits": jnp.array([1, 0, 1]), "u": jnp.array([1.0, 0.0, 0.0])}
    assert joint(constant_normalizer(model), values) == pytest.approx(2.0 + 5.0 - 3 * np.log(2.0), rel=1e-5)


def test_decorator_without_arguments():
    @constant_normalizer
    def model():
        numpyro.sample("x", tilted())

    @constant_normalizer()
    def other():
        numpyro.sample("x", tilted())

    assert joint(model, {"x": 0.3}) == joint(other, {"x": 0.3})


def test_predictive_needs_a_sampler_and_then_works():
    def build(sampler):
        def model():
            x = numpyro.sample("x", ebm.EBM(quadratic, dist.Normal(0.0, 1.0), sampler=sampler))
            numpyro.sample("y", dist.Normal(x, 0.1))

        return constant_normalizer(model)

    with pytest.raises(NotImplementedError, match="no sampler attached"):
        Predictive(build(None), num_samples=2)(jax.random.key(0))
    simulate = lambda key, potential, num: 0.5 * jax.random.normal(key, (num,))
    draws = Predictive(build(simulate), num_samples=50)(jax.random.key(0))
    assert draws["y"].shape == (50,)
    assert np.unique(draws["x"]).size == 50


# --- Refusals ------------------------------------------------------------------------------------------------------


def in_energy():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", scaled(s))


def in_energy_of_data():
    s = numpyro.sample("s", dist.LogNormal())
    with numpyro.plate("rows", 3):
        numpyro.sample("x", scaled(s), obs=jnp.ones(3))


def in_parameters():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", ebm.EBM(Partial(lambda s, x: s * x**2, s), dist.Normal(0.0, 1.0)))


def in_base():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", ebm.EBM(quadratic, dist.Normal(0.0, s)))


def in_support():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", ebm.EBM(quadratic, dist.ImproperUniform(constraints.interval(0.0, s), (), ())))


def in_condition():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", ebm.EBM(lambda x, c: c * x**2, dist.Normal(0.0, 1.0), condition=jnp.stack([s, 1.0])))


def in_deterministic():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", scaled(numpyro.deterministic("d", 1.0 + s)))


def in_stopped_gradient():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", scaled(jax.lax.stop_gradient(s)))


def in_lax_scan():
    s = numpyro.sample("s", dist.LogNormal())
    total, _ = jax.lax.scan(lambda carry, _: (carry * s, None), 1.0, None, length=3)
    numpyro.sample("x", scaled(total))


def in_lax_cond():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", scaled(jax.lax.cond(s > 1.0, lambda: 1.0, lambda: 2.0)))


def in_jit():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", scaled(jax.jit(lambda s: s + 1.0)(s)))


def in_branch_that_the_constant_event_does_not_take():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", ebm.EBM(lambda x: jnp.where(x > 5.0, s * x, x**2), dist.Normal(0.0, 1.0)))


def in_transformed():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", dist.TransformedDistribution(scaled(s), transforms.ExpTransform()))


def in_wrappers():
    s = numpyro.sample("s", dist.LogNormal())
    numpyro.sample("x", scaled(s).expand([3]).to_event(1).mask(jnp.array(True)))


def in_lifted():
    def model():
        numpyro.sample("x", scaled(numpyro.param("s", 1.0)))

    handlers.lift(model, {"s": dist.LogNormal()})()


def in_hierarchy():
    s = numpyro.sample("s", dist.LogNormal())
    t = numpyro.sample("t", dist.LogNormal(0.0, s))
    numpyro.sample("x", scaled(t))


def in_earlier_ebm():
    s = numpyro.sample("s", ebm.EBM(lambda s: s**2, dist.LogNormal()))
    numpyro.sample("x", scaled(s))


LATENT = [
    in_energy,
    in_energy_of_data,
    in_parameters,
    in_base,
    in_support,
    in_condition,
    in_deterministic,
    in_stopped_gradient,
    in_lax_scan,
    in_lax_cond,
    in_jit,
    in_branch_that_the_constant_event_does_not_take,
    in_transformed,
    in_wrappers,
    in_lifted,
    in_earlier_ebm,
]


@pytest.mark.parametrize("model", LATENT)
@pytest.mark.parametrize("validate", [True, False])
def test_a_latent_that_reaches_the_density_is_refused(model, validate):
    with numpyro.validation_enabled(validate):
        with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x'.*latent site\(s\) \{s\}.*log Z\(s\)"):
            constant_normalizer(model)()
        assert ebm_dependencies(model)["x"].latents == {"s"}


def test_every_latent_of_a_hierarchy_is_told_apart():
    """Given t, s does not reach the energy: the proof names parents only, as log Z(t) is a function of t."""
    assert ebm_dependencies(in_hierarchy)["x"].latents == {"t"}
    with pytest.raises(ebm.UnknownNormalizerError, match=r"\{t\}"):
        constant_normalizer(in_hierarchy)()


def in_param():
    numpyro.sample("x", scaled(numpyro.param("s", 1.0)), obs=0.5)


def in_param_of_latent():
    numpyro.sample("x", scaled(numpyro.param("s", 1.0, constraint=constraints.positive)))


def in_param_of_base():
    numpyro.sample("x", ebm.EBM(quadratic, dist.Normal(numpyro.param("s", lambda key: jnp.zeros(())), 1.0)))


@pytest.mark.parametrize("model", [in_param, in_param_of_latent, in_param_of_base])
def test_a_param_that_reaches_the_density_is_refused(model):
    with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x'.*numpyro.param \{s\}.*ebm_ppl.fit"):
        constant_normalizer(handlers.seed(model, 0))()
    assert ebm_dependencies(model)["x"].params == {"s"}


def test_refusal_reaches_the_user_through_inference():
    mcmc = MCMC(NUTS(constant_normalizer(in_energy_of_data)), num_warmup=1, num_samples=1, progress_bar=False)
    with pytest.raises(ebm.UnknownNormalizerError, match=r"\{s\}"):
        mcmc.run(jax.random.key(0))
    svi = SVI(constant_normalizer(in_param), lambda: None, numpyro.optim.Adam(0.1), Trace_ELBO())
    with pytest.raises(ebm.UnknownNormalizerError, match=r"numpyro.param \{s\}"):
        svi.init(jax.random.key(0))


def test_without_the_handler_inference_refuses_too():
    with pytest.raises(ebm.UnknownNormalizerError, match="constant_normalizer"):
        joint(lambda: numpyro.sample("x", tilted()), {"x": 0.0})


def with_mixture():
    components = [tilted(), dist.Normal(0.0, 1.0)]
    numpyro.sample("x", dist.MixtureGeneral(dist.Categorical(jnp.array([0.5, 0.5])), components))


def with_latent_weights():
    w = numpyro.sample("w", dist.Beta(1.0, 1.0))
    components = [tilted(), dist.Normal(0.0, 1.0)]
    mixture = dist.MixtureGeneral(dist.Categorical(jnp.stack([w, 1 - w])), components)
    numpyro.sample("x", mixture, obs=0.3)


def with_two_ebms_in_a_mixture():
    means = jnp.array([0.0, 1.0])
    batch = ebm.EBM(lambda x, c: jnp.exp(c) * x**2, dist.Normal(0.0, 1.0), condition=means)
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), batch))


def with_latent_mask():
    m = numpyro.sample("w", dist.Bernoulli(0.5))
    with handlers.mask(mask=m == 1):
        numpyro.sample("x", tilted(), obs=0.3)


def with_latent_scale():
    w = numpyro.sample("w", dist.LogNormal())
    with handlers.scale(scale=w):
        numpyro.sample("x", tilted(), obs=0.3)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (with_mixture, "x"),
        (with_latent_weights, "w"),
        (with_two_ebms_in_a_mixture, "x"),
        (with_latent_mask, "w"),
        (with_latent_scale, "w"),
    ],
)
def test_a_constant_log_z_that_counts_a_varying_number_of_times_is_refused(model, name):
    """Here dropping log Z changes the relative weight of mixture components, or of the values of a latent mask."""
    found = ebm_dependencies(model)["x"]
    assert found.latents == found.params == frozenset()
    assert found.weight == {name}
    with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x': how often its log Z counts depends on \{" + name):
        constant_normalizer(handlers.seed(model, 0))()


def test_an_ebm_inside_numpyro_scan_is_refused():
    def model():
        scan(lambda carry, _: (carry, numpyro.sample("x", tilted())), 0.0, None, length=3)

    with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x'.*control_flow.scan"):
        constant_normalizer(model)()


def test_what_a_scan_carries_into_an_energy_is_refused():
    """The carry depends on a latent, which provenance cannot see."""

    def model():
        s = numpyro.sample("s", dist.LogNormal())

        def body(carry, _):
            numpyro.sample("x", scaled(carry), obs=0.3)
            return carry, None

        scan(body, s, None, length=3)

    for wrapped in (constant_normalizer(model), constant_normalizer(model, given=["s"])):
        with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x'.*control_flow.scan"):
            handlers.seed(wrapped, 0)()


def test_given_sites_must_be_held_fixed():
    """Held fixed, as Gibbs holds the sites of the other blocks, log Z is constant; loose, it stays unknown."""
    model = constant_normalizer(in_energy, given=["s"])
    assert np.isfinite(joint(handlers.condition(model, {"s": jnp.float32(1.5)}), {"x": 0.2}))
    with pytest.raises(ebm.UnknownNormalizerError, match="log Z"):
        joint(model, {"s": 1.5, "x": 0.2})
    with pytest.raises(ebm.UnknownNormalizerError, match=r"\{s\}"):
        constant_normalizer(in_energy, given=["other"])()


def test_scope_does_not_hide_that_a_given_site_is_loose():
    model = handlers.scope(constant_normalizer(in_energy, given=["s"]), prefix="p")
    with pytest.raises(ebm.UnknownNormalizerError, match="log Z"):
        joint(model, {"p/s": 1.5, "p/x": 0.2})


def test_a_flag_in_an_array_is_proved_anew():
    def model(flag):
        s = numpyro.sample("s", dist.LogNormal())
        numpyro.sample("x", scaled(s if bool(flag) else 1.0))

    wrapped = constant_normalizer(model)
    joint(wrapped, {"s": 1.0, "x": 0.0}, (np.array(False),))
    with pytest.raises(ebm.UnknownNormalizerError, match=r"\{s\}"):
        joint(wrapped, {"s": 1.0, "x": 0.0}, (np.array(True),))


@pytest.mark.filterwarnings("ignore:.*cannot learn anything")
@pytest.mark.parametrize(
    "wrap",
    [
        constant_normalizer,
        lambda model: surrogate_normalizer(model, {}),
        lambda model: negative_phase(model, kernel=ebm.kernels.mala(0.5), num_chains=2, num_steps=1),
    ],
    ids=["constant_normalizer", "surrogate_normalizer", "negative_phase"],
)
def test_a_derivative_with_respect_to_an_argument_in_the_energy_is_refused(wrap):
    """Measured without the check: 3.5 for a gradient of 1.0."""

    def model(w):
        numpyro.sample("x", ebm.EBM(lambda x: -w * x, dist.Normal(0.0, 1.0)), obs=0.7)

    density = lambda w: log_density(wrap(model), (w,), {}, {})[0]
    assert np.isfinite(float(density(0.5)))
    with pytest.raises(
        ebm.UnknownNormalizerError, match="derivative with respect to something that reaches the energy"
    ):
        jax.grad(density)(0.5)


def test_autoguides_on_a_circular_ebm_are_refused():
    """Their ELBO grows without bound as they spread over more turns; NUTS is right there."""
    circle = dist.ImproperUniform(constraints.circular, (), ())
    model = constant_normalizer(lambda: numpyro.sample("x", ebm.EBM(lambda x: -jnp.cos(x), circle)))
    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.1), Trace_ELBO())
    with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x': an autoguide spreads .*dist\.VonMises"):
        svi.init(jax.random.key(0))


def test_part_of_a_model_is_refused():
    """The proof of a submodel cannot see that its closure holds a latent of the model around it."""

    def model():
        s = numpyro.sample("s", dist.LogNormal())
        constant_normalizer(lambda: numpyro.sample("x", scaled(s)))()

    with pytest.raises(ebm.UnknownNormalizerError, match=r"part of a model.*\{s\}.*constant_normalizer\(model\)"):
        joint(model, {"s": 1.0, "x": 0.0})


def test_use_as_a_context_manager_is_refused():
    for handler in (constant_normalizer(), constant_normalizer(lambda: numpyro.sample("x", tilted()))):
        with pytest.raises(TypeError, match=r"expected a call constant_normalizer\(model\)"), handler:
            numpyro.sample("x", tilted(), rng_key=jax.random.key(0))


def test_outer_lift_and_condition_do_not_get_round_the_proof():
    lifted = handlers.lift(constant_normalizer(in_param_of_latent), {"s": dist.LogNormal()})
    with pytest.raises(ebm.UnknownNormalizerError):
        joint(lifted, {"s": 1.0, "x": 0.0})
    with pytest.raises(ebm.UnknownNormalizerError, match=r"handlers\.condition"):
        joint(handlers.condition(constant_normalizer(in_energy), {"s": 1.0}), {"x": 0.0})
    # The remedy that the message gives.
    inside = constant_normalizer(handlers.condition(in_energy, {"s": jnp.float32(1.5)}))
    assert np.isfinite(joint(inside, {"x": 0.0}))


@pytest.mark.parametrize("name", ["fn", "model", "values", "self", "a/b"])
def test_any_site_name_will_do(name):
    def model():
        s = numpyro.sample(name, dist.LogNormal())
        numpyro.sample("x", scaled(s))

    assert ebm_dependencies(model)["x"].latents == {name}


# --- When the proof runs -------------------------------------------------------------------------------------------


@pytest.fixture
def proofs(monkeypatch):
    """Every proof that runs, as the arguments it was given."""
    calls = []

    def counting(model, args, kwargs):
        calls.append((args, kwargs))
        return ebm_dependencies(model, args, kwargs)

    monkeypatch.setattr(policy, "ebm_dependencies", counting)
    return calls


def rows_model(y, flag=False, network=None):
    x = numpyro.sample("x", tilted())
    numpyro.sample("y", dist.Normal(x, 1.0).expand(y.shape).to_event(y.ndim), obs=y)
    if flag:
        numpyro.sample("z", scaled(x))


def test_the_proof_runs_once_per_shape(proofs):
    model = constant_normalizer(rows_model)
    for y in (jnp.zeros(3), jnp.ones(3), np.ones(3, np.float32)):
        joint(model, {"x": 0.0}, (y,))
    assert len(proofs) == 1
    joint(model, {"x": 0.0}, (jnp.zeros(4),))
    joint(model, {"x": 0.0}, (jnp.zeros((3, 1)),))
    assert len(proofs) == 3
    joint(model, {"x": 0.0}, (jnp.ones(4),))
    jax.jit(lambda y: log_density(model, (y,), {}, {"x": 0.0})[0])(jnp.ones(4))
    assert len(proofs) == 3
    # Another handler is another model: it starts from nothing.
    joint(constant_normalizer(rows_model), {"x": 0.0}, (jnp.zeros(3),))
    assert len(proofs) == 4


@pytest.mark.parametrize("flag", [True, np.bool_(True), "yes", 1])
def test_values_that_may_steer_python_are_proved_anew(proofs, flag):
    """An array is known by its shape; anything else may choose another model."""
    model = constant_normalizer(rows_model)
    off = {bool: False, np.bool_: np.bool_(False), str: "", int: 0}[type(flag)]
    joint(model, {"x": 0.0}, (jnp.zeros(3), off))
    with pytest.raises(ebm.UnknownNormalizerError, match="site 'z'"):
        joint(model, {"x": 0.0, "z": 0.0}, (jnp.zeros(3), flag))
    assert len(proofs) == 2


def test_arguments_of_any_kind(proofs):
    """Functions count by identity, modules by structure; what cannot be hashed is proved every time."""

    class Odd:
        __hash__ = None

    model = constant_normalizer(rows_model)
    network = eqx.nn.MLP(1, 1, 2, 1, key=jax.random.key(0))
    for argument, expected in ((network, 1), (jnp.sin, 1), (np.array(["a"]), 1), (None, 1), (Odd(), 2)):
        proofs.clear()
        for _ in range(2):
            joint(model, {"x": 0.0}, (jnp.zeros(3), False, argument))
        assert len(proofs) == expected


def test_a_refusal_is_not_remembered_as_a_proof(proofs):
    model = constant_normalizer(in_energy)
    for _ in range(2):
        with pytest.raises(ebm.UnknownNormalizerError):
            model()
    assert len(proofs) == 2


def test_a_whole_run_of_nuts_needs_few_proofs(proofs):
    model = constant_normalizer(rows_model)
    strategy = init_to_value(values={"x": 0.1})
    mcmc = MCMC(NUTS(model, init_strategy=strategy), num_warmup=20, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.key(0), jnp.zeros(3))
    assert len(proofs) == 1


def test_the_proof_leaves_no_sites_in_the_handlers_around_it():
    model = constant_normalizer(rows_model)
    tracing = handlers.trace(handlers.substitute(model, {"x": jnp.float32(0.2)}))
    assert set(tracing.get_trace(jnp.zeros(3))) == {"x", "y"}


# --- Observed values -----------------------------------------------------------------------------------------------


def observe(values, site=None):
    def model(values):
        numpyro.sample("x", tilted(values.shape) if site is None else site, obs=values)

    return joint(constant_normalizer(model), args=(values,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, np.nan, 1.0, np.inf], "got 2 of 4 rows that are NaN or infinite, the first at index 1"),
        (np.zeros(0), r"got shape \(0,\), which is empty"),
    ],
)
def test_bad_data_are_refused_with_count_and_first_index(values, message):
    with pytest.raises(ValueError, match="observed data of site 'x': " + message):
        observe(jnp.asarray(values, jnp.float32))


def test_data_outside_the_support_are_refused():
    site = ebm.EBM(lambda x: x, dist.Gamma(2.0, 1.0)).expand([4])
    with pytest.raises(ValueError, match=r"'x': got 3 of 4 rows outside the support, the first at index 1"):
        observe(jnp.array([1.0, -1.0, -2.0, 0.0]), site)
    simplex = ebm.EBM(quadratic, dist.Dirichlet(jnp.ones(3))).expand([2])
    with pytest.raises(ValueError, match=r"'x': got 1 of 2 rows outside the support, the first at index 1"):
        observe(jnp.array([[0.2, 0.3, 0.5], [0.5, 0.5, 0.5]]), simplex)
    assert np.isfinite(observe(jnp.array([1.0, 0.5, 2.0, 3.0]), site))


@pytest.mark.parametrize("shape", [(20,), (20, 1), (20, 4), ()])
def test_data_of_the_wrong_event_shape_are_refused_by_name(shape):
    site = ebm.EBM(quadratic, dist.Normal(0.0, 1.0).expand([3]).to_event(1)).expand([20])
    with pytest.raises(ValueError, match=r"site 'x'.*got .*shape .*\(3,\)"):
        observe(jnp.zeros(shape), site)


def test_data_that_a_handler_supplies_are_checked_as_well():
    model = lambda: numpyro.sample("x", tilted((2,)))
    bad = {"x": jnp.array([0.0, jnp.nan])}
    for wrapped in (
        handlers.condition(constant_normalizer(model), bad),
        constant_normalizer(handlers.condition(model, bad)),
    ):
        with pytest.raises(ValueError, match="observed data of site 'x': got 1 of 2 rows"):
            wrapped()


def test_masked_rows_are_no_data():
    """Padding may hold anything; what remains is still checked."""
    mask = jnp.array([True, False, True])

    def model(values):
        with numpyro.plate("rows", 3), handlers.mask(mask=mask):
            numpyro.sample("x", tilted((3, 2)).to_event(1), obs=values)

    values = jnp.array([[0.1, 0.2], [jnp.nan, 0.0], [0.3, 0.4]])
    expected = tilted().unnormalized_log_prob(jnp.array([0.1, 0.2, 0.3, 0.4])).sum()
    assert joint(constant_normalizer(model), args=(values,)) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="got 1 of 3 rows that are NaN or infinite, the first at index 2"):
        joint(constant_normalizer(model), args=(values.at[2, 1].set(jnp.nan),))


def test_traced_data_are_left_to_the_caller():
    def model(y):
        numpyro.sample("x", tilted((2,)), obs=y)

    values = jax.jit(lambda y: log_density(constant_normalizer(model), (y,), {}, {})[0])(jnp.array([0.0, jnp.nan]))
    assert not np.isfinite(values)
