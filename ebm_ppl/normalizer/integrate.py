"""One-dimensional integrals of ``exp`` of a function whose location, scale and number of modes are not known.

``log ∫ exp f(z) dz`` for many problems side by side, in three steps. Search: nodes start on a grid that is linear near zero
and geometric far out, and move a few times to where tempered laws ``exp(f / 4^k)`` have their mass. Panels: their edges
divide the mass, and the variation of ``f``, into equal parts. Rule: each panel is integrated by the 15-point Kronrod rule,
whose difference from the embedded 7-point Gauss rule is the error.

Search and panels see ``f`` as a constant. The rule is differentiated with its nodes held, which is as exact as the rule is:
an integral does not depend on where its nodes are.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.normalizer import placement
from ebm_ppl.normalizer.axes import Axis
from ebm_ppl.normalizer.result import safe_logsumexp
from ebm_ppl.types import Array

PANEL_NODES = 15
"""Nodes of the rule in one panel."""
NUM_ROUNDS = 4
"""How often the nodes of the search move; each move resolves widths some ten times smaller."""

LogDensity = Callable[[Array], tuple[Array, Array]]
"""``f``: ``(node, problem) -> (log density, its own error in nats)``, both ``(node, problem)``."""


class Integral(NamedTuple):
    """``value`` is ``log ∫ exp f``, ``error`` an estimate of its numerical error in nats; both ``(problem,)``."""

    value: Array
    error: Array


def log_integral(log_density: LogDensity, axis: Axis, num_problems: int, num_panels: int, num_search: int) -> Integral:
    """``log ∫ exp f(z) dz`` over an axis, for every problem.

    Args:
        log_density: ``f`` and its own error.
        axis: The axis, as seen from the origin.
        num_problems: Problems side by side.
        num_panels: Panels of the final rule, of ``PANEL_NODES`` nodes each.
        num_search: Nodes of the search, evaluated ``NUM_ROUNDS + 1`` times.

    Returns:
        Values: minus infinity for an empty integral, NaN where ``f`` is NaN next to its mass. Errors: infinite where the
        mass does not end within the reach of the axis.

    Example:
        >>> from ebm_ppl.normalizer.axes import RealLine
        >>> line = RealLine(jnp.zeros(1), jnp.ones(1))
        >>> f = lambda z: (-0.5 * ((z - 30.0) / 0.05) ** 2, 0.0 * z)
        >>> run = jax.jit(lambda line: log_integral(f, line, num_problems=1, num_panels=16, num_search=96))
        >>> value, error = run(line)
        >>> bool(abs(value[0] - jnp.log(0.05 * (2 * jnp.pi) ** 0.5)) < 1e-5)
        True

    References:
        Kronrod (1965), Nodes and weights of quadrature formulas; Piessens, de Doncker-Kapenga, Ueberhuber, Kahaner (1983),
        QUADPACK.
    """
    t, log_mass = _search(log_density, axis, num_problems, num_search)
    # Seen from the middle of its mass an integral loses no digits to its location.
    view = axis.around(*_map(placement.middle)(t, _map(placement.relative)(log_mass)))
    z = axis.point(t)
    log_mass -= axis.log_speed(t)
    axis, t = view, view.parameter(z)
    log_mass += axis.log_speed(t)
    height = _map(placement.relative)(log_mass)
    edges = _map(lambda t, height: placement.panel_edges(t, height, num_panels + 1))(t, height)
    half, centres = jnp.diff(edges, axis=0) / 2, (edges[1:] + edges[:-1]) / 2
    nodes = (centres[:, None] + half[:, None] * jnp.asarray(_NODES, t.dtype)[:, None]).reshape(-1, num_problems)
    is_alive = _map(placement.find_alive)(t, height, nodes)
    # Where there is no mass the energy may overflow, and 0 * NaN would leak into gradients: evaluate at the mode instead.
    mode = jnp.take_along_axis(z, jnp.argmax(height, axis=0)[None], axis=0)
    value, own_error = log_density(jnp.where(is_alive, axis.point(nodes), mode))
    log_width = axis.log_speed(nodes) + jnp.log(jnp.repeat(half, PANEL_NODES, axis=0))
    terms = jnp.where(is_alive, value + log_width, -jnp.inf)
    total = safe_logsumexp(terms + jnp.log(jnp.asarray(np.tile(_KRONROD, num_panels), t.dtype))[:, None])
    is_empty = jnp.all(height <= placement.FLOOR, axis=0)
    is_broken = jnp.any(log_mass == jnp.inf, axis=0) | (is_empty & jnp.any(jnp.isnan(log_mass), axis=0))
    total = jnp.where(is_broken, jnp.nan, jnp.where(is_empty, -jnp.inf, total))
    error = _rule_error(jax.lax.stop_gradient(terms), total, own_error)
    if axis.has_tails:
        both_ways = jnp.concatenate([t, -t[::-1]], axis=1), jnp.concatenate([height, height[::-1]], axis=1)
        tails = _map(placement.tail)(*both_ways).reshape(2, num_problems).sum(axis=0)
        top = jnp.max(jnp.where(jnp.isnan(log_mass), -jnp.inf, log_mass), axis=0)
        error += jnp.exp(top - total) * tails
    # Whatever the rule, a floating-point number has an error of its own.
    error += jnp.finfo(t.dtype).eps * jnp.abs(total)
    return Integral(total, jax.lax.stop_gradient(jnp.where(jnp.isnan(error), jnp.inf, error)))


def _map(function: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function of ``(node,)`` arrays over a trailing problem axis."""
    return jax.vmap(function, in_axes=-1, out_axes=-1)


