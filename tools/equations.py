"""docs/equations.md: from each equation and section of the papers to code, test, figure and verdict.

A function or class names its source in parentheses in its docstring, e.g. `(DMMH, section 2)` or
`(S5VH, L_CL; Chuang et al., 2020, eq. 8)`. Claims and their verdicts are those of the claims notebooks.
`PARTS` says which part of a paper a source and a claim belong to; the rest is found.
"""

import ast
import csv
import re
from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import nbformat

from s5vh_nb.basics.checks import check
from s5vh_nb.basics.files import write_text
from s5vh_nb.cli.artefacts import artefacts
from s5vh_nb.cli.execute import executed_path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "equations.md"
ABOUT = 0.2  # a test is about a function if so much of the package's names in it is that one


@dataclass(frozen=True)
class Part:
    "A part of a paper: what it is called here, and what belongs to it."

    title: str
    words: tuple  # a source belongs to the first part one of whose words is in its place
    claims: tuple = ()  # patterns of claims
    artefacts: tuple = ()  # that show more about it than its claims do
    tests: tuple = ()  # `file::name` of those of the whole part


PARTS = {  # in the order in which the method uses them
    "S5VH": (
        Part(
            "Network",
            ("AAAI", "method"),
            ("S5VH beats *", "its lead is largest at few bits", "it reaches its published mAP"),
            ("s5vh/neighbours", "s5vh/audit", "s5vh/gain"),
            (
                "test_release_step::test_two_steps_equal_the_release",
                "test_s5vh::test_a_released_checkpoint_of_full_size_is_accounted_for",
            ),
        ),
        Part(
            "Temporal encoder",
            ("encoder",),
            (
                "two directions *",
                "Mamba beats *",
                "the network needs both directions",
                "directions do not collapse to one",
                "time grows *",
                "memory *",
                "the gap to a Transformer *",
            ),
            ("beyond/long",),
            ("test_mixers::test_mamba_gradients_against_the_reference_scan",),
        ),
        Part(
            "Hash layer",
            ("hash layer",),
            (),
            ("s5vh/codes", "s5vh/audit", "beyond/bits"),
            ("test_s5vh::test_a_code_is_the_vote_of_the_frames",),
        ),
        Part(
            "Decoder",
            ("decoder",),
            (),
            ("s5vh/losses",),
            ("test_release_step::test_two_steps_equal_the_release",),
        ),
        Part(
            "Objective",
            ("learning",),
            (),
            ("s5vh/losses", "s5vh/convergence"),
            ("test_release_step::test_two_steps_equal_the_release",),
        ),
        Part("Reconstruction, L_TR", ("L_TR",), ("reconstruction helps",)),
        Part("Contrast, L_CL", ("L_CL",), ("contrast helps",)),
        Part(
            "Center alignment, L_CA",
            ("L_CA", "warm-up"),
            ("center alignment helps", "with alignment training *"),
            ("s5vh/centers",),
        ),
        Part(
            "Hash centers",
            ("hash centers", "quality"),
            ("semantic centers *", "centers are well separated"),
            ("beyond/sensitivity", "beyond/supervised"),
            ("test_centers::test_the_fast_solver_finds_the_center_of_the_reference",),
        ),
        Part(
            "Training",
            ("implementation", "setup"),
            (),
            ("s5vh/schedule", "s5vh/precision"),
            ("test_training::test_a_killed_run_resumes_to_the_same_codes",),
        ),
        Part(
            "Evaluation and transfer",
            ("evaluation", "transfer"),
            ("its loss under transfer is small", "it loses less than *", "after transfer *"),
        ),
    ),
    "DMMH": (
        Part(
            "MLPs, dilation and Mamba",
            ("MLP", "dilation", "Mamba"),
            ("Mamba helps", "positions help", "dilation helps"),
        ),
        Part("Fusion", ("fusion",), ("both modalities help", "the sum is the best fusion")),
        Part("CNN", ("CNN",), ("the CNN helps",)),
        Part("Bits", ("hash layer",), (), ("dmmh/neighbours",)),
        Part(
            "Whole network",
            ("section",),
            ("DMMH beats *", "DMMH is faster *", "it reaches its published mAP"),
            ("dmmh/neighbours",),
            ("test_dmmh::test_learning_helps",),
        ),
        Part("Loss", ("sister",), ("* term helps",)),
        Part(
            "Tables of the paper",
            ("Table",),
            ("best result in every column", "average gains *", "better than DMMVH", "thirteen baselines"),
            ("dmmh/table1", "dmmh/evaluation"),
        ),
    ),
}

