"""``EBM``: construction, densities and refusals to sample, with energies, bases, conditions and values of all kinds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from hypothesis import strategies as st

import ebm_ppl as ebm
from ebm_ppl.distributions import find_ebms, is_ebm
from tests.fuzzing.strategies import arrays, functions, keys, numbers, potentials, rows
from tests.fuzzing.subjects import Subject, calls_of

NORMAL = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
BASES = st.one_of(
    functions(),
    st.sampled_from(
        (
            NORMAL,
            dist.Normal(0.0, 1.0),
            dist.Normal(0.0, 1.0).expand([4]),
            dist.Bernoulli(0.5).expand([2]).to_event(1),
            dist.ImproperUniform(dist.constraints.real_vector, (), (2,)),
            dist.Exponential(1.0).expand([2]).to_event(1),
            dist.Uniform(0.0, 1.0).expand([2]).to_event(1),
            dist.Delta(0.0),
            dist.Categorical(jnp.ones(3) / 3.0),
            dist.Dirichlet(jnp.ones(2)),
            dist.LKJCholesky(2),
            dist.ProjectedNormal(jnp.ones(2)),
        )
    ),
)


def quadratic(x: Any) -> Any:
    return 0.5 * jnp.sum(x**2)


SITE = ebm.EBM(quadratic, NORMAL, log_normalizer=-0.7)
SITES = {
    "normal": SITE,
    "positive": ebm.EBM(
        lambda x: jnp.sum(jnp.sqrt(x)), dist.Exponential(1.0).expand([2]).to_event(1), log_normalizer=0.0
    ),
    "rows": ebm.EBM(
        lambda x, c: 0.5 * jnp.sum((x - c) ** 2), NORMAL, condition=jnp.ones(4), log_normalizer=jnp.zeros(4)
    ),
    "bits": ebm.EBM(lambda x: 0.3 * jnp.sum(x) * 1.0, dist.Bernoulli(0.5).expand([2]).to_event(1), log_normalizer=0.0),
    "box": ebm.EBM(lambda x: jnp.sum(x), dist.Uniform(0.0, 1.0).expand([2]).to_event(1), log_normalizer=0.0),
}


def anything(result: Any, arguments: dict[str, Any]) -> None:
    """A distribution, whose numbers are judged when it is used."""
    assert isinstance(result, ebm.EBM)
    repr(result)


def density(result: Any, arguments: dict[str, Any]) -> None:
    """NaN only where the value is NaN; plus infinity nowhere; minus infinity outside the support and beyond float32."""
    value, found = np.asarray(arguments["value"], np.float64), np.asarray(result, np.float64)
    assert not np.isposinf(found).any()
    if np.isfinite(value).all():
        assert not np.isnan(found).any(), "the value is finite and its density is not a number"


def log_prob_of(site: Any) -> Any:
    def log_prob(value: Any) -> Any:
        """The density.

        Raises:
            TypeError: see :meth:`ebm_ppl.EBM.log_prob`.
            ValueError: see :meth:`ebm_ppl.EBM.log_prob`.
        """
        return site.log_prob(value)

    return log_prob


def sample_of(site: Any) -> Any:
    def sample(key: Any, sample_shape: Any) -> Any:
        return site.sample(key, sample_shape)

    return sample


SUBJECTS = (
    Subject(
        "EBM",
        ebm.EBM,
        {"potential": quadratic, "base": NORMAL},
        {
            "potential": potentials(),
            "base": BASES,
            "condition": rows((4,)),
            "log_normalizer": st.one_of(numbers(), arrays()),
            "sampler": functions(),
        },
        judge=anything,
        cases=400,
    ),
    *(
        Subject(
            f"log_prob of {name}",
            log_prob_of(site),
            {"value": np.full((4, 2), 0.5 if name != "bits" else 1, np.float32)},
            {"value": rows((4, 2))},
            documented=(ebm.EBM.log_prob,),
            judge=density,
            cases=200,
        )
        for name, site in SITES.items()
    ),
    Subject(
        "energy",
        SITE.energy,
        {"value": np.zeros(2, np.float32)},
        {"value": rows((4, 2))},
        judge=lambda result, arguments: density(-result, arguments),
        cases=200,
    ),
    Subject(
        "unnormalized_log_prob",
        SITE.unnormalized_log_prob,
        {"value": np.zeros(2, np.float32)},
        {"value": rows((4, 2))},
        judge=density,
        cases=200,
    ),
    Subject(
        "sample",
        sample_of(SITE.with_sampler(lambda key, potential, num_samples: jnp.zeros((num_samples, 2)))),
        {"key": jax.random.key(0), "sample_shape": ()},
        {"key": keys(), "sample_shape": st.sampled_from(((), (2,), (0,), (2, 3)))},
        documented=(ebm.EBM.sample,),
        names=("EBM",),
        cases=30,
    ),
    Subject("find_ebms", find_ebms, {"distribution": SITE.expand([3])}, {"distribution": BASES}, cases=20),
    Subject("is_ebm", is_ebm, {"node": SITE}, {"node": BASES}, cases=20),
)

test_some_calls, test_many_calls = calls_of("distributions", SUBJECTS)
