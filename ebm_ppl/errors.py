"""The exceptions of the package, each with the remedy in its text."""

from typing import Any


class UnknownNormalizerError(ValueError):
    """A normalised log density was asked of an EBM whose log Z nobody has accounted for."""


class NonFiniteEnergyError(ValueError):
    """An energy is NaN or infinite where it must be finite."""


class TrainingFailure(RuntimeError):
    """Training produced a non-finite number and stopped; nothing before that step is lost.

    Attributes:
        step: Index of the update that failed (0-based, as in ``TrainState.step``).
        sites: Names of the arrays that became non-finite, such as ``potential.layers[0].weight`` or ``sampler.position``;
            empty where it was the loss or its gradient alone.
        state: The last good ``TrainState``, exactly as it was before that update.
        rows: Indices of the batch rows with a non-finite energy (may be empty): into the data, or into a loader's batch.
        chains: Indices of chains with a non-finite energy or position (may be empty).
        history: The history recorded up to the failing update.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int,
        state: Any,
        rows: Any,
        chains: Any,
        history: dict[str, Any],
        sites: tuple[str, ...] = (),
    ):
        super().__init__(message)
        self.step = step
        self.sites = sites
        self.state = state
        self.rows = rows
        self.chains = chains
        self.history = history


class SMCFailure(RuntimeError):
    """Sequential Monte Carlo met weights that are not numbers, or a population of which nothing was left.

    Attributes:
        rows: Indices of the rows that failed.
        num_nonfinite: Energies that were NaN or infinite on the way, in each of those rows.
        num_temperatures: Steps that each of them took.
        ess_minimum: The smallest fraction of the population that its weights were worth, in each of them.
    """

    def __init__(self, message: str, *, rows: Any, num_nonfinite: Any, num_temperatures: Any, ess_minimum: Any):
        super().__init__(message)
        self.rows = rows
        self.num_nonfinite = num_nonfinite
        self.num_temperatures = num_temperatures
        self.ess_minimum = ess_minimum


class DiagnosisFailure(RuntimeError):
    """A diagnosis found the sampler or the model wanting.

    Attributes:
        diagnosis: The whole of it, an :class:`ebm_ppl.diagnostics.Diagnosis`.
        failed: Names of the checks that were not passed.
    """

    def __init__(self, message: str, *, diagnosis: Any, failed: tuple[str, ...]):
        super().__init__(message)
        self.diagnosis = diagnosis
        self.failed = failed


class CheckpointError(ValueError):
    """A file cannot be the checkpoint that was asked for: damaged, foreign, of a later version, or of another state.

    Attributes:
        path: The file.
        entry: Name of the array or part that is at fault; ``None`` where it is the whole file.
    """

    def __init__(self, message: str, *, path: str, entry: str | None = None):
        super().__init__(f"checkpoint {path!r}: " + (f"{entry}: " if entry is not None else "") + message)
        self.path = path
        self.entry = entry


class TrainingInterrupted(KeyboardInterrupt):
    """Training was interrupted by the user (Ctrl-C); nothing before the last report is lost.

    Attributes:
        state: The ``TrainState`` at the last report: ``fit(None, error.state, ...)`` goes on from there.
        history: The history up to it.
    """

    def __init__(self, message: str, *, state: Any, history: dict[str, Any]):
        super().__init__(message)
        self.state = state
        self.history = history
