"""Generator-initialised chains: draws of a latent-variable generator, revised by a few local steps on the energy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_count, check_markov_kernel, check_positive
from ebm_ppl.info import count_start, run_steps, step_info
from ebm_ppl.kernels.scaled_langevin import langevin_info, langevin_temperature, langevin_tunables, run_langevin
from ebm_ppl.types import Array, Info, Kernel, Key, Potential, PyTree, WeightedPopulation


class GeneratorState(NamedTuple):
    """What a chain of :func:`generator` holds, each with a leading chain axis.

    Attributes:
        position: The revised events ``x_k``.
        auxiliary: ``{"latent": z, "initial": x_0}``, from which the revision started. It survives in
            ``SamplerState.auxiliary``; before the first step the latents are zero and ``x_0`` is the position.
    """

    position: PyTree
    auxiliary: dict[str, PyTree]


@runtime_checkable
class PriorOfLatents(Protocol):
    """A generator with a law of its own for its latents."""

    def sample_prior(self, key: Key, /) -> Array:
        """One latent, of the shape given to :func:`generator`."""
        ...


def generator(
    generator: Any,
    *,
    latent_shape: int | Sequence[int],
    num_steps: int,
    step_size: float | Array | None = None,
    noise_scale: float | Array | None = None,
    temperature: float | Array | None = None,
    max_gradient: float | Array | None = None,
    initial_scale: float | Array | None = None,
    local: Kernel | None = None,
) -> Kernel:
    """Generator-initialised Langevin: ``z ~ N(0, I)``, ``x_0 = g(z) (+ sigma e)``, then ``num_steps`` steps to ``x_k``.

    Every kernel step draws fresh latents, so the chains after it do not depend on where they were. The triple
    ``(z, x_0, x_k)`` is what cooperative and dual teaching learn from: ``sampler.auxiliary["latent"]``,
    ``sampler.auxiliary["initial"]`` and ``sampler.position``. A generator that is a :class:`PriorOfLatents` draws ``z``
    from its own prior.

    NOT INVARIANT for ``exp(-U)``: the chains follow the law of ``x_k``, which is that of the generator, moved towards the
    energy's by the local steps. The two agree when the generator matches the energy and the local kernel leaves it
    invariant, or when the local chain converges, and not otherwise.

    Args:
        generator: Any callable pytree from one latent to one event; a tunable of the kernel.
        latent_shape: Shape of one latent, or its length.
        num_steps: Local steps (k); with none, ``x_k = x_0`` and the chains are draws of the generator.
        step_size: Drift scale of the Langevin steps; see :func:`ebm_ppl.kernels.scaled_langevin.langevin`.
        noise_scale: Their noise; ``sqrt(2 step_size temperature)`` when ``None``.
        temperature: In the place of ``noise_scale``.
        max_gradient: Clip each component of the gradient.
        initial_scale: ``sigma > 0``, the standard deviation of Gaussian noise on ``x_0``; none when ``None``.
        local: A kernel in the place of the Langevin steps, such as ``mala(step_size=...)``, which is calibrated; a
            tunable of the kernel.

    Returns:
        A kernel whose report sums that of its local steps and adds the statistic ``revision_distance``,
        ``|x_k - x_0|``.

    Raises:
        TypeError: ``generator`` or ``local`` is not callable, ``generator`` has a prior and is no pytree, or chains of
            ``local`` carry more than a position, have weights, or are drawn anew.
        ValueError: a number is not finite and positive, neither or both of ``local`` and ``step_size`` are given, or
            the generator makes other events than the chains.

    Example:
        >>> import jax, jax.numpy as jnp, equinox as eqx, ebm_ppl as ebm
        >>> net = eqx.nn.Linear(3, 2, key=jax.random.key(0))
        >>> kernel = generator(net, latent_shape=3, step_size=0.05, num_steps=10)
        >>> sampler = ebm.init_sampler(jnp.zeros((8, 2)), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(1), lambda x: 0.5 * jnp.sum(x**2), sampler, 1)
        >>> sampler.auxiliary["latent"].shape, sampler.auxiliary["initial"].shape, sampler.position.shape
        ((8, 3), (8, 2), (8, 2))

    References:
        Xie, Lu, Gao, Zhu, Wu (2018), Cooperative training of descriptor and generator networks, arXiv:1609.09408; Cui,
        Han (2023), Learning energy-based model via dual-MCMC teaching, arXiv:2312.02469.
    """
    if not callable(generator):
        raise TypeError(f"generator: got {type(generator).__name__}, expected a callable from a latent to an event.")
    langevin_options = {
        "noise_scale": noise_scale,
        "temperature": temperature,
        "max_gradient": max_gradient,
    }
    sizes = tuple(latent_shape) if isinstance(latent_shape, Sequence) else (latent_shape,)
    num_steps = check_count("num_steps", num_steps, minimum=0)
    static = _Generator(tuple(check_count("latent_shape", size) for size in sizes), num_steps)
    if jax.tree.leaves(generator) == [generator]:
        # A leaf that is no array could not cross jit.
        if isinstance(generator, PriorOfLatents):
            raise TypeError(
                f"generator: got a {type(generator).__name__} with a prior of its own that is no pytree, expected one, "
                "such as an equinox.Module."
            )
        generator = Partial(generator)
    tunables: dict[str, Any] = {"generator": generator}
    if initial_scale is not None:
        tunables["initial_scale"] = check_positive("initial_scale", initial_scale)
    if local is not None:
        given = [name for name, value in {"step_size": step_size, **langevin_options}.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: got one together with local, expected it to be set in the local kernel.")
        return Partial(static, local=check_markov_kernel("local", local), **tunables)
    if step_size is None and not num_steps:
        return Partial(static, **tunables)
    if step_size is None:
        raise ValueError("step_size: got None without a local kernel, expected one of the two.")
    # The tunables of the Langevin steps are this kernel's own, so that they can be changed by name.
    return Partial(static, **langevin_tunables(step_size, **langevin_options), **tunables)


@dataclass(frozen=True)
class _Generator:
    """The static half of the kernel."""

    draws_afresh: ClassVar[bool] = True

    latent_shape: tuple[int, ...]
    num_steps: int

    def temperature(
        self, *, local: Kernel | None = None, generator: Any = None, initial_scale: Any = None, **tunables: Any
    ) -> Array | None:
        """The implied temperature of its own Langevin steps; a local kernel's is its own business."""
        return langevin_temperature(tunables) if local is None and "step_size" in tunables else None

    def start_auxiliary(self, position: PyTree, **tunables: Any) -> dict[str, PyTree]:
        """Chains that have not stepped yet have no latents; zeros hold their place."""
        leaf = jax.tree.leaves(position)[0]
        return {"latent": jnp.zeros((leaf.shape[0], *self.latent_shape), leaf.dtype), "initial": position}

    def __call__(
        self,
        potential: Potential,
        *,
        generator: Any,
        initial_scale: Array | None = None,
        local: Kernel | None = None,
        **langevin_tunables: Array,
    ) -> SamplingAlgorithm:
        def init(position: PyTree, rng_key: Key | None = None, auxiliary: Any = None) -> GeneratorState:
            return GeneratorState(position, self.start_auxiliary(position) if auxiliary is None else auxiliary)

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            latent_key, noise_key, init_key, run_key = jax.random.split(rng_key, 4)
            latent = _latents(latent_key, generator, state.auxiliary["latent"])
            initial = _initial(noise_key, generator, latent, initial_scale, state.position)
            position, info = self._revise(init_key, run_key, potential, initial, local, langevin_tunables)
            distance = _distance(initial, position)
            info = info._replace(statistics={**info.statistics, "revision_distance": distance})
            return GeneratorState(position, {"latent": latent, "initial": initial}), info

        return SamplingAlgorithm(init, step)

    def _revise(
        self,
        init_key: Key,
        run_key: Key,
        potential: Potential,
        initial: PyTree,
        local: Kernel | None,
        langevin_tunables: dict[str, Array],
    ) -> tuple[PyTree, Info]:
        """From ``x_0`` to ``x_k``."""
        if not self.num_steps:
            return initial, step_info(jax.tree.leaves(initial)[0].shape[0])
        if local is None:
            position = run_langevin(run_key, potential, initial, self.num_steps, langevin_tunables)
            return position, langevin_info(jax.vmap(potential)(position), position, self.num_steps)
        algorithm: Any = local(potential)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(run_key, jnp.arange(self.num_steps))
        start = algorithm.init(initial, init_key)
        if isinstance(start, WeightedPopulation):
            raise TypeError("local: got a kernel that gives weights to chains, expected one such as ebm.kernels.mala.")
        state, info = run_steps(algorithm.step, keys, start)
        return state.position, count_start(info)


