"""Restarts at data: from persistent chains to score matching, Langevin on the sphere, and the map of descent-ascent."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.tree_util import Partial
from numpyro.distributions import constraints
from numpyro.infer import Predictive
from scipy import stats

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials, recipes
from ebm_ppl.testing import (
    cdf_test,
    critical_learning_rate,
    descent_ascent_jacobian,
    descent_ascent_map,
    kernel_conformance,
    stationary_curvature,
)


def unit_vectors(key, count, size=3):
    rows = jax.random.normal(key, (count, size))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def flat_gradient(function, potential):
    parameters, rest = eqx.partition(potential, potentials.trainable(potential))
    gradient = jax.grad(lambda p: function(eqx.combine(p, rest)))(parameters)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


def relative(found, exact):
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


# --- one step from the data is score matching


def after_one_step(potential, rows, step_size, on_sphere, nodes=15):
    """Mean gradient, in the parameters, of the energy after one Langevin step from rows; over the noise by quadrature."""
    size = rows.shape[1]
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    noise = jnp.asarray(np.stack(np.meshgrid(*[points] * size, indexing="ij"), -1).reshape(-1, size))
    weight = jnp.asarray(np.prod(np.meshgrid(*[weights] * size, indexing="ij"), axis=0).ravel())
    drift = jax.vmap(lambda x: x - step_size * jax.grad(potential)(x))(rows)
    ends = drift[:, None] + jnp.sqrt(2.0 * step_size) * noise
    if on_sphere:
        ends = ends / jnp.linalg.norm(ends, axis=-1, keepdims=True)
    ends = jax.lax.stop_gradient(ends)

    def loss(potential):
        return jax.vmap(potential)(rows).mean() - jnp.mean(jax.vmap(jax.vmap(potential))(ends) @ weight / weight.sum())

    return flat_gradient(loss, potential) / step_size


@pytest.mark.parametrize("on_sphere", [False, True])
def test_restarts_in_every_update_are_score_matching_in_the_limit_of_small_steps(key, on_sphere):
    with jax.enable_x64(True):
        size = 3 if on_sphere else 2
        potential = potentials.MLP(size, key=key, width=8, depth=1, activation=jnp.tanh, zero_init=False)
        rows = jax.random.normal(jax.random.fold_in(key, 1), (6, size))
        rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True) if on_sphere else rows
        loss = objectives.spherical_score_matching if on_sphere else objectives.score_matching
        exact = flat_gradient(lambda potential: loss(potential, rows, key), potential)
        errors = [relative(after_one_step(potential, rows, step_size, on_sphere), exact) for step_size in (1e-3, 1e-4)]
    assert errors[1] < 2e-3
    assert 8.0 < errors[0] / errors[1] < 12.0


def test_pairs_of_noise_take_most_of_it_out_of_the_gradient(key):
    """With the library's own step; over many copies of the rows, against the loss that is the limit."""
    potential = potentials.MLP(2, key=key, width=8, depth=1, activation=jnp.tanh, zero_init=False)
    rows = jax.random.normal(jax.random.fold_in(key, 1), (10, 2))
    exact = flat_gradient(lambda potential: objectives.score_matching(potential, rows, key), potential)
    step_size = 1e-3
    errors = {}
    for antithetic in (False, True):
        sampler = ebm.init_sampler(jnp.tile(rows, (2000, 1)), kernels.langevin(step_size, antithetic=antithetic))

        def loss(potential, sampler=sampler):
            return objectives.persistent_contrastive_divergence(
                potential, sampler, rows, key, num_steps=1, restart_probability=1.0, restart_from="batch"
            )[0]

        errors[antithetic] = relative(flat_gradient(loss, potential) / step_size, exact)
    assert errors[True] < 0.1
    assert errors[True] < 0.3 * errors[False]


