"""Diffusion samplers as kernels: weighted trajectories, Metropolis on whole trajectories, or raw draws.

The density of what a diffusion sampler draws has no closed form, but those of its whole trajectories and of a noising
that runs them backwards do. On the space of trajectories the target is ``exp(-U(x_T)) r(x_0 ... x_{T-1} | x_T)``, whose
marginal in ``x_T`` is the energy's law whatever the noising ``r``; corrections there are exact.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.info import step_info
from ebm_ppl.types import Array, Info, Kernel, Key, Potential
from ebm_ppl.weights import weight_statistics

Correction = Literal["weights", "metropolis"]


class WeightedState(NamedTuple):
    """Weighted draws: positions ``(chain, *event)`` and their log importance weights ``(chain,)``."""

    position: Array
    log_weight: Array


class MetropolisState(NamedTuple):
    """Positions ``(chain, *event)`` and their energies ``(chain,)``."""

    position: Array
    energy: Array


class RawState(NamedTuple):
    """Positions ``(chain, *event)``."""

    position: Array


def diffusion(sampler: Any, *, correction: Correction = "weights") -> Kernel:
    """Fresh trajectories of a diffusion sampler for all chains, corrected exactly for what the sampler gets wrong.

    A trajectory has the log weight ``-U(x_T) + sum_t log r(x_t | x_{t+1}) - log q(x_0) - sum_t log q(x_{t+1} | x_t)``,
    with the sampler's noising ``r``.

    ``correction="weights"`` makes the chains weighted particles: their log weights go to ``SamplerState.log_weight``, and
    every reader of a sampler state uses them. ``E[w] = Z`` and ``E[w f(x_T)] = Z E_p[f]`` exactly; ratios of the two, as
    in a training objective, have a bias of order one over the number of chains. Particles do not depend on where chains
    were, so one step per phase is enough.

    ``correction="metropolis"`` is a Markov kernel that leaves ``exp(-U)`` invariant: each chain draws the past of its
    position anew by the noising, and accepts a fresh trajectory with probability ``min(1, w' / w)``. The draw of the past
    is a Gibbs step, and keeps a chain from living on one lucky weight. It costs twice the network evaluations.

    Both need a sampler that covers the energy's modes: where it has none, weights are silently too even. A proposal with
    a NaN or infinite energy is rejected and counted: a particle then stays where it was with weight zero, and if all
    proposals are rejected the whole earlier population stays, and every chain is flagged as divergent.

    Args:
        sampler: A :class:`ebm_ppl.diffusion.DiffusionSampler` (or an object with its ``rollout`` and ``reverse_rollout``);
            a tunable of the kernel.
        correction: See above.

    Returns:
        A kernel with one energy per chain and step. Statistics, of the fresh trajectories of the whole population:
        ``weight_ess``, effective number of particles ``(sum w)^2 / sum w^2``, and ``log_normalizer``, the log of the mean
        weight (its exponential is an unbiased estimate of ``Z``).

    Raises:
        TypeError: ``sampler`` has no trajectories.
        ValueError: an unknown ``correction``, or a sampler of other events than the chains.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> from ebm_ppl.diffusion import DiffusionSampler
        >>> diffuser = DiffusionSampler(2, num_steps=4, key=jax.random.key(0), width=16, depth=1)
        >>> sampler = ebm.init_sampler(jnp.zeros((64, 2)), diffusion(diffuser))
        >>> sampler, info = ebm.advance(jax.random.key(1), lambda x: jnp.sum(x**2), sampler, 1)
        >>> sampler.log_weight.shape, bool(info.statistics["weight_ess"][0] > 10)
        ((64,), True)

    References:
        Vargas, Grathwohl, Doucet (2023), Denoising diffusion samplers, arXiv:2302.13834; Zhang, Chen (2022), Path
        integral sampler, arXiv:2111.15141; Andrieu, Lee, Vihola (2018), Uniform ergodicity of the iterated conditional
        SMC and geometric ergodicity of particle Gibbs samplers (the Gibbs step on auxiliaries).
    """
    if correction not in ("weights", "metropolis"):
        raise ValueError(
            f"correction: got {correction!r}, expected 'weights' or 'metropolis'. Uncorrected draws are raw_diffusion."
        )
    needed = ("rollout",) if correction == "weights" else ("rollout", "reverse_rollout")
    _check_trajectories(sampler, needed)
    return Partial(_Weighted() if correction == "weights" else _Metropolis(), sampler=sampler)


def raw_diffusion(sampler: Any) -> Kernel:
    """Fresh draws of a diffusion sampler for all chains, taken as they are.

    BIASED: the chains follow the law of the sampler, and the energy is never looked at. That is what adversarial training
    asks for, where the sampler is trained against the energy; anywhere else use :func:`diffusion`.

    Args:
        sampler: A :class:`ebm_ppl.diffusion.DiffusionSampler`, or an object with its ``rollout``; a tunable of the kernel.

    Returns:
        A kernel that evaluates no energies and has no acceptance rate.

    Raises:
        TypeError: ``sampler`` has no trajectories.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> from ebm_ppl.diffusion import DiffusionSampler
        >>> diffuser = DiffusionSampler(2, num_steps=4, key=jax.random.key(0), width=16, depth=1)
        >>> sampler = ebm.init_sampler(jnp.zeros((64, 2)), raw_diffusion(diffuser))
        >>> sampler, _ = ebm.advance(jax.random.key(1), lambda x: jnp.sum(x**2), sampler, 1)
        >>> sampler.position.shape
        (64, 2)

    References:
        Yoon, Hwang, Kwon, Noh, Park (2024), arXiv:2407.00626.
    """
    _check_trajectories(sampler, ("rollout",))
    return Partial(_Raw(), sampler=sampler)


def _check_trajectories(sampler: Any, methods: tuple[str, ...]) -> None:
    missing = [name for name in methods if not callable(getattr(sampler, name, None))]
    if missing:
        raise TypeError(
            f"sampler: got {type(sampler).__name__} without {missing[0]}, expected a diffusion sampler such as "
            "ebm_ppl.diffusion.DiffusionSampler."
        )


def _fit(sampler: Any, position: Array) -> Any:
    """The sampler in the precision of the chains, whose events must be its own."""
    expected = tuple(getattr(sampler, "event_shape", position.shape[1:]))
    if position.shape[1:] != expected:
        raise ValueError(f"position: got event shape {position.shape[1:]}, expected that of the sampler, {expected}.")
    return jax.tree.map(lambda x: x.astype(position.dtype) if eqx.is_inexact_array(x) else x, sampler)


def _energies(potential: Potential, events: Array) -> Array:
    return jnp.asarray(jax.vmap(potential)(events), events.dtype)


def _choose(condition: Array, new: Array, old: Array) -> Array:
    return jnp.where(condition.reshape(-1, *[1] * (old.ndim - 1)), new, old)


def _propose(key: Key, sampler: Any, potential: Potential, num_chains: int) -> tuple[Array, Array, Array, Array]:
    """Fresh events, their energies and log weights, and which of them can be used; the others weigh nothing."""
    trajectory = sampler.rollout(key, num_chains)
    energy = _energies(potential, trajectory.final)
    log_weight = trajectory.log_weight(energy)
    is_usable = jnp.isfinite(energy) & jnp.isfinite(log_weight)
    return trajectory.final, energy, jnp.where(is_usable, log_weight, -jnp.inf), is_usable


@dataclass(frozen=True)
class _Weighted:
    """The static half of the weighted kernel."""

    draws_afresh: ClassVar[bool] = True

    def __call__(self, potential: Potential, *, sampler: Any) -> SamplingAlgorithm:
        def init(position: Any, rng_key: Key | None = None) -> WeightedState:
            return WeightedState(position, jnp.zeros(position.shape[0], position.dtype))

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            num_chains = state.position.shape[0]
            fitted = _fit(sampler, state.position)
            events, _, log_weight, is_usable = _propose(rng_key, fitted, potential, num_chains)
            is_lost = ~is_usable.any()
            info = step_info(
                num_chains,
                is_divergent=is_lost,
                num_energies=1,
                num_nonfinite=~is_usable,
                **weight_statistics(log_weight),
            )
            position = _choose(is_usable, events, state.position)
            return WeightedState(position, jnp.where(is_lost, state.log_weight, log_weight)), info

        return SamplingAlgorithm(init, step)


@dataclass(frozen=True)
class _Metropolis:
    """The static half of the Metropolis kernel."""

    def __call__(self, potential: Potential, *, sampler: Any) -> SamplingAlgorithm:
        def init(position: Any, rng_key: Key | None = None) -> MetropolisState:
            return MetropolisState(position, _energies(potential, position))

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            num_chains = state.position.shape[0]
            fitted = _fit(sampler, state.position)
            past_key, fresh_key, accept_key = jax.random.split(rng_key, 3)
            events, energy, log_weight, is_usable = _propose(fresh_key, fitted, potential, num_chains)
            current = fitted.reverse_rollout(past_key, state.position).log_weight(state.energy)
            # A chain that stands where the energy is not finite leaves with the first proposal that can be used.
            is_stranded = ~jnp.isfinite(state.energy)
            log_acceptance = jnp.where(is_stranded, 0.0, jnp.minimum(log_weight - current, 0.0))
            rate = jnp.where(is_usable, jnp.exp(log_acceptance), 0.0)
            is_accepted = jax.random.uniform(accept_key, (num_chains,), rate.dtype) < rate
            info = step_info(
                num_chains,
                acceptance_rate=rate,
                is_divergent=is_stranded & ~is_accepted,
                num_energies=1,
                num_nonfinite=~is_usable,
                **weight_statistics(log_weight),
            )
            position = _choose(is_accepted, events, state.position)
            return MetropolisState(position, jnp.where(is_accepted, energy, state.energy)), info

        return SamplingAlgorithm(init, step)


@dataclass(frozen=True)
class _Raw:
    """The static half of the raw kernel."""

    draws_afresh: ClassVar[bool] = True

    def __call__(self, potential: Potential, *, sampler: Any) -> SamplingAlgorithm:
        def init(position: Any, rng_key: Key | None = None) -> RawState:
            return RawState(position)

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            num_chains = state.position.shape[0]
            events = _fit(sampler, state.position).rollout(rng_key, num_chains).final
            is_lost = ~jnp.isfinite(events.reshape(num_chains, -1)).all(axis=1)
            return RawState(events), step_info(num_chains, is_divergent=is_lost)

        return SamplingAlgorithm(init, step)
