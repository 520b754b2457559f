"""Kernels leave their targets invariant; the same harness rejects every seeded fault; bad input is refused."""

import blackjax
import jax
import jax.numpy as jnp
import pytest
from blackjax.base import SamplingAlgorithm
from blackjax.mcmc.diffusions import overdamped_langevin

import ebm_ppl as ebm
from ebm_ppl import kernels, targets
from ebm_ppl.testing import exact_start_invariance, exact_start_reversibility

# Tuned once on exact starts to acceptance .65, .75 and .5, then frozen: coarse enough that a fault would show.
STEP_SIZE = {
    "mala": {
        "banana": 0.37, "dirichlet": 0.64, "double_well": 0.052, "funnel": 0.11, "gamma": 0.5, "gaussian": 0.47,
        "gaussian_1": 0.73, "gaussian_10": 0.2, "gaussian_50": 0.11, "gaussian_mixture": 1.0, "grid25": 0.095,
        "gumbel": 1.6, "many_well": 0.063, "many_well_32": 0.018, "ring": 0.059, "student_t": 2.0,
        "tilted_normal": 0.26, "truncated_normal": 2.2,
    },
    "hmc": {
        "banana": 0.57, "dirichlet": 0.96, "double_well": 0.21, "funnel": 0.32, "gamma": 0.66, "gaussian": 0.65,
        "gaussian_1": 0.82, "gaussian_10": 0.61, "gaussian_50": 0.39, "gaussian_mixture": 1.1, "grid25": 0.34,
        "gumbel": 1.0, "many_well": 0.23, "many_well_32": 0.17, "ring": 0.25, "student_t": 1.4,
        "tilted_normal": 0.52, "truncated_normal": 1.5,
    },
    "barker": {
        "banana": 1.5, "dirichlet": 1.7, "double_well": 0.67, "funnel": 0.7, "gamma": 2.0, "gaussian": 1.5,
        "gaussian_1": 2.4, "gaussian_10": 0.72, "gaussian_50": 0.43, "gaussian_mixture": 3.3, "grid25": 0.64,
        "gumbel": 3.7, "many_well": 0.69, "many_well_32": 0.19, "ring": 0.59, "student_t": 4.2,
        "tilted_normal": 1.1, "truncated_normal": 4.3,
    },
}  # fmt: skip

KERNELS = {
    "mala": lambda name: kernels.mala(STEP_SIZE["mala"][name]),
    "hmc": lambda name: kernels.hmc(STEP_SIZE["hmc"][name], 5),
    "barker": lambda name: kernels.from_blackjax(blackjax.barker, step_size=STEP_SIZE["barker"][name]),
    # Long trajectories of a whole population are costly: a fifth of the chains, and doublings bounded.
    "nuts": lambda name: kernels.nuts(STEP_SIZE["hmc"][name], max_num_doublings=4),
}
NUM_CHAINS = {"mala": 100_000, "hmc": 60_000, "barker": 60_000, "nuts": 20_000}
# The smallest discrepancy of CDFs that each check finds with probability .999, at the suite's false-failure rate.
POWER_GOAL = {"mala": 0.021, "hmc": 0.027, "barker": 0.027, "nuts": 0.046}


def law_of(key, kernel, name, num_chains=100_000, num_steps=5, **options):
    return exact_start_invariance(
        key, kernel, targets.get(name), num_chains=num_chains, num_steps=num_steps, reference_factor=2, **options
    )


# MALA meets every target by default. The other kernels meet the asymmetric, the heavy-tailed, the curved, the bounded
# and the multimodal one; the rest of the table is slow.
TELLING = {"banana", "double_well", "gamma", "gaussian_10", "gumbel", "student_t"}
PAIRS = [
    pytest.param(kernel, name, marks=() if kernel == "mala" or name in TELLING else pytest.mark.slow)
    for kernel in KERNELS
    for name in targets.names()
]


@pytest.mark.parametrize(("kernel", "name"), PAIRS)
def test_exact_start_invariance(key, kernel, name):
    steps = 3 if kernel == "nuts" else 5
    report = law_of(
        key, KERNELS[kernel](name), name, NUM_CHAINS[kernel], num_steps=steps, power_goal=POWER_GOAL[kernel]
    )
    report.raise_if_failed()
    assert 0.2 < report.acceptance < 0.99


@pytest.mark.parametrize("name", ["gumbel", "double_well", "banana"])
@pytest.mark.parametrize("kernel", ["mala", "hmc"])
def test_detailed_balance(key, kernel, name):
    exact_start_reversibility(key, KERNELS[kernel](name), targets.get(name), num_chains=60_000).raise_if_failed()


def test_dense_and_diagonal_mass_matrices_leave_the_target_invariant(key):
    target = targets.get("gaussian")
    covariance = jnp.cov(target.sample(jax.random.key(1), 10_000).T)
    for matrix in (covariance, jnp.diag(covariance)):
        kernel = kernels.hmc(0.9, 4, inverse_mass_matrix=matrix)
        exact_start_invariance(key, kernel, target, num_chains=60_000, num_steps=3).raise_if_failed()


