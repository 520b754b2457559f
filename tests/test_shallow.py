"""Shallow energies: their measure, its gradients, steps that stay in a ball, and the primal-dual gap of that ball."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import ebm_ppl as ebm
from ebm_ppl import objectives, optimizers, potentials
from ebm_ppl.diagnostics import duality_gap
from ebm_ppl.potentials import ShallowEnergy


def unit_vectors(key, count, size):
    rows = jax.random.normal(key, (count, size))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


# --- the energy


def test_it_is_the_formula(key):
    energy = ShallowEnergy(3, key=key, width=5, signs=[1, -1, -1, 1, 1])
    weights = jnp.arange(1.0, 6.0)
    energy = eqx.tree_at(lambda e: e.weights, energy, weights)
    x = unit_vectors(jax.random.fold_in(key, 1), 1, 3)[0]
    units = np.maximum(np.asarray(energy.features) @ np.asarray(x), 0.0)
    assert float(energy(x)) == pytest.approx(float(np.mean([1, -1, -1, 1, 1] * np.arange(1.0, 6.0) * units)), rel=1e-5)
    assert float(energy.norm) == 3.0
    np.testing.assert_allclose(np.linalg.norm(energy.features, axis=1), 1.0, rtol=1e-6)


def test_in_euclidean_space_units_have_biases(key):
    energy = ShallowEnergy(2, key=key, width=4, domain="euclidean")
    x = jnp.array([0.3, -2.0])
    units = np.maximum(np.asarray(energy.features) @ np.array([0.3, -2.0, 1.0]), 0.0)
    assert energy.features.shape == (4, 3)
    assert float(energy(x)) == pytest.approx(float(np.mean(np.asarray(energy.signs.value) * units)), rel=1e-5)


def test_what_is_trained(key):
    for regime, count in (("features", 2), ("lazy", 1)):
        energy = ShallowEnergy(3, key=key, width=6, regime=regime)
        parameters = jax.tree.leaves(eqx.filter(energy, potentials.trainable(energy)))
        assert len(parameters) == count
    assert float(energy(jnp.array([1.0, 0.0, 0.0]))) == 0.0  # the lazy regime starts at the base
    assert float(eqx.tree_at(lambda e: e.weights, energy, jnp.array([3.0, -4.0, 0, 0, 0, 0])).norm) == pytest.approx(
        np.sqrt(25 / 6)
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"regime": "f1"}, "regime: got 'f1'"),
        ({"domain": "torus"}, "domain: got 'torus'"),
        ({"signs": "positive?"}, "signs: got 'positive?'"),
        ({"signs": [1, 2, 1, 1]}, "signs: got"),
        ({"scale": 0.0}, "scale: got 0.0"),
        ({"regime": "lazy", "signs": "negative"}, "signs: got 'negative' in the lazy regime"),
    ],
)
def test_bad_options_are_refused(key, options, text):
    with pytest.raises(ValueError, match=text.replace("?", r"\?")):
        ShallowEnergy(3, key=key, width=4, **options)


# --- steps that stay in a set


def test_one_update_is_that_of_the_algorithm_written_out(key):
    """Descent-ascent on the sphere, features and weights by hand in NumPy, from the particles that the update used."""
    row_key, net_key, key = jax.random.split(key, 3)
    rows = unit_vectors(row_key, 40, 3)
    signs = np.where(np.arange(8) % 3 == 0, 1.0, -1.0)
    energy = ShallowEnergy(3, key=net_key, width=8, signs=signs)
    energy = eqx.tree_at(lambda e: e.weights, energy, jnp.linspace(0.5, 2.0, 8))
    kernel = ebm.kernels.sphere_langevin(0.1, antithetic=True)
    optimizer = optimizers.measure_descent(0.3, 0.7, bound=1.2)
    state = ebm.init_train(energy, optimizer, ebm.init_sampler(jnp.tile(rows, (2, 1)), kernel))
    objective = functools.partial(objectives.persistent_contrastive_divergence, num_steps=1)
    after, _ = ebm.train_step(state, rows, key, objective, optimizer)

    z, w, x = (np.asarray(v, np.float64) for v in (energy.features, energy.weights, rows))
    walkers = np.asarray(after.sampler.position, np.float64)
    active = [1.0 * (points @ z.T > 0) for points in (x, walkers)]
    mean_of = [a.T @ points / len(points) for a, points in zip(active, (x, walkers), strict=True)]
    dz = signs[:, None] * (mean_of[0] - mean_of[1])
    dz -= z * (z * dz).sum(axis=1, keepdims=True)
    dw = signs * (np.maximum(x @ z.T, 0).mean(axis=0) - np.maximum(walkers @ z.T, 0).mean(axis=0))
    new_z = z - 0.7 * dz
    new_w = w * np.exp(-0.3 * dw)
    np.testing.assert_allclose(
        after.potential.features, new_z / np.linalg.norm(new_z, axis=1, keepdims=True), atol=1e-5
    )
    np.testing.assert_allclose(after.potential.weights, new_w * min(1.0, 1.2 / new_w.mean()), rtol=1e-5)
    assert new_w.mean() > 1.2  # the projection had something to do


def test_steps_stay_in_their_sets_whatever_comes_before(key):
    z, w = unit_vectors(key, 6, 4), jnp.ones(6)
    steps = optax.chain(
        optax.adam(0.5),
        optax.partition(
            {
                "z": optimizers.sphere_step(),
                "w": optax.chain(optimizers.exponentiated_step(), optimizers.total_variation_projection(1.5)),
            },
            {"z": "z", "w": "w"},
        ),
    )
    params = {"z": z, "w": w}
    state = steps.init(params)
    for number in range(50):
        gradient = {"z": jax.random.normal(jax.random.fold_in(key, number), z.shape), "w": -jnp.ones(6)}
        updates, state = steps.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(jnp.linalg.norm(params["z"], axis=1), 1.0, atol=1e-6)
    assert float(params["w"].mean()) == pytest.approx(1.5, rel=1e-5)
    assert bool((params["w"] > 0).all())


def test_a_step_too_long_for_numbers_still_ends_in_the_ball():
    steps = optax.chain(optimizers.exponentiated_step(), optimizers.total_variation_projection(1.0))
    w = jnp.ones(2)
    updates, _ = steps.update(jnp.array([1e6, 0.0]), steps.init(w), w)
    np.testing.assert_allclose(w + updates, [2.0, 0.0], atol=1e-6)


def test_a_weight_that_has_vanished_does_not_make_nan(key):
    energy = ShallowEnergy(3, key=key, width=4)
    energy = eqx.tree_at(lambda e: e.weights, energy, jnp.array([0.0, 1.0, 1.0, 1.0]))
    optimizer = optimizers.measure_descent(0.1, 0.1)
    state = ebm.init_train(energy, optimizer)
    loss = objectives.stateless(lambda potential, batch, key: jax.vmap(potential)(batch).mean())
    state, _ = ebm.train_step(state, unit_vectors(key, 5, 3), key, loss, optimizer)
    assert bool(jnp.isfinite(state.potential.features).all())
    np.testing.assert_array_equal(state.potential.features[0], energy.features[0])


def test_the_optimizer_says_what_it_is_for(key):
    lazy, moving = (ShallowEnergy(3, key=key, width=4, regime=regime) for regime in ("lazy", "features"))
    with pytest.raises(ValueError, match=r"measure_descent got parameters \['weights'\]"):
        ebm.init_train(lazy, optimizers.measure_descent(0.1, 0.1))
    with pytest.raises(ValueError, match="For the other regime pass feature_rate"):
        ebm.init_train(moving, optimizers.measure_descent(0.1))
    with pytest.raises(ValueError, match="has no ShallowEnergy"):
        ebm.init_train(potentials.MLP(2, key=key, width=4, depth=1), optimizers.measure_descent(0.1, 0.1))
    with pytest.raises(ValueError, match="bound: got -1"):
        optimizers.measure_descent(0.1, bound=-1.0)
    with pytest.raises(ValueError, match="params: got None"):
        optimizers.mean_field().update(moving, optax.EmptyState())


def test_the_lazy_ball_is_that_of_the_mean_square(key):
    energy = ShallowEnergy(3, key=key, width=16, regime="lazy")
    optimizer = optimizers.measure_descent(5.0, bound=0.7)
    state = ebm.init_train(potentials.tilt(energy, dist.Normal(0.0, 1.0).expand([3]).to_event(1)), optimizer)
    loss = objectives.stateless(lambda potential, batch, key: jax.vmap(potential)(batch).mean())
    for _ in range(3):
        state, _ = ebm.train_step(state, unit_vectors(key, 5, 3), key, loss, optimizer)
    assert float(state.potential.potential.norm) == pytest.approx(0.7, rel=1e-5)
    np.testing.assert_array_equal(state.potential.potential.directions, energy.directions)


# --- the gap


@pytest.fixture
def circle():
    """Sixty points on a circle, twenty of them data, and twenty-four features."""
    with jax.enable_x64(True):
        angle = 2.0 * np.pi * np.arange(60) / 60
        states = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        data = states[
            np.random.default_rng(0).choice(60, 20, p=np.exp(2 * states[:, 0]) / np.exp(2 * states[:, 0]).sum())
        ]
        yield states, data


def solved(energy, states, data, bound):
    """The energy with the best likelihood in its ball, by accelerated projected gradient descent with restarts."""
    units = jnp.asarray(np.asarray(jax.vmap(energy.units)(jnp.asarray(states))))
    mean = jax.vmap(energy.units)(jnp.asarray(data)).mean(axis=0)
    width = len(mean)

    def objective(w):  # nats per row, with the uniform base
        return jnp.mean(w * mean) + jax.nn.logsumexp(-units @ w / width) - jnp.log(len(states))

    def project(w):
        if energy.regime == "lazy":
            return optax.projections.projection_l2_ball(w, bound * jnp.sqrt(width))
        return optax.projections.projection_l1_ball(w, bound * width)

    @jax.jit
    def run(w):
        step = width  # the Hessian is at most the largest squared feature over the width

        def body(carry, _):
            w, y, t = carry
            new = project(y - step * jax.grad(objective)(y))
            momentum = 0.5 * (1.0 + jnp.sqrt(1.0 + 4.0 * t**2))
            restart = jnp.vdot(y - new, new - w) > 0
            momentum = jnp.where(restart, 1.0, momentum)
            y = jnp.where(restart, new, new + (t - 1.0) / momentum * (new - w))
            return (new, y, momentum), None

        (w, _, _), _ = jax.lax.scan(body, (w, w, jnp.ones(())), length=60_000)
        return w

    w = run(jnp.zeros(width))
    signs = jnp.where(w < 0, -1.0, 1.0)
    if energy.regime == "lazy":
        return eqx.tree_at(lambda e: e.weights, energy, w), float(objective(w))
    # Signs are fixed in the energy: those of the solution, with either sign for what is zero.
    energy = eqx.tree_at(lambda e: (e.weights, e.signs.leaves[0]), energy, (jnp.abs(w), signs))
    return energy, float(objective(w))


@pytest.mark.parametrize("regime", ["features", "lazy"])
@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_at_the_optimum_there_is_no_gap(circle, regime, bound):
    states, data = circle
    energy = ShallowEnergy(2, key=jax.random.key(1), width=24, regime=regime)
    energy, primal = solved(energy, states, data, bound)
    own = None if regime == "lazy" else energy.directions
    energies = jax.vmap(energy)(jnp.asarray(states))
    found = duality_gap(energy, data, states, bound=bound, log_weight=-energies, candidates=own)
    # The dual value by itself: minus the divergence of the model from the base, minus the norm of what it misses.
    model = np.asarray(jax.nn.softmax(-energies))
    divergence = float((model * np.log(model * len(states))).sum())
    units = np.asarray(jax.vmap(energy.units)(jnp.asarray(states)))
    missed = model @ units - np.asarray(jax.vmap(energy.units)(jnp.asarray(data))).mean(axis=0)
    norm = np.abs(missed).max() if regime == "features" else np.sqrt((missed**2).mean())
    assert found.value == pytest.approx(primal - (-divergence - bound * norm), abs=1e-12)
    assert abs(found.value) < 1e-12
    assert float(energy.norm) == pytest.approx(bound, rel=1e-9)
    if regime == "features":
        support = np.asarray(energy.weights) > 1e-6
        assert support.any()
        np.testing.assert_allclose(np.abs(missed)[support], np.abs(missed).max(), atol=1e-9)
        assert (np.abs(missed)[~support] < np.abs(missed).max() - 1e-6).all()


@pytest.mark.parametrize("regime", ["features", "lazy"])
def test_away_from_it_the_gap_bounds_what_is_left(circle, regime, key):
    states, data = circle
    energy = ShallowEnergy(2, key=jax.random.key(1), width=24, regime=regime)
    _, best = solved(energy, states, data, 3.0)
    for number in range(5):
        noise = jax.random.normal(jax.random.fold_in(key, number), (24,), jnp.float64)
        weights = 2.0 * jnp.abs(noise) / jnp.abs(noise).mean() if regime == "features" else 2.0 * noise
        weights = weights if regime == "features" else 2.0 * noise / jnp.sqrt(jnp.mean(noise**2))
        own = None if regime == "lazy" else energy.directions
        other = eqx.tree_at(lambda e: e.weights, energy, weights)
        energies = jax.vmap(other)(jnp.asarray(states))
        loss = float(jax.vmap(other)(jnp.asarray(data)).mean() + jax.nn.logsumexp(-energies) - jnp.log(60.0))
        found = duality_gap(other, data, states, bound=3.0, log_weight=-energies, candidates=own)
        assert found.value >= loss - best - 1e-12
        assert found.value > 0.01


def test_the_search_finds_the_best_feature(key):
    """Among a thousand directions of the circle none shows more than what is found from a few starts."""
    rows = unit_vectors(key, 300, 2)
    rows = rows[rows[:, 0] > -0.2]
    draws = unit_vectors(jax.random.fold_in(key, 1), 500, 2)
    energy = ShallowEnergy(2, key=key, width=4)
    found = duality_gap(energy, rows, draws, bound=1.0)
    angle = jnp.linspace(0.0, 2.0 * jnp.pi, 1000)
    everywhere = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    listed = duality_gap(energy, rows, draws, bound=1.0, candidates=everywhere)
    assert found.discrepancy == pytest.approx(listed.discrepancy, rel=1e-4)


def test_with_one_sign_the_discrepancy_is_one_sided(key):
    states = unit_vectors(key, 200, 2)
    rows = states[states[:, 0] > 0.5]
    negative, both = (ShallowEnergy(2, key=key, width=4, signs=signs, scale=1e-6) for signs in ("negative", "balanced"))
    away, any_side = (duality_gap(energy, states, rows, bound=1.0) for energy in (negative, both))
    assert away.discrepancy < any_side.discrepancy  # what rows have too much of only a positive sign could take away


def test_its_error_is_that_of_the_negatives(key):
    """Over sets of draws the gap varies by what it says."""
    energy = ShallowEnergy(3, key=key, width=8, regime="lazy")
    rows = unit_vectors(key, 50, 3) * 1.0
    rows = jnp.where(rows[:, :1] > 0, rows, -rows)
    values = [
        duality_gap(energy, rows, unit_vectors(jax.random.fold_in(key, number), 400, 3), bound=1.0)
        for number in range(40)
    ]
    spread = np.std([one.value for one in values], ddof=1)
    assert 0.6 < spread / np.mean([one.standard_error for one in values]) < 1.5


def test_bad_arguments_of_the_gap_are_refused(key):
    energy, rows = ShallowEnergy(3, key=key, width=4), unit_vectors(key, 5, 3)
    with pytest.raises(TypeError, match="potential: got MLP"):
        duality_gap(potentials.MLP(3, key=key, width=4, depth=1), rows, rows, bound=2.0)
    with pytest.raises(ValueError, match=r"potential: got norm 1, expected at most the bound 0\.5"):
        duality_gap(energy, rows, rows, bound=0.5)
    with pytest.raises(ValueError, match="log_weight: got shape"):
        duality_gap(energy, rows, rows, bound=2.0, log_weight=jnp.zeros(4))
    with pytest.raises(ValueError, match="negatives: got event shape"):
        duality_gap(energy, rows, rows[:, :2], bound=2.0)
    longer = eqx.tree_at(lambda e: e.features, energy, 2.0 * energy.features)
    with pytest.raises(ValueError, match="potential: got features of lengths 2 to 2"):
        duality_gap(longer, rows, rows, bound=2.0)
    with pytest.raises(ValueError, match="potential: got weights down to -1"):
        duality_gap(eqx.tree_at(lambda e: e.weights, energy, -energy.weights), rows, rows, bound=2.0)
    with pytest.raises(ValueError, match="candidates: got 5 of 5 candidates that are not unit vectors"):
        duality_gap(energy, rows, rows, bound=2.0, candidates=10.0 * rows)
    with pytest.raises(ValueError, match=r"candidates: got shape \(5, 2\), expected \(n, 3\)"):
        duality_gap(energy, rows, rows, bound=2.0, candidates=rows[:, :2])
    with pytest.raises(ValueError, match="data: got 5 of 5 rows that are not unit vectors"):
        duality_gap(energy, 2.0 * rows, rows, bound=2.0)
    with pytest.raises(ValueError, match="log_weight: got weights of which none"):
        duality_gap(energy, rows, rows, bound=2.0, log_weight=jnp.full(5, -jnp.inf))
    lazy = ShallowEnergy(3, key=key, width=4, regime="lazy")
    with pytest.raises(ValueError, match="candidates: got some in the lazy regime"):
        duality_gap(lazy, rows, rows, bound=2.0, candidates=rows)
