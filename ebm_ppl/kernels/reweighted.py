"""Persistent chains that carry importance weights while their energy changes (Jarzynski's equality).

Chains start as draws of a normalised distribution. When the energy changes, the weight of each is multiplied by the ratio
of the new density to the old one where the chain is; a move that leaves the new density invariant changes no weight. The
weighted chains then stand for the energy as it is now, however fast it moved, and their mean weight estimates its Z.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_markov_kernel
from ebm_ppl.kernels.scaled_langevin import is_unadjusted_langevin
from ebm_ppl.kernels.tempered import check_target_ess
from ebm_ppl.proposals import check_proposal, hold, log_density
from ebm_ppl.types import Array, Info, Kernel, Key, Potential, PyTree
from ebm_ppl.weights import effective_size, log_mean_weight, resampled


class ChainWeights(NamedTuple):
    """What reweighted chains carry from phase to phase, in ``SamplerState.auxiliary``; ``(chain,)`` each.

    Attributes:
        log_weight: The log of their mean is ``log Z`` of the energy they last moved under: resampling leaves the mean.
        energy: Energy under which each chain last moved, where it is now.
        variance: Variance of ``log Z`` that resamplings have fixed so far, the same for all, were chains independent after
            each of them.
        ancestor: Which of the chains of the start each descends from, by number. Those with one ancestor may still be
            alike, and their common weight is what the error of ``log Z`` is made of.
    """

    log_weight: Array
    energy: Array
    variance: Array
    ancestor: Array


class ReweightedState(NamedTuple):
    """Chains with their weights, and the state of the kernel that moves them."""

    position: PyTree
    log_weight: Array
    auxiliary: ChainWeights
    inner: Any


def reweighted(inner: Kernel, reference: Any, *, min_ess: float | Array = 0.5) -> Kernel:
    """Chains of another kernel that carry importance weights across changes of the energy.

    The chains must start as independent draws of ``reference``. ``E[mean w] = Z`` holds exactly along any path of energies
    that does not depend on the chains themselves, with resampling too. The weights go to ``SamplerState.log_weight``, where
    objectives find them; ``log mean exp(log_weight)`` is the running ``log Z``.

    A kernel with an accept step leaves the weights alone when it moves. A step of ``kernels.unadjusted_langevin`` is
    weighted by the ratio of its reverse to itself, ``exp(-U(x')) K(x', x) / (exp(-U(x)) K(x, x'))``, which makes up for its
    bias. Every other kernel without an accept step turns the weights into NaN.

    Args:
        inner: Kernel of the moves; its tunables become those of this one.
        reference: Normalised distribution (NumPyro, distrax, or a flow) whose draws the chains started as.
        min_ess: Fraction in (0, 1) of the chains below which the effective size calls for resampling.

    Returns:
        A kernel whose weights stand for ``exp(-U)``. Statistics ``weight_ess`` and ``log_normalizer``.

    Raises:
        TypeError: ``inner`` is no kernel, or one whose chains carry more than a position or start anew at every step;
            ``reference`` has no density.
        ValueError: ``min_ess`` is not a fraction, or ``reference`` cannot be sampled.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> start = dist.Normal(0.0, 2.0)
        >>> kernel = reweighted(ebm.kernels.mala(step_size=0.3), start)
        >>> sampler = ebm.init_sampler(start.sample(jax.random.key(0), (1000,)), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(1), lambda x: 0.5 * x**2, sampler, 5)
        >>> bool(abs(info.statistics["log_normalizer"][0] - 0.9189) < 0.1)  # log sqrt(2 pi)
        True

    References:
        Carbone, Hua, Coste, Vanden-Eijnden (2023), Efficient training of energy-based models using Jarzynski equality,
        arXiv:2305.19414; Neal (2001), arXiv:physics/9803008.
    """
    check_markov_kernel("inner", inner)
    check_proposal("reference", reference)
    func, tunables = (inner.func, inner.keywords) if isinstance(inner, Partial) and not inner.args else (inner, {})
    is_unadjusted = is_unadjusted_langevin(inner)
    static = _Reweighted(func, is_unadjusted)
    return Partial(static, **tunables, reference=hold(reference), min_ess=check_target_ess(min_ess, name="min_ess"))


@dataclass(frozen=True)
class _Reweighted:
    """The static half of the kernel; an :class:`~ebm_ppl.types.AuxiliaryKernel`."""

    inner: Any
    is_unadjusted: bool

    def start_auxiliary(self, position: PyTree, *, reference: Any, **tunables: Any) -> ChainWeights:
        """Weights of draws of the reference: all equal, under the reference's own energy."""
        dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(position)), jnp.float32)
        energy = -log_density(reference, position).astype(dtype)
        zero = jnp.zeros_like(energy)
        return ChainWeights(zero, energy, zero, jnp.arange(energy.shape[0]))

    def __call__(self, potential: Potential, *, reference: Any, min_ess: Array, **tunables: Any) -> SamplingAlgorithm:
        algorithm: Any = self.inner(potential, **tunables)

        def init(position: PyTree, rng_key: Any, auxiliary: Any = None) -> ReweightedState:
            if auxiliary is None:
                auxiliary = self.start_auxiliary(position, reference=reference)
            resample_key, init_key = jax.random.split(rng_key)
            energy = jax.vmap(potential)(position).astype(auxiliary.energy.dtype)
            log_weight = auxiliary.log_weight + auxiliary.energy - energy
            log_mean, variance = log_mean_weight(log_weight)
            is_due = effective_size(log_weight) < min_ess * log_weight.shape[0]
            chains = position, energy, auxiliary.ancestor
            position, energy, ancestor = resampled(resample_key, chains, log_weight, is_due)
            auxiliary = ChainWeights(
                log_weight=jnp.where(is_due, log_mean, log_weight),
                energy=energy,
                variance=auxiliary.variance + jnp.where(is_due, variance, 0.0),
                ancestor=ancestor,
            )
            return ReweightedState(position, auxiliary.log_weight, auxiliary, algorithm.init(position, init_key))

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            inner, info = algorithm.step(rng_key, state.inner)
            before = state.auxiliary
            energy = _energies(potential, inner).astype(before.energy.dtype)
            if self.is_unadjusted:
                gain = _reverse_ratio(state.inner, inner, tunables["step_size"]).astype(before.energy.dtype)
            else:
                # A move that nobody accepted or rejected would need a weight of its own, which is not known.
                gain = jnp.where(jnp.isnan(info.acceptance_rate), jnp.nan, 0.0)
            after = before._replace(log_weight=before.log_weight + gain, energy=energy)
            statistics = {
                "weight_ess": jnp.broadcast_to(effective_size(after.log_weight), gain.shape).astype(jnp.float32),
                "log_normalizer": jnp.broadcast_to(log_mean_weight(after.log_weight)[0], gain.shape).astype(
                    jnp.float32
                ),
            }
            info = info._replace(statistics={**info.statistics, **statistics})
            return ReweightedState(inner.position, after.log_weight, after, inner), info

        return SamplingAlgorithm(init, step)


def _energies(potential: Potential, state: Any) -> Array:
    """Energies of all chains, read off the state of their kernel where it has them."""
    known = getattr(state, "logdensity", None)
    return jax.vmap(potential)(state.position) if known is None else -known


def _reverse_ratio(before: Any, after: Any, step_size: Array) -> Array:
    """``log [exp(-U(x')) K(x', x) / (exp(-U(x)) K(x, x'))]`` of Langevin steps from ``x`` to ``x'``, ``(chain,)``."""

    def missed(start: Any, end: Any) -> Array:
        """``|end - start - step_size grad log p(start)|^2``."""

        def of_leaf(x: Array, new: Array, gradient: Array) -> Array:
            away = new - x - step_size.astype(x.dtype) * gradient
            return jnp.sum(away.reshape(away.shape[0], -1) ** 2, axis=1)

        parts = jax.tree.map(of_leaf, start.position, end.position, start.logdensity_grad)
        return jnp.stack(jax.tree.leaves(parts)).sum(axis=0)

    return after.logdensity - before.logdensity + (missed(before, after) - missed(after, before)) / (4.0 * step_size)
