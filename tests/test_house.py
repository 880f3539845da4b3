"House rules: package and notebooks agree, imports go one way, code has one style, files are few."

import ast
import asyncio
import base64
import configparser
import contextlib
import copy
import fnmatch
import importlib
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from xml.etree import ElementTree

import jupyter_client
import nbformat
import pytest
from browser import Reloaded
from IPython.core.inputtransformer2 import TransformerManager
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from nbdev.showdoc import show_doc
from PIL import Image
from traitlets.config import PyFileConfigLoader

import s5vh_nb
from s5vh_nb.basics.config import S5VHConfig
from s5vh_nb.basics.files import find_root
from s5vh_nb.cli import artefacts as cli_artefacts
from s5vh_nb.cli.artefacts import PAPERS, read_artefact
from s5vh_nb.search.scores import average_precision

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "s5vh_nb"
BIN = Path(sys.prefix) / "bin"
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
LIBRARY = [path for path in NOTEBOOKS if path.parent.parent.name == "lib"]
ARTEFACTS = [path for path in NOTEBOOKS if path.parent.name in PAPERS]
SCRIPTS = sorted(path for folder in ("benchmarks", "tools") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS += [ROOT / "setup.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
READERS = [  # what a wheel brings along beside the package, see setup.py
    name
    for part in """CITATION.cff LICENSE LOG.md README.md settings.ini nbs figures/drawings figures/full
        results/earlier results/expected results/expected.csv results/published results/full/evidence
        results/full/executed results/full/tables""".split()
    for path in (ROOT / part, *(ROOT / part).rglob("*"))
    if path.is_file() and "/." not in (name := path.relative_to(ROOT).as_posix())
]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
KERNELS = PYPROJECT["tool"]["ruff"]["lint"]["per-file-ignores"]  # patterns of notebooks with compiled kernels

WINGS = ("basics", "datasets", "ops", "models", "learning", "search", "measure", "evidence", "cli")
PARAMETERS = {"profile", "dataset", "bits", "seeds", "device", "data_root"}
MEGABYTES, FILES = 45, 620  # of tracked files, at most

# the contracts: public names that may wait for their first user in the repository
PUBLIC = """
    selective_scan Mamba Mamba2 LSTM RetNet RWKV Transformer Bidirectional S5VH S5VHOutput DMMH
    hash_centers HashCenters reconstruction_loss contrastive_loss center_alignment_loss metric_loss
    hamming_distances hamming_search radius_search Within map_at_k gmap precision_recall load train
    Learnt Scores Protocol Study Extractor Extraction
""".split()

in_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout: nothing is tracked")


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def tracked():
    "The files under version control."
    words = ["git", "ls-files", "-z"]
    listed = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, encoding="utf-8").stdout
    return [path for name in listed.split("\0") if (path := ROOT / name).is_file()]


# Package, notebooks and what is made from them


@pytest.fixture(scope="module")
def remade():
    "A copy of the project in which the package was exported anew and the notebooks were cleaned."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in READERS:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        shutil.copytree(PACKAGE / "data", copy / "s5vh_nb" / "data")
        export(copy)
        subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True, capture_output=True)
        yield copy


def export(copy):
    "The package of a copy of the project, from its notebooks."
    for name in ("s5vh_nb/__init__.py", "s5vh_nb/py.typed", "tools/export.py", "pyproject.toml", "setup.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    env = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "tools/export.py"], cwd=copy, check=True, capture_output=True, env=env)


def test_package_equals_notebooks(remade):
    here, there = ({p.relative_to(r).as_posix() for p in r.glob("s5vh_nb/**/*.py")} for r in (ROOT, remade))
    assert here == there, "modules without a notebook, or not exported (make prepare)"
    different = [name for name in sorted(here) if (ROOT / name).read_bytes() != (remade / name).read_bytes()]
    assert not different, f"these modules differ from their notebooks: {different} (make prepare)"


def test_notebooks_are_clean(remade):
    unclean = [name_of(p) for p in NOTEBOOKS if p.read_bytes() != (remade / p.relative_to(ROOT)).read_bytes()]
    assert not unclean, f"nbdev_clean would change {unclean} (make prepare)"


def test_lab_takes_a_notebook_for_unchanged(remade, monkeypatch):
    """Lab finds in a notebook what it writes into it once a kernel has started, so it marks nothing.

    The notebook is saved as it was committed, an artefact notebook that ran as well. Pictures become small.
    """
    assert "jupyter lab --config=tools/lab.py" in (ROOT / "Makefile").read_text(encoding="utf-8")
    config = PyFileConfigLoader("lab.py", ROOT / "tools").load_config()
    monkeypatch.chdir(remade)
    files = config.ServerApp.contents_manager_class(root_dir=str(remade))
    with jupyter_client.run_kernel(kernel_name="python3") as client:
        info = client.kernel_info(reply=True, timeout=60)["content"]["language_info"]
    spec = jupyter_client.kernelspec.get_kernel_spec("python3")
    named = dict(name="python3", display_name=spec.display_name, language=spec.language)
    for path in map(name_of, (LIBRARY[0], ARTEFACTS[0])):
        model = asyncio.run(files.get(path))
        nb = model["content"]
        assert (nb.metadata.kernelspec, nb.metadata.language_info) == (named, info)
        if path == name_of(ARTEFACTS[0]):
            ran = next(cell for cell in nb.cells if cell.cell_type == "code")
            ran.update(execution_count=1, outputs=[nbformat.v4.new_output("stream", text="done")])
        asyncio.run(files.save(model, path))
        assert (remade / path).read_bytes() == (ROOT / path).read_bytes(), path
    file = io.BytesIO()
    Image.effect_noise((99, 99), 50).convert("RGBA").save(file, "PNG")
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    cell = {"cell_type": "code", "metadata": {}, "execution_count": 1, "source": "", "outputs": [output]}
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
    files.run_pre_save_hooks(model={"type": "notebook", "content": content}, path=name_of(LIBRARY[0]))
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).mode == "P"
    with_widgets = [name_of(path) for path in NOTEBOOKS if b"widget-view" in path.read_bytes()]
    assert not with_widgets, "Lab writes the numbers of widgets anew"


