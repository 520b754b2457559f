"""Held-out evaluation between reports, and stopping when it no longer improves."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ebm_ppl.checks import check_count, check_number
from ebm_ppl.training.state import TrainState

Evaluate = Callable[[TrainState], Mapping[str, Any]]
"""Numbers by name, on the host, from the state after a report: ``lambda state: {"nll": held_out_nll(state.potential)}``."""

PREFIX = "evaluation_"
"""What :func:`ebm_ppl.fit` writes before the names of evaluations in its history."""


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stop training when a number has not improved for a while, and return the best state.

    Args:
        metric: Name of an evaluation (``"evaluation_nll"``) or of a metric of the history; of the latter the mean over a
            report counts.
        patience: Reports without an improvement after which training stops.
        min_delta: What counts as an improvement, in the units of the metric.
        maximize: Whether more is better.

    Raises:
        TypeError: ``metric`` is no name, or another argument no number.
        ValueError: ``patience`` is below one, or ``min_delta`` is negative or not finite.

    Example:
        >>> EarlyStopping("evaluation_nll", patience=3).patience
        3
    """

    metric: str
    patience: int = 5
    min_delta: float = 0.0
    maximize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str):
            raise TypeError(f"metric: got {type(self.metric).__name__}, expected the name of one.")
        check_count("patience", self.patience)
        check_number("min_delta", self.min_delta)


def check_listeners(evaluate: Any, early_stopping: Any) -> None:
    """What hears of reports must be able to.

    Raises:
        TypeError: ``evaluate`` is not callable, or ``early_stopping`` is no :class:`EarlyStopping`.
    """
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate: got {type(evaluate).__name__}, expected a function of the state.")
    if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
        raise TypeError(
            f"early_stopping: got {type(early_stopping).__name__}, expected an ebm_ppl.EarlyStopping(metric)."
        )


class BestSoFar:
    """The best state that a run has reported, by the rule of an :class:`EarlyStopping`."""

    def __init__(self, rule: EarlyStopping, state: TrainState):
        if not isinstance(rule, EarlyStopping):
            raise TypeError(f"early_stopping: got {type(rule).__name__}, expected an EarlyStopping.")
        self.rule, self.state = rule, state
        self._value, self._waited = math.inf, 0

    def should_stop(self, state: TrainState, report: Mapping[str, np.ndarray]) -> bool:
        """Look at one report; whether patience has run out.

        Warns:
            RuntimeWarning: the value is NaN, which improves on nothing.

        Raises:
            ValueError: the report has no such metric.
        """
        rule = self.rule
        if rule.metric not in report:
            raise ValueError(f"early_stopping: got metric {rule.metric!r}, expected one of {sorted(report)}.")
        value = float(np.mean(report[rule.metric]))
        if math.isnan(value):
            warnings.warn(
                f"early_stopping: {rule.metric} is NaN after update {int(state.step)}; it counts as no improvement.",
                RuntimeWarning,
                stacklevel=3,
            )
        value = -value if rule.maximize else value
        if value < self._value - rule.min_delta:
            self.state, self._value, self._waited = state, value, 0
        else:
            self._waited += 1
        return self._waited >= rule.patience


def named_numbers(evaluate: Evaluate | None, state: TrainState) -> Mapping[str, Any]:
    """What a caller evaluates, by name; nothing where there is no function.

    Raises:
        TypeError: ``evaluate`` is no function, or returned something else.
    """
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate: got {type(evaluate).__name__}, expected a function of the state.")
    found = {} if evaluate is None else evaluate(state)
    if not isinstance(found, Mapping):
        raise TypeError(f"evaluate: returned {type(found).__name__}, expected a dict of numbers by name.")
    return found


def evaluated(evaluate: Evaluate, state: TrainState) -> dict[str, np.ndarray]:
    """The evaluations of one report with the update they were made after, ``(1,)`` each.

    Raises:
        TypeError: ``evaluate`` returned something else than numbers by name.
    """
    found = named_numbers(evaluate, state)
    numbers = {PREFIX + name: np.asarray(value) for name, value in found.items()}
    for name, value in numbers.items():
        if value.shape != ():
            raise TypeError(
                f"evaluate: returned shape {value.shape} for {name.removeprefix(PREFIX)!r}, expected numbers."
            )
    return {name: value[None] for name, value in {PREFIX + "step": np.asarray(state.step), **numbers}.items()}
