"""Annotations hold at run time: `make examples` runs all documented examples under the plugin that is tested here.

The suite itself runs without these checks on most of the package, because it also proves that bad input gets the
package's own errors, which the type checker would anticipate.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_documented_example_passes_the_type_checker():
    result = run("-p", "tests.typecheck_plugin", "ebm_ppl/info.py")
    assert result.returncode == 0, result.stdout[-4000:]


def test_the_type_checker_is_on(tmp_path):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("from ebm_ppl import kernels\n\ndef test_wrong():\n    kernels.mala(step_size='fast')\n")
    result = run("-p", "tests.typecheck_plugin", "--rootdir", str(tmp_path), "-c", "/dev/null", str(wrong))
    assert "TypeCheckError" in result.stdout, result.stdout[-4000:]
