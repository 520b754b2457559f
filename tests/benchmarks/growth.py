"""How training grows: time and memory of an update against chains, steps of a chain, width, dimension and rows of data.

``python -m tests.benchmarks growth`` measures two points of every series. ``python -m tests.benchmarks.growth
docs/tables`` measures all of them, some minutes on one core, and writes the table of the documentation and a figure. What
is done is kept beside the table, and a run that was interrupted goes on where it stopped; ``--fresh`` starts anew.

An update is one of :func:`ebm_ppl.fit` with persistent contrastive divergence and MALA. Every point has a process of its
own. Three figures: the time of a warm update, without what a call of ``fit`` costs before its first; the temporary memory
of the compiled update, as the compiler planned it, which is exact; and the peak of the resident memory: the bytes of data
and state, and by how much training, compiled before, rises above what the process held. An exponent is the slope of log
time, or log memory, against log size over the larger half of a series; the middle point belongs to it.
"""

import ctypes
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import optax

import ebm_ppl as ebm
from ebm_ppl.objectives import persistent_contrastive_divergence
from tests.benchmarks._seeds import markdown, recorder, run_seeds

ROOT = Path(__file__).resolve().parents[2]
BATCH = 256
USUAL = {"chains": 256, "k": 10, "width": 64, "dim": 8, "rows": 10_000}
SERIES = {
    "chains": [2**n for n in range(6, 15, 2)],
    "k": [1, 3, 10, 30, 100],
    "width": [32, 64, 128, 256, 512],
    "dim": [2, 8, 32, 128, 512],
    "rows": [1000, 10_000, 100_000, 1_000_000],
}
EXPECTED = {
    "chains": ("1, linear", "1"),
    "k": ("1, linear", "0"),
    "width": ("1 to 2: matrices of width by width", "at least 1, below 2: of chains by width, and of width by width"),
    "dim": ("at most 1, where the dimension exceeds the width", "at most 1"),
    "rows": ("0, batches are of one size", "0; the data themselves are beside it"),
}
"""Of time and of temporary memory."""
KEYS_PER_STEP = 16
"""Bytes that a step of the chains adds: a key and a copy of it."""
TIMED_SECONDS, REPEATS = 0.5, 3
RETURNING = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
"""Has the C library give freed buffers back at once: what it keeps of an earlier one would hide the next from the peak."""
LATENCY_PROCESSES, STEADY_FROM, STEADY_TO = 3, 200, 2200


class Problem(NamedTuple):
    """What an update is made of."""

    state: ebm.TrainState
    data: jax.Array
    objective: Any
    optimizer: optax.GradientTransformation


def problem(*, chains: int, k: int, width: int, dim: int, rows: int) -> Problem:
    """A network on a normal base, with persistent chains."""
    base = dist.Normal(0.0, 1.0).expand([dim]).to_event(1)
    net_key, chain_key, data_key = jax.random.split(jax.random.key(0), 3)
    potential = ebm.potentials.tilt(ebm.potentials.MLP(dim, key=net_key, width=width, depth=2), base)
    sampler = ebm.init_sampler(base.sample(chain_key, (chains,)), ebm.kernels.mala(step_size=0.01))
    optimizer = optax.adam(1e-3)
    objective = functools.partial(persistent_contrastive_divergence, num_steps=k)
    state = ebm.init_train(potential, optimizer, sampler)
    return Problem(state, 0.5 * base.sample(data_key, (rows,)), objective, optimizer)


def train(made: Problem, num_steps: int, **options: Any) -> tuple[ebm.TrainState, float]:
    """Updates, and the seconds they took."""
    begin = time.perf_counter()
    state, _ = ebm.fit(
        jax.random.key(1), made.state, made.data, made.objective, made.optimizer,
        num_steps=num_steps, batch_size=min(BATCH, made.data.shape[0]), progress_bar=False, **options,
    )  # fmt: skip
    jax.block_until_ready(state.step)
    return state, time.perf_counter() - begin


def resident(name: str = "VmRSS") -> int:
    """Bytes of memory that this process holds; ``"VmHWM"`` is the peak.

    The kernel's own account: that of ``getrusage`` begins with the peak of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def settle() -> int:
    """Give back what the allocator keeps of freed memory, let the peak start anew, and return the bytes held now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident()


