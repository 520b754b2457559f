"""Sphinx configuration. `make docs` builds the site with every warning an error."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import api_pages
import readme

import ebm_ppl

project = "ebm_ppl"
author = "the ebm_ppl contributors"
version = release = ebm_ppl.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ebm_ppl {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes listed in a docstring are text, not entries next to those autodoc makes

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make tutorials` executes the notebooks; the site shows what they hold
suppress_warnings = ["myst-nb.lexer"]  # a notebook that was never saved by Jupyter does not name its language

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Links into other projects' documentation need their inventories, hence the network. They are off unless asked for, so
# that the build is the same everywhere: `make docs EBM_PPL_INTERSPHINX=1`.
if os.environ.get("EBM_PPL_INTERSPHINX"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "numpyro": ("https://num.pyro.ai/en/stable", None),
        "blackjax": ("https://blackjax-devs.github.io/blackjax", None),
        "arviz": ("https://python.arviz.org/en/latest", None),
        "equinox": ("https://docs.kidger.site/equinox", None),
    }


def skip_member(app, what, name, value, skip, options):
    """Leave out the fields of named tuples: the class docstring lists them, autodoc would add "field number 0"."""
    return True if type(value).__name__ == "_tuplegetter" else None


def source_of(app, modname, attribute):
    """Where the source page of a documented name is: that of its own module, never one of Python's built-in types."""
    value = sys.modules.get(modname)
    for name in attribute.split("."):
        value = getattr(value, name, None)
    return modname if getattr(value, "__module__", None) == "builtins" else None


def setup(app):
    """Write the pages that follow from the code, and let index.md show the README."""
    app.connect("autodoc-skip-member", skip_member)
    app.connect("viewcode-follow-imported", source_of)
    app.connect("builder-inited", lambda app: api_pages.write(HERE / "generated"))
    app.connect("builder-inited", lambda app: readme.copy_tutorials(HERE / "generated" / "tutorials"))
    app.connect("source-read", readme.insert)
