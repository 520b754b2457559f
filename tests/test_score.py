"""Score matching in all its forms against exact Fisher divergences, and the faults that must not pass unseen."""

import functools
import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.objectives import (
    conditional_denoising_score_matching,
    denoising,
    denoising_score_matching,
    generalized_score_matching,
    multiscale_denoising_score_matching,
    score,
    score_matching,
    sliced_score_matching,
    stateless,
)
from ebm_ppl.regions import is_whole_space
from ebm_ppl.testing import t_test_chain_means
from tests.wells import GRID, PARAMETERS, Wells, check_gradient_of_scale, grid_probabilities

KEY = jax.random.key(0)
THINNED = slice(None, None, 16)
X = GRID[THINNED]
P = grid_probabilities()[THINNED] / grid_probabilities()[THINNED].sum()
MODEL = np.array([3.0, 0.8, -0.2])
"""Parameters of a model that is not the truth, whose parameters are ``PARAMETERS``."""


def slope(parameters, x):
    """dU/dx of the wells, written down a second time."""
    height, place, tilt = parameters
    return 4.0 * height * x * (x**2 - place) + tilt


def expectation(loss, rows=X, weights=P):
    """Value and gradient, at ``MODEL`` in float64, of the weighted mean of a loss over one-row batches."""
    with jax.enable_x64(True):
        rows, weights = jnp.asarray(rows), jnp.asarray(weights)

        def total(parameters):
            return weights @ jax.vmap(lambda row: loss(parameters, row))(rows)

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(total))(jnp.asarray(MODEL)))


def wells_loss(objective, **options):
    """A loss of parameters and one event."""
    return lambda parameters, x: objective(Wells(parameters), x[None], KEY, **options)


def fisher(parameters, x, data_slope):
    """Half the squared difference of the model's and the data's ``dU/dx``."""
    return 0.5 * (slope(parameters, x) - data_slope) ** 2


def exact_fisher():
    """Value and gradient of the Fisher divergence, and the constant that score matching leaves out."""
    data_slope = slope(PARAMETERS, X)
    rows = np.stack([X, data_slope], axis=1)
    value, gradient = expectation(lambda parameters, row: fisher(parameters, *row), rows)
    return value - 0.5 * P @ data_slope**2, gradient


def assert_same(found, expected, rtol=1e-6):
    np.testing.assert_allclose(found[0], expected[0], rtol=rtol)
    np.testing.assert_allclose(found[1], expected[1], rtol=rtol)


def assert_other_gradient(found, expected):
    assert not np.allclose(found[1], expected[1], rtol=1e-2)


def test_score_matching_is_the_fisher_divergence_up_to_a_constant():
    assert_same(expectation(wells_loss(score_matching)), exact_fisher())


@pytest.mark.parametrize("objective", [
    functools.partial(score_matching, trace="hutchinson"),
    functools.partial(sliced_score_matching, num_projections=3),
])  # fmt: skip
def test_signs_on_the_line_make_random_directions_exact(objective):
    assert_same(expectation(wells_loss(objective)), exact_fisher())


def test_the_gradient_vanishes_at_the_truth(monkeypatch):
    monkeypatch.setattr("tests.test_score.MODEL", PARAMETERS)
    np.testing.assert_allclose(expectation(wells_loss(score_matching))[1], 0.0, atol=1e-9)


@pytest.mark.parametrize("fault", [lambda d: -d, lambda d: 2.0 * d, lambda d: 0.0 * d])
def test_a_wrong_trace_is_seen(monkeypatch, fault):
    right = score.hessian_diagonal
    monkeypatch.setattr(score, "hessian_diagonal", lambda gradient, x: fault(right(gradient, x)))
    assert_other_gradient(expectation(wells_loss(score_matching)), exact_fisher())


class Plane(eqx.Module):
    """An energy of events (2, 2) with a full Hessian."""

    weights: jax.Array

    def __call__(self, x):
        return jnp.sum(jnp.cos(self.weights @ x.reshape(-1))) + 0.25 * jnp.sum(x**4) + x[0, 0] * x[1, 1]


def plane_gradient(objective):
    """Gradient in the weights, in float64 on fixed rows."""
    random = np.random.default_rng(1)
    with jax.enable_x64(True):
        weights, rows = (jnp.asarray(random.normal(size=shape)) for shape in [(3, 4), (5, 2, 2)])
        return np.asarray(jax.jit(jax.grad(lambda w: objective(Plane(w), rows, KEY)))(weights))


