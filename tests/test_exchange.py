"""The exchange algorithm against exact posteriors, and a refusal for every model that it would get wrong."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints, transforms
from numpyro.infer import MCMC, NUTS, HMCGibbs
from numpyro.infer.gibbs import DiscreteGibbs, Gibbs

import ebm_ppl as ebm
from ebm_ppl import kernels
from ebm_ppl.distributions import find_ebms, map_ebms
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.handlers import constant_normalizer, simulate
from ebm_ppl.infer import DoublingRow, Exchange, InnerDoubling, inner_doubling_test
from ebm_ppl.infer.auxiliary import Auxiliary
from ebm_ppl.infer.doubling import _compare
from ebm_ppl.infer.random_walk import WalkTuning
from ebm_ppl.testing import cdf_test, rank_test, simulation_based_calibration, t_test_chain_means

REAL = dist.ImproperUniform(constraints.real, (), ())
VECTOR = dist.ImproperUniform(constraints.real_vector, (), (1,))
DATA = 0.5 * jax.random.normal(jax.random.key(1), (100, 1))


# --- Exact answers and how chains are run ------------------------------------------------------------------------------


def grid_moments(log_density, *axes):
    """Mean and variance of every coordinate under a density on a grid."""
    points = np.meshgrid(*axes, indexing="ij")
    log_weight = log_density(*points)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    means = [(weight * x).sum() for x in points]
    return [(mean, (weight * (x - mean) ** 2).sum()) for mean, x in zip(means, points, strict=True)]


def run(kernel, key, *args, num_warmup=200, num_samples=200, num_chains=64, extra_fields=(), **settings):
    """Short chains side by side, independent of each other: samples ``(chain, draw, ...)`` and the other fields."""
    settings = {"chain_method": "vectorized", "progress_bar": False} | settings
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, num_chains=num_chains, **settings)
    mcmc.run(key, *args, extra_fields=extra_fields)
    fields = {name: np.asarray(x) for name, x in mcmc.get_extra_fields(group_by_chain=True).items()}
    return {name: np.asarray(x) for name, x in mcmc.get_samples(group_by_chain=True).items()}, fields


def require_moments(samples, mean, variance, name="posterior"):
    t_test_chain_means(samples, mean, name=f"{name} mean").raise_if_failed()
    t_test_chain_means((samples - mean) ** 2, variance, name=f"{name} variance").raise_if_failed()


# --- A log precision: the reference problem ----------------------------------------------------------------------------


def precision_ebm(log_precision, has_sampler=True):
    def draw(key, potential, n):
        return jnp.exp(-log_precision / 2) * jax.random.normal(key, (n, 1))

    energy = lambda x: 0.5 * jnp.exp(log_precision) * jnp.sum(x**2)
    return ebm.EBM(energy, VECTOR, sampler=draw if has_sampler else None)


def precision_model(x, has_sampler=True):
    log_precision = numpyro.sample("log_precision", dist.Normal())
    numpyro.deterministic("precision", jnp.exp(log_precision))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", precision_ebm(log_precision, has_sampler), obs=x)


def precision_posterior(x):
    n, total = len(x), float(jnp.sum(x**2))
    log_density = lambda lp: -0.5 * lp**2 + 0.5 * n * lp - 0.5 * np.exp(lp) * total
    return grid_moments(log_density, np.linspace(-6.0, 6.0, 20001))[0]


def test_the_reference_posterior():
    mean, variance = precision_posterior(DATA)
    assert mean == pytest.approx(1.188, abs=0.005)
    assert variance**0.5 == pytest.approx(0.141, abs=0.005)


def test_exact_draws_give_the_exact_posterior(key):
    fields = ("mean_accept_prob", "num_accepted", "num_invalid", "walk.step_size", "walk.covariance")
    samples, extra = run(Exchange(precision_model), key, DATA, num_samples=300, extra_fields=fields)
    require_moments(samples["log_precision"], *precision_posterior(DATA))
    np.testing.assert_allclose(samples["precision"], np.exp(samples["log_precision"]), rtol=1e-5)
    # Warm-up reached its target, learned the scale of the posterior, and froze.
    assert extra["accept_prob"].mean() == pytest.approx(0.3, abs=0.05)
    assert np.median(extra["walk.covariance"]) ** 0.5 == pytest.approx(0.14, rel=0.3)
    assert (np.ptp(extra["walk.step_size"], axis=1) == 0.0).all()
    np.testing.assert_allclose(extra["mean_accept_prob"][:, -1], extra["accept_prob"].mean(axis=1), rtol=1e-4)
    moved = np.diff(samples["log_precision"], axis=1) != 0.0
    assert (np.diff(extra["num_accepted"], axis=1) == moved).all()
    assert not extra["num_invalid"].any()


def test_naive_inference_is_refused():
    with pytest.raises(UnknownNormalizerError, match=r"depends on latent site\(s\) {log_precision}"):
        run(NUTS(constant_normalizer(precision_model)), jax.random.key(0), DATA, num_chains=1)


@pytest.mark.slow
def test_vectorized_and_sequential_chains_are_the_same_chains(key):
    kernel = Exchange(precision_model)
    settings = {"num_warmup": 20, "num_samples": 20, "num_chains": 2}
    one, _ = run(kernel, key, DATA, **settings)
    other, _ = run(kernel, key, DATA, chain_method="sequential", **settings)
    np.testing.assert_allclose(one["log_precision"], other["log_precision"], rtol=1e-3)


@pytest.mark.slow
def test_a_run_can_be_continued(key):
    kernel = Exchange(precision_model)
    mcmc = MCMC(kernel, num_warmup=50, num_samples=50, progress_bar=False)
    mcmc.run(key, DATA)
    walk = mcmc.last_state.walk
    mcmc.post_warmup_state = mcmc.last_state
    mcmc.run(jax.random.key(1), DATA)
    assert int(mcmc.last_state.i) == 150
    assert mcmc.last_state.walk.step_size == walk.step_size
    assert "accepted" in kernel.get_diagnostics_str(mcmc.last_state)


@pytest.mark.slow
def test_64_bit_and_parallel_chains(tmp_path):
    """On two devices and in double precision, in a process of its own: both are settings of the whole process."""
    script = tmp_path / "script.py"
    script.write_text(
        "import jax\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "import numpyro.infer\n"
        "from tests import test_exchange as t\n"
        "for inner in ({}, {'inner_kernel': t.kernels.mala(step_size=0.1), 'inner_steps': 3, 'num_bridges': 2}):\n"
        "    kernel = t.Exchange(t.precision_model, **inner)\n"
        "    samples, _ = t.run(kernel, jax.random.key(0), t.DATA, num_chains=2, chain_method='parallel')\n"
        "    assert samples['log_precision'].dtype == 'float64', samples['log_precision'].dtype\n"
        "    assert samples['log_precision'].std() > 0.05\n"
    )
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    root = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); exec(open({str(script)!r}).read())"],
        check=True,
        env=environment,
    )


# --- Exact-start invariance: chains that start from the joint law stay there -------------------------------------------

NUM_ROWS = 4


def positive_model(x):
    """A positive parameter, so that the random walk has a Jacobian."""
    precision = numpyro.sample("precision", dist.Gamma(3.0, 2.0))
    draw = lambda key, potential, n: jax.random.normal(key, (n,)) / jnp.sqrt(precision)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EBM(lambda x: 0.5 * precision * x**2, REAL, sampler=draw), obs=x)


def joint_after_moves(key, num_chains=100_000, num_moves=5, make_kernel=Exchange, **settings):
    """Parameters and ``precision * |x|^2`` after a few moves from exact draws of prior and data."""

    def chain(key):
        prior_key, data_key, chain_key = jax.random.split(key, 3)
        precision = jax.random.gamma(prior_key, 3.0) / 2.0
        x = jax.random.normal(data_key, (NUM_ROWS,)) / jnp.sqrt(precision)
        kernel = make_kernel(positive_model, step_size=1.0, **settings)
        state = kernel.init(chain_key, 0, {"precision": jnp.log(precision)}, (x,), {})
        state, _ = jax.lax.scan(lambda state, _: (kernel.sample(state, (x,), {}), None), state, None, num_moves)
        after = kernel.get_constrain_fn((x,), {})(state.z)["precision"]
        return after, after * jnp.sum(x**2), after != precision

    after, pivot, moved = jax.jit(jax.vmap(chain))(jax.random.split(key, num_chains))
    return np.asarray(after, np.float64), np.asarray(pivot, np.float64), float(moved.mean())


def joint_checks(after, pivot):
    """The prior of the parameter and the law of the pivot: each is exact only where the move leaves the joint alone."""
    return (
        cdf_test(after, lambda x: scipy.stats.gamma.cdf(x, 3.0, scale=0.5), name="prior"),
        cdf_test(pivot, lambda x: scipy.stats.chi2.cdf(x, NUM_ROWS), name="pivot"),
    )


def test_the_joint_law_is_invariant(key):
    after, pivot, moved = joint_after_moves(key)
    assert moved > 0.5
    for check in joint_checks(after, pivot):
        check.raise_if_failed()


@pytest.mark.slow
def test_bridges_leave_the_joint_law_invariant(key):
    bridged = {"inner_kernel": kernels.mala(step_size=0.3), "num_bridges": 2}
    after, pivot, moved = joint_after_moves(key, num_chains=20_000, num_moves=3, **bridged)
    assert moved > 0.5
    for check in joint_checks(after, pivot):
        check.raise_if_failed()


def _terms(self, key, proposed, current, value, *, real, fault):
    """``Auxiliary.terms`` with one fault."""
    if fault == "drawn at the current parameters":
        (now,) = find_ebms(current)
        proposed = map_ebms(lambda ebm: ebm.with_sampler(now.sampler), proposed)
    terms, rate = real(self, key, proposed, current, value)
    if fault == "sign":
        terms = -terms
    if fault == "dropped":
        terms = 0.0 * terms
    if fault == "one row for all":
        terms = jnp.broadcast_to(terms[:1], terms.shape)
    if fault == "one row only":
        terms = jnp.where(jnp.arange(len(terms)) == 0, terms, 0.0)
    return terms, rate


def inject(monkeypatch, fault):
    real = Auxiliary.terms
    monkeypatch.setattr(Auxiliary, "terms", functools.partialmethod(_terms, real=real, fault=fault))


class NoJacobian(transforms.ExpTransform):
    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return jnp.zeros_like(x)


@pytest.mark.parametrize(
    "fault",
    [
        "drawn at the current parameters",
        *(
            pytest.param(fault, marks=pytest.mark.slow)
            for fault in ("sign", "dropped", "one row for all", "one row only", "jacobian")
        ),
    ],
)
def test_seeded_faults_break_invariance(key, monkeypatch, fault):
    if fault == "jacobian":
        monkeypatch.setattr("ebm_ppl.infer.exchange_move.biject_to", lambda support: NoJacobian())
    else:
        inject(monkeypatch, fault)
    after, pivot, _ = joint_after_moves(key, num_chains=30_000)
    assert not all(check.passed for check in joint_checks(after, pivot))


# --- Simulation-based calibration of whole runs, warm-up included ------------------------------------------------------


def simulate_precision(key):
    prior_key, data_key = jax.random.split(key)
    log_precision = jax.random.normal(prior_key)
    return log_precision, jnp.exp(-log_precision / 2) * jax.random.normal(data_key, (10, 1))


def precision_quantities(log_precision, x):
    log_likelihood = 0.5 * x.size * log_precision - 0.5 * jnp.exp(log_precision) * jnp.sum(x**2)
    return {"log_precision": log_precision, "log likelihood": log_likelihood}


def precision_ranks(key, num_draws=19):
    def infer(key, x):
        mcmc = MCMC(
            Exchange(precision_model),
            num_warmup=200,
            num_samples=30 * num_draws,
            thinning=30,
            progress_bar=False,
        )
        mcmc.run(key, x)
        return mcmc.get_samples()["log_precision"]

    return simulation_based_calibration(
        key, simulate_precision, infer, precision_quantities, num_simulations=2000, num_draws=num_draws
    )


def test_exchange_is_calibrated(key):
    for name, ranks in precision_ranks(key).items():
        rank_test(ranks, 19, name=name).raise_if_failed()


@pytest.mark.slow
def test_auxiliary_data_drawn_at_the_wrong_parameters_are_caught_by_calibration(key, monkeypatch):
    inject(monkeypatch, "drawn at the current parameters")
    ranks = precision_ranks(key)
    assert not rank_test(ranks["log_precision"], 19).passed
    assert not rank_test(ranks["log likelihood"], 19).passed


# --- Inner chains ------------------------------------------------------------------------------------------------------


def rate_model(x):
    """Exponential waiting times: a bounded support, so that inner chains have a Jacobian. The posterior is a Gamma."""
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", len(x)):
        energy = lambda x: rate * x
        numpyro.sample("x", ebm.EBM(energy, dist.ImproperUniform(constraints.positive, (), ())), obs=x)


@pytest.mark.slow
def test_inner_chains_on_a_bounded_support(key):
    x = jax.random.exponential(jax.random.key(2), (10,)) / 1.5
    kernel = Exchange(rate_model, inner_kernel=kernels.mala(step_size=0.4), inner_steps=15)
    samples, extra = run(kernel, key, x, extra_fields=("inner_accept_prob",))
    exact = scipy.stats.gamma(2.0 + 10, scale=1.0 / (1.0 + float(x.sum())))
    require_moments(samples["rate"], exact.mean(), exact.var())
    assert 0.5 < extra["inner_accept_prob"].mean() < 0.99


@pytest.mark.slow
def test_inner_chains_that_are_too_short_are_flagged(key):
    """One MALA step leaves the auxiliary data near the data, and the posterior falls towards the prior."""
    model = functools.partial(precision_model, has_sampler=False)
    result = inner_doubling_test(
        key,
        model,
        (DATA,),
        inner_kernel=kernels.mala(step_size=0.02),
        inner_steps=1,
        num_doublings=1,
        num_warmup=200,
        num_samples=200,
    )
    assert result.disagreeing == (1,)
    assert not result.agrees
    assert "DISAGREE: 1 inner steps are too few" in str(result)
    spread = {row.inner_steps: row.estimate for row in result.rows if row.quantity == "sd log_precision"}
    assert spread[1] > spread[2] > 0.2 > precision_posterior(DATA)[1] ** 0.5


@pytest.mark.slow
def test_inner_chains_that_are_long_enough_agree_with_each_other_and_the_truth(key):
    model = functools.partial(precision_model, has_sampler=False)
    result = inner_doubling_test(
        key, model, (DATA,), inner_kernel=kernels.mala(step_size=0.15), inner_steps=16, num_warmup=200, num_samples=200
    )
    assert result.agrees, str(result)
    mean, variance = precision_posterior(DATA)
    for row in result.rows:
        if "log_precision" in row.quantity:
            exact = mean if row.quantity.startswith("mean") else variance**0.5
            assert abs(row.estimate - exact) < 6.0 * row.mcse


def chains_of(rng, mean, sd):
    return {"theta": rng.normal(mean, sd, size=(64, 200))}


def test_the_doubling_test_on_known_laws():
    rng = np.random.default_rng(0)
    samples = {1: chains_of(rng, 0.0, 2.0), 2: chains_of(rng, 0.3, 1.0), 4: chains_of(rng, 0.0, 1.0)}
    result = _compare(samples, {1: 0.3, 2: 0.3, 4: 0.3}, 1e-3)
    worst = {row.inner_steps: row.quantity for row in sorted(result.rows, key=lambda row: row.deviation)}
    assert result.disagreeing == (1, 2)
    assert worst == {1: "sd theta", 2: "mean theta", 4: "mean theta"} or worst[1] == "sd theta"
    for row in result.rows[4:]:
        assert row.deviation == 0.0
    assert abs(result.rows[-1].estimate - 1.0) < 6.0 * result.rows[-1].mcse
    same = {1: chains_of(rng, 0.0, 1.0), 2: chains_of(rng, 0.0, 1.0)}
    assert _compare(same, {1: 0.3, 2: 0.3}, 1e-3).agrees
    # A chain at NaN agrees with nothing.
    assert not InnerDoubling((DoublingRow(1, "mean theta", 0.0, 1.0, float("nan")),), {1: 0.3}, 3.0).agrees


# --- Bridges -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bridges_raise_acceptance(key):
    """Ten log precisions at the scale that is optimal for a tractable likelihood: .09 in theory without bridges, and .23
    with infinitely many.
    """
    dim, scale = 10, 2.38 * (2 / 102) ** 0.5 / 10**0.5
    x = jax.random.normal(jax.random.key(3), (100, dim))

    def model(x):
        log_precision = numpyro.sample("log_precision", dist.Normal().expand([dim]).to_event(1))
        draw = lambda key, potential, n: jnp.exp(-log_precision / 2) * jax.random.normal(key, (n, dim))
        energy = lambda x: 0.5 * jnp.sum(jnp.exp(log_precision) * x**2)
        flat = dist.ImproperUniform(constraints.real_vector, (), (dim,))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EBM(energy, flat, sampler=draw), obs=x)

    def acceptance(**settings):
        # From the exact posterior's neighbourhood, so that nothing has to converge.
        start = jax.random.normal(jax.random.key(4), (64, dim)) * (2 / 102) ** 0.5
        kernel = Exchange(model, step_size=scale, adapt_step_size=False, adapt_covariance=False, **settings)
        mcmc = MCMC(kernel, num_warmup=0, num_samples=60, num_chains=64, chain_method="vectorized", progress_bar=False)
        mcmc.run(key, x, init_params={"log_precision": start})
        return float(mcmc.get_extra_fields()["accept_prob"].mean())

    without = acceptance()
    bridged = acceptance(inner_kernel=kernels.mala(step_size=0.4), num_bridges=8)
    assert 0.05 < without < 0.15
    assert bridged > 1.4 * without


# --- Compositions ------------------------------------------------------------------------------------------------------

EXTRA = jnp.array([1.0, 1.5, 0.7])


def nuisance_model(x, y):
    """A log precision of EBM rows, which also shifts ordinary data by a nuisance ``mu``: the two are correlated."""
    log_precision = numpyro.sample("log_precision", dist.Normal())
    mu = numpyro.sample("mu", dist.Normal())
    numpyro.deterministic("sum", log_precision + mu)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", precision_ebm(log_precision), obs=x)
    numpyro.sample("y", dist.Normal(mu + log_precision, 0.5).expand([3]).to_event(1), obs=y)


def nuisance_posterior():
    n, total = 30, float(jnp.sum(DATA[:30] ** 2))

    def log_density(lp, mu):
        residual = sum((float(y) - lp - mu) ** 2 for y in EXTRA)
        return -0.5 * lp**2 + 0.5 * n * lp - 0.5 * np.exp(lp) * total - 0.5 * mu**2 - residual / 0.5

    return grid_moments(log_density, np.linspace(-1.0, 3.0, 801), np.linspace(-4.0, 3.0, 801))


def require_nuisance_posterior(samples):
    (lp_mean, lp_variance), (mu_mean, mu_variance) = nuisance_posterior()
    require_moments(samples["log_precision"], lp_mean, lp_variance, "log_precision")
    require_moments(samples["mu"], mu_mean, mu_variance, "mu")
    np.testing.assert_allclose(samples["sum"], samples["log_precision"] + samples["mu"], atol=1e-5)


# NumPyro's vmap of a composite kernel donates buffers that the collected samples cannot reuse.
donation = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable:UserWarning")


@donation
@pytest.mark.slow
def test_a_block_of_gibbs(key):
    model = constant_normalizer(nuisance_model, given=["log_precision"])
    kernel = Gibbs([(Exchange(model), ["log_precision"]), (NUTS(model), None)])
    fields = ("block_states.0.mean_accept_prob",)
    samples, extra = run(kernel, key, DATA[:30], EXTRA, chain_method=jax.vmap, extra_fields=fields)
    require_nuisance_posterior(samples)
    assert extra[fields[0]][:, -1].mean() == pytest.approx(0.3, abs=0.07)


@pytest.mark.slow
@donation
def test_the_gibbs_function_of_hmc_gibbs(key):
    model = constant_normalizer(nuisance_model, given=["log_precision"])
    gibbs_fn = Exchange(model, step_size=0.6).gibbs_fn(DATA[:30], EXTRA)
    kernel = HMCGibbs(NUTS(model), gibbs_fn, ["log_precision"])
    samples, _ = run(kernel, key, DATA[:30], EXTRA, chain_method=jax.vmap, num_samples=300)
    require_nuisance_posterior(samples)


@pytest.mark.slow
def test_all_latent_sites_moved_together(key):
    kernel = Exchange(nuisance_model, sites=["mu", "log_precision"])
    samples, extra = run(
        kernel, key, DATA[:30], EXTRA, num_warmup=400, num_samples=400, extra_fields=("walk.covariance",)
    )
    require_nuisance_posterior(samples)
    # The covariance of the random walk has learned that the two are negatively correlated.
    assert np.median(extra["walk.covariance"][..., 0, 1]) < 0.0


def hierarchical_model(y):
    """A latent EBM with an uncertain precision, seen through noise."""
    log_precision = numpyro.sample("log_precision", dist.Normal(0.0, 0.7))
    with numpyro.plate("rows", len(y)):
        z = numpyro.sample("z", precision_ebm(log_precision))
        numpyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=y)


def hierarchical_posterior(y):
    def log_density(lp):
        variance = np.exp(-lp) + 0.25
        return -0.5 * (lp / 0.7) ** 2 - 0.5 * len(y) * np.log(variance) - 0.5 * float((y**2).sum()) / variance

    return grid_moments(log_density, np.linspace(-6.0, 6.0, 20001))[0]


@donation
@pytest.mark.parametrize(
    "composition", [pytest.param("together", marks=pytest.mark.slow), pytest.param("gibbs", marks=pytest.mark.slow)]
)
def test_a_latent_ebm_with_an_uncertain_parameter(key, composition):
    y = jnp.array([[0.9], [-1.4], [0.3]])
    if composition == "together":
        kernel, settings = Exchange(hierarchical_model, sites=["log_precision", "z"]), {"num_samples": 3000}
    else:
        model = constant_normalizer(hierarchical_model, given="log_precision")
        kernel = Gibbs([(Exchange(model), ["log_precision"]), (NUTS(model), ["z"])])
        settings = {"num_samples": 600, "chain_method": jax.vmap}
    samples, _ = run(kernel, key, y, num_warmup=300, **settings)
    require_moments(samples["log_precision"], *hierarchical_posterior(y))


# --- Rows: conditions, transforms, masks, events -----------------------------------------------------------------------


def conditional_model(c, x):
    """Row ``i`` is ``N(0, exp(-a - b c_i))``: one normaliser per row, each with auxiliary data of its own."""
    a = numpyro.sample("a", dist.Normal())
    b = numpyro.sample("b", dist.Normal())

    def draw(key, potential, n):
        log_precision = a + b * potential.ebm.condition[potential.row]
        return jnp.exp(-log_precision / 2) * jax.random.normal(key, (n,))

    energy = lambda x, c: 0.5 * jnp.exp(a + b * c) * x**2
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EBM(energy, REAL, condition=c, sampler=draw), obs=x)


CONDITION = jnp.linspace(-1.0, 2.0, 25)
CONDITIONAL_DATA = jnp.exp(-(0.5 + CONDITION) / 2) * jax.random.normal(jax.random.key(5), (25,))


def conditional_posterior():
    c, x = np.asarray(CONDITION, float), np.asarray(CONDITIONAL_DATA, float)

    def log_density(a, b):
        log_precision = a[..., None] + b[..., None] * c
        return -0.5 * a**2 - 0.5 * b**2 + 0.5 * np.sum(log_precision - np.exp(log_precision) * x**2, axis=-1)

    return grid_moments(log_density, np.linspace(-2.0, 3.0, 301), np.linspace(-2.0, 4.0, 301))


def require_conditional_posterior(samples):
    for name, (mean, variance) in zip(("a", "b"), conditional_posterior(), strict=True):
        require_moments(samples[name], mean, variance, name)


def test_one_normalizer_per_row(key):
    samples, _ = run(Exchange(conditional_model), key, CONDITION, CONDITIONAL_DATA, num_warmup=300, num_samples=500)
    require_conditional_posterior(samples)


@pytest.mark.slow
def test_one_inner_chain_per_row(key):
    kernel = Exchange(
        conditional_model, inner_kernel=kernels.hmc(step_size=0.3, num_integration_steps=5), inner_steps=15
    )
    samples, _ = run(kernel, key, CONDITION, CONDITIONAL_DATA, num_warmup=300, num_samples=500)
    require_conditional_posterior(samples)


@pytest.mark.slow
@pytest.mark.parametrize("has_sampler", [True, False])
def test_transformed_and_masked_rows(key, has_sampler):
    """A log-normal of EBM rows, of which a mask drops half, whatever they hold."""
    used = jnp.arange(40) % 2 == 0
    x = jnp.where(used, jnp.exp(DATA[:40, 0]), jnp.nan)

    def model(x):
        log_precision = numpyro.sample("log_precision", dist.Normal())
        draw = lambda key, potential, n: jnp.exp(-log_precision / 2) * jax.random.normal(key, (n,))
        site = ebm.EBM(lambda x: 0.5 * jnp.exp(log_precision) * x**2, REAL, sampler=draw if has_sampler else None)
        # The transform moves with the parameter too; the normaliser does not notice.
        site = dist.TransformedDistribution(
            site, [transforms.AffineTransform(0.1 * log_precision, 1.0), transforms.ExpTransform()]
        )
        with numpyro.plate("rows", 40), handlers.mask(mask=used):
            numpyro.sample("x", site, obs=x)

    y = np.log(np.asarray(x)[np.asarray(used)])

    def log_density(lp):
        squares = ((y - 0.1 * lp[:, None]) ** 2).sum(axis=1)
        return -0.5 * lp**2 + 0.5 * len(y) * lp - 0.5 * np.exp(lp) * squares

    exact = grid_moments(log_density, np.linspace(-5.0, 5.0, 2001))[0]
    inner = {} if has_sampler else {"inner_kernel": kernels.mala(step_size=0.15), "inner_steps": 20}
    samples, _ = run(Exchange(model, **inner), key, x, num_samples=300)
    require_moments(samples["log_precision"], *exact)


@pytest.mark.slow
def test_discrete_data_with_an_exact_sampler(key):
    """Coins with energy ``-theta x``: log Z = log(1 + exp theta) per coin."""
    x = (jnp.arange(30) % 3 == 0).astype(int)

    def model(x):
        theta = numpyro.sample("theta", dist.Normal())
        draw = lambda key, potential, n: jax.random.bernoulli(key, jax.nn.sigmoid(theta), (n,)).astype(int)
        site = ebm.EBM(lambda x: -theta * x, dist.Bernoulli(0.5), sampler=draw)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", site, obs=x)

    samples, _ = run(Exchange(model), key, x)
    log_density = lambda t: -0.5 * t**2 + 10 * t - 30 * np.logaddexp(0.0, t)
    require_moments(samples["theta"], *grid_moments(log_density, np.linspace(-6.0, 6.0, 2001))[0])


def wrapped_precision(log_precision, wrapper):
    site = precision_ebm(log_precision)
    if wrapper == "sample_shape":
        return site
    if wrapper == "event":
        return site.expand([3, 2]).to_event(1)
    if wrapper == "masked event":
        return site.expand([3, 2]).mask(jnp.array([[True, False], [True, True], [False, False]])).to_event(1)
    return site.expand([3, 2])


EXACT, INNER = Auxiliary(None, None, 0), Auxiliary(kernels.mala(step_size=0.1), 3, 2)


@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [
        *((wrapper, EXACT) for wrapper in ("plain", "sample_shape", "event", "masked event")),
        ("masked event", INNER),
        *(pytest.param(wrapper, INNER, marks=pytest.mark.slow) for wrapper in ("plain", "sample_shape", "event")),
    ],
)
def test_auxiliary_terms_have_the_shape_of_the_sites_log_density(key, wrapper, inner):
    """Row for row: what a mask drops from the likelihood it drops from the auxiliary data."""
    value = jnp.ones((3, 2, 1))
    proposed, current = wrapped_precision(1.0, wrapper), wrapped_precision(0.5, wrapper)
    log_prob = map_ebms(lambda ebm: ebm.with_normalizer(0.0, "constant"), proposed).log_prob(value)
    terms, rate = jax.jit(lambda key: inner.terms(key, proposed, current, value))(key)
    assert terms.shape == log_prob.shape
    np.testing.assert_array_equal(np.asarray(terms) == 0.0, np.asarray(log_prob) == 0.0)
    assert jnp.isnan(rate) == (inner.kernel is None)
    # All rows are independent of each other.
    alive = np.asarray(terms)[np.asarray(terms) != 0.0]
    assert len(np.unique(alive)) == len(alive)


def test_bridges_estimate_the_ratio_of_normalizers_with_less_noise(key):
    """``E[exp(term)] = Z(theta) / Z(theta')``, a ratio of standard deviations here."""
    value = jnp.zeros((20_000, 1))
    # The wider of two laws is proposed, so that the estimate has a variance.
    proposed, current = precision_ebm(0.0).expand([20_000]), precision_ebm(0.7).expand([20_000])
    spread = {}
    for num_bridges in (0, 8):
        auxiliary = Auxiliary(kernels.mala(step_size=0.5), None, num_bridges)
        terms, _ = jax.jit(lambda key, auxiliary=auxiliary: auxiliary.terms(key, proposed, current, value))(key)
        ratio = np.exp(np.asarray(terms, np.float64))
        t_test_chain_means(ratio, np.exp(-0.35), name=f"{num_bridges} bridges").raise_if_failed()
        spread[num_bridges] = ratio.std()
    assert spread[8] < 0.8 * spread[0]


# --- The random walk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_warm_up_learns_scale_and_covariance(key, dense):
    """On a plain Gaussian with standard deviations .1 and 10, correlation .9."""
    covariance = jnp.array([[0.01, 0.9], [0.9, 100.0]])
    precision = jnp.linalg.inv(covariance)
    tuning = WalkTuning(2000, 0.3, None, True, True, dense)

    def step(carry, inputs):
        position, walk = carry
        i, key = inputs
        move_key, accept_key = jax.random.split(key)
        new = position + walk.displace(jax.random.normal(move_key, (2,)))
        accept_prob = jnp.minimum(1.0, jnp.exp(0.5 * (position @ precision @ position - new @ precision @ new)))
        position = jnp.where(jax.random.uniform(accept_key) < accept_prob, new, position)
        tuned = tuning.update(walk, i, position, accept_prob)
        return (position, jax.tree.map(lambda new, old: jnp.where(i < 2000, new, old), tuned, walk)), accept_prob

    def chain(key):
        start = jnp.zeros(2), tuning.init(jnp.zeros(2))
        (_, walk), accept_prob = jax.lax.scan(step, start, (jnp.arange(3000), jax.random.split(key, 3000)))
        return walk, accept_prob[2000:].mean()

    walk, accept_prob = jax.jit(jax.vmap(chain))(jax.random.split(key, 64))
    assert accept_prob.mean() == pytest.approx(0.3, abs=0.02)
    assert accept_prob.std() < 0.08
    exact = covariance if dense else jnp.diagonal(covariance)
    np.testing.assert_allclose(np.median(walk.covariance, axis=0), exact, rtol=0.25)


def test_short_warm_up_tunes_the_step_size_only():
    tuning = WalkTuning(8, 0.3, None, True, True, True)
    walk = tuning.init(jnp.zeros(3))
    for i in range(8):
        walk = tuning.update(walk, jnp.array(i), jnp.ones(3), jnp.array(0.0))
    assert float(walk.step_size) < 2.38 / 3**0.5
    np.testing.assert_array_equal(walk.covariance, jnp.eye(3))


def test_nothing_is_tuned_unasked():
    tuning = WalkTuning(40, 0.3, jnp.array(0.7), False, False, True)
    walk = tuning.init(jnp.zeros(2))
    for i in range(40):
        walk = tuning.update(walk, jnp.array(i), jnp.full(2, float(i)), jnp.array(1.0))
    assert float(walk.step_size) == pytest.approx(0.7)
    np.testing.assert_array_equal(walk.covariance, jnp.eye(2))


# --- Supports that depend on other sites -------------------------------------------------------------------------------


def dynamic_model(x):
    top = numpyro.sample("top", dist.Gamma(3.0, 1.0))
    precision = numpyro.sample("precision", dist.Uniform(0.0, top))
    draw = lambda key, potential, n: jax.random.normal(key, (n,)) / jnp.sqrt(precision)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EBM(lambda x: 0.5 * precision * x**2, REAL, sampler=draw), obs=x)


