"""Conversion of NumPyro's MCMC runs, in which a log likelihood without log Z is none."""

import json
from typing import Any

import arviz_base
import jax
import numpy as np
import xarray as xr

from ebm_ppl.diagnostics.groups import versions
from ebm_ppl.likelihood import log_likelihood as site_log_likelihood
from ebm_ppl.provenance import normalizer_kinds


def from_numpyro(mcmc: Any, *, log_likelihood: bool = False) -> xr.DataTree:
    """Convert a run of NumPyro's MCMC, keeping what is no likelihood out of ``log_likelihood``.

    ArviZ's own conversion writes whatever ``log_prob`` returns, and LOO or WAIC of an EBM whose log Z was left out are
    wrong without a sign. Here an observed EBM site enters the group only if its log Z has a value (policies ``"exact"`` and
    ``"estimate"``); its variable then has the attribute ``log_z_se``, the standard error of log Z, and the group names in
    ``left_out`` those that did not enter.

    Args:
        mcmc: A ``numpyro.infer.MCMC`` after ``run``.
        log_likelihood: Add the group.

    Returns:
        A ``DataTree`` with ``posterior``, ``sample_stats`` and ``observed_data``. The root's ``normalizer_kind`` is JSON:
        how the log Z of each EBM site was treated.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(data):
        ...     tilt = numpyro.sample("tilt", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", len(data)):
        ...         site = ebm.EBM(lambda x: -tilt * x, dist.Normal(0.0, 1.0), log_normalizer=tilt**2 / 2)
        ...         numpyro.sample("x", site, obs=data)
        >>> mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(model), num_warmup=20, num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.linspace(0.0, 1.0, 5))
        >>> tree = from_numpyro(mcmc, log_likelihood=True)
        >>> tree["log_likelihood"]["x"].shape, tree["log_likelihood"]["x"].attrs["log_z_se"]
        ((1, 10, 5), 0.0)
        >>> tree.attrs["normalizer_kind"]
        '{"x": "exact"}'
    """
    convert: Any = arviz_base.from_numpyro
    tree = convert(mcmc, log_likelihood=False)
    tree.attrs.update(versions())
    model = getattr(mcmc.sampler, "model", None)
    if model is not None and (kinds := normalizer_kinds(model, mcmc._args, mcmc._kwargs)):
        tree.attrs["normalizer_kind"] = json.dumps(kinds)
    if log_likelihood:
        draws = mcmc.get_samples(group_by_chain=True)
        shape = jax.tree.leaves(draws)[0].shape[:2]
        flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}
        found = site_log_likelihood(mcmc.sampler.model, flat, *mcmc._args, **mcmc._kwargs)
        values = {name: np.asarray(value).reshape(*shape, *value.shape[1:]) for name, value in found.values.items()}
        from_dict: Any = arviz_base.from_dict
        group = (
            from_dict({"log_likelihood": values}, check_conventions=False)["log_likelihood"]
            if values
            else xr.DataTree()
        )
        tree["log_likelihood"] = group
        tree["log_likelihood"].attrs["left_out"] = ", ".join(found.left_out)
        for name, error in found.log_z_se.items():
            tree["log_likelihood"][name].attrs["log_z_se"] = error
    return tree
