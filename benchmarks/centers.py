"""Hash centers: seconds per sweep at the papers' sizes, and quality against the rules of the released code.

    python benchmarks/centers.py [--profile quick] [--sizes 101x16 450x64] [--compare 20x16 50x16]

Keeps one record per size below results/<profile>/runs.
Speed: clustered random features in place of videos.
Quality: time means of the spoken digits, mean of five seeds.
"""

import argparse
import time

import numpy as np
from numba import njit
from sklearn.datasets import make_blobs

from s5vh_nb.basics.files import find_root
from s5vh_nb.basics.profiles import PROFILES
from s5vh_nb.datasets.catalog import load
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, device_name
from s5vh_nb.learning.admm import ADMM, improve_center
from s5vh_nb.learning.centers import (
    balanced_bits,
    quality,
    semantic_targets,
    semantic_vectors,
    start_centers,
    sweep_centers,
    wanted_distance,
)

SEEDS = range(5)


@njit(cache=True)
def released_center(x, Ho, s, delta, y1, y2, y3, p, early):
    """The released iteration with a = 1: the matrix is inverted once per round, multipliers start at random.

    Returns the signs of the rounds at the highest penalty. `early` ends a round once the slack is
    non-negative and the sphere is met, without projecting, as the release does.
    """
    k = len(x)
    G, q = Ho.T @ Ho, 2 * s @ Ho - Ho.sum(0) / len(Ho)
    z1, z2 = x, x
    z3 = delta - Ho @ x
    rho, last = p.rho, 0
    found = []
    while last < 100:
        inverse = np.linalg.inv(2 * rho * np.eye(k) + (rho + 2) * G)
        for _ in range(p.inner):
            x = inverse @ (rho * (z1 + z2) - y1 - y2 + (rho * (delta - z3) - y3) @ Ho + q)
            z1, z2 = x + y1 / rho, x + y2 / rho
            z3 = delta - Ho @ x - y3 / rho
            done = early and z3.min() >= 0 and abs((z2 * z2).sum() - k) < 1e-3
            if not done:
                z1, z2 = np.clip(z1, -1, 1), z2 * np.sqrt(k / (z2 * z2).sum())
                z3 = np.maximum(z3, 0)
            y1 = y1 + p.gamma * rho * (x - z1)
            y2 = y2 + p.gamma * rho * (x - z2)
            y3 = y3 + p.gamma * rho * (Ho @ x + z3 - delta)
            if done:
                break
        rho = min(rho * p.growth, p.rho_max)
        if rho == p.rho_max:
            last += 1
            found.append(np.where(x > 0, 1.0, -1.0))
    return found


def released_sweeps(H, S, W, distance, rule, rng, p=ADMM(), sweeps=20):
    """The best set after sweeps by the release's iteration.

    With the rule "released" a center moves when mean plus smallest distance grow, with "described" always.
    """
    c, k = H.shape
    H, best = H.copy(), H
    best_quality, stale = -np.inf, 0
    for _ in range(sweeps):
        for i in range(c):
            Ho, s = np.delete(H, i, 0), np.delete(S[i], i)
            multipliers = [rng.random(n) for n in (k, k, c - 1)]
            delta = float(k - 2 * distance)
            corners = released_center(H[i], Ho, s, delta, *multipliers, p, rule == "released")

            def spread(x):
                return -(Ho @ x).mean() - (Ho @ x).max()

            H[i] = max([H[i], *corners], key=spread) if rule == "released" else corners[0]
        stale += 1
        if (now := quality(H, W)) > best_quality:
            best, best_quality = H.copy(), now
            stale = 0
        if stale == 5:
            break
    return best


def describe(H, W) -> dict:
    "What there is to say about a set."
    pairs = np.triu_indices(len(H), 1)
    cosines, wanted = (H @ H.T)[pairs] / H.shape[1], (W @ W.T)[pairs]
    return dict(
        quality=quality(H, W),
        mismatch=np.abs(cosines - wanted).mean(),
        correlation=np.corrcoef(cosines, wanted)[0, 1],
        smallest_distance=H.shape[1] * (1 - cosines.max()) / 2,
    )


