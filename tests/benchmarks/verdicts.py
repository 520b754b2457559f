"""How often a diagnosis is wrong: verdicts on models of two modes whose mode weights are known by quadrature.

``python -m tests.benchmarks.verdicts docs/tables`` trains 40 models in each of three ways, judges each with its chains, and
writes the table of the documentation; about ten minutes on one core. What is done is kept beside the table, and a run that
was interrupted goes on where it stopped.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax

import ebm_ppl as ebm
from ebm_ppl.diagnostics import diagnose
from tests import two_modes

NUM_SEEDS, AT_ONCE, BUDGET = 40, 10, 200_000
RIGHT, WRONG = 0.02, 0.1
"""Models whose mode weight is off by less are right, by more are wrong, and between the two neither."""
CASES = {
    "exact gradient, mixing sampler": ("exact", two_modes.mixing, 100),
    "exact gradient, local MALA": ("exact", two_modes.local, 100),
    "PCD-10, its local MALA": ("pcd", two_modes.local, 0),
    "PCD-10, mixing sampler": ("pcd", two_modes.mixing, 1000),
    "noise start, 10 steps": ("noise", two_modes.local, 0),
}
STATUSES = ("pass", "warn", "fail", "not assessable")


def judge(trained: two_modes.Trained, case: str, seed: int) -> dict[str, Any]:
    """One diagnosis, and the truth."""
    how, kernel, burn = CASES[case]
    sampler = ebm.init_sampler(trained.position, kernel())
    if burn:
        sampler, _ = ebm.advance(jax.random.key(seed), trained.potential, sampler, burn)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    options = {"budget": BUDGET, "num_steps": 10, "persistent": how != "noise"}
    found = diagnose(trained.potential, sampler, trained.rows, key, **options)
    return {
        "error": abs(float(two_modes.left_weight(trained.potential)) - float((trained.rows < 0).mean())),
        "sampler": found.sampler,
        "model": found.model,
        "checks": {check.name: check.status for check in found.checks},
        "gradients": found.num_gradients,
    }


def run(num_seeds: int = 1, path: Path | None = None) -> dict[str, dict[str, Any]]:
    """All cases; what the file at ``path`` has already is not done again."""
    done = json.loads(path.read_text()) if path is not None and path.exists() else {}
    for how in dict.fromkeys(how for how, _, _ in CASES.values()):
        cases = [case for case in CASES if CASES[case][0] == how]
        for first in range(0, num_seeds, AT_ONCE):
            seeds = range(first, min(first + AT_ONCE, num_seeds))
            if all(f"{case}/{seed}" in done for case in cases for seed in seeds):
                continue
            keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(11), seed))(
                jax.numpy.arange(first, seeds.stop)
            )
            for seed, trained in zip(seeds, two_modes.train_many(keys, how), strict=True):
                for case in cases:
                    if f"{case}/{seed}" not in done:
                        done[f"{case}/{seed}"] = judge(trained, case, seed)
                if path is not None:
                    path.write_text(json.dumps(done, indent=1))
    return done


def table(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    lines = [
        "| trained by, judged with | model (quadrature) | runs | sampler | model |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        runs = [one for name, one in done.items() if name.split("/")[0] == case]
        groups = {
            "right": [one for one in runs if one["error"] < RIGHT],
            "between": [one for one in runs if RIGHT <= one["error"] <= WRONG],
            "wrong": [one for one in runs if one["error"] > WRONG],
        }
        for truth, group in groups.items():
            if group:
                counts = [_counts(Counter(one[whom] for one in group)) for whom in ("sampler", "model")]
                lines.append(f"| {case} | {truth} | {len(group)} | {counts[0]} | {counts[1]} |")
    return "\n".join(lines) + "\n"


def _counts(counter: Counter) -> str:
    return ", ".join(f"{status} {counter[status]}" for status in STATUSES if counter[status])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    done = run(options.seeds, options.folder / "verdicts.json")
    (options.folder / "verdicts.inc").write_text(table(done))
    print(table(done))


if __name__ == "__main__":
    main()
