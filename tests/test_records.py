"Records: pinned names, killed writers, full disks, damaged files, packing, another project's git."

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

from s5vh_nb.basics.config import (
    BaselineConfig,
    DMMHConfig,
    MetricConfig,
    NeighbourConfig,
    PairNeighbourConfig,
    PlusConfig,
    S5VHConfig,
    SLGConfig,
    TrainConfig,
    TransferConfig,
    to_dict,
)
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.cli.command import main
from s5vh_nb.evidence import identity
from s5vh_nb.evidence.archive import Archive, from_fractions, pack, to_fractions
from s5vh_nb.evidence.identity import run_name
from s5vh_nb.evidence.records import RunRecord, git_commit

RECORD = RunRecord(
    config={"kind": "test", "bits": 16},
    metrics={"GmAP": 0.5},
    data={"name": "none"},
    device="none",
    seconds={"train": 1},
    artefact="s5vh/losses",
)


@pytest.fixture
def archive(checkout):
    return Archive(checkout, "smoke")


# Names

DEFAULTS = {  # of all fields that names may leave out
    S5VHConfig: dict(
        d=4096,
        bits=64,
        m=256,
        depth=6,
        decoder_m=192,
        decoder_depth=1,
        mixer="Mamba",
        directions="both",
        tied=False,
        relaxation="sign",
        frozen=False,
        drop_path=0.5,
        start="mamba",
    ),
    SLGConfig: dict(
        reconstruction=1.0,
        alpha=1.0,
        beta=0.1,
        mask_ratio=0.5,
        tau_plus=0.1,
        temperature=0.5,
        n_centers=101,
        pca=512,
        centers="semantic",
        centers_in_loss=True,
        labels_follow_centers=True,
        warmup=50,
        refresh=0.01,
        refresh_with_norm=True,
        labelled=0.0,
        propagation="paths",
    ),
    DMMHConfig: dict(
        di=4096,
        dt=1386,
        bits=64,
        width=128,
        image_hidden=2048,
        text_hidden=1024,
        modality="both",
        dilation="bit",
        positions=True,
        dropout=0.5,
        mixer="Mamba",
        directions="forward",
        layers=2,
        fusion="sum",
        cnn_width=64,
    ),
    MetricConfig: dict(
        n_classes=24,
        similarity=1.0,
        classification=1.0,
        quantization=0.0,
        alignment=0.0,
        centers="semantic",
        labelled=1.0,
        propagation="paths",
    ),
    PlusConfig: dict(
        d=4096,
        bits=64,
        time_steps=25,
        m=96,
        depth=2,
        mixer="Mamba",
        pooling="concat",
        linear=True,
        centring=0.8,
        dropout=0.2,
    ),
    NeighbourConfig: dict(
        warp=0.3,
        exchange=0.5,
        scale=0.2,
        offset=0.2,
        noise=0.3,
        hide=0.0,
        temperature=0.25,
        neighbour_weight=0.5,
        neighbours=10,
        damping=0.9,
    ),
    PairNeighbourConfig: dict(
        noise=0.3,
        drop=0.3,
        alone=0.3,
        text_weight=2.0,
        temperature=0.5,
        neighbour_weight=0.8,
        neighbours=10,
        damping=0.9,
    ),
    TrainConfig: dict(
        dataset="spoken-digits",
        seed=1,
        epochs=350,
        share=1.0,
        batch=128,
        lr=5e-4,
        lr_end=1e-5,
        weight_decay=1e-4,
        precision="tf32",
    ),
    BaselineConfig: dict(dataset="spoken-digits", method="itq", view="mean", bits=64, seed=1, share=1.0),
}


@pytest.mark.parametrize("kind", DEFAULTS, ids=lambda kind: kind.__name__)
def test_defaults_are_those_of_the_schema(kind):
    "Names leave defaults out. Whoever changes one raises `SCHEMA` in evidence.identity, then this table."
    found = to_dict(kind())
    assert {name: found[name] for name in DEFAULTS[kind]} == DEFAULTS[kind]
    assert set(found) - {"kind", "evaluate_every", "model", "objective"} == set(DEFAULTS[kind]), (
        "pin the new field's default"
    )


