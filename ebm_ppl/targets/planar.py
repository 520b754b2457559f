"""The eight sets in the plane on which energies are usually shown, as exact densities with exact samplers.

Elsewhere these are recipes for drawing points; here each has a normalised density, so that a fitted energy has a best
possible likelihood to be compared with.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import i0e, log_ndtr
from numpyro.distributions import ImproperUniform, constraints

from ebm_ppl.targets.mixture import grid25, mixture_target
from ebm_ppl.targets.registry import name_hint
from ebm_ppl.targets.target import Target
from ebm_ppl.types import Array, Key, Scalar


def eight_gaussians() -> Target:
    """Eight equal Gaussians of standard deviation .354 on a circle of radius 2.83."""
    angles = np.arange(8) * math.pi / 4
    means = 4.0 / math.sqrt(2.0) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return _even("eight_gaussians", means, 0.5 / math.sqrt(2.0))


def two_modes() -> Target:
    """Two Gaussians of standard deviation .45 at (-2.75, 0) and (2.75, 0), with weights 1/3 and 2/3.

    They are twelve standard deviations apart: no row lies between them.
    """
    means = np.array([[-2.75, 0.0], [2.75, 0.0]])
    weights, scales = np.array([1.0, 2.0]) / 3.0, np.full(2, 0.45)
    return mixture_target("two_modes", weights, means, scales, 0.0, _moments(weights, means, 0.45))


def moons() -> Target:
    """Two interleaved half circles of radius 1.5, blurred by a Gaussian of standard deviation .15."""
    angles = (np.arange(64) + 0.5) * math.pi / 64
    upper = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    lower = np.stack([1.0 - np.cos(angles), 0.5 - np.sin(angles)], axis=1)
    return _even("moons", 1.5 * (np.concatenate([upper, lower]) - np.array([0.5, 0.25])), 0.15)


def spirals() -> Target:
    """Two arms that wind one and a half times round the origin out to radius 3.1, blurred by standard deviation .1."""
    turn = 3.0 * math.pi * np.sqrt((np.arange(200) + 0.5) / 200)
    arm = np.stack([-turn * np.cos(turn), turn * np.sin(turn)], axis=1) / 3.0
    return _even("spirals", np.concatenate([arm, -arm]), 0.1)


def _even(name: str, means: np.ndarray, scale: float) -> Target:
    """Equal components; closer to each other than their scale they are a blurred curve."""
    weights, scales = np.full(len(means), 1 / len(means)), np.full(len(means), scale)
    return mixture_target(name, weights, means, scales, 0.0, _moments(weights, means, scale))


def _moments(weights: np.ndarray, means: np.ndarray, scale: float) -> dict:
    mean, second = weights @ means, weights @ means**2 + scale**2
    return {
        "x[0]": (lambda x: x[0], float(mean[0])),
        "x[1]": (lambda x: x[1], float(mean[1])),
        "x[0]^2": (lambda x: x[0] ** 2, float(second[0])),
        "x[1]^2": (lambda x: x[1] ** 2, float(second[1])),
    }


class RingsPotential(eqx.Module):
    """``U(x) = -log mean_k p_k(x)``, ``p_k`` the uniform law on a circle of radius ``r_k`` blurred by ``N(0, s^2 I)``.

    ``p_k(x) = exp(-(|x| - r_k)^2 / 2 s^2) I0e(|x| r_k / s^2) / (2 pi s^2)``.
    """

    radii: Array
    scale: float

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        radius, radii = _norm(x), self.radii.astype(x.dtype)
        log_density = -0.5 * ((radius - radii) / self.scale) ** 2 + jnp.log(i0e(radius * radii / self.scale**2))
        return -jax.nn.logsumexp(log_density) + math.log(len(self.radii) * 2.0 * math.pi * self.scale**2)


def _norm(x: Array) -> Scalar:
    """``|x|``, with a gradient of zero at the origin, where it has none."""
    squared = jnp.sum(x**2)
    return jnp.where(squared == 0.0, 0.0, jnp.sqrt(jnp.where(squared == 0.0, 1.0, squared)))


def rings() -> Target:
    """Four circles of radii .75, 1.5, 2.25 and 3 with equal mass, blurred by standard deviation .1."""
    radii, scale = np.array([0.75, 1.5, 2.25, 3.0]), 0.1

    def sample(key: Key, n: int) -> Array:
        ring_key, angle_key, noise_key = jax.random.split(key, 3)
        radius = jax.random.choice(ring_key, jnp.asarray(radii), (n, 1))
        angle = jax.random.uniform(angle_key, (n, 1), maxval=2.0 * math.pi)
        circle = radius * jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)
        return circle + scale * jax.random.normal(noise_key, (n, 2))

    second = float(np.mean(radii**2)) / 2.0 + scale**2
    return _target(
        "rings",
        RingsPotential(jnp.asarray(radii), scale),
        sample,
        {"x[0]": (lambda x: x[0], 0.0), "x[0]^2": (lambda x: x[0] ** 2, second)},
    )


class CheckerboardPotential(eqx.Module):
    """``U(x) = -log mean_k q_k(x)``, ``q_k`` the uniform law on a square blurred by ``N(0, s^2 I)``: products of ``Phi``.

    Attributes:
        corners: Lower left corners, ``(square, 2)``.
        side: Length of their sides.
        scale: ``s``.
    """

    corners: Array
    side: float
    scale: float

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        low = (x - self.corners.astype(x.dtype)) / self.scale
        high = low - self.side / self.scale
        # Phi(low) - Phi(high), in the tail in which the logarithms differ most.
        above = low + high > 0.0
        larger, smaller = jnp.where(above, -high, low), jnp.where(above, -low, high)
        log_larger = log_ndtr(larger)
        log_side = log_larger + jnp.log1p(-jnp.exp(log_ndtr(smaller) - log_larger))
        log_density = jnp.sum(log_side, axis=1) - 2.0 * math.log(self.side)
        return -jax.nn.logsumexp(log_density) + math.log(len(self.corners))


def checkerboard() -> Target:
    """Every other square of side 2 of a board on [-4, 4]^2, eight of them, blurred by standard deviation .1."""
    side, scale = 2.0, 0.1
    places = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    corners = side * np.array(places, float) - 4.0

    def sample(key: Key, n: int) -> Array:
        square_key, place_key, noise_key = jax.random.split(key, 3)
        corner = jax.random.choice(square_key, jnp.asarray(corners), (n,))
        place = jax.random.uniform(place_key, (n, 2), maxval=side)
        return corner + place + scale * jax.random.normal(noise_key, (n, 2))

    second = float(np.mean((corners[:, 0] + side / 2.0) ** 2)) + side**2 / 12.0 + scale**2
    product = float(np.mean(np.prod(corners + side / 2.0, axis=1)))
    return _target(
        "checkerboard",
        CheckerboardPotential(jnp.asarray(corners), side, scale),
        sample,
        {"x[0]^2": (lambda x: x[0] ** 2, second), "x[0] x[1]": (lambda x: x[0] * x[1], product)},
    )


class PinwheelPotential(eqx.Module):
    """Gaussian arms, turned round the origin by an angle that grows with the radius, which leaves volumes as they are.

    ``U(x) = -log mean_k N(R(-a_k - t(|x|)) x; (m, 0), diag(s^2))`` with the arms' angles ``a_k`` and the twist
    ``t(r) = rate exp(r / 2)``.

    Attributes:
        angles: ``a_k``, ``(arm,)``.
        place: ``m``.
        scales: ``s``, along and across an arm.
        rate: Of the twist.
    """

    angles: Array
    place: float
    scales: Array
    rate: float

    def __call__(self, x: Array) -> Scalar:
        """Energy of one event."""
        turn = self.angles.astype(x.dtype) + self.rate * jnp.exp(_norm(x) / 2.0)
        along = jnp.cos(turn) * x[0] + jnp.sin(turn) * x[1]
        across = jnp.cos(turn) * x[1] - jnp.sin(turn) * x[0]
        scales = self.scales.astype(x.dtype)
        log_density = -0.5 * (((along - self.place) / scales[0]) ** 2 + (across / scales[1]) ** 2)
        return -jax.nn.logsumexp(log_density) + math.log(2.0 * math.pi * len(self.angles)) + jnp.log(scales).sum()


def pinwheel() -> Target:
    """Five twisted arms between the radii 1 and 3."""
    angles, place, scales, rate = np.arange(5) * 2.0 * math.pi / 5.0, 2.0, np.array([0.6, 0.15]), 0.25

    def sample(key: Key, n: int) -> Array:
        arm_key, noise_key = jax.random.split(key)
        straight = jnp.array([place, 0.0]) + jnp.asarray(scales) * jax.random.normal(noise_key, (n, 2))
        radius = jnp.linalg.norm(straight, axis=1)
        turn = jax.random.choice(arm_key, jnp.asarray(angles), (n,)) + rate * jnp.exp(radius / 2.0)
        x, y = straight.T
        return jnp.stack([jnp.cos(turn) * x - jnp.sin(turn) * y, jnp.sin(turn) * x + jnp.cos(turn) * y], axis=1)

    second = (place**2 + float(np.sum(scales**2))) / 2.0
    return _target(
        "pinwheel",
        PinwheelPotential(jnp.asarray(angles), place, jnp.asarray(scales), rate),
        sample,
        {"x[0]": (lambda x: x[0], 0.0), "x[0]^2": (lambda x: x[0] ** 2, second)},
    )


def _target(name: str, potential: eqx.Module, sample: Callable[[Key, int], Array], expectations: dict) -> Target:
    base = ImproperUniform(constraints.real_vector, (), (2,))
    return Target(name, potential, base, 0.0, sample, expectations)  # pyright: ignore[reportArgumentType]


_PLANAR: dict[str, Callable[[], Target]] = {
    "checkerboard": checkerboard,
    "eight_gaussians": eight_gaussians,
    "grid25": lambda: grid25(spacing=1.5, scale=0.15, log_normalizer=0.0),
    "moons": moons,
    "pinwheel": pinwheel,
    "rings": rings,
    "spirals": spirals,
    "two_modes": two_modes,
}


def planar_names() -> tuple[str, ...]:
    """Names of the sets in the plane, sorted; see :func:`get_planar`.

    Example:
        >>> len(planar_names())
        8
    """
    return tuple(sorted(_PLANAR))


def get_planar(name: str) -> Target:
    """One of the eight standard sets in the plane, as a normalised density: its ``log_normalizer`` is zero.

    Args:
        name: One of :func:`planar_names`.

    Returns:
        A target whose draws lie within [-5, 5]^2.

    Raises:
        ValueError: no set has that name.

    Example:
        >>> get_planar("moons").sample(jax.random.key(0), 3).shape
        (3, 2)
    """
    if name not in _PLANAR:
        raise ValueError(
            f"name: got {name!r}, which is no set in the plane. {name_hint(name, planar_names(), 'Known')}"
        )
    return _PLANAR[name]()
