"""Score matching on the unit sphere, with the gradient and the Laplacian of the sphere."""

import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_unit_vectors
from ebm_ppl.objectives.domains import check_twice_differentiable, flat_rows
from ebm_ppl.objectives.score import hessian_diagonal
from ebm_ppl.types import Array, Batch, Key, Potential, Scalar


def spherical_score_matching(potential: Potential, batch: Batch, key: Key) -> Scalar:
    """Score matching for unit vectors: ``mean_n [ |P grad U(x_n)|^2 / 2 - Lap U(x_n) ]``.

    ``P = I - x x'`` is the projection onto the tangent space, and the Laplacian of the sphere is
    ``Lap U = tr hess U - x' hess U x - (d - 1) x . grad U``, with derivatives in the space around it: only the values
    of ``U`` on the sphere count. This is the limit of contrastive divergence with one step of
    :func:`ebm_ppl.kernels.sphere_langevin` from the data: its gradient is the step size times that of this loss, up to
    the square of the step size.

    Args:
        potential: Energy of one event ``(d,)``, twice differentiable on a neighbourhood of the sphere.
        batch: Rows ``(row, d)`` of unit vectors, which is checked where they are concrete. In :func:`ebm_ppl.fit` an
            energy whose support is the sphere sees to it: ``tilt(energy, ImproperUniform(constraints.sphere, (), (d,)))``.
        key: Not used; losses take one.

    Returns:
        The loss, the Fisher divergence on the sphere up to a constant of the data; it may be negative.

    Raises:
        TypeError: integer rows, or an energy that is not real floating.
        ValueError: rows that are not unit vectors, or an energy of ReLU units.

    Example:
        >>> pole = jnp.array([[0.0, 0.0, 1.0]])
        >>> float(spherical_score_matching(lambda x: x[2], pole, jax.random.key(0)))  # Lap U = -2 x_3
        2.0

    References:
        Hyvärinen (2005), Journal of Machine Learning Research 6; Mardia, Kent, Laha (2016), Score matching estimators
        for directional distributions, arXiv:1604.08470.
    """
    flat = flat_rows("spherical_score_matching", potential, batch)
    check_twice_differentiable("spherical_score_matching", flat)
    check_unit_vectors("batch", batch)
    gradient = jax.grad(flat.energy)

    def row_loss(x: Array) -> Scalar:
        slope, product = jax.jvp(gradient, (x,), (x,))
        radial = x @ slope
        tangent = slope - radial * x
        laplacian = jnp.sum(hessian_diagonal(gradient, x)) - x @ product - (x.size - 1) * radial
        return 0.5 * jnp.sum(tangent**2) - laplacian

    return jax.vmap(row_loss)(flat.rows).mean()
