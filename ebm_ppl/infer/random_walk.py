"""A Gaussian random walk whose scale and covariance are tuned in warm-up and frozen after it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ebm_ppl.types import Array

_NUM_WINDOWS = 4


class RandomWalk(NamedTuple):
    """A proposal ``z + step_size * L xi`` with ``L L' = covariance`` and standard normal ``xi``, and what tunes it.

    Warm-up is four windows. Robbins-Monro moves ``log step_size`` towards the target acceptance within each; at the end of
    each but the last the covariance becomes that of the window's positions, and the search for the step size starts again
    from ``2.38 / sqrt(d)``. The step size that sampling uses is the average over the second half of the last window.

    Attributes:
        step_size: Scale.
        covariance: ``(d, d)``, or its diagonal ``(d,)``.
        factor: ``L``, likewise.
        average: Running mean of ``log step_size`` in this window.
        mean: Mean position in this window.
        scatter: Sum of squared deviations from it.
    """

    step_size: Array
    covariance: Array
    factor: Array
    average: Array
    mean: Array
    scatter: Array

    def displace(self, noise: Array) -> Array:
        """The move ``(d,)`` that standard normal noise ``(d,)`` stands for."""
        return self.step_size * (self.factor @ noise if self.factor.ndim == 2 else self.factor * noise)


class WalkTuning(NamedTuple):
    """How a :class:`RandomWalk` is tuned.

    Attributes:
        num_warmup: Steps of warm-up.
        target: Acceptance probability to reach.
        step_size: Initial scale; ``None`` for ``2.38 / sqrt(d)``.
        adapt_step_size: Whether the scale is tuned.
        adapt_covariance: Whether the covariance is tuned.
        dense: Whether it is dense.

    References:
        Andrieu, Thoms (2008), A tutorial on adaptive MCMC, Statistics and Computing 18, algorithm 4; Roberts, Gelman,
        Gilks (1997), Weak convergence and optimal scaling of random walk Metropolis algorithms (the 2.38).
    """

    num_warmup: int
    target: float
    step_size: Array | None
    adapt_step_size: bool
    adapt_covariance: bool
    dense: bool

    def init(self, position: Array) -> RandomWalk:
        """An untuned walk from a position ``(d,)``."""
        size = position.size
        identity = _identity(position, self.dense)
        step_size = _default_step(size) if self.step_size is None else self.step_size
        step_size = jnp.asarray(step_size, position.dtype)
        return RandomWalk(step_size, identity, identity, jnp.log(step_size), 0.0 * position, 0.0 * identity)

    def update(self, walk: RandomWalk, i: Array, position: Array, accept_prob: Array) -> RandomWalk:
        """The walk after step ``i`` (counted from zero) ended at a position with this acceptance probability."""
        start, length = walk, max(self.num_warmup // _NUM_WINDOWS, 1)
        window = jnp.minimum(i // length, _NUM_WINDOWS - 1)
        k = (i - window * length).astype(position.dtype)
        is_last = window == _NUM_WINDOWS - 1
        if self.adapt_step_size:
            log_step = jnp.log(walk.step_size) + (accept_prob - self.target) * (k + 1.0) ** -0.6
            half = (self.num_warmup - (_NUM_WINDOWS - 1) * length) // 2
            average = walk.average + (log_step - walk.average) / jnp.maximum(k - half + 1.0, 1.0)
            is_end = i == self.num_warmup - 1
            walk = walk._replace(step_size=jnp.exp(jnp.where(is_end, average, log_step)), average=average)
        # Windows too short to hold a covariance leave it alone.
        if self.adapt_covariance and length > 2 * position.size:
            fresh = k == 0
            mean, scatter = jnp.where(fresh, 0.0, walk.mean), jnp.where(fresh, 0.0, walk.scatter)
            before, mean = position - mean, mean + (position - mean) / (k + 1.0)
            after = position - mean
            scatter = scatter + (jnp.outer(before, after) if self.dense else before * after)
            walk = walk._replace(mean=mean, scatter=scatter)
            walk = jax.lax.cond((k == length - 1) & ~is_last, self._next_window, lambda walk, _: walk, walk, k + 1.0)
        # The state of a chain keeps its dtypes, whatever those of the model's densities are.
        return jax.tree.map(lambda new, old: new.astype(old.dtype), walk, start)

    def _next_window(self, walk: RandomWalk, count: Array) -> RandomWalk:
        # Shrunk towards a small multiple of the identity, so that a chain that hardly moved leaves it invertible.
        identity = _identity(walk.mean, self.dense)
        covariance = (walk.scatter + 0.005 * identity) / (count + 5.0)
        factor = jnp.linalg.cholesky(covariance) if self.dense else jnp.sqrt(covariance)
        walk = walk._replace(covariance=covariance, factor=factor)
        if self.adapt_step_size:
            walk = walk._replace(step_size=jnp.asarray(_default_step(walk.mean.size), walk.step_size.dtype))
        return walk


def _identity(position: Array, dense: bool) -> Array:
    return jnp.eye(position.size, dtype=position.dtype) if dense else jnp.ones_like(position)


def _default_step(size: int) -> float:
    return 2.38 / size**0.5
