"The way through the notebooks: their order, links, headings, and what a reader needs and gets."

import importlib.util
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from s5vh_nb.cli.artefacts import PAPERS

ROOT = Path(__file__).resolve().parent.parent


def load_tool(name):
    "A script of tools/ as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


path, equations = load_tool("path"), load_tool("equations")

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
COPIES = sorted((ROOT / "results").glob("*/executed/*.ipynb"))


def name_of(notebook):
    return notebook.relative_to(ROOT).as_posix()


def cells(notebook, kind="markdown"):
    "The sources of a notebook's cells of that kind."
    nb = nbformat.read(notebook, as_version=4)
    return [cell.source for cell in nb.cells if cell.cell_type == kind]


def plain(text):
    "Markdown without its code."
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)


# One order


def test_every_notebook_has_its_place():
    found = path.groups()
    assert [title for title, paths in found if not paths] == []
    assert sorted(each for _, paths in found for each in paths) == NOTEBOOKS


@pytest.fixture
def toy(tmp_path):
    "A project with a title for each notebook, and with outputs in the first one."
    listed = {folder: stems.split() for folder, stems in (path.FIRST | path.LAST).values()}
    for folder, stems in (listed | {f"lib/{wing}": ["00_one", "01_two"] for wing in path.WINGS}).items():
        for number, stem in enumerate(stems):
            there = tmp_path / "nbs" / folder / f"{stem}.ipynb"
            there.parent.mkdir(parents=True, exist_ok=True)
            nb = nbformat.v4.new_notebook(
                cells=[nbformat.v4.new_markdown_cell(f"# {there.stem}", id="title")]
            )
            if there.parent.name in PAPERS:
                parameters = nbformat.v4.new_code_cell("bits = 16", id="p", metadata={"tags": ["parameters"]})
                nb.cells.append(parameters)
                nb.metadata["kernelspec"] = {
                    "name": "python3",
                    "language": "python",
                    "display_name": "python3",
                }
            if number == 0:
                shown = nbformat.v4.new_output("stream", text="\u00b1 1\n")
                nb.cells.append(nbformat.v4.new_code_cell("show()", id="code", outputs=[shown]))
            there.write_text(nbformat.writes(nb) + "\n", encoding="utf-8")
    return tmp_path


def test_list_and_folders_agree(toy):
    "A notebook without a place, and a place without a notebook."
    (toy / "nbs" / "s5vh" / "new.ipynb").touch()
    with pytest.raises(ValueError, match="tools/path.py: expected all notebooks, found no s5vh/new.ipynb"):
        path.groups(toy)
    (toy / "nbs" / "s5vh" / "new.ipynb").rename(toy / "nbs" / "lib" / "ops" / "99_new.ipynb")
    library = dict(path.groups(toy))["Library: ops"]
    assert [each.stem for each in library] == ["00_one", "01_two", "99_new"]
    (toy / "nbs" / "dmmh" / "table1.ipynb").unlink()
    with pytest.raises(ValueError, match="found no dmmh/table1.ipynb"):
        path.groups(toy)


def test_links_change_nothing_else(toy):
    "Twice is once, and without its last cell each notebook has the bytes that it had."
    before = {each: each.read_text(encoding="utf-8") for _, paths in path.groups(toy) for each in paths}
    for each, text in path.made(toy).items():
        each.write_text(text, encoding="utf-8")
    after = path.made(toy)
    assert after == {each: each.read_text(encoding="utf-8") for each in before}
    for each, text in after.items():
        nb = json.loads(text)
        last = nb["cells"].pop()
        assert (last["id"], last["metadata"]) == ("navigation", {"tags": ["nav"]})
        assert path.dumped(nb) == before[each]


def test_links_lead_to_the_neighbours(toy):
    first, second, third = dict(path.groups(toy))["S5VH"][:3]
    results = toy / "results" / "full" / "executed" / "s5vh_neighbours.ipynb"
    results.parent.mkdir(parents=True)
    shutil.copy(second, results)
    links = json.loads(path.made(toy)[second])["cells"][-1]["source"]
    assert (first.stem, second.stem, third.stem) == ("retrieval", "neighbours", "codes")
    assert links == [
        "Previous: [retrieval](retrieval.ipynb) | [Home](../index.ipynb) | Next: [codes](codes.ipynb) | "
        "[Source](neighbours.ipynb) | [Results](../../results/full/executed/s5vh_neighbours.ipynb) | "
        "[Equations and claims](../../docs/equations.md)"
    ]


def test_links_are_current():
    stale = [name_of(each) for each, text in path.made().items() if text != each.read_text(encoding="utf-8")]
    assert not stale, f"{stale} (make prepare)"


# Links and headings


def anchors(text):
    "Headings of a notebook as the ends of links, in the form of JupyterLab, which GitHub shares."
    return {title.replace(" ", "-") for title in re.findall(r"^#{1,6} +(.+)$", plain(text), re.MULTILINE)}


def dead_links(notebook):
    "The relative links of a notebook that lead nowhere; those that its cells show count, but for examples."
    nb = nbformat.read(notebook, as_version=4)
    texts = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    shown = [output.get("data", {}) for cell in nb.cells for output in cell.get("outputs", [])]
    shown = [] if name_of(notebook).startswith("nbs/lib/") else shown
    texts += [data["text/markdown"] for data in shown if "text/markdown" in data]
    for link in re.findall(r"\]\(([^)\s]+)", "\n".join(map(plain, texts))):
        name, _, place = link.partition("#")
        target = notebook.parent / name if name else notebook
        if re.match(r"[a-z]+:", link):
            continue
        headed = target.suffix == ".ipynb" and target.exists()
        if not target.exists() or place and headed and place not in anchors("\n".join(cells(target))):
            yield link


