"""``negative_phase``: maximum likelihood inside NumPyro's SVI, against the exact estimates of the reference problems."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
import scipy.stats
from numpyro import handlers
from numpyro.contrib.module import eqx_module
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import compute_log_probs, log_density

import ebm_ppl as ebm
from ebm_ppl.chains import chain_values
from ebm_ppl.handlers import constant_normalizer, gradient_surrogate, negative_phase, simulate
from ebm_ppl.testing import cdf_test, t_test_chain_means

MALA = ebm.kernels.mala(step_size=0.2)


def flat(event_shape=()):
    return dist.ImproperUniform(constraints.real, (), event_shape)


def decaying(rate, half_life=100):
    """Adam whose last iterates have little noise left."""
    return optax.adam(optax.exponential_decay(rate, half_life, 0.5, end_value=rate / 100))


def fits(model, args, *, num_fits, num_steps, rate=0.05, half_life=100, guide=None, **options):
    """Parameters of independent SVI runs, each with its own chains: replicates for a t-test."""
    trained = negative_phase(model, **{"kernel": MALA, "num_steps": 5, **options})
    svi = SVI(trained, guide or (lambda *args: None), decaying(rate, half_life), Trace_ELBO())
    run = jax.jit(jax.vmap(lambda key: svi.run(key, num_steps, *args, progress_bar=False).params))
    return run(jax.random.split(jax.random.key(7), num_fits))


def agree(found, **exact):
    for name, value in exact.items():
        t_test_chain_means(found[name], value, name=name).raise_if_failed()


# --- Learned: the Gaussian reference problem -----------------------------------------------------------------------

GAUSSIAN = jnp.asarray(np.random.default_rng(0).normal(1.0, 0.5, (200, 2)), jnp.float32)


def gaussian(data):
    log_precision, mean = numpyro.param("lp", 0.5), numpyro.param("mu", jnp.ones(2))
    with numpyro.plate("rows", len(data)):
        energy = lambda x: 0.5 * jnp.exp(log_precision) * jnp.sum((x - mean) ** 2)
        numpyro.sample("x", ebm.EBM(energy, flat((2,))), obs=data)


def test_maximum_likelihood_of_the_gaussian_reference_problem():
    """Log precision 1.3999 and mean (.951, 1.012); without log Z the precision runs to -6 behind a falling loss."""
    data = np.asarray(GAUSSIAN, np.float64)
    mean = data.mean(axis=0)
    log_precision = -np.log(((data - mean) ** 2).mean())
    assert log_precision == pytest.approx(1.3999, abs=1e-4)
    found = fits(gaussian, (GAUSSIAN,), num_fits=64, num_steps=800, num_chains=64)
    agree({"lp": found["lp"], "mu0": found["mu"][:, 0]}, lp=log_precision, mu0=mean[0])
    assert abs(float(found["lp"].mean()) - log_precision) < 0.01


def test_the_naive_route_is_refused():
    with pytest.raises(ebm.UnknownNormalizerError, match=r"negative_phase\(model\)"):
        log_density(handlers.seed(gaussian, 0), (GAUSSIAN,), {}, {})
    svi = SVI(gaussian, lambda data: None, optax.adam(0.1), Trace_ELBO())
    with pytest.raises(ebm.UnknownNormalizerError):
        svi.run(jax.random.key(0), 2, GAUSSIAN, progress_bar=False)
    with pytest.raises(ebm.UnknownNormalizerError, match=r"learned site: handlers\.negative_phase"):
        constant_normalizer(gaussian)(GAUSSIAN)


def subsampled(data):
    log_precision = numpyro.param("lp", 0.5)
    with numpyro.plate("rows", len(data), subsample_size=20) as index:
        energy = lambda x: 0.5 * jnp.exp(log_precision) * jnp.sum((x - 1.0) ** 2)
        numpyro.sample("x", ebm.EBM(energy, flat((2,))), obs=data[index])


def masked(data):
    log_precision = numpyro.param("lp", 0.5)
    with numpyro.plate("rows", len(data)), handlers.mask(mask=jnp.arange(len(data)) % 2 == 0):
        energy = lambda x: 0.5 * jnp.exp(log_precision) * jnp.sum((x - 1.0) ** 2)
        numpyro.sample("x", ebm.EBM(energy, flat((2,))), obs=data)


def scaled(data):
    with handlers.scale(scale=3.0):
        masked(data)


def conditioned():
    log_precision = numpyro.param("lp", 0.5)
    energy = lambda x: 0.5 * jnp.exp(log_precision) * jnp.sum((x - 1.0) ** 2)
    numpyro.sample("x", ebm.EBM(energy, flat((2,))).expand([200]))


def in_events():
    log_precision = numpyro.param("lp", 0.5)
    energy = lambda x: 0.5 * jnp.exp(log_precision) * jnp.sum((x - 1.0) ** 2)
    numpyro.sample("x", ebm.EBM(energy, flat((2,))).expand([200]).to_event(1), obs=GAUSSIAN)


@pytest.mark.parametrize(
    ("model", "args", "rows", "count"),
    [
        (subsampled, (GAUSSIAN,), None, 10.0),
        (masked, (GAUSSIAN,), slice(0, None, 2), 1.0),
        (scaled, (GAUSSIAN,), slice(0, None, 2), 3.0),
        (handlers.condition(conditioned, {"x": GAUSSIAN}), (), slice(None), 1.0),
        (handlers.scope(masked, prefix="p"), (GAUSSIAN,), slice(0, None, 2), 1.0),
        (in_events, (), slice(None), 1.0),
    ],
)
def test_gradient_is_that_of_the_likelihood_with_these_negatives(model, args, rows, count):
    """``-sum_i dU(x_i) + n mean_j dU(negative_j)``, each row counted as its plate, mask and scale say: exact algebra."""
    trained = negative_phase(model, kernel=MALA, num_chains=50, num_steps=3)
    name = "p/lp" if "scope" in type(model).__name__ else "lp"

    def density(lp):
        log_probs, trace = compute_log_probs(handlers.seed(trained, 3), args, {}, {name: lp})
        return sum(log_probs.values()), trace

    gradient, trace = jax.grad(density, has_aux=True)(jnp.float32(0.5))
    (bank,) = [site["value"] for site in trace.values() if site["type"] == "mutable"]
    squares = lambda x: 0.5 * jnp.exp(0.5) * jnp.sum((x - 1.0) ** 2, axis=-1)
    data = GAUSSIAN[trace["rows"]["value"] if rows is None else rows]
    expected = count * (-squares(data).sum() + len(data) * squares(bank["sampler"].position).mean())
    assert float(gradient) == pytest.approx(float(expected), rel=1e-4)
    assert bool(jnp.isnan(density(0.5)[0]))


@pytest.mark.slow
def test_networks_of_numpyro_modules_learn(key):
    """A network tilts N(0, 1) towards data around 1: its samples move there."""
    data = 1.0 + 0.3 * jax.random.normal(key, (100, 1))
    network = eqx.nn.MLP(1, "scalar", 16, 1, activation=jax.nn.softplus, key=jax.random.key(0))

    def model(data):
        net = eqx_module("net", network)
        with numpyro.plate("rows", 100):
            numpyro.sample("x", ebm.EBM(net, dist.Normal(0.0, 1.0).expand([1]).to_event(1)), obs=data)

    trained = negative_phase(model, kernel=MALA, num_chains=200, target_acceptance=0.6)
    svi = SVI(trained, lambda data: None, optax.adam(0.01), Trace_ELBO())
    result = svi.run(jax.random.key(0), 400, data, progress_bar=False)
    chains = result.state.mutable_state["x$chains"]["sampler"].position
    assert abs(float(chains.mean() - data.mean())) < 0.1
    # What was learned simulates, through NumPyro's Predictive.
    simulated = simulate(lambda: model(None), kernel=MALA, num_steps=200)
    draws = Predictive(simulated, params=result.params, num_samples=20)(jax.random.key(1))["x"]
    assert draws.shape == (20, 100, 1)
    assert abs(float(draws.mean() - data.mean())) < 0.1


# --- Conditional: one normaliser per row ---------------------------------------------------------------------------


def conditional_data():
    rng = np.random.default_rng(1)
    c = rng.uniform(-1, 1, 300)
    x = 1.5 * c + rng.normal(size=300) * np.exp(-(0.5 + c) / 2)
    return jnp.asarray(c, jnp.float32), jnp.asarray(x, jnp.float32)


def conditional(c, x, subsample_size=None):
    a, b, w = (numpyro.param(name, value) for name, value in (("a", 0.5), ("b", 0.5), ("w", 1.0)))
    energy = lambda x, c: 0.5 * jnp.exp(a + b * c) * (x - w * c) ** 2
    with numpyro.plate("rows", len(c), subsample_size=subsample_size) as index:
        numpyro.sample("x", ebm.EBM(energy, flat(), condition=c[index]), obs=x[index])


def conditional_mle():
    c, x = (np.asarray(values, np.float64) for values in conditional_data())
    loss = lambda t: np.sum(0.5 * np.exp(t[0] + t[1] * c) * (x - t[2] * c) ** 2 - 0.5 * (t[0] + t[1] * c))
    return dict(zip("abw", scipy.optimize.minimize(loss, [0.5, 0.5, 1.0]).x, strict=True))


@pytest.mark.slow
def test_maximum_likelihood_with_a_normaliser_per_row():
    exact = conditional_mle()
    assert [round(value, 2) for value in exact.values()] == [0.56, 0.95, 1.53]
    found = fits(conditional, conditional_data(), num_fits=32, num_steps=600, num_chains=2)
    agree(found, **exact)
    assert all(abs(float(found[name].mean()) - value) < 0.02 for name, value in exact.items())


@pytest.mark.slow
def test_minibatches_find_their_own_rows_chains():
    """The chains of a minibatch are those of its rows, wherever the plate's indices put them."""
    model = partial(conditional, subsample_size=60)
    found = fits(model, conditional_data(), num_fits=32, num_steps=3000, num_chains=4, rate=0.03)
    agree(found, **conditional_mle())


