"""Log densities of rows of data, and what is known of the error of log Z in them."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_array, is_traced
from ebm_ppl.errors import NonFiniteEnergyError, UnknownNormalizerError
from ebm_ppl.normalizer.events import check_events
from ebm_ppl.proposals import log_density
from ebm_ppl.types import VALUE_KINDS, Array

BLOCK_ROWS = 4096
"""Rows evaluated at once, so that memory does not grow with the data."""


class Rows(NamedTuple):
    """Log densities ``(row,)``, and what log Z adds to the variance of their mean.

    Attributes:
        log_density: Log Z included.
        normalizer_variance: Variance of the mean that comes with log Z.
        shared_variance: The part of it that does not show in the spread of the rows.
        reliable: Whether log Z is.
    """

    log_density: Array
    normalizer_variance: Array
    shared_variance: Array
    reliable: Array


def _is_ebm(model: Any) -> bool:
    return hasattr(model, "unnormalized_log_prob")


def check_rows_of(name: str, model: Any, data: Any) -> Array:
    """One event for each row, see :func:`ebm_ppl.normalizer.events.check_events`."""
    if _is_ebm(model):
        return check_events(name, model, data, () if model.batch_shape else ("row",))
    data = as_array(name, data)
    if data.ndim == 0 or data.size == 0:
        raise ValueError(f"{name}: got shape {data.shape}, which is empty; expected at least one row.")
    return data


def rows_of(name: str, model: Any, data: Array, log_normalizer: Any) -> Rows:
    """Log densities of checked rows under an EBM with some log Z, or under a normalised distribution.

    Raises:
        UnknownNormalizerError: see :func:`ebm_ppl.normalizer.log_likelihood`.
        NonFiniteEnergyError: see there.
        TypeError: see :func:`ebm_ppl.normalizer.compare_log_likelihoods`.
        ValueError: see there.
    """
    if _is_ebm(model):
        return _rows_of_ebm(name, model, data, log_normalizer)
    if not callable(getattr(model, "log_prob", None)):
        raise TypeError(f"{name}: got {type(model).__name__}, expected an EBM, or a distribution with log_prob.")
    if log_normalizer is not None:
        argument = "log_normalizer" if name == "ebm" else f"{name}_log_normalizer"
        raise TypeError(f"{argument}: got a log Z for {type(model).__name__}, which is normalised.")
    if any(_is_ebm(node) for node in jax.tree.leaves(model, is_leaf=_is_ebm)):
        raise TypeError(f"{name}: got an EBM inside {type(model).__name__}, expected the EBM itself, with its log Z.")
    density = log_density(model, data)
    if density.ndim != 1:
        raise ValueError(
            f"{name}: got log densities of shape {density.shape} for data of shape {data.shape}, expected one for each "
            "row. Declare the event's axes as event axes with .to_event()."
        )
    if not is_traced(density) and not bool(jnp.isfinite(density).all()):
        bad = ~np.isfinite(np.asarray(density))
        raise ValueError(
            f"{name}: got a log density that is not finite at {int(bad.sum())} of {bad.size} rows, the first at index "
            f"{int(np.argmax(bad))}; expected a distribution with a density at every row."
        )
    nothing = jnp.zeros((), density.dtype)
    return Rows(density, nothing, nothing, jnp.array(True))


def _rows_of_ebm(name: str, ebm: Any, data: Array, log_normalizer: Any) -> Rows:
    if log_normalizer is not None:
        if hasattr(log_normalizer, "lower"):
            raise TypeError(
                "log_normalizer: got bounds of log Z, expected one value with its error: pass bounds.forward, or "
                "bounds.reverse for a likelihood that errs downwards."
            )
        ebm = ebm.with_normalizer(log_normalizer, "estimate")
    if ebm.log_normalizer is None or ebm.normalizer_kind not in VALUE_KINDS:
        known = (
            "unknown" if ebm.log_normalizer is None else f"known up to a constant only (policy {ebm.normalizer_kind!r})"
        )
        raise UnknownNormalizerError(
            f"{name}: got an EBM whose log Z is {known}, expected its value. Pass log_normalizer=..., a result of "
            "ebm_ppl.normalizer.quadrature (up to two dimensions), enumerate_states, annealed_importance or tempered_smc."
        )
    run = _unnormalized if is_traced(data) or is_traced(ebm) else _compiled_unnormalized
    density = run(ebm, data)
    if not is_traced(density) and not bool(jnp.isfinite(density).all()):
        bad = ~np.isfinite(np.asarray(density))
        raise NonFiniteEnergyError(
            f"{name}: log base - U is not finite at {int(bad.sum())} of {bad.size} rows, the first at index "
            f"{int(np.argmax(bad))}; expected finite energies at the data. Check the parameters for NaN."
        )
    log_z = ebm.log_normalizer
    error = jnp.broadcast_to(ebm.log_normalizer_error, log_z.shape)
    of_row = jnp.broadcast_to(log_z, ebm.batch_shape).reshape(-1)
    # So many estimates, each shared by equally many rows, with independent errors.
    variance = jnp.mean(error**2) / max(error.size, 1)
    # What they add to the spread of the rows, over their number: all of it where every row has its own.
    shown = variance * (error.size - 1) / max(density.size - 1, 1)
    return Rows(density - of_row, variance, variance - shown, jnp.all(ebm.log_normalizer_reliable))


def _unnormalized(ebm: Any, data: Array) -> Array:
    """``log base - U`` of every row, ``(row,)``."""
    if ebm.batch_shape:
        return ebm.unnormalized_log_prob(data).reshape(-1)
    return jax.lax.map(ebm.unnormalized_log_prob, data, batch_size=BLOCK_ROWS)


_compiled_unnormalized = eqx.filter_jit(_unnormalized)
