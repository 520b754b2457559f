"""What kernels report about their steps: making one report, and adding up many."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ebm_ppl.types import Array, Info, Key, PyTree

HAMILTONIAN = "hamiltonian"
"""Name of the one statistic that belongs to a state, that of the end of a step: of several steps the last one's counts."""


def step_info(
    num_chains: int,
    *,
    acceptance_rate: ArrayLike = jnp.nan,
    is_divergent: ArrayLike = False,
    num_gradients: ArrayLike = 0,
    num_energies: ArrayLike = 0,
    num_nonfinite: ArrayLike = 0,
    has_moved: ArrayLike = False,
    **statistics: ArrayLike,
) -> Info:
    """The report of one step; numbers are broadcast to ``(num_chains,)`` and given the dtypes that all kernels share.

    Args:
        num_chains: Chains of the population.
        acceptance_rate: NaN where there is no accept step.
        is_divergent: Whether the step failed numerically.
        num_gradients: Evaluations of the energy with its gradient.
        num_energies: Evaluations of the energy alone.
        num_nonfinite: Proposals with a NaN or infinite energy.
        has_moved: Filled in by :func:`ebm_ppl.advance` and :func:`ebm_ppl.draw`, which compare positions.
        **statistics: Further numbers by name; ``hamiltonian`` is the total energy of the state that the step went to.

    Example:
        >>> step_info(3, acceptance_rate=0.5, num_gradients=1, pool_ess=2.0).statistics["pool_ess"].shape
        (3,)
    """

    def column(value: ArrayLike, dtype: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(value, dtype), (num_chains,))

    return Info(
        acceptance_rate=column(acceptance_rate, jnp.float32),
        is_divergent=column(is_divergent, jnp.bool_),
        num_gradients=column(num_gradients, jnp.int32),
        num_energies=column(num_energies, jnp.int32),
        num_nonfinite=column(num_nonfinite, jnp.int32),
        has_moved=column(has_moved, jnp.bool_),
        # Differences of Hamiltonians are wanted, which may be small beside them: they keep the precision of the chains.
        statistics={
            name: column(value, jnp.result_type(value) if name == HAMILTONIAN else jnp.float32)
            for name, value in statistics.items()
        },
    )


def add_infos(total: Info, info: Info, num_steps: int) -> Info:
    """Add one of ``num_steps`` reports: rates and statistics are averaged, counts summed, flags combined by "or".

    A Hamiltonian is neither: the mean of several is none. That of the last step is kept, also under the name that a
    composition gives to that of a part.
    """

    def average(sum_so_far: Array, value: Array) -> Array:
        return sum_so_far + value / num_steps

    return Info(
        acceptance_rate=average(total.acceptance_rate, info.acceptance_rate),
        is_divergent=total.is_divergent | info.is_divergent,
        num_gradients=total.num_gradients + info.num_gradients,
        num_energies=total.num_energies + info.num_energies,
        num_nonfinite=total.num_nonfinite + info.num_nonfinite,
        has_moved=total.has_moved | info.has_moved,
        statistics={
            name: value if name.endswith(HAMILTONIAN) else average(total.statistics[name], value)
            for name, value in info.statistics.items()
        },
    )


def moved(before: PyTree, after: PyTree) -> Array:
    """Which chains of a population are elsewhere than they were, ``(chain,)``."""

    def differs(old: Array, new: Array) -> Array:
        return jnp.any((old != new).reshape(old.shape[0], -1), axis=1)

    return jnp.stack(jax.tree.leaves(jax.tree.map(differs, before, after))).any(axis=0)


def run_steps(step: Callable[[Key, Any], tuple[Any, Info]], keys: Key, state: Any) -> tuple[Any, Info]:
    """Run a population's step once for each key, and add up what it reports.

    Args:
        step: ``(rng_key, state) -> (state, Info)``; states have a ``position``.
        keys: ``(step,)``.
        state: The first state.
    """
    num_steps = keys.shape[0]

    def body(carry: tuple[Any, Info], key: Key) -> tuple[tuple[Any, Info], None]:
        before, total = carry
        state, info = step(key, before)
        info = info._replace(has_moved=moved(before.position, state.position))
        return (state, add_infos(total, info, num_steps)), None

    # Kernels have statistics of their own: what there is to add up is known once a step has been traced.
    # Of the keys only a shape is shown: a key that is looked at counts as used.
    _, shapes = jax.eval_shape(step, jax.ShapeDtypeStruct(keys.shape[1:], keys.dtype), state)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (state, total), _ = jax.lax.scan(body, (state, zero), keys)
    return state, total


def count_start(info: Info, is_counted: ArrayLike = True) -> Info:
    """Add the evaluation of a fresh start: with a gradient where the kernel uses gradients, of the energy alone else."""
    has_gradient = info.num_gradients > 0
    return info._replace(
        num_gradients=info.num_gradients + (has_gradient & is_counted),
        num_energies=info.num_energies + (~has_gradient & is_counted),
    )
