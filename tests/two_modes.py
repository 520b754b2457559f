"""Models of two modes on the line, trained in four ways, whose mode weights are known by quadrature.

The setting of the signature table of the diagnostics: modes at -2 and 2 of standard deviation .3, the left one with a
fifth of the mass. Contrastive training with local moves leaves the weights of the modes to chance; the exact gradient does
not.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax

import ebm_ppl as ebm
from ebm_ppl import kernels, objectives, potentials

BASE = dist.Normal(0.0, 2.0).expand([1]).to_event(1)
WEIGHT, NUM_ROWS, NUM_CHAINS, NUM_UPDATES = 0.2, 4000, 256, 2000
GRID = jnp.linspace(-10.0, 10.0, 801)[:, None]


class Trained(NamedTuple):
    """One model, its data, and the chains that training left."""

    potential: object
    rows: jax.Array
    position: jax.Array


def local():
    return kernels.mala(step_size=0.01)


def mixing():
    return kernels.global_local(kernels.isir(BASE, num_proposals=32), local(), num_local=4)


def draw_rows(key, num_rows=NUM_ROWS):
    side_key, noise_key = jax.random.split(key)
    side = jnp.where(jax.random.uniform(side_key, (num_rows, 1)) < WEIGHT, -2.0, 2.0)
    return side + 0.3 * jax.random.normal(noise_key, (num_rows, 1))


def log_normalizer(potential):
    return jax.nn.logsumexp(-jax.vmap(potential)(GRID)) + jnp.log(GRID[1, 0] - GRID[0, 0])


@eqx.filter_jit
def left_weight(potential):
    """Mass of the model left of zero."""
    return jnp.sum(jnp.where(GRID[:, 0] < 0, jax.nn.softmax(-jax.vmap(potential)(GRID)), 0.0))


@eqx.filter_jit
def negative_log_likelihood(potential, rows):
    return jnp.mean(jax.vmap(potential)(rows)) + log_normalizer(potential)


def _exact(potential, sampler, batch, key):
    return jnp.mean(jax.vmap(potential)(batch)) + log_normalizer(potential), (sampler, {})


def _from_noise(potential, sampler, batch, key):
    start, run = jax.random.split(key)
    fresh = sampler._replace(position=BASE.sample(start, (NUM_CHAINS,)))
    return objectives.persistent_contrastive_divergence(potential, fresh, batch, run, num_steps=10)


OBJECTIVES = {
    "pcd": functools.partial(objectives.persistent_contrastive_divergence, num_steps=10),
    "noise": _from_noise,
    "exact": _exact,
}


@functools.partial(eqx.filter_jit, donate="none")
def train(key, how, num_updates=NUM_UPDATES):
    """Train one model; ``jax.vmap`` over keys trains many."""
    row_key, net_key, run_key = jax.random.split(key, 3)
    rows = draw_rows(row_key)
    network = potentials.tilt(potentials.MLP(1, key=net_key, width=32, depth=2), BASE)
    sampler = ebm.init_sampler(rows[:NUM_CHAINS], local())
    optimizer = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(5e-3, num_updates)))
    trainable, fixed = eqx.partition(network, eqx.is_inexact_array)
    kernel = sampler.kernel

    def update(carry, key):
        trainable, state, position = carry
        batch_key, step_key = jax.random.split(key)
        batch = rows if how == "exact" else rows[jax.random.randint(batch_key, (256,), 0, NUM_ROWS)]

        def loss(trainable):
            now = ebm.sampling.chains_at(position, kernel)
            return OBJECTIVES[how](eqx.combine(trainable, fixed), now, batch, step_key)

        gradient, (after, _) = jax.grad(loss, has_aux=True)(trainable)
        step, state = optimizer.update(gradient, state, trainable)
        return (optax.apply_updates(trainable, step), state, after.position), None

    carry = trainable, optimizer.init(trainable), sampler.position
    (trainable, _, position), _ = jax.lax.scan(update, carry, jax.random.split(run_key, num_updates))
    return eqx.combine(trainable, fixed), rows, position


def train_many(keys, how, num_updates=NUM_UPDATES):
    """A list of :class:`Trained`, one per key."""
    potential, rows, position = eqx.filter_vmap(lambda key: train(key, how, num_updates))(keys)
    arrays, rest = eqx.partition(potential, eqx.is_array)

    def one(i):
        return Trained(eqx.combine(jax.tree.map(lambda x: x[i], arrays), rest), rows[i], position[i])

    return [one(i) for i in range(len(keys))]
