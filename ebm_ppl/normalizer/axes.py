"""The two kinds of coordinate that quadrature integrates over: the real line, and a circle."""

import math
from typing import NamedTuple

import jax.numpy as jnp

from ebm_ppl.types import Array

REACH = 1e6
"""Quadrature looks at ``|z| <= REACH`` in unconstrained space; what lies beyond enters the error."""


class RealLine(NamedTuple):
    """The line, travelled by ``t``: ``z = centre + scale sinh(t)``.

    Steps of ``t`` are linear near the centre and geometric far from it, so that one grid sees every scale.

    Attributes:
        centre: Scalar or ``(problem,)``.
        scale: As ``centre``, positive.
    """

    centre: Array
    scale: Array

    @property
    def has_tails(self) -> bool:
        """Whether the integral may have mass beyond the last node."""
        return True

    def grid(self, num_nodes: int) -> Array:
        """Equal steps of ``t`` over the reach, ``(node,)``, for a centre of 0 and a scale of 1."""
        return jnp.linspace(-math.asinh(REACH), math.asinh(REACH), num_nodes)

    def point(self, t: Array) -> Array:
        """``z(t)``, ``(..., problem) -> (..., problem)``."""
        return self.centre + self.scale * jnp.sinh(t)

    def parameter(self, z: Array) -> Array:
        """``t(z)``, the inverse of :meth:`point`."""
        return jnp.arcsinh((z - self.centre) / self.scale)

    def log_speed(self, t: Array) -> Array:
        """``log dz/dt``."""
        return jnp.log(self.scale) + jnp.log(jnp.cosh(t))

    def around(self, mean: Array, deviation: Array) -> "RealLine":
        """The same line seen from another point, given in ``t`` with a typical distance from it."""
        scale = jnp.exp(self.log_speed(mean)) * deviation
        return RealLine(self.point(mean), jnp.maximum(scale, jnp.finfo(scale.dtype).tiny))


class Circle(NamedTuple):
    """One period of a periodic coordinate, travelled at constant speed.

    Attributes:
        period: Length of one turn; ``z`` runs over ``[-period/2, period/2]``.
    """

    period: Array

    @property
    def has_tails(self) -> bool:
        """Whether the integral may have mass beyond the last node: it closes on itself."""
        return False

    def grid(self, num_nodes: int) -> Array:
        """Equal steps over one period, ``(node,)``."""
        return jnp.linspace(-0.5, 0.5, num_nodes) * self.period

    def point(self, t: Array) -> Array:
        """``z(t) = t``."""
        return t

    def parameter(self, z: Array) -> Array:
        """``t(z) = z``."""
        return z

    def log_speed(self, t: Array) -> Array:
        """``log dz/dt = 0``."""
        return jnp.zeros_like(t)

    def around(self, mean: Array, deviation: Array) -> "Circle":
        """A circle has no centre and no other scale than its period."""
        return self


Axis = RealLine | Circle
