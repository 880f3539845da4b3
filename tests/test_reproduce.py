"The runner where a notebook cell can't test it: other kernels on the machine, kills, interrupts, tracebacks."

import base64
import errno
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from papermill.iorw import LocalHandler
from PIL import Image

import s5vh_nb
from s5vh_nb.cli import command, execute
from s5vh_nb.cli.artefacts import read_artefact


@pytest.fixture
def make(checkout):
    "A function that writes an artefact notebook of code cells into a scratch project."

    def write(stem, *cells):
        parameters = nbformat.v4.new_code_cell("profile = 'quick'\ndevice = None\ndata_root = None")
        parameters.metadata["tags"] = ["parameters"]
        code = [nbformat.v4.new_code_cell(cell) for cell in cells]
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), parameters, *code])
        nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
        path = checkout / "nbs" / "s5vh" / f"{stem}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(nb, path)
        return read_artefact(path)

    return write


def outputs(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_the_kernel_is_this_python(make, tmp_path, monkeypatch):
    "Another kernel called python3 comes first on the user's own Jupyter path."
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    artefact = make("kernel", f"import sys\nprint(sys.executable == {sys.executable!r})")
    assert execute.execute(artefact, {"profile": "smoke"}) is None
    assert outputs(execute.executed_path(artefact, "smoke")) == "True\n"
    assert os.environ["JUPYTER_PATH"] == str(tmp_path / "jupyter")


def test_the_kernel_finds_the_project_of_the_runner(make, checkout, monkeypatch, capsys):
    "Both look from the working directory, here a folder inside the project; the command says what it found."
    (checkout / "notes").mkdir()
    first, last = "print('first')", "from s5vh_nb.basics.files import find_root\nprint(find_root().name)"
    artefact = make("where", first, last)
    monkeypatch.chdir(checkout / "notes")
    assert command.main(["reproduce", "where", "--profile", "smoke"]) == 0
    assert outputs(execute.executed_path(artefact, "smoke")) == f"first\n{checkout.name}\n"
    *_, done, said = capsys.readouterr().out.splitlines()
    assert "s5vh/where: done in" in done and said == checkout.name
    assert artefact.root == checkout


def test_traceback_and_progress_bar_in_the_kept_copy(make, checkout, tmp_path):
    "No folder of this machine, one line per progress bar, no widget."
    bar = "from tqdm.auto import tqdm\nfor i in tqdm(range(2000), mininterval=0): pass"
    artefact = make("bar", bar, "import json\njson.loads('')")
    data_root = str(tmp_path / "features")
    failure = execute.execute(artefact, {"profile": "smoke", "data_root": data_root})
    assert failure.startswith("cell 4, 'import json': JSONDecodeError")
    kept = execute.executed_path(artefact, "smoke").with_suffix(".failed.ipynb").read_text(encoding="utf-8")
    assert not any(folder in kept for folder in (str(tmp_path), str(checkout), sys.prefix))
    assert "<data_root>" in kept
    assert kept.count("2000/2000") == 1 and "1000/2000" not in kept and "widget" not in kept


def test_pictures_in_the_kept_copy_are_small(make):
    "The copy has the displayed figure with a palette, and not wider than a page."
    draw = """import io
import matplotlib.pyplot as plt
from IPython.display import Image
fig, ax = plt.subplots(figsize=(12, 3), dpi=100)
ax.plot([1, 3, 2])
fig.canvas.print_png(buffer := io.BytesIO())
plt.close(fig)
print(len(buffer.getvalue()))
Image(data=buffer.getvalue())"""
    artefact = make("figure", draw)
    assert execute.execute(artefact, {"profile": "smoke"}) is None
    path = execute.executed_path(artefact, "smoke")
    displayed = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", []) if "data" in o]
    png = base64.b64decode(displayed[0].data["image/png"])
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        assert picture.mode == "P" and picture.width <= 900
    assert len(png) < int(outputs(path)) / 2


def test_a_copy_that_cannot_be_kept_costs_only_its_own_artefact(make):
    two = [make(stem, f"print('{stem}')") for stem in ("first", "second")]
    execute.executed_path(two[0], "smoke").mkdir(parents=True)  # a folder where the copy belongs
    failures = command.run_all(two, {"profile": "smoke"})
    assert list(failures) == ["s5vh/first"]
    assert "s5vh_first.ipynb: expected to write the whole file" in failures["s5vh/first"]
    assert outputs(execute.executed_path(two[1], "smoke")) == "second\n"


def test_the_same_notebook_gives_the_same_copy(make):
    artefact, kept = make("same", "print(profile)"), []
    for _ in range(2):
        execute.execute(artefact, {"profile": "smoke"})
        kept.append(execute.executed_path(artefact, "smoke").read_bytes())
    assert kept[0] == kept[1]


def start(*words):
    "The command in a process of its own; a background shell may have told its children to ignore interrupts."
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    program = "import sys; from s5vh_nb.cli.command import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, *words]
    return subprocess.Popen(words, stderr=subprocess.PIPE, encoding="utf-8", preexec_fn=listen)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def test_killed_runner_leaves_nothing_half_written(make, checkout, tmp_path):
    pid = tmp_path / "pid"
    tell = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()), 'utf-8')"
    artefact = make("long", f"{tell}\ntime.sleep(600 if device == 'slow' else 0)")
    process = start("reproduce", "long", "--profile", "smoke", "--device", "slow")
    wait_for(pid, process)
    process.kill()
    process.wait()
    assert not list(checkout.rglob("executed/*"))
    for _ in range(100):  # the orphaned kernel notices and ends by itself
        if not os.path.exists(f"/proc/{pid.read_text(encoding='utf-8')}"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the kernel outlived its runner")
    assert command.main(["reproduce", "long", "--profile", "smoke"]) == 0
    assert execute.executed_path(artefact, "smoke").exists()


def test_interrupt(make, tmp_path):
    started = tmp_path / "started"
    make("long", f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(600)")
    process = start("reproduce", "long", "--profile", "smoke")
    wait_for(started, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said


@pytest.mark.parametrize(
    "words, said",
    [
        (["reproduce", "nothing"], "artefact: expected one of fine, found 'nothing'"),
        (["reproduce", "dmmh/fine"], "artefact: expected one of s5vh/fine"),
        (
            ["reproduce", "fine", "-p", "prof=quick"],
            "parameter of s5vh/fine: expected one of profile, device, data_root, found 'prof' "
            "(did you mean 'profile'?)",
        ),
        (["reproduce", "fine", "-p", "profile"], "-p: expected NAME=VALUE, found 'profile'"),
        (["reproduce", "fine", "-p", "profile=fast"], "profile: expected one of smoke, quick, full, paper"),
    ],
)
def test_unknown_words(make, capsys, words, said):
    make("fine", "print('fine')")
    assert command.main(words) == 2
    assert said in capsys.readouterr().err


def test_unknown_profile_and_no_notebooks(checkout, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["reproduce", "--profile", "fast"])
    assert stop.value.code == 2 and "'fast'" in capsys.readouterr().err
    said = "expected artefact notebooks in one of the folders s5vh, dmmh, beyond, found none"
    for word in ("reproduce", "list"):
        assert command.main([word]) == 2
        assert said in capsys.readouterr().err


def test_results_that_cannot_be_written(make, checkout, capsys):
    make("fine", "print('fine')")
    (checkout / "results").write_text("a file where a folder should be", encoding="utf-8")
    make("other", "print('other')")
    assert command.main(["reproduce", "--all", "--profile", "smoke"]) == 2
    assert capsys.readouterr().err.count("expected a folder that can be written to") == 1


def test_pack(checkout, capsys, monkeypatch):
    "What was written is printed, one path per line; the project is the one of the working directory."

    def pack(root, profile):
        assert (root, profile) == (checkout, "quick")
        return ["one", "two"]

    monkeypatch.setattr(command, "pack", pack)
    assert command.main(["pack", "--profile", "quick"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize(
    "cells, said",
    [
        ([nbformat.v4.new_markdown_cell("# Title")], "expected a cell tagged `parameters`"),
        (
            [nbformat.v4.new_code_cell("profile = 1", metadata={"tags": ["parameters"]})],
            "expected a heading '# title'",
        ),
    ],
)
def test_incomplete_artefact_notebook(tmp_path, cells, said):
    path = tmp_path / "odd.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(ValueError, match=f"odd.ipynb: {said}"):
        read_artefact(path)


def test_a_relative_data_folder_leaves_the_notebook_whole(checkout, tmp_path, monkeypatch):
    "Its name may be a word of the notebook's own format."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    cell = nbformat.v4.new_code_cell(f"data_root = 'data', {str(tmp_path / 'data')!r}")
    text = execute.shareable(nbformat.v4.new_notebook(cells=[cell]), checkout, "data")
    nbformat.validate(nbformat.reads(text, 4))
    assert "'data', '<data_root>'" in text


def test_only_whole_folders_are_replaced(checkout):
    "Not ends of others, nor what reads like one in a picture; but those after a line's end or a colour."
    picture = "iVBORw0+/data/AAA+/data="
    data = {"image/png": picture, "text/html": f"<img src='data:image/png;base64,{picture}'> /data/a"}
    lines = "/data\n/data/b \x1b[0;32m/data/c\x1b[0m ./data/d s5vh_nb/data/e '/data'"
    outputs = [nbformat.v4.new_output("display_data", data=data)]
    outputs.append(nbformat.v4.new_output("error", ename="E", evalue=lines, traceback=[lines]))
    cell = nbformat.v4.new_code_cell(outputs=outputs)
    text = execute.shareable(nbformat.v4.new_notebook(cells=[cell]), checkout, "/data")
    shown, failed = nbformat.reads(text, 4).cells[0].outputs
    assert shown.data["image/png"] == picture
    assert shown.data["text/html"] == data["text/html"].replace(" /data/a", " <data_root>/a")
    expected = (
        "<data_root>\n<data_root>/b \x1b[0;32m<data_root>/c\x1b[0m ./data/d s5vh_nb/data/e '<data_root>'"
    )
    assert failed.evalue == failed.traceback[0] == expected


def test_a_full_temporary_disk_costs_only_its_own_artefact(make, capsys, monkeypatch):
    "papermill's copy is cut off in the middle; the reason is what the disk said."
    make("first", "print('first')")
    second, write = make("second", "print('second')"), LocalHandler.write

    def full(self, text, path):
        write(self, text[:100] if path.endswith("first.ipynb") else text, path)
        if path.endswith("first.ipynb"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LocalHandler, "write", full)
    assert command.main(["reproduce", "--all", "--profile", "smoke"]) == 1
    assert "FAILED s5vh/first: OSError: [Errno 28] No space left on device" in capsys.readouterr().err
    assert outputs(execute.executed_path(second, "smoke")) == "second\n"


def test_no_temporary_folder_at_all(make, capsys, monkeypatch):
    make("fine", "print('fine')")

    def refuse(*options, **more):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(execute.tempfile, "TemporaryDirectory", refuse)
    assert command.main(["reproduce", "fine", "--profile", "smoke"]) == 1
    assert "FAILED s5vh/fine: [Errno 2] No usable temporary directory found" in capsys.readouterr().err


def test_braces_in_the_path(make, checkout, monkeypatch, tmp_path):
    "papermill would fill them in: in the project's path, and in that of temporary files."
    make("fine", "print('fine')")
    project, scratch = checkout / "a {b} {}", tmp_path / "{c"
    scratch.mkdir()
    for part in ("nbs", "settings.ini"):
        (project / part).parent.mkdir(exist_ok=True)
        (checkout / part).rename(project / part)
    monkeypatch.chdir(project)
    monkeypatch.setattr(execute.tempfile, "tempdir", str(scratch))
    assert command.main(["reproduce", "fine", "--profile", "smoke"]) == 0
    assert outputs(project / "results/smoke/executed/s5vh_fine.ipynb") == "fine\n"


@pytest.mark.parametrize("words", [["list"], ["reproduce"], ["report"], ["pack"], ["forget", "a"]])
def test_outside_of_a_checkout(tmp_path, capsys, monkeypatch, words):
    "A package installed from a wheel does not lie in one either."
    monkeypatch.setattr(s5vh_nb, "__file__", str(tmp_path / "lib" / "s5vh_nb" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"{tmp_path}: expected the notebooks of s5vh_nb" in said.err
    assert "`s5vh-nb notebooks FOLDER` unpacks them" in said.err


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"s5vh-nb {s5vh_nb.__version__}\n"


def test_an_unknown_parameter_stops_a_notebook_in_its_first_cell(make):
    "papermill alone takes any name; the command checks names before."
    artefact = make("odd", "from s5vh_nb.evidence.study import open_study\nopen_study('s5vh/codes', profile)")
    failure = execute.execute(artefact, {"profile": "smoke", "data_rot": "data"})
    assert failure.startswith("cell 3, 'from s5vh_nb.evidence.study import open_study': ValueError")
    assert "found 'data_rot' (did you mean 'data_root'?)" in failure
