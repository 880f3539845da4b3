"""Time and peak memory of scoring at the papers' sizes, on random codes and labels, which cost the same.

    python benchmarks/scoring.py [--profile quick] [--sizes ucf101 fcvid]

Writes one record per size into the archive of the profile.
Seconds are the smallest of three runs after a warm-up that compiles the kernels.
"""

import argparse
import resource
import time

import numpy as np

from s5vh_nb.basics.files import find_root
from s5vh_nb.basics.profiles import PROFILES
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, device_name, git_commit
from s5vh_nb.search.hamming import hamming_distances
from s5vh_nb.search.scores import map_at_k

SIZES = {  # queries, database, classes
    "ucf101": (3783, 9537, 101),
    "fcvid": (45600, 45600, 239),
}
CUTS = 5, 20, 40, 60, 80, 100
BITS, SEED = 64, 0
REPEATS = 3


def stand_in(nq: int, n: int, classes: int):
    "Random packed codes and class numbers: query codes, database codes, query labels, database labels."
    rng = np.random.default_rng(SEED)
    codes = [rng.integers(0, 256, (size, BITS // 8), dtype=np.uint8) for size in (nq, n)]
    return *codes, rng.integers(0, classes, nq), rng.integers(0, classes, n)


def seconds_of(call) -> float:
    "The smallest wall-clock time of a few calls."
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def peak_gb() -> float:
    "The largest resident memory of this process so far, imports included, in 10^9 bytes (Linux)."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def sort_everything(q, db, y_q, y_db):
    "The usual way, for comparison: the whole distance matrix, a sort of every row, precision at the hits."
    order = np.argsort(hamming_distances(q, db), axis=1)  # (nq, n)
    hits = y_db[order[:, : max(CUTS)]] == y_q[:, None]  # (nq, top)
    precision = hits.cumsum(1) / np.arange(1, max(CUTS) + 1)  # (nq, top)
    sums = (hits * precision).cumsum(1)  # (nq, top)
    return {n: sums[:, n - 1].mean() / n for n in CUTS}


def measure(name: str) -> RunRecord:
    "Score one size with ties as expected and by index; the smaller size also by sorting everything."
    sizes = SIZES[name]
    data = stand_in(*sizes)
    seconds = {ties: seconds_of(lambda: map_at_k(*data, CUTS, ties=ties)) for ties in ("expected", "order")}
    metrics = {"peak_gb": peak_gb(), "queries_per_second": sizes[0] / seconds["expected"]}
    if name == "ucf101":
        seconds["sort everything"] = seconds_of(lambda: sort_everything(*data))
    dataset = f"random-like-{name}"
    return RunRecord(
        config={"kind": "scoring", "dataset": dataset, "bits": BITS, "seed": SEED, "cuts": CUTS},
        metrics=metrics,
        data={"name": dataset, "stand_in": True, **dict(zip(("queries", "database", "classes"), sizes))},
        device=device_name("cpu"),
        seconds=seconds,
        artefact="benchmarks/scoring",
        commit=git_commit(find_root()),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = "the archive that takes the records: results/<profile>"
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help=where)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="whose sizes")
    given = parser.parse_args()
    few = stand_in(10, 200, 5)
    for ties in ("expected", "order"):
        map_at_k(*few, CUTS, ties=ties)  # compile
    archive = Archive(find_root(), given.profile)
    for name in given.sizes:
        record = archive.save(measure(name), {})
        times = ", ".join(f"{what} {seconds:.2f} s" for what, seconds in record.seconds.items())
        print(f"{name}: {times}; peak {record.metrics['peak_gb']:.2f} GB; {record.name}", flush=True)


if __name__ == "__main__":
    main()