@pytest.mark.slow
def test_a_support_that_depends_on_another_site(key):
    x = DATA[:10, 0]
    samples, _ = run(Exchange(dynamic_model, sites=["top", "precision"]), key, x, num_warmup=500, num_samples=1500)
    assert (samples["precision"] < samples["top"]).all()
    total = float(jnp.sum(x**2))

    def log_density(top, fraction):
        precision = fraction * top
        return 2 * np.log(top) - top + 5 * np.log(precision) - 0.5 * precision * total

    points = np.linspace(0.0, 1.0, 1001)[1:]
    log_weight = log_density(*np.meshgrid(30.0 * points, points, indexing="ij"))
    weight = np.exp(log_weight - log_weight.max())
    tops, fractions = np.meshgrid(30.0 * points, points, indexing="ij")
    exact = float((weight * tops * fractions).sum() / weight.sum())
    t_test_chain_means(samples["precision"], exact).raise_if_failed()


# --- Refusals ----------------------------------------------------------------------------------------------------------


def start(model, *args, **settings):
    return Exchange(model, **settings).init(jax.random.key(0), 10, None, args, {})


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"inner_steps": 3}, ValueError, "inner_kernel: got None with inner_steps=3"),
        ({"num_bridges": 3}, ValueError, "inner_kernel: got None with inner_steps=None and num_bridges=3"),
        ({"inner_kernel": kernels.mala(step_size=0.1)}, ValueError, "inner_steps: got None with an inner_kernel"),
        ({"inner_steps": 0}, ValueError, "inner_steps: got 0, expected a whole number >= 1"),
        ({"num_bridges": -1}, ValueError, "num_bridges: got -1, expected a whole number >= 0"),
        ({"num_bridges": 1.5}, TypeError, "num_bridges: got 1.5"),
        ({"sites": "theta"}, ValueError, "sites: got 'theta', expected a sequence"),
        ({"sites": []}, ValueError, r"sites: got \[\], expected a sequence"),
        ({"step_size": 0.0}, ValueError, "step_size: got 0.0, expected a finite number > 0"),
        ({"target_accept_prob": 1.0}, ValueError, "target_accept_prob: got 1.0"),
    ],
)
def test_contradictory_arguments(settings, error, text):
    with pytest.raises(error, match=text):
        Exchange(precision_model, **settings)


