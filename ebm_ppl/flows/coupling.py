"""Coupling flows assembled from distrax bijectors: RealNVP, and rational-quadratic splines.

A flow is the law of ``x = T(z)`` with ``z`` from a base distribution, ``log q(x) = log base(z) + log |det dT^-1/dx|``.
Both flows here are the identity when they are made, so that they start at their base.

distrax is loaded when the first flow is made; nothing else in the package needs it.
"""

import abc
import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_positive_number, check_count
from ebm_ppl.potentials import Fixed
from ebm_ppl.proposals import TakenApart, check_proposal, log_density, sample_and_log_prob
from ebm_ppl.types import Array, Key

_LARGEST_LOG_SCALE = 1.5
"""One affine coupling stretches a coordinate by at most ``exp`` of this, in either direction."""

_LARGEST_LOGIT = 3.0
_SMALLEST_BIN = 0.1
_SMALLEST_SLOPE = 0.01
"""Splines steeper than these allow (bins as fractions of their mean width) cannot be inverted in 32 bits."""


def _distrax() -> Any:
    try:
        with warnings.catch_warnings():
            # distrax imports tensorflow-probability, which reads names that JAX has deprecated.
            warnings.simplefilter("ignore")
            import distrax
    except ImportError as error:
        raise ImportError(f"Flows need distrax, which cannot be imported ({error}): pip install distrax.") from error
    return distrax


class StandardNormal(eqx.Module):
    """Independent standard normal coordinates, the default base.

    Example:
        >>> import jax
        >>> StandardNormal((2, 3)).sample(jax.random.key(0), 4).shape
        (4, 2, 3)
    """

    event_shape: tuple[int, ...] = eqx.field(static=True)

    def sample(self, key: Key, num_samples: int) -> Array:
        """Draws ``(num_samples, *event_shape)``."""
        return jax.random.normal(key, (num_samples, *self.event_shape))

    def log_prob(self, events: Array) -> Array:
        """Log density of events ``(*batch, *event_shape)``, ``batch``."""
        size = math.prod(self.event_shape)
        flat = events.reshape(*events.shape[: events.ndim - len(self.event_shape)], size)
        return -0.5 * jnp.sum(flat**2, axis=-1) - 0.5 * size * math.log(2 * math.pi)

    def sample_and_log_prob(self, key: Key, num_samples: int) -> tuple[Array, Array]:
        """Draws and their log densities."""
        draws = self.sample(key, num_samples)
        return draws, self.log_prob(draws)


class Conditioner(eqx.Module):
    """A multilayer perceptron on the last axis, whose output is zero until it is trained."""

    weights: tuple[Array, ...]
    biases: tuple[Array, ...]
    out_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, in_size: int, out_shape: tuple[int, ...], *, key: Key, width: int, depth: int):
        sizes = [in_size, *[width] * depth]
        keys = jax.random.split(key, depth + 1)
        hidden = [
            jax.random.normal(k, (a, b)) / math.sqrt(max(a, 1))
            for k, (a, b) in zip(keys, itertools.pairwise(sizes), strict=False)
        ]
        self.out_shape = out_shape
        self.weights = (*hidden, jnp.zeros((sizes[-1], math.prod(out_shape))))
        self.biases = tuple(jnp.zeros(weight.shape[1]) for weight in self.weights)

    def __call__(self, x: Array) -> Array:
        """``(*batch, in_size) -> (*batch, *out_shape)``."""
        # Full precision: the density of a draw must be the one that the draw was made with.
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = jax.nn.silu(jnp.matmul(x, weight, precision="highest") + bias)
        out = jnp.matmul(x, self.weights[-1], precision="highest") + self.biases[-1]
        return out.reshape(*x.shape[:-1], *self.out_shape)


