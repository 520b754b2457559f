"""What the kernels on discrete events share: the values of a site, and energies linearised around an event.

An event is one array whose entries, the sites, each take one of a few values. Positions may be of any integer or floating
dtype and keep it; gradients are taken at the same numbers as floats.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ebm_ppl.checks import is_traced
from ebm_ppl.types import Array, HasOneHotEnergy, HasSiteValues, Potential, PyTree, Scalar, SiteConditionals

Values = tuple[int | float, ...]
"""What a site may be, in increasing order."""


def check_values(values: Sequence[int | float] | None) -> Values | None:
    """At least two different numbers, in increasing order; ``None`` leaves them to the potential.

    Raises:
        TypeError: they are not numbers.
        ValueError: fewer than two, or one of them twice.

    Example:
        >>> check_values([1, -1])
        (-1, 1)
    """
    if values is None:
        return None
    found = np.asarray(values)
    if found.ndim != 1 or not (np.issubdtype(found.dtype, np.integer) or np.issubdtype(found.dtype, np.floating)):
        raise TypeError(f"values: got {values!r}, expected a sequence of numbers such as (0, 1) or (-1, 1).")
    if len(set(found.tolist())) != found.size or found.size < 2 or not np.isfinite(found).all():
        raise ValueError(f"values: got {values!r}, expected at least two different finite numbers.")
    return tuple(sorted(found.tolist()))


def find_values(kernel: str, values: Values | None, potential: Potential) -> Values:
    """What a site may be: as the kernel says, as the potential declares, or as its support says.

    Args:
        kernel: Name of the kernel or the loss, for errors.
        values: From its ``values`` argument.
        potential: Asked for ``site_values`` and for a discrete ``support``.

    Raises:
        ValueError: nobody knows, or two of them disagree.

    Example:
        >>> import jax.numpy as jnp, ebm_ppl as ebm
        >>> find_values("gibbs", None, ebm.potentials.Ising((4, 4), coupling=0.5))
        (-1, 1)
    """
    declared = potential.site_values if isinstance(potential, HasSiteValues) else None
    supported = values_of_support(getattr(potential, "support", None))
    known = {
        name: found
        for name, found in (
            ("the argument", values),
            ("the potential", declared),
            ("the support of its base", supported),
        )
        if found is not None
    }
    if not known:
        raise ValueError(
            f"values: {kernel} got none, and its potential does not declare what values a site takes, expected them. Pass "
            f"{kernel}(..., values=(0, 1)) for bits or values=(-1, 1) for spins."
        )
    if len(set(known.values())) > 1:
        said = ", ".join(f"{name} says {list(found)}" for name, found in known.items())
        raise ValueError(f"values: {said}; expected one coding. Bits (0, 1) and spins (-1, 1) are different models.")
    return next(iter(known.values()))


def values_of_support(support: Any) -> Values | None:
    """The whole numbers of a bounded discrete support, all its sites together; ``None`` where they cannot be told.

    Example:
        >>> import numpyro.distributions as dist
        >>> values_of_support(dist.Bernoulli(0.5).expand([3]).to_event(1).support)
        (0, 1)
    """
    while (inner := getattr(support, "base_constraint", None)) is not None:
        support = inner
    if support is None or not getattr(support, "is_discrete", False) or getattr(support, "event_dim", 0):
        return None
    lower, upper = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if lower is None and upper is None:
        # Booleans have no bounds to read; NumPy evaluates the constraint also while a program is being traced.
        held = np.asarray(support(np.arange(-1, 4))).tolist()
        return (0, 1) if held == [False, True, True, False, False] else None
    if lower is None or upper is None or is_traced((lower, upper)):
        return None
    # Sites with bounds of their own: beyond them the energy is infinite.
    return tuple(range(int(np.min(lower)), int(np.max(upper)) + 1))


def check_chains(
    kernel: str,
    values: Values | None,
    potential: Potential,
    position: PyTree,
    *,
    name: str = "position",
    what: str = "chain",
) -> Values:
    """Chains, or rows, must be one array of numbers; where they are concrete, of the values a site may take.

    Args:
        kernel: Name of the kernel or the loss, for errors.
        values: From its ``values`` argument.
        potential: Asked for its values, see :func:`find_values`.
        position: ``(chain, *event)``.
        name: How errors name ``position``.
        what: How errors name one of them.

    Returns:
        The values.

    Raises:
        TypeError: a pytree, or numbers that are neither integers nor real.
        ValueError: states in another coding (with count and first chain), or nobody knows the coding.
    """
    leaves = jax.tree.leaves(position)
    if len(leaves) != 1 or leaves[0] is not position:
        raise TypeError(f"{name}: {kernel} got a pytree of {len(leaves)} arrays, expected one array ({what}, *event).")
    if not (jnp.issubdtype(position.dtype, jnp.integer) or jnp.issubdtype(position.dtype, jnp.floating)):
        raise TypeError(
            f"{name}: got dtype {position.dtype}, expected integers or real numbers; cast with .astype(int)."
        )
    if position.ndim == 0 or position.size == 0:
        raise ValueError(f"{name}: got shape {position.shape}, which is empty; expected at least one {what}.")
    found = find_values(kernel, values, potential)
    with np.errstate(invalid="ignore", over="ignore"):  # what does not fit is told apart below
        own = np.asarray(found).astype(position.dtype)
    is_exact = np.array_equal(own, found) or jnp.issubdtype(position.dtype, jnp.floating)
    if not is_exact or np.unique(own).size < len(found):
        raise TypeError(
            f"{name}: got dtype {position.dtype}, which cannot hold the values {list(found)} of a site; cast with "
            f".astype({'int' if all(float(v).is_integer() for v in found) else 'float'})."
        )
    if not is_traced(position):
        flat = np.asarray(position).reshape(position.shape[0], -1)
        bad = ~np.isin(flat, own).all(axis=1)
        if bad.any():
            first = int(np.argmax(bad))
            raise ValueError(
                f"{name}: got {int(bad.sum())} of {bad.size} {what}s outside the coding {list(found)}, the first at index "
                f"{first} (values {np.unique(flat[first])[:6].tolist()}); expected states in that coding. 2 x - 1 makes "
                "spins of bits."
            )
    return found


class Sites(NamedTuple):
    """Events of one population, as their sites.

    Attributes:
        values: ``(value,)``, in the dtype of the positions.
        event_shape: Shape of one event.
        dtype: Floating dtype of energies.
    """

    values: Array
    event_shape: tuple[int, ...]
    dtype: Any

    def digits(self, flat: Array) -> tuple[Array, Array]:
        """Number of the value at each site of one flattened event, and whether the event is in the coding."""
        matches = flat[:, None] == self.values
        return jnp.argmax(matches, axis=1), jnp.any(matches, axis=1).all()


def sites_of(values: Values, position: Array) -> Sites:
    """The sites of a population of positions."""
    is_floating = jnp.issubdtype(position.dtype, jnp.floating)
    dtype = position.dtype if is_floating else jnp.result_type(float)
    return Sites(jnp.asarray(values, position.dtype), position.shape[1:], dtype)


def site_logits(potential: Potential, sites: Sites, flat: Array, site: Array) -> Array:
    """Log odds ``(value,)`` of the values of one site of a flattened event, up to a constant, given all the other sites.

    A potential that gives its conditionals is asked for them; any other one is evaluated at every value.
    """
    if isinstance(potential, SiteConditionals):
        return potential.conditional_logits(flat.reshape(sites.event_shape), site).astype(sites.dtype)
    candidates = jax.vmap(lambda value: flat.at[site].set(value).reshape(sites.event_shape))(sites.values)
    return -jax.vmap(potential)(candidates).astype(sites.dtype)


class InformedState(NamedTuple):
    """Chains with what a gradient at their positions says about their neighbours.

    Attributes:
        position: ``(chain, *event)``.
        energy: ``(chain,)``.
        gains: By how much, to first order, the log density grows when a site takes a value: ``(chain, site, value)``.
    """

    position: Array
    energy: Array
    gains: Array


def linearized(kernel: str, potential: Potential, sites: Sites) -> Callable[[Array], tuple[Scalar, Array]]:
    """A function of one flattened event that gives its energy, and the gains ``(site, value)`` of every change.

    ``gain[i, k] = -grad_i U (v_k - x_i)`` approximates ``U(x) - U(x with x_i = v_k)``, and is exact for energies that are
    linear in each site. Labels, which have no order, are linearised as indicator vectors where the potential has an
    energy of those.

    Raises:
        TypeError: the potential cannot be evaluated at floating numbers.
    """
    num_values = sites.values.shape[0]
    values = sites.values.astype(sites.dtype)

    if isinstance(potential, HasOneHotEnergy):
        one_hot_energy = potential.one_hot_energy

        def evaluate_labels(flat: Array) -> tuple[Scalar, Array]:
            own = jax.nn.one_hot(sites.digits(flat)[0], num_values, dtype=sites.dtype)
            energy, gradient = jax.value_and_grad(_in_dtype(one_hot_energy, sites.dtype))(
                own.reshape(*sites.event_shape, num_values)
            )
            gradient = gradient.reshape(-1, num_values)
            return energy, _finite(jnp.sum(gradient * own, axis=1, keepdims=True) - gradient)

        return evaluate_labels

    real = jax.ShapeDtypeStruct(sites.event_shape, sites.dtype)
    try:
        jax.eval_shape(potential, real)
    except Exception as error:
        raise TypeError(
            f"potential: {kernel} could not evaluate it at floating numbers ({type(error).__name__}: {error}), expected an "
            "energy that extends to them, since it needs a gradient. kernels.gibbs needs none."
        ) from error

    def evaluate(flat: Array) -> tuple[Scalar, Array]:
        real = flat.astype(sites.dtype)
        energy, gradient = jax.value_and_grad(_in_dtype(potential, sites.dtype))(real.reshape(sites.event_shape))
        return energy, _finite(-gradient.reshape(-1, 1) * (values - real[:, None]))

    return evaluate


def squared_distances(potential: Potential, sites: Sites, flat: Array) -> Array:
    """How far every value is from what each site is, ``(site, value)``: 2 between any two labels without an order."""
    if isinstance(potential, HasOneHotEnergy):
        return jnp.where(flat[:, None] == sites.values, 0.0, 2.0).astype(sites.dtype)
    return (sites.values.astype(sites.dtype) - flat.astype(sites.dtype)[:, None]) ** 2


def _in_dtype(energy: Callable[[Array], Scalar], dtype: Any) -> Callable[[Array], Scalar]:
    return lambda event: jnp.asarray(energy(event), dtype)


def _finite(gains: Array) -> Array:
    # A gain is a function of the state whatever stands for a bad gradient, so the accept step still corrects for it.
    return jnp.where(jnp.isfinite(gains), gains, 0.0)


def accepts(uniform: Array, log_ratio: Array, energy: Array, new_energy: Array) -> tuple[Array, Array, Array]:
    """Metropolis-Hastings for one chain: whether to accept, with what probability, and whether the proposal was finite.

    A proposal whose energy is not finite is rejected; a chain whose own energy is not finite leaves at the first chance.
    """
    is_finite = jnp.isfinite(new_energy)
    log_ratio = jnp.where(jnp.isfinite(energy), log_ratio, 0.0)
    rate = jnp.where(is_finite, jnp.exp(jnp.minimum(log_ratio, 0.0)), 0.0)
    return uniform < rate, rate, is_finite


def split(rng_key: Array, position: Array) -> Array:
    """One key per chain."""
    return jax.random.split(rng_key, position.shape[0])
