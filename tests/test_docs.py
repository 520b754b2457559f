"""The Python blocks of the documentation pages run, in order, and print what the page says they print."""

import re
from pathlib import Path

import pytest

from ebm_ppl.roles import Role

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow  # .ci/run has a step of its own for it
@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page, capsys):
    namespace, printed = {}, ""
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            exec(compile(block, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif language == "text":
            assert printed.split() == block.split()


def test_the_table_of_roles_is_complete():
    text = (PAGES[0].parent / "sites.md").read_text()
    assert {role.value for role in Role if role is not Role.NORMALIZED} <= set(re.findall(r"\| ([a-z ]+?) \|", text))
