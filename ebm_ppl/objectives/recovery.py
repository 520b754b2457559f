"""Diffusion recovery likelihood: a sequence of energies at rising noise, each trained to recover rows from noisier ones."""

import math
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_markov_kernel, check_potential, check_rows
from ebm_ppl.info import add_infos
from ebm_ppl.objectives.contrastive import energy_gap, require_sampler
from ebm_ppl.sampling import advance, chains_at
from ebm_ppl.types import Array, Batch, Event, Info, Kernel, Key, Metrics, PyTree, SamplerState, Scalar


class RecoveryPotential(eqx.Module):
    """Energies ``U_t`` of rows at ``T`` levels of noise; as a potential of one event, that of the data.

    Events are noised step by step: ``y_t = sqrt(1 - s_t^2) x_t`` and ``x_{t+1} = y_t + s_t noise``, from data ``x_0`` to
    ``x_T``, which is close to ``N(0, I)``. Energy ``t`` belongs to ``y_t``, and ``U(x) = U_0(sqrt(1 - s_0^2) x)`` to
    the data.

    Args:
        function: Any callable pytree ``(t, event) -> scalar``, ``t = 0 ... T - 1`` a traced whole number: a
            :class:`ebm_ppl.diffusion.ValueNetwork` with ``num_steps = T - 1``.
        noise_scales: ``s_0 ... s_{T-1}`` in (0, 1), for events of unit scale; their product of ``sqrt(1 - s_t^2)``
            should be near zero.

    Raises:
        TypeError: ``function`` is not callable, or ``noise_scales`` are no numbers.
        ValueError: ``noise_scales`` are empty or outside (0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> potential = RecoveryPotential(lambda t, y: 0.5 * (t + 1.0) * jnp.sum(y**2), (0.6, 0.8))
        >>> round(float(potential(jnp.array([1.0]))), 4)  # y_0 = 0.8 x
        0.32
    """

    function: Callable[[int | Array, Event], Scalar]
    noise_scales: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, function: Callable[[int | Array, Event], Scalar], noise_scales: Sequence[float]):
        if not callable(function):
            raise TypeError(f"function: got {type(function).__name__}, expected a callable (time, event) -> scalar.")
        self.function = function
        try:
            self.noise_scales = tuple(float(scale) for scale in noise_scales)
        except (TypeError, ValueError) as error:
            raise TypeError(f"noise_scales: got {noise_scales!r}, expected a sequence of numbers in (0, 1).") from error
        if not self.noise_scales or not all(0.0 < scale < 1.0 for scale in self.noise_scales):
            raise ValueError(f"noise_scales: got {self.noise_scales}, expected at least one number in (0, 1).")

    @property
    def num_levels(self) -> int:
        """Levels of noise (T)."""
        return len(self.noise_scales)

    @property
    def retentions(self) -> tuple[float, ...]:
        """``sqrt(1 - s_t^2)``."""
        return tuple(math.sqrt(1.0 - scale**2) for scale in self.noise_scales)

    def __call__(self, event: Event) -> Scalar:
        """Energy of one event of the data."""
        return self.function(0, self.retentions[0] * event)


class Recovered(eqx.Module):
    """The energy of ``z`` in ``y_t = x_{t+1} + s_t r_t z`` given a noisier ``x_{t+1}``, with ``r_t = sqrt(1 - s_t^2)``.

    It is ``U_t(y_t) + |r_t z|^2 / 2``. Were ``x_t`` standard normal, ``z`` would have unit variance at every level, so all
    levels take about the same step size.

    Example:
        >>> import jax.numpy as jnp
        >>> potential = RecoveryPotential(lambda t, y: y**2, (0.6,))
        >>> round(float(Recovered(potential, 0, jnp.array(1.0))(jnp.array(2.0))), 4)  # 1.96^2 + 1.6^2 / 2
        5.1216
    """

    potential: RecoveryPotential
    time: int | Array
    noisier: Array

    def cleaner(self, standardised: Array) -> Array:
        """``y_t`` of one ``z``."""
        scales = [s * r for s, r in zip(self.potential.noise_scales, self.potential.retentions, strict=True)]
        return self.noisier + jnp.asarray(scales, self.noisier.dtype)[self.time] * standardised

    def __call__(self, standardised: Array) -> Scalar:
        """Energy of one ``z``."""
        retention = jnp.asarray(self.potential.retentions, self.noisier.dtype)[self.time]
        return self.potential.function(self.time, self.cleaner(standardised)) + 0.5 * jnp.sum(
            (retention * standardised) ** 2
        )


