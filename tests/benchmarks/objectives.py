"""Every objective on the eight standard sets in the plane, in one setting each: log-likelihoods against the best possible.

``python -m tests.benchmarks objectives`` trains a few of them on two sets. ``python -m tests.benchmarks.objectives
docs/tables`` trains all of them on all sets, about an hour on one core, and writes the tables of the documentation.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import tqdm

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials, targets
from ebm_ppl.diffusion import ValueNetwork

NUM_ROWS, NUM_STEPS, BATCH_SIZE, NUM_CHAINS, MCMC_STEPS = 20_000, 1_500, 256, 256, 10
LEARNING_RATE = 1e-2
BASE = dist.Normal(0.0, 3.0).expand([2]).to_event(1)
DRL_SCALE = 2.0  # diffusion recovery wants rows of unit scale


class Setting(NamedTuple):
    """What is trained, and how; ``energy`` reads the potential of the data off the trained one."""

    objective: Any
    potential: Any
    sampler: Any = None
    energy: Callable[[Any], Callable] = lambda potential: potential
    scale: float = 1.0


def network(key: jax.Array) -> Any:
    """The energy that all objectives share: three hidden layers of 64 units, zero at the start."""
    return potentials.MLP(2, key=key, width=64, depth=3)


def tilted(key: jax.Array) -> Any:
    return potentials.tilt(network(key), BASE)


def free(key: jax.Array) -> Any:
    """With a constant that is learned."""
    return potentials.with_log_normalizer(tilted(key), 0.0)


def local() -> Any:
    return kernels.mala(step_size=0.05)


def mixing() -> Any:
    """Local moves, and jumps between modes proposed by the base."""
    return kernels.global_local(kernels.isir(BASE, num_proposals=32), local(), num_local=4)


def chains(key: jax.Array, kernel: Any) -> Any:
    return ebm.init_sampler(BASE.sample(key, (NUM_CHAINS,)), kernel)


def _sampled(name: str, kernel: Callable[[], Any], **options: Any) -> Callable[[jax.Array], Setting]:
    def make(key: jax.Array) -> Setting:
        objective = functools.partial(getattr(objectives, name), **options)
        return Setting(objective, tilted(key), chains(jax.random.fold_in(key, 1), kernel()))

    return make


def _plain(name: str, potential: Callable = tilted, **options: Any) -> Callable[[jax.Array], Setting]:
    def make(key: jax.Array) -> Setting:
        return Setting(objectives.stateless(functools.partial(getattr(objectives, name), **options)), potential(key))

    return make


def _jarzynski(key: jax.Array) -> Setting:
    sampler = objectives.jarzynski_chains(jax.random.fold_in(key, 1), BASE, local(), 2 * NUM_CHAINS)
    objective = functools.partial(objectives.jarzynski_contrastive_divergence, num_steps=MCMC_STEPS)
    return Setting(objective, tilted(key), sampler)


def _telescoping(key: jax.Array) -> Setting:
    bridges = objectives.Bridges(ValueNetwork(2, 3, key=key, width=64, depth=3), 4)
    return Setting(objectives.stateless(objectives.telescoping_ratio), potentials.tilt(bridges, BASE))


def _recovery(key: jax.Array) -> Setting:
    scales = tuple(np.sqrt(np.linspace(0.01, 0.7, 6)))
    potential = objectives.RecoveryPotential(ValueNetwork(2, 5, key=key, width=64, depth=3), scales)
    objective = functools.partial(objectives.diffusion_recovery_likelihood, num_steps=MCMC_STEPS)
    return Setting(objective, potential, chains(key, kernels.mala(step_size=0.3)), scale=DRL_SCALE)


def _matching_then_likelihood(key: jax.Array) -> Setting:
    second = functools.partial(objectives.persistent_contrastive_divergence, num_steps=2)
    objective = functools.partial(
        objectives.energy_matching, noise=BASE, contrastive=second, contrastive_weight=10.0, coupling="independent"
    )
    return Setting(objective, tilted(key), chains(jax.random.fold_in(key, 1), mixing()))


SETTINGS: dict[str, Callable[[jax.Array], Setting]] = {
    "contrastive_divergence, MALA": _sampled("contrastive_divergence", local, num_steps=MCMC_STEPS),
    "persistent_contrastive_divergence, MALA": _sampled(
        "persistent_contrastive_divergence", local, num_steps=MCMC_STEPS
    ),
    "persistent_contrastive_divergence, i-SIR and MALA": _sampled(
        "persistent_contrastive_divergence", mixing, num_steps=2
    ),
    "jarzynski_contrastive_divergence": _jarzynski,
    "coupled_contrastive_divergence": _sampled(
        "coupled_contrastive_divergence", local, num_steps=MCMC_STEPS, num_averaged=MCMC_STEPS, max_steps=40
    ),
    "full_contrastive_divergence": _sampled(
        "full_contrastive_divergence", lambda: kernels.unadjusted_langevin(step_size=0.02), num_steps=MCMC_STEPS
    ),
    "generalized_contrastive_divergence": _sampled(
        "generalized_contrastive_divergence", mixing, num_steps=2, energy_weight=1e-3
    ),
    "importance_sampled_likelihood": _sampled("importance_sampled_likelihood", local, proposal=BASE, num_samples=1024),
    "learned_normalizer_likelihood": _plain("learned_normalizer_likelihood", free, proposal=BASE, num_samples=1024),
    "noise_contrastive_estimation": _plain("noise_contrastive_estimation", free, noise=BASE, noise_ratio=4),
    "telescoping_ratio": _telescoping,
    "diffusion_recovery_likelihood": _recovery,
    "energy_discrepancy": _plain("energy_discrepancy", noise_scale=0.7),
    "score_matching": _plain("score_matching"),
    "sliced_score_matching": _plain("sliced_score_matching", variance_reduced=True),
    "denoising_score_matching": _plain("denoising_score_matching", noise_scale=0.1),
    "multiscale_denoising_score_matching": _plain(
        "multiscale_denoising_score_matching", noise_scales=jnp.array([0.1, 0.3, 1.0, 2.0]), target_scale=0.1
    ),
    "minimum_stein_discrepancy": _plain("minimum_stein_discrepancy"),
    "energy_matching, then likelihood": _matching_then_likelihood,
    "equilibrium_matching": _plain("equilibrium_matching", noise=BASE),
    "potential_flow_matching, without time": _plain("potential_flow_matching", noise=BASE, time_dependent=False),
}
NO_DENSITY = {"equilibrium_matching", "potential_flow_matching, without time", "multiscale_denoising_score_matching"}
NO_WEIGHTS = {"score_matching", "sliced_score_matching", "denoising_score_matching", "minimum_stein_discrepancy"}

EDGE = np.linspace(-8.0, 8.0, 401)


class Score(NamedTuple):
    """Negative log-likelihood in nats per row beyond the best possible, mass left of zero, and seconds of training."""

    excess: float
    left: float
    seconds: float


def train(name: str, set_name: str, seed: int = 0) -> Score:
    """Train one objective on one set and integrate its density."""
    target = targets.get_planar(set_name)
    key = jax.random.fold_in(jax.random.key(seed), sorted(targets.planar_names()).index(set_name))
    data_key, test_key, setting_key, fit_key = jax.random.split(key, 4)
    setting = SETTINGS[name](setting_key)
    rows = target.sample(data_key, NUM_ROWS) / setting.scale
    optimizer = optax.chain(
        optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, NUM_STEPS))
    )
    state = ebm.init_train(setting.potential, optimizer, setting.sampler)
    start = time.perf_counter()
    state, _ = ebm.fit(fit_key, state, rows, setting.objective, optimizer, num_steps=NUM_STEPS, batch_size=BATCH_SIZE)
    seconds = time.perf_counter() - start
    middle = 0.5 * (EDGE[1:] + EDGE[:-1])
    points = np.stack(np.meshgrid(middle, middle, indexing="ij"), axis=-1).reshape(-1, 2)
    test = target.sample(test_key, NUM_ROWS)
    grid_energy = _energies(state.potential, jnp.asarray(points / setting.scale, jnp.float32))
    log_mass = -np.asarray(grid_energy, float) + 2.0 * np.log(EDGE[1] - EDGE[0])
    log_normalizer = np.logaddexp.reduce(log_mass)
    model = np.asarray(_energies(state.potential, test / setting.scale), float).mean() + log_normalizer
    best = np.asarray(_energies(target.potential, test), float).mean()
    left = np.exp(np.logaddexp.reduce(log_mass[points[:, 0] < 0.0]) - log_normalizer)
    return Score(float(model - best), float(left), seconds)


@eqx.filter_jit
def _energies(potential: Any, points: jax.Array) -> jax.Array:
    return jax.lax.map(potential, points, batch_size=4096)


def run() -> dict:
    """Three objectives on two sets."""
    names = ("persistent_contrastive_divergence, i-SIR and MALA", "noise_contrastive_estimation", "score_matching")
    scores = {f"{name} on {place}": train(name, place) for name in names for place in ("two_modes", "moons")}
    return {
        name: {"excess_nll": score.excess, "left": score.left, "seconds": score.seconds}
        for name, score in scores.items()
    }


def _shown(excess: float) -> str:
    """Two decimals; energies that ran away have no better number than a large one."""
    return f"{excess:.2f}" if excess < 100.0 else "> 100"


def tables(scores: dict[str, dict[str, Score]]) -> dict[str, str]:
    """The two tables of the documentation, by file name."""
    places = list(targets.planar_names())
    lines = ["| objective | " + " | ".join(place.replace("_", " ") for place in places) + " |"]
    lines.append("|---" * (len(places) + 1) + "|")
    for name, found in scores.items():
        note = " ‡" if name in NO_DENSITY else " †" if name in NO_WEIGHTS else ""
        lines.append(f"| `{name}`{note} | " + " | ".join(_shown(found[place].excess) for place in places) + " |")
    weights = ["| objective | mass of the left mode (1/3) |", "|---|---|"]
    weights += [f"| `{name}` | {found['two_modes'].left:.3f} |" for name, found in scores.items()]
    return {"planar.inc": "\n".join(lines) + "\n", "mode_weights.inc": "\n".join(weights) + "\n"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="directory of the tables")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="objectives")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = arguments.output / "planar.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    pairs = [(name, place) for name in arguments.only for place in targets.planar_names()]
    for name, place in tqdm.tqdm([pair for pair in pairs if pair[1] not in known.get(pair[0], {})]):
        known.setdefault(name, {})[place] = train(name, place)._asdict()
        record.write_text(json.dumps(known, indent=1) + "\n")
        jax.clear_caches()  # a hundred compiled trainings are more than the machine code of one process may be
    complete = {
        name: {place: Score(**score) for place, score in known[name].items()} for name in SETTINGS if name in known
    }
    for file, text in tables(complete).items():
        (arguments.output / file).write_text(text)
        print(text)


if __name__ == "__main__":
    main()
