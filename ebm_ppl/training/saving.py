"""When :func:`ebm_ppl.fit` hands its state to whoever saves it."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import numpy as np

from ebm_ppl.checks import check_count
from ebm_ppl.errors import TrainingInterrupted
from ebm_ppl.training.state import TrainState


class Interruptions:
    """Ctrl-C that is not lost.

    Python raises ``KeyboardInterrupt`` wherever the program happens to be, and swallows it in callbacks of its garbage
    collector, of which JAX has one. While this context is open an interruption is remembered too, for :meth:`check` to
    raise again. Only Python's own handler is replaced, and only in the main thread, where signals are heard.
    """

    def __init__(self) -> None:
        self._is_pending, self._is_installed = False, False

    def __enter__(self) -> "Interruptions":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hear)
            self._is_installed = True
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise what was swallowed."""
        if self._is_pending:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._is_pending = True
        raise KeyboardInterrupt


class Saver:
    """Calls a function with states, no state twice.

    Args:
        save: The function, or ``None``.
        every: Updates between two calls of :meth:`save_if_due`; every call counts when ``None``.
        state: Where training starts, which somebody has already.

    Raises:
        TypeError: ``save`` is not callable, or ``every`` is not a whole number.
        ValueError: ``every`` is below one, or given without a function.
    """

    def __init__(self, save: Callable[[TrainState], Any] | None, every: int | None, state: TrainState):
        if save is not None and not callable(save):
            raise TypeError(
                f"save: got {type(save).__name__}, expected a function of the state, such as the save of "
                "ebm_ppl.checkpoint.Checkpoints(directory)."
            )
        if every is not None and save is None:
            raise ValueError(f"save_every: got {every} without save, expected None.")
        self._save = save
        self._every = 1 if every is None else check_count("save_every", every)
        self._last = int(state.step)

    def save_if_due(self, state: TrainState) -> None:
        """Save where enough updates were made since the last time."""
        if int(state.step) - self._last >= self._every:
            self.save_now(state)

    def save_now(self, state: TrainState) -> None:
        """Save, unless this very state was saved."""
        step = int(state.step)
        if self._save is not None and step != self._last:
            self._save(state)
            self._last = step


def training_interrupted(state: TrainState, history: dict[str, np.ndarray], *, is_saved: bool) -> TrainingInterrupted:
    """What is raised in the place of a ``KeyboardInterrupt``."""
    saved = "It was handed to `save`, too. " if is_saved else ""
    return TrainingInterrupted(
        f"training was interrupted after update {int(state.step)}. The state is in `.state`, its history in `.history`. "
        f"{saved}fit(None, error.state, ...) goes on from there, with the same data and arguments.",
        state=state,
        history=history,
    )
