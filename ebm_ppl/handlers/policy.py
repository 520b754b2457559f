"""What every normaliser policy shares: proofs about the whole model, and the rewriting of its EBM sites."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import trace
from numpyro.primitives import _PYRO_STACK, Messenger

from ebm_ppl.checks import check_rows, is_traced
from ebm_ppl.distributions import EBM, find_ebms, map_ebms
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.handlers.callers import is_autoguide_setup
from ebm_ppl.provenance import SiteDependencies, ebm_dependencies
from ebm_ppl.roles import refuse_scan, refuse_short_run
from ebm_ppl.supports import is_circular
from ebm_ppl.types import Array


class Policy(Messenger):
    """A handler that accounts for log Z of every EBM whose log Z is unknown.

    Before a model runs, and once per shape of its arguments, the policy learns by provenance what reaches each EBM site
    and refuses the sites it would get wrong. A subclass says which (:meth:`require`) and what it puts in the place of an
    unknown log Z (:meth:`account`).

    Args:
        fn: A whole NumPyro model.
    """

    trains_by_gradient: ClassVar[bool] = False
    """Whether the gradient of log Z is all that it gives, from draws of whatever kernel it has."""

    def __init__(self, fn: Callable[..., Any] | None = None):
        super().__init__(fn)
        self._proofs: dict[Any, dict[str, SiteDependencies]] = {}
        self._sites: dict[str, SiteDependencies] | None = None
        self._names: dict[int, str] = {}

    def examine(self, found: dict[str, SiteDependencies]) -> None:
        """Refuse the sites, of all EBM sites of the model, that this policy would get wrong."""
        for name, site in found.items():
            if not site.is_normalized:
                refuse_scan(name, site)
                refuse_short_run(name, site, may_train=self.trains_by_gradient)
                self.require(name, site)

    def require(self, name: str, found: SiteDependencies) -> None:
        """Raise ``UnknownNormalizerError``, with the remedy, where this policy would be wrong for a site."""
        raise NotImplementedError

    def account(self, ebm: EBM, msg: dict[str, Any], found: SiteDependencies) -> EBM:
        """The EBM with its log normaliser under this policy."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the proof, once per shape of the arguments, and then the model."""
        if self.fn is None:
            # Used as a decorator, as NumPyro's own handlers can be.
            return self._around(*args, **kwargs)
        require_whole_model(type(self).__name__)
        key = _signature(args, kwargs)
        found = None if key is None else self._proofs.get(key)
        if found is None:
            found = ebm_dependencies(self.fn, args, kwargs)
            self.examine(found)
            if key is not None:
                self._proofs[key] = found
        self._sites, self._names = found, {}
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._sites, self._names = None, {}

    def _around(self, fn: Callable[..., Any]) -> "Policy":
        new = copy.copy(self)
        Policy.__init__(new, fn)
        return new

    def process_message(self, msg: dict[str, Any]) -> None:
        """Rewrite the EBMs of one sample site, under whatever wrappers they sit."""
        self._names[id(msg)] = msg.get("name", "")
        if msg["type"] != "sample" or not find_ebms(msg["fn"]):
            return
        if self._sites is None:
            name = type(self).__name__
            raise TypeError(
                f"{name}: got no model, expected a call {name}(model)(...); a context manager has no model to prove "
                "anything about."
            )
        found = self._sites.get(msg["name"])
        if found is None:
            raise UnknownNormalizerError(
                f"site '{msg['name']}': it was not there when the model was examined, so Python control flow decides "
                "whether it exists. Pass what decides it as an argument of the model."
            )
        if (
            not msg["is_observed"]
            and is_autoguide_setup()
            and any(is_circular(e.support) for e in find_ebms(msg["fn"]))
        ):
            raise UnknownNormalizerError(
                f"site '{msg['name']}': an autoguide spreads a circular EBM over ever more turns of the circle, and "
                "its ELBO grows without bound. Use NUTS, or write a guide with a circular distribution: dist.VonMises."
            )
        msg["fn"] = map_ebms(
            lambda ebm: ebm if ebm.log_normalizer is not None else self.account(ebm, msg, found), msg["fn"]
        )

    def name_inside(self, msg: dict[str, Any]) -> str:
        """The name of a site as the model has it: handlers further out, such as ``scope``, may have changed it since."""
        return self._names.pop(id(msg), msg.get("name", ""))

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Check observed values, also those that a handler around this one has supplied."""
        if msg["type"] == "sample" and msg["is_observed"] and find_ebms(msg["fn"]):
            _check_observed(msg)


def require_whole_model(handler: str) -> None:
    """A submodel's proof cannot see the latent sites of the model around it, which reach it through closures.

    Raises:
        UnknownNormalizerError: the handler sits inside a larger model that has sampled something already.
    """
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
            f"{handler}: got a part of a model that has already sampled {{{', '.join(moving)}}}, on which its log Z may "
            f"depend unseen; expected the whole model, as in {handler}(model)."
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
        (leaf.shape, str(leaf.dtype), _steering(leaf))
        if isinstance(leaf, jax.Array | np.ndarray)
        else (type(leaf), leaf)
        for leaf in leaves
    )
    try:
        hash((structure, key))
    except TypeError:
        return None
    return structure, key


def _steering(leaf: Any) -> bytes:
    """The bytes of a concrete flag or of a few whole numbers: an array of these may steer Python control flow."""
    is_flag = leaf.ndim == 0 or (leaf.size <= 16 and str(leaf.dtype).startswith(("bool", "int", "uint")))
    if is_traced(leaf) or not is_flag or str(leaf.dtype).startswith("key"):
        return b""
    return np.asarray(leaf).tobytes()
