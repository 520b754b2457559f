"""Potentials, targets and temperature: shapes, weights, couplings, names and options of all kinds."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from hypothesis import strategies as st

import ebm_ppl as ebm
from ebm_ppl import potentials, targets, temperature
from tests.fuzzing import strategies
from tests.fuzzing.contract import assert_finite
from tests.fuzzing.strategies import arrays, choices, counts, functions, keys, not_callable, numbers, rows, sequences
from tests.fuzzing.subjects import Subject, calls_of

KEY = jax.random.key(0)
NORMAL = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
SHAPES = st.one_of(
    counts(4), st.sampled_from(((2, 2), (), (0, 2), (2, -1), (2.0, 2), "two", (2, 2, 2), [2, 2], (True, 2)))
)
GRIDS = st.one_of(SHAPES, sequences())
WEIGHTS = st.one_of(arrays((2, 2), (3, 2), (2,), (3,), ()), numbers())
LAWS = st.one_of(functions(), st.sampled_from((NORMAL, dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0).expand([3]))))


def quadratic(x: Any) -> Any:
    return 0.5 * jnp.sum(x**2)


def energy_is_finite(event: Any) -> Any:
    """The judge of a potential: it is made, and its energy at an ordinary event is a finite number."""

    def judge(result: Any, arguments: dict[str, Any]) -> None:
        energy = result(event)
        assert energy.shape == ()

    return judge


def options_of(name: str) -> Any:
    def get(**options: Any) -> Any:
        return targets.get(name, **options)

    return get


def target_is_finite(result: Any, arguments: dict[str, Any]) -> None:
    """A target that was made has a finite log Z, and finite energies at its own draws."""
    if any(isinstance(option, jax.Array | float) and abs(option) > 1e4 for option in arguments.values()):
        return  # whose draws may leave float32
    assert np.isfinite(result.log_normalizer)
    if isinstance(result, targets.Target):
        draws = result.sample(KEY, 4)
        assert_finite((draws, jax.vmap(result.potential)(draws)))


# The suite checks the annotations of the targets at every call, so that another type never reaches them.
FLOATS = st.one_of(st.sampled_from(strategies.SPECIAL), st.floats(width=32))
COUNTS = st.integers(-2, 6)
TARGET_OPTIONS = {
    "gaussian": {"dim": COUNTS},
    "banana": {"scale": FLOATS, "curvature": FLOATS},
    "funnel": {"dim": COUNTS, "scale": FLOATS},
    "ring": {"radius": FLOATS, "width": FLOATS},
    "student_t": {"degrees_of_freedom": FLOATS},
    "truncated_normal": {"low": FLOATS, "high": FLOATS},
    "many_well": {"dim": COUNTS},
    "gaussian_mixture": {"log_normalizer": FLOATS},
}
LINEAR = eqx.nn.Linear(2, 2, key=KEY)
SUBJECTS = (
    Subject(
        "MLP",
        potentials.MLP,
        {"event_shape": 2, "key": KEY, "width": 4, "depth": 1},
        {
            "event_shape": SHAPES,
            "key": keys(),
            "width": counts(),
            "depth": counts(2),
            "activation": not_callable(),
            "zero_init": choices(True, False),
            "spectral_norm": numbers(),
        },
        cases=200,
    ),
    Subject(
        "Conv",
        potentials.Conv,
        {"event_shape": (4, 4, 1), "key": KEY, "channels": (2,), "width": 4},
        {
            "event_shape": SHAPES,
            "key": keys(),
            "channels": GRIDS,
            "width": counts(),
            "activation": not_callable(),
            "spectral_norm": numbers(),
        },
        cases=150,
        is_quick=False,
    ),
    Subject(
        "ShallowEnergy",
        potentials.ShallowEnergy,
        {"event_size": 2, "key": KEY, "width": 4},
        {
            "event_size": counts(),
            "key": keys(),
            "width": counts(6),
            "regime": choices("features", "lazy"),
            "domain": choices("sphere", "euclidean"),
            "signs": st.one_of(choices("negative"), arrays((4,), (3,))),
            "scale": numbers(),
            "activation": not_callable(),
        },
        cases=200,
        is_quick=False,
    ),
    Subject(
        "RBM",
        potentials.RBM,
        {
            "weights": np.zeros((3, 2), np.float32),
            "visible_bias": np.zeros(3, np.float32),
            "hidden_bias": np.zeros(2, np.float32),
        },
        {"weights": WEIGHTS, "visible_bias": WEIGHTS, "hidden_bias": WEIGHTS},
        cases=200,
    ),
    Subject(
        "BoltzmannMachine",
        potentials.BoltzmannMachine,
        {"weights": np.zeros((2, 2), np.float32), "biases": np.zeros(2, np.float32)},
        {"weights": WEIGHTS, "biases": WEIGHTS, "coding": choices("binary", "spin")},
        cases=200,
    ),
    Subject(
        "Ising",
        potentials.Ising,
        {"shape": (2, 2), "coupling": 0.3},
        {"shape": GRIDS, "coupling": WEIGHTS, "field": WEIGHTS, "periodic": choices(True, False)},
        cases=200,
    ),
    Subject(
        "Potts",
        potentials.Potts,
        {"shape": (2, 2), "num_states": 3, "coupling": 0.3},
        {"shape": GRIDS, "num_states": counts(), "coupling": WEIGHTS, "field": WEIGHTS},
        cases=200,
    ),
    Subject(
        "SpectralNorm",
        potentials.SpectralNorm,
        {"layer": LINEAR},
        {"layer": functions(), "bound": numbers(), "num_iterations": counts()},
    ),
    Subject(
        "add",
        lambda first, second: potentials.add(first, second),
        {"first": quadratic, "second": quadratic},
        {"first": strategies.potentials(), "second": not_callable()},
        documented=(potentials.add,),
        names=("potentials",),
        judge=lambda result, arguments: None,
        cases=60,
    ),
    Subject(
        "temper",
        potentials.temper,
        {"potential": quadratic, "inverse_temperature": 0.5},
        {"potential": not_callable(), "inverse_temperature": numbers()},
    ),
    Subject(
        "tilt",
        potentials.tilt,
        {"potential": quadratic, "base": NORMAL},
        {"potential": not_callable(), "base": LAWS},
        cases=60,
    ),
    Subject(
        "with_log_normalizer",
        potentials.with_log_normalizer,
        {"potential": quadratic},
        {"potential": not_callable(), "log_normalizer": numbers()},
    ),
    Subject(
        "ShortRun",
        potentials.ShortRun,
        {"potential": quadratic, "kernel": ebm.kernels.short_run(2, NORMAL, step_size=0.1)},
        {"potential": not_callable(), "kernel": st.one_of(functions(), st.just(ebm.kernels.mala(0.1)))},
        cases=30,
    ),
    *(
        Subject(
            f"target {name}",
            options_of(name),
            {},
            odd,
            documented=(targets.get,),
            names=(name, *odd),
            judge=target_is_finite,
            # A single whole number has few forms, and all of them are tried.
            cases=9 if set(odd) == {"dim"} else 60,
        )
        for name, odd in TARGET_OPTIONS.items()
    ),
    Subject(
        "get",
        targets.get,
        {"name": "gaussian"},
        {"name": st.one_of(st.sampled_from(targets.names()[:3]), st.text(max_size=3))},
        cases=10,
        judge=target_is_finite,
    ),
    Subject(
        "get_discrete",
        targets.get_discrete,
        {"name": targets.discrete_names()[0]},
        {"name": st.sampled_from(("ising", "rbm", ""))},
        judge=target_is_finite,
        cases=3,
    ),
    Subject(
        "get_planar",
        targets.get_planar,
        {"name": targets.planar_names()[0]},
        {"name": st.sampled_from(("moons", "rings", ""))},
        judge=target_is_finite,
        cases=3,
    ),
    Subject(
        "fitted_temperature",
        temperature.fitted_temperature,
        {"potential": quadratic, "data": np.array([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6], [0.7, 0.8]], np.float32)},
        {"potential": strategies.potentials(), "data": rows((4, 2))},
        may_be_nan=(".*",),
        cases=100,
        is_quick=False,
        names=("batch",),
    ),
    Subject(
        "check_temperature",
        temperature.check_temperature,
        {"potential": quadratic, "data": np.asarray(jax.random.normal(KEY, (4096, 2)))},
        {"potential": strategies.potentials(), "data": rows((4, 2)), "tolerance": numbers()},
        may_be_nan=(".*",),
        cases=100,
        is_quick=False,
        names=("batch",),
    ),
)

test_some_calls, test_many_calls = calls_of("potentials", SUBJECTS)
