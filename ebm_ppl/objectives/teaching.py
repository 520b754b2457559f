"""Teaching a generator and an inference network by the two chains that start from them.

Four laws meet here: the data with latents revised from the inference network's draws, and the generator's prior latents
with events revised towards an energy. Both networks follow the likelihood of both; the energy follows its own objective.
"""

from typing import Any, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_count, check_markov_kernel, check_not_negative, check_positive
from ebm_ppl.objectives.contrastive import require_sampler
from ebm_ppl.partials import as_constants, comparable
from ebm_ppl.sampling import advance, chains_at
from ebm_ppl.types import Array, Batch, Event, Kernel, Key, Metrics, Objective, Potential, PyTree, SamplerState, Scalar


class LatentVariableModel(Protocol):
    """A generator ``p(x, z)`` with its inference network ``q(z | x)``: one pytree, each method for ONE row."""

    def __call__(self, latent: Array, /) -> Event:
        """Mean of ``p(x | z)``."""
        ...

    def log_joint(self, event: Event, latent: Array, /) -> Scalar:
        """``log p(x, z)``."""
        ...

    def log_posterior(self, latent: Array, event: Event, /) -> Scalar:
        """``log q(z | x)``."""
        ...

    def sample_posterior(self, key: Key, event: Event, /) -> Array:
        """A draw of ``q(z | x)``, differentiable in the network."""
        ...


def generator_loss(model: Any, events: Batch, latents: Array) -> Scalar:
    """``-mean_i log p(x_i, z_i)``: rebuild events from latents.

    With rows of data and revised latents this is the reconstruction term, with revised events and the latents that they
    began at the teaching of the generator by the energy. Events and latents are constants.

    Args:
        model: See :class:`LatentVariableModel`.
        events: ``(row, *event)``.
        latents: ``(row, *latent)``.

    Example:
        >>> import jax.numpy as jnp
        >>> class Model:
        ...     def log_joint(self, event, latent): return -0.5 * jnp.sum((event - latent) ** 2)
        >>> float(generator_loss(Model(), jnp.ones((4, 2)), jnp.zeros((4, 2))))
        1.0

    References:
        Cui, Han (2023), Learning energy-based model via dual-MCMC teaching, arXiv:2312.02469, equations 10 and 12.
    """
    return -jax.vmap(model.log_joint)(*jax.lax.stop_gradient((events, latents))).mean()


def inference_loss(model: Any, events: Batch, latents: Array) -> Scalar:
    """``-mean_i log q(z_i | x_i)``: infer latents from events, both of them constants.

    With rows of data and revised latents it teaches the network by the posterior, with revised events and the latents
    that they began at by the generator.

    Args:
        model: See :class:`LatentVariableModel`.
        events: ``(row, *event)``.
        latents: ``(row, *latent)``.

    Example:
        >>> import jax.numpy as jnp
        >>> class Model:
        ...     def log_posterior(self, latent, event): return -0.5 * jnp.sum((latent - event) ** 2)
        >>> float(inference_loss(Model(), jnp.ones((4, 2)), jnp.zeros((4, 2))))
        1.0

    References:
        Cui, Han (2023), arXiv:2312.02469, equation 15.
    """
    events, latents = jax.lax.stop_gradient((events, latents))
    return -jax.vmap(model.log_posterior)(latents, events).mean()


def variational_loss(key: Key, model: Any, events: Batch) -> Scalar:
    """The negative evidence bound ``mean_i [log q(z_i | x_i) - log p(x_i, z_i)]``, ``z_i`` drawn from ``q(z | x_i)``.

    What is left of the inference network's objective where latents are not revised. Differentiable through the draws.

    Args:
        key: Random key.
        model: See :class:`LatentVariableModel`.
        events: ``(row, *event)``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> class Model:
        ...     def sample_posterior(self, key, event): return event
        ...     def log_posterior(self, latent, event): return jnp.zeros(())
        ...     def log_joint(self, event, latent): return -jnp.sum(latent**2)
        >>> float(variational_loss(jax.random.key(0), Model(), jnp.ones((4, 2))))
        2.0
    """
    latents = _posterior_draws(key, model, events)
    log_joint = jax.vmap(model.log_joint)(events, latents)
    return jnp.mean(jax.vmap(model.log_posterior)(latents, events) - log_joint)


