"asl-words: its file made from a small repository, bad clones, the set where its file is and where it is not."

import os
import shutil
import subprocess
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from s5vh_nb.basics.profiles import train_config
from s5vh_nb.cli.command import main
from s5vh_nb.datasets import asl_source, asl_words
from s5vh_nb.datasets.asl_source import get_asl_words, sign_arrays
from s5vh_nb.datasets.asl_words import FILE, draw_signs
from s5vh_nb.datasets.catalog import DATA_ROOT, describe, is_there, load
from s5vh_nb.evidence.identity import differences
from s5vh_nb.evidence.records import RunRecord
from s5vh_nb.evidence.runs import complete
from s5vh_nb.evidence.study import open_study

ROOT = os.environ.get(DATA_ROOT)
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="no git")
needs_file = pytest.mark.skipif(not is_there("asl-words"), reason=f"no {FILE} below {DATA_ROOT}")
T, D = 20, 258  # frames of a recording, numbers of a frame


def git(folder, *words, who="one", when="2022-03-01T12:00:00-05:00"):
    "Run git as an author at a time; returns what it prints."
    here = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "HOME": str(folder)}
    for role in ("AUTHOR", "COMMITTER"):
        here |= {f"GIT_{role}_NAME": who, f"GIT_{role}_EMAIL": f"{who}@example.org", f"GIT_{role}_DATE": when}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", env=outside | here)
    return done.stdout.strip()


def record(folder, word, sequence, seed):
    "Write a recording; returns its frames (T, D)."
    x = np.random.default_rng(seed).random((T, D))
    place = folder / "MP_Data" / word / str(sequence)
    place.mkdir(parents=True, exist_ok=True)
    for j, frame in enumerate(x):
        np.save(place / f"{j}.npy", frame)
    return x


def commit(folder, who, day, hour=12):
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "recordings", who=who, when=f"{day}T{hour}:00:00-05:00")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A repository in the layout of the real one, by three authors; pinned in place of the real one."
    folder = tmp_path / "clone"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "main")
    record(folder, "tea", 0, seed=100)  # replaced below by another person, as in the real one
    record(folder, "tea", 2, seed=2)
    record(folder, "-", 0, seed=3)
    commit(folder, "two", "2022-02-03")
    record(folder, "tea", 0, seed=0)
    record(folder, "tea", 10, seed=10)
    record(folder, "i", 0, seed=4)  # signed by nobody else
    record(folder, "-", 1, seed=5)
    commit(folder, "one", "2022-02-15")
    git(folder, "checkout", "-q", "-b", "side")
    record(folder, "no", 0, seed=20)
    commit(folder, "three", "2022-02-16")
    git(folder, "checkout", "-q", "main")
    record(folder, "no", 1, seed=21)
    commit(folder, "one", "2022-02-16", hour=22)  # the next day in UTC
    git(folder, "merge", "-q", "--no-ff", "-m", "merge", "side", who="two", when="2022-02-17T12:00:00-05:00")
    pin = git(folder, "rev-parse", "HEAD")
    record(folder, "tea", 0, seed=30)  # after the pinned commit
    commit(folder, "two", "2022-03-20")
    monkeypatch.setattr(asl_source, "_COMMIT", pin)
    return folder


@pytest.fixture
def pinned(clone, monkeypatch, tmp_path):
    "The clone, and the fingerprint of its set in place of that of the real one."
    np.savez(tmp_path / FILE, **sign_arrays(clone))
    with pytest.raises(ValueError, match="fingerprint") as found:
        asl_words.asl_words(tmp_path)
    monkeypatch.setattr(asl_words, "FINGERPRINT", str(found.value).split()[-1])
    return clone


def expected_points(x):
    "By hand, one frame and one point after the other."
    y = np.zeros((T, 112))
    for i, frame in enumerate(x.astype(np.float32)):
        body, hands = frame[:132].reshape(33, 4), frame[132:].reshape(42, 3)
        middle, unit = (body[11, :2] + body[12, :2]) / 2, np.hypot(*(body[11, :2] - body[12, :2]))
        chosen = [*body[11:25], *hands]
        y[i] = np.concatenate([(p[:2] - middle) / unit if p[:2].any() else (0, 0) for p in chosen])
    return y


