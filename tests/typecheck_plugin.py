"""A pytest plugin (``-p tests.typecheck_plugin``): every annotation of the package is checked at every call."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping

jaxtyping.install_import_hook("ebm_ppl", "beartype.beartype")
