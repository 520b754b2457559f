"""Simulation-based calibration: posterior draws from simulated data must rank the truth uniformly.

If ``theta`` comes from the prior, ``y`` from ``p(y | theta)`` and ``theta_1 .. theta_L`` from the posterior given ``y``,
then ``theta`` and the draws are exchangeable, and for any function ``f`` the rank of ``f(theta, y)`` among
``f(theta_l, y)`` is uniform on ``0 .. L``. Whatever breaks the posterior bends some rank histogram.

References:
    Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference algorithms with simulation-based
    calibration, arXiv:1804.06788, theorem 1.
    Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari (2023), Simulation-based calibration checking for
    Bayesian computation: the choice of test quantities shapes sensitivity, arXiv:2211.02383.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count
from ebm_ppl.testing.statistics import ALPHA, Check, multinomial_test
from ebm_ppl.types import Array, Key, PyTree

Simulate = Callable[[Key], tuple[PyTree, PyTree]]
"""``key -> (parameters, data)``: one exact draw of the prior and of the data given it."""

Infer = Callable[[Key, PyTree], PyTree]
"""``(key, data) -> parameters`` with a leading axis of ``num_draws`` posterior draws, thinned to near independence."""

Quantities = Callable[[PyTree, PyTree], dict[str, Any]]
"""``(parameters, data) -> {name: scalar}`` for one draw of the parameters."""


def simulation_based_calibration(
    key: Key,
    simulate: Simulate,
    infer: Infer,
    quantities: Quantities,
    *,
    num_simulations: int = 2000,
    num_draws: int = 99,
    block_size: int = 500,
) -> dict[str, np.ndarray]:
    """Rank of the truth among posterior draws, for every simulated data set and every quantity.

    Ranks of the parameters alone cannot tell a posterior from the prior, which ranks every truth uniformly too: include
    a quantity that depends on the data, the log-likelihood before all others.

    Autocorrelated draws pile ranks up at both ends. Thin until neighbouring draws are nearly independent.

    Args:
        key: Random key.
        simulate: One exact draw ``key -> (parameters, data)`` of the joint law.
        infer: ``(key, data) -> draws`` of the posterior, every array with a leading axis of ``num_draws``.
        quantities: ``(parameters, data) -> {name: scalar}``.
        num_simulations: Simulated data sets. 1000 or more find small faults.
        num_draws: Posterior draws for each.
        block_size: Simulations that run side by side. All run in one compiled program, whatever it is; memory grows with
            it.

    Returns:
        For every quantity the ranks ``(simulation,)``, whole numbers from 0 to ``num_draws``: how many draws lie below the
        truth. Ties, as discrete quantities have, are broken at random, so that ranks stay uniform.

    Raises:
        ValueError: a count is below one, ``infer`` returns another number of draws, a quantity is not a scalar, or is NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def simulate(key):
        ...     mean, noise = jax.random.normal(key, (2,))
        ...     return mean, mean + noise
        >>> infer = lambda key, y: y / 2 + jnp.sqrt(0.5) * jax.random.normal(key, (19,))
        >>> quantities = lambda mean, y: {"mean": mean, "log likelihood": -0.5 * (y - mean) ** 2}
        >>> ranks = simulation_based_calibration(
        ...     jax.random.key(0), simulate, infer, quantities, num_simulations=1000, num_draws=19
        ... )
        >>> [rank_test(ranks[name], 19).passed for name in ranks]
        [True, True]

    References:
        Talts et al. (2018), arXiv:1804.06788, algorithm 1; Modrák et al. (2023), arXiv:2211.02383, section 4.
    """
    num_simulations = check_count("num_simulations", num_simulations)
    num_draws = check_count("num_draws", num_draws)
    block_size = min(check_count("block_size", block_size), num_simulations)

    def rank(key: Key) -> tuple[dict[str, Array], dict[str, Array]]:
        simulate_key, infer_key, tie_key = jax.random.split(key, 3)
        parameters, data = simulate(simulate_key)
        draws = infer(infer_key, data)
        counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(draws)}
        if counts != {(num_draws,)}:
            raise ValueError(
                f"infer: got arrays with leading axes {sorted(counts)}, expected {num_draws} draws (num_draws)."
            )
        truths = _scalars(quantities(parameters, data))
        values = jax.vmap(lambda draw: _scalars(quantities(draw, data)))(draws)
        tie_keys = dict(zip(truths, jax.random.split(tie_key, len(truths)), strict=True))
        ranks = {name: _rank(tie_keys[name], truth, values[name]) for name, truth in truths.items()}
        is_nan = {name: jnp.isnan(truth) | jnp.isnan(values[name]).any() for name, truth in truths.items()}
        return ranks, is_nan

    keys = jax.random.split(key, num_simulations)
    ranks, is_nan = jax.jit(lambda keys: jax.lax.map(rank, keys, batch_size=block_size))(keys)
    for name, bad in is_nan.items():
        if bad.any():
            raise ValueError(
                f"quantities: '{name}' is NaN in {int(bad.sum())} of {num_simulations} simulations, the first at index "
                f"{int(jnp.argmax(bad))}; expected numbers. A NaN has no rank."
            )
    return {name: np.asarray(value) for name, value in ranks.items()}


def _scalars(quantities: dict[str, Any]) -> dict[str, Array]:
    arrays = {name: jnp.asarray(value) for name, value in quantities.items()}
    for name, value in arrays.items():
        if value.shape != ():
            raise ValueError(f"quantities: '{name}' has shape {value.shape}, expected a scalar for one draw.")
    return arrays


def _rank(key: Key, truth: Array, draws: Array) -> Array:
    below, equal = jnp.sum(draws < truth), jnp.sum(draws == truth)
    # Among its equals the truth takes any place with the same probability.
    return below + jax.random.randint(key, (), 0, equal + 1)


def rank_test(
    ranks: np.ndarray, num_draws: int, num_bins: int = 20, *, alpha: float = ALPHA, name: str = "ranks"
) -> Check:
    """Whether ranks are uniform on ``0 .. num_draws``: the multinomial test of their histogram.

    Args:
        ranks: ``(simulation,)``, one entry of what :func:`simulation_based_calibration` returns.
        num_draws: Posterior draws per simulation.
        num_bins: Bins of the histogram. Where ``num_draws + 1`` is no multiple of it, the bins' exact probabilities
            differ accordingly.
        alpha: False-failure rate.
        name: Label of the check.

    Returns:
        As :func:`ebm_ppl.testing.multinomial_test`.

    Raises:
        ValueError: a rank is outside ``0 .. num_draws``, or there are more bins than ranks.

    Example:
        >>> import numpy as np
        >>> ranks = np.random.default_rng(0).integers(0, 100, size=2000)
        >>> rank_test(ranks, 99).passed, rank_test(ranks // 2, 99).passed
        (True, False)

    References:
        Talts et al. (2018), arXiv:1804.06788, section 4.2.
    """
    ranks = np.asarray(ranks)
    if check_count("num_bins", num_bins, 2) > num_draws + 1:
        raise ValueError(f"num_bins: got {num_bins}, expected at most the {num_draws + 1} possible ranks.")
    if ranks.ndim != 1 or ranks.size == 0 or ranks.min() < 0 or ranks.max() > num_draws:
        raise ValueError(f"ranks: got shape {ranks.shape}, expected (simulation,) ranks from 0 to {num_draws}.")

    def histogram(ranks: np.ndarray) -> np.ndarray:
        return np.bincount(ranks * num_bins // (num_draws + 1), minlength=num_bins)

    return multinomial_test(
        histogram(ranks), histogram(np.arange(num_draws + 1)) / (num_draws + 1), alpha=alpha, name=name
    )
