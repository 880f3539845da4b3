"Make the pictures in the lib, learn and data notebooks small, and leave out the sliders beside them."

from pathlib import Path

import nbformat

from s5vh_nb.basics.files import write_text
from s5vh_nb.cli.execute import shrink_pictures
from s5vh_nb.evidence.lessons import stand_still

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    patterns = ("nbs/lib/*/*.ipynb", "nbs/learn/*.ipynb", "nbs/data/*.ipynb")
    for path in sorted(path for pattern in patterns for path in ROOT.glob(pattern)):
        nb = nbformat.read(path, 4)
        before = nbformat.writes(nb)
        shrink_pictures(nb)
        stand_still(nb)
        if (text := nbformat.writes(nb)) != before:
            write_text(path, text + "\n")
