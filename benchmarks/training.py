"""Time of training, encoding and scoring at a paper set's size, on random features and codes (a stand-in: they cost the same as real ones).

    python benchmarks/training.py [--profile full] [--device cuda] [--dataset ucf101] [--precision tf32 bfloat16] [--epochs 350]

Writes one run record per precision below results/<profile>/runs.
A step's time is that of the median epoch of its phase divided by its steps.
Let it run alone: trainings beside it slow down what the CPU does, set-up above all.
The whole run goes from features in memory to the packed codes of database and queries, hash centers included. A short training in another
process goes before it, whose time is recorded apart: it compiles the kernels, which later trainings on the same machine find on the disk.

Beside every time stands its floor, the greater of two: counted operations over the rate of a large matrix product of that precision,
and bytes that must move over the bandwidth of a large copy, both rates measured in the same run. Bytes that must move: of a step, the
batch's features once, the weights and Adam's two moments in and out; of encoding, the features once; of scoring, codes and labels once.
All else could stay on the chip. The floor of the whole run is that of its steps and of encoding; set-up counts nothing.
"""
import argparse, dataclasses, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import torch

from s5vh_nb import datasets, records, runs, training
from s5vh_nb.basics import pick_device
from s5vh_nb.config import DATASETS, PROFILES, replace, to_dict, train_config
from s5vh_nb.efficiency import ceilings, floor, linear_in_batch, operations, peak_bytes, seconds_per_call

ENCODED = (25, 128), (1000, 128), (25, 16384)     # frames, videos; the last on a GPU only
SIGNS = "float16"                                 # of the products that give distances, on a GPU

def in_memory(data:datasets.VideoDataset, device) -> datasets.VideoDataset:
    "The same data set with its features as arrays, made on the device."
    def moved(split): return dataclasses.replace(split, features=datasets.to_tensor(split.features, device).cpu().numpy())
    made = {id(split): moved(split) for split in (data.train, data.database, data.query)}
    return dataclasses.replace(data, **{part: made[id(getattr(data, part))] for part in ("train", "database", "query")})

def clocked(call, device):
    "What `call` returns, and the seconds it took."
    if device.type == "cuda": torch.cuda.synchronize(device)
    begun = time.perf_counter()
    result = call()
    if device.type == "cuda": torch.cuda.synchronize(device)
    return result, time.perf_counter() - begun

def beside_floor(ms:float, operations:float, moved:float, limits:dict, precision:str|None) -> dict:
    "A measured time and the least it could be."
    return {"ms": ms, "floor_ms": 1000*float(floor(operations, moved, limits, precision)), "operations": operations, "bytes": moved}

def work_of_step(run, data, warm) -> tuple:
    "Operations and bytes of one training step."
    rows = torch.arange(run.config.batch, device=run.device)
    x = training.place(data.train.features[:len(rows)], run.device, run.config.precision)
    order = torch.rand(x.shape[:2], device=run.device).argsort(-1)
    counted = operations(lambda: training.step(run, warm, x, rows, order), run.model)
    return counted, x.nbytes + 6*run.weights.nbytes

def work_of_encoding(model, device, n, frames) -> tuple:
    "Operations and bytes of encoding `n` videos."
    def counted(b):
        x = torch.randn(b, frames, model.config.d, device=device)
        return operations(lambda: model(x), model)
    with torch.no_grad(): return linear_in_batch(counted, n), 4*n*frames*model.config.d

def encoding(model, precision, device, limits) -> dict:
    "Times of encoding videos that lie on the device, videos per second and peak memory (beyond the features)."
    found = {}
    for frames, b in ENCODED if device.type == "cuda" else ENCODED[:-1]:
        x = torch.randn(b, frames, model.config.d, device=device)
        def call():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"): model.encode(x)
        with training.matmul_precision(precision):
            peak, seconds = peak_bytes(call, device), float(np.median(seconds_per_call(call, device, limit=20)))
        found[f"t={frames}, n={b}"] = {**beside_floor(1000*seconds, *work_of_encoding(model, device, b, frames), limits, precision),
                                       "videos_per_second": b/seconds, "peak_mb": peak/1e6}
    return found

