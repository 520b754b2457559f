"""Spins under heat bath, exactly: every probability of a small Boltzmann machine.

A heat-bath update draws one spin in {-1, +1} from its law given all the others. A short run is a number of updates from
independent fair spins; training with it matches the statistics of the data with those at its end.
Everything is NumPy in 64 bits.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, softmax

from ebm_ppl.checks import check_count
from ebm_ppl.targets.discrete import all_states
from ebm_ppl.testing.numbers import check_numbers

MAXIMUM_UNITS = 12
"""Units of the largest machine that is enumerated, with ``2^12`` states."""


def _machine(couplings: Any, biases: Any) -> tuple[np.ndarray, np.ndarray]:
    biases = check_numbers("biases", biases)
    biases = check_numbers("biases", biases, shape=(_num_units("biases", biases.size),))
    couplings = check_numbers("couplings", couplings, shape=(biases.size, biases.size))
    if np.diagonal(couplings).any() or not np.allclose(couplings, couplings.T, rtol=1e-9, atol=1e-12):
        raise ValueError("couplings: got a matrix that is not symmetric with a zero diagonal, expected one.")
    return couplings, biases


def _num_units(name: str, num_units: int) -> int:
    if not 1 <= num_units <= MAXIMUM_UNITS:
        raise ValueError(
            f"{name}: got {num_units} units, expected 1 to {MAXIMUM_UNITS}: all 2^N states are enumerated."
        )
    return num_units


def _states(num_units: int) -> np.ndarray:
    return all_states((-1, 1), (num_units,)).astype(np.float64)


def _distribution(name: str, value: Any) -> np.ndarray:
    probabilities = check_numbers(name, value)
    num_units = _num_units(name, max(probabilities.size, 1).bit_length() - 1)
    probabilities = check_numbers(name, probabilities, shape=(2**num_units,))
    if probabilities.min() < 0 or abs(probabilities.sum() - 1.0) > 1e-9:
        raise ValueError(f"{name}: got numbers that sum to {probabilities.sum():g}, expected probabilities of sum 1.")
    return probabilities


def boltzmann_probabilities(couplings: Any, biases: Any) -> np.ndarray:
    """Equilibrium of a machine of spins: ``p(s) ∝ exp(s' J s / 2 + b' s)``.

    Args:
        couplings: ``J``, ``(N, N)``, symmetric with a zero diagonal; at most 12 units.
        biases: ``b``, ``(N,)``.

    Returns:
        ``(2^N,)``, in the order of ``ebm_ppl.targets.discrete.all_states((-1, 1), (N,))``.

    Raises:
        ValueError: too many units, shapes that do not fit, or couplings that are not symmetric with a zero diagonal.

    Example:
        >>> boltzmann_probabilities([[0.0, 1.0], [1.0, 0.0]], [0.0, 0.0]).round(4).tolist()
        [0.4404, 0.0596, 0.0596, 0.4404]
    """
    couplings, biases = _machine(couplings, biases)
    states = _states(biases.size)
    return softmax(0.5 * np.sum((states @ couplings) * states, axis=1) + states @ biases)


def _run(
    probabilities: np.ndarray, states: np.ndarray, couplings: np.ndarray, biases: np.ndarray, k: int
) -> np.ndarray:
    """Sequential sweeps of the whole law, site by site: no matrix of ``4^N`` numbers."""
    num_units = biases.size
    shapes = [(2**site, 2, 2 ** (num_units - 1 - site)) for site in range(num_units)]
    chances = expit(2.0 * (states @ couplings + biases)).T
    # The field on a site does not depend on its own spin, so that either half of the states has it.
    up = [chance.reshape(shape)[:, 0] for chance, shape in zip(chances, shapes, strict=True)]
    for _ in range(k):
        for site, shape in enumerate(shapes):
            pairs = probabilities.reshape(shape)
            total = pairs[:, 0] + pairs[:, 1]
            probabilities = np.stack([total * (1.0 - up[site]), total * up[site]], axis=1).reshape(-1)
    return probabilities


def heat_bath_probabilities(couplings: Any, biases: Any, num_sweeps: int, *, start: Any = None) -> np.ndarray:
    """The law of a machine of spins after sequential heat-bath sweeps, every unit once and in order per sweep.

    An update of unit ``i`` keeps the law of the others and gives ``s_i = 1`` the chance
    ``1 / (1 + exp(-2 (b_i + sum_j J_ij s_j)))``. It is what ``ebm_ppl.kernels.gibbs("sequential")`` does to
    ``potentials.BoltzmannMachine(J, b, coding="spin")``.

    Args:
        couplings: ``J``, ``(N, N)``, symmetric with a zero diagonal; at most 12 units.
        biases: ``b``, ``(N,)``.
        num_sweeps: ``k``, at least 0.
        start: Law of the start, ``(2^N,)``; uniform when ``None``.

    Returns:
        ``(2^N,)``, in the order of ``ebm_ppl.targets.discrete.all_states((-1, 1), (N,))``.

    Raises:
        ValueError: too many units, shapes that do not fit, couplings that are not symmetric with a zero diagonal, or a
            ``start`` that is no law.

    Example:
        >>> heat_bath_probabilities([[0.0, 1.0], [1.0, 0.0]], [0.0, 0.0], 1).round(4).tolist()
        [0.4404, 0.0596, 0.0596, 0.4404]
    """
    couplings, biases = _machine(couplings, biases)
    check_count("num_sweeps", num_sweeps, 0)
    num_states = 2**biases.size
    law = np.full(num_states, 1.0 / num_states) if start is None else _distribution("start", start)
    if law.size != num_states:
        raise ValueError(f"start: got shape {law.shape}, expected {(num_states,)}.")
    return _run(law, _states(biases.size), couplings, biases, num_sweeps)


def pair_statistics(probabilities: Any) -> tuple[np.ndarray, np.ndarray]:
    """What couplings and biases are conjugate to: ``E[s_i]`` and ``E[s_i s_j]``.

    Args:
        probabilities: Of all states, ``(2^N,)``, in the order of ``ebm_ppl.targets.discrete.all_states((-1, 1), (N,))``.

    Returns:
        Means ``(N,)`` and second moments ``(N, N)``, the latter with a diagonal of 1.

    Raises:
        ValueError: not the probabilities of the states of 1 to 12 spins.

    Example:
        >>> mean, second_moments = pair_statistics([0.5, 0.0, 0.25, 0.25])
        >>> mean.tolist(), second_moments.tolist()
        ([0.0, -0.5], [[1.0, 0.5], [0.5, 1.0]])
    """
    probabilities = _distribution("probabilities", probabilities)
    return _moments(probabilities, _states(probabilities.size.bit_length() - 1))


def _moments(probabilities: np.ndarray, states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return probabilities @ states, states.T @ (probabilities[:, None] * states)


class ShortRunMachine(NamedTuple):
    """Where short-run training of a machine has got to.

    Attributes:
        couplings: ``(N, N)``.
        biases: ``(N,)``.
        moment_error: Largest difference of a statistic from the data's at the end of the run; above the tolerance where
            training has not converged, which it cannot where no machine has these statistics after so few sweeps.
        num_updates: Updates taken.
    """

    couplings: np.ndarray
    biases: np.ndarray
    moment_error: float
    num_updates: int


def fit_short_run_machine(
    mean: Any,
    second_moments: Any,
    num_sweeps: int,
    *,
    learning_rate: float = 0.3,
    num_updates: int = 4000,
    tolerance: float = 1e-10,
) -> ShortRunMachine:
    """Short-run training without sampling noise: ``b += η (E_data[s] - E_k[s])`` and likewise ``J`` with ``s_i s_j``.

    ``E_k`` is over :func:`heat_bath_probabilities` after ``k`` sweeps from fair spins. Starts at zero.

    Args:
        mean: ``E_data[s_i]``, ``(N,)``, in [-1, 1]; at most 12 units.
        second_moments: ``E_data[s_i s_j]``, ``(N, N)``, symmetric with a diagonal of 1.
        num_sweeps: ``k``, at least 1.
        learning_rate: ``η > 0``.
        num_updates: Updates at most.
        tolerance: Stops once no statistic differs by more.

    Returns:
        The machine, and how well its statistics after ``k`` sweeps match.

    Raises:
        ValueError: statistics that are not those of spins, or a number out of its range.

    Example:
        >>> data = pair_statistics(boltzmann_probabilities([[0.0, 0.4], [0.4, 0.0]], [0.1, 0.2]))
        >>> machine = fit_short_run_machine(*data, num_sweeps=3)
        >>> machine.moment_error < 1e-10, machine.couplings.round(3).tolist()
        (True, [[0.0, 0.4], [0.4, 0.0]])
    """
    mean = check_numbers("mean", mean)
    mean = check_numbers("mean", mean, shape=(_num_units("mean", mean.size),))
    second_moments = check_numbers("second_moments", second_moments, shape=(mean.size, mean.size))
    is_unit = np.allclose(np.diagonal(second_moments), 1.0) and np.allclose(second_moments, second_moments.T)
    if not is_unit or max(np.abs(mean).max(), np.abs(second_moments).max()) > 1.0 + 1e-9:
        raise ValueError(
            "mean, second_moments: expected E[s_i] and E[s_i s_j] of spins, in [-1, 1], symmetric with a diagonal of 1 (a "
            "covariance lacks the products of means)."
        )
    second_moments = 0.5 * (second_moments + second_moments.T)  # couplings stay symmetric to the last digit
    learning_rate = float(check_numbers("learning_rate", learning_rate, shape=(), above=0.0))
    num_sweeps, num_updates = check_count("num_sweeps", num_sweeps), check_count("num_updates", num_updates)
    states = _states(mean.size)
    start = np.full(len(states), 1.0 / len(states))
    couplings, biases = np.zeros_like(second_moments), np.zeros_like(mean)
    for update in range(num_updates + 1):
        sampled_mean, sampled_second = _moments(_run(start, states, couplings, biases, num_sweeps), states)
        bias_gap, coupling_gap = mean - sampled_mean, second_moments - sampled_second
        np.fill_diagonal(coupling_gap, 0.0)
        error = float(max(np.abs(bias_gap).max(), np.abs(coupling_gap).max()))
        if error <= tolerance or update == num_updates:
            break
        couplings, biases = couplings + learning_rate * coupling_gap, biases + learning_rate * bias_gap
    return ShortRunMachine(couplings, biases, error, update)