def revise_latents(
    key: Key, model: Any, events: Batch, latents: Array, kernel: Kernel, num_steps: int
) -> tuple[Array, Array]:
    """``num_steps`` steps of every row's own chain towards its posterior ``p(z | x)``, from the latents given.

    The energy of a row is ``z -> -log p(x, z)``. Rows are chains apart: each accepts or rejects on its own.

    Args:
        key: Random key.
        model: See :class:`LatentVariableModel`; a constant.
        events: ``(row, *event)``.
        latents: Where the chains start, ``(row, *latent)``.
        kernel: Such as :func:`ebm_ppl.kernels.langevin`, or MALA.
        num_steps: Kernel steps; none returns the start.

    Returns:
        The revised latents ``(row, *latent)``, constants, and the acceptance rate of each row, NaN without an accept step.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> class Model:
        ...     def log_joint(self, event, latent): return -0.5 * jnp.sum((event - latent) ** 2)
        >>> kernel = ebm.kernels.mala(step_size=0.5)
        >>> latents, rate = revise_latents(jax.random.key(0), Model(), jnp.ones((4, 2)), jnp.zeros((4, 2)), kernel, 10)
        >>> latents.shape, rate.shape
        ((4, 2), (4,))
    """
    num_rows = latents.shape[0]
    if not check_count("num_steps", num_steps, minimum=0):
        return jax.lax.stop_gradient(latents), jnp.full(num_rows, jnp.nan)

    def one(key: Key, event: Event, latent: Array) -> tuple[Array, Array]:
        def energy(latent: Array) -> Scalar:
            return -model.log_joint(event, latent)

        sampler, info = advance(key, energy, chains_at(latent[None], kernel), num_steps)
        return sampler.position[0], info.acceptance_rate[0]

    return jax.lax.stop_gradient(jax.vmap(one)(jax.random.split(key, num_rows), events, latents))


