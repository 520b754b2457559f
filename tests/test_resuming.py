"""Runs that are interrupted, killed and cut into pieces end where the uninterrupted run ends, to the last bit."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import ebm_ppl as ebm
from tests import resumed_run
from tests.resumed_run import KEY, OBJECTIVE, data, digest, fresh_state, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def heard():
    """Python's own handler of Ctrl-C: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted():
    return digest(train(fresh_state(), 60))


@pytest.mark.parametrize("chunks", [[(1, 10), (13, 10), (46, 10)], [(60, 7)], [(20, 20), (35, 5), (5, 100)]])
def test_chunks_do_not_matter(uninterrupted, tmp_path, chunks):
    """Through a file after every part; ``(num_steps, report_every)``."""
    state = fresh_state()
    for num_steps, report_every in chunks:
        state = train(state, num_steps, report_every=report_every)
        ebm.checkpoint.save(tmp_path / "a", state)
        state = ebm.checkpoint.restore(tmp_path / "a", like=fresh_state())
    assert digest(state) == uninterrupted


def test_the_last_save_is_where_training_ended(tmp_path):
    with ebm.checkpoint.Checkpoints(tmp_path, keep=10) as checkpoints:
        state = train(fresh_state(), 35, save=checkpoints.save, save_every=20)
    assert checkpoints.steps() == [20, 35]
    assert digest(checkpoints.restore(like=fresh_state())) == digest(state)


def test_nobody_is_asked_to_save_twice():
    steps = []
    train(fresh_state(), 20, save=lambda state: steps.append(int(state.step)))
    assert steps == [10, 20]


def test_what_saves_must_be_a_function():
    with pytest.raises(TypeError, match="save: got str"):
        train(fresh_state(), 1, save="here")
    with pytest.raises(ValueError, match="save_every: got 3 without save"):
        train(fresh_state(), 1, save_every=3)
    with pytest.raises(ValueError, match="save_every"):
        train(fresh_state(), 1, save=print, save_every=0)


@pytest.mark.parametrize("moment", ["compiling", "evaluating", "saving", "running"])
def test_an_interruption_leaves_a_state_to_go_on_from(uninterrupted, tmp_path, monkeypatch, moment):
    """Ctrl-C at every kind of moment; the run that goes on is the run that was never interrupted."""
    checkpoints = ebm.checkpoint.Checkpoints(tmp_path)
    calls = []

    def interrupt(state):
        calls.append(int(state.step))
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return {}

    def save(state):
        if moment == "saving":
            interrupt(state)
        checkpoints.save(state)

    options = {"save": save, "evaluate": interrupt if moment == "evaluating" else None}
    if moment == "compiling":

        def objective(*arguments):
            signal.raise_signal(signal.SIGINT)
            return OBJECTIVE(*arguments)

        monkeypatch.setattr(resumed_run, "OBJECTIVE", objective)
    elif moment == "running":
        options["save"] = lambda state: (checkpoints.save(state), calls.append(int(state.step)))
        watch = threading.Thread(target=_interrupt_after, args=(calls, 2))
        watch.start()
    with pytest.raises(ebm.TrainingInterrupted) as caught:
        # Many more updates than the signal waits for.
        train(fresh_state(), 20_000 if moment == "running" else 60, **options)
    state = caught.value.state
    step = int(state.step)
    assert step % 10 == 0
    assert step == 0 or len(caught.value.history["loss"]) == step
    assert step >= {"compiling": 0, "evaluating": 20, "saving": 30, "running": 20}[moment]
    monkeypatch.undo()
    checkpoints.wait()
    if step:
        assert checkpoints.steps()[-1] == step
        assert digest(checkpoints.restore(like=fresh_state())) == digest(state)
    if step <= 60:
        state = train(state, 60 - step) if step < 60 else state
        assert digest(state) == uninterrupted
    else:
        assert digest(state) == digest(train(fresh_state(), step))


