"""Networks of an event and a step of time: the drift of a diffusion sampler, and its value function."""

import itertools
import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import as_positive_number, check_count
from ebm_ppl.types import Array, Event, Key, Scalar


def as_shape(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    """A shape, or a length, as a tuple of positive whole numbers; ``()`` is a scalar event."""
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    return tuple(check_count(name, size) for size in sizes)


class TimeMLP(eqx.Module):
    """A multilayer perceptron ``f(t, x)`` of one event of any shape (flattened) and a whole number ``t``.

    Each time has a bias of the first hidden layer of its own, which is a one-hot time appended to the event.

    Args:
        event_shape: Shape of one event, or its length.
        num_times: Times are ``0 ... num_times - 1``.
        key: Random key for the weights.
        output_shape: Shape of the output; that of the event when ``None``.
        width: Units per hidden layer.
        depth: Number of hidden layers.
        activation: Nonlinearity.
        zero_init: Start the output layer at zero.

    Raises:
        ValueError: a size is not positive.
        TypeError: a size is not a whole number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> network = TimeMLP(2, 5, key=jax.random.key(0), width=16, depth=2)
        >>> network(3, jnp.ones(2)).shape
        (2,)
    """

    time_bias: Array
    layers: tuple[eqx.nn.Linear, ...]
    head: eqx.nn.Linear
    event_shape: tuple[int, ...] = eqx.field(static=True)
    output_shape: tuple[int, ...] = eqx.field(static=True)
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_times: int,
        *,
        key: Key,
        output_shape: int | Sequence[int] | None = None,
        width: int = 128,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.silu,
        zero_init: bool = True,
    ):
        self.event_shape = as_shape("event_shape", event_shape)
        self.output_shape = self.event_shape if output_shape is None else as_shape("output_shape", output_shape)
        width, depth = check_count("width", width), check_count("depth", depth)
        time_key, head_key, *keys = jax.random.split(key, depth + 2)
        sizes = [math.prod(self.event_shape)] + [width] * depth
        self.layers = tuple(
            # The biases of the first layer are those of the times.
            eqx.nn.Linear(*pair, use_bias=index > 0, key=layer_key)
            for index, (pair, layer_key) in enumerate(zip(itertools.pairwise(sizes), keys, strict=True))
        )
        self.time_bias = jax.random.uniform(time_key, (check_count("num_times", num_times), width), minval=-1.0)
        head = eqx.nn.Linear(width, math.prod(self.output_shape), key=head_key)
        if zero_init:
            head = eqx.tree_at(
                lambda layer: (layer.weight, layer.bias), head, (head.weight * 0.0, jnp.zeros(head.out_features))
            )
        self.head = head
        self.activation = activation

    def __call__(self, time: int | Array, event: Array) -> Array:
        """Output of shape ``output_shape`` for one time and one event of shape ``event_shape``."""
        if event.shape != self.event_shape:
            raise ValueError(f"event: got shape {event.shape}, expected {self.event_shape}.")
        hidden = self.activation(self.layers[0](event.reshape(-1)) + self.time_bias[time])
        for layer in self.layers[1:]:
            hidden = self.activation(layer(hidden))
        return self.head(hidden).reshape(self.output_shape)


class ValueNetwork(eqx.Module):
    """A time-conditioned value ``V(t, x)``, ``t = 0 ... num_steps``: what remains to be paid by a sampler at ``x``.

    The value at the last time, ``t = num_steps``, is the energy that the sampler is trained against; it may be another
    potential, or this network there (:class:`AtTime`). Each time has an additive constant of its own, because values,
    unlike energies, have one that matters.

    Args:
        event_shape: Shape of one event, or its length.
        num_steps: Steps (T) of the diffusion sampler.
        key: Random key for the weights.
        width: Units per hidden layer.
        depth: Number of hidden layers.
        activation: Smooth nonlinearity; policies differentiate the value in ``x``.
        zero_init: Start at ``V = 0``.
        scale: Unit of the value: the output is multiplied by it. For an energy ``network / tau``, one over ``tau``.

    Raises:
        ValueError: a size is not positive.
        TypeError: a size is not a whole number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> value = ValueNetwork(2, 5, key=jax.random.key(0), width=16, depth=2)
        >>> value(5, jnp.ones(2)).shape
        ()

    References:
        Yoon, Hwang, Kwon, Noh, Park (2024), Maximum entropy inverse reinforcement learning of diffusion models with
        energy-based models, arXiv:2407.00626, equations 9 and 10.
    """

    network: TimeMLP
    offset: Array
    num_steps: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)

    def __init__(
        self,
        event_shape: int | Sequence[int],
        num_steps: int,
        *,
        key: Key,
        width: int = 128,
        depth: int = 2,
        activation: Callable[[Array], Array] = jax.nn.silu,
        zero_init: bool = True,
        scale: float = 1.0,
    ):
        self.scale = as_positive_number("scale", scale)
        self.num_steps = check_count("num_steps", num_steps)
        num_times = self.num_steps + 1
        self.network = TimeMLP(
            event_shape,
            num_times,
            key=key,
            output_shape=(),
            width=width,
            depth=depth,
            activation=activation,
            zero_init=zero_init,
        )
        self.offset = jnp.zeros(num_times)

    def __call__(self, time: int | Array, event: Array) -> Scalar:
        """Value of one event at one time."""
        return self.scale * (self.network(time, event) + self.offset[time])


class AtTime(eqx.Module):
    """A function of time and event at one time: ``V(t, .)`` as a potential.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> value = ValueNetwork(2, 5, key=jax.random.key(0), width=16, depth=1)
        >>> AtTime(value, 5)(jnp.ones(2)).shape
        ()
    """

    function: Callable[[int | Array, Event], Array]
    time: int = eqx.field(static=True)

    def __call__(self, event: Event) -> Array:
        """``function(time, event)``."""
        return self.function(self.time, event)
