"""Score matching on half-lines and intervals, and on products of them: the boundary is weighed out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_positive, check_rows, is_traced
from ebm_ppl.objectives.domains import check_twice_differentiable, flat_rows
from ebm_ppl.objectives.score import hessian_diagonal
from ebm_ppl.regions import bounds_of, is_whole_space
from ebm_ppl.types import Array, Batch, Key, Potential, Scalar


def generalized_score_matching(
    potential: Potential,
    batch: Batch,
    key: Key,
    *,
    lower: Any = None,
    upper: Any = None,
    power: Any = 1.0,
    saturation: Any = None,
) -> Scalar:
    """Score matching on events with bounds: ``mean sum_j [ h_j (d_j U)^2 / 2 - h_j d_jj U - h_j' d_j U ]``.

    The weight ``h_j = min(distance of x_j to its nearest bound, saturation)^power`` vanishes at the bounds, so nothing is
    left there by the integration by parts: up to a constant, the loss is ``E_p sum_j h_j (d_j U + d_j log p)^2 / 2`` for
    data of density ``p``. An entry without bounds has the weight of an infinite distance, or 1 where that is not saturated.
    Like :func:`~ebm_ppl.objectives.score_matching` the loss is blind to how the mass is divided between separate modes.

    ``power=1`` is enough where ``p`` and the slope of ``U`` are bounded at the bounds. Where ``U`` contains a logarithm of
    the distance, as a gamma or beta energy does, ``h p d_j U`` must still vanish there: take ``power=2`` unless the density
    of the data itself vanishes at the bound.

    Args:
        potential: Energy of one event, twice differentiable inside. Its ``support`` is read, if it declares one: half-lines
            and intervals, and products of them. The circle counts as its interval.
        batch: Rows ``(row, *event)`` of one array, inside the bounds.
        key: Not used.
        lower: Lower bounds, for a potential that declares no support; broadcast to an event, ``-inf`` for none.
        upper: Upper bounds likewise.
        power: Exponent of the distance, positive; 1 and 2 are usual.
        saturation: Distance, in the units of the events, beyond which the weight grows no more. Without one the rows
            furthest from the bounds weigh most; the spread of the data is a good choice on half-lines.

    Returns:
        The loss. NaN where, inside a compiled program, a row is outside the bounds.

    Raises:
        TypeError: integer rows, or options that are not numbers.
        ValueError: no bounds, both declared and given bounds, a support of another kind (a simplex, a sphere), rows
            outside it, or ``power`` or ``saturation`` not positive.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> loss = functools.partial(generalized_score_matching, lambda x: 0.5 * x**2, lower=0.0)
        >>> float(jax.jit(loss)(jnp.array([0.5, 1.0]), jax.random.key(0)))  # mean of x^3 / 2 - 2 x
        -1.21875

    References:
        Hyvärinen (2007), Some extensions of score matching, Computational Statistics and Data Analysis 51; Yu, Drton,
        Shojaie (2019), Generalized score matching for non-negative data, arXiv:1812.10551; Yu, Drton, Shojaie (2022),
        Generalized score matching for general domains, arXiv:2009.11428.
    """
    power = check_positive("power", power)
    saturation = None if saturation is None else check_positive("saturation", saturation)
    if not isinstance(batch, np.ndarray | jax.Array):
        raise TypeError(f"batch: got a {type(batch).__name__}, expected one array of shape (row, *event).")
    shape = tuple(batch.shape[1:])
    flat = flat_rows("generalized_score_matching", potential, batch)
    check_twice_differentiable("generalized_score_matching", flat)
    box = _find_box(potential, lower, upper, shape, flat.rows.dtype)
    declared = getattr(potential, "support", None)
    if declared is None:
        check_rows("batch", flat.rows, support=box)
    gradient = jax.grad(flat.energy)

    def weight(x: Array) -> Array:
        distance = jnp.minimum(x - box.lower, box.upper - x)
        if saturation is not None:
            return jnp.minimum(distance, saturation.astype(x.dtype)) ** power.astype(x.dtype)
        is_bounded = jnp.isfinite(box.lower) | jnp.isfinite(box.upper)
        return jnp.where(is_bounded, jnp.where(is_bounded, distance, 1.0) ** power.astype(x.dtype), 1.0)

    def row_loss(x: Array) -> Scalar:
        # An entry's weight depends on that entry alone: the tangent of ones gives every derivative.
        h, slope_of_h = jax.jvp(weight, (x,), (jnp.ones_like(x),))
        slope = gradient(x)
        return jnp.sum(h * (0.5 * slope**2 - hessian_diagonal(gradient, x)) - slope_of_h * slope)

    loss = jax.vmap(row_loss)(flat.rows).mean()
    # A value is all that a compiled program can refuse with; training stops at it and says so.
    inside = box(flat.rows) if declared is None else declared(flat.rows.reshape(-1, *shape))
    return jnp.where(jnp.all(inside), loss, jnp.nan)


class _Box(NamedTuple):
    """Bounds of a flattened event, ``(dim,)`` each."""

    lower: Array
    upper: Array

    def __call__(self, rows: Array) -> Array:
        return (rows >= self.lower) & (rows <= self.upper)

    def __str__(self) -> str:
        low, high = (np.unique(np.asarray(bound)).tolist() for bound in self)
        return f"bounds {low} and {high}"


def _find_box(potential: Potential, lower: Any, upper: Any, shape: tuple[int, ...], dtype: Any) -> _Box:
    declared = getattr(potential, "support", None)
    if declared is None:
        if lower is None and upper is None:
            raise ValueError(
                "lower, upper: got neither, with a potential that declares no support, expected bounds. Pass lower=0.0 for "
                "positive events, tilt the energy by a base with that support, or use score_matching on the whole space."
            )
        bounds = (-jnp.inf if lower is None else lower, jnp.inf if upper is None else upper)
    else:
        if lower is not None or upper is not None:
            raise ValueError(
                f"lower, upper: got {lower}, {upper} with a potential whose support is declared, expected neither: the "
                "bounds are read from it."
            )
        bounds = None if getattr(declared, "is_discrete", False) else bounds_of(declared)
        if bounds is None:
            event = jnp.zeros(shape, dtype)
            remedy = (
                "Use score_matching."
                if is_whole_space(declared, event)
                else "Transform the events to the whole space and use score_matching there."
            )
            raise ValueError(
                f"potential: generalized_score_matching got one whose support is {declared}, expected half-lines or "
                f"intervals. {remedy}"
            )
    if is_traced(bounds):
        return _broadcast(bounds, shape, dtype)
    with jax.ensure_compile_time_eval():  # bounds are known also while a program around them is being compiled
        box = _broadcast(bounds, shape, dtype)
        if not bool((box.lower < box.upper).all()):
            raise ValueError(f"lower, upper: got {bounds[0]}, {bounds[1]}, expected lower bounds below upper ones.")
        if not bool((jnp.isfinite(box.lower) | jnp.isfinite(box.upper)).any()):
            raise ValueError("lower, upper: got no finite bound, expected at least one. Use score_matching.")
    return box


def _broadcast(bounds: tuple[Any, Any], shape: tuple[int, ...], dtype: Any) -> _Box:
    try:
        bounds = (_real(bounds[0]), _real(bounds[1]))
        return _Box(*(jnp.broadcast_to(jnp.asarray(bound, dtype), shape).reshape(-1) for bound in bounds))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lower, upper: got {bounds[0]}, {bounds[1]}, expected numbers that broadcast to an event of shape {shape}."
        ) from error


def _real(bound: Any) -> Array:
    array = jnp.asarray(bound)
    if jnp.iscomplexobj(array):
        raise TypeError("complex numbers have no order")
    return array
