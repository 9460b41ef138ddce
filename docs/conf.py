"""Sphinx configuration: `make docs` builds with warnings as errors."""

from importlib.metadata import version as installed_version

project = "sparsekit"
author = "sparsekit contributors"
copyright = "2026, sparsekit contributors"
version = release = installed_version("sparsekit-kernels")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sparsekit {version}"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_mock_imports = ["transformers"]
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# "Attributes:" of a dataclass describe its fields; as separate entries they would appear twice.
napoleon_use_ivar = True
