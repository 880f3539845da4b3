"""One training by one process and by several: seconds a step, losses, and how far apart the networks end.

    python benchmarks/parallel.py [--profile quick] [--processes 2] [--device auto] [--dataset spoken-digits]
                                  [--variant paper] [--batch 128] [--epochs 4]

Writes one record into the archive of the profile. Both trainings have the same batch and run one after the
other under torchrun. The processes of the second one take GPUs in turn. Where there are too few they share a
GPU or the CPU, which shows that it works but saves no time. The time of a step is that of the median epoch
after the first, divided by its steps. On a GPU a step is replayed as a CUDA graph, by several processes only
where NCCL connects them. Products are float32, so that only the order of sums differs. How far apart the
weights end is a share of the way that they went.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from s5vh_nb.basics.checks import check
from s5vh_nb.basics.config import VARIANTS, to_dict
from s5vh_nb.basics.files import find_root
from s5vh_nb.basics.parallel import all_devices, is_first, joined
from s5vh_nb.basics.profiles import PROFILES, train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, device_name, git_commit
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.learning.training import train


def work(given):
    "What each process does; the first one writes what came out."
    data = load(given.dataset)
    options = dict(batch=given.batch, epochs=given.epochs, precision="float32")
    options |= {} if given.variant == "plus" else {"warmup": 1}  # from the second epoch on, soft labels move
    config = train_config(data.name, "full", given.variant, **options)
    with joined(given.device) as device:
        run = train(config, data, device=device, progress=False)
        devices = all_devices(device, device_name(device))
        if not is_first():
            return
        found = {
            "config": to_dict(run.config),
            "devices": devices,
            "weights": run.weights.detach().cpu(),
            "first weights": new_run(run.config, data, device).weights.detach().cpu(),
            "losses": [epoch["loss"] for epoch in run.history],
            "seconds": run.seconds,
            "codes": run.model.encode(*data.query.arrays),
            "data": {"name": data.name, "fingerprint": data.fingerprint, "train": len(data.train)},
        }
        torch.save(found, given.into)


def launched(processes: int, folder: Path) -> dict:
    "What a training by so many processes gives."
    into = folder / f"{processes}.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    own = [__file__, *sys.argv[1:], "--into", into]
    subprocess.run([*torchrun, f"{processes}", *own], check=True)
    return torch.load(into, weights_only=True)


def milliseconds(found: dict) -> float:
    "Of a step."
    batch = min(found["config"]["batch"], found["data"]["train"])
    return 1000 * float(np.median(found["seconds"][2:])) / -(-found["data"]["train"] // batch)


def compared(one: dict, several: dict) -> dict:
    "How far apart the two trainings ended."
    went = torch.linalg.norm(one["weights"] - one["first weights"])
    losses = np.array([one["losses"], several["losses"]])
    bits = [np.unpackbits(found["codes"].numpy(), axis=1) for found in (one, several)]
    return {
        "losses": np.abs(losses[1] / losses[0] - 1).max(),
        "weights": float(torch.linalg.norm(several["weights"] - one["weights"]) / went),
        "bits": (bits[0] != bits[1]).mean(),
    }


def measure(processes: int) -> RunRecord:
    "Both trainings, side by side in one record."
    with tempfile.TemporaryDirectory() as folder:
        one, several = (launched(n, Path(folder)) for n in (1, processes))
    runs = {"one": one, "several": several}
    return RunRecord(
        config={
            "kind": "parallel-benchmark",
            "device": several["devices"],
            "processes": processes,
            "run": one["config"],
        },
        metrics={
            "step_ms": {name: milliseconds(found) for name, found in runs.items()},
            "losses": {name: found["losses"] for name, found in runs.items()},
            "apart": compared(one, several),
        },
        data=one["data"],
        device=several["devices"],
        seconds={name: float(sum(found["seconds"])) for name, found in runs.items()},
        artefact="benchmarks/parallel",
        commit=git_commit(find_root()),
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = "the archive that takes the record: results/<profile>"
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help=where)
    parser.add_argument("--processes", type=int, default=2, help="of the second training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dataset", default="spoken-digits", help="e.g. synthetic-like:ucf101")
    parser.add_argument("--variant", default="paper", choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=128, help="items of a step, of all processes together")
    parser.add_argument("--epochs", type=int, default=4, help="at least 2")
    parser.add_argument("--into", help=argparse.SUPPRESS)  # of a process: where its first one writes
    return parser


def main():
    given = parser().parse_args()
    check(given.epochs >= 2, "--epochs", "at least 2, of which the first is left out", given.epochs)
    if given.into:
        work(given)
        return
    record = Archive(find_root(), given.profile).save(measure(given.processes), {})
    print(record.device, record.metrics, record.name, sep="\n")


if __name__ == "__main__":
    main()
