"""Energies trained with a flow that is refitted to their chains, and with local moves alone, against the exact answers.

``python -m tests.benchmarks adaptive_flow`` makes a short run. ``python -m tests.benchmarks.adaptive_flow docs/tables``
trains everything with three seeds, an hour on one core, and writes the tables of the documentation and a figure. What is
done is kept beside the tables, and a run that was interrupted goes on where it stopped; ``--only plane`` does a part.
The figure goes to the folder ``images`` beside that of the tables.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import optax

import ebm_ppl as ebm
from ebm_ppl import flows, kernels, normalizer, objectives, potentials, recipes
from ebm_ppl.diagnostics import diagnose, rhat
from ebm_ppl.flows.fitting import default_optimizer
from tests.benchmarks._seeds import Runs, run_seeds, table_of_seeds

SEEDS = 3
PLANE = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
NUM_ROWS, EPOCH, EPOCHS, LAST = 16_384, 256, 30, 15
BUDGET = 600_000
"""Gradients that a diagnosis may spend."""


def mixture(weights: Any, means: Any, scales: Any) -> dist.Distribution:
    """Isotropic normal components."""
    components = dist.Normal(jnp.asarray(means, float), jnp.asarray(scales, float)[:, None]).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(jnp.asarray(weights, float)), components)


def planar() -> dist.Distribution:
    """A third of the mass at (-1.5, -1.5), the rest at (1.5, 1.5)."""
    return mixture([1 / 3, 2 / 3], [[-1.5, -1.5], [1.5, 1.5]], np.sqrt([0.05, 0.1]))


def four(dim: int, distance: float, weights: Any) -> dist.Distribution:
    """Four components of unit variance at plus and minus ``distance`` times (1, 1) and (-1, 1)."""
    half = np.ones(dim // 2)
    means = distance * np.array([np.r_[a * half, b * half] for a, b in ((1, 1), (-1, 1), (1, -1), (-1, -1))])
    return mixture(weights, means, np.ones(4))


TICKS = np.linspace(-4.0, 4.0, 201)
GRID = jnp.asarray(np.stack(np.meshgrid(TICKS, TICKS, indexing="ij"), -1).reshape(-1, 2), jnp.float32)


@eqx.filter_jit
def upper_weight(potential: Any) -> jax.Array:
    """Mass of the model above the diagonal, on a grid."""
    return jnp.sum(jnp.where(GRID.sum(axis=1) > 0, jax.nn.softmax(-jax.vmap(potential)(GRID)), 0.0))


def local_training(
    key: Any,
    data: Any,
    kernel: Any,
    base: Any,
    net: Any,
    optimizer: Any,
    *,
    cycles: int,
    batch_size: int,
    **options: Any,
) -> tuple[ebm.TrainState, dict[str, np.ndarray], bool]:
    """Persistent contrastive divergence with everything of the recipe but the flow; whether it became non-finite."""
    bank_key, fit_key = jax.random.split(key)
    sampler = ebm.init_sampler(base.sample(bank_key, (1024,)), kernel)
    state = ebm.init_train(potentials.tilt(net, base), optimizer, sampler)
    objective = functools.partial(objectives.persistent_contrastive_divergence, num_steps=cycles, num_chains=batch_size)
    try:
        state, history = ebm.fit(fit_key, state, data, objective, optimizer, batch_size=batch_size, **options)
    except ebm.TrainingFailure as failure:
        return failure.state, failure.history, True
    return state, history, False


# --- two modes in the plane


def train_planar(method: str, seed: int, epochs: int = EPOCHS) -> tuple[ebm.TrainState, dict[str, np.ndarray], bool]:
    """One run: ``"flow-assisted"``, the same with a decayed step, ``"PCD-ULA"`` or ``"PCD-MALA"``."""
    row_key, net_key, flow_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 4)
    data = planar().sample(row_key, (NUM_ROWS,))
    net = potentials.MLP(2, key=net_key, width=64, depth=3)
    watch = lambda state: {"weight": float(upper_weight(state.potential))}
    options: dict[str, Any] = {"batch_size": 64, "report_every": EPOCH, "evaluate": watch}
    if method.startswith("flow-assisted"):
        decayed = method.endswith("decayed")
        optimizer = default_optimizer(EPOCH * epochs) if decayed else optax.adam(0.01)
        flow = flows.RealNVP(2, key=flow_key, num_layers=4, width=16, depth=3, base=PLANE)
        players = {"network": net, "flow": flow, "optimizer": optimizer, "flow_optimizer": optimizer}
        state, history = recipes.adaptive_flow(key, data, num_updates=EPOCH * epochs, base=PLANE, **players, **options)
        return state, history, False
    kernel = {"PCD-ULA": kernels.unadjusted_langevin, "PCD-MALA": kernels.mala}[method](0.01)
    return local_training(
        key, data, kernel, PLANE, net, optax.adam(0.01), cycles=10, num_steps=EPOCH * epochs, **options
    )


def judge_planar(method: str, seed: int, epochs: int = EPOCHS, *, with_diagnosis: bool = True) -> dict[str, Any]:
    start = time.perf_counter()
    state, history, failed = train_planar(method, seed, epochs)
    seconds = time.perf_counter() - start
    row_key, test_key, judge_key = jax.random.split(jax.random.fold_in(jax.random.key(2), seed), 3)
    del row_key
    data = planar().sample(jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 4)[0], (NUM_ROWS,))
    truth = float((data.sum(axis=1) > 0).mean())
    weights = np.asarray(history.get("evaluation_weight", [upper_weight(state.potential)]))
    error = np.abs(weights[-LAST:] - truth)
    test = planar().sample(test_key, (4096,))
    site = ebm.EBM(state.potential.potential, PLANE)
    found = {
        "weights": weights.round(4).tolist(), "truth": truth, "non_finite": failed, "seconds": seconds,
        "mean_error": float(error.mean()), "max_error": float(error.max()),
        **excess(planar(), site, test, normalizer.quadrature(site)),
        **flow_figures(history),
    }  # fmt: skip
    return found | (verdicts(state, PLANE, test, judge_key, 2 if "flow" in method else 10) if with_diagnosis else {})


def excess(truth: Any, site: Any, test: Any, log_z: Any) -> dict[str, Any]:
    """How many nats per held-out row the model is worse than the truth: the divergence, with its error."""
    found = normalizer.compare_log_likelihoods(truth, site, test, second_log_normalizer=log_z)
    return {"excess": float(found.value), "excess_error": float(found.standard_error), "reliable": bool(found.reliable)}


def flow_figures(history: dict[str, np.ndarray]) -> dict[str, float]:
    """How the flow served the chains in the second half of the run."""
    names = {"accepted": "evaluation_global_acceptance_rate", "pool_ess": "evaluation_global_pool_ess"}
    return {k: float(history[n][len(history[n]) // 2 :].mean()) for k, n in names.items() if n in history}


def verdicts(state: ebm.TrainState, base: Any, test: Any, key: Any, num_steps: int) -> dict[str, Any]:
    """What the diagnosis says; SMC starts from a reference of twice the width of the base."""
    wide = dist.Normal(0.0, 2.0 * jnp.sqrt(base.variance)).to_event(1)
    options = {"budget": BUDGET, "num_steps": num_steps, "reference": wide}
    found = diagnose(state.potential, state.sampler, test, key, **options)
    return {"sampler": found.sampler, "model": found.model}


# --- four modes in 8 and 16 dimensions


class FourModes:
    """Four Gaussians in ``dim`` dimensions, and how they are learned."""

    def __init__(self, dim: int, distance: float, weights: Any, num_updates: int, cycles: int, num_proposals: int,
                 num_local: int):  # fmt: skip
        self.dim, self.distance, self.weights = dim, distance, np.asarray(weights)
        self.num_updates, self.cycles = num_updates, cycles
        self.num_proposals, self.num_local = num_proposals, num_local

    @property
    def truth(self) -> dist.Distribution:
        return four(self.dim, self.distance, self.weights)

    @property
    def evaluations(self) -> int:
        """Of the energy in one update of one chain."""
        return self.cycles * (self.num_proposals - 1 + self.num_local + 1)

    def local_steps(self, method: str) -> int:
        """MALA steps of the baseline per update: one for every evaluation, or one for every local step."""
        return self.evaluations if method == "PCD-MALA" else self.cycles * (self.num_local + 1)


PROBLEMS: dict[str, FourModes] = {
    "d = 8": FourModes(8, 1.5, [0.1, 0.2, 0.3, 0.4], 3000, 2, 32, 4),
    "d = 16": FourModes(16, 1.5, [0.25] * 4, 3000, 2, 64, 8),
}


def train_four(
    name: str, method: str, seed: int, num_updates: int | None = None, batch_size: int = 128
) -> tuple[ebm.TrainState, dict[str, np.ndarray], Any, bool]:
    """One run, and its base: ``"flow-assisted"``, ``"PCD-MALA"`` with as many evaluations of the
    energy, or ``"PCD-MALA, as many gradients"``."""
    problem = PROBLEMS[name]
    num_updates = problem.num_updates if num_updates is None else num_updates
    row_key, net_key, flow_key, key = jax.random.split(jax.random.fold_in(jax.random.key(3), seed), 4)
    data = problem.truth.sample(row_key, (50_000,))
    base = dist.Normal(0.0, data.std(axis=0).max()).expand([problem.dim]).to_event(1)
    net = potentials.MLP(problem.dim, key=net_key, width=128, depth=3)
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(2e-3, num_updates)))
    options: dict[str, Any] = {"batch_size": batch_size, "report_every": 250}
    if method == "flow-assisted":
        flow = flows.RealNVP(problem.dim, key=flow_key, num_layers=6, width=64, depth=2, base=base)
        state, history = recipes.adaptive_flow(
            key, data, num_updates=num_updates, base=base, network=net, flow=flow, num_proposals=problem.num_proposals,
            num_local=problem.num_local, num_cycles=problem.cycles, step_size=0.1, optimizer=optimizer,
            flow_optimizer=optimizer, **options,
        )  # fmt: skip
        return state, history, base, False
    cycles = problem.local_steps(method)
    state, history, failed = local_training(
        key, data, kernels.mala(0.1), base, net, optimizer, cycles=cycles, num_steps=num_updates, **options
    )
    return state, history, base, failed


def judge_four(
    name: str, method: str, seed: int, *, with_diagnosis: bool = True, num_draws: int = 200, **size: Any
) -> dict[str, Any]:
    problem, start = PROBLEMS[name], time.perf_counter()
    state, history, base, failed = train_four(name, method, seed, **size)
    seconds = time.perf_counter() - start
    keys = jax.random.split(jax.random.fold_in(jax.random.key(4), seed), 4)
    # The chains go on at frozen parameters, with as many evaluations of the energy for each draw.
    sampler = ebm.replay.take_chains(state.sampler, jnp.arange(128))
    steps = 1 if method == "flow-assisted" else problem.local_steps(method) // problem.cycles
    _, draws = ebm.draw(keys[0], state.potential, sampler, num_draws, num_steps=steps)
    series = np.asarray(draws.position)
    test = problem.truth.sample(keys[1], (4096,))
    site = ebm.EBM(state.potential.potential, base)
    log_z = normalizer.flow_importance(keys[2], site, problem.truth, num_particles=20_000)
    found = {
        "rhat": float(rhat(series).max()), "non_finite": failed, "seconds": seconds,
        "weights": mode_weights(keys[2], problem, state.potential).tolist(),
        "ess": float(log_z.ess) / 20_000,
        **excess(problem.truth, site, test, log_z), **flow_figures(history),
    }  # fmt: skip
    found["max_error"] = float(np.abs(np.array(found["weights"]) - problem.weights).max())
    return found | (verdicts(state, base, test, keys[3], steps * problem.cycles) if with_diagnosis else {})


def mode_weights(key: Any, problem: FourModes, potential: Any) -> np.ndarray:
    """Of the model, by importance sampling from the truth: whose component is the nearest, of weighted draws."""
    draws = problem.truth.sample(key, (20_000,))
    log_weight = -jax.vmap(potential)(draws) - problem.truth.log_prob(draws)
    means = problem.truth.component_distribution.base_dist.loc
    nearest = jnp.argmin(jnp.sum((draws[:, None] - means) ** 2, axis=-1), axis=1)
    weight = jax.nn.softmax(log_weight)
    return np.array([float(weight[nearest == mode].sum()) for mode in range(4)])


# --- all of it

CASES: dict[str, tuple[Callable[..., dict[str, Any]], tuple, int]] = {
    "plane, flow-assisted": (judge_planar, ("flow-assisted",), SEEDS),
    "plane, flow-assisted, decayed": (judge_planar, ("flow-assisted, decayed",), SEEDS),
    "plane, PCD-ULA": (judge_planar, ("PCD-ULA",), SEEDS),
    "plane, PCD-MALA": (judge_planar, ("PCD-MALA",), SEEDS),
    "d = 8, flow-assisted": (judge_four, ("d = 8", "flow-assisted"), SEEDS),
    "d = 8, PCD-MALA": (judge_four, ("d = 8", "PCD-MALA"), SEEDS),
    "d = 8, PCD-MALA, as many gradients": (judge_four, ("d = 8", "PCD-MALA, as many gradients"), SEEDS),
    "d = 16, flow-assisted": (judge_four, ("d = 16", "flow-assisted"), 1),
    "d = 16, PCD-MALA": (judge_four, ("d = 16", "PCD-MALA"), 1),
}


def run_all(path: Path, only: str = "") -> dict[str, dict[str, Any]]:
    """All cases, seed by seed; what the file at ``path`` has already is not done again."""
    runs = (
        (f"{case}/{seed}", functools.partial(judge, *arguments, seed))
        for seed in range(SEEDS)
        for case, (judge, arguments, seeds) in CASES.items()
        if seed < seeds and case.startswith(only)
    )
    return run_seeds(path, runs)


def table(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    columns = ["problem, method", "error of mode weights", "largest", "nats worse than the truth", "R-hat"]
    return table_of_seeds([*columns, "moved by the flow", "pool ESS"], done, CASES, SEEDS, _cells)


def _cells(runs: Runs) -> list[str]:
    return [
        _cell(runs, "mean_error", ".3f"),
        _cell(runs, "max_error", ".3f"),
        " / ".join(_nats(one) for one in runs),
        _cell(runs, "rhat", ".3f"),
        _cell(runs, "accepted", ".2f"),
        _cell(runs, "pool_ess", ".2f"),
    ]


def _cell(runs: Runs, name: str, form: str) -> str:
    return " / ".join(f"{one[name]:{form}}" for one in runs) if name in runs[0] else "-"


def _nats(one: dict[str, Any]) -> str:
    if one["non_finite"] or not np.isfinite(one["excess"]) or one["excess"] > 1e3:
        return "ran away"
    return f"{one['excess']:.3f} ± {one['excess_error']:.3f}"


def figure(done: dict[str, dict[str, Any]], path: Path) -> None:
    """Mode weight of the energy in the plane over the epochs, one line a seed."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
    cases = [case for case in CASES if case.startswith("plane")]
    for axis, case in zip(axes, cases, strict=True):
        for seed in range(SEEDS):
            one = done[f"{case}/{seed}"]
            axis.plot(np.arange(1, 1 + len(one["weights"])), one["weights"], lw=1.2, label=f"seed {seed}")
        axis.axhline(2 / 3, color="black", ls="--", lw=1, label="data")
        axis.set(title=case.removeprefix("plane, "), xlabel="epoch", xlim=(1, EPOCHS), ylim=(-0.03, 1.03))
    axes[0].set_ylabel("weight of the upper mode")
    axes[0].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run() -> dict[str, Any]:
    """The plane with a seventh of its epochs, one seed, without a diagnosis."""
    found = {
        method: judge_planar(method, 0, epochs=4, with_diagnosis=False) for method in ("flow-assisted", "PCD-MALA")
    }
    return {**found, "goal": "flow-assisted within .1 of the weight", "met": found["flow-assisted"]["mean_error"] < 0.1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="what the names of the cases begin with")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    done = run_all(options.folder / "adaptive_flow.json", options.only)
    (options.folder / "adaptive_flow.inc").write_text(table(done))
    if all(f"{case}/{seed}" in done for case in CASES if case.startswith("plane") for seed in range(SEEDS)):
        figure(done, options.folder.parent / "images" / "adaptive_flow.png")
    print(table(done))


if __name__ == "__main__":
    main()
