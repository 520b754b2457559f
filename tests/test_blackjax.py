"""Every sampler that BlackJAX exports is lifted and exact, or lifted and called biased, or refused with a reason."""

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import ebm_ppl as ebm
from ebm_ppl import kernels, targets
from ebm_ppl.kernels import composed
from ebm_ppl.testing import exact_start_invariance


class PairPotential(eqx.Module):
    """One of the laws in each of two coordinates, which is which being an argument: both share a compilation."""

    index: jax.Array
    laws: tuple

    def __call__(self, x):
        return jax.lax.switch(self.index, [lambda x, u=u: u(x[0]) + u(x[1]) for u in self.laws], x)


class Pair:
    """Two independent coordinates of one law on the line: microcanonical dynamics need two."""

    laws = ("gumbel", "student_t")  # skewed, and with heavy tails

    def __init__(self, name):
        self.name = f"{name} pair"
        self.law = targets.get(name)
        self.potential = PairPotential(
            jnp.asarray(self.laws.index(name)), tuple(targets.get(law).potential for law in self.laws)
        )

    @property
    def unconstrained_potential(self):
        return self.potential

    def sample(self, key, n):
        return jnp.stack([self.law.sample(key, n) for key in jax.random.split(key)], axis=-1)

    def unconstrain(self, event):
        return event


UNIT = jnp.ones(2)


def step(key, position):
    return 1.5 * jax.random.normal(key, position.shape)


def propose(key, position):
    return position + 1.5 * jax.random.normal(key, position.shape)


def fresh(key):
    return 2.5 * jax.random.normal(key, (2,)) - 0.5


def fresh_logdensity(start, end):
    """BlackJAX asks for the log density of going from the first state to the second."""
    return -0.5 * jnp.sum((end.position + 0.5) ** 2) / 2.5**2


def curved_metric(position):
    return jnp.diag(1.0 + 0.5 / (1.0 + position**2))


lift = kernels.from_blackjax