def plane_by_hand(potential, rows, key):
    def row_loss(x):
        gradient, hessian = (f(lambda flat: potential(flat.reshape(2, 2)))(x) for f in (jax.grad, jax.hessian))
        return 0.5 * gradient @ gradient - jnp.trace(hessian)

    return jax.vmap(row_loss)(rows.reshape(-1, 4)).mean()


DESIGNS = {
    "signs": np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1).T,
    "axes": 2.0 * np.concatenate([np.eye(4), -np.eye(4)]),
}
"""Finite sets of directions with mean ``v v' = I``: averages over them are exact expectations."""

DIRECTED = [
    functools.partial(score_matching, trace="hutchinson"),
    sliced_score_matching,
    functools.partial(sliced_score_matching, variance_reduced=True),
]


@functools.cache
def exact_plane_gradient():
    return plane_gradient(plane_by_hand)


@pytest.mark.parametrize("objective", DIRECTED)
def test_random_directions_are_unbiased_for_any_law_of_unit_covariance(monkeypatch, objective):
    def along(vectors):
        monkeypatch.setattr(score, "draw_directions", lambda *args: jnp.broadcast_to(vectors, (5, *vectors.shape)))
        return plane_gradient(objective)

    for vectors in DESIGNS.values():
        np.testing.assert_allclose(along(vectors), exact_plane_gradient(), rtol=1e-9, atol=1e-11)
    assert not np.allclose(along(0.9 * DESIGNS["axes"]), exact_plane_gradient(), rtol=1e-2)


