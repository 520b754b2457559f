"""What an update by ``fit`` costs, against the same update written by hand and against bare gradients of the energy.

Persistent contrastive divergence, ten Langevin steps per update, as many rows as chains, Adam. The loop written by hand
is :mod:`tests.benchmarks._by_hand`. Bare gradients are as many as the chains of ``fit`` evaluate, which the training
gradient and everything else come on top of; for the negative phase alone they are the limit.
"""

import functools
import statistics
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax
from sklearn.datasets import load_digits

import ebm_ppl as ebm
from tests.benchmarks import _by_hand as by_hand
from tests.benchmarks._paired import in_turns, in_turns_with_fit, ratio

GOAL_BY_HAND, GOAL_PHASE = 0.95, 1.15
MCMC_STEPS = 10
STEP_SIZE = {"ula": 0.01, "mala": 0.1}
KERNELS = {"ula": ebm.kernels.unadjusted_langevin, "mala": ebm.kernels.mala}
SIZES = {(64, 256): (100, 15), (64, 4096): (50, 15), (256, 256): (50, 15), (256, 4096): (10, 7)}
"""Width of the network and chains; updates in one turn, enough of them to hide what one report costs, and turns."""
DIGITS = {256: (20, 9)}
"""The same of the convolutional energy, by chains."""


class Case(NamedTuple):
    """What is trained, for the package and by hand."""

    potential: Any
    energy: by_hand.Energy
    parameters: Any
    chains: jax.Array
    rows: jax.Array
    chunk: int


def planar(width: int, num_chains: int, chunk: int) -> Case:
    """A perceptron of two hidden layers on two overlapping clusters in the plane."""
    base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    net = ebm.potentials.MLP(2, key=jax.random.key(0), width=width, depth=2, zero_init=False)
    chain_key, row_key, side_key = jax.random.split(jax.random.key(1), 3)
    side = jax.random.rademacher(side_key, (8 * num_chains, 1), jnp.float32)
    rows = side + 0.5 * base.sample(row_key, (8 * num_chains,))
    chains = base.sample(chain_key, (num_chains,))
    potential, parameters = ebm.potentials.tilt(net, base), by_hand.mlp_parameters(net)
    return Case(potential, by_hand.mlp_energy, parameters, chains, rows, chunk)


def digits(num_chains: int, chunk: int) -> Case:
    """A convolutional energy of the 8x8 digits, scaled to about [-1, 1]."""
    base = dist.Normal(0.0, 1.0).expand([8, 8]).to_event(2)
    net = ebm.potentials.Conv((8, 8), key=jax.random.key(0), zero_init=False)
    rows = jnp.asarray(load_digits().images, jnp.float32) / 8.0 - 1.0
    chains = base.sample(jax.random.key(1), (num_chains,))
    potential, parameters = ebm.potentials.tilt(net, base), by_hand.conv_parameters(net)
    return Case(potential, by_hand.conv_energy, parameters, chains, rows, chunk)


def compare_updates(case: Case, move: str, turns: int, kernel: Any = None) -> dict[str, Any]:
    """How ``fit`` stands to the loop by hand (more is better), and both to bare gradients (1 is the limit)."""
    kernel = KERNELS[move](step_size=STEP_SIZE[move]) if kernel is None else kernel
    batch_size, optimizer = case.chains.shape[0], optax.adam(1e-3)
    sampler = ebm.init_sampler(case.chains, kernel)
    objective = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=MCMC_STEPS)
    state = ebm.init_train(case.potential, optimizer, sampler)
    carried = by_hand.begin(jax.random.key(2), case.parameters, case.chains, case.rows, optimizer)
    per_phase = int(
        eqx.filter_jit(ebm.advance)(jax.random.key(3), case.potential, sampler, MCMC_STEPS)[1].num_gradients[0]
    )

    def hand(num_updates: int) -> jax.Array:
        nonlocal carried
        carried, losses = by_hand.train(
            carried,
            case.rows,
            energy=case.energy,
            optimizer=optimizer,
            move=move,
            num_updates=num_updates,
            num_steps=MCMC_STEPS,
            step_size=STEP_SIZE[move],
            batch_size=batch_size,
        )
        return losses

    def bare(num_updates: int) -> jax.Array:
        return by_hand.bare_gradients(case.potential, case.chains, per_phase * num_updates)

    chunk = case.chunk
    seconds = in_turns_with_fit(
        {"hand": lambda: hand(chunk), "bare": lambda: bare(chunk)},
        jax.random.key(4),
        state,
        case.rows,
        objective,
        optimizer,
        chunk=chunk,
        turns=turns,
        batch_size=batch_size,
    )
    return {
        "speed_against_hand": ratio(seconds["hand"], seconds["fit"]),
        "fit_over_bare": ratio(seconds["fit"], seconds["bare"]),
        "hand_over_bare": ratio(seconds["hand"], seconds["bare"]),
        "milliseconds_per_update": 1e3 * statistics.median(seconds["fit"]) / chunk,
        "turns": turns,
    }


