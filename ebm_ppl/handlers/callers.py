"""Who is evaluating the model: some of NumPyro's algorithms drop what a policy needs, without a word."""

import inspect
from collections.abc import Iterator
from types import FrameType

from numpyro.handlers import seed
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.elbo import ELBO
from numpyro.primitives import _PYRO_STACK

from ebm_ppl.errors import UnknownNormalizerError


def require_random_keys(handler: str, site: str) -> None:
    """The model must run under ``seed``: without it there are no random keys, and MCMC supplies one constant key.

    Raises:
        UnknownNormalizerError: it does not.
    """
    if not any(isinstance(active, seed) for active in _PYRO_STACK):
        raise UnknownNormalizerError(
            f"site '{site}': {handler} draws random numbers at every evaluation, and this one has no random key, as inside "
            "MCMC, where each evaluation would see the same frozen noise and the posterior would be wrong without a "
            "symptom. Use ebm_ppl.infer.Exchange, or a deterministic log Z (exact_normalizer, surrogate_normalizer). "
            "Outside MCMC, wrap the model in numpyro.handlers.seed."
        )


def _callers() -> Iterator[FrameType]:
    """The Python stack. Nothing in a message says who sent it, but NumPyro traces a model from inside its own calls."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_autoguide_setup() -> bool:
    """Whether an autoguide is looking for the shapes of the latents and a place to start, for which any density will do."""
    return any(
        frame.f_code.co_name == "_setup_prototype" and isinstance(frame.f_locals.get("self"), AutoGuide)
        for frame in _callers()
    )


def require_carried_state(site: str) -> None:
    """Chains persist in NumPyro's mutable state, which ``SVI.evaluate`` and several particles drop.

    Raises:
        UnknownNormalizerError: one of them is the caller.
    """
    for frame in _callers():
        owner = frame.f_locals.get("self")
        if frame.f_code is SVI.evaluate.__code__:
            raise UnknownNormalizerError(
                f"site '{site}': SVI.evaluate does not pass the chains on, so they would start afresh and its number would "
                "mean nothing. Read the losses of SVI.run or SVI.update, with negative_phase(..., loss_value='tracked')."
            )
        if isinstance(owner, ELBO) and owner.num_particles > 1:
            raise UnknownNormalizerError(
                f"site '{site}': {type(owner).__name__}(num_particles={owner.num_particles}) drops the chains of "
                "negative_phase. Use num_particles=1, or negative_phase(..., persistent=False), which keeps none."
            )


def require_no_stable_update(site: str) -> None:
    """``SVI.stable_update`` throws away every update whose loss is NaN, and the loss of a gradient-only log Z is.

    Raises:
        UnknownNormalizerError: it is the caller.
    """
    if any(frame.f_code is SVI.stable_update.__code__ for frame in _callers()):
        raise UnknownNormalizerError(
            f"site '{site}': SVI.stable_update rejects every update whose loss is NaN, and the loss of negative_phase is, "
            "unless log Z is tracked: nothing would be learned. Use negative_phase(..., loss_value='tracked'), or "
            "stable_update=False."
        )
