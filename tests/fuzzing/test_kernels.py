"""Constructors of kernels: a number, a count, a kernel or a law of another kind than expected."""

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from hypothesis import strategies as st

from ebm_ppl import kernels
from ebm_ppl.diffusion import DiffusionSampler
from tests.fuzzing.strategies import arrays, choices, counts, functions, numbers, sequences
from tests.fuzzing.subjects import Subject, calls_of

NORMAL = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
MALA = kernels.mala(step_size=0.1)
MASSES = st.one_of(arrays((2,), (2, 2), (3,), (2, 3), ()), numbers())
KERNELS = st.one_of(
    functions(),
    st.sampled_from((MALA, kernels.gibbs(), kernels.isir(NORMAL, num_proposals=4), NORMAL, blackjax.mala)),
)
LAWS = st.one_of(
    functions(),
    st.sampled_from(
        (
            NORMAL,
            dist.Bernoulli(0.5),
            MALA,
            dist.Uniform(0.0, 1.0),
            dist.ImproperUniform(dist.constraints.real, (), ()),
            dist.Normal(jnp.zeros(2), 1.0),
        )
    ),
)
DIFFUSER = DiffusionSampler(2, num_steps=2, key=jax.random.key(0), width=4, depth=1)
GENERATOR = eqx.nn.Linear(3, 2, key=jax.random.key(0))
BLACKJAX = st.one_of(
    functions(),
    st.sampled_from(
        (
            blackjax.mala,
            blackjax.rmh,
            blackjax.irmh,
            blackjax.sgld,
            blackjax.ghmc,
            blackjax.nss,
            blackjax.elliptical_slice,
        )
    ),
)


def cycle(first, second):
    """Two kernels in turn.

    Raises:
        TypeError: one of them is no kernel.
        ValueError: they do not go together.
    """
    return kernels.cycle(first, second)


