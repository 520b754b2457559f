"""Values and policies of a diffusion sampler against linear-quadratic control, quadrature and closed forms."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.diffusion import (
    ActorCritic,
    DiffusionSampler,
    ValueNetwork,
    actor_critic_optimizer,
    adaptive_velocity,
    guide,
)
from ebm_ppl.objectives import (
    contrastive_divergence,
    generalized_contrastive_divergence,
    pathwise_policy_loss,
    persistent_contrastive_divergence,
    policy_improvement,
    reinforce_policy_loss,
    running_costs,
    temporal_difference_loss,
    velocity_loss,
)
from ebm_ppl.testing import t_test_chain_means
from tests.test_adversarial import STILL as still


def check_mean(name, values, expected, scale):
    """A t-test whose power is below ``scale``."""
    check = t_test_chain_means(values, expected, name=name).raise_if_failed()
    assert check.power < scale


class Affine(eqx.Module):
    """A network that is linear in the event: every Gaussian policy with linear means."""

    slope: jax.Array
    intercept: jax.Array

    def __call__(self, time, event):
        return self.slope[time] * event + self.intercept[time]


class Quadratic(eqx.Module):
    """The values ``l_t x^2 / 2 + c_t``."""

    curvature: jax.Array
    constant: jax.Array

    def __call__(self, time, event):
        return 0.5 * self.curvature[time] * jnp.sum(event**2) + self.constant[time]


CURVATURE = 3.0


def energy(event):
    return 0.5 * CURVATURE * jnp.sum(event**2)


def affine_sampler(num_steps=3, *, retention=None, scale=1.0, size=1):
    network = Affine(jnp.zeros((num_steps, 1)), jnp.zeros((num_steps, 1)))
    sampler = DiffusionSampler(size, num_steps=num_steps, scale=scale, network=network)
    if retention is not None:
        sampler = eqx.tree_at(lambda s: s.backward.retention, sampler, jnp.full(num_steps, retention))
    return sampler


def control(sampler):
    """Backwards: curvatures and constants of the soft values, slopes and scales of the best policy."""
    keep, spread = np.asarray(sampler.backward.retention, float), np.asarray(sampler.backward.scale, float)
    curvature, constant, slope, scale = [CURVATURE], [0.0], [], []
    for a, s in zip(keep[::-1], spread[::-1], strict=True):
        later = curvature[-1]
        slope.append((a / s**2) / (later + a**2 / s**2))
        scale.append((later + a**2 / s**2) ** -0.5)
        curvature.append(1.0 / (s**2 + a**2 / later))
        constant.append(constant[-1] - 0.5 * np.log(1.0 / later) + 0.5 * np.log(s**2 + a**2 / later))
    return (np.array(x[::-1]) for x in (curvature, constant, slope, scale))


def best(sampler):
    """The sampler with the best policy, and the soft values."""
    curvature, constant, slope, scale = control(sampler)
    schedule = sampler.schedule
    weight = (slope - schedule.retention) / schedule.residual_scale
    policy = eqx.tree_at(
        lambda s: (s.network.slope, s.log_step_scale),
        sampler,
        (jnp.asarray(weight)[:, None], jnp.asarray(np.log(scale))),
    )
    return policy, Quadratic(jnp.asarray(curvature), jnp.asarray(constant))


@pytest.mark.parametrize("retention", [None, 1.0])
def test_soft_values_leave_no_residual_under_the_best_policy(key, retention):
    """Not in the mean: every single transition of the best policy has residual zero, and no other's has."""
    with jax.enable_x64(True):
        sampler = affine_sampler(retention=retention)
        policy, value = best(sampler)
        rollout = policy.rollout(key, 200)
        assert temporal_difference_loss(value, energy, rollout) < 1e-24
        assert temporal_difference_loss(value, energy, sampler.rollout(key, 200)) > 1e-2
        # Targets are constants: where the value at time 1 is wrong, that at time 2 has nothing to learn from it.
        wrong = eqx.tree_at(lambda v: v.curvature, value, value.curvature.at[1].add(0.3))
        slope = eqx.filter_grad(lambda v: temporal_difference_loss(v, energy, rollout))(wrong).curvature
        assert abs(slope[2]) < 1e-12 < 1e-3 < slope[1]
        # The values at time zero are those of the diffused density: the mean weight given x_0 is exact.
        weight = -energy(rollout.final[0]) - running_costs(rollout)[0].sum()
        np.testing.assert_allclose(weight, -value(0, rollout.states[0, 0]), rtol=1e-10)


