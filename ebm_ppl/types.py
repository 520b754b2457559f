"""The shared vocabulary: what a potential, a kernel, a sampler state and an objective are.

Notation used throughout the package: ``U`` (or ``E``) is the energy of ONE event, dimensionless (kT = 1); a density is
``p(x) = base(x) exp(-U(x)) / Z``. Nothing in this module computes anything.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from blackjax.base import SamplingAlgorithm

Array = jax.Array
Key = jax.Array
"""A JAX random key (``jax.random.key``). Keys are arguments, never defaults and never stored inside an object."""

PyTree = Any
Event = PyTree
"""One sample, with no batch axis: an array of shape ``event_shape`` or a pytree of arrays."""

Scalar = jax.Array
"""A real floating array of shape ``()``."""

Potential = Callable[[Event], Scalar]
"""Energy of one event. Any callable pytree: an ``equinox.Module``, a ``jax.tree_util.Partial`` or a module-level
function. The library maps it over chains and rows itself; an energy that reduces over a batch is refused."""

Kernel = Callable[[Potential], SamplingAlgorithm]
"""From a potential to BlackJAX's ``(init, step)`` pair on a POPULATION of chains (leading ``chain`` axis).

A kernel is a ``jax.tree_util.Partial`` whose keywords are its tunables (step size, mass matrix, flow weights): they are
pytree leaves, so changing one never recompiles. Its states hold at least ``position``; its infos are :class:`Info`.
"""

Metrics = dict[str, Array]
"""Named scalars of one training step."""

Batch = PyTree
"""The positive phase: an array, or a pytree of arrays, with a leading row axis."""

VALUE_KINDS = frozenset({"exact", "estimate"})
"""The normaliser policies under which the ``log_prob`` of an EBM is a log density, up to the error they state; under the
others only its gradient, or its differences, mean something."""


class Info(NamedTuple):
    """What one step of a population kernel tells its diagnostics; :func:`ebm_ppl.info.step_info` makes one.

    Every field has shape ``(chain,)``. Over several steps rates and statistics are averaged, counts summed, and flags
    combined by "or".

    Attributes:
        acceptance_rate: Probability with which the proposal was accepted; NaN where the kernel has no accept step.
        is_divergent: Whether the step failed numerically (a trajectory left the stable region, or the state is not
            finite).
        num_gradients: Evaluations of the energy with its gradient spent by the step.
        num_energies: Evaluations of the energy alone, such as those of a pool of proposals.
        num_nonfinite: Proposals whose energy was NaN or infinite. They are rejected.
        has_moved: Whether the chain is elsewhere after the step. A frozen chain is told by this, not by its acceptance
            rate: a trajectory of step size zero is always accepted.
        statistics: What else the kernel has to say, by name: swap rates, effective sample sizes of a pool.
        potential_before: Energy at the start of a phase, which :func:`ebm_ppl.advance` reads off the kernel's states;
            ``None`` for a single step, and for kernels whose states hold no energy.
        potential_after: Energy at its end, under the same potential.
    """

    acceptance_rate: Array
    is_divergent: Array
    num_gradients: Array
    num_energies: Array
    num_nonfinite: Array
    has_moved: Array
    statistics: dict[str, Array]
    potential_before: Array | None = None
    potential_after: Array | None = None


class SamplerState(NamedTuple):
    """All of a sampler that survives a parameter update. It holds no cached energies, by construction.

    BlackJAX states cache the log density. The additive constant of an energy drifts in training, and a stale cache then
    freezes every chain (or accepts everything) without a symptom, so the state is rebuilt from positions at the start
    of every negative phase.

    Attributes:
        position: Chain positions, ``(chain, *event)``.
        log_weight: Log importance weights, ``(chain,)``; zeros for unweighted kernels.
        kernel: The kernel with its tunables.
        auxiliary: What else of each chain must survive, with a leading chain axis: the hot replicas of a ladder, the
            latents of a generator. ``None`` for most kernels; see :class:`AuxiliaryKernel`.
        age: Kernel steps since each chain started or was restarted, ``(chain,)``; ``None`` where nobody counts.
    """

    position: PyTree
    log_weight: Array
    kernel: Kernel
    auxiliary: PyTree = None
    age: Array | None = None

    @property
    def num_chains(self) -> int:
        """Length of the leading chain axis."""
        return self.log_weight.shape[0]


# The sampler is a SamplerState, or None for objectives that need no negatives; Any, because which of the two is the
# objective's own business and a function of SamplerState alone must be acceptable.
Objective = Callable[[Potential, Any, Batch, Key], tuple[Scalar, tuple[Any, Metrics]]]
"""A training objective: a plain function ``(potential, sampler, batch, key) -> (loss, (sampler, metrics))``.