@pytest.fixture
def lab(remade, tmp_path):
    "Port and token of JupyterLab in the copy of the project, set as `make lab` sets it, while it runs."
    pytest.importorskip("jupyterlab", reason="the extra `lab` is not installed")
    words = [BIN / "jupyter", "lab", f"--config={ROOT}/tools/lab.py", f"--ServerApp.root_dir={remade}"]
    words += ["--no-browser", "--allow-root", "--expose-app-in-browser"]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            for line in map(bytes.decode, server.stdout):
                if found := re.search(r"127\.0\.0\.1:(\d+)/lab\?token=(\w+)", line):
                    threading.Thread(target=server.stdout.read).start()
                    yield found.groups()
                    break
        finally:
            server.terminate()


UNTIL = """window.until = async get => {
    let got;
    while (!(got = get())) await new Promise(done => setTimeout(done, 50));
    return got;
}; true"""
OPENED = """(async () => {
    const widgets = () => [...(window.jupyterapp?.shell.widgets("main") ?? [])];
    window.panel = await until(() => widgets().find(each => each.context?.path.endsWith(".ipynb")));
    await panel.context.ready;
    await (await until(() => panel.sessionContext.session?.kernel)).info;
    await until(() => panel.sessionContext.session.kernel.status == "idle");
    return panel.context.model.dirty;
})()"""
MOVED = """(async () => {
    const slider = await until(() => panel.node.querySelector("[role=slider]"));
    const picture = () => slider.closest(".jp-OutputArea").querySelector("img");
    const first = picture().src;
    slider.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
    await until(() => picture().src != first);
    return picture().alt;
})()"""


def marked(browser, url):
    "Whether the notebook that Lab opens is marked as changed. At times Lab loads its page anew as it starts."
    browser.open(url)
    for _ in range(3):
        with contextlib.suppress(Reloaded):
            browser.js(UNTIL)
            return browser.js(OPENED)


def test_lab_runs_a_notebook_and_saves_what_was_committed(remade, lab, browser):
    "Opened, it is not marked; run, it has a slider that redraws its picture, which has a text; then saved."
    name = "nbs/lib/evidence/17_lessons.ipynb"
    assert marked(browser, "http://127.0.0.1:{}/lab/tree/{}?token={}".format(lab[0], name, lab[1])) is False
    assert browser.js("jupyterapp.commands.execute('notebook:run-all-cells')") is True
    assert browser.js(MOVED) == "A sine wave of two periods."
    assert browser.js("panel.context.save().then(() => panel.context.model.dirty)") is False
    before, after = ((folder / name).read_text(encoding="utf-8") for folder in (ROOT, remade))
    pictures = re.compile(r'"image/png": "[^"]+"')
    assert pictures.sub("", after) == pictures.sub("", before)


OUTPUTS = """panel.content.widgets.filter(cell => cell.model.type == "code").map(cell =>
    cell.model.outputs.toJSON().map(each => each.output_type == "stream" ? each.name : each.output_type)
).flat()"""


def test_lab_runs_an_artefact(lab, browser):
    "All cells of a notebook that trains nothing: a figure and tables, no error, nothing on stderr."
    address = "http://127.0.0.1:{}/lab/tree/nbs/dmmh/table1.ipynb?token={}"
    assert marked(browser, address.format(*lab)) is False
    assert browser.js("jupyterapp.commands.execute('notebook:run-all-cells')") is True
    kinds = browser.js(OUTPUTS)
    assert "display_data" in kinds and not {"error", "stderr"} & set(kinds), kinds


