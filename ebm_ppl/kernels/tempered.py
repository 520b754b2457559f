"""Tempered SMC as a kernel: every step is a whole pass of the population from fresh draws of a reference."""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_count, check_markov_kernel, check_one
from ebm_ppl.info import step_info
from ebm_ppl.kernels.independence import as_tunable
from ebm_ppl.kernels.smc import run_tempered_smc
from ebm_ppl.proposals import check_proposal, find_reference, log_density, sample_and_log_prob
from ebm_ppl.types import Array, Kernel, Key, Potential, PyTree


class TemperedSMCState(NamedTuple):
    """The population after a pass.

    Attributes:
        position: ``(chain, *event)``.
        log_weight: ``(chain,)``.
        log_normalizer: The pass's estimate of ``log ∫ exp(-U)``, for a normalised reference; NaN before the first.
    """

    position: PyTree
    log_weight: Array
    log_normalizer: Array


def tempered_smc(
    *,
    inner: Kernel,
    reference: Any = None,
    num_steps: int = 5,
    target_ess: float | Array = 0.9,
    keep_weights: bool = False,
    max_temperatures: int = 1000,
) -> Kernel:
    """Adaptive tempered SMC as a kernel: each step is a whole pass of the population from fresh draws of a reference.

    Where the chains were does not matter, so modes that the reference covers cannot be lost in training, at the price of
    the whole path in every step: use one step per phase. The chains of a pass are not independent of each other. Its law
    is ``exp(-U) / Z`` in the limit of many chains, for the adaptive temperatures as for the resampling.

    ``info.statistics`` has, equal for all chains, ``log_normalizer``, ``num_temperatures``, ``ess_minimum``,
    ``ancestor_fraction`` and ``outside_fraction`` (see :class:`ebm_ppl.kernels.smc.SMCResult`). All chains are flagged
    as divergent when a weight was not a number, no particle had any, or the population collapsed.

    Args:
        inner: The kernel of the moves, any that keeps nothing but positions and leaves its target invariant.
        reference: Normalised distribution of one event that can be sampled, wider than the target; that of the potential
            (the base of :func:`ebm_ppl.potentials.tilt`) when ``None``.
        num_steps: Steps of ``inner`` at every temperature.
        target_ess: Effective sample size to keep at each step, as a fraction in (0, 1); higher takes more temperatures.
        keep_weights: Move the particles at the target with the weights of the last step instead of resampling them. The
            weights become those of the sampler, ``sampler.log_weight``.
        max_temperatures: Where a path that has not arrived jumps to the target.

    Returns:
        A kernel that is consistent: its error vanishes as the number of chains grows.

    Raises:
        TypeError: ``inner`` is not a kernel or carries auxiliaries, or the reference has no density.
        ValueError: a number is out of range, there is no reference, or it has events of another shape.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = tempered_smc(inner=ebm.kernels.mala(step_size=0.1), reference=dist.Normal(0.0, 3.0))
        >>> sampler = ebm.init_sampler(jnp.zeros(1000), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 4.0 * (x**2 - 1.0) ** 2, sampler, 1)
        >>> bool(abs(info.statistics["log_normalizer"][0] - -0.0536) < 0.15)  # the exact value is -0.0536
        True

    References:
        Del Moral, Doucet, Jasra (2006), arXiv:cond-mat/0212648; Jasra, Stephens, Doucet, Tsagaris (2011), Inference for
        Lévy-driven stochastic volatility models via adaptive sequential Monte Carlo, Scandinavian Journal of Statistics 38.
    """
    check_markov_kernel("inner", inner)
    if reference is not None:
        check_proposal("reference", reference)
    static = _TemperedSMC(
        check_count("num_steps", num_steps), bool(keep_weights), check_count("max_temperatures", max_temperatures)
    )
    return Partial(
        static,
        inner=inner,
        reference=None if reference is None else as_tunable(reference),
        target_ess=check_target_ess(target_ess),
    )


def check_target_ess(target_ess: float | Array, *, name: str = "target_ess") -> Array:
    """A fraction strictly between 0 and 1.

    Raises:
        TypeError: it is not a real number.
        ValueError: a concrete value is not.
    """
    return check_one(name, target_ess, lambda x: (x > 0.0) & (x < 1.0), "a fraction strictly between 0 and 1")


@dataclass(frozen=True)
class _TemperedSMC:
    """The static half of the kernel."""

    draws_afresh: ClassVar[bool] = True

    num_steps: int
    keep_weights: bool
    max_temperatures: int

    def __call__(self, potential: Potential, *, inner: Kernel, reference: Any, target_ess: Array) -> SamplingAlgorithm:
        reference = find_reference("tempered_smc", reference, potential)

        def init(position: PyTree, rng_key: Key | None = None) -> Any:
            dtype = jnp.promote_types(jnp.result_type(*jax.tree.leaves(position)), jnp.float32)
            num_chains = jax.tree.leaves(position)[0].shape[0]
            return TemperedSMCState(position, jnp.zeros(num_chains, dtype), jnp.full((), jnp.nan, dtype))

        def step(rng_key: Key, state: Any) -> tuple[Any, Any]:
            draw_key, run_key = jax.random.split(rng_key)
            draws = draw_like(draw_key, reference, state.position)
            result = run_tempered_smc(
                run_key,
                draws,
                lambda event: log_density(reference, event[None])[0],
                lambda event: -potential(event),
                kernel=inner,
                num_steps=self.num_steps,
                target_ess=target_ess,
                max_temperatures=self.max_temperatures,
                keep_weights=self.keep_weights,
                coding=potential,
            )
            info = step_info(
                state.log_weight.shape[0],
                acceptance_rate=result.info.acceptance_rate,
                is_divergent=result.info.is_divergent | result.is_collapsed | result.is_uncovered | ~result.is_finite,
                num_gradients=result.info.num_gradients,
                num_energies=result.info.num_energies,
                num_nonfinite=result.info.num_nonfinite,
                log_normalizer=result.log_normalizer,
                num_temperatures=result.num_temperatures,
                ess_minimum=result.ess_minimum,
                ancestor_fraction=result.ancestor_fraction,
                outside_fraction=result.outside_fraction,
            )
            dtype = state.log_weight.dtype
            state = TemperedSMCState(
                result.position, result.log_weight.astype(dtype), result.log_normalizer.astype(dtype)
            )
            return state, info

        return SamplingAlgorithm(init, step)


def draw_like(key: Key, reference: Any, position: PyTree) -> Array:
    """As many draws of a reference as there are chains, in their dtype.

    Raises:
        ValueError: the events of the reference have another shape than the chains.
    """
    leaves = jax.tree.leaves(position)
    draws, _ = sample_and_log_prob(reference, key, leaves[0].shape[0])
    if jax.tree.structure(position) != jax.tree.structure(draws) or draws.shape != leaves[0].shape:
        raise ValueError(
            f"reference: got events of shape {draws.shape[1:]}, expected that of the chains, "
            f"{jax.tree.map(lambda x: x.shape[1:], position)}."
        )
    return draws.astype(leaves[0].dtype)
