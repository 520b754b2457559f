"""What training carries from update to update."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebm_ppl.checks import check_finite_energy, check_one, check_potential, check_precision, is_traced
from ebm_ppl.potentials import find_short_runs, trainable
from ebm_ppl.types import Array, Key, Potential, PyTree, SamplerState


class Average(NamedTuple):
    """The exponential moving average of the potential's trainable parameters.

    Attributes:
        decay: Weight of the past, in [0, 1).
        parameters: The averages, as a potential with ``None`` for all that is not trained.
    """

    decay: Array
    parameters: PyTree


class TrainState(NamedTuple):
    """Everything training carries: one pytree, one checkpoint.

    Attributes:
        potential: The energy being trained.
        sampler: The sampler player, or ``None`` for sampler-free objectives.
        optimizer_state: Of the potential's optimizer.
        step: Updates made so far.
        key: Base key of the run, from which every shuffle and every update's key follow. ``None`` before the first
            :func:`fit`.
        sampler_optimizer_state: Of the sampler's optimizer; ``None`` where the sampler is not trained.
        average: Moving average of the parameters; ``None`` where none is kept.
    """

    potential: Potential
    sampler: Any  # SamplerState | None: which of the two is known where the state was made
    optimizer_state: PyTree
    step: Array
    key: Key | None
    sampler_optimizer_state: PyTree = None
    average: Average | None = None

    @property
    def averaged_potential(self) -> Potential:
        """The potential with the moving average of its parameters.

        Raises:
            ValueError: the state keeps no average.
        """
        if self.average is None:
            raise ValueError(
                "average_decay: this state keeps no average, expected init_train(..., average_decay=0.999)."
            )
        return eqx.combine(self.average.parameters, self.potential)


def init_train(
    potential: Potential,
    optimizer: optax.GradientTransformation,
    sampler: Any = None,
    *,
    sampler_optimizer: optax.GradientTransformation | None = None,
    average_decay: float | None = None,
) -> TrainState:
    """The state at the start of training.

    Args:
        potential: Energy of one event, with its base: :func:`ebm_ppl.potentials.tilt`.
        optimizer: An optax transformation, for the potential's trainable parameters. Clipping, schedules, weight decay
            and accumulation of gradients are optax's: ``optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))``,
            ``optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation()``.
        sampler: From :func:`ebm_ppl.init_sampler`, for objectives that need negatives.
        sampler_optimizer: For a sampler that is trained too: moves the floating arrays of its kernel, such as the weights
            of a flow.
        average_decay: Keep an exponential moving average of the parameters, ``average <- d average + (1 - d) parameters``
            after every update, with ``d`` this decay, smaller in the first updates:
            ``d = min(average_decay, (1 + n) / (10 + n))``. Read it with ``state.averaged_potential``.

    Returns:
        A :class:`TrainState` at step 0.

    Raises:
        TypeError: ``potential`` is not callable, has 64-bit parameters in a 32-bit session, or an optimizer or the sampler
            is not one.
        ValueError: the potential or, with a ``sampler_optimizer``, the sampler has nothing to train; the potential does
            not fit the sampler's events, or is that of short runs and the sampler another one; ``average_decay`` is not in
            [0, 1).
        NonFiniteEnergyError: the energy is not finite at the starting chains.

    Example:
        >>> import jax, jax.numpy as jnp, optax, ebm_ppl as ebm
        >>> net = ebm.potentials.MLP(2, key=jax.random.key(0), width=8, depth=1)
        >>> int(init_train(net, optax.adam(1e-3)).step)
        0
    """
    check_optimizer("optimizer", optimizer)
    if not callable(potential):
        raise TypeError(f"potential: got {type(potential).__name__}, expected a callable energy of one event.")
    check_precision("potential", potential)
    parameters = eqx.filter(potential, trainable(potential))
    if not jax.tree.leaves(parameters):
        raise ValueError(
            "potential: has no trainable parameters, expected a callable pytree with floating arrays: an equinox.Module "
            "or jax.tree_util.Partial(function, parameters). Parameters captured in a closure cannot be trained."
        )
    if sampler is not None and not isinstance(sampler, SamplerState):
        raise TypeError(f"sampler: got {type(sampler).__name__}, expected the result of ebm.init_sampler.")
    check_short_runs(potential, sampler)
    if sampler is not None:
        check_energy("potential", potential, sampler.position, what="chain")
    sampler_optimizer_state = None
    if sampler_optimizer is not None:
        check_short_runs(potential, sampler, is_moved=True)
        check_optimizer("sampler_optimizer", sampler_optimizer)
        if sampler is None or not jax.tree.leaves(eqx.filter(sampler.kernel, trainable(sampler.kernel))):
            raise ValueError(
                "sampler_optimizer: got one, and the sampler has no floating arrays to train, expected None."
            )
        sampler_optimizer_state = sampler_optimizer.init(eqx.filter(sampler.kernel, trainable(sampler.kernel)))
    average = None
    if average_decay is not None:
        expected = "a number in [0, 1), such as 0.999"
        decay = check_one("average_decay", average_decay, lambda x: (x >= 0.0) & (x < 1.0), expected)
        average = Average(decay.astype(float), parameters)
    start = optimizer.init(parameters)
    return TrainState(potential, sampler, start, jnp.zeros((), jnp.int32), None, sampler_optimizer_state, average)


def check_short_runs(potential: Potential, sampler: Any, *, is_moved: bool = False) -> None:
    """An energy of short runs is trained by those runs, and they stay as they are.

    Args:
        potential: The potential; of others than :class:`ebm_ppl.potentials.ShortRun` nothing is asked.
        sampler: A sampler state or ``None``.
        is_moved: Whether training changes the tunables of the sampler's kernel.

    Raises:
        ValueError: the sampler has another kernel, or one that training changes.
    """
    for run in find_short_runs(potential):
        if sampler is not None and not is_same_kernel(run.sampler, sampler.kernel):
            raise ValueError(
                f"sampler: its kernel is not the {run.num_steps}-step run of the potential, expected a sampler of "
                "potential.sampler; for other chains pass potential.plain."
            )
        if is_moved:
            raise ValueError(
                "potential: got that of short runs with target_acceptance or a sampler_optimizer, which would change the "
                "kernel that it belongs to, expected neither. Tune the kernel first."
            )


def is_same_kernel(first: Any, second: Any) -> bool:
    """Whether two kernels are one, as far as their tunables are concrete."""
    if jax.tree.structure(first) != jax.tree.structure(second):
        return False
    pairs = zip(*map(jax.tree.leaves, (first, second)), strict=True)
    # In NumPy, so that numbers that are known stay known while a program around them is being compiled.
    return all(is_traced(a, b) or np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def check_optimizer(name: str, optimizer: Any) -> None:
    """An optax transformation.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        remedy = " Pass its .gradient_transformation()." if isinstance(optimizer, optax.MultiSteps) else ""
        raise TypeError(f"{name}: got {type(optimizer).__name__}, expected an optax.GradientTransformation.{remedy}")


def check_energy(name: str, potential: Potential, rows: PyTree, *, what: str) -> None:
    """The energy must fit these rows as events and be finite at each of them.

    Raises:
        TypeError: the energy is not a real floating one.
        ValueError: the energy does not fit one of the rows.
        NonFiniteEnergyError: it is not finite at some row.
    """
    check_potential(potential, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows))
    check_finite_energy(name, potential, rows, what=what)