def scoring(device, limits, n:int=45600, bits:int=64) -> dict:
    "Time of scoring FCVID's size, six cuts, ties as expected, lowest and highest. Operations: distances as products of signs, as on a GPU."
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 256, (n, bits//8), dtype=np.uint8), rng.integers(0, 239, n)
    split = datasets.Split(np.zeros((n, 1, 1), np.float32), labels, "random labels")
    data = datasets.VideoDataset("random-codes", split, split, split, 239, "random codes and labels")
    call = lambda: runs.scores({"query": codes, "database": codes}, data, device)
    call()
    seconds, products = clocked(call, device)[1], SIGNS if device.type == "cuda" else None
    return beside_floor(1000*seconds, 2*bits*n**2, 2*(codes.nbytes + labels.nbytes), limits, products)

def warm_up(config, device) -> float:
    "Seconds of a short training on a part of the data and of a few codes."
    def short():
        run = training.train(replace(config, epochs=2, warmup=1, share=.05, n_centers=8), device=str(device), progress=False)
        run.model.encode(np.zeros((64, 25, config.model.d), np.float32))
    return clocked(short, device)[1]

def measure(config, data, device) -> records.RunRecord:
    "Train, encode and score once."
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool: first = pool.submit(warm_up, config, device).result()
    run, train_seconds = clocked(lambda: training.train(config, data, device=str(device)), device)
    _, code_seconds = clocked(lambda: [run.model.encode(split.features, batch=4096) for split in (data.database, data.query)], device)
    steps, epochs, warmup = -(-len(data.train)//config.batch), np.array(run.seconds[1:]), config.objective.warmup
    limits = ceilings(device, config.precision, *([SIGNS] if device.type == "cuda" else []))
    work = {"warm-up": work_of_step(run, data, False), "main": work_of_step(run, data, True)}
    phases = {"warm-up": epochs[1:warmup], "main": epochs[warmup + 1:]}
    step = {phase: beside_floor(float(1000*np.median(seconds)/steps), *work[phase], limits, config.precision)
            for phase, seconds in phases.items() if len(seconds)}
    parts_of_whole = [(steps*warmup, work["warm-up"]), (steps*(config.epochs - warmup), work["main"]),
                      (1, work_of_encoding(run.model, device, len(data.database) + len(data.query), data.t))]
    whole = [sum(times*pair[i] for times, pair in parts_of_whole) for i in (0, 1)]
    metrics = {"host": records.device_name("cpu"), "ceilings": limits, "step": step,
               "features to codes": beside_floor(1000*(train_seconds + code_seconds), *whole, limits, config.precision),
               "encode": encoding(run.model, config.precision, device, limits), "score 45600 x 45600": scoring(device, limits),
               "last_loss": run.history[-1]["loss"]}
    described = {"name": data.name, "stand_in": True, "fingerprint": data.fingerprint, "train": len(data.train), "t": data.t, "d": data.d}
    name = records.device_name(device)
    about = {"kind": "training-benchmark", "device": name, "run": to_dict(run.config)}
    seconds = {"a short training before, in its own process": first, "set-up": run.seconds[0], "epochs": float(epochs.sum()),
               "codes": code_seconds}
    return records.RunRecord(config=about, seed=config.seed, metrics=metrics, data=described, device=name, seconds=seconds)

def table(metrics) -> pd.DataFrame:
    "Every time with its floor."
    rows = {f"step, {phase}": found for phase, found in metrics["step"].items()} | \
        {f"encode, {size}": found for size, found in metrics["encode"].items()} | \
        {what: metrics[what] for what in ("features to codes", "score 45600 x 45600")}
    shown = pd.DataFrame(rows).T
    return shown.assign(times=shown.ms/shown.floor_ms)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help="where the records go: results/<profile>/runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="ucf101", choices=list(DATASETS), help="whose shape")
    parser.add_argument("--precision", nargs="+", default=["tf32", "bfloat16"], choices=["float32", "tf32", "bfloat16"])
    parser.add_argument("--epochs", type=int, help="default: the paper's")
    given = parser.parse_args()
    device = pick_device(given.device)
    data = in_memory(datasets.load(f"synthetic-like:{given.dataset}"), device)
    for precision in given.precision:
        shorter = {"epochs": given.epochs, "warmup": given.epochs//2} if given.epochs else {}
        config = train_config(data.name, "paper", precision=precision, **shorter)
        record = measure(config, data, device)
        path = records.save(record, given.profile)
        shown = table(record.metrics).to_string(float_format="{:.4g}".format, na_rep="-")
        print(f"{precision}, {record.device}", shown, path, sep="\n", flush=True)

if __name__ == "__main__": main()
