"""Quality of a short run against its number of steps: where it matches the data, and what the energy is by itself."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import as_array, check_count, map_energy
from ebm_ppl.diagnostics.energy_distance import energy_distance
from ebm_ppl.generation import draw_short_run, short_run_of
from ebm_ppl.partials import function_behind, tunables_of
from ebm_ppl.potentials import trainable
from ebm_ppl.potentials.short_run import not_a_density
from ebm_ppl.types import Array, Event, Kernel, Key, Potential, PyTree

MAX_ROWS, BATCH = 2000, 64
CHANGED = 4.0
"""Draws have changed after ``k`` where their energy distance has, by more than so many standard errors."""
_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 10.0, 100.0)


class SamplingTimes(NamedTuple):
    """What :func:`sampling_times` found; prints as a table with a verdict.

    Attributes:
        num_steps: ``k``, the steps of training.
        times: Numbers of steps, ``(time,)``.
        moment_mismatch: Root mean square over statistics of the differences between data and draws, in standard
            deviations over the data, ``(time,)``; infinite where draws are lost.
        moment_noise: What it would be between two such samples of one law.
        mismatch_of: The same for each array of parameters, or of statistics, by its name.
        energy_distance: ``(time,)``, NaN where draws are not finite.
        energy_distance_error: Its standard error, ``(time,)``.
        energy_gap: Mean energy of the data minus that of the draws, ``(time,)``, in nats.
        energy_gap_error: Its standard error, ``(time,)``.
        num_lost: Draws that are not finite, or have no finite energy, ``(time,)``.
    """

    num_steps: int
    times: np.ndarray
    moment_mismatch: np.ndarray
    moment_noise: float
    mismatch_of: dict[str, np.ndarray]
    energy_distance: np.ndarray
    energy_distance_error: np.ndarray
    energy_gap: np.ndarray
    energy_gap_error: np.ndarray
    num_lost: np.ndarray

    @property
    def best_time(self) -> int:
        """The time with the smallest energy distance; ``k`` where every draw was lost."""
        known = np.isfinite(self.energy_distance)
        return int(self.times[known][np.argmin(self.energy_distance[known])]) if known.any() else self.num_steps

    def _changes(self) -> np.ndarray:
        """How the energy distance changes from ``k`` to each later time, in standard errors; infinite for lost draws."""
        at = int(np.flatnonzero(self.times == self.num_steps)[0])
        change = self.energy_distance[at + 1 :] - self.energy_distance[at]
        error = np.hypot(self.energy_distance_error[at + 1 :], self.energy_distance_error[at])
        return np.where(np.isfinite(change), change / np.where(error > 0, error, np.inf), np.inf)

    @property
    def is_short_run(self) -> bool:
        """Whether the draws are farther from the data some time after ``k`` steps than at ``k``, or lost."""
        return bool((self._changes() > CHANGED).any())

    @property
    def gets_nearer(self) -> bool:
        """Whether chains that go on after ``k`` steps get nearer to the data, and never farther."""
        return bool((self._changes() < -CHANGED).any()) and not self.is_short_run

    @property
    def verdict(self) -> str:
        """In words."""
        if self.is_short_run:
            return not_a_density(self.num_steps)
        if self.times[-1] == self.num_steps:
            return f"nothing was looked at after {self.num_steps} steps: pass later times"
        if self.gets_nearer:
            return (
                f"draws get nearer to the data after {self.num_steps} steps: these runs are too short for this energy"
            )
        return f"up to {self.times[-1]} steps the draws stay as near to the data as at {self.num_steps}"

    def __str__(self) -> str:
        lines = [f"{'steps':>8}  {'mismatch':>9}  {'energy distance':>20}  {'energy gap':>20}  lost"]
        for at, time in enumerate(self.times):
            distance = f"{self.energy_distance[at]:.4g} ± {self.energy_distance_error[at]:.1g}"
            gap = f"{self.energy_gap[at]:.4g} ± {self.energy_gap_error[at]:.1g}"
            mark = "  <- k" if time == self.num_steps else ""
            lines.append(
                f"{time:>8}  {self.moment_mismatch[at]:>9.3g}  {distance:>20}  {gap:>20}  {self.num_lost[at]:>4}{mark}"
            )
        lines.append(f"mismatch of two samples of one law: {self.moment_noise:.2g}")
        lines.append(f"nearest to the data at {self.best_time} steps; {self.verdict}")
        return "\n".join(lines)


def sampling_times(
    key: Key,
    potential: Potential,
    data: Any,
    *,
    kernel: Kernel | None = None,
    times: Sequence[int] | None = None,
    num_draws: int = 1000,
    statistics: Callable[[Event], PyTree] | None = None,
) -> SamplingTimes:
    """Hold the draws of a short run against data, at the number of steps it was trained for and at others.

    A stationary point of training with negatives from ``k`` steps of a fixed start has
    ``E_data[dU/dtheta] = E_k[dU/dtheta]``: the statistics that the parameters stand for match at ``k``, and nowhere
    else unless the chains have arrived by then. Where an energy is linear in its last layer, so does the mean energy.

    Args:
        key: Random key.
        potential: A :class:`ebm_ppl.potentials.ShortRun`, or any energy with ``kernel``.
        data: Rows ``(row, *event)``, best held out; the first 2,000 are looked at.
        kernel: :func:`ebm_ppl.kernels.short_run`; that of the potential when ``None``. With one for an energy that was
            trained by persistent chains this shows how long noise takes to become data.
        times: Increasing numbers of steps, ``k`` among them; from a quarter of ``k`` to a hundred times ``k`` when
            ``None``.
        num_draws: Chains.
        statistics: Of one event, a pytree of arrays; the gradient of the energy in its parameters when ``None``, or,
            where it has none, the event and its square.

    Returns:
        :class:`SamplingTimes`; print it, or show it with :func:`ebm_ppl.plots.sampling_times`.

    Raises:
        TypeError: there is no short-run kernel.
        ValueError: ``times`` do not increase or miss ``k``, or the rows are fewer than two, not finite, or of another shape
            than the draws.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = ebm.kernels.short_run(5, dist.Normal(0.0, 1.0), step_size=0.1)
        >>> model = ebm.potentials.ShortRun(lambda x: -0.5 * x**2, kernel)  # after five steps the variance is 4.2
        >>> rows = jnp.sqrt(4.2) * jax.random.normal(jax.random.key(0), (1000,))
        >>> found = sampling_times(jax.random.key(1), model, rows, times=(1, 5, 10))
        >>> found.best_time, found.verdict
        (5, 'this is a 5-step sampler, not a density')

    References:
        Agoritsas, Catania, Decelle, Seoane (2023), Explaining the effects of non-convergent sampling in the training of
        energy-based models, arXiv:2301.09428; Decelle, Furtlehner, Seoane (2021), Equilibrium and non-equilibrium
        regimes in the learning of restricted Boltzmann machines, arXiv:2105.13889, for quality against the time of
        generation.
    """
    kernel = short_run_of(potential, kernel)
    steps = function_behind(kernel).num_steps
    if times is None:
        times = sorted({max(round(factor * steps), 1) for factor in _FACTORS})
    if steps not in times:
        raise ValueError(f"times: got {list(times)}, expected {steps} among them, the steps of the kernel.")
    num_draws = check_count("num_draws", num_draws, 2)
    rows = _rows(as_array("data", data)[:MAX_ROWS], kernel)
    positions = draw_short_run(key, potential, num_draws, times=times, kernel=kernel)
    energy_data = np.asarray(map_energy(potential, rows), np.float64)
    statistics_of = _statistics(potential, statistics)
    parameters, statistic = statistics_of
    mean = _mean(statistic, parameters, rows)
    variance = _mean(lambda p, x: jax.tree.map(lambda v, m: (v - m) ** 2, statistic(p, x), mean), parameters, rows)
    spread = jax.tree.map(jnp.sqrt, variance)
    found = [_at_one_time(potential, statistics_of, energy_data, mean, spread, draws) for draws in positions]
    distances = [energy_distance(rows, draws) for draws in positions]
    columns = {name: np.array([one[name] for one in found]) for name in found[0] if name != "mismatch_of"}
    return SamplingTimes(
        num_steps=steps,
        times=np.array(times),
        moment_noise=float(np.sqrt(1.0 / len(rows) + 1.0 / num_draws)),
        mismatch_of={name: np.array([one["mismatch_of"][name] for one in found]) for name in found[0]["mismatch_of"]},
        energy_distance=np.array([one.value for one in distances]),
        energy_distance_error=np.array([one.standard_error for one in distances]),
        **columns,
    )


def _rows(rows: Array, kernel: Kernel) -> Array:
    """At least two rows, finite, of the shape of the draws."""
    func: Any = function_behind(kernel)
    tunables = tunables_of(kernel)
    start = jax.eval_shape(lambda key: func.start_positions(key, 2, **tunables), jax.random.key(0))
    if not isinstance(start, jax.ShapeDtypeStruct) or start.shape[1:] != rows.shape[1:]:
        shapes = jax.tree.map(lambda x: x.shape[1:], start)
        raise ValueError(f"data: got rows of shape {rows.shape[1:]}, expected {shapes}, that of the draws.")
    is_finite = np.isfinite(np.asarray(rows, np.float64).reshape(len(rows), rows[:1].size)).all(axis=1)
    if len(rows) < 2 or not is_finite.all():
        raise ValueError(
            f"data: got {len(rows)} rows, {int((~is_finite).sum())} of them not finite, expected at least two, all finite."
        )
    return rows


def _statistics(potential: Potential, statistics: Callable[[Event], PyTree] | None) -> tuple[Any, Any]:
    """Arrays and a function of them and one event that gives its statistics."""
    parameters, rest = eqx.partition(potential, trainable(potential))
    if statistics is not None:
        return None, lambda _, event: statistics(event)
    if not jax.tree.leaves(parameters):
        return None, lambda _, event: {"x": event, "x^2": event**2}
    return parameters, lambda parameters, event: jax.grad(lambda p: eqx.combine(p, rest)(event))(parameters)


def _at_one_time(
    potential: Potential,
    statistics_of: tuple[Any, Any],
    energy_data: np.ndarray,
    mean: PyTree,
    spread: PyTree,
    draws: Array,
) -> dict[str, Any]:
    """What there is to say of the draws of one time, where none of them is lost."""
    energy = np.asarray(map_energy(potential, draws), np.float64)
    finite = np.isfinite(np.asarray(draws, np.float64).reshape(len(draws), -1)).all(axis=1) & np.isfinite(energy)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(mean)]
    if not finite.all():
        lost = {"moment_mismatch": np.inf, "mismatch_of": dict.fromkeys(names, np.inf)}
        return lost | {"energy_gap": np.nan, "energy_gap_error": np.nan, "num_lost": int((~finite).sum())}
    parameters, statistic = statistics_of
    later = _mean(statistic, parameters, draws)
    squares, counts = [], []
    for a, b, sd in zip(*map(jax.tree.leaves, (mean, later, spread)), strict=True):
        # A statistic that hardly varies over these rows, such as a pixel that is always off, gets a scale that so many
        # rows could not tell from zero. Where nothing varies, as with the weights of dead units, a difference is infinite.
        a, b, sd = (np.asarray(x, np.float64) for x in (a, b, sd))
        scale = np.maximum(sd, sd.max(initial=0.0) / np.sqrt(len(energy_data)))
        same = (scale == 0) & (a == b)
        with np.errstate(divide="ignore"):
            ratio = (a - b)[~same] / scale[~same]
        squares.append(float((ratio**2).sum()))
        counts.append(int((~same).sum()))
    return {
        "moment_mismatch": float(np.sqrt(sum(squares) / max(sum(counts), 1))),
        "mismatch_of": {n: np.sqrt(s / max(c, 1)) for n, s, c in zip(names, squares, counts, strict=True)},
        "energy_gap": energy_data.mean() - energy.mean(),
        "energy_gap_error": np.sqrt(energy_data.var(ddof=1) / len(energy_data) + energy.var(ddof=1) / len(energy)),
        "num_lost": 0,
    }


@eqx.filter_jit
def _mean(statistic: Callable[[Any, Event], PyTree], parameters: Any, rows: Array) -> PyTree:
    """The mean of a statistic over rows, a batch of them in memory at a time."""
    num_batches = -(-len(rows) // BATCH)
    weight = jnp.arange(num_batches * BATCH) < len(rows)
    padded = rows[jnp.arange(num_batches * BATCH) % len(rows)]

    def add(total: PyTree, batch: tuple[Array, Array]) -> tuple[PyTree, None]:
        values = jax.vmap(lambda event: statistic(parameters, event))(batch[1])
        return jax.tree.map(lambda t, v: t + jnp.tensordot(batch[0].astype(t.dtype), v, 1), total, values), None

    shapes = jax.eval_shape(lambda: statistic(parameters, rows[0]))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.result_type(x, jnp.float32)), shapes)
    batches = weight.reshape(num_batches, BATCH), padded.reshape(num_batches, BATCH, *rows.shape[1:])
    total, _ = jax.lax.scan(add, zero, batches)
    return jax.tree.map(lambda t: t / len(rows), total)