@pytest.mark.parametrize("what", ["x", "both"])
def test_rows_in_another_order_are_an_error(what):
    """Measured without the check: the estimates run to (18.4, 19.0, 49.3), and nothing is said."""
    c, x = conditional_data()
    order = jnp.roll(jnp.arange(300), 1)
    svi = SVI(
        negative_phase(conditional, kernel=MALA, num_chains=2), lambda *args: None, optax.adam(0.01), Trace_ELBO()
    )
    state = svi.init(jax.random.key(0), c, x)
    update = jax.jit(svi.update)
    state, _ = update(state, c, x)
    update(state, c, x)  # the same rows may come again
    with pytest.raises((RuntimeError, ValueError), match=r"site 'x': rows came back in another order.*numpyro.plate"):
        jax.block_until_ready(update(state, c[order] if what == "both" else c, x[order]))


def test_a_plate_made_outside_the_model_is_refused():
    c, x = conditional_data()
    rows = numpyro.plate("rows", 300)

    def model():
        a = numpyro.param("a", 0.0)
        with rows:
            numpyro.sample("x", ebm.EBM(lambda x, c: jnp.exp(a) * (x - c) ** 2, flat(), condition=c), obs=x)

    with pytest.raises(ebm.UnknownNormalizerError, match="plate 'rows', which was made outside the model"):
        handlers.seed(negative_phase(model, kernel=MALA), 0)()


