"""A standard normal law cut to an interval."""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import as_number
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Key, Scalar

_FAR = 10.0
"""Further out the mass of a tail nears the smallest numbers of float32."""
_LONGEST = 100.0
"""Of a longer interval float32 cannot tell apart what is near an end."""


class _Half(NamedTuple):
    """A normal law between two distances from zero, on one side of it."""

    near: float
    far: float

    @property
    def mass(self) -> float:
        """Of the standard normal law."""
        return _beyond(self.near) - _beyond(self.far)

    def distance(self, uniform: Array) -> Array:
        """The inverse of the distribution function, from the far end."""
        half_a_step = 2.0**-25  # so that the end of the tail, which may be infinite, is never hit
        return -ndtri(_beyond(self.far) + self.mass * (uniform + half_a_step))


def _beyond(distance: float) -> float:
    """The probability that a standard normal variate is larger."""
    return 0.5 * math.erfc(distance / math.sqrt(2))


class NormalPotential(eqx.Module):
    """``U(x) = x^2 / 2``."""

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        return 0.5 * x**2


def truncated_normal(*, low: float = -1.0, high: float = 2.0) -> Target:
    """``p(x) ∝ exp(-x^2 / 2)`` on ``[low, high]``; ``Z = sqrt(2 pi) (Phi(high) - Phi(low))``.

    Draws within one part in 10^7 of an end (in float32) are moved inwards by that much: closer ones cannot be mapped
    to a finite unconstrained coordinate.

    Args:
        low: Left end, at most 10.
        high: Right end, at least -10, and at most 100 from the left one.

    Raises:
        ValueError: ``low`` is not below ``high``, or the interval is in the tails or too long.

    Example:
        >>> round(truncated_normal().log_normalizer, 10)
        0.7187722389
    """
    low, high = as_number("low", low), as_number("high", high)
    if not low < high:
        raise ValueError(f"low, high: got {low}, {high}, expected low < high.")
    if low > _FAR or high < -_FAR or high - low > _LONGEST:
        raise ValueError(
            f"low, high: got {low}, {high}, expected ends at most {_LONGEST:.0f} apart, and one within {_FAR:.0f} of 0."
        )
    # Both halves by the mass beyond a distance from zero, which keeps its digits in the tails.
    right, left = _Half(max(low, 0.0), max(high, 0.0)), _Half(max(-high, 0.0), max(-low, 0.0))
    mass = math.sqrt(2 * math.pi) * (left.mass + right.mass)
    edge_low, edge_high = math.exp(-0.5 * low**2), math.exp(-0.5 * high**2)

    def sample(key: Key, n: int) -> Array:
        side_key, key = jax.random.split(key)
        is_left = jax.random.bernoulli(side_key, left.mass / (left.mass + right.mass), (n,))
        uniform = jax.random.uniform(key, (n,))
        draws = jnp.where(is_left, -left.distance(uniform), right.distance(uniform))
        margin = 2 * float(jnp.finfo(draws.dtype).eps) * max(high - low, abs(low), abs(high))
        return jnp.clip(draws, low + margin, high - margin)

    return Target(
        name="truncated_normal",
        potential=NormalPotential(),
        base=ImproperUniform(constraints.interval(low, high), (), ()),
        log_normalizer=math.log(mass),
        sampler=sample,
        expectations={
            "x": (lambda x: x, (edge_low - edge_high) / mass),
            "x^2": (lambda x: x**2, 1.0 + (low * edge_low - high * edge_high) / mass),
        },
    )