@pytest.fixture(scope="module")
def wheel(remade):
    "A wheel from a source distribution, from a folder in which notebooks have been opened and run."
    left = "nbs/.ipynb_checkpoints/old.ipynb", "nbs/lib/.last_checked", "nbs/index.ipynb.tmp-1"
    for name in (*left, "results/full/runs/one.json", "results/quick/two.json"):
        (remade / name).parent.mkdir(parents=True, exist_ok=True)
        (remade / name).write_text("{}", encoding="utf-8")
    code = "from setuptools import build_meta; build_meta.build_sdist('.')"
    subprocess.run([sys.executable, "-c", code], cwd=remade, check=True, capture_output=True)
    with tarfile.open(next(remade.glob("*.tar.gz"))) as source:
        source.extractall(remade / "source", filter="data")
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "."]
    subprocess.run([*words, next((remade / "source").iterdir())], cwd=remade, check=True, capture_output=True)
    with zipfile.ZipFile(next(remade.glob("*.whl"))) as file:
        yield file


def test_wheel_has_everything(wheel):
    "All modules, the data files, licences, how to cite it, and the command's function."
    names = set(wheel.namelist())
    entry = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    module, function = re.search(r"^s5vh-nb = ([\w.]+):(\w+)$", entry, re.MULTILINE).groups()
    assert f"def {function}(" in wheel.read(module.replace(".", "/") + ".py").decode()
    data = {name_of(path) for path in (PACKAGE / "data").rglob("*") if path.is_file()}
    assert data | {name_of(path) for path in PACKAGE.rglob("*.py")} | {"s5vh_nb/py.typed"} <= names
    about = {name.partition(".dist-info/")[2] for name in names}
    assert {f"licenses/{n}" for n in ("LICENSE", "CITATION.cff", "s5vh_nb/data/LICENSES.md")} <= about
    metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert f"\nVersion: {s5vh_nb.__version__}\n" in metadata


def test_wheel_brings_the_notebooks_and_what_they_read(wheel, tmp_path, monkeypatch):
    "No less than is committed, and nothing that newcomers' runs wrote."
    (tmp_path / "notebooks.zip").write_bytes(wheel.read("s5vh_nb/notebooks.zip"))
    monkeypatch.setattr(cli_artefacts, "_NOTEBOOKS", tmp_path / "notebooks.zip")
    root = cli_artefacts.unpack_notebooks(tmp_path / "mine")
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert found == set(READERS)
    monkeypatch.chdir(root / "nbs" / "s5vh")
    assert find_root() == root and len(cli_artefacts.artefacts()) == len(ARTEFACTS)


def test_version_comes_from_settings(tmp_path):
    "A new one there reaches the package, its metadata and the citation."
    cited = re.search(r"(?m)^version: (.*)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"))[1]
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    stated = re.search(r"(?m)^version = (.*)", settings)[1]
    assert stated == cited == s5vh_nb.__version__ and "version" in PYPROJECT["project"]["dynamic"]
    (tmp_path / "nbs/lib/basics").mkdir(parents=True)
    for name in ("CITATION.cff", "README.md", "LICENSE", name_of(LIBRARY[0])):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "settings.ini").write_text(
        settings.replace(f"version = {stated}", "version = 7.8.9"), "utf-8"
    )
    export(tmp_path)
    for name in ("s5vh_nb/__init__.py", "CITATION.cff"):
        assert (
            "7.8.9"
            in (tmp_path / name).read_text(encoding="utf-8")
            != (ROOT / name).read_text(encoding="utf-8")
        )


def test_docstrings_are_free_of_cell_markers():
    "The line above a cell's first function is no comment on what it returns."
    marked = [p.name for p in PACKAGE.rglob("*.py") if re.search(r"^\s+%% ", p.read_text("utf-8"), re.M)]
    assert not marked


def load_tool(name):
    "A script of tools/ as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


CODE = '''class Box:
    "A box.  # no comment"

    def __init__(
        self,
        *sides: int,  # in cm
        lid="\\n",  # \\n: none
    ):
        pass

    def put(
        self,
        x: "Box",
        # below the lid,
        # not above
        where: int | None = None,  # in cm
        **more,  # Anything
    ) -> list:  # What was there
        return []


@dataclass(frozen=True)
class Shape:
    """A shape.

    It has fields.
    """

    d: int = 4  # width


def area(
    box,  # This and all others as for `volume`
    height: float,
):
    pass


def volume(
    box,  # From `Box`
    height: float,  # in cm
):
    pass


def _half(x):  # Anything
    def inner(
        y,  # Anything
    ):
        pass
'''

