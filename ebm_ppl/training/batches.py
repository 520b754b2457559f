"""Which rows an update sees: shuffled every epoch without replacement, as a function of the key and the step alone."""

import jax
import jax.numpy as jnp

from ebm_ppl.types import Array, Key, PyTree


def epoch_order(data_key: Key, step: Array, num_rows: int, batch_size: int) -> Array:
    """The order of all rows in the epoch of ``step``, ``(num_rows,)``; the natural one when a batch holds them all."""
    if batch_size == num_rows:
        return jnp.arange(num_rows)
    return jax.random.permutation(jax.random.fold_in(data_key, step // (num_rows // batch_size)), num_rows)


def take_batch(data: PyTree, order: Array, step: Array, batch_size: int) -> PyTree:
    """The rows of update ``step``."""
    if batch_size == order.shape[0]:
        return data
    rows = batch_rows(order, step, batch_size)
    return jax.tree.map(lambda x: x[rows], data)


def batch_rows(order: Array, step: Array, batch_size: int) -> Array:
    """Indices of the rows of update ``step``, ``(batch_size,)``. The last incomplete batch of an epoch is left out."""
    position = step % (order.shape[0] // batch_size)
    return jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
