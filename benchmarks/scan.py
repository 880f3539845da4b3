"""The selective scan and the short convolution: parity of the backends against float64, and their times at the shapes that matter.

    python benchmarks/scan.py [--profile quick] [--device auto] [--shapes 512x13 256x25 32x1000] [--milliseconds 200]

Random inputs (a stand-in: the kernels cost the same on real ones), d 512, n 16, gated, softplus, bf16 on a GPU.
Times on a GPU: "graph" replays a CUDA graph, as the training step does; "eager" calls the function, autograd included.
Beside them the floor: bytes that must move, over the bandwidth of a copy measured in the same run.
Inputs lie frame by frame, as a network's layers make them; mamba_ssm wants them channel by channel, and its time includes turning them.
Writes one run record below results/<profile>/runs.
"""
import argparse, functools, importlib.util, time

import numpy as np
import pandas as pd
import torch

from s5vh_nb.basics import pick_device
from s5vh_nb.config import PROFILES
from s5vh_nb.efficiency import ceilings, replayed, seconds_per_call
from s5vh_nb.records import RunRecord, device_name, save
from s5vh_nb.scan import causal_conv1d, selective_scan

D, N, WIDTH = 512, 16, 4
PARITY = (8, 512, 13, 16), (2, 33, 29, 5), (2, 512, 301, 16)                          # b, d, t, n


def arguments(b, d, t, n, dtype, device, seed=0):
    "Inputs as a Mamba layer has them: (b, t, d) in memory, seen as (b, d, t)."
    draw = lambda *shape, r=torch.Generator().manual_seed(seed): torch.randn(*shape, generator=r)
    by_step = {name: draw(b, t, width).to(device, dtype).transpose(1, 2) for name, width in dict(u=d, delta=d, z=d, B=n, C=n).items()}
    fixed = dict(A=-torch.exp(draw(d, n)/2)*torch.arange(1, n + 1), D=draw(d), delta_bias=draw(d) - 2)
    fixed = {name: v.to(device) for name, v in fixed.items()}
    return {name: v.requires_grad_() for name, v in (by_step | fixed).items()}


def outcome(given, backend) -> list:
    "Output and gradients of one scan."
    out = selective_scan(**given, delta_softplus=True, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    return [out.detach(), *torch.autograd.grad(out, list(given.values()), weights.to(out.dtype))]


def parity(backend, dtype, device) -> float:
    "Largest relative error, by norm, of output and gradients over the odd shapes, against the reference in float64."
    worst = 0
    for shape in PARITY:
        given = arguments(*shape, dtype, device)
        exact = outcome({name: v.detach().double().requires_grad_() for name, v in given.items()}, "reference")
        worst = max(worst, *(float((mine - theirs).norm()/theirs.norm()) for mine, theirs in zip(outcome(given, backend), exact)))
    return worst


def median_seconds(call, device, graph:bool, limit:float) -> float:
    "Of a call, after as long at work: a GPU at rest runs at a fraction of its clock."
    call, calls = replayed(call, device) if graph else (call, 1)
    return float(np.median(seconds_per_call(call, device, 10**5, 10**5, limit)))/calls


def work(shape, device, dtype):
    "What is timed: name -> (function of a backend, its arguments, bytes that must move)."
    b, t = shape
    given = arguments(b, D, t, N, dtype, device)
    weight, bias = torch.randn(D, WIDTH, device=device, requires_grad=True), torch.randn(D, device=device, requires_grad=True)
    conv = {"x": given["u"], "weight": weight, "bias": bias}
    scan, row = functools.partial(selective_scan, delta_softplus=True), b*t*D*given["u"].element_size()
    return {f"{b} x t {t}, scan": (scan, given, 4*row, 11*row), f"{b} x t {t}, convolution": (causal_conv1d, conv, 2*row, 5*row)}


def times(function, given, backend, device, graph, limit) -> dict:
    "Seconds of the forward pass alone, and with the backward pass."
    call, leaves = functools.partial(function, **given, backend=backend), list(given.values())
    with torch.no_grad(): weights, forward = torch.randn_like(call()), median_seconds(call, device, graph, limit)
    return {"forward": forward, "with backward": median_seconds(lambda: torch.autograd.grad(call(), leaves, weights), device, graph, limit)}


def measure(shapes, device, limit) -> RunRecord:
    "Parity and times of every backend there is."
    gpu, begun = device.type == "cuda", time.perf_counter()
    present = [name for name in ("triton", "mamba_ssm", "torch") if importlib.util.find_spec(name)] if gpu else ["numba", "torch"]
    dtype, modes = (torch.bfloat16, ("graph", "eager")) if gpu else (torch.float32, ("eager",))
    kinds = (torch.float32, torch.bfloat16) if gpu else (torch.float32,)
    errors = {f"{name} {str(kind)[6:]}": parity(name, kind, device) for name in present for kind in kinds}
    limits, rows = ceilings(device), {}
    for shape in shapes:
        for what, (function, given, *moved) in work(shape, device, dtype).items():
            found = {part: {"floor": 1000*n/limits["bytes_per_second"]} for part, n in zip(("forward", "with backward"), moved)}
            for backend in present:
                if backend == "mamba_ssm" and function is causal_conv1d: continue       # not there
                if backend == "torch" and gpu and shape[1] > 100: continue              # minutes
                for mode in modes:
                    timed = times(function, given, backend, device, mode == "graph", limit)
                    for part, value in timed.items(): found[part][f"{mode} {backend}"] = value*1000
            rows |= {f"{what}, {part}": values for part, values in found.items()}
    config = {"kind": "scan-benchmark", "device": device_name(device), "dtype": str(dtype)[6:],
              "shapes": [list(shape) for shape in shapes], "d": D, "n": N, "seed": 0}
    metrics = {"relative_error": errors, "copy_tb_per_s": limits["bytes_per_second"]/1e12, "times": rows}
    return RunRecord(config=config, seed=0, metrics=metrics, data={"name": "random numbers", "stand_in": True},
                     device=device_name(device), seconds={"all": time.perf_counter() - begun})


def main():
    def size(text): return tuple(int(part) for part in text.split("x"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help="where the record goes: results/<profile>/runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shapes", type=size, nargs="+",
                        help="SEQUENCESxSTEPS; default: those of the papers on a GPU, a small one on a CPU")
    parser.add_argument("--milliseconds", type=float, default=200, help="time to spend on each number, and as much on its warm-up")
    given = parser.parse_args()
    device = pick_device(given.device)
    shapes = given.shapes or ([(512, 13), (256, 25), (32, 1000)] if device.type == "cuda" else [(16, 13)])
    record = measure(shapes, device, given.milliseconds/1000)
    print(f"{record.device}; copy {record.metrics['copy_tb_per_s']:.2f} TB/s; milliseconds, floor = bytes over that bandwidth")
    print(pd.DataFrame(record.metrics["times"]).T.to_string(float_format="{:.3f}".format, na_rep="-"))
    errors = record.metrics["relative_error"]
    print("largest relative error against float64:", "  ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    print(save(record, given.profile))


if __name__ == "__main__": main()
