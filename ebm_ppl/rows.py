"""One row of an EBM as a potential: of an event on the support, or of a point of unconstrained space.

An EBM with a batch shape has one normaliser, and so one law, per row. Everything that simulates it works on one row and is
mapped over rows, so that no row ever sees another row's chains.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from ebm_ppl.proposals import can_sample
from ebm_ppl.supports import is_circular
from ebm_ppl.types import Array, Event, Key, Scalar


class RowPotential(eqx.Module):
    """Energy of one event of one row of an EBM, base included: ``U(x, c_row) - log base(x)``; infinite off the support.

    Attributes:
        ebm: The EBM.
        row: Index into its flattened batch shape.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x, c: 0.5 * (x - c) ** 2, dist.Normal(0.0, 1.0), condition=jnp.array([0.0, 2.0]))
        >>> energy = RowPotential(ebm, 1)(jnp.array(2.0))
        >>> bool(energy == -ebm.unnormalized_log_prob(jnp.array(2.0))[1])
        True
    """

    ebm: Any
    row: Any

    @property
    def support(self) -> Any:
        """Support of the EBM."""
        return self.ebm.support

    @property
    def site_values(self) -> tuple[int, ...] | None:
        """Coding that a discrete energy declares, or ``None``."""
        return getattr(self.ebm.potential, "site_values", None)

    @property
    def is_bare(self) -> bool:
        """Whether on the support there is nothing but the energy: a constant base, and no condition."""
        return isinstance(self.ebm.base, dist.ImproperUniform) and self.ebm.condition is None

    def __call__(self, event: Event) -> Scalar:
        """Energy of one event."""
        ebm, base = self.ebm, _shared(self.ebm.base)
        # A base with rows of its own is evaluated for all of them: a distribution cannot be sliced by row in general.
        value = jnp.broadcast_to(event, base.batch_shape + ebm.event_shape)
        inside, safe = ebm.inside(value)
        inside, log_base = self._own(inside), self._own(base.log_prob(safe))
        energy = ebm.potential(self._own(safe, ebm.event_dim), *self._condition())
        return jnp.where(inside, energy - log_base, jnp.inf)

    def on_support(self, event: Event) -> Scalar:
        """The energy of an event that a transform put on the support, where rounding may make the check say otherwise."""
        ebm, base = self.ebm, _shared(self.ebm.base)
        value = jnp.broadcast_to(event, base.batch_shape + ebm.event_shape)
        return ebm.potential(event, *self._condition()) - self._own(base.log_prob(value))

    def _condition(self) -> tuple[Any, ...]:
        if self.ebm.condition is None:
            return ()
        return (jax.tree.map(lambda c: c[self.row % c.shape[0]], self.ebm.condition),)

    def to_event(self, unconstrained: Event) -> tuple[Event, Scalar]:
        """One unconstrained point as an event, with the log absolute Jacobian there."""
        ebm, transform = self.ebm, self.ebm.transform
        shape = _shared(ebm.base).batch_shape
        point = jnp.broadcast_to(unconstrained, shape + jnp.shape(unconstrained))
        event = transform(point)
        log_jacobian = transform.log_abs_det_jacobian(point, event)
        # Transforms of a scalar support give one term per coordinate.
        log_jacobian = log_jacobian.reshape((*shape, -1)).sum(axis=-1)
        return self._own(event, ebm.event_dim), self._own(log_jacobian)

    def _own(self, values: Array, event_dim: int = 0) -> Array:
        """This row's entry of ``batch_shape + event``, or the only one where all rows share it."""
        batch_dim = values.ndim - event_dim
        if not batch_dim:
            return values
        event_shape = values.shape[batch_dim:]
        return jnp.broadcast_to(values, self.ebm.batch_shape + event_shape).reshape(-1, *event_shape)[self.row]


def _shared(base: Any) -> Any:
    """Rows that were expanded from one distribution share it."""
    while isinstance(base, dist.ExpandedDistribution) and not base.base_dist.batch_shape:
        base = base.base_dist
    return base


class RowReference(eqx.Module):
    """The base of one row, as a distribution over unconstrained points.

    Attributes:
        row: The row.
    """

    row: RowPotential

    def sample_and_log_prob(self, key: Key, num_samples: int) -> tuple[Array, Array]:
        """Draws ``(num_samples, *unconstrained)`` and their log densities."""
        ebm = self.row.ebm
        shape = _shared(ebm.base).batch_shape
        draws = _shared(ebm.base).sample(key, (num_samples,))
        if shape:
            draws = jnp.broadcast_to(draws, (num_samples, *ebm.batch_shape, *ebm.event_shape))
            draws = draws.reshape(num_samples, -1, *ebm.event_shape)[:, self.row.row]
        points = jax.vmap(self._point)(draws)
        return points, self.log_prob(points)

    def _point(self, event: Array) -> Array:
        ebm, rows = self.row.ebm, _shared(self.row.ebm.base).batch_shape
        points = ebm.transform.inv(jnp.broadcast_to(event, rows + ebm.event_shape))
        return self.row._own(points, points.ndim - len(rows))

    def log_prob(self, points: Array) -> Array:
        """Log density of each point, Jacobian included."""
        return jax.vmap(self._log_prob)(points)

    def _log_prob(self, point: Array) -> Array:
        event, log_jacobian = self.row.to_event(point)
        base = _shared(self.row.ebm.base)
        value = jnp.broadcast_to(event, base.batch_shape + self.row.ebm.event_shape)
        return self.row._own(base.log_prob(value)) + log_jacobian


class UnconstrainedPotential(eqx.Module):
    """Energy of a row in unconstrained space: ``U(T(z)) - log base(T(z)) - log |det dT/dz|``.

    Its Boltzmann law, pushed through ``T``, is the law of the row. A forgotten Jacobian has no symptom (Gamma(3, 2) becomes
    Gamma(2, 2)), which is why chains never see anything else.
    """

    row: RowPotential

    @property
    def reference(self) -> RowReference | None:
        """The base in unconstrained space; ``None`` where it cannot be sampled, or where many points are one event."""
        ebm = self.row.ebm
        if is_circular(ebm.support) or not can_sample(ebm.base) or hasattr(ebm.transform, "sample_inverse"):
            return None
        return RowReference(self.row)

    def __call__(self, unconstrained: Event) -> Scalar:
        """Energy of one unconstrained point."""
        event, log_jacobian = self.row.to_event(unconstrained)
        return self.row.on_support(event) - log_jacobian
