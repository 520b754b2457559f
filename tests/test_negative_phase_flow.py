"""A sampler that learns inside NumPyro's SVI: its global moves keep mode weights right, its proposal follows the chains."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.tree_util import Partial
from numpyro.infer import SVI, Trace_ELBO

import ebm_ppl as ebm
from ebm_ppl import flows, handlers, kernels, objectives
from tests.test_adaptive_flow import line_data, model_weight

LINE = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), dist.Normal(jnp.array([-4.0, 4.0]), jnp.ones(2)))
LOCAL = kernels.mala(0.3)
PLAYER = {
    "sampler_objective": objectives.chain_likelihood,
    "sampler_optimizer": flows.proposal_only(optax.adam(0.02)),
}


def energy(theta, x):
    return -theta * jax.nn.sigmoid(x / 0.2)


def model(data):
    theta = numpyro.param("theta", jnp.zeros(()))
    with numpyro.plate("rows", len(data)):
        numpyro.sample("x", ebm.EBM(Partial(energy, theta), LINE), obs=data)


def train(key, data, kernel, **options):
    policy = handlers.negative_phase(model, kernel=kernel, num_chains=512, **options)
    svi = SVI(policy, lambda data: None, optax.adam(optax.cosine_decay_schedule(0.05, 400)), Trace_ELBO())
    result = svi.run(key, 400, data, progress_bar=False)
    return model_weight(float(result.params["theta"])), result.state.mutable_state["x$chains"]


def test_svi_learns_the_mode_weight_with_a_proposal_that_follows_the_chains(key):
    data, weight = line_data(key)
    start = dist.Normal(0.0, 8.0)
    kernel = kernels.flow_assisted(start, LOCAL, num_local=4, num_proposals=8)
    found, bank = train(key, data, kernel, num_steps=1, **PLAYER)
    assert abs(found - weight) <= 0.03
    chains, tunables = bank["sampler"].position, bank["sampler"].kernel.keywords
    proposal = tunables["proposal"]
    # The best normal proposal has the mean and the deviation of the chains.
    assert abs(float(proposal.loc) - float(chains.mean())) < 0.6
    assert abs(float(proposal.scale) - float(chains.std())) < 0.5
    assert float(tunables["step_size"]) == pytest.approx(0.3, abs=0.0, rel=1e-6)
    assert bool(jnp.isfinite(bank["sampler_loss"]))
    assert float(bank["statistics"]["global_acceptance_rate"]) > 0.2


@pytest.mark.slow
def test_local_moves_run_away_in_the_same_model(key):
    data, weight = line_data(key)
    found, _ = train(key, data, LOCAL, num_steps=5)
    assert abs(found - weight) >= 0.2


KERNEL = kernels.independence(dist.Normal(0.0, 5.0))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sampler_objective": objectives.chain_likelihood}, ValueError, "sampler_optimizer: got None"),
        ({"sampler_optimizer": PLAYER["sampler_optimizer"]}, TypeError, "sampler_objective: got NoneType"),
        ({**PLAYER, "sampler_optimizer": 1e-3}, TypeError, "sampler_optimizer: got float"),
        ({**PLAYER, "persistent": False}, ValueError, "persistent=False"),
        ({**PLAYER, "kernel": kernels.gibbs()}, ValueError, "nothing to train|no floating arrays to train"),
    ],
)
def test_pairs_that_cannot_learn_are_refused(options, error, text):
    with pytest.raises(error, match=text):
        handlers.negative_phase(model, **{"kernel": KERNEL, "num_chains": 8, "num_steps": 1, **options})


def test_a_proposal_is_needed_to_follow_the_chains(key):
    with pytest.raises(ValueError, match="expected a 'proposal' to refit"):
        train(key, jnp.ones(8), LOCAL, num_steps=1, **{**PLAYER, "sampler_optimizer": optax.sgd(0.1)})
    with pytest.raises(ValueError, match="proposal_only with a kernel that has no proposal"):
        train(key, jnp.ones(8), LOCAL, num_steps=1, **PLAYER)


def test_rows_with_laws_of_their_own_have_no_common_proposal(key):
    def conditional(covariate, data):
        theta = numpyro.param("theta", jnp.zeros(()))

        def of_row(c, x):
            return -theta * c * jax.nn.sigmoid(x)

        with numpyro.plate("rows", len(data)):
            numpyro.sample("x", ebm.EBM(of_row, dist.Normal(0.0, 1.0), condition=covariate), obs=data)

    policy = handlers.negative_phase(conditional, kernel=KERNEL, num_chains=8, num_steps=1, **PLAYER)
    svi = SVI(policy, lambda covariate, data: None, optax.adam(0.1), Trace_ELBO())
    with pytest.raises(ebm.UnknownNormalizerError, match="one proposal cannot follow them all"):
        svi.init(key, jnp.ones(4), jnp.ones(4))
