"""Pretraining of a diffusion sampler on data by denoising: a bound on its likelihood, in closed form per step."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebm_ppl.checks import check_count, check_rows, is_traced
from ebm_ppl.diffusion.sampler import DiffusionSampler
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.potentials import trainable
from ebm_ppl.types import Array, Key, PyTree, Scalar


def denoising_loss(sampler: DiffusionSampler, batch: Array, key: Key) -> Scalar:
    """The negative evidence bound of the sampler on data, in nats per event: at least ``-E log q(x_T)``.

    ``E[log r(x_0 ... x_{T-1} | x_T) - log q(x_0 ... x_T)]``, where ``r`` is the noising of the sampler's signal levels.
    Each row is noised to one time, the times spread evenly over the batch; the expectation over ``x_{t+1}`` given
    ``x_t`` and the event is taken exactly, which leaves a squared error of the predicted residual. It is minimised in
    the network, whatever the step sizes, at the mean residual given ``x_t``, and in the step sizes by
    :func:`match_step_scales`; it is tight where the noising is the exact reversal of the sampler.

    Args:
        sampler: A diffusion sampler.
        batch: Rows ``(row, *event)``.
        key: Random key.

    Returns:
        A scalar, differentiable in the network and in ``log_step_scale``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sampler = DiffusionSampler(2, num_steps=4, key=jax.random.key(0), width=8, depth=1)
        >>> denoising_loss(sampler, jnp.zeros((16, 2)), jax.random.key(1)).shape
        ()

    References:
        Ho, Jain, Abbeel (2020), Denoising diffusion probabilistic models, arXiv:2006.11239, equation 5; Nichol, Dhariwal
        (2021), arXiv:2102.09672 (learned step sizes).
    """
    num_rows, num_steps = batch.shape[0], sampler.num_steps
    size = math.prod(sampler.event_shape)
    time_key, noise_key, start_key = jax.random.split(key, 3)
    # A random shift of an even spread: each row's time is uniform, and no time is left out by chance.
    time = (jnp.arange(num_rows) + jax.random.randint(time_key, (), 0, num_steps)) % num_steps
    error = _squared_error(sampler, batch, time, noise_key)

    schedule, dtype = sampler.schedule, batch.dtype
    push, variance = (
        jnp.asarray(x, dtype)[time] for x in (schedule.residual_scale, size * schedule.posterior_variance)
    )
    log_scale = sampler.log_step_scale[time]
    cross_entropy = size * (log_scale + 0.5 * math.log(2.0 * math.pi))
    cross_entropy += 0.5 * (variance + push**2 * error) * jnp.exp(-2.0 * log_scale)

    entropy = 0.5 * size * np.log(2.0 * np.pi * np.e * sampler.scale**2 * (1.0 - schedule.retention**2)).sum()
    start = _noised(sampler, batch, jnp.zeros(num_rows, int), start_key)[0]
    return jnp.mean(num_steps * cross_entropy - sampler.start_log_prob(start)) - entropy


def _noised(sampler: DiffusionSampler, rows: Array, time: Array, key: Key) -> tuple[Array, Array]:
    """Rows noised to their times, and the residual that the network should predict there."""

    def column(values: np.ndarray) -> Array:
        return jnp.asarray(values, rows.dtype)[time].reshape(-1, *[1] * (rows.ndim - 1))

    level = column(sampler.schedule.signal)
    spread = column(np.sqrt(1.0 - sampler.schedule.signal**2))
    noise = jax.random.normal(key, rows.shape, rows.dtype)
    # (x_T - g x_t) / (s sqrt(1 - g^2)), rearranged so that nothing is divided by a small number.
    return level * rows + sampler.scale * spread * noise, spread * rows / sampler.scale - level * noise


def _squared_error(sampler: DiffusionSampler, rows: Array, time: Array, key: Key) -> Array:
    """Squared errors of the predicted residuals, summed over the event, ``(row,)``."""
    noised, residual = _noised(sampler, rows, time, key)
    error = jax.vmap(sampler.network)(time, noised) - residual
    return jnp.sum(error.reshape(rows.shape[0], -1) ** 2, axis=1)


def match_step_scales(key: Key, sampler: DiffusionSampler, data: Array) -> DiffusionSampler:
    """Set the step sizes to the minimiser of :func:`denoising_loss` on data, given the network.

    ``sigma_t^2`` is the posterior variance of the noising plus the mean squared error, per coordinate, of the predicted
    mean. Means alone leave the events too concentrated.

    Args:
        key: Random key.
        sampler: A diffusion sampler.
        data: Rows ``(row, *event)``.

    Returns:
        The sampler with other step sizes.

    Example:
        >>> import jax
        >>> sampler = DiffusionSampler(1, num_steps=4, key=jax.random.key(0), width=8, depth=1)
        >>> data = 0.1 * jax.random.normal(jax.random.key(1), (1000, 1))
        >>> bool(match_step_scales(jax.random.key(2), sampler, data).step_scale[-1] < sampler.step_scale[-1])
        True

    References:
        Bao, Li, Zhu, Zhang (2022), Analytic-DPM, arXiv:2201.06503.
    """
    data = check_rows("data", data, event_shape=sampler.event_shape)
    return _match_step_scales(key, sampler, data)


@eqx.filter_jit
def _match_step_scales(key: Key, sampler: DiffusionSampler, data: Array) -> DiffusionSampler:
    def mean_error(inputs: tuple[Array, Key]) -> Array:
        time, time_key = inputs
        times = jnp.broadcast_to(time, (data.shape[0],))
        return _squared_error(sampler, data, times, time_key).mean() / math.prod(sampler.event_shape)

    times = jnp.arange(sampler.num_steps)
    error = jax.lax.map(mean_error, (times, jax.random.split(key, sampler.num_steps)))
    push, variance = (
        jnp.asarray(x, error.dtype) for x in (sampler.schedule.residual_scale, sampler.schedule.posterior_variance)
    )
    log_scale = 0.5 * jnp.log(variance + push**2 * error).astype(sampler.log_step_scale.dtype)
    return eqx.tree_at(lambda s: s.log_step_scale, sampler, log_scale)


def pretrain(
    key: Key,
    sampler: DiffusionSampler,
    data: Array,
    optimizer: optax.GradientTransformation,
    num_updates: int,
    *,
    batch_size: int = 256,
) -> tuple[DiffusionSampler, dict[str, Array]]:
    """Train a diffusion sampler on data by :func:`denoising_loss`, in one compiled loop.

    The backward kernel and the start stay as they are. Batches are drawn with replacement. The step sizes follow the
    gradient, and at the end are set to their optimum (:func:`match_step_scales`).

    Args:
        key: Random key.
        sampler: The sampler to start from.
        data: Rows ``(row, *event)``, centred, of about the sampler's ``scale``.
        optimizer: An optax transformation.
        num_updates: Updates.
        batch_size: Rows per update.

    Returns:
        The trained sampler and a history: ``loss`` and ``grad_norm``, ``(num_updates,)`` each.

    Raises:
        TypeError: ``optimizer`` is no optax transformation, or the data are not floating.
        ValueError: a count below one, or data that are empty, non-finite, or of another event shape.
        TrainingFailure: the loss became non-finite.

    Example:
        >>> import jax, optax
        >>> sampler = DiffusionSampler(1, num_steps=3, key=jax.random.key(0), width=8, depth=1)
        >>> data = jax.random.normal(jax.random.key(1), (100, 1))
        >>> sampler, history = pretrain(jax.random.key(2), sampler, data, optax.adam(1e-2), 20, batch_size=32)
        >>> history["loss"].shape
        (20,)
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected an optax.GradientTransformation.")
    num_updates, batch_size = check_count("num_updates", num_updates), check_count("batch_size", batch_size)
    data = check_rows("data", data, event_shape=sampler.event_shape)
    train_key, match_key = jax.random.split(key)
    trained, history = _pretrain(train_key, sampler, data, optimizer, num_updates, batch_size)
    if not is_traced(history):
        bad = ~np.isfinite(np.asarray(history["loss"])) | ~np.isfinite(np.asarray(history["grad_norm"]))
        if bad.any():
            raise TrainingFailure(
                f"pretraining update {int(np.argmax(bad))} produced a non-finite loss or gradient. Usual remedies: a "
                "smaller learning rate, gradient clipping (optax.clip_by_global_norm), data divided by their scale.",
                step=int(np.argmax(bad)),
                state=sampler,
                rows=np.arange(0),
                chains=np.arange(0),
                history={name: np.asarray(values) for name, values in history.items()},
            )
    return _match_step_scales(match_key, trained, data), history


