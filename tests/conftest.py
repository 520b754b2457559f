"""What every test gets: run-time type checks of the package, a key of its own, and the budget of false failures."""

import itertools
import os
import zlib
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # figures are drawn to memory; set before anything imports matplotlib

import jax
import jaxtyping
import pytest

# Checks the annotations of these modules at every call. Must precede the first import of the package.
jaxtyping.install_import_hook(("ebm_ppl.targets", "ebm_ppl.testing"), "beartype.beartype")

from ebm_ppl.testing import CHECKS, FAMILY_ALPHA, SUITE_CHECKS  # noqa: E402

_WORKERS = pytest.StashKey[list[tuple[int, float]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of the `key` fixture; a scheduled run passes the date")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('seed')} (reproduce with --seed)"


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run."""
    return request.config.getoption("seed")


@pytest.fixture
def key(request: pytest.FixtureRequest, seed: int) -> jax.Array:
    """A random key that depends on the test's name and ``--seed`` only, not on the order of tests."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(request.node.nodeid.encode()))


SLOW = Path(__file__).with_name("slow.txt")
"""Tests that a measurement of the whole suite found to take more than a few seconds, by node id."""
SINGLE_PRECISION = Path(__file__).with_name("single_precision.txt")
"""Tests whose subject is a session without ``jax_enable_x64``: its messages, refusals, and the bits of its draws."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what :data:`SLOW` lists, before pytest deselects by mark, and skip what a session cannot show."""
    listed = set(SLOW.read_text().splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    if jax.config.jax_enable_x64:
        listed = set(SINGLE_PRECISION.read_text().splitlines())
        for item in items:
            if item.nodeid in listed:
                item.add_marker(pytest.mark.skip(reason="about sessions in single precision"))


_finished = itertools.count()
MAX_MAPPINGS = 15_000
"""Memory mappings after which the programs compiled so far are dropped."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Drop compiled programs before there are too many.

    XLA keeps several memory mappings per program, Linux allows a process 65,530 of them, and the compilation that exceeds
    the limit takes the process down. A worker of this suite would get there.
    """
    maps = Path("/proc/self/maps")
    if next(_finished) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPPINGS:
        jax.clear_caches()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_WORKERS] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """A pytest-xdist worker has finished: collect what its checks spent."""
    spent = getattr(node, "workeroutput", {}).get("stochastic_checks")
    if spent is not None:
        node.config.stash[_WORKERS].append(tuple(spent))


def _spent(config: pytest.Config) -> tuple[int, float]:
    ledgers = [(CHECKS.count, CHECKS.spent), *config.stash[_WORKERS]]
    return sum(count for count, _ in ledgers), sum(alpha for _, alpha in ledgers)


def _is_overspent(config: pytest.Config) -> bool:
    count, alpha = _spent(config)
    # The sum of a thousand terms of 1e-7 is not exactly 1e-4.
    return count > SUITE_CHECKS or alpha > FAMILY_ALPHA * (1 + 1e-9)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session whose stochastic checks exceed the budget of false failures."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["stochastic_checks"] = (CHECKS.count, CHECKS.spent)
    elif _is_overspent(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    count, alpha = _spent(config)
    if count:
        verdict = "EXCEEDED: raise SUITE_CHECKS" if _is_overspent(config) else "within the budget"
        terminalreporter.write_line(
            f"{count} of {SUITE_CHECKS} stochastic checks, false-failure rate below {alpha:.1e} "
            f"(budget {FAMILY_ALPHA:.0e}): {verdict}"
        )