def test_relu_units_have_curvature_that_autodiff_does_not_see(key):
    """The loss with autodiff's Laplacian has another gradient than one step from the data; so it is refused."""
    with jax.enable_x64(True):
        energy = potentials.ShallowEnergy(3, key=key, width=16)
        rows = unit_vectors(jax.random.fold_in(key, 1), 60)

        def autodiff_loss(energy):
            def row_loss(x):
                slope, hessian = jax.grad(energy)(x), jax.hessian(energy)(x)
                tangent = slope - x * (x @ slope)
                return 0.5 * tangent @ tangent - (jnp.trace(hessian) - x @ hessian @ x - 2.0 * x @ slope)

            return jax.vmap(row_loss)(rows).mean()

        limit = after_one_step(energy, rows, 0.02, on_sphere=True, nodes=25)
        assert relative(flat_gradient(autodiff_loss, energy), limit) > 0.5
        smooth = potentials.ShallowEnergy(3, key=key, width=16, activation=lambda x: jax.nn.softplus(4.0 * x) / 4.0)
        exact = flat_gradient(lambda e: objectives.spherical_score_matching(e, rows, key), smooth)
        assert relative(exact, after_one_step(smooth, rows, 1e-3, on_sphere=True)) < 0.05
    for loss in (objectives.score_matching, objectives.sliced_score_matching, objectives.spherical_score_matching):
        with pytest.raises(ValueError, match="got one with relu units, expected a twice differentiable energy"):
            loss(potentials.ShallowEnergy(3, key=key, width=4), unit_vectors(key, 5), key)
    with pytest.raises(ValueError, match="fitted_temperature got one with relu units"):
        ebm.fitted_temperature(potentials.ShallowEnergy(3, key=key, width=4), unit_vectors(key, 5))
    # Of a parameter it is no kink in the event, and a jnp.maximum is the caller's own business.
    of_weight = lambda x: jnp.sum(jax.nn.relu(jnp.array([1.0, -1.0, 2.0])) * x**2)
    objectives.score_matching(of_weight, unit_vectors(key, 5), key)
    looped = lambda x: jax.lax.fori_loop(0, 2, lambda _, y: jax.nn.relu(y), x).sum()
    with pytest.raises(ValueError, match="got one with relu units"):
        objectives.score_matching(looped, unit_vectors(key, 5), key)
    boxed = potentials.tilt(potentials.MLP(2, key=key, width=4, depth=1, activation=jax.nn.leaky_relu), BOX)
    with pytest.raises(ValueError, match="generalized_score_matching got one with leaky_relu units"):
        objectives.generalized_score_matching(boxed, jnp.full((4, 2), 0.5), key)


BOX = dist.Uniform(0.0, 1.0).expand([2]).to_event(1)


def test_the_loss_on_the_sphere_is_the_fisher_divergence_up_to_a_constant():
    """Under ``exp(2 x_3)``: ``E |P grad(U - V)|^2 / 2`` and the loss differ by what does not depend on U, by quadrature."""
    with jax.enable_x64(True):
        nodes, weights = np.polynomial.legendre.leggauss(40)
        angle = 2.0 * np.pi * np.arange(40) / 40
        height, turn = np.meshgrid(nodes, angle, indexing="ij")
        radius = np.sqrt(1.0 - height**2)
        rows = jnp.asarray(np.stack([radius * np.cos(turn), radius * np.sin(turn), height], -1).reshape(-1, 3))
        weight = jnp.asarray((weights[:, None] * np.exp(2.0 * height)).ravel())
        weight = weight / weight.sum()

        def difference(slope):
            def energy(x):
                return -slope * x[2] + 0.3 * slope * x[0] ** 2

            def fisher(x):
                g = jax.grad(lambda x: energy(x) + 2.0 * x[2])(x)
                return 0.5 * jnp.sum((g - x * (x @ g)) ** 2)

            loss = lambda x: objectives.spherical_score_matching(energy, x[None], jax.random.key(0))
            return float(weight @ jax.vmap(loss)(rows) - weight @ jax.vmap(fisher)(rows))

        values = [difference(slope) for slope in (0.5, 1.0, 3.0)]
    assert np.ptp(values) < 1e-10


# --- restarts: one operator


def quadratic(a, x):
    return 0.5 * a * jnp.sum(x**2)


