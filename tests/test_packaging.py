"""The files around the package agree with each other. Nothing here builds or downloads."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import ebm_ppl

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((ROOT / "constraints").glob("py3*.txt"))

# Distributions whose import name differs from their own by more than "-" for "_".
IMPORT_NAMES = {"sklearn": "scikit-learn"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    """Canonical names of every distribution that pyproject.toml asks for, in any extra."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {canonical(re.match(r"[\w.-]+", line)[0]) for group in groups for line in group} - {"ebm-ppl"}


def pins(lock: Path) -> dict[str, list[str]]:
    """Canonical name -> the lines of each of its pins, the hashes among them."""
    found: dict[str, list[str]] = {}
    for pin in re.split(r"\n(?=\S)", "\n" + lock.read_text()):
        lines = [line for line in pin.strip().splitlines() if not line.lstrip().startswith("#")]
        if lines:
            found.setdefault(canonical(re.match(r"[\w.-]+", lines[0])[0]), []).append("\n".join(lines))
    return found


def test_package_is_typed():
    assert (ROOT / "ebm_ppl" / "py.typed").is_file()


def test_versions_agree():
    assert PROJECT["version"] == ebm_ppl.__version__
    assert f"\nversion: {ebm_ppl.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_import_is_declared():
    imported = set()
    for file in (ROOT / "ebm_ppl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"ebm_ppl"}
    assert "jax" in third_party
    assert {canonical(IMPORT_NAMES.get(name, name)) for name in third_party} <= declared()


def test_every_supported_minor_has_a_lock():
    minors = {line.split(" :: ")[-1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    assert {f"py{minor.replace('.', '')}.txt" for minor in minors} == {lock.name for lock in LOCKS}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_is_pinned_hashed_and_free_of_addresses(lock):
    text = lock.read_text()
    assert "http" not in text
    assert "--index-url" not in text
    for name, entries in pins(lock).items():
        for entry in entries:
            assert re.match(r"[\w.-]+==\S+ ", entry), f"{name} is not pinned: {entry[:80]}"
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), f"{name} has no hash"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_covers_what_is_declared(lock):
    found = pins(lock)
    assert declared() | {"hatchling"} <= set(found)
    assert "torch" not in found
    assert not {name for name in found if name.startswith(("nvidia-", "jax-cuda"))}


def test_make_targets_named_in_the_readme_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)\b", code((ROOT / "README.md").read_text())))
    assert {"demo", "test"} <= named
    assert named <= targets


def code(markdown: str) -> str:
    """The code of a Markdown text, fenced or inline."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", markdown, flags=re.DOTALL))


def test_every_slow_test_that_is_listed_exists():
    """A renamed test would otherwise come back to the default run without a word."""
    for line in (ROOT / "tests" / "slow.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text(), line