DOCSTRINGS = {
    "Box": """A box.  # no comment

Parameters
----------
*sides : int
    in cm
lid
    \\n: none""",
    "put": """Parameters
----------
x : Box
where : int | None
    below the lid,
    not above
    in cm
**more
    Anything

Returns
-------
list
    What was there""",
    "Shape": """A shape.

It has fields.

Parameters
----------
d : int
    width""",
    "area": """Parameters
----------
box
    From `Box`
height : float
    in cm""",
}


def test_comments_of_parameters_become_docstrings():
    made = load_tool("export").documented(CODE)
    found = {getattr(node, "name", ""): node for node in ast.walk(ast.parse(made))}
    docs = {name: ast.get_docstring(node) for name, node in found.items() if hasattr(node, "body") and name}
    assert docs == {
        **DOCSTRINGS,
        "volume": DOCSTRINGS["area"],
        "__init__": None,
        "_half": None,
        "inner": None,
    }
    lines = [line.strip() for line in made.split("\n")]
    assert [line.strip() for line in CODE.split("\n") if line.strip() not in lines] == [
        '"A box.  # no comment"'
    ]


def public_functions():
    "`(name, object)` of what the package exports, and of the methods of its classes."
    for module in sorted(set(MODULES)):
        for name in exported(MODULES[module]):
            each = getattr(importlib.import_module(module), name)
            if inspect.isfunction(each) or inspect.isclass(each):
                yield f"{module}.{name}", each
            if inspect.isclass(each):
                own = {n: v for n, v in vars(each).items() if not n.startswith("_") and inspect.isfunction(v)}
                yield from ((f"{module}.{name}.{n}", v) for n, v in own.items())


def test_help_shows_parameters():
    "All of every public function, class and method."
    missing = []
    for name, each in public_functions():
        if inspect.isclass(each) and "__init__" not in vars(each) and not hasattr(each, "_fields"):
            continue  # has the constructor of another class
        wanted = [n for n in inspect.signature(each).parameters if n not in ("self", "cls", "ctx")]
        section = inspect.cleandoc(each.__doc__ or "").partition("Parameters\n")[2]
        documented = re.findall(r"^\*{0,2}(\w+)(?: : .+)?$", section, re.MULTILINE)
        missing += [f"{name}: {n}" for n in wanted if n not in documented]
    assert not missing, "\n".join(missing)


def test_documentation_shows_parameters_once():
    "nbdev reads the comments in the source, too."
    for each, text in ((average_precision, "Cuts N of 1..n"), (S5VHConfig, "width of a frame feature")):
        page = show_doc(each)._repr_markdown_()
        assert (each.__doc__.count(text), page.count(text), page.count("Parameters")) == (1, 1, 0)


def test_equations_are_current():
    equations = load_tool("equations")
    assert equations.PAGE.read_text(encoding="utf-8") == equations.page(), (
        "docs/equations.md is stale (make prepare)"
    )


def test_drawings_are_current():
    "Each is what the script draws, and is shown with words that stand in for it."
    drawings = load_tool("drawings")
    kept = {path.stem: path.read_text(encoding="utf-8") for path in drawings.FOLDER.iterdir()}
    assert kept == {name: draw().svg() for name, draw in drawings.DRAWINGS.items()}, "stale (make prepare)"
    shown = {}
    for place, text in prose():
        for alt, link in re.findall(r"!\[([^\]]*)\]\((\S+\.svg)\)", text):
            assert (ROOT / place).parent.joinpath(link).is_file() and len(alt) > 60, (place, link, alt)
            shown.setdefault(Path(link).stem, []).append(place)
    assert shown.keys() == kept.keys(), "a drawing that is shown nowhere"


def test_text_fits_into_drawings():
    "In the wide font of matplotlib: into its box, and into the picture."
    drawings, font = load_tool("drawings"), FontProperties(family="DejaVu Sans")
    for name, draw in drawings.DRAWINGS.items():
        room = None
        for part in ElementTree.fromstring(draw().svg()):
            tag, here = part.tag.rpartition("}")[2], part.attrib
            if tag == "rect":
                room = float(here["width"]) - 12
            elif tag == "text":
                font.set_weight(here.get("font-weight", "normal"))
                words, size = "".join(part.itertext()).replace("\u200b", ""), float(here.get("font-size", 15))
                width = TextPath((0, 0), words, size, prop=font).get_extents().width
                limit = room if "text-anchor" in here else drawings.WIDTH - float(here["x"]) - 6
                assert width <= limit, f"{name}: {words!r} is {width:.0f} wide, there is room for {limit:.0f}"


LETTERS = re.compile(r"[\u2500-\u259f\u25b2-\u25c5]|\+--|--\+|\|__|^(?!<!--).*--+>", re.MULTILINE)


