"""The recipe: both players move, nothing else does, the guard stops a run, and the result is a NumPyro model."""

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
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.recipes import GeneratorModel, dual_mcmc_teaching, gaussian_generator, generator_of

MODEL = gaussian_generator(eqx.nn.Linear(3, 2, key=jax.random.key(1)), 3, 0.3)
DATA = 1.0 + 0.5 * jax.random.normal(jax.random.key(0), (64, 2))
OPTIONS = {"model": MODEL, "num_event_steps": 3, "num_latent_steps": 2, "report_every": 5, "progress_bar": False}


@pytest.mark.slow
def test_networks_move_and_step_sizes_do_not(key):
    state, history = dual_mcmc_teaching(key, DATA, num_updates=5, **OPTIONS)
    tunables = state.sampler.kernel.keywords
    for name, value in {"step_size": 0.125, "noise_scale": 0.02, "max_gradient": 1.0}.items():
        assert tunables[name] == np.float32(value), name
    np.testing.assert_allclose(history["temperature"], 0.0016, rtol=1e-5)
    pair = generator_of(state)
    start = GeneratorModel(MODEL, DATA[0], key=jax.random.split(key, 3)[1])
    for player in ("parameters", "inference"):
        before, after = (jax.tree.leaves(eqx.filter(getattr(p, player), eqx.is_inexact_array)) for p in (start, pair))
        assert all(bool((a != b).any()) for a, b in zip(before, after, strict=True)), player
    draws = Predictive(pair.model, params=pair.params, num_samples=5)(key)
    assert draws["x"].shape == (5, 2)


@pytest.mark.slow
def test_a_gap_beyond_its_limit_ends_the_run_with_the_last_good_state(key):
    with pytest.raises(TrainingFailure) as failure:
        dual_mcmc_teaching(key, DATA, num_updates=50, max_gap=1e-6, **OPTIONS)
    assert "max_gap" in failure.value.__notes__[0]
    assert failure.value.state.step == failure.value.step
    assert bool(jnp.isfinite(failure.value.state.potential(DATA[0])))


@pytest.mark.slow
def test_calibrated_chains_take_the_place_of_the_unadjusted_ones(key):
    kernels = {"event_kernel": ebm.kernels.mala(0.01), "latent_kernel": ebm.kernels.hmc(0.05, 3)}
    state, history = dual_mcmc_teaching(key, DATA, num_updates=5, regenerate=True, **kernels, **OPTIONS)
    assert history["acceptance_rate"].min() > 0.5
    assert history["sampler_latent_acceptance_rate"].min() > 0.5
    assert "temperature" not in history
    assert int(state.step) == 5


@pytest.mark.slow
def test_a_model_with_a_positive_scale_keeps_it_positive_and_draws_from_its_own_prior(key):
    def model(x=None):
        weight = numpyro.param("weight", jnp.ones((2, 3)))
        scale = numpyro.param("scale", jnp.asarray(0.5), constraint=dist.constraints.positive)
        z = numpyro.sample("z", dist.Normal(2.0, 0.1).expand([3]).to_event(1))
        numpyro.sample("x", dist.Normal(weight @ z, scale).to_event(1), obs=x)

    options = {**OPTIONS, "model": model}
    state, _ = dual_mcmc_teaching(key, DATA, num_updates=5, **options)
    pair = generator_of(state)
    assert float(pair.params["scale"]) > 0.0
    assert float(pair.params["scale"]) != 0.5
    assert abs(float(state.sampler.auxiliary["latent"].mean()) - 2.0) < 0.05


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_updates": 0}, "num_updates"),
        (
            {"num_updates": 1, "noise": dist.Normal(0.0, 1.0), "event_kernel": ebm.kernels.mala(0.1)},
            "together with noise",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(key, options, text):
    with pytest.raises(ValueError, match=text):
        dual_mcmc_teaching(key, DATA, model=MODEL, **options)


def test_each_player_has_its_own_optimizer_whatever_its_parts_are_called(key):
    class Inference(eqx.Module):
        parameters: eqx.nn.Linear

        def __call__(self, x):
            out = self.parameters(x)
            return out[:3], out[3:]

    network = Inference(eqx.nn.Linear(2, 6, key=jax.random.key(3)))
    still = {"generator_optimizer": optax.sgd(1e-3), "inference_optimizer": optax.set_to_zero()}
    state, _ = dual_mcmc_teaching(key, DATA, inference=network, num_updates=2, **still, **OPTIONS)
    pair = generator_of(state)
    np.testing.assert_array_equal(pair.inference.parameters.weight, network.parameters.weight)
    start = GeneratorModel(MODEL, DATA[0], key=jax.random.split(key, 3)[1])
    moved = zip(jax.tree.leaves(pair.parameters), jax.tree.leaves(start.parameters), strict=True)
    assert any(bool((after != before).any()) for after, before in moved)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_event_steps": 1.5}, TypeError, "num_event_steps"),
        ({"noise": dist.Normal(0.0, 1.0).expand([2]).to_event(1), "num_event_steps": 0}, ValueError, "num_event_steps"),
        ({"max_gap": -1.0}, ValueError, "max_gap"),
        ({"event_kernel": 0.1}, TypeError, "event_kernel"),
        ({"event_kernel": ebm.kernels.short_run(3, dist.Normal(0.0, 1.0), step_size=0.1)}, TypeError, "event_kernel"),
        ({"latent_kernel": 0.1}, TypeError, "latent_kernel"),
        ({"latent_kernel": ebm.kernels.short_run(1, dist.Normal(0.0, 1.0), step_size=0.1)}, TypeError, "latent_kernel"),
        ({"generator_weights": (1.0,), "inference_weights": (0.0, 1.0, 0.1)}, ValueError, "generator_weights"),
        ({"inference_weights": 1.0}, ValueError, "inference_weights"),
        ({"generator_weights": (jnp.ones(2), 1.0)}, ValueError, "generator_weights"),
        ({"inference": lambda x: x}, ValueError, "inference"),
    ],
)
def test_what_would_teach_something_else_is_refused(key, change, error, message):
    with pytest.raises(error, match=message):
        dual_mcmc_teaching(key, DATA, num_updates=1, **{**OPTIONS, **change})
