"""The pages of this folder as a site: pip install ".[docs]" && sphinx-build -W -n docs build/docs

Every page is also to be read where the repository is hosted: plain Markdown, relative links.
"""

import bn_cy

project = "bn_cy"
author = "The bn_cy developers"
release = bn_cy.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
highlight_language = "none"  # an indented block is a command or a formula

html_theme = "furo"
html_title = f"bn_cy {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_copyright = False
html_extra_path = ["graph.html"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # links to headings, as the hosts of repositories make them

default_role = "autolink"  # `x` in a docstring is a link where it is a public name
autodoc_typehints = "none"  # the docstrings have the types
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_mock_imports = ["dask"]  # for its docstrings alone
autosummary_generate = False
numpydoc_show_class_members = False
