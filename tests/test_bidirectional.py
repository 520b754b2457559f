"""Reverse annealing and the two-sided bound of bidirectional Monte Carlo, on every target with exact draws."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
from jax.tree_util import Partial
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl import kernels, targets
from ebm_ppl.normalizer import (
    LogNormalizer,
    LogNormalizerBounds,
    annealed_importance,
    bidirectional,
    lower_confidence_bound,
    reverse_annealed_importance,
    reverse_importance,
    unconstrained,
)
from ebm_ppl.testing import ALPHA, CHECKS, binomial_test, t_test_chain_means

# Most of the time here is XLA's. Values do not depend on how hard it tries.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def wide_normal(shape, scale=3.0):
    return dist.Normal(0.0, scale).expand(shape).to_event(len(shape))


REFERENCES = {
    "dirichlet": dist.Dirichlet(jnp.ones(3)),
    "gamma": dist.Gamma(1.0, 0.5),
    "truncated_normal": dist.Uniform(-1.0, 2.0),
    "grid25": wide_normal((2,), 5.0),
    "student_t": dist.StudentT(2.0, 0.0, 2.0),
    "gumbel": dist.Logistic(0.0, 2.0),
}
"""Where annealing starts; a wide normal distribution for the others."""


class Problem(NamedTuple):
    """An EBM with its exact log Z and exact draws, and how to anneal it."""

    ebm: Any
    reference: Any
    kernel: Any
    log_normalizer: float
    sample: Any


def continuous(name):
    target = targets.get(name)
    reference = REFERENCES.get(name, wide_normal(target.event_shape))
    kernel = kernels.mala(step_size=0.1)
    return Problem(ebm.EBM(target.potential, target.base), reference, kernel, target.log_normalizer, target.sample)


def discrete(name):
    """Spins are bits here: NumPyro has no support for the former."""
    target = targets.get_discrete(name)
    is_spin, largest = target.values[0] == -1, target.values[-1]
    energy = (lambda bits: target.potential(2 * bits - 1)) if is_spin else target.potential
    support = constraints.integer_interval(0, largest) if largest > 1 else constraints.boolean
    base = dist.ImproperUniform(support, (), target.event_shape)
    logits = jnp.zeros((*target.event_shape, largest + 1))
    sites: Any = dist.Categorical(logits=logits) if largest > 1 else dist.Bernoulli(0.5).expand(target.event_shape)
    reference = sites.to_event(len(target.event_shape))

    def sample(key, n):
        return (target.sample(key, n).astype(int) + is_spin) // (1 + is_spin)

    kernel = kernels.gibbs("random", values=tuple(range(largest + 1)))
    return Problem(ebm.EBM(energy, base), reference, kernel, target.log_normalizer, sample)


def problem(name):
    return discrete(name) if name in targets.discrete_names() else continuous(name)


RUNS, PARTICLES = 64, 50


def bounds_of(name, key, *, num_temperatures=30, samples=None, **options):
    """``RUNS`` independent two-sided bounds of one target, and its exact log Z."""
    found = problem(name)
    options = {"reference": found.reference, "kernel": found.kernel, **options}
    sample_key, run_key = jax.random.split(key)
    if samples is None:
        samples = found.sample(sample_key, RUNS * PARTICLES)
    samples = samples.reshape(RUNS, PARTICLES, *samples.shape[1:])

    def run(key, samples):
        return bidirectional(
            key, found.ebm, samples, num_particles=PARTICLES, num_temperatures=num_temperatures, **options
        )

    return fast_jit(jax.vmap(run))(jax.random.split(run_key, RUNS), samples), found.log_normalizer


def count_misses(bounds, log_normalizer):
    """Runs whose bounds do not bracket the exact value, below and above; NaN is a miss."""
    return int((~(bounds.lower <= log_normalizer)).sum()), int((~(bounds.upper >= log_normalizer)).sum())


def allowed_misses(probability, runs=RUNS):
    """So many misses or fewer have a probability of at least ``1 - ALPHA`` where each has at most ``probability``."""
    CHECKS.record(ALPHA)
    return int(scipy.stats.binom(runs, probability).isf(ALPHA))


def check_bracket(bounds, log_normalizer):
    below, above = count_misses(bounds, log_normalizer)
    assert below <= allowed_misses(0.025)
    assert above <= allowed_misses(0.025)


FEW = ("gamma", "ising_3x3")
OTHERS = sorted({*targets.names(), *targets.discrete_names()} - set(FEW))


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_the_two_sided_bound_brackets_the_exact_value(name, key):
    bounds, log_normalizer = bounds_of(name, key)
    check_bracket(bounds, log_normalizer)
    if name in FEW:
        # The two estimates themselves are no bounds, and the check has the power to say so. (On hard targets they are: few
        # temperatures leave each so far on its own side that it never crosses.)
        with pytest.raises(AssertionError):
            check_bracket(bounds._replace(lower=bounds.forward.value, upper=bounds.reverse.value), log_normalizer)
    assert np.isfinite(bounds.upper - bounds.lower).all()
    assert (bounds.lower <= bounds.upper).all()
    assert bounds.reliable.mean() > 0.9


# --- what the same check catches -----------------------------------------------------------------------------------


def without_jacobian(constrain):
    def constrain_only(ebm, position):
        event, log_jacobian = constrain(ebm, position)
        return event, jnp.zeros_like(log_jacobian)

    return constrain_only


def forwards(anneal_rows):
    def anneal_forwards(*args, is_reversed):
        return anneal_rows(*args, is_reversed=False)

    return anneal_forwards


def log_mean(log_weight, confidence):
    return jax.nn.logsumexp(log_weight, axis=0) - math.log(log_weight.shape[0])


FAULTS = {
    "no Jacobian": lambda patch: patch.setattr(unconstrained, "constrain", without_jacobian(unconstrained.constrain)),
    "upwards both times": lambda patch: patch.setattr(
        reverse_importance, "anneal_rows", forwards(reverse_importance.anneal_rows)
    ),
    "no accept step": lambda patch: None,
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_faults_of_the_bounds_are_caught(fault, key, monkeypatch):
    FAULTS[fault](monkeypatch)
    options: dict[str, Any] = {}
    if fault == "no accept step":
        options["kernel"] = kernels.unadjusted_langevin(step_size=0.4)
    name = "gaussian_mixture" if fault == "upwards both times" else "gamma"  # 1 / Z is no bound where Z > 1
    bounds, log_normalizer = bounds_of(name, key, **options)
    with pytest.raises(AssertionError):
        check_bracket(bounds, log_normalizer)
    if options:
        assert not bounds.reliable.any()


@pytest.mark.slow
def test_samples_of_one_mode_are_no_bound_and_are_flagged(key):
    """The left mode has 30 % of the mass, and most of the reference's; annealing from that finds the other."""
    found = continuous("gaussian_mixture")
    samples = found.sample(key, 8000)
    options = {"reference": dist.Normal(-2.0, 2.0), "kernel": kernels.mala(step_size=1e-3), "num_temperatures": 10}
    run = fast_jit(lambda samples: bidirectional(key, found.ebm, samples, num_particles=2000, **options))
    biased, good = run(samples[samples < -0.5][:2000]), run(samples[:2000])
    assert biased.upper < found.log_normalizer < good.upper
    assert good.lower < found.log_normalizer
    assert good.reliable
    assert not biased.reliable