def rules_at(seed, W, c, k) -> dict:
    "Name of a rule -> a function without arguments that makes the centers."
    start = start_centers(c, k, "hadamard", np.random.default_rng(seed))
    problem = start, semantic_targets(W, k), W, wanted_distance(c, k)

    def released(rule):
        return lambda: released_sweeps(*problem, rule, np.random.default_rng(seed))

    return {
        "released": released("released"),
        "described": released("described"),
        "start": lambda: start,
        "sweeps": lambda: sweep_centers(*problem, progress=False)[0],
    }


def compare(c: int, k: int) -> RunRecord:
    "Quality by four rules, mean over the seeds (of k-means, random rows and multipliers)."
    data = load("spoken-digits")
    rows, seconds = {}, {}
    for seed in SEEDS:
        W, _ = semantic_vectors(data.train.frames, c, seed=seed)
        for rule, run in rules_at(seed, W, c, k).items():
            start = time.perf_counter()
            found = run()
            seconds[rule] = seconds.get(rule, 0) + time.perf_counter() - start
            rows.setdefault(rule, []).append(describe(found, W))
        balanced = balanced_bits(found, semantic_targets(W, k), wanted_distance(c, k))
        rows.setdefault("sweeps, balanced", []).append(describe(balanced, W))
    metrics = {
        rule: {name: float(np.mean([row[name] for row in found])) for name in found[0]}
        for rule, found in rows.items()
    }
    metrics |= dict(wanted_distance=wanted_distance(c, k), seeds=len(SEEDS))
    return record("centers-quality", data.name, c, k, metrics, seconds, data.fingerprint)


def speed(c: int, k: int) -> RunRecord:
    "Seconds of a sweep, from two."
    W, _ = semantic_vectors(make_blobs(10 * c, 64, centers=c, random_state=0)[0], c)
    start = start_centers(c, k, "hadamard", np.random.default_rng(0))
    S, distance = semantic_targets(W, k), wanted_distance(c, k)
    improve_center(start, 0, S[0], distance)  # compile
    wall, cpu = time.perf_counter(), time.process_time()
    _, history = sweep_centers(start, S, W, distance, sweeps=2, progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    seconds = dict(sweep=wall / len(history), sweep_cpu=cpu / len(history))
    metrics = dict(quality=history[-1])
    return record("centers-speed", "random-clusters", c, k, metrics, seconds, "random numbers")


def record(kind, dataset, c, k, metrics, seconds, fingerprint) -> RunRecord:
    return RunRecord(
        config=dict(kind=kind, dataset=dataset, n_centers=c, bits=k, seed=0),
        metrics=metrics,
        data=dict(name=dataset, fingerprint=fingerprint),
        device=device_name("cpu"),
        seconds=seconds,
        artefact="benchmarks/centers",
    )


def main():
    def size(text):
        return tuple(int(part) for part in text.split("x"))

    papers, small = [(101, 16), (101, 64), (450, 64)], [(20, 16), (50, 16), (101, 16)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help="where the records go")
    parser.add_argument("--sizes", type=size, nargs="*", default=papers, help="CENTERSxBITS to time")
    parser.add_argument("--compare", type=size, nargs="*", default=small, help="CENTERSxBITS to compare")
    asked = parser.parse_args()
    archive = Archive(find_root(), asked.profile)
    for c, k in asked.sizes:
        r = archive.save(speed(c, k), {})
        wall, cpu = r.seconds["sweep"], r.seconds["sweep_cpu"]
        print(f"{c} centers of {k} bits: {wall:.2f} s a sweep ({cpu:.2f} s of CPU); {r.name}", flush=True)
    for c, k in asked.compare:
        r = archive.save(compare(c, k), {})
        wanted = r.metrics["wanted_distance"]
        print(f"{c} centers of {k} bits, mean of {len(SEEDS)} seeds, distance wanted {wanted}; {r.name}")
        for rule, values in r.metrics.items():
            if isinstance(values, dict):
                row = "  ".join(f"{name} {value:8.3f}" for name, value in values.items())
                print(f"  {rule:17} {row}", flush=True)


if __name__ == "__main__":
    main()