def test_soft_values_of_a_mixture_are_its_diffused_density(key):
    """The Bellman equation ``V^t(x) = -log E[...]`` by quadrature, with the noising of the package itself."""
    with jax.enable_x64(True):
        sampler = affine_sampler(retention=1.0)
        nodes = jnp.linspace(-12.0, 12.0, 4001)
        means, weights, variance = jnp.array([-2.0, 1.5]), jnp.array([0.3, 0.7]), 0.2

        def value(time, x):
            spread = variance + jnp.sum(sampler.backward.scale[time:] ** 2)
            return -jax.scipy.special.logsumexp(
                jnp.log(weights) - 0.5 * (x - means) ** 2 / spread - 0.5 * jnp.log(2.0 * jnp.pi * spread)
            )

        def by_quadrature(time, x):
            noising = jax.vmap(lambda y: sampler.backward.log_prob(time, jnp.array([x]), y[None]))(nodes)
            later = jax.vmap(lambda y: value(time + 1, y))(nodes)
            return -jnp.log(jnp.trapezoid(jnp.exp(noising - later), nodes))

        for time, x in itertools.product(range(3), (-3.0, 0.0, 1.0)):
            np.testing.assert_allclose(by_quadrature(time, x), value(time, x), rtol=1e-9)


def test_values_of_a_policy_that_is_not_the_best_are_its_expected_costs(key):
    """Temporal differences, followed to their minimum, give what simulation gives."""
    with jax.enable_x64(True):
        sampler = affine_sampler()
        start = Quadratic(jnp.zeros(3), jnp.zeros(3))
        optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 600))

        @jax.jit
        def fit(key):
            def update(carry, key):
                value, state = carry
                loss = lambda v: temporal_difference_loss(v, energy, sampler.rollout(key, 2000))
                updates, state = optimizer.update(jax.grad(loss)(value), state)
                return (optax.apply_updates(value, updates), state), None

            return jax.lax.scan(update, (start, optimizer.init(start)), jax.random.split(key, 600))[0][0]

        value = fit(key)
        rollout = sampler.rollout(jax.random.fold_in(key, 1), 400_000)
        to_go = running_costs(rollout).sum(axis=1) + jax.vmap(energy)(rollout.final)
        predicted = jax.vmap(lambda x: value(0, x))(rollout.states[:, 0])
        residual = np.asarray(to_go - predicted)
        check_mean("expected cost", residual, 0.0, scale=0.02)
        # And not only on average: where x_0 is far out, too.
        far = np.asarray(jnp.abs(rollout.states[:, 0, 0]) > 1.5)
        assert abs(residual[far].mean()) < 0.05


@pytest.mark.parametrize("gradient", ["pathwise", "reinforce"])
def test_policies_improve_to_the_best_one(key, gradient):
    """Both players from scratch, by the sampler's own objective; the noising is held."""
    with jax.enable_x64(True):
        sampler = affine_sampler()
        expected, value = best(sampler)
        pair = ActorCritic(sampler, Quadratic(jnp.zeros(3), jnp.zeros(3)))
        num_updates = 4000
        rate = optax.cosine_decay_schedule(0.03, num_updates)
        optimizer = actor_critic_optimizer(optax.adam(rate), optax.adam(rate), optax.adam(rate), adaptive_velocity(0.0))
        chains = ebm.init_sampler(jnp.zeros((1024, 1)), kernels.raw_diffusion(pair))
        objective = functools.partial(policy_improvement, gradient=gradient)

        @eqx.filter_jit
        def train(kernel, key):
            def update(carry, key):
                kernel, state = carry
                loss = lambda k: objective(energy, chains._replace(kernel=k), None, key)[0]
                updates, state = optimizer.update(eqx.filter_grad(loss)(kernel), state, kernel)
                return (eqx.apply_updates(kernel, updates), state), None

            return jax.lax.scan(update, (kernel, optimizer.init(kernel)), jax.random.split(key, num_updates))[0][0]

        trained = train(chains.kernel, key).keywords["sampler"]
        tolerance = {"pathwise": 0.02, "reinforce": 0.06}[gradient]
        np.testing.assert_allclose(trained.policy.step_scale, expected.step_scale, rtol=tolerance)
        np.testing.assert_allclose(trained.policy.network.slope, expected.network.slope, atol=2.0 * tolerance)
        np.testing.assert_allclose(trained.policy.network.intercept, 0.0, atol=2.0 * tolerance)
        np.testing.assert_allclose(trained.value.curvature[0], value.curvature[0], rtol=0.1)
        assert np.array_equal(trained.policy.backward.log_scale, sampler.backward.log_scale)