def test_negatives_of_other_rows_do_not_fit():
    site = ebm.EBM(lambda x, c: c * x**2, dist.Normal(0.0, 1.0), condition=jnp.arange(1.0, 4.0))
    with pytest.raises(ValueError, match=r"negatives: got shape \(5, 4\).*one set of negatives for every row"):
        gradient_surrogate(site, jnp.zeros((5, 4)))


def test_rows_stay_with_their_chains(key):
    """After minibatches, the chains of each row follow that row's law."""
    c = jnp.array([-3.0, 0.0, 3.0, 6.0])

    def model():
        precision = numpyro.param("p", 4.0)
        with numpyro.plate("rows", 4, subsample_size=2) as index:
            energy = lambda x, c: 0.5 * precision * (x - c) ** 2
            numpyro.sample("x", ebm.EBM(energy, flat(), condition=c[index]), obs=c[index] + 0.5)

    svi = SVI(
        negative_phase(model, kernel=MALA, num_chains=500, num_steps=20), lambda: None, optax.sgd(0.0), Trace_ELBO()
    )
    state = svi.run(key, 60, progress_bar=False).state
    position = np.asarray(state.mutable_state["x$chains"]["sampler"].position)
    assert position.shape == (4, 500)
    for row in range(4):
        cdf_test(position[row], scipy.stats.norm(float(c[row]), 0.5).cdf, name=f"row {row}").raise_if_failed()