# What each is lifted with: coarse steps, at which a fault is large.
LIFTED = {
    "additive_step_random_walk": lambda: lift(blackjax.additive_step_random_walk, random_step=step),
    "adjusted_mclmc": lambda: kernels.adjusted_mclmc(1.2, 3),
    "adjusted_mclmc_dynamic": lambda: lift(blackjax.adjusted_mclmc_dynamic, step_size=0.8),
    "coordinate_slice": lambda: lift(blackjax.coordinate_slice, initial_widths=3.0, max_expansions=4),
    "dhmc": lambda: lift(blackjax.dhmc, step_size=1.0, inverse_mass_matrix=UNIT),
    "dmhmc": lambda: lift(blackjax.dmhmc, step_size=1.0, inverse_mass_matrix=UNIT),
    # A momentum of another scale than 1, which BlackJAX would start at 1.
    "ghmc": lambda: lift(blackjax.ghmc, step_size=0.9, momentum_inverse_scale=1.7 * UNIT, alpha=0.3, delta=0.2),
    "gist_step_size": lambda: lift(
        blackjax.gist_step_size, initial_step_size=1.0, inverse_mass_matrix=UNIT, num_integration_steps=2
    ),
    "gist_trajectory_length": lambda: lift(
        blackjax.gist_trajectory_length, step_size=1.0, inverse_mass_matrix=UNIT, max_num_steps=16
    ),
    "irmh": lambda: lift(blackjax.irmh, proposal_distribution=fresh, proposal_logdensity_fn=fresh_logdensity),
    "mhmc": lambda: lift(blackjax.mhmc, step_size=1.0, inverse_mass_matrix=UNIT, num_integration_steps=3),
    "rmh": lambda: lift(blackjax.rmh, proposal_generator=propose),
    "rmhmc": lambda: lift(blackjax.rmhmc, step_size=0.4, mass_matrix=curved_metric, num_integration_steps=3),
    "slice_sampling": lambda: lift(blackjax.slice_sampling, width=3.0, max_expansions=4),
}
# Lifted by a kernel of the same name, which tests/test_kernels.py puts to every target.
EVERY_TARGET = {"barker", "hmc", "mala", "nuts"}
ALIASES = {"barker_proposal": "barker", "dynamic_hmc": "dhmc", "multinomial_hmc": "mhmc"}
BIASED = {"mclmc": lambda: kernels.mclmc(step_size=2.5, decoherence_length=2.0)}
REFUSED = {
    "adaptive_persistent_sampling_smc": "Use kernels.tempered_smc",
    "adaptive_tempered_smc": "Use kernels.tempered_smc",
    "adjusted_mclmc_find_L_and_step_size": "Use ebm_ppl.tune_step_size",
    "chees_adaptation": "Use ebm_ppl.tune_step_size",
    "csgld": "Use kernels.replica_exchange",
    "elliptical_slice": "Gaussian prior of its own. Use kernels.hmc",
    "fullrank_vi": "not a BlackJAX MCMC sampler",
    "inner_kernel_tuning": "Use kernels.tempered_smc",
    "laplace_dhmc": "integrates latent variables",
    "laplace_dmhmc": "integrates latent variables",
    "laplace_hmc": "integrates latent variables",
    "laplace_mhmc": "integrates latent variables",
    "mclmc_find_L_and_step_size": "Use ebm_ppl.tune_step_size",
    "mclmc_lrd_warmup": "Use ebm_ppl.tune_step_size",
    "meads_adaptation": "Use ebm_ppl.tune_step_size",
    "meanfield_vi": "not a BlackJAX MCMC sampler",
    "mgrad_gaussian": "Gaussian prior of its own. Use kernels.hmc",
    "multipathfinder": "not a BlackJAX MCMC sampler",
    "nss": "Use kernels.tempered_smc",
    "nsswig": "Use kernels.tempered_smc",
    "orbital_hmc": "weighted orbit",
    "partial_posteriors_smc": "Use kernels.tempered_smc",
    "pathfinder": "not a BlackJAX MCMC sampler",
    "pathfinder_adaptation": "Use ebm_ppl.tune_step_size",
    "persistent_sampling_smc": "Use kernels.tempered_smc",
    "pretuning": "Use kernels.tempered_smc",
    "schrodinger_follmer": "not a BlackJAX MCMC sampler",
    "sghmc": "stochastic gradient",
    "sgld": "stochastic gradient",
    "sgnht": "stochastic gradient",
    "staged_adaptation": "Use ebm_ppl.tune_step_size",
    "svgd": "leave no law invariant",
    "tempered_smc": "Use kernels.tempered_smc",
    "window_adaptation": "Use ebm_ppl.tune_step_size",
    "window_adaptation_low_rank": "Use ebm_ppl.tune_step_size",
}
# Functions that sample nothing.
TOOLS = {
    "Callable",
    "ess",
    "ess_bulk",
    "ess_tail",
    "generate_top_level_api_from",
    "pareto_khat",
    "progress_bar",
    "rhat",
}
# Other names of what is above.
INNER_NAMES = {
    "irmh_as_top_level_api": "irmh",
    "normal_random_walk": "additive_step_random_walk",
    "rmh_as_top_level_api": "rmh",
}
# The quicker of them run by default; each compiles a program of its own.
QUICK = ["adjusted_mclmc", "irmh", "rmh"]


def test_every_entry_point_of_blackjax_is_classified():
    found = {name for name in dir(blackjax) if not name.startswith("_") and callable(getattr(blackjax, name))}
    found -= {name for name in found if isinstance(getattr(blackjax, name), type)}
    classes = [LIFTED, EVERY_TARGET, ALIASES, INNER_NAMES, BIASED, REFUSED, TOOLS]
    assert sum(map(len, classes)) == len(set().union(*classes))  # each in one class
    assert found == set().union(*classes)
    assert all(getattr(blackjax, alias) is getattr(blackjax, name) for alias, name in ALIASES.items())


def law_of(key, kernel, name, num_chains=20_000):
    return exact_start_invariance(key, kernel, Pair(name), num_chains=num_chains, num_steps=3, reference_factor=2)


@pytest.mark.parametrize("law", Pair.laws)
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LIFTED]
)
def test_lifted_samplers_are_exact(key, name, law):
    report = law_of(key, LIFTED[name](), law)
    report.raise_if_failed()
    assert report.moved_fraction > 0.1


@pytest.mark.parametrize("name", BIASED)
def test_biased_samplers_are_shown_to_be(key, name):
    report = law_of(key, BIASED[name](), "gumbel")
    assert not all(check.passed for check in report.checks), report
    assert "BIASED" in getattr(kernels, name).__doc__
    assert "unadjusted" in getattr(kernels, name).__name__


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_kernel_is_refused_with_a_reason(name):
    with pytest.raises(TypeError, match=f"cannot serve as a negative phase: .*{REFUSED[name]}"):
        kernels.from_blackjax(getattr(blackjax, name))


