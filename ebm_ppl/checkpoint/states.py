"""A state to a file, and back into a state of the same make."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ebm_ppl.checkpoint.manifest import Manifest, environment
from ebm_ppl.checkpoint.naming import described_structure, in_words, named_leaves, with_leaves
from ebm_ppl.checkpoint.storage import array_entry, opened, read_array, write
from ebm_ppl.checks import is_traced
from ebm_ppl.errors import CheckpointError
from ebm_ppl.meshes import on_host
from ebm_ppl.training import TrainState
from ebm_ppl.types import PyTree

State = TypeVar("State")


def save(path: str | os.PathLike[str], state: PyTree) -> None:
    """Write a state to one file, in one step: whoever is killed leaves the old file or the new one, never a part.

    The file is in the safetensors format: arrays by the names of their paths with a SHA-256 each, and a text that says
    what the state consists of. Nothing in it is executed when it is read. Functions (kernels, activations) are not saved,
    only their names.

    Args:
        path: The file, usually ``something.safetensors``; its directory must exist.
        state: A :class:`ebm_ppl.TrainState`, or any other pytree of arrays, numbers, random keys and functions. With many
            processes every one of them calls this, with arrays that may be spread over all of them; the first one writes.

    Raises:
        TypeError: the state is being traced, or has an array that is not of numbers.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, optax, ebm_ppl as ebm
        >>> net = ebm.potentials.MLP(2, key=jax.random.key(0), width=8, depth=1)
        >>> state = ebm.init_train(net, optax.adam(1e-3))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(f"{directory}/state.safetensors", state)
        ...     restored = restore(f"{directory}/state.safetensors", like=state)
        >>> bool(jnp.all(restored.potential.head.weight == net.head.weight))
        True
    """
    arrays, manifest = arrays_and_manifest(state)
    if jax.process_index() == 0:
        write(Path(path), arrays, manifest)
    wait_for_all_processes()


def restore(path: str | os.PathLike[str], like: State, *, check_structure: bool = True) -> State:
    """Read a state that :func:`save` wrote.

    Args:
        path: The file.
        like: A state of the same make, such as a fresh one from :func:`ebm_ppl.init_train`. Its functions, and the
            devices that its arrays are on, are those of the result; its numbers are not looked at. The key of a training
            state may be missing.
        check_structure: Refuse the file of a state that has the same arrays and other functions or settings: another
            kernel, another activation. Without it only names, shapes and types are compared.

    Returns:
        The saved state. Training it further, on the same machine, backend and versions, gives bit for bit what the
        uninterrupted run would have given; :func:`read_manifest` shows what wrote the file.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, of another program or of a later version; or it is of another
            state than ``like``. Its ``entry`` names the array.

    Example:
        See :func:`save`.
    """
    with opened(Path(path)) as (manifest, file):
        template: Any = with_key_of(like, manifest)
        leaves = named_leaves(template)
        if check_structure:
            check_same_structure(str(path), manifest, template)
        check_leaves(str(path), manifest, leaves)
        found = {name: _restored(Path(path), file, manifest, name, leaf) for name, leaf in leaves.items()}
    return with_leaves(template, found)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """What a checkpoint says about itself, without reading its arrays.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint, or damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save(f"{directory}/numbers.safetensors", {"a": np.zeros((2, 3))})
        ...     manifest = read_manifest(f"{directory}/numbers.safetensors")
        >>> manifest.arrays["['a']"]["shape"]
        [2, 3]
    """
    with opened(Path(path)) as (manifest, _):
        return manifest


def arrays_and_manifest(state: PyTree) -> tuple[dict[str, np.ndarray], Manifest]:
    """The arrays of a state as NumPy's, and its manifest. With many processes this waits for all of them."""
    arrays = arrays_on_host(state)
    return arrays, hashed_manifest(state, arrays)