def test_the_exact_trace_is_that_of_the_whole_hessian():
    np.testing.assert_allclose(plane_gradient(score_matching), exact_plane_gradient(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("law", ["rademacher", "gaussian", "sphere"])
def test_directions_have_unit_covariance(key, law):
    vectors = score.draw_directions(key, law, 100, jnp.zeros((400, 3)))
    vectors = np.asarray(vectors, float)
    for i, j in ((0, 0), (1, 1), (0, 1)):
        products = (vectors[..., i] * vectors[..., j]).mean(axis=1)
        if products.std() > 1e-6:  # a squared sign has no spread
            check = t_test_chain_means(products, float(i == j), name=f"{law}[{i},{j}]").raise_if_failed()
            assert check.power < 0.08  # a sphere of the wrong radius is off by a factor of its dimension
        else:
            np.testing.assert_allclose(products, float(i == j), rtol=1e-6)


def test_score_matching_cannot_see_how_the_mass_is_divided_between_separate_modes():
    """The documented limit: data of weights .3 and .7 at +-10, models of .2/.8 and .5/.5; the likelihood does see it."""
    x = np.concatenate([np.linspace(-16.0, -4.0, 301), np.linspace(4.0, 16.0, 301)])
    weights = np.where(x < 0, 0.3, 0.7) * np.exp(-0.5 * (np.abs(x) - 10.0) ** 2)
    weights /= weights.sum()
    with jax.enable_x64(True):

        def energy(log_odds, x):
            return -jnp.logaddexp(jax.nn.log_sigmoid(log_odds) - 0.5 * (x + 10.0) ** 2,
                                  jax.nn.log_sigmoid(-log_odds) - 0.5 * (x - 10.0) ** 2)  # fmt: skip

        def expected(log_odds):
            potential = functools.partial(energy, log_odds)
            losses = jax.vmap(lambda x: score_matching(potential, x[None], KEY))(jnp.asarray(x))
            return weights @ losses, weights @ jax.vmap(potential)(jnp.asarray(x))

        found = np.array([jax.jit(expected)(jnp.asarray(odds)) for odds in (np.log(0.2 / 0.8), 0.0)])
    np.testing.assert_allclose(*found[:, 0], rtol=1e-14)
    assert abs(found[0, 1] - found[1, 1]) > 0.02


# Denoising. The noise is put in by hand, on a grid with its exact weights.

SIGMAS = np.array([0.2, 0.5])
D = np.linspace(-4.0, 4.0, 321)


def normal_density(d, scale):
    return np.exp(-0.5 * (d / scale) ** 2) / (scale * np.sqrt(2.0 * np.pi))


def noised(scales):
    """Density and slope of the log density of the data with noise, level by level, on the grid ``Y``."""
    offsets = Y[:, None] - X
    kernel = np.stack([normal_density(offsets, scale) for scale in scales])
    return kernel @ P, np.stack([-(k * offsets / s**2) @ P for k, s in zip(kernel, scales, strict=True)])


Y = np.linspace(-5.0, 5.0, 801)


def with_noise(monkeypatch, objective, **options):
    """Expectation of a denoising loss over data, levels and noise."""

    def loss(parameters, row):
        x, level, offset = row
        monkeypatch.setattr(denoising, "_draw_noise", lambda *args: (level[None, None], offset[None, None, None]))
        return objective(parameters, x, **options)

    grids = np.meshgrid(X[::2], SIGMAS, D, indexing="ij")
    rows = np.stack([g.ravel() for g in grids], axis=1)
    density = (P[::2] / P[::2].sum())[:, None, None] * normal_density(D, SIGMAS[:, None])[None]
    return expectation(loss, rows, (density / density.sum()).ravel())


def denoise_mixture(parameters, x):
    return denoising_score_matching(Wells(parameters), x[None], KEY, noise_scale=SIGMAS)


def test_denoising_learns_the_density_of_the_noised_data(monkeypatch):
    """At two levels: the mixture of the two noised densities."""
    _, gradient = with_noise(monkeypatch, denoise_mixture)
    density, slopes = noised(SIGMAS)
    rows = np.stack([Y, -slopes.sum(axis=0) / density.sum(axis=0)], axis=1)
    weights = density.sum(axis=0) / density.sum()
    exact = expectation(lambda parameters, row: fisher(parameters, *row), rows, weights)[1]
    np.testing.assert_allclose(gradient, exact, rtol=1e-6)
    assert np.abs(gradient - exact_fisher()[1]).max() > 0.1 * np.abs(gradient).max()  # not that of the data


def test_denoising_at_one_level_is_vincents_regression():
    """Against the formula, at given noise: the target is minus the offset over the variance."""
    batch, options = jnp.array([0.3, -1.0, 0.8]), {"noise_scale": 0.5, "num_noises": 4}
    potential = Wells(jnp.asarray(MODEL, jnp.float32))
    found = jax.jit(functools.partial(denoising_score_matching, potential, **options))(batch, KEY)
    _, offsets = denoising._draw_noise(KEY, jnp.array([0.5]), batch[:, None], 4)
    points = np.asarray(batch) + np.asarray(offsets)[..., 0]
    residuals = slope(MODEL, points) - np.asarray(offsets)[..., 0] / 0.25
    np.testing.assert_allclose(found, 0.5 * (residuals**2).mean(), rtol=1e-5)


def test_multiscale_denoising_learns_what_its_docstring_says(monkeypatch):
    target = 0.3

    def loss(parameters, x):
        potential = Wells(parameters)
        return multiscale_denoising_score_matching(potential, x[None], KEY, noise_scales=SIGMAS, target_scale=target)

    _, gradient = with_noise(monkeypatch, loss)
    density, slopes = noised(SIGMAS)
    weighted = (density / SIGMAS[:, None] ** 2).sum(axis=0)
    optimum = -slopes.sum(axis=0) / (target**2 * weighted)
    rows = np.stack([Y, optimum], axis=1)
    weights = 2.0 * target**4 * weighted / density.sum()
    exact = expectation(lambda parameters, row: fisher(parameters, *row), rows, weights)[1]
    np.testing.assert_allclose(gradient, exact, rtol=1e-6)


def test_conditional_denoising_learns_every_noised_density(monkeypatch):
    def loss(parameters, x):
        def potential(event, level):
            return Wells(parameters)(event) / (1.0 + level**2)

        return conditional_denoising_score_matching(potential, x[None], KEY, noise_scales=SIGMAS)

    _, gradient = with_noise(monkeypatch, loss)
    density, slopes = noised(SIGMAS)
    rows = np.concatenate(
        [np.stack([Y, np.full_like(Y, s), -g / p], axis=1) for s, g, p in zip(SIGMAS, slopes, density, strict=True)]
    )

    def divergence(parameters, row):
        y, level, data_slope = row
        return 0.5 * level**2 * (slope(parameters, y) / (1.0 + level**2) - data_slope) ** 2

    exact = expectation(divergence, rows, density.ravel() / density.sum())[1]
    np.testing.assert_allclose(gradient, exact, rtol=1e-6)


@pytest.mark.parametrize("fault", ["sign", "scale", "variance"])
def test_wrong_noise_is_seen_by_the_denoising_check(monkeypatch, fault):
    """The energy at rows without noise, noise of the wrong sign, and a target that is not divided by the variance."""

    def faulty(parameters, row):
        x, level, d = row
        target = {"sign": -d / level**2, "scale": d / level, "variance": d}[fault]
        return 0.5 * (slope(parameters, x + d) - target) ** 2

    grids = np.meshgrid(X[::2], SIGMAS, D, indexing="ij")
    density = (P[::2] / P[::2].sum())[:, None, None] * normal_density(D, SIGMAS[:, None])[None]
    found = expectation(faulty, np.stack([g.ravel() for g in grids], axis=1), (density / density.sum()).ravel())
    assert_other_gradient(found, with_noise(monkeypatch, denoise_mixture))


def test_the_noise_has_the_levels_it_is_said_to_have(key):
    scales = jnp.array([0.5, 2.0])
    level, offset = denoising._draw_noise(key, scales, jnp.zeros((400, 3)), 50)
    level, offset = np.asarray(level), np.asarray(offset)
    t_test_chain_means((level == 0.5).mean(axis=0), 0.5, name="level").raise_if_failed()
    standard = ((offset / level[..., None]) ** 2).mean(axis=(0, 2))
    assert t_test_chain_means(standard, 1.0, name="variance").raise_if_failed().power < 0.1


# Bounds.


class Family(eqx.Module):
    """U(x) = a x + b x^2 - c log x."""

    parameters: jax.Array
    has_log: bool = eqx.field(static=True)

    def __call__(self, x):
        linear, square, log = self.parameters
        energy = linear * x + square * x**2
        return energy - log * jnp.log(x) if self.has_log else energy


def panels(*ends, order=80):
    """Gauss-Legendre points and weights on every panel between the given ends."""
    nodes, weights = np.polynomial.legendre.leggauss(order)
    pairs = list(itertools.pairwise(ends))
    points = [0.5 * (high - low) * nodes + 0.5 * (high + low) for low, high in pairs]
    return np.concatenate(points), np.concatenate([0.5 * (high - low) * weights for low, high in pairs])


BOUNDED = {
    # the parameters of the data, whether there is a logarithm, the bounds, options, and where the weight has kinks
    "gamma": ((2.0, 0.0, 2.0), True, {"lower": 0.0}, {}, (0.0, 5.0, 25.0)),
    "gamma, saturated": ((2.0, 0.0, 2.0), True, {"lower": 0.0}, {"saturation": 1.0, "power": 2.0}, (0, 1, 5, 25)),
    "half-normal": ((0.0, 0.5, 0.0), False, {"lower": 0.0}, {}, (0.0, 3.0, 12.0)),
    "reflected": ((0.0, 0.5, 0.0), False, {"upper": 1.0}, {"saturation": 0.5}, (-12.0, -3.0, 0.5, 1.0)),
    "truncated normal": ((0.3, 0.5, 0.0), False, {"lower": -1.0, "upper": 2.0}, {}, (-1.0, 0.5, 2.0)),
    "saturated": ((0.3, 0.5, 0.0), False, {"lower": -1.0, "upper": 2.0}, {"saturation": 0.5}, (-1, -0.5, 1.5, 2)),
    "exponential": ((1.0, 0.0, 0.0), True, {"lower": 0.0}, {"power": 2.0}, (0.0, 5.0, 50.0)),
}


def bounded_case(name):
    """Points, weights and slopes of the data, the bounds, the options, and whether there is a logarithm."""
    truth, has_log, bounds, options, ends = BOUNDED[name]
    x, weights = panels(*ends)
    log_x = np.log(x) if has_log else 0.0
    density = weights * np.exp(-(truth[0] * x + truth[1] * x**2 - truth[2] * log_x))
    data_slope = truth[0] + 2.0 * truth[1] * x - (truth[2] / x if has_log else 0.0)
    return x, density / density.sum(), data_slope, bounds, options, has_log


def weighted_fisher(name):
    x, weights, data_slope, bounds, options, has_log = bounded_case(name)
    distance = np.minimum(x - bounds.get("lower", -np.inf), bounds.get("upper", np.inf) - x)
    h = np.minimum(distance, options.get("saturation", np.inf)) ** options.get("power", 1.0)

    def divergence(parameters, row):
        x, data_slope, h = row
        mine = parameters[0] + 2.0 * parameters[1] * x - (parameters[2] / x if has_log else 0.0)
        return 0.5 * h * (mine - data_slope) ** 2

    value, gradient = expectation(divergence, np.stack([x, data_slope, h], axis=1), weights)
    return value - 0.5 * weights @ (h * data_slope**2), gradient


def bounded_expectation(name, objective=generalized_score_matching, **changed):
    x, weights, _, bounds, options, has_log = bounded_case(name)
    arguments = {**bounds, **options, **changed}
    return expectation(lambda p, x: objective(Family(p, has_log), x[None], KEY, **arguments), x, weights)


@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_score_matching_is_the_weighted_fisher_divergence(name):
    assert_same(bounded_expectation(name), weighted_fisher(name))


def without_weight(potential, batch, key, *, lower=None, upper=None):
    return score_matching(potential, batch, key)


def without_slope_of_weight(potential, batch, key, *, lower, upper):
    def row_loss(x):
        h = jnp.minimum(x - lower, upper - x)
        return h * (0.5 * jax.grad(potential)(x) ** 2 - jax.grad(jax.grad(potential))(x))

    return jax.vmap(row_loss)(batch).mean()


@pytest.mark.parametrize("fault", [without_weight, without_slope_of_weight])
def test_a_boundary_that_is_not_weighed_out_is_seen(fault):
    assert_other_gradient(bounded_expectation("truncated normal", fault), weighted_fisher("truncated normal"))


def test_entries_with_and_without_bounds_add_up():
    """A separable energy of (positive, real, in [0, 2]) is the sum of three losses; bounds may come from the support."""
    batch = jax.random.uniform(KEY, (6, 3), minval=0.1, maxval=1.9)
    options = {"lower": jnp.array([0.0, -jnp.inf, 0.0]), "upper": jnp.array([jnp.inf, jnp.inf, 2.0])}

    def energy(x):
        return jnp.sum(jnp.sin(x) * jnp.array([1.0, 2.0, 3.0]))

    def part(weight):
        return lambda x: weight * jnp.sin(x)

    @jax.jit
    def both(batch):
        whole = generalized_score_matching(energy, batch, KEY, **options)
        first = generalized_score_matching(part(1.0), batch[:, 0], KEY, lower=0.0)
        second = score_matching(part(2.0), batch[:, 1], KEY)
        third = generalized_score_matching(ebm.potentials.tilt(part(3.0), dist.Uniform(0.0, 2.0)), batch[:, 2], KEY)
        return whole, first + second + third

    np.testing.assert_allclose(*both(batch), rtol=1e-5)


def test_rows_outside_the_bounds_are_refused_or_make_the_loss_nan():
    def energy(x):
        return x**2

    with pytest.raises(ValueError, match="batch: got 1 of 2 rows outside the support, the first at index 1"):
        generalized_score_matching(energy, jnp.array([1.0, -1.0]), KEY, lower=0.0)
    tilted = ebm.potentials.tilt(energy, dist.Gamma(2.0, 1.0))
    with pytest.raises(ValueError, match="outside the support"):
        generalized_score_matching(tilted, jnp.array([1.0, -1.0]), KEY)
    for potential, options in ((energy, {"lower": 0.0}), (tilted, {})):
        loss = jax.jit(lambda batch, p=potential, o=options: generalized_score_matching(p, batch, KEY, **o))
        assert np.isnan(loss(jnp.array([1.0, -1.0])))
        assert np.isfinite(loss(jnp.array([1.0, 2.0])))


# Domains and refusals.


@pytest.mark.parametrize(("support", "shape", "expected"), [
    (constraints.real, (), True),
    (constraints.real_vector, (3,), True),
    (constraints.real_matrix, (2, 2), True),
    (dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2).support, (2, 2), True),
    (constraints.interval(-jnp.inf, jnp.inf), (), True),
    (constraints.positive, (), False),
    (constraints.less_than(1e9), (), False),
    (constraints.interval(-1e20, 1e20), (), False),
    (dist.HalfNormal(1.0).expand([2]).to_event(1).support, (2,), False),
    (constraints.simplex, (3,), False),
    (constraints.sphere, (3,), False),
    (constraints.ordered_vector, (3,), False),
    (constraints.positive_definite, (2, 2), False),
    (constraints.circular, (), False),
    (constraints.integer_interval(0, 3), (), False),
])  # fmt: skip
def test_the_whole_space_is_told_from_every_other_support(support, shape, expected):
    event = jnp.zeros(shape)
    assert is_whole_space(support, event) is expected
    found = []
    jax.jit(lambda x: found.append(is_whole_space(support, event)) or x)(0.0)
    assert found == [expected]


def bowl(x):
    return 0.5 * jnp.sum(x**2)


POSITIVE = ebm.potentials.tilt(bowl, dist.HalfNormal(1.0))
ROWS = jnp.ones(4)
WRONG: Any = "nonsense"
ALL = [
    score_matching,
    sliced_score_matching,
    functools.partial(denoising_score_matching, noise_scale=0.1),
    functools.partial(multiscale_denoising_score_matching, noise_scales=(0.1, 1.0), target_scale=0.1),
]


@pytest.mark.parametrize("objective", ALL)
def test_supports_with_a_boundary_and_integers_are_refused(objective):
    for wrap in (lambda f: f, jax.jit):  # also while a program is being compiled
        with pytest.raises(ValueError, match=r"expected the whole space.*Use generalized_score_matching"):
            wrap(lambda rows: objective(POSITIVE, rows, KEY))(ROWS)
        with pytest.raises(TypeError, match=r"got dtype int32.*pseudo_likelihood"):
            wrap(lambda rows: objective(bowl, rows, KEY))(jnp.ones((4, 2), jnp.int32))


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: score_matching(bowl, ROWS, KEY, trace=WRONG), ValueError, "trace: got 'nonsense'"),
    (lambda: score_matching(bowl, ROWS, KEY, num_probes=0), ValueError, "num_probes: got 0"),
    (lambda: sliced_score_matching(bowl, ROWS, KEY, projections=WRONG), ValueError, "projections: got 'nonsense'"),
    (lambda: sliced_score_matching(bowl, ROWS.at[1].set(jnp.nan), KEY), ValueError, "got 1 of 4 rows that are NaN"),
    (lambda: score_matching(bowl, (ROWS, jnp.ones(3)), KEY), ValueError, r"batch: got arrays of \[3, 4\] rows"),
    (lambda: score_matching(lambda x: x, jnp.ones((4, 2)), KEY), ValueError, "returned shape"),
    (lambda: score_matching(bowl, {}, KEY), ValueError, "batch: got no arrays"),
    (lambda: denoising_score_matching(bowl, ROWS, KEY, noise_scale=0.0), ValueError, "noise_scale: got 0.0"),
    (lambda: denoising_score_matching(bowl, ROWS, KEY, noise_scale=jnp.ones((2, 2))), ValueError, "got shape"),
    (lambda: denoising_score_matching(bowl, ROWS, KEY, noise_scale=0.1, num_noises=0), ValueError, "num_noises"),
    (
        lambda: multiscale_denoising_score_matching(bowl, ROWS, KEY, noise_scales=0.1, target_scale=-1.0),
        ValueError,
        "target_scale: got -1.0",
    ),
    (lambda: conditional_denoising_score_matching(bowl, ROWS, KEY, noise_scales=0.1), ValueError, "could not be"),
    (lambda: generalized_score_matching(bowl, ROWS, KEY), ValueError, "lower, upper: got neither"),
    (lambda: generalized_score_matching(POSITIVE, ROWS, KEY, lower=0.0), ValueError, "bounds are read from it"),
    (lambda: generalized_score_matching(bowl, ROWS, KEY, lower=2.0, upper=1.0), ValueError, "lower bounds below"),
    (lambda: generalized_score_matching(bowl, ROWS, KEY, lower=-jnp.inf), ValueError, "no finite bound"),
    (lambda: generalized_score_matching(bowl, ROWS, KEY, lower=jnp.zeros(3)), ValueError, "that broadcast"),
    (lambda: generalized_score_matching(bowl, ROWS, KEY, lower=0.0, power=0.0), ValueError, "power: got 0.0"),
    (lambda: generalized_score_matching(bowl, (ROWS,), KEY, lower=0.0), TypeError, "batch: got a tuple"),
    (
        lambda: generalized_score_matching(ebm.potentials.tilt(bowl, dist.Normal(0.0, 1.0)), ROWS, KEY),
        ValueError,
        "Use score_matching",
    ),
    (
        lambda: generalized_score_matching(
            ebm.potentials.tilt(bowl, dist.Dirichlet(jnp.ones(3))), jnp.ones((2, 3)) / 3, KEY
        ),
        ValueError,
        "Transform the events",
    ),
])  # fmt: skip
def test_bad_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("objective", [*ALL, functools.partial(generalized_score_matching, lower=-5.0)])
@pytest.mark.parametrize(("shape", "dtype"), [((), jnp.float32), ((4, 4, 1), jnp.float32), ((3,), jnp.float64)])
def test_every_event_shape_and_precision_has_a_gradient_under_jit_and_vmap(objective, shape, dtype):
    check_gradient_of_scale(objective, bowl, shape, dtype, KEY)


