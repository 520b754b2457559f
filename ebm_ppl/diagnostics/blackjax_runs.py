"""Conversion of BlackJAX runs, under ArviZ's names for what BlackJAX calls otherwise."""

import functools
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

import arviz_base
import jax
import numpy as np
import xarray as xr

from ebm_ppl.diagnostics.groups import named_leaves, versions
from ebm_ppl.kernels.composed import read_report
from ebm_ppl.types import PyTree

_CHAINS = {("chain", "draw"), ("draw", "chain"), ("draw",)}
_PARTICLES = {("replicate", "particle"), ("particle",)}


def from_blackjax(
    states: Any,
    infos: Any = None,
    *,
    axes: Sequence[str],
    site: str = "",
    group: str = "posterior",
    attrs: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Convert the states and infos of any BlackJAX run to an ArviZ ``DataTree``.

    Statistics have ArviZ's names: ``lp`` (log density), ``acceptance_rate``, ``diverging`` (a state that is not finite
    counts too), ``n_steps`` (integration steps), ``tree_depth`` and ``energy_error``. ``energy`` is there only where it is
    the Hamiltonian of the state that the chain went to, which is what E-BFMI reads: BlackJAX's HMC reports that of the
    proposal even if it was rejected, from which the other follows by ``log(acceptance_rate)`` (NaN where that is zero), and
    its adjusted MCLMC reports the potential energy alone, which is left out. ``n_grad`` is there where every step costs one
    gradient, or none. What BlackJAX does not tell is absent.

    With ``group="negative_phase"`` the statistics are those of :func:`to_datatree`, ``potential`` instead of ``lp``.

    Args:
        states: The states of a run, as ``jax.lax.scan`` stacks them, or their positions alone, an array or a pytree. Of
            sequential Monte Carlo the LAST state.
        infos: Its infos, stacked in the same way, or a mapping of some of their fields. Of sequential Monte Carlo those of
            all steps, with a ``step`` axis in place of ``particle``.
        axes: What the leading axes are, in their order: ``("draw", "chain")`` for a scan over a population, ``("chain",
            "draw")`` for a ``vmap`` of scans, ``("draw",)`` for one chain; of sequential Monte Carlo ``("particle",)`` or
            ``("replicate", "particle")``. Exchanged axes cannot be told from right ones.
        site: Name of a position that is one bare array (``"x"`` if empty); prefix of the names within a pytree.
        group: ``"posterior"`` or ``"negative_phase"``.
        attrs: Attributes of the root, such as the seed.

    Returns:
        A ``DataTree`` with the group and its statistics; of sequential Monte Carlo with ``smc``, the particles and their
        ``log_weight`` (mean weight 1). These are weighted, and were moved at the temperature before the last.

    Raises:
        TypeError: ``states`` is a BlackJAX state without positions, or without the weights of its particles.
        ValueError: ``axes`` or ``group`` is none of the above, an array has no such axes or another number of chains or
            draws, or the sequential Monte Carlo had not arrived at its target.

    Example:
        >>> import blackjax, jax, jax.numpy as jnp
        >>> algorithm = blackjax.mala(lambda x: -0.5 * jnp.sum(x**2), 0.5)
        >>> def step(state, key):
        ...     state, info = jax.vmap(algorithm.step)(jax.random.split(key, 4), state)
        ...     return state, (state, info)
        >>> start = jax.vmap(algorithm.init)(jnp.zeros((4, 2)))
        >>> _, (states, infos) = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 50))
        >>> tree = from_blackjax(states, infos, axes=("draw", "chain"))
        >>> tree["posterior"]["x"].shape, sorted(tree["sample_stats"].data_vars)
        ((4, 50, 2), ['acceptance_rate', 'diverging', 'lp', 'n_grad'])
    """
    axes = tuple(axes)
    if axes not in _CHAINS | _PARTICLES:
        raise ValueError(
            f"axes: got {axes}, expected one of {sorted(_CHAINS)}, or {sorted(_PARTICLES)} of an SMC state."
        )
    if group not in ("posterior", "negative_phase"):
        raise ValueError(f"group: got {group!r}, expected 'posterior' or 'negative_phase'.")
    fields = _fields(states)
    has_particles = fields is not None and {"particles", "weights"} <= set(fields)
    if fields is not None and not has_particles and "position" not in fields:
        raise TypeError(
            f"states: got {type(states).__name__} with {sorted(fields)}, expected BlackJAX states with a position, an SMC "
            "state with particles and weights, or the positions themselves."
        )
    if has_particles != ("particle" in axes):
        kind = "particles" if has_particles else "chains"
        expected = sorted(_PARTICLES if has_particles else _CHAINS)
        raise ValueError(f"axes: got {axes} for states that are {kind}, expected one of {expected}.")
    make = _from_particles if has_particles else _from_chains
    groups = make(fields or {"position": states}, _fields(infos) or infos or {}, axes, site, group)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {**versions(), **(attrs or {})}
    return tree


def _fields(record: Any) -> dict[str, Any] | None:
    """The fields of a BlackJAX state or info; ``None`` for what is no such record."""
    return record._asdict() if hasattr(record, "_asdict") else None


def _from_chains(
    state: dict[str, Any], info: dict[str, Any], axes: tuple[str, ...], site: str, group: str
) -> dict[str, xr.Dataset]:
    state, info = _aligned("states", state, axes), _aligned("infos", info, axes)
    position = state["position"]
    is_bare = len(jax.tree.leaves(position)) == 1 and jax.tree.structure(position) == jax.tree.structure(0)
    positions = named_leaves(site or "x" if is_bare else site, position)
    shape = next(iter(positions.values())).shape[:2]
    for name, leaf in [*positions.items(), *named_leaves("infos", info).items()]:
        if leaf.shape[:2] != shape:
            raise ValueError(f"{name}: got {leaf.shape[:2]} chains and draws, expected {shape} as in the other arrays.")
    report = _read_reports(_record(state), _record(info))
    logdensity = state.get("logdensity", info.get("logdensity"))
    stats = {
        "lp": logdensity,
        "acceptance_rate": report.acceptance_rate if "acceptance_rate" in info else None,
        "diverging": report.is_divergent if info.keys() & {"is_divergent", "acceptance_rate"} else None,
        "energy": None if _has_no_kinetic_energy(info) else report.hamiltonian,
        "energy_error": info.get("energy_change"),
        "n_steps": info.get("num_integration_steps"),
        "tree_depth": info.get("num_trajectory_expansions"),
        # Integrators differ in their gradients per step, and bare positions say nothing of them.
        "n_grad": report.num_gradients if logdensity is not None and not _integrates(info) and info else None,
    }
    if "nonans" in info:  # MCLMC, which stays where it is
        stats["diverging"] = report.is_divergent | ~info["nonans"]
    if group == "negative_phase" and stats["lp"] is not None:
        stats["potential"] = -stats.pop("lp")
    found = {name: np.asarray(value) for name, value in stats.items() if value is not None}
    dataset: Any = arviz_base.dict_to_dataset
    groups = {group: dataset(positions, check_conventions=False)}
    if found:
        name = "sample_stats" if group == "posterior" else f"{group}_stats"
        groups[name] = dataset(found, check_conventions=False)
    return groups


def _integrates(info: dict[str, Any]) -> bool:
    return "num_integration_steps" in info or "energy_change" in info


def _has_no_kinetic_energy(info: dict[str, Any]) -> bool:
    """Adjusted MCLMC, whose infos are those of HMC: what it calls the energy is that of the position alone."""
    energy, logdensity = info.get("energy"), getattr(info.get("proposal"), "logdensity", None)
    return energy is not None and logdensity is not None and bool(np.all(energy == -logdensity))


def _from_particles(
    state: dict[str, Any], info: dict[str, Any], axes: tuple[str, ...], site: str, group: str
) -> dict[str, xr.Dataset]:
    del group  # whatever their target is, particles are no draws of chains
    temperature = np.asarray(state.get("tempering_param", 1.0))
    if not (temperature == 1.0).all():
        raise ValueError(
            f"states: got particles at tempering_param {temperature.min()}, expected those at 1, the target."
        )
    particles, weights = state["particles"], np.asarray(state["weights"])
    if axes == ("particle",):
        particles, weights, info = jax.tree.map(lambda x: np.asarray(x)[None], (particles, weights, info))
    if np.ndim(weights) != 2:
        raise ValueError(
            f"states: got weights of shape {np.shape(weights)}, expected axes {axes}; pass the LAST state."
        )
    is_bare = jax.tree.structure(particles) == jax.tree.structure(0)
    with np.errstate(divide="ignore"):  # a weight of zero is one
        log_weight = np.log(np.asarray(weights) * weights.shape[1])
    variables = {**named_leaves(site or "x" if is_bare else site, particles), "log_weight": log_weight}
    dataset: Any = arviz_base.dict_to_dataset
    smc = dataset(variables, sample_dims=["replicate", "particle"], check_conventions=False)
    if "log_likelihood_increment" in info:
        increments = np.asarray(info["log_likelihood_increment"])
        if increments.ndim != 2 or increments.shape[0] != weights.shape[0]:
            raise ValueError(
                f"infos: got log likelihood increments of shape {increments.shape}, "
                "expected (replicate, step) with all steps."
            )
        smc["log_z"] = ("replicate", increments.sum(axis=1))
        smc["num_temperatures"] = ("replicate", np.full(len(increments), increments.shape[1]))
    return {"smc": smc}


def _record(fields: dict[str, Any]) -> Any:
    """Fields as a named tuple, which is what :func:`ebm_ppl.kernels.composed.read_report` reads."""
    return _record_type(tuple(fields))(**fields)


@functools.cache
def _record_type(names: tuple[str, ...]) -> Any:
    return namedtuple("Record", names)


_read_reports = jax.jit(jax.vmap(jax.vmap(read_report)))


def _aligned(name: str, tree: PyTree, axes: tuple[str, ...]) -> PyTree:
    """Every array with its chain axis first and its draw axis second."""

    def align(path: Any, leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        if leaf.ndim < len(axes):
            where = name + jax.tree_util.keystr(path)
            raise ValueError(f"{where}: got shape {leaf.shape}, expected leading axes {axes}.")
        if axes == ("draw",):
            return leaf[None]
        return np.moveaxis(leaf, (axes.index("chain"), axes.index("draw")), (0, 1))

    return jax.tree_util.tree_map_with_path(align, tree)