def arrays_on_host(state: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a state as NumPy's, random keys as their numbers. With many processes this waits for all of them."""
    leaves = {name: leaf for name, leaf in named_leaves(state).items() if is_array(leaf)}
    for name, leaf in leaves.items():
        if is_traced(leaf):
            raise TypeError(f"state: {name} is being traced, expected numbers. Save outside of jit.")
    return {
        name: _host_array(name, jax.random.key_data(leaf) if is_random_key(leaf) else leaf)
        for name, leaf in leaves.items()
    }


def hashed_manifest(state: PyTree, arrays: dict[str, np.ndarray]) -> Manifest:
    """The manifest of a state whose arrays are on the host; the hashes of them are what takes its time."""
    return manifest_of(state, lambda name, _: array_entry(name, arrays[name]))


def manifest_of(state: PyTree, entry_of: Callable[[str, Any], dict[str, Any]]) -> Manifest:
    """The manifest of a state.

    Args:
        state: Any pytree.
        entry_of: What is said of one array, given its name and the leaf.
    """
    entries: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for name, leaf in named_leaves(state).items():
        if not is_array(leaf):
            values[name] = described_leaf(leaf)
            continue
        entries[name] = entry_of(name, leaf)
        if is_random_key(leaf):
            entries[name]["key_impl"] = str(jax.random.key_impl(leaf))
    step = int(state.step) if isinstance(state, TrainState) else None
    return Manifest(entries, values, described_structure(state), step, environment())


def wait_for_all_processes() -> None:
    """Return when every process has come here; at once where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("ebm_ppl.checkpoint")


def _host_array(name: str, leaf: Any) -> np.ndarray:
    array = np.asarray(on_host(leaf))
    if array.dtype.hasobject or array.dtype.kind in "SUMm":
        raise TypeError(f"state: {name} has dtype {array.dtype}, expected numbers.")
    return array


def is_array(leaf: Any) -> bool:
    """Whether a leaf is saved as an array, rather than described."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def is_random_key(leaf: Any) -> bool:
    """Whether an array is one of typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def described_leaf(leaf: Any) -> Any:
    """What is saved of a leaf that is no array: a number as it is, the name of a function."""
    return leaf if _is_number(leaf) else in_words(leaf)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | str)


def with_key_of(like: Any, manifest: Manifest) -> Any:
    """A training state has a key exactly where the saved one has: a fresh one has none yet."""
    if not isinstance(like, TrainState):
        return like
    entry = manifest.arrays.get(".key")
    if entry is None:
        return like._replace(key=None)
    if "key_impl" not in entry:
        return like if like.key is not None else like._replace(key=jnp.zeros(entry["shape"], jnp.uint32))
    try:
        return like._replace(key=jax.random.key(0, impl=entry["key_impl"]))
    except ValueError:
        return like  # an implementation that this JAX does not know; said below, where keys are compared


def check_same_structure(path: str, manifest: Manifest, like: PyTree) -> None:
    """A saved state must consist of the same parts as ``like``.

    Raises:
        CheckpointError: it does not.
    """
    expected = described_structure(like)
    for name in [*expected, *(name for name in manifest.structure if name not in expected)]:
        saved, wanted = manifest.structure.get(name, "nothing"), expected.get(name, "nothing")
        if saved != wanted:
            raise CheckpointError(
                f"is of another state: it has {_short(saved)} where `like` has {_short(wanted)}. Make `like` as the saved "
                "state was made; check_structure=False compares names, shapes and types only.",
                path=path,
                entry=name,
            )


def _short(text: str, width: int = 300) -> str:
    return text if len(text) <= width else text[:width] + " ..."


def check_leaves(path: str, manifest: Manifest, leaves: dict[str, Any]) -> None:
    """A saved state must have the leaves of ``like``: names, kinds, types and shapes.

    Raises:
        CheckpointError: it has not.
    """
    saved = manifest.arrays.keys() | manifest.values.keys()
    for names, words in ((leaves.keys() - saved, "lacks"), (saved - leaves.keys(), "has what `like` has not:")):
        if names:
            raise CheckpointError(
                f"{words} {', '.join(sorted(names)[:5])}{' and more' if len(names) > 5 else ''}.",
                path=path,
                entry=min(names),
            )
    for name, leaf in leaves.items():
        if is_array(leaf) != (name in manifest.arrays):
            kinds = ("no array", "one") if is_array(leaf) else ("an array", "none")
            raise CheckpointError(f"has {kinds[0]} where `like` has {kinds[1]}.", path=path, entry=name)
        if not is_array(leaf):
            continue
        entry, is_key = manifest.arrays[name], is_random_key(leaf)
        impl = str(jax.random.key_impl(leaf)) if is_key else None
        if entry.get("key_impl") != impl:
            raise CheckpointError(
                f"has a random key of {entry.get('key_impl')} where `like` has {impl or 'numbers'}.",
                path=path,
                entry=name,
            )
        like_it = jax.eval_shape(lambda key: jax.random.key_data(key), leaf) if is_key else leaf
        saved, wanted = (entry["dtype"], tuple(entry["shape"])), (str(like_it.dtype), tuple(like_it.shape))
        if saved != wanted:
            raise CheckpointError(
                f"has {saved[0]} of shape {saved[1]} where `like` has {wanted[0]} of shape {wanted[1]}.",
                path=path,
                entry=name,
            )


def other_leaf(path: str, manifest: Manifest, name: str, like: Any) -> Any:
    """A leaf that is no array: the saved number, or the function of ``like``.

    Raises:
        CheckpointError: the saved one is of another kind, or another function.
    """
    saved = manifest.values[name]
    if _is_number(like) and type(saved) is type(like):
        return saved
    if saved != described_leaf(like):
        wanted = _short(repr(described_leaf(like)))
        raise CheckpointError(f"has {_short(repr(saved))} where `like` has {wanted}.", path=path, entry=name)
    return like


def _restored(path: Path, file: Any, manifest: Manifest, name: str, like: Any) -> Any:
    if not is_array(like):
        return other_leaf(str(path), manifest, name, like)
    if is_random_key(like):
        data = read_array(path, file, manifest, name, np.dtype(np.uint32))
        return jax.random.wrap_key_data(_placed(data, None), impl=manifest.arrays[name]["key_impl"])
    array = read_array(path, file, manifest, name, np.dtype(like.dtype))
    if isinstance(like, np.ndarray | np.generic):
        return array if isinstance(like, np.ndarray) else array[()]
    return _placed(array, like)


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    """On the devices of ``like`` where it is bound to some, anywhere else."""
    sharding = getattr(like, "sharding", None)
    if sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
