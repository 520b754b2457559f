"""Run the benchmarks: ``python -m tests.benchmarks [name ...]``.

A benchmark is a module of this package with a function ``run() -> dict``. Its numbers, nested or not, become the rows
of a table; the whole dictionary goes to ``outputs/bench/<name>.json`` together with where it was measured. Two keys
mean something here: ``goal`` (text) says what was aimed at and ``met`` (bool) whether it was reached.

The exit status is 1 when a benchmark raises, and with ``--strict`` also when one misses its goal.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import tests.benchmarks

ROOT = Path(__file__).resolve().parents[2]


def names() -> list[str]:
    """Names of the benchmarks, in alphabetical order."""
    return sorted(m.name for m in pkgutil.iter_modules(tests.benchmarks.__path__) if not m.name.startswith("_"))


def environment() -> dict:
    """What a number depends on besides the code."""
    packages = ("ebm-ppl", "jax", "jaxlib", "numpyro", "blackjax")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def rows(result: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The scalars of a result as ``(name, text)``; longer series stay in the JSON."""
    for key, value in result.items():
        if isinstance(value, dict):
            yield from rows(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield prefix + key, "yes" if value else "NO"
        elif isinstance(value, float):
            yield prefix + key, f"{value:.4g}"
        elif isinstance(value, int | str):
            yield prefix + key, str(value)
        elif isinstance(value, list | tuple):
            short = all(isinstance(item, str) for item in value)
            yield prefix + key, ", ".join(value) or "none" if short else f"[{len(value)} values]"


def as_json(value: object) -> object:
    """A NumPy or JAX scalar or array as what JSON knows."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a benchmark returned {type(value).__name__}, which has no JSON form; return numbers and text")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Run the benchmarks.")
    parser.add_argument("name", nargs="*", help=f"which to run, all by default: {', '.join(names())}")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "bench", help="directory for the JSON files")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a goal is missed")
    arguments = parser.parse_args()
    if unknown := set(arguments.name) - set(names()):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names())}")

    arguments.output.mkdir(parents=True, exist_ok=True)
    failed, missed = [], []
    for name in arguments.name or names():
        print(f"\n{name}", flush=True)
        start = time.perf_counter()
        try:
            result = importlib.import_module(f"tests.benchmarks.{name}").run()
            record = {"benchmark": name, "result": result, "environment": environment()}
            text = json.dumps(record, indent=2, default=as_json) + "\n"
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        (arguments.output / f"{name}.json").write_text(text)
        table = [*rows(json.loads(text)["result"]), ("took", f"{time.perf_counter() - start:.0f} s")]
        width = max(len(key) for key, _ in table)
        for key, value in table:
            print(f"  {key:<{width}}  {value}")
        if result.get("met") is False:
            missed.append(name)

    print(f"\nwritten to {arguments.output}")
    if missed:
        print("goal missed: " + ", ".join(missed))
    if failed:
        print("failed: " + ", ".join(failed))
    return 1 if failed or (missed and arguments.strict) else 0


if __name__ == "__main__":
    raise SystemExit(main())