def test_events_may_be_pytrees_and_their_layout_does_not_matter():
    batch = jax.random.normal(KEY, (5, 3))

    def energy(x):
        return jnp.sin(x[0] * x[1]) + x[2] ** 4

    def in_parts(event):
        return energy(jnp.append(event["b"], event["a"]))

    losses = jax.jit(lambda: (
        score_matching(energy, batch, KEY),
        score_matching(in_parts, {"a": batch[:, 2], "b": batch[:, :2]}, KEY),
    ))()  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_base_counts_and_long_events_have_their_whole_trace():
    """Events of 70 entries: more than the Hessian is looked at at a time."""
    batch = jax.random.normal(KEY, (3, 70))
    stiffness = jnp.linspace(0.5, 2.0, 70)
    tilted = ebm.potentials.tilt(
        lambda x: 0.5 * jnp.sum(stiffness * x**2), dist.Normal(0.0, 2.0).expand([70]).to_event(1)
    )
    found = jax.jit(functools.partial(score_matching, tilted))(batch, KEY)
    whole = np.asarray(stiffness) + 0.25
    expected = 0.5 * ((whole * np.asarray(batch)) ** 2).sum(axis=1).mean() - whole.sum()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Training.


class Gaussian(eqx.Module):
    """U(x) = x'Ax / 2 - b'x."""

    precision: jax.Array
    linear: jax.Array

    def __call__(self, x):
        return 0.5 * x @ (self.precision + self.precision.T) @ x / 2.0 - self.linear @ x


