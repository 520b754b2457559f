"""Functions with bound arguments: kernels, potentials and objectives are such, and are compared and looked into as such."""

import functools
from typing import Any

import equinox as eqx
import jax
from jax.tree_util import Partial


def comparable(function: Any) -> Any:
    """A ``functools.partial`` as JAX's own; anything else as it is.

    A fresh ``functools.partial`` equals nothing but itself, so that what is compiled for it is compiled again for the next
    one. JAX's compares by its contents.

    Example:
        >>> first, second = (functools.partial(pow, exp=2) for _ in range(2))
        >>> first == second, comparable(first).func == comparable(second).func
        (False, True)
    """
    if isinstance(function, functools.partial):
        return Partial(function.func, *function.args, **function.keywords)
    return function


def function_behind(kernel: Any) -> Any:
    """The function of a kernel, without its tunables: where a kernel's Protocols are.

    Example:
        >>> function_behind(Partial(pow, exp=2)) is pow
        True
    """
    return kernel.func if isinstance(kernel, Partial) else kernel


def tunables_of(kernel: Any) -> dict[str, Any]:
    """The tunables of a kernel by name: what its function takes beside the potential.

    Example:
        >>> tunables_of(Partial(pow, exp=2)), tunables_of(pow)
        ({'exp': 2}, {})
    """
    return kernel.keywords if isinstance(kernel, Partial) else {}


def as_constants(tree: Any) -> Any:
    """A pytree of the same kind whose arrays are constants to every derivative.

    Example:
        >>> float(jax.grad(lambda x: x * as_constants({"x": x})["x"])(3.0))
        3.0
    """
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_array(leaf) else leaf, tree)
