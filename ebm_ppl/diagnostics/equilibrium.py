"""Checks of chains against data, against themselves later on, and against SMC: energy gap, energy drift, cross-check."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ebm_ppl.diagnostics.check import Check
from ebm_ppl.diagnostics.comparison import (
    Means,
    difference,
    means_of_chains,
    means_of_rows,
    of_difference,
)
from ebm_ppl.diagnostics.guarded import as_series
from ebm_ppl.diagnostics.mixing import MIN_CHAINS
from ebm_ppl.diagnostics.outcome import name_series

FAILED_DRIFT = 10.0
"""Standard errors of drift that fail; five warn."""
FEW_FOR_ERROR = "a difference that would be one, were its error known from more rows or chains: draw more of them"
COARSE = 0.5
"""A comparison that would miss a difference of so many standard deviations of one draw says nothing."""


def check_energy_gap(data_energy: Any, energy: Any) -> Check:
    """Mean energy of the data minus mean energy of the negatives, in standard errors of both.

    At the maximum of the likelihood they are equal under a model that is flexible enough. A gap may be the sampler's fault
    or the model's, and so only warns; one that keeps growing as the chains go on is the sampler's, and fails.
    :func:`diagnose` puts a warning down to the model where the chains agree with SMC.

    Args:
        data_energy: ``(row,)``.
        energy: Of the negatives, ``(chain, draw)``.

    Returns:
        Value: the gap in standard errors.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> check_energy_gap(rng.normal(size=1000), rng.normal(size=(16, 100))).status
        'pass'
        >>> check_energy_gap(rng.normal(-1.0, size=1000), rng.normal(size=(16, 100))).status
        'warn'
    """
    blind_to = "wrong mode weights, of chains that sit at those of the data: z of .5 was measured 3.5 nats off"
    threshold = "|z| <= 5"
    series, rows = as_series(energy)[..., :1], np.asarray(data_energy, np.float64).reshape(-1, 1)
    if not (np.isfinite(series).all() and np.isfinite(rows).all()) or len(series) < MIN_CHAINS or len(rows) < 2:
        return Check("energy_gap", "not assessable", np.nan, threshold, _too_little(series), blind_to)
    found = difference(means_of_rows(rows), means_of_chains(series))
    z = float(found.z[0])
    if found.may_be_chance:
        return Check("energy_gap", "not assessable", z, threshold, FEW_FOR_ERROR, blind_to)
    if not found.is_significant:
        return Check("energy_gap", "pass", z, threshold, "data and negatives have the same mean energy", blind_to)
    part = max(series.shape[1] // 5, 1)
    growth = np.sign(z) * (series[:, :part].mean(axis=1) - series[:, -part:].mean(axis=1))
    grows = _paired(growth)
    if series.shape[1] > 1 and grows.is_significant and grows.z[0] > 0:
        return Check("energy_gap", "fail", z, threshold, "the gap keeps growing as chains go on", blind_to)
    lower = "negatives" if z > 0 else "data"
    why = f"the {lower} have the lower energy: chains that have not arrived, or a model that does not fit"
    return Check("energy_gap", "warn", z, threshold, why, blind_to)


def check_energy_drift(start: Any, later: Any, names: Sequence[str] | None = None) -> Check:
    """Whether the negatives are what the chains stay at when they go on at frozen parameters, pair by pair.

    A short run from noise reproduces the data at exactly the ``k`` steps of training, and moves on from there.

    Args:
        start: Statistics of the negatives as training left them, ``(chain, *shape)``; the energy first of all.
        later: Of the same chains as they went on, ``(chain, draw, *shape)``; the second half of the draws counts.
        names: One name per statistic.

    Returns:
        Value: the largest change in standard errors. Warn above 5, fail above 10.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> later = rng.normal(size=(64, 100))
        >>> check_energy_drift(rng.normal(size=64), later).status, check_energy_drift(np.full(64, 9.0), later).status
        ('pass', 'fail')

    References:
        Agoritsas, Catania, Decelle, Seoane (2023), arXiv:2301.09428; Nijkamp, Hill, Zhu, Wu (2019), arXiv:1904.09770.
    """
    after = as_series(later)
    before = as_series(np.asarray(start)[:, None])[:, 0]
    names = name_series(after, names)
    if before.shape != (after.shape[0], after.shape[2]):
        raise ValueError(f"start: got shape {np.shape(start)}, expected one event per chain of {np.shape(later)}.")
    blind_to = "mode weights, of chains that cannot leave their modes: z of -2 was measured at a weight of .99 for .2"
    threshold = "|z| <= 5; fails > 10"

    def finish(status: Any, value: float, why: str) -> Check:
        return Check("energy_drift", status, value, threshold, why, blind_to, is_required=True)

    if not (np.isfinite(before).all() and np.isfinite(after).all()) or len(after) < MIN_CHAINS:
        return finish("not assessable", np.nan, _too_little(after))
    change = after[:, after.shape[1] // 2 :].mean(axis=1) - before
    if not change.any():
        return finish("not assessable", np.nan, "no statistic of any chain changed: the chains are frozen")
    spread = after.reshape(-1, after.shape[-1]).std(axis=0)
    found = _paired(change, spread)
    z, told = float(found.z[found.worst]), f"largest for {names[found.worst]}"
    if found.may_be_chance:
        return finish("not assessable", z, f"{told}: {FEW_FOR_ERROR}")
    if not found.is_significant:
        return finish("pass", z, f"{told}; a drift of {found.resolution:.2g} standard deviations would have shown")
    status = "fail" if abs(z) > FAILED_DRIFT else "warn"
    return finish(status, z, f"{told}: the negatives of training are not at equilibrium")


def check_smc_crosscheck(values: Any, runs: Means, names: Sequence[str] | None = None) -> Check:
    """Whether chains and SMC, which share nothing but the energy, agree on means: of the energy, moments, mode indicators.

    Args:
        values: Statistics of the chains at frozen parameters, ``(chain, draw, *shape)``.
        runs: The same statistics under SMC, from :func:`means_of_runs`, at least 8 runs.
        names: One name per statistic.

    Returns:
        Value: the largest difference in standard errors. Above 5 it fails, where the chance of as much (Welch's t over all
        statistics; few runs have an uncertain error) is below a thousandth. "Not assessable" where a difference of half a
        standard deviation would not have shown.

    Raises:
        ValueError: the shapes do not fit.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> from ebm_ppl.diagnostics import means_of_runs
        >>> runs = means_of_runs(rng.normal(size=(8, 500, 1)), np.zeros((8, 500)), np.zeros(8))
        >>> draws = rng.normal(size=(32, 200))
        >>> check_smc_crosscheck(draws, runs).status, check_smc_crosscheck(draws + 1.0, runs).status
        ('pass', 'fail')
    """
    series = as_series(values)
    names = name_series(series, names)
    if runs.mean.shape != series.shape[2:]:
        raise ValueError(f"runs: got {runs.mean.size} statistics, expected the {series.shape[-1]} of the chains.")
    blind_to = "what SMC has missed too: see log_z_gap"
    threshold = "|z| <= 5"

    def finish(status: Any, value: float, why: str) -> Check:
        return Check("smc_crosscheck", status, value, threshold, why, blind_to, is_required=True)

    if not (np.isfinite(series).all() and np.isfinite(runs.mean).all()) or len(series) < MIN_CHAINS:
        return finish("not assessable", np.nan, _too_little(series))
    found = difference(means_of_chains(series), runs)
    z, told = float(found.z[found.worst]), f"largest for {names[found.worst]}"
    if found.is_significant:
        return finish("fail", z, f"{told}: chains and SMC sample different laws")
    if not found.resolution <= COARSE:
        return finish("not assessable", z, f"{told}; a difference of {found.resolution:.2g} sd would not have shown")
    return finish("pass", z, f"{told}; a difference of {found.resolution:.2g} sd would have shown")


def _paired(change: np.ndarray, spread: np.ndarray | None = None) -> Any:
    change = change.reshape(len(change), -1)
    means = means_of_rows(change)
    return of_difference(means.mean, np.sqrt(means.variance), means.degrees, means.spread if spread is None else spread)


def _too_little(series: np.ndarray) -> str:
    if len(series) < MIN_CHAINS:
        return f"{len(series)} chains; needs at least {MIN_CHAINS}, whose means give the error"
    return "some energies or statistics are NaN or infinite"
