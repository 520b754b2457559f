"""Gibbs with gradients: which site to change, and to what, is proposed from one gradient of the energy."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.info import step_info
from ebm_ppl.kernels.discrete import (
    InformedState,
    Values,
    accepts,
    check_chains,
    check_values,
    find_values,
    linearized,
    sites_of,
    split,
)
from ebm_ppl.types import Array, Info, Kernel, Key, Potential, PyTree


def gibbs_with_gradients(*, values: Sequence[int | float] | None = None) -> Kernel:
    """Gibbs with gradients: one site takes one new value, chosen by what a gradient promises, and is accepted exactly.

    With ``d(x)[i, k] = -grad_i U(x) (v_k - x_i)``, which approximates ``U(x) - U(x with x_i = v_k)``, the pair of a site
    and another value for it is drawn from ``q(i, k | x) ∝ exp(d(x)[i, k] / 2)``, and the new state ``x'`` is accepted with
    probability ``min(1, exp(U(x) - U(x')) q(i, x_i | x') / q(i, k | x))``.

    One step changes one site at most and costs one gradient, so that a sweep of :func:`ebm_ppl.kernels.gibbs` over ``d``
    sites compares with ``d`` steps. Labels without an order are linearised as indicator vectors where the potential has
    an energy of those (``potentials.Potts``), and as numbers otherwise. Proposals with a non-finite energy are rejected
    and counted.

    Args:
        values: What a site may be, such as ``(0, 1)`` or ``(-1, 1)``; needed where neither the potential nor the support
            of its base says so.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant, and is reversible. Positions are integers or floats.

    Raises:
        TypeError: ``values`` are not numbers. When it runs: the potential cannot be evaluated at floating numbers.
        ValueError: fewer than two values. When it runs: states that are not in the coding.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> rbm = ebm.potentials.RBM.random(6, 3, key=jax.random.key(0), scale=1.0)
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 6), int), gibbs_with_gradients())
        >>> sampler, info = ebm.advance(jax.random.key(1), rbm, sampler, 20)
        >>> int(info.num_gradients[0]), bool(info.has_moved.all())
        (21, True)

    References:
        Grathwohl, Swersky, Hashemi, Duvenaud, Maddison (2021), Oops I took a gradient: scalable sampling for discrete
        distributions, arXiv:2102.04509.
    """
    return Partial(_GibbsWithGradients(check_values(values)))


@dataclass(frozen=True)
class _GibbsWithGradients:
    """The static half of the kernel; a :class:`~ebm_ppl.types.DiscreteKernel`."""

    values: Values | None

    def check_position(self, potential: Potential, position: PyTree) -> None:
        """Raise where the chains are not in the coding, or the energy has no gradient."""
        values = check_chains("gibbs_with_gradients", self.values, potential, position)
        linearized("gibbs_with_gradients", potential, sites_of(values, position))

    def __call__(self, potential: Potential) -> SamplingAlgorithm:
        values = find_values("gibbs_with_gradients", self.values, potential)

        def init(position: PyTree, rng_key: Key | None = None) -> InformedState:
            self.check_position(potential, position)
            evaluate = linearized("gibbs_with_gradients", potential, sites_of(values, position))
            energy, gains = jax.vmap(evaluate)(position.reshape(position.shape[0], -1))
            return InformedState(position, energy, gains)

        def step(rng_key: Key, state: InformedState) -> tuple[InformedState, Info]:
            position = state.position
            sites = sites_of(values, position)
            evaluate = linearized("gibbs_with_gradients", potential, sites)
            num_values = len(values)

            def step_chain(
                key: Key, flat: Array, energy: Array, gains: Array
            ) -> tuple[Array, Array, Array, Array, Array, Array]:
                choice_key, accept_key = jax.random.split(key)
                digits, is_coded = sites.digits(flat)
                log_proposal = _log_proposal(gains, digits)
                choice = jax.random.categorical(choice_key, log_proposal)
                site, value = choice // num_values, choice % num_values
                proposed = flat.at[site].set(sites.values[value])
                new_energy, new_gains = evaluate(proposed)
                back = _log_proposal(new_gains, digits.at[site].set(value))[site * num_values + digits[site]]
                log_ratio = energy - new_energy + back - log_proposal[choice]
                uniform = jax.random.uniform(accept_key, dtype=sites.dtype)
                accept, rate, is_finite = accepts(uniform, log_ratio, energy, new_energy)
                return (
                    jnp.where(accept, proposed, flat),
                    jnp.where(accept, new_energy, energy),
                    jnp.where(accept, new_gains, gains),
                    rate,
                    ~is_finite,
                    ~is_coded | ~jnp.isfinite(energy),
                )

            flat, energy, gains, rate, is_bad, is_divergent = jax.vmap(step_chain)(
                split(rng_key, position), position.reshape(position.shape[0], -1), state.energy, state.gains
            )
            info = step_info(
                position.shape[0],
                acceptance_rate=rate,
                is_divergent=is_divergent,
                num_gradients=1,
                num_nonfinite=is_bad,
            )
            return InformedState(flat.reshape(position.shape), energy, gains), info

        return SamplingAlgorithm(init, step)  # pyright: ignore[reportArgumentType]


def _log_proposal(gains: Array, digits: Array) -> Array:
    """Log probability of every change of one site, flattened; what a site is already is no change."""
    is_own = jnp.arange(gains.shape[1]) == digits[:, None]
    return jax.nn.log_softmax(jnp.where(is_own, -jnp.inf, 0.5 * gains).reshape(-1))
