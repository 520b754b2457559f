"""One update of the game: the sampler moves, the potential follows its objective, and the sampler, if trained, its own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ebm_ppl.adaptation import follow_target_acceptance, tunables
from ebm_ppl.potentials import trainable
from ebm_ppl.sampling import temperature_of
from ebm_ppl.training.state import Average, TrainState
from ebm_ppl.types import Array, Batch, Key, Metrics, Objective, PyTree

_PLAYER = 0x7FFFFFFF
"""Folded into the key of an update for its second player. ``fold_in(key, i)`` is ``split(key, n)[i]``, and the first player
has split the key already: a small number would give both the same noise."""


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    sampler_objective: Objective | None = None,
    sampler_optimizer: optax.GradientTransformation | None = None,
    target_acceptance: float | None = None,
) -> tuple[TrainState, Metrics]:
    """One update: the sampler moves, the potential follows the objective's gradient, the sampler follows its own.

    Pure and traceable; :func:`fit` scans it, and you may put it in a loop of your own.

    Args:
        state: The training state.
        batch: Rows of this update.
        key: Random key of this update.
        objective: A plain function, see :class:`ebm_ppl.types.Objective`.
        optimizer: The transformation given to :func:`init_train`.
        sampler_objective: The other player's: the same signature, differentiated in the floating arrays of the sampler's
            kernel, with the updated potential and the moved chains.
        sampler_optimizer: The transformation given to :func:`init_train` for it.
        target_acceptance: When given, the kernel's step size follows this acceptance rate between updates.

    Returns:
        The next state and the objective's metrics with ``loss``, ``grad_norm`` and, where there is one, ``step_size`` and
        the kernel's implied ``temperature``; the sampler objective's metrics follow with the prefix ``sampler_``.

    Example:
        >>> import functools, jax, jax.numpy as jnp, optax, ebm_ppl as ebm
        >>> net = ebm.potentials.MLP(2, key=jax.random.key(0), width=8, depth=1)
        >>> optimizer = optax.adam(1e-3)
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.1))
        >>> state = ebm.init_train(net, optimizer, sampler)
        >>> objective = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=2)
        >>> state, metrics = train_step(state, jnp.ones((4, 2)), jax.random.key(1), objective, optimizer)
        >>> int(state.step)
        1
    """

    def potential_loss(potential: Any) -> tuple[Array, tuple[Any, Metrics]]:
        return objective(potential, state.sampler, batch, key)

    potential, optimizer_state, (sampler, metrics) = _descend(
        potential_loss, state.potential, state.optimizer_state, optimizer
    )
    if sampler_objective is not None:
        assert sampler_optimizer is not None  # fit says so in words
        moved, sampler_key = sampler, jax.random.fold_in(key, _PLAYER)

        def kernel_loss(kernel: Any) -> tuple[Array, tuple[Any, Metrics]]:
            return sampler_objective(potential, moved._replace(kernel=kernel), batch, sampler_key)

        kernel, sampler_optimizer_state, (sampler, found) = _descend(
            kernel_loss, moved.kernel, state.sampler_optimizer_state, sampler_optimizer
        )
        sampler = sampler._replace(kernel=kernel)
        state = state._replace(sampler_optimizer_state=sampler_optimizer_state)
        metrics |= {f"sampler_{name}": value for name, value in found.items()}
    if sampler is not None and "step_size" in tunables(sampler):
        metrics["step_size"] = jnp.mean(tunables(sampler)["step_size"])
    if sampler is not None and (temperature := temperature_of(sampler)) is not None:
        metrics["temperature"] = temperature
    if target_acceptance is not None:
        if sampler is None or "acceptance_rate" not in metrics:
            raise ValueError(
                "target_acceptance: got one with an objective that reports no acceptance rate, expected None."
            )
        sampler = follow_target_acceptance(sampler, metrics["acceptance_rate"], target_acceptance)
    state = state._replace(
        potential=potential,
        sampler=sampler,
        optimizer_state=optimizer_state,
        step=state.step + 1,
        average=_averaged(state, potential),
    )
    return state, metrics


def _descend(
    loss_fn: Any, player: PyTree, optimizer_state: PyTree, optimizer: optax.GradientTransformation
) -> tuple[PyTree, PyTree, tuple[Any, Metrics]]:
    """One step of one player down its loss, and the metrics with ``loss`` and ``grad_norm``."""
    parameters, rest = eqx.partition(player, trainable(player))

    def loss_of(parameters: PyTree) -> tuple[Array, tuple[Any, Metrics]]:
        return loss_fn(eqx.combine(parameters, rest))

    (loss, (sampler, metrics)), gradient = jax.value_and_grad(loss_of, has_aux=True)(parameters)
    # Some optimizers adapt to the value of the loss; the others ignore it.
    update = optax.with_extra_args_support(optimizer).update
    updates, optimizer_state = update(gradient, optimizer_state, parameters, value=loss)
    player = eqx.combine(eqx.apply_updates(parameters, updates), rest)
    return player, optimizer_state, (sampler, {**metrics, "loss": loss, "grad_norm": optax.tree.norm(gradient)})


def _averaged(state: TrainState, potential: PyTree) -> Average | None:
    if state.average is None:
        return None
    decay, average = state.average
    # A young average would otherwise be mostly the starting point.
    weight = 1.0 - jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
    parameters = eqx.filter(potential, trainable(potential))
    blended = jax.tree.map(lambda old, new: old + (weight * (new - old)).astype(old.dtype), average, parameters)
    return Average(decay, blended)
