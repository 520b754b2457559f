"""A long training in which nothing may grow: ``make soak``.

It lasts as many seconds as the environment variable ``EBM_PPL_SOAK_SECONDS`` says, 60 when it says nothing: ``make soak``
asks for an hour, and ``make soak SOAK_SECONDS=600`` for ten minutes. The memory of the process and the number of arrays at
the end are compared with those after a tenth of it. The time of an update is printed, not asserted: it depends on what
else the machine does.
"""

import gc
import os
import statistics
import time

import jax
import numpy as np
import pytest

import ebm_ppl as ebm
from tests.benchmarks.growth import USUAL, problem, resident, train

SECONDS = float(os.environ.get("EBM_PPL_SOAK_SECONDS", "60"))
AT_ONCE = 500


@pytest.mark.slow
def test_a_long_training_holds_its_memory(capsys):
    made = problem(**USUAL)
    # Half a million updates make an energy so steep that steps of a fixed size freeze, and its constant drifts to 1e5;
    # `fit` tells both. So the step size follows an acceptance rate, and energies are kept near zero.
    made = made._replace(objective=ebm.objectives.energy_l2(made.objective, 0.01))
    options = {"target_acceptance": 0.6}
    state, _ = train(made, AT_ONCE, **options)
    arrays, memory, seconds, start = [], [], [], time.monotonic()
    # Ten pieces at least, so that there is a tenth to compare with however slow the machine.
    while time.monotonic() - start < SECONDS or len(seconds) < 10:
        state, took = train(made._replace(state=state), AT_ONCE, **options)
        gc.collect()
        arrays.append(len(jax.live_arrays()))
        memory.append(resident())
        seconds.append(1e3 * took / AT_ONCE)
    tenth = len(seconds) // 10
    first, last = statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])
    with capsys.disabled():
        print(
            f"\n{int(state.step)} updates in {time.monotonic() - start:.0f} s: {first:.2f} ms each in the first tenth, "
            f"{last:.2f} in the last; {memory[tenth - 1] / 1e6:.0f} MB then, {memory[-1] / 1e6:.0f} MB at the end; "
            f"{arrays[tenth - 1]} and {arrays[-1]} arrays."
        )
    assert int(state.step) == AT_ONCE * (1 + len(seconds))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.sampler.position))
    assert set(arrays) == {arrays[0]}
    # Of the middle of a tenth, since single readings go up and down by what the allocator keeps.
    assert np.median(memory[-tenth:]) < 1.02 * np.median(memory[:tenth])
