"""A sampler of T Gaussian steps, its trajectories with their densities, and the noising that runs it backwards."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count, check_levels
from ebm_ppl.diffusion.networks import TimeMLP, as_shape
from ebm_ppl.potentials import Fixed
from ebm_ppl.proposals import check_proposal, log_density, sample_and_log_prob
from ebm_ppl.regions import describe_region, is_whole_space
from ebm_ppl.types import Array, Event, Key, Scalar


class Trajectory(NamedTuple):
    """Trajectories of a diffusion sampler; time runs from noise to events.

    Attributes:
        states: ``x_0 ... x_T``, ``(n, T + 1, *event)``.
        start_log_prob: ``log q(x_0)``, ``(n,)``.
        step_log_prob: ``log q(x_{t+1} | x_t)``, ``(n, T)``.
        backward_log_prob: ``log r(x_t | x_{t+1})`` of the noising, ``(n, T)``.
    """

    states: Array
    start_log_prob: Array
    step_log_prob: Array
    backward_log_prob: Array

    @property
    def final(self) -> Array:
        """The events ``x_T``, ``(n, *event)``."""
        return self.states[:, -1]

    @property
    def log_prob(self) -> Array:
        """``log q(x_0 ... x_T)``, the density of whole trajectories, ``(n,)``."""
        return self.start_log_prob + self.step_log_prob.sum(axis=1)

    @property
    def log_ratio(self) -> Array:
        """``log q(x_0 ... x_T) - log r(x_0 ... x_{T-1} | x_T)``, ``(n,)``.

        It stands in for the density ``log q(x_T)`` of the events, which has no closed form: given ``x_T``, the mean of
        ``exp(-log_ratio)`` is ``1 / q(x_T)``.
        """
        return self.log_prob - self.backward_log_prob.sum(axis=1)

    def log_weight(self, energy: Array) -> Array:
        """Log importance weights ``-U(x_T) - log_ratio``; their exponentials have mean ``Z = ∫ exp(-U)`` exactly.

        Args:
            energy: ``U(x_T)`` of each trajectory, ``(n,)``.

        Returns:
            ``(n,)``.

        References:
            Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers; Wu, Koehler, Noe (2020), Stochastic
            normalizing flows, arXiv:2002.06707; Vargas, Grathwohl, Doucet (2023), Denoising diffusion samplers,
            arXiv:2302.13834.
        """
        return -energy - self.log_ratio


class BackwardKernel(eqx.Module):
    """The noising ``r(x_t | x_{t+1}) = N(retention_t x_{t+1}, scale_t^2 I)``.

    Importance weights are exact for any choice; their variance is least at the reversal of the sampler.

    Attributes:
        retention: ``(T,)``; one gives a random walk.
        log_scale: Logs of the standard deviations, ``(T,)``.

    Example:
        >>> import jax.numpy as jnp
        >>> walk = BackwardKernel(retention=jnp.ones(4), log_scale=jnp.log(jnp.full(4, 0.5)))
        >>> walk.scale.shape
        (4,)
    """

    retention: Array
    log_scale: Array

    @property
    def scale(self) -> Array:
        """Standard deviations, ``(T,)``."""
        return jnp.exp(self.log_scale)

    def propose(self, key: Key, time: int | Array, event: Array) -> Array:
        """A draw of ``x_t`` given one event ``x_{t+1}``."""
        noise = jax.random.normal(key, event.shape, event.dtype)
        return self.retention[time] * event + self.scale[time] * noise

    def log_prob(self, time: int | Array, event: Array, next_event: Array) -> Scalar:
        """``log r(x_t | x_{t+1})`` of one pair."""
        return _normal_log_prob(event, self.retention[time] * next_event, self.log_scale[time])


def cosine_signal(num_steps: int, *, minimum: float = 0.05) -> tuple[float, ...]:
    """Signal levels ``g_t = cos((1 - t/T) arccos(minimum))`` for ``t = 0 ... T - 1``; ``g_T = 1`` is left out.

    Args:
        num_steps: Steps (T) of the sampler.
        minimum: ``g_0`` in (0, 1): how much of an event the noisiest state keeps.

    Raises:
        ValueError: ``num_steps < 1``, or ``minimum`` is outside (0, 1).

    Example:
        >>> [round(level, 2) for level in cosine_signal(4)]
        [0.05, 0.42, 0.72, 0.93]

    References:
        Nichol, Dhariwal (2021), Improved denoising diffusion probabilistic models, arXiv:2102.09672, equation 17.
    """
    if not 0.0 < minimum < 1.0:
        raise ValueError(f"minimum: got {minimum}, expected a level in (0, 1).")
    num_steps = check_count("num_steps", num_steps)
    return tuple(math.cos((1 - t / num_steps) * math.acos(minimum)) for t in range(num_steps))


class Schedule(NamedTuple):
    """What signal levels say about each step, ``(T,)`` each; ``x_t = g_t x_T + s sqrt(1 - g_t^2) noise``.

    Attributes:
        signal: ``g_t``.
        retention: ``g_t / g_{t+1}``, the contraction of one noising step.
        residual_scale: Effect of a unit output of the network on the mean of ``x_{t+1}``.
        posterior_variance: Of ``x_{t+1}`` given ``x_t`` and ``x_T``; zero at the last step.
    """

    signal: np.ndarray
    retention: np.ndarray
    residual_scale: np.ndarray
    posterior_variance: np.ndarray


class DiffusionSampler(eqx.Module):
    """A T-step Gaussian diffusion from noise to events, with trainable means and step sizes.

    ``x_0 ~ N(0, s^2 I)``, ``x_{t+1} = m_t(x_t) + sigma_t noise``, ``t = 0 ... T - 1``, with residual means
    ``m_t(x) = a_t x + b_t f(t, x)``. The constants follow from signal levels ``g_0 < ... < g_{T-1} < g_T = 1``, at which
    the noising ``x_t = g_t x_T + s sqrt(1 - g_t^2) noise`` of an event has its own scale: ``a_t = g_t / g_{t+1}``,
    ``b_t = s g_{t+1} (1 - a_t^2) / sqrt(1 - g_t^2)``. The network then predicts the residual
    ``(x_T - g_t x_t) / (s sqrt(1 - g_t^2))`` of the event, which has unit variance for events of scale ``s``.

    At ``f = 0``, where it starts, the sampler draws exactly from ``N(0, s^2 I)`` and the noising is its exact reversal.
    The density of its events has no closed form, so it is no proposal for kernels that need one; those of whole
    trajectories do (:meth:`rollout`), and correct it exactly (:meth:`Trajectory.log_weight`).

    Args:
        event_shape: Shape of one event, or its length.
        num_steps: Steps (T); a handful.
        key: Random key for the weights; not needed with a ``network`` of your own.
        width: Units per hidden layer.
        depth: Number of hidden layers.
        activation: Nonlinearity.
        scale: ``s``, typical standard deviation of an event's coordinates, in units of ``x``. Events should be centred.
        signal: Levels ``g_0 ... g_{T-1}``, increasing in (0, 1); :func:`cosine_signal` when ``None``.
        start: Normalised distribution of ``x_0`` in the place of ``N(0, s^2 I)``. It is held fixed.
        network: Any callable pytree ``(time, event) -> event`` in the place of a :class:`TimeMLP`.

    Attributes:
        log_step_scale: Logs of the trainable ``sigma_t``, ``(T,)``; ``s sqrt(1 - a_t^2)`` at the start.
        backward: The noising that enters the weights, a :class:`BackwardKernel`: at the start that of the signal levels.
            Its numbers may be trained too, or replaced: the weights stay exact.

    Raises:
        TypeError: a size is not a whole number, or ``start`` has no density.
        ValueError: a size or ``scale`` is not positive, ``signal`` is not increasing in (0, 1), ``start`` has other
            events, or there is neither ``key`` nor ``network``.

    Example:
        >>> import jax
        >>> sampler = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=32, depth=2)
        >>> trajectory = sampler.rollout(jax.random.key(1), 100)
        >>> trajectory.states.shape, trajectory.step_log_prob.shape
        ((100, 6, 2), (100, 5))

    References:
        Sohl-Dickstein, Weiss, Maheswaranathan, Ganguli (2015), arXiv:1503.03585; Ho, Jain, Abbeel (2020),
        arXiv:2006.11239; Salimans, Ho (2022), arXiv:2202.00512 (the residual that is predicted); Yoon, Hwang, Kwon, Noh,
        Park (2024), arXiv:2407.00626, equation 1 (trainable step sizes).
    """

    network: Callable[[int | Array, Event], Array]
    log_step_scale: Array
    backward: BackwardKernel
    start: Fixed | None
    event_shape: tuple[int, ...] = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    signal: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        num_steps: int,
        key: Key | None = None,
        width: int = 128,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.silu,
        scale: float = 1.0,
        signal: Sequence[float] | None = None,
        start: Any = None,
        network: Callable[[int | Array, Event], Array] | None = None,
    ):
        self.event_shape = as_shape("event_shape", event_shape)
        num_steps = check_count("num_steps", num_steps)
        self.scale = float(scale)
        if not (math.isfinite(self.scale) and self.scale > 0.0):
            raise ValueError(f"scale: got {scale}, expected a finite number > 0.")
        self.signal = cosine_signal(num_steps) if signal is None else check_levels("signal", signal, num_steps)
        self.start = None if start is None else Fixed(_check_start(start, self.event_shape))
        if network is None:
            if key is None:
                raise ValueError("key: got None, expected a random key for the weights, or a network of your own.")
            network = TimeMLP(self.event_shape, num_steps, key=key, width=width, depth=depth, activation=activation)
        self.network = network
        retention = self.schedule.retention
        log_scale = jnp.asarray(np.log(self.scale) + 0.5 * np.log1p(-(retention**2)), jnp.result_type(float))
        self.log_step_scale = log_scale
        self.backward = BackwardKernel(jnp.asarray(retention, log_scale.dtype), log_scale)

    @property
    def num_steps(self) -> int:
        """Steps (T)."""
        return len(self.signal)

    @property
    def step_scale(self) -> Array:
        """Standard deviations ``sigma_t`` of the steps, ``(T,)``."""
        return jnp.exp(self.log_step_scale)

    @property
    def schedule(self) -> Schedule:
        """The constants of each step."""
        levels = np.array([*self.signal, 1.0])
        before, after = levels[:-1], levels[1:]
        retention = before / after
        lost, noise = 1.0 - retention**2, 1.0 - before**2
        return Schedule(
            signal=before,
            retention=retention,
            residual_scale=self.scale * after * lost / np.sqrt(noise),
            posterior_variance=self.scale**2 * (1.0 - after**2) * lost / noise,
        )

    def mean(self, time: int | Array, event: Array) -> Array:
        """Mean of ``x_{t+1}`` given one event ``x_t``.

        Args:
            time: ``t`` in ``0 ... T - 1``; may be traced.
            event: ``event_shape``.
        """
        if event.shape != self.event_shape:
            raise ValueError(f"event: got shape {event.shape}, expected {self.event_shape}.")
        schedule = self.schedule
        keep, push = (
            jnp.asarray(values, event.dtype)[time] for values in (schedule.retention, schedule.residual_scale)
        )
        return keep * event + push * self.network(time, event)

    def propose(self, key: Key, time: int | Array, event: Array) -> tuple[Array, Scalar]:
        """One step of one event: ``x_{t+1}``, differentiable in the sampler, and ``log q(x_{t+1} | x_t)``."""
        mean = self.mean(time, event)
        proposal = mean + self.step_scale[time] * jax.random.normal(key, event.shape, event.dtype)
        return proposal, _normal_log_prob(proposal, mean, self.log_step_scale[time])

    def step_log_prob(self, time: int | Array, event: Array, next_event: Array) -> Scalar:
        """``log q(x_{t+1} | x_t)`` of one pair of events."""
        return _normal_log_prob(next_event, self.mean(time, event), self.log_step_scale[time])

    def rollout(self, key: Key, num_samples: int) -> Trajectory:
        """Draw trajectories; states and densities are differentiable in the sampler (reparametrised).

        For a score-function gradient use :meth:`evaluate` at ``stop_gradient(states)``.

        Args:
            key: Random key.
            num_samples: How many (n).

        Returns:
            A :class:`Trajectory` with leading axis ``n``.
        """
        num_samples = check_count("num_samples", num_samples)
        start_key, run_key = jax.random.split(key)
        start, start_log_prob = self._draw_start(start_key, num_samples)

        def step(events: Array, inputs: tuple[Array, Key]) -> tuple[Array, tuple[Array, Array, Array]]:
            time, step_key = inputs
            keys = jax.random.split(step_key, num_samples)
            after, log_prob = jax.vmap(self.propose, (0, None, 0))(keys, time, events)
            backward = jax.vmap(self.backward.log_prob, (None, 0, 0))(time, events, after)
            return after, (after, log_prob, backward)

        inputs = jnp.arange(self.num_steps), jax.random.split(run_key, self.num_steps)
        _, (states, log_prob, backward) = jax.lax.scan(step, start, inputs)
        states = jnp.swapaxes(jnp.concatenate([start[None], states]), 0, 1)
        return Trajectory(states, start_log_prob, log_prob.T, backward.T)

    def sample(self, key: Key, num_samples: int) -> Array:
        """The events at the end of :meth:`rollout`, ``(num_samples, *event)``: draws of the sampler, of no other law."""
        return self.rollout(key, num_samples).final

    def reverse_rollout(self, key: Key, events: Array) -> Trajectory:
        """Trajectories that end in given events, drawn by the noising ``r``.

        Args:
            key: Random key.
            events: ``x_T``, ``(n, *event)``.
        """

        def step(after: Array, inputs: tuple[Array, Key]) -> tuple[Array, Array]:
            time, step_key = inputs
            keys = jax.random.split(step_key, after.shape[0])
            before = jax.vmap(self.backward.propose, (0, None, 0))(keys, time, after)
            return before, before

        inputs = jnp.arange(self.num_steps), jax.random.split(key, self.num_steps)
        _, states = jax.lax.scan(step, events, inputs, reverse=True)
        return self.evaluate(jnp.swapaxes(jnp.concatenate([states, events[None]]), 0, 1))

    def evaluate(self, states: Array) -> Trajectory:
        """The densities of given trajectories, ``(n, T + 1, *event)``.

        Raises:
            ValueError: ``states`` has another shape.
        """
        self.check_states(states)
        before, after = (jnp.swapaxes(x, 0, 1) for x in (states[:, :-1], states[:, 1:]))

        def step(_: None, inputs: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
            forward = jax.vmap(self.step_log_prob, (None, 0, 0))(*inputs)
            return None, (forward, jax.vmap(self.backward.log_prob, (None, 0, 0))(*inputs))

        _, (forward, backward) = jax.lax.scan(step, None, (jnp.arange(self.num_steps), before, after))
        return Trajectory(states, self.start_log_prob(states[:, 0]), forward.T, backward.T)

    def check_states(self, states: Array) -> None:
        """Whole trajectories of this sampler, ``(n, T + 1, *event)``.

        Raises:
            ValueError: ``states`` has another shape.
        """
        expected = (self.num_steps + 1, *self.event_shape)
        if states.shape[1:] != expected:
            raise ValueError(f"states: got shape {states.shape}, expected (n, {', '.join(map(str, expected))}).")

    def start_log_prob(self, events: Array) -> Array:
        """``log q(x_0)`` of each event, ``(n,)``."""
        if self.start is not None:
            return log_density(self.start.value, events)
        return jax.vmap(_normal_log_prob, (0, None, None))(events, jnp.zeros((), events.dtype), math.log(self.scale))

    def _draw_start(self, key: Key, num_samples: int) -> tuple[Array, Array]:
        if self.start is not None:
            events, log_prob = sample_and_log_prob(self.start.value, key, num_samples)
            return events.astype(self.log_step_scale.dtype), log_prob
        events = self.scale * jax.random.normal(key, (num_samples, *self.event_shape), self.log_step_scale.dtype)
        return events, self.start_log_prob(events)


def _normal_log_prob(event: Array, mean: Array, log_scale: Array | float) -> Scalar:
    """Log density of one event under ``N(mean, exp(log_scale)^2 I)``."""
    standardised = (event - mean) * jnp.exp(-log_scale)
    return -0.5 * jnp.sum(standardised**2) - event.size * (log_scale + 0.5 * math.log(2.0 * math.pi))


def _check_start(start: Any, event_shape: tuple[int, ...]) -> Any:
    check_proposal("start", start)
    found = tuple(getattr(start, "event_shape", event_shape))
    if found != event_shape:
        raise ValueError(f"start: got event_shape {found}, expected {event_shape}.")
    support = getattr(start, "support", None)
    if support is not None and not is_whole_space(support, jnp.zeros(event_shape)):
        raise ValueError(
            f"start: got a distribution that is {describe_region(support)}, expected one on the whole space: the noising "
            "leaves any other, and neither weights nor an accept step can make up for that."
        )
    return start
