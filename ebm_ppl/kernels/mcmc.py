"""BlackJAX's per-chain samplers as population kernels: MALA, HMC, NUTS, unadjusted Langevin, and any that conforms.

This is the one place where the sign flips: BlackJAX reads ``logdensity_fn = -potential``.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from blackjax.mcmc.diffusions import DiffusionState, overdamped_langevin
from jax.tree_util import Partial

from ebm_ppl.checks import check_count, check_positive, is_traced
from ebm_ppl.info import step_info
from ebm_ppl.types import Array, Event, Info, Kernel, Key, Potential, PyTree

_REFUSED: dict[Any, str] = {
    blackjax.elliptical_slice.differentiable: "it reads the log density as a likelihood against a Gaussian prior of its "
    "own",
    blackjax.mgrad_gaussian.differentiable: "it reads the log density as a likelihood against a Gaussian prior of its own",
    blackjax.orbital_hmc.differentiable: "its state is a weighted orbit, not a position",
    blackjax.sgld.differentiable: "it needs a stochastic gradient estimator, not a log density",
    blackjax.sghmc.differentiable: "it needs a stochastic gradient estimator, not a log density",
    blackjax.sgnht.differentiable: "it needs a stochastic gradient estimator, not a log density",
    blackjax.csgld.differentiable: "it needs stochastic estimators, not a log density",
}


def from_blackjax(algorithm: Callable[..., SamplingAlgorithm], **parameters: Any) -> Kernel:
    """Lift a per-chain BlackJAX sampler to a population kernel by ``vmap``.

    Floating numbers and arrays among the parameters become pytree leaves of the kernel (changing one never recompiles);
    integers, strings, booleans and functions are static. Floating parameters are cast to the dtype of the chains.

    Args:
        algorithm: A BlackJAX sampler such as ``blackjax.barker``, or any function
            ``(logdensity_fn, **parameters) -> SamplingAlgorithm`` whose states have a ``position``.
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
    build = algorithm.differentiable if isinstance(algorithm, blackjax.GenerateSamplingAPI) else algorithm
    if not callable(build):
        raise TypeError(f"algorithm: got {type(algorithm).__name__}, expected a BlackJAX sampler.")
    if not isinstance(build, Hashable):
        raise TypeError(f"algorithm: got {type(algorithm).__name__}, which is not a BlackJAX MCMC sampler.")
    if build in _REFUSED:
        raise TypeError(f"algorithm: this BlackJAX sampler cannot serve as a negative phase: {_REFUSED[build]}.")
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
    return Partial(_Population(build, tuple(static)), **tunables)


@dataclass(frozen=True)
class _Population:
    """The static half of a lifted kernel; hashable, so that equal kernels share one compilation."""

    build: Callable[..., SamplingAlgorithm]
    static: tuple[tuple[str, Hashable], ...]

    def __call__(self, potential: Potential, **tunables: PyTree) -> SamplingAlgorithm:
        def chain_algorithm(position: Event) -> SamplingAlgorithm:
            dtype = jnp.result_type(*jax.tree.leaves(position))

            def logdensity_fn(event: Event) -> Array:
                return -jnp.asarray(potential(event), dtype)

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

        def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
            return jax.vmap(step_chain)(jax.random.split(rng_key, _num_chains(state.position)), state)

        return SamplingAlgorithm(init, step)


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
    """BlackJAX's infos differ by sampler; these three numbers are what every diagnostic reads."""
    fields = info._asdict()
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state.position)]).all()
    finite &= ~jnp.isnan(state._asdict().get("logdensity", 0.0))
    one_chain = step_info(
        1,
        acceptance_rate=fields.get("acceptance_rate", jnp.nan),
        is_divergent=jnp.asarray(fields.get("is_divergent", False)) | ~finite,
        num_gradients=fields.get("num_integration_steps", 1),
    )
    return jax.tree.map(lambda x: x[0], one_chain)


def mala(step_size: float | Array) -> Kernel:
    """Metropolis-adjusted Langevin: ``x' = x - eps grad U(x) + sqrt(2 eps) xi``, accepted or rejected exactly.

    Args:
        step_size: ``eps > 0``, in squared units of ``x``. Around .57 acceptance is optimal in high dimension;
            :func:`ebm_ppl.tune_step_size` finds it.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant. One gradient per step. A proposal with a NaN energy is rejected, and
        not flagged: BlackJAX does not report it. HMC and NUTS flag such steps as divergent.

    Raises:
        ValueError: ``step_size`` is not finite and positive.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), mala(step_size=0.3))
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 100)
        >>> sampler.position.shape
        (8, 2)

    References:
        Roberts, Tweedie (1996), Exponential convergence of Langevin distributions and their discrete approximations.
    """
    return from_blackjax(blackjax.mala, step_size=step_size)


