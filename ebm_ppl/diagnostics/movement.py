"""Checks of how chains move: acceptance, frozen chains, non-finite and divergent draws, momentum that does not mix."""

from typing import Any

import arviz_stats
import numpy as np

from ebm_ppl.diagnostics.check import Check
from ebm_ppl.diagnostics.guarded import as_series
from ebm_ppl.diagnostics.mixing import MIN_DRAWS

_bfmi: Any = getattr(arviz_stats, "bfmi")  # noqa: B009 - a public name that the stubs do not list

LOW_ACCEPTANCE = 0.05
"""Proposals are accepted less often than this where steps are too long, or a proposal misses the mass."""
HIGH_ACCEPTANCE = 0.95
"""More often where steps are so short that chains crawl; remarked on only, since exact moves are always accepted."""
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
    """Energy Bayesian fraction of missing information of HMC and NUTS, smallest over the chains.

    ``sum_n (H_n - H_(n-1))^2 / sum_n (H_n - mean H)^2``: how much of the variation of the energy one draw of the momentum
    makes. Independent draws have about 2.

    Args:
        hamiltonian: The HAMILTONIAN of each draw, momentum included, ``(chain, draw)``; not the energy of the position.
            ``None`` where the kernel has none.

    Returns:
        Warn below .3.

    Example:
        >>> walk = np.random.default_rng(0).normal(size=(4, 500)).cumsum(axis=1)
        >>> check_bfmi(walk).status, check_bfmi(None).status
        ('warn', 'not assessable')

    References:
        Betancourt (2016), Diagnosing suboptimal cotangent disintegrations in Hamiltonian Monte Carlo, arXiv:1604.00695.
    """
    blind_to = "modes; it asks whether momenta reach all levels of the energy"
    if hamiltonian is None:
        why = "the kernel reports no Hamiltonian; NUTS of NumPyro does, as energy in its sample_stats"
        return Check("bfmi", "not assessable", np.nan, ">= .3", why, blind_to)
    series = as_series(hamiltonian)
    if series.shape[1] < 2 * MIN_DRAWS or not np.isfinite(series).all() or (np.ptp(series, axis=1) == 0).any():
        why = f"{series.shape[1]} draws per chain, or energies that are not finite or never change"
        return Check("bfmi", "not assessable", np.nan, ">= .3", why, blind_to)
    value = float(np.min(_bfmi(series[..., 0], chain_axis=0, draw_axis=1)))
    if value < MIN_BFMI:
        return Check("bfmi", "warn", value, ">= .3", "momenta change the energy too little: heavy tails", blind_to)
    return Check("bfmi", "pass", value, ">= .3", "momenta reach all levels of the energy", blind_to)
