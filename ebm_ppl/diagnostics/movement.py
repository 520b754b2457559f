"""Checks of how chains move: acceptance, frozen chains, non-finite and divergent draws, momentum that does not mix."""

from typing import Any

import numpy as np

from ebm_ppl.diagnostics.check import Check
from ebm_ppl.diagnostics.guarded import as_series
from ebm_ppl.diagnostics.mixing import MIN_DRAWS

LOW_ACCEPTANCE = 0.05
"""Proposals are accepted less often than this where steps are too long, or a proposal misses the mass."""
HIGH_ACCEPTANCE = 0.95
"""More often where steps are so short that chains crawl; remarked on only, since exact moves are always accepted."""
MAX_ROUNDING = 0.01
"""Of the mean squared step of a Hamiltonian, what the square of its last digit may be."""
MIN_BFMI = 0.3
"""Below it momenta carry a chain too slowly from one level of the energy to the next (Betancourt 2016)."""


def check_acceptance(acceptance_rate: Any) -> Check:
    """Whether proposals are accepted at all.

    Args:
        acceptance_rate: Any shape; NaN for kernels without an accept step.

    Returns:
        Warn below .05, fail below .001. Without an accept step it is not assessable, and draws have the bias of the step.

    Example:
        >>> check_acceptance([0.6, 0.7]).status, check_acceptance([0.98, 0.99]).why[:20], check_acceptance([0.0]).status
        ('pass', 'most moves are accep', 'fail')
    """
    rate = np.asarray(acceptance_rate, np.float64)
    blind_to = "modes that are never proposed: .98 was measured with chains that cannot leave their mode"
    known = rate[np.isfinite(rate)]
    if known.size == 0:
        why = "the kernel has no accept step, and its draws the bias of its step"
        return Check("acceptance", "not assessable", np.nan, ">= .05", why, blind_to)
    mean = float(known.mean())
    if mean < LOW_ACCEPTANCE:
        status = "fail" if mean < 1e-3 else "warn"
        return Check("acceptance", status, mean, ">= .05", "almost no move is accepted: shorten the steps", blind_to)
    often = f"most moves are accepted; for local moves above {HIGH_ACCEPTANCE:.2f} the steps are short"
    return Check("acceptance", "pass", mean, ">= .05", often if mean > HIGH_ACCEPTANCE else "moves are made", blind_to)


def check_frozen(position: Any) -> Check:
    """Whether every chain moves.

    A trajectory of step size zero is always accepted, and ArviZ gives a frozen chain a perfect effective sample size; only
    positions tell.

    Args:
        position: ``(chain, draw, *event)``.

    Returns:
        Value: the fraction of chains that never move; above zero it fails.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4, 50))
        >>> draws[1] = 0.0
        >>> check_frozen(draws).status, check_frozen(draws).value
        ('fail', 0.25)
    """
    series = as_series(position)
    blind_to = "chains that move within one mode only"
    if series.shape[1] < MIN_DRAWS:
        why = f"{series.shape[1]} draws per chain; needs at least {MIN_DRAWS}"
        return Check("frozen", "not assessable", np.nan, "= 0", why, blind_to)
    # A draw that is not a number differs from nothing: a chain of such draws does not move either.
    frozen = ~(series[:, 1:] != series[:, :-1]).any(axis=(1, 2)) | np.isnan(series).all(axis=(1, 2))
    value = float(frozen.mean())
    if frozen.any():
        why = f"{int(frozen.sum())} of {frozen.size} chains never move, the first at index {int(np.argmax(frozen))}"
        return Check("frozen", "fail", value, "= 0", why, blind_to)
    return Check("frozen", "pass", value, "= 0", "every chain moves", blind_to)