class CouplingFlow(eqx.Module):
    """What coupling flows share: a base, layers, and an elementwise affine map after them.

    A flow is a pytree: :func:`ebm_ppl.potentials.trainable` marks its parameters, without those of the base unless the
    flow was made with ``train_base=True``. It can be handed to kernels as a proposal, and to
    :func:`ebm_ppl.potentials.tilt` or an EBM as a base.
    """

    conditioners: tuple[Conditioner, ...]
    location: Array
    log_scale: Array
    base: Any
    event_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self, event_shape: Sequence[int] | int, conditioners: Sequence[Conditioner], base: Any, train_base: bool
    ):
        self.event_shape = as_shape(event_shape)
        self.conditioners = tuple(conditioners)
        self.location, self.log_scale = jnp.zeros((2, math.prod(self.event_shape)))
        base = StandardNormal(self.event_shape) if base is None else check_proposal("base", base)
        if tuple(base.event_shape) != self.event_shape:
            raise ValueError(f"base: got event_shape {tuple(base.event_shape)}, expected {self.event_shape}.")
        # In 32 bits this also rounds the 64-bit arrays that NumPyro makes of Python floats.
        base = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)) if eqx.is_array_like(x) else x, base)
        self.base = TakenApart(*jax.tree.flatten(base)) if train_base else Fixed(base)
        _distrax()

    @abc.abstractmethod
    def coupling(self, index: int) -> Any:
        """The bijector of one layer, on vectors."""

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Always empty: a flow is one distribution."""
        return ()

    @property
    def bijector(self) -> Any:
        """``T`` on flattened events, a ``distrax.Chain``."""
        distrax = _distrax()
        affine = distrax.Block(distrax.ScalarAffine(shift=self.location, log_scale=self.log_scale), 1)
        layers = [self.coupling(index) for index in range(len(self.conditioners))]
        return distrax.Chain([affine, *reversed(layers)])

    def sample_and_log_prob(self, key: Key, num_samples: int) -> tuple[Array, Array]:
        """Independent draws and their log densities; both can be differentiated with respect to the flow.

        Args:
            key: Random key.
            num_samples: How many.

        Returns:
            ``(num_samples, *event_shape)`` and ``(num_samples,)``.
        """
        latent, log_prob = sample_and_log_prob(self._base, key, num_samples)
        flat, log_det = self.bijector.forward_and_log_det(latent.reshape(num_samples, -1))
        return flat.reshape(num_samples, *self.event_shape), log_prob - log_det

    def sample(self, key: Key, num_samples: int) -> Array:
        """Independent draws, ``(num_samples, *event_shape)``."""
        return self.sample_and_log_prob(key, num_samples)[0]

    def log_prob(self, events: Array) -> Array:
        """Log density of events ``(*batch, *event_shape)``, ``batch``."""
        events = jnp.asarray(events)
        batch_shape = events.shape[: events.ndim - len(self.event_shape)]
        if events.shape[len(batch_shape) :] != self.event_shape:
            raise ValueError(f"events: got shape {events.shape}, expected (*batch, *{self.event_shape}).")
        flat, log_det = self.bijector.inverse_and_log_det(events.reshape(-1, math.prod(self.event_shape)))
        log_prob = log_density(self._base, flat.reshape(-1, *self.event_shape)) + log_det
        return log_prob.reshape(batch_shape)

    @property
    def _base(self) -> Any:
        base = self.base.value
        if isinstance(self.base, Fixed):
            return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, base)
        return base


class RealNVP(CouplingFlow):
    """Affine coupling layers: half of the coordinates are shifted and scaled by functions of the other half.

    The halves alternate between even and odd coordinates; an event of one coordinate is shifted and scaled by constants,
    and such a flow is no more than an affine map.

    Args:
        event_shape: Shape of one event, flattened inside.
        key: Random key for the weights.
        num_layers: Coupling layers.
        width: Hidden units of each conditioner.
        depth: Its hidden layers.
        base: Normalised distribution over events, NumPyro or distrax; standard normal by default. Its support should be
            all of space, which is where the flow puts its draws.
        train_base: Whether the parameters of ``base`` are trained too, as they are: a scale is not kept positive.

    Raises:
        ImportError: distrax cannot be imported.
        TypeError: a count is not a whole number, or ``base`` has no density.
        ValueError: a count is below 1, or ``base`` has another event shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> flow = RealNVP(3, key=jax.random.key(0), num_layers=4, width=16, depth=2)
        >>> bool(jnp.allclose(flow.log_prob(jnp.zeros((5, 3))), -1.5 * jnp.log(2 * jnp.pi)))
        True

    References:
        Dinh, Sohl-Dickstein, Bengio (2017), Density estimation using Real NVP, arXiv:1605.08803.
    """

    def __init__(
        self,
        event_shape: Sequence[int] | int,
        *,
        key: Key,
        num_layers: int = 6,
        width: int = 64,
        depth: int = 2,
        base: Any = None,
        train_base: bool = False,
    ):
        size = math.prod(as_shape(event_shape))
        keys = jax.random.split(key, check_count("num_layers", num_layers))
        width, depth = check_count("width", width), check_count("depth", depth)
        conditioners = [Conditioner(size, (2, size), key=k, width=width, depth=depth) for k in keys]
        super().__init__(event_shape, conditioners, base, train_base)

    def coupling(self, index: int) -> Any:
        """The bijector of one layer, on vectors."""
        distrax = _distrax()
        size = math.prod(self.event_shape)
        mask = (np.arange(size) % 2 == index % 2) & (size > 1)  # True stays as it is

        def affine(parameters: Array) -> Any:
            shift, raw = parameters[..., 0, :], parameters[..., 1, :]
            return distrax.ScalarAffine(shift=shift, log_scale=_LARGEST_LOG_SCALE * jnp.tanh(raw / _LARGEST_LOG_SCALE))

        return distrax.MaskedCoupling(jnp.asarray(mask), self.conditioners[index], affine)


class SplineCoupling(CouplingFlow):
    """Coupling layers of monotone rational-quadratic splines: one half is bent by splines that the other half chooses.

    The halves are the leading and the trailing coordinates, in turn. A spline acts on ``[-bound, bound]`` of the
    intermediate coordinates and is the identity outside; the affine map after the layers places and scales that box.

    Args:
        event_shape: Shape of one event, flattened inside.
        key: Random key for the weights.
        num_layers: Coupling layers.
        width: Hidden units of each conditioner.
        depth: Its hidden layers.
        base: As in :class:`RealNVP`.
        train_base: As in :class:`RealNVP`.
        num_bins: Bins of each spline.
        bound: Half the width of the box, in units of the base.

    Raises:
        ImportError: distrax cannot be imported.
        TypeError: a count is not a whole number, or ``base`` has no density.
        ValueError: a count is below 1, ``bound`` is not positive, or ``base`` has another event shape.

    Example:
        >>> import jax
        >>> flow = SplineCoupling((2, 2), key=jax.random.key(0), num_layers=2, width=16, depth=1)
        >>> draws, log_prob = flow.sample_and_log_prob(jax.random.key(1), 5)
        >>> draws.shape, log_prob.shape
        ((5, 2, 2), (5,))

    References:
        Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows, arXiv:1906.04032.
    """

    num_bins: int = eqx.field(static=True)
    bound: float = eqx.field(static=True)

    def __init__(
        self,
        event_shape: Sequence[int] | int,
        *,
        key: Key,
        num_layers: int = 6,
        width: int = 64,
        depth: int = 2,
        base: Any = None,
        train_base: bool = False,
        num_bins: int = 8,
        bound: float = 5.0,
    ):
        size = math.prod(as_shape(event_shape))
        keys = jax.random.split(key, check_count("num_layers", num_layers))
        self.num_bins, self.bound = check_count("num_bins", num_bins, 2), as_positive_number("bound", bound)
        width, depth = check_count("width", width), check_count("depth", depth)
        conditioners = []
        for index, layer_key in enumerate(keys):
            fixed, bent = _halves(size, index)
            out_shape = (bent, 3 * self.num_bins + 1)
            conditioners.append(Conditioner(fixed, out_shape, key=layer_key, width=width, depth=depth))
        super().__init__(event_shape, conditioners, base, train_base)

    def coupling(self, index: int) -> Any:
        """The bijector of one layer, on vectors."""
        distrax = _distrax()
        size = math.prod(self.event_shape)

        def spline(parameters: Array) -> Any:
            return distrax.RationalQuadraticSpline(
                _LARGEST_LOGIT * jnp.tanh(parameters / _LARGEST_LOGIT),
                -self.bound,
                self.bound,
                boundary_slopes="identity",
                min_bin_size=_SMALLEST_BIN * 2.0 * self.bound / self.num_bins,
                min_knot_slope=_SMALLEST_SLOPE,
            )

        return distrax.SplitCoupling(size // 2, 1, self.conditioners[index], spline, swap=size > 1 and bool(index % 2))


def _halves(size: int, index: int) -> tuple[int, int]:
    """How many coordinates a layer leaves, and how many it bends."""
    lower, upper = size // 2, size - size // 2
    return (upper, lower) if size > 1 and index % 2 else (lower, upper)


def as_shape(event_shape: Sequence[int] | int) -> tuple[int, ...]:
    """A shape of at least one coordinate, from a tuple or one number.

    Example:
        >>> as_shape(3), as_shape(())
        ((3,), ())
    """
    shape = tuple(event_shape) if isinstance(event_shape, Sequence) else (event_shape,)
    return tuple(check_count("event_shape", size) for size in shape)
