"""Stein and energy discrepancies against quadrature and enumeration, and the faults that must not pass unseen."""

import functools
import statistics
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import ebm_ppl as ebm
from ebm_ppl.objectives import (
    discrete_energy_discrepancy,
    energy_discrepancy,
    minimum_stein_discrepancy,
    stateless,
    stein,
)
from ebm_ppl.objectives.energy_discrepancy import _discrepancy
from ebm_ppl.targets.discrete import all_states
from tests.wells import GRID, PARAMETERS, Wells, check_gradient_of_scale, check_mean_gradient, grid_probabilities

KEY = jax.random.key(0)
MODEL = np.array([3.0, 0.8, -0.2])
"""Parameters of a model that is not the truth, whose parameters are ``PARAMETERS``."""

# The kernel Stein discrepancy.

X = GRID[::40]
P = grid_probabilities()[::40] / grid_probabilities()[::40].sum()


def slope(parameters, x):
    """dU/dx of the wells, written down a second time."""
    height, place, tilt = parameters
    return 4.0 * height * x * (x**2 - place) + tilt


def multiquadric(x, y, bandwidth, exponent):
    return (1.0 + jnp.sum((x - y) ** 2) / bandwidth**2) ** -exponent


def well_of_weight(x):
    """A diffusion."""
    return 1.0 / (1.0 + x**2)


def stein_value_and_gradient(parameters=MODEL, **options):
    """Expectation of the statistic over independent pairs of rows from the wells, by quadrature in float64."""
    with jax.enable_x64(True):
        first, second = (jnp.asarray(x.ravel()) for x in np.meshgrid(X, X, indexing="ij"))
        weights = jnp.asarray(np.outer(P, P).ravel())

        def expected(parameters):
            def loss(x, y):
                return minimum_stein_discrepancy(Wells(parameters), jnp.stack([x, y]), KEY, **options)

            return weights @ jax.vmap(loss)(first, second)

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(expected))(jnp.asarray(parameters)))


def stein_exact(bandwidth, exponent, diffusion):
    """``E_p E_p [m delta(x) k(x, y) m delta(y)]`` with the difference ``delta`` of the slopes."""
    with jax.enable_x64(True):
        x = jnp.asarray(X)
        kernel = jax.vmap(jax.vmap(multiquadric, (None, 0, None, None)), (0, None, None, None))(
            x, x, bandwidth, exponent
        )

        def exact(parameters):
            delta = P * diffusion(x) * (slope(parameters, x) - slope(PARAMETERS, x))
            return delta @ kernel @ delta

        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(exact))(jnp.asarray(MODEL)))


@pytest.mark.parametrize(("bandwidth", "exponent", "diffusion"), [(0.7, 0.5, None), (1.3, 0.8, well_of_weight)])
def test_the_stein_discrepancy_is_a_squared_distance_of_scores(bandwidth, exponent, diffusion):
    found = stein_value_and_gradient(bandwidth=bandwidth, exponent=exponent, diffusion=diffusion)
    exact = stein_exact(bandwidth, exponent, diffusion or jnp.ones_like)
    np.testing.assert_allclose(found[0], exact[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], exact[1], rtol=1e-6)


def test_the_stein_gradient_vanishes_at_the_truth():
    np.testing.assert_allclose(stein_value_and_gradient(PARAMETERS, bandwidth=0.7)[1], 0.0, atol=1e-9)


@pytest.mark.parametrize("fault", ["score", "trace", "cross"])
def test_a_wrong_stein_kernel_is_seen(monkeypatch, fault):
    """The sign of the score, the last term, and the two terms in the middle."""
    right = stein.stein_kernel

    def wrong(rows, score, scale, length, exponent):
        if fault == "score":
            return right(rows, -score, scale, length, exponent)
        still = right(rows, 0.0 * score, scale, length, exponent)
        if fault == "trace":
            return right(rows, score, scale, length, exponent) - still
        return 0.5 * (right(rows, score, scale, length, exponent) + right(rows, -score, scale, length, exponent))

    exact = stein_exact(0.7, 0.5, jnp.ones_like)
    monkeypatch.setattr(stein, "stein_kernel", wrong)
    found = stein_value_and_gradient(bandwidth=0.7)
    assert not np.allclose(found[0], exact[0], rtol=1e-2)
    assert fault == "trace" or not np.allclose(found[1], exact[1], rtol=1e-2)  # that one does not depend on the model


