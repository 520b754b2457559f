"""The groups of a ``DataTree`` that ArviZ has no schema for: SMC particles, estimates of log Z, the training history."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import arviz_base
import equinox as eqx
import jax
import numpy as np
import xarray as xr

from ebm_ppl.adaptation import tunables
from ebm_ppl.kernels.smc import SMCResult
from ebm_ppl.meshes import on_host
from ebm_ppl.normalizer.result import LogNormalizer
from ebm_ppl.partials import function_behind
from ebm_ppl.types import Kernel, PyTree, SamplerState

_dataset: Any = arviz_base.dict_to_dataset


def named_leaves(site: str, events: PyTree) -> dict[str, np.ndarray]:
    """One array per leaf of a pytree of events: ``site`` for a bare array, ``site.path`` (or the path) within a tree.

    Example:
        >>> import numpy as np
        >>> sorted(named_leaves("x", {"a": np.zeros(3), "b": [np.ones(3)]}))
        ['x.a', 'x.b.0']
        >>> sorted(named_leaves("", {"a": np.zeros(3), "b": [np.ones(3)]}))
        ['a', 'b.0']
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(events):
        below = jax.tree_util.keystr(path, simple=True, separator=".")
        named[".".join(part for part in (site, below) if part)] = np.asarray(leaf)
    return named


def smc_group(site: str, smc: SMCResult) -> xr.Dataset:
    """The particles of independent SMC runs, ``(replicate, particle)``, and what happened to each run, ``(replicate)``.

    Raises:
        TypeError: ``smc`` is not a :class:`~ebm_ppl.kernels.smc.SMCResult`.
        ValueError: its arrays have no leading replicate axis.
    """
    if not isinstance(smc, SMCResult):
        raise TypeError(f"smc: got {type(smc).__name__}, expected a kernels.smc.SMCResult of independent runs.")
    shape = np.shape(smc.log_weight)
    if len(shape) != 2 or np.shape(smc.log_normalizer) != shape[:1]:
        raise ValueError(
            f"smc: got log weights of shape {shape} and log normalizers of shape {np.shape(smc.log_normalizer)}, expected "
            "(replicate, particle) and (replicate,); run it under jax.vmap over keys, or add an axis to every leaf."
        )
    is_collapsed, is_uncovered = jax.vmap(lambda one: (one.is_collapsed, one.is_uncovered))(smc)
    info = jax.tree.map(np.asarray, smc.info)
    particles = {**named_leaves(site, smc.position), "log_weight": smc.log_weight}
    runs = {
        "log_z": smc.log_normalizer,
        "log_z_se": np.sqrt(np.asarray(smc.relative_variance)),
        "ess": np.asarray(smc.ess_minimum) * shape[1],
        "parent_fraction": smc.parent_minimum,
        "ancestor_fraction": smc.ancestor_fraction,
        "reversal_gap": smc.reversal_gap,
        "outside_fraction": smc.outside_fraction,
        "acceptance_rate": info.acceptance_rate.mean(axis=1),
        "acceptance_minimum": smc.acceptance_minimum,
        "num_temperatures": smc.num_temperatures,
        "n_grad": info.num_gradients.sum(axis=1),
        "n_energy": info.num_energies.sum(axis=1),
        "n_nonfinite": info.num_nonfinite.sum(axis=1),
        "is_finite": smc.is_finite,
        "is_collapsed": is_collapsed,
        "is_uncovered": is_uncovered,
    }
    group = _dataset(
        jax.tree.map(np.asarray, particles), sample_dims=["replicate", "particle"], check_conventions=False
    )
    runs = _dataset(jax.tree.map(np.asarray, runs), sample_dims=["replicate"], check_conventions=False)
    return _plain_attrs(group.merge(runs), {"site": site})


