"""What of an event is watched: its energy, a few projections, and which mode it is in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import ClusterError, kmeans2

from ebm_ppl.checks import map_energy
from ebm_ppl.types import Potential

_kmeans2: Any = kmeans2  # the name of its seed has changed from release to release, and the stubs know the last

MAX_COORDINATES = 4
"""Events of more numbers than this are projected onto so many principal directions."""
MAX_FEATURES = 8
"""Modes are looked for in at most so many principal directions."""
MAX_MODES = 6
"""At most so many are told apart."""
WAVE_SCALES = (1.0, 2.0, 4.0, 8.0)
"""Standard deviations of random frequencies, per standard deviation of what is watched; eight waves of each."""
_ROWS = 2000


class Projections:
    """Linear projections of flattened events: the coordinates of short ones, else principal directions of some examples.

    Args:
        examples: ``(row, *event)``.
        num_directions: How many at most.

    Example:
        >>> project = Projections(np.random.default_rng(0).normal(size=(50, 3, 3)), 4)
        >>> project(np.zeros((7, 3, 3))).shape, project.names
        ((7, 4), ['direction 0', 'direction 1', 'direction 2', 'direction 3'])
    """

    def __init__(self, examples: Any, num_directions: int):
        rows = _flat(examples)
        self.centre = rows.mean(axis=0)
        if rows.shape[1] <= num_directions:
            self.directions = np.eye(rows.shape[1])
            self.names = [f"coordinate {i}" for i in range(rows.shape[1])] if rows.shape[1] > 1 else ["x"]
        else:
            chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _ROWS)).astype(int)]
            self.directions = np.linalg.svd(chosen - self.centre, full_matrices=False)[2][:num_directions]
            self.names = [f"direction {i}" for i in range(len(self.directions))]

    def __call__(self, events: Any) -> np.ndarray:
        """``(row, *event) -> (row, direction)``, zero at the mean of the examples."""
        return (_flat(events) - self.centre) @ self.directions.T


class Monitor:
    """The statistics of a diagnosis: the energy first, then projections, or what the caller wants watched instead.

    Args:
        potential: Energy of one event.
        examples: Events ``(row, *event)`` that say which directions vary.
        statistics: A function of one event to use in place of projections; any shape.

    Example:
        >>> import jax.numpy as jnp
        >>> watch = Monitor(lambda x: jnp.sum(x**2), np.random.default_rng(0).normal(size=(50, 2)))
        >>> watch.names, watch(np.ones((4, 5, 2))).shape, watch.moments(watch(np.ones((5, 2)))).shape
        (['energy', 'coordinate 0', 'coordinate 1'], (4, 5, 3), (5, 37))
    """

    def __init__(self, potential: Potential, examples: Any, statistics: Callable[[Any], Any] | None = None):
        self.potential = potential
        self.event_shape = np.shape(examples)[1:]
        if statistics is None:
            self._rest: Callable[[Any], np.ndarray] = Projections(examples, MAX_COORDINATES)
            self.names = ["energy", *self._rest.names]
        else:
            # The own energy keeps its own compiled program; whatever is watched is a plain map over rows.
            mapped = jax.jit(jax.vmap(lambda event: jnp.ravel(jnp.asarray(statistics(event), float))))
            self._rest = lambda events: np.asarray(mapped(jnp.asarray(events)), np.float64)
            width = self._rest(np.asarray(examples)[:1]).shape[1]
            self.names = ["energy", *(f"statistic {i}" for i in range(width))]
        watched = self._rest(jnp.asarray(examples))
        scale = np.nanstd(np.where(np.isfinite(watched), watched, np.nan), axis=0)
        rng = np.random.default_rng(0)
        frequencies = rng.normal(size=(len(scale), 8 * len(WAVE_SCALES))) * np.repeat(WAVE_SCALES, 8)
        self._frequencies = frequencies / np.where(scale > 0, scale, 1.0)[:, None]
        self._phases = rng.uniform(0.0, 2.0 * np.pi, frequencies.shape[1])
        self._norms = np.linalg.norm(frequencies, axis=0)

    def __call__(self, events: Any, energy: Any = None) -> np.ndarray:
        """``(*lead, *event) -> (*lead, statistic)``; energies that are known need no evaluation."""
        lead = np.shape(events)[: np.ndim(events) - len(self.event_shape)]
        rows = jnp.asarray(events).reshape(-1, *self.event_shape)
        energy = np.asarray(map_energy(self.potential, rows) if energy is None else energy, np.float64)
        return np.concatenate([energy.reshape(-1, 1), self._rest(rows)], axis=1).reshape(*lead, -1)

    def moments(self, values: np.ndarray) -> np.ndarray:
        """The statistics, and of all but the energy the squares and waves: ``(*lead, statistic) -> (*lead, moment)``.

        Waves ``cos(w . x + phase)`` of random frequencies see what means, variances and mean energies do not: a law in
        which eight modes had run together into a ring, .4 nats off, had all of those right.
        """
        rest = values[..., 1:]
        return np.concatenate([values, rest**2, np.cos(rest @ self._frequencies + self._phases)], axis=-1)

    @property
    def moment_names(self) -> list[str]:
        """Names of :meth:`moments`."""
        squares = [f"{name} squared" for name in self.names[1:]]
        return [*self.names, *squares, *(f"a wave of {norm:.2g} radians per sd" for norm in self._norms)]


class Modes:
    """Cells of event space: clusters of examples, or the cells of given centres, or what a given function says.

    Clusters are those of k-means on whitened principal directions, as many as have the largest simplified silhouette. Any
    cells make valid indicators: where there is no cluster they cut one mode in pieces, whose weights must be right too.

    Args:
        examples: Events ``(row, *event)`` of everything that is compared, in equal parts.
        modes: Centres ``(mode, *event)``, or a function from one event to the number of its mode, from zero on.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> find = Modes(np.concatenate([rng.normal(-2.0, 0.3, 500), rng.normal(2.0, 0.3, 500)]))
        >>> find.num_modes, len(set(find.labels(np.array([-2.0, 2.1]))))
        (2, 2)
    """

    def __init__(self, examples: Any, modes: Any = None):
        self._label = None
        if callable(modes):
            self._label = jax.jit(jax.vmap(modes))
            self.num_modes = int(np.max(np.asarray(self._label(jnp.asarray(examples))))) + 1
            return
        self._project = Projections(examples, MAX_FEATURES)
        rows = self._project(examples)
        scale = rows.std(axis=0)
        self._scale = np.where(scale > 0, scale, 1.0)
        if modes is not None:
            self._centres = self._project(np.asarray(modes)) / self._scale
        else:
            self._centres = _cluster(rows / self._scale)
        self.num_modes = len(self._centres)

    def labels(self, events: Any) -> np.ndarray:
        """``(row, *event) -> (row,)``, whole numbers."""
        if self._label is not None:
            return np.asarray(self._label(jnp.asarray(events))).astype(int)
        rows = self._project(events) / self._scale
        return np.argmin(((rows[:, None] - self._centres) ** 2).sum(axis=-1), axis=1)

    def indicators(self, events: Any, lead: int = 1) -> np.ndarray:
        """One-hot labels, ``(*lead, *event) -> (*lead, mode)``, with so many leading axes."""
        shape = np.shape(events)
        labels = self.labels(np.asarray(events).reshape(-1, *shape[lead:]))
        return np.eye(max(self.num_modes, int(labels.max()) + 1))[labels].reshape(*shape[:lead], -1)


def _flat(events: Any) -> np.ndarray:
    events = np.asarray(events, np.float64)
    return events.reshape(len(events), -1)


def _cluster(rows: np.ndarray) -> np.ndarray:
    """Centres of the clustering with the largest simplified silhouette: points near their own centre, far from others."""
    rows = rows[np.isfinite(rows).all(axis=1)]
    distinct = np.unique(rows, axis=0)
    if len(distinct) <= MAX_MODES:
        return distinct
    best, best_width = rows[:1], -np.inf
    for count in range(2, MAX_MODES + 1):
        for attempt in range(3):
            try:
                centres, _ = _kmeans2(rows, count, minit="++", seed=attempt, missing="raise")
            except ClusterError:  # one of them is empty: these starts are no good
                continue
            squared = ((rows[:, None] - centres) ** 2).sum(axis=-1)
            own, other = np.sqrt(np.sort(squared, axis=1)[:, :2]).T
            width = float(np.mean(1.0 - own / np.maximum(other, 1e-12)))
            if width > best_width:
                best, best_width = centres, width
    return best
