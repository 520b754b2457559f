"""The same work on any mesh: what it gives must not depend on how many devices or processes share it."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

import ebm_ppl as ebm

BASE = dist.Normal(0.0, 2.0).expand([2]).to_event(1)
NUM_CHAINS, NUM_ROWS, NUM_UPDATES = 64, 256, 50
OPTIMIZER = optax.adam(1e-2)
OBJECTIVE = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=3)


def mesh_of(num_devices: int) -> Any:
    """A mesh of the first devices; ``None`` stands for none at all."""
    if not num_devices:
        return None
    return jax.make_mesh((num_devices,), ("chain",), devices=jax.devices()[:num_devices])


def shard(tree: Any, mesh: Any) -> Any:
    return tree if mesh is None else ebm.sharding.shard(tree, mesh)


def replicate(tree: Any, mesh: Any) -> Any:
    return tree if mesh is None else ebm.sharding.replicate(tree, mesh)


def network() -> Any:
    """An energy that is no constant before training."""
    net = ebm.potentials.MLP(2, key=jax.random.key(0), width=16, depth=1)
    return jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape) if x.ndim else x, net)


def sampler() -> Any:
    return ebm.init_sampler(BASE.sample(jax.random.key(1), (NUM_CHAINS,)), ebm.kernels.mala(step_size=0.3))


def rows() -> Any:
    noise = 0.3 * jax.random.normal(jax.random.key(2), (NUM_ROWS, 2))
    return noise + jnp.where(jnp.arange(NUM_ROWS)[:, None] % 4 == 0, -1.0, 1.0)


def state() -> Any:
    potential = ebm.potentials.tilt(network(), BASE)
    return ebm.init_train(potential, OPTIMIZER, sampler(), average_decay=0.9)


def fit(state: Any, data: Any, num_steps: int = NUM_UPDATES, **options: Any) -> tuple[Any, Any]:
    options = {"num_steps": num_steps, "batch_size": 64, "progress_bar": False, **options}
    return ebm.fit(jax.random.key(3), state, data, OBJECTIVE, OPTIMIZER, **options)


def resume(mesh: Any, folder: Path, pause: float = 0.0) -> dict[str, Any]:
    """Train from the last checkpoint, where there is one; saves every tenth update and pauses so many seconds after it."""
    checkpoints = ebm.checkpoint.Checkpoints(folder, asynchronous=False)
    start = shard(state(), mesh)
    if checkpoints.steps():
        start = checkpoints.restore(like=start)
    first = int(start.step)

    def save(state: Any) -> None:
        checkpoints.save(state)
        time.sleep(pause)

    trained, _ = fit(start, shard(rows(), mesh), NUM_UPDATES - first, report_every=10, save=save)
    return {"state": trained, "first": np.asarray(first)}


def advance(mesh: Any) -> dict[str, Any]:
    potential = ebm.potentials.tilt(network(), BASE)
    moved, info = ebm.advance(jax.random.key(4), potential, shard(sampler(), mesh), 20)
    _, draws = ebm.draw(jax.random.key(5), potential, moved, 10)
    return {"position": moved.position, "acceptance": info.acceptance_rate, "draws": draws.position}


def kernels(mesh: Any) -> dict[str, Any]:
    """Kernels whose chains move on their own, or are drawn anew."""
    mala = ebm.kernels.mala(step_size=0.1)
    several = {
        "nuts": ebm.kernels.nuts(step_size=0.3, max_num_doublings=4),
        "short_run": ebm.kernels.short_run(5, BASE, step_size=0.05),
        "isir": ebm.kernels.isir(BASE, num_proposals=8),
        "antithetic": ebm.kernels.langevin(step_size=0.1, antithetic=True),
        "replica_exchange": ebm.kernels.replica_exchange([1.0, 0.5], inner=mala),
    }
    found = {}
    for name, kernel in several.items():
        chains = shard(ebm.init_sampler(BASE.sample(jax.random.key(1), (NUM_CHAINS,)), kernel), mesh)
        found[name] = ebm.advance(jax.random.key(9), lambda x: 0.5 * jnp.sum(x**2), chains, 3)[0].position
    return found


def train(mesh: Any) -> dict[str, Any]:
    trained, history = fit(shard(state(), mesh), shard(rows(), mesh))
    return {"state": trained, "loss": history["loss"]}


def temper(mesh: Any) -> dict[str, Any]:
    model = replicate(ebm.EBM(network(), BASE), mesh)
    kernel = ebm.kernels.mala(step_size=0.2)
    ladder = jnp.array([0.1, 0.3, 0.6, 1.0])
    found = ebm.normalizer.tempered_smc(jax.random.key(6), model, kernel=kernel, num_particles=512, temperatures=ladder)
    return {"estimate": found}


def temper_many(mesh: Any) -> dict[str, Any]:
    model = replicate(ebm.EBM(network(), BASE), mesh)
    kernel = ebm.kernels.mala(step_size=0.2)
    runs = ebm.normalizer.tempered_particles(jax.random.key(6), model, kernel=kernel, num_particles=512, num_runs=2)
    sampler = ebm.init_sampler(jnp.zeros((512, 2)), ebm.kernels.tempered_smc(inner=kernel, reference=BASE))
    moved, _ = ebm.advance(jax.random.key(8), ebm.potentials.tilt(network(), BASE), shard(sampler, mesh), 1)
    return {"particles": runs, "position": moved.position}


def diagnose(mesh: Any) -> dict[str, Any]:
    potential = replicate(ebm.potentials.tilt(network(), BASE), mesh)
    found = ebm.diagnostics.diagnose(
        potential, shard(sampler(), mesh), shard(rows(), mesh), jax.random.key(7), budget=20_000
    )
    return {
        "values": {check.name: np.asarray(check.value) for check in found.checks},
        "statuses": {check.name: np.asarray(check.status) for check in found.checks},
        "verdicts": np.asarray([found.sampler, found.model]),
    }


SCENARIOS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "advance": advance,
    "kernels": kernels,
    "train": train,
    "temper": temper,
    "temper_many": temper_many,
    "diagnose": diagnose,
}


def on_host(result: Any) -> dict[str, np.ndarray]:
    """What a scenario found as NumPy arrays by path, whole ones on every process; keys are their numbers."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(ebm.sharding.gather(result)):
        if isinstance(leaf, jax.Array):
            leaf = np.asarray(jax.random.key_data(leaf))
        if isinstance(leaf, np.ndarray):
            found[jax.tree_util.keystr(path)] = leaf
    return found


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference of each array, in units of the largest entry; infinite where they cannot be compared."""
    assert one.keys() == other.keys()
    found = {}
    for name, x in one.items():
        y = other[name]
        if x.shape != y.shape or not np.issubdtype(x.dtype, np.inexact):
            found[name] = 0.0 if np.array_equal(x, y) else np.inf
        elif not np.array_equal(np.isfinite(x), np.isfinite(y)):
            found[name] = np.inf
        else:
            finite = np.isfinite(x)
            scale = np.abs(x[finite]).max(initial=1e-30)
            found[name] = float(np.abs(x[finite] - y[finite]).max(initial=0.0) / scale)
    return found
