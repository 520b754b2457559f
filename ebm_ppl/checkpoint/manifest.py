"""What a checkpoint says about itself: the text beside its arrays, with a digest of its own."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ebm_ppl.errors import CheckpointError

FORMAT = "ebm_ppl.checkpoint"
VERSION = 1
"""Of the format. A reader refuses a later one, and reads all earlier ones."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The text of a checkpoint.

    Attributes:
        arrays: For every array its ``dtype``, ``shape`` and ``sha256``, by name; of random keys also their ``key_impl``.
        values: Leaves that are no arrays: numbers as they are, functions by name.
        structure: What the state consists of besides its leaves, by the names of its nodes.
        step: Updates made, of a training state; ``None`` of any other tree.
        environment: Versions of Python and of the packages, the machine, JAX's backend and its default precision.
    """

    arrays: dict[str, dict[str, Any]]
    values: dict[str, Any]
    structure: dict[str, str]
    step: int | None
    environment: dict[str, Any]


def environment() -> dict[str, Any]:
    """What the bits of a run depend on besides the state."""
    return {
        **_versions(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "backend": jax.default_backend(),
        "default_float": str(jnp.result_type(float)),
    }


@functools.cache
def _versions() -> dict[str, str]:
    """Looked up once: they are files to be read, and a run saves often."""
    packages = ("ebm-ppl", "jax", "jaxlib", "numpyro", "blackjax", "optax", "equinox")
    return {package: importlib.metadata.version(package) for package in packages}


def digest(name: str, dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> str:
    """SHA-256 of an array with its name, type and shape: bytes under another name are another entry."""
    found = hashlib.sha256(json.dumps([name, dtype, list(shape)]).encode())
    found.update(data)
    return found.hexdigest()


def to_metadata(manifest: Manifest) -> dict[str, str]:
    """The manifest as the metadata of a safetensors file, which are pairs of strings."""
    text = json.dumps(dataclasses.asdict(manifest), sort_keys=True)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"format": FORMAT, "version": str(VERSION), "manifest": text, "manifest_sha256": sha256}


def from_metadata(path: str, metadata: Mapping[str, str] | None) -> Manifest:
    """Undo :func:`to_metadata`, trusting nothing.

    Raises:
        CheckpointError: the file is of another format or of a later version, or its manifest is damaged.
    """
    if metadata is None or metadata.get("format") != FORMAT:
        raise CheckpointError(
            "is a safetensors file that ebm_ppl.checkpoint.save did not write. Load its arrays with "
            "safetensors.numpy.load_file and put them into the state yourself.",
            path=path,
        )
    version = metadata.get("version", "")
    if not version.isascii() or not version.isdigit() or not 1 <= len(version) <= 9:
        raise CheckpointError(f"has version {version[:20]!r}, expected a whole number.", path=path)
    if int(version) > VERSION:
        raise CheckpointError(
            f"has version {version} of the format, and this ebm_ppl reads up to {VERSION}. Install a later one.",
            path=path,
        )
    text = metadata.get("manifest", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("manifest_sha256"):
        raise CheckpointError("has a manifest that is not the one written: the file is damaged.", path=path)
    try:
        found = json.loads(text)
        manifest = Manifest(**found)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"has a manifest that cannot be read ({type(error).__name__}).", path=path) from error
    _check(path, manifest)
    return manifest


def _check(path: str, manifest: Manifest) -> None:
    """The types of the manifest's parts: a digest says that nothing changed since somebody wrote it, not who."""
    is_sound = all(isinstance(part, dict) for part in (manifest.arrays, manifest.values, manifest.environment))
    is_sound &= isinstance(manifest.structure, dict) and all(isinstance(v, str) for v in manifest.structure.values())
    is_sound &= manifest.step is None or type(manifest.step) is int
    if not is_sound:
        raise CheckpointError("has a manifest with parts of the wrong types.", path=path)
    for name, entry in manifest.arrays.items():
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("dtype"), str)
            and isinstance(entry.get("shape"), list)
            and all(type(size) is int and size >= 0 for size in entry["shape"])
            and isinstance(entry.get("sha256"), str)
            and isinstance(entry.get("key_impl", ""), str)
        ):
            raise CheckpointError("has an entry of the manifest that is none.", path=path, entry=name)
