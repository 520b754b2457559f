"""``init_sampler``, ``advance`` and ``draw`` with each kernel: chains, energies, keys and counts of all kinds."""

from typing import Any

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from hypothesis import strategies as st

import ebm_ppl as ebm
from ebm_ppl import kernels, replay
from ebm_ppl.diffusion import DiffusionSampler
from tests.fuzzing.contract import assert_finite
from tests.fuzzing.strategies import arrays, counts, functions, keys, numbers, potentials, rows
from tests.fuzzing.subjects import Subject, calls_of

KEY = jax.random.key(1)
NORMAL = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
MALA = kernels.mala(step_size=0.3)
CHAINS = np.array([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6], [0.7, 0.8]], np.float32)
BITS = (CHAINS > 0).astype(np.int32)
UNIT = CHAINS / np.linalg.norm(CHAINS, axis=1, keepdims=True)
DIFFUSER = DiffusionSampler(2, num_steps=2, key=jax.random.key(0), width=4, depth=1)


def quadratic(x: Any) -> Any:
    return 0.5 * jnp.sum(x**2)


def steep(x: Any) -> Any:
    return 1e30 * jnp.sum(x**4)


def not_beyond_one(x: Any) -> Any:
    return -jnp.sum(jnp.sqrt(1.0 - x**2))


ENERGIES = (quadratic, steep, not_beyond_one)


def tilted(x: Any) -> Any:
    return 0.3 * jnp.sum(x) * 1.0


# Step sizes far too large, so that proposals overflow, stand beside those that work.
KERNELS = {
    "mala": MALA,
    "mala of huge steps": kernels.mala(step_size=1e30),
    "unadjusted_langevin": kernels.unadjusted_langevin(step_size=0.1),
    "unadjusted_langevin of huge steps": kernels.unadjusted_langevin(step_size=1e20),
    "langevin": kernels.langevin(0.1, 0.1, max_gradient=1.0),
    "barker": kernels.barker(step_size=0.3),
    "random_walk": kernels.random_walk(sigma=0.3),
    "random_walk of huge steps": kernels.random_walk(sigma=1e38),
    "hmc": kernels.hmc(step_size=0.2, num_integration_steps=2),
    "hmc of huge steps": kernels.hmc(step_size=1e20, num_integration_steps=2),
    "nuts": kernels.nuts(step_size=0.3, max_num_doublings=2),
    "unadjusted_mclmc": kernels.unadjusted_mclmc(step_size=0.3, decoherence_length=1.0),
    "adjusted_mclmc": kernels.adjusted_mclmc(step_size=0.3, num_integration_steps=2),
    "independence": kernels.independence(NORMAL),
    "isir": kernels.isir(NORMAL, num_proposals=3),
    "flow_assisted": kernels.flow_assisted(NORMAL, MALA, num_local=1, num_proposals=3),
    "cycle": kernels.cycle(MALA, kernels.random_walk(sigma=0.3)),
    "mixture": kernels.mixture([MALA, kernels.random_walk(sigma=0.3)], [0.5, 0.5]),
    "replica_exchange": kernels.replica_exchange([1.0, 0.5], inner=MALA),
    "tempered_smc": kernels.tempered_smc(inner=MALA, reference=NORMAL, num_steps=1, max_temperatures=20),
    "short_run": kernels.short_run(2, NORMAL, step_size=0.1),
    "generator": kernels.generator(
        eqx.nn.Linear(3, 2, key=jax.random.key(0)), latent_shape=3, step_size=0.05, num_steps=1
    ),
    "diffusion": kernels.diffusion(DIFFUSER),
    "raw_diffusion": kernels.raw_diffusion(DIFFUSER),
    "from_blackjax": kernels.from_blackjax(
        blackjax.ghmc, step_size=0.1, momentum_inverse_scale=jnp.ones(2), alpha=0.5, delta=0.1
    ),
    "sphere_langevin": kernels.sphere_langevin(step_size=0.05),
    "gibbs": kernels.gibbs(values=(0, 1)),
    "gibbs_with_gradients": kernels.gibbs_with_gradients(values=(0, 1)),
    "discrete_langevin": kernels.discrete_langevin(step_size=0.5, values=(0, 1)),
    "unadjusted_discrete_langevin": kernels.unadjusted_discrete_langevin(step_size=0.5, values=(0, 1)),
}
START = {name: BITS for name in KERNELS if "gibbs" in name or "discrete" in name} | {"sphere_langevin": UNIT}


def run_of(kernel: Any) -> Any:
    """The three calls as one, for one kernel."""

    def run(position: Any, potential: Any, key: Any, num_steps: Any, num_draws: Any) -> Any:
        sampler = ebm.init_sampler(position, kernel)
        moved, info = ebm.advance(key, potential, sampler, num_steps)
        _, draws = ebm.draw(key, potential, sampler, num_draws)
        return moved, info, draws

    run.__name__ = "sampler"
    return run


def judge(result: Any, arguments: dict[str, Any]) -> None:
    """What is not finite belongs to a chain that says so."""
    moved, info, draws = result
    _judge_chains(moved.position, moved.log_weight, info, ())
    _judge_chains(draws.position, draws.log_weight, draws, ("potential",))
    if not _is_flagged(info).any():
        assert_finite(moved.auxiliary)