EMOJI = train_config("emoji", "full", bits=16, seed=3)
NAMES = {
    "s5vh-spoken-digits-64bit-s1-974d7678": (TrainConfig(),),
    "s5vh-spoken-digits-64bit-s2-5aa11861": (train_config("spoken-digits", "quick", seed=2, beta=0.0),),
    "dmmh-emoji-16bit-s3-e513ee48": (EMOJI,),
    "dmmh-speed-on-cpu-emoji-16bit-s3-dd3ed316": (EMOJI, "speed on cpu"),
    "itq-spoken-digits-16bit-s1-87190e8e": (BaselineConfig(bits=16),),
    "itq-from-spoken-digits-spoken-pairs-32bit-s1-6938bd24": (
        TransferConfig("spoken-pairs", BaselineConfig(bits=32)),
    ),
}


def test_names_are_those_of_the_schema():
    assert [run_name(*parts) for parts in NAMES.values()] == list(NAMES)


def test_a_new_schema_renames_every_run(monkeypatch):
    configs = [TrainConfig(), BaselineConfig(), {"kind": "benchmark"}]
    before = [run_name(config) for config in configs]
    monkeypatch.setattr(identity, "SCHEMA", identity.SCHEMA + 1)
    assert not set(before) & {run_name(config) for config in configs}


# Writing


def test_killed_while_saving(archive):
    "Killed at any moment, a record is the old or the new one, and its arrays are there."
    writer = """if True:
        import numpy as np
        from s5vh_nb.evidence.archive import Archive
        from s5vh_nb.evidence.records import RunRecord
        codes = {"query": np.zeros((20000, 8), np.uint8)}
        for i in range(10**6):
            parts = dict(data={}, device="", seconds={}, artefact="test", columns={"loss": ["loss"] * 300})
            record = RunRecord(config={"kind": "test"}, metrics={"i": i}, **parts)
            Archive(".", "smoke").save(record, {"loss": np.zeros((300, 2))}, codes)
    """
    process = subprocess.Popen([sys.executable, "-c", writer])
    name = run_name({"kind": "test"})
    while not archive.path_of(name).exists():
        assert process.poll() is None
        time.sleep(0.01)
    seen = set()
    for _ in range(20):
        seen.add(archive.find(name).metrics["i"])  # read while it is being replaced
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    record = archive.find(name)
    assert len(seen) > 1 and len(record.columns["loss"]) == 300
    assert archive.codes(record)["query"].shape == (20000, 8)
    assert archive.arrays(record)["loss"].shape == (300, 2)


def test_full_disk_keeps_the_old_record(archive, monkeypatch):
    archive.save(RECORD, {})
    path = archive.path_of(RECORD.name)
    before = sorted(os.listdir(path.parent))

    def full(self, text, *_, **__):
        with open(self, "w", encoding="utf-8") as file:
            file.write(text[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        archive.save(dataclasses.replace(RECORD, metrics={"GmAP": 0.9}), {})
    assert archive.find(RECORD.name) == RECORD
    assert sorted(os.listdir(path.parent)) == before


@pytest.mark.parametrize("codes", [np.zeros((3, 16)), np.zeros(16, np.uint8)], ids=["type", "shape"])
def test_codes_must_be_packed(archive, codes):
    with pytest.raises(ValueError, match=r"codes of query: expected uint8 \(n, k/8\)"):
        archive.save(RECORD, {}, {"query": codes})
    assert not archive.runs.exists()


# Reading


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


CHANGES = {
    "schema: expected 3": lambda values: {**values, "schema": 0},
    r"unknown \['surplus'\]": lambda values: {**values, "surplus": 1},
    r"missing \['data', 'device'\]": lambda values: without(values, "data", "device"),
    "the name that its configuration gives": lambda values: {
        **values,
        "config": {"kind": "test", "bits": 32},
    },
    "expected a run record, found list": lambda values: [values],
    "metrics.GmAP: expected a finite number, found nan": lambda values: {
        **values,
        "metrics": {"GmAP": np.nan},
    },
    "config: expected names with values": lambda values: {**values, "config": [1]},
}


@pytest.mark.parametrize("found, change", CHANGES.items(), ids=range(len(CHANGES)))
@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
def test_tampered(archive, checkout, found, change, packed):
    archive.save(RECORD, {})
    path = archive.path_of(RECORD.name)
    values = json.dumps(change(json.loads(path.read_text("utf-8"))))
    if packed:
        table = checkout / pack(checkout, "smoke")[0]
        path.unlink()
        path = table
    path.write_text(values, "utf-8")
    with pytest.raises(ValueError, match=f"{path}.*{found}"):
        archive.find(RECORD.name)
    with pytest.raises(ValueError, match=found):
        archive.records()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"null"])
