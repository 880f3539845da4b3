"Training: deterministic, exact when killed and resumed, clear when a checkpoint or the data are wrong."

import dataclasses
import functools
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from s5vh_nb.basics import devices
from s5vh_nb.basics.config import replace, to_dict
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets import splits
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.pair_files import write_official_pairs
from s5vh_nb.datasets.rows import HDF5Rows
from s5vh_nb.datasets.synthetic import synthetic_like, synthetic_pairs
from s5vh_nb.datasets.video_files import write_official
from s5vh_nb.learning import objectives, training
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.learning.training import fit_objective, is_evaluation_epoch
from s5vh_nb.models.dmmh import DMMH
from s5vh_nb.models.s5vh import S5VH

CONFIG = train_config("spoken-digits", "smoke", epochs=6, depth=2)  # some layers are dropped
IMPORTS = """
import sys
import numpy as np
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.learning.training import train
data = load("spoken-digits")
"""
SCRIPT = f"""{IMPORTS}
config = train_config("spoken-digits", "smoke", epochs=6, depth=2)
run = train(config, data, device="cpu", checkpoint=sys.argv[1], every=1, resume=True, progress=False)
np.save(sys.argv[2], run.model.encode(data.query.frames).numpy())
"""


@pytest.fixture(scope="module")
def data():
    return load("spoken-digits")


def train(config, data, **options):
    return training.train(config, data, device="cpu", progress=False, **options)


def begin(folder, name):
    "A process that trains, saves each epoch, and writes the codes."
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder / f"{name}.pt"), str(folder / f"{name}.npy")]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Codes of a run that nobody disturbed."
    folder = tmp_path_factory.mktemp("whole")
    assert begin(folder, "whole").wait() == 0
    return np.load(folder / "whole.npy")


@pytest.mark.parametrize("after, delay", [(0, 0.05), (1, 0.0), (1, 0.11), (2, 0.07)])
def test_a_killed_run_resumes_to_the_same_codes(whole, tmp_path, after, delay):
    """Killed `delay` seconds after the `after`-th checkpoint was written (0: before the first).

    This is inside an epoch, or while the next checkpoint is written.
    """
    checkpoint, written, last = tmp_path / "killed.pt", 0, None
    process = begin(tmp_path, "killed")
    while written < after and process.poll() is None:
        time.sleep(0.002)
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns != last:
            written, last = written + 1, checkpoint.stat().st_mtime_ns
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert begin(tmp_path, "killed").wait() == 0
    assert np.array_equal(np.load(tmp_path / "killed.npy"), whole)


def test_another_seed_gives_other_codes(data):
    runs = [train(replace(CONFIG, seed=seed, epochs=1), data) for seed in (1, 2)]
    assert not torch.equal(*(run.model.encode(data.query.frames) for run in runs))


def test_evaluations_change_nothing(data):
    "They run in evaluation mode and without gradients, and draw random numbers of their own."
    modes = []

    def evaluate(run):
        modes.append((run.model.training, torch.is_grad_enabled(), run.epoch))
        return {"score": torch.rand(()).item()}

    config = replace(CONFIG, evaluate_every=4)
    evaluated, plain = train(config, data, evaluate=evaluate), train(CONFIG, data)
    assert modes == [(False, False, epoch) for epoch in (1, 2, 4, 6)]
    assert [epoch for epoch in range(1, 7) if is_evaluation_epoch(config, epoch)] == [1, 2, 4, 6]
    codes = [run.model.encode(data.query.frames) for run in (evaluated, plain)]
    assert torch.equal(*codes) and torch.equal(evaluated.weights, plain.weights)
    assert [h["epoch"] for h in evaluated.history if "score" in h] == [0, 1, 3, 5]


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.pt"
    train(replace(CONFIG, epochs=1), data, checkpoint=path)
    return path


def resume(path, data, **changes):
    return train(replace(CONFIG, **{"epochs": 1, **changes}), data, checkpoint=path, resume=True)


@pytest.mark.parametrize("changes", [{}, dict(evaluate_every=5)], ids=["as it was", "other evaluations"])
def test_a_finished_checkpoint_is_not_trained_again(checkpoint, data, changes):
    "Evaluations are no part of a run's name, so its checkpoint serves with any."
    before = torch.load(checkpoint, weights_only=True)["seconds"]
    assert resume(checkpoint, data, **changes).seconds == before