def dual_teaching(
    potential: Potential,
    sampler: SamplerState,
    batch: Batch,
    key: Key,
    *,
    latent_kernel: Kernel,
    num_latent_steps: int,
    generator_weights: tuple[float | Array, float | Array] = (1.0, 1.0),
    inference_weights: tuple[float | Array, float | Array] = (1.0, 0.1),
    regenerate: bool = False,
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """The sampler's half of dual-MCMC teaching: generator and inference network follow both kinds of revised pairs.

    ``a log p(x, z_k) + b log p(x_k, z) + c log q(z_k | x) + d log q(z | x_k)``, averaged and negated: ``x`` rows of data
    with ``z_k`` revised from a draw of ``q(z | x)``, ``z`` draws of the prior with ``x_k`` revised from the generator. The
    pairs are constants. Without steps on latents, ``z_k`` is the draw of ``q`` itself, and the term in ``c`` becomes
    the evidence bound.

    A ``sampler_objective`` for :func:`ebm_ppl.fit`. The loop draws ``x_k`` once per update, for the energy and for the
    teaching that follows it.

    Args:
        potential: Used by ``regenerate`` alone: else the chains already bear its mark.
        sampler: Chains of :func:`ebm_ppl.kernels.generator`, whose ``generator`` is a :class:`LatentVariableModel`.
        batch: Rows ``(row, *event)``.
        key: Random key.
        latent_kernel: Moves the latents of a row.
        num_latent_steps: Its steps (``k_z``); zero for no revision.
        generator_weights: ``(a, b)``, of the data's and of the energy's teaching. ``a = 0`` is cooperative learning.
        inference_weights: ``(c, d)``.
        regenerate: Draw ``(z, x_0, x_k)`` anew, under the energy as it is after its update.

    Returns:
        ``(loss, (sampler, metrics))``, the loss NaN where chains have not moved yet, which an energy objective that starts
        at the data does not make them; with the metrics ``reconstruction_loss``, ``regression_loss`` (``a``, ``b``),
        ``inference_loss``, ``inversion_loss`` (``c``, ``d``), ``latent_acceptance_rate``, ``latent_revision`` and
        ``event_revision``, mean Euclidean distances between start and end of the chains.

    Raises:
        TypeError: ``sampler`` is not a sampler state, or ``latent_kernel`` no kernel that moves latents from where they
            are.
        ValueError: the sampler's kernel has no latents, there is no batch, or weights are not two numbers, none negative.

    References:
        Cui, Han (2023), Learning energy-based model via dual-MCMC teaching, arXiv:2312.02469, equations 10 to 15; Xie,
        Lu, Gao, Zhu, Wu (2018), arXiv:1609.09408 (cooperative learning).
    """
    require_sampler(sampler)
    if not isinstance(sampler.auxiliary, dict) or "latent" not in sampler.auxiliary:
        raise ValueError("sampler: its chains carry no latents, expected a kernel of ebm.kernels.generator.")
    weights = [*_pair("generator_weights", generator_weights), *_pair("inference_weights", inference_weights)]
    num_latent_steps = check_count("num_latent_steps", num_latent_steps, minimum=0)
    latent_kernel = check_markov_kernel("latent_kernel", latent_kernel)
    if batch is None:
        raise ValueError("batch: got None, expected rows of data: half of the teaching is to rebuild them.")
    chain_key, draw_key, revise_key, bound_key = jax.random.split(key, 4)
    if regenerate:
        moved, _ = advance(chain_key, potential, sampler, 1)
        sampler = moved._replace(kernel=sampler.kernel)  # chains are constants, the player is not
    model = sampler.kernel.keywords["generator"]
    frozen = as_constants(model)
    initial, latents, revised = jax.lax.stop_gradient(
        (sampler.auxiliary["initial"], sampler.auxiliary["latent"], sampler.position)
    )

    start = jax.lax.stop_gradient(_posterior_draws(draw_key, frozen, batch))
    inferred, acceptance_rate = revise_latents(revise_key, frozen, batch, start, latent_kernel, num_latent_steps)
    if num_latent_steps:
        of_data = inference_loss(model, batch, inferred)
    else:
        of_data = variational_loss(bound_key, _Bound(frozen, model), batch)
    terms = [
        generator_loss(model, batch, inferred),
        generator_loss(model, revised, latents),
        of_data,
        inference_loss(model, revised, latents),
    ]
    loss = sum((w.astype(term.dtype) * term for w, term in zip(weights, terms, strict=True)), start=jnp.zeros(()))
    if sampler.age is not None:  # chains that have not moved yet have zeros for latents, and nothing to teach
        loss = jnp.where(jnp.all(sampler.age > 0), loss, jnp.nan)
    names = ("reconstruction_loss", "regression_loss", "inference_loss", "inversion_loss")
    metrics = dict(zip(names, terms, strict=True)) | {
        "latent_acceptance_rate": acceptance_rate.mean(),
        "latent_revision": _distance(start, inferred),
        "event_revision": _distance(initial, revised),
    }
    return loss, (sampler, jax.lax.stop_gradient(metrics))


def limit_gap(objective: Objective, limit: float | Array) -> Objective:
    """An objective whose loss becomes NaN where its energy gap exceeds a limit, so that :func:`ebm_ppl.fit` stops there.

    The energies of an EBM may run away from each other long before anything overflows. ``fit`` then raises
    ``TrainingFailure`` with the state before that update.

    Args:
        objective: With the metric ``energy_gap``.
        limit: Largest absolute gap, positive.

    Raises:
        TypeError: ``objective`` is not callable.
        ValueError: ``limit`` is not positive, or (when called) there is no such metric.

    Example:
        >>> import functools, jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> objective = limit_gap(functools.partial(ebm.objectives.contrastive_divergence, num_steps=1), 1e-6)
        >>> sampler = ebm.init_sampler(jnp.zeros((4, 2)), ebm.kernels.mala(step_size=0.5))
        >>> loss, _ = objective(lambda x: jnp.sum(x**2), sampler, jnp.ones((4, 2)), jax.random.key(0))
        >>> bool(jnp.isnan(loss))
        True
    """
    if not callable(objective):
        raise TypeError(f"objective: got {type(objective).__name__}, expected a function, see ebm_ppl.types.Objective.")
    return jax.tree_util.Partial(_with_limit, comparable(objective), check_positive("limit", limit))


def _with_limit(
    objective: Objective, limit: Array, potential: Potential, sampler: SamplerState, batch: Batch, key: Key
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    loss, (sampler, metrics) = objective(potential, sampler, batch, key)
    if "energy_gap" not in metrics:
        raise ValueError(f"objective: got one with the metrics {sorted(metrics)}, expected 'energy_gap' among them.")
    is_small = jnp.abs(metrics["energy_gap"]) <= limit.astype(loss.dtype)
    return jnp.where(is_small, loss, jnp.nan), (sampler, metrics)


class _Bound(eqx.Module):
    """The joint density of one model with the inference network of another."""

    joint: Any
    inference: Any

    def log_joint(self, event: Event, latent: Array) -> Scalar:
        return self.joint.log_joint(event, latent)

    def log_posterior(self, latent: Array, event: Event) -> Scalar:
        return self.inference.log_posterior(latent, event)

    def sample_posterior(self, key: Key, event: Event) -> Array:
        return self.inference.sample_posterior(key, event)


def _pair(name: str, weights: Any) -> list[Array]:
    values = list(weights) if isinstance(weights, tuple | list) else [weights]
    if len(values) != 2 or any(jnp.ndim(value) for value in values):
        raise ValueError(f"{name}: got {weights!r}, expected two numbers.")
    return [check_not_negative(name, value) for value in values]


def _posterior_draws(key: Key, model: Any, events: Batch) -> Array:
    num_rows = jax.tree.leaves(events)[0].shape[0]
    return jax.vmap(model.sample_posterior)(jax.random.split(key, num_rows), events)


def _distance(first: PyTree, second: PyTree) -> Array:
    """Mean Euclidean distance between the rows of two populations."""
    differences = jax.tree.map(lambda a, b: (a - b).reshape(a.shape[0], -1), first, second)
    return jnp.linalg.norm(jnp.concatenate(jax.tree.leaves(differences), axis=1), axis=1).mean()
