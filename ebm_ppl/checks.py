"""Argument checks at the Python boundary: one clear error that names the argument, what came, and what was expected.

Checks look at concrete values only. Inside a trace (``jit``, ``vmap``, ``grad``) values are abstract, so shapes and dtypes
are still checked and values are left to the caller.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ebm_ppl.errors import NonFiniteEnergyError
from ebm_ppl.meshes import num_parts, on_host, over_chains
from ebm_ppl.partials import function_behind
from ebm_ppl.types import AuxiliaryKernel, FreshPopulation, Kernel, Potential, PyTree


def is_traced(*trees: PyTree) -> bool:
    """Whether any leaf is an abstract value of an enclosing trace."""
    return any(isinstance(leaf, Tracer) for tree in trees for leaf in jax.tree.leaves(tree))


def check_markov_kernel(name: str, kernel: Kernel) -> Kernel:
    """A kernel that moves chains from where they are, and whose chains are their positions.

    Raises:
        TypeError: it is no kernel, draws its chains anew, or its chains carry more than a position.

    Example:
        >>> import ebm_ppl as ebm
        >>> kernel = check_markov_kernel("kernel", ebm.kernels.mala(step_size=0.1))
    """
    if not callable(kernel):
        raise TypeError(
            f"{name}: got {type(kernel).__name__}, expected a kernel such as ebm.kernels.mala(step_size=0.1)."
        )
    func = function_behind(kernel)
    if isinstance(func, FreshPopulation) and func.draws_afresh:
        raise TypeError(
            f"{name}: got a kernel that draws its chains anew at every step, expected one that moves them from where they "
            "are, such as ebm.kernels.mala."
        )
    if isinstance(func, AuxiliaryKernel):
        raise TypeError(
            f"{name}: got a kernel whose chains carry more than their positions, expected one such as ebm.kernels.mala."
        )
    return kernel


def check_count(name: str, value: Any, minimum: int = 1) -> int:
    """A whole number of at least ``minimum``.

    Raises:
        TypeError: ``value`` is not a whole number.
        ValueError: ``value`` is below ``minimum``.

    Example:
        >>> check_count("num_steps", 10)
        10
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected a whole number >= {minimum}.")
    if value < minimum:
        raise ValueError(f"{name}: got {value}, expected a whole number >= {minimum}.")
    return int(value)


def check_positive(name: str, value: Any) -> jax.Array:
    """A finite, strictly positive real number or array, as a floating JAX array.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: a concrete ``value`` is zero, negative, NaN or infinite.

    Example:
        >>> float(check_positive("step_size", 0.5))
        0.5
    """
    array = _as_real(name, value, "a positive real number")
    if not is_traced(array) and not _holds(lambda x: jnp.isfinite(x) & (x > 0), array):
        raise ValueError(f"{name}: got {value}, expected a finite number > 0.")
    return array


def check_real(name: str, value: Any) -> jax.Array:
    """A finite real number or array, as a floating JAX array.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: a concrete ``value`` is NaN or infinite.

    Example:
        >>> float(check_real("log_normalizer", -2))
        -2.0
    """
    array = _as_real(name, value, "a real number")
    if not is_traced(array) and not _holds(jnp.isfinite, array):
        raise ValueError(f"{name}: got {value}, expected a finite number.")
    return array


def _holds(condition: Callable[[jax.Array], jax.Array], array: jax.Array) -> bool:
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(condition(array)))


def check_not_negative(name: str, value: Any) -> jax.Array:
    """A finite real number or array of at least zero, as a floating JAX array.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: a concrete ``value`` is negative, NaN or infinite.

    Example:
        >>> float(check_not_negative("weight", 0))
        0.0
    """
    array = check_real(name, value)
    if not is_traced(array) and not _holds(lambda x: x >= 0, array):
        raise ValueError(f"{name}: got {value}, expected a number >= 0.")
    return array


def check_number(name: str, value: Any) -> jax.Array:
    """One real number that is not negative, as an array of shape ``()``; sign and finiteness only where concrete.

    Raises:
        TypeError: not a real number.
        ValueError: negative, not finite, or several numbers.
    """
    array = check_not_negative(name, value)
    if array.shape != ():
        raise ValueError(f"{name}: got shape {array.shape}, expected one number of shape ().")
    return array


