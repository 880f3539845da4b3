"""Hash centers: seconds per sweep at the papers' sizes, and quality beside the rules of the released code.

    python benchmarks/centers.py [--profile quick] [--sizes 101x16 101x64 450x64] [--compare 20x16 50x16]

Writes one record per size into the archive of the profile.
Speed: clustered random features (a stand-in). Quality: time means of the spoken digits, over five seeds.
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
from s5vh_nb.evidence.records import RunRecord, device_name, git_commit
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
def reference_center(x, Ho, s, delta, y1, y2, y3, p, early):
    """The released iteration with a = 1: direct solves (inverted once per round), random multipliers.

    Returns the signs of the rounds at the highest penalty. `early`, as in the release: a round ends, without
    projecting, once the slack is non-negative and the sphere is met.
    """
    k = len(x)
    eye, G = np.eye(k), Ho.T @ Ho
    q = 2 * s @ Ho - Ho.sum(0) / len(Ho)
    z1, z2 = x, x
    z3 = delta - Ho @ x
    rho, last = p.rho, 0
    found = []
    while last < 100:
        inverse = np.linalg.inv(2 * rho * eye + (rho + 2) * G)
        for _ in range(p.inner):
            pull = rho * (z1 + z2) - y1 - y2 + (rho * (delta - z3) - y3) @ Ho + q
            x = inverse @ pull
            z1, z2 = x + y1 / rho, x + y2 / rho
            z3 = delta - Ho @ x - y3 / rho
            done = early and z3.min() >= 0 and abs((z2 * z2).sum() - k) < 1e-3
            if not done:
                z1, z2 = np.clip(z1, -1, 1), z2 * np.sqrt(k / (z2 * z2).sum())
                z3 = np.maximum(z3, 0)
            y1, y2 = y1 + p.gamma * rho * (x - z1), y2 + p.gamma * rho * (x - z2)
            y3 = y3 + p.gamma * rho * (Ho @ x + z3 - delta)
            if done:
                break
        rho = min(rho * p.growth, p.rho_max)
        if rho == p.rho_max:
            last += 1
            found.append(np.where(x > 0, 1.0, -1.0))
    return found


def reference_sweeps(H, S, W, distance, rule, rng, p=ADMM(), sweeps=20):
    """The best set after sweeps by the release's iteration.

    rule: "released" moves a center when mean plus smallest distance grow, "described" always.
    """
    c, k = H.shape
    H, best = H.copy(), H
    best_quality, stale = -np.inf, 0
    for _ in range(sweeps):
        for i in range(c):
            H[i] = reference_move(H, i, np.delete(S[i], i), float(k - 2 * distance), rule, rng, p)
        now = quality(H, W)
        stale += 1
        if now > best_quality:
            best, best_quality = H.copy(), now
            stale = 0
        if stale == 5:
            break
    return best


def reference_move(H, i, s, delta, rule, rng, p):
    "Where a center moves to, (k,)."
    Ho = np.delete(H, i, 0)
    multipliers = [rng.random(n) for n in (H.shape[1], H.shape[1], len(Ho))]
    corners = reference_center(H[i], Ho, s, delta, *multipliers, p, rule == "released")

    def spread(x):
        return -(Ho @ x).mean() - (Ho @ x).max()

    return max([H[i], *corners], key=spread) if rule == "released" else corners[0]


def described(H, W) -> dict:
    "The properties of a set of centers."
    pairs = np.triu_indices(len(H), 1)
    cosines, wanted = (H @ H.T)[pairs] / H.shape[1], (W @ W.T)[pairs]
    return {
        "quality": quality(H, W),
        "mismatch": np.abs(cosines - wanted).mean(),
        "correlation": np.corrcoef(cosines, wanted)[0, 1],
        "smallest_distance": H.shape[1] * (1 - cosines.max()) / 2,
    }


def by_rule(features, c: int, k: int, seed: int) -> tuple[dict, dict]:
    "Properties of the centers by rule, and the seconds that each rule took."
    W, _ = semantic_vectors(features, c, seed=seed)
    H, S = start_centers(c, k, "hadamard", np.random.default_rng(seed)), semantic_targets(W, k)
    distance = wanted_distance(c, k)

    def reference(rule):
        return reference_sweeps(H, S, W, distance, rule, np.random.default_rng(seed))

    rules = {
        "released": lambda: reference("released"),
        "described": lambda: reference("described"),
        "start": lambda: H,
        "sweeps": lambda: sweep_centers(H, S, W, distance, progress=False)[0],
    }
    found, seconds = {}, {}
    for rule, run in rules.items():
        begun = time.perf_counter()
        found[rule] = run()
        seconds[rule] = time.perf_counter() - begun
    found["sweeps, balanced"] = balanced_bits(found["sweeps"], S, distance)
    return {rule: described(centers, W) for rule, centers in found.items()}, seconds


def compare(c: int, k: int) -> RunRecord:
    "Quality by four rules, mean over the seeds (k-means, random rows and multipliers)."
    data = load("spoken-digits")
    rows, seconds = zip(*(by_rule(data.train.frames, c, k, seed) for seed in SEEDS))
    metrics = {
        rule: {name: float(np.mean([row[rule][name] for row in rows])) for name in rows[0][rule]}
        for rule in rows[0]
    }
    metrics = {"wanted_distance": wanted_distance(c, k), "seeds": len(SEEDS), **metrics}
    seconds = {rule: sum(run[rule] for run in seconds) for rule in seconds[0]}
    return record("centers-quality", data.name, c, k, metrics, seconds, data.fingerprint)


def speed(c: int, k: int) -> RunRecord:
    "Seconds of a sweep, measured over two."
    W, _ = semantic_vectors(make_blobs(10 * c, 64, centers=c, random_state=0)[0], c)
    H, S = start_centers(c, k, "hadamard", np.random.default_rng(0)), semantic_targets(W, k)
    distance = wanted_distance(c, k)
    improve_center(H, 0, S[0], distance)  # compile
    clocks = time.perf_counter, time.process_time
    begun = [clock() for clock in clocks]
    _, history = sweep_centers(H, S, W, distance, sweeps=2, progress=False)
    wall, cpu = ((clock() - start) / len(history) for clock, start in zip(clocks, begun))
    seconds = {"sweep": wall, "sweep_cpu": cpu}
    return record("centers-speed", "random-clusters", c, k, {"quality": history[-1]}, seconds, "stand-in")


def record(kind, dataset, c, k, metrics, seconds, fingerprint) -> RunRecord:
    return RunRecord(
        config={"kind": kind, "dataset": dataset, "n_centers": c, "bits": k, "seed": 0},
        metrics=metrics,
        data={"name": dataset, "fingerprint": fingerprint},
        device=device_name("cpu"),
        seconds=seconds,
        artefact="benchmarks/centers",
        commit=git_commit(find_root()),
    )


def size(text: str) -> tuple:
    return tuple(int(part) for part in text.split("x"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = "the archive that takes the records: results/<profile>"
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help=where)
    sizes = [(101, 16), (101, 64), (450, 64)]
    parser.add_argument("--sizes", type=size, nargs="*", default=sizes, help="CENTERSxBITS to time")
    sizes = [(20, 16), (50, 16), (101, 16)]
    parser.add_argument("--compare", type=size, nargs="*", default=sizes, help="CENTERSxBITS to compare")
    return parser


def main():
    given = parser().parse_args()
    archive = Archive(find_root(), given.profile)
    for c, k in given.sizes:
        found = archive.save(speed(c, k), {})
        wall, cpu = found.seconds["sweep"], found.seconds["sweep_cpu"]
        print(f"{c} centers of {k} bits: {wall:.2f} s a sweep ({cpu:.2f} s of CPU); {found.name}", flush=True)
    for c, k in given.compare:
        found = archive.save(compare(c, k), {})
        wanted = found.metrics["wanted_distance"]
        print(f"{c} centers of {k} bits, mean of {len(SEEDS)} seeds, distance wanted {wanted}")
        for rule, values in found.metrics.items():
            if isinstance(values, dict):
                print(f"  {rule:17}", "  ".join(f"{name} {value:8.3f}" for name, value in values.items()))
        print(f"  {found.name}", flush=True)


if __name__ == "__main__":
    main()
