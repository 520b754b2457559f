"""How much it takes to know the weights of two modes in 8 dimensions: local moves, tempering, a flow and a diffusion.

``python -m tests.benchmarks statistical_speed`` makes a short run of the two methods that need no training.
``python -m tests.benchmarks.statistical_speed docs/tables`` runs all of them with three seeds, some minutes on one core,
and writes the table of the documentation and a figure. What is done is kept beside the table, and a run that was
interrupted goes on where it stopped; ``--only SMC`` does a part, and ``--fresh`` starts anew.

All start from the same wide normal, whose draws fall to the two modes in the wrong proportion. Every method gets its
documented tuner once, and what that and training spend is counted: evaluations of the energy with or without its gradient,
per chain, all chains running side by side. The estimate at a budget is the mean over the chains and the second half of the
run so far, and its error is that from the exact weight. Times are those of one core, with everything compiled before.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import optax
from jax.scipy.special import ndtr

import ebm_ppl as ebm
from ebm_ppl import diffusion, flows, kernels
from ebm_ppl.targets.mixture import mixture_target
from tests.benchmarks._seeds import Runs, markdown, recorder, run_seeds

SEEDS, NUM_CHAINS, GOAL = 3, 512, 0.02
DIM, WEIGHTS, SCALES = 8, np.array([0.3, 0.7]), np.array([0.6, 1.0])
MEANS = np.stack([-np.ones(DIM), np.ones(DIM)])
TARGET = mixture_target("two_modes", WEIGHTS, MEANS, SCALES, 1.5, {})
WIDE = dist.Normal(0.0, 3.0).expand([DIM]).to_event(1)
CUT = 0.6 * (MEANS[1] - MEANS[0]) / 1.6 + MEANS[0]
"""Where the modes part: as many standard deviations from the one as from the other."""
LIGHT = float(WEIGHTS @ ndtr((CUT - MEANS).sum(axis=1) / DIM**0.5 / SCALES))
"""Mass on the side of the lighter mode, ``sum_k w_k Phi(distance of the cut from mode k / scale_k)``."""


class Ready(NamedTuple):
    """A tuned and trained sampler, and what that took per chain."""

    sampler: ebm.SamplerState
    tuning: int
    training: int


def evaluations(info: Any) -> float:
    """Evaluations of the energy, with and without gradient, mean over the chains."""
    return float((info.num_gradients + info.num_energies).mean())


def start(key: Any, kernel: Any) -> ebm.SamplerState:
    """Chains at draws of the wide normal."""
    return ebm.init_sampler(WIDE.sample(key, (NUM_CHAINS,)), kernel)


TUNING = 100
"""Iterations of :func:`ebm_ppl.tune_step_size`, its default; each is a phase of one step."""


def tuned(key: Any, sampler: ebm.SamplerState, acceptance: float) -> tuple[ebm.SamplerState, int]:
    """The step size for an acceptance rate, and its evaluations per chain."""
    _, info = ebm.advance(key, TARGET.potential, sampler, 1)
    sampler = ebm.tune_step_size(key, TARGET.potential, sampler, acceptance, num_iterations=TUNING)
    return sampler, round(TUNING * evaluations(info))


def tuned_mala(key: Any) -> tuple[ebm.SamplerState, int]:
    """MALA, which others use for their local moves."""
    start_key, tune_key = jax.random.split(key)
    return tuned(tune_key, start(start_key, kernels.mala(0.1)), 0.57)


def local_mala(key: Any) -> Ready:
    return Ready(*tuned_mala(key), 0)


def local_hmc(key: Any) -> Ready:
    start_key, tune_key = jax.random.split(key)
    sampler = start(start_key, kernels.hmc(0.2, num_integration_steps=10))
    return Ready(*tuned(tune_key, sampler, 0.65), 0)


RUNGS, ROUNDS, ROUND_STEPS = 6, 5, 20


def replica_exchange(key: Any) -> Ready:
    """Six rungs from the target to the wide normal, spaced by :func:`ebm_ppl.tune_ladder`."""
    mala_key, start_key, tune_key, count_key = jax.random.split(key, 4)
    mala, spent = tuned_mala(mala_key)
    ladder = jnp.concatenate([jnp.geomspace(1.0, 0.05, RUNGS - 1), jnp.zeros(1)])
    # With a reference the warm rungs are as narrow as that: a full power would give them steps that are refused.
    kernel = kernels.replica_exchange(ladder, inner=mala.kernel, reference=WIDE, step_size_power=0.5)
    sampler = start(start_key, kernel)
    _, info = ebm.advance(count_key, TARGET.potential, sampler, ROUND_STEPS)
    sampler = ebm.tune_ladder(tune_key, TARGET.potential, sampler, 0.3, num_rounds=ROUNDS, num_steps=ROUND_STEPS)
    return Ready(sampler, spent + round((ROUNDS + 1) * evaluations(info)), 0)


def smc(key: Any) -> Ready:
    """Whole passes of the population from the wide normal."""
    mala_key, start_key = jax.random.split(key)
    mala, spent = tuned_mala(mala_key)
    return Ready(start(start_key, kernels.tempered_smc(inner=mala.kernel, reference=WIDE, num_steps=5)), spent, 0)


REFITS, REFIT_DRAWS, REFIT_UPDATES, REFIT_SAMPLES = 2, 20, 600, 1000


def flow_assisted(key: Any) -> Ready:
    """A flow fitted to the chains in two rounds, then frozen."""
    start_key, flow_key, tune_key, key = jax.random.split(key, 4)
    flow = flows.RealNVP(DIM, key=flow_key, num_layers=6, width=64, depth=2, base=WIDE)
    sampler, spent = tuned(
        tune_key, start(start_key, kernels.flow_assisted(flow, kernels.mala(0.1), num_proposals=16)), 0.57
    )
    training = 0.0
    for index in range(REFITS):
        draw_key, fit_key = jax.random.split(jax.random.fold_in(key, index))
        sampler, draws = ebm.draw(draw_key, TARGET.potential, sampler, REFIT_DRAWS)
        options = {"num_updates": REFIT_UPDATES, "num_samples": REFIT_SAMPLES}
        sampler, _ = flows.refit_flow(fit_key, TARGET.potential, sampler, samples=draws.position, **options)
        counted = (draws.num_gradients + draws.num_energies).sum(axis=1).mean()
        training += float(counted) + 2 * REFIT_SAMPLES / NUM_CHAINS
    return Ready(sampler, spent, round(training))


DENOISING, DATA_DRAWS, DATA_STEPS = 4000, 20, 10


@functools.cache
def denoising_optimizer() -> optax.GradientTransformation:
    """One object, so that all runs share their compilation."""
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(2e-3, DENOISING)))


def diffusion_sampler(key: Any) -> Ready:
    """A sampler of ten steps, fitted by denoising to chains of MALA; its draws are weighted exactly."""
    mala_key, draw_key, net_key, fit_key, start_key = jax.random.split(key, 5)
    mala, spent = tuned_mala(mala_key)
    _, draws = ebm.draw(draw_key, TARGET.potential, mala, DATA_DRAWS, num_steps=DATA_STEPS)
    scale = float(np.sqrt(WEIGHTS @ (1.0 + SCALES**2)))
    sampler = diffusion.DiffusionSampler(DIM, num_steps=10, key=net_key, width=128, depth=2, scale=round(scale, 2))
    rows = draws.position.reshape(-1, DIM)
    sampler, _ = diffusion.pretrain(fit_key, sampler, rows, denoising_optimizer(), DENOISING, batch_size=512)
    counted = (draws.num_gradients + draws.num_energies).sum(axis=1).mean()
    return Ready(start(start_key, kernels.diffusion(sampler)), spent, round(float(counted)))


class Method(NamedTuple):
    """How a method is prepared, and how its run is cut into pieces."""

    prepare: Callable[[Any], Ready]
    steps: int
    pieces: int


METHODS = {
    "MALA": Method(local_mala, 100, 1500),
    "HMC": Method(local_hmc, 10, 1500),
    "replica exchange": Method(replica_exchange, 4, 800),
    "SMC": Method(smc, 1, 250),
    "flow-assisted": Method(flow_assisted, 2, 200),
    "diffusion": Method(diffusion_sampler, 1, 1000),
}


def light_weight(sampler: ebm.SamplerState) -> jax.Array:
    """Fraction of the chains, with their weights, on the side of the lighter mode."""
    is_light = jnp.sum(sampler.position - CUT, axis=1) < 0
    return jnp.sum(jax.nn.softmax(sampler.log_weight) * is_light)


def errors_of(weights: np.ndarray, log_sizes: np.ndarray) -> np.ndarray:
    """Error after each piece of the mean over the second half of the pieces so far.

    Args:
        weights: What each piece says, ``(piece,)``.
        log_sizes: Logs by which pieces count: what fresh populations say of ``log Z``, zeros for chains. The ratio of sums
            over many populations has less of a bias than the mean of their ratios.
    """
    size = np.exp(log_sizes - log_sizes.max())
    above, below = (np.concatenate([[0.0], np.cumsum(x)]) for x in (size * weights, size))
    last = np.arange(1, len(weights) + 1)
    first = last // 2
    return np.abs((above[last] - above[first]) / (below[last] - below[first]) - LIGHT)


def first_kept(errors: np.ndarray) -> int | None:
    """Index from which all errors are within the goal, or ``None``."""
    misses = np.flatnonzero(~(errors <= GOAL))
    first = 0 if misses.size == 0 else int(misses[-1]) + 1
    return None if first == len(errors) else first


@functools.cache
def compiled(name: str) -> None:
    """Everything of a method once, so that later runs find it compiled."""
    method = METHODS[name]
    ready = method.prepare(jax.random.key(98))
    ebm.advance(jax.random.key(99), TARGET.potential, ready.sampler, method.steps)


def judge(name: str, seed: int, *, pieces: int | None = None) -> dict[str, Any]:
    """One run, and when its error came to stay within the goal."""
    compiled(name)
    method = METHODS[name]
    prepare_key, run_key = jax.random.split(jax.random.fold_in(jax.random.key(41), seed))
    begin = time.perf_counter()
    ready = jax.block_until_ready(method.prepare(prepare_key))
    prepared = time.perf_counter() - begin
    sampler, weights, log_sizes, spent, seconds = ready.sampler, [], [], [], []
    begin = time.perf_counter()
    for piece in range(method.pieces if pieces is None else pieces):
        sampler, info = ebm.advance(jax.random.fold_in(run_key, piece), TARGET.potential, sampler, method.steps)
        weights.append(float(light_weight(sampler)))
        log_sizes.append(float(jnp.mean(info.statistics.get("log_normalizer", jnp.zeros(1)))))
        spent.append(evaluations(info))
        seconds.append(time.perf_counter() - begin)
    errors, before = errors_of(np.array(weights), np.array(log_sizes)), ready.tuning + ready.training
    counts = before + np.cumsum(spent)
    found = first_kept(errors)
    # A thousand points are more than a figure shows.
    kept = np.unique(np.geomspace(1, len(errors), 60).round().astype(int)) - 1
    return {
        "tuning": ready.tuning,
        "training": ready.training,
        "preparation_seconds": prepared,
        "reached": found is not None,
        "evaluations": None if found is None else float(counts[found]),
        "seconds": None if found is None else prepared + seconds[found],
        "largest_budget": float(counts[-1]),
        "largest_seconds": prepared + seconds[-1],
        "final_error": float(errors[-1]),
        "budgets": [round(float(counts[i]), 1) for i in kept],
        "errors": [round(float(errors[i]), 5) for i in kept],
    }


def run_all(path: Path, only: str = "") -> dict[str, dict[str, Any]]:
    """All methods, seed by seed; what the file at ``path`` has already is not done again."""
    return run_seeds(
        path,
        (
            (f"{name}/{seed}", functools.partial(judge, name, seed))
            for name in METHODS
            if name.startswith(only)
            for seed in range(SEEDS)
        ),
    )


def table(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation: medians over the seeds."""
    rows = [
        [
            "method", "tuning, evaluations per chain", "training", "tuning and training, s",
            "evaluations per chain to .02, all included", "of all chains", "s, all included", "seeds within .02",
        ]
    ]  # fmt: skip
    for name in METHODS:
        if runs := [done[f"{name}/{seed}"] for seed in range(SEEDS) if f"{name}/{seed}" in done]:
            rows.append([name, *_cells(runs)])
    return markdown(rows)


