"""``python -m ebm_ppl check MODEL.py:model``: what each EBM site needs, and the diagnosis of a saved run, from a shell.

A thin door to :func:`ebm_ppl.check_model` and :func:`ebm_ppl.diagnostics.diagnose`. The model is a function in a file; its
arguments, a training state and rows are named by further attributes, each an object or a function without arguments that
makes it. The file is run, as an import runs it: check only files that you trust.
"""

import argparse
import base64
import html
import importlib.util
import inspect
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ebm_ppl.checkpoint import restore
from ebm_ppl.diagnostics import Diagnosis, diagnose
from ebm_ppl.errors import CheckpointError, UnknownNormalizerError
from ebm_ppl.roles import check_model
from ebm_ppl.training import TrainState

try:
    from ebm_ppl import plots
except ImportError as error:
    plots, _MISSING = None, str(error)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font-family: system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }}
pre {{ overflow-x: auto }} img {{ max-width: 100% }} td, th {{ padding: .2em .6em }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``check``.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["wells.py:model", "--budget", "10000"]).budget
        10000
    """
    parser.add_argument("model", metavar="MODEL.py:NAME", help="a NumPyro model: a file and the name in it")
    parser.add_argument("--args", metavar="NAME", help="name of the tuple of the model's arguments (none by default)")
    parser.add_argument("--checkpoint", metavar="FILE", help="a saved training state to diagnose")
    parser.add_argument(
        "--state", metavar="NAME", default="state", help="of a state like the saved one (default state)"
    )
    parser.add_argument("--data", metavar="NAME", default="data", help="of rows held out from training (default data)")
    parser.add_argument("--num-steps", type=int, metavar="K", help="kernel steps per update of the training")
    parser.add_argument("--budget", type=int, default=300_000, help="gradients to spend (default 300,000)")
    # No default of its own: there may be a seed before the name of the command already.
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="of the diagnosis (default 0)")
    parser.add_argument("--html", metavar="FILE", help="write a report with figures (needs the plots extra)")


class _WrongUsageError(Exception):
    """What was asked for is not there or not as expected; the text says which."""


def check(arguments: argparse.Namespace) -> int:
    """Print what was asked for; write the report.

    Returns:
        The exit status: 0; 1 where a site is refused or a verdict is "fail"; 2 where a file, a name or an option is not as
        expected, which the standard error output says.
    """
    try:
        return _check(arguments)
    except _WrongUsageError as error:
        print(error, file=sys.stderr)
        return 2


def _check(arguments: argparse.Namespace) -> int:
    path, _, name = arguments.model.rpartition(":")
    if not path.endswith(".py") or not name:
        raise _WrongUsageError(f"MODEL.py:NAME: got {arguments.model!r}, expected a Python file and a name in it.")
    if arguments.html is not None:
        _check_report(Path(arguments.html))
    module = _load(Path(path))

    def get(name: str) -> Any:
        return _made(name, _named(module, path, name))

    model, model_args = _named(module, path, name), () if arguments.args is None else get(arguments.args)
    if not isinstance(model_args, tuple):
        raise _WrongUsageError(f"--args: {arguments.args} is a {type(model_args).__name__}, expected a tuple.")
    roles, is_refused = _roles(name, model, model_args)
    print(roles)
    found = None
    if arguments.checkpoint is not None:
        found = _diagnose(arguments, get)
        print(f"\n{found}")
    if arguments.html is not None:
        Path(arguments.html).write_text(report(f"{Path(path).name}:{name}", roles, found), encoding="utf-8")
        print(f"\nWrote {arguments.html}")
    return int(is_refused or (found is not None and "fail" in (found.sampler, found.model)))


def _roles(name: str, model: Any, model_args: tuple) -> tuple[str, bool]:
    """What each site needs, and whether one is refused."""
    if not _is_function(model):
        raise _WrongUsageError(f"{name}: got {type(model).__name__}, expected a NumPyro model, a function.")
    try:
        inspect.signature(model).bind(*model_args)
    except TypeError as error:
        raise _WrongUsageError(f"--args: they do not fit {name} ({error}).") from error
    try:
        found = check_model(model, *model_args)
    except UnknownNormalizerError as error:
        return str(error), True
    if not found.sites:
        raise _WrongUsageError(f"{name}: it has no EBM site, expected a NumPyro model with one, not what makes it.")
    return str(found), False


def report(title: str, roles: str, found: Diagnosis | None) -> str:
    """A page of HTML with nothing outside of it: roles of the sites, and the checks and pictures of a diagnosis.

    Args:
        title: Of the page.
        roles: Text of :func:`ebm_ppl.check_model`.
        found: A diagnosis, where one was made.

    Example:
        >>> "<pre>site" in report("wells.py:model", "site 'x': learned", None)
        True
    """
    body = [f"<h2>What each site needs</h2><pre>{html.escape(roles)}</pre>"]
    if found is not None:
        body += [f"<h2>Diagnosis</h2>{found._repr_html_()}", *_pictures(found)]
    return _PAGE.format(title=html.escape(title), body="\n".join(body))


def _check_report(path: Path) -> None:
    """Before the long work, not after it."""
    if plots is None:
        raise _WrongUsageError(f"--html: figures need the plots extra: pip install 'ebm-ppl[plots]' ({_MISSING}).")
    if path.is_dir() or not path.parent.is_dir():
        raise _WrongUsageError(f"--html: got {path}, expected a file in a folder that exists.")


def _pictures(found: Diagnosis) -> list[str]:
    """Rank and trace plots of the energy of the given chains."""
    assert plots is not None
    shown = []
    for title, plot in (("Ranks of the energy by chain", plots.rank), ("Traces of the energy", plots.trace)):
        stream = io.BytesIO()
        plot(found.tree).savefig(stream, format="png", dpi=110, bbox_inches="tight")
        picture = base64.b64encode(stream.getvalue()).decode()
        shown.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{picture}">')
    return shown


def _diagnose(arguments: argparse.Namespace, get: Callable[[str], Any]) -> Diagnosis:
    state, data = get(arguments.state), get(arguments.data)
    if not isinstance(state, TrainState) or state.sampler is None:
        raise _WrongUsageError(f"--state: {arguments.state} is not the result of ebm.init_train with a sampler.")
    try:
        state = restore(arguments.checkpoint, like=state)
    except (CheckpointError, OSError) as error:
        raise _WrongUsageError(f"--checkpoint: {error}") from error
    options = {"budget": arguments.budget, "num_steps": arguments.num_steps}
    try:
        return diagnose(state.potential, state.sampler, data, jax.random.key(getattr(arguments, "seed", 0)), **options)
    except (TypeError, ValueError, OverflowError) as error:
        raise _WrongUsageError(f"diagnose: {error}") from error


def _load(path: Path) -> Any:
    if not path.is_file():
        raise _WrongUsageError(f"MODEL.py:NAME: there is no file {path}.")
    if (path.parent / "__init__.py").is_file():
        raise _WrongUsageError(f"MODEL.py:NAME: {path} is part of a package, expected a file that imports its model.")
    spec: Any = importlib.util.spec_from_file_location(f"_checked_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for what their annotations mean
    sys.path.insert(0, str(path.parent.resolve()))  # what lies beside it, as when the file itself is run
    spec.loader.exec_module(module)
    return module


def _named(module: Any, path: str, name: str) -> Any:
    if not hasattr(module, name):
        names = sorted(found for found in vars(module) if not found.startswith("_"))
        raise _WrongUsageError(f"{path} has no {name!r}, expected one of {', '.join(names)}.")
    return getattr(module, name)


def _is_function(found: Any) -> bool:
    """Distributions can be called too, and are no functions."""
    return callable(found) and not hasattr(found, "log_prob")


def _made(name: str, found: Any) -> Any:
    """An object, or what a function without arguments makes of it."""
    if not _is_function(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise _WrongUsageError(
            f"{name}: got a function with arguments ({error}), expected an object, or one without."
        ) from error
    return found()
