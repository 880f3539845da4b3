"""A training step and encoding on this machine's CPU: an earlier commit and the present code, in turn.

    python benchmarks/versions.py COMMIT [--profile full] [--variant paper] [--network quick]
                                  [--dataset spoken-digits] [--turns 4] [--starts 5]

Writes one record into the archive of the profile. Each version has a process of its own, which waits while
the other one works. They take turns epoch by epoch, then encoding by encoding of the training videos, and
the one that was second goes first the next time. First turns are left out: kernels are compiled in them.
Time on the wall and time of all cores together are recorded. The ratios of turns that belong together hold
when the machine's speed drifts; a start has their median. How fast a process is, though, also depends on
where its memory happens to lie, by up to a tenth: so both processes are started several times, and of the
starts' ratios the lowest, the median and the highest are kept. Before stochastic depth became the
default (e8f8f6e) a network had none; both versions are trained without it then.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from tqdm import trange

from s5vh_nb.basics.config import to_dict
from s5vh_nb.basics.files import find_root
from s5vh_nb.basics.profiles import PROFILES, train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.records import RunRecord, device_name, git_commit
from s5vh_nb.learning.resolve import resolve

DEPTH = "e8f8f6e"  # stochastic depth is the default from here on


def git(*words: str) -> bytes:
    "What a git command in the project prints."
    return subprocess.run(["git", *words], cwd=find_root(), check=True, capture_output=True).stdout


def is_before(commit: str, other: str) -> bool:
    "Whether `other` is no ancestor of the commit."
    words = ["git", "merge-base", "--is-ancestor", other, commit]
    return subprocess.run(words, cwd=find_root()).returncode == 1


def started(folder: Path, given: dict) -> subprocess.Popen:
    "A process that works with the package in the folder when it is told to."
    words = [sys.executable, str(Path(__file__).with_name("one_version.py")), json.dumps(given)]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(words, env=environment, **pipes)


def turn(process: subprocess.Popen) -> dict:
    "What its next piece of work took."
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def in_turn(processes: list, turns: int) -> list:
    "What both processes say of each of their turns, the first turn left out."
    found = []
    for i in range(turns + 1):
        order = (0, 1) if i % 2 else (1, 0)
        said = {place: turn(processes[place]) for place in order}
        found.append([said[0], said[1]])
    return found[1:]


def compared(starts: list, items: int) -> dict:
    "Milliseconds of each version, and how many times faster the second one is: lowest, median and highest."
    result = {}
    for clock in ("wall", "cpu"):
        times = np.array([[[said[clock] for said in both] for both in found] for found in starts])
        before, after = (1000 * np.median(times, axis=(0, 1)) / items).tolist()
        faster = np.median(times[..., 0] / times[..., 1], axis=1)  # (starts,)
        spread = [float(of(faster)) for of in (np.min, np.median, np.max)]
        result[clock] = {"before_ms": before, "after_ms": after, "times_faster": spread}
    return result


def one_start(places: list, work: list, turns: int) -> tuple:
    "What both versions say of their epochs and of their encodings, from new processes."
    processes = [started(*each) for each in zip(places, work)]
    epochs, codes = in_turn(processes, turns), in_turn(processes, turns)
    for process in processes:
        process.communicate("\n")
    return epochs, codes


def measure(given) -> RunRecord:
    "Both versions, turn by turn."
    commit = git("rev-parse", given.commit).decode().strip()
    changes = {"epochs": given.turns + 1}
    if given.variant == "paper":
        changes |= {"warmup": 0}
    depth = {"drop_path": 0.0} if is_before(commit, DEPTH) else {}
    variant = {} if depth else {"variant": given.variant}
    asked = [changes | variant, changes | depth | {"variant": given.variant}]
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(git("archive", commit, "s5vh_nb"))) as package:
            package.extractall(folder, filter="data")
        shared = {"dataset": given.dataset, "network": given.network, "encodings": given.turns + 1}
        work, places = [shared | {"changes": wanted} for wanted in asked], [Path(folder), find_root()]
        starts = trange(given.starts, desc="starts")
        epochs, codes = zip(*(one_start(places, work, given.turns) for _ in starts))
    data = load(given.dataset)
    config = resolve(train_config(given.dataset, given.network, **asked[1]), data)
    n = len(data.train)
    return RunRecord(
        config={
            "kind": "versions-benchmark",
            "device": device_name("cpu"),
            "before": commit,
            "variant": given.variant,
            "run": to_dict(config),
        },
        metrics={
            "step": compared(epochs, -(-n // config.batch)),
            "encode": compared(codes, n) | {"videos": n},
            "losses": [[said["loss"] for said in both] for both in epochs[0]],
            "turns": given.turns,
            "starts": given.starts,
        },
        data={"name": data.name, "fingerprint": data.fingerprint, "train": n},
        device=device_name("cpu"),
        seconds={"epochs": float(sum(said["wall"] for start in epochs for both in start for said in both))},
        artefact="benchmarks/versions",
        commit=git_commit(find_root()),
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = "the archive that takes the record: results/<profile>"
    parser.add_argument("commit", help="the earlier version")
    parser.add_argument("--profile", default="quick", choices=list(PROFILES), help=where)
    parser.add_argument("--variant", default="paper", choices=["paper", "plus"])
    parser.add_argument("--network", default="quick", choices=list(PROFILES), help="of which profile")
    parser.add_argument("--dataset", default="spoken-digits")
    parser.add_argument("--turns", type=int, default=4, help="of each version in a start")
    parser.add_argument("--starts", type=int, default=5, help="of both processes")
    return parser


def main():
    given = parser().parse_args()
    record = Archive(find_root(), given.profile).save(measure(given), {})
    print(record.device, *record.metrics.items(), record.name, sep="\n")


if __name__ == "__main__":
    main()