# Seeded faults. Each must fail on at least one target, at the step sizes that the right kernels pass with.


def no_accept_step(name):
    return kernels.unadjusted_langevin(STEP_SIZE["mala"][name])


def wrong_drift_sign(name):
    """Langevin proposals that climb, accepted by MALA's ratio for proposals that descend."""

    def build(logdensity_fn, step_size):
        right = blackjax.mala.differentiable(logdensity_fn, step_size)
        climb = overdamped_langevin(jax.value_and_grad(lambda x: -logdensity_fn(x)))

        def step(key, state):
            flipped = state._replace(logdensity_grad=jax.tree.map(jnp.negative, state.logdensity_grad))
            position = climb(key, flipped, step_size).position
            proposal = right.init(position)

            def forward(a, b):
                return jnp.sum((b.position - a.position - step_size * a.logdensity_grad) ** 2) / (4 * step_size)

            log_ratio = proposal.logdensity - state.logdensity + forward(state, proposal) - forward(proposal, state)
            return _accept(key, log_ratio, state, proposal)

        return SamplingAlgorithm(lambda position, key=None: right.init(position), step)

    return kernels.from_blackjax(build, step_size=STEP_SIZE["mala"][name])


def dropped_proposal_ratio(name):
    """MALA's proposal accepted as if it were symmetric."""

    def build(logdensity_fn, step_size):
        right = blackjax.mala.differentiable(logdensity_fn, step_size)
        propose = overdamped_langevin(jax.value_and_grad(logdensity_fn))

        def step(key, state):
            proposal = type(state)(*propose(key, state, step_size))
            return _accept(key, proposal.logdensity - state.logdensity, state, proposal)

        return SamplingAlgorithm(lambda position, key=None: right.init(position), step)

    return kernels.from_blackjax(build, step_size=STEP_SIZE["mala"][name])


def wrong_energy_sign(name):
    def kernel(potential):
        return kernels.mala(STEP_SIZE["mala"][name])(lambda event: -potential(event))

    return kernel


def wrong_temperature(name):
    def kernel(potential):
        return kernels.mala(STEP_SIZE["mala"][name])(lambda event: 0.85 * potential(event))

    return kernel


def state_carried_across_an_update(name):
    """A log density cached before the energy's additive constant fell by one: the first proposal looks too good."""

    def kernel(potential):
        algorithm = kernels.mala(STEP_SIZE["mala"][name])(potential)

        def init(position, key):
            state = algorithm.init(position, key)
            return state._replace(logdensity=state.logdensity - 1.0)

        return SamplingAlgorithm(init, algorithm.step)

    return kernel


def _accept(key, log_ratio, state, proposal):
    accept = jnp.log(jax.random.uniform(jax.random.fold_in(key, 1))) < log_ratio
    state = jax.tree.map(lambda new, old: jnp.where(accept, new, old), proposal, state)
    return state, blackjax.mcmc.mala.MALAInfo(jnp.minimum(jnp.exp(log_ratio), 1.0), accept)


FAULTS = [no_accept_step, wrong_drift_sign, dropped_proposal_ratio, wrong_energy_sign, wrong_temperature,
          state_carried_across_an_update]  # fmt: skip


@pytest.mark.parametrize("name", ["gumbel", "double_well"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_harness_rejects_a_seeded_fault(key, fault, name):
    # One step for the stale cache: after it is overwritten the chains drift back to their law.
    steps = 1 if fault is state_carried_across_an_update else 5
    report = law_of(key, fault(name), name, num_steps=steps, minimum_moved=0.0)
    assert not report.passed, report
    assert not all(check.passed for check in report.checks), report


def test_unadjusted_langevin_reports_no_acceptance(key):
    sampler = ebm.init_sampler(jnp.zeros((4, 2)), kernels.unadjusted_langevin(0.1))
    _, info = ebm.advance(key, lambda x: 0.5 * jnp.sum(x**2), sampler, 3)
    assert bool(jnp.isnan(info.acceptance_rate).all())
    assert not bool(info.is_divergent.any())


def test_num_gradients_counts_leapfrog_steps(key):
    sampler = ebm.init_sampler(jnp.zeros((4, 2)), kernels.hmc(0.1, 7))
    _, info = ebm.advance(key, lambda x: 0.5 * jnp.sum(x**2), sampler, 3)
    assert info.num_gradients.tolist() == [22] * 4  # 3 trajectories of 7, and the fresh start


def test_events_may_be_pytrees_and_positions_keep_their_dtype(key):
    def energy(event):
        return 0.5 * jnp.sum(event["a"] ** 2) + 0.5 * event["b"] ** 2

    position = {"a": jnp.zeros((4, 3)), "b": jnp.zeros(4)}
    for kernel in (kernels.mala(0.3), kernels.hmc(0.3, 3), kernels.nuts(0.3)):
        sampler, _ = ebm.advance(key, energy, ebm.init_sampler(position, kernel), 5)
        assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), sampler.position) == {
            "a": ((4, 3), "float32"),
            "b": ((4,), "float32"),
        }


