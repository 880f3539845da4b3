"""Time of training, encoding and scoring at a paper set's size, on random features and codes (a stand-in: they cost the same as real ones).

    python benchmarks/training.py [--profile full] [--device cuda] [--dataset ucf101] [--precision tf32 bfloat16] [--epochs 350]

Writes one run record per precision below results/<profile>/runs.
A step's time is that of the median epoch of its phase divided by its steps.
The whole run goes from features in memory to the packed codes of database and queries, hash centers included.
"""
import argparse, dataclasses, time

import numpy as np
import torch

from s5vh_nb import datasets, records, runs, training
from s5vh_nb.basics import pick_device
from s5vh_nb.config import DATASETS, to_dict, train_config
from s5vh_nb.efficiency import peak_bytes, seconds_per_call

ENCODED = (25, 128), (25, 16384), (1000, 128)     # frames, videos

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

def encoding(model, config, device) -> dict:
    "Milliseconds, videos per second and peak memory (beyond the features) of encoding videos that lie on the device."
    found = {}
    for frames, b in ENCODED:
        x = torch.randn(b, frames, config.model.d, device=device)
        def call():
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"): model.encode(x)
        with training.matmul_precision(config.precision):
            peak, seconds = peak_bytes(call, device), float(np.median(seconds_per_call(call, device)))
        found[f"t={frames}, n={b}"] = {"ms": 1000*seconds, "videos_per_second": b/seconds, "peak_mb": peak and peak/1e6}
    return found

def scoring(device, n:int=45600, bits:int=64) -> float:
    "Seconds to score FCVID's size, six cuts, ties as expected, lowest and highest."
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 256, (n, bits//8), dtype=np.uint8), rng.integers(0, 239, n)
    split = datasets.Split(np.zeros((n, 1, 1), np.float32), labels, "random labels")
    data = datasets.VideoDataset("random-codes", split, split, split, 239, "random codes and labels")
    call = lambda: runs.scores({"query": codes, "database": codes}, data, device)
    call()
    return clocked(call, device)[1]

def measure(config, data, device) -> records.RunRecord:
    "Train, encode and score once."
    run, trained = clocked(lambda: training.train(config, data, device=str(device)), device)
    _, encoded = clocked(lambda: [run.model.encode(split.features, batch=4096) for split in (data.database, data.query)], device)
    steps, epochs = -(-len(data.train)//config.batch), np.array(run.seconds[1:])
    phases = {"warm-up": epochs[1:config.objective.warmup], "main": epochs[config.objective.warmup + 1:]}
    metrics = {"step_ms": {phase: float(1000*np.median(seconds)/steps) for phase, seconds in phases.items() if len(seconds)},
               "encode": encoding(run.model, run.config, device), "last_loss": run.history[-1]["loss"]}
    seconds = {"set-up": run.seconds[0], "epochs": float(epochs.sum()), "features to codes": trained + encoded,
               "score 45600 x 45600": scoring(device)}
    described = {"name": data.name, "stand_in": True, "fingerprint": data.fingerprint, "train": len(data.train), "t": data.t, "d": data.d}
    name = records.device_name(device)
    about = {"kind": "training-benchmark", "device": name, "run": to_dict(run.config)}
    return records.RunRecord(config=about, seed=config.seed, metrics=metrics, data=described, device=name, seconds=seconds)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", help="where the records go: results/<profile>/runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="ucf101", choices=list(DATASETS), help="whose shape")
    parser.add_argument("--precision", nargs="+", default=["tf32", "bfloat16"])
    parser.add_argument("--epochs", type=int, help="default: the paper's")
    given = parser.parse_args()
    device = pick_device(given.device)
    data = in_memory(datasets.load(f"synthetic-like:{given.dataset}"), device)
    for precision in given.precision:
        shorter = {"epochs": given.epochs, "warmup": given.epochs//7} if given.epochs else {}
        config = train_config(data.name, "paper", precision=precision, **shorter)
        record = measure(config, data, device)
        print(precision, record.metrics, record.seconds, records.save(record, given.profile), sep="\n", flush=True)

if __name__ == "__main__": main()