def _interrupt_after(calls, number):
    while len(calls) < number:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interruption_that_was_swallowed_is_heard_at_the_next_report():
    """Where Ctrl-C falls into a callback of the garbage collector Python prints it and goes on."""
    calls = []

    def swallow(state):
        calls.append(int(state.step))
        if len(calls) == 2:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(ebm.TrainingInterrupted) as caught:
        train(fresh_state(), 60, save=swallow)
    assert int(caught.value.state.step) == 20
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_is_a_keyboard_interrupt():
    assert issubclass(ebm.TrainingInterrupted, KeyboardInterrupt)


def test_a_failure_saves_the_last_good_state(tmp_path):
    adam = optax.adam(1e-2)

    def update(gradient, state, parameters=None):
        updates, state = adam.update(gradient, state, parameters)
        return jax.tree.map(lambda u: jnp.where(state[0].count > 17, jnp.nan, u), updates), state

    optimizer = optax.GradientTransformation(adam.init, update)
    state = ebm.init_train(fresh_state().potential, optimizer, fresh_state().sampler)
    with ebm.checkpoint.Checkpoints(tmp_path) as checkpoints, pytest.raises(ebm.TrainingFailure) as caught:
        ebm.fit(KEY, state, data(), OBJECTIVE, optimizer, num_steps=40, report_every=10, save=checkpoints.save)
    assert checkpoints.steps() == [10, 17]
    assert digest(checkpoints.restore(like=state)) == digest(caught.value.state)


def _start(directory, updates, *options):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.resumed_run", str(directory)),
            *("--updates", str(updates), *options),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def _life(directory, updates, wait, *options):
    """One life of the run, killed when ``wait`` returns, or left to end: the step it began with, and its digest."""
    with _start(directory, updates, *options) as process:
        assert process.stdout is not None
        began = int(process.stdout.readline().split()[1])
        if wait is None:
            out, _ = process.communicate(timeout=300)
            assert process.returncode == 0
            return began, out.split()[-1]
        wait(began)
        process.send_signal(signal.SIGKILL)
    checkpoints = ebm.checkpoint.Checkpoints(directory)
    for step in checkpoints.steps():
        checkpoints.restore(like=fresh_state(), step=step)  # each is whole
    return began, None


def _until_saved(directory, further):
    """Wait until ``further`` updates were saved since the run began."""

    def wait(began):
        limit = time.monotonic() + 240.0
        while max(ebm.checkpoint.Checkpoints(directory).steps(), default=0) < began + further:
            assert time.monotonic() < limit
            time.sleep(0.001)

    return wait


@pytest.mark.parametrize("options", [[], ["--synchronous"]], ids=["asynchronous", "synchronous"])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, options):
    began, _ = _life(tmp_path, 10_000_000, _until_saved(tmp_path, 30), *options)
    reached = ebm.checkpoint.Checkpoints(tmp_path).steps()[-1]
    last, ended = _life(tmp_path, reached + 15, None, *options)
    assert (began, last) == (0, reached)
    assert ended == digest(train(fresh_state(), reached + 15))


def test_fifty_kills_lose_nothing_but_the_updates_since_the_last_save(tmp_path):
    """Slow: 50 kills of a run that saves every ten updates."""
    generator, last, began = random.Random(1), 0, []
    for number in range(50):
        options = ["--synchronous"] if number % 3 == 0 else []
        # Some die while they compile, the others at any moment of the updates and saves after their first.
        seconds, is_early = generator.uniform(0.0, 0.3), number % 5 == 0
        saved = _until_saved(tmp_path, 0 if is_early else 10)
        wait = lambda began, saved=saved, seconds=seconds: (saved(began), time.sleep(seconds))
        began.append(_life(tmp_path, 10_000_000, wait, *options)[0])
        assert began[-1] == last
        steps = ebm.checkpoint.Checkpoints(tmp_path).steps()
        assert len(steps) <= 3  # two are kept, and one more while a new one takes its place
        assert max(steps, default=0) >= last
        last = max(steps, default=0)
    print("lives began at", began)
    assert len(set(began)) >= 40  # the lives that were not killed at once got somewhere
    state = ebm.checkpoint.Checkpoints(tmp_path).restore(like=fresh_state())
    # The uninterrupted run, in this process, as far as the last life came.
    assert digest(state) == digest(train(fresh_state(), last, report_every=100))
