"""A log Z that is left out, guarded against derivatives in which it is not constant."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ebm_ppl.distributions import EBM
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.types import Array


def leave_out(ebm: EBM) -> EBM:
    """The EBM with log Z = 0 and the policy ``"constant"``, for one that no site and no parameter moves.

    An argument of the model may still reach its energy, and a derivative with respect to that argument would lack the
    derivative of log Z without a sign of it: taking one raises ``UnknownNormalizerError``.
    """
    dtype = jnp.result_type(int if ebm.base.is_discrete else float)
    example = ebm.support.feasible_like(jnp.zeros(ebm.batch_shape + ebm.event_shape, dtype))
    return ebm.with_normalizer(_undifferentiable_zero(ebm.unnormalized_log_prob(example)), "constant")


@jax.custom_jvp
def _undifferentiable_zero(log_density: Array) -> Array:
    return jnp.zeros_like(log_density)


@partial(_undifferentiable_zero.defjvp, symbolic_zeros=True)
def _refuse_derivative(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (log_density,), (tangent,) = primals, tangents
    if not isinstance(tangent, SymbolicZero):
        raise UnknownNormalizerError(
            "got a derivative with respect to something that reaches the energy of an EBM from outside the model, as an "
            "argument does; log Z was left out as a constant, and is not constant in it. Declare it as numpyro.param and "
            "use negative_phase, train with ebm_ppl.fit, or use exact_normalizer."
        )
    return jnp.zeros_like(log_density), jnp.zeros_like(log_density)
