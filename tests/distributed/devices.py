"""The scenarios on devices of one process: ``python -m tests.distributed.devices FOLDER NUM,NUM,... scenario ...``.

Writes ``FOLDER/NUM.npz`` for each number of devices (0: without a mesh), and what four devices compile and hold.
"""

import json
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import PartitionSpec

import ebm_ppl as ebm
from ebm_ppl import sampling
from ebm_ppl.training.batches import ShuffledRows
from tests.distributed import scenarios


def shards(tree: Any) -> dict[str, list[int]]:
    """The shape of what the first device holds of each array, by path."""
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if isinstance(leaf, jax.Array)]
    return {jax.tree_util.keystr(path): list(leaf.addressable_shards[0].data.shape) for path, leaf in leaves}


def compiled(mesh: Any) -> dict[str, str]:
    """What one device executes in a negative phase, and in an update with rows that are split."""
    key, potential = jax.random.key(0), ebm.potentials.tilt(scenarios.network(), scenarios.BASE)
    sampler, rows = scenarios.shard(scenarios.sampler(), mesh), scenarios.shard(scenarios.rows(), mesh)

    def update(state: Any, batches: ShuffledRows) -> Any:
        batch, _ = batches.take(key, state.step, batches.begin(key, state.step))
        return ebm.train_step(state, batch, key, scenarios.OBJECTIVE, scenarios.OPTIMIZER)

    phase: Any = sampling._compiled_advance
    compiled_update: Any = eqx.filter_jit(update)
    programs = {
        "advance": phase.lower(key, potential, sampler, 20),
        "update": compiled_update.lower(scenarios.shard(scenarios.state(), mesh), ShuffledRows(rows, 64)),
    }
    return {name: program.compile().compiled.as_text() for name, program in programs.items()}


def with_split_parameters() -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    """Training with rows and chains over two devices, and the parameters over two others each."""
    mesh = jax.make_mesh((2, 2), ("chain", "width"))

    def rule(path: str, leaf: Any) -> PartitionSpec | None:
        return PartitionSpec("width") if path.endswith("layers[0].weight") else None

    state = ebm.sharding.shard(scenarios.state(), mesh, parameters=rule)
    trained, _ = scenarios.fit(state, scenarios.shard(scenarios.rows(), mesh))
    return shards({"before": state, "after": trained}), scenarios.on_host({"state": trained})


def main(folder: str, numbers: str, *names: str) -> None:
    facts: dict[str, Any] = {}
    for number in map(int, numbers.split(",")):
        found = {}
        for name in names:
            if name == "parameters":
                continue
            result = scenarios.SCENARIOS[name](scenarios.mesh_of(number))
            if number == 4:
                facts[name] = shards(result)
            found |= {f"{name}{path}": array for path, array in scenarios.on_host(result).items()}
        np.savez(Path(folder, f"{number}.npz"), **found)
    if "parameters" in names:
        facts["parameters"], found = with_split_parameters()
        np.savez(Path(folder, "parameters.npz"), **found)
    else:
        facts["programs"] = compiled(scenarios.mesh_of(4))
    Path(folder, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
