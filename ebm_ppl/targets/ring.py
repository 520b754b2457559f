"""A ring in the plane: one connected mode with a hole in the middle."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import as_number, as_positive_number
from ebm_ppl.targets.tabulated import TabulatedLaw
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Key, Scalar

_MOST_WIDTHS = 1e5


class RingPotential(eqx.Module):
    """``U(x) = ((|x| - radius) / width)^2 / 2``."""

    radius: float
    width: float

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        squared = jnp.sum(x**2)
        # The norm has no gradient at the origin; zero there keeps a chain started at it finite.
        is_origin = squared == 0.0
        norm = jnp.where(is_origin, 0.0, jnp.sqrt(jnp.where(is_origin, 1.0, squared)))
        return 0.5 * ((norm - self.radius) / self.width) ** 2


def ring(*, radius: float = 2.0, width: float = 0.2) -> Target:
    """``p(x) ∝ exp(-((|x| - R) / s)^2 / 2)`` in the plane; ``R = 2`` and ``s = 0.2`` by default.

    The radius has density proportional to ``r exp(-((r - R)/s)^2 / 2)``, so that ``log Z = 1.8405248677`` and
    ``E[r] = R + s^2 / R = 2.02``, up to the mass ``exp(-(R/s)^2 / 2)`` cut off at the origin. Draws of the radius
    invert a tabulated CDF that is within 1e-6 of the exact one; the angle is uniform.

    Args:
        radius: ``R``, from ``9 s`` to ``10^5 s``.
        width: ``s``, positive.

    Raises:
        ValueError: ``width`` is not positive, or ``radius`` is below nine widths or above 10^5.

    Example:
        >>> round(ring().log_normalizer, 10)
        1.8405248677
    """
    radius, width = as_number("radius", radius), as_positive_number("width", width)
    # Closer to the origin the tabulated density would be cut off instead of vanishing.
    if radius < 9 * width:
        raise ValueError(f"radius: got {radius}, expected at least 9 widths ({9 * width}).")
    if radius > 1.001 * _MOST_WIDTHS * width:
        raise ValueError(
            f"radius: got {radius}, expected at most {_MOST_WIDTHS:.0e} widths: float32 does not resolve a thinner ring."
        )
    law = TabulatedLaw(
        lambda r: np.log(r) - 0.5 * np.square((r - radius) / width), radius - 8.5 * width, radius + 8.5 * width
    )

    def sample(key: Key, n: int) -> Array:
        key_radius, key_angle = jax.random.split(key)
        r = law.sample(key_radius, (n,))
        angle = jax.random.uniform(key_angle, (n,), maxval=2 * math.pi)
        return jnp.stack([r * jnp.cos(angle), r * jnp.sin(angle)], axis=1)

    return Target(
        name="ring",
        potential=RingPotential(radius, width),
        base=ImproperUniform(constraints.real_vector, (), (2,)),
        log_normalizer=law.log_normalizer + math.log(2 * math.pi),
        sampler=sample,
        expectations={
            "|x|": (lambda x: jnp.sqrt(jnp.sum(x**2)), law.expectation(lambda r: r)),
            "x[0]": (lambda x: x[0], 0.0),
            "x[0]^2": (lambda x: x[0] ** 2, law.expectation(np.square) / 2),
        },
    )
