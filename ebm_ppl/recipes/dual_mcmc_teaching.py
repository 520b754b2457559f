"""Dual-MCMC teaching: an EBM, a generator and an inference network that learn from two revisions of each other's draws."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ebm_ppl.checks import check_count, check_markov_kernel, check_positive, check_rows
from ebm_ppl.errors import TrainingFailure
from ebm_ppl.kernels import generator, langevin, short_run
from ebm_ppl.kernels.scaled_langevin import is_langevin
from ebm_ppl.objectives import dual_teaching, generalized_contrastive_divergence, limit_gap
from ebm_ppl.potentials import MLP
from ebm_ppl.recipes.generator_model import GeneratorModel
from ebm_ppl.sampling import init_sampler
from ebm_ppl.training import TrainState, fit, init_train
from ebm_ppl.training.stopping import Evaluate
from ebm_ppl.types import Array, Kernel, Key, Potential, PyTree


def dual_mcmc_teaching(
    key: Key,
    data: Array,
    *,
    model: Callable[..., None],
    num_updates: int,
    batch_size: int = 64,
    potential: Potential | None = None,
    inference: Any = None,
    event_kernel: Kernel | None = None,
    num_event_steps: int = 30,
    latent_kernel: Kernel | None = None,
    num_latent_steps: int = 10,
    noise: Any = None,
    generator_weights: tuple[float, float] = (1.0, 1.0),
    inference_weights: tuple[float, float] = (1.0, 0.1),
    energy_weight: float = 0.1,
    max_gap: float = 1e4,
    regenerate: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    generator_optimizer: optax.GradientTransformation | None = None,
    inference_optimizer: optax.GradientTransformation | None = None,
    evaluate: Evaluate | None = None,
    report_every: int = 100,
    progress_bar: bool | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train an energy ``E(x)``, a generator ``p(x, z)`` and its inference network ``q(z | x)`` by dual-MCMC teaching.

    In every update, ``z ~ p(z)``, ``x_0`` the generator's mean, and ``num_event_steps`` steps towards the energy revise it
    to ``x_k``; the energy descends ``mean E(x) - mean E(x_k)``. Then ``z_0 ~ q(z | x)`` is revised to ``z_k`` by
    ``num_latent_steps`` steps towards ``p(z | x)``; the generator learns to rebuild the data from ``z_k`` and ``x_k`` from
    ``z``, the inference network ``z_k`` from the data and ``z`` from ``x_k``.

    The chains on events are Langevin steps with a drift of their own, ``x' = x - step_size grad E + noise_scale xi``: a
    SHORT-RUN sampler at the temperature ``T = noise_scale^2 / (2 step_size)``. The trained model is that sampler, the
    kernel of the state for one step, and neither ``exp(-E)`` nor ``exp(-E / T)``: those have other samples and other mode
    weights. With ``event_kernel=mala(...)`` chains are calibrated for ``exp(-E)``, if still short.

    Players move as the paper's equations have it, all from the revisions of one time. The authors' code draws ``x_k`` again
    after the generator has moved: ``regenerate=True`` is that alternation, for twice the steps.

    Args:
        key: Random key.
        data: Rows ``(row, *event)``.
        model: NumPyro model of one row, see :class:`ebm_ppl.recipes.GeneratorModel`.
        num_updates: Updates of all players.
        batch_size: Rows per update, and chains.
        potential: Energy; :class:`ebm_ppl.potentials.MLP` with three hidden layers of 128 units when ``None``.
        inference: Inference network; a multilayer perceptron when ``None``.
        event_kernel: Moves events; when ``None``, Langevin with step size 0.125, noise 0.02 and gradients clipped to ±1.
        num_event_steps: Its steps (``k_x``); with none the negatives are the generator's draws.
        latent_kernel: Moves latents; Langevin with step size 0.005 when ``None``.
        num_latent_steps: Its steps (``k_z``); with none the inference network follows the evidence bound.
        noise: When given, chains on events start from this distribution and not from the generator, and the energy learns
            alone: short-run training from noise, with at least one step.
        generator_weights: Of rebuilding the data and of following the energy. ``(0, 1)`` is cooperative learning.
        inference_weights: Of the data's and of the generator's latents.
        energy_weight: Of ``mean E(x)^2 + mean E(x_k)^2``.
        max_gap: A larger absolute energy gap ends the run.
        regenerate: Draw ``x_k`` once more for the generator, under the energy after its move.
        optimizer: Of the energy; Adam with step 2e-4 and ``b1 = 0.5`` when ``None``.
        generator_optimizer: Of the model's parameters; likewise, 5e-4.
        inference_optimizer: Of the network's; likewise, 5e-4.
        evaluate: As in :func:`ebm_ppl.fit`.
        report_every: Updates between two looks at the run.
        progress_bar: As in :func:`ebm_ppl.fit`.

    Returns:
        The state and the history of :func:`ebm_ppl.fit`, with the metrics of :func:`ebm_ppl.objectives.dual_teaching` after
        ``sampler_``. :func:`generator_of` gives the trained generator with its guide.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the rows do not fit it.
        TrainingFailure: the energy gap exceeded its limit or a number became non-finite; ``state`` is the last good one.

    Example:
        >>> import equinox as eqx, jax, ebm_ppl as ebm
        >>> data = jax.random.normal(jax.random.key(0), (256, 2)) * 0.5 + 1.0
        >>> model = ebm.recipes.gaussian_generator(eqx.nn.Linear(3, 2, key=jax.random.key(1)), 3, 0.3)
        >>> state, history = dual_mcmc_teaching(jax.random.key(2), data, model=model, num_updates=20, num_event_steps=5)
        >>> generator_of(state)(jax.numpy.zeros(3)).shape
        (2,)

    References:
        Cui, Han (2023), Learning energy-based model via dual-MCMC teaching, arXiv:2312.02469, section 3.
    """
    data = check_rows("data", data)
    batch_size, num_updates = check_count("batch_size", batch_size), check_count("num_updates", num_updates)
    num_event_steps = check_count("num_event_steps", num_event_steps, minimum=0 if noise is None else 1)
    num_latent_steps = check_count("num_latent_steps", num_latent_steps, minimum=0)
    check_positive("max_gap", max_gap)
    energy_key, model_key, fit_key = jax.random.split(key, 3)
    potential = MLP(data.shape[1:], key=energy_key, width=128, depth=3) if potential is None else potential
    adam = functools.partial(optax.adam, b1=0.5)
    if event_kernel is None:
        event_kernel = langevin(0.125, 0.02, max_gradient=1.0)
    check_markov_kernel("event_kernel", event_kernel)

    # A Langevin kernel's own tunables become those of the kernel around it, whose temperature can then be told.
    is_unadjusted = is_langevin(event_kernel)
    local: dict[str, Any] = event_kernel.keywords if is_unadjusted else {"local": event_kernel}
    if noise is not None:
        if not is_unadjusted:
            raise ValueError("event_kernel: got one that is not langevin together with noise, expected langevin(...).")
        kernel = short_run(num_event_steps, noise, **local)
        teaching = {}
    else:
        pair = GeneratorModel(model, data[0], key=model_key, inference=inference)
        kernel = generator(pair, latent_shape=pair.latent_shape, num_steps=num_event_steps, **local)
        players: dict[Any, optax.GradientTransformation] = {
            "parameters": adam(5e-4) if generator_optimizer is None else generator_optimizer,
            "inference": adam(5e-4) if inference_optimizer is None else inference_optimizer,
            "neither": optax.set_to_zero(),  # step sizes and noises are arrays too
        }
        teaching = {
            "sampler_optimizer": optax.partition(players, _players),
            "sampler_objective": functools.partial(
                dual_teaching,
                latent_kernel=langevin(0.005) if latent_kernel is None else latent_kernel,
                num_latent_steps=num_latent_steps,
                generator_weights=generator_weights,
                inference_weights=inference_weights,
                regenerate=regenerate,
            ),
        }
    optimizer = adam(2e-4) if optimizer is None else optimizer
    gap = functools.partial(generalized_contrastive_divergence, num_steps=1, energy_weight=energy_weight)
    sampler = init_sampler(jnp.resize(data, (batch_size, *data.shape[1:])), kernel)
    state = init_train(potential, optimizer, sampler, sampler_optimizer=teaching.get("sampler_optimizer"))
    try:
        return fit(
            fit_key,
            state,
            data,
            limit_gap(gap, max_gap),
            optimizer,
            **teaching,
            num_steps=num_updates,
            batch_size=batch_size,
            evaluate=evaluate,
            report_every=report_every,
            progress_bar=progress_bar,
        )
    except TrainingFailure as failure:
        failure.add_note(f"An absolute energy gap above max_gap = {check_positive('max_gap', max_gap)} ends a run too.")
        raise


def generator_of(state: TrainState) -> GeneratorModel:
    """The trained generator with its guide.

    Raises:
        ValueError: the state's kernel has no such generator.
    """
    pair = getattr(state.sampler.kernel, "keywords", {}).get("generator")
    if not isinstance(pair, GeneratorModel):
        raise ValueError("state: its kernel has no generator, expected the result of dual_mcmc_teaching without noise.")
    return pair


def _players(kernel: PyTree) -> PyTree:
    """Whose each leaf of a kernel is."""

    def label(path: Any, leaf: Any) -> str:
        names = [getattr(entry, "name", getattr(entry, "key", None)) for entry in path]
        # What the model and the network call their own parts is their own business.
        field = names[names.index("generator") + 1] if "generator" in names else None
        return field if field in ("parameters", "inference") else "neither"

    return jax.tree_util.tree_map_with_path(label, kernel)
