"""Persistent contrastive divergence and Hamiltonian Monte Carlo against torchebm, in an environment of its own.

The same energies, chains, rows and steps: ten unadjusted Langevin steps per update of a perceptron of two hidden layers,
and trajectories of ten leapfrog steps. torchebm runs with one and with two threads, and the better of the two counts. Both
are warm, and take turns.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

import ebm_ppl as ebm
from tests.benchmarks._environments import TORCHEBM, Peer, Unavailable, not_available
from tests.benchmarks._paired import Seconds, in_turns, in_turns_with_fit, ratio
from tests.benchmarks.training_speed import MCMC_STEPS, STEP_SIZE, planar

SIZES = {(64, 256): (100, 3.5), (64, 4096): (40, 1.8), (256, 256): (40, 1.4), (256, 4096): (8, 1.0)}
"""Width, chains, updates in one turn, and how many times faster ``fit`` is meant to be."""
TRAJECTORIES = {(64, 256): (20, 15.0), (64, 4096): (3, 1.0)}
"""The same of Hamiltonian trajectories of :data:`LEAPFROG_STEPS` steps: the goal is that of the smaller population."""
LEAPFROG_STEPS = 10
THREADS = (1, 2)
TURNS = 11


def peer_case(kind: str, size: tuple[int, int], count: int) -> dict[str, Any]:
    """What to ask of torchebm."""
    width, chains = size
    steps, step_size = {"training": (MCMC_STEPS, STEP_SIZE["ula"]), "hmc": (LEAPFROG_STEPS, 0.1)}[kind]
    return {"kind": kind, "width": width, "chains": chains, "steps": steps, "step_size": step_size, "count": count}


def best_threads(peer: Peer, case: dict[str, Any], tries: int = 3) -> int:
    """The number of threads with which the peer is fastest, by its best try."""
    times = {}
    for threads in THREADS:
        peer.ask(**case, threads=threads)
        times[threads] = min(peer.ask(**case, threads=threads)["seconds"] for _ in range(tries))
    return min(times, key=times.__getitem__)


def peer_run(peer: Peer, case: dict[str, Any], threads: int) -> Callable[[], None]:
    """A contender for turns. Threads that spin after their last work are given time to stop."""

    def run() -> None:
        peer.ask(**case, threads=threads)

    return run


def rest() -> None:
    """Threads of the other process that wait for more work stop waiting."""
    time.sleep(0.02)


def training(peer: Peer, size: tuple[int, int], chunk: int, turns: int = TURNS) -> dict[str, Any]:
    """How many times faster updates by ``fit`` are."""
    case = planar(*size, chunk)
    question = peer_case("training", size, chunk)
    threads = best_threads(peer, question)
    optimizer = optax.adam(1e-3)
    sampler = ebm.init_sampler(case.chains, ebm.kernels.unadjusted_langevin(step_size=STEP_SIZE["ula"]))
    seconds = in_turns_with_fit(
        {"torchebm": peer_run(peer, question, threads), "rest": rest},
        jax.random.key(0),
        ebm.init_train(case.potential, optimizer, sampler),
        case.rows,
        functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=MCMC_STEPS),
        optimizer,
        chunk=chunk,
        turns=turns,
        batch_size=size[1],
    )
    return figures(seconds, "fit", threads)


def hamiltonian(peer: Peer, size: tuple[int, int], count: int, turns: int = TURNS) -> dict[str, Any]:
    """How many times faster trajectories are."""
    case = planar(*size, count)
    question = peer_case("hmc", size, count)
    threads = best_threads(peer, question)
    kernel = ebm.kernels.hmc(step_size=0.1, num_integration_steps=LEAPFROG_STEPS)
    sampler = ebm.init_sampler(case.chains, kernel)
    seconds = in_turns(
        {
            "here": lambda: ebm.advance(jax.random.key(0), case.potential, sampler, count),
            "rest": rest,
            "torchebm": peer_run(peer, question, threads),
        },
        turns=turns,
    )
    return figures(seconds, "here", threads)


def figures(seconds: Seconds, ours: str, threads: int) -> dict[str, Any]:
    """What is reported of one case."""
    return {"times_faster": ratio(seconds["torchebm"], seconds[ours]), "threads_of_torchebm": threads}


def run() -> dict:
    """Ratios of times, that of torchebm over that here."""
    goal = ", ".join(f"{goal} x at {chains} chains of {width} wide" for (width, chains), (_, goal) in SIZES.items())
    goal = f"training at least {goal}; HMC at least 15 x at 256 chains of 64 wide"
    try:
        with Peer(TORCHEBM, "torchebm_loop.py") as peer:
            found, goals = {}, {}
            for name, measure, sizes in (
                ("training", training, SIZES),
                ("hmc", hamiltonian, TRAJECTORIES),
            ):
                for size, (count, at_least) in sizes.items():
                    case = f"{name}, {size[0]} wide, {size[1]} chains"
                    found[case], goals[case] = measure(peer, size, count), at_least
            versions = peer.versions
    except Unavailable as reason:
        return not_available("torchebm", goal, reason)
    missed = [case for case, at_least in goals.items() if found[case]["times_faster"]["median"] < at_least]
    return {"goal": goal, "met": not missed, "missed": missed, "cases": found, "versions": versions}