def test_both_policy_gradients_are_that_of_the_bound_and_one_is_noisier(key):
    """q = N(m, s^2), U = l x^2 / 2: the mean gradient in m is l m; standard deviations .80 and 3.28."""
    with jax.enable_x64(True):
        curvature, mean, scale = 2.0, 0.7, 0.4
        sampler = eqx.tree_at(lambda s: s.log_step_scale, affine_sampler(1), jnp.log(jnp.array([scale])))
        push = float(sampler.schedule.residual_scale[0])
        keep = float(sampler.schedule.retention[0])

        def at(m, x):  # the sampler that goes to m from x
            return eqx.tree_at(lambda s: s.network.intercept, sampler, jnp.reshape((m - keep * x) / push, (1, 1)))

        def cost(x):
            return 0.5 * curvature * jnp.sum(x**2)

        none = {"entropy_weight": 0.0, "velocity_weight": 0.0}
        zero = lambda t, x: jnp.zeros(())

        def pathwise(key):
            start = jax.random.normal(key, (1, 1))
            states = jnp.stack([start, start], axis=1)
            loss = lambda m: pathwise_policy_loss(at(m, start[0, 0]), zero, cost, states, key, **none)
            return jax.grad(loss)(mean)

        def reinforce(key):
            rollout = at(mean, 0.0).rollout(key, 1)
            start = rollout.states[0, 0, 0]
            moved = rollout._replace(states=rollout.states.at[:, 1].add(-keep * start))
            loss = lambda m: reinforce_policy_loss(at(m, start), zero, cost, moved, **none)
            return jax.grad(loss)(mean)

        keys = jax.random.split(key, 200_000)
        for gradient, deviation in ((pathwise, 0.80), (reinforce, 3.28)):
            found = np.asarray(jax.jit(jax.vmap(gradient))(keys))
            check_mean(gradient.__name__, found, curvature * mean, scale=0.1)
            np.testing.assert_allclose(found.std(), deviation, rtol=0.02)


def test_the_bound_is_the_divergence_of_trajectories_and_the_noising_has_its_best_scale(key):
    """One linear step: both divergences in closed form, and their difference least at the mean squared step."""
    with jax.enable_x64(True):
        slope, scale = 0.8, 0.5
        sampler = affine_sampler(1, retention=1.0)
        weight = (slope - sampler.schedule.retention) / sampler.schedule.residual_scale
        sampler = eqx.tree_at(
            lambda s: (s.network.slope, s.log_step_scale),
            sampler,
            (jnp.asarray(weight)[:, None], jnp.log(jnp.array([scale]))),
        )
        variance = slope**2 + scale**2
        marginal = 0.5 * (CURVATURE * variance - 1.0 - np.log(CURVATURE * variance))
        square = (slope - 1.0) ** 2 + scale**2
        rollout = sampler.rollout(key, 1_000_000)

        def joint(s):
            """E log q(x_0) q(x_1 | x_0) - log p(x_1) - log r(x_0 | x_1)."""
            entropy = -0.5 * np.log(2 * np.pi * np.e) - 0.5 * np.log(2 * np.pi * np.e * scale**2)
            of_energy = 0.5 * CURVATURE * variance + 0.5 * np.log(2 * np.pi / CURVATURE)
            return entropy + of_energy + 0.5 * square / s**2 + 0.5 * np.log(2 * np.pi * s**2)

        for s in (np.sqrt(square), np.sqrt(2.0 * square), np.sqrt(0.5 * square)):
            noised = eqx.tree_at(lambda x: x.backward.log_scale, sampler, jnp.log(jnp.array([s])))
            found = noised.evaluate(rollout.states)
            bound = jax.vmap(energy)(found.final) + found.log_ratio + 0.5 * np.log(2 * np.pi / CURVATURE)
            check_mean(f"bound at {s:.2f}", np.asarray(bound), joint(s), scale=0.02)
            assert joint(s) > marginal
        assert joint(np.sqrt(square)) < min(joint(np.sqrt(2.0 * square)), joint(np.sqrt(0.5 * square)))

        # The moving average, as a transformation of the gradient, is the moving average.
        rule, mean_square = adaptive_velocity(0.25), float(jnp.mean((rollout.states[:, 0] - rollout.states[:, 1]) ** 2))
        before = float(sampler.backward.scale[0]) ** 2
        gradient = eqx.filter_grad(velocity_loss)(sampler, rollout.states).backward.log_scale
        step, _ = rule.update(gradient, rule.init(gradient))
        after = float(jnp.exp(2.0 * (sampler.backward.log_scale + step))[0])
        np.testing.assert_allclose(after, 0.75 * before + 0.25 * mean_square, rtol=1e-9)
        np.testing.assert_allclose(mean_square, square, rtol=0.01)


