"""Tempered sequential Monte Carlo: a population carried from a reference to the target, weighted, resampled and moved."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.ess import ess_solver, log_ess
from blackjax.smc.resampling import systematic
from blackjax.smc.solver import dichotomy

from ebm_ppl.densities import LikeEnergy, LogDensity, as_constant
from ebm_ppl.info import add_infos, count_start, run_steps, step_info
from ebm_ppl.meshes import everywhere, over_chains
from ebm_ppl.types import Array, Event, Info, Kernel, Key, PyTree, Scalar

COLLAPSED = 0.1
"""A population has collapsed when fewer than this share of its particles count, or have descendants."""
STUCK = 0.05
"""Moves whose acceptance rate is below this do not move."""
RIM = 0.01
"""Share of a start's own draws beyond which it hardly ever draws."""


class SMCResult(NamedTuple):
    """A population at the end of its path, with leading ``particle`` axes, and what happened on the way.

    Attributes:
        position: ``(particle, *event)``, moved under the target itself.
        log_weight: ``(particle,)``, finite: zeros, or with mean weight 1 where weights are kept.
        log_normalizer: ``log (Z_end / Z_start)``.
        relative_variance: Estimate of the relative variance of ``Z``, and so of the variance of its logarithm.
        num_temperatures: How many steps the path took.
        ess_minimum: Smallest effective sample size after a reweighting, as a fraction of the population (of those particles
            that were alive before it).
        parent_minimum: Smallest fraction of particles that had descendants at one resampling.
        ancestor_fraction: Distinct particles of the start that the end descends from, over the population.
        reversal_gap: By how much ``log_normalizer`` would be larger were the same steps weighted backwards, from the
            particles that have moved at the end of each. Zero up to noise when moves change particles and not their law.
        outside_fraction: Fraction of the end where the density of the start is below that of 99 % of the start's own draws.
        acceptance_minimum: Lowest acceptance rate of the moves at one temperature; NaN without an accept step.
        is_finite: Whether every weight was a number, and some were positive at every step.
        info: What each particle's slot spent; acceptance averaged over temperatures, flags and counts over all.
    """

    position: PyTree
    log_weight: Array
    log_normalizer: Array
    relative_variance: Array
    num_temperatures: Array
    ess_minimum: Array
    parent_minimum: Array
    ancestor_fraction: Array
    reversal_gap: Array
    outside_fraction: Array
    acceptance_minimum: Array
    is_finite: Array
    info: Info

    @property
    def is_collapsed(self) -> Array:
        """Whether few particles stand for all, none of them move, or their moves change their law.

        Moves without an accept step do: the acceptance rate of a kernel that is exact without one, as Gibbs is, is 1.
        """
        few = (self.ess_minimum < COLLAPSED) | (self.parent_minimum < COLLAPSED)
        return few | (self.ancestor_fraction < COLLAPSED) | ~(self.acceptance_minimum >= STUCK)

    @property
    def is_uncovered(self) -> Array:
        """Whether the target reaches beyond the start, so that what lies further out was never visited.

        The start's own share there is :data:`RIM`, up to the noise of a quantile and of a count.
        """
        num_particles = self.log_weight.shape[0]
        return self.outside_fraction > RIM + 4.0 * (2.0 * RIM / num_particles) ** 0.5


class _Path(NamedTuple):
    """A population somewhere on its path. Sums are divided when it arrives."""

    result: SMCResult
    ratio: Array  # log end - log start of each particle
    inverse_temperature: Array
    root: Array  # which particle of the start each particle descends from
    independent_variance: Array
    rounding_variance: Array


