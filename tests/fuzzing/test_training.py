"""``init_train``, ``fit``, tuning and optimizers: data, loaders, batch sizes, optimizers and options of all kinds."""

import functools
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import ebm_ppl as ebm
from ebm_ppl import optimizers
from tests.fuzzing.contract import assert_finite
from tests.fuzzing.strategies import choices, counts, functions, keys, not_callable, numbers, rows
from tests.fuzzing.subjects import Subject, calls_of

KEY = jax.random.key(1)
DATA = np.array([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6], [0.7, 0.8]], np.float32)


class Scale(eqx.Module):
    """An energy with one parameter."""

    scale: jax.Array

    def __call__(self, x: Any) -> Any:
        return 0.5 * self.scale * jnp.sum(x**2)


POTENTIAL = Scale(jnp.ones(()))
KERNEL = ebm.kernels.mala(step_size=0.1)
SAMPLER = ebm.init_sampler(DATA, KERNEL)
ADAM = optax.adam(1e-2)
PCD = functools.partial(ebm.objectives.persistent_contrastive_divergence, num_steps=1)
STATE = ebm.init_train(POTENTIAL, ADAM, SAMPLER)
POTENTIALS = st.one_of(
    functions(),
    st.sampled_from(
        (
            POTENTIAL,
            Scale(jnp.array(jnp.nan)),
            Scale(jnp.array(1e38)),
            Scale(jnp.ones(2)),
            Scale(jnp.ones((), int)),
            Scale(np.ones(())),
            Scale(jnp.ones((), jnp.float16)),
            Scale(jnp.array(1j)),
        )
    ),
)
OPTIMIZERS = st.one_of(not_callable(), st.sampled_from((ADAM, optax.sgd(1e-2), optax.MultiSteps(ADAM, 2), optax.adam)))
LOADERS: tuple[Any, ...] = (
    [DATA, DATA],
    [DATA, DATA[:2]],
    [DATA, np.full_like(DATA, np.nan)],
    [DATA, None],
    [None],
    [],
    iter([DATA]),
    (DATA for _ in range(3)),
    [DATA.astype(np.float64)],
    [{"x": DATA}],
    [[DATA], [DATA]],
    [DATA.astype(object)],
    [np.zeros((0, 2), np.float32)],
    ["rows"],
    [1.0, 2.0],
    [1e38 * DATA],
    range(3),
)


