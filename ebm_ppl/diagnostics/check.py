"""The outcome of one check, and how outcomes add up to a verdict."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Status = Literal["pass", "warn", "fail", "not assessable"]
Judged = Literal["sampler", "model", "smc"]


class Check(NamedTuple):
    """Outcome of one check; prints as one line.

    Attributes:
        name: Which check.
        status: ``"pass"``, ``"warn"``, ``"fail"``, or ``"not assessable"`` where what was given cannot tell.
        value: What was measured; NaN where nothing could be.
        threshold: What it is held against, in words.
        why: The finding, in words.
        blind_to: Faults that this check passes over.
        judges: Whether it speaks of the sampler, of the model, or of the SMC that the model is judged by.
        is_required: Whether there is no overall pass without it.
        num_gradients: Gradient evaluations that were spent for it; those of the chains are counted with each check of them.
    """

    name: str
    status: Status
    value: float
    threshold: str
    why: str
    blind_to: str
    judges: Judged = "sampler"
    is_required: bool = False
    num_gradients: int = 0

    def __str__(self) -> str:
        value = "" if self.value != self.value else f" {self.value:.4g} ({self.threshold})"
        return f"{self.name}: {self.status}{value}: {self.why}. Blind to {self.blind_to}."


def verdict(checks: Iterable[Check]) -> Status:
    """What several checks of one thing say together.

    One that fails fails them all. Else one that is required and not assessable leaves all not assessable, a warning warns,
    and there is a pass where at least one is required and all of those pass.

    Args:
        checks: Outcomes.

    Example:
        >>> good = Check("rhat", "pass", 1.0, "<= 1.01", "chains agree", "modes that no chain visits", is_required=True)
        >>> verdict([good]), verdict([good, good._replace(status="not assessable")]), verdict([])
        ('pass', 'not assessable', 'not assessable')
    """
    checks = list(checks)
    required = [check.status for check in checks if check.is_required]
    if any(check.status == "fail" for check in checks):
        return "fail"
    if not required or "not assessable" in required:
        return "not assessable"
    return "warn" if any(check.status == "warn" for check in checks) else "pass"
