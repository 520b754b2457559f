"""log Z by annealed importance sampling from a distribution that can be sampled exactly."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count, is_traced
from ebm_ppl.normalizer.annealing import Particles, anneal
from ebm_ppl.normalizer.events import check_site
from ebm_ppl.normalizer.result import LogNormalizer, from_log_weights
from ebm_ppl.normalizer.unconstrained import (
    coding_of,
    constrain,
    holds_tracers,
    mean_slope,
    point_shape,
    row_densities,
    sample_inverse,
    unconstrain,
)
from ebm_ppl.regions import bounds_of
from ebm_ppl.types import Array, Kernel, Key


def annealed_importance(
    key: Key,
    ebm: Any,
    *,
    reference: Any = None,
    kernel: Kernel,
    num_particles: int = 1000,
    num_temperatures: int = 100,
    num_steps: int = 1,
) -> LogNormalizer:
    """``log Z`` by annealed importance sampling from the base, one independent estimate per row.

    ``Z`` is estimated without bias, and so ``log Z`` from below: ``E[value] <= log Z``. The gradient of ``value`` is the
    weighted mean of the gradient of ``log base - U`` over the particles, which tends to that of ``log Z``; it is not the
    derivative of the estimate, and no gradient flows through the chains.

    Args:
        key: Random key.
        ebm: The EBM. Particles move in unconstrained space, or on the events themselves where the support is discrete.
        reference: Normalised distribution on the support of the EBM that can be sampled, where the annealing starts; the
            base when ``None``.
        kernel: From :mod:`ebm_ppl.kernels`, with an accept step; its step size holds at every temperature.
        num_particles: Independent particles per row.
        num_temperatures: Intermediate densities between the start and the EBM, ``>= 0``; 0 is plain importance sampling.
        num_steps: Kernel steps at each of them.

    Returns:
        The estimate, ``reliable`` where all weights are finite and ``ess >= num_particles / 10``. A mode that no particle
        reached leaves no trace in either.

    Raises:
        TypeError: a count is not a whole number.
        ValueError: a count is too small, or the reference cannot be sampled, has another event shape, or does not cover the
            support.
        NotImplementedError: the transform to the support is not one to one.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 2.0 * x, dist.Exponential(1.0))  # Z = 1/3
        >>> kernel = ebm_ppl.kernels.mala(step_size=0.3)
        >>> result = annealed_importance(jax.random.key(0), ebm, kernel=kernel, num_temperatures=20)
        >>> bool(abs(result.value - jax.numpy.log(1 / 3)) < 4 * result.standard_error), bool(result.reliable)
        (True, True)

    References:
        Neal (2001), arXiv:physics/9803008.
    """
    reference = check_reference(ebm, reference, num_particles)
    counts = _counts(num_particles, num_temperatures, num_steps)
    run = estimate_forward if is_traced(key, kernel, reference) or holds_tracers(ebm) else _compiled_estimate
    return run(key, ebm, reference, kernel, *counts)[0]


def annealed_particles(
    key: Key,
    ebm: Any,
    *,
    reference: Any = None,
    kernel: Kernel,
    num_particles: int = 1000,
    num_temperatures: int = 100,
    num_steps: int = 1,
) -> Particles:
    """The weighted particles behind :func:`annealed_importance`, which takes the same arguments.

    Returns:
        Events ``(particle, *batch_shape, *event_shape)`` with log weights and information ``(particle, *batch_shape)``.

    Raises:
        TypeError: see :func:`annealed_importance`.
        ValueError: see there.
        NotImplementedError: see there.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 2.0 * x, dist.Exponential(1.0))
        >>> kernel = ebm_ppl.kernels.mala(step_size=0.3)
        >>> particles = annealed_particles(jax.random.key(0), ebm, kernel=kernel, num_particles=50)
        >>> particles.position.shape, bool((particles.position > 0).all())
        ((50,), True)
    """
    reference = check_reference(ebm, reference, num_particles)
    counts = _counts(num_particles, num_temperatures, num_steps)
    run = _particles if is_traced(key, kernel, reference) or holds_tracers(ebm) else _compiled_particles
    return run(key, ebm, reference, kernel, *counts)


def _counts(num_particles: int, num_temperatures: int, num_steps: int) -> tuple[int, int, int]:
    # As Python's integers: NumPy's would be traced.
    return (
        check_count("num_particles", num_particles, 2),
        check_count("num_temperatures", num_temperatures, 0),
        check_count("num_steps", num_steps),
    )


def check_reference(ebm: Any, reference: Any, num_particles: int) -> Any:
    """Where particles of an EBM may start: the given distribution, or the base.

    Raises:
        TypeError: ``num_particles`` is not a whole number, ``ebm`` no EBM, or the reference no distribution.
        ValueError: there are too few particles, or the reference cannot be sampled, has another event shape, or does not
            cover the support.
        NotImplementedError: the transform to the support is not one to one.
    """
    check_count("num_particles", num_particles, 2)
    check_site(ebm)
    name, reference = ("base", ebm.base) if reference is None else ("reference", reference)
    if not all(hasattr(reference, attribute) for attribute in ("event_shape", "sample", "log_prob", "support")):
        raise TypeError(f"{name}: got {type(reference).__name__}, expected a NumPyro distribution.")
    if reference.event_shape != ebm.event_shape:
        raise ValueError(
            f"{name}: got event_shape {reference.event_shape}, expected that of the EBM, {ebm.event_shape}."
        )
    try:
        jax.eval_shape(lambda key: reference.sample(key), jax.random.key(0))
    except NotImplementedError as error:
        raise ValueError(
            f"{name}: got {type(reference).__name__}, which cannot be sampled, expected a normalised distribution to start "
            f"from. Pass reference=... with a distribution on the support {ebm.support}."
        ) from error
    points, events = _typical(ebm)
    if not all(_covers(reference, ebm, tried) for tried in (events, *_far_out(ebm))):
        raise ValueError(
            f"{name}: got the support {reference.support}, which does not cover the support {ebm.support} of the EBM; what "
            "it leaves out would be missing from Z. Pass reference=... with a distribution on the whole of it."
        )
    if not ebm.support.is_discrete and sample_inverse(ebm) is None:
        found = ebm.transform.inv(events)
        if not is_traced(found) and not bool(jnp.allclose(found, points, atol=0.1)):
            raise NotImplementedError(
                f"ebm: got the support {ebm.support}, whose transform is not one to one, expected one that "
                "is, or that has a method sample_inverse(key, event) to draw one of the points that go to an event."
            )
    return reference


def _typical(ebm: Any) -> tuple[Array, Array]:
    """A few unconstrained points, and their events."""
    if ebm.support.is_discrete:
        event = ebm.support.feasible_like(jnp.zeros(ebm.batch_shape + ebm.event_shape, int))
        return event, event
    shape = (*ebm.batch_shape, *point_shape(ebm))
    points = jnp.broadcast_to(jnp.array([-3.0, -1.0, 1.0, 3.0]).reshape(-1, *(1,) * len(shape)), (4, *shape))
    return points, ebm.transform(points)


def _far_out(ebm: Any) -> list[Array]:
    """Events near the edges of the support, or far away where it has none."""
    shape = ebm.batch_shape + ebm.event_shape
    if not ebm.support.is_discrete:
        points = (*ebm.batch_shape, *point_shape(ebm))
        return [ebm.transform(jnp.full(points, far)) for far in (-1e3, -30.0, -10.0, 10.0, 30.0, 1e3)]
    bounds = bounds_of(ebm.support)
    if bounds is None or is_traced(bounds):
        return []
    finite = [bound for bound in bounds if np.isfinite(bound).all()]
    return [jnp.broadcast_to(jnp.asarray(bound, int), shape) for bound in finite]


def _covers(reference: Any, ebm: Any, events: Array) -> bool:
    """Whether events are on the support of the reference, those apart that rounding has put outside the EBM's own."""
    is_finite = jnp.isfinite(events).all(axis=tuple(range(-len(ebm.event_shape), 0)))
    covered = reference.support(events) | ~ebm.support(events) | ~is_finite
    return is_traced(covered) or bool(jnp.all(covered))


