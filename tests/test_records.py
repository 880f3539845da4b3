"Records under hard conditions: killed writers, full disks, tampered files, another project's git."
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from s5vh_nb import records

RECORD = records.RunRecord(config={"kind": "test", "bits": 16}, seed=1, metrics={"gmap": .5}, data={"name": "none"},
                           device="none", seconds={"train": 1})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path))
    return tmp_path


def test_killed_while_saving(home):
    "Killed at any moment, a record is the old or the new one, and its codes are there."
    writer = """if True:
        import numpy as np
        from s5vh_nb import records
        codes = {"query": np.zeros((20000, 8), np.uint8)}
        for i in range(10**6):
            record = records.RunRecord(config={"kind": "test"}, seed=1, metrics={"i": i}, data={}, device="", seconds={},
                                       history=[{"epoch": e} for e in range(300)])
            records.save(record, "smoke", codes)
    """
    process = subprocess.Popen([sys.executable, "-c", writer])
    path = records.path_of(records.run_name({"kind": "test"}), "smoke")
    while not path.exists(): time.sleep(.01)
    seen = set()
    for _ in range(20):
        seen.add(records.load(path).metrics["i"])   # read while it is being replaced
        time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(seen) > 1
    assert len(records.load(path).history) == 300 and records.load_codes(path)["query"].shape == (20000, 8)


def test_full_disk_keeps_the_old_record(monkeypatch):
    path = records.save(RECORD, "smoke")
    def full(self, text):
        with open(self, "w") as f: f.write(text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="No space left"): records.save(dataclasses.replace(RECORD, metrics={"gmap": .9}), "smoke")
    assert records.load(path) == RECORD and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("change, said", [
    (lambda v: {**v, "schema": 0}, "schema: expected 1"),
    (lambda v: {**v, "surplus": 1}, r"unknown \['surplus'\]"),
    (lambda v: {k: v[k] for k in v if k not in ("seed", "data")}, r"missing \['data', 'seed'\]"),
    (lambda v: {**v, "config": {"kind": "test", "bits": 32}}, "the name that its configuration gives"),
    (lambda v: [v], "expected a run record, found list"),
    (lambda v: {**v, "metrics": {"gmap": float("nan")}}, "metrics.gmap: expected a finite number, found nan"),
    (lambda v: {**v, "config": [1]}, "config: expected names with values"),
])
def test_tampered(change, said):
    path = records.save(RECORD, "smoke")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"{path}.*{said}"): records.load(path)
    with pytest.raises(ValueError, match=said): records.read_all("smoke")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"null"])
def test_not_a_record(content):
    path = records.save(RECORD, "smoke")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)): records.load(path)


@pytest.mark.parametrize("codes, said", [({"query": np.zeros((3, 16))}, "uint8"), ({"query": np.zeros(16, np.uint8)}, "uint8")])
def test_codes_must_be_packed(codes, said):
    with pytest.raises(ValueError, match=f"codes of query: expected {said}"): records.save(RECORD, "smoke", codes)
    assert not records.path_of(RECORD.name, "smoke").exists()


def test_codes_without_pickle(home):
    path = records.save(RECORD, "smoke")
    np.savez(path.with_suffix(".npz"), query=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"): records.load_codes(path)


def test_commit(home):
    "None in a folder without git and inside another project's checkout; dirty when a source changes, not when results do."
    def git(*words):
        who = ("-c", "user.name=n", "-c", "user.email=e@x")
        subprocess.run(["git", "-C", str(home), *who, *words], check=True, capture_output=True)
    assert records.git_commit() is None
    git("init", "-q")
    (home/"code.py").write_text("1")
    git("add", "code.py"), git("commit", "-q", "-m", "first")
    clean = records.git_commit()
    assert len(clean) == 40
    (home/"results").mkdir(), (home/"results"/"new.json").write_text("{}")
    assert records.git_commit() == clean
    (home/"code.py").write_text("2")
    assert records.git_commit() == clean + "+dirty"
    os.environ["S5VH_NB_HOME"] = str(home/"results")
    assert records.git_commit() is None


def test_what_a_killed_writer_left_is_no_record(home):
    path = records.save(RECORD, "smoke")
    path.with_name(f"{path.name}.tmp-x1y2.json").write_text("")
    assert records.read_all("smoke") == [RECORD]


@pytest.mark.parametrize("damage, said", [
    (lambda path: path.unlink(), "no such file"),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "File is not a zip file"),
    (lambda path: path.write_bytes(b""), "No data left"),
    (lambda path: path.write_bytes(bytes(255 - byte if i == 90 else byte for i, byte in enumerate(path.read_bytes()))), "zlib|Error|CRC"),
])
def test_codes_that_are_gone_or_damaged(damage, said):
    path = records.save(RECORD, "smoke", {"query": np.zeros((5, 2), np.uint8)}).with_suffix(".npz")
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{path}: .*delete {path.stem}.json.*({said})"): records.load_codes(path)
