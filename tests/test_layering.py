"""The layering of the package, read from its import statements.

The order is types → potentials, targets → kernels, flows → sampling → objectives → training → recipes. A module imports
from strictly lower layers, and from a few neighbours that the tables below name. The rules live in tables so that a new
module is one line; a module without a line is itself a violation.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "ebm_ppl"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# What stands above the training loop and below the demo, in no order of its own.
TOP = {
    "supports",
    "rows",
    "chains",
    "distributions",
    "provenance",
    "roles",
    "likelihood",
    "handlers",
    "infer",
    "diagnostics",
    "subjects",
    "plots",
    "checkpoint",
    "sharding",
    "recipes",
    "temperature",
}

LAYERS = (
    {"types", "errors", "partials", "meshes"},
    {"checks", "densities", "info", "named_fields", "proposals", "regions", "weights"},
    {"potentials", "targets"},
    {"kernels", "flows", "diffusion"},
    {"sampling", "replay"},
    {"objectives", "normalizer", "adaptation", "ladder", "testing", "generation", "optimizers"},
    {"training"},
    TOP,
    {"demo", "command"},
    {"__init__", "__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Neighbours in one layer that may meet. An import cycle between them is still refused.
BESIDE = {
    "targets": {"potentials"},
    "ladder": {"adaptation"},
    "replay": {"sampling"},
    "proposals": {"checks"},
    "regions": {"checks"},
    **dict.fromkeys(TOP, TOP),
}

# Lower layers that are out of bounds all the same: what these modules need of them is handed to them by the caller.
NEVER = {
    "kernels": {"potentials"},
    "sampling": {"kernels"},
    "training": {"objectives", "testing"},
}

# Third-party packages that only some modules may import.
ONLY_IN = {
    "numpyro": {
        "rows",
        "likelihood",
        "supports",
        "named_fields",
        "distributions",
        "provenance",
        "subjects",
        "handlers",
        "infer",
        "targets",
        "demo",
        "recipes",
    },
    "distrax": {"flows"},
    "tensorflow_probability": {"flows"},
    "arviz_base": {"diagnostics"},
    "arviz_stats": {"diagnostics"},
    "arviz_plots": {"plots"},
    "matplotlib": {"plots"},
    # Serialisers that execute what they read.
    "pickle": set(),
    "_pickle": set(),
    "dill": set(),
    "cloudpickle": set(),
    "shelve": set(),
    "marshal": set(),
}


class Import(NamedTuple):
    """One imported name: ``module`` is dotted and absolute, ``local`` says that it sits inside a function."""

    module: str
    name: str | None
    line: int
    local: bool


def _absolute(path: str, node: ast.ImportFrom) -> str:
    """The absolute dotted name of the module that an import statement in the file ``path`` names."""
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *path.removesuffix(".py").split("/")][: -node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _imports(path: str, tree: ast.AST, local: bool = False) -> Iterator[Import]:
    """Every import below ``tree``: the statements, and calls that import a module by a literal name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, node.lineno, local)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(_absolute(path, node), alias.name, node.lineno, local)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0].value
            if called in {"import_module", "__import__"} and isinstance(target, str):
                yield Import(PACKAGE + target if target.startswith(".") else target, None, node.lineno, True)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(path, node, local or inside)


def _module(path: str) -> str:
    """Dotted name of the file ``path``, relative to the package: ``kernels/__init__.py`` is ``ebm_ppl.kernels``."""
    return ".".join([PACKAGE, *path.removesuffix(".py").split("/")]).removesuffix(".__init__")


def _component(module: str) -> str:
    """The part of the package that a dotted name belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def _cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """One import cycle for each edge that closes one, found by depth-first search."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> Iterator[list[str]]:
        if module in trail:
            yield [*trail[trail.index(module) :], module]
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                yield from visit(target, [*trail, module])
            done.add(module)

    for start in sorted(graph):
        yield from visit(start, [])


