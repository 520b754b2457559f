"""States that no single host can hold: every process writes and reads its own parts of the arrays, through Orbax."""

import importlib
import os
from pathlib import Path
from typing import Any

import jax

from ebm_ppl.checkpoint.naming import named_leaves, with_leaves
from ebm_ppl.checkpoint.states import (
    State,
    check_leaves,
    check_same_structure,
    is_array,
    is_random_key,
    manifest_of,
    other_leaf,
    wait_for_all_processes,
    with_key_of,
)
from ebm_ppl.checkpoint.storage import opened, write
from ebm_ppl.errors import CheckpointError
from ebm_ppl.types import PyTree

_MANIFEST, _ARRAYS = "manifest.safetensors", "arrays"


def save_sharded(directory: str | os.PathLike[str], state: PyTree) -> None:
    """Write a state of which no host holds all, every process its own parts.

    :func:`ebm_ppl.checkpoint.save` brings all arrays to the first process; this one moves nothing between processes. The
    arrays are written by Orbax, which puts them in place in one step when all of them are complete. There is no SHA-256 of
    them, so prefer :func:`ebm_ppl.checkpoint.save` for whatever fits on a host.

    Args:
        directory: Where to; it must not have a checkpoint yet, and all processes must see it.
        state: As in :func:`ebm_ppl.checkpoint.save`. Every process calls this.

    Raises:
        ImportError: Orbax is not installed.
        FileExistsError: the directory has a checkpoint.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     save_sharded(f"{directory}/a", {"x": jnp.arange(4.0)})
        ...     restored = restore_sharded(f"{directory}/a", like={"x": jnp.zeros(4)})
        >>> restored["x"].tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    path = Path(directory).absolute()
    if (path / _ARRAYS).exists():
        raise FileExistsError(f"directory: {str(path)!r} has a checkpoint already, expected a new directory.")
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        write(path / _MANIFEST, {}, manifest_of(state, _unhashed))
    wait_for_all_processes()
    # Last: a checkpoint is complete when its arrays are there.
    with _orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(path / _ARRAYS, _arrays(named_leaves(state)))


def restore_sharded(directory: str | os.PathLike[str], like: State, *, check_structure: bool = True) -> State:
    """Read a state that :func:`save_sharded` wrote, every process the parts that ``like`` puts on its devices.

    Args:
        directory: Where from.
        like: As in :func:`ebm_ppl.checkpoint.restore`; the arrays may be spread otherwise than those that were saved, over
            fewer devices or more.
        check_structure: As in :func:`ebm_ppl.checkpoint.restore`.

    Raises:
        ImportError: Orbax is not installed.
        FileNotFoundError: there is no checkpoint, or it was never completed.
        CheckpointError: it is damaged, or of another state than ``like``.

    Example:
        See :func:`save_sharded`.
    """
    path = Path(directory).absolute()
    if not (path / _ARRAYS).is_dir():
        raise FileNotFoundError(f"directory: {str(path)!r} has no complete checkpoint.")
    with opened(path / _MANIFEST) as (manifest, _):
        template: Any = with_key_of(like, manifest)
    leaves = named_leaves(template)
    if check_structure:
        check_same_structure(str(path), manifest, template)
    check_leaves(str(path), manifest, leaves)
    try:
        with _orbax().StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(path / _ARRAYS, _arrays(leaves))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"has arrays that Orbax cannot read ({error}).", path=str(path)) from error
    others = {name: other_leaf(str(path), manifest, name, leaf) for name, leaf in leaves.items() if not is_array(leaf)}
    return with_leaves(template, {**found, **others})


def _arrays(leaves: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if is_array(leaf)}


def _unhashed(name: str, leaf: Any) -> dict[str, Any]:
    """What the manifest says about an array of which this process may have a part only."""
    data = jax.eval_shape(lambda key: jax.random.key_data(key), leaf) if is_random_key(leaf) else leaf
    return {"dtype": str(data.dtype), "shape": list(data.shape), "sha256": ""}


def _orbax() -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError("checkpoints of sharded states need Orbax: pip install 'ebm-ppl[sharded]'.") from error
