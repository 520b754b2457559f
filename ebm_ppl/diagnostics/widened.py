"""Where tempering starts when the model reaches beyond its base: the base, moved and stretched."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ebm_ppl.types import Array, Key

REACH = 2.0
"""Standard deviations of what was found that lie within one of the wider start."""


class Stretched(eqx.Module):
    """The law of ``shift + factor y``, ``y`` a draw of a distribution on the whole space.

    Attributes:
        inner: The distribution of ``y``, of one event.
        shift: ``(*event)``.
        factor: ``(*event)``, positive.
    """

    inner: Any
    shift: Array
    factor: Array

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.inner.event_shape

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """No rows."""
        return ()

    @property
    def support(self) -> Any:
        """The whole space."""
        return self.inner.support

    def expand(self, batch_shape: tuple[int, ...]) -> "Stretched":
        """The law itself: it has no rows.

        Raises:
            ValueError: rows are asked for.
        """
        if tuple(batch_shape):
            raise ValueError(f"batch_shape: got {batch_shape}, expected (): a diagnosis is of one law.")
        return self

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws ``(*sample_shape, *event)``."""
        return self.shift + self.factor * self.inner.sample(key, sample_shape)

    def log_prob(self, value: Array) -> Array:
        """Log density of each row of events."""
        return self.inner.log_prob((value - self.shift) / self.factor) - jnp.sum(jnp.log(self.factor))


def widened(reference: Any, draws: Any, found: Any) -> Stretched:
    """A start that covers its former self and what was found from there.

    In every coordinate its standard deviation is half the length of the interval that holds both means, and two standard
    deviations to either side of each.

    Args:
        reference: Distribution of one event, on the whole space.
        draws: Its draws, ``(draw, *event)``.
        found: Where particles ended, ``(particle, *event)``, finite.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> base = dist.Normal(0.0, 1.0)
        >>> draws = np.random.default_rng(0).normal(size=1000)
        >>> wide = widened(base, draws, draws + 10.0)
        >>> abs(float(wide.shift) - 5.0) < 0.5, abs(float(wide.factor) - 7.0) < 0.5
        (True, True)
        >>> bool(jnp.isclose(wide.log_prob(jnp.array(1.0)), dist.Normal(wide.shift, wide.factor).log_prob(1.0)))
        True
    """
    means, spreads = (np.stack([f(np.asarray(x, np.float64), 0) for x in (draws, found)]) for f in (np.mean, np.std))
    low, high = (means - REACH * spreads).min(axis=0), (means + REACH * spreads).max(axis=0)
    factor = 0.5 * (high - low) / spreads[0]
    shift = 0.5 * (high + low) - factor * means[0]
    like = jnp.result_type(float)
    return Stretched(reference, jnp.asarray(shift, like), jnp.asarray(factor, like))
