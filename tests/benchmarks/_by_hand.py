"""Persistent contrastive divergence written by hand in plain JAX, as little as it takes: what ``fit`` is measured against.

One scan over updates, a loop over Langevin steps inside, noise for all chains at once, Adam. Energies are written for one
event and mapped. Rows are shuffled every epoch without replacement, as ``fit`` does it. Nothing is checked or reported
but the loss.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

Parameters = Any
Energy = Callable[[Parameters, jax.Array], jax.Array]


def mlp_energy(parameters: Parameters, event: jax.Array) -> jax.Array:
    """A perceptron under a standard normal base: ``|x|^2 / 2 + w . h(x)``."""
    *layers, head = parameters
    hidden = event
    for weight, bias in layers:
        hidden = jax.nn.silu(weight @ hidden + bias)
    return head @ hidden + 0.5 * jnp.sum(event**2)


def conv_energy(parameters: Parameters, event: jax.Array) -> jax.Array:
    """Strided 3x3 convolutions of one image, a dense layer and a linear head, under a standard normal base."""
    convolutions, (weight, bias), head = parameters
    hidden = event[None, None]
    for kernel, shift in convolutions:
        hidden = jax.nn.silu(jax.lax.conv_general_dilated(hidden, kernel, (2, 2), ((1, 1), (1, 1))) + shift)
    return head @ jax.nn.silu(weight @ hidden.reshape(-1) + bias) + 0.5 * jnp.sum(event**2)


def mlp_parameters(net: Any) -> Parameters:
    """The weights of :class:`ebm_ppl.potentials.MLP`, in the form of :func:`mlp_energy`."""
    return [*((layer.weight, layer.bias) for layer in net.layers), net.head.weight[0]]


def conv_parameters(net: Any) -> Parameters:
    """The weights of :class:`ebm_ppl.potentials.Conv`, in the form of :func:`conv_energy`."""
    convolutions = [(layer.weight, layer.bias) for layer in net.convolutions]
    return convolutions, (net.dense.weight, net.dense.bias), net.head.weight[0]


class Loop(NamedTuple):
    """What is carried from update to update."""

    parameters: Parameters
    optimizer_state: Any
    chains: jax.Array
    key: jax.Array
    order: jax.Array
    step: jax.Array


def begin(
    key: jax.Array, parameters: Parameters, chains: jax.Array, rows: jax.Array, optimizer: optax.GradientTransformation
) -> Loop:
    """The state before the first update; it owns its arrays."""
    parameters = jax.tree.map(jnp.copy, parameters)
    order = jnp.arange(rows.shape[0])
    return Loop(parameters, optimizer.init(parameters), jnp.copy(chains), key, order, jnp.zeros((), jnp.int32))


def ula(key: jax.Array, energy: Energy, parameters: Parameters, chains: jax.Array, num_steps: int, step_size: float):
    """``num_steps`` unadjusted Langevin steps: as many gradients."""
    slopes = jax.vmap(jax.grad(energy, argnums=1), in_axes=(None, 0))

    def body(i: jax.Array, x: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape)
        return x - step_size * slopes(parameters, x) + jnp.sqrt(2.0 * step_size) * noise

    return jax.lax.fori_loop(0, num_steps, body, chains)


def mala(key: jax.Array, energy: Energy, parameters: Parameters, chains: jax.Array, num_steps: int, step_size: float):
    """``num_steps`` Metropolis-adjusted Langevin steps: as many gradients and one at the start."""
    evaluate = jax.vmap(jax.value_and_grad(energy, argnums=1), in_axes=(None, 0))
    num_chains = chains.shape[0]

    def square(x: jax.Array) -> jax.Array:
        return jnp.sum(x.reshape(num_chains, -1) ** 2, axis=1)

    def body(i: jax.Array, carry: tuple) -> tuple:
        x, u, slope = carry
        noise_key, accept_key = jax.random.split(jax.random.fold_in(key, i))
        noise = jax.random.normal(noise_key, x.shape)
        new_x = x - step_size * slope + jnp.sqrt(2.0 * step_size) * noise
        new_u, new_slope = evaluate(parameters, new_x)
        back = square(x - new_x + step_size * new_slope) / (4.0 * step_size)
        log_ratio = u - new_u + 0.5 * square(noise) - back
        accept = jnp.log(jax.random.uniform(accept_key, (num_chains,))) < log_ratio
        wide = accept.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(wide, new_x, x), jnp.where(accept, new_u, u), jnp.where(wide, new_slope, slope)

    return jax.lax.fori_loop(0, num_steps, body, (chains, *evaluate(parameters, chains)))[0]


MOVES = {"ula": ula, "mala": mala}


def descend(
    energy: Energy,
    optimizer: optax.GradientTransformation,
    parameters: Parameters,
    optimizer_state: Any,
    batch: jax.Array,
    negatives: jax.Array,
) -> tuple[Parameters, Any, jax.Array]:
    """One step down ``mean U(batch) - mean U(negatives)``."""

    def loss_of(parameters: Parameters) -> jax.Array:
        energies = jax.vmap(energy, in_axes=(None, 0))
        return energies(parameters, batch).mean() - energies(parameters, negatives).mean()

    loss, gradient = jax.value_and_grad(loss_of)(parameters)
    updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
    return optax.apply_updates(parameters, updates), optimizer_state, loss


@functools.partial(
    jax.jit, static_argnames=("energy", "optimizer", "move", "num_updates", "num_steps", "step_size", "batch_size")
)
def train(
    loop: Loop,
    rows: jax.Array,
    *,
    energy: Energy,
    optimizer: optax.GradientTransformation,
    move: str,
    num_updates: int,
    num_steps: int,
    step_size: float,
    batch_size: int,
) -> tuple[Loop, jax.Array]:
    """``num_updates`` updates, and the loss of each."""
    per_epoch = rows.shape[0] // batch_size

    def update(loop: Loop, _: None) -> tuple[Loop, jax.Array]:
        key, order_key, move_key = jax.random.split(loop.key, 3)
        place = loop.step % per_epoch
        order = jax.lax.cond(place == 0, lambda: jax.random.permutation(order_key, rows.shape[0]), lambda: loop.order)
        batch = rows[jax.lax.dynamic_slice_in_dim(order, place * batch_size, batch_size)]
        chains = MOVES[move](move_key, energy, loop.parameters, loop.chains, num_steps, step_size)
        parameters, optimizer_state, loss = descend(
            energy, optimizer, loop.parameters, loop.optimizer_state, batch, chains
        )
        return Loop(parameters, optimizer_state, chains, key, order, loop.step + 1), loss

    return jax.lax.scan(update, loop, None, num_updates)


@eqx.filter_jit
def bare_gradients(potential: Callable[[jax.Array], jax.Array], chains: jax.Array, num_gradients: int) -> jax.Array:
    """Nothing but gradients of an energy in the chains, one after the other; each moves them, so that none is dropped."""
    slopes = jax.vmap(jax.grad(potential))
    return jax.lax.fori_loop(0, num_gradients, lambda _, x: x - 1e-3 * slopes(x), chains)
