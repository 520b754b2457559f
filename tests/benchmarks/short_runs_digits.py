"""Short runs on digits of 8x8 pixels: a convolutional energy of grey levels, and a restricted Boltzmann machine of bits.

``python -m tests.benchmarks short_runs_digits`` trains the machine for a short while. ``python -m
tests.benchmarks.short_runs_digits docs/tables`` trains both from noise and with persistent chains, forty minutes on one
core, and writes the tables of the documentation and a figure. What is done is kept beside the tables, and a run that was
interrupted goes on where it stopped; ``--only bits`` does a part. The figure goes to the folder ``images`` beside that of
the tables.

Rdm-k are runs of ``k`` steps from noise, PCD-k those of chains that persist.
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
import numpyro.distributions as dist
import optax
from scipy.special import xlogy
from sklearn.datasets import load_digits

import ebm_ppl as ebm
from ebm_ppl import kernels, normalizer, potentials
from ebm_ppl.diagnostics import energy_distance, sampling_times
from ebm_ppl.recipes import short_run
from tests.benchmarks._seeds import markdown, run_seeds
from tests.benchmarks.short_runs import STARTS, at_times, plain

SEEDS = 3
NUM_HELD_OUT = 397


@functools.cache
def grey_levels() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out images with whole grey levels from 0 to 16."""
    images = load_digits().images
    order = np.random.default_rng(0).permutation(len(images))
    return images[order[NUM_HELD_OUT:]], images[order[:NUM_HELD_OUT]]


def judge(case: str, seed: int) -> dict[str, Any]:
    """One run and its figures."""
    problem, regime = case.split(", ")
    return (judge_images if problem == "images" else judge_bits)(regime.split("-")[0], seed)


# --- grey levels and a convolutional energy

K, STEP_SIZE, NOISE = 20, 0.01, 0.1
NUM_CHAINS, NUM_UPDATES, NUM_DRAWS = 128, 1200, 400
TIMES = (10, 15, 20, 30, 40, 100, 1000, 10_000)
BASE = dist.Normal(0.0, 1.0).expand([8, 8]).to_event(2)
UNIFORM = dist.Uniform(-1.0, 1.0).expand([8, 8]).to_event(2)


@functools.cache
def images() -> tuple[jax.Array, jax.Array]:
    """Training and held-out images in [-1, 1] with pixel noise, ten copies of every training image."""
    rng = np.random.default_rng(1)
    train, held_out = (rows / 8.0 - 1.0 for rows in grey_levels())
    noisy = (rows + NOISE * rng.normal(size=rows.shape) for rows in (np.tile(train, (10, 1, 1)), held_out))
    train, held_out = (jnp.asarray(rows, jnp.float32) for rows in noisy)
    return train, held_out


def image_run() -> Any:
    """Runs of the steps of training."""
    return kernels.short_run(K, UNIFORM, step_size=STEP_SIZE)


def train_images(regime: str, seed: int, num_updates: int = NUM_UPDATES) -> ebm.TrainState:
    """One run."""
    net_key, key = jax.random.split(jax.random.fold_in(jax.random.key(41), seed))
    return short_run(
        key,
        images()[0],
        num_updates=num_updates,
        num_steps=K,
        start=STARTS[regime],
        init=UNIFORM,
        step_size=STEP_SIZE,
        network=potentials.Conv((8, 8), key=net_key, channels=(24, 32), width=64),
        base=BASE,
        batch_size=NUM_CHAINS,
        progress_bar=False,
    )[0]


def judge_images(
    regime: str, seed: int, num_updates: int = NUM_UPDATES, times: tuple[int, ...] = TIMES
) -> dict[str, Any]:
    """Draws from noise against the number of steps, by held-out images."""
    begin = time.perf_counter()
    state = train_images(regime, seed, num_updates)
    seconds = time.perf_counter() - begin
    train, held_out = images()
    key = jax.random.fold_in(jax.random.key(42), seed)
    found = sampling_times(key, plain(state), held_out, kernel=image_run(), times=times, num_draws=NUM_DRAWS)
    return {"seconds": seconds, **at_times(found), "floor": energy_distance(train[:1400], held_out).value}


# --- bits and a restricted Boltzmann machine

NUM_HIDDEN, SWEEPS = 20, 10
"""With twenty hidden units log Z is a sum over their states."""
BIT_UPDATES, BIT_CHAINS, BIT_DRAWS, RATE = 5000, 200, 2000, 0.2
BIT_TIMES = (1, 2, 5, 10, 20, 50, 100, 1000)


