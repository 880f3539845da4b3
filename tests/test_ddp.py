"""Processes that train together make the network of one: every step in float64, resumed, refused, failing.

The script for `torchrun` is this file: it trains one case or all, and each process writes what it saw.
"""

import contextlib
import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

from s5vh_nb.basics.config import replace
from s5vh_nb.basics.parallel import average, is_first, joined, n_processes
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.cli.command import main
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.datasets.video_files import write_own
from s5vh_nb.evidence.trained import RECORD
from s5vh_nb.learning import checkpoints, training
from s5vh_nb.learning.checkpoints import new_run, share_run
from s5vh_nb.search.videos import load_network

CPU = torch.device("cpu")
N, T, D = 30, 7, 4
BATCH = 9  # two processes have 4 and 5 items, three have 3 each
NETWORK = dict(bits=8, m=8, depth=2, batch=BATCH, epochs=3, evaluate_every=1)
S5VH_SIZES = dict(NETWORK, decoder_m=8, decoder_depth=2)
S5VH = dict(S5VH_SIZES, n_centers=4, pca=3, warmup=1, beta=1.0)
PAIRS = dict(bits=8, width=8, image_hidden=12, text_hidden=12, batch=BATCH, epochs=3, evaluate_every=1)
RIVALS, CLUSTERED = "s5vh_nb.learning.video_rivals", "s5vh_nb.learning.clustered_videos"
RAGGED = np.random.default_rng(2).integers(3, T + 1, N)


def data_set(name, inputs, labels, lengths=None):
    "Random numbers: N items to train on, and nine queries."
    both = (slice(N), slice(N, None))
    lengths = None if lengths is None else np.append(lengths, [T] * 9)
    whole = Split(inputs, labels, "toy", lengths=lengths)
    train, query = (dataclasses.replace(whole.take(rows), source=f"{rows}") for rows in both)
    return Dataset(name, train, train, query, ("a", "b", "c"), "random numbers")


def videos(lengths=None):
    x = np.random.default_rng(0).normal(size=(N + 9, T, D)).astype("float32")
    return data_set("spoken-digits", {"frames": x}, np.arange(N + 9) % 3, lengths)


def pairs():
    rng = np.random.default_rng(1)
    image, text = (rng.normal(size=(N + 9, width)).astype("float32") for width in (6, 5))
    return data_set("emoji", {"image": image, "text": text}, np.eye(3, dtype=np.uint8)[np.arange(N + 9) % 3])


CASES = {  # what is trained -> data, profile, variant, changes
    "S5VH": (videos, "quick", "paper", S5VH),
    "S5VH as released": (videos, "quick", "released", S5VH),
    "S5VH, some labels": (videos, "quick", "paper", dict(S5VH, labelled=0.4)),
    "S5VH, ragged": (functools.partial(videos, RAGGED), "quick", "released", S5VH),
    "Plus": (videos, "quick", "plus", dict(NETWORK, time_steps=T, dropout=0.3)),
    "Plus, ragged": (functools.partial(videos, RAGGED), "quick", "plus", dict(NETWORK, time_steps=5)),
    "ConMH": (videos, "quick", f"{RIVALS}:CONMH", dict(S5VH_SIZES, heads=3, decoder_heads=3)),
    "SSTH": (videos, "quick", f"{RIVALS}:SSTH", dict(bits=8, batch=BATCH, epochs=3, evaluate_every=1)),
    "AutoSSVH": (
        videos,
        "smoke",
        f"{CLUSTERED}:AUTOSSVH",
        dict(bits=8, batch=BATCH, epochs=3, evaluate_every=1, clusters=(3, 4)),
    ),
    "WSCH": (
        videos,
        "smoke",
        f"{CLUSTERED}:WSCH",
        dict(bits=8, batch=BATCH, epochs=3, evaluate_every=1, warmup=1),
    ),
    "Plus, pairs": (pairs, "quick", "plus", dict(PAIRS, dropout=0.3)),
    "DMMH": (pairs, "quick", "paper", dict(PAIRS, layers=1, cnn_width=4, dropout=0.3, alignment=0.5)),
    "BSTH": (pairs, "quick", "bsth", dict(PAIRS, dropout=0.0)),  # with dropout one process trains
    "ACMVH": (pairs, "quick", "acmvh", dict(PAIRS, dropout=0.3)),
    "FMMVH": (pairs, "quick", "fmmvh", dict(PAIRS, image_hidden=0, text_hidden=0)),
    "DMMVH": (pairs, "quick", "dmmvh", PAIRS),
}


def case(name):
    "Its configuration and data."
    make, profile, variant, changes = CASES[name]
    data = make()
    return train_config(data.name, profile, variant, **changes), data


@contextlib.contextmanager
def in_float64():
    "Networks, features and draws are float64."

    def double(inputs, *_):
        return tuple(torch.as_tensor(x).double() for x in inputs)

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(training, "move_if_they_fit", double):
            yield
    finally:
        torch.set_default_dtype(before)


def train(name, watch=lambda run, terms: None, **options):
    "A training in float64; `watch` is called after each step."
    make_step = training.make_step

    def make_watched(run, *args):
        take_step = make_step(run, *args)

        def step(*batch):
            terms = take_step(*batch)
            watch(run, terms)
            return terms

        return step

    with in_float64(), mock.patch.object(training, "make_step", make_watched):
        return training.train(*case(name), device="cpu", progress=False, **options)