def point(**sizes: int) -> dict[str, Any]:
    """One point, in this process."""
    made = problem(**sizes)
    begin = time.perf_counter()
    lowered: Any = eqx.filter_jit(ebm.train_step).lower(
        made.state, made.data[:BATCH], jax.random.key(2), made.objective, made.optimizer
    )
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - begin
    _, first = train(made, 1)
    call = statistics.median(train(made, 1)[1] for _ in range(REPEATS))
    _, some = train(made, 5)
    # Enough updates to be timed, and not so many that the slowest point takes minutes.
    number = int(np.clip(TIMED_SECONDS / max((some - call) / 4, 1e-5), 3, 500))
    held, arrays = settle(), sum(array.nbytes for array in jax.live_arrays())
    times = [train(made, 1 + number)[1] for _ in range(REPEATS)]
    return {
        "seconds_per_update": (statistics.median(times) - call) / number,
        "temporary_bytes": compiled.compiled.memory_analysis().temp_size_in_bytes,
        "peak_bytes": arrays + resident("VmHWM") - held,
        "compile_seconds": compile_seconds,
        "first_update_seconds": first,
        "call_seconds": call,
    }


def latency() -> dict[str, float]:
    """What the first update of a process takes, and the next call; importing the package was before."""
    begin = time.perf_counter()
    made = problem(**USUAL)
    prepared = time.perf_counter() - begin
    _, first = train(made, 1)
    _, second = train(made, 1)
    return {"preparation_seconds": prepared, "first_update_seconds": first, "next_call_seconds": second}


def steady() -> dict[str, Any]:
    """Arrays, memory and time of an update early and late in one long training."""
    made = problem(**USUAL)
    state, _ = train(made, STEADY_FROM)
    tenth = (STEADY_TO - STEADY_FROM) // 10
    arrays, memory, seconds = [], [], []
    for _ in range(10):
        made = made._replace(state=state)
        state, took = train(made, tenth)
        gc.collect()
        arrays.append(len(jax.live_arrays()))
        memory.append(resident())
        seconds.append(took / tenth)
    return {
        "live_arrays": [arrays[0], arrays[-1]],
        "resident_bytes": [memory[0], memory[-1]],
        "time_ratio": seconds[-1] / seconds[0],
    }


WITH_IMPORT = """
import time
begin = time.perf_counter()
import ebm_ppl
took = time.perf_counter() - begin
"""


def fresh(call: str, *, before: str = "") -> dict[str, Any]:
    """What a function of this module returns in a process of its own; ``before`` is run first, and may set ``took``."""
    code = f"{before}\nimport json\nfrom tests.benchmarks import growth\nfound = growth.{call}\n"
    code += "print(json.dumps({**found, **({'import_seconds': took} if 'took' in globals() else {})}))"
    command, environment = [sys.executable, "-c", code], {**os.environ, **RETURNING}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"growth.{call} failed in a process of its own:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def fresh_point(name: str, size: int) -> dict[str, Any]:
    """A point of a series."""
    sizes = {**USUAL, name: size}
    return fresh(f"point({', '.join(f'{key}={value}' for key, value in sizes.items())})")


def run_all(path: Path, series: dict[str, list[int]] = SERIES) -> dict[str, dict[str, Any]]:
    """All points, the first updates of fresh processes, and a long training."""
    runs = [
        (f"{name}/{size}", functools.partial(fresh_point, name, size))
        for name, sizes in series.items()
        for size in sizes
    ]
    runs += [
        (f"latency/{index}", functools.partial(fresh, "latency()", before=WITH_IMPORT))
        for index in range(LATENCY_PROCESSES)
    ]
    return run_seeds(path, [*runs, ("steady/0", functools.partial(fresh, "steady()"))])


