"""Lifting a loss that needs no sampler to an objective."""

from collections.abc import Callable

from jax.tree_util import Partial

from ebm_ppl.partials import comparable
from ebm_ppl.types import Batch, Key, Metrics, Objective, Potential, SamplerState, Scalar


def stateless(loss: Callable[[Potential, Batch, Key], Scalar]) -> Objective:
    """Lift a sampler-free loss ``(potential, batch, key) -> scalar`` to an objective.

    The sampler, if the training state has one, passes through untouched. Losses are compared as objectives are: a
    ``functools.partial`` by its contents, so that a fresh one of the same loss and options does not recompile.

    Args:
        loss: A function of the potential, a batch of rows and a random key; options are given by ``functools.partial``.

    Returns:
        An objective for :func:`ebm_ppl.fit`.

    Raises:
        TypeError: ``loss`` is not callable.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def mean_energy(potential, batch, key): return jax.vmap(potential)(batch).mean()
        >>> objective = stateless(mean_energy)
        >>> loss, (sampler, metrics) = objective(lambda x: x**2, None, jnp.ones(3), jax.random.key(0))
        >>> float(loss)
        1.0
    """
    if not callable(loss):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a function (potential, batch, key) -> scalar.")
    return Partial(_lifted, comparable(loss))


def _lifted(
    loss: Callable[[Potential, Batch, Key], Scalar],
    potential: Potential,
    sampler: SamplerState | None,
    batch: Batch,
    key: Key,
) -> tuple[Scalar, tuple[SamplerState | None, Metrics]]:
    return loss(potential, batch, key), (sampler, {})
