"""Replica exchange: every chain is the cold end of a ladder of replicas that trade places with their neighbours."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import as_floats, check_count, check_markov_kernel, check_positive, check_real, is_traced
from ebm_ppl.info import step_info
from ebm_ppl.kernels.independence import as_tunable
from ebm_ppl.kernels.rungs import Rungs
from ebm_ppl.proposals import check_proposal
from ebm_ppl.types import Array, Kernel, Key, Potential, PyTree

_UNSEEN, _FROM_COLD, _FROM_HOT = 0, 1, 2


class Ladder(NamedTuple):
    """What a chain carries between phases beside its position.

    Attributes:
        replicas: The warmer replicas, ``(chain, rung - 1, *event)``.
        label: Which replica of the start is at each rung, ``(chain, rung)``.
        heading: For each rung whether its replica was last at the cold end (1), at the hot end after that (2), or has not
            been at the cold end (0).
        round_trips: Completed trips from cold to hot and back, ``(chain,)``.
        parity: Which of the two sets of neighbours is next to trade, ``(chain,)``.
    """

    replicas: PyTree
    label: Array
    heading: Array
    round_trips: Array
    parity: Array


class ReplicaExchangeState(NamedTuple):
    """Cold positions ``(chain, *event)``, the :class:`Ladder`, and the inner kernel's states, ``(rung, ...)``."""

    position: PyTree
    auxiliary: Ladder
    inner: Any


def replica_exchange(
    inverse_temperatures: Any,
    *,
    inner: Kernel,
    reference: Any = None,
    num_steps: int = 1,
    step_size_power: float | Array = 0.0,
    step_size_factors: Any = None,
) -> Kernel:
    """Replica exchange (parallel tempering) with alternating even and odd swaps.

    Rung ``j`` of a chain's ladder has the energy ``b_j U``, or ``b_j U - (1 - b_j) log reference`` with a reference. Each
    step moves every replica ``num_steps`` steps of ``inner`` and then proposes swaps of the rungs ``(0, 1), (2, 3), ...``
    and ``(1, 2), (3, 4), ...`` in turn, accepted with probability ``min(1, exp((b_i - b_j) (V_i - V_j)))``, ``V = U``
    without a reference and ``U + log reference`` with one. That order is not reversible, and carries replicas along the
    ladder instead of letting them diffuse. A rung with ``b = 0`` draws from the reference anew at every step.

    The warmer replicas survive in ``sampler.auxiliary`` (a :class:`Ladder`), across parameter updates; they start at the
    position of their chain. ``info.statistics`` has ``swap_rate_0``, ``swap_rate_1``, ...: the acceptance probability of
    each neighbouring pair, colder first, whether it was its turn or not; their ``swap_rate_minimum``; and ``round_trips``,
    trips from cold to hot and back per step. The acceptance rate and divergences are those of ``inner`` at ``b = 1``.

    Args:
        inverse_temperatures: ``(rung,)`` with ``1 = b_0 > b_1 > ... >= 0``; 0 only with a reference. Tunable:
            :func:`ebm_ppl.tune_ladder` spaces them.
        inner: The kernel that moves replicas, any that keeps nothing but positions.
        reference: Normalised distribution of one event that can be sampled, or ``None``. That of the potential is not used
            unless passed.
        num_steps: Steps of ``inner`` between swaps.
        step_size_power: The ``step_size`` of ``inner`` is divided by ``b^power``: 1 suits ``mala``, whose step is in
            squared units of ``x``, and 1/2 suits ``hmc`` and ``barker``. Rungs below ``b = 0.01`` count as that.
        step_size_factors: What the step size is multiplied with at each rung as well, ``(rung,)``; ones when ``None``.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant. Gradients: those of ``num_steps`` steps per rung, and with a reference
        one more for the hottest rung; the energies for the swaps are those that the steps have computed, and where a
        replica goes, its energy and gradient go with it. An ``inner`` with more to its state than position, energy and
        gradient (a momentum) starts anew after every swap, which costs an evaluation per rung.

    Raises:
        TypeError: ``inner`` is not a kernel or carries auxiliaries, or the reference has no density.
        ValueError: the inverse temperatures do not fall from 1, end with 0 without a reference, or are fewer than 2.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> kernel = replica_exchange((1.0, 0.3, 0.1), inner=ebm.kernels.mala(step_size=0.05), step_size_power=1.0)
        >>> sampler = ebm.init_sampler(jnp.ones(64), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 4.0 * (x**2 - 1.0) ** 2, sampler, 500)
        >>> bool(abs((sampler.position > 0).mean() - 0.5) < 0.25), sampler.auxiliary.replicas.shape
        (True, (64, 2))

    References:
        Geyer (1991), Markov chain Monte Carlo maximum likelihood; Syed, Bouchard-Côté, Deligiannidis, Doucet (2019),
        Non-reversible parallel tempering: a scalable highly parallel MCMC scheme, arXiv:1905.02939.
    """
    check_markov_kernel("inner", inner)
    ladder = check_ladder(inverse_temperatures, has_reference=reference is not None)
    if reference is not None:
        check_proposal("reference", reference)
    factors = (
        jnp.ones_like(ladder)
        if step_size_factors is None
        else check_positive("step_size_factors", as_floats("step_size_factors", step_size_factors))
    )
    if factors.shape != ladder.shape:
        raise ValueError(f"step_size_factors: got shape {factors.shape}, expected one per rung, {ladder.shape}.")
    return Partial(
        _ReplicaExchange(check_count("num_steps", num_steps)),
        inverse_temperatures=ladder,
        inner=inner,
        reference=None if reference is None else as_tunable(reference),
        step_size_power=check_real("step_size_power", step_size_power).astype(ladder.dtype),
        step_size_factors=factors.astype(ladder.dtype),
    )