def run_tempered_smc(
    key: Key,
    position: PyTree,
    start_logdensity: LogDensity,
    end_logdensity: LogDensity,
    *,
    kernel: Kernel,
    num_steps: int = 5,
    target_ess: float | Array = 0.9,
    temperatures: Array | None = None,
    max_temperatures: int = 1000,
    keep_weights: bool = False,
    coding: Any = None,
) -> SMCResult:
    """Sequential Monte Carlo along ``f_b = start^(1 - b) end^b`` from ``b = 0`` to ``b = 1``.

    At every ``b`` the particles are weighted by ``(end / start)^(b - b_before)``, resampled, and moved by steps that leave
    ``f_b`` invariant, at ``b = 1`` too. ``Z_end / Z_start`` is the product of the mean weights; its expectation is exact
    for inverse temperatures that were fixed beforehand, and right in the limit of many particles for adaptive ones, which
    are the largest whose effective sample size is ``target_ess`` of the particles that are alive.

    A particle where ``end`` is zero has weight zero. One where it is NaN or infinite gets weight zero too, is counted in
    ``info.num_nonfinite``, and makes ``is_finite`` false.

    The variance of ``Z`` is estimated from the genealogy: with ``W_i`` the last weights of the particles, of mean 1, and
    the sum over the particles of the start, ``mean_k (sum_{i descends from k} W_i - 1)^2 / N``, less what the rounding to
    whole numbers of descendants adds to it, and at least the sum over temperatures of ``1 / ESS - 1 / N``, which is what
    moves that forget everything would leave.

    Args:
        key: Random key.
        position: Independent draws of the start, ``(particle, *event)`` or a pytree of such arrays.
        start_logdensity: ``log start`` of one event.
        end_logdensity: ``log end`` of one event.
        kernel: One that leaves its target invariant.
        num_steps: Its steps at every temperature.
        target_ess: Fraction in (0, 1), for adaptive temperatures.
        temperatures: Increasing inverse temperatures ``(temperature,)`` that end with 1; adaptive when ``None``.
        max_temperatures: Where an adaptive path that has not arrived jumps to 1, which ``ess_minimum`` then shows.
        keep_weights: Weight the particles at the last step instead of resampling them; they move all the same.
        coding: What says how discrete events are coded, for a kernel that has to know; see
            :class:`ebm_ppl.densities.LikeEnergy`.

    Returns:
        The population at ``b = 1`` and its record. It is a constant: no gradient flows into it.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> draws = jax.random.normal(jax.random.key(0), (1000,))
        >>> start, end = (lambda x: -0.5 * x**2), (lambda x: -0.5 * (x - 1.0) ** 2 / 0.25)
        >>> result = run_tempered_smc(jax.random.key(1), draws, start, end, kernel=ebm.kernels.mala(step_size=0.2))
        >>> bool(abs(result.log_normalizer - jnp.log(0.5)) < 0.1), bool(result.is_collapsed)
        (True, False)

    References:
        Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers, JRSS B 68, arXiv:cond-mat/0212648; Chan, Lai
        (2013), A general theory of particle filters in hidden Markov models, arXiv:1312.5114; Lee, Whiteley (2018),
        Variance estimation in the particle filter, arXiv:1509.00394 (which treats multinomial resampling).
    """
    position = over_chains(jax.lax.stop_gradient(jax.tree.map(jnp.asarray, position)), key)
    event = jax.tree.map(lambda x: x[0], position)
    # A loop of unknown length has no reverse derivative.
    start, end = as_constant(start_logdensity, event), as_constant(end_logdensity, event)

    def log_ratio(position: PyTree) -> Array:
        # Particles are split over a mesh, what is decided by their weights is not: see `everywhere`.
        return everywhere(jax.vmap(lambda event: end(event) - start(event))(position))

    def move(key: Key, position: PyTree, inverse_temperature: Array) -> tuple[PyTree, Info]:
        def bridge(event: Event) -> Scalar:
            # At the end the start does not count, even where its density is zero.
            rest = jnp.where(inverse_temperature == 1.0, 0.0, (1.0 - inverse_temperature) * start(event))
            return -rest - inverse_temperature * end(event)

        return _move(key, kernel(LikeEnergy(bridge, coding)), position, num_steps)

    num_particles = jax.tree.leaves(position)[0].shape[0]
    shape = jax.eval_shape(log_ratio, position)
    zero, one = jnp.zeros((), shape.dtype), jnp.ones((), shape.dtype)
    result = SMCResult(
        position=position,
        log_weight=jnp.zeros(shape.shape, shape.dtype),
        log_normalizer=zero,
        relative_variance=zero,
        num_temperatures=jnp.zeros((), jnp.int32),
        ess_minimum=one,
        parent_minimum=one,
        ancestor_fraction=one,
        reversal_gap=zero,
        outside_fraction=zero,
        acceptance_minimum=jnp.full((), jnp.nan, jnp.float32),
        is_finite=jnp.array(True),
        info=step_info(num_particles, acceptance_rate=0.0),
    )
    path = _Path(result, log_ratio(position), zero, jnp.arange(num_particles), zero, zero)

    def advance(path: _Path, following: Array) -> _Path:
        step_key = jax.random.fold_in(key, path.result.num_temperatures)
        return _advance(step_key, path, following, log_ratio, move, keep_weights)

    if temperatures is None:

        def adapt(path: _Path) -> _Path:
            return advance(path, _next_temperature(path, target_ess, max_temperatures))

        path = jax.lax.while_loop(lambda path: path.inverse_temperature < 1.0, adapt, path)
    else:

        def follow(path: _Path, following: Array) -> tuple[_Path, None]:
            return advance(path, following), None

        path, _ = jax.lax.scan(follow, path, jnp.asarray(temperatures, shape.dtype))
    result = path.result
    average = result.info.acceptance_rate / result.num_temperatures
    rim = jnp.quantile(jax.vmap(start)(position), RIM)
    outside = jax.vmap(start)(result.position) < rim
    result = result._replace(outside_fraction=jnp.mean(outside, dtype=shape.dtype))
    return jax.lax.stop_gradient(result._replace(info=result.info._replace(acceptance_rate=average)))