def _as_real(name: str, value: Any, expected: str) -> jax.Array:
    if isinstance(value, np.generic):
        value = value.item()  # a NumPy scalar stands for the Python number that it is
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > np.iinfo(np.int32).max:
        value = math.copysign(math.inf, value) if abs(value) > 1e300 else float(value)  # no integer of JAX's
    check_precision(name, value)
    try:
        # An option that is known while a program around it is being compiled stays known, so that it can be checked.
        # A number beyond float32 becomes an infinity, which the caller refuses.
        known = contextlib.nullcontext() if is_traced(value) else jax.ensure_compile_time_eval()
        with known, np.errstate(over="ignore"):
            array = jnp.asarray(value)
    except (TypeError, ValueError) as error:  # JAX has a ValueError for None
        raise TypeError(f"{name}: got {value!r}, expected {expected}.") from error
    if jnp.issubdtype(array.dtype, jnp.complexfloating) or array.dtype == jnp.bool_:
        raise TypeError(f"{name}: got dtype {array.dtype}, expected {expected}.")
    dtype = array.dtype if jnp.issubdtype(array.dtype, jnp.floating) else jnp.result_type(float)
    # With its dtype spelled out the array is no longer weakly typed, so that every later value has the same signature.
    with contextlib.nullcontext() if is_traced(array) else jax.ensure_compile_time_eval():
        return jnp.asarray(array, dtype)


def _is_64_bit() -> bool:
    return jnp.result_type(float) == jnp.float64


def check_precision(name: str, tree: PyTree) -> None:
    """Refuse 64-bit arrays while JAX runs in 32 bits: JAX would round them without a word.

    Raises:
        TypeError: a leaf is a 64-bit float or complex array and ``jax_enable_x64`` is off.
    """
    if _is_64_bit():
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # Names, because NumPy takes None for float64 when it compares dtypes. A Python float is weak and adapts.
        dtype = str(leaf.dtype) if isinstance(leaf, np.ndarray | np.generic | jax.Array) else ""
        if dtype in ("float64", "complex128"):
            where = name + jax.tree_util.keystr(path)
            raise TypeError(
                f"{where}: got {dtype} while jax_enable_x64 is off, expected float32. "
                "Turn on 64 bits with jax.config.update('jax_enable_x64', True), or cast with .astype('float32')."
            )


def as_floats(name: str, values: Any) -> jax.Array:
    """Finite real numbers as a floating JAX array, in the precision of the session.

    For numbers that are options, such as a ladder of temperatures. NumPy makes them 64-bit unasked (``np.linspace``), so in
    a 32-bit session they are cast without a word.

    Raises:
        TypeError: ``values`` are not real numbers.
        ValueError: concrete ``values`` are NaN or infinite.

    Example:
        >>> as_floats("levels", [1, 0.5]).tolist()
        [1.0, 0.5]
    """
    if isinstance(values, np.ndarray) and values.dtype == np.float64 and not _is_64_bit():
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    return check_real(name, values).astype(jnp.result_type(float))


def check_one(name: str, value: Any, condition: Callable[[jax.Array], jax.Array], expected: str) -> jax.Array:
    """One real number for which a condition holds, as a floating array of shape ``()``.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: several numbers, or a concrete one for which the condition does not hold.

    Example:
        >>> float(check_one("confidence", 0.5, lambda x: (x > 0) & (x < 1), "a number between 0 and 1"))
        0.5
    """
    array = _as_real(name, value, expected)
    if array.shape != () or (not is_traced(array) and not _holds(condition, array)):
        raise ValueError(f"{name}: got {value}, expected {expected}.")
    return array


def as_number(name: str, value: Any) -> float:
    """One finite real number as Python's, with all its digits.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: several numbers, NaN or an infinity.

    Example:
        >>> as_number("scale", np.float64(0.1))
        0.1
    """
    check_one(name, value, jnp.isfinite, "one finite number")
    return float(value)


def as_positive_number(name: str, value: Any) -> float:
    """One finite, strictly positive real number as Python's.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: several numbers, or one that is zero, negative, NaN or infinite.

    Example:
        >>> as_positive_number("bound", 2)
        2.0
    """
    check_one(name, value, lambda x: jnp.isfinite(x) & (x > 0), "one finite number > 0")
    return float(value)


def check_probability(name: str, value: Any) -> jax.Array:
    """A number in [0, 1], as an array.

    Raises:
        TypeError: ``value`` is not a real number.
        ValueError: a concrete ``value`` is outside [0, 1] or NaN, or several numbers.
    """
    return check_one(name, value, lambda x: (x >= 0.0) & (x <= 1.0), "a probability in [0, 1]")


