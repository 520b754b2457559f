"""A directory that keeps the last checkpoints of one run."""

import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import jax
import numpy as np

from ebm_ppl.checkpoint.states import State, arrays_on_host, hashed_manifest, restore, wait_for_all_processes
from ebm_ppl.checkpoint.storage import PARTIAL, write
from ebm_ppl.checks import check_count
from ebm_ppl.errors import CheckpointError
from ebm_ppl.training import TrainState

_NAME = re.compile(r"step-(\d{1,18})\.safetensors")


class Checkpoints:
    """The last checkpoints of a run, in a directory of its own: ``step-000000100.safetensors`` and so on.

    Args:
        directory: Made if missing.
        keep: How many to keep; older ones are removed once a newer one is complete.
        asynchronous: Write in a thread of its own while training goes on. :meth:`save` returns when the numbers are on
            the host, after the write before it has ended; leave the ``with`` block, or call :meth:`wait`, to be sure that
            all is written. What a write raised is raised by the next call.

    Raises:
        ValueError: ``keep`` is below one.

    Example:
        >>> import functools, tempfile, jax, jax.numpy as jnp, optax, ebm_ppl as ebm
        >>> optimizer, data = optax.adam(1e-2), jnp.ones((16, 2))
        >>> def fresh_state():
        ...     sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.1))
        ...     net = ebm.potentials.MLP(2, key=jax.random.key(0), width=8, depth=1)
        ...     return ebm.init_train(net, optimizer, sampler)
        >>> objective = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=2)
        >>> directory = tempfile.TemporaryDirectory()
        >>> with Checkpoints(directory.name, keep=2) as checkpoints:
        ...     _ = ebm.fit(jax.random.key(1), fresh_state(), data, objective, optimizer, num_steps=30,
        ...                 report_every=10, save=checkpoints.save)
        >>> checkpoints.steps()
        [20, 30]
        >>> state = checkpoints.restore(like=fresh_state())
        >>> state, _ = ebm.fit(None, state, data, objective, optimizer, num_steps=10)
        >>> int(state.step)
        40
        >>> directory.cleanup()
    """

    def __init__(self, directory: str | os.PathLike[str], *, keep: int = 2, asynchronous: bool = True):
        self.directory = Path(directory)
        self._keep = check_count("keep", keep)
        self.directory.mkdir(parents=True, exist_ok=True)
        # One thread: checkpoints become complete in their order.
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in increasing order."""
        names = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        """The file of one step."""
        return self.directory / f"step-{step:09d}.safetensors"

    def save(self, state: TrainState) -> None:
        """Save a training state under its step.

        Raises:
            TypeError: it is no training state.
            ValueError: the directory has a later step, of another run or of another future of this one.
            OSError: this write, or the one before, failed.
        """
        if not isinstance(state, TrainState):
            raise TypeError(f"state: got {type(state).__name__}, expected an ebm_ppl.TrainState.")
        self.wait()
        step = int(state.step)
        later = [other for other in self.steps() if other > step]
        if later:
            raise ValueError(
                f"directory: {str(self.directory)!r} has a checkpoint of step {later[-1]}, later than this one of step "
                f"{step}; expected a directory of this run alone. Restore from it, use another directory, or remove what "
                "is in the way."
            )
        arrays = arrays_on_host(state)
        if jax.process_index() == 0:
            if self._writer is None:
                self._write(step, state, arrays)
            else:
                # With the numbers on the host, the hashes are left to the thread too. It reads none of the state's own
                # arrays, which whoever trains may have given away by then.
                told = state._replace(step=arrays[".step"])
                self._pending = self._writer.submit(self._write, step, told, arrays)
        if self._writer is None:
            wait_for_all_processes()

    def wait(self) -> None:
        """Return when all that was saved is on the disk.

        Raises:
            OSError: a write failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        if self._writer is not None:
            wait_for_all_processes()

    def restore(self, like: State, *, step: int | None = None, check_structure: bool = True) -> State:
        """The state of a step, of the last one when ``None``; see :func:`ebm_ppl.checkpoint.restore`.

        A damaged checkpoint is an error, never passed over for an older one or for a fresh start.

        Raises:
            FileNotFoundError: the directory has no checkpoint, or none of that step.
            CheckpointError: as :func:`ebm_ppl.checkpoint.restore`; also where the file is a link that leads elsewhere.
        """
        self.wait()
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise FileNotFoundError(
                f"directory: {str(self.directory)!r} has {f'no step {step}' if steps else 'no checkpoint'}; it has steps "
                f"{steps}."
            )
        wanted = steps[-1] if step is None else step
        path = self._found(wanted)
        if path.is_symlink():
            raise CheckpointError("is a link that leads elsewhere, expected a file of this directory.", path=str(path))
        try:
            return restore(path, like, check_structure=check_structure)
        except CheckpointError as error:
            if older := [other for other in steps if other < wanted]:
                error.add_note(f"There is an earlier one: restore(like, step={older[-1]}).")
            raise

    def _found(self, step: int) -> Path:
        """The file of a step that is there, whatever the number of zeros in its name."""
        names = ((path, _NAME.fullmatch(path.name)) for path in self.directory.iterdir())
        return next(path for path, match in names if match and int(match[1]) == step)

    def _write(self, step: int, state: TrainState, arrays: dict[str, np.ndarray]) -> None:
        write(self.path(step), arrays, hashed_manifest(state, arrays))
        for old in self.steps()[: -self._keep]:
            self._found(old).unlink(missing_ok=True)
        # Whole again: what a killed process left of other steps is of no use to anybody.
        for left in self.directory.glob(f".step-*{PARTIAL}"):
            left.unlink(missing_ok=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wait()
