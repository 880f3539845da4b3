"The runner where a notebook cell can't test it: other kernels on the machine, kills, interrupts, tracebacks, progress bars."
import functools
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from s5vh_nb import reproduce


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A scratch project; returns a function that writes an artefact notebook from code cells."
    monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path/"home"))

    def make(stem, *cells):
        parameters = nbformat.v4.new_code_cell("profile = 'quick'\ndevice = None\ndata_root = None", metadata={"tags": ["parameters"]})
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), parameters, *map(nbformat.v4.new_code_cell, cells)],
                                      metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
        path = tmp_path/"home"/"nbs"/"s5vh"/f"{stem}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, path)
        return reproduce.read_artefact(path)
    return make


def outputs(path):
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


def test_the_kernel_is_this_python(project, tmp_path, monkeypatch):
    "Another kernel called python3 comes first on the user's own Jupyter path."
    other = tmp_path/"jupyter"/"kernels"/"python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"}
    (other/"kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    artefact = project("kernel", "import sys\nprint(sys.executable == PYTHON)".replace("PYTHON", repr(sys.executable)))
    assert reproduce.execute(artefact, {"profile": "smoke"}) is None
    assert outputs(reproduce.executed_path(artefact, "smoke")) == "True\n"
    assert os.environ["JUPYTER_PATH"] == str(tmp_path/"jupyter")


def test_traceback_and_progress_bar_in_the_kept_copy(project, tmp_path):
    "No folder of this machine, one line per progress bar, no widget."
    artefact = project("bar", "from tqdm.auto import tqdm\nfor i in tqdm(range(2000), mininterval=0): pass", "import json\njson.loads('')")
    failure = reproduce.execute(artefact, {"profile": "smoke", "data_root": str(tmp_path/"features")})
    assert failure.startswith("cell 4, 'import json': JSONDecodeError")
    kept = reproduce.executed_path(artefact, "smoke").with_suffix(".failed.ipynb").read_text()
    assert str(tmp_path) not in kept and sys.prefix not in kept and "<data_root>" in kept
    assert kept.count("2000/2000") == 1 and "1000/2000" not in kept and "widget" not in kept


def test_a_copy_that_cannot_be_kept_costs_only_its_own_artefact(project):
    two = [project(stem, f"print('{stem}')") for stem in ("first", "second")]
    reproduce.executed_path(two[0], "smoke").mkdir(parents=True)                      # a folder where the copy belongs
    failures = reproduce.run_all(two, {"profile": "smoke"})
    assert list(failures) == ["s5vh/first"] and "s5vh_first.ipynb: expected to write the whole file" in failures["s5vh/first"]
    assert outputs(reproduce.executed_path(two[1], "smoke")) == "second\n"


def test_the_same_notebook_gives_the_same_copy(project):
    artefact, kept = project("same", "print(profile)"), []
    for _ in range(2):
        reproduce.execute(artefact, {"profile": "smoke"})
        kept.append(reproduce.executed_path(artefact, "smoke").read_text())
    assert kept[0] == kept[1]


def start(*words): # a background shell may have told its children to ignore interrupts
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    program = "import sys; from s5vh_nb.reproduce import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", program, *words], stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(.05)


def test_killed_runner_leaves_nothing_half_written(project, tmp_path):
    tell = f"import os, pathlib, time\npathlib.Path({str(tmp_path/'pid')!r}).write_text(str(os.getpid()))"
    artefact = project("long", f"{tell}\ntime.sleep(600 if device == 'slow' else 0)")
    process = start("reproduce", "long", "--profile", "smoke", "--device", "slow")
    wait_for(tmp_path/"pid", process)
    process.kill()
    process.wait()
    assert not list((tmp_path/"home").rglob("executed/*"))
    for _ in range(100):  # the orphaned kernel notices and ends by itself
        if not os.path.exists(f"/proc/{(tmp_path/'pid').read_text()}"): break
        time.sleep(.1)
    else: pytest.fail("the kernel outlived its runner")
    assert reproduce.main(["reproduce", "long", "--profile", "smoke"]) == 0
    assert reproduce.executed_path(artefact, "smoke").exists()


def test_interrupt(project, tmp_path):
    project("long", f"import pathlib, time\npathlib.Path({str(tmp_path/'started')!r}).touch()\ntime.sleep(600)")
    process = start("reproduce", "long", "--profile", "smoke")
    wait_for(tmp_path/"started", process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in said and "Traceback" not in said


@pytest.mark.parametrize("words, said", [
    (["reproduce", "nothing"], "artefact: expected one of fine, found 'nothing'"),
    (["reproduce", "dmmh/fine"], "artefact: expected one of s5vh/fine"),
    (["reproduce", "fine", "-p", "prof=quick"],
     "parameter of s5vh/fine: expected one of profile, device, data_root, found 'prof' (did you mean 'profile'?)"),
    (["reproduce", "fine", "-p", "profile"], "-p: expected NAME=VALUE, found 'profile'"),
    (["reproduce", "fine", "-p", "profile=fast"], "profile: expected one of smoke, quick, full, paper"),
])
def test_unknown_words(project, capsys, words, said):
    project("fine", "print('fine')")
    assert reproduce.main(words) == 2
    assert said in capsys.readouterr().err


def test_unknown_profile_and_no_notebooks(project, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop: reproduce.main(["reproduce", "--profile", "fast"])
    assert stop.value.code == 2 and "'fast'" in capsys.readouterr().err
    assert reproduce.main(["reproduce"]) == 2
    assert "expected artefact notebooks in one of the folders s5vh, dmmh, beyond, found none" in capsys.readouterr().err


def test_results_that_cannot_be_written(project, tmp_path, capsys):
    project("fine", "print('fine')")
    (tmp_path/"home"/"results").write_text("a file where a folder should be")
    assert reproduce.main(["reproduce", "fine", "--profile", "smoke"]) == 1
    assert "expected a folder that can be written to" in capsys.readouterr().err


@pytest.mark.parametrize("cells, said", [
    ([nbformat.v4.new_markdown_cell("# Title")], "expected a cell tagged `parameters`"),
    ([nbformat.v4.new_code_cell("profile = 1", metadata={"tags": ["parameters"]})], "expected a heading '# title'"),
])
def test_incomplete_artefact_notebook(tmp_path, cells, said):
    path = tmp_path/"odd.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    with pytest.raises(ValueError, match=f"odd.ipynb: {said}"): reproduce.read_artefact(path)


def test_a_relative_data_folder_leaves_the_notebook_whole(project, tmp_path, monkeypatch):
    "Its name may be a word of the notebook's own format."
    monkeypatch.chdir(tmp_path)
    (tmp_path/"data").mkdir()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(f"data_root = 'data', {str(tmp_path/'data')!r}")])
    text = reproduce.shareable(nb, "data")
    nbformat.validate(nbformat.reads(text, 4))
    assert "'data', '<data_root>'" in text
