"""Readers of results: draws, traces, histories and their names of all kinds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import ebm_ppl as ebm
from ebm_ppl import diagnostics
from tests.fuzzing.strategies import arrays, choices, counts, functions, keys, not_callable, numbers, potentials, rows
from tests.fuzzing.subjects import Subject, calls_of

KEY = jax.random.key(1)
TRACE = np.asarray(jax.random.normal(KEY, (4, 20)))
TRACES = st.one_of(arrays((4, 20), (4, 8), (1, 20), (4, 3), (2, 4)), rows((4, 20)))
MOVED, DRAWS = ebm.draw(KEY, lambda x: 0.5 * jnp.sum(x**2), ebm.init_sampler(TRACE[:, :2], ebm.kernels.mala(0.3)), 20)
TREE = diagnostics.to_datatree(DRAWS)
DATA = TRACE[:, :2]


def odd_draws() -> st.SearchStrategy:
    """Draws of which one field has been replaced."""
    fields = {
        "position": st.one_of(arrays((4, 20), (4, 20, 2), (3, 20), (4,)), not_callable()),
        "potential": arrays((4, 20), (4,)),
        "acceptance_rate": arrays((4, 20), (4,)),
        "log_weight": arrays((4, 20), (4,)),
        "is_divergent": arrays((4, 20), (4,)),
        "num_gradients": arrays((4, 20), (4,)),
    }
    return st.sampled_from(sorted(fields)).flatmap(
        lambda name: fields[name].map(lambda value: DRAWS._replace(**{name: value}))
    )


def summarised(draws: Any) -> Any:
    """The summary of a trace, by way of its tree.

    Raises:
        TypeError: see :func:`ebm_ppl.diagnostics.to_datatree`.
        ValueError: see there.
    """
    return diagnostics.summary(diagnostics.to_datatree(draws))


def no_judgement(result: Any, arguments: dict[str, Any]) -> None:
    """Trees carry what they were given."""


def is_check(result: Any, arguments: dict[str, Any]) -> None:
    """A check has one of four outcomes, and one that saw something that is no number is not passed."""
    assert result.status in ("pass", "warn", "fail", "not assessable")
    assert np.isfinite(result.value) or result.status != "pass"


def ess_is_a_number(result: Any, arguments: dict[str, Any]) -> None:
    """An effective sample size is never negative, and never NaN where the trace is finite and long enough."""
    found = np.asarray(result)
    assert not (found < 0).any()
    assert not np.isinf(found).any()


CHECKS = {
    "check_acceptance": (diagnostics.check_acceptance, "acceptance_rate"),
    "check_divergences": (diagnostics.check_divergences, "is_divergent"),
    "check_nonfinite": (diagnostics.check_nonfinite, "values"),
    "check_frozen": (diagnostics.check_frozen, "position"),
    "check_bfmi": (diagnostics.check_bfmi, "hamiltonian"),
    "check_ess": (diagnostics.check_ess, "values"),
    "check_rhat": (diagnostics.check_rhat, "values"),
}
# What the procedure hands to its checks was made by the package: these read arrays of real numbers (chain, draw).
REAL = arrays((4, 20), (4, 8), (1, 20)).filter(lambda x: x.dtype in (np.dtype("float32"), np.dtype("float64")))
SUBJECTS = (
    Subject(
        "to_datatree",
        diagnostics.to_datatree,
        {"draws": DRAWS},
        {
            "draws": st.one_of(functions(), odd_draws()),
            "site": choices("x", "y"),
            "sampler": not_callable(),
            "history": not_callable(),
            "superchain_ids": st.one_of(not_callable(), arrays((4,), (3,))),
            "num_steps": counts(),
            "start": choices("noise"),
        },
        judge=no_judgement,
        cases=300,
    ),
    Subject(
        "summary",
        diagnostics.summary,
        {"tree": TREE},
        {
            "tree": st.one_of(functions(), st.just(TREE)),
            "group": choices("negative_phase", "posterior"),
            "var_names": choices("x", "potential"),
        },
        judge=no_judgement,
        cases=100,
    ),
    Subject(
        "summary of odd draws",
        summarised,
        {"draws": DRAWS},
        {"draws": odd_draws()},
        judge=no_judgement,
        documented=(diagnostics.to_datatree, diagnostics.summary),
        cases=150,
    ),
    Subject(
        "ess",
        diagnostics.ess,
        {"values": TRACE},
        {"values": TRACES, "method": choices("bulk", "tail", "mean")},
        judge=ess_is_a_number,
        cases=300,
    ),
    Subject("rhat", diagnostics.rhat, {"values": TRACE}, {"values": TRACES}, judge=no_judgement, cases=200),
    Subject(
        "rhat_nested",
        diagnostics.rhat_nested,
        {"values": TRACE, "superchain_ids": np.array([0, 0, 1, 1])},
        {"values": TRACES, "superchain_ids": st.one_of(not_callable(), arrays((4,), (3,)))},
        judge=no_judgement,
        cases=200,
    ),
    Subject(
        "energy_distance",
        diagnostics.energy_distance,
        {"first": DATA, "second": DATA + 1.0},
        {"first": rows((4, 2)), "second": rows((4, 2))},
        may_be_nan=(r"\.value", r"\.standard_error"),
        cases=200,
    ),
    Subject(
        "energy_gap",
        diagnostics.energy_gap,
        {"potential": lambda x: 0.5 * jnp.sum(x**2), "data": DATA, "draws": DRAWS},
        {"potential": potentials(), "data": rows((4, 2)), "draws": not_callable()},
        may_be_nan=(".*",),
        cases=100,
        is_quick=False,
    ),
    Subject(
        "find_escape",
        diagnostics.find_escape,
        {"key": KEY, "potential": lambda x: -jnp.sum(x**4), "data": DATA},
        {"key": keys(), "potential": potentials(), "data": rows((4, 2))},
        judge=no_judgement,
        cases=60,
        is_quick=False,
    ),
    Subject(
        "duality_gap",
        diagnostics.duality_gap,
        {
            "potential": ebm.potentials.ShallowEnergy(2, key=KEY, width=4),
            "data": DATA / np.linalg.norm(DATA, axis=1, keepdims=True),
            "negatives": DATA / np.linalg.norm(DATA, axis=1, keepdims=True),
            "bound": 1.0,
            "num_ascents": 2,
        },
        {
            "potential": functions(),
            "data": rows((4, 2)),
            "negatives": rows((4, 2)),
            "bound": numbers(),
            "num_ascents": counts(2),
        },
        judge=no_judgement,
        cases=60,
        is_quick=False,
    ),
    Subject(
        "autocorrelation_time",
        diagnostics.autocorrelation_time,
        {"history": {"energy_autocorrelation": np.full(5, 0.5)}, "num_steps": 1},
        {
            "history": st.builds(lambda x: {"energy_autocorrelation": x}, arrays((3,), (0,))),
            "num_steps": counts(),
            "window": counts(),
        },
        judge=no_judgement,
        cases=100,
    ),
    *(
        Subject(
            name,
            function,
            {argument: TRACE if name != "check_divergences" else TRACE > 5},
            {argument: REAL},
            judge=is_check,
            cases=60,
        )
        for name, (function, argument) in CHECKS.items()
    ),
)

test_some_calls, test_many_calls = calls_of("diagnostics", SUBJECTS)