@needs_git
def test_arrays_of_a_small_repository(clone):
    z = sign_arrays(clone)
    assert z["words"].tolist() == ["no", "tea"]  # "-" is no sign, and only one person signs "i"
    assert z["label"].tolist() == [0, 0, 1, 1, 1] and z["sequence"].tolist() == [0, 1, 0, 2, 10]
    one, two, three = z["signer"][[1, 3, 0]]  # "A" has most recordings, the others have one each
    assert z["signer"].tolist() == [three, one, one, two, one] and one == "A" and {two, three} == {"B", "C"}
    assert z["session"].tolist() == [f"{three}1", f"{one}2", f"{one}1", f"{two}1", f"{one}1"]
    kinds = {"label": "u1", "words": "U3", "signer": "U1", "session": "U2", "sequence": "i2"}
    assert {name: z[name].dtype for name in kinds} == {name: np.dtype(kind) for name, kind in kinds.items()}
    assert z["frames"].dtype == np.float16
    for at, seed in enumerate((20, 21, 0, 2, 10)):
        x = np.random.default_rng(seed).random((T, D))
        np.testing.assert_allclose(z["frames"][at], expected_points(x), rtol=2e-3, atol=1e-3)


@needs_git
def test_one_command_makes_the_file(pinned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(asl_source, "_URL", f"file://{pinned}")
    monkeypatch.delenv(DATA_ROOT, raising=False)
    assert main(["get", "asl-words", "--to", str(tmp_path / "new" / "data")]) == 0  # clones it
    path = (tmp_path / "new" / "data" / FILE).resolve()
    told = capsys.readouterr().out.splitlines()
    assert told[0] == str(path) and told[1].endswith(f"export {DATA_ROOT}={path.parent}")
    assert os.listdir(path.parent) == [FILE]
    monkeypatch.setenv(DATA_ROOT, str(tmp_path / "there"))
    assert main(["get", "asl-words", "--from", str(pinned)]) == 0  # to the data root
    assert (tmp_path / "there" / FILE).read_bytes() == path.read_bytes()
    data = asl_words.asl_words(path.parent)
    assert [len(split) for split in data.splits.values()] == [3, 3, 2]
    assert not set(data.train.groups) & set(data.query.groups)


def test_no_folder_to_write_to(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(DATA_ROOT, raising=False)
    assert main(["get", "asl-words", "--from", str(tmp_path)]) == 2
    assert f"--to: expected the folder for the file, here or in {DATA_ROOT}" in capsys.readouterr().err
    if shutil.which("git"):
        (tmp_path / "file").touch()
        assert main(["get", "asl-words", "--to", str(tmp_path / "file")]) == 2  # before anything is cloned
        assert "expected a folder that can be written to" in capsys.readouterr().err


def test_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="git: expected the command"):
        get_asl_words(tmp_path / "data")
    assert os.listdir(tmp_path) == []


@needs_git
def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(asl_source, "_URL", f"file://{tmp_path}/nowhere")
    with pytest.raises(ConnectionError, match="nowhere: expected a network .* `--from CLONE`"):
        get_asl_words(tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []


def shallow(folder):
    copy = folder.parent / "shallow"
    git(folder.parent, "clone", "-q", "--depth", "1", f"file://{folder}", str(copy))
    return copy, "whole history .*found a shallow one"


def other(folder):
    copy = folder.parent / "other"
    copy.mkdir()
    git(copy, "init", "-q")
    return copy, "that has commit .*found fatal: Not a valid object name"


def no_clone(folder):
    (folder.parent / "no_clone").mkdir()
    return folder.parent / "no_clone", "expected a git clone .*found fatal: not a git repository"


def nowhere(folder):
    return folder.parent / "nowhere", "found fatal: cannot change to .*nowhere"


@needs_git
@pytest.mark.parametrize("spoil", [shallow, other, no_clone, nowhere])
def test_bad_clones(clone, spoil, tmp_path):
    folder, message = spoil(clone)
    with pytest.raises(ValueError, match=message):
        get_asl_words(tmp_path / "data", folder)
    assert os.listdir(tmp_path / "data") == []


@needs_git
def test_a_missing_frame_is_named(clone, monkeypatch, tmp_path):
    (clone / "MP_Data" / "no" / "1" / "19.npy").unlink()
    commit(clone, "one", "2022-03-21")
    monkeypatch.setattr(asl_source, "_COMMIT", git(clone, "rev-parse", "HEAD"))
    with pytest.raises(ValueError, match=r"MP_Data/no/1/19.npy, frame 19 of 20, found no such file"):
        get_asl_words(tmp_path / "data", clone)


@needs_git
def test_failures_keep_what_was_there(clone, tmp_path):
    (tmp_path / FILE).write_bytes(b"before")
    with pytest.raises(ValueError, match="fingerprint"):  # this small set is not the real one
        get_asl_words(tmp_path, clone)
    assert (tmp_path / FILE).read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == [FILE, "clone"]


# The set itself


def test_missing_file_is_left_out_by_name(checkout, capsys):
    for profile in ("quick", "full"):
        study = open_study("s5vh/retrieval", profile, root=checkout, data_root=str(checkout), may_train=True)
        assert "asl-words" not in study.datasets and "spoken-digits" in study.datasets
    told = f"left out: asl-words (no {FILE}; `s5vh-nb get asl-words` makes it, {DATA_ROOT} names its folder)"
    assert capsys.readouterr().out.splitlines()[-1] == told
    with pytest.raises(FileNotFoundError, match="`s5vh-nb get asl-words` makes it"):
        load("asl-words", checkout)


def test_records_are_enough_without_the_file(checkout, monkeypatch):
    monkeypatch.delenv(DATA_ROOT, raising=False)
    study = open_study("s5vh/retrieval", "full", "asl-words", 16, 1, root=checkout, may_train=False)
    (places,) = (place for place in study.cells() if place[2] == "ITQ, time mean")
    (config,) = study.configs(*places)
    told = describe("asl-words")
    assert (told.kind, told.widths, told.fingerprint) == ("videos", {"d": 112}, asl_words.FINGERPRINT)
    assert complete(train_config("asl-words", labelled=0.1), told).objective.n_centers == 14
    record = RunRecord(
        config=differences(complete(config, told)),
        metrics={"GmAP": 0.5},
        data={"name": told.name, "fingerprint": told.fingerprint},
        device="none",
        seconds={"train": 1.0},
        artefact="s5vh/retrieval",
    )
    study.store.archive.save(record, {})
    assert [[r.metrics for r in found] for found in study.records().values()] == [[{"GmAP": 0.5}]]


def test_unseen_points_are_not_drawn():
    frames = np.random.default_rng(0).normal(size=(T, 112))
    frames[:, 28:70] = 0  # the left hand
    fig, ax = plt.subplots()
    draw_signs(frames, ax, n=4)
    body, left, right = (len(lines.get_segments()) for lines in ax.collections)
    assert (body, left, right) == (4 * 8, 0, 4 * 20)
    plt.close(fig)


@needs_file
def test_the_real_file():
    data, told = load("asl-words"), describe("asl-words", "nowhere")
    assert (data.fingerprint, data.widths, data.n_classes) == (told.fingerprint, told.widths, told.n_classes)
    assert [len(split) for split in data.splits.values()] == [1830, 1830, 1363]
    assert data.database is data.train and not set(data.train.groups) & set(data.query.groups)
    assert len(np.unique(data.query.labels)) == data.n_classes == 14
    assert abs(data.train.frames).max() <= 6 and abs(data.train.frames.mean((0, 1))).max() < 0.1
    assert Path(data.folder) == Path(ROOT) or Path(data.folder).parent == Path(ROOT)


def test_an_experiment_that_trains_nothing_keeps_its_sets(checkout, monkeypatch):
    monkeypatch.delenv(DATA_ROOT, raising=False)
    study = open_study("dmmh/arithmetic", "smoke", root=checkout)
    assert study.datasets == ["mirflickr25k", "nuswide", "mscoco"]  # published numbers of them
