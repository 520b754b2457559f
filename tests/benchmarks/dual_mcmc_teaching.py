"""Dual-MCMC teaching on 8x8 digits: the comparisons of the paper, and a long chain besides.

``python -m tests.benchmarks.dual_mcmc_teaching docs/tables`` trains every method, judges it and writes the table of the
documentation; about twenty minutes on one core. What is done is kept beside the table, and a run
that was interrupted goes on where it stopped.
"""

import argparse
import functools
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

import ebm_ppl as ebm
from ebm_ppl.demo import load
from ebm_ppl.diagnostics import diagnose
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.normalizer import LogNormalizer
from ebm_ppl.objectives import revise_latents
from ebm_ppl.recipes import dual_mcmc_teaching, gaussian_generator, generator_of
from ebm_ppl.sampling import chains_at
from ebm_ppl.training import TrainState

NOISE, LATENT = 0.05, 16
STEP_SIZE, NOISE_SCALE = 0.125, 0.02
SCALE, LATENT_STEP = 0.1, 5e-4
"""Of the generator's noise, and of steps on latents: about a twentieth of the noise's variance."""
NUM_UPDATES, NUM_DRAWS, NUM_SEEDS = 4000, 2000, 3
EVENT_STEPS, LATENT_STEPS = 30, 30
WEIGHTS = (1.0, 0.1)
"""Of rebuilding the data and of following the energy; chosen, as the steps on latents, with seeds 3 and 4."""
BUDGET = 400_000
"""Gradients that a diagnosis may spend."""
FD = ("fd_initial", "fd_revised")
PIXELS = dist.Normal(0.0, 1.0).expand([64]).to_event(1)

METHODS: dict[str, dict[str, Any]] = {
    "dual": {},
    "cooperative": {"generator_weights": (0.0, 1.0)},
    "noise start": {"noise": PIXELS},
    "no MCMC": {"num_event_steps": 0, "num_latent_steps": 0},
    "q not revised": {"num_latent_steps": 0},
    "k_x = 10": {"num_event_steps": 10},
    "k_z = 10": {"num_latent_steps": 10},
    "weights 1 : 1": {"generator_weights": (1.0, 1.0)},
    "sigma = .3, k_z = 10, weights 1 : 1": {
        "scale": 0.3, "latent_step": 0.005, "num_latent_steps": 10, "generator_weights": (1.0, 1.0),
    },
}  # fmt: skip
"""What each method changes: arguments of the recipe, and the two numbers above."""
THREE_SEEDS = ("dual", "cooperative")
"""Whose numbers are compared with each other; the other methods are far off, or for the table alone."""


class Trained(NamedTuple):
    """A run: its last good state, its history, and the update at which it ended early, if it did."""

    state: TrainState
    history: dict[str, np.ndarray]
    failed: int | None


class Digits(NamedTuple):
    """Training rows with pixel noise, held-out rows, and the features in which distances are measured."""

    rows: np.ndarray
    held_out: np.ndarray
    features: Any


def generator_network(key: jax.Array, *, width: int = 128, latent: int = LATENT) -> eqx.nn.MLP:
    return eqx.nn.MLP(latent, 64, width, 2, activation=jax.nn.silu, final_activation=jnp.tanh, key=key)


@functools.cache
def digits() -> Digits:
    """Ten noisy copies of every training row stand in for fresh noise in every batch.

    Distances are measured in the last hidden layer, of 32 units, of a small classifier that is trained once.
    """
    split = load(0)
    rng = np.random.default_rng(0)
    labels = load_digits(return_X_y=True)[1][rng.permutation(1797)[360:]]  # the rows of the split
    rows, held_out = (
        (rows + NOISE * rng.normal(size=rows.shape)).astype(np.float32)
        for rows in (np.tile(split.train, (10, 1)), split.held_out)
    )
    network = MLPClassifier((64, 32), random_state=0, max_iter=30, tol=0.0, n_iter_no_change=31)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its training is stopped early on purpose
        network.fit(rows[: len(labels)], labels)
    return Digits(rows, held_out, network)


