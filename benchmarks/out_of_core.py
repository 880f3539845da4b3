"""Training from features on the disk beside training from features in the device's memory.

    python benchmarks/out_of_core.py [--profile full] [--device cuda] [--dataset fcvid] [--videos 45585]
                                     [--batch 128] [--epochs 4] [--network paper] [--precision bfloat16]
                                     [--folder FOLDER]

Writes one record into the archive of the profile. It needs Linux, which can forget files and count reads.
First it makes a set of random numbers in the papers' layout below FOLDER, where FCVID's training videos take
18.7 GB; it is deleted at the end. Then three copies of a network are trained side by side, epoch by epoch: on
a file that the system has just been told to forget (cold), on the same file, which memory now holds as far
as it fits (warm), and on features that lie in the memory of the device. Losses and weights must be the same,
bit for bit. What really came from the disk is counted by the system.

The first epoch is left out: kernels are compiled in it. Times are medians over the others. Beside the steps
stand their parts, each alone: reading a batch and moving it to the device, its copy to a GPU, and the step on
features in memory. The slowest part bounds the whole. Hash centers are few: a step costs the same.
"""

import argparse
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm

from s5vh_nb.basics.checks import check
from s5vh_nb.basics.config import to_dict
from s5vh_nb.basics.devices import pick_device
from s5vh_nb.basics.files import find_root
from s5vh_nb.basics.profiles import PROFILES, train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.splits import Dataset
from s5vh_nb.datasets.synthetic import synthetic_like
from s5vh_nb.datasets.video_files import OFFICIAL, write_official
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, device_name, git_commit
from s5vh_nb.learning import training
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.learning.resolve import resolve
from s5vh_nb.measure.efficiency import seconds_per_call
from s5vh_nb.ops.streams import copies_beside

OTHERS = 64  # videos of a split that is not trained on


def make_set(folder: Path, name: str, videos: int) -> Dataset:
    "A set with so many training videos, in files; `ValueError` where the disk is too small."
    layout = OFFICIAL[name]
    needed, free = videos * layout.t * layout.d * 4, shutil.disk_usage(folder).free
    expected = f"{needed / 1e9:.1f} GB for the features, and a tenth beside them"
    check(free > 1.1 * needed, f"{folder}", expected, f"{free / 1e9:.1f} GB free")
    sizes = tuple(videos if files is layout.train else OTHERS for files in layout.roles.values())
    write_official(folder, name, synthetic_like(name, sizes))
    return load(name, folder)


