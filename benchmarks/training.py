"""Time of training, encoding and scoring at a paper set's size, on random features, which cost the same.

    python benchmarks/training.py [--profile full] [--device cuda] [--dataset ucf101] [--epochs 350]
                                  [--precision tf32 bfloat16] [--videos 9537]

Writes one record per precision into the archive of the profile.
A step's time is that of the median epoch of its phase divided by its steps.
Let it run alone: trainings beside it slow down what the CPU does, set-up above all.
The whole run goes from features in memory to the packed codes of database and queries, hash centers included.
A short training in another process goes before it, and its time is recorded apart: it compiles the kernels,
which later trainings on the same machine find on the disk.
On a GPU, what stochastic depth costs is timed too, in short trainings with and without it that take turns.

Beside every time is its floor, the greater of two: counted operations over the rate of a large matrix product
of that precision, and bytes that must move over the bandwidth of a large copy, both rates measured in the
same run. Bytes that must move: of a step, a batch's features once, the weights and Adam's moments in and out;
of encoding, the features once; of scoring, codes and labels once. All else could stay on the chip. The
floor of the whole run is that of its steps and of encoding; set-up counts nothing.
"""

import argparse
import copy
import dataclasses
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import torch

from s5vh_nb.basics.config import replace, to_dict
from s5vh_nb.basics.devices import pick_device
from s5vh_nb.basics.files import find_root
from s5vh_nb.basics.profiles import DATASETS, PROFILES, train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.rows import to_tensor
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, device_name, git_commit
from s5vh_nb.evidence.scoring import score
from s5vh_nb.learning.training import matmul_precision, move_if_they_fit, step, train
from s5vh_nb.measure.efficiency import (
    ceilings,
    floor,
    linear_in_batch,
    operations,
    peak_bytes,
    seconds_per_call,
)

ENCODED = (25, 128), (1000, 128), (25, 16384)  # frames, videos; the last on a GPU only
SIGNS = "float16"  # of the products that give distances, on a GPU


def in_memory(data: Dataset, device, videos: int | None) -> Dataset:
    "The same data set with its features as arrays, made on the device; at most so many videos per split."

    def moved(split):
        part = split if videos is None else split.take(slice(videos))
        return dataclasses.replace(part, inputs={"frames": to_tensor(part.frames, device).cpu().numpy()})

    made = {id(split): moved(split) for split in data.splits.values()}
    splits = {role: made[id(split)] for role, split in data.splits.items()}
    return dataclasses.replace(data, **splits, train_ids=None)


def clocked(call, device):
    "What `call` returns, and the seconds it took."
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - begun


def beside_floor(ms: float, work: tuple, limits: dict, precision: str | None) -> dict:
    "A measured time and the least it could be; `work` is a pair of operations and bytes."
    counted, moved = work
    least = 1000 * float(floor(counted, moved, limits, precision))
    return {"ms": ms, "floor_ms": least, "operations": counted, "bytes": moved}


def work_of_step(run, data, past_warmup) -> tuple:
    "Operations and bytes of one training step."
    rows = torch.arange(min(run.config.batch, len(data.train)), device=run.device)
    (x,) = move_if_they_fit((data.train.frames[: len(rows)],), run.device, run.config.precision)
    order = torch.rand(x.shape[:2], device=run.device).argsort(-1)
    counted = operations(lambda: step(run, past_warmup, x, rows, order), run.model)
    return counted, x.nbytes + 6 * run.weights.nbytes


def work_of_encoding(model, device, n, frames, itemsize=4) -> tuple:
    "Operations and bytes of encoding `n` videos, whose features take so many bytes each."

    def counted(b):
        x = torch.randn(b, frames, model.config.d, device=device)
        return operations(lambda: model(x), model)

    with torch.no_grad():
        return linear_in_batch(counted, n), itemsize * n * frames * model.config.d


