"""Independent runs of tempered SMC, and annealing back, within a share of a budget."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.base import SamplingAlgorithm

from ebm_ppl.adaptation import set_tunables, tunables, tune_step_size
from ebm_ppl.chains import chain_potential
from ebm_ppl.checks import check_markov_kernel
from ebm_ppl.densities import LogDensity
from ebm_ppl.diagnostics.traces import ENERGY_COST, generator
from ebm_ppl.diagnostics.widened import widened
from ebm_ppl.kernels import composed
from ebm_ppl.kernels.mcmc import from_blackjax, sampler_behind
from ebm_ppl.kernels.one_step import mala
from ebm_ppl.kernels.smc import SMCResult, run_tempered_smc
from ebm_ppl.meshes import on_host
from ebm_ppl.normalizer.result import LogNormalizer
from ebm_ppl.normalizer.tempered_smc import tempered_particles
from ebm_ppl.normalizer.unconstrained import coding_of, row_densities, unconstrain
from ebm_ppl.rows import RowPotential
from ebm_ppl.sampling import chains_at
from ebm_ppl.subjects import Subject
from ebm_ppl.types import Array, Event, Kernel, Key, SamplerState

RUNS_AT_ONCE, MAX_RUNS = 8, 64
STEPS_PER_TEMPERATURE = 5
EXPECTED_TEMPERATURES = 40
MIN_PARTICLES, MAX_PARTICLES = 32, 1000
SHARE_OF_SMC = 0.8
MAX_STARTS = 4
"""How often the base is stretched, less one."""
NUM_TRIED = 1000
"""Draws of the start that say how wide it is."""
NUM_REVERSED, STEPS_BACK = 128, 5
"""Negatives from which annealing goes back, and kernel steps at every temperature."""


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
        num_starts: From how many bases SMC has started, each wider than the one before; the runs are those from the last.
    """

    smc: SMCResult | None
    forward: LogNormalizer | None
    reverse: LogNormalizer | None
    reason: str
    num_gradients: int
    num_energies: int
    anneal_back: Callable[[Key, Array], LogNormalizer] | None = None
    num_starts: int = 1


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
        tuned = tune_step_size(tune_key, target, chains, 0.6, num_iterations=40)
    step_size = tunables(tuned)["step_size"]
    return from_blackjax(_mala_of_many_sizes, one_size=step_size, other_size=step_size)


def _mala_of_many_sizes(logdensity_fn: LogDensity, one_size: Array, other_size: Array) -> SamplingAlgorithm:
    """MALA of one size in half of its steps, and of sizes between that and another, on a logarithmic scale, in the others.

    The law of the size does not depend on where a chain is, so the target stays invariant. On the way from a wide start to
    a narrow model no single size moves particles: some of these do at every temperature.
    """

    def init(position: Event, rng_key: Key | None = None) -> Any:
        return composed.mala(logdensity_fn, one_size).init(position, rng_key)

    def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
        size_key, step_key = jax.random.split(rng_key)
        share = jnp.maximum(2.0 * jax.random.uniform(size_key, (), one_size.dtype) - 1.0, 0.0)
        size = jnp.exp((1.0 - share) * jnp.log(one_size) + share * jnp.log(other_size))
        return composed.mala(logdensity_fn, size).step(step_key, state)

    return SamplingAlgorithm(init, step)


def _reaching(kernel: Kernel, points: Array) -> Kernel:
    """The kernel of :func:`moving_kernel` with steps from those that suit the model up to those that suit the start."""
    if sampler_behind(kernel) is not _mala_of_many_sizes:
        return kernel
    flat = points.reshape(len(points), -1)
    # A step of MALA is a variance, and shrinks with the cube root of the dimension.
    size = flat.var(axis=0).min() / flat.shape[1] ** (1.0 / 3.0)
    return set_tunables(chains_at(points, kernel), other_size=size).kernel


