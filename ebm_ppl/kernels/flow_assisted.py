"""Flow-assisted sampling: global moves proposed by a flow, local moves by any other kernel."""

from typing import Any

from ebm_ppl.kernels.composition import global_local
from ebm_ppl.kernels.independence import independence
from ebm_ppl.kernels.isir import isir
from ebm_ppl.proposals import check_proposal
from ebm_ppl.types import Kernel

_DEFAULT_POOL = 32


def flow_assisted(
    flow: Any, local: Kernel, *, num_local: int = 4, num_proposals: int | None = None, method: str = "isir"
) -> Kernel:
    """A global step with proposals from a flow, then ``num_local`` local steps: :func:`ebm_ppl.kernels.global_local`.

    The flow is frozen while the chains run, so the kernel is exact whatever the flow; a poor flow only moves rarely. Fit
    it between phases, to the chains themselves: :func:`ebm_ppl.flows.refit_flow`. No kernel finds a mode that neither
    flow nor chains have seen.

    Args:
        flow: From :mod:`ebm_ppl.flows`, or any normalised distribution over events. The tunable ``proposal``.
        local: The local kernel, such as :func:`ebm_ppl.kernels.mala`.
        num_local: Local steps per global step, ``>= 1``.
        num_proposals: Pool of :func:`ebm_ppl.kernels.isir`, current state included, ``>= 2``; 32 by default.
        method: ``"isir"``, or ``"independence"`` for one proposal, accepted or rejected.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant if ``local`` does.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: an unknown ``method``, a pool for a method that has none, or a count out of range.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = flow_assisted(dist.Normal(0.0, 3.0), ebm.kernels.mala(0.3), num_proposals=8)
        >>> def two_modes(x): return -jnp.logaddexp(-2.0 * (x + 3.0) ** 2, -2.0 * (x - 3.0) ** 2)
        >>> sampler = ebm.init_sampler(jnp.full(256, 3.0), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(0), two_modes, sampler, 50)
        >>> bool(abs((sampler.position > 0).mean() - 0.5) < 0.15)
        True

    References:
        Grenioux, Moulines, Gabrie (2023), Balanced training of energy-based models with adaptive flow sampling,
        arXiv:2306.00684; Gabrie, Rotskoff, Vanden-Eijnden (2022), arXiv:2105.12603.
    """
    check_proposal("flow", flow)
    if method == "isir":
        global_kernel = isir(flow, num_proposals=_DEFAULT_POOL if num_proposals is None else num_proposals)
    elif method == "independence":
        if num_proposals is not None:
            raise ValueError(f"num_proposals: got {num_proposals} for method='independence', which has no pool.")
        global_kernel = independence(flow)
    else:
        raise ValueError(f"method: got {method!r}, expected 'isir' or 'independence'.")
    return global_local(global_kernel, local, num_local)
