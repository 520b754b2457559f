"""Boltzmann machines: pairwise energies of binary units, fully visible or with a layer of hidden units."""

import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count, check_positive, check_precision, is_traced
from ebm_ppl.types import Array, Key, Scalar

Coding = Literal["binary", "spin"]
"""How a unit that is off or on is written: 0 and 1, or -1 and +1."""

_VALUES: dict[str, tuple[int, int]] = {"binary": (0, 1), "spin": (-1, 1)}


def check_coding(coding: str) -> tuple[int, int]:
    """The two values of a coding.

    Raises:
        ValueError: it is not one of ours.
    """
    if not isinstance(coding, str) or coding not in _VALUES:
        raise ValueError(f"coding: got {coding!r}, expected 'binary' (values 0 and 1) or 'spin' (values -1 and 1).")
    return _VALUES[coding]


def check_parameter(name: str, value: Any, shape: tuple[int | None, ...]) -> Array:
    """A real floating array of the given shape (``None`` is any length), finite where it is concrete.

    Raises:
        TypeError: it is not an array of real numbers.
        ValueError: another shape, or values that are NaN or infinite.
    """
    if isinstance(value, np.ndarray | np.generic) and value.dtype == np.float64:
        value = value.astype(jnp.result_type(float))  # NumPy makes 64-bit floats unasked
    check_precision(name, value)
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {type(value).__name__}, expected an array of real numbers.") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or array.dtype == jnp.bool_:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected real numbers.")
    fits = array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape, strict=True))
    if not fits or 0 in array.shape:
        expected = tuple("any" if n is None else n for n in shape)
        raise ValueError(f"{name}: got shape {array.shape}, expected {expected}.")
    if not is_traced(array) and not bool(jnp.isfinite(array).all()):
        raise ValueError(f"{name}: got values that are NaN or infinite, expected finite ones.")
    # The dtype spelled out: a weakly typed parameter would recompile once training has made it a strong one.
    return jnp.asarray(array, array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else jnp.result_type(float))


def check_state(event: Any, shape: tuple[int, ...], values: tuple[int, ...], coding: str) -> Array:
    """One event of the given shape; where it is concrete, every site must be one of the values.

    Raises:
        ValueError: another shape, or another coding.
    """
    event = jnp.asarray(event)
    if event.shape != shape:
        raise ValueError(f"event: got shape {event.shape}, expected {shape}.")
    if not is_traced(event):
        found = np.unique(np.asarray(event))
        if not np.isin(found, values).all():
            raise ValueError(
                f"event: got the values {found[:6].tolist()}, expected {list(values)} (coding {coding!r}). Recode the "
                "states; 2 x - 1 makes spins of bits."
            )
    return event


