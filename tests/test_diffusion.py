"""Diffusion samplers: densities of whole trajectories, exact corrections, pretraining, and the kernels made of them."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest
from jax.tree_util import Partial
from scipy import stats

import ebm_ppl as ebm
from ebm_ppl import diffusion, kernels, targets
from ebm_ppl.adaptation import set_tunables
from ebm_ppl.proposals import check_proposal
from ebm_ppl.testing import cdf_test, exact_start_invariance, t_test_chain_means

# Scales that cover each target's tails; the last step of a Gaussian sampler has Gaussian tails.
SCALE = {"gaussian": 1.0, "gumbel": 3.0, "many_well": 2.0}
NUM_CHAINS = 20_000


class Affine(eqx.Module):
    """The networks for which everything is known."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, time, event):
        return self.weight[time] * event + self.bias[time]


def rough_sampler(event_shape, scale, num_steps=3):
    """A sampler that fits nothing, with a noising that is not its reversal: corrections must not care."""
    network_key = jax.random.key(3)
    network = diffusion.TimeMLP(event_shape, num_steps, key=network_key, width=8, depth=1, zero_init=False)
    sampler = diffusion.DiffusionSampler(event_shape, num_steps=num_steps, scale=scale, network=network)
    backward = diffusion.BackwardKernel(0.95 * sampler.backward.retention, sampler.backward.log_scale + 0.1)
    return eqx.tree_at(lambda s: s.backward, sampler, backward)


def affine_sampler(num_steps=4, scale=1.5):
    weight, bias = jnp.linspace(-0.6, 0.4, num_steps), jnp.linspace(0.3, -0.2, num_steps)
    sampler = diffusion.DiffusionSampler((), num_steps=num_steps, scale=scale, network=Affine(weight, bias))
    return eqx.tree_at(lambda s: s.log_step_scale, sampler, sampler.log_step_scale + 0.2)


def affine_law(sampler):
    """Mean and covariance of (x_0 ... x_T) by the recursion of an affine sampler, in float64."""
    schedule, size = sampler.schedule, sampler.num_steps + 1
    slope = schedule.retention + schedule.residual_scale * np.asarray(sampler.network.weight, np.float64)
    shift = schedule.residual_scale * np.asarray(sampler.network.bias, np.float64)
    mean, covariance = np.zeros(size), np.zeros((size, size))
    covariance[0, 0] = sampler.scale**2
    for t in range(size - 1):
        mean[t + 1] = slope[t] * mean[t] + shift[t]
        covariance[t + 1, : t + 1] = covariance[: t + 1, t + 1] = slope[t] * covariance[t, : t + 1]
        covariance[t + 1, t + 1] = slope[t] ** 2 * covariance[t, t] + float(sampler.step_scale[t]) ** 2
    return mean, covariance


def test_an_affine_sampler_has_its_closed_form_law_and_density(key):
    sampler = affine_sampler()
    trajectory = eqx.filter_jit(lambda k: sampler.rollout(k, 30_000))(key)
    mean, covariance = affine_law(sampler)
    dense = stats.multivariate_normal(mean, covariance).logpdf(np.asarray(trajectory.states[:100], np.float64))
    np.testing.assert_allclose(trajectory.log_prob[:100], dense, atol=2e-5)
    law = stats.norm(mean[-1], np.sqrt(covariance[-1, -1]))
    cdf_test(trajectory.final, law.cdf).raise_if_failed()
    difference = np.array([0, 0, 1, 0, -1])
    law = stats.norm(difference @ mean, np.sqrt(difference @ covariance @ difference))
    cdf_test(np.asarray(trajectory.states) @ difference, law.cdf).raise_if_failed()
    assert not cdf_test(trajectory.states[:, -2], stats.norm(mean[-1], np.sqrt(covariance[-1, -1])).cdf).passed


