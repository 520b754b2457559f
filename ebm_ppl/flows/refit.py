"""Refitting the proposal of a sampler to its own chains, and refusing what makes it worse."""

import warnings
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from ebm_ppl.checks import check_count, is_traced
from ebm_ppl.flows.fitting import default_optimizer, fit_flow
from ebm_ppl.flows.player import proposal_of
from ebm_ppl.proposals import log_density, sample_and_log_prob
from ebm_ppl.types import Array, Key, Potential, SamplerState

_ERRORS = 2.0
"""A loss must be worse by more than this many of its standard errors to be called worse."""

_LARGEST_CHANGE = 20.0
"""Changes of a log density are judged up to this many nats: a few chains that a flow all but excludes would otherwise
bring an error as large as themselves, and hide behind it."""

_COLLAPSE = 0.1
"""An effective sample size below this fraction of what it was is called a collapse."""

_TRUSTED_ESS = 50.0
"""With fewer effective draws than this the old flow is no witness of what the target looks like."""

REASONS = (
    "accepted",
    "refused: the refitted flow gives non-finite densities",
    "refused: held-out chains are less likely under the refitted flow",
    "refused: the effective sample size of the refitted flow collapsed",
    "refused: the refitted flow lost a part of the target that the old one covers",
)


class Refit(NamedTuple):
    """What :func:`refit_flow` found.

    Attributes:
        is_accepted: Whether the sampler has the new flow.
        reason: Index into :data:`ebm_ppl.flows.refit.REASONS`; :attr:`text` spells it out.
        forward_kl_before: ``-mean log q`` of the held-out chains under the old flow.
        forward_kl_after: The same under the new one, fitted to the other chains.
        forward_kl_error: Standard error of their difference, from the held-out chains.
        ess_before: Effective sample size, as a fraction, of draws of the old flow weighted to the target.
        ess_after: The same for the new one.
        coverage_loss: How much less likely draws of the old flow, weighted to the target, are under the new one; nats.
        coverage_error: Its standard error.
        history: Loss of every update.
    """

    is_accepted: Array
    reason: Array
    forward_kl_before: Array
    forward_kl_after: Array
    forward_kl_error: Array
    ess_before: Array
    ess_after: Array
    coverage_loss: Array
    coverage_error: Array
    history: Array

    @property
    def text(self) -> str:
        """What was decided and why."""
        return (
            f"{REASONS[int(self.reason)]} (held-out forward KL {float(self.forward_kl_before):.3f} -> "
            f"{float(self.forward_kl_after):.3f} ± {float(self.forward_kl_error):.3f}, ESS fraction "
            f"{float(self.ess_before):.3f} -> {float(self.ess_after):.3f}, coverage loss "
            f"{float(self.coverage_loss):.3f} ± {float(self.coverage_error):.3f})"
        )


