"""log Z by bridge sampling, from draws of the EBM and a proposal that overlaps with it."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.diagnostics import effective_sample_size

from ebm_ppl.checks import as_array, check_count, is_traced
from ebm_ppl.normalizer.bisection import bracket_sign_change
from ebm_ppl.normalizer.events import check_samples, check_site
from ebm_ppl.normalizer.fitted_normal import fit_normal
from ebm_ppl.normalizer.result import MAX_ROUNDING, LogNormalizer, rounding
from ebm_ppl.normalizer.unconstrained import (
    check_integrable,
    holds_tracers,
    mean_slope,
    point_shape,
    row_densities,
    unconstrain,
)
from ebm_ppl.proposals import check_proposal, log_density, sample_and_log_prob
from ebm_ppl.types import Array, Key

MIN_ESS = 100.0
"""Draws worth fewer independent ones than that do not show how far they have been."""

MAX_VARIANCE = 0.02
"""Relative variance of Z above which an estimate is not to be believed, nor its error."""

MAX_MISMATCH = 4.0
"""Standard errors by which the draws and the proposal may disagree about where the EBM has its mass."""

LEVELS = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
"""Quantiles of all points above which that is asked."""


def bridge_sampling(
    key: Key, ebm: Any, samples: Array, *, proposal: Any = None, num_proposals: int | None = None
) -> LogNormalizer:
    """``log Z`` from draws of the EBM and of a proposal ``q`` whose density is known, by the optimal bridge between them.

    With ``l(x) = base(x) exp(-U(x)) / q(x)``, ``n_1`` the effective number of draws, ``n_2`` that of proposals and
    ``s_i = n_i / (n_1 + n_2)``, Z solves ``Z = mean_q[l / (s_1 l + s_2 Z)] / mean_p[1 / (s_1 l + s_2 Z)]``. Both means are
    of bounded terms, so that tails which would ruin importance sampling do no harm; what it takes is that proposal and EBM
    overlap.

    The draws may come from chains: their autocorrelation, and what sets the chains apart, enters the error. But draws that
    only visited one mode cannot show that there is another. If the proposal reaches it, its draws there are worth more than
    the samples say, and the result is flagged; if it does not, as a proposal fitted to those samples may not, ``value`` is
    the log Z of the part that was visited, and nothing gives it away.

    Args:
        key: Random key.
        ebm: The EBM.
        samples: Draws, ``(chain, draw, *batch_shape, *event_shape)`` as in ``Draws.position``, at least 50 of each chain;
            or ``(sample, *batch_shape, *event_shape)``, at least 100, for one chain or for independent draws in any order.
        proposal: Normalised density over UNCONSTRAINED points of one row, where chains of the EBM move (on R^d these are
            the events): a NumPyro or distrax distribution, or a flow; on a discrete support, one over events. All rows
            share it. When ``None``, a normal distribution with the mean and covariance of the first half of the draws of
            each chain, and the estimate rests on the second half.
        num_proposals: Draws of the proposal; as many as there are draws of the EBM when ``None``.

    Returns:
        The estimate: ``ess`` is the number of independent weights whose mean had its error; ``pareto_khat`` is NaN, because
        the terms are bounded and have no tail to assess. It is ``reliable`` where all densities are finite, the standard
        error is below 0.14, the draws are worth at least 100 independent ones in every coordinate and in ``l``, and the two
        sides do not disagree about the law of ``l`` by more than four standard errors. The gradient of ``value`` is the
        mean over the samples of that of ``log base - U``; no gradient flows into the samples.

    Raises:
        TypeError: the samples are of another kind than the events, the proposal has no density, or there is none for a
            discrete support.
        ValueError: the samples have another shape, are too few for a proposal to be fitted, or are NaN, infinite, outside
            the support or on its edge; or the proposal cannot be sampled or has another shape than the points.
        NotImplementedError: the support is a circle, or a product of circles.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 2.0 * x, dist.Exponential(1.0))  # Z = 1/3, and the law is Exponential(3)
        >>> samples = dist.Exponential(3.0).sample(jax.random.key(0), (2000,))
        >>> result = bridge_sampling(jax.random.key(1), ebm, samples)
        >>> bool(abs(result.value - jax.numpy.log(1 / 3)) < 4 * result.standard_error), bool(result.reliable)
        (True, True)

    References:
        Meng, Wong (1996), Simulating ratios of normalizing constants via a simple identity, Statistica Sinica 6;
        Frühwirth-Schnatter (2004), Estimating marginal likelihoods for mixture and Markov switching models using bridge
        sampling techniques, Econometrics Journal 7 (the error); Gronau et al. (2017), A tutorial on bridge sampling,
        arXiv:1703.05984 (the fitted proposal and the halves).
    """
    check_site(ebm)
    samples = _as_chains(ebm, as_array("samples", samples))
    is_fitted = proposal is None
    if is_fitted:
        _check_fit(ebm, samples)
    else:
        check_proposal("proposal", proposal)
        draws, _ = jax.eval_shape(lambda key: sample_and_log_prob(proposal, key, 2), key)
        if draws.shape[1:] != point_shape(ebm):
            raise ValueError(
                f"proposal: got events of shape {draws.shape[1:]}, expected that of one unconstrained point, "
                f"{point_shape(ebm)}."
            )
    check_integrable(ebm)
    num_draws = samples.shape[0] * (samples.shape[1] // 2 if is_fitted else samples.shape[1])
    num_proposals = num_draws if num_proposals is None else check_count("num_proposals", num_proposals, 25)
    run = _estimate if is_traced(key, samples, proposal) or holds_tracers(ebm) else _compiled_estimate
    return run(key, ebm, samples, proposal, num_proposals)


def _as_chains(ebm: Any, samples: Any) -> Array:
    """Samples with a chain axis, ``(chain, draw, *batch, *event)``."""
    num_axes = len(ebm.batch_shape) + len(ebm.event_shape)
    has_chains = jnp.ndim(samples) == num_axes + 2
    if has_chains:
        return check_samples(ebm, samples, ("chain", "draw"), minimum=50)
    return check_samples(ebm, samples, minimum=100)[None]


def _check_fit(ebm: Any, samples: Array) -> None:
    if ebm.support.is_discrete:
        raise TypeError(
            f"proposal: got none for the discrete support {ebm.support}, expected a distribution over events, such as "
            "independent sites with the means of some of the samples."
        )
    dimension, num_fitted = math.prod(point_shape(ebm)), samples.shape[0] * (samples.shape[1] // 2)
    if num_fitted < 2 * dimension:
        raise ValueError(
            f"samples: got {samples.shape[0] * samples.shape[1]} draws in {dimension} unconstrained dimensions, expected "
            f"at least {4 * dimension}, to fit a proposal to half of them. Pass more, or proposal=..., such as a flow."
        )


class _Sides(NamedTuple):
    """Log ratios ``l`` of the EBM to the proposal, at the draws of either.

    Attributes:
        drawn: ``(chain, draw)``.
        proposed: ``(proposal,)``.
        draws_ess: Smallest effective size of a coordinate of the draws.
    """

    drawn: Array
    proposed: Array
    draws_ess: Array


def _estimate(key: Key, ebm: Any, samples: Array, proposal: Any, num_proposals: int) -> LogNormalizer:
    invert_key, run_key = jax.random.split(key)
    points = jax.lax.stop_gradient(unconstrain(invert_key, ebm, samples))
    half = samples.shape[1] // 2 if proposal is None else 0
    # (chain, draw, *batch, *point) -> (row, chain, draw, *point).
    num_rows, lead = math.prod(ebm.batch_shape), samples.shape[:2]
    by_row = jnp.moveaxis(points.reshape(*lead, num_rows, *point_shape(ebm)), 2, 0)

    def run_row(key: Key, row: Array, points: Array) -> LogNormalizer:
        fitted = fit_normal(points[:, :half].reshape(-1, *points.shape[2:])) if proposal is None else proposal
        _, target = row_densities(ebm, ebm.base, row)

        def log_ratio(points: Array) -> Array:
            return jax.vmap(target)(points) - log_density(fitted, points)

        used = points[:, half:]
        proposed, _ = sample_and_log_prob(fitted, key, num_proposals)
        drawn = log_ratio(used.reshape(-1, *used.shape[2:])).reshape(used.shape[:2])
        return _bridge(_Sides(drawn, log_ratio(proposed), _smallest_size(ebm, used)))

    result = jax.vmap(run_row)(jax.random.split(run_key, num_rows), jnp.arange(num_rows), by_row)
    result = jax.lax.stop_gradient(jax.tree.map(lambda x: x.reshape(ebm.batch_shape), result))
    used = points[:, half:].reshape(-1, *points.shape[2:])
    weight = jnp.full((used.shape[0], *ebm.batch_shape), 1.0 / used.shape[0], result.value.dtype)
    return result._replace(value=result.value + mean_slope(ebm, used, weight))


_compiled_estimate = eqx.filter_jit(_estimate)


def _smallest_size(ebm: Any, points: Array) -> Array:
    """Effective size of the worst coordinate of draws ``(chain, draw, *point)``."""
    if ebm.support.is_discrete:
        # A site may well be constant; not all of them.
        return jnp.where(jnp.all(points == points[:, :1]), 0.0, jnp.inf)
    series = jnp.moveaxis(points.reshape(*points.shape[:2], -1), -1, 0)
    return jnp.min(jax.vmap(effective_sample_size)(series))


def _size(series: Array, tolerance: Array | float = 0.0) -> Array:
    """Effective size of draws ``(chain, draw)``, at most their number, which it is where they are all the same."""
    size = jnp.clip(effective_sample_size(series), 1.0, series.size)
    return jnp.where(jnp.ptp(series) <= tolerance, series.size, size)


def _bridge(sides: _Sides) -> LogNormalizer:
    drawn, proposed = sides.drawn, sides.proposed
    known, num_proposals = jnp.where(jnp.isfinite(drawn), drawn, 0.0), proposed.shape[0]
    # A proposal that is the EBM leaves nothing but rounding.
    size = _size(known, 1e-5 * (1.0 + jnp.max(jnp.abs(known))))
    share = size / (size + num_proposals)
    log_odds = jnp.log(size / num_proposals)

    def chance(log_ratio: Array, log_z: Array) -> Array:
        """Probability that a point came from the EBM, given where it is."""
        return jax.nn.sigmoid(log_ratio - log_z + log_odds)

    def balance(log_z: Array) -> Array:
        """Zero at the optimal bridge, whose equation says that these chances are right on average."""
        return share * jnp.mean(1.0 - chance(drawn, log_z)) - (1.0 - share) * jnp.mean(chance(proposed, log_z))

    ratios = jnp.concatenate([drawn.ravel(), proposed])
    is_sound = ~jnp.any(jnp.isnan(ratios) | (ratios == jnp.inf)) & jnp.all(jnp.isfinite(drawn))
    finite = jnp.isfinite(ratios)
    low, high = jnp.min(ratios, where=finite, initial=jnp.inf), jnp.max(ratios, where=finite, initial=-jnp.inf)
    log_z, _ = bracket_sign_change(balance, low + log_odds - 50.0, high + log_odds + 50.0)

    from_ebm, from_proposal = chance(drawn, log_z), chance(proposed, log_z)
    # The terms of the two means, up to a common factor: bounded, whatever the ratios are.
    below, above = 1.0 - from_ebm, from_proposal
    variance = _relative_variance(above, num_proposals) + _relative_variance(below, _size(below))
    is_reliable = is_sound & (variance < MAX_VARIANCE) & (jnp.minimum(sides.draws_ess, size) >= MIN_ESS)
    return LogNormalizer(
        value=jnp.where(is_sound, log_z, jnp.nan),
        standard_error=jnp.hypot(jnp.sqrt(variance), rounding(log_z)),
        ess=1.0 / (variance + 1.0 / (size + num_proposals)),
        pareto_khat=jnp.full_like(variance, jnp.nan),
        num_gradients=jnp.zeros((), jnp.int32),
        reliable=is_reliable
        & (rounding(log_z) < MAX_ROUNDING)
        & (_mismatch(from_ebm, from_proposal, share) <= MAX_MISMATCH),
    )


def _relative_variance(terms: Array, size: Array | int) -> Array:
    return jnp.var(terms, ddof=1) / jnp.mean(terms) ** 2 / size


def _mismatch(from_ebm: Array, from_proposal: Array, share: Array) -> Array:
    """Standard errors by which the chances are wrong where they are high, having been made right on average.

    Draws of the proposal at a place where the EBM has mass and no sample ever was have a high chance, and nothing among the
    samples to balance them. With ``h`` saying whether the chance exceeds some level, ``E_all[(is sample - chance) h] = 0``;
    that log Z was fitted to the same points takes the projection of ``h`` on a constant out of its error.
    """
    both = from_ebm, from_proposal
    each = (1.0 - share) / from_proposal.size  # the share of one point among all of them

    def pooled(of_samples: Array, of_proposals: Array) -> Array:
        return share * jnp.mean(of_samples) + (1.0 - share) * jnp.mean(of_proposals)

    def at(level: Array) -> Array:
        slopes = [chance * (1.0 - chance) for chance in both]
        high = [chance > level for chance in both]
        centre = pooled(*(h * slope for h, slope in zip(high, slopes, strict=True))) / pooled(*slopes)
        up, down = (1.0 - from_ebm) * (high[0] - centre), from_proposal * (high[1] - centre)
        excess = share * jnp.mean(up) - (1.0 - share) * jnp.mean(down)
        variance = share**2 * jnp.var(up) / _size(up) + (1.0 - share) ** 2 * jnp.var(down) / down.size
        # What it is in expectation, given where the points are: where they are few, none of them may be of one kind.
        expected = pooled(*(slope * (h - centre) ** 2 for h, slope in zip(high, slopes, strict=True)))
        variance = jnp.maximum(variance, expected * each)
        # Of few points the law is not normal: Bernstein's inequality, for terms of at most one.
        return jnp.abs(excess) / jnp.maximum(jnp.sqrt(variance + each * jnp.abs(excess) / 3.0), 1e-6)

    levels = jnp.quantile(jnp.concatenate([chance.ravel() for chance in both]), jnp.array(LEVELS))
    return jnp.max(jax.vmap(at)(levels))
