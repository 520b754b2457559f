"""Running a kernel: sampler states, the negative phase, and traces.

A :class:`~ebm_ppl.types.SamplerState` holds positions only. Every call here builds the kernel's own state afresh from
them, at the cost of one gradient, because a log density cached before a parameter update is a lie after it.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import as_array, check_count, check_key, check_potential, is_traced
from ebm_ppl.info import count_start, run_steps
from ebm_ppl.partials import as_constants, function_behind, tunables_of
from ebm_ppl.types import (
    Array,
    AuxiliaryKernel,
    ConfinedKernel,
    DiscreteKernel,
    Info,
    Kernel,
    Key,
    PhaseKernel,
    Potential,
    PyTree,
    SamplerState,
    TemperedKernel,
    WeightedPopulation,
)


class Draws(NamedTuple):
    """A trace of a population: what :func:`draw` returns and ``diagnostics.to_datatree`` reads.

    Attributes:
        position: ``(chain, draw, *event)``.
        potential: Energy of each draw under the sampled potential (base included), ``(chain, draw)``.
        acceptance_rate: Mean acceptance since the previous draw, ``(chain, draw)``; NaN without an accept step.
        is_divergent: Whether any step since the previous draw failed numerically, ``(chain, draw)``.
        num_gradients: Gradient evaluations since the previous draw, ``(chain, draw)``.
        log_weight: Log importance weights, ``(chain, draw)``; zeros for unweighted kernels. Only those of one draw can be
            compared with each other.
        num_energies: Evaluations of the energy alone since the previous draw, ``(chain, draw)``.
        num_nonfinite: Proposals with a non-finite energy since the previous draw, ``(chain, draw)``.
        statistics: The kernel's own numbers by name, ``(chain, draw)`` each.
    """

    position: PyTree
    potential: Array
    acceptance_rate: Array
    is_divergent: Array
    num_gradients: Array
    log_weight: Array
    num_energies: Array
    num_nonfinite: Array
    statistics: dict[str, Array]


def init_sampler(position: PyTree, kernel: Kernel) -> SamplerState:
    """A sampler state from starting positions.

    Args:
        position: Floating positions ``(chain, *event)`` (or a pytree of such arrays), finite, at least one chain; integers
            too for a discrete kernel such as ``ebm.kernels.gibbs()``.
        kernel: From :mod:`ebm_ppl.kernels`.

    Returns:
        A state with zero log weights.

    Raises:
        TypeError: integer (for a gradient kernel), complex or 16-bit floating positions, or a kernel that is not callable.
        ValueError: zero chains, differing numbers of chains, or non-finite positions (with the first chain).

    Example:
        >>> import jax.numpy as jnp, ebm_ppl as ebm
        >>> ebm.init_sampler(jnp.zeros((16, 2)), ebm.kernels.mala(step_size=0.1)).num_chains
        16
    """
    if not callable(kernel):
        raise TypeError(
            f"kernel: got {type(kernel).__name__}, expected a kernel such as ebm.kernels.mala(step_size=0.1)."
        )
    position = jax.tree.map(lambda x: as_array("position", x), position)
    leaves = jax.tree.leaves(position)
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError("position: got no leading chain axis, expected arrays of shape (chain, *event).")
    counts = {leaf.shape[0] for leaf in leaves}
    if counts == {0}:
        raise ValueError("position: got zero chains, expected at least one.")
    if len(counts) > 1:
        raise ValueError(f"position: got leaves with {sorted(counts)} chains, expected one number of chains.")
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.integer) and is_discrete_kernel(kernel):
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"position: got dtype {leaf.dtype}, expected floating positions for a gradient kernel. Discrete kernels "
                "move integers: ebm.kernels.gibbs, gibbs_with_gradients and discrete_langevin."
            )
        if leaf.dtype.itemsize < 4:
            raise TypeError(f"position: got dtype {leaf.dtype}, expected float32 or float64; accept steps need them.")
        if not is_traced(leaf):
            bad = ~jnp.isfinite(leaf.reshape(leaf.shape[0], -1)).all(axis=1)
            if bad.any():
                raise ValueError(
                    f"position: got {int(bad.sum())} of {leaf.shape[0]} chains with NaN or infinite coordinates, the "
                    f"first at index {int(jnp.argmax(bad))}; expected finite positions."
                )
    func = function_behind(kernel)
    if isinstance(func, ConfinedKernel):
        func.check_space(None, position)
    return chains_at(position, kernel)


def chains_at(position: PyTree, kernel: Kernel) -> SamplerState:
    """:func:`init_sampler` without its checks: chains at ``position`` with zero log weights and fresh auxiliaries."""
    leaves = jax.tree.leaves(position)
    dtype = jnp.promote_types(
        jnp.result_type(*leaves), jnp.float32
    )  # weights are floating also where positions are not
    num_chains = leaves[0].shape[0]
    return SamplerState(
        position,
        jnp.zeros(num_chains, dtype),
        kernel,
        fresh_auxiliary(position, kernel),
        jnp.zeros(num_chains, jnp.int32),
    )


def is_discrete_kernel(kernel: Kernel) -> bool:
    """Whether a kernel moves on finitely many values, see :class:`~ebm_ppl.types.DiscreteKernel`."""
    return isinstance(function_behind(kernel), DiscreteKernel)


def temperature_of(sampler: SamplerState) -> Array | None:
    """The temperature at which the sampler's kernel samples, where its tunables imply one; ``None`` for all others.

    Example:
        >>> import jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.langevin(step_size=0.125, noise_scale=0.05))
        >>> round(float(temperature_of(sampler)), 4)
        0.01
    """
    func = function_behind(sampler.kernel)
    if not isinstance(func, TemperedKernel):
        return None
    return func.temperature(**tunables_of(sampler.kernel))


def fresh_auxiliary(position: PyTree, kernel: Kernel) -> PyTree:
    """What else chains that start at ``position`` carry; ``None`` for most kernels."""
    func = function_behind(kernel)
    if not isinstance(func, AuxiliaryKernel):
        return None
    return func.start_auxiliary(position, **tunables_of(kernel))


def advance(key: Key, potential: Potential, sampler: SamplerState, num_steps: int) -> tuple[SamplerState, Info]:
    """The negative phase: move every chain ``num_steps`` kernel steps under the current potential, keeping no trace.

    Memory does not grow with ``num_steps``, and no gradient flows through the chains.

    Args:
        key: Random key.
        potential: Energy of one event, base included (see :func:`ebm_ppl.potentials.tilt`).
        sampler: The chains and their kernel.
        num_steps: Kernel steps (k), at least one.

    Returns:
        The moved sampler and an :class:`~ebm_ppl.types.Info` of ``(chain,)`` arrays: acceptance averaged over the steps,
        whether any step diverged, and gradients in total (with that of the fresh start, where the kernel makes one).

    Raises:
        TypeError: ``num_steps`` is not a whole number, ``key`` is no random key, the energy is not a real floating scalar,
            or the sampler's kernel gives no ``(init, step)`` pair.
        ValueError: ``num_steps < 1``, or the energy does not fit one event of these chains.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> sampler, info = advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 20)
        >>> int(info.num_gradients[0])
        21
    """
    num_steps = check_count("num_steps", num_steps)
    check_sampler(potential, sampler)
    if not is_traced(key):
        check_key("key", key)
    run = _advance if is_traced(key, potential, sampler) else _compiled_advance
    return run(key, potential, sampler, num_steps)


def draw(
    key: Key, potential: Potential, sampler: SamplerState, num_draws: int, *, num_steps: int = 1
) -> tuple[SamplerState, Draws]:
    """Run the chains and keep the trace.

    Args:
        key: Random key.
        potential: Energy of one event, base included.
        sampler: The chains and their kernel.
        num_draws: Draws to keep per chain.
        num_steps: Kernel steps between draws (thinning).

    Returns:
        The moved sampler and the :class:`Draws`.

    Raises:
        TypeError: a count is not a whole number, ``key`` is no random key, the energy is not a real floating scalar, or the
            sampler's kernel gives no ``(init, step)`` pair.
        ValueError: a count is below one, or the energy does not fit one event of these chains.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> sampler, draws = draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 50)
        >>> draws.position.shape, draws.potential.shape
        ((4, 50, 2), (4, 50))
    """
    num_draws, num_steps = check_count("num_draws", num_draws), check_count("num_steps", num_steps)
    check_sampler(potential, sampler)
    if not is_traced(key):
        check_key("key", key)
    run = _draw if is_traced(key, potential, sampler) else _compiled_draw
    return run(key, potential, sampler, num_draws, num_steps)


def check_sampler(potential: Potential, sampler: SamplerState) -> None:
    """The energy must give a real floating scalar for one event of these chains, and discrete chains be in its coding.

    Raises:
        TypeError: ``sampler`` is not a :class:`~ebm_ppl.types.SamplerState`, or the energy is not real floating.
        ValueError: the energy does not fit one event, or a discrete kernel does not fit the energy or the chains.
    """
    if not isinstance(sampler, SamplerState):
        raise TypeError(f"sampler: got {type(sampler).__name__}, expected the result of ebm.init_sampler.")
    event = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), sampler.position)
    check_potential(potential, event)
    func = function_behind(sampler.kernel)
    if isinstance(func, AuxiliaryKernel) != (sampler.auxiliary is not None):
        raise ValueError(
            "sampler: its kernel and what its chains carry do not belong together; expected a state made for this kernel, "
            "by ebm.init_sampler(sampler.position, kernel)."
        )
    if isinstance(func, DiscreteKernel):
        func.check_position(potential, sampler.position)
    if isinstance(func, ConfinedKernel):
        func.check_space(potential, sampler.position)


def _population(key: Key, potential: Potential, sampler: SamplerState) -> tuple[Any, Any]:
    """The kernel's step function and a fresh state: nothing cached survives from before."""
    algorithm: Any = sampler.kernel(potential)
    if not (callable(getattr(algorithm, "init", None)) and callable(getattr(algorithm, "step", None))):
        raise TypeError(
            f"sampler: its kernel gave {type(algorithm).__name__} for a potential, expected a pair (init, step) such as a "
            "blackjax.base.SamplingAlgorithm."
        )
    if sampler.auxiliary is None:
        return algorithm.step, algorithm.init(sampler.position, key)
    return algorithm.step, algorithm.init(sampler.position, key, sampler.auxiliary)