def diffusion_recovery_likelihood(
    potential: RecoveryPotential, sampler: SamplerState, batch: Batch, key: Key, *, num_steps: int
) -> tuple[Scalar, tuple[SamplerState, Metrics]]:
    """Diffusion recovery likelihood (DRL): ``-log p(y_t | x_{t+1})`` at random levels, by negatives from each conditional.

    Every row is noised to a random level ``t`` and once more to ``x_{t+1}``; the model's law of ``y_t`` given
    ``x_{t+1}`` has the energy ``U_t(y) + |x_{t+1} - y|^2 / (2 s_t^2)``. ``loss = mean U_t(y_t) - mean U_t(negative)``,
    a negative being ``num_steps`` kernel steps in that conditional from ``y = x_{t+1}``. Small noise makes the
    conditional nearly Gaussian, so a few steps suffice where the marginal would need many. Its gradient is that of the
    recovery likelihood when the negatives have converged.

    At the optimum ``exp(-U_t)`` is the density of ``y_t`` up to a constant of each level, and ``exp(-U)`` that of the data.
    Only conditionals are trained on, so the relative weight of modes further apart than ``s_t`` is learned at the noisier
    levels and not at level ``t``: sample by :func:`progressive_recovery`.

    Args:
        potential: Energies at all levels. A plain potential is refused.
        sampler: Supplies the kernel, whose step size is in units of ``s_t sqrt(1 - s_t^2)`` (squared, for Langevin
            kernels), so that one step size suits all levels; its positions are not used and pass through.
        batch: Rows ``(row, *event)``, one floating array of about unit scale.
        key: Random key.
        num_steps: Kernel steps (k).

    Returns:
        ``(loss, (sampler, metrics))``, the metrics those of :func:`~ebm_ppl.objectives.contrastive_divergence`.

    Raises:
        TypeError: ``potential`` is no :class:`RecoveryPotential`, ``sampler`` no sampler state, its kernel draws chains
            anew or carries more than positions, or rows are not floating.
        ValueError: ``num_steps < 1``, or the energy does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> potential = RecoveryPotential(lambda t, y: 0.1 * t * jnp.sum(y**2), (0.3, 0.6))
        >>> sampler = ebm.init_sampler(jnp.zeros((1, 2)), ebm.kernels.mala(step_size=0.5))
        >>> loss, (sampler, metrics) = diffusion_recovery_likelihood(
        ...     potential, sampler, jnp.ones((8, 2)), jax.random.key(0), num_steps=3)
        >>> loss.shape
        ()

    References:
        Gao, Song, Poole, Wu, Kingma (2021), Learning energy-based models by diffusion recovery likelihood,
        arXiv:2012.08125, section 3 and algorithm 1.
    """
    batch = _check_players(potential, sampler, batch)
    level_key, noise_key, step_key, chain_key = jax.random.split(key, 4)
    times = jax.random.randint(level_key, (batch.shape[0],), 0, potential.num_levels)

    def per_row(values: Sequence[float]) -> Array:
        return jnp.asarray(values, batch.dtype)[times].reshape(-1, *[1] * (batch.ndim - 1))

    kept = [math.prod(potential.retentions[: t + 1]) for t in range(potential.num_levels)]
    # y_t is one more retention than x_t, whose noise it shrinks; its own level adds none.
    spread = [r * math.sqrt(1.0 - (k / r) ** 2) for k, r in zip(kept, potential.retentions, strict=True)]
    cleaner = per_row(kept) * batch + per_row(spread) * jax.random.normal(noise_key, batch.shape, batch.dtype)
    noise = jax.random.normal(step_key, batch.shape, batch.dtype)
    noisier = cleaner + per_row(potential.noise_scales) * noise
    negatives, info = _recover(chain_key, potential, times, noisier, sampler.kernel, num_steps)
    loss, metrics = energy_gap(
        lambda pair: potential.function(*pair),
        (times, cleaner),
        SamplerState((times, negatives), jnp.zeros(batch.shape[0], batch.dtype), sampler.kernel),
        info,
        paired=True,
    )
    return loss, (sampler, metrics)


