"""Descent-ascent on a Gaussian energy in the limit of many particles: its map, the Jacobian, and the critical step."""

import math

import numpy as np

from ebm_ppl.checks import check_probability
from ebm_ppl.testing.gaussian_dynamics import check_data_variance, short_run_variance
from ebm_ppl.testing.numbers import check_not_negative_numbers, check_positive_number


def _contraction(data_variance: float, step_size: float, restart_probability: float) -> float:
    """``M = 1 - h a*`` at the fixed point of :func:`descent_ascent_map`, once the arguments have been checked."""
    check_probability("restart_probability", restart_probability)
    return math.sqrt(1.0 - 2.0 * step_size / check_data_variance(data_variance, step_size, 1.0, "data_variance"))


def descent_ascent_map(
    curvature: float,
    walker_variance: float,
    data_variance: float,
    step_size: float,
    learning_rate: float,
    restart_probability: float,
) -> tuple[float, float]:
    """One round of infinitely many walkers: ``s' = M² ((1 - p) s + p c) + 2 h``, then ``a' = a + (η / 2) (s' - c)``.

    Walkers restart at the data with probability ``p``, take a Langevin step at ``a``, and move ``a``; temperature 1.

    Args:
        curvature: ``a``.
        walker_variance: ``s >= 0``.
        data_variance: ``c``.
        step_size: ``h > 0``.
        learning_rate: ``η > 0``.
        restart_probability: ``p``, in [0, 1].

    Returns:
        ``(a', s')``.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> descent_ascent_map(0.0, 0.5, 1.0, 0.25, 0.5, 0.0)
        (0.0, 1.0)

    References:
        Domingo-Enrich, Bietti, Gabrié, Bruna, Vanden-Eijnden (2021), Dual training of energy-based models with
        overparametrized shallow neural networks, arXiv:2107.05134.
    """
    check_probability("restart_probability", restart_probability)
    data_variance = check_positive_number("data_variance", data_variance)
    walker_variance = float(check_not_negative_numbers("walker_variance", walker_variance, ()))
    mixed = (1.0 - restart_probability) * walker_variance + restart_probability * data_variance
    walkers = float(short_run_variance(curvature, step_size, 1, mixed))
    learning_rate = check_positive_number("learning_rate", learning_rate)
    return float(curvature + 0.5 * learning_rate * (walkers - data_variance)), walkers


def descent_ascent_jacobian(
    data_variance: float, step_size: float, learning_rate: float, restart_probability: float
) -> np.ndarray:
    """Jacobian of :func:`descent_ascent_map` in ``(a, s)`` at its fixed point ``(stationary_curvature(c, h), c)``.

    With ``M = sqrt(1 - 2 h / c)`` the trace is ``1 - η h M c + M² (1 - p)`` and the determinant ``M² (1 - p)``: training
    oscillates where ``trace² < 4 det``, and then decays at the rate ``M sqrt(1 - p)`` whatever ``η``.

    Args:
        data_variance: ``c``; above ``2 h``.
        step_size: ``h > 0``.
        learning_rate: ``η > 0``.
        restart_probability: ``p``, in [0, 1].

    Returns:
        ``[[da'/da, da'/ds], [ds'/da, ds'/ds]]``.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> round(float(np.linalg.det(descent_ascent_jacobian(1.0, 0.05, 0.3, 0.0))), 12)
        0.9
    """
    contraction = _contraction(data_variance, step_size, restart_probability)
    learning_rate = check_positive_number("learning_rate", learning_rate)
    walkers = np.array([-2.0 * step_size * contraction * data_variance, contraction**2 * (1.0 - restart_probability)])
    return np.stack([np.array([1.0, 0.0]) + 0.5 * learning_rate * walkers, walkers])


def critical_learning_rate(data_variance: float, step_size: float, restart_probability: float) -> float:
    """The largest learning rate of :func:`descent_ascent_map` without oscillation: ``(1 - M sqrt(1 - p))² / (h M c)``.

    ``M = sqrt(1 - 2 h / c)``. The slower of the two modes decays fastest here: below, the walkers wait for the energy;
    above, both go round each other.

    Args:
        data_variance: ``c``; above ``2 h``.
        step_size: ``h > 0``.
        restart_probability: ``p``, in [0, 1].

    Returns:
        ``η*``.

    Raises:
        ValueError: a number out of its range.

    Example:
        >>> round(critical_learning_rate(1.0, 0.05, 0.0), 4), round(critical_learning_rate(1.0, 0.05, 1.0), 2)
        (0.0555, 21.08)
    """
    contraction = _contraction(data_variance, step_size, restart_probability)
    return (1.0 - contraction * math.sqrt(1.0 - restart_probability)) ** 2 / (step_size * contraction * data_variance)