def test_the_stein_kernel_in_several_dimensions_is_that_of_automatic_differentiation():
    """Both statistics of events (3, 1), with the median bandwidth, against nested derivatives of the kernel itself."""
    random = np.random.default_rng(2)
    with jax.enable_x64(True):
        rows, weights = (jnp.asarray(random.normal(size=shape)) for shape in [(6, 3), (4, 3)])

        def energy(x):
            return jnp.sum(jnp.cos(weights @ x.reshape(3))) + 0.5 * jnp.sum(x**2)

        def diffusion(x):
            return jnp.exp(-0.1 * jnp.sum(x**2))

        i, j = np.triu_indices(6, 1)
        bandwidth = statistics.median(np.linalg.norm(np.asarray(rows[i] - rows[j]), axis=1))

        def kernel(x, y):
            return diffusion(x) * multiquadric(x, y, bandwidth, 0.5) * diffusion(y)

        def pair(x, y):
            def operated(x, y):  # the Stein operator in y: a vector function of x is left
                return -jax.grad(energy)(y) * kernel(x, y) + jax.grad(kernel, 1)(x, y)

            return -jax.grad(energy)(x) @ operated(x, y) + jnp.trace(jax.jacfwd(operated)(x, y))

        @jax.jit
        def both(rows):
            pairs = jax.vmap(jax.vmap(pair, (None, 0)), (0, None))(rows, rows)
            events = rows.reshape(-1, 3, 1)
            return pairs, [
                minimum_stein_discrepancy(energy, events, KEY, statistic=name, diffusion=diffusion)
                for name in ("u", "v")
            ]

        pairs, (unbiased, biased) = jax.tree.map(np.asarray, both(rows))
    np.testing.assert_allclose(biased, pairs.mean(), rtol=1e-9)
    np.testing.assert_allclose(unbiased, (pairs.sum() - np.trace(pairs)) / 30, rtol=1e-9)


def test_far_from_the_origin_the_stein_kernel_keeps_its_digits():
    batch = np.random.default_rng(0).normal(size=(20, 2))

    @jax.jit
    def both(shift):
        def energy(x):
            return 0.5 * jnp.sum((x - shift) ** 2)

        return minimum_stein_discrepancy(energy, jnp.asarray(batch, jnp.float32) + shift, KEY, bandwidth=1.0)

    np.testing.assert_allclose(both(1000.0), both(0.0), atol=2e-4)


# Energy discrepancy.

BATCH = np.array([-1.2, -0.9, 0.4, 0.8, 0.9, 1.0, 1.1, 1.3])
NOISE_SCALE = 0.5
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(48)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()


def exact_discrepancy(parameters, scale=NOISE_SCALE):
    """``U(x) + E_y log E[exp(-U(x')) | y]`` of the rows of ``BATCH``: over the grid for x', Gauss-Hermite for y."""
    grid = jnp.asarray(GRID[::8])
    log_step = jnp.log(grid[1] - grid[0])
    y = jnp.asarray(BATCH)[:, None] + scale * NODES
    log_kernel = -0.5 * ((y[..., None] - grid) / scale) ** 2 - jnp.log(scale * np.sqrt(2.0 * np.pi)) + log_step
    log_smoothed = jax.nn.logsumexp(log_kernel - jax.vmap(Wells(parameters))(grid), axis=-1)
    return jnp.mean(jax.vmap(Wells(parameters))(jnp.asarray(BATCH)) + log_smoothed @ NODE_WEIGHTS)


def exact_gradient(function):
    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.grad(function))(jnp.asarray(MODEL)))


