"""Arguments of every kind: numbers, counts, arrays, keys, functions, and things that are none of these.

Shapes are few, so that programs are compiled once and used for many cases; dtypes and contents are many.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests.fuzzing.contract import CallersError

SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), -float("inf"), 1e-38, 1e38, 1e-300, 1e300, 1e-7)
"""Numbers at which code that was tried on ordinary ones breaks."""

NOT_NUMBERS: tuple[Any, ...] = (
    None,
    True,
    False,
    "3",
    "",
    3 + 0j,
    [],
    {},
    (1.0, 2.0),
    object(),
    np.array("x"),
    np.bool_(True),
    np.complex64(1j),
    np.zeros(0, np.float32),
    np.full((2, 2), 0.5, np.float32),
    np.array([0.1, float("nan")], np.float32),
    lambda x: x,
    np.datetime64("2020-01-01"),
)
"""What may stand where one number belongs."""

SHAPES = ((), (0,), (1,), (2,), (3,), (4, 2), (4, 3), (1, 2), (0, 2), (4, 0), (4, 2, 1))
DTYPES = (
    "float32",
    "float32",
    "float32",
    "float16",
    "bfloat16",
    "float64",
    "int32",
    "int8",
    "uint8",
    "int64",
    "bool",
    "complex64",
    "object",
)
FILLS = ("normal", "normal", "zeros", "one nan", "inf", "-inf", "1e38", "-1e38", "1e-38", "bits", "big")


def _spelled(value: float, spell: Any) -> Any:
    with np.errstate(over="ignore"):
        return spell(value)


def numbers() -> st.SearchStrategy:
    """Real numbers as Python, NumPy and JAX spell them, and what is no number."""
    floats = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32), st.integers(-3, 3))
    spelled = st.builds(
        _spelled,
        floats,
        st.sampled_from((float, float, np.float32, np.float64, jnp.float32, lambda x: jnp.asarray(x, jnp.bfloat16))),
    )
    return st.one_of(spelled, st.integers(-2, 3), st.sampled_from(NOT_NUMBERS))


def counts(most: int = 3) -> st.SearchStrategy:
    """Whole numbers, too small ones, and what is no whole number."""
    right = st.one_of(st.integers(-2, most), st.integers(1, most).map(np.int64), st.integers(1, most).map(np.uint8))
    return st.one_of(right, st.sampled_from((*NOT_NUMBERS, 1.0, 2.5, float("nan"), float("inf"), jnp.int32(2))))


def _array(shape: tuple[int, ...], dtype: str, fill: str, seed: int, as_jax: bool) -> Any:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape)
    if fill == "one nan" and values.size:
        values.flat[generator.integers(values.size)] = np.nan
    elif fill == "bits":
        values = generator.integers(0, 2, size=shape).astype(float)
    elif fill == "big":
        values = 1e5 * values
    elif fill == "zeros":
        values = np.zeros(shape)
    elif fill not in ("normal", "one nan"):
        values = np.full(shape, float(fill))
    with np.errstate(all="ignore"):
        cast = np.asarray(values).astype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
    if dtype == "object" or (dtype in ("float64", "int64") or not as_jax):
        return cast
    return jnp.asarray(cast)


def arrays(*shapes: tuple[int, ...]) -> st.SearchStrategy:
    """Arrays of NumPy and JAX of these shapes, or of :data:`SHAPES`; of all dtypes; with all contents."""
    return st.builds(
        _array,
        st.sampled_from(shapes or SHAPES),
        st.sampled_from(DTYPES),
        st.sampled_from(FILLS),
        st.integers(0, 7),
        st.booleans(),
    )


def rows(shape: tuple[int, ...]) -> st.SearchStrategy:
    """Data or positions: arrays of the right shape half of the time, of any other, lists, trees, and no arrays."""
    others = st.sampled_from(
        (
            None,
            "data",
            3,
            2.5,
            [],
            [[1.0, 2.0]],
            [1.0, "one"],
            {},
            object(),
            {"x": np.zeros((4, 2), np.float32)},
            (np.zeros((4, 2), np.float32), np.zeros((3, 2), np.float32)),
            [None],
            lambda x: x,
        )
    )
    return st.one_of(arrays(shape), arrays(shape), arrays(), others)


def keys() -> st.SearchStrategy:
    """Keys of both kinds, several at once, of another generator, and what is none."""
    return st.sampled_from(
        (
            jax.random.key(0),
            jax.random.key(5),
            jax.random.PRNGKey(0),
            np.zeros(2, np.uint32),
            None,
            0,
            "key",
            jax.random.split(jax.random.key(0)),
            jax.random.split(jax.random.PRNGKey(0), 3),
            jnp.zeros(2),
            jnp.zeros(3, jnp.uint32),
            jnp.zeros(2, jnp.int32),
            jax.random.key(0, impl="rbg"),
            [1, 2],
            object(),
        )
    )


class Raises:
    """A callable that fails in its own way."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise CallersError("of the caller's own")


