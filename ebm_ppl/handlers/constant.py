"""``constant_normalizer``: leave out a log Z that is proved to be a constant."""

from collections.abc import Callable, Iterable
from typing import Any

from ebm_ppl.distributions import EBM
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.handlers.left_out import leave_out
from ebm_ppl.handlers.policy import Policy
from ebm_ppl.provenance import SiteDependencies
from ebm_ppl.roles import role_of, what_to_do


class constant_normalizer(Policy):
    """Leave out log Z of EBM sites, after proving that it is a constant.

    Where nothing that inference moves reaches an energy, its log Z is one additive constant of the log joint, and MCMC
    over the other sites (or over the EBM's own value) is exact without it. The handler proves this by provenance before
    it runs the model, once per shape of the arguments, and refuses otherwise. The log joint is then known up to that
    constant: evidences, Bayes factors and WAIC are not.

    The proof sees the model it wraps and nothing outside: wrap the whole model, and let handlers that fix or replace a
    site (``condition``, ``lift``) act inside, as in ``constant_normalizer(condition(model, data))``.

    Args:
        fn: A whole NumPyro model.
        given: Names of latent sites that the inference holds fixed while it runs, as a block of
            ``numpyro.infer.gibbs.Gibbs`` or ``HMCGibbs`` does with the sites of the other blocks: log Z may depend on
            them. Wherever one of them is not fixed after all, log Z stays unknown and ``log_prob`` refuses.

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

    def __init__(self, fn: Callable[..., Any] | None = None, *, given: Iterable[str] = ()):
        super().__init__(fn)
        self._given = frozenset({given} if isinstance(given, str) else given)
        self._loose: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Prove that log Z is constant, once per shape of the arguments, and run the model."""
        self._loose = set()
        return super().__call__(*args, **kwargs)

    def require(self, name: str, found: SiteDependencies) -> None:
        """Nothing that moves may reach log Z, or decide how often it counts."""
        require_constant(name, found._replace(latents=found.latents - self._given))

    def account(self, ebm: EBM, msg: dict[str, Any], found: SiteDependencies) -> EBM:
        """Log Z = 0, unless a site that was promised to be fixed is not."""
        if found.latents & self._loose:
            return ebm
        if found.latents:
            return ebm.with_normalizer(0.0, "constant")
        return leave_out(ebm)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        """Note which of the sites promised to be fixed are not; check observed values."""
        name = self.name_inside(msg)
        if name in self._given and msg["type"] == "sample" and not msg["is_observed"]:
            self._loose.add(name)
        super().postprocess_message(msg)


def require_constant(name: str, found: SiteDependencies) -> None:
    """Log Z of a site is one additive constant of the log joint.

    Raises:
        UnknownNormalizerError: it is not; the text says why and what to do.
    """
    if found.latents:
        sites = ", ".join(sorted(found.latents))
        raise UnknownNormalizerError(
            f"site '{name}': its potential depends on latent site(s) {{{sites}}}, so the posterior of {{{sites}}} contains "
            f"log Z({sites}), which constant_normalizer would drop. For a {role_of(found).value} site: "
            f"{what_to_do(found)}. Or hold {{{sites}}} fixed: constant_normalizer(handlers.condition(model, values)), and "
            "where another block of a Gibbs sampler holds them fixed, constant_normalizer(model, given=...)."
        )
    if found.params:
        sites = ", ".join(sorted(found.params))
        raise UnknownNormalizerError(
            f"site '{name}': its potential depends on numpyro.param {{{sites}}}, and log Z({sites}) is not constant while "
            f"they are learned. For a {role_of(found).value} site: {what_to_do(found)}. To train without NumPyro's SVI use "
            "ebm_ppl.fit."
        )
    if found.weight:
        sites = ", ".join(sorted(found.weight))
        raise UnknownNormalizerError(
            f"site '{name}': how often its log Z counts depends on {{{sites}}}, as in a mixture or under a mask or scale "
            "with latent values, so log Z is not an additive constant. Give the EBM a log_normalizer."
        )
