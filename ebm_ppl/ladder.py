"""Spacing the inverse temperatures of replica exchange between phases: a function ``SamplerState -> SamplerState``."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.adaptation import check_target_acceptance, set_tunables, tunables
from ebm_ppl.checks import check_count, check_key, is_traced
from ebm_ppl.sampling import advance, check_sampler
from ebm_ppl.types import Array, Key, Potential, SamplerState


def tune_ladder(
    key: Key,
    potential: Potential,
    sampler: SamplerState,
    target_swap_rate: float = 0.5,
    *,
    num_rounds: int = 5,
    num_steps: int = 100,
) -> SamplerState:
    """Space the inverse temperatures of :func:`ebm_ppl.kernels.replica_exchange` so that all pairs swap equally often.

    The rejection rates add up along the ladder to a barrier that hardly depends on where the rungs are; rungs at equal
    shares of it reject equally, which maximises the rate of round trips. The two ends and the number of rungs stay. Each
    round runs the chains and moves the rungs; one more measures what was reached.

    Args:
        key: Random key.
        potential: Energy of one event, base included.
        sampler: Chains whose kernel has ``inverse_temperatures``.
        target_swap_rate: In (0, 1), the least that every pair should reach; more rungs reach more.
        num_rounds: Rounds of tuning.
        num_steps: Kernel steps of each.

    Returns:
        The moved sampler with its tuned, frozen ladder; nothing recompiles.

    Raises:
        ValueError: ``target_swap_rate`` is outside (0, 1), the kernel has no ladder, or the energy does not fit one event.
        TypeError: a count is not a whole number, ``key`` is no random key, ``sampler`` no sampler state, or the energy is
            not a real floating scalar.

    Warns:
        RuntimeWarning: the ladder has too few rungs for the target; the text says how many it takes.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> kernel = ebm.kernels.replica_exchange((1.0, 0.9, 0.8, 0.01), inner=ebm.kernels.mala(0.5), step_size_power=1.0)
        >>> sampler = ebm.init_sampler(jnp.ones((64, 2)), kernel)
        >>> sampler = tune_ladder(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 0.3)
        >>> ladder = ebm.adaptation.tunables(sampler)["inverse_temperatures"]  # a geometric one, on paper
        >>> bool(jnp.allclose(ladder, jnp.array([1.0, 0.2154, 0.0464, 0.01]), rtol=0.25))
        True

    References:
        Syed, Bouchard-Côté, Deligiannidis, Doucet (2019), arXiv:1905.02939, section 4 and algorithm 2.
    """
    check_key("key", key)
    check_sampler(potential, sampler)
    check_target_acceptance("target_swap_rate", target_swap_rate)
    check_count("num_rounds", num_rounds)
    check_count("num_steps", num_steps)
    if "inverse_temperatures" not in tunables(sampler):
        raise ValueError(
            f"sampler: its kernel has tunables {sorted(tunables(sampler))}, expected inverse_temperatures, those of "
            "ebm.kernels.replica_exchange."
        )
    for index in range(num_rounds):
        # One length, so that one program serves all rounds.
        sampler, rates = _round(jax.random.fold_in(key, index), potential, sampler, num_steps)
        ladder = _equalised(tunables(sampler)["inverse_temperatures"], 1.0 - rates)
        sampler = set_tunables(sampler, inverse_temperatures=ladder)
    sampler, rates = _round(jax.random.fold_in(key, num_rounds), potential, sampler, num_steps)
    if not is_traced(rates) and float(rates.min()) < target_swap_rate:
        _warn(np.asarray(rates), target_swap_rate)
    return sampler


def _round(key: Key, potential: Potential, sampler: SamplerState, num_steps: int) -> tuple[SamplerState, Array]:
    """Chains moved, and the swap rate of each pair, ``(rung - 1,)``."""
    sampler, info = advance(key, potential, sampler, num_steps)
    num_pairs = tunables(sampler)["inverse_temperatures"].shape[0] - 1
    return sampler, jnp.stack([info.statistics[f"swap_rate_{pair}"].mean() for pair in range(num_pairs)])


def _equalised(ladder: Array, rejection: Array) -> Array:
    """Rungs at equal shares of the cumulative rejection, which is taken to be linear in ``log b`` between the old rungs."""
    # A pair that never rejects would leave a flat piece, on which the inverse is any of its points.
    barrier = jnp.concatenate([jnp.zeros(1), jnp.cumsum(jnp.maximum(rejection, 1e-4))])
    levels = jnp.linspace(0.0, 1.0, ladder.shape[0]) * barrier[-1]
    # A ladder may end at 0, where a logarithm needs a floor.
    floor = jnp.where(ladder[-1] > 0, 0.0, 0.1 * ladder[-2])
    inner = jnp.exp(jnp.interp(levels[1:-1], barrier, jnp.log(ladder + floor))) - floor
    return jnp.concatenate([ladder[:1], inner.astype(ladder.dtype), ladder[-1:]])


def _warn(rates: np.ndarray, target: float) -> None:
    barrier = float(np.sum(1.0 - rates))
    needed = 1 + math.ceil(barrier / (1.0 - target))
    what = (
        f"about {needed} rungs reach it"
        if needed > len(rates) + 1
        else "the rungs are still uneven: use more rounds, steps or chains"
    )
    warnings.warn(
        f"tune_ladder: the lowest swap rate reached is {rates.min():.3f}, below the target {target}. The rejection rates "
        f"add up to {barrier:.2f} over {len(rates) + 1} rungs; {what}.",
        RuntimeWarning,
        stacklevel=3,
    )