def test_no_part_moves_by_the_loss_of_another(key):
    pair = ActorCritic(
        DiffusionSampler(2, num_steps=3, key=key, width=8, depth=1),
        ValueNetwork(2, 3, key=jax.random.fold_in(key, 1), width=8, depth=1, zero_init=False),
    )
    chains = ebm.init_sampler(jnp.zeros((32, 2)), kernels.raw_diffusion(pair))
    step_key = jax.random.split(key)[1]

    def whole(pair):
        kernel = kernels.raw_diffusion(pair)
        return policy_improvement(energy, chains._replace(kernel=kernel), None, key)[0]

    gradient = eqx.filter_jit(eqx.filter_grad(whole))(pair)
    rollout = pair.rollout(jax.random.split(key)[0], 32)
    compiled = lambda loss: eqx.filter_jit(eqx.filter_grad(loss))
    of_value = compiled(lambda v: temporal_difference_loss(v, energy, rollout))(pair.value)
    of_policy = compiled(
        lambda p: (
            pathwise_policy_loss(p, pair.value, energy, rollout.states, step_key) + velocity_loss(p, rollout.states)
        )
    )(pair.policy)
    same = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6))
    same(gradient.value, of_value)
    same(gradient.policy, of_policy)
    # The noising is a constant of the policy's loss.
    of_steps = compiled(lambda p: pathwise_policy_loss(p, pair.value, energy, rollout.states, step_key))(pair.policy)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_steps.backward))


def test_the_optimizer_moves_what_it_should_and_nothing_else(key):
    policy = DiffusionSampler(2, num_steps=3, key=key, width=8, depth=1)
    pair = ActorCritic(policy, ValueNetwork(2, 3, key=key, width=8, depth=1))
    kernel = kernels.raw_diffusion(pair)
    ones = jax.tree.map(lambda x: jnp.ones_like(x) if eqx.is_inexact_array(x) else x, kernel)
    ones = eqx.filter(ones, eqx.is_inexact_array)
    parts = {"policy": 1.0, "value": 10.0, "step_scale": 100.0}
    optimizer = actor_critic_optimizer(
        **{name: optax.sgd(rate) for name, rate in parts.items()}, velocity=optax.sgd(1e3)
    )
    steps, _ = optimizer.update(ones, optimizer.init(ones), ones)
    found = steps.keywords["sampler"]
    sizes = {
        "policy": found.policy.network,
        "value": found.value,
        "step_scale": found.policy.log_step_scale,
    }
    for name, tree in sizes.items():
        assert all(np.all(leaf == -parts[name]) for leaf in jax.tree.leaves(tree)), name
    assert np.all(found.policy.backward.log_scale == -1e3)
    assert not np.any(found.policy.backward.retention)


def test_guidance_keeps_weights_exact_and_mends_a_sampler_that_lags(key):
    """The mean weight is Z whatever the guidance; towards the energy it is less variable."""
    with jax.enable_x64(True):
        policy = affine_sampler(3)
        _, value = best(policy)
        pair = ActorCritic(policy, value)
        log_z = 0.5 * np.log(2 * np.pi / CURVATURE)
        spread = []
        for strength in (0.0, 0.3, 0.6):
            rollout = guide(pair, energy, strength).rollout(key, 400_000)
            weight = np.exp(np.asarray(rollout.log_weight(jax.vmap(energy)(rollout.final))))
            check_mean(f"Z at {strength}", weight, np.exp(log_z), scale=0.05)
            spread.append(weight.std())
        assert spread[1] < 0.9 * spread[0]
        unguided = guide(pair, energy, 0.0).sample(key, 10)
        np.testing.assert_allclose(unguided, policy.sample(key, 10), rtol=1e-12)


