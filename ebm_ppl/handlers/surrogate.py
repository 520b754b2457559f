"""``surrogate_normalizer``: a smooth log Z from a fixed pool of draws, which makes NUTS legal near the pool."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax.scipy.special import logsumexp

from ebm_ppl.checks import check_count
from ebm_ppl.distributions import EBM, find_ebms
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.handlers.left_out import leave_out
from ebm_ppl.handlers.policy import Policy
from ebm_ppl.handlers.simulate import simulate
from ebm_ppl.provenance import SiteDependencies, ebm_dependencies
from ebm_ppl.types import Array, Kernel, Key

ESS = "$surrogate_ess"
"""What the name of an EBM site is followed by at the deterministic site that records the pool's effective sample size."""


class Pool(NamedTuple):
    """Draws of an EBM at reference parameters.

    Attributes:
        events: ``(draw, *batch_shape, *event_shape)``.
        log_density: Their unnormalised log density at the reference, ``(draw, *batch_shape)``.
    """

    events: Array
    log_density: Array


def make_pools(
    key: Key,
    model: Callable[..., Any],
    *args: Any,
    at: Mapping[str, Any],
    num_draws: int = 4096,
    kernel: Kernel | None = None,
    num_steps: int = 200,
    **kwargs: Any,
) -> dict[str, Pool]:
    """Draw the pools of a surrogate: for every EBM that depends on latent sites, draws at one value of those sites.

    Args:
        key: Random key.
        model: A NumPyro model.
        *args: Its arguments.
        at: Value of every latent site that an EBM depends on, best a posterior mode: pools are good near it only.
        num_draws: Draws per pool and row, independent of each other.
        kernel: Simulates EBMs that have no sampler attached, one chain per draw.
        num_steps: Its steps per draw.
        **kwargs: Keyword arguments of the model.

    Returns:
        One :class:`Pool` per EBM site.

    Raises:
        ValueError: ``at`` lacks a site, or no EBM depends on a latent site.
        NotImplementedError: no ``kernel``, and an EBM without a sampler.

    Example:
        See :class:`surrogate_normalizer`.
    """
    check_count("num_draws", num_draws, 2)
    sites = {
        name: found
        for name, found in ebm_dependencies(model, args, kwargs).items()
        if found.latents and not found.is_normalized
    }
    if not sites:
        raise ValueError("model: got no EBM that depends on a latent site, expected one; nothing needs a surrogate.")
    missing = set().union(*(found.latents for found in sites.values())) - set(at)
    if missing:
        raise ValueError(f"at: got no value for {{{', '.join(sorted(missing))}}}, on which log Z depends.")
    simulated = model if kernel is None else simulate(model, kernel=kernel, num_steps=num_steps)
    trace_key, *keys = jax.random.split(key, 1 + len(sites))
    seeded = numpyro.handlers.seed(numpyro.handlers.condition(simulated, dict(at)), trace_key)
    with numpyro.handlers.block():
        trace = numpyro.handlers.trace(_without_latent_draws(seeded)).get_trace(*args, **kwargs)
    pools = {}
    for name, key in zip(sorted(sites), keys, strict=True):
        ebm = _only_ebm(name, trace[name]["fn"])
        events = ebm.sample(key, (num_draws,))
        pools[name] = Pool(events, ebm.unnormalized_log_prob(events))
    return pools


def _without_latent_draws(model: Callable[..., Any]) -> Callable[..., Any]:
    """Latent sites that no pool depends on need only a shape."""
    return numpyro.handlers.substitute(model, substitute_fn=_any_value)


def _any_value(site: dict[str, Any]) -> Any:
    if site["type"] == "sample" and not site["is_observed"] and find_ebms(site["fn"]):
        return jnp.zeros(site["fn"].shape(site["kwargs"]["sample_shape"]))
    return numpyro.infer.init_to_sample(site)


