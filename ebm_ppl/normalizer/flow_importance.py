"""log Z by importance sampling from a density that was fitted to the EBM, such as a flow trained on its chains."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count, is_traced
from ebm_ppl.normalizer.events import check_site
from ebm_ppl.normalizer.result import LogNormalizer, from_log_weights
from ebm_ppl.normalizer.unconstrained import check_integrable, holds_tracers, point_shape, row_densities
from ebm_ppl.proposals import check_proposal, log_density, sample_and_log_prob
from ebm_ppl.types import Array, Key


def flow_importance(key: Key, ebm: Any, proposal: Any, *, num_particles: int = 10_000) -> LogNormalizer:
    """``log Z = log E_q[base(x) exp(-U(x)) / q(x)]`` with draws of a density ``q`` that was made for it.

    ``Z`` is estimated without bias, and so ``log Z`` from below. No chain is run: one energy per particle. The estimate is
    only as good as the proposal's cover of the EBM. Where its tails are too light or a mode is missing, the weights have a
    heavy tail or no trace of it at all: ``pareto_khat`` sees the former, and nothing sees the latter.

    Args:
        key: Random key.
        ebm: The EBM, on a continuous support.
        proposal: Normalised density over UNCONSTRAINED points of one row, where chains of the EBM move (on R^d these are
            the events): a flow of :mod:`ebm_ppl.flows`, or a NumPyro or distrax distribution. All rows share it.
        num_particles: Independent draws, ``>= 2``.

    Returns:
        The estimate with ``ess`` and ``pareto_khat`` of its weights, ``reliable`` where all weights are finite,
        ``ess >= num_particles / 10`` and ``pareto_khat < 0.5``. Its ``value`` carries no gradient.

    Raises:
        TypeError: the support is discrete, or the proposal has no density.
        ValueError: ``num_particles < 2``, or the proposal cannot be sampled or has another shape than the points.
        NotImplementedError: the support is a circle, or a product of circles.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 2.0 * x**2, dist.Normal(0.0, 1.0))  # Z = 1 / sqrt(5)
        >>> result = flow_importance(jax.random.key(0), ebm, dist.Normal(0.0, 0.6))
        >>> bool(abs(result.value + 0.5 * jax.numpy.log(5.0)) < 4 * result.standard_error), bool(result.reliable)
        (True, True)

    References:
        Noé, Olsson, Köhler, Wu (2019), Boltzmann generators, arXiv:1812.01729; Grenioux, Moulines, Gabrie (2023),
        arXiv:2306.00684.
    """
    check_site(ebm)
    num_particles = check_count("num_particles", num_particles, 2)
    check_proposal("proposal", proposal)
    if ebm.support.is_discrete:
        raise TypeError(f"ebm: got the discrete support {ebm.support}, expected a continuous one.")
    check_integrable(ebm)
    draws, _ = jax.eval_shape(lambda key: sample_and_log_prob(proposal, key, 2), key)
    if draws.shape[1:] != point_shape(ebm):
        raise ValueError(
            f"proposal: got events of shape {draws.shape[1:]}, expected that of one unconstrained point, "
            f"{point_shape(ebm)}."
        )
    run = _estimate if is_traced(key, proposal) or holds_tracers(ebm) else _compiled_estimate
    return run(key, ebm, proposal, num_particles)


def _estimate(key: Key, ebm: Any, proposal: Any, num_particles: int) -> LogNormalizer:
    num_rows = math.prod(ebm.batch_shape)

    def log_weights(key: Key, row: Array) -> Array:
        points, _ = sample_and_log_prob(proposal, key, num_particles)
        _, target = row_densities(ebm, ebm.base, row)
        # The density at the point as it came out: rounding has moved it from where the flow thinks it drew it.
        return jax.vmap(target)(points) - log_density(proposal, points)

    log_weight = jax.vmap(log_weights, out_axes=1)(jax.random.split(key, num_rows), jnp.arange(num_rows))
    return from_log_weights(log_weight.reshape(num_particles, *ebm.batch_shape), jnp.zeros(ebm.batch_shape, jnp.int32))


_compiled_estimate = eqx.filter_jit(_estimate)
