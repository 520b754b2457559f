"""Shallow mean-field networks: an average over many units, whose weights are a measure on the space of features."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_number, check_count, check_key
from ebm_ppl.potentials.combinators import Fixed
from ebm_ppl.potentials.networks import check_activation
from ebm_ppl.types import Array, Key, Scalar

Regime = Literal["features", "lazy"]
"""Whether features move with the weights (and the total variation is bounded), or stay as drawn (the mean square is)."""

Domain = Literal["sphere", "euclidean"]


class ShallowEnergy(eqx.Module):
    """The energy ``U(x) = (1/m) sum_i c_i w_i s(z_i . x)`` of a shallow network, an average over ``m`` units.

    Features ``z_i`` are unit vectors and signs ``c_i`` are fixed. It is the integral of ``s(z . x)`` over a signed
    measure on the sphere of features, ``m`` atoms of weight ``c_i w_i / m``, and is convex in that measure. Two balls
    of measures give two spaces of functions:

    * ``regime="features"`` (F1, variation norm): features and weights ``w_i >= 0`` both move, and the total variation
      ``mean_i w_i`` is bounded. Adaptive: a few directions of the data suffice.
    * ``regime="lazy"`` (F2, a reproducing kernel Hilbert space): features stay as drawn, weights have any sign, and
      ``sqrt(mean_i w_i^2)`` is bounded.

    ``domain="sphere"`` takes unit vectors ``(d,)``; ``domain="euclidean"`` takes any vector and appends a one to it, so
    that units have biases. There tilt it by a base (:func:`ebm_ppl.potentials.tilt`).

    With ReLU units autodiff does not see the curvature, which sits at the kinks: losses that need second derivatives refuse
    this energy. Negatives do not need them.

    Args:
        event_size: ``d``.
        key: Random key for the features, uniform on their sphere.
        width: ``m``.
        regime: See above.
        domain: See above.
        signs: ``"balanced"`` (half of them -1; also for ``None``), ``"negative"``, or an array ``(m,)`` of -1 and 1. Not
            for the lazy regime, which has all 1.
        scale: Weights at the start; 1 for features, 0 for the lazy regime, when ``None``.
        activation: ``s``.

    Attributes:
        features: ``z``, ``(m, d)``, or ``(m, d + 1)`` in Euclidean space; inside :class:`Fixed` in the lazy regime.
        weights: ``w``, ``(m,)``.

    Raises:
        TypeError: a size is not a whole number, ``key`` is no random key, or ``activation`` no function.
        ValueError: an option is unknown or out of range, or signs that are not -1 and 1.

    Example:
        >>> energy = ShallowEnergy(3, key=jax.random.key(0), width=8, signs="negative")
        >>> energy(jnp.array([1.0, 0.0, 0.0])).shape, round(float(energy.norm), 6)
        ((), 1.0)

    References:
        Bach (2017), Breaking the curse of dimensionality with convex neural networks, arXiv:1412.8690, for the two
        spaces; Domingo-Enrich, Bietti, Gabrie, Bruna, Vanden-Eijnden (2021), arXiv:2107.05134, for energies in them.
    """

    features: Any
    weights: Array
    signs: Fixed
    event_shape: tuple[int, ...] = eqx.field(static=True)
    regime: Regime = eqx.field(static=True)
    domain: Domain = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        event_size: int,
        *,
        key: Key,
        width: int = 64,
        regime: Regime = "features",
        domain: Domain = "sphere",
        signs: Any = None,
        scale: float | None = None,
        activation: Callable[[Array], Array] = jax.nn.relu,
    ):
        for name, value, options in (("regime", regime, Regime), ("domain", domain, Domain)):
            if value not in get_args(options):
                raise ValueError(f"{name}: got {value!r}, expected one of {list(get_args(options))}.")
        is_lazy = regime == "lazy"
        if is_lazy and signs is not None:
            raise ValueError(f"signs: got {signs!r} in the lazy regime, whose weights have any sign; expected None.")
        check_key("key", key)
        check_activation(activation)
        size, width = check_count("event_size", event_size), check_count("width", width)
        directions = jax.random.normal(key, (width, size + (domain == "euclidean")))
        directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
        self.features = Fixed(directions) if is_lazy else directions
        scale = (0.0 if is_lazy else 1.0) if scale is None else as_number("scale", scale)
        if not np.isfinite(scale) or (scale <= 0.0 and not is_lazy):
            raise ValueError(
                f"scale: got {scale}, expected a number > 0: weights that move by factors never leave zero."
            )
        self.weights = jnp.full(width, scale, directions.dtype)
        pattern = "positive" if is_lazy else "balanced" if signs is None else signs
        self.signs = Fixed(jnp.asarray(_signs(pattern, width), self.weights.dtype))
        self.event_shape, self.regime, self.domain, self.activation = (size,), regime, domain, activation

    @property
    def directions(self) -> Array:
        """The features ``z``, whether they are trained or not."""
        return self.features.value if isinstance(self.features, Fixed) else self.features

    @property
    def norm(self) -> Array:
        """What its ball bounds: the total variation ``mean |w|``, or in the lazy regime ``sqrt(mean w^2)``."""
        return jnp.sqrt(jnp.mean(self.weights**2)) if self.regime == "lazy" else jnp.mean(jnp.abs(self.weights))

    def units(self, event: Array, directions: Array | None = None) -> Array:
        """``s(z . x)`` of one event, ``(m,)``; or at other unit vectors ``(n, d)``, those of features."""
        event = jnp.asarray(event)
        if event.shape != self.event_shape:
            raise ValueError(f"event: got shape {event.shape}, expected {self.event_shape}.")
        inputs = jnp.append(event, 1.0) if self.domain == "euclidean" else event
        if directions is None:
            directions = jax.lax.stop_gradient(self.directions) if self.regime == "lazy" else self.directions
        return self.activation(directions @ inputs)

    def __call__(self, event: Array) -> Scalar:
        """Energy of one event ``(d,)``."""
        return jnp.mean(jax.lax.stop_gradient(self.signs.value) * self.weights * self.units(event))


def _signs(signs: Any, width: int) -> np.ndarray:
    if isinstance(signs, str):
        patterns = {"balanced": np.arange(width) % 2 * 2 - 1, "negative": -np.ones(width), "positive": np.ones(width)}
        if signs not in patterns:
            raise ValueError(f"signs: got {signs!r}, expected 'balanced', 'negative', or an array of -1 and 1.")
        return patterns[signs]
    signs = np.asarray(signs)
    if signs.shape != (width,) or not np.isin(signs, (-1, 1)).all():
        raise ValueError(f"signs: got {signs!r}, expected {width} numbers -1 or 1.")
    return signs
