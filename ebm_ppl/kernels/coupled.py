"""Pairs of chains that each follow a kernel and meet: after that they are one chain.

Coupled are Metropolis kernels with Gaussian proposals (by a maximal coupling of the two proposals that reflects them where
they differ, and a common uniform number to accept) and discrete kernels (by common random numbers).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from ebm_ppl.kernels import composed
from ebm_ppl.kernels.discrete_langevin import is_unadjusted
from ebm_ppl.kernels.mcmc import sampler_behind
from ebm_ppl.types import Array, AuxiliaryKernel, DiscreteKernel, Kernel, Key, Potential, PyTree


class Pairs(NamedTuple):
    """Pairs of chains, ``(pair, *event)`` each.

    Attributes:
        first: States of the first chains; they have a ``position``.
        second: States of the second chains.
        has_met: Whether the two of a pair are one and the same, ``(pair,)``.
        acceptance_rate: Of the first chains at the last step, ``(pair,)``.
    """

    first: Any
    second: Any
    has_met: Array
    acceptance_rate: Array


class CoupledKernel(NamedTuple):
    """``init(position, key)`` gives the states of one population; ``step(key, pairs)`` moves two."""

    init: Callable[[PyTree, Key], Any]
    step: Callable[[Key, Pairs], Pairs]


def coupled(kernel: Kernel, potential: Potential) -> CoupledKernel:
    """A transition of pairs of which each chain follows the kernel by itself, and that may make the two equal.

    Args:
        kernel: ``kernels.mala``, ``kernels.random_walk`` (with one scale, or one per number of the event), or a discrete
            kernel such as ``kernels.gibbs``.
        potential: Energy of one event.

    Raises:
        TypeError: the kernel has no coupling here.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> init, step = coupled(ebm.kernels.random_walk(sigma=1.0), lambda x: 0.5 * x**2)
        >>> first = init(jnp.full(100, -1.0), jax.random.key(0))
        >>> second = init(jnp.full(100, 1.0), jax.random.key(0))
        >>> pairs = Pairs(first, second, jnp.zeros(100, bool), jnp.zeros(100))
        >>> bool(step(jax.random.key(1), pairs).has_met.any())
        True

    References:
        Jacob, O'Leary, Atchadé (2020), Unbiased Markov chain Monte Carlo methods with couplings, arXiv:1708.03625,
        section 4 (common uniforms); Bou-Rabee, Eberle, Zimmer (2020), arXiv:1805.00452, section 2.3 (reflection).
    """
    build = sampler_behind(kernel)
    if isinstance(kernel, Partial):
        if build is composed.mala:
            return _metropolis(potential, kernel.keywords["step_size"], has_drift=True)
        if build is composed.random_walk and jnp.ndim(kernel.keywords["sigma"]) < 2:
            return _metropolis(potential, kernel.keywords["sigma"], has_drift=False)
        is_discrete = isinstance(kernel.func, DiscreteKernel) and not isinstance(kernel.func, AuxiliaryKernel)
        if is_discrete and not is_unadjusted(kernel):
            return _common_numbers(kernel(potential))
    raise TypeError(
        "sampler: got a kernel whose chains cannot be coupled, or whose law is not that of the energy, expected "
        "kernels.mala, kernels.random_walk (no matrix), or a discrete kernel such as kernels.gibbs."
    )


class _MetropolisState(NamedTuple):
    """Chains ``(chain, *event)`` with the energy ``(chain,)`` and its gradient there, zero where there is no drift."""

    position: PyTree
    energy: Array
    gradient: PyTree


def _metropolis(potential: Potential, scale: Array, *, has_drift: bool) -> CoupledKernel:
    """Gaussian proposals, reflected about the plane half way between their centres."""

    def evaluate(event: PyTree) -> _MetropolisState:
        dtype = jnp.result_type(*jax.tree.leaves(event))

        def energy(event: PyTree) -> Array:
            return jnp.asarray(potential(event), dtype)

        if has_drift:
            return _MetropolisState(event, *jax.value_and_grad(energy)(event))
        return _MetropolisState(event, energy(event), jax.tree.map(jnp.zeros_like, event))

    def step_pair(key: Key, x: Any, y: Any, has_met: Array) -> tuple[Any, Any, Array, Array]:
        (at_x, unravel), (at_y, _) = ravel_pytree(x.position), ravel_pytree(y.position)
        size = jnp.asarray(scale, at_x.dtype)
        noise_scale = jnp.sqrt(2.0 * size) if has_drift else size

        def centre(state: Any, at: Array) -> Array:
            return at - size * ravel_pytree(state.gradient)[0] if has_drift else at

        noise_key, couple_key, accept_key = jax.random.split(key, 3)
        from_x, from_y = centre(x, at_x), centre(y, at_y)
        noise = jax.random.normal(noise_key, at_x.shape, at_x.dtype)
        apart = (from_x - from_y) / noise_scale
        log_overlap = 0.5 * jnp.sum(noise**2) - 0.5 * jnp.sum((noise + apart) ** 2)
        is_same = jnp.log(jax.random.uniform(couple_key, (), at_x.dtype)) < log_overlap
        squared = jnp.sum(apart**2)
        mirrored = noise - 2.0 * apart * jnp.dot(apart, noise) / jnp.where(squared > 0, squared, 1.0)
        new_x = from_x + noise_scale * noise
        new_y = jnp.where(is_same, new_x, from_y + noise_scale * mirrored)
        log_uniform = jnp.log(jax.random.uniform(accept_key, (), at_x.dtype))

        def choose(old: Any, at: Array, there: Array, new_at: Array) -> tuple[Any, Array]:
            new = evaluate(unravel(new_at))
            log_ratio = old.energy - new.energy
            if has_drift:
                back = jnp.sum((at - centre(new, new_at)) ** 2) - jnp.sum((new_at - there) ** 2)
                log_ratio -= back / (2.0 * noise_scale**2)
            # As for any Metropolis kernel here: a proposal whose energy is not finite is rejected.
            log_ratio = jnp.where(jnp.isfinite(new.energy) & ~jnp.isnan(log_ratio), log_ratio, -jnp.inf)
            is_accepted = log_uniform < log_ratio
            chosen = jax.tree.map(lambda a, b: jnp.where(is_accepted, a, b), new, old)
            return chosen, jnp.exp(jnp.minimum(log_ratio, 0.0))

        x, rate = choose(x, at_x, from_x, new_x)
        y, _ = choose(y, at_y, from_y, new_y)
        y = jax.tree.map(lambda a, b: jnp.where(has_met, a, b), x, y)
        return x, y, has_met | is_equal(x.position, y.position), rate

    def init(position: PyTree, key: Key) -> _MetropolisState:
        return jax.vmap(evaluate)(position)

    def step(key: Key, pairs: Pairs) -> Pairs:
        keys = jax.random.split(key, pairs.has_met.shape[0])
        return Pairs(*jax.vmap(step_pair)(keys, pairs.first, pairs.second, pairs.has_met))

    return CoupledKernel(init, step)


def _common_numbers(algorithm: Any) -> CoupledKernel:
    """One key for both populations: chains that are equal stay so."""

    def step(key: Key, pairs: Pairs) -> Pairs:
        first, info = algorithm.step(key, pairs.first)
        second, _ = algorithm.step(key, pairs.second)
        has_met = jax.vmap(is_equal)(first.position, second.position)
        return Pairs(first, second, pairs.has_met | has_met, info.acceptance_rate.astype(pairs.acceptance_rate.dtype))

    return CoupledKernel(algorithm.init, step)


def is_equal(a: PyTree, b: PyTree) -> Array:
    """Whether two events are the same, to the last bit."""
    return jnp.stack(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.all(x == y), a, b))).all()
