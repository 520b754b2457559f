"""Kernels made of kernels: a global and a local one in turn, a random choice among several, a fixed cycle.

The parts keep their own states only while they run. What one of them has computed about the chains' positions, the log
density and its gradient, is handed to the next one where that one needs nothing else; otherwise it starts afresh, at the
cost of one evaluation, which is counted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.base import SamplingAlgorithm
from jax.tree_util import Partial

from ebm_ppl.checks import as_floats, check_count, is_traced
from ebm_ppl.info import count_start, run_steps, step_info
from ebm_ppl.partials import function_behind
from ebm_ppl.types import (
    Array,
    AuxiliaryKernel,
    DiscreteKernel,
    FreshPopulation,
    Info,
    Kernel,
    Key,
    Potential,
    PyTree,
    WeightedPopulation,
)


def global_local(global_kernel: Kernel, local_kernel: Kernel, num_local: int) -> Kernel:
    """One step of a global kernel, then ``num_local`` steps of a local one.

    The global kernel jumps between modes and the local one explores them: independence or i-SIR moves with MALA.

    Args:
        global_kernel: Such as :func:`ebm_ppl.kernels.isir`.
        local_kernel: Such as :func:`ebm_ppl.kernels.mala`.
        num_local: Local steps per global step, ``>= 1``.

    Returns:
        A kernel that leaves invariant what both parts leave invariant. Its tunables are those of its parts, under their
        own names (``proposal``, ``step_size``) or, where both have one of that name, behind ``global_`` and ``local_``.
        Its acceptance rate is that of the parts with a step size, so that :func:`ebm_ppl.tune_step_size` tunes the local
        kernel; ``statistics`` holds ``global_acceptance_rate`` and ``local_acceptance_rate``, and the statistics of the
        parts behind the same prefixes. Counts are summed. A local kernel that uses gradients costs ``num_local + 1`` of
        them per step: one for the new positions after the global step.

    Raises:
        TypeError: a part is not a kernel, carries auxiliaries or weights; ``num_local`` is not a whole number.
        ValueError: ``num_local < 1``.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, ebm_ppl as ebm
        >>> kernel = global_local(ebm.kernels.independence(dist.Normal(0.0, 2.0)), ebm.kernels.mala(0.5), num_local=4)
        >>> sampler = ebm.init_sampler(jnp.zeros(8), kernel)
        >>> sampler, info = ebm.advance(jax.random.key(0), lambda x: 0.5 * x**2, sampler, 10)
        >>> int(info.num_gradients[0]), int(info.num_energies[0])  # 10 (4 + 1), and one for the start; 10 proposals
        (51, 10)
        >>> sorted(ebm.adaptation.tunables(sampler))
        ['proposal', 'step_size']

    References:
        Gabrie, Rotskoff, Vanden-Eijnden (2022), Adaptive Monte Carlo augmented with normalizing flows, arXiv:2105.12603;
        Grenioux, Moulines, Gabrie (2023), arXiv:2306.00684, algorithm 5.
    """
    _check_part("global_kernel", global_kernel)
    _check_part("local_kernel", local_kernel)
    num_local = check_count("num_local", num_local)
    parts, tunables = _gather({"global": global_kernel, "local": local_kernel}, (1, num_local))
    return Partial(_whole(_Cycle, _DiscreteCycle, parts), **tunables)


def cycle(*kernels: Kernel) -> Kernel:
    """One step of each kernel, in the given order.

    A cycle of reversible kernels leaves their target invariant without being reversible itself.

    Args:
        *kernels: At least one.

    Returns:
        A kernel that leaves invariant what all its parts do. Tunables, acceptance rate, counts and statistics are
        combined as in :func:`global_local`, with the prefixes ``kernel_0_``, ``kernel_1_`` and so on. MALA, HMC and other
        kernels that need no more than the gradient hand it on: their cycle costs no more than its parts.

    Raises:
        TypeError: a part is not a kernel, or carries auxiliaries or weights.
        ValueError: there are no parts.

    Example:
        >>> import ebm_ppl as ebm, jax.numpy as jnp
        >>> kernel = cycle(ebm.kernels.mala(step_size=0.1), ebm.kernels.hmc(step_size=0.2, num_integration_steps=5))
        >>> sorted(ebm.adaptation.tunables(ebm.init_sampler(jnp.zeros(4), kernel)))
        ['inverse_mass_matrix', 'kernel_0_step_size', 'kernel_1_step_size']

    References:
        Tierney (1994), Markov chains for exploring posterior distributions, Annals of Statistics 22, section 2.4.
    """
    parts, tunables = _gather(_numbered(kernels), (1,) * len(kernels))
    return Partial(_whole(_Cycle, _DiscreteCycle, parts), **tunables)


def mixture(kernels: Sequence[Kernel], probabilities: Sequence[float] | Array) -> Kernel:
    """At every step each chain chooses one of several kernels at random, whatever its state.

    All chains step together, so every kernel runs on every chain, and the choice decides which result is kept: a step
    costs, and counts, what all of them do. A :func:`cycle` wastes nothing; a mixture of reversible kernels is reversible.

    Args:
        kernels: At least one.
        probabilities: Their probabilities, ``(kernel,)``, non-negative with sum 1. A tunable.

    Returns:
        A kernel that leaves invariant what all its parts do. Tunables, acceptance rate and statistics are combined as in
        :func:`cycle`; the acceptance of a part is averaged over all chains, whether they chose it or not.

    Raises:
        TypeError: a part is not a kernel, or carries auxiliaries or weights.
        ValueError: there are no parts, or the probabilities do not fit them.

    Example:
        >>> import ebm_ppl as ebm
        >>> import numpyro.distributions as dist
        >>> kernel = mixture([ebm.kernels.independence(dist.Normal(0.0, 2.0)), ebm.kernels.mala(0.5)], [0.2, 0.8])

    References:
        Tierney (1994), Markov chains for exploring posterior distributions, Annals of Statistics 22, section 2.4.
    """
    parts, tunables = _gather(_numbered(kernels), (1,) * len(kernels))
    probabilities = _check_probabilities(probabilities, len(kernels))
    return Partial(_whole(_Mixture, _DiscreteMixture, parts), **tunables, probabilities=probabilities)


class Known(NamedTuple):
    """What is known of chains: their positions.

    Attributes:
        position: ``(chain, *event)``.
    """

    position: PyTree


class KnownDensity(NamedTuple):
    """Positions, and the log density ``-U`` there, ``(chain,)``."""

    position: PyTree
    logdensity: Array


class KnownGradient(NamedTuple):
    """Positions, the log density ``-U`` there, and its gradient, ``(chain, *event)``."""

    position: PyTree
    logdensity: Array
    logdensity_grad: PyTree


@dataclass(frozen=True)
class _Part:
    """The static half of one kernel among several; ``names`` pairs its own name of a tunable with the whole's."""

    label: str
    func: Callable[..., SamplingAlgorithm]
    num_steps: int
    names: tuple[tuple[str, str], ...]

    def algorithm(self, potential: Potential, tunables: dict[str, PyTree]) -> Any:
        return self.func(potential, **{own: tunables[name] for own, name in self.names})

    @property
    def has_step_size(self) -> bool:
        return any(own.endswith("step_size") for own, _ in self.names)


