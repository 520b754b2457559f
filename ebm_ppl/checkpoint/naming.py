"""Names for the leaves of a state and words for its structure, the same in every process.

Leaves are saved by the name of their path, never by their number: NumPyro lists the fields of a distribution in an order
that changes with ``PYTHONHASHSEED``. What a state has besides leaves (which kernel, which activation, which sizes) is not
saved but described, so that numbers of one model are not put into another of the same shapes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.tree_util import PyTreeDef

from ebm_ppl.named_fields import NamedFields, named, unnamed
from ebm_ppl.types import PyTree


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by the names of their paths.

    Example:
        >>> named_leaves({"a": 1.0, "b": (2.0,)})
        {"['a']": 1.0, "['b'][0]": 2.0}
    """
    leaves = jax.tree_util.tree_leaves_with_path(named(tree))
    return {jax.tree_util.keystr(path) or ".": leaf for path, leaf in leaves}


def with_leaves(tree: PyTree, replaced: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves in the places of those names."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(named(tree))
    new = [replaced[jax.tree_util.keystr(path) or "."] for path, _ in leaves]
    return unnamed(jax.tree.unflatten(structure, new))


def described_structure(tree: PyTree) -> dict[str, str]:
    """What a tree consists of besides its leaves: for every node the name of its path and what stands there.

    Functions and classes are told by their names, other objects by their types: two closures of one function look alike.

    Example:
        >>> from jax.tree_util import Partial
        >>> described_structure({"power": Partial(pow, exp=2)})["['power']"]
        'Partial(builtins.pow)'
    """
    return dict(_nodes(jax.tree.structure(named(tree)), ""))


def _nodes(structure: Any, path: str) -> Iterator[tuple[str, str]]:
    node = structure.node_data()
    if node is None:  # a leaf
        return
    kind, static = node
    words = "" if static is None or kind is dict else f"({in_words(static)})"
    yield path or ".", kind.__name__ + words
    for name, child in zip(_names_of_children(kind, static), structure.children(), strict=False):
        yield from _nodes(child, path + name)


def _names_of_children(kind: type, static: Any) -> Iterator[str]:
    """As in a leaf's name where the node knows them, numbered else."""
    if kind is dict:
        yield from (f"[{key!r}]" for key in static)
    elif kind is NamedFields:
        yield from (f".{name}" for name in static[1])
    else:
        yield from (f".{name}" for name in getattr(kind, "_fields", ()))
    number = 0
    while True:
        yield f"[{number}]"
        number += 1


def in_words(static: Any) -> str:
    """A static part of a structure as text without addresses and without the order of a set.

    Example:
        >>> in_words((3, None, len, {"b": 1, "a": "x"}))
        "3, None, builtins.len, {'a': 'x', 'b': 1}"
    """
    if isinstance(static, tuple | list):
        return ", ".join(_enclosed(item) for item in static)
    return _enclosed(static)


def _enclosed(static: Any) -> str:
    if static is None or isinstance(static, bool | int | float | complex | str | bytes):
        return repr(static)
    if isinstance(static, tuple | list):
        return f"({in_words(static)})"
    if isinstance(static, set | frozenset):
        return f"{{{', '.join(sorted(map(_enclosed, static)))}}}"
    if isinstance(static, Mapping):
        items = sorted((_enclosed(key), _enclosed(value)) for key, value in static.items())
        return f"{{{', '.join(f'{key}: {value}' for key, value in items)}}}"
    if isinstance(static, PyTreeDef):
        return "; ".join(f"{path}: {words}" for path, words in _nodes(static, ""))
    if isinstance(static, type) or (callable(static) and hasattr(static, "__qualname__")):
        return f"{static.__module__}.{static.__qualname__}"
    if dataclasses.is_dataclass(static):
        fields = {field.name: getattr(static, field.name) for field in dataclasses.fields(static)}
        return f"{type(static).__name__}({', '.join(f'{name}={_enclosed(value)}' for name, value in fields.items())})"
    return type(static).__qualname__
