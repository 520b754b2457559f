"""Transport objectives: the gradient of an energy is matched to the velocities that carry noise to data.

No chain is run and no normaliser appears. What is learned is a velocity field ``-grad U``, and only sometimes a density:

* :func:`potential_flow_matching` of an energy of time learns the velocity of a flow from noise to data, as far as it is a
  gradient. Density and samples come from integrating the flow; ``exp(-U)`` is the density of nothing.
* :func:`potential_flow_matching` of an energy without time learns the average of those velocities over times. Its flow need
  not end at the data, and there is no density.
* :func:`equilibrium_matching` learns an average displacement from data, falling to zero near them. Low energy means close
  to data; its depths are no log densities.
* ``energy_matching`` learns the same kind of transport in its warm-up, without a density. With its contrastive phase
  ``exp(-U / temperature) / Z`` is a model of the data, as good as the balance of the two terms lets it be.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count, check_one, check_positive, check_potential, check_rows
from ebm_ppl.objectives.displacements import Coupling, TimePotential, matching_loss
from ebm_ppl.objectives.noise_contrastive import Noise
from ebm_ppl.types import Array, Batch, Event, Key, Potential, Scalar


class PiecewiseTime(eqx.Module):
    """A function of a whole number and an event, as one of a time in [0, 1]: constant on ``num_times`` equal intervals.

    It makes a :class:`ebm_ppl.diffusion.ValueNetwork` with ``num_steps = num_times - 1`` a time-dependent potential.

    Args:
        function: Any callable pytree ``(index, event) -> scalar``.
        num_times: Number of intervals.

    Raises:
        TypeError: ``function`` is not callable.
        ValueError: ``num_times < 1``.

    Example:
        >>> import jax.numpy as jnp
        >>> potential = PiecewiseTime(lambda index, x: index * x, 4)
        >>> float(potential(0.6, jnp.array(1.0))), float(potential(1.0, jnp.array(1.0)))
        (2.0, 3.0)
    """

    function: Callable[[int | Array, Event], Scalar]
    num_times: int = eqx.field(static=True)

    def __init__(self, function: Callable[[int | Array, Event], Scalar], num_times: int):
        if not callable(function):
            raise TypeError(f"function: got {type(function).__name__}, expected a callable (index, event) -> scalar.")
        self.function = function
        self.num_times = check_count("num_times", num_times)

    def __call__(self, time: float | Scalar, event: Event) -> Scalar:
        """Value of one event at one time."""
        index = jnp.floor(jnp.asarray(time) * self.num_times).astype(jnp.int32)
        return self.function(jnp.clip(index, 0, self.num_times - 1), event)


def potential_flow_matching(
    potential: Potential | TimePotential,
    batch: Batch,
    key: Key,
    *,
    noise: Noise,
    time_dependent: bool,
    coupling: Coupling = "independent",
) -> Scalar:
    """Flow matching with a velocity that is a gradient: ``mean |-grad U(t, x_t) - (x_1 - x_0)|^2``.

    ``x_t = (1 - t) x_0 + t x_1`` for a draw ``x_0`` of the noise, a row ``x_1`` and a uniform time ``t``. Over all vector
    fields the minimum is ``v(t, x) = E[x_1 - x_0 | x_t = x]``, whose flow carries noise to data; over gradients it is the
    nearest gradient to it. With ``coupling="optimal"`` draws and rows are paired at the least total squared distance within
    the batch, and as batches grow the velocity becomes a gradient.

    With ``time_dependent=True`` the energy is ``U(t, x)``, and samples and densities come from integrating the flow
    (:func:`follow_flow`); ``exp(-U)`` is the density of nothing. Otherwise the energy is ``U(x)`` and learns the average of
    the velocities through each point, whose flow need not end at the data.

    Args:
        potential: ``U(t, x)`` with ``t`` a floating scalar, such as :class:`PiecewiseTime`, or ``U(x)``.
        batch: Rows ``(row, *event)``, one floating array.
        key: Random key.
        noise: Law of ``x_0``, on the whole space.
        time_dependent: Which of the two signatures the energy has.
        coupling: How draws and rows are paired. ``"optimal"`` costs up to the cube of the rows.

    Returns:
        The loss: a squared norm, averaged over rows.

    Raises:
        TypeError: rows are not floating, ``noise`` is no distribution, or the energy is not real floating.
        ValueError: an unknown ``coupling``, a support with a boundary, or the energy does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> def energy(x): return -2.0 * x
        >>> loss = potential_flow_matching(
        ...     energy, jnp.full(4, 2.0), jax.random.key(0), noise=dist.Delta(0.0), time_dependent=False)
        >>> float(loss)
        0.0

    References:
        Lipman, Chen, Ben-Hamu, Nickel, Le (2023), Flow matching for generative modeling, arXiv:2210.02747, equations 9 and
        23; Tong, Fatras, Malkin, Huguet, Zhang, Rector-Brooks, Wolf, Bengio (2024), arXiv:2302.00482, section 3.2
        (couplings within a batch).
    """
    return matching_loss(
        "potential_flow_matching", potential, batch, key, noise, coupling, time_dependent=time_dependent
    )


def equilibrium_matching(
    potential: Potential,
    batch: Batch,
    key: Key,
    *,
    noise: Noise,
    decay_start: float = 0.8,
    gradient_scale: float | Array = 4.0,
) -> Scalar:
    """Equilibrium matching with an explicit energy (EqM-E): ``mean |grad U(x_t) - c(t) (x_0 - x_1)|^2``, without times.

    ``x_t = (1 - t) x_0 + t x_1`` for a draw ``x_0`` of the noise, a row ``x_1`` and a uniform ``t`` that the energy is not
    told. ``c(t) = s min(1, (1 - t) / (1 - a))`` falls to zero at the data, so that they are stationary points. The minimum
    over all vector fields is ``E[c(t) (x_0 - x_1) | x_t = x]``.

    Samples are found by descending ``U`` from noise. ``U`` is NOT ``-log p``: its gradients are distances to data and its
    values carry no mode weights. Take it for a place to start, a penalty or a rank of outliers; to have a density, go on
    with a likelihood objective.

    Args:
        potential: Energy of one event.
        batch: Rows ``(row, *event)``, one floating array.
        key: Random key.
        noise: Law of ``x_0``, on the whole space.
        decay_start: ``a`` in [0, 1): where the gradients begin to fall; 0 is linear decay.
        gradient_scale: ``s > 0``; it scales the energy.

    Returns:
        The loss: a squared norm, averaged over rows.

    Raises:
        TypeError: rows are not floating, ``noise`` is no distribution, or the energy is not real floating.
        ValueError: an option is out of range, a support has a boundary, or the energy does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> loss = equilibrium_matching(lambda x: 0.0 * x, jnp.full(4, 1.0), jax.random.key(0),
        ...     noise=dist.Delta(0.0), decay_start=0.0, gradient_scale=1.0)
        >>> bool(0.0 < loss < 1.0)  # the mean of (1 - t)^2
        True

    References:
        Wang, Du (2025), Equilibrium matching: generative modeling with implicit energy-based models, arXiv:2510.02300 (the
        truncated decay, and the variant with an explicit energy).
    """
    decay = check_one("decay_start", decay_start, lambda x: (x >= 0.0) & (x < 1.0), "a number in [0, 1)")
    scale = check_positive("gradient_scale", gradient_scale)

    def magnitude(time: Array) -> Array:
        return scale.astype(time.dtype) * jnp.minimum(1.0, (1.0 - time) / (1.0 - decay.astype(time.dtype)))

    return matching_loss("equilibrium_matching", potential, batch, key, noise, "independent", magnitude=magnitude)


def follow_flow(potential: Potential | TimePotential, start: Array, *, num_steps: int, time_dependent: bool) -> Array:
    """Carry events along the velocity ``-grad U`` from time 0 to 1, by the midpoint rule.

    Args:
        potential: Trained by :func:`potential_flow_matching`.
        start: Draws of the noise, ``(event_count, *event)``.
        num_steps: Steps; the error falls with their square.
        time_dependent: Whether the energy takes the time.

    Returns:
        Events at time 1, ``(event_count, *event)``, differentiable.

    Raises:
        TypeError: ``num_steps`` is not a whole number, ``start`` not a real floating array, or the energy not one.
        ValueError: ``num_steps < 1``, no events or NaN among them, or the energy does not fit one event.

    Example:
        >>> import jax.numpy as jnp
        >>> end = follow_flow(lambda t, x: -2.0 * t * x, jnp.zeros(3), num_steps=4, time_dependent=True)
        >>> end.tolist()
        [1.0, 1.0, 1.0]
    """
    num_steps = check_count("num_steps", num_steps)
    start = check_rows("start", start)
    first, time = jax.ShapeDtypeStruct(start.shape[1:], start.dtype), jax.ShapeDtypeStruct((), start.dtype)
    if not callable(potential):
        raise TypeError(f"potential: got {type(potential).__name__}, expected a callable energy.")
    at_time: Any = potential  # which of the two kinds it is, the flag says
    energy: Any = (lambda event, time: at_time(time, event)) if time_dependent else potential
    check_potential(energy, first, arguments=(time,) if time_dependent else ())
    slope = jax.vmap(jax.grad(potential, argnums=1 if time_dependent else 0), (None, 0) if time_dependent else 0)

    def velocity(time: Array, events: Array) -> Array:
        return -slope(time, events) if time_dependent else -slope(events)

    def step(events: Array, time: Array) -> tuple[Array, None]:
        halfway = events + 0.5 / num_steps * velocity(time, events)
        return events + velocity(time + 0.5 / num_steps, halfway) / num_steps, None

    times = jnp.arange(num_steps, dtype=start.dtype) / num_steps
    return jax.lax.scan(step, start, times)[0]
