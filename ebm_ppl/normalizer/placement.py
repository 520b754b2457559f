"""Where the nodes of an integral belong, judged from the log density at the nodes so far.

Every function here works on one problem: nodes ``t`` in increasing order, ``(node,)``, and relative log densities
``height``, ``(node,)``, with maximum 0 and :data:`FLOOR` where there is no density. Between nodes the log density is taken
to be linear.
"""

import jax
import jax.numpy as jnp

from ebm_ppl.types import Array

NUM_TEMPERATURES = 12
COOLING = 6.0
"""Laws tempered to ``1, 1/6, ..., 1/6^11``: as wide as the mass, and up to some 20,000 times wider."""
MASS_SHARE = 0.7
"""How much of the search goes to where the mass may be; the rest follows the slopes."""
ALIVE = -40.0
"""Panels cover what is higher than this; ``exp(-40)`` is below the precision of either float type."""
FLOOR = -1e30
"""Stands for minus infinity where differences are taken."""


def relative(log_density: Array) -> Array:
    """Heights below the maximum; NaN and minus infinity, where there is nothing to integrate, become the floor."""
    log_density = jnp.where(jnp.isnan(log_density), -jnp.inf, log_density)
    top = jnp.max(log_density)
    return jnp.maximum(log_density - jnp.where(jnp.isfinite(top), top, 0.0), FLOOR)


def masses(t: Array, height: Array) -> Array:
    """Share of each interval in the total mass, ``(node - 1,)``: ``∫ exp`` of a straight line, normalised."""
    drop = jnp.abs(jnp.diff(height))
    # (1 - exp(-d)) / d, with its limit.
    is_flat = drop < 1e-3
    mean = jnp.where(is_flat, 1.0 - drop / 2, -jnp.expm1(-drop) / jnp.where(is_flat, 1.0, drop))
    # Where there is no density at all every mass is zero, and stays so.
    mass = jnp.exp(jnp.maximum(height[1:], height[:-1])) * mean * jnp.diff(t)
    return mass / jnp.maximum(jnp.sum(mass), jnp.finfo(mass.dtype).tiny)


def variation(height: Array) -> Array:
    """Share of each interval in the total variation of ``asinh sqrt(-2 height)``, ``(node - 1,)``.

    That is the distance from a Gaussian mode in standard deviations, on a logarithmic scale: it grows along every slope,
    however steep, and along the slopes of every mode, however narrow or light.
    """
    change = jnp.abs(jnp.diff(jnp.arcsinh(jnp.sqrt(-2.0 * height))))
    return change / jnp.maximum(jnp.sum(change), 1e-6)


def search_shares(t: Array, height: Array) -> Array:
    """Where to look next: the average of :func:`masses` over tempered laws, and some of :func:`variation`.

    A cold law is as narrow as the mass, but where the nodes are still coarse it knows only the mode nearest to a node. Hot
    laws hold all modes that the nodes can tell apart, and so bring the next nodes closer to each of them.
    """

    def add(k: Array, total: Array) -> Array:
        return total + masses(t, height * COOLING**-k)

    total = jax.lax.fori_loop(0, NUM_TEMPERATURES, add, jnp.zeros_like(t[1:]))
    return MASS_SHARE * total / NUM_TEMPERATURES + (1.0 - MASS_SHARE) * variation(height)


def quantiles(t: Array, share: Array, level: Array) -> Array:
    """Points below which the given levels, in [0, 1], of the shares lie; a share is spread evenly over its interval."""
    until = jnp.cumsum(share)
    target = level * until[-1]
    index = jnp.minimum(jnp.searchsorted(until, target, side="right"), share.size - 1)
    own = share[index]
    # Only at the very end can the interval found be empty.
    fraction = jnp.where(own > 0, (target - until[index] + own) / jnp.where(own > 0, own, 1.0), 1.0)
    fraction = jnp.clip(fraction, 0.0, 1.0)
    return t[index] + fraction * (t[index + 1] - t[index])


def alive_intervals(height: Array) -> Array:
    """Which intervals may hold mass, ``(node - 1,)``."""
    return jnp.maximum(height[1:], height[:-1]) > ALIVE


def panel_edges(t: Array, height: Array, num_edges: int) -> Array:
    """Edges that cut the intervals with mass into panels on each of which a polynomial rule does well.

    Panels share the mass, so that a plateau gets its part, and the :func:`variation`, so that each mode and slope does.
    """
    is_alive = alive_intervals(height)
    index = jnp.arange(1, t.size)
    first, last = jnp.argmax(is_alive), jnp.max(jnp.where(is_alive, index, 0))
    share = 0.4 * masses(t, height) + 0.6 * variation(jnp.maximum(height, ALIVE))
    share = jnp.where(is_alive, share, 0.0)
    return quantiles(jnp.clip(t, t[first], t[last]), share, jnp.linspace(0.0, 1.0, num_edges))


def tail(t: Array, height: Array) -> Array:
    """Mass beyond the last node with density, relative to ``exp(max)``: the fall from the mode to it goes on as a line.

    Infinite where nothing falls: the mass goes on, or is cut off.
    """
    index = jnp.arange(t.size)
    last_alive = jnp.max(jnp.where(height > ALIVE, index, 0))
    # The node after the last one with mass has less beyond it, if it is there.
    after = jnp.minimum(last_alive + 1, t.size - 1)
    last = jnp.where(height[after] > FLOOR / 2, after, last_alive)
    drop = -height[last]
    length = (t[last] - t[jnp.argmax(height)]) / jnp.where(drop > 0, drop, 1.0)
    return jnp.where(drop > 0, jnp.exp(-drop) * length, jnp.inf)


def middle(t: Array, height: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of ``t`` under the mass."""
    share, centre = masses(t, height), (t[1:] + t[:-1]) / 2
    mean = jnp.sum(share * centre)
    return mean, jnp.sqrt(jnp.sum(share * (centre - mean) ** 2))


def find_alive(t: Array, height: Array, nodes: Array) -> Array:
    """Whether each of other nodes lies in an interval that may hold mass."""
    after = jnp.searchsorted(t, nodes, side="right")
    return alive_intervals(height)[jnp.clip(after - 1, 0, t.size - 2)]
