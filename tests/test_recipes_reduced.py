"""The experiments behind the documentation's tables at reduced size: what they show, they show at once."""

import numpy as np
import pytest

from tests.benchmarks import (
    adaptive_flow,
    dual_mcmc_teaching,
    generalized_contrastive_divergence,
    generalized_contrastive_divergence_digits,
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
