"""How updates scale with devices and processes, and what that predicts for machines that are not here.

``python -m tests.benchmarks.scaling docs/tables`` measures on one and two devices of one process and on two processes,
and writes the tables of the documentation; some minutes on two cores, which have to be idle for it.
"""

import argparse
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks._scaling_worker import CHAINS_PER_DEVICE, DIM, MCMC_STEPS
from tests.distributed import launch

CASES = {"1 device": (1, 1), "2 devices, 1 process": (1, 2), "2 processes": (2, 1)}
"""Processes, and devices of each."""
COLLECTIVES = 12
"""Of one update of PCD as it is compiled, the gradients and the batch among them; the others are single numbers."""
LIMIT = 1800.0
"""Seconds for one case."""


class Machine(NamedTuple):
    """What a prediction depends on.

    Attributes:
        flops: Floating-point operations per second that one device sustains on these networks.
        latency: Seconds of one step of a collective, from device to device.
        bandwidth: Bytes per second from device to device.
    """

    flops: float
    latency: float
    bandwidth: float


ASSUMED = Machine(flops=5e13, latency=2e-5, bandwidth=2.5e10)
"""A datacentre accelerator in 32 bits behind a network of 200 Gbit/s. Nothing of it was measured."""


class Job(NamedTuple):
    """One training run: PCD with ``steps`` steps, a batch of as many rows as there are chains.

    ``gathers`` says whether batches are taken from rows that are split over the devices.
    """

    parameters: float
    chains: float
    dimension: float = 3072.0
    steps: float = 10.0
    gathers: bool = True


def all_reduce(num_bytes: float, devices: int, machine: Machine) -> float:
    """Seconds of an all-reduce: the latency of a tree, there and back, and the bytes of a ring."""
    steps = math.ceil(math.log2(devices))
    return 2 * steps * machine.latency + 2 * (devices - 1) / devices * num_bytes / machine.bandwidth


def compute(job: Job, devices: int, machine: Machine) -> float:
    """Seconds of arithmetic in one update.

    A network of P parameters takes 2 P operations forward and as many back to its input, for every chain and step; 6 P for
    the gradient in the parameters, of every row and chain of the loss.
    """
    per_chain = 4.0 * job.parameters * (job.steps + 1) + 2 * 6.0 * job.parameters
    return job.chains / devices * per_chain / machine.flops


def communicate(job: Job, devices: int, machine: Machine) -> float:
    """Seconds of communication in one update: gradients, and the rows of the batch where data are split."""
    rows = 4.0 * job.chains * job.dimension if job.gathers else 0.0
    together = all_reduce(4.0 * job.parameters, devices, machine) + all_reduce(rows, devices, machine)
    return together + (COLLECTIVES - 2) * all_reduce(4.0, devices, machine)


def resample(job: Job, devices: int, machine: Machine) -> float:
    """Seconds of one resampling: all weights to all devices, and all particles past all devices."""
    weights = all_reduce(4.0 * job.chains, devices, machine) / 2
    return weights + all_reduce(4.0 * job.chains * job.dimension, devices, machine)


def memory(job: Job, devices: int) -> float:
    """Bytes on one device: parameters with gradient and two moments, chains and batch, and the batch once as a sum."""
    return 16.0 * job.parameters + 8.0 * job.chains * job.dimension / devices + 4.0 * job.chains * job.dimension


def measured_machine(done: dict[str, Any], case: str) -> Machine:
    """One core of this machine; latency and bandwidth between two are those of the smallest and largest all-reduce."""
    one, two = done["1 device"], done[case]["all_reduce"]
    least, most = (min(two, key=int), max(two, key=int))
    latency = two[least] / 2
    return Machine(4.0 * one["parameters"] / one["chain_step"], latency, int(most) / max(two[most] - two[least], 1e-9))