def check_ladder(inverse_temperatures: Any, *, has_reference: bool) -> Array:
    """Inverse temperatures that fall from 1, as a floating array.

    Raises:
        TypeError: they are not numbers.
        ValueError: they do not, or there are fewer than two.
    """
    ladder = as_floats("inverse_temperatures", inverse_temperatures)
    if ladder.ndim != 1 or ladder.shape[0] < 2:
        raise ValueError(f"inverse_temperatures: got shape {ladder.shape}, expected (rung,) with at least 2 rungs.")
    if is_traced(ladder):
        return ladder
    if float(ladder[0]) != 1.0 or not bool(jnp.all(jnp.diff(ladder) < 0)) or not float(ladder[-1]) >= 0.0:
        raise ValueError(f"inverse_temperatures: got {ladder.tolist()}, expected numbers that fall from 1 to >= 0.")
    if float(ladder[-1]) == 0.0 and not has_reference:
        raise ValueError(
            "inverse_temperatures: got 0 without a reference, where the law is improper. Pass reference=..., or end the "
            "ladder above 0."
        )
    return ladder


@dataclass(frozen=True)
class _ReplicaExchange:
    """The static half of the kernel."""

    num_steps: int

    def check_tunables(self, tunables: dict[str, Any]) -> None:
        """The ladder must be one, with as many rungs as there were."""
        ladder = check_ladder(tunables["inverse_temperatures"], has_reference=tunables["reference"] is not None)
        if ladder.shape != tunables["step_size_factors"].shape:
            raise ValueError(
                f"inverse_temperatures: got {ladder.shape[0]} rungs, expected {tunables['step_size_factors'].shape[0]}, "
                "the replicas that the chains carry. Make another kernel for another number of them."
            )

    def start_auxiliary(self, position: PyTree, *, inverse_temperatures: Array, **tunables: Any) -> Ladder:
        """Replicas where their chain is."""
        num_chains, num_rungs = jax.tree.leaves(position)[0].shape[0], inverse_temperatures.shape[0]
        return Ladder(
            replicas=jax.tree.map(lambda x: jnp.repeat(x[:, None], num_rungs - 1, axis=1), position),
            label=jnp.tile(jnp.arange(num_rungs), (num_chains, 1)),
            heading=jnp.zeros((num_chains, num_rungs), jnp.int32),
            round_trips=jnp.zeros(num_chains, jnp.int32),
            parity=jnp.zeros(num_chains, jnp.int32),
        )

    def __call__(
        self,
        potential: Potential,
        *,
        inverse_temperatures: Array,
        inner: Kernel,
        reference: Any,
        step_size_power: Array,
        step_size_factors: Array,
    ) -> SamplingAlgorithm:
        rungs = Rungs(potential, inner, reference, inverse_temperatures, step_size_power, step_size_factors)

        def init(position: PyTree, rng_key: Any, auxiliary: Any = None) -> Any:
            if auxiliary is None:
                auxiliary = self.start_auxiliary(position, inverse_temperatures=inverse_temperatures)
            replicas = jax.tree.map(
                lambda cold, warm: jnp.concatenate([cold[None], jnp.swapaxes(warm, 0, 1)]), position, auxiliary.replicas
            )
            return ReplicaExchangeState(position, auxiliary, rungs.init(rng_key, replicas))

        def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
            move_key, hot_key, swap_key, init_key = jax.random.split(rng_key, 4)
            inner_state, info = rungs.move(move_key, state.inner, self.num_steps)
            inner_state, parts = rungs.parts(hot_key, inner_state)
            order, rates, ladder = _trade(swap_key, parts.energy, inverse_temperatures, state.auxiliary)
            inner_state = rungs.reorder(init_key, inner_state, order, parts)
            replicas = inner_state.position
            num_gradients = info.num_gradients.sum(axis=0)
            uses_gradients = num_gradients > 0
            extra = rungs.num_evaluations(state.inner)
            new = ReplicaExchangeState(
                jax.tree.map(lambda x: x[0], replicas),
                ladder._replace(replicas=jax.tree.map(lambda x: jnp.swapaxes(x[1:], 0, 1), replicas)),
                inner_state,
            )
            return new, step_info(
                rates.shape[1],
                acceptance_rate=info.acceptance_rate[0],
                is_divergent=info.is_divergent[0],
                num_gradients=num_gradients + extra * uses_gradients,
                num_energies=info.num_energies.sum(axis=0) + extra * ~uses_gradients,
                num_nonfinite=info.num_nonfinite.sum(axis=0),
                swap_rate_minimum=rates.min(axis=0),
                round_trips=ladder.round_trips - state.auxiliary.round_trips,
                **{f"swap_rate_{pair}": rate for pair, rate in enumerate(rates)},
            )

        return SamplingAlgorithm(init, step)