# --- Latent priors -------------------------------------------------------------------------------------------------


def latent_data():
    rng = np.random.default_rng(2)
    z = 0.6 * rng.normal(size=500) + 0.8
    return jnp.asarray(z + 0.5 * rng.normal(size=500), jnp.float32)


def latent_prior(x):
    a = numpyro.param("a", 1.5, constraint=constraints.positive)
    b = numpyro.param("b", 1.5)
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", ebm.EBM(lambda z: 0.5 * a * z**2 - b * z, dist.Normal(0.0, 1.0)))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def amortised(x):
    m, c, s = (numpyro.param(name, value) for name, value in (("m", 0.5), ("c", 0.5), ("s", -1.0)))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(m + c * x, jnp.exp(s)))


def latent_mle():
    """x ~ N(b / (1 + a), 1 / (1 + a) + 1 / 4)."""
    x = np.asarray(latent_data(), np.float64)
    a = 1.0 / (x.var() - 0.25) - 1.0
    return {"a": a, "b": x.mean() * (1.0 + a)}


@pytest.mark.slow
def test_a_latent_prior_learns_through_svi_with_an_amortised_guide():
    """(1.723, 2.103); with Z dropped, a hits its bound and the loss falls to -195,109."""
    exact = latent_mle()
    assert (exact["a"], exact["b"]) == (pytest.approx(1.723, abs=1e-3), pytest.approx(2.103, abs=1e-3))
    found = fits(latent_prior, (latent_data(),), num_fits=32, num_steps=1500, half_life=200, guide=amortised)
    agree(found, **exact)
    assert all(abs(float(found[name].mean()) - value) < 0.03 for name, value in exact.items())


# --- Doubly intractable by variational inference -------------------------------------------------------------------