def test_with_probability_one_from_the_batch_it_is_contrastive_divergence(key):
    potential, rows = Partial(quadratic, jnp.asarray(1.3)), jax.random.normal(key, (16, 2))
    sampler = ebm.init_sampler(jnp.full((16, 2), 9.0), kernels.mala(0.2))
    loss, (after, metrics) = objectives.persistent_contrastive_divergence(
        potential, sampler, rows, key, num_steps=3, restart_probability=1.0, restart_from="batch"
    )
    run_key = jax.random.split(key, 4)[3]
    other, (_, expected) = objectives.contrastive_divergence(potential, sampler, rows, run_key, num_steps=3)
    assert float(loss) == float(other)
    for name in ("energy_data", "energy_negative", "acceptance_rate"):
        assert float(metrics[name]) == float(expected[name])
    assert after.age.tolist() == [3] * 16


def test_chains_restart_at_their_age_and_go_to_their_rows(key):
    potential, rows = Partial(quadratic, jnp.asarray(1.0)), jnp.arange(1.0, 5.0)[:, None]
    sampler = ebm.init_sampler(jnp.zeros((8, 1)), kernels.langevin(1e-6))
    objective = functools.partial(
        objectives.persistent_contrastive_divergence, num_steps=2, restart_age=6, restart_from="batch"
    )
    ages, first = [], []
    for number in range(7):
        _, (sampler, metrics) = objective(potential, sampler, rows, jax.random.fold_in(key, number))
        ages.append(float(metrics["chain_age"]))
        first.append(float(sampler.position[6, 0]))
    assert ages == [2.0, 4.0, 6.0, 2.0, 4.0, 6.0, 2.0]
    np.testing.assert_allclose(first[:3], 0.0, atol=0.02)
    np.testing.assert_allclose(first[3:], 3.0, atol=0.02)  # chain 6 of 4 rows: row 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"restart_age": 5}, "restart_from: got None with restart_age 5"),
        ({"restart_probability": 0.5}, "restart_from: got None with restart_probability 0.5"),
        ({"restart_age": 0, "restart_from": "batch"}, "restart_age: got 0"),
        ({"restart_probability": 0.5, "restart_from": "data"}, "restart_from: got 'data'"),
    ],
)
def test_bad_restarts_are_refused(key, options, text):
    sampler = ebm.init_sampler(jnp.zeros((4, 1)), kernels.langevin(0.1))
    with pytest.raises(ValueError, match=text):
        objectives.persistent_contrastive_divergence(
            Partial(quadratic, jnp.asarray(1.0)), sampler, jnp.ones((4, 1)), key, num_steps=1, **options
        )


# --- the map of descent-ascent on a Gaussian

STEP, RATE, START, UPDATES = 0.05, 0.5, 3.0, 400


def particle_run(key, probability, rate=RATE, num_updates=UPDATES, chains=200_000):
    """Curvatures over training by the library: rows of variance one, Langevin, restarts at rows."""
    rows = jnp.array([[1.0], [-1.0]])
    potential = Partial(quadratic, jnp.asarray(START))
    optimizer = optax.sgd(rate)
    start = jax.random.normal(key, (chains, 1)) / jnp.sqrt(START)
    state = ebm.init_train(potential, optimizer, ebm.init_sampler(start, kernels.langevin(STEP)))
    objective = functools.partial(
        objectives.persistent_contrastive_divergence,
        num_steps=1,
        restart_probability=probability,
        restart_from="batch",
    )
    _, history = ebm.fit(key, state, rows, objective, optimizer, num_steps=num_updates, report_every=num_updates)
    return 2.0 * history["energy_data"]  # of a x^2 / 2 at rows of square one, before the update


def predicted(probability, rate=RATE, num_updates=UPDATES, stale=False):
    pairs, before = [(START, 1.0 / START)], START
    for _ in range(num_updates - 1):
        curvature, variance = pairs[-1]
        if stale:  # the step is taken in the energy of one update ago
            variance = (1 - STEP * before) ** 2 * ((1 - probability) * variance + probability) + 2 * STEP
            before, new = curvature, curvature + 0.5 * rate * (variance - 1.0)
            pairs.append((new, variance))
        else:
            pairs.append(descent_ascent_map(curvature, variance, 1.0, STEP, rate, probability))
    return np.array(pairs)[:, 0]


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_particles_follow_the_map(key, probability):
    rate = RATE if probability < 1.0 else 10.0
    deviation = np.abs(particle_run(key, probability, rate) - predicted(probability, rate))
    assert deviation.max() < 0.04