def finite_discrepancy(parameters, stabilization=1.0):
    """The expectation of the loss with two negatives, by Gauss-Hermite in its three noises."""
    potential = jax.vmap(Wells(parameters))
    away, back = NODES[:, None, None], NODES
    one = jnp.asarray(BATCH)[:, None, None, None] + NOISE_SCALE * (away + back[:, None])
    two = jnp.asarray(BATCH)[:, None, None, None] + NOISE_SCALE * (away + back)
    own = potential(jnp.asarray(BATCH))[:, None, None, None]
    ratio = [jnp.exp(own - potential(x.ravel()).reshape(x.shape)) for x in (one, two)]
    weights = NODE_WEIGHTS[:, None, None] * NODE_WEIGHTS[:, None] * NODE_WEIGHTS
    return jnp.mean(jnp.sum(weights * jnp.log((stabilization + ratio[0] + ratio[1]) / 2.0), axis=(1, 2, 3)))


def replicates(loss, num, key):
    """Independent gradients of a loss of (parameters, key), ``(replicate, parameter)``."""
    gradient = jax.grad(loss)
    keys = jax.random.split(key, num)
    return np.asarray(jax.jit(lambda p, keys: jax.lax.map(lambda k: gradient(p, k), keys, batch_size=64))(MODEL, keys))


def assert_powerful_and_equal(gradients, exact):
    """The mean is the exact gradient, and a change of a fifth of it would have been seen."""
    checks = check_mean_gradient(gradients, exact)
    assert np.linalg.norm([check.power for check in checks]) < 0.2 * np.linalg.norm(exact)


def well_loss(parameters, key, *, scale=NOISE_SCALE, stabilization=1.0):
    return energy_discrepancy(
        Wells(parameters), jnp.asarray(BATCH, jnp.float32), key,
        noise_scale=scale, num_negatives=2, stabilization=stabilization,
    )  # fmt: skip


def test_the_energy_discrepancy_of_two_negatives_has_its_exact_expectation(key):
    assert_powerful_and_equal(replicates(well_loss, 4096, key), exact_gradient(finite_discrepancy))


@pytest.mark.parametrize("fault", [{"scale": 0.6}, {"stabilization": 2.0}])
def test_a_wrong_noise_or_stabilization_is_seen(key, fault):
    gradients = replicates(functools.partial(well_loss, **fault), 4096, key)
    with pytest.raises(AssertionError):
        check_mean_gradient(gradients, exact_gradient(finite_discrepancy))


def away_and_back(num_rows, num_negatives, scale=NOISE_SCALE):
    """Gradients on random noise drawn by NumPy, one per copy of the batch, in float64."""
    random = np.random.default_rng(5)
    noise = random.normal(size=(num_rows, len(BATCH), 1 + num_negatives, 1))

    def perturb(x, noise):
        return x + scale * noise

    with jax.enable_x64(True):
        rows = jnp.asarray(BATCH)[:, None]

        def loss(parameters, noise):
            wells = Wells(parameters)
            return _discrepancy(lambda x: wells(x[0]), rows, noise, perturb, jnp.ones(()))

        gradient = jax.jit(lambda p, noise: jax.lax.map(functools.partial(jax.grad(loss), p), noise))
        return np.asarray(gradient(jnp.asarray(MODEL), jnp.asarray(noise)))


def test_with_many_negatives_it_is_the_energy_discrepancy_by_its_definition():
    """The remaining bias is of the order of one over the negatives, 1e-3, below what the check can see."""
    assert_powerful_and_equal(away_and_back(512, 1024), exact_gradient(exact_discrepancy))


def test_the_bias_of_few_negatives_is_seen_by_the_same_check():
    with pytest.raises(AssertionError):
        check_mean_gradient(away_and_back(1024, 4), exact_gradient(exact_discrepancy))


def test_the_bias_is_what_the_docstring_says():
    """At a given row and place, to first order in one over the negatives, for two stabilizations."""
    random = np.random.default_rng(6)
    num_negatives = 100

    def ratio(noise):  # a row at .9 that went to 1
        height, place, tilt = MODEL

        def energy(x):
            return height * (x**2 - place) ** 2 + tilt * x

        return np.exp(energy(0.9) - energy(1.0 + 0.2 * noise))

    drawn = ratio(random.normal(size=(40_000, num_negatives))).mean(axis=1)
    mean, square = NODE_WEIGHTS @ ratio(NODES), NODE_WEIGHTS @ ratio(NODES) ** 2
    for stabilization in (0.0, 1.0):
        excess = np.log(stabilization / num_negatives + drawn) - np.log(mean)
        bias = (excess - (drawn / mean - 1.0)).mean()  # what is taken away has mean zero, and most of the noise
        first_order = (stabilization / mean - 0.5 * (square / mean**2 - 1.0)) / num_negatives
        np.testing.assert_allclose(bias, first_order, rtol=0.05)


