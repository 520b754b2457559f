"""Which part of space a support leaves to its events."""

from typing import Any

import jax
import numpy as np

from ebm_ppl.checks import is_traced
from ebm_ppl.types import Event


def is_whole_space(support: Any, event: Event) -> bool:
    """Whether a constraint accepts every real event; asked by its bounds, or else at a few points.

    Args:
        support: A NumPyro constraint, or any function that says which events are inside.
        event: One event, for its shapes.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> event = jnp.zeros(2)
        >>> [is_whole_space(support, event) for support in (dist.constraints.real_vector, dist.constraints.simplex)]
        [True, False]
    """
    if getattr(support, "is_discrete", False):
        return False
    bounds = bounds_of(support)
    if bounds is not None:
        return not is_traced(bounds) and not np.isfinite(np.concatenate([np.ravel(bound) for bound in bounds])).any()
    far = np.float32(1e30)

    def points(x: Any) -> np.ndarray:
        alternating = np.where(np.arange(np.size(x)) % 2, -far, far).reshape(np.shape(x))
        fixed = [np.full(np.shape(x), value, np.float32) for value in (-far, far, 0.0, 0.5)]
        return np.stack([alternating, -alternating, *fixed])

    # Constraints are evaluated on numbers of ours also while a program around them is being compiled.
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
        return bool(np.all(np.asarray(support(jax.tree.map(points, event)))))


def bounds_of(support: Any) -> tuple[Any, Any] | None:
    """Lower and upper bounds of a half-line or an interval, or of a product of them; ``None`` for any other support.

    Example:
        >>> import numpyro.distributions as dist
        >>> bounds_of(dist.Uniform(0.0, 2.0).expand([3]).to_event(1).support)
        (0.0, 2.0)
    """
    while (inner := getattr(support, "base_constraint", None)) is not None:
        support = inner
    if getattr(support, "event_dim", 0):
        return None
    lower, upper = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if lower is None and upper is None:
        return None
    return -np.inf if lower is None else lower, np.inf if upper is None else upper


def check_base(base: Any, event: Event) -> None:
    """A distribution over all of the space in which the events are.

    Raises:
        TypeError: it is no distribution with a support.
        ValueError: its support is a part of the space.
    """
    support = getattr(base, "support", None)
    if support is None or not callable(getattr(base, "log_prob", None)):
        raise TypeError(f"base: got {type(base).__name__}, expected a NumPyro distribution of one event.")
    if not is_whole_space(support, event):
        raise ValueError(f"base: got one on {describe_region(support)}, expected one on the whole space.")


def describe_region(support: Any) -> str:
    """A support in words, for errors."""
    bounds = bounds_of(support)
    if bounds is None:
        return str(support)
    return "bounded" if is_traced(bounds) else f"bounded by {bounds[0]} and {bounds[1]}"
