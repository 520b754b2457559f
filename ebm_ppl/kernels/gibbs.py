"""Gibbs sampling of discrete events: site after site, colour after colour, or hidden and visible units in turn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.info import step_info
from ebm_ppl.kernels.discrete import (
    Sites,
    Values,
    check_chains,
    check_values,
    find_values,
    site_logits,
    sites_of,
)
from ebm_ppl.types import (
    Array,
    BlockConditionals,
    ColourConditionals,
    Info,
    Kernel,
    Key,
    Potential,
    PyTree,
    SiteConditionals,
)

Scan = Literal["sequential", "random", "chequerboard", "block"]

_SCANS = ("sequential", "random", "chequerboard", "block")


def gibbs(scan: Scan = "sequential", *, values: Sequence[int | float] | None = None) -> Kernel:
    """Gibbs sampling: each site is drawn from its law given all the others, ``p(x_i = v | rest) ∝ exp(-U(x_i = v))``.

    One step is one sweep, as many updates as there are sites:

    * ``"sequential"``: every site once, in order. Leaves the law invariant without being reversible.
    * ``"random"``: as many sites as there are, chosen at random with replacement. Reversible.
    * ``"chequerboard"``: all sites of one colour at once, then those of the other. For potentials that declare a colouring
      (``potentials.Ising`` and ``potentials.Potts``, but not on a periodic lattice with an axis of odd length).
    * ``"block"``: all hidden units given the visible, then all visible given the hidden. For ``potentials.RBM``.

    A potential that gives its conditionals (``ebm_ppl.types.SiteConditionals``) is asked for them, and a sweep then counts
    as one energy evaluation (two for ``"block"``), which is about what it costs. Any other one, such as an energy with a
    base (:func:`ebm_ppl.potentials.tilt`, an EBM) or a network, is evaluated at every value of every site: ``num_sites
    num_values`` evaluations. Values with a non-finite energy are never chosen, and are counted.

    Args:
        scan: The order of updates.
        values: What a site may be, such as ``(0, 1)`` or ``(-1, 1)``; needed where neither the potential nor the support
            of its base says so.

    Returns:
        A kernel that leaves ``exp(-U)`` invariant; its acceptance rate is 1. Positions are integers or floats.

    Raises:
        TypeError: ``values`` are not numbers.
        ValueError: an unknown ``scan``. When it runs: a scan that the potential has no structure for, or states that are
            not in the coding.

    Example:
        >>> import jax, jax.numpy as jnp, ebm_ppl as ebm
        >>> sampler = ebm.init_sampler(jnp.ones((8, 4, 4), jnp.int8), gibbs("chequerboard"))
        >>> ising = ebm.potentials.Ising((4, 4), coupling=0.3)
        >>> sampler, info = ebm.advance(jax.random.key(0), ising, sampler, 10)
        >>> sampler.position.shape, sampler.position.dtype, int(info.num_energies[0])
        ((8, 4, 4), dtype('int8'), 10)

    References:
        Geman, Geman (1984), Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images, IEEE PAMI
        6; Hinton (2002) for the blocks of an RBM.
    """
    if scan not in _SCANS:
        raise ValueError(f"scan: got {scan!r}, expected one of {list(_SCANS)}.")
    return Partial(_Gibbs(scan, check_values(values)))


class GibbsState(NamedTuple):
    """Chains ``(chain, *event)``; nothing else is carried from step to step."""

    position: Array


class _Sweep(NamedTuple):
    """One sweep, as a function of noise: that of all chains is drawn at once, which costs less than keys of their own.

    Attributes:
        draw_noise: ``(key, num_chains)`` to noise with a leading chain axis.
        run: ``(noise, flat)`` of one flattened event to ``(flat, how many values were not finite)``.
        num_energies: What it costs.
    """

    draw_noise: Callable[[Key, int], Any]
    run: Callable[[Any, Array], tuple[Array, Array]]
    num_energies: int


@dataclass(frozen=True)
class _Gibbs:
    """The static half of the kernel; a :class:`~ebm_ppl.types.DiscreteKernel`."""

    scan: Scan
    values: Values | None

    def check_position(self, potential: Potential, position: PyTree) -> None:
        """Raise where the chains are not in the coding, or the potential has no structure for the scan."""
        values = check_chains("gibbs", self.values, potential, position)
        self._sweep(potential, sites_of(values, position))

    def __call__(self, potential: Potential) -> SamplingAlgorithm:
        values = find_values("gibbs", self.values, potential)

        def init(position: PyTree, rng_key: Key | None = None) -> GibbsState:
            self.check_position(potential, position)
            return GibbsState(position)

        def step(rng_key: Key, state: GibbsState) -> tuple[GibbsState, Info]:
            position, num_chains = state.position, state.position.shape[0]
            sites = sites_of(values, position)
            sweep = self._sweep(potential, sites)
            flat = position.reshape(num_chains, -1)
            is_coded = jax.vmap(lambda event: sites.digits(event)[1])(flat)
            flat, num_nonfinite = jax.vmap(sweep.run)(sweep.draw_noise(rng_key, num_chains), flat)
            info = step_info(
                num_chains,
                acceptance_rate=1.0,
                is_divergent=~is_coded,
                num_energies=sweep.num_energies,
                num_nonfinite=num_nonfinite,
            )
            return GibbsState(flat.reshape(position.shape)), info

        return SamplingAlgorithm(init, step)  # pyright: ignore[reportArgumentType]

    def _sweep(self, potential: Potential, sites: Sites) -> _Sweep:
        if self.scan == "block":
            return _block_sweep(potential, sites)
        if self.scan == "chequerboard":
            return _coloured_sweep(potential, sites)
        return _site_sweep(potential, sites, is_random=self.scan == "random")


def _draw_noise(key: Key, shape: tuple[int, ...], num_values: int, dtype: Any) -> Array:
    """What :func:`_draw` needs for sites ``shape``: of two values one uniform number, of more Gumbel noise ``(value,)``."""
    if num_values > 2:
        return jax.random.gumbel(key, (*shape, num_values), dtype)
    # JAX draws a multiple of eps in [0, 1). In the middle of its interval it has no bias, and is never 0, which is below
    # every probability however small.
    return jax.random.uniform(key, shape, dtype) + 0.5 * jnp.finfo(dtype).eps


def _draw(noise: Array, logits: Array, values: Array) -> Array:
    """Values drawn from logits ``(..., value)``, of those that are finite."""
    is_finite = jnp.isfinite(logits)
    if values.shape[0] > 2:
        return values[jnp.argmax(jnp.where(is_finite, logits, -jnp.inf) + noise, axis=-1)]
    first, second = is_finite[..., 0], is_finite[..., 1]
    probability = jnp.where(first & second, jax.nn.sigmoid(logits[..., 1] - logits[..., 0]), second)
    return jnp.where(noise < probability, values[1], values[0])


def _choose(noise: Array, logits: Array, current: Array, sites: Sites) -> tuple[Array, Array]:
    """Values drawn from logits ``(..., value)``; the current ones where no value has a finite energy."""
    is_finite = jnp.isfinite(logits)
    return jnp.where(is_finite.any(axis=-1), _draw(noise, logits, sites.values), current), jnp.sum(~is_finite)


def _site_sweep(potential: Potential, sites: Sites, *, is_random: bool) -> _Sweep:
    num_values, num_sites = sites.values.shape[0], math.prod(sites.event_shape)
    is_structured = isinstance(potential, SiteConditionals)

    def draw_noise(key: Key, num_chains: int) -> tuple[Array, Array | None]:
        noise_key, site_key = jax.random.split(key)
        shape = num_chains, num_sites
        order = jax.random.randint(site_key, shape, 0, num_sites) if is_random else None
        return _draw_noise(noise_key, shape, num_values, sites.dtype), order

    def update(flat: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        site, noise = inputs
        logits = site_logits(potential, sites, flat, site)
        value, num_nonfinite = _choose(noise, logits, flat[site], sites)
        return flat.at[site].set(value), num_nonfinite

    def run(noise: tuple[Array, Array | None], flat: Array) -> tuple[Array, Array]:
        of_sites, order = noise
        flat, num_nonfinite = jax.lax.scan(update, flat, (jnp.arange(num_sites) if order is None else order, of_sites))
        return flat, num_nonfinite.sum()

    return _Sweep(draw_noise, run, 1 if is_structured else num_sites * num_values)


def _coloured_sweep(potential: Potential, sites: Sites) -> _Sweep:
    if not isinstance(potential, SiteConditionals):
        raise ValueError(
            f"scan: got 'chequerboard' with {type(potential).__name__}, expected a potential that declares which sites do "
            "not interact, such as potentials.Ising. An energy with a base does not; use 'sequential' or 'random'."
        )
    colours, logits_of = potential.colours(), _logits_of_colours(potential)

    def draw_noise(key: Key, num_chains: int) -> list[Array]:
        keys = jax.random.split(key, len(colours))
        return [
            _draw_noise(colour_key, (num_chains, len(colour)), sites.values.shape[0], sites.dtype)
            for colour_key, colour in zip(keys, colours, strict=True)
        ]

    def run(noise: list[Array], flat: Array) -> tuple[Array, Array]:
        num_nonfinite = jnp.zeros((), jnp.int32)
        for colour, own_noise in zip(colours, noise, strict=True):
            logits = logits_of(flat.reshape(sites.event_shape), colour).astype(sites.dtype)
            chosen, bad = _choose(own_noise, logits, flat[colour], sites)
            flat, num_nonfinite = flat.at[colour].set(chosen), num_nonfinite + bad
        return flat, num_nonfinite

    return _Sweep(draw_noise, run, 1)


def _logits_of_colours(potential: SiteConditionals) -> Callable[[Array, Any], Array]:
    """Logits ``(site, value)`` of a colour, at once where the potential gives them so."""
    if isinstance(potential, ColourConditionals):
        return potential.colour_logits
    conditional_logits = potential.conditional_logits
    return lambda event, colour: jax.vmap(conditional_logits, in_axes=(None, 0))(event, jnp.asarray(colour))


def _block_sweep(potential: Potential, sites: Sites) -> _Sweep:
    if not isinstance(potential, BlockConditionals):
        raise ValueError(
            f"scan: got 'block' with {type(potential).__name__}, expected a potential with hidden units, "
            "potentials.RBM. An energy with a base has none; use 'sequential' or 'random'."
        )
    hidden_logits, visible_logits = potential.hidden_logits, potential.visible_logits
    num_visible, num_values = math.prod(sites.event_shape), sites.values.shape[0]

    def draw_noise(key: Key, num_chains: int) -> tuple[Array, Array]:
        hidden_key, visible_key = jax.random.split(key)
        hidden = jax.eval_shape(hidden_logits, jax.ShapeDtypeStruct(sites.event_shape, sites.values.dtype))
        return (
            _draw_noise(hidden_key, (num_chains, hidden.shape[0]), 2, sites.dtype),
            _draw_noise(visible_key, (num_chains, num_visible), num_values, sites.dtype),
        )

    def run(noise: tuple[Array, Array], flat: Array) -> tuple[Array, Array]:
        hidden_noise, visible_noise = noise
        hidden = _draw(hidden_noise, hidden_logits(flat.reshape(sites.event_shape)), jnp.arange(2))
        return _choose(visible_noise, visible_logits(hidden).astype(sites.dtype), flat, sites)

    return _Sweep(draw_noise, run, 2)
