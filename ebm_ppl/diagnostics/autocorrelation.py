"""How many kernel steps chains need to forget, read off a training run."""

import numpy as np
from scipy.ndimage import uniform_filter1d

from ebm_ppl.checks import check_count
from ebm_ppl.diagnostics.guarded import as_real_numbers


def autocorrelation_time(history: dict[str, np.ndarray], num_steps: int, *, window: int = 100) -> np.ndarray:
    """Integrated autocorrelation time of the energy at every update of a training run, in kernel steps.

    ``tau = (1 + r) / (1 - r)``, with ``r = rho^(1/k)`` the correlation over one step of a chain that forgets exponentially
    and ``rho`` the correlation over a phase of ``k`` steps: the history's ``energy_autocorrelation``, which is measured
    over chains and at one potential, averaged over updates. Mixing slows down while energies grow sharper; phases should
    last five to ten of these times where chains start afresh.

    It sees what the energy sees. Chains that never leave their mode, with energies alike in all modes, look fast. And it
    sees little beyond the noise of ``rho``, ``1 / sqrt(num_chains window)``: a time much shorter than a phase, or much
    longer than ``k sqrt(num_chains window)``, is not resolved.

    Args:
        history: From :func:`ebm_ppl.fit`, of an objective with negatives.
        num_steps: Kernel steps of a phase, ``k``.
        window: Updates to average over.

    Returns:
        ``(step,)``; at least 1, infinite where energies did not change, NaN where they are all the same.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the history has no ``energy_autocorrelation``, or a count is below 1.

    Example:
        >>> import numpy as np
        >>> autocorrelation_time({"energy_autocorrelation": np.full(3, 0.5)}, 10).round(1).tolist()
        [28.9, 28.9, 28.9]

    References:
        Decelle, Furtlehner, Seoane (2021), arXiv:2105.13889 (the mixing time grows in training); Sokal (1997), Monte Carlo
        methods in statistical mechanics (the integrated time).
    """
    if "energy_autocorrelation" not in history:
        raise ValueError(
            "history: has no 'energy_autocorrelation', expected that of an objective with negatives whose kernel holds its "
            "energies, such as persistent_contrastive_divergence with ebm.kernels.mala."
        )
    num_steps, window = check_count("num_steps", num_steps), check_count("window", window)
    correlation = as_real_numbers("history", history["energy_autocorrelation"])
    if correlation.size == 0:
        return correlation
    smooth = uniform_filter1d(correlation, min(window, correlation.size), mode="nearest")
    of_one_step = np.clip(smooth, 0.0, 1.0) ** (1.0 / num_steps)
    with np.errstate(divide="ignore"):
        return (1.0 + of_one_step) / (1.0 - of_one_step)
