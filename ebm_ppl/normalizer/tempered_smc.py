"""log Z by tempered sequential Monte Carlo from a distribution that can be sampled exactly."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_floats, check_count, check_markov_kernel, is_traced
from ebm_ppl.errors import SMCFailure
from ebm_ppl.kernels.smc import SMCResult, run_tempered_smc
from ebm_ppl.kernels.tempered import check_target_ess
from ebm_ppl.meshes import on_host
from ebm_ppl.normalizer.events import check_site
from ebm_ppl.normalizer.importance import check_reference
from ebm_ppl.normalizer.result import LogNormalizer, rounding
from ebm_ppl.normalizer.unconstrained import (
    coding_of,
    constrain,
    holds_tracers,
    mean_slope,
    point_shape,
    row_densities,
    unconstrain,
)
from ebm_ppl.types import Array, Kernel, Key

TOO_NOISY = 0.02
"""Relative variance of Z that fewer than 50 independent weights have: from so few it is not to be believed itself."""


MAX_GAP = 3.0
"""Standard errors by which an estimate and its reversal may differ; right ones do so in about one run of fifty."""


class _Counts(NamedTuple):
    num_particles: int
    num_steps: int
    max_temperatures: int


def tempered_smc(
    key: Key,
    ebm: Any,
    *,
    reference: Any = None,
    num_particles: int = 1000,
    kernel: Kernel,
    num_steps: int = 5,
    target_ess: float | Array = 0.9,
    temperatures: Any = None,
    max_temperatures: int = 1000,
) -> LogNormalizer:
    """``log Z`` by tempered sequential Monte Carlo from the base, one independent estimate per row.

    Particles go from the reference to the EBM along ``reference^(1 - b) (base exp(-U))^b``, weighted, resampled and moved
    at each ``b``: where :func:`annealed_importance` loses its weights to a few particles, resampling keeps the others.
    With fixed ``temperatures`` the estimate of ``Z`` is unbiased; with adaptive ones it is consistent only.

    The gradient of ``value`` is the weighted mean of the gradient of ``log base - U`` over the particles at the end, which
    tends to that of ``log Z``; it is not the derivative of the estimate, and no gradient flows through the chains.

    Args:
        key: Random key.
        ebm: The EBM. Particles move in unconstrained space, or on the events themselves where the support is discrete.
        reference: Normalised distribution on the support of the EBM that can be sampled, wider than the EBM, where the path
            starts; the base when ``None``.
        num_particles: Particles per row.
        kernel: From :mod:`ebm_ppl.kernels`, with an accept step; its step size holds at every temperature.
        num_steps: Kernel steps at each of them.
        target_ess: Effective sample size that an adaptive step keeps, as a fraction in (0, 1).
        temperatures: Increasing inverse temperatures in (0, 1] that end with 1; adaptive when ``None``.
        max_temperatures: Where an adaptive path that has not arrived jumps to the EBM.

    Returns:
        The estimate. ``standard_error`` comes from the genealogy of the particles, and ``ess`` is the number of independent
        weights whose mean had that error. ``reliable`` where all weights were finite, at every step the effective sample
        size was at least a tenth of the particles and the acceptance rate at least 5 %, a tenth of the first particles have
        descendants at the end, the particles have not left the region where the reference draws, the same steps weighted
        backwards agree within three standard errors, and the standard error is below 0.14, that of 50 independent weights.
        Without an accept step nothing is reliable. Mass that no particle reached leaves no trace: a mode away from all of
        them, or the narrow and the wide part of a law whose scale varies over orders of magnitude.

    Raises:
        TypeError: a count is not a whole number, or the kernel carries more than positions.
        ValueError: a number is out of range, or the reference cannot be sampled, has another event shape, or does not cover
            the support.
        NotImplementedError: the transform to the support is not one to one.
        SMCFailure: weights were NaN or infinite, or all of them zero (inside a trace ``value`` is NaN instead).

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 2.0 * x, dist.Exponential(1.0))  # Z = 1/3
        >>> result = tempered_smc(jax.random.key(0), ebm, kernel=ebm_ppl.kernels.mala(step_size=0.3))
        >>> bool(abs(result.value - jax.numpy.log(1 / 3)) < 4 * result.standard_error), bool(result.reliable)
        (True, True)

    References:
        Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers, arXiv:cond-mat/0212648; Chan, Lai (2013),
        arXiv:1312.5114 (the error).
    """
    reference = check_reference(ebm, reference, num_particles)
    options = _checked(kernel, num_particles, num_steps, target_ess, temperatures, max_temperatures)
    is_inside = is_traced(key, reference, *options) or holds_tracers(ebm)
    run = _estimate if is_inside else _compiled_estimate
    value, record = run(key, ebm, reference, *options)
    if not is_traced(record):
        _raise_if_failed(record)
    return value


def tempered_particles(
    key: Key,
    ebm: Any,
    *,
    num_runs: int = 8,
    reference: Any = None,
    num_particles: int = 1000,
    kernel: Kernel,
    num_steps: int = 5,
    target_ess: float | Array = 0.9,
    temperatures: Any = None,
    max_temperatures: int = 1000,
) -> SMCResult:
    """The particles of independent runs of :func:`tempered_smc`, whose other arguments it takes; compiled as one.

    Each run is a population of its own, so that the spread of the runs is an error that no run can know of itself. Where
    runs have weights ``Z_r`` and means ``m_r``, the mean under the EBM is ``sum_r Z_r m_r / sum_r Z_r``.

    Args:
        key: Random key.
        ebm: The EBM, of one row (``batch_shape`` is ``()``).
        num_runs: Independent runs.
        reference: As for :func:`tempered_smc`, and so all that follow.
        num_particles: Particles per run.
        kernel: From :mod:`ebm_ppl.kernels`, with an accept step.
        num_steps: Kernel steps at every temperature.
        target_ess: For adaptive temperatures.
        temperatures: Increasing inverse temperatures that end with 1; adaptive when ``None``.
        max_temperatures: Where an adaptive path that has not arrived jumps to the EBM.

    Returns:
        The record of all runs, ``run`` being the leading axis of every array; ``position`` are events
        ``(run, particle, *event)``. A run whose weights are not finite says so in ``is_finite``; nothing is raised.

    Raises:
        TypeError: a count is not a whole number, or the kernel carries more than positions.
        ValueError: a number is out of range, the EBM has rows, or the reference cannot be sampled, has another event shape,
            or does not cover the support.
        NotImplementedError: the transform to the support is not one to one.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 2.0 * x, dist.Exponential(1.0))
        >>> kernel = ebm_ppl.kernels.mala(step_size=0.3)
        >>> runs = tempered_particles(jax.random.key(0), ebm, num_runs=4, kernel=kernel, num_particles=100)
        >>> runs.position.shape, runs.log_normalizer.shape, bool((runs.position > 0).all())
        ((4, 100), (4,), True)
    """
    check_site(ebm)
    if ebm.batch_shape:
        raise ValueError(f"ebm: got batch_shape {ebm.batch_shape}, expected (): one law, whose runs can be averaged.")
    reference = check_reference(ebm, reference, num_particles)
    options = _checked(kernel, num_particles, num_steps, target_ess, temperatures, max_temperatures)
    keys = jax.random.split(key, check_count("num_runs", num_runs))
    is_inside = is_traced(key, reference, *options) or holds_tracers(ebm)
    run = _run_many if is_inside else _compiled_run_many
    return run(keys, ebm, reference, *options)


def _run_many(keys: Key, ebm: Any, *options: Any) -> SMCResult:
    runs = jax.vmap(lambda key: _run_rows(key, ebm, *options))(keys)
    runs = jax.tree.map(lambda x: x[:, 0], runs)
    return runs._replace(position=constrain(ebm, runs.position)[0])


def _checked(
    kernel: Kernel, num_particles: int, num_steps: int, target_ess: Any, temperatures: Any, max_temperatures: int
) -> tuple[Kernel, Array, Array | None, _Counts]:
    """What a run takes beside its EBM and reference, or a refusal."""
    check_markov_kernel("kernel", kernel)
    counts = _Counts(
        check_count("num_particles", num_particles, 2),
        check_count("num_steps", num_steps),
        check_count("max_temperatures", max_temperatures),
    )
    ladder = None if temperatures is None else _check_temperatures(temperatures)
    return kernel, check_target_ess(target_ess), ladder, counts


def _check_temperatures(temperatures: Any) -> Array:
    ladder = as_floats("temperatures", temperatures)
    if ladder.ndim != 1 or ladder.size == 0:
        raise ValueError(f"temperatures: got shape {ladder.shape}, expected (temperature,) with at least one.")
    if not is_traced(ladder):
        steps = jnp.diff(ladder, prepend=0.0)
        if not bool(jnp.all(steps > 0)) or float(ladder[-1]) != 1.0:
            raise ValueError(f"temperatures: got {ladder.tolist()}, expected numbers that rise from above 0 to 1.")
    return ladder


def _run_rows(
    key: Key, ebm: Any, reference: Any, kernel: Kernel, target_ess: Array, ladder: Array | None, counts: _Counts
) -> SMCResult:
    """One population per row, in unconstrained space, with a leading row axis on every array."""
    draw_key, invert_key, run_key = jax.random.split(key, 3)
    draws = reference.expand(ebm.batch_shape).sample(draw_key, (counts.num_particles,))
    position = unconstrain(invert_key, ebm, draws)
    num_rows = math.prod(ebm.batch_shape)
    # Rows have populations of their own: (particle, *batch, *point) -> (row, particle, *point).
    position = jnp.swapaxes(position.reshape(counts.num_particles, num_rows, *point_shape(ebm)), 0, 1)

    def run_row(key: Key, row: Array, position: Array) -> SMCResult:
        return run_tempered_smc(
            key,
            position,
            *row_densities(ebm, reference, row),
            kernel=kernel,
            num_steps=counts.num_steps,
            target_ess=target_ess,
            temperatures=ladder,
            max_temperatures=counts.max_temperatures,
            keep_weights=True,
            coding=coding_of(ebm),
        )

    record = jax.vmap(run_row)(jax.random.split(run_key, num_rows), jnp.arange(num_rows), position)
    return jax.lax.stop_gradient(record)


def _estimate(key: Key, ebm: Any, reference: Any, kernel: Kernel, *options: Any) -> tuple[LogNormalizer, SMCResult]:
    record = _run_rows(key, ebm, reference, kernel, *options)
    num_particles = record.log_weight.shape[1]

    def by_row(x: Array) -> Array:
        return x.reshape(ebm.batch_shape)

    # Every temperature adds a share of a constant in the energy, each time with the last digit of the sum.
    variance = record.relative_variance + (2.0 * rounding(record.log_normalizer)) ** 2
    # Weighted backwards the same steps say the same of the same law, up to the noise of the estimate.
    is_reversible = jnp.abs(record.reversal_gap) <= MAX_GAP * jnp.sqrt(variance)
    is_collapsed, is_uncovered = jax.vmap(lambda one: (one.is_collapsed, one.is_uncovered))(record)
    value = jnp.where(record.is_finite, record.log_normalizer, jnp.nan)
    result = LogNormalizer(
        value=by_row(value) + _slope(ebm, record, num_particles),
        standard_error=by_row(jnp.sqrt(variance)),
        ess=by_row(1.0 / (variance + 1.0 / num_particles)),
        pareto_khat=by_row(jnp.full_like(value, jnp.nan)),
        num_gradients=by_row(record.info.num_gradients.sum(axis=1)),
        reliable=by_row(record.is_finite & ~is_collapsed & ~is_uncovered & is_reversible & (variance < TOO_NOISY)),
    )
    return result, record


def _slope(ebm: Any, record: SMCResult, num_particles: int) -> Array:
    """:func:`mean_slope` of populations with a leading row axis."""
    position = jnp.swapaxes(record.position, 0, 1).reshape(num_particles, *ebm.batch_shape, *record.position.shape[2:])
    weight = jax.nn.softmax(record.log_weight.T, axis=0).reshape(num_particles, *ebm.batch_shape)
    return mean_slope(ebm, position, weight)


def _raise_if_failed(record: SMCResult) -> None:
    rows = np.flatnonzero(~np.asarray(record.is_finite))
    if rows.size == 0:
        return
    nonfinite = on_host(record.info.num_nonfinite).sum(axis=1)[rows]
    steps, ess = np.asarray(record.num_temperatures)[rows], np.asarray(record.ess_minimum)[rows]
    num_rows, num_particles = record.log_weight.shape
    raise SMCFailure(
        f"tempered_smc: the weights are not finite in {rows.size} of {num_rows} rows, the first at index {rows[0]}: "
        f"{nonfinite[0]} evaluations of the energy were NaN or infinite within {steps[0]} temperatures of {num_particles} "
        f"particles, and the smallest effective sample size was {ess[0]:.3g} of them. Expected a finite energy wherever "
        "the reference draws, and some particles in the support. Pass reference=... with a distribution on the support, or "
        "check the parameters for NaN.",
        rows=rows,
        num_nonfinite=nonfinite,
        num_temperatures=steps,
        ess_minimum=ess,
    )


_compiled_estimate = eqx.filter_jit(_estimate)
_compiled_run_many = eqx.filter_jit(_run_many)
