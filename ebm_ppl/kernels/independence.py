"""Metropolis independence: proposals that do not look at the chain, from any distribution with a density."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.info import step_info
from ebm_ppl.proposals import check_proposal, hold, log_density, sample_and_log_prob
from ebm_ppl.types import Array, Info, Kernel, Key, Potential, PyTree


def independence(proposal: Any) -> Kernel:
    """Metropolis independence: ``x' ~ q``, accepted with probability ``min(1, pi(x') q(x) / (pi(x) q(x')))``.

    Chains jump between modes wherever ``q`` covers both; they stick where ``q`` is small against ``pi = exp(-U) / Z``,
    so a proposal should have tails at least as heavy as the target's. The density of ``q`` is part of the acceptance:
    without it the chains sample another law.

    Args:
        proposal: ``q``, a normalised distribution over events: NumPyro, distrax, or a flow of :mod:`ebm_ppl.flows`. A
            tunable: ``set_tunables(sampler, proposal=other)`` with a proposal of the same kind recompiles nothing.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant; one energy and no gradient per step, for all chains in one batch. A
        proposal with a NaN or infinite energy is rejected and counted. A chain whose own energy is not finite leaves
        with the first proposal whose energy is; one where ``q`` is zero never leaves, as detailed balance demands.

    Raises:
        TypeError: ``proposal`` has no ``log_prob``, or nothing to draw with.
        ValueError: ``proposal`` has a batch shape, or (once the chains are known) another event shape than theirs.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = independence(dist.StudentT(3.0, 0.0, 1.5))
        >>> sampler = ebm.init_sampler(jnp.zeros(64), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * x**2, sampler, 20)
        >>> int(info.num_gradients.sum()), bool(info.acceptance_rate.mean() > 0.6)
        (0, True)

    References:
        Tierney (1994), Markov chains for exploring posterior distributions, Annals of Statistics 22, section 2.3.3.
    """
    return Partial(_Independence(), proposal=as_tunable(proposal))


class LogdensityState(NamedTuple):
    """Chains and what is known of them.

    Attributes:
        position: ``(chain, *event)``.
        logdensity: ``-U``, ``(chain,)``.
    """

    position: Array
    logdensity: Array


@dataclass(frozen=True)
class _Independence:
    """The static half of the kernel."""

    def __call__(self, potential: Potential, *, proposal: Any) -> SamplingAlgorithm:
        def init(position: PyTree, rng_key: Key | None = None) -> LogdensityState:
            return start("independence", potential, proposal, position)

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            num_chains = state.logdensity.shape[0]
            draw_key, accept_key = jax.random.split(rng_key)
            fresh, log_weight, num_nonfinite = propose(potential, proposal, state.position, draw_key, 1)
            candidate, log_weight = LogdensityState(fresh.position[:, 0], fresh.logdensity[:, 0]), log_weight[:, 0]
            log_ratio = log_weight - own_log_weight(proposal, state)
            # A chain that is nowhere (log weight -inf) refuses a proposal that is nowhere too.
            log_ratio = jnp.where(jnp.isneginf(log_weight), -jnp.inf, log_ratio)
            accept = jnp.log(jax.random.uniform(accept_key, (num_chains,), log_ratio.dtype)) < log_ratio
            state = jax.tree.map(lambda new, old: jnp.where(_column(accept, new), new, old), candidate, state)
            return state, step_info(
                num_chains,
                acceptance_rate=jnp.exp(jnp.minimum(log_ratio, 0.0)),
                is_divergent=~jnp.isfinite(state.logdensity),
                num_energies=1,
                num_nonfinite=num_nonfinite,
            )

        return SamplingAlgorithm(init, step)


def as_tunable(proposal: Any) -> Any:
    """A checked proposal whose numbers are arrays, so that others can take their place without a recompilation."""
    check_proposal("proposal", proposal)
    # The dtype spelled out: a weakly typed leaf would recompile when a strong one replaces it. In 32 bits this also rounds
    # the 64-bit arrays that NumPyro makes of Python floats.
    return hold(jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)) if eqx.is_array_like(x) else x, proposal))


def start(kernel: str, potential: Potential, proposal: Any, position: PyTree) -> LogdensityState:
    """A fresh state: one energy per chain."""
    if not isinstance(position, jax.Array):
        raise TypeError(
            f"position: got a {type(position).__name__}, and {kernel} proposes events that are one array. Flatten the "
            "event into one array."
        )
    draws, _ = jax.eval_shape(lambda key: sample_and_log_prob(proposal, key, 1), jax.random.key(0))
    if draws.shape[1:] != position.shape[1:]:
        raise ValueError(
            f"proposal: got events of shape {draws.shape[1:]}, expected those of the chains, {position.shape[1:]}."
        )
    return LogdensityState(position, _logdensity(potential, position))


def propose(
    potential: Potential, proposal: Any, position: Array, key: Key, num_proposals: int
) -> tuple[LogdensityState, Array, Array]:
    """Proposals for all chains, drawn and evaluated in one batch.

    Returns:
        Proposals ``(chain, num_proposals, ...)``, their log weights ``-U - log q``, minus infinity where a number is not
        finite, and how many such there were, ``(chain,)``.
    """
    num_chains, dtype = position.shape[0], position.dtype
    draws, log_proposal = sample_and_log_prob(_cast(proposal, dtype), key, num_chains * num_proposals)
    draws, log_proposal = draws.astype(dtype), log_proposal.astype(dtype)
    logdensity = _logdensity(potential, draws)
    log_weight = logdensity - log_proposal
    # An infinite energy outside the support is a legitimate way to say "never"; it is counted like any other.
    is_finite = jnp.isfinite(log_weight) & jnp.isfinite(logdensity)
    log_weight = jnp.where(is_finite, log_weight, -jnp.inf)
    draws, logdensity, log_weight, is_finite = (
        x.reshape(num_chains, num_proposals, *x.shape[1:]) for x in (draws, logdensity, log_weight, is_finite)
    )
    return LogdensityState(draws, logdensity), log_weight, jnp.sum(~is_finite, axis=1)


def own_log_weight(proposal: Any, state: LogdensityState) -> Array:
    """Log weights of the chains themselves, ``(chain,)``.

    Minus infinity, so that any proposal is better, where the energy is not finite or the density of the proposal cannot
    be computed. Where that density is zero the weight is infinite in truth, and the largest number here.
    """
    log_proposal = log_density(_cast(proposal, state.position.dtype), state.position).astype(state.logdensity.dtype)
    largest = 0.25 * jnp.finfo(state.logdensity.dtype).max
    log_weight = jnp.minimum(state.logdensity - log_proposal, largest)
    return jnp.where(jnp.isfinite(state.logdensity) & ~jnp.isnan(log_weight), log_weight, -jnp.inf)


def _logdensity(potential: Potential, position: Array) -> Array:
    energy = jax.vmap(lambda event: jnp.asarray(potential(event), position.dtype))(position)
    # An infinite density would never be left; what is not a number is.
    return jnp.where(jnp.isneginf(energy), jnp.nan, -energy)


def _cast(proposal: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, proposal)


def _column(flag: Array, like: Array) -> Array:
    return flag.reshape(-1, *[1] * (like.ndim - 1))
