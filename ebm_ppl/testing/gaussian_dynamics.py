"""Gaussian energies under unadjusted Langevin: the law of short runs and the trained curvature in closed form.

The energy is ``U(x) = x' A x / 2 - b' x``, the chain ``x' = x - h (A x - b) + sqrt(2 h τ) ξ`` with step size ``h``,
temperature ``τ`` and standard normal ``ξ``. Nothing here needs ``A`` to be positive: after finitely many steps the law
exists for every energy. Everything is NumPy in 64 bits; times and variances are in units of the event.
"""

import math
from typing import Any, cast

import numpy as np
from scipy.optimize import brentq

from ebm_ppl.checks import check_count
from ebm_ppl.testing.numbers import check_not_negative_numbers, check_numbers, check_positive_number

Numbers = float | np.ndarray
"""One number, or an array of them."""


def _geometric_sum(deviation: Numbers, num_terms: int) -> np.ndarray:
    """``sum_{j < n} r^j`` of the ratio ``r = 1 + deviation``, without the cancellation of ``(1 - r^n) / (1 - r)``."""
    is_near = np.abs(deviation) < 0.5
    near = np.where(is_near & (deviation != 0), deviation, -0.25)  # -0.25 stands where the branch is not taken
    stable = np.expm1(num_terms * np.log1p(near)) / near
    direct = (1.0 - (1.0 + deviation) ** num_terms) / np.where(is_near, 1.0, -deviation)
    return np.where(deviation == 0, float(num_terms), np.where(is_near, stable, direct))


