"""log Z of the many-well energy in 32 dimensions by tempered SMC, here and by a loop written on BlackJAX's own sampler.

``python -m tests.benchmarks log_normalizer_speed`` makes four runs of each.
``python -m tests.benchmarks.log_normalizer_speed docs/tables`` makes twenty-four, some minutes on one core, and writes the
table of the documentation; ``--fresh`` forgets an earlier one.

Both take as many particles, steps of the same HMC at every temperature, and the same target for the effective sample size,
from the same reference. They run in turns, compiled before; the ratio of times is taken within a pair, and its median over
pairs. BlackJAX's loop spaces its temperatures by the weights of particles before they are resampled and moves them at the
temperature before, so the two do not make the same number of temperatures.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from blackjax.smc.resampling import systematic

import ebm_ppl as ebm
from ebm_ppl import kernels, targets
from tests.benchmarks._seeds import markdown, recorder, run_seeds

GOAL, REPLICATES = 0.1, 24
DIM = 32
TARGET = targets.get("many_well", dim=DIM)
REFERENCE = dist.Normal(0.0, 1.5).expand([DIM]).to_event(1)
NUM_PARTICLES, NUM_STEPS, TARGET_ESS = 4000, 5, 0.9
STEP_SIZE, LEAPFROGS = 0.25, 5
SITE = ebm.EBM(TARGET.potential, TARGET.base)


class Run(NamedTuple):
    """One estimate and what it took."""

    value: float
    gradients: float
    seconds: float


def ours(key: Any, num_particles: int) -> tuple[Any, Any]:
    """The package's estimate, and all gradients of its particles."""
    kernel = kernels.hmc(STEP_SIZE, LEAPFROGS)
    options = {"num_particles": num_particles, "num_steps": NUM_STEPS, "target_ess": TARGET_ESS}
    found = ebm.normalizer.tempered_smc(key, SITE, reference=REFERENCE, kernel=kernel, **options)
    return found.value, found.num_gradients


@functools.partial(jax.jit, static_argnums=1)
def by_hand(key: Any, num_particles: int) -> tuple[Any, Any]:
    """The same with BlackJAX's adaptive tempered SMC: its increments of the likelihood, summed until the path arrives."""
    draw_key, run_key = jax.random.split(key)
    algorithm = blackjax.adaptive_tempered_smc(
        REFERENCE.log_prob,
        lambda x: -TARGET.potential(x) - REFERENCE.log_prob(x),
        functools.partial(blackjax.hmc.build_kernel(), num_integration_steps=LEAPFROGS),
        blackjax.hmc.init,
        # The leading axis says that all particles share them.
        {"step_size": jnp.full(1, STEP_SIZE), "inverse_mass_matrix": jnp.ones((1, DIM))},
        systematic,
        TARGET_ESS,
        num_mcmc_steps=NUM_STEPS,
    )
    state: Any = algorithm.init(REFERENCE.sample(draw_key, (num_particles,)))
    state = state._replace(tempering_param=jnp.zeros(()))

    def step(loop: tuple) -> tuple:
        number, state, log_normalizer = loop
        state, info = algorithm.step(jax.random.fold_in(run_key, number), state)
        return number + 1, state, log_normalizer + info.log_likelihood_increment

    start = jnp.zeros((), jnp.int32), state, jnp.zeros(())
    number, _, value = jax.lax.while_loop(lambda loop: loop[1].tempering_param < 1.0, step, start)
    return value, number * num_particles * (NUM_STEPS * LEAPFROGS + 1)


METHODS: dict[str, Callable[[Any, int], tuple[Any, Any]]] = {
    "ebm_ppl.normalizer.tempered_smc": ours,
    "loop on blackjax.adaptive_tempered_smc": by_hand,
}


def timed(name: str, key: Any, num_particles: int) -> Run:
    """One run of one of the two."""
    begin = time.perf_counter()
    value, gradients = jax.block_until_ready(METHODS[name](key, num_particles))
    return Run(float(value), float(gradients), time.perf_counter() - begin)


def compare(replicates: int, num_particles: int = NUM_PARTICLES) -> dict[str, Any]:
    """Both in turns: errors, gradients and times, and the ratio of times within pairs."""
    key = jax.random.key(51)
    for name in METHODS:
        timed(name, key, num_particles)  # compiles
    runs: dict[str, list[Run]] = {name: [] for name in METHODS}
    for replicate in range(replicates):
        # In alternating order, so that a slow moment of the machine falls on both.
        for name in sorted(METHODS, reverse=bool(replicate % 2)):
            runs[name].append(timed(name, jax.random.fold_in(key, replicate), num_particles))
    mine, theirs = (np.array([one.seconds for one in runs[name]]) for name in METHODS)
    low, median, high = statistics.quantiles((mine / theirs).tolist(), n=4, method="inclusive")
    found: dict[str, Any] = {name: _summary(one) for name, one in runs.items()}
    ratio = {"median": median, "lower_quartile": low, "upper_quartile": high}
    return {"methods": found, "ratio_of_times": ratio, "particles": num_particles, "replicates": replicates}


def _summary(runs: list[Run]) -> dict[str, Any]:
    errors = np.array([one.value for one in runs]) - TARGET.log_normalizer
    return {
        "root_mean_square_error": float(np.sqrt(np.mean(errors**2))),
        "mean_error": float(errors.mean()),
        "error_of_mean": float(errors.std(ddof=1) / len(errors) ** 0.5),
        "gradients": float(np.median([one.gradients for one in runs])),
        "seconds": float(np.median([one.seconds for one in runs])),
        "errors": errors.round(4).tolist(),
    }


def table(done: dict[str, Any]) -> str:
    """The table of the documentation."""
    rows = [["", "root mean square error, nat", "mean error, nat", "gradients of the energy", "s", "ratio of times"]]
    ratio = done["ratio_of_times"]
    said = f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})"
    for name, text in zip(METHODS, (said, "1"), strict=True):
        one = done["methods"][name]
        mean = f"{one['mean_error']:+.3f} ± {one['error_of_mean']:.3f}"
        error, gradients = f"{one['root_mean_square_error']:.3f}", f"{one['gradients']:.2e}"
        rows.append([f"`{name}`", error, mean, gradients, f"{one['seconds']:.2f}", text])
    return markdown(rows)


def run() -> dict[str, Any]:
    """A few runs of each."""
    found = compare(replicates=4)
    error = found["methods"]["ebm_ppl.normalizer.tempered_smc"]["root_mean_square_error"]
    return {
        **found,
        "goal": f"root mean square error at most {GOAL} nat, from few runs twice that",
        "met": error < 2 * GOAL,
    }


def main() -> None:
    path, options = recorder(__doc__, "log_normalizer_speed")
    done = run_seeds(path, [("comparison", functools.partial(compare, REPLICATES))])["comparison"]
    (options.folder / "log_normalizer_speed.inc").write_text(table(done))
    print(table(done))


if __name__ == "__main__":
    main()
