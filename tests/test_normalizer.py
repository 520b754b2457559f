"""log Z by integration, summation and annealing, against closed forms, and the faults that must not pass unseen."""

import functools
import itertools
import math
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.special
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from numpyro.distributions import constraints

import ebm_ppl as ebm
from ebm_ppl import kernels, targets
from ebm_ppl.info import step_info
from ebm_ppl.normalizer import (
    LogNormalizer,
    anneal,
    annealed_importance,
    annealed_particles,
    enumerate_states,
    importance,
    list_states,
    quadrature,
    result,
    unconstrained,
)
from ebm_ppl.testing import t_test_chain_means

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# Most of the time here is XLA's. Values do not depend on how hard it tries.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def improper(support=constraints.real, event_shape=()):
    return dist.ImproperUniform(support, (), event_shape)


def pull(log_precision, mean, x):
    return 0.5 * jnp.exp(log_precision) * jnp.sum((x - mean) ** 2)


BASE_MEAN, BASE_SD = 0.3, 1.5


def pulled_normal(log_precision, mean):
    """The base N(.3, 1.5^2) under the energy ``exp(lp) (x - mean)^2 / 2``."""
    return ebm.EBM(Partial(pull, log_precision, mean), dist.Normal(BASE_MEAN, BASE_SD))


def pulled_log_normalizer(log_precision, mean):
    """Its log Z, by completing the square on paper."""
    precision = jnp.exp(log_precision)
    shrink = 1.0 + precision * BASE_SD**2
    return -0.5 * jnp.log(shrink) - 0.5 * precision / shrink * (mean - BASE_MEAN) ** 2


def gaussian_row(x, condition):
    mean, sd = condition
    return 0.5 * ((x - mean) / sd) ** 2


def close(got, expected, **tolerance):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), **tolerance)


# --- quadrature ----------------------------------------------------------------------------------------------------


def _dimension(target):
    return math.prod(target._transform.inverse_shape(target.event_shape))


TARGETS = [name for name in targets.names() if _dimension(targets.get(name)) <= 2]
# Targets on one base share a compilation.
BASES = [
    ("double_well", "gaussian_mixture", "gumbel", "student_t"),
    ("banana", "gaussian", "grid25", "many_well", "ring", "tilted_normal"),
    *((name,) for name in ("dirichlet", "gamma", "gaussian_1", "truncated_normal")),
]


@functools.cache
def by_quadrature(names):
    base = targets.get(names[0]).base
    potentials = [targets.get(name).with_base(base).potential for name in names]

    def of(index):
        def potential(index, x):
            return jax.lax.switch(index, [lambda x, u=u: jnp.asarray(u(x), x.dtype) for u in potentials], x)

        return quadrature(ebm.EBM(Partial(potential, index), base))

    run = fast_jit(of)
    return {name: run(index) for index, name in enumerate(names)}