@pytest.mark.slow
def test_a_momentum_that_starts_with_another_scale_is_caught(key):
    """Seeded fault: what BlackJAX's own start of ``ghmc`` does to the first steps."""

    def build(logdensity_fn, **parameters):
        return blackjax.ghmc.differentiable(logdensity_fn, **parameters)

    kernel = lift(build, step_size=0.9, momentum_inverse_scale=1.7 * UNIT, alpha=0.3, delta=0.2)
    assert not all(check.passed for check in law_of(key, kernel, "gumbel", 100_000).checks)


# --- compositions have the law of the original, draw for draw ------------------------------------------------------


def energy(x):
    return jnp.sum(jnp.cosh(x) - 0.3 * x)


COMPOSED = {
    "mala": (blackjax.mala, {"step_size": jnp.array(0.4)}),
    "rmh": (blackjax.rmh, {"proposal_generator": propose}),
    "irmh": (blackjax.irmh, {"proposal_distribution": fresh, "proposal_logdensity_fn": fresh_logdensity}),
    "additive_step_random_walk": (blackjax.additive_step_random_walk, {"random_step": step}),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_compositions_are_blackjax_to_the_last_bit(key, name):
    sampler, parameters = COMPOSED[name]
    ours = composed.COMPOSED[sampler.differentiable](lambda x: -energy(x), **parameters)
    theirs = sampler(lambda x: -energy(x), **parameters)
    start = jax.random.normal(key, (64, 2))
    keys = jax.random.split(key, 30)

    def run(algorithm):
        def step(state, key):
            state, info = jax.vmap(algorithm.step)(jax.random.split(key, 64), state)
            return state, (state.position, info.acceptance_rate)

        return jax.lax.scan(step, jax.vmap(algorithm.init)(start), keys)[1]

    got = run(ours)
    jax.tree.map(np.testing.assert_array_equal, got, run(theirs))
    assert 0.05 < float(got[1].mean()) < 0.95


def test_a_population_moves_every_chain_by_its_own_part_of_the_noise(key):
    """Noise drawn for all chains at once is other noise, and nothing else is different."""
    start = {"a": jax.random.normal(key, (64, 2)), "b": jax.random.normal(key, (64,))}
    total = lambda x: energy(x["a"]) + energy(x["b"])
    population = lift(composed.mala, step_size=0.4)(total)
    chain = composed.mala(lambda x: -total(x), 0.4)
    state = population.init(start, key)
    got, info = population.step(key, state)
    noise = chain.draw_noise(key, (64,), 3)
    for index in (0, 17, 63):
        own_noise, own_state = jax.tree.map(lambda x, index=index: x[index], (noise, state))
        expected, report = chain.move(own_noise, own_state)
        # Not to the last bit: XLA compiles one chain and a population of them differently.
        jax.tree.map(
            lambda x, y, index=index: np.testing.assert_allclose(x[index], y, rtol=1e-5, atol=1e-6), got, expected
        )
        np.testing.assert_allclose(info.acceptance_rate[index], report.acceptance_rate, rtol=1e-5)


def test_random_walk_is_blackjaxs_normal_random_walk(key):
    start, sigma = jax.random.normal(key, (64, 2)), jnp.array([0.5, 2.0])
    ours = kernels.random_walk(sigma)(energy)
    theirs = blackjax.additive_step_random_walk.normal_random_walk(lambda x: -energy(x), sigma)
    got, info = ours.step(key, ours.init(start, key))
    expected, _ = jax.vmap(theirs.step)(jax.random.split(key, 64), jax.vmap(theirs.init)(start))
    np.testing.assert_array_equal(got.position, expected.position)
    assert info.num_gradients.tolist() == [0] * 64
    assert info.num_energies.tolist() == [1] * 64


# --- non-finite energies -------------------------------------------------------------------------------------------


def cliff(kind, x):
    """A Gaussian whose energy is NaN, infinite or minus infinite beyond 1."""
    value = jnp.array([jnp.nan, jnp.inf, -jnp.inf])[kind]
    return jnp.where(jnp.any(jnp.abs(x) > 1.0), value, 0.5 * jnp.sum(x**2))


COUNTED = {
    "mala": lambda: kernels.mala(0.5),
    "hmc": lambda: kernels.hmc(0.5, 2),
    "nuts": lambda: kernels.nuts(0.5, max_num_doublings=2),
    "barker": lambda: kernels.barker(0.7),
    "random_walk": lambda: kernels.random_walk(0.7),
    "adjusted_mclmc": lambda: kernels.adjusted_mclmc(0.4, 2),
    "mclmc": lambda: kernels.mclmc(0.5, 1.0),
    "irmh": LIFTED["irmh"],
    "ghmc": LIFTED["ghmc"],
    "dhmc": LIFTED["dhmc"],
    "gist_trajectory_length": LIFTED["gist_trajectory_length"],
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("mala", "barker", "random_walk") else pytest.param(name, marks=pytest.mark.slow)
        for name in COUNTED
    ],
)
def test_proposals_without_a_finite_energy_are_rejected_and_counted(key, name):
    sampler = ebm.init_sampler(jnp.zeros((64, 2)), COUNTED[name]())
    for kind in range(3):
        moved, info = ebm.advance(key, Partial(cliff, jnp.array(kind)), sampler, 20)
        assert bool((jnp.abs(moved.position) <= 1.0).all()), kind
        assert int(info.num_nonfinite.sum()) > 100, kind
        assert float(info.has_moved.mean()) > 0.4, kind
        if name != "mclmc":
            assert bool(jnp.isfinite(info.acceptance_rate).all()), kind
    # Nothing is counted where nothing is wrong.
    _, info = ebm.advance(key, Partial(cliff, jnp.array(0)), sampler._replace(kernel=COUNTED[name]()), 1)
    assert int(info.num_nonfinite.max()) <= 1


