"""What every public function promises of every call: a documented exception that names the argument, or finite numbers."""

import contextlib
import faulthandler
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LIMIT = 240.0
"""Seconds after which a call counts as a hang: every thread is printed and the process ends."""

# XLA computes outside of Python, so neither a signal nor an exception would stop it.
_OUTPUT = sys.__stderr__


def documented_exceptions(function: Callable) -> tuple[type[BaseException], ...]:
    """The classes under ``Raises:`` in a docstring, and ``RuntimeWarning`` and its like under ``Warns:``."""
    text = inspect.getdoc(function) or ""
    found = []
    for title in ("Raises", "Warns"):
        section = re.search(rf"^{title}:\n((?:    .*\n?|\s*\n)+)", text, re.MULTILINE)
        found += re.findall(r"^    (\w+):", section.group(1), re.MULTILINE) if section else []
    return tuple(_exception(name) for name in found)


def _exception(name: str) -> type[BaseException]:
    from ebm_ppl import errors

    builtin = vars(__import__("builtins")).get(name)
    return builtin if builtin is not None else getattr(errors, name)


@contextlib.contextmanager
def no_hang(limit: float = LIMIT) -> Iterator[None]:
    """End the process, with a trace of where it stood, when the block takes longer than ``limit`` seconds."""
    faulthandler.dump_traceback_later(limit, exit=True, file=_OUTPUT)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def names_an_argument(message: str, names: set[str]) -> bool:
    """Whether a message opens with one of these names, as in ``step_size: got -1.0, expected ...``.

    Keys are JAX's own: what it says of a wrong one has the word ``key`` in it.
    """
    opening = re.match(r"\w+", message)
    return (opening is not None and opening.group() in names) or ("key" in names and re.search(r"\bkey\b", message))  # type: ignore[return-value]


class CallersError(Exception):
    """What a function of the caller's raises, which passes through."""


WRONG_SIGNATURE = re.compile(r"takes \d+ positional argument|missing \d+ required positional")
"""Python's own words for a function of the caller's that takes other arguments, which speak for themselves."""


def call(function: Callable, arguments: dict[str, Any], *, documented: tuple = (), names: tuple[str, ...] = ()) -> Any:
    """The result of a call, or ``None`` where it was refused as it should be.

    Args:
        function: What is called.
        arguments: Its arguments by name.
        documented: Functions whose ``Raises:`` count beside its own, such as those that it calls.
        names: What its messages may open with beside its parameters and its own name.

    Raises:
        AssertionError: the call raised what its docstring does not mention, or a message that names no argument.
    """
    allowed = tuple(cls for each in (function, *documented) for cls in documented_exceptions(each))
    known = {function.__name__, *names}
    for each in (function, *documented):
        known |= set(inspect.signature(each).parameters)
    try:
        with no_hang():
            return function(**arguments)
    except CallersError:
        return None
    except Exception as error:
        if isinstance(error, TypeError) and WRONG_SIGNATURE.search(str(error)):
            return None
        what = f"{function.__name__}: {type(error).__name__}: {error}"
        if not isinstance(error, allowed):
            raise AssertionError(f"undocumented: {what}") from error
        if not names_an_argument(str(error), known):
            raise AssertionError(f"names no argument: {what}") from error
        return None


def nonfinite_leaves(result: Any) -> list[str]:
    """Paths of the floating leaves of a result that are not finite everywhere."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(result):
        if isinstance(leaf, float | np.ndarray | np.generic | jax.Array) and _is_floating(leaf):
            bad = ~np.isfinite(np.asarray(leaf, np.complex128))
            if bad.any():
                found.append(jax.tree_util.keystr(path))
    return found


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, float) or jnp.issubdtype(leaf.dtype, jnp.inexact)


def assert_finite(result: Any, *, but: tuple[str, ...] = ()) -> None:
    """Every float in a result is finite; ``but`` are patterns of paths whose NaN or infinity is documented."""
    bad = [path for path in nonfinite_leaves(result) if not any(re.search(pattern, path) for pattern in but)]
    assert not bad, f"not finite, and nothing says so: {bad}"
