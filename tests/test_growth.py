"""What must not grow with a training, and what may: compilations, arrays, memory of an update.

Memory is that of the compiler's plan, which is exact, except over a long training, where it is the process's own. Times
are measured by ``python -m tests.benchmarks growth`` and asserted nowhere.
"""

import functools
import gc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from jax.extend.core import jaxprs_in_params

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials
from ebm_ppl.training.loop import _run_chunk
from tests.benchmarks.growth import KEYS_PER_STEP, USUAL, problem, resident, train

DIM, WIDTH, ROWS = 8, 16, 64
BASE = dist.Normal(0.0, 1.0).expand([DIM]).to_event(1)


@functools.cache
def negative_phase(num_chains, num_steps, all_states=False):
    """The loss of persistent contrastive divergence with its gradient in a network's parameters, and its arguments."""
    net = potentials.MLP(DIM, key=jax.random.key(0), width=WIDTH, depth=2, zero_init=False)
    sampler = ebm.init_sampler(jnp.zeros((num_chains, DIM)), kernels.mala(0.1))
    parameters, rest = eqx.partition(potentials.tilt(net, BASE), eqx.is_inexact_array)
    options = {"num_steps": num_steps, "all_states": all_states}
    objective = functools.partial(objectives.persistent_contrastive_divergence, **options)

    def loss(parameters, position, batch, key):
        loss, (moved, _) = objective(eqx.combine(parameters, rest), sampler._replace(position=position), batch, key)
        return loss, moved.position

    gradient = jax.value_and_grad(loss, has_aux=True)
    return gradient, (parameters, sampler.position, jnp.ones((ROWS, DIM)), jax.random.key(1))


@functools.cache
def temporary_bytes(*options):
    """Memory of the compiled gradient beside its arguments and results; options are those of the negative phase."""
    gradient, arguments = negative_phase(*options)
    return jax.jit(gradient).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def every_equation(jaxpr):
    """The equations of a jaxpr and of all that are inside them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from every_equation(inner)


def stacked_bytes(function, *arguments):
    """The most that any scan of a function stacks along its axis, in bytes."""
    scans = [e for e in every_equation(jax.make_jaxpr(function)(*arguments).jaxpr) if e.primitive.name == "scan"]
    assert scans
    return max(
        sum(variable.aval.size * variable.aval.dtype.itemsize for variable in e.outvars[e.params["num_carry"] :])
        for e in scans
    )


# --- compilations


def test_an_update_compiles_once_whatever_the_data_say(key):
    made = problem(chains=16, k=2, width=8, dim=3, rows=100)
    update = jax.jit(
        lambda arrays, batch, key: eqx.filter(
            ebm.train_step(eqx.combine(arrays, rest), batch, key, made.objective, made.optimizer)[0], eqx.is_array
        )
    )
    arrays, rest = eqx.partition(made.state, eqx.is_array)
    for index in range(1000):
        step_key = jax.random.fold_in(key, index)
        arrays = update(arrays, jax.random.normal(step_key, (10, 3)), step_key)
    assert int(eqx.combine(arrays, rest).step) == 1000
    assert update._cache_size() == 1
    update(arrays, jnp.ones((11, 3)), key)
    assert update._cache_size() == 2


def test_a_training_compiles_once_for_all_data_of_a_shape(key):
    made = problem(chains=16, k=2, width=8, dim=3, rows=100)
    state, before = made.state, _run_chunk._cached._cache_size()
    for index in range(4):
        data = jax.random.normal(jax.random.fold_in(key, index), (100, 3))
        state, _ = ebm.fit(key, state, data, made.objective, made.optimizer, num_steps=7 + index, batch_size=10)
    assert _run_chunk._cached._cache_size() == before + 1
    ebm.fit(key, state, data[:90], made.objective, made.optimizer, num_steps=7, batch_size=10)
    assert _run_chunk._cached._cache_size() == before + 2


# --- memory of an update


def test_memory_of_the_negative_phase_does_not_depend_on_its_steps():
    """A step adds its key, and no state of the chains."""
    few, many = temporary_bytes(256, 5), temporary_bytes(256, 50)
    assert abs(many - few) <= 45 * KEYS_PER_STEP < 256 * DIM * 4  # less than one state of all chains


def test_all_states_as_negatives_do_grow_with_the_steps():
    """The same measurement where memory does grow: it is one that can fail."""
    assert temporary_bytes(256, 50, True) - temporary_bytes(256, 5, True) > 45 * 256 * DIM * 4


@pytest.mark.parametrize("num_chains", [4096, 8192])
def test_twice_as_many_chains_take_twice_the_memory(num_chains):
    ratio = temporary_bytes(2 * num_chains, 5) / temporary_bytes(num_chains, 5)
    assert 1.6 < ratio < 2.6


def test_no_scan_of_the_gradient_stacks_anything_over_the_steps():
    gradient, arguments = negative_phase(32, 50)
    assert stacked_bytes(gradient, *arguments) == 0


def test_a_gradient_through_the_chains_would_stack_their_states():
    """The same search finds the residuals of a loss that is differentiated through its chains."""
    _, (_, position, _, key) = negative_phase(32, 50)

    def end(scale):
        def step(x, step_key):
            return x - 0.1 * scale * jnp.sin(x) + 0.1 * jax.random.normal(step_key, x.shape), None

        return jnp.sum(jax.lax.scan(step, position, jax.random.split(key, 50))[0])

    assert stacked_bytes(jax.grad(end), jnp.ones(())) >= 50 * position.size * 4


# --- a long training


@pytest.mark.slow
def test_nothing_grows_over_two_thousand_updates():
    """The number of arrays is the same at update 200 and 2200, and the memory of the process within 2 %."""
    made = problem(**USUAL)
    state, _ = train(made, 100)
    found = []
    for number in (100, 2000):
        state, _ = train(made._replace(state=state), number)
        gc.collect()
        found.append((len(jax.live_arrays()), resident()))
    assert int(state.step) == 2200
    (arrays, memory), (arrays_after, memory_after) = found
    assert arrays_after == arrays
    assert memory_after < 1.02 * memory
