"""An energy-based model as a NumPyro distribution: ``p(x) = base(x) exp(-U(x)) / Z``.

The object refuses to give a normalised log density until log Z is accounted for. A dropped log Z makes every run look
healthy and be wrong, so silence is not an option; :mod:`ebm_ppl.handlers` applies a policy that makes it right.
"""

import copy
import functools
import math
from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.tree_util import Partial
from jax.typing import ArrayLike
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over

from ebm_ppl.checks import check_potential
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.named_fields import named, unnamed
from ebm_ppl.potentials.short_run import find_short_runs, not_a_density
from ebm_ppl.rows import RowPotential
from ebm_ppl.supports import movable
from ebm_ppl.types import VALUE_KINDS as VALUE_KINDS
from ebm_ppl.types import Array, Event, Key, PyTree, Scalar

Simulator = Callable[[Key, Any, int], PyTree]
"""Simulation of one row of an EBM: ``(key, potential, num_samples) -> (num_samples, *event)``, independent draws (each from
its own chain). The potential it receives is a :class:`~ebm_ppl.rows.RowPotential`: it includes the base."""


@runtime_checkable
class ReportingSimulator(Protocol):
    """A simulator that says how its simulation went."""

    def __call__(self, key: Key, potential: Any, num_samples: int, /) -> Array:
        """Draws only."""
        ...

    def simulate(self, key: Key, potential: Any, num_samples: int, /) -> tuple[Array, dict[str, Array]]:
        """Draws ``(num_samples, *event)`` and diagnostics, each ``(num_samples,)``."""
        ...

    def report(self, diagnostics: dict[str, Array], /) -> None:
        """Receive the diagnostics of all draws of one call of ``EBM.sample``, ``sample_shape + batch_shape`` each."""
        ...


class _Static:
    """The non-array half of the callables, made hashable so that it can be pytree auxiliary data under ``jit``."""

    def __init__(self, value: PyTree):
        self.value = value
        leaves, structure = jax.tree.flatten(value)
        self._identity: tuple[Hashable, Any] = (tuple(leaves), structure)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