def test_guidance_does_not_ask_the_energy_where_it_has_no_slope_and_can_be_trained_on(key):
    pair = ActorCritic(affine_sampler(3), Quadratic(jnp.ones(3), jnp.zeros(3)))
    guided = guide(pair, lambda x: jnp.linalg.norm(x), 0.1)
    assert bool(jnp.isfinite(guided.mean(0, jnp.zeros(1))).all())
    assert not bool(jnp.isfinite(guided.mean(2, jnp.zeros(1))).all())
    # Of the guided network only the policy's own is trained, by the policy's optimizer.
    kernel = kernels.raw_diffusion(ActorCritic(guided, pair.value))
    marks = ebm.potentials.trainable(kernel.keywords["sampler"].policy.network)
    assert sum(jax.tree.leaves(marks)) == len(jax.tree.leaves(pair.policy.network))


@pytest.mark.parametrize("call", [pathwise_policy_loss, velocity_loss])
def test_trajectories_of_another_length_are_refused(key, call):
    sampler, states = affine_sampler(3), jnp.zeros((4, 6, 1))
    arguments = (sampler, states) if call is velocity_loss else (sampler, lambda t, x: 0.0, energy, states, key)
    with pytest.raises(ValueError, match="states: got shape"):
        call(*arguments)


def test_a_value_may_be_any_number():
    pair = ActorCritic(affine_sampler(), lambda t, x: 0.0)
    chains = ebm.init_sampler(jnp.zeros((4, 1)), kernels.raw_diffusion(pair))
    assert bool(jnp.isfinite(policy_improvement(energy, chains, None, jax.random.key(0))[0]))
    assert bool(jnp.isfinite(guide(pair, energy, 0.1).sample(jax.random.key(0), 2)).all())


# Contrastive divergence is the special case.


def no_improvement(potential, sampler, batch, key):
    """A player whose move is none."""
    parameters = eqx.filter(sampler.kernel, eqx.is_inexact_array)
    return sum(jnp.sum(0.0 * leaf) for leaf in jax.tree.leaves(parameters)), (sampler, {})


@pytest.mark.parametrize("start", ["data", "sampler"])
def test_the_loop_with_k_kernel_steps_is_contrastive_divergence_bit_for_bit(key, start):
    """From the data CD-k, from the bank PCD-k: the same trained network, chains and history under the same key."""
    data = jax.random.normal(key, (200, 2))
    net = ebm.potentials.MLP(2, key=key, width=8, depth=2)
    chains = ebm.init_sampler(data[:32], kernels.mala(0.1))
    optimizer, stays = optax.adam(1e-2), optax.set_to_zero()
    options = {"num_steps": 20, "batch_size": 32, "progress_bar": False}
    theirs = {"data": contrastive_divergence, "sampler": persistent_contrastive_divergence}[start]
    plain, history = ebm.fit(
        key,
        ebm.init_train(net, optimizer, chains),
        data,
        functools.partial(theirs, num_steps=3),
        optimizer,
        **options,
    )
    game, played = ebm.fit(
        key,
        ebm.init_train(net, optimizer, chains, sampler_optimizer=stays),
        data,
        functools.partial(generalized_contrastive_divergence, num_steps=3, start=start),
        optimizer,
        sampler_objective=no_improvement,
        sampler_optimizer=stays,
        **options,
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        eqx.filter(plain.potential, eqx.is_array),
        eqx.filter(game.potential, eqx.is_array),
    )
    np.testing.assert_array_equal(plain.sampler.position, game.sampler.position)
    for name, values in history.items():
        np.testing.assert_array_equal(values, played[name], err_msg=name)
    moved = jax.tree.map(
        lambda a, b: np.any(a != b), eqx.filter(net, eqx.is_array), eqx.filter(plain.potential, eqx.is_array)
    )
    assert any(jax.tree.leaves(moved))


