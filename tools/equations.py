"""docs/equations.md: from each equation and section of the papers to the line that computes it.

A function or class names its source in parentheses in its docstring, e.g. `(DMMH, section 2)` or
`(S5VH, L_CL; Chuang et al., 2020, eq. 8)`. The table is made of these.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from s5vh_nb.basics.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "equations.md"
PAPERS = ("S5VH", "DMMH")

# words in the name of a section or an equation, in the order in which the method uses them
METHOD = {
    "S5VH": (
        "AAAI",
        "method",
        "encoder",
        "hash layer",
        "decoder",
        "learning",
        "L_TR",
        "L_CL",
        "L_CA",
        "warm-up",
        "hash centers",
        "quality",
        "implementation",
        "setup",
        "evaluation",
        "transfer",
    ),
    "DMMH": ("MLP", "dilation", "Mamba", "fusion", "CNN", "hash layer", "section", "sister", "Table"),
}

HEAD = """# From the papers to the code

Each row leads from an equation or a section of a paper to the code that computes it. Cells of a notebook are
counted from 1, Markdown cells too, and lines are counted in the cell. *Sister works* are papers by DMMH's
authors that say what the paper leaves out. The last rows are of works that both papers build on.

<!-- made from the docstrings in nbs/lib by `make prepare`; edit the notebooks -->

| paper | equation or section | what | code | notebook |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    "One source that a docstring names."

    paper: str  # S5VH, DMMH, or a work by its authors and year
    place: str  # equation or section; may be empty
    what: str  # first sentence of the docstring
    name: str  # of the function or class, Class.method for a method
    notebook: Path  # of the library
    cell: int  # from 1
    line: int  # in the cell, from 1


def groups(text: str) -> list:
    "The texts in parentheses, outermost ones only."
    found = []
    depth = start = 0
    for i, letter in enumerate(text):
        if letter == "(":
            start, depth = (i + 1 if depth == 0 else start), depth + 1
        elif letter == ")" and depth:
            depth -= 1
            if depth == 0:
                found.append(text[start:i])
    return found


def source(part: str) -> tuple | None:
    "`(paper, place)` of one source, e.g. `S5VH, L_CL` or `Charikar 2002`; None for any other text."
    part = part.strip().removeprefix("after ")
    if ours := re.fullmatch(rf"({'|'.join(PAPERS)})(?:'s (sister works)|,\s*(.+))?", part):
        return ours[1], ours[2] or ours[3] or ""
    other = re.fullmatch(r"([A-Z][\w&.\- ]+?),?\s+((?:19|20)\d\d)(?:,\s*(.+))?", part)
    return (f"{other[1]}, {other[2]}", other[3] or "") if other else None


def sources(docstring: str) -> tuple:
    "`(what, [(paper, place), ...])`: the first sentence without its sources, and all sources."
    text = " ".join(docstring.split("\n\n")[0].split())
    found = []
    for group in groups(" ".join(docstring.split())):
        named = [each for part in group.split(";") if (each := source(part))]
        found += named
        if named:
            text = text.replace(f" ({group})", "")
    return re.split(r"(?<=[.!?])\s", text)[0].rstrip("."), found


def definitions(tree) -> list:
    "`(name, node)` of the functions and classes of a cell, and of the methods of its classes."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    own = [(node.name, node) for node in tree.body if isinstance(node, kinds)]
    methods = [
        (f"{name}.{inner.name}", inner)
        for name, node in own
        if isinstance(node, ast.ClassDef)
        for inner in node.body
        if isinstance(inner, kinds)
    ]
    return own + methods


def rows(notebook: Path) -> list:
    "The rows of one notebook of the library."
    found = []
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells, 1):
        if cell.cell_type != "code" or not cell.source.startswith("#| export"):
            continue
        for name, node in definitions(ast.parse(cell.source)):
            what, named = sources(ast.get_docstring(node) or "")
            found += [Row(paper, place, what, name, notebook, number, node.lineno) for paper, place in named]
    return found


def order(row: Row) -> tuple:
    "Sort key: the papers, then the works they build on; in a paper the order of the method."
    words = METHOD.get(row.paper, ())
    hits = [i for i, word in enumerate(words) if word.lower() in row.place.lower()]
    position = min(hits, default=len(words))
    paper = PAPERS.index(row.paper) if row.paper in PAPERS else len(PAPERS)
    return paper, row.paper, position, row.notebook, row.cell, row.line


def module_link(row: Row) -> str:
    "The name with a link to its line in the package."
    wing, stem = row.notebook.parent.name, row.notebook.stem.split("_", 1)[1]
    path = ROOT / "s5vh_nb" / wing / f"{stem}.py"
    lines = {name: node.lineno for name, node in definitions(ast.parse(path.read_text(encoding="utf-8")))}
    return f"[`{row.name}`](../s5vh_nb/{wing}/{stem}.py#L{lines[row.name]})"


def page() -> str:
    "The text of docs/equations.md."
    found = [row for path in sorted((ROOT / "nbs" / "lib").glob("*/*.ipynb")) for row in rows(path)]
    lines = []
    for row in sorted(found, key=order):
        label = f"{row.notebook.parent.name}/{row.notebook.stem}"
        link = f"[{label}](../{row.notebook.relative_to(ROOT).as_posix()}), cell {row.cell}, line {row.line}"
        texts = [text.replace("|", "\\|") for text in (row.paper, row.place, row.what)]
        lines.append("| " + " | ".join([*texts, module_link(row), link]) + " |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    write_text(PAGE, page())