class EBM(dist.Distribution):
    """An energy-based model ``p(x) = base(x) exp(-U(x)) / Z`` for ``numpyro.sample``.

    ``log Z = log E_base[exp(-U)]`` for a normalised base, and the integral of ``exp(-U)`` for an ``ImproperUniform`` one.

    Args:
        potential: Energy ``U`` of ONE event (dimensionless), any callable pytree; ``potential(event, condition)`` when
            ``condition`` is given. The library maps it over rows.
        base: Reference distribution: a normalised NumPyro distribution, or
            ``dist.ImproperUniform(support, (), event_shape)`` for an energy that carries the whole density.
        condition: One condition per row, arrays with a leading row axis; the EBM then has ``batch_shape == (row,)`` and
            one normaliser per row.
        log_normalizer: ``log Z`` where it is known, broadcastable to ``batch_shape``: a number, or a result of
            :mod:`ebm_ppl.normalizer`, which brings its error along. Usually left ``None`` and supplied by a handler such
            as :func:`ebm_ppl.handlers.constant_normalizer`.
        sampler: A :data:`Simulator` for ``sample``; without one ``sample`` raises ``NotImplementedError``.

    Raises:
        TypeError: the energy is not a real floating one, has 64-bit parameters in a 32-bit session, or ``base`` is not a
            NumPyro distribution.
        ValueError: the energy is not a scalar for one event of ``base.event_shape``, the shapes of ``condition`` or
            ``log_normalizer`` do not fit, ``base`` is an EBM with unknown log Z, or ``log_normalizer`` is given for the
            energy of a short run (:class:`ebm_ppl.potentials.ShortRun`), which is not a density.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> ebm = EBM(lambda x: 0.5 * jnp.sum(x**2), dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> ebm.unnormalized_log_prob(jnp.zeros((10, 3))).shape
        (10,)
        >>> ebm.log_prob(jnp.zeros((10, 3)))
        Traceback (most recent call last):
        ...
        ebm_ppl.errors.UnknownNormalizerError: EBM.log_prob needs log Z...

    References:
        LeCun, Chopra, Hadsell, Ranzato, Huang (2006), A tutorial on energy-based learning.
    """

    arg_constraints = {}
    pytree_data_fields = (
        "_parameters",
        "base",
        "condition",
        "log_normalizer",
        "log_normalizer_error",
        "log_normalizer_reliable",
    )
    pytree_aux_fields = ("_structure", "_shapes", "normalizer_kind")
    has_enumerate_support = False

    def __init__(
        self,
        potential: Callable[..., Scalar],
        base: dist.Distribution,
        *,
        condition: PyTree | None = None,
        log_normalizer: Any = None,
        sampler: Simulator | None = None,
        validate_args: bool | None = None,
    ):
        if not isinstance(base, dist.Distribution):
            raise TypeError(f"base: got {type(base).__name__}, expected a numpyro distribution.")
        if any(ebm.log_normalizer is None for ebm in find_ebms(base)):
            raise ValueError(
                "base: got an EBM whose log Z is unknown, expected a normalised distribution. Add the two energies with "
                "ebm_ppl.potentials.add."
            )
        if type(potential) is functools.partial:
            # What flax_module returns. As a Partial its arrays are leaves, and cross jit and vmap.
            potential = Partial(potential.func, *potential.args, **potential.keywords)
        base = jax.tree.map(_in_session_precision, base)
        batch_shape, one_condition = base.batch_shape, ()
        if condition is not None:
            condition = jax.tree.map(lambda leaf: _as_real("condition", leaf), condition)
            batch_shape = _rows_of(condition, batch_shape)
            one_condition = (jax.tree.map(lambda c: c[0], condition),)
        event = jax.ShapeDtypeStruct(base.event_shape, _event_dtype(base))
        check_potential(potential, event, arguments=one_condition)
        # A Distribution crosses jit as a pytree whose leaves must be arrays, while modules also hold functions.
        self._parameters, structure = eqx.partition((potential, sampler), eqx.is_array)
        self._structure = _Static(structure)
        self._shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves((self._parameters, condition)))
        self.base = base
        self.condition = condition
        super().__init__(batch_shape, base.event_shape, validate_args=validate_args)
        self.log_normalizer, self.log_normalizer_error, self.log_normalizer_reliable = None, None, None
        self.normalizer_kind = None
        if log_normalizer is not None:
            self._set_normalizer(log_normalizer, "exact")

    def _set_normalizer(self, log_normalizer: Any, kind: str) -> None:
        if kind in VALUE_KINDS and (runs := find_short_runs(self.potential)):
            raise ValueError(
                "log_normalizer: got one for the energy of a short run, expected None: "
                f"{not_a_density(runs[0].num_steps)}. Where nothing changes after its last step, pass potential.plain."
            )
        value = _as_real("log_normalizer", getattr(log_normalizer, "value", log_normalizer))
        error = jnp.asarray(getattr(log_normalizer, "standard_error", 0.0))
        try:
            fits = jnp.broadcast_shapes(value.shape, self.batch_shape) == self.batch_shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"log_normalizer: got shape {value.shape}, expected one that broadcasts to the batch shape "
                f"{self.batch_shape}."
            )
        self.log_normalizer, self.log_normalizer_error, self.normalizer_kind = value, error, kind
        # A number that somebody wrote down is theirs to vouch for.
        self.log_normalizer_reliable = jnp.asarray(getattr(log_normalizer, "reliable", True))

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Named children in one order, whatever ``PYTHONHASHSEED`` is."""
        children = {name: self.__dict__.get(name) for name in EBM.pytree_data_fields}
        static = (self._structure, self._shapes, self.normalizer_kind)
        shapes = (self._batch_shape, self._event_shape, self.__dict__.get("_validate_args"))
        return ({name: named(value) for name, value in children.items()},), (static, shapes)

    @classmethod
    def tree_unflatten(cls, aux_data: tuple, params: tuple) -> "EBM":
        """Rebuild without checks: the children may be masks, axes or placeholders."""
        (structure, recorded, kind), (batch_shape, event_shape, validate_args) = aux_data
        new = cls.__new__(cls)
        for name, value in params[0].items():
            setattr(new, name, unnamed(value))
        new._structure, new._shapes, new.normalizer_kind = structure, recorded, kind
        new._batch_shape, new._event_shape = batch_shape, event_shape
        if validate_args is not None:
            new._validate_args = validate_args
        return new

    @property
    def potential(self) -> Callable[..., Scalar]:
        """The energy ``U`` of one event."""
        return eqx.combine(self._parameters, self._structure.value)[0]

    @property
    def sampler(self) -> Simulator | None:
        """The simulator behind ``sample``."""
        return eqx.combine(self._parameters, self._structure.value)[1]

    @property
    def support(self) -> Any:  # NumPyro declares a class attribute; its constraints have no common type
        """Support of the base; it drives NumPyro's transforms. Circle and sphere get transforms that chains can use."""
        return movable(self.base.support)

    @property
    def transform(self) -> Any:
        """NumPyro's transform from unconstrained space onto the support.

        Raises:
            TypeError: the support is discrete, or NumPyro has no transform for it.
        """
        try:
            return biject_to(self.support)
        except NotImplementedError as error:
            if self.support.is_discrete:
                raise TypeError(
                    f"EBM: got the discrete support {self.support}, on which gradient kernels (MALA, HMC, NUTS) cannot "
                    "move. Where its states can be enumerated use ebm_ppl.handlers.exact_normalizer; otherwise a discrete "
                    "kernel such as Gibbs or Gibbs-with-gradients, or attach one as EBM(..., sampler=...)."
                ) from error
            raise TypeError(
                f"EBM: got the support {self.support}, for which NumPyro has no transform from unconstrained space."
            ) from error

    @property
    def has_rsample(self) -> bool:
        """Always false: NumPyro would infer true from the empty constraints, and differentiate through a sampler."""
        return False

    def unnormalized_log_prob(self, value: ArrayLike) -> Array:
        """``log base(x) - U(x)``, shape ``sample_shape + batch_shape``; minus infinity outside the support.

        Raises:
            TypeError: ``value`` is not real numbers.
            ValueError: ``value`` does not end in the event shape, or its rows do not match the batch shape.
        """
        self._require_shown_rows()
        value = _as_real("value", value)
        value = jnp.broadcast_to(value, self._check_value(value) + self.event_shape)
        if not value.size:
            return jnp.zeros(value.shape[: value.ndim - self.event_dim])
        inside, safe = self.inside(value)
        log_prob = self.base.log_prob(safe) - self.energy(safe)
        return jnp.where(inside, log_prob, -jnp.inf)

    def _require_shown_rows(self) -> None:
        """An EBM that was built under ``vmap`` has rows that its batch shape does not show."""
        leaves = jax.tree.leaves((self._parameters, self.condition))
        if any(jnp.ndim(leaf) > len(shape) for leaf, shape in zip(leaves, self._shapes, strict=True)):
            raise ValueError(
                f"EBM: got parameters with rows that the batch shape {self.batch_shape} does not show, as from jax.vmap, "
                "expected promote_batch_shape(ebm) (from numpyro.distributions.batch_util)."
            )

    def inside(self, value: Array) -> tuple[Array, Array]:
        """Which events lie in the support, and the events with the others replaced by feasible ones."""
        lead = value.shape[: value.ndim - self.event_dim]
        inside = jnp.broadcast_to(self.support(value), lead)
        # An energy may be NaN outside its support, and 0 * NaN would leak into gradients: evaluate elsewhere.
        mask = inside.reshape(lead + (1,) * self.event_dim)
        return inside, jnp.where(mask, value, self.support.feasible_like(value))

    def _check_value(self, value: Array) -> tuple[int, ...]:
        split = value.ndim - self.event_dim
        if split < 0 or value.shape[split:] != self.event_shape:
            raise ValueError(
                f"value: got shape {value.shape}, expected one that ends in the event shape {self.event_shape}."
            )
        try:
            return jnp.broadcast_shapes(value.shape[:split], self.batch_shape)
        except ValueError as error:
            raise ValueError(
                f"value: got rows {value.shape[:split]}, expected rows that broadcast with the batch shape "
                f"{self.batch_shape}."
            ) from error

    def energy(self, value: ArrayLike) -> Array:
        """``U(x)``, the base not included: shape ``sample_shape + batch_shape``.

        Raises:
            TypeError: see :meth:`unnormalized_log_prob`.
            ValueError: see there.
        """
        self._require_shown_rows()
        value = _as_real("value", value)
        lead = self._check_value(value)
        value = jnp.broadcast_to(value, lead + self.event_shape)
        flat = value.reshape(-1, *self.event_shape)
        if self.condition is None:
            return jax.vmap(self.potential)(flat).reshape(lead)
        condition = jax.tree.map(
            lambda c: jnp.broadcast_to(c, lead + c.shape[1:]).reshape(-1, *c.shape[1:]), self.condition
        )
        return jax.vmap(self.potential)(flat, condition).reshape(lead)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:
        """``log base(x) - U(x) - log Z``.

        Raises:
            UnknownNormalizerError: no policy has accounted for log Z.
            TypeError: see :meth:`unnormalized_log_prob`.
            ValueError: see there.
        """
        if self.log_normalizer is None:
            raise UnknownNormalizerError(
                "EBM.log_prob needs log Z, which nobody has accounted for. Where the parameters of the energy are fixed, "
                "wrap the model in ebm_ppl.handlers.constant_normalizer(model); where log Z is known, pass "
                "log_normalizer=..., and where it can be summed or integrated, wrap in exact_normalizer(model); to train "
                "the energy, use ebm_ppl.fit, or negative_phase(model) with NumPyro's SVI; for a posterior over its "
                "parameters, ebm_ppl.infer.Exchange. check_model(model) says which applies. unnormalized_log_prob always "
                "works."
            )
        return self.unnormalized_log_prob(value) - self.log_normalizer

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws ``sample_shape + batch_shape + event_shape`` from the attached sampler, all independent of each other.

        Raises:
            NotImplementedError: no sampler is attached. (NumPyro's initialisation relies on exactly this type.)
        """
        sampler = self.sampler
        if sampler is None or key is None:
            raise NotImplementedError(
                "EBM.sample: no sampler attached. Wrap the model in ebm_ppl.handlers.simulate(model, kernel=...), or pass "
                "EBM(..., sampler=function) with a function (key, potential, num_samples) -> samples."
            )
        self._require_shown_rows()
        # Chains need the energy only; without the sampler in it, equal energies share their compiled programs.
        target, num_samples = self.with_sampler(None), math.prod(sample_shape)
        reporting = sampler if isinstance(sampler, ReportingSimulator) else None

        def simulate_row(key: Key, row: Array) -> tuple[Array, dict[str, Array]]:
            if reporting is None:
                return sampler(key, RowPotential(target, row), num_samples), {}
            return reporting.simulate(key, RowPotential(target, row), num_samples)

        if self.batch_shape:
            num_rows = math.prod(self.batch_shape)
            keys = jax.random.split(key, num_rows)
            drawn, diagnostics = jax.vmap(simulate_row, out_axes=1)(keys, jnp.arange(num_rows))
        else:
            drawn, diagnostics = simulate_row(key, jnp.zeros((), int))
        lead = sample_shape + self.batch_shape
        if reporting is not None:
            reporting.report({name: value.reshape(lead) for name, value in diagnostics.items()})
        return jax.lax.stop_gradient(drawn).reshape(lead + self.event_shape)

    def with_normalizer(self, log_normalizer: Any, kind: str) -> "EBM":
        """The same EBM under a normaliser policy.

        Args:
            log_normalizer: As for the constructor.
            kind: The policy: ``"exact"``, ``"constant"``, ``"gradient"``, ``"estimate"`` or ``"surrogate"``.
        """
        new = copy.copy(self)
        new._set_normalizer(log_normalizer, kind)
        return new

    def with_sampler(self, sampler: Simulator | None) -> "EBM":
        """The same EBM with another simulator attached."""
        new = copy.copy(self)
        new._parameters, structure = eqx.partition((self.potential, sampler), eqx.is_array)
        new._structure = _Static(structure)
        new._shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves((new._parameters, new.condition)))
        return new

    def __repr__(self) -> str:
        potential = self.potential
        name = getattr(potential, "__name__", type(potential).__name__)
        kind = "unknown" if self.normalizer_kind is None else self.normalizer_kind
        return (
            f"EBM(potential={name}, base={type(self.base).__name__}, batch_shape={self.batch_shape}, "
            f"event_shape={self.event_shape}, log Z {kind} with respect to {_reference_measure(self.base)})"
        )


def _as_real(name: str, value: Any) -> Array:
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {type(value).__name__}, expected real numbers.") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected real numbers.")
    return array


def _in_session_precision(leaf: Any) -> Any:
    """NumPyro broadcasts Python numbers to 64-bit NumPy arrays, which nobody wrote."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype == np.float64 else leaf


def _rows_of(condition: PyTree, batch_shape: tuple[int, ...]) -> tuple[int, ...]:
    rows = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(condition)}
    if len(rows) != 1 or not rows.isdisjoint({(), (0,)}):
        raise ValueError(f"condition: got leading axes {sorted(rows)}, expected one row axis shared by all its arrays.")
    (row_shape,) = rows
    try:
        return jnp.broadcast_shapes(batch_shape, row_shape)
    except ValueError as error:
        raise ValueError(
            f"condition: got {row_shape[0]} rows, expected a number that broadcasts with the batch shape {batch_shape} "
            "of the base."
        ) from error


