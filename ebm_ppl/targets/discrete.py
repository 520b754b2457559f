"""Discrete targets small enough to enumerate: every state, its exact probability, and exact draws."""

import dataclasses
import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from ebm_ppl.checks import check_count
from ebm_ppl.potentials.boltzmann import RBM
from ebm_ppl.potentials.lattice import Ising, Potts
from ebm_ppl.types import Array, Key, Potential


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteTarget:
    """A law on finitely many states of which everything is known, by enumeration in 64 bits.

    Probabilities come from energies written down here a second time, with NumPy, so that they and the potential can
    disagree.

    Attributes:
        name: Its name in the registry.
        potential: Energy of one event, for kernels.
        values: What every site may be, in increasing order.
        states: All states, ``(state, *event_shape)``; the last site varies fastest.
        log_normalizer: ``log Z = log sum_x exp(-U(x))``.
        probabilities: ``(state,)``, summing to 1.
    """

    name: str
    potential: Potential
    values: tuple[int, ...]
    states: np.ndarray
    log_normalizer: float
    probabilities: np.ndarray

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.states.shape[1:]

    def sample(self, key: Key, n: int) -> Array:
        """Exact i.i.d. draws, ``(n, *event_shape)``, of 8-bit integers.

        Args:
            key: JAX random key.
            n: Number of draws, at least 1.

        Example:
            >>> import jax, ebm_ppl.targets
            >>> ebm_ppl.targets.get_discrete("potts_3x3").sample(jax.random.key(0), 5).shape
            (5, 3, 3)
        """
        # On the host, because a cumulative sum of 32-bit probabilities over many states is not exact enough.
        seed = np.asarray(jax.random.bits(key, (4,), jnp.uint32))
        uniform = np.random.default_rng(seed).random(check_count("n", n))
        cumulative = np.cumsum(self.probabilities)
        return jnp.asarray(self.states[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])

    def index(self, events: Any) -> np.ndarray:
        """Numbers ``(n,)`` of the given events in :attr:`states`; -1 where an event is in another coding.

        Example:
            >>> import ebm_ppl.targets
            >>> target = ebm_ppl.targets.get_discrete("ising_3x3")
            >>> target.index(target.states[[0, 5]]).tolist()
            [0, 5]
        """
        flat = np.asarray(events).reshape(len(events), -1)
        digits = np.searchsorted(self.values, flat).clip(0, len(self.values) - 1)
        is_coded = (np.array(self.values)[digits] == flat).all(axis=1)
        number = digits @ len(self.values) ** np.arange(flat.shape[1])[::-1]
        return np.where(is_coded, number, -1)


def all_states(values: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Every array of the given values and shape, ``(state, *shape)``; the last site varies fastest.

    Example:
        >>> all_states((-1, 1), (2,)).tolist()
        [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    """
    num_sites = int(np.prod(shape))
    digits = np.indices((len(values),) * num_sites, dtype=np.int8).reshape(num_sites, -1).T
    return np.array(values, np.int8)[digits].reshape(-1, *shape)


def _target(name: str, potential: Potential, values: tuple[int, ...], states: np.ndarray, score: Any) -> DiscreteTarget:
    log_normalizer = float(np.asarray(logsumexp(score)))
    return DiscreteTarget(name, potential, values, states, log_normalizer, np.exp(score - log_normalizer))


def ising(shape: tuple[int, ...] = (4, 4), coupling: float = 0.44, field: float = 0.0) -> DiscreteTarget:
    """Spins on a periodic lattice, ``U(s) = -J sum_<ij> s_i s_j - h sum_i s_i``.

    Example:
        >>> round(ising().log_normalizer, 10)
        15.5047265387
    """
    states = all_states((-1, 1), shape)
    axes = range(1, 1 + len(shape))
    bonds = sum((states * np.roll(states, 1, axis)).sum(axis=tuple(axes), dtype=int) for axis in axes)
    score = coupling * bonds + field * states.sum(axis=tuple(axes), dtype=int)
    return _target("ising", Ising(shape, coupling, field), (-1, 1), states, score)


def potts(shape: tuple[int, ...] = (3, 3), num_states: int = 3, coupling: float = 0.8) -> DiscreteTarget:
    """Labels on a periodic lattice, ``U(x) = -J sum_<ij> [x_i = x_j]``.

    Example:
        >>> round(potts().log_normalizer, 10)
        16.7400765317
    """
    values = tuple(range(num_states))
    states = all_states(values, shape)
    axes = range(1, 1 + len(shape))
    bonds = sum((states == np.roll(states, 1, axis)).sum(axis=tuple(axes)) for axis in axes)
    return _target("potts", Potts(shape, num_states, coupling), values, states, coupling * bonds)


def rbm(num_visible: int = 12, num_hidden: int = 6, seed: int = 0) -> DiscreteTarget:
    """The visible units of a restricted Boltzmann machine of normal weights (sd .5) and biases (sd .2).

    Example:
        >>> round(rbm().log_normalizer, 10)
        15.8037367596
    """
    random = np.random.default_rng(seed)
    weights = 0.5 * random.normal(size=(num_visible, num_hidden))
    visible_bias, hidden_bias = 0.2 * random.normal(size=num_visible), 0.2 * random.normal(size=num_hidden)
    states = all_states((0, 1), (num_visible,))
    score = states @ visible_bias + np.logaddexp(0.0, states @ weights + hidden_bias).sum(axis=1)
    return _target("rbm", RBM(weights, visible_bias, hidden_bias), (0, 1), states, score)


_CONSTRUCTORS: dict[str, Callable[..., DiscreteTarget]] = {
    "ising_3x3": partial(ising, shape=(3, 3), coupling=0.4, field=0.1),
    "ising_4x4": ising,
    "ising_ring_20": partial(ising, shape=(20,), coupling=0.7),
    "potts_3x3": potts,
    "rbm_12x6": rbm,
}


def discrete_names() -> tuple[str, ...]:
    """Names of all discrete targets, sorted.

    Example:
        >>> from ebm_ppl import targets
        >>> targets.discrete_names()
        ('ising_3x3', 'ising_4x4', 'ising_ring_20', 'potts_3x3', 'rbm_12x6')
    """
    return tuple(sorted(_CONSTRUCTORS))


def get_discrete(name: str, **options: Any) -> DiscreteTarget:
    """A discrete target by name.

    Args:
        name: One of :func:`discrete_names`.
        **options: Keyword arguments of its constructor, such as ``coupling`` of ``"ising_4x4"``.

    Raises:
        ValueError: no discrete target has that name (the text lists close matches).
        TypeError: the constructor has no such option.

    Example:
        >>> from ebm_ppl import targets
        >>> round(targets.get_discrete("ising_4x4", coupling=0.2).log_normalizer, 10)
        11.7714703585
    """
    if name not in _CONSTRUCTORS:
        close = difflib.get_close_matches(name, discrete_names())
        known = " or ".join(map(repr, close)) if close else ", ".join(discrete_names())
        raise ValueError(f"name: got {name!r}, which is not a discrete target, expected {known}.")
    return dataclasses.replace(_CONSTRUCTORS[name](**options), name=name)
