"""One move of the exchange algorithm: propose, draw auxiliary data, accept or reject."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.gibbs import GIBBS_SITES_KWARG, prototype_trace
from numpyro.infer.util import compute_log_probs, constrain_fn

from ebm_ppl.handlers.unnormalized import unnormalized
from ebm_ppl.infer.auxiliary import Auxiliary
from ebm_ppl.infer.exchange_sites import ExchangeSites, find_sites
from ebm_ppl.infer.random_walk import RandomWalk
from ebm_ppl.types import Array, Key

Values = dict[str, Array]


class Moved(NamedTuple):
    """Outcome of one move.

    Attributes:
        z: Unconstrained values after it.
        accept_prob: Acceptance probability of the proposal; zero where the ratio was NaN.
        is_accepted: Whether it was accepted.
        is_invalid: Whether the ratio was NaN.
        inner_accept_prob: Mean acceptance of the inner kernel; NaN where none ran.
    """

    z: Values
    accept_prob: Array
    is_accepted: Array
    is_invalid: Array
    inner_accept_prob: Array


@dataclass(frozen=True)
class ExchangeMove:
    """A move bound to a model.

    Attributes:
        model: The model without a normaliser policy.
        sites: What moves, and what is exchanged.
        transforms: From unconstrained space to the support of every site of the block; empty where a support depends on
            other values, so that the model has to be run.
        auxiliary: How auxiliary data are drawn.
    """

    model: Callable[..., Any]
    sites: ExchangeSites
    transforms: dict[str, Any]
    auxiliary: Auxiliary
    params: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(
        cls,
        key: Key,
        model: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        sites: tuple[str, ...] | None,
        auxiliary: Auxiliary,
    ) -> "ExchangeMove":
        """Bind a model; see :func:`ebm_ppl.infer.exchange_sites.find_sites` for what is refused."""
        trace = prototype_trace(unnormalized(model), key, args, kwargs)
        found = find_sites(model, args, kwargs, trace, sites, auxiliary)
        supports = {name: trace[name]["fn"].support for name in found.block}
        # As NumPyro does: a bound that is an array may depend on other sites.
        if all(isinstance(leaf, int | float) for leaf in jax.tree.leaves(supports)):
            transforms = {name: biject_to(support) for name, support in supports.items()}
        elif GIBBS_SITES_KWARG in kwargs:
            raise ValueError(
                f"Exchange: the supports of {list(found.block)} have bounds that may depend on other sites, expected fixed "
                "bounds (Python numbers) in a composite kernel."
            )
        else:
            transforms = {}
        return cls(model, found, transforms, auxiliary)

    def with_params(self, trace: dict[str, Any]) -> "ExchangeMove":
        """The same with ``numpyro.param`` sites fixed at their values in a trace, as NumPyro's kernels fix them."""
        return replace(self, params={n: s["value"] for n, s in trace.items() if s["type"] in ("param", "mutable")})

    def _runnable(self) -> Callable[..., Any]:
        # The seed serves models that ask for a key; no latent site is left to sample.
        return handlers.seed(handlers.substitute(unnormalized(self.model), data=self.params), jax.random.key(0))

    def constrain(self, z: Values, model_args: tuple, model_kwargs: dict[str, Any]) -> Values:
        """Unconstrained values on their supports."""
        if self.transforms:
            return {name: self.transforms[name](value) for name, value in z.items()}
        return constrain_fn(self._runnable(), model_args, model_kwargs, z)

    def unconstrain(self, values: Values) -> Values:
        """Inverse of :meth:`constrain`; only where supports are fixed."""
        return {name: jnp.asarray(self.transforms[name].inv(value)) for name, value in values.items()}

    def _densities(self, z: Values, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Array], Any]:
        """Log density of every site without log Z, row by row, Jacobians included, and the sites."""
        values = self.constrain(z, args, kwargs)
        log_probs, trace = compute_log_probs(self._runnable(), args, kwargs, values, sum_log_prob=False)
        for name in self.sites.block:
            transform = biject_to(trace[name]["fn"].support)
            log_probs[f"{name} log_det"] = transform.log_abs_det_jacobian(z[name], values[name])
        return log_probs, trace

    def propose(self, key: Key, z: Values, walk: RandomWalk, args: tuple, kwargs: dict[str, Any]) -> Moved:
        """One Metropolis step with auxiliary data.

        Args:
            key: Random key.
            z: Unconstrained values of the block.
            walk: The proposal.
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
        """
        walk_key, accept_key, *site_keys = jax.random.split(key, 2 + len(self.sites.exchanged))
        flat, unravel = ravel_pytree(z)
        noise = jax.random.normal(walk_key, flat.shape, flat.dtype)
        z_new = unravel(flat + walk.displace(noise))
        here, trace = self._densities(z, args, kwargs)
        there, trace_new = self._densities(z_new, args, kwargs)
        # Differences row by row, data and auxiliary data together: separate sums over many rows would agree in all the
        # digits that float32 keeps.
        changes = {name: there[name] - here[name] for name in there}
        rates = []
        for site_key, name in zip(site_keys, self.sites.exchanged, strict=True):
            site = trace_new[name]
            terms, rate = self.auxiliary.terms(site_key, site["fn"], trace[name]["fn"], jnp.asarray(site["value"]))
            changes[name] = changes[name] + terms
            rates.append(rate)
        log_ratio = sum((jnp.sum(change) for change in changes.values()), start=jnp.zeros(()))
        is_invalid = jnp.isnan(log_ratio)
        accept_prob = jnp.where(is_invalid, 0.0, jnp.minimum(1.0, jnp.exp(log_ratio)))
        is_accepted = jax.random.uniform(accept_key) < accept_prob
        z = jax.tree.map(lambda new, old: jnp.where(is_accepted, new, old), z_new, z)
        return Moved(z, accept_prob, is_accepted, is_invalid, jnp.stack(rates).mean().astype(accept_prob.dtype))
