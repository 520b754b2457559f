"""The EBM distribution, against the NumPyro distribution that each energy equals."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from jax.tree_util import Partial
from numpyro.distributions import constraints, transforms

import ebm_ppl as ebm
from ebm_ppl.chains import ChainSimulator
from ebm_ppl.distributions import find_ebms, map_ebms
from ebm_ppl.testing import cdf_test, t_test_chain_means

SLOPE, CENTRE = 1.7, -0.4
BASE_MEAN, BASE_SD = 0.6, 1.3


def pull(precision, centre, x):
    """Energy of a Gaussian factor."""
    return 0.5 * precision * jnp.sum((x - centre) ** 2)


def product_log_normalizer(precision, centre):
    """``log E_base[exp(-pull)]`` for the base N(BASE_MEAN, BASE_SD^2), by completing the square on paper."""
    shrink = 1.0 + precision * BASE_SD**2
    return -0.5 * jnp.log(shrink) - 0.5 * precision / shrink * (centre - BASE_MEAN) ** 2


def product(precision, centre):
    """The Gaussian that ``N(BASE_MEAN, BASE_SD^2) exp(-pull)`` is after normalisation."""
    total = precision + BASE_SD**-2
    return dist.Normal((BASE_MEAN * BASE_SD**-2 + precision * centre) / total, total**-0.5)


def tilted_normal(precision=SLOPE, centre=CENTRE, **kwargs):
    potential = Partial(pull, jnp.float32(precision), jnp.float32(centre))
    log_normalizer = product_log_normalizer(precision, centre)
    return ebm.EBM(potential, dist.Normal(BASE_MEAN, BASE_SD), log_normalizer=log_normalizer, **kwargs)


def improper(support=constraints.real, event_shape=()):
    return dist.ImproperUniform(support, (), event_shape)


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


# --- Densities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_tilted_normal_is_the_product_of_its_gaussians(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    np.testing.assert_allclose(tilted_normal().log_prob(x), product(SLOPE, CENTRE).log_prob(x), rtol=1e-5, atol=1e-5)
    assert tilted_normal().log_prob(x).shape == shape


def test_gradients_with_respect_to_event_and_parameters():
    x = jnp.linspace(-2.0, 2.0, 7)
    ours = jax.grad(lambda p, c, x: tilted_with(p, c).log_prob(x).sum(), argnums=(0, 1, 2))(SLOPE, CENTRE, x)
    exact = jax.grad(lambda p, c, x: product(p, c).log_prob(x).sum(), argnums=(0, 1, 2))(SLOPE, CENTRE, x)
    for got, expected in zip(ours, exact, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def tilted_with(precision, centre):
    normalizer = product_log_normalizer(precision, centre)
    return ebm.EBM(Partial(pull, precision, centre), dist.Normal(BASE_MEAN, BASE_SD), log_normalizer=normalizer)


def dense_precision():
    matrix = np.random.default_rng(1).normal(size=(3, 3))
    return jnp.asarray(matrix @ matrix.T + np.eye(3), jnp.float32)


@pytest.mark.parametrize("split", [0.0, 0.4])
def test_multivariate_normal_however_it_is_split_between_base_and_energy(split):
    """With split 0 the energy carries the whole density; otherwise the base holds a part of the precision."""
    precision = dense_precision()
    energy_part = (1.0 - split) * precision
    if split:
        base = dist.MultivariateNormal(jnp.zeros(3), precision_matrix=split * precision)
        # E_base[exp(-x'Ax/2)] = det(B)^{1/2} det(A + B)^{-1/2}, here with B = split * (A + B).
        log_normalizer = 1.5 * jnp.log(split)
    else:
        base = improper(event_shape=(3,))
        log_normalizer = 1.5 * jnp.log(2 * jnp.pi) - 0.5 * jnp.linalg.slogdet(precision)[1]
    site = ebm.EBM(lambda x: 0.5 * x @ energy_part @ x, base, log_normalizer=log_normalizer)
    exact = dist.MultivariateNormal(jnp.zeros(3), precision_matrix=precision)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2, 3)), jnp.float32)
    np.testing.assert_allclose(site.log_prob(x), exact.log_prob(x), rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: site.log_prob(x).sum())(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: exact.log_prob(x).sum())(x), rtol=1e-4, atol=1e-4)


def test_quartic_integrates_to_one_under_its_quadrature_normalizer():
    grid = np.linspace(-8.0, 8.0, 20001)
    weights = np.exp(-(grid**4)) * scipy.stats.norm.pdf(grid)
    site = ebm.EBM(lambda x: x**4, dist.Normal(0.0, 1.0), log_normalizer=np.log(np.trapezoid(weights, grid)))
    mass = np.trapezoid(np.exp(np.asarray(site.log_prob(grid.astype(np.float32)), np.float64)), grid)
    assert mass == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d.expand([5]),
        lambda d: d.expand([4, 1, 5]),
        lambda d: d.expand([5]).to_event(1),
        lambda d: d.expand([4, 5]).to_event(1),
        lambda d: d.expand([5]).mask(jnp.array([True, False, True, False, True])),
        lambda d: d.mask(False),
        lambda d: dist.TransformedDistribution(d, transforms.AffineTransform(1.0, -2.0)),
        lambda d: dist.TransformedDistribution(d, transforms.ExpTransform()),
        lambda d: dist.TransformedDistribution(d.expand([5]).to_event(1), transforms.ExpTransform()),
        lambda d: dist.MixtureGeneral(dist.Categorical(jnp.array([0.3, 0.7])), [d, dist.Normal(0.0, 2.0)]),
    ],
)
def test_wrappers_treat_it_as_the_normal_it_equals(wrap):
    ours, exact = wrap(tilted_normal()), wrap(product(SLOPE, CENTRE))
    assert (ours.batch_shape, ours.event_shape) == (exact.batch_shape, exact.event_shape)
    draws = exact.sample(jax.random.key(0), (3,))
    np.testing.assert_allclose(ours.log_prob(draws), exact.log_prob(draws), rtol=1e-4, atol=1e-4)
    assert ours.log_prob(draws).shape == exact.log_prob(draws).shape
    ours_gradient, exact_gradient = (jax.grad(lambda x, d=d: d.log_prob(x).sum())(draws) for d in (ours, exact))
    np.testing.assert_allclose(ours_gradient, exact_gradient, rtol=1e-3, atol=1e-3)
    assert len(find_ebms(ours)) == 1


def test_map_ebms_rewrites_under_wrappers_and_leaves_others_alone():
    mixture = dist.MixtureGeneral(
        dist.Categorical(jnp.array([0.3, 0.7])), [tilted_normal(), dist.Normal(0.0, 2.0)]
    ).expand([3])
    rewritten = map_ebms(lambda e: e.with_normalizer(7.0, "constant"), mixture)
    assert [float(e.log_normalizer) for e in find_ebms(rewritten)] == [7.0]
    assert find_ebms(rewritten)[0].normalizer_kind == "constant"
    assert float(find_ebms(mixture)[0].log_normalizer) != 7.0
    assert find_ebms(dist.Normal(0.0, 1.0)) == []


# --- Supports ------------------------------------------------------------------------------------------------------


def gamma_energy(x):
    """Gamma(3, 2) in full; NaN below zero."""
    return 2.0 * x - 2.0 * jnp.log(x)


ALPHA = jnp.array([2.0, 3.0, 5.0])
SUPPORTED = {
    "positive, improper": (
        ebm.EBM(gamma_energy, improper(constraints.positive), log_normalizer=-1.3862943611),
        dist.Gamma(3.0, 2.0),
        jnp.array([-1.0, 0.0, -0.01]),
    ),
    "positive, Gamma base": (
        # E_Gamma(2,1)[x exp(-x)] = Gamma(3) / 2^3 = 1/4.
        ebm.EBM(lambda x: x - jnp.log(x), dist.Gamma(2.0, 1.0), log_normalizer=jnp.log(0.25)),
        dist.Gamma(3.0, 2.0),
        jnp.array([-1.0, 0.0, -3.0]),
    ),
    "simplex, improper": (
        ebm.EBM(
            lambda x: -jnp.sum((ALPHA - 1.0) * jnp.log(x)),
            improper(constraints.simplex, (3,)),
            log_normalizer=-8.9306264692,
        ),
        dist.Dirichlet(ALPHA),
        jnp.array([[0.5, 0.5, 0.5], [1.2, -0.1, -0.1], [0.0, 0.0, 0.0]]),
    ),
    "simplex, Dirichlet base": (
        # E_uniform[prod x^(a-1)] = B(a) / B(1) = 2 B(a).
        ebm.EBM(
            lambda x: -jnp.sum((ALPHA - 1.0) * jnp.log(x)),
            dist.Dirichlet(jnp.ones(3)),
            log_normalizer=-8.9306264692 + jnp.log(2.0),
        ),
        dist.Dirichlet(ALPHA),
        jnp.array([[0.5, 0.5, 0.5], [1.2, -0.1, -0.1], [0.0, 0.0, 0.0]]),
    ),
    "interval": (
        ebm.EBM(
            lambda x: 0.5 * x**2 + jnp.log(x + 1.0) - jnp.log(x + 1.0),  # NaN below the interval
            dist.Uniform(-1.0, 2.0),
            log_normalizer=float(
                np.log(np.sqrt(2 * np.pi) * (scipy.stats.norm.cdf(2.0) - scipy.stats.norm.cdf(-1.0)) / 3.0)
            ),
        ),
        dist.TruncatedNormal(0.0, 1.0, low=-1.0, high=2.0),
        jnp.array([-1.5, 2.5, 100.0]),
    ),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_supports_of_the_base(name):
    site, exact, outside = SUPPORTED[name]
    inside = exact.sample(jax.random.key(0), (6,))
    np.testing.assert_allclose(site.log_prob(inside), exact.log_prob(inside), rtol=1e-4, atol=1e-4)
    assert bool(jnp.all(site.log_prob(outside) == -jnp.inf))
    assert bool(jnp.all(site.unnormalized_log_prob(outside) == -jnp.inf))
    # A mask later may drop these rows, so their gradient must not be NaN, and rows inside must not feel them.
    both = jnp.concatenate([inside, outside])
    gradient = jax.grad(lambda x: jnp.where(jnp.arange(9) < 6, site.log_prob(x), 0.0).sum())(both)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    expected = jax.grad(lambda x: exact.log_prob(x).sum())(inside)
    np.testing.assert_allclose(gradient[:6], expected, rtol=1e-3, atol=1e-3)


def test_parameter_gradients_are_finite_with_rows_outside_the_support():
    def loss(rate):
        site = ebm.EBM(lambda x: rate * jnp.sqrt(x), improper(constraints.positive))
        return jnp.where(jnp.array([True, False]), site.unnormalized_log_prob(jnp.array([4.0, -1.0])), 0.0).sum()

    assert float(jax.grad(loss)(1.5)) == pytest.approx(-2.0)


def test_nan_values_have_no_density():
    assert float(ebm.EBM(quadratic, dist.Normal(0.0, 1.0)).unnormalized_log_prob(jnp.nan)) == -jnp.inf


# --- JAX -----------------------------------------------------------------------------------------------------------


def mlp(seed):
    return eqx.nn.MLP(3, "scalar", 8, 2, activation=jax.nn.softplus, key=jax.random.key(seed))


def vector_base():
    return dist.Normal(0.0, 1.0).expand([3]).to_event(1)


def test_vmap_over_parameters():
    precisions = jnp.array([0.5, 1.0, 3.0])
    x = jnp.linspace(-1.0, 1.0, 4)
    ours = jax.vmap(lambda p: tilted_with(p, CENTRE).log_prob(x))(precisions)
    exact = jnp.stack([product(p, CENTRE).log_prob(x) for p in precisions])
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)


def test_jit_with_the_distribution_as_argument_compiles_once_for_all_parameters():
    traces = []

    @jax.jit
    def log_density(site, x):
        traces.append(site)
        return site.unnormalized_log_prob(x)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    for seed in range(4):
        network = mlp(seed)
        expected = dist.Normal(0.0, 1.0).log_prob(x).sum(axis=1) - jax.vmap(network)(x)
        np.testing.assert_allclose(log_density(ebm.EBM(network, vector_base()), x), expected, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1
    wider = eqx.nn.MLP(3, "scalar", 9, 2, activation=jax.nn.softplus, key=jax.random.key(0))
    log_density(ebm.EBM(wider, vector_base()), x)
    assert len(traces) == 2


@pytest.mark.parametrize("scale", [np.float32(2.0), np.full(3, 2.0, np.float32), 2.0])
def test_numbers_of_any_kind_inside_a_potential_cross_jit(scale):
    site = ebm.EBM(Partial(pull, scale, 0.0), vector_base()) if np.ndim(scale) == 0 else weighted(scale)
    value = jax.jit(lambda d, x: d.unnormalized_log_prob(x))(site, jnp.ones(3))
    assert float(value) == pytest.approx(3 * float(dist.Normal(0.0, 1.0).log_prob(1.0)) - 3.0, rel=1e-5)


def weighted(scale):
    return ebm.EBM(Partial(lambda s, x: 0.5 * jnp.sum(s * x**2), scale), vector_base())


@pytest.mark.parametrize("sampler", [None, lambda key, potential, num: jnp.zeros((num, 3))])
def test_pytree_round_trip_of_a_module_with_function_leaves(sampler):
    site = ebm.EBM(mlp(0), vector_base(), log_normalizer=0.3, sampler=sampler)
    leaves, structure = jax.tree.flatten(site)
    assert not any(callable(leaf) for leaf in leaves)
    again = jax.tree.unflatten(structure, leaves)
    assert jax.tree.structure(again) == structure
    assert hash(jax.tree.structure(ebm.EBM(mlp(1), vector_base(), log_normalizer=0.3, sampler=sampler))) == hash(
        structure
    )
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(again.log_prob(x), site.log_prob(x))
    assert (again.batch_shape, again.event_shape, again.sampler) == ((), (3,), sampler)
    assert repr(again) == repr(site)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, again.potential.layers[0].weight)
    assert doubled.shape == (8, 3)
    # Under jit as well, where the leaves are tracers.
    assert float(jax.jit(lambda d: d.log_prob(x[0]))(site)) == pytest.approx(float(site.log_prob(x[0])), rel=1e-6)


def test_gradient_with_respect_to_a_network_equals_that_of_its_energy():
    network, x = mlp(0), jnp.ones((4, 3))

    @eqx.filter_grad
    def through_the_site(network):
        return ebm.EBM(network, vector_base()).unnormalized_log_prob(x).sum()

    @eqx.filter_grad
    def direct(network):
        return -jax.vmap(network)(x).sum()

    gradients = zip(jax.tree.leaves(through_the_site(network)), jax.tree.leaves(direct(network)), strict=True)
    for got, expected in gradients:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# --- The normaliser ------------------------------------------------------------------------------------------------


def test_log_prob_refuses_without_a_normalizer_and_names_the_remedies():
    site = ebm.EBM(quadratic, vector_base())
    for wrapped in (site, site.expand([2]), site.mask(jnp.array(True))):
        with pytest.raises(
            ebm.UnknownNormalizerError, match=r"constant_normalizer\(model\).*log_normalizer=.*ebm_ppl.fit"
        ):
            wrapped.log_prob(jnp.zeros((2, 3)))
    expected = dist.Normal(0.0, 1.0).expand([3]).to_event(1).log_prob(jnp.ones(3)) - 1.5
    assert float(site.unnormalized_log_prob(jnp.ones(3))) == pytest.approx(float(expected), rel=1e-6)


def test_normalizer_policy_is_recorded():
    site = ebm.EBM(quadratic, vector_base())
    assert site.normalizer_kind is None
    assert ebm.EBM(quadratic, vector_base(), log_normalizer=0.0).normalizer_kind == "exact"
    constant = site.with_normalizer(2.0, "constant")
    assert constant.normalizer_kind == "constant"
    assert site.log_normalizer is None
    assert float(constant.log_prob(jnp.zeros(3)) - site.unnormalized_log_prob(jnp.zeros(3))) == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("base", "measure"),
    [
        (dist.Gamma(2.0, 1.0), "base=Gamma.*the base Gamma"),
        (improper(), "base=ImproperUniform.*Lebesgue measure on the support"),
        (improper().expand([3]).to_event(1), "base=Independent.*Lebesgue measure on the support"),
        (improper(constraints.simplex, (3,)), "Lebesgue measure on the first K-1 coordinates of the simplex"),
        (improper(constraints.sphere, (3,)), "surface measure on the sphere"),
        (improper(constraints.boolean, (3,)), "the counting measure"),
    ],
)
def test_repr_names_base_and_reference_measure(base, measure):
    site = ebm.EBM(quadratic_float, base)
    assert re.search(measure, repr(site))
    assert "potential=quadratic_float" in repr(site)
    assert "log Z unknown" in repr(site)
    assert "log Z exact" in repr(ebm.EBM(quadratic_float, base, log_normalizer=1.0))


def quadratic_float(x):
    return 0.5 * jnp.sum(x * 1.0)


def test_discrete_base_counts_states():
    """Three independent bits with energy -h x: every cell by enumeration."""
    field = 0.7
    site = ebm.EBM(
        lambda x: -field * jnp.sum(x),
        dist.Bernoulli(probs=0.5).expand([3]).to_event(1),
        log_normalizer=3 * jnp.log((1 + jnp.exp(field)) / 2),
    )
    states = jnp.array([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    probability = 1 / (1 + np.exp(-field))
    expected = [np.prod([probability if bit else 1 - probability for bit in state]) for state in np.asarray(states)]
    np.testing.assert_allclose(jnp.exp(site.log_prob(states)), expected, rtol=1e-5)


# --- Conditions ----------------------------------------------------------------------------------------------------

LEVEL, GROWTH, WEIGHT = 0.56, 0.95, 1.53


def heteroscedastic(x, c):
    return 0.5 * jnp.exp(LEVEL + GROWTH * c) * (x - WEIGHT * c) ** 2


def conditional(c):
    log_normalizer = 0.5 * jnp.log(2 * jnp.pi) - 0.5 * (LEVEL + GROWTH * c)
    return ebm.EBM(heteroscedastic, improper(), condition=c, log_normalizer=log_normalizer)


def test_each_row_has_its_own_condition_and_normalizer():
    c = jnp.linspace(-1.0, 1.0, 7)
    site, exact = conditional(c), dist.Normal(WEIGHT * c, jnp.exp(-(LEVEL + GROWTH * c) / 2))
    assert site.batch_shape == (7,)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 7)), jnp.float32)
    for value in (x[0], x, x[0, 0]):
        np.testing.assert_allclose(site.log_prob(value), exact.log_prob(value), rtol=1e-4, atol=1e-5)
    # Row i answers to condition i alone.
    jacobian = jax.jacobian(lambda c: conditional(c).log_prob(x[0]))(c)
    np.testing.assert_array_equal(jacobian - jnp.diag(jnp.diag(jacobian)), 0.0)
    assert bool(jnp.all(jnp.diag(jacobian) != 0.0))
    order = jnp.array([6, 2, 0, 1, 5, 4, 3])
    np.testing.assert_allclose(conditional(c[order]).log_prob(x[0][order]), site.log_prob(x[0])[order], rtol=1e-6)


def test_condition_may_be_a_pytree_and_wrap_into_a_mixture():
    condition = {"mean": jnp.array([-1.0, 2.0]), "precision": jnp.array([4.0, 0.5])}
    site = ebm.EBM(
        lambda x, c: 0.5 * c["precision"] * (x - c["mean"]) ** 2,
        improper(),
        condition=condition,
        log_normalizer=0.5 * jnp.log(2 * jnp.pi / condition["precision"]),
    )
    exact = dist.Normal(condition["mean"], condition["precision"] ** -0.5)
    weights = dist.Categorical(jnp.array([0.25, 0.75]))
    x = jnp.linspace(-3.0, 3.0, 9)
    ours = dist.MixtureSameFamily(weights, site).log_prob(x)
    np.testing.assert_allclose(ours, dist.MixtureSameFamily(weights, exact).log_prob(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (7, 1, 6), (8,), (2,)])
def test_wrong_numbers_of_rows_are_refused(shape):
    with pytest.raises(ValueError, match=r"value: got rows .*batch shape \(7,\)"):
        conditional(jnp.zeros(7)).log_prob(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (1.0, "condition: got leading axes"),
        (np.zeros((0,)), "condition: got leading axes"),
        ({}, "condition: got leading axes"),
        ((np.zeros(3), np.zeros(4)), "condition: got leading axes"),
        (np.zeros(4, np.float32), r"condition: got 4 rows.*batch shape \(3,\)"),
    ],
)
def test_ill_shaped_conditions_are_refused(condition, message):
    with pytest.raises(ValueError, match=message):
        ebm.EBM(lambda x, c: x**2, dist.Normal(0.0, 1.0).expand([3]), condition=condition)


# --- Shape and type errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_shape", "value_shape"),
    [
        ((1,), (20,)),  # NumPyro's own check broadcasts it to (20, 20) and sums
        ((3,), (20, 1)),
        ((3,), (20, 2)),
        ((3,), ()),
        ((2, 3), (3,)),
        ((2, 3), (20, 3, 2)),
    ],
)
def test_values_that_do_not_end_in_the_event_shape_are_refused(event_shape, value_shape):
    site = ebm.EBM(quadratic, improper(event_shape=event_shape), log_normalizer=0.0)
    for function in (site.log_prob, site.unnormalized_log_prob, site.expand([20]).log_prob):
        with pytest.raises(ValueError, match=r"value: got shape .* event shape " + re.escape(str(event_shape))):
            function(jnp.zeros(value_shape))


def test_rows_of_a_batched_base_must_match():
    site = ebm.EBM(quadratic, dist.Normal(jnp.zeros(4), 1.0), log_normalizer=0.0)
    assert site.batch_shape == (4,)
    assert site.log_prob(jnp.zeros((2, 4))).shape == (2, 4)
    with pytest.raises(ValueError, match=r"value: got rows \(5,\).*batch shape \(4,\)"):
        site.log_prob(jnp.zeros(5))


@pytest.mark.parametrize(
    ("energy", "error", "message"),
    [
        (lambda x: x, ValueError, r"returned shape \(3,\)"),
        (lambda x: jnp.sum(x, keepdims=True), ValueError, r"returned shape \(1,\)"),
        (lambda x: jnp.sum(x).astype(int), TypeError, "returned dtype int32, expected a real floating"),
        (lambda x: jnp.sum(x) + 1j, TypeError, "returned dtype complex64, expected a real floating"),
        (lambda x: jnp.sum(x) > 0, TypeError, "returned dtype bool, expected a real floating"),
        (lambda x: (jnp.sum(x), 1.0), TypeError, "returned a tuple"),
        (lambda x: None, TypeError, "returned a NoneType"),
        (lambda x: jnp.sum(x @ jnp.ones((4,))), ValueError, r"could not be evaluated on one event of shape \(3,\)"),
        (lambda x: jnp.sum(x, axis=1).mean(), ValueError, "ONE event with no batch axis"),
        (lambda x: float(jnp.sum(x)), ValueError, "could not be evaluated on one event"),
        (lambda x, y: jnp.sum(x), ValueError, "could not be evaluated on one event"),
        (3.0, TypeError, "got float, expected a callable"),
    ],
)
def test_energies_of_the_wrong_kind_are_refused(energy, error, message):
    with pytest.raises(error, match="potential: .*" + message):
        ebm.EBM(energy, vector_base())


def test_a_constant_python_number_is_an_energy():
    """It is a real scalar for one event: flat, not wrong."""
    site = ebm.EBM(lambda x: 2.0, vector_base())
    np.testing.assert_allclose(site.unnormalized_log_prob(jnp.zeros((4, 3))), 3 * -0.9189385 - 2.0, rtol=1e-6)


@pytest.mark.parametrize("kind", [np, jnp])
def test_64_bit_parameters_are_refused_in_a_32_bit_session(kind):
    with jax.enable_x64(True):
        weight = kind.ones(3)
    assert weight.dtype == np.float64
    with pytest.raises(TypeError, match=r"potential.*float64 while jax_enable_x64 is off"):
        ebm.EBM(Partial(lambda w, x: jnp.sum(w * x), weight), vector_base())


def test_the_whole_density_in_64_bits():
    with jax.enable_x64(True):
        site = tilted_with(jnp.float64(SLOPE), jnp.float64(CENTRE))
        x = jnp.linspace(-3.0, 3.0, 11)
        assert site.log_prob(x).dtype == jnp.float64
        np.testing.assert_allclose(site.log_prob(x), product(SLOPE, CENTRE).log_prob(x), rtol=1e-12)


@pytest.mark.parametrize("base", [None, 1.0, constraints.real, lambda x: x])
def test_base_must_be_a_distribution(base):
    with pytest.raises(TypeError, match=r"base: got .*, expected a numpyro distribution"):
        ebm.EBM(quadratic, base)


def test_base_must_be_normalised():
    inner = ebm.EBM(quadratic, dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"base: got an EBM whose log Z is unknown.*potentials.add"):
        ebm.EBM(quadratic, inner.expand([3]).to_event(1))
    # A normalised one is as good a base as any: here N(0, 1/2), tilted once more.
    twice = ebm.EBM(quadratic, inner.with_normalizer(-0.5 * jnp.log(2.0), "exact"))
    expected = dist.Normal(0.0, 2**-0.5).log_prob(1.0) - 0.5
    assert float(twice.unnormalized_log_prob(1.0)) == pytest.approx(float(expected), rel=1e-5)


def test_log_normalizer_must_broadcast_to_the_batch():
    with pytest.raises(ValueError, match=r"log_normalizer: got shape \(2,\).*batch shape \(7,\)"):
        ebm.EBM(heteroscedastic, improper(), condition=jnp.zeros(7), log_normalizer=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"log_normalizer: got shape \(2,\).*batch shape \(\)"):
        ebm.EBM(quadratic, vector_base(), log_normalizer=jnp.zeros(2))


# --- Simulation ----------------------------------------------------------------------------------------------------


def simulate(key, potential, num_samples):
    """Independent chains from a wide start; enough steps for a unit-scale Gaussian."""
    start_key, key = jax.random.split(key)
    start = 3.0 * jax.random.normal(start_key, (num_samples,))
    sampler, _ = ebm.advance(key, potential, ebm.init_sampler(start, ebm.kernels.mala(step_size=0.6)), 60)
    return sampler.position


def test_reparametrised_sampling_is_never_claimed():
    for site in (tilted_normal(), tilted_normal(sampler=simulate), tilted_normal().expand([2])):
        assert not site.has_rsample
        assert not site.has_enumerate_support
        with pytest.raises(NotImplementedError):
            site.rsample(jax.random.key(0))


def test_sample_without_a_sampler_raises_what_numpyro_expects():
    for site in (tilted_normal(), tilted_normal().expand([2]), tilted_normal().mask(True)):
        with pytest.raises(NotImplementedError, match="no sampler attached"):
            site.sample(jax.random.key(0))


def test_draws_are_independent_and_follow_the_density(key):
    """Rows of a plate are separate chains, not neighbours of one chain, and the sampler's potential holds the base."""
    site = tilted_normal(sampler=simulate)
    draws = np.asarray(jax.jit(lambda key: site.expand([2, 3]).sample(key, (1500,)))(key))
    assert draws.shape == (1500, 2, 3)
    exact = product(SLOPE, CENTRE)
    law = scipy.stats.norm(float(exact.loc), float(exact.scale))
    cdf_test(draws.ravel(), law.cdf, name="law").raise_if_failed()
    centred = (draws - law.mean()) / law.std()
    neighbours = (centred[:, :, 1:] * centred[:, :, :-1]).reshape(1500, -1)
    t_test_chain_means(neighbours, 0.0, name="row correlation").raise_if_failed()
    t_test_chain_means(
        (centred[1:] * centred[:-1]).reshape(1499, -1)[::2], 0.0, name="draw correlation"
    ).raise_if_failed()


