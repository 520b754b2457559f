"""``python -m ebm_ppl check MODEL.py:model``: what each EBM site needs, and the diagnosis of a saved run, from a shell.

A thin door to :func:`ebm_ppl.check_model` and :func:`ebm_ppl.diagnostics.diagnose`. What they take is named by attributes
of the file, each an object or a function without arguments that makes it. The file is run, as an import runs it: check
only files that you trust.
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
    parser.add_argument("--seed", type=int, default=0, help="of the diagnosis (default 0)")
    parser.add_argument("--html", metavar="FILE", help="write a report with figures (needs the plots extra)")


def check(arguments: argparse.Namespace) -> int:
    """Print what was asked for; write the report.

    Returns:
        The exit status: 1 where a site is refused or a verdict is "fail", 0 otherwise.

    Raises:
        SystemExit: a file, a name or an option is not as expected; the text says which.
    """
    path, _, name = arguments.model.rpartition(":")
    if not path.endswith(".py") or not name:
        raise SystemExit(f"MODEL.py:NAME: got {arguments.model!r}, expected a Python file and a name in it.")
    module = _load(Path(path))
    model, model_args = _named(module, path, name), ()
    if arguments.args is not None:
        model_args = _made(arguments.args, _named(module, path, arguments.args))
        if not isinstance(model_args, tuple):
            raise SystemExit(
                f"--args: {arguments.args} is a {type(model_args).__name__}, expected a tuple of arguments."
            )
    try:
        roles = str(check_model(model, *model_args))
        is_refused = False
    except UnknownNormalizerError as error:
        roles, is_refused = str(error), True
    print(roles)
    found = None
    if arguments.checkpoint is not None:
        found = _diagnose(arguments, lambda name: _made(name, _named(module, path, name)))
        print(f"\n{found}")
    if arguments.html is not None:
        Path(arguments.html).write_text(report(f"{Path(path).name}:{name}", roles, found))
        print(f"\nWrote {arguments.html}")
    return int(is_refused or (found is not None and "fail" in (found.sampler, found.model)))


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


def _pictures(found: Diagnosis) -> list[str]:
    """Rank and trace plots of the energy of the given chains."""
    if plots is None:
        raise SystemExit(f"--html: figures need the plots extra: pip install 'ebm-ppl[plots]' ({_MISSING}).")
    shown = []
    for title, plot in (("Ranks of the energy by chain", plots.rank), ("Traces of the energy", plots.trace)):
        stream = io.BytesIO()
        plot(found.tree).savefig(stream, format="png", dpi=110, bbox_inches="tight")
        picture = base64.b64encode(stream.getvalue()).decode()
        shown.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{picture}">')
    return shown


def _diagnose(arguments: argparse.Namespace, get: Callable[[str], Any]) -> Diagnosis:
    try:
        state = restore(arguments.checkpoint, like=get(arguments.state))
    except (CheckpointError, OSError) as error:
        raise SystemExit(f"--checkpoint: {error}") from error
    if state.sampler is None:
        raise SystemExit("--checkpoint: its state has no chains, expected one that was trained with a sampler.")
    key = jax.random.key(arguments.seed)
    options = {"budget": arguments.budget, "num_steps": arguments.num_steps}
    return diagnose(state.potential, state.sampler, get(arguments.data), key, **options)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise SystemExit(f"MODEL.py:NAME: there is no file {path}.")
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # what lies beside it, as when the file itself is run
    spec.loader.exec_module(module)
    return module


def _named(module: Any, path: str, name: str) -> Any:
    if not hasattr(module, name):
        names = sorted(found for found in vars(module) if not found.startswith("_"))
        raise SystemExit(f"{path} has no {name!r}, expected one of {', '.join(names)}.")
    return getattr(module, name)


def _made(name: str, found: Any) -> Any:
    """An object, or what a function without arguments makes of it."""
    if not inspect.isfunction(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise SystemExit(
            f"{name}: got a function with arguments ({error}), expected an object, or one without."
        ) from error
    return found()
