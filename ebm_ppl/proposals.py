"""One way to draw from, and evaluate, whatever proposes events: NumPyro and distrax distributions, and flows.

NumPyro says ``sample(key, shape)``, distrax ``sample(seed=key, sample_shape=shape)``, a flow
``sample_and_log_prob(key, n)``. Kernels and normalisers see the two functions below and nothing else.
"""

import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ebm_ppl.checks import check_key
from ebm_ppl.types import Array, HasReference, Key, Potential, PyTree

_WAYS_TO_DRAW = ("sample_and_log_prob", "sample")


class TakenApart(eqx.Module):
    """A distribution held as its arrays and its structure. See :func:`hold`."""

    leaves: list[Any]
    structure: Any = eqx.field(static=True)

    @property
    def value(self) -> Any:
        """The distribution itself."""
        return jax.tree.unflatten(self.structure, self.leaves)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return tuple(self.value.event_shape)

    def sample_and_log_prob(self, key: Key, num_samples: int) -> tuple[Array, Array]:
        """Draws and their log densities."""
        return sample_and_log_prob(self.value, key, num_samples)

    def log_prob(self, events: Array) -> Array:
        """Log density of each row of events."""
        return log_density(self.value, events)


def hold(distribution: Any) -> Any:
    """A distribution as a part of a pytree that compiled functions return.

    distrax's distributions cannot be rebuilt around the masks that stand for their arrays on the way; they are held taken
    apart. Every other one is returned as it is. Some of distrax's (those with bijectors inside) have a structure that
    equals no other one's, and a compiled function is compiled anew for each of them.

    Example:
        >>> import numpyro.distributions as dist
        >>> isinstance(hold(dist.Normal(0.0, 1.0)), TakenApart)
        False
    """
    leaves, structure = jax.tree.flatten(distribution)
    if jax.tree.structure(jax.tree.unflatten(structure, [False] * len(leaves))) == structure:
        return distribution
    return TakenApart(leaves, structure)


def sample_and_log_prob(distribution: Any, key: Key, num_samples: int) -> tuple[Array, Array]:
    """Independent draws ``(num_samples, *event)`` and their log densities ``(num_samples,)``.

    Args:
        distribution: A NumPyro or distrax distribution, or an object with ``sample_and_log_prob(key, num_samples)``.
        key: Random key.
        num_samples: How many.

    Raises:
        TypeError: ``key`` is not one random key.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> draws, log_prob = sample_and_log_prob(dist.Normal(0.0, 1.0), jax.random.key(0), 3)
        >>> draws.shape, log_prob.shape
        ((3,), (3,))
    """
    check_key("key", key)  # NumPyro has a bare assertion for it
    if hasattr(distribution, "sample_and_log_prob"):
        if _takes_seed(distribution.sample_and_log_prob):
            return distribution.sample_and_log_prob(seed=key, sample_shape=(num_samples,))
        return distribution.sample_and_log_prob(key, num_samples)
    draws = jnp.asarray(distribution.sample(key, (num_samples,)))
    return draws, distribution.log_prob(draws)


def log_density(distribution: Any, events: Array) -> Array:
    """Log densities of events, ``(n,)``: minus infinity outside the support, where NumPyro's may be a finite number.

    Example:
        >>> import numpyro.distributions as dist
        >>> log_density(dist.Uniform(0.0, 2.0), jnp.array([1.0, 3.0])).tolist()
        [-0.6931471824645996, -inf]
    """
    support = getattr(distribution, "support", None)
    if support is None:
        return jnp.asarray(distribution.log_prob(events))
    inside = support(events)
    # NumPyro warns about values outside the support, and its numbers there mean nothing.
    events = jnp.where(inside.reshape(-1, *[1] * (events.ndim - 1)), events, support.feasible_like(events))
    return jnp.where(inside, distribution.log_prob(events), -jnp.inf)


def _takes_seed(method: Any) -> bool:
    return "seed" in inspect.signature(method).parameters


def check_proposal(name: str, distribution: Any) -> Any:
    """A normalised distribution that can be sampled and evaluated, with no batch shape.

    A sampler without a density is not enough: independence moves that leave its density out sample another law.

    Raises:
        TypeError: ``distribution`` has no ``log_prob``, or nothing to draw with.
        ValueError: it has a batch shape, or cannot be sampled.

    Example:
        >>> import numpyro.distributions as dist
        >>> check_proposal("proposal", dist.Normal(0.0, 1.0).expand([3]))
        Traceback (most recent call last):
        ...
        ValueError: proposal: got batch_shape (3,), expected (). Declare the event's axes as event axes with .to_event().
    """
    if not callable(getattr(distribution, "log_prob", None)):
        raise TypeError(
            f"{name}: got {type(distribution).__name__}, expected a distribution with a log_prob method. Draws without a "
            "density cannot be accepted or weighted."
        )
    if not any(callable(getattr(distribution, method, None)) for method in _WAYS_TO_DRAW):
        raise TypeError(
            f"{name}: got {type(distribution).__name__}, expected one with sample (NumPyro, distrax) or "
            "sample_and_log_prob(key, num_samples)."
        )
    batch_shape = tuple(getattr(distribution, "batch_shape", ()))
    if batch_shape:
        raise ValueError(
            f"{name}: got batch_shape {batch_shape}, expected (). Declare the event's axes as event axes with .to_event()."
        )
    if not can_sample(distribution):
        raise ValueError(
            f"{name}: got {type(distribution).__name__}, which cannot be sampled, expected a normalised distribution."
        )
    return distribution


def can_sample(distribution: Any) -> bool:
    """Whether a distribution gives draws; an ``ImproperUniform`` does not, nor does a mere density.

    Example:
        >>> import numpyro.distributions as dist
        >>> can_sample(dist.Normal(0.0, 1.0)), can_sample(dist.ImproperUniform(dist.constraints.real, (), ()))
        (True, False)
    """
    if not any(callable(getattr(distribution, method, None)) for method in _WAYS_TO_DRAW):
        return False
    try:
        jax.eval_shape(lambda key: sample_and_log_prob(distribution, key, 1), jax.random.key(0))
    except NotImplementedError:
        return False
    return True


def find_reference(kernel: str, reference: Any, potential: Potential) -> Any:
    """The distribution that a kernel starts or proposes from: its own, or else the one its potential knows.

    Raises:
        ValueError: there is neither.

    Example:
        >>> import numpyro.distributions as dist, ebm_ppl as ebm
        >>> tilted = ebm.potentials.tilt(lambda x: x**4, dist.Normal(0.0, 2.0))
        >>> float(find_reference("tempered_smc", None, tilted).scale)
        2.0
    """
    if reference is None and isinstance(potential, HasReference):
        reference = potential.reference
    if reference is None:
        raise ValueError(
            f"reference: {kernel} got none, and its potential has no base that can be sampled, expected a normalised "
            "distribution over events. Pass reference=..., or tilt the energy: ebm_ppl.potentials.tilt(energy, base)."
        )
    return reference


def event_like(position: PyTree) -> PyTree:
    """Shape and dtype of one event of a population."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), position)