def refit_flow(
    key: Key,
    potential: Potential,
    sampler: SamplerState,
    *,
    samples: Array | None = None,
    num_updates: int = 500,
    batch_size: int = 256,
    num_samples: int = 1000,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[SamplerState, Refit]:
    """Fit the sampler's ``proposal`` to its chains by forward KL, and keep it only if that did no harm.

    A random half of the chains is fitted, the other half judges. The old flow stays when the new one gives non-finite
    densities; when the held-out chains are less likely under it by more than two standard errors; when the effective
    sample size of its draws, weighted to the target, falls below a tenth of the old one's; or when draws of the old flow,
    weighted to the target, are less likely under it by more than two standard errors (judged only if they are worth 50
    draws). The last is what tells that all chains have left a mode: held-out chains have left it too. Log densities count
    with changes of at most 20 nats.

    Args:
        key: Random key.
        potential: Energy of one event, base included, that the chains sample.
        sampler: Chains whose kernel has a flow as its tunable ``proposal``.
        samples: Recent states of these chains to fit, ``(chain, draw, *event)``, such as ``draws.position``; their present
            positions when ``None``. A few hundred states are soon learnt by heart: hand over a trace, or make few updates.
        num_updates: Gradient steps.
        batch_size: States per step, drawn with replacement.
        num_samples: Draws of each flow to judge it by; so many energies, twice.
        optimizer: As in :func:`ebm_ppl.flows.fit_flow`.

    Returns:
        The sampler, its chains where they were, and a :class:`Refit`. Nothing recompiles when it runs on.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: the kernel has no ``proposal``, there are fewer than 4 chains, or a count is below 1.

    Warns:
        RuntimeWarning: the refit was refused. (Not while JAX traces: read ``is_accepted``.)

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> def energy(x): return 2.0 * jnp.sum((x - 1.0) ** 2)
        >>> flow = ebm.flows.RealNVP(2, key=jax.random.key(0), num_layers=2, width=8, depth=1)
        >>> kernel = ebm.kernels.flow_assisted(flow, ebm.kernels.mala(step_size=0.2), num_proposals=8)
        >>> sampler = ebm.init_sampler(jnp.zeros((512, 2)), kernel)
        >>> sampler, _ = ebm.advance(jax.random.key(1), energy, sampler, 20)
        >>> sampler, refit = refit_flow(jax.random.key(2), energy, sampler, num_updates=200)
        >>> bool(refit.is_accepted), bool(refit.ess_after > refit.ess_before)
        (True, True)

    References:
        Gabrie, Rotskoff, Vanden-Eijnden (2022), arXiv:2105.12603; Grenioux, Moulines, Gabrie (2023), arXiv:2306.00684,
        algorithm 1.
    """
    old = proposal_of(sampler)
    if sampler.num_chains < 4:
        raise ValueError(f"sampler: got {sampler.num_chains} chains, expected at least 4; half of them are held out.")
    trace = sampler.position[:, None] if samples is None else jnp.asarray(samples)
    if trace.ndim < 2 or (trace.shape[0], *trace.shape[2:]) != sampler.position.shape:
        raise ValueError(
            f"samples: got shape {trace.shape}, expected (chain, draw, *event) for chains of shape "
            f"{sampler.position.shape}."
        )
    counts = check_count("num_updates", num_updates), check_count("batch_size", batch_size)
    check_count("num_samples", num_samples, 2)
    optimizer = default_optimizer(num_updates) if optimizer is None else optimizer
    run = _refit if is_traced(key, potential, sampler, trace) else _compiled_refit
    flow, refit = run(key, potential, old, trace, optimizer, *counts, num_samples)
    if not is_traced(refit.is_accepted) and not bool(refit.is_accepted):
        warnings.warn(f"refit_flow: {refit.text}. The old flow was kept.", RuntimeWarning, stacklevel=2)
    kernel = sampler.kernel
    return sampler._replace(kernel=Partial(kernel.func, *kernel.args, **{**kernel.keywords, "proposal": flow})), refit


def _refit(
    key: Key,
    potential: Potential,
    old: Any,
    samples: Array,
    optimizer: optax.GradientTransformation,
    num_updates: int,
    batch_size: int,
    num_samples: int,
) -> tuple[Any, Refit]:
    split_key, fit_key, judge_key = jax.random.split(key, 3)
    samples = jax.random.permutation(split_key, jax.lax.stop_gradient(samples))
    half = samples.shape[0] // 2
    train = samples[:half].reshape(-1, *samples.shape[2:])
    new, history = fit_flow(fit_key, old, train, num_updates=num_updates, batch_size=batch_size, optimizer=optimizer)
    refit = judge(judge_key, potential, old, new, samples[half:], num_samples)._replace(history=history)
    flow = jax.tree.map(lambda n, o: jnp.where(refit.is_accepted, n, o) if eqx.is_array(o) else o, new, old)
    return flow, refit


def judge(key: Key, potential: Potential, old: Any, new: Any, held_out: Array, num_samples: int) -> Refit:
    """Whether a proposal is no worse than another, by the criteria of :func:`refit_flow`.

    Args:
        key: Random key.
        potential: Energy of one event, base included.
        old: The proposal that stays in case of doubt.
        new: The proposal to be judged.
        held_out: States of chains that neither was fitted to, ``(chain, draw, *event)``.
        num_samples: Draws of each proposal.

    Returns:
        A :class:`Refit` without a history.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> held_out = jax.random.normal(jax.random.key(0), (100, 5))
        >>> wide, right, narrow = dist.Normal(0.0, 3.0), dist.Normal(0.0, 1.0), dist.Normal(0.0, 0.2)
        >>> def energy(x): return 0.5 * x**2
        >>> judge(jax.random.key(1), energy, wide, right, held_out, 1000).text
        'accepted (held-out forward KL ...
        >>> judge(jax.random.key(1), energy, right, narrow, held_out, 1000).text
        'refused: held-out chains are less likely under the refitted flow ...
    """
    num_chains, num_draws = held_out.shape[:2]
    states = held_out.reshape(-1, *held_out.shape[2:])
    before, after = log_density(old, states), log_density(new, states)
    # Draws of one chain are no independent witnesses: one mean per chain.
    excess = _bounded(before - after).reshape(num_chains, num_draws).mean(axis=1)
    error = jnp.std(excess, ddof=1) / jnp.sqrt(num_chains)

    old_key, new_key = jax.random.split(key)
    draws, weight = _weighted_draws(old_key, potential, old, num_samples)
    _, new_weight = _weighted_draws(new_key, potential, new, num_samples)
    ess_before, ess_after = _ess_fraction(weight), _ess_fraction(new_weight)
    # Draws of weight zero may lie anywhere, also where a density is not a number.
    lost = jnp.where(weight > 0, _bounded(log_density(old, draws) - log_density(new, draws)), 0.0)
    coverage_loss = jnp.sum(weight * lost)
    coverage_error = jnp.sqrt(jnp.sum((weight * (lost - coverage_loss)) ** 2))

    faults = jnp.stack(
        [
            ~(jnp.isfinite(after).all() & jnp.isfinite(lost).all()),
            jnp.mean(excess) > _ERRORS * error,
            ess_after < _COLLAPSE * ess_before,
            (coverage_loss > _ERRORS * coverage_error) & (ess_before * num_samples >= _TRUSTED_ESS),
        ]
    )
    is_accepted = ~faults.any()
    return Refit(
        is_accepted=is_accepted,
        reason=jnp.where(is_accepted, 0, 1 + jnp.argmax(faults)),
        forward_kl_before=-jnp.mean(before),
        forward_kl_after=-jnp.mean(after),
        forward_kl_error=error,
        ess_before=ess_before,
        ess_after=ess_after,
        coverage_loss=coverage_loss,
        coverage_error=coverage_error,
        history=jnp.zeros(0),
    )


def _bounded(change: Array) -> Array:
    return jnp.clip(change, -_LARGEST_CHANGE, _LARGEST_CHANGE)


def _weighted_draws(key: Key, potential: Potential, flow: Any, num_samples: int) -> tuple[Array, Array]:
    """Draws of a flow, and their normalised importance weights; a draw that cannot be weighted has weight zero."""
    draws, log_prob = sample_and_log_prob(flow, key, num_samples)
    log_weight = -jax.vmap(potential)(draws) - log_prob
    log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
    # Subtracted by hand: of weights that are all zero, softmax would make NaN.
    largest = jnp.max(log_weight)
    weight = jnp.exp(log_weight - jnp.where(jnp.isneginf(largest), 0.0, largest))
    return draws, weight / jnp.maximum(jnp.sum(weight), jnp.finfo(weight.dtype).tiny)


def _ess_fraction(weight: Array) -> Array:
    return jnp.sum(weight) ** 2 / (weight.shape[0] * jnp.maximum(jnp.sum(weight**2), jnp.finfo(weight.dtype).tiny))


_compiled_refit = eqx.filter_jit(_refit)
