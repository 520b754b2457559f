"""Conversion of the negative phase, and of all that belongs to it, to ArviZ's ``DataTree``."""

from collections.abc import Mapping
from typing import Any

import arviz_base
import jax
import numpy as np
import xarray as xr

from ebm_ppl.checks import check_count
from ebm_ppl.diagnostics.groups import (
    log_z_group,
    named_leaves,
    parameters_sha256,
    sampler_attrs,
    smc_group,
    training_group,
    versions,
)
from ebm_ppl.diagnostics.numpyro_runs import from_numpyro
from ebm_ppl.info import HAMILTONIAN
from ebm_ppl.kernels.smc import SMCResult
from ebm_ppl.meshes import on_host
from ebm_ppl.normalizer.result import LogNormalizer
from ebm_ppl.sampling import Draws
from ebm_ppl.types import SamplerState


def to_datatree(
    draws: Draws,
    *,
    site: str = "x",
    sampler: SamplerState | None = None,
    history: dict[str, np.ndarray] | None = None,
    posterior: Any = None,
    log_likelihood: bool = False,
    superchain_ids: Any = None,
    smc: SMCResult | None = None,
    log_z: Mapping[str, LogNormalizer] | None = None,
    potential: Any = None,
    num_steps: int | None = None,
    start: str | None = None,
    attrs: dict[str, Any] | None = None,
) -> xr.DataTree:
    """Convert a trace of the negative phase, and what belongs to it, to an ArviZ ``DataTree``.

    Groups:

    - ``negative_phase``: the positions, ``(chain, draw, *event)``, under the name of the EBM site; one variable
      ``site.path`` per leaf where events are pytrees.
    - ``negative_phase_stats``, ``(chain, draw)``: ``potential`` (the energy of the event), ``acceptance_rate``,
      ``diverging``, ``n_grad``, ``n_energy``, ``n_nonfinite``, ``is_finite``, ``log_weight`` and the kernel's own
      statistics. ``energy`` is what ArviZ means by it, the HAMILTONIAN of HMC and NUTS, momentum included; E-BFMI asks for
      that of every step (``arviz_stats.bfmi(tree, group="negative_phase_stats")``), not of every few.
    - ``training``: the history of :func:`ebm_ppl.fit` along ``step``, its evaluations along ``evaluation_step``.
    - ``smc``: particles ``(replicate, particle, *event)`` under the name of the site and their ``log_weight``; per
      replicate ``log_z`` with ``log_z_se``, ``ess`` (the smallest over the temperatures, in particles),
      ``acceptance_rate``, ``num_temperatures``, ``n_grad`` and what else an
      :class:`~ebm_ppl.kernels.smc.SMCResult` has to say.
    - ``log_z``, along ``estimator``: the fields of :class:`~ebm_ppl.normalizer.LogNormalizer`.
    - ``posterior``, ``sample_stats``, ``observed_data`` and ``log_likelihood``: from NumPyro.

    Args:
        draws: From :func:`ebm_ppl.draw`, at frozen parameters.
        site: Name of the EBM site the draws belong to.
        sampler: Adds the name of its kernel and its scalar tunables, the step size among them, to the attributes.
        history: From :func:`ebm_ppl.fit`.
        posterior: A ``numpyro.infer.MCMC`` after ``run``; see :func:`from_numpyro`.
        log_likelihood: Add the log likelihoods of its observed sites.
        superchain_ids: Whole numbers ``(chain,)``: chains that started at one point share one. They become a coordinate
            of the chains. Only such groups mean anything to a nested R-hat, arbitrary ones do not.
        smc: Independent runs of tempered SMC under the same potential, with a leading ``replicate`` axis on every array.
        log_z: Estimates of log Z by name, such as ``{"forward": ..., "reverse": ...}``.
        potential: The sampled potential; adds ``parameters_sha256``, the fingerprint of its arrays.
        num_steps: Kernel steps between draws, as given to :func:`ebm_ppl.draw`.
        start: How the chains started, in words.
        attrs: Further attributes of the root, such as the seed.

    Returns:
        A ``DataTree``; ``to_netcdf(path, engine="h5netcdf")`` stores it.

    Raises:
        TypeError: ``draws``, ``sampler``, ``history``, ``smc`` or ``log_z`` is of another type, or ``superchain_ids`` are
            no whole numbers.
        ValueError: ``superchain_ids`` do not fit the chains, or the arrays of ``draws``, ``smc`` or ``log_z`` are of a
            wrong shape.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> _, draws = ebm.draw(jax.random.key(0), lambda x: 0.5 * jnp.sum(x**2), sampler, 50)
        >>> tree = to_datatree(draws, sampler=sampler, superchain_ids=[0, 0, 1, 1])
        >>> tree["negative_phase"]["x"].shape, tree["negative_phase"].coords["superchain_ids"].values.tolist()
        ((4, 50, 2), [0, 0, 1, 1])
    """
    if not isinstance(draws, Draws):
        raise TypeError(f"draws: got {type(draws).__name__}, expected the result of ebm.draw.")
    _check_fields(draws)
    if not isinstance(site, str):
        raise TypeError(f"site: got {type(site).__name__}, expected the name of a site.")
    if sampler is not None and not isinstance(sampler, SamplerState):
        raise TypeError(f"sampler: got {type(sampler).__name__}, expected the result of ebm.init_sampler.")
    if history is not None and not isinstance(history, Mapping):
        raise TypeError(f"history: got {type(history).__name__}, expected that of ebm.fit.")
    draws, smc = on_host((draws, smc))
    positions = named_leaves(site, draws.position)
    potentials = np.asarray(draws.potential)
    finite = [np.isfinite(x).reshape(*potentials.shape, -1).all(axis=-1) for x in [*positions.values(), potentials]]
    statistics = {
        "potential": potentials,
        "acceptance_rate": np.asarray(draws.acceptance_rate),
        "diverging": np.asarray(draws.is_divergent),
        "n_grad": np.asarray(draws.num_gradients),
        "is_finite": np.all(finite, axis=0),
        "log_weight": np.asarray(draws.log_weight),
        "n_energy": np.asarray(draws.num_energies),
        "n_nonfinite": np.asarray(draws.num_nonfinite),
        **{"energy" if name == HAMILTONIAN else name: np.asarray(x) for name, x in draws.statistics.items()},
    }
    from_dict: Any = arviz_base.from_dict
    tree = from_dict(
        {"negative_phase": positions, "negative_phase_stats": statistics},
        check_conventions=False,  # it warns of more chains than draws, which is how a negative phase is run
    )
    phase_attrs = {
        "site": site,
        **({} if sampler is None else sampler_attrs(sampler)),
        "num_steps": None if num_steps is None else check_count("num_steps", num_steps),
        "parameters_sha256": None if potential is None else parameters_sha256(potential),
        "start": start,
    }
    superchains = None if superchain_ids is None else _check_superchains(superchain_ids, potentials.shape[0])
    for name in ("negative_phase", "negative_phase_stats"):
        tree[name].attrs.update({key: value for key, value in phase_attrs.items() if value is not None})
        if superchains is not None:
            tree[name].coords["superchain_ids"] = ("chain", superchains)
    if history is not None:
        tree["training"] = xr.DataTree(training_group(history))
    if smc is not None:
        tree["smc"] = xr.DataTree(smc_group(site, smc))
    if log_z is not None:
        tree["log_z"] = xr.DataTree(log_z_group(log_z).assign_attrs(site=site))
    tree.attrs = versions()
    if posterior is not None:
        numpyro_tree = from_numpyro(posterior, log_likelihood=log_likelihood)
        for name, group in numpyro_tree.children.items():
            tree[name] = group.copy()
        tree.attrs = {**tree.attrs, **numpyro_tree.attrs}
    tree.attrs = {**tree.attrs, **(attrs or {})}
    return tree


def _check_superchains(superchain_ids: Any, num_chains: int) -> np.ndarray:
    ids = np.asarray(superchain_ids)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"superchain_ids: got dtype {ids.dtype}, expected one whole number per chain.")
    if ids.shape != (num_chains,):
        raise ValueError(f"superchain_ids: got shape {ids.shape}, expected ({num_chains},), one number per chain.")
    return ids.astype(np.int64)


def _check_fields(draws: Draws) -> None:
    """One number of chains and draws for all arrays of a trace."""
    shape = np.shape(draws.potential)
    for name, field in draws._asdict().items():
        for leaf in jax.tree.leaves(field):
            found = np.shape(leaf) if isinstance(leaf, np.ndarray | jax.Array) else ()
            if len(shape) != 2 or found[:2] != shape or 0 in found:
                raise ValueError(
                    f"draws: got {name} of shape {found}, expected (chain, draw, ...) as its energies, {shape}."
                )
            if np.dtype(leaf.dtype).kind in "cOUS":
                raise TypeError(f"draws: got {name} of dtype {leaf.dtype}, expected real numbers.")