def test_float64_chains_work_and_float32_chains_are_refused_while_x64_is_on(key):
    with jax.enable_x64(True):
        for kernel in (kernels.mala(0.3), kernels.hmc(0.3, 3), kernels.nuts(0.3), kernels.unadjusted_langevin(0.1)):
            sampler = ebm.init_sampler(jnp.zeros((4, 2)), kernel)
            assert ebm.advance(key, lambda x: 0.5 * jnp.sum(x**2), sampler, 5)[0].position.dtype == jnp.float64
            sampler = ebm.init_sampler(jnp.zeros((4, 2), jnp.float32), kernel)
            with pytest.raises(TypeError, match="got float32 chains in a session whose default is float64"):
                ebm.advance(key, lambda x: 0.5 * jnp.sum(x**2), sampler, 5)


def test_a_nan_proposal_is_rejected_and_a_nan_state_is_flagged(key):
    def cliff(x):
        return jnp.where(jnp.abs(x) > 1.0, jnp.nan, 0.5 * x**2)

    sampler, info = ebm.advance(key, cliff, ebm.init_sampler(jnp.zeros(64), kernels.mala(0.5)), 50)
    assert bool((jnp.abs(sampler.position) <= 1.0).all())
    assert bool((info.num_nonfinite > 0).all())
    _, info = ebm.advance(key, cliff, ebm.init_sampler(jnp.full(64, 3.0), kernels.unadjusted_langevin(1e-3)), 1)
    assert bool(info.is_divergent.all())


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf"), jnp.zeros(())])
@pytest.mark.parametrize(
    "make", [kernels.mala, kernels.unadjusted_langevin, kernels.nuts, lambda step_size: kernels.hmc(step_size, 5)]
)
def test_a_bad_step_size_is_refused(make, value):
    with pytest.raises(ValueError, match=r"step_size: got .*, expected a finite number > 0"):
        make(value)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: kernels.mala("fast"), TypeError, "step_size: got 'fast'"),
        (lambda: kernels.mala(1j), TypeError, "step_size: got dtype complex64"),
        (lambda: kernels.hmc(0.1, 0), ValueError, "num_integration_steps: got 0"),
        (lambda: kernels.hmc(0.1, 2.5), TypeError, "num_integration_steps: got 2.5"),
        (
            lambda: kernels.hmc(0.1, 3, inverse_mass_matrix=jnp.ones((2, 3))),
            ValueError,
            "inverse_mass_matrix: got shape",
        ),
        (lambda: kernels.hmc(0.1, 3, inverse_mass_matrix=jnp.array([1.0, -1.0])), ValueError, "inverse_mass_matrix"),
        (lambda: kernels.nuts(0.1, max_num_doublings=-1), ValueError, "max_num_doublings"),
        (lambda: kernels.from_blackjax(blackjax.elliptical_slice), TypeError, "a Gaussian prior of its own"),
        (lambda: kernels.from_blackjax(blackjax.mgrad_gaussian), TypeError, "a Gaussian prior of its own"),
        (lambda: kernels.from_blackjax(blackjax.pathfinder), TypeError, "not a BlackJAX MCMC sampler"),
        (lambda: kernels.mala(jnp.array([0.1, 0.2])), ValueError, "step_size: got shape"),
        (
            lambda: kernels.hmc(0.1, 3, inverse_mass_matrix=jnp.array([[1.0, 0.9], [0.0, 1.0]])),
            ValueError,
            "not symmetric",
        ),
        (lambda: kernels.hmc(0.1, 3, inverse_mass_matrix=-jnp.eye(2)), ValueError, "not symmetric positive definite"),
        (lambda: kernels.from_blackjax(blackjax.orbital_hmc), TypeError, "weighted orbit"),
        (lambda: kernels.from_blackjax(blackjax.sgld), TypeError, "stochastic gradient"),
        (lambda: kernels.from_blackjax(blackjax.irmh, proposal_distribution=len), TypeError, "wrong target"),
        (lambda: kernels.from_blackjax(3), TypeError, "algorithm: got int"),
    ],
)
def test_bad_kernels_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_equal_kernels_share_one_compilation():
    traces = 0

    def energy(x):
        nonlocal traces
        traces += 1
        return 0.5 * jnp.sum(x**2)

    for step_size in (0.1, 0.2, jnp.array(0.3)):
        sampler = ebm.init_sampler(jnp.zeros((4, 2)), kernels.mala(step_size))
        before = traces
        ebm.advance(jax.random.key(0), energy, sampler, 3)
        if step_size != 0.1:
            assert traces - before <= 1  # the shape check at the boundary, and no compilation