def test_densities_agree_however_a_trajectory_was_made(key):
    sampler = rough_sampler((2,), 2.0)
    drawn = sampler.rollout(key, 50)
    reversed_ones = sampler.reverse_rollout(key, drawn.final)
    evaluate = eqx.filter_jit(sampler.evaluate)
    for trajectory in (drawn, reversed_ones):
        again = evaluate(trajectory.states)
        for ours, theirs in zip(again, trajectory, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_array_equal(reversed_ones.final, drawn.final)
    # The noising, by hand.
    states = np.asarray(drawn.states, np.float64)
    scale = np.asarray(sampler.backward.scale)[:, None]
    centre = np.asarray(sampler.backward.retention)[:, None] * states[:, 1:]
    expected = stats.norm(centre, scale).logpdf(states[:, :-1]).sum(axis=-1)
    np.testing.assert_allclose(drawn.backward_log_prob, expected, atol=1e-4)


def test_at_initialisation_the_sampler_is_its_base_and_the_noising_its_reversal(key):
    sampler = diffusion.DiffusionSampler(2, num_steps=3, key=key, width=8, depth=1, scale=2.0)
    trajectory = sampler.rollout(key, 50)
    exact = stats.norm(0.0, 2.0).logpdf(np.asarray(trajectory.final, np.float64)).sum(axis=1)
    np.testing.assert_allclose(trajectory.log_ratio, exact, atol=5e-5)


def test_gradients_flow_through_the_rollout_and_the_score_has_mean_zero(key):
    sampler = affine_sampler()
    parameters, rest = eqx.partition(sampler, eqx.is_inexact_array)

    def second_moment(parameters):
        return jnp.mean(eqx.combine(parameters, rest).sample(key, 20_000) ** 2)

    gradient = jax.grad(second_moment)(parameters)
    # d E[x_T^2] / d log sigma_last = 2 sigma_last^2, for any network.
    assert float(gradient.log_step_scale[-1]) == pytest.approx(2 * float(sampler.step_scale[-1]) ** 2, rel=0.05)
    states = jax.lax.stop_gradient(sampler.rollout(key, 4096).states)

    def log_prob(parameters, one):
        return eqx.combine(parameters, rest).evaluate(one[None]).log_prob[0]

    score = jax.vmap(jax.grad(log_prob), (None, 0))(parameters, states)
    t_test_chain_means(score.log_step_scale[:, 1], 0.0).raise_if_failed()
    t_test_chain_means(score.network.weight[:, 2], 0.0).raise_if_failed()


@functools.cache
def weighted(name, seed):
    """Trajectories of a rough sampler, and the weights of their ends over the exact Z."""
    target = targets.get(name)
    sampler = rough_sampler(target.event_shape, SCALE[name])
    trajectory = sampler.rollout(jax.random.fold_in(jax.random.key(seed), 11), 100_000)
    log_weight = trajectory.log_weight(jax.vmap(target.unconstrained_potential)(trajectory.final))
    return target, trajectory, np.asarray(log_weight, np.float64) - target.log_normalizer


@pytest.mark.parametrize("name", SCALE)
def test_the_mean_weight_is_the_normaliser_exactly(name, seed):
    target, trajectory, log_weight = weighted(name, seed)
    weight = np.exp(log_weight)
    t_test_chain_means(weight, 1.0, name="E[w] / Z").raise_if_failed()
    assert 0.02 < weight.sum() ** 2 / (weight**2).sum() / weight.size < 0.9
    for description, (function, exact) in list(target.expectations.items())[:3]:
        values = np.asarray(jax.vmap(function)(trajectory.final))
        t_test_chain_means(weight * values, exact, name=description).raise_if_failed()


@pytest.mark.parametrize("fault", ["no start", "one step left out", "noising of another width", "half the energy"])
def test_a_wrong_weight_is_caught(fault, seed):
    target, trajectory, log_weight = weighted("gaussian", seed)
    peak = trajectory.backward_log_prob[:, 1].max()
    missing = {
        "no start": trajectory.start_log_prob,
        "one step left out": trajectory.step_log_prob[:, -1],
        "noising of another width": 0.3 * (trajectory.backward_log_prob[:, 1] - peak),
        "half the energy": 0.5 * jax.vmap(target.potential)(trajectory.final),
    }[fault]
    assert not t_test_chain_means(np.exp(log_weight + np.asarray(missing)), 1.0).passed


@pytest.mark.parametrize(
    "name", ["gumbel", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gaussian", "many_well"))]
)
def test_metropolis_on_trajectories_is_invariant_and_raw_draws_are_not(key, name):
    target = targets.get(name)
    sampler = rough_sampler(target.event_shape, SCALE[name])
    report = exact_start_invariance(
        key, kernels.diffusion(sampler, correction="metropolis"), target, num_chains=NUM_CHAINS, num_steps=3
    )
    report.raise_if_failed()
    assert 0.05 < report.acceptance < 0.95
    report = exact_start_invariance(key, kernels.raw_diffusion(sampler), target, num_chains=NUM_CHAINS, num_steps=1)
    assert not all(check.passed for check in report.checks), report


class WrongPast(eqx.Module):
    """A sampler that draws the past of a position by one noising and weighs it by another."""

    sampler: diffusion.DiffusionSampler
    other: diffusion.DiffusionSampler

    def rollout(self, key, num_samples):
        return self.sampler.rollout(key, num_samples)

    def reverse_rollout(self, key, events):
        return self.sampler.evaluate(self.other.reverse_rollout(key, events).states)


def test_a_wrong_past_is_caught(key):
    target = targets.get("gumbel")
    sampler = rough_sampler((), 3.0)
    backward = diffusion.BackwardKernel(0.6 * sampler.backward.retention, sampler.backward.log_scale - 0.7)
    other = eqx.tree_at(lambda s: s.backward, sampler, backward)
    kernel = kernels.diffusion(WrongPast(sampler, other), correction="metropolis")
    report = exact_start_invariance(key, kernel, target, num_chains=NUM_CHAINS, num_steps=3)
    assert not all(check.passed for check in report.checks), report


def test_the_weighted_kernel_gives_its_weights_to_the_sampler_state(key):
    target = targets.get("many_well")
    sampler = ebm.init_sampler(jnp.ones((1000, 2)), kernels.diffusion(rough_sampler((2,), 2.0)))
    sampler, info = ebm.advance(key, target.unconstrained_potential, sampler, 1)
    weight = np.exp(np.asarray(sampler.log_weight, np.float64))
    assert float(info.statistics["weight_ess"][0]) == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), rel=1e-3)
    assert float(info.statistics["log_normalizer"][0]) == pytest.approx(np.log(weight.mean()), abs=1e-3)
    assert abs(np.log(weight.mean()) - target.log_normalizer) < 0.5
    assert info.num_energies.tolist()[0] == 2  # advance counts the start of a phase
    assert info.num_gradients.tolist()[0] == 0