def _latents(key: Key, generator: Any, old: Array) -> Array:
    """Fresh latents, of the generator's own prior where it has one."""
    if not isinstance(generator, PriorOfLatents):
        return jax.random.normal(key, old.shape, old.dtype)
    latent = jax.vmap(generator.sample_prior)(jax.random.split(key, old.shape[0]))
    if latent.shape != old.shape:
        raise ValueError(
            f"latent_shape: got {old.shape[1:]}, expected that of the generator's prior, {latent.shape[1:]}."
        )
    return latent.astype(old.dtype)


def _initial(key: Key, generator: Any, latent: Array, scale: Array | None, like: PyTree) -> PyTree:
    """``g(z)`` with its noise, in the shapes and dtypes of the chains."""
    initial = jax.vmap(generator)(latent)
    found, expected = (jax.tree.map(lambda x: tuple(x.shape[1:]), tree) for tree in (initial, like))
    if found != expected:
        raise ValueError(f"generator: made an event of shape {found}, expected that of the chains, {expected}.")
    initial = jax.tree.map(lambda new, old: new.astype(old.dtype), initial, like)
    if scale is None:
        return initial
    leaves, structure = jax.tree.flatten(initial)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + scale.astype(leaf.dtype) * jax.random.normal(k, leaf.shape, leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


def _distance(a: PyTree, b: PyTree) -> Array:
    """Euclidean distance between two populations, ``(chain,)``."""

    def squared(x: Array, y: Array) -> Array:
        return jnp.sum((x - y).reshape(x.shape[0], -1) ** 2, axis=1)

    return jnp.sqrt(jnp.stack(jax.tree.leaves(jax.tree.map(squared, a, b))).sum(axis=0)).astype(jnp.float32)