def test_the_model_must_be_callable():
    with pytest.raises(TypeError, match="model: got str, expected a NumPyro model"):
        Exchange("model")


def test_models_whose_normalizer_is_constant():
    def fixed():
        numpyro.sample("mu", dist.Normal())
        numpyro.sample("x", precision_ebm(0.0), obs=jnp.ones(1))

    def plain():
        numpyro.sample("mu", dist.Normal())

    def known():
        mu = numpyro.sample("mu", dist.Normal())
        numpyro.sample("x", ebm.EBM(lambda x: mu * jnp.sum(x), VECTOR, log_normalizer=mu), obs=jnp.ones(1))

    with pytest.raises(
        UnknownNormalizerError, match=r"none of its EBM sites \['x'\] depends on a latent site.*constant_no"
    ):
        start(fixed)
    for model in (plain, known):
        with pytest.raises(UnknownNormalizerError, match="it has no EBM site that depends on a latent site"):
            start(model)


def test_latent_sites_that_nothing_would_move():
    with pytest.raises(
        ValueError, match=r"\['mu'\] would never move: the block is \['log_precision'\].*Compose: Gibbs"
    ):
        start(nuisance_model, DATA, EXTRA)
    with pytest.raises(ValueError, match=r"\['log_precision'\] would never move: the block is \['mu'\]"):
        start(nuisance_model, DATA, EXTRA, sites=["mu"])
    with pytest.raises(ValueError, match=r"sites: got \['nu'\], expected latent sample sites of the model"):
        start(nuisance_model, DATA, EXTRA, sites=["nu"])


