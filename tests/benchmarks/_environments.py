"""Other libraries in environments of their own, and processes of them that answer questions.

The libraries that this one is measured against want other dependencies than it has. Each gets a virtual environment under
``outputs/bench/envs``, made once from pinned versions and kept. Where one cannot be made, as without a package index,
:class:`Unavailable` says why, and a benchmark reports that instead of a number.
"""

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / "outputs" / "bench" / "envs"
SCRIPTS = Path(__file__).resolve().parent / "_peers"


class Unavailable(Exception):
    """A library could not be installed, or does not run."""


class Requirements(NamedTuple):
    """What an environment holds."""

    name: str
    pins: tuple[str, ...]


TORCHEBM = Requirements("torchebm", ("torchebm==0.8.9", "torch==2.13.0"))
THRML = Requirements("thrml", ("thrml==0.1.4", f"jax=={importlib.metadata.version('jax')}"))
"""On the JAX of this environment, so that the libraries are compared and not their compilers."""


def interpreter(requirements: Requirements) -> Path:
    """The Python of an environment, which is made where there is none with these pins.

    Raises:
        Unavailable: with the last words of what failed.
    """
    place = ENVIRONMENTS / requirements.name
    python, made_of = place / "bin" / "python", place / "made_of.txt"
    wanted = "\n".join(requirements.pins) + "\n"
    if made_of.exists() and made_of.read_text() == wanted:
        return python
    place.parent.mkdir(parents=True, exist_ok=True)
    print(f"making the environment {place}", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(place)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements.pins])
    made_of.write_text(wanted)
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")


class Peer:
    """A script in another environment that answers one line of JSON with another, and so stays warm between questions.

    Args:
        requirements: Its environment.
        script: A file of ``_peers``. It says first what versions it runs on.

    Raises:
        Unavailable: the environment cannot be made, or the script does not start.
    """

    versions: dict[str, str]

    def __init__(self, requirements: Requirements, script: str):
        command = [str(interpreter(requirements)), str(SCRIPTS / script)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ""}
        )
        try:
            self.versions = self._answer()
        except Unavailable:
            self._end()
            raise

    def ask(self, **question: Any) -> dict[str, Any]:
        """The script's answer.

        Raises:
            Unavailable: it ended instead.
        """
        assert self._process.stdin is not None
        # A script that has ended reads nothing more; that it answers nothing either is said below.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"{' '.join(map(str, self._process.args))} ended with status {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # at the end of its input the script ends
        self._process.stdout.close()
        self._process.wait()


def not_available(name: str, goal: str, reason: Unavailable) -> dict[str, Any]:
    """What a benchmark returns where its peer is not to be had: a goal that was not shown to be met."""
    return {"goal": goal, "met": False, name: f"not available: {reason}"}
