"""BlackJAX's per-chain samplers as population kernels: HMC, NUTS, and any other that conforms.

This is the one place where the sign flips: BlackJAX reads ``logdensity_fn = -potential``.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import as_floats, check_count, check_positive, is_traced
from ebm_ppl.info import step_info
from ebm_ppl.kernels.composed import COMPOSED, DrivenAlgorithm, event_size, read_report
from ebm_ppl.kernels.composed import hmc as hmc_chain
from ebm_ppl.kernels.refusals import builder, refusal
from ebm_ppl.types import Array, Event, Info, Kernel, Key, Potential, PyTree


def from_blackjax(algorithm: Callable[..., SamplingAlgorithm | DrivenAlgorithm], **parameters: Any) -> Kernel:
    """Lift a per-chain BlackJAX sampler to a population kernel by ``vmap``.

    Floating numbers and arrays among the parameters become pytree leaves of the kernel (changing one never recompiles);
    integers, strings, booleans and functions are static. Floating parameters are cast to the dtype of the chains.

    A proposal whose energy is NaN or infinite, of either sign, is rejected; ``Info.num_nonfinite`` counts it wherever it
    can be known. It cannot for slices and for multinomial trajectories, which discard single points without a trace; the
    latter flag such a step as divergent.

    A sampler with more to its state than the position (the momentum of ``ghmc``) starts that anew at every call of
    :func:`ebm_ppl.advance`: momentum persists within a phase, not between phases.

    Args:
        algorithm: A BlackJAX sampler such as ``blackjax.slice_sampling``, or any function
            ``(logdensity_fn, **parameters) -> SamplingAlgorithm`` whose states have a ``position``, and whose infos are
            BlackJAX's or a :class:`ebm_ppl.kernels.composed.Report`.
        **parameters: Its parameters, such as ``step_size``.

    Returns:
        A kernel, ``kernel(potential) -> (init, step)``. ``init(position, rng_key)`` takes positions
        ``(chain, *event)``; ``step(rng_key, state)`` returns the new state and an :class:`ebm_ppl.types.Info` of
        ``(chain,)`` arrays.

    Raises:
        TypeError: the sampler does not conform (the text says why), or a parameter cannot be used.
        ValueError: ``step_size`` is not finite and positive.

    Example:
        >>> import blackjax, jax, jax.numpy as jnp
        >>> kernel = from_blackjax(blackjax.barker, step_size=0.5)
        >>> algorithm = kernel(lambda x: 0.5 * jnp.sum(x**2))
        >>> state = algorithm.init(jnp.zeros((4, 2)), jax.random.key(0))
        >>> state, info = algorithm.step(jax.random.key(1), state)
        >>> state.position.shape, info.acceptance_rate.shape
        ((4, 2), (4,))
    """
    build = builder(algorithm)
    if not callable(build):
        raise TypeError(f"algorithm: got {type(algorithm).__name__}, expected a BlackJAX sampler.")
    if not isinstance(build, Hashable):
        raise TypeError(f"algorithm: got {type(algorithm).__name__}, which is not a BlackJAX MCMC sampler.")
    if (reason := refusal(build)) is not None:
        raise TypeError(f"algorithm: this BlackJAX sampler cannot serve as a negative phase: {reason}.")
    if build is blackjax.irmh.differentiable and parameters.get("proposal_logdensity_fn") is None:
        raise TypeError(
            "algorithm: blackjax.irmh without proposal_logdensity_fn samples the wrong target; "
            "pass the log density of the proposal."
        )
    if "step_size" in parameters:
        step_size = check_positive("step_size", parameters["step_size"])
        if step_size.ndim:
            raise ValueError(f"step_size: got shape {step_size.shape}, expected one number for all chains.")
        parameters["step_size"] = step_size
    tunables, static = {}, []
    for name, value in sorted(parameters.items()):
        is_function = callable(value) and not any(eqx.is_array(leaf) for leaf in jax.tree.leaves(value))
        if isinstance(value, bool | int | str) or is_function:
            static.append((name, value))
        else:
            # The dtype spelled out: a weakly typed leaf would recompile when a strong one replaces it.
            tunables[name] = jax.tree.map(
                lambda x: jnp.asarray(x, jnp.result_type(x)) if eqx.is_array_like(x) else x, value
            )
    told: Any = COMPOSED.get(build, build)
    return Partial(_Population(told, tuple(static)), **tunables)


@dataclass(frozen=True)
class _Population:
    """The static half of a lifted kernel; hashable, so that equal kernels share one compilation."""

    build: Callable[..., SamplingAlgorithm | DrivenAlgorithm]
    static: tuple[tuple[str, Hashable], ...]

    def __call__(self, potential: Potential, **tunables: PyTree) -> SamplingAlgorithm:
        def chain_algorithm(position: Event) -> SamplingAlgorithm | DrivenAlgorithm:
            dtype = jnp.result_type(*jax.tree.leaves(position))

            def logdensity_fn(event: Event) -> Array:
                energy = jnp.asarray(potential(event), dtype)
                # An infinite density would be accepted and never left; BlackJAX rejects what is not a number. Added, so
                # that the gradient has no part in it: a choice would be one more factor of every layer's gradient.
                is_infinite = jax.lax.stop_gradient(energy) == -jnp.inf
                return jnp.where(is_infinite, jnp.nan, 0.0).astype(dtype) - energy

            cast = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tunables)
            return self.build(logdensity_fn, **cast, **dict(self.static))

        def init_chain(position: Event, rng_key: Key) -> Any:
            return chain_algorithm(position).init(position, rng_key)

        def step_chain(rng_key: Key, state: Any) -> tuple[Any, Info]:
            state, info = chain_algorithm(state.position).step(rng_key, state)
            return state, _info(state, info)

        def init(position: PyTree, rng_key: Key | None) -> Any:
            if rng_key is None:
                raise TypeError("rng_key: got None, expected a random key; some samplers draw their first state.")
            _check_dtype(position)
            return jax.vmap(init_chain)(position, jax.random.split(rng_key, _num_chains(position)))

        def move_chain(noise: Any, state: Any) -> tuple[Any, Info]:
            algorithm: Any = chain_algorithm(state.position)
            state, info = algorithm.move(noise, state)
            return state, _info(state, info)

        def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
            num_chains = _num_chains(state.position)
            algorithm = chain_algorithm(state.position)
            if isinstance(algorithm, DrivenAlgorithm):
                size = event_size(state.position) // num_chains
                return jax.vmap(move_chain)(algorithm.draw_noise(rng_key, (num_chains,), size), state)
            return jax.vmap(step_chain)(jax.random.split(rng_key, num_chains), state)

        return SamplingAlgorithm(init, step)


def sampler_behind(kernel: Kernel) -> Callable[..., SamplingAlgorithm | DrivenAlgorithm] | None:
    """The per-chain sampler that a kernel of :func:`from_blackjax` lifts; ``None`` for any other kernel.

    Example:
        >>> from ebm_ppl.kernels import composed, mala
        >>> sampler_behind(mala(step_size=0.1)) is composed.mala
        True
    """
    func = kernel.func if isinstance(kernel, Partial) else None
    return func.build if isinstance(func, _Population) else None


def _check_dtype(position: PyTree) -> None:
    dtype, expected = jnp.result_type(*jax.tree.leaves(position)), jnp.result_type(float)
    if dtype != expected:
        # BlackJAX makes its noise and its weights in the session's default precision.
        raise TypeError(
            f"position: got {dtype} chains in a session whose default is {expected}, expected {expected}. Cast the "
            "positions (and the data) with .astype, or change jax_enable_x64."
        )


def _num_chains(position: PyTree) -> int:
    return jax.tree.leaves(position)[0].shape[0]


def _info(state: Any, info: Any) -> Info:
    """The report of one chain as arrays without a chain axis, for ``vmap`` to add it."""
    report = read_report(state, info)._asdict()
    one_chain = step_info(1, **{name: value for name, value in report.items() if value is not None})
    return jax.tree.map(lambda x: x[0], one_chain)


def hmc(step_size: float | Array, num_integration_steps: int, *, inverse_mass_matrix: Array | None = None) -> Kernel:
    """Hamiltonian Monte Carlo with a leapfrog trajectory of fixed length.

    Args:
        step_size: Leapfrog step, in units of ``x`` for a unit mass matrix; ``> 0``.
        num_integration_steps: Leapfrog steps per proposal, ``>= 1``; that many gradients.
        inverse_mass_matrix: Diagonal ``(d,)`` or dense ``(d, d)`` estimate of the covariance of the flattened event;
            the identity when ``None``.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant. Its statistic ``hamiltonian`` is the total energy of the state that each
        chain went to; over several steps the last.

    Raises:
        TypeError: an argument is no real number, or ``num_integration_steps`` no whole one.
        ValueError: ``step_size`` or ``num_integration_steps`` is not positive, or the matrix has the wrong rank.

    Example:
        >>> kernel = hmc(step_size=0.2, num_integration_steps=10)

    References:
        Neal (2011), MCMC using Hamiltonian dynamics, arXiv:1206.1901.
    """
    return from_blackjax(
        _hmc,
        step_size=step_size,
        num_integration_steps=check_count("num_integration_steps", num_integration_steps),
        inverse_mass_matrix=check_mass(inverse_mass_matrix),
    )


def nuts(step_size: float | Array, *, inverse_mass_matrix: Array | None = None, max_num_doublings: int = 10) -> Kernel:
    """The no-U-turn sampler: Hamiltonian trajectories that stop themselves.

    Chains of a population step together, so one step costs as much as its longest trajectory. A trajectory that meets a
    NaN or infinite energy ends there, is flagged as divergent and counted once. The statistic ``hamiltonian`` is as in
    :func:`hmc`.

    Args:
        step_size: Leapfrog step, ``> 0``.
        inverse_mass_matrix: As in :func:`hmc`.
        max_num_doublings: The trajectory has at most ``2**max_num_doublings`` leapfrog steps.

    Raises:
        TypeError: an argument is no real number, or ``max_num_doublings`` no whole one.
        ValueError: an argument is not positive, or the matrix has the wrong rank.

    Example:
        >>> kernel = nuts(step_size=0.5)

    References:
        Hoffman, Gelman (2014), The No-U-Turn Sampler, arXiv:1111.4246.
    """
    return from_blackjax(
        _nuts,
        step_size=step_size,
        inverse_mass_matrix=check_mass(inverse_mass_matrix),
        max_num_doublings=check_count("max_num_doublings", max_num_doublings),
    )


def check_mass(inverse_mass_matrix: Array | None) -> Array | None:
    """A diagonal or a symmetric positive definite matrix, or ``None``.

    Raises:
        TypeError: it is not real numbers.
        ValueError: it has another shape, or is not positive definite.
    """
    if inverse_mass_matrix is None:
        return None
    matrix = as_floats("inverse_mass_matrix", inverse_mass_matrix)
    if matrix.ndim not in (1, 2) or (matrix.ndim == 2 and matrix.shape[0] != matrix.shape[1]):
        raise ValueError(f"inverse_mass_matrix: got shape {matrix.shape}, expected (d,) or (d, d).")
    if matrix.ndim == 1:
        check_positive("inverse_mass_matrix", matrix)
    elif not is_traced(matrix):
        # BlackJAX reads one triangle for the momenta and the whole matrix for the moves: were they different matrices,
        # it would sample another law with a healthy acceptance rate.
        is_symmetric = bool(jnp.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-6 * jnp.abs(matrix).max()))
        if not is_symmetric or not bool(jnp.isfinite(jnp.linalg.cholesky(matrix)).all()):
            raise ValueError("inverse_mass_matrix: got a matrix that is not symmetric positive definite, expected one.")
    return matrix


def _with_default_mass(build: Callable[..., SamplingAlgorithm], name: str) -> Callable[..., SamplingAlgorithm]:
    """BlackJAX wants the mass matrix up front; the identity's size is known only once a position is."""

    def with_default_mass(
        logdensity_fn: Callable[[Event], Array], inverse_mass_matrix: Array | None = None, **parameters: Any
    ) -> SamplingAlgorithm:
        def algorithm(position: Event) -> SamplingAlgorithm:
            matrix, size = inverse_mass_matrix, event_size(position)
            if matrix is None:
                matrix = jnp.ones(size, jnp.result_type(*jax.tree.leaves(position)))
            elif matrix.shape[0] != size:
                raise ValueError(f"inverse_mass_matrix: got shape {matrix.shape} for events of {size} numbers.")
            return build(logdensity_fn, inverse_mass_matrix=matrix, **parameters)

        def init(position: Event, rng_key: Key | None = None) -> Any:
            return algorithm(position).init(position, rng_key)

        def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
            return algorithm(state.position).step(rng_key, state)

        return SamplingAlgorithm(init, step)

    with_default_mass.__name__ = name  # what diagnostics call the kernel
    return with_default_mass


_hmc = _with_default_mass(hmc_chain, "hmc")
_nuts = _with_default_mass(builder(blackjax.nuts), "nuts")
