"""A generator or a flow beside an energy, on 25 Gaussians in the plane where the density is known.

``python -m tests.benchmarks.teaching_grid docs/tables`` trains an energy with three companions and three seeds each, judges
it by sums over a grid and by a diagnosis, and writes the table of the documentation and a figure; half an hour on one core.
What is done is kept beside the table, and a run that was interrupted goes on where it stopped.
"""

import argparse
import json
import time
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
from ebm_ppl import flows, kernels, normalizer, potentials, recipes
from ebm_ppl.diagnostics import diagnose
from tests.benchmarks._seeds import Runs, table_of_seeds

SEEDS, NUM_UPDATES, NUM_ROWS, BATCH_SIZE = 3, 3000, 20_000, 128
SCALE, BUDGET = 0.1, 600_000
"""Standard deviation of the components; gradients that a diagnosis may spend."""
CENTRES = np.stack(np.meshgrid(np.arange(-2.0, 3.0), np.arange(-2.0, 3.0), indexing="ij"), -1).reshape(-1, 2)
BASE = dist.Normal(0.0, 1.5).expand([2]).to_event(1)
STEP_SIZE, EVENT_STEPS = 0.003, 30
"""Of Langevin steps at temperature one, so that the energy they are short of sampling has a density to compare."""
METHODS = ("generator, Langevin", "generator, MALA", "flow, i-SIR + MALA")


def truth() -> dist.Distribution:
    components = dist.Normal(jnp.asarray(CENTRES, float), SCALE).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(jnp.full(25, 0.04)), components)


TICKS = np.linspace(-3.0, 3.0, 301)
GRID = jnp.asarray(np.stack(np.meshgrid(TICKS, TICKS, indexing="ij"), -1).reshape(-1, 2), jnp.float32)


@eqx.filter_jit
def grid_mass(potential: Any) -> jax.Array:
    """Probability of every point of the grid."""
    return jax.nn.softmax(-jax.lax.map(potential, GRID, batch_size=4096))


def nearest(rows: Any) -> Any:
    """The component whose centre is the nearest."""
    return np.argmin(((np.asarray(rows)[:, None] - CENTRES) ** 2).sum(-1), axis=1)


def optimizer(step_size: float, num_updates: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(step_size, num_updates), b1=0.5)
    )


def train(method: str, seed: int, num_updates: int = NUM_UPDATES) -> tuple[ebm.TrainState, bool]:
    """One run, and whether it ended early: all have one network, tilt, data, batch and number of updates."""
    row_key, net_key, pair_key, key = jax.random.split(jax.random.fold_in(jax.random.key(21), seed), 4)
    data = truth().sample(row_key, (NUM_ROWS,))
    net = potentials.MLP(2, key=net_key, width=128, depth=3, zero_init=True)
    options: dict[str, Any] = {"num_updates": num_updates, "batch_size": BATCH_SIZE, "report_every": 500}
    options["optimizer"] = optimizer(2e-3, num_updates)
    try:
        if method.startswith("flow"):
            flow = flows.RealNVP(2, key=pair_key, num_layers=8, width=64, depth=2, base=BASE)
            state, _ = recipes.adaptive_flow(
                key, data, network=net, base=BASE, flow=flow, num_proposals=64, step_size=STEP_SIZE,
                flow_optimizer=optimizer(2e-3, num_updates), **options,
            )  # fmt: skip
            return state, False
        local = {"Langevin": kernels.langevin, "MALA": kernels.mala}[method.split(", ")[1]]
        network = eqx.nn.MLP(2, 2, 128, 3, activation=jax.nn.silu, key=pair_key)
        state, _ = recipes.dual_mcmc_teaching(
            key, data, model=recipes.gaussian_generator(network, 2, SCALE), potential=potentials.tilt(net, BASE),
            event_kernel=local(STEP_SIZE), num_event_steps=EVENT_STEPS, latent_kernel=kernels.langevin(1e-3),
            energy_weight=0.0, generator_optimizer=optimizer(2e-3, num_updates),
            inference_optimizer=optimizer(2e-3, num_updates), **options,
        )  # fmt: skip
    except ebm.TrainingFailure as failure:
        return failure.state, True
    return state, False


