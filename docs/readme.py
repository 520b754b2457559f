"""The README as the front page, and the tutorials as pages, from where they stand in the repository."""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = "<!-- README -->"
TUTORIALS = "<!-- TUTORIALS -->"
TOCTREE = """```{toctree}
:hidden:
:caption: Tutorials
:glob:

generated/tutorials/*
```"""
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
"""Files of the repository that are pages of their own."""

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def _relink(match: re.Match) -> str:
    """A link of the README as seen from docs/: files one level up, notebooks where they are copied, folders as text."""
    image, text, target = match.groups()
    path, _, anchor = target.partition("#")
    if (ROOT / path).is_dir():
        return text
    if path in PAGES:
        path = PAGES[path]
    elif path.startswith("tutorials/") and path.endswith(".ipynb"):
        path = f"generated/{path}"
    else:
        path = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
    return f"{image}[{text}]({path}{'#' + anchor if anchor else ''})"


def insert(app, docname: str, source: list[str]) -> None:
    """Put README and tutorials where index.md has their markers; the handler of Sphinx's ``source-read``."""
    if docname == "index":
        text = LINK.sub(_relink, (ROOT / "README.md").read_text())
        tutorials = TOCTREE if notebooks() else ""
        source[0] = source[0].replace(README, text).replace(TUTORIALS, tutorials)


def notebooks() -> list[Path]:
    """The notebooks in tutorials/, in the order of their names."""
    return sorted((ROOT / "tutorials").glob("*.ipynb"))


def copy_tutorials(directory: Path) -> None:
    """Copy the notebooks next to the other pages: Sphinx reads only what is below docs/."""
    for notebook in notebooks():
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(notebook, directory)
