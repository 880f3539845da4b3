"""The selective scan and the short convolution: parity of the backends with float64, and their times.

    python benchmarks/scan.py [--profile quick] [--device auto] [--shapes 512x13 256x25] [--milliseconds 200]

Random inputs (a stand-in: the kernels cost the same on real ones), d 512, n 16, gated, softplus, on a GPU
bfloat16. Times on a GPU: "graph" replays a CUDA graph, as the training step does; "eager" calls the function,
autograd included. Beside them is the floor: bytes that must move, over the bandwidth of a copy. Peak memory
is that of both passes beyond the inputs. Inputs lie frame by frame, as layers make them; mamba_ssm wants them
channel by channel, and its figures include turning them. Writes one record into the archive of the profile.
"""

import argparse
import functools
import importlib.util
import time

import numpy as np
import pandas as pd
import torch

from s5vh_nb.basics.devices import pick_device
from s5vh_nb.basics.files import find_root
from s5vh_nb.basics.profiles import PROFILES
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, device_name, git_commit
from s5vh_nb.measure.efficiency import ceilings, peak_bytes, replayed, seconds_per_call
from s5vh_nb.ops.dispatch import causal_conv1d, selective_scan

CONVOLUTION = functools.partial(causal_conv1d, activation="silu")
D, N = 512, 16
WIDTH = 4
PARITY = (8, 512, 13, 16), (2, 33, 29, 5), (2, 512, 301, 16)  # b, d, t, n


def arguments(shape, dtype, device, seed=0):
    "Inputs as a Mamba layer has them: (b, t, d) in memory, seen as (b, d, t)."
    sizes = dict(zip("bdtn", shape))
    generator = torch.Generator().manual_seed(seed)

    def draw(*names):
        return torch.randn(*(sizes[name] for name in names), generator=generator)

    widths = {"u": "d", "delta": "d", "z": "d", "B": "n", "C": "n"}
    inputs = {name: draw("b", "t", width).to(device, dtype).transpose(1, 2) for name, width in widths.items()}
    inputs["A"] = -torch.exp(draw("d", "n") / 2) * torch.arange(1, sizes["n"] + 1)
    inputs["D"] = draw("d")
    inputs["delta_bias"] = draw("d") - 2
    return {name: x.to(device).requires_grad_() for name, x in inputs.items()}


def outcome(given, backend, dtype) -> list:
    "Output and gradients of one scan; the output's weights are numbers of this dtype."
    out = selective_scan(**given, delta_softplus=True, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out)
    return [out.detach(), *torch.autograd.grad(out, list(given.values()), weights)]


def parity(backend, dtype, device) -> float:
    "Largest relative error, by norm, of output and gradients over odd shapes; the truth is in float64."
    worst = 0
    for shape in PARITY:
        given = arguments(shape, dtype, device)
        double = {name: x.detach().double().requires_grad_() for name, x in given.items()}
        pairs = zip(outcome(given, backend, dtype), outcome(double, "reference", dtype))
        worst = max(worst, *(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs))
    return worst


def median_seconds(call, device, graph: bool, limit: float) -> float:
    "Of a call, after as long at work: a GPU at rest runs at a fraction of its clock."
    call, calls = replayed(call, device) if graph else (call, 1)
    return float(np.median(seconds_per_call(call, device, 10**5, 10**5, limit))) / calls


def work(shape, device, dtype):
    "What is timed: name -> (function of a backend, its arguments, bytes that must move forward, and in all)."
    b, t = shape
    given = arguments((b, D, t, N), dtype, device)
    weight, bias = (torch.randn(*size, device=device, requires_grad=True) for size in ((D, WIDTH), (D,)))
    conv = {"x": given["u"], "weight": weight, "bias": bias}
    scan = functools.partial(selective_scan, delta_softplus=True)
    row = b * t * D * given["u"].element_size()
    return {
        f"{b} x t {t}, scan": (scan, given, (4 * row, 11 * row)),
        f"{b} x t {t}, convolution": (CONVOLUTION, conv, (2 * row, 5 * row)),
    }


def times(function, given, backend, device, graph, limit) -> dict:
    "Seconds of the forward pass alone, and with the backward pass."
    call, leaves = functools.partial(function, **given, backend=backend), list(given.values())
    with torch.no_grad():
        weights = torch.randn_like(call())
        forward = median_seconds(call, device, graph, limit)

    def both():
        return torch.autograd.grad(call(), leaves, weights)

    return {"forward": forward, "with backward": median_seconds(both, device, graph, limit)}


