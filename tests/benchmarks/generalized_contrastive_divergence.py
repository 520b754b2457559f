"""Energies trained with a diffusion sampler, and by chains of Langevin steps, on eight Gaussians in the plane.

``python -m tests.benchmarks generalized_contrastive_divergence`` trains one seed and times one update of each kind.
``python -m tests.benchmarks.generalized_contrastive_divergence docs/tables`` trains everything with three seeds, an hour
on one core, and writes the table of the documentation and a figure. What is done is kept beside the table, and a run that
was interrupted goes on where it stopped; ``--only equal`` does a part. The figure goes to the folder ``images`` beside that
of the tables.
"""

import argparse
import functools
import time
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import optax
from sklearn.metrics import roc_auc_score

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials
from ebm_ppl.diagnostics import diagnose
from ebm_ppl.diffusion import DiffusionSampler
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.recipes import generalized_contrastive_divergence, sampler_of
from tests.benchmarks._seeds import Runs, run_seeds, table_of_seeds

SEEDS, NUM_UPDATES, NUM_ROWS, BATCH = 3, 4000, 50_000, 256
TEMPERATURE, NUM_STEPS = 0.1, 5
BUDGET = 400_000
"""Gradients that a diagnosis may spend."""
CENTRES = 4.0 / np.sqrt(2.0) * np.stack([np.cos(np.arange(8) * np.pi / 4), np.sin(np.arange(8) * np.pi / 4)], axis=1)
SCALE = 0.5 / np.sqrt(2.0)
WEIGHTS = {"equal": np.full(8, 1 / 8), "1 : ... : 8": np.arange(1.0, 9.0) / 36.0}
LIMIT = 4.0
TICKS = np.linspace(-LIMIT, LIMIT, 201)
GRID = np.stack(np.meshgrid(TICKS, TICKS, indexing="ij"), -1).reshape(-1, 2)

Trained = tuple[ebm.TrainState, dict[str, np.ndarray], bool]


def eight(weights: str) -> dist.Distribution:
    """Eight Gaussians on a circle."""
    components = dist.Normal(jnp.asarray(CENTRES, float), SCALE).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(jnp.asarray(WEIGHTS[weights], float)), components)


JOINT: dict[str, dict[str, Any]] = {
    "joint": {},
    "joint, no pretraining": {"num_pretraining": 0},
    "joint, random-walk noising": {"walk": True},
    "joint, REINFORCE": {"gradient": "reinforce"},
    "joint, tau = 0": {"temperature": 1.0, "entropy_weight": 0.0, "velocity_weight": 0.0},
    "joint, tau = 1": {"temperature": 1.0},
}
"""What each method changes: arguments of the recipe. Without entropy the energies are those of temperature one."""
CASES: dict[str, tuple[str, str, int]] = {
    **{f"equal, {name}": ("equal", name, 1 if "REINFORCE" in name else SEEDS) for name in JOINT},
    **{f"1 : ... : 8, {name}": ("1 : ... : 8", name, SEEDS) for name in ("joint", "PCD-ULA")},
}


def rows(weights: str, seed: int) -> jax.Array:
    return eight(weights).sample(jax.random.fold_in(jax.random.key(1), seed), (NUM_ROWS,))


def train(weights: str, method: str, seed: int, num_updates: int = NUM_UPDATES, **options: Any) -> Trained:
    """One run; whether it became non-finite."""
    data, key = rows(weights, seed), jax.random.fold_in(jax.random.key(2), seed)
    options = {"batch_size": BATCH, "report_every": 500, "progress_bar": False, **options}
    try:
        if method == "PCD-ULA":
            return *_by_chains(key, data, num_updates, **options), False
        changes = dict(JOINT[method])
        if changes.pop("walk", False):
            changes["sampler"] = random_walk(jax.random.fold_in(key, 1), float(data.std(axis=0).max()))
            changes["num_pretraining"] = 2000
        changes.setdefault("temperature", TEMPERATURE)
        return *generalized_contrastive_divergence(key, data, num_updates=num_updates, **changes, **options), False
    except TrainingFailure as failure:
        return failure.state, failure.history, True


def random_walk(key: Any, scale: float) -> DiffusionSampler:
    """The noising of the paper, which does not contract."""
    sampler = DiffusionSampler(2, num_steps=NUM_STEPS, key=key, width=128, depth=3, scale=scale)
    return eqx.tree_at(lambda s: s.backward.retention, sampler, jnp.ones(NUM_STEPS))