def doubly_intractable(y):
    log_precision = numpyro.sample("lp", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", ebm.EBM(lambda y: 0.5 * jnp.exp(log_precision) * jnp.sum(y**2), flat((1,))), obs=y)


PRECISION_DATA = 0.5 * jax.random.normal(jax.random.key(1), (100, 1))


@pytest.mark.slow
def test_fresh_chains_give_the_variational_posterior():
    """The energy depends on a latent that the guide draws anew each time; exact posterior 1.188 +- .141."""
    model = negative_phase(doubly_intractable, kernel=MALA, num_chains=64, num_steps=40, persistent=False)
    svi = SVI(model, AutoNormal(model), decaying(0.05), Trace_ELBO())
    run = jax.jit(jax.vmap(lambda key: svi.run(key, 500, PRECISION_DATA, progress_bar=False).params))
    found = run(jax.random.split(jax.random.key(0), 8))
    assert float(found["lp_auto_loc"].mean()) == pytest.approx(1.188, abs=0.03)
    assert float(found["lp_auto_scale"].mean()) == pytest.approx(0.141, abs=0.02)


def test_persistent_chains_under_latents_are_refused():
    with pytest.raises(ebm.UnknownNormalizerError, match=r"latent site\(s\) \{lp\}.*persistent=False.*Exchange"):
        negative_phase(doubly_intractable, kernel=MALA)(PRECISION_DATA)
    with pytest.raises(ebm.UnknownNormalizerError, match=r"\{lp\}"):
        negative_phase(handlers.lift(gaussian, {"lp": dist.Normal(0.0, 1.0)}), kernel=MALA)(GAUSSIAN)


# --- The value of log Z --------------------------------------------------------------------------------------------


def tilted(data):
    """A tilt of N(0, 1): log Z = w^2 / 2."""
    w = numpyro.param("w", 0.0)
    with numpyro.plate("rows", len(data)):
        numpyro.sample("x", ebm.EBM(lambda x: -w * x, dist.Normal(0.0, 1.0)), obs=data)


TILTED = 0.7 + jnp.linspace(-1.0, 1.0, 50)


def test_without_a_value_the_loss_is_nan_and_the_parameters_are_right():
    svi = SVI(negative_phase(tilted, kernel=MALA), lambda data: None, optax.adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 300, TILTED, progress_bar=False)
    assert bool(jnp.isnan(result.losses).all())
    assert float(result.params["w"]) == pytest.approx(0.7, abs=0.15)


@pytest.mark.parametrize("loss", [RenyiELBO(alpha=0.5, num_particles=2), TraceGraph_ELBO()])
def test_algorithms_that_need_the_value_fail_visibly(loss):
    """Measured with a plausible number in its place: 1.53 and -2.12 for a posterior mean of 1.17."""
    model = negative_phase(doubly_intractable, kernel=MALA, persistent=False)

    def guide(y):
        loc = numpyro.param("loc", 0.0)
        # Not reparametrised, so that TraceGraph_ELBO takes its score-function path.
        numpyro.sample(
            "lp", NotReparametrised(loc, 0.1) if isinstance(loss, TraceGraph_ELBO) else dist.Normal(loc, 0.1)
        )

    result = SVI(model, guide, optax.adam(0.05), loss).run(jax.random.key(0), 3, PRECISION_DATA, progress_bar=False)
    assert bool(jnp.isnan(result.params["loc"]))


class NotReparametrised(dist.Normal):
    """A Normal without pathwise gradients."""

    has_rsample = False


def test_mcmc_is_refused():
    for model in (
        negative_phase(gaussian, kernel=MALA),
        negative_phase(doubly_intractable, kernel=MALA, persistent=False),
    ):
        args = (GAUSSIAN,) if model.fn is gaussian else (PRECISION_DATA,)
        mcmc = MCMC(NUTS(model), num_warmup=2, num_samples=2, progress_bar=False)
        with pytest.raises(ebm.UnknownNormalizerError, match=r"no random key, as inside MCMC.*Exchange"):
            mcmc.run(jax.random.key(0), *args)


def test_tracked_log_normalizer_is_unbiased(key):
    """Along any path of the parameters, E[Z estimate] = Z, here exp(w^2 / 2): a t-test over replicates."""

    def model(w):
        w = numpyro.param("w", jnp.zeros(())) + w
        numpyro.sample("x", ebm.EBM(lambda x: -w * x, dist.Normal(0.0, 1.0)), obs=0.0)

    trained = negative_phase(
        model, kernel=ebm.kernels.mala(step_size=0.3), num_chains=64, num_steps=2, loss_value="tracked"
    )

    def replicate(key):
        def visit(state, w):
            key, banks = state
            key, now = jax.random.split(key)
            log_probs, trace = compute_log_probs(handlers.seed(trained, now), (w,), {}, {"w": 0.0, **banks})
            banks = {name: site["value"] for name, site in trace.items() if site["type"] == "mutable"}
            return (key, banks), dist.Normal(0.0, 1.0).log_prob(0.0) - log_probs["x"]

        first, key = jax.random.split(key)
        trace = handlers.trace(handlers.seed(trained, first)).get_trace(0.0)
        banks = {name: site["value"] for name, site in trace.items() if site["type"] == "mutable"}
        _, log_z = jax.lax.scan(visit, (key, banks), jnp.array([0.2, 0.4, 0.6, 0.8, 0.6, 0.9]))
        return log_z

    log_z = np.asarray(jax.jit(jax.vmap(replicate))(jax.random.split(key, 256)), np.float64)
    for column, w in ((2, 0.6), (5, 0.9)):
        t_test_chain_means(np.exp(log_z[:, column] - w**2 / 2), 1.0, name=f"w = {w}").raise_if_failed()


@pytest.mark.slow
def test_tracked_loss_means_something_and_changes_nothing_else():
    options = {"kernel": ebm.kernels.mala(step_size=0.5), "num_chains": 512, "num_steps": 5}
    results = {}
    for value in ("nan", "tracked"):
        svi = SVI(negative_phase(tilted, loss_value=value, **options), lambda data: None, decaying(0.05), Trace_ELBO())
        results[value] = svi.run(jax.random.key(0), 300, TILTED, progress_bar=False)
    w = results["tracked"].params["w"]
    np.testing.assert_allclose(w, results["nan"].params["w"], atol=0.02)
    exact = -dist.Normal(w, 1.0).log_prob(TILTED).sum()
    assert float(results["tracked"].losses[-1]) == pytest.approx(float(exact), abs=50 * 0.2)
    assert float(results["tracked"].losses[0]) == pytest.approx(
        float(-dist.Normal(0.0, 1.0).log_prob(TILTED).sum()), abs=2.0
    )


def test_tracking_without_an_accept_step_stays_nan():
    options = {"kernel": ebm.kernels.unadjusted_langevin(step_size=0.05), "loss_value": "tracked"}
    svi = SVI(negative_phase(tilted, **options), lambda data: None, optax.adam(0.05), Trace_ELBO())
    assert bool(jnp.isnan(svi.run(jax.random.key(0), 5, TILTED, progress_bar=False).losses).all())


# --- State ---------------------------------------------------------------------------------------------------------


def test_a_run_in_two_parts_is_the_same_run():
    svi = SVI(
        negative_phase(tilted, kernel=MALA, target_acceptance=0.6), lambda data: None, optax.adam(0.05), Trace_ELBO()
    )
    whole = svi.run(jax.random.key(0), 60, TILTED, progress_bar=False)
    half = svi.run(jax.random.key(0), 30, TILTED, progress_bar=False)
    rest = svi.run(jax.random.key(5), 30, TILTED, progress_bar=False, init_state=half.state)
    assert float(whole.params["w"]) == float(rest.params["w"])
    bank = whole.state.mutable_state["x$chains"]
    np.testing.assert_array_equal(bank["sampler"].position, rest.state.mutable_state["x$chains"]["sampler"].position)
    assert abs(float(bank["acceptance_rate"]) - 0.6) < 0.15
    assert int(bank["num_divergent"]) == 0


@pytest.mark.slow
def test_updates_in_a_python_loop_and_with_a_progress_bar():
    svi = SVI(negative_phase(tilted, kernel=MALA), lambda data: None, optax.adam(0.05), Trace_ELBO())
    state = svi.init(jax.random.key(0), TILTED)
    before = np.asarray(state.mutable_state["x$chains"]["sampler"].position)
    for _ in range(3):
        state, _ = jax.jit(svi.update)(state, TILTED)
    assert not np.array_equal(before, state.mutable_state["x$chains"]["sampler"].position)
    assert np.isfinite(float(svi.get_params(state)["w"]))


def test_what_drops_the_chains_is_refused_early():
    svi = SVI(negative_phase(tilted, kernel=MALA), lambda data: None, optax.adam(0.05), Trace_ELBO())
    state = svi.init(jax.random.key(0), TILTED)
    with pytest.raises(ebm.UnknownNormalizerError, match=r"SVI.evaluate does not pass the chains on.*tracked"):
        svi.evaluate(state, TILTED)
    for vectorize in (True, False):
        loss = Trace_ELBO(num_particles=2, vectorize_particles=vectorize)
        svi = SVI(negative_phase(tilted, kernel=MALA), lambda data: None, optax.adam(0.05), loss)
        with pytest.raises(ebm.UnknownNormalizerError, match=r"num_particles=2\) drops the chains.*persistent=False"):
            svi.run(jax.random.key(0), 3, TILTED, progress_bar=False)


def test_stable_updates_that_would_learn_nothing_are_refused():
    svi = SVI(negative_phase(tilted, kernel=MALA), lambda data: None, optax.adam(0.05), Trace_ELBO())
    with pytest.raises(ebm.UnknownNormalizerError, match=r"stable_update rejects every update.*tracked"):
        svi.run(jax.random.key(0), 3, TILTED, progress_bar=False, stable_update=True)


def test_rows_of_a_batch_with_two_axes():
    """Each row's fingerprint is its own, whatever the shape of the batch."""

    def model(data):
        w = numpyro.param("w", 0.0)
        with numpyro.plate("columns", 4, dim=-1), numpyro.plate("rows", 3, dim=-2):
            numpyro.sample("x", ebm.EBM(lambda x: -w * x, dist.Normal(jnp.zeros((3, 4)), 1.0)), obs=data)

    svi = SVI(negative_phase(model, kernel=MALA, num_chains=8), lambda data: None, optax.adam(0.05), Trace_ELBO())
    state = svi.run(jax.random.key(0), 3, jnp.zeros((3, 4)), progress_bar=False).state
    assert state.mutable_state["x$chains"]["sampler"].position.shape == (12, 8)


def test_without_persistence_several_particles_and_evaluation_work():
    model = negative_phase(tilted, kernel=ebm.kernels.mala(step_size=0.5), persistent=False, num_steps=20)
    svi = SVI(model, lambda data: None, optax.adam(0.05), Trace_ELBO(num_particles=2))
    result = svi.run(jax.random.key(0), 200, TILTED, progress_bar=False)
    assert float(result.params["w"]) == pytest.approx(0.7, abs=0.15)
    assert bool(jnp.isnan(svi.evaluate(result.state, TILTED)))


def test_several_sites_have_their_own_chains():
    def model():
        w = numpyro.param("w", 0.5)
        fixed = ebm.EBM(lambda x: x**2, dist.Normal(0.0, 1.0))
        numpyro.sample("fixed", fixed)
        for name, sign in (("up", 1.0), ("down", -1.0)):
            numpyro.sample(name, ebm.EBM(lambda x, sign=sign: -sign * w * x, dist.Normal(0.0, 1.0)), obs=0.1)

    trained = negative_phase(model, kernel=ebm.kernels.mala(step_size=0.5), num_chains=2000, num_steps=30)
    trace = handlers.trace(handlers.seed(handlers.substitute(trained, {"fixed": 0.0}), 0)).get_trace()
    means = {name: float(trace[f"{name}$chains"]["value"]["sampler"].position.mean()) for name in ("up", "down")}
    assert means == {"up": pytest.approx(0.5, abs=0.1), "down": pytest.approx(-0.5, abs=0.1)}
    assert trace["fixed"]["fn"].normalizer_kind == "constant"
    assert trace["up"]["fn"].normalizer_kind == "gradient"


@pytest.mark.parametrize(
    ("base", "energy", "mean"),
    [
        (dist.Gamma(2.0, 1.0), lambda w, x: w * x, 2.0 / 1.5),
        (dist.ImproperUniform(constraints.simplex, (), (3,)), lambda w, x: -(1 + 2 * w) * jnp.log(x[0]), 3.0 / 5.0),
        (dist.ImproperUniform(constraints.circular, (), ()), lambda w, x: 8 * w * jnp.cos(x), None),
    ],
)
def test_negatives_live_on_the_support(base, energy, mean):
    """Chains move in unconstrained space, with the Jacobian: Gamma(2, 1.5), Dirichlet(3, 1, 1), von Mises with mode pi."""

    def model():
        w = numpyro.param("w", 0.5)
        numpyro.sample(
            "x", ebm.EBM(lambda x: energy(w, x), base), obs=base.support.feasible_like(jnp.zeros(base.event_shape))
        )

    trained = negative_phase(model, kernel=MALA, num_chains=4000, num_steps=120)
    trace = handlers.trace(handlers.seed(trained, 0)).get_trace()
    values = chain_values(trace["x"]["fn"], trace["x$chains"]["value"]["sampler"])
    first = values.reshape(4000, -1)[:, 0]
    if mean is None:
        assert float(jnp.cos(values).mean()) == pytest.approx(-0.8635226, abs=0.02)
        assert 0.4 < float((values > 0).mean()) < 0.6
    else:
        assert float(first.mean()) == pytest.approx(mean, abs=0.05)


# --- Refusals ------------------------------------------------------------------------------------------------------


def test_sites_that_need_the_value_are_refused():
    def model():
        w = numpyro.param("w", 0.5)
        components = [ebm.EBM(lambda x: w * x**2, dist.Normal(0.0, 1.0)), dist.Normal(0.0, 1.0)]
        numpyro.sample("x", dist.MixtureGeneral(dist.Categorical(jnp.array([0.5, 0.5])), components), obs=0.1)

    with pytest.raises(ebm.UnknownNormalizerError, match=r"as in a mixture.*exact_normalizer"):
        handlers.seed(negative_phase(model, kernel=MALA), 0)()


def test_discrete_supports_are_refused_with_the_kernels_that_can():
    def model():
        w = numpyro.param("w", 0.5)
        numpyro.sample(
            "x", ebm.EBM(lambda s: w * jnp.sum(s), dist.Bernoulli(0.5).expand([3]).to_event(1)), obs=jnp.ones(3)
        )

    with pytest.raises(TypeError, match=r"discrete support.*Gibbs"):
        handlers.seed(negative_phase(model, kernel=MALA), 0)()


def test_a_site_that_cannot_learn_is_pointed_out():
    def model():
        numpyro.sample("x", ebm.EBM(lambda x: x**2, dist.Normal(0.0, 1.0)), obs=0.1)

    with pytest.warns(UserWarning, match=r"site 'x'.*cannot learn anything"):
        handlers.seed(negative_phase(model, kernel=MALA), 0)()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernel": 0.1}, TypeError, "kernel: got float"),
        ({"kernel": MALA, "loss_value": "zero"}, ValueError, "loss_value: got 'zero'"),
        ({"kernel": MALA, "loss_value": "tracked", "persistent": False}, ValueError, "estimated_normalizer"),
        ({"kernel": MALA, "num_chains": 0}, ValueError, "num_chains: got 0"),
        ({"kernel": MALA, "target_acceptance": 1.5}, ValueError, "target_acceptance"),
        ({"kernel": MALA, "target_acceptance": 0.6, "persistent": False}, ValueError, "no step size is kept"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        negative_phase(tilted, **options)


def test_tracking_needs_a_base_that_can_be_sampled():
    with pytest.raises(ValueError, match="loss_value: got 'tracked' with the base ImproperUniform"):
        handlers.seed(negative_phase(gaussian, kernel=MALA, loss_value="tracked"), 0)(GAUSSIAN)


def test_as_a_decorator_with_options():
    @negative_phase(kernel=MALA, num_chains=16)
    def model(data):
        tilted(data)

    trace = handlers.trace(handlers.seed(model, 0)).get_trace(TILTED)
    assert trace["x$chains"]["value"]["sampler"].num_chains == 16
