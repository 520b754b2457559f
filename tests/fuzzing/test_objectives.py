"""Every public objective: batches, chains, potentials, keys and options of all kinds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from hypothesis import strategies as st

import ebm_ppl as ebm
from ebm_ppl import objectives
from ebm_ppl.diffusion import ActorCritic, DiffusionSampler, ValueNetwork
from tests.fuzzing.contract import assert_finite, nonfinite_leaves
from tests.fuzzing.strategies import arrays, choices, counts, functions, keys, numbers, potentials, rows, sequences
from tests.fuzzing.subjects import Subject, calls_of

KEY = jax.random.key(1)
BATCH = jax.random.normal(jax.random.key(2), (4, 2))
NORMAL = dist.Normal(0.0, 1.5).expand([2]).to_event(1)
MALA = ebm.kernels.mala(step_size=0.1)
BITS = dist.Bernoulli(0.5).expand([2]).to_event(1)
SPHERE = BATCH / jnp.linalg.norm(BATCH, axis=1, keepdims=True)


def quadratic(x: Any) -> Any:
    return 0.5 * jnp.sum(x**2)


def bits_energy(x: Any) -> Any:
    return 0.3 * jnp.sum(x) * 1.0


def state(position: Any, kernel: Any = MALA) -> Any:
    return ebm.init_sampler(jnp.asarray(position), kernel)


SAMPLERS = st.one_of(
    functions(),
    st.sampled_from(
        (
            state(BATCH),
            state(1e30 * jnp.ones((4, 2))),
            state(jnp.zeros((1, 2))),
            state(jnp.zeros((4, 3))),
            state(jnp.zeros(4)),
            state(jnp.zeros((4, 2)), ebm.kernels.unadjusted_langevin(step_size=1e20)),
            state(jnp.zeros((4, 2)), ebm.kernels.isir(NORMAL, num_proposals=4)),
            state(jnp.zeros((4, 2), int), ebm.kernels.gibbs(values=(0, 1))),
        )
    ),
)
LAWS = st.one_of(
    functions(),
    st.sampled_from(
        (
            NORMAL,
            dist.Normal(0.0, 1.0),
            dist.Uniform(0.0, 1.0).expand([2]).to_event(1),
            BITS,
            dist.ImproperUniform(dist.constraints.real, (), (2,)),
            dist.Normal(0.0, 1e-20).expand([2]).to_event(1),
        )
    ),
)
POLICY = DiffusionSampler(2, num_steps=2, key=jax.random.key(0), width=4, depth=1)
PAIR = ebm.init_sampler(
    jnp.zeros((4, 2)),
    ebm.kernels.raw_diffusion(ActorCritic(POLICY, ValueNetwork(2, 2, key=jax.random.key(1), width=4, depth=1))),
)
RECOVERY = objectives.RecoveryPotential(lambda t, y: 0.1 * (t + 1.0) * jnp.sum(y**2), (0.3, 0.6))
BRIDGES = ebm.potentials.tilt(objectives.Bridges(lambda k, x: 0.1 * (k + 1.0) * jnp.sum(x), 3), NORMAL)

UNUSUAL = 1e4
"""Beyond this number, and below its inverse, an energy, its curvature or a weight may leave the range of float32."""


GENTLE = (quadratic, bits_energy, RECOVERY, BRIDGES, NORMAL, MALA)


def is_extreme(argument: Any) -> bool:
    """Whether an argument may rightly lead to a loss that is not finite."""
    if callable(argument) and not isinstance(argument, jax.Array | np.ndarray):
        return not any(argument is known for known in GENTLE)
    for leaf in jax.tree.leaves(argument):
        try:
            size = np.abs(np.asarray(leaf, np.float64))
        except (TypeError, ValueError):
            continue
        if ((size > UNUSUAL) | ((size < 1 / UNUSUAL) & (size > 0)) | ~np.isfinite(size)).any():
            return True
    return False


def judge(result: Any, arguments: dict[str, Any]) -> None:
    """A finite loss comes with finite metrics and chains; a loss that is not finite, and says so, needs a reason."""
    loss = result[0] if isinstance(result, tuple) else result
    assert loss.shape == ()
    if np.isfinite(loss):
        assert_finite(result, but=DOCUMENTED)
        return
    reasons = {name: value for name, value in arguments.items() if name != "key"}
    assert any(map(is_extreme, reasons.values())), f"loss {loss} without a reason: {nonfinite_leaves(result)}"


def flows_where_it_can(result: Any, arguments: dict[str, Any]) -> None:
    """Events are finite unless the energy or the start is out of bounds."""
    assert not nonfinite_leaves(result) or any(map(is_extreme, arguments.values()))


DOCUMENTED = (
    r"acceptance_rate",  # without an accept step
    r"energy_gap_error",  # of one row or one chain
    r"energy_autocorrelation|energy_drift_error|energy_drift",  # of one chain
)

BASIC = {"potential": quadratic, "batch": BATCH, "key": KEY}
ODD = {"potential": potentials(), "batch": rows((4, 2)), "key": keys()}
CHAINS = {**BASIC, "sampler": state(BATCH)}
ODD_CHAINS = {**ODD, "sampler": SAMPLERS}
CD = functools.partial(objectives.persistent_contrastive_divergence, num_steps=1)


QUICK = (objectives.score_matching, objectives.noise_contrastive_estimation, objectives.energy_matching)


def subject(function: Any, right: dict[str, Any], odd: dict[str, Any], **options: Any) -> Subject:
    options = {"judge": judge, "cases": 50, "is_quick": function in QUICK, **options}
    return Subject(function.__name__, function, right, odd, **options)


def wrapped(wrap: Any, *, options: dict[str, Any]) -> Any:
    """A wrapper of an objective as one function, so that a call reaches the loss."""

    @functools.wraps(wrap)
    def run(potential: Any, sampler: Any, batch: Any, key: Any, **given: Any) -> Any:
        return wrap(**(options | given))(potential, sampler, batch, key)

    return run


def wrapper(wrap: Any, options: dict[str, Any], odd: dict[str, Any]) -> Subject:
    run = wrapped(wrap, options=options)
    return Subject(
        wrap.__name__,
        run,
        CHAINS,
        {**ODD_CHAINS, **odd},
        documented=(objectives.persistent_contrastive_divergence,),
        names=(wrap.__name__,),
        judge=judge,
        cases=50,
        is_quick=False,
    )


SUBJECTS = (
    subject(objectives.contrastive_divergence, {**CHAINS, "num_steps": 1}, {**ODD_CHAINS, "num_steps": counts(2)}),
    subject(
        objectives.persistent_contrastive_divergence,
        {**CHAINS, "num_steps": 1},
        {
            **ODD_CHAINS,
            "num_steps": counts(2),
            "num_chains": counts(5),
            "restart_probability": numbers(),
            "restart_age": counts(),
            "restart_from": st.one_of(choices("batch"), functions()),
            "all_states": choices(True, False),
        },
        cases=90,
    ),
    subject(
        objectives.coupled_contrastive_divergence,
        {**CHAINS, "max_steps": 5},
        {**ODD_CHAINS, "num_steps": counts(2), "num_averaged": counts(2), "max_steps": counts(4)},
    ),
    subject(
        objectives.full_contrastive_divergence,
        {**CHAINS, "sampler": state(BATCH, ebm.kernels.unadjusted_langevin(step_size=0.1)), "num_steps": 1},
        {**ODD_CHAINS, "num_steps": counts(2), "score": st.one_of(choices("mixture", "gaussian"), functions())},
    ),
    subject(
        objectives.generalized_contrastive_divergence,
        CHAINS,
        {**ODD_CHAINS, "num_steps": counts(2), "start": choices("sampler", "data"), "energy_weight": numbers()},
    ),
    subject(
        objectives.chain_likelihood,
        {**CHAINS, "sampler": state(BATCH, ebm.kernels.isir(NORMAL, num_proposals=4))},
        {**ODD_CHAINS, "num_chains": counts(5)},
    ),
    subject(
        objectives.jarzynski_contrastive_divergence,
        {**CHAINS, "sampler": objectives.jarzynski_chains(KEY, NORMAL, MALA, 8), "num_steps": 1},
        {**ODD_CHAINS, "num_steps": counts(2), "num_held_out": counts(5)},
    ),
    subject(
        objectives.importance_sampled_likelihood,
        {**CHAINS, "proposal": NORMAL, "num_samples": 8},
        {**ODD_CHAINS, "proposal": LAWS, "num_samples": counts(5)},
    ),
    subject(
        objectives.diffusion_recovery_likelihood,
        {**CHAINS, "potential": RECOVERY, "num_steps": 1},
        {**ODD_CHAINS, "num_steps": counts(2)},
    ),
    subject(
        objectives.energy_matching,
        {**CHAINS, "noise": NORMAL},
        {
            **ODD_CHAINS,
            "noise": LAWS,
            "contrastive": functions(),
            "contrastive_weight": numbers(),
            "temperature": numbers(),
            "last_time": numbers(),
            "coupling": choices("independent", "optimal"),
        },
    ),
    subject(
        objectives.policy_improvement,
        {**CHAINS, "sampler": PAIR},
        {
            **ODD_CHAINS,
            "gradient": choices("pathwise", "reinforce"),
            "entropy_weight": numbers(),
            "velocity_weight": numbers(),
            "num_samples": counts(5),
        },
    ),
    subject(
        objectives.score_matching,
        BASIC,
        {
            **ODD,
            "trace": choices("exact", "hutchinson"),
            "num_probes": counts(),
            "probes": choices("rademacher", "gaussian", "sphere"),
        },
    ),
    subject(
        objectives.sliced_score_matching,
        BASIC,
        {
            **ODD,
            "num_projections": counts(),
            "projections": choices("rademacher", "gaussian", "sphere"),
            "variance_reduced": choices(True, False),
        },
    ),
    subject(
        objectives.generalized_score_matching,
        {**BASIC, "batch": jnp.abs(BATCH), "lower": 0.0},
        {
            **ODD,
            "batch": st.one_of(rows((4, 2)), st.just(jnp.abs(BATCH))),
            "lower": numbers(),
            "upper": numbers(),
            "power": numbers(),
            "saturation": numbers(),
        },
    ),
    subject(objectives.spherical_score_matching, {**BASIC, "batch": SPHERE}, ODD),
    subject(
        objectives.denoising_score_matching,
        {**BASIC, "noise_scale": 0.1},
        {**ODD, "noise_scale": numbers(), "num_noises": counts()},
    ),
    subject(
        objectives.multiscale_denoising_score_matching,
        {**BASIC, "noise_scales": (0.1, 0.2), "target_scale": 0.1},
        {**ODD, "noise_scales": sequences(), "target_scale": numbers()},
    ),
    subject(
        objectives.conditional_denoising_score_matching,
        {**BASIC, "potential": lambda x, scale: 0.5 * jnp.sum(x**2) / scale, "noise_scales": (0.1, 0.2)},
        {**ODD, "noise_scales": sequences()},
    ),
    subject(
        objectives.minimum_stein_discrepancy,
        BASIC,
        {
            **ODD,
            "bandwidth": numbers(),
            "exponent": numbers(),
            "statistic": choices("u", "v"),
            "diffusion": potentials(),
        },
    ),
    subject(
        objectives.energy_discrepancy,
        {**BASIC, "noise_scale": 0.1, "num_negatives": 4},
        {**ODD, "noise_scale": numbers(), "num_negatives": counts(), "stabilization": numbers()},
    ),
    subject(
        objectives.discrete_energy_discrepancy,
        {
            **BASIC,
            "potential": bits_energy,
            "batch": jnp.array([[0, 1], [1, 1]]),
            "flip_probability": 0.2,
            "num_negatives": 4,
            "values": (0, 1),
        },
        {
            **ODD,
            "flip_probability": numbers(),
            "num_negatives": counts(),
            "stabilization": numbers(),
            "values": sequences(),
        },
    ),
    subject(
        objectives.pseudo_likelihood,
        {**BASIC, "potential": bits_energy, "batch": jnp.array([[0, 1], [1, 1]]), "values": (0, 1)},
        {**ODD, "values": sequences(), "num_sites": counts()},
    ),
    subject(
        objectives.ratio_matching,
        {**BASIC, "potential": bits_energy, "batch": jnp.array([[0, 1], [1, 1]]), "values": (0, 1)},
        {**ODD, "values": sequences(), "num_sites": counts()},
    ),
    subject(
        objectives.noise_contrastive_estimation,
        {**BASIC, "potential": ebm.potentials.with_log_normalizer(quadratic), "noise": NORMAL},
        {**ODD, "noise": LAWS, "noise_ratio": counts(), "differentiate_noise": choices(True, False)},
    ),
    subject(
        objectives.ranking_noise_contrastive_estimation,
        {
            **BASIC,
            "potential": lambda x, c: 0.5 * jnp.sum((x - c) ** 2),
            "batch": (BATCH, BATCH),
            "noise": NORMAL,
            "num_noise": 4,
        },
        {
            **ODD,
            "batch": st.tuples(rows((4, 2)), rows((4, 2))),
            "noise": LAWS,
            "num_noise": counts(),
            "differentiate_noise": choices(True, False),
        },
    ),
    subject(objectives.telescoping_ratio, {**BASIC, "potential": BRIDGES}, {**ODD, "levels": sequences()}),
    subject(
        objectives.learned_normalizer_likelihood,
        {**BASIC, "potential": ebm.potentials.with_log_normalizer(quadratic), "proposal": NORMAL, "num_samples": 8},
        {**ODD, "proposal": LAWS, "num_samples": counts(4)},
    ),
    subject(
        objectives.potential_flow_matching,
        {**BASIC, "noise": NORMAL, "time_dependent": False},
        {**ODD, "noise": LAWS, "time_dependent": choices(True, False), "coupling": choices("independent", "optimal")},
    ),
    subject(
        objectives.equilibrium_matching,
        {**BASIC, "noise": NORMAL},
        {**ODD, "noise": LAWS, "decay_start": numbers(), "gradient_scale": numbers()},
    ),
    wrapper(
        objectives.energy_l2,
        {"objective": CD, "weight": 0.1},
        {"objective": functions(), "weight": numbers(), "at": choices("both", "data")},
    ),
    wrapper(
        objectives.gradient_penalty,
        {"objective": CD, "weight": 0.1},
        {
            "objective": functions(),
            "weight": numbers(),
            "target": numbers(),
            "at": choices("interpolates", "data", "negatives"),
        },
    ),
    wrapper(objectives.limit_gap, {"objective": CD, "limit": 1e6}, {"objective": functions(), "limit": numbers()}),
    Subject("stateless", objectives.stateless, {"loss": objectives.score_matching}, {"loss": functions()}, cases=10),
    Subject(
        "jarzynski_chains",
        objectives.jarzynski_chains,
        {"key": KEY, "reference": NORMAL, "kernel": MALA, "num_chains": 4},
        {"key": keys(), "reference": LAWS, "kernel": functions(), "num_chains": counts(), "min_ess": numbers()},
        names=("position",),
        is_quick=False,
    ),
    Subject(
        "progressive_recovery",
        objectives.progressive_recovery,
        {"key": KEY, "potential": RECOVERY, "sampler": state(BATCH), "num_steps": 1},
        {"key": keys(), "potential": potentials(), "sampler": SAMPLERS, "num_steps": counts(2)},
        cases=60,
        is_quick=False,
    ),
    Subject(
        "follow_flow",
        objectives.follow_flow,
        {"potential": quadratic, "start": jnp.ones(2), "num_steps": 1, "time_dependent": False},
        {"potential": potentials(), "start": arrays(), "num_steps": counts(), "time_dependent": choices(True, False)},
        judge=flows_where_it_can,
        cases=60,
        is_quick=False,
    ),
    Subject(
        "Bridges",
        objectives.Bridges,
        {"function": lambda k, x: x, "num_bridges": 2},
        {"function": functions(), "num_bridges": counts()},
    ),
    Subject(
        "PiecewiseTime",
        objectives.PiecewiseTime,
        {"function": lambda k, x: x, "num_times": 2},
        {"function": functions(), "num_times": counts()},
    ),
    Subject(
        "RecoveryPotential",
        objectives.RecoveryPotential,
        {"function": lambda k, x: x, "noise_scales": (0.5,)},
        {"function": functions(), "noise_scales": sequences()},
    ),
)

test_some_calls, test_many_calls = calls_of("objectives", SUBJECTS)