@functools.cache
def bits() -> tuple[jax.Array, jax.Array]:
    """Training and held-out images as dark and bright pixels."""
    train, held_out = (jnp.asarray(rows.reshape(-1, 64) >= 8, jnp.int8) for rows in grey_levels())
    return train, held_out


def fair_bits(key: Any, num_chains: int) -> jax.Array:
    return jax.random.bernoulli(key, 0.5, (num_chains, 64)).astype(jnp.int8)


def bit_run() -> Any:
    """Runs of the sweeps of training: hidden given visible units, and back."""
    return kernels.short_run(SWEEPS, fair_bits, kernel=kernels.gibbs("block"))


def train_bits(regime: str, seed: int, num_updates: int = BIT_UPDATES) -> ebm.TrainState:
    """Plain gradient descent from the frequencies of single pixels."""
    net_key, key = jax.random.split(jax.random.fold_in(jax.random.key(43), seed))
    rows = bits()[0]
    start = potentials.RBM.random(64, NUM_HIDDEN, key=net_key)
    frequencies = np.asarray(rows, np.float64).mean(axis=0).clip(0.01, 0.99)
    machine = potentials.RBM(start.weights, np.log(frequencies / (1.0 - frequencies)), start.hidden_bias)
    return short_run(
        key,
        rows,
        num_updates=num_updates,
        num_steps=SWEEPS,
        start=STARTS[regime],
        init=fair_bits,
        kernel=kernels.gibbs("block"),
        network=machine,
        batch_size=BIT_CHAINS,
        optimizer=optax.sgd(optax.cosine_decay_schedule(RATE, num_updates, 0.02)),
        progress_bar=False,
    )[0]


def judge_bits(
    regime: str, seed: int, num_updates: int = BIT_UPDATES, times: tuple[int, ...] = BIT_TIMES
) -> dict[str, Any]:
    """Draws from fair bits against the number of sweeps, and the log-likelihood of held-out rows."""
    begin = time.perf_counter()
    machine = plain(train_bits(regime, seed, num_updates))
    seconds = time.perf_counter() - begin
    train, held_out = bits()
    key = jax.random.fold_in(jax.random.key(44), seed)
    found = sampling_times(key, machine, held_out, kernel=bit_run(), times=times, num_draws=BIT_DRAWS)
    # What is left of the joint energy when the visible units are summed out is a machine with the layers exchanged.
    exchanged = potentials.RBM(machine.weights.T, machine.hidden_bias, machine.visible_bias)
    log_z = normalizer.enumerate_states(ebm.EBM(exchanged, counting(NUM_HIDDEN)))
    likelihood = normalizer.log_likelihood(ebm.EBM(machine, counting(64)), held_out, log_z)
    return {
        "seconds": seconds,
        **at_times(found, ".hidden_bias"),
        "floor": energy_distance(train, held_out).value,
        "log_z": float(log_z.value),
        "log_likelihood": float(likelihood.value),
        "log_likelihood_error": float(likelihood.standard_error),
        "log_likelihood_train": float(normalizer.log_likelihood(ebm.EBM(machine, counting(64)), train, log_z).value),
        "independent": independent_pixels(),
        "largest_weight": float(jnp.abs(machine.weights).max()),
    }


def counting(num_units: int) -> dist.Distribution:
    """Every state counts alike."""
    return dist.ImproperUniform(dist.constraints.boolean, (), (num_units,))


def independent_pixels() -> float:
    """Log-likelihood of held-out rows under the frequencies of single pixels."""
    train, held_out = (np.asarray(rows, np.float64) for rows in bits())
    p = (train.sum(axis=0) + 1.0) / (len(train) + 2.0)
    return float((xlogy(held_out, p) + xlogy(1.0 - held_out, 1.0 - p)).sum(axis=1).mean())


# --- all of it

CASES: dict[str, int] = {
    "bits, Rdm-10": SEEDS,
    "bits, PCD-10": SEEDS,
    "images, Rdm-20": SEEDS,
    "images, PCD-20": SEEDS,
}
"""Problem and regime, and how many seeds."""


