"""Balanced training of an EBM with a flow that is refitted to its chains."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebm_ppl.checks import check_count, check_rows
from ebm_ppl.flows import RealNVP, proposal_only
from ebm_ppl.flows.fitting import default_optimizer
from ebm_ppl.kernels import flow_assisted, mala
from ebm_ppl.objectives import chain_likelihood, persistent_contrastive_divergence
from ebm_ppl.potentials import MLP, tilt
from ebm_ppl.recipes.bases import normal_base
from ebm_ppl.regions import describe_region, is_whole_space
from ebm_ppl.replay import take_chains
from ebm_ppl.sampling import advance, init_sampler
from ebm_ppl.training import TrainState, fit, init_train
from ebm_ppl.training.stopping import Evaluate, named_numbers
from ebm_ppl.types import Array, Key, Potential

LOST = 0.01
"""Where fewer chains than this fraction move by a global step, the flow is of no use."""
_WATCHED = 256


def adaptive_flow(
    key: Key,
    data: Array,
    *,
    num_updates: int,
    batch_size: int = 128,
    network: Potential | None = None,
    base: Any = None,
    flow: Any = None,
    method: str = "isir",
    num_proposals: int | None = None,
    num_local: int = 4,
    num_cycles: int = 2,
    step_size: float = 0.01,
    target_acceptance: float | None = None,
    bank_size: int = 1024,
    num_chains: int | None = None,
    all_states: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    flow_optimizer: optax.GradientTransformation | None = None,
    evaluate: Evaluate | None = None,
    report_every: int = 100,
    progress_bar: bool | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train a tilted EBM ``p(x) = base(x) exp(-U(x)) / Z`` together with a flow that proposes jumps between its modes.

    Energy and flow start at the base: ``U = 0`` and ``T`` the identity, so that target, proposal and base are one law. In
    every update some chains of a persistent bank make ``num_cycles`` cycles of one global step (proposals of the flow) and
    ``num_local`` steps of MALA; the energy follows the gradient of the likelihood with them as negatives; and the flow
    follows the likelihood of the bank. The flow never sees the data: where the energy has no mass, it has none.

    The sampler at test time is the kernel as training leaves it: ``ebm.draw(key, state.potential, state.sampler, 500)``.

    Args:
        key: Random key.
        data: Rows ``(row, *event)``.
        num_updates: Updates of both players.
        batch_size: Rows per update.
        network: Energy ``U``; :class:`ebm_ppl.potentials.MLP` with three hidden layers of 64 units when ``None``. One
            that starts at zero (``zero_init=True``) starts the EBM at its base.
        base: Normalised distribution of one event; when ``None``, normal at the mean of the data, in all coordinates with
            the largest standard deviation that one of them has.
        flow: :class:`ebm_ppl.flows.RealNVP` with six layers on the same base when ``None``. A flow on another base, or
            one that was fitted before, starts elsewhere than the EBM.
        method: ``"isir"`` or ``"independence"``, see :func:`ebm_ppl.kernels.flow_assisted`.
        num_proposals: Of i-SIR, current state included; 32 when ``None``.
        num_local: MALA steps per cycle.
        num_cycles: Cycles per update.
        step_size: Of MALA, where it starts: ``x' = x - step_size grad U + sqrt(2 step_size) noise``.
        target_acceptance: Of MALA, which its step size then follows; ``None`` keeps the step size.
        bank_size: Persistent chains, draws of the base at first.
        num_chains: Of these, how many move in each update; ``batch_size`` of them when ``None``.
        all_states: Negatives are the chains after every cycle, not only after the last.
        optimizer: Of the energy. Adam with a step of 3e-3 that falls to zero along a cosine when ``None``, clipped.
        flow_optimizer: Of the flow; as for the energy when ``None``. It moves the flow's layers alone: neither the flow's
            base nor the step size.
        evaluate: As in :func:`ebm_ppl.fit`.
        report_every: Updates between two looks at the run.
        progress_bar: As in :func:`ebm_ppl.fit`.

    Returns:
        The state, and the history of :func:`ebm_ppl.fit` with, at every report, ``evaluation_global_acceptance_rate``, the
        fraction of chains that a global step moves, and (i-SIR) ``evaluation_global_pool_ess``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the rows do not fit it.
        TrainingFailure: a player became non-finite, or a loss.

    Warns:
        RuntimeWarning: the flow has collapsed: fewer than one chain in a hundred moves by its proposals. Besides what
            :func:`ebm_ppl.fit` warns of.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> side = jnp.where(jnp.arange(300) < 100, -2.0, 2.0)[:, None]
        >>> data = side + 0.5 * jax.random.normal(jax.random.key(0), (300, 1))
        >>> state, history = adaptive_flow(jax.random.key(1), data, num_updates=50, report_every=50)
        >>> bool(history["evaluation_global_acceptance_rate"][-1] > 0.5)
        True

    References:
        Grenioux, Moulines, Gabrie (2023), Balanced training of energy-based models with adaptive flow sampling,
        arXiv:2306.00684, algorithms 1, 5 and 6.
    """
    num_updates, bank_size = check_count("num_updates", num_updates), check_count("bank_size", bank_size)
    batch_size, num_cycles = check_count("batch_size", batch_size), check_count("num_cycles", num_cycles)
    data = check_rows("data", data)
    if base is None:
        base = normal_base(data)
    elif not is_whole_space(base.support, data[0]):
        raise ValueError(
            f"base: got one on {describe_region(base.support)}, expected one on the whole space: the flow proposes there. "
            "Transform the data to it."
        )
    net_key, flow_key, bank_key, fit_key = jax.random.split(key, 4)
    event_shape = data.shape[1:]
    network = MLP(event_shape, key=net_key, width=64, depth=3) if network is None else network
    flow = RealNVP(event_shape, key=flow_key, base=base) if flow is None else flow

    local = mala(step_size)
    kernel = flow_assisted(flow, local, num_local=num_local, num_proposals=num_proposals, method=method)
    sampler = init_sampler(jnp.asarray(base.sample(bank_key, (bank_size,)), data.dtype), kernel)
    optimizer = default_optimizer(num_updates) if optimizer is None else optimizer
    sampler_optimizer = proposal_only(default_optimizer(num_updates) if flow_optimizer is None else flow_optimizer)
    negatives = functools.partial(
        persistent_contrastive_divergence,
        num_steps=num_cycles,
        num_chains=min(batch_size, bank_size) if num_chains is None else num_chains,
        all_states=all_states,
    )
    state = init_train(tilt(network, base), optimizer, sampler, sampler_optimizer=sampler_optimizer)
    return fit(
        fit_key,
        state,
        data,
        negatives,
        optimizer,
        sampler_objective=chain_likelihood,
        sampler_optimizer=sampler_optimizer,
        num_steps=num_updates,
        batch_size=batch_size,
        target_acceptance=target_acceptance,
        evaluate=functools.partial(_watched, evaluate),
        report_every=report_every,
        progress_bar=progress_bar,
    )


def _watched(evaluate: Evaluate | None, state: TrainState) -> dict[str, Any]:
    """How the flow serves the chains as they are, and what the caller wants to know besides."""
    sampler = take_chains(state.sampler, jnp.arange(min(_WATCHED, state.sampler.num_chains)))
    key: Any = state.key
    _, info = advance(jax.random.fold_in(key, state.step), state.potential, sampler, 1)
    rates = {name: float(info.statistics[name].mean()) for name in info.statistics if name.startswith("global_")}
    if rates["global_acceptance_rate"] < LOST:
        warnings.warn(
            f"after {int(state.step)} updates a global step moves {rates['global_acceptance_rate']:.1%} of the chains: the "
            "flow has collapsed or lost the energy, and the weights of modes are left to chance. Use a smaller learning "
            "rate of the energy, a larger one of the flow, more of its layers, more proposals, or a base nearer the data.",
            RuntimeWarning,
            stacklevel=4,
        )
    return {**rates, **named_numbers(evaluate, state)}