def test_the_count_is_that_of_the_proposals(key):
    """MALA from the origin of a flat energy: its proposals are known numbers."""

    def flat(x):
        return jnp.where(jnp.abs(x) > 1.0, jnp.nan, 0.0)

    algorithm = kernels.mala(0.5)(flat)
    state = algorithm.init(jnp.zeros(1000), key)
    state, info = algorithm.step(key, state)
    assert bool(((state.position == 0.0) == (info.num_nonfinite == 1)).all())
    assert 200 < int(info.num_nonfinite.sum()) < 450  # P(|N(0, 1)| > 1) = .317


def test_unadjusted_langevin_with_a_nan_gradient_is_flagged(key):
    def energy(x):
        return jnp.sqrt(jnp.maximum(x, 0.0)) * 0.0 + 1.0  # constant, with gradient 0 * inf at 0

    algorithm = kernels.unadjusted_langevin(1e-3)(energy)
    _, info = algorithm.step(key, algorithm.init(jnp.array([4.0, 5.0]), key))
    assert not bool(info.is_divergent.any())
    _, info = algorithm.step(key, algorithm.init(jnp.array([0.0, 5.0]), key))
    assert info.is_divergent.tolist() == [True, False]


def test_infinite_density_at_the_start_is_flagged(key):
    def well(x):
        return jnp.where(jnp.abs(x) < 0.1, -jnp.inf, 0.5 * x**2)

    _, info = ebm.advance(key, well, ebm.init_sampler(jnp.array([0.0, 1.0]), kernels.mala(0.1)), 1)
    assert info.is_divergent.tolist() == [True, False]


# --- arguments -----------------------------------------------------------------------------------------------------


def test_microcanonical_kernels_count_two_gradients_a_step_and_refuse_the_line(key):
    sampler = ebm.init_sampler(jnp.ones((4, 2)), kernels.adjusted_mclmc(0.5, 3))
    _, info = ebm.advance(key, energy, sampler, 2)
    assert info.num_gradients.tolist() == [13] * 4
    with pytest.raises(ValueError, match="got events of 1 number, expected at least 2"):
        ebm.advance(key, energy, ebm.init_sampler(jnp.ones(4), kernels.mclmc(0.5, 1.0)), 2)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: kernels.barker(0.0), "step_size: got 0.0"),
        (lambda: kernels.barker(0.1, inverse_mass_matrix=jnp.array([1.0, -1.0])), "inverse_mass_matrix"),
        (lambda: kernels.random_walk(-1.0), "sigma: got -1.0"),
        (lambda: kernels.random_walk(jnp.ones((2, 3))), "sigma: got shape"),
        (lambda: kernels.mclmc(0.1, 0.0), "decoherence_length: got 0.0"),
        (lambda: kernels.mclmc(0.0, 1.0), "step_size: got 0.0"),
        (lambda: kernels.adjusted_mclmc(0.1, 0), "num_integration_steps: got 0"),
    ],
)
def test_bad_arguments_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