def _by_chains(key: Any, data: Any, num_updates: int, **options: Any) -> tuple[ebm.TrainState, dict[str, np.ndarray]]:
    """The same energy, base, penalty and optimizer, and persistent chains of Langevin steps.

    Ten steps per update: a joint update evaluates energy and values, networks of one size, ten times per negative.
    """
    net_key, bank_key, fit_key = jax.random.split(key, 3)
    base = dist.Normal(data.mean(axis=0), data.std(axis=0).max()).to_event(1)
    network = potentials.MLP(2, key=net_key, width=128, depth=3, zero_init=True)
    potential = potentials.tilt(potentials.temper(network, 1.0 / TEMPERATURE), base)
    sampler = ebm.init_sampler(base.sample(bank_key, (BATCH,)), kernels.unadjusted_langevin(0.02))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-3, num_updates)))
    objective = functools.partial(
        objectives.generalized_contrastive_divergence, num_steps=2 * NUM_STEPS, energy_weight=TEMPERATURE
    )
    state = ebm.init_train(potential, optimizer, sampler)
    return ebm.fit(fit_key, state, data, objective, optimizer, num_steps=num_updates, **options)


def judge(
    weights: str, method: str, seed: int, num_updates: int = NUM_UPDATES, *, with_diagnosis: bool = True
) -> dict[str, Any]:
    """One run and its figures."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the collapse that some of these are there to show
        state, history, failed = train(weights, method, seed, num_updates)
    seconds = time.perf_counter() - start
    draw_key, test_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(3), seed), 3)
    test = np.asarray(eight(weights).sample(test_key, (10_000,)))
    draws = sampler_draws(state, draw_key)
    noise = np.asarray(jax.random.uniform(noise_key, test.shape, minval=-LIMIT, maxval=LIMIT))
    found = {
        "non_finite": failed, "seconds": seconds,
        "sw": sliced_distance(draws, test), "shares": mode_shares(draws).tolist(),
        **energy_figures(state.potential, weights, test, noise),
    }  # fmt: skip
    found["min_share"] = min(found["shares"])
    for name, whose in (("share_error", "shares"), ("energy_share_error", "energy_shares")):
        found[name] = float(np.abs(np.array(found[whose]) - WEIGHTS[weights]).max())
    if method != "PCD-ULA":
        last = slice(-num_updates // 20, None)
        found["weight_ess"] = float(np.mean(history["sampler_weight_ess"][last]))
        found["step_scale"] = sampler_of(state).step_scale.tolist()
    return found | (verdicts(state, test, draw_key) if with_diagnosis and not failed else {})


def verdicts(state: ebm.TrainState, test: np.ndarray, key: Any) -> dict[str, str]:
    """What a diagnosis says: of the diffusion with its accept step, and of the chains as they were trained."""
    sampler, steps = state.sampler, 2 * NUM_STEPS
    if "sampler" in sampler.kernel.keywords:
        kernel = kernels.diffusion(sampler_of(state), correction="metropolis")
        sampler, steps = ebm.init_sampler(sampler_of(state).sample(key, BATCH), kernel), 1
    wide = dist.Normal(jnp.zeros(2), 4.0).to_event(1)
    found = diagnose(state.potential, sampler, test[:4096], key, budget=BUDGET, num_steps=steps, reference=wide)
    return {"sampler": found.sampler, "model": found.model}


def sampler_draws(state: ebm.TrainState, key: Any) -> np.ndarray:
    """10,000 draws of the sampler: of the diffusion, or the chains as they are and forty phases on."""
    if hasattr(state.sampler.kernel, "keywords") and "sampler" in state.sampler.kernel.keywords:
        return np.asarray(sampler_of(state).sample(key, 10_000))
    _, draws = ebm.draw(key, state.potential, state.sampler, 40, num_steps=2 * NUM_STEPS)
    return np.asarray(draws.position).reshape(-1, 2)[:10_000]


def sliced_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Sliced Wasserstein distance of order two, 1,000 projections; NaN where draws are no numbers."""
    if not np.isfinite(first).all():
        return float("nan")
    angles = np.random.default_rng(0).uniform(0.0, np.pi, 1000)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.sqrt(np.mean((np.sort(first @ directions, axis=0) - np.sort(second @ directions, axis=0)) ** 2)))


def nearest(events: np.ndarray) -> np.ndarray:
    return ((events[:, None] - CENTRES) ** 2).sum(axis=-1).argmin(axis=1)


def mode_shares(events: np.ndarray) -> np.ndarray:
    return np.bincount(nearest(events), minlength=8) / len(events)


def energy_figures(potential: Any, weights: str, test: np.ndarray, noise: np.ndarray) -> dict[str, Any]:
    """What the energy knows: AUC of data against uniform noise, mode weights and divergence on a grid."""
    energy = jax.jit(jax.vmap(potential))
    truth = eight(weights)
    labels = np.r_[np.ones(len(test)), np.zeros(len(noise))]
    both = jnp.asarray(np.concatenate([test, noise]), jnp.float32)
    log_model = -np.asarray(energy(jnp.asarray(GRID, jnp.float32)), np.float64)
    scores = -np.asarray(energy(both), np.float64)
    log_model -= np.logaddexp.reduce(log_model)
    log_truth = np.asarray(truth.log_prob(jnp.asarray(GRID, jnp.float32)), np.float64)
    log_truth -= np.logaddexp.reduce(log_truth)
    of_modes = np.bincount(nearest(GRID), weights=np.exp(log_model), minlength=8)
    return {
        "auc": float(roc_auc_score(labels, scores)) if np.isfinite(scores).all() else float("nan"),
        "ideal_auc": float(roc_auc_score(labels, np.asarray(truth.log_prob(both)))),
        "kl": float(np.sum(np.exp(log_truth) * (log_truth - log_model))),
        "energy_shares": of_modes.tolist(),
    }