def values(done: dict[str, dict[str, Any]], name: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and figures of a series."""
    found = sorted((int(key.split("/")[1]), one[field]) for key, one in done.items() if key.split("/")[0] == name)
    return np.array([size for size, _ in found], float), np.array([value for _, value in found], float)


def exponent(sizes: np.ndarray, figures: np.ndarray) -> float:
    """Slope of log figure against log size over the larger half."""
    half = slice(len(sizes) // 2, None)
    return float(np.polyfit(np.log(sizes[half]), np.log(np.maximum(figures[half], 1e-12)), 1)[0])


def is_memory_independent_of_k(done: dict[str, dict[str, Any]]) -> bool:
    """Whether a step of the chains adds at most its key to the temporary memory of an update.

    A single step is no loop, and is planned otherwise: it takes more.
    """
    steps, memory = values(done, "k", "temporary_bytes")
    return bool((np.diff(memory) <= KEYS_PER_STEP * np.diff(steps)).all())


def table(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    rows = [
        [
            "grows", "from, to", "ms per update", "exponent", "expected", "temporary memory, MB", "exponent",
            "expected of memory", "peak with data, MB",
        ]
    ]  # fmt: skip
    for name in SERIES:
        sizes, seconds = values(done, name, "seconds_per_update")
        _, temporary = values(done, name, "temporary_bytes")
        _, peak = values(done, name, "peak_bytes")
        rows.append(
            [
                f"`{name}`",
                _ends(sizes, ",.0f"),
                _ends(1e3 * seconds, ".3g"),
                f"{exponent(sizes, seconds):.2f}",
                EXPECTED[name][0],
                _ends(temporary / 1e6, ".3g"),
                f"{exponent(sizes, temporary):.2f}",
                EXPECTED[name][1],
                _ends(peak / 1e6, ".0f"),
            ]
        )
    first = [one for key, one in done.items() if key.startswith("latency/")]
    columns = {
        "import, s": "import_seconds", "problem, s": "preparation_seconds", "first update, s": "first_update_seconds",
        "next call, ms": "next_call_seconds",
    }  # fmt: skip
    medians = [statistics.median(one[field] for one in first) for field in columns.values()]
    long = done["steady/0"]
    held = " to ".join(f"{x / 1e6:.0f}" for x in long["resident_bytes"])
    compiling = statistics.median(one["compile_seconds"] for one in done.values() if "compile_seconds" in one)
    once = markdown(
        [
            [*columns, "compilation, s", "live arrays", "resident, MB", "time of an update, last tenth to first"],
            [
                *(f"{x:.2f}" for x in medians[:3]),
                f"{1e3 * medians[3]:.1f}",
                f"{compiling:.2f}",
                " to ".join(map(str, long["live_arrays"])),
                held,
                f"{long['time_ratio']:.2f}",
            ],
        ]
    )
    return f"{markdown(rows)}\n{once}"


def _ends(numbers: np.ndarray, form: str) -> str:
    return f"{numbers[0]:{form}} to {numbers[-1]:{form}}"


def figure(done: dict[str, dict[str, Any]], path: Path) -> None:
    """Time and memory against each size."""
    figure, axes = plt.subplots(2, len(SERIES), figsize=(13, 5), sharey="row", sharex="col", layout="constrained")
    for column, name in zip(axes.T, SERIES, strict=True):
        sizes, seconds = values(done, name, "seconds_per_update")
        _, temporary = values(done, name, "temporary_bytes")
        _, peak = values(done, name, "peak_bytes")
        half = len(sizes) // 2
        column[0].plot(sizes, 1e3 * seconds, "o-", ms=3, lw=1.2)
        slope = exponent(sizes, seconds)
        line = 1e3 * seconds[-1] * (sizes[half:] / sizes[-1]) ** slope
        column[0].plot(sizes[half:], line, color="black", ls=":", lw=1.2, label=f"exponent {slope:.2f}")
        column[1].plot(sizes, temporary / 1e6, "o-", ms=3, lw=1.2, label="temporary, as planned")
        column[1].plot(sizes, np.maximum(peak, 1e5) / 1e6, "s--", ms=3, lw=1.2, label="peak with data")
        column[0].set(xscale="log", yscale="log")
        column[0].legend(fontsize="small", loc="upper left")
        column[1].set(yscale="log", xlabel=name)
    axes[0, 0].set_ylabel("ms per update")
    axes[1, 0].set_ylabel("memory, MB")
    axes[1, 0].legend(fontsize="small", loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run() -> dict[str, Any]:
    """The two ends of every series but the largest, in processes of their own."""
    done: dict[str, dict[str, Any]] = {}
    for name, sizes in SERIES.items():
        for size in (sizes[0], sizes[len(sizes) // 2]):
            done[f"{name}/{size}"] = fresh_point(name, size)
    long = fresh("steady()")
    first, last = long["live_arrays"]
    return {
        **done,
        "latency": fresh("latency()", before=WITH_IMPORT),
        "steady": long,
        "goal": "temporary memory without a share for k, and no more arrays at the end of a long training",
        "met": is_memory_independent_of_k(done) and last <= first,
    }


def main() -> None:
    path, options = recorder(__doc__, "growth")
    done = run_all(path)
    if not is_memory_independent_of_k(done):
        raise RuntimeError("the temporary memory of an update grows with the steps of its chains.")
    (options.folder / "growth.inc").write_text(table(done))
    figure(done, options.folder.parent / "images" / "growth.png")
    print(table(done))


if __name__ == "__main__":
    main()
