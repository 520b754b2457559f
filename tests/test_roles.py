"""``check_model``: the role of every EBM site, and a refusal of every wrong policy."""

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax.tree_util import Partial
from numpyro import handlers
from numpyro.contrib.control_flow import scan

import ebm_ppl as ebm
from ebm_ppl.handlers import (
    Pool,
    constant_normalizer,
    estimated_normalizer,
    exact_normalizer,
    negative_phase,
    surrogate_normalizer,
)
from ebm_ppl.roles import Role

BASE = dist.Normal(0.0, 1.0)
MALA = ebm.kernels.mala(step_size=0.2)
POOLS = {"x": Pool(jnp.zeros(4), jnp.zeros(4))}


def tilted(scale):
    return ebm.EBM(lambda x: scale * x**2, BASE)


def normalised():
    numpyro.sample("x", ebm.EBM(lambda x: x**2, BASE, log_normalizer=0.1), obs=0.3)


def constant():
    numpyro.sample("x", tilted(2.0), obs=0.3)


def learned():
    numpyro.sample("x", tilted(numpyro.param("w", 1.0)), obs=0.3)


def doubly_intractable():
    numpyro.sample("x", tilted(numpyro.sample("s", dist.LogNormal())), obs=0.3)


def fixed_prior():
    x = numpyro.sample("x", tilted(2.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=0.3)


def learned_prior():
    x = numpyro.sample("x", tilted(numpyro.param("w", 1.0)))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=0.3)


def hierarchical():
    x = numpyro.sample("x", tilted(numpyro.sample("s", dist.LogNormal())))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=0.3)


def weighted():
    share = numpyro.sample("share", dist.Beta(1.0, 1.0))
    mixture = dist.MixtureGeneral(dist.Categorical(jnp.stack([share, 1 - share])), [tilted(2.0), BASE])
    numpyro.sample("x", mixture, obs=0.3)


ROLES = {
    normalised: Role.NORMALIZED,
    constant: Role.CONSTANT,
    learned: Role.LEARNED,
    doubly_intractable: Role.DOUBLY_INTRACTABLE,
    fixed_prior: Role.FIXED_PRIOR,
    learned_prior: Role.LEARNED_PRIOR,
    hierarchical: Role.HIERARCHICAL,
    weighted: Role.WEIGHTED,
}

POLICIES = {
    "constant": constant_normalizer,
    "negative_phase": Partial(negative_phase, kernel=MALA),
    "fresh": Partial(negative_phase, kernel=MALA, persistent=False),
    "surrogate": Partial(surrogate_normalizer, pools=POOLS),
    "exact": exact_normalizer,
    "estimated": Partial(estimated_normalizer, kernel=MALA),
}

# What each policy says to the sites that it would get wrong. Every other pairing is right.
WRONG = {
    ("constant", learned): r"numpyro.param \{w\}.*negative_phase with SVI",
    ("constant", doubly_intractable): r"latent site\(s\) \{s\}.*infer.Exchange",
    ("constant", learned_prior): r"numpyro.param \{w\}.*fit_latent_prior",
    ("constant", hierarchical): r"latent site\(s\) \{s\}.*inside numpyro.infer.gibbs",
    ("constant", weighted): "how often its log Z counts",
    ("negative_phase", doubly_intractable): r"latent site\(s\) \{s\}.*persistent=False",
    ("negative_phase", hierarchical): r"latent site\(s\) \{s\}.*persistent=False",
    ("negative_phase", weighted): "its value is needed, not only its gradient",
    ("fresh", weighted): "its value is needed, not only its gradient",
    ("surrogate", learned): r"numpyro.param \{w\}.*away from any fixed pool",
    ("surrogate", learned_prior): r"numpyro.param \{w\}.*away from any fixed pool",
    ("surrogate", weighted): "knows log Z up to a constant only",
}


@pytest.mark.parametrize("model", ROLES)
def test_every_role_is_recognised_and_explained(model):
    report = ebm.check_model(model)
    site = report.sites["x"]
    assert site.role is ROLES[model]
    assert f"site 'x': {site.role.value}" in str(report)
    assert site.what_to_do in str(report)
    assert site.latents == ({"s"} if model in (doubly_intractable, hierarchical) else frozenset())
    assert site.params == ({"w"} if model in (learned, learned_prior) else frozenset())


@pytest.mark.parametrize("model", ROLES)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_pairing_of_role_and_policy(policy, model):
    wrapped = POLICIES[policy](model)
    if (policy, model) in WRONG:
        with pytest.raises(ebm.UnknownNormalizerError, match="site 'x'.*" + WRONG[policy, model]):
            ebm.check_model(wrapped)
        with pytest.raises(ebm.UnknownNormalizerError, match="site 'x'.*" + WRONG[policy, model]):
            handlers.seed(wrapped, 0)()
    else:
        report = ebm.check_model(wrapped)
        assert report.policy == type(wrapped).__name__
        if model is not normalised:
            assert f"done: {report.policy}" in str(report)


def test_lift_turns_a_parameter_into_a_latent():
    assert ebm.check_model(handlers.lift(learned, {"w": dist.LogNormal()})).sites["x"].role is Role.DOUBLY_INTRACTABLE


def test_condition_turns_a_latent_into_data():
    model = handlers.condition(doubly_intractable, {"s": jnp.float32(1.0)})
    assert ebm.check_model(model).sites["x"].role is Role.CONSTANT


def test_an_ebm_in_numpyro_scan_is_refused():
    def model():
        scan(lambda carry, _: (carry, numpyro.sample("x", tilted(1.0))), 0.0, None, length=3)

    with pytest.raises(ebm.UnknownNormalizerError, match=r"site 'x'.*control_flow.scan"):
        ebm.check_model(model)


def test_discrete_sites_name_what_moves_them():
    def model():
        bits = dist.Bernoulli(0.5).expand([3]).to_event(1)
        w = numpyro.param("w", 1.0)
        numpyro.sample("x", ebm.EBM(lambda s: w * jnp.sum(s), bits))

    notes = " ".join(ebm.check_model(model).sites["x"].notes)
    assert "NUTS and the other gradient kernels cannot move it" in notes
    assert "exact_normalizer" in notes


def test_rows_and_factors_are_pointed_out():
    def model():
        numpyro.sample("x", ebm.EBM(lambda x, c: c * x**2, BASE, condition=jnp.ones(3)), obs=jnp.zeros(3))
        numpyro.factor("energy", -1.0)

    report = ebm.check_model(model)
    assert "one normaliser per row" in report.sites["x"].notes[0]
    assert report.factors == ("energy",)
    assert "factor 'energy': an unnormalised term" in str(report)


def test_a_model_without_ebms():
    report = ebm.check_model(lambda: numpyro.sample("x", BASE))
    assert str(report) == "no EBM sites"