def fit(**arguments: Any) -> Any:
    """``ebm.fit``, whose warnings are no failures here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return ebm.fit(**arguments, progress_bar=False)


def judge(result: Any, arguments: dict[str, Any]) -> None:
    """Training that came to an end is finite in all that it carries on."""
    state, history = result
    assert_finite(
        (state.potential, state.sampler.position if state.sampler is not None else None, state.optimizer_state)
    )
    assert np.isfinite(history["loss"]).all()
    assert np.isfinite(history["grad_norm"]).all()


def updates_are_finite(optimizer: Any, shape: tuple[int, ...]) -> Any:
    def update(gradient: Any) -> Any:
        """One update from a gradient.

        Raises:
            ValueError: see the optimizer.
        """
        parameters = jnp.full(shape, 0.5)
        gradient = jnp.broadcast_to(jnp.asarray(gradient, float), shape)
        updates, _ = optimizer.update(gradient, optimizer.init(parameters), parameters)
        return updates

    return update


RATES = st.one_of(numbers().filter(lambda rate: not isinstance(rate, np.ndarray)), functions())
SUBJECTS = (
    Subject(
        "fit",
        fit,
        {
            "key": KEY,
            "state": STATE,
            "data": DATA,
            "objective": PCD,
            "optimizer": ADAM,
            "num_steps": 1,
            "report_every": 1,
        },
        {
            "key": keys(),
            "state": functions(),
            "data": st.one_of(rows((4, 2)), rows((4, 2)), st.sampled_from(LOADERS)),
            "objective": not_callable(),
            "optimizer": OPTIMIZERS,
            "num_steps": counts(2),
            "batch_size": counts(5),
            "report_every": counts(1),
            "target_acceptance": numbers(),
            "sampler_objective": not_callable(),
            "sampler_optimizer": OPTIMIZERS,
            "early_stopping": not_callable(),
            "evaluate": not_callable(),
        },
        documented=(ebm.fit,),
        judge=judge,
        cases=700,
        is_quick=False,
    ),
    Subject(
        "init_train",
        ebm.init_train,
        {"potential": POTENTIAL, "optimizer": ADAM, "sampler": SAMPLER},
        {
            "potential": POTENTIALS,
            "optimizer": OPTIMIZERS,
            "sampler": not_callable(),
            "sampler_optimizer": OPTIMIZERS,
            "average_decay": numbers(),
        },
        cases=400,
        may_be_nan=(r"potential",),  # without chains there is nothing to look at it with
    ),
    Subject(
        "EarlyStopping",
        ebm.EarlyStopping,
        {"metric": "loss"},
        {"metric": choices("loss"), "patience": counts(), "min_delta": numbers(), "maximize": choices(True, False)},
        cases=250,
    ),
    Subject(
        "tune_step_size",
        ebm.tune_step_size,
        {"key": KEY, "potential": POTENTIAL, "sampler": SAMPLER, "num_iterations": 1, "target_acceptance": 0.95},
        {
            "key": keys(),
            "potential": POTENTIALS,
            "sampler": not_callable(),
            "target_acceptance": numbers(),
            "num_iterations": counts(1),
            "num_steps": counts(1),
        },
        may_be_nan=(".*",),
        cases=80,
        is_quick=False,
    ),
    Subject(
        "tune_ladder",
        ebm.tune_ladder,
        {
            "key": KEY,
            "potential": POTENTIAL,
            "num_rounds": 1,
            "num_steps": 1,
            "sampler": ebm.init_sampler(DATA, ebm.kernels.replica_exchange([1.0, 0.5], inner=KERNEL)),
        },
        {
            "key": keys(),
            "potential": POTENTIALS,
            "sampler": not_callable(),
            "target_swap_rate": numbers(),
            "num_rounds": counts(1),
            "num_steps": counts(1),
        },
        cases=80,
        is_quick=False,
    ),
    Subject(
        "set_tunables",
        lambda sampler, step_size: ebm.adaptation.set_tunables(sampler, step_size=step_size),
        {"sampler": SAMPLER, "step_size": 0.2},
        {"step_size": numbers()},
        documented=(ebm.adaptation.set_tunables,),
        cases=150,
    ),
    Subject(
        "measure_descent",
        optimizers.measure_descent,
        {"weight_rate": 0.1},
        {"weight_rate": RATES, "feature_rate": RATES, "bound": numbers()},
        cases=150,
    ),
    Subject("total_variation_projection", optimizers.total_variation_projection, {"bound": 1.0}, {"bound": numbers()}),
    Subject("mean_square_projection", optimizers.mean_square_projection, {"bound": 1.0}, {"bound": numbers()}),
    *(
        Subject(
            f"updates of {name}",
            updates_are_finite(optimizer, (2, 2)),
            {"gradient": np.ones((2, 2), np.float32)},
            {
                "gradient": st.builds(
                    lambda x, y: np.array([[x, y], [0.0, 1.0]], np.float32),
                    st.floats(-1e4, 1e4, width=32),
                    st.floats(-1e4, 1e4, width=32),
                )
            },
            cases=100,
        )
        for name, optimizer in {
            "sphere_step": optax.chain(optax.sgd(0.1), optimizers.sphere_step()),
            "exponentiated_step": optax.chain(optax.sgd(1e-3), optimizers.exponentiated_step()),
            "total_variation_projection": optimizers.total_variation_projection(1.0),
            "mean_square_projection": optimizers.mean_square_projection(1.0),
        }.items()
    ),
)

test_some_calls, test_many_calls = calls_of("training", SUBJECTS)
