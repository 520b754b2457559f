"""The Ising ring under random-scan heat bath: correlations after any number of updates, and what short runs can fit."""

import math
from typing import cast

import numpy as np
from scipy.optimize import brentq

from ebm_ppl.checks import check_count
from ebm_ppl.testing.numbers import check_numbers


def _ring(alignment: float, num_sites: int, num_updates: int) -> np.ndarray:
    """Correlations ``C_0 ... C_N`` from ``γ = tanh(2 J)``, which may be 1 or -1."""
    correlations = np.zeros(num_sites + 1)
    correlations[[0, -1]] = 1.0  # of a site with itself; no update changes it
    for _ in range(num_updates):
        pull = alignment * (correlations[:-2] + correlations[2:]) - 2.0 * correlations[1:-1]
        correlations[1:-1] += pull / num_sites
    return correlations


def ring_correlations(coupling: float, num_sites: int, num_updates: int) -> np.ndarray:
    """Correlations ``C_n = E[s_i s_{i+n}]`` of an Ising ring after updates of sites that are chosen at random.

    For ``p ∝ exp(J sum_i s_i s_{i+1})`` one update maps ``C_n`` to ``C_n + (γ (C_{n-1} + C_{n+1}) - 2 C_n) / N``, with
    ``γ = tanh(2 J)`` and ``C_0 = C_N = 1``; fair spins start with all others 0.

    Args:
        coupling: ``J``, any sign.
        num_sites: ``N``, at least 3: the two bonds of a ring of two are one.
        num_updates: Updates of single sites, at least 0; a sweep is ``N`` of them.

    Returns:
        ``(N,)``: ``C_0 ... C_{N-1}``.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> ring_correlations(0.5, 4, 1).round(4).tolist()
        [1.0, 0.1904, 0.0, 0.1904]

    References:
        Glauber (1963), Time-dependent statistics of the Ising model, Journal of Mathematical Physics 4.
    """
    coupling = float(check_numbers("coupling", coupling, shape=()))
    num_sites, num_updates = check_count("num_sites", num_sites, 3), check_count("num_updates", num_updates, 0)
    return _ring(math.tanh(2.0 * coupling), num_sites, num_updates)[:-1]


def ring_equilibrium_correlation(coupling: float, num_sites: int) -> float:
    """Correlation of neighbours at equilibrium: ``(t + t^(N-1)) / (1 + t^N)`` with ``t = tanh J``.

    Args:
        coupling: ``J``, any sign.
        num_sites: ``N``, at least 3.

    Returns:
        ``E[s_i s_{i+1}]``.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> round(ring_equilibrium_correlation(0.5, 20), 6)
        0.462117
    """
    correlation = math.tanh(float(check_numbers("coupling", coupling, shape=())))
    num_sites = check_count("num_sites", num_sites, 3)
    if num_sites % 2:  # 1 + t divides both sides, and vanishes where a strong coupling is frustrated
        powers = (-correlation) ** np.arange(num_sites)
        return float(correlation * powers[:-2].sum() / powers.sum())
    return (correlation + correlation ** (num_sites - 1)) / (1.0 + correlation**num_sites)


def ring_correlation_bound(num_sites: int, num_sweeps: int) -> float:
    """What the correlation of neighbours stays below after ``k`` sweeps, however strong the coupling (``γ -> 1``).

    On a long ring it is ``1 - exp(-2 k) (I_0(2 k) + I_1(2 k))``, with modified Bessel functions. Data that are correlated
    more strongly have no short-run coupling.

    Args:
        num_sites: ``N``, at least 3.
        num_sweeps: ``k``, sweeps of ``N`` updates, at least 1.

    Returns:
        The least upper bound of ``C_1`` over all couplings; none attains it.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> round(ring_correlation_bound(20, 1), 4)
        0.4824
    """
    num_sites, num_sweeps = check_count("num_sites", num_sites, 3), check_count("num_sweeps", num_sweeps)
    return float(_ring(1.0, num_sites, num_sites * num_sweeps)[1])


def ring_coupling(correlation: float, num_sites: int, num_sweeps: int) -> float:
    """The coupling ``J_k`` that short-run training ends at: neighbours correlate as in the data after ``k`` sweeps.

    Args:
        correlation: Of neighbours in the data, ``C_1``.
        num_sites: ``N``, at least 3.
        num_sweeps: ``k``, sweeps of ``N`` updates, at least 1.

    Returns:
        ``J_k``.

    Raises:
        ValueError: no coupling gets there in ``k`` sweeps, so that training would never end, or a number out of its range.

    Example:
        >>> data = ring_equilibrium_correlation(0.5, 20)
        >>> [round(ring_coupling(data, 20, k), 4) for k in (1, 2, 5)]
        [1.0026, 0.5683, 0.5044]

    References:
        Agoritsas, Catania, Decelle, Seoane (2023), Explaining the effects of non-convergent sampling in the training of
        energy-based models, arXiv:2301.09428.
    """
    correlation = float(check_numbers("correlation", correlation, shape=()))
    upper = ring_correlation_bound(num_sites, num_sweeps)
    lower = float(_ring(-1.0, num_sites, num_sites * num_sweeps)[1])
    if not lower < correlation < upper:
        raise ValueError(
            f"correlation: got {correlation:g}, expected a number between {lower:.6g} and {upper:.6g}, the bounds of what "
            f"any coupling reaches in num_sweeps={num_sweeps} on num_sites={num_sites}; training would not end."
        )
    # In 64 bits tanh(2 J) is exactly 1 at J = 20: the bracket spans all couplings.
    excess = lambda coupling: _ring(math.tanh(2.0 * coupling), num_sites, num_sites * num_sweeps)[1] - correlation
    return cast(float, brentq(excess, -20.0, 20.0, xtol=1e-14))
