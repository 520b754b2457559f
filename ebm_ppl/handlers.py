"""Effect handlers that account for log Z of the EBM sites of a NumPyro model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from ebm_ppl.checks import check_rows, is_traced
from ebm_ppl.distributions import EBM, find_ebms, map_ebms
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.provenance import SiteDependencies, ebm_dependencies


class constant_normalizer(Messenger):
    """Leave out log Z of EBM sites, after proving that it is a constant.

    Where nothing that inference moves reaches an energy, its log Z is one additive constant of the log joint, and MCMC
    over the other sites (or over the EBM's own value) is exact without it. The handler proves this by provenance before
    it runs the model, once per shape of the arguments, and refuses otherwise. The log joint is then known up to that
    constant: evidences, Bayes factors and WAIC are not.

    Args:
        fn: A NumPyro model.

    Returns:
        The model with log Z of every EBM set to zero (its policy is ``"constant"``). An EBM whose log normaliser was
        given keeps it.

    Raises:
        UnknownNormalizerError: (when the model runs) a latent site or a parameter reaches the energy or the base of an
            EBM site, so that log Z is not constant.
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
        key = _signature(args, kwargs)
        if key not in self._proved:
            for name, found in ebm_dependencies(self.fn, args, kwargs).items():
                if not found.is_normalized:
                    _require_constant(name, found)
            self._proved.add(key)
        return super().__call__(*args, **kwargs)

    def process_message(self, msg: dict[str, Any]) -> None:
        """Rewrite the EBMs of one sample site, under whatever wrappers they sit."""
        if msg["type"] != "sample" or not find_ebms(msg["fn"]):
            return
        if self.fn is None:
            raise TypeError(
                "constant_normalizer: got no model, expected constant_normalizer(model); its proof needs one."
            )
        if msg["is_observed"]:
            _check_observed(msg)
        msg["fn"] = map_ebms(_with_constant, msg["fn"])


def _with_constant(ebm: EBM) -> EBM:
    return ebm.with_normalizer(0.0, "constant") if ebm.log_normalizer is None else ebm


def _require_constant(name: str, found: SiteDependencies) -> None:
    if found.latents:
        sites = ", ".join(sorted(found.latents))
        raise UnknownNormalizerError(
            f"site '{name}': its potential depends on latent site(s) {{{sites}}}, so the posterior of {{{sites}}} contains "
            f"log Z({sites}), which constant_normalizer would drop. Give the EBM a log_normalizer that is a function of "
            f"{{{sites}}}, or hold them fixed."
        )
    if found.params:
        sites = ", ".join(sorted(found.params))
        raise UnknownNormalizerError(
            f"site '{name}': its potential depends on numpyro.param {{{sites}}}, and log Z({sites}) is not constant while "
            "they are learned. Train the energy with ebm_ppl.fit, or give the EBM a log_normalizer."
        )


def _check_observed(msg: dict[str, Any]) -> None:
    value = jnp.asarray(msg["value"])
    event_dim = len(msg["fn"].event_shape)
    if is_traced(value) or not jnp.issubdtype(value.dtype, jnp.floating):
        return
    rows = value.reshape(-1, *value.shape[value.ndim - event_dim :])
    check_rows(f"observed data of site '{msg['name']}'", rows, support=msg["fn"].support)


def _signature(args: tuple, kwargs: dict[str, Any]) -> Any:
    """Shapes of array arguments; other arguments may steer Python control flow, so their identity counts."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    return structure, tuple(
        (jnp.shape(leaf), str(jnp.result_type(leaf)))
        if isinstance(leaf, jax.Array | np.ndarray | np.generic)
        else (type(leaf), leaf if isinstance(leaf, int | float | bool | str) else id(leaf))
        for leaf in leaves
    )
