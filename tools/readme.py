"""README.md from nbs/index.ipynb: execute the notebook, convert it, and make its links start at the root.

The notebook's own code stays out of the README (cells tagged `hide-input`), its outputs come in.
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
NOTE = "<!-- made from nbs/index.ipynb by `make readme`; edit the notebook -->\n\n"


def executed_index():
    "The index, executed."
    nb = nbformat.read(INDEX, as_version=4)
    run = ExecutePreprocessor(timeout=300, kernel_name="python3", extra_arguments=["--log-level=CRITICAL"])
    run.preprocess(nb, {"metadata": {"path": str(INDEX.parent)}})
    return nb


def from_root(match):
    "A relative link of nbs/index.ipynb as seen from the root."
    link = match[2]
    if re.match(r"[a-z]+:|#|/", link):
        return match[0]
    return match[1] + os.path.normpath(os.path.join("nbs", link)) + match[3]


def to_markdown(nb):
    "The README's text for an executed index."
    config = Config({"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["hide-input"]}})
    text, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    text = re.sub(r"(!?\[[^\]]*\]\()([^)\s]+)(\))", from_root, text)
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    nb = executed_index()
    write_text(ROOT / "README.md", to_markdown(nb))
    with atomic_write(INDEX) as tmp:
        nbformat.write(nb, tmp)
    nbdev_clean(str(INDEX))