def test_every_target_of_one_or_two_dimensions_is_tried():
    assert sorted(name for names in BASES for name in names) == sorted(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_quadrature_of_targets(name):
    found = by_quadrature(next(names for names in BASES if name in names))[name]
    close(found.value, targets.get(name).log_normalizer, atol=1e-5)
    assert found.reliable
    assert found.standard_error < 1e-4
    assert found.value.shape == ()
    assert np.isnan(found.ess)
    assert found.num_gradients == 0


GAUSSIAN, TWO_WELLS, LOG_GAMMA, STUDENT = range(4)
SHAPES = [
    *((GAUSSIAN, *row) for row in [(0, 1), (30, 0.05), (0, 200), (-5e4, 3e3), (1e3, 1.0), (1e-3, 1e-6), (-7, 1e-3)]),
    *((TWO_WELLS, 30, scale) for scale in (0.05, 1.0)),
    *((LOG_GAMMA, 0, shape) for shape in (0.2, 1.0, 30.0, 300.0)),
    *((STUDENT, 3e3, degrees) for degrees in (1.0, 2.0, 30.0)),
]


def shape_energy(z, row):
    kind, location, parameter = row
    distance = z - location
    return jax.lax.select_n(
        kind,
        0.5 * (distance / parameter) ** 2,
        # The other mode, 2 location + 1 away, is as high.
        0.5 * (jnp.minimum(jnp.abs(distance), jnp.abs(z + location + 1.0)) / parameter) ** 2,
        jnp.exp(z) - parameter * z,
        0.5 * (parameter + 1) * jnp.log1p(distance**2 / parameter),
    )


def shape_log_normalizer(kind, location, parameter):
    student = math.lgamma(parameter / 2) - math.lgamma((parameter + 1) / 2) + 0.5 * math.log(math.pi * parameter)
    gaussian = HALF_LOG_2PI + math.log(parameter)
    return {
        GAUSSIAN: gaussian, TWO_WELLS: math.log(2) + gaussian, LOG_GAMMA: math.lgamma(parameter), STUDENT: student
    }[kind]  # fmt: skip


def test_quadrature_finds_any_location_scale_and_tail():
    """One row each: Gaussians, two modes far apart, logs of Gamma variates, and tails down to Cauchy's."""
    kind, location, parameter = np.array(SHAPES).T
    rows = kind.astype(np.int32), location.astype(np.float32), parameter.astype(np.float32)
    found = fast_jit(lambda *rows: quadrature(ebm.EBM(shape_energy, improper(), condition=rows)))(*rows)
    assert found.value.shape == (len(SHAPES),)
    close(found.value, [shape_log_normalizer(*row) for row in SHAPES], rtol=3e-7, atol=5e-5)
    assert found.reliable.all()


def test_quadrature_of_a_circle_is_over_one_turn():
    def mean_direction(x, condition):
        concentration, mode = condition
        return -concentration * jnp.cos(x - mode)

    concentration, mode = jnp.array([4.0, 4.0, 1e3]), jnp.array([0.3, math.pi, math.pi])
    run = fast_jit(lambda *rows: quadrature(ebm.EBM(mean_direction, improper(constraints.circular), condition=rows)))
    found = run(concentration, mode)
    exact = np.log(2 * np.pi * scipy.special.ive(0, concentration)) + concentration
    assert abs(exact[0] - 4.2628498619) < 1e-6
    close(found.value, exact, rtol=1e-6)
    assert found.reliable.all()


@pytest.mark.slow
@pytest.mark.parametrize(("support", "atol"), [(constraints.circular, 1e-5), (constraints.sphere, 1e-3)])
def test_quadrature_of_the_torus_and_the_ambient_circle(support, atol):
    if support is constraints.circular:
        energy = lambda x: -2 * jnp.cos(x[0]) - 3 * jnp.cos(x[1]) - 1.5 * jnp.cos(x[0] - x[1])
        turn = np.linspace(-np.pi, np.pi, 401)[:-1]
        density = np.exp(2 * np.cos(turn)[:, None] + 3 * np.cos(turn) + 1.5 * np.cos(turn[:, None] - turn))
        exact = np.log(density.mean() * 4 * np.pi**2)
    else:
        energy, exact = (lambda x: -4.0 * x[0]), 4.2628498619
    found = quadrature(ebm.EBM(energy, improper(support, (2,))))
    assert found.reliable
    close(found.value, exact, atol=atol)


def test_quadrature_of_rows_is_row_by_row():
    cs = jnp.linspace(-1.0, 1.0, 7)

    def energy(a, b, w, x, c):
        return 0.5 * jnp.exp(a + b * c) * (x - w * c) ** 2

    def total(a, b, w):
        found = quadrature(ebm.EBM(Partial(energy, a, b, w), improper(), condition=cs))
        return jnp.sum(found.value * jnp.arange(7.0)), found

    gradient, found = fast_jit(jax.jacfwd(total, (0, 1, 2), has_aux=True))(0.5, 1.0, 1.5)
    close(found.value, HALF_LOG_2PI - 0.5 * (0.5 + cs), atol=1e-5)
    close(gradient, (-0.5 * 21.0, -0.5 * jnp.sum(jnp.arange(7.0) * cs), 0.0), atol=1e-4)


def test_memory_is_bounded_by_blocks_that_change_nothing(monkeypatch):
    monkeypatch.setattr(sys.modules["ebm_ppl.normalizer.quadrature"], "MAX_EVENTS", 100)
    mean, sd = jnp.array([0.0, 2.0]), jnp.array([1.0, 0.1])

    def total(scale):
        condition = mean, scale * sd
        return quadrature(ebm.EBM(gaussian_row, improper(), condition=condition), num_nodes=60).value.sum()

    value, gradient = fast_jit(jax.value_and_grad(total))(1.0)
    close(value, 2 * HALF_LOG_2PI + math.log(0.1), atol=1e-5)
    close(gradient, 2.0, rtol=1e-4)


def test_gradient_of_quadrature_through_a_closure_in_double_precision():
    """Under jit and vmap; the leaves of an EBM, and forward mode, are the business of the rows."""

    def of(parameters):
        return quadrature(ebm.EBM(lambda x: pull(*parameters, x), dist.Normal(BASE_MEAN, BASE_SD))).value

    with jax.enable_x64(True):
        parameters = jnp.array([[1.0, 2.0], [6.0, 30.0]])
        exact = jax.vmap(jax.value_and_grad(lambda p: pulled_log_normalizer(*p)))(parameters)
        value, gradient = fast_jit(jax.vmap(jax.value_and_grad(of)))(parameters)
        close(value, exact[0], rtol=1e-12)
        close(gradient, exact[1], rtol=1e-8)


def test_rows_of_a_base_and_the_gradient_with_respect_to_the_edge_of_its_support():
    def total(widths):
        edges = constraints.interval(jnp.zeros(()), widths)
        value = quadrature(ebm.EBM(lambda x: x, dist.ImproperUniform(edges, widths.shape, ()))).value
        return value.sum(), value

    widths = jnp.array([[0.5, 2.0, 4.0]])
    gradient, value = fast_jit(jax.grad(total, has_aux=True))(widths)
    close(value, np.log(1 - np.exp(-widths)), atol=1e-5)
    close(gradient, 1 / np.expm1(widths), rtol=1e-4)


HOPELESS = {
    "flat": lambda x: 0.0 * x,
    "growing": lambda x: -(x**2),
    "one over x": lambda x: jnp.log1p(jnp.abs(x)),
    "cut off": lambda x: jnp.where(x > 0, x, jnp.inf),
    "nan": lambda x: jnp.where(x > 0, x, jnp.nan),
    "all nan": lambda x: x * jnp.nan,
    "all infinite": lambda x: 0.0 * x + jnp.inf,
    "large": lambda x: 0.5 * x**2 + 1e5,
}


@functools.cache
def by_quadrature_of_the_hopeless():
    def of(index):
        potential = Partial(lambda index, x: jax.lax.switch(index, list(HOPELESS.values()), x), index)
        return quadrature(ebm.EBM(potential, improper()), num_nodes=120)

    run = fast_jit(of)
    return {name: run(index) for index, name in enumerate(HOPELESS)}


@pytest.mark.parametrize("name", HOPELESS)
def test_quadrature_says_what_it_cannot_do(name):
    found = by_quadrature_of_the_hopeless()[name]
    assert not found.reliable
    assert found.standard_error > 1e-3
    assert "UNRELIABLE" in repr(found)
    assert name not in ("nan", "all nan") or np.isnan(found.value)


def test_rounding_of_a_large_energy_is_counted_as_error():
    found = by_quadrature_of_the_hopeless()["large"]
    assert abs(found.value - (HALF_LOG_2PI - 1e5)) < 2 * found.standard_error < 0.05


def test_quadrature_refuses_what_it_cannot_integrate():
    with pytest.raises(ValueError, match=r"shape \(3,\) with 3 unconstrained dimensions.*annealed_importance"):
        quadrature(ebm.EBM(jnp.sum, dist.Normal(0.0, 1.0).expand([3]).to_event(1)))
    with pytest.raises(TypeError, match=r"discrete support.*enumerate_states"):
        quadrature(ebm.EBM(lambda x: 1.0 * x, dist.Bernoulli(0.5)))
    with pytest.raises(ValueError, match=r"num_nodes: got 3, expected a whole number >= 15"):
        quadrature(pulled_normal(0.0, 0.0), num_nodes=3)


# --- enumeration ---------------------------------------------------------------------------------------------------


def ising(coupling, bits):
    """Periodic Ising energy of bits, ``s = 2 b - 1``."""
    spins = 2.0 * bits - 1.0
    return -coupling * sum(jnp.sum(spins * jnp.roll(spins, 1, axis)) for axis in range(spins.ndim))


def potts(strength, colours):
    """Periodic Potts energy."""
    return -strength * sum(jnp.sum(colours == jnp.roll(colours, 1, axis)) for axis in range(colours.ndim))


@pytest.mark.parametrize(
    ("coupling", "log_normalizer"), [(0.2, 11.7714703585), (0.44, 15.5047265387), (0.6, 20.0565328843)]
)
def test_enumeration_of_ising(coupling, log_normalizer):
    found = enumerate_states(ebm.EBM(Partial(ising, jnp.float32(coupling)), improper(constraints.boolean, (4, 4))))
    close(found.value, log_normalizer, rtol=1e-6)
    assert found.reliable
    assert found.standard_error == 0.0


def test_enumeration_of_ising_in_a_field():
    def energy(bits):
        return ising(0.4, bits) - 0.1 * jnp.sum(2.0 * bits - 1.0)

    close(enumerate_states(ebm.EBM(energy, improper(constraints.boolean, (3, 3)))).value, 8.7312006802, rtol=1e-6)


def test_enumeration_of_potts_against_the_counting_measure_and_a_normalised_base():
    energy = Partial(potts, jnp.float32(0.8))
    counting = ebm.EBM(energy, improper(constraints.integer_interval(0, 2), (3, 3)))
    uniform = ebm.EBM(energy, dist.Categorical(logits=jnp.zeros(3)).expand([3, 3]).to_event(2))
    close(enumerate_states(counting).value, 16.7400765317, rtol=1e-6)
    close(enumerate_states(uniform).value, 16.7400765317 - 9 * math.log(3), rtol=1e-6)


def test_enumeration_of_either_side_of_a_restricted_boltzmann_machine():
    rng = np.random.default_rng(0)
    weight, visible, hidden = 0.5 * rng.normal(size=(12, 6)), 0.2 * rng.normal(size=12), 0.2 * rng.normal(size=6)
    with jax.enable_x64(True):
        weight, visible, hidden = map(jnp.asarray, (weight, visible, hidden))
        of_visible = lambda v: -v @ visible - jnp.sum(jax.nn.softplus(hidden + v @ weight))
        of_hidden = lambda h: -h @ hidden - jnp.sum(jax.nn.softplus(visible + weight @ h))
        found = [
            enumerate_states(ebm.EBM(energy, improper(constraints.boolean, (size,)))).value
            for energy, size in ((of_visible, 12), (of_hidden, 6))
        ]
        close(found, 15.8037367596, atol=1e-10)
        close(found[0], found[1], atol=1e-10)


def test_enumeration_in_blocks_has_the_exact_gradient_and_as_many_rows_as_the_ebm():
    couplings = jnp.array([0.1, 0.7, 1.3])

    def total(couplings):
        rows = ebm.EBM(lambda bits, j: ising(j, bits), improper(constraints.boolean, (18,)), condition=couplings)
        value = enumerate_states(rows).value
        return jnp.sum(value * jnp.arange(1.0, 4.0)), value

    def exact(j):  # the two eigenvalues of the transfer matrix
        return jnp.logaddexp(18 * jnp.log(2 * jnp.cosh(j)), 18 * jnp.log(2 * jnp.sinh(j)))

    gradient, value = fast_jit(jax.grad(total, has_aux=True))(couplings)
    close(value, exact(couplings), rtol=1e-6)
    close(gradient, jnp.arange(1.0, 4.0) * jax.vmap(jax.grad(exact))(couplings), rtol=1e-5)


def test_states_are_all_different_and_in_order():
    states = list_states(ebm.EBM(lambda x: 1.0 * jnp.sum(x), improper(constraints.integer_interval(-1, 1), (2, 2))))
    assert states.shape == (81, 2, 2)
    assert [tuple(row) for row in states.reshape(81, 4).tolist()] == list(itertools.product((-1, 0, 1), repeat=4))


def test_values_of_discrete_bases():
    dice = ebm.EBM(lambda x: 1.0 * x, dist.DiscreteUniform(-2, 3))
    close(enumerate_states(dice).value, np.log(np.mean(np.exp(-np.arange(-2, 4)))), rtol=1e-5)
    close(enumerate_states(ebm.EBM(lambda x: 0.0 * x, dist.Binomial(7, 0.3))).value, 0.0, atol=1e-5)
    coins = ebm.EBM(lambda x: 1.0 * jnp.sum(x), dist.Bernoulli(jnp.array([[0.2, 0.3], [0.5, 0.9]])).to_event(1))
    probability = np.array([[0.2, 0.3], [0.5, 0.9]])
    close(enumerate_states(coins).value, np.log(1 - probability + probability * np.exp(-1)).sum(axis=1), rtol=1e-5)


def test_states_without_mass():
    """A hard constraint, in whole blocks and everywhere; its gradient is not NaN."""

    def of(strength, allowed):
        energy = lambda x: jnp.where(x[0] == allowed, strength * jnp.sum(x), jnp.inf)
        found = enumerate_states(ebm.EBM(energy, improper(constraints.boolean, (17,))))
        return found.value, found

    gradient, found = fast_jit(jax.grad(of, has_aux=True), static_argnums=1)(1.0, 1)
    close(found.value, 16 * math.log1p(math.exp(-1)) - 1, rtol=1e-6)
    close(gradient, -1 - 16 / (1 + math.e), rtol=1e-5)
    _, found = of(1.0, 2)
    assert found.value == -jnp.inf
    assert not found.reliable


def test_enumeration_refuses_what_it_cannot_list():
    with pytest.raises(ValueError, match=r"max_states: got 1048576.*1.09951e\+12 states.*annealed_importance"):
        enumerate_states(ebm.EBM(Partial(ising, 0.1), improper(constraints.boolean, (40,))))
    with pytest.raises(TypeError, match=r"continuous support.*quadrature"):
        enumerate_states(pulled_normal(0.0, 0.0))
    with pytest.raises(TypeError, match=r"states cannot be listed"):
        enumerate_states(ebm.EBM(lambda x: 1.0 * x, dist.Poisson(3.0)))
    with pytest.raises(ValueError, match=r"expected the same states for every row"):
        enumerate_states(ebm.EBM(lambda x: 1.0 * x, dist.Binomial(jnp.array([3, 4]), 0.5)))
    with pytest.raises(ValueError, match=r"bounds are traced"):
        jax.jit(lambda n: enumerate_states(ebm.EBM(lambda x: 1.0 * x, dist.Binomial(n, 0.5))).value)(3)


# --- annealing -----------------------------------------------------------------------------------------------------

REPLICATES, PARTICLES = 512, 32
TILT = 1.5


def tilted_gamma(tilt):
    """Gamma(3, 2) tilted by ``tilt x``; ``Z = (1 + tilt / 2)^-3``."""
    return ebm.EBM(Partial(lambda tilt, x: tilt * x, tilt), dist.Gamma(3.0, 2.0))


def replicated_weights(key, **options):
    """Log weights over Z of independent annealings, ``(replicate, particle)``, from a reference that is not the base."""
    options = {"reference": dist.Gamma(2.0, 1.0), "kernel": kernels.mala(step_size=0.4), **options}

    def one(key, tilt):
        ebm = tilted_gamma(tilt)
        return annealed_particles(key, ebm, num_particles=PARTICLES, num_temperatures=4, **options).log_weight

    log_weight = fast_jit(jax.vmap(one, in_axes=(0, None)))(jax.random.split(key, REPLICATES), TILT)
    return np.asarray(log_weight, np.float64) + 3 * math.log1p(TILT / 2)


def problems(log_weight, name):
    """What contradicts E[Ẑ] = Z, or its consequence E[log Ẑ] <= log Z, which heavy tails do not hide."""
    ratios = np.exp(log_weight).mean(axis=1)
    mean = t_test_chain_means(ratios, 1.0, name=f"{name}: E[Z] / Z")
    log_mean = t_test_chain_means(np.log(ratios), 0.0, name=f"{name}: E[log Z]")
    is_above = not log_mean.passed and bool(np.log(ratios).mean() > 0)
    return [str(mean)] * (not mean.passed) + [str(log_mean)] * is_above


def test_annealing_is_unbiased(key):
    log_weight = replicated_weights(key)
    assert problems(log_weight, "annealing") == []
    assert np.exp(log_weight).mean(axis=1).std() / math.sqrt(REPLICATES) < 0.01  # a bias of a few per cent would show
    assert problems(-log_weight, "reversed") != []


def flip(potential):
    """A population kernel on bits: every coordinate in turn proposes to flip."""

    def init(position, rng_key=None):
        return _Bits(position)

    def step(rng_key, state):
        def visit(bits, inputs):
            key, coordinate = inputs
            proposal = bits.at[:, coordinate].set(1 - bits[:, coordinate])
            log_ratio = jax.vmap(potential)(bits) - jax.vmap(potential)(proposal)
            accept = jnp.log(jax.random.uniform(key, log_ratio.shape)) < log_ratio
            return jnp.where(accept[:, None], proposal, bits), accept

        bits, size = state.position, state.position.shape[1]
        bits, accept = jax.lax.scan(visit, bits, (jax.random.split(rng_key, size), jnp.arange(size)))
        return _Bits(bits), step_info(bits.shape[0], acceptance_rate=accept.mean(axis=0))

    return SamplingAlgorithm(init, step)


class _Bits(NamedTuple):
    position: jax.Array


def test_annealing_of_a_discrete_ebm(key):
    ring = ebm.EBM(Partial(ising, jnp.float32(0.7)), dist.Bernoulli(0.5).expand([10]).to_event(1))
    exact = enumerate_states(ring).value

    def one(key):
        return annealed_importance(key, ring, kernel=flip, num_particles=16, num_temperatures=10).value

    values = fast_jit(jax.vmap(one))(jax.random.split(key, 256))
    t_test_chain_means(np.exp(np.asarray(values - exact)), 1.0, name="E[Z estimate] / Z").raise_if_failed()


def unbiased(log_weight, log_normalizer, name):
    """Particles are independent, and the mean of each one's weight is Z."""
    t_test_chain_means(np.exp(np.asarray(log_weight - log_normalizer, np.float64)), 1.0, name=name).raise_if_failed()


def test_annealing_of_rows_and_its_gradient(key):
    """Rows of a condition; the gradient is the weighted mean of that of ``log base - U`` over the particles."""
    condition = jnp.array([-1.0, 0.0, 1.0])
    options = {"kernel": kernels.mala(step_size=0.5), "num_particles": 1000, "num_temperatures": 20}

    def rows(a):
        energy = lambda a, x, c: 0.5 * jnp.exp(a + c) * (x - c) ** 2
        return ebm.EBM(Partial(energy, a), dist.Normal(0.0, 2.0), condition=condition)

    def total(a):
        found = annealed_importance(key, rows(a), **options)
        return jnp.sum(found.value), (found, annealed_particles(key, rows(a), **options))

    gradient, (found, particles) = fast_jit(jax.grad(total, has_aux=True))(0.5)
    shrink = 1.0 + 4.0 * jnp.exp(0.5 + condition)
    exact = -0.5 * jnp.log(shrink) - 0.5 * (shrink - 1.0) / shrink * condition**2 / 4.0
    assert found.reliable.all()
    assert found.value.shape == found.num_gradients.shape == (3,)
    assert (found.num_gradients == 1000 * 20 * 2).all()  # each temperature starts afresh, for one gradient more
    close(jax.nn.logsumexp(particles.log_weight, axis=0) - math.log(1000), found.value, atol=1e-5)
    unbiased(particles.log_weight[:, 0], exact[0], "first row")
    unbiased(particles.log_weight[:, 2], exact[2], "last row")
    weight = jax.nn.softmax(particles.log_weight, axis=0)
    slope = jax.vmap(jax.jacrev(lambda a, x: rows(a).unnormalized_log_prob(x)), (None, 0))(0.5, particles.position)
    close(gradient, jnp.sum(weight * slope), rtol=1e-4)


def test_rows_of_a_base_are_annealed_one_by_one(key):
    mean = jnp.array([[0.0, 0.5, 1.0], [1.5, 2.0, 2.5]])

    def run(centre):
        rows = ebm.EBM(Partial(pull, 0.0, centre), dist.Normal(mean, 0.5))
        options = {"kernel": kernels.mala(step_size=0.2), "num_particles": 500, "num_temperatures": 10}
        return annealed_particles(key, rows, **options)

    particles = fast_jit(run)(0.0)
    assert particles.position.shape == particles.log_weight.shape == particles.info.num_gradients.shape == (500, 2, 3)
    exact = -0.5 * math.log(1.25) - 0.5 * mean**2 / 1.25
    unbiased(particles.log_weight[:, 0, 1], exact[0, 1], "row 0, 1")
    unbiased(particles.log_weight[:, 1, 0], exact[1, 0], "row 1, 0")


def test_without_temperatures_the_weight_is_the_plain_ratio(key):
    draws = jax.random.normal(key, (5, 2))
    start, end = (lambda x: -jnp.sum(x**2)), (lambda x: -jnp.sum(jnp.abs(x)))
    particles = anneal(key, draws, start, end, kernel=kernels.mala(step_size=0.1), num_temperatures=0)
    close(particles.log_weight, jax.vmap(end)(draws) - jax.vmap(start)(draws), rtol=1e-6)
    assert (particles.position == draws).all()
    assert not particles.info.num_gradients.any()


class Quadratic(eqx.Module):
    precision: jax.Array

    def __call__(self, event):
        return -0.5 * self.precision * (event["a"] ** 2 + jnp.sum(event["b"] ** 2))


def test_no_gradient_flows_through_an_annealing(key):
    """Of events that are pytrees, between densities that are modules, for a batch of them."""

    def annealed(precision):
        draws = {"a": jnp.ones(4) * precision, "b": jnp.ones((4, 2))}
        end = lambda event: Quadratic(2 * precision)(event) - precision
        return anneal(
            key, draws, Quadratic(precision), end, kernel=kernels.hmc(0.1, 3), num_temperatures=3, num_steps=2
        )

    def total(precision):
        particles = jax.vmap(annealed)(precision)
        return jnp.sum(particles.log_weight) + jnp.sum(particles.position["b"]), particles.info

    gradient, info = fast_jit(jax.grad(total, has_aux=True))(jnp.array([0.5, 1.5]))
    assert (gradient == 0.0).all()
    assert (info.num_gradients == 3 * (2 * 3 + 1)).all()
    assert (info.acceptance_rate > 0.5).all()


def test_annealing_says_when_its_weights_are_useless(key):
    energies = (lambda x: 0.5 * ((x - 30.0) / 0.1) ** 2), (lambda x: jnp.where(x > 2.0, jnp.nan, x**2))

    def run(index):
        energy = Partial(lambda index, x: jax.lax.switch(index, energies, x), index)
        return annealed_importance(
            key, ebm.EBM(energy, dist.Normal(0.0, 1.0)), kernel=kernels.mala(step_size=1e-4), num_temperatures=2
        )

    run = fast_jit(run)
    far, broken = run(0), run(1)
    assert not far.reliable
    assert far.ess < 100
    assert "UNRELIABLE" in str(far)
    assert not broken.reliable
    assert np.isnan(broken.value)


def test_annealing_refuses_a_reference_it_cannot_start_from(key):
    flat = ebm.EBM(lambda x: x**2, improper())
    run = functools.partial(annealed_importance, key, kernel=kernels.mala(step_size=0.1))
    with pytest.raises(ValueError, match=r"base: got ImproperUniform, which cannot be sampled.*reference="):
        run(flat)
    with pytest.raises(ValueError, match=r"reference: got the support.*does not cover the support"):
        run(flat, reference=dist.Uniform(0.0, 1.0))
    with pytest.raises(ValueError, match=r"reference: got event_shape \(2,\)"):
        run(flat, reference=dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"num_particles: got 1"):
        run(tilted_gamma(1.0), num_particles=1)
    with pytest.raises(ValueError, match=r"num_temperatures: got -1"):
        run(tilted_gamma(1.0), num_temperatures=-1)


# --- the result ----------------------------------------------------------------------------------------------------


def test_a_result_prints_as_a_number_with_its_error():
    one = LogNormalizer(*map(jnp.asarray, (1.2341, 0.005, 812.0, jnp.nan, 7, True)))
    assert repr(one) == str(one) == "log Z = 1.234 ± 0.005 (ess 812)"
    assert repr(one._replace(reliable=jnp.array(False), ess=jnp.array(jnp.nan))) == "log Z = 1.234 ± 0.005, UNRELIABLE"
    assert repr(one._replace(standard_error=jnp.array(0.0), ess=jnp.array(jnp.nan))) == "log Z = 1.234100 (exact)"
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3)), one)
    assert repr(rows).splitlines() == ["6 rows, 0 unreliable", *["log Z = 1.234 ± 0.005 (ess 812)"] * 3, "..."]
    printed = []
    jax.jit(lambda found: printed.append(repr(found)))(one)
    assert printed[0].startswith("LogNormalizer(value=")