def test_between_the_limits_of_its_noise_it_is_score_matching_and_maximum_likelihood():
    def score_loss(parameters):
        x = jnp.asarray(BATCH)
        curvature = jax.vmap(jax.grad(slope, 1), (None, 0))(parameters, x)
        return jnp.mean(0.5 * slope(parameters, x) ** 2 - curvature)

    near, nearer = (exact_gradient(lambda p, s=s: exact_discrepancy(p, s) / s**2) for s in (0.05, 0.025))
    # The remainder is of second order in the noise: two scales are extrapolated to none.
    np.testing.assert_allclose((4.0 * nearer - near) / 3.0, exact_gradient(score_loss), rtol=0.01)

    def likelihood(parameters):
        grid = jnp.asarray(GRID)
        return jnp.mean(jax.vmap(Wells(parameters))(jnp.asarray(BATCH))) + jax.nn.logsumexp(
            -jax.vmap(Wells(parameters))(grid)
        )

    far = exact_gradient(lambda p: exact_discrepancy(p, 30.0))
    np.testing.assert_allclose(far, exact_gradient(likelihood), rtol=0.01)


def test_a_support_with_a_boundary_needs_no_other_loss():
    """Negatives outside do not count: the loss is that of the contrastive potential integrated over the support."""
    potential = ebm.potentials.tilt(lambda x: 0.5 * x, dist.Uniform(0.0, 2.0))
    noise = np.random.default_rng(1).normal(size=(1, 4001, 1)).astype(np.float32)
    noise[0, 0] = 0.0

    def loss(rate):
        tilted = eqx.tree_at(lambda t: t.potential, potential, lambda x: rate * x)
        return _discrepancy(
            lambda x: tilted(x[0]), jnp.full((1, 1), 0.3), jnp.asarray(noise), lambda x, n: x + n, jnp.ones(())
        )

    value, gradient = jax.jit(jax.value_and_grad(loss))(0.5)
    points = 0.3 + noise[0, 1:, 0]
    inside = (points > 0.0) & (points < 2.0)
    assert 0.3 < inside.mean() < 0.7
    ratio = np.exp(0.5 * (0.3 - points)) * inside
    np.testing.assert_allclose(value, np.log((1.0 + ratio.sum()) / 4000), rtol=1e-5)
    np.testing.assert_allclose(gradient, (ratio * (0.3 - points)).sum() / (1.0 + ratio.sum()), rtol=1e-4)


def test_it_sees_the_mass_of_modes_that_the_noise_connects():
    """Modes at +-10 of data weights .3/.7: score matching has a gradient of 0 here, see test_score."""
    random = np.random.default_rng(7)
    rows = np.where(random.random(200) < 0.3, -10.0, 10.0) + random.normal(size=200)
    noise = random.normal(size=(200, 201, 1))

    def energy(log_odds, x):
        modes = jnp.stack([jax.nn.log_sigmoid(log_odds), jax.nn.log_sigmoid(-log_odds)])
        return -jax.nn.logsumexp(modes - 0.5 * (x[0] - jnp.array([-10.0, 10.0])) ** 2)

    def loss(log_odds):
        return _discrepancy(
            functools.partial(energy, log_odds), jnp.asarray(rows)[:, None], jnp.asarray(noise),
            lambda x, n: x + 10.0 * n, jnp.ones(()),
        )  # fmt: skip

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(loss))
        assert gradient(np.log(0.1 / 0.9)) < -0.02 < 0.02 < gradient(np.log(0.6 / 0.4))


class Gaussian(eqx.Module):
    """U(x) = x'Ax / 2 - b'x."""

    precision: jax.Array
    linear: jax.Array

    def __call__(self, x):
        return 0.5 * x @ (self.precision + self.precision.T) @ x / 2.0 - self.linear @ x


