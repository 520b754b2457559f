"""The sampler of a negative phase as a player that learns too: one step of its own objective after each phase."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from ebm_ppl.chains import chain_potential
from ebm_ppl.distributions import EBM
from ebm_ppl.potentials import trainable
from ebm_ppl.rows import RowPotential
from ebm_ppl.training.state import check_optimizer
from ebm_ppl.types import Array, Batch, Kernel, Key, Objective, Potential, PyTree, SamplerState


class SamplerPlayer(NamedTuple):
    """What a sampler learns from, and how.

    Attributes:
        objective: ``(potential, sampler, batch, key) -> (loss, (sampler, metrics))``, differentiated in the kernel.
        optimizer: For the floating arrays of the kernel.
    """

    objective: Objective
    optimizer: optax.GradientTransformation

    def start(self, kernel: Kernel) -> PyTree:
        """The state of the optimizer before the first phase."""
        return self.optimizer.init(eqx.filter(kernel, trainable(kernel)))

    def move(
        self, key: Key, potential: Potential, sampler: SamplerState, batch: Batch, optimizer_state: PyTree, site: str
    ) -> tuple[SamplerState, PyTree, Array]:
        """One step of the kernel down its objective, with the chains where they are.

        Args:
            key: Random key.
            potential: The energy that the chains have moved under; a constant.
            sampler: The moved chains.
            batch: Observed rows in the space of the chains, or ``None``.
            optimizer_state: From the last call.
            site: Name of the EBM site, for errors.

        Returns:
            The chains with their new kernel, the state of the optimizer, and the loss.

        Raises:
            jax.errors.JaxRuntimeError: (while running) the loss, or a parameter of the kernel, is not finite.
        """
        parameters, rest = eqx.partition(sampler.kernel, trainable(sampler.kernel))

        def loss_of(parameters: PyTree) -> tuple[Array, Any]:
            return self.objective(potential, sampler._replace(kernel=eqx.combine(parameters, rest)), batch, key)

        (loss, _), gradient = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        update = optax.with_extra_args_support(self.optimizer).update
        updates, optimizer_state = update(gradient, optimizer_state, parameters, value=loss)
        moved = eqx.apply_updates(parameters, updates)
        is_finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in [loss, *jax.tree.leaves(moved)]]).all()
        loss = eqx.error_if(
            loss,
            ~is_finite,
            f"site '{site}': the sampler_objective, or a parameter of the kernel after its step, became non-finite. Use a "
            "smaller step of the sampler_optimizer, or clip its gradient (optax.clip_by_global_norm).",
        )
        return sampler._replace(kernel=eqx.combine(moved, rest)), optimizer_state, jax.lax.stop_gradient(loss)


def sampler_player(kernel: Kernel, objective: Any, optimizer: Any, *, persistent: bool) -> SamplerPlayer | None:
    """The player of a negative phase, or ``None`` where its sampler does not learn.

    Raises:
        TypeError: the objective is not a function, or the optimizer is none of optax's.
        ValueError: one of the two is missing, the chains do not persist, or the kernel has nothing to train.

    Example:
        >>> import ebm_ppl as ebm
        >>> sampler_player(ebm.kernels.mala(step_size=0.1), None, None, persistent=True) is None
        True
    """
    if objective is None and optimizer is None:
        return None
    teaches: Any = objective
    if not callable(objective):
        raise TypeError(
            f"sampler_objective: got {type(objective).__name__} with a sampler_optimizer, expected a function such as "
            "ebm_ppl.objectives.chain_likelihood."
        )
    if optimizer is None:
        raise ValueError(
            "sampler_optimizer: got None with a sampler_objective, expected an optimizer such as "
            "ebm_ppl.flows.proposal_only(optax.adam(1e-3))."
        )
    check_optimizer("sampler_optimizer", optimizer)
    if not persistent:
        raise ValueError(
            "sampler_objective: got one with persistent=False, expected None: what the sampler learns would not be kept."
        )
    if not jax.tree.leaves(eqx.filter(kernel, trainable(kernel))):
        raise ValueError(
            "sampler_objective: got one with a kernel that has no floating arrays to train, expected None."
        )
    return SamplerPlayer(teaches, optimizer)


def site_potential(ebm: EBM) -> Potential:
    """The energy of an EBM without rows in the space of its chains."""
    return chain_potential(RowPotential(ebm, 0))


def observed_rows(ebm: EBM, msg: dict[str, Any]) -> Array | None:
    """What is observed of an EBM without rows, as ``(row, *unconstrained)``; ``None`` where nothing is."""
    if not msg["is_observed"]:
        return None
    rows = jnp.asarray(msg["value"]).reshape(-1, *ebm.event_shape)
    return rows if ebm.support.is_discrete else ebm.transform.inv(rows)
