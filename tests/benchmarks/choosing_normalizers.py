"""Every estimate of log Z on energies whose log Z is known: errors, what they say of themselves, and what they cost.

``python -m tests.benchmarks choosing_normalizers`` makes two runs of each on the smallest energy.
``python -m tests.benchmarks.choosing_normalizers docs/tables`` makes twelve on all of them, some minutes on one core, and
writes the table of the documentation; what is done is kept beside it, ``--only "two modes"`` does a part, and ``--fresh``
starts anew.

All methods start from the same wide normal and have kernels with the same fixed step size. Bridge sampling and the flow
work with draws of HMC chains that start there too, as a user's would; these draws, and the fit of the flow, are part of the
time. Chains that start badly weigh modes wrongly, and what is built on them inherits that: the table shows who notices.
A run is *wrong and believed* where the estimate is off by more than five of its standard errors and a hundredth of a nat,
and yet calls itself reliable. Gradients are those that the method reports, and those of the chains before it.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro.distributions as dist

import ebm_ppl as ebm
from ebm_ppl import flows, kernels, normalizer, targets
from tests.benchmarks._seeds import markdown, recorder, run_seeds
from tests.benchmarks.statistical_speed import TARGET as TWO_MODES

REPLICATES = 12
NUM_CHAINS, NUM_DRAWS, NUM_BURN, THIN, LEAPFROGS = 64, 100, 100, 5, 5
NUM_PARTICLES, NUM_PROPOSALS, NUM_TEMPERATURES = 2000, 20_000, 100
TOLERATED, ERRORS = 0.01, 5.0


class Case(NamedTuple):
    """A target, the normal that all start from, and the step of their kernel."""

    target: Any
    scale: float
    step_size: float

    @property
    def site(self) -> ebm.EBM:
        return ebm.EBM(self.target.potential, self.target.base)

    @property
    def reference(self) -> Any:
        return dist.Normal(0.0, self.scale).expand(self.target.event_shape).to_event(1)

    @property
    def kernel(self) -> Any:
        return kernels.hmc(self.step_size, LEAPFROGS)


CASES = {
    "banana, d = 2": Case(targets.get("banana"), 3.0, 0.15),
    "two modes, d = 8": Case(TWO_MODES, 3.0, 0.3),
    "funnel, d = 10": Case(targets.get("funnel"), 3.0, 0.15),
    "many wells, d = 32": Case(targets.get("many_well_32"), 1.5, 0.2),
}


def draws(key: Any, case: Case) -> tuple[Any, float]:
    """Draws of chains from the wide normal, ``(chain, draw, *event)``, and the gradients of all of them."""
    keys = jax.random.split(key, 3)
    sampler = ebm.init_sampler(case.reference.sample(keys[0], (NUM_CHAINS,)), case.kernel)
    sampler, info = ebm.advance(keys[1], case.target.potential, sampler, NUM_BURN)
    _, trace = ebm.draw(keys[2], case.target.potential, sampler, NUM_DRAWS, num_steps=THIN)
    return trace.position, float(info.num_gradients.sum() + trace.num_gradients.sum())


def quadrature(key: Any, case: Case) -> tuple[Any, float]:
    return normalizer.quadrature(case.site), 0.0


def importance(key: Any, case: Case) -> tuple[Any, float]:
    return normalizer.flow_importance(key, case.site, case.reference, num_particles=NUM_PROPOSALS), 0.0


def annealed(key: Any, case: Case) -> tuple[Any, float]:
    found = normalizer.annealed_importance(
        key,
        case.site,
        reference=case.reference,
        kernel=case.kernel,
        num_particles=NUM_PARTICLES,
        num_temperatures=NUM_TEMPERATURES,
    )
    return found, float(found.num_gradients)


def tempered(key: Any, case: Case) -> tuple[Any, float]:
    options = {"reference": case.reference, "kernel": case.kernel, "num_particles": NUM_PARTICLES}
    found = normalizer.tempered_smc(key, case.site, **options)
    return found, float(found.num_gradients)


def bridge(key: Any, case: Case) -> tuple[Any, float]:
    draw_key, key = jax.random.split(key)
    samples, gradients = draws(draw_key, case)
    found = normalizer.bridge_sampling(key, case.site, samples)
    return found, gradients + float(found.num_gradients)


def fitted_flow(key: Any, case: Case) -> tuple[Any, float]:
    draw_key, make_key, fit_key, key = jax.random.split(key, 4)
    samples, gradients = draws(draw_key, case)
    dim = case.target.event_shape[0]
    flow = flows.RealNVP(dim, key=make_key, num_layers=6, width=64, depth=2)
    flow, _ = flows.fit_flow(fit_key, flow, samples.reshape(-1, dim), num_updates=2000)
    return normalizer.flow_importance(key, case.site, flow, num_particles=NUM_PROPOSALS), gradients


Method = Callable[[Any, Case], tuple[Any, float]]
METHODS: dict[str, Method] = {
    "`quadrature`": quadrature,
    "importance sampling from the wide normal": importance,
    "`annealed_importance`": annealed,
    "`tempered_smc`": tempered,
    "`bridge_sampling`, HMC draws": bridge,
    "`flow_importance`, RealNVP fitted to HMC draws": fitted_flow,
}


def fits(name: str, case: Case) -> bool:
    """Quadrature is for two dimensions at most."""
    return METHODS[name] is not quadrature or case.target.event_shape[0] <= 2


def judge(name: str, case: Case, replicates: int) -> dict[str, Any]:
    """Runs of one method on one target, compiled before."""
    key = jax.random.key(83)
    jax.block_until_ready(METHODS[name](key, case))
    errors, said, believed, gradients, seconds = [], [], [], [], []
    for replicate in range(replicates):
        begin = time.perf_counter()
        found, spent = jax.block_until_ready(METHODS[name](jax.random.fold_in(key, replicate), case))
        seconds.append(time.perf_counter() - begin)
        errors.append(float(found.value) - case.target.log_normalizer)
        said.append(float(found.standard_error))
        believed.append(bool(found.reliable))
        gradients.append(spent)
    off = ~(np.abs(errors) <= ERRORS * np.asarray(said) + TOLERATED) | ~np.isfinite(said)
    return {
        "root_mean_square_error": float(np.sqrt(np.mean(np.square(errors)))),
        "said": float(np.median(said)),
        "num_reliable": int(np.sum(believed)),
        "num_wrong_and_believed": int(np.sum(off & np.asarray(believed))),
        "replicates": replicates,
        "gradients": float(np.median(gradients)),
        "seconds": float(np.median(seconds)),
        "errors": np.round(errors, 4).tolist(),
    }


def number(value: float) -> str:
    """Three digits of an error; very small ones as such."""
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"


def table(done: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    head = ["energy", "method", "error, nat", "says, nat", "reliable", "wrong and believed", "gradients", "s"]
    rows = [head]
    for case in CASES:
        for name in METHODS:
            if (one := done.get(f"{case}/{name}")) is None:
                continue
            counts = [f"{one[what]} of {one['replicates']}" for what in ("num_reliable", "num_wrong_and_believed")]
            spent = [f"{one['gradients']:.1e}" if one["gradients"] else "0", f"{one['seconds']:.2g}"]
            rows.append([case, name, number(one["root_mean_square_error"]), number(one["said"]), *counts, *spent])
    return markdown(rows)


def run() -> dict[str, Any]:
    """Two runs of every method in two dimensions."""
    case = next(iter(CASES))
    found = {name.strip("`"): judge(name, CASES[case], 2) for name in METHODS}
    met = not any(one["num_wrong_and_believed"] for one in found.values())
    return {**found, "goal": "no estimate in two dimensions is wrong and believed", "met": met}


def main() -> None:
    path, options = recorder(__doc__, "choosing_normalizers", only="energies")
    cases = [
        (f"{case}/{name}", functools.partial(judge, name, CASES[case], REPLICATES))
        for case in CASES
        for name in METHODS
        if case.startswith(options.only) and fits(name, CASES[case])
    ]
    done = run_seeds(path, cases)
    (options.folder / "choosing_normalizers.inc").write_text(table(done))
    print(table(done))


if __name__ == "__main__":
    main()
