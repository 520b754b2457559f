"""Many devices and many processes: chains, particles and rows are split over a mesh, parameters are on all of it.

Arrays carry their placement, and JAX runs a program where its arguments are: what :func:`shard` and :func:`replicate`
return goes into :func:`ebm_ppl.fit`, :func:`ebm_ppl.advance`, :func:`ebm_ppl.draw`,
:func:`ebm_ppl.diagnostics.diagnose` and :mod:`ebm_ppl.normalizer` as before.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ebm_ppl.meshes import CHAIN, on_host
from ebm_ppl.training import TrainState
from ebm_ppl.types import PyTree, SamplerState

Rule = Callable[[str, Any], PartitionSpec | None]
"""From the path of a parameter (``".layers[0].weight"``) and the array to its partition; ``None`` is on every device."""


def shard(tree: Any, mesh: Mesh, *, parameters: Rule | None = None) -> Any:
    """Split a population, a training state or rows over the axis ``"chain"`` of a mesh.

    On any number of devices the same keys give the same results:

    - Where chains move on their own, as under every kernel that lifts a per-chain sampler, their arithmetic and random
      numbers are the same: positions after :func:`ebm_ppl.advance` and :func:`ebm_ppl.draw` are equal to the last bit,
      unless the compiler rounds the matrix products of a network otherwise for fewer rows.
    - In :func:`ebm_ppl.fit` gradients are sums over devices, rounded in another order: parameters agree to rounding, which
      training amplifies in time. Fifty updates of the tests stay within ``1e-5`` of the largest parameter.
    - Tempered SMC weights and resamples on every device what one device would, so particles have the same parents; moves
      and estimates agree as above.

    Args:
        tree: A :class:`~ebm_ppl.types.SamplerState`: positions, log weights, ages and auxiliaries are split, the kernel's
            tunables are on every device. A :class:`~ebm_ppl.training.TrainState`: so is its sampler, and all else is on
            every device. Rows, an array or a pytree of arrays ``(row, ...)``: split; what each process holds a part of
            (``jax.make_array_from_process_local_data``) stays where it is if it is split so.
        mesh: With an axis ``"chain"``, such as ``jax.make_mesh((4,), ("chain",))``, and further ones for ``parameters``.
            Axes are taken as automatic: the compiler finds the placement of all that is computed.
        parameters: Of a training state only: which trainable parameters of the potential are split, and how. Optimizer
            states and averages of the same shape are split like their parameters.

    Returns:
        The same tree on the devices of the mesh; the same values on every process.

    Raises:
        TypeError: the tree is something else.
        ValueError: the mesh has no chain axis or does not divide the chains or rows, a partition does not fit its
            parameter, or random numbers would depend on the devices.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> mesh = jax.make_mesh((jax.device_count(),), ("chain",))
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), ebm.kernels.mala(step_size=0.1))
        >>> shard(sampler, mesh).position.sharding.spec
        P('chain',)
    """
    mesh = _checked(mesh)
    if parameters is not None and not isinstance(tree, TrainState):
        raise TypeError(f"parameters: got a rule with {type(tree).__name__}, expected one with a training state only.")
    if isinstance(tree, SamplerState):
        return _sampler(tree, mesh)
    if isinstance(tree, TrainState):
        return _state(tree, mesh, parameters)
    leaves = jax.tree.leaves(tree)
    if callable(tree) or not leaves or not all(_is_rows(leaf) for leaf in leaves):
        raise TypeError(
            f"tree: got {type(tree).__name__}, expected a sampler state, a training state, or arrays (row, ...). What all "
            "devices need, such as keys, potentials and EBMs, goes through ebm_ppl.sharding.replicate."
        )
    return _split(tree, mesh, "rows")


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put all arrays on every device of a mesh: a potential, an EBM, a random key.

    What then makes a population of its own, such as :func:`ebm_ppl.normalizer.tempered_smc`, splits it over the mesh.

    Args:
        tree: Any pytree; leaves that are no arrays stay what they are.
        mesh: As for :func:`shard`.

    Raises:
        ValueError: the mesh has no chain axis, or random numbers would depend on the devices.

    Example:
        >>> import jax
        >>> mesh = jax.make_mesh((jax.device_count(),), ("chain",))
        >>> replicate(jax.random.key(0), mesh).is_fully_replicated
        True
    """
    everywhere = NamedSharding(_checked(mesh), PartitionSpec())
    return jax.tree.map(lambda leaf: _put(leaf, everywhere), tree)


