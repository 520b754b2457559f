"""One chain of a sampler, composed of BlackJAX's own parts where BlackJAX's entry point hides what must be reported.

Each function here is ``(logdensity_fn, **parameters) -> SamplingAlgorithm`` with the law of the BlackJAX sampler of that
name, and an info that is a :class:`Report`. :func:`read_report` makes one of any other BlackJAX info.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from blackjax.mcmc import integrators, metrics
from blackjax.mcmc.mala import MALAState
from blackjax.mcmc.proposal import compute_asymmetric_acceptance_ratio, static_binomial_sampling
from blackjax.mcmc.random_walk import RWState, build_rmh_transition_energy, normal, rmh_proposal
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from ebm_ppl.densities import LogDensity
from ebm_ppl.types import Array, Event, Key


class Report(NamedTuple):
    """What one step of one chain tells. A sampler of a user's own may return it as its info.

    Attributes:
        acceptance_rate: NaN where there is no accept step.
        is_divergent: Whether the step failed numerically.
        num_gradients: Evaluations of the energy with its gradient.
        num_energies: Evaluations of the energy alone.
        num_nonfinite: Proposals with a NaN or infinite energy.
        hamiltonian: Total energy of the state that the chain went to, with the momentum that it came with; NaN where that
            cannot be known, ``None`` of samplers without momenta.
    """

    acceptance_rate: ArrayLike = jnp.nan
    is_divergent: ArrayLike = False
    num_gradients: ArrayLike = 0
    num_energies: ArrayLike = 0
    num_nonfinite: ArrayLike = 0
    hamiltonian: ArrayLike | None = None


def read_report(state: Any, info: Any) -> Report:
    """The numbers of one step, found by the names that BlackJAX gives them."""
    if isinstance(info, Report):
        report = info
    else:
        fields = info._asdict()
        uses_gradients = "logdensity_grad" in state._asdict()
        report = Report(
            acceptance_rate=fields.get("acceptance_rate", jnp.nan),
            is_divergent=fields.get("is_divergent", False),
            num_gradients=fields.get("num_integration_steps", 1) if uses_gradients else 0,
            num_energies=0 if uses_gradients else fields.get("num_shrink", 1),
            num_nonfinite=_count_nonfinite(fields),
            hamiltonian=_hamiltonian(fields),
        )
        if "acceptance_rate" in fields:
            # A ratio that cannot be computed rejects: its probability of acceptance is 0, not unknown.
            rate = jnp.asarray(report.acceptance_rate)
            report = report._replace(acceptance_rate=jnp.where(jnp.isnan(rate), 0.0, rate))
    return report._replace(is_divergent=jnp.asarray(report.is_divergent) | ~_is_sound(state))


def _count_nonfinite(fields: dict[str, Any]) -> ArrayLike:
    """What can be known. Slices and multinomial trajectories discard bad points without a trace."""
    if "nonans" in fields:  # MCLMC, which stays where it is
        return ~fields["nonans"]
    if "trajectory_leftmost_state" in fields:  # NUTS, whose trajectory ends at the point that stopped it
        ends = fields["trajectory_leftmost_state"], fields["trajectory_rightmost_state"]
        return is_nonfinite(ends[0].logdensity) | is_nonfinite(ends[1].logdensity)
    if hasattr(fields.get("proposal"), "logdensity"):
        return is_nonfinite(fields["proposal"].logdensity)
    if "tuning_parameter" in fields:  # GIST, which gives the total energy of the proposal
        return is_nonfinite(fields["energy"])
    return 0


def _hamiltonian(fields: dict[str, Any]) -> Array | None:
    """Total energy of the state that the chain went to, where the info of a step has it.

    NUTS gives that of its draw. HMC gives that of the proposal, rejected or not; a rejected one has the higher energy, by
    minus the logarithm of its acceptance rate. What an impossible proposal, of rate zero, was held against is unknown.
    """
    if "energy" not in fields or "tuning_parameter" in fields:  # GIST's acceptance rate is not that of the energy alone
        return None
    energy, proposal = jnp.asarray(fields["energy"]), fields.get("proposal")
    if "is_accepted" not in fields:
        return energy
    if not hasattr(proposal, "momentum") or "acceptance_rate" not in fields:
        return None
    rate = jnp.asarray(fields["acceptance_rate"])
    before = jnp.where(rate > 0, energy + jnp.log(jnp.where(rate > 0, rate, 1.0)), jnp.nan)
    return jnp.where(jnp.asarray(fields["is_accepted"]), energy, before)


def is_nonfinite(logdensity: Any) -> Array:
    """0 or 1."""
    return (~jnp.isfinite(logdensity)).astype(jnp.int32)


def _is_sound(state: Any) -> Array:
    """Whether a chain can go on: a finite position and gradient, and an energy that is a number."""
    fields = state._asdict()
    leaves = jax.tree.leaves((state.position, fields.get("logdensity_grad")))
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]).all() & ~jnp.isnan(fields.get("logdensity", 0.0))


class DrivenAlgorithm(NamedTuple):
    """A sampler of one chain whose steps are a function of noise, so that a population can draw that of all chains at once.

    Keys of their own for every chain cost several times what the noise costs, next to a small network as much as a fifth of
    its gradient. ``init`` and ``step`` are those of any sampler.

    Attributes:
        init: As BlackJAX's.
        step: As BlackJAX's, ``move`` with noise drawn from the key of one chain.
        draw_noise: ``(rng_key, shape, size)``, noise with leading axes ``shape`` for events of ``size`` numbers.
        move: ``(noise, state)`` of one chain to ``(state, report)``.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    draw_noise: Callable[[Key, tuple[int, ...], int], Any]
    move: Callable[[Any, Any], tuple[Any, Report]]