def prose():
    "`(place, text)` of the notebooks' cells and of the pages."
    for path in NOTEBOOKS:
        yield from ((name_of(path), cell.source) for cell in nbformat.read(path, as_version=4).cells)
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        yield name_of(path), path.read_text(encoding="utf-8")


def test_nothing_is_drawn_with_letters():
    "Such a drawing falls apart where a line is broken, and can't be read aloud."
    for drawn in ("a \u2500\u2510", "\u2514\u25ba b", "+----+", "a --> b", "|__ c", "\u2588\u2588"):
        assert LETTERS.search(drawn), drawn
    for plain in ("|---|---|", "<!-- made -->", "(b, m) -> (b, k)", "--flag"):
        assert not LETTERS.search(plain), plain
    found = {place: LETTERS.search(text)[0] for place, text in prose() if LETTERS.search(text)}
    assert not found, f"drawings made of letters: {found} (tools/drawings.py)"


@pytest.mark.parametrize(
    "docstring, what, sources",
    [
        (
            "A loss of views (S5VH, L_CL; Chuang et al., 2020, eq. 8).",
            "A loss of views",
            [("S5VH", "L_CL"), ("Chuang et al., 2020", "eq. 8")],
        ),
        (
            "The network (b, d) -> (b, k) (DMMH, section 2). More.",
            "The network (b, d) -> (b, k)",
            [("DMMH", "section 2")],
        ),
        (
            "A term\n    (DMMH's sister works).\n\n    Its scale is ours (S5VH).",
            "A term",
            [("DMMH", "sister works"), ("S5VH", "")],
        ),
        (
            "Planes (Charikar 2002), in (S5VH, setup (text); values of UCF101)",
            "Planes, in",
            [("Charikar, 2002", ""), ("S5VH", "setup (text)")],
        ),
        ("Nothing (in 2020), (see S5VH), :) (", "Nothing (in 2020), (see S5VH), :) (", []),
        ("", "", []),
    ],
)
def test_equations_reads_sources(docstring, what, sources):
    assert load_tool("equations").sources(docstring) == (what, sources)


# Imports


MODULES = {  # dotted name -> syntax tree
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_bytes()
    )
    for path in PACKAGE.rglob("*.py")
    if path.name != "_modidx.py"
}
NUMBER = {f"s5vh_nb.{path.parent.name}.{path.stem[3:]}": int(path.stem[:2]) for path in LIBRARY}


def absolute(node, module):
    "The module that a `from` import of `module` names, without leading dots."
    if node.level == 0:
        return node.module
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    above = module.split(".")[: len(module.split(".")) - node.level + is_package]
    return ".".join([*above, *filter(None, [node.module])])


def imports(tree, module):
    "Dotted names that a module imports, at the top and inside functions; None for a name that is computed."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node, module)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
                package = module if (ROOT / module.replace(".", "/")).is_dir() else module.rpartition(".")[0]
                yield importlib.util.resolve_name(name, package) if name else None


def module_of(name):
    "The longest beginning of a dotted name that is a module of the package; None for other packages."
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def place(module):
    "(wing, number): a module may import from smaller ones. A wing itself has the largest number of its wing."
    wing = module.split(".")[1]
    return WINGS.index(wing), NUMBER.get(module, 100)


EDGES = {  # (module, imported module), without the package's own __init__, which imports nothing of it
    (module, used)
    for module, tree in MODULES.items()
    for name in imports(tree, module)
    if name and (used := module_of(name)) not in (None, "s5vh_nb")
}


def test_every_module_has_a_place():
    names = {module for module in MODULES if module.count(".") == 2}
    assert names == set(NUMBER), "the modules are those of nbs/lib/<wing>/NN_name.ipynb"
    assert {module.split(".")[1] for module in names} <= set(WINGS)


def test_imports_go_down():
    "A module imports from earlier wings, and in its own wing from lower numbers; lazy imports count."
    up = [
        f"{module} imports {used}"
        for module, used in sorted(EDGES)
        if module == "s5vh_nb" or place(used) >= place(module)
    ]
    assert not up, "\n".join(up)


def test_imports_make_no_circle():
    used_by = {module: {used for other, used in EDGES if other == module} for module in MODULES}
    while free := [module for module, used in used_by.items() if not used & set(used_by)]:
        for module in free:
            del used_by[module]
    assert not used_by, f"these modules import each other: {sorted(used_by)}"


def test_imports_can_be_read():
    computed = [module for module, tree in MODULES.items() if None in imports(tree, module)]
    assert not computed, f"{computed} import modules by a computed name"