def run() -> dict[str, Any]:
    """All cases."""
    done: dict[str, Any] = {"load": os.getloadavg()[0], "cores": os.cpu_count()}
    for name, (processes, devices) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            workers = launch.start(
                Path(folder), processes, module="tests.benchmarks._scaling_worker", num_devices=devices
            )
            statuses = launch.wait(workers, LIMIT)
            if any(statuses):
                raise RuntimeError(Path(folder, "0.log").read_text())
            done[name] = json.loads(Path(folder, "found.json").read_text())
    return done


def number(x: float) -> str:
    """Three digits."""
    return f"{x:.3g}" if 1e-3 <= abs(x) < 1e4 else f"{x:.2e}"


def scaling_table(done: dict[str, Any]) -> str:
    """Measured updates, beside what the model says of them from the constants of one device and of the links."""
    lines = [
        "| on | ms per update, same chains in all | efficiency | ms per update, same chains on each | efficiency | "
        "ms of communication in the model |",
        "|---|---|---|---|---|---|",
    ]
    one = done["1 device"]
    for case, (processes, devices) in CASES.items():
        found, count = done[case], processes * devices
        strong = one["update_strong"] / found["update_strong"] / count
        weak = one["update_weak"] / found["update_weak"]
        job = Job(one["parameters"], CHAINS_PER_DEVICE * count, DIM, MCMC_STEPS)
        cost = communicate(job, count, measured_machine(done, case)) if count > 1 else 0.0
        lines.append(
            f"| {case} | {1e3 * found['update_strong']:.1f} | {strong:.0%} | {1e3 * found['update_weak']:.1f} | {weak:.0%} "
            f"| {1e3 * cost:.2f} |"
        )
    return "\n".join(lines) + "\n"


def constants_table(done: dict[str, Any]) -> str:
    """The constants of the model."""
    lines = ["| constant | measured here | assumed below |", "|---|---|---|"]
    local, loopback = (measured_machine(done, case) for case in list(CASES)[1:])
    one = done["1 device"]
    lines += [
        f"| other work: load average of the {done['cores']} cores at the start | {done['load']:.1f} | 0 |",
        f"| one step of one chain, {one['parameters']:,} parameters | {1e6 * one['chain_step']:.1f} µs | |",
        f"| operations per second of a device | {local.flops:.2e} | {ASSUMED.flops:.1e} |",
        f"| latency, 2 devices of a process | {1e6 * local.latency:.0f} µs | |",
        f"| latency, 2 processes over loopback | {1e6 * loopback.latency:.0f} µs | {1e6 * ASSUMED.latency:.0f} µs |",
        f"| bandwidth, 2 devices of a process | {local.bandwidth / 1e9:.2f} GB/s | |",
        f"| bandwidth, 2 processes over loopback | {loopback.bandwidth / 1e9:.2f} GB/s | "
        f"{ASSUMED.bandwidth / 1e9:.0f} GB/s |",
    ]
    return "\n".join(lines) + "\n"


def predictions_table() -> str:
    """Predictions for the assumed machine."""
    lines = [
        "| parameters | chains | devices | s of arithmetic | s of communication | efficiency | with a loader | "
        "s per resampling | GB on a device |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for parameters, chains in ((1e6, 1e4), (1e6, 1e6), (1e8, 1e5), (1e9, 1e4), (1e9, 1e6)):
        for devices in (8, 64, 512):
            job = Job(parameters, chains)
            work, talk = compute(job, devices, ASSUMED), communicate(job, devices, ASSUMED)
            less = communicate(job._replace(gathers=False), devices, ASSUMED)
            shares = [f"{work / (work + seconds):.1%}" for seconds in (talk, less)]
            cells = [number(work), number(talk), *shares, number(resample(job, devices, ASSUMED))]
            powers = [f"10^{round(math.log10(x))}" for x in (parameters, chains)]
            lines.append(f"| {' | '.join([*powers, str(devices), *cells])} | {memory(job, devices) / 1e9:.3g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    done = run()
    (options.folder / "scaling.json").write_text(json.dumps(done, indent=1) + "\n")
    tables = {
        "scaling": scaling_table(done),
        "scaling_constants": constants_table(done),
        "scaling_predictions": predictions_table(),
    }
    for name, text in tables.items():
        (options.folder / f"{name}.inc").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
