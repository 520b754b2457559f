"""Unadjusted Langevin with separate drift and noise scales, and the temperature that the two imply."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_positive
from ebm_ppl.info import step_info
from ebm_ppl.types import Array, Info, Kernel, Key, Potential, PyTree


class LangevinState(NamedTuple):
    """Positions ``(chain, *event)``; nothing is cached."""

    position: PyTree


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
        ``temperature``, and ``max_gradient`` if given. A chain whose
        position or energy is no longer finite is flagged as divergent.

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
    checked = {name: check_positive(name, value) for name, value in given.items() if value is not None}
    for name, value in checked.items():
        if value.ndim:
            raise ValueError(f"{name}: got shape {value.shape}, expected one number for all chains.")
    return checked


def langevin_noise_scale(tunables: dict[str, Array]) -> Array:
    """Standard deviation of the noise of one step."""
    if "noise_scale" in tunables:
        return tunables["noise_scale"]
    return jnp.sqrt(2.0 * tunables["step_size"] * tunables["temperature"])


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
    dtype = jnp.result_type(*jax.tree.leaves(position))
    gradient = jax.vmap(jax.grad(lambda event: jnp.asarray(potential(event), dtype)))(position)
    return step_along(key, position, gradient, tunables, antithetic=antithetic)


def step_along(
    key: Key, position: PyTree, gradient: PyTree, tunables: dict[str, Array], *, antithetic: bool = False
) -> PyTree:
    """:func:`take_langevin_step`, given the gradient of the energy at ``position``."""
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
    half = jax.random.normal(key, (like.shape[0] // 2, *like.shape[1:]), like.dtype)
    return jnp.concatenate([half, -half])


def run_langevin(
    key: Key, potential: Potential, position: PyTree, num_steps: int, tunables: dict[str, Array]
) -> PyTree:
    """``num_steps`` Langevin steps of a population, the noise of step ``t`` a function of ``key`` and ``t`` alone."""

    def body(time: Array, position: PyTree) -> PyTree:
        return take_langevin_step(jax.random.fold_in(key, time), potential, position, tunables)

    return jax.lax.fori_loop(0, num_steps, body, position)


def langevin_info(potential: Potential, position: PyTree, num_steps: int) -> Info:
    """The report of ``num_steps`` Langevin steps that ended at ``position``, for one more evaluation of the energy."""
    is_lost = _is_lost(position, jax.vmap(potential)(position))
    return step_info(
        is_lost.shape[0], is_divergent=is_lost, num_gradients=num_steps, num_energies=1, num_nonfinite=is_lost
    )


def _is_lost(position: PyTree, energy: Array) -> Array:
    """Nothing is rejected, so a chain whose position or energy is not finite is lost: ``(chain,)``."""
    lost = [~jnp.isfinite(leaf.reshape(leaf.shape[0], -1)).all(axis=1) for leaf in jax.tree.leaves(position)]
    return jnp.stack([*lost, ~jnp.isfinite(energy)]).any(axis=0)


class EvaluatedState(NamedTuple):
    """Positions ``(chain, *event)`` with minus the energy ``(chain,)`` and its gradient there."""

    position: PyTree
    logdensity: Array
    logdensity_grad: PyTree


def langevin_algorithm(
    potential: Potential,
    tunables: dict[str, Array],
    *,
    antithetic: bool,
    project: Callable[[PyTree], PyTree] = lambda position: position,
) -> SamplingAlgorithm:
    """Langevin steps of a population, each put where it belongs by ``project``, at one gradient per step.

    A step is judged by the energy that comes with the gradient of the next one.
    """

    def evaluated(position: PyTree) -> EvaluatedState:
        dtype = jnp.result_type(*jax.tree.leaves(position))
        return EvaluatedState(
            position, *jax.vmap(jax.value_and_grad(lambda event: -jnp.asarray(potential(event), dtype)))(position)
        )

    def init(position: PyTree, rng_key: Key | None = None) -> EvaluatedState:
        return evaluated(position)

    def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
        gradient = jax.tree.map(jnp.negative, state.logdensity_grad)
        moved = step_along(rng_key, state.position, gradient, tunables, antithetic=antithetic)
        state = evaluated(project(moved))
        is_lost = _is_lost(state.position, state.logdensity)
        info = step_info(is_lost.shape[0], is_divergent=is_lost, num_gradients=1, num_nonfinite=is_lost)
        return state, info

    return SamplingAlgorithm(init, step)


@dataclass(frozen=True)
class _Langevin:
    """The static half of the kernel."""

    antithetic: bool

    def temperature(self, **tunables: Any) -> Array:
        """The implied temperature."""
        return langevin_temperature(tunables)

    def __call__(self, potential: Potential, **tunables: Any) -> SamplingAlgorithm:
        return langevin_algorithm(potential, tunables, antithetic=self.antithetic)


def is_langevin(kernel: Kernel) -> bool:
    """Whether a kernel is one of :func:`langevin`, its keywords the tunables of :func:`take_langevin_step`.

    One with antithetic noise is not: who takes its steps one by one would lose the pairs.
    """
    return isinstance(kernel, Partial) and isinstance(kernel.func, _Langevin) and not kernel.func.antithetic
