"""Comparing means of dependent draws: what each is worth, and how far two of them are apart."""

from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from ebm_ppl.diagnostics.guarded import memories

NUM_ERRORS = 5.0
"""Standard errors by which two means must differ before it is called a difference."""
MAX_PROBABILITY = 1e-3
"""And the chance of seeing as much without one, over all statistics of a check, with the errors themselves uncertain."""


class Means(NamedTuple):
    """Means of several statistics, with their errors.

    Attributes:
        mean: ``(statistic,)``.
        variance: Of the means, ``(statistic,)``.
        degrees: Degrees of freedom behind the variance.
        spread: Standard deviation of one draw, ``(statistic,)``.
        size: How many draws there are, memory within chains allowed for: ``(statistic,)`` or one number. No mean is worth
            more than that of so many independent ones.
    """

    mean: np.ndarray
    variance: np.ndarray
    degrees: float
    spread: np.ndarray
    size: np.ndarray | float


def means_of_rows(values: Any) -> Means:
    """Means of independent rows, ``(row, statistic)``.

    Example:
        >>> float(means_of_rows(np.array([[1.0], [3.0]])).mean[0])
        2.0
    """
    values = np.asarray(values, np.float64)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return Means(values.mean(axis=0), spread**2 / len(values), len(values) - 1.0, spread, float(len(values)))


def means_of_chains(values: Any) -> Means:
    """Means of chains that are independent of each other, ``(chain, draw, statistic)``.

    Their error is the spread of the chains' own means, and at least what their autocorrelation says.

    Example:
        >>> round(float(means_of_chains(np.array([[[1.0]], [[3.0]]])).variance[0]), 6)
        1.0
    """
    values = np.asarray(values, np.float64)
    num_chains, num_draws = values.shape[:2]
    spread = values.reshape(num_chains * num_draws, -1).std(axis=0, ddof=1)
    between = means_of_rows(values.mean(axis=1).reshape(num_chains, -1))
    return Means(
        between.mean,
        between.variance,
        num_chains - 1.0,
        spread,
        num_chains * memories(values.reshape(num_chains, num_draws, -1)),
    )


def means_of_runs(values: Any, log_weight: Any, log_normalizer: Any) -> Means:
    """Means over independent runs of SMC, ``(run, particle, statistic)``, with weights ``(run, particle)`` and ``(run,)``.

    ``sum_r Z_r m_r / sum_r Z_r``, ``m_r`` the weighted mean of run ``r`` and ``Z_r`` its normaliser: as runs grow in number
    this tends to the mean under the target however few particles each has. The variance is the jackknife's over runs.

    Example:
        >>> flat = np.zeros((2, 3))
        >>> float(means_of_runs(np.arange(6.0).reshape(2, 3, 1), flat, np.zeros(2)).mean[0])
        2.5
    """
    values, log_weight = np.asarray(values, np.float64), np.asarray(log_weight, np.float64)
    log_normalizer = np.asarray(log_normalizer, np.float64)
    num_runs = len(values)
    weight = np.exp(log_weight - log_weight.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    share = np.exp(log_normalizer - log_normalizer.max())
    share /= share.sum()
    own = np.einsum("rp,rps->rs", weight, values)
    mean = share @ own
    rest = 1.0 - share
    without = (mean - share[:, None] * own) / np.where(rest > 0, rest, np.nan)[:, None]
    jackknife = (num_runs - 1.0) / num_runs * ((without - without.mean(axis=0)) ** 2).sum(axis=0)
    every = share[:, None] * weight
    spread = np.sqrt(np.einsum("rp,rps->s", every, (values - mean) ** 2))
    return Means(mean, jackknife, num_runs - 1.0, spread, float(1.0 / (every**2).sum()))


class Difference(NamedTuple):
    """How far two sets of means are apart.

    Attributes:
        error: Standard errors of the differences, ``(statistic,)``.
        z: Differences over their errors, ``(statistic,)``; zero where nothing varies and nothing differs.
        probability: Chance of the largest of them, without a difference (Welch's t, times the number of statistics).
        effect: Differences over the standard deviation of one draw, ``(statistic,)``.
        relative_error: Errors over that standard deviation, ``(statistic,)``.
    """

    error: np.ndarray
    z: np.ndarray
    probability: float
    effect: np.ndarray
    relative_error: np.ndarray

    @property
    def resolution(self) -> float:
        """Difference that would have been called one, in standard deviations of one draw; largest over the statistics."""
        return float(NUM_ERRORS * np.max(self.relative_error))

    @property
    def worst(self) -> int:
        """Which statistic differs most."""
        return int(np.argmax(np.abs(self.z)))

    @property
    def is_significant(self) -> bool:
        """Whether it differs by more than :data:`NUM_ERRORS` errors, and not by chance."""
        return bool(np.abs(self.z).max() > NUM_ERRORS and self.probability < MAX_PROBABILITY)

    @property
    def may_be_chance(self) -> bool:
        """Whether it differs by more than :data:`NUM_ERRORS` errors that are themselves too uncertain to call it one."""
        return bool(np.abs(self.z).max() > NUM_ERRORS and not self.probability < MAX_PROBABILITY)


def difference(first: Means, second: Means) -> Difference:
    """``first - second``, statistic by statistic.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> found = difference(means_of_rows(rng.normal(size=(100, 1))), means_of_rows(rng.normal(1.0, size=(100, 1))))
        >>> bool(found.z[0] < -5), found.is_significant
        (True, True)
    """
    spread = np.sqrt(0.5 * (first.spread**2 + second.spread**2))
    # A few runs may agree by chance, and a rare event may be missing from one side: neither makes a mean exact.
    variances = [np.maximum(one.variance, spread**2 / one.size) for one in (first, second)]
    total = variances[0] + variances[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = total**2 / (variances[0] ** 2 / first.degrees + variances[1] ** 2 / second.degrees)
    return of_difference(first.mean - second.mean, np.sqrt(total), degrees, spread)


def of_difference(value: np.ndarray, error: np.ndarray, degrees: Any, spread: np.ndarray) -> Difference:
    """Judge differences with given errors and degrees of freedom."""
    with np.errstate(invalid="ignore", divide="ignore"):
        z, effect = (np.where(value == 0, 0.0, value / scale) for scale in (error, spread))
        relative_error = np.where(error == 0, 0.0, error / spread)
    tails = 2.0 * scipy.stats.t.sf(np.abs(z), np.where(error > 0, degrees, 1.0))
    probability = np.where(np.isinf(z), 0.0, tails).min() * z.size
    return Difference(error, z, float(min(probability, 1.0)), effect, relative_error)