def test_a_gaussian_energy_reaches_the_sample_mean_and_covariance_and_a_fresh_partial_does_not_recompile(key):
    data = np.random.default_rng(3).normal(size=(200, 2)) @ np.array([[1.0, 0.5], [0.0, 0.7]]) + 0.5
    num_traces = []

    def counted(potential, batch, key, *, trace, scale):
        num_traces[-1] += 1
        return scale * score_matching(potential, batch, key, trace=trace)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 600))
    state = ebm.init_train(Gaussian(jnp.eye(2), jnp.zeros(2)), optimizer)
    for _ in range(2):
        num_traces.append(0)
        objective = stateless(functools.partial(counted, trace="exact", scale=0.5))
        state, _ = ebm.fit(key, state, data, objective, optimizer, num_steps=300)
    assert num_traces[0] > 0
    assert num_traces[1] == 0
    precision = 0.5 * (state.potential.precision + state.potential.precision.T)
    np.testing.assert_allclose(np.linalg.inv(precision), np.cov(data.T, bias=True), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.linalg.solve(precision, state.potential.linear), data.mean(axis=0), rtol=2e-3)


def test_fit_stops_where_rows_are_outside_the_bounds(key):
    optimizer = optax.adam(0.1)
    state = ebm.init_train(Family(jnp.array([1.0, 0.5, 0.0]), False), optimizer)
    objective = stateless(functools.partial(generalized_score_matching, lower=0.0))
    with pytest.raises(TrainingFailure):
        ebm.fit(key, state, jnp.array([1.0, -1.0]), objective, optimizer, num_steps=2)
