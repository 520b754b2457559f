"""An energy-based model as a NumPyro distribution: ``p(x) = base(x) exp(-U(x)) / Z``.

The object refuses to give a normalised log density until log Z is accounted for. A dropped log Z makes every run look
healthy and be wrong, so silence is not an option; :mod:`ebm_ppl.handlers` applies a policy that makes it right.
"""

from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from ebm_ppl.checks import check_potential
from ebm_ppl.errors import UnknownNormalizerError
from ebm_ppl.types import Array, Key, Potential, PyTree, Scalar

Simulator = Callable[[Key, Potential, int], PyTree]
"""Approximate simulation of an EBM: ``(key, potential, num_samples) -> (num_samples, *event)``, each draw from its own
independent chain. The potential it receives includes the base."""


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
        log_normalizer: ``log Z`` where it is known, broadcastable to ``batch_shape``. Usually left ``None`` and supplied
            by a handler such as :func:`ebm_ppl.handlers.constant_normalizer`.
        sampler: Approximate simulator for ``sample``; without one ``sample`` raises ``NotImplementedError``.

    Raises:
        TypeError: the energy is not a real floating one, has 64-bit parameters in a 32-bit session, or ``base`` is not a
            NumPyro distribution.
        ValueError: the energy is not a scalar for one event of ``base.event_shape``, the shapes of ``condition`` or
            ``log_normalizer`` do not fit, or ``base`` is an EBM with unknown log Z.

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
    pytree_data_fields = ("_parameters", "base", "condition", "log_normalizer")
    pytree_aux_fields = ("_structure", "normalizer_kind")
    has_enumerate_support = False

    def __init__(
        self,
        potential: Callable[..., Scalar],
        base: dist.Distribution,
        *,
        condition: PyTree | None = None,
        log_normalizer: ArrayLike | None = None,
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
        batch_shape = base.batch_shape
        one_condition: tuple[PyTree, ...] = ()
        if condition is not None:
            condition = jax.tree.map(jnp.asarray, condition)
            rows = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(condition)}
            if len(rows) != 1 or not rows.isdisjoint({(), (0,)}):
                raise ValueError(
                    f"condition: got leading axes {sorted(rows)}, expected one row axis shared by all its arrays."
                )
            (row_shape,) = rows
            try:
                batch_shape = jnp.broadcast_shapes(batch_shape, row_shape)
            except ValueError as error:
                raise ValueError(
                    f"condition: got {row_shape[0]} rows, expected a number that broadcasts with the batch shape "
                    f"{base.batch_shape} of the base."
                ) from error
            one_condition = (jax.tree.map(lambda c: c[0], condition),)
        event = jax.ShapeDtypeStruct(base.event_shape, _event_dtype(base))
        check_potential(potential, event, arguments=one_condition)
        # A Distribution crosses jit as a pytree whose leaves must be arrays, while modules also hold functions.
        self._parameters, structure = eqx.partition((potential, sampler), eqx.is_array)
        self._structure = _Static(structure)
        self.base = base
        self.condition = condition
        if log_normalizer is not None:
            log_normalizer = jnp.asarray(log_normalizer)
            try:
                fits = jnp.broadcast_shapes(jnp.shape(log_normalizer), batch_shape) == batch_shape
            except ValueError:
                fits = False
            if not fits:
                raise ValueError(
                    f"log_normalizer: got shape {jnp.shape(log_normalizer)}, expected one that broadcasts to the batch "
                    f"shape {batch_shape}."
                )
        self.log_normalizer = log_normalizer
        self.normalizer_kind = None if log_normalizer is None else "exact"
        super().__init__(batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def potential(self) -> Callable[..., Scalar]:
        """The energy ``U`` of one event."""
        return eqx.combine(self._parameters, self._structure.value)[0]

    @property
    def sampler(self) -> Simulator | None:
        """The approximate simulator behind ``sample``."""
        return eqx.combine(self._parameters, self._structure.value)[1]

    @property
    def support(self) -> Any:  # NumPyro declares a class attribute; its constraints have no common type
        """Support of the base; it drives NumPyro's transforms."""
        return self.base.support

    @property
    def has_rsample(self) -> bool:
        """Always false: NumPyro would infer true from the empty constraints, and differentiate through a sampler."""
        return False

    def unnormalized_log_prob(self, value: ArrayLike) -> Array:
        """``log base(x) - U(x)``, shape ``sample_shape + batch_shape``; minus infinity outside the support.

        Raises:
            ValueError: ``value`` does not end in the event shape, or its rows do not match the batch shape.
        """
        value = jnp.asarray(value)
        lead = self._check_value(value)
        value = jnp.broadcast_to(value, lead + self.event_shape)
        inside = jnp.broadcast_to(self.support(value), lead)
        # An energy may be NaN outside its support, and 0 * NaN would leak into gradients: evaluate elsewhere.
        mask = inside.reshape(lead + (1,) * self.event_dim)
        safe = jnp.where(mask, value, self.support.feasible_like(value))
        log_prob = self.base.log_prob(safe) - self._energies(safe, lead)
        return jnp.where(inside, log_prob, -jnp.inf)

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

    def _energies(self, value: Array, lead: tuple[int, ...]) -> Array:
        """Energies of all rows of ``lead + event_shape``, one event at a time."""
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
            ValueError: see :meth:`unnormalized_log_prob`.
        """
        if self.log_normalizer is None:
            raise UnknownNormalizerError(
                "EBM.log_prob needs log Z, which nobody has accounted for. Where the parameters of the energy are fixed, "
                "wrap the model in ebm_ppl.handlers.constant_normalizer(model); where log Z is known, pass "
                "log_normalizer=...; to train the energy, use ebm_ppl.fit. unnormalized_log_prob always works."
            )
        return self.unnormalized_log_prob(value) - self.log_normalizer

    def sample(self, key: Key | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Approximate draws, each the end of an independent chain.

        Raises:
            NotImplementedError: no sampler is attached. (NumPyro's initialisation relies on exactly this type.)
        """
        if self.sampler is None or key is None:
            raise NotImplementedError(
                "EBM.sample: no sampler attached. Pass EBM(..., sampler=function) with a function "
                "(key, potential, num_samples) -> samples."
            )
        if self.condition is not None or self.base.batch_shape != ():
            raise NotImplementedError("EBM.sample: simulation with one normaliser per row is not available.")
        num_samples = 1
        for size in sample_shape:
            num_samples *= size
        samples = self.sampler(key, lambda event: -self.unnormalized_log_prob(event), num_samples)
        return jax.lax.stop_gradient(samples).reshape(*sample_shape, *self.event_shape)

    def with_normalizer(self, log_normalizer: ArrayLike, kind: str) -> "EBM":
        """The same EBM under a normaliser policy; ``kind`` names the policy."""
        new = EBM(
            self.potential, self.base, condition=self.condition, log_normalizer=log_normalizer, sampler=self.sampler
        )
        new.normalizer_kind = kind
        return new

    def __repr__(self) -> str:
        potential = self.potential
        name = getattr(potential, "__name__", type(potential).__name__)
        kind = "unknown" if self.normalizer_kind is None else self.normalizer_kind
        return (
            f"EBM(potential={name}, base={type(self.base).__name__}, batch_shape={self.batch_shape}, "
            f"event_shape={self.event_shape}, log Z {kind} with respect to {_reference_measure(self.base)})"
        )


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
