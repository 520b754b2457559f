"""Independent runs of tempered SMC, and annealing back, within a share of a budget."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.adaptation import tune_step_size
from ebm_ppl.chains import chain_potential
from ebm_ppl.checks import check_markov_kernel
from ebm_ppl.diagnostics.traces import ENERGY_COST, generator
from ebm_ppl.kernels.one_step import mala
from ebm_ppl.kernels.smc import SMCResult
from ebm_ppl.normalizer.result import LogNormalizer
from ebm_ppl.normalizer.reverse_importance import reverse_annealed_importance
from ebm_ppl.normalizer.tempered_smc import tempered_particles
from ebm_ppl.normalizer.unconstrained import unconstrain
from ebm_ppl.rows import RowPotential
from ebm_ppl.sampling import chains_at
from ebm_ppl.subjects import Subject
from ebm_ppl.types import Array, Kernel, Key, SamplerState

RUNS_AT_ONCE, MAX_RUNS = 8, 64
STEPS_PER_TEMPERATURE = 5
EXPECTED_TEMPERATURES = 40
MIN_PARTICLES, MAX_PARTICLES = 32, 1000
NUM_REVERSED = 128
"""Negatives from which annealing goes back."""


class Tempered(NamedTuple):
    """What the parts of a diagnosis that start at the base found.

    Attributes:
        smc: All runs; ``None`` where there could be none.
        forward: log Z of all runs together.
        reverse: log Z from the negatives, or ``None``.
        reason: Why something is missing.
        num_gradients: Spent on SMC.
        num_energies: Spent on SMC.
        anneal_back: log Z by annealing from given events ``(row, *event)`` back to the base: an estimate from above of the
            logarithm of the mass around them; ``None`` where there is no SMC.
    """

    smc: SMCResult | None
    forward: LogNormalizer | None
    reverse: LogNormalizer | None
    reason: str
    num_gradients: int
    num_energies: int
    anneal_back: Callable[[Key, Array], LogNormalizer] | None = None


def moving_kernel(key: Key, subject: Subject, sampler: SamplerState, events: Array) -> Kernel:
    """What moves particles: MALA tuned at given events, or the sampler's own kernel where events are discrete.

    Raises:
        TypeError: events are discrete and the sampler's kernel carries more than positions.
    """
    if subject.ebm.support.is_discrete:
        return check_markov_kernel("kernel", sampler.kernel)
    point_key, tune_key = jax.random.split(key)
    points = unconstrain(point_key, subject.ebm, events)
    chains = chains_at(points, mala(step_size=0.1))
    target = chain_potential(RowPotential(subject.ebm, 0))
    with warnings.catch_warnings():
        # Whether particles move is judged by what they do.
        warnings.filterwarnings("ignore", "tune_step_size", RuntimeWarning)
        return tune_step_size(tune_key, target, chains, 0.6, num_iterations=40).kernel


def run_tempered(
    key: Key, subject: Subject, kernel: Kernel, negatives: Array, allowance: float, num_particles: int | None
) -> Tempered:
    """SMC from the base, eight runs at a time, with four fifths of the allowance; annealing back with the rest.

    Args:
        key: Random key.
        subject: The law; its reference must be known.
        kernel: Moves particles.
        negatives: Draws of the chains, ``(draw, *event)``, finite.
        allowance: Gradient evaluations.
        num_particles: Per run; as many as the allowance gives for forty temperatures when ``None``.
    """
    smc_key, reverse_key = jax.random.split(key)
    share = 0.8 * allowance
    per_particle = RUNS_AT_ONCE * (STEPS_PER_TEMPERATURE + 1)
    if num_particles is None:
        num_particles = int(np.clip(share / per_particle / EXPECTED_TEMPERATURES, MIN_PARTICLES, MAX_PARTICLES))
    batches, gradients, energies, spent = [], 0, 0, 0.0
    while True:
        batch = tempered_particles(
            jax.random.fold_in(smc_key, len(batches)),
            subject.ebm,
            num_runs=RUNS_AT_ONCE,
            reference=subject.reference,
            num_particles=num_particles,
            kernel=kernel,
            num_steps=STEPS_PER_TEMPERATURE,
            max_temperatures=max(int(share / per_particle / num_particles), 2),
        )
        batches.append(batch)
        gradients += int(batch.info.num_gradients.sum())
        energies += int(batch.info.num_energies.sum())
        cost = gradients + ENERGY_COST * energies - spent
        spent += cost
        if spent + cost > share or len(batches) * RUNS_AT_ONCE >= MAX_RUNS or not bool(batch.is_finite.all()):
            break
    smc = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
    # Half of what is left, because annealing back may be asked for once more, from modes that SMC has hardly any of.
    num_temperatures = int(np.clip(0.1 * allowance / (2 * NUM_REVERSED), 10, 300))

    def anneal_back(key: Key, events: Array) -> LogNormalizer:
        choose_key, run_key = jax.random.split(key)
        return reverse_annealed_importance(
            run_key,
            subject.ebm,
            events[generator(choose_key).integers(len(events), size=NUM_REVERSED)],
            reference=subject.reference,
            kernel=kernel,
            num_temperatures=num_temperatures,
        )

    reverse = anneal_back(reverse_key, negatives) if bool(jnp.isfinite(negatives).all()) else None
    return Tempered(smc, pooled(smc), reverse, "", gradients, energies, anneal_back)


def pooled(smc: SMCResult) -> LogNormalizer:
    """Log Z of independent runs together, ``log mean_r Z_r``, with the error that their spread gives it.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl as ebm
        >>> model, kernel = ebm.EBM(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0)), ebm.kernels.mala(step_size=0.3)
        >>> runs = ebm.normalizer.tempered_particles(jax.random.key(0), model, kernel=kernel, num_particles=200)
        >>> found = pooled(runs)
        >>> bool(abs(found.value + 0.5 * jnp.log(2.0)) < 4 * found.standard_error)
        True
    """
    log_z = np.asarray(smc.log_normalizer, np.float64)
    top = log_z.max()
    share = np.exp(log_z - top)
    error = share.std(ddof=1) / np.sqrt(share.size) / share.mean() if share.size > 1 else np.nan
    return LogNormalizer(
        value=jnp.asarray(top + np.log(share.mean())),
        standard_error=jnp.asarray(error),
        ess=jnp.asarray(share.sum() ** 2 / (share**2).sum()),
        pareto_khat=jnp.asarray(np.nan),
        num_gradients=smc.info.num_gradients.sum(),
        reliable=jnp.asarray(bool(np.isfinite(error) and np.asarray(smc.is_finite).all() and error < 0.14)),
    )
