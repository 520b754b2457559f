"""A normal distribution fitted to points, as a proposal that nobody had to choose."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from ebm_ppl.types import Array, Key

RIDGE = 1e-4
"""Added to the covariance as a share of the mean variance, so that rounding cannot make it singular."""


class FittedNormal(NamedTuple):
    """A normal distribution over points of some shape.

    Attributes:
        mean: ``(*point,)``.
        scale: Lower Cholesky factor of the covariance of the flattened points, ``(d, d)``.
    """

    mean: Array
    scale: Array

    def sample_and_log_prob(self, key: Key, num_samples: int) -> tuple[Array, Array]:
        """Draws ``(num_samples, *point)`` and their log densities."""
        white = jax.random.normal(key, (num_samples, self.scale.shape[0]), self.scale.dtype)
        points = (white @ self.scale.T).reshape(num_samples, *self.mean.shape) + self.mean
        return points, self.log_prob(points)

    def log_prob(self, points: Array) -> Array:
        """Log density of each row of points."""
        away = (points - self.mean).reshape(points.shape[0], -1)
        white = solve_triangular(self.scale, away.T, lower=True)
        log_volume = jnp.sum(jnp.log(jnp.diagonal(self.scale))) + 0.5 * away.shape[1] * jnp.log(2.0 * jnp.pi)
        return -0.5 * jnp.sum(white**2, axis=0) - log_volume


def fit_normal(points: Array) -> FittedNormal:
    """The normal distribution with the mean and the covariance of some points, ``(n, *point)``.

    Example:
        >>> fitted = fit_normal(jnp.array([[1.0], [3.0]]))
        >>> float(fitted.mean[0]), round(float(fitted.scale[0, 0]), 3)
        (2.0, 1.414)
    """
    mean = jnp.mean(points, axis=0)
    away = (points - mean).reshape(points.shape[0], -1)
    covariance = away.T @ away / (points.shape[0] - 1)
    dimension = away.shape[1]
    ridge = RIDGE * jnp.trace(covariance) / max(dimension, 1)
    return FittedNormal(mean, jnp.linalg.cholesky(covariance + ridge * jnp.eye(dimension, dtype=covariance.dtype)))
