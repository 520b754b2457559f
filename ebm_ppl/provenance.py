"""What an EBM site's energy depends on: the latent sites and parameters that reach its unnormalised density.

Whether log Z may be ignored is a question about the model, not about values: eager runs have concrete latents and
compiled runs have abstract data, so looking at tracers errs both ways. This module asks JAX's provenance analysis.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.distributions.distribution import Unit
from numpyro.infer.initialization import init_to_sample
from numpyro.ops.provenance import eval_provenance

from ebm_ppl.distributions import EBM, find_ebms, map_ebms
from ebm_ppl.potentials import find_short_runs

_PREFIX = "site "


class SiteDependencies(NamedTuple):
    """What reaches one EBM site.

    Attributes:
        observed: Whether the site is observed.
        latents: Names of latent sample sites that its energy or base depends on.
        params: Names of ``numpyro.param`` sites that it depends on.
        weight: Names of the sites that decide how often its log Z counts in the log joint: those behind a mask, a scale
            or the responsibilities of a mixture. Empty where log Z is a term of its own.
        condition: Names of the sites and parameters that its condition depends on; empty where the condition is data.
        is_normalized: Whether every EBM of the site carries a log normaliser already.
        is_discrete: Whether its values are.
        has_rows: Whether an EBM of the site has one normaliser per row.
        in_scan: Whether it sits inside ``numpyro.contrib.control_flow.scan``, which hides what its energy depends on.
        short_run: Steps of the short run that an energy of the site was trained by; zero for all others.
    """

    observed: bool
    latents: frozenset[str]
    params: frozenset[str]
    weight: frozenset[str]
    condition: frozenset[str]
    is_normalized: bool
    is_discrete: bool = False
    has_rows: bool = False
    in_scan: bool = False
    short_run: int = 0


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
    flags: dict[str, dict[str, Any]] = {}

    def inputs() -> tuple[dict[str, Any], dict[str, Any]]:
        seeded = handlers.substitute(handlers.seed(model, 0), substitute_fn=any_value)
        trace = _isolated_trace(seeded, args, kwargs)
        sites = {name: site for name, site in trace.items() if site["type"] in ("sample", "param")}
        latents = {n: s["value"] for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        params = {n: s["value"] for n, s in sites.items() if s["type"] == "param"}
        return latents, params

    def densities(**values: Any) -> dict[str, tuple[list[Any], Any, list[Any]]]:
        data = {name.removeprefix(_PREFIX): value for name, value in values.items()}
        trace = _isolated_trace(handlers.substitute(handlers.seed(model, 0), data=data), args, kwargs)
        reached = {}
        for name, site in trace.items():
            if site["type"] == "sample" and (ebms := find_ebms(site["fn"])):
                flags[name] = {
                    "observed": bool(site["is_observed"]),
                    "is_normalized": all(ebm.log_normalizer is not None for ebm in ebms),
                    "is_discrete": all(ebm.base.is_discrete for ebm in ebms),
                    "has_rows": any(ebm.batch_shape for ebm in ebms),
                    "in_scan": bool(site.get("_control_flow_done", False)),
                    "short_run": max((run.num_steps for e in ebms for run in find_short_runs(e.potential)), default=0),
                }
                at_constant = [_density_at_constant(ebm) for ebm in ebms]
                try:
                    weight = jax.grad(_log_density)(0.0, site)
                    reached[name] = at_constant, weight, jax.tree.leaves([ebm.condition for ebm in ebms])
                except ValueError as error:
                    raise ValueError(f"site '{name}': {error}") from error
        return reached

    latents, params = jax.eval_shape(inputs)
    # The prefix keeps a site called "fn" apart from the function's own argument.
    reached = eval_provenance(densities, **{_PREFIX + name: value for name, value in (latents | params).items()})

    def names(*sources: frozenset[str]) -> frozenset[str]:
        return frozenset(source.removeprefix(_PREFIX) for source in frozenset().union(*sources))

    return {
        name: SiteDependencies(
            latents=names(*sources) & frozenset(latents),
            params=names(*sources) & frozenset(params),
            weight=names(weight),
            condition=names(*conditions),
            **flags[name],
        )
        for name, (sources, weight, conditions) in reached.items()
    }


def factor_sites(model: Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None) -> tuple[str, ...]:
    """Names of the ``numpyro.factor`` sites of a model, which add a term to the log joint that nobody normalises."""
    names: list[str] = []

    def collect() -> None:
        seeded = handlers.substitute(handlers.seed(model, 0), substitute_fn=any_value)
        trace = _isolated_trace(seeded, args, kwargs or {})
        names.extend(name for name, site in trace.items() if isinstance(site.get("fn"), Unit))

    jax.eval_shape(collect)
    return tuple(names)


def normalizer_kinds(
    model: Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None
) -> dict[str, str]:
    """How log Z of every EBM site of a model is treated, for those that a policy has treated: ``{site: kind}``.

    Example:
        >>> import numpyro, numpyro.distributions as dist, ebm_ppl
        >>> def model():
        ...     numpyro.sample("x", EBM(lambda x: x**4, dist.Normal(0.0, 1.0)), obs=0.5)
        >>> normalizer_kinds(model), normalizer_kinds(ebm_ppl.handlers.exact_normalizer(model))
        ({}, {'x': 'exact'})
    """
    kinds: dict[str, str] = {}

    def collect() -> None:
        seeded = handlers.substitute(handlers.seed(model, 0), substitute_fn=any_value)
        for name, site in _isolated_trace(seeded, args, kwargs or {}).items():
            found = {ebm.normalizer_kind for ebm in find_ebms(site["fn"])} if site["type"] == "sample" else set()
            if found - {None}:
                kinds[name] = ", ".join(sorted(map(str, found)))

    jax.eval_shape(collect)
    return kinds


def any_value(site: dict[str, Any]) -> Any:
    """A value of the right shape for every latent site. An EBM cannot be sampled, and its support may have no bijector."""
    if site["type"] == "sample" and not site["is_observed"] and find_ebms(site["fn"]):
        dtype = jnp.result_type(int if site["fn"].is_discrete else float)
        return jnp.zeros(site["fn"].shape(site["kwargs"]["sample_shape"]), dtype)
    return init_to_sample(site)


def _isolated_trace(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Trace a model without the handlers around the caller seeing its sites."""
    with handlers.block():
        return handlers.trace(model).get_trace(*args, **kwargs)


def _density_at_constant(ebm: EBM) -> Any:
    # Nothing is computed here: that the event may lie outside the support hides no dependence, and the support counts.
    dtype = jnp.result_type(int if ebm.base.is_discrete else float)
    return ebm.unnormalized_log_prob(jnp.zeros(ebm.batch_shape + ebm.event_shape, dtype))


def _log_density(log_normalizer: Any, site: dict[str, Any]) -> Any:
    """Log density of one site, scale included, as a function of log Z. Its derivative is how often log Z counts."""

    def normalized(ebm: EBM) -> EBM:
        return ebm.with_normalizer(log_normalizer, "constant") if ebm.log_normalizer is None else ebm

    log_prob = map_ebms(normalized, site["fn"]).log_prob(site["value"])
    return jnp.sum(log_prob if site["scale"] is None else site["scale"] * log_prob)