def steps_of(name):
    "After each step: loss terms, gradient, weights, and what network and objective keep; and the history."
    steps = []

    def watch(run, terms):
        kept = {**run.model.state_dict(), **run.objective.state_dict(), "gradient": run.weights.grad}
        terms = {name: average(value.clone()) for name, value in terms.items()}
        steps.append({name: value.clone() for name, value in (kept | terms).items()})

    def evaluate(run):
        codes = run.model.encode(*case(name)[1].query.arrays)
        return {"first": float(is_first()), "ones": float(np.unpackbits(codes).mean())}

    return steps, train(name, watch, evaluate=evaluate).history


def stop_after(epochs, run, terms):
    "One of the processes stops in the epoch behind these."
    if run.epoch == epochs and (n_processes() == 1 or not is_first()):
        raise RuntimeError("this process has had enough")


def stopped(path):
    "Train for one epoch into the checkpoint `path`."
    train("S5VH", functools.partial(stop_after, 1), checkpoint=path, every=1)


def resumed(path):
    "What is left of the training."
    return train("S5VH", checkpoint=path, resume=True)


def work(what, folder):
    "What each process does."
    with joined("cpu"):
        if what == "stop":
            stopped(folder / "run.pt")
        number = 0 if is_first() else 1
        saw = {name: steps_of(name) for name in CASES}
        torch.save(saw | {"resumed": resumed(folder / "run.pt").weights}, folder / f"{number}.pt")


def torchrun(processes, *words):
    "The finished call."
    words = ["--standalone", "--nproc-per-node", str(processes), *map(str, words)]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What both processes saw; they also continue a training that one process began."
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(RuntimeError, match="had enough"):
        stopped(folder / "run.pt")
    done = torchrun(2, __file__, "all", folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{number}.pt") for number in (0, 1)]


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_that_of_one_process(two, name):
    """Loss terms, every gradient, weights, moving labels and statistics; both processes agree bit for bit.

    The first process alone evaluates, in evaluation mode, and tells the other.
    """
    alone, history = steps_of(name)
    assert len(alone) == 12
    for expected, *found in zip(alone, *(saw[name][0] for saw in two), strict=True):
        assert expected.keys() == found[0].keys() and expected["gradient"].abs().max() > 1e-3
        for part, value in expected.items():
            assert torch.equal(found[0][part], found[1][part]), part
            torch.testing.assert_close(found[0][part], value, rtol=0, atol=1e-10, msg=part)
    for saw in two:
        assert saw[name][1] == history and history[-1]["first"] == 1


def test_the_labels_moved(two):
    "After the warm-up, in S5VH's second phase."
    labels = [step["soft_labels"] for step in two[0]["S5VH"][0]]
    assert torch.equal(labels[0], labels[3]) and not torch.equal(labels[3], labels[4])


def test_a_process_that_fails_ends_all_and_one_continues(two, tmp_path):
    "Its message is shown. Of the first epoch nothing is lost, as if it were continued by two."
    done = torchrun(2, __file__, "stop", tmp_path)
    assert done.returncode != 0 and "this process has had enough" in done.stderr
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1
    whole = train("S5VH")
    for weights in (resumed(tmp_path / "run.pt").weights, two[0]["resumed"], two[1]["resumed"]):
        torch.testing.assert_close(weights, whole.weights, rtol=0, atol=1e-10)


def test_other_data_or_settings_in_a_process_are_refused():
    "The first process sends its run, which must be that of the others."
    config, data = case("S5VH")
    config = training.resolve(config, data)
    first = new_run(config, data, CPU)
    sent = checkpoints._as_bytes(first)
    others = {
        "sent: expected a checkpoint of a run with seed 2, found seed 1": (replace(config, seed=2), data),
        "sent: expected data with fingerprint .*, as in another process": (config, videos(RAGGED)),
    }
    for message, other in others.items():
        with mock.patch.multiple(checkpoints, n_processes=lambda: 2, from_first=lambda call: sent):
            with pytest.raises(ValueError, match=message):
                share_run(new_run(*other, CPU))


def test_more_processes_than_items_are_refused():
    config, _ = case("S5VH")
    with mock.patch("s5vh_nb.basics.parallel.n_processes", lambda: 10):
        with pytest.raises(
            ValueError, match="batch: expected an item or more for each of the 10 processes, found 9"
        ):
            training.train(config, videos(), device="cpu", progress=False)


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
def test_the_command_gives_the_same_codes(tmp_path, monkeypatch, device):
    "Under torchrun as alone; only the first process prints, and the record tells how many there were."
    data = load("spoken-digits")
    train, query = data.train.take(slice(None, None, 10)), data.query.take(slice(None, None, 10))
    own = dataclasses.replace(data, train=train, database=train, query=query, train_ids=None)
    parts = zip(("train", "query"), (train, query))
    rows = [(f"{part}{i}", y, part, 1.0, "") for part, split in parts for i, y in enumerate(split.labels)]
    manifest = pd.DataFrame(rows, columns=["path", "label", "split", "seconds", "damage"])
    write_own(tmp_path / "features", own, manifest)
    command = f"train features {{}} --epochs 2 --device {device}"
    monkeypatch.chdir(tmp_path)
    assert main(command.format("alone").split()) == 0
    script = Path(sys.prefix, "bin", "s5vh-nb")
    done = torchrun(2, "--no-python", script, *command.format("together").split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"together: Plus, 64 bits, {len(train)} videos, GmAP 0.") == 1
    codes = [load_network(tmp_path / name, "cpu").encode(query.frames) for name in ("alone", "together")]
    assert (codes[0] != codes[1]).sum() <= (0 if device == "cpu" else 0.01 * codes[0].numel())
    record = json.loads((tmp_path / "together" / RECORD).read_text(encoding="utf-8"))
    assert re.match("2 processes on [12] x ", record["device"])


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