def test_a_stale_gradient_would_be_seen():
    """The same run with a step in the energy of the update before is farther off than particles may be."""
    assert np.abs(predicted(0.0, stale=True) - predicted(0.0)).max() > 0.08


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_the_run_decays_and_oscillates_as_the_jacobian_says(key, probability):
    """Rate and frequency, fitted to the particles' curvatures by a linear recursion of order two."""
    run = particle_run(key, probability, num_updates=200)
    off = run - stationary_curvature(1.0, STEP)
    part = off[20:120]  # late enough for the map to be linear, early enough to be far above the noise
    design = np.stack([part[1:-1], part[:-2]], axis=1)
    coefficients = np.linalg.lstsq(design, part[2:], rcond=None)[0]
    found = np.roots([1.0, -coefficients[0], -coefficients[1]])
    exact = np.linalg.eigvals(descent_ascent_jacobian(1.0, STEP, RATE, probability))
    assert np.iscomplex(exact).all()
    assert abs(found[0]) == pytest.approx(abs(exact[0]), rel=0.05)
    assert abs(np.angle(found[0])) == pytest.approx(abs(np.angle(exact[0])), rel=0.05)


def test_restarts_in_every_update_need_a_rate_that_is_larger_by_far():
    ratio = critical_learning_rate(1.0, STEP, 1.0) / critical_learning_rate(1.0, STEP, 0.0)
    assert 350.0 < ratio < 400.0


# --- Langevin on the sphere


def test_a_step_has_the_drift_of_the_sphere():
    """``E[x' - x] / h`` tends to ``-P grad U - (d - 1) x``, over the noise by quadrature."""
    with jax.enable_x64(True):
        points, weights = np.polynomial.hermite_e.hermegauss(15)
        noise = np.stack(np.meshgrid(points, points, points, indexing="ij"), -1).reshape(-1, 3)
        weight = np.prod(np.meshgrid(weights, weights, weights, indexing="ij"), axis=0).ravel()
        x, slope = np.array([0.6, 0.0, 0.8]), np.array([1.0, -2.0, 0.5])
        errors = []
        for step_size in (1e-3, 1e-4):
            y = x - step_size * slope + np.sqrt(2 * step_size) * noise
            y /= np.linalg.norm(y, axis=1, keepdims=True)
            drift = (weight @ y / weight.sum() - x) / step_size
            errors.append(np.linalg.norm(drift + slope - x * (x @ slope) + 2.0 * x))
    assert errors[1] < 2e-3
    assert 8.0 < errors[0] / errors[1] < 12.0


def test_the_kernel_takes_that_step_and_samples_the_law(key):
    """Of ``exp(-2 x_3)`` on the sphere ``x_3`` has the density ``exp(-2 t)``; with twice the temperature another."""
    num_chains = 3000
    for temperature, kappa in ((None, 2.0), (2.0, 1.0)):
        kernel = kernels.sphere_langevin(0.01, temperature=temperature)
        sampler = ebm.init_sampler(unit_vectors(key, num_chains), kernel)
        sampler, info = ebm.advance(key, lambda x: 2.0 * x[2], sampler, 400)
        scale = np.exp(kappa) - np.exp(-kappa)
        law = lambda t, kappa=kappa, scale=scale: (np.exp(kappa) - np.exp(-kappa * np.asarray(t))) / scale
        assert cdf_test(sampler.position[:, 2], law).passed
        assert bool(jnp.isnan(info.acceptance_rate).all())
    uniform = stats.uniform(-1, 2).cdf
    assert not cdf_test(sampler.position[:, 2], uniform).passed


