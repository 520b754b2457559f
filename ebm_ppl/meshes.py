"""Where arrays are: the device mesh that they were placed on, known from their types inside compiled programs too.

JAX decides from the placement of its arguments where a program runs. A population that is made inside a program has none
yet; it is split like the arrays that it is made for.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

CHAIN = "chain"
"""The axis of a mesh that chains, particles and rows are split over."""


def mesh_of(*trees: Any) -> Mesh | AbstractMesh | None:
    """The mesh with a chain axis that the first array placed on one is on; ``None`` where there is no such array.

    Example:
        >>> mesh_of(jnp.zeros(3)) is None
        True
    """
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array):
            sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else leaf.sharding
            mesh = getattr(sharding, "mesh", None)
            if mesh is not None and CHAIN in mesh.axis_names:
                return mesh
    return None


def num_parts(*trees: Any) -> int:
    """How many parts chains are split into: the length of the chain axis, 1 without a mesh."""
    mesh = mesh_of(*trees)
    return 1 if mesh is None else mesh.shape[CHAIN]


def over_chains(tree: Any, *like: Any) -> Any:
    """Split the leading axes over the mesh of ``tree``, or else of the arrays ``like``.

    Arrays whose leading axis the mesh does not divide are left as they are, as is all where there is no mesh.

    Example:
        >>> over_chains(jnp.zeros(4)).shape
        (4,)
    """
    mesh = mesh_of(tree, *like)
    if mesh is None:
        return tree
    split, parts = NamedSharding(mesh, PartitionSpec(CHAIN)), mesh.shape[CHAIN]

    def place(leaf: Any) -> Any:
        return leaf if leaf.shape[0] % parts else jax.lax.with_sharding_constraint(leaf, split)

    return jax.tree.map(place, tree)


def everywhere(tree: Any) -> Any:
    """Give every device all of each array of the mesh.

    A sum over parts is rounded in another order than a sum over the whole. Where a decision hangs on the last digit, as in
    resampling, all devices decide on the same whole array, and decide what one device alone would.
    """
    mesh = mesh_of(tree)
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec())), tree)


def on_host(tree: Any) -> Any:
    """Arrays as NumPy arrays, whole ones on every process; leaves that are no arrays, and keys, stay what they are.

    Where parts are on other processes, all processes must call this together.

    Example:
        >>> on_host({"x": jnp.ones(2)})
        {'x': array([1., 1.], dtype=float32)}
    """

    def fetch(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(fetch(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(fetch, tree)
