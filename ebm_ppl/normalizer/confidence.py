"""A confidence bound on the mean of weights of any variance, from their independence alone."""

import math

import jax
import jax.numpy as jnp

from ebm_ppl.checks import as_array, check_one
from ebm_ppl.normalizer.bisection import bracket_sign_change
from ebm_ppl.types import Array


def lower_confidence_bound(log_weight: Array, confidence: float = 0.95) -> Array:
    r"""A number that is at most ``log E[w]`` with probability ``>= confidence``, for independent weights ``w >= 0``.

    It holds at every number of weights and whatever their variance, infinite ones included, where a standard error (and so
    an interval of two of them) holds for many weights of finite variance only. A gambler who bets the share ``s`` of the
    wealth that the next weight exceeds ``m``, on terms that are fair if ``E[w] = m``, has ``K(m) = mean_s prod_i (1 - s + s
    w_i / m)`` after all of them, starting from 1 with as much on each of a few shares. If ``E[w] = m`` its expectation is
    1, so that by Markov's inequality ``P(K(m) >= 1 / (1 - confidence)) <= 1 - confidence``. ``K`` decreases with ``m``; the
    bound is where it crosses that level. The shares are ``1, 1/2, 1/4, ... >= 1 / N``, whatever the weights are; with one
    share, ``s = 1``, it would be Markov's inequality for the geometric mean of the weights.

    For ``N`` weights of a small relative standard deviation ``v`` it lies about
    ``v sqrt(2 (2 - log(1 - confidence)) / N)`` below the log of their mean.

    Args:
        log_weight: ``(particle, *batch)``, minus infinity for a weight of zero. The weights of one row are independent and
            of one mean, as those of :func:`annealed_particles` are. Those of particles that were resampled are not.
        confidence: In (0, 1); it holds for each row by itself.

    Returns:
        ``batch``, with no gradient; minus infinity where all weights are zero, NaN where one is not a number or infinite.

    Raises:
        TypeError: an argument is no array of real numbers, or no number.
        ValueError: ``confidence`` is not in (0, 1), or there are no weights.

    Example:
        >>> log_weight = 0.5 * jax.random.normal(jax.random.key(0), (1000,))  # mean exp(1/8)
        >>> bound = lower_confidence_bound(log_weight)
        >>> bool(0.0 < 0.125 - bound < 0.1)
        True

    References:
        Waudby-Smith, Ramdas (2024), Estimating means of bounded random variables by betting, arXiv:2010.09686 (bounds from
        bets; here weights are bounded from one side only); Cover (1991), Universal portfolios, Mathematical Finance 1 (the
        mean over shares); Grosse, Ghahramani, Adams (2015), arXiv:1511.02543, section 3 (Markov's inequality for log Z).
    """
    confidence = check_confidence(confidence)
    log_weight = as_array("log_weight", log_weight)
    if not jnp.issubdtype(log_weight.dtype, jnp.floating):
        raise TypeError(f"log_weight: got dtype {log_weight.dtype}, expected real floating log weights.")
    if log_weight.ndim == 0 or log_weight.shape[0] == 0:
        raise ValueError(
            f"log_weight: got shape {log_weight.shape}, expected (particle, *batch) with a particle or more."
        )
    log_weight = jax.lax.stop_gradient(log_weight)
    num_particles = log_weight.shape[0]
    exponents = range(int(math.log2(num_particles)) + 1)
    log_level = -math.log1p(-confidence) + math.log(len(exponents))  # the mean over shares, as a sum
    is_sound = ~jnp.any(jnp.isnan(log_weight) | (log_weight == jnp.inf), axis=0)
    log_top = jnp.max(log_weight, axis=0)
    shifted = log_weight - jnp.where(jnp.isfinite(log_top), log_top, 0.0)

    def log_wealth(exponent: int, log_mean: Array) -> Array:
        share = 2.0**-exponent
        # Without the special case the share that is kept back would be zero, with an infinite logarithm.
        gain = shifted - log_mean
        gain = gain if exponent == 0 else jnp.logaddexp(math.log1p(-share), math.log(share) + gain)
        return jnp.sum(gain, axis=0)

    def shortfall(log_mean: Array) -> Array:
        wealth = jnp.stack([log_wealth(exponent, log_mean) for exponent in exponents])
        return log_level - jax.nn.logsumexp(wealth, axis=0)

    # At the mean no bet gains. That low, the largest weight alone wins enough for the smallest share.
    high = jax.nn.logsumexp(shifted, axis=0) - math.log(num_particles)
    low = jnp.full_like(high, -math.log(num_particles) - 3.0 - log_level)
    bound, _ = bracket_sign_change(shortfall, low, high)
    bound = jnp.where(log_top == -jnp.inf, -jnp.inf, bound + log_top)
    return jnp.where(is_sound, bound, jnp.nan)


def check_confidence(confidence: float) -> float:
    """A probability strictly between 0 and 1.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not.

    Example:
        >>> check_confidence(0.95)
        0.95
    """
    expected = "a probability strictly between 0 and 1, such as 0.95"
    check_one("confidence", confidence, lambda x: (x > 0.0) & (x < 1.0), expected)
    return float(confidence)
