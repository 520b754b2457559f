"""A small training run in a process of its own, for tests that interrupt it: trains, saves, and says what it ended with.

``python -m tests.resumed_run DIRECTORY --updates 200 --report-every 10`` goes on from the last checkpoint in DIRECTORY, and
prints the SHA-256 of the final state.
"""

import argparse
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax

import ebm_ppl as ebm
from ebm_ppl.checkpoint.naming import named_leaves

OPTIMIZER = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(1e-2, 1_000)))
OBJECTIVE = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=3)
KEY = jax.random.key(3)


def fresh_state() -> ebm.TrainState:
    """A state with all that one can have: a base of several parameters, chains, a followed step size, an average."""
    net = ebm.potentials.MLP(2, key=jax.random.key(0), width=16, depth=2)
    base = dist.MixtureSameFamily(
        dist.Categorical(jnp.array([0.3, 0.7])),
        dist.Normal(jnp.array([[-1.0, 1.0], [-1.0, 1.0]]), jnp.array([[1.0, 2.0], [2.0, 3.0]])),
    ).to_event(1)
    sampler = ebm.init_sampler(jax.random.normal(jax.random.key(2), (16, 2)), ebm.kernels.mala(step_size=0.3))
    return ebm.init_train(ebm.potentials.tilt(net, base), OPTIMIZER, sampler, average_decay=0.99)


def data() -> jax.Array:
    """Rows that no batch size below divides."""
    return 0.5 * jax.random.normal(jax.random.key(1), (50, 2))


def train(state: ebm.TrainState, num_steps: int, *, report_every: int = 10, **options) -> ebm.TrainState:
    """``num_steps`` updates of the run; which they are, the state knows."""
    return ebm.fit(
        *(KEY, state, data(), OBJECTIVE, OPTIMIZER),
        num_steps=num_steps,
        batch_size=16,
        target_acceptance=0.6,
        report_every=report_every,
        **options,
    )[0]


def digest(state: ebm.TrainState) -> str:
    """SHA-256 of all leaves by name."""
    found = hashlib.sha256()
    for name, leaf in sorted(named_leaves(state).items()):
        is_key = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found.update(name.encode())
        found.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--report-every", type=int, default=10)
    parser.add_argument("--synchronous", action="store_true")
    arguments = parser.parse_args()
    state = fresh_state()
    with ebm.checkpoint.Checkpoints(arguments.directory, asynchronous=not arguments.synchronous) as checkpoints:
        if checkpoints.steps():
            state = checkpoints.restore(like=state)
        print("from", int(state.step), flush=True)
        if (left := arguments.updates - int(state.step)) > 0:
            state = train(state, left, report_every=arguments.report_every, save=checkpoints.save)
    print("ended", digest(state), flush=True)


if __name__ == "__main__":
    main()