def potentials() -> st.SearchStrategy:
    """Energies of one event, right and wrong."""
    return st.sampled_from(
        (
            *_ENERGIES,
            *_ENERGIES[:4],
            None,
            "energy",
            3.0,
            object(),
            Raises(),
            jnp.zeros(2),
        )
    )


def _quadratic(x: Any) -> Any:
    return 0.5 * jnp.sum(x**2)


def _flat(x: Any) -> Any:
    return 0.0 * jnp.sum(x)


def _nan_beyond_one(x: Any) -> Any:
    return jnp.sum(jnp.sqrt(1.0 - x**2))


def _always_nan(x: Any) -> Any:
    return jnp.sum(x) * jnp.nan


def _minus_infinity(x: Any) -> Any:
    return jnp.where(jnp.sum(x) > 0, -jnp.inf, 0.0)


def _steep(x: Any) -> Any:
    return 1e30 * jnp.sum(x**4)


def _bottomless(x: Any) -> Any:
    return -jnp.sum(x**4)


_ENERGIES = (
    _quadratic,
    _steep,
    _nan_beyond_one,
    _always_nan,
    _minus_infinity,
    _bottomless,
    _flat,
    lambda x: x,
    lambda x: jnp.sum(x, keepdims=True),
    lambda x: 1,
    lambda x: 1.0,
    lambda x: None,
    lambda x: "energy",
    lambda x: jnp.sum(x) > 0,
    lambda x: jnp.sum(x) * 1j,
    lambda x: (jnp.sum(x), jnp.sum(x)),
    lambda x: x[100, 100],
    lambda: 0.0,
    lambda x, y: jnp.sum(x) + y,
)


def not_callable() -> st.SearchStrategy:
    """What stands where a kernel or another function belongs, and cannot be called."""
    return st.sampled_from((None, "name", 3, 0.5, object(), {}, (), [1], np.zeros(2), True))


def functions() -> st.SearchStrategy:
    """What stands where a function, a kernel, a distribution or an optimizer belongs, and is none."""
    return st.sampled_from(
        (None, "name", 3, 0.5, object(), Raises(), {}, (), [1], lambda: None, lambda x: x, np.zeros(2))
    )


def choices(*right: Any) -> st.SearchStrategy:
    """One of several names, or something else."""
    return st.sampled_from((*right, "another", "", None, 0, True, object(), ["name"], 1.5))


def sequences() -> st.SearchStrategy:
    """Levels, values, ladders, shapes: short sequences of numbers, and none."""
    inside = st.lists(st.one_of(st.sampled_from(SPECIAL), st.integers(-2, 4), st.floats(0.0, 1.0)), max_size=4)
    return st.one_of(
        inside, inside.map(tuple), st.lists(st.sampled_from(("three", None, 1j, True)), max_size=3), numbers()
    )
