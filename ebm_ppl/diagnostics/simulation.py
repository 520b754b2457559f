"""Whether the chains behind simulated draws had arrived."""

from typing import Any, NamedTuple

import numpy as np


class SimulationSummary(NamedTuple):
    """How the chains of :class:`ebm_ppl.handlers.simulate` fared at one site.

    Attributes:
        num_draws: Chains looked at.
        acceptance_rate: Mean over them.
        drift: Mean change of the energy over the second half of the chains, in standard errors: many of them from zero, and
            the chains were still on their way.
        arrived: Whether ``|drift| < 5`` and the acceptance rate is above .05; says nothing about modes no chain found.
            Draws of a single step have no drift (NaN) and are never said to have arrived: nothing was looked at.
    """

    num_draws: int
    acceptance_rate: float
    drift: float
    arrived: bool


def simulation_summary(draws: dict[str, Any]) -> dict[str, SimulationSummary]:
    """Judge simulated EBM sites, from what ``Predictive`` returns under :class:`ebm_ppl.handlers.simulate`.

    Args:
        draws: Draws by site, the diagnostics ``<site>$acceptance_rate`` and ``<site>$energy_drift`` among them.

    Returns:
        One :class:`SimulationSummary` per simulated site.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model():
        ...     numpyro.sample("x", ebm.EBM(lambda x: x**4, dist.Normal(0.0, 1.0)))
        >>> simulated = ebm.handlers.simulate(model, kernel=ebm.kernels.mala(step_size=0.3), num_steps=100)
        >>> draws = numpyro.infer.Predictive(simulated, num_samples=500)(jax.random.key(0))
        >>> simulation_summary(draws)["x"].arrived
        True
    """
    result = {}
    for name, rate in draws.items():
        if not name.endswith("$acceptance_rate"):
            continue
        site = name.removesuffix("$acceptance_rate")
        drift = np.asarray(draws.get(f"{site}$energy_drift", np.full(np.shape(rate), np.nan)), np.float64).ravel()
        error = drift.std(ddof=1) / np.sqrt(drift.size) if drift.size > 1 else np.nan
        z = float(drift.mean() / error) if error > 0 else (0.0 if not drift.any() else np.nan)
        acceptance = float(np.mean(np.asarray(rate)))
        frozen = not drift.any()
        arrived = bool(abs(z) < 5.0 and not acceptance <= 0.05 and not frozen)
        result[site] = SimulationSummary(drift.size, acceptance, z, arrived)
    return result
