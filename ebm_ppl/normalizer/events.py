"""Refusals of events that an EBM does not have."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_array, is_traced
from ebm_ppl.normalizer.unconstrained import sample_inverse
from ebm_ppl.types import Array


def check_events(name: str, ebm: Any, events: Any, lead: tuple[str, ...]) -> Array:
    """Events of an EBM, ``(*lead, *batch, *event)``: of its shape and kind, finite, and inside its support.

    Args:
        name: How the error names the argument.
        ebm: The EBM.
        events: Numbers.
        lead: What the leading axes are called.

    Raises:
        TypeError: not numbers, complex ones, or none of floating kind where the support is continuous.
        ValueError: another shape, no events, or some of them NaN, infinite or outside the support.
    """
    events = as_array(name, events)
    shape = ebm.batch_shape + ebm.event_shape
    if events.ndim != len(lead) + len(shape) or events.shape[len(lead) :] != shape:
        expected = ", ".join([*lead, *map(str, shape)])
        raise ValueError(
            f"{name}: got shape {events.shape}, expected ({expected}): batch_shape {ebm.batch_shape} and event_shape "
            f"{ebm.event_shape} are those of the EBM."
        )
    if events.size == 0:
        raise ValueError(f"{name}: got shape {events.shape}, which is empty; expected at least one event.")
    is_floating = jnp.issubdtype(events.dtype, jnp.floating)
    if jnp.issubdtype(events.dtype, jnp.complexfloating) or not (is_floating or ebm.support.is_discrete):
        raise TypeError(f"{name}: got dtype {events.dtype}, expected floating events on the support {ebm.support}.")
    if not is_traced(events, ebm.support):
        _refuse(name, ebm, events, jnp.isfinite(events), "NaN or infinite", "finite ones")
        _refuse(name, ebm, events, ebm.support(events), "outside the support", f"events in {ebm.support}")
    return events


def check_site(ebm: Any) -> None:
    """An EBM, told by its unnormalised density.

    Raises:
        TypeError: it is something else.
    """
    if not callable(getattr(ebm, "unnormalized_log_prob", None)):
        raise TypeError(f"ebm: got {type(ebm).__name__}, expected an ebm_ppl.EBM.")


def check_samples(ebm: Any, samples: Any, lead: tuple[str, ...] = ("sample",), minimum: int = 2) -> Array:
    """Draws of an EBM, ``(*lead, *batch, *event)``, from which chains may start in unconstrained space.

    Raises:
        TypeError: see :func:`check_events`.
        ValueError: see there; or there are fewer than ``minimum``, or some of them on the edge of the support.
    """
    check_site(ebm)
    samples = check_events("samples", ebm, samples, lead)
    if samples.shape[len(lead) - 1] < minimum:
        raise ValueError(f"samples: got shape {samples.shape}, expected at least {minimum} along the {lead[-1]} axis.")
    if not ebm.support.is_discrete and sample_inverse(ebm) is None:
        points = ebm.transform.inv(samples)
        if not is_traced(points):
            what = "on the edge of the support, where unconstrained coordinates are infinite"
            is_inside = (
                jnp.isfinite(points).reshape(*samples.shape[: len(lead) + len(ebm.batch_shape)], -1).all(axis=-1)
            )
            _refuse("samples", ebm, samples, is_inside, what, "draws inside it")
    return samples


def _refuse(name: str, ebm: Any, events: Array, is_good: Any, what: str, expected: str) -> None:
    lead = events.shape[: events.ndim - len(ebm.event_shape)]
    is_good = np.asarray(is_good)
    is_good = is_good.reshape(*lead, -1).all(axis=-1) if is_good.ndim > len(lead) else np.broadcast_to(is_good, lead)
    if not is_good.all():
        index = np.argwhere(~is_good)[0].tolist()
        raise ValueError(
            f"{name}: got {int((~is_good).sum())} of {is_good.size} events {what}, the first at index "
            f"{index[0] if len(index) == 1 else tuple(index)}; expected {expected}."
        )
