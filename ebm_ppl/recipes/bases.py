"""The base that recipes tilt where none is given."""

from typing import Any

import numpyro.distributions as dist

from ebm_ppl.checks import check_positive
from ebm_ppl.types import Array


def largest_deviation(data: Array) -> Array:
    """The largest standard deviation that a coordinate of the rows has.

    Raises:
        ValueError: the rows are all alike.
    """
    return check_positive("the largest standard deviation of the data", data.std(axis=0).max())


def normal_base(data: Array) -> Any:
    """Normal at the mean of the rows, in all coordinates with the largest standard deviation that one of them has.

    Raises:
        ValueError: the rows are all alike.

    Example:
        >>> import jax.numpy as jnp
        >>> normal_base(jnp.array([[0.0, 1.0], [4.0, 1.0]])).variance.tolist()
        [4.0, 4.0]
    """
    return dist.Normal(data.mean(axis=0), largest_deviation(data)).to_event(data.ndim - 1)
