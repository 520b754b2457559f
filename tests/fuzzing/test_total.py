"""How many cases the slow suite makes, all areas together."""

import importlib
from pathlib import Path

import pytest

from tests.fuzzing.contract import call
from tests.fuzzing.subjects import CASES

AREAS = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py") if path.stem != Path(__file__).stem)


def test_the_slow_suite_makes_ten_thousand_cases():
    for area in AREAS:
        importlib.import_module(f"tests.fuzzing.{area}")
    assert len({name.split(":")[0] for name in CASES}) == len(AREAS)
    assert sum(CASES.values()) >= 10_000


def documented(step_size):
    """A function that keeps its word or does not.

    Raises:
        ValueError: the step size is none.
    """
    if step_size == "undocumented":
        raise KeyError("step_size: got a word")
    if step_size == "nameless":
        raise ValueError("got a word")
    if step_size < 0:
        raise ValueError(f"step_size: got {step_size}, expected a number > 0.")
    return step_size


def test_a_broken_promise_is_seen():
    assert call(documented, {"step_size": 1.0}) == 1.0
    assert call(documented, {"step_size": -1.0}) is None
    with pytest.raises(AssertionError, match="undocumented: documented: KeyError"):
        call(documented, {"step_size": "undocumented"})
    with pytest.raises(AssertionError, match="names no argument: documented: ValueError"):
        call(documented, {"step_size": "nameless"})
