"""Log likelihoods of observed sites, draw by draw, without those that are not likelihoods."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.util import soft_vmap

from ebm_ppl.distributions import VALUE_KINDS, find_ebms
from ebm_ppl.types import Array


class LogLikelihood(NamedTuple):
    """Log likelihoods of a model at posterior draws.

    Attributes:
        values: ``{site: (draw, *rows)}`` for every observed site with a normalised density.
        log_z_se: ``{site: error}`` for the EBM sites among them: root mean square standard error of log Z, per row.
        left_out: Observed EBM sites whose log Z has no value (policies ``"constant"``, ``"gradient"``, ``"surrogate"``):
            their numbers are no likelihoods, and LOO or WAIC of them would be wrong without a sign.
    """

    values: dict[str, Array]
    log_z_se: dict[str, float]
    left_out: tuple[str, ...]


def log_likelihood(model: Callable[..., Any], samples: dict[str, Any], *args: Any, **kwargs: Any) -> LogLikelihood:
    """Log likelihood of every observed site at every posterior draw, as ``numpyro.infer.log_likelihood`` gives it.

    Args:
        model: A NumPyro model with its normaliser policy.
        samples: Posterior draws, ``{site: (draw, ...)}``.
        *args: Arguments of the model.
        **kwargs: Keyword arguments of the model.

    Returns:
        A :class:`LogLikelihood`.

    Raises:
        UnknownNormalizerError: an observed EBM has no policy at all.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def model(data):
        ...     tilt = numpyro.sample("tilt", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("rows", len(data)):
        ...         site = ebm.EBM(lambda x: -tilt * x, dist.Normal(0.0, 1.0), log_normalizer=tilt**2 / 2)
        ...         numpyro.sample("x", site, obs=data)
        >>> result = log_likelihood(model, {"tilt": jnp.zeros(5)}, jnp.zeros(3))
        >>> result.values["x"].shape, result.log_z_se, result.left_out
        ((5, 3), {'x': 0.0}, ())
    """
    left_out: list[str] = []

    def of_draw(draw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        values, variances = {}, {}
        with handlers.block():
            trace = handlers.trace(handlers.substitute(handlers.seed(model, 0), draw)).get_trace(*args, **kwargs)
        for name, site in trace.items():
            if site["type"] != "sample" or not site["is_observed"] or site["infer"].get("is_auxiliary"):
                continue
            ebms: list[Any] = find_ebms(site["fn"])
            if any(ebm.log_normalizer is not None and ebm.normalizer_kind not in VALUE_KINDS for ebm in ebms):
                left_out.append(name)
                continue
            values[name] = site["fn"].log_prob(site["value"])
            if ebms:
                variances[name] = sum(jnp.mean(jnp.square(ebm.log_normalizer_error)) for ebm in ebms)
        return values, variances

    num_draws = len(jax.tree.leaves(samples)[0])
    values, variances = soft_vmap(of_draw, samples, batch_ndims=1, chunk_size=min(num_draws, 256))
    errors = {name: float(np.sqrt(np.mean(np.asarray(variance)))) for name, variance in variances.items()}
    return LogLikelihood(values, errors, tuple(sorted(set(left_out))))
