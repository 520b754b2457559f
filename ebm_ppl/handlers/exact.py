"""``exact_normalizer``: log Z by a formula, a sum over states, or quadrature."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from ebm_ppl.distributions import EBM
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.handlers.policy import Policy
from ebm_ppl.normalizer.enumeration import enumerate_states
from ebm_ppl.normalizer.quadrature import quadrature
from ebm_ppl.provenance import SiteDependencies

Formula = Callable[[EBM], Any]
"""Log Z of an EBM, ``batch_shape``, as a differentiable function of its parameters."""


class exact_normalizer(Policy):
    """Compute log Z at every evaluation, so that the model has an ordinary log density for every algorithm.

    By default the states of a discrete EBM are summed, and a continuous one of at most two unconstrained dimensions is
    integrated by quadrature; both are differentiable, without noise, and carry their numerical error. Where the
    quadrature says that it is not reliable its result is NaN; a spike between its nodes it cannot see.

    Args:
        fn: A whole NumPyro model.
        log_normalizer: A formula for the EBMs whose log Z is not given, ``function(ebm) -> log Z``, or a dictionary of such
            functions by site; sites that it lacks get the default.

    Returns:
        The model with the policy ``"exact"``: SVI, NUTS, ``log_likelihood`` and evidences are all legal.

    Raises:
        UnknownNormalizerError: (when the model runs) log Z of a site cannot be computed exactly; the text says what else
            there is.
        ValueError: (when the model runs) ``log_normalizer`` names a site that is no EBM site of the model.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(data):
        ...     tilt = numpyro.sample("tilt", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", len(data)):
        ...         numpyro.sample("x", ebm.EBM(lambda x: -tilt * x, dist.Normal(0.0, 1.0)), obs=data)
        >>> data = 0.5 + jnp.linspace(-1.0, 1.0, 50)
        >>> density, _ = numpyro.infer.util.log_density(exact_normalizer(model), (data,), {}, {"tilt": 0.5})
        >>> exact = dist.Normal(0.0, 1.0).log_prob(0.5) + dist.Normal(0.5, 1.0).log_prob(data).sum()
        >>> bool(abs(density - exact) < 1e-3)
        True
    """

    def __init__(
        self, fn: Callable[..., Any] | None = None, *, log_normalizer: Formula | Mapping[str, Formula] | None = None
    ):
        super().__init__(fn)
        self._formulas = log_normalizer if isinstance(log_normalizer, Mapping) else {}
        self._formula = None if isinstance(log_normalizer, Mapping) else log_normalizer
        for formula in [*self._formulas.values(), *([] if self._formula is None else [self._formula])]:
            if not callable(formula):
                raise TypeError(f"log_normalizer: got {type(formula).__name__}, expected a function of the EBM.")

    def examine(self, found: dict[str, SiteDependencies]) -> None:
        """A formula for a site that is not there would go unnoticed, and its site get the default."""
        unknown = sorted(set(self._formulas) - set(found))
        if unknown:
            raise ValueError(f"log_normalizer: got a formula for {unknown}, expected names among {sorted(found)}.")
        super().examine(found)

    def require(self, name: str, found: SiteDependencies) -> None:
        """Any role is right, outside ``scan``."""

    def account(self, ebm: EBM, msg: dict[str, Any], found: SiteDependencies) -> EBM:
        """The computed log Z, with its numerical error."""
        formula = self._formulas.get(msg["name"], self._formula)
        if formula is not None:
            return ebm.with_normalizer(formula(ebm), "exact")
        result = self._computed(ebm, msg["name"])
        value = jnp.where(result.reliable, result.value, jnp.nan)
        return ebm.with_normalizer(result._replace(value=value), "exact")

    def _computed(self, ebm: EBM, name: str) -> Any:
        if ebm.base.is_discrete:
            try:
                return enumerate_states(ebm)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise UnknownNormalizerError(f"site '{name}': log Z cannot be summed over states: {error}") from error
        size = math.prod(ebm.transform.inverse_shape(ebm.event_shape))
        if size > 2:
            raise UnknownNormalizerError(
                f"site '{name}': got an EBM of {size} dimensions, expected at most 2 for quadrature. Pass a formula as "
                "exact_normalizer(model, log_normalizer=function), or use negative_phase, estimated_normalizer, or "
                "ebm_ppl.infer.Exchange; ebm_ppl.check_model says which is right."
            )
        return quadrature(ebm)
