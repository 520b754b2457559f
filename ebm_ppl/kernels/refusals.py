"""The BlackJAX algorithms that cannot be kernels, each with the reason and with what to use in its place."""

from collections.abc import Callable
from typing import Any

import blackjax

_GAUSSIAN_PRIOR = (
    "it reads the log density as a likelihood against a Gaussian prior of its own. Use kernels.hmc, or kernels.mala with "
    "the whole energy"
)
_STOCHASTIC_GRADIENT = (
    "it needs a stochastic gradient estimator, not a log density, and is biased. Use kernels.unadjusted_langevin, which "
    "says so, or kernels.mala"
)
_TWO_PARTS = (
    "it moves a population from a prior to a prior times a likelihood, and wants the two apart. Use kernels.tempered_smc, "
    "or normalizer.tempered_smc for log Z"
)
_NESTED = (
    "nested sampling wants a prior and a likelihood apart, and its live points follow no one law. Use "
    "kernels.tempered_smc"
)
_LATENT = (
    "it integrates latent variables out of a joint log density of two arguments, and an energy has one. Use kernels.hmc "
    "or kernels.nuts on the energy of all variables together"
)
_ADAPTATION = (
    "it tunes a sampler while that runs, and a kernel that adapts leaves nothing invariant. Use ebm_ppl.tune_step_size "
    "between phases, and pass what was found to a kernel"
)
_VARIATIONAL = (
    "it is not a BlackJAX MCMC sampler but fits an approximation. Use that as the proposal or the flow of a kernel"
)

_REASONS: dict[str, str] = {
    "elliptical_slice": _GAUSSIAN_PRIOR,
    "mgrad_gaussian": _GAUSSIAN_PRIOR,
    "orbital_hmc": "its state is a weighted orbit, not a position. Use kernels.hmc",
    "sgld": _STOCHASTIC_GRADIENT,
    "sghmc": _STOCHASTIC_GRADIENT,
    "sgnht": _STOCHASTIC_GRADIENT,
    "csgld": "it needs stochastic estimators, not a log density, and its draws want reweighting. Use "
    "kernels.replica_exchange for energies with many modes",
    "svgd": "its particles move together and deterministically, and leave no law invariant. Use kernels.tempered_smc",
    "adaptive_persistent_sampling_smc": _TWO_PARTS,
    "adaptive_tempered_smc": _TWO_PARTS,
    "inner_kernel_tuning": _TWO_PARTS,
    "partial_posteriors_smc": _TWO_PARTS,
    "persistent_sampling_smc": _TWO_PARTS,
    "pretuning": _TWO_PARTS,
    "tempered_smc": _TWO_PARTS,
    "nss": _NESTED,
    "nsswig": _NESTED,
    "laplace_dhmc": _LATENT,
    "laplace_dmhmc": _LATENT,
    "laplace_hmc": _LATENT,
    "laplace_mhmc": _LATENT,
    "adjusted_mclmc_find_L_and_step_size": _ADAPTATION,
    "chees_adaptation": _ADAPTATION,
    "mclmc_find_L_and_step_size": _ADAPTATION,
    "mclmc_lrd_warmup": _ADAPTATION,
    "meads_adaptation": _ADAPTATION,
    "pathfinder_adaptation": _ADAPTATION,
    "staged_adaptation": _ADAPTATION,
    "window_adaptation": _ADAPTATION,
    "window_adaptation_low_rank": _ADAPTATION,
    "fullrank_vi": _VARIATIONAL,
    "meanfield_vi": _VARIATIONAL,
    "multipathfinder": _VARIATIONAL,
    "pathfinder": _VARIATIONAL,
    "schrodinger_follmer": _VARIATIONAL,
}


def builder(algorithm: Any) -> Any:
    """The function behind one of BlackJAX's entry points."""
    return getattr(algorithm, "differentiable", algorithm)


# By function, since names may be aliases. A version of BlackJAX that lacks one of them has nothing to refuse.
_REFUSED: dict[Callable[..., Any], str] = {
    builder(getattr(blackjax, name)): reason for name, reason in _REASONS.items() if hasattr(blackjax, name)
}


def refusal(build: Callable[..., Any]) -> str | None:
    """Why a BlackJAX algorithm cannot be a kernel; ``None`` for one that can, or that nobody has looked at.

    Example:
        >>> import blackjax
        >>> refusal(blackjax.hmc.differentiable) is None, "kernels.tempered_smc" in refusal(blackjax.nss.differentiable)
        (True, True)
    """
    return _REFUSED.get(build)