def above(threshold, x):
    return jnp.where(x > threshold, 0.5 * x**2, jnp.nan)


@pytest.mark.parametrize("correction", ["weights", "metropolis"])
def test_non_finite_proposals_weigh_nothing_and_are_counted(key, correction):
    half_line = Partial(above, jnp.array(0.0))
    sampler = ebm.init_sampler(jnp.full(200, 3.0), kernels.diffusion(rough_sampler((), 1.0), correction=correction))
    after, info = ebm.advance(key, half_line, sampler, 1)
    assert 20 < int(info.num_nonfinite.sum()) < 180
    assert bool((after.position > 0.0).all())
    rejected = info.num_nonfinite == 1
    assert bool((after.position[rejected] == 3.0).all())
    assert not bool(info.is_divergent.any())
    if correction == "weights":
        assert bool(((after.log_weight == -jnp.inf) == rejected).all())
    # Where nothing is finite the population stays, and every chain is flagged.
    after, info = ebm.advance(key, Partial(above, jnp.array(jnp.inf)), sampler, 1)
    assert bool((after.position == 3.0).all())
    assert bool((after.log_weight == 0.0).all())
    assert bool(info.is_divergent.all())
    assert float(info.statistics["weight_ess"][0]) == 0.0
    # A chain that stands outside the support leaves it.
    outside = sampler._replace(position=jnp.full(200, -3.0))
    after, info = ebm.advance(key, half_line, outside, 1)
    assert bool(((after.position > 0.0) == (info.num_nonfinite == 0)).all())