def test_not_a_record(archive, content):
    archive.save(RECORD, {})
    path = archive.path_of(RECORD.name)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        archive.find(RECORD.name)
    with pytest.raises(ValueError, match=str(path)):
        archive.records()


def test_arrays_without_pickle(archive):
    archive.save(RECORD, {})
    np.savez(archive.path_of(RECORD.name).with_suffix(".npz"), ap=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        archive.arrays(RECORD)


def flip(path, place=90):
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


DAMAGES = {
    "no such file": lambda path: path.unlink(),
    "File is not a zip file": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "No data left": lambda path: path.write_bytes(b""),
    "Corrupt|CRC": flip,
}


@pytest.mark.parametrize("found, damage", DAMAGES.items(), ids=["gone", "cut", "empty", "flipped"])
@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
def test_arrays_that_are_gone_or_damaged(archive, checkout, found, damage, packed):
    archive.save(RECORD, {"ap": np.arange(100, dtype=np.uint16)})
    path = archive.path_of(RECORD.name).with_suffix(".npz")
    if packed:
        path = checkout / pack(checkout, "smoke")[1]
    damage(path)
    expected = rf"{path}: expected the arrays of a record \(`s5vh-nb forget` removes the record\).*({found})"
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        archive.arrays(RECORD)


def test_what_a_killed_writer_left_is_no_record(archive, checkout):
    archive.save(RECORD, {})
    path = archive.path_of(RECORD.name)
    path.with_name(f"{path.name}.tmp-x1y2.json").write_text("", encoding="utf-8")
    assert archive.records() == [RECORD]
    assert len(pack(checkout, "smoke")) == 2
    table = next(archive.evidence.glob("*.jsonl"))
    table.with_name(f"{table.name}.tmp-x1y2.jsonl").write_text("", encoding="utf-8")
    assert list(archive.tables()) == [table] and archive.records() == [RECORD]


def test_a_packed_label_may_hold_any_character(archive, checkout):
    archive.save(dataclasses.replace(RECORD, label="a\u2028b\u0085c"), {})
    pack(checkout, "smoke")
    assert [record.label for record in archive.records()] == ["a\u2028b\u0085c"]


def test_fractions_make_up_for_each_other():
    "Sixths add up to sums that lose their last digit, with which a step would become one too large."
    values = np.random.default_rng(936).choice([1, 1 / 6], 3000)
    assert abs((from_fractions(to_fractions(values)) - values).sum()) < 0.6 / 31


# Packing


def of_artefact(artefact, bits):
    return dataclasses.replace(RECORD, artefact=artefact, config={"kind": "test", "bits": bits})


def test_packed_records_lie_with_their_artefact(archive, checkout):
    "And stay there when a later run of the same configuration is another artefact's."
    records = [
        of_artefact("s5vh/losses", 16),
        of_artefact("s5vh/losses", 32),
        of_artefact("benchmarks/scan", 64),
        of_artefact("benchmarks/index", 128),
    ]
    for record in records:
        archive.save(record, {"ap": np.full(3, record.config["bits"], np.uint16)})
    names = [f"results/smoke/evidence/{name}" for name in ("benchmarks", "s5vh_losses")]
    assert sorted(pack(checkout, "smoke")) == sorted(f"{n}{end}" for n in names for end in (".jsonl", ".npz"))
    later = dataclasses.replace(records[0], artefact="s5vh/audit", created="2999-01-01T00:00:00+00:00")
    archive.save(later, {"ap": np.zeros(3, np.uint16)})
    assert pack(checkout, "smoke") == [f"{names[1]}.jsonl", f"{names[1]}.npz"]
    for path in archive.runs.iterdir():
        path.unlink()
    assert {record.name for record in archive.records()} == {record.name for record in records}
    assert archive.find(later.name) == later
    assert [int(archive.arrays(record)["ap"][0]) for record in records] == [0, 32, 64, 128]


def test_an_older_run_does_not_replace_a_packed_one(archive, checkout):
    archive.save(RECORD, {})
    pack(checkout, "smoke")
    older = dataclasses.replace(RECORD, metrics={"GmAP": 0.1}, created="2000-01-01T00:00:00+00:00")
    archive.save(older, {})
    assert pack(checkout, "smoke") == []
    assert archive.find(RECORD.name) == RECORD


def test_a_profile_without_runs_packs_nothing(checkout):
    assert pack(checkout, "smoke") == []


# Where it ran


def test_commit(checkout, monkeypatch):
    "None where `root` is no checkout of its own; dirty when a source changes, not when results do."
    monkeypatch.delenv("S5VH_NB_COMMIT", raising=False)

    def git(*words):
        who = ("-c", "user.name=n", "-c", "user.email=e@x")
        subprocess.run(["git", "-C", str(checkout), *who, *words], check=True, capture_output=True)

    assert git_commit(checkout) is None
    git("init", "-q")
    code, results = checkout / "code.py", checkout / "results"
    code.write_text("1", encoding="utf-8")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    clean = git_commit(checkout)
    assert len(clean) == 7
    results.mkdir()
    (results / "new.json").write_text("{}", encoding="utf-8")
    assert git_commit(checkout) == clean
    code.write_text("2", encoding="utf-8")
    assert git_commit(checkout) == clean + "+dirty"
    assert git_commit(results) is None
    monkeypatch.setenv("S5VH_NB_COMMIT", "abc1234")
    assert git_commit(results) == "abc1234"  # for machines that get the files without their history


def test_forget(archive, checkout, capsys):
    "A record goes, packed or not; its neighbours stay; one that there is not is an error."
    other = dataclasses.replace(RECORD, label="again")
    for record in (RECORD, other):
        archive.save(record, {"ap": np.ones(3, np.uint16)})
    pack(checkout, archive.profile)
    archive.save(RECORD, {})
    assert main(["forget", RECORD.name, "--profile", archive.profile]) == 0
    assert archive.records() == [other] and archive.arrays(other)["ap"].sum() == 3
    assert main(["forget", RECORD.name, "--profile", archive.profile]) == 2
    assert f"a record called {RECORD.name}" in capsys.readouterr().err
    archive.save(RECORD, {})
    archive.path_of(RECORD.name).write_bytes(b"{")  # a damaged one
    assert main(["forget", RECORD.name, "--profile", archive.profile]) == 0
    assert archive.records() == [other]


def test_forgotten_within_one_tick_of_the_clock(archive, checkout, monkeypatch):
    "Linux before 6.13 stamps files 4 ms apart, some file systems seconds."
    others = [dataclasses.replace(RECORD, label=label) for label in ("again", "once more")]
    for record in (RECORD, *others):
        archive.save(record, {})
    table = checkout / pack(checkout, archive.profile)[0]
    stamped = table.stat()
    for record in others:
        os.utime(table, ns=(stamped.st_atime_ns, stamped.st_mtime_ns))
        assert record in archive.records()
        archive.forget(record.name)
        os.utime(table, ns=(stamped.st_atime_ns, stamped.st_mtime_ns))
    assert archive.records() == [RECORD]
