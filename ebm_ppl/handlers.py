"""Effect handlers that account for log Z of the EBM sites of a NumPyro model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import trace
from numpyro.primitives import _PYRO_STACK, Messenger

from ebm_ppl.checks import check_rows, is_traced
from ebm_ppl.distributions import EBM, find_ebms, map_ebms
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.provenance import SiteDependencies, ebm_dependencies
from ebm_ppl.types import Array


class constant_normalizer(Messenger):
    """Leave out log Z of EBM sites, after proving that it is a constant.

    Where nothing that inference moves reaches an energy, its log Z is one additive constant of the log joint, and MCMC
    over the other sites (or over the EBM's own value) is exact without it. The handler proves this by provenance before
    it runs the model, once per shape of the arguments, and refuses otherwise. The log joint is then known up to that
    constant: evidences, Bayes factors and WAIC are not.

    The proof sees the model it wraps and nothing outside: wrap the whole model, and let handlers that fix or replace a
    site (``condition``, ``lift``) act inside, as in ``constant_normalizer(condition(model, data))``.

    Args:
        fn: A whole NumPyro model.

    Returns:
        The model with log Z of every EBM set to zero (its policy is ``"constant"``). An EBM whose log normaliser was
        given keeps it.

    Raises:
        UnknownNormalizerError: (when the model runs) a latent site or a parameter reaches the energy or the base of an
            EBM site, so that log Z is not constant; or log Z is no term of its own in the log joint (an EBM in a
            mixture, or under a mask or scale with latent values); or the model is only part of a larger one.
        ValueError: (when the model runs) the observed values of an EBM site are empty, not finite or outside its
            support.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(y):
        ...     x = numpyro.sample("x", ebm.EBM(lambda x: x**4, dist.Normal(0.0, 1.0)))
        ...     numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        >>> nuts = numpyro.infer.NUTS(constant_normalizer(model))
        >>> mcmc = numpyro.infer.MCMC(nuts, num_warmup=50, num_samples=50, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), 1.0)
        >>> mcmc.get_samples()["x"].shape
        (50,)
    """

    def __init__(self, fn: Callable[..., Any] | None = None):
        super().__init__(fn)
        self._proved: set[Any] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prove that log Z is constant, once per shape of the arguments, and run the model."""
        if self.fn is None:
            # Used as a decorator, as NumPyro's own handlers can be.
            return type(self)(*args, **kwargs)
        _require_whole_model()
        key = _signature(args, kwargs)
        if key is None or key not in self._proved:
            for name, found in ebm_dependencies(self.fn, args, kwargs).items():
                if not found.is_normalized:
                    _require_constant(name, found)
            self._proved.add(key)
        return super().__call__(*args, **kwargs)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Rewrite the EBMs of one sample site, under whatever wrappers they sit."""
        if msg["type"] != "sample" or not find_ebms(msg["fn"]):
            return
        if not self._proved:
            raise TypeError(
                "constant_normalizer: got no model, expected a call constant_normalizer(model)(...); a context manager "
                "has no model to prove anything about."
            )
        msg["fn"] = map_ebms(_with_constant, msg["fn"])

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Check observed values, also those that a handler around this one has supplied."""
        if msg["type"] == "sample" and msg["is_observed"] and find_ebms(msg["fn"]):
            _check_observed(msg)


def _with_constant(ebm: EBM) -> EBM:
    return ebm.with_normalizer(0.0, "constant") if ebm.log_normalizer is None else ebm


def _require_whole_model() -> None:
    """A submodel's proof cannot see the latent sites of the model around it, which reach it through closures."""
    innermost = next((handler for handler in reversed(_PYRO_STACK) if isinstance(handler, trace)), None)
    if innermost is None:
        return
    moving = [
        name
        for name, site in innermost.trace.items()
        if site["type"] == "param" or (site["type"] == "sample" and not site["is_observed"])
    ]
    if moving:
        raise UnknownNormalizerError(
            f"constant_normalizer: got a part of a model that has already sampled {{{', '.join(moving)}}}, on which its "
            "log Z may depend unseen; expected the whole model, as in constant_normalizer(model)."
        )


def _require_constant(name: str, found: SiteDependencies) -> None:
    if name in found.latents:
        raise UnknownNormalizerError(
            f"site '{name}': its potential depends on its own value outside the event, as it does for a site inside "
            "numpyro.contrib.control_flow.scan, so log Z cannot be proved constant. Declare the EBM outside the scan, "
            "or give it a log_normalizer."
        )
    if found.latents:
        sites = ", ".join(sorted(found.latents))
        raise UnknownNormalizerError(
            f"site '{name}': its potential depends on latent site(s) {{{sites}}}, so the posterior of {{{sites}}} contains "
            f"log Z({sites}), which constant_normalizer would drop. Give the EBM a log_normalizer that is a function of "
            f"{{{sites}}}, or hold them fixed with constant_normalizer(handlers.condition(model, values))."
        )
    if found.params:
        sites = ", ".join(sorted(found.params))
        raise UnknownNormalizerError(
            f"site '{name}': its potential depends on numpyro.param {{{sites}}}, and log Z({sites}) is not constant while "
            "they are learned. Train the energy with ebm_ppl.fit, or give the EBM a log_normalizer."
        )
    if found.weight:
        sites = ", ".join(sorted(found.weight))
        raise UnknownNormalizerError(
            f"site '{name}': how often its log Z counts depends on {{{sites}}}, as in a mixture or under a mask or scale "
            "with latent values, so log Z is not an additive constant. Give the EBM a log_normalizer."
        )


def _check_observed(msg: dict[str, Any]) -> None:
    value, fn = jnp.asarray(msg["value"]), msg["fn"]
    if is_traced(value) or not jnp.issubdtype(value.dtype, jnp.floating):
        return
    if value.ndim >= fn.event_dim:
        value = _feasible_where_masked(value, fn)
        value = value.reshape(-1, *value.shape[value.ndim - fn.event_dim :])
    check_rows(f"observed data of site '{msg['name']}'", value, event_shape=fn.event_shape, support=fn.support)


def _feasible_where_masked(value: Array, fn: Any) -> Array:
    """Masked rows are not data: whatever they hold, NaN included, is replaced."""
    while isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution | dist.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            rows = value.shape[: value.ndim - fn.event_dim]
            mask = jnp.broadcast_to(jnp.asarray(fn._mask), rows).reshape(rows + (1,) * fn.event_dim)
            value = jnp.where(mask, value, fn.support.feasible_like(value))
        fn = fn.base_dist
    return value


def _signature(args: tuple, kwargs: dict[str, Any]) -> Any:
    """Shapes of arrays and values of everything else, which may steer Python control flow; ``None`` if unhashable."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    key = tuple(
        (leaf.shape, str(leaf.dtype)) if isinstance(leaf, jax.Array | np.ndarray) else (type(leaf), leaf)
        for leaf in leaves
    )
    try:
        hash((structure, key))
    except TypeError:
        return None
    return structure, key
