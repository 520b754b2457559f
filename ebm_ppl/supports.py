"""Supports that NumPyro cannot move on, or moves on with a seam: the circle and the sphere.

``biject_to(constraints.circular)`` cuts the circle at pi, so a mode there is split in two that no chain crosses;
``biject_to(constraints.sphere)`` does not exist. An :class:`~ebm_ppl.distributions.EBM` replaces both by constraints with
the same points and a map from unconstrained space that a chain can use. The maps are not one to one, but they push the
law of a chain onto the law of the site exactly, which is what MCMC and our own negative phase ask of a transform. (An
autoguide on the circle is refused: pulled back to the line, the density is improper.)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import ParameterFreeTransform

from ebm_ppl.types import Array, Key

# NumPyro exports the instances of these constraints, not their classes.
_Circle: Any = type(constraints.circular)
_Sphere: Any = type(constraints.sphere)


class _WrappedCircle(_Circle):
    """The circle, moved on by wrapping the real line round it."""


class _AmbientSphere(_Sphere):
    """The sphere, moved on through the space around it."""


wrapped_circle = _WrappedCircle()
ambient_sphere = _AmbientSphere()


class WrapTransform(ParameterFreeTransform):
    """``x = ((z + pi) mod 2 pi) - pi``: locally a translation, so its log Jacobian is zero.

    A potential pulled back through it is periodic, and a chain on the line is, after wrapping, a chain on the circle.

    Example:
        >>> round(float(WrapTransform()(4.0)), 4)
        -2.2832
    """

    domain: Any = constraints.real
    codomain: Any = wrapped_circle
    period = 2 * math.pi

    def __call__(self, x: Any) -> Array:
        """Wrap onto the circle."""
        return jnp.remainder(jnp.asarray(x) + math.pi, self.period) - math.pi

    def _inverse(self, y: Any) -> Array:
        return jnp.asarray(y)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Array:
        """Zero everywhere."""
        return jnp.zeros(jnp.shape(x))


class ProjectTransform(ParameterFreeTransform):
    """``x = y / |y|`` from space onto the unit sphere, with ``log |J| = -|y|^2 / 2 - log(2^(d/2 - 1) Gamma(d/2))``.

    The added term gives the length of ``y`` the law of a Gaussian vector's, independent of its direction: the density
    ``p(y / |y|) exp(log |J|)`` is normalised whenever ``p`` is normalised with respect to surface measure.

    Example:
        >>> [round(float(u), 2) for u in ProjectTransform()(jnp.array([3.0, 4.0]))]
        [0.6, 0.8]
    """

    domain: Any = constraints.real_vector
    codomain: Any = ambient_sphere

    def __call__(self, x: Any) -> Array:
        """Project onto the sphere."""
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def _inverse(self, y: Any) -> Array:
        # Any point of the ray would do; this length is typical.
        return jnp.sqrt(y.shape[-1]) * y

    def sample_inverse(self, key: Key, event: Array) -> Array:
        """A point of the ray through ``event``, its length drawn from the law that the log Jacobian gives it."""
        lengths = jnp.sqrt(2.0 * jax.random.gamma(key, event.shape[-1] / 2, event.shape[:-1]))
        return lengths[..., None] * event

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Array:
        """Log density of the length of ``x``, apart from the volume element that polar coordinates bring."""
        half = x.shape[-1] / 2
        return -0.5 * jnp.sum(x**2, axis=-1) - (half - 1) * math.log(2.0) - math.lgamma(half)


@biject_to.register(_WrappedCircle)
def _wrap(constraint: Any) -> WrapTransform:
    return WrapTransform()


@biject_to.register(_AmbientSphere)
def _project(constraint: Any) -> ProjectTransform:
    return ProjectTransform()


def movable(support: Any) -> Any:
    """The same support, with a transform that chains can move through.

    Example:
        >>> movable(constraints.circular) is wrapped_circle, movable(constraints.positive) is constraints.positive
        (True, True)
    """
    if isinstance(support, constraints.independent):
        inner = movable(support.base_constraint)
        if support.reinterpreted_batch_ndims == 0:
            return inner  # ImproperUniform wraps whatever it is given
        if inner is support.base_constraint:
            return support
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    if support is constraints.circular:
        return wrapped_circle
    if support is constraints.sphere:
        return ambient_sphere
    return support


def is_circular(support: Any) -> bool:
    """Whether a support is the circle, or a product of circles."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, _Circle)