def _trade(key: Key, energy: Array, inverse_temperatures: Array, ladder: Ladder) -> tuple[Array, Array, Ladder]:
    """Swaps of neighbouring rungs: where each rung's replica comes from, ``(rung, chain)``, and every pair's rate."""
    num_rungs, num_chains = energy.shape
    log_ratio = -jnp.diff(inverse_temperatures)[:, None] * (energy[:-1] - energy[1:])
    # Infinite minus infinite says nothing, and swaps nothing.
    rates = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio), 0.0))
    pair = jnp.arange(num_rungs - 1)[:, None]
    is_turn = pair % 2 == ladder.parity % 2
    swaps = is_turn & (jax.random.uniform(key, rates.shape, rates.dtype) < rates)
    no = jnp.zeros((1, num_chains), bool)
    # A rung takes from above, from below, or keeps: pairs of one turn do not overlap.
    order = jnp.arange(num_rungs)[:, None] + jnp.concatenate([swaps, no]) - jnp.concatenate([no, swaps]).astype(int)

    def reorder(x: Array) -> Array:
        return jnp.take_along_axis(x, order.T, axis=1)

    heading = reorder(ladder.heading)
    returned = heading[:, 0] == _FROM_HOT
    heading = heading.at[:, 0].set(_FROM_COLD)
    heading = heading.at[:, -1].set(jnp.where(heading[:, -1] == _UNSEEN, _UNSEEN, _FROM_HOT))
    return (
        order,
        rates,
        ladder._replace(
            label=reorder(ladder.label),
            heading=heading,
            round_trips=ladder.round_trips + returned,
            parity=(ladder.parity + 1) % 2,
        ),
    )
