"""Analytic targets with exact log Z and exact samplers: the oracles every kernel and estimator is tested against."""

from ebm_ppl.targets.registry import get as get
from ebm_ppl.targets.registry import names as names
from ebm_ppl.targets.target import Target as Target
from ebm_ppl.targets.target import UnconstrainedPotential as UnconstrainedPotential

__all__ = ["Target", "UnconstrainedPotential", "get", "names"]