def test_no_gradient_flows_through_the_sampler():
    def mean_draw(centre):
        sampler = lambda key, potential, num: centre + jax.random.normal(key, (num,))
        site = ebm.EBM(Partial(pull, 1.0, centre), dist.Normal(0.0, 1.0), sampler=sampler)
        return site.sample(jax.random.key(0), (10,)).mean()

    assert float(jax.grad(mean_draw)(0.3)) == 0.0


def test_every_row_is_simulated_under_its_own_condition(key):
    """Each row's draws follow that row's law, one fresh chain per draw."""
    c = jnp.array([-1.0, 0.2, 1.0])
    exact = dist.Normal(WEIGHT * c, jnp.exp(-(LEVEL + GROWTH * c) / 2))
    site = ebm.EBM(
        heteroscedastic, improper(), condition=c, sampler=ChainSimulator(ebm.kernels.mala(step_size=0.2), 150)
    )
    draws = np.asarray(jax.jit(lambda key: site.sample(key, (3000,)))(key))
    assert draws.shape == (3000, 3)
    for row in range(3):
        law = scipy.stats.norm(float(exact.loc[row]), float(exact.scale[row]))
        cdf_test(draws[:, row], law.cdf, name=f"row {row}").raise_if_failed()
    assert site.expand([5, 3]).sample(key, (2,)).shape == (2, 5, 3)


