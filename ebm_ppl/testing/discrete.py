"""Checks of kernels on discrete events: exact-start invariance against enumeration.

Every state has a known probability, so the ends of independent chains are counts of a known multinomial law.
"""

from typing import Any, Protocol, cast, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import check_count
from ebm_ppl.testing.report import KernelReport
from ebm_ppl.testing.statistics import ALPHA, CHECKS, Check, multinomial_check
from ebm_ppl.types import Array, Info, Kernel, Key, Potential

MINIMUM_EXPECTED = 25.0
"""Expected count from which a state has a cell of its own; rarer ones share cells with others of like probability."""


@runtime_checkable
class EnumeratedTarget(Protocol):
    """What the check asks of a target; :class:`ebm_ppl.targets.DiscreteTarget` provides it."""

    name: str
    potential: Any
    states: np.ndarray
    probabilities: np.ndarray

    def sample(self, key: Key, n: int, /) -> Array:
        """Exact i.i.d. draws, ``(n, *event_shape)``."""
        ...

    def index(self, events: Any, /) -> np.ndarray:
        """Numbers of events in ``states``; -1 for what is none of them."""
        ...


def exact_start_invariance_discrete(
    key: Key,
    kernel: Kernel,
    target: EnumeratedTarget,
    *,
    num_chains: int = 50_000,
    num_steps: int = 5,
    alpha: float = ALPHA,
    dtype: Any = None,
    minimum_moved: float = 0.05,
    minimum_jump: float = 1e-3,
    minimum_crossed: float = 1e-4,
) -> KernelReport:
    """Whether a kernel leaves an enumerated law invariant: chains started from exact draws must still be exact draws.

    The ends are compared with the exact law by :func:`ebm_ppl.testing.multinomial_test`, each view at ``alpha`` over their
    number: the states themselves (rare ones binned by probability, see :func:`cells`), the levels of the energy, the sum
    of all sites, and the joint law of the first few sites.

    The law passes trivially if nothing moves, so ``report.passed`` also demands that every site moves, and that chains
    cross between the half of the states above the median of the sum of sites and the half below: the check "stayed in its
    half" states the fraction that did not.

    Args:
        key: JAX random key.
        kernel: A discrete population kernel.
        target: A target of :func:`ebm_ppl.targets.get_discrete`, or one like it.
        num_chains: Independent chains.
        num_steps: Steps of each, at least 1.
        alpha: False-failure rate of the whole report.
        dtype: Of the positions; that of ``target.sample`` when ``None``.
        minimum_moved: What the fraction of chains that moved must exceed, at every site.
        minimum_jump: What the mean squared distance, relative to twice the variance, must exceed at some site.
        minimum_crossed: Fraction of chains that must change halves.

    Returns:
        A report; call ``.raise_if_failed()`` in a test. ``nonfinite_fraction`` counts the chains that left the coding.

    Raises:
        ValueError: a count is below 1.

    Example:
        >>> import jax
        >>> from ebm_ppl import kernels, targets
        >>> target = targets.get_discrete("ising_3x3")
        >>> exact_start_invariance_discrete(jax.random.key(0), kernels.gibbs(), target, num_chains=2000).passed
        True

    References:
        Gandy, Scott (2020), Unit testing for MCMC and other Monte Carlo methods, arXiv:2001.06465.
    """
    CHECKS.record(alpha)
    check_count("num_chains", num_chains)
    check_count("num_steps", num_steps)
    key_start, key_run = jax.random.split(key)
    start = target.sample(key_start, num_chains)
    start = start if dtype is None else start.astype(dtype)
    # Numbers become arrays, hence traced: a new step size does not recompile. Functions stay static.
    kernel, potential = jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, (kernel, target.potential)
    )
    end, acceptance, divergent = run_chains(key_run, kernel, potential, start, num_steps)
    before, after = (np.asarray(x).reshape(num_chains, -1).astype(float) for x in (start, end))
    number = target.index(np.asarray(end))
    is_coded = number >= 0
    checks = law_checks(target, number[is_coded], alpha)
    middle = np.median(np.unique(target.states.reshape(len(target.states), -1).sum(axis=1, dtype=int)))
    stayed = float(np.mean((before.sum(axis=1) > middle) == (after.sum(axis=1) > middle)))
    limit = 1.0 - minimum_crossed
    return KernelReport(
        name=f"exact-start invariance of {target.name}",
        checks=(*checks, Check("stayed in its half", stayed, limit, stayed <= limit, minimum_crossed)),
        acceptance=float(acceptance),
        moved_fraction=float((before != after).mean(axis=0).min()),
        relative_jump=float((((after - before) ** 2).mean(axis=0) / (2.0 * before.var(axis=0))).max()),
        divergent_fraction=float(divergent),
        nonfinite_fraction=float(1.0 - is_coded.mean()),
        minimum_moved=minimum_moved,
        minimum_jump=minimum_jump,
        power_goal=None,
        alpha=alpha,
        num_chains=num_chains,
        num_steps=num_steps,
    )


