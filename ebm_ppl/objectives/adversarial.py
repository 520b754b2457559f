"""Adversarial training of an energy: the energy's half of a game that any sampler may play."""

from typing import Literal

from ebm_ppl.checks import check_not_negative
from ebm_ppl.objectives.contrastive import chains_from_rows, energy_gap, persistent_contrastive_divergence
from ebm_ppl.objectives.regularizers import add_penalty, energy_square
from ebm_ppl.types import Array, Batch, Key, Metrics, Potential, SamplerState, Scalar


def generalized_contrastive_divergence(
    potential: Potential,
    sampler: SamplerState,
    batch: Batch,
    key: Key,
    *,
    num_steps: int = 1,
    start: Literal["sampler", "data"] = "sampler",
    energy_weight: float | Array = 0.0,
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Generalised contrastive divergence (GCD), the energy's move: lower at rows than at draws of the sampler.

    The game is ``min_U max_q KL(p || exp(-U) / Z) - KL(q || exp(-U) / Z)``, in which log Z cancels. For a given law
    ``q`` of the negatives its gradient in ``U`` is that of ``loss = mean U(batch) - mean U(negatives) + energy_weight
    (mean U(batch)^2 + mean U(negatives)^2)``. The sampler's move, towards ``exp(-U) / Z``, is not made here: a Markov
    kernel makes it by its steps, a diffusion sampler (``kernels.raw_diffusion``) or a generator by its own objective.

    With negatives from ``exp(-U) / Z`` and no energy weight this is the gradient of the log-likelihood; with ``k``
    steps from the data it IS :func:`~ebm_ppl.objectives.contrastive_divergence`, and with ``k`` steps of a bank of
    chains :func:`~ebm_ppl.objectives.persistent_contrastive_divergence`. With an energy weight ``w`` the best energy
    against ``q`` is ``U = -tanh(log(p / q) / 2) / (2 w)``, so no two log densities of the model, relative to its base,
    differ by more than ``1 / w``, and the game ends at a model between the data and the base (a flat law, without one).

    Energies are dimensionless. At a temperature ``tau``, with energies ``E = tau U`` and weight ``gamma`` of ``E^2``,
    this is the loss divided by ``tau``, and ``energy_weight = gamma tau``.

    Args:
        potential: Energy of one event, base included.
        sampler: Any sampler; one step of ``kernels.raw_diffusion`` or ``kernels.generator`` is a fresh draw.
        batch: Rows ``(row, *event)``.
        key: Random key.
        num_steps: Kernel steps (k).
        start: The kernel's steps start from the chains of the sampler, or from the rows.
        energy_weight: Of the squared energies, those of a tilted potential without its base; at least zero. An array can
            change without recompilation.

    Returns:
        ``(loss, (sampler, metrics))`` with the metrics of :func:`~ebm_ppl.objectives.contrastive_divergence` and
        ``energy_l2``. From the rows, the sampler passes through.

    Raises:
        TypeError: ``sampler`` is not a sampler state, ``energy_weight`` no number, or the energy is not real floating.
        ValueError: ``num_steps < 1``, an unknown ``start``, or the energy does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.zeros((16, 2)), ebm.kernels.mala(step_size=0.1))
        >>> def energy(x): return 0.5 * jnp.sum(x**2)
        >>> loss, (sampler, metrics) = generalized_contrastive_divergence(
        ...     energy, sampler, jnp.ones((8, 2)), jax.random.key(0), num_steps=2, energy_weight=0.1)
        >>> bool(metrics["energy_l2"] >= 1.0)
        True

    References:
        Yoon, Hwang, Kwon, Noh, Park (2023), Generalized contrastive divergence, arXiv:2312.03397; the same authors (2024),
        Maximum entropy inverse reinforcement learning of diffusion models with energy-based models, arXiv:2407.00626,
        equation 5 and section 3.2.
    """
    weight = check_not_negative("energy_weight", energy_weight)
    if start == "sampler":
        loss, (sampler, metrics) = persistent_contrastive_divergence(
            potential, sampler, batch, key, num_steps=num_steps
        )
        negatives = sampler
    elif start == "data":
        batch, negatives, info = chains_from_rows(potential, sampler, batch, key, num_steps)
        loss, metrics = energy_gap(potential, batch, negatives, info, paired=True)
    else:
        raise ValueError(f"start: got {start!r}, expected 'sampler' or 'data'.")
    penalty = energy_square(potential, batch, negatives)
    return add_penalty(loss, sampler, metrics, "energy_l2", weight, penalty)