The loss is differentiated with respect to the potential; negatives enter it as constants.
"""


@runtime_checkable
class Density(Protocol):
    """Anything with a normalised log density: a NumPyro or distrax distribution, or a flow."""

    def log_prob(self, value: Array, /) -> Array:
        """Log density of each row of events."""
        ...


@runtime_checkable
class AuxiliaryKernel(Protocol):
    """The function behind a kernel (``kernel.func``) whose chains carry more than a position between phases.

    Its population algorithm has ``init(position, rng_key, auxiliary)``, and its states an ``auxiliary``.
    """

    def start_auxiliary(self, position: PyTree, **tunables: Any) -> PyTree:
        """What chains that start at ``position`` carry, with a leading chain axis."""
        ...


@runtime_checkable
class CheckedTunables(Protocol):
    """The function behind a kernel (``kernel.func``) whose tunables are not free of each other."""

    def check_tunables(self, tunables: dict[str, Any]) -> None:
        """Refuse values that the kernel cannot run with.

        Raises:
            ValueError: with the name of the tunable.
        """
        ...


@runtime_checkable
class TemperedKernel(Protocol):
    """The function behind a kernel (``kernel.func``) that may sample ``exp(-U / T)`` at another temperature than one."""

    def temperature(self, **tunables: Any) -> Any:
        """``T``, given the kernel's tunables; ``None`` where these say nothing about one."""
        ...


@runtime_checkable
class PhaseKernel(Protocol):
    """The function behind a kernel (``kernel.func``) that runs a phase as a whole, for less than its steps one by one.

    Steps of unadjusted Langevin need gradients alone, and no energies.
    """

    def run_phase(
        self, key: Key, potential: Potential, position: PyTree, num_steps: int, /, **tunables: Any
    ) -> tuple[PyTree, Info]:
        """The same law as ``num_steps`` steps; the report has the energies before and after, and counts everything."""
        ...


@runtime_checkable
class WeightedPopulation(Protocol):
    """A kernel state whose chains have importance weights of their own."""

    log_weight: Array
    """``(chain,)``; they take the place of the weights that the sampler had before."""


@runtime_checkable
class HasReference(Protocol):
    """A potential that knows a distribution to start from, propose from or temper towards."""

    @property
    def reference(self) -> Any:
        """Normalised distribution of one event that can be sampled (NumPyro, distrax or a flow), or ``None``."""
        ...


@runtime_checkable
class HasSiteValues(Protocol):
    """A potential that says how its discrete events are coded."""

    @property
    def site_values(self) -> tuple[int, ...] | None:
        """What every site of an event may be, such as ``(-1, 1)`` or ``(0, 1)``; ``None`` if it does not know."""
        ...


@runtime_checkable
class SiteConditionals(Protocol):
    """A discrete potential that gives the law of one site under the others without evaluating the energy.

    Sites are numbered as in ``event.reshape(-1)``.
    """

    @property
    def site_values(self) -> tuple[int, ...]:
        """What every site of an event may be."""
        ...

    def colours(self) -> tuple[Any, ...]:
        """Classes of sites, arrays of their numbers, of which no two in one class interact.

        Raises:
            ValueError: there is no such colouring with few classes.
        """
        ...

    def conditional_logits(self, state: Array, site: Array, /) -> Array:
        """Log odds ``(num_values,)`` of the values of one site, up to a constant, given all the other sites."""
        ...


