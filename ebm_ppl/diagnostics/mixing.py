"""How well chains mix: R-hat and effective sample size with guards, and the energy gap."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import arviz_stats
import jax
import numpy as np
import xarray as xr

from ebm_ppl.checks import as_rows, check_finite_energy, check_potential, check_rows, map_energy
from ebm_ppl.diagnostics.guarded import as_real_numbers, stuck_chains
from ebm_ppl.meshes import on_host
from ebm_ppl.sampling import Draws
from ebm_ppl.types import Potential, PyTree

RHAT_MIXED = 1.01
"""R-hat at most this, on every variable, is what a chain that mixes shows (Vehtari et al. 2021)."""

ESS_MIXED = 400.0
"""Bulk effective sample size at least this, over all chains, is needed to believe R-hat (Vehtari et al. 2021)."""

MIN_CHAINS = 4
"""With fewer chains than this, mixing is reported as not assessable."""

MIN_DRAWS = 20
"""With fewer draws per chain than this, mixing is reported as not assessable."""


class Estimate(NamedTuple):
    """A number with its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.standard_error:.2g}"


def energy_gap(potential: Potential, data: PyTree, draws: Draws) -> Estimate:
    """Mean energy of the data minus mean energy of the negatives, with the standard error of both.

    A gap many errors from zero says that the negatives do not represent the model or the model does not fit. A gap of
    zero says little: chains stuck at the data's mode weights have it too.

    Args:
        potential: Energy of one event, base included.
        data: Rows ``(row, *event)``, best held out from training.
        draws: Negatives at frozen parameters. The error treats chains as independent replicates, which needs no
            autocorrelation estimate; with one chain it is NaN.

    Returns:
        The gap and its standard error, in units of energy.

    Raises:
        TypeError: an argument is of another type.
        ValueError: empty or non-finite data.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> sampler = ebm.init_sampler(jax.random.normal(jax.random.key(0), (64, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(1), energy, sampler, 100)
        >>> gap = energy_gap(energy, jax.random.normal(jax.random.key(2), (1000, 2)), draws)
        >>> abs(gap.value) < 5 * gap.standard_error
        True
    """
    if not isinstance(draws, Draws):
        raise TypeError(f"draws: got {type(draws).__name__}, expected the result of ebm.draw.")
    data = jax.tree.map(lambda leaf: check_rows("data", leaf), as_rows("data", data))
    check_potential(potential, jax.tree.map(lambda leaf: leaf[0], data))
    energies = np.asarray(on_host(map_energy(potential, data)), dtype=np.float64)
    chain_means = np.asarray(on_host(draws.potential), dtype=np.float64).mean(axis=1)
    check_finite_energy("data", potential, data)
    data_error = energies.std(ddof=1) / np.sqrt(energies.size) if energies.size > 1 else np.nan
    chain_error = chain_means.std(ddof=1) / np.sqrt(chain_means.size) if chain_means.size > 1 else np.nan
    return Estimate(float(energies.mean() - chain_means.mean()), float(np.hypot(data_error, chain_error)))


def rhat(values: Any) -> np.ndarray:
    """Rank-normalised split R-hat of every variable, with the guard that ArviZ lacks.

    Args:
        values: ``(chain, draw, *shape)``.

    Returns:
        R-hat, ``shape``: infinite where a chain never moved (ArviZ says NaN, or nothing; a variable of two values only
        where none of them did), NaN with one chain, with fewer than four draws, or where a draw is not finite.

    Raises:
        TypeError: ``values`` are not real numbers.
        ValueError: ``values`` has no chain and draw axes, or nothing in them.

    Example:
        >>> import numpy as np
        >>> draws = np.random.default_rng(0).normal(size=(4, 500, 3))
        >>> bool((rhat(draws) < 1.02).all())
        True
        >>> draws[2, :, 0] = 1.0
        >>> float(rhat(draws)[0])
        inf

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), arXiv:1903.08008.
    """
    values = as_real_numbers("values", values)
    if values.ndim < 2 or 0 in values.shape[:2]:
        raise ValueError(f"values: got shape {values.shape}, expected (chain, draw, ...) with some of each.")
    num_chains, num_draws, *shape = values.shape
    flat = values.reshape(num_chains, num_draws, math.prod(shape))
    result = np.full(flat.shape[-1], np.nan)
    usable = np.isfinite(flat).all(axis=(0, 1))
    stuck = stuck_chains(flat).any(axis=0)
    result[usable & stuck] = np.inf
    moving = usable & ~stuck
    if num_chains > 1 and num_draws >= 4 and moving.any():
        # An indicator with equal halves has no spread about its median, and no R-hat of that spread: the other one counts.
        with np.errstate(invalid="ignore", divide="ignore"):
            result[moving] = arviz_stats.rhat(flat[..., moving], chain_axis=0, draw_axis=1)  # pyright: ignore[reportPrivateImportUsage]
    return result.reshape(shape)


