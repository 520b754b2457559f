"""Tuning a kernel between phases: functions ``SamplerState -> SamplerState``, never steps inside a kernel.

A kernel with frozen tunables is a valid Markov kernel and is tested as one; a kernel that adapts while it runs is not.
"""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import dual_averaging_adaptation
from jax.tree_util import Partial

from ebm_ppl.checks import check_count, check_finite_energy, check_one, check_positive, is_traced
from ebm_ppl.partials import function_behind
from ebm_ppl.proposals import TakenApart, hold
from ebm_ppl.sampling import advance, check_sampler
from ebm_ppl.types import Array, CheckedTunables, Key, Potential, SamplerState


def tunables(sampler: SamplerState) -> dict[str, Any]:
    """The tunables of the sampler's kernel, by name: step size, mass matrix, and so on.

    Example:
        >>> import jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> float(tunables(sampler)["step_size"])
        0.5
    """
    return dict(sampler.kernel.keywords) if isinstance(sampler.kernel, Partial) else {}


def set_tunables(sampler: SamplerState, /, **changes: Any) -> SamplerState:
    """The same chains with other tunables; nothing recompiles while shapes and dtypes stay.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the kernel has no tunable of that name, a concrete step size is not finite and positive, or the
            kernel itself refuses the value.

    Example:
        >>> import jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> float(tunables(set_tunables(sampler, step_size=0.25))["step_size"])
        0.25
    """
    current = tunables(sampler)
    unknown = sorted(set(changes) - set(current))
    if unknown:
        raise ValueError(f"{unknown[0]}: this kernel has no such tunable; expected one of {sorted(current)}.")
    for name in changes:
        # A part of a composition has its own: local_step_size, kernel_0_step_size.
        if name.endswith("step_size"):
            changes[name] = check_positive(name, changes[name])
    func = function_behind(sampler.kernel)
    if isinstance(func, CheckedTunables):
        func.check_tunables({**current, **changes})
    # Keep the old leaf's dtype: a Python float or an x64 scalar would otherwise change the compiled signature.
    new = {
        # Of what is held taken apart not even two equal structures need compare equal.
        name: hold(value)
        if isinstance(current[name], TakenApart)
        else jax.tree.map(
            lambda old, value: jnp.asarray(value, old.dtype) if eqx.is_array(old) else value, current[name], value
        )
        for name, value in changes.items()
    }
    kernel = Partial(sampler.kernel.func, *sampler.kernel.args, **{**current, **new})
    return sampler._replace(kernel=kernel)


def tune_step_size(
    key: Key,
    potential: Potential,
    sampler: SamplerState,
    target_acceptance: float = 0.6,
    *,
    num_iterations: int = 100,
    num_steps: int = 1,
) -> SamplerState:
    """Tune the step size to a target acceptance rate, by BlackJAX's dual averaging and a refinement, then freeze it.

    The acceptance rate of each iteration is averaged over all chains and ``num_steps`` steps, so a population needs few
    iterations. The chains move on while tuning; run the returned sampler before trusting its draws.

    Args:
        key: Random key.
        potential: Energy of one event, base included.
        sampler: Chains whose kernel has a ``step_size``.
        target_acceptance: In (0, 1). Optimal in high dimension: .57 for MALA, .65 for HMC; .8 is usual for NUTS.
        num_iterations: Half of them dual averaging, half refinement with a decreasing gain.
        num_steps: Kernel steps per iteration.

    Returns:
        The moved sampler with its tuned, frozen step size.

    Raises:
        ValueError: ``target_acceptance`` is outside (0, 1), or the kernel has no step size or no accept step.
        TypeError: a count is not a whole number.
        NonFiniteEnergyError: the energy is not finite at the chains.

    Warns:
        RuntimeWarning: the acceptance reached is more than .2 from the target, as it is on a flat energy.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((256, 2)), ebm.kernels.mala(step_size=0.01))
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> sampler = tune_step_size(jax.random.key(0), energy, sampler, target_acceptance=0.7)
        >>> _, info = ebm.advance(jax.random.key(1), energy, sampler, 50)
        >>> bool(abs(info.acceptance_rate.mean() - 0.7) < 0.05)
        True

    References:
        Nesterov (2009), Primal-dual subgradient methods; Hoffman, Gelman (2014), arXiv:1111.4246, section 3.2.
    """
    check_target_acceptance("target_acceptance", target_acceptance)
    num_iterations, num_steps = check_count("num_iterations", num_iterations), check_count("num_steps", num_steps)
    check_sampler(potential, sampler)
    check_tunable_step(sampler)
    check_finite_energy("sampler", potential, sampler.position, what="chain")
    tuned, acceptance = _tune(key, potential, sampler, target_acceptance, num_iterations, num_steps)
    if not is_traced(acceptance) and bool(jnp.isnan(acceptance)):
        raise ValueError(
            "sampler: the acceptance rate is NaN, expected a kernel with an accept step and a finite energy. "
            "An unadjusted kernel has nothing to tune against; choose its step size by its bias."
        )
    if not is_traced(acceptance) and abs(float(acceptance) - target_acceptance) > 0.2:
        warnings.warn(
            f"tune_step_size: the acceptance rate reached is {float(acceptance):.3f}, far from the target "
            f"{target_acceptance}. Use more iterations, or more chains; a flat energy has acceptance 1 at any step size.",
            RuntimeWarning,
            stacklevel=2,
        )
    return tuned


