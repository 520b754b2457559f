"""The Gamma law on the positive half-line."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Scalar

_SHAPE, _RATE = 3, 2.0


class GammaPotential(eqx.Module):
    """``U(x) = -(shape - 1) log x + rate x``."""

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        return _RATE * x - (_SHAPE - 1) * jnp.log(x)


def gamma() -> Target:
    """``p(x) ∝ x^2 exp(-2 x)`` on ``x > 0``, Gamma(3, 2); ``Z = Gamma(3) / 2^3``, ``log Z = -1.3862943611``.

    Draws are sums of three exponential variates.

    Example:
        >>> round(gamma().log_normalizer, 10)
        -1.3862943611
    """
    return Target(
        name="gamma",
        potential=GammaPotential(),
        base=ImproperUniform(constraints.positive, (), ()),
        log_normalizer=math.lgamma(_SHAPE) - _SHAPE * math.log(_RATE),
        sampler=lambda key, n: jnp.sum(jax.random.exponential(key, (n, _SHAPE)), axis=1) / _RATE,
        expectations={
            "x": (lambda x: x, 1.5),
            "x^2": (lambda x: x**2, 3.0),
            # digamma(3) = 3/2 - Euler's constant
            "log x": (jnp.log, 1.5 - float(np.euler_gamma) - math.log(_RATE)),
        },
    )
