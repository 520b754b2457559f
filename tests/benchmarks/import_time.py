"""What ``import ebm_ppl`` costs on top of the libraries it stands on.

Fresh interpreters, run in pairs: one imports jax, numpyro and blackjax, the other imports the same three and then
ebm_ppl. Both members of a pair run next to each other, in alternating order, so that a slow moment of the machine falls
on both; the ratio is taken within a pair and the median over pairs.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOAL = 1.15
PAIRS = 15

BASE = "import jax, numpyro, blackjax"
FULL = BASE + "\nimport ebm_ppl"

# Optional or slow libraries that are to load on use, never on import.
HEAVY = (
    "arviz_base",
    "arviz_plots",
    "arviz_stats",
    "distrax",
    "h5netcdf",
    "matplotlib",
    "pandas",
    "sklearn",
    "tensorflow_probability",
    "xarray",
)

MEASURE = """
import time
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
import json, sys
print(json.dumps({{"seconds": seconds, "modules": [name for name in {heavy} if name in sys.modules]}}))
"""


def measure(code: str) -> dict:
    """Seconds that ``code`` takes in a fresh interpreter, and which heavy modules it left loaded."""
    script = MEASURE.format(code=code, heavy=HEAVY)
    # The environment is inherited; the working directory makes the checkout importable where it is not installed.
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"this failed in a fresh interpreter:\n{code}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def run(pairs: int = PAIRS) -> dict:
    """Median ratio with its quartiles over ``pairs`` pairs of fresh interpreters."""
    # Once each before the clock starts: the first import of a module also compiles and caches its byte code.
    heavy_base, heavy_full = set(measure(BASE)["modules"]), set(measure(FULL)["modules"])
    base, full = [], []
    for pair in range(pairs):
        for code, seconds in ((BASE, base), (FULL, full)) if pair % 2 else ((FULL, full), (BASE, base)):
            seconds.append(measure(code)["seconds"])
    ratios = [b / a for a, b in zip(base, full, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "goal": f"median ratio at most {GOAL}",
        "met": median <= GOAL,
        "ratio": {"median": median, "lower_quartile": low, "upper_quartile": high, "values": ratios},
        "seconds": {"without": statistics.median(base), "with": statistics.median(full)},
        "heavy_modules_added": sorted(heavy_full - heavy_base),
        "pairs": pairs,
    }
