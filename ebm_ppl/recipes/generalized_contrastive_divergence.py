"""Generalised contrastive divergence: an EBM and a diffusion sampler trained together, without a Markov chain."""

import functools
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebm_ppl import objectives
from ebm_ppl.checks import as_positive_number, check_count, check_number, check_potential, check_rows
from ebm_ppl.diffusion import ActorCritic, DiffusionSampler, ValueNetwork, actor_critic_optimizer, adaptive_velocity
from ebm_ppl.diffusion.pretraining import pretrain
from ebm_ppl.kernels import raw_diffusion
from ebm_ppl.objectives.policy_improvement import PolicyGradient, check_policy_gradient
from ebm_ppl.potentials import MLP, temper, tilt
from ebm_ppl.recipes.bases import largest_deviation, normal_base
from ebm_ppl.regions import describe_region, is_whole_space
from ebm_ppl.sampling import init_sampler
from ebm_ppl.training import TrainState, fit, init_train
from ebm_ppl.training.state import check_optimizer
from ebm_ppl.training.stopping import Evaluate, named_numbers
from ebm_ppl.types import Array, Key, Potential

COLLAPSED = 0.1
"""Where the draws have less than this fraction of the data's variance, they have lost most of its modes."""
_WATCHED = 256


def generalized_contrastive_divergence(
    key: Key,
    data: Array,
    *,
    num_updates: int,
    batch_size: int | None = None,
    network: Potential | None = None,
    base: Any = None,
    temperature: float = 0.1,
    energy_weight: float = 1.0,
    sampler: DiffusionSampler | None = None,
    num_sampler_steps: int | None = None,
    num_pretraining: int | None = None,
    value: Any = None,
    gradient: PolicyGradient = "pathwise",
    entropy_weight: float = 1.0,
    velocity_weight: float = 1.0,
    velocity_rate: float = 0.01,
    optimizer: optax.GradientTransformation | None = None,
    policy_optimizer: optax.GradientTransformation | None = None,
    value_optimizer: optax.GradientTransformation | None = None,
    step_optimizer: optax.GradientTransformation | None = None,
    evaluate: Evaluate | None = None,
    report_every: int = 100,
    progress_bar: bool | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train an EBM ``p(x) = base(x) exp(-E(x) / tau) / Z`` and a diffusion sampler of ``T`` steps against each other.

    In every update the sampler draws a batch of negatives, in ``T`` evaluations of its network; the energy descends
    ``mean E(x) - mean E(x_T) + gamma (mean E(x)^2 + mean E(x_T)^2)``; then the values ``V^t`` follow their time-local
    targets, the policy the one-step gradient through the next value, and the noising the mean squared step.

    The penalty is no trifle. With a sampler that has answered, ``|E| <= 1 / (2 gamma)``, no two log densities, relative to
    the base, differ by more than ``1 / (gamma tau)``, and the equilibrium is not the data ``p`` but ``q`` with
    ``log q - log base + log Z = tanh((log p - log q) / 2) / (2 gamma tau)``. Only the product ``gamma tau`` matters.

    The potential of the state is the energy over the temperature with its base: a density as it is. The sampler of the
    state is the kernel of raw draws; :func:`sampler_of` gives what to put into :func:`ebm_ppl.kernels.diffusion`, which is
    exact. The default step sizes end at zero: to train on, call this again with ``sampler=sampler_of(state)`` and the
    state's network and value.

    Args:
        key: Random key.
        data: Rows ``(row, *event)``, about centred.
        num_updates: Updates of all players.
        batch_size: Rows per update, and draws; 256, or all rows where they are fewer, when ``None``.
        network: ``E``; :class:`ebm_ppl.potentials.MLP` with three hidden layers of 128 units when ``None``.
        base: Normalised distribution of one event; when ``None``, normal at the mean of the data, in all coordinates with
            the largest standard deviation that one of them has.
        temperature: ``tau``, positive. Without entropy at all is ``entropy_weight=0, velocity_weight=0``.
        energy_weight: ``gamma``.
        sampler: One of your own, such as a pretrained one that is to be improved, with its step sizes and its noising.
        num_sampler_steps: ``T`` of the sampler that is made when ``sampler`` is ``None``; 5 when ``None``.
        num_pretraining: Updates of :func:`ebm_ppl.diffusion.pretrain` on the data before all else; when ``None``, 2000 for
            a sampler that is made here and none for one of your own.
        value: ``V(t, x)`` in units of ``kT``; when ``None``, a :class:`ebm_ppl.diffusion.ValueNetwork` with three hidden
            layers of 128 units and scale ``1 / tau``.
        gradient: Of the policy: ``"pathwise"``, or ``"reinforce"``, which is the baseline.
        entropy_weight: See :func:`ebm_ppl.objectives.running_costs`; of both weights the default is the mathematics, and
            with any other the sampler goes to another law than the energy's.
        velocity_weight: See there.
        velocity_rate: Of the moving average of squared steps; with zero the noising stays as it is.
        optimizer: Of the energy. Adam with step 1e-3 that falls to zero along a cosine when ``None``, clipped.
        policy_optimizer: Of the sampler's network; likewise.
        value_optimizer: Of the values; likewise.
        step_optimizer: Of the sampler's log step sizes; likewise, 1e-2.
        evaluate: As in :func:`ebm_ppl.fit`.
        report_every: Updates between two looks at the run.
        progress_bar: As in :func:`ebm_ppl.fit`.

    Returns:
        The state and the history of :func:`ebm_ppl.fit`, with the metrics of :func:`ebm_ppl.objectives.policy_improvement`
        after ``sampler_``, ``energy_l2`` and, at every report, ``evaluation_variance_ratio``, the variance of draws over
        that of the data, summed over coordinates.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the rows do not fit it.
        TrainingFailure: a player became non-finite, or a loss.

    Warns:
        RuntimeWarning: the sampler has collapsed: its draws have less than a tenth of the variance of the data. Besides
            what :func:`ebm_ppl.fit` warns of.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> data = 0.7 * jax.random.normal(jax.random.key(0), (512, 2))
        >>> state, history = generalized_contrastive_divergence(
        ...     jax.random.key(1), data, num_updates=50, num_pretraining=50, num_sampler_steps=3)
        >>> history["sampler_step_scale"].shape
        (50, 3)
        >>> exact = ebm.kernels.diffusion(sampler_of(state))

    References:
        Yoon, Hwang, Kwon, Noh, Park (2023), Generalized contrastive divergence, arXiv:2312.03397; the same authors (2024),
        Maximum entropy inverse reinforcement learning of diffusion models with energy-based models, arXiv:2407.00626,
        algorithm 1.
    """
    data = check_rows("data", data)
    num_updates = check_count("num_updates", num_updates)
    batch_size = check_count("batch_size", min(256, len(data)) if batch_size is None else batch_size)
    if batch_size > len(data):
        raise ValueError(f"batch_size: got {batch_size}, expected at most the {len(data)} rows of the data.")
    check_policy_gradient(gradient)
    check_number("entropy_weight", entropy_weight)
    check_number("velocity_weight", velocity_weight)
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate: got {type(evaluate).__name__}, expected a function of the state, or None.")
    tau = as_positive_number("temperature", temperature)
    gamma = check_number("energy_weight", energy_weight)
    event_shape = data.shape[1:]
    scale = largest_deviation(data)
    if base is None:
        base = normal_base(data)
    elif (support := getattr(base, "support", None)) is not None and not is_whole_space(support, data[0]):
        raise ValueError(
            f"base: got one on {describe_region(support)}, expected one on the whole space, where the sampler's steps "
            "go. Transform the data to it."
        )
    net_key, sampler_key, value_key, pretrain_key, fit_key = jax.random.split(key, 5)
    if (found := tuple(getattr(base, "event_shape", event_shape))) != event_shape:
        # Densities broadcast: one of two coordinates is a number for events of one, too.
        raise ValueError(f"base: got one of events {found}, expected those of the rows, {event_shape}.")
    if network is None:
        network = MLP(event_shape, key=net_key, width=128, depth=3, zero_init=True)
    check_potential(network, data[0], name="network")
    potential = tilt(temper(network, 1.0 / tau), base)
    check_potential(potential, data[0], name="base")
    policy = _policy(sampler_key, sampler, num_sampler_steps, event_shape, float(scale))
    if value is None:
        value = ValueNetwork(event_shape, policy.num_steps, key=value_key, width=128, depth=3, scale=1.0 / tau)
    pair = ActorCritic(policy, value)
    optimizer = _adam(1e-3, num_updates) if optimizer is None else optimizer
    check_optimizer("optimizer", optimizer)
    players = actor_critic_optimizer(
        _adam(1e-3, num_updates) if policy_optimizer is None else policy_optimizer,
        _adam(1e-3, num_updates) if value_optimizer is None else value_optimizer,
        _adam(1e-2, num_updates) if step_optimizer is None else step_optimizer,
        adaptive_velocity(velocity_rate),
    )

    # All that can be refused has been by now: this takes time.
    if num_pretraining is None:
        num_pretraining = 2000 if sampler is None else 0
    if check_count("num_pretraining", num_pretraining, minimum=0):
        teacher = _pretraining_optimizer(num_pretraining)
        policy, _ = pretrain(pretrain_key, policy, data, teacher, num_pretraining, batch_size=batch_size)
        pair = ActorCritic(policy, value)
    chains = init_sampler(jnp.resize(data, (batch_size, *event_shape)), raw_diffusion(pair))
    return fit(
        fit_key,
        init_train(potential, optimizer, chains, sampler_optimizer=players),
        data,
        # In units of kT: the loss over tau, with the weight gamma tau of U^2.
        functools.partial(objectives.generalized_contrastive_divergence, energy_weight=gamma * tau),
        optimizer,
        sampler_objective=functools.partial(
            objectives.policy_improvement,
            gradient=gradient,
            entropy_weight=entropy_weight,
            velocity_weight=velocity_weight,
        ),
        sampler_optimizer=players,
        num_steps=num_updates,
        batch_size=batch_size,
        evaluate=functools.partial(_watched, evaluate, float(data.var(axis=0).sum())),
        report_every=report_every,
        progress_bar=progress_bar,
    )


def sampler_of(state: TrainState) -> DiffusionSampler:
    """The trained diffusion sampler, for ``kernels.diffusion`` (exact), ``kernels.raw_diffusion`` or a new training.

    Raises:
        ValueError: the state's kernel has no such sampler.
    """
    kernel = getattr(getattr(state, "sampler", None), "kernel", None)
    pair = getattr(kernel, "keywords", {}).get("sampler")
    if not isinstance(pair, ActorCritic):
        raise ValueError("state: its kernel has no diffusion sampler, expected a state of this recipe.")
    return pair.policy


@functools.cache
def _adam(rate: float, num_updates: int) -> optax.GradientTransformation:
    """One object per length, so that runs of that length share their compilation."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, num_updates)))


@functools.cache
def _pretraining_optimizer(num_updates: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(2e-3, num_updates))


def _policy(
    key: Key, sampler: Any, num_steps: int | None, event_shape: tuple[int, ...], scale: float
) -> DiffusionSampler:
    if sampler is None:
        num_steps = 5 if num_steps is None else num_steps
        return DiffusionSampler(event_shape, num_steps=num_steps, key=key, width=128, depth=3, scale=scale)
    if not isinstance(sampler, DiffusionSampler):
        raise TypeError(f"sampler: got {type(sampler).__name__}, expected an ebm_ppl.diffusion.DiffusionSampler.")
    if num_steps is not None:
        raise ValueError(f"num_sampler_steps: got {num_steps} with a sampler, which has {sampler.num_steps}; pass one.")
    if sampler.event_shape != event_shape:
        raise ValueError(
            f"sampler: got one of events {sampler.event_shape}, expected those of the rows, {event_shape}."
        )
    return sampler


def _watched(evaluate: Evaluate | None, variance: float, state: TrainState) -> dict[str, Any]:
    """Whether the draws are as wide as the data, and what the caller wants to know besides."""
    key: Any = state.key
    draw_key = jax.random.fold_in(jax.random.fold_in(key, _WATCHED), state.step)
    ratio = float(_total_variance(draw_key, sampler_of(state))) / variance
    if ratio < COLLAPSED:
        warnings.warn(
            f"after {int(state.step)} updates the draws of the sampler have {ratio:.1%} of the data's variance: it has "
            "collapsed onto few events, which the energy chases. Use a higher temperature, entropy_weight=1, or a smaller "
            "learning rate of the policy.",
            RuntimeWarning,
            stacklevel=4,
        )
    return {"variance_ratio": ratio, **named_numbers(evaluate, state)}


@eqx.filter_jit
def _total_variance(key: Key, sampler: DiffusionSampler) -> Array:
    return sampler.sample(key, _WATCHED).var(axis=0).sum()