@runtime_checkable
class ColourConditionals(Protocol):
    """A discrete potential that gives the laws of all sites of a colour at once, which costs less than one by one.

    It has :class:`SiteConditionals` too, and ``colours`` are its classes.
    """

    def colour_logits(self, state: Array, colour: Any, /) -> Array:
        """Log odds ``(num_sites, num_values)`` of the values of the sites ``colour``, a concrete array of their numbers."""
        ...


@runtime_checkable
class BlockConditionals(Protocol):
    """A discrete potential of visible sites that are independent given hidden ones, and the other way round."""

    @property
    def site_values(self) -> tuple[int, ...]:
        """What every visible site may be."""
        ...

    def hidden_logits(self, visible: Array, /) -> Array:
        """Log odds ``(num_hidden, 2)`` of the hidden units, given the visible."""
        ...

    def visible_logits(self, hidden: Array, /) -> Array:
        """Log odds ``(num_visible, num_values)`` of the visible sites, given the hidden units in {0, 1}."""
        ...


@runtime_checkable
class HasOneHotEnergy(Protocol):
    """A discrete potential of labels, with an energy of indicator vectors that can be differentiated."""

    def one_hot_energy(self, indicators: Array, /) -> Scalar:
        """The energy of ``(*event, num_values)`` indicators, extended smoothly to all real arrays of that shape."""
        ...


@runtime_checkable
class DiscreteKernel(Protocol):
    """The function behind a kernel (``kernel.func``) that moves on finitely many values, integers among them."""

    def check_position(self, potential: Potential, position: PyTree, /) -> None:
        """Raise where the chains are not events of the potential in its coding; values only where they are concrete."""
        ...


@runtime_checkable
class ConfinedKernel(Protocol):
    """The function behind a kernel (``kernel.func``) whose chains live on a surface, such as the sphere."""

    def check_space(self, potential: Potential | None, position: PyTree, /) -> None:
        """Raise where the chains are elsewhere, as far as values are concrete, or the potential is of another space."""
        ...


@runtime_checkable
class PairedKernel(Protocol):
    """The function behind a kernel (``kernel.func``) that may give two chains, one in each half, noise of opposite sign."""

    @property
    def antithetic(self) -> bool:
        """Whether it does."""
        ...


@runtime_checkable
class ShortRunKernel(Protocol):
    """The function behind a kernel (``kernel.func``) that runs a fixed number of steps from a fixed start."""

    @property
    def num_steps(self) -> int:
        """``k``."""
        ...

    def start_positions(self, rng_key: Key, num_chains: int, /, **tunables: Any) -> PyTree:
        """Where runs start, ``(chain, *event)``."""
        ...

    def positions_at(
        self, rng_key: Key, potential: Potential, num_chains: int, times: tuple[int, ...], /, **tunables: Any
    ) -> PyTree:
        """Where runs are after each of the increasing numbers of steps, ``(time, chain, *event)``."""
        ...


@runtime_checkable
class WithSampler(Protocol):
    """A potential that is another one of the same energy, together with the kernel that it belongs to."""

    @property
    def plain(self) -> Potential:
        """That other one, for what asks a potential for its structure."""
        ...

    @property
    def sampler(self) -> Kernel:
        """The kernel."""
        ...


@runtime_checkable
class FreshPopulation(Protocol):
    """The function behind a kernel (``kernel.func``) whose step may draw its chains anew, whatever they were before.

    Where a method weights or anneals particles along their own moves, such a kernel would replace the particles and leave
    the weights behind.
    """

    @property
    def draws_afresh(self) -> bool:
        """Whether it does."""
        ...
