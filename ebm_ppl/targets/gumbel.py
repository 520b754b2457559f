"""The reflected Gumbel law: asymmetric, so that a sign error anywhere in a kernel shows."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Scalar


class GumbelPotential(eqx.Module):
    """``U(x) = -(x - exp(x))``."""

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        return jnp.exp(x) - x


def gumbel() -> Target:
    """``p(x) = exp(x - exp(x))`` on the line, normalised: the law of the log of a standard exponential variate.

    The left tail is exponential and the right one doubly exponential; ``P(X <= x) = 1 - exp(-exp(x))``.

    Example:
        >>> gumbel().log_normalizer
        0.0
    """
    mean = -float(np.euler_gamma)
    return Target(
        name="gumbel",
        potential=GumbelPotential(),
        base=ImproperUniform(constraints.real, (), ()),
        log_normalizer=0.0,
        sampler=lambda key, n: -jax.random.gumbel(key, (n,)),
        expectations={"x": (lambda x: x, mean), "x^2": (lambda x: x**2, math.pi**2 / 6 + mean**2)},
    )
