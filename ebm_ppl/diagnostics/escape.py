"""Whether an energy falls without end somewhere, or never rises: then ``exp(-U)`` has no integral."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_potential, check_rows
from ebm_ppl.regions import is_whole_space
from ebm_ppl.types import Array, Key, Potential

RADII = tuple(10.0**power for power in range(1, 7))
"""Distances at which the energy is looked at, in standard deviations of the data."""
NUM_DIRECTIONS, NUM_DESCENTS = 256, 50


class Escape(NamedTuple):
    """A direction in which the energy never rises.

    Attributes:
        direction: Unit vector, flattened events.
        energies: At the distances :data:`RADII` from the mean of the data, in its standard deviations.
    """

    direction: np.ndarray
    energies: np.ndarray


def find_escape(key: Key, potential: Potential, data: Any) -> Escape | None:
    """Look for a direction in which the energy falls and falls, or never rises, so that ``exp(-U)`` has no integral.

    Rays go out from the mean of the data, to 10, 100 and so on up to a million of its standard deviations, in random
    directions and along its principal axes; each direction is then turned downhill at the largest distance, step by step.
    An energy that is no higher at any distance than at the one before, or minus infinity, is found out: one that falls, and
    one that is flat, as a network of bounded units is far from its data without a base. What is not found may
    be there all the same: a fall in a narrow cone of many dimensions. And an energy that turns upwards only beyond a
    million standard deviations is taken for one that falls.

    Args:
        key: Random key.
        potential: Energy of one event, base included.
        data: Rows ``(row, *event)``, for where the middle is and how wide.

    Returns:
        The direction of the deepest fall, or a flat one; ``None`` where none was found, and for potentials whose support is
        not all space.

    Raises:
        TypeError: rows that are not real numbers.
        ValueError: the energy does not fit one row, or the rows are all alike.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> rows = jax.random.normal(jax.random.key(0), (100, 3))
        >>> curvature = jnp.array([1.0, 1.0, -0.1])
        >>> found = find_escape(jax.random.key(1), lambda x: 0.5 * jnp.sum(curvature * x**2), rows)
        >>> bool(abs(found.direction[2]) > 0.99), find_escape(jax.random.key(1), lambda x: jnp.sum(x**2), rows)
        (True, None)
    """
    rows = check_rows("data", data)
    check_potential(potential, rows[0])
    support = getattr(potential, "support", None)
    if support is not None and not is_whole_space(support, rows[0]):
        return None
    event_shape = rows.shape[1:]
    flat = rows.reshape(rows.shape[0], -1)
    centre, scale = flat.mean(axis=0), jnp.sqrt(flat.var(axis=0).mean())
    if not float(scale) > 0.0:
        raise ValueError(f"data: got {len(rows)} rows that are all alike, expected some that differ, for their scale.")
    axes = jnp.asarray(np.linalg.svd(np.asarray(flat - centre), full_matrices=False)[2], flat.dtype)
    random = jax.random.normal(key, (NUM_DIRECTIONS, flat.shape[1]), flat.dtype)
    directions = jnp.concatenate([axes, -axes, random / jnp.linalg.norm(random, axis=1, keepdims=True)])
    start = jax.tree.map(lambda x: jnp.asarray(x) if eqx.is_array_like(x) else x, potential)
    directions, energies = (np.asarray(x) for x in _along_rays(start, centre, scale, directions, event_shape))
    farther = energies[:, 1:]
    falls = np.all(((farther <= energies[:, :-1]) & ~np.isposinf(farther)) | np.isneginf(farther), axis=1)
    if not falls.any():
        return None
    deepest = int(np.argmin(np.where(falls, energies[:, -1], np.inf)))
    return Escape(directions[deepest], energies[deepest])


@eqx.filter_jit
def _along_rays(
    potential: Potential, centre: Array, scale: Array, directions: Array, event_shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Directions turned downhill, and the energies along them, ``(direction, radius)``."""

    def energy(direction: Array, radius: Any) -> Array:
        return potential((centre + radius * scale * direction).reshape(event_shape))

    def turn(direction: Array) -> Array:
        slope = jax.grad(energy)(direction, RADII[-1])
        slope = slope - direction * jnp.sum(direction * slope)
        length = jnp.linalg.norm(slope)
        moved = direction - 0.1 * jnp.where(length > 0, slope / length, 0.0)
        moved = jnp.where(jnp.isfinite(moved).all(), moved, direction)
        return moved / jnp.linalg.norm(moved)

    turned = jax.lax.fori_loop(0, NUM_DESCENTS, lambda _, all_of_them: jax.vmap(turn)(all_of_them), directions)
    directions = jnp.concatenate([directions, turned])
    energies = jax.vmap(lambda d: jnp.stack([energy(d, radius) for radius in RADII]))(directions)
    return directions, energies