def _event_dtype(base: dist.Distribution) -> Any:
    # is_discrete is undefined for some wrappers' supports only when they are dependent; those are continuous here.
    return jnp.result_type(int) if base.is_discrete else jnp.result_type(float)


def _reference_measure(base: Any) -> str:
    while isinstance(base, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
        base = base.base_dist
    if not isinstance(base, dist.ImproperUniform):
        return f"the base {type(base).__name__}"
    if base.is_discrete:
        return "the counting measure"
    support = getattr(base.support, "base_constraint", base.support)  # ImproperUniform wraps what it was given
    if support is constraints.simplex:
        return "Lebesgue measure on the first K-1 coordinates of the simplex"
    if support is constraints.sphere:
        return "surface measure on the sphere"
    return "Lebesgue measure on the support"


def is_ebm(node: Any) -> bool:
    """Whether a pytree node is an :class:`EBM`."""
    return isinstance(node, EBM)


def find_ebms(distribution: dist.Distribution) -> list[EBM]:
    """All EBMs in a distribution, also under expand, mask, to_event, transforms and mixtures.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> ebm = EBM(lambda x: x**2, dist.Normal(0.0, 1.0))
        >>> len(find_ebms(ebm.expand([5]).mask(True)))
        1
    """
    return [leaf for leaf in jax.tree.leaves(distribution, is_leaf=is_ebm) if is_ebm(leaf)]


def map_ebms(function: Callable[[EBM], EBM], distribution: dist.Distribution) -> dist.Distribution:
    """Rewrite every EBM in a distribution, under whatever wrappers it sits."""
    return jax.tree.map(lambda node: function(node) if is_ebm(node) else node, distribution, is_leaf=is_ebm)


# NumPyro annotates these generic functions by their fallbacks, which return nothing.
_promotes: Any = promote_batch_shape
_maps: Any = vmap_over


class _ParametersAsCondition(eqx.Module):
    """A potential whose parameters differ from row to row: they arrive with the condition."""

    structure: _Static = eqx.field(static=True)

    def __call__(self, event: Event, condition: tuple[PyTree, tuple]) -> Scalar:
        parameters, rest = condition
        return eqx.combine(parameters, self.structure.value)[0](event, *rest)


class _SamplerByRow(eqx.Module):
    """A simulator whose parameters differ from row to row."""

    parameters: PyTree
    structure: _Static = eqx.field(static=True)

    def __call__(self, key: Key, potential: RowPotential, num_samples: int) -> Array:
        own = jax.tree.map(lambda leaf: leaf[potential.row], self.parameters)
        return eqx.combine(own, self.structure.value)[1](key, potential, num_samples)


@_promotes.register
def _promote_batch_shape(ebm: EBM) -> EBM:
    """An EBM that was built under ``vmap`` and left it with one row axis on every leaf."""
    base = _promotes(ebm.base)
    parameters = jax.tree.leaves(ebm._parameters)
    leaves = jax.tree.leaves((ebm._parameters, ebm.condition))
    lead = [leaf.shape[: leaf.ndim - len(shape)] for leaf, shape in zip(leaves, ebm._shapes, strict=True)]
    lead.append(base.batch_shape[: len(base.batch_shape) - len(ebm.base.batch_shape)])
    if ebm.log_normalizer is not None:
        lead.append(ebm.log_normalizer.shape[: max(ebm.log_normalizer.ndim - len(ebm.batch_shape), 0)])
    rows = jnp.broadcast_shapes(*lead)
    if not rows:
        return ebm
    if len(rows) > 1 or ebm.batch_shape or ebm.condition is not None:
        raise NotImplementedError(
            f"EBM: got row axes {rows} from vmap on top of the batch shape {ebm.batch_shape}, expected one row axis. "
            "Give the rows of both as the condition of one EBM."
        )
    condition = (ebm._parameters, ()) if parameters else None
    new = EBM(
        _ParametersAsCondition(ebm._structure) if parameters else ebm.potential,
        base,
        condition=condition,
        sampler=None if ebm.sampler is None else _SamplerByRow(ebm._parameters, ebm._structure),
    )
    if ebm.log_normalizer is not None:
        new._set_normalizer(ebm.log_normalizer, ebm.normalizer_kind)
        new.log_normalizer_error = ebm.log_normalizer_error
        new.log_normalizer_reliable = ebm.log_normalizer_reliable
    return new


@_maps.register
def _vmap_over(
    ebm: EBM,
    potential: int | None = None,
    base: Any = None,
    condition: int | None = None,
    log_normalizer: int | None = None,
) -> Any:
    axes: Any = copy.copy(ebm)
    axes._parameters, axes.base, axes.condition = potential, base, condition
    axes.log_normalizer, axes.log_normalizer_error, axes.log_normalizer_reliable = log_normalizer, None, None
    return axes
