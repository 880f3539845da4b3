"Settings of Sphinx for the site; `make docs` gives it the pages."

import inspect
import logging
import re
from importlib.util import find_spec
from pathlib import Path

import s5vh_nb

logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells which of its builds it loads

project = "s5vh_nb"
author = "the s5vh_nb authors"
version = release = s5vh_nb.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.githubpages",  # .nojekyll
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # nothing comes from another host
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True  # $$...$$ needs no empty line before it
myst_heading_anchors = 6
copybutton_exclude = ".linenos, .gp, .go"

# formulas are drawn by MathJax from a package of PyPI, in as many of its files as that takes
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static"
mathjax_path = "mathjax/tex-chtml.js"
exclude_patterns = ["mathjax/*svg*.js", "mathjax/*mml*.js", "mathjax/*full*.js", "mathjax/node-main.js"]

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
default_role = "code"
# other packages have no pages here, and neither have private classes
nitpick_ignore_regex = [("py:.*", r"(?!s5vh_nb\.).*"), ("py:.*", r"s5vh_nb\.(.*\.)?_\w+")]

html_theme = "furo"
html_title = "s5vh_nb"
html_favicon = "icon.svg"
html_static_path = ["custom.css", "custom.js", str(MATHJAX)]
html_css_files = ["custom.css"]
html_js_files = ["custom.js"]
html_theme_options = {"top_of_page_buttons": ["view"]}  # the notebook in the repository
html_show_sourcelink = False
html_copy_source = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def plain(text: str) -> str:
    "A line of a docstring in which only `code` is marked, for docutils; letters may follow it, as in `x`s."
    parts = re.split(r"(`[^`]+`)", text)
    escaped = [re.sub(r"([*|\\]|_\b)", r"\\\1", part) for part in parts[::2]]
    code = [rf"\ {part}\ " for part in parts[1::2]] + [""]
    return "".join(before + after for before, after in zip(escaped, code))


def docstring(app, what, name, obj, options, lines):
    "A docstring as napoleon leaves it: types stand in the signature, and what is no markup is no markup."
    if what in ("attribute", "property"):  # for napoleon, a colon ends the name of a type
        lines[:] = [plain(line) for line in inspect.cleandoc(obj.__doc__ or "").splitlines()]
        return
    kept = [re.match(r"( *(?::[^:]+: ?)?)(.*)", line) for line in lines if not re.match(r" *:r?type", line)]
    lines[:] = [line[1] + plain(line[2]) for line in kept]


def button(app, page, template, context, doctree):
    "Only the page of a notebook shows the way to its source."
    if context.get("page_source_suffix") != ".ipynb":
        context["page_source_suffix"] = ""


def setup(app):
    app.connect("html-page-context", button)
    app.connect("autodoc-process-docstring", docstring, priority=600)  # after napoleon