def _is_flagged(info: Any) -> np.ndarray:
    return np.asarray(info.is_divergent) | (np.asarray(info.num_nonfinite) > 0)


def _judge_chains(position: Any, log_weight: Any, info: Any, also: tuple[str, ...]) -> None:
    flagged = _is_flagged(info)
    shape = flagged.shape
    for leaf in (*jax.tree.leaves(position), log_weight, *(getattr(info, name) for name in also)):
        finite = np.isfinite(np.asarray(leaf, np.float64)).reshape(*shape, -1).all(axis=-1)
        if leaf.ndim and len(shape) == 2:  # once flagged, a later draw may repeat what was flagged
            flagged_before = np.maximum.accumulate(flagged, axis=1)
            assert (finite | flagged_before).all(), "a draw is not finite and nothing says so"
        else:
            assert (finite | flagged).all(), "a chain is not finite and nothing says so"
    rate = np.asarray(info.acceptance_rate)
    assert np.isnan(rate).all() or (np.isfinite(rate) & (rate >= 0) & (rate <= 1 + 1e-6)).all() or flagged.any()


# Few energies that work, because each is compiled for each kernel; all other arguments are numbers to those programs.
CASES_OF_A_RUN = 50
DOCUMENTED = (ebm.init_sampler, ebm.advance, ebm.draw)
RUNS = tuple(
    Subject(
        name,
        run_of(kernel),
        {
            "position": START.get(name, CHAINS),
            "potential": tilted if name in START else quadratic,
            "key": KEY,
            "num_steps": 1,
            "num_draws": 1,
        },
        {
            "position": st.one_of(arrays((4, 2)), st.just(START.get(name, CHAINS))),
            "potential": st.sampled_from((*ENERGIES, tilted, lambda x: x, lambda x: 1j * jnp.sum(x), None)),
            "key": keys(),
            "num_steps": counts(1),
            "num_draws": counts(1),
        },
        documented=DOCUMENTED,
        judge=judge,
        cases=CASES_OF_A_RUN,
        is_quick=name == "mala",
    )
    for name, kernel in KERNELS.items()
)

SAMPLER = ebm.init_sampler(CHAINS, MALA)
SAMPLERS = st.one_of(functions(), st.sampled_from((SAMPLER, ebm.init_sampler(CHAINS, KERNELS["replica_exchange"]))))


def tree(position: Any, kernel: Any) -> Any:
    """``init_sampler`` of trees of arrays.

    Raises:
        TypeError: see there.
        ValueError: see there.
    """
    return ebm.init_sampler({"a": position, "b": CHAINS}, kernel)


SUBJECTS = (
    *RUNS,
    Subject(
        "init_sampler",
        ebm.init_sampler,
        {"position": CHAINS, "kernel": MALA},
        {"position": rows((4, 2)), "kernel": st.one_of(functions(), st.sampled_from(list(KERNELS.values())))},
        cases=400,
        may_be_nan=(r"L_proposal_factor",),
    ),
    Subject(
        "init_sampler of a tree",
        tree,
        {"position": CHAINS, "kernel": MALA},
        {"position": rows((4, 2)), "kernel": functions()},
        cases=300,
    ),
    Subject(
        "advance",
        ebm.advance,
        {"key": KEY, "potential": quadratic, "sampler": SAMPLER, "num_steps": 1},
        {"key": keys(), "potential": potentials(), "sampler": SAMPLERS, "num_steps": counts()},
        judge=lambda result, arguments: _judge_chains(result[0].position, result[0].log_weight, result[1], ()),
    ),
    Subject(
        "draw",
        ebm.draw,
        {"key": KEY, "potential": quadratic, "sampler": SAMPLER, "num_draws": 1},
        {"key": keys(), "potential": potentials(), "sampler": SAMPLERS, "num_draws": counts(), "num_steps": counts()},
        judge=lambda result, arguments: _judge_chains(result[1].position, result[1].log_weight, result[1], ()),
    ),
    Subject(
        "restart",
        replay.restart,
        {"key": KEY, "sampler": SAMPLER, "fresh": CHAINS, "probability": 0.5},
        {"key": keys(), "sampler": SAMPLERS, "fresh": rows((4, 2)), "probability": numbers(), "max_age": counts()},
        may_be_nan=(r"position",),  # fresh positions are taken as they come
    ),
    Subject(
        "gather_chains",
        replay.gather_chains,
        {"key": KEY, "sampler": SAMPLER, "num_chains": 2},
        {"key": keys(), "sampler": SAMPLERS, "num_chains": counts(6)},
    ),
    Subject(
        "take_chains",
        replay.take_chains,
        {"sampler": SAMPLER, "index": np.array([1, 2])},
        {"sampler": SAMPLERS, "index": arrays((1,), (2,), (3,))},
    ),
    Subject(
        "scatter_chains",
        replay.scatter_chains,
        {"sampler": SAMPLER, "index": np.array([1, 2]), "moved": replay.take_chains(SAMPLER, np.array([1, 2]))},
        {"sampler": SAMPLERS, "index": arrays((1,), (2,), (3,)), "moved": SAMPLERS},
    ),
)

test_some_calls, test_many_calls = calls_of("sampling", SUBJECTS)