def event_size(event: Event) -> int:
    """Numbers of one event."""
    return sum(leaf.size for leaf in jax.tree.leaves(event))


def mala(logdensity_fn: LogDensity, step_size: Any) -> DrivenAlgorithm:
    """``blackjax.mala``, draw for draw; its info shows the proposal's energy, which BlackJAX's does not."""

    def transition_energy(state: Any, new: Any) -> Array:
        """``-log p(new) - log q(state | new)``, up to a constant."""
        missed = jax.tree.map(
            lambda x, new_x, gradient: jnp.sum((x - new_x - step_size * gradient) ** 2),
            state.position,
            new.position,
            new.logdensity_grad,
        )
        return -new.logdensity + 0.25 * (1.0 / step_size) * sum(jax.tree.leaves(missed))

    log_acceptance_ratio = compute_asymmetric_acceptance_ratio(transition_energy)

    def init(position: Event, rng_key: Key | None = None) -> Any:
        return MALAState(position, *jax.value_and_grad(logdensity_fn)(position))

    def draw_noise(rng_key: Key, shape: tuple[int, ...], size: int) -> tuple[Array, Array]:
        propose_key, accept_key = jax.random.split(rng_key)
        return jax.random.normal(propose_key, (*shape, size)), jax.random.uniform(accept_key, shape)

    def move(noise: Any, state: Any) -> tuple[Any, Report]:
        unravel = ravel_pytree(state.position)[1]
        position = jax.tree.map(
            lambda x, gradient, xi: x + step_size * gradient + jnp.sqrt(2 * step_size) * xi,
            state.position,
            state.logdensity_grad,
            unravel(noise[0].astype(jnp.result_type(*jax.tree.leaves(state.position)))),
        )
        proposal = init(position)
        acceptance_rate = jnp.clip(jnp.exp(log_acceptance_ratio(state, proposal)), max=1)
        new_state = jax.lax.cond(noise[1] < acceptance_rate, lambda: proposal, lambda: state)
        return new_state, Report(acceptance_rate, num_gradients=1, num_nonfinite=is_nonfinite(proposal.logdensity))

    def step(rng_key: Key, state: Any) -> tuple[Any, Report]:
        return move(draw_noise(rng_key, (), event_size(state.position)), state)

    return DrivenAlgorithm(init, step, draw_noise, move)