def _sane(ratio: Array) -> tuple[Array, Array]:
    """Log weights in which what is not a weight is zero, and where that was."""
    is_bad = jnp.isnan(ratio) | (ratio == jnp.inf)
    return jnp.where(is_bad, -jnp.inf, ratio), is_bad


def _next_temperature(path: _Path, target_ess: float | Array, max_temperatures: int) -> Array:
    ratio, _ = _sane(path.ratio)
    remaining = 1.0 - path.inverse_temperature
    # Particles without weight would hold the effective size below its target however short the step: the target is a
    # share of the others. Without any the path ends here.
    alive = jnp.mean(ratio > -jnp.inf)
    delta = ess_solver(lambda _: ratio, ratio, target_ess * alive, remaining, dichotomy)
    is_last = (path.result.num_temperatures >= max_temperatures - 1) | (alive == 0) | ~(delta < remaining)
    return jnp.where(is_last, 1.0, jnp.minimum(path.inverse_temperature + delta, 1.0)).astype(ratio.dtype)


def _advance(key: Key, path: _Path, following: Array, log_ratio: Callable, move: Callable, keep_weights: bool) -> _Path:
    """Weight, resample and move, once."""
    (ratio, is_bad), before = _sane(path.ratio), path.result
    num_particles, delta = ratio.shape[0], following - path.inverse_temperature
    resample_key, move_key = jax.random.split(key)
    log_increment = jnp.where(ratio == -jnp.inf, -jnp.inf, delta * ratio)
    log_total = jax.nn.logsumexp(log_increment)
    log_mean = log_total - jnp.log(num_particles).astype(ratio.dtype)
    is_sound = jnp.isfinite(log_total)
    # Weights of mean 1; a population that has none stays as it is.
    weight = jnp.where(is_sound, jnp.exp(log_increment - log_total) * num_particles, 1.0)
    ess = jnp.where(is_sound, jnp.exp(log_ess(log_increment)), 0.0)
    alive = jnp.maximum(jnp.mean(ratio > -jnp.inf), 1.0 / num_particles)
    lineage = jnp.zeros_like(weight).at[path.root].add(weight)
    independent = path.independent_variance + jnp.maximum(1.0 / ess - 1.0 / num_particles, 0.0)
    genealogical = jnp.mean((lineage - 1.0) ** 2) / num_particles - path.rounding_variance

    chosen = systematic(resample_key, weight / num_particles, num_particles)
    # Rounding in the cumulative sum may choose a particle without weight at either end.
    chosen = jnp.where(weight[chosen] > 0, chosen, jnp.argmax(weight))
    # A weight of zero is not kept: zero times the infinite energy of its particle would be NaN in every average.
    keeps = (keep_weights & (following >= 1.0) & jnp.all(weight > 0)) | ~is_sound
    chosen = jnp.where(keeps, jnp.arange(num_particles), chosen)
    fraction = weight - jnp.floor(weight)
    rounding = path.rounding_variance + jnp.mean(fraction * (1.0 - fraction)) / num_particles

    def count_distinct(index: Array) -> Array:
        return jnp.mean(jnp.zeros(num_particles).at[index].set(1.0)).astype(ratio.dtype)

    root = path.root[chosen]
    parents = over_chains(jax.tree.map(lambda x: x[chosen], before.position))
    position, info = move(move_key, parents, following)
    info = info._replace(num_nonfinite=info.num_nonfinite + is_bad, num_energies=info.num_energies + 1)
    new_ratio, end_weight = log_ratio(position), jnp.where(keeps & is_sound, weight, 1.0)
    backwards = -jax.nn.logsumexp(-delta * new_ratio, b=end_weight / num_particles)
    result = SMCResult(
        position=position,
        log_weight=jnp.log(end_weight),
        log_normalizer=before.log_normalizer + log_mean,
        relative_variance=jnp.maximum(genealogical, independent),
        num_temperatures=before.num_temperatures + 1,
        ess_minimum=jnp.minimum(before.ess_minimum, ess / (alive * num_particles)).astype(ratio.dtype),
        parent_minimum=jnp.minimum(before.parent_minimum, count_distinct(chosen) / alive).astype(ratio.dtype),
        ancestor_fraction=count_distinct(root),
        reversal_gap=before.reversal_gap + backwards - log_mean,
        outside_fraction=before.outside_fraction,
        acceptance_minimum=jnp.fmin(before.acceptance_minimum, jnp.mean(info.acceptance_rate)),
        is_finite=before.is_finite & is_sound & ~jnp.any(is_bad),
        info=add_infos(before.info, info, 1),
    )
    return _Path(result, new_ratio, following, root, independent, rounding)


def _move(key: Key, algorithm: Any, position: PyTree, num_steps: int) -> tuple[PyTree, Info]:
    """``num_steps`` of a kernel from a fresh start, whose evaluation is counted."""
    init_key, run_key = jax.random.split(key)
    state = algorithm.init(position, init_key)
    state, info = run_steps(algorithm.step, jax.random.split(run_key, num_steps), state)
    return state.position, count_start(info)._replace(statistics={})