def features(network: MLPClassifier, rows: Any) -> np.ndarray:
    """The activations of its last hidden layer."""
    hidden = np.asarray(rows, np.float64)
    for weight, bias in zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True):
        hidden = np.maximum(hidden @ weight + bias, 0.0)
    return hidden


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of two sets of features: of the normal laws with their means and covariances."""
    a, b = np.cov(first.T), np.cov(second.T)
    root = np.linalg.eigh(a)
    half = root.eigenvectors * np.sqrt(np.maximum(root.eigenvalues, 0.0)) @ root.eigenvectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ b @ half), 0.0)).sum()
    means = np.sum((first.mean(axis=0) - second.mean(axis=0)) ** 2)
    return float(means + np.trace(a) + np.trace(b) - 2.0 * cross)


def digit_distance(rows: Any) -> float:
    """Frechet distance of rows from the training data; infinite where they are no longer numbers."""
    data = digits()
    found = features(data.features, rows)
    return frechet(features(data.features, data.rows), found) if np.isfinite(found).all() else np.inf


def revised(state: TrainState, key: jax.Array, num_steps: int) -> tuple[Any, Any, Any]:
    """``z, x_0, x_k`` of 2,000 chains, of the generator if there is one and from noise else."""
    kernel = state.sampler.kernel
    options = {"step_size": STEP_SIZE, "noise_scale": NOISE_SCALE, "max_gradient": 1.0}
    if "generator" in kernel.keywords:
        pair = generator_of(state)
        kernel = ebm.kernels.generator(pair, latent_shape=pair.latent_shape, num_steps=num_steps, **options)
    else:
        kernel = ebm.kernels.short_run(num_steps, PIXELS, **options)
    sampler, _ = ebm.advance(key, state.potential, chains_at(jnp.zeros((NUM_DRAWS, 64)), kernel), 1)
    start = sampler.auxiliary or {"latent": None, "initial": None}
    return start["latent"], start["initial"], sampler.position


def distances(num_steps: int, state: TrainState) -> dict[str, float]:
    """What is looked at in the course of training."""
    key: Any = state.key
    _, initial, after = revised(state, jax.random.fold_in(key, state.step), num_steps)
    found = {"fd_revised": digit_distance(after)}
    return found if initial is None else {"fd_initial": digit_distance(initial), **found}


def reconstructions(pair: Any, rows: jax.Array, key: jax.Array, latent_step: float) -> dict[str, float]:
    """Mean squared error per pixel of rows rebuilt from latents: draws of ``q``, and chains from them or from noise."""
    kernel = ebm.kernels.langevin(latent_step)
    starts = {
        "q": jax.vmap(pair.sample_posterior)(jax.random.split(key, len(rows)), rows),
        "noise": jax.random.normal(key, (len(rows), *pair.latent_shape)),
    }
    found = {}
    for name, num_steps in (("q", 0), ("q", 10), ("noise", 10), ("noise", 30)):
        latents, _ = revise_latents(key, pair, rows, starts[name], kernel, num_steps)
        found[f"{name}+{num_steps}"] = float(jnp.mean((jax.vmap(pair)(latents) - rows) ** 2))
    return found


def train(method: str, seed: int, *, num_updates: int = NUM_UPDATES, report_every: int = 1000) -> Trained:
    """One run of a method; one that ended early is judged where it ended."""
    options = {
        "num_event_steps": EVENT_STEPS, "num_latent_steps": LATENT_STEPS, "generator_weights": WEIGHTS, **METHODS[method],
    }  # fmt: skip
    scale, latent_step = options.pop("scale", SCALE), options.pop("latent_step", LATENT_STEP)
    key, network_key = jax.random.split(jax.random.fold_in(jax.random.key(7), seed))
    try:
        state, history = dual_mcmc_teaching(
            key,
            jnp.asarray(digits().rows),
            model=gaussian_generator(generator_network(network_key), LATENT, scale),
            latent_kernel=ebm.kernels.langevin(latent_step),
            num_updates=num_updates,
            evaluate=functools.partial(distances, options["num_event_steps"] or EVENT_STEPS),
            report_every=report_every,
            progress_bar=False,
            **options,
        )
    except TrainingFailure as failure:
        return Trained(failure.state, failure.history, failure.step)
    return Trained(state, history, None)


def judge(method: str, seed: int, trained: Trained) -> dict[str, Any]:
    """The numbers of the table."""
    state, history, failed = trained
    num_steps = METHODS[method].get("num_event_steps", EVENT_STEPS) or EVENT_STEPS
    key = jax.random.fold_in(jax.random.key(8), seed)
    _, initial, after = revised(state, key, num_steps)
    temperature = NOISE_SCALE**2 / (2.0 * STEP_SIZE)
    energy = jax.vmap(state.potential)
    # The same drift and noise, with the accept step that makes it exact for exp(-E / T).
    tempered = ebm.potentials.temper(state.potential, 1.0 / temperature)
    chains = chains_at(after[:256], ebm.kernels.mala(NOISE_SCALE**2 / 2.0))
    _, info = ebm.advance(key, tempered, chains, num_steps)
    found = {
        "failed": failed,
        "fd": {name: history[f"evaluation_{name}"].tolist() for name in FD if f"evaluation_{name}" in history},
        "evaluation_step": history["evaluation_step"].tolist(),
        "energy_revised": float(energy(after).mean()),
        "energy_data": float(energy(digits().held_out).mean()),
        "mala_acceptance": float(info.acceptance_rate.mean()),
        "fd_300": digit_distance(revised(state, key, 300)[2]),
    }
    if initial is None:
        return found
    pair = generator_of(state)
    latent_step = METHODS[method].get("latent_step", LATENT_STEP)
    return found | {
        "energy_initial": float(energy(initial).mean()),
        "revision": float(jnp.linalg.norm(after - initial, axis=1).mean()),
        "mse": reconstructions(pair, jnp.asarray(digits().held_out), key, latent_step),
        "mse_train": reconstructions(pair, jnp.asarray(digits().rows[:360]), key, latent_step),
    }


def verdicts(state: TrainState, key: jax.Array) -> dict[str, Any]:
    """What a diagnosis and the log-likelihood say of the energy as a density, at the temperature of its chains."""
    rows, held_out = jnp.asarray(digits().rows), jnp.asarray(digits().held_out)
    wide = dist.Normal(rows.mean(axis=0), rows.std(axis=0).max()).to_event(1)
    temperature = NOISE_SCALE**2 / (2.0 * STEP_SIZE)
    energy = jax.tree_util.Partial(_above, ebm.potentials.temper(state.potential, 1.0 / temperature), wide)
    site = ebm.EBM(energy, wide)
    _, _, after = revised(state, key, EVENT_STEPS)
    sampler = chains_at(after[:64], ebm.kernels.mala(NOISE_SCALE**2 / 2.0))
    found = diagnose(site, sampler, held_out, key, budget=BUDGET, num_steps=EVENT_STEPS)
    forward = found.tree["log_z"].sel(estimator="forward")
    fields = ("value", "standard_error", "ess", "pareto_khat", "num_gradients", "reliable")
    log_z = LogNormalizer(*(jnp.asarray(forward[name].item()) for name in fields))
    value = ebm.normalizer.log_likelihood(site, held_out, log_z)
    return {
        "sampler": found.sampler, "model": found.model, "log_z": repr(log_z), "log_likelihood": float(value.value),
        "error": float(value.standard_error), "reliable": bool(value.reliable), "gradients": found.num_gradients,
        "checks": {check.name: f"{check.status}: {check.why}" for check in found.checks},
    }  # fmt: skip


def _above(potential: Any, base: Any, event: Any) -> Any:
    """What has to be added to the energy of a base to make the potential."""
    return potential(event) + base.log_prob(event)


def run() -> dict[str, Any]:
    """Dual teaching with a tenth of its updates."""
    found = judge("dual", 0, train("dual", 0, num_updates=NUM_UPDATES // 10, report_every=100))
    return {
        **found,
        "goal": "revision brings draws nearer",
        "met": found["fd"]["fd_revised"] < found["fd"]["fd_initial"],
    }


def run_all(methods: Iterable[str], path: Path, states: Path | None = None) -> dict[str, Any]:
    """All methods; what the file at ``path`` has already is not done again, and trained states go to ``states``."""
    done = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(NUM_SEEDS):
        for method in methods:
            name = f"{method}/{seed}"
            if name in done or (seed and method not in THREE_SEEDS):
                continue
            trained = train(method, seed)
            done[name] = judge(method, seed, trained)
            if method == "dual":
                done[name]["as_density"] = verdicts(trained.state, jax.random.fold_in(jax.random.key(9), seed))
            print(name, done[name], flush=True)
            path.write_text(json.dumps(done, indent=1))
            if states is not None:
                eqx.tree_serialise_leaves(states / f"{name.replace('/', '_')}.eqx", trained.state._replace(key=None))
    return done


def table(done: dict[str, Any]) -> str:
    """The table of the documentation: distances are means over the evaluations from 2,000 updates on."""

    def mean(one: dict[str, Any], name: str) -> str:
        values = one["fd"].get(name)
        return "-" if values is None else f"{np.mean(values[-3:]):.2f}"

    lines = [
        "| method / seed | FD(x_0) | FD(x_k) | FD, 300 steps | MSE q | q+10 | noise+10 | noise+30 | size of revision |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(done, key=lambda name: (list(METHODS).index(name.split("/")[0]), name)):
        one = done[name]
        errors = [f"{value:.4f}" for value in one.get("mse", {}).values()] or ["-"] * 4
        size = f"{one['revision']:.2f}" if "revision" in one else "-"
        cells = [name, mean(one, "fd_initial"), mean(one, "fd_revised"), f"{one['fd_300']:.3g}", *errors, size]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--states", type=Path, help="folder for the trained states")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    done = run_all(options.methods, options.folder / "dual_mcmc_teaching.json", options.states)
    (options.folder / "dual_mcmc_teaching.inc").write_text(table(done))
    print(table(done))


if __name__ == "__main__":
    main()