class BoltzmannMachine(eqx.Module):
    """The energy ``U(x) = -1/2 x' W x - b' x`` of binary units that all see each other.

    ``W`` is symmetric with a zero diagonal. Training may move ``weights`` freely: the energy reads the symmetric part
    without the diagonal (:attr:`couplings`), so that what it ignores has no gradient. The same numbers in the other coding
    are another model.

    Args:
        weights: ``W``, ``(unit, unit)``.
        biases: ``b``, ``(unit,)``.
        coding: ``"binary"`` for units in {0, 1}, ``"spin"`` for {-1, +1}.

    Raises:
        TypeError: parameters that are not real numbers.
        ValueError: shapes that do not fit, weights that are not symmetric with a zero diagonal, or an unknown coding.

    Example:
        >>> import jax.numpy as jnp
        >>> machine = BoltzmannMachine(jnp.array([[0.0, 2.0], [2.0, 0.0]]), jnp.zeros(2), coding="spin")
        >>> float(machine(jnp.array([1, -1])))
        2.0

    References:
        Ackley, Hinton, Sejnowski (1985), A learning algorithm for Boltzmann machines, Cognitive Science 9.
    """

    weights: Array
    biases: Array
    coding: Coding = eqx.field(static=True)

    def __init__(self, weights: Any, biases: Any, coding: Coding = "binary"):
        check_coding(coding)
        self.biases = check_parameter("biases", biases, (None,))
        size = self.biases.shape[0]
        self.weights = check_parameter("weights", weights, (size, size))
        self.coding = coding
        if not is_traced(self.weights):
            concrete = np.asarray(self.weights)
            if np.diagonal(concrete).any() or not np.allclose(concrete, concrete.T, rtol=1e-5, atol=1e-6):
                raise ValueError(
                    "weights: got a matrix that is not symmetric with a zero diagonal, expected one. A pair of units has "
                    "one coupling; what a unit does to itself belongs into biases."
                )

    @classmethod
    def random(cls, num_units: int, *, key: Key, scale: float = 0.1, coding: Coding = "binary") -> "BoltzmannMachine":
        """Normal couplings of standard deviation ``scale / sqrt(num_units)``, and no biases.

        Example:
            >>> import jax
            >>> BoltzmannMachine.random(5, key=jax.random.key(0)).weights.shape
            (5, 5)
        """
        size = check_count("num_units", num_units)
        spread = check_positive("scale", scale) / math.sqrt(size)
        upper = jnp.triu(spread * jax.random.normal(key, (size, size)), 1)
        return cls(upper + upper.T, jnp.zeros(size, upper.dtype), coding)

    @property
    def couplings(self) -> Array:
        """The symmetric part of the weights without their diagonal."""
        return 0.5 * (self.weights + self.weights.T) * (1.0 - jnp.eye(self.weights.shape[0], dtype=self.weights.dtype))

    @property
    def event_shape(self) -> tuple[int]:
        """Shape of one event."""
        return (self.biases.shape[0],)

    @property
    def site_values(self) -> tuple[int, int]:
        """The two values of a unit."""
        return _VALUES[self.coding]

    def colours(self) -> tuple[np.ndarray, ...]:
        """All units interact.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "scan: got 'chequerboard' for a Boltzmann machine, all of whose units interact, expected 'sequential' or "
            "'random'."
        )

    def __call__(self, event: Array) -> Scalar:
        """Energy of one event ``(unit,)``."""
        units = check_state(event, self.event_shape, self.site_values, self.coding).astype(self.weights.dtype)
        return -0.5 * units @ (self.couplings @ units) - self.biases @ units

    def conditional_logits(self, state: Array, site: Array) -> Array:
        """Log odds of the two values of one unit, given the others."""
        row = 0.5 * (self.weights[site] + self.weights[:, site]).at[site].set(0.0)
        field = row @ state.astype(row.dtype) + self.biases[site]
        return field * jnp.array(self.site_values, field.dtype)


class RBM(eqx.Module):
    """A restricted Boltzmann machine of units in {0, 1}: the energy of the visible ones, the hidden summed out.

    The joint energy is ``E(v, h) = -v' W h - b' v - c' h`` (:meth:`joint_energy`), and the potential is the free energy
    ``U(v) = -log sum_h exp(-E(v, h)) = -b' v - sum_j log(1 + exp(c_j + (v' W)_j))``.

    Args:
        weights: ``W``, ``(visible, hidden)``.
        visible_bias: ``b``, ``(visible,)``.
        hidden_bias: ``c``, ``(hidden,)``.

    Raises:
        TypeError: parameters that are not real numbers.
        ValueError: shapes that do not fit, or values that are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> rbm = RBM(jnp.zeros((3, 2)), jnp.ones(3), jnp.zeros(2))
        >>> round(float(rbm(jnp.array([1, 1, 0]))), 4)  # -2 - 2 log 2
        -3.3863

    References:
        Smolensky (1986), Information processing in dynamical systems; Hinton (2002), Training products of experts by
        minimizing contrastive divergence.
    """

    weights: Array
    visible_bias: Array
    hidden_bias: Array

    def __init__(self, weights: Any, visible_bias: Any, hidden_bias: Any):
        self.visible_bias = check_parameter("visible_bias", visible_bias, (None,))
        self.hidden_bias = check_parameter("hidden_bias", hidden_bias, (None,))
        self.weights = check_parameter("weights", weights, (self.visible_bias.shape[0], self.hidden_bias.shape[0]))

    @classmethod
    def random(cls, num_visible: int, num_hidden: int, *, key: Key, scale: float = 0.01) -> "RBM":
        """Normal weights of standard deviation ``scale``, and no biases.

        Example:
            >>> import jax
            >>> RBM.random(6, 3, key=jax.random.key(0)).weights.shape
            (6, 3)
        """
        shape = check_count("num_visible", num_visible), check_count("num_hidden", num_hidden)
        weights = jax.random.normal(key, shape) * check_positive("scale", scale)
        return cls(weights, jnp.zeros(shape[0], weights.dtype), jnp.zeros(shape[1], weights.dtype))

    @property
    def coding(self) -> Coding:
        """Units are 0 or 1."""
        return "binary"

    @property
    def site_values(self) -> tuple[int, int]:
        """The two values of a unit."""
        return _VALUES["binary"]

    @property
    def event_shape(self) -> tuple[int]:
        """Shape of one event, the visible units."""
        return (self.visible_bias.shape[0],)

    def __call__(self, event: Array) -> Scalar:
        """Free energy of one visible state ``(visible,)``."""
        visible = check_state(event, self.event_shape, self.site_values, "binary").astype(self.weights.dtype)
        return -visible @ self.visible_bias - jnp.sum(jax.nn.softplus(visible @ self.weights + self.hidden_bias))

    def joint_energy(self, visible: Array, hidden: Array) -> Scalar:
        """``E(v, h)`` of one visible and one hidden state."""
        visible = check_state(visible, self.event_shape, self.site_values, "binary").astype(self.weights.dtype)
        hidden = check_state(hidden, self.hidden_bias.shape, self.site_values, "binary").astype(self.weights.dtype)
        return -visible @ self.weights @ hidden - self.visible_bias @ visible - self.hidden_bias @ hidden

    def hidden_logits(self, visible: Array) -> Array:
        """Log odds ``(hidden, 2)`` of the hidden units, given the visible."""
        field = visible.astype(self.weights.dtype) @ self.weights + self.hidden_bias
        return jnp.stack([jnp.zeros_like(field), field], axis=-1)

    def visible_logits(self, hidden: Array) -> Array:
        """Log odds ``(visible, 2)`` of the visible units, given the hidden."""
        field = self.weights @ hidden.astype(self.weights.dtype) + self.visible_bias
        return jnp.stack([jnp.zeros_like(field), field], axis=-1)
