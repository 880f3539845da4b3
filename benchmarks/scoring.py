"""Time and peak memory of scoring at the papers' sizes, on random codes and labels (a stand-in: they cost the same as trained ones).

    python benchmarks/scoring.py [--profile quick]

Writes a run record for each size below results/<profile>/runs.
Seconds are the smallest of three runs after a warm-up that compiles the kernels.
"""
import argparse, resource, time

import numpy as np

from s5vh_nb.config import PROFILES
from s5vh_nb.records import RunRecord, device_name, save
from s5vh_nb.retrieval import hamming_distances, map_at_k

SIZES = dict(ucf101=(3783, 9537, 101), fcvid=(45600, 45600, 239))      # queries, database, classes
CUTS = 5, 20, 40, 60, 80, 100
BITS, SEED, REPEATS = 64, 0, 3

def stand_in(nq:int, n:int, classes:int):
    "Random packed codes and class numbers: query codes, database codes, query labels, database labels."
    rng = np.random.default_rng(SEED)
    codes = [rng.integers(0, 256, (size, BITS//8), dtype=np.uint8) for size in (nq, n)]
    return *codes, rng.integers(0, classes, nq), rng.integers(0, classes, n)

def seconds_of(call) -> float:
    "Smallest wall-clock time of a few calls."
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)

def peak_gb() -> float:
    "Largest resident memory of this process so far, imports included, in 10^9 bytes (Linux)."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9

def sort_everything(q, db, y_q, y_db):
    "The usual way, for comparison: the whole distance matrix, a sort of every row, precision at the hits."
    order = np.argsort(hamming_distances(q, db), axis=1)               # (nq, n)
    rel = y_db[order[:, :max(CUTS)]] == y_q[:, None]                   # (nq, top)
    sums = (rel*rel.cumsum(1)/np.arange(1, max(CUTS) + 1)).cumsum(1)   # (nq, top)
    return {N: sums[:, N-1].mean()/N for N in CUTS}

def measure(name:str) -> RunRecord:
    "Score one size with ties as expected and by index; the smaller size also by sorting everything."
    sizes = SIZES[name]
    data = stand_in(*sizes)
    seconds = {ties: seconds_of(lambda: map_at_k(*data, CUTS, ties=ties)) for ties in ("expected", "order")}
    metrics = dict(peak_gb=peak_gb(), queries_per_second=sizes[0]/seconds["expected"])
    if name == "ucf101": seconds["sort everything"] = seconds_of(lambda: sort_everything(*data))
    config = dict(kind="scoring", dataset=f"random-like-{name}", bits=BITS, seed=SEED, cuts=CUTS)
    described = dict(name=config["dataset"], stand_in=True, **dict(zip(("queries", "database", "classes"), sizes)))
    return RunRecord(config=config, seed=SEED, metrics=metrics, data=described, device=device_name("cpu"), seconds=seconds)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help="where the records go: results/<profile>/runs")
    profile = parser.parse_args().profile
    few = stand_in(10, 200, 5)
    for ties in "expected", "order": map_at_k(*few, CUTS, ties=ties)   # compile
    for name in SIZES:
        record = measure(name)
        times = ", ".join(f"{what} {s:.2f} s" for what, s in record.seconds.items())
        print(f"{record.config['dataset']}: {times}; peak {record.metrics['peak_gb']:.2f} GB; {save(record, profile)}", flush=True)

if __name__ == "__main__": main()
