"""Penalties on the energy, as wrappers that make an objective of an objective."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ebm_ppl.checks import check_not_negative
from ebm_ppl.partials import comparable
from ebm_ppl.potentials import without_base
from ebm_ppl.types import Array, Batch, Key, Metrics, Objective, Potential, PyTree, SamplerState, Scalar
from ebm_ppl.weights import normalized_weights


def energy_l2(objective: Objective, weight: float | Array, *, at: Literal["both", "data"] = "both") -> Objective:
    """Add ``weight (mean U(batch)^2 + mean U(negatives)^2)`` to an objective, which keeps energies near zero.

    It pins the additive constant of the energy, bounds its range and slows its drift, at a price: the regularised energy is
    not that of maximum likelihood. With ``loss = E_p[U] - E_q[U]`` its minimum for a fixed law ``q`` of negatives is
    ``U = -tanh(log(p / q) / 2) / (2 weight)``. Of a tilted energy ``U`` is the part that is learned, without its base.

    Args:
        objective: Its negatives are the chains of the sampler that it returns: persistent contrastive divergence, and
            generalised contrastive divergence from its sampler. Contrastive divergence does not return its negatives; use
            :func:`~ebm_ppl.objectives.generalized_contrastive_divergence` with ``start="data"``, which has this penalty.
        weight: At least zero; an array can change without recompilation.
        at: Penalise rows and negatives, or rows only.

    Returns:
        An objective with the metric ``energy_l2``, the mean squares before the weight.

    Raises:
        TypeError: ``objective`` is not callable, or ``weight`` is not a real number.
        ValueError: ``at`` is unknown, or (when called) ``objective`` returns no negatives.

    Example:
        >>> import functools, jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> objective = energy_l2(functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=2), 0.1)
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), ebm.kernels.mala(step_size=0.1))
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> loss, (sampler, metrics) = objective(energy, sampler, jnp.ones((4, 2)), jax.random.key(0))
        >>> bool(metrics["energy_l2"] >= 1.0)
        True

    References:
        Du, Mordatch (2019), Implicit generation and generalization in energy-based models, arXiv:1903.08689;
        Yoon, Hwang, Kwon, Noh, Park (2024), arXiv:2407.00626, section 3.2.
    """
    _check("at", at, ("both", "data"))
    return Partial(_with_energy_l2, _as_objective(objective), check_not_negative("weight", weight), at=at)


def gradient_penalty(
    objective: Objective,
    weight: float | Array,
    *,
    at: Literal["interpolates", "data", "negatives"] = "interpolates",
    target: float | Array = 1.0,
) -> Objective:
    """Add ``weight mean (|grad U(x)| - target)^2`` to an objective, which bounds the slopes that kernels see.

    ``x`` lies between rows and negatives, ``e row + (1 - e) negative`` with ``e`` uniform, or is one of them. With
    ``target=0`` this is the mean squared slope. The density of the regularised energy is not that of maximum likelihood.

    Args:
        objective: For negatives, one that returns them in its sampler, as :func:`energy_l2` has it.
        weight: At least zero; an array can change without recompilation.
        at: Where the slope is penalised; ``"data"`` also suits objectives without a sampler.
        target: The norm that costs nothing, at least zero.

    Returns:
        An objective with the metric ``gradient_penalty``, the mean before the weight.

    Raises:
        TypeError: ``objective`` is not callable, or a number is not real.
        ValueError: ``at`` is unknown, or (when called) ``objective`` returns no negatives.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> def mean_energy(potential, batch, key): return jax.vmap(potential)(batch).mean()
        >>> objective = gradient_penalty(ebm.objectives.stateless(mean_energy), 10.0, at="data", target=0.0)
        >>> loss, _ = objective(lambda x: 2.0 * x, None, jnp.zeros(3), jax.random.key(0))
        >>> float(loss)
        40.0

    References:
        Gulrajani, Ahmed, Arjovsky, Dumoulin, Courville (2017), Improved training of Wasserstein GANs, arXiv:1704.00028,
        equation 3; Mescheder, Geiger, Nowozin (2018), arXiv:1801.04406, equation 9 (``target=0``, at the data).
    """
    _check("at", at, ("interpolates", "data", "negatives"))
    numbers = check_not_negative("weight", weight), check_not_negative("target", target)
    return Partial(_with_gradient_penalty, _as_objective(objective), *numbers, at=at)


def energy_square(potential: Potential, batch: Batch, negatives: SamplerState | None) -> Scalar:
    """``mean U(batch)^2 + sum_i w_i U(negative_i)^2``, the negatives and their weights constant.

    Of a tilted energy ``U - log base`` it is ``U`` alone that is squared: the base is no part of what is learned.

    Args:
        potential: Energy of one event.
        batch: Rows ``(row, *event)``.
        negatives: Weighted negatives; ``None`` leaves their term out.

    Example:
        >>> import jax.numpy as jnp
        >>> float(energy_square(lambda x: x, jnp.array([1.0, 3.0]), None))
        5.0
    """
    potential = without_base(potential)
    total = jnp.mean(jax.vmap(potential)(batch) ** 2)
    if negatives is None:
        return total
    energies = jax.vmap(potential)(jax.lax.stop_gradient(negatives.position))
    return total + jnp.sum(_weights(negatives).astype(energies.dtype) * energies**2)


def _with_energy_l2(
    objective: Objective,
    weight: Array,
    potential: Potential,
    sampler: SamplerState | None,
    batch: Batch,
    key: Key,
    *,
    at: str,
) -> tuple[Scalar, tuple[SamplerState | None, Metrics]]:
    loss, (after, metrics) = objective(potential, sampler, batch, key)
    penalty = energy_square(potential, batch, _negatives(sampler, after) if at == "both" else None)
    return add_penalty(loss, after, metrics, "energy_l2", weight, penalty)


def _with_gradient_penalty(
    objective: Objective,
    weight: Array,
    target: Array,
    potential: Potential,
    sampler: SamplerState | None,
    batch: Batch,
    key: Key,
    *,
    at: str,
) -> tuple[Scalar, tuple[SamplerState | None, Metrics]]:
    objective_key, choose_key, mix_key = jax.random.split(key, 3)
    loss, (after, metrics) = objective(potential, sampler, batch, objective_key)
    points = batch
    if at != "data":
        points = _paired_negatives(choose_key, _negatives(sampler, after), batch)
    if at == "interpolates":
        share = jax.random.uniform(mix_key, (jax.tree.leaves(batch)[0].shape[0],))
        points = jax.tree.map(functools.partial(_mix, share), batch, points)

    def excess(event: PyTree) -> Scalar:
        square = sum(jnp.sum(slope**2) for slope in jax.tree.leaves(jax.grad(potential)(event)))
        # The root has no derivative at a slope of zero, where an energy that starts at zero is; zero is one of its limits.
        is_flat = square == 0.0
        norm = jnp.where(is_flat, 0.0, jnp.sqrt(jnp.where(is_flat, 1.0, square)))
        return (norm - target.astype(norm.dtype)) ** 2

    return add_penalty(loss, after, metrics, "gradient_penalty", weight, jnp.mean(jax.vmap(excess)(points)))


def add_penalty(
    loss: Scalar, sampler: Any, metrics: Metrics, name: str, weight: Array, penalty: Scalar
) -> tuple[Scalar, tuple[Any, Metrics]]:
    """What an objective returns, with a weighted penalty in its loss and the penalty among its metrics."""
    metrics = {**metrics, name: jax.lax.stop_gradient(penalty)}
    return loss + weight.astype(penalty.dtype) * penalty, (sampler, metrics)


def _mix(share: Array, row: Array, negative: Array) -> Array:
    share = share.astype(negative.dtype).reshape(-1, *[1] * (negative.ndim - 1))
    return share * row + (1.0 - share) * negative


def _weights(negatives: SamplerState) -> Array:
    return normalized_weights(jax.lax.stop_gradient(negatives.log_weight))


def _paired_negatives(key: Key, negatives: SamplerState, batch: Batch) -> PyTree:
    """One negative for each row, drawn by weight."""
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    index = jax.random.choice(key, negatives.num_chains, (num_rows,), p=_weights(negatives))
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x)[index], negatives.position)


def _negatives(before: SamplerState | None, after: SamplerState | None) -> SamplerState:
    # An objective that hands back the sampler it got keeps its negatives to itself: those chains are not they.
    if after is None or before is after:
        raise ValueError(
            "objective: returned no negatives (the sampler came back as it was), expected one whose negatives are the "
            "chains of its sampler. Penalise at='data', or use generalized_contrastive_divergence(start='data') in the "
            "place of contrastive_divergence."
        )
    return after


def _as_objective(objective: Objective) -> Objective:
    if not callable(objective):
        raise TypeError(f"objective: got {type(objective).__name__}, expected a function, see ebm_ppl.types.Objective.")
    return comparable(objective)


def _check(name: str, value: str, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, expected))}.")
