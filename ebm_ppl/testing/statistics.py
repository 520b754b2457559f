"""Checks of samples, means and counts, each with a false-failure rate and a stated power.

A check states three numbers: its statistic, the critical value that a correct program exceeds with probability at most
``alpha``, and its power, the smallest discrepancy it would detect with probability at least ``1 - MISS_RATE``. The
inequalities used hold at every sample size, so ``alpha`` is a bound and not an approximation; only the t-test relies on
means of independent chains being close to normal.

A suite of at most ``SUITE_CHECKS`` checks at the default ``ALPHA`` fails by chance with probability below
``FAMILY_ALPHA``. ``CHECKS`` counts what a session has spent.

References:
    Massart (1990), The tight constant in the Dvoretzky-Kiefer-Wolfowitz inequality, Annals of Probability 18.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats

from ebm_ppl.checks import check_count

FAMILY_ALPHA = 1e-4
"""Probability that a correct package fails a whole run of its suite."""
SUITE_CHECKS = 1000
"""Stochastic checks that the suite may perform at the default level."""
ALPHA = FAMILY_ALPHA / SUITE_CHECKS
"""Default false-failure rate of one check."""
MISS_RATE = 1e-3
"""Probability with which a discrepancy as large as the stated power may go unnoticed."""


class CheckLedger:
    """Counts the stochastic checks performed, and the false-failure probability they may have spent together."""

    def __init__(self):
        self.count = 0
        self.spent = 0.0

    def record(self, alpha: float) -> None:
        """Register one check of level ``alpha``."""
        self.count += 1
        self.spent += alpha


CHECKS = CheckLedger()
"""The ledger of this process. The suite's ``conftest.py`` fails a session that spends more than ``FAMILY_ALPHA``."""


class Check(NamedTuple):
    """Outcome of one check.

    Attributes:
        name: What was compared.
        statistic: The discrepancy observed; NaN fails.
        critical: Largest discrepancy that passes.
        passed: Whether ``statistic <= critical``.
        power: Smallest true discrepancy, in the units of ``statistic``, that is detected with probability at least
            ``1 - MISS_RATE``. For a t-test, in the units of the values.
    """

    name: str
    statistic: float
    critical: float
    passed: bool
    power: float

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return f"{self.name:<18} {self.statistic:>11.4g} {self.critical:>11.4g} {self.power:>11.4g}  {verdict}"

    def raise_if_failed(self) -> "Check":
        """The check itself, or an error that states its numbers.

        Raises:
            AssertionError: the check failed.
        """
        if not self.passed:
            raise AssertionError(f"{CHECK_HEADER}\n{self}")
        return self


CHECK_HEADER = f"{'':<18} {'statistic':>11} {'critical':>11} {'power':>11}"


def _check(name: str, statistic: float, critical: float, power: float) -> Check:
    return Check(name, float(statistic), float(critical), bool(statistic <= critical), float(power))


