"""Discrete potentials and kernels against enumeration; each seeded fault is caught; bad input is refused."""

import functools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial
from numpyro.distributions import constraints
from numpyro.infer import SVI, Predictive, Trace_ELBO
from scipy.special import logsumexp

import ebm_ppl as ebm
from ebm_ppl import kernels, potentials, targets
from ebm_ppl.chains import ChainSimulator
from ebm_ppl.targets.discrete import all_states
from ebm_ppl.testing import ALPHA, CHECKS, binomial_test, exact_start_invariance_discrete, multinomial_test
from ebm_ppl.testing.discrete import law_checks, run_chains
from ebm_ppl.types import BlockConditionals, ColourConditionals, SiteConditionals

COUPLINGS = {0.2: (11.7714703585, 0.34277), 0.44: (15.5047265387, 0.84272), 0.6: (20.0565328843, 0.97287)}
ORACLES = {
    "ising_3x3": 8.7312006802, "ising_ring_20": 18.4083904670, "potts_3x3": 16.7400765317, "rbm_12x6": 15.8037367596,
}  # fmt: skip


@functools.cache
def target_of(name):
    """A target by name, with the coupling after a colon where it has one."""
    name, _, coupling = name.partition(":")
    return targets.get_discrete(name, **({"coupling": float(coupling)} if coupling else {}))


