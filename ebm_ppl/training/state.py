"""What training carries, and one update of it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ebm_ppl.adaptation import follow_target_acceptance, tunables
from ebm_ppl.checks import check_finite_energy, check_potential, check_precision
from ebm_ppl.potentials import trainable
from ebm_ppl.types import Array, Batch, Key, Metrics, Objective, Potential, PyTree, SamplerState


class TrainState(NamedTuple):
    """Everything training carries: one pytree, one checkpoint.

    Attributes:
        potential: The energy being trained.
        sampler: The sampler player, or ``None`` for sampler-free objectives.
        optimizer_state: Of the potential's optimizer.
        step: Updates made so far.
        key: Base key of the run, from which every shuffle and every update's key follow. ``None`` before the first
            :func:`fit`.
    """

    potential: Potential
    sampler: Any  # SamplerState | None: which of the two is known where the state was made
    optimizer_state: PyTree
    step: Array
    key: Key | None


def init_train(
    potential: Potential, optimizer: optax.GradientTransformation, sampler: SamplerState | None = None
) -> TrainState:
    """The state at the start of training.

    Args:
        potential: Energy of one event, with its base: :func:`ebm_ppl.potentials.tilt`.
        optimizer: An optax transformation, for the potential's trainable parameters.
        sampler: From :func:`ebm_ppl.init_sampler`, for objectives that need negatives.

    Returns:
        A :class:`TrainState` at step 0.

    Raises:
        TypeError: ``potential`` is not callable, has 64-bit parameters in a 32-bit session, or ``optimizer`` is not one.
        ValueError: ``potential`` has nothing to train, or does not fit the sampler's events.
        NonFiniteEnergyError: the energy is not finite at the starting chains.

    Example:
        >>> import jax, jax.numpy as jnp, optax, ebm_ppl as ebm
        >>> net = ebm.potentials.MLP(2, key=jax.random.key(0), width=8, depth=1)
        >>> int(init_train(net, optax.adam(1e-3)).step)
        0
    """
    check_optimizer(optimizer)
    if not callable(potential):
        raise TypeError(f"potential: got {type(potential).__name__}, expected a callable energy of one event.")
    check_precision("potential", potential)
    parameters = eqx.filter(potential, trainable(potential))
    if not jax.tree.leaves(parameters):
        raise ValueError(
            "potential: has no trainable parameters, expected a callable pytree with floating arrays: an equinox.Module "
            "or jax.tree_util.Partial(function, parameters). Parameters captured in a closure cannot be trained."
        )
    if sampler is not None:
        check_energy("potential", potential, sampler.position, what="chain")
    return TrainState(potential, sampler, optimizer.init(parameters), jnp.zeros((), jnp.int32), None)


def check_optimizer(optimizer: Any) -> None:
    """An optax transformation.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected an optax.GradientTransformation.")


def check_energy(name: str, potential: Potential, rows: PyTree, *, what: str) -> None:
    """The energy must fit these rows as events and be finite at each of them.

    Raises:
        TypeError: the energy is not a real floating one.
        ValueError: the energy does not fit one of the rows.
        NonFiniteEnergyError: it is not finite at some row.
    """
    check_potential(potential, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows))
    check_finite_energy(name, potential, rows, what=what)


def train_step(
    state: TrainState,
    batch: Batch,
    key: Key,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    target_acceptance: float | None = None,
) -> tuple[TrainState, Metrics]:
    """One update: the sampler moves, the potential follows the objective's gradient.

    Pure and traceable; :func:`fit` scans it, and you may put it in a loop of your own.

    Args:
        state: The training state.
        batch: Rows of this update.
        key: Random key of this update.
        objective: A plain function, see :class:`ebm_ppl.types.Objective`.
        optimizer: The transformation given to :func:`init_train`.
        target_acceptance: When given, the kernel's step size follows this acceptance rate between updates.

    Returns:
        The next state and the objective's metrics with ``loss``, ``grad_norm`` and, where there is one, ``step_size``.

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
    parameters, rest = eqx.partition(state.potential, trainable(state.potential))

    def loss_fn(parameters: PyTree) -> tuple[Array, tuple[SamplerState | None, Metrics]]:
        return objective(eqx.combine(parameters, rest), state.sampler, batch, key)

    (loss, (sampler, metrics)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(parameters)
    # Some optimizers adapt to the value of the loss; the others ignore it.
    update = optax.with_extra_args_support(optimizer).update
    updates, optimizer_state = update(gradient, state.optimizer_state, parameters, value=loss)
    parameters = eqx.apply_updates(parameters, updates)
    metrics = {**metrics, "loss": loss, "grad_norm": optax.tree.norm(gradient)}
    if sampler is not None and "step_size" in tunables(sampler):
        metrics["step_size"] = jnp.mean(tunables(sampler)["step_size"])
    if target_acceptance is not None:
        if sampler is None or "acceptance_rate" not in metrics:
            raise ValueError(
                "target_acceptance: got one with an objective that reports no acceptance rate, expected None."
            )
        sampler = follow_target_acceptance(sampler, metrics["acceptance_rate"], target_acceptance)
    potential = eqx.combine(parameters, rest)
    return TrainState(potential, sampler, optimizer_state, state.step + 1, state.key), metrics
