"""Long runs at frozen parameters that stop when their share of a budget is spent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import map_energy
from ebm_ppl.diagnostics.monitored import Monitor
from ebm_ppl.info import HAMILTONIAN
from ebm_ppl.meshes import on_host
from ebm_ppl.proposals import sample_and_log_prob
from ebm_ppl.replay import take_chains
from ebm_ppl.sampling import Draws, chains_at, draw
from ebm_ppl.types import Array, Key, Potential, SamplerState
from ebm_ppl.weights import normalized_weights

BLOCK = 25
"""Kernel steps of one compiled call."""
MAX_STEPS = 10_000
"""No chain goes on for longer."""
MAX_DRAWS = 500
"""Draws that are kept per chain, evenly spaced."""
ENERGY_COST = 1.0 / 3.0
"""What an evaluation of the energy alone costs, in evaluations of its gradient."""
NUM_CHAINS = 64
"""At most so many of the given chains are continued."""
NUM_SUPERCHAINS, CHAINS_PER_START = 16, 4


class Trace(NamedTuple):
    """A run and what was watched.

    Attributes:
        draws: Kept draws, as NumPy arrays.
        values: Statistics of the kept draws, ``(chain, draw, statistic)``.
        every_step: Statistics after every kernel step, ``(chain, step, statistic)``.
        hamiltonian: Total energy after every kernel step, ``(chain, step)``; ``None`` where the kernel reports none.
        steps_per_draw: Kernel steps between kept draws.
        num_gradients: Gradient evaluations of all chains, those of dropped draws among them.
        num_energies: Evaluations of the energy alone.
    """

    draws: Draws
    values: np.ndarray
    every_step: np.ndarray
    hamiltonian: np.ndarray | None
    steps_per_draw: int
    num_gradients: int
    num_energies: int


def run_trace(
    key: Key, potential: Potential, sampler: SamplerState, watch: Monitor, allowance: float, *, drop: float = 0.0
) -> Trace:
    """Run all chains until the allowance is spent, at least for one block.

    Args:
        key: Random key.
        potential: Energy of one event, base included.
        sampler: The chains.
        watch: What to note of every step.
        allowance: Gradient evaluations of all chains together.
        drop: Fraction of the draws to leave out as warm-up.

    Raises:
        ValueError: the kernel gives its chains weights.
    """
    blocks: list[Draws] = []
    values: list[np.ndarray] = []
    hamiltonians: list[np.ndarray] = []
    spent, thin, gradients, energies = 0.0, 1, 0, 0
    while True:
        sampler, drawn = draw(jax.random.fold_in(key, len(blocks)), potential, sampler, BLOCK)
        drawn: Draws = on_host(drawn)
        if np.ptp(drawn.log_weight) != 0:
            raise ValueError(
                "sampler: its kernel gives chains weights, expected one whose draws are alike. Diagnose the kernel that "
                "moves them, such as ebm.kernels.mala."
            )
        gradients, energies = gradients + int(drawn.num_gradients.sum()), energies + int(drawn.num_energies.sum())
        cost = gradients + ENERGY_COST * energies - spent
        spent += cost
        if not blocks:
            length = min(allowance / max(cost, 1.0) * BLOCK, MAX_STEPS)
            thin = next(step for step in (1, 5, 25) if step == 25 or length / step <= MAX_DRAWS)
        values.append(watch(drawn.position, drawn.potential))
        blocks.append(_thinned(drawn, thin))
        if HAMILTONIAN in drawn.statistics:
            hamiltonians.append(np.asarray(drawn.statistics[HAMILTONIAN]))
        if spent + cost > allowance or len(blocks) * BLOCK >= MAX_STEPS:
            break
    draws = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *blocks)
    every = np.concatenate(values, axis=1)
    first = int(drop * draws.potential.shape[1])
    draws, every = jax.tree.map(lambda x: x[:, first:], draws), every[:, first * thin :]
    hamiltonian = np.concatenate(hamiltonians, axis=1)[:, first * thin :] if hamiltonians else None
    return Trace(draws, every[:, thin - 1 :: thin], every, hamiltonian, thin, gradients, energies)


def _thinned(draws: Draws, thin: int) -> Draws:
    """Every so many draws, with what happened since the one before.

    Of a Hamiltonian there is no mean, and E-BFMI asks for every step: a series with gaps would look better than it is.
    """

    def groups(x: Any) -> Any:
        return x.reshape(x.shape[0], -1, thin)

    average = {"acceptance_rate": draws.acceptance_rate, **draws.statistics}
    if thin > 1:
        average = {name: x for name, x in average.items() if not name.endswith(HAMILTONIAN)}
    average = {name: groups(x).mean(axis=2) for name, x in average.items()}
    counts = ("num_gradients", "num_energies", "num_nonfinite")
    return Draws(
        position=jax.tree.map(lambda x: x[:, thin - 1 :: thin], draws.position),
        potential=draws.potential[:, thin - 1 :: thin],
        acceptance_rate=average.pop("acceptance_rate"),
        is_divergent=groups(draws.is_divergent).any(axis=2),
        log_weight=draws.log_weight[:, thin - 1 :: thin],
        statistics=average,
        **{name: groups(getattr(draws, name)).sum(axis=2) for name in counts},
    )


def given_chains(key: Key, sampler: SamplerState) -> SamplerState:
    """Some of the given chains, chosen by their weights where they have any, and without weights from there on."""
    log_weight = on_host(sampler.log_weight)
    is_weighted = bool(np.ptp(log_weight) != 0)
    if sampler.num_chains <= NUM_CHAINS and not is_weighted:
        return sampler
    weight = np.asarray(normalized_weights(jnp.asarray(log_weight)), np.float64) if is_weighted else None
    weight = None if weight is None else weight / weight.sum()
    count = min(sampler.num_chains, NUM_CHAINS)
    index = generator(key).choice(sampler.num_chains, count, replace=is_weighted, p=weight)
    chosen = take_chains(sampler, jnp.asarray(index))
    return chosen._replace(log_weight=jnp.zeros_like(chosen.log_weight))


def generator(key: Key) -> np.random.Generator:
    """NumPy's random numbers for choices that need no compiled program.

    Example:
        >>> int(generator(jax.random.key(0)).integers(10)) in range(10)
        True
    """
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def superchains(
    key: Key, potential: Potential, sampler: SamplerState, data: Array, reference: Any
) -> tuple[SamplerState, np.ndarray]:
    """Sixteen superchains of four chains each, every superchain from one start: rows of data, draws of the base, negatives.

    Returns:
        The chains, and the number of the superchain of each, ``(chain,)``.
    """
    num_base = 0 if reference is None else NUM_SUPERCHAINS // 3
    num_own = NUM_SUPERCHAINS // 3
    num_rows = NUM_SUPERCHAINS - num_base - num_own
    rng, own = generator(key), on_host(sampler.position)
    rows = np.asarray(data, own.dtype)[rng.integers(len(data), size=num_rows + num_base)]
    starts = [rows[:num_rows], own[rng.integers(len(own), size=num_own)]]
    if num_base:
        drawn = sample_and_log_prob(reference, key, num_base)[0].astype(own.dtype)
        # A draw on which the energy is infinite is no start; a row takes its place.
        good = np.isfinite(np.asarray(map_energy(potential, drawn))).reshape(-1, *[1] * (drawn.ndim - 1))
        starts.append(np.where(good, np.asarray(drawn), rows[num_rows:]))
    position = jnp.asarray(np.repeat(np.concatenate(starts), CHAINS_PER_START, axis=0))
    return chains_at(position, sampler.kernel), np.repeat(np.arange(NUM_SUPERCHAINS), CHAINS_PER_START)