def test_lazy_imports_are_seen():
    "The test of the tests above: all ways to import, resolved from a module and from a wing."
    lazy = """
def f():
    import s5vh_nb.search
    from ..search import scores
    from . import mixers
    importlib.import_module("s5vh_nb.cli.command")
    import_module("..learning.losses", __package__)
    __import__("s5vh_nb.evidence.runs")
    importlib.import_module(name)
"""
    wanted = "search search.scores models.mixers cli.command learning.losses evidence.runs".split()
    found = list(imports(ast.parse(lazy), "s5vh_nb.models.mamba"))
    assert sorted(filter(None, found)) == sorted(f"s5vh_nb.{name}" for name in wanted)
    assert None in found
    assert list(imports(ast.parse("from .codes import pack"), "s5vh_nb.models")) == [
        "s5vh_nb.models.codes.pack"
    ]


def test_package_needs_no_development_tools():
    tools = {"fastcore", "nbdev", "execnb", "ruff", "pytest"}
    needing = {
        m for m, tree in MODULES.items() for name in imports(tree, m) if name and name.split(".")[0] in tools
    }
    assert not needing


def distributions(requirements):
    "The names of required distributions, as pip compares them."
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower() for text in requirements}


class Needed(ast.NodeTransformer):
    "Code without what it only tries to import."

    def visit_Try(self, node):
        if any(handler.type and "ImportError" in ast.unparse(handler.type) for handler in node.handlers):
            node.body = [ast.Pass()]
        return self.generic_visit(node)


def undeclared(trees, requirements):
    "`{package: places}` of what code needs and no requirement names."
    found, known, installed = {}, distributions(requirements), packages_distributions()
    scripts = {path.stem for path in SCRIPTS + TESTS}
    for where, tree in trees:
        for name in imports(Needed().visit(copy.deepcopy(tree)), "s5vh_nb.wing.module"):
            first = (name or "s5vh_nb").partition(".")[0]
            ours = first == "s5vh_nb" or first in sys.stdlib_module_names or first in scripts
            if not ours and not known & distributions(installed.get(first, [first])):
                found.setdefault(first, set()).add(where)
    return found


def test_imported_packages_are_declared():
    "Also those that come with another package. A notebook of nbs/data installs what it needs by itself."
    extras = PYPROJECT["project"]["optional-dependencies"]
    needed = PYPROJECT["project"]["dependencies"]
    optional = sum((extras[name] for name in ("gpu", "milvus", "ray", "serve", "video")), [])
    assert not undeclared(MODULES.items(), needed + optional)
    notebooks = [path for path in NOTEBOOKS if path.parent.name != "data"]
    assert not undeclared(code(notebooks, SCRIPTS + TESTS), needed + optional + extras["dev"] + extras["lab"])
    tree = ast.parse("import sklearn, made_up\ntry:\n    import rare\nexcept ImportError:\n    import dear")
    assert set(undeclared([("here", tree)], ["scikit-learn>=1.5"])) == {"made_up", "dear"}


def test_package_works_without_a_folder_for_compiled_code():
    "As in a container: the installation is read-only, and the user has no home."
    code = """
import importlib, pkgutil
from numba.core import caching
caching.CompileResultCacheImpl._locator_classes.clear()  # numba finds no folder
import s5vh_nb
for module in pkgutil.walk_packages(s5vh_nb.__path__, "s5vh_nb."):
    importlib.import_module(module.name)
"""
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "NUMBA_CACHE_DIR")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


# Style


def cells(path):
    "`(place, source)` of a notebook's code cells; all cells count, from 1, and magics become calls."
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells, 1):
        if cell.cell_type == "code":
            yield f"{name_of(path)}, cell {number}", TransformerManager().transform_cell(cell.source)


def code(notebooks=(), scripts=()):
    "`(place, syntax tree)` of all cells and scripts."
    for path in notebooks:
        for where, source in cells(path):
            yield where, ast.parse(source)
    for path in scripts:
        yield name_of(path), ast.parse(path.read_bytes())


