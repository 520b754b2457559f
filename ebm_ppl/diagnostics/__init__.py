"""What ArviZ says about the chains, a list of checks, and the diagnosis of a sampler and a model made of them.

A trace judges the SAMPLER at frozen parameters. Whether the MODEL puts the right weight on its modes is a question about
log Z, which no trace can answer: chains started at data sit at the data's mode weights whatever the model says.
:func:`diagnose` asks both questions.
"""

from ebm_ppl.diagnostics.agreement import check_log_z_gap as check_log_z_gap
from ebm_ppl.diagnostics.agreement import check_mode_weights as check_mode_weights
from ebm_ppl.diagnostics.agreement import check_model_moments as check_model_moments
from ebm_ppl.diagnostics.agreement import check_smc as check_smc
from ebm_ppl.diagnostics.autocorrelation import autocorrelation_time as autocorrelation_time
from ebm_ppl.diagnostics.blackjax_runs import from_blackjax as from_blackjax
from ebm_ppl.diagnostics.check import Check as Check
from ebm_ppl.diagnostics.check import verdict as verdict
from ebm_ppl.diagnostics.comparison import Difference as Difference
from ebm_ppl.diagnostics.comparison import Means as Means
from ebm_ppl.diagnostics.comparison import difference as difference
from ebm_ppl.diagnostics.comparison import means_of_chains as means_of_chains
from ebm_ppl.diagnostics.comparison import means_of_rows as means_of_rows
from ebm_ppl.diagnostics.comparison import means_of_runs as means_of_runs
from ebm_ppl.diagnostics.convergence import check_rhat as check_rhat
from ebm_ppl.diagnostics.convergence import check_rhat_nested as check_rhat_nested
from ebm_ppl.diagnostics.convert import to_datatree as to_datatree
from ebm_ppl.diagnostics.discrepancy import check_ksd as check_ksd
from ebm_ppl.diagnostics.discrepancy import check_proposal_quality as check_proposal_quality
from ebm_ppl.diagnostics.duality import DualityGap as DualityGap
from ebm_ppl.diagnostics.duality import duality_gap as duality_gap
from ebm_ppl.diagnostics.effective import check_autocorrelation_time as check_autocorrelation_time
from ebm_ppl.diagnostics.effective import check_ess as check_ess
from ebm_ppl.diagnostics.energy_distance import EnergyDistance as EnergyDistance
from ebm_ppl.diagnostics.energy_distance import energy_distance as energy_distance
from ebm_ppl.diagnostics.equilibrium import check_energy_drift as check_energy_drift
from ebm_ppl.diagnostics.equilibrium import check_energy_gap as check_energy_gap
from ebm_ppl.diagnostics.equilibrium import check_smc_crosscheck as check_smc_crosscheck
from ebm_ppl.diagnostics.escape import Escape as Escape
from ebm_ppl.diagnostics.escape import find_escape as find_escape
from ebm_ppl.diagnostics.guarded import ess as ess
from ebm_ppl.diagnostics.guarded import rhat_nested as rhat_nested
from ebm_ppl.diagnostics.mixing import ESS_MIXED as ESS_MIXED
from ebm_ppl.diagnostics.mixing import MIN_CHAINS as MIN_CHAINS
from ebm_ppl.diagnostics.mixing import MIN_DRAWS as MIN_DRAWS
from ebm_ppl.diagnostics.mixing import RHAT_MIXED as RHAT_MIXED
from ebm_ppl.diagnostics.mixing import Estimate as Estimate
from ebm_ppl.diagnostics.mixing import Summary as Summary
from ebm_ppl.diagnostics.mixing import energy_gap as energy_gap
from ebm_ppl.diagnostics.mixing import rhat as rhat
from ebm_ppl.diagnostics.mixing import summary as summary
from ebm_ppl.diagnostics.monitored import Modes as Modes
from ebm_ppl.diagnostics.monitored import Monitor as Monitor
from ebm_ppl.diagnostics.movement import check_acceptance as check_acceptance
from ebm_ppl.diagnostics.movement import check_bfmi as check_bfmi
from ebm_ppl.diagnostics.movement import check_divergences as check_divergences
from ebm_ppl.diagnostics.movement import check_frozen as check_frozen
from ebm_ppl.diagnostics.movement import check_nonfinite as check_nonfinite
from ebm_ppl.diagnostics.numpyro_runs import from_numpyro as from_numpyro
from ebm_ppl.diagnostics.procedure import diagnose as diagnose
from ebm_ppl.diagnostics.report import Diagnosis as Diagnosis
from ebm_ppl.diagnostics.sampling_times import SamplingTimes as SamplingTimes
from ebm_ppl.diagnostics.sampling_times import sampling_times as sampling_times
from ebm_ppl.diagnostics.simulation import SimulationSummary as SimulationSummary
from ebm_ppl.diagnostics.simulation import simulation_summary as simulation_summary