def short_run_moments(
    precision: Any,
    linear: Any,
    step_size: float,
    num_steps: int,
    start_mean: Any,
    start_covariance: Any,
    *,
    temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of ``x_k``: ``M^k m_0 + h sum_j M^j b`` and ``M^k S_0 M^k + 2 h τ sum_j M^(2j)``.

    Here ``M = I - h A`` and ``j = 0 ... k - 1``. The sums are taken along the eigenvectors of ``A``, so that ``A`` may be
    singular or indefinite; ``S_0`` need not commute with it.

    Args:
        precision: ``A``, ``(d, d)``, symmetric.
        linear: ``b``, ``(d,)``.
        step_size: ``h > 0``.
        num_steps: ``k``, at least 0.
        start_mean: ``m_0``, ``(d,)``.
        start_covariance: ``S_0``, ``(d, d)``, symmetric.
        temperature: ``τ > 0``.

    Returns:
        Mean ``(d,)`` and covariance ``(d, d)``.

    Raises:
        ValueError: shapes that do not fit, a matrix that is not symmetric, or a number out of its range.

    Example:
        >>> mean, covariance = short_run_moments([[0.0]], [1.0], 0.05, 20, [0.0], [[1.0]])
        >>> mean.round(12).tolist(), covariance.round(12).tolist()
        ([1.0], [[3.0]])
    """
    linear = check_numbers("linear", linear)
    size = linear.size
    linear = check_numbers("linear", linear, shape=(size,))
    precision = check_numbers("precision", precision, shape=(size, size))
    start_mean = check_numbers("start_mean", start_mean, shape=(size,))
    start_covariance = check_numbers("start_covariance", start_covariance, shape=(size, size))
    for name, matrix in {"precision": precision, "start_covariance": start_covariance}.items():
        if not np.allclose(matrix, matrix.T, rtol=1e-9, atol=1e-12):
            raise ValueError(f"{name}: got a matrix that is not symmetric, expected one.")
    step_size = check_positive_number("step_size", step_size)
    temperature = check_positive_number("temperature", temperature)
    check_count("num_steps", num_steps, 0)
    curvatures, basis = np.linalg.eigh(precision)
    rate = step_size * curvatures
    power = (1.0 - rate) ** num_steps
    mean = power * (basis.T @ start_mean) + step_size * _geometric_sum(-rate, num_steps) * (basis.T @ linear)
    covariance = power[:, None] * (basis.T @ start_covariance @ basis) * power
    noise = 2.0 * step_size * temperature * _geometric_sum(rate * (rate - 2.0), num_steps)
    return basis @ mean, basis @ (covariance + np.diag(noise)) @ basis.T


def short_run_variance(
    curvature: Any, step_size: float, num_steps: int, start_variance: Any, *, temperature: float = 1.0
) -> Numbers:
    """Variance of ``x_k`` under ``U = a x² / 2``: ``s_k(a) = s_0 M^(2k) + 2 h τ sum_{j<k} M^(2j)``, ``M = 1 - h a``.

    It is ``s_0 + 2 h τ k`` at ``a = 0``, decreases in ``a < 1/h``, and is even about ``a = 1/h``.

    Args:
        curvature: ``a``, any sign; a number or an array.
        step_size: ``h > 0``.
        num_steps: ``k``, at least 0.
        start_variance: ``s_0 >= 0``; a number or an array.
        temperature: ``τ > 0``.

    Returns:
        ``s_k``, a number or an array.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> [round(float(short_run_variance(a, 0.05, 20, 1.0)), 6) for a in (1.0, 0.0, -0.2)]
        [1.022346, 3.0, 3.921022]
    """
    curvature, start_variance = (
        check_numbers("curvature", curvature),
        check_not_negative_numbers("start_variance", start_variance),
    )
    step_size = check_positive_number("step_size", step_size)
    temperature = check_positive_number("temperature", temperature)
    check_count("num_steps", num_steps, 0)
    rate = step_size * curvature
    noise = 2.0 * step_size * temperature * _geometric_sum(rate * (rate - 2.0), num_steps)
    return start_variance * (1.0 - rate) ** (2 * num_steps) + noise


def check_data_variance(value: Any, step_size: float, temperature: float, name: str = "variance") -> float:
    """A variance of data above ``2 h τ``, what one step of noise alone makes.

    Raises:
        ValueError: it is not.
    """
    variance = float(check_numbers(name, value, shape=()))
    floor = 2.0 * check_positive_number("step_size", step_size) * check_positive_number("temperature", temperature)
    if variance <= floor:
        raise ValueError(
            f"{name}: got {variance:g}, expected more than 2 * step_size * temperature = {floor:g}, the variance of the "
            "noise in one step, below which no curvature brings the chains."
        )
    return variance


def short_run_curvature(
    variance: float, step_size: float, num_steps: int, start_variance: float, *, temperature: float = 1.0
) -> float:
    """The curvature ``a_k < 1/h`` that short-run training ends at: ``s_k(a_k) = c``.

    It is unique on ``a < 1/h``, and positive if and only if ``c < s_0 + 2 h τ k``: otherwise the trained energy has no
    equilibrium although its ``k``-step law has the variance of the data.

    Args:
        variance: ``c``, of the data; above ``2 h τ``.
        step_size: ``h > 0``.
        num_steps: ``k``, at least 1.
        start_variance: ``s_0 >= 0``; above 0 if ``k = 1``.
        temperature: ``τ > 0``.

    Returns:
        ``a_k``.

    Raises:
        ValueError: no curvature has that variance, or a number is out of its range.

    Example:
        >>> round(short_run_curvature(2.0, 0.05, 20, 1.0), 6), round(short_run_curvature(4.0, 0.05, 20, 1.0), 6)
        (0.329547, -0.214467)

    References:
        Agoritsas, Catania, Decelle, Seoane (2023), Explaining the effects of non-convergent sampling in the training of
        energy-based models, arXiv:2301.09428.
    """
    variance = check_data_variance(variance, step_size, temperature)
    start = float(check_not_negative_numbers("start_variance", start_variance, ()))
    check_count("num_steps", num_steps)
    if num_steps == 1 and start == 0:
        raise ValueError(
            "start_variance: got 0 with num_steps=1, expected > 0: one step from a point forgets the energy."
        )
    noise = 2.0 * step_size * temperature
    # Either bound on M = 1 - h a has s_k >= c; the smaller one keeps the powers of M finite.
    bounds = [((variance - noise) / start) ** (0.5 / num_steps)] if start > 0 else []
    bounds += [(variance / noise) ** (0.5 / (num_steps - 1))] if num_steps > 1 else []
    lowest = (1.0 - min(bounds) * (1.0 + 1.0 / num_steps)) / step_size
    excess = lambda a: short_run_variance(a, step_size, num_steps, start, temperature=temperature) - variance
    return cast(float, brentq(excess, lowest, 1.0 / step_size, xtol=1e-15))


def short_run_training_map(
    curvature: Any,
    variance: Any,
    learning_rate: float,
    step_size: float,
    num_steps: int,
    start_variance: Any,
    *,
    temperature: float = 1.0,
) -> Numbers:
    """One update of short-run training: ``a' = a - (η / 2) (c - s_k(a))``.

    With starts of covariance ``s_0 I`` and ``b = 0`` a matrix ``A`` that begins as a multiple of the identity keeps the
    eigenvectors of the data covariance, and every eigenvalue follows this map with its own ``c``.

    Args:
        curvature: ``a``, before the update.
        variance: ``c``, of the data.
        learning_rate: ``η``, of plain gradient descent.
        step_size: ``h > 0``.
        num_steps: ``k``, at least 0.
        start_variance: ``s_0 >= 0``.
        temperature: ``τ > 0``.

    Returns:
        ``a'``, a number or an array.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> round(float(short_run_training_map(0.329547, 2.0, 0.1, 0.05, 20, 1.0)), 5)
        0.32955
    """
    variance = check_numbers("variance", variance, above=0.0)
    learning_rate = check_positive_number("learning_rate", learning_rate)
    sampled = short_run_variance(curvature, step_size, num_steps, start_variance, temperature=temperature)
    return np.asarray(curvature, np.float64) - 0.5 * learning_rate * (variance - sampled)


def stationary_curvature(variance: float, step_size: float, temperature: float = 1.0) -> float:
    """The curvature whose chains keep the variance ``c``: ``a = (1 - sqrt(1 - 2 h τ / c)) / h``.

    Training from data, or with chains that persist, restarted or not, ends here whatever the number of steps: the law of
    the data is stationary for the kernel. Without discretisation (``h -> 0``) it is ``τ / c``.

    Args:
        variance: ``c``, of the data; above ``2 h τ``.
        step_size: ``h > 0``.
        temperature: ``τ > 0``.

    Returns:
        ``a``, in ``(0, 1/h)``.

    Raises:
        ValueError: no curvature keeps that variance, or a number is out of its range.

    Example:
        >>> round(stationary_curvature(1.0, 0.05), 6)
        1.026334
    """
    variance = check_data_variance(variance, step_size, temperature)
    # The formula above with the cancellation of 1 - sqrt(1 - x) taken out.
    return 2.0 * temperature / (variance * (1.0 + math.sqrt(1.0 - 2.0 * step_size * temperature / variance)))
