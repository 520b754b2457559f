"""Checks of numbers in 64 bits, which those of JAX arrays would round."""

import math
from typing import Any

import numpy as np


def check_numbers(name: str, value: Any, *, shape: tuple[int, ...] | None = None, above: float = -math.inf) -> Any:
    """Finite numbers in 64 bits, of the given shape and above a bound; JAX would round them to 32.

    Raises:
        TypeError: they are not real numbers.
        ValueError: another shape, or a number that is not finite or not above the bound.

    Example:
        >>> check_numbers("step_size", 0.5, shape=(), above=0.0).item()
        0.5
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name}: got dtype {array.dtype}, expected real numbers.")
    array = array.astype(np.float64)
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}.")
    is_good = np.isfinite(array) & (array > above)
    if not is_good.all():
        bound = "" if above == -math.inf else f" > {above:g}"
        raise ValueError(f"{name}: got {array[~is_good].flat[0]:g}, expected finite numbers{bound}.")
    return array


def check_positive_number(name: str, value: Any) -> float:
    """One finite number > 0."""
    return float(check_numbers(name, value, shape=(), above=0.0))


def check_not_negative_numbers(name: str, value: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Finite numbers >= 0."""
    array = check_numbers(name, value, shape=shape)
    if (array < 0).any():
        raise ValueError(f"{name}: got {array.min():g}, expected numbers >= 0.")
    return array
