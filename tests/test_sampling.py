"""Sampler states, the negative phase, traces and the replay buffer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ebm_ppl as ebm
from ebm_ppl import adaptation, kernels, replay, sampling, targets
from ebm_ppl.testing import t_test_chain_means


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


def drifting(constant, x):
    return 0.5 * jnp.sum(x**2) + constant


@pytest.mark.parametrize("kernel", [kernels.mala(0.5), kernels.hmc(0.5, 3), kernels.nuts(0.5)])
@pytest.mark.parametrize("drift", [1.0, -1.0])
def test_a_drifting_energy_constant_changes_nothing(kernel, drift):
    """A stale cached log density freezes every chain under +1 per update and accepts everything under -1."""
    still = drift_run(kernel, 0.0)
    moved = drift_run(kernel, drift)
    np.testing.assert_allclose(moved[0], still[0], atol=2e-3)
    # Energies of order 100 lose the last digits of a float32, which moves an acceptance probability in its own. One in some
    # ten thousand accept steps is so close that it goes the other way; that chain is another one until common noise has
    # brought it back.
    difference = np.abs(moved[1] - still[1])
    assert np.mean(difference < 2e-4) > 0.9
    assert difference.max() < 0.02
    assert 0.3 < still[1].mean() < 0.999


def drift_run(kernel, drift):
    sampler = ebm.init_sampler(jax.random.normal(jax.random.key(0), (64, 3)), kernel)
    rates = []
    for update in range(60):
        potential = jax.tree_util.Partial(drifting, jnp.float32(drift * update))
        sampler, info = ebm.advance(jax.random.fold_in(jax.random.key(1), update), potential, sampler, 2)
        rates.append(info.acceptance_rate.mean())
    return np.asarray(sampler.position), np.asarray(rates)


def test_a_state_carried_across_updates_would_freeze():
    """The negative control of the test above: BlackJAX's own state, kept while the constant grows, stops moving."""
    algorithm = kernels.mala(0.5)(quadratic)
    state = algorithm.init(jnp.zeros((64, 3)), jax.random.key(0))
    rates = []
    for update in range(1, 60):
        step = kernels.mala(0.5)(functools.partial(drifting, 1.0 * update)).step
        state, info = step(jax.random.fold_in(jax.random.key(1), update), state)
        rates.append(float(info.acceptance_rate.mean()))
    assert np.mean(rates[30:]) < 0.45  # each accepted move pays one nat for the drift since it was made


def test_advance_and_draw_are_the_same_run(key):
    sampler = ebm.init_sampler(jnp.ones((8, 2)), kernels.mala(0.4))
    after, draws = ebm.draw(key, quadratic, sampler, 20, num_steps=3)
    np.testing.assert_array_equal(after.position, draws.position[:, -1])
    np.testing.assert_allclose(draws.potential, jax.vmap(jax.vmap(quadratic))(draws.position), rtol=1e-6)
    assert draws.position.shape == (8, 20, 2)
    assert draws.num_gradients.sum() == 8 * 60


@pytest.mark.parametrize("name", ["gumbel", "double_well", "gaussian"])
def test_convergence_from_a_bad_start(key, name):
    """Means of independent chains against the truth, and never an effective sample size within one."""
    target = targets.get(name)
    potential = target.unconstrained_potential
    start = jnp.full((256, *target.event_shape), 1.5)
    sampler = ebm.init_sampler(start, kernels.mala({"gumbel": 0.8, "double_well": 0.04, "gaussian": 0.4}[name]))
    sampler, _ = ebm.advance(jax.random.fold_in(key, 0), potential, sampler, 3000)
    _, draws = ebm.draw(jax.random.fold_in(key, 1), potential, sampler, 400, num_steps=5)
    for label, (function, value) in target.expectations.items():
        means = jax.vmap(jax.vmap(function))(draws.position).mean(axis=1)
        t_test_chain_means(np.asarray(means), value, name=f"{name}: {label}").raise_if_failed()


def test_memory_does_not_grow_with_num_steps():
    """No gradient and no trace: the compiled negative phase needs the same memory for 5 steps and for 500."""
    net = ebm.potentials.MLP(8, key=jax.random.key(0), width=32, depth=2, zero_init=False)
    sampler = ebm.init_sampler(jnp.zeros((256, 8)), kernels.mala(0.1))
    batch = jnp.ones((256, 8))

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(net_leaves, key, num_steps):
        potential = jax.tree.unflatten(jax.tree.structure(net), net_leaves)
        objective = ebm.objectives.persistent_contrastive_divergence
        return jax.grad(
            lambda leaves: objective(
                jax.tree.unflatten(jax.tree.structure(net), leaves), sampler, batch, key, num_steps=num_steps
            )[0]
        )(jax.tree.leaves(potential))

    def temporary_bytes(num_steps):
        lowered = gradient.lower(jax.tree.leaves(net), jax.random.key(0), num_steps)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(5), temporary_bytes(500)
    assert many - few <= 500 * 16  # the keys of the extra steps, eight bytes each and a copy


