"""Speed, memory and file size of the index, beside faiss's flat index in one run on as many threads.

    python benchmarks/index.py [--profile quick] [--items 1000000 10000000] [--kinds]

Writes one record per size into the archive of the profile; with --kinds, one more for the approximate kinds.
Codes are random, which an exact search takes for any others. Approximate kinds depend on them: theirs are
made of points in clusters, by random planes. Speeds are the largest of some runs, taken in turns, after one
that compiles the kernels. The peak of memory is that of the process: give one size alone for its own.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from s5vh_nb.basics.files import find_root
from s5vh_nb.basics.profiles import PROFILES
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, device_name, git_commit
from s5vh_nb.search.index import HashIndex

BITS, SEED = 64, 0
TOP, QUERIES = 100, 512
TURNS = 5


def peak_gb() -> float:
    "The largest resident memory of this process so far, imports included, in 10^9 bytes (Linux)."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def speeds(*searches) -> list[float]:
    "Queries per second of each call, the largest of a few turns."
    best = [0.0] * len(searches)
    for _ in range(TURNS):
        for i, search in enumerate(searches):
            begun = time.perf_counter()
            search()
            best[i] = max(best[i], QUERIES / (time.perf_counter() - begun))
    return best


def clustered(n: int, rng) -> np.ndarray:
    "Codes (n, 8) of points around 1000 centres in 16 dimensions, by random planes."
    centres, planes = rng.standard_normal((1000, 16)), rng.standard_normal((16, BITS))
    points = centres[rng.integers(0, len(centres), n)] + 0.5 * rng.standard_normal((n, 16))
    return np.packbits(points @ planes > 0, axis=1)


def record(what: str, n: int, metrics: dict, seconds: dict) -> RunRecord:
    "A record of this benchmark."
    return RunRecord(
        config={"kind": "index", "dataset": f"{what}-{n}", "bits": BITS, "seed": SEED, "top": TOP},
        metrics=metrics | {"threads": torch.get_num_threads()},
        data={"name": f"{what}-{n}", "stand_in": True, "queries": QUERIES, "database": n},
        device=device_name("cpu"),
        seconds=seconds,
        artefact="benchmarks/index",
        commit=git_commit(find_root()),
    )


def measure(n: int) -> RunRecord:
    "Build, save, map and search an index of random codes, and the same search by faiss."
    rng = np.random.default_rng(SEED)
    codes, queries = (rng.integers(0, 256, (m, BITS // 8), np.uint8) for m in (n, QUERIES))
    seconds = {"begin": time.perf_counter()}
    index = HashIndex(BITS)
    index.add(codes)
    seconds["add"] = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "codes.index"
        index.save(path)
        seconds["save"] = time.perf_counter()
        index = HashIndex.load(path, mmap=True)
        seconds["load"] = time.perf_counter()
        index.search(queries, TOP)
        metrics = {"file_ratio": path.stat().st_size / (n * (BITS // 8 + 8)), "peak_gb": peak_gb()}
        flat = faiss.IndexBinaryFlat(BITS)
        flat.add(codes)
        ours, theirs = speeds(lambda: index.search(queries, TOP), lambda: flat.search(queries, TOP))
    metrics |= {"queries_per_second": ours, "queries_per_second_faiss": theirs}
    times = list(seconds.values())
    return record("random", n, metrics, dict(zip(list(seconds)[1:], np.diff(times).tolist())))


def measure_kinds(n: int) -> RunRecord:
    "What `choose` finds out about the approximate kinds."
    codes, index = clustered(n + QUERIES, np.random.default_rng(SEED)), HashIndex(BITS)
    index.add(codes[:n])
    table = index.choose(recall=0.95, top=TOP, queries=codes[n:])
    print(table.round(3).to_string(index=False))
    names = table["kind"] + " " + table["effort"].astype(str)
    metrics = {
        f"{name} {what}": float(value)
        for what in ("recall", "ms", "MB")
        for name, value in zip(names, table[what])
    }
    return record("clustered", n, metrics, dict(zip(table["kind"], table["build s"].astype(float))))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = "the archive that takes the records: results/<profile>"
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help=where)
    parser.add_argument("--items", nargs="+", type=int, default=[10**6, 10**7], help="sizes of the index")
    parser.add_argument("--kinds", action="store_true", help="also the approximate kinds, at the first size")
    given = parser.parse_args()
    faiss.omp_set_num_threads(torch.get_num_threads())
    archive = Archive(find_root(), given.profile)
    for n in given.items:
        found = archive.save(measure(n), {})
        print(n, {name: round(value, 4) for name, value in found.metrics.items()}, found.name, flush=True)
    if given.kinds:
        print(archive.save(measure_kinds(given.items[0]), {}).name)


if __name__ == "__main__":
    main()
