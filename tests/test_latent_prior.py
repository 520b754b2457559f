"""Learning a latent EBM prior by two sets of chains, against the exact estimates of the reference problem."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl.infer import fit_latent_prior
from ebm_ppl.infer.latent_rows import find_latents
from ebm_ppl.testing import t_test_chain_means

MALA = ebm.kernels.mala(step_size=0.1)


def data():
    rng = np.random.default_rng(2)
    z = 0.6 * rng.normal(size=500) + 0.8
    return jnp.asarray(z + 0.5 * rng.normal(size=500), jnp.float32)


def model(x, subsample_size=None):
    a = numpyro.param("a", 1.5, constraint=constraints.positive)
    b = numpyro.param("b", 1.5)
    with numpyro.plate("rows", len(x), subsample_size=subsample_size) as index:
        z = numpyro.sample("z", ebm.EBM(lambda z: 0.5 * a * z**2 - b * z, dist.Normal(0.0, 1.0)))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x[index])


def exact():
    """x ~ N(b / (1 + a), 1 / (1 + a) + 1 / 4): (1.723, 2.103)."""
    x = np.asarray(data(), np.float64)
    a = 1.0 / (x.var() - 0.25) - 1.0
    return {"a": a, "b": x.mean() * (1.0 + a)}


def fit(key, model=model, args=(), *, num_steps, **options):
    rate = optax.exponential_decay(0.05, 200, 0.5, end_value=5e-4)
    return fit_latent_prior(
        key,
        model,
        *(args or (data(),)),
        optimizer=optax.adam(rate),
        posterior_kernel=MALA,
        prior_kernel=MALA,
        num_steps=num_steps,
        progress_bar=False,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("subsample_size", [None, 100])
def test_the_exact_estimates_are_recovered(subsample_size):
    """A t-test over independent runs, with all rows and with minibatches whose chains are found by the plate's indices."""
    steps = 1500 if subsample_size is None else 3000
    runs = [
        fit(jax.random.key(i), partial(model, subsample_size=subsample_size), num_steps=steps)[0].params
        for i in range(12)
    ]
    for name, value in exact().items():
        found = np.array([float(params[name]) for params in runs])
        t_test_chain_means(found, value, name=name).raise_if_failed()
        assert abs(found.mean() - value) < 0.05


def test_one_run_comes_close(key):
    state, history = fit(key, num_steps=700)
    for name, value in exact().items():
        assert float(state.params[name]) == pytest.approx(value, abs=0.25)
    assert int(state.step) == 700
    assert history["grad_norm"].shape == (700,)
    for part in ("posterior_acceptance", "prior_acceptance"):
        assert abs(float(history[part][-200:].mean()) - 0.6) < 0.05
    # The posterior chains follow the posterior: N((b + 4 x) / (1 + a + 4), 1 / (1 + a + 4)), row by row.
    a, b = float(state.params["a"]), float(state.params["b"])
    z = np.asarray(state.posterior["z"])[0]
    standardised = (z - (b + 4 * np.asarray(data())) / (5 + a)) * np.sqrt(5 + a)
    assert abs(standardised.mean()) < 0.3
    assert 0.7 < standardised.std() < 1.3
    # The prior chains follow the prior, not the posterior.
    prior = state.prior["z$chains"]["sampler"].position
    assert float(prior.mean()) == pytest.approx(b / (1 + a), abs=0.25)


@pytest.mark.slow
def test_minibatches_leave_the_chains_of_other_rows_alone(key):
    small = partial(model, subsample_size=50)
    first, _ = fit(key, small, num_steps=1)
    second, _ = fit(key, small, num_steps=1, state=first)
    moved = np.asarray(first.posterior["z"] != second.posterior["z"])[0]
    assert moved.shape == (500,)
    assert 1 <= moved.sum() <= 50


@pytest.mark.slow
def test_a_run_in_two_parts_is_the_same_run(key):
    whole, _ = fit(key, num_steps=20)
    half, _ = fit(key, num_steps=10)
    rest, _ = fit(key, num_steps=10, state=half, report_every=3)
    assert float(whole.params["a"]) == float(rest.params["a"])
    np.testing.assert_array_equal(whole.posterior["z"], rest.posterior["z"])


@pytest.mark.slow
def test_several_posterior_chains_and_a_vector_generator(key):
    """A two-dimensional latent, a linear generator that is learned, and four chains per row."""

    def wide(x):
        b = numpyro.param("b", jnp.zeros(2))
        w = numpyro.param("w", 0.1 * jnp.ones((2, 3)))
        with numpyro.plate("rows", len(x)):
            base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
            z = numpyro.sample("z", ebm.EBM(lambda z: -jnp.dot(b, z), base))
            numpyro.sample("x", dist.Normal(z @ w, 0.5).to_event(1), obs=x)

    x = jax.random.normal(key, (40, 3))
    state, history = fit(key, wide, (x,), num_steps=30, num_posterior_chains=4)
    assert state.posterior["z"].shape == (4, 40, 2)
    assert np.isfinite(history["grad_norm"]).all()
    assert not np.array_equal(state.params["w"], 0.1 * np.ones((2, 3)))


