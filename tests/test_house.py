"The house rules: the package equals its notebooks, notebooks are clean, artefacts are complete and listed, the README is current."
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

from s5vh_nb.reproduce import PAPERS, read_artefact

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
ARTEFACTS = [path for path in NOTEBOOKS if path.parent.name in PAPERS]
WIDTH = 140  # of a line of code, at most
PARAMETERS = {"profile", "dataset", "bits", "seeds", "device", "data_root"}


def name_of(path): return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def remade():
    "A copy of the project in which the package was exported anew and the notebooks were cleaned."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("settings.ini", "pyproject.toml", "README.md"): shutil.copy(ROOT/name, copy)
        shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copytree(ROOT/"s5vh_nb", copy/"s5vh_nb", ignore=shutil.ignore_patterns("__pycache__", "data", "*.py"))
        shutil.copy(ROOT/"s5vh_nb"/"__init__.py", copy/"s5vh_nb")
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([f"{sys.prefix}/bin/{command}"], cwd=copy, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""})
        yield copy


def test_package_equals_notebooks(remade):
    modules = {path.name for path in (ROOT/"s5vh_nb").glob("*.py")}
    assert modules == {path.name for path in (remade/"s5vh_nb").glob("*.py")}, "modules without a notebook, or not exported (make prepare)"
    different = [name for name in sorted(modules) if (ROOT/"s5vh_nb"/name).read_text() != (remade/"s5vh_nb"/name).read_text()]
    assert not different, f"these modules differ from their notebooks: {different} (make prepare)"


def test_notebooks_are_clean(remade):
    unclean = [name_of(path) for path in NOTEBOOKS if path.read_text() != (remade/path.relative_to(ROOT)).read_text()]
    assert not unclean, f"nbdev_clean would change {unclean} (make prepare)"


def code_lines():
    "Every line of code with its place: a notebook's code cell (counted from 0, markdown cells too) or a script, and the line in it."
    for path in NOTEBOOKS:
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            lines = cell.source.split("\n") if cell.cell_type == "code" else []
            for line, text in enumerate(lines, 1): yield f"{name_of(path)}, cell {number}, line {line}", text
    for folder in ("tests", "benchmarks", "tools"):
        for path in sorted((ROOT/folder).rglob("*.py")):
            for line, text in enumerate(path.read_text().split("\n"), 1): yield f"{name_of(path)}, line {line}", text


def test_lines_are_short():
    long = [f"{place}: {len(text)} characters" for place, text in code_lines() if len(text) > WIDTH]
    assert not long, f"lines of more than {WIDTH} characters:\n" + "\n".join(long)


def test_lib_imports_go_down():
    "A module imports only from modules with a lower number."
    number = {path.stem[3:]: int(path.stem[:2]) for path in NOTEBOOKS if path.parent.name == "lib"}
    for module in number:
        source = (ROOT/"s5vh_nb"/f"{module}.py").read_text()
        used = re.findall(r"^from \.(\w+) import", source, re.M)
        packages = re.findall(r"^from \. import (.+)$", source, re.M)
        used += [name.strip() for names in packages for name in names.split(",") if name.strip() in number]
        assert all(number[name] < number[module] for name in used), f"{module} imports {used}"


def test_package_needs_no_development_tools():
    for path in (ROOT/"s5vh_nb").glob("*.py"):
        assert not re.search(r"^\s*(from|import) (fastcore|nbdev|execnb)", path.read_text(), re.M) or path.name == "_modidx.py", path.name


@pytest.mark.parametrize("path", ARTEFACTS, ids=name_of)
def test_artefact_notebook(path):
    artefact, nb = read_artefact(path), nbformat.read(path, as_version=4)
    assert PARAMETERS <= set(artefact.parameters)
    assert nb.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs for cell in nb.cells if cell.cell_type == "code"), "artefact sources carry no outputs"
    assert artefact.tables + artefact.figures, "it saves no table and no figure"
    outputs = artefact.tables + artefact.figures
    assert all(name == path.stem or name.startswith(f"{path.stem}_") for name in outputs), "outputs begin with the notebook's stem"
    assert f"nbs/{artefact.name}.ipynb" in (ROOT/"README.md").read_text(), "not listed in the index (make readme)"


def test_main_job_has_artefacts():
    assert any(read_artefact(path).default for path in ARTEFACTS)


@pytest.fixture(scope="module")
def readme():
    "The script that makes the README."
    spec = importlib.util.spec_from_file_location("readme", ROOT/"tools"/"readme.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def test_readme_is_current(readme):
    current = (ROOT/"README.md").read_text()
    stored = readme.to_markdown(nbformat.read(readme.INDEX, as_version=4))
    assert stored == current, "README.md differs from the index's stored outputs (make readme)"
    assert readme.to_markdown(readme.executed_index()) == current, "the index's outputs are stale (make readme)"


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT/"README.md").read_text())
    missing = [link for link in links if not re.match(r"[a-z]+:|#", link) and not (ROOT/link).exists()]
    assert len(links) > 10 and not missing, missing


def test_readme_script_runs(tmp_path):
    "The example for scripts, in the smoke profile."
    code = re.search(r"```python\n(.+?)```", (ROOT/"README.md").read_text(), re.S)[1]
    assert '"quick"' in code
    done = subprocess.run([sys.executable, "-c", code.replace('"quick"', '"smoke"')], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(750, 8) torch.uint8")


@pytest.mark.skipif(not (ROOT/".git").exists(), reason="not a checkout: which files are tracked is unknown")
def test_no_machine_paths():
    "No tracked text names a folder of the machine it was made on."
    homes = {f"/{name}/" for name in ("home", "Users", "root")}
    here = {f"{Path.home()}/", f"{tempfile.gettempdir()}/", f"{ROOT.parent}/"} - {"//"}
    folders = re.compile(r"(?<![\w.-])(" + "|".join(map(re.escape, homes | here)) + ")")                       # not inside another path
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    texts = [path for name in tracked if (path := ROOT/name).is_file() and b"\0" not in path.read_bytes()]
    found = {name_of(path): hit[0] for path in texts if (hit := folders.search(path.read_text(errors="replace")))}
    assert len(texts) > len(NOTEBOOKS) and not found, found