def check_target_acceptance(name: str, value: float) -> None:
    """A number strictly between 0 and 1.

    Raises:
        TypeError: it is not a real number.
        ValueError: otherwise.
    """
    check_one(name, value, lambda x: (x > 0.0) & (x < 1.0), "a rate strictly between 0 and 1")


def check_tunable_step(sampler: SamplerState) -> None:
    """The kernel must have one scalar step size.

    Raises:
        ValueError: it has none.
    """
    step_size = tunables(sampler).get("step_size")
    if step_size is None or jnp.ndim(step_size) != 0:
        raise ValueError(
            f"sampler: its kernel has tunables {sorted(tunables(sampler))}, expected a scalar 'step_size' to tune."
        )


@eqx.filter_jit
def _tune(
    key: Key, potential: Potential, sampler: SamplerState, target: float, num_iterations: int, num_steps: int
) -> tuple[SamplerState, Array]:
    init, update, final = dual_averaging_adaptation(target)

    def coarse(carry: tuple[SamplerState, Any], step_key: Key) -> tuple[tuple[SamplerState, Any], None]:
        sampler, state = carry
        sampler = set_tunables(sampler, step_size=jnp.exp(state.log_step_size))
        sampler, info = advance(step_key, potential, sampler, num_steps)
        new_state = update(state, info.acceptance_rate.mean())
        return (sampler, jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)), None

    def fine(sampler: SamplerState, inputs: tuple[Key, Array]) -> tuple[SamplerState, Array]:
        step_key, gain = inputs
        sampler, info = advance(step_key, potential, sampler, num_steps)
        acceptance = info.acceptance_rate.mean()
        return follow_target_acceptance(sampler, acceptance, target, gain=gain), acceptance

    # Dual averaging finds the scale from anywhere, but its average remembers the way there; where acceptance falls
    # steeply, as HMC's does near instability, a decreasing gain from its answer settles on the target.
    length = -(-num_iterations // 2)
    keys = jax.random.split(key, 2 * length)
    start = jax.tree.map(jnp.asarray, init(tunables(sampler)["step_size"]))
    (sampler, state), _ = jax.lax.scan(coarse, (sampler, start), keys[:length])
    sampler = set_tunables(sampler, step_size=final(state))
    gains = 0.5 / jnp.sqrt(1.0 + jnp.arange(length))
    sampler, acceptance = jax.lax.scan(fine, sampler, (keys[length:], gains))
    return sampler, acceptance[-1]


def follow_target_acceptance(
    sampler: SamplerState, acceptance_rate: Array, target_acceptance: float, *, gain: float | Array = 0.3
) -> SamplerState:
    """One Robbins-Monro move of the step size, ``log eps += gain (acceptance - target)``, for a moving energy.

    Called between the negative phases of training, where the energy changes slowly and dual averaging's vanishing gain
    would stop following it. The step stays constant within each phase.

    Example:
        >>> import jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> sampler = follow_target_acceptance(sampler, jnp.array(0.9), 0.6)
        >>> bool(tunables(sampler)["step_size"] > 0.5)
        True
    """
    step_size = tunables(sampler)["step_size"]
    return set_tunables(sampler, step_size=step_size * jnp.exp(gain * (acceptance_rate - target_acceptance)))
