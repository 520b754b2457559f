"""Energies trained by short runs from noise, from data and with persistent chains, where the answers are known.

``python -m tests.benchmarks short_runs`` trains a machine of seven spins and a short run of everything else.
``python -m tests.benchmarks.short_runs docs/tables`` trains everything, with three seeds in the plane, a quarter of an hour
on one core, and writes the tables of the documentation and two figures. What is done is kept beside the tables, and a run
that was interrupted goes on where it stopped; ``--only plane`` does a part. The figures go to the folder ``images`` beside
that of the tables.

Rdm-k are runs of ``k`` steps from noise, CD-k from data, and PCD-k those of chains that persist.
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

import ebm_ppl as ebm
from ebm_ppl import kernels, normalizer, plots, potentials
from ebm_ppl.diagnostics import SamplingTimes, diagnose, energy_distance, sampling_times
from ebm_ppl.recipes import short_run
from ebm_ppl.recipes.short_run import From
from ebm_ppl.sampling import chains_at
from ebm_ppl.targets.discrete import all_states
from ebm_ppl.testing import (
    boltzmann_probabilities,
    fit_short_run_machine,
    heat_bath_probabilities,
    pair_statistics,
    short_run_curvature,
    short_run_moments,
    stationary_curvature,
)
from tests.benchmarks._seeds import Runs, markdown, run_seeds, table_of_seeds

SEEDS = 3
STARTS: dict[str, From] = {"Rdm": "noise", "CD": "data", "PCD": "persistent"}


def judge(case: str, seed: int) -> dict[str, Any]:
    """One run and its figures."""
    problem, regime = case.split(", ")
    start, num_steps = STARTS[regime.split("-")[0]], int(regime.split("-")[1])
    if problem == "plane":
        return judge_plane(start, seed)
    return judge_gaussian(start, seed) if problem == "Gaussian" else judge_spins(num_steps, seed)


# --- four Gaussians in the plane

CENTRES = np.array([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0], [0.0, -2.0]])
SCALE, WEIGHTS = 0.3, np.array([0.4, 0.3, 0.2, 0.1])
K, STEP_SIZE = 10, 0.01
NUM_ROWS, BATCH, NUM_UPDATES, NUM_DRAWS = 51_200, 512, 3000, 4000
TIMES = (2, 5, 8, 10, 11, 20, 40, 100, 1000, 10_000)
BASE, NOISE, WIDE_NOISE = (dist.Normal(0.0, scale).expand([2]).to_event(1) for scale in (2.0, 1.0, 2.0))
BUDGET = 400_000
"""Gradients that a diagnosis may spend."""
LIMIT = 8.0
TICKS = np.linspace(-LIMIT, LIMIT, 401)
GRID = np.stack(np.meshgrid(TICKS, TICKS, indexing="ij"), -1).reshape(-1, 2)


def four() -> dist.Distribution:
    """Four Gaussians at the ends of a cross, lighter and lighter on the way around."""
    components = dist.Normal(jnp.asarray(CENTRES, float), SCALE * jnp.ones(())).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(jnp.asarray(WEIGHTS, float)), components)


def run_from(init: Any) -> Any:
    """Runs of the steps of training."""
    return kernels.short_run(K, init, step_size=STEP_SIZE)


def train_plane(start: From, seed: int, num_updates: int = NUM_UPDATES) -> ebm.TrainState:
    """One run."""
    row_key, key = jax.random.split(jax.random.fold_in(jax.random.key(31), seed))
    return short_run(
        key,
        four().sample(row_key, (NUM_ROWS,)),
        num_updates=num_updates,
        num_steps=K,
        start=start,
        init=NOISE,
        step_size=STEP_SIZE,
        base=BASE,
        batch_size=BATCH,
        progress_bar=False,
    )[0]


def judge_plane(
    start: From, seed: int, num_updates: int = NUM_UPDATES, times: tuple[int, ...] = TIMES
) -> dict[str, Any]:
    """Draws from noise against the number of steps, the law of the energy by quadrature, and what a diagnosis says."""
    begin = time.perf_counter()
    state = train_plane(start, seed, num_updates)
    seconds = time.perf_counter() - begin
    energy = plain(state)
    test_key, draw_key, other_key, judge_key = jax.random.split(jax.random.fold_in(jax.random.key(32), seed), 4)
    test = four().sample(test_key, (10_000,))
    found = sampling_times(draw_key, energy, test, kernel=run_from(NOISE), times=times, num_draws=NUM_DRAWS)
    runs = ebm.draw_short_run(draw_key, energy, NUM_DRAWS, times=times, kernel=run_from(NOISE))
    wide = ebm.draw_short_run(other_key, energy, NUM_DRAWS, kernel=run_from(WIDE_NOISE))
    return {
        "seconds": seconds,
        **at_times(found),
        "share_errors": [share_error(shares(draws)) for draws in runs],
        "wide_start": energy_distance(test[:NUM_DRAWS], wide).value,
        **figures_of_negatives(negatives(state, start, other_key), energy, test),
        **at_equilibrium(energy, test),
        **verdicts(state, start, test, judge_key),
    }


def plain(state: ebm.TrainState) -> Any:
    """The energy, without the short run that it may belong to."""
    return getattr(state.potential, "plain", state.potential)


def at_times(found: SamplingTimes, array: str = ".head.weight") -> dict[str, Any]:
    """The numbers of a look at sampling times; the mismatch is that of one array of parameters, the last layer's."""
    mismatch = next(values for name, values in found.mismatch_of.items() if name.endswith(array))
    return {
        "times": found.times.tolist(),
        "ed": found.energy_distance.tolist(),
        "ed_error": found.energy_distance_error.tolist(),
        "mismatch": mismatch.tolist(),
        "gap": found.energy_gap.tolist(),
        "gap_error": found.energy_gap_error.tolist(),
        "lost": found.num_lost.tolist(),
        "best_time": found.best_time,
        "says": found.verdict,
    }


