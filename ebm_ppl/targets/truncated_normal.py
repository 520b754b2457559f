"""A standard normal law cut to an interval."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import as_number
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Key, Scalar


class NormalPotential(eqx.Module):
    """``U(x) = x^2 / 2``."""

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        return 0.5 * x**2


def truncated_normal(*, low: float = -1.0, high: float = 2.0) -> Target:
    """``p(x) ∝ exp(-x^2 / 2)`` on ``[low, high]``; ``Z = sqrt(2 pi) (Phi(high) - Phi(low))``.

    Draws within one part in 10^7 of an end (in float32) are moved inwards by that much: closer ones cannot be mapped
    to a finite unconstrained coordinate.

    Args:
        low: Left end.
        high: Right end.

    Raises:
        ValueError: ``low`` is not below ``high``.

    Example:
        >>> round(truncated_normal().log_normalizer, 10)
        0.7187722389
    """
    low, high = as_number("low", low), as_number("high", high)
    if not low < high:
        raise ValueError(f"low, high: got {low}, {high}, expected low < high.")
    # In terms of erf the density is exp(-x^2/2) and the mass sqrt(pi/2) (erf(high/sqrt 2) - erf(low/sqrt 2)).
    mass = math.sqrt(math.pi / 2) * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
    edge_low, edge_high = math.exp(-0.5 * low**2), math.exp(-0.5 * high**2)

    def sample(key: Key, n: int) -> Array:
        draws = jax.random.truncated_normal(key, low, high, (n,))
        margin = 2 * float(jnp.finfo(draws.dtype).eps) * (high - low)
        return jnp.clip(draws, low + margin, high - margin)

    return Target(
        name="truncated_normal",
        potential=NormalPotential(),
        base=ImproperUniform(constraints.interval(low, high), (), ()),
        log_normalizer=math.log(mass),
        sampler=sample,
        expectations={
            "x": (lambda x: x, (edge_low - edge_high) / mass),
            "x^2": (lambda x: x**2, 1.0 + (low * edge_low - high * edge_high) / mass),
        },
    )