def unadjusted_langevin(step_size: float | Array) -> Kernel:
    """Unadjusted Langevin: ``x' = x - eps grad U(x) + sqrt(2 eps) xi``, with no accept step.

    BIASED: its stationary law differs from ``exp(-U)`` by a term of order ``eps``, and its acceptance rate is NaN because
    nothing is ever rejected. Use :func:`mala` where the law matters.

    Args:
        step_size: ``eps > 0``, in squared units of ``x``; part of the model when training relies on it.

    Raises:
        ValueError: ``step_size`` is not finite and positive.

    Example:
        >>> kernel = unadjusted_langevin(step_size=0.01)

    References:
        Parisi (1981), Correlation functions and computer simulations, Nuclear Physics B 180.
    """
    return from_blackjax(_unadjusted_langevin, step_size=step_size)


class _NoAcceptance(NamedTuple):
    pass


def _unadjusted_langevin(logdensity_fn: Callable[[Event], Array], step_size: Any) -> SamplingAlgorithm:
    one_step = overdamped_langevin(jax.value_and_grad(logdensity_fn))

    def init(position: Event, rng_key: Key | None = None) -> Any:
        logdensity, logdensity_grad = jax.value_and_grad(logdensity_fn)(position)
        return DiffusionState(position, logdensity, logdensity_grad)

    def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
        return one_step(rng_key, state, step_size), _NoAcceptance()

    return SamplingAlgorithm(init, step)


def hmc(step_size: float | Array, num_integration_steps: int, *, inverse_mass_matrix: Array | None = None) -> Kernel:
    """Hamiltonian Monte Carlo with a leapfrog trajectory of fixed length.

    Args:
        step_size: Leapfrog step, in units of ``x`` for a unit mass matrix; ``> 0``.
        num_integration_steps: Leapfrog steps per proposal, ``>= 1``; that many gradients.
        inverse_mass_matrix: Diagonal ``(d,)`` or dense ``(d, d)`` estimate of the covariance of the flattened event;
            the identity when ``None``.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant.

    Raises:
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
        inverse_mass_matrix=_check_mass(inverse_mass_matrix),
    )


def nuts(step_size: float | Array, *, inverse_mass_matrix: Array | None = None, max_num_doublings: int = 10) -> Kernel:
    """The no-U-turn sampler: Hamiltonian trajectories that stop themselves.

    Chains of a population step together, so one step costs as much as its longest trajectory.

    Args:
        step_size: Leapfrog step, ``> 0``.
        inverse_mass_matrix: As in :func:`hmc`.
        max_num_doublings: The trajectory has at most ``2**max_num_doublings`` leapfrog steps.

    Raises:
        ValueError: an argument is not positive, or the matrix has the wrong rank.

    Example:
        >>> kernel = nuts(step_size=0.5)

    References:
        Hoffman, Gelman (2014), The No-U-Turn Sampler, arXiv:1111.4246.
    """
    return from_blackjax(
        _nuts,
        step_size=step_size,
        inverse_mass_matrix=_check_mass(inverse_mass_matrix),
        max_num_doublings=check_count("max_num_doublings", max_num_doublings),
    )


def _check_mass(inverse_mass_matrix: Array | None) -> Array | None:
    if inverse_mass_matrix is None:
        return None
    matrix = jnp.asarray(inverse_mass_matrix)
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


def _with_default_mass(build: Callable[..., SamplingAlgorithm]) -> Callable[..., SamplingAlgorithm]:
    """BlackJAX wants the mass matrix up front; the identity's size is known only once a position is."""

    def with_default_mass(
        logdensity_fn: Callable[[Event], Array], inverse_mass_matrix: Array | None = None, **parameters: Any
    ) -> SamplingAlgorithm:
        def algorithm(position: Event) -> SamplingAlgorithm:
            matrix, leaves = inverse_mass_matrix, jax.tree.leaves(position)
            size = sum(leaf.size for leaf in leaves)
            if matrix is None:
                matrix = jnp.ones(size, jnp.result_type(*leaves))
            elif matrix.shape[0] != size:
                raise ValueError(f"inverse_mass_matrix: got shape {matrix.shape} for events of {size} numbers.")
            return build(logdensity_fn, inverse_mass_matrix=matrix, **parameters)

        def init(position: Event, rng_key: Key | None = None) -> Any:
            return algorithm(position).init(position, rng_key)

        def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
            return algorithm(state.position).step(rng_key, state)

        return SamplingAlgorithm(init, step)

    return with_default_mass


_hmc = _with_default_mass(blackjax.hmc.differentiable)
_nuts = _with_default_mass(blackjax.nuts.differentiable)