@dataclass(frozen=True)
class _Cycle:
    """Its state between steps is that of its last part."""

    parts: tuple[_Part, ...]

    @property
    def draws_afresh(self) -> bool:
        return _draw_afresh(self.parts)

    def __call__(self, potential: Potential, **tunables: PyTree) -> SamplingAlgorithm:
        algorithms = [part.algorithm(potential, tunables) for part in self.parts]

        def init(position: PyTree, rng_key: Key | None) -> Any:
            rng_key = _required(rng_key)
            _refuse_weights(algorithms, position, rng_key)
            return algorithms[-1].init(position, rng_key)

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            infos = []
            for part, algorithm, key in zip(
                self.parts, algorithms, jax.random.split(rng_key, len(self.parts)), strict=True
            ):
                state, info = _run(algorithm, key, state, part.num_steps)
                infos.append(info)
            return state, _combine(self.parts, infos)

        return SamplingAlgorithm(init, step)


@dataclass(frozen=True)
class _Mixture:
    """Its state is what all its parts know of the chains."""

    parts: tuple[_Part, ...]

    @property
    def draws_afresh(self) -> bool:
        return _draw_afresh(self.parts)

    def __call__(self, potential: Potential, *, probabilities: Array, **tunables: PyTree) -> SamplingAlgorithm:
        algorithms = [part.algorithm(potential, tunables) for part in self.parts]

        def init(position: PyTree, rng_key: Key | None) -> Any:
            rng_key = _required(rng_key)
            _refuse_weights(algorithms, position, rng_key)
            fields = [getattr(_struct(algorithm, position, rng_key), "_fields", ()) for algorithm in algorithms]
            kinds = (KnownGradient, KnownDensity, Known)
            kind = next(kind for kind in kinds if all(set(kind._fields) <= set(names) for names in fields))
            return _view(kind, algorithms[0].init(position, rng_key))

        def step(rng_key: Key, state: Any) -> tuple[Any, Info]:
            choice_key, *keys = jax.random.split(rng_key, len(self.parts) + 1)
            num_chains = jax.tree.leaves(state.position)[0].shape[0]
            choice = jax.random.categorical(choice_key, jnp.log(probabilities), shape=(num_chains,))
            after, infos = state, []
            for index, (algorithm, key) in enumerate(zip(algorithms, keys, strict=True)):
                own, info = _run(algorithm, key, state, 1)
                chosen = choice == index
                after = jax.tree.map(
                    lambda new, old, chosen=chosen: jnp.where(chosen.reshape(-1, *[1] * (old.ndim - 1)), new, old),
                    _view(type(state), own),
                    after,
                )
                infos.append(info._replace(is_divergent=info.is_divergent & chosen))
            return after, _combine(self.parts, infos)

        return SamplingAlgorithm(init, step)


