"""The proposal of a sampler as a player of its own: where it is in the kernel, and an optimizer that sees nothing else."""

from functools import lru_cache
from typing import Any

import jax
import optax

from ebm_ppl.partials import tunables_of
from ebm_ppl.types import PyTree, SamplerState

_NAME = "proposal"


def proposal_of(sampler: SamplerState) -> Any:
    """The proposal of the sampler's kernel.

    Raises:
        ValueError: the kernel has none.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros(4), ebm.kernels.independence(dist.Normal(0.0, 2.0)))
        >>> float(proposal_of(sampler).scale)
        2.0
    """
    tunables = tunables_of(sampler.kernel)
    if _NAME not in tunables:
        raise ValueError(
            f"sampler: its kernel has tunables {sorted(tunables)}, expected a 'proposal' to refit. Kernels with one are "
            "isir, independence and flow_assisted."
        )
    return tunables[_NAME]


def proposal_only(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer of a kernel that moves the kernel's proposal, and leaves its other tunables bit for bit as they are.

    The gradient of a proposal's loss in a step size is zero, and yet weight decay would shrink it. Of the proposal, what
    :func:`ebm_ppl.potentials.trainable` marks is moved: not the base of a flow.

    Args:
        optimizer: For the proposal; it sees no other gradients, so that clipping by norm is by that of the proposal. The
            same object gives the same result, and nothing recompiles.

    Returns:
        A ``sampler_optimizer`` for :func:`ebm_ppl.init_train`, :func:`ebm_ppl.fit` and
        :func:`ebm_ppl.handlers.negative_phase`.

    Raises:
        TypeError: ``optimizer`` is none of optax's.
        ValueError: (when its state is made) the kernel has no proposal to train.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, optax, ebm_ppl as ebm
        >>> kernel = ebm.kernels.global_local(ebm.kernels.independence(dist.Normal(0.0, 2.0)), ebm.kernels.mala(0.5), 1)
        >>> optimizer = proposal_only(optax.sgd(1.0))
        >>> ones = jax.tree.map(jnp.ones_like, kernel)
        >>> updates, _ = optimizer.update(ones, optimizer.init(kernel), kernel)
        >>> float(updates.keywords["step_size"]), float(updates.keywords["proposal"].scale)
        (0.0, -1.0)
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}, expected one of optax's, such as optax.adam(1e-3)."
        )
    return _partition(optimizer)


@lru_cache
def _partition(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.partition({"moves": optimizer, "stays": optax.set_to_zero()}, _labels)


def _labels(kernel: PyTree) -> PyTree:
    """Which leaves of a kernel belong to its proposal, or to those of its parts."""

    def label(path: Any, leaf: Any) -> str:
        names = [str(getattr(entry, "key", "")) for entry in path]
        return "moves" if any(name == _NAME or name.endswith("_" + _NAME) for name in names) else "stays"

    labels = jax.tree_util.tree_map_with_path(label, kernel)
    if "moves" not in jax.tree.leaves(labels):
        raise ValueError(
            "sampler_optimizer: got proposal_only with a kernel that has no proposal to train, expected one of isir, "
            "independence or flow_assisted, or another optimizer."
        )
    return labels
