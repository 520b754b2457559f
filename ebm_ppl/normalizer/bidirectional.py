"""log Z between two bounds: annealing to the EBM, and back from draws of it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count, is_traced
from ebm_ppl.normalizer.confidence import check_confidence, lower_confidence_bound
from ebm_ppl.normalizer.importance import estimate_forward, is_adjusted
from ebm_ppl.normalizer.result import LogNormalizer, rounding
from ebm_ppl.normalizer.reverse_importance import check_reversal, estimate_reverse
from ebm_ppl.normalizer.unconstrained import holds_tracers
from ebm_ppl.types import Array, Kernel, Key

CONTRADICTION = 4.0
"""Standard errors by which the estimate from below may exceed that from above; it should not exceed it at all."""


class LogNormalizerBounds(NamedTuple):
    """Two bounds that hold ``log Z`` between them, and the two estimates behind them: arrays of one shape, one row each.

    Attributes:
        lower: At most ``log Z``, in nats.
        upper: At least ``log Z``, PROVIDED THAT the samples were exact, independent draws of the EBM. From chains that have
            not mixed it is none.
        confidence: Probability with which both hold, for each row by itself.
        forward: :func:`ebm_ppl.normalizer.annealed_importance`, from below on average.
        reverse: :func:`ebm_ppl.normalizer.reverse_annealed_importance`, from above on average (as ``upper``).
        gap: ``reverse.value - forward.value``, in nats; its average is at least the sum of the two biases.
        reliable: Whether nothing gave away that a bound is none: all weights are numbers, the kernel has an accept step,
            and the two directions do not contradict each other. It says nothing about how far the bounds are apart, nor is
            it lost where the weights are few or heavy-tailed: the bounds are then wide, and hold.

    Example:
        >>> import jax.numpy as jnp
        >>> estimate = LogNormalizer(*map(jnp.array, (1.23, 0.01, 812.0, 0.1, 0, True)))
        >>> LogNormalizerBounds(*map(jnp.array, (1.21, 1.26, 0.95)), estimate, estimate, *map(jnp.array, (0.004, True)))
        1.210 <= log Z <= 1.260 (confidence 0.95, upper if the samples are exact), gap 0.004
    """

    lower: Array
    upper: Array
    confidence: Array
    forward: LogNormalizer
    reverse: LogNormalizer
    gap: Array
    reliable: Array

    def __repr__(self) -> str:
        if is_traced(self):
            return f"LogNormalizerBounds(lower={self.lower}, upper={self.upper})"
        fields = self.lower, self.upper, self.confidence, self.gap, self.reliable
        rows = [_row(*row) for row in zip(*map(np.ravel, np.broadcast_arrays(*fields)), strict=True)]
        if np.ndim(self.lower) == 0:
            return rows[0]
        doubtful = int(np.size(self.reliable) - np.sum(self.reliable))
        shown = [*rows[:3], "..."] if len(rows) > 4 else rows
        return "\n".join([f"{len(rows)} rows, {doubtful} unreliable", *shown])

    __str__ = __repr__


def _row(lower: Any, upper: Any, confidence: Any, gap: Any, reliable: Any) -> str:
    proviso = f"confidence {confidence:.6g}, upper if the samples are exact"
    text = f"{lower:.3f} <= log Z <= {upper:.3f} ({proviso}), gap {gap:.3f}"
    return text if reliable else f"{text}, UNRELIABLE"


def bidirectional(
    key: Key,
    ebm: Any,
    samples: Array,
    *,
    reference: Any = None,
    kernel: Kernel,
    num_particles: int = 1000,
    num_temperatures: int = 100,
    num_steps: int = 1,
    confidence: float = 0.95,
) -> LogNormalizerBounds:
    """``lower <= log Z <= upper``, by bidirectional Monte Carlo.

    Weights of annealing from the reference to the EBM have the mean ``Z``, those of annealing back from exact draws the
    mean ``1 / Z``. Each side gives a one-sided bound by :func:`ebm_ppl.normalizer.lower_confidence_bound`, which needs no
    more than that the weights are independent: with half of ``1 - confidence`` for each, both hold with probability at
    least ``confidence``, for any number of particles and temperatures and any variance of the weights. Short or badly
    mixing annealing makes them wide, not wrong.

    The lower bound stands by itself. The upper one is as good as the samples: it takes exact, independent draws, as models
    that generate data of their own have them, and oracles. Draws of chains that have not mixed give a number that may lie
    below ``log Z``; the two directions then disagree where annealing from the reference finds what the samples have missed,
    and only there can it be flagged. ``lower`` and ``upper`` carry no gradient; ``forward.value`` and ``reverse.value`` do.

    Args:
        key: Random key.
        ebm: The EBM.
        samples: Exact draws of the EBM, ``(sample, *batch_shape, *event_shape)``, each the start of one reverse particle.
        reference: Normalised distribution on the support of the EBM that can be sampled; the base when ``None``.
        kernel: From :mod:`ebm_ppl.kernels`, with an accept step; its step size holds at every temperature.
        num_particles: Independent forward particles per row.
        num_temperatures: Intermediate densities, for either direction, ``>= 0``.
        num_steps: Kernel steps at each of them.
        confidence: In (0, 1).

    Returns:
        The bounds, with the two estimates.

    Raises:
        TypeError: a count is not a whole number, or the samples are of another kind than the events.
        ValueError: a count is too small, ``confidence`` is not in (0, 1); the samples or the reference are refused as by
            :func:`ebm_ppl.normalizer.reverse_annealed_importance`.
        NotImplementedError: the transform to the support is not one to one.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 2.0 * x, dist.Exponential(1.0))  # Z = 1/3, and the law is Exponential(3)
        >>> samples = dist.Exponential(3.0).sample(jax.random.key(0), (1000,))
        >>> kernel = ebm_ppl.kernels.mala(step_size=0.3)
        >>> bounds = bidirectional(jax.random.key(1), ebm, samples, kernel=kernel, num_temperatures=20)
        >>> bool(bounds.lower < jax.numpy.log(1 / 3) < bounds.upper), bool(bounds.upper - bounds.lower < 0.2)
        (True, True)

    References:
        Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo,
        arXiv:1511.02543; Grosse, Ancha, Roy (2016), arXiv:1606.02275 (what becomes of it where the draws are approximate).
    """
    confidence = check_confidence(confidence)
    samples, reference = check_reversal(key, ebm, samples, reference)
    counts = check_count("num_temperatures", num_temperatures, 0), check_count("num_steps", num_steps)
    num_particles = check_count("num_particles", num_particles, 2)
    is_inside = is_traced(key, samples, kernel, reference) or holds_tracers(ebm)
    run = _estimate if is_inside else _compiled_estimate
    return run(key, ebm, samples, reference, kernel, num_particles, counts, confidence)


def _estimate(
    key: Key,
    ebm: Any,
    samples: Array,
    reference: Any,
    kernel: Kernel,
    num_particles: int,
    counts: tuple[int, int],
    confidence: float,
) -> LogNormalizerBounds:
    forward_key, reverse_key = jax.random.split(key)
    forward, up = estimate_forward(forward_key, ebm, reference, kernel, num_particles, *counts)
    reverse, down = estimate_reverse(reverse_key, ebm, samples, reference, kernel, *counts)
    one_sided = 0.5 * (1.0 + confidence)
    lower, upper = lower_confidence_bound(up.log_weight, one_sided), -lower_confidence_bound(down.log_weight, one_sided)
    hidden = 2.0 * rounding(forward.value)
    lower, upper = lower - hidden, upper + hidden
    gap = jax.lax.stop_gradient(reverse.value - forward.value)
    # Without an error, because there are no weights, there is nothing to contradict.
    is_contradicted = gap < -CONTRADICTION * jnp.sqrt(forward.standard_error**2 + reverse.standard_error**2)
    is_sound = is_adjusted(up, counts[0]) & is_adjusted(down, counts[0]) & (lower <= upper)
    return LogNormalizerBounds(
        lower, upper, jnp.full_like(lower, confidence), forward, reverse, gap, is_sound & ~is_contradicted
    )


_compiled_estimate = eqx.filter_jit(_estimate)
