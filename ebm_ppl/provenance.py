"""What an EBM site's energy depends on: the latent sites and parameters that reach its unnormalised density.

Whether log Z may be ignored is a question about the model, not about values: eager runs have concrete latents and
compiled runs have abstract data, so looking at tracers errs both ways. This module asks JAX's provenance analysis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.initialization import init_to_sample
from numpyro.ops.provenance import eval_provenance

from ebm_ppl.distributions import EBM, find_ebms


class SiteDependencies(NamedTuple):
    """What reaches one EBM site.

    Attributes:
        observed: Whether the site is observed.
        latents: Names of latent sample sites that its energy or base depends on.
        params: Names of ``numpyro.param`` sites that it depends on.
        is_normalized: Whether every EBM of the site carries a log normaliser already.
    """

    observed: bool
    latents: frozenset[str]
    params: frozenset[str]
    is_normalized: bool


def ebm_dependencies(
    model: Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
) -> dict[str, SiteDependencies]:
    """Find, for every EBM site of a model, the latents and parameters that its normaliser depends on.

    The energy is evaluated abstractly at a constant event, so the site's own value does not count, and dependence
    through closures, deterministic sites, the base, scans and transforms does. The answer is conservative: a dependence
    that cancels numerically still counts. Dependence through shapes or Python control flow is invisible.

    Args:
        model: A NumPyro model. It need not be seeded.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        One :class:`SiteDependencies` per EBM site, by name.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model():
        ...     scale = numpyro.sample("scale", dist.LogNormal())
        ...     numpyro.sample("x", EBM(lambda x: scale * x**2, dist.Normal(0.0, 1.0)))
        >>> sorted(ebm_dependencies(model)["x"].latents)
        ['scale']
    """
    kwargs = kwargs or {}
    flags: dict[str, tuple[bool, bool]] = {}

    def inputs() -> tuple[dict[str, Any], dict[str, Any]]:
        seeded = handlers.substitute(handlers.seed(model, 0), substitute_fn=init_to_sample)
        trace = _isolated_trace(seeded, args, kwargs)
        sites = {name: site for name, site in trace.items() if site["type"] in ("sample", "param")}
        latents = {n: s["value"] for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        params = {n: s["value"] for n, s in sites.items() if s["type"] == "param"}
        return latents, params

    def densities(**values: Any) -> dict[str, list[Any]]:
        trace = _isolated_trace(handlers.substitute(handlers.seed(model, 0), data=values), args, kwargs)
        reached = {}
        for name, site in trace.items():
            if site["type"] == "sample" and (ebms := find_ebms(site["fn"])):
                flags[name] = bool(site["is_observed"]), all(ebm.log_normalizer is not None for ebm in ebms)
                reached[name] = [_density_at_constant(ebm) for ebm in ebms]
        return reached

    latents, params = jax.eval_shape(inputs)
    reached = eval_provenance(densities, **latents, **params)
    return {
        name: SiteDependencies(
            observed=flags[name][0],
            latents=frozenset().union(*sources) & frozenset(latents),
            params=frozenset().union(*sources) & frozenset(params),
            is_normalized=flags[name][1],
        )
        for name, sources in reached.items()
    }


def _isolated_trace(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Trace a model without the handlers around the caller seeing its sites."""
    with handlers.block():
        return handlers.trace(model).get_trace(*args, **kwargs)


def _density_at_constant(ebm: EBM) -> Any:
    # Outside the support the density is a constant -inf; energy and base are read apart so that nothing is masked away.
    event = jnp.zeros(ebm.batch_shape + ebm.event_shape, jnp.result_type(int if ebm.base.is_discrete else float))
    lead = ebm.batch_shape
    return ebm.base.log_prob(event) - ebm._energies(event, lead)
