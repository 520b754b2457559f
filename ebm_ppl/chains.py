"""Chains of an EBM: kernels run in unconstrained space (discrete ones on the events), on every row by itself.

A :class:`~ebm_ppl.types.SamplerState` of an EBM without rows holds unconstrained positions ``(chain, *unconstrained)``.
With rows, its arrays have one more leading axis, ``(row, chain, *unconstrained)``: the rows of ``batch_shape``, flattened.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count
from ebm_ppl.distributions import EBM
from ebm_ppl.kernels.discrete import find_values, values_of_support
from ebm_ppl.partials import function_behind
from ebm_ppl.regions import describe_region, is_whole_space
from ebm_ppl.rows import RowPotential, UnconstrainedPotential
from ebm_ppl.sampling import advance, chains_at, is_discrete_kernel
from ebm_ppl.supports import is_circular
from ebm_ppl.types import (
    Array,
    ConfinedKernel,
    Density,
    FreshPopulation,
    Info,
    Kernel,
    Key,
    Potential,
    SamplerState,
    WeightedPopulation,
)


def init_chains(
    key: Key,
    ebm: EBM,
    num_chains: int,
    kernel: Kernel,
    start: Array | None = None,
    *,
    batch_shape: tuple[int, ...] | None = None,
) -> SamplerState:
    """Chains of every row of an EBM.

    Args:
        key: Random key.
        ebm: The EBM.
        num_chains: Chains per row.
        kernel: From :mod:`ebm_ppl.kernels`.
        start: Events ``(chain, *batch_shape, *event_shape)``. Without it the chains start at draws of the base, or, where
            the base cannot be sampled, uniformly in (-2, 2) in unconstrained space, as NumPyro's own chains do.
        batch_shape: The rows to make chains for, where they are more than the EBM has (it sees a minibatch of them).

    Returns:
        A sampler of unconstrained positions, or of events where the support is discrete.

    Raises:
        TypeError: chains cannot move on the support (the text names what can). Discrete kernels move on discrete supports,
            all others on continuous ones.
        ValueError: the kernel proposes events of a bounded support, where its chains are unconstrained positions.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> ebm = ebm_ppl.EBM(lambda x: x, dist.Gamma(2.0, 1.0))
        >>> sampler = init_chains(jax.random.key(0), ebm, 8, ebm_ppl.kernels.mala(step_size=0.3))
        >>> sampler, _ = advance_chains(jax.random.key(1), ebm, sampler, 10)
        >>> bool((chain_values(ebm, sampler) > 0).all())
        True
    """
    is_discrete = ebm.support.is_discrete and is_discrete_kernel(kernel)
    transform = None if is_discrete else ebm.transform  # refuses discrete supports, and says what moves on them
    if transform is not None:
        _check_proposals(ebm, kernel)
        _refuse_surfaces(kernel)
    rows = ebm.batch_shape if batch_shape is None else batch_shape
    if start is None:
        start = base_draws(key, ebm, (num_chains,), rows)
    event_shape = (*rows, *ebm.event_shape)
    if transform is None:
        if start is None:
            values = jnp.array(find_values("this kernel", None, RowPotential(ebm, 0)))
            start = jax.random.choice(key, values, (num_chains, *event_shape))
        position = jnp.broadcast_to(start, (num_chains, *event_shape))
    elif start is None:
        shape = (num_chains, *transform.inverse_shape(event_shape))
        position = jax.random.uniform(key, shape, minval=-2.0, maxval=2.0)
    else:
        position = transform.inv(jnp.broadcast_to(start, (num_chains, *event_shape)))
    if rows:
        position = position.reshape(num_chains, math.prod(rows), *position.shape[1 + len(rows) :])
        position = jnp.swapaxes(position, 0, 1)
        return _each_row_at(position, kernel)
    return chains_at(position, kernel)


def _check_proposals(ebm: EBM, kernel: Kernel) -> None:
    """What a kernel proposes or starts from must be a distribution over the space in which its chains are."""
    if is_whole_space(ebm.support, jnp.zeros(ebm.event_shape)):
        return
    for found in jax.tree.leaves(kernel, is_leaf=lambda node: isinstance(node, Density)):
        support = getattr(found, "support", None) if isinstance(found, Density) else None
        shape = getattr(found, "event_shape", ebm.event_shape)
        if support is not None and not is_whole_space(support, jnp.zeros(shape)):
            raise ValueError(
                f"kernel: got one with a {type(found).__name__} that is {describe_region(support)}, expected a "
                f"distribution over the unconstrained space in which the chains of an EBM on {ebm.support} move. Pass one "
                "over all of it, such as numpyro.distributions.TransformedDistribution(q, biject_to(q.support).inv)."
            )


def _refuse_surfaces(kernel: Kernel) -> None:
    if isinstance(function_behind(kernel), ConfinedKernel):
        raise TypeError(
            "kernel: got one whose chains live on a surface (kernels.sphere_langevin), where those of an EBM move in "
            "the space around the sphere, expected a kernel of free space such as kernels.mala. With ebm_ppl.advance "
            "and a bare potential it is right."
        )


def _each_row_at(position: Array, kernel: Kernel) -> SamplerState:
    """Chains of every row at ``(row, chain, ...)``; the rows share the kernel."""
    return jax.vmap(lambda of_row: chains_at(of_row, kernel)._replace(kernel=None))(position)._replace(kernel=kernel)


def base_draws(key: Key, ebm: EBM, sample_shape: tuple[int, ...], rows: tuple[int, ...]) -> Array | None:
    """Draws of the base, ``sample_shape + rows + event_shape``; ``None`` where it cannot give them."""
    if jnp.broadcast_shapes(ebm.base.batch_shape, ebm.batch_shape) != rows and ebm.base.batch_shape:
        return None
    try:
        return jnp.asarray(ebm.base.expand(rows).sample(key, sample_shape))
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

        def advance_row(key: Key, row: Array, of_row: SamplerState) -> tuple[SamplerState, Info]:
            of_row = of_row._replace(kernel=sampler.kernel)
            moved, info = advance(key, _potential(ebm, row), of_row, num_steps)
            return moved._replace(kernel=None), info

        num_rows = math.prod(ebm.batch_shape)
        keys = jax.random.split(key, num_rows)
        moved, info = jax.vmap(advance_row)(keys, jnp.arange(num_rows), sampler._replace(kernel=None))
        sampler = moved._replace(kernel=sampler.kernel)
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
    return jax.lax.stop_gradient(position if ebm.support.is_discrete else ebm.transform(position))


def chain_weights(ebm: EBM, sampler: SamplerState) -> Array:
    """The log weights of the chains, ``(chain, *batch_shape)``."""
    if not ebm.batch_shape:
        return sampler.log_weight
    return jnp.swapaxes(sampler.log_weight, 0, 1).reshape(-1, *ebm.batch_shape)


def to_rows(ebm: EBM, values: Array) -> Array:
    """Values ``(chain, *batch_shape, ...)`` in the layout of a sampler, ``(row, chain, ...)``."""
    if not ebm.batch_shape:
        return values
    values = values.reshape(values.shape[0], -1, *values.shape[1 + len(ebm.batch_shape) :])
    return jnp.swapaxes(values, 0, 1)


def _potential(ebm: EBM, row: Array) -> Potential:
    return chain_potential(RowPotential(ebm, row))


def chain_potential(row: RowPotential) -> Potential:
    """The energy that the chains of a row move under: in unconstrained space, or of the events themselves if discrete.

    A discrete energy over the counting measure (``dist.ImproperUniform``) is handed over as it is, so that structured
    kernels find its conditionals.
    """
    if not row.support.is_discrete:
        return UnconstrainedPotential(row)
    is_structured = row.site_values is not None and row.site_values == values_of_support(row.support)
    return row.ebm.potential if row.is_bare and is_structured else row


def draws_afresh(kernel: Kernel) -> bool:
    """Whether every step of a kernel draws its chains anew; of composed kernels, which may do so, never."""
    func = function_behind(kernel)
    return isinstance(func, FreshPopulation) and func.draws_afresh and not hasattr(func, "parts")


def _refuse_weights(potential: Potential, sampler: SamplerState) -> None:
    algorithm: Any = sampler.kernel(potential)
    carried = () if sampler.auxiliary is None else (sampler.auxiliary,)
    state = jax.eval_shape(algorithm.init, sampler.position, jax.random.key(0), *carried)
    # Tempered SMC resamples at its end, which makes its weights alike, unless it is told to keep them.
    if isinstance(state, WeightedPopulation) and getattr(function_behind(sampler.kernel), "keep_weights", True):
        raise ValueError(
            "kernel: got one that weights its chains, expected one whose draws count alike: a simulated site has no "
            "weights. Of a diffusion sampler take kernels.raw_diffusion, or kernels.diffusion with correction='metropolis'."
        )


class ChainSimulator(eqx.Module):
    """A simulator for :class:`~ebm_ppl.distributions.EBM` that runs one fresh chain per draw.

    Attributes:
        kernel: From :mod:`ebm_ppl.kernels`.
        num_steps: Kernel steps of every chain, at least 2; a kernel whose steps draw anew also takes 1.
        receiver: Called with the diagnostics of every simulation, while it is being traced.

    Raises:
        ValueError: too few steps.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl
        >>> sampler = ChainSimulator(ebm_ppl.kernels.mala(step_size=0.3), 50)
        >>> ebm = ebm_ppl.EBM(lambda x: x, dist.Gamma(2.0, 1.0), sampler=sampler)
        >>> ebm.sample(jax.random.key(0), (3,)).shape
        (3,)
    """

    kernel: Kernel
    num_steps: int = eqx.field(static=True)
    receiver: Callable[[dict[str, Array]], None] | None = eqx.field(static=True, default=None)

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps, 1 if draws_afresh(self.kernel) else 2)

    def simulate(self, key: Key, potential: RowPotential, num_samples: int) -> tuple[Array, dict[str, Array]]:
        """Draws ``(num_samples, *event)`` and diagnostics ``(num_samples,)``.

        ``acceptance_rate`` is the mean over the steps; ``energy_drift`` the energy at the end minus that half way: over
        many draws its mean is zero if the chains had arrived by then. A single step has no half way, and no drift.

        Raises:
            ValueError: the kernel weights its chains.
        """
        init_key, first_key, second_key = jax.random.split(key, 3)
        every_row = init_chains(init_key, potential.ebm, num_samples, self.kernel)
        position = every_row.position[potential.row] if potential.ebm.batch_shape else every_row.position
        target = chain_potential(potential)
        sampler = chains_at(position, self.kernel)
        _refuse_weights(target, sampler)
        diagnostics = {}
        if self.num_steps == 1:
            sampler, info = advance(second_key, target, sampler, 1)
        else:
            sampler, _ = advance(first_key, target, sampler, self.num_steps // 2)
            half_way = jax.vmap(target)(sampler.position)
            sampler, info = advance(second_key, target, sampler, self.num_steps - self.num_steps // 2)
            diagnostics["energy_drift"] = jax.vmap(target)(sampler.position) - half_way
        draws = sampler.position
        if not potential.support.is_discrete:
            draws, _ = jax.vmap(potential.to_event)(draws)
        return draws, {"acceptance_rate": info.acceptance_rate, **diagnostics}

    def report(self, diagnostics: dict[str, Array]) -> None:
        """Pass the diagnostics on."""
        if self.receiver is not None:
            self.receiver(diagnostics)

    def __call__(self, key: Key, potential: RowPotential, num_samples: int) -> Array:
        """Draws only."""
        return self.simulate(key, potential, num_samples)[0]