def megabytes(shape, device, dtype, backends) -> dict:
    "Peak memory of a scan's two passes beyond its inputs: backend -> MB."
    function, given = next(iter(work(shape, device, dtype).values()))[:2]
    leaves, found = list(given.values()), {}
    for backend in backends:
        if too_slow(backend, function, shape, device):
            continue
        call = functools.partial(function, **given, backend=backend)
        found[backend] = peak_bytes(lambda call=call: torch.autograd.grad(call().sum(), leaves), device) / 1e6
    return found


def too_slow(backend, function, shape, device) -> bool:
    "What a backend does not have, or takes minutes for."
    absent = backend == "mamba_ssm" and function is CONVOLUTION
    return absent or (backend == "torch" and device.type == "cuda" and shape[1] > 100)


def timed(shape, device, dtype, backends, limits, limit) -> dict:
    "Milliseconds of a shape: name -> {floor, mode and backend -> value}."
    modes = ("graph", "eager") if device.type == "cuda" else ("eager",)
    rows = {}
    for what, (function, given, moved) in work(shape, device, dtype).items():
        floors = {
            part: 1000 * n / limits["bytes_per_second"]
            for part, n in zip(("forward", "with backward"), moved)
        }
        found = {part: {"floor": floor} for part, floor in floors.items()}
        for backend in backends:
            if too_slow(backend, function, shape, device):
                continue
            for mode in modes:
                seconds = times(function, given, backend, device, mode == "graph", limit)
                for part, value in seconds.items():
                    found[part][f"{mode} {backend}"] = value * 1000
        rows |= {f"{what}, {part}": values for part, values in found.items()}
    return rows


def present(device) -> list:
    "The backends there are."
    if device.type != "cuda":
        return ["numba", "torch"]
    return [name for name in ("triton", "mamba_ssm", "torch") if importlib.util.find_spec(name)]


def measure(shapes, device, limit) -> RunRecord:
    "Parity and times of every backend there is."
    begun, backends = time.perf_counter(), present(device)
    kinds = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    errors = {f"{name} {str(kind)[6:]}": parity(name, kind, device) for name in backends for kind in kinds}
    limits, rows = ceilings(device), {}
    for shape in shapes:
        rows |= timed(shape, device, kinds[-1], backends, limits, limit)
    config = {
        "kind": "scan-benchmark",
        "device": device_name(device),
        "dtype": str(kinds[-1])[6:],
        "shapes": [list(shape) for shape in shapes],
        "d": D,
        "n": N,
        "seed": 0,
    }
    copied = limits["bytes_per_second"] / 1e12
    peaks = {f"{b} x t {t}": megabytes((b, t), device, kinds[-1], backends) for b, t in shapes}
    return RunRecord(
        config=config,
        metrics={"relative_error": errors, "copy_tb_per_s": copied, "times": rows, "peak_mb": peaks},
        data={"name": "random numbers", "stand_in": True},
        device=device_name(device),
        seconds={"all": time.perf_counter() - begun},
        artefact="benchmarks/scan",
        commit=git_commit(find_root()),
    )


def size(text: str) -> tuple:
    return tuple(int(part) for part in text.split("x"))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = "the archive that takes the record: results/<profile>"
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help=where)
    parser.add_argument("--device", default="auto")
    shapes = "SEQUENCESxSTEPS; default: those of the papers on a GPU, a small one on a CPU"
    parser.add_argument("--shapes", type=size, nargs="+", help=shapes)
    spent = "time to spend on each number, and as much on its warm-up"
    parser.add_argument("--milliseconds", type=float, default=200, help=spent)
    return parser


def main():
    given = parser().parse_args()
    device = pick_device(given.device)
    default = [(512, 13), (256, 25), (32, 1000), (8, 8192)] if device.type == "cuda" else [(16, 13)]
    record = measure(given.shapes or default, device, given.milliseconds / 1000)
    Archive(find_root(), given.profile).save(record, {})
    copied = record.metrics["copy_tb_per_s"]
    print(f"{record.device}; copy {copied:.2f} TB/s; milliseconds, floor = bytes over that bandwidth")
    print(pd.DataFrame(record.metrics["times"]).T.to_string(float_format="{:.3f}".format, na_rep="-"))
    print("peak memory of both passes, MB")
    print(pd.DataFrame(record.metrics["peak_mb"]).T.to_string(float_format="{:.1f}".format, na_rep="-"))
    errors = (f"{name} {error:.1e}" for name, error in record.metrics["relative_error"].items())
    print("largest relative error against float64:", "  ".join(errors))
    print(record.name)


if __name__ == "__main__":
    main()
