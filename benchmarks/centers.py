"""Hash centers: seconds per sweep at the papers' sizes, and quality over five seeds against the rules of the released code.

    python benchmarks/centers.py [--profile quick] [--sizes 101x16 101x64 450x64] [--compare 20x16 50x16 101x16]

Writes one run record per size below results/<profile>/runs.
Speed: clustered random features (a stand-in). Quality: time means of the spoken digits.
"""
import argparse, time

import numpy as np
from numba import njit
from sklearn.datasets import make_blobs

from s5vh_nb.centers import (ADMM, balanced_bits, improved, quality, semantic_targets, semantic_vectors, start_centers, sweep_centers,
                             wanted_distance)
from s5vh_nb.config import PROFILES
from s5vh_nb.datasets import load
from s5vh_nb.records import RunRecord, device_name, save

SEEDS = range(5)

@njit(cache=True)
def reference_center(x, Ho, s, delta, y1, y2, y3, p, early):
    """The released iteration with a = 1: direct solves (inverted once per round), random multipliers.

    The signs of the rounds at the highest penalty come back.
    early: end a round once the slack is non-negative and the sphere is met, without projecting, as the release does.
    """
    k = len(x)
    eye, G, q = np.eye(k), Ho.T@Ho, 2*s@Ho - Ho.sum(0)/len(Ho)
    z1, z2, z3 = x, x, delta - Ho@x
    rho, last, found = p.rho, 0, []
    while last < 100:
        inverse = np.linalg.inv(2*rho*eye + (rho + 2)*G)
        for _ in range(p.inner):
            x = inverse@(rho*(z1 + z2) - y1 - y2 + (rho*(delta - z3) - y3)@Ho + q)
            z1, z2, z3 = x + y1/rho, x + y2/rho, delta - Ho@x - y3/rho
            done = early and z3.min() >= 0 and abs((z2*z2).sum() - k) < 1e-3
            if not done: z1, z2, z3 = np.clip(z1, -1, 1), z2*np.sqrt(k/(z2*z2).sum()), np.maximum(z3, 0)
            y1, y2, y3 = y1 + p.gamma*rho*(x - z1), y2 + p.gamma*rho*(x - z2), y3 + p.gamma*rho*(Ho@x + z3 - delta)
            if done: break
        rho = min(rho*p.growth, p.rho_max)
        if rho == p.rho_max:
            last += 1
            found.append(np.where(x > 0, 1., -1.))
    return found

def reference_sweeps(H, S, W, distance, rule, rng, p=ADMM(), sweeps=20):
    """Best set after sweeps by the release's iteration.

    rule: "released" moves a center when mean plus smallest distance grow, "described" always.
    """
    c, k = H.shape
    H, best, best_quality, stale = H.copy(), H, -np.inf, 0
    for _ in range(sweeps):
        for i in range(c):
            Ho, s = np.delete(H, i, 0), np.delete(S[i], i)
            y1, y2, y3 = rng.random(k), rng.random(k), rng.random(c - 1)
            corners = reference_center(H[i], Ho, s, float(k - 2*distance), y1, y2, y3, p, rule == "released")
            def spread(x): return -(Ho@x).mean() - (Ho@x).max()
            H[i] = max([H[i], *corners], key=spread) if rule == "released" else corners[0]
        if (now := quality(H, W)) > best_quality: best, best_quality, stale = H.copy(), now, 0
        else: stale += 1
        if stale == 5: break
    return best

def described(H, W) -> dict:
    "What there is to say about a set."
    pairs = np.triu_indices(len(H), 1)
    cosines, wanted = (H@H.T)[pairs]/H.shape[1], (W@W.T)[pairs]
    return dict(quality=quality(H, W), mismatch=np.abs(cosines - wanted).mean(), correlation=np.corrcoef(cosines, wanted)[0, 1],
                smallest_distance=H.shape[1]*(1 - cosines.max())/2)

def compare(c:int, k:int) -> RunRecord:
    "Quality by four rules, mean over the seeds (k-means, random rows and multipliers)."
    data = load("spoken-digits")
    rows, seconds = {}, {}
    for seed in SEEDS:
        W, _ = semantic_vectors(data.train.features, c, seed=seed)
        H, S, distance = start_centers(c, k, "hadamard", np.random.default_rng(seed)), semantic_targets(W, k), wanted_distance(c, k)
        rules = {rule: lambda rule=rule: reference_sweeps(H, S, W, distance, rule, np.random.default_rng(seed))
                 for rule in ("released", "described")}
        rules |= {"start": lambda: H, "sweeps": lambda: sweep_centers(H, S, W, distance, progress=False)[0]}
        for rule, run in rules.items():
            start = time.perf_counter()
            found = run()
            seconds[rule] = seconds.get(rule, 0) + time.perf_counter() - start
            rows.setdefault(rule, []).append(described(found, W))
        rows.setdefault("sweeps, balanced", []).append(described(balanced_bits(found, S, distance), W))
    metrics = {rule: {name: float(np.mean([row[name] for row in found])) for name in found[0]} for rule, found in rows.items()}
    metrics = dict(wanted_distance=distance, seeds=len(SEEDS), **metrics)
    return record("centers-quality", data.name, c, k, metrics, seconds, data.fingerprint)

def speed(c:int, k:int) -> RunRecord:
    "Seconds of two sweeps and of one center."
    W, _ = semantic_vectors(make_blobs(10*c, 64, centers=c, random_state=0)[0], c)
    H, S, distance = start_centers(c, k, "hadamard", np.random.default_rng(0)), semantic_targets(W, k), wanted_distance(c, k)
    improved(H, 0, S[0], distance)                                                     # compile
    wall, cpu = time.perf_counter(), time.process_time()
    _, history = sweep_centers(H, S, W, distance, sweeps=2, progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    per = len(history)
    return record("centers-speed", "random-clusters", c, k, dict(quality=history[-1]), dict(sweep=wall/per, sweep_cpu=cpu/per), "stand-in")

def record(kind, dataset, c, k, metrics, seconds, fingerprint) -> RunRecord:
    config = dict(kind=kind, dataset=dataset, n_centers=c, bits=k, seed=0)
    data = dict(name=dataset, fingerprint=fingerprint)
    return RunRecord(config=config, seed=0, metrics=metrics, data=data, device=device_name("cpu"), seconds=seconds)

def main():
    def size(text): return tuple(int(part) for part in text.split("x"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help="where the records go: results/<profile>/runs")
    parser.add_argument("--sizes", type=size, nargs="*", default=[(101, 16), (101, 64), (450, 64)], help="CENTERSxBITS to time")
    parser.add_argument("--compare", type=size, nargs="*", default=[(20, 16), (50, 16), (101, 16)], help="CENTERSxBITS to compare")
    asked = parser.parse_args()
    for c, k in asked.sizes:
        r = speed(c, k)
        wall, cpu = r.seconds["sweep"], r.seconds["sweep_cpu"]
        print(f"{c} centers of {k} bits: {wall:.2f} s a sweep ({cpu:.2f} s of CPU); {save(r, asked.profile)}", flush=True)
    for c, k in asked.compare:
        r = compare(c, k)
        print(f"{c} centers of {k} bits, mean of {len(SEEDS)} seeds, distance wanted {r.metrics['wanted_distance']}")
        for rule, values in r.metrics.items():
            if isinstance(values, dict): print(f"  {rule:17}", "  ".join(f"{name} {value:8.3f}" for name, value in values.items()))
        print(f"  {save(r, asked.profile)}", flush=True)

if __name__ == "__main__": main()
