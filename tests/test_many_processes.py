"""Many processes give what one gives, and one that dies is named; the others go on from the last checkpoint."""

import re
import time

import numpy as np
import pytest

from tests.distributed import launch, scenarios
from tests.distributed.worker import HEARTBEAT


def check_against_one(found, *names):
    """All processes found the same, and what one process finds alone."""
    for other in found[1:]:
        assert all(
            np.array_equal(array, other[name], equal_nan=array.dtype.kind == "f") for name, array in found[0].items()
        )
    alone = {}
    for name in names:
        result = scenarios.on_host(scenarios.SCENARIOS[name](None))
        alone |= {f"{name}{path}": array for path, array in result.items()}
    difference = scenarios.differences(alone, found[0])
    judged = {name: difference.pop(name) for name in list(difference) if "gap" in name or "diagnose" in name}
    assert max(difference.values()) < 1e-5
    # Differences of nearly equal numbers, and standard scores of them.
    assert max(judged.values(), default=0.0) < 1e-3


def test_two_processes_train_what_one_trains(tmp_path):
    check_against_one(launch.run(tmp_path, 2, "train", seconds=600), "train")


@pytest.mark.slow
def test_two_processes_sample_temper_and_diagnose(tmp_path):
    names = ("advance", "temper", "temper_many", "diagnose")
    check_against_one(launch.run(tmp_path, 2, *names, seconds=3000), *names)


@pytest.mark.slow
def test_four_processes(tmp_path):
    names = ("advance", "train", "temper")
    check_against_one(launch.run(tmp_path, 4, *names, seconds=3000), *names)


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "victim"), [(4, 3), (2, 0)])
def test_a_killed_process_is_named_and_training_resumes_without_it(tmp_path, num_processes, victim):
    workers = launch.start(tmp_path, num_processes, "resume")
    deadline = time.monotonic() + 600
    saved = tmp_path / "checkpoints" / "step-000000020.safetensors"
    while not saved.exists():
        assert time.monotonic() < deadline
        assert all(worker.poll() is None for worker in workers), (tmp_path / "0.log").read_text()
        time.sleep(0.05)
    workers[victim].kill()
    killed = time.monotonic()
    statuses = launch.wait(workers, 6 * HEARTBEAT)
    seconds = time.monotonic() - killed
    print(f"the other processes ended {seconds:.1f} s after process {victim} was killed")
    assert seconds < 4 * HEARTBEAT
    assert 0 not in statuses
    for process in set(range(num_processes)) - {victim}:
        log = (tmp_path / f"{process}.log").read_text()
        # A lost coordination service is that of process 0, which JAX calls the leader.
        named = (
            r"the leader \(usually slice 0 task 0\)"
            if victim == 0
            else rf"unhealthy[^\n]*:\n{victim}\n|[Tt]ask {victim} "
        )
        assert re.search(named, log), log

    found = launch.run(tmp_path, num_processes // 2, "resume", seconds=600)
    first = int(found[0]["resume['first']"])
    assert 20 <= first < scenarios.NUM_UPDATES
    uninterrupted = scenarios.on_host(scenarios.resume(None, tmp_path / "alone"))
    ours = {path.removeprefix("resume"): array for path, array in found[0].items()}
    difference = scenarios.differences(uninterrupted, {**ours, "['first']": uninterrupted["['first']"]})
    assert max(difference.values()) < 1e-5
    assert int(ours["['state'].step"]) == scenarios.NUM_UPDATES
