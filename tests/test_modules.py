"""Networks of ``numpyro.contrib.module`` as energies: learned by ``numpyro.param``, or random under a prior."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.contrib.module import (
    eqx_module,
    flax_module,
    nnx_module,
    random_eqx_module,
    random_flax_module,
    random_nnx_module,
)
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.util import log_density

import ebm_ppl as ebm
from ebm_ppl.handlers import constant_normalizer
from ebm_ppl.provenance import ebm_dependencies

WIDTH = 8


class NNXNetwork(nnx.Module):
    def __init__(self, is_scalar=True):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(3, WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 1, rngs=rngs)
        self.is_scalar = is_scalar

    def __call__(self, x):
        energy = self.out(jax.nn.softplus(self.hidden(1.0 * x)))
        return energy[0] if self.is_scalar else energy


class LinenNetwork(linen.Module):
    is_scalar: bool = True

    @linen.compact
    def __call__(self, x):
        hidden = jax.nn.softplus(linen.Dense(WIDTH, name="hidden")(1.0 * x))
        energy = linen.Dense(1, name="out")(hidden)
        return energy[0] if self.is_scalar else energy


def eqx_network(is_scalar=True):
    out = "scalar" if is_scalar else 1
    return eqx.nn.MLP(3, out, WIDTH, 1, activation=jax.nn.softplus, key=jax.random.key(0))


def declare(kind, prior=None, is_scalar=True):
    """The network called "net" inside a model, random where a prior is given."""
    match kind, prior is None:
        case "eqx", True:
            return eqx_module("net", eqx_network(is_scalar))
        case "eqx", False:
            return random_eqx_module("net", eqx_network(is_scalar), prior)
        case "nnx", True:
            return nnx_module("net", NNXNetwork(is_scalar))
        case "nnx", False:
            return random_nnx_module("net", NNXNetwork(is_scalar), prior)
        case "linen", True:
            return flax_module("net", LinenNetwork(is_scalar), input_shape=(3,))
        case "linen", False:
            return random_flax_module("net", LinenNetwork(is_scalar), prior, input_shape=(3,))


KINDS = ["eqx", "nnx", "linen"]
PRIOR = dist.Normal(0.0, 0.7)
# Names of hidden kernel, hidden bias, output kernel and output bias.
NAMES = {
    "eqx": ("layers[0].weight", "layers[0].bias", "layers[1].weight", "layers[1].bias"),
    "nnx": ("hidden.kernel", "hidden.bias", "out.kernel", "out.bias"),
    "linen": ("hidden.kernel", "hidden.bias", "out.kernel", "out.bias"),
}


def direct(kind, values, x):
    """The network at one event, written out; ``values`` are those of the sites that hold its weights."""
    if "net$params" not in values:
        kernel, bias, out, offset = (values[f"net/{name}"] for name in NAMES[kind])
    elif kind == "eqx":
        layers = values["net$params"].layers
        kernel, bias, out, offset = layers[0].weight, layers[0].bias, layers[1].weight, layers[1].bias
    else:
        hidden, last = values["net$params"]["hidden"], values["net$params"]["out"]
        kernel, bias, out, offset = hidden["kernel"], hidden["bias"], last["kernel"], last["bias"]
    if kind == "eqx":  # equinox multiplies from the left, flax from the right
        kernel, out = kernel.T, out.T
    return (jnp.log1p(jnp.exp(x @ kernel + bias)) @ out + offset)[0]


def base():
    return dist.Normal(0.3, 1.2).expand([3]).to_event(1)


DATA = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)


def build(kind, prior):
    def model():
        net = declare(kind, prior)
        with numpyro.plate("rows", 5):
            numpyro.sample("x", ebm.EBM(net, base()), obs=DATA)

    return model


def weights(kind, prior):
    """The sites that hold the weights, with their initial or drawn values."""
    trace = handlers.trace(handlers.seed(build(kind, prior), 1)).get_trace()
    names = ["net$params"] if prior is None else [f"net/{name}" for name in NAMES[kind]]
    return {name: trace[name]["value"] for name in names}


def ebm_in(model, values):
    trace = handlers.trace(handlers.substitute(handlers.seed(model, 1), data=values)).get_trace()
    return trace["x"]["fn"].base_dist


learned_and_random = pytest.mark.parametrize("prior", [None, PRIOR], ids=["learned", "random"])
all_kinds = pytest.mark.parametrize("kind", KINDS)


@all_kinds
@learned_and_random
def test_density_is_the_base_minus_the_network(kind, prior):
    values = weights(kind, prior)
    site = ebm_in(build(kind, prior), values)
    expected = base().log_prob(DATA) - jax.vmap(lambda x: direct(kind, values, x))(DATA)
    np.testing.assert_allclose(site.unnormalized_log_prob(DATA), expected, rtol=1e-5, atol=1e-5)


@all_kinds
@learned_and_random
def test_gradients_reach_every_weight(kind, prior):
    values = weights(kind, prior)
    model = build(kind, prior)
    ours = jax.grad(lambda values: ebm_in(model, values).unnormalized_log_prob(DATA).sum())(values)
    exact = jax.grad(lambda values: -sum(direct(kind, values, x) for x in DATA))(values)
    assert jax.tree.structure(ours) == jax.tree.structure(exact)
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert np.all(expected != 0.0)


@all_kinds
@learned_and_random
def test_provenance_finds_the_weights(kind, prior):
    found = ebm_dependencies(build(kind, prior))["x"]
    assert found.observed
    if prior is None:
        assert (found.params, found.latents) == ({"net$params"}, frozenset())
    else:
        assert (found.params, found.latents) == (frozenset(), {f"net/{name}" for name in NAMES[kind]})


@all_kinds
def test_a_prior_on_some_weights_leaves_the_others_learned(kind):
    kernel, _, _, offset = NAMES[kind]
    found = ebm_dependencies(build(kind, {kernel: PRIOR, offset: PRIOR}))["x"]
    assert found.params == {"net$params"}
    assert found.latents == {f"net/{kernel}", f"net/{offset}"}


@all_kinds
@learned_and_random
def test_log_z_that_moves_with_the_weights_is_refused_by_name(kind, prior):
    name = "net$params" if prior is None else f"net/{NAMES[kind][0]}"
    with pytest.raises(ebm.UnknownNormalizerError, match="site 'x': its potential depends on.*" + re.escape(name)):
        handlers.seed(constant_normalizer(build(kind, prior)), 0)()


@all_kinds
@learned_and_random
def test_it_crosses_jit_with_its_weights_as_leaves(kind, prior):
    values = weights(kind, prior)
    site = ebm_in(build(kind, prior), values)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(site)]
    for weight in jax.tree.leaves(values):
        assert any(np.array_equal(weight, leaf) for leaf in leaves)
    compiled = jax.jit(lambda site, x: site.unnormalized_log_prob(x))(site, DATA)
    np.testing.assert_allclose(compiled, site.unnormalized_log_prob(DATA), rtol=1e-5, atol=1e-5)
    # New weights in the same object: what was compiled holds none of the old ones.
    doubled = jax.tree.map(lambda leaf: 2.0 * leaf, site)
    difference = jax.jit(lambda a, b, x: a.unnormalized_log_prob(x) - b.unnormalized_log_prob(x))(site, doubled, DATA)
    assert np.all(np.abs(difference) > 1e-3)


@all_kinds
@learned_and_random
def test_a_network_with_output_of_shape_1_is_told_to_be_scalar(kind, prior):
    def model():
        numpyro.sample("x", ebm.EBM(declare(kind, prior, is_scalar=False), base()))

    with pytest.raises(ValueError, match=r"potential: returned shape \(1,\) .* expected a scalar of shape \(\)"):
        handlers.seed(model, 0)()


# --- functools.partial ---------------------------------------------------------------------------------------------


def stretched(scale, x, centre):
    return 0.5 * jnp.sum(jnp.exp(scale) * (x - centre) ** 2)


PARTIALS = {
    "functools": lambda scale, centre: functools.partial(stretched, scale, centre=centre),
    "nested": lambda scale, centre: functools.partial(functools.partial(stretched, scale), centre=centre),
    "jax": lambda scale, centre: Partial(stretched, scale, centre=centre),
}
SCALE, CENTRE = jnp.array([0.1, -0.2, 0.3]), jnp.array([1.0, 2.0, 3.0])


@pytest.mark.parametrize("name", PARTIALS)
def test_what_a_partial_binds_are_leaves(name):
    site = ebm.EBM(PARTIALS[name](SCALE, CENTRE), base())
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(site)]
    for array in (SCALE, CENTRE):
        assert sum(np.array_equal(array, leaf) for leaf in leaves) == 1
    expected = base().log_prob(DATA) - jax.vmap(lambda x: stretched(SCALE, x, CENTRE))(DATA)
    np.testing.assert_allclose(site.unnormalized_log_prob(DATA), expected, rtol=1e-5)


@pytest.mark.parametrize("name", PARTIALS)
def test_a_partial_compiles_once_for_all_that_it_binds(name):
    traces = []

    @jax.jit
    def density(site):
        traces.append(site)
        return site.unnormalized_log_prob(DATA).sum()

    for factor in (1.0, 2.0, 3.0):
        site = ebm.EBM(PARTIALS[name](factor * SCALE, CENTRE), base())
        direct = base().log_prob(DATA).sum() - sum(stretched(factor * SCALE, x, CENTRE) for x in DATA)
        np.testing.assert_allclose(density(site), direct, rtol=1e-5)
    assert len(traces) == 1


# --- What is no energy ---------------------------------------------------------------------------------------------


class Dropout(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.layer(self.dropout(x))[0]


class BatchNorm(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(linen.BatchNorm(use_running_average=False)(x))[0]


@pytest.mark.parametrize(
    "declare",
    [
        lambda: nnx_module("net", Dropout()),
        lambda: flax_module("net", BatchNorm(), input_shape=(3,), mutable=["batch_stats"]),
    ],
    ids=["noise", "state"],
)
def test_networks_with_noise_or_state_give_no_answer(declare):
    """Their energy at one event is no fixed number. That JAX refuses their side effects under vmap is enough."""

    def model():
        site = ebm.EBM(declare(), base())
        return site.unnormalized_log_prob(DATA)

    with pytest.raises((ValueError, jax.errors.UnexpectedTracerError)):
        handlers.seed(model, 0)()


# --- Learning, with log Z by enumeration ---------------------------------------------------------------------------

STATES = jnp.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
COUNTS = np.array([5, 17, 3, 11, 29, 2, 13, 20])
BITS = np.repeat(np.asarray(STATES), COUNTS, axis=0)


def bits(kind, prior=None):
    """Three bits. Energies on all eight states, so that log Z and with it the whole law are known."""

    def model(data=BITS):
        net = declare(kind, prior)
        flat = dist.Bernoulli(probs=0.5).expand([3]).to_event(1)
        site = ebm.EBM(net, flat)
        log_normalizer = jax.nn.logsumexp(site.unnormalized_log_prob(STATES))
        with numpyro.plate("rows", len(data)):
            numpyro.sample("x", ebm.EBM(net, flat, log_normalizer=log_normalizer), obs=data)

    return model


@all_kinds
def test_maximum_likelihood_of_an_expressive_network_gives_the_frequencies(kind):
    model = bits(kind)
    # A decaying rate: at a constant one Adam ends up circling the optimum.
    optimizer = numpyro.optim.Adam(lambda step: 0.03 * 0.997**step)
    svi = SVI(model, lambda *args: None, optimizer, Trace_ELBO())
    result = svi.run(jax.random.key(0), 1500, progress_bar=False)
    energies = jax.vmap(lambda x: direct(kind, result.params, x))(STATES)
    np.testing.assert_allclose(jax.nn.softmax(-energies), COUNTS / COUNTS.sum(), atol=2e-3)
    # The loss is minus the log likelihood, whose largest value is that of the frequencies.
    entropy = -np.sum(COUNTS * np.log(COUNTS / COUNTS.sum()))
    assert float(result.losses[-1]) == pytest.approx(entropy, rel=1e-4)


@all_kinds
def test_the_joint_of_a_random_network_is_prior_and_normalised_likelihood(kind):
    values = {f"net/{name}": value for name, value in zip(NAMES[kind], weights(kind, PRIOR).values(), strict=True)}
    ours = lambda values: log_density(bits(kind, PRIOR), (), {}, values)[0]

    def exact(values):
        log_probs = jax.nn.log_softmax(-jax.vmap(lambda x: direct(kind, values, x))(STATES))
        return jnp.sum(COUNTS * log_probs) + sum(PRIOR.log_prob(value).sum() for value in values.values())

    (value, gradient), (expected, expected_gradient) = (jax.jit(jax.value_and_grad(f))(values) for f in (ours, exact))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for name in values:
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@all_kinds
def test_nuts_moves_the_weights_of_a_random_network(kind):
    mcmc = MCMC(NUTS(bits(kind, PRIOR), max_tree_depth=4), num_warmup=20, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0), extra_fields=("potential_energy",))
    samples = mcmc.get_samples()
    assert np.unique(samples[f"net/{NAMES[kind][0]}"][:, 0, 0]).size > 2
    last = jax.tree.map(lambda value: value[-1], samples)
    energy = -log_density(bits(kind, PRIOR), (), {}, last)[0]
    assert float(mcmc.get_extra_fields()["potential_energy"][-1]) == pytest.approx(float(energy), rel=1e-5)