@pytest.mark.parametrize("words", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(words):
    "Lines of at most 110 characters, one statement a line, sorted imports, no unused names; one layout."
    done = subprocess.run(
        [BIN / "ruff", *words, "--quiet", "."], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def names_in(target):
    "How many names an assignment's target has; a starred one does not count."
    if isinstance(target, (ast.Tuple, ast.List)):
        return sum(names_in(element) for element in target.elts)
    return 0 if isinstance(target, ast.Starred) else 1


def test_assignments_are_short():
    "A statement names at most two things at once; kernels may take shapes apart."
    notebooks = [p for p in NOTEBOOKS if not any(fnmatch.fnmatch(name_of(p), pattern) for pattern in KERNELS)]
    long = [
        f"{where}, line {node.lineno}: {ast.unparse(target)}"
        for where, tree in code(notebooks, SCRIPTS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if names_in(target) > 2
    ]
    assert not long, "\n".join(long)


def test_text_files_are_utf8():
    "Code names the encoding of a text file or of a process, else it depends on the machine."
    silent = [
        f"{where}, line {node.lineno}: {ast.unparse(node)}"
        for where, tree in code(NOTEBOOKS, SCRIPTS + TESTS)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and opens_text(node)
        and not any(k.arg == "encoding" for k in node.keywords)
    ]
    assert not silent, "\n".join(silent)


def test_nothing_depends_on_the_locale(checkout):
    "Where it says ASCII, the package is imported, and it writes and reads what is not ASCII."
    code = """
import pathlib, pkgutil
import pandas as pd
import s5vh_nb
from s5vh_nb.basics.files import find_root
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, git_commit
from s5vh_nb.evidence.report import save_table
for module in pkgutil.walk_packages(s5vh_nb.__path__, "s5vh_nb."):
    __import__(module.name)
root, told = find_root(), "0.5 \\u00b1 0.1"
assert git_commit(root) is None
kept = RunRecord({"kind": "benchmark"}, {"row": told}, {}, "none", {}, "tests", commit="none")
Archive(root, "smoke").save(kept, {})
assert Archive(root, "smoke").find(kept.name).metrics == {"row": told}
saved = save_table(pd.DataFrame({"a": [told]}), root / "t.csv")
assert told.encode("utf-8") in saved.read_bytes()
"""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    here = checkout / "r\u00e9sum\u00e9"
    shutil.copytree(checkout / "nbs", here / "nbs")
    shutil.copy(checkout / "settings.ini", here)
    done = subprocess.run(words, cwd=here, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and f"{PACKAGE}/" in line]
    assert not ours, ours


def opens_text(call):
    """Whether a call exchanges text and no argument by place is an encoding.

    That is `open` in text mode, a path's `read_text` or `write_text`, or a process with `text=True`.
    """
    if any(k.arg in ("text", "universal_newlines") and ast.unparse(k.value) == "True" for k in call.keywords):
        return True
    if isinstance(call.func, ast.Attribute):
        before = {"read_text": 0, "write_text": 1}  # arguments that come before the encoding
        return len(call.args) <= before.get(call.func.attr, -1)
    mode = [arg.value for arg in call.args[1:2] if isinstance(arg, ast.Constant)]
    mode += [k.value.value for k in call.keywords if k.arg == "mode"]
    return getattr(call.func, "id", "") == "open" and "b" not in "".join(mode)


# Names


def uses(tree, module=""):
    "`(module, name)` of what code imports from the package or reaches through a module of it."
    aliases, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            origin = absolute(node, module)
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{origin}.{alias.name}"
                found.add((origin, alias.name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            whole = f"{aliases.get(first, first)}.{rest}"
            found.add((module_of(whole), whole.removeprefix(f"{module_of(whole)}.").split(".")[0]))
        elif isinstance(node, ast.Constant) and re.fullmatch(r"s5vh_nb[\w.]*:\w+", str(node.value)):
            found.add(tuple(node.value.split(":")))  # as a configuration names the class that it is for
    return found


def exported(tree):
    "The names in a module's `__all__`."
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_exported_names_have_users():
    "A name that only its own module and its own notebook use is private (`_name`)."
    used = set()
    for module, tree in MODULES.items():
        used |= {(origin, name) for origin, name in uses(tree, module) if origin != module}
    for path in NOTEBOOKS:
        own = f"s5vh_nb.{path.parent.name}.{path.stem[3:]}"
        used |= {each for _, tree in code([path]) for each in uses(tree) if each[0] != own}
    for _, tree in code(scripts=SCRIPTS + TESTS):
        used |= uses(tree)
    for block in re.findall(
        r"```python\n(.+?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    ):
        used |= uses(ast.parse(block))
    unused = [
        f"{module}.{name}"
        for module, tree in sorted(MODULES.items())
        for name in exported(tree)
        if (module, name) not in used and name not in PUBLIC
    ]
    assert not unused, "\n".join(unused)


# Artefacts and README


@pytest.mark.parametrize("path", ARTEFACTS, ids=name_of)
def test_artefact_notebook(path):
    artefact, nb = read_artefact(path), nbformat.read(path, as_version=4)
    assert PARAMETERS <= set(artefact.parameters)
    assert nb.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") for cell in nb.cells), "artefact sources carry no outputs"
    first = [cell.source for cell in nb.cells if cell.cell_type == "code"][1]
    assert "open_study(" in first, "its first cell does not check its parameters"
    outputs = artefact.tables + artefact.figures
    assert outputs, "it saves no table and no figure"
    begin = [name == path.stem or name.startswith(f"{path.stem}_") for name in outputs]
    assert all(begin), "outputs begin with the notebook's stem"
    listed = (ROOT / "nbs" / "pages" / "artefacts.ipynb").read_text(encoding="utf-8")
    assert f"(../{artefact.name}.ipynb)" in listed, "not listed in nbs/pages/artefacts.ipynb (make readme)"


def test_main_job_has_artefacts():
    assert any(read_artefact(path).default for path in ARTEFACTS)


PAGES = [path for path in NOTEBOOKS if path.parent.name == "pages"]


def test_readme_is_current():
    tool, current = load_tool("readme"), (ROOT / "README.md").read_text(encoding="utf-8")
    stored = tool.readme(nbformat.read(tool.INDEX, as_version=4))
    assert stored == current, "README.md differs from the index's stored outputs (make readme)"


@pytest.mark.parametrize("path", [ROOT / "nbs" / "index.ipynb", *PAGES], ids=name_of)
def test_pages_are_current(path):
    "The index and the pages say what their code says now, and hide the code."
    tool, nb = load_tool("readme"), nbformat.read(path, as_version=4)
    assert tool.PAGES == PAGES
    assert all("hide-input" in cell.metadata.get("tags", []) for cell in nb.cells if cell.cell_type == "code")
    stored = tool.to_markdown(nb)
    assert tool.to_markdown(tool.executed(path)) == stored, "stale outputs (make readme)"


def test_readme_is_short():
    "One can read it in a few minutes; the pages have the rest."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    words = [word for line in text.splitlines() if not line.startswith("|") for word in line.split()]
    assert len(words) <= 1200 and len(text.splitlines()) <= 150


def test_project_page_lists_the_library():
    listed = (ROOT / "nbs" / "pages" / "project.ipynb").read_text(encoding="utf-8")
    missing = [name_of(p) for p in LIBRARY if f"(../lib/{p.parent.name}/{p.name})" not in listed]
    assert not missing, f"not listed in nbs/pages/project.ipynb: {missing} (make readme)"


def test_readme_clones_what_the_settings_name():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    about = settings["DEFAULT"]
    url = about["git_url"] % about
    assert f"git clone {url} && cd {about['repo']}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    "Of the README and of the table of equations."
    for page in ("README.md", "docs/equations.md"):
        links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        local = {link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)}
        missing = [link for link in local if not (ROOT / page).parent.joinpath(link).exists()]
        assert len(links) > 10 and not missing, (page, missing)


def test_log_is_short_and_newest_first():
    "Entries have a date, a title and at most five lines."
    log = (ROOT / "LOG.md").read_text(encoding="utf-8")
    head, *entries = re.split(r"^## ", log, flags=re.MULTILINE)
    dates, titles = zip(*(re.match(r"(\d{4}-\d\d-\d\d): (.+)", entry).groups() for entry in entries))
    assert list(dates) == sorted(dates, reverse=True) and len(set(titles)) == len(titles) > 30
    long = [entry.splitlines()[0] for entry in entries if not 1 < len(entry.strip().splitlines()) <= 6]
    assert not long, f"expected one to five lines: {long}"
    wide = [line for line in log.splitlines() if len(line) > 250]
    assert not wide and not re.search(r"^#", head.partition("\n")[2], re.MULTILINE), wide
    asked = re.search(r"its entry \*(.+?)\*", (ROOT / "nbs/s5vh/claims.ipynb").read_text(encoding="utf-8"))
    assert not asked or asked[1] in titles, "a notebook names an entry that is not there"


def test_readme_script_runs(tmp_path):
    "The example for scripts, in the smoke profile."
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = re.search(r"```python\n(.+?)```", readme, re.DOTALL)[1]
    assert '"quick"' in script
    words = [sys.executable, "-c", script.replace('"quick"', '"smoke"')]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(750, 8) torch.uint8")


# Files


@in_checkout
def test_files_are_few_and_small():
    files = tracked()
    total = sum(path.stat().st_size for path in files) / 1e6
    assert total <= MEGABYTES and len(files) <= FILES, f"{total:.1f} MB in {len(files)} files"


def test_lessons_are_small():
    "Their pictures have palettes, and those in motion have few frames."
    large = [
        name_of(path) for path in (ROOT / "nbs" / "learn").glob("*.ipynb") if path.stat().st_size > 300_000
    ]
    assert not large


@in_checkout
def test_no_machine_paths():
    "No tracked text names a folder of the machine it was made on."
    homes = {f"/{name}/" for name in ("home", "Users", "root")}
    here = {f"{Path.home()}/", f"{tempfile.gettempdir()}/", f"{ROOT.parent}/"} - {"//"}
    not_inside_a_path = r"(?<![\w.-])"
    folders = re.compile(not_inside_a_path + "(" + "|".join(map(re.escape, homes | here)) + ")")
    texts = [path for path in tracked() if b"\0" not in path.read_bytes()]
    hits = {name_of(p): folders.search(p.read_text(encoding="utf-8", errors="replace")) for p in texts}
    found = {name: hit[0] for name, hit in hits.items() if hit}
    assert len(texts) > len(NOTEBOOKS) and not found, found