# --- the one-sided bound -------------------------------------------------------------------------------------------

fast_bound = fast_jit(lower_confidence_bound, static_argnums=1)

WEIGHTS = {
    "lognormal": lambda rng, shape: rng.normal(size=shape) - 0.5,
    "heavy lognormal": lambda rng, shape: 3.0 * rng.normal(size=shape) - 4.5,
    "infinite variance": lambda rng, shape: -0.8 * np.log(rng.uniform(size=shape)) + math.log(0.2),
    "rare": lambda rng, shape: np.where(rng.uniform(size=shape) < 0.02, math.log(50.0), -np.inf),
    "common": lambda rng, shape: np.where(rng.uniform(size=shape) < 0.9, -math.log(0.9), -np.inf),
    "nearly equal": lambda rng, shape: 0.01 * rng.normal(size=shape) - 0.5e-4,
}
"""Log weights of mean one."""


def coverage_problem(bound, size, confidence=0.9, runs=1000):
    """Names of laws of weights under which a bound misses more often than it says."""
    rng = np.random.default_rng(size)
    found = []
    for name, draw in WEIGHTS.items():
        log_weight = draw(rng, (size, runs)).astype(np.float32)
        misses = int((~(np.asarray(bound(jnp.asarray(log_weight), confidence)) <= 0.0)).sum())
        if misses > runs * (1 - confidence) and not binomial_test(misses, runs, 1 - confidence, name=name).passed:
            found.append(name)
    return found


