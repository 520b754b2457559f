"""Name -> constructor of every target: one line here gives a target the whole suite."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ebm_ppl.targets.banana import banana
from ebm_ppl.targets.dirichlet import dirichlet
from ebm_ppl.targets.double_well import double_well
from ebm_ppl.targets.funnel import funnel
from ebm_ppl.targets.gamma import gamma
from ebm_ppl.targets.gaussian import gaussian
from ebm_ppl.targets.gumbel import gumbel
from ebm_ppl.targets.many_well import many_well
from ebm_ppl.targets.mixture import gaussian_mixture, grid25
from ebm_ppl.targets.ring import ring
from ebm_ppl.targets.student_t import student_t
from ebm_ppl.targets.target import Target
from ebm_ppl.targets.tilted_normal import tilted_normal
from ebm_ppl.targets.truncated_normal import truncated_normal

_CONSTRUCTORS: dict[str, Callable[..., Target]] = {
    "banana": banana,
    "dirichlet": dirichlet,
    "double_well": double_well,
    "funnel": funnel,
    "gamma": gamma,
    "gaussian": gaussian,
    "gaussian_1": partial(gaussian, dim=1),
    "gaussian_10": partial(gaussian, dim=10),
    "gaussian_50": partial(gaussian, dim=50),
    "gaussian_mixture": gaussian_mixture,
    "grid25": grid25,
    "gumbel": gumbel,
    "many_well": many_well,
    "many_well_32": partial(many_well, dim=32),
    "ring": ring,
    "student_t": student_t,
    "tilted_normal": tilted_normal,
    "truncated_normal": truncated_normal,
}


def names() -> tuple[str, ...]:
    """Names of all targets, sorted. ``get(name)`` works for each of them without options.

    Example:
        >>> from ebm_ppl import targets
        >>> "double_well" in targets.names()
        True
    """
    return tuple(sorted(_CONSTRUCTORS))


def get(name: str, **options: Any) -> Target:
    """A target by name.

    Args:
        name: One of :func:`names`.
        **options: Keyword arguments of its constructor, such as ``dim`` of ``"gaussian"``.

    Returns:
        The target, with ``target.name == name``.

    Raises:
        ValueError: no target has that name (the text lists close matches), or an option is out of range.
        TypeError: the constructor has no such option, or the name is none.

    Example:
        >>> from ebm_ppl import targets
        >>> targets.get("gaussian", dim=3).event_shape
        (3,)
        >>> round(targets.get("double_well").log_normalizer, 10)
        -0.0535718536
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected one of ebm.targets.names().")
    if name not in _CONSTRUCTORS:
        raise ValueError(f"name: got {name!r}, which is not a target. {name_hint(name, names(), 'Known targets')}")
    return dataclasses.replace(_CONSTRUCTORS[name](**options), name=name)


def name_hint(name: str, known: Sequence[str], label: str) -> str:
    """What to write instead of an unknown name: those close to it, or all there are."""
    close = difflib.get_close_matches(name, known)
    return f"Did you mean {' or '.join(map(repr, close))}?" if close else f"{label}: {', '.join(known)}."