@dataclass(frozen=True)
class _DiscreteCycle(_Cycle):
    def check_position(self, potential: Potential, position: PyTree) -> None:
        _check_positions(self.parts, potential, position)


@dataclass(frozen=True)
class _DiscreteMixture(_Mixture):
    def check_position(self, potential: Potential, position: PyTree) -> None:
        _check_positions(self.parts, potential, position)


def _draw_afresh(parts: Sequence[_Part]) -> bool:
    return any(isinstance(part.func, FreshPopulation) and part.func.draws_afresh for part in parts)


def _check_positions(parts: Sequence[_Part], potential: Potential, position: PyTree) -> None:
    for part in parts:
        if isinstance(part.func, DiscreteKernel):
            part.func.check_position(potential, position)


def _whole(kind: Any, discrete_kind: Any, parts: tuple[_Part, ...]) -> Any:
    is_discrete = [isinstance(part.func, DiscreteKernel) for part in parts]
    if any(is_discrete) and not all(is_discrete):
        raise TypeError("kernels: got discrete and continuous ones together, expected kernels of one kind of chain.")
    return discrete_kind(parts) if any(is_discrete) else kind(parts)


def _required(rng_key: Key | None) -> Key:
    if rng_key is None:
        raise TypeError("rng_key: got None, expected a random key; the parts may draw their first state.")
    return rng_key


def _run(algorithm: Any, key: Key, state: Any, num_steps: int) -> tuple[Any, Info]:
    """Steps of one part from what another one knows of the chains, its own start counted."""
    start_key, run_key = jax.random.split(key)
    state, is_fresh = _enter(algorithm, start_key, state)
    state, info = run_steps(algorithm.step, jax.random.split(run_key, num_steps), state)
    return state, count_start(info, is_fresh)


def _enter(algorithm: Any, key: Key, state: Any) -> tuple[Any, bool]:
    """A part's own state at the chains' positions, and whether it had to be computed."""
    wanted = _struct(algorithm, state.position, key)
    fields = getattr(wanted, "_fields", ("unknown",))
    if set(fields) <= set(KnownGradient._fields) and set(fields) <= set(state._fields):
        known = _view(type(wanted), state)
        if jax.tree.map(_signature, known) == jax.tree.map(_signature, wanted):
            return known, False
    return algorithm.init(state.position, key), True


def _struct(algorithm: Any, position: PyTree, key: Key) -> Any:
    return jax.eval_shape(algorithm.init, position, key)