SIMULATED = {
    "positive": (ebm.EBM(gamma_energy, improper(constraints.positive)), scipy.stats.gamma(3.0, scale=0.5).cdf),
    "interval with a row of bounds": (
        ebm.EBM(quadratic, dist.Uniform(jnp.array([-1.0, 0.0]), jnp.array([2.0, 1.0]))),
        scipy.stats.truncnorm(-1.0, 2.0).cdf,
    ),
    "circle": (
        ebm.EBM(lambda x: 4.0 * jnp.cos(x), improper(constraints.circular)),  # von Mises, mode at pi
        lambda x: np.where(
            x < 0, scipy.stats.vonmises(4.0).cdf(x + np.pi) - 0.5, scipy.stats.vonmises(4.0).cdf(x - np.pi) + 0.5
        ),
    ),
    "sphere": (
        ebm.EBM(
            lambda u: -5.0 * u[0], improper(constraints.sphere, (3,))
        ),  # the first coordinate has an exponential law
        lambda u: np.expm1(5.0 * (u + 1.0)) / np.expm1(10.0),
    ),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_chains_on_constrained_supports_follow_the_law(name, key):
    site, cdf = SIMULATED[name]
    site = site.with_sampler(ChainSimulator(ebm.kernels.mala(step_size=0.25), 120))
    draws = np.asarray(jax.jit(lambda key: site.sample(key, (3000,)))(key))
    draws = draws.reshape(3000, -1)[:, 0]
    cdf_test(draws, cdf, name=name).raise_if_failed()


def test_discrete_supports_name_the_kernels_that_can_move_on_them():
    site = ebm.EBM(lambda s: 1.0 * jnp.sum(s), dist.Bernoulli(0.5).expand([3]).to_event(1))
    with pytest.raises(TypeError, match=r"discrete support.*exact_normalizer.*Gibbs"):
        site.with_sampler(ChainSimulator(ebm.kernels.mala(step_size=0.3), 10)).sample(jax.random.key(0))
