"Work on a Ray cluster of two workers: the same results, kills of workers and drivers, faults."

import collections
import functools
import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from s5vh_nb.basics import pools
from s5vh_nb.basics.config import BaselineConfig, PlusConfig, S5VHConfig, replace
from s5vh_nb.basics.pools import RayPool, in_order
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.cli.command import main
from s5vh_nb.datasets import extract
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.extract import extract_features
from s5vh_nb.evidence.store import RAY, Store
from s5vh_nb.models.plus import Plus
from s5vh_nb.models.s5vh import S5VH
from s5vh_nb.search import videos as videos_module
from s5vh_nb.search.videos import encode_videos

installed = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)
FAST = dict(extractor="histogram", t=3, progress=False)
FITS = [BaselineConfig("spoken-digits", method, bits=bits) for method in ("itq", "lsh") for bits in (8, 16)]


@pytest.fixture(scope="module")
def cluster():
    "The address of a cluster that this process has joined; its workers find this module."
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", path)
        with RayPool("local", 2) as pool:
            yield pool.address


def gif(path, level):
    pictures = [Image.new("RGB", (8, 8), (level + i, 0, 255 - level)) for i in range(5)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, "GIF", save_all=True, append_images=pictures[1:])


@pytest.fixture
def videos(tmp_path):
    "Twelve animations with two labels, and one file that is no video."
    for i in range(12):
        gif(tmp_path / "videos" / ("red" if i % 2 else "blue") / f"{i}.gif", 20 * i)
    (tmp_path / "videos" / "blue" / "text.mp4").write_text("no video", encoding="utf-8")
    return tmp_path / "videos"


def contents(folder):
    "The bytes of all files; without the date in the header of MATLAB's."
    return {path.name: path.read_bytes()[128 * (path.suffix == ".mat") :] for path in folder.iterdir()}


def note(file, text):
    "Add a line, which no other process can tear."
    with open(file, "ab", buffering=0) as out:
        out.write(f"{text}\n".encode())


def noted(file):
    return collections.Counter(file.read_text(encoding="utf-8").split())


def die_once(mark):
    "Kill this process, unless one was killed here before."
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


# The same results


