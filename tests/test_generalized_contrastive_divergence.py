"""The recipe for an energy and a diffusion sampler: what it learns, what it refuses, and where its sampler can be used."""

import sys

import distrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Predictive

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.diagnostics import simulation_summary
from ebm_ppl.diffusion import DiffusionSampler, ValueNetwork, pretrain
from ebm_ppl.handlers import simulate
from ebm_ppl.objectives.regularizers import energy_square
from ebm_ppl.recipes import generalized_contrastive_divergence, sampler_of

GRID = np.linspace(-5.0, 5.0, 401)
SHARE = 0.3


def rows(key, num_rows=8192):
    """Two modes on a line, three tenths of the mass at the left one."""
    side, noise = jax.random.split(key)
    left = jax.random.uniform(side, (num_rows, 1)) < SHARE
    return jnp.where(left, -1.5, 1.5) + 0.4 * jax.random.normal(noise, (num_rows, 1))


def law(potential):
    log_density = -np.asarray(jax.vmap(potential)(jnp.asarray(GRID, jnp.float32)[:, None]), np.float64)
    mass = np.exp(log_density - log_density.max())
    return mass / mass.sum()


TRUTH = SHARE * np.exp(-0.5 * ((GRID + 1.5) / 0.4) ** 2) + (1 - SHARE) * np.exp(-0.5 * ((GRID - 1.5) / 0.4) ** 2)
TRUTH /= TRUTH.sum()


def small(key, **options):
    network = ebm.potentials.MLP(1, key=key, width=32, depth=2, zero_init=True)
    return {"network": network, "progress_bar": False, "report_every": 200, **options}


@pytest.fixture(scope="module")
def trained():
    key = jax.random.key(3)
    state, history = generalized_contrastive_divergence(
        key, rows(key), num_updates=1000, num_pretraining=500, num_sampler_steps=4, **small(key)
    )
    return state, history


def test_the_energy_and_the_sampler_come_to_the_data(trained):
    state, history = trained
    mass = law(state.potential)
    divergence = float(np.sum(TRUTH * (np.log(TRUTH) - np.log(mass))))
    draws = np.asarray(sampler_of(state).sample(jax.random.key(0), 20_000))
    assert divergence < 0.06
    assert abs(mass[GRID < 0].sum() - SHARE) < 0.04
    assert abs((draws < 0).mean() - SHARE) < 0.04
    assert history["sampler_weight_ess"][-100:].mean() > 0.4
    # The free energy is minus log Z and the divergence of trajectories; the energies are within 1 / (2 gamma tau).
    energies = np.asarray(jax.vmap(state.potential)(jnp.asarray(GRID, jnp.float32)[:, None]), np.float64)
    log_z = np.log(np.trapezoid(np.exp(-energies), GRID))
    assert 0.0 < history["sampler_free_energy"][-100:].mean() + log_z < 1.0
    assert abs(history["sampler_log_normalizer"][-100:].mean() - log_z) < 0.1
    visited = jnp.asarray(GRID[np.abs(GRID) < 3.0], jnp.float32)[:, None]
    learned = np.asarray(jax.vmap(state.potential.potential)(visited))
    assert 2.0 < np.abs(learned).max() < 5.5
    assert history["sampler_step_scale"].shape == (1000, 4)
    assert 0.8 < history["evaluation_variance_ratio"][-1] < 1.25


def test_the_sampler_is_an_ordinary_kernel_afterwards(trained):
    """Its weights and its accept step make up for what it gets wrong."""
    state, _ = trained
    mass = law(state.potential)
    share, chains = mass[GRID < 0].sum(), jnp.zeros((4000, 1))
    weighted = ebm.init_sampler(chains, kernels.diffusion(sampler_of(state)))
    weighted, _ = ebm.advance(jax.random.key(1), state.potential, weighted, 1)
    weight = np.asarray(jax.nn.softmax(weighted.log_weight))
    assert abs(weight[np.asarray(weighted.position[:, 0]) < 0].sum() - share) < 0.03
    exact = ebm.init_sampler(chains, kernels.diffusion(sampler_of(state), correction="metropolis"))
    exact, info = ebm.advance(jax.random.key(2), state.potential, exact, 20)
    assert info.acceptance_rate.mean() > 0.4
    assert abs((exact.position < 0).mean() - share) < 0.04


