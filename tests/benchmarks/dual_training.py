"""Dual training of shallow energies on the sphere: restarts, time scales, and a game whose distance from its end is known.

``python -m tests.benchmarks dual_training`` makes a short run. ``python -m tests.benchmarks.dual_training docs/tables``
trains everything, forty minutes on one core, and writes the tables of the documentation and a figure. What is done is kept
beside the tables, and a run that was interrupted goes on where it stopped; ``--only alpha`` does a part. The figure goes to
the folder ``images`` beside that of the tables.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import ebm_ppl as ebm
from ebm_ppl import objectives, potentials
from ebm_ppl.diagnostics import duality_gap
from ebm_ppl.optimizers import measure_descent
from ebm_ppl.plots.style import COLOURS, new_figure, styled
from ebm_ppl.recipes import dual_training
from tests.benchmarks._seeds import Runs, markdown, run_seeds

BOUND, STEP_SIZE, RATE = 10.0, 0.02, 0.04
NUM_UPDATES, NUM_ROWS, EVERY = 4000, 1000, 100
MOMENTS = (100, 400, 1000)
"""Updates after which the early figures are taken; the late ones are means over the last quarter of a run."""

RESTARTS: dict[str, dict[str, Any]] = {
    "p = 0": {},
    "p = 1": {"restart_every": 1},
    "p = 1/60": {"restart_every": 60},
    "p = 1/60, at random": {"restart_probability": 1 / 60},
}
LAZY = {"lazy, bound 10": 10.0, "lazy, bound 20": 20.0}
EXACT = "likelihood by quadrature"
"""Descent of the exact gradient, without particles: the least negative log-likelihood that is known."""
ALPHAS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
LENGTHS = {2000: 100, 8000: 400}
"""Updates of the runs over time scales, and updates between two evaluations."""
SWEEP = {f"alpha = {alpha:g}, T = {num_updates}": (alpha, num_updates) for num_updates in LENGTHS for alpha in ALPHAS}
HIGH: dict[str, int | None] = {"d = 15, p = 0": None, "d = 15, p = 1": 1, "d = 15, p = 1/40": 40}
HIGH_ROWS, HIGH_UPDATES, HIGH_RATE, NUM_TEST = 10_000, 1000, 0.2, 100_000
SEEDS, FEW_SEEDS, SWEEP_SEEDS, LAZY_SEEDS, HIGH_SEEDS = 15, 5, 3, 3, 3
AT_RANDOM = "p = 1/60, at random"


# --- in space: everything by a sum over 100 x 100 points of the sphere

TEACHER = np.array([[-0.4907, 0.7621, 0.4224], [0.4253, -0.3558, -0.8321]])
TEACHER /= np.linalg.norm(TEACHER, axis=1, keepdims=True)
POLAR, AZIMUTH = np.meshgrid((np.arange(100) + 0.5) * np.pi / 100, np.arange(100) * np.pi / 50, indexing="ij")
NODES = np.stack([np.sin(POLAR) * np.cos(AZIMUTH), np.sin(POLAR) * np.sin(AZIMUTH), np.cos(POLAR)], -1)
NODES = jnp.asarray(NODES.reshape(-1, 3), jnp.float32)
LOG_AREA = jnp.asarray(np.log(np.sin(POLAR) / np.sin(POLAR).sum()).ravel(), jnp.float32)


def energy_of(directions: np.ndarray) -> Any:
    """The teacher: two units of the whole norm, half of it each."""
    return lambda x: -0.5 * BOUND * jax.nn.relu(jnp.asarray(directions, x.dtype) @ x).sum()


def rows(seed: int, num_rows: int = NUM_ROWS) -> jax.Array:
    """Draws of the teacher by rejection from the uniform distribution. No energy is below -5: its units face away."""
    point_key, level_key = jax.random.split(jax.random.fold_in(jax.random.key(41), seed))
    points = unit(jax.random.normal(point_key, (20 * num_rows, 3)))
    levels = jax.random.uniform(level_key, (len(points),))
    kept = points[levels < jnp.exp(-jax.vmap(energy_of(TEACHER))(points) - 0.5 * BOUND)]
    assert len(kept) >= num_rows
    return kept[:num_rows]


def unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)


def squared_slopes(first: Any, second: Any, points: jax.Array) -> jax.Array:
    """Squared length of the difference of two Riemannian gradients."""

    def at(x: jax.Array) -> jax.Array:
        slope = jax.grad(first)(x) - jax.grad(second)(x)
        return jnp.sum((slope - x * (x @ slope)) ** 2)

    return jax.vmap(at)(points)


def log_normalizer(energy: Any) -> jax.Array:
    """With respect to the uniform distribution."""
    return jax.nn.logsumexp(LOG_AREA - jax.vmap(energy)(NODES))


@eqx.filter_jit
def figures(energy: Any, data: jax.Array) -> dict[str, jax.Array]:
    """Divergence from the teacher, Fisher divergence, and mean negative log-likelihood of the data."""
    teacher = energy_of(TEACHER)
    excess = jax.vmap(energy)(NODES) - jax.vmap(teacher)(NODES)
    truth = jax.nn.softmax(LOG_AREA - jax.vmap(teacher)(NODES))
    return {
        "kl": truth @ excess + log_normalizer(energy) - log_normalizer(teacher),
        "sm": truth @ squared_slopes(energy, teacher, NODES),
        "nll": jax.vmap(energy)(data).mean() + log_normalizer(energy),
    }


def evaluate(data: jax.Array, state: ebm.TrainState) -> dict[str, float]:
    energy = potentials.without_base(state.potential)
    return {name: float(value) for name, value in figures(energy, data).items()}


def network(seed: int) -> potentials.ShallowEnergy:
    return potentials.ShallowEnergy(3, key=jax.random.fold_in(jax.random.key(42), seed), signs="negative")


def train(
    seed: int, num_updates: int = NUM_UPDATES, *, every: int = EVERY, bound: float = BOUND, **options: Any
) -> dict[str, Any]:
    """One run of the recipe, and its figures."""
    data, start = rows(seed), time.perf_counter()
    state, history = dual_training(
        jax.random.fold_in(jax.random.key(43), seed), data, num_updates=num_updates, bound=bound, step_size=STEP_SIZE,
        evaluate=functools.partial(evaluate, data), report_every=every, progress_bar=False, **options,
    )  # fmt: skip
    return summary(state, history, data, bound, time.perf_counter() - start)


def summary(state: ebm.TrainState, history: dict, data: jax.Array, bound: float, seconds: float) -> dict[str, Any]:
    """What is kept of a run. The gap is exact, at the end, for the data of the training."""
    energy = potentials.without_base(state.potential)
    gap = duality_gap(energy, data, NODES, bound=bound, log_weight=LOG_AREA - jax.vmap(energy)(NODES))
    kl, sm, nll = (np.asarray(history[f"evaluation_{name}"], float) for name in ("kl", "sm", "nll"))
    found: dict[str, Any] = {"seconds": seconds, "norm": float(energy.norm), "gap": gap.value}
    found |= {"kl_end": kl[-1], "nll_end": nll[-1], "nll_least": nll.min()}
    found |= {f"kl_{n}": kl[history["evaluation_step"] == n][0] for n in MOMENTS if n in history["evaluation_step"]}
    found |= {"kl_late": late(kl, 0.25), "sm_late": late(sm, 0.25)}
    if "evaluation_duality_gap" in history:
        found["watched_gap"] = history["evaluation_duality_gap"][-1]
        found["watched_error"] = history["evaluation_duality_gap_error"][-1]
    found = {name: float(value) for name, value in found.items()}
    return found | {"kl": kl.round(6).tolist(), "sm": sm.round(6).tolist()}


def late(values: Any, share: float) -> float:
    """Mean over the evaluations in the last part of a run."""
    return float(np.mean(values[-max(round(share * len(values)), 1) :]))


def train_restarts(name: str, seed: int, num_updates: int = NUM_UPDATES) -> dict[str, Any]:
    return train(seed, num_updates, network=network(seed), **RESTARTS[name])


def train_lazy(bound: float, seed: int) -> dict[str, Any]:
    return train(seed, bound=bound, regime="lazy")


def train_alpha(alpha: float, num_updates: int, seed: int) -> dict[str, Any]:
    """Features and weights move ``alpha`` times as far as the particles; as many steps of these whatever ``alpha`` is."""
    rates = {"feature_rate": alpha * STEP_SIZE, "weight_rate": alpha * STEP_SIZE}
    found = train(seed, num_updates, every=LENGTHS[num_updates], network=network(seed), **rates)
    names = ("seconds", "norm", "gap", "nll_end", "nll_least")
    return {"kl_late": late(found["kl"], 0.2), **{name: found[name] for name in names}}


def negative_log_likelihood(potential: Any, batch: jax.Array, key: Any) -> jax.Array:
    return jax.vmap(potential)(batch).mean() + log_normalizer(potential)


EXACT_OBJECTIVE = objectives.stateless(negative_log_likelihood)
EXACT_OPTIMIZER = measure_descent(RATE, RATE, bound=BOUND)


def train_exact(seed: int, num_updates: int = NUM_UPDATES) -> dict[str, Any]:
    """The same energy, rates and ball, and the expectation under the model as a sum."""
    data, start = rows(seed), time.perf_counter()
    state, history = ebm.fit(
        jax.random.key(0), ebm.init_train(network(seed), EXACT_OPTIMIZER), data, EXACT_OBJECTIVE, EXACT_OPTIMIZER,
        num_steps=num_updates, evaluate=functools.partial(evaluate, data), report_every=EVERY, progress_bar=False,
    )  # fmt: skip
    return summary(state, history, data, BOUND, time.perf_counter() - start)


# --- in fifteen dimensions: by draws of the teacher, which are exact


@functools.cache
def high_teacher() -> tuple[np.ndarray, np.ndarray]:
    """Two directions whose cosine is .2, and an orthonormal basis ``(15, 2)`` of their plane."""
    plane, _ = np.linalg.qr(np.random.default_rng(15).standard_normal((15, 2)))
    return np.array([[1.0, 0.0], [0.2, np.sqrt(1.0 - 0.2**2)]]) @ plane.T, plane


def high_rows(seed: int, num_rows: int) -> jax.Array:
    """Draws of the teacher, which sees no more than a projection ``u`` to a plane.

    Its density in the unit disc is ``exp(-U(u)) (1 - |u|^2)^(11/2)``: a cell of a fine grid, then a point of the cell; what
    is orthogonal to the plane is uniform on a sphere.
    """
    directions, plane = high_teacher()
    generator = np.random.default_rng([15, seed])
    ticks = (np.arange(1500) + 0.5) / 750 - 1.0
    grid = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), -1).reshape(-1, 2)
    room = 1.0 - (grid**2).sum(axis=1)
    log_density = 0.5 * BOUND * np.maximum(grid @ (directions @ plane).T, 0.0).sum(axis=1)
    density = np.where(room > 0, np.exp(log_density) * np.maximum(room, 0.0) ** 5.5, 0.0)
    cells = generator.choice(len(grid), num_rows, p=density / density.sum())
    u = grid[cells] + generator.uniform(-1 / 1500, 1 / 1500, (num_rows, 2))
    rest = generator.standard_normal((num_rows, 15))
    rest -= rest @ plane @ plane.T
    length = np.sqrt(np.maximum(1.0 - (u**2).sum(axis=1, keepdims=True), 0.0))
    return unit(jnp.asarray(u @ plane.T + length * rest / np.linalg.norm(rest, axis=1, keepdims=True), jnp.float32))


@eqx.filter_jit
def high_figures(energy: Any, test: jax.Array) -> dict[str, jax.Array]:
    """Divergence from the teacher, and Fisher divergence, as means over draws of the teacher."""
    teacher = energy_of(high_teacher()[0])
    excess = jax.vmap(energy)(test) - jax.vmap(teacher)(test)
    log_ratio = jax.nn.logsumexp(-excess) - jnp.log(len(test))
    return {"kl": log_ratio + excess.mean(), "sm": squared_slopes(energy, teacher, test).mean()}


def train_high(restart_every: int | None, seed: int) -> dict[str, Any]:
    """Rates are five times those in space, and restarts raise them as they do there."""
    test = high_rows(1000 + seed, NUM_TEST)
    rate = HIGH_RATE * (1.0 + (0.0 if restart_every is None else 0.1 / (restart_every * STEP_SIZE)))

    def judged(state: ebm.TrainState) -> dict[str, float]:
        return {name: float(value) for name, value in high_figures(state.potential.potential, test).items()}

    start = time.perf_counter()
    _, history = dual_training(
        jax.random.fold_in(jax.random.key(44), seed), high_rows(seed, HIGH_ROWS), num_updates=HIGH_UPDATES, bound=BOUND,
        step_size=STEP_SIZE, feature_rate=rate, weight_rate=rate, restart_every=restart_every, evaluate=judged,
        report_every=EVERY, progress_bar=False,
    )  # fmt: skip
    series = {name: history[f"evaluation_{name}"] for name in ("step", "kl", "sm", "norm")}
    found: dict[str, Any] = {"seconds": time.perf_counter() - start}
    for moment in MOMENTS:
        now = series["step"] == moment
        found |= {f"{name}_{moment}": float(series[name][now][0]) for name in ("kl", "sm")}
    found |= {"norm": float(series["norm"][-1]), "watched_gap": float(history["evaluation_duality_gap"][-1])}
    found["watched_error"] = float(history["evaluation_duality_gap_error"][-1])
    return found


# --- all of it


def run() -> dict[str, Any]:
    """A quarter of one run without restarts, and of one with the exact gradient."""
    found, exact = train_restarts("p = 0", 0, 1000), train_exact(0, 1000)
    names = ("kl_100", "kl_400", "kl_1000", "norm", "gap", "seconds")
    goal = "KL in [.15, .23] after 400 updates, within .005 of that of the exact gradient after 1,000"
    met = 0.15 <= found["kl_400"] <= 0.23 and abs(found["kl_1000"] - exact["kl_1000"]) < 0.005
    return {**{name: found[name] for name in names}, "exact_kl_1000": exact["kl_1000"], "goal": goal, "met": met}


def run_all(path: Path, only: str = "") -> dict[str, dict[str, Any]]:
    """All cases; what the file at ``path`` has already is not done again. Seeds of a case share what was compiled."""
    groups: list[tuple[dict[str, Any], int]] = [
        ({name: functools.partial(train_restarts, name) for name in RESTARTS if name != AT_RANDOM}, SEEDS),
        ({AT_RANDOM: functools.partial(train_restarts, AT_RANDOM), EXACT: train_exact}, FEW_SEEDS),
        ({name: functools.partial(train_lazy, bound) for name, bound in LAZY.items()}, LAZY_SEEDS),
        ({name: functools.partial(train_alpha, *scales) for name, scales in SWEEP.items()}, SWEEP_SEEDS),
        ({name: functools.partial(train_high, every) for name, every in HIGH.items()}, HIGH_SEEDS),
    ]
    runs = (
        (f"{case}/{seed}", functools.partial(train_one, seed))
        for cases, seeds in groups
        for case, train_one in cases.items()
        for seed in range(seeds)
        if case.startswith(only)
    )
    return run_seeds(path, runs)


def runs_of(done: dict[str, dict[str, Any]], case: str) -> Runs:
    return [done[f"{case}/{seed}"] for seed in range(SEEDS) if f"{case}/{seed}" in done]


def table(done: dict[str, dict[str, Any]]) -> str:
    """The tables of the documentation: restarts, time scales, fifteen dimensions."""
    restarts = [["restarts", "KL at 100", "at 400", "at 1,000", "KL", "Fisher", "norm", "gap", "above the least NLL"]]
    for case in (*RESTARTS, EXACT, *LAZY):
        if runs := runs_of(done, case):
            names = [f"kl_{moment}" for moment in MOMENTS] + ["kl_late", "sm_late", "norm", "gap"]
            forms = [".3f", ".3f", ".4f", ".4f", ".3f", ".2f", ".3f"]
            cells = [_cell(runs, name, form) for name, form in zip(names, forms, strict=True)]
            above = [{"above": excess(done, case, seed)} for seed in range(len(runs))]
            restarts.append([case, *cells, _cell(above, "above", ".4f")])
    scales = [["alpha", *(f"KL after {num_updates:,}" for num_updates in LENGTHS)]]
    for alpha in ALPHAS:
        of_lengths = [runs_of(done, f"alpha = {alpha:g}, T = {num_updates}") for num_updates in LENGTHS]
        if all(of_lengths):
            scales.append([f"{alpha:g}", *(_cell(runs, "kl_late", ".4f") for runs in of_lengths)])
    high = [["restarts", "KL at 100", "at 400", "at 1,000", "Fisher at 1,000", "norm"]]
    for case in HIGH:
        if runs := runs_of(done, case):
            names = [*(f"kl_{moment}" for moment in MOMENTS), "sm_1000", "norm"]
            forms = [".3f", ".3f", ".3f", ".2f", ".2f"]
            high.append([case, *(_cell(runs, name, form) for name, form in zip(names, forms, strict=True))])
    return "\n".join(markdown(rows) for rows in (restarts, scales, high) if len(rows) > 1)


def least(done: dict[str, dict[str, Any]], seed: int) -> float:
    """The least mean negative log-likelihood of the data of a seed that was met with learned features."""
    found = [f"{case}/{seed}" for case in (*RESTARTS, EXACT, *SWEEP)]
    return min(done[name]["nll_least"] for name in found if name in done)


def excess(done: dict[str, dict[str, Any]], case: str, seed: int) -> float:
    """How far the likelihood at the end of a run is from the best one that is known."""
    return done[f"{case}/{seed}"]["nll_end"] - least(done, seed)


def _cell(runs: Runs, name: str, form: str) -> str:
    """The seeds in their order; of more than five the median, and the range."""
    values = np.array([one[name] for one in runs])
    if len(values) <= 5:
        return " / ".join(_short(value, form) for value in values)
    return f"{_short(np.median(values), form)} ({_short(values.min(), form)} to {_short(values.max(), form)})"


def _short(value: float, form: str) -> str:
    number = f"{value:{form}}"
    return number.replace("0.", ".", 1) if number.lstrip("-").startswith("0.") else number


def figure(done: dict[str, dict[str, Any]], path: Path) -> None:
    """Divergences over updates, over time scales, and the gap beside what it bounds."""
    steps = np.arange(EVERY, NUM_UPDATES + 1, EVERY)
    with styled():
        shown = new_figure(11.0, 7.6)
        axes = shown.subplots(2, 2)
        for axis, name, label in ((axes[0, 0], "kl", "KL from the teacher"), (axes[0, 1], "sm", "Fisher divergence")):
            for place, case in enumerate((*RESTARTS, EXACT)):
                if case != AT_RANDOM:
                    runs = runs_of(done, case)
                    colour = "black" if case == EXACT else COLOURS[place]
                    for one in runs:
                        axis.plot(steps, one[name], color=colour, lw=0.6, alpha=0.3)
                    axis.plot(steps, np.mean([one[name] for one in runs], axis=0), color=colour, label=case)
            axis.set(xscale="log", yscale="log", xlabel="updates", ylabel=label)
        axes[0, 0].legend(loc="lower left")
        for num_updates in LENGTHS:
            by_alpha = [[one["kl_late"] for one in runs_of(done, f"alpha = {a:g}, T = {num_updates}")] for a in ALPHAS]
            (line,) = axes[1, 0].plot(ALPHAS, np.mean(by_alpha, axis=1), label=f"{num_updates:,} updates")
            axes[1, 0].plot(ALPHAS, by_alpha, ".", color=line.get_color(), ms=5)
        axes[1, 0].set(xscale="log", yscale="log", xlabel="alpha, rate / step size of the particles")
        axes[1, 0].set(ylabel="KL from the teacher, late")
        axes[1, 0].legend()
        for place, case in enumerate((*RESTARTS, EXACT)):
            points = [(excess(done, case, seed), one["gap"]) for seed, one in enumerate(runs_of(done, case))]
            marker, colour = ("s", "black") if case == EXACT else ("o", COLOURS[place])
            axes[1, 1].plot(*np.maximum(points, 1e-5).T, marker, color=colour, label=case)
        axes[1, 1].plot([1e-5, 1.0], [1e-5, 1.0], color="grey", lw=1)
        axes[1, 1].set(xscale="log", yscale="log", xlabel="NLL above the least that is known", ylabel="duality gap")
        axes[1, 1].legend(loc="lower right")
        path.parent.mkdir(parents=True, exist_ok=True)
        shown.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="what the names of the cases begin with")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    done = run_all(options.folder / "dual_training.json", options.only)
    (options.folder / "dual_training.inc").write_text(table(done))
    print(table(done))
    if not options.only:
        figure(done, options.folder.parent / "images" / "dual_training.png")


if __name__ == "__main__":
    main()
