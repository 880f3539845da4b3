"""README.md and the pages of nbs/pages: execute nbs/index.ipynb and the pages, and convert the index.

The README has the index's outputs, not the code of cells tagged `hide-input`; its links start at the root.
"""

import os
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor
from nbdev.clean import nbdev_clean
from traitlets.config import Config

from s5vh_nb.basics.files import atomic_write, write_text

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
PAGES = sorted((ROOT / "nbs" / "pages").glob("*.ipynb"))
NOTE = "<!-- made from nbs/index.ipynb by `make readme`; edit the notebook -->\n\n"


def executed(path):
    "A notebook, executed in its folder."
    nb = nbformat.read(path, as_version=4)
    run = ExecutePreprocessor(timeout=300, kernel_name="python3", extra_arguments=["--log-level=CRITICAL"])
    run.preprocess(nb, {"metadata": {"path": str(path.parent)}})
    return nb


def from_root(match):
    "A relative link of nbs/index.ipynb as seen from the root."
    link = match[2]
    if re.match(r"[a-z]+:|#|/", link):
        return match[0]
    return match[1] + os.path.normpath(os.path.join("nbs", link)) + match[3]


def to_markdown(nb):
    "The text of an executed notebook: without code that is hidden, and without links to its neighbours."
    removed = {"enabled": True, "remove_input_tags": ["hide-input"], "remove_cell_tags": ["nav"]}
    text, _ = MarkdownExporter(config=Config({"TagRemovePreprocessor": removed})).from_notebook_node(nb)
    return text


def readme(nb):
    "The README's text for an executed index."
    text = re.sub(r"(!?\[[^\]]*\]\()([^)\s]+)(\))", from_root, to_markdown(nb))
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def make(path):
    "Execute a notebook and write it, clean; returns it."
    nb = executed(path)
    with atomic_write(path) as tmp:
        nbformat.write(nb, tmp)
    nbdev_clean(str(path))
    return nb


if __name__ == "__main__":
    write_text(ROOT / "README.md", readme(make(INDEX)))
    for page in PAGES:
        make(page)