def test_no_gradient_flows_through_the_chains(key):
    def end(start):
        sampler = sampling.SamplerState(start, jnp.zeros(4), kernels.mala(0.3))
        return ebm.advance(key, quadratic, sampler, 3)[0].position.sum()

    np.testing.assert_array_equal(jax.grad(end)(jnp.ones((4, 2))), 0.0)


def test_restart_replaces_the_chosen_fraction_and_clears_its_weights(key):
    sampler = ebm.init_sampler(jnp.zeros((20_000, 1)), kernels.mala(0.1))._replace(log_weight=jnp.ones(20_000))
    after = replay.restart(key, sampler, jnp.ones((20_000, 1)), 0.05)
    fresh = np.asarray(after.position[:, 0] == 1)
    assert abs(fresh.mean() - 0.05) < 6 * np.sqrt(0.05 * 0.95 / 20_000)
    np.testing.assert_array_equal(np.asarray(after.log_weight), np.where(fresh, 0.0, 1.0))
    np.testing.assert_array_equal(replay.restart(key, sampler, jnp.ones((20_000, 1)), 0.0).position, 0.0)
    np.testing.assert_array_equal(replay.restart(key, sampler, jnp.ones((20_000, 1)), 1.0).position, 1.0)


def test_gathered_chains_return_to_their_places(key):
    bank = ebm.init_sampler(jnp.arange(50.0)[:, None], kernels.mala(0.1))
    index, chosen = replay.gather_chains(key, bank, 20)
    assert len(set(index.tolist())) == 20
    moved = chosen._replace(position=-chosen.position, log_weight=chosen.log_weight + 2.0)
    after = replay.scatter_chains(bank, index, moved)
    expected = np.arange(50.0)
    expected[np.asarray(index)] *= -1
    np.testing.assert_array_equal(after.position[:, 0], expected)
    assert int((after.log_weight == 2.0).sum()) == 20


@pytest.mark.parametrize(
    ("make", "target"),
    [
        *[(lambda: kernels.mala(1e-3), target) for target in (0.4, 0.6, 0.8)],
        *[(lambda: kernels.hmc(1e-3, 5), target) for target in (0.6, 0.8)],
        (lambda: kernels.mala(30.0), 0.6),
        (lambda: kernels.nuts(1e-2, max_num_doublings=5), 0.8),
    ],
)
def test_tune_step_size_reaches_its_target(key, make, target):
    # Scales of 1 to 3: on an isotropic Gaussian HMC's acceptance is not monotone in its step size.
    def energy(x):
        return 0.5 * jnp.sum((x * jnp.linspace(1.0, 3.0, 8)) ** 2)

    sampler = ebm.init_sampler(jax.random.normal(key, (512, 8)), make())
    sampler = ebm.tune_step_size(jax.random.fold_in(key, 1), energy, sampler, target)
    _, info = ebm.advance(jax.random.fold_in(key, 2), energy, sampler, 100)
    assert abs(float(info.acceptance_rate.mean()) - target) < 0.04


