"""The training loop: exact answers, one trace, resumption, loud failure, and what it refuses."""

import functools

import distrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import optax.contrib
import pytest

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials
from ebm_ppl.testing import t_test_chain_means
from ebm_ppl.training import loop
from ebm_ppl.training.loop import _run_chunk


class Quadratic(eqx.Module):
    """U(x) = exp(log_precision) |x - mean|^2 / 2."""

    log_precision: jax.Array
    mean: jax.Array

    def __call__(self, x):
        return 0.5 * jnp.exp(self.log_precision) * jnp.sum((x - self.mean) ** 2)


def quadratic_start():
    return Quadratic(jnp.zeros(()), jnp.zeros(2))


def persistent(num_steps):
    return functools.partial(objectives.persistent_contrastive_divergence, num_steps=num_steps)


def gaussian_data():
    return np.random.default_rng(0).normal(1.0, 0.5, (200, 2)).astype(np.float32)


def chains(num=512, dim=2, kernel=None):
    return ebm.init_sampler(jax.random.normal(jax.random.key(9), (num, dim)), kernel or kernels.mala(0.1))


def test_maximum_likelihood_recovers_the_exact_answer(key):
    """Exact MLE of the data: log precision 1.3999, mean (.951, 1.012). Independent runs, t-test on their answers."""
    data = gaussian_data()
    exact_mean = data.mean(axis=0)
    exact = -np.log(((data - exact_mean) ** 2).mean())
    np.testing.assert_allclose(exact, 1.3999, atol=1e-4)
    np.testing.assert_allclose(exact_mean, [0.951, 1.012], atol=5e-4)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 600, 0.01))
    objective = persistent(5)
    answers = []
    for run in range(8):
        start, train = jax.random.split(jax.random.fold_in(key, run))
        sampler = ebm.init_sampler(jax.random.normal(start, (512, 2)), kernels.mala(0.1))
        state = ebm.init_train(quadratic_start(), optimizer, sampler)
        state, _ = ebm.fit(train, state, data, objective, optimizer, num_steps=600, target_acceptance=0.6)
        answers.append([float(state.potential.log_precision), *map(float, state.potential.mean)])
    for value, column in zip([exact, *exact_mean], np.array(answers).T, strict=True):
        check = t_test_chain_means(column, float(value))
        check.raise_if_failed()
        np.testing.assert_allclose(column, value, atol=0.06)


def test_the_history_has_one_entry_per_update_and_metric(key):
    optimizer = optax.sgd(0.01)
    state = ebm.init_train(quadratic_start(), optimizer, chains(32))
    state, history = ebm.fit(
        key, state, gaussian_data(), persistent(2), optimizer, num_steps=7, batch_size=50, report_every=3
    )
    assert int(state.step) == 7
    expected = {"loss", "grad_norm", "step_size", "energy_data", "energy_negative", "energy_gap", "energy_gap_error",
                "acceptance_rate", "num_divergent", "num_nonfinite", "frozen_fraction", "negative_ess",
                "is_collapsed", "chain_age", "energy_drift", "energy_drift_error", "energy_autocorrelation"}  # fmt: skip
    assert set(history) == expected
    assert {values.shape for values in history.values()} == {(7,)}


def test_one_trace_for_every_length_and_step_size(key):
    traces = 0

    def counted(potential, sampler, batch, key):
        nonlocal traces
        traces += 1
        return objectives.persistent_contrastive_divergence(potential, sampler, batch, key, num_steps=2)

    optimizer, data = optax.sgd(0.01), gaussian_data()
    state = ebm.init_train(quadratic_start(), optimizer, chains(32))

    def fit(state, num_steps):
        return ebm.fit(key, state, data, counted, optimizer, num_steps=num_steps, batch_size=50, report_every=10)[0]

    state = fit(state, 25)
    once = traces
    for num_steps in (1, 10, 137):
        state = fit(state, num_steps)
    fit(state._replace(sampler=chains(32, kernel=kernels.mala(0.003))), 5)
    assert traces == once


