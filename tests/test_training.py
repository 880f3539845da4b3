"Training: deterministic, exact when killed and resumed, clear when a checkpoint or the data are wrong."
import dataclasses, os, signal, subprocess, sys, time

import numpy as np
import pytest
import torch

from s5vh_nb import datasets, training
from s5vh_nb.config import replace, train_config

CONFIG = train_config("spoken-digits", "smoke", epochs=6)
SCRIPT = """
import sys, numpy as np
from s5vh_nb import datasets, training
from s5vh_nb.config import train_config
data = datasets.load("spoken-digits")
config = train_config("spoken-digits", "smoke", epochs=6)
run = training.train(config, data, device="cpu", checkpoint=sys.argv[1], every=1, resume=True, progress=False)
np.save(sys.argv[2], run.model.encode(data.query.features).numpy())
"""

@pytest.fixture(scope="module")
def data(): return datasets.load("spoken-digits")

def start(folder, name): return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder/f"{name}.pt"), str(folder/f"{name}.npy")])

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Codes of a run that nobody disturbed."
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, "whole").wait() == 0
    return np.load(folder/"whole.npy")

@pytest.mark.parametrize("after, delay", [(0, .05), (1, .0), (1, .11), (2, .07)])
def test_a_killed_run_resumes_to_the_same_codes(whole, tmp_path, after, delay):
    "Killed `delay` seconds after the `after`-th checkpoint was written (0: before the first): inside an epoch, or while writing the next."
    checkpoint, seen, stamp = tmp_path/"killed.pt", 0, None
    process = start(tmp_path, "killed")
    while seen < after and process.poll() is None:
        time.sleep(.002)
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns != stamp: seen, stamp = seen + 1, checkpoint.stat().st_mtime_ns
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert start(tmp_path, "killed").wait() == 0
    assert np.array_equal(np.load(tmp_path/"killed.npy"), whole)

def test_another_seed_gives_other_codes(data):
    changed = [replace(CONFIG, seed=s, epochs=1) for s in (1, 2)]
    codes = [training.train(config, data, device="cpu", progress=False).model.encode(data.query.features) for config in changed]
    assert not torch.equal(*codes)

@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")/"run.pt"
    training.train(replace(CONFIG, epochs=1), data, device="cpu", checkpoint=path, progress=False)
    return path

def resume(path, data, **changes):
    config = replace(CONFIG, epochs=1, **changes)
    return training.train(config, data, device="cpu", checkpoint=path, resume=True, progress=False)

@pytest.mark.parametrize("changes", [{}, dict(watch=5)], ids=["as it was", "other looks"])
def test_a_finished_checkpoint_is_not_trained_again(checkpoint, data, changes):
    "A look changes nothing and is not part of a run's name, so its checkpoint serves with any."
    before = torch.load(checkpoint, weights_only=True)["seconds"]
    assert resume(checkpoint, data, **changes).seconds == before

def test_a_truncated_checkpoint_is_named(checkpoint, data, tmp_path):
    broken = tmp_path/"broken.pt"
    broken.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(ValueError, match="broken.pt: expected a checkpoint of this package, found a damaged"): resume(broken, data)

def test_a_checkpoint_with_code_in_it_is_not_run(data, tmp_path):
    path, proof = tmp_path/"evil.pt", tmp_path/"ran"
    class Evil:
        def __reduce__(self): return (os.system, (f"touch {proof}",))
    torch.save({"schema": 2, "config": Evil()}, path)
    with pytest.raises(ValueError, match="evil.pt"): resume(path, data)
    assert not proof.exists()

def test_a_checkpoint_of_another_configuration_is_refused(checkpoint, data):
    with pytest.raises(ValueError, match="expected a checkpoint of TrainConfig"): resume(checkpoint, data, lr=1e-3)

def test_a_checkpoint_of_other_data_is_refused(checkpoint):
    with pytest.raises(ValueError, match="data with fingerprint"): resume(checkpoint, datasets.load("spoken-pairs"))

def test_a_checkpoint_of_another_schema_is_refused(checkpoint, data, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "schema": 99}, tmp_path/"new.pt")
    with pytest.raises(ValueError, match="schema 2, found schema 99"): resume(tmp_path/"new.pt", data)

