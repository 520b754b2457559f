"""Score matching: the gradient of the energy is fitted to that of the data's log density, and log Z never appears.

With ``s = -grad U`` and the data density ``p``, the Fisher divergence ``E_p |s - grad log p|^2 / 2`` is, by an integration
by parts, ``E_p [|grad U|^2 / 2 - trace of the Hessian of U]`` and a constant. It needs a smooth energy on the whole space:
where ``p`` ends at a boundary the parts do not vanish, and the losses here refuse potentials that say so.

All of them look at gradients where the data are. Between modes that are far apart there are no data, so how the mass is
divided between the modes is invisible: mixtures of weights .2/.8 and .5/.5 have the same loss to rounding. Use
:func:`~ebm_ppl.objectives.energy_discrepancy` with a large noise, or a likelihood, where the weights matter.
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count
from ebm_ppl.objectives.domains import check_twice_differentiable, check_whole_space, flat_rows
from ebm_ppl.types import Array, Batch, Key, Potential, Scalar

Trace = Literal["exact", "hutchinson"]
Directions = Literal["rademacher", "gaussian", "sphere"]
"""Random vectors ``v`` with ``E[v v'] = I``: signs, standard normal, or uniform on the sphere of radius ``sqrt(dim)``."""

REMEDY = "Use generalized_score_matching, which weighs the boundary out, or transform the events to the whole space."


def score_matching(
    potential: Potential,
    batch: Batch,
    key: Key,
    *,
    trace: Trace = "exact",
    num_probes: int = 1,
    probes: Directions = "rademacher",
) -> Scalar:
    """Score matching: ``mean_n [ |grad U(x_n)|^2 / 2 - tr hess U(x_n) ]``.

    The exact trace costs as many Hessian-vector products per row as an event has entries; Hutchinson's estimate
    ``mean_m v_m' hess U v_m`` costs ``num_probes`` and is unbiased. It does not see how the mass is divided between modes
    that are far apart.

    Args:
        potential: Energy of one event, twice differentiable, on the whole space.
        batch: Rows ``(row, *event)``, or a pytree of such arrays.
        key: Random key of the probes; not used by the exact trace.
        trace: ``"exact"`` or ``"hutchinson"``.
        num_probes: Random vectors per row for Hutchinson's estimate.
        probes: Their law; Rademacher vectors have the smallest variance, and none where the Hessian is diagonal.

    Returns:
        The loss, the Fisher divergence up to a constant of the data; it may be negative.

    Raises:
        TypeError: integer rows, or an energy that is not real floating.
        ValueError: an unknown option, no probes, rows that are not finite, a support with a boundary, or an energy of ReLU
            units, whose curvature autodiff does not see.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> loss = functools.partial(score_matching, lambda x: 0.5 * jnp.sum(x**2))
        >>> float(jax.jit(loss)(jnp.array([[1.0, 2.0]]), jax.random.key(0)))  # 5 / 2 - 2
        0.5

    References:
        Hyvärinen (2005), Estimation of non-normalized statistical models by score matching, Journal of Machine Learning
        Research 6, theorem 1; Hutchinson (1989), Communications in Statistics 18, for the trace.
    """
    if trace not in get_args(Trace):
        raise ValueError(f"trace: got {trace!r}, expected one of {list(get_args(Trace))}.")
    flat = flat_rows("score_matching", potential, batch)
    check_whole_space("score_matching", potential, flat, REMEDY)
    check_twice_differentiable("score_matching", flat)
    check_directions("probes", probes, "num_probes", num_probes)
    if trace == "hutchinson":
        vectors = draw_directions(key, probes, num_probes, flat.rows)
        return _along_directions(flat.energy, flat.rows, vectors, variance_reduced=True)
    gradient = jax.grad(flat.energy)

    def row_loss(x: Array) -> Scalar:
        return 0.5 * jnp.sum(gradient(x) ** 2) - jnp.sum(hessian_diagonal(gradient, x))

    return jax.vmap(row_loss)(flat.rows).mean()


def sliced_score_matching(
    potential: Potential,
    batch: Batch,
    key: Key,
    *,
    num_projections: int = 1,
    projections: Directions = "rademacher",
    variance_reduced: bool = False,
) -> Scalar:
    """Sliced score matching: ``mean [ (v' grad U)^2 / 2 - v' hess U v ]`` over rows and random directions ``v``.

    Since ``E[v v'] = I`` its expectation is that of :func:`score_matching`. With ``variance_reduced=True`` the first term
    is taken at its expectation ``|grad U|^2 / 2``, which costs nothing; that is score matching with Hutchinson's trace.

    Args:
        potential: Energy of one event, twice differentiable, on the whole space.
        batch: Rows ``(row, *event)``, or a pytree of such arrays.
        key: Random key of the directions.
        num_projections: Directions per row.
        projections: Their law, ``"rademacher"``, ``"gaussian"`` or ``"sphere"``.
        variance_reduced: Whether the first term is exact.

    Returns:
        The loss, unbiased for that of :func:`score_matching`.

    Raises:
        TypeError: integer rows, or an energy that is not real floating.
        ValueError: an unknown option, no projections, rows that are not finite, a support with a boundary, or an energy of
            ReLU units.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> loss = functools.partial(sliced_score_matching, lambda x: 0.5 * jnp.sum(x**2), variance_reduced=True)
        >>> float(jax.jit(loss)(jnp.array([[1.0, 2.0]]), jax.random.key(0)))
        0.5

    References:
        Song, Garg, Shi, Ermon (2019), Sliced score matching, arXiv:1905.07088, section 3.
    """
    flat = flat_rows("sliced_score_matching", potential, batch)
    check_whole_space("sliced_score_matching", potential, flat, REMEDY)
    check_twice_differentiable("sliced_score_matching", flat)
    check_directions("projections", projections, "num_projections", num_projections)
    vectors = draw_directions(key, projections, num_projections, flat.rows)
    return _along_directions(flat.energy, flat.rows, vectors, variance_reduced=variance_reduced)


def hessian_diagonal(gradient: Callable[[Array], Array], x: Array) -> Array:
    """Diagonal of the Jacobian of ``gradient`` at one vector, ``(dim,)``, a bounded number of columns at a time."""

    def entry(unit: Array) -> Scalar:
        return unit @ jax.jvp(gradient, (x,), (unit,))[1]

    return jax.lax.map(entry, jnp.eye(x.size, dtype=x.dtype), batch_size=64)


def check_directions(name: str, law: Directions, count_name: str, count: int) -> None:
    """The law must be one of ours, and at least one direction asked for.

    Raises:
        TypeError: ``count`` is not a whole number.
        ValueError: an unknown law, or ``count < 1``.
    """
    if law not in get_args(Directions):
        raise ValueError(f"{name}: got {law!r}, expected one of {list(get_args(Directions))}.")
    check_count(count_name, count)


def draw_directions(key: Key, law: Directions, count: int, rows: Array) -> Array:
    """Random directions ``(row, count, dim)`` with ``E[v v'] = I``."""
    shape = (rows.shape[0], count, rows.shape[1])
    if law == "rademacher":
        return jax.random.rademacher(key, shape, rows.dtype)
    vectors = jax.random.normal(key, shape, rows.dtype)
    if law == "gaussian":
        return vectors
    return vectors * jnp.sqrt(rows.shape[1]) / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def _along_directions(
    energy: Callable[[Array], Scalar], rows: Array, vectors: Array, *, variance_reduced: bool
) -> Scalar:
    gradient = jax.grad(energy)

    def row_loss(x: Array, directions: Array) -> Scalar:
        slope, products = jax.linearize(gradient, x)
        curvature = jax.vmap(lambda v: v @ products(v))(directions)
        squared = jnp.sum(slope**2) if variance_reduced else (directions @ slope) ** 2
        return jnp.mean(0.5 * squared - curvature)

    return jax.vmap(row_loss)(rows, vectors).mean()