def anneal_rows(
    key: Key,
    ebm: Any,
    reference: Any,
    kernel: Kernel,
    position: Array,
    num_temperatures: int,
    num_steps: int,
    *,
    is_reversed: bool = False,
) -> Particles:
    """Particles of every row in unconstrained space, ``(particle, *batch, ...)``, from the reference to the EBM.

    Args:
        key: Random key.
        ebm: The EBM.
        reference: See :func:`check_reference`.
        kernel: Moves the particles.
        position: Where they start, ``(particle, *batch, *point)``: draws of the reference.
        num_temperatures: As in :func:`ebm_ppl.normalizer.anneal`.
        num_steps: As there.
        is_reversed: From the EBM to the reference, the particles starting as draws of the EBM.
    """
    num_particles, num_rows = position.shape[0], math.prod(ebm.batch_shape)
    # Rows have kernels of their own: (particle, *batch, *point) -> (row, particle, *point).
    position = jnp.swapaxes(position.reshape(num_particles, num_rows, *point_shape(ebm)), 0, 1)

    def run_row(key: Key, row: Array, position: Array) -> Particles:
        start, end = row_densities(ebm, reference, row)
        if is_reversed:
            start, end = end, start
        return anneal(
            key,
            position,
            start,
            end,
            kernel=kernel,
            num_temperatures=num_temperatures,
            num_steps=num_steps,
            coding=coding_of(ebm),
        )

    def unflatten(x: Array) -> Array:
        return jnp.swapaxes(x, 0, 1).reshape(num_particles, *ebm.batch_shape, *x.shape[2:])

    particles = jax.vmap(run_row)(jax.random.split(key, num_rows), jnp.arange(num_rows), position)
    return jax.lax.stop_gradient(jax.tree.map(unflatten, particles))


