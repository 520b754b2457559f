"""``simulate``: prior and posterior predictive draws of EBM sites, and what they say about themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.distributions import constraints, transforms
from numpyro.infer import Predictive

import ebm_ppl as ebm
from ebm_ppl.chains import ChainSimulator
from ebm_ppl.diagnostics import simulation_summary
from ebm_ppl.handlers import constant_normalizer, simulate
from ebm_ppl.testing import cdf_test

MALA = ebm.kernels.mala(step_size=0.4)


def site(scale=3.0):
    """N(0, 1 / (1 + scale))."""
    return ebm.EBM(lambda x: 0.5 * scale * x**2, dist.Normal(0.0, 1.0))


def model():
    with numpyro.plate("rows", 4):
        x = numpyro.sample("x", site())
    numpyro.sample("y", dist.Normal(x.sum(), 0.5))


def test_prior_predictive_draws_follow_the_law(key):
    draws = Predictive(simulate(model, kernel=MALA, num_steps=60), num_samples=1500)(key)
    assert draws["x"].shape == (1500, 4)
    cdf_test(np.asarray(draws["x"]).ravel(), scipy.stats.norm(0.0, 0.5).cdf, name="x").raise_if_failed()
    # The rows of a plate are independent, or the sum would not have this law.
    cdf_test(np.asarray(draws["y"]), scipy.stats.norm(0.0, np.hypot(1.0, 0.5)).cdf, name="y").raise_if_failed()
    summary = simulation_summary(draws)["x"]
    assert summary.arrived
    assert summary.num_draws == 6000
    assert 0.5 < summary.acceptance_rate < 1.0


def test_posterior_predictive_draws_use_each_draw_of_the_parameters(key):
    def hierarchical():
        precision = numpyro.sample("precision", dist.LogNormal())
        numpyro.sample("x", site(precision - 1.0))

    posterior = {"precision": jnp.repeat(jnp.array([1.0, 16.0]), 1000)}
    draws = Predictive(simulate(hierarchical, kernel=ebm.kernels.mala(step_size=0.1), num_steps=100), posterior)(key)
    for half, sd in ((slice(0, 1000), 1.0), (slice(1000, None), 0.25)):
        cdf_test(np.asarray(draws["x"][half]), scipy.stats.norm(0.0, sd).cdf, name=f"sd {sd}").raise_if_failed()


def test_chains_that_have_not_arrived_say_so(key):
    """A base far from the energy, and a few small steps."""
    far = lambda: numpyro.sample("x", ebm.EBM(lambda x: 50.0 * (x - 3.0) ** 2, dist.Normal(-3.0, 1.0)))
    draws = Predictive(simulate(far, kernel=ebm.kernels.mala(step_size=1e-4), num_steps=20), num_samples=200)(key)
    summary = simulation_summary(draws)["x"]
    assert not summary.arrived
    assert summary.drift < -5.0
    frozen = Predictive(simulate(far, kernel=ebm.kernels.mala(step_size=1e3), num_steps=20), num_samples=200)(key)
    assert not simulation_summary(frozen)["x"].arrived


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: d.expand([5]).to_event(1),
        lambda d: d.expand([5]).mask(jnp.arange(5) < 3),
        lambda d: dist.TransformedDistribution(d.expand([5]), transforms.ExpTransform()),
        lambda d: dist.MixtureGeneral(dist.Categorical(jnp.array([0.5, 0.5])), [d, dist.Normal(0.0, 1.0)]).expand([5]),
    ],
)
def test_wrapped_sites_are_simulated(wrap, key):
    draws = Predictive(simulate(lambda: numpyro.sample("x", wrap(site())), kernel=MALA, num_steps=10), num_samples=7)(
        key
    )
    assert draws["x"].shape == (7, 5)
    assert np.unique(draws["x"]).size == 35


def test_conditional_rows_are_simulated_under_their_own_condition(key):
    c = jnp.array([-2.0, 0.0, 2.0])
    rows = ebm.EBM(lambda x, c: 2.0 * (x - c) ** 2, dist.ImproperUniform(constraints.real, (), ()), condition=c)
    draws = Predictive(simulate(lambda: numpyro.sample("x", rows), kernel=MALA, num_steps=80), num_samples=1500)(key)
    for row in range(3):
        law = scipy.stats.norm(float(c[row]), 0.5).cdf
        cdf_test(np.asarray(draws["x"][:, row]), law, name=f"row {row}").raise_if_failed()
    assert draws["x$acceptance_rate"].shape == (1500, 3)


def test_a_given_simulator_is_used_and_an_attached_one_kept():
    exact = lambda key, potential, num: jnp.full((num,), 2.0)
    attached = lambda: numpyro.sample("x", site().with_sampler(lambda key, potential, num: jnp.full((num,), 5.0)))
    bare = lambda: numpyro.sample("x", site())
    assert float(handlers.seed(simulate(bare, sampler=exact), 0)()) == 2.0
    assert float(handlers.seed(simulate(attached, sampler=exact), 0)()) == 5.0


def test_without_simulate_the_remedy_is_named():
    with pytest.raises(NotImplementedError, match=r"handlers.simulate\(model, kernel="):
        Predictive(model, num_samples=2)(jax.random.key(0))


def test_observed_sites_and_densities_are_untouched():
    wrapped = simulate(constant_normalizer(model), kernel=MALA)
    values = {"x": jnp.ones(4), "y": 0.0}
    ours, trace = numpyro.infer.util.log_density(wrapped, (), {}, values)
    theirs, _ = numpyro.infer.util.log_density(constant_normalizer(model), (), {}, values)
    assert float(ours) == float(theirs)
    assert set(trace) == {"rows", "x", "y"}


def test_as_a_context_manager_and_decorator():
    @simulate(kernel=MALA, num_steps=4)
    def decorated():
        return numpyro.sample("x", site())

    with handlers.seed(rng_seed=0), simulate(kernel=MALA, num_steps=4):
        inside = numpyro.sample("x", site())
    assert np.isfinite([float(inside), float(handlers.seed(decorated, 0)())]).all()


def test_diagnostics_follow_the_site_under_scope(key):
    """A scope renames the site after simulate has seen it."""
    simulated = simulate(lambda: numpyro.sample("x", site()), kernel=MALA, num_steps=4)
    draws = Predictive(handlers.scope(simulated, prefix="a"), num_samples=3)(key)
    assert set(draws) == {"a/x", "a/x$acceptance_rate", "a/x$energy_drift"}


def test_a_base_of_python_numbers_and_arrays(key):
    """NumPyro turns the number into a 64-bit NumPy array, which nobody wrote."""
    base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    draws = ebm.EBM(lambda v: v @ v, base).with_sampler(ChainSimulator(MALA, 20)).sample(key, (5,))
    assert draws.shape == (5, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, "got neither"),
        ({"kernel": MALA, "sampler": lambda *args: None}, TypeError, "got both"),
        ({"kernel": MALA, "num_steps": 1}, ValueError, "num_steps: got 1"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        simulate(model, **options)


def test_kernels_whose_draws_count_alike_simulate_and_those_with_weights_do_not(key):
    """Tempered SMC resamples by default; a composed kernel may leave chains where they began."""
    wells = ebm.EBM(lambda x: 4.0 * (x**2 - 1.0) ** 2, dist.Normal(0.0, 3.0))

    def smc(**options):
        return ebm.kernels.tempered_smc(inner=MALA, reference=dist.Normal(0.0, 3.0), **options)

    draws = wells.with_sampler(ChainSimulator(smc(), 1)).sample(key, (2000,))
    assert abs(float((draws > 0).mean()) - 0.5) < 0.1
    with pytest.raises(ValueError, match="no weights"):
        wells.with_sampler(ChainSimulator(smc(keep_weights=True), 1)).sample(key, (10,))
    composed = ebm.kernels.mixture([ebm.kernels.independence(dist.Normal(0.0, 1.0)), MALA], [0.5, 0.5])
    for kernel in (MALA, composed):
        with pytest.raises(ValueError, match="num_steps"):
            ChainSimulator(kernel, 1)