def test_noise_comes_in_pairs_that_cancel(key):
    rows, step_size = unit_vectors(key, 10), 1e-6
    for make in (kernels.langevin, kernels.sphere_langevin):
        kernel = make(step_size, antithetic=True)
        sampler = ebm.init_sampler(jnp.tile(rows, (2, 1)), kernel)
        sampler, _ = ebm.advance(key, lambda x: 0.0 * jnp.sum(x), sampler, 1)
        steps = (sampler.position - jnp.tile(rows, (2, 1))) / jnp.sqrt(2.0 * step_size)
        assert float(jnp.abs(steps[:10] + steps[10:]).max()) < 0.02  # what is left is of the next order, and rounding
        assert float(jnp.abs(steps).mean()) > 0.3
        odd = ebm.init_sampler(rows[:9], kernel)
        with pytest.raises(ValueError, match="antithetic: got 9 chains"):
            ebm.advance(key, lambda x: x[0], odd, 1)


def test_pairs_restart_at_one_row_also_where_rows_are_fewer(key):
    rows = unit_vectors(key, 3)
    sampler = ebm.init_sampler(unit_vectors(key, 20), kernels.sphere_langevin(1e-8, antithetic=True))
    _, (sampler, _) = objectives.persistent_contrastive_divergence(
        lambda x: x[0], sampler, rows, key, num_steps=1, restart_probability=1.0, restart_from="batch"
    )
    np.testing.assert_allclose(sampler.position[:10], sampler.position[10:], atol=2e-3)


def test_a_gradient_beyond_all_numbers_leaves_chains_on_the_sphere(key):
    sampler = ebm.init_sampler(unit_vectors(key, 8), kernels.sphere_langevin(0.01))
    sampler, _ = ebm.advance(key, lambda x: 1e30 * x[0], sampler, 3)
    np.testing.assert_allclose(jnp.linalg.norm(sampler.position, axis=1), 1.0, rtol=1e-5)


def test_a_gap_that_is_none_is_not_shown(key):
    """An optimizer of the caller's own that leaves the ball."""
    rows = cap(key, 100)
    _, history = recipes.dual_training(
        key, rows, num_updates=20, bound=3.0, width=8, optimizer=optax.adam(0.1), report_every=20, progress_bar=False
    )
    assert np.isnan(history["evaluation_duality_gap"]).all()


def test_it_keeps_the_protocol(key):
    for antithetic in (False, True):
        kernel = kernels.sphere_langevin(0.05, antithetic=antithetic)
        kernel_conformance(key, kernel, lambda x: 2.0 * x[2], unit_vectors(key, 32)).raise_if_failed()


def test_where_it_does_not_belong_it_is_refused(key):
    kernel = kernels.sphere_langevin(0.01)
    with pytest.raises(ValueError, match=r"3 of 4 chains that are not unit vectors, the first at index 1 \(length 2\)"):
        ebm.init_sampler(jnp.array([[1.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 0.0]]), kernel)
    with pytest.raises(ValueError, match="expected unit vectors"):
        ebm.init_sampler(jnp.ones(4), kernel)
    sampler = ebm.init_sampler(unit_vectors(key, 4), kernel)
    tilted = potentials.tilt(lambda x: x[0], dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pytest.raises(ValueError, match=r"got one whose support is .*, expected the sphere"):
        ebm.advance(key, tilted, sampler, 1)
    with pytest.raises(ValueError, match="expected the sphere"):
        jax.jit(lambda sampler: ebm.advance(key, tilted, sampler, 1))(sampler)
    on_sphere = potentials.tilt(lambda x: x[0], dist.ImproperUniform(constraints.sphere, (), (3,)))
    moved, _ = ebm.advance(key, on_sphere, sampler, 50)
    assert bool(jnp.isfinite(jax.vmap(on_sphere)(moved.position)).all())

    def model():
        numpyro.sample("x", ebm.EBM(lambda x: x[0], dist.ImproperUniform(constraints.sphere, (), (3,))))

    simulated = ebm.handlers.simulate(model, kernel=kernel, num_steps=10)
    with pytest.raises(TypeError, match="chains live on a surface"):
        Predictive(simulated, num_samples=2)(key)


# --- the recipe


def cap(key, count):
    """Unit vectors with density ``exp(4 x_3)``."""
    side, turn = jax.random.split(key)
    u = jax.random.uniform(side, (count,))
    height = jnp.log(jnp.exp(-4.0) + u * (jnp.exp(4.0) - jnp.exp(-4.0))) / 4.0
    angle = 2.0 * jnp.pi * jax.random.uniform(turn, (count,))
    radius = jnp.sqrt(1.0 - height**2)
    return jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle), height], axis=1)