def check_levels(name: str, levels: Sequence[float], count: int) -> tuple[float, ...]:
    """So many increasing numbers in (0, 1).

    Raises:
        TypeError: they are not numbers.
        ValueError: another number of them, or they do not increase in (0, 1).

    Example:
        >>> check_levels("levels", [0.25, 0.5], 2)
        (0.25, 0.5)
    """
    try:
        levels = tuple(float(level) for level in levels)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {levels!r}, expected {count} increasing levels in (0, 1).") from error
    is_increasing = all(low < high for low, high in zip((0.0, *levels), (*levels, 1.0), strict=True))
    if len(levels) != count or not is_increasing:
        raise ValueError(f"{name}: got {levels}, expected {count} increasing levels in (0, 1).")
    return levels


def as_array(name: str, value: Any) -> jax.Array:
    """A JAX array of data or positions.

    NumPy makes 64-bit floats unasked, and data (unlike parameters) have no tuned last digits to lose, so in a 32-bit
    session they are cast without a word.

    Raises:
        TypeError: ``value`` is not an array of numbers.
    """
    if isinstance(value, np.ndarray | np.generic) and value.dtype == np.float64 and not _is_64_bit():
        value = value.astype(np.float32)
    if isinstance(value, int | float | bool):
        # A nested list is a pytree of numbers, not an array.
        raise TypeError(f"{name}: got a Python number or a list of them, expected an array of shape (row, *event).")
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {type(value).__name__}, expected an array of shape (row, *event).") from error


def as_rows(name: str, rows: PyTree) -> PyTree:
    """Arrays of numbers with a leading axis of at least one row; their values are not looked at.

    Raises:
        TypeError: a leaf is not an array of numbers.
        ValueError: no arrays, an array without rows, or differing numbers of rows.

    Example:
        >>> as_rows("batch", {"x": np.zeros((4, 2), np.float32)})["x"].shape
        (4, 2)
    """
    rows = jax.tree.map(lambda leaf: as_array(name, leaf), rows)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(rows)]
    for shape in shapes:
        if shape[:1] == (0,):
            raise ValueError(f"{name}: got shape {shape}, which is empty, expected at least one row.")
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            f"{name}: got arrays with leading axes {sorted(counts)}, expected one number of rows, at least one, for all: "
            "(row, *event)."
        )
    return rows


def check_key(name: str, key: Any) -> None:
    """One random key, of either kind that JAX has.

    Raises:
        TypeError: it is something else, or several keys.

    Example:
        >>> check_key("key", jax.random.key(0))
    """
    try:
        jax.eval_shape(lambda key: jax.random.bits(key, ()), key)
    except (TypeError, ValueError) as error:
        found = f"shape {jnp.shape(key)} of {key.dtype}" if hasattr(key, "dtype") else type(key).__name__
        raise TypeError(f"{name}: got {found}, expected one random key such as jax.random.key(0).") from error


def check_potential(potential: Potential, event: PyTree, *, name: str = "potential", arguments: Sequence = ()) -> None:
    """Evaluate a potential abstractly on ONE event; it must give a real floating scalar.

    Args:
        potential: The energy, a function of one event (and of ``arguments``).
        event: One event, or its ``jax.ShapeDtypeStruct``.
        name: How the error names the argument.
        arguments: Further positional arguments, such as a condition.

    Raises:
        TypeError: not callable, not a real floating energy, or 64-bit parameters in a 32-bit session.
        ValueError: the energy is not a scalar, or cannot be evaluated on one event.
    """
    if not callable(potential):
        raise TypeError(f"{name}: got {type(potential).__name__}, expected a callable energy of one event.")
    check_precision(name, potential)
    struct = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), event)
    shapes = jax.tree.map(lambda x: tuple(x.shape), struct, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))
    try:
        # Through a function of its own: JAX would look up the potential, comparing the traced numbers that it may hold.
        energy = jax.eval_shape(lambda *inputs: potential(*inputs), struct, *arguments)
    except Exception as error:
        raise ValueError(
            f"{name}: could not be evaluated on one event of shape {shapes} ({type(error).__name__}: {error}). "
            "Expected an energy of ONE event with no batch axis; ebm_ppl maps it over rows and chains itself."
        ) from error
    if not isinstance(energy, jax.ShapeDtypeStruct):
        raise TypeError(f"{name}: returned a {type(energy).__name__}, expected one real floating scalar.")
    if energy.shape != ():
        raise ValueError(
            f"{name}: returned shape {energy.shape} for one event of shape {shapes}, expected a scalar of shape (). "
            "Sum over the event's own axes; ebm_ppl maps the energy over rows and chains itself."
        )
    if not jnp.issubdtype(energy.dtype, jnp.floating):
        raise TypeError(f"{name}: returned dtype {energy.dtype}, expected a real floating energy.")


