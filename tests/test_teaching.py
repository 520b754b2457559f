"""The losses of dual-MCMC teaching in a linear-Gaussian world, where minima, fixed points and revised laws are known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import ebm_ppl as ebm
from ebm_ppl import objectives
from ebm_ppl.recipes import GeneratorModel, gaussian_generator
from ebm_ppl.testing import cdf_test

LOADINGS = np.array([[1.0, 0.2], [-0.5, 0.8], [0.3, 0.6]])
SCALE = 0.5
VARIANCE = np.linalg.inv(np.eye(2) + LOADINGS.T @ LOADINGS / SCALE**2)
GAIN = VARIANCE @ LOADINGS.T / SCALE**2


class Affine(eqx.Module):
    weight: jax.Array

    def __call__(self, latent):
        return self.weight @ latent


class NormalOf(eqx.Module):
    """``q(z | x) = N(Q x, diag exp(2 s))``."""

    weight: jax.Array
    log_scale: jax.Array

    def __call__(self, event):
        return self.weight @ event, self.log_scale


def model_of(loadings, gain=GAIN):
    model = gaussian_generator(Affine(jnp.asarray(loadings, jnp.float32)), 2, SCALE)
    inference = NormalOf(jnp.asarray(gain, jnp.float32), jnp.asarray(0.5 * np.log(np.diag(VARIANCE)), jnp.float32))
    return GeneratorModel(model, jnp.zeros(3), key=jax.random.key(0), inference=inference)


def pairs(variance=VARIANCE):
    """Rows ``(x, z)`` whose EMPIRICAL moments are those of ``x ~ p(x)``, ``z ~ N(Mx, variance)``."""
    raw = np.random.default_rng(0).normal(size=(400, 5))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / len(raw))).T
    x = white[:, :3] @ np.linalg.cholesky(LOADINGS @ LOADINGS.T + SCALE**2 * np.eye(3)).T
    z = x @ GAIN.T + white[:, 3:] @ np.linalg.cholesky(variance).T
    return jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32)


def largest(tree):
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array)))


@pytest.mark.parametrize("loss", [objectives.generator_loss, objectives.inference_loss])
def test_exact_posterior_pairs_are_a_fixed_point(loss):
    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    assert largest(gradient(model_of(LOADINGS), *pairs())) < 1e-4
    # Latents too narrow by a half move both players.
    assert largest(gradient(model_of(LOADINGS), *pairs(0.25 * VARIANCE))) > 0.1


def test_the_generator_step_is_least_squares_and_em_never_falls():
    def log_likelihood(loadings):
        covariance = loadings @ loadings.T + SCALE**2 * np.eye(3)
        second = LOADINGS @ LOADINGS.T + SCALE**2 * np.eye(3)
        return -0.5 * (np.linalg.slogdet(covariance)[1] + np.trace(np.linalg.solve(covariance, second)))

    x, z = (np.asarray(part, np.float64) for part in pairs(0.25 * VARIANCE))
    best = np.linalg.lstsq(z, x, rcond=None)[0].T
    gradient = eqx.filter_jit(eqx.filter_grad(objectives.generator_loss))
    assert largest(gradient(model_of(best), jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32))) < 1e-4
    second = LOADINGS @ LOADINGS.T + SCALE**2 * np.eye(3)
    loadings, values = np.array([[0.3, 0.1], [0.2, -0.4], [0.5, 0.1]]), []
    for _ in range(20):  # expectations over the exact posterior, then least squares
        values.append(log_likelihood(loadings))
        variance = np.linalg.inv(np.eye(2) + loadings.T @ loadings / SCALE**2)
        gain = variance @ loadings.T / SCALE**2
        loadings = second @ gain.T @ np.linalg.inv(variance + gain @ second @ gain.T)
    assert (np.diff(values) >= -1e-12).all()


def test_revised_latents_have_the_moments_of_their_langevin_steps(key):
    step, num_steps, num_rows = 0.05, 4, 20_000
    event = np.array([0.7, -0.3, 1.1])
    rows = jnp.tile(jnp.asarray(event, jnp.float32), (num_rows, 1))
    latents, _ = objectives.revise_latents(
        key, model_of(LOADINGS), rows, jnp.zeros((num_rows, 2)), ebm.kernels.langevin(step), num_steps
    )

    def law(num_steps):
        contraction, mean, covariance = np.eye(2) - step * np.linalg.inv(VARIANCE), np.zeros(2), np.zeros((2, 2))
        for _ in range(num_steps):
            mean = GAIN @ event + contraction @ (mean - GAIN @ event)
            covariance = contraction @ covariance @ contraction.T + 2.0 * step * np.eye(2)
        return mean, covariance

    direction = np.array([1.0, -0.5])
    values = np.asarray(latents) @ direction
    for steps, expected in ((num_steps, True), (num_steps + 1, False)):  # one step more is told apart
        mean, covariance = law(steps)
        cdf = stats.norm(direction @ mean, np.sqrt(direction @ covariance @ direction)).cdf
        assert cdf_test(values, cdf).passed is expected


def normal_divergence(first, second):
    """KL of two normal laws, each a mean and a covariance."""
    (m, a), (n, b) = first, second
    inverse = np.linalg.inv(b)
    return 0.5 * (
        np.trace(inverse @ a) - len(m) + (n - m) @ inverse @ (n - m) + np.linalg.slogdet(b)[1] - np.linalg.slogdet(a)[1]
    )


def test_the_joint_divergence_is_the_marginal_one_and_that_of_the_posteriors():
    """``KL(p_d q || p) = KL(p_d || p(x)) + E KL(q || p(z | x))``, less the entropy of the data on both sides."""
    gain = GAIN + np.array([[0.1, 0.0, -0.2], [0.0, 0.3, 0.1]])
    data = np.array([[1.2, 0.1, 0.3], [0.1, 0.9, 0.0], [0.3, 0.0, 0.7]])
    spread = np.diag(np.diag(VARIANCE))
    raw = np.random.default_rng(1).normal(size=(400, 5))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(raw.T @ raw / len(raw))).T
    x = white[:, :3] @ np.linalg.cholesky(data).T
    z = x @ gain.T + white[:, 3:] @ np.sqrt(spread)
    model = model_of(LOADINGS, gain)
    rows = jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32)
    joint = float(objectives.generator_loss(model, *rows) - objectives.inference_loss(model, *rows))

    marginal = LOADINGS @ LOADINGS.T + SCALE**2 * np.eye(3)
    cross_entropy = 0.5 * (np.linalg.slogdet(2.0 * np.pi * marginal)[1] + np.trace(np.linalg.solve(marginal, data)))
    of_means = 0.5 * np.trace(np.linalg.inv(VARIANCE) @ (gain - GAIN) @ data @ (gain - GAIN).T)
    posteriors = normal_divergence((np.zeros(2), spread), (np.zeros(2), VARIANCE)) + of_means
    assert joint == pytest.approx(cross_entropy + posteriors, abs=1e-3)
    assert posteriors > 0.1  # a bound that left it out would be seen


def test_revision_never_moves_away_and_inference_starts_nearer_than_noise():
    """The law of the chains is the one that the library's own are tested against above."""
    event, step = np.array([0.7, -0.3, 1.1]), 0.01
    contraction = np.eye(2) - step * np.linalg.inv(VARIANCE)
    stationary = np.linalg.inv(np.linalg.inv(VARIANCE) @ (np.eye(2) - 0.5 * step * np.linalg.inv(VARIANCE)))

    def divergences(mean, covariance):
        values = []
        for _ in range(30):
            values.append(normal_divergence((mean, covariance), (GAIN @ event, stationary)))
            mean = GAIN @ event + contraction @ (mean - GAIN @ event)
            covariance = contraction @ covariance @ contraction.T + 2.0 * step * np.eye(2)
        return np.array(values)

    inferred = divergences(0.8 * GAIN @ event, np.diag(np.diag(VARIANCE)))
    noise = divergences(np.zeros(2), np.eye(2))
    assert (np.diff(inferred) <= 1e-12).all()
    assert (np.diff(noise) <= 1e-12).all()
    assert (inferred[:11] < noise[:11]).all()


