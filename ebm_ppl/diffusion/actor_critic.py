"""A diffusion sampler with the value function that it learns from, and the sampler that the value function guides."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_number, check_potential
from ebm_ppl.diffusion.sampler import DiffusionSampler, Trajectory
from ebm_ppl.potentials import Fixed
from ebm_ppl.types import Array, Event, Key, Potential, Scalar


class ActorCritic(eqx.Module):
    """A diffusion sampler (the policy) and its value function ``V(t, x)``, as one tunable of a kernel.

    Kernels see the policy alone: ``kernels.raw_diffusion(ActorCritic(policy, value))`` draws what
    ``kernels.raw_diffusion(policy)`` draws. Training moves both, see
    :func:`ebm_ppl.objectives.policy_improvement`.

    Args:
        policy: The diffusion sampler.
        value: Values at the times ``0 ... T - 1``, in units of ``kT`` as energies are, such as a :class:`ValueNetwork`.
            What it says at ``T`` is not used: there the value is the energy.

    Raises:
        TypeError: ``policy`` is no diffusion sampler, or ``value`` is not callable.
        ValueError: ``value`` is no scalar function of a time and an event, or one for another number of steps.

    Example:
        >>> import jax
        >>> from ebm_ppl.diffusion import ValueNetwork
        >>> policy = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> pair = ActorCritic(policy, ValueNetwork(2, 5, key=jax.random.key(1), width=16, depth=1))
        >>> pair.rollout(jax.random.key(2), 10).final.shape
        (10, 2)
    """

    policy: DiffusionSampler
    value: Callable[[int | Array, Event], Scalar]

    def __init__(self, policy: DiffusionSampler, value: Callable[[int | Array, Event], Scalar]):
        if not isinstance(policy, DiffusionSampler):
            raise TypeError(f"policy: got {type(policy).__name__}, expected an ebm_ppl.diffusion.DiffusionSampler.")
        if not callable(value):
            raise TypeError(f"value: got {type(value).__name__}, expected a function (time, event) -> value.")
        event = jax.ShapeDtypeStruct(policy.event_shape, policy.log_step_scale.dtype)
        check_potential(lambda x: jnp.asarray(value(0, x)), event, name="value")
        num_steps = getattr(value, "num_steps", policy.num_steps)
        if num_steps != policy.num_steps:
            raise ValueError(f"value: got one for {num_steps} steps, expected one for the policy's {policy.num_steps}.")
        self.policy, self.value = policy, value

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of one event."""
        return self.policy.event_shape

    def rollout(self, key: Key, num_samples: int) -> Trajectory:
        """Trajectories of the policy."""
        return self.policy.rollout(key, num_samples)

    def reverse_rollout(self, key: Key, events: Array) -> Trajectory:
        """Trajectories that end in given events, by the policy's noising."""
        return self.policy.reverse_rollout(key, events)


def guide(pair: ActorCritic, potential: Potential, strength: float | Array) -> DiffusionSampler:
    """A sampler whose steps also descend the value: the means are ``m_t(x) - strength sigma_t grad V^{t+1}(m_t(x))``.

    Guidance mends a policy that lags behind its value, with nothing to train. The gradient is taken at the mean of a step,
    before the noise is added, so that steps stay Gaussian and weights of trajectories exact; the paper takes it after.

    Args:
        pair: The sampler and its values.
        potential: The energy, which is the value at the last time.
        strength: At least zero, in units of ``x`` over those of ``sigma``; the paper uses at most 0.5 with energies of
            order one. An array can change without recompilation.

    Returns:
        A :class:`DiffusionSampler`, for :func:`ebm_ppl.kernels.diffusion` and ``raw_diffusion``. The values, and the step
        sizes in the guidance, are constants: of the network inside, training moves the policy's alone.

    Raises:
        TypeError: ``strength`` is not a real number, or ``pair`` has no values.
        ValueError: ``strength`` is negative or several numbers, or ``potential`` does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ebm_ppl.diffusion import ValueNetwork
        >>> policy = DiffusionSampler(2, num_steps=5, key=jax.random.key(0), width=16, depth=1)
        >>> pair = ActorCritic(policy, ValueNetwork(2, 5, key=jax.random.key(1), width=16, depth=1))
        >>> guided = guide(pair, lambda x: 0.5 * jnp.sum((x - 3.0) ** 2), 0.2)
        >>> draws = [sampler.sample(jax.random.key(2), 500).mean() for sampler in (policy, guided)]
        >>> bool(draws[0] < draws[1])
        True

    References:
        Yoon, Hwang, Kwon, Noh, Park (2024), arXiv:2407.00626, section 5.2 and algorithm 2.
    """
    if not isinstance(pair, ActorCritic):
        raise TypeError(f"pair: got {type(pair).__name__}, expected an ebm_ppl.diffusion.ActorCritic.")
    check_potential(potential, jax.ShapeDtypeStruct(pair.event_shape, pair.policy.log_step_scale.dtype))
    network = _GuidedNetwork(pair.policy.network, Fixed((pair, potential)), Fixed(check_number("strength", strength)))
    return eqx.tree_at(lambda sampler: sampler.network, pair.policy, network)


class _GuidedNetwork(eqx.Module):
    """The network whose means are the policy's, less the slope of the next value.

    The policy's network can be trained on; its step sizes in the guidance are those of when it was guided.
    """

    network: Callable[[int | Array, Event], Array]
    guides: Fixed
    strength: Fixed

    def __call__(self, time: int | Array, event: Event) -> Array:
        pair, potential = self.guides.value
        policy = eqx.tree_at(lambda sampler: sampler.network, pair.policy, self.network)
        is_last = jnp.asarray(time) == policy.num_steps - 1
        # The value function is not asked about a time that it does not know.
        later = jnp.minimum(jnp.asarray(time) + 1, policy.num_steps - 1)
        mean = policy.mean(time, event)
        # Slopes are chosen, not values: an energy may have none at the noise in which the first steps end.
        slope = jnp.where(
            is_last,
            jax.grad(lambda x: jnp.asarray(potential(x), x.dtype))(mean),
            jax.grad(lambda x: jnp.asarray(pair.value(later, x), x.dtype))(mean),
        )
        push = jnp.asarray(policy.schedule.residual_scale, event.dtype)[time]
        shift = self.strength.value.astype(event.dtype) * policy.step_scale[time] * slope / push
        return self.network(time, event) - shift
