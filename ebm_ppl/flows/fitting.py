"""Fitting a flow: to samples by maximum likelihood, or to an energy by reverse Kullback-Leibler divergence."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ebm_ppl.checks import as_array, check_count, check_potential, is_traced
from ebm_ppl.potentials import trainable
from ebm_ppl.types import Array, Key, Potential, Scalar


def forward_kl(flow: Any, samples: Array, log_weight: Array | None = None) -> Scalar:
    """``-E_p[log q(x)]`` over samples of ``p``: ``KL(p || q)`` up to the entropy of ``p``, which ``q`` cannot change.

    Its minimum covers every mode that the samples show.

    Args:
        flow: ``q``, anything with ``log_prob``.
        samples: ``(row, *event)``.
        log_weight: Log importance weights of the samples, ``(row,)``; equal when ``None``.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> round(float(forward_kl(dist.Normal(0.0, 1.0), jnp.array([0.0, 0.0]))), 4)  # log(2 pi) / 2
        0.9189
    """
    log_prob = flow.log_prob(samples)
    return -jnp.mean(log_prob) if log_weight is None else -jnp.sum(jax.nn.softmax(log_weight) * log_prob)


def reverse_kl(flow: Any, potential: Potential, key: Key, num_samples: int) -> Scalar:
    """``E_q[log q(x) + U(x)]`` over draws of the flow: ``KL(q || p) - log Z``, differentiable through the draws.

    It needs no samples of ``p``, and its minimum may cover one mode only: a way to start, not to finish.

    Args:
        flow: ``q``, with ``sample_and_log_prob``.
        potential: ``U``, the energy of one event, base included.
        key: Random key.
        num_samples: Draws of the flow.

    Example:
        >>> import jax, ebm_ppl as ebm
        >>> flow = ebm.flows.RealNVP(2, key=jax.random.key(0), num_layers=2, width=8, depth=1)  # a standard normal
        >>> def energy(x): return 0.5 * (x**2).sum()
        >>> round(float(reverse_kl(flow, energy, jax.random.key(1), 10)), 4)  # -log Z = -log(2 pi), without noise
        -1.8379
    """
    draws, log_prob = flow.sample_and_log_prob(key, num_samples)
    return jnp.mean(log_prob + jax.vmap(potential)(draws))


def fit_flow(
    key: Key,
    flow: Any,
    samples: Array,
    *,
    log_weight: Array | None = None,
    num_updates: int,
    batch_size: int = 256,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Any, Array]:
    """Fit a flow to samples by :func:`forward_kl`, in one compiled loop.

    Args:
        key: Random key.
        flow: A flow, whose parameters are those that :func:`ebm_ppl.potentials.trainable` marks.
        samples: ``(row, *event)``, finite.
        log_weight: Log importance weights, ``(row,)``; rows are then drawn in proportion to them.
        num_updates: Gradient steps.
        batch_size: Rows per step, drawn with replacement.
        optimizer: Adam with a step of 3e-3 that falls to zero along a cosine, gradients clipped, when ``None``; a flow
            whose samples lie many units from its base needs some thousand such updates, a larger step, or a better base.
            Pass the same object again to reuse the compiled loop.

    Returns:
        The fitted flow and the loss of every step, ``(num_updates,)``. Steps with a non-finite gradient are skipped.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: a count is below 1, or there are no samples, or another number of weights.

    Example:
        >>> import jax, ebm_ppl as ebm
        >>> samples = 1.0 + 0.5 * jax.random.normal(jax.random.key(0), (1000, 2))
        >>> flow = ebm.flows.RealNVP(2, key=jax.random.key(1), num_layers=2, width=8, depth=1)
        >>> flow, history = fit_flow(jax.random.key(2), flow, samples, num_updates=1000)
        >>> bool(abs(flow.sample(jax.random.key(3), 1000).mean() - 1.0) < 0.1)
        True
    """
    num_updates, batch_size = check_count("num_updates", num_updates), check_count("batch_size", batch_size)
    samples = as_array("samples", samples)
    if samples.ndim == 0 or not samples.shape[0]:
        raise ValueError(f"samples: got shape {samples.shape}, expected (row, *event) with at least one row.")
    if log_weight is not None and log_weight.shape != samples.shape[:1]:
        raise ValueError(f"log_weight: got shape {log_weight.shape}, expected one for each of {samples.shape[0]} rows.")
    run = _fit if is_traced(key, flow, samples, log_weight) else _compiled_fit
    optimizer = default_optimizer(num_updates) if optimizer is None else optimizer
    return run(key, flow, _RowLoss(batch_size), (samples, log_weight), optimizer, num_updates)


def pretrain_flow(
    key: Key,
    flow: Any,
    potential: Potential,
    *,
    num_updates: int,
    num_samples: int = 256,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[Any, Array]:
    """Move a flow towards an energy by :func:`reverse_kl`, before there are any samples to fit it to.

    Args:
        key: Random key.
        flow: A flow whose draws can be differentiated.
        potential: Energy of one event, base included.
        num_updates: Gradient steps.
        num_samples: Draws per step.
        optimizer: As in :func:`fit_flow`.

    Returns:
        The flow and the loss of every step, ``(num_updates,)``.

    Raises:
        TypeError: a count is not a whole number, or the energy is not a real floating scalar.
        ValueError: a count is below 1, or the energy does not fit one event of the flow.

    Example:
        >>> import jax, ebm_ppl as ebm
        >>> flow = ebm.flows.RealNVP(2, key=jax.random.key(1), num_layers=2, width=8, depth=1)
        >>> def energy(x): return 2.0 * ((x - 1.0) ** 2).sum()
        >>> flow, history = pretrain_flow(jax.random.key(2), flow, energy, num_updates=300, num_samples=64)
        >>> bool(history[-1] < history[0])
        True
    """
    num_updates, num_samples = check_count("num_updates", num_updates), check_count("num_samples", num_samples)
    draws, _ = jax.eval_shape(lambda k: flow.sample_and_log_prob(k, 1), key)
    check_potential(potential, jax.ShapeDtypeStruct(draws.shape[1:], draws.dtype))
    run = _fit if is_traced(key, flow, potential) else _compiled_fit
    optimizer = default_optimizer(num_updates) if optimizer is None else optimizer
    return run(key, flow, _DrawLoss(num_samples), potential, optimizer, num_updates)


@lru_cache
def default_optimizer(num_updates: int) -> optax.GradientTransformation:
    """The optimizer of :func:`fit_flow`; one object per length, so that fits of that length share their compilation.

    Example:
        >>> default_optimizer(100) is default_optimizer(100)
        True
    """
    schedule = optax.cosine_decay_schedule(3e-3, num_updates)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


class _RowLoss(eqx.Module):
    batch_size: int = eqx.field(static=True)

    def __call__(self, flow: Any, data: tuple[Array, Array | None], key: Key) -> Scalar:
        samples, log_weight = data
        if log_weight is None:
            index = jax.random.randint(key, (self.batch_size,), 0, samples.shape[0])
        else:
            index = jax.random.categorical(key, log_weight, shape=(self.batch_size,))
        return forward_kl(flow, samples[index])


class _DrawLoss(eqx.Module):
    num_samples: int = eqx.field(static=True)

    def __call__(self, flow: Any, data: Potential, key: Key) -> Scalar:
        return reverse_kl(flow, data, key, self.num_samples)


def _fit(
    key: Key,
    flow: Any,
    loss: Callable[[Any, Any, Key], Scalar],
    data: Any,
    optimizer: optax.GradientTransformation,
    num_updates: int,
) -> tuple[Any, Array]:
    parameters, static = eqx.partition(flow, trainable(flow))

    def update(carry: tuple[Any, Any], step_key: Key) -> tuple[tuple[Any, Any], Scalar]:
        parameters, state = carry
        value, gradient = jax.value_and_grad(lambda p: loss(eqx.combine(p, static), data, step_key))(parameters)
        updates, new_state = optimizer.update(gradient, state, parameters)
        is_finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient))]).all()
        new = (optax.apply_updates(parameters, updates), new_state)
        kept = jax.tree.map(lambda n, o: jnp.where(is_finite, n, o) if eqx.is_array(o) else o, new, carry)
        return kept, value

    (parameters, _), history = jax.lax.scan(
        update, (parameters, optimizer.init(parameters)), jax.random.split(key, num_updates)
    )
    return eqx.combine(parameters, static), history


_compiled_fit = eqx.filter_jit(_fit)
