"""Gibbs sampling of a 32x32 Ising model against thrml, in an environment of its own: spin updates per second.

Both update one colour of the periodic lattice after the other, are warm, and take turns. Both must give the correlation of
neighbours that is known exactly: the speed of a sampler of another law would be none.
"""

import math
from typing import Any

import jax
import numpy as np
from scipy.special import ellipk

import ebm_ppl as ebm
from tests.benchmarks._environments import THRML, Peer, Unavailable, not_available
from tests.benchmarks._paired import in_turns, ratio

SIZE, COUPLING = 32, 0.3
CHAINS = {1: 2000, 64: 100, 1024: 8}
"""Chains, and sweeps in one turn."""
GOAL, TURNS = 1.0, 11
TOLERANCE = 0.02
"""Of the correlation, where there are many chains: four standard errors of 64 independent lattices."""


def exact_correlation(coupling: float) -> float:
    """Mean product of neighbours on the infinite square lattice.

    From its energy (Onsager 1944): with 32 sites along an axis and a coupling well below the critical .4407 the lattice is
    as good as infinite.
    """
    modulus = 2.0 * math.sinh(2.0 * coupling) / math.cosh(2.0 * coupling) ** 2
    factor = 2.0 / math.pi * (2.0 * math.tanh(2.0 * coupling) ** 2 - 1.0) * ellipk(modulus**2)
    return float((1.0 + factor) / math.tanh(2.0 * coupling) / 2.0)


def correlation(spins: Any) -> float:
    """Mean product of neighbours of lattices ``(chain, row, column)``."""
    spins = np.asarray(spins, float)
    return float(0.5 * sum((spins * np.roll(spins, 1, axis=axis)).mean() for axis in (1, 2)))


def compare(peer: Peer, num_chains: int, sweeps: int, turns: int = TURNS) -> dict[str, Any]:
    """How many times faster a sweep is here, and what both sampled."""
    ising = ebm.potentials.Ising((SIZE, SIZE), coupling=COUPLING)
    spins = jax.random.rademacher(jax.random.key(0), (num_chains, SIZE, SIZE), "int8")
    sampler = ebm.init_sampler(spins, ebm.kernels.gibbs("chequerboard"))
    key, question = jax.random.key(1), {"size": SIZE, "coupling": COUPLING, "chains": num_chains, "sweeps": sweeps}
    answer: dict[str, Any] = {}

    def here() -> Any:
        nonlocal key, sampler
        key, sweep_key = jax.random.split(key)
        sampler, _ = ebm.advance(sweep_key, ising, sampler, sweeps)
        return sampler.position

    def there() -> None:
        answer.update(peer.ask(**question))

    seconds = in_turns({"here": here, "thrml": there}, turns=turns)
    updates = sweeps * num_chains * SIZE**2
    return {
        "times_faster": ratio(seconds["thrml"], seconds["here"]),
        "spin_updates_per_second": {name: updates / np.median(times) for name, times in seconds.items()},
        "neighbour_correlation": {"here": correlation(sampler.position), "thrml": answer["correlation"]},
    }


def check_law(num_chains: int, found: dict[str, Any]) -> None:
    """Raise where one of the two samples something else."""
    exact = exact_correlation(COUPLING)
    for name, value in found["neighbour_correlation"].items():
        if num_chains >= 64 and abs(value - exact) > TOLERANCE:
            raise RuntimeError(f"{name}: neighbours correlate by {value:.4f}, expected {exact:.4f}.")


def run() -> dict:
    """Ratios of times, that of thrml over that here."""
    goal = f"at least {GOAL} of the speed of thrml"
    found = {}
    try:
        with Peer(THRML, "thrml_ising.py") as peer:
            for num_chains, sweeps in CHAINS.items():
                found[f"{num_chains} chains"] = compare(peer, num_chains, sweeps)
                check_law(num_chains, found[f"{num_chains} chains"])
            versions = peer.versions
    except Unavailable as reason:
        return not_available("thrml", goal, reason)
    missed = [name for name, case in found.items() if case["times_faster"]["median"] < GOAL]
    exact = exact_correlation(COUPLING)
    return {"goal": goal, "met": not missed, "missed": missed, **found, "exact": exact, "versions": versions}
