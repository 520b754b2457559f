"""An EBM as a density in unconstrained space, all of its rows at once or one of them.

An EBM is known here by its ``unnormalized_log_prob``, ``transform``, ``support`` and shapes. Where the support is discrete,
unconstrained space is the support itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ebm_ppl.checks import is_traced
from ebm_ppl.densities import LogDensity
from ebm_ppl.types import Array, Key


def holds_tracers(ebm: Any) -> bool:
    """Whether an EBM depends on an abstract value of an enclosing trace; it may then be compiled with that trace only.

    A potential may be a closure over a traced value, which is no leaf of the EBM: one evaluation shows it.
    """
    dtype = int if ebm.support.is_discrete else float
    event = ebm.support.feasible_like(jnp.zeros(ebm.batch_shape + ebm.event_shape, dtype))
    return is_traced(ebm) or is_traced(ebm.unnormalized_log_prob(event))


def point_shape(ebm: Any) -> tuple[int, ...]:
    """Shape of one unconstrained point of one row."""
    if ebm.support.is_discrete:
        return ebm.event_shape
    # With the rows, because the edges of a support may have them, and NumPyro adds theirs to the shape.
    return ebm.transform.inverse_shape(ebm.batch_shape + ebm.event_shape)[len(ebm.batch_shape) :]


def constrain(ebm: Any, position: Array) -> tuple[Array, Array]:
    """Events and log Jacobians, ``(*lead, *batch, *point) -> (*lead, *batch, *event), (*lead, *batch)``."""
    if ebm.support.is_discrete:
        return position, jnp.zeros(position.shape[: position.ndim - len(ebm.event_shape)])
    event = ebm.transform(position)
    log_jacobian = ebm.transform.log_abs_det_jacobian(position, event)
    # Transforms of a scalar support give one term per coordinate.
    lead = event.shape[: event.ndim - len(ebm.event_shape)]
    return event, log_jacobian.reshape(*lead, -1).sum(axis=-1)


def unconstrain(key: Key, ebm: Any, draws: Array) -> Array:
    """Points of unconstrained space whose events are the given draws."""
    if ebm.support.is_discrete:
        return draws
    draw_point = sample_inverse(ebm)
    return ebm.transform.inv(draws) if draw_point is None else draw_point(key, draws)


def sample_inverse(ebm: Any) -> Any:
    """How to draw one of the many points that a map such as that from space onto the sphere takes to one event."""
    return getattr(ebm.transform, "sample_inverse", None)


def period_of(transform: Any) -> float | None:
    """The period of a map that wraps the line around a circle; ``None`` for all others."""
    while (inner := getattr(transform, "base_transform", None)) is not None:
        transform = inner
    return getattr(transform, "period", None)


def check_integrable(ebm: Any) -> None:
    """Unconstrained space must have room for the EBM once: there, a proposal of it is weighed.

    Raises:
        NotImplementedError: the support is a circle, or a product of them, around which unconstrained space is wrapped.
    """
    if not ebm.support.is_discrete and period_of(ebm.transform) is not None:
        raise NotImplementedError(
            f"ebm: got the support {ebm.support}, around which unconstrained space is wrapped without end, expected a map "
            "that is one to one: against a proposal on that space log Z would be infinite. Use "
            "ebm_ppl.normalizer.quadrature (up to two dimensions) or annealed_importance."
        )


class Coding(NamedTuple):
    """How the events of an EBM are coded, for kernels that have to know."""

    site_values: Any
    support: Any


def coding_of(ebm: Any) -> Coding:
    """What a discrete EBM says of its coding; the points of a continuous one are anywhere."""
    return Coding(getattr(ebm.potential, "site_values", None), ebm.support if ebm.support.is_discrete else None)


def row_densities(ebm: Any, reference: Any, row: Array) -> tuple[LogDensity, LogDensity]:
    """Log densities of the reference and of the EBM at one unconstrained point of one row, Jacobian included."""
    if ebm.condition is not None and not ebm.base.batch_shape and not reference.batch_shape:
        # One row by itself. Rows of a base cannot be taken apart in general, and are all evaluated for each.
        condition = jax.tree.map(lambda c: c[row][None], ebm.condition)
        ebm, row = type(ebm)(ebm.potential, ebm.base, condition=condition), jnp.zeros((), int)

    def log_density(distribution: Any, point: Array) -> Array:
        event, log_jacobian = constrain(ebm, jnp.broadcast_to(point, ebm.batch_shape + point.shape))
        return jnp.broadcast_to(distribution(event) + log_jacobian, ebm.batch_shape).reshape(-1)[row]

    return (
        lambda point: log_density(reference.log_prob, point),
        lambda point: log_density(ebm.unnormalized_log_prob, point),
    )


def mean_slope(ebm: Any, position: Array, weight: Array) -> Array:
    """Zero, whose gradient is the weighted mean of that of ``log base - U``, as the gradient of log Z is.

    Args:
        ebm: The EBM.
        position: Unconstrained points ``(particle, *batch, *point)``.
        weight: ``(particle, *batch)``, summing to one over the particles.
    """
    event, log_jacobian = constrain(ebm, position)
    log_density = jnp.where(weight > 0, ebm.unnormalized_log_prob(event) + log_jacobian, 0.0)
    return jnp.sum(weight * (log_density - jax.lax.stop_gradient(log_density)), axis=0)