def check_rows(name: str, data: Any, *, event_shape: tuple[int, ...] | None = None, support: Any = None) -> jax.Array:
    """Rows of one array: at least one, of the right event shape, floating, finite and inside the support.

    Args:
        name: How the error names the argument.
        data: Array of shape ``(row, *event_shape)``.
        event_shape: Shape of one event; not checked when ``None``.
        support: A constraint, called on the rows; not checked when ``None``.

    Returns:
        The data as a JAX array.

    Raises:
        TypeError: the data are not a real floating array.
        ValueError: no rows, a wrong event shape, non-finite values or rows outside the support (with count and first
            index).
    """
    array = as_array(name, data)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}, which is empty; expected at least one row.")
    if event_shape is not None and array.shape[1:] != tuple(event_shape):
        raise ValueError(
            f"{name}: got event shape {array.shape[1:]} (array shape {array.shape}), expected {tuple(event_shape)}."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected a real floating array.")
    if is_traced(array):
        return array
    # Concrete data may be checked while a program around them is being compiled.
    with jax.ensure_compile_time_eval():
        _refuse_rows(name, array, ~jnp.isfinite(array), "that are NaN or infinite", "finite values")
        if support is not None and not is_traced(support):
            _refuse_rows(name, array, ~jnp.asarray(support(array)), "outside the support", f"values in {support}")
    return array


def _refuse_rows(name: str, array: jax.Array, bad: jax.Array, what: str, expected: str) -> None:
    bad_rows = on_host(bad).reshape(array.shape[0], -1).any(axis=1)
    if bad_rows.any():
        first = int(np.argmax(bad_rows))
        raise ValueError(
            f"{name}: got {int(bad_rows.sum())} of {array.shape[0]} rows {what}, the first at index {first}; "
            f"expected {expected}."
        )


OFF_SPHERE = 1e-3
"""How far from one the length of what is called a unit vector may be."""


def check_unit_vectors(name: str, rows: Any, *, what: str = "row") -> None:
    """Vectors ``(row, d)`` of length one, as far as values are concrete.

    Raises:
        ValueError: another shape, or other lengths (with count and first index).

    Example:
        >>> check_unit_vectors("data", jnp.array([[0.6, 0.8]]))
    """
    shape = jnp.shape(rows) if hasattr(rows, "shape") else ()
    if len(shape) != 2 or shape[1] < 2:
        found = shape or type(rows).__name__
        raise ValueError(f"{name}: got {found}, expected unit vectors, ({what}, d) with d >= 2.")
    if is_traced(rows):
        return
    length = np.linalg.norm(np.asarray(on_host(rows), np.float64), axis=1)
    bad = ~(np.abs(length - 1.0) <= OFF_SPHERE)
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"{name}: got {int(bad.sum())} of {len(length)} {what}s that are not unit vectors, the first at index {first} "
            f"(length {length[first]:.4g}); expected |x| = 1. Divide them by their lengths."
        )


def check_finite_energy(name: str, potential: Potential, rows: PyTree, *, what: str = "row") -> None:
    """The energy must be finite at every one of the given rows.

    Raises:
        NonFiniteEnergyError: with the count, the first index and the value there.
    """
    if is_traced(potential, rows):
        return
    energies = on_host(map_energy(potential, rows))
    bad = ~np.isfinite(energies)
    if bad.any():
        first = int(np.argmax(bad))
        raise NonFiniteEnergyError(
            f"{name}: the energy is not finite at {int(bad.sum())} of {bad.size} {what}s, the first at index {first} "
            f"(energy {energies[first]}); expected finite energies. Check the parameters for NaN and the {what}s "
            "against the support of the base distribution."
        )


@eqx.filter_jit
def map_energy(potential: Potential, rows: PyTree) -> jax.Array:
    """Energies of all rows, ``(row,)``, a bounded number of rows at a time so that memory does not grow with them."""
    # Each device of a mesh goes through its own rows.
    parts = num_parts(rows)
    if parts == 1 or jax.tree.leaves(rows)[0].shape[0] % parts:
        return jax.lax.map(potential, rows, batch_size=4096)
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
    energies = jax.vmap(lambda part: jax.lax.map(potential, part, batch_size=4096))(over_chains(split))
    return over_chains(energies.reshape(-1))
