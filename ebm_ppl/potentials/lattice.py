"""Lattice models: spins (Ising) and labels (Potts) that see their nearest neighbours on a grid of any dimension."""

import math
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count
from ebm_ppl.potentials.boltzmann import Coding, check_parameter, check_state
from ebm_ppl.types import Array, Scalar


class Lattice(eqx.Module):
    """A rectangular grid, its bonds and its two colours.

    Site ``i`` is entry ``i`` of the flattened event. An axis of length two that closes on itself has two bonds between the
    same pair of sites, as a torus has.

    Args:
        shape: Sites along each axis.
        periodic: Whether the axes close on themselves.

    Example:
        >>> Lattice((2, 3), periodic=False).bonds.tolist()
        [[0, 3], [1, 4], [2, 5], [0, 1], [3, 4], [1, 2], [4, 5]]
    """

    shape: tuple[int, ...] = eqx.field(static=True)
    periodic: bool = eqx.field(static=True)

    def __init__(self, shape: Any, periodic: bool):
        try:
            sizes = tuple(shape) if isinstance(shape, Iterable) else (shape,)
        except TypeError as error:  # an array of shape () says that it is iterable, and is not
            raise TypeError(f"shape: got {shape!r}, expected whole numbers of sites, one per axis.") from error
        if not sizes:
            raise ValueError("shape: got (), expected the number of sites along at least one axis.")
        self.shape = tuple(check_count("shape", size) for size in sizes)
        if not isinstance(periodic, bool):
            raise TypeError(f"periodic: got {periodic!r}, expected True or False.")
        self.periodic = periodic

    @property
    def bonds(self) -> np.ndarray:
        """Pairs of neighbours, ``(bond, 2)``."""
        index = np.arange(math.prod(self.shape)).reshape(self.shape)
        pairs = []
        for axis, size in enumerate(self.shape):
            left = np.moveaxis(index, axis, 0)
            ends = (left, np.roll(left, -1, axis=0)) if self.periodic and size > 1 else (left[:-1], left[1:])
            pairs.append(np.stack([end.ravel() for end in ends], axis=-1))
        return np.concatenate(pairs)

    @property
    def neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours of every site ``(site, neighbour)``, filled up with anything, and which of them are real."""
        ends = np.concatenate([self.bonds, self.bonds[:, ::-1]])
        ends = ends[np.argsort(ends[:, 0], kind="stable")]
        degree = np.bincount(ends[:, 0], minlength=math.prod(self.shape))
        is_real = np.arange(max(1, degree.max())) < degree[:, None]
        table = np.zeros(is_real.shape, int)
        table[is_real] = ends[:, 1]
        return table, is_real

    def colours(self) -> tuple[np.ndarray, np.ndarray]:
        """The sites of even and of odd coordinate sum: no two of one colour are neighbours.

        Raises:
            ValueError: an axis of odd length closes on itself, where two sites of one colour meet.
        """
        odd = [size for size in self.shape if size % 2 and size > 1]
        if self.periodic and odd:
            raise ValueError(
                f"scan: got 'chequerboard' on a periodic lattice of shape {self.shape}, expected axes of even length: an "
                f"axis of {odd[0]} sites that closes on itself has neighbours of one colour, and updating them together "
                "samples another law. Use scan='sequential' or 'random'."
            )
        parity = np.indices(self.shape).sum(axis=0).ravel() % 2
        return np.flatnonzero(parity == 0), np.flatnonzero(parity == 1)


class Ising(eqx.Module):
    """The energy ``U(s) = -J sum_<ij> s_i s_j - sum_i h_i s_i`` of spins in {-1, +1} on a grid.

    Args:
        shape: Sites along each axis, or the length of a chain.
        coupling: ``J``, one number; positive favours equal neighbours.
        field: ``h``, one number, or an array of the lattice's shape.
        periodic: Whether the axes close on themselves.

    Raises:
        TypeError: a parameter that is not a real number, or a size that is not a whole number.
        ValueError: shapes that do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> float(Ising((4, 4), coupling=0.5)(jnp.ones((4, 4))))  # 32 bonds
        -16.0

    References:
        Ising (1925), Beitrag zur Theorie des Ferromagnetismus, Zeitschrift fuer Physik 31.
    """

    coupling: Array
    field: Array
    lattice: Lattice

    def __init__(self, shape: Any, coupling: Any, field: Any = 0.0, *, periodic: bool = True):
        self.lattice = Lattice(shape, periodic)
        self.coupling = check_parameter("coupling", coupling, ())
        self.field = check_parameter("field", field, () if np.ndim(field) == 0 else self.lattice.shape)

    @property
    def coding(self) -> Coding:
        """Spins are -1 or +1."""
        return "spin"

    @property
    def site_values(self) -> tuple[int, int]:
        """The two values of a spin."""
        return (-1, 1)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.lattice.shape

    def colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Two classes of sites that are independent given the other; see :meth:`Lattice.colours`."""
        return self.lattice.colours()

    def __call__(self, event: Array) -> Scalar:
        """Energy of one configuration of the lattice's shape."""
        spins = check_state(event, self.event_shape, self.site_values, "spin").astype(self.coupling.dtype).reshape(-1)
        bonds = self.lattice.bonds
        field = jnp.broadcast_to(self.field, self.event_shape).reshape(-1).astype(spins.dtype)
        return -self.coupling * jnp.sum(spins[bonds[:, 0]] * spins[bonds[:, 1]]) - field @ spins

    def conditional_logits(self, state: Array, site: Array) -> Array:
        """Log odds of the two values of one spin, given its neighbours."""
        around, is_real = _around(self.lattice, state, site)
        return self._logits(jnp.sum(jnp.where(is_real, around.astype(self.coupling.dtype), 0)), site)

    def colour_logits(self, state: Array, colour: Any) -> Array:
        """Log odds ``(site, 2)`` of the two values of each spin of one colour, given the other colour."""
        around, is_real = _around_all(self.lattice, state, colour)
        return self._logits(jnp.sum(jnp.where(is_real, around, 0), axis=-1), colour)

    def _logits(self, total: Array, sites: Any) -> Array:
        """Of one site, or of several, whose neighbours have the sum ``total``."""
        own = self.field if self.field.ndim == 0 else self.field.reshape(-1)[sites]
        field = self.coupling * total + own
        return field[..., None] * jnp.array(self.site_values, field.dtype)


