"""Dual training: a shallow energy descends and a cloud of particles ascends, restarted at data now and then."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints

from ebm_ppl.checks import (
    as_positive_number,
    check_count,
    check_not_negative,
    check_probability,
    check_rows,
    check_unit_vectors,
    map_energy,
)
from ebm_ppl.diagnostics import duality_gap
from ebm_ppl.diagnostics.duality import outside_ball
from ebm_ppl.kernels import langevin, sphere_langevin
from ebm_ppl.objectives import persistent_contrastive_divergence
from ebm_ppl.optimizers import measure_descent
from ebm_ppl.potentials import ShallowEnergy, tilt
from ebm_ppl.potentials.shallow import Domain, Regime
from ebm_ppl.proposals import can_sample
from ebm_ppl.recipes.bases import normal_base
from ebm_ppl.regions import check_base
from ebm_ppl.sampling import init_sampler
from ebm_ppl.training import TrainState, fit, init_train
from ebm_ppl.training.state import check_optimizer
from ebm_ppl.training.stopping import Evaluate, named_numbers
from ebm_ppl.types import Array, Key

_WATCHED = 4096
"""Draws of the base that the gap is estimated from while training goes on; as many rows at most."""


def dual_training(
    key: Key,
    data: Array,
    *,
    num_updates: int,
    bound: float,
    network: ShallowEnergy | None = None,
    width: int = 64,
    regime: Regime = "features",
    domain: Domain = "sphere",
    base: Any = None,
    num_copies: int = 2,
    num_steps: int = 1,
    step_size: float = 0.02,
    restart_probability: float = 0.0,
    restart_every: int | None = None,
    feature_rate: float | None = None,
    weight_rate: float | None = None,
    optimizer: optax.GradientTransformation | None = None,
    batch_size: int | None = None,
    evaluate: Evaluate | None = None,
    report_every: int = 100,
    progress_bar: bool | None = None,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Train a shallow energy by gradient descent-ascent: its measure descends, particles make noisy ascent.

    Maximum likelihood in a ball of measures is a game, ``min_U max_nu E_data U - E_nu U - KL(nu, tau)``. The particles
    stand for ``nu``: some at every row to begin with, each update moves them by Langevin steps in the energy, with
    noise ``xi`` and ``-xi`` for two particles of one row. Then features and weights follow the difference of means, and
    the norm is brought within ``bound``. Without restarts this is persistent contrastive divergence; restarts in every
    update, with one step, make it score matching; in between, they keep particles near the data.

    With ``h`` the step size and ``p`` the share of updates that restart, the gradient shrinks as ``p`` grows, to order
    ``h`` at ``p = 1``, and larger rates make up for it: the default ones are ``0.04 (1 + 0.1 p / h)``, in the lazy
    regime, whose weights do not grow by factors, ``0.5 (1 + 0.1 p / h)``. Similar time scales of both players serve
    best: far slower features learn little in a given number of updates, far faster ones follow the noise of the
    particles.

    Args:
        key: Random key.
        data: Rows ``(row, d)``; unit vectors for the sphere.
        num_updates: Updates of both players.
        bound: ``beta``, of the total variation, or of the root mean square in the lazy regime.
        network: A :class:`ebm_ppl.potentials.ShallowEnergy`; one with the next three arguments when ``None``.
        width: Units.
        regime: ``"features"`` or ``"lazy"``, whose features stay as drawn.
        domain: ``"sphere"`` or ``"euclidean"``.
        base: Normalised distribution of one event in Euclidean space; when ``None``, normal at the mean of the data, in
            all coordinates with the largest standard deviation that one of them has. On the sphere it is uniform.
        num_copies: Particles per row.
        num_steps: Langevin steps (k) per update.
        step_size: ``h``.
        restart_probability: ``p``, with which each particle is sent to its row before it moves.
        restart_every: Instead, send all of them every so many updates, ``p = 1 / restart_every``.
        feature_rate: Of the features; see above for the default. Not for the lazy regime.
        weight_rate: Of the weights.
        optimizer: Instead of both, and of ``bound``.
        batch_size: Rows per update; all of them when ``None``. Restarts go to rows of the batch.
        evaluate: As in :func:`ebm_ppl.fit`.
        report_every: Updates between two looks at the run.
        progress_bar: As in :func:`ebm_ppl.fit`.

    Returns:
        The state, whose potential is the energy with its base, and the history of :func:`ebm_ppl.fit` with, at every
        report, ``evaluation_norm`` and ``evaluation_duality_gap`` with its ``_error``:
        :func:`ebm_ppl.diagnostics.duality_gap`, the draws of the model being weighted ones of the base. Where the model
        is far from the base the error is large; where an ``optimizer`` has left the ball there is no gap, and NaN.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the rows do not fit it.
        TrainingFailure: the energy or a particle became non-finite.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> rows = jax.random.normal(jax.random.key(0), (200, 3)) + jnp.array([0.0, 0.0, 2.0])
        >>> rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
        >>> state, history = dual_training(jax.random.key(1), rows, num_updates=200, bound=10.0, progress_bar=False)
        >>> bool(history["evaluation_duality_gap"][-1] < history["evaluation_duality_gap"][0])
        True

    References:
        Domingo-Enrich, Bietti, Gabrie, Bruna, Vanden-Eijnden (2021), Dual training of energy-based models with
        overparametrized shallow neural networks, arXiv:2107.05134.
    """
    check_count("num_updates", num_updates)
    num_steps, num_copies = check_count("num_steps", num_steps), check_count("num_copies", num_copies)
    data = check_rows("data", data)
    if data.ndim != 2:
        raise ValueError(f"data: got shape {data.shape}, expected (row, d).")
    limit, size = as_positive_number("bound", bound), as_positive_number("step_size", step_size)
    check_probability("restart_probability", restart_probability)
    restart_probability = float(restart_probability)
    if restart_every is not None and restart_probability != 0.0:
        raise ValueError(
            f"restart_every: got {restart_every} with restart_probability {restart_probability}, expected one."
        )
    net_key, fit_key, watch_key = jax.random.split(key, 3)
    if network is None:
        network = ShallowEnergy(data.shape[1], key=net_key, width=width, regime=regime, domain=domain)
    elif not isinstance(network, ShallowEnergy):
        raise TypeError(f"network: got {type(network).__name__}, expected an ebm_ppl.potentials.ShallowEnergy.")
    elif (width, regime, domain) != (64, "features", "sphere"):
        raise ValueError("width, regime, domain: got one of them together with a network, which has its own.")
    if network.event_shape != data.shape[1:]:
        raise ValueError(
            f"network: got one of events {network.event_shape}, expected those of the rows, {data.shape[1:]}."
        )
    if network.domain == "sphere":
        check_unit_vectors("data", data)
        data = data / jnp.linalg.norm(data, axis=1, keepdims=True)  # to rounding
    share = restart_probability if restart_every is None else 1.0 / check_count("restart_every", restart_every)
    if optimizer is None:
        rate = (0.5 if network.regime == "lazy" else 0.04) * (1.0 + 0.1 * share / size)
        weight_rate = rate if weight_rate is None else as_positive_number("weight_rate", weight_rate)
        if network.regime == "features":
            feature_rate = rate if feature_rate is None else float(check_not_negative("feature_rate", feature_rate))
        elif feature_rate is not None:
            raise ValueError(
                f"feature_rate: got {feature_rate} in the lazy regime, whose features stay; expected None."
            )
        optimizer = _descent(weight_rate, feature_rate, limit)
    elif feature_rate is not None or weight_rate is not None:
        raise ValueError("optimizer: got one together with feature_rate or weight_rate, expected one of the two.")
    check_optimizer("optimizer", optimizer)
    # Pairs share a row only where every row has an even number of particles.
    kernel = (sphere_langevin if network.domain == "sphere" else langevin)(step_size, antithetic=num_copies % 2 == 0)
    base = _base(network, data, base)
    watched = data[:: -(-len(data) // _WATCHED)], _base_draws(watch_key, network, base, data)
    sampler = init_sampler(jnp.tile(data, (num_copies, 1)), kernel)
    objective = functools.partial(
        persistent_contrastive_divergence,
        num_steps=num_steps,
        restart_probability=restart_probability,
        restart_age=None if restart_every is None else restart_every * num_steps,
        restart_from="batch",
    )
    return fit(
        fit_key,
        init_train(tilt(network, base), optimizer, sampler),
        data,
        objective,
        optimizer,
        num_steps=num_updates,
        batch_size=batch_size,
        evaluate=functools.partial(_watched, evaluate, *watched, limit),
        report_every=report_every,
        progress_bar=progress_bar,
    )


@functools.cache
def _descent(weight_rate: float, feature_rate: float | None, bound: float) -> optax.GradientTransformation:
    """One object per rates and bound, so that runs of one kind share their compilation."""
    return measure_descent(weight_rate, feature_rate, bound=bound)


def _base_draws(key: Key, network: ShallowEnergy, base: Any, like: Array) -> Array:
    if network.domain == "euclidean":
        return jnp.asarray(base.sample(key, (_WATCHED,)), like.dtype)
    draws = jax.random.normal(key, (_WATCHED, *like.shape[1:]), like.dtype)
    return draws / jnp.linalg.norm(draws, axis=1, keepdims=True)


def _base(network: ShallowEnergy, data: Array, base: Any) -> Any:
    if network.domain == "sphere":
        if base is not None:
            raise ValueError(f"base: got {type(base).__name__} on the sphere, where it is uniform, expected None.")
        return dist.ImproperUniform(constraints.sphere, (), data.shape[1:])
    if base is None:
        return normal_base(data)
    check_base(base, data[0])
    if not can_sample(base):
        raise ValueError(
            f"base: got {type(base).__name__}, which cannot be sampled, expected a normalised distribution."
        )
    return base


def _watched(evaluate: Evaluate | None, rows: Array, draws: Array, bound: float, state: TrainState) -> dict[str, Any]:
    """How far training still is from its end, and what the caller wants to know besides.

    The particles are not asked: where they restart at data they are near them whatever the energy says.
    """
    energy: Any = state.potential.potential
    gap, error = np.nan, np.nan
    if not outside_ball(energy, bound):  # as an optimizer of the caller's own may be
        found = duality_gap(energy, rows, draws, bound=bound, log_weight=-map_energy(energy, draws), num_ascents=40)
        gap, error = found.value, found.standard_error
    watched = {"norm": float(energy.norm), "duality_gap": gap, "duality_gap_error": error}
    return {**watched, **named_numbers(evaluate, state)}