HEAD = """# From the papers to code, test, figure and verdict

Each part of a paper has its functions, with the cell and the test that check them, and the claims about it,
with the notebook that shows them and the verdict. Cells of a notebook are counted from 1, Markdown cells too;
lines are counted in the cell. A source is an equation where its number is known, else a section or the name
of a quantity: the full text of S5VH was not at hand, and DMMH has no equations. *Sister works* are papers by
DMMH's authors that say what the paper leaves out.

Verdicts are those of the full profile: [S5VH](../nbs/s5vh/claims.ipynb), [DMMH](../nbs/dmmh/claims.ipynb).

<!-- made from docstrings, tests and verdicts by `make prepare`; edit the notebooks -->
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
    if ours := re.fullmatch(rf"({'|'.join(PARTS)})(?:'s (sister works)|,\s*(.+))?", part):
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


def identifiers(tree) -> Counter:
    "The names that code uses, and how often."
    names = [getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(tree)]
    return Counter(filter(None, names))


def plain_name(row: Row) -> str:
    "The function or class, of a method its class."
    return row.name.partition(".")[0]


def checking_cell(row: Row) -> int | None:
    "The number of the cell that checks the code: one that names it, else the next one; None without any."
    cells = nbformat.read(row.notebook, as_version=4).cells
    later = [(n, c.source) for n, c in enumerate(cells, 1) if n > row.cell and c.cell_type == "code"]
    checks = {
        number: text
        for number, text in later
        if re.search(r"\bassert\b|\btest_\w+\(", text) and not text.startswith("#| export")
    }
    naming = [n for n, text in checks.items() if re.search(rf"\b{plain_name(row)}\b", text)]
    return next(iter([*naming, *checks]), None)


@dataclass(frozen=True)
class Test:
    "A test function."

    path: Path
    line: int
    name: str
    uses: dict  # name of the package -> how often

    def link(self) -> str:
        "A link to its line."
        return link(f"`{self.name}`", self.path, f"#L{self.line}")


@cache
def tests() -> dict:
    "`file::name` -> test."
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        ours = {a.name for node in froms if (node.module or "").startswith("s5vh_nb") for a in node.names}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                uses = {name: count for name, count in identifiers(node).items() if name in ours}
                found[f"{path.stem}::{node.name}"] = Test(path, node.lineno, node.name, uses)
    return found


def test_of(row: Row) -> Test | None:
    "The test function that is most about the code; None where none is."
    name = plain_name(row)
    shares = {
        key: test.uses.get(name, 0) / sum(test.uses.values()) for key, test in tests().items() if test.uses
    }
    best = max(shares, key=shares.get)
    return tests()[best] if shares[best] >= ABOUT else None


def link(title: str, path: Path, place: str = "") -> str:
    "A link from the page to a file of the project."
    return f"[{title}](../{path.relative_to(ROOT).as_posix()}{place})"


def code_link(row: Row) -> str:
    "The name with a link to its line in the package."
    path = ROOT / "s5vh_nb" / row.notebook.parent.name / f"{row.notebook.stem.split('_', 1)[1]}.py"
    lines = {name: node.lineno for name, node in definitions(ast.parse(path.read_text(encoding="utf-8")))}
    return link(f"`{row.name}`", path, f"#L{lines[row.name]}")


def pins(row: Row) -> str:
    "Links to what checks the code."
    cell, test = checking_cell(row), test_of(row)
    found = [f"cell {cell}"] if cell else []
    found += [test.link()] if test else []
    return ", ".join(found)


def table(columns: str, lines: list) -> str:
    "A table in Markdown."
    texts = [" | ".join(text.replace("|", "\\|") for text in line) for line in lines]
    rule = "|".join("---" for _ in columns.split(" | "))
    return "".join(f"| {text} |\n" for text in (columns, *texts)).replace(" |\n", f" |\n|{rule}|\n", 1)


def code_table(found: list) -> str:
    "Source, what, code, notebook and checks of rows."
    lines = []
    for row in found:
        label = f"{row.notebook.parent.name}/{row.notebook.stem}"
        where = f"{link(label, row.notebook)}, cell {row.cell}, line {row.line}"
        lines.append((row.place, row.what, code_link(row), where, pins(row)))
    return table("equation or section | what | code | notebook | checked by", lines)


def claims_of(paper: str) -> list:
    "The claims of a paper as its notebook judged them, a dictionary each."
    path = ROOT / "results" / "full" / "tables" / f"{paper.lower()}_claims.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@cache
def shown() -> dict:
    "Name of an artefact -> links to its notebook, and to its results and first figure where they exist."
    found = {}
    for artefact in artefacts(ROOT):
        figures = [ROOT / "figures" / "full" / artefact.paper / f"{name}.png" for name in artefact.figures]
        more = [
            ("results", executed_path(artefact, "full")),
            *(("figure", path) for path in figures[:1]),
        ]
        links = ", ".join(link(title, path) for title, path in more if path.is_file())
        found[artefact.name] = link(artefact.name, artefact.path) + (f" ({links})" if links else "")
    return found


def claim_table(claims: list) -> str:
    "Claims, each with its verdicts by data set and the notebook that shows it."
    lines = {}
    for claim in claims:
        verdicts = lines.setdefault((claim["claim"], claim["notebook"]), [])
        verdicts.append(f"{claim['data']}: {claim['verdict']}")
    found = [(text, "; ".join(verdicts), shown()[name]) for (text, name), verdicts in lines.items()]
    return table("claim | verdict | shown in", found)


def belongs(name: str, patterns: tuple) -> bool:
    "Whether one of the patterns fits."
    return any(fnmatch(name, pattern) for pattern in patterns)


def part_of(row: Row) -> Part:
    "The part of its paper that a source belongs to."
    for part in PARTS[row.paper]:
        if any(word.lower() in row.place.lower() for word in part.words):
            return part
    raise ValueError(
        f"{row.name}: expected a part of {row.paper} that tools/equations.py has, found {row.place}"
    )


def checked(paper: str, claims: list):
    "`ValueError` for a claim that no part has, or several have."
    for claim in claims:
        parts = [part.title for part in PARTS[paper] if belongs(claim["claim"], part.claims)]
        check(len(parts) == 1, f"claim {claim['claim']!r}", "one part of tools/equations.py", parts or "none")


def counted(claims: list) -> str:
    "How many claims have which verdict."
    counts = Counter(claim["verdict"] for claim in claims)
    return ", ".join(f"{verdict}: {count}" for verdict, count in sorted(counts.items()))


def section(paper: str, part: Part, found: list, claims: list) -> tuple:
    "The text about a part, and its line of the overview."
    title = f"{paper}: {part.title}"
    names = list(dict.fromkeys([*(claim["notebook"] for claim in claims), *part.artefacts]))
    text = f"\n### {title}\n"
    text += f"\n{code_table(found)}" if found else ""
    text += f"\n{claim_table(claims)}" if claims else ""
    more = [tests()[name].link() for name in part.tests]
    text += f"\nTests of the whole: {', '.join(more)}.\n" if more else ""
    more = [shown()[name] for name in part.artefacts]
    text += f"\nSee also: {', '.join(more)}.\n" if more else ""
    anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    functions = ", ".join(dict.fromkeys(f"`{row.name}`" for row in found))
    notebooks = ", ".join(link(name, ROOT / "nbs" / f"{name}.ipynb") for name in names)
    return text, (f"[{title}](#{anchor})", functions, notebooks, counted(claims))


def page() -> str:
    "The text of docs/equations.md."
    found = [row for path in sorted((ROOT / "nbs" / "lib").glob("*/*.ipynb")) for row in rows(path)]
    found.sort(key=lambda row: (row.paper, row.notebook, row.cell, row.line))
    texts, overview = [], []
    for paper, parts in PARTS.items():
        claims, own = claims_of(paper), [row for row in found if row.paper == paper]
        checked(paper, claims)
        texts.append(f"\n## {paper}\n")
        for part in parts:
            here = [row for row in own if part_of(row) == part]
            text, line = section(paper, part, here, [c for c in claims if belongs(c["claim"], part.claims)])
            texts.append(text)
            overview.append(line)
    others = [row for row in found if row.paper not in PARTS]
    works = code_table([replace(row, place=f"{row.paper}, {row.place}".rstrip(", ")) for row in others])
    first = table("part | code | shown in | verdicts", overview)
    return f"{HEAD}\n{first}{''.join(texts)}\n## What the papers build on\n\n{works}"


if __name__ == "__main__":
    write_text(PAGE, page())
