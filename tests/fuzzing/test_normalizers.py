"""Every estimator of log Z: sites, samples, proposals, kernels and sizes of all kinds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from hypothesis import strategies as st

import ebm_ppl as ebm
from ebm_ppl import normalizer
from tests.fuzzing.contract import nonfinite_leaves
from tests.fuzzing.strategies import arrays, counts, functions, keys, not_callable, numbers, rows, sequences
from tests.fuzzing.subjects import Subject, calls_of

KEY = jax.random.key(1)
NORMAL = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
MALA = ebm.kernels.mala(step_size=0.3)
SITE = ebm.EBM(lambda x: 0.5 * jnp.sum(x**2), NORMAL)
BITS = ebm.EBM(lambda x: 0.3 * jnp.sum(x) * 1.0, dist.Bernoulli(0.5).expand([3]).to_event(1))
SAMPLES = np.asarray(0.7 * jax.random.normal(KEY, (4, 2)))
# What quadrature finds for the site, as if it had been called.
ESTIMATE = normalizer.LogNormalizer(*map(jnp.asarray, (-0.35, 0.0, 480.0, jnp.nan, 0, True)))
MANY = np.asarray(0.7 * jax.random.normal(KEY, (100, 2)))
SCALAR = ebm.EBM(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))


def site(energy: Any, base: Any = NORMAL) -> Any:
    return ebm.EBM(energy, base)


SITES = st.one_of(
    functions(),
    st.sampled_from(
        (
            SITE,
            BITS,
            SCALAR,
            site(lambda x: jnp.sum(x) * jnp.nan),
            site(lambda x: jnp.sum(jnp.sqrt(x))),
            site(lambda x: 1e30 * jnp.sum(x**2)),
            site(lambda x: -jnp.sum(x**4)),
            site(lambda x: jnp.where(x[0] > 0, jnp.inf, 0.0)),
            site(lambda x: jnp.where(x[0] > 0, -jnp.inf, 0.0)),
            site(lambda x: jnp.inf + 0.0 * jnp.sum(x)),
            site(lambda x: 1e38 + 0.0 * jnp.sum(x)),
            site(lambda x: jnp.sum(x**2), dist.ImproperUniform(dist.constraints.real_vector, (), (2,))),
            site(lambda x: x**2, dist.Exponential(1.0)),
            site(lambda x: 0.1 * x**2, dist.Poisson(1.0)),
            site(lambda x: x**2, dist.Normal(0.0, 1.0).expand([3])),
            NORMAL,
        )
    ),
)
KERNELS = st.one_of(
    not_callable(),
    st.sampled_from(
        (
            MALA,
            ebm.kernels.mala(step_size=1e20),
            ebm.kernels.gibbs(),
            ebm.kernels.unadjusted_langevin(0.1),
            ebm.kernels.isir(NORMAL, num_proposals=2),
        )
    ),
)
LAWS = st.one_of(
    functions(),
    st.sampled_from(
        (
            NORMAL,
            dist.Normal(0.0, 1.0),
            dist.Uniform(-1.0, 1.0).expand([2]).to_event(1),
            BITS.base,
            dist.Normal(0.0, 1e-30).expand([2]).to_event(1),
            dist.ImproperUniform(dist.constraints.real_vector, (), (2,)),
        )
    ),
)


def judge(result: Any, arguments: dict[str, Any]) -> None:
    """An estimate that is not finite is not reliable."""
    for estimate in jax.tree.leaves(result, is_leaf=lambda node: hasattr(node, "reliable")):
        if hasattr(estimate, "reliable"):
            reliable = np.asarray(estimate.reliable)
            # A mean over rows is reliable where its log Z is; with one row it has no error of its own, which shows.
            is_mean = isinstance(estimate, normalizer.MeanLogLikelihood)
            names = ("value",) if is_mean else ("value", "standard_error", "lower", "upper")
            numbers = [getattr(estimate, name) for name in names if hasattr(estimate, name)]
            for number in numbers:
                assert (np.isfinite(np.asarray(number)) | ~reliable).all(), f"reliable: {estimate}"


def particles_are_finite(result: Any, arguments: dict[str, Any]) -> None:
    """Particles stay finite, and what their weights have lost is counted."""
    assert not nonfinite_leaves(result.position)
    weights = np.asarray(result.log_weight)
    lost = ~np.isfinite(weights)
    if lost.any():
        assert not np.isposinf(weights).any()
        assert (~np.isnan(weights)).all() or int(np.sum(np.asarray(result.info.num_nonfinite))) > 0


BASE = {"key": KEY, "ebm": SITE}
ODD = {"key": keys(), "ebm": SITES}
ANNEALED = {**BASE, "kernel": MALA, "num_particles": 8, "num_temperatures": 2}
ODD_ANNEALED = {
    **ODD,
    "kernel": KERNELS,
    "reference": LAWS,
    "num_particles": counts(8),
    "num_temperatures": counts(3),
    "num_steps": counts(2),
}
REVERSE = {**BASE, "kernel": MALA, "samples": SAMPLES, "num_temperatures": 2}
ODD_REVERSE = {
    **ODD,
    "kernel": KERNELS,
    "reference": LAWS,
    "samples": rows((4, 2)),
    "num_temperatures": counts(3),
    "num_steps": counts(2),
}
SMC = {**BASE, "kernel": MALA, "num_particles": 8, "num_steps": 1}
ODD_SMC = {
    **ODD,
    "kernel": KERNELS,
    "reference": LAWS,
    "num_particles": counts(8),
    "num_steps": counts(2),
    "target_ess": numbers(),
    "temperatures": sequences(),
    "max_temperatures": counts(5),
}
# Parts that several of them share: the first step of an annealing, the values of a site, one log Z of two.
NAMES = ("base", "values", "position", "log_normalizer", "sampler", "enumerate_states")
QUICK = (normalizer.enumerate_states, normalizer.list_states, normalizer.log_likelihood)
VALUES = st.one_of(numbers(), arrays((), (3,)), st.just(ESTIMATE))


def subject(function: Any, right: dict[str, Any], odd: dict[str, Any], **options: Any) -> Subject:
    options = {"judge": judge, "cases": 60, "names": NAMES, "is_quick": function in QUICK, **options}
    return Subject(function.__name__, function, right, odd, **options)


SUBJECTS = (
    subject(normalizer.annealed_importance, ANNEALED, ODD_ANNEALED, cases=25),
    subject(normalizer.annealed_particles, ANNEALED, ODD_ANNEALED, judge=particles_are_finite, cases=25),
    subject(normalizer.reverse_annealed_importance, REVERSE, ODD_REVERSE, cases=25),
    subject(
        normalizer.bidirectional,
        {**REVERSE, "num_particles": 8},
        {**ODD_REVERSE, "num_particles": counts(8), "confidence": numbers()},
        cases=20,
    ),
    subject(normalizer.tempered_smc, SMC, ODD_SMC, cases=25),
    subject(normalizer.tempered_particles, {**SMC, "num_runs": 2}, {**ODD_SMC, "num_runs": counts()}, cases=25),
    subject(
        normalizer.bridge_sampling,
        {**BASE, "samples": MANY, "proposal": NORMAL},
        {**ODD, "samples": rows((4, 2)), "proposal": LAWS, "num_proposals": counts(30)},
    ),
    subject(
        normalizer.flow_importance,
        {**BASE, "proposal": NORMAL, "num_particles": 8},
        {**ODD, "proposal": LAWS, "num_particles": counts(8)},
    ),
    subject(normalizer.enumerate_states, {"ebm": BITS}, {"ebm": SITES, "max_states": counts(20)}),
    subject(normalizer.list_states, {"ebm": BITS}, {"ebm": SITES, "max_states": counts(20)}),
    subject(normalizer.quadrature, {"ebm": SCALAR}, {"ebm": SITES, "num_nodes": counts(40)}, cases=40),
    subject(
        normalizer.log_likelihood,
        {"ebm": SCALAR, "data": np.ones(4, np.float32), "log_normalizer": 0.0},
        {"ebm": SITES, "data": st.one_of(rows((4, 2)), arrays((3,))), "log_normalizer": VALUES},
    ),
    subject(
        normalizer.compare_log_likelihoods,
        {"first": SCALAR, "second": dist.Normal(0.0, 1.0), "data": np.ones(4, np.float32), "first_log_normalizer": 0.0},
        {
            "first": SITES,
            "second": SITES,
            "data": st.one_of(rows((4, 2)), arrays((3,))),
            "first_log_normalizer": VALUES,
            "second_log_normalizer": VALUES,
        },
    ),
    subject(
        normalizer.lower_confidence_bound,
        {"log_weight": np.zeros(8, np.float32)},
        {"log_weight": rows((3,)), "confidence": numbers()},
    ),
    subject(
        normalizer.anneal,
        {
            "key": KEY,
            "position": SAMPLES,
            "start_logdensity": lambda x: -0.5 * jnp.sum(x**2),
            "end_logdensity": lambda x: -jnp.sum(x**2),
            "kernel": MALA,
            "num_temperatures": 2,
        },
        {
            "key": keys(),
            "position": rows((4, 2)),
            "kernel": KERNELS,
            "num_temperatures": counts(3),
            "num_steps": counts(2),
        },
        judge=particles_are_finite,
        cases=25,
    ),
    subject(
        normalizer.tracked,
        {"sampler": ebm.objectives.jarzynski_chains(KEY, NORMAL, MALA, 64), "potential": lambda x: jnp.sum(x**2)},
        {
            "sampler": st.one_of(functions(), st.just(ebm.init_sampler(SAMPLES, MALA))),
            "potential": functions(),
            "num_held_out": counts(30),
        },
    ),
)

test_some_calls, test_many_calls = calls_of("normalizers", SUBJECTS)