@pytest.mark.parametrize("changes, said", [
    (dict(alpha=-1.), "reconstruction, alpha, beta: expected finite weights of at least 0"),
    (dict(alpha=float("nan")), "reconstruction, alpha, beta: expected finite weights of at least 0"),
    (dict(alpha=0., beta=0., reconstruction=0.), "one of them above 0"),
    (dict(lr=-1.), "lr: expected a positive"), (dict(lr_end=float("nan")), "lr_end: expected a positive"),
    (dict(batch=1), "batch"), (dict(epochs=0), "epochs"), (dict(tau_plus=1.), "tau_plus"), (dict(mask_ratio=1.), "mask_ratio"),
    (dict(bits=20), "bits: expected a positive multiple of 8"), (dict(mixer="Mamba3"), "mixer"),
])
def test_a_configuration_that_makes_no_sense_is_refused(data, changes, said):
    with pytest.raises(ValueError, match=said): training.train(replace(CONFIG, **changes), data, device="cpu", progress=False)

def test_a_loss_that_explodes_is_reported(data):
    with pytest.raises(FloatingPointError, match="epoch .*: expected a finite loss"):
        training.train(replace(CONFIG, lr=1e18), data, device="cpu", progress=False)

def test_more_centers_than_videos_is_an_error(data):
    with pytest.raises(ValueError, match="n_centers"): training.train(replace(CONFIG, n_centers=5000), data, device="cpu", progress=False)

def test_a_finished_run_reads_no_features(checkpoint, data, monkeypatch):
    monkeypatch.setattr(training, "place", None)
    assert resume(checkpoint, data).epoch == 1

def test_one_training_item_is_an_error(data):
    one = datasets.Split(data.train.features[:1], data.train.labels[:1], "one video")
    with pytest.raises(ValueError, match="spoken-digits: training items: expected at least 2.* found 1"):
        training.train(CONFIG, dataclasses.replace(data, train=one), device="cpu", progress=False)

def test_a_mask_that_hides_all_frames_is_an_error(data):
    with pytest.raises(ValueError, match="mask_ratio"): training.train(replace(CONFIG, mask_ratio=.01), data, device="cpu", progress=False)

def test_a_write_that_fails_keeps_the_old_checkpoint(checkpoint, data):
    "The file-size limit stands for a full disk."
    before = checkpoint.read_bytes()
    code = f"""
import resource, signal
from s5vh_nb import datasets, training
from s5vh_nb.config import replace, train_config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
config, data = replace(train_config("spoken-digits", "smoke"), epochs=1), datasets.load("spoken-digits")
training.train(config, data, device="cpu", checkpoint={str(checkpoint)!r}, progress=False)
"""
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode != 0 and f"{checkpoint}: expected to write the whole file, found: File too large" in failed.stderr
    assert checkpoint.read_bytes() == before and [f.name for f in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_every_weight_learns_in_bfloat16(data):
    "The refresh sees all frames without gradients, in the same step: its bfloat16 copies of the weights must not be those that learn."
    run = training.start(replace(CONFIG, precision="bfloat16", **data.widths), data, torch.device("cpu"))
    training.prepare(run, data, progress=False)
    x, rows = torch.as_tensor(data.train.features[:8]), torch.arange(8)
    training.step(run, True, x, rows, torch.rand(8, data.t).argsort(1))
    assert [name for name, p in run.model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_a_checkpoint_with_flipped_bytes_is_refused(checkpoint, data, tmp_path):
    "Of the same length, and a zip file still: only its checksums tell."
    raw, broken = bytearray(checkpoint.read_bytes()), tmp_path/"flipped.pt"
    middle = len(raw)//2
    raw[middle:middle + 64] = bytes(b ^ 255 for b in raw[middle:middle + 64])
    broken.write_bytes(raw)
    with pytest.raises(ValueError, match="flipped.pt: expected a checkpoint of this package, found a damaged"): resume(broken, data)


def test_a_checkpoint_without_a_part_is_refused(checkpoint, data, tmp_path):
    state = torch.load(checkpoint, weights_only=True)
    state.pop("optimizer")
    torch.save(state, tmp_path/"part.pt")
    with pytest.raises(ValueError, match="part.pt: expected a checkpoint with"): resume(tmp_path/"part.pt", data)