def run() -> dict[str, Any]:
    """The machine with a tenth of its updates."""
    found = judge_bits("Rdm", 0, BIT_UPDATES // 10, (1, 2, 5, 10, 20, 100))
    names = ("times", "ed", "mismatch", "best_time", "says", "log_likelihood", "log_likelihood_error", "independent")
    return {
        **{name: found[name] for name in names},
        "goal": "draws after as many sweeps as in training are nearer to the data than after half as many",
        "met": found["ed"][found["times"].index(SWEEPS)] < found["ed"][found["times"].index(5)],
    }


def run_all(path: Path, only: str = "") -> dict[str, dict[str, Any]]:
    """All cases, seed by seed; what the file at ``path`` has already is not done again."""
    runs = (
        (f"{case}/{seed}", functools.partial(judge, case, seed))
        for seed in range(SEEDS)
        for case, seeds in CASES.items()
        if seed < seeds and case.startswith(only)
    )
    return run_seeds(path, runs)


def table(done: dict[str, dict[str, Any]]) -> str:
    """Energy distance of images to held-out ones against the number of steps from noise, a column for every seed."""
    return _table_of_times(done, "images", K, "ed")


def _table_of_times(done: dict[str, dict[str, Any]], problem: str, k: int, *names: str) -> str:
    labels = {"ed": "", "mismatch": ", mismatch"}
    cases = [case for case in CASES if case.startswith(problem) and f"{case}/0" in done]
    rows = [["steps", *(case.split(", ")[1] + labels[name] for case in cases for name in names)]]
    if not cases:
        return markdown(rows)
    for at, steps in enumerate(done[f"{cases[0]}/0"]["times"]):
        cells = []
        for case in cases:
            ones = [done[f"{case}/{seed}"] for seed in range(SEEDS) if f"{case}/{seed}" in done]
            cells += [" / ".join(_three(one[name][at]) for one in ones) for name in names]
        rows.append([f"**{steps:,}**" if steps == k else f"{steps:,}", *cells])
    return markdown(rows)


def table_of_bits(done: dict[str, dict[str, Any]]) -> str:
    """The same of bits, with the mismatch of moments."""
    return _table_of_times(done, "bits", SWEEPS, "ed", "mismatch")


def table_of_likelihoods(done: dict[str, dict[str, Any]]) -> str:
    """What the machines are as densities."""
    rows = [["trained by", "held-out nats per row", "training rows", "nearest to the data after", "said of it"]]
    for case in CASES:
        ones = [done[f"{case}/{seed}"] for seed in range(SEEDS) if f"{case}/{seed}" in done]
        if not ones or not case.startswith("bits"):
            continue
        cells = [
            " / ".join(f"{one['log_likelihood']:.2f} ± {one['log_likelihood_error']:.2f}" for one in ones),
            " / ".join(f"{one['log_likelihood_train']:.2f}" for one in ones),
            " / ".join(f"{one['best_time']:,}" for one in ones),
            " / ".join(dict.fromkeys(one["says"] for one in ones)),
        ]
        rows.append([case.split(", ")[1], *cells])
    return markdown(rows)


def _three(value: float) -> str:
    value = round(value, 3) + 0.0  # no negative zero
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3g}"


TABLES = {
    "short_runs_digits": table,
    "short_runs_bits": table_of_bits,
    "short_runs_likelihoods": table_of_likelihoods,
}
"""Names of the files, and what makes their tables."""

SHOWN = (5, 10, 20, 40, 1000)
"""Steps of the rows of the figure."""


def figure(path: Path) -> None:
    """Images after several numbers of steps from noise, of either regime."""
    figure, axes = plt.subplots(len(SHOWN), 2, figsize=(11, 3.4), layout="constrained")
    for column, regime in enumerate(("Rdm", "PCD")):
        state = train_images(regime, 0)
        draws = ebm.draw_short_run(jax.random.key(0), plain(state), 10, times=SHOWN, kernel=image_run())
        for axis, steps, rows in zip(axes[:, column], SHOWN, np.asarray(draws), strict=True):
            padded = np.pad(rows, ((0, 0), (1, 1), (1, 1)), constant_values=-1.0)
            axis.imshow(padded.transpose(1, 0, 2).reshape(10, -1), cmap="gray", vmin=-1.0, vmax=1.0)
            axis.set(xticks=[], yticks=[])
            axis.set_ylabel(f"{steps:,} steps", rotation=0, ha="right", va="center")
        axes[0, column].set_title(f"{regime}-{K}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="cases whose names begin with this")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    done = run_all(options.folder / "short_runs_digits.json", options.only)
    for name, make in TABLES.items():
        (options.folder / f"{name}.inc").write_text(make(done))
        print(make(done))
    if all(f"{case}/{seed}" in done for case, seeds in CASES.items() for seed in range(seeds)):
        figure(options.folder.parent / "images" / "short_runs_digits.png")


if __name__ == "__main__":
    main()