def violations(sources: dict[str, str]) -> list[str]:
    """All violations of the layering in a package given as ``path below the package -> source text``."""
    found = []
    modules = {_module(path) for path in sources}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for path, source in sorted(sources.items()):
        tree = ast.parse(source, filename=path)
        component = _component(_module(path))
        if component not in RANK:
            found.append(f"{path}: '{component}' has no layer; give it one in LAYERS")
            continue
        for node in ast.walk(tree):
            if (isinstance(node, ast.Name) and node.id == "TYPE_CHECKING") or (
                isinstance(node, ast.Attribute) and node.attr == "TYPE_CHECKING"
            ):
                found.append(f"{path}:{node.lineno}: TYPE_CHECKING hides an import from the interpreter")
        for module, name, line, local in _imports(path, tree):
            where = f"{path}:{line}"
            top = module.split(".")[0]
            if name == "TYPE_CHECKING":
                found.append(f"{where}: TYPE_CHECKING hides an import from the interpreter")
            if top in ONLY_IN and component not in ONLY_IN[top]:
                allowed = ", ".join(sorted(ONLY_IN[top])) or "no module"
                found.append(f"{where}: {component} imports {top}; {allowed} may")
            if top != PACKAGE:
                continue
            target = f"{module}.{name}" if name and f"{module}.{name}" in modules else module
            if local:
                found.append(f"{where}: {component} imports {target} inside a function")
            graph[_module(path)].add(target)
            other = _component(target)
            if other == component:
                continue
            if other not in RANK:
                found.append(f"{where}: {component} imports {other}, which has no layer")
            elif other in NEVER.get(component, ()):
                found.append(f"{where}: {component} never imports {other}; the caller hands it over")
            elif RANK[other] >= RANK[component] and other not in BESIDE.get(component, ()):
                found.append(f"{where}: {component} imports {other}, which is not below it")
    found.extend("import cycle: " + " → ".join(cycle) for cycle in _cycles(graph))
    return found


def test_package_respects_its_layers():
    sources = {file.relative_to(ROOT).as_posix(): file.read_text() for file in ROOT.rglob("*.py")}
    assert "types.py" in sources
    assert violations(sources) == []


GOOD = {
    "__init__.py": "from ebm_ppl import sampling as sampling\nfrom ebm_ppl.training import fit as fit",
    "__main__.py": "from ebm_ppl.demo import main",
    "types.py": "import jax",
    "errors.py": "",
    "checks.py": "from ebm_ppl.errors import ShapeError\nfrom . import types",
    "potentials/__init__.py": "from ebm_ppl.potentials.networks import MLP as MLP",
    "potentials/networks.py": "from ebm_ppl.types import Potential\nfrom ..checks import check",
    "targets/__init__.py": "import numpyro.distributions as dist\nfrom ebm_ppl import types",
    "kernels/__init__.py": "from .mcmc import mala as mala",
    "kernels/mcmc.py": "import blackjax\nfrom ebm_ppl.types import Kernel",
    "flows.py": "def flow():\n    import distrax",
    "sampling.py": "from ebm_ppl.types import SamplerState",
    "objectives/__init__.py": "from ebm_ppl.sampling import advance",
    "normalizer.py": "from ebm_ppl.kernels import mala",
    "testing.py": "from ebm_ppl import kernels, sampling",
    "training.py": "from ebm_ppl.sampling import advance",
    "distributions.py": "import numpyro\nfrom ebm_ppl import sampling",
    "checkpoint.py": "from ebm_ppl.training import TrainState",
    "diagnostics.py": "def summary():\n    import arviz_stats",
    "plots.py": "def plot():\n    import matplotlib.pyplot as plt",
    "recipes/__init__.py": "from ebm_ppl import kernels, objectives, training",
    "demo.py": "import numpyro\nfrom ebm_ppl import plots, recipes",
}


