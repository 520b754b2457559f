"""The primal-dual gap of a shallow energy: how far its likelihood is from the best one in its ball."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_positive_number, check_count, check_rows, check_unit_vectors
from ebm_ppl.potentials import ShallowEnergy, without_base
from ebm_ppl.types import Array, Potential
from ebm_ppl.weights import normalized_weights

FEASIBLE = 1e-3
"""How far beyond the bound the norm may be, as a share of it: rounding."""


class DualityGap(NamedTuple):
    """A primal-dual gap, in nats.

    Attributes:
        value: ``bound * discrepancy + E_data U - E_model U``: the mean negative log-likelihood of the data is at most
            so much above the least in the ball.
        standard_error: From the number of negatives, were they drawn at random; nothing for states that were listed.
        discrepancy: The largest difference between model and data that a function in the unit ball can show.
        energy_gap: ``E_data U - E_model U``, at least ``-bound * discrepancy``.
        witness: The feature that shows it, of unit length; in the lazy regime the differences of all features,
            ``(m,)``.
    """

    value: float
    standard_error: float
    discrepancy: float
    energy_gap: float
    witness: np.ndarray


def duality_gap(
    potential: Potential,
    data: Any,
    negatives: Any,
    *,
    bound: float,
    log_weight: Any = None,
    candidates: Any = None,
    num_ascents: int = 100,
) -> DualityGap:
    """How far the likelihood of a shallow energy is from the best in its ball, from data and negatives alone.

    Maximum likelihood over a ball of energies is a game, with the base ``tau`` (uniform on a sphere):
    ``min_{|U| <= beta} E_data U + log E_tau exp(-U) = max_nu -KL(nu, tau) - beta sup_{|f| <= 1} (E_nu f - E_data f)``.
    At any ``U`` in the ball, with ``nu`` its own model, the difference of the two sides is

    ``gap = beta D + E_data U - E_nu U >= 0``, with ``D = sup_{|f| <= 1} (E_nu f - E_data f)``,

    in which log Z is gone. The optimum lies between the two sides, so the gap bounds what further training could gain.
    With features that are learned ``D = max_z |E_nu s(z . x) - E_data s(z . x)|`` (one-sided where all signs are
    equal); in the lazy regime ``D = sqrt(mean_i (E_nu s_i - E_data s_i)^2)``, exactly.

    Args:
        potential: A :class:`ebm_ppl.potentials.ShallowEnergy`, tilted or not.
        data: Rows ``(row, d)``, those of training: it is their likelihood that the gap is about.
        negatives: Draws of the model ``(draw, d)`` at equilibrium, or all states of a finite space.
        bound: ``beta``, that of the training.
        log_weight: Log weights of the negatives, ``(draw,)``: minus the energy, for states that were listed.
        candidates: Unit vectors ``(n, d)``, in Euclidean space ``(n, d + 1)``, to look for the best feature among,
            instead of all; the energy's own are added. Not for the lazy regime.
        num_ascents: Steps of the search over all features, which starts at the energy's own and at data. It may miss
            the best: the gap is then too small.

    Returns:
        The gap. Sampling noise makes the discrepancy, a largest difference, too large: a gap of a few standard errors
        is no gap.

    Raises:
        TypeError: the potential is not such an energy.
        ValueError: the energy is not in the ball (its norm is beyond the bound, its features are not unit vectors, or a
            weight is negative), events of a sphere or candidates are not unit vectors, or shapes do not fit.

    Example:
        >>> import jax, ebm_ppl as ebm
        >>> angle = jnp.linspace(0.0, 2.0 * jnp.pi, 60, endpoint=False)
        >>> circle = jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
        >>> energy = ebm.potentials.ShallowEnergy(2, key=jax.random.key(0), width=24, regime="lazy")  # U = 0
        >>> found = duality_gap(energy, circle[:20], circle, bound=1.0)
        >>> found.value == found.discrepancy > 0.1
        True

    References:
        Domingo-Enrich, Bietti, Gabrie, Bruna, Vanden-Eijnden (2021), Dual training of energy-based models with
        overparametrized shallow neural networks, arXiv:2107.05134, for the game; the gap is derived from it.
    """
    energy: Any = without_base(potential)
    if not isinstance(energy, ShallowEnergy):
        raise TypeError(f"potential: got {type(energy).__name__}, expected a ShallowEnergy, or one with a base.")
    limit = as_positive_number("bound", bound)
    why_not = outside_ball(energy, limit)
    if why_not:
        raise ValueError(f"potential: {why_not}; the gap is about the energies of a ball.")
    rows = check_rows("data", data, event_shape=energy.event_shape)
    draws = check_rows("negatives", negatives, event_shape=energy.event_shape)
    if energy.domain == "sphere":
        check_unit_vectors("data", rows)
        check_unit_vectors("negatives", draws, what="draw")
    weights = jnp.zeros(len(draws)) if log_weight is None else jnp.asarray(log_weight)
    if weights.shape != (len(draws),):
        raise ValueError(
            f"log_weight: got shape {weights.shape}, expected {(len(draws),)}, one for each of the negatives."
        )
    model = normalized_weights(weights)
    if not bool(jnp.isfinite(model).all()):
        raise ValueError("log_weight: got weights of which none is a positive number, or one is NaN.")
    if candidates is not None:
        candidates = _checked_candidates(candidates, energy)
    signs = jnp.asarray(energy.signs.value)
    if energy.regime == "lazy":
        witness = _differences(energy, energy.directions, rows, draws, model)
        discrepancy = jnp.sqrt(jnp.mean(witness**2))
        shape = witness / jnp.where(discrepancy > 0, discrepancy, 1.0)
        best = jax.vmap(lambda x: jnp.mean(shape * energy.units(x)))
    else:
        tried = energy.directions
        if candidates is None:
            steps = check_count("num_ascents", num_ascents, 0)
            tried = _ascended(energy, tried, rows, draws, model, steps)
        else:
            tried = jnp.concatenate([tried, candidates])
        differences = _differences(energy, tried, rows, draws, model)
        allowed = jnp.stack([jnp.where(jnp.any(signs == sign), sign * differences, -jnp.inf) for sign in (-1, 1)])
        side, index = jnp.unravel_index(jnp.argmax(allowed), allowed.shape)
        discrepancy = jnp.maximum(allowed[side, index], 0.0)  # the zero function is in the ball
        witness = tried[index]
        sign = jnp.where(discrepancy > 0, 2.0 * side - 1.0, 0.0)
        best = jax.vmap(lambda x: sign * energy.units(x, witness[None])[0])
    # The gap is one difference of means, E_nu h - E_data h with h = beta f - U: its error is that of E_nu h.
    h = limit * best(draws) - jax.vmap(energy)(draws)
    variance = jnp.sum(model**2 * (h - jnp.sum(model * h)) ** 2)
    gap = jax.vmap(energy)(rows).mean() - jnp.sum(model * jax.vmap(energy)(draws))
    return DualityGap(
        float(limit * discrepancy + gap), float(jnp.sqrt(variance)), float(discrepancy), float(gap), np.asarray(witness)
    )


def outside_ball(energy: ShallowEnergy, bound: float) -> str:
    """What keeps an energy out of the ball, in words; empty for one that is in it.

    Example:
        >>> energy = ShallowEnergy(2, key=jax.random.key(0), width=4)
        >>> outside_ball(energy, 1.0), outside_ball(energy, 0.5)
        ('', 'got norm 1, expected at most the bound 0.5')
    """
    lengths = jnp.linalg.norm(energy.directions, axis=1)
    if not bool((jnp.abs(lengths - 1.0) <= FEASIBLE).all()):
        return (
            f"got features of lengths {float(lengths.min()):.4g} to {float(lengths.max()):.4g}, expected unit vectors"
        )
    if energy.regime == "features" and not bool((energy.weights >= 0.0).all()):
        return f"got weights down to {float(energy.weights.min()):.4g}, expected none below zero"
    if not float(energy.norm) <= bound * (1.0 + FEASIBLE):
        return f"got norm {float(energy.norm):.6g}, expected at most the bound {bound:g}"
    return ""


def _checked_candidates(candidates: Any, energy: ShallowEnergy) -> Array:
    if energy.regime == "lazy":
        raise ValueError("candidates: got some in the lazy regime, where the best function is known; expected None.")
    found = jnp.asarray(candidates, energy.directions.dtype)
    if found.ndim != 2 or found.shape[1:] != energy.directions.shape[1:]:
        raise ValueError(f"candidates: got shape {found.shape}, expected (n, {energy.directions.shape[1]}).")
    check_unit_vectors("candidates", found, what="candidate")
    return found


def _differences(energy: ShallowEnergy, directions: Array, rows: Array, draws: Array, model: Array) -> Array:
    """``E_nu s(z . x) - E_data s(z . x)`` of every direction."""
    of_model = model @ jax.vmap(lambda x: energy.units(x, directions))(draws)
    return of_model - jax.vmap(lambda x: energy.units(x, directions))(rows).mean(axis=0)


def _ascended(energy: ShallowEnergy, own: Array, rows: Array, draws: Array, model: Array, num_steps: int) -> Array:
    """Directions, and what they become by climbing on the sphere; the own ones first, some of the data besides."""
    points = jnp.concatenate([rows[:: max(len(rows) // 32, 1)][:32], draws[:: max(len(draws) // 32, 1)][:32]])
    if energy.domain == "euclidean":
        points = jnp.concatenate([points, jnp.ones((len(points), 1), points.dtype)], axis=1)
    points = points / jnp.linalg.norm(points, axis=1, keepdims=True)
    starts = jnp.concatenate([own, points, -points])
    return jnp.concatenate([starts, _climbed(energy, starts, rows, draws, model, num_steps)])


@eqx.filter_jit
def _climbed(energy: ShallowEnergy, starts: Array, rows: Array, draws: Array, model: Array, num_steps: int) -> Array:
    def height(directions: Array) -> Array:
        return jnp.sum(jnp.abs(_differences(energy, directions, rows, draws, model)))

    def step(time: Array, z: Array) -> Array:
        slope = jax.grad(height)(z)
        slope = slope - z * jnp.sum(z * slope, axis=1, keepdims=True)
        length = jnp.linalg.norm(slope, axis=1, keepdims=True)
        # Steps of known length, ever shorter: the slope says where to and not how far.
        moved = z + 0.3 * 0.95**time * jnp.where(length > 0, slope / length, 0.0)
        return moved / jnp.linalg.norm(moved, axis=1, keepdims=True)

    return jax.lax.fori_loop(0, num_steps, step, starts)