def _moved_to(sampler: SamplerState, position: PyTree, num_steps: int) -> SamplerState:
    return sampler._replace(position=position, age=None if sampler.age is None else sampler.age + num_steps)


def _after(sampler: SamplerState, state: Any, num_steps: int) -> SamplerState:
    """What survives of a kernel state, ``num_steps`` steps later."""
    sampler = _moved_to(sampler, state.position, num_steps)
    if sampler.auxiliary is not None:
        sampler = sampler._replace(auxiliary=state.auxiliary)
    return sampler._replace(log_weight=state.log_weight) if isinstance(state, WeightedPopulation) else sampler


def _advance(key: Key, potential: Potential, sampler: SamplerState, num_steps: int) -> tuple[SamplerState, Info]:
    # Negatives are constants of the loss: no gradient flows into or out of a chain.
    potential, sampler = as_constants((potential, sampler))
    init_key, run_key = jax.random.split(key)
    func = function_behind(sampler.kernel)
    if isinstance(func, PhaseKernel):
        position, info = func.run_phase(run_key, potential, sampler.position, num_steps, **tunables_of(sampler.kernel))
        return as_constants((_moved_to(sampler, position, num_steps), info))
    step, state = _population(init_key, potential, sampler)
    # A state of positions alone was made without looking at the energy.
    is_evaluated = len(jax.tree.leaves(state)) > len(jax.tree.leaves(sampler.position))
    before = _potential_of(state)
    state, info = run_steps(step, jax.random.split(run_key, num_steps), state)
    info = info._replace(potential_before=before, potential_after=_potential_of(state))
    return as_constants((_after(sampler, state, num_steps), count_start(info, is_evaluated)))