def dkw_critical_value(num_samples: int, alpha: float, num_reference: int | None = None) -> float:
    """Dvoretzky-Kiefer-Wolfowitz-Massart: ``P(sup |F_n - F| > sqrt(log(2/alpha) / 2n)) <= alpha``.

    Args:
        num_samples: Number ``n`` of i.i.d. samples.
        alpha: False-failure rate, in (0, 1).
        num_reference: Size ``m`` of an independent second sample, for ``sup |F_n - G_m|``: ``n`` becomes
            ``n m / (n + m)``. ``None`` compares with an exact CDF.

    Returns:
        The critical value of the Kolmogorov-Smirnov statistic.

    Raises:
        ValueError: ``alpha`` is not in (0, 1) or a sample is empty.

    Example:
        >>> round(dkw_critical_value(400_000, 1e-6), 5)
        0.00426

    References:
        Massart (1990); two samples: Wei, Dudley (2012), Statistics and Probability Letters 82.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha: got {alpha}, expected a probability in (0, 1).")
    effective = check_count("num_samples", num_samples)
    if num_reference is not None:
        effective = num_samples * num_reference / (num_samples + check_count("num_reference", num_reference))
    return math.sqrt(math.log(2.0 / alpha) / (2.0 * effective))


def detectable(num_samples: int, alpha: float = ALPHA, num_reference: int | None = None) -> float:
    """Smallest ``sup |F - G|`` between the true laws that a DKW check detects with probability ``>= 1 - MISS_RATE``.

    By the triangle inequality the critical value plus the sampling error at level ``MISS_RATE``. Arguments are those of
    :func:`dkw_critical_value`.

    Example:
        >>> round(detectable(400_000, 1e-6), 4)
        0.0073
    """
    sampling_error = dkw_critical_value(num_samples, MISS_RATE, num_reference)
    return dkw_critical_value(num_samples, alpha, num_reference) + sampling_error


def ks_statistic(samples: Any, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """``sup_x |F_n(x) - F(x)|`` of real samples against a continuous CDF.

    Args:
        samples: ``(n,)``.
        cdf: NumPy function of a sorted array, elementwise.

    Returns:
        The statistic; NaN if a sample is NaN.

    Raises:
        ValueError: the samples are not one-dimensional, or there are none.

    Example:
        >>> ks_statistic([0.25, 0.75], lambda x: x)
        0.25
    """
    ordered = np.sort(_column("samples", samples))
    exact = np.asarray(cdf(ordered))
    steps = np.arange(ordered.size + 1) / ordered.size
    return float(np.max(np.maximum(steps[1:] - exact, exact - steps[:-1])))


def ks_statistic_two_sample(a: Any, b: Any) -> float:
    """``sup_x |F_n(x) - G_m(x)|`` of two real samples; ties, and so discrete laws, are allowed.

    Args:
        a: ``(n,)``.
        b: ``(m,)``.

    Returns:
        The statistic; NaN if a sample is NaN.

    Raises:
        ValueError: a sample is not one-dimensional, or empty.

    Example:
        >>> ks_statistic_two_sample([0.0, 1.0], [1.0, 2.0])
        0.5
    """
    a, b = np.sort(_column("a", a)), np.sort(_column("b", b))
    if np.isnan(a[-1]) or np.isnan(b[-1]):
        return math.nan
    pooled = np.concatenate([a, b])
    cdf_a = np.searchsorted(a, pooled, side="right") / a.size
    cdf_b = np.searchsorted(b, pooled, side="right") / b.size
    return float(np.max(np.abs(cdf_a - cdf_b)))


def _column(name: str, values: Any) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name}: got shape {values.shape}, expected (n,) with n >= 1.")
    return values


def cdf_test(
    samples: Any, cdf: Callable[[np.ndarray], np.ndarray], *, alpha: float = ALPHA, name: str = "cdf"
) -> Check:
    """Whether i.i.d. samples follow a continuous CDF, by DKW.

    Args:
        samples: ``(n,)``.
        cdf: NumPy function, elementwise.
        alpha: False-failure rate.
        name: Label of the check.

    Example:
        >>> cdf_test(np.linspace(0.0, 1.0, 1000), lambda x: x).passed
        True
    """
    CHECKS.record(alpha)
    num_samples = len(samples)
    critical = dkw_critical_value(num_samples, alpha)
    return _check(name, ks_statistic(samples, cdf), critical, detectable(num_samples, alpha))


def two_sample_test(a: Any, b: Any, *, alpha: float = ALPHA, name: str = "two samples") -> Check:
    """Whether two independent i.i.d. samples, ``(n,)`` and ``(m,)``, follow one law, by two-sample DKW.

    Example:
        >>> two_sample_test(np.zeros(1000), np.ones(1000)).passed
        False
    """
    CHECKS.record(alpha)
    return two_sample_check(name, a, b, alpha)


def two_sample_check(name: str, a: Any, b: Any, alpha: float) -> Check:
    """:func:`two_sample_test` as a part of a larger check: the ledger does not see it."""
    sizes = len(a), len(b)
    critical = dkw_critical_value(sizes[0], alpha, sizes[1])
    return _check(name, ks_statistic_two_sample(a, b), critical, detectable(sizes[0], alpha, sizes[1]))


def t_test_chain_means(
    values_per_chain: Any, expected: float, *, alpha: float = ALPHA, name: str = "chain means"
) -> Check:
    """Whether the mean over independent chains (or i.i.d. replicates) equals a known value: a t-test across chains.

    Draws within a chain are averaged first, so their autocorrelation does not matter. Use 64 chains or more: at 16 the
    critical value doubles.

    Args:
        values_per_chain: ``(chain,)`` or ``(chain, draw, ...)``, at least two independent chains.
        expected: The exact mean.
        alpha: False-failure rate.
        name: Label of the check.

    Returns:
        ``statistic`` is ``|t|``; ``power`` is the smallest shift of the mean detected, in the units of the values.

    Raises:
        ValueError: fewer than two chains.

    Example:
        >>> chains = np.random.default_rng(0).normal(size=(64, 10))
        >>> t_test_chain_means(chains, 0.0).passed, t_test_chain_means(chains, 1.0).passed
        (True, False)
    """
    CHECKS.record(alpha)
    values = np.asarray(values_per_chain, np.float64)
    num_chains = check_count("number of chains", values.shape[0] if values.ndim else 0, 2)
    means = values.reshape(num_chains, -1).mean(axis=1)
    standard_error = means.std(ddof=1) / math.sqrt(num_chains)
    shift = abs(means.mean() - expected)
    # Constant chains are right only when they are exactly right.
    statistic = shift / standard_error if standard_error != 0.0 else (0.0 if shift == 0.0 else math.inf)
    critical = float(scipy.stats.t.isf(alpha / 2, num_chains - 1))
    power = (critical + scipy.stats.t.isf(MISS_RATE, num_chains - 1)) * standard_error
    return _check(name, statistic, critical, power)


def binomial_test(
    successes: int, trials: int, probability: float, *, alpha: float = ALPHA, name: str = "binomial"
) -> Check:
    """Whether a count of independent successes agrees with a known probability: the exact two-sided binomial test.

    Args:
        successes: Number of successes.
        trials: Number of trials.
        probability: Exact probability of success.
        alpha: False-failure rate.
        name: Label of the check.

    Returns:
        ``statistic`` is ``|successes / trials - probability|``.

    Raises:
        ValueError: no trials, more successes than trials, or ``probability`` outside [0, 1].

    Example:
        >>> binomial_test(510, 1000, 0.5).passed, binomial_test(700, 1000, 0.5).passed
        (True, False)
    """
    check_count("trials", trials)
    if not 0 <= successes <= trials or not 0.0 <= probability <= 1.0:
        raise ValueError(f"got {successes} successes in {trials} trials of probability {probability}.")
    CHECKS.record(alpha)
    return binomial_check(name, int(successes), int(trials), probability, alpha)


def binomial_check(name: str, successes: int, trials: int, probability: float, alpha: float) -> Check:
    """:func:`binomial_test` as a part of a larger check: the ledger does not see it."""
    law = scipy.stats.binom(trials, probability)
    # The law is skewed, so each side has a margin of its own; half a count absorbs rounding.
    below = probability - (law.ppf(alpha / 2) - 0.5) / trials
    above = (law.isf(alpha / 2) + 0.5) / trials - probability
    frequency = successes / trials
    critical = above if frequency > probability else below
    power = max(below, above) + math.sqrt(math.log(2.0 / MISS_RATE) / (2.0 * trials))
    return _check(name, abs(frequency - probability), critical, power)


def multinomial_test(counts: Any, probabilities: Any, *, alpha: float = ALPHA, name: str = "multinomial") -> Check:
    """Whether counts of independent draws agree with known probabilities: the G-test with a finite-sample bound.

    With ``k`` cells and ``n`` draws the divergence ``D`` of the frequencies from the probabilities satisfies
    ``P(D > e) <= (x exp(1 - x))^(k - 1)``, ``x = e n / (k - 1) > 1``, whatever the probabilities: cells need not be
    pooled, and cells that are expected to stay nearly empty are allowed.

    Args:
        counts: ``(k,)`` whole numbers.
        probabilities: ``(k,)``, summing to 1.
        alpha: False-failure rate.
        name: Label of the check.

    Returns:
        ``statistic`` is ``D = KL(frequencies || probabilities)`` in nats; ``power`` is the smallest total variation
        distance detected.

    Raises:
        ValueError: shapes differ, a count is negative or missing, or the probabilities do not sum to 1.

    Example:
        >>> multinomial_test([30, 70], [0.3, 0.7]).passed, multinomial_test([30, 70, 0], [0.7, 0.2, 0.1]).passed
        (True, False)

    References:
        Agrawal (2020), Finite-sample concentration of the multinomial in relative entropy, arXiv:1904.02291.
    """
    CHECKS.record(alpha)
    return multinomial_check(name, counts, probabilities, alpha)


def multinomial_check(name: str, counts: Any, probabilities: Any, alpha: float) -> Check:
    """:func:`multinomial_test` as a part of a larger check: the ledger does not see it."""
    counts, probabilities = np.asarray(counts), np.asarray(probabilities, np.float64)
    if counts.shape != probabilities.shape or counts.ndim != 1 or counts.size < 2:
        raise ValueError(f"got counts {counts.shape} and probabilities {probabilities.shape}, expected two equal (k,).")
    num_draws = int(counts.sum())
    if counts.min() < 0 or num_draws < 1 or probabilities.min() < 0 or abs(probabilities.sum() - 1.0) > 1e-6:
        raise ValueError("expected counts >= 0, at least one draw, and probabilities that sum to 1.")
    freedom = counts.size - 1
    divergence = float(scipy.stats.entropy(counts, probabilities))
    # The bound, solved for e: freedom (x - 1 - log x) = log(1/alpha) on the branch x > 1.
    excess = math.log(1.0 / alpha) / freedom
    root = scipy.optimize.brentq(lambda x: x - 1.0 - math.log(x) - excess, 1.0, 3.0 + 2.0 * excess)
    critical = root * freedom / num_draws
    # Pinsker's inequality turns the divergence into total variation, whose sampling error McDiarmid's bounds.
    sampling_error = 0.5 * math.sqrt(freedom / num_draws) + math.sqrt(math.log(1.0 / MISS_RATE) / (2.0 * num_draws))
    return _check(name, divergence, critical, math.sqrt(critical / 2.0) + sampling_error)