def _signature(x: Any) -> tuple[tuple[int, ...], str]:
    return tuple(x.shape), str(x.dtype)


def _view(kind: Any, state: Any) -> Any:
    return kind(**{name: getattr(state, name) for name in kind._fields})


def _refuse_weights(algorithms: Sequence[Any], position: PyTree, key: Key) -> None:
    for algorithm in algorithms:
        if isinstance(_struct(algorithm, position, key), WeightedPopulation):
            raise TypeError(
                "kernels: got one whose chains have weights of their own, expected kernels of unweighted chains: the other "
                "parts would move the chains and leave the weights behind. Run it by itself."
            )


def _combine(parts: Sequence[_Part], infos: Sequence[Info]) -> Info:
    tuned = [info for part, info in zip(parts, infos, strict=True) if part.has_step_size]
    rate = jnp.nanmean(jnp.stack([info.acceptance_rate for info in tuned or infos]), axis=0)
    # One part without an accept step makes the whole a kernel that does not leave its target invariant.
    is_unadjusted = jnp.stack([jnp.isnan(info.acceptance_rate) for info in infos]).any(axis=0)
    statistics = {}
    for part, info in zip(parts, infos, strict=True):
        statistics[f"{part.label}_acceptance_rate"] = info.acceptance_rate
        statistics |= {f"{part.label}_{name}": value for name, value in info.statistics.items()}
    return step_info(
        infos[0].num_gradients.shape[0],
        acceptance_rate=jnp.where(is_unadjusted, jnp.nan, rate),
        is_divergent=jnp.stack([info.is_divergent for info in infos]).any(axis=0),
        num_gradients=sum(info.num_gradients for info in infos),
        num_energies=sum(info.num_energies for info in infos),
        num_nonfinite=sum(info.num_nonfinite for info in infos),
        **statistics,
    )


def _numbered(kernels: Sequence[Kernel]) -> dict[str, Kernel]:
    if not isinstance(kernels, Sequence) or not kernels:
        raise ValueError("kernels: got none, expected at least one kernel.")
    return {f"kernel_{index}": kernel for index, kernel in enumerate(kernels)}


def _gather(kernels: dict[str, Kernel], num_steps: Sequence[int]) -> tuple[tuple[_Part, ...], dict[str, PyTree]]:
    """The parts, and all their tunables in one dictionary."""
    for label, kernel in kernels.items():
        _check_part(label, kernel)
    owned = {label: dict(kernel.keywords) if isinstance(kernel, Partial) else {} for label, kernel in kernels.items()}
    count = Counter([*(name for own in owned.values() for name in own), "probabilities"])
    pairs = [(label, own) for label, names in owned.items() for own in names]
    outer = {(label, own): own if count[own] == 1 else f"{label}_{own}" for label, own in pairs}
    if len(set(outer.values())) < len(pairs):  # a prefixed name met one of a composition inside
        outer = {(label, own): f"{label}_{own}" for label, own in pairs}
    parts = tuple(
        _Part(label, function_behind(kernel), steps, tuple((own, outer[label, own]) for own in owned[label]))
        for (label, kernel), steps in zip(kernels.items(), num_steps, strict=True)
    )
    return parts, {outer[label, own]: owned[label][own] for label, own in pairs}


def _check_part(name: str, kernel: Any) -> None:
    if not callable(kernel):
        raise TypeError(f"{name}: got {type(kernel).__name__}, expected a kernel such as ebm.kernels.mala(0.1).")
    if isinstance(function_behind(kernel), AuxiliaryKernel):
        raise TypeError(
            f"{name}: got a kernel whose chains carry more than their positions, expected one whose state is its "
            "position: the other parts would move the positions alone. Run it by itself."
        )


def _check_probabilities(probabilities: Any, num_kernels: int) -> Array:
    array = as_floats("probabilities", probabilities)
    if array.shape != (num_kernels,):
        raise ValueError(f"probabilities: got shape {array.shape}, expected one for each of {num_kernels} kernels.")
    if not is_traced(array) and not (bool(jnp.all(array >= 0)) and abs(float(array.sum()) - 1.0) < 1e-5):
        raise ValueError(f"probabilities: got {probabilities}, expected non-negative numbers with sum 1.")
    return array