def test_a_site_is_simulated_by_as_many_network_evaluations_as_the_sampler_has_steps(trained):
    state, _ = trained
    sampler, seen = sampler_of(state), []

    def counted(time, event):
        jax.debug.callback(lambda t: seen.append(int(t)), time)
        return network(time, event)

    network = sampler.network
    counting = eqx.tree_at(lambda s: s.network, sampler, jax.tree_util.Partial(counted))

    def model():
        x = numpyro.sample("x", ebm.EBM(state.potential.potential, state.potential.base.value))
        numpyro.sample("y", dist.Normal(x[0], 0.1))

    def draws(kernel, num_samples, **options):
        return Predictive(simulate(model, kernel=kernel, **options), num_samples=num_samples)(jax.random.key(4))

    draws(kernels.raw_diffusion(counting), 1, num_steps=1)
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2, 3]
    found = draws(kernels.raw_diffusion(sampler), 4000, num_steps=1)
    assert set(found) == {"x", "x$acceptance_rate", "y"}
    assert abs((found["x"] < 0).mean() - SHARE) < 0.05
    summary = simulation_summary(found)["x"]
    assert np.isnan(summary.drift)
    assert not summary.arrived  # nothing was looked at
    exact = draws(kernels.diffusion(sampler, correction="metropolis"), 500, num_steps=10)
    assert simulation_summary(exact)["x"].arrived
    with pytest.raises(ValueError, match="no weights"):
        draws(kernels.diffusion(sampler), 10, num_steps=2)
    with pytest.raises(ValueError, match="num_steps"):
        simulate(model, kernel=kernels.mala(0.1), num_steps=1)


def test_a_sampler_of_ones_own_is_improved(key):
    """Pretrained with too few updates; the energy it is improved by never sees where it began."""
    data = rows(key)
    sampler = DiffusionSampler(1, num_steps=3, key=key, width=32, depth=2, scale=1.5)
    sampler, _ = pretrain(key, sampler, data, optax.adam(2e-3), 100)
    state, _ = generalized_contrastive_divergence(key, data, num_updates=800, sampler=sampler, **small(key))

    def distance(sampler):
        draws = np.sort(np.asarray(sampler.sample(jax.random.fold_in(key, 1), 8192))[:, 0])
        return np.abs(draws - np.sort(np.asarray(data)[:, 0])).mean()

    before, after = distance(sampler), distance(sampler_of(state))
    print(before, after)
    assert sampler_of(state).num_steps == 3
    assert after < 0.6 * before


@pytest.mark.slow
def test_the_policy_gradient_of_the_baseline_learns_too(key):
    state, history = generalized_contrastive_divergence(
        key, rows(key), num_updates=1500, num_pretraining=500, gradient="reinforce", **small(key)
    )
    assert history["sampler_weight_ess"][-100:].mean() > 0.3
    assert abs(law(state.potential)[GRID < 0].sum() - SHARE) < 0.05


def test_without_entropy_the_sampler_collapses_and_says_so(key):
    with pytest.warns(RuntimeWarning, match="collapsed onto few events"):
        _, history = generalized_contrastive_divergence(
            key, rows(key), num_updates=600, num_pretraining=100, temperature=1.0, entropy_weight=0.0,
            velocity_weight=0.0, policy_optimizer=optax.adam(3e-3), step_optimizer=optax.adam(0.03), **small(key),
        )  # fmt: skip
    assert history["evaluation_variance_ratio"].min() < 0.1
    assert history["sampler_weight_ess"][-100:].mean() < 0.2


