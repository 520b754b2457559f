"""Chains of an EBM: kernels run in unconstrained space, on every row by itself.

A :class:`~ebm_ppl.types.SamplerState` of an EBM without rows holds unconstrained positions ``(chain, *unconstrained)``.
With rows, its arrays have one more leading axis, ``(row, chain, *unconstrained)``: the rows of ``batch_shape``, flattened.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.distributions import EBM
from ebm_ppl.rows import RowPotential, UnconstrainedPotential
from ebm_ppl.sampling import advance
from ebm_ppl.supports import is_circular
from ebm_ppl.types import Array, Info, Kernel, Key, SamplerState


def init_chains(key: Key, ebm: EBM, num_chains: int, kernel: Kernel, start: Array | None = None) -> SamplerState:
    """Chains of every row of an EBM.

    Args:
        key: Random key.
        ebm: The EBM.
        num_chains: Chains per row.
        kernel: From :mod:`ebm_ppl.kernels`.
        start: Events ``(chain, *batch_shape, *event_shape)``. Without it the chains start at draws of the base, or, where
            the base cannot be sampled, uniformly in (-2, 2) in unconstrained space, as NumPyro's own chains do.

    Returns:
        A sampler of unconstrained positions.

    Raises:
        TypeError: chains cannot move on the support (the text names what can).

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: x, dist.Gamma(2.0, 1.0))
        >>> sampler = init_chains(jax.random.key(0), ebm, 8, ebm_ppl.kernels.mala(step_size=0.3))
        >>> sampler, _ = advance_chains(jax.random.key(1), ebm, sampler, 10)
        >>> bool((chain_values(ebm, sampler) > 0).all())
        True
    """
    transform = ebm.transform
    if start is None:
        start = _base_draws(key, ebm, num_chains)
    if start is None:
        shape = (num_chains, *ebm.batch_shape, *transform.inverse_shape(ebm.event_shape))
        position = jax.random.uniform(key, shape, minval=-2.0, maxval=2.0)
    else:
        position = transform.inv(jnp.broadcast_to(start, (num_chains, *ebm.batch_shape, *ebm.event_shape)))
    weight_shape = (num_chains,)
    if ebm.batch_shape:
        num_rows, event_shape = math.prod(ebm.batch_shape), position.shape[1 + len(ebm.batch_shape) :]
        position = jnp.swapaxes(position.reshape(num_chains, num_rows, *event_shape), 0, 1)
        weight_shape = (num_rows, num_chains)
    return SamplerState(position, jnp.zeros(weight_shape, position.dtype), kernel)


def _base_draws(key: Key, ebm: EBM, num_chains: int) -> Array | None:
    try:
        return ebm.base.expand(ebm.batch_shape).sample(key, (num_chains,))
    except NotImplementedError:
        return None


def advance_chains(key: Key, ebm: EBM, sampler: SamplerState, num_steps: int) -> tuple[SamplerState, Info]:
    """Move the chains of every row ``num_steps`` kernel steps under the EBM as it is now.

    Args:
        key: Random key.
        ebm: The EBM; no gradient flows into it.
        sampler: From :func:`init_chains`, for as many rows as the EBM has.
        num_steps: Kernel steps.

    Returns:
        The moved sampler, and an :class:`~ebm_ppl.types.Info` of ``(chain,)`` arrays, or ``(row, chain)`` with rows.
    """
    if not ebm.batch_shape:
        sampler, info = advance(key, _potential(ebm, jnp.zeros((), int)), sampler, num_steps)
    else:

        def advance_row(key: Key, row: Array, position: Array, log_weight: Array) -> tuple[Array, Info]:
            of_row = SamplerState(position, log_weight, sampler.kernel)
            moved, info = advance(key, _potential(ebm, row), of_row, num_steps)
            return moved.position, info

        num_rows = math.prod(ebm.batch_shape)
        keys = jax.random.split(key, num_rows)
        position, info = jax.vmap(advance_row)(keys, jnp.arange(num_rows), sampler.position, sampler.log_weight)
        sampler = sampler._replace(position=position)
    if is_circular(ebm.support):
        # A whole turn changes nothing but the rounding error of what comes after.
        sampler = sampler._replace(position=ebm.transform(sampler.position))
    return sampler, info


def unconstrained_energies(ebm: EBM, sampler: SamplerState) -> Array:
    """Energy of every chain in unconstrained space, Jacobian included: the shape of ``sampler.log_weight``."""
    if not ebm.batch_shape:
        return jax.vmap(_potential(ebm, jnp.zeros((), int)))(sampler.position)
    rows = jnp.arange(math.prod(ebm.batch_shape))
    return jax.vmap(lambda row, position: jax.vmap(_potential(ebm, row))(position))(rows, sampler.position)


def chain_values(ebm: EBM, sampler: SamplerState) -> Array:
    """The chains as events, ``(chain, *batch_shape, *event_shape)``."""
    position = sampler.position
    if ebm.batch_shape:
        position = jnp.swapaxes(position, 0, 1)
        position = position.reshape(position.shape[0], *ebm.batch_shape, *position.shape[2:])
    return jax.lax.stop_gradient(ebm.transform(position))


def _potential(ebm: EBM, row: Array) -> UnconstrainedPotential:
    return UnconstrainedPotential(RowPotential(ebm, row))


class ChainSimulator(eqx.Module):
    """A simulator for :class:`~ebm_ppl.distributions.EBM` that runs one fresh chain per draw.

    Attributes:
        kernel: From :mod:`ebm_ppl.kernels`.
        num_steps: Kernel steps of every chain, at least 2.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> sampler = ChainSimulator(ebm_ppl.kernels.mala(step_size=0.3), 50)
        >>> ebm = ebm_ppl.EBM(lambda x: x, dist.Gamma(2.0, 1.0), sampler=sampler)
        >>> ebm.sample(jax.random.key(0), (3,)).shape
        (3,)
    """

    kernel: Kernel
    num_steps: int = eqx.field(static=True)

    def simulate(self, key: Key, potential: RowPotential, num_samples: int) -> tuple[Array, dict[str, Array]]:
        """Draws ``(num_samples, *event)`` and diagnostics ``(num_samples,)``.

        ``acceptance_rate`` is the mean over the steps; ``energy_drift`` the energy at the end minus that half way: over
        many draws its mean is zero if the chains had arrived by then.
        """
        init_key, first_key, second_key = jax.random.split(key, 3)
        every_row = init_chains(init_key, potential.ebm, num_samples, self.kernel)
        position = every_row.position[potential.row] if potential.ebm.batch_shape else every_row.position
        target = UnconstrainedPotential(potential)
        sampler = SamplerState(position, jnp.zeros(num_samples, position.dtype), self.kernel)
        sampler, _ = advance(first_key, target, sampler, self.num_steps // 2)
        half_way = jax.vmap(target)(sampler.position)
        sampler, info = advance(second_key, target, sampler, self.num_steps - self.num_steps // 2)
        draws, _ = jax.vmap(potential.to_event)(sampler.position)
        drift = jax.vmap(target)(sampler.position) - half_way
        return draws, {"acceptance_rate": info.acceptance_rate, "energy_drift": drift}

    def __call__(self, key: Key, potential: RowPotential, num_samples: int) -> Array:
        """Draws only."""
        return self.simulate(key, potential, num_samples)[0]