@installed
@pytest.mark.parametrize("extractor, t", [("histogram", 3), ("random", 2)])
def test_features_are_those_of_one_process(cluster, videos, tmp_path, extractor, t):
    if extractor == "random":
        pytest.importorskip("efficientnet_lite_pytorch", reason="the extra video is not installed")
    given = dict(extractor=extractor, t=t, device="cpu", progress=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    try:
        here = extract_features(videos, tmp_path / "here", **given)
    finally:
        torch.set_num_threads(threads)
    there = extract_features(videos, tmp_path / "there", ray=cluster, **given)
    assert contents(there.folder) == contents(here.folder)
    assert (there.videos, there.new, there.unreadable) == (12, 13, here.unreadable)
    assert there.decoder > 0 and there.extractor > 0 and 0 < there.waited < 1
    again = extract_features(videos, tmp_path / "there", ray=cluster, **given)
    assert (again.new, again.unreadable) == (0, here.unreadable)


@installed
@pytest.mark.parametrize("network, dataset", [(S5VH, "spoken-digits"), (Plus, "own-videos")])
def test_codes_are_those_of_one_process(cluster, videos, tmp_path, monkeypatch, network, dataset):
    "Features in memory and in files, in several pieces."
    extract_features(videos, tmp_path / "out", **FAST)
    data = load(dataset, tmp_path / "out")
    few = data.database.take(slice(0, 99))
    data = replace(data, train=few, database=few)
    t, d = data.train.frames.shape[1:]
    config = {S5VH: S5VHConfig, Plus: PlusConfig}[network](d=d, bits=16, m=8)
    network(config).save_pretrained(tmp_path / "model")
    here = encode_videos(tmp_path / "model", data, "cpu", progress=False)
    monkeypatch.setattr(videos_module, "_PIECE", t * max(1, len(data.train) // 3))
    there = encode_videos(tmp_path / "model", data, "cpu", cluster, progress=False)
    assert list(there) == list(here) and len(np.unique(here["codes"])) > 1
    for name in here:
        np.testing.assert_array_equal(there[name], here[name])


@installed
def test_records_are_those_of_one_process(cluster, checkout, monkeypatch):
    "Of trainings and of fits, by name and with all scores; what exists is not made again."
    config = train_config("spoken-digits", "smoke", epochs=1, m=16)
    configs = [*FITS[:2], config]
    made = {}
    for place in ("here", "there"):
        store = Store("tests", "smoke", root=checkout / place, device="cpu", progress=False)
        if place == "there":
            store.get(configs[0])
            monkeypatch.setenv(RAY, cluster)
        made[place] = {record.name: record.metrics for record in store.get_many(configs)}
    assert made["there"] == made["here"] and len(made["here"]) == 3


# Kills


class Dying(extract._OnCluster):
    "Notes which videos it reads, beside their folder; dies when it has begun a certain one."

    def __call__(self, video):
        place = video.file.parents[2]
        note(place / "read", video.path)
        if video.path == "red/5.gif":
            die_once(place / "died")
        return super().__call__(video)


@installed
def test_a_killed_worker_repeats_only_its_own_video(cluster, videos, tmp_path, monkeypatch):
    here = extract_features(videos, tmp_path / "here", **FAST)
    monkeypatch.setattr(extract, "_OnCluster", Dying)
    there = extract_features(videos, tmp_path / "there", ray=cluster, **FAST)
    assert contents(there.folder) == contents(here.folder)
    read = noted(tmp_path / "read")
    assert read.pop("red/5.gif") == 2 and len(read) == 12 and set(read.values()) == {1}


class DyingStore(Store):
    "Notes which runs it makes; dies when it has begun a certain one."

    def get(self, config, label=""):
        note(self.root / "made", f"{config.method}{config.bits}")
        if config == FITS[2]:
            die_once(self.root / "died")
        return super().get(config, label)


@installed
def test_a_killed_worker_repeats_only_its_own_run(cluster, checkout, monkeypatch):
    store = DyingStore("tests", "smoke", root=checkout, device="cpu", progress=False)
    monkeypatch.setattr(store, "_quiet", lambda: store)
    monkeypatch.setenv(RAY, cluster)
    assert [record.configuration for record in store.get_many(FITS)] == FITS
    assert noted(checkout / "made") == {"itq8": 1, "itq16": 1, "lsh8": 2, "lsh16": 1}


def driver(code, **settings):
    "Run code in a process of its own, which kills itself."
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


KILLED = "lambda *_: os.kill(os.getpid(), signal.SIGKILL)"


@installed
def test_a_killed_driver_continues(cluster, videos, tmp_path):
    "Features: the journal has what was written, and the rest is read by the next run."
    driver(
        f"""
import os, signal
from s5vh_nb.datasets import extract
put, count = extract._Work._put, []
def killed(self, *args):
    put(self, *args)
    count.append(1)
    if len(count) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
extract._Work._put = killed
extract.extract_features({str(videos)!r}, {str(tmp_path / "there")!r}, ray={cluster!r}, workers=1, **{FAST!r})
"""
    )
    assert (tmp_path / "there" / "unfinished.jsonl").is_file()
    there = extract_features(videos, tmp_path / "there", ray=cluster, workers=1, **FAST)
    assert (there.new, there.videos) == (8, 12)
    here = extract_features(videos, tmp_path / "here", **FAST)
    assert contents(there.folder) == contents(here.folder)


@installed
def test_a_killed_sweep_continues(cluster, checkout, monkeypatch):
    "Its driver dies when a run is done; the next one makes the others."
    driver(
        f"""
import os, signal
from s5vh_nb.basics.config import BaselineConfig
from s5vh_nb.evidence import store
def update(bar):
    os.kill(os.getpid(), signal.SIGKILL)
store.tqdm.update = update
fits = [BaselineConfig("spoken-digits", method, bits=bits) for method in ("itq", "lsh") for bits in (8, 16)]
store.Store("tests", "smoke", root={str(checkout)!r}, device="cpu").get_many(fits)
""",
        **{RAY: cluster},
    )
    store = DyingStore("tests", "smoke", root=checkout, device="cpu", progress=False)
    before = {record.name for record in store.archive.records()}
    assert before
    (checkout / "died").touch()
    monkeypatch.setattr(store, "_quiet", lambda: store)
    monkeypatch.setenv(RAY, cluster)
    names = {record.name for record in store.get_many(FITS)}
    assert before < names and len(names) == 4
    assert len(noted(checkout / "made")) == 4 - len(before)


# Faults


def pause(place, number):
    note(place, number)
    time.sleep(0.01)
    return bytearray(2**60) if number == 5 else number


@installed
def test_few_calls_are_under_way(cluster, tmp_path):
    "However many items there are; the order is kept, one lacks memory, and what was not begun is dropped."
    call = functools.partial(pause, tmp_path / "begun")
    numbers = in_order(call, range(10**9), RayPool(cluster, 1), 4)
    futures = [next(numbers)[1] for _ in range(20)]
    assert isinstance(futures.pop(5).exception(), MemoryError)
    assert [future.result() for future in futures] == [i for i in range(20) if i != 5]
    numbers.close()
    assert 20 <= len(noted(tmp_path / "begun")) <= 25


@installed
def test_errors_are_those_of_one_process(cluster, checkout, monkeypatch):
    "Of a run that fails beside others."
    bad = BaselineConfig("spoken-digits", "itq", bits=4096)
    messages = []
    for address in (None, cluster):
        store = Store("tests", "smoke", root=checkout, device="cpu", progress=False)
        if address:
            monkeypatch.setenv(RAY, address)
        with pytest.raises(RuntimeError, match="1 of 2 runs failed: itq-spoken-digits-4096bit") as raised:
            store.get_many([bad, FITS[0] if address else FITS[1]], workers=1)
        messages.append(str(raised.value))
    assert messages[0] == messages[1] and len(store.archive.records()) == 2


def end(number):
    os.kill(os.getpid(), signal.SIGKILL)


class Deadly(extract._OnCluster):
    def __call__(self, video):
        return end(video) if video.path == "red/5.gif" else super().__call__(video)


@installed
def test_a_video_that_kills_its_worker_is_listed_and_skipped(cluster, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "_AGAIN", 0)
    monkeypatch.setattr(extract, "_OnCluster", Deadly)
    done = extract_features(videos, tmp_path / "out", ray=cluster, workers=1, **FAST)
    assert set(done.unreadable) == {"red/5.gif", "blue/text.mp4"} and done.videos == 11
    assert done.unreadable["red/5.gif"].startswith("ray: expected a worker of the cluster that lives until")


class Failing(extract._OnCluster):
    @property
    def net(self):
        raise ImportError("no such network here")


@installed
def test_what_a_worker_lacks_is_no_fault_of_the_videos(cluster, videos, tmp_path, monkeypatch):
    "Nothing is kept of them."
    monkeypatch.setattr(extract, "_OnCluster", Failing)
    with pytest.raises(ImportError, match="no such network here"):
        extract_features(videos, tmp_path / "out", ray=cluster, workers=1, **FAST)
    assert len((tmp_path / "out" / "unfinished.jsonl").read_text(encoding="utf-8").splitlines()) == 1


COMMANDS = ["features videos out", "encode model features codes.npz", "reproduce"]


@pytest.fixture
def alone(monkeypatch):
    "A process that has joined no cluster."
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.fixture
def asked(videos, checkout, tmp_path, monkeypatch):
    "A working directory in which the commands find what they need."
    monkeypatch.chdir(tmp_path)
    extract_features(videos, "features", **FAST)
    Plus(PlusConfig(d=512, bits=16, m=8)).save_pretrained("model")
    return tmp_path


@installed
@pytest.mark.parametrize("line", COMMANDS)
def test_a_cluster_out_of_reach_is_named_within_seconds(asked, alone, line, capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "no.such.host.invalid:6379", f"127.0.0.1:{port}"):
            began = time.perf_counter()
            assert main([*shlex.split(line), "--ray", address]) == 2
            assert time.perf_counter() - began < 30
            expected = f"{address}: expected a Ray cluster that answers within 5 seconds, found"
            assert expected in capsys.readouterr().err


@installed
def test_wrong_addresses(asked, alone, monkeypatch, capsys):
    def none(address, **given):
        raise ConnectionError("none here")

    monkeypatch.setattr("ray.init", none)
    monkeypatch.setenv("RAY_TMPDIR", str(asked))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main("features videos out --ray auto".split()) == 2
    assert re.search("auto: expected a Ray cluster .*, found: none here", capsys.readouterr().err)
    (asked / "ray").mkdir()
    (asked / "ray" / "ray_current_cluster").write_text("127.0.0.1:1", encoding="utf-8")  # of one that crashed
    assert main("features videos out --ray auto".split()) == 2
    assert "127.0.0.1:1: expected a Ray cluster that answers" in capsys.readouterr().err
    assert main("reproduce --ray s5vh/retrieval".split()) == 2
    assert "--ray: expected local, auto, HOST:PORT or ray://HOST:PORT" in capsys.readouterr().err


@installed
def test_another_cluster_than_the_one_joined(cluster):
    with pytest.raises(ValueError, match=f"--ray: expected {cluster}, which this process has joined, found"):
        RayPool("127.0.0.1:1")


@pytest.mark.parametrize("line", COMMANDS)
def test_ray_that_is_not_installed_is_named(asked, monkeypatch, line, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*shlex.split(line), "--ray"]) == 2
    assert "ray: expected the package ray (pip install 's5vh_nb[ray]'), found" in capsys.readouterr().err


# Commands


@installed
def test_the_example_of_the_help_works(cluster, asked, capsys):
    with pytest.raises(SystemExit):
        main(["features", "--help"])
    lines = re.findall(r"^  s5vh-nb (.+ --ray auto)$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) == 1
    (asked / "features" / "manifest.csv").unlink()
    assert main([*shlex.split(lines[0].replace(" features ", " more ")), "--extractor", "histogram"]) == 0


@installed
def test_notebooks_share_the_cluster_of_the_command(cluster, checkout):
    cells = [
        "profile = 'quick'\ndevice = None\ndata_root = None",
        "from s5vh_nb.basics.config import BaselineConfig\nfrom s5vh_nb.evidence.store import Store\n"
        "fits = [BaselineConfig('spoken-digits', 'lsh', bits=bits) for bits in (8, 16)]\n"
        "store = Store('s5vh/fits', profile, device=device)\n"
        "print([record.metrics['row'] for record in store.get_many(fits)])",
        "import os, ray\nprint(ray.is_initialized(), os.environ['S5VH_NB_RAY'])",
    ]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title")])
    nb.cells += [nbformat.v4.new_code_cell(cell) for cell in cells]
    nb.cells[1].metadata["tags"] = ["parameters"]
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    (checkout / "nbs" / "s5vh").mkdir()
    nbformat.write(nb, checkout / "nbs" / "s5vh" / "fits.ipynb")
    assert main(["reproduce", "fits", "--profile", "smoke", "--device", "cpu", "--ray", cluster]) == 0
    text = (checkout / "results" / "smoke" / "executed" / "s5vh_fits.ipynb").read_text(encoding="utf-8")
    assert f"False {cluster}" in text and "LSH" in text
    assert len(list((checkout / "results" / "smoke").rglob("lsh-*.json*"))) == 2


@installed
def test_a_cluster_of_ones_own(videos, tmp_path):
    "Started by the command, without noise, and gone when it is done."
    words = shlex.split("features videos out --extractor histogram --frames 3 --ray --workers 2")
    env = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
    code = f"import sys; from s5vh_nb.cli.command import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    out, err = done.stdout.decode().splitlines(), done.stderr.decode()
    assert done.returncode == 0, err
    assert out[0] == "out: 12 videos; files read in this run: 13" and len(out) == 4
    assert all(line.startswith("videos: ") for line in re.split(r"[\r\n]+", err) if line.strip()), err
