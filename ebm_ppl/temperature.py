"""Temperature bookkeeping: the density of a potential is ``exp(-U)``, at temperature one, everywhere in this package.

An energy can be learned at another temperature: chains with a drift and a noise that do not belong together sample
``exp(-U / T)``, and training makes *that* the density of the data. Used as it is, as a prior say, such an energy is a
density that nobody fitted. Two functions tell: one from the kernel, one from the data.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ebm_ppl.checks import as_positive_number
from ebm_ppl.objectives.domains import check_twice_differentiable, check_whole_space, flat_rows
from ebm_ppl.objectives.score import hessian_diagonal
from ebm_ppl.potentials import temper
from ebm_ppl.sampling import temperature_of
from ebm_ppl.types import Array, Batch, Potential, SamplerState


class Temperature(NamedTuple):
    """An estimate of a temperature with its standard error."""

    value: Array
    standard_error: Array


def fitted_temperature(potential: Potential, data: Batch) -> Temperature:
    """The temperature at which ``exp(-U / T)`` fits the data best, in the sense of score matching.

    For rows of ``exp(-U / T)`` integration by parts gives ``E |grad U|^2 = T E tr hess U``, and
    ``T = mean |grad U|^2 / mean tr hess U`` is the minimiser of score matching in ``T``. One means that the energy is a
    density of its data as it is.

    Args:
        potential: Energy of one event, on the whole space, twice differentiable.
        data: Held-out rows ``(row, *event)``, at least two.

    Returns:
        The estimate and its standard error over rows (delta method). Not a number where the mean curvature on the data is
        not positive: then no temperature makes the energy a density of them.

    Raises:
        TypeError: integer rows, or an energy that is not real floating.
        ValueError: rows that are not finite, fewer than two, or a support with a boundary.

    Example:
        >>> rows = 0.1 * jax.random.normal(jax.random.key(0), (4096, 2))
        >>> fit = fitted_temperature(lambda x: 0.5 * jnp.sum(x**2), rows)  # a variance of .01 under a curvature of 1
        >>> bool(abs(fit.value - 0.01) < 3.0 * fit.standard_error)
        True

    References:
        Hyvärinen (2005), Journal of Machine Learning Research 6, theorem 1, for the identity.
    """
    flat = flat_rows("fitted_temperature", potential, data)
    check_whole_space("fitted_temperature", potential, flat, "Transform the events to the whole space.")
    check_twice_differentiable("fitted_temperature", flat)
    if flat.rows.shape[0] < 2:
        raise ValueError(f"data: got {flat.rows.shape[0]} rows, expected at least two.")
    return _fitted(potential, data)


@eqx.filter_jit
def _fitted(potential: Potential, data: Batch) -> Temperature:
    flat = flat_rows("fitted_temperature", potential, data)
    gradient = jax.grad(flat.energy)

    def moments(x: Array) -> tuple[Array, Array]:
        return jnp.sum(gradient(x) ** 2), jnp.sum(hessian_diagonal(gradient, x))

    force, curvature = jax.lax.map(moments, flat.rows, batch_size=1024)
    mean_curvature = curvature.mean()
    value = jnp.where(mean_curvature > 0.0, force.mean() / mean_curvature, jnp.nan)
    error = (force - value * curvature).std(ddof=1) / (math.sqrt(force.size) * mean_curvature)
    return Temperature(value, error)


def check_temperature(potential: Potential, data: Batch, *, tolerance: float = 0.2) -> Temperature:
    """Refuse an energy that fits its data at another temperature than one, before it is used as a prior.

    Args:
        potential: The learned energy, with its base: :func:`ebm_ppl.potentials.tilt`.
        data: Held-out rows of what it was trained on.
        tolerance: How far from one the fitted temperature may be, as ``|log T|``.

    Returns:
        The fitted temperature.

    Raises:
        TypeError: an argument is of another type.
        ValueError: it is off by more than the tolerance and by more than four standard errors, or there is none; and
            what :func:`fitted_temperature` raises.

    Example:
        >>> rows = 0.1 * jax.random.normal(jax.random.key(0), (4096, 2))
        >>> check_temperature(lambda x: 0.5 * jnp.sum(x**2), rows)
        Traceback (most recent call last):
        ...
        ValueError: potential: it describes the data at temperature 0.01... ± 0.0001..., not at 1...
    """
    tolerance = as_positive_number("tolerance", tolerance)
    fit = fitted_temperature(potential, data)
    value, error = float(fit.value), float(fit.standard_error)
    if not np.isfinite(value):
        raise ValueError(
            "potential: its mean curvature on the data is not positive, so exp(-U / T) describes them at no temperature; "
            "expected an energy that was trained on them. Was its sign lost, or its base left out?"
        )
    if abs(math.log(max(value, 1e-300))) > tolerance and abs(value - 1.0) > 4.0 * error:
        raise ValueError(
            f"potential: it describes the data at temperature {value:.3g} ± {error:.2g}, not at 1: exp(-U) is not the "
            f"density that was learned. Use ebm_ppl.potentials.temper(potential, 1 / {value:.3g}), or train with a kernel "
            "that samples exp(-U), such as ebm_ppl.kernels.mala."
        )
    return fit


def at_unit_temperature(potential: Potential, sampler: SamplerState) -> Any:
    """The energy whose ``exp(-U)`` the sampler's kernel samples: ``U / T`` at the kernel's implied temperature ``T``.

    What an energy means that was trained with :func:`ebm_ppl.kernels.langevin` or ``short_run`` at other scales than
    ``noise_scale^2 = 2 step_size`` (and the bias of unadjusted steps left aside). With every other kernel the potential is
    returned as it is.

    Args:
        potential: The learned energy.
        sampler: The sampler it was trained with.

    Example:
        >>> import ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.langevin(step_size=0.1, temperature=0.5))
        >>> float(at_unit_temperature(lambda x: jnp.sum(x**2), sampler)(jnp.ones(2)))
        4.0
    """
    temperature = temperature_of(sampler)
    if temperature is None:
        return potential
    # A plain function is not a leaf that could cross jit inside the pytree that temper makes.
    return temper(potential if jax.tree.leaves(potential) != [potential] else Partial(potential), 1.0 / temperature)