def law_checks(target: EnumeratedTarget, number: np.ndarray, alpha: float) -> tuple[Check, ...]:
    """Whether numbers of states ``(n,)`` are independent draws of the target: four views, ``alpha`` in all.

    Args:
        target: The law.
        number: State numbers, such as ``target.index(events)``.
        alpha: False-failure rate of all views together; the ledger does not see it.
    """
    num_draws = max(len(number), 1)
    views = views_of(target, num_draws)
    checks = []
    for name, cell in views.items():
        num_cells = int(cell.max()) + 1
        expected = np.bincount(cell, weights=target.probabilities, minlength=num_cells)
        counts = np.bincount(cell[number], minlength=num_cells)
        checks.append(multinomial_check(name, counts, expected / expected.sum(), alpha / len(views)))
    return tuple(checks)


def views_of(target: EnumeratedTarget, num_draws: int) -> dict[str, np.ndarray]:
    """Cells of all states by name, each ``(state,)``: ways to look at the law that have power against different faults."""
    flat = target.states.reshape(len(target.states), -1).astype(int)
    num_values = len(np.unique(flat))
    num_joint = max(1, int(np.log(64) / np.log(num_values)))
    first = np.unique(flat[:, :num_joint], axis=0, return_inverse=True)[1].ravel()
    levels = np.unique(np.round(np.log(target.probabilities), 9), return_inverse=True)[1]
    if levels.max() >= 64:  # an energy without degenerate levels
        levels = _quantile_cells(target.probabilities, 64)
    return {
        "states": cells(target.probabilities, num_draws),
        "energy": levels,
        "sum of sites": np.unique(flat.sum(axis=1), return_inverse=True)[1],
        "first sites": first,
    }


def cells(probabilities: np.ndarray, num_draws: int) -> np.ndarray:
    """A cell of its own for every state that is expected often enough; the others are binned in order of probability.

    Example:
        >>> cells(np.array([0.5, 0.49, 0.005, 0.005]), 2500).tolist()
        [0, 1, 2, 2]
    """
    frequent = probabilities * num_draws >= MINIMUM_EXPECTED
    cell = np.zeros(len(probabilities), int)
    cell[frequent] = np.arange(frequent.sum())
    rare = probabilities[~frequent]
    if rare.size:
        num_bins = int(np.clip(rare.sum() * num_draws / MINIMUM_EXPECTED, 1, 256))
        cell[~frequent] = frequent.sum() + _quantile_cells(rare, num_bins)
    return np.unique(cell, return_inverse=True)[1]


def _quantile_cells(probabilities: np.ndarray, num_bins: int) -> np.ndarray:
    """Bins of about equal probability, the states in order of their own."""
    order = np.argsort(probabilities, kind="stable")
    cumulative = np.cumsum(probabilities[order]) / probabilities.sum()
    cell = np.empty(len(probabilities), int)
    cell[order] = np.minimum((cumulative * num_bins * (1 - 1e-12)).astype(int), num_bins - 1)
    return np.unique(cell, return_inverse=True)[1]


@eqx.filter_jit
def run_chains(
    key: Key, kernel: Kernel, potential: Potential, start: Array, num_steps: int
) -> tuple[Array, Array, Array]:
    """Where the chains are after some steps, their mean acceptance rate, and the fraction of divergent steps."""
    algorithm = kernel(potential)
    key_init, key_steps = jax.random.split(key)

    def step(state: Any, key: Key) -> tuple[Any, tuple[Array, Array]]:
        state, info = cast(tuple[Any, Info], algorithm.step(key, state))
        return state, (jnp.nanmean(info.acceptance_rate), jnp.mean(info.is_divergent))

    state, (acceptance, divergent) = jax.lax.scan(
        step, algorithm.init(start, key_init), jax.random.split(key_steps, num_steps)
    )
    return state.position, jnp.mean(acceptance), jnp.mean(divergent)