class Potts(eqx.Module):
    """The energy ``U(x) = -J sum_<ij> [x_i = x_j] - sum_i h[x_i]`` of labels ``0 ... num_states - 1`` on a grid.

    Args:
        shape: Sites along each axis, or the length of a chain.
        num_states: Labels, at least two.
        coupling: ``J``, one number; positive favours equal neighbours.
        field: ``h``, one number per label ``(num_states,)``; zero when ``None``.
        periodic: Whether the axes close on themselves.

    Raises:
        TypeError: a parameter that is not a real number, or a size that is not a whole number.
        ValueError: shapes that do not fit, or fewer than two states.

    Example:
        >>> import jax.numpy as jnp
        >>> float(Potts((3, 3), num_states=3, coupling=0.5)(jnp.zeros((3, 3), int)))  # 18 bonds
        -9.0

    References:
        Potts (1952), Some generalized order-disorder transformations, Proc. Cambridge Philosophical Society 48.
    """

    coupling: Array
    field: Array
    lattice: Lattice
    num_states: int = eqx.field(static=True)

    def __init__(self, shape: Any, num_states: int, coupling: Any, field: Any = None, *, periodic: bool = True):
        self.lattice = Lattice(shape, periodic)
        self.num_states = check_count("num_states", num_states, 2)
        self.coupling = check_parameter("coupling", coupling, ())
        field = jnp.zeros(num_states, self.coupling.dtype) if field is None else field
        self.field = check_parameter("field", field, (num_states,))

    @property
    def site_values(self) -> tuple[int, ...]:
        """The labels."""
        return tuple(range(self.num_states))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.lattice.shape

    def colours(self) -> tuple[np.ndarray, np.ndarray]:
        """Two classes of sites that are independent given the other; see :meth:`Lattice.colours`."""
        return self.lattice.colours()

    def __call__(self, event: Array) -> Scalar:
        """Energy of one configuration of the lattice's shape."""
        labels = check_state(event, self.event_shape, self.site_values, "labels")
        return self.one_hot_energy(jax.nn.one_hot(labels.astype(int), self.num_states, dtype=self.coupling.dtype))

    def one_hot_energy(self, indicators: Array) -> Scalar:
        """The energy of indicators ``(*shape, num_states)``, linear in those of each site."""
        flat, bonds = indicators.reshape(-1, self.num_states), self.lattice.bonds
        return -self.coupling * jnp.sum(flat[bonds[:, 0]] * flat[bonds[:, 1]]) - jnp.sum(flat @ self.field)

    def conditional_logits(self, state: Array, site: Array) -> Array:
        """Log odds of the labels of one site, given its neighbours."""
        return self._logits(*_around(self.lattice, state, site))

    def colour_logits(self, state: Array, colour: Any) -> Array:
        """Log odds ``(site, num_states)`` of the labels of each site of one colour, given the other colour."""
        return self._logits(*_around_all(self.lattice, state, colour))

    def _logits(self, around: Array, is_real: Any) -> Array:
        """Of one site, or of several, given the labels of their neighbours ``(*site, neighbour)``."""
        is_label = around[..., None, :] == jnp.arange(self.num_states)[:, None]
        return self.coupling * jnp.sum(is_label & is_real[..., None, :], axis=-1) + self.field


def _around(lattice: Lattice, state: Array, site: Array) -> tuple[Array, Array]:
    """What the neighbours of one site are, ``(neighbour,)``, and which of them are real."""
    table, is_real = (jnp.asarray(part)[site] for part in lattice.neighbours)
    return state.reshape(-1)[table], is_real


def _around_all(lattice: Lattice, state: Array, sites: Any) -> tuple[Array, np.ndarray]:
    """The same of many sites, known before the program runs: ``(site, neighbour)``.

    As whole numbers, which a compiler may add in any order: that takes half the time of real ones.
    """
    table, is_real = (part[np.asarray(sites)] for part in lattice.neighbours)
    return state.reshape(-1).astype(jnp.int32)[table], is_real
