"""Dynamics that can be solved: every formula against a recursion, a matrix, or the enumeration of all states."""

import functools

import jax
import numpy as np
import pytest
from scipy import optimize, special

import ebm_ppl as ebm
from ebm_ppl import kernels, potentials
from ebm_ppl.targets.discrete import all_states
from ebm_ppl.testing import descent_ascent, heat_bath, ising_ring, multinomial_test
from ebm_ppl.testing import gaussian_dynamics as gaussian

STEP_SIZE, NUM_STEPS, START = 0.05, 20, 1.0
RUN = (STEP_SIZE, NUM_STEPS, START)

# The Gaussian energy: laws of k steps.


def variance_by_recursion(curvature, step_size, num_steps, start, temperature=1.0):
    for _ in range(num_steps):
        start = (1.0 - step_size * curvature) ** 2 * start + 2.0 * step_size * temperature
    return start


def precision_of(eigenvalues, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2)).Q
    return basis @ np.diag(eigenvalues) @ basis.T


@pytest.mark.parametrize("num_steps", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("eigenvalues", [(2.0, 0.5, 0.1), (1.0, 0.0, -0.7), (0.0, 0.0, 3.0), (5.0, 7.0, 10.0)], ids=str)
def test_moments_of_a_short_run_are_those_of_the_linear_map_of_all_noises(eigenvalues, temperature, num_steps):
    random = np.random.default_rng(1)
    precision, step_size = precision_of(eigenvalues), 0.2  # (5, 7, 10): contractions of 0, -0.4 and -1
    linear, start_mean, factor = random.normal(size=3), random.normal(size=3), random.normal(size=(3, 3))
    assert np.abs(precision @ factor @ factor.T - factor @ factor.T @ precision).max() > 0.1
    contraction = np.eye(3) - step_size * precision
    # x_k as a matrix that acts on the start and on every noise, and its constant part.
    powers = [np.linalg.matrix_power(contraction, j) for j in range(num_steps + 1)]
    noises = [np.sqrt(2.0 * step_size * temperature) * power for power in powers[:-1]]
    response = np.hstack([powers[-1] @ factor, *noises])
    constant = powers[-1] @ start_mean + step_size * sum((power @ linear for power in powers[:-1]), np.zeros(3))
    mean, covariance = gaussian.short_run_moments(
        precision, linear, step_size, num_steps, start_mean, factor @ factor.T, temperature=temperature
    )
    np.testing.assert_allclose(mean, constant, rtol=1e-12, atol=1e-12 * np.abs(constant).max())
    scale = np.abs(covariance).max()
    np.testing.assert_allclose(covariance, response @ response.T, rtol=1e-12, atol=1e-12 * scale)
    assert np.abs(covariance - covariance.T).max() < 1e-14 * scale


@pytest.mark.parametrize("curvature", [3.0, 0.5, 1e-4, 1e-9, 1e-13, 0.0, -1e-13, -1e-9, -0.4, 20.0, 30.0, 40.0, 41.0])
def test_variance_and_mean_keep_their_digits_at_every_curvature(curvature):
    for num_steps in (1, 20, 101):
        exact = variance_by_recursion(curvature, STEP_SIZE, num_steps, 0.8, 0.6)
        found = gaussian.short_run_variance(curvature, STEP_SIZE, num_steps, 0.8, temperature=0.6)
        assert found == pytest.approx(exact, rel=1e-12)
        mean = 0.0
        for _ in range(num_steps):
            mean -= STEP_SIZE * (curvature * mean - 2.0)
        found, _ = gaussian.short_run_moments([[curvature]], [2.0], STEP_SIZE, num_steps, [0.0], [[1.0]])
        assert found.item() == pytest.approx(mean, rel=1e-12, abs=1e-12)


def test_variances_broadcast_and_rise_linearly_without_a_force():
    found = gaussian.short_run_variance(np.zeros((2, 1)), STEP_SIZE, NUM_STEPS, np.array([0.0, 1.0, 2.0]))
    np.testing.assert_allclose(found, [[2.0, 3.0, 4.0]] * 2)


def test_continuous_time_is_the_limit_of_small_steps():
    time, start = 1.0, 0.4
    for curvature in (0.7, -0.4):
        exact = 1 / curvature + (start - 1 / curvature) * np.exp(-2.0 * curvature * time)
        errors = [abs(gaussian.short_run_variance(curvature, time / k, k, start) - exact) for k in (1000, 10_000)]
        assert errors[1] < 2e-4
        assert errors[0] / errors[1] == pytest.approx(10.0, rel=0.02)


# The curvature that short-run training ends at.

VARIANCES = (0.5, 1.0, 2.0, 3.0, 4.0, 8.0)
CURVATURES = (2.136398, 1.026334, 0.329547, 0.0, -0.214467, -0.69070)
STATIONARY = (2.11146, 1.02633, 0.50641, 0.33616, 0.25158, 0.12539)
OTHER_LENGTHS = {
    5: (2.91730, 1.02633, -0.71609, -2.44202), 50: (2.11149, 1.02633, 0.48319, 0.15108),
    100: (2.11146, 1.02633, 0.50486, 0.23290), 200: (2.11146, 1.02633, 0.50640, 0.25035),
}  # fmt: skip


def test_the_table_of_trained_and_stationary_curvatures():
    trained = [gaussian.short_run_curvature(c, *RUN) for c in VARIANCES]
    np.testing.assert_allclose(trained, CURVATURES, rtol=0, atol=6e-6)
    np.testing.assert_allclose(trained[:-1], CURVATURES[:-1], rtol=0, atol=6e-7)
    stationary = [gaussian.stationary_curvature(c, STEP_SIZE) for c in VARIANCES]
    np.testing.assert_allclose(stationary, STATIONARY, rtol=0, atol=6e-6)
    for num_steps, expected in OTHER_LENGTHS.items():
        found = [gaussian.short_run_curvature(c, STEP_SIZE, num_steps, START) for c in (0.5, 1.0, 2.0, 4.0)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=6e-6)


def test_the_trained_energy_at_equilibrium_is_not_the_data():
    trained = np.array([gaussian.short_run_curvature(c, *RUN) for c in VARIANCES[:3]])
    equilibrium = 1.0 / (trained - STEP_SIZE * trained**2 / 2.0)
    np.testing.assert_allclose(equilibrium / VARIANCES[:3], [0.989, 1.0, 1.530], atol=6e-4)
    np.testing.assert_allclose(gaussian.short_run_variance(trained, STEP_SIZE, 100_000, START), equilibrium, rtol=1e-9)
    for start in (0.3, 2.5):  # above the data's variance if and only if the start is below
        curvature = gaussian.short_run_curvature(1.0, STEP_SIZE, 40, start)
        assert (1.0 / (curvature - STEP_SIZE * curvature**2 / 2.0) > 1.0) == (start < 1.0)


def test_the_trained_curvature_has_the_variance_of_the_data_and_is_the_only_one_below():
    random = np.random.default_rng(2)
    for num_steps, temperature in [(1, 1.0), (2, 0.5), (20, 1.0), (300, 2.0), (5000, 1.0)]:
        floor = 2.0 * STEP_SIZE * temperature
        for variance in floor * (1.0 + np.array([1e-6, 1e-3, *random.exponential(20.0, 6), 1e4])):
            start = float(random.exponential())
            run = (STEP_SIZE, num_steps, start)
            found = gaussian.short_run_curvature(float(variance), *run, temperature=temperature)
            assert found < 1.0 / STEP_SIZE
            reached = gaussian.short_run_variance(found, *run, temperature=temperature)
            assert reached == pytest.approx(variance, rel=1e-9)
            assert (found > 0) == (variance < start + floor * num_steps)
            mirrored = gaussian.short_run_variance(2.0 / STEP_SIZE - found, *run, temperature=temperature)
            assert mirrored == pytest.approx(variance, rel=1e-9)
            grid = np.linspace(found - 1.0 / num_steps, 1.0 / STEP_SIZE, 500)
            assert (np.diff(gaussian.short_run_variance(grid, *run, temperature=temperature)) <= 0).all()


@pytest.mark.parametrize("num_steps", [2, 20])
def test_the_sign_changes_where_the_data_are_as_wide_as_a_free_run(num_steps):
    border = START + 2.0 * STEP_SIZE * num_steps
    assert abs(gaussian.short_run_curvature(border, STEP_SIZE, num_steps, START)) < 1e-12
    assert gaussian.short_run_curvature(border - 1e-6, STEP_SIZE, num_steps, START) > 0
    assert gaussian.short_run_curvature(border + 1e-6, STEP_SIZE, num_steps, START) < 0


@pytest.mark.parametrize("variance", [0.5, 1.5, 4.0])
def test_runs_from_a_point_follow_lamberts_function(variance):
    time, num_steps = 1.0, 20_000
    branch = 0 if 2.0 * time > variance else -1
    argument = 2.0 * time / variance
    exact = 1.0 / variance + special.lambertw(-argument * np.exp(-argument), branch).real / (2.0 * time)
    found = gaussian.short_run_curvature(variance, time / num_steps, num_steps, 0.0)
    assert found == pytest.approx(exact, abs=1e-3)
    assert (exact > 0) == (2.0 * time > variance)


def test_the_distance_to_the_data_vanishes_at_the_length_of_training_alone():
    variances = np.array([0.5, 1.0, 2.0, 4.0])
    trained = np.array([gaussian.short_run_curvature(c, *RUN) for c in variances])
    at = lambda t: gaussian.short_run_variance(trained, STEP_SIZE, t, START) / variances
    divergence = {t: float(0.5 * np.sum(at(t) - 1.0 - np.log(at(t)))) for t in (1, 5, 10, 15, 19, 20, 21, 25, 40, 100)}
    expected = [0.462, 0.211, 0.0753, 0.0166, 0.00062, 0.0, 0.00060, 0.0143, 0.206, 3.73]
    np.testing.assert_allclose(list(divergence.values()), expected, rtol=0.01, atol=1e-12)


def test_the_mean_is_met_at_the_length_of_training_alone():
    precision, data_mean = precision_of((1.4, 0.6, -0.3)), np.array([1.0, -2.0, 0.5])
    contraction = np.eye(3) - STEP_SIZE * precision
    after = lambda t: np.eye(3) - np.linalg.matrix_power(contraction, t)
    linear = precision @ np.linalg.solve(after(NUM_STEPS), data_mean)
    for t in (1, 19, 20, 21, 60):
        found, _ = gaussian.short_run_moments(precision, linear, STEP_SIZE, t, np.zeros(3), np.eye(3))
        np.testing.assert_allclose(found, after(t) @ np.linalg.solve(after(NUM_STEPS), data_mean), rtol=1e-11)
        assert np.allclose(found, data_mean, rtol=1e-9) == (t == NUM_STEPS)


def test_a_matrix_that_is_trained_keeps_its_eigenvectors_and_follows_one_map_per_mode():
    variances, learning_rate = np.array([0.5, 1.0, 2.0, 4.0]), 0.1
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4))).Q
    precision, curvatures, zero = 0.7 * np.eye(4), np.full(4, 0.7), np.zeros(4)
    for _ in range(300):
        _, sampled = gaussian.short_run_moments(precision, zero, STEP_SIZE, NUM_STEPS, zero, START * np.eye(4))
        precision = precision - 0.5 * learning_rate * (basis @ np.diag(variances) @ basis.T - sampled)
        curvatures = gaussian.short_run_training_map(curvatures, variances, learning_rate, *RUN)
        np.testing.assert_allclose(basis.T @ precision @ basis, np.diag(curvatures), atol=1e-11)
    for _ in range(5000):
        curvatures = gaussian.short_run_training_map(curvatures, variances, learning_rate, *RUN)
    np.testing.assert_allclose(curvatures, [gaussian.short_run_curvature(c, *RUN) for c in variances], atol=1e-9)