def test_discrete_latent_sites():
    def model():
        k = numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3))
        numpyro.sample("x", precision_ebm(0.5 * k), obs=jnp.ones(1))

    with pytest.raises(ValueError, match="site 'k' is discrete, expected continuous sites"):
        start(model)


def test_a_subsampled_or_scaled_site():
    def subsampled(x):
        log_precision = numpyro.sample("log_precision", dist.Normal())
        with numpyro.plate("rows", 100, subsample_size=10) as index:
            numpyro.sample("x", precision_ebm(log_precision), obs=x[index])

    with pytest.raises(UnknownNormalizerError, match=r"site 'x': its log density is scaled by 10.0"):
        start(subsampled, DATA)
    with pytest.raises(UnknownNormalizerError, match=r"site 'x': its log density is scaled by 2.0"):
        start(handlers.scale(precision_model, 2.0), DATA)


def test_a_normalizer_that_counts_a_random_number_of_times():
    def mixture():
        log_precision = numpyro.sample("log_precision", dist.Normal())
        parts = [precision_ebm(log_precision), dist.Normal().expand([1]).to_event(1)]
        weights = dist.Categorical(jnp.array([0.4, 0.6]))
        numpyro.sample("x", dist.MixtureGeneral(weights, parts, support=constraints.real_vector), obs=jnp.ones(1))

    def masked():
        log_precision = numpyro.sample("log_precision", dist.Normal())
        numpyro.sample("x", precision_ebm(log_precision).mask(log_precision > 0), obs=jnp.ones(1))

    for model in (mixture, masked):
        with pytest.raises(UnknownNormalizerError, match=r"how often its log Z counts depends on \{log_precision\}"):
            start(model)