class Scaled(eqx.Module):
    """E(x) = a |x|^2 / 2."""

    curvature: jax.Array

    def __call__(self, x):
        return 0.5 * self.curvature * jnp.sum(x**2)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_an_energy_without_revision_has_nothing_to_learn_from_a_generator_of_the_data(key, num_steps):
    def generate(latent):
        return jnp.stack([jnp.tanh(latent[0]), latent[1] ** 2])

    kernel = ebm.kernels.generator(generate, latent_shape=2, num_steps=num_steps, step_size=0.1)
    sampler = ebm.init_sampler(jnp.zeros((64, 2)), kernel)

    def loss(potential, rows):
        return objectives.generalized_contrastive_divergence(potential, sampler, rows, key)

    energy = Scaled(jnp.ones(()))
    _, (moved, _) = loss(energy, jnp.zeros((64, 2)))
    gradient = eqx.filter_grad(lambda potential: loss(potential, moved.auxiliary["initial"])[0])(energy).curvature
    if num_steps:
        assert abs(float(gradient)) > 0.01  # the steps are what it learns from
    else:
        assert float(gradient) == 0.0


class Pair(eqx.Module):
    """x = z + noise, and its inference."""

    scale: jax.Array

    def __call__(self, latent):
        return self.scale * latent

    def log_joint(self, event, latent):
        return -0.5 * jnp.sum((event - self.scale * latent) ** 2) - 0.5 * jnp.sum(latent**2)

    def log_posterior(self, latent, event):
        return -0.5 * jnp.sum((latent - self.scale * event) ** 2)

    def sample_posterior(self, key, event):
        return event + jax.random.normal(key, event.shape)


