"""Every objective, from the same start on the same rows: a Gaussian energy ends with the covariance it promises."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials

COVARIANCE = np.array([[1.0, 0.45], [0.45, 0.6]])
BASE = dist.Normal(0.0, 1.5).expand([2]).to_event(1)
NOISE = 0.3
NUM_CHAINS = 256


class Quadratic(eqx.Module):
    """``x^T A x / 2``."""

    precision: jax.Array

    def __call__(self, x):
        return 0.5 * x @ self.precision @ x


class Levels(eqx.Module):
    """One quadratic and one constant for each of several bridges or levels of noise."""

    precision: jax.Array
    constant: jax.Array

    def __call__(self, level, x):
        return 0.5 * x @ self.precision[level] @ x + self.constant[level]


class AtScale(eqx.Module):
    """The energy of a Gaussian with the noise of a level added."""

    covariance: jax.Array

    def __call__(self, x, scale):
        return 0.5 * x @ jnp.linalg.solve(self.covariance + scale**2 * jnp.eye(2), x)


class Case(NamedTuple):
    """What is trained, how, the covariance it then has, and the one it should have."""

    potential: Any
    objective: Any
    kernel: Any = None
    covariance: Callable[[Any], Any] = lambda potential: jnp.linalg.inv(potential.precision)
    expected: np.ndarray = COVARIANCE


START = Quadratic(0.5 * jnp.eye(2))
MALA = kernels.mala(step_size=0.4)


def sampled(objective, kernel=MALA, **options):
    return Case(START, functools.partial(objective, **options), kernel)


def plain(
    objective, potential: Any = START, covariance=Case._field_defaults["covariance"], expected=COVARIANCE, **options
):
    loss = objectives.stateless(functools.partial(objective, **options))
    return Case(potential, loss, covariance=covariance, expected=expected)


def of_free(potential):
    return jnp.linalg.inv(potential.potential.precision)


def of_bridges(potential):
    return jnp.linalg.inv(potential.potential.function.precision.sum(axis=0) + jnp.eye(2) / 1.5**2)


def of_recovery(potential):
    return jnp.linalg.inv(potential.retentions[0] ** 2 * potential.function.precision[0])


NOISED = COVARIANCE + NOISE**2 * np.eye(2)
FREE = potentials.with_log_normalizer(START, 2.0)
SCALES = tuple(np.sqrt(np.linspace(0.1, 0.7, 4)))
CASES = {
    "contrastive_divergence": lambda: sampled(objectives.contrastive_divergence, num_steps=10),
    "persistent_contrastive_divergence": lambda: sampled(objectives.persistent_contrastive_divergence, num_steps=10),
    "full_contrastive_divergence": lambda: sampled(
        objectives.full_contrastive_divergence, kernels.unadjusted_langevin(step_size=0.02), num_steps=10
    ),
    "coupled_contrastive_divergence": lambda: sampled(
        objectives.coupled_contrastive_divergence, num_steps=10, num_averaged=10, max_steps=40
    ),
    "jarzynski_contrastive_divergence": lambda: sampled(objectives.jarzynski_contrastive_divergence, num_steps=10),
    "generalized_contrastive_divergence": lambda: sampled(
        objectives.generalized_contrastive_divergence, num_steps=10, energy_weight=1e-4
    ),
    "importance_sampled_likelihood": lambda: plain_sampled(
        objectives.importance_sampled_likelihood, proposal=BASE, num_samples=1024
    ),
    "learned_normalizer_likelihood": lambda: plain(
        objectives.learned_normalizer_likelihood, FREE, of_free, proposal=BASE, num_samples=1024
    ),
    "noise_contrastive_estimation": lambda: plain(
        objectives.noise_contrastive_estimation, FREE, of_free, noise=BASE, noise_ratio=8
    ),
    "telescoping_ratio": lambda: plain(
        objectives.telescoping_ratio,
        potentials.tilt(objectives.Bridges(Levels(jnp.zeros((3, 2, 2)), jnp.zeros(3)), 3), BASE),
        of_bridges,
    ),
    "diffusion_recovery_likelihood": lambda: Case(
        objectives.RecoveryPotential(Levels(jnp.stack(4 * [0.5 * jnp.eye(2)]), jnp.zeros(4)), SCALES),
        functools.partial(objectives.diffusion_recovery_likelihood, num_steps=10),
        MALA,
        of_recovery,
    ),
    "energy_discrepancy": lambda: plain(objectives.energy_discrepancy, noise_scale=0.7),
    "score_matching": lambda: plain(objectives.score_matching),
    "sliced_score_matching": lambda: plain(objectives.sliced_score_matching, variance_reduced=True),
    "generalized_score_matching": lambda: plain(objectives.generalized_score_matching, lower=-6.0),
    "denoising_score_matching": lambda: plain(
        objectives.denoising_score_matching, expected=NOISED, noise_scale=NOISE, num_noises=8
    ),
    "multiscale_denoising_score_matching": lambda: plain(
        objectives.multiscale_denoising_score_matching, expected=NOISED, noise_scales=jnp.array([NOISE]), target_scale=NOISE
    ),
    "conditional_denoising_score_matching": lambda: plain(
        objectives.conditional_denoising_score_matching,
        AtScale(2.0 * jnp.eye(2)),
        lambda potential: potential.covariance,
        noise_scales=jnp.array([0.3, 0.6]),
    ),
    "minimum_stein_discrepancy": lambda: plain(objectives.minimum_stein_discrepancy),
}  # fmt: skip
DISCRETE = {"pseudo_likelihood", "ratio_matching", "discrete_energy_discrepancy"}
# A potential whose gradient transports noise to data is no energy of the data's density; their own tests say what it is.
TRANSPORT = {"energy_matching", "equilibrium_matching", "potential_flow_matching"}
# Of unit vectors: tests/test_dual_training.py.
ON_THE_SPHERE = {"spherical_score_matching"}
# Of conditional energies, which have a test of their own.
CONDITIONAL = {"ranking_noise_contrastive_estimation"}
# What samplers learn by, beside an energy: tests/test_teaching.py, test_adaptive_flow.py and test_policy_improvement.py.
OF_SAMPLERS = {
    "chain_likelihood", "dual_teaching", "generator_loss", "inference_loss", "variational_loss", "policy_improvement",
    "temporal_difference_loss", "pathwise_policy_loss", "reinforce_policy_loss", "velocity_loss",
}  # fmt: skip
NOT_OBJECTIVES = {
    "Bridges", "PiecewiseTime", "RecoveryPotential", "energy_l2", "follow_flow", "gradient_penalty", "jarzynski_chains",
    "limit_gap", "progressive_recovery", "revise_latents", "running_costs", "stateless",
}  # fmt: skip
FAST = {"persistent_contrastive_divergence", "score_matching", "energy_discrepancy"}


def plain_sampled(objective, **options):
    return Case(START, functools.partial(objective, **options), None)


def test_no_objective_is_left_out():
    public = {name for name, value in vars(objectives).items() if callable(value) and not name.startswith("_")}
    assert public - DISCRETE - TRANSPORT - ON_THE_SPHERE - CONDITIONAL - OF_SAMPLERS - NOT_OBJECTIVES == set(CASES)


def rows(key, num_rows=4000):
    """Draws whose sample covariance about zero is exactly the one given."""
    noise = np.asarray(jax.random.normal(key, (num_rows, 2)), float)
    white = noise @ np.linalg.inv(np.linalg.cholesky(noise.T @ noise / num_rows)).T
    return jnp.asarray(white @ np.linalg.cholesky(COVARIANCE).T, jnp.float32)


def divergence(found, expected):
    """Kullback-Leibler divergence in nats between two centred Gaussians, from the expected one to the found."""
    ratio = np.linalg.solve(np.asarray(found, float), expected)
    return 0.5 * (np.trace(ratio) - 2.0 - np.linalg.slogdet(ratio)[1])


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_reaches_the_covariance(key, name):
    data_key, chain_key, fit_key = jax.random.split(key, 3)
    case = CASES[name]()
    sampler = None
    if name == "jarzynski_contrastive_divergence":
        sampler = objectives.jarzynski_chains(chain_key, BASE, MALA, 4 * NUM_CHAINS)
    elif case.kernel is not None:
        sampler = ebm.init_sampler(BASE.sample(chain_key, (NUM_CHAINS,)), case.kernel)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    state = ebm.init_train(case.potential, optimizer, sampler)
    start = divergence(case.covariance(case.potential), case.expected)
    state, _ = ebm.fit(
        fit_key, state, rows(data_key), case.objective, optimizer, num_steps=400, batch_size=500, progress_bar=False
    )
    end = divergence(case.covariance(state.potential), case.expected)
    print(f"{name}: {start:.3f} -> {end:.5f} nats")
    assert start > 0.1
    assert end < 0.003


def test_the_distance_sees_a_covariance_that_is_off_by_a_quarter():
    assert divergence(COVARIANCE, COVARIANCE) == pytest.approx(0.0, abs=1e-12)
    assert divergence(COVARIANCE * [[1.25, 1.0], [1.0, 1.0]], COVARIANCE) > 0.003
    assert divergence(NOISED, COVARIANCE) > 0.01
    assert divergence(np.diag(np.diag(COVARIANCE)), COVARIANCE) > 0.1
