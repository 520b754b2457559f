"""The banana: a Gaussian bent by a map that preserves volume."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import as_number, check_positive
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Key, Scalar


class BananaPotential(eqx.Module):
    """``U(x) = -log N(x_0; 0, scale^2) - log N(x_1 - curvature (x_0^2 - scale^2); 0, 1)``."""

    scale: float
    curvature: float

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        straight = x[1] - self.curvature * (x[0] ** 2 - self.scale**2)
        return 0.5 * ((x[0] / self.scale) ** 2 + straight**2) + jnp.log(self.scale) + math.log(2 * math.pi)


def banana(*, scale: float = 2.0, curvature: float = 0.5) -> Target:
    """``x = (z_0, z_1 + curvature (z_0^2 - scale^2))`` with ``z ~ N(0, diag(scale^2, 1))``, normalised: ``log Z = 0``.

    ``E[x_1] = 0`` and ``E[x_1^2] = 1 + 2 curvature^2 scale^4``.

    Args:
        scale: Standard deviation along the banana, positive.
        curvature: How much it bends; 0 is a Gaussian.

    Raises:
        ValueError: ``scale`` is not positive.

    Example:
        >>> banana().expectations["x[1]^2"][1]
        9.0

    References:
        Haario, Saksman, Tamminen (1999), Adaptive proposal distribution for random walk Metropolis algorithm.
    """
    check_positive("scale", scale)
    scale, curvature = as_number("scale", scale), as_number("curvature", curvature)

    def sample(key: Key, n: int) -> Array:
        noise = jax.random.normal(key, (n, 2))
        along = scale * noise[:, 0]
        return jnp.stack([along, noise[:, 1] + curvature * (along**2 - scale**2)], axis=1)

    return Target(
        name="banana",
        potential=BananaPotential(scale, curvature),
        base=ImproperUniform(constraints.real_vector, (), (2,)),
        log_normalizer=0.0,
        sampler=sample,
        expectations={
            "x[0]^2": (lambda x: x[0] ** 2, scale**2),
            "x[1]": (lambda x: x[1], 0.0),
            "x[1]^2": (lambda x: x[1] ** 2, 1.0 + 2.0 * curvature**2 * scale**4),
        },
    )