def assess(particles: Particles, num_temperatures: int) -> LogNormalizer:
    """``log mean w`` of annealed particles with its error, reliable only where every move had an accept step."""
    result = from_log_weights(particles.log_weight, particles.info.num_gradients.sum(axis=0))
    return result._replace(reliable=result.reliable & is_adjusted(particles, num_temperatures))


def is_adjusted(particles: Particles, num_temperatures: int) -> Array:
    """Whether every move had an accept step, ``batch``.

    A move without one changes the law of its particle, and the weights do not know.
    """
    return ~jnp.isnan(particles.info.acceptance_rate).any(axis=0) | (num_temperatures == 0)


def _forward(key: Key, ebm: Any, reference: Any, kernel: Kernel, num_particles: int, *counts: int) -> Particles:
    draw_key, invert_key, run_key = jax.random.split(key, 3)
    draws = reference.expand(ebm.batch_shape).sample(draw_key, (num_particles,))
    return anneal_rows(run_key, ebm, reference, kernel, unconstrain(invert_key, ebm, draws), *counts)


def _particles(key: Key, ebm: Any, reference: Any, kernel: Kernel, *counts: int) -> Particles:
    particles = _forward(key, ebm, reference, kernel, *counts)
    return particles._replace(position=jax.lax.stop_gradient(constrain(ebm, particles.position)[0]))


def estimate_forward(
    key: Key, ebm: Any, reference: Any, kernel: Kernel, *counts: int
) -> tuple[LogNormalizer, Particles]:
    """:func:`annealed_importance` without its checks, and the particles behind it, in unconstrained space."""
    particles = _forward(key, ebm, reference, kernel, *counts)
    result = assess(particles, counts[1])
    weight = jax.nn.softmax(particles.log_weight, axis=0)
    return result._replace(value=result.value + mean_slope(ebm, particles.position, weight)), particles


_compiled_particles = eqx.filter_jit(_particles)
_compiled_estimate = eqx.filter_jit(estimate_forward)