@pytest.mark.slow
def test_a_gaussian_energy_reaches_the_sample_mean_and_covariance(key):
    """Within the noise of the last updates and the bias of finitely many negatives."""
    data = np.random.default_rng(3).normal(size=(400, 2)) @ np.array([[1.0, 0.5], [0.0, 0.7]]) + 0.5
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    state = ebm.init_train(Gaussian(jnp.eye(2), jnp.zeros(2)), optimizer)
    objective = stateless(functools.partial(energy_discrepancy, noise_scale=1.0, num_negatives=128))
    state, _ = ebm.fit(key, state, data, objective, optimizer, num_steps=400)
    precision = 0.5 * (state.potential.precision + state.potential.precision.T)
    np.testing.assert_allclose(np.linalg.inv(precision), np.cov(data.T, bias=True), atol=0.05)
    np.testing.assert_allclose(np.linalg.solve(precision, state.potential.linear), data.mean(axis=0), atol=0.05)


# Energy discrepancy of discrete events.

SPINS = all_states((-1, 1), (3,))
COUPLINGS = np.array([[0.0, 0.6, -0.3], [0.6, 0.0, 0.2], [-0.3, 0.2, 0.0]])
LABELS = all_states((0, 1, 2), (2,))


def machine(parameters):
    scale, bias = parameters
    return ebm.potentials.BoltzmannMachine(scale * jnp.asarray(COUPLINGS), bias * jnp.array([1.0, -1.0, 0.5]), "spin")


def labels(parameters):
    coupling, field = parameters
    return ebm.potentials.Potts(2, 3, coupling, field * jnp.array([0.0, 1.0, -0.5]), periodic=False)


def exact_discrete(build, states, rows, num_values, probability):
    """By enumeration: rows ``rows`` of ``states``, every flip with its probability."""

    def exact(parameters):
        energy = jax.vmap(build(parameters))(jnp.asarray(states))
        changed = (states[:, None] != states[None]).reshape(len(states), len(states), -1).sum(axis=-1)
        stayed = states[0].size - changed
        kernel = jnp.asarray((probability / (num_values - 1)) ** changed * (1.0 - probability) ** stayed)
        smoothed = jnp.log(kernel @ jnp.exp(-energy))
        return jnp.mean(energy[rows] + kernel[rows] @ smoothed)

    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.grad(exact))(jnp.asarray([0.8, 0.4])))


def discrete_replicates(build, states, rows, key, num=512):
    """Gradients as a function of the flip probability, of rows of integers."""
    batch = jnp.asarray(states[rows])

    def gradient(probability, key):
        def loss(parameters):
            return discrete_energy_discrepancy(
                build(parameters), batch, key, flip_probability=probability, num_negatives=1024
            )

        return jax.grad(loss)(jnp.array([0.8, 0.4]))

    compiled = jax.jit(lambda probability, keys: jax.lax.map(functools.partial(gradient, probability), keys))
    return lambda probability: np.asarray(compiled(probability, jax.random.split(key, num)))


@pytest.mark.parametrize(("build", "states", "values"), [(machine, SPINS, 2), (labels, LABELS, 3)])
def test_the_discrete_energy_discrepancy_is_that_of_enumeration(key, build, states, values):
    rows = np.array([0, 1, 3, 3, 6, 7])
    run = discrete_replicates(build, states, rows, key)
    exact = exact_discrete(build, states, rows, values, 0.3)
    assert_powerful_and_equal(run(0.3), exact)
    with pytest.raises(AssertionError):  # a wrong probability of flips
        check_mean_gradient(run(0.4), exact)

    def likelihood(parameters):
        energy = jax.vmap(build(parameters))(jnp.asarray(states))
        return energy[rows].mean() + jax.nn.logsumexp(-energy)

    with jax.enable_x64(True):
        by_likelihood = np.asarray(jax.jit(jax.grad(likelihood))(jnp.asarray([0.8, 0.4])))
    check_mean_gradient(run(1.0 - 1.0 / values), by_likelihood)


# Refusals, shapes and precisions.


def bowl(x):
    return 0.5 * jnp.sum(x**2)