def check_nonfinite(values: Any) -> Check:
    """Whether every draw, and its energy, is a finite number.

    Args:
        values: ``(chain, draw, *shape)``: positions, energies, or statistics of them.

    Returns:
        Value: how many draws are not; above zero it fails.

    Example:
        >>> check_nonfinite(np.array([[0.0, np.nan, 1.0]])).status
        'fail'
    """
    bad = ~np.isfinite(as_series(values)).all(axis=-1)
    count, blind_to = int(bad.sum()), "draws that are finite and wrong"
    if count:
        chain, draw = np.argwhere(bad)[0]
        why = f"{count} of {bad.size} draws are NaN or infinite, the first in chain {chain} at draw {draw}"
        return Check("nonfinite", "fail", count, "= 0", why, blind_to)
    return Check("nonfinite", "pass", 0.0, "= 0", "all draws and energies are finite", blind_to)


def check_divergences(is_divergent: Any) -> Check:
    """How often a step failed numerically.

    Args:
        is_divergent: ``(chain, draw)``.

    Returns:
        Value: the fraction of draws. Warn above zero, fail above a hundredth.

    Example:
        >>> check_divergences(np.zeros((4, 100), bool)).status, check_divergences(np.ones((4, 100), bool)).status
        ('pass', 'fail')
    """
    flags = np.asarray(is_divergent, bool)
    rate, blind_to = float(flags.mean()), "regions that chains turn away from without diverging"
    if rate == 0:
        return Check("divergences", "pass", rate, "= 0; fails > .01", "no step failed", blind_to)
    why = f"{int(flags.sum())} of {flags.size} draws follow a step that failed: shorten the steps"
    return Check("divergences", "fail" if rate > 0.01 else "warn", rate, "= 0; fails > .01", why, blind_to)


def check_bfmi(hamiltonian: Any) -> Check:
    """Energy Bayesian fraction of missing information of HMC and NUTS, of all chains together.

    ``E[(H_n - H_(n-1))^2] / Var H``: how much of the variation of the energy one draw of the momentum makes. Independent
    draws have 2. The mean that the variance is around is that of all chains: a chain that is shorter than its memory varies
    little around its own. ArviZ has one value per chain, and the smallest of 64 short ones is below .3 for many a sound
    sampler.

    Args:
        hamiltonian: The HAMILTONIAN after every step, momentum included, ``(chain, step)``; not the energy of the position,
            and not of every few steps. ``None`` where the kernel has none.

    Returns:
        Warn below .3. "Not assessable" where it is below by less than twice its error, or where the last digit of the
        energies is a tenth of their steps.

    Example:
        >>> walk = np.random.default_rng(0).normal(size=(4, 500)).cumsum(axis=1)
        >>> check_bfmi(walk).status, check_bfmi(None).status
        ('warn', 'not assessable')

    References:
        Betancourt (2016), Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo, arXiv:1604.00695.
    """
    blind_to = "modes; it asks whether momenta reach all levels of the energy"

    def finish(status: Any, value: float, why: str) -> Check:
        return Check("bfmi", status, value, ">= .3", why, blind_to)

    if hamiltonian is None:
        return finish("not assessable", np.nan, "the kernel has no momenta that it draws anew, as HMC and NUTS do")
    series = as_series(hamiltonian)[..., 0]
    if series.shape[1] < 2 * MIN_DRAWS or not np.isfinite(series).all() or (np.ptp(series, axis=1) == 0).any():
        why = f"{series.shape[1]} draws per chain, or energies that are not finite or never change"
        return finish("not assessable", np.nan, why)
    steps = np.diff(series, axis=1)
    spacing = float(np.spacing(np.abs(np.asarray(hamiltonian)).max()))
    if not spacing**2 < MAX_ROUNDING * (steps**2).mean():
        why = f"energies are so large that their last digit is {spacing:.2g}: subtract a constant, or use float64"
        return finish("not assessable", np.nan, why)
    value = float((steps**2).mean() / series.var())
    if not value < MIN_BFMI:
        return finish("pass", value, "momenta reach all levels of the energy")
    # Energies forget exponentially, by rho a step, and their variance is known no better than that allows.
    rho = 1.0 - value / 2.0
    error = value * np.sqrt(2.0 * (1.0 + rho**2) / ((1.0 - rho**2) * series.size))
    if not value + 2.0 * error < MIN_BFMI:
        return finish("not assessable", value, f"{series.size} draws are too few to tell: the error is {error:.2g}")
    return finish("warn", value, "momenta change the energy too little: heavy tails, or modes at levels of their own")