def fast(names, *chosen):
    """All names as parameters, those not chosen for slow runs only."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


# The oracles.


@pytest.mark.parametrize("name", ORACLES)
def test_enumerated_log_normalizers(name):
    assert target_of(name).log_normalizer == pytest.approx(ORACLES[name], abs=1e-9)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_ising_square(coupling):
    target = target_of(f"ising_4x4:{coupling}")
    log_normalizer, magnetisation = COUPLINGS[coupling]
    assert target.log_normalizer == pytest.approx(log_normalizer, abs=1e-9)
    mean = np.abs(target.states.reshape(-1, 16).mean(axis=1, dtype=float)) @ target.probabilities
    assert mean == pytest.approx(magnetisation, abs=1e-5)


@pytest.mark.parametrize("name", fast([*ORACLES, "ising_4x4"], "rbm_12x6"))
def test_enumerate_states_gives_the_same_numbers(name):
    with jax.enable_x64(True):
        target = targets.get_discrete(name)  # parameters in 64 bits
        size, potential = np.prod(target.event_shape), target.potential
        if name.startswith("ising"):  # NumPyro has no support for spins
            spins = potential
            potential = lambda bits: spins(2.0 * bits.reshape(target.event_shape) - 1.0)
        elif name == "potts_3x3":
            labels = potential
            potential = lambda values: labels(values.reshape(3, 3))
        support = constraints.integer_interval(0, 2) if name == "potts_3x3" else constraints.boolean
        site = ebm.EBM(potential, dist.ImproperUniform(support, (), (int(size),)))
        assert float(ebm.normalizer.enumerate_states(site).value) == pytest.approx(target.log_normalizer, abs=1e-10)


def test_hidden_and_visible_enumeration_of_the_rbm_agree():
    with jax.enable_x64(True):
        rbm = targets.get_discrete("rbm_12x6").potential
        hidden = jnp.asarray(all_states((0, 1), (6,)))
        score = hidden @ rbm.hidden_bias + jax.nn.softplus(hidden @ rbm.weights.T + rbm.visible_bias).sum(axis=1)
        assert float(jax.nn.logsumexp(score)) == pytest.approx(ORACLES["rbm_12x6"], abs=1e-10)


# The potentials.


@pytest.mark.parametrize("name", ["ising_3x3", "ising_4x4:0.6", "potts_3x3", "rbm_12x6"])
def test_potentials_equal_the_enumeration(name):
    target = target_of(name)
    energies = jax.vmap(target.potential)(jnp.asarray(target.states))
    exact = -np.log(target.probabilities) - target.log_normalizer
    np.testing.assert_allclose(energies, exact, rtol=1e-5, atol=1e-4)


def random_potentials():
    random = np.random.default_rng(0)
    symmetric = np.triu(random.normal(size=(6, 6)), 1)
    symmetric += symmetric.T
    return {
        "bits": potentials.BoltzmannMachine(symmetric, random.normal(size=6)),
        "spins": potentials.BoltzmannMachine(symmetric, random.normal(size=6), coding="spin"),
        "open ising": potentials.Ising((2, 3), 0.3, random.normal(size=(2, 3)), periodic=False),
        "ising torus": potentials.Ising((2, 3), 0.3, 0.2),
        "potts": potentials.Potts((2, 3), 3, 0.7, random.normal(size=3)),
        "cube": potentials.Ising((2, 1, 3), -0.4, 0.1),
    }


@pytest.mark.parametrize("name", random_potentials())
def test_conditionals_are_energy_differences(name):
    potential = random_potentials()[name]
    assert isinstance(potential, SiteConditionals)
    shape, values = potential.event_shape, np.array(potential.site_values)
    states = np.random.default_rng(1).choice(values, (6, *shape))  # one per site
    changed = np.repeat(states[:, None], len(values), axis=1)
    for site in range(6):
        changed[site].reshape(len(values), 6)[:, site] = values
    exact = -jax.jit(jax.vmap(jax.vmap(potential)))(jnp.asarray(changed))
    logits = jax.jit(jax.vmap(potential.conditional_logits))(jnp.asarray(states), jnp.arange(6))
    np.testing.assert_allclose(logits - logits[:, :1], exact - exact[:, :1], atol=1e-5)


class _SiteBySite(eqx.Module):
    """A lattice model that gives its conditionals one by one only."""

    inner: potentials.Ising | potentials.Potts

    @property
    def site_values(self):
        return self.inner.site_values

    def __call__(self, event):
        return self.inner(event)

    def conditional_logits(self, state, site):
        return self.inner.conditional_logits(state, site)

    def colours(self):
        return self.inner.colours()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float32])
@pytest.mark.parametrize("name", ["open ising", "chain", "potts"])
def test_a_colour_at_once_is_its_sites_one_by_one(key, name, dtype):
    lattices = {
        "open ising": random_potentials()["open ising"],
        "chain": potentials.Ising(6, 0.7),  # regular, and no field
        "potts": potentials.Potts((2, 3), 3, 0.7, jnp.arange(3.0), periodic=False),
    }
    potential, site_by_site = lattices[name], _SiteBySite(lattices[name])
    assert isinstance(potential, ColourConditionals)
    assert not isinstance(site_by_site, ColourConditionals)
    states = jax.random.choice(key, jnp.asarray(potential.site_values, dtype), (50, *potential.event_shape))
    for colour in potential.colours():
        at_once = jax.vmap(lambda state, colour=colour: potential.colour_logits(state, colour))(states)
        one_by_one = jax.vmap(jax.vmap(potential.conditional_logits, (None, 0)), (0, None))(states, jnp.asarray(colour))
        np.testing.assert_allclose(at_once, one_by_one, rtol=1e-6)
    ends = [
        ebm.advance(key, p, ebm.init_sampler(states, kernels.gibbs("chequerboard")), 5)
        for p in (potential, site_by_site)
    ]
    np.testing.assert_array_equal(ends[0][0].position, ends[1][0].position)
    assert ends[0][0].position.dtype == dtype
    assert int(ends[0][1].num_energies[0]) == int(ends[1][1].num_energies[0]) == 5


def test_sites_of_one_colour_do_not_meet():
    for lattice in (potentials.Ising((4, 6), 0.1), potentials.Potts((3, 5), 3, 0.1, periodic=False)):
        even, odd = lattice.colours()
        assert sorted([*even, *odd]) == list(range(np.prod(lattice.event_shape)))
        for a, b in lattice.lattice.bonds:
            assert (a in even) != (b in even)


def test_the_parts_of_an_rbm_fit_together():
    rbm = target_of("rbm_12x6").potential
    assert isinstance(rbm, BlockConditionals)
    visible = jnp.asarray(target_of("rbm_12x6").states[1234])
    hidden = jnp.asarray(all_states((0, 1), (6,)))
    joint = jax.vmap(rbm.joint_energy, (None, 0))(visible, hidden)
    np.testing.assert_allclose(-jax.nn.logsumexp(-joint), rbm(visible), rtol=1e-5)
    exact = hidden.T @ jax.nn.softmax(-joint)
    np.testing.assert_allclose(jax.nn.softmax(rbm.hidden_logits(visible))[:, 1], exact, rtol=1e-4)
    flipped = jnp.eye(12, dtype=int)
    change = jax.vmap(lambda e: rbm.joint_energy(e * 0, hidden[9]) - rbm.joint_energy(e, hidden[9]))(flipped)
    logits = rbm.visible_logits(hidden[9])
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], change, rtol=1e-4, atol=1e-6)


def test_what_the_energy_of_a_boltzmann_machine_ignores_has_no_gradient():
    machine = potentials.BoltzmannMachine.random(5, key=jax.random.key(0), scale=1.0)
    gradient = eqx.filter_grad(lambda m: m(jnp.array([1, 0, 1, 1, 0])))(machine).weights
    assert not bool(jnp.diagonal(gradient).any())
    np.testing.assert_array_equal(gradient, gradient.T)
    bent = eqx.tree_at(lambda m: m.weights, machine, machine.weights + jnp.eye(5))
    assert float(bent(jnp.ones(5))) == pytest.approx(float(machine(jnp.ones(5))))


# The kernels.

# Kernel, how to make it for a target, and how many steps it takes for chains to get somewhere also where it is cold.
KERNELS = {
    "sequential": (lambda name: kernels.gibbs(), 8),
    "random": (lambda name: kernels.gibbs("random"), 8),
    "chequerboard": (lambda name: kernels.gibbs("chequerboard"), 8),
    "block": (lambda name: kernels.gibbs("block"), 8),
    "gradients": (lambda name: kernels.gibbs_with_gradients(), 48),
    "langevin": (lambda name: kernels.discrete_langevin(0.7 if name == "potts_3x3" else 2.0), 24),
}
SQUARES = [f"ising_4x4:{coupling}" for coupling in COUPLINGS]
FAST = [
    *[(kernel, name) for kernel in ("sequential", "chequerboard", "gradients", "langevin") for name in SQUARES],
    *[("block", "rbm_12x6"), ("gradients", "rbm_12x6")],
    *[("sequential", "potts_3x3"), ("gradients", "potts_3x3")],
]
SLOW = [("sequential", "rbm_12x6"), ("random", "rbm_12x6"), ("random", "potts_3x3"), ("langevin", "potts_3x3"),
    ("langevin", "rbm_12x6"),
        *[("random", name) for name in SQUARES]]  # fmt: skip
CASES = [*FAST, *[pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]]


def law_of(key, kernel, name, num_steps, num_chains=20_000, **options):
    return exact_start_invariance_discrete(
        key, kernel, target_of(name), num_chains=num_chains, num_steps=num_steps, **options
    )


@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_exact_start_invariance(key, kernel, name):
    make, num_steps = KERNELS[kernel]
    # Where it is cold chains are elsewhere in one site out of forty at most, however long they run.
    report = law_of(key, make(name), name, num_steps, minimum_moved=0.01 if name.endswith("0.6") else 0.05)
    report.raise_if_failed()
    assert report.divergent_fraction == 0.0
    assert 0.1 < report.acceptance <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "name"), [*FAST, *SLOW])
def test_exact_start_invariance_with_more_chains(key, kernel, name):
    make, num_steps = KERNELS[kernel]
    report = law_of(key, make(name), name, 2 * num_steps, 200_000, minimum_moved=0.01)
    report.raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["random", "gradients", "langevin"])
def test_reversibility(key, kernel):
    target = target_of("ising_3x3")
    start_key, run_key = jax.random.split(key)
    start = target.sample(start_key, 20_000)
    end, *_ = run_chains(run_key, KERNELS[kernel][0]("ising_3x3"), target.potential, start, 1)
    change = target.index(end) - target.index(start)
    binomial_test(int((change > 0).sum()), int((change != 0).sum()), 0.5).raise_if_failed()


@pytest.mark.parametrize("kernel", fast(["chequerboard", "gradients", "langevin"], "chequerboard"))
def test_chains_that_start_badly_arrive_and_reach_every_state(key, kernel):
    """All spins up at the start, and the exact law of all 65,536 states in the end."""
    target = target_of("ising_4x4:0.2")
    start = jnp.ones((20_000, 4, 4), jnp.int8)
    num_steps = {"gradients": 400, "langevin": 150, "chequerboard": 60}[kernel]
    end, *_ = run_chains(key, KERNELS[kernel][0]("ising_4x4"), target.potential, start, num_steps)
    CHECKS.record(ALPHA)
    for check in law_checks(target, target.index(end), ALPHA):
        check.raise_if_failed()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sequential", "gradients", "langevin"])
def test_every_state_is_reached(key, kernel):
    potential = potentials.Potts((2, 2), 3, 0.2, periodic=False)
    states = all_states((0, 1, 2), (2, 2))
    sampler = ebm.init_sampler(jnp.zeros((500, 2, 2), int), KERNELS[kernel][0]("potts_3x3"))
    sampler, draws = ebm.draw(key, potential, sampler, 20, num_steps=2)
    assert len(np.unique(np.asarray(draws.position).reshape(-1, 4), axis=0)) == len(states) == 81


@pytest.mark.parametrize("kernel", fast(["sequential", "gradients", "langevin"], "sequential"))
def test_positions_keep_their_dtype_and_floats_do_what_integers_do(key, kernel):
    ends = []
    for dtype in (jnp.int8, jnp.float32):
        sampler = ebm.init_sampler(jnp.ones((16, 3, 3), dtype), KERNELS[kernel][0]("ising_3x3"))
        sampler, info = ebm.advance(key, target_of("ising_3x3").potential, sampler, 5)
        assert sampler.position.dtype == dtype
        assert bool(info.has_moved.any())
        if kernel == "sequential":  # whose sweeps start from nothing
            assert [int(count[0]) for count in (info.num_energies, info.num_gradients)] == [5, 0]
        else:  # one more for the fresh start
            assert [int(count[0]) for count in info[2:4]] == [6, 0]
        ends.append(np.asarray(sampler.position, float))
    np.testing.assert_array_equal(ends[0], ends[1])


@pytest.mark.slow
def test_step_size_and_coupling_change_without_recompiling(key):
    traces = []

    def energy(coupling, spins):
        traces.append(1)
        return -coupling * jnp.sum(spins[1:] * spins[:-1])

    for coupling, step_size in ((0.1, 1.0), (0.2, 0.5), (0.3, 2.0)):
        sampler = ebm.init_sampler(jnp.ones((4, 5), int), kernels.discrete_langevin(step_size, values=(-1, 1)))
        ebm.advance(key, Partial(energy, jnp.float32(coupling)), sampler, 3)
        first = len(traces) if coupling == 0.1 else first
    # Each call examines the energy abstractly; compiling would trace it several times more.
    assert len(traces) - first < first


@pytest.mark.slow
def test_step_size_can_be_tuned(key):
    sampler = ebm.init_sampler(target_of("ising_4x4:0.2").sample(key, 256), kernels.discrete_langevin(0.3))
    potential = target_of("ising_4x4:0.2").potential
    sampler = ebm.tune_step_size(key, potential, sampler, 0.75, num_iterations=60)
    _, info = ebm.advance(key, potential, sampler, 50)
    assert float(info.acceptance_rate.mean()) == pytest.approx(0.75, abs=0.05)


# Seeded faults. Each must fail at the settings that the right kernels pass with.


def unlike_any_other(kernel):
    """The same kernel under another identity, so that a compiled program from before a fault is not used again."""
    return lambda potential: kernel(potential)


def coding_mix_up(monkeypatch):
    """The numbers of a spin model read as those of a model of bits."""

    def kernel(potential):
        bits = kernels.gibbs(values=(0, 1))(lambda x: potential(x))

        def as_bits(state):
            return state._replace(position=(state.position + 1) // 2)

        def step(key, state):
            state, info = bits.step(key, as_bits(state))
            return state._replace(position=2 * state.position - 1), info

        def init(position, key=None):
            state = bits.init((position + 1) // 2, key)
            return state._replace(position=2 * state.position - 1)

        return SamplingAlgorithm(init, step)

    return kernel, "ising_4x4:0.44", 8


def _without_ratio(monkeypatch):
    module = sys.modules["ebm_ppl.kernels.informed"]
    right = module.accepts
    monkeypatch.setattr(module, "accepts", lambda u, log_ratio, energy, new: right(u, energy - new, energy, new))


def dropped_ratio_of_gibbs_with_gradients(monkeypatch):
    _without_ratio(monkeypatch)
    return unlike_any_other(kernels.gibbs_with_gradients()), "ising_4x4:0.44", 48


def dropped_ratio_of_labels(monkeypatch):
    _without_ratio(monkeypatch)
    return unlike_any_other(kernels.gibbs_with_gradients()), "potts_3x3", 48


def dropped_ratio_of_discrete_langevin(monkeypatch):
    _without_ratio(monkeypatch)
    return unlike_any_other(kernels.discrete_langevin(2.0)), "ising_4x4:0.44", 24


def no_accept_step(monkeypatch):
    return kernels.unadjusted_discrete_langevin(2.0), "ising_4x4:0.44", 24


class _OneColour(eqx.Module):
    """Every site is said not to see any other, so that all are updated from conditionals that are stale."""

    inner: potentials.Ising

    @property
    def site_values(self):
        return self.inner.site_values

    def __call__(self, event):
        return self.inner(event)

    def conditional_logits(self, state, site):
        return self.inner.conditional_logits(state, site)

    def colours(self):
        return (np.arange(16),)


class _OddChequerboard(_OneColour):
    """The chequerboard of a 3 by 3 lattice, as if it did not close on itself."""

    def colours(self):
        return np.arange(0, 9, 2), np.arange(1, 9, 2)


def stale_conditionals(monkeypatch):
    kernel = kernels.gibbs("chequerboard")
    return (lambda potential: kernel(_OneColour(potential))), "ising_4x4:0.2", 8


def chequerboard_of_an_odd_torus(monkeypatch):
    kernel = kernels.gibbs("chequerboard")
    return (lambda potential: kernel(_OddChequerboard(potential))), "potts_3x3", 8


def wrong_temperature(monkeypatch):
    kernel = kernels.gibbs(values=(-1, 1))
    return (lambda potential: kernel(lambda x: 0.95 * potential(x))), "ising_4x4:0.44", 8


FAULTS = [coding_mix_up, dropped_ratio_of_gibbs_with_gradients, dropped_ratio_of_labels,
          dropped_ratio_of_discrete_langevin, no_accept_step, stale_conditionals, chequerboard_of_an_odd_torus,
          wrong_temperature]  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    fast(FAULTS, coding_mix_up, dropped_ratio_of_gibbs_with_gradients, no_accept_step, stale_conditionals),
    ids=lambda fault: fault.__name__,
)
def test_the_harness_rejects_a_seeded_fault(key, fault, monkeypatch):
    kernel, name, num_steps = fault(monkeypatch)
    report = law_of(key, kernel, name, num_steps)
    assert not all(check.passed for check in report.checks if not check.name.startswith("stayed")), report


def test_the_harness_rejects_chains_that_stay(key):
    frozen = lambda potential: SamplingAlgorithm(
        kernels.gibbs()(potential).init, lambda key, state: (state, kernels.gibbs()(potential).step(key, state)[1])
    )
    report = law_of(key, frozen, "ising_3x3", 2, num_chains=2000)
    assert not report.passed
    assert not report.has_moved


# Energies without structure, and those that are not finite.


@pytest.mark.parametrize("kernel", fast(["sequential", "gradients", "langevin"], "sequential"))
def test_energies_with_a_base_are_sampled_by_energy_differences(key, kernel):
    """A tilted machine over biased coins, whose law is enumerated by another road."""
    machine = random_potentials()["bits"]
    base = dist.Bernoulli(jnp.linspace(0.2, 0.8, 6)).to_event(1)
    states = jnp.asarray(all_states((0, 1), (6,)))
    log_prob = np.asarray(base.log_prob(states) - jax.vmap(machine)(states), float)
    sampler = ebm.init_sampler(base.sample(key, (20_000,)), KERNELS[kernel][0]("rbm_12x6"))
    num_steps = 15 if kernel == "sequential" else 100
    sampler, info = ebm.advance(key, potentials.tilt(machine, base), sampler, num_steps)
    number = np.asarray(sampler.position) @ (2 ** np.arange(6)[::-1])
    multinomial_test(np.bincount(number, minlength=64), np.exp(log_prob - logsumexp(log_prob))).raise_if_failed()
    assert int(info.num_energies[0]) == (15 * 6 * 2 if kernel == "sequential" else 0)


def holed_energy(hole, bits):
    return jnp.where(jnp.sum(bits) > 1.5, hole, 0.1 * jnp.sum(bits))


@pytest.mark.parametrize(
    "kernel", fast(["gibbs", "gibbs_with_gradients", "discrete_langevin"], "gibbs", "gibbs_with_gradients")
)
def test_values_without_a_finite_energy_are_never_taken_and_counted(key, kernel):
    options = {"step_size": 2.0} if kernel == "discrete_langevin" else {}
    sampler = ebm.init_sampler(jnp.zeros((64, 4), int), getattr(kernels, kernel)(values=(0, 1), **options))
    for hole in (jnp.nan, jnp.inf, -jnp.inf):
        end, info = ebm.advance(key, Partial(holed_energy, jnp.asarray(hole)), sampler, 10)
        assert int(end.position.sum(axis=1).max()) == 1
        assert int(info.num_nonfinite.sum()) > 0
        assert not bool(info.is_divergent.any())


# Training, and NumPyro.

SWAPPED = {
    "gibbs": kernels.gibbs(), "gradients": kernels.gibbs_with_gradients(), "langevin": kernels.discrete_langevin(0.5),
}  # fmt: skip


@functools.cache
def machine_data():
    """Rows of a machine of four units, and the exact law of the maximum-likelihood machine."""
    truth = potentials.BoltzmannMachine.random(4, key=jax.random.key(3), scale=1.5)
    states = all_states((0, 1), (4,)).astype(float)
    energy = np.asarray(jax.vmap(truth)(jnp.asarray(states)), float)
    rows = np.random.default_rng(0).choice(16, 500, p=np.exp(-energy) / np.exp(-energy).sum())
    frequency = np.bincount(rows, minlength=16) / 500
    pairs = np.triu_indices(4, 1)
    features = np.concatenate([states, states[:, pairs[0]] * states[:, pairs[1]]], axis=1)

    def loss(theta):
        score = features @ theta
        model = np.exp(score - logsumexp(score))
        return logsumexp(score) - frequency @ score, features.T @ (model - frequency)

    best = scipy.optimize.minimize(loss, np.zeros(10), jac=True, method="BFGS", tol=1e-10).x
    return states[rows], states, np.exp(features @ best - logsumexp(features @ best))


@pytest.mark.parametrize("kernel", fast(SWAPPED, "gibbs"))
def test_training_finds_the_exact_maximum_likelihood(key, kernel):
    data, states, best = machine_data()
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 500))
    sampler = ebm.init_sampler(jnp.zeros((1000, 4), int), SWAPPED[kernel])
    state = ebm.init_train(potentials.BoltzmannMachine(jnp.zeros((4, 4)), jnp.zeros(4)), optimizer, sampler)
    objective = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=3)
    state, history = ebm.fit(key, state, data.astype(int), objective, optimizer, num_steps=500, report_every=500)
    energy = np.asarray(jax.vmap(state.potential)(jnp.asarray(states)), float)
    model = np.exp(-energy - logsumexp(-energy))
    assert float(best @ np.log(best / model)) < 1e-3
    assert history["frozen_fraction"].mean() < 0.3


def tilt_energy(weight, bits):
    return -jnp.sum(weight * bits)


@pytest.mark.parametrize("kernel", fast(SWAPPED, "gradients"))
def test_negative_phase_of_a_discrete_site(key, kernel):
    """Coins tilted by weights are coins again: the maximum-likelihood weights and log Z are known."""
    base = dist.Bernoulli(0.4).expand([3]).to_event(1)
    mean = np.array([0.2, 0.5, 0.7])
    data = jnp.array((np.arange(100)[:, None] < 100 * mean).astype(int))

    def model(data):
        weight = numpyro.param("weight", jnp.zeros(3))
        with numpyro.plate("rows", len(data)):
            numpyro.sample("x", ebm.EBM(Partial(tilt_energy, weight), base), obs=data)

    is_tracked = kernel == "gibbs"
    trained = ebm.handlers.negative_phase(
        model, kernel=SWAPPED[kernel], num_chains=1000, num_steps=3, loss_value="tracked" if is_tracked else "nan"
    )
    svi = SVI(trained, lambda data: None, numpyro.optim.Adam(optax.cosine_decay_schedule(0.1, 200)), Trace_ELBO())
    result = svi.run(key, 200, data, progress_bar=False)
    exact = np.log(mean / (1 - mean)) - np.log(0.4 / 0.6)
    np.testing.assert_allclose(result.params["weight"], exact, atol=0.12)
    assert result.state.mutable_state["x$chains"]["sampler"].position.shape == (1000, 3)
    if not is_tracked:
        return
    log_likelihood = 100 * float(np.sum(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)))
    assert float(result.losses[-20:].mean()) == pytest.approx(-log_likelihood, rel=0.05)


def test_simulated_sites_follow_the_enumerated_law(key):
    """The structured kernel sees the machine itself where the base is the counting measure."""
    target = target_of("rbm_12x6")
    counting = dist.ImproperUniform(constraints.boolean, (), (12,))

    def model():
        numpyro.sample("v", ebm.EBM(target.potential, counting))

    simulated = ebm.handlers.simulate(model, kernel=kernels.gibbs("block"), num_steps=40)
    draws = Predictive(simulated, num_samples=10_000, parallel=True)(key)
    CHECKS.record(ALPHA)
    for check in law_checks(target, target.index(draws["v"]), ALPHA):
        check.raise_if_failed()
    assert draws["v"].dtype == jnp.int32
    np.testing.assert_allclose(draws["v$acceptance_rate"], 1.0, rtol=1e-5)


@pytest.mark.slow
def test_rows_of_a_discrete_site_have_chains_of_their_own(key):
    weight = jnp.array([[-1.0, 0.0], [2.0, 1.0], [0.0, -2.0]])
    site = ebm.EBM(
        lambda bits, w: -jnp.sum(w * bits), dist.Bernoulli(0.5).expand([2]).to_event(1), condition=weight,
        sampler=ChainSimulator(kernels.gibbs(), 10),
    )  # fmt: skip
    draws = site.sample(key, (4000,))
    assert draws.shape == (4000, 3, 2)
    for row, column in np.ndindex(3, 2):
        probability = float(jax.nn.sigmoid(weight[row, column]))
        binomial_test(int(draws[:, row, column].sum()), 4000, probability).raise_if_failed()


# Refusals.

ISING = potentials.Ising((3, 3), 0.4)
SPINS = jnp.ones((2, 3, 3), int)


def run(potential, position, kernel):
    return ebm.advance(jax.random.key(0), potential, ebm.init_sampler(position, kernel), 1)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: kernels.gibbs("checkerboard"), ValueError, "scan: got 'checkerboard', expected one of"),
        (lambda: kernels.gibbs(values=(1,)), ValueError, "values: got .*at least two different"),
        (lambda: kernels.gibbs(values="ab"), TypeError, "values: got 'ab'"),
        (lambda: kernels.discrete_langevin(0.0), ValueError, "step_size: got 0.0"),
        (lambda: kernels.discrete_langevin(jnp.ones(2)), ValueError, "step_size: got shape"),
        (lambda: run(ISING, SPINS, kernels.gibbs("chequerboard")), ValueError, "axes of even length"),
        (lambda: run(ISING, SPINS, kernels.gibbs("block")), ValueError, "scan: got 'block' with Ising"),
        (
            lambda: run(random_potentials()["bits"], jnp.zeros((2, 6), int), kernels.gibbs("chequerboard")),
            ValueError,
            "all of whose units interact",
        ),
        (lambda: run(ISING, 0 * SPINS, kernels.gibbs()), ValueError, "outside the coding"),
        (lambda: run(ISING, 0 * SPINS, kernels.gibbs_with_gradients()), ValueError, "outside the coding"),
        (lambda: run(ISING, 0 * SPINS, kernels.discrete_langevin(1.0)), ValueError, "outside the coding"),
        (lambda: run(ISING, SPINS, kernels.gibbs(values=(0, 1))), ValueError, "expected one coding"),
        (lambda: run(lambda x: 1.0 * x.sum(), SPINS, kernels.gibbs()), ValueError, "values: gibbs got none"),
        (lambda: run(ISING, SPINS, kernels.mala(0.1)), TypeError, "Discrete kernels move integers: ebm.kernels.gibbs"),
        (lambda: run(ISING, SPINS == 1, kernels.gibbs()), TypeError, "position: got dtype bool"),
        (
            lambda: run(lambda x: jnp.arange(3.0)[x].sum(), SPINS, kernels.gibbs_with_gradients(values=(0, 1, 2))),
            TypeError,
            "kernels.gibbs needs none",
        ),
        (
            lambda: run(
                potentials.tilt(random_potentials()["spins"], dist.Bernoulli(0.5).expand([6]).to_event(1)),
                jnp.ones((2, 6), int),
                kernels.gibbs(),
            ),
            ValueError,
            "expected one coding",
        ),
        (lambda: ISING(jnp.zeros((3, 3))), ValueError, r"coding 'spin'"),
        (lambda: random_potentials()["bits"](-jnp.ones(6)), ValueError, r"coding 'binary'"),
        (lambda: target_of("rbm_12x6").potential(jnp.full(12, 2)), ValueError, r"coding 'binary'"),
        (lambda: potentials.Potts((3, 3), 3, 0.8)(jnp.full((3, 3), 3)), ValueError, "expected .0, 1, 2."),
        (lambda: ISING(jnp.ones(9)), ValueError, "event: got shape"),
        (lambda: potentials.BoltzmannMachine(jnp.ones((2, 2)), jnp.zeros(2)), ValueError, "zero diagonal"),
        (lambda: potentials.BoltzmannMachine(jnp.zeros((2, 3)), jnp.zeros(2)), ValueError, "weights: got shape"),
        (lambda: potentials.BoltzmannMachine(jnp.zeros((2, 2)), jnp.zeros(2), "signs"), ValueError, "coding: got"),
        (lambda: potentials.RBM(jnp.zeros((2, 3)), jnp.zeros(3), jnp.zeros(2)), ValueError, "weights: got shape"),
        (lambda: potentials.RBM(jnp.full((1, 1), jnp.nan), jnp.zeros(1), jnp.zeros(1)), ValueError, "NaN"),
        (lambda: potentials.Ising((3, 0), 0.4), ValueError, "shape: got 0"),
        (lambda: potentials.Ising((3, 3), jnp.ones(2)), ValueError, "coupling: got shape"),
        (lambda: potentials.Ising((3, 3), 0.4, jnp.ones(3)), ValueError, "field: got shape"),
        (lambda: potentials.Ising((3, 3), 0.4, periodic=1), TypeError, "periodic: got 1"),
        (lambda: potentials.Potts((3, 3), 1, 0.4), ValueError, "num_states: got 1"),
        (lambda: potentials.Potts((3, 3), 3, 0.4, jnp.ones(2)), ValueError, "field: got shape"),
        (lambda: targets.get_discrete("ising"), ValueError, "is not a discrete target"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_chain_outside_the_coding_is_flagged_where_it_cannot_be_refused(key):
    for kernel in (kernels.gibbs(), kernels.gibbs_with_gradients(), kernels.discrete_langevin(1.0)):
        step = jax.jit(lambda position, kernel=kernel: run(ISING, position, kernel)[1].is_divergent)
        assert step(jnp.stack([SPINS[0], 0 * SPINS[0]])).tolist() == [False, True]
