"""What NumPyro asks of any distribution, asked of EBMs on every kind of support.

Every case is an EBM with its exact log Z and an exact sampler, next to the law that it is.
"""

import copy
import functools
import itertools
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
from jax.scipy.special import gammaln
from jax.tree_util import Partial
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over

import ebm_ppl as ebm
from ebm_ppl.testing import cdf_test, multinomial_test


def improper(support, event_shape=()):
    return dist.ImproperUniform(support, (), event_shape)


class Exact(eqx.Module):
    """Independent draws of a NumPyro law."""

    law: dist.Distribution

    def __call__(self, key, potential, num_samples):
        return self.law.sample(key, (num_samples,))


# Exact draws from exponentials and coin flips, which compile in a fraction of the time of NumPyro's own.


def gammas(key, shapes, num_samples):
    """Independent gamma variables of whole shapes, ``(num_samples, len(shapes))``."""
    ends = np.cumsum(shapes)
    exponentials = jax.random.exponential(key, (num_samples, ends[-1]))
    return jnp.stack([part.sum(axis=1) for part in jnp.split(exponentials, ends[:-1], axis=1)], axis=1)


def gamma_draws(key, potential, num_samples):
    return gammas(key, [3], num_samples)[:, 0] / 2.0


def beta_draws(key, potential, num_samples):
    parts = gammas(key, [2, 3], num_samples)
    return 2.0 * parts[:, 0] / parts.sum(axis=1) - 1.0


def dirichlet_draws(key, potential, num_samples):
    parts = gammas(key, ALPHA.astype(int), num_samples)
    return parts / parts.sum(axis=1, keepdims=True)


def binomial_draws(key, potential, num_samples):
    return jax.random.bernoulli(key, jax.nn.sigmoid(0.3), (num_samples, 5)).sum(axis=1)


