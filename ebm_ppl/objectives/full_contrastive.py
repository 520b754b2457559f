"""The whole gradient of contrastive divergence, with the term that moves the law of the negatives.

CD-k descends ``KL(data || p) - KL(nu || p)``, ``nu`` being the law of a row after ``k`` Langevin steps. Its gradient has
three terms: the energy at the data, the energy at the negatives, and what the parameters do to ``nu`` itself, which plain
contrastive divergence leaves out. The third is

    - d/dtheta [ E_nu U_fixed - H(nu) ] = - E [ (grad U(x_k) + grad log nu(x_k)) . dx_k/dtheta ],

with the chain ``x_k(theta)`` differentiated along its own noise. Everything but the score ``grad log nu`` is at hand.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ebm_ppl.checks import check_count
from ebm_ppl.densities import as_constant
from ebm_ppl.kernels.scaled_langevin import (
    is_langevin,
    langevin_info,
    langevin_noise_scale,
    run_langevin,
    take_langevin_step,
)
from ebm_ppl.objectives.contrastive import energy_gap, rows_like_chains
from ebm_ppl.partials import tunables_of
from ebm_ppl.sampling import chains_at, check_sampler
from ebm_ppl.types import Array, Batch, Kernel, Key, Metrics, Potential, PyTree, SamplerState, Scalar

Score = Literal["mixture", "gaussian"] | Callable[[PyTree], PyTree]

_ROWS_AT_ONCE = 64
"""Distances of so many chains to all others are held at a time."""


def full_contrastive_divergence(
    potential: Potential,
    sampler: SamplerState,
    batch: Batch,
    key: Key,
    *,
    num_steps: int,
    score: Score = "mixture",
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Contrastive divergence with all three terms of its gradient, by differentiable Langevin steps from the batch.

    The value of the loss is the energy gap of :func:`ebm_ppl.objectives.contrastive_divergence`; its gradient is that of
    ``KL(data || p) - KL(nu || p)``. A fixed point of it need not be that of maximum likelihood: with few steps the law of
    the negatives still depends on where they started.

    The score of ``nu`` is not known in closed form. It is one of

    * ``"mixture"``: given the chains one step before, the negatives are a mixture of Gaussians with known centres
      ``x - step_size grad U(x)`` and the known noise of a step. Its entropy, whose gradient this is exactly, falls short of
      that of ``nu`` by a term of order one over the number of rows; there is nothing to tune. Steps must be so noisy, and
      rows so many, that the components overlap: the metric ``mixture_ess`` is the mean number of components that a
      negative may have come from. Where it is near 1, as with small steps in many dimensions, the entropy of the mixture
      does not depend on the parameters, and only the energy's half of the third term is left.
    * ``"gaussian"``: the score of the Gaussian with the negatives' mean and covariance. Right, in the limit of many rows,
      only where ``nu`` is Gaussian; needs more rows than numbers in an event.
    * a function of one event that gives its score, such as a score network fitted to negatives. Its bias is that of the
      term.

    Memory grows with ``num_steps``, because the loss is differentiated through the steps, and one step more than
    contrastive divergence is paid for the centres of the mixture.

    Args:
        potential: Energy of one event, base included; twice differentiable.
        sampler: Supplies the kernel, ``kernels.unadjusted_langevin`` or ``kernels.langevin``; its positions are not used
            and pass through.
        batch: Rows ``(row, *event)``, at least two.
        key: Random key.
        num_steps: Langevin steps (k).
        score: See above.

    Returns:
        ``(loss, (sampler, metrics))``; the metrics of :func:`ebm_ppl.objectives.contrastive_divergence`, and
        ``mixture_ess`` (with ``score="mixture"``).

    Raises:
        TypeError: ``sampler`` is not a sampler state, or its kernel's steps are not Langevin steps without an accept step.
        ValueError: ``num_steps < 1``, an unknown ``score``, or fewer rows than it needs.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> batch = jax.random.normal(jax.random.key(0), (64, 2))
        >>> sampler = ebm.init_sampler(batch, ebm.kernels.unadjusted_langevin(step_size=0.1))
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> loss, (sampler, metrics) = full_contrastive_divergence(
        ...     energy, sampler, batch, jax.random.key(1), num_steps=5)
        >>> bool(metrics["mixture_ess"] > 4)
        True

    References:
        Hinton (2002), Training products of experts by minimizing contrastive divergence, equation 5; Du, Li, Tenenbaum,
        Mordatch (2021), Improved contrastive divergence training of energy-based models, arXiv:2012.01316, who estimate
        the entropy by nearest neighbours; the gradient of that estimate has no finite variance in one or two
        dimensions, where neighbours with noise of their own come arbitrarily close.
    """
    batch = rows_like_chains(batch, sampler)
    num_steps = check_count("num_steps", num_steps)
    tunables = _langevin_tunables(sampler.kernel)
    if not callable(score) and not (isinstance(score, str) and score in ("mixture", "gaussian")):
        raise ValueError(f"score: got {score!r}, expected 'mixture', 'gaussian' or a function of one event.")
    check_sampler(potential, chains_at(batch, sampler.kernel))
    num_rows = jax.tree.leaves(batch)[0].shape[0]
    if num_rows < 2:
        raise ValueError(f"batch: got {num_rows} row, expected at least 2: the law of the negatives is read off them.")
    run_key, last_key = jax.random.split(key)
    before = run_langevin(run_key, potential, batch, num_steps - 1, tunables)
    negatives = take_langevin_step(last_key, potential, before, tunables)

    fixed = jax.lax.stop_gradient((before, negatives))
    info = langevin_info(jax.vmap(potential)(fixed[1]), fixed[1], num_steps)._replace(
        has_moved=jnp.ones(num_rows, bool)
    )
    loss, metrics = energy_gap(potential, batch, chains_at(fixed[1], sampler.kernel), info, paired=True)
    if score == "mixture":
        silent = {**tunables, "noise_scale": jnp.zeros(())}
        centres = take_langevin_step(last_key, potential, fixed[0], silent)
        scores, size = _mixture_scores(fixed[1], centres, langevin_noise_scale(tunables))
        metrics["mixture_ess"] = size
    elif score == "gaussian":
        scores = _gaussian_scores(fixed[1])
    else:
        scores = jax.vmap(score)(fixed[1])
    event = jax.tree.map(lambda x: x[0], fixed[1])
    energy = jax.vmap(as_constant(potential, event))(negatives)
    moved = energy + _inner(jax.lax.stop_gradient(scores), negatives)
    # Of the third term only the gradient is known: its value is taken off again.
    third = -jnp.mean(moved - jax.lax.stop_gradient(moved)).astype(loss.dtype)
    return loss + third, (sampler, jax.lax.stop_gradient(metrics))