def nearest(events: Any) -> np.ndarray:
    return ((np.asarray(events)[:, None] - CENTRES) ** 2).sum(axis=-1).argmin(axis=1)


def shares(events: Any) -> np.ndarray:
    return np.bincount(nearest(events), minlength=4) / len(events)


def share_error(weights: np.ndarray) -> float:
    """Total variation from the weights of the data."""
    return float(0.5 * np.abs(weights - WEIGHTS).sum())


def negatives(state: ebm.TrainState, start: From, key: Any) -> jax.Array:
    """What the energy was last trained against: runs from noise, runs from data, or persistent chains and where they go."""
    if start == "persistent":
        _, draws = ebm.draw(key, state.potential, state.sampler, -(-NUM_DRAWS // BATCH), num_steps=K)
        return draws.position.reshape(-1, 2)[:NUM_DRAWS]
    init = NOISE if start == "noise" else four()
    return ebm.draw_short_run(key, plain(state), NUM_DRAWS, kernel=run_from(init))


def figures_of_negatives(draws: jax.Array, energy: Any, test: jax.Array) -> dict[str, float]:
    """How far negatives are from data."""
    energies = [np.asarray(jax.vmap(energy)(rows), np.float64).mean() for rows in (test, draws)]
    return {
        "negatives_ed": energy_distance(test[:NUM_DRAWS], draws).value,
        "negatives_gap": float(energies[0] - energies[1]),
        "negatives_share_error": share_error(shares(draws)),
    }


def at_equilibrium(energy: Any, test: jax.Array) -> dict[str, Any]:
    """The law of the energy: mode weights and divergence on a grid, log-likelihood of held-out rows."""
    log_model = -np.asarray(jax.jit(jax.vmap(energy))(jnp.asarray(GRID, jnp.float32)), np.float64)
    log_model -= np.logaddexp.reduce(log_model)
    log_truth = np.asarray(four().log_prob(jnp.asarray(GRID, jnp.float32)), np.float64)
    log_truth -= np.logaddexp.reduce(log_truth)
    weights = np.bincount(nearest(GRID), weights=np.exp(log_model), minlength=4)
    site = ebm.EBM(energy.potential, BASE)
    log_z = normalizer.quadrature(site)
    likelihood = normalizer.log_likelihood(site, test, log_z)
    excess = normalizer.compare_log_likelihoods(four(), site, test, second_log_normalizer=log_z)
    return {
        "shares": weights.tolist(),
        "share_error": share_error(weights),
        "kl": float(np.sum(np.exp(log_truth) * (log_truth - log_model))),
        "log_likelihood": float(likelihood.value),
        "log_likelihood_error": float(likelihood.standard_error),
        "reliable": bool(likelihood.reliable),
        "excess": float(excess.value),
        "excess_error": float(excess.standard_error),
    }


def verdicts(state: ebm.TrainState, start: From, test: jax.Array, key: Any) -> dict[str, str]:
    """What a diagnosis says of the chains at the end of a phase of training, and of the energy as a density.

    Runs from noise are judged as the kernel of Langevin steps that makes them, and as the kernel of whole runs.
    """
    energy, rows = plain(state), test[:4096]
    options: dict[str, Any] = {"budget": BUDGET, "persistent": start == "persistent"}
    langevin = kernels.langevin(STEP_SIZE)
    sampler = state.sampler
    if start == "data":
        chains = chains_at(test[-BATCH:], langevin)
        sampler, _ = ebm.advance(key, energy, chains, K)
    elif start == "noise":
        sampler = chains_at(state.sampler.position, langevin)
    found = diagnose(energy, sampler, rows, key, num_steps=K, **options)
    told = {"sampler": found.sampler, "model": found.model}
    if start == "noise":
        found = diagnose(energy, state.sampler, rows, key, num_steps=1, **options)
        told |= {"sampler_of_runs": found.sampler, "model_by_runs": found.model}
    return told


# --- a Gaussian energy

VARIANCES = np.array([0.5, 1.0, 2.0, 4.0])
GAUSSIAN_RUN = (0.05, 20, 1.0)
"""Step size, steps and variance of the start."""
GAUSSIAN_TIMES = (1, 5, 10, 15, 19, 20, 21, 25, 40, 100)
GAUSSIAN_CHAINS = 2048
SECOND_HALF = 10
"""Of the second half of training, one state in so many is averaged."""


class Quadratic(eqx.Module):
    """``x' A x / 2``, of which the symmetric part of ``A`` counts."""

    matrix: jax.Array

    def __call__(self, event: jax.Array) -> jax.Array:
        return 0.5 * event @ self.matrix @ event


def basis(seed: int) -> np.ndarray:
    """Principal directions of the data."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4))).Q


def rows_of_covariance(seed: int) -> np.ndarray:
    """Rows whose mean is zero and whose second moments are exactly those of the data."""
    rows = np.random.default_rng(100 + seed).normal(size=(GAUSSIAN_CHAINS, 4))
    orthogonal = np.linalg.qr(rows - rows.mean(axis=0)).Q
    return (np.sqrt(GAUSSIAN_CHAINS) * orthogonal * np.sqrt(VARIANCES)) @ basis(seed).T


def train_gaussian(start: From, seed: int, num_updates: int = NUM_UPDATES) -> tuple[np.ndarray, bool, float]:
    """The average matrix of the second half, whether training warned that the energy has no end, and seconds."""
    step_size, num_steps, variance = GAUSSIAN_RUN
    matrices: list[np.ndarray] = []

    def keep(state: ebm.TrainState) -> dict[str, float]:
        matrix = np.asarray(plain(state).potential.matrix, np.float64)
        matrices.append(0.5 * (matrix + matrix.T))
        return {}

    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        short_run(
            jax.random.fold_in(jax.random.key(33), seed),
            jnp.asarray(rows_of_covariance(seed), jnp.float32),
            num_updates=num_updates,
            num_steps=num_steps,
            start=start,
            init=dist.Normal(0.0, variance**0.5).expand([4]).to_event(1),
            step_size=step_size,
            network=Quadratic(jnp.eye(4)),
            base=dist.ImproperUniform(dist.constraints.real_vector, (), (4,)),
            batch_size=GAUSSIAN_CHAINS,
            optimizer=optax.sgd(lambda count: 0.1 / (1.0 + count / 300.0)),
            evaluate=keep,
            report_every=SECOND_HALF,
            progress_bar=False,
        )
    is_warned = any("falls without end" in str(one.message) for one in caught)
    return np.mean(matrices[len(matrices) // 2 :], axis=0), is_warned, time.perf_counter() - begin


def judge_gaussian(start: From, seed: int, num_updates: int = NUM_UPDATES) -> dict[str, Any]:
    """The trained matrix in the basis of the data beside the closed form, and its runs from noise."""
    step_size, num_steps, variance = GAUSSIAN_RUN
    matrix, is_warned, seconds = train_gaussian(start, seed, num_updates)
    rotated = basis(seed).T @ matrix @ basis(seed)
    if start == "noise":
        exact = [short_run_curvature(c, *GAUSSIAN_RUN) for c in VARIANCES]
    else:
        exact = [stationary_curvature(c, step_size) for c in VARIANCES]
    init = dist.Normal(0.0, variance**0.5).expand([4]).to_event(1)
    draws = ebm.draw_short_run(
        jax.random.fold_in(jax.random.key(34), seed),
        Quadratic(jnp.asarray(matrix, jnp.float32)),
        20_000,
        times=GAUSSIAN_TIMES,
        kernel=kernels.short_run(num_steps, init, step_size=step_size),
    )
    law = lambda t: short_run_moments(matrix, np.zeros(4), step_size, t, np.zeros(4), variance * np.eye(4))
    return {
        "seconds": seconds,
        "curvatures": np.diagonal(rotated).tolist(),
        "exact": [float(a) for a in exact],
        "off_diagonal": float(np.abs(rotated - np.diag(np.diagonal(rotated))).max()),
        "warned": is_warned,
        "times": list(GAUSSIAN_TIMES),
        "kl": [gaussian_kl(np.cov(np.asarray(one, np.float64).T), seed) for one in draws],
        "kl_of_trained": [gaussian_kl(law(t)[1], seed) for t in GAUSSIAN_TIMES],
    }


def gaussian_kl(covariance: np.ndarray, seed: int) -> float:
    """Divergence of a centred normal law from that of the data."""
    ratio = np.linalg.solve(basis(seed) @ np.diag(VARIANCES) @ basis(seed).T, covariance)
    return float(0.5 * (np.trace(ratio) - 4.0 - np.linalg.slogdet(ratio)[1]))


# --- a Boltzmann machine of seven spins

NUM_SPINS, SPIN_CHAINS, SPIN_ROWS = 7, 2000, 8192
SWEEPS = (1, 2, 3, 5, 10)


MACHINE = 2
"""Of machines drawn alike, one that takes more than ten sweeps to forget its start."""


@functools.cache
def machine() -> tuple[np.ndarray, np.ndarray]:
    """Couplings of about .6 on half of the pairs, and small fields."""
    rng = np.random.default_rng(MACHINE)
    upper = np.triu_indices(NUM_SPINS, 1)
    chosen = rng.permutation(len(upper[0]))[: len(upper[0]) // 2]
    couplings = np.zeros((NUM_SPINS, NUM_SPINS))
    couplings[upper[0][chosen], upper[1][chosen]] = 0.6 + 0.1 * rng.normal(size=len(chosen))
    return couplings + couplings.T, 0.1 * rng.normal(size=NUM_SPINS)


@functools.cache
def counts() -> np.ndarray:
    """How often the data have each state: as near to the law of the machine as whole numbers are."""
    expected = SPIN_ROWS * boltzmann_probabilities(*machine())
    found = np.floor(expected).astype(int)
    found[np.argsort(found - expected)[: SPIN_ROWS - found.sum()]] += 1
    return found


def train_spins(num_sweeps: int, seed: int, num_updates: int = NUM_UPDATES) -> ebm.TrainState:
    """Plain gradient descent on couplings and fields, from zero."""
    rows = np.repeat(all_states((-1, 1), (NUM_SPINS,)), counts(), axis=0)
    # A coupling is two weights, each with half of its gradient.
    rate = lambda weight: optax.sgd(optax.cosine_decay_schedule(weight, num_updates, 0.02))
    return short_run(
        jax.random.fold_in(jax.random.key(35), seed),
        jnp.asarray(rows, jnp.int8),
        num_updates=num_updates,
        num_steps=num_sweeps,
        kernel=kernels.gibbs("sequential"),
        network=potentials.BoltzmannMachine(
            np.zeros((NUM_SPINS, NUM_SPINS), np.float32), np.zeros(NUM_SPINS, np.float32), coding="spin"
        ),
        batch_size=SPIN_ROWS,
        num_chains=SPIN_CHAINS,
        optimizer=rate(0.3),
        progress_bar=False,
    )[0]


def judge_spins(num_sweeps: int, seed: int, num_updates: int = NUM_UPDATES) -> dict[str, Any]:
    """Exact statistics of the trained machine after sweeps from fair spins, and those of draws."""
    begin = time.perf_counter()
    state = train_spins(num_sweeps, seed, num_updates)
    seconds = time.perf_counter() - begin
    trained = state.potential.plain
    couplings, biases = (np.asarray(x, np.float64) for x in (trained.couplings, trained.biases))
    couplings = 0.5 * (couplings + couplings.T)
    law = counts() / SPIN_ROWS
    data = pair_statistics(law)
    error = lambda p: max(float(np.abs(a - b).max()) for a, b in zip(data, pair_statistics(p), strict=True))
    after = lambda t: heat_bath_probabilities(couplings, biases, t)
    equilibrium = boltzmann_probabilities(couplings, biases)
    draws = np.asarray(ebm.draw_short_run(jax.random.fold_in(jax.random.key(36), seed), state.potential, SPIN_CHAINS))
    signs = draws.astype(np.float64)
    of_draws = signs.mean(axis=0), signs.T @ signs / SPIN_CHAINS
    exact = fit_short_run_machine(*data, num_sweeps)
    times = sorted({max(num_sweeps - 1, 0), num_sweeps, num_sweeps + 1, 2 * num_sweeps, 10 * num_sweeps})
    return {
        "seconds": seconds,
        "error": error(after(num_sweeps)),
        "error_before": error(after(num_sweeps - 1)),
        "error_twice": error(after(2 * num_sweeps)),
        "error_equilibrium": error(equilibrium),
        "error_of_draws": max(float(np.abs(a - b).max()) for a, b in zip(data, of_draws, strict=True)),
        "times": times,
        "errors": [error(after(t)) for t in times],
        "kl": kl_of_states(law, after(num_sweeps)),
        "kl_equilibrium": kl_of_states(law, equilibrium),
        "from_exact": float(max(np.abs(couplings - exact.couplings).max(), np.abs(biases - exact.biases).max())),
        "exact_error_equilibrium": error(boltzmann_probabilities(exact.couplings, exact.biases)),
        "exact_moment_error": exact.moment_error,
    }


def kl_of_states(law: np.ndarray, other: np.ndarray) -> float:
    return float(np.sum(np.where(law > 0, law * np.log(np.maximum(law, 1e-300) / other), 0.0)))


# --- all of it

CASES: dict[str, int] = {
    **{f"spins, Rdm-{k}": 1 for k in SWEEPS},
    **{f"plane, {name}-10": SEEDS for name in STARTS},
    **{f"Gaussian, {name}-20": SEEDS if name == "Rdm" else 1 for name in STARTS},
}
"""Problem and regime, and how many seeds."""


def run() -> dict[str, Any]:
    """A machine of spins, and a fifth of the updates in the plane."""
    spins = judge_spins(2, 0, 500)
    state = train_plane("noise", 0, NUM_UPDATES // 5)
    test = four().sample(jax.random.key(0), (2000,))
    found = sampling_times(jax.random.key(1), state.potential, test, times=(2, 5, 10, 20, 100), num_draws=2000)
    curve = at_times(found)
    return {
        "spins_error": spins["error"],
        "spins_error_equilibrium": spins["error_equilibrium"],
        **{name: curve[name] for name in ("best_time", "ed", "mismatch", "says")},
        "goal": "statistics of the data after as many steps as in training, and not at equilibrium",
        "met": curve["best_time"] == K
        and spins["error"] <= 4.0 / SPIN_CHAINS**0.5
        and spins["error_equilibrium"] > 2.0 * spins["error"],
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
    """The regimes in the plane: what matches after ten steps from noise, and what at equilibrium."""
    columns = [
        "trained by",
        "ED after 10 steps",
        "mode weights off",
        "ED of its own negatives",
        "at equilibrium: mode weights off",
        "KL",
        "nats per row",
    ]
    cases = {f"plane, {name}-{K}": f"{name}-{K}" for name in STARTS}
    renamed = {name.replace("plane, ", ""): one for name, one in done.items()}
    return table_of_seeds(columns, renamed, cases.values(), SEEDS, _cells_of_regime)


def _cells_of_regime(runs: Runs) -> list[str]:
    at = runs[0]["times"].index(K)
    cells = [
        " / ".join(_decimals(one["ed"][at]) for one in runs),
        " / ".join(_decimals(one["share_errors"][at]) for one in runs),
    ]
    cells += [" / ".join(_decimals(one[name]) for one in runs) for name in ("negatives_ed", "share_error")]
    cells.append(" / ".join(f"{one['kl']:.2f}" for one in runs))
    return [*cells, " / ".join(f"{one['log_likelihood']:.2f} ± {one['log_likelihood_error']:.2f}" for one in runs)]


def table_of_times(done: dict[str, dict[str, Any]]) -> str:
    """Energy distance, mismatch and mode weights against the number of steps from noise, the first seed."""
    rows = [
        ["steps", *(f"{name}-{K}: {what}" for name in ("Rdm", "PCD") for what in ("ED", "mismatch", "weights off"))]
    ]
    ones = [done[f"plane, {name}-{K}/0"] for name in ("Rdm", "PCD") if f"plane, {name}-{K}/0" in done]
    for at, steps in enumerate(ones[0]["times"]) if len(ones) == 2 else ():
        cells = [_decimals(one[name][at]) for one in ones for name in ("ed", "mismatch", "share_errors")]
        rows.append([f"**{steps:,}**" if steps == K else f"{steps:,}", *cells])
    return markdown(rows)


def table_of_gaussian(done: dict[str, dict[str, Any]]) -> str:
    """Trained curvatures beside the closed form."""
    rows = [["variance of the data", *(f"{c:g}" for c in VARIANCES), "off the diagonal", "warned"]]
    rows.append(["1 / variance", *(f"{1 / c:.3f}" for c in VARIANCES), "0", ""])
    for name in STARTS:
        ones = [done[f"Gaussian, {name}-20/{seed}"] for seed in range(SEEDS) if f"Gaussian, {name}-20/{seed}" in done]
        if not ones:
            continue
        found = [" / ".join(f"{one['curvatures'][i]:.3f}" for one in ones) for i in range(4)]
        off = " / ".join(f"{one['off_diagonal']:.4f}" for one in ones)
        rows.append([f"{name}-20, closed form", *(f"{a:.3f}" for a in ones[0]["exact"]), "0", ""])
        rows.append([f"{name}-20, trained", *found, off, "yes" if all(one["warned"] for one in ones) else "no"])
    return markdown(rows)


def table_of_spins(done: dict[str, dict[str, Any]]) -> str:
    """Largest error of a first or second moment of the trained machines, exact but for one column."""
    rows = [["k", "after k sweeps", "2,000 draws", "k - 1", "2k", "equilibrium", "KL after k", "KL at equilibrium"]]
    names = ("error", "error_of_draws", "error_before", "error_twice", "error_equilibrium")
    for k in SWEEPS:
        if (one := done.get(f"spins, Rdm-{k}/0")) is not None:
            divergences = (f"{one[name]:.4f}" for name in ("kl", "kl_equilibrium"))
            rows.append([str(k), *(_decimals(one[name]) for name in names), *divergences])
    return markdown(rows)


def _decimals(value: float) -> str:
    value = round(value, 3) + 0.0  # no negative zero
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


TABLES = {
    "short_runs": table,
    "short_runs_times": table_of_times,
    "short_runs_gaussian": table_of_gaussian,
    "short_runs_spins": table_of_spins,
}
"""Names of the files, and what makes their tables."""


def figure(done: dict[str, dict[str, Any]], path: Path) -> None:
    """Energies of the three regimes with draws from noise, and curves against the number of steps."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.6), layout="constrained")
    window = np.abs(TICKS) <= 4.0
    extent = (-4.0, 4.0, -4.0, 4.0)
    for column, (name, start) in enumerate(STARTS.items()):
        energy = plain(train_plane(start, 0))
        draws = ebm.draw_short_run(jax.random.key(0), energy, 500, kernel=run_from(NOISE))
        log_density = -np.asarray(jax.jit(jax.vmap(energy))(jnp.asarray(GRID, jnp.float32)), np.float64)
        image = np.clip(log_density - log_density.max(), -30.0, 0.0).reshape(401, 401)[np.ix_(window, window)].T
        shown = axes[0, column].imshow(image, origin="lower", extent=extent, cmap="viridis", vmin=-30.0, vmax=0.0)
        axes[0, column].plot(*np.asarray(draws).T, ".", markersize=2.0, color="tab:red")
        axes[0, column].set(xlim=extent[:2], ylim=extent[2:], title=f"{name}-{K}")
        axes[0, column].set_aspect("equal")
    axes[0, 0].set_ylabel("500 draws, 10 steps from noise")
    figure.colorbar(shown, ax=axes[0], label="log density of the energy, nats below its maximum")
    for name, colour in zip(STARTS, ("tab:blue", "tab:green", "tab:orange"), strict=True):
        ones = [done[f"plane, {name}-{K}/{seed}"] for seed in range(SEEDS)]
        for seed, one in enumerate(ones):
            options: dict[str, Any] = {"color": colour, "marker": ".", "label": f"{name}-{K}" if seed == 0 else None}
            axes[1, 0].plot(one["times"], np.maximum(one["ed"], 5e-4), **options)
            axes[1, 1].plot(one["times"], one["share_errors"], **options)
            axes[1, 1].plot(3e4, one["share_error"], "*", color=colour, markersize=9.0)
    axes[1, 0].set(xscale="log", yscale="log", xlabel="steps from noise", ylabel="energy distance (.0005 or less)")
    axes[1, 1].set(xscale="log", xlabel="steps from noise; stars: equilibrium", ylabel="error of mode weights")
    for name, colour in zip(STARTS, ("tab:blue", "tab:green", "tab:orange"), strict=True):
        one = done[f"Gaussian, {name}-20/0"]
        axes[1, 2].plot(one["times"], one["kl"], ".", color=colour)
        style = "--" if name == "PCD" else "-"  # on top of CD's, whose energy is the same
        axes[1, 2].plot(one["times"], np.maximum(one["kl_of_trained"], 2e-5), style, color=colour, label=f"{name}-20")
    axes[1, 2].set(xscale="log", yscale="log", xlabel="steps from noise", ylabel="KL from the data, Gaussian energy")
    for axis, k in zip(axes[1], (K, K, GAUSSIAN_RUN[1]), strict=True):
        axis.axvline(k, color="0.4", linewidth=0.8)
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def figure_of_times(path: Path) -> None:
    """The library's own picture of one energy."""
    state = train_plane("noise", 0)
    test = four().sample(jax.random.key(1), (2000,))
    found = sampling_times(jax.random.key(2), state.potential, test, times=TIMES, num_draws=NUM_DRAWS)
    plots.sampling_times(found).savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="cases whose names begin with this")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    done = run_all(options.folder / "short_runs.json", options.only)
    for name, make in TABLES.items():
        (options.folder / f"{name}.inc").write_text(make(done))
        print(make(done))
    if all(f"{case}/{seed}" in done for case, seeds in CASES.items() for seed in range(seeds)):
        images = options.folder.parent / "images"
        figure(done, images / "short_runs.png")
        figure_of_times(images / "short_runs_times.png")


if __name__ == "__main__":
    main()
