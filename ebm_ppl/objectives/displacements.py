"""What transport objectives share: pairs of noise and data, points between them, and the slope that an energy has there."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from optax.assignment import hungarian_algorithm

from ebm_ppl.checks import check_probability
from ebm_ppl.objectives.domains import check_whole_space, flat_rows
from ebm_ppl.objectives.noise_contrastive import Noise, check_events
from ebm_ppl.proposals import sample_and_log_prob
from ebm_ppl.types import Array, Batch, Event, Key, Scalar

TimePotential = Callable[[Scalar, Event], Scalar]
"""Energy ``(time, event) -> scalar`` of one event at a time in [0, 1], 0 for noise and 1 for data."""

Coupling = Literal["independent", "optimal"]


def matching_loss(
    loss: str,
    potential: Callable[..., Scalar],
    batch: Batch,
    key: Key,
    noise: Noise,
    coupling: Coupling,
    *,
    time_dependent: bool = False,
    last_time: float | Array = 1.0,
    magnitude: Callable[[Array], Array] = jnp.ones_like,
) -> Scalar:
    """``mean |grad U(t, x_t) - magnitude(t) (x_0 - x_1)|^2``, what all transport objectives have in common.

    Args:
        loss: Name of the loss, for errors.
        potential: ``U(t, x)`` or ``U(x)``.
        batch: Rows ``x_1``.
        key: Random key.
        noise: Law of ``x_0``.
        coupling: How draws and rows are paired.
        time_dependent: Whether the energy takes the time.
        last_time: Times are uniform between 0 and this.
        magnitude: Factor of the displacement at each time ``(row,)``.

    Example:
        >>> import numpyro.distributions as dist
        >>> energy, batch = (lambda x: -x), jnp.ones(4)
        >>> float(matching_loss("a loss", energy, batch, jax.random.key(0), dist.Delta(0.0), "independent"))
        0.0
    """

    def energy(time: Scalar, event: Array) -> Scalar:
        return potential(time, event) if time_dependent else potential(event)

    zero = jnp.zeros(())
    flat = flat_rows(loss, lambda x: energy(zero, x), batch)
    check_whole_space(loss, potential, flat, "Transform the rows to the whole space first.")
    rows = check_events(lambda x: energy(zero, x), batch, "noise", noise)
    noise_key, time_key = jax.random.split(key)
    draws = jax.lax.stop_gradient(sample_and_log_prob(noise, noise_key, rows.shape[0])[0]).astype(rows.dtype)
    draws, rows = coupled(coupling, draws, rows)
    check_probability("last_time", last_time)
    times = jax.random.uniform(time_key, (rows.shape[0],), rows.dtype) * last_time

    def row_loss(time: Array, draw: Array, row: Array) -> Scalar:
        slope = jax.grad(energy, argnums=1)(time, (1.0 - time) * draw + time * row)
        return jnp.sum((slope - magnitude(time) * (draw - row)) ** 2)

    return jnp.mean(jax.vmap(row_loss)(times, draws, rows))


def coupled(coupling: Coupling, draws: Array, rows: Array) -> tuple[Array, Array]:
    """Pair draws with rows: as they come, or at the least total squared distance.

    Args:
        coupling: ``"independent"`` or ``"optimal"``, an assignment by the Hungarian algorithm.
        draws: ``(row, *event)``.
        rows: ``(row, *event)``.

    Raises:
        ValueError: an unknown ``coupling``.

    Example:
        >>> draws, rows = coupled("optimal", jnp.array([0.0, 5.0]), jnp.array([6.0, 1.0]))
        >>> (rows - draws).tolist()
        [1.0, 1.0]
    """
    if coupling == "independent":
        return draws, rows
    if coupling != "optimal":
        raise ValueError(f"coupling: got {coupling!r}, expected 'independent' or 'optimal'.")
    start, end = (jax.lax.stop_gradient(x.reshape(x.shape[0], -1)) for x in (draws, rows))
    # Of |x_0 - x_1|^2 only the cross term depends on the pairing; without the rest no (row, row, dim) array is made.
    cost = -(start - start.mean(axis=0)) @ (end - end.mean(axis=0)).T
    index, partner = hungarian_algorithm(cost - cost.min())
    return draws[index], rows[partner]
