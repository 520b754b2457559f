"""A quadratic energy over a proper base: the target on which a dropped or doubled base shows."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import Normal

from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Scalar


class QuadraticPotential(eqx.Module):
    """``U(x) = 3/2 |x|^2 - 2 x_0 + 4 x_1``."""

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        return 1.5 * jnp.sum(x**2) - 2.0 * x[0] + 4.0 * x[1]


def tilted_normal() -> Target:
    """``p(x) ∝ N(x; 0, I) exp(-U(x))`` in the plane with ``U(x) = 3/2 |x|^2 - b'x``, ``b = (2, -4)``.

    The law is ``N(b/4, I/4)`` and ``log Z = |b|^2/8 - log 4 = 1.1137056389``.

    Example:
        >>> round(tilted_normal().log_normalizer, 10)
        1.1137056389
    """
    return Target(
        name="tilted_normal",
        potential=QuadraticPotential(),
        base=Normal(0.0, 1.0).expand([2]).to_event(1),
        log_normalizer=20.0 / 8.0 - math.log(4.0),
        sampler=lambda key, n: jnp.array([0.5, -1.0]) + 0.5 * jax.random.normal(key, (n, 2)),
        expectations={
            "x[0]": (lambda x: x[0], 0.5),
            "x[1]": (lambda x: x[1], -1.0),
            "x[1]^2": (lambda x: x[1] ** 2, 1.25),
        },
    )