def test_training_takes_each_and_a_trained_sampler_does_not_recompile(key):
    traces = 0

    def counted(x):
        nonlocal traces
        traces += 1
        return jnp.sum(x**2)

    batch, rough = jnp.ones((8, 2)), rough_sampler((2,), 2.0)
    metropolis = functools.partial(kernels.diffusion, correction="metropolis")
    for make in (kernels.diffusion, metropolis, kernels.raw_diffusion):
        sampler = ebm.init_sampler(batch, make(rough))
        loss, (after, _) = ebm.objectives.persistent_contrastive_divergence(counted, sampler, batch, key, num_steps=1)
        assert bool(jnp.isfinite(loss))
        assert after.position.shape == (8, 2)
        changed = set_tunables(sampler, sampler=jax.tree.map(lambda x: 0.9 * x, rough))
        ebm.advance(key, counted, sampler, 1)
        before = traces
        ebm.advance(key, counted, changed, 1)
        assert traces - before <= 1  # the shape check at the boundary, and no compilation
    _, draws = ebm.draw(key, counted, ebm.init_sampler(batch, kernels.diffusion(rough)), 3)
    assert draws.log_weight.shape == draws.statistics["weight_ess"].shape == (8, 3)
    assert bool((draws.log_weight != 0.0).all())


# Pretraining.


def best_weights(sampler, variance):
    """Regression of the residual on the noised event, for events N(0, variance)."""
    level, scale = sampler.schedule.signal, sampler.scale
    covariance = level * np.sqrt(1 - level**2) * (variance / scale - scale)
    return covariance / (level**2 * variance + scale**2 * (1 - level**2))


def test_the_bound_is_tight_for_the_exact_reversal_and_larger_otherwise(key):
    sampler = diffusion.DiffusionSampler((), num_steps=4, scale=1.5, network=Affine(jnp.zeros(4), jnp.zeros(4)))
    keys = jax.random.split(key, 400)

    def one(sampler, key):
        data_key, key = jax.random.split(key)
        return diffusion.denoising_loss(sampler, 1.5 * jax.random.normal(data_key, (64,)), key)

    losses = eqx.filter_jit(jax.vmap(one, (None, 0)))
    entropy = stats.norm(0.0, 1.5).entropy()
    t_test_chain_means(losses(sampler, keys), float(entropy)).raise_if_failed()
    for worse in (
        affine_sampler(4, 1.5),
        eqx.tree_at(lambda s: s.log_step_scale, sampler, sampler.log_step_scale + 0.3),
    ):
        assert float(losses(worse, keys).mean()) > entropy + 0.05


def test_pretraining_finds_the_optimal_affine_means_and_step_sizes(key):
    variance = 0.4
    sampler = diffusion.DiffusionSampler((), num_steps=4, network=Affine(jnp.zeros(4), jnp.zeros(4)))
    data = np.sqrt(variance) * jax.random.normal(key, (20_000,))
    rate = optax.exponential_decay(0.05, 300, 0.1)
    trained, history = diffusion.pretrain(key, sampler, data, optax.adam(rate), 600, batch_size=512)
    np.testing.assert_allclose(trained.network.weight, best_weights(sampler, variance), atol=0.03)
    np.testing.assert_allclose(trained.network.bias, 0.0, atol=0.03)
    # Step sizes: the variance of x_{t+1} given x_t under the noising.
    levels = np.append(sampler.schedule.signal, 1.0)
    marginal = levels**2 * variance + (1 - levels**2)
    conditional = marginal[1:] - (sampler.schedule.retention * marginal[1:]) ** 2 / marginal[:-1]
    np.testing.assert_allclose(trained.step_scale**2, conditional, rtol=0.05)
    mean, covariance = affine_law(trained)
    assert covariance[-1, -1] == pytest.approx(variance, rel=0.05)
    assert abs(mean[-1]) < 0.03
    assert history["loss"].shape == (600,)
    exact = stats.norm(0.0, np.sqrt(variance)).entropy()
    assert float(history["loss"][-100:].mean()) == pytest.approx(float(exact), abs=0.05)
    np.testing.assert_array_equal(trained.backward.log_scale, sampler.backward.log_scale)


