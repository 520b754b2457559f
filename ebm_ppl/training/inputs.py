"""What :func:`ebm_ppl.fit` is given, checked before anything compiles, and its data as chunks of batches."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebm_ppl.adaptation import check_target_acceptance, check_tunable_step
from ebm_ppl.checks import as_array, check_count, check_rows
from ebm_ppl.meshes import num_parts
from ebm_ppl.potentials import trainable
from ebm_ppl.sampling import advance, is_discrete_kernel
from ebm_ppl.training.batches import Batches, LoadedBatches, ShuffledRows, batches_of, is_loader
from ebm_ppl.training.state import TrainState, check_energy, check_optimizer
from ebm_ppl.types import Array, Key, Objective, PyTree, SamplerState


def chunks_of(
    state: TrainState, data: Any, batch_size: int | None, num_steps: int, report_every: int
) -> Iterator[tuple[Batches, int]]:
    """Batches for one chunk after the other, and for how many updates each of them lasts.

    Raises:
        TypeError: the data are no arrays of numbers.
        ValueError: the data are empty, not finite, outside the support, or of another shape than the chains; a batch
            size that does not fit.
        NonFiniteEnergyError: the energy is not finite at a row.
    """
    if is_loader(data):
        if batch_size is not None:
            raise ValueError(
                f"batch_size: got {batch_size} with a loader, expected None: its batches are what they are."
            )
        return _loaded(state, data, num_steps, report_every)
    data = _check_data(state, data)
    num_rows = jax.tree.leaves(data)[0].shape[0]
    size = num_rows if batch_size is None else check_count("batch_size", batch_size)
    if size > num_rows:
        raise ValueError(f"batch_size: got {size}, expected at most the {num_rows} rows of the data.")
    if size % (parts := num_parts(state, data)):
        raise ValueError(f"batch_size: got {size} rows for {parts} devices, expected a multiple of {parts}.")
    return itertools.repeat((ShuffledRows(data, size), num_steps))


def _loaded(
    state: TrainState, loader: Iterable[Any], num_steps: int, report_every: int
) -> Iterator[tuple[Batches, int]]:
    batches = batches_of(loader)
    first, left = int(state.step), num_steps
    while some := list(itertools.islice(batches, min(report_every, left))):
        rows = _check_data(state, jax.tree.map(lambda *parts: np.concatenate(parts), *some))
        # Padded, so that a last and shorter chunk has the shape that was compiled.
        stacked = jax.tree.map(functools.partial(_stacked, len(some), report_every), rows)
        yield LoadedBatches(stacked, jnp.asarray(first, jnp.int32)), len(some)
        first, left = first + len(some), left - len(some)


def _stacked(num_batches: int, num_padded: int, rows: Array) -> Array:
    """Concatenated rows as batches, the last of them repeated: ``(num_padded, row, *event)``."""
    batches = rows.reshape(num_batches, -1, *rows.shape[1:])
    return jnp.concatenate([batches, jnp.repeat(batches[-1:], num_padded - num_batches, axis=0)])


def check_players(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    sampler_objective: Objective | None,
    sampler_optimizer: optax.GradientTransformation | None,
) -> None:
    """Optimizers must be those of the state, and a sampler's objective and optimizer come together.

    Raises:
        TypeError: an optimizer or objective is not one.
        ValueError: one of the two is missing, or another one than the state was made with.
    """
    _check_optimizer("optimizer", optimizer, state.potential, state.optimizer_state)
    if sampler_objective is None and sampler_optimizer is None:
        return
    if not callable(sampler_objective):
        raise TypeError(
            f"sampler_objective: got {type(sampler_objective).__name__} with a sampler_optimizer, expected a function, "
            "see ebm_ppl.types.Objective."
        )
    if state.sampler_optimizer_state is None:
        raise ValueError(
            "sampler_objective: got one with a state that was made without, expected init_train(..., "
            "sampler_optimizer=...)."
        )
    _check_optimizer("sampler_optimizer", sampler_optimizer, state.sampler.kernel, state.sampler_optimizer_state)


def _check_optimizer(name: str, optimizer: Any, player: PyTree, optimizer_state: PyTree) -> None:
    check_optimizer(name, optimizer)
    # Through a function of its own: what JAX traced for one that lives on is kept, anew for each call.
    expected = jax.eval_shape(lambda player: optimizer.init(player), eqx.filter(player, trainable(player)))
    if jax.tree.structure(expected) != jax.tree.structure(optimizer_state):
        raise ValueError(f"{name}: got another one than the state was made with, expected that given to init_train.")


def check_acceptance_can_be_followed(key: Key, state: TrainState, target_acceptance: float) -> None:
    """The sampler must have a step size and an accept step.

    Raises:
        ValueError: it has not, or the target is not an acceptance rate.
    """
    check_target_acceptance("target_acceptance", target_acceptance)
    if state.sampler is None:
        raise ValueError("target_acceptance: got one with a state that has no sampler, expected None.")
    check_tunable_step(state.sampler)
    # One probing step: an unadjusted kernel has no acceptance, and following NaN would poison its step size.
    _, info = advance(jax.random.clone(key), state.potential, state.sampler, 1)
    if bool(jnp.isnan(info.acceptance_rate).any()):
        raise ValueError("target_acceptance: got one with a kernel that has no accept step, expected None.")


def _check_data(state: TrainState, data: PyTree) -> PyTree:
    """Rows that the energy, and the chains if there are any, can be compared with."""
    leaves, structure = jax.tree.flatten(data)
    if not leaves:
        raise ValueError("data: got no arrays, expected rows of shape (row, *event).")
    if state.sampler is None:
        # Rows are whatever a sampler-free objective makes of them, integer labels included.
        leaves = [as_array("data", leaf) for leaf in leaves]
        leaves = [check_rows("data", x) if jnp.issubdtype(x.dtype, jnp.inexact) or not x.size else x for x in leaves]
    else:
        support = getattr(state.potential, "support", None) if len(leaves) == 1 else None
        leaves = [_discrete_rows(state.sampler, leaf) for leaf in leaves]
        leaves = [check_rows("data", leaf, support=support) for leaf in leaves]
    counts = sorted({leaf.shape[0] for leaf in leaves})
    if len(counts) > 1:
        raise ValueError(f"data: got arrays of {counts} rows, expected one number of rows.")
    data = jax.tree.unflatten(structure, leaves)
    if state.sampler is not None:
        ours, theirs = (jax.tree.map(lambda x: x.shape[1:], rows) for rows in (data, state.sampler.position))
        if ours != theirs:
            raise ValueError(f"data: got event shape {ours}, expected that of the chains, {theirs}.")
        check_energy("data", state.potential, data, what="row")
        check_energy("sampler", state.potential, state.sampler.position, what="chain")
    return data


def _discrete_rows(sampler: SamplerState, data: Any) -> Any:
    """Whole numbers as floats where they are events of a discrete kernel."""
    if not is_discrete_kernel(sampler.kernel) or not isinstance(data, np.ndarray | jax.Array):
        return data
    return jnp.asarray(data, float) if jnp.issubdtype(data.dtype, jnp.integer) else data