class surrogate_normalizer(Policy):
    """Replace log Z by an importance-sampling function of the latent sites, smooth and without noise.

    ``log Z(t) - log Z(t0) ~= log mean_j exp(u(t, x_j) - u(t0, x_j))``, with a fixed pool ``x_j ~ p(. | t0)`` and
    ``u = log base - U``: one deterministic function of the latents ``t``, so NUTS, SVI and any gradient method may use it.
    It is approximate, and useless where the pool does not represent ``p(. | t)``. There, where the effective sample size
    falls below ``min_ess`` of the pool, it is NaN: NUTS rejects and reports a divergence, and
    :class:`ebm_ppl.infer.SurrogateNUTS` stops with a remedy. The effective sample size of every draw is recorded at the
    site ``<site>$surrogate_ess``.

    Args:
        fn: A whole NumPyro model.
        pools: From :func:`make_pools`.
        min_ess: Smallest effective sample size that is trusted, as a fraction of the pool.

    Returns:
        The model with the policy ``"surrogate"``: its log density is known up to one constant.

    Raises:
        UnknownNormalizerError: (when the model runs) an EBM depends on ``numpyro.param`` sites, which move away from
            any fixed pool, or on none at all, or its log Z counts a varying number of times.
        ValueError: an EBM site has no pool.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(data):
        ...     tilt = numpyro.sample("tilt", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", len(data)):
        ...         numpyro.sample("x", ebm.EBM(lambda x: -tilt * x, dist.Normal(0.0, 1.0)), obs=data)
        >>> data = 0.5 + jnp.linspace(-1.0, 1.0, 50)
        >>> pools = make_pools(jax.random.key(0), model, data, at={"tilt": 0.5}, kernel=ebm.kernels.mala(step_size=0.5))
        >>> nuts = numpyro.infer.NUTS(surrogate_normalizer(model, pools))
        >>> mcmc = numpyro.infer.MCMC(nuts, num_warmup=200, num_samples=300, progress_bar=False)
        >>> mcmc.run(jax.random.key(1), data)
        >>> bool(abs(mcmc.get_samples()["tilt"].mean() - 50 * 0.5 / 51) < 0.1)  # the exact posterior mean
        True

    References:
        Geyer, Thompson (1992), Constrained Monte Carlo maximum likelihood for dependent data, JRSS B 54.
    """

    def __init__(
        self, fn: Callable[..., Any] | None = None, pools: Mapping[str, Pool] | None = None, *, min_ess: float = 0.1
    ):
        super().__init__(fn)
        if not isinstance(pools, Mapping):
            raise TypeError(f"pools: got {type(pools).__name__}, expected the result of make_pools.")
        if not 0.0 < min_ess < 1.0:
            raise ValueError(f"min_ess: got {min_ess}, expected a fraction in (0, 1).")
        self._pools = dict(pools)
        self._min_ess = min_ess

    def require(self, name: str, found: SiteDependencies) -> None:
        """One fixed pool must serve all values that the inference will visit."""
        if found.params:
            raise UnknownNormalizerError(
                f"site '{name}': its potential depends on numpyro.param {{{', '.join(sorted(found.params))}}}, which "
                "training moves away from any fixed pool. Use negative_phase(model, ...)."
            )
        if found.weight:
            raise UnknownNormalizerError(
                f"site '{name}': how often its log Z counts depends on {{{', '.join(sorted(found.weight))}}}, and a "
                "surrogate knows log Z up to a constant only. Use exact_normalizer, or give the EBM a log_normalizer."
            )
        if found.latents and name not in self._pools:
            raise ValueError(f"pools: got pools for {sorted(self._pools)}, expected one for site '{name}' as well.")

    def account(self, ebm: EBM, msg: dict[str, Any], found: SiteDependencies) -> EBM:
        """The importance-sampling estimate, up to log Z at the reference."""
        if not found.latents:
            return leave_out(ebm)
        pool = self._pools[msg["name"]]
        _only_ebm(msg["name"], msg["fn"])
        if pool.events.shape[1:] != ebm.batch_shape + ebm.event_shape:
            raise ValueError(
                f"pools: got draws of shape {pool.events.shape[1:]} for site '{msg['name']}', expected "
                f"{ebm.batch_shape + ebm.event_shape}. Make the pool with the model and arguments that are used now."
            )
        num_draws = pool.events.shape[0]
        log_weight = ebm.unnormalized_log_prob(pool.events) - pool.log_density
        ess = jnp.exp(2 * logsumexp(log_weight, axis=0) - logsumexp(2 * log_weight, axis=0))
        numpyro.deterministic(msg["name"] + ESS, ess.min())
        value = logsumexp(log_weight, axis=0) - jnp.log(num_draws)
        return ebm.with_normalizer(jnp.where(ess < self._min_ess * num_draws, jnp.nan, value), "surrogate")


def _only_ebm(name: str, fn: Any) -> EBM:
    ebms = find_ebms(fn)
    if len(ebms) > 1:
        raise UnknownNormalizerError(f"site '{name}': got several EBMs in one site, expected one.")
    return ebms[0]
