"""What every normaliser returns: log Z with its error, and whether the two can be believed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import is_traced
from ebm_ppl.normalizer.pareto import pareto_khat
from ebm_ppl.types import Array

MAX_ROUNDING = 0.05
"""Nats that may be hidden in the last digit of a log Z that is called reliable: a constant of 4e5 in 32 bits."""
MAX_KHAT = 0.5
"""Weights with a heavier tail have no finite variance, and their mean no standard error."""


class LogNormalizer(NamedTuple):
    """An estimate of ``log Z = log ∫ base(x) exp(-U(x)) dx`` with its error: a pytree of arrays of one shape.

    The shape is the ``batch_shape`` of the EBM: one normaliser per row.

    Attributes:
        value: ``log Z`` in nats, differentiable in whatever the EBM was built from (each method says how).
        standard_error: Error of ``value`` in nats: one standard error of a Monte-Carlo estimate, an estimate of the
            numerical error of a deterministic one. Zero for an exact sum and for weights that are all equal.
        ess: Effective sample size of the importance weights behind the estimate; NaN for deterministic methods.
        pareto_khat: Shape of the tail of the weights (see :func:`ebm_ppl.normalizer.pareto_khat`), not reliable above 0.5;
            NaN where a method does not assess it.
        num_gradients: Evaluations of the energy's gradient spent on the row; 0 for methods that use none.
        reliable: Whether the method's own checks passed. A false flag means that ``value`` may be far off, by more
            than ``standard_error``; a true one, that nothing gave it away.

    Example:
        >>> import jax.numpy as jnp
        >>> LogNormalizer(*map(jnp.array, (1.2341, 0.005, 812.0, jnp.nan, 0, True)))
        log Z = 1.234 ± 0.005 (ess 812)
    """

    value: Array
    standard_error: Array
    ess: Array
    pareto_khat: Array
    num_gradients: Array
    reliable: Array

    def __repr__(self) -> str:
        if is_traced(self):
            return f"LogNormalizer(value={self.value})"
        rows = [_row(*row) for row in zip(*(np.ravel(field) for field in self), strict=True)]
        if np.ndim(self.value) == 0:
            return rows[0]
        doubtful = int(np.size(self.reliable) - np.sum(self.reliable))
        shown = [*rows[:3], "..."] if len(rows) > 4 else rows
        lines = [f"{len(rows)} rows, {doubtful} unreliable", *shown]
        return "\n".join(lines)

    __str__ = __repr__


def _row(value: Any, error: Any, ess: Any, khat: Any, num_gradients: Any, reliable: Any) -> str:
    # As many decimals as the error's first digit has, and at least three.
    decimals = 3 if not error > 0 or not np.isfinite(error) else int(np.clip(-np.floor(np.log10(error)), 3, 9))
    notes = [f"ess {ess:.0f}"] if np.isfinite(ess) else []
    notes += [f"khat {khat:.2f}"] if np.isfinite(khat) else []
    if error == 0 and not notes:
        return f"log Z = {value:.6f} (exact)" if reliable else f"log Z = {value:.6f}, UNRELIABLE"
    text = f"log Z = {value:.{decimals}f} ± {error:.{decimals}f}" + (f" ({', '.join(notes)})" if notes else "")
    return text if reliable else f"{text}, UNRELIABLE"


def from_log_weights(log_weight: Array, num_gradients: Array) -> LogNormalizer:
    """The estimate ``log mean exp(log_weight)`` of a population of weighted particles, with no gradient.

    Args:
        log_weight: ``(particle, *batch)``: log importance weights whose mean is an unbiased estimate of Z.
        num_gradients: Evaluations of the energy's gradient spent on each row, ``batch``.

    Returns:
        A standard error from the spread of the weights, which is unbelievable unless they are many, and ``reliable`` where
        every weight is finite, the effective sample size is at least a tenth of the particles, and the Pareto k-hat of the
        weights is below 0.5, where their variance is finite and the error means something (below 25 particles it cannot be
        assessed, and nothing is reliable).

    Example:
        >>> from_log_weights(jnp.zeros(1000), jnp.zeros((), int))
        log Z = 0.000 ± 0.000 (ess 1000)
    """
    log_weight = jax.lax.stop_gradient(log_weight)
    num_particles = log_weight.shape[0]
    log_total = safe_logsumexp(log_weight)
    # Of weights near one: sums of squares of larger ones would be told from each other by their last digits.
    shifted = log_weight - jnp.where(jnp.isfinite(log_total), log_total, 0.0)
    ess = jnp.minimum(jnp.exp(2 * safe_logsumexp(shifted) - safe_logsumexp(2 * shifted)), num_particles)
    # Relative variance of the mean of the weights, through which the logarithm is as good as linear.
    relative_variance = jnp.maximum(1 / ess - 1 / num_particles, 0.0) * num_particles / max(num_particles - 1, 1)
    value = log_total - jnp.log(num_particles)
    khat = pareto_khat(log_weight)
    is_sound = jnp.isfinite(value) & jnp.all(jnp.isfinite(log_weight), axis=0)
    return LogNormalizer(
        value=value,
        standard_error=jnp.hypot(jnp.sqrt(relative_variance), rounding(value)),
        ess=ess,
        pareto_khat=khat,
        num_gradients=num_gradients,
        # Not below the bound, rather than above it: k-hat is NaN where there are too few weights to tell.
        reliable=is_sound & (ess >= num_particles / 10) & (khat < MAX_KHAT) & (rounding(value) < MAX_ROUNDING),
    )


def rounding(value: Array) -> Array:
    """What the last digit of log Z hides, in nats; zero where that is nothing to speak of.

    An energy with a large constant in it has no more digits than that constant leaves.

    Example:
        >>> round(float(rounding(jnp.float32(1e6))), 3), float(rounding(jnp.float32(10.0)))
        (0.119, 0.0)
    """
    value = jax.lax.stop_gradient(value)
    hidden = jnp.finfo(value.dtype).eps * jnp.abs(value)
    return jnp.where((hidden > 1e-4) & jnp.isfinite(hidden), hidden, 0.0)


def safe_logsumexp(terms: Array, axis: int = 0) -> Array:
    """``log sum exp`` along an axis; minus infinity, with a zero gradient instead of NaN, where every term is.

    A sum in which every term vanishes is met far from the mass, where its gradient is multiplied by a zero weight.
    """
    is_empty = jnp.all(terms == -jnp.inf, axis=axis, keepdims=True)
    terms = jnp.where(is_empty, 0.0, terms)
    top = jnp.max(terms, axis=axis, keepdims=True)
    # A constant shift: it cancels, and its gradient with it.
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.log(jnp.sum(jnp.exp(terms - top), axis=axis)) + jnp.squeeze(top, axis)
    return jnp.where(jnp.squeeze(is_empty, axis), -jnp.inf, total)
