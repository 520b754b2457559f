"""Neural energies of one event: a multilayer perceptron and a small convolutional network.

Both start at a constant energy when ``zero_init=True``: tilted by a base, the EBM then starts exactly at that base.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count, check_key, check_one
from ebm_ppl.potentials.lipschitz import SpectralNorm
from ebm_ppl.types import Array, Key, Scalar


def _zeroed(head: eqx.nn.Linear) -> eqx.nn.Linear:
    return eqx.tree_at(lambda layer: layer.weight, head, jnp.zeros_like(head.weight))


def _bounded(layer: Any, spectral_norm: float | None) -> Any:
    return layer if spectral_norm is None else SpectralNorm(layer, spectral_norm)


def _event_shape(event_shape: int | Sequence[int]) -> tuple[int, ...]:
    shape = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
    return tuple(check_count("event_shape", size) for size in shape)


def _check_options(key: Key, activation: Any, spectral_norm: Any) -> None:
    check_key("key", key)
    check_activation(activation)
    if spectral_norm is not None:
        check_one("spectral_norm", spectral_norm, lambda x: jnp.isfinite(x) & (x > 0.0), "a finite number > 0")


def check_activation(activation: Any) -> None:
    """A function for the units of a network.

    Raises:
        TypeError: it is no function.

    Example:
        >>> check_activation(jax.nn.relu)
    """
    if not callable(activation):
        raise TypeError(f"activation: got {type(activation).__name__}, expected a function such as jax.nn.silu.")


class MLP(eqx.Module):
    """A multilayer perceptron energy ``U(x) = w . h(x)`` of one event of any shape (flattened).

    The output layer has no bias: an additive constant cancels between numerator and normaliser, so its gradient is pure
    noise. For a density that is proper on an unbounded space, tilt it by a base (:func:`ebm_ppl.potentials.tilt`).

    Args:
        event_shape: Shape of one event, or its length.
        key: Random key for the weights.
        width: Units per hidden layer.
        depth: Number of hidden layers.
        activation: Smooth nonlinearity; Langevin kernels differentiate the energy in ``x``.
        zero_init: Start the output layer at zero, so that the energy starts constant.
        spectral_norm: Bound the Lipschitz constant of every layer, the output layer's too, by this number: see
            :class:`ebm_ppl.potentials.SpectralNorm`. That of the energy is then at most ``spectral_norm^(depth + 1)``
            times ``depth`` powers of the activation's (1.1 for ``silu``).

    Raises:
        ValueError: a size is not positive.
        TypeError: a size is not a whole number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> energy = MLP(2, key=jax.random.key(0), width=16, depth=2)
        >>> energy(jnp.ones(2)).shape
        ()
    """

    layers: tuple[Any, ...]
    head: Any
    event_shape: tuple[int, ...] = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        key: Key,
        width: int = 128,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.silu,
        zero_init: bool = True,
        spectral_norm: float | None = None,
    ):
        self.event_shape = _event_shape(event_shape)
        _check_options(key, activation, spectral_norm)
        width, depth = check_count("width", width), check_count("depth", depth)
        sizes = [math.prod(self.event_shape)] + [width] * depth
        *keys, head_key = jax.random.split(key, depth + 1)
        self.layers = tuple(
            _bounded(eqx.nn.Linear(*pair, key=k), spectral_norm)
            for pair, k in zip(itertools.pairwise(sizes), keys, strict=True)
        )
        head = eqx.nn.Linear(width, "scalar", use_bias=False, key=head_key)
        self.head = _bounded(_zeroed(head) if zero_init else head, spectral_norm)
        self.activation = activation

    def __call__(self, event: Array) -> Scalar:
        """Energy of one event of shape ``event_shape``."""
        if event.shape != self.event_shape:
            raise ValueError(f"event: got shape {event.shape}, expected {self.event_shape}.")
        hidden = event.reshape(-1)
        for layer in self.layers:
            hidden = self.activation(layer(hidden))
        return self.head(hidden)


class Conv(eqx.Module):
    """A small convolutional energy of one image of shape ``(height, width)`` or ``(height, width, channel)``.

    Each 3x3 convolution halves the resolution (stride 2); a dense layer and a linear head without bias follow.

    Args:
        event_shape: Shape of one image, channel last when there is one.
        key: Random key for the weights.
        channels: Output channels of each convolution.
        width: Units of the dense layer.
        activation: Smooth nonlinearity.
        zero_init: Start the output layer at zero, so that the energy starts constant.
        spectral_norm: Bound the Lipschitz constant of every layer by this number; see :class:`MLP`.

    Raises:
        TypeError: an option is of the wrong type, or the key no random key.
        ValueError: ``event_shape`` is not an image's, or is too small for that many convolutions.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> energy = Conv((8, 8), key=jax.random.key(0), channels=(16, 32))
        >>> energy(jnp.ones((8, 8))).shape
        ()
    """

    convolutions: tuple[Any, ...]
    dense: Any
    head: Any
    event_shape: tuple[int, ...] = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        key: Key,
        channels: Sequence[int] = (16, 32),
        width: int = 64,
        activation: Callable[[Array], Array] = jax.nn.silu,
        zero_init: bool = True,
        spectral_norm: float | None = None,
    ):
        self.event_shape = _event_shape(event_shape)
        _check_options(key, activation, spectral_norm)
        width = check_count("width", width)
        if isinstance(channels, str) or not isinstance(channels, Sequence):
            raise TypeError(f"channels: got {type(channels).__name__}, expected a sequence of whole numbers.")
        channels = tuple(check_count("channels", out_channels) for out_channels in channels)
        if len(self.event_shape) not in (2, 3):
            raise ValueError(
                f"event_shape: got {self.event_shape}, expected (height, width) or (height, width, channel)."
            )
        if not channels:
            raise ValueError("channels: got none, expected the output channels of at least one convolution.")
        height, breadth = self.event_shape[:2]
        in_channels = self.event_shape[2] if len(self.event_shape) == 3 else 1
        *keys, dense_key, head_key = jax.random.split(key, len(channels) + 2)
        convolutions = []
        for out_channels, conv_key in zip(channels, keys, strict=True):
            convolution = eqx.nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, key=conv_key)
            convolutions.append(_bounded(convolution, spectral_norm))
            in_channels, height, breadth = out_channels, (height + 1) // 2, (breadth + 1) // 2
        self.convolutions = tuple(convolutions)
        dense = eqx.nn.Linear(in_channels * height * breadth, width, key=dense_key)
        self.dense = _bounded(dense, spectral_norm)
        head = eqx.nn.Linear(width, "scalar", use_bias=False, key=head_key)
        self.head = _bounded(_zeroed(head) if zero_init else head, spectral_norm)
        self.activation = activation

    def __call__(self, event: Array) -> Scalar:
        """Energy of one image of shape ``event_shape``."""
        if event.shape != self.event_shape:
            raise ValueError(f"event: got shape {event.shape}, expected {self.event_shape}.")
        hidden = event[None] if event.ndim == 2 else jnp.moveaxis(event, -1, 0)
        for convolution in self.convolutions:
            hidden = self.activation(convolution(hidden))
        return self.head(self.activation(self.dense(hidden.reshape(-1))))