def encoding(model, precision, device, limits) -> dict:
    """Times of encoding videos on the device, videos per second and peak memory beyond the features.

    Where products are bfloat16, features are float32, and then bfloat16, as training keeps them on a GPU.
    """
    found, dtypes = {}, [torch.float32, torch.bfloat16][: 1 + (precision == "bfloat16")]
    sizes = ENCODED if device.type == "cuda" else ENCODED[:-1]
    for (frames, n), dtype in itertools.product(sizes, dtypes):
        x = torch.randn(n, frames, model.config.d, device=device).to(dtype)
        fresh = copy.deepcopy(model)  # without graphs, whose memory would not be counted

        def call():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                fresh.encode(x)

        with matmul_precision(precision):
            peak = peak_bytes(call, device)
            seconds = float(np.median(seconds_per_call(call, device, 10**5, 10**5, limit=2)))
        work = work_of_encoding(model, device, n, frames, x.itemsize)
        speed = {"videos_per_second": n / seconds, "peak_mb": peak / 1e6}
        size = f"t={frames}, n={n}, {str(dtype).removeprefix('torch.')} features"
        found[size] = {**beside_floor(1000 * seconds, work, limits, precision), **speed}
    return found


def scoring(device, limits, n: int = 45600, bits: int = 64) -> dict:
    "Time of scoring FCVID's size: six cuts, three orders of ties; the floor takes distances as products."
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 256, (n, bits // 8), dtype=np.uint8), rng.integers(0, 239, n)
    split = Split({"frames": np.zeros((n, 1, 1), np.float32)}, labels, "random labels")
    classes = tuple(str(i) for i in range(239))
    data = Dataset("random-codes", split, split, split, classes, "random codes and labels")

    def call():
        return score({"query": codes, "database": codes}, data, device)

    call()
    seconds, products = clocked(call, device)[1], SIGNS if device.type == "cuda" else None
    work = 2 * bits * n**2, 2 * (codes.nbytes + labels.nbytes)
    return beside_floor(1000 * seconds, work, limits, products)


def warm_up(config, data, device) -> float:
    "Seconds of a short training on a part of the data and of a few codes."

    def short():
        shorter = replace(config, epochs=2, warmup=1, share=0.05, n_centers=8)
        run = train(shorter, data, device=str(device), progress=False)
        run.model.encode(np.zeros((64, 25, config.model.d), np.float32))

    return clocked(short, device)[1]


def apart(function, *arguments):
    "The result of a call in a process of its own."
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def steps_per_epoch(config, data) -> int:
    return -(-len(data.train) // config.batch)


def phases(run, data) -> dict:
    "Milliseconds of a step before and after the warm-up."
    epochs, warmup = np.array(run.seconds[1:]), run.config.objective.warmup
    parts = {"warm-up": epochs[1:warmup], "main": epochs[warmup + 1 :]}
    steps = steps_per_epoch(run.config, data)
    return {name: float(1000 * np.median(part) / steps) for name, part in parts.items() if len(part)}


def depth_cost(config, data, device, epochs: int = 24) -> dict:
    "A step's time with stochastic depth and without: two trainings of each, which take turns."
    depths = {"with_ms": config.model.drop_path, "without_ms": 0.0}
    short, found = replace(config, epochs=epochs, warmup=epochs // 2, n_centers=8), {}
    for name in ("with_ms", "without_ms", "without_ms", "with_ms"):
        run = train(replace(short, drop_path=depths[name]), data, device=str(device), progress=False)
        for phase, ms in phases(run, data).items():
            found.setdefault(phase, {}).setdefault(name, []).append(ms)
    return {phase: t | {"ratio": sum(t["with_ms"]) / sum(t["without_ms"])} for phase, t in found.items()}


def measure(config, data, device, videos) -> RunRecord:
    "Train, encode and score once."
    first = apart(warm_up, config, None if videos is None else data, device)
    run, train_seconds = clocked(lambda: train(config, data, device=str(device)), device)
    searched = data.database, data.query
    encode = [lambda split=split: run.model.encode(split.frames, batch=4096) for split in searched]
    _, code_seconds = clocked(lambda: [call() for call in encode], device)
    precision, warmup = config.precision, config.objective.warmup
    limits = ceilings(device, precision, *([SIGNS] if device.type == "cuda" else []))
    work = {"warm-up": work_of_step(run, data, False), "main": work_of_step(run, data, True)}
    steps, t = steps_per_epoch(config, data), data.train.frames.shape[1]
    whole = [
        (steps * warmup, work["warm-up"]),
        (steps * (config.epochs - warmup), work["main"]),
        (1, work_of_encoding(run.model, device, sum(map(len, searched)), t)),
    ]
    total = tuple(sum(times * part[i] for times, part in whole) for i in (0, 1))
    metrics = {
        "host": device_name("cpu"),
        "ceilings": limits,
        "step": {
            phase: beside_floor(ms, work[phase], limits, precision) for phase, ms in phases(run, data).items()
        },
        "features to codes": beside_floor(1000 * (train_seconds + code_seconds), total, limits, precision),
        "encode": encoding(run.model, precision, device, limits),
        "score 45600 x 45600": scoring(device, limits),
        "last_loss": run.history[-1]["loss"],
    }
    if device.type == "cuda":
        metrics["stochastic depth"] = depth_cost(config, data, device)
    seconds = {
        "a short training before, in its own process": first,
        "set-up": run.seconds[0],
        "epochs": float(sum(run.seconds[1:])),
        "codes": code_seconds,
    }
    size = {"train": len(data.train), "t": t, "d": data.widths["d"]}
    fewer = {} if videos is None else {"videos": videos}
    return RunRecord(
        config={
            "kind": "training-benchmark",
            "device": device_name(device),
            "run": to_dict(run.config),
            **fewer,
        },
        metrics=metrics,
        data={"name": data.name, "stand_in": True, "fingerprint": data.fingerprint, **size},
        device=device_name(device),
        seconds=seconds,
        artefact="benchmarks/training",
        commit=git_commit(find_root()),
    )


def table(metrics) -> pd.DataFrame:
    "Every time with its floor."
    rows = {f"step, {phase}": found for phase, found in metrics["step"].items()}
    rows |= {f"encode, {size}": found for size, found in metrics["encode"].items()}
    rows |= {what: metrics[what] for what in ("features to codes", "score 45600 x 45600")}
    shown = pd.DataFrame(rows).T
    return shown.assign(times=shown.ms / shown.floor_ms)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = "the archive that takes the records: results/<profile>"
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help=where)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="ucf101", choices=list(DATASETS), help="whose shape")
    kinds = ["float32", "tf32", "bfloat16"]
    parser.add_argument("--precision", nargs="+", default=kinds[1:], choices=kinds)
    parser.add_argument("--epochs", type=int, help="default: the paper's")
    parser.add_argument("--videos", type=int, help="at most so many per split; default: the set's own number")
    return parser


def main():
    given = parser().parse_args()
    device = pick_device(given.device)
    data = in_memory(load(f"synthetic-like:{given.dataset}"), device, given.videos)
    archive = Archive(find_root(), given.profile)
    shorter = {"epochs": given.epochs, "warmup": given.epochs // 2} if given.epochs else {}
    for precision in given.precision:
        config = train_config(data.name, "paper", precision=precision, **shorter)
        record = archive.save(measure(config, data, device, given.videos), {})
        shown = table(record.metrics).to_string(float_format="{:.4g}".format, na_rep="-")
        costs = [
            f"stochastic depth, {phase}: a step takes {t['ratio']:.3f} times one without"
            for phase, t in record.metrics.get("stochastic depth", {}).items()
        ]
        print(f"{precision}, {record.device}", shown, *costs, record.name, sep="\n", flush=True)


if __name__ == "__main__":
    main()