TEACH = {"latent_kernel": ebm.kernels.langevin(0.1), "num_latent_steps": 2}


def test_chains_that_have_not_moved_teach_nothing(key):
    """Their latents are zeros: a generator that learnt from them would map zero to wherever chains are."""
    sampler = ebm.init_sampler(jnp.ones((8, 2)), ebm.kernels.generator(Pair(jnp.ones(())), latent_shape=2, num_steps=0))
    loss, _ = objectives.dual_teaching(None, sampler, jnp.ones((8, 2)), key, **TEACH)
    assert bool(jnp.isnan(loss))
    moved, _ = ebm.advance(key, lambda x: jnp.sum(x**2), sampler, 1)
    loss, _ = objectives.dual_teaching(None, moved, jnp.ones((8, 2)), key, **TEACH)
    assert bool(jnp.isfinite(loss))
    with pytest.raises(ValueError, match="batch: got None"):
        objectives.dual_teaching(None, moved, None, key, **TEACH)


def test_a_limit_needs_a_gap_to_hold(key):
    limited = objectives.limit_gap(lambda potential, sampler, batch, key: (jnp.zeros(()), (sampler, {})), 1.0)
    with pytest.raises(ValueError, match="energy_gap"):
        limited(None, None, None, key)


def test_the_second_player_has_noise_of_its_own(key):
    """``fold_in(key, i)`` is ``split(key, n)[i]``: a player with a key of that kind would have the chains' own noise."""
    seen = {}

    def note(name):
        def objective(potential, sampler, batch, key):
            jax.debug.callback(
                lambda data: seen.setdefault(name, []).append(np.asarray(data)), jax.random.key_data(key)
            )
            return 0.0 * potential.curvature + 0.0 * sampler.kernel.keywords["step_size"], (sampler, {})

        return objective

    optimizer = optax.sgd(0.1)
    sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(0.1))
    state = ebm.init_train(Scaled(jnp.ones(())), optimizer, sampler, sampler_optimizer=optimizer)
    ebm.fit(
        key, state, jnp.ones((8, 2)), note("energy"), optimizer, sampler_objective=note("sampler"),
        sampler_optimizer=optimizer, num_steps=2, batch_size=4, progress_bar=False,
    )  # fmt: skip
    jax.effects_barrier()
    for energy_key, sampler_key in zip(seen["energy"], seen["sampler"], strict=True):
        children = jax.random.split(jax.random.wrap_key_data(energy_key), 64)
        assert not (jax.random.key_data(children) == sampler_key).all(axis=1).any()


class Sure(Pair):
    """The pair whose inference draws are its means."""

    def sample_posterior(self, key, event):
        return self.scale * event


def test_every_player_learns_from_its_own_pairs(key):
    """Each term by hand, all of them with weights that tell them apart, and its gradient in the networks alone."""
    pair = Sure(jnp.asarray(0.7))
    kernel = ebm.kernels.generator(pair, latent_shape=2, num_steps=2, step_size=0.1)
    sampler, _ = ebm.advance(key, Scaled(jnp.ones(())), ebm.init_sampler(jnp.zeros((8, 2)), kernel), 1)
    rows = 1.0 + jnp.arange(16.0).reshape(8, 2) / 16.0
    latents, revised = sampler.auxiliary["latent"], sampler.position
    assert float(jnp.abs(revised - sampler.auxiliary["initial"]).min()) > 0.0

    def by_hand(pair):
        start = 0.7 * rows  # a constant, though it was drawn from the network
        bound = objectives.variational_loss(key, Frozen(Sure(jnp.asarray(0.7)), pair), rows)
        return (
            2.0 * objectives.generator_loss(pair, rows, start) + 3.0 * objectives.generator_loss(pair, revised, latents)
            + 5.0 * bound + 7.0 * objectives.inference_loss(pair, revised, latents)
        )  # fmt: skip

    def taught(pair):
        now = sampler._replace(kernel=jax.tree_util.Partial(kernel.func, **{**kernel.keywords, "generator": pair}))
        options = {"generator_weights": (2.0, 3.0), "inference_weights": (5.0, 7.0)}
        return objectives.dual_teaching(None, now, rows, key, **{**TEACH, "num_latent_steps": 0}, **options)[0]

    for found, expected in zip(
        eqx.filter_value_and_grad(taught)(pair), eqx.filter_value_and_grad(by_hand)(pair), strict=True
    ):
        np.testing.assert_allclose(*(jax.tree.leaves(one)[0] for one in (found, expected)), rtol=1e-5)


class Frozen(eqx.Module):
    """The joint density of one pair with the inference of another."""

    joint: Sure
    inference: Sure

    def log_joint(self, event, latent):
        return self.joint.log_joint(event, latent)

    def log_posterior(self, latent, event):
        return self.inference.log_posterior(latent, event)

    def sample_posterior(self, key, event):
        return self.inference.sample_posterior(key, event)