def _stuck(flat: np.ndarray) -> np.ndarray:
    """Which chain never moved in which variable, ``(chain, variable)``.

    A coordinate that is constant by construction cannot be told from one that a sampler never moves, and counts too.
    """
    if flat.shape[1] < 2:
        return np.zeros(flat[:, 0].shape, bool)
    return _range(flat, axis=1) == 0


def _range(values: np.ndarray, axis: int | None = None) -> Any:
    with np.errstate(invalid="ignore", over="ignore"):  # infinities, whose range is no number
        return np.ptp(values, axis=axis)


class Summary(NamedTuple):
    """How well the chains of one trace mix; prints as a table.

    Attributes:
        num_chains: Chains of the trace.
        num_draws: Draws per chain.
        rhat: Largest rank-normalised split R-hat over the energy and every coordinate; infinite if a chain is frozen.
        ess_bulk: Smallest bulk effective sample size over the same; zero if a chain is frozen.
        ess_per_gradient: ``ess_bulk`` divided by the gradient evaluations of all chains.
        num_gradients: Those gradient evaluations.
        acceptance_rate: Mean; NaN for kernels without an accept step.
        frozen_fraction: Fraction of chains in which some variable never moved.
        num_nonfinite: Draws with a non-finite position or energy.
        num_divergent: Draws before which a step failed numerically.
        mixing: ``"yes"``, ``"no"`` or ``"not assessable"``.
        reason: Why.
    """

    num_chains: int
    num_draws: int
    rhat: float
    ess_bulk: float
    ess_per_gradient: float
    num_gradients: int
    acceptance_rate: float
    frozen_fraction: float
    num_nonfinite: int
    num_divergent: int
    mixing: str
    reason: str

    def __str__(self) -> str:
        rows = [
            ("chains x draws", f"{self.num_chains} x {self.num_draws}"),
            ("R-hat (largest)", f"{self.rhat:.3f}"),
            ("bulk ESS (smallest)", f"{self.ess_bulk:.0f}"),
            ("ESS per 1,000 gradients", f"{1e3 * self.ess_per_gradient:.3g}"),
            ("acceptance", f"{self.acceptance_rate:.3f}"),
            ("frozen chains", f"{self.frozen_fraction:.1%}"),
            ("non-finite / divergent draws", f"{self.num_nonfinite} / {self.num_divergent}"),
            ("mixing", f"{self.mixing} ({self.reason})"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def summary(tree: xr.DataTree, *, group: str = "negative_phase", var_names: str | list[str] | None = None) -> Summary:
    """Judge the mixing of one group: R-hat, effective sample size, and the faults ArviZ cannot see.

    A frozen chain has a perfect effective sample size in ArviZ, and R-hat NaN; both are guarded here. Mixing is ``"yes"``
    when every variable has R-hat at most 1.01 with a bulk effective sample size of at least 400, and nothing is frozen,
    non-finite or divergent; ``"not assessable"`` with fewer than 4 chains or 20 draws, or too few effective draws;
    otherwise ``"no"``. It is blind to modes that no chain visits and to chains that agree on the wrong region.

    Args:
        tree: From :func:`to_datatree`.
        group: ``"negative_phase"``, or ``"posterior"`` for NumPyro's draws (collect
            ``extra_fields=("num_steps", "accept_prob", "diverging")`` to see acceptance and gradients).
        var_names: Judge these variables only; all of the group when ``None``.

    Returns:
        A :class:`Summary`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the tree has no such group or variable, or counts that are not finite.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), ebm.kernels.mala(step_size=0.7))
        >>> sampler, _ = ebm.advance(jax.random.key(0), energy, sampler, 100)
        >>> _, draws = ebm.draw(jax.random.key(1), energy, sampler, 1000)
        >>> summary(ebm.diagnostics.to_datatree(draws)).mixing
        'yes'

    References:
        Vehtari, Gelman, Simpson, Carpenter, Buerkner (2021), Rank-normalization, folding, and localization: an improved
        R-hat, arXiv:1903.08008.
    """
    flat, statistics = _series(tree, group, var_names)
    num_chains, num_draws = flat.shape[:2]
    nonfinite = int((~np.isfinite(flat).all(axis=-1)).sum())
    divergent = int(statistics["diverging"].astype(bool).sum())
    counts = np.asarray(statistics["n_grad"], np.float64)
    if not np.isfinite(counts).all():
        raise ValueError("tree: got numbers of gradients (n_grad) that are not finite, expected counts.")
    gradients = int(counts.sum())
    stuck = _stuck(flat)
    frozen = float(stuck.any(axis=1).mean())
    rhats = rhat(flat)
    largest = float(rhats.max()) if not np.isnan(rhats).any() else np.nan
    if nonfinite or frozen:
        ess = 0.0
    elif num_draws < 4:
        ess = np.nan
    else:
        ess = float(np.min(arviz_stats.ess(flat, chain_axis=0, draw_axis=1, method="bulk")))  # pyright: ignore[reportPrivateImportUsage]
    mixing, reason = _verdict(num_chains, num_draws, largest, ess, frozen, nonfinite, divergent)
    with np.errstate(invalid="ignore"):  # infinities of both signs, whose mean is no number
        acceptance_rate = float(np.mean(statistics["acceptance_rate"], dtype=np.float64))
    return Summary(
        num_chains=num_chains,
        num_draws=num_draws,
        rhat=largest,
        ess_bulk=ess,
        ess_per_gradient=ess / gradients if gradients else np.nan,
        num_gradients=gradients,
        acceptance_rate=acceptance_rate,
        frozen_fraction=frozen,
        num_nonfinite=nonfinite,
        num_divergent=divergent,
        mixing=mixing,
        reason=reason,
    )


def _series(
    tree: xr.DataTree, group: str, var_names: str | list[str] | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """All monitored series of a group on one ``(chain, draw, variable)`` axis, and its ``(chain, draw)`` statistics."""
    if not isinstance(tree, xr.DataTree):
        raise TypeError(f"tree: got {type(tree).__name__}, expected the result of to_datatree.")
    if not isinstance(group, str):
        raise TypeError(f"group: got {type(group).__name__}, expected the name of a group.")
    if group not in tree.children:
        raise ValueError(f"group: got {group!r}, expected one of {sorted(tree.children)}.")
    variables = {str(name): v for name, v in tree[group].to_dataset().data_vars.items()}
    if not isinstance(var_names, str | Sequence | None) or not all(isinstance(name, str) for name in var_names or ()):
        raise TypeError(f"var_names: got {var_names!r}, expected a name or a list of names.")
    chosen = set(variables) if var_names is None else {var_names} if isinstance(var_names, str) else set(var_names)
    if not chosen or chosen - set(variables):
        raise ValueError(f"var_names: got {var_names!r}, expected some of {sorted(variables)}.")
    arrays = [np.asarray(v.values) for name, v in variables.items() if name in chosen]
    shape = arrays[0].shape[:2]
    if 0 in shape:
        raise ValueError(f"tree: got {shape[0]} chains of {shape[1]} draws in {group!r}, expected some of each.")
    stats_group = "sample_stats" if group == "posterior" else f"{group}_stats"
    found = tree[stats_group].to_dataset().data_vars if stats_group in tree.children else {}
    # NumPyro's names for the same quantities; absent ones are unknown, not zero.
    names = {"acceptance_rate": ("acceptance_rate",), "diverging": ("diverging",), "n_grad": ("n_grad", "n_steps")}
    missing = {"acceptance_rate": np.nan, "diverging": False, "n_grad": 0}
    statistics = {
        name: next((found[alias].values for alias in aliases if alias in found), np.full(shape, missing[name]))
        for name, aliases in names.items()
    }
    for energy in ("potential", "lp"):
        if energy in found and _range(found[energy].values) != 0:
            # The energy is the one projection that every failure to mix tends to show. (A flat one shows nothing.)
            arrays.append(found[energy].values)
    flat = np.concatenate([array.reshape(*shape, -1) for array in arrays], axis=-1)
    return flat.astype(np.float64), statistics


def _verdict(
    num_chains: int, num_draws: int, rhat: float, ess: float, frozen: float, nonfinite: int, divergent: int
) -> tuple[str, str]:
    faults = []
    if nonfinite:
        faults.append(f"{nonfinite} non-finite draws")
    if frozen and num_draws >= MIN_DRAWS:
        faults.append(f"{frozen:.0%} of the chains frozen")
    if divergent:
        faults.append(f"{divergent} divergent draws")
    if faults:
        return "no", ", ".join(faults)
    if num_chains < MIN_CHAINS or num_draws < MIN_DRAWS:
        return "not assessable", f"needs at least {MIN_CHAINS} chains of {MIN_DRAWS} draws"
    if not rhat <= RHAT_MIXED:
        return "no", f"R-hat {rhat:.3f} > {RHAT_MIXED}: chains disagree or are too short"
    if not ess >= ESS_MIXED:
        return "not assessable", f"bulk ESS {ess:.0f} < {ESS_MIXED:.0f}: draw more"
    return "yes", f"R-hat {rhat:.3f}, bulk ESS {ess:.0f}"
