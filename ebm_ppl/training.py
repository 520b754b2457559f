"""The loop that plays the game between a potential and a sampler.

``fit`` runs chunks of ``report_every`` updates as one compiled loop whose length is an argument, so a run of any length
traces once and the host hears from the device once per chunk. Batches, keys and shuffles are functions of the base key
and the update's index alone: a run cut anywhere and resumed is the uninterrupted run.
"""

import functools
import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from tqdm import tqdm

from ebm_ppl.adaptation import check_target_acceptance, check_tunable_step, follow_target_acceptance, tunables
from ebm_ppl.checks import (
    as_array,
    check_count,
    check_finite_energy,
    check_potential,
    check_precision,
    check_rows,
    map_energy,
)
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.potentials import trainable
from ebm_ppl.sampling import advance
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
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected an optax.GradientTransformation.")
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
        _check_energy("potential", potential, sampler.position, what="chain")
    return TrainState(potential, sampler, optimizer.init(parameters), jnp.zeros((), jnp.int32), None)


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
        >>> import jax, jax.numpy as jnp, optax, ebm_ppl as ebm
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
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, optax, ebm_ppl as ebm
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
    unhealthy: set[str] = set()
    # tqdm's disable=None means "only on a terminal".
    with tqdm(total=num_steps, unit="update", disable=None if progress_bar is None else not progress_bar) as bar:
        for start in range(0, num_steps, report_every):
            wanted = jnp.asarray(min(report_every, num_steps - start), jnp.int32)
            chunk = run(key, state, wanted)
            made = int(chunk.made)
            history.append({name: np.asarray(values)[:made] for name, values in chunk.metrics.items()})
            if made < wanted:
                last_good = run(key, state, chunk.made).state if made else state
                raise _failure(key, last_good, chunk.state, data, num_batch, _joined(history))
            state = chunk.state
            bar.update(made)
            bar.set_postfix_str(_progress(history[-1]))
            unhealthy |= _warn_of_new(_unhealthy(history[-1], first + start), unhealthy)
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
        batch = _take_batch(data, order, state.step, batch_size)
        update_key = jax.random.fold_in(step_key, state.step)
        state, metrics = train_step(state, batch, update_key, objective, optimizer, target_acceptance=target_acceptance)
        return eqx.filter(state, eqx.is_array), metrics

    def body(carry: tuple) -> tuple:
        made, _, arrays, order, buffers = carry
        # A new epoch's shuffle is drawn when its first batch is due, not every update: sorting costs.
        is_new = arrays.step % (num_rows // batch_size) == 0
        order = jax.lax.cond(is_new, lambda: _epoch_order(data_key, arrays.step, num_rows, batch_size), lambda: order)
        arrays, metrics = update(arrays, order)
        healthy = _is_finite((metrics["loss"], metrics["grad_norm"])) & _is_healthy(eqx.combine(arrays, static))
        buffers = {name: values.at[made].set(metrics[name]) for name, values in buffers.items()}
        return made + healthy, healthy, arrays, order, buffers

    order = _epoch_order(data_key, state.step, num_rows, batch_size)
    shapes = jax.eval_shape(lambda: update(arrays, order)[1])
    buffers = {name: jnp.zeros((buffer_size, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    start = (jnp.zeros((), jnp.int32), jnp.ones((), bool), arrays, order, buffers)
    made, _, arrays, _, buffers = jax.lax.while_loop(lambda c: c[1] & (c[0] < wanted), body, start)
    return _Chunk(eqx.combine(arrays, static), made, buffers)


def _epoch_order(data_key: Key, step: Array, num_rows: int, batch_size: int) -> Array:
    if batch_size == num_rows:
        return jnp.arange(num_rows)
    return jax.random.permutation(jax.random.fold_in(data_key, step // (num_rows // batch_size)), num_rows)


def _take_batch(data: PyTree, order: Array, step: Array, batch_size: int) -> PyTree:
    if batch_size == order.shape[0]:
        return data
    rows = _batch_rows(order, step, batch_size)
    return jax.tree.map(lambda x: x[rows], data)


def _batch_rows(order: Array, step: Array, batch_size: int) -> Array:
    position = step % (order.shape[0] // batch_size)
    return jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)


def _is_finite(tree: PyTree) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves], bool).all()


def _is_healthy(state: TrainState) -> Array:
    """Finite parameters and chains. Constants of a potential may be infinite, and so may a dead particle's log weight."""
    healthy = _is_finite(eqx.filter(state.potential, trainable(state.potential)))
    if state.sampler is not None:
        healthy &= _is_finite(state.sampler.position) & ~jnp.isnan(state.sampler.log_weight).any()
    return healthy


def _check_optimizer(state: TrainState, optimizer: optax.GradientTransformation) -> None:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected an optax.GradientTransformation.")
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
        leaves = [check_rows("data", leaf, support=support) for leaf in leaves]
    counts = sorted({leaf.shape[0] for leaf in leaves})
    if len(counts) > 1:
        raise ValueError(f"data: got arrays of {counts} rows, expected one number of rows.")
    return jax.tree.unflatten(structure, leaves)


def _check_energy(name: str, potential: Potential, rows: PyTree, *, what: str) -> None:
    check_potential(potential, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows))
    check_finite_energy(name, potential, rows, what=what)


def _check_players(key: Key, state: TrainState, data: PyTree, target_acceptance: float | None) -> None:
    if state.sampler is not None:
        ours, theirs = (jax.tree.map(lambda x: x.shape[1:], rows) for rows in (data, state.sampler.position))
        if ours != theirs:
            raise ValueError(f"data: got event shape {ours}, expected that of the chains, {theirs}.")
        _check_energy("data", state.potential, data, what="row")
        _check_energy("sampler", state.potential, state.sampler.position, what="chain")
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


def _unhealthy(metrics: dict[str, np.ndarray], start: int) -> dict[str, str]:
    """What the host must hear about one report's worth of updates, by kind."""
    found = {}
    where = f"updates {start} to {start + len(metrics['loss']) - 1}"
    if "frozen_fraction" in metrics and (metrics["frozen_fraction"] >= 0.5).all():
        found["frozen"] = (
            f"{where}: {metrics['frozen_fraction'].mean():.0%} of the chains were frozen (acceptance rate zero), so the "
            "gradient is wrong. Use a smaller step size, tune it with ebm_ppl.tune_step_size, or pass target_acceptance "
            "to fit."
        )
    if "num_divergent" in metrics and metrics["num_divergent"].any():
        found["divergent"] = (
            f"{where}: {int(metrics['num_divergent'].sum())} chain phases diverged or became non-finite. Use a smaller "
            "step size."
        )
    return found


def _warn_of_new(found: dict[str, str], known: set[str]) -> set[str]:
    for kind in found.keys() - known:
        warnings.warn(found[kind], RuntimeWarning, stacklevel=3)
    return set(found)


def _failure(
    key: Key,
    state: TrainState,
    failed: TrainState,
    data: PyTree,
    batch_size: int,
    history: dict[str, np.ndarray],
) -> TrainingFailure:
    """Find what failed by looking again, on the host, at the last good state."""
    num_rows = jax.tree.leaves(data)[0].shape[0]
    step = int(state.step)
    data_key, _ = jax.random.split(key)
    rows = np.asarray(_batch_rows(_epoch_order(data_key, state.step, num_rows, batch_size), state.step, batch_size))
    bad_rows = rows[_non_finite_rows(state.potential, jax.tree.map(lambda x: x[rows], data))]
    bad_chains = np.zeros(0, int)
    if state.sampler is not None:
        bad_chains = np.flatnonzero(~np.isfinite(map_energy(state.potential, state.sampler.position)))
    parts = {"parameters": failed._replace(sampler=None), "chains": failed._replace(potential=())}
    broken = [name for name, part in parts.items() if not bool(_is_healthy(part))]
    message = (
        f"update {step} produced a non-finite {' and '.join(broken) or 'loss or gradient'}; training stopped before it. "
        f"Batch rows with a non-finite energy: {bad_rows.tolist()[:10] or 'none'}; chains: "
        f"{bad_chains.tolist()[:10] or 'none'}. "
        "The last good state is in `.state`. Usual remedies: a smaller learning rate or step size, gradient clipping "
        "(optax.clip_by_global_norm), an energy tilted by a base so that it cannot run away to minus infinity."
    )
    return TrainingFailure(message, step=step, state=state, rows=bad_rows, chains=bad_chains, history=history)


def _non_finite_rows(potential: Potential, rows: PyTree) -> np.ndarray:
    """Which rows have a non-finite energy; none where rows are not events of the potential, such as labelled data."""
    try:
        return ~np.isfinite(map_energy(potential, rows))
    except (TypeError, ValueError, IndexError):
        return np.zeros(jax.tree.leaves(rows)[0].shape[0], bool)


def _joined(history: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in history]) for name in history[0]}


def _progress(metrics: dict[str, np.ndarray]) -> str:
    shown = {"energy_gap": "energy gap", "acceptance_rate": "acceptance"}
    return ", ".join(f"{label} {metrics[name].mean():.3f}" for name, label in shown.items() if name in metrics)
