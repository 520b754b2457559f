"""The tables of speed in the documentation: ``python -m tests.benchmarks._speed_tables docs/tables``.

They are the benchmarks ``training_speed``, ``svi_speed``, ``against_torchebm`` and ``against_thrml``, run one after the
other on a machine that should have nothing else to do. The load that it had is recorded with them.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tests.benchmarks import against_thrml, against_torchebm, svi_speed, training_speed
from tests.benchmarks.__main__ import as_json, environment
from tests.benchmarks._seeds import markdown

BENCHMARKS = {
    "training_speed": training_speed.run,
    "svi_speed": svi_speed.run,
    "against_torchebm": against_torchebm.run,
    "against_thrml": against_thrml.run,
}


def shown(found: dict[str, float]) -> str:
    """A ratio with its quartiles."""
    return f"{found['median']:.2f} ({found['lower_quartile']:.2f} to {found['upper_quartile']:.2f})"


def by_hand(done: dict[str, Any]) -> str:
    """An update by ``fit`` against the loop by hand, and both against bare gradients."""
    rows = [["update", "speed of `fit`, loop by hand = 1", "`fit` / bare gradients", "by hand / bare gradients", "ms"]]
    for name, case in done["training_speed"]["updates"].items():
        ratios = (case[which] for which in ("speed_against_hand", "fit_over_bare", "hand_over_bare"))
        rows.append([name, *map(shown, ratios), f"{case['milliseconds_per_update']:.2f}"])
    return markdown(rows)


def phases(done: dict[str, Any]) -> str:
    """The negative phase of ten ULA steps against bare gradients."""
    rows = [["negative phase", "/ as many bare gradients", "/ one bare gradient per step"]]
    for name, case in done["training_speed"]["phases"].items():
        rows.append([name, shown(case["over_as_many_gradients"]), shown(case["over_one_gradient_per_step"])])
    return markdown(rows)


def svi(done: dict[str, Any]) -> str:
    """NumPyro's SVI against ``fit``."""
    rows = [["`SVI(handlers.negative_phase(model), ...)`", "/ plain `fit`"]]
    for name, case in done["svi_speed"].items():
        if isinstance(case, dict) and "svi_over_fit" in case:
            rows.append([name, shown(case["svi_over_fit"])])
    return markdown(rows)


def peers(done: dict[str, Any]) -> str:
    """Times of torchebm and thrml over those here."""
    rows = [["case", "peer", "times faster here", "threads of the peer"]]
    for name, case in done["against_torchebm"].get("cases", {}).items():
        rows.append([name, "torchebm", shown(case["times_faster"]), str(case["threads_of_torchebm"])])
    for name, case in done["against_thrml"].items():
        if isinstance(case, dict) and "times_faster" in case:
            rows.append([f"Gibbs, 32 x 32 Ising model, {name}", "thrml", shown(case["times_faster"]), ""])
    return markdown(rows)


TABLES = {"speed_by_hand": by_hand, "speed_phases": phases, "speed_svi": svi, "speed_peers": peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only",
        nargs="*",
        metavar="BENCHMARK",
        help="none: tables of what was run",
        choices=list(BENCHMARKS),
        default=list(BENCHMARKS),
    )
    options = parser.parse_args()
    path = options.folder / "speed.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only:
        before = os.getloadavg()[0]
        done[name] = {**BENCHMARKS[name](), "load_before": before, "environment": environment()}
        print(name, {k: done[name][k] for k in ("goal", "met", "missed", "load_before") if k in done[name]}, flush=True)
        path.write_text(json.dumps(done, indent=1, default=as_json) + "\n")
        done = json.loads(path.read_text())
    for name, table in TABLES.items():
        (options.folder / f"{name}.inc").write_text(table(done))
        print(table(done))


if __name__ == "__main__":
    main()