def milliseconds(method: str, num_updates: int = 200, repeats: int = 6) -> float:
    """Of one update: the median over chunks of a run, without the first, which compiles."""
    stamps: list[float] = []

    def stamp(_: Any) -> dict[str, float]:
        stamps.append(time.perf_counter())
        return {}

    options = {} if method == "PCD-ULA" else {"num_pretraining": 0}
    train("equal", method, 0, num_updates * (repeats + 1), report_every=num_updates, evaluate=stamp, **options)
    return float(np.median(np.diff(stamps))) / num_updates * 1e3


def run() -> dict[str, Any]:
    """One seed, and what an update costs beside one of persistent contrastive divergence with ten steps."""
    found = judge("equal", "joint", 0, with_diagnosis=False)
    joint, chains = milliseconds("joint"), milliseconds("PCD-ULA")
    names = ("sw", "auc", "ideal_auc", "kl", "min_share", "weight_ess", "seconds")
    return {
        **{name: found[name] for name in names},
        "joint_ms_per_update": joint,
        "pcd_10_ms_per_update": chains,
        "ratio": joint / chains,
        "goal": "SW <= .20, AUC within .02 of the ideal, every mode share >= .08, KL <= .25",
        "met": found["sw"] <= 0.2
        and found["auc"] >= found["ideal_auc"] - 0.02
        and found["min_share"] >= 0.08
        and found["kl"] <= 0.25,
    }


# --- all of it


def run_all(path: Path, only: str = "") -> dict[str, dict[str, Any]]:
    """All cases, seed by seed; what the file at ``path`` has already is not done again."""
    runs = (
        (f"{case}/{seed}", functools.partial(judge, weights, method, seed))
        for seed in range(SEEDS)
        for case, (weights, method, seeds) in CASES.items()
        if seed < seeds and case.startswith(only)
    )
    return run_seeds(path, runs)


def table(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    columns = [
        "weights, method",
        "SW",
        "least share",
        "AUC below ideal",
        "KL",
        "sampler's shares",
        "energy's shares",
        "ESS",
    ]
    return table_of_seeds(columns, done, CASES, SEEDS, _cells)


def _cells(runs: Runs) -> list[str]:
    below = [{"below": one["ideal_auc"] - one["auc"]} for one in runs]
    cells = [_cell(runs, "sw"), _cell(runs, "min_share"), _cell(below, "below")]
    cells += [_cell(runs, name) for name in ("kl", "share_error", "energy_share_error")]
    return [*cells, " / ".join(f"{one['weight_ess']:.0%}" for one in runs) if "weight_ess" in runs[0] else "-"]


def _cell(runs: Runs, name: str) -> str:
    return " / ".join(f"{one[name]:.3f}".removeprefix("0") for one in runs)


def figure(path: Path) -> None:
    """Data, draws and energies of one seed."""
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.2), sharex=True, sharey=True, layout="constrained")
    extent = (-LIMIT, LIMIT, -LIMIT, LIMIT)
    for column, (weights, method) in enumerate(
        [("equal", "joint"), ("equal", "joint, tau = 0"), ("equal", "joint, tau = 1"), ("1 : ... : 8", "joint")]
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            state, _, failed = train(weights, method, 0)
        draws = sampler_draws(state, jax.random.key(0))[:2000]
        log_density = -np.asarray(jax.jit(jax.vmap(state.potential))(jnp.asarray(GRID, jnp.float32)), np.float64)
        image = np.clip(log_density - np.nanmax(log_density), -10.0, 0.0).reshape(201, 201).T
        axes[0, column].plot(*draws.T, ".", markersize=1.5, color="tab:blue")
        axes[1, column].imshow(image, origin="lower", extent=extent, cmap="viridis", vmin=-10.0, vmax=0.0)
        name = method.removeprefix("joint, ") if ", " in method else "tau = 0.1"
        axes[0, column].set_title(f"weights {weights}, {name}" + (" (failed)" if failed else ""), fontsize=10)
        axes[0, column].set_aspect("equal")
    axes[0, 0].set(xlim=extent[:2], ylim=extent[2:], ylabel="2,000 draws of the sampler")
    axes[1, 0].set_ylabel("log density of the energy")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="cases whose names begin with this")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    name = "generalized_contrastive_divergence"
    runs = run_all(arguments.folder / f"{name}.json", arguments.only)
    (arguments.folder / f"{name}.inc").write_text(table(runs))
    print(table(runs))
    figure(arguments.folder.parent / "images" / f"{name}.png")
