"""New potentials from old: tilt by a base, add, temper; and which of their parameters training may move."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_positive, check_real
from ebm_ppl.named_fields import named, unnamed
from ebm_ppl.proposals import can_sample
from ebm_ppl.types import Density, Event, Potential, PyTree, Scalar


class Fixed(eqx.Module):
    """A part of a potential that training must not move, such as the base distribution of a tilted energy.

    It is held taken apart, because some distributions (distrax's) cannot be rebuilt around the masks and placeholders
    that optimizers put in the place of arrays.

    Example:
        >>> Fixed({"a": 1.0}).value
        {'a': 1.0}
    """

    leaves: list[Any]
    structure: Any = eqx.field(static=True)

    def __init__(self, value: Any):
        # By name: the order of a NumPyro distribution's own leaves changes from process to process.
        self.leaves, self.structure = jax.tree.flatten(named(value))

    @property
    def value(self) -> Any:
        """The part itself."""
        return unnamed(jax.tree.unflatten(self.structure, self.leaves))


def trainable(tree: PyTree) -> PyTree:
    """Mark the leaves that an optimizer may move: real floating arrays outside :class:`Fixed`.

    Args:
        tree: A potential (any callable pytree).

    Returns:
        A pytree of booleans with the structure of ``tree``, a filter specification for ``equinox.partition``.

    Example:
        >>> import numpyro.distributions as dist
        >>> import jax, ebm_ppl as ebm
        >>> net = ebm.potentials.MLP(2, key=jax.random.key(0), width=8, depth=1)
        >>> base = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        >>> tilted = ebm.potentials.tilt(net, base)
        >>> sum(jax.tree.leaves(trainable(tilted))) == sum(jax.tree.leaves(trainable(net)))
        True
    """

    def mark(node: Any) -> Any:
        if isinstance(node, Fixed):
            return jax.tree.map(lambda _: False, node)
        return eqx.is_inexact_array(node) and jnp.issubdtype(node.dtype, jnp.floating)

    return jax.tree.map(mark, tree, is_leaf=lambda node: isinstance(node, Fixed))


class Tilted(eqx.Module):
    """The energy ``U(x) - log base(x)`` of the density ``p(x) = base(x) exp(-U(x)) / Z``. See :func:`tilt`."""

    potential: Potential
    base: Fixed

    def __call__(self, event: Event) -> Scalar:
        """``U(x) - log base(x)`` of one event."""
        # Only the base's own parameters are constants: its gradient in the event drives the sampler.
        base = jax.tree.map(lambda x: jax.lax.stop_gradient(x) if eqx.is_array(x) else x, self.base).value
        support = getattr(base, "support", None)
        if support is None:
            return self.potential(event) - base.log_prob(event)
        # NumPyro's log_prob is finite outside the support of, say, a Uniform: chains would walk out with acceptance 1.
        # An energy may be NaN out there, and 0 * NaN would leak into gradients, so it is evaluated elsewhere.
        inside = support(event)
        safe = jnp.where(inside, event, support.feasible_like(event))
        # Added, not chosen: a choice would be one more factor of every layer's gradient.
        return jnp.where(inside, 0.0, jnp.inf) + self.potential(safe) - base.log_prob(safe)

    @property
    def reference(self) -> Any:
        """The base, to start or propose from; ``None`` where it cannot be sampled, as an improper one cannot."""
        base = self.base.value
        return base if can_sample(base) else None

    @property
    def support(self) -> Any:
        """Support of the base; ``None`` for a base that declares none, as distrax's do."""
        return getattr(self.base.value, "support", None)

    @property
    def site_values(self) -> tuple[int, ...] | None:
        """Coding of the potential, or ``None``."""
        return getattr(self.potential, "site_values", None)


def tilt(potential: Potential, base: Density) -> Tilted:
    """Tilt a base distribution by an energy: the potential ``U - log base``.

    The density ``p(x) = base(x) exp(-U(x)) / Z`` starts at the base when ``U`` starts at zero, and is proper whenever
    ``U`` is bounded below. The parameters of ``base`` are held fixed: no gradient reaches them, and optimizers built by
    :func:`ebm_ppl.init_train` do not see them.

    Args:
        potential: Energy ``U`` of one event.
        base: Normalised distribution of one event (its ``batch_shape`` is ``()``), NumPyro or distrax.

    Returns:
        A potential of one event.

    Raises:
        TypeError: ``potential`` is not callable or ``base`` has no ``log_prob``.
        ValueError: ``base`` has a batch shape; its events would be mistaken for rows.

    Example:
        >>> import numpyro.distributions as dist
        >>> import jax.numpy as jnp
        >>> tilted = tilt(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> bool(jnp.isclose(tilted(2.0) - tilted(0.0), 4.0))
        True

    References:
        Grenioux, Moulines, Gabrie (2023), arXiv:2306.00684, equation 6.
    """
    if not callable(potential):
        raise TypeError(f"potential: got {type(potential).__name__}, expected a callable energy of one event.")
    if not isinstance(base, Density):
        raise TypeError(f"base: got {type(base).__name__}, expected a distribution with a log_prob method.")
    batch_shape = tuple(getattr(base, "batch_shape", ()))
    if batch_shape != ():
        raise ValueError(
            f"base: got batch_shape {batch_shape}, expected (). Declare the event's axes as event axes, "
            "for example with base.to_event()."
        )
    return Tilted(potential, Fixed(base))


def without_base(potential: Potential) -> Potential:
    """What is learned of an energy: ``U`` of ``U - log base``, also inside :func:`temper`, :func:`add` and the like.

    Example:
        >>> import numpyro.distributions as dist
        >>> import jax.numpy as jnp
        >>> tilted = tilt(lambda x: 0.5 * x**2, dist.Normal(0.0, 1.0))
        >>> float(without_base(temper(tilted, 3.0))(jnp.array(2.0)))
        6.0
    """
    match potential:
        case Tilted():
            return without_base(potential.potential)
        case Sum():
            return Sum(tuple(map(without_base, potential.potentials)))
        case Tempered():
            return Tempered(without_base(potential.potential), potential.inverse_temperature)
        case Normalized():
            return Normalized(without_base(potential.potential), potential.log_normalizer)
    return potential


class Sum(eqx.Module):
    """The energy ``sum_i U_i(x)``, a product of experts. See :func:`add`."""

    potentials: tuple[Potential, ...]

    @property
    def support(self) -> Any:
        """The first support that one of the potentials declares, or ``None``; outside any of them the energy is inf."""
        return next((s for u in self.potentials if (s := getattr(u, "support", None)) is not None), None)

    @property
    def site_values(self) -> tuple[int, ...] | None:
        """The one coding of those potentials that declare theirs, or ``None``.

        Raises:
            ValueError: they declare different ones.
        """
        found = {values for u in self.potentials if (values := getattr(u, "site_values", None)) is not None}
        if len(found) > 1:
            raise ValueError(f"potentials: got discrete energies in the codings {sorted(found)}, expected one coding.")
        return next(iter(found), None)

    def __call__(self, event: Event) -> Scalar:
        """The sum of the energies at one event."""
        total = self.potentials[0](event)
        for potential in self.potentials[1:]:
            total = total + potential(event)
        return total


def add(*potentials: Potential) -> Sum:
    """Add energies: ``U(x) = U_1(x) + ... + U_n(x)``, the product of their densities.

    Raises:
        ValueError: no potential was given.
        TypeError: one of them is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> float(add(lambda x: x**2, lambda x: 3.0 * x)(jnp.array(2.0)))
        10.0
    """
    if not potentials:
        raise ValueError("potentials: got none, expected at least one energy to add.")
    for index, potential in enumerate(potentials):
        if not callable(potential):
            raise TypeError(f"potentials[{index}]: got {type(potential).__name__}, expected a callable energy.")
    return Sum(tuple(potentials))


class _OfOnePotential(eqx.Module):
    """A potential made of another one, with its support and its coding."""

    potential: eqx.AbstractVar[Potential]

    @property
    def support(self) -> Any:
        """Support of the potential, or ``None``."""
        return getattr(self.potential, "support", None)

    @property
    def site_values(self) -> tuple[int, ...] | None:
        """Coding of the potential, or ``None``."""
        return getattr(self.potential, "site_values", None)


class Tempered(_OfOnePotential):
    """The energy ``beta U(x)``. See :func:`temper`."""

    potential: Potential
    inverse_temperature: Fixed

    def __call__(self, event: Event) -> Scalar:
        """``beta U(x)`` of one event."""
        energy = jnp.asarray(self.potential(event))
        return jax.lax.stop_gradient(self.inverse_temperature.value).astype(energy.dtype) * energy


def temper(potential: Potential, inverse_temperature: float | jax.Array) -> Tempered:
    """Scale an energy by an inverse temperature: ``beta U(x)``, the density ``p(x)^beta`` up to its normaliser.

    The inverse temperature is a pytree leaf, so changing it does not recompile, and training does not move it.

    Args:
        potential: Energy of one event.
        inverse_temperature: ``beta > 0``, dimensionless; ``beta < 1`` flattens, ``beta > 1`` sharpens.

    Raises:
        TypeError: ``potential`` is not callable.
        ValueError: ``inverse_temperature`` is not finite and positive.

    Example:
        >>> import jax.numpy as jnp
        >>> float(temper(lambda x: x**2, 0.5)(jnp.array(2.0)))
        2.0
    """
    if not callable(potential):
        raise TypeError(f"potential: got {type(potential).__name__}, expected a callable energy of one event.")
    return Tempered(potential, Fixed(check_positive("inverse_temperature", inverse_temperature)))


class Normalized(_OfOnePotential):
    """The energy ``U(x) + log_normalizer`` with a constant that is trained. See :func:`with_log_normalizer`."""

    potential: Potential
    log_normalizer: jax.Array

    @property
    def reference(self) -> Any:
        """What the potential would start or propose from, or ``None``."""
        return getattr(self.potential, "reference", None)

    def __call__(self, event: Event) -> Scalar:
        """``U(x) + log_normalizer`` of one event: minus a log density once the constant has been learned."""
        energy = jnp.asarray(self.potential(event))
        return energy + self.log_normalizer.astype(energy.dtype)


def with_log_normalizer(potential: Potential, log_normalizer: float | jax.Array = 0.0) -> Normalized:
    """Give an energy a trained constant: ``U(x) + c``, whose density is normalised at ``c = log Z``.

    Gradients of ordinary objectives do not see an additive constant; those of
    :func:`ebm_ppl.objectives.noise_contrastive_estimation` and
    :func:`ebm_ppl.objectives.learned_normalizer_likelihood` do, and move it to ``log Z``.

    Args:
        potential: Energy of one event.
        log_normalizer: Where ``c`` starts, a number; an estimate of ``log Z`` shortens the training.

    Raises:
        TypeError: ``potential`` is not callable, or ``log_normalizer`` is not a real number.
        ValueError: ``log_normalizer`` is not a scalar, or not finite.

    Example:
        >>> normalized = with_log_normalizer(lambda x: 0.5 * x**2, 0.9189)
        >>> round(float(normalized(0.0)), 4)
        0.9189

    References:
        Gutmann, Hyvärinen (2012), Journal of Machine Learning Research 13, section 2.1.
    """
    if not callable(potential):
        raise TypeError(f"potential: got {type(potential).__name__}, expected a callable energy of one event.")
    value = check_real("log_normalizer", log_normalizer)
    if value.shape != ():
        raise ValueError(f"log_normalizer: got shape {value.shape}, expected one number of shape ().")
    return Normalized(potential, value)
