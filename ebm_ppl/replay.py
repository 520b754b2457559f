"""A bank of chains between phases: restarting some, moving a few of many, putting them back."""

from typing import Any

import jax
import jax.numpy as jnp

from ebm_ppl.checks import as_array, as_rows, check_count, check_key, check_probability
from ebm_ppl.sampling import fresh_auxiliary
from ebm_ppl.types import Array, Key, PyTree, SamplerState


def restart(
    key: Key, sampler: SamplerState, fresh: PyTree, probability: float | Array, *, max_age: int | None = None
) -> SamplerState:
    """Send each chain back to a fresh position, independently with the given probability, and when it is old.

    Probability 0 is plain persistence, 1 is a fresh start for every chain.

    Args:
        key: Random key.
        sampler: The chains.
        fresh: Fresh positions ``(chain, *event)``: rows of data, or draws of the base.
        probability: Restart probability in [0, 1].
        max_age: Chains that have made so many kernel steps since they started restart too; none do when ``None``.

    Returns:
        The sampler with restarted chains; their log weights and ages return to zero.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a concrete ``probability`` outside [0, 1], ``fresh`` of another shape than the chains, or a
            ``max_age`` of chains whose age nobody counts.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((3, 2)), ebm.kernels.mala(step_size=0.1))
        >>> float(restart(jax.random.key(0), sampler, jnp.ones((3, 2)), 1.0).position.sum())
        6.0

    References:
        Du, Mordatch (2019), Implicit generation and generalization in energy-based models, arXiv:1903.08689 (a replay
        buffer with 5 % restarts).
    """
    check_bank("sampler", sampler)
    probability = check_probability("probability", probability)
    fresh = as_rows("fresh", fresh)
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(fresh)):
        raise TypeError("fresh: got complex numbers, expected real positions.")
    shapes, fresh_shapes = jax.tree.map(jnp.shape, sampler.position), jax.tree.map(jnp.shape, fresh)
    if shapes != fresh_shapes:
        raise ValueError(f"fresh: got shape {fresh_shapes}, expected that of the chains, {shapes}.")
    chosen = jax.random.bernoulli(key, probability, (sampler.num_chains,))
    if max_age is not None:
        if sampler.age is None:
            raise ValueError(
                "max_age: got one with chains whose age is not counted, expected those of ebm.init_sampler."
            )
        chosen |= sampler.age >= check_count("max_age", max_age)

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(chosen.reshape(-1, *[1] * (old.ndim - 1)), new.astype(old.dtype), old)

    position = jax.tree.map(choose, fresh, sampler.position)
    auxiliary = jax.tree.map(choose, fresh_auxiliary(fresh, sampler.kernel), sampler.auxiliary)
    log_weight = jnp.where(chosen, 0.0, sampler.log_weight)
    age = None if sampler.age is None else jnp.where(chosen, 0, sampler.age)
    return sampler._replace(position=position, log_weight=log_weight, auxiliary=auxiliary, age=age)


def gather_chains(key: Key, sampler: SamplerState, num_chains: int) -> tuple[Array, SamplerState]:
    """Choose chains at random, without replacement.

    Args:
        key: Random key.
        sampler: The whole bank of chains.
        num_chains: How many to choose.

    Returns:
        Their indices ``(num_chains,)`` and a sampler of those chains, for :func:`scatter_chains` to put back.

    Raises:
        TypeError: an argument is of another type.
        ValueError: ``num_chains`` exceeds the bank.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> bank = ebm.init_sampler(jnp.zeros((100, 2)), ebm.kernels.mala(step_size=0.1))
        >>> index, chosen = gather_chains(jax.random.key(0), bank, 10)
        >>> chosen.num_chains
        10
    """
    check_bank("sampler", sampler)
    check_key("key", key)
    if check_count("num_chains", num_chains) > sampler.num_chains:
        raise ValueError(f"num_chains: got {num_chains}, expected at most the {sampler.num_chains} chains of the bank.")
    index = jax.random.choice(key, sampler.num_chains, (num_chains,), replace=False)
    return index, take_chains(sampler, index)


def take_chains(sampler: SamplerState, index: Array) -> SamplerState:
    """A sampler of the chains with these indices.

    Raises:
        TypeError: an argument is of another type.

    Example:
        >>> import jax.numpy as jnp, ebm_ppl as ebm
        >>> bank = ebm.init_sampler(jnp.arange(4.0), ebm.kernels.mala(step_size=0.1))
        >>> take_chains(bank, jnp.array([3, 1])).position.tolist()
        [3.0, 1.0]
    """
    check_bank("sampler", sampler)
    index = _check_index(index)
    return sampler._replace(**jax.tree.map(lambda x: x[index], _per_chain(sampler)))


def scatter_chains(sampler: SamplerState, index: Array, moved: SamplerState) -> SamplerState:
    """Put moved chains back into the bank at their indices.

    Raises:
        ValueError: an index is no whole number, or the chains do not fit.
        TypeError: an argument is of another type.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> bank = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.1))
        >>> index, chosen = gather_chains(jax.random.key(0), bank, 2)
        >>> float(scatter_chains(bank, index, chosen._replace(position=chosen.position + 1)).position.sum())
        4.0
    """
    check_bank("sampler", sampler)
    check_bank("moved", moved)
    index, kinds = _check_index(index), [jax.tree.structure(_per_chain(bank)) for bank in (sampler, moved)]
    if kinds[0] != kinds[1] or moved.num_chains != index.shape[0]:
        raise ValueError(
            f"moved: got {moved.num_chains} chains for {index.shape[0]} indices, expected those that take_chains gave."
        )
    merged = jax.tree.map(lambda old, new: old.at[index].set(new), _per_chain(sampler), _per_chain(moved))
    return sampler._replace(**merged)


def check_bank(name: str, sampler: Any) -> None:
    """A sampler state.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(sampler, SamplerState):
        raise TypeError(f"{name}: got {type(sampler).__name__}, expected the result of ebm.init_sampler.")


def _check_index(index: Any) -> Array:
    array = as_array("index", index)
    if array.ndim != 1 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"index: got shape {array.shape} of {array.dtype}, expected whole numbers (chain,).")
    return array


def _per_chain(sampler: SamplerState) -> dict[str, PyTree]:
    """All that has a leading chain axis."""
    return {name: getattr(sampler, name) for name in ("position", "log_weight", "auxiliary", "age")}
