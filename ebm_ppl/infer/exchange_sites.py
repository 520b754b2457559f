"""Which latent sites an exchange kernel moves and which EBM sites need auxiliary data, or why the model is refused."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, latent_sample_sites, prototype_trace

from ebm_ppl.chains import ChainSimulator
from ebm_ppl.checks import check_rows, is_traced
from ebm_ppl.distributions import find_ebms, is_ebm
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.handlers.unnormalized import unnormalized
from ebm_ppl.infer.auxiliary import WRAPPERS, Auxiliary
from ebm_ppl.provenance import SiteDependencies, ebm_dependencies
from ebm_ppl.roles import refuse_scan, refuse_short_run
from ebm_ppl.supports import ambient_sphere
from ebm_ppl.types import Array, Kernel


class ExchangeSites(NamedTuple):
    """What an exchange kernel works on.

    Attributes:
        block: Latent sites that it moves.
        exchanged: EBM sites whose log Z depends on the block: the ones that need auxiliary data.
    """

    block: tuple[str, ...]
    exchanged: tuple[str, ...]


def find_sites(
    model: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    trace: Any,
    sites: Sequence[str] | None,
    auxiliary: Auxiliary,
) -> ExchangeSites:
    """The sites of a model, after every refusal.

    Args:
        model: The model, without a normaliser policy.
        args: Its positional arguments.
        kwargs: Its keyword arguments; inside a composite kernel they hold the values of the sites held fixed.
        trace: A trace of the model.
        sites: The block the user asked for.
        auxiliary: How auxiliary data are drawn.

    Raises:
        UnknownNormalizerError: the exchange move cannot account for log Z of this model.
        ValueError: the block does not fit the model, the inner kernel has no accept step, or observed data are empty, not
            finite or outside their support.
        NotImplementedError: an EBM has no sampler and no inner kernel was given.
    """
    latents = latent_sample_sites(trace)
    found = _unknown(model, args, kwargs)
    for name, each in found.items():
        refuse_scan(name, each)
        refuse_short_run(name, each)
    needed = frozenset().union(*(each.latents for each in found.values()))
    block = _block(latents, needed, found, sites, GIBBS_SITES_KWARG in kwargs)
    for name in block:
        if trace[name]["fn"].is_discrete:
            raise ValueError(
                f"Exchange: site '{name}' is discrete, expected continuous sites to walk on. Leave it to "
                "numpyro.infer.gibbs.DiscreteGibbs in a Gibbs composition, or sum it out of the model."
            )
    exchanged = tuple(name for name in trace if name in found and found[name].latents)
    for name in exchanged:
        _require_exchangeable(name, found[name], trace[name])
        (ebm,) = find_ebms(trace[name]["fn"])
        if auxiliary.num_steps is None and ebm.sampler is None:
            raise NotImplementedError(
                f"Exchange: site '{name}' has no sampler to draw auxiliary data with. Attach an exact one with "
                "EBM(..., sampler=function), or run inner chains: Exchange(model, inner_kernel=ebm_ppl.kernels.mala("
                "step_size=...), inner_steps=...)."
            )
        if auxiliary.num_steps is None and isinstance(ebm.sampler, ChainSimulator):
            # Started at the base they keep what a frozen chain has of it, and the ratio then favours the frozen end.
            raise ValueError(
                f"Exchange: the sampler of site '{name}' runs chains from the base, as handlers.simulate does, and is not "
                "exact; the error in the posterior has no bound. Run inner chains from the data: Exchange(model, "
                "inner_kernel=..., inner_steps=...)."
            )
        if auxiliary.num_bridges and _is_spherical(ebm.support):
            raise ValueError(
                f"num_bridges: site '{name}' lives on the sphere, where bridges are not exact; expected 0."
            )
        if auxiliary.kernel is not None:
            _require_accept_step(name, auxiliary.kernel, ebm.transform.inverse_shape(ebm.event_shape))
        if trace[name]["is_observed"]:
            _check_data(name, trace[name])
    return ExchangeSites(block, exchanged)


def _block(
    latents: tuple[str, ...],
    needed: frozenset[str],
    found: dict[str, SiteDependencies],
    sites: Sequence[str] | None,
    is_composed: bool,
) -> tuple[str, ...]:
    unknown = sorted(set(sites or ()) - set(latents))
    if unknown:
        raise ValueError(f"sites: got {unknown}, expected latent sample sites of the model: {sorted(latents)}.")
    if not needed:
        what = f"none of its EBM sites {sorted(found)} depends" if found else "it has no EBM site that depends"
        raise UnknownNormalizerError(
            f"Exchange: {what} on a latent site, so log Z is a constant and there is nothing to exchange. Use "
            "NUTS(ebm_ppl.handlers.constant_normalizer(model)). (EBMs whose log_normalizer is given do not count.)"
        )
    block = latents if is_composed else tuple(sites or (name for name in latents if name in needed))
    others = [name for name in latents if name not in block]
    if others:
        raise ValueError(
            f"Exchange: latent site(s) {others} would never move: the block is {list(block)}, the sites that reach the "
            f"energy of an EBM. Compose: Gibbs([(Exchange(m), {list(block)}), (NUTS(m), None)]) from numpyro.infer.gibbs "
            f"with m = constant_normalizer(model, given={list(block)}), or move all of them together by the random walk "
            f"with sites={[*block, *others]}."
        )
    return tuple(block)


def _is_spherical(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(ambient_sphere))


def _require_exchangeable(name: str, found: SiteDependencies, site: dict[str, Any]) -> None:
    if found.weight:
        raise UnknownNormalizerError(
            f"site '{name}': how often its log Z counts depends on {{{', '.join(sorted(found.weight))}}}, as in a mixture "
            "or under a mask or scale with latent values; one auxiliary row per data row does not cancel it. Give the EBM "
            "a log_normalizer."
        )
    fn = site["fn"]
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    if not is_ebm(fn):
        raise UnknownNormalizerError(
            f"site '{name}': got an EBM inside a {type(fn).__name__}, expected it under plates, expand, to_event, mask and "
            "transforms only. Give the EBM a log_normalizer."
        )
    scale = site["scale"]
    if scale is not None and (is_traced(scale) or not bool(np.all(np.asarray(scale) == 1.0))):
        raise UnknownNormalizerError(
            f"site '{name}': its log density is scaled by {scale}, as by a subsample plate or handlers.scale; Z to that "
            "power has no auxiliary data. Use all rows: Exchange needs every row of the data at every step."
        )


def _require_accept_step(name: str, kernel: Kernel, shape: tuple[int, ...]) -> None:
    if is_traced(kernel):
        return
    # Chains may be initialised inside a trace, where even constants would become abstract.
    with jax.ensure_compile_time_eval():
        has_accept_step = not bool(_has_no_rate(kernel, shape))
    if not has_accept_step:
        raise ValueError(
            f"inner_kernel: got a kernel without an accept step for site '{name}'; its stationary law is not the EBM, and "
            "the posterior would be biased however long the inner chains. Use kernels.mala or kernels.hmc."
        )


@partial(jax.jit, static_argnames="shape")
def _has_no_rate(kernel: Kernel, shape: tuple[int, ...]) -> Array:
    algorithm, key = kernel(lambda x: 0.5 * jnp.sum(x**2)), jax.random.key(0)
    info: Any = algorithm.step(key, algorithm.init(jnp.zeros((1, *shape)), key))[1]
    return jnp.isnan(info.acceptance_rate).any()


def _check_data(name: str, site: dict[str, Any]) -> None:
    value, fn = site["value"], site["fn"]
    if is_traced(value, fn) or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return
    with jax.ensure_compile_time_eval():
        value = jnp.asarray(value)
        value = jnp.broadcast_to(value, jnp.broadcast_shapes(value.shape, fn.shape()))
        value = _without_masked(value, fn)
        rows = value.reshape(-1, *value.shape[value.ndim - fn.event_dim :])
        check_rows(f"observed data of site '{name}'", rows, event_shape=fn.event_shape, support=fn.support)


def _without_masked(value: Array, fn: Any) -> Array:
    """Masked rows are not data: whatever they hold, NaN included, is replaced."""
    while isinstance(fn, WRAPPERS) and not isinstance(fn, dist.TransformedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            rows = value.shape[: value.ndim - fn.event_dim]
            mask = jnp.broadcast_to(jnp.asarray(fn._mask), rows).reshape(rows + (1,) * fn.event_dim)
            value = jnp.where(mask, value, fn.support.feasible_like(value))
        fn = fn.base_dist
    return value


def conditioning_values(
    model: Callable[..., Any], args: tuple, kwargs: dict[str, Any], sites: Sequence[str] | None
) -> dict[str, Array]:
    """Some value of every latent site outside the block, in whose place another kernel will put its own."""
    trace = prototype_trace(unnormalized(model), jax.random.key(0), args, kwargs)
    latents = latent_sample_sites(trace)
    block = sites or frozenset().union(*(each.latents for each in _unknown(model, args, kwargs).values()))
    return {name: trace[name]["value"] for name in latents if name not in block}


def _unknown(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, SiteDependencies]:
    """The EBM sites whose log Z is not given."""
    return {name: each for name, each in ebm_dependencies(model, args, kwargs).items() if not each.is_normalized}
