"""Each check of chains alone: no false alarms on stationary chains, and the faults that it is there for."""

import numpy as np
import pytest
from scipy.signal import lfilter

from ebm_ppl import diagnostics as d
from ebm_ppl.diagnostics import Means, means_of_chains, means_of_rows, means_of_runs

NUM_REPLICATES = 400
MAX_ALARMS = 0.02


def autoregressive(rng, num_chains, num_draws, rho):
    """Stationary AR(1) chains with N(0, 1) margins."""
    noise = np.sqrt(1.0 - rho**2) * rng.normal(size=(num_chains, num_draws))
    noise[:, 0] = rng.normal(size=num_chains)
    return lfilter([1.0], [1.0, -rho], noise, axis=1)


def normal_runs(rng, num_runs=8, num_particles=200, mean=0.0):
    """SMC that is right, as means of x and x squared."""
    x = rng.normal(mean, size=(num_runs, num_particles))
    log_weight = np.zeros(x.shape)
    return means_of_runs(np.stack([x, x**2], axis=-1), log_weight, 0.1 * rng.normal(size=num_runs))


def indicators(x):
    return np.stack([x < -0.8, x >= -0.8], axis=-1).astype(float)


def smc_indicators(rng, num_runs=8):
    x = rng.normal(size=(num_runs, 200))
    return means_of_runs(indicators(x), np.zeros(x.shape), 0.1 * rng.normal(size=num_runs))


IDS = np.repeat(np.arange(4), 4)
CHECKS = {
    "rhat": lambda rng, x: d.check_rhat(x),
    "rhat_nested": lambda rng, x: d.check_rhat_nested(x, IDS),
    "ess": lambda rng, x: d.check_ess(x),
    "autocorrelation_time": lambda rng, x: d.check_autocorrelation_time(x, num_steps=2000),
    "energy_gap": lambda rng, x: d.check_energy_gap(rng.normal(size=500), x),
    "energy_drift": lambda rng, x: d.check_energy_drift(x[:, 0], x[:, 1:]),
    "smc_crosscheck": lambda rng, x: d.check_smc_crosscheck(np.stack([x, x**2], axis=-1), normal_runs(rng)),
    "mode_weights": lambda rng, x: d.check_mode_weights(
        means_of_chains(indicators(x)), smc_indicators(rng), judges="sampler"
    ),
    "frozen": lambda rng, x: d.check_frozen(x),
    "nonfinite": lambda rng, x: d.check_nonfinite(x),
    "bfmi": lambda rng, x: d.check_bfmi(x),
}
FREE = {"frozen", "nonfinite"}


def alarms(name, rho, num_replicates, seed=0, num_chains=16, num_draws=250):
    """Fraction of stationary chains that a check warns of, or fails."""
    rng = np.random.default_rng(seed)
    found = [CHECKS[name](rng, autoregressive(rng, num_chains, num_draws, rho)) for _ in range(num_replicates)]
    return np.mean([check.status in ("warn", "fail") for check in found])


@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize("name", [name for name in CHECKS if name not in FREE])
def test_no_false_alarms_on_a_few_stationary_chains(name, rho):
    if name == "bfmi" and rho > 0:
        pytest.skip("a Hamiltonian that is as correlated as this is what the check is there for")
    assert alarms(name, rho, 20, seed=1) == 0


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.97, 0.995])
@pytest.mark.parametrize("name", CHECKS)
def test_false_alarms_on_stationary_chains_are_at_most_two_percent(name, rho):
    if name == "bfmi" and rho > 0.6:
        pytest.skip("a Hamiltonian that is as correlated as this is what the check is there for")
    assert alarms(name, rho, NUM_REPLICATES) <= MAX_ALARMS


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize("name", ["rhat", "energy_drift", "energy_gap", "smc_crosscheck"])
@pytest.mark.parametrize("num_chains", [4, 64])
def test_nor_with_few_chains_or_many(name, rho, num_chains):
    assert alarms(name, rho, NUM_REPLICATES, num_chains=num_chains) <= MAX_ALARMS


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.97, 0.995])
@pytest.mark.parametrize("num_draws", [100, 250])
@pytest.mark.parametrize("num_chains", [4, 16, 64])
@pytest.mark.parametrize(
    "name", ["rhat", "ess", "autocorrelation_time", "energy_drift", "energy_gap", "smc_crosscheck"]
)
def test_nor_with_chains_shorter_than_their_memory(name, num_chains, num_draws, rho):
    """A hundred draws at .995 are half of one autocorrelation time: nothing can be known, and nothing must be alleged."""
    assert alarms(name, rho, NUM_REPLICATES, num_chains=num_chains, num_draws=num_draws) <= MAX_ALARMS


