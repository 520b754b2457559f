"""Unadjusted Langevin on the unit sphere: a step in the space around it, and back."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ebm_ppl.checks import check_unit_vectors
from ebm_ppl.kernels.scaled_langevin import LangevinSteps, langevin_tunables
from ebm_ppl.types import Array, Kernel, Potential, PyTree


def sphere_langevin(
    step_size: float | Array, *, temperature: float | Array | None = None, antithetic: bool = False
) -> Kernel:
    """Unadjusted Langevin on the unit sphere: ``y = x - eps grad U(x) + sqrt(2 eps T) xi``, ``x' = y / |y|``.

    ``grad`` is the gradient in the space around the sphere, and needs no projection: to first order
    ``E[x' - x] = -eps P grad U - eps T (d - 1) x`` with ``P = I - x x'``, which is the generator of Langevin dynamics
    on the sphere. It targets ``exp(-U / T)`` with respect to the surface measure.

    BIASED: with no accept step its stationary law differs from that by a term of order ``eps``.

    Args:
        step_size: ``eps > 0``; a step is about ``sqrt(2 eps T (d - 1))`` radians long.
        temperature: ``T > 0``; 1 when ``None``.
        antithetic: Chain ``i`` of the first half and chain ``i`` of the second get the noise ``xi`` and ``-xi``; see
            :func:`ebm_ppl.kernels.langevin`.

    Returns:
        A kernel with one gradient per step, for events ``(d,)`` of length 1, and no acceptance rate.

    Raises:
        TypeError: an argument is no real number.
        ValueError: an argument is not finite and positive. When it runs: chains that are not unit vectors, a potential
            whose support is another than the sphere, or antithetic noise for an odd number of chains.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> north = jnp.tile(jnp.array([0.0, 0.0, 1.0]), (8, 1))
        >>> sampler = ebm.init_sampler(north, sphere_langevin(step_size=0.02))
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 2.0 * x[2], sampler, 100)
        >>> bool(jnp.allclose(jnp.linalg.norm(sampler.position, axis=1), 1.0))
        True

    References:
        Domingo-Enrich, Bietti, Gabrie, Bruna, Vanden-Eijnden (2021), Dual training of energy-based models with
        overparametrized shallow neural networks, arXiv:2107.05134, for the use; the step is derived here.
    """
    return Partial(_SphereLangevin(antithetic), **langevin_tunables(step_size, None, temperature, None))


@dataclass(frozen=True)
class _SphereLangevin(LangevinSteps):
    """The static half of the kernel; a :class:`~ebm_ppl.types.ConfinedKernel`."""

    def check_space(self, potential: Potential | None, position: PyTree) -> None:
        """Raise where the chains are not unit vectors, or the potential is not one of the sphere."""
        check_unit_vectors("position", position, what="chain")
        support = getattr(potential, "support", None)
        if support is not None and not _is_sphere(support, position.shape[1]):
            raise ValueError(
                f"potential: sphere_langevin got one whose support is {support}, expected the sphere; use "
                "kernels.langevin."
            )

    def project(self, position: Array) -> Array:
        """The nearest unit vectors."""
        # Scaled first, so that the square of a long step is a number.
        position = position / jnp.max(jnp.abs(position), axis=-1, keepdims=True)
        return position / jnp.linalg.norm(position, axis=-1, keepdims=True)


def _is_sphere(support: Any, size: int) -> bool:
    """Whether a constraint accepts a unit vector, and neither a shorter nor a longer one."""
    pole = np.eye(size, dtype=np.float32)[0]
    with jax.ensure_compile_time_eval():
        return [bool(support(length * pole)) for length in (0.5, 1.0, 2.0)] == [False, True, False]
