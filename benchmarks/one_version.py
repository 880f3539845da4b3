"""What `benchmarks/versions.py` runs for each version of the package, found through PYTHONPATH.

It trains, then encodes the training videos again and again. Each line that it reads lets it go on, with an
epoch or an encoding, and it prints what that took.
"""

import json
import sys
import time

try:
    from s5vh_nb.basics.profiles import train_config
    from s5vh_nb.datasets.catalog import load
    from s5vh_nb.learning.training import train

    NAMES = {"hook": "evaluate", "every": "evaluate_every", "frames": "frames"}
except ImportError:  # a commit before d968454 (2026-11-28)
    from s5vh_nb.config import train_config
    from s5vh_nb.datasets import load
    from s5vh_nb.training import train

    NAMES = {"hook": "look", "every": "watch", "frames": "features"}


def clocks() -> tuple:
    "Seconds on the wall, and of all cores together."
    return time.perf_counter(), time.process_time()


class Turns:
    "Waits for its turns and says what they took."

    def wait(self):
        if not sys.stdin.readline():
            sys.exit()  # who gives the turns has gone
        self.begun = clocks()

    def done(self, run):
        wall, cpu = (end - begin for begin, end in zip(self.begun, clocks()))
        loss = run.history[-1]["loss"]
        print(json.dumps({"wall": wall, "cpu": cpu, "loss": loss}), flush=True)

    def __call__(self, run) -> dict:
        "Between two epochs; it adds nothing to the history."
        self.done(run)
        self.wait()
        return {}


def main():
    given, turns = json.loads(sys.argv[1]), Turns()
    data = load(given["dataset"])
    config = train_config(given["dataset"], given["network"], **given["changes"], **{NAMES["every"]: 1})
    turns.wait()
    run = train(config, data, device="cpu", progress=False, **{NAMES["hook"]: turns})
    for _ in range(given["encodings"]):
        run.model.encode(getattr(data.train, NAMES["frames"]))
        turns.done(run)
        turns.wait()


if __name__ == "__main__":
    main()
