"""NUTS under a surrogate log Z, which stops where the surrogate does."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.infer import NUTS

from ebm_ppl.handlers import Pool, surrogate_normalizer


class SurrogateNUTS(NUTS):
    """NUTS on :class:`~ebm_ppl.handlers.surrogate_normalizer`, refusing to go on where its pool fails.

    Outside the region that the pool represents, the surrogate is NaN, and plain NUTS returns a posterior truncated to that
    region, with divergences. This kernel raises at the first divergence after warm-up instead.

    Args:
        model: A NumPyro model, without a policy.
        pools: From :func:`ebm_ppl.handlers.make_pools`.
        min_ess: As for ``surrogate_normalizer``.
        **settings: Of ``numpyro.infer.NUTS``.

    Raises:
        jax.errors.JaxRuntimeError: (while running) a trajectory diverged after warm-up.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(data):
        ...     tilt = numpyro.sample("tilt", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", len(data)):
        ...         numpyro.sample("x", ebm.EBM(lambda x: -tilt * x, dist.Normal(0.0, 1.0)), obs=data)
        >>> data = 0.5 + jnp.linspace(-1.0, 1.0, 50)
        >>> mala = ebm.kernels.mala(step_size=0.5)
        >>> pools = ebm.handlers.make_pools(jax.random.key(0), model, data, at={"tilt": 0.5}, kernel=mala)
        >>> kernel = SurrogateNUTS(model, pools)
        >>> mcmc = numpyro.infer.MCMC(kernel, num_warmup=100, num_samples=100, progress_bar=False)
        >>> mcmc.run(jax.random.key(1), data)
        >>> mcmc.get_samples()["x$surrogate_ess"].shape
        (100,)
    """

    def __init__(self, model: Callable[..., Any], pools: Mapping[str, Pool], *, min_ess: float = 0.1, **settings: Any):
        super().__init__(surrogate_normalizer(model, pools, min_ess=min_ess), **settings)

    def init(
        self, rng_key: Any, num_warmup: int, init_params: Any = None, model_args: tuple = (), model_kwargs: Any = None
    ) -> Any:
        """As for ``NUTS``."""
        self._length_of_warmup = num_warmup
        return super().init(rng_key, num_warmup, init_params, model_args, model_kwargs or {})

    def sample(self, state: Any, model_args: tuple, model_kwargs: dict[str, Any]) -> Any:
        """One step of NUTS; raise where it diverged after warm-up."""
        new = super().sample(state, model_args, model_kwargs)
        has_failed = jnp.any(new.diverging & (new.i > self._length_of_warmup))
        z = jax.tree.map(lambda x: eqx.error_if(x, has_failed, _REFUSAL), new.z)
        return new._replace(z=z)


_REFUSAL = (
    "SurrogateNUTS: a trajectory diverged after warm-up: it left the region where the pool represents the EBM (its "
    "effective sample size fell below min_ess), so that the posterior would be cut off there. Make the pool larger, or at "
    "a value nearer the bulk of the posterior, or use ebm_ppl.infer.Exchange, which needs no pool."
)
