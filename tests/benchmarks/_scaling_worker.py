"""One process of the scaling benchmark: ``python -m tests.benchmarks._scaling_worker PORT NUM PROCESS FOLDER``.

Measures on all devices of all processes; the first process writes ``FOLDER/found.json``.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpyro.distributions as dist
import optax
from jax.sharding import NamedSharding, PartitionSpec

DIM, WIDTH, DEPTH, MCMC_STEPS = 64, 256, 2, 10
CHAINS_PER_DEVICE = 128
UPDATES, STEPS, SUMS, REPEATS = 10, 50, 50, 15
SIZES = (256, 4096, 65_536, 1_048_576, 4_194_304)
"""Bytes of the all-reduces."""


def seconds_of(work: Callable[[], Any]) -> float:
    """The least time, as other work on the machine only adds to it; the first and compiling run is left out."""
    work()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def measure(mesh: Any) -> dict[str, Any]:
    import ebm_ppl as ebm  # it makes arrays, and JAX must be initialised first

    num_devices = mesh.size
    base = dist.Normal(0.0, 1.0).expand([DIM]).to_event(1)
    network = ebm.potentials.MLP(DIM, key=jax.random.key(0), width=WIDTH, depth=DEPTH)
    potential = ebm.potentials.tilt(network, base)
    optimizer = optax.adam(1e-4)
    objective = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=MCMC_STEPS)

    def sampler(num_chains: int) -> Any:
        return ebm.init_sampler(base.sample(jax.random.key(1), (num_chains,)), ebm.kernels.mala(step_size=0.05))

    placed = ebm.sharding.shard(sampler(CHAINS_PER_DEVICE * num_devices), mesh)
    automatic: Any = placed.position.sharding.mesh

    def seconds_per_update(num_chains: int) -> float:
        state = ebm.sharding.shard(ebm.init_train(potential, optimizer, sampler(num_chains)), mesh)
        data = ebm.sharding.shard(base.sample(jax.random.key(2), (8 * num_chains,)), mesh)
        options = {"num_steps": UPDATES, "batch_size": num_chains, "progress_bar": False}
        return seconds_of(lambda: ebm.fit(jax.random.key(3), state, data, objective, optimizer, **options)) / UPDATES

    def seconds_per_sum(num_bytes: int) -> float:
        split, whole = (NamedSharding(automatic, spec) for spec in (PartitionSpec("chain"), PartitionSpec()))
        shape = (num_devices, num_bytes // 4)
        x = jax.make_array_from_callback(shape, split, lambda index: np.ones(shape, np.float32)[index])

        @jax.jit
        def sums(x: Any) -> Any:
            def body(_: Any, x: Any) -> Any:
                total = jax.lax.with_sharding_constraint(x.sum(axis=0), whole)
                return jax.lax.with_sharding_constraint(x + total[None] / num_devices, split)

            return jax.lax.fori_loop(0, SUMS, body, x)

        return seconds_of(lambda: sums(x).block_until_ready()) / SUMS

    def advance() -> None:
        moved, _ = ebm.advance(jax.random.key(4), potential, placed, STEPS)
        moved.position.block_until_ready()

    return {
        "devices": num_devices,
        "parameters": int(sum(x.size for x in jax.tree.leaves(network) if isinstance(x, jax.Array))),
        "chain_step": seconds_of(advance) / STEPS / CHAINS_PER_DEVICE,
        "update_weak": seconds_per_update(CHAINS_PER_DEVICE * num_devices),
        "update_strong": seconds_per_update(2 * CHAINS_PER_DEVICE),
        "all_reduce": {str(size): seconds_per_sum(size) for size in SIZES} if num_devices > 1 else {},
    }


def main(port: str, num_processes: str, process: str, folder: str) -> None:
    if int(num_processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(num_processes), int(process))
    found = measure(jax.make_mesh((jax.device_count(),), ("chain",)))
    if process == "0":
        Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
