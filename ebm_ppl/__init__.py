"""Energy-based models inside NumPyro: potentials, samplers, objectives, and diagnostics that can be believed.

Training an energy-based model is a game between a potential and a sampler; everything here is one of the two players,
an objective, the loop that plays the game, or a reader of its results.
"""

import importlib
from typing import Any as _Any

from ebm_ppl import adaptation as adaptation
from ebm_ppl import potentials as potentials
from ebm_ppl.adaptation import tune_step_size as tune_step_size
from ebm_ppl.distributions import EBM as EBM
from ebm_ppl.errors import CheckpointError as CheckpointError
from ebm_ppl.errors import DiagnosisFailure as DiagnosisFailure
from ebm_ppl.errors import NonFiniteEnergyError as NonFiniteEnergyError
from ebm_ppl.errors import SMCFailure as SMCFailure
from ebm_ppl.errors import TrainingFailure as TrainingFailure
from ebm_ppl.errors import TrainingInterrupted as TrainingInterrupted
from ebm_ppl.errors import UnknownNormalizerError as UnknownNormalizerError
from ebm_ppl.sampling import Draws as Draws
from ebm_ppl.sampling import advance as advance
from ebm_ppl.sampling import draw as draw
from ebm_ppl.sampling import init_sampler as init_sampler
from ebm_ppl.training import EarlyStopping as EarlyStopping
from ebm_ppl.training import TrainState as TrainState
from ebm_ppl.training import fit as fit
from ebm_ppl.training import init_train as init_train
from ebm_ppl.training import train_step as train_step
from ebm_ppl.types import Info as Info
from ebm_ppl.types import SamplerState as SamplerState

__version__ = "0.1.0"

# Loaded on use: arviz and matplotlib cost more than the rest of the package together, and the other modules too add to
# the price of the import (`make bench` measures it).
_ON_USE = (
    "checkpoint",
    "diagnostics",
    "diffusion",
    "flows",
    "handlers",
    "infer",
    "kernels",
    "normalizer",
    "optimizers",
    "objectives",
    "plots",
    "recipes",
    "replay",
    "sharding",
    "targets",
    "testing",
)
_FUNCTIONS_ON_USE = {
    "at_unit_temperature": "temperature",
    "check_model": "roles",
    "check_temperature": "temperature",
    "draw_short_run": "generation",
    "fitted_temperature": "temperature",
    "tune_ladder": "ladder",
}


def __getattr__(name: str) -> _Any:
    if name in _ON_USE:
        return importlib.import_module(f"ebm_ppl.{name}")
    if name in _FUNCTIONS_ON_USE:
        return getattr(importlib.import_module(f"ebm_ppl.{_FUNCTIONS_ON_USE[name]}"), name)
    raise AttributeError(f"module 'ebm_ppl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_ON_USE, *_FUNCTIONS_ON_USE])