def normal_bound(log_weight, confidence):
    """What a standard error would give."""
    weight = jnp.exp(log_weight)
    error = jnp.std(weight, axis=0, ddof=1) / math.sqrt(len(log_weight))
    return jnp.log(jnp.maximum(jnp.mean(weight, axis=0) - scipy.stats.norm.ppf(confidence) * error, 0.0))


def geometric_bound(log_weight, confidence):
    """Markov's inequality for all weights at once, with the sign of its margin wrong."""
    return jnp.mean(log_weight, axis=0) - math.log(1 - confidence) / len(log_weight)


@pytest.mark.parametrize("size", [1, 2, 30, pytest.param(300, marks=pytest.mark.slow)])
def test_the_one_sided_bound_holds_for_weights_of_any_law(size):
    assert coverage_problem(fast_bound, size) == []


def test_wrong_bounds_are_caught_by_the_same_check():
    assert "nearly equal" in coverage_problem(normal_bound, 2)
    assert coverage_problem(geometric_bound, 30) != []
    assert coverage_problem(log_mean, 300) != []


def test_the_one_sided_bound_is_tight_where_weights_are_good():
    """As the docstring says: for small variance the margin is that of a normal law with two nats less of probability."""
    log_weight = 0.1 * np.random.default_rng(0).normal(size=(1000, 50)).astype(np.float32)
    bound, looser = (fast_bound(jnp.asarray(log_weight), confidence) for confidence in (0.975, 0.5))
    margin = np.log(np.exp(log_weight).mean(axis=0)) - bound
    np.testing.assert_allclose(margin.mean(), 0.1 * math.sqrt(2 * (2 - math.log(0.025)) / 1000), rtol=0.15)
    assert (looser > bound).all()


def test_the_one_sided_bound_says_what_it_cannot_do():
    log_weight = jnp.stack(
        [jnp.full(30, -jnp.inf), jnp.zeros(30).at[3].set(jnp.nan), jnp.zeros(30).at[3].set(jnp.inf)], 1
    )
    found = fast_bound(log_weight, 0.95)
    assert found[0] == -np.inf
    assert np.isnan(found[1:]).all()
    for confidence in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"confidence: got .*, expected a probability strictly between 0 and 1"):
            lower_confidence_bound(log_weight, confidence)
    with pytest.raises(ValueError, match=r"log_weight: got shape \(0,\)"):
        lower_confidence_bound(jnp.zeros(0))
    assert (fast_jit(jax.grad(lower_confidence_bound))(jnp.arange(5.0)) == 0.0).all()
    with jax.enable_x64(True):
        assert jax.eval_shape(lower_confidence_bound, jnp.zeros(3)).dtype == jnp.float64


# --- reverse annealing ---------------------------------------------------------------------------------------------

REPLICATES = 256
SHAPE, RATE, TILT = 3.0, 2.0, 1.5
LOG_Z = -SHAPE * math.log1p(TILT / RATE)


def tilted_gamma(tilt=TILT):
    """Gamma(3, 2) tilted by ``tilt x``; ``Z = (1 + tilt / 2)^-3``, and the law is Gamma(3, 2 + tilt)."""
    return ebm.EBM(Partial(lambda tilt, x: tilt * x, tilt), dist.Gamma(SHAPE, RATE))


