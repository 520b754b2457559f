"""Unadjusted Langevin with separate drift and noise scales, and the temperature that the two imply."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_positive
from ebm_ppl.info import moved, step_info
from ebm_ppl.partials import tunables_of
from ebm_ppl.types import Array, Info, Kernel, Key, Potential, PyTree


def implied_temperature(step_size: float | Array, noise_scale: float | Array) -> Array:
    """The temperature of Langevin steps with separate scales: ``T = noise_scale^2 / (2 step_size)``.

    ``x' = x - step_size grad U(x) + noise_scale xi`` discretises the diffusion that leaves ``exp(-U / T)`` invariant. At
    ``T = 1`` it targets ``exp(-U)``, up to the bias of its step size.

    Args:
        step_size: Scale of the drift.
        noise_scale: Standard deviation of the noise.

    Raises:
        TypeError: an argument is no real number.
        ValueError: an argument is not finite and positive.

    Example:
        >>> round(float(implied_temperature(0.125, 0.01)), 6)  # half of a squared step of 0.5
        0.0004
    """
    return check_positive("noise_scale", noise_scale) ** 2 / (2.0 * check_positive("step_size", step_size))


def langevin(
    step_size: float | Array,
    noise_scale: float | Array | None = None,
    *,
    temperature: float | Array | None = None,
    max_gradient: float | Array | None = None,
    antithetic: bool = False,
) -> Kernel:
    """Unadjusted Langevin with a drift and a noise of their own scales: ``x' = x - eps grad U(x) + eta xi``.

    BIASED: with no accept step its stationary law is not ``exp(-U)``, and its implied temperature
    ``T = eta^2 / (2 eps)`` need not even be one. For a quadratic energy with curvature ``k`` the stationary variance is
    ``eta^2 / (1 - (1 - eps k)^2)``, which is ``T / (k (1 - eps k / 2))``. Use :func:`mala` where the law matters.

    Args:
        step_size: ``eps > 0``, in squared units of ``x``.
        noise_scale: ``eta > 0``, in units of ``x``. When ``None`` it follows step size and temperature,
            ``sqrt(2 eps T)``, also when the step size is changed later.
        temperature: ``T > 0``, in the place of ``noise_scale``; 1 when both are ``None``.
        max_gradient: Clip each component of the gradient to ``±max_gradient``; one more bias.
        antithetic: Chain ``i`` of the first half and chain ``i`` of the second get the noise ``xi`` and ``-xi``. Every
            chain has the same law as without, but pairs are dependent, and what is linear in the noise cancels between
            two that were in one place: with all chains restarted at data, two at each row, this takes most of the noise
            out of the gradient. Needs an even number of chains.

    Returns:
        A kernel with one gradient per step and no acceptance rate. Its tunables: ``step_size``, ``noise_scale`` or
        ``temperature``, and ``max_gradient`` if given. A chain whose position or energy is no longer finite is flagged as
        divergent. :func:`ebm_ppl.advance` looks at the energy at both ends of a phase, not at every step: gradients alone
        cost less.

    Raises:
        TypeError: an argument is no real number.
        ValueError: an argument is not finite and positive, or not a single number, or both ``noise_scale`` and
            ``temperature`` are given.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), langevin(0.1, 0.02))
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 100)
        >>> sampler.position.shape
        (8, 2)

    References:
        Nijkamp, Hill, Zhu, Wu (2019), Learning non-convergent non-persistent short-run MCMC toward energy-based model,
        arXiv:1904.09770; Du, Mordatch (2019), arXiv:1903.08689 (noise smaller than the drift, clipped gradients).
    """
    return Partial(_Langevin(antithetic), **langevin_tunables(step_size, noise_scale, temperature, max_gradient))


def langevin_tunables(
    step_size: float | Array,
    noise_scale: float | Array | None,
    temperature: float | Array | None,
    max_gradient: float | Array | None,
) -> dict[str, Array]:
    """The tunables of :func:`take_langevin_step`, checked: those given, and one of noise and temperature."""
    if noise_scale is not None and temperature is not None:
        raise ValueError(
            f"temperature: got {temperature} together with noise_scale {noise_scale}, expected one of the two. They say "
            "the same thing: noise_scale = sqrt(2 step_size temperature)."
        )
    if noise_scale is None and temperature is None:
        temperature = 1.0
    given = {
        "step_size": step_size,
        "noise_scale": noise_scale,
        "temperature": temperature,
        "max_gradient": max_gradient,
    }
    checked = {
        name: check_positive(name, value) for name, value in given.items() if name == "step_size" or value is not None
    }
    for name, value in checked.items():
        if value.ndim:
            raise ValueError(f"{name}: got shape {value.shape}, expected one number for all chains.")
    return checked


def unadjusted_langevin(step_size: float | Array) -> Kernel:
    """Unadjusted Langevin: ``x' = x - eps grad U(x) + sqrt(2 eps) xi``, with no accept step.

    It is :func:`langevin` at temperature one.

    BIASED: its stationary law differs from ``exp(-U)`` by a term of order ``eps``, and its acceptance rate is NaN because
    nothing is ever rejected. Use :func:`mala` where the law matters. A chain whose position or energy is not finite is
    counted in ``info.num_nonfinite`` and flagged as divergent, but its step stands.

    Args:
        step_size: ``eps > 0``, in squared units of ``x``; part of the model when training relies on it.

    Raises:
        TypeError: an argument is no real number.
        ValueError: ``step_size`` is not finite and positive, or not a single number.

    Example:
        >>> kernel = unadjusted_langevin(step_size=0.01)

    References:
        Parisi (1981), Correlation functions and computer simulations, Nuclear Physics B 180.
    """
    tunables = langevin_tunables(step_size, None, 1.0, None)
    return Partial(_Langevin(antithetic=False), step_size=tunables["step_size"])


def langevin_noise_scale(tunables: dict[str, Array]) -> Array:
    """Standard deviation of the noise of one step."""
    if "noise_scale" in tunables:
        return tunables["noise_scale"]
    return jnp.sqrt(2.0 * tunables["step_size"] * tunables.get("temperature", 1.0))


def langevin_temperature(tunables: dict[str, Array]) -> Array:
    """The temperature that the tunables imply."""
    return implied_temperature(tunables["step_size"], langevin_noise_scale(tunables))


def take_langevin_step(
    key: Key, potential: Potential, position: PyTree, tunables: dict[str, Array], *, antithetic: bool = False
) -> PyTree:
    """One step of every chain of a population.

    Raises:
        ValueError: antithetic noise for an odd number of chains.
    """
    return _step_along(key, position, _gradient(potential, position), tunables, antithetic=antithetic)


def _gradient(potential: Potential, position: PyTree) -> PyTree:
    dtype = jnp.result_type(*jax.tree.leaves(position))
    return jax.vmap(jax.grad(lambda event: jnp.asarray(potential(event), dtype)))(position)


def _step_along(
    key: Key, position: PyTree, gradient: PyTree, tunables: dict[str, Array], *, antithetic: bool = False
) -> PyTree:
    dtype = jnp.result_type(*jax.tree.leaves(position))
    scales = {name: jnp.asarray(value, dtype) for name, value in tunables.items()}
    step_size, noise_scale = scales["step_size"], langevin_noise_scale(scales)
    if "max_gradient" in scales:
        limit = scales["max_gradient"]
        gradient = jax.tree.map(lambda g: jnp.clip(g, -limit, limit), gradient)
    leaves, structure = jax.tree.flatten(position)
    noise = [
        _noise(leaf_key, leaf, antithetic)
        for leaf_key, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return jax.tree.map(
        lambda x, g, xi: x - step_size * g + noise_scale * xi, position, gradient, jax.tree.unflatten(structure, noise)
    )


def _noise(key: Key, like: Array, antithetic: bool) -> Array:
    if not antithetic:
        return jax.random.normal(key, like.shape, like.dtype)
    if like.shape[0] % 2:
        raise ValueError(f"antithetic: got {like.shape[0]} chains, expected an even number: they are paired.")
    num_pairs, *event = like.shape[0] // 2, *like.shape[1:]
    half = jax.random.normal(key, (num_pairs, *event), like.dtype)
    # A factor for each chain, not the two halves put together: that is rounded otherwise where devices share the chains.
    sign = jnp.where(jnp.arange(2 * num_pairs) < num_pairs, 1.0, -1.0).astype(like.dtype)
    return sign.reshape(-1, *[1] * len(event)) * jnp.tile(half, (2, *[1] * len(event)))


def run_langevin(
    key: Key, potential: Potential, position: PyTree, num_steps: int, tunables: dict[str, Array]
) -> PyTree:
    """``num_steps`` Langevin steps of a population, the noise of step ``t`` a function of ``key`` and ``t`` alone."""

    def body(time: Array, position: PyTree) -> PyTree:
        return take_langevin_step(jax.random.fold_in(key, time), potential, position, tunables)

    return jax.lax.fori_loop(0, num_steps, body, position)


def langevin_info(energy: Array, position: PyTree, num_steps: int) -> Info:
    """The report of ``num_steps`` Langevin steps that ended at ``position``, given their energies."""
    is_lost = _is_lost(position, energy)
    return step_info(
        is_lost.shape[0], is_divergent=is_lost, num_gradients=num_steps, num_energies=1, num_nonfinite=is_lost
    )


def _is_lost(*values: PyTree) -> Array:
    """Nothing is rejected, so a chain whose position, energy or gradient is not finite is lost: ``(chain,)``."""
    leaves = jax.tree.leaves(values)
    return jnp.stack([~jnp.isfinite(leaf.reshape(leaf.shape[0], -1)).all(axis=1) for leaf in leaves]).any(axis=0)


class EvaluatedState(NamedTuple):
    """Positions ``(chain, *event)`` with minus the energy ``(chain,)`` and its gradient there."""

    position: PyTree
    logdensity: Array
    logdensity_grad: PyTree


@dataclass(frozen=True)
class LangevinSteps:
    """The static half of a kernel of Langevin steps; an :class:`~ebm_ppl.types.PhaseKernel`.

    Steps taken one by one are judged each, by the energy that comes with the gradient of the next one. A phase as a whole
    needs no energies but those at its ends.
    """

    antithetic: bool

    def project(self, position: PyTree) -> PyTree:
        """From where a step leads to where the chains live."""
        return position

    def temperature(self, **tunables: Any) -> Array:
        """The implied temperature."""
        return langevin_temperature(tunables)

    def __call__(self, potential: Potential, **tunables: Any) -> SamplingAlgorithm:
        """BlackJAX's pair for a population."""

        def init(position: PyTree, rng_key: Key | None = None) -> EvaluatedState:
            return _evaluated(potential, position)

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            state = init(self._step_from(state, rng_key, tunables))
            is_lost = _is_lost(state)
            return state, step_info(is_lost.shape[0], is_divergent=is_lost, num_gradients=1, num_nonfinite=is_lost)

        return SamplingAlgorithm(init, step)

    def run_phase(
        self, key: Key, potential: Potential, position: PyTree, num_steps: int, /, **tunables: Any
    ) -> tuple[PyTree, Info]:
        """See :class:`~ebm_ppl.types.PhaseKernel`."""

        def body(time: Array, position: PyTree) -> PyTree:
            return self._step(jax.random.fold_in(key, time), position, _gradient(potential, position), tunables)

        # The energies at the start come with the first gradient, those at the end where a loss evaluates them anyway.
        start = _evaluated(potential, position)
        first = self._step_from(start, jax.random.fold_in(key, 0), tunables)
        end = jax.lax.fori_loop(1, num_steps, body, first)
        after = jax.vmap(potential)(end)
        return end, langevin_info(after, end, num_steps)._replace(
            has_moved=moved(position, end), potential_before=-start.logdensity, potential_after=after
        )

    def _step_from(self, state: EvaluatedState, key: Key, tunables: dict[str, Array]) -> PyTree:
        return self._step(key, state.position, jax.tree.map(jnp.negative, state.logdensity_grad), tunables)

    def _step(self, key: Key, position: PyTree, gradient: PyTree, tunables: dict[str, Array]) -> PyTree:
        return self.project(_step_along(key, position, gradient, tunables, antithetic=self.antithetic))


def _evaluated(potential: Potential, position: PyTree) -> EvaluatedState:
    dtype = jnp.result_type(*jax.tree.leaves(position))
    return EvaluatedState(
        position, *jax.vmap(jax.value_and_grad(lambda event: -jnp.asarray(potential(event), dtype)))(position)
    )


@dataclass(frozen=True)
class _Langevin(LangevinSteps):
    """That of :func:`langevin`, in free space."""


def is_langevin(kernel: Kernel) -> bool:
    """Whether a kernel is one of :func:`langevin`, its keywords the tunables of :func:`take_langevin_step`.

    One with antithetic noise is not: who takes its steps one by one would lose the pairs.
    """
    return isinstance(kernel, Partial) and isinstance(kernel.func, _Langevin) and not kernel.func.antithetic


def is_unadjusted_langevin(kernel: Kernel) -> bool:
    """Whether a kernel is one of :func:`unadjusted_langevin`, its only tunable the step size."""
    return is_langevin(kernel) and set(tunables_of(kernel)) == {"step_size"}
