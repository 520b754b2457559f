"""Checks of how much chains are worth: effective sample size, and memory against the steps of training."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ebm_ppl.checks import check_count
from ebm_ppl.diagnostics.check import Check
from ebm_ppl.diagnostics.guarded import as_series, ess
from ebm_ppl.diagnostics.mixing import ESS_MIXED
from ebm_ppl.diagnostics.outcome import Outcome, judge_early, name_series

STEPS_PER_TIME = 5.0
"""Kernel steps of a phase, in autocorrelation times, that chains which start afresh need."""


def check_ess(values: Any, names: Sequence[str] | None = None, *, num_gradients: int = 0) -> Check:
    """Effective draws over all chains, the smaller of bulk and tail, smallest over all variables; and what one costs.

    Args:
        values: ``(chain, draw, *shape)``.
        names: One name per variable.
        num_gradients: Gradient evaluations that the draws took, of all chains together.

    Returns:
        Pass from 400 on, "not assessable" below; a chain that never moves fails (ArviZ counts all of its draws).

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> check_ess(np.random.default_rng(0).normal(size=(4, 500))).status, check_ess(np.ones((4, 500))).status
        ('pass', 'not assessable')
    """
    series = as_series(values)
    names = name_series(series, names)
    finish = Outcome("ess", ">= 400", "modes that no chain visits", num_gradients=num_gradients)
    if (early := judge_early(series, names, finish)) is not None:
        return early
    sizes = np.minimum(ess(series), ess(series, method="tail"))
    least = int(np.argmin(sizes))
    cost = f", {1e3 * sizes[least] / num_gradients:.3g} per 1,000 gradients" if num_gradients else ""
    told = f"smallest for {names[least]}{cost}"
    if not sizes[least] >= ESS_MIXED:
        more = "" if not sizes[least] > 0 else f"; draw {np.ceil(ESS_MIXED / sizes[least]):.0f} times as many"
        return finish("not assessable", sizes[least], told + more)
    return finish("pass", sizes[least], told)


def check_autocorrelation_time(
    values: Any,
    names: Sequence[str] | None = None,
    *,
    num_steps: int | None,
    steps_per_draw: int = 1,
    persistent: bool = True,
) -> Check:
    """The integrated autocorrelation time against the kernel steps ``k`` that training takes per phase.

    Chains that start afresh at every update need five to ten autocorrelation times to arrive. Persistent ones carry on
    where they were, and need as many only while the energy changes as much.

    Args:
        values: ``(chain, draw, *shape)``; the energy first of all.
        names: One name per variable.
        num_steps: ``k``; not assessable when ``None``.
        steps_per_draw: Kernel steps between draws.
        persistent: Whether chains are kept from update to update.

    Returns:
        Pass: ``k >= 5 tau``. Below it warns, and below ``tau`` it fails where chains start afresh.

    Raises:
        ValueError: the shapes do not fit, or a count is below 1.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(16, 500))
        >>> check_autocorrelation_time(draws, num_steps=10).status, check_autocorrelation_time(draws, num_steps=1).status
        ('pass', 'warn')

    References:
        Decelle, Furtlehner, Seoane (2021), arXiv:2105.13889.
    """
    series = as_series(values)
    names = name_series(series, names)
    steps_per_draw = check_count("steps_per_draw", steps_per_draw)
    finish = Outcome("autocorrelation_time", "<= k / 5", "slow directions that no variable is a projection on")
    if (early := judge_early(series, names, finish)) is not None:
        return early
    with np.errstate(divide="ignore"):
        times = steps_per_draw * series.shape[0] * series.shape[1] / ess(series, method="mean")
    worst = int(np.argmax(times))
    tau = float(max(times[worst], 1.0))
    told = f"{tau:.3g} kernel steps, of {names[worst]}"
    if num_steps is None:
        return finish("not assessable", tau, f"{told}; pass num_steps=k, the kernel steps of one phase of training")
    k = check_count("num_steps", num_steps)
    # The time itself is known to a relative error of about sqrt(12 tau / draws).
    error = min(np.sqrt(12.0 * tau / (steps_per_draw * series.shape[0] * series.shape[1])), 0.5)
    surely = tau * (1.0 - 3.0 * error) if tau > 1.0 else 1.0
    if k >= STEPS_PER_TIME * tau:
        return finish("pass", tau, f"{told}; k = {k}")
    if k >= STEPS_PER_TIME * surely:
        return finish("not assessable", tau, f"{told}, too few draws to hold it against k = {k}")
    if k < surely and not persistent:
        return finish("fail", tau, f"{told}; k = {k} leaves chains near their start: raise it")
    return finish("warn", tau, f"{told}; k = {k} is less than five of them")