@pytest.mark.slow
def test_a_pretrained_sampler_has_the_moments_and_mode_shares_of_its_data(key):
    target = targets.get("gaussian_mixture")
    data = target.sample(jax.random.fold_in(key, 1), 20_000)
    scale = float(data.std())
    sampler = diffusion.DiffusionSampler(target.event_shape, num_steps=6, key=key, width=16, depth=2, scale=scale)
    rate = optax.cosine_decay_schedule(1e-2, 800)
    trained, history = diffusion.pretrain(key, sampler, data, optax.adam(rate), 800, batch_size=128)
    draws = trained.sample(jax.random.fold_in(key, 2), 20_000)
    assert float(draws.mean()) == pytest.approx(float(data.mean()), abs=0.1)
    assert float(draws.std()) == pytest.approx(float(data.std()), rel=0.05)
    assert float((draws > 0).mean()) == pytest.approx(float((data > 0).mean()), abs=0.04)
    assert float(history["loss"][-100:].mean()) < float(history["loss"][:20].mean())
    # What is left is corrected by weights, of which most now count.
    state = ebm.init_sampler(draws[:4000], kernels.diffusion(trained))
    _, info = ebm.advance(key, target.unconstrained_potential, state, 1)
    assert float(info.statistics["weight_ess"][0]) > 0.5 * 4000


@pytest.mark.slow
def test_eight_gaussians_in_five_steps(key):
    angle = jax.random.randint(key, (20_000,), 0, 8) * (jnp.pi / 4)
    centres = 4.0 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    data = (centres + 0.5 * jax.random.normal(jax.random.fold_in(key, 1), centres.shape)) / 1.414
    sampler = diffusion.DiffusionSampler(2, num_steps=5, key=key, width=128, depth=3, scale=2.0)
    rate = optax.cosine_decay_schedule(2e-3, 5000)
    trained, _ = diffusion.pretrain(key, sampler, data, optax.adam(rate), 5000)
    draws = np.asarray(trained.sample(jax.random.fold_in(key, 2), 20_000))
    np.testing.assert_allclose(draws.mean(axis=0), 0.0, atol=0.1)
    np.testing.assert_allclose(draws.var(axis=0), data.var(axis=0), rtol=0.06)
    modes = 4.0 / 1.414 * np.exp(1j * np.arange(8) * np.pi / 4)
    distance = np.abs((draws[:, 0] + 1j * draws[:, 1])[:, None] - modes)
    shares = np.bincount(distance.argmin(axis=1), minlength=8) / len(draws)
    assert shares.min() > 0.1
    assert shares.max() < 0.15
    assert (distance.min(axis=1) < 3 * 0.5 / 1.414).mean() > 0.75


# Networks and refusals.


def test_values_have_a_constant_per_time_and_are_potentials_at_one(key):
    value = diffusion.ValueNetwork((2, 1), 4, key=key, width=8, depth=1)
    assert value.offset.shape == (5,)
    assert float(value(4, jnp.ones((2, 1)))) == 0.0
    value = eqx.tree_at(lambda v: v.offset, value, jnp.arange(5.0))
    energy = diffusion.AtTime(value, 3)
    assert float(energy(jnp.ones((2, 1)))) == 3.0
    network = diffusion.TimeMLP((2, 1), 4, key=key, width=8, depth=1, zero_init=False)
    outputs = jax.vmap(network, (0, None))(jnp.arange(4), jnp.ones((2, 1)))
    assert outputs.shape == (4, 2, 1)
    assert float(jnp.abs(outputs[0] - outputs[1]).min()) > 0.0


