"""Reference pages from the package itself: one page per public module, and the table of the top-level names.

Nothing is listed by hand, so nothing can be forgotten; a public name without a docstring is a warning, hence an error.
"""

import importlib
import inspect
import pkgutil
import shutil
from pathlib import Path
from types import ModuleType

from sphinx.util import logging

import ebm_ppl

LOGGER = logging.getLogger(__name__)


def public_modules() -> list[ModuleType]:
    """Every importable module of the package whose dotted name has no underscore part, the package itself left out."""
    found = pkgutil.walk_packages(ebm_ppl.__path__, "ebm_ppl.")
    return [importlib.import_module(m.name) for m in found if not any(p.startswith("_") for p in m.name.split("."))]


def own_names(module: ModuleType) -> dict[str, object]:
    """Public functions and classes defined in ``module`` itself, in source order."""
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        if inspect.isclass(value) or inspect.isfunction(value)
    }
    return own


def top_level_rows() -> list[str]:
    """One table row for each function or class that ``import ebm_ppl`` offers directly."""
    rows = []
    for name, value in sorted(vars(ebm_ppl).items(), key=lambda item: item[0].lower()):
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        summary = (inspect.getdoc(value) or "").strip().split("\n\n")[0].replace("\n", " ")
        rows.append(f"   * - :py:obj:`~{value.__module__}.{value.__qualname__}`\n     - {summary}")
    return rows


def write(directory: Path) -> None:
    """Write ``top_level.rst``, ``modules.rst`` and one page per module into ``directory``."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "modules").mkdir(parents=True)
    entries = []
    for module in public_modules():
        names = own_names(module)
        for name, value in names.items():
            if not inspect.getdoc(value):
                LOGGER.warning("%s.%s is public and has no docstring", module.__name__, name)
        if not (module.__doc__ or "").strip():
            LOGGER.warning("%s is public and has no docstring", module.__name__)
        title = module.__name__.removeprefix("ebm_ppl.")
        page = [
            title,
            "=" * len(title),
            "",
            f".. automodule:: {module.__name__}",
            "   :members:",
            "   :ignore-module-all:",
            "",
        ]
        (directory / "modules" / f"{module.__name__}.rst").write_text("\n".join(page))
        entries.append(f"   modules/{module.__name__}")
    heading = ["Modules", "=======", "", ".. toctree::", "   :maxdepth: 1", "", *entries, ""]
    (directory / "modules.rst").write_text("\n".join(heading))
    table = [".. list-table::", "   :widths: 35 65", "", *top_level_rows(), ""]
    (directory / "top_level.txt").write_text("\n".join(table))
