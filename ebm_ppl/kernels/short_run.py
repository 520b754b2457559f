"""Short runs: a fixed number of steps of any kernel from a fixed start, never persistent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_count, check_markov_kernel
from ebm_ppl.info import count_start, run_steps
from ebm_ppl.kernels.scaled_langevin import (
    is_langevin,
    langevin,
    langevin_info,
    take_langevin_step,
)
from ebm_ppl.partials import function_behind
from ebm_ppl.proposals import can_sample, sample_and_log_prob
from ebm_ppl.types import (
    Array,
    ConfinedKernel,
    DiscreteKernel,
    Info,
    Kernel,
    Key,
    PairedKernel,
    Potential,
    PyTree,
    TemperedKernel,
    WeightedPopulation,
    WithSampler,
)

Start = Callable[[Key, int], PyTree]
"""Fresh positions: ``(key, num_chains) -> (chain, *event)``."""


def short_run(
    num_steps: int,
    init: Any,
    *,
    kernel: Kernel | None = None,
    step_size: float | Array | None = None,
    noise_scale: float | Array | None = None,
    temperature: float | Array | None = None,
    max_gradient: float | Array | None = None,
) -> Kernel:
    """Non-persistent short runs: every step of this kernel restarts all chains and runs ``num_steps`` of another.

    ``x_0 ~ init``, ``x_{t+1} ~ T(x_t, .)``, and the chains are at ``x_k``, ``k = num_steps``; ``T`` is a step of
    ``kernel``, or of Langevin, ``x_{t+1} = x_t - eps grad U(x_t) + eta xi_t``.

    BIASED, by intent: the chains follow the law of ``x_k``, which depends on the start, the kernel with its step size, and
    ``k`` as much as on the energy, and is not ``exp(-U)``. An energy trained with such negatives matches the data's
    statistics at ``k`` steps of this very sampler and nowhere else, so draw from the trained model with the same
    object. For a quadratic energy with curvature ``a`` and ``M = 1 - eps a`` the mean of ``x_k`` is ``M^k`` times that
    of ``x_0``, and the variance ``M^{2k} Var(x_0) + eta^2 (1 - M^{2k}) / (1 - M^2)``, for negative ``a`` too.

    Args:
        num_steps: Steps (k) of each run.
        init: Where runs start: a function ``(key, num_chains) -> (chain, *event)``, or a distribution of one event
            (NumPyro, distrax, or with ``sample_and_log_prob``). A distribution, and a callable pytree with arrays, is a
            tunable of the kernel; a plain function is not, and is compared by identity.
        kernel: What moves the chains; Langevin with the arguments below when ``None``. Its tunables are this kernel's.
        step_size: ``eps > 0`` of Langevin.
        noise_scale: ``eta > 0``; when ``None``, ``sqrt(2 eps T)`` with the temperature ``T``. See
            :func:`ebm_ppl.kernels.scaled_langevin.implied_temperature`.
        temperature: ``T > 0``, in the place of ``noise_scale``; 1 when both are ``None``.
        max_gradient: Clip each component of the gradient to ``±max_gradient``.

    Returns:
        A kernel whose chains after a step depend on the step's key alone, not on where they were. Use one kernel step
        per phase (``advance(..., num_steps=1)``); of several only the last run is kept. The first ``j`` steps of a
        longer run with the same key are the run of ``j`` steps. Langevin takes ``num_steps`` gradients per kernel step,
        and has no acceptance rate.

    Raises:
        TypeError: ``init`` is neither callable nor a distribution, ``num_steps`` is not a whole number, ``kernel`` does
            not move chains from where they are or moves them on a surface, both a kernel and arguments of Langevin are
            given, or neither.
        ValueError: a number is not finite and positive, both ``noise_scale`` and ``temperature`` are given, the kernel
            weights its chains, or the start has other events than the chains.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = short_run(10, dist.Normal(0.0, 1.0).expand([2]).to_event(1), step_size=0.05)
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 1)
        >>> sampler.position.shape
        (8, 2)

    References:
        Nijkamp, Hill, Zhu, Wu (2019), arXiv:1904.09770; Agoritsas, Catania, Decelle, Seoane (2023), Explaining the
        effects of non-convergent sampling in the training of energy-based models, arXiv:2301.09428.
    """
    num_steps = check_count("num_steps", num_steps)
    kernel = _inner(kernel, step_size, noise_scale, temperature, max_gradient)
    is_distribution = can_sample(init)
    if not is_distribution and not callable(init):
        raise TypeError(
            f"init: got {type(init).__name__}, expected a function (key, num_chains) -> positions, or a distribution that "
            "can be sampled."
        )
    func = function_behind(kernel)
    tunables: dict[str, Any] = dict(kernel.keywords) if isinstance(kernel, Partial) else {}
    kind: Any = _DiscreteShortRun if isinstance(func, DiscreteKernel) else _ShortRun
    if is_distribution or any(eqx.is_array(leaf) for leaf in jax.tree.leaves(init)):
        # The dtype spelled out: a weakly typed leaf would recompile when a strong one replaces it.
        strong = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)) if eqx.is_array_like(x) else x, init)
        return Partial(kind(num_steps, func, None), init=strong, **tunables)
    return Partial(kind(num_steps, func, init), **tunables)


def _inner(kernel: Kernel | None, step_size: Any, noise_scale: Any, temperature: Any, max_gradient: Any) -> Kernel:
    """The kernel that moves the chains."""
    given = {
        "step_size": step_size,
        "noise_scale": noise_scale,
        "temperature": temperature,
        "max_gradient": max_gradient,
    }
    if kernel is None:
        if step_size is None:
            raise TypeError("step_size: got None without a kernel, expected one of the two.")
        return langevin(**given)
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise TypeError(f"{named[0]}: got one together with a kernel, which has its own, expected None.")
    check_markov_kernel("kernel", kernel)
    func = function_behind(kernel)
    if isinstance(func, ConfinedKernel):
        raise TypeError("kernel: got one whose chains live on a surface, expected one of free space, such as langevin.")
    if isinstance(func, PairedKernel) and func.antithetic:
        raise ValueError("kernel: got one with antithetic noise, expected independent chains: each run is a draw.")
    return kernel


class ShortRunState(NamedTuple):
    """Positions ``(chain, *event)``; nothing is cached."""

    position: PyTree


@dataclass(frozen=True)
class _ShortRun:
    """The static half of the kernel; ``start`` is ``None`` where the start has parameters and is a tunable."""

    draws_afresh: ClassVar[bool] = True

    num_steps: int
    func: Callable[..., SamplingAlgorithm]
    start: Start | None

    def temperature(self, *, init: Any = None, **tunables: Any) -> Any:
        """That of the steps; ``None`` where their kernel does not tell."""
        return self.func.temperature(**tunables) if isinstance(self.func, TemperedKernel) else None

    def __call__(self, potential: Potential, *, init: Any = None, **tunables: Any) -> SamplingAlgorithm:
        def begin(position: PyTree, rng_key: Key | None = None) -> ShortRunState:
            return ShortRunState(position)

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            start_key, run_key = jax.random.split(rng_key)
            num_chains = jax.tree.leaves(state.position)[0].shape[0]
            fresh = _like_chains(self._fresh(start_key, num_chains, init), state.position)
            position, info = self._run(run_key, potential, fresh, tunables)
            return ShortRunState(position), info

        return SamplingAlgorithm(begin, step)

    def start_positions(self, rng_key: Key, num_chains: int, *, init: Any = None, **tunables: Any) -> PyTree:
        """Where the runs of one kernel step with this key start."""
        return self._fresh(jax.random.split(rng_key)[0], num_chains, init)

    def positions_at(
        self,
        rng_key: Key,
        potential: Potential,
        num_chains: int,
        times: tuple[int, ...],
        *,
        init: Any = None,
        **tunables: Any,
    ) -> PyTree:
        """Where the runs of one kernel step with this key are after each of the increasing times, beyond ``k`` too."""
        start_key, run_key = jax.random.split(rng_key)
        fresh = self._fresh(start_key, num_chains, init)
        state, advance = self._steps(run_key, potential, fresh, tunables)

        def segment(state: Any, limits: Array) -> tuple[Any, PyTree]:
            state = jax.lax.fori_loop(limits[0], limits[1], lambda time, state: advance(time, state)[0], state)
            return state, state.position

        limits = jnp.stack([jnp.asarray((0, *times[:-1]), jnp.int32), jnp.asarray(times, jnp.int32)], axis=1)
        return jax.lax.scan(segment, state, limits)[1]

    def _fresh(self, key: Key, num_chains: int, init: Any) -> PyTree:
        if self.start is not None:
            fresh = self.start(key, num_chains)
        else:
            fresh = sample_and_log_prob(init, key, num_chains)[0] if can_sample(init) else init(key, num_chains)
        counts = sorted({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(fresh)})
        if counts != [(num_chains,)]:
            raise ValueError(f"init: gave {counts} positions, expected {num_chains}, one for each chain.")
        return fresh

    def _steps(self, run_key: Key, potential: Potential, fresh: PyTree, tunables: dict[str, Any]) -> tuple[Any, Any]:
        """The first state, and a step from it, its randomness a function of ``run_key`` and the time alone."""
        potential = _plain(potential)
        if self._is_plain_langevin(tunables):

            def drift(time: Array, state: ShortRunState) -> tuple[ShortRunState, None]:
                key = jax.random.fold_in(run_key, time)
                return ShortRunState(take_langevin_step(key, potential, state.position, tunables)), None

            return ShortRunState(fresh), drift
        init_key, step_key = jax.random.split(run_key)
        algorithm: Any = self.func(potential, **tunables)
        state = algorithm.init(fresh, init_key)
        if isinstance(state, WeightedPopulation):
            raise ValueError("kernel: got one that weights its chains, expected one whose chains count alike.")
        return state, lambda time, state: algorithm.step(jax.random.fold_in(step_key, time), state)

    def _run(self, run_key: Key, potential: Potential, fresh: PyTree, tunables: dict[str, Any]) -> tuple[PyTree, Info]:
        state, advance = self._steps(run_key, potential, fresh, tunables)
        if self._is_plain_langevin(tunables):
            # A single look at the energy, at the end, where a step by itself would take one every time.
            state = jax.lax.fori_loop(0, self.num_steps, lambda time, state: advance(time, state)[0], state)
            return state.position, langevin_info(jax.vmap(potential)(state.position), state.position, self.num_steps)
        is_evaluated = len(jax.tree.leaves(state)) > len(jax.tree.leaves(fresh))
        state, info = run_steps(advance, jnp.arange(self.num_steps), state)
        return state.position, count_start(info, is_evaluated)

    def _is_plain_langevin(self, tunables: dict[str, Any]) -> bool:
        return is_langevin(Partial(self.func, **tunables))


@dataclass(frozen=True)
class _DiscreteShortRun(_ShortRun):
    def check_position(self, potential: Potential, position: PyTree) -> None:
        """Raise where the chains are not in the coding of the potential."""
        assert isinstance(self.func, DiscreteKernel)  # the constructor saw to it
        self.func.check_position(_plain(potential), position)


def _plain(potential: Potential) -> Potential:
    """The energy whose structure a kernel may ask for."""
    return potential.plain if isinstance(potential, WithSampler) else potential


def _like_chains(fresh: PyTree, like: PyTree) -> PyTree:
    """Fresh positions in the dtypes of the chains."""
    found, expected = (jax.tree.map(lambda x: tuple(jnp.shape(x)), tree) for tree in (fresh, like))
    if found != expected:
        raise ValueError(f"init: gave positions of shape {found}, expected those of the chains, {expected}.")
    return jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), fresh, like)