def test_a_start_of_its_own_and_64_bits(key):
    base = dist.Laplace(0.0, 1.0).expand([2]).to_event(1)
    sampler = diffusion.DiffusionSampler(2, num_steps=3, key=key, width=8, depth=1, start=base)
    trajectory = sampler.rollout(key, 50)
    np.testing.assert_allclose(trajectory.start_log_prob, base.log_prob(trajectory.states[:, 0]), rtol=1e-5)
    with jax.enable_x64(True):
        state = ebm.init_sampler(jnp.zeros((4, 2)), kernels.diffusion(sampler))
        state, _ = ebm.advance(key, lambda x: jnp.sum(x**2), state, 1)
        assert state.position.dtype == state.log_weight.dtype == jnp.float64


def make(**options):
    options = {"event_shape": 2, "num_steps": 3, "key": jax.random.key(0), "width": 8, "depth": 1, **options}
    return diffusion.DiffusionSampler(**options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: make(num_steps=0), ValueError, "num_steps: got 0"),
        (lambda: make(event_shape=(2, 0)), ValueError, "event_shape: got 0"),
        (lambda: make(key=None), ValueError, "key: got None"),
        (lambda: make(scale=-1.0), ValueError, "scale: got -1.0"),
        (lambda: make(signal=(0.1, 0.5)), ValueError, "signal: got .*, expected 3 increasing levels"),
        (lambda: make(signal=(0.1, 0.5, 0.4)), ValueError, "signal: got .*, expected 3 increasing levels"),
        (lambda: make(start=dist.Normal(0.0, 1.0)), ValueError, r"start: got event_shape \(\), expected \(2,\)"),
        (lambda: make(start=lambda key, n: key), TypeError, "start: got function"),
        (lambda: diffusion.cosine_signal(3, minimum=1.0), ValueError, "minimum: got 1.0"),
        (lambda: make().evaluate(jnp.zeros((5, 3, 2))), ValueError, r"states: got shape \(5, 3, 2\)"),
        (lambda: make().rollout(jax.random.key(0), 0), ValueError, "num_samples: got 0"),
        (
            lambda: diffusion.pretrain(jax.random.key(0), make(), jnp.ones((4, 3)), optax.sgd(0.1), 1),
            ValueError,
            "data",
        ),
        (lambda: diffusion.pretrain(jax.random.key(0), make(), jnp.ones((4, 2)), "adam", 1), TypeError, "optimizer"),
        (
            lambda: diffusion.pretrain(jax.random.key(0), make(), jnp.ones((4, 2)), optax.sgd(1e30), 9, batch_size=4),
            ebm.TrainingFailure,
            "non-finite loss",
        ),
        (lambda: kernels.diffusion(make(), correction="none"), ValueError, "correction: got 'none'"),
        (lambda: kernels.diffusion(dist.Normal(0.0, 1.0)), TypeError, "sampler: got Normal without rollout"),
        (lambda: kernels.raw_diffusion(3), TypeError, "sampler: got int without rollout"),
        (lambda: check_proposal("proposal", make()), TypeError, "proposal: got DiffusionSampler, expected .* log_prob"),
    ],
)
def test_bad_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_sampler_of_other_events_is_refused(key):
    for kernel in (kernels.diffusion(make()), kernels.raw_diffusion(make())):
        with pytest.raises(ValueError, match=r"position: got event shape \(3,\), expected that of the sampler, \(2,\)"):
            ebm.advance(key, lambda x: jnp.sum(x**2), ebm.init_sampler(jnp.zeros((4, 3)), kernel), 1)
