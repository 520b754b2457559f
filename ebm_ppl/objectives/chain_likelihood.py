"""The sampler's half of the game with a flow: its proposal follows the chains."""

import jax

from ebm_ppl.checks import check_count
from ebm_ppl.flows import forward_kl, proposal_of
from ebm_ppl.objectives.contrastive import require_sampler
from ebm_ppl.replay import gather_chains
from ebm_ppl.types import Batch, Key, Metrics, Potential, SamplerState, Scalar


def chain_likelihood(
    potential: Potential, sampler: SamplerState, batch: Batch, key: Key, *, num_chains: int | None = None
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Fit the proposal of a sampler to its own chains: ``loss = -mean_i log q(x_i)``, in ``q``.

    This is ``KL(p || q)`` up to a constant, with ``p`` the law of the chains: neither the energy nor the data enter. A
    ``sampler_objective`` for :func:`ebm_ppl.fit` and :func:`ebm_ppl.handlers.negative_phase`; give its optimizer to
    :func:`ebm_ppl.flows.proposal_only`, so that no rule of it reaches the other tunables of the kernel.

    Args:
        potential: Not used.
        sampler: Chains of a kernel with a ``proposal``, such as :func:`ebm_ppl.kernels.flow_assisted`. Their positions are
            constants, and weigh as their log weights say.
        batch: Not used.
        key: Random key.
        num_chains: Fit to this many chains, chosen at random; to all of them when ``None``.

    Returns:
        ``(loss, (sampler, {}))``, the sampler as it came.

    Raises:
        TypeError: ``sampler`` is not a sampler state.
        ValueError: its kernel has no ``proposal``, or ``num_chains`` exceeds its chains.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> def loss(scale):
        ...     kernel = ebm.kernels.independence(dist.Normal(0.0, scale))
        ...     sampler = ebm.init_sampler(jnp.array([-3.0, 3.0]), kernel)
        ...     return chain_likelihood(jnp.abs, sampler, None, jax.random.key(0))[0]
        >>> bool(abs(jax.grad(loss)(3.0)) < 1e-6)  # the best normal proposal has the standard deviation of the chains
        True

    References:
        Grenioux, Moulines, Gabrie (2023), Balanced training of energy-based models with adaptive flow sampling,
        arXiv:2306.00684, algorithm 1; Gabrie, Rotskoff, Vanden-Eijnden (2022), arXiv:2105.12603.
    """
    require_sampler(sampler)
    proposal = proposal_of(sampler)
    chains = sampler
    if num_chains is not None:
        _, chains = gather_chains(key, sampler, check_count("num_chains", num_chains))
    position, log_weight = jax.lax.stop_gradient((chains.position, chains.log_weight))
    return forward_kl(proposal, position, log_weight), (sampler, {})