def gather(tree: Any) -> Any:
    """All arrays as NumPy arrays, whole ones on every process: for plots and files.

    :func:`ebm_ppl.diagnostics.diagnose` and ``to_datatree`` do so by themselves. With several processes all of them must
    call this together.

    Args:
        tree: Any pytree; keys, and leaves that are no arrays, stay what they are.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((jax.device_count(),), ("chain",))
        >>> gather(shard(jnp.arange(8.0), mesh)).sum()
        np.float32(28.0)
    """
    return on_host(tree)


def _checked(mesh: Any) -> Mesh:
    """The mesh with automatic axes."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f'mesh: got {type(mesh).__name__}, expected one such as jax.make_mesh((4,), ("{CHAIN}",)).')
    if CHAIN not in mesh.axis_names:
        raise ValueError(
            f'mesh: got axes {mesh.axis_names}, expected one named "{CHAIN}", as in jax.make_mesh((4,), ("{CHAIN}",)).'
        )
    config: Any = jax.config  # its options are no attributes that a type checker could know
    if not config.jax_threefry_partitionable:
        raise ValueError(
            "mesh: jax_threefry_partitionable is off, so that random numbers would depend on the devices; expected "
            "jax.config.update('jax_threefry_partitionable', True), which is JAX's default."
        )
    # In JAX's other mode every operation states its placement, which a library for both modes cannot.
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _is_rows(leaf: Any) -> bool:
    is_array = isinstance(leaf, np.ndarray | jax.Array) and leaf.ndim > 0
    return is_array and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sampler(sampler: SamplerState, mesh: Mesh) -> SamplerState:
    chains = {name: getattr(sampler, name) for name in ("position", "log_weight", "auxiliary", "age")}
    return sampler._replace(**_split(chains, mesh, "chains"), kernel=replicate(sampler.kernel, mesh))


def _split(tree: PyTree, mesh: Mesh, what: str) -> PyTree:
    parts = mesh.shape[CHAIN]
    for count in sorted({leaf.shape[0] for leaf in jax.tree.leaves(tree)}):
        if count % parts:
            fitting = sorted({max(count // parts, 1) * parts, -(-count // parts) * parts})
            raise ValueError(
                f"tree: got {count} {what} for {parts} devices, expected a multiple of {parts}: "
                f"{' or '.join(map(str, fitting))} of them, or a smaller mesh."
            )
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, PartitionSpec(CHAIN))), tree)


def _state(state: TrainState, mesh: Mesh, rule: Rule | None) -> TrainState:
    sampler = None if state.sampler is None else _sampler(state.sampler, mesh)
    specs = {} if rule is None else _specs(state.potential, rule)
    rest = state._replace(sampler=None)

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        # Moments and averages mirror the potential: the end of their path is that of a parameter.
        matches = (specs.get((path[start:], np.shape(leaf))) for start in range(len(path)))
        spec = next((spec for spec in matches if spec is not None), PartitionSpec())
        try:
            return _put(leaf, NamedSharding(mesh, spec))
        except ValueError as error:
            where = jax.tree_util.keystr(path)
            raise ValueError(f"parameters: {spec} does not fit {where} of shape {np.shape(leaf)}: {error}") from error

    return jax.tree_util.tree_map_with_path(place, rest)._replace(sampler=sampler)


def _specs(potential: PyTree, rule: Rule) -> dict[Any, PartitionSpec]:
    """What the rule says of every parameter, by path and shape."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(potential):
        if not isinstance(leaf, np.ndarray | jax.Array):
            continue
        spec = rule(jax.tree_util.keystr(path), leaf)
        if not isinstance(spec, PartitionSpec | None):
            raise TypeError(
                f"parameters: the rule gave {type(spec).__name__} for {jax.tree_util.keystr(path)}, expected a "
                "jax.sharding.PartitionSpec or None."
            )
        if spec is not None:
            found[path, np.shape(leaf)] = spec
    return found


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    """One array, from a copy that every process has, or from the parts that they have."""
    if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
        return leaf
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        implementation = str(jax.random.key_impl(leaf))
        if "threefry" not in implementation:
            raise ValueError(
                f"tree: got a {implementation} key, whose random numbers would depend on the devices, expected the "
                "default, jax.random.key(seed, impl='threefry2x32')."
            )
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=implementation)
    if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
        # Under the automatic mesh, also where the axes of the array's own were explicit.
        return jax.device_put(leaf, sharding)
    host = on_host(leaf)
    # The parts that this process has, of values that all have: no process waits for another.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