def test_a_fresh_partial_of_the_same_objective_does_not_recompile(key):
    optimizer, data = optax.sgd(0.01), gaussian_data()
    state = ebm.init_train(quadratic_start(), optimizer, chains(32))
    ebm.fit(key, state, data, persistent(2), optimizer, num_steps=3)
    before = _run_chunk._cached._cache_size()
    ebm.fit(key, state, data, persistent(2), optimizer, num_steps=3)
    assert _run_chunk._cached._cache_size() == before


def test_the_host_hears_from_the_device_once_per_report(key, monkeypatch):
    """The loop itself never waits: the only device-to-host reads are the handful that follow each chunk."""
    optimizer, data = optax.sgd(0.01), gaussian_data()
    state = ebm.init_train(quadratic_start(), optimizer, chains(32))
    objective = persistent(2)
    calls = []
    real = loop._run_chunk
    monkeypatch.setattr(loop, "_run_chunk", lambda *a, **k: calls.append(1) or real(*a, **k))
    ebm.fit(key, state, data, objective, optimizer, num_steps=95, report_every=20)
    assert len(calls) == 5
    jaxpr = str(
        jax.make_jaxpr(lambda s, b, k: ebm.train_step(s, b, k, objective, optimizer)[1])(
            eqx.filter(state, eqx.is_array), jnp.asarray(data), key
        )
    )
    assert not any(name in jaxpr for name in ("callback", "infeed", "outfeed"))


def test_memory_of_the_loop_does_not_depend_on_its_length(key):
    """The number of updates is an argument of the compiled loop; it appears in no shape."""
    optimizer, data = optax.sgd(0.01), gaussian_data()
    state = ebm.init_train(quadratic_start(), optimizer, chains(32))
    objective = persistent(2)
    ebm.fit(key, state, data, objective, optimizer, num_steps=5, report_every=50)
    before = len(jax.live_arrays())
    ebm.fit(key, state, data, objective, optimizer, num_steps=5, report_every=50)
    few = len(jax.live_arrays())
    ebm.fit(key, state, data, objective, optimizer, num_steps=1000, report_every=50)
    assert len(jax.live_arrays()) <= max(before, few)


def leaves(state):
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
            for x in jax.tree.leaves(eqx.filter(state, eqx.is_array))]  # fmt: skip