def progressive_recovery(
    key: Key, potential: RecoveryPotential, sampler: SamplerState, num_steps: int
) -> tuple[SamplerState, Info]:
    """Sample the data's law from noise, level by level: ``x_{t+1} -> y_t -> x_t = y_t / sqrt(1 - s_t^2)``.

    Exact when every energy is that of its level's law, the chains of each conditional converge, and ``x_T`` is ``N(0, I)``.

    Args:
        key: Random key.
        potential: Energies at all levels.
        sampler: Its chains start at ``x_T``, draws of ``N(0, I)``; its kernel moves them as in
            :func:`diffusion_recovery_likelihood`.
        num_steps: Kernel steps at each level.

    Returns:
        The sampler with chains at ``x_0``, and an :class:`~ebm_ppl.types.Info` over all levels.

    Raises:
        TypeError: as :func:`diffusion_recovery_likelihood`.
        ValueError: ``num_steps < 1``, or the energy does not fit one event.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> potential = RecoveryPotential(lambda t, y: 0.1 * t * jnp.sum(y**2), (0.3, 0.6))
        >>> noise = jax.random.normal(jax.random.key(0), (4, 2))
        >>> sampler = ebm.init_sampler(noise, ebm.kernels.mala(step_size=0.5))
        >>> sampler, info = progressive_recovery(jax.random.key(1), potential, sampler, 3)
        >>> sampler.position.shape
        (4, 2)

    References:
        Gao, Song, Poole, Wu, Kingma (2021), arXiv:2012.08125, algorithm 2.
    """
    _check_players(potential, sampler, None)
    num_chains, num_levels = sampler.num_chains, potential.num_levels

    def body(position: Array, level: tuple[Array, Key]) -> tuple[Array, Info]:
        time, level_key = level
        times = jnp.full(num_chains, time)
        cleaner, info = _recover(level_key, potential, times, position, sampler.kernel, num_steps)
        return cleaner / jnp.asarray(potential.retentions, position.dtype)[time], info

    levels = jnp.arange(num_levels), jax.random.split(key, num_levels)
    position, infos = jax.lax.scan(body, sampler.position, levels, reverse=True)
    # Every level has an energy of its own; there is none before and after them all.
    infos = infos._replace(potential_before=None, potential_after=None)
    zero = jax.tree.map(lambda x: jnp.zeros_like(x[0]), infos)
    total, _ = jax.lax.scan(lambda total, info: (add_infos(total, info, num_levels), None), zero, infos)
    age = None if sampler.age is None else sampler.age + num_levels * num_steps
    return sampler._replace(position=position, age=age), total


@eqx.filter_jit
def _recover(
    key: Key, potential: RecoveryPotential, times: Array, noisier: Array, kernel: Kernel, num_steps: int
) -> tuple[Array, Info]:
    """Kernel steps in each row's own conditional, from ``y = x_{t+1}``: one chain per row."""

    def one(key: Key, time: Array, event: Array) -> tuple[Array, Info]:
        conditional = Recovered(potential, time, event)
        chain, info = advance(key, conditional, chains_at(jnp.zeros_like(event)[None], kernel), num_steps)
        return conditional.cleaner(chain.position[0]), jax.tree.map(lambda x: x[0], info)

    recovered, info = jax.vmap(one)(jax.random.split(key, noisier.shape[0]), times, noisier)
    return jax.lax.stop_gradient(recovered), info


def _check_players(potential: RecoveryPotential, sampler: SamplerState, batch: PyTree) -> Array:
    require_sampler(sampler)
    check_markov_kernel("sampler.kernel", sampler.kernel)
    if not isinstance(potential, RecoveryPotential):
        raise TypeError(
            f"potential: got {type(potential).__name__}, expected ebm_ppl.objectives.RecoveryPotential(function, "
            "noise_scales), with energies at all levels of noise."
        )
    rows = check_rows("sampler.position" if batch is None else "batch", sampler.position if batch is None else batch)
    check_potential(potential, jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype))
    return rows
