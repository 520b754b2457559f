"""A standard normal law cut to an interval."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.checks import as_number
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Key, Scalar

_FAR = 4.0
"""Beyond it draws by the inverse of the distribution function are no longer accurate in float32."""


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
        low: Left end, at most 4.
        high: Right end, at least -4.

    Raises:
        ValueError: ``low`` is not below ``high``, or the interval is in the tails.

    Example:
        >>> round(truncated_normal().log_normalizer, 10)
        0.7187722389
    """
    low, high = as_number("low", low), as_number("high", high)
    if not low < high:
        raise ValueError(f"low, high: got {low}, {high}, expected low < high.")
    if low > _FAR or high < -_FAR:
        raise ValueError(f"low, high: got {low}, {high}, expected an interval that reaches to within {_FAR} of zero.")
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