def forget(path: Path):
    "Let the system drop the file from memory; its next reads come from the disk."
    with open(path, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def mark() -> np.ndarray:
    "Seconds, and the bytes that this process has caused to be read from the disk."
    return np.array([time.perf_counter(), psutil.Process().io_counters().read_bytes])


def epoch(run, take_step, inputs, data) -> np.ndarray:
    "One epoch of training; what it took."
    begin = mark()
    run.objective.before_epoch(run.model, data, run.epoch)
    run.history.append(training.train_epoch(run, take_step, inputs)["loss"])
    run.epoch += 1
    return mark() - begin


def reading(run, frames) -> np.ndarray:
    "What an epoch takes whose steps do nothing."
    begin = mark()
    training.train_epoch(run, lambda *batch: {}, (frames,))
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return mark() - begin


def three_runs(config, data, device) -> dict:
    "The same network, before its first epoch."
    runs = {name: new_run(config, data, device) for name in ("cold", "warm", "memory")}
    training.fit_objective(runs["cold"], data)
    for run in runs.values():
        run.objective.load_state_dict(runs["cold"].objective.state_dict())
        run.objective.connect(run.model, data)
    return runs


def train_all(runs, data) -> dict:
    "Seconds and bytes from the disk of every epoch, (epochs, 2), of the runs and of reading alone."
    frames, config = data.train.frames, runs["cold"].config
    moved = training.move_if_they_fit((frames,), runs["cold"].device, config.precision)
    check(isinstance(moved[0], torch.Tensor), "--videos", "features that fit into memory", len(frames))
    inputs = {"cold": (frames,), "warm": (frames,), "memory": moved}
    steps = {name: training.make_step(run, True, inputs[name]) for name, run in runs.items()}
    took = {name: [] for name in ("read cold", "read warm", *runs)}
    with training.matmul_precision(config.precision):
        for _ in tqdm(range(config.epochs), desc="epochs"):
            for state in ("cold", "warm"):
                if state == "cold":
                    forget(frames.path)
                took[f"read {state}"].append(reading(runs[state], frames))
            forget(frames.path)
            for name, run in runs.items():
                took[name].append(epoch(run, steps[name], inputs[name], data))
    expected = "losses and weights as from memory, bit for bit"
    for name, run in runs.items():
        same = run.history == runs["memory"].history and torch.equal(run.weights, runs["memory"].weights)
        check(same, name, expected, run.history, AssertionError)
    return {name: np.array(found) for name, found in took.items()}


def copy_ms(batch: tuple, device) -> float:
    "Of a batch to a GPU."
    x = torch.empty(batch, pin_memory=True)
    return 1000 * float(np.median(seconds_per_call(lambda: copies_beside([x], device), device, limit=5)))


def measure(config, data, device) -> RunRecord:
    "Train from the disk and from memory."
    begun = time.perf_counter()
    config, frames = resolve(config, data), data.train.frames
    runs = three_runs(config, data, device)
    took = train_all(runs, data)
    batch = min(config.batch, len(frames))
    size = {"train": len(frames), "t": frames.shape[1], "d": frames.shape[2]}
    batch_bytes, steps = batch * frames.nbytes // len(frames), math.ceil(len(frames) / batch)
    ms = {name: float(1000 * np.median(found[1:, 0]) / steps) for name, found in took.items()}
    shared = {"step": ms["memory"]}
    if device.type == "cuda":
        shared["copy"] = copy_ms((batch, *frames.shape[1:]), device)
    alone = {state: {"reading": ms[f"read {state}"], **shared} for state in ("cold", "warm")}
    metrics = {
        "step_ms": {name: ms[name] for name in runs},
        "alone_ms": alone,
        "bound": {state: max(parts, key=parts.get) for state, parts in alone.items()},
        "read_gb_per_second": {state: batch_bytes / 1e6 / ms[f"read {state}"] for state in alone},
        "share_from_disk": {n: float(v[1:, 1].mean() / frames.nbytes) for n, v in took.items()},
        "losses": runs["memory"].history,
        "host": device_name("cpu"),
        "threads": torch.get_num_threads(),
    }
    return RunRecord(
        config={
            "kind": "out-of-core-benchmark",
            "device": device_name(device),
            "videos": len(frames),
            "run": to_dict(config),
        },
        metrics=metrics,
        data={"name": f"synthetic-like:{data.name}", "stand_in": True, "bytes": frames.nbytes, **size},
        device=device_name(device),
        seconds={"all": time.perf_counter() - begun},
        artefact="benchmarks/out_of_core",
        commit=git_commit(find_root()),
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = "the archive that takes the record: results/<profile>"
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help=where)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="fcvid", choices=list(OFFICIAL), help="whose layout")
    parser.add_argument("--videos", type=int, help="to train on; default: the set's own number")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4, help="at least 2")
    parser.add_argument("--network", default="paper", choices=list(PROFILES), help="of which profile")
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "tf32", "bfloat16"])
    parser.add_argument("--folder", type=Path, help="for the set; default: the system's for temporary files")
    return parser


def main():
    given = parser().parse_args()
    check(given.epochs >= 2, "--epochs", "at least 2, of which the first is left out", given.epochs)
    device, archive = pick_device(given.device), Archive(find_root(), given.profile)
    changes = dict(batch=given.batch, epochs=given.epochs, warmup=0, n_centers=16)
    config = train_config(given.dataset, given.network, precision=given.precision, **changes)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        videos = given.videos or OFFICIAL[given.dataset].train.size
        record = measure(config, make_set(Path(folder), given.dataset, videos), device)
    record = archive.save(record, {})
    print(record.device, *record.metrics.items(), record.seconds, record.name, sep="\n")


if __name__ == "__main__":
    main()
