"""What the reports of a training run cost: acceptance, gap, drift, autocorrelation, age, frozen and non-finite counts.

The same updates with and without them, in turns: an objective that returns no metrics lets the compiler drop all that
only they need. The ratio is taken within a pair of runs and the median over pairs.
"""

import functools
import statistics
import time
from typing import Any

import jax
import numpyro.distributions as dist
import optax

import ebm_ppl as ebm
from ebm_ppl.objectives import persistent_contrastive_divergence

GOAL = 1.02
PAIRS, NUM_UPDATES, NUM_CHAINS, WIDTH, MCMC_STEPS = 15, 300, 256, 64, 10
BASE = dist.Normal(0.0, 1.0).expand([8]).to_event(1)

reported = functools.partial(persistent_contrastive_divergence, num_steps=MCMC_STEPS)


def bare(potential: Any, sampler: Any, batch: Any, key: Any) -> Any:
    """The same loss and chains, and nothing said about them."""
    loss, (sampler, _) = reported(potential, sampler, batch, key)
    return loss, (sampler, {})


def run() -> dict:
    """Median ratio of the times with and without reports, and its quartiles."""
    key = jax.random.key(0)
    potential = ebm.potentials.tilt(ebm.potentials.MLP(8, key=key, width=WIDTH, depth=2), BASE)
    optimizer = optax.adam(1e-3)
    sampler = ebm.init_sampler(BASE.sample(key, (NUM_CHAINS,)), ebm.kernels.mala(step_size=0.1))
    state = ebm.init_train(potential, optimizer, sampler)
    rows = 0.5 * BASE.sample(jax.random.key(1), (4096,))

    def seconds(objective: Any) -> float:
        start = time.perf_counter()
        ebm.fit(key, state, rows, objective, optimizer, num_steps=NUM_UPDATES, batch_size=NUM_CHAINS)
        return time.perf_counter() - start

    seconds(reported), seconds(bare)  # compile both
    ratios = []
    for pair in range(PAIRS):
        # In alternating order, so that a slow moment of the machine falls on both.
        order = (reported, bare) if pair % 2 else (bare, reported)
        found = {objective: seconds(objective) for objective in order}
        ratios.append(found[reported] / found[bare])
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": median,
        "quartiles": f"{low:.3f} to {high:.3f}",
        "updates": NUM_UPDATES,
        "pairs": PAIRS,
        "goal": f"at most {GOAL}",
        "met": median <= GOAL,
    }