def run_tempered(
    key: Key,
    subject: Subject,
    kernel: Kernel,
    negatives: Array,
    allowance: float,
    num_particles: int | None,
    *,
    may_widen: bool = False,
) -> Tempered:
    """SMC from the base, eight runs at a time, with four fifths of the allowance; annealing back with the rest.

    Args:
        key: Random key.
        subject: The law; its reference must be known.
        kernel: Moves particles.
        negatives: Draws of the chains, ``(draw, *event)``, finite.
        allowance: Gradient evaluations.
        num_particles: Per run; as many as the allowance gives for forty temperatures when ``None``.
        may_widen: Whether to start anew from a base that is stretched over what was found, where particles ended beyond its
            reach or collapsed: what the model has further out is unknown then. On the whole space only.
    """
    smc_key, reverse_key, draw_key = jax.random.split(key, 3)
    share = SHARE_OF_SMC * allowance
    per_particle = RUNS_AT_ONCE * (STEPS_PER_TEMPERATURE + 1)
    if num_particles is None:
        num_particles = int(np.clip(share / per_particle / EXPECTED_TEMPERATURES, MIN_PARTICLES, MAX_PARTICLES))
    may_widen = may_widen and _is_everywhere(subject)
    reference, start = subject.reference, _draws(draw_key, subject, subject.reference)
    moving = _reaching(kernel, start)
    batches, gradients, energies, spent, num_starts = [], 0, 0, 0.0, 1
    # A start that turns out too narrow must leave something for the next.
    longest = max(int(share / per_particle / num_particles), 2)
    for index in range(MAX_RUNS):
        batch = tempered_particles(
            jax.random.fold_in(smc_key, index),
            subject.ebm,
            num_runs=RUNS_AT_ONCE,
            reference=reference,
            num_particles=num_particles,
            kernel=moving,
            num_steps=STEPS_PER_TEMPERATURE,
            max_temperatures=max(longest // 2, 2) if may_widen and num_starts == 1 else longest,
        )
        batch = on_host(batch)
        batches.append(batch)
        gradients += int(batch.info.num_gradients.sum())
        energies += int(batch.info.num_energies.sum())
        cost = gradients + ENERGY_COST * energies - spent
        spent += cost
        if not bool(batch.is_finite.all()):
            break
        is_short = _falls_short(jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches))
        if may_widen and is_short and num_starts < MAX_STARTS and spent < share:
            found = np.asarray(batch.position).reshape(-1, *batch.position.shape[2:])
            reference, num_starts, batches = widened(subject.reference, start, found), num_starts + 1, []
            moving = _reaching(kernel, _draws(draw_key, subject, reference))
        elif spent + cost > share or len(batches) * RUNS_AT_ONCE >= MAX_RUNS:
            break
    smc = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)

    def anneal_back(key: Key, events: Array) -> LogNormalizer:
        choose_key, run_key = jax.random.split(key)
        chosen = events[generator(choose_key).integers(len(events), size=NUM_REVERSED)]
        # Half of what is left, because annealing back may be asked for once more, from modes that SMC has hardly any of.
        left = max(allowance - spent, (1.0 - SHARE_OF_SMC) * allowance)
        longest = int(np.clip(0.5 * left / NUM_REVERSED / (STEPS_BACK + 1), 10, 300))
        return _log_z_backwards(run_key, subject.ebm, reference, moving, chosen, longest)

    reverse = anneal_back(reverse_key, negatives) if bool(jnp.isfinite(negatives).all()) else None
    return Tempered(smc, pooled(smc), reverse, "", gradients, energies, anneal_back, num_starts)


def _draws(key: Key, subject: Subject, reference: Any) -> Array:
    """Draws of a start, in unconstrained space."""
    draw_key, invert_key = jax.random.split(key)
    return unconstrain(invert_key, subject.ebm, reference.sample(draw_key, (NUM_TRIED,)))


def _is_everywhere(subject: Subject) -> bool:
    """Whether events are any finite numbers."""
    if subject.ebm.support.is_discrete:
        return False
    far = 1e4 * np.random.default_rng(0).normal(size=(8, *subject.ebm.event_shape))
    return all(bool(jnp.all(support(jnp.asarray(far)))) for support in (subject.ebm.support, subject.reference.support))


def _falls_short(smc: SMCResult) -> bool:
    """Whether particles left the reach of their start, or did not survive the way."""
    together = pooled_flags(smc)
    return bool(together.is_uncovered | together.is_collapsed)


def _log_z_backwards(
    key: Key, ebm: Any, reference: Any, kernel: Kernel, events: Array, max_temperatures: int
) -> LogNormalizer:
    """``-log`` of the ratio that SMC finds on its way from given events back to the start.

    Temperatures are where the weights ask for them: an energy that is steep needs most of them next to the start.
    """
    invert_key, run_key = jax.random.split(key)
    return _compiled_backwards(run_key, ebm, reference, kernel, unconstrain(invert_key, ebm, events), max_temperatures)


@eqx.filter_jit
def _compiled_backwards(
    key: Key, ebm: Any, reference: Any, kernel: Kernel, position: Array, max_temperatures: int
) -> LogNormalizer:
    start, end = row_densities(ebm, reference, jnp.zeros((), int))
    back = run_tempered_smc(
        key,
        position,
        end,
        start,
        kernel=kernel,
        num_steps=STEPS_BACK,
        max_temperatures=max_temperatures,
        coding=coding_of(ebm),
    )
    return LogNormalizer(
        value=jnp.where(back.is_finite, -back.log_normalizer, jnp.nan),
        standard_error=jnp.sqrt(back.relative_variance),
        ess=back.ess_minimum * len(position),
        pareto_khat=jnp.asarray(jnp.nan),
        num_gradients=back.info.num_gradients.sum(),
        reliable=back.is_finite & ~back.is_collapsed,
    )


def pooled_flags(smc: SMCResult) -> SMCResult:
    """All runs as one, for its flags: those of single runs are noisy, and there are many, so that averages decide."""
    flags = ("ess_minimum", "parent_minimum", "ancestor_fraction", "outside_fraction", "acceptance_minimum")
    one = smc._replace(**{name: jnp.mean(jnp.asarray(getattr(smc, name))) for name in flags})
    return one._replace(log_weight=jnp.ravel(smc.log_weight))


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