def test_the_penalty_is_of_what_is_learned():
    """Not of the base, which no training could lower."""
    base = dist.Normal(0.0, 1.0)
    batch = jnp.array([-1.0, 2.0])
    square = energy_square(ebm.potentials.tilt(lambda x: 0.5 * x, base), batch, None)
    np.testing.assert_allclose(square, 0.25 * np.mean(np.square(batch)), rtol=1e-6)
    tilted = ebm.potentials.tilt(lambda x: 0.5 * x, base)
    same = [
        ebm.potentials.temper(tilted, 1.0),
        ebm.potentials.with_log_normalizer(tilted, 0.0),
        ebm.potentials.add(tilted),
        ebm.potentials.tilt(tilted, base),
    ]
    for potential in same:
        np.testing.assert_allclose(energy_square(potential, batch, None), square, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"batch_size": 512}, ValueError, "batch_size: got 512"),
        ({"entropy_weight": -1.0}, ValueError, "entropy_weight"),
        ({"velocity_weight": jnp.ones(3)}, ValueError, "velocity_weight: got shape"),
        ({"policy_optimizer": "adam"}, TypeError, "policy: got str"),
        ({"optimizer": "adam"}, TypeError, "optimizer: got str"),
        ({"evaluate": "x"}, TypeError, "evaluate: got str"),
        ({"network": 3}, TypeError, "network: got int"),
        ({"base": 3}, TypeError, "base: got int"),
        ({"base": dist.Normal(jnp.zeros(2), jnp.ones(2)).to_event(1)}, ValueError, "base: got one of events"),
        ({"value": lambda t: 0.0}, ValueError, "value: could not be evaluated"),
        ({"value": lambda t, x: x}, ValueError, "value: returned shape"),
        ({"value": ValueNetwork(1, 3, key=jax.random.key(0))}, ValueError, "value: got one for 3 steps"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"energy_weight": -1.0}, ValueError, "energy_weight"),
        ({"gradient": "ppo"}, ValueError, "gradient: got 'ppo'"),
        ({"velocity_rate": 1.5}, ValueError, "rate: got 1.5"),
        ({"num_pretraining": -1}, ValueError, "num_pretraining"),
        ({"num_sampler_steps": 0}, ValueError, "num_steps"),
        ({"sampler": kernels.mala(0.1)}, TypeError, "sampler: got Partial"),
        ({"sampler": DiffusionSampler(2, num_steps=2, key=jax.random.key(0))}, ValueError, "events"),
        (
            {"sampler": DiffusionSampler(1, num_steps=2, key=jax.random.key(0)), "num_sampler_steps": 3},
            ValueError,
            "num_sampler_steps: got 3",
        ),
        ({"base": dist.Gamma(2.0, 1.0).expand([1]).to_event(1)}, ValueError, "base: got one on"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(key, monkeypatch, options, error, text):
    module = sys.modules["ebm_ppl.recipes.generalized_contrastive_divergence"]
    monkeypatch.setattr(module, "pretrain", lambda *_, **__: pytest.fail("it was pretrained"))
    with pytest.raises(error, match=text):
        generalized_contrastive_divergence(key, rows(key, 256), num_updates=1, **options)


def test_a_state_without_such_a_sampler_is_refused():
    state = ebm.init_train(
        ebm.potentials.MLP(1, key=jax.random.key(0), width=4, depth=1),
        optax.adam(1e-3),
        ebm.init_sampler(jnp.zeros((4, 1)), kernels.mala(0.1)),
    )
    with pytest.raises(ValueError, match="no diffusion sampler"):
        sampler_of(state)


def test_runs_of_one_length_share_what_is_compiled(key):
    traces = []

    def network(parameters, event):
        traces.append(1)
        return jnp.sum(parameters * jnp.tanh(event))

    options = {
        "network": jax.tree_util.Partial(network, jnp.zeros(1)),
        "sampler": DiffusionSampler(1, num_steps=2, key=key, width=4, depth=1),
        "value": ValueNetwork(1, 2, key=key, width=4, depth=1),
        "base": distrax.MultivariateNormalDiag(jnp.zeros(1), jnp.ones(1)),
    }
    counts = []
    for seed in range(2):
        traces.clear()
        generalized_contrastive_divergence(
            jax.random.fold_in(key, seed), rows(key, 64), num_updates=4, report_every=2, progress_bar=False, **options
        )
        counts.append(len(traces))
    assert counts[1] < 0.5 * counts[0]  # the checks before training trace, and nothing else does
