"""Optimizers of a diffusion sampler with its value function: each part at its own pace."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ebm_ppl.types import PyTree


@functools.cache
def adaptive_velocity(rate: float = 0.01) -> optax.GradientTransformation:
    """Adaptive velocity regularisation: ``s_t^2 <- (1 - rate) s_t^2 + rate mean |x_t - a_t x_{t+1}|^2 / D``.

    The moving average of the squared steps, which is where the bound on the sampler's divergence is least in the scales
    ``s_t`` of the noising. As a transformation of the gradient in ``log s_t`` of
    :func:`ebm_ppl.objectives.velocity_loss`, ``g = 1 - mean |x_t - a_t x_{t+1}|^2 / (D s_t^2)``, it is exactly
    ``log s_t <- log s_t + log(1 - rate g) / 2``.

    Args:
        rate: Weight of the new squared steps, in (0, 1); with zero the scales stay.

    Returns:
        An optax transformation, for the leaf ``backward.log_scale`` of a diffusion sampler.

    Raises:
        ValueError: ``rate`` is no number in [0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> rule = adaptive_velocity(0.5)
        >>> gradient = jnp.array(1.0 - 9.0)  # squared steps of nine times s^2 = 1
        >>> step, _ = rule.update(gradient, rule.init(gradient))
        >>> float(jnp.round(jnp.exp(2.0 * step), 4))
        5.0

    References:
        Yoon, Hwang, Kwon, Noh, Park (2024), arXiv:2407.00626, section 4.2 and appendix A (``a_t = 1``).
    """
    if not isinstance(rate, int | float) or not 0.0 <= rate < 1.0:
        raise ValueError(f"rate: got {rate!r}, expected a number in [0, 1).")
    return optax.stateless_with_tree_map(lambda gradient, _: 0.5 * jnp.log1p(-rate * gradient))


@functools.cache
def actor_critic_optimizer(
    policy: optax.GradientTransformation,
    value: optax.GradientTransformation,
    step_scale: optax.GradientTransformation | None = None,
    velocity: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """An optimizer of a kernel whose ``sampler`` is an :class:`ActorCritic`.

    Args:
        policy: Of the policy's network.
        value: Of the value function.
        step_scale: Of ``log_step_scale``, the policy's; Adam with step 0.01 when ``None``.
        velocity: Of ``backward.log_scale``; :func:`adaptive_velocity` when ``None``.

    Returns:
        An optax transformation; one object for the same four, so that runs with them share their compilation. Everything
        else in the kernel stays.

    Raises:
        TypeError: one of them is no optax transformation.

    Example:
        >>> import jax, optax
        >>> from ebm_ppl.diffusion import ActorCritic, DiffusionSampler, ValueNetwork
        >>> policy = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> pair = ActorCritic(policy, ValueNetwork(2, 5, key=jax.random.key(1), width=16, depth=1))
        >>> state = actor_critic_optimizer(optax.adam(1e-3), optax.adam(1e-3)).init({"sampler": pair})
    """
    players: dict[Any, optax.GradientTransformation] = {
        "policy": policy,
        "value": value,
        "step_scale": optax.adam(1e-2) if step_scale is None else step_scale,
        "velocity": adaptive_velocity() if velocity is None else velocity,
        "neither": optax.set_to_zero(),
    }
    for name, optimizer in players.items():
        if not isinstance(optimizer, optax.GradientTransformation):
            raise TypeError(f"{name}: got {type(optimizer).__name__}, expected an optax.GradientTransformation.")
    return optax.partition(players, _whose)


def _whose(kernel: PyTree) -> PyTree:
    """Whose each leaf of a kernel is; what a network calls its own parts is its own business."""

    def label(path: Any, leaf: Any) -> str:
        names = [getattr(entry, "name", getattr(entry, "key", None)) for entry in path]
        within = names[names.index("sampler") + 1 :] if "sampler" in names else []
        match within:
            case ["value", *_]:
                return "value"
            case ["policy", "network", *_]:
                return "policy"
            case ["policy", "log_step_scale"]:
                return "step_scale"
            case ["policy", "backward", "log_scale"]:
                return "velocity"
        return "neither"

    return jax.tree_util.tree_map_with_path(label, kernel)
