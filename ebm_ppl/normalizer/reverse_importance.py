"""log Z from above: annealing from draws of the EBM back to a distribution whose Z is known."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count, is_traced
from ebm_ppl.normalizer.annealing import Particles
from ebm_ppl.normalizer.events import check_samples
from ebm_ppl.normalizer.importance import anneal_rows, assess, check_reference
from ebm_ppl.normalizer.result import LogNormalizer
from ebm_ppl.normalizer.unconstrained import holds_tracers, mean_slope, unconstrain
from ebm_ppl.types import Array, Kernel, Key

_TRIED = 256
"""Draws of the reference that are looked at, to see that it has no mass outside the support of the EBM."""


def reverse_annealed_importance(
    key: Key,
    ebm: Any,
    samples: Array,
    *,
    reference: Any = None,
    kernel: Kernel,
    num_temperatures: int = 100,
    num_steps: int = 1,
) -> LogNormalizer:
    """``log Z`` by annealed importance sampling from draws of the EBM back to its base: ``-log mean_i w_i``.

    Where the samples are exact draws of the EBM, ``E[mean w] = 1 / Z``, and so ``E[value] >= log Z``: an estimate from
    above, where :func:`annealed_importance` is one from below. Samples that miss a part of the mass may give a value that
    is too low without a sign, down to the log Z of the part that they saw. Draws of chains that started in one mode and
    stayed there are such samples.

    The gradient of ``value`` is the mean over the samples of the gradient of ``log base - U``: where they are exact draws,
    an unbiased estimate of that of ``log Z``. It is not the derivative of the estimate, and no gradient flows through the
    moves or into ``samples``.

    Args:
        key: Random key.
        ebm: The EBM.
        samples: Draws of the EBM, ``(sample, *batch_shape, *event_shape)``, at least 2, each the start of one particle.
        reference: Normalised distribution on the support of the EBM, where the annealing ends; the base when ``None``.
        kernel: From :mod:`ebm_ppl.kernels`, with an accept step; its step size holds at every temperature.
        num_temperatures: Intermediate densities between the EBM and the reference, ``>= 0``; 0 is the plain mean of
            ``reference / (base exp(-U))`` over the samples (reciprocal importance sampling).
        num_steps: Kernel steps at each of them.

    Returns:
        The estimate, ``reliable`` where all weights are finite, ``ess`` is at least a tenth of the samples, ``pareto_khat``
        is below 0.5 and the kernel has an accept step. None of them sees that samples are dependent or miss a mode: the
        standard error takes them for independent.

    Raises:
        TypeError: a count is not a whole number, or the samples are of another kind than the events.
        ValueError: a count is too small; the samples have another shape, or are NaN, infinite, outside the support or on
            its edge; the reference cannot be sampled, has another event shape, or another support than the EBM.
        NotImplementedError: the transform to the support is not one to one.

    Example:
        >>> import jax, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: 2.0 * x, dist.Exponential(1.0))  # Z = 1/3, and the law is Exponential(3)
        >>> samples = dist.Exponential(3.0).sample(jax.random.key(0), (1000,))
        >>> kernel = ebm_ppl.kernels.mala(step_size=0.3)
        >>> result = reverse_annealed_importance(jax.random.key(1), ebm, samples, kernel=kernel, num_temperatures=20)
        >>> bool(abs(result.value - jax.numpy.log(1 / 3)) < 4 * result.standard_error), bool(result.reliable)
        (True, True)

    References:
        Grosse, Ghahramani, Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo,
        arXiv:1511.02543, section 3; Burda, Grosse, Salakhutdinov (2015), arXiv:1412.8566 (the reverse of AIS).
    """
    samples, reference = check_reversal(key, ebm, samples, reference)
    counts = check_count("num_temperatures", num_temperatures, 0), check_count("num_steps", num_steps)
    is_inside = is_traced(key, samples, kernel, reference) or holds_tracers(ebm)
    run = estimate_reverse if is_inside else _compiled_estimate
    return run(key, ebm, samples, reference, kernel, *counts)[0]


def check_reversal(key: Key, ebm: Any, samples: Any, reference: Any) -> tuple[Array, Any]:
    """Where an annealing from draws of an EBM starts, and where it ends.

    Raises:
        TypeError: see :func:`reverse_annealed_importance`.
        ValueError: see there.
        NotImplementedError: see there.
    """
    samples = check_samples(ebm, samples)
    reference = check_reference(ebm, reference, samples.shape[0])
    _check_end(key, ebm, reference)
    return samples, reference


def _check_end(key: Key, ebm: Any, reference: Any) -> None:
    """The reference must have all of its mass on the support of the EBM: only there is its Z known to be one."""
    if reference is ebm.base:
        return
    draws = reference.expand(ebm.batch_shape).sample(jax.random.fold_in(key, 0), (_TRIED,))
    is_inside = ebm.support(draws)
    if not is_traced(is_inside) and not bool(jnp.all(is_inside)):
        raise ValueError(
            f"reference: got the support {reference.support} with mass outside the support {ebm.support} of the EBM, which "
            "annealing from the EBM never sees: log Z would be too large. Pass reference=... with a distribution on the "
            "support of the EBM, such as a truncated one."
        )


def estimate_reverse(
    key: Key, ebm: Any, samples: Array, reference: Any, kernel: Kernel, *counts: int
) -> tuple[LogNormalizer, Particles]:
    """:func:`reverse_annealed_importance` without its checks, and the particles behind it, in unconstrained space."""
    invert_key, run_key = jax.random.split(key)
    position = jax.lax.stop_gradient(unconstrain(invert_key, ebm, samples))
    particles = anneal_rows(run_key, ebm, reference, kernel, position, *counts, is_reversed=True)
    result = assess(particles, counts[0])
    weight = jnp.full_like(particles.log_weight, 1.0 / samples.shape[0])
    return result._replace(value=mean_slope(ebm, position, weight) - result.value), particles


_compiled_estimate = eqx.filter_jit(estimate_reverse)
