"""Arrays with a manifest in one safetensors file: written whole or not at all, and read with every byte accounted for.

A safetensors file is a length, a JSON header and the arrays' bytes, with nothing in it that could be executed; its reader
refuses headers that are too long, arrays that overlap, and sizes that do not add up to the size of the file.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ebm_ppl.checkpoint.manifest import Manifest, digest, from_metadata, to_metadata
from ebm_ppl.errors import CheckpointError

PARTIAL = ".partial"
"""What the names of files end with that are being written."""

_NATIVE = {np.dtype(kind).name for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")}
"""What the format holds as it is; other arrays (bfloat16, complex numbers) are stored as their bytes."""


def write(path: Path, arrays: Mapping[str, np.ndarray], manifest: Manifest) -> None:
    """Put a file in the place of ``path`` in one step: at every moment the old one is there, or the new one.

    The bytes are on the disk before the name is, and the name is before this returns. What a killed process left of an
    earlier attempt is removed.
    """
    stored = {name: _stored(array) for name, array in arrays.items()}
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    os.close(handle)
    try:
        save_file(stored, partial, metadata=to_metadata(manifest))
        _sync(Path(partial))
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    _sync(path.parent)
    for left in path.parent.glob(f".{path.name}.*{PARTIAL}"):
        left.unlink(missing_ok=True)


def array_entry(name: str, array: np.ndarray) -> dict[str, Any]:
    """What the manifest says about an array."""
    shape = array.shape
    return {"dtype": str(array.dtype), "shape": list(shape), "sha256": _digest(name, array)}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[Manifest, Any]]:
    """The manifest of a file, and a reader for :func:`read_array`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is no checkpoint, or damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"path: there is no checkpoint {str(path)!r}.")
    if not path.is_file():
        raise CheckpointError(
            "is not a file. For a directory of checkpoints use ebm_ppl.checkpoint.Checkpoints(directory).restore.",
            path=str(path),
        )
    try:
        # NumPy's arrays, so that nothing else is imported for reading.
        reader = safe_open(path, framework="numpy")
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"is no safetensors file, or a part of one ({error}).", path=str(path)) from error
    with reader as file:
        yield from_metadata(str(path), file.metadata()), file


def read_array(path: Path, file: Any, manifest: Manifest, name: str, dtype: np.dtype) -> np.ndarray:
    """One array, whose type and shape the caller has compared with what is expected.

    Raises:
        CheckpointError: the file has no such array, or its bytes are not those that were written.
    """
    entry = manifest.arrays[name]
    shape = tuple(entry["shape"])
    expected = shape if dtype.name in _NATIVE else (_num_bytes(shape, dtype),)
    # Compared before anything is allocated.
    stored = tuple(file.get_slice(name).get_shape()) if name in file.keys() else None  # noqa: SIM118 (no mapping)
    if stored != expected:
        raise CheckpointError(
            f"holds an array of shape {stored} where its manifest says {expected}.", path=str(path), entry=name
        )
    try:
        array = file.get_tensor(name)
        array = array if dtype.name in _NATIVE else array.view(dtype).reshape(shape)
    except (SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"holds an array that cannot be read ({error}).", path=str(path), entry=name) from error
    if array.dtype != dtype or _digest(name, array) != entry["sha256"]:
        raise CheckpointError(
            "holds bytes that are not the ones written: the file is damaged. Use an earlier checkpoint.",
            path=str(path),
            entry=name,
        )
    return array


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=object)) * dtype.itemsize


def _stored(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, order="C")
    return array if array.dtype.name in _NATIVE else array.reshape(-1).view(np.uint8)


def _digest(name: str, array: np.ndarray) -> str:
    data = np.asarray(array, order="C").reshape(-1).view(np.uint8).data
    return digest(name, str(array.dtype), array.shape, data)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
