"""Statistical checks with a stated false-failure rate and power, for the suite and for people who write kernels."""

from ebm_ppl.testing.calibration import rank_test as rank_test
from ebm_ppl.testing.calibration import simulation_based_calibration as simulation_based_calibration
from ebm_ppl.testing.conformance import ConformanceReport as ConformanceReport
from ebm_ppl.testing.conformance import kernel_conformance as kernel_conformance
from ebm_ppl.testing.discrete import EnumeratedTarget as EnumeratedTarget
from ebm_ppl.testing.discrete import exact_start_invariance_discrete as exact_start_invariance_discrete
from ebm_ppl.testing.kernels import ExactTarget as ExactTarget
from ebm_ppl.testing.kernels import exact_start_invariance as exact_start_invariance
from ebm_ppl.testing.kernels import exact_start_reversibility as exact_start_reversibility
from ebm_ppl.testing.report import KernelReport as KernelReport
from ebm_ppl.testing.statistics import ALPHA as ALPHA
from ebm_ppl.testing.statistics import CHECKS as CHECKS
from ebm_ppl.testing.statistics import FAMILY_ALPHA as FAMILY_ALPHA
from ebm_ppl.testing.statistics import MISS_RATE as MISS_RATE
from ebm_ppl.testing.statistics import SUITE_CHECKS as SUITE_CHECKS
from ebm_ppl.testing.statistics import Check as Check
from ebm_ppl.testing.statistics import CheckLedger as CheckLedger
from ebm_ppl.testing.statistics import binomial_test as binomial_test
from ebm_ppl.testing.statistics import cdf_test as cdf_test
from ebm_ppl.testing.statistics import detectable as detectable
from ebm_ppl.testing.statistics import dkw_critical_value as dkw_critical_value
from ebm_ppl.testing.statistics import ks_statistic as ks_statistic
from ebm_ppl.testing.statistics import ks_statistic_two_sample as ks_statistic_two_sample
from ebm_ppl.testing.statistics import multinomial_test as multinomial_test
from ebm_ppl.testing.statistics import t_test_chain_means as t_test_chain_means
from ebm_ppl.testing.statistics import two_sample_test as two_sample_test