@pytest.mark.parametrize(
    ("report_every", "pieces"),
    [
        (7, [25, 25, 10]),
        (100, [1, 59]),
        *[pytest.param(*case, marks=pytest.mark.slow) for case in [(7, [60]), (7, [1, 59]), (100, [60])]],
        pytest.param(100, [25, 25, 10], marks=pytest.mark.slow),
    ],
)
def test_resumption_is_bit_identical(pieces, report_every):
    def run(pieces, report_every, key):
        optimizer, data = optax.adam(1e-2), gaussian_data()
        net = potentials.MLP(2, key=jax.random.key(1), width=8, depth=1)
        potential = potentials.tilt(net, dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        state = ebm.init_train(potential, optimizer, chains(32))
        for index, num_steps in enumerate(pieces):
            state, _ = ebm.fit(
                key if index == 0 else None, state, data, persistent(3), optimizer, num_steps=num_steps, batch_size=64,
                report_every=report_every, target_acceptance=0.6,
            )  # fmt: skip
        return leaves(state)

    for ours, theirs in zip(
        run(pieces, report_every, jax.random.key(3)), run([60], 13, jax.random.key(3)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_every_row_is_seen_once_an_epoch(key):
    """Rows are shuffled without replacement, and differently in each epoch."""
    seen = []

    def spy(potential, batch, key):
        jax.debug.callback(lambda rows: seen.append(np.asarray(rows)), batch, ordered=True)
        return jax.vmap(potential)(batch[:, None]).mean() * 0.0

    data = jnp.arange(60.0)
    optimizer = optax.sgd(0.0)
    state = ebm.init_train(Quadratic(jnp.zeros(()), jnp.zeros(1)), optimizer)

    def objective(potential, sampler, batch, key):
        return spy(potential, batch, key), (sampler, {})

    ebm.fit(key, state, data, objective, optimizer, num_steps=12, batch_size=10)
    jax.effects_barrier()
    epochs = np.array(seen).reshape(2, 60)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(60.0), (2, 1)))
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_base_of_a_tilted_potential_does_not_move(key):
    base = dist.MultivariateNormal(jnp.array([0.5, -0.5]), jnp.array([[1.0, 0.3], [0.3, 2.0]]))
    potential = potentials.tilt(potentials.MLP(2, key=key, width=8, depth=1), base)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    state = ebm.init_train(potential, optimizer, chains(64))
    state, _ = ebm.fit(key, state, gaussian_data(), persistent(2), optimizer, num_steps=20)
    after = state.potential.base.value
    np.testing.assert_array_equal(after.loc, base.loc)
    np.testing.assert_array_equal(after.scale_tril, base.scale_tril)
    assert not np.array_equal(state.potential.potential.head.weight, potential.potential.head.weight)


def test_the_step_size_follows_the_target_acceptance_while_the_energy_changes(key):
    data = 0.05 * gaussian_data()  # the energy sharpens by a factor of 1,600, so a fixed step size would freeze
    optimizer = optax.adam(0.02)
    state = ebm.init_train(quadratic_start(), optimizer, chains(kernel=kernels.mala(0.5)))
    _, history = ebm.fit(key, state, data, persistent(5), optimizer, num_steps=1500, target_acceptance=0.6)
    assert abs(history["acceptance_rate"][-100:].mean() - 0.6) < 0.05
    assert history["step_size"][-1] < 0.1 * history["step_size"][0]


@eqx.filter_jit
def _explode(x, threshold):
    return jnp.where(x > threshold, jnp.nan, x)


class Exploding(eqx.Module):
    """A quadratic that becomes NaN once its parameter has grown past a threshold, on rows beyond 1.9 only."""

    scale: jax.Array

    def __call__(self, x):
        bad = (self.scale > 1.05) & (x[0] > 1.9)
        return jnp.where(bad, jnp.nan, 0.5 * self.scale * jnp.sum(x**2))


def test_a_non_finite_energy_stops_training_with_everything_needed(key):
    data = jnp.array([[0.1], [0.2], [1.95], [0.3]])
    optimizer = optax.sgd(0.03)

    def objective(potential, sampler, batch, key):
        return -jax.vmap(potential)(batch).mean(), (sampler, {})

    state = ebm.init_train(Exploding(jnp.ones(())), optimizer)
    with pytest.raises(ebm.TrainingFailure, match=r"update \d+ produced a non-finite .* rows .*\[2\]") as failure:
        ebm.fit(key, state, data, objective, optimizer, num_steps=100, report_every=40)
    caught = failure.value
    assert caught.rows.tolist() == [2]
    assert int(caught.state.step) == caught.step
    assert 0 < caught.step < 10
    assert len(caught.history["loss"]) == caught.step
    assert np.isfinite(caught.history["loss"]).all()
    # The last good state is the one an uninterrupted run of exactly that many updates reaches.
    replay, _ = ebm.fit(key, state, data, objective, optimizer, num_steps=caught.step, report_every=40)
    np.testing.assert_array_equal(replay.potential.scale, caught.state.potential.scale)


def test_a_diverging_run_fails_loudly_and_is_never_masked(key):
    optimizer = optax.sgd(1e38)
    state = ebm.init_train(quadratic_start(), optimizer, chains(32))
    with pytest.raises(ebm.TrainingFailure) as failure:
        ebm.fit(key, state, gaussian_data(), persistent(2), optimizer, num_steps=300)
    assert all(np.isfinite(leaf).all() for leaf in leaves(failure.value.state.potential))


def test_frozen_chains_are_reported_within_one_interval(key):
    optimizer = optax.sgd(1e-3)
    state = ebm.init_train(quadratic_start(), optimizer, chains(32, kernel=kernels.mala(1e4)))
    with pytest.warns(RuntimeWarning, match="updates 0 to 9: 100% of the chains were frozen"):
        ebm.fit(key, state, gaussian_data(), persistent(2), optimizer, num_steps=40, report_every=10)


def test_partly_frozen_chains_are_reported(key):
    """Chains at two scales under one step size: the mean acceptance rate looks alive."""

    def two_scales(scale, x):
        return scale * jnp.where(x < 50.0, 0.5e8 * x**2, 0.5 * (x - 100.0) ** 2)

    potential = jax.tree_util.Partial(two_scales, jnp.ones(()))
    position = jnp.where(jnp.arange(64) < 48, 1e-5, 100.0)
    optimizer = optax.sgd(0.0)
    state = ebm.init_train(potential, optimizer, ebm.init_sampler(position, kernels.mala(0.5)))
    with pytest.warns(RuntimeWarning, match="75% of the chains were frozen"):
        _, history = ebm.fit(key, state, jnp.full(8, 100.0), persistent(20), optimizer, num_steps=5)
    assert history["acceptance_rate"].mean() > 0.1


def test_a_sampler_free_objective_takes_labelled_rows(key):
    def classify(potential, batch, key):
        rows, labels = batch
        return jax.nn.softplus(-(2.0 * labels - 1.0) * jax.vmap(potential)(rows)).mean()

    rows = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    labels = (rows.sum(axis=1) > 0).astype(int)
    optimizer = optax.sgd(0.5)
    net = potentials.MLP(2, key=key, width=8, depth=1, zero_init=False)
    state = ebm.init_train(net, optimizer)
    _, history = ebm.fit(key, state, (rows, labels), objectives.stateless(classify), optimizer, num_steps=100)
    assert history["loss"][-1] < 0.5 * history["loss"][0]


def test_negatives_stay_inside_the_support_of_the_base(key):
    """A Uniform's log_prob is finite outside it: without its support, chains walk out with acceptance one."""
    potential = potentials.tilt(jax.tree_util.Partial(lambda rate, x: rate * x, jnp.zeros(())), dist.Uniform(0.0, 1.0))
    optimizer = optax.sgd(0.1)
    start = jax.random.uniform(key, (512,), minval=0.01, maxval=0.99)
    state = ebm.init_train(potential, optimizer, ebm.init_sampler(start, kernels.mala(0.02)))
    data = np.random.default_rng(0).beta(1.0, 2.0, 500)
    state, _ = ebm.fit(key, state, data, persistent(10), optimizer, num_steps=200)
    position = np.asarray(state.sampler.position)
    assert position.min() >= 0.0
    assert position.max() <= 1.0
    assert float(state.potential.potential.args[0]) > 1.0


def test_a_distrax_base_and_infinite_constants_train(key):
    base = distrax.MultivariateNormalDiag(jnp.zeros(2), jnp.ones(2))
    potential = potentials.tilt(potentials.MLP(2, key=key, width=8, depth=1), base)
    optimizer = optax.adamw(1e-2)
    sampler = chains(32)._replace(log_weight=jnp.where(jnp.arange(32) == 0, -jnp.inf, 0.0))
    state = ebm.init_train(potential, optimizer, sampler)
    state, _ = ebm.fit(key, state, gaussian_data(), persistent(2), optimizer, num_steps=5)
    np.testing.assert_array_equal(state.potential.base.value.loc, 0.0)


def test_no_random_key_is_used_twice(key):
    optimizer = optax.sgd(0.01)
    with jax.debug_key_reuse(True):
        state = ebm.init_train(quadratic_start(), optimizer, chains(32))
        ebm.fit(
            jax.random.key(0), state, gaussian_data(), persistent(2), optimizer, num_steps=5, batch_size=50,
            target_acceptance=0.6,
        )  # fmt: skip


def test_an_optimizer_may_adapt_to_the_loss(key):
    optimizer = optax.chain(optax.sgd(0.01), optax.contrib.reduce_on_plateau())
    state = ebm.init_train(quadratic_start(), optimizer, chains(32))
    ebm.fit(key, state, gaussian_data(), persistent(2), optimizer, num_steps=5)


def good_state(**options):
    return ebm.init_train(quadratic_start(), optax.sgd(0.1), chains(8), **options)


def refit(state=None, data=None, **options):
    objective = options.pop("objective", persistent(1))
    key = options.pop("key", jax.random.key(0))
    data = gaussian_data() if data is None else data
    return ebm.fit(key, state or good_state(), data, objective, optax.sgd(0.1), **{"num_steps": 1, **options})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: refit(data=np.zeros((0, 2), np.float32)), ValueError, "data: got shape .0, 2., which is empty"),
        (lambda: refit(data=np.zeros((5, 3), np.float32)), ValueError, r"data: got event shape \(3,\), expected"),
        (lambda: refit(data=np.zeros((5, 2), int)), TypeError, "data: got dtype int"),
        (lambda: refit(data=[[1.0, 2.0]]), TypeError, "data: got a Python number or a list of them"),
        (lambda: refit("state"), TypeError, "state: got str"),
        (lambda: refit(objective="pcd"), TypeError, "objective: got str"),
        (lambda: refit(ebm.init_train(quadratic_start(), optax.adam(0.1))), ValueError, "optimizer: got another"),
        (lambda: refit(objective=objectives.stateless(lambda u, batch, key: u(batch[0])), target_acceptance=0.6),
         ValueError, "an objective that reports no acceptance rate"),
        (lambda: refit(data=np.array([[0, 0], [0, np.nan], [np.inf, 0]])), ValueError, "2 of 3 rows .* first at index 1"),
        (lambda: refit(data="digits"), TypeError, "data: got str"),
        (lambda: refit(data={}), ValueError, "data: got no arrays"),
        (lambda: refit(num_steps=0), ValueError, "num_steps: got 0"),
        (lambda: refit(num_steps=1.5), TypeError, "num_steps: got 1.5"),
        (lambda: refit(batch_size=201), ValueError, "batch_size: got 201, expected at most the 200 rows"),
        (lambda: refit(report_every=0), ValueError, "report_every: got 0"),
        (lambda: refit(key=None), ValueError, "key: got None"),
        (lambda: refit(target_acceptance=1.5), ValueError, "target_acceptance: got 1.5"),
        (lambda: refit(unadjusted(), target_acceptance=0.6), ValueError, "no accept step"),
        (lambda: refit(ebm.init_train(quadratic_start(), optax.sgd(0.1)), target_acceptance=0.6),
         ValueError, "no sampler"),
        (lambda: refit(ebm.init_train(quadratic_start(), optax.sgd(0.1))), TypeError, "sampler: got NoneType"),
        (lambda: refit(on_support(), data=np.array([0.5, -1.0, 2.0])),
         ValueError, "1 of 3 rows outside the support, .* index 1"),
        (lambda: ebm.init_train(lambda x: x, optax.sgd(0.1)), ValueError, "potential: has no trainable parameters"),
        (lambda: ebm.init_train(3.0, optax.sgd(0.1)), TypeError, "potential: got float"),
        (lambda: ebm.init_train(quadratic_start(), "adam"), TypeError, "optimizer: got str"),
        (lambda: ebm.init_train(Quadratic(np.zeros(()), np.zeros(2)), optax.sgd(0.1)),
         TypeError, "float64 while jax_enable_x64"),
        (lambda: ebm.init_train(Quadratic(jnp.array(jnp.nan), jnp.zeros(2)), optax.sgd(0.1), chains(8)), ValueError,
         "the energy is not finite at 8 of 8 chains"),
        (lambda: ebm.init_train(Quadratic(jnp.zeros(()), jnp.zeros(3)), optax.sgd(0.1), chains(8)), ValueError,
         "could not be evaluated on one event of shape"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def unadjusted():
    return ebm.init_train(quadratic_start(), optax.sgd(0.1), chains(8, kernel=kernels.unadjusted_langevin(0.1)))


def on_support():
    potential = potentials.tilt(jax.tree_util.Partial(lambda rate, x: rate * x, jnp.ones(())), dist.Exponential(1.0))
    return ebm.init_train(potential, optax.sgd(0.1), ebm.init_sampler(jnp.ones(8), kernels.mala(0.01)))


def test_progress_shows_energy_gap_and_acceptance(key, capsys):
    refit(num_steps=30, report_every=10, progress_bar=True)
    shown = capsys.readouterr().err
    assert "30/30" in shown
    assert "energy gap" in shown
    assert "acceptance" in shown
    refit(num_steps=30, report_every=10)
    assert capsys.readouterr().err == ""  # not a terminal
