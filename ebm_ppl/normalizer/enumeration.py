"""log Z by summation over every state of a finite discrete support."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count, is_traced
from ebm_ppl.normalizer.events import check_site
from ebm_ppl.normalizer.result import MAX_ROUNDING, LogNormalizer, rounding, safe_logsumexp
from ebm_ppl.normalizer.unconstrained import holds_tracers
from ebm_ppl.types import Array

BLOCK_EVENTS = 2**16
"""Events of all rows evaluated at once; memory does not grow beyond it, with or without a gradient."""


def enumerate_states(ebm: Any, *, max_states: int = 2**20) -> LogNormalizer:
    """``log Z = log sum_x base(x) exp(-U(x))`` over every state, exact up to rounding, one value per row.

    Differentiable under ``jit``, ``grad`` and ``vmap`` with respect to everything traced in the EBM.

    Args:
        ebm: An EBM whose event is an array of coordinates that are booleans or whole numbers between fixed bounds.
        max_states: Largest number of states, the product of the sizes of the coordinates, to be summed over.

    Returns:
        The value, with a standard error of zero. ``reliable`` is false where the value is not finite.

    Raises:
        TypeError: the support is continuous, or its states cannot be listed.
        ValueError: there are more than ``max_states`` states, or the bounds of the support are traced.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> base = dist.ImproperUniform(dist.constraints.boolean, (), (3,))  # the counting measure
        >>> enumerate_states(ebm_ppl.EBM(lambda x: jnp.sum(x) * 1.0, base))  # 3 log(1 + exp(-1))
        log Z = 0.939785 (exact)
    """
    lower, size = _coordinates(ebm, max_states)
    run = _enumerate if holds_tracers(ebm) else _compiled_enumerate
    return run(ebm, lower, size)


def list_states(ebm: Any, *, max_states: int = 2**20) -> Array:
    """Every state of the support, ``(state, *event_shape)``; the last coordinate varies fastest.

    Args:
        ebm: As for :func:`enumerate_states`.
        max_states: As for :func:`enumerate_states`.

    Raises:
        TypeError: the support is continuous, or its states cannot be listed.
        ValueError: there are more than ``max_states`` states, or the bounds of the support are traced.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: jnp.sum(x) * 1.0, dist.Bernoulli(0.5).expand([2]).to_event(1))
        >>> list_states(ebm).tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    lower, size = _coordinates(ebm, max_states)
    return _states(jnp.arange(math.prod(size)), lower, size).reshape(-1, *ebm.event_shape)


def _coordinates(ebm: Any, max_states: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lowest value and number of values of every coordinate of the flattened event."""
    check_site(ebm)
    # States are numbered in 32 bits.
    max_states = min(check_count("max_states", max_states), 2**31 - 1)
    lower, upper = (np.broadcast_to(bound, ebm.event_shape).ravel() for bound in _bounds(ebm))
    size = tuple(int(n) for n in upper - lower + 1)
    if math.prod(size) > max_states:
        raise ValueError(
            f"max_states: got {max_states}, expected at least the {math.prod(size):.6g} states of an event of shape "
            f"{ebm.event_shape}. Raise it, or estimate log Z with ebm_ppl.normalizer.annealed_importance and a kernel for "
            "discrete events."
        )
    return tuple(int(n) for n in lower), size


def _bounds(ebm: Any) -> tuple[np.ndarray, np.ndarray]:
    support = ebm.support
    if not support.is_discrete:
        raise TypeError(
            f"enumerate_states: got the continuous support {support}, expected a discrete one. Integrate with "
            "ebm_ppl.normalizer.quadrature (up to two dimensions) or ebm_ppl.normalizer.annealed_importance."
        )
    while (inner := getattr(support, "base_constraint", None)) is not None:
        support = inner
    bounds = tuple(getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if support.event_dim == 0 and bounds == (None, None) and _holds_only_zero_and_one(support):
        return np.array(0), np.array(1)
    if support.event_dim != 0 or any(bound is None for bound in bounds):
        raise TypeError(
            f"enumerate_states: got the support {ebm.support}, whose states cannot be listed; expected booleans or whole "
            "numbers between two bounds."
        )
    if is_traced(bounds):
        raise ValueError(
            "enumerate_states: got a support whose bounds are traced, expected concrete ones. The number of states must "
            "not depend on a random value or on an argument of jit."
        )
    lower, upper = (np.asarray(bound) for bound in bounds)
    if lower.ndim > len(ebm.event_shape) or upper.ndim > len(ebm.event_shape):
        raise ValueError(
            f"enumerate_states: got bounds of shapes {lower.shape} and {upper.shape}, expected the same states for every "
            f"row, of shape {ebm.event_shape}. Treat rows with other states as EBMs of their own."
        )
    return lower, upper


def _holds_only_zero_and_one(support: Any) -> bool:
    return np.asarray(support(np.arange(-1, 4))).tolist() == [False, True, True, False, False]


def _states(index: Array, lower: tuple[int, ...], size: tuple[int, ...]) -> Array:
    """States of the given numbers, ``(index,) -> (index, coordinate)``: the digits of a number of mixed radix."""
    radix = np.array(size)
    weight = np.append(np.cumprod(radix[:0:-1])[::-1], 1)
    return index[:, None] // weight.astype(index.dtype) % radix.astype(index.dtype) + jnp.array(lower, index.dtype)


def _enumerate(ebm: Any, lower: tuple[int, ...], size: tuple[int, ...]) -> LogNormalizer:
    num_states, num_rows = math.prod(size), math.prod(ebm.batch_shape)
    block_size = min(num_states, max(1, BLOCK_EVENTS // max(1, num_rows)))

    def block(start: Array) -> Array:
        index = start + jnp.arange(block_size)
        # The last block may run over the end; what it sees there is the last state again, and does not count.
        states = _states(jnp.minimum(index, num_states - 1), lower, size)
        events = states.reshape(block_size, *(1,) * len(ebm.batch_shape), *ebm.event_shape)
        log_density = jnp.broadcast_to(ebm.unnormalized_log_prob(events), (block_size, *ebm.batch_shape))
        counts = (index < num_states).reshape(-1, *(1,) * len(ebm.batch_shape))
        return safe_logsumexp(jnp.where(counts, log_density, -jnp.inf))

    # Each block is recomputed in the backward pass, which then needs no more memory than the forward one.
    partial_sums = jax.lax.map(jax.checkpoint(block), jnp.arange(0, num_states, block_size))
    value = safe_logsumexp(partial_sums)
    unknown = jnp.full_like(value, jnp.nan)
    num_gradients = jnp.zeros(ebm.batch_shape, jnp.int32)
    error = rounding(value)
    return LogNormalizer(value, error, unknown, unknown, num_gradients, jnp.isfinite(value) & (error < MAX_ROUNDING))


_compiled_enumerate = eqx.filter_jit(_enumerate)
