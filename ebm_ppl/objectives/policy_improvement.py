"""A diffusion sampler follows an energy by maximum-entropy policy improvement: values of its steps, and gradients of them.

The sampler is a policy over ``T`` steps from noise to an event; the energy is the cost of where it ends. Its law
``q(x_T)`` has no density in closed form, but ``KL(q || exp(-U) / Z)`` is at most the divergence of whole trajectories,
``E[U(x_T) + sum_t c_t] + E[log q(x_0)] + log Z`` with running costs ``c_t = log q(x_{t+1} | x_t) - log r(x_t | x_{t+1})``
and any noising ``r``. That is a control problem, and all that is known of policies applies.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count, check_number, check_potential
from ebm_ppl.diffusion import ActorCritic, DiffusionSampler, Trajectory
from ebm_ppl.objectives.contrastive import require_sampler
from ebm_ppl.partials import as_constants
from ebm_ppl.types import Array, Batch, Event, Key, Metrics, Potential, SamplerState, Scalar
from ebm_ppl.weights import weight_statistics

PolicyGradient = Literal["pathwise", "reinforce"]


def running_costs(
    trajectory: Trajectory, *, entropy_weight: float | Array = 1.0, velocity_weight: float | Array = 1.0
) -> Array:
    """``c_t = entropy_weight log q(x_{t+1} | x_t) - velocity_weight log r(x_t | x_{t+1})``, ``(n, T)``, in nats.

    With both weights one, their sum is the log ratio of trajectories that bounds the divergence of the sampler. At an
    energy ``E`` of temperature ``tau``, given as ``U = E / tau``, the paper's two temperatures are
    ``tau_1 = entropy_weight tau`` and ``tau_2 = velocity_weight tau``.

    Args:
        trajectory: From :meth:`ebm_ppl.diffusion.DiffusionSampler.rollout`.
        entropy_weight: Of the steps' negative entropy. With zero the policy collapses onto low energies.
        velocity_weight: Of the noising, which for a random walk ``r`` is the squared length of steps over ``2 s_t^2``.

    Raises:
        ValueError: a negative weight.

    Example:
        >>> import jax
        >>> sampler = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> running_costs(sampler.rollout(jax.random.key(1), 10)).shape
        (10, 5)

    References:
        Yoon, Hwang, Kwon, Noh, Park (2024), arXiv:2407.00626, equation 8.
    """
    entropy_weight = check_number("entropy_weight", entropy_weight)
    velocity_weight = check_number("velocity_weight", velocity_weight)
    dtype = trajectory.step_log_prob.dtype
    return (
        entropy_weight.astype(dtype) * trajectory.step_log_prob
        - velocity_weight.astype(dtype) * trajectory.backward_log_prob
    )


def temporal_difference_loss(
    value: Any,
    potential: Potential,
    trajectory: Trajectory,
    *,
    entropy_weight: float | Array = 1.0,
    velocity_weight: float | Array = 1.0,
) -> Scalar:
    """``mean_i sum_t (c_t + V^{t+1}(x_{t+1}) - V^t(x_t))^2``, with the target ``c_t + V^{t+1}`` constant, ``V^T = U``.

    Time-local: every value learns from the next one alone. For a policy held fixed the minimum is the expected remaining
    cost; for the best policy it is the soft value ``V^t(x) = -log ∫ exp(-U(x_T)) r(x_t ... x_{T-1} | x_T)`` over all that
    comes after ``x_t = x``, at which every single residual is zero.

    Args:
        value: ``V(t, x)`` at the times ``0 ... T - 1``, such as :class:`ebm_ppl.diffusion.ValueNetwork`.
        potential: The energy; a constant.
        trajectory: Of the policy; a constant.
        entropy_weight: As in :func:`running_costs`.
        velocity_weight: As in :func:`running_costs`.

    Returns:
        A scalar, differentiable in ``value``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sampler = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> def energy(x): return 0.5 * jnp.sum(x**2) + jnp.log(2.0 * jnp.pi)
        >>> def value(t, x): return energy(x)  # what it is for a sampler that draws from the energy already
        >>> bool(temporal_difference_loss(value, energy, sampler.rollout(jax.random.key(1), 100)) < 1e-8)
        True

    References:
        Yoon, Hwang, Kwon, Noh, Park (2024), arXiv:2407.00626, equations 9 and 10.
    """
    trajectory = jax.lax.stop_gradient(trajectory)
    costs = running_costs(trajectory, entropy_weight=entropy_weight, velocity_weight=velocity_weight)
    values = _values(value, trajectory.states[:, :-1])
    after = jnp.concatenate([values[:, 1:], jax.vmap(potential)(trajectory.final)[:, None]], axis=1)
    return jnp.mean(jnp.sum((jax.lax.stop_gradient(costs + after) - values) ** 2, axis=1))


def pathwise_policy_loss(
    policy: DiffusionSampler,
    value: Any,
    potential: Potential,
    states: Array,
    key: Key,
    *,
    entropy_weight: float | Array = 1.0,
    velocity_weight: float | Array = 1.0,
) -> Scalar:
    """``mean_i sum_t [V^{t+1}(x') + c_t(x_t, x')]`` with ``x'`` drawn anew from ``q(x' | x_t)``: one-step policy gradient.

    Differentiable in the policy through the one step from the given ``x_t`` to ``x'`` (reparametrised); nothing is
    propagated through time, and the noising is a constant. Its gradient, for values of the policy itself, is that of the
    bound on the divergence of trajectories.

    Args:
        policy: The sampler.
        value: ``V(t, x)`` at the times ``0 ... T - 1``; a constant.
        potential: The energy; a constant.
        states: ``x_0 ... x_T`` of rollouts, ``(n, T + 1, *event)``; constants.
        key: Random key.
        entropy_weight: As in :func:`running_costs`.
        velocity_weight: As in :func:`running_costs`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sampler = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> states = sampler.rollout(jax.random.key(1), 100).states
        >>> loss = pathwise_policy_loss(
        ...     sampler, lambda t, x: 0.0 * x[0], lambda x: jnp.sum(x**2), states, jax.random.key(2))
        >>> loss.shape
        ()

    References:
        Yoon, Hwang, Kwon, Noh, Park (2024), arXiv:2407.00626, equation 11 and algorithm 1.
    """
    policy.check_states(states)
    before = jax.lax.stop_gradient(states[:, :-1])
    backward, value = as_constants(policy.backward), as_constants(value)
    num_samples, num_steps = before.shape[:2]

    def one(time: Array, step_key: Key, event: Event) -> tuple[Event, Scalar, Scalar]:
        after, log_prob = policy.propose(step_key, time, event)
        return after, log_prob, backward.log_prob(time, event, after)

    keys = jax.random.split(key, (num_samples, num_steps))
    of_row = jax.vmap(one)
    after, log_prob, backward_log_prob = jax.vmap(of_row, (None, 0, 0))(jnp.arange(num_steps), keys, before)
    energy = jax.vmap(potential)(after[:, -1])
    later = jnp.concatenate([_values(value, after[:, :-1], first=1), energy[:, None]], axis=1)
    step = Trajectory(states, jnp.zeros(num_samples, energy.dtype), log_prob, backward_log_prob)
    costs = running_costs(step, entropy_weight=entropy_weight, velocity_weight=velocity_weight)
    return jnp.mean(jnp.sum(later + costs, axis=1))


def reinforce_policy_loss(
    policy: DiffusionSampler,
    value: Any,
    potential: Potential,
    trajectory: Trajectory,
    *,
    entropy_weight: float | Array = 1.0,
    velocity_weight: float | Array = 1.0,
) -> Scalar:
    """``mean_i sum_t A_t log q(x_{t+1} | x_t)`` of advantages ``U(x_T) + sum_{s >= t} c_s - V^t(x_t)``: REINFORCE.

    The baseline of the pathwise gradient: it needs no slope of the energy, it is exact whatever the values, which only
    lessen its variance, and it is far noisier.

    Args:
        policy: The sampler; the loss is differentiable in its network and step sizes.
        value: ``V(t, x)`` at the times ``0 ... T - 1``; a constant.
        potential: The energy; a constant.
        trajectory: Of this very policy; a constant.
        entropy_weight: As in :func:`running_costs`.
        velocity_weight: As in :func:`running_costs`.

    Returns:
        A scalar whose value means nothing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sampler = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> rollout = sampler.rollout(jax.random.key(1), 100)
        >>> reinforce_policy_loss(sampler, lambda t, x: 0.0 * x[0], lambda x: jnp.sum(x**2), rollout).shape
        ()

    References:
        Williams (1992), Machine Learning 8; Fan, Lee (2023), Optimizing DDPM sampling with shortcut fine-tuning,
        arXiv:2301.13362.
    """
    trajectory = jax.lax.stop_gradient(trajectory)
    costs = running_costs(trajectory, entropy_weight=entropy_weight, velocity_weight=velocity_weight)
    to_go = jnp.cumsum(costs[:, ::-1], axis=1)[:, ::-1] + jax.vmap(potential)(trajectory.final)[:, None]
    advantage = jax.lax.stop_gradient(to_go - _values(value, trajectory.states[:, :-1]))
    log_prob = policy.evaluate(trajectory.states).step_log_prob
    return jnp.mean(jnp.sum(advantage * log_prob, axis=1))


def velocity_loss(policy: DiffusionSampler, states: Array) -> Scalar:
    """``-mean_i sum_t log r(x_t | x_{t+1}) / D``: how badly the noising foretells where the sampler came from.

    It is the part of the bound that the noising decides, per coordinate. :func:`ebm_ppl.diffusion.adaptive_velocity` turns
    its gradient in the scales into their moving average.

    Args:
        policy: The sampler; the loss is differentiable in its ``backward`` alone.
        states: ``x_0 ... x_T`` of rollouts, ``(n, T + 1, *event)``; constants.

    Example:
        >>> import jax
        >>> sampler = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> velocity_loss(sampler, sampler.rollout(jax.random.key(1), 10).states).shape
        ()
    """
    policy.check_states(states)
    states = jax.lax.stop_gradient(states)
    of_row = jax.vmap(policy.backward.log_prob)
    times = jnp.arange(policy.num_steps)
    log_prob = jax.vmap(of_row, (None, 0, 0))(times, states[:, :-1], states[:, 1:])
    return -jnp.mean(jnp.sum(log_prob, axis=1)) / max(states[0, 0].size, 1)


def policy_improvement(
    potential: Potential,
    sampler: SamplerState,
    batch: Batch | None,
    key: Key,
    *,
    gradient: PolicyGradient = "pathwise",
    entropy_weight: float | Array = 1.0,
    velocity_weight: float | Array = 1.0,
    num_samples: int | None = None,
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """The diffusion sampler's half of generalised contrastive divergence: towards ``exp(-U) / Z``, without its samples.

    The sum of :func:`temporal_difference_loss` in the value function, a policy loss in the policy and
    :func:`velocity_loss` in the noising, on fresh rollouts; no part moves by the loss of another. A ``sampler_objective``
    for :func:`ebm_ppl.fit`, with :func:`ebm_ppl.diffusion.actor_critic_optimizer`.

    In words of inverse reinforcement learning: the reward is ``-U = -E / tau``, the policy ``q(x_{t+1} | x_t)``, the return
    ``-U(x_T)`` with the entropy of the steps, and the rows of data, which only the energy sees, are the expert.

    Args:
        potential: The energy; a constant.
        sampler: Chains of ``kernels.raw_diffusion(ActorCritic(...))``; where they are does not matter.
        batch: Not used.
        key: Random key.
        gradient: ``"pathwise"`` or ``"reinforce"``.
        entropy_weight: As in :func:`running_costs`. Other than one, the sampler goes to another law than ``exp(-U)``.
        velocity_weight: As in :func:`running_costs`.
        num_samples: Rollouts; as many as chains when ``None``.

    Returns:
        ``(loss, (sampler, metrics))``. Metrics: ``policy_loss``, ``value_loss``, ``velocity_loss``; ``free_energy``,
        ``E[U(x_T) + log q(x_0 ... x_T) / r]``, which is at least ``KL(q || exp(-U) / Z) - log Z``; ``log_normalizer``, the
        estimate of ``log Z`` by weights of the same trajectories, too low on average, and by as much as a mode weighs that
        the sampler never reaches; ``weight_ess``, effective fraction of the rollouts in (0, 1], blind to such modes too;
        and the scales ``step_scale`` and ``velocity_scale``, ``(T,)``.

    Raises:
        TypeError: ``sampler`` is not a sampler state, its kernel has no :class:`ebm_ppl.diffusion.ActorCritic`, or the
            energy is not a real floating scalar.
        ValueError: an unknown ``gradient``, a negative weight, or an energy that does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> from ebm_ppl.diffusion import ValueNetwork
        >>> policy = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> pair = ActorCritic(policy, ValueNetwork(2, 5, key=jax.random.key(1), width=16, depth=1))
        >>> sampler = ebm.init_sampler(jnp.zeros((64, 2)), ebm.kernels.raw_diffusion(pair))
        >>> def energy(x): return 0.5 * jnp.sum(x**2) + jnp.log(2.0 * jnp.pi)
        >>> loss, (sampler, metrics) = policy_improvement(energy, sampler, None, jax.random.key(2))
        >>> bool(metrics["free_energy"] < 1e-5)  # this sampler draws from the energy, whose log Z is zero
        True

    References:
        Yoon, Hwang, Kwon, Noh, Park (2023), arXiv:2312.03397; the same authors (2024), arXiv:2407.00626, algorithm 1.
    """
    require_sampler(sampler)
    check_policy_gradient(gradient)
    pair = getattr(sampler.kernel, "keywords", {}).get("sampler")
    if not isinstance(pair, ActorCritic):
        raise TypeError(
            f"sampler: got a kernel with {type(pair).__name__} for a sampler, expected kernels.raw_diffusion(ActorCritic("
            "policy, value)): its steps are judged by a value function."
        )
    num_samples = sampler.num_chains if num_samples is None else check_count("num_samples", num_samples)
    policy, value, frozen = pair.policy, pair.value, as_constants(pair)
    rollout_key, step_key = jax.random.split(key)
    trajectory = jax.lax.stop_gradient(frozen.rollout(rollout_key, num_samples))
    final = trajectory.final
    check_potential(potential, jax.ShapeDtypeStruct(final.shape[1:], final.dtype))
    weights = {"entropy_weight": entropy_weight, "velocity_weight": velocity_weight}

    value_loss = temporal_difference_loss(value, potential, trajectory, **weights)
    if gradient == "pathwise":
        policy_loss = pathwise_policy_loss(policy, frozen.value, potential, trajectory.states, step_key, **weights)
    else:
        policy_loss = reinforce_policy_loss(policy, frozen.value, potential, trajectory, **weights)
    of_noising = velocity_loss(policy, trajectory.states)

    log_weight = trajectory.log_weight(jax.vmap(potential)(trajectory.final))
    statistics = weight_statistics(log_weight)
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "velocity_loss": of_noising,
        "free_energy": -log_weight.mean(),
        "log_normalizer": statistics["log_normalizer"],
        "weight_ess": statistics["weight_ess"] / num_samples,
        "step_scale": policy.step_scale,
        "velocity_scale": policy.backward.scale,
    }
    return value_loss + policy_loss + of_noising, (sampler, jax.lax.stop_gradient(metrics))


def check_policy_gradient(gradient: Any) -> None:
    """One of the two.

    Raises:
        ValueError: it is something else.
    """
    if gradient not in ("pathwise", "reinforce"):
        raise ValueError(f"gradient: got {gradient!r}, expected 'pathwise' or 'reinforce'.")


def _values(value: Any, events: Array, first: int = 0) -> Array:
    """``V^t`` of events ``(n, time, *event)`` at the times ``first, first + 1, ...``."""
    times = first + jnp.arange(events.shape[1])

    def one(time: Array, event: Event) -> Array:
        return jnp.asarray(value(time, event), event.dtype)

    return jax.vmap(jax.vmap(one), (None, 0))(times, events)
