"""Annealing: weighted particles carried from one density to another through a path between them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ebm_ppl.checks import as_rows, check_count, check_markov_kernel, is_traced
from ebm_ppl.densities import LikeEnergy, LogDensity, as_constant
from ebm_ppl.info import add_infos, step_info
from ebm_ppl.sampling import advance, chains_at
from ebm_ppl.types import Array, Event, Info, Kernel, Key, PyTree, Scalar


class Particles(NamedTuple):
    """A population of weighted particles. It is a constant: no gradient flows into it.

    Attributes:
        position: ``(particle, *event)``, or a pytree of such arrays; with rows ``(particle, *batch, *event)``.
        log_weight: Log importance weights, ``(particle,)`` or ``(particle, *batch)``, not normalised.
        info: What the kernel did: acceptance averaged over the steps (NaN without any), whether any step diverged, and
            gradients in total; the shape of ``log_weight``.
    """

    position: PyTree
    log_weight: Array
    info: Info


def anneal(
    key: Key,
    position: PyTree,
    start_logdensity: LogDensity,
    end_logdensity: LogDensity,
    *,
    kernel: Kernel,
    num_temperatures: int,
    num_steps: int = 1,
    coding: Any = None,
) -> Particles:
    """Annealed importance sampling along ``f_b = start^(1 - b) end^b`` with ``b = 0, 1/(K+1), ..., 1``.

    Particle ``x_0`` is a draw of the start, ``x_k`` comes from ``x_{k-1}`` by steps that leave ``f_{k/(K+1)}``
    invariant, and ``log w = sum_{k=0}^{K} (log end(x_k) - log start(x_k)) / (K + 1)``. Then ``E[w] = Z_end / Z_start``,
    and the weighted particles stand for the end. Without intermediate densities (``K = 0``) the weight is the plain
    importance ratio ``end(x_0) / start(x_0)`` and nothing moves.

    Args:
        key: Random key.
        position: Draws of the start, ``(particle, *event)`` or a pytree of such arrays.
        start_logdensity: ``log start`` of one event, up to a constant.
        end_logdensity: ``log end`` of one event, up to a constant.
        kernel: From :mod:`ebm_ppl.kernels`, one that leaves its target invariant: a biased kernel biases ``w``.
        num_temperatures: ``K``, the number of intermediate densities, ``>= 0``.
        num_steps: Kernel steps at each of them.
        coding: What says how discrete events are coded, for a kernel that has to know; see
            :class:`ebm_ppl.densities.LikeEnergy`.

    Returns:
        The particles at the end of the path, with their weights.

    Raises:
        TypeError: the kernel does not move particles from where they are, a count is not a whole number, or a log density
            is not a real floating scalar.
        ValueError: a count is too small, or a log density does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> draws = jax.random.normal(jax.random.key(0), (1000,))
        >>> start, end = (lambda x: -0.5 * x**2), (lambda x: -0.5 * (x - 1.0) ** 2 / 0.25)
        >>> kernel = ebm.kernels.mala(step_size=0.2)
        >>> particles = anneal(jax.random.key(1), draws, start, end, kernel=kernel, num_temperatures=20)
        >>> ratio = jnp.exp(particles.log_weight).mean()  # exactly 1/2 on average
        >>> bool(abs(ratio - 0.5) < 0.05)
        True

    References:
        Neal (2001), Annealed importance sampling, Statistics and Computing 11, arXiv:physics/9803008; Murray, Ghahramani,
        MacKay (2006), MCMC for doubly-intractable distributions, arXiv:1206.6848, section 2.3 (the ratio in bridged
        exchange).
    """
    check_markov_kernel("kernel", kernel)
    num_temperatures = check_count("num_temperatures", num_temperatures, 0)
    num_steps = check_count("num_steps", num_steps)
    position = jax.lax.stop_gradient(as_rows("position", position))
    if not is_traced(position) and not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(position)):
        raise ValueError("position: got NaN or infinite coordinates, expected finite starting positions.")
    event = jax.tree.map(lambda x: x[0], position)
    start, end = as_constant(start_logdensity, event), as_constant(end_logdensity, event)
    bridge = _Bridge(start, end)
    step = 1.0 / (num_temperatures + 1)

    def whole(position: PyTree) -> Array:
        return jax.vmap(lambda event: end(event) - start(event))(position)

    # A constant in the energy would be added a bit at a time, each time rounded the same way for all particles.
    at_start = whole(position)
    level = jnp.mean(at_start, where=jnp.isfinite(at_start))
    level = jnp.where(jnp.isfinite(level), level, 0.0)

    def log_ratio(position: PyTree) -> Array:
        return step * (whole(position) - level)

    def move(carry: tuple[PyTree, Array, Info], inputs: tuple[Key, Array]) -> tuple[tuple[PyTree, Array, Info], None]:
        position, log_weight, total = carry
        key, inverse_temperature = inputs
        potential = LikeEnergy(Partial(bridge, inverse_temperature), coding)
        sampler, info = advance(key, potential, chains_at(position, kernel), num_steps)
        total = add_infos(total, info._replace(statistics={}), num_temperatures)
        return (sampler.position, log_weight + log_ratio(sampler.position), total), None

    log_weight = step * (at_start - level)
    num_particles = log_weight.shape[0]
    acceptance = 0.0 if num_temperatures else jnp.nan
    carry = position, log_weight, step_info(num_particles, acceptance_rate=acceptance)
    if num_temperatures:
        inverse_temperatures = step * jnp.arange(1, num_temperatures + 1, dtype=log_weight.dtype)
        keys = jax.random.split(key, num_temperatures)
        carry, _ = jax.lax.scan(move, carry, (keys, inverse_temperatures))
    particles = Particles(*carry)
    return particles._replace(log_weight=particles.log_weight + level)


class _Bridge:
    """The potential ``-(1 - b) log start - b log end`` of one event."""

    def __init__(self, start: LogDensity, end: LogDensity):
        self.start, self.end = start, end

    def __call__(self, inverse_temperature: Array, event: Event) -> Scalar:
        return -(1.0 - inverse_temperature) * self.start(event) - inverse_temperature * self.end(event)