ROWS = jnp.ones((4, 2))
WRONG: Any = "nonsense"
POSITIVE = ebm.potentials.tilt(bowl, dist.HalfNormal(1.0).expand([2]).to_event(1))
MACHINE = ebm.potentials.BoltzmannMachine(jnp.zeros((2, 2)), jnp.zeros(2))
BITS = jnp.ones((4, 2), int)
stein_loss = functools.partial(minimum_stein_discrepancy, bowl)
gaussian = functools.partial(energy_discrepancy, bowl)
discrete = functools.partial(discrete_energy_discrepancy, MACHINE)


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda: stein_loss(ROWS, KEY, statistic=WRONG), ValueError, "statistic: got 'nonsense'"),
    (lambda: stein_loss(ROWS, KEY, bandwidth=0.0), ValueError, "bandwidth: got 0.0"),
    (lambda: stein_loss(ROWS, KEY, exponent=-0.5), ValueError, "exponent: got -0.5"),
    (lambda: stein_loss(ROWS, KEY), ValueError, "half of whose pairs coincide"),
    (lambda: stein_loss(ROWS[:1], KEY, bandwidth=1.0), ValueError, "batch: got 1 row"),
    (lambda: stein_loss(BITS, KEY), TypeError, "batch: minimum_stein_discrepancy got dtype int"),
    (lambda: minimum_stein_discrepancy(POSITIVE, ROWS, KEY), ValueError, "expected the whole space"),
    (lambda: gaussian(ROWS, KEY, noise_scale=-1.0), ValueError, "noise_scale: got -1.0"),
    (lambda: gaussian(ROWS, KEY, noise_scale=jnp.ones(2)), ValueError, "noise_scale: got shape"),
    (lambda: gaussian(ROWS, KEY, noise_scale=1.0, num_negatives=0), ValueError, "num_negatives: got 0"),
    (lambda: gaussian(ROWS, KEY, noise_scale=1.0, stabilization=-1.0), ValueError, "stabilization: got -1.0"),
    (lambda: gaussian(BITS, KEY, noise_scale=1.0), TypeError, "discrete_energy_discrepancy"),
    (lambda: energy_discrepancy(POSITIVE, -ROWS, KEY, noise_scale=1.0), ValueError, "outside the support"),
    (lambda: discrete(BITS, KEY, flip_probability=1.0), ValueError, "flip_probability: got 1.0"),
    (lambda: discrete(BITS, KEY, flip_probability=0.0), ValueError, "flip_probability: got 0.0"),
    (lambda: discrete(2 * BITS - 3, KEY, flip_probability=0.1), ValueError, "batch: got 4 of 4 rows outside the coding"),
    (lambda: discrete({"x": BITS}, KEY, flip_probability=0.1), TypeError, "batch: .* got a pytree"),
    (
        lambda: discrete_energy_discrepancy(bowl, BITS, KEY, flip_probability=0.1),
        ValueError,
        "values: discrete_energy_discrepancy got none",
    ),
])  # fmt: skip
def test_bad_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_options_are_refused_also_while_a_program_is_being_compiled():
    with pytest.raises(ValueError, match=r"noise_scale: got -1\.0"):
        jax.jit(functools.partial(gaussian, noise_scale=-1.0))(ROWS, KEY)


def test_a_row_in_another_coding_makes_a_compiled_loss_nan():
    loss = jax.jit(functools.partial(discrete, flip_probability=0.1))
    assert np.isnan(loss(2 * BITS, KEY))
    assert np.isfinite(loss(BITS, KEY))


@pytest.mark.parametrize("objective", [
    minimum_stein_discrepancy,
    functools.partial(minimum_stein_discrepancy, statistic="v", bandwidth=1.0),
    functools.partial(energy_discrepancy, noise_scale=1.0),
    functools.partial(energy_discrepancy, noise_scale=1.0, stabilization=0.0),
    functools.partial(discrete_energy_discrepancy, flip_probability=0.1, values=(0, 1, 2)),
])  # fmt: skip
@pytest.mark.parametrize(("shape", "dtype"), [((), jnp.float32), ((4, 4, 1), jnp.float32), ((3,), jnp.float64)])
def test_every_event_shape_and_precision_has_a_gradient_under_jit_and_vmap(objective, shape, dtype):
    check_gradient_of_scale(objective, bowl, shape, dtype, KEY)
