"""The experiments behind the documentation's tables at reduced size: what they show, they show at once."""

import numpy as np
import pytest

from tests.benchmarks import (
    adaptive_flow,
    dual_mcmc_teaching,
    dual_training,
    generalized_contrastive_divergence,
    generalized_contrastive_divergence_digits,
    short_runs,
    teaching_grid,
)

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:updates")  # of frozen chains: the energy of local chains runs away
def test_two_modes_in_the_plane():
    flow, local = (
        adaptive_flow.judge_planar(method, 0, epochs=6, with_diagnosis=False)
        for method in ("flow-assisted, decayed", "PCD-MALA")
    )
    assert abs(flow["weights"][-1] - flow["truth"]) < 0.05
    assert flow["excess"] < 0.08
    assert flow["accepted"] > 0.5
    assert flow["pool_ess"] > 0.3
    assert np.mean(np.abs(np.array(local["weights"][-3:]) - local["truth"])) > 0.15


def test_four_modes_in_eight_dimensions():
    flow, local = (
        adaptive_flow.judge_four("d = 8", method, 0, with_diagnosis=False, num_updates=600)
        for method in ("flow-assisted", "PCD-MALA, as many gradients")
    )
    assert flow["rhat"] <= 1.01 < 1.1 <= local["rhat"]
    assert flow["max_error"] <= 0.05
    assert flow["excess"] <= 0.1
    assert local["excess"] >= 3.0 * flow["excess"]


def test_digits():
    trained = dual_mcmc_teaching.train("dual", 0, num_updates=1000, report_every=500)
    found = dual_mcmc_teaching.judge("dual", 0, trained)
    assert found["failed"] is None
    assert found["fd"]["fd_revised"][-1] < found["fd"]["fd_initial"][-1]
    assert found["mse"]["q+10"] < found["mse"]["q+0"] < found["mse"]["noise+10"]
    assert found["mse"]["q+10"] <= 0.5 * found["mse"]["noise+10"]
    assert found["energy_revised"] < found["energy_initial"]


def test_a_grid_of_gaussians():
    flow, generator = (
        teaching_grid.judge(method, 0, 500)[0] for method in ("flow, i-SIR + MALA", "generator, Langevin")
    )
    assert flow["max_weight_error"] < 0.03 < generator["max_weight_error"]
    assert flow["excess"] < generator["excess"]
    assert generator["sampler"] == "fail"


def test_eight_gaussians():
    joint, none = (
        generalized_contrastive_divergence.judge("equal", method, 0, 800, with_diagnosis=False)
        for method in ("joint", "joint, tau = 0")
    )
    assert joint["sw"] <= 0.3
    assert joint["min_share"] >= 0.08
    assert joint["auc"] >= none["auc"] + 0.03
    # The collapse is complete after a few thousand updates; the weights tell of it from the start.
    assert none["weight_ess"] < 0.3 * joint["weight_ess"]
    assert none["sw"] > 2.0 * joint["sw"]


def test_digits_by_diffusion():
    found = generalized_contrastive_divergence_digits.run()
    assert found["fd"] < 0.6 * found["fd_pretrained"]


def test_dual_training_on_a_sphere():
    found, exact = dual_training.train_restarts("p = 0", 1, 1000), dual_training.train_exact(1, 1000)
    assert 0.15 <= found["kl_400"] <= 0.23
    assert abs(found["kl_1000"] - exact["kl_1000"]) < 0.005
    slow = dual_training.train_restarts("p = 1", 1, 1000)
    assert slow["kl_1000"] > 3.0 * found["kl_1000"]


def test_short_runs_in_the_plane():
    times = (2, 5, 10, 20, 100)
    short, persistent = (short_runs.judge_plane(start, 0, 1000, times=times) for start in ("noise", "persistent"))
    assert short["best_time"] == 10
    assert short["says"] == "this is a 10-step sampler, not a density"
    assert short["ed"][2] < 0.01 < 0.1 < persistent["ed"][2]
    assert short["share_error"] > 0.2
    assert persistent["kl"] < 1.0 < short["kl"]


def test_spins_of_short_runs():
    assert short_runs.judge("spins, Rdm-2", 0)["error"] < 4.0 / short_runs.SPIN_CHAINS**0.5
