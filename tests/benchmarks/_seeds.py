"""Runs of cases with several seeds, and their tables: a row per case, with its seeds in their order in every cell."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Runs = list[dict[str, Any]]


def run_seeds(path: Path, runs: Iterable[tuple[str, Callable[[], dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Results by name, ``case/seed``, kept in the file at ``path``; what it has already is not done again."""
    done = json.loads(path.read_text()) if path.exists() else {}
    for name, run in runs:
        if name not in done:
            done[name] = run()
            print(name, {k: v for k, v in done[name].items() if not isinstance(v, list)}, flush=True)
            path.write_text(json.dumps(done, indent=1) + "\n")
    return done


def recorder(description: str | None, name: str, *, only: str | None = None) -> tuple[Path, argparse.Namespace]:
    """The command line of a benchmark that keeps its results: where they are, ``folder/name.json``, and the options.

    Args:
        description: Of the benchmark.
        name: Of the file.
        only: What ``--only`` selects, where there is such an option.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    if only is not None:
        parser.add_argument("--only", default="", help=f"what the names of the {only} begin with")
    parser.add_argument("--fresh", action="store_true", help="forget what was done before")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"{name}.json"
    if options.fresh:
        path.unlink(missing_ok=True)
    return path, options


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row names the columns."""
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([lines[0], f"|{'|'.join(['---'] * len(rows[0]))}|\n", *lines[1:]])


def table_of_seeds(
    columns: list[str], done: dict[str, dict[str, Any]], cases: Iterable[str], seeds: int, cells: Callable[[Runs], list]
) -> str:
    """Markdown of the cases that were run, found in ``done`` under ``case/seed``; the verdicts of a diagnosis come last."""
    rows = [[*columns, "sampler", "model"]]
    for case in cases:
        runs = [done[f"{case}/{seed}"] for seed in range(seeds) if f"{case}/{seed}" in done]
        if runs:
            verdicts = (" / ".join(dict.fromkeys(one[whom] for one in runs)) for whom in ("sampler", "model"))
            rows.append([case, *cells(runs), *verdicts])
    return markdown(rows)
