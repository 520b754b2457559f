"""Mixtures of isotropic Gaussians: two unequal modes on the line, twenty-five in the plane."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import as_number, as_positive_number
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Key, Scalar


class GaussianMixturePotential(eqx.Module):
    """``U(x) = -log sum_k w_k N(x; m_k, s_k^2 I) - log_normalizer``.

    Attributes:
        weights: ``(component,)``, summing to 1.
        means: ``(component, *event_shape)``.
        scales: ``(component,)``.
        log_normalizer: Chosen log Z, a constant that no sampler may notice.
    """

    weights: Array
    means: Array
    scales: Array
    log_normalizer: float

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        weights, means, scales = (array.astype(x.dtype) for array in (self.weights, self.means, self.scales))
        squared_distance = jnp.sum(((x - means).reshape(means.shape[0], -1) / scales[:, None]) ** 2, axis=1)
        log_volume = x.size * (jnp.log(scales) + 0.5 * math.log(2 * math.pi))
        log_components = jnp.log(weights) - 0.5 * squared_distance - log_volume
        return -jax.nn.logsumexp(log_components) - self.log_normalizer


def gaussian_mixture(*, log_normalizer: float = 1.5) -> Target:
    """``.3 N(-2, .6^2) + .7 N(2, 1)`` on the line, unnormalised by a chosen factor.

    Args:
        log_normalizer: Chosen log Z. Not zero by default, so that code which forgets log Z is caught.

    Raises:
        ValueError: ``log_normalizer`` is not finite.

    Example:
        >>> gaussian_mixture().log_normalizer
        1.5
    """
    log_normalizer = as_number("log_normalizer", log_normalizer)
    weights, means, scales = np.array([0.3, 0.7]), np.array([-2.0, 2.0]), np.array([0.6, 1.0])
    # The mean and second moment of each component, weighted.
    expectations = {
        "x": (lambda x: x, float(weights @ means)),
        "x^2": (lambda x: x**2, float(weights @ (means**2 + scales**2))),
    }
    return mixture_target("gaussian_mixture", weights, means, scales, log_normalizer, expectations)


def grid25(*, spacing: float = 2.0, scale: float = 0.3, log_normalizer: float = -1.0) -> Target:
    """Twenty-five equal modes on a square grid in the plane, ``{-2, -1, 0, 1, 2}^2 spacing``.

    At the defaults neighbouring modes are 6.7 standard deviations apart: local kernels do not cross.

    Args:
        spacing: Distance between neighbouring modes, positive.
        scale: Standard deviation of each mode, positive.
        log_normalizer: Chosen log Z.

    Raises:
        ValueError: ``spacing`` or ``scale`` is not positive, or ``log_normalizer`` is not finite.

    Example:
        >>> grid25().event_shape
        (2,)
    """
    spacing, scale = as_positive_number("spacing", spacing), as_positive_number("scale", scale)
    log_normalizer = as_number("log_normalizer", log_normalizer)
    ticks = spacing * np.arange(-2.0, 3.0)
    means = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(25, 2)
    second_moment = 2.0 * spacing**2 + scale**2
    expectations = {
        "x[0]": (lambda x: x[0], 0.0),
        "x[0]^2": (lambda x: x[0] ** 2, second_moment),
        "x[0] x[1]": (lambda x: x[0] * x[1], 0.0),
    }
    return mixture_target("grid25", np.full(25, 1 / 25), means, np.full(25, scale), log_normalizer, expectations)


def mixture_target(
    name: str, weights: np.ndarray, means: np.ndarray, scales: np.ndarray, log_normalizer: float, expectations: dict
) -> Target:
    """The target of a mixture of isotropic Gaussians; arguments are those of its potential and of :class:`Target`."""
    event_shape = means.shape[1:]

    def sample(key: Key, n: int) -> Array:
        key_component, key_noise = jax.random.split(key)
        component = jax.random.choice(key_component, len(weights), (n,), p=jnp.asarray(weights))
        noise = jax.random.normal(key_noise, (n, *event_shape))
        scale = jnp.asarray(scales)[component].reshape((n,) + (1,) * len(event_shape))
        return jnp.asarray(means)[component] + scale * noise

    return Target(
        name=name,
        potential=GaussianMixturePotential(
            jnp.asarray(weights), jnp.asarray(means), jnp.asarray(scales), float(log_normalizer)
        ),
        base=ImproperUniform(constraints.real_vector if event_shape else constraints.real, (), event_shape),
        log_normalizer=float(log_normalizer),
        sampler=sample,
        expectations=expectations,
    )
