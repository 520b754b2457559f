"""The energy distance between two sets of draws."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_array
from ebm_ppl.types import Array


class EnergyDistance(NamedTuple):
    """An estimate of the energy distance.

    Attributes:
        value: ``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, unbiased, so that it may be negative where both laws are one.
        standard_error: Of the value; where the laws are one, what is left of it is of smaller order than this says.
    """

    value: float
    standard_error: float


def energy_distance(first: Any, second: Any) -> EnergyDistance:
    """The energy distance of two laws from independent draws of each: zero where they are one, and positive otherwise.

    ``D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'|`` with Euclidean lengths of flattened events. Its square root is a distance.
    The work grows with the product of the numbers of draws.

    Args:
        first: ``(n, *event)``, at least two.
        second: ``(m, *event)``.

    Returns:
        The estimate; NaN where a draw is not finite.

    Raises:
        TypeError: ``first`` or ``second`` are no arrays of real numbers.
        ValueError: the events have different shapes, or there are fewer than two draws of one.

    Example:
        >>> key = jax.random.key(0)
        >>> found = energy_distance(jax.random.normal(key, (500, 2)), 1.0 + jax.random.normal(key, (500, 2)))
        >>> found.value > 10 * found.standard_error
        True

    References:
        Szekely, Rizzo (2013), Energy statistics: a class of statistics based on distances, equation 5.
    """
    sets = [as_array(name, draws) for name, draws in (("first", first), ("second", second))]
    for name, one in zip(("first", "second"), sets, strict=True):
        if jnp.iscomplexobj(one):
            raise TypeError(f"{name}: got dtype {one.dtype}, expected real numbers.")
    if sets[0].shape[1:] != sets[1].shape[1:] or any(x.ndim == 0 or x.shape[0] < 2 for x in sets):
        raise ValueError(
            f"second: got shape {sets[1].shape} with first of shape {sets[0].shape}, expected at least two draws each, of "
            "events of one shape."
        )
    x, y = (one.reshape(one.shape[0], -1).astype(jnp.result_type(one, jnp.float32)) for one in sets)
    if not all(bool(jnp.isfinite(one).all()) for one in (x, y)):
        return EnergyDistance(np.nan, np.nan)
    # Lengths, not squares, have to fit into the numbers.
    unit = max(float(jnp.abs(one).max()) for one in (x, y)) or 1.0
    x, y = x / unit, y / unit
    across_x, across_y = (np.asarray(_mean_lengths(*pair), np.float64) for pair in ((x, y), (y, x)))
    within_x, within_y = (np.asarray(_mean_lengths(one, one), np.float64) * len(one) / (len(one) - 1) for one in (x, y))
    value = across_x.mean() + across_y.mean() - within_x.mean() - within_y.mean()
    # To first order every draw moves the estimate by twice what its own lengths differ.
    variance = sum(
        (2.0 * (across - within)).var(ddof=1) / len(across)
        for across, within in ((across_x, within_x), (across_y, within_y))
    )
    return EnergyDistance(float(unit * value), float(unit * np.sqrt(variance)))


@jax.jit
def _mean_lengths(points: Array, others: Array) -> Array:
    """Mean distance of every point from all others, ``(point,)``, a few points at a time."""

    def of_one(point: Array) -> Array:
        return jnp.sqrt(jnp.sum((others - point) ** 2, axis=1)).mean()

    return jax.lax.map(of_one, points, batch_size=32)
