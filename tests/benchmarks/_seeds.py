"""Tables of runs with several seeds: a row per case, and the seeds of a case in their order in every cell."""

from collections.abc import Callable, Iterable
from typing import Any

Runs = list[dict[str, Any]]


def table_of_seeds(
    columns: list[str], done: dict[str, dict[str, Any]], cases: Iterable[str], seeds: int, cells: Callable[[Runs], list]
) -> str:
    """Markdown of the cases that were run, found in ``done`` under ``case/seed``; the verdicts of a diagnosis come last."""
    rows = [[*columns, "sampler", "model"], ["---"] * (len(columns) + 2)]
    for case in cases:
        runs = [done[f"{case}/{seed}"] for seed in range(seeds) if f"{case}/{seed}" in done]
        if runs:
            verdicts = (" / ".join(dict.fromkeys(one[whom] for one in runs)) for whom in ("sampler", "model"))
            rows.append([case, *cells(runs), *verdicts])
    return "".join(f"|{'|'.join(row)}|\n" if row[0] == "---" else f"| {' | '.join(row)} |\n" for row in rows)
