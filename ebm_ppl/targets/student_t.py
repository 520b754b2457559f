"""Student's t distribution: tails so heavy that MALA is not geometrically ergodic on it."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import as_number
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Scalar

_LEAST = 0.5
"""Degrees of freedom below which a uniform number of float32 may stand for a draw beyond its range."""
_MOST = 1e6
"""Beyond it log Z, a difference of large numbers, loses its digits."""


class StudentTPotential(eqx.Module):
    """``U(x) = (nu + 1)/2 log(1 + x^2 / nu)``."""

    degrees_of_freedom: float

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        return 0.5 * (self.degrees_of_freedom + 1.0) * jnp.log1p(x**2 / self.degrees_of_freedom)


def student_t(*, degrees_of_freedom: float = 3.0) -> Target:
    """``p(x) ∝ (1 + x^2 / nu)^(-(nu + 1)/2)`` on the line.

    Its gradient vanishes far out, where Langevin kernels become random walks: right from an exact start, slow from a
    far one. The tabulated expectation is of a bounded function; moments of order ``nu`` and above do not exist.

    Args:
        degrees_of_freedom: ``nu``, from 0.5 to 10^6.

    Raises:
        ValueError: ``degrees_of_freedom`` is out of this range.

    Example:
        >>> round(student_t(degrees_of_freedom=1.0).log_normalizer, 6)  # Cauchy: log pi
        1.14473
    """
    nu = as_number("degrees_of_freedom", degrees_of_freedom)
    if not _LEAST <= nu <= _MOST:
        raise ValueError(
            f"degrees_of_freedom: got {nu}, expected {_LEAST} to {_MOST:.0e}: draws of heavier tails leave the range of "
            "float32, and beyond it is a normal law."
        )
    return Target(
        name="student_t",
        potential=StudentTPotential(nu),
        base=ImproperUniform(constraints.real, (), ()),
        log_normalizer=0.5 * math.log(math.pi * nu) + math.lgamma(nu / 2) - math.lgamma((nu + 1) / 2),
        sampler=lambda key, n: jax.random.t(key, nu, (n,)),
        expectations={
            "x > 0": (lambda x: (x > 0) * 1.0, 0.5),
            "1 / (1 + x^2 / nu)": (lambda x: 1.0 / (1.0 + x**2 / nu), nu / (nu + 1.0)),
        },
    )