@pytest.mark.parametrize("is_carried", [False, True])
def test_an_ebm_inside_a_scan(is_carried):
    def model(x):
        log_precision = numpyro.sample("log_precision", dist.Normal())

        def body(carry, x):
            numpyro.sample("x", precision_ebm(carry if is_carried else log_precision), obs=x)
            return carry, None

        scan(body, log_precision, x)

    with pytest.raises(UnknownNormalizerError, match=r"site 'x': it is inside numpyro.contrib.control_flow.scan"):
        start(model, DATA)


def test_auxiliary_data_need_a_source():
    model = functools.partial(precision_model, has_sampler=False)
    with pytest.raises(NotImplementedError, match=r"site 'x' has no sampler.*inner_kernel=ebm_ppl.kernels.mala"):
        start(model, DATA)


def test_chains_from_the_base_are_no_exact_sampler():
    model = functools.partial(precision_model, has_sampler=False)
    simulated = simulate(model, kernel=kernels.mala(step_size=0.1), num_steps=30)
    with pytest.raises(ValueError, match="sampler of site 'x' runs chains from the base"):
        start(simulated, DATA)


def test_inner_kernels_need_an_accept_step():
    kernel = kernels.unadjusted_langevin(step_size=0.1)
    with pytest.raises(ValueError, match="inner_kernel: got a kernel without an accept step for site 'x'"):
        start(precision_model, DATA, inner_kernel=kernel, inner_steps=3)