def test_a_truncated_checkpoint_is_named(checkpoint, data, tmp_path):
    broken = tmp_path / "broken.pt"
    broken.write_bytes(checkpoint.read_bytes()[:2000])
    message = "broken.pt: expected a checkpoint of this package, found a damaged"
    with pytest.raises(ValueError, match=message):
        resume(broken, data)


def test_a_checkpoint_with_code_in_it_is_not_run(data, tmp_path):
    path, proof = tmp_path / "evil.pt", tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {proof}",))

    torch.save({"schema": 3, "config": Evil()}, path)
    with pytest.raises(ValueError, match="evil.pt"):
        resume(path, data)
    assert not proof.exists()


def test_a_checkpoint_of_another_configuration_is_refused(checkpoint, data):
    "Only the fields that differ are named, those of the parts, too."
    with pytest.raises(ValueError, match="a run with lr 0.001, beta 0.5, found lr 0.0005, beta 0.1$"):
        resume(checkpoint, data, lr=1e-3, beta=0.5)


def test_a_checkpoint_of_other_data_is_refused(checkpoint, data):
    with pytest.raises(ValueError, match="data with fingerprint"):
        resume(checkpoint, dataclasses.replace(data, query=data.query.take(slice(100))))


@pytest.mark.parametrize("schema", [2, 99])
def test_a_checkpoint_of_another_schema_is_refused(checkpoint, data, tmp_path, schema):
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "schema": schema}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match=f"schema 3, found schema {schema}"):
        resume(tmp_path / "new.pt", data)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(alpha=-1.0), "reconstruction, alpha, beta: expected finite weights of at least 0"),
        (dict(alpha=float("nan")), "reconstruction, alpha, beta: expected finite weights of at least 0"),
        (dict(alpha=0.0, beta=0.0, reconstruction=0.0), "one of them above 0"),
        (dict(lr=-1.0), "lr: expected a positive"),
        (dict(lr_end=float("nan")), "lr_end: expected a positive"),
        (dict(batch=1), "batch"),
        (dict(epochs=0), "epochs"),
        (dict(tau_plus=1.0), "tau_plus"),
        (dict(mask_ratio=1.0), "mask_ratio"),
        (dict(bits=0), "bits: expected a positive whole number"),
        (dict(mixer="Mamba3"), "mixer"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(data, changes, message):
    with pytest.raises(ValueError, match=message):
        train(replace(CONFIG, **changes), data)


def test_a_loss_that_explodes_is_reported(data):
    with pytest.raises(FloatingPointError, match="epoch .*: expected a finite loss"):
        train(replace(CONFIG, lr=1e18), data)


def test_more_centers_than_videos_is_an_error(data):
    with pytest.raises(ValueError, match="n_centers"):
        train(replace(CONFIG, n_centers=5000), data)


def test_a_finished_run_reads_no_features(checkpoint, data, monkeypatch):
    monkeypatch.setattr(training, "move_if_they_fit", None)
    assert resume(checkpoint, data).epoch == 1


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A small UCF101 and a small MIR-Flickr25K in files that are read when indexed."
    folder = tmp_path_factory.mktemp("files")
    write_official(folder, "ucf101", synthetic_like("ucf101", n=(300, 300, 16), d=8))
    write_official_pairs(folder, "mirflickr25k", synthetic_pairs("mirflickr25k"), "7.3")
    return folder


@pytest.mark.filterwarnings("ignore:.*not the sizes of:UserWarning")
@pytest.mark.parametrize(
    "name, changes",
    [("ucf101", {}), ("ucf101", dict(share=0.5)), ("mirflickr25k", {})],
    ids=["videos", "half of them", "pairs"],
)
def test_features_larger_than_memory_are_read_in_batches(files, name, changes, monkeypatch):
    "They are never read whole, and the network is the same, bit for bit."
    monkeypatch.setattr(splits, "_CONTENT_LIMIT", 1000)  # a fingerprint of few rows
    lazy = dataclasses.replace(load(name, files))
    config = train_config(name, "smoke", epochs=2, batch=16, **changes)
    read, filled = [], []
    fitting = train(config, lazy)
    monkeypatch.setattr(training, "free_memory", lambda device: 10_000)
    monkeypatch.setattr(training, "to_tensor", None)
    part, read_into = HDF5Rows.part, HDF5Rows.read_into
    monkeypatch.setattr(HDF5Rows, "part", lambda self, *at: read.append(part(self, *at)) or read[-1])
    monkeypatch.setattr(HDF5Rows, "read_into", lambda *to: read_into(*to) or filled.append(to[-1]))
    monkeypatch.setattr(objectives, "time_means", functools.partial(objectives.time_means, block=16))
    read_in_batches = train(config, lazy)
    assert torch.equal(read_in_batches.weights, fitting.weights)
    assert read_in_batches.history == fitting.history
    assert all(0 < max(len(x) for x in found) <= 16 for found in (read, filled))


def test_a_limit_on_memory_is_seen():
    "That of the process, which is below what the machine has left."
    code = """
import psutil, resource, torch
from s5vh_nb.basics.devices import free_memory
cpu = torch.device("cpu")
before, used = free_memory(cpu), psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
assert 0 < free_memory(cpu) <= min(before, 2**30), (before, free_memory(cpu))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not psutil.LINUX, reason="containers of Linux")
@pytest.mark.parametrize("allowed, seen", [("max", False), ("{}", True), ("1", True)])
def test_the_limit_of_a_container_is_seen(tmp_path, monkeypatch, allowed, seen):
    cpu, file = torch.device("cpu"), tmp_path / "memory.max"
    file.write_text(allowed.format(psutil.Process().memory_info().rss + 2**28) + "\n", encoding="utf-8")
    monkeypatch.setattr(devices, "_CONTAINER", (str(tmp_path / "missing"), str(file)))
    assert (0 <= devices.free_memory(cpu) <= 2**28) == seen


def test_one_training_item_is_an_error(data):
    one = dataclasses.replace(data, train=data.train.take(slice(1)), train_ids=None)
    with pytest.raises(ValueError, match="spoken-digits: training items: expected at least 2.* found 1"):
        train(CONFIG, one)


def test_a_checkpoint_in_the_home_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(replace(CONFIG, epochs=1), data, checkpoint="~/kept/run.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    before = (tmp_path / "kept" / "run.pt").stat().st_mtime_ns
    assert resume("~/kept/run.pt", data).epoch == 1
    assert (tmp_path / "kept" / "run.pt").stat().st_mtime_ns == before  # it was found
    S5VH(CONFIG.model).save_pretrained("~/kept/net")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "kept/net").iterdir()}
    assert S5VH.from_pretrained("~/kept/net").config == CONFIG.model
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_configuration_as_a_dictionary():
    said = r"config: expected {}, found dict \(`from_dict` makes a configuration of what `to_dict` gave\)"
    with pytest.raises(TypeError, match=said.format("S5VHConfig")):
        S5VH(to_dict(CONFIG.model))
    with pytest.raises(TypeError, match=said.format("DMMHConfig")):
        DMMH(dict(bits=16))
    with pytest.raises(TypeError, match="config: expected S5VHConfig, found TrainConfig"):
        S5VH(CONFIG)


def test_a_mask_that_hides_no_frame_is_an_error(data, monkeypatch):
    "Before the centers are made."
    monkeypatch.setattr(training, "fit_objective", None)
    with pytest.raises(ValueError, match="mask_ratio: expected one that hides and shows at least one of"):
        train(replace(CONFIG, mask_ratio=0.01), data)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            train_config("emoji", "smoke"),
            "data: expected pairs, for DMMHConfig, found 'spoken-digits', a set",
        ),
        (train_config("spoken-pairs", "smoke"), "dataset: expected 'spoken-digits', the data given, found"),
    ],
)
def test_a_configuration_of_something_else_is_refused(data, config, message):
    with pytest.raises(ValueError, match=message):
        train(config, data)


def test_a_misspelt_data_set_is_named():
    with pytest.raises(ValueError, match="found 'spoken-digts' .did you mean 'spoken-digits'"):
        train(train_config("spoken-digts", "smoke"), None)


@pytest.mark.parametrize(
    "name, message",
    [
        ("notes/run.pt", "run.pt: expected a folder that can be written to"),
        ("long" * 80, "found: File name too long"),
        ("", "expected the name of a file, found a folder"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_found_at_the_start(
    data, tmp_path, monkeypatch, name, message
):
    monkeypatch.setattr(training, "fit_objective", None)  # nothing has begun
    (tmp_path / "notes").touch()
    with pytest.raises((OSError, ValueError), match=message):
        train(CONFIG, data, checkpoint=tmp_path / name)


def test_an_evaluation_may_return_nothing(data):
    "It has looked, or written a picture; training goes on."
    seen = []
    config = replace(CONFIG, epochs=2, evaluate_every=1)
    run = train(config, data, evaluate=lambda run: seen.append(run.epoch))
    assert seen == [1, 2] and run.epoch == 2
    with pytest.raises(TypeError, match="result of evaluate: expected a dict of scores, or nothing, found f"):
        train(config, data, evaluate=lambda run: 0.5)


def test_a_finished_run_goes_on_for_more_epochs(checkpoint, data, tmp_path):
    before, path = torch.load(checkpoint, weights_only=True), tmp_path / "run.pt"
    shutil.copy(checkpoint, path)
    run = resume(path, data, epochs=3)
    assert [h["epoch"] for h in run.history] == [0, 1, 2] and run.history[:1] == before["history"]
    with pytest.raises(ValueError, match="with epochs 1, found epochs 3"):
        resume(path, data)


def test_a_network_is_trained_further(data):
    "Only its weights are taken; they are those that learn, and the network itself stays as it is."
    first = train(replace(CONFIG, epochs=1), data).model
    before = {name: value.clone() for name, value in first.state_dict().items()}
    config = replace(CONFIG, epochs=1, seed=2, lr=1e-12, lr_end=1e-12, weight_decay=0.0)
    tuned = train(config, data, start=first)
    for name, value in tuned.model.state_dict().items():
        torch.testing.assert_close(value, before[name])
        assert torch.equal(first.state_dict()[name], before[name])


def test_a_run_is_shown_in_one_line(data):
    run = train(replace(CONFIG, epochs=1), data)
    assert repr(run).startswith("S5VH, 64 bits, spoken-digits, seed 1: 1 of 1 epochs, loss ")
    assert len(repr(run).splitlines()) == 1


def test_a_write_that_fails_keeps_the_old_checkpoint(checkpoint, data):
    "The file-size limit stands for a full disk."
    before = checkpoint.read_bytes()
    code = f"""{IMPORTS}
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
config = train_config("spoken-digits", "smoke", epochs=1)
train(config, data, device="cpu", checkpoint={str(checkpoint)!r}, progress=False)
"""
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    message = f"{checkpoint}: expected to write the whole file, found: File too large"
    assert failed.returncode != 0 and message in failed.stderr
    assert checkpoint.read_bytes() == before
    assert [f.name for f in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_every_weight_learns_in_bfloat16(data):
    """The refresh runs the network on all frames without gradients, in the same step.

    Its bfloat16 copies of the weights must not be those that learn.
    """
    config = replace(CONFIG, precision="bfloat16", **data.widths)
    run = new_run(config, data, torch.device("cpu"))
    fit_objective(run, data, progress=False)
    x, rows = torch.as_tensor(data.train.frames[:8]), torch.arange(8)
    training.step(run, True, x, rows, torch.rand(x.shape[:2]).argsort(1))
    still = [name for name, p in run.model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_a_checkpoint_with_flipped_bytes_is_refused(checkpoint, data, tmp_path):
    "Of the same length, and a zip file still: only its checksums tell."
    raw, broken = bytearray(checkpoint.read_bytes()), tmp_path / "flipped.pt"
    middle = len(raw) // 2
    raw[middle : middle + 64] = bytes(b ^ 255 for b in raw[middle : middle + 64])
    broken.write_bytes(raw)
    message = "flipped.pt: expected a checkpoint of this package, found a damaged"
    with pytest.raises(ValueError, match=message):
        resume(broken, data)


def test_a_checkpoint_without_a_part_is_refused(checkpoint, data, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state.pop("optimizer")
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="part.pt: expected a checkpoint with"):
        resume(tmp_path / "part.pt", data)