@pytest.mark.parametrize(("num_steps", "two_terms"), [(1, -0.0498), (50, -0.8020)])
def test_contrastive_divergence_leaves_its_third_term_out(key, num_steps, two_terms):
    """Gaussian data, U = theta x^2 / 2, Langevin steps: their variance follows c <- (1 - h theta)^2 c + 2 h.

    The third term is -.0422 at one step and -.0130 at fifty; the likelihood's gradient is -.8167.
    """
    variance, theta, step = 1.7, 0.3, 0.1
    rows = np.sqrt(variance) * np.asarray(jax.random.normal(key, (50_000,)), float)
    rows *= np.sqrt(variance) / np.sqrt(np.mean(rows**2))
    sampler = ebm.init_sampler(jnp.zeros(2), kernels.unadjusted_langevin(step))

    @jax.jit
    @jax.grad
    def gradient(parameter, key):
        potential = jax.tree_util.Partial(lambda t, x: 0.5 * t * x**2, parameter)
        batch = jnp.asarray(rows, jnp.float32)
        return generalized_contrastive_divergence(potential, sampler, batch, key, num_steps=num_steps, start="data")[0]

    found = np.array([gradient(theta, k) for k in jax.random.split(key, 64)])
    end = variance
    for _ in range(num_steps):
        end = (1 - step * theta) ** 2 * end + 2 * step
    np.testing.assert_allclose(0.5 * (variance - end), two_terms, atol=5e-5)
    check_mean("two terms", found, two_terms, scale=0.02)


def test_a_sampler_that_cannot_follow_leaves_the_energy_adrift():
    """Correlated data, independent draws: the gradient in the coupling is the covariance, whatever the coupling."""
    covariance = np.array([[1.0, 0.6], [0.6, 1.0]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    log_weight = np.log(np.outer(weights, weights).ravel())
    with jax.enable_x64(True):
        sampler = ebm.types.SamplerState(jnp.asarray(grid), jnp.asarray(log_weight), still)
        rows = jnp.asarray(np.sqrt(2.0) * np.vstack([c := np.linalg.cholesky(covariance).T, -c]))

        @jax.jit
        @jax.grad
        def gradient(coupling, weight):
            potential = jax.tree_util.Partial(lambda a, x: a * x[0] * x[1], coupling)
            return generalized_contrastive_divergence(
                potential, sampler, rows, jax.random.key(0), energy_weight=weight
            )[0]

        for coupling in (-1.0, 0.0, 5.0):
            np.testing.assert_allclose(gradient(coupling, 0.0), covariance[0, 1], rtol=1e-9)
        # The penalty ends the drift.
        assert gradient(-5.0, 0.1) < 0.0 < gradient(0.0, 0.1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda chains, key: policy_improvement(energy, chains, None, key, gradient="ddpg"), ValueError, "got 'ddpg'"),
        (lambda chains, key: policy_improvement(energy, chains, None, key, entropy_weight=-1.0), ValueError, "entropy_w"),
        (lambda chains, key: policy_improvement(energy, chains, None, key, num_samples=0), ValueError, "num_samples"),
        (lambda chains, key: policy_improvement(energy, None, None, key), TypeError, "sampler"),
        (
            lambda chains, key: policy_improvement(
                energy, ebm.init_sampler(jnp.zeros((4, 1)), kernels.mala(0.1)), None, key
            ),
            TypeError,
            "ActorCritic",
        ),
        (
            lambda chains, key: policy_improvement(
                energy, ebm.init_sampler(jnp.zeros((4, 1)), kernels.raw_diffusion(affine_sampler())), None, key
            ),
            TypeError,
            "value function",
        ),
        (lambda chains, key: ActorCritic("policy", energy), TypeError, "policy: got str"),
        (lambda chains, key: ActorCritic(affine_sampler(), 1.0), TypeError, "value: got float"),
        (lambda chains, key: guide(affine_sampler(), energy, 0.1), TypeError, "pair: got DiffusionSampler"),
        (lambda chains, key: guide(chains.kernel.keywords["sampler"], energy, -0.1), ValueError, "strength"),
        (lambda chains, key: guide(chains.kernel.keywords["sampler"], energy, jnp.ones(2)), ValueError, "strength: got sh"),
        (lambda chains, key: adaptive_velocity(1.0), ValueError, "rate: got 1.0"),
        (lambda chains, key: adaptive_velocity("a"), ValueError, "rate: got 'a'"),
        (lambda chains, key: ActorCritic(affine_sampler(), ValueNetwork(1, 2, key=key)), ValueError, "for 2 steps"),
        (lambda chains, key: ValueNetwork(2, 3, key=key, scale=0.0), ValueError, "scale"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(key, call, error, text):
    pair = ActorCritic(affine_sampler(), Quadratic(jnp.zeros(3), jnp.zeros(3)))
    chains = ebm.init_sampler(jnp.zeros((4, 1)), kernels.raw_diffusion(pair))
    with pytest.raises(error, match=text):
        call(chains, key)