def test_latents_of_a_minibatch_go_where_they_came_from():
    """Gather and scatter along the plate's axis, for events of any rank."""

    def nested():
        with numpyro.plate("outer", 3), numpyro.plate("rows", 10, subsample_size=4):
            numpyro.sample("z", dist.Dirichlet(jnp.ones(3)))

    rows = find_latents(nested, (), {}, jax.random.key(0))
    latent, index = rows.latents["z"], np.asarray(rows.plates["rows"])
    bank = {"z": jnp.arange(2.0 * np.prod(latent.shape)).reshape(2, *latent.shape)}
    chosen = rows.gather(bank, rows.plates)
    assert chosen["z"].ndim == bank["z"].ndim
    assert chosen["z"].size == bank["z"].size * 4 // 10
    back = rows.scatter(bank, {"z": -chosen["z"]}, rows.plates)["z"]
    axis, before, after = latent.axes["rows"], np.asarray(bank["z"]), np.asarray(back)
    np.testing.assert_array_equal(np.take(after, index, axis=axis), -np.take(before, index, axis=axis))
    others = np.setdiff1d(np.arange(10), index)
    np.testing.assert_array_equal(np.take(after, others, axis=axis), np.take(before, others, axis=axis))


def test_refusals(key):
    def observed(x):
        w = numpyro.param("w", 1.0)
        numpyro.sample("x", ebm.EBM(lambda x: w * x**2, dist.Normal(0.0, 1.0)).expand([500]), obs=x)

    with pytest.raises(ebm.UnknownNormalizerError, match=r"'x': learned, expected a latent one.*check_model"):
        fit(key, observed, num_steps=1)

    def outside(x):
        a = numpyro.param("a", 1.0)
        scale = numpyro.sample("scale", dist.LogNormal())
        with numpyro.plate("rows", 500, subsample_size=10) as index:
            z = numpyro.sample("z", ebm.EBM(lambda z: a * z**2, dist.Normal(0.0, 1.0)))
            numpyro.sample("x", dist.Normal(z, scale), obs=x[index])

    with pytest.raises(ValueError, match=r"site 'scale': got a latent outside the subsampling plate"):
        fit(key, outside, num_steps=1)

    def discrete(x):
        a = numpyro.param("a", 1.0)
        z = numpyro.sample("z", ebm.EBM(lambda z: a * z**2, dist.Normal(0.0, 1.0)))
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        numpyro.sample("x", dist.Normal(z + k, 1.0).expand([500]), obs=x)

    with pytest.raises(ValueError, match="site 'k': got a discrete latent"):
        fit(key, discrete, num_steps=1)
    with pytest.raises(ValueError, match="num_steps: got 0"):
        fit(key, num_steps=0)


def test_a_failure_is_reported_with_its_update_and_the_last_good_state(key):
    def exploding(x):
        a = numpyro.param("a", 1.0)
        z = numpyro.sample("z", ebm.EBM(lambda z: a * z**2, dist.Normal(0.0, 1.0)).expand([500]).to_event(1))
        numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    options = {
        "posterior_kernel": MALA,
        "prior_kernel": MALA,
        "progress_bar": False,
        "num_steps": 30,
        "report_every": 10,
    }
    with pytest.raises(
        ebm.TrainingFailure, match=r"update 0: the parameters or their gradient are not finite"
    ) as failure:
        fit_latent_prior(key, exploding, data(), optimizer=optax.sgd(float("inf")), **options)
    assert float(failure.value.state.params["a"]) == 1.0


def test_the_model_is_left_as_it_was():
    """No handler of the fit leaks into the caller's stack."""
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        fit(jax.random.key(0), num_steps=1)
    assert not trace


def test_networks_are_parameters_of_many_arrays(key):
    """What ``eqx_module`` declares is one parameter that holds a network, with places for what is no array."""
    energy = ebm.potentials.MLP((), key=jax.random.key(1), width=4, depth=1)
    decoder = eqx.nn.MLP("scalar", "scalar", width_size=4, depth=1, key=jax.random.key(2))

    def networks(x):
        decode = eqx_module("decoder", decoder)
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", ebm.EBM(eqx_module("energy", energy), dist.Normal(0.0, 1.0)))
            numpyro.sample("x", dist.Normal(jax.vmap(decode)(z), 0.5), obs=x)

    state, history = fit(key, networks, (data()[:20],), num_steps=3, num_prior_chains=8)
    assert np.isfinite(history["grad_norm"]).all()
    for name, start in {"energy$params": energy, "decoder$params": decoder}.items():
        before, after = (jax.tree.leaves(eqx.filter(x, eqx.is_inexact_array)) for x in (start, state.params[name]))
        assert [leaf.shape for leaf in before] == [leaf.shape for leaf in after]
        assert any(not np.array_equal(x, y) for x, y in zip(before, after, strict=True))
