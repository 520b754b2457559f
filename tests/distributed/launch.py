"""Start processes that share one core with the tests, and see that none of them outlives its time."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def environment(num_devices: int = 1) -> dict[str, str]:
    """That of a process with so many CPU devices and one thread for each program."""
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_cpu_multi_thread_eigen=false"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    folder: Path, num_processes: int, *names: str, module: str = "tests.distributed.worker", num_devices: int = 1
) -> list[subprocess.Popen]:
    """Workers of one run; what they say goes to ``folder/PROCESS.log``."""
    port = free_port()
    workers = []
    for process in range(num_processes):
        command = [sys.executable, "-m", module, port, num_processes, process, folder, *names]
        with Path(folder, f"{process}.log").open("w") as log:
            workers.append(
                subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment(num_devices), stdout=log, stderr=log)
            )
    return workers


def wait(workers: list[subprocess.Popen], seconds: float) -> list[int]:
    """Exit statuses; those that have not ended in time are killed (JAX does not die of SIGTERM)."""
    end = time.monotonic() + seconds
    try:
        return [worker.wait(max(end - time.monotonic(), 0.1)) for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def run(folder: Path, num_processes: int, *names: str, seconds: float) -> list[dict[str, np.ndarray]]:
    """What each of the workers found."""
    statuses = wait(start(folder, num_processes, *names), seconds)
    logs = [Path(folder, f"{process}.log").read_text() for process in range(num_processes)]
    assert statuses == [0] * num_processes, "\n".join(logs)
    return [dict(np.load(Path(folder, f"{process}.npz"))) for process in range(num_processes)]


def run_on_devices(folder: Path, numbers: str, *names: str, seconds: float) -> dict[str, dict[str, np.ndarray]]:
    """What one process found on each number of its four devices, by the name of its file."""
    command = [sys.executable, "-m", "tests.distributed.devices", str(folder), numbers, *names]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(4), timeout=seconds, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(program: str) -> list[tuple[str, int]]:
    """The communication of a compiled program: kind, and numbers in the largest array of the result."""
    found = []
    for line in program.splitlines():
        if match := COLLECTIVE.search(line):
            sizes = [np.prod([int(n) for n in dims.split(",") if n] or [1]) for _, dims in SHAPE.findall(match[1])]
            found.append((match[2], int(max(sizes))))
    return found
