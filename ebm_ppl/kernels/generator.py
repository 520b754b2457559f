"""Generator-initialised chains: draws of a latent-variable generator, revised by a few local steps on the energy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import check_count, check_positive
from ebm_ppl.info import count_start, run_steps
from ebm_ppl.kernels.scaled_langevin import langevin, langevin_temperature
from ebm_ppl.partials import function_behind
from ebm_ppl.types import Array, AuxiliaryKernel, Info, Kernel, Key, Potential, PyTree


class GeneratorState(NamedTuple):
    """What a chain of :func:`generator` holds, each with a leading chain axis.

    Attributes:
        position: The revised events ``x_k``.
        auxiliary: ``{"latent": z, "initial": x_0}``, from which the revision started. It survives in
            ``SamplerState.auxiliary``; before the first step the latents are zero and ``x_0`` is the position.
    """

    position: PyTree
    auxiliary: dict[str, PyTree]


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
    ``sampler.auxiliary["initial"]`` and ``sampler.position``.

    NOT INVARIANT for ``exp(-U)``: the chains follow the law of ``x_k``, which is that of the generator, moved towards the
    energy's by the local steps. The two agree when the generator matches the energy and the local kernel leaves it
    invariant, or when the local chain converges, and not otherwise.

    Args:
        generator: Any callable pytree from one latent to one event; a tunable of the kernel.
        latent_shape: Shape of one latent, or its length.
        num_steps: Local steps (k).
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
        TypeError: ``generator`` or ``local`` is not callable, or chains of ``local`` carry more than a position.
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
    static = _Generator(tuple(check_count("latent_shape", size) for size in sizes), check_count("num_steps", num_steps))
    if jax.tree.leaves(generator) == [generator]:
        generator = Partial(generator)  # a plain function: a leaf that is no array could not cross jit
    tunables: dict[str, Any] = {"generator": generator}
    if initial_scale is not None:
        tunables["initial_scale"] = check_positive("initial_scale", initial_scale)
    if local is not None:
        given = [name for name, value in {"step_size": step_size, **langevin_options}.items() if value is not None]
        if given:
            raise ValueError(f"{given[0]}: got one together with local, expected it to be set in the local kernel.")
        return Partial(static, local=_check_local(local), **tunables)
    if step_size is None:
        raise ValueError("step_size: got None without a local kernel, expected one of the two.")
    # The tunables of the Langevin steps are this kernel's own, so that they can be changed by name.
    return Partial(static, **langevin(step_size, **langevin_options).keywords, **tunables)


def _check_local(local: Kernel) -> Kernel:
    func = function_behind(local)
    if not callable(func):
        raise TypeError(
            f"local: got {type(local).__name__}, expected a kernel such as ebm.kernels.mala(step_size=0.1)."
        )
    if isinstance(func, AuxiliaryKernel):
        raise TypeError("local: its chains carry more than a position, expected a kernel whose chains do not.")
    return local


@dataclass(frozen=True)
class _Generator:
    """The static half of the kernel."""

    draws_afresh: ClassVar[bool] = True

    latent_shape: tuple[int, ...]
    num_steps: int

    def temperature(self, *, local: Kernel | None = None, **tunables: Any) -> Array | None:
        """The implied temperature of its own Langevin steps; a local kernel's is its own business."""
        return None if local is not None else langevin_temperature(tunables)

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
        kernel = langevin(**langevin_tunables) if local is None else local
        algorithm: Any = kernel(potential)

        def init(position: PyTree, rng_key: Key | None = None, auxiliary: Any = None) -> GeneratorState:
            return GeneratorState(position, self.start_auxiliary(position) if auxiliary is None else auxiliary)

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            latent_key, noise_key, init_key, run_key = jax.random.split(rng_key, 4)
            old = state.auxiliary["latent"]
            latent = jax.random.normal(latent_key, old.shape, old.dtype)
            initial = _initial(noise_key, generator, latent, initial_scale, state.position)
            state = algorithm.init(initial, init_key)
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(run_key, jnp.arange(self.num_steps))
            state, info = run_steps(algorithm.step, keys, state)
            # A local kernel that caches the energy evaluates it once more, at its start; Langevin steps cache nothing.
            info = count_start(info, local is not None)
            distance = _distance(initial, state.position)
            info = info._replace(statistics={**info.statistics, "revision_distance": distance})
            return GeneratorState(state.position, {"latent": latent, "initial": initial}), info

        return SamplingAlgorithm(init, step)


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