def _search(log_density: LogDensity, axis: Axis, num_problems: int, num_search: int) -> tuple[Array, Array]:
    """Nodes ``t`` near the mass, and the log densities in ``t`` there, both ``(node, problem)`` and constants."""
    levels = jnp.linspace(0.0, 1.0, num_search)

    def evaluate(t: Array) -> Array:
        return jax.lax.stop_gradient(log_density(axis.point(t))[0] + axis.log_speed(t))

    @_map
    def move(t: Array, log_mass: Array) -> Array:
        return placement.quantiles(t, placement.search_shares(t, placement.relative(log_mass)), levels)

    def visit(state: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], None]:
        t, log_mass = state[0], evaluate(state[0])
        return (move(t, log_mass), t, log_mass), None

    grid = jnp.broadcast_to(axis.grid(num_search)[:, None], (num_search, num_problems))
    (_, t, log_mass), _ = jax.lax.scan(visit, (grid, grid, grid), length=NUM_ROUNDS + 1)
    return t, log_mass


def _rule_error(terms: Array, total: Array, own_error: Array) -> Array:
    """Disagreement of the two rules over all panels, and the mean of the integrand's own error; ``(problem,)``."""
    density = jnp.exp(terms - total).reshape(-1, PANEL_NODES, total.size)
    kronrod, gauss = (jnp.asarray(weights, density.dtype)[:, None] for weights in (_KRONROD, _GAUSS))
    disagreement = jnp.abs(jnp.sum(density * (kronrod - gauss), axis=1))
    mass = density * kronrod
    # Below the precision of the sum even an error without bound, as inner integrals have far out, does not count.
    counts = mass > jnp.finfo(mass.dtype).eps
    own_error = jnp.where(counts, mass * own_error.reshape(mass.shape), 0.0)
    return jnp.sum(disagreement, axis=0) + jnp.sum(own_error, axis=(0, 1))


def _symmetric(values: list[float], sign: float) -> np.ndarray:
    return np.array([*(sign * value for value in values[:-1]), *values[::-1]])


# The rules of QUADPACK's qk15: positive nodes in decreasing order, their Kronrod weights, and their Gauss weights.
_NODES = _symmetric(
    [
        0.991455371120812639206854697526329,
        0.949107912342758524526189684047851,
        0.864864423359769072789712788640926,
        0.741531185599394439863864773280788,
        0.586087235467691130294144691693013,
        0.405845151377397166906606412076961,
        0.207784955007898467600689403773245,
        0.0,
    ],
    -1.0,
)
_KRONROD = _symmetric(
    [
        0.022935322010529224963732008058970,
        0.063092092629978553290700663189204,
        0.104790010322250183839876322541518,
        0.140653259715525918745189590510238,
        0.169004726639267902826583426598550,
        0.190350578064785409913256402421014,
        0.204432940075298892414161999234649,
        0.209482141084727828012999174891714,
    ],
    1.0,
)
_GAUSS = _symmetric(
    [
        0.0,
        0.129484966168869693270611432679082,
        0.0,
        0.279705391489276667901467771423780,
        0.0,
        0.381830050505118944950369775488975,
        0.0,
        0.417959183673469387755102040816327,
    ],
    1.0,
)
