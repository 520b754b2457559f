"""Neal's funnel: the scale of nine coordinates is set by the tenth."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import as_number, check_count, check_positive
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Key, Scalar


class FunnelPotential(eqx.Module):
    """``U(x) = -log N(v; 0, scale^2) - sum_i log N(x_i; 0, exp(v))`` with ``v = x[0]``."""

    scale: float

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        v, rest = x[0], x[1:]
        log_constants = 0.5 * x.size * math.log(2 * math.pi) + jnp.log(self.scale)
        neck = 0.5 * (v / self.scale) ** 2
        return log_constants + neck + 0.5 * jnp.sum(rest**2) * jnp.exp(-v) + 0.5 * rest.size * v


def funnel(*, dim: int = 10, scale: float = 3.0) -> Target:
    """``v ~ N(0, scale^2)`` and ``x_i | v ~ N(0, exp(v))``, normalised: ``log Z = 0``.

    Args:
        dim: Dimension with ``v`` first, at least 2; the event has shape ``(dim,)``.
        scale: Standard deviation of ``v``, positive.

    Raises:
        ValueError: ``dim`` is below 2 or ``scale`` is not positive.

    Example:
        >>> funnel().event_shape
        (10,)

    References:
        Neal (2003), Slice sampling, Annals of Statistics 31, section 8.
    """
    check_count("dim", dim, 2)
    check_positive("scale", scale)
    scale = as_number("scale", scale)

    def sample(key: Key, n: int) -> Array:
        noise = jax.random.normal(key, (n, dim))
        v = scale * noise[:, :1]
        return jnp.concatenate([v, jnp.exp(v / 2) * noise[:, 1:]], axis=1)

    return Target(
        name="funnel",
        potential=FunnelPotential(scale),
        base=ImproperUniform(constraints.real_vector, (), (dim,)),
        log_normalizer=0.0,
        sampler=sample,
        expectations={
            "v": (lambda x: x[0], 0.0),
            "v^2": (lambda x: x[0] ** 2, scale**2),
            "x[1]^2 exp(-v)": (lambda x: x[1] ** 2 * jnp.exp(-x[0]), 1.0),
        },
    )
