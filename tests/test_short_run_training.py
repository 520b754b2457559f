"""Short runs as models: any kernel, draws at any time, what training with them fits, and what it does not."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.tree_util import Partial
from numpyro.infer import Predictive

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials, recipes
from ebm_ppl.diagnostics import energy_distance, find_escape, sampling_times
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.potentials import ShortRun
from ebm_ppl.roles import Role
from ebm_ppl.testing import (
    boltzmann_probabilities,
    heat_bath_probabilities,
    kernel_conformance,
    multinomial_test,
    pair_statistics,
    short_run_curvature,
    short_run_training_map,
    short_run_variance,
)

NORMAL = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
LINE = dist.Normal(0.0, 1.0)


def quadratic(a, x):
    return 0.5 * a * jnp.sum(x**2)


# --- short runs of any kernel


def spins(key, num_chains):
    return jax.random.choice(key, jnp.array([-1, 1], jnp.int8), (num_chains, 4))


COUPLINGS = np.array([[0, 0.7, 0, 0.4], [0.7, 0, 0.5, 0], [0, 0.5, 0, -0.6], [0.4, 0, -0.6, 0]])
BIASES = np.array([0.3, 0.0, -0.2, 0.1])
MACHINE = potentials.BoltzmannMachine(COUPLINGS, BIASES, coding="spin")


@pytest.mark.parametrize(("num_steps", "others"), [(1, [2, 50]), (2, [1])])
def test_spins_follow_the_law_of_exactly_k_sweeps(key, num_steps, others):
    kernel = kernels.short_run(num_steps, spins, kernel=kernels.gibbs())
    sampler = ebm.init_sampler(jnp.ones((20_000, 4), jnp.int8), kernel)
    sampler, info = ebm.advance(key, MACHINE, sampler, 1)
    index = ((np.asarray(sampler.position) + 1) // 2) @ np.array([8, 4, 2, 1])
    counts = np.bincount(index, minlength=16)
    assert multinomial_test(counts, heat_bath_probabilities(COUPLINGS, BIASES, num_steps)).passed
    for other in others:
        assert not multinomial_test(counts, heat_bath_probabilities(COUPLINGS, BIASES, other)).passed
    assert info.num_energies.tolist()[0] == num_steps


@pytest.mark.parametrize("inner", [kernels.mala(0.3), kernels.hmc(0.3, 3), kernels.unadjusted_langevin(0.1)])
def test_other_kernels_keep_the_protocol(key, inner):
    kernel = kernels.short_run(3, NORMAL, kernel=inner)
    position = jax.random.normal(key, (16, 2))
    kernel_conformance(key, kernel, Partial(quadratic, jnp.asarray(2.0)), position).raise_if_failed()
    assert set(kernel.keywords) >= {"init", "step_size"}


def test_of_langevin_nothing_has_changed(key):
    """The two spellings of one sampler give the same runs to rounding, and its tunables are those of Langevin."""
    spelled = kernels.short_run(7, NORMAL, step_size=0.1, temperature=0.5)
    given = kernels.short_run(7, NORMAL, kernel=kernels.langevin(0.1, temperature=0.5))
    energy = Partial(quadratic, jnp.asarray(1.0))
    ends = [
        ebm.advance(key, energy, ebm.init_sampler(jnp.zeros((6, 2)), kernel), 1)[0].position
        for kernel in (spelled, given)
    ]
    np.testing.assert_array_equal(*ends)
    assert set(given.keywords) == {"init", "step_size", "temperature"}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: kernels.short_run(3, NORMAL), TypeError, "step_size: got None without a kernel"),
        (
            lambda: kernels.short_run(3, NORMAL, kernel=kernels.mala(0.1), step_size=0.1),
            TypeError,
            "step_size: got one",
        ),
        (
            lambda: kernels.short_run(3, NORMAL, kernel=kernels.short_run(2, NORMAL, step_size=0.1)),
            TypeError,
            "draws its chains anew",
        ),
        (
            lambda: ShortRun(quadratic, kernels.mala(0.1)),
            TypeError,
            "kernel: got Partial, expected ebm.kernels.short_run",
        ),
        (lambda: ShortRun(3, kernels.short_run(2, NORMAL, step_size=0.1)), TypeError, "potential: got int"),
        (lambda: ebm.draw_short_run(jax.random.key(0), quadratic, 3), TypeError, "without a kernel"),
        (lambda: ebm.draw_short_run(jax.random.key(0), bowl(), 3, times=(5, 5)), ValueError, "expected increasing"),
        (lambda: ebm.draw_short_run(jax.random.key(0), bowl(), 3, times=()), ValueError, "times: got none"),
        (lambda: ebm.draw_short_run(jax.random.key(0), bowl(), 0), ValueError, "num_draws: got 0"),
        (lambda: sampling_times(jax.random.key(0), bowl(), jnp.ones((5, 2)), times=(1, 2)), ValueError, "5 among them"),
        (lambda: sampling_times(jax.random.key(0), bowl(), jnp.ones((5, 3))), ValueError, "data: got rows of shape"),
        (lambda: energy_distance(jnp.ones((5, 2)), jnp.ones((5, 3))), ValueError, "second: got shape"),
    ],
)
def test_bad_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


quadratic_1 = Partial(quadratic, jnp.asarray(1.0))


def bowl(a=1.0, num_steps=5, step_size=0.1, base=NORMAL):
    return ShortRun(Partial(quadratic, jnp.asarray(a)), kernels.short_run(num_steps, base, step_size=step_size))


# --- draws


def test_draws_at_k_are_those_of_the_kernel_and_other_times_do_not_change_them(key):
    for model in (
        bowl(),
        ShortRun(Partial(quadratic, jnp.asarray(1.0)), kernels.short_run(5, NORMAL, kernel=kernels.mala(0.3))),
    ):
        draws = ebm.draw_short_run(key, model, 8)
        at_times = ebm.draw_short_run(key, model, 8, times=(0, 2, 5, 9))
        np.testing.assert_allclose(at_times[2], draws, rtol=1e-6)
        algorithm = model.sampler(model)
        state, _ = algorithm.step(key, algorithm.init(jnp.zeros((8, 2)), key))
        np.testing.assert_allclose(state.position, draws, rtol=1e-6)
        two = ebm.draw_short_run(key, model.plain, 8, times=(2,), kernel=model.sampler)
        np.testing.assert_allclose(at_times[1], two[0], rtol=1e-6)
        assert not bool((at_times[2] == at_times[3]).any())


def test_the_variance_of_draws_is_the_closed_form_at_every_time(key):
    for a in (1.5, -0.4):
        draws = ebm.draw_short_run(key, bowl(a, base=LINE), 40_000, times=(0, 1, 5, 12))
        exact = [short_run_variance(a, 0.1, time, 1.0) if time else 1.0 for time in (0, 1, 5, 12)]
        np.testing.assert_allclose(np.asarray(draws).var(axis=1), exact, rtol=5.0 * np.sqrt(2 / 40_000))


def test_what_is_trained_is_the_energy_alone():
    model = bowl()
    assert len(jax.tree.leaves(eqx.filter(model, potentials.trainable(model)))) == 1
    assert float(model(jnp.array([1.0, 1.0]))) == 1.0
    assert (model.num_steps, model.support, model.reference, model.site_values) == (5, None, None, None)
    machine = ShortRun(MACHINE, kernels.short_run(2, spins, kernel=kernels.gibbs()))
    assert machine.site_values == (-1, 1)
    assert ebm.draw_short_run(jax.random.key(0), machine, 3).dtype == jnp.int8


# --- training fits the law of the last step


def train_curvature(key, variance, *, num_updates, num_steps=5, step_size=0.1, rate=0.5, chains=20_000, start=1.0):
    """Curvatures over training with rows whose mean square is exactly ``variance``."""
    rows = jnp.sqrt(variance) * jnp.array([1.0, -1.0])
    kernel = kernels.short_run(num_steps, LINE, step_size=step_size)
    optimizer = optax.sgd(rate)
    potential = Partial(quadratic, jnp.asarray(start))
    state = ebm.init_train(potential, optimizer, ebm.init_sampler(jnp.zeros(chains), kernel))
    objective = functools.partial(objectives.persistent_contrastive_divergence, num_steps=1)
    state, history = ebm.fit(key, state, rows, objective, optimizer, num_steps=num_updates, report_every=num_updates)
    return 2.0 * history["energy_data"] / variance, float(state.potential.args[0])


@pytest.mark.parametrize("variance", [0.5, 4.0])
def test_training_follows_its_exact_map_to_its_fixed_point(key, variance):
    """For the wide rows the curvature that is learned is negative: an energy without a density."""
    found, last = train_curvature(key, variance, num_updates=150)
    exact = [1.0]
    for _ in range(149):
        exact.append(short_run_training_map(exact[-1], variance, 0.5, 0.1, 5, 1.0))
    np.testing.assert_allclose(found, exact, atol=0.08)
    fixed = short_run_curvature(variance, 0.1, 5, 1.0)
    assert last == pytest.approx(fixed, abs=0.08)
    assert (fixed > 0) == (variance < 1.0 + 2 * 0.1 * 5)
    assert abs(last - 1.0 / variance) > 0.3


def test_a_machine_matches_at_k_and_nowhere_else(key):
    """Sampled short runs of spins, against exact enumeration of what they learned."""
    target = boltzmann_probabilities(COUPLINGS, BIASES)
    mean, second = pair_statistics(target)
    rows = jnp.asarray(ebm.targets.discrete.all_states((-1, 1), (4,)))[
        np.random.default_rng(0).choice(16, 20_000, p=target)
    ]
    state, _ = recipes.short_run(
        key, rows, num_updates=500, num_steps=2, kernel=kernels.gibbs(), network=MACHINE_AT_ZERO, batch_size=2000,
        optimizer=optax.sgd(optax.cosine_decay_schedule(0.5, 500)), progress_bar=False,
    )  # fmt: skip
    machine = state.potential.plain
    weights, biases = np.asarray(machine.couplings, float), np.asarray(machine.biases, float)

    def mismatch(law):
        found = pair_statistics(law)
        return max(np.abs(found[0] - mean).max(), np.abs(found[1] - second).max())

    at = {time: mismatch(heat_bath_probabilities(weights, biases, time)) for time in (1, 2, 4)}
    assert at[2] < 4.0 / np.sqrt(2000)
    assert mismatch(boltzmann_probabilities(weights, biases)) > 2.0 * at[2]
    assert at[1] > 2.0 * at[2]


MACHINE_AT_ZERO = potentials.BoltzmannMachine(np.zeros((4, 4)), np.zeros(4), coding="spin")


def test_three_starts_of_one_recipe(key):
    rows = 1.5 + 0.5 * jax.random.normal(key, (400, 2))
    kinds = {}
    for start in ("noise", "data", "persistent"):
        state, history = recipes.short_run(
            key, rows, num_updates=30, num_steps=4, step_size=0.05, start=start, init=NORMAL, progress_bar=False
        )
        kinds[start] = type(state.potential).__name__
        assert history["loss"].shape == (30,)
        chains = np.asarray(state.sampler.position)
        assert np.isfinite(chains).all()
    assert kinds == {"noise": "ShortRun", "data": "Tilted", "persistent": "Tilted"}


def test_a_fall_without_end_is_told_and_draws_are_as_good_as_ever(key):
    rows = 3.0 * jax.random.normal(key, (2000,))
    with pytest.warns(RuntimeWarning, match="falls without end, .* this is a 5-step sampler, not a density"):
        state, _ = recipes.short_run(
            key, rows, num_updates=300, num_steps=5, step_size=0.1, init=LINE, batch_size=2000, num_chains=2000,
            network=Partial(quadratic, jnp.asarray(1.0)), base=dist.ImproperUniform(dist.constraints.real, (), ()),
            optimizer=optax.sgd(0.1), progress_bar=False,
        )  # fmt: skip
    assert float(state.potential.plain.potential.args[0]) < 0
    draws = ebm.draw_short_run(key, state.potential, 4000)
    assert float(draws.std()) == pytest.approx(3.0, rel=0.06)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"start": "somewhere"}, ValueError, "start: got 'somewhere'"),
        ({"kernel": kernels.mala(0.1), "step_size": 0.1}, ValueError, "step_size: got 0.1 together with a kernel"),
        ({"kernel": kernels.gibbs()}, ValueError, "network, base: a discrete kernel needs a network"),
        (
            {"kernel": kernels.gibbs(), "network": MACHINE, "data": jnp.zeros((5, 4), jnp.int8)},
            ValueError,
            "data: got",
        ),
        ({"base": dist.ImproperUniform(dist.constraints.real_vector, (), (2,))}, ValueError, "init: got None with"),
        ({"base": dist.Uniform(0.0, 1.0).expand([2]).to_event(1)}, ValueError, "base: got one on"),
        ({"num_steps": 0}, ValueError, "num_steps: got 0"),
        ({"optimizer": "adam"}, TypeError, "optimizer: got str"),
        ({"network": lambda x: x}, ValueError, "network: returned shape"),
    ],
)
def test_bad_arguments_of_the_recipe_are_refused(key, change, error, text):
    with pytest.raises(error, match=text):
        recipes.short_run(key, **{"data": jnp.ones((6, 2)) * jnp.arange(6.0)[:, None], "num_updates": 2, **change})


# --- quality against the number of steps


def test_the_energy_distance_is_that_of_normals(key):
    """``E|X - Y|`` of normals in one dimension has a closed form; the error is the spread over sets."""
    first, second = jax.random.split(key)

    def mean_length(shift, variance):
        sd = np.sqrt(variance)
        return sd * np.sqrt(2 / np.pi) * np.exp(-(shift**2) / (2 * variance)) + shift * (2 * normal_cdf(shift / sd) - 1)

    exact = 2 * mean_length(1.0, 2.0) - 2 * mean_length(0.0, 2.0)
    found = [
        energy_distance(
            jax.random.normal(jax.random.fold_in(first, n), (300,)),
            1.0 + jax.random.normal(jax.random.fold_in(second, n), (200,)),
        )
        for n in range(60)
    ]
    values, errors = (np.array([getattr(one, name) for one in found]) for name in ("value", "standard_error"))
    assert abs(values.mean() - exact) < 4.0 * values.std() / np.sqrt(60)
    assert 0.75 < errors.mean() / values.std(ddof=1) < 1.3


def normal_cdf(x):
    return 0.5 * (1.0 + float(jax.scipy.special.erf(x / np.sqrt(2))))


def test_at_k_it_matches_and_the_words_follow_the_numbers(key):
    variance = float(short_run_variance(-0.4, 0.1, 5, 1.0))
    rows = jnp.sqrt(variance) * jax.random.normal(key, (2000,))
    found = sampling_times(key, bowl(-0.4, base=LINE), rows, times=(1, 3, 5, 8, 15, 60), num_draws=2000)
    assert found.best_time == 5
    assert found.is_short_run
    assert found.verdict == "this is a 5-step sampler, not a density"
    assert found.moment_mismatch[2] < 3.0 * found.moment_noise < found.moment_mismatch[0]
    # The mean energy is linear in the curvature: its gap vanishes with the mismatch, and changes sign there.
    assert abs(found.energy_gap[2]) < 4.0 * found.energy_gap_error[2]
    assert found.energy_gap[0] * found.energy_gap[4] < 0
    exact = -0.2 * (variance - short_run_variance(-0.4, 0.1, 15, 1.0))
    assert found.energy_gap[4] == pytest.approx(exact, abs=4.0 * found.energy_gap_error[4])
    assert "5  " in str(found)
    assert found.verdict in str(found)
    ebm.plots.sampling_times(found).savefig("/dev/null", format="png")


def test_a_run_that_has_arrived_is_called_none(key):
    """Curvature 2 and eighty steps of .05: the chains stay where they are from then on."""
    rows = jnp.sqrt(1 / (2.0 - 0.05 * 2.0)) * jax.random.normal(key, (1000,))
    found = sampling_times(key, bowl(2.0, 80, 0.05, LINE), rows, times=(1, 80, 300, 2000))
    assert not found.is_short_run
    assert found.verdict == "up to 2000 steps the draws stay as near to the data as at 80"
    early = sampling_times(key, bowl(2.0, 2, 0.05, dist.Normal(0.0, 5.0)), rows, times=(2, 80, 300))
    assert early.gets_nearer
    assert early.verdict.startswith("draws get nearer to the data after 2 steps")
    short = sampling_times(key, bowl(2.0, 80, 0.05, LINE), rows, times=(1, 80))
    assert short.verdict.startswith("nothing was looked at after 80")


def test_draws_that_went_far_are_farther_whatever_their_squares(key):
    """At 1e20 a square is no number of 32 bits; the chains have left all the same."""
    rows = jnp.sqrt(4.2) * jax.random.normal(key, (300, 2))
    found = sampling_times(key, bowl(-1.0), rows, times=(5, 500), num_draws=300)
    assert found.is_short_run
    assert energy_distance(rows, 1e25 * rows).value > 1e24


def test_a_doubled_distance_is_a_change(key):
    rows = 0.7 + 0.9 * jax.random.normal(key, (2000,))
    start = dist.Normal(1.5, 0.7)
    model = ShortRun(lambda x: 0.5 * x**2, kernels.short_run(5, start, step_size=0.05))
    assert sampling_times(key, model, rows, times=(5, 500), num_draws=3000).is_short_run


def test_nothing_is_called_a_change_by_chance(key):
    """Of chains that have arrived, over ten sets of draws."""
    rows = jnp.sqrt(1 / (2.0 - 0.05 * 2.0)) * jax.random.normal(key, (500,))
    model = bowl(2.0, 80, 0.05, LINE)
    found = [
        sampling_times(jax.random.fold_in(key, number), model, rows, times=(80, 100, 150, 200), num_draws=500)
        for number in range(10)
    ]
    assert not any(one.is_short_run or one.gets_nearer for one in found)


def test_where_all_is_lost_it_still_prints(key):
    model = ShortRun(lambda x: jnp.nan * x, kernels.short_run(3, LINE, step_size=0.01))
    found = sampling_times(key, model, jax.random.normal(key, (30,)), times=(1, 3, 9), num_draws=30)
    assert found.num_lost.tolist() == [30, 30, 30]
    assert found.best_time == 3
    assert "not a density" in str(found)
    ebm.plots.sampling_times(found).savefig("/dev/null", format="png")


def test_lost_draws_are_counted_and_shown(key):
    model = ShortRun(lambda x: -(x**4) / 4, kernels.short_run(3, LINE, step_size=0.01))
    found = sampling_times(key, model, jax.random.normal(key, (300,)), times=(1, 3, 500), num_draws=300)
    assert found.num_lost[0] == 0 < found.num_lost[2]
    assert found.is_short_run
    assert np.isnan(found.energy_distance[2])
    assert np.isinf(found.moment_mismatch[2])
    assert found.best_time in (1, 3)
    with pytest.raises(TypeError, match="found: got str"):
        ebm.plots.sampling_times("found")
    ebm.plots.sampling_times(found).savefig("/dev/null", format="png")


def test_mismatch_is_told_for_every_array_of_parameters(key):
    network = potentials.MLP(2, key=key, width=8, depth=1, zero_init=False)
    model = ShortRun(network, kernels.short_run(3, NORMAL, step_size=0.1))
    rows = 2.0 + jax.random.normal(key, (130, 2))  # more than two batches, and not a multiple of one
    found = sampling_times(key, model, rows, times=(3,), num_draws=70)
    assert sorted(found.mismatch_of) == [
        ".potential.head.weight", ".potential.layers[0].bias", ".potential.layers[0].weight",
    ]  # fmt: skip
    draws = ebm.draw_short_run(key, model, 70)
    units = [np.asarray(jax.nn.silu(jax.vmap(network.layers[0])(x))) for x in (rows, draws)]
    spread = units[0].std(axis=0)  # and at least what 130 rows could tell from none
    last = (units[0].mean(axis=0) - units[1].mean(axis=0)) / np.maximum(spread, spread.max() / np.sqrt(130))
    np.testing.assert_allclose(found.mismatch_of[".potential.head.weight"], np.sqrt((last**2).mean()), rtol=1e-3)
    told = sampling_times(key, model, rows, times=(3,), num_draws=70, statistics=lambda x: x)
    shift = (rows.mean(axis=0) - draws.mean(axis=0)) / rows.std(axis=0)
    np.testing.assert_allclose(told.moment_mismatch[0], np.sqrt((shift**2).mean()), rtol=1e-3)


def test_a_pixel_that_is_always_off_in_the_rows_does_not_drown_the_rest(key):
    rows = jax.random.bernoulli(key, 0.5, (400, 3)).astype(float).at[:, 2].set(0.0)
    start = lambda key, n: (jax.random.uniform(key, (n, 3)) < jnp.array([0.5, 0.5, 0.01])).astype(float)
    model = ShortRun(lambda x: 0.0 * jnp.sum(x), kernels.short_run(1, start, step_size=1e-12))
    found = sampling_times(key, model, rows, times=(1,), num_draws=400, statistics=lambda x: x)
    assert 0.0 < found.moment_mismatch[0] < 1.0
    dead = sampling_times(key, model, 0.0 * rows, times=(1,), num_draws=400, statistics=lambda x: x[2])
    assert np.isinf(dead.moment_mismatch[0])


def test_a_fall_is_found_where_there_is_one(key):
    rows = jax.random.normal(key, (200, 8))
    assert find_escape(key, lambda x: 0.5 * jnp.sum(x**2), rows) is None
    bent = jnp.ones(8).at[3].set(-0.01)
    found = find_escape(key, lambda x: 0.5 * jnp.sum(bent * x**2), rows)
    assert abs(found.direction[3]) > 0.9
    assert (np.diff(found.energies) < 0).all()
    network = potentials.MLP(8, key=key, width=16, depth=1, zero_init=False)  # grows linearly, up in some directions
    assert find_escape(key, network, rows) is not None
    assert find_escape(key, potentials.tilt(network, dist.Normal(0.0, 1.0).expand([8]).to_event(1)), rows) is None
    assert find_escape(key, lambda x: -jnp.exp(jnp.sum(x**2)), rows) is not None  # minus infinity at once
    far = lambda x: 0.5 * jnp.sum((x - 100.0) ** 2)
    assert find_escape(key, far, 0.01 * rows) is None  # falls for ten thousand deviations of these rows, and then rises
    half = potentials.tilt(lambda x: -2.0 * x, dist.Exponential(1.0))
    assert find_escape(key, half, jnp.linspace(0.1, 2.0, 9)) is None


# --- in a NumPyro model


def prior(potential):
    def model():
        x = numpyro.sample("x", ebm.EBM(potential, dist.ImproperUniform(dist.constraints.real_vector, (), (2,))))
        numpyro.sample("y", dist.Normal(x[0], 0.1), obs=0.3)

    return model


def test_check_model_says_that_it_is_no_density_and_no_policy_takes_it_for_one():
    model = prior(bowl())
    report = ebm.check_model(model)
    assert report.sites["x"].role is Role.SHORT_RUN
    assert report.sites["x"].notes == ("this is a 5-step sampler, not a density",)
    assert "handlers.simulate" in str(report)
    policies = [
        ebm.handlers.constant_normalizer,
        ebm.handlers.exact_normalizer,
        functools.partial(ebm.handlers.negative_phase, kernel=kernels.mala(0.1)),
    ]
    for policy in policies:
        with pytest.raises(
            UnknownNormalizerError,
            match=r"site 'x': this is a 5-step sampler, .* cannot serve as a prior or a likelihood",
        ):
            ebm.check_model(policy(model))
        with pytest.raises(UnknownNormalizerError, match="cannot serve as a prior"):
            numpyro.handlers.seed(policy(model), 0)()
    hidden = prior(potentials.temper(potentials.add(bowl(), bowl(2.0)), 2.0))
    with pytest.raises(UnknownNormalizerError, match="cannot serve as a prior"):
        ebm.check_model(ebm.handlers.constant_normalizer(hidden))
    with pytest.raises(ValueError, match="log_normalizer: got one for the energy of a short run"):
        ebm.EBM(bowl(), NORMAL, log_normalizer=0.0)
    with pytest.raises(ValueError, match="log_normalizer: got one for the energy of a short run"):
        ebm.EBM(bowl(), NORMAL).with_normalizer(0.0, "exact")
    run = bowl()
    for disguise in (run.__call__, functools.partial(run), lambda x: run(x), eqx.filter_jit(run)):
        with pytest.raises(UnknownNormalizerError, match="cannot serve as a prior"):
            ebm.check_model(ebm.handlers.constant_normalizer(prior(disguise)))
    ebm.check_model(ebm.handlers.constant_normalizer(prior(bowl().plain)))  # said outright, it is taken


def test_latent_parameters_do_not_make_it_a_prior():
    def model():
        scale = numpyro.sample("scale", dist.LogNormal())
        numpyro.sample("x", ebm.EBM(Scaled(bowl(), scale), NORMAL))

    with pytest.raises(UnknownNormalizerError, match="cannot serve as a prior"):
        numpyro.infer.MCMC(
            ebm.infer.Exchange(model, inner_kernel=kernels.mala(0.1), inner_steps=5),
            num_warmup=1, num_samples=1, progress_bar=False,
        ).run(jax.random.key(0))  # fmt: skip


class Scaled(eqx.Module):
    inner: ShortRun
    scale: jax.Array

    def __call__(self, x):
        return self.scale * self.inner(x)


def test_it_is_simulated_by_its_own_runs(key):
    model = bowl(-0.4)
    simulated = ebm.handlers.simulate(prior(model), kernel=model.sampler, num_steps=1)
    draws = Predictive(simulated, num_samples=4000)(key)
    exact = float(short_run_variance(-0.4, 0.1, 5, 1.0))
    assert float(draws["x"].var()) == pytest.approx(exact, rel=0.08)


def test_observed_rows_are_no_likelihood_of_it_either():
    def model(rows):
        with numpyro.plate("rows", len(rows)):
            numpyro.sample("x", ebm.EBM(bowl(), NORMAL), obs=rows)

    assert ebm.check_model(model, jnp.ones((3, 2))).sites["x"].role is Role.SHORT_RUN
    for policy in (ebm.handlers.constant_normalizer, ebm.handlers.exact_normalizer):
        with pytest.raises(UnknownNormalizerError, match="cannot serve as a prior or a likelihood"):
            ebm.check_model(policy(model), jnp.ones((3, 2)))


def test_draws_of_another_sampler_are_not_simulated(key):
    run = bowl()
    others = [
        (prior(run), {"kernel": kernels.mala(0.1), "num_steps": 10}),
        (prior(run), {"kernel": kernels.short_run(6, NORMAL, step_size=0.1), "num_steps": 1}),
        (prior(run), {"kernel": run.sampler, "num_steps": 2}),
        (lambda: numpyro.sample("x", ebm.EBM(run, NORMAL)), {"kernel": run.sampler, "num_steps": 1}),
    ]
    for model, options in others:
        simulated = ebm.handlers.simulate(model, **options)
        with pytest.raises(ValueError, match="whose draws are those of its own runs"):
            Predictive(simulated, num_samples=2)(key)


def test_training_keeps_the_energy_and_its_runs_together(key):
    rows = jax.random.normal(key, (16, 2))
    run = kernels.short_run(3, NORMAL, kernel=kernels.mala(0.1))
    model, optimizer = ShortRun(potentials.MLP(2, key=key, width=4, depth=1), run), optax.sgd(0.1)
    other = kernels.short_run(3, NORMAL, kernel=kernels.mala(0.2))
    with pytest.raises(ValueError, match="its kernel is not the 3-step run of the potential"):
        ebm.init_train(model, optimizer, ebm.init_sampler(rows, other))
    with pytest.raises(ValueError, match="which would change the kernel"):
        ebm.init_train(model, optimizer, ebm.init_sampler(rows, run), sampler_optimizer=optimizer)
    state = ebm.init_train(model, optimizer, ebm.init_sampler(rows, run))
    objective = functools.partial(objectives.persistent_contrastive_divergence, num_steps=1)
    with pytest.raises(ValueError, match="which would change the kernel"):
        ebm.fit(key, state, rows, objective, optimizer, num_steps=2, target_acceptance=0.6)
    ebm.fit(key, state, rows, objective, optimizer, num_steps=2)


def test_training_by_short_runs_inside_a_model_is_no_prior(key):
    """An observed site with such an energy is what is trained: the gradient needs no density."""

    def model(rows):
        a = numpyro.param("a", jnp.asarray(1.0))
        run = ShortRun(Partial(quadratic, a), kernels.short_run(5, NORMAL, step_size=0.1))
        with numpyro.plate("rows", len(rows)):
            numpyro.sample("x", ebm.EBM(run, dist.ImproperUniform(dist.constraints.real_vector, (), (2,))), obs=rows)

    kernel = kernels.short_run(5, NORMAL, step_size=0.1)
    policy = ebm.handlers.negative_phase(model, kernel=kernel, num_chains=64, num_steps=1)
    report = ebm.check_model(policy, jnp.ones((8, 2)))
    assert report.sites["x"].role is Role.LEARNED
    assert report.sites["x"].notes[0] == "this is a 5-step sampler, not a density"