def log_z_group(log_z: Mapping[str, LogNormalizer]) -> xr.Dataset:
    """Estimates of log Z side by side, along ``estimator``: ``group["value"].sel(estimator="forward")``.

    Raises:
        TypeError: ``log_z`` is no mapping of names to :class:`~ebm_ppl.normalizer.LogNormalizer`.
        ValueError: it is empty, or its entries have different shapes.
    """
    if not isinstance(log_z, Mapping) or not all(isinstance(one, LogNormalizer) for one in log_z.values()):
        got = {name: type(one).__name__ for name, one in log_z.items()} if isinstance(log_z, Mapping) else type(log_z)
        raise TypeError(
            f"log_z: got {got}, expected names and LogNormalizers such as {{'forward': ..., 'reverse': ...}}."
        )
    shapes = {np.shape(one.value) for one in log_z.values()}
    if len(shapes) != 1:
        raise ValueError(f"log_z: got entries of shapes {sorted(shapes)}, expected at least one, all of one shape.")
    (shape,) = shapes
    dims = ("estimator", *(f"row_dim_{axis}" for axis in range(len(shape))))
    fields = {
        field: (dims, np.stack([np.broadcast_to(getattr(one, field), shape) for one in log_z.values()]))
        for field in LogNormalizer._fields
    }
    return xr.Dataset(fields, coords={"estimator": np.asarray(list(log_z), dtype=object)})


def training_group(history: Mapping[str, np.ndarray]) -> xr.Dataset:
    """Metrics along ``step``, one per update; evaluations along ``evaluation_step``, the updates they were made after."""
    metrics = {name: np.asarray(x) for name, x in history.items() if not name.startswith("evaluation_")}
    evaluations = {name: np.asarray(x) for name, x in history.items() if name.startswith("evaluation_")}
    group = _dataset(metrics, sample_dims=["step"])
    along: Any = {name: ("evaluation_step", x) for name, x in evaluations.items()}
    # ArviZ 1.x notes the dimension as a list of one, which a netCDF file gives back as a string.
    return _plain_attrs(group.assign(along), {"sample_dims": "step"})


def _plain_attrs(group: xr.Dataset, attrs: dict[str, Any]) -> xr.Dataset:
    """ArviZ's attributes less those that a netCDF file would give back as another type, and ours."""
    group.attrs = {**{name: value for name, value in group.attrs.items() if name != "sample_dims"}, **attrs}
    return group


def sampler_attrs(sampler: SamplerState) -> dict[str, Any]:
    """Name of a sampler's kernel, and its scalar tunables as they are now."""
    values = {
        name: value for name, value in tunables(sampler).items() if eqx.is_array_like(value) and np.ndim(value) == 0
    }
    return {"kernel": kernel_name(sampler.kernel), **{name: float(value) for name, value in values.items()}}


def kernel_name(kernel: Kernel) -> str:
    """What a kernel is called: the function that built it, or its class.

    Example:
        >>> import ebm_ppl as ebm
        >>> [kernel_name(k) for k in (ebm.kernels.mala(step_size=0.1), ebm.kernels.hmc(0.1, 3), ebm.kernels.gibbs())]
        ['mala', 'hmc', 'gibbs']
    """
    func = function_behind(kernel)
    build = getattr(func, "build", func)
    name = getattr(build, "__name__", type(build).__name__)
    if name == "as_top_level_api":  # what BlackJAX calls every sampler, each in a module of its own
        name = build.__module__.rpartition(".")[2]
    return name.lstrip("_").lower()


def parameters_sha256(potential: Any) -> str | None:
    """SHA-256 of a potential's arrays with their paths, shapes and dtypes; ``None`` where it holds no array.

    Two potentials with the same arrays in the same places have the same fingerprint. What a function closes over is no
    leaf and does not count.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> potential = jax.tree_util.Partial(lambda p, x: p * x**2, jnp.array(2.0))
        >>> parameters_sha256(potential)[:8] == parameters_sha256(jax.tree.map(lambda p: p + 1, potential))[:8]
        False
    """
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(potential) if eqx.is_array(leaf)]
    if not leaves:
        return None
    digest = hashlib.sha256()
    for path, leaf in leaves:
        array = np.asarray(on_host(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Root attributes that every tree has."""
    return {
        "inference_library": "ebm_ppl",
        "inference_library_version": version("ebm-ppl"),
        **{f"{name}_version": version(name) for name in ("jax", "numpyro", "blackjax")},
    }
