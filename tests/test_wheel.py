"""What is distributed: a wheel and an sdist that build, hold the package only, and work in an empty environment."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ISOLATED = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def python_of(folder):
    """The interpreter of a new environment with nothing in it."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], check=True, env=ISOLATED, capture_output=True, text=True, **options
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist of what git has, by an isolated build."""
    folder = tmp_path_factory.mktemp("distributions")
    run("git", "clone", "--quiet", ROOT, folder / "source")
    python = python_of(folder / "builder")
    run(python, "-m", "pip", "install", "--quiet", "build")
    run(python, "-m", "build", "--outdir", folder / "made", folder / "source")
    (wheel,), (sdist,) = ((folder / "made").glob(pattern) for pattern in ("*.whl", "*.tar.gz"))
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.slow
def test_the_wheel_holds_the_package_only(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"ebm_ppl", "ebm_ppl-0.1.0.dist-info"}
    assert "ebm_ppl/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.endswith((".py", "py.typed")) and name.startswith("ebm_ppl/")]


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_made_from(built):
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "ebm_ppl/__init__.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "outputs", "docs/_build"))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_the_readme_runs_where_nothing_else_is_installed(built, kind, tmp_path):
    python = python_of(tmp_path / "empty")
    run(python, "-m", "pip", "install", "--quiet", built[kind])
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "quickstart.py").write_text(code)
    assert re.search(r"mixing +yes", run(python, "quickstart.py", cwd=tmp_path).stdout)
    refused = subprocess.run([str(python), "-m", "ebm_ppl"], capture_output=True, text=True, env=ISOLATED, cwd=tmp_path)
    assert refused.returncode == 1
    assert "pip install 'ebm-ppl[demo]'" in refused.stderr
