"""What a sampler-free loss on continuous events takes: floating rows, and a potential on a domain that it is right for."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from ebm_ppl.checks import as_array, check_potential, check_rows
from ebm_ppl.regions import describe_region, is_whole_space
from ebm_ppl.types import Array, Batch, Event, Scalar


class FlatRows(NamedTuple):
    """A potential and its rows, with every event as one vector.

    Attributes:
        energy: Energy of one flattened event ``(dim,)``, and of what other arguments the potential takes.
        rows: ``(row, dim)``.
        unravel: From one flattened event back to the event.
    """

    energy: Callable[..., Scalar]
    rows: Array
    unravel: Callable[[Array], Event]


def flat_rows(loss: str, potential: Callable[..., Scalar], batch: Batch, *, arguments: tuple = ()) -> FlatRows:
    """Check a batch of continuous events and flatten each of them.

    Args:
        loss: Name of the loss, for errors.
        potential: Energy of one event, and of ``arguments``.
        batch: Rows ``(row, *event)``, or a pytree of such arrays.
        arguments: Further positional arguments of the potential; ``energy`` takes them too.

    Returns:
        The rows as vectors, and the energy of one.

    Raises:
        TypeError: the rows are not real floating numbers, or the energy is not.
        ValueError: no rows, rows that are not finite or outside the declared support, or an energy that does not fit one
            event.

    Example:
        >>> import jax.numpy as jnp
        >>> flat = flat_rows("a loss", lambda x: jnp.sum(x**2), jnp.ones((5, 2, 3)))
        >>> flat.rows.shape, float(flat.energy(flat.rows[0]))
        ((5, 6), 6.0)
    """
    leaves, structure = jax.tree.flatten(batch)
    if not leaves:
        raise ValueError("batch: got no arrays, expected rows of shape (row, *event).")
    leaves = [as_array("batch", leaf) for leaf in leaves]
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == jnp.bool_:
            raise TypeError(
                f"batch: {loss} got dtype {leaf.dtype}, expected real floating rows, since it differentiates the energy or "
                "perturbs the rows. For discrete events use pseudo_likelihood, ratio_matching or "
                "discrete_energy_discrepancy; for whole numbers that stand for real ones cast with .astype(float)."
            )
    # A declared support is a constraint on events of one array.
    support = getattr(potential, "support", None) if len(leaves) == 1 else None
    leaves = [check_rows("batch", leaf, support=support) for leaf in leaves]
    counts = sorted({leaf.shape[0] for leaf in leaves})
    if len(counts) > 1:
        raise ValueError(f"batch: got arrays of {counts} rows, expected one number of rows.")
    batch = jax.tree.unflatten(structure, leaves)
    event = jax.tree.map(lambda x: x[0], batch)
    check_potential(potential, event, arguments=arguments)
    _, unravel = ravel_pytree(event)
    rows = jax.vmap(lambda event: ravel_pytree(event)[0])(batch)
    return FlatRows(lambda x, *given: potential(unravel(x), *given), rows, unravel)


def check_whole_space(loss: str, potential: Callable[..., Scalar], flat: FlatRows, remedy: str) -> None:
    """The potential must not declare a support with a boundary.

    Args:
        loss: Name of the loss, for errors.
        potential: Asked for its ``support``; one that declares none is taken at its word.
        flat: Its rows.
        remedy: What to use instead.

    Raises:
        ValueError: the declared support is not the whole space.
    """
    support = getattr(potential, "support", None)
    if support is not None and not is_whole_space(support, flat.unravel(flat.rows[0])):
        raise ValueError(
            f"potential: {loss} got one whose support is {describe_region(support)}, expected the whole space: at a "
            "boundary an integration by parts leaves a term that the loss does not have, and the estimate is wrong. "
            f"{remedy}"
        )


KINKED = frozenset({"relu", "relu6", "leaky_relu", "selu", "hard_tanh", "hard_sigmoid", "hard_silu", "sparse_sigmoid"})
"""Activations of ``jax.nn`` whose slope jumps, as they are called by default."""


def check_twice_differentiable(loss: str, flat: FlatRows) -> None:
    """The energy must not have ReLU units: their curvature sits at the kinks, where autodiff sees none.

    With ReLU features ``Lap relu(z . x)`` is a delta function at ``z . x = 0``. Autodiff drops it, and what is left of the
    loss has another minimum. Activations of ``jax.nn`` are told by their names, where they are given what depends on the
    event; a ``jnp.maximum`` is not seen, which is also what to write for a kink that does no harm.

    Args:
        loss: Name of the loss, for errors.
        flat: Its energy and rows.

    Raises:
        ValueError: there are such units.

    Example:
        >>> import ebm_ppl as ebm
        >>> network = ebm.potentials.MLP(2, key=jax.random.key(0), width=4, depth=1, activation=jax.nn.relu)
        >>> check_twice_differentiable("score_matching", flat_rows("score_matching", network, jnp.ones((3, 2))))
        Traceback (most recent call last):
        ...
        ValueError: potential: score_matching got one with relu units...
    """
    program = jax.make_jaxpr(flat.energy)(flat.rows[0]).jaxpr
    found = sorted(_kinks_reached(program, [True] * len(program.invars))[0])
    if found:
        raise ValueError(
            f"potential: {loss} got one with {found[0]} units, expected a twice differentiable energy: second derivatives "
            "miss the curvature at the kinks, and the loss has another minimum. Use jax.nn.silu or jax.nn.softplus, or a "
            "loss without second derivatives: denoising_score_matching, or contrastive_divergence with one small step, "
            "which is score matching of the smoothed energy."
        )


def _kinks_reached(program: Any, depends: list[bool]) -> tuple[set[str], list[bool]]:
    """Which of the names a program calls with what depends on the event, and which of its outputs depend on it."""
    reached = {variable for variable, does in zip(program.invars, depends, strict=True) if does}
    names: set[str] = set()
    for equation in program.eqns:
        inputs = [isinstance(atom, Hashable) and atom in reached for atom in equation.invars]
        outputs = [any(inputs)] * len(equation.outvars)
        name = str(equation.params.get("name", ""))
        if name in KINKED and any(inputs):
            names.add(name)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value if hasattr(value, "eqns") else None)
            if inner is None or name in KINKED:
                continue
            # A loop or a branch takes other arguments than its equation: there everything may depend on anything.
            is_call = len(inner.invars) == len(inputs)
            found, inner_outputs = _kinks_reached(inner, inputs if is_call else [any(inputs)] * len(inner.invars))
            names |= found
            if is_call and len(inner_outputs) == len(outputs):
                outputs = inner_outputs
        reached |= {variable for variable, does in zip(equation.outvars, outputs, strict=True) if does}
    return names, [isinstance(atom, Hashable) and atom in reached for atom in program.outvars]
