"""The Dirichlet law on the simplex."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Scalar

_CONCENTRATION = (2.0, 3.0, 5.0)


class DirichletPotential(eqx.Module):
    """``U(x) = -sum_i (c_i - 1) log x_i``."""

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        return -jnp.sum((jnp.asarray(_CONCENTRATION, x.dtype) - 1.0) * jnp.log(x))


def dirichlet() -> Target:
    """``p(x) ∝ x_0 x_1^2 x_2^4`` on the simplex, Dirichlet(2, 3, 5); the event has shape ``(3,)``.

    ``log Z = sum log Gamma(c_i) - log Gamma(sum c_i) = -8.9306264692`` with respect to Lebesgue measure on the first
    two coordinates, the measure of NumPyro's simplex transform.

    Example:
        >>> round(dirichlet().log_normalizer, 10)
        -8.9306264692
    """
    total = sum(_CONCENTRATION)
    return Target(
        name="dirichlet",
        potential=DirichletPotential(),
        base=ImproperUniform(constraints.simplex, (), (3,)),
        log_normalizer=sum(map(math.lgamma, _CONCENTRATION)) - math.lgamma(total),
        sampler=lambda key, n: jax.random.dirichlet(key, jnp.asarray(_CONCENTRATION), (n,)),
        expectations={
            "x[0]": (lambda x: x[0], 2 / 10),
            "x[2]": (lambda x: x[2], 5 / 10),
            # E[x_i x_j] = c_i c_j / (total (total + 1))
            "x[0] x[1]": (lambda x: x[0] * x[1], 6 / 110),
        },
    )