def judge(method: str, seed: int, num_updates: int = NUM_UPDATES) -> tuple[dict[str, Any], ebm.TrainState]:
    """The numbers of the table."""
    start = time.perf_counter()
    state, failed = train(method, seed, num_updates)
    seconds = time.perf_counter() - start
    keys = jax.random.split(jax.random.fold_in(jax.random.key(22), seed), 3)
    test = truth().sample(keys[0], (4096,))
    site = ebm.EBM(state.potential.potential, BASE)
    excess = normalizer.compare_log_likelihoods(truth(), site, test, second_log_normalizer=normalizer.quadrature(site))
    mass = np.asarray(grid_mass(state.potential), np.float64)
    weights = np.bincount(nearest(GRID), weights=mass, minlength=25)
    # The negatives, as the trained sampler gives them.
    sampler, _ = ebm.advance(keys[1], state.potential, state.sampler, 1)
    distance = np.sqrt(((np.asarray(sampler.position)[:, None] - CENTRES) ** 2).sum(-1).min(axis=1))
    found = diagnose(state.potential, sampler, test, keys[2], budget=BUDGET)
    return {
        "failed": failed, "seconds": seconds,
        "excess": float(excess.value), "excess_error": float(excess.standard_error),
        "weights": weights.round(5).tolist(), "max_weight_error": float(np.abs(weights - 0.04).max()),
        "near": float((distance < 3.0 * SCALE).mean()), "modes": len(np.unique(nearest(sampler.position))),
        "sampler": found.sampler, "model": found.model,
        "why": {check.name: str(check) for check in found.checks if check.status in ("warn", "fail")},
    }, state  # fmt: skip


def run() -> dict[str, Any]:
    """The flow alone, with a tenth of its updates."""
    found, _ = judge("flow, i-SIR + MALA", 0, NUM_UPDATES // 10)
    return {k: v for k, v in found.items() if k not in ("weights", "why")}


def run_all(path: Path) -> dict[str, dict[str, Any]]:
    """All of it; what the file at ``path`` has already is not done again. Seed 0 leaves its densities for the figure."""
    done = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(SEEDS):
        for method in METHODS:
            name = f"{method}/{seed}"
            if name in done:
                continue
            done[name], state = judge(method, seed)
            if seed == 0:
                mass = np.asarray(grid_mass(state.potential), np.float64).reshape(301, 301)
                coarse = mass[:300, :300].reshape(100, 3, 100, 3).sum(axis=(1, 3))
                done[name]["density"] = coarse.round(6).tolist()
            print(name, {k: v for k, v in done[name].items() if k not in ("weights", "density")}, flush=True)
            path.write_text(json.dumps(done) + "\n")
    return done


def table(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    columns = ["companion, chains", "nats worse than the truth", "largest error of 25 mode weights"]
    return table_of_seeds([*columns, "negatives within 3 sd"], done, METHODS, SEEDS, _cells)


def _cells(runs: Runs) -> list[str]:
    return [
        " / ".join(f"{one['excess']:.3f} ± {one['excess_error']:.3f}" for one in runs),
        " / ".join(f"{one['max_weight_error']:.3f}" for one in runs),
        " / ".join(f"{one['near']:.0%}" for one in runs),
    ]


def figure(done: dict[str, dict[str, Any]]) -> Any:
    """Densities of the first seed beside the true one."""
    panels = {"truth": np.asarray(jnp.exp(truth().log_prob(GRID))).reshape(301, 301)[:300, :300]}
    panels["truth"] = panels["truth"].reshape(100, 3, 100, 3).sum(axis=(1, 3))
    panels |= {m: np.array(done[f"{m}/0"]["density"]) for m in METHODS if f"{m}/0" in done}
    shown, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.5), layout="constrained", sharey=True)
    top = panels["truth"].max() / panels["truth"].sum()
    for axis, (name, density) in zip(axes, panels.items(), strict=True):
        axis.imshow(
            (density / density.sum()).T, origin="lower", extent=(-3, 3, -3, 3), cmap="viridis", vmin=0, vmax=top
        )
        axis.set_title(name, fontsize=10)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    done = run_all(options.folder / "teaching_grid.json")
    (options.folder / "teaching_grid.inc").write_text(table(done))
    images = options.folder.parent / "images"
    images.mkdir(exist_ok=True)
    figure(done).savefig(images / "teaching_grid.png", dpi=110)
    print(table(done))


if __name__ == "__main__":
    main()