def test_a_cap_is_learned_in_both_regimes(key):
    rows = cap(key, 500)
    uniform = unit_vectors(jax.random.fold_in(key, 1), 5000)
    for regime, bound in (("features", 20.0), ("lazy", 60.0)):
        state, history = recipes.dual_training(
            key, rows, num_updates=600, bound=bound, regime=regime, width=32, report_every=300, progress_bar=False
        )
        energy = jax.vmap(state.potential.potential)
        weight = jax.nn.softmax(-energy(uniform))
        mean = float(weight @ uniform[:, 2])
        assert mean == pytest.approx(float(1 / np.tanh(4.0) - 0.25), abs=0.06)
        assert history["evaluation_norm"][-1] <= bound * (1 + 1e-4)
        assert history["evaluation_duality_gap"].shape == (2,)


def test_events_of_the_plane_have_a_base(key):
    rows = jax.random.normal(key, (400, 2)) * jnp.array([1.0, 0.3]) + jnp.array([0.5, 0.0])
    state, history = recipes.dual_training(
        key, rows, num_updates=600, bound=20.0, domain="euclidean", step_size=0.05, width=32, progress_bar=False,
        evaluate=lambda state: {"step": int(state.step)}, report_every=300,
    )  # fmt: skip
    grid = np.linspace(-5, 5, 121)
    points = jnp.asarray(np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2), jnp.float32)
    weight = jax.nn.softmax(-jax.vmap(state.potential)(points))
    deviation = jnp.sqrt(weight @ points**2 - (weight @ points) ** 2)
    assert float(deviation[1]) < 0.6  # the base has 1
    assert history["evaluation_step"].tolist() == [300, 600]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"data": jnp.ones((5, 3))}, ValueError, "data: got 5 of 5 rows that are not unit vectors"),
        ({"weight_rate": -0.1}, ValueError, "weight_rate: got -0.1"),
        ({"domain": "euclidean", "base": "normal"}, TypeError, "base: got str"),
        (
            {"domain": "euclidean", "base": dist.ImproperUniform(constraints.real_vector, (), (3,))},
            ValueError,
            "base: got ImproperUniform, which cannot be sampled",
        ),
        ({"data": jnp.ones((5, 3, 1))}, ValueError, r"data: got shape \(5, 3, 1\)"),
        ({"restart_every": 3, "restart_probability": 0.5}, ValueError, "restart_every: got 3 with"),
        ({"restart_every": 0}, ValueError, "restart_every: got 0"),
        ({"restart_probability": 1.5}, ValueError, "restart_probability: got 1.5"),
        ({"base": dist.Normal(0.0, 1.0)}, ValueError, "base: got Normal on the sphere"),
        ({"regime": "lazy", "feature_rate": 0.1}, ValueError, "feature_rate: got 0.1 in the lazy regime"),
        ({"optimizer": optax.sgd(0.1), "weight_rate": 0.1}, ValueError, "optimizer: got one together with"),
        ({"network": "net"}, TypeError, "network: got str"),
        ({"bound": 0.0}, ValueError, "bound: got 0"),
        ({"domain": "euclidean", "base": BOX}, ValueError, "base: got one on"),
        ({"num_copies": 0}, ValueError, "num_copies: got 0"),
    ],
)
def test_bad_arguments_of_the_recipe_are_refused(key, change, error, text):
    arguments = {"data": unit_vectors(key, 5), "num_updates": 2, "bound": 1.0, **change}
    with pytest.raises(error, match=text):
        recipes.dual_training(key, **arguments)


def test_a_network_of_other_events_is_refused(key):
    network = potentials.ShallowEnergy(2, key=key)
    with pytest.raises(ValueError, match="width, regime, domain: got one of them together with a network"):
        recipes.dual_training(key, unit_vectors(key, 5), num_updates=2, bound=1.0, network=network, regime="lazy")
    with pytest.raises(ValueError, match=r"network: got one of events \(2,\)"):
        recipes.dual_training(key, unit_vectors(key, 5), num_updates=2, bound=1.0, network=network)