def test_bridges_on_the_sphere():
    def model(x):
        kappa = numpyro.sample("kappa", dist.Gamma(2.0, 1.0))
        flat = dist.ImproperUniform(constraints.sphere, (), (3,))
        numpyro.sample("x", ebm.EBM(lambda x: -kappa * x[0], flat), obs=x)

    kernel = kernels.mala(step_size=0.1)
    with pytest.raises(ValueError, match="num_bridges: site 'x' lives on the sphere"):
        start(model, jnp.array([1.0, 0.0, 0.0]), inner_kernel=kernel, inner_steps=5, num_bridges=2)


@pytest.mark.parametrize(
    ("bad", "text"),
    [(jnp.nan, "1 of 100 rows that are NaN or infinite, the first at index 3"), (-1.0, "outside the support")],
)
def test_bad_data(bad, text):
    with pytest.raises(ValueError, match=f"observed data of site 'x'.*{text}"):
        start(rate_model, jnp.abs(DATA[:, 0]).at[3].set(bad), inner_kernel=kernels.mala(step_size=0.1), inner_steps=1)


def test_initial_values_must_be_those_of_the_block():
    with pytest.raises(
        ValueError, match=r"init_params: got sites \['nu'\], expected those of the block: \['log_precision'\]"
    ):
        Exchange(precision_model).init(jax.random.key(0), 10, {"nu": jnp.zeros(())}, (DATA,), {})


