"""Distributions as pytrees whose leaves have names and one order.

NumPyro lists the fields of a distribution in the order of a Python set, which changes with ``PYTHONHASHSEED``: leaves that
one process writes in order would be read as other parameters by the next. Inside an :class:`~ebm_ppl.distributions.EBM`
every distribution is therefore flattened field by field, in alphabetical order. So is the fixed base of a potential, and a
state that is saved.
"""

from typing import Any

import jax
import numpyro.distributions as dist
from jax.tree_util import GetAttrKey

from ebm_ppl.types import PyTree


class NamedFields:
    """A distribution seen as its fields, for the pytree of whatever holds it.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> paths = jax.tree_util.tree_leaves_with_path(NamedFields(dist.StudentT(3.0, 0.0, 1.0)))
        >>> [jax.tree_util.keystr(path) for path, _ in paths]
        ['._chi2...', '.df', '.loc', '.scale']
    """

    def __init__(self, value: dist.Distribution):
        self.value = value


def named(tree: PyTree) -> PyTree:
    """Wrap every distribution of a tree that flattens the way NumPyro's do by default."""
    return jax.tree.map(lambda x: NamedFields(x) if _is_default(x) else x, tree, is_leaf=_is_default)


def unnamed(tree: PyTree) -> PyTree:
    """Undo :func:`named`."""
    return jax.tree.map(lambda x: x.value if _is_named(x) else x, tree, is_leaf=_is_named)


def _is_default(node: Any) -> bool:
    return isinstance(node, dist.Distribution) and type(node).tree_flatten is dist.Distribution.tree_flatten


def _is_named(node: Any) -> bool:
    return isinstance(node, NamedFields)


def _flatten(node: NamedFields) -> tuple[tuple, tuple]:
    children, static = node.value.tree_flatten()
    kind = type(node.value)
    fields = dict(zip(kind.gather_pytree_data_fields(), children, strict=True))
    settings = sorted(zip(kind.gather_pytree_aux_fields(), static, strict=True), key=lambda pair: pair[0])
    names = tuple(sorted(fields))
    return tuple((GetAttrKey(name), named(fields[name])) for name in names), (kind, names, tuple(settings))


def _unflatten(structure: tuple, children: Any) -> NamedFields:
    kind, names, settings = structure
    fields, static = dict(zip(names, map(unnamed, children), strict=True)), dict(settings)
    return NamedFields(
        kind.tree_unflatten(
            tuple(static[name] for name in kind.gather_pytree_aux_fields()),
            tuple(fields[name] for name in kind.gather_pytree_data_fields()),
        )
    )


jax.tree_util.register_pytree_with_keys(NamedFields, _flatten, _unflatten)
