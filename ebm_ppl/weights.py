"""Arithmetic of importance weights: their mean, what they are worth, and resampling."""

import jax
import jax.numpy as jnp
from blackjax.smc.resampling import systematic
from jax.scipy.special import logsumexp

from ebm_ppl.types import Array, Key, PyTree

COLLAPSED = 0.1
"""Weights have collapsed when fewer than this share of their particles count."""


def normalized_weights(log_weight: Array, axis: int | None = -1) -> Array:
    """Weights that sum to one along an axis (all of them when ``None``); all NaN where one of them is.

    Example:
        >>> normalized_weights(jnp.array([-7.0, -7.0])).tolist()
        [0.5, 0.5]
    """
    return _unless_nan(log_weight, axis, jax.nn.softmax(log_weight, axis=axis), keepdims=True)


def _unless_nan(log_weight: Array, axis: int | None, value: Array, *, keepdims: bool = False) -> Array:
    # Said outright: compilers may take a maximum, which the sums begin with, to be free of NaN.
    return jnp.where(jnp.isnan(log_weight).any(axis=axis, keepdims=keepdims), jnp.nan, value)


def log_mean_weight(log_weight: Array) -> tuple[Array, Array]:
    """Logarithm of the mean weight, and its variance.

    The variance is that of the mean relative to its square, ``1 / ESS - 1 / N``, which by the delta method is that of the
    logarithm. Weights that are not numbers make both NaN, and so does a population without any weight.

    Args:
        log_weight: ``(*batch, particle)``, minus infinity for a particle without weight.

    Returns:
        Two arrays ``batch``.

    Example:
        >>> value, variance = log_mean_weight(jnp.log(jnp.array([1.0, 3.0])))  # mean 2; ESS is 16 / 10
        >>> round(float(value), 4), round(float(variance), 4)
        (0.6931, 0.125)
    """
    num_particles = log_weight.shape[-1]
    log_mean = logsumexp(log_weight, axis=-1) - jnp.log(num_particles)
    variance = jnp.sum(normalized_weights(log_weight) ** 2, axis=-1) - 1.0 / num_particles
    return _unless_nan(log_weight, -1, log_mean), variance


def effective_size(log_weight: Array) -> Array:
    """Effective number of particles, ``(sum w)^2 / sum w^2``: ``(*batch, particle) -> batch``.

    Example:
        >>> float(effective_size(jnp.zeros(4)))
        4.0
    """
    return 1.0 / jnp.sum(normalized_weights(log_weight) ** 2, axis=-1)


def variance_by_ancestor(log_weight: Array, ancestor: Array, num_all: int) -> Array:
    """Relative variance of the mean weight, with the descendants of each chain of the start taken for one observation.

    Args:
        log_weight: ``(particle,)``, of the last so many of all chains.
        ancestor: Number of the chain of the start, among all, that each descends from, ``(particle,)``; one of these.
        num_all: Chains of the start.

    Example:
        >>> float(variance_by_ancestor(jnp.zeros(4), jnp.arange(4), 4))  # four ancestors
        0.0
        >>> float(variance_by_ancestor(jnp.zeros(4), jnp.zeros(4, int), 4))  # one
        0.75
    """
    num_particles = log_weight.shape[0]
    share = normalized_weights(log_weight)
    total = jnp.zeros(num_all, share.dtype).at[ancestor].add(share)[-num_particles:]
    return jnp.sum((total - 1.0 / num_particles) ** 2)


def is_collapsed(log_weight: Array) -> Array:
    """Whether fewer than a tenth of the particles count, or a weight is NaN: ``(*batch, particle) -> batch``.

    Example:
        >>> bool(is_collapsed(jnp.zeros(30))), bool(is_collapsed(jnp.array([0.0, -jnp.inf] + 28 * [-20.0])))
        (False, True)
    """
    return ~(effective_size(log_weight) >= COLLAPSED * log_weight.shape[-1])


def resampled(key: Key, particles: PyTree, log_weight: Array, is_due: Array) -> PyTree:
    """Systematic resampling, where it is due: every particle as often as its weight says, on average.

    Args:
        key: Random key.
        particles: Arrays with a leading particle axis.
        log_weight: ``(particle,)``.
        is_due: One boolean. Where it is false the particles are what they were.

    Returns:
        As many particles.

    Example:
        >>> import jax
        >>> log_weight = jnp.log(jnp.array([0.5, 0.5, 0.0]))
        >>> resampled(jax.random.key(0), jnp.arange(3), log_weight, jnp.array(True)).max().item()
        1
    """
    num_particles = log_weight.shape[0]
    weight = normalized_weights(log_weight)
    index = systematic(key, weight, num_particles)
    # Rounding in the cumulative sum may choose a particle without weight at either end.
    index = jnp.where(weight[index] > 0, index, jnp.argmax(weight))
    index = jnp.where(is_due, index, jnp.arange(num_particles))
    return jax.tree.map(lambda x: x[index], particles)


def weight_statistics(log_weight: Array) -> dict[str, Array]:
    """``weight_ess``, the effective number of draws, and ``log_normalizer``, the log of the mean weight."""
    total, total_squared = logsumexp(log_weight), logsumexp(2.0 * log_weight)
    is_dead = total == -jnp.inf
    return {
        "weight_ess": jnp.where(is_dead, 0.0, jnp.exp(2.0 * total - jnp.where(is_dead, 0.0, total_squared))),
        "log_normalizer": total - jnp.log(log_weight.size),
    }