@pytest.mark.parametrize("variance", [0.5, 2.0, 4.0])
def test_the_rate_at_which_training_converges(variance):
    trained, learning_rate = gaussian.short_run_curvature(variance, *RUN), 0.1
    contraction = 1.0 - STEP_SIZE * trained
    terms = sum(j * contraction ** (2 * j - 1) for j in range(1, NUM_STEPS))
    rate = STEP_SIZE * (NUM_STEPS * START * contraction ** (2 * NUM_STEPS - 1) + 2.0 * STEP_SIZE * terms)
    step = lambda a: gaussian.short_run_training_map(a, variance, learning_rate, *RUN)
    slope = (step(trained + 1e-5) - step(trained - 1e-5)) / 2e-5
    assert slope == pytest.approx(1.0 - learning_rate * rate, rel=1e-8)


# Training from data, or with walkers that persist.


@pytest.mark.parametrize("step_size", [0.3, 0.01])
def test_one_step_from_the_data_is_score_matching_and_a_term_of_the_step_size(step_size):
    precision, second_moments = precision_of((1.7, 0.4, -0.6)), precision_of((2.0, 0.5, 1.1), seed=1)
    zero = np.zeros(3)
    _, after = gaussian.short_run_moments(precision, zero, step_size, 1, zero, second_moments)
    contraction = np.eye(3) - step_size * precision
    direct = contraction @ second_moments @ contraction + 2.0 * step_size * np.eye(3)
    np.testing.assert_allclose(after, direct, atol=1e-12)
    score_matching = 0.5 * (precision @ second_moments + second_moments @ precision) - np.eye(3)
    rest = 0.5 * step_size * precision @ second_moments @ precision
    np.testing.assert_allclose((second_moments - after) / (2.0 * step_size), score_matching - rest, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_the_variance_of_the_data_is_stationary_at_the_stationary_curvature(temperature):
    for variance in (0.11, 0.5, 1.0, 8.0):
        curvature = gaussian.stationary_curvature(variance, STEP_SIZE, temperature)
        assert curvature == pytest.approx((1.0 - np.sqrt(1.0 - 2.0 * STEP_SIZE * temperature / variance)) / STEP_SIZE)
        for num_steps in (1, 7, 200):
            after = gaussian.short_run_variance(curvature, STEP_SIZE, num_steps, variance, temperature=temperature)
            assert after == pytest.approx(variance, rel=1e-12)
    small = gaussian.stationary_curvature(2.0, 1e-9, temperature)
    assert small == pytest.approx(temperature / 2.0 + 1e-9 * temperature**2 / 8.0, rel=1e-14)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
@pytest.mark.parametrize("restart_probability", [0.0, 0.3, 1.0])
def test_the_fixed_point_depends_neither_on_the_number_of_steps_nor_on_restarts(num_steps, restart_probability):
    variance, learning_rate = 1.0, 0.05
    curvature, walkers = 2.0, 0.6
    for _ in range(30_000 if restart_probability == 1.0 and num_steps == 1 else 8000):
        mixed = (1.0 - restart_probability) * walkers + restart_probability * variance
        walkers = variance_by_recursion(curvature, STEP_SIZE, num_steps, mixed)
        curvature += 0.5 * learning_rate * (walkers - variance)
    assert curvature == pytest.approx(gaussian.stationary_curvature(variance, STEP_SIZE), abs=1e-9)
    # Short runs from a law of their own end elsewhere.
    assert abs(curvature - gaussian.short_run_curvature(variance, STEP_SIZE, num_steps, 0.6)) > 0.05


def test_descent_ascent_is_langevin_restarts_and_a_step_of_the_energy():
    found = descent_ascent.descent_ascent_map(0.4, 1.5, 2.0, STEP_SIZE, 0.5, 0.25)
    walkers = (1.0 - STEP_SIZE * 0.4) ** 2 * (0.75 * 1.5 + 0.25 * 2.0) + 2.0 * STEP_SIZE
    assert found == pytest.approx((0.4 + 0.25 * (walkers - 2.0), walkers))
    # Without restarts, and without a step of the energy to speak of, walkers are a short run.
    curvature, walkers = 0.4, 1.5
    for _ in range(20):
        curvature, walkers = descent_ascent.descent_ascent_map(curvature, walkers, 2.0, STEP_SIZE, 1e-15, 0.0)
    assert walkers == pytest.approx(gaussian.short_run_variance(0.4, STEP_SIZE, 20, 1.5))


@pytest.mark.parametrize("restart_probability", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("learning_rate", [0.02, 0.5])
@pytest.mark.parametrize("variance", [0.4, 1.0, 3.0])
def test_the_jacobian_is_that_of_finite_differences(variance, learning_rate, restart_probability):
    options = (variance, STEP_SIZE, learning_rate, restart_probability)
    fixed = np.array([gaussian.stationary_curvature(variance, STEP_SIZE), variance])
    step = lambda point: np.array(descent_ascent.descent_ascent_map(float(point[0]), float(point[1]), *options))
    np.testing.assert_allclose(step(fixed), fixed, rtol=1e-13)
    shifts = 1e-5 * np.eye(2)
    numeric = np.stack([(step(fixed + d) - step(fixed - d)) / 2e-5 for d in shifts], axis=1)
    jacobian = descent_ascent.descent_ascent_jacobian(*options)
    np.testing.assert_allclose(jacobian, numeric, atol=1e-9)
    contraction = 1.0 - STEP_SIZE * fixed[0]
    rest = contraction**2 * (1.0 - restart_probability)
    assert np.trace(jacobian) == pytest.approx(rest + 1.0 - learning_rate * STEP_SIZE * contraction * variance)
    assert np.linalg.det(jacobian) == pytest.approx(rest, abs=1e-15)


@pytest.mark.parametrize("restart_probability", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("variance", [0.4, 1.0, 3.0])
def test_training_oscillates_above_the_critical_learning_rate_and_is_fastest_there(variance, restart_probability):
    critical = descent_ascent.critical_learning_rate(variance, STEP_SIZE, restart_probability)
    eigenvalues = lambda factor: np.linalg.eigvals(
        descent_ascent.descent_ascent_jacobian(variance, STEP_SIZE, factor * critical, restart_probability)
    )
    assert np.abs(eigenvalues(0.999).imag).max() == 0.0
    assert np.abs(eigenvalues(1.001).imag).max() > 0.0
    slowest = {factor: np.abs(eigenvalues(factor)).max() for factor in (0.5, 0.9, 1.0001, 1.2)}
    floor = np.sqrt((1.0 - 2.0 * STEP_SIZE / variance) * (1.0 - restart_probability))
    assert slowest[1.0001] == pytest.approx(floor, rel=1e-6)
    assert slowest[1.2] == pytest.approx(floor, rel=1e-6)  # whatever the learning rate
    assert slowest[0.5] > slowest[0.9] > floor + 1e-3
    contraction = 1.0 - STEP_SIZE * gaussian.stationary_curvature(variance, STEP_SIZE)
    bound = 2.0 * (1.0 + floor**2) / (STEP_SIZE * contraction * variance)
    assert (
        np.abs(eigenvalues(0.999 * bound / critical)).max() < 1.0 < np.abs(eigenvalues(1.001 * bound / critical)).max()
    )


def test_critical_learning_rates_and_their_limit_of_small_steps():
    assert descent_ascent.critical_learning_rate(1.0, STEP_SIZE, 0.0) == pytest.approx(0.0555, abs=5e-5)
    assert descent_ascent.critical_learning_rate(1.0, STEP_SIZE, 1.0) == pytest.approx(21.08, abs=5e-3)
    for variance, rate in ((1.0, 0.0), (2.0, 0.0), (2.0, 0.7)):
        limit = (2.0 / variance + rate) ** 2 / (4.0 * variance)
        found = descent_ascent.critical_learning_rate(variance, 1e-5, 1e-5 * rate) / 1e-5
        assert found == pytest.approx(limit, rel=1e-4)


# The ring.


def flips(num_sites):
    """All spin states, and for every site the numbers of the states with that spin turned over."""
    states = all_states((-1, 1), (num_sites,)).astype(float)
    return states, np.arange(2**num_sites) ^ (2 ** np.arange(num_sites)[::-1])[:, None]


def site_matrices(log_weight, num_sites):
    """Transition matrices ``(site, from, to)`` of heat-bath updates, from the weights of states alone."""
    states, flipped = flips(num_sites)
    weight = np.exp(log_weight(states))
    matrices = np.zeros((num_sites, len(states), len(states)))
    numbers = np.arange(len(states))
    for site in range(num_sites):
        total = weight + weight[flipped[site]]
        matrices[site, numbers, numbers] = weight / total
        matrices[site, numbers, flipped[site]] = weight[flipped[site]] / total
    return matrices


def ring_energy(coupling):
    return lambda states: coupling * np.sum(states * np.roll(states, 1, axis=1), axis=1)


@pytest.mark.parametrize(("num_sites", "coupling"), [(6, 0.5), (6, -1.1), (3, 0.8), (5, -0.9)])
def test_ring_correlations_are_those_of_the_transition_matrix(num_sites, coupling):
    transition = site_matrices(ring_energy(coupling), num_sites).mean(axis=0)
    states, _ = flips(num_sites)
    correlations = np.stack([np.mean(states * np.roll(states, -n, axis=1), axis=1) for n in range(num_sites)])
    law = np.full(2**num_sites, 2.0**-num_sites)
    for num_updates in range(3 * num_sites + 1):
        found = ising_ring.ring_correlations(coupling, num_sites, num_updates)
        np.testing.assert_allclose(found, correlations @ law, atol=1e-14)
        law = law @ transition
    weight = np.exp(ring_energy(coupling)(states))
    equilibrium = correlations[1] @ weight / weight.sum()
    assert ising_ring.ring_equilibrium_correlation(coupling, num_sites) == pytest.approx(equilibrium, abs=1e-14)
    late = ising_ring.ring_correlations(coupling, num_sites, 400 * num_sites)
    assert late[1] == pytest.approx(equilibrium, abs=1e-12)


def test_a_frustrated_ring_of_strong_couplings_has_one_bond_of_the_wrong_sign():
    assert ising_ring.ring_equilibrium_correlation(-30.0, 5) == pytest.approx(-0.6, abs=1e-12)
    assert ising_ring.ring_equilibrium_correlation(-30.0, 6) == pytest.approx(-1.0, abs=1e-12)


BOUNDS = {1: 0.4762, 2: 0.6143, 5: 0.7509, 10: 0.8227, 20: 0.8742}


@pytest.mark.parametrize("num_sweeps", BOUNDS)
def test_bounds_of_the_correlation(num_sweeps):
    long_ring = 1.0 - special.ive(0, 2 * num_sweeps) - special.ive(1, 2 * num_sweeps)
    assert long_ring == pytest.approx(BOUNDS[num_sweeps], abs=6e-5)
    errors = [ising_ring.ring_correlation_bound(n, num_sweeps) - long_ring for n in (200, 400)]
    assert 0 < errors[1] < 5e-4
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.03)
    bound = ising_ring.ring_correlation_bound(20, num_sweeps)
    expected = {1: 0.4824, 2: 0.6173, 5: 0.7518}
    assert bound == pytest.approx(expected.get(num_sweeps, bound), abs=6e-5)
    assert ising_ring.ring_correlations(30.0, 20, 20 * num_sweeps)[1] == bound


RING_COUPLINGS = {
    0.3: {1: 0.3779, 2: 0.3128, 5: 0.3002, 10: 0.3000}, 0.5: {1: 1.0026, 2: 0.5683, 5: 0.5044, 10: 0.5002},
    0.8: {1: None, 2: None, 5: 0.8899, 10: 0.8145, 20: 0.8014},
    1.0: {1: None, 2: None, 5: None, 10: 1.1070, 20: 1.0211, 50: 1.0009},
}  # fmt: skip


@pytest.mark.parametrize("coupling", RING_COUPLINGS)
def test_the_table_of_trained_couplings(coupling):
    data = ising_ring.ring_equilibrium_correlation(coupling, 20)
    for num_sweeps, expected in RING_COUPLINGS[coupling].items():
        assert (data < ising_ring.ring_correlation_bound(20, num_sweeps)) == (expected is not None)
        if expected is None:
            with pytest.raises(
                ValueError, match=r"correlation: got 0\.\d+, expected a number between -0\.\d+ and 0\.\d+"
            ):
                ising_ring.ring_coupling(data, 20, num_sweeps)
        else:
            found = ising_ring.ring_coupling(data, 20, num_sweeps)
            assert found == pytest.approx(expected, abs=6e-5)
            assert ising_ring.ring_correlations(found, 20, 20 * num_sweeps)[1] == pytest.approx(data, abs=1e-13)


def test_trained_rings_at_equilibrium_are_not_the_data():
    data = ising_ring.ring_equilibrium_correlation(0.5, 20)
    for num_sweeps, error in {1: 0.303, 2: 0.052, 5: 0.0035, 10: 0.0001}.items():
        found = ising_ring.ring_equilibrium_correlation(ising_ring.ring_coupling(data, 20, num_sweeps), 20)
        assert found - data == pytest.approx(error, rel=0.02, abs=5e-5)


@pytest.mark.parametrize("num_sites", [5, 6])
def test_couplings_of_either_sign_are_found_up_to_the_bounds(num_sites):
    for coupling in (-2.5, -0.7, 0.0, 0.4, 2.5):
        reached = float(ising_ring.ring_correlations(coupling, num_sites, 2 * num_sites)[1])
        assert ising_ring.ring_coupling(reached, num_sites, 2) == pytest.approx(coupling, abs=1e-9)
    with pytest.raises(ValueError, match="training would not end"):
        ising_ring.ring_coupling(ising_ring.ring_correlation_bound(num_sites, 2), num_sites, 2)


def test_training_a_ring_that_is_correlated_too_strongly_runs_away():
    data, coupling, path = ising_ring.ring_equilibrium_correlation(0.8, 6), 0.0, []
    assert data > ising_ring.ring_correlation_bound(6, 1)
    for _ in range(400):
        coupling += data - ising_ring.ring_correlations(coupling, 6, 6)[1]
        path.append(coupling)
    assert np.diff(path).min() > 0.05


# The machine.


def random_machine(num_units, seed):
    """About half of all pairs attract each other; small biases."""
    random = np.random.default_rng(seed)
    pairs = (
        0.6 * (random.random((num_units, num_units)) < 0.5) * (1.0 + 0.1 * random.normal(size=(num_units, num_units)))
    )
    upper = np.triu(pairs, 1)
    return upper + upper.T, 0.1 * random.normal(size=num_units)


def machine_energy(couplings, biases):
    pairs = np.triu_indices(len(biases), 1)
    return lambda states: (states[:, pairs[0]] * states[:, pairs[1]]) @ couplings[pairs] + states @ biases


@pytest.mark.parametrize("num_units", [1, 3, 4])
def test_the_law_of_a_machine_is_that_of_the_transition_matrix(num_units):
    random = np.random.default_rng(num_units)
    couplings = np.triu(random.normal(size=(num_units, num_units)), 1)
    couplings, biases = couplings + couplings.T, random.normal(size=num_units)
    sweep = functools.reduce(np.matmul, site_matrices(machine_energy(couplings, biases), num_units))
    uniform, other = np.full(2**num_units, 2.0**-num_units), random.dirichlet(np.ones(2**num_units))
    for num_sweeps in (0, 1, 2, 5):
        powers = np.linalg.matrix_power(sweep, num_sweeps)
        found = heat_bath.heat_bath_probabilities(couplings, biases, num_sweeps)
        np.testing.assert_allclose(found, uniform @ powers, atol=1e-14)
        found = heat_bath.heat_bath_probabilities(couplings, biases, num_sweeps, start=other)
        np.testing.assert_allclose(found, other @ powers, atol=1e-14)
    states, _ = flips(num_units)
    weight = np.exp(machine_energy(couplings, biases)(states))
    equilibrium = heat_bath.boltzmann_probabilities(couplings, biases)
    np.testing.assert_allclose(equilibrium, weight / weight.sum(), atol=1e-14)
    kept = heat_bath.heat_bath_probabilities(couplings, biases, 3, start=equilibrium)
    np.testing.assert_allclose(kept, equilibrium, atol=1e-14)
    mean, second_moments = heat_bath.pair_statistics(other)
    np.testing.assert_allclose(mean, sum(p * s for p, s in zip(other, states, strict=True)))
    np.testing.assert_allclose(second_moments, sum(p * np.outer(s, s) for p, s in zip(other, states, strict=True)))


def test_two_units_without_biases_forget_their_start_in_one_sweep():
    """Why nothing is tested on a ring of two: every number of sweeps gives the same law."""
    couplings, biases = np.array([[0.0, 0.7], [0.7, 0.0]]), np.zeros(2)
    law = heat_bath.heat_bath_probabilities(couplings, biases, 1)
    np.testing.assert_allclose(law, heat_bath.boltzmann_probabilities(couplings, biases), atol=1e-15)
    assert heat_bath.pair_statistics(law)[1][0, 1] == pytest.approx(np.tanh(0.7))


@functools.cache
def trained(num_units, seed, num_sweeps):
    data = heat_bath.boltzmann_probabilities(*random_machine(num_units, seed))
    return data, heat_bath.fit_short_run_machine(*heat_bath.pair_statistics(data), num_sweeps)


def moment_error(law, data):
    pairs = zip(heat_bath.pair_statistics(law), heat_bath.pair_statistics(data), strict=True)
    return max(np.abs(found - exact).max() for found, exact in pairs)


def divergence(data, law):
    return float(np.sum(data * np.log(data / law)))


@pytest.mark.parametrize(
    ("num_units", "seed", "num_sweeps"),
    [(n, seed, k) for n, seed in ((5, 2), (6, 1)) for k in (1, 2, 3, 5)] + [(7, 0, k) for k in (1, 3, 10)],
)
def test_a_trained_machine_matches_after_its_own_number_of_sweeps_alone(num_units, seed, num_sweeps):
    data, machine = trained(num_units, seed, num_sweeps)
    assert machine.moment_error <= 1e-10
    at = lambda t: heat_bath.heat_bath_probabilities(machine.couplings, machine.biases, t)
    equilibrium = heat_bath.boltzmann_probabilities(machine.couplings, machine.biases)
    assert moment_error(at(num_sweeps), data) < 1e-8
    for other in (at(num_sweeps - 1), at(2 * num_sweeps), equilibrium):
        assert moment_error(other, data) > 1e-3
    distances = [divergence(data, at(t)) for t in range(3 * num_sweeps + 3)]
    assert int(np.argmin(distances)) == num_sweeps
    assert divergence(data, equilibrium) > 10.0 * distances[num_sweeps]


def test_longer_training_runs_bring_the_machine_to_the_data():
    errors, gaps = [], []
    couplings, _ = random_machine(6, 1)
    for num_sweeps in (1, 2, 3, 5, 30):
        data, machine = trained(6, 1, num_sweeps)
        errors.append(moment_error(heat_bath.boltzmann_probabilities(machine.couplings, machine.biases), data))
        gaps.append(np.abs(machine.couplings - couplings).max())
    assert (np.diff(errors) < 0).all()
    assert (np.diff(gaps) < 0).all()
    assert errors[0] > 0.2
    assert errors[-1] < 0.01


def test_training_ends_at_the_root_of_the_moment_equations():
    data, machine = trained(5, 2, 2)
    pairs = np.triu_indices(5, 1)
    mean, second_moments = heat_bath.pair_statistics(data)

    def gaps(parameters):
        couplings = np.zeros((5, 5))
        couplings[pairs] = parameters[5:]
        sweep = functools.reduce(np.matmul, site_matrices(machine_energy(couplings, parameters[:5]), 5))
        found = heat_bath.pair_statistics(np.full(32, 1 / 32) @ sweep @ sweep)
        return np.concatenate([found[0] - mean, (found[1] - second_moments)[pairs]])

    root = optimize.root(gaps, np.concatenate([machine.biases, machine.couplings[pairs]]) + 0.05, tol=1e-12)
    assert root.success
    np.testing.assert_allclose(machine.biases, root.x[:5], atol=1e-8)
    np.testing.assert_allclose(machine.couplings[pairs], root.x[5:], atol=1e-8)


def test_training_that_has_not_converged_says_so():
    data = heat_bath.pair_statistics(heat_bath.boltzmann_probabilities(*random_machine(5, 2)))
    machine = heat_bath.fit_short_run_machine(*data, 2, num_updates=10)
    assert machine.num_updates == 10
    assert machine.moment_error > 1e-3
    law = heat_bath.heat_bath_probabilities(machine.couplings, machine.biases, 2)
    found = heat_bath.pair_statistics(law)
    assert machine.moment_error == max(np.abs(a - b).max() for a, b in zip(found, data, strict=True))


# The library's own heat bath.


def test_sequential_gibbs_follows_the_law_of_its_sweeps(key):
    num_chains = 20_000
    couplings, biases = random_machine(5, 2)
    couplings, biases = 1.5 * couplings, biases + 0.2
    potential = potentials.BoltzmannMachine(couplings, biases, coding="spin")
    key_start, *keys = jax.random.split(key, 3)
    start = jax.random.rademacher(key_start, (num_chains, 5), "int8")
    sampler = ebm.init_sampler(start, kernels.gibbs("sequential"))
    for num_sweeps, key_step in enumerate(keys, start=1):
        sampler, _ = ebm.advance(key_step, potential, sampler, 1)
        number = (np.asarray(sampler.position) > 0) @ (2 ** np.arange(5)[::-1])
        counts = np.bincount(number, minlength=32)
        law = heat_bath.heat_bath_probabilities(couplings, biases, num_sweeps)
        multinomial_test(counts, law, name=f"{num_sweeps} sweeps").raise_if_failed()
        equilibrium = heat_bath.boltzmann_probabilities(couplings, biases)
        other = heat_bath.heat_bath_probabilities(couplings[::-1, ::-1], biases[::-1], num_sweeps)
        other = other.reshape((2,) * 5).transpose().reshape(-1)  # the sweep in the opposite order
        assert not multinomial_test(counts, equilibrium).passed
        assert not multinomial_test(counts, other).passed


# What is refused.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian.short_run_curvature(0.1, *RUN), "variance: got 0.1, expected more than 2 "),
        (lambda: gaussian.short_run_curvature(1.0, 0.05, 1, 0.0), "start_variance: got 0 with num_steps=1"),
        (lambda: gaussian.short_run_curvature(np.inf, *RUN), "variance: got inf, expected finite numbers"),
        (lambda: gaussian.short_run_variance(1.0, 0.0, 3, 1.0), "step_size: got 0, expected finite numbers > 0"),
        (lambda: gaussian.short_run_variance(1.0, 0.1, 3, -1.0), "start_variance: got -1, expected numbers >= 0"),
        (lambda: gaussian.short_run_variance(1.0, 0.1, 3, 1.0, temperature=-1.0), "temperature: got -1"),
        (lambda: gaussian.short_run_variance(1.0, 0.1, -1, 1.0), "num_steps: got -1"),
        (lambda: gaussian.short_run_training_map(1.0, 0.0, 0.1, *RUN), "variance: got 0, expected finite numbers > 0"),
        (lambda: gaussian.stationary_curvature(0.05, 0.05), "variance: got 0.05, expected more than 2 "),
        (lambda: gaussian.stationary_curvature(0.2, 0.05, 2.0), r"expected more than 2 \* step_size \* temperature = 0.2"),
        (lambda: descent_ascent.critical_learning_rate(0.1, 0.05, 0.0), "data_variance: got 0.1, expected more than 2 "),
        (lambda: descent_ascent.critical_learning_rate(1.0, 0.05, 1.5), "restart_probability: got 1.5"),
        (lambda: descent_ascent.descent_ascent_map(1.0, -1.0, 1.0, 0.05, 0.1, 0.0), "walker_variance: got -1"),
        (lambda: descent_ascent.descent_ascent_jacobian(1.0, 0.05, -0.1, 0.0), "learning_rate: got -0.1"),
        (lambda: gaussian.short_run_moments(np.eye(3), np.ones(2), 0.1, 1, np.ones(2), np.eye(2)), "precision: got shape"),
        (
            lambda: gaussian.short_run_moments([[1.0, 1.0], [0.0, 1.0]], [0.0] * 2, 0.1, 1, [0.0] * 2, np.eye(2)),
            "precision: got a matrix that is not symmetric",
        ),
        (lambda: ising_ring.ring_correlations(0.5, 2, 1), "num_sites: got 2, expected a whole number >= 3"),
        (lambda: ising_ring.ring_correlation_bound(6, 0), "num_sweeps: got 0"),
        (lambda: ising_ring.ring_equilibrium_correlation(np.nan, 6), "coupling: got nan"),
        (lambda: heat_bath.boltzmann_probabilities(np.zeros((13, 13)), np.zeros(13)), "biases: got 13 units, expected"),
        (lambda: heat_bath.boltzmann_probabilities(np.eye(3), np.zeros(3)), "couplings: got a matrix that is not"),
        (lambda: heat_bath.boltzmann_probabilities(np.zeros((3, 2)), np.zeros(3)), r"couplings: got shape \(3, 2\)"),
        (
            lambda: heat_bath.heat_bath_probabilities(np.zeros((2, 2)), np.zeros(2), 1, start=np.full(8, 1 / 8)),
            r"start: got shape \(8,\), expected \(4,\)",
        ),
        (
            lambda: heat_bath.heat_bath_probabilities(np.zeros((2, 2)), np.zeros(2), 1, start=np.ones(4)),
            "start: got numbers that sum to 4",
        ),
        (lambda: heat_bath.pair_statistics(np.full(3, 1 / 3)), r"probabilities: got shape \(3,\), expected \(2,\)"),
        (lambda: heat_bath.fit_short_run_machine(np.zeros(2), np.zeros((2, 2)), 1), "a covariance lacks"),
        (lambda: heat_bath.fit_short_run_machine(np.zeros(2), np.eye(2), 0), "num_sweeps: got 0"),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_no_number_is_refused():
    with pytest.raises(TypeError, match="curvature: got dtype bool, expected real numbers"):
        gaussian.short_run_variance(True, 0.1, 3, 1.0)