@eqx.filter_jit
def _pretrain(
    key: Key,
    sampler: DiffusionSampler,
    data: Array,
    optimizer: optax.GradientTransformation,
    num_updates: int,
    batch_size: int,
) -> tuple[DiffusionSampler, dict[str, Array]]:
    # The noising of the loss is that of the signal levels: the loss does not depend on the backward kernel, which weight
    # decay would move all the same.
    is_trained = eqx.tree_at(lambda s: s.backward, trainable(sampler), jax.tree.map(lambda _: False, sampler.backward))
    parameters, rest = eqx.partition(sampler, is_trained)

    def loss_fn(parameters: PyTree, batch: Array, noise_key: Key) -> Array:
        return denoising_loss(eqx.combine(parameters, rest), batch, noise_key)

    def update(carry: tuple[PyTree, PyTree], update_key: Key) -> tuple[tuple[PyTree, PyTree], dict[str, Array]]:
        parameters, state = carry
        row_key, noise_key = jax.random.split(update_key)
        batch = data[jax.random.randint(row_key, (batch_size,), 0, data.shape[0])]
        loss, gradient = jax.value_and_grad(loss_fn)(parameters, batch, noise_key)
        updates, state = optimizer.update(gradient, state, parameters)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
        return (eqx.apply_updates(parameters, updates), state), metrics

    start = parameters, optimizer.init(parameters)
    (parameters, _), history = jax.lax.scan(update, start, jax.random.split(key, num_updates))
    return eqx.combine(parameters, rest), history
