"""Auxiliary data of the exchange algorithm: one row for every row of an EBM site, drawn at the proposed parameters.

Everything here works on the EBM under the wrappers of its site. Its normaliser is the same whatever transform is applied
outside, so auxiliary rows need no transform; how often each row's normaliser counts (masks, plates) is read from the
wrappers.

References:
    Murray, Ghahramani, MacKay (2006), MCMC for doubly-intractable distributions, arXiv:1206.6848.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from ebm_ppl.distributions import EBM, find_ebms, is_ebm
from ebm_ppl.rows import RowPotential, UnconstrainedPotential
from ebm_ppl.sampling import advance, chains_at
from ebm_ppl.types import Array, Event, Kernel, Key, Potential, Scalar

WRAPPERS = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution, dist.TransformedDistribution)


class Auxiliary(NamedTuple):
    """How auxiliary data are drawn.

    Attributes:
        kernel: Moves inner chains and bridges.
        num_steps: Steps of every inner chain; ``None`` asks the EBM's own sampler for exact draws.
        num_bridges: Number ``K`` of bridges.
    """

    kernel: Kernel | None
    num_steps: int | None
    num_bridges: int

    def terms(self, key: Key, proposed: Any, current: Any, value: Array) -> tuple[Array, Scalar]:
        """Estimates of ``log Z(theta) / Z(theta')``, one per row of a site, from auxiliary rows ``y`` drawn at ``theta'``.

        Without bridges ``u(theta, y) - u(theta', y)``. With ``K`` bridges the rows move through the densities
        ``f_k = exp((1 - t_k) u(theta', .) + t_k u(theta, .))``, ``t_k = k / (K + 1)``, and the term is
        ``sum_k (u(theta, y_k) - u(theta', y_k)) / (K + 1)``.

        Args:
            key: Random key.
            proposed: The site's distribution at the proposal ``theta'``.
            current: The same at the current ``theta``.
            value: The site's value: it gives the number of rows, and inner chains their start.

        Returns:
            One term per row, masked as the site's log density is and of its shape, and the kernel's mean acceptance rate
            (NaN where no kernel ran).
        """
        (ebm,), (ebm_now,) = find_ebms(proposed), find_ebms(current)
        lead = jnp.broadcast_shapes(value.shape[: value.ndim - proposed.event_dim], proposed.batch_shape)
        rows = _rows(proposed, jnp.broadcast_to(value, lead + proposed.event_shape))
        draw_key, bridge_key = jax.random.split(key)
        rates = []
        if self.num_steps is None:
            rows = _exact_rows(draw_key, ebm, rows.shape[: rows.ndim - ebm.event_dim])
        else:
            # Rows that a mask drops may hold anything; where such a chain starts does not matter.
            rows = jnp.where(jnp.isfinite(rows), rows, ebm.support.feasible_like(rows))
            rows, rate = self._move(draw_key, ebm, ebm.inside(rows)[1], self.num_steps)
            rates.append(rate)

        def difference(rows: Array) -> Array:
            return ebm_now.unnormalized_log_prob(rows) - ebm.unnormalized_log_prob(rows)

        total = difference(rows)
        if self.num_bridges:

            def cross(carry: tuple[Array, Array], bridge: tuple[Key, Array]) -> tuple[tuple[Array, Array], Array]:
                (rows, total), (key, weight) = carry, bridge
                rows, rate = self._move(key, ebm, rows, 1, (ebm_now, weight))
                return (rows, total + difference(rows)), rate

            weights = jnp.arange(1, self.num_bridges + 1) / (self.num_bridges + 1)
            bridges = jax.random.split(bridge_key, self.num_bridges), weights
            (_, total), rate = jax.lax.scan(cross, (rows, total), bridges)
            total, rates = total / (self.num_bridges + 1), [*rates, rate.mean()]
        rate = jnp.stack(rates).mean() if rates else jnp.array(jnp.nan)
        return _counted(proposed, total), rate

    def _move(
        self, key: Key, ebm: EBM, rows: Array, num_steps: int, bridge: tuple[EBM, Array] | None = None
    ) -> tuple[Array, Array]:
        """Move every row by a chain of its own, under its own law."""
        assert self.kernel is not None
        kernel = self.kernel
        lead = rows.shape[: rows.ndim - ebm.event_dim]
        indices = jnp.arange(math.prod(ebm.batch_shape)).reshape(ebm.batch_shape)
        indices = jnp.broadcast_to(indices, lead).reshape(-1)
        start = jnp.asarray(ebm.transform.inv(rows))
        # An event on the boundary has no finite preimage.
        start = jnp.where(jnp.isfinite(start), start, 0.0)
        shape = start.shape

        def move_row(key: Key, index: Array, position: Array) -> tuple[Array, Array]:
            potential: Potential = UnconstrainedPotential(RowPotential(ebm, index))
            if bridge is not None:
                potential = _Bridge(RowPotential(ebm, index), RowPotential(bridge[0], index), bridge[1])
            sampler, info = advance(key, potential, chains_at(position[None], kernel), num_steps)
            return sampler.position[0], info.acceptance_rate[0]

        keys = jax.random.split(key, indices.size)
        position, rate = jax.vmap(move_row)(keys, indices, start.reshape(indices.size, *shape[len(lead) :]))
        return jnp.asarray(ebm.transform(position.reshape(shape))), rate.mean()


def _rows(fn: Any, value: Array) -> Array:
    """The value of a site as events of the EBM under its wrappers."""
    if is_ebm(fn):
        return value
    if isinstance(fn, dist.TransformedDistribution):
        for transform in reversed(fn.transforms):
            value = jnp.asarray(transform.inv(value))
    return _rows(fn.base_dist, value)


def _counted(fn: Any, rows: Array) -> Array:
    """One number per row of the EBM, summed and masked as the log density of its site is."""
    if is_ebm(fn):
        return rows
    rows = _counted(fn.base_dist, rows)
    if isinstance(fn, dist.MaskedDistribution):
        return jnp.where(fn._mask, rows, 0.0)
    if isinstance(fn, dist.Independent):
        return rows.sum(axis=tuple(range(-fn.reinterpreted_batch_ndims, 0)))
    if isinstance(fn, dist.TransformedDistribution):
        # A transform of scalars over a longer event: the terms of one event belong together.
        base = fn.base_dist
        return rows.sum(axis=tuple(range(len(fn.batch_shape) - len(base.batch_shape), 0)))
    return rows


def _exact_rows(key: Key, ebm: EBM, lead: tuple[int, ...]) -> Array:
    split = len(lead) - len(ebm.batch_shape)
    if lead[split:] == ebm.batch_shape:
        return jnp.asarray(ebm.sample(key, lead[:split]))
    return jnp.asarray(ebm.expand(lead).sample(key))


class _Bridge(eqx.Module):
    """Geometric mixture of one row's densities at ``theta'`` and ``theta``, in the unconstrained space of the former."""

    proposed: RowPotential
    current: RowPotential
    weight: Array

    def __call__(self, unconstrained: Event) -> Scalar:
        event, log_jacobian = self.proposed.to_event(unconstrained)
        return (1.0 - self.weight) * self.proposed(event) + self.weight * self.current(event) - log_jacobian
