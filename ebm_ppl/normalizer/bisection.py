"""Roots of monotone functions, by halving."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ebm_ppl.types import Array


def bracket_sign_change(function: Callable[[Array], Array], low: Array, high: Array) -> tuple[Array, Array]:
    """Where an increasing function changes sign: the last point below zero, the first not below, elementwise.

    Args:
        function: From an array to one of the same shape, increasing in every element; NaN counts as not below zero.
        low: Where it is below zero.
        high: Where it is not.

    Example:
        >>> low, high = bracket_sign_change(lambda x: x**2 - 2.0, jnp.zeros(()), jnp.array(2.0))
        >>> round(float(low), 5)
        1.41421
    """

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + 0.5 * (high - low)
        is_below = function(middle) < 0
        return jnp.where(is_below, middle, low), jnp.where(is_below, high, middle)

    # So many that a bracket of a few thousand has shrunk to the rounding of numbers near one.
    num_halvings = jnp.finfo(low.dtype).nmant + 12
    return jax.lax.fori_loop(0, num_halvings, halve, (low, high))
