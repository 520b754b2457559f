"""Digits of 8x8 pixels: a pretrained diffusion sampler of five steps, with and without joint training with an energy.

``python -m tests.benchmarks.generalized_contrastive_divergence_digits docs/tables`` trains with three seeds, twenty minutes
on one core, and writes the table of the documentation and a figure. What is done is kept beside the table.
"""

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

import ebm_ppl as ebm
from ebm_ppl.diffusion import DiffusionSampler, guide, pretrain
from ebm_ppl.recipes import generalized_contrastive_divergence, sampler_of
from tests.benchmarks._seeds import Runs, markdown, run_seeds
from tests.benchmarks.dual_mcmc_teaching import digit_distance, digits

SEEDS, NUM_UPDATES, NUM_PRETRAINING, NUM_STEPS = 3, 2000, 5000, 5
TEMPERATURE = 3e-4
"""One over gamma tau is the range of log densities, in nats, that 64 pixels have to fit into."""
POLICY_RATE = 2e-5

METHODS: dict[str, dict[str, Any]] = {
    "pretrained sampler, energy alone": {
        "policy_optimizer": optax.set_to_zero(), "value_optimizer": optax.set_to_zero(),
        "step_optimizer": optax.set_to_zero(), "velocity_rate": 0.0,
    },
    "joint": {},
}  # fmt: skip


@functools.cache
def centre() -> np.ndarray:
    """The mean of the training rows; samplers start from centred noise."""
    return digits().rows.mean(axis=0)


@functools.cache
def pretrained(seed: int) -> DiffusionSampler:
    """A sampler of five steps, trained on the data by denoising."""
    sampler_key, key = jax.random.split(jax.random.fold_in(jax.random.key(21), seed))
    rows = jnp.asarray(digits().rows - centre())
    scale = float(rows.std(axis=0).max())
    sampler = DiffusionSampler(64, num_steps=NUM_STEPS, key=sampler_key, width=256, depth=3, scale=scale)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, NUM_PRETRAINING))
    return pretrain(key, sampler, rows, optimizer, NUM_PRETRAINING)[0]


def train(method: str, seed: int, num_updates: int = NUM_UPDATES) -> ebm.TrainState:
    """One run from the pretrained sampler of a seed."""

    def adam(rate: float) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, num_updates)))

    options = {"policy_optimizer": adam(POLICY_RATE), "step_optimizer": adam(10.0 * POLICY_RATE), **METHODS[method]}
    return generalized_contrastive_divergence(
        jax.random.fold_in(jax.random.key(22), seed),
        jnp.asarray(digits().rows - centre()),
        sampler=pretrained(seed),
        temperature=TEMPERATURE,
        num_updates=num_updates,
        progress_bar=False,
        **options,
    )[0]


def draws_of(sampler: DiffusionSampler, seed: int) -> np.ndarray:
    """2,000 digits."""
    return np.asarray(sampler.sample(jax.random.fold_in(jax.random.key(23), seed), 2000)) + centre()


def areas(potential: Any) -> dict[str, float]:
    """AUC by the energy of held-out digits against uniform noise, and against their own blurred selves."""
    held_out = digits().held_out
    blurred = gaussian_filter(held_out.reshape(-1, 8, 8), (0.0, 1.0, 1.0)).reshape(-1, 64)
    noise = np.random.default_rng(0).uniform(-1.0, 1.0, held_out.shape)
    energy = jax.jit(jax.vmap(potential))

    def area(others: np.ndarray) -> float:
        both = np.concatenate([held_out, others]) - centre()
        return float(roc_auc_score(np.repeat([1, 0], len(held_out)), -energy(jnp.asarray(both, jnp.float32))))

    return {"auc_noise": area(noise), "auc_blurred": area(blurred)}


def judge(method: str, seed: int, num_updates: int = NUM_UPDATES) -> dict[str, Any]:
    """The numbers of the table."""
    start = time.perf_counter()
    state = train(method, seed, num_updates)
    found = {"seconds": time.perf_counter() - start, "fd": digit_distance(draws_of(sampler_of(state), seed))}
    pair = state.sampler.kernel.keywords["sampler"]
    if method == "joint":
        found["fd_guided"] = digit_distance(draws_of(guide(pair, state.potential, 1e-4), seed))
    return {**found, **areas(state.potential), "step_scale": sampler_of(state).step_scale.tolist()}


def run() -> dict[str, Any]:
    """A short run from the pretrained sampler."""
    before, after = digit_distance(draws_of(pretrained(0), 0)), judge("joint", 0, 500)
    return {"fd_pretrained": before, **after, "goal": "joint training lowers the distance", "met": after["fd"] < before}


def run_all(path: Path) -> dict[str, dict[str, Any]]:
    """All cases, seed by seed; what the file at ``path`` has already is not done again."""
    runs = ((f"{method}/{seed}", functools.partial(judge, method, seed)) for seed in range(SEEDS) for method in METHODS)
    return run_seeds(path, runs)


def table(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    columns = [
        "method",
        "Frechet distance",
        "with value guidance",
        "AUC, digits against noise",
        "against blurred digits",
    ]
    rows = [columns]
    for method in METHODS:
        runs = [done[f"{method}/{seed}"] for seed in range(SEEDS) if f"{method}/{seed}" in done]
        rows.append([method, *(_cell(runs, n) for n in ("fd", "fd_guided", "auc_noise", "auc_blurred"))])
    return markdown(rows)


def _cell(runs: Runs, name: str) -> str:
    return " / ".join(f"{one[name]:.3f}" for one in runs) if name in runs[0] else "-"


def figure(path: Path) -> None:
    """Sixty draws before and after joint training."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained")
    pictures = {
        "training digits": digits().rows[:60],
        "pretrained sampler, 5 steps": draws_of(pretrained(0), 0)[:60],
        "after joint training, 5 steps": draws_of(sampler_of(train("joint", 0)), 0)[:60],
    }
    for axis, (title, rows) in zip(axes, pictures.items(), strict=True):
        canvas = np.pad(rows.reshape(6, 10, 8, 8), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1.0)
        axis.imshow(canvas.transpose(0, 2, 1, 3).reshape(60, 100), cmap="gray", vmin=-1.0, vmax=1.0)
        axis.set_title(title)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    name = "generalized_contrastive_divergence_digits"
    runs = run_all(folder / f"{name}.json")
    (folder / f"{name}.inc").write_text(table(runs))
    print(table(runs))
    figure(folder.parent / "images" / f"{name}.png")
