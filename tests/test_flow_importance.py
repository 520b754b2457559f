"""log Z by importance sampling from a fitted density, and the k-hat that says whether to believe it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats

import ebm_ppl as ebm
from ebm_ppl import flows, kernels, targets
from ebm_ppl.normalizer import flow_importance, pareto_khat
from ebm_ppl.testing import t_test_chain_means


@pytest.mark.parametrize("shape", [0.1, 0.5, 0.8, 1.5])
def test_khat_is_that_of_arviz(shape):
    uniform = np.random.default_rng(0).uniform(size=(4000, 2))
    log_weight = (-shape * np.log(uniform)).astype(np.float32)
    ours = pareto_khat(jnp.asarray(log_weight))
    theirs = [array_stats.psislw(-column)[1] for column in log_weight.T]  # which takes minus the log weights
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_khat_without_a_tail():
    assert float(pareto_khat(jnp.zeros(100))) == -np.inf
    assert np.isnan(float(pareto_khat(jnp.zeros(20))))
    assert np.isnan(float(pareto_khat(jnp.zeros(100).at[3].set(jnp.nan))))
    assert float(pareto_khat(jnp.where(jnp.arange(100) < 50, -jnp.inf, 0.0))) == -np.inf


def site(target):
    return ebm.EBM(target.potential, target.base)


def test_the_estimate_of_z_is_unbiased_on_a_constrained_support(key):
    target = targets.get("gamma")
    proposal = dist.Normal(0.3, 0.9)  # of log x
    values = jax.vmap(lambda key: flow_importance(key, site(target), proposal, num_particles=200).value)(
        jax.random.split(key, 400)
    )
    ratio = np.exp(np.asarray(values, np.float64) - target.log_normalizer)
    t_test_chain_means(ratio, 1.0, name="Z / exact").raise_if_failed()
    without_jacobian = ratio * 1.2
    assert not t_test_chain_means(without_jacobian, 1.0, name="a fault").passed


def test_light_tails_are_unreliable(key):
    gaussian = ebm.EBM(lambda x: 0.5 * x**2, dist.ImproperUniform(dist.constraints.real, (), ()))
    light = flow_importance(key, gaussian, dist.Normal(0.0, 0.35))
    assert float(light.pareto_khat) > 0.7
    assert not bool(light.reliable)
    wide = flow_importance(key, gaussian, dist.Normal(0.0, 1.2))
    assert float(wide.value) == pytest.approx(0.5 * np.log(2 * np.pi), abs=4 * float(wide.standard_error))
    assert bool(wide.reliable)


def test_rows_have_their_own_estimates(key):
    rows = ebm.EBM(lambda x, c: 0.5 * (x - c) ** 2, dist.Normal(0.0, 1.0), condition=jnp.array([0.0, 1.0]))
    result = flow_importance(key, rows, dist.Normal(0.3, 1.0))
    exact = -0.5 * np.log(2.0) - np.array([0.0, 1.0]) / 4
    assert result.value.shape == (2,)
    np.testing.assert_array_less(np.abs(np.asarray(result.value) - exact), 5 * np.asarray(result.standard_error))


def test_refusals(key):
    bits = ebm.EBM(lambda x: 1.0 * jnp.sum(x), dist.Bernoulli(0.5).expand([3]).to_event(1))
    with pytest.raises(TypeError, match="discrete support"):
        flow_importance(key, bits, dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"events of shape \(\), expected that of one unconstrained point, \(2,\)"):
        flow_importance(key, site(targets.get("ring")), dist.Normal(0.0, 1.0))
    with pytest.raises(TypeError, match="log_prob"):
        flow_importance(key, site(targets.get("gumbel")), 3.0)
    circle = ebm.EBM(lambda x: -jnp.cos(x), dist.VonMises(0.0, 1.0))
    with pytest.raises(NotImplementedError, match="one to one"):
        flow_importance(key, circle, dist.Normal(0.0, 2.0))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width"), [("many_well_32", 64), ("funnel", 64), ("grid25", 64)])
def test_a_trained_flow_is_right_or_says_that_it_is_not(key, name, width):
    """The flow is fitted to chains that start at the target's own draws, the best case for it."""
    target = targets.get(name)
    dim = target.event_shape[0]
    flow_key, start_key, run_key, fit_key, key = jax.random.split(key, 5)
    flow = flows.RealNVP(dim, key=flow_key, num_layers=8, width=width, depth=2)
    sampler = ebm.init_sampler(target.sample(start_key, 4000), kernels.mala(0.02))
    sampler, _ = ebm.advance(run_key, target.potential, sampler, 50)
    flow, _ = flows.fit_flow(fit_key, flow, sampler.position, num_updates=3000, batch_size=512)
    results = [flow_importance(jax.random.fold_in(key, i), site(target), flow, num_particles=20_000) for i in range(10)]
    for result in results:
        error = float(result.value) - target.log_normalizer
        print(name, "error", round(error, 3), result)
        assert not bool(result.reliable) or abs(error) <= 3 * float(result.standard_error)
