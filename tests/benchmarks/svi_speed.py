"""What an update inside NumPyro's SVI costs, ``SVI(handlers.negative_phase(model), ...)``, against one of ``fit``.

The same energy, rows, chains, kernel and optimizer. Every update sees all rows, so that neither draws a batch.
"""

import functools
from typing import Any

import jax
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.contrib.module import eqx_module
from numpyro.infer import SVI, Trace_ELBO

import ebm_ppl as ebm
from tests.benchmarks._paired import in_turns_with_fit, ratio
from tests.benchmarks.training_speed import MCMC_STEPS, STEP_SIZE

GOAL = 1.1
SIZES = {(64, 256): 100, (64, 4096): 20, (256, 256): 25}
"""Width of the network, chains and rows, and updates in one turn."""
TURNS = 15
BASE = dist.Normal(0.0, 1.0).expand([2]).to_event(1)


def compare(width: int, num_chains: int, chunk: int, turns: int = TURNS) -> dict[str, Any]:
    """The time of SVI over that of ``fit``."""
    net = ebm.potentials.MLP(2, key=jax.random.key(0), width=width, depth=2)
    rows = 0.5 * BASE.sample(jax.random.key(1), (num_chains,))
    kernel = ebm.kernels.mala(step_size=STEP_SIZE["mala"])

    def model(data: jax.Array) -> None:
        energy = eqx_module("net", net)
        with numpyro.plate("rows", len(data)):
            numpyro.sample("x", ebm.EBM(energy, BASE), obs=data)

    trained = ebm.handlers.negative_phase(model, kernel=kernel, num_chains=num_chains, num_steps=MCMC_STEPS)
    # The likelihood of all rows is their sum, the loss of fit their mean: Adam makes the same steps of both.
    svi = SVI(trained, lambda data: None, optax.adam(1e-3), Trace_ELBO())
    carried = svi.init(jax.random.key(2), rows)

    @jax.jit
    def updates(state: Any, data: jax.Array) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda state, _: svi.update(state, data), state, None, chunk)

    def by_svi() -> jax.Array:
        nonlocal carried
        carried, losses = updates(carried, rows)
        return losses

    optimizer = optax.adam(1e-3)
    sampler = ebm.init_sampler(BASE.sample(jax.random.key(3), (num_chains,)), kernel)
    seconds = in_turns_with_fit(
        {"svi": by_svi},
        jax.random.key(4),
        ebm.init_train(ebm.potentials.tilt(net, BASE), optimizer, sampler),
        rows,
        functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=MCMC_STEPS),
        optimizer,
        chunk=chunk,
        turns=turns,
    )
    return {"svi_over_fit": ratio(seconds["svi"], seconds["fit"])}


def run() -> dict:
    """Ratios of times, that of SVI over that of ``fit``."""
    found = {f"{width} wide, {chains} chains": compare(width, chains, n) for (width, chains), n in SIZES.items()}
    missed = [name for name, case in found.items() if case["svi_over_fit"]["median"] > GOAL]
    return {"goal": f"at most {GOAL} of the time of fit", "met": not missed, "missed": missed, **found}
