"""The compiled loop.

``fit`` runs chunks of ``report_every`` updates as one compiled loop whose length is an argument, so a run of any length
traces once and the host hears from the device once per chunk. Batches, keys and shuffles are functions of the base key
and the update's index alone: a run cut anywhere and resumed is the uninterrupted run.
"""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from tqdm import tqdm

from ebm_ppl.adaptation import check_target_acceptance, check_tunable_step
from ebm_ppl.checks import as_array, check_count, check_rows
from ebm_ppl.potentials import trainable
from ebm_ppl.sampling import advance, is_discrete_kernel
from ebm_ppl.training.batches import batch_rows, epoch_order, take_batch
from ebm_ppl.training.health import is_finite, is_healthy, training_failure, unhealthy, warn_of_new
from ebm_ppl.training.state import TrainState, check_energy, check_optimizer, train_step
from ebm_ppl.types import Array, Key, Metrics, Objective, PyTree, SamplerState


def fit(
    key: Key | None,
    state: TrainState,
    data: PyTree,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    batch_size: int | None = None,
    target_acceptance: float | None = None,
    report_every: int = 100,
    progress_bar: bool | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train a potential for ``num_steps`` updates.

    Rows are shuffled every epoch without replacement; the last incomplete batch of an epoch is left out. Update ``n`` is
    a function of ``key``, ``n`` and the state alone, so a run stopped anywhere and resumed with the same key and data is
    bit-identical to the uninterrupted one. ``objective`` and ``optimizer`` are compared by identity (a
    ``functools.partial`` by its contents): reuse the objects and nothing recompiles.

    Args:
        key: Base key of the run. ``None`` continues with the key of a state that was trained before.
        state: From :func:`init_train`, or from an earlier call.
        data: Rows ``(row, *event)``, or a pytree of such arrays.
        objective: For example ``functools.partial(objectives.persistent_contrastive_divergence, num_steps=10)``.
        optimizer: The transformation given to :func:`init_train`.
        num_steps: Updates to make.
        batch_size: Rows per update; all of them when ``None``.
        target_acceptance: When given, the kernel's step size follows this acceptance rate while the energy changes.
        report_every: Updates between two reports to the host: progress, and the check for non-finite numbers.
        progress_bar: Show energy gap and acceptance; ``None`` shows them on a terminal only.

    Returns:
        The trained state, and a history of ``(num_steps,)`` arrays, one per metric.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: empty, non-finite or out-of-support data (with count and first index), a batch larger than the data,
            a missing key, or a kernel whose acceptance cannot be followed.
        NonFiniteEnergyError: the energy is not finite at the data or at the chains.
        TrainingFailure: a loss, gradient, update or chain became non-finite; carries the step, the rows, the chains and
            the last good state.

    Warns:
        RuntimeWarning: within one report, when half of the chains have frozen (acceptance zero) or steps diverged.
            Training goes on; frozen negatives make every further update meaningless.

    Example:
        >>> import functools, jax, jax.numpy as jnp, numpyro.distributions as dist, optax, ebm_ppl as ebm
        >>> base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        >>> net = ebm.potentials.MLP(2, key=jax.random.key(0), width=16, depth=1)
        >>> potential = ebm.potentials.tilt(net, base)
        >>> data = 0.5 * base.sample(jax.random.key(1), (256,))
        >>> sampler = ebm.init_sampler(base.sample(jax.random.key(2), (64,)), ebm.kernels.mala(step_size=0.3))
        >>> optimizer = optax.adam(1e-2)
        >>> objective = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=5)
        >>> state = ebm.init_train(potential, optimizer, sampler)
        >>> state, history = fit(jax.random.key(3), state, data, objective, optimizer, num_steps=50, batch_size=64)
        >>> int(state.step), history["loss"].shape
        (50, (50,))
    """
    if not isinstance(state, TrainState):
        raise TypeError(f"state: got {type(state).__name__}, expected the result of ebm_ppl.init_train.")
    if not callable(objective):
        raise TypeError(f"objective: got {type(objective).__name__}, expected a function, see ebm_ppl.types.Objective.")
    num_steps, report_every = check_count("num_steps", num_steps), check_count("report_every", report_every)
    key = state.key if key is None else key
    if key is None:
        raise ValueError("key: got None with a state that was never trained, expected a random key.")
    _check_optimizer(state, optimizer)
    data = _check_data(state, data)
    num_rows = jax.tree.leaves(data)[0].shape[0]
    num_batch = num_rows if batch_size is None else check_count("batch_size", batch_size)
    if num_batch > num_rows:
        raise ValueError(f"batch_size: got {num_batch}, expected at most the {num_rows} rows of the data.")
    _check_players(key, state, data, target_acceptance)
    if isinstance(objective, functools.partial):
        # A fresh functools.partial equals nothing but itself and would recompile; jax's Partial compares by contents.
        objective = Partial(objective.func, *objective.args, **objective.keywords)

    run = functools.partial(
        _run_chunk,
        data=data,
        objective=objective,
        optimizer=optimizer,
        batch_size=num_batch,
        target_acceptance=target_acceptance,
        buffer_size=report_every,
    )
    state = state._replace(key=key)
    history: list[dict[str, np.ndarray]] = []
    first = int(state.step)
    known: set[str] = set()
    # tqdm's disable=None means "only on a terminal".
    with tqdm(total=num_steps, unit="update", disable=None if progress_bar is None else not progress_bar) as bar:
        for start in range(0, num_steps, report_every):
            wanted = jnp.asarray(min(report_every, num_steps - start), jnp.int32)
            chunk = run(key, state, wanted)
            made = int(chunk.made)
            history.append({name: np.asarray(values)[:made] for name, values in chunk.metrics.items()})
            if made < wanted:
                last_good = run(key, state, chunk.made).state if made else state
                order = epoch_order(jax.random.split(key)[0], last_good.step, num_rows, num_batch)
                rows = np.asarray(batch_rows(order, last_good.step, num_batch))
                raise training_failure(last_good, chunk.state, data, rows, _joined(history))
            state = chunk.state
            bar.update(made)
            bar.set_postfix_str(_progress(history[-1]))
            known |= warn_of_new(unhealthy(history[-1], first + start), known)
    return state, _joined(history)


class _Chunk(NamedTuple):
    state: TrainState
    made: Array
    metrics: dict[str, Array]


@eqx.filter_jit
def _run_chunk(
    key: Key,
    state: TrainState,
    wanted: Array,
    *,
    data: PyTree,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    target_acceptance: float | None,
    buffer_size: int,
) -> _Chunk:
    """Up to ``wanted`` updates, stopping after the first that is not finite; ``made`` counts those before it."""
    num_rows = jax.tree.leaves(data)[0].shape[0]
    arrays, static = eqx.partition(state, eqx.is_array)
    data_key, step_key = jax.random.split(key)

    def update(arrays: PyTree, order: Array) -> tuple[PyTree, Metrics]:
        state = eqx.combine(arrays, static)
        batch = take_batch(data, order, state.step, batch_size)
        update_key = jax.random.fold_in(step_key, state.step)
        state, metrics = train_step(state, batch, update_key, objective, optimizer, target_acceptance=target_acceptance)
        return eqx.filter(state, eqx.is_array), metrics

    def body(carry: tuple) -> tuple:
        made, _, arrays, order, buffers = carry
        # A new epoch's shuffle is drawn when its first batch is due, not every update: sorting costs.
        is_new = arrays.step % (num_rows // batch_size) == 0
        order = jax.lax.cond(is_new, lambda: epoch_order(data_key, arrays.step, num_rows, batch_size), lambda: order)
        arrays, metrics = update(arrays, order)
        healthy = is_finite((metrics["loss"], metrics["grad_norm"])) & is_healthy(eqx.combine(arrays, static))
        buffers = {name: values.at[made].set(metrics[name]) for name, values in buffers.items()}
        return made + healthy, healthy, arrays, order, buffers

    order = epoch_order(data_key, state.step, num_rows, batch_size)
    shapes = jax.eval_shape(lambda: update(arrays, order)[1])
    buffers = {name: jnp.zeros((buffer_size, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    start = (jnp.zeros((), jnp.int32), jnp.ones((), bool), arrays, order, buffers)
    made, _, arrays, _, buffers = jax.lax.while_loop(lambda c: c[1] & (c[0] < wanted), body, start)
    return _Chunk(eqx.combine(arrays, static), made, buffers)


def _check_optimizer(state: TrainState, optimizer: optax.GradientTransformation) -> None:
    check_optimizer(optimizer)
    expected = jax.eval_shape(optimizer.init, eqx.filter(state.potential, trainable(state.potential)))
    if jax.tree.structure(expected) != jax.tree.structure(state.optimizer_state):
        raise ValueError("optimizer: got another one than the state was made with, expected that given to init_train.")


def _check_data(state: TrainState, data: PyTree) -> PyTree:
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
    return jax.tree.unflatten(structure, leaves)


def _discrete_rows(sampler: SamplerState, data: Any) -> Any:
    """Whole numbers as floats where they are events of a discrete kernel."""
    if not is_discrete_kernel(sampler.kernel) or not isinstance(data, np.ndarray | jax.Array):
        return data
    return jnp.asarray(data, float) if jnp.issubdtype(data.dtype, jnp.integer) else data


def _check_players(key: Key, state: TrainState, data: PyTree, target_acceptance: float | None) -> None:
    if state.sampler is not None:
        ours, theirs = (jax.tree.map(lambda x: x.shape[1:], rows) for rows in (data, state.sampler.position))
        if ours != theirs:
            raise ValueError(f"data: got event shape {ours}, expected that of the chains, {theirs}.")
        check_energy("data", state.potential, data, what="row")
        check_energy("sampler", state.potential, state.sampler.position, what="chain")
    if target_acceptance is None:
        return
    check_target_acceptance("target_acceptance", target_acceptance)
    if state.sampler is None:
        raise ValueError("target_acceptance: got one with a state that has no sampler, expected None.")
    check_tunable_step(state.sampler)
    # One probing step: an unadjusted kernel has no acceptance, and following NaN would poison its step size.
    _, info = advance(jax.random.clone(key), state.potential, state.sampler, 1)
    if bool(jnp.isnan(info.acceptance_rate).any()):
        raise ValueError("target_acceptance: got one with a kernel that has no accept step, expected None.")


def _joined(history: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in history]) for name in history[0]}


def _progress(metrics: dict[str, np.ndarray]) -> str:
    shown = {"energy_gap": "energy gap", "acceptance_rate": "acceptance"}
    return ", ".join(f"{label} {metrics[name].mean():.3f}" for name, label in shown.items() if name in metrics)
