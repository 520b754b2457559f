"""Scripts that the interpreter of another environment runs; they import nothing from here. See ``_environments.py``."""
