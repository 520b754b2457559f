"""Iterated sampling importance resampling: a chain chooses among a pool of independent proposals and itself."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_count
from ebm_ppl.info import step_info
from ebm_ppl.kernels.independence import LogdensityState, as_tunable, own_log_weight, propose, start
from ebm_ppl.types import Array, Info, Kernel, Key, Potential, PyTree


def isir(proposal: Any, *, num_proposals: int) -> Kernel:
    """Iterated sampling importance resampling (i-SIR): choose from a pool with probability proportional to ``w``.

    The pool of each chain has ``N = num_proposals`` members: its current state and ``N - 1`` draws of ``q``. One of them
    becomes the next state, with probability ``w_i / sum_j w_j``, ``w(x) = exp(-U(x)) / q(x)``. The chain moves far more
    often than one that accepts or rejects a single proposal, and the energies of all pools are evaluated in one batch.

    Args:
        proposal: ``q``, a normalised distribution over events: NumPyro, distrax, or a flow of :mod:`ebm_ppl.flows`. A
            tunable, as in :func:`ebm_ppl.kernels.independence`.
        num_proposals: ``N >= 2``, the size of the pool, current state included.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant; ``N - 1`` energies and no gradient per step. Its acceptance rate is the
        probability of moving, ``1 - w_0 / sum_j w_j``, which a perfect proposal brings to ``(N - 1) / N``; its statistic
        ``pool_ess`` is the effective sample size of the pool as a fraction, ``(sum w)^2 / (N sum w^2)``. Proposals with a
        NaN or infinite energy have weight zero and are counted; a chain whose own energy is not finite has weight zero
        too, and leaves.

    Raises:
        TypeError: ``proposal`` has no ``log_prob`` or nothing to draw with; ``num_proposals`` is not a whole number.
        ValueError: ``num_proposals < 2``, ``proposal`` has a batch shape, or (once the chains are known) another event
            shape than theirs.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros(64), isir(dist.Normal(0.0, 1.0), num_proposals=16))
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * x**2, sampler, 10)
        >>> round(float(info.acceptance_rate.mean()), 4), round(float(info.statistics["pool_ess"].mean()), 4)
        (0.9375, 1.0)

    References:
        Andrieu, Doucet, Holenstein (2010), Particle Markov chain Monte Carlo methods, J. R. Stat. Soc. B 72; Grenioux,
        Moulines, Gabrie (2023), arXiv:2306.00684, algorithm 6.
    """
    return Partial(_Isir(check_count("num_proposals", num_proposals, 2)), proposal=as_tunable(proposal))


@dataclass(frozen=True)
class _Isir:
    """The static half of the kernel."""

    num_proposals: int

    def __call__(self, potential: Potential, *, proposal: Any) -> SamplingAlgorithm:
        def init(position: PyTree, rng_key: Key | None = None) -> LogdensityState:
            return start("isir", potential, proposal, position)

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            draw_key, choice_key = jax.random.split(rng_key)
            num_fresh = self.num_proposals - 1
            fresh, log_weight, num_nonfinite = propose(potential, proposal, state.position, draw_key, num_fresh)
            pool = jax.tree.map(lambda own, new: jnp.concatenate([own[:, None], new], axis=1), state, fresh)
            log_weight = jnp.concatenate([own_log_weight(proposal, state)[:, None], log_weight], axis=1)
            # Where no member has a weight the first of equals is chosen: the chain stays.
            chosen = jax.random.categorical(choice_key, log_weight)
            state = jax.tree.map(lambda members: jax.vmap(lambda row, i: row[i])(members, chosen), pool)
            weight = _relative_weights(log_weight)
            total = jnp.maximum(jnp.sum(weight, axis=1), jnp.finfo(weight.dtype).tiny)
            return state, step_info(
                weight.shape[0],
                acceptance_rate=jnp.sum(weight[:, 1:], axis=1) / total,
                is_divergent=~jnp.isfinite(state.logdensity),
                num_energies=num_fresh,
                num_nonfinite=num_nonfinite,
                pool_ess=total**2 / (self.num_proposals * jnp.maximum(jnp.sum(weight**2, axis=1), 1e-30)),
            )

        return SamplingAlgorithm(init, step)


def _relative_weights(log_weight: Array) -> Array:
    """Weights over the largest of their pool; zeros for a pool without any."""
    largest = jnp.max(log_weight, axis=1, keepdims=True)
    return jnp.exp(log_weight - jnp.where(jnp.isneginf(largest), 0.0, largest))
