"""Checks of chains against each other and against their starts: R-hat, nested R-hat, effective sample size, memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from ebm_ppl.diagnostics.check import Check, Status
from ebm_ppl.diagnostics.comparison import MAX_PROBABILITY
from ebm_ppl.diagnostics.guarded import as_series, check_superchains, ess, memories, rhat_nested
from ebm_ppl.diagnostics.mixing import ESS_MIXED, RHAT_MIXED, rhat
from ebm_ppl.diagnostics.outcome import Outcome, judge_early, name_series

RHAT_FAILED = 1.05
"""R-hat above this fails, where it is not the chance of short chains."""
MIN_MEMORIES, PER_CHAIN = 6.0, 40.0
"""Chains shorter than ``6 + 40 / chains`` autocorrelation times cannot be told from chains that drift."""
SLACK = 6.0
"""Chains that last ``L`` autocorrelation times say how far their means scatter up to a factor ``1 + 6 / L``, measured on
ranks of AR(1) chains; many chains would take the factor for a fault."""


def check_rhat(values: Any, names: Sequence[str] | None = None) -> Check:
    """Whether chains agree, by rank-normalised split R-hat, largest over all variables.

    Short chains of a sound sampler have a large R-hat too: about ``1 + tau / draws``. So a value above 1.01 is called a
    fault only where the means of the chains differ by more than their own autocorrelation explains (an F-test on ranks,
    with a chance of a thousandth), and is "not assessable" else.

    Args:
        values: ``(chain, draw, *shape)``, at frozen parameters.
        names: One name per variable.

    Returns:
        Pass: at most 1.01, with a bulk effective sample size of 400. Warn, fail: above 1.01, above 1.05. A chain that never
        moves fails.

    Raises:
        ValueError: ``values`` has no chain and draw axes, or other than one name per variable.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(16, 500))
        >>> check_rhat(draws).status, check_rhat(draws + np.arange(16)[:, None]).status
        ('pass', 'fail')

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), arXiv:1903.08008.
    """
    series = as_series(values)
    names = name_series(series, names)
    finish = Outcome("rhat", "<= 1.01; fails > 1.05", "chains that are all in the same wrong region, unseen modes")
    if (early := judge_early(series, names, finish)) is not None:
        return early
    found = rhat(series)
    worst = int(np.argmax(found))
    told = f"largest for {names[worst]}"
    if found[worst] <= RHAT_MIXED:
        sizes = ess(series)
        if not sizes.min() >= ESS_MIXED:
            least = int(np.argmin(sizes))
            return finish("not assessable", found[worst], f"bulk ESS of {names[least]} is {sizes[least]:.0f} < 400")
        return finish("pass", found[worst], told)
    return finish(*_graded(float(found[worst]), *_dispersion(series), told))


def check_rhat_nested(values: Any, superchain_ids: Any, names: Sequence[str] | None = None) -> Check:
    """Whether chains have forgotten where they started, by nested R-hat, largest over all variables.

    As for :func:`check_rhat` a value above 1.01 is a fault only where superchains differ by more than the chains within
    them (an analysis of variance on ranks, exact for chains that are independent given their start).

    Args:
        values: ``(chain, draw, *shape)``, warm-up left out.
        superchain_ids: ``(chain,)``; chains that started at one point share a number. Arbitrary groups say nothing.
        names: One name per variable.

    Raises:
        ValueError: the shapes do not fit, or superchains differ in size.

    Example:
        >>> draws, ids = np.random.default_rng(0).normal(size=(32, 300)), np.repeat(np.arange(8), 4)
        >>> check_rhat_nested(draws, ids).status, check_rhat_nested(draws + ids[:, None], ids).status
        ('pass', 'fail')

    References:
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman (2024), Nested R-hat, arXiv:2110.13017.
    """
    series = as_series(values)
    names = name_series(series, names)
    ids = check_superchains(superchain_ids, len(series))
    finish = Outcome("rhat_nested", "<= 1.01; fails > 1.05", "modes that no superchain started near")
    if (early := judge_early(series, names, finish)) is not None:
        return early
    if len(ids) < 2 * (ids.max() + 1):
        return finish(
            "not assessable", np.nan, "superchains of one chain each; needs at least 4 chains from every start"
        )
    found = rhat_nested(series, ids)
    worst = int(np.argmax(found))
    told = f"{ids.max() + 1} superchains, largest for {names[worst]}"
    if found[worst] <= RHAT_MIXED:
        return finish("pass", found[worst], told)
    ranked = _ranked(series).mean(axis=1)
    groups = np.stack([ranked[ids == group] for group in range(ids.max() + 1)])  # (superchain, chain, series)
    num_groups, size = groups.shape[:2]
    within = groups.var(axis=1, ddof=1).mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = size * groups.mean(axis=1).var(axis=0, ddof=1) / within
    tails = scipy.stats.f.sf(ratio, num_groups - 1, num_groups * (size - 1))
    excess = bool(np.nanmin(tails) * tails.size < MAX_PROBABILITY)
    return finish(*_graded(float(found[worst]), excess, np.inf, told))


def _ranked(series: np.ndarray) -> np.ndarray:
    """Normal scores of the values, and of their distance from the median: ``(chain, draw, 2 series)``."""
    folded = np.abs(series - np.median(series, axis=(0, 1)))
    both = np.concatenate([series, folded], axis=-1)
    flat = both.reshape(-1, both.shape[-1])
    rank = scipy.stats.rankdata(flat, axis=0)
    return scipy.stats.norm.ppf((rank - 0.375) / (len(flat) + 0.25)).reshape(both.shape)


def _dispersion(series: np.ndarray) -> tuple[bool, float]:
    """Whether the means of chains differ by more than autocorrelation explains, and the length in autocorrelation times."""
    scores = _ranked(series)
    scores = scores[..., np.ptp(scores, axis=1).any(axis=0)]
    if scores.shape[-1] < 2 * series.shape[-1]:
        # A variable that no chain changes, and that differs between them, needs no test.
        constant = np.ptp(series, axis=1).max(axis=0) == 0
        if constant.any():
            return True, np.inf
    num_chains = len(scores)
    length = memories(scores)
    within = ((scores - scores.mean(axis=1, keepdims=True)) ** 2).mean(axis=(0, 1))
    ratio = scores.mean(axis=1).var(axis=0, ddof=1) / (within / length)
    tails = scipy.stats.f.sf(ratio / (1.0 + SLACK / length), num_chains - 1, num_chains * length)
    # Of few chains the autocorrelation time itself is hardly known.
    is_long = length >= MIN_MEMORIES + PER_CHAIN / num_chains
    excess = bool(np.where(is_long, tails, 1.0).min() * tails.size < MAX_PROBABILITY)
    return excess, float(length.max()) if is_long.any() else 0.0


def _graded(value: float, excess: bool, length: float, told: str) -> tuple[Status, float, str]:
    if length == 0:
        return "not assessable", value, f"{told}: chains of a few autocorrelation times are too short to tell"
    if not excess:
        return "not assessable", value, f"{told}, as chance gives it to chains of this length: draw more"
    return "fail" if value > RHAT_FAILED else "warn", value, f"{told}: chains do not agree"
