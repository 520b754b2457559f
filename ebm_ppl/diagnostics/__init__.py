"""What ArviZ says about the chains: conversion to a ``DataTree``, a summary with guards, and the energy gap.

These numbers judge the SAMPLER at frozen parameters. Whether the MODEL puts the right weight on its modes is a question
about log Z, which no trace can answer: chains started at data sit at the data's mode weights whatever the model says.
"""

from ebm_ppl.diagnostics.convert import from_numpyro as from_numpyro
from ebm_ppl.diagnostics.convert import to_datatree as to_datatree
from ebm_ppl.diagnostics.mixing import ESS_MIXED as ESS_MIXED
from ebm_ppl.diagnostics.mixing import MIN_CHAINS as MIN_CHAINS
from ebm_ppl.diagnostics.mixing import MIN_DRAWS as MIN_DRAWS
from ebm_ppl.diagnostics.mixing import RHAT_MIXED as RHAT_MIXED
from ebm_ppl.diagnostics.mixing import Estimate as Estimate
from ebm_ppl.diagnostics.mixing import Summary as Summary
from ebm_ppl.diagnostics.mixing import energy_gap as energy_gap
from ebm_ppl.diagnostics.mixing import rhat as rhat
from ebm_ppl.diagnostics.mixing import summary as summary
from ebm_ppl.diagnostics.simulation import SimulationSummary as SimulationSummary
from ebm_ppl.diagnostics.simulation import simulation_summary as simulation_summary