def test_checker_accepts_a_good_package():
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("types.py", "from ebm_ppl.checks import check", "types imports checks, which is not below it"),
        ("checks.py", "from ebm_ppl.potentials import MLP", "checks imports potentials, which is not below it"),
        ("potentials/networks.py", "from ebm_ppl import targets", "potentials imports targets, which is not below it"),
        ("kernels/mcmc.py", "from ebm_ppl.potentials import MLP", "kernels never imports potentials"),
        ("kernels/mcmc.py", "import ebm_ppl.potentials.networks", "kernels never imports potentials"),
        ("kernels/mcmc.py", "from ..potentials.networks import MLP", "kernels never imports potentials"),
        ("kernels/mcmc.py", "from .. import potentials", "kernels never imports potentials"),
        ("kernels/mcmc.py", "from ebm_ppl import flows", "kernels imports flows, which is not below it"),
        ("sampling.py", "from ebm_ppl.kernels import mala", "sampling never imports kernels"),
        ("sampling.py", "from ebm_ppl import kernels", "sampling never imports kernels"),
        ("sampling.py", "import ebm_ppl as ebm", "sampling imports __init__, which is not below it"),
        ("objectives/__init__.py", "from ebm_ppl import training", "objectives imports training, which is not below"),
        ("objectives/__init__.py", "from ebm_ppl import normalizer", "objectives imports normalizer, which is not"),
        ("normalizer.py", "from ebm_ppl import distributions", "normalizer imports distributions, which is not below"),
        ("training.py", "from ebm_ppl.objectives import nce", "training never imports objectives"),
        ("training.py", "from ebm_ppl import checkpoint", "training imports checkpoint, which is not below it"),
        ("testing.py", "from ebm_ppl import objectives", "testing imports objectives, which is not below it"),
        ("recipes/__init__.py", "from ebm_ppl import demo", "recipes imports demo, which is not below it"),
        ("extra.py", "", "'extra' has no layer"),
        (
            "sampling.py",
            "from ebm_ppl import extra\nimport ebm_ppl.extra",
            "sampling imports extra, which has no layer",
        ),
        ("potentials/networks.py", "import numpyro.distributions as dist", "potentials imports numpyro"),
        ("sampling.py", "def f():\n    from numpyro import handlers", "sampling imports numpyro"),
        ("training.py", "import arviz_stats as az", "training imports arviz_stats; diagnostics may"),
        ("demo.py", "import matplotlib.pyplot as plt", "demo imports matplotlib; plots may"),
        ("plots.py", "import arviz_base", "plots imports arviz_base; diagnostics may"),
        ("kernels/mcmc.py", "def f():\n    import distrax", "kernels imports distrax; flows may"),
        ("kernels/mcmc.py", "import importlib\nimportlib.import_module('distrax')", "kernels imports distrax"),
        ("checkpoint.py", "import pickle", "checkpoint imports pickle; no module may"),
        ("checkpoint.py", "def f():\n    from cloudpickle import loads", "checkpoint imports cloudpickle"),
        ("checkpoint.py", "__import__('dill')", "checkpoint imports dill"),
        ("normalizer.py", "def f():\n    from ebm_ppl.kernels import mala", "ebm_ppl.kernels inside a function"),
        (
            "normalizer.py",
            "class C:\n    async def f(self):\n        from . import types",
            "ebm_ppl.types inside a func",
        ),
        ("__init__.py", "from importlib import import_module\nimport_module('.plots')", "plots inside a function"),
        ("sampling.py", "from typing import TYPE_CHECKING", "sampling.py:1: TYPE_CHECKING"),
        ("sampling.py", "import typing\nif typing.TYPE_CHECKING:\n    import optax", "sampling.py:2: TYPE_CHECKING"),
        ("kernels/mcmc.py", "from ebm_ppl.kernels import mala", "cycle: ebm_ppl.kernels → ebm_ppl.kernels.mcmc → ebm"),
        ("handlers.py", "from ebm_ppl import handlers", "import cycle: ebm_ppl.handlers → ebm_ppl.handlers"),
    ],
)
def test_checker_reports_a_bad_module(path, source, expected):
    assert any(expected in violation for violation in violations({**GOOD, path: source}))


def test_checker_reports_a_cycle_between_neighbours():
    bad = {**GOOD, "handlers.py": "from ebm_ppl import infer", "infer/__init__.py": "from ebm_ppl.handlers import x"}
    assert violations(bad) == ["import cycle: ebm_ppl.handlers → ebm_ppl.infer → ebm_ppl.handlers"]


def test_every_rule_names_parts_that_have_a_layer():
    named = {*BESIDE, *NEVER}.union(*BESIDE.values(), *NEVER.values(), *ONLY_IN.values())
    assert named <= set(RANK)