def test_changing_the_step_size_does_not_recompile():
    traces = 0

    def counted(x):
        nonlocal traces
        traces += 1
        return 0.5 * jnp.sum(x**2)

    sampler = ebm.init_sampler(jnp.ones((8, 2)), kernels.mala(0.4))
    ebm.advance(jax.random.key(0), counted, sampler, 5)
    once = traces
    ebm.advance(jax.random.key(0), counted, adaptation.set_tunables(sampler, step_size=0.01), 5)
    assert traces <= once + 1  # the abstract shape check at the boundary; no new compilation


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ebm.init_sampler(jnp.zeros((0, 2)), kernels.mala(0.1)), ValueError, "position: got zero chains"),
        (lambda: ebm.init_sampler(jnp.ones(()), kernels.mala(0.1)), ValueError, "position: got no leading chain axis"),
        (lambda: ebm.init_sampler(jnp.zeros((3, 2), int), kernels.mala(0.1)), TypeError, "position: got dtype int32"),
        (lambda: ebm.init_sampler(jnp.zeros((3, 2), jnp.bfloat16), kernels.mala(0.1)), TypeError, "got dtype bfloat16"),
        (lambda: ebm.init_sampler({"a": jnp.zeros(3), "b": jnp.zeros(4)}, kernels.mala(0.1)), ValueError, r"\[3, 4\]"),
        (lambda: ebm.init_sampler(jnp.array([[0.0], [jnp.nan]]), kernels.mala(0.1)), ValueError, "1 of 2 .* index 1"),
        (lambda: ebm.init_sampler(jnp.zeros((3, 2)), 0.1), TypeError, "kernel: got float"),
        (lambda: ebm.advance(jax.random.key(0), quadratic, good(), 0), ValueError, "num_steps: got 0"),
        (lambda: ebm.advance(jax.random.key(0), quadratic, good(), 2.0), TypeError, "num_steps: got 2.0"),
        (lambda: ebm.advance(jax.random.key(0), lambda x: x, good(), 1), ValueError, r"returned shape \(2,\)"),
        (lambda: ebm.advance(jax.random.key(0), lambda x: x[:1], good(), 1), ValueError, r"returned shape \(1,\)"),
        (lambda: ebm.advance(jax.random.key(0), lambda x: 3, good(), 1), TypeError, "returned dtype int32"),
        (lambda: ebm.advance(jax.random.key(0), lambda x: jnp.sum(x) * 1j, good(), 1), TypeError, "complex64"),
        (lambda: ebm.advance(jax.random.key(0), lambda x: jnp.sum(x, axis=1), good(), 1), ValueError, "no batch axis"),
        (lambda: ebm.advance(jax.random.key(0), "energy", good(), 1), TypeError, "potential: got str"),
        (lambda: ebm.advance(jax.random.key(0), quadratic, jnp.zeros((3, 2)), 1), TypeError, "sampler: got"),
        (lambda: ebm.draw(jax.random.key(0), quadratic, good(), 0), ValueError, "num_draws: got 0"),
        (lambda: replay.restart(jax.random.key(0), good(), jnp.zeros((3, 3)), 0.1), ValueError, "fresh: got shape"),
        (lambda: replay.restart(jax.random.key(0), good(), jnp.zeros((3, 2)), 1.1), ValueError, "probability: got 1.1"),
        (lambda: replay.gather_chains(jax.random.key(0), good(), 4), ValueError, "num_chains: got 4"),
        (lambda: ebm.tune_step_size(jax.random.key(0), quadratic, good(), 1.0), ValueError, "target_acceptance: got 1.0"),
        (lambda: ebm.tune_step_size(jax.random.key(0), quadratic, unadjusted(), 0.6), ValueError, "acceptance rate is NaN"),
        (lambda: adaptation.set_tunables(good(), step_size=-1.0), ValueError, "step_size: got -1.0"),
        (lambda: ebm.tune_step_size(jax.random.key(0), lambda x: x[0] * jnp.nan, good()), ValueError, "not finite at 3"),
        (lambda: ebm.init_sampler([[0.0]], kernels.mala(0.1)), TypeError, "position: got a Python number or a list"),
        (lambda: adaptation.set_tunables(good(), stepsize=0.1), ValueError, "stepsize: this kernel has no such tunable"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_tuning_on_a_flat_energy_says_so(key):
    with pytest.warns(RuntimeWarning, match="far from the target"):
        ebm.tune_step_size(key, lambda x: 0.0 * x[0], good(), 0.6)


def test_a_python_number_as_energy_and_a_numpy_scalar_as_step_size_work(key):
    sampler = ebm.init_sampler(jnp.zeros((3, 2)), kernels.mala(np.float64(0.1)))
    ebm.advance(key, lambda x: 2.0, sampler, 2)


def good():
    return ebm.init_sampler(jnp.zeros((3, 2)), kernels.mala(0.1))


def unadjusted():
    return ebm.init_sampler(jnp.zeros((3, 2)), kernels.unadjusted_langevin(0.1))


def test_64_bit_parameters_are_refused_in_a_32_bit_session():
    potential = jax.tree_util.Partial(lambda scale, x: jnp.sum(scale * x**2), np.ones(2))
    with pytest.raises(TypeError, match=r"potential.*: got float64 while jax_enable_x64 is off, expected float32"):
        ebm.advance(jax.random.key(0), potential, good(), 1)
    with jax.enable_x64(True):
        sampler = ebm.init_sampler(np.zeros((3, 2)), kernels.mala(0.1))
        assert ebm.advance(jax.random.key(0), potential, sampler, 1)[0].position.dtype == jnp.float64