@pytest.mark.parametrize("folder", sorted({each.parent for each in NOTEBOOKS}), ids=name_of)
def test_links_lead_somewhere(folder):
    dead = {name_of(p): links for p in sorted(folder.glob("*.ipynb")) if (links := list(dead_links(p)))}
    assert not dead


def test_links_of_results_lead_somewhere():
    "Of the executed copies that were made since notebooks end with links."
    linked = [copy for copy in COPIES if cells(copy)[-1].startswith("Previous: ")]
    dead = {name_of(copy): links for copy in linked if (links := list(dead_links(copy)))}
    assert not dead


def headings(text):
    "The depths of the headings in Markdown, without those in blocks of code."
    return [len(marks) for marks in re.findall(r"^(#{1,6}) ", plain(text), re.MULTILINE)]


def test_headings_make_a_table_of_contents():
    "One title, in the first line, and no depth is left out."
    wrong = {}
    for notebook in NOTEBOOKS:
        texts = cells(notebook)
        depths = headings("\n\n".join(texts))
        jumps = [b for a, b in zip(depths, depths[1:]) if b > a + 1]
        if not texts[0].startswith("# ") or depths.count(1) != 1 or jumps:
            wrong[name_of(notebook)] = depths
    assert not wrong
    assert headings("# A\n```\n# b\n```\n### C `# d`") == [1, 3]


# What a reader needs and gets

READER = re.compile(r"^\*\*You need\*\* (.+[.)]) \*\*You get\*\* (.+\.)$", re.MULTILINE)


TOLD = [*(f"lib/{wing}" for wing in path.WINGS), "data", "learn", "pages", "s5vh", "dmmh", "beyond"]


@pytest.mark.parametrize("folder", TOLD)
def test_reader_knows_what_a_notebook_needs_and_gives(folder):
    "One line below the summary, not the same in two notebooks."
    said = {}
    for notebook in sorted((ROOT / "nbs" / folder).glob("*.ipynb")):
        found = READER.findall(cells(notebook)[0])
        assert len(found) == 1, (
            f"{name_of(notebook)}: expected **You need** ... **You get** ..., found {found}"
        )
        said[notebook] = found[0]
    assert len({get for _, get in said.values()}) == len(said)
    for notebook, (_, get) in said.items():
        if not folder.startswith("lib/"):
            continue
        module = importlib.import_module(f"s5vh_nb.{notebook.parent.name}.{notebook.stem[3:]}")
        names = re.findall(r"`([A-Za-z_]\w*)(?:[.(][^`]*)?`", get)
        assert names, f"{name_of(notebook)}: it names nothing that it exports"
        assert [name for name in names if not hasattr(module, name)] == []


# From an equation to code, check, figure and verdict, and back


@pytest.fixture(scope="module")
def page():
    return equations.PAGE.read_text(encoding="utf-8")


def test_anchors_and_lines_of_the_page(page):
    "A link to a line leads to the definition of what it is called."
    for name, file, line in re.findall(r"\[`([\w.]+)`\]\((\S+\.py)#L(\d+)\)", page):
        code = (equations.PAGE.parent / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.rpartition('.')[2]}\b", code), (name, file, line)
    places = re.findall(r"\]\(#([^)]+)\)", page)
    github = {re.sub(r"[^\w\-]", "", each.lower()) for each in anchors(page)}
    assert len(places) == sum(map(len, equations.PARTS.values())) and set(places) <= github


def test_cells_of_the_page(page):
    "Where a cell and a line are named, the code begins; the cell that checks it has a test."
    rows = re.findall(
        r"\[`([\w.]+)`\]\(\S+\) \| \[\S+\]\((\S+)\), cell (\d+), line (\d+) \| cell (\d+)", page
    )
    assert len(rows) == page.count(", line ") > 60, "code that no cell checks"
    for name, file, cell, line, check in rows:
        nb = nbformat.read(equations.PAGE.parent / file, as_version=4)
        code = nb.cells[int(cell) - 1].source.splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.rpartition('.')[2]}\b", code), (name, file, cell, line)
        assert re.search(r"\bassert\b|\btest_", nb.cells[int(check) - 1].source), (name, file, check)


def test_claims_and_artefacts_have_a_part(page):
    "Each claim stands on the page once, and each artefact of the papers has its place."
    for paper in equations.PARTS:
        claims = equations.claims_of(paper)
        equations.checked(paper, claims)
        assert all(f"| {claim['claim']} | " in page and claim["verdict"] in page for claim in claims)
    shown = {f"{p.parent.name}/{p.stem}" for p in NOTEBOOKS if p.parent.name in ("s5vh", "dmmh")}
    assert {name for name in shown if f"[{name}](" not in page} == {"s5vh/claims", "dmmh/claims"}
    with pytest.raises(ValueError, match="claim 'it is best': expected one part"):
        equations.checked("DMMH", [{"claim": "it is best"}])


def test_a_test_is_about_what_it_names_most():
    row = equations.Row("S5VH", "L_CL", "", "itq_rotation", ROOT / "nbs" / "index.ipynb", 1, 1)
    assert equations.test_of(row).path.stem == "test_baselines"
    assert equations.test_of(equations.replace(row, name="no_such_name")) is None