def compare_phases(case: Case, kernel: Any, turns: int) -> dict[str, Any]:
    """How the negative phase alone stands to as many bare gradients, and to one gradient per step."""
    sampler = ebm.init_sampler(case.chains, kernel)

    @eqx.filter_jit
    def phases(key: jax.Array, potential: Any, sampler: Any, num_phases: int) -> Any:
        arrays, static = eqx.partition(sampler, eqx.is_array)

        def body(arrays: Any, key: jax.Array) -> tuple[Any, Any]:
            moved, info = ebm.advance(key, potential, eqx.combine(arrays, static), MCMC_STEPS)
            # As in training, the means over the chains are what is kept.
            return eqx.filter(moved, eqx.is_array), jax.tree.map(lambda x: x.mean(), info)

        return jax.lax.scan(body, arrays, jax.random.split(key, num_phases))

    def phase(num_phases: int) -> Any:
        return phases(jax.random.key(5), case.potential, sampler, num_phases)

    def bare(num_gradients: int) -> Any:
        return by_hand.bare_gradients(case.potential, case.chains, num_gradients)

    chunk = case.chunk
    per_phase = int(phase(chunk)[1].num_gradients[0])
    seconds = in_turns(
        {
            "phase": lambda: phase(chunk),
            "as_many": lambda: bare(chunk * per_phase),
            "one_per_step": lambda: bare(chunk * MCMC_STEPS),
        },
        turns=turns,
    )
    return {
        "over_as_many_gradients": ratio(seconds["phase"], seconds["as_many"]),
        "over_one_gradient_per_step": ratio(seconds["phase"], seconds["one_per_step"]),
        "gradients_per_phase": per_phase,
        "turns": turns,
    }


def run(
    sizes: dict[tuple[int, int], tuple[int, int]] = SIZES, digits_sizes: dict[int, tuple[int, int]] = DIGITS
) -> dict:
    """All cases; ``speed_against_hand`` is the time by hand over that of ``fit``."""
    cases = [
        *(
            (f"{width} wide, {n} chains", planar(width, n, chunk), turns)
            for (width, n), (chunk, turns) in sizes.items()
        ),
        *((f"digits, {n} chains", digits(n, chunk), turns) for n, (chunk, turns) in digits_sizes.items()),
    ]
    updates, phases = {}, {}
    for name, case, turns in cases:
        for move in KERNELS:
            updates[f"{move}, {name}"] = compare_updates(case, move, turns)
        phases[f"ula, {name}"] = compare_phases(case, KERNELS["ula"](step_size=STEP_SIZE["ula"]), turns)
    slow = [name for name, found in updates.items() if found["speed_against_hand"]["median"] < GOAL_BY_HAND]
    wide = [name for name, found in phases.items() if found["over_as_many_gradients"]["median"] > GOAL_PHASE]
    missed = [*slow, *(f"phase of {name}" for name in wide)]
    return {
        "goal": f"at least {GOAL_BY_HAND} of the speed of the loop by hand; ULA at most {GOAL_PHASE} of bare gradients",
        "met": not missed,
        "missed": missed,
        "updates": updates,
        "phases": phases,
    }
