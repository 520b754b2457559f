"""Times of computations that take turns, and the ratios of these times.

A machine has slow moments. What is compared therefore runs in turns, many short times over, and a ratio is taken within a
turn; the median over turns and its quartiles are what a benchmark reports.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import ebm_ppl as ebm

Seconds = dict[str, list[float]]
"""What each contender took, turn by turn."""


def seconds_of(run: Callable[[], Any]) -> float:
    """How long ``run`` takes until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def in_turns(contenders: Mapping[str, Callable[[], Any]], *, turns: int, warm_up: int = 2) -> Seconds:
    """Run every contender once a turn, in the opposite order every other turn.

    Args:
        contenders: What to run, by name.
        turns: Turns that count.
        warm_up: Turns before them, which compile and fill caches.

    Returns:
        Seconds by name, one number per turn.
    """
    for _ in range(warm_up):
        for run in contenders.values():
            jax.block_until_ready(run())
    seconds: Seconds = {name: [] for name in contenders}
    for turn in range(turns):
        for name, run in _in_order(contenders, turn):
            seconds[name].append(seconds_of(run))
    return seconds


def in_turns_with_fit(
    others: Mapping[str, Callable[[], Any]],
    *fit_arguments: Any,
    chunk: int,
    turns: int,
    warm_up: int = 2,
    **options: Any,
) -> Seconds:
    """Let chunks of one long run of :func:`ebm_ppl.fit` take turns with other contenders.

    What ``fit`` does once per call, such as looking at all rows, is not part of an update: the others run inside its
    ``evaluate``, between two chunks, and the clock of ``fit`` stands still for as long.

    Args:
        others: What to run between two chunks, by name.
        *fit_arguments: Key, state, data, objective and optimizer.
        chunk: Updates of one chunk.
        turns: Turns that count.
        warm_up: Turns before them.
        **options: Further ones for ``fit``.

    Returns:
        Seconds by name, one number per turn; those of ``fit`` under ``"fit"``.
    """
    seconds: Seconds = {name: [] for name in ("fit", *others)}
    start = time.perf_counter()

    def evaluate(state: ebm.TrainState) -> dict[str, float]:
        nonlocal start
        jax.block_until_ready(state)
        seconds["fit"].append(time.perf_counter() - start)
        for name, run in _in_order(others, len(seconds["fit"])):
            seconds[name].append(seconds_of(run))
        start = time.perf_counter()
        return {}

    num_steps = chunk * (turns + warm_up)
    ebm.fit(*fit_arguments, num_steps=num_steps, report_every=chunk, evaluate=evaluate, progress_bar=False, **options)
    return {name: values[warm_up:] for name, values in seconds.items()}


def _in_order(contenders: Mapping[str, Callable[[], Any]], turn: int) -> list[tuple[str, Callable[[], Any]]]:
    items = list(contenders.items())
    return items[::-1] if turn % 2 else items


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of ``over / under``, the ratio taken within each turn."""
    ratios = np.asarray(over) / np.asarray(under)
    low, median, high = statistics.quantiles(ratios.tolist(), n=4, method="inclusive")
    return {"median": median, "lower_quartile": low, "upper_quartile": high}