def von_mises_fisher(key, potential, num_samples):
    """On the sphere in three dimensions the coordinate along the mean direction has a CDF that inverts."""
    key, other = jax.random.split(key)
    u = jax.random.uniform(key, (num_samples,))
    along = 1.0 + jnp.log(u + (1.0 - u) * jnp.exp(-2.0 * KAPPA)) / KAPPA
    angle = 2.0 * jnp.pi * jax.random.uniform(other, (num_samples,))
    radius = jnp.sqrt(jnp.maximum(1.0 - along**2, 0.0))
    return jnp.stack([along, radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=1)


class VonMisesFisher:
    """The density of scipy's law, with NumPyro's names."""

    batch_shape, event_shape = (), (3,)

    def log_prob(self, value):
        return KAPPA * value[..., 0] + np.log(KAPPA / (4 * np.pi * np.sinh(KAPPA)))


# --- Energies, as module-level functions of their parameters: what a user writes ------------------------------------

KAPPA, MODE = 4.0, 2.9
ALPHA, FIELD = np.array([2.0, 3.0, 2.0]), np.array([0.7, -0.4, 0.2])
LOGITS, TILTS = np.array([0.1, -0.5, 0.9, 0.4]), np.array([0.3, 0.2, -1.0, 0.6])


def quadratic(loc, scale, x):
    return 0.5 * ((x - loc) / scale) ** 2


def gamma(shape, rate, x):
    return rate * x - (shape - 1.0) * jnp.log(x)


def power(exponent, x):
    return exponent * jnp.log(x)


def beta(a, b, x):
    return -(a - 1.0) * jnp.log(x + 1.0) - (b - 1.0) * jnp.log(1.0 - x)


def dirichlet(alpha, x):
    return -jnp.sum((alpha - 1.0) * jnp.log(x))


def von_mises(kappa, mode, x):
    return -kappa * jnp.cos(x - mode)


def alignment(kappa, x):
    return -kappa * x[0]


def field(h, x):
    return -jnp.sum(h * x)


def binomial(logit, x):
    return -logit * x - gammaln(6.0) + gammaln(x + 1.0) + gammaln(6.0 - x)


def table(tilt, x):
    return -tilt[x]


class Case(NamedTuple):
    """An EBM, the law it is, points outside, and one way to integrate over its support.

    ``grid`` gives points with the weights of a quadrature rule (or all states, with weight one), and ``project`` maps an
    event to the number whose law is compared with the draws; ``levels`` are the ascending values it takes on the grid.
    """

    site: ebm.EBM
    exact: Any
    outside: list
    grid: Callable[[], tuple[np.ndarray, np.ndarray]]
    project: Callable[[np.ndarray], np.ndarray] = lambda x: x


def line(low, high, num=4000):
    def grid():
        step = (high - low) / num
        return low + step * (np.arange(num) + 0.5), np.full(num, step)

    return grid


def triangle(num=1200):
    """Midpoints of the cells below the diagonal, and half a cell on it."""
    middle = (np.arange(num) + 0.5) / num
    a, b = (axis.ravel() for axis in np.meshgrid(middle, middle, indexing="ij"))
    inside = a + b < 1.0 - 0.25 / num
    points = np.stack([a, b, 1.0 - a - b], axis=1)[inside]
    return points, np.full(len(points), num**-2.0)


def globe(num=400):
    """By Archimedes, equal steps along an axis are equal areas."""
    along, angle = (np.arange(num) + 0.5) / num * 2.0 - 1.0, 2.0 * np.pi * np.arange(60) / 60
    along, angle = (axis.ravel() for axis in np.meshgrid(along, angle, indexing="ij"))
    radius = np.sqrt(1.0 - along**2)
    points = np.stack([along, radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return points, np.full(len(points), 4.0 * np.pi / len(points))


def cube():
    states = np.array(list(itertools.product([0, 1], repeat=3)))
    return states, np.ones(8)


def integers(num):
    return lambda: (np.arange(num), np.ones(num))


def log_beta(*a):
    return scipy.special.gammaln(a).sum() - scipy.special.gammaln(np.sum(a))


def site(potential, base, sampler, log_normalizer):
    """The sampler is exact: a function, or the law that is sampled."""
    log_normalizer = jnp.asarray(log_normalizer, float)
    sampler = Exact(sampler) if isinstance(sampler, dist.Distribution) else sampler
    return ebm.EBM(potential, base, log_normalizer=log_normalizer, sampler=sampler)


def real():
    law = dist.Normal(1.0, 0.7)
    potential = Partial(quadratic, 1.0, 0.7)
    return Case(
        site(potential, improper(constraints.real), law, np.log(0.7 * np.sqrt(2 * np.pi))),
        law,
        [np.nan],
        line(-6.0, 8.0),
    )


def positive():
    law = dist.Gamma(3.0, 2.0)
    return Case(
        site(Partial(gamma, 3.0, 2.0), improper(constraints.positive), gamma_draws, np.log(2.0 / 8.0)),
        law,
        [-1.0, 0.0, np.nan],
        line(0.0, 20.0),
    )


def positive_with_log_normal_base():
    """``exp(-t log x)`` tilts the location of a LogNormal(0.5, 0.7) by ``-0.49 t``; log Z = -0.5 t + 0.49 t^2 / 2."""
    law = dist.LogNormal(0.5 - 0.49 * 1.2, 0.7)
    log_z = -0.5 * 1.2 + 0.49 * 1.2**2 / 2
    return Case(
        site(Partial(power, 1.2), dist.LogNormal(0.5, 0.7), law, log_z),
        law,
        [-1.0, 0.0, np.nan],
        line(0.0, 30.0, 40000),
    )


def interval():
    law = dist.TransformedDistribution(dist.Beta(2.0, 3.0), dist.transforms.AffineTransform(-1.0, 2.0))
    log_z = log_beta(2.0, 3.0) + 4.0 * np.log(2.0)
    return Case(
        site(Partial(beta, 2.0, 3.0), improper(constraints.interval(-1.0, 1.0)), beta_draws, log_z),
        law,
        [-1.5, 1.01, np.nan],
        line(-1.0, 1.0),
    )


def simplex():
    law = dist.Dirichlet(ALPHA)
    return Case(
        site(
            Partial(dirichlet, jnp.asarray(ALPHA)),
            improper(constraints.simplex, (3,)),
            dirichlet_draws,
            log_beta(*ALPHA),
        ),
        law,
        [[0.5, 0.5, 0.5], [1.2, -0.1, -0.1], [0.0, 0.0, 0.0]],
        triangle,
        lambda x: x[..., 0],
    )


def circular():
    law = dist.VonMises(MODE, KAPPA)
    log_z = np.log(2 * np.pi * scipy.special.i0(KAPPA))
    return Case(
        site(Partial(von_mises, KAPPA, MODE), improper(constraints.circular), law, log_z),
        law,
        [-4.0, 3.5, np.nan],
        line(-np.pi, np.pi),
    )


def sphere():
    log_z = np.log(4 * np.pi * np.sinh(KAPPA) / KAPPA)
    potential = Partial(alignment, KAPPA)
    return Case(
        site(potential, improper(constraints.sphere, (3,)), von_mises_fisher, log_z),
        VonMisesFisher(),
        [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.0]],
        globe,
        lambda x: x[..., 0],
    )


def boolean():
    law = dist.Bernoulli(logits=jnp.asarray(FIELD)).to_event(1)
    potential = Partial(field, jnp.asarray(FIELD))
    return Case(
        site(potential, improper(constraints.boolean, (3,)), law, np.sum(np.logaddexp(0.0, FIELD))),
        law,
        [[0, 2, 1], [-1, 0, 0]],
        cube,
        lambda x: x @ np.array([4, 2, 1]),
    )


def integer():
    law = dist.Binomial(5, logits=0.3)
    return Case(
        site(
            Partial(binomial, 0.3),
            improper(constraints.integer_interval(0, 5)),
            binomial_draws,
            5 * np.logaddexp(0.0, 0.3),
        ),
        law,
        [-1, 6],
        integers(6),
    )


def integer_with_categorical_base():
    law = dist.Categorical(logits=jnp.asarray(LOGITS + TILTS))
    log_z = scipy.special.logsumexp(LOGITS + TILTS) - scipy.special.logsumexp(LOGITS)
    base = dist.Categorical(logits=jnp.asarray(LOGITS))
    return Case(site(Partial(table, jnp.asarray(TILTS)), base, law, log_z), law, [-1, 4], integers(4))


BUILDERS = {
    build.__name__.replace("_", " "): build
    for build in (
        real,
        positive,
        positive_with_log_normal_base,
        interval,
        simplex,
        circular,
        sphere,
        boolean,
        integer,
        integer_with_categorical_base,
    )
}
CASES = {name: build() for name, build in BUILDERS.items()}
every = pytest.mark.parametrize("name", CASES)
continuous = [name for name, case in CASES.items() if not case.site.is_discrete]
discrete = [name for name, case in CASES.items() if case.site.is_discrete]
of_three = pytest.mark.parametrize("name", ["real", "simplex", "boolean"])

# Whatever is computed is compiled as one function, which is quicker than one operation at a time.


@functools.cache
def draws(name):
    """Ten events, ``(5, 2, *event)``."""
    return jax.jit(lambda key: CASES[name].site.sample(key, (5, 2)))(jax.random.key(0))


@functools.cache
def masses(name):
    """The points of the grid, and the probability that the density gives to each."""
    points, weights = CASES[name].grid()
    log_probs = jax.jit(CASES[name].site.log_prob)(points.astype(draws(name).dtype))
    return points, np.exp(np.asarray(log_probs, np.float64)) * weights


@functools.cache
def densities(name):
    """Of the EBM, and of the law that it is, at the draws."""
    case = CASES[name]
    return jax.jit(lambda x: (case.site.log_prob(x), case.exact.log_prob(x)))(draws(name))


def outside(name):
    return jnp.asarray(CASES[name].outside)


# --- Density and support ---------------------------------------------------------------------------------------------


@every
def test_log_prob_is_that_of_the_law_it_is(name):
    ours, exact = densities(name)
    assert ours.shape == exact.shape == (5, 2)
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)
    assert CASES[name].site.event_shape == tuple(CASES[name].exact.event_shape)


@every
def test_points_outside_the_support_have_no_density(name):
    site, x = CASES[name].site, outside(name)

    @jax.jit
    def densities(x, y):
        return site.log_prob(x), site.expand([len(x)]).log_prob(x), site.log_prob(jnp.stack([x[0], y]))

    alone, expanded, mixed = densities(x, draws(name)[0, 0])
    assert np.all(np.asarray(alone) == -np.inf)
    assert np.all(np.asarray(expanded) == -np.inf)
    np.testing.assert_array_equal(np.isfinite(mixed), [False, True])


@every
def test_support_holds_the_draws_and_nothing_else(name):
    site, x = CASES[name].site, draws(name)
    support = site.support
    inside, beyond, feasible = jax.jit(
        lambda x, y: (support(x), support(y), [support(support.feasible_like(value)) for value in (x, y)])
    )(x, outside(name))
    assert np.all(inside)
    assert not np.any(beyond)
    assert all(np.all(value) for value in feasible)
    assert inside.shape[:2] == feasible[0].shape[:2] == (5, 2)
    assert support.event_dim <= len(site.event_shape)
    assert support.is_discrete == site.is_discrete == jnp.issubdtype(x.dtype, jnp.integer)


@every
def test_density_sums_to_one(name):
    assert masses(name)[1].sum() == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("name", continuous)
def test_gradient_is_that_of_the_law_and_finite_everywhere(name):
    case, num = CASES[name], len(outside(name))

    @jax.jit
    def gradients(x, both):
        ours, exact = (jax.grad(lambda x, law=law: law.log_prob(x).sum())(x) for law in (case.site, case.exact))
        inside = lambda x: jnp.where(jnp.arange(num + 1) < num, 0.0, case.site.log_prob(x)).sum()
        return ours, exact, jax.grad(inside)(both)

    x = draws(name)
    ours, exact, with_others = gradients(x, jnp.concatenate([outside(name), x[0, :1]]))
    difference = np.asarray(ours - exact)
    if name == "simplex":
        # Only what is tangent to the simplex matters: the two laws continue their densities beyond it differently.
        difference = difference - difference.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(difference, 0.0, atol=2e-3 * (1.0 + np.abs(exact).max()))
    np.testing.assert_allclose(with_others[-1], ours[0, 0], rtol=1e-4, atol=1e-4)
    assert np.all(np.asarray(with_others[:-1]) == 0.0)


@pytest.mark.parametrize("name", continuous)
def test_draws_follow_the_density(name, key):
    """The CDF is that of the density, by quadrature, and not that of the law that the sampler was made of."""
    points, mass = masses(name)
    levels, index = np.unique(CASES[name].project(points), return_inverse=True)
    per_level = np.bincount(index.ravel(), mass)
    cumulative = np.cumsum(per_level) - 0.5 * per_level
    x = CASES[name].project(np.asarray(CASES[name].site.sample(key, (4000,))))
    cdf_test(x, lambda x: np.interp(x, levels, cumulative), name=name).raise_if_failed()


@pytest.mark.parametrize("name", discrete)
def test_frequencies_follow_the_probabilities(name, key):
    _, probabilities = masses(name)
    x = CASES[name].project(np.asarray(CASES[name].site.sample(key, (4000,))))
    counts = np.bincount(x, minlength=len(probabilities))
    multinomial_test(counts, probabilities / probabilities.sum(), name=name).raise_if_failed()


# --- Shapes ----------------------------------------------------------------------------------------------------------

WRAPPERS = {
    "itself": (lambda d: d, ()),
    "expand": (lambda d: d.expand([4]), (4,)),
    "expand twice": (lambda d: d.expand([4, 1]).expand([4, 3]), (4, 3)),
    "expand_by": (lambda d: d.expand_by([2]), (2,)),
    "mask": (lambda d: d.expand([4]).mask(jnp.array([True, False, True, False])), (4,)),
    "mask everything": (lambda d: d.mask(False), ()),
    "to_event": (lambda d: d.expand([2, 4]).to_event(1), (2,)),
    "to_event of all": (lambda d: d.expand([2, 4]).to_event(), ()),
    "expand an event": (lambda d: d.expand([4]).to_event(1).expand([3]), (3,)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@of_three
def test_shapes_of_draws_and_densities(name, wrapper):
    wrap, batch_shape = WRAPPERS[wrapper]
    ours, exact = wrap(CASES[name].site), wrap(CASES[name].exact)
    assert (ours.batch_shape, ours.event_shape, ours.event_dim) == (batch_shape, exact.event_shape, exact.event_dim)
    assert ours.shape((3,)) == (3, *batch_shape, *exact.event_shape)

    def densities(sample_shape):
        x = ours.sample(jax.random.key(0), sample_shape)
        return x, ours.log_prob(x), exact.log_prob(x)

    for sample_shape in ((), (1,)):
        shapes = jax.tree.map(lambda struct: struct.shape, jax.eval_shape(lambda s=sample_shape: densities(s)))
        assert shapes == (ours.shape(sample_shape), sample_shape + batch_shape, sample_shape + batch_shape)
    x, density, expected = jax.jit(lambda: densities((2, 3)))()
    assert x.shape == ours.shape((2, 3))
    assert density.shape == expected.shape == (2, 3, *batch_shape)
    np.testing.assert_allclose(density, expected, rtol=1e-4, atol=1e-4)
    # No two rows are one draw given twice.
    rows = np.asarray(x).reshape(-1, *CASES[name].site.event_shape)
    assert name == "boolean" or len(np.unique(rows, axis=0)) == len(rows)


@of_three
def test_vmap_over_rows_is_the_density_of_rows(name):
    site, x, keys = CASES[name].site, draws(name), jax.random.split(jax.random.key(1), 3)

    @jax.jit
    def both(x, keys):
        densities = jax.vmap(jax.vmap(site.log_prob))(x), site.log_prob(x)
        return densities, (jax.vmap(site.sample)(keys), jnp.stack([site.sample(key) for key in keys]))

    for mapped, plain in both(x, keys):
        np.testing.assert_allclose(mapped, plain, rtol=1e-5, atol=1e-6)


def batched(scale):
    """Rows from the base, from the condition, and from both."""
    loc = jnp.array([0.5, -1.0, 2.0])
    base = dist.Normal(0.0, 3.0 * jnp.ones(3))
    log_z, conditional = jnp.log(scale / 3.0), lambda x, c: tilt(c, scale, 3.0, x)
    return {
        "base": (
            ebm.EBM(Partial(tilt, 0.4, scale, 3.0), base, log_normalizer=log_z),
            dist.Normal(jnp.full(3, 0.4), scale),
        ),
        "condition": (
            ebm.EBM(conditional, dist.Normal(0.0, 3.0), condition=loc, log_normalizer=log_z),
            dist.Normal(loc, scale),
        ),
        "both": (
            ebm.EBM(conditional, base, condition=loc, log_normalizer=log_z * jnp.ones(3)),
            dist.Normal(loc, scale),
        ),
    }


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d,
        lambda d: d.expand([4, 3]),
        lambda d: d.to_event(1),
        lambda d: d.expand([4, 3]).to_event(1),
        lambda d: d.mask(jnp.array([True, False, True])),
        lambda d: d.expand([4, 3]).mask(jnp.arange(12).reshape(4, 3) % 2 == 0).to_event(2),
    ],
    ids=["itself", "expand", "to_event", "expand, to_event", "mask", "expand, mask, to_event"],
)
@pytest.mark.parametrize("rows", ["base", "condition", "both"])
def test_wrappers_of_an_ebm_with_rows(rows, wrap):
    ours, exact = (wrap(law) for law in batched(0.7)[rows])
    assert (ours.batch_shape, ours.event_shape) == (exact.batch_shape, exact.event_shape)
    x = exact.sample(jax.random.key(0), (2,))
    density, expected = jax.jit(lambda x: (ours.log_prob(x), exact.log_prob(x)))(x)
    np.testing.assert_allclose(density, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", ["base", "condition", "both"])
def test_draws_of_an_ebm_with_rows(rows):
    site = batched(0.7)[rows][0].with_sampler(lambda key, potential, num: potential.row + jnp.zeros(num))
    for sample_shape in ((), (4,), (2, 3)):
        expected = np.broadcast_to(np.arange(3.0), (*sample_shape, 3))
        np.testing.assert_array_equal(site.sample(jax.random.key(0), sample_shape), expected)
        wide = site.expand([5, 3]).sample(jax.random.key(0), sample_shape)
        np.testing.assert_array_equal(wide, np.broadcast_to(np.arange(3.0), (*sample_shape, 5, 3)))


# --- Pytrees ---------------------------------------------------------------------------------------------------------


@every
def test_flattening_and_rebuilding_changes_nothing(name):
    for law in (CASES[name].site, CASES[name].site.expand([5, 2]).to_event(1).mask(True)):
        leaves, structure = jax.tree.flatten(law)
        again = jax.tree.unflatten(structure, leaves)
        assert all(isinstance(leaf, jax.Array | np.ndarray | float | int | bool) for leaf in leaves)
        assert jax.tree.structure(again) == structure
        assert hash(jax.tree.structure(again)) == hash(structure)
        assert (again.batch_shape, again.event_shape) == (law.batch_shape, law.event_shape)
        assert repr(again.support) == repr(law.support)
        (ours, again_ours) = jax.jit(lambda x, laws=(law, again): [law.log_prob(x) for law in laws])(draws(name))
        np.testing.assert_array_equal(again_ours, ours)
    site = CASES[name].site
    assert repr(jax.tree.map(lambda leaf: leaf, site)) == repr(site)


@pytest.mark.parametrize("rows", ["base", "condition", "both"])
def test_rows_cross_jit_and_survive_rebuilding(rows):
    site, exact = batched(0.7)[rows]
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(site)))
    assert (again.batch_shape, again.event_shape, repr(again)) == ((3,), (), repr(site))
    x = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
    density, same, one_for_all = jax.jit(lambda site: [site.log_prob(x), again.log_prob(x), site.log_prob(0.3)])(site)
    np.testing.assert_allclose(density, exact.log_prob(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(same, density)
    np.testing.assert_allclose(one_for_all, exact.log_prob(0.3), rtol=1e-4, atol=1e-5)


@every
def test_it_is_an_argument_of_compiled_functions(name):
    site, x = CASES[name].site, draws(name)
    compiled = jax.jit(lambda site, x, key: (site.log_prob(x), site.sample(key, (5, 2))))
    density, draw = compiled(site, x, jax.random.key(0))
    np.testing.assert_allclose(density, densities(name)[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(draw, x, rtol=1e-5, atol=1e-5)
    # Other parameters of the same structure need no second compilation, and give another density.
    moved = jax.tree.map(lambda leaf: 1.1 * leaf if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf, site)
    other, _ = compiled(moved, x, jax.random.key(1))
    assert compiled._cache_size() == 1
    assert not np.allclose(other, density)


def test_an_ebm_returned_from_jit_is_an_ebm():
    def build(loc):
        return ebm.EBM(Partial(quadratic, loc, 0.7), improper(constraints.real), log_normalizer=jnp.log(loc))

    site = jax.jit(build)(2.0)
    assert (site.batch_shape, site.event_shape, site.normalizer_kind) == ((), (), "exact")
    expected = -quadratic(2.0, 0.7, 0.3) - np.log(2.0)
    assert float(site.log_prob(0.3)) == pytest.approx(float(expected), rel=1e-5)


@every
def test_copies_and_pickles(name):
    site, x = CASES[name].site, draws(name)[0]
    copies = [copy.copy(site), copy.deepcopy(site), pickle.loads(pickle.dumps(site))]
    assert {repr(again) for again in copies} == {repr(site)}
    expected, *others = jax.jit(lambda x: [law.log_prob(x) for law in (site, *copies)])(x)
    for other in others:
        np.testing.assert_array_equal(other, expected)


# --- What it does not claim ------------------------------------------------------------------------------------------


@every
def test_flags(name):
    site = CASES[name].site
    for law in (site, site.expand([2]), site.mask(True)):
        assert not law.has_rsample
        assert not law.has_enumerate_support
        assert law.is_discrete == law.support.is_discrete == (name in discrete)
    assert site.normalizer_kind == "exact"
    for part in ("EBM(potential=", "batch_shape=()", f"event_shape={site.event_shape}", "log Z exact"):
        assert part in repr(site)


@pytest.mark.parametrize("name", ["real", "boolean"])
@pytest.mark.parametrize(
    "claim",
    [
        lambda d: d.mean,
        lambda d: d.variance,
        lambda d: d.entropy(),
        lambda d: d.cdf(jnp.zeros(d.event_shape)),
        lambda d: d.icdf(0.5),
        lambda d: d.enumerate_support(),
        lambda d: d.rsample(jax.random.key(0)),
        lambda d: dist.kl_divergence(d, dist.Normal(0.0, 1.0)),
    ],
    ids=["mean", "variance", "entropy", "cdf", "icdf", "enumerate_support", "rsample", "kl_divergence"],
)
def test_what_has_no_closed_form_is_not_implemented(name, claim):
    with pytest.raises(NotImplementedError):
        claim(CASES[name].site)


# --- Precision -------------------------------------------------------------------------------------------------------


@every
def test_64_bits(name):
    with jax.enable_x64(True):
        case = BUILDERS[name]()

        @jax.jit
        def densities(key):
            x = case.site.sample(key, (5, 2))
            return x, case.site.log_prob(x), case.exact.log_prob(x)

        x, ours, exact = densities(jax.random.key(0))
        assert jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.float64
        assert ours.dtype == jnp.float64
        np.testing.assert_allclose(ours, exact, rtol=1e-9, atol=1e-9)
    assert jax.eval_shape(CASES[name].site.log_prob, draws(name)).dtype == jnp.float32


# --- Rows from vmap --------------------------------------------------------------------------------------------------

LOCS, SCALES = jnp.array([0.5, -1.0, 2.0]), jnp.array([0.7, 1.5, 0.4])


def tilt(loc, scale, base_scale, x):
    return quadratic(loc, scale, x) - quadratic(0.0, base_scale, x)


def tilted(loc, scale, base_scale=3.0, **kwargs):
    """``N(loc, scale^2)``, whatever the base."""
    potential = Partial(tilt, loc, scale, base_scale)
    return ebm.EBM(potential, dist.Normal(0.0, base_scale), log_normalizer=jnp.log(scale / base_scale), **kwargs)


VMAPPED = {
    "potential": lambda: jax.vmap(lambda loc: tilted(loc, 0.7))(LOCS),
    "potential and log Z": lambda: jax.vmap(tilted)(LOCS, SCALES),
    "base as well": lambda: jax.vmap(tilted)(LOCS, SCALES, jnp.array([3.0, 4.0, 5.0])),
    "sampler as well": lambda: jax.vmap(lambda loc, scale: tilted(loc, scale, sampler=Exact(dist.Normal(loc, scale))))(
        LOCS, SCALES
    ),
}


@pytest.mark.parametrize("name", VMAPPED)
def test_an_ebm_that_leaves_vmap_has_rows(name):
    site = promote_batch_shape(VMAPPED[name]())
    exact = dist.Normal(LOCS, jnp.full(3, 0.7) if name == "potential" else SCALES)
    assert (site.batch_shape, site.event_shape, site.normalizer_kind) == ((3,), (), "exact")
    x = exact.sample(jax.random.key(0), (4,))
    for value in (x, x[0], jnp.asarray(0.3)):
        np.testing.assert_allclose(site.log_prob(value), exact.log_prob(value), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        site.expand([2, 3]).to_event(1).log_prob(x[:2]), exact.expand([2, 3]).to_event(1).log_prob(x[:2]), rtol=1e-4
    )


def test_a_masked_ebm_that_leaves_vmap_has_rows():
    ours = promote_batch_shape(jax.vmap(lambda loc, scale: tilted(loc, scale).mask(loc > 0.0))(LOCS, SCALES))
    assert (ours.batch_shape, ours.event_shape) == ((3,), ())
    expected = jnp.where(LOCS > 0.0, dist.Normal(LOCS, SCALES).log_prob(0.3), 0.0)
    np.testing.assert_allclose(ours.log_prob(jnp.full(3, 0.3)), expected, rtol=1e-4, atol=1e-5)


def summed(loc, x):
    """Arrays of parameters with a stray row axis would broadcast here, and be summed over."""
    return 0.5 * jnp.sum((x - loc) ** 2)


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize(
    "leave",
    [
        lambda build, num: jax.vmap(build)(LOCS),
        lambda build, num: jax.vmap(lambda loc: build(loc).expand([num]))(LOCS),
        lambda build, num: promote_batch_shape(jax.vmap(lambda loc: build(loc).expand([num]))(LOCS)),
    ],
    ids=["not promoted", "expanded, not promoted", "expanded, promoted"],
)
def test_rows_that_the_shape_does_not_show_give_no_answer(leave, num):
    """Outside vmap its rows must be known, and an EBM cannot have axes between its rows and its event."""

    def build(loc):
        return ebm.EBM(Partial(summed, loc), improper(constraints.real), log_normalizer=0.0)

    with pytest.raises((ValueError, NotImplementedError)):
        leave(build, num).log_prob(jnp.zeros(num))


@pytest.mark.parametrize(
    "ask",
    [
        lambda site: site.unnormalized_log_prob(jnp.zeros(3)),
        lambda site: site.energy(jnp.zeros(3)),
        lambda site: site.sample(jax.random.key(0), (3,)),
    ],
    ids=["unnormalized_log_prob", "energy", "sample"],
)
def test_nothing_answers_for_rows_that_the_shape_does_not_show(ask):
    def build(loc):
        return ebm.EBM(Partial(summed, loc), improper(constraints.real), sampler=Exact(dist.Normal(loc, 1.0)))

    with pytest.raises(ValueError, match="promote_batch_shape"):
        ask(jax.vmap(build)(LOCS))


def test_rows_from_vmap_are_drawn_by_their_own_sampler(key):
    site = promote_batch_shape(VMAPPED["sampler as well"]())
    x = np.asarray(site.sample(key, (3000,)))
    assert x.shape == (3000, 3)
    for row in range(3):
        law = scipy.stats.norm(float(LOCS[row]), float(SCALES[row]))
        cdf_test(x[:, row], law.cdf, name=f"row {row}").raise_if_failed()


def test_an_ebm_that_was_never_mapped_keeps_its_shape():
    for case in CASES.values():
        assert promote_batch_shape(case.site).batch_shape == ()
    for site, _ in batched(0.7).values():
        assert promote_batch_shape(site).batch_shape == (3,)


def test_rows_on_top_of_rows_are_refused():
    mapped = jax.vmap(lambda c: ebm.EBM(lambda x, c: quadratic(c, 1.0, x), improper(constraints.real), condition=c))(
        jnp.ones((2, 3))
    )
    with pytest.raises(NotImplementedError, match="expected one row axis"):
        promote_batch_shape(mapped)


class Estimate(NamedTuple):
    value: Any
    standard_error: Any


def test_the_error_of_log_z_goes_with_it_through_vmap():
    def build(loc):
        return ebm.EBM(
            Partial(quadratic, loc, 1.0), improper(constraints.real), log_normalizer=Estimate(loc, 0.1 * loc)
        )

    site = promote_batch_shape(jax.vmap(build)(LOCS))
    np.testing.assert_allclose(site.log_normalizer, LOCS)
    np.testing.assert_allclose(site.log_normalizer_error, 0.1 * LOCS, rtol=1e-6)


@pytest.mark.parametrize(
    "axes",
    [
        {"potential": 0},
        {"potential": 0, "log_normalizer": 0},
        {"potential": 0, "log_normalizer": 0, "base": True},
    ],
    ids=["potential", "potential and log Z", "base as well"],
)
def test_vmap_over_the_parameters_of_an_ebm(axes):
    scales = SCALES if "log_normalizer" in axes else jnp.full(3, 0.7)
    bases = jnp.array([3.0, 4.0, 5.0]) if "base" in axes else jnp.full(3, 3.0)
    stacked = jax.vmap(tilted)(LOCS, scales, bases)
    one = tilted(LOCS[0], scales[0], bases[0])
    site = copy.copy(one)
    site._parameters = stacked._parameters
    if "log_normalizer" in axes:
        site.log_normalizer = stacked.log_normalizer
    if "base" in axes:
        site.base = stacked.base
        axes = {**axes, "base": vmap_over(one.base, loc=0, scale=0)}
    x = jnp.array([0.1, 0.2, 0.3])
    ours = jax.vmap(lambda site, x: site.log_prob(x), in_axes=(vmap_over(site, **axes), 0))(site, x)
    np.testing.assert_allclose(ours, dist.Normal(LOCS, scales).log_prob(x), rtol=1e-4, atol=1e-5)


# --- One order of leaves ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
    import sys
    import jax, jax.numpy as jnp, numpy as np, numpyro.distributions as dist
    from jax.tree_util import Partial, keystr, tree_flatten_with_path
    import ebm_ppl as ebm

    energy = lambda weights, x: jnp.sum(weights["linear"] * x + weights["curved"] * x**2)
    own = lambda law, x: -law.log_prob(x)

    def build(s):  # all parameters differ, and move with s
        weights = Partial(energy, {"linear": jnp.float32(0.1 + s), "curved": jnp.float32(0.7 + s)})
        holding = Partial(own, dist.StudentT(*jnp.array([4.0, 0.15, 1.1]) + s))
        pairs = [
            (weights, dist.LogNormal(0.2 + s, 1.3 + s)),
            (weights, dist.StudentT(5.0 + s, 0.3 + s, 2.0 + s)),
            (weights, dist.TruncatedNormal(0.35 + s, 1.2 + s, low=-2.0 + s, high=5.0 + s)),
            (weights, dist.Gamma(2.0 + s, 1.5 + s).expand([3]).to_event(1)),
            (holding, dist.Normal(0.25 + s, 2.2 + s)),
        ]
        return [ebm.EBM(*pair, log_normalizer=0.4 + s) for pair in pairs]

    @jax.jit
    def densities(sites):
        return [site.log_prob(jnp.full(site.event_shape, 0.8)) for site in sites]

    mode, file = sys.argv[1:]
    if mode == "save":
        sites = build(0.0)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(sites)]
        np.savez(file, *leaves, **{f"density_{i}": value for i, value in enumerate(densities(sites))})
    else:
        saved = np.load(file)
        structure = jax.tree.structure(build(0.5))
        leaves = [saved[f"arr_{i}"] for i in range(structure.num_leaves)]
        for i, value in enumerate(densities(jax.tree.unflatten(structure, leaves))):
            np.testing.assert_allclose(value, saved[f"density_{i}"], rtol=1e-6)
    for path, leaf in tree_flatten_with_path(build(0.0))[0]:
        print(keystr(path), np.round(np.asarray(leaf, np.float64), 4))
"""


def test_leaves_have_one_order_whatever_the_hash_seed(tmp_path):
    """Saved in order by one process and read back in order by another: the same density."""

    def start(seed, mode):
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), mode, str(tmp_path / "leaves.npz")]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )

    def finish(process):
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return out

    saved = finish(start(0, "save"))
    loaded = [finish(process) for process in [start(1, "load"), start(2, "load")]]
    assert saved.count("\n") > 15
    assert loaded == [saved, saved]