def test_model_checks_raise_no_false_alarms():
    rng = np.random.default_rng(2)

    def one():
        x = rng.normal(size=2000)
        moments = d.check_model_moments(np.stack([x, x**2], axis=-1), normal_runs(rng), ["x", "x squared"])
        return moments.status, d.check_mode_weights(means_of_rows(indicators(x)), smc_indicators(rng)).status

    found = np.array([one() for _ in range(NUM_REPLICATES)])
    assert (np.isin(found, ["warn", "fail"]).mean(axis=0) <= MAX_ALARMS).all()
    assert (found == "pass").mean() > 0.9


def test_the_rule_of_a_fixed_threshold_would_raise_false_alarms():
    """What the significance test in :func:`check_rhat` is for: 1.01 alone is exceeded by every short chain."""
    rng = np.random.default_rng(3)
    values = [d.rhat(autoregressive(rng, 16, 250, 0.9)) for _ in range(10)]
    assert min(values) > 1.01


# --- faults ----------------------------------------------------------------------------------------------------------


def rows(num_chains=16, num_draws=250, seed=0):
    return np.random.default_rng(seed).normal(size=(num_chains, num_draws))


def two_stuck_modes():
    return 0.3 * rows() + np.where(np.arange(16) < 4, -2.0, 2.0)[:, None]


def with_frozen_chain():
    x = rows()
    x[3] = x[3, 0]
    return x


def with_nan():
    x = rows()
    x[2, 100] = np.nan
    return x