def _potential_of(state: Any) -> Array | None:
    """The energies that a kernel's state holds anyway, at no cost."""
    log_density = getattr(state, "logdensity", None)
    return None if log_density is None else -log_density


def _draw(
    key: Key, potential: Potential, sampler: SamplerState, num_draws: int, num_steps: int
) -> tuple[SamplerState, Draws]:
    potential, sampler = as_constants((potential, sampler))
    init_key, run_key = jax.random.split(key)
    step, state = _population(init_key, potential, sampler)

    def body(state: Any, draw_key: Key) -> tuple[Any, tuple[PyTree, Array, Array, Info]]:
        state, info = run_steps(step, jax.random.split(draw_key, num_steps), state)
        log_weight = _after(sampler, state, num_steps).log_weight
        return state, (state.position, jax.vmap(potential)(state.position), log_weight, info)

    state, trace = jax.lax.scan(body, state, jax.random.split(run_key, num_draws))
    position, energy, log_weight, info = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), trace)
    draws = Draws(
        position=position,
        potential=energy,
        acceptance_rate=info.acceptance_rate,
        is_divergent=info.is_divergent,
        num_gradients=info.num_gradients,
        log_weight=log_weight,
        num_energies=info.num_energies,
        num_nonfinite=info.num_nonfinite,
        statistics=info.statistics,
    )
    return as_constants(_after(sampler, state, num_draws * num_steps)), draws


_compiled_advance = eqx.filter_jit(_advance)
_compiled_draw = eqx.filter_jit(_draw)