def _cells(runs: Runs) -> list[str]:
    def middle(field: str) -> float:
        # A seed that did not get there took longer than any that did.
        return float(np.median([np.inf if one[field] is None else one[field] for one in runs]))

    count, seconds = middle("evaluations"), middle("seconds")
    reached = sum(one["reached"] for one in runs)
    if np.isfinite(count):
        result = [f"{count:,.0f}", f"{count * NUM_CHAINS:.1e}", f"{seconds:.1f}"]
    else:
        budget, most = middle("largest_budget"), middle("largest_seconds")
        result = [f"not within {budget:,.0f}", f"> {budget * NUM_CHAINS:.1e}", f"> {most:.1f}"]
    spent = [f"{middle('tuning'):,.0f}", f"{middle('training'):,.0f}", f"{middle('preparation_seconds'):.1f}"]
    return [*spent, *result, f"{reached} of {len(runs)}"]


def figure(done: dict[str, dict[str, Any]], path: Path) -> None:
    """Median error over the seeds against evaluations per chain."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in METHODS:
        runs = [done[f"{name}/{seed}"] for seed in range(SEEDS)]
        budgets = np.median([one["budgets"] for one in runs], axis=0)
        axis.plot(budgets, np.median([one["errors"] for one in runs], axis=0), lw=1.5, label=name)
    axis.axhline(GOAL, color="black", ls="--", lw=1)
    beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axis.annotate(f"{GOAL}", (1.0, GOAL), (4, 0), **beside)
    axis.set(xscale="log", yscale="log", ylim=(1e-4, 1.0))
    axis.set(
        xlabel="evaluations of the energy per chain, tuning and training included", ylabel="error of the mode weight"
    )
    axis.legend(loc="lower left", fontsize="small", ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run() -> dict[str, Any]:
    """Replica exchange and SMC, with one seed and short runs."""
    found = {name: judge(name, 0, pieces=pieces) for name, pieces in (("replica exchange", 400), ("SMC", 200))}
    met = all(one["final_error"] <= GOAL for one in found.values())
    return {**found, "goal": f"weights of the modes within {GOAL} at the end", "met": met}


def main() -> None:
    path, options = recorder(__doc__, "statistical_speed", only="methods")
    done = run_all(path, options.only)
    (options.folder / "statistical_speed.inc").write_text(table(done))
    if all(f"{name}/{seed}" in done for name in METHODS for seed in range(SEEDS)):
        figure(done, options.folder.parent / "images" / "statistical_speed.png")
    print(table(done))


if __name__ == "__main__":
    main()