FAULTS = {
    "one chain": (
        lambda: rows(1),
        dict.fromkeys(["rhat", "ess", "autocorrelation_time", "energy_drift"], "not assessable"),
    ),
    "constant": (lambda: np.ones((16, 250)), dict.fromkeys(["rhat", "ess", "energy_drift"], "not assessable")),
    "frozen chain": (with_frozen_chain, {"rhat": "fail", "rhat_nested": "fail", "ess": "fail", "frozen": "fail"}),
    "NaN": (with_nan, {"nonfinite": "fail", "rhat": "not assessable", "ess": "not assessable"}),
    "two stuck modes": (two_stuck_modes, {"rhat": "fail", "rhat_nested": "fail"}),
    "twenty draws": (lambda: rows(16, 15), {"rhat": "not assessable", "ess": "not assessable"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gets_its_verdict_and_no_required_check_of_chains_passes_all(fault):
    make, expected = FAULTS[fault]
    x, rng = make(), np.random.default_rng(0)
    # Arbitrary groups say nothing; here each superchain is a run of chains that share a fault.
    names = [name for name in CHECKS if name not in ("bfmi", "rhat_nested") or len(x) == 16]
    found = {name: CHECKS[name](rng, x) for name in names}
    for name, status in expected.items():
        assert found[name].status == status, found[name]
    required = [found[name] for name in ("rhat", "energy_drift", "smc_crosscheck")]
    assert d.verdict(required) != "pass"
    for check in found.values():
        assert check.why
        assert check.blind_to


def test_a_constant_is_named():
    x = np.stack([rows(), np.ones((16, 250))], axis=-1)
    assert "flat is the same in all draws" in d.check_rhat(x, ["x", "flat"]).why


def test_an_indicator_may_be_constant_along_one_chain():
    x = (np.random.default_rng(0).random((64, 50)) < 0.05).astype(float)
    assert np.ptp(x, axis=1).min() == 0
    assert d.check_rhat(x).status != "fail"
    assert np.isinf(d.rhat(np.repeat(np.arange(8) % 2, 50).reshape(8, 50)))


def test_drifting_chains_warn_and_fail():
    drift = lambda size: d.check_energy_drift(np.full(64, -size) + rows(64)[:, 0], rows(64, seed=1))
    assert [drift(size).status for size in (0.0, 0.85, 3.0)] == ["pass", "warn", "fail"]
    assert "not assessable" in d.check_energy_drift(np.zeros(16), np.zeros((16, 20))).status


def test_a_growing_gap_fails():
    x = rows() + np.linspace(0.0, 3.0, 250)
    assert d.check_energy_gap(np.random.default_rng(0).normal(-1.0, size=500), x).status == "fail"
    assert d.check_energy_gap(np.random.default_rng(0).normal(4.0, size=500), x[:, ::-1]).status == "fail"
    assert d.check_energy_gap(np.random.default_rng(0).normal(-4.0, size=500), x[:, ::-1]).status == "warn"


def test_the_time_is_held_against_k():
    x = autoregressive(np.random.default_rng(0), 16, 2000, 0.9)  # 19 steps
    found = {k: d.check_autocorrelation_time(x, num_steps=k) for k in (200, 30, 3)}
    assert [check.status for check in found.values()] == ["pass", "warn", "warn"]
    assert found[3].value == pytest.approx(19.0, rel=0.3)
    assert d.check_autocorrelation_time(x, num_steps=3, persistent=False).status == "fail"
    assert d.check_autocorrelation_time(x, num_steps=None).status == "not assessable"
    assert d.check_autocorrelation_time(x, num_steps=300, steps_per_draw=10).value == pytest.approx(190.0, rel=0.3)


def test_shifted_chains_fail_the_crosscheck_and_coarse_ones_are_not_assessed():
    rng = np.random.default_rng(0)
    assert d.check_smc_crosscheck(rows()[..., None] + 0.5, normal_x(rng)).status == "fail"
    slow = autoregressive(rng, 4, 50, 0.99)[..., None]
    assert d.check_smc_crosscheck(slow, normal_x(rng)).status == "not assessable"


def normal_x(rng):
    x = rng.normal(size=(8, 200, 1))
    return means_of_runs(x, np.zeros((8, 200)), np.zeros(8))


def test_runs_are_averaged_by_their_normalisers():
    values = np.repeat(np.array([0.0, 1.0]), 50).reshape(2, 50, 1)
    weighted = means_of_runs(values, np.zeros((2, 50)), np.log([1.0, 3.0]))
    assert weighted.mean[0] == pytest.approx(0.75)
    assert means_of_runs(values, np.zeros((2, 50)), np.zeros(2)).mean[0] == pytest.approx(0.5)


def test_few_runs_have_an_uncertain_error():
    """Five errors with three degrees of freedom are no difference: Welch's t, not the normal law."""
    few = Means(np.array([0.0]), np.array([1.0]), 3.0, np.array([1.0]), 4.0)
    many = few._replace(degrees=1000.0, size=1001.0)
    zero = Means(np.array([6.0]), np.array([1e-9]), 1000.0, np.array([1.0]), 1e9)
    assert not d.difference(zero, few).is_significant
    assert d.difference(zero, many).is_significant


def test_small_effects_only_warn_about_the_model():
    rng = np.random.default_rng(0)
    x = rng.normal(0.07, size=(100_000, 1))
    runs = means_of_runs(rng.normal(size=(16, 20_000, 1)), np.zeros((16, 20_000)), np.zeros(16))
    assert d.check_model_moments(x, runs, ["x"]).status == "warn"
    assert d.check_model_moments(x + 0.2, runs, ["x"]).status == "fail"


def test_movement():
    assert [d.check_acceptance(np.full(10, rate)).status for rate in (0.0, 0.02, 0.6, np.nan)] == [
        "fail",
        "warn",
        "pass",
        "not assessable",
    ]
    flags = np.zeros((10, 100), bool)
    flags[0, 0] = True
    assert d.check_divergences(flags).status == "warn"
    assert d.check_frozen(with_frozen_chain()).value == 1 / 16
    assert d.check_frozen(np.full((2, 30), np.nan)).status == "fail"
    assert d.check_bfmi(np.ones((4, 100))).status == "not assessable"
    assert d.check_bfmi(rows()).value == pytest.approx(2.0, abs=0.4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: d.check_rhat(np.zeros(3)), r"values: got shape \(3,\)"),
        (lambda: d.check_rhat(np.zeros((4, 30, 2)), ["x"]), "names: got 1 of them, expected 2"),
        (lambda: d.check_rhat_nested(rows(), np.zeros(3)), r"superchain_ids: got shape \(3,\)"),
        (lambda: d.check_rhat_nested(rows(), np.r_[np.zeros(15), 1]), r"groups of \[15, 1\] chains"),
        (lambda: d.rhat_nested(rows(), np.zeros(16)), r"groups of \[16\] chains"),
        (lambda: d.ess(rows(), method="median"), "method: got 'median'"),
        (lambda: d.check_energy_drift(np.zeros((16, 2)), rows()), "start: got shape"),
        (lambda: d.check_smc_crosscheck(rows(), normal_runs(np.random.default_rng(0))), "runs: got 2 statistics"),
        (lambda: d.check_autocorrelation_time(rows(), num_steps=0), "num_steps: got 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
