"""The compiled loop.

``fit`` runs chunks of ``report_every`` updates as one compiled loop whose length is an argument, so a run of any length
traces once and the host hears from the device once per chunk. Batches, keys and shuffles are functions of the base key
and the update's index alone: a run cut anywhere and resumed is the uninterrupted run.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ebm_ppl.checks import check_count
from ebm_ppl.partials import comparable
from ebm_ppl.training.batches import Batches
from ebm_ppl.training.health import has_walls, is_finite, is_healthy, training_failure, unhealthy, warn_of_new
from ebm_ppl.training.inputs import check_acceptance_can_be_followed, check_players, chunks_of
from ebm_ppl.training.saving import Interruptions, Saver, training_interrupted
from ebm_ppl.training.state import TrainState, check_short_runs
from ebm_ppl.training.step import train_step
from ebm_ppl.training.stopping import BestSoFar, EarlyStopping, Evaluate, check_listeners, evaluated
from ebm_ppl.types import Array, Key, Metrics, Objective, PyTree


def fit(
    key: Key | None,
    state: TrainState,
    data: PyTree,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    sampler_objective: Objective | None = None,
    sampler_optimizer: optax.GradientTransformation | None = None,
    num_steps: int,
    batch_size: int | None = None,
    target_acceptance: float | None = None,
    evaluate: Evaluate | None = None,
    early_stopping: EarlyStopping | None = None,
    report_every: int = 100,
    save: Callable[[TrainState], Any] | None = None,
    save_every: int | None = None,
    progress_bar: bool | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train a potential, and where it learns too its sampler, for ``num_steps`` updates.

    In every update the potential's ``objective`` moves the sampler and gives the potential's gradient; then the
    ``sampler_objective``, if there is one, gives that of the sampler's kernel, at the updated potential.

    Rows are shuffled every epoch without replacement; the last incomplete batch of an epoch is left out. Update ``n`` is
    a function of ``key``, ``n`` and the state alone, so a run stopped anywhere and resumed with the same key and data is
    bit-identical to the uninterrupted one. ``objective`` and ``optimizer`` are compared by identity (a
    ``functools.partial`` by its contents): reuse the objects and nothing recompiles. A loader is asked for its batches in
    order, whatever the key, and a resumed run starts it anew.

    Args:
        key: Base key of the run. ``None`` continues with the key of a state that was trained before.
        state: From :func:`init_train`, or from an earlier call.
        data: Rows ``(row, *event)``, or a pytree of such arrays; or a loader, any other iterable of such batches (a
            ``torch`` or ``grain`` loader): its batches must be of one size, a smaller last one of an epoch is left out,
            ``report_every`` of them are in memory at a time, and it is started again when it runs out.
        objective: For example ``functools.partial(objectives.persistent_contrastive_divergence, num_steps=10)``.
        optimizer: The transformation given to :func:`init_train`.
        sampler_objective: The other player's: the same signature, differentiated in the floating arrays of the sampler's
            kernel. A flow is refit by the negative log density of the chains under it.
        sampler_optimizer: The transformation given to :func:`init_train` for it.
        num_steps: Updates to make.
        batch_size: Rows per update; all of them when ``None``. Loaders decide it themselves.
        target_acceptance: When given, the kernel's step size follows this acceptance rate while the energy changes.
        evaluate: Called with the state after every report; what it returns, numbers by name, enters the history.
        early_stopping: When to stop before ``num_steps``; the best state is returned then.
        report_every: Updates between two reports to the host: progress, evaluation, and the check for non-finite numbers.
        save: Called with the state between updates, such as the ``save`` of :class:`ebm_ppl.checkpoint.Checkpoints`: after
            a report, at the end, and before a failure or an interruption is raised, with the last good state.
        save_every: Updates after which the next report saves; every report does when ``None``.
        progress_bar: Show energy gap and acceptance; ``None`` shows them on a terminal only.

    Returns:
        The trained state, and a history of ``(num_steps,)`` arrays, one per metric; evaluations have one entry per report,
        named ``evaluation_...``, and ``evaluation_step`` says after how many updates. ``diagnostics.to_datatree`` puts it
        into the ``training`` group.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: empty, non-finite or out-of-support data (with count and first index), a batch larger than the data,
            a missing key, or a kernel whose acceptance cannot be followed.
        NonFiniteEnergyError: the energy is not finite at the data or at the chains.
        TrainingFailure: a loss, gradient, update or chain became non-finite; carries the step, the rows, the chains and
            the last good state.
        TrainingInterrupted: Ctrl-C; a ``KeyboardInterrupt`` that carries the state and the history at the last report.

    Warns:
        RuntimeWarning: within one report, when half of the chains have frozen (acceptance zero), steps diverged, or the
            weights of the negatives have collapsed onto few of them. Training goes on; frozen negatives make every further
            update meaningless. Also when a loader that cannot be started again ends before ``num_steps``.

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
    check_players(state, optimizer, sampler_objective, sampler_optimizer)
    check_listeners(evaluate, early_stopping)
    chunks = chunks_of(state, data, batch_size, num_steps, report_every)
    check_short_runs(state.potential, state.sampler, is_moved=target_acceptance is not None)
    if target_acceptance is not None:
        check_acceptance_can_be_followed(key, state, target_acceptance)
    state = state._replace(key=key)
    saver = Saver(save, save_every, state)

    run = functools.partial(
        _run_chunk,
        objective=comparable(objective),
        optimizer=optimizer,
        sampler_objective=comparable(sampler_objective),
        sampler_optimizer=sampler_optimizer,
        target_acceptance=target_acceptance,
        buffer_size=report_every,
    )
    history: list[dict[str, np.ndarray]] = []
    best = None if early_stopping is None else BestSoFar(early_stopping, state)
    first, made_before, known, carry = int(state.step), 0, set[str](), None
    is_walled = has_walls(state)
    is_silent = None if progress_bar is None else not progress_bar  # tqdm's None means "only on a terminal"
    try:
        with Interruptions() as interruptions, tqdm(total=num_steps, unit="update", disable=is_silent) as bar:
            for batches, available in chunks:
                wanted = min(report_every, num_steps - made_before, available)
                carry = _begun(key, state.step, batches) if carry is None else carry
                chunk = run(key, state, batches, carry, jnp.asarray(wanted, jnp.int32))
                made = int(chunk.made)
                report = {name: np.asarray(values)[:made] for name, values in chunk.metrics.items()}
                if made < wanted:
                    last_good = run(key, state, batches, carry, chunk.made).state if made else state
                    saver.save_now(last_good)
                    raise training_failure(key, last_good, chunk.state, batches, _joined([*history, report]))
                known |= warn_of_new(unhealthy(report, first + made_before, is_walled=is_walled), known)
                if evaluate is not None:
                    report |= evaluated(evaluate, chunk.state)
                # Together, so that an interruption finds a state and its history.
                state, carry, made_before = chunk.state, chunk.carry, made_before + made
                history.append(report)
                saver.save_if_due(state)
                bar.update(made)
                bar.set_postfix_str(_progress(report))
                interruptions.check()
                if best is not None and best.should_stop(state, report):
                    break
                if made_before == num_steps:
                    break
            else:
                warnings.warn(
                    f"data: the loader ended after {made_before} of {num_steps} updates and cannot be started again; "
                    "training stopped there. Pass a loader that can be iterated over repeatedly, or fewer num_steps.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        saver.save_now(state)
    except KeyboardInterrupt as interruption:
        saver.save_now(state)
        raise training_interrupted(state, _joined(history), is_saved=save is not None) from interruption
    return (state if best is None else best.state), _joined(history)


MUST_BE_FINITE = ("loss", "grad_norm", "sampler_loss", "sampler_grad_norm")


class _Chunk(NamedTuple):
    state: TrainState
    carry: PyTree
    made: Array
    metrics: dict[str, Array]


@eqx.filter_jit
def _begun(key: Key, step: Array, batches: Batches) -> PyTree:
    """What batches carry into the first chunk; from chunk to chunk it is handed on, since shuffling many rows costs."""
    return batches.begin(jax.random.split(key)[0], step)


@eqx.filter_jit
def _run_chunk(
    key: Key,
    state: TrainState,
    batches: Batches,
    carry: PyTree,
    wanted: Array,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    sampler_objective: Objective | None,
    sampler_optimizer: optax.GradientTransformation | None,
    target_acceptance: float | None,
    buffer_size: int,
) -> _Chunk:
    """Up to ``wanted`` updates, stopping after the first that is not finite; ``made`` counts those before it."""
    arrays, static = eqx.partition(state, eqx.is_array)
    data_key, step_key = jax.random.split(key)

    def update(arrays: PyTree, carry: PyTree) -> tuple[PyTree, PyTree, Metrics]:
        state = eqx.combine(arrays, static)
        batch, carry = batches.take(data_key, state.step, carry)
        state, metrics = train_step(
            state,
            batch,
            jax.random.fold_in(step_key, state.step),
            objective,
            optimizer,
            sampler_objective=sampler_objective,
            sampler_optimizer=sampler_optimizer,
            target_acceptance=target_acceptance,
        )
        return eqx.filter(state, eqx.is_array), carry, metrics

    def body(loop: tuple) -> tuple:
        made, _, arrays, carry, buffers = loop
        arrays, carry, metrics = update(arrays, carry)
        numbers = [metrics[name] for name in MUST_BE_FINITE if name in metrics]
        healthy = is_finite(numbers) & is_healthy(eqx.combine(arrays, static))
        buffers = {name: values.at[made].set(metrics[name]) for name, values in buffers.items()}
        return made + healthy, healthy, arrays, carry, buffers

    shapes = jax.eval_shape(lambda: update(arrays, carry)[2])
    buffers = {name: jnp.zeros((buffer_size, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    start = (jnp.zeros((), jnp.int32), jnp.ones((), bool), arrays, carry, buffers)
    made, _, arrays, carry, buffers = jax.lax.while_loop(lambda loop: loop[1] & (loop[0] < wanted), body, start)
    return _Chunk(eqx.combine(arrays, static), carry, made, buffers)


def _joined(history: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if not history:
        return {}
    return {name: np.concatenate([part[name] for part in history if name in part]) for name in history[0]}


def _progress(metrics: dict[str, np.ndarray]) -> str:
    shown = {"energy_gap": "energy gap", "acceptance_rate": "acceptance"}
    return ", ".join(f"{label} {metrics[name].mean():.3f}" for name, label in shown.items() if name in metrics)