PARTS = ("kernels", "kernel_0", "kernel_1", "kernel_2")
FLOATS = {"step_size": numbers()}
SUBJECTS = (
    Subject("mala", kernels.mala, {"step_size": 0.1}, FLOATS),
    Subject(
        "barker",
        kernels.barker,
        {"step_size": 0.1},
        {**FLOATS, "inverse_mass_matrix": MASSES},
        cases=300,
    ),
    Subject("unadjusted_langevin", kernels.unadjusted_langevin, {"step_size": 0.1}, FLOATS),
    Subject("random_walk", kernels.random_walk, {"sigma": 0.1}, {"sigma": st.one_of(numbers(), MASSES)}),
    Subject(
        "hmc",
        kernels.hmc,
        {"step_size": 0.1, "num_integration_steps": 2},
        {**FLOATS, "num_integration_steps": counts(), "inverse_mass_matrix": MASSES},
        cases=300,
    ),
    Subject(
        "nuts",
        kernels.nuts,
        {"step_size": 0.1},
        {**FLOATS, "max_num_doublings": counts(), "inverse_mass_matrix": MASSES},
        cases=300,
    ),
    Subject(
        "unadjusted_mclmc",
        kernels.unadjusted_mclmc,
        {"step_size": 0.1, "decoherence_length": 1.0},
        {**FLOATS, "decoherence_length": numbers(), "inverse_mass_matrix": MASSES},
    ),
    Subject(
        "adjusted_mclmc",
        kernels.adjusted_mclmc,
        {"step_size": 0.1, "num_integration_steps": 2},
        {**FLOATS, "num_integration_steps": counts(), "decoherence_factor": numbers(), "inverse_mass_matrix": MASSES},
        may_be_nan=("decoherence_factor", "keywords", r"\['L_proposal"),
    ),
    Subject(
        "langevin",
        kernels.langevin,
        {"step_size": 0.1},
        {
            **FLOATS,
            "noise_scale": numbers(),
            "temperature": numbers(),
            "max_gradient": numbers(),
            "antithetic": choices(True, False),
        },
    ),
    Subject(
        "implied_temperature",
        kernels.implied_temperature,
        {"step_size": 0.1, "noise_scale": 0.1},
        {**FLOATS, "noise_scale": numbers()},
        may_be_nan=("",),
    ),
    Subject(
        "sphere_langevin",
        kernels.sphere_langevin,
        {"step_size": 0.1},
        {**FLOATS, "temperature": numbers(), "antithetic": choices(True, False)},
    ),
    Subject(
        "gibbs",
        kernels.gibbs,
        {},
        {"scan": choices("sequential", "random", "chequerboard", "block"), "values": sequences()},
    ),
    Subject("gibbs_with_gradients", kernels.gibbs_with_gradients, {}, {"values": sequences()}),
    Subject("discrete_langevin", kernels.discrete_langevin, {"step_size": 0.1}, {**FLOATS, "values": sequences()}),
    Subject(
        "unadjusted_discrete_langevin",
        kernels.unadjusted_discrete_langevin,
        {"step_size": 0.1},
        {**FLOATS, "values": sequences()},
    ),
    Subject("independence", kernels.independence, {"proposal": NORMAL}, {"proposal": LAWS}, cases=15),
    Subject(
        "isir", kernels.isir, {"proposal": NORMAL, "num_proposals": 4}, {"proposal": LAWS, "num_proposals": counts()}
    ),
    Subject(
        "flow_assisted",
        kernels.flow_assisted,
        {"flow": NORMAL, "local": MALA},
        {
            "flow": LAWS,
            "local": KERNELS,
            "num_local": counts(),
            "num_proposals": counts(),
            "method": choices("isir", "independence"),
        },
        names=("local_kernel", "kernels"),
    ),
    Subject(
        "global_local",
        kernels.global_local,
        {"global_kernel": MALA, "local_kernel": MALA, "num_local": 2},
        {"global_kernel": KERNELS, "local_kernel": KERNELS, "num_local": counts()},
        names=("kernels",),
    ),
    Subject("cycle", cycle, {"first": MALA, "second": MALA}, {"first": KERNELS, "second": KERNELS}, names=PARTS),
    Subject(
        "mixture",
        kernels.mixture,
        {"kernels": [MALA, MALA], "probabilities": [0.5, 0.5]},
        {"kernels": st.one_of(st.lists(KERNELS, max_size=3), functions()), "probabilities": sequences()},
        names=PARTS,
    ),
    Subject(
        "replica_exchange",
        kernels.replica_exchange,
        {"inverse_temperatures": [1.0, 0.5], "inner": MALA},
        {
            "inverse_temperatures": sequences(),
            "inner": KERNELS,
            "reference": LAWS,
            "num_steps": counts(),
            "step_size_power": numbers(),
            "step_size_factors": sequences(),
        },
    ),
    Subject(
        "tempered_smc",
        kernels.tempered_smc,
        {"inner": MALA, "reference": NORMAL},
        {
            "inner": KERNELS,
            "reference": LAWS,
            "num_steps": counts(),
            "target_ess": numbers(),
            "keep_weights": choices(True, False),
            "max_temperatures": counts(),
        },
    ),
    Subject(
        "short_run",
        kernels.short_run,
        {"num_steps": 2, "init": NORMAL, "step_size": 0.1},
        {
            "num_steps": counts(),
            "init": LAWS,
            "kernel": KERNELS,
            "step_size": numbers(),
            "noise_scale": numbers(),
            "temperature": numbers(),
            "max_gradient": numbers(),
        },
    ),
    Subject(
        "generator",
        kernels.generator,
        {"generator": GENERATOR, "latent_shape": 3, "num_steps": 2, "step_size": 0.1},
        {
            "generator": functions(),
            "latent_shape": st.one_of(counts(), sequences()),
            "num_steps": counts(),
            "step_size": numbers(),
            "noise_scale": numbers(),
            "temperature": numbers(),
            "max_gradient": numbers(),
            "initial_scale": numbers(),
            "local": KERNELS,
        },
    ),
    Subject(
        "diffusion",
        kernels.diffusion,
        {"sampler": DIFFUSER},
        {"sampler": functions(), "correction": choices("weights", "metropolis")},
    ),
    Subject("raw_diffusion", kernels.raw_diffusion, {"sampler": DIFFUSER}, {"sampler": functions()}, cases=10),
    Subject(
        "from_blackjax",
        kernels.from_blackjax,
        {"algorithm": blackjax.mala, "step_size": 0.1},
        {**FLOATS, "algorithm": BLACKJAX},
        names=("step_size",),
    ),
)

test_some_calls, test_many_calls = calls_of("kernels", SUBJECTS)
