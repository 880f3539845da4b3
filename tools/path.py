"""The path: all notebooks in one order, and a last cell in each that leads to the next one.

The order of the library is that of its folders; the stories are listed here. `groups` says which notebook
is missing from the list, and which one does not exist.
"""

import json
import os
from pathlib import Path

from s5vh_nb.basics.checks import check
from s5vh_nb.basics.files import write_text
from s5vh_nb.cli.artefacts import PAPERS, read_artefact
from s5vh_nb.cli.execute import executed_path

ROOT = Path(__file__).resolve().parent.parent
TAG = "nav"  # of the last cell

FIRST = {  # title -> folder of nbs/ and its notebooks, as one reads them
    "Start": (".", "index"),
    "Learn": (
        "learn",
        "01_hamming_search 02_selective_scan 03_train_s5vh 04_hash_centers 05_image_text_codes "
        "06_judge_a_claim 07_video_search 08_add_a_method",
    ),
    "Overview": ("pages", "claims artefacts speed data glossary project"),
}
WINGS = ("basics", "datasets", "ops", "models", "learning", "search", "measure", "evidence", "cli")
LAST = {  # as `FIRST`, after the library
    "S5VH": (
        "s5vh",
        "retrieval neighbours codes transfer efficiency temporal directions losses centers convergence "
        "audit gain schedule precision claims",
    ),
    "DMMH": ("dmmh", "table1 table2 neighbours evaluation ablations speed arithmetic claims"),
    "Beyond the papers": ("beyond", "plus supervised sensitivity bits long scale copies billion"),
    "Provenance of the data": ("data", "spoken_digits emoji animated_emoji"),
}


def groups(root: Path = ROOT) -> list:
    "`[(title, [path, ...]), ...]` of all notebooks in reading order; `ValueError` where one is amiss."
    nbs = root / "nbs"

    def listed(stories):
        return [
            (title, [nbs / folder / f"{stem}.ipynb" for stem in stems.split()])
            for title, (folder, stems) in stories.items()
        ]

    library = [(f"Library: {wing}", sorted((nbs / "lib" / wing).glob("*.ipynb"))) for wing in WINGS]
    found = [*listed(FIRST), *library, *listed(LAST)]
    names = {str(path.relative_to(nbs)) for _, paths in found for path in paths}
    there = {str(p.relative_to(nbs)) for p in nbs.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    check(names <= there, str(nbs), "what tools/path.py lists", f"no {', '.join(sorted(names - there))}")
    check(there <= names, "tools/path.py", "all notebooks", f"no {', '.join(sorted(there - names))}")
    return found


def title_of(path: Path) -> str:
    "The heading in a notebook's first line."
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    return "".join(first["source"]).partition("\n")[0].removeprefix("# ")


def links(path: Path, before: Path | None, after: Path | None, root: Path) -> str:
    "To the notebook before, the front page, the one after; of an artefact also to its results and equations."

    def link(title, target):
        return f"[{title}]({Path(os.path.relpath(target, path.parent)).as_posix()})"

    found = [f"Previous: {link(title_of(before), before)}"] if before else []
    found += [link("Home", root / "nbs" / "index.ipynb")] if before else []
    found += [f"Next: {link(title_of(after), after)}"] if after else []
    if path.parent.name in PAPERS:
        results = executed_path(read_artefact(path), "full")
        found += [link("Source", path), link("Results", results)] if results.is_file() else []
        found += [link("Equations and claims", root / "docs" / "equations.md")]
    return " | ".join(found)


def dumped(nb: dict) -> str:
    "A notebook as text, as nbdev and Jupyter write it."
    return json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def made(root: Path = ROOT) -> dict:
    "Path -> text of every notebook with its links; the rest of the text is as it was."
    paths, texts = [path for _, group in groups(root) for path in group], {}
    for path, before, after in zip(paths, [None, *paths], [*paths[1:], None]):
        text = path.read_text(encoding="utf-8")
        nb = json.loads(text)
        check(dumped(nb) == text, str(path), "a notebook as nbdev_clean leaves it", "another layout")
        source = [links(path, before, after, root)]
        last = dict(cell_type="markdown", id="navigation", metadata={"tags": [TAG]}, source=source)
        cells = [cell for cell in nb["cells"] if TAG not in cell["metadata"].get("tags", [])]
        texts[path] = dumped(nb | {"cells": [*cells, last]})
    return texts


if __name__ == "__main__":
    for path, text in made().items():
        if text != path.read_text(encoding="utf-8"):
            write_text(path, text)