def test_a_sum_of_nothing_has_no_gradient():
    terms = jnp.array([[-jnp.inf, 0.0], [-jnp.inf, 1.0]])
    close(result.safe_logsumexp(terms), [-jnp.inf, np.logaddexp(0.0, 1.0)], rtol=1e-6)
    gradient = jax.grad(lambda t: jnp.sum(jnp.where(jnp.isfinite(t[0]), result.safe_logsumexp(t), 0.0)))(terms)
    assert np.isfinite(gradient).all()


# --- seeded faults -------------------------------------------------------------------------------------------------


def without_jacobian(constrain):
    def constrain_only(ebm, position):
        event, log_jacobian = constrain(ebm, position)
        return event, jnp.zeros_like(log_jacobian)

    return constrain_only


class WithoutBase:
    """An EBM that forgets its base."""

    def __init__(self, ebm):
        self._ebm = ebm

    def __getattr__(self, name):
        return getattr(self._ebm, name)

    def unnormalized_log_prob(self, value):
        return self._ebm.unnormalized_log_prob(value) - self._ebm.base.log_prob(value)


def test_a_dropped_jacobian_or_base_shows_in_quadrature(monkeypatch):
    def error(wrap):
        value = fast_jit(lambda tilt: quadrature(wrap(tilted_gamma(tilt)), num_nodes=120).value)(TILT)
        return abs(float(value) + 3 * math.log1p(TILT / 2))

    assert error(WithoutBase) > 0.1
    monkeypatch.setattr(
        sys.modules["ebm_ppl.normalizer.quadrature"], "constrain", without_jacobian(unconstrained.constrain)
    )
    assert error(lambda ebm: ebm) > 0.1


FAULTS = {
    "no Jacobian": lambda patch: patch.setattr(unconstrained, "constrain", without_jacobian(unconstrained.constrain)),
    "no base": lambda patch: patch.setattr(importance, "row_densities", row_densities_without_base),
    "no accept step": lambda patch: None,
}


def row_densities_without_base(ebm, reference, row):
    start, _ = unconstrained.row_densities(ebm, reference, row)
    return start, unconstrained.row_densities(WithoutBase(ebm), reference, row)[1]


@pytest.mark.parametrize("fault", ["no Jacobian", "no base", pytest.param("no accept step", marks=pytest.mark.slow)])
def test_seeded_faults_of_annealing_are_caught(fault, key, monkeypatch):
    FAULTS[fault](monkeypatch)
    options = {"kernel": kernels.unadjusted_langevin(step_size=0.4)} if fault == "no accept step" else {}
    assert problems(replicated_weights(key, **options), fault) != []
