"""Where the rows of an update come from: arrays that are shuffled here, or batches that somebody else's loader made.

Both say what the rows of update ``n`` are as a function of the key and ``n``, inside the compiled loop.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.meshes import over_chains
from ebm_ppl.types import Array, Batch, Key, PyTree


@runtime_checkable
class Batches(Protocol):
    """The rows of the updates of one chunk."""

    def begin(self, key: Key, step: Array) -> PyTree:
        """What is carried from update to update, at the start of a chunk."""
        ...

    def take(self, key: Key, step: Array, carry: PyTree) -> tuple[Batch, PyTree]:
        """The rows of update ``step``."""
        ...

    def rows(self, key: Key, step: Array) -> np.ndarray:
        """Which rows update ``step`` sees: indices into the data, or into the loader's batch."""
        ...


class ShuffledRows(eqx.Module):
    """Rows of arrays, shuffled every epoch without replacement; the last incomplete batch of an epoch is left out."""

    data: PyTree
    batch_size: int = eqx.field(static=True)

    @property
    def num_rows(self) -> int:
        """Rows of the data."""
        return jax.tree.leaves(self.data)[0].shape[0]

    def begin(self, key: Key, step: Array) -> Array:
        """The order of all rows in the epoch of ``step``, ``(num_rows,)``; anything where ``step`` begins a new one."""
        if self.batch_size == self.num_rows:
            return jnp.arange(self.num_rows)
        return jax.lax.cond(self._begins_epoch(step), lambda: jnp.arange(self.num_rows), lambda: self._order(key, step))

    def take(self, key: Key, step: Array, carry: Array) -> tuple[Batch, Array]:
        """The rows of update ``step``, and the order of its epoch."""
        if self.batch_size == self.num_rows:
            return over_chains(self.data, step), carry
        # A new epoch's shuffle is drawn when its first batch is due, not every update: sorting costs.
        order = jax.lax.cond(self._begins_epoch(step), lambda: self._order(key, step), lambda: carry)
        index = self._index(order, step)
        # On a mesh every device gets its rows of the batch, wherever they were.
        return over_chains(jax.tree.map(lambda x: x[index], self.data), step), order

    def rows(self, key: Key, step: Array) -> np.ndarray:
        """Indices of the rows of update ``step``, ``(batch_size,)``."""
        return np.asarray(self._index(self._order(key, step), step))

    def _order(self, key: Key, step: Array) -> Array:
        if self.batch_size == self.num_rows:
            return jnp.arange(self.num_rows)
        epoch = step // (self.num_rows // self.batch_size)
        return jax.random.permutation(jax.random.fold_in(key, epoch), self.num_rows)

    def _begins_epoch(self, step: Array) -> Array:
        return step % (self.num_rows // self.batch_size) == 0

    def _index(self, order: Array, step: Array) -> Array:
        position = step % (self.num_rows // self.batch_size)
        return jax.lax.dynamic_slice_in_dim(order, position * self.batch_size, self.batch_size)


class LoadedBatches(eqx.Module):
    """Batches ``(batch, row, *event)`` for the updates from ``first`` on."""

    stacked: PyTree
    first: Array

    def begin(self, key: Key, step: Array) -> None:
        """Nothing is carried."""

    def take(self, key: Key, step: Array, carry: None) -> tuple[Batch, None]:
        """The batch of update ``step``."""
        return over_chains(jax.tree.map(lambda x: x[step - self.first], self.stacked), step), None

    def rows(self, key: Key, step: Array) -> np.ndarray:
        """All of the batch, by its own indices."""
        return np.arange(jax.tree.leaves(self.stacked)[0].shape[1])


def is_loader(data: Any) -> bool:
    """Whether ``data`` hands out batches: an iterable that is no array and no pytree of arrays."""
    if isinstance(data, Iterator):
        return True
    is_leaf = jax.tree.structure(data) == jax.tree.structure(0)
    return is_leaf and isinstance(data, Iterable) and not isinstance(data, str | bytes) and not hasattr(data, "shape")


def batches_of(loader: Iterable[Any]) -> Iterator[PyTree]:
    """Batches of one shape without end: the loader is started again when it has run out.

    The last batch of an epoch is left out where it is smaller than the first, as with arrays. An iterator that cannot be
    started again ends here too.

    Raises:
        ValueError: the loader gives nothing, or batches of differing shapes.
    """
    expected: PyTree = None
    while True:
        is_empty, odd = True, None
        for item in loader:
            batch = jax.tree.map(np.asarray, item)
            shapes = jax.tree.map(np.shape, batch)
            if odd is not None or (expected is not None and jax.tree.structure(shapes) != jax.tree.structure(expected)):
                raise ValueError(
                    f"data: the loader gave batches of shapes {expected} and {odd or shapes}, expected one shape."
                )
            if expected is not None and shapes != expected:
                odd = shapes  # the last one of an epoch; an error if another follows
                continue
            is_empty, expected = False, shapes
            yield batch
        if expected is None or 0 in jax.tree.leaves(expected):
            raise ValueError("data: the loader gave no batches, expected an iterable of arrays (row, *event).")
        if is_empty:
            return