def ratios(key, *, sample=None, **options):
    """``Z / Z estimate`` of independent reverse annealings, and ``Z estimate / Z`` of forward ones."""
    options = {"reference": dist.Gamma(3.0, 3.0), "kernel": kernels.mala(step_size=0.4), **options}
    sample_key, *keys = jax.random.split(key, 3)
    samples = (sample or dist.Gamma(SHAPE, RATE + TILT).sample)(sample_key, (REPLICATES, 32))

    def run(keys, samples, tilt):
        site = tilted_gamma(tilt)
        down = reverse_annealed_importance(keys[0], site, samples, num_temperatures=4, **options)
        up = annealed_importance(keys[1], site, num_particles=32, num_temperatures=4, **options)
        return down.value, up.value

    keys = jnp.stack([jax.random.split(key, REPLICATES) for key in keys], axis=1)
    down, up = fast_jit(jax.vmap(run, in_axes=(0, 0, None)))(keys, samples, TILT)
    return np.exp(LOG_Z - np.asarray(down, float)), np.exp(np.asarray(up, float) - LOG_Z)


def test_reverse_weights_have_the_mean_one_over_z_and_forward_ones_z(key):
    down, up = ratios(key)
    for name, values in (("Z / reverse estimate", down), ("forward estimate / Z", up)):
        check = t_test_chain_means(values, 1.0, name=name).raise_if_failed()
        assert check.power < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["upwards both times", "samples of the reference", "no accept step"])
def test_faults_of_reverse_weights_are_caught(fault, key, monkeypatch):
    options = {}
    if fault == "no accept step":
        options["kernel"] = kernels.unadjusted_langevin(step_size=0.4)
    elif fault == "samples of the reference":
        options["sample"] = dist.Gamma(2.0, 1.0).sample
    else:
        FAULTS[fault](monkeypatch)
    assert not t_test_chain_means(ratios(key, **options)[0], 1.0, name=fault).passed


def test_the_gradient_of_a_reverse_estimate_is_that_of_the_samples(key):
    """Rows of a condition; without temperatures it is reciprocal importance sampling, known in closed form."""
    condition = jnp.array([-1.0, 0.0, 1.0])

    def rows(a):
        energy = lambda a, x, c: 0.5 * jnp.exp(a + c) * (x - c) ** 2
        return ebm.EBM(Partial(energy, a), dist.Normal(0.0, 2.0), condition=condition)

    def total(a, samples):
        options = {"kernel": kernels.mala(step_size=0.5), "num_temperatures": 0}
        found = reverse_annealed_importance(key, rows(a), samples, **options)
        return jnp.sum(found.value), found

    samples = jnp.linspace(-1.0, 1.5, 40)[:, None] + 0.3 * condition
    (slope, into), found = fast_jit(jax.grad(total, (0, 1), has_aux=True))(0.5, samples)
    energies = 0.5 * jnp.exp(0.5 + condition) * (samples - condition) ** 2
    np.testing.assert_allclose(found.value, -jax.nn.logsumexp(energies, axis=0) + math.log(40), rtol=1e-5)
    np.testing.assert_allclose(slope, -energies.mean(axis=0).sum(), rtol=1e-5)
    assert (into == 0.0).all()
    assert found.value.shape == found.reliable.shape == (3,)


@pytest.mark.slow
def test_reverse_annealing_on_the_circle_and_the_sphere(key):
    circle = ebm.EBM(lambda x: -2.0 * jnp.cos(x), dist.VonMises(0.0, 1.0))
    samples = dist.VonMises(0.0, 3.0).sample(key, (REPLICATES, 32))
    run = lambda key, samples: reverse_annealed_importance(
        key, circle, samples, kernel=kernels.mala(step_size=0.3), num_temperatures=4
    )
    values = np.asarray(fast_jit(jax.vmap(run))(jax.random.split(key, REPLICATES), samples).value, float)
    exact = np.log(scipy.special.i0(3.0) / scipy.special.i0(1.0))
    t_test_chain_means(np.exp(exact - values), 1.0, name="circle").raise_if_failed()
    sphere = ebm.EBM(lambda x: 2.0 + 0.0 * x[0], dist.ProjectedNormal(jnp.array([0.5, 0.0, 0.0])))
    samples = sphere.base.sample(key, (100,))
    found = reverse_annealed_importance(key, sphere, samples, kernel=kernels.mala(step_size=0.3), num_temperatures=4)
    np.testing.assert_allclose(found.value, -2.0, atol=1e-4)


