"""The outcome of a check of a kernel on a target."""

from typing import NamedTuple

from ebm_ppl.testing.statistics import CHECK_HEADER, Check


class KernelReport(NamedTuple):
    """Outcome of a check of a kernel on a target; printing it shows everything.

    Attributes:
        name: Check and target.
        checks: One per projection or antisymmetric function, each at its share of ``alpha``.
        acceptance: Mean acceptance rate; NaN for kernels without an accept step.
        moved_fraction: Fraction of chains that end elsewhere than they started, in the coordinate that moved least.
        relative_jump: Mean squared distance travelled over twice the variance, in the coordinate that moved most: 1
            when the end forgets the start.
        divergent_fraction: Fraction of steps reported as divergent.
        nonfinite_fraction: Fraction of chains that end at NaN or infinity.
        minimum_moved: What ``moved_fraction`` must exceed.
        minimum_jump: What ``relative_jump`` must exceed.
        power_goal: What the power of every check must not exceed, or ``None``.
        alpha: False-failure rate of the whole report.
        num_chains: Independent chains.
        num_steps: Steps of each.
    """

    name: str
    checks: tuple[Check, ...]
    acceptance: float
    moved_fraction: float
    relative_jump: float
    divergent_fraction: float
    nonfinite_fraction: float
    minimum_moved: float
    minimum_jump: float
    power_goal: float | None
    alpha: float
    num_chains: int
    num_steps: int

    @property
    def has_moved(self) -> bool:
        """Whether the chains moved enough for the checks to mean anything: a frozen kernel leaves any law invariant."""
        return self.moved_fraction > self.minimum_moved and self.relative_jump > self.minimum_jump

    @property
    def passed(self) -> bool:
        """Whether every check passed with the power asked for, the chains moved, and all stayed finite."""
        is_strong = self.power_goal is None or all(check.power <= self.power_goal for check in self.checks)
        return (
            all(check.passed for check in self.checks) and self.has_moved and is_strong and not self.nonfinite_fraction
        )

    def __str__(self) -> str:
        goal = "" if self.power_goal is None else f", power goal {self.power_goal:.4g}"
        lines = [
            f"{self.name}: {'PASSED' if self.passed else 'FAILED'} "
            f"({self.num_chains} chains, {self.num_steps} steps, alpha {self.alpha:.1g}{goal})",
            f"acceptance {self.acceptance:.4f}, divergent {self.divergent_fraction:.2g}, "
            f"non-finite {self.nonfinite_fraction:.2g}",
            f"moved {self.moved_fraction:.4f} (more than {self.minimum_moved:.2g} asked), "
            f"relative jump {self.relative_jump:.2g} (more than {self.minimum_jump:.2g} asked)",
            CHECK_HEADER,
            *map(str, self.checks),
        ]
        return "\n".join(lines)

    def raise_if_failed(self) -> "KernelReport":
        """The report itself, or an error that shows it.

        Raises:
            AssertionError: the report failed.
        """
        if not self.passed:
            raise AssertionError(str(self))
        return self
