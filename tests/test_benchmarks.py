"The training benchmark, and the page that shows its records."

import dataclasses
import runpy
from pathlib import Path

import nbformat
import pytest
import torch

from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.synthetic import synthetic_like

ROOT = Path(__file__).resolve().parent.parent


def test_the_cost_of_stochastic_depth_is_that_of_trainings_in_turn(monkeypatch):
    "Depth is on, off, off, on. A step's time is the median epoch's of its phase, but for its first."
    tool = runpy.run_path(str(ROOT / "benchmarks" / "training.py"))
    data, asked = synthetic_like("ucf101", (24, 24, 8), 6), []
    config = train_config(data.name, "smoke", d=6, m=16, batch=8)
    measured, real = tool["depth_cost"], tool["train"]

    def watched(config, *args, **options):
        asked.append(config)
        run = real(config, *args, **options)
        slow = 1.0 + (config.model.drop_path > 0)
        run.seconds = [99, 99, slow, slow, 99, 2 + len(asked), 2 + len(asked)]  # set-up, then six epochs
        return run

    monkeypatch.setitem(measured.__globals__, "train", watched)
    found = measured(config, data, torch.device("cpu"), epochs=6)
    assert [c.model.drop_path for c in asked] == [0.5, 0, 0, 0.5]
    assert {(c.epochs, c.objective.warmup) for c in asked} == {(6, 3)}
    second = 1000 / 3  # ms a step, of three in an epoch
    warm, main = found["warm-up"], found["main"]
    assert warm["with_ms"] == pytest.approx([2 * second] * 2) and warm["ratio"] == pytest.approx(2)
    assert main["with_ms"] == pytest.approx([3 * second, 6 * second])
    assert main["without_ms"] == pytest.approx([4 * second, 5 * second])
    assert main["ratio"] == pytest.approx(1)


def test_the_page_on_speed_shows_stochastic_depth_where_a_record_has_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    page, space = nbformat.read(ROOT / "nbs" / "pages" / "speed.ipynb", as_version=4), {}
    exec(next(cell.source for cell in page.cells if cell.cell_type == "code"), space)
    others = {name: part for name, part in space["training"].metrics.items() if name != "stochastic depth"}
    cost = {"with_ms": [2.0, 2.1], "without_ms": [2.0, 2.0], "ratio": 1.025}

    def lines(metrics):
        return list(space["network_lines"](dataclasses.replace(space["training"], metrics=metrics)))

    without, with_both = lines(others), lines(others | {"stochastic depth": {"warm-up": cost, "main": cost}})
    new = [line for line in with_both if line not in without]
    assert [line[1] for line in new] == ["1.025 times (1.000 and 1.050)"] * 2
    assert len(with_both) == len(without) + 2 and "main phase" in new[1][0]
