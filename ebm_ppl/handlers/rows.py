"""Which rows of a data set an EBM site with a normaliser per row is looking at, and whether they are still the same."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.distributions import EBM
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.provenance import SiteDependencies
from ebm_ppl.types import Array, PyTree, SamplerState


class Rows(NamedTuple):
    """Rows that have chains of their own.

    Attributes:
        shape: Batch shape of the whole data set: that of the EBM, with the full size of each subsampling plate.
        index: Where in it, flattened, the rows of this evaluation are, ``(row,)``; ``None`` when they are all of it.
    """

    shape: tuple[int, ...]
    index: Array | None

    def gather(self, tree: PyTree) -> PyTree:
        """The entries of these rows, of a sampler or of arrays with a leading row axis."""
        if self.index is None:
            return tree
        return jax.tree.map(
            lambda x: _without_kernel(self.gather, x) if _is_sampler(x) else x[self.index], tree, is_leaf=_is_sampler
        )

    def scatter(self, tree: PyTree, new: PyTree) -> PyTree:
        """Put the entries of these rows back."""
        if self.index is None:
            return new
        return jax.tree.map(
            lambda old, x: _without_kernel(self.scatter, old, x) if _is_sampler(x) else old.at[self.index].set(x),
            tree,
            new,
            is_leaf=_is_sampler,
        )

    def check_same(self, known: Array, current: Array | None, site: str) -> Array:
        """Raise, inside the compiled program, when rows come back with other data than their chains were made for.

        Args:
            known: Fingerprints ``(row,)`` of all rows so far, zero where none was seen.
            current: Those of these rows, or ``None`` where nothing tells rows apart.
            site: Name of the EBM site.

        Returns:
            All fingerprints, these included.
        """
        if current is None:
            return known
        before = self.gather(known)
        current = eqx.error_if(
            current,
            jnp.any((before != 0) & (before != current)),
            f"site '{site}': rows came back in another order, or with other data, than their chains were made for, and "
            "negatives of one row say nothing about another. Pass the whole data set and let numpyro.plate(name, size, "
            "subsample_size) choose the rows, so that the chains can follow its indices.",
        )
        return self.scatter(known, current)


def _is_sampler(node: Any) -> bool:
    return isinstance(node, SamplerState)


def _without_kernel(function: Any, *samplers: SamplerState) -> SamplerState:
    """Apply to the arrays that have rows; the kernel, and its newest tunables, belong to all of them."""
    bare = [sampler._replace(kernel=None) for sampler in samplers]
    return jax.tree.map(function, *bare)._replace(kernel=samplers[-1].kernel)


def find_rows(ebm: EBM, msg: dict[str, Any], plates: dict[str, tuple[int, Array]]) -> Rows:
    """The rows of an EBM site, from the plates around it.

    Raises:
        UnknownNormalizerError: a plate has rows of the EBM, and was made where its indices cannot be seen.
    """
    if not ebm.batch_shape:
        return Rows((), None)
    to_event = msg["fn"].event_dim - ebm.event_dim  # batch axes of the EBM that have become a part of the site's events
    shape, axes, is_subsampled = list(ebm.batch_shape), [jnp.arange(size) for size in ebm.batch_shape], False
    for frame in msg["cond_indep_stack"]:
        axis = frame.dim - to_event
        if -axis > len(shape) or shape[axis] == 1:
            continue
        if frame.name not in plates:
            raise UnknownNormalizerError(
                f"site '{msg['name']}': its rows belong to plate '{frame.name}', which was made outside the model, so that "
                "the rows of a minibatch cannot be told. Make the plate inside the model."
            )
        size, index = plates[frame.name]
        if index.shape[0] == shape[axis]:
            shape[axis], axes[axis] = size, index
            is_subsampled |= size != index.shape[0]
    if not is_subsampled:
        return Rows(tuple(shape), None)
    grid = jnp.meshgrid(*axes, indexing="ij")
    return Rows(tuple(shape), jnp.ravel_multi_index(grid, shape, mode="clip").reshape(-1))


def fingerprint(ebm: EBM, msg: dict[str, Any], found: SiteDependencies) -> Array | None:
    """One nonzero number per row, made of what is fixed about it: its observed value, and its condition if it is data."""
    num_rows, parts = math.prod(ebm.batch_shape), []
    if not ebm.batch_shape:
        return None
    if ebm.condition is not None and not found.condition:
        for leaf in jax.tree.leaves(ebm.condition):
            parts.append(jnp.broadcast_to(leaf, ebm.batch_shape + leaf.shape[1:]))
    if msg["is_observed"]:
        value = jnp.asarray(msg["value"])
        if value.shape[: max(value.ndim - ebm.event_dim, 0)] == ebm.batch_shape:
            parts.append(value)
    if not parts:
        return None
    total = jnp.zeros(num_rows, jnp.uint32)
    for part in parts:
        bits = _bits(jax.lax.stop_gradient(part).reshape(num_rows, -1))
        # Distinct odd multipliers, so that numbers that swap places change the sum; whole-number arithmetic, so that the
        # same data give the same number in every compiled program.
        multipliers = (
            jnp.arange(bits.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(97)
        ) | jnp.uint32(1)
        total = total * jnp.uint32(31) + jnp.sum(bits * multipliers, axis=1, dtype=jnp.uint32)
    return jnp.maximum(total, jnp.uint32(1))


def _bits(values: Array) -> Array:
    if jnp.issubdtype(values.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
        return bits.reshape(values.shape[0], -1)
    return values.astype(jnp.uint32)