def _langevin_tunables(kernel: Kernel) -> dict[str, Array]:
    """Drift and noise of a kernel whose steps can be differentiated."""
    if is_langevin(kernel):
        return tunables_of(kernel)
    raise TypeError(
        "sampler: got a kernel that cannot be differentiated along its noise, expected one of kernels.langevin and "
        "kernels.unadjusted_langevin; an accept step jumps where the parameters change."
    )


def _flat(population: PyTree) -> Array:
    """``(chain, number)``."""
    return jax.vmap(lambda event: ravel_pytree(event)[0])(population)


def _inner(a: PyTree, b: PyTree) -> Array:
    """Inner products of the events of two populations, ``(chain,)``."""
    return jnp.sum(_flat(a) * _flat(b), axis=1)


def _like(flat: Array, population: PyTree) -> PyTree:
    _, unravel = ravel_pytree(jax.tree.map(lambda x: x[0], population))
    return jax.vmap(unravel)(flat)


def _mixture_scores(negatives: PyTree, centres: PyTree, noise_scale: Array) -> tuple[PyTree, Array]:
    """Scores of ``mean_j N(centre_j, noise_scale^2)`` at the negatives, and the mean effective number of components.

    The component that a negative came from is one of them: without it the entropy's error was ten times as large in one
    dimension, and of order one over the number of rows either way.
    """
    points, means = _flat(negatives), _flat(centres)
    variance = jnp.asarray(noise_scale, points.dtype) ** 2

    def score(point: Array) -> tuple[Array, Array]:
        away = means - point
        weight = jax.nn.softmax(-jnp.sum(away**2, axis=1) / (2.0 * variance))
        return weight @ away / variance, 1.0 / jnp.sum(weight**2)

    found, size = jax.lax.map(score, points, batch_size=_ROWS_AT_ONCE)
    return _like(found, negatives), size.mean()


def _gaussian_scores(negatives: PyTree) -> PyTree:
    """``-S^-1 (x - m)`` with mean and covariance of the negatives."""
    points = _flat(negatives)
    num_chains, size = points.shape
    if num_chains <= size:
        raise ValueError(
            f"score: got 'gaussian' with {num_chains} rows of {size} numbers, expected more rows than numbers: their "
            "covariance has no inverse."
        )
    away = points - points.mean(axis=0)
    covariance = away.T @ away / (num_chains - 1)
    return _like(-jnp.linalg.solve(covariance, away.T).T, negatives)