def rmh(
    logdensity_fn: LogDensity, proposal_generator: Callable, proposal_logdensity_fn: Callable | None = None
) -> SamplingAlgorithm:
    """``blackjax.rmh``, draw for draw; the ``proposal`` in BlackJAX's info is where the chain went, not the proposal."""

    def sample_and_tell(key: Key, log_ratio: Any, state: Any, proposal: Any) -> tuple[Any, Any]:
        new_state, (accepted, acceptance_rate, _) = static_binomial_sampling(key, log_ratio, state, proposal)
        return new_state, (accepted, (acceptance_rate, is_nonfinite(proposal.logdensity)), None)

    ratio = compute_asymmetric_acceptance_ratio(build_rmh_transition_energy(proposal_logdensity_fn))
    move = rmh_proposal(logdensity_fn, proposal_generator, ratio, sample_and_tell)

    def init(position: Event, rng_key: Key | None = None) -> Any:
        logdensity: Any = logdensity_fn(position)
        return RWState(position, logdensity)

    def step(rng_key: Key, state: Any) -> tuple[Any, Report]:
        told: Any
        state, _, told = move(rng_key, state)
        return state, Report(told[0], num_energies=1, num_nonfinite=told[1])

    return SamplingAlgorithm(init, step)


def irmh(
    logdensity_fn: LogDensity, proposal_distribution: Callable, proposal_logdensity_fn: Callable
) -> SamplingAlgorithm:
    """``blackjax.irmh`` with a density, draw for draw."""
    return rmh(logdensity_fn, lambda key, _: proposal_distribution(key), proposal_logdensity_fn)


def additive_step_random_walk(logdensity_fn: LogDensity, random_step: Callable) -> SamplingAlgorithm:
    """``blackjax.additive_step_random_walk``, draw for draw."""
    return rmh(logdensity_fn, lambda key, position: jax.tree.map(jnp.add, position, random_step(key, position)))


def random_walk(logdensity_fn: LogDensity, sigma: Any) -> SamplingAlgorithm:
    """``blackjax.additive_step_random_walk.normal_random_walk``, draw for draw."""
    return additive_step_random_walk(logdensity_fn, normal(sigma))


def hmc(logdensity_fn: LogDensity, step_size: Any, inverse_mass_matrix: Any, **parameters: Any) -> SamplingAlgorithm:
    """``blackjax.hmc``, draw for draw; the Hamiltonian is known after impossible proposals too."""
    build: Any = blackjax.hmc.differentiable
    algorithm = build(logdensity_fn, step_size, inverse_mass_matrix, **parameters)
    kinetic_energy = metrics.default_metric(inverse_mass_matrix).kinetic_energy

    def step(rng_key: Key, state: Any) -> tuple[Any, Report]:
        new_state, info = algorithm.step(rng_key, state)
        report = read_report(new_state, info)
        at_start = kinetic_energy(info.momentum) - state.logdensity
        is_impossible = ~info.is_accepted & ~(info.acceptance_rate > 0)
        told: Any = report.hamiltonian
        return new_state, report._replace(hamiltonian=jnp.where(is_impossible, at_start, told))

    return SamplingAlgorithm(algorithm.init, step)


