"""The kernel Stein discrepancy: how far the data are from balancing the forces of the energy, smoothed by a kernel."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_one, check_potential, is_traced
from ebm_ppl.objectives.domains import check_whole_space, flat_rows
from ebm_ppl.types import Array, Batch, Event, Key, Potential, Scalar

Statistic = Literal["u", "v"]


def _is_positive(value: Array) -> Array:
    return jnp.isfinite(value) & (value > 0.0)


def minimum_stein_discrepancy(
    potential: Potential,
    batch: Batch,
    key: Key,
    *,
    bandwidth: Any = None,
    exponent: Any = 0.5,
    statistic: Statistic = "u",
    diffusion: Callable[[Event], Scalar] | None = None,
) -> Scalar:
    """The squared kernel Stein discrepancy between the rows and the model, with an inverse multiquadric kernel.

    With ``s = -grad U`` and ``k(x, y) = (1 + |x - y|^2 / bandwidth^2)^-exponent``, the mean over pairs of rows of

        ``s(x)'s(y) k + s(x)' grad_y k + s(y)' grad_x k + tr grad_x grad_y k``.

    For data of score ``s_p`` its expectation is ``E_p E_p [ (s - s_p)(x)' k(x, y) (s - s_p)(y) ]``, zero at the truth
    alone. One gradient of the energy per row is needed and no second derivative; memory grows with the square of the rows.
    A diffusion ``m(x)`` puts ``m(x) k(x, y) m(y)`` in the kernel's place: one that falls with the distance from the bulk of
    the data makes the estimate robust against outliers. Like every loss that sees the energy only through its gradient at
    the data, this one hardly sees how the mass is divided between modes that are far apart.

    Args:
        potential: Energy of one event, differentiable, on the whole space.
        batch: Rows ``(row, *event)``, or a pytree of such arrays.
        key: Not used.
        bandwidth: Length scale of the kernel in the units of the events; the median distance of the rows of this batch when
            ``None``. Give a number where losses of several batches are compared.
        exponent: Between 0 and 1 the discrepancy controls convergence in law; larger kernels ignore mass far away.
        statistic: ``"u"`` is the mean over pairs of different rows, unbiased, and may be negative; ``"v"`` has every row
            paired with itself too, is at least zero, and biased: without a diffusion a row's own term is
            ``|s|^2 + 2 exponent dim / bandwidth^2``, which favours flat energies.
        diffusion: ``m``, a positive smooth function of one event; 1 everywhere when ``None``.

    Returns:
        The loss.

    Raises:
        TypeError: integer rows, or options that are not numbers.
        ValueError: an unknown statistic, one row for ``"u"``, an option that is not positive, rows that all coincide with
            ``bandwidth=None``, or a support with a boundary.

    Example:
        >>> import functools, jax, jax.numpy as jnp
        >>> loss = functools.partial(minimum_stein_discrepancy, lambda x: 0.5 * x**2, bandwidth=2.0)
        >>> round(float(jax.jit(loss)(jnp.array([-1.0, 1.0]), jax.random.key(0))), 4)
        -1.1049

    References:
        Barp, Briol, Duncan, Girolami, Mackey (2019), Minimum Stein discrepancy estimators, arXiv:1906.08283, section 2;
        Gorham, Mackey (2017), Measuring sample quality with kernels, arXiv:1703.01717, for the kernel.
    """
    if statistic not in get_args(Statistic):
        raise ValueError(f"statistic: got {statistic!r}, expected one of {list(get_args(Statistic))}.")
    exponent = check_one("exponent", exponent, _is_positive, "a finite number > 0")
    flat = flat_rows("minimum_stein_discrepancy", potential, batch)
    check_whole_space(
        "minimum_stein_discrepancy",
        potential,
        flat,
        "Transform the events to the whole space, or use energy_discrepancy.",
    )
    rows = flat.rows
    num_rows = rows.shape[0]
    if num_rows < 2 and (statistic == "u" or bandwidth is None):
        raise ValueError(
            "batch: got 1 row, expected at least 2, whose pairs the statistic and the bandwidth are made of."
        )
    if bandwidth is None:
        length = median_distance(rows)
    else:
        length = check_one("bandwidth", bandwidth, _is_positive, "a finite number > 0").astype(rows.dtype)
    score = -jax.vmap(jax.grad(flat.energy))(rows)
    scale = jnp.ones(num_rows, rows.dtype)
    if diffusion is not None:
        check_potential(diffusion, flat.unravel(rows[0]), name="diffusion")
        scale, slope = jax.vmap(jax.value_and_grad(lambda x: diffusion(flat.unravel(x))))(rows)
        score = scale[:, None] * score + slope
    pairs = stein_kernel(rows, score, scale, length, exponent.astype(rows.dtype))
    total = jnp.sum(pairs)
    if statistic == "v":
        return total / num_rows**2
    return (total - jnp.trace(pairs)) / (num_rows * (num_rows - 1))


def stein_kernel(rows: Array, score: Array, scale: Array, length: Array, exponent: Array) -> Array:
    """The Stein kernel of all pairs ``(row, row)``, with ``score = m s + grad m`` and ``scale = m``."""
    squared = _squared_distances(rows) / length**2
    base = 1.0 + squared
    kernel = base**-exponent
    # grad_x k = slope (x - y) and grad_y k = -slope (x - y)
    slope = -2.0 * exponent * base ** (-exponent - 1.0) / length**2
    mixed = -slope * rows.shape[1] - 4.0 * exponent * (exponent + 1.0) * base ** (-exponent - 2.0) * squared / length**2
    centred = rows - rows.mean(axis=0)
    along = score @ centred.T  # s(x_i)'x_j
    own = jnp.diagonal(along)
    forces = scale[:, None] * (along.T - own) - scale * (own[:, None] - along)  # m(x) s(y)'(x - y) - m(y) s(x)'(x - y)
    return (score @ score.T) * kernel + slope * forces + scale[:, None] * scale * mixed


def _squared_distances(rows: Array) -> Array:
    """Squared distances of all pairs; in products of centred rows, so that memory does not grow with the event."""
    centred = rows - rows.mean(axis=0)
    lengths = jnp.sum(centred**2, axis=1)
    squared = lengths[:, None] + lengths - 2.0 * centred @ centred.T
    return jnp.where(jnp.eye(len(rows), dtype=bool), 0.0, jnp.maximum(squared, 0.0))


def median_distance(rows: Array) -> Array:
    """Median of the distances of all pairs of rows."""
    pairs = np.triu_indices(rows.shape[0], 1)
    median = jnp.sqrt(jnp.median(_squared_distances(rows)[pairs]))
    if not is_traced(median) and not float(median) > 0.0:
        raise ValueError(
            "bandwidth: got None with rows half of whose pairs coincide, expected rows that differ. Pass bandwidth=1.0, or "
            "what is typical of their distances."
        )
    return jax.lax.stop_gradient(median)