def machine():
    """The 12 x 6 machine of the specification, written out."""
    rng = np.random.default_rng(0)
    weight, visible, hidden = 0.5 * rng.normal(size=(12, 6)), 0.2 * rng.normal(size=12), 0.2 * rng.normal(size=6)
    weight, visible, hidden = (jnp.asarray(x, jnp.float32) for x in (weight, visible, hidden))

    def energy(v):
        return -v @ visible - jnp.sum(jax.nn.softplus(v @ weight + hidden))

    return ebm.EBM(energy, dist.ImproperUniform(constraints.boolean, (), (12,)))


@pytest.mark.slow
def test_annealing_of_the_restricted_boltzmann_machine_agrees_with_enumeration(key):
    options = {"reference": dist.Bernoulli(0.5).expand([12]).to_event(1), "kernel": kernels.gibbs(values=(0, 1))}
    samples = targets.get_discrete("rbm_12x6").sample(key, 1500)
    found = bidirectional(key, machine(), samples, num_particles=1500, num_temperatures=40, **options)
    for estimate in (found.forward, found.reverse):
        assert abs(estimate.value - 15.8037367596) < 0.02
        assert estimate.reliable
        assert estimate.standard_error < 0.01
    assert found.lower < 15.8037367596 < found.upper < found.lower + 0.1
    assert found.reliable


def test_reverse_annealing_refuses_what_it_cannot_start_from(key):
    site, samples = tilted_gamma(), jnp.ones(10)
    run = functools.partial(reverse_annealed_importance, key, kernel=kernels.mala(step_size=0.1))
    with pytest.raises(ValueError, match=r"samples: got shape \(10, 1\), expected \(sample\): batch_shape"):
        run(site, samples[:, None])
    with pytest.raises(ValueError, match=r"samples: got 2 of 10 events NaN or infinite, the first at index 3"):
        run(site, samples.at[3].set(jnp.nan).at[5].set(jnp.inf))
    with pytest.raises(ValueError, match=r"samples: got 1 of 10 events outside the support, the first at index 4"):
        run(site, samples.at[4].set(-1.0))
    with pytest.raises(ValueError, match=r"samples: got 1 of 10 events on the edge of the support"):
        run(ebm.EBM(lambda x: x, dist.Uniform(0.0, 2.0)), samples.at[7].set(2.0))
    with pytest.raises(ValueError, match=r"samples: got shape \(1,\), expected at least 2"):
        run(site, samples[:1])
    with pytest.raises(TypeError, match=r"samples: got dtype int32, expected floating"):
        run(site, jnp.ones(10, int))
    with pytest.raises(ValueError, match=r"reference: .* mass outside the support"):
        run(site, samples, reference=dist.Normal(1.0, 2.0))
    with pytest.raises(ValueError, match=r"base: got ImproperUniform, which cannot be sampled"):
        run(machine(), jnp.zeros((10, 12), int))
    with pytest.raises(ValueError, match=r"num_temperatures: got -1"):
        run(site, samples, num_temperatures=-1)
    with pytest.raises(ValueError, match=r"confidence: got 2"):
        bidirectional(key, site, samples, kernel=kernels.mala(step_size=0.1), confidence=2)
    with pytest.raises(ValueError, match=r"num_particles: got 1"):
        bidirectional(key, site, samples, kernel=kernels.mala(step_size=0.1), num_particles=1)


def test_bounds_print_in_one_line_each():
    one = LogNormalizer(*map(jnp.asarray, (1.2341, 0.005, 812.0, jnp.nan, 7, True)))
    lower, upper, confidence, gap, reliable = map(jnp.asarray, (1.21, 1.26, 0.95, 0.004, True))
    bounds = LogNormalizerBounds(lower, upper, confidence, one, one, gap, reliable)
    text = "1.210 <= log Z <= 1.260 (confidence 0.95, upper if the samples are exact), gap 0.004"
    assert repr(bounds) == str(bounds) == text
    assert repr(bounds._replace(reliable=jnp.array(False))) == text + ", UNRELIABLE"
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3)), bounds)
    assert repr(rows).splitlines() == ["6 rows, 0 unreliable", *[text] * 3, "..."]
    printed = []
    jax.jit(lambda found: printed.append(repr(found)))(bounds)
    assert printed[0].startswith("LogNormalizerBounds(lower=")
