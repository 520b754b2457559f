"""The centred Gaussian with a dense precision matrix."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import check_count
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Scalar


class GaussianPotential(eqx.Module):
    """``U(x) = x' P x / 2``."""

    precision: Array

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        # GPUs multiply float32 matrices with ten-bit mantissas unless told otherwise.
        product = jnp.matmul(self.precision.astype(x.dtype), x, precision="highest")
        return 0.5 * jnp.sum(x * product)


def gaussian(*, dim: int = 2) -> Target:
    """``p(x) ∝ exp(-x' P x / 2)`` with ``P_ij = 2^(1 - |i - j|)`` in ``dim`` dimensions.

    ``P`` is dense with condition number below 9 and exact in float32; its inverse is tridiagonal and
    ``log det P = dim log 2 + (dim - 1) log(3/4)``, so that ``log Z = (dim log 2 pi - log det P) / 2``.

    Args:
        dim: Dimension, at least 1; the event has shape ``(dim,)``.

    Raises:
        ValueError: ``dim`` is below 1.

    Example:
        >>> target = gaussian(dim=1)
        >>> float(target.potential(jnp.ones(1)))
        1.0
    """
    check_count("dim", dim)
    lag = np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))
    precision = 2.0 * 0.5**lag
    covariance = np.linalg.inv(precision)
    factor = np.linalg.cholesky(covariance)
    expectations = {
        "x[0]": (lambda x: x[0], 0.0),
        "x[-1]^2": (lambda x: x[-1] ** 2, 0.5 if dim == 1 else 2 / 3),
    }
    if dim > 1:
        expectations["x[0] x[1]"] = (lambda x: x[0] * x[1], -1 / 3)
    return Target(
        name="gaussian",
        potential=GaussianPotential(jnp.asarray(precision)),
        base=ImproperUniform(constraints.real_vector, (), (dim,)),
        log_normalizer=0.5 * (dim * math.log(2 * math.pi) - dim * math.log(2.0) - (dim - 1) * math.log(0.75)),
        sampler=lambda key, n: jnp.matmul(jax.random.normal(key, (n, dim)), jnp.asarray(factor.T), precision="highest"),
        expectations=expectations,
    )
