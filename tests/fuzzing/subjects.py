"""A public function with a call that works, and calls made from it by replacing one or two of its arguments."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzzing.contract import assert_finite, call

FEW = 40
"""Cases of an area in the default suite."""

CASES: dict[str, int] = {}
"""Cases of each test in the slow suite."""

# A failure is reported as it was found: making it smaller would compile many more programs.
FIXED = settings(
    derandomize=True,
    deadline=60_000,  # milliseconds; a first call may compile for many of them
    phases=(Phase.explicit, Phase.generate),
    database=None,
    suppress_health_check=list(HealthCheck),
)


class Subject(NamedTuple):
    """What is called, and how.

    Attributes:
        name: How the test is called.
        function: What is called, with keyword arguments.
        right: Arguments with which it works.
        odd: For each argument that is tried, what may come instead.
        documented: Functions whose ``Raises:`` count beside its own.
        names: What its messages may open with beside its parameters and its own name.
        may_be_nan: Patterns of paths in the result whose NaN or infinity is documented.
        judge: What must hold of a result and the arguments that led to it, instead of finite numbers.
        cases: In the slow suite.
        is_quick: Whether the default suite calls it too: what it compiles is little.
    """

    name: str
    function: Callable
    right: dict[str, Any]
    odd: dict[str, st.SearchStrategy]
    documented: tuple[Callable, ...] = ()
    names: tuple[str, ...] = ()
    may_be_nan: tuple[str, ...] = ()
    judge: Callable[[Any, dict[str, Any]], None] | None = None
    cases: int = 120
    is_quick: bool = True

    def check(self, replaced: dict[str, Any]) -> Any:
        """One call: a documented refusal, or a result that may be believed. Returns the result."""
        result = call(self.function, self.right | replaced, documented=self.documented, names=self.names)
        if result is None:
            return None
        if self.judge is not None:
            self.judge(result, self.right | replaced)
        else:
            assert_finite(result, but=self.may_be_nan)
        return result


@st.composite
def replacements(draw: Callable, subject: Subject) -> dict[str, Any]:
    """One argument, or sometimes two, in another form."""
    names = draw(st.lists(st.sampled_from(sorted(subject.odd)), min_size=1, max_size=2, unique=True))
    return {name: draw(subject.odd[name]) for name in names}


def calls_of(area: str, subjects: Sequence[Subject]) -> tuple[Callable, Callable]:
    """The tests of an area: a few calls over all its subjects, and in the slow suite many of each."""
    assert len({subject.name for subject in subjects}) == len(subjects)
    CASES.update({f"{area}: {subject.name}": subject.cases for subject in subjects})

    def test_some_calls() -> None:
        @settings(FIXED, max_examples=FEW)
        @given(st.data())
        def run(data: Any) -> None:
            subject = data.draw(st.sampled_from([subject for subject in subjects if subject.is_quick]))
            subject.check(data.draw(replacements(subject)))

        run()

    @pytest.mark.slow
    @pytest.mark.parametrize("subject", subjects, ids=[subject.name for subject in subjects])
    def test_many_calls(subject: Subject, record_property: Callable) -> None:
        assert subject.check({}) is not None, "the call from which all others are made was refused"
        made = 0

        @settings(FIXED, max_examples=subject.cases)
        @given(replacements(subject))
        def run(replaced: dict[str, Any]) -> None:
            nonlocal made
            made += 1
            subject.check(replaced)

        run()
        record_property("fuzzing_cases", made)
        assert made >= subject.cases, f"hypothesis made {made} of {subject.cases} cases"

    return test_some_calls, test_many_calls
