"""Settings of Sphinx for the site; `docs.__main__` writes the sources beside it."""

from __future__ import annotations

from typing import Any

from docs import hooks
from jkv import __version__

project = "jkv"
version = release = __version__
copyright = "the jkv authors"
html_title = f"jkv {__version__}"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton"]
# `code` in a docstring links to what it names, where that is public.
default_role = "py:obj"
smartquotes_action = "D"  # dashes; quotes stay those of code
nitpicky = True
suppress_warnings = ["myst.header"]  # CHANGELOG and the commands begin at deeper levels
nb_execution_mode = "off"  # the tests run the notebooks
myst_heading_anchors = 3

autoclass_content = "both"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["site.css"]


def setup(app: Any) -> None:
    """Connect what links names and lists fields."""
    hooks.connect(app)
