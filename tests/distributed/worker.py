"""One process of several: ``python -m tests.distributed.worker PORT NUM PROCESS FOLDER scenario ...``.

Writes what it found to ``FOLDER/PROCESS.npz``, arrays named by scenario and path. The scenario ``resume`` continues the
training whose checkpoints are in ``FOLDER/checkpoints``, and saves every tenth update there, with time to be killed in.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

HEARTBEAT = 10
"""Seconds of silence after which JAX gives a process up; the least that a loaded machine keeps up with."""


def main(port: str, num_processes: str, process: str, folder: str, *names: str) -> None:
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        int(num_processes),
        int(process),
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=60,
    )
    # Not before: it makes arrays, and JAX must be initialised first.
    from tests.distributed import scenarios

    def resume(mesh: Any) -> dict[str, Any]:
        return scenarios.resume(mesh, Path(folder, "checkpoints"), pause=2.0)

    mesh = scenarios.mesh_of(int(num_processes))
    found = {}
    for name in names:
        run = resume if name == "resume" else scenarios.SCENARIOS[name]
        found |= {f"{name}{path}": array for path, array in scenarios.on_host(run(mesh)).items()}
    np.savez(Path(folder, f"{process}.npz"), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