def test_supports_that_move_with_other_blocks():
    model = constant_normalizer(dynamic_model, given=["precision"])
    kernel = Gibbs([(Exchange(model), ["precision"]), (NUTS(model), ["top"])])
    with pytest.raises(ValueError, match=r"the supports of \['precision'\] have bounds that may depend on other sites"):
        kernel.init(jax.random.key(0), 10, None, (DATA[:, 0],), {})


def test_the_gibbs_function_needs_a_step_size():
    with pytest.raises(ValueError, match="step_size: got None, expected a number: gibbs_fn has no warm-up"):
        Exchange(nuisance_model).gibbs_fn(DATA, EXTRA)


def test_the_other_block_may_not_move_what_the_normalizer_depends_on():
    model = constant_normalizer(nuisance_model, given=["log_precision"])
    with pytest.raises(UnknownNormalizerError, match="needs log Z"):
        NUTS(model).init(jax.random.key(0), 10, None, (DATA, EXTRA), {})


def test_sampling_before_initialisation():
    with pytest.raises(RuntimeError, match="init must be called before sample"):
        Exchange(precision_model).sample(None, (), {})


@pytest.mark.slow
def test_blocks_of_other_kinds_compose():
    """A discrete latent in the same model is another block's business."""

    def model(x):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        log_precision = numpyro.sample("log_precision", dist.Normal(2.0 * k, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", precision_ebm(log_precision), obs=x)

    shared = constant_normalizer(model, given=["log_precision"])
    kernel = Gibbs([(Exchange(shared), ["log_precision"]), (DiscreteGibbs(shared), ["k"])])
    state = kernel.init(jax.random.key(0), 10, None, (DATA,), {})
    state = kernel.sample(state, (DATA,), {})
    assert jnp.isfinite(state.z["log_precision"])