def ghmc(
    logdensity_fn: LogDensity, step_size: Any, momentum_inverse_scale: Any, **parameters: Any
) -> SamplingAlgorithm:
    """``blackjax.ghmc``, but its momenta start with the scale that they have later.

    It reports no Hamiltonian: momenta that are kept in part change the energy little from step to step on any target, and
    E-BFMI would find heavy tails everywhere.

    BlackJAX draws the first momentum with scale 1 whatever ``momentum_inverse_scale`` says; chains that start anew every
    phase would never forget it.
    """
    build: Any = blackjax.ghmc.differentiable
    algorithm = build(logdensity_fn, step_size, momentum_inverse_scale, **parameters)

    def init(position: Event, rng_key: Any) -> Any:
        state = algorithm.init(position, rng_key)
        is_matrix = jnp.ndim(momentum_inverse_scale) >= 2 if isinstance(momentum_inverse_scale, jax.Array) else False
        matrix = momentum_inverse_scale if is_matrix else ravel_pytree(momentum_inverse_scale)[0] ** 2
        momentum = metrics.default_metric(matrix).sample_momentum(jax.random.fold_in(rng_key, 0), position)
        return state._replace(momentum=momentum)

    def step(rng_key: Key, state: Any) -> tuple[Any, Report]:
        state, info = algorithm.step(rng_key, state)
        return state, read_report(state, info)._replace(hamiltonian=None)

    return SamplingAlgorithm(init, step)


# Palindromic splittings: one gradient for each of their moves of the position.
_GRADIENTS: dict[Callable, int] = {
    integrators.isokinetic_velocity_verlet: 1,
    integrators.isokinetic_mclachlan: 2,
    integrators.isokinetic_yoshida: 3,
    integrators.isokinetic_omelyan: 5,
}


def _microcanonical(build: Callable[..., SamplingAlgorithm]) -> Callable[..., SamplingAlgorithm]:
    """The BlackJAX sampler, refusing what it divides by zero on, and with every gradient of its integrator counted."""

    def algorithm(
        logdensity_fn: LogDensity, *, integrator: Callable = integrators.isokinetic_mclachlan, **parameters: Any
    ) -> SamplingAlgorithm:
        """The BlackJAX sampler of that name, refused on the line, with every gradient of its integrator counted."""
        inner: Any = build(logdensity_fn, integrator=integrator, **parameters)

        def init(position: Event, rng_key: Key | None = None) -> Any:
            size = event_size(position)
            if size < 2:
                raise ValueError(
                    f"position: got events of {size} number, expected at least 2: microcanonical dynamics turn a velocity "
                    "of fixed length. Use kernels.hmc on the line."
                )
            return inner.init(position, rng_key)

        def step(rng_key: Key, state: Any) -> tuple[Any, Report]:
            state, info = inner.step(rng_key, state)
            report = read_report(state, info)
            # Velocities of fixed length have no kinetic energy: what BlackJAX calls the energy is that of the position.
            return state, report._replace(
                num_gradients=jnp.asarray(report.num_gradients) * _GRADIENTS.get(integrator, 1), hamiltonian=None
            )

        return SamplingAlgorithm(init, step)

    return algorithm


mclmc = _microcanonical(blackjax.mclmc.differentiable)
adjusted_mclmc = _microcanonical(blackjax.adjusted_mclmc.differentiable)
adjusted_mclmc_dynamic = _microcanonical(blackjax.adjusted_mclmc_dynamic.differentiable)

COMPOSED: dict[Callable, Callable[..., SamplingAlgorithm | DrivenAlgorithm]] = {
    blackjax.mala.differentiable: mala,
    blackjax.rmh.differentiable: rmh,
    blackjax.irmh.differentiable: irmh,
    blackjax.additive_step_random_walk.differentiable: additive_step_random_walk,
    blackjax.hmc.differentiable: hmc,
    blackjax.ghmc.differentiable: ghmc,
    blackjax.mclmc.differentiable: mclmc,
    blackjax.adjusted_mclmc.differentiable: adjusted_mclmc,
    blackjax.adjusted_mclmc_dynamic.differentiable: adjusted_mclmc_dynamic,
}
"""What stands in for which BlackJAX sampler when it is lifted."""
