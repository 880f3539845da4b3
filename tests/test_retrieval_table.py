"The retrieval table drawn from some of its records, where no run may be made."
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest

from s5vh_nb import runs
from s5vh_nb.config import BaselineConfig, TrainConfig, train_config

NOTEBOOK = Path(__file__).resolve().parent.parent/"nbs"/"s5vh"/"retrieval.ipynb"


def pretend(config):
    "The record of a run that never was, with random codes."
    data, rng = runs.load_data(config.dataset), np.random.default_rng(config.seed)
    codes = {"query": rng.integers(0, 256, (750, 2), np.uint8), "database": rng.integers(0, 256, (2250, 2), np.uint8)}
    row = "S5VH" if isinstance(config, TrainConfig) else {"flat": "LSH, flattened", "mean": "LSH, time mean"}[config.view]
    history = [{"epoch": 0, "reconstruction": 1., "contrast": 1., "alignment": 1.}]
    runs.store(runs.settle(config, data), "smoke", data, "cpu", codes, metrics={"row": row, **runs.scores(codes, data)}, history=history, seconds={"train": 1.})


@pytest.fixture
def table(tmp_path, monkeypatch):
    "A function that pretends these runs, forbids all others, and returns what the notebook then has, in smoke with two seeds."
    monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path))
    matplotlib.use("Agg")
    (tmp_path/"results"/"published").mkdir(parents=True)
    for path in (NOTEBOOK.parents[2]/"results"/"published").glob("s5vh_*.csv"): (tmp_path/"results"/"published"/path.name).write_text(path.read_text())

    def draw(*made):
        for config in made: pretend(config)
        monkeypatch.setenv("S5VH_NB_NO_TRAINING", "1")
        space = {}
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "code": exec(cell.source, space)
            if "parameters" in cell.metadata.get("tags", []): space.update(profile="smoke", seeds=[1, 2], bits=[16, 64])
        return space
    return draw


LSH = [BaselineConfig(method="lsh", view="flat", bits=16, seed=s) for s in (1, 2)]
HALF = BaselineConfig(method="lsh", view="mean", bits=16)                               # one of two seeds


def test_a_method_without_all_seeds_is_named_and_left_out(table, capsys):
    found = table(*LSH, HALF, *(train_config("spoken-digits", "smoke", bits=16, seed=s) for s in (1, 2)))
    assert found["table"][["bits", "method"]].values.tolist() == [[16, "S5VH"], [16, "LSH, flattened"]]
    assert found["verdict"][["bits", "best rival", "seeds"]].values.tolist() == [[16, "LSH, flattened", 2]]
    said = capsys.readouterr().out
    assert "spoken-digits, 16 bits: ConMH-style, SSTH-style, itq flat, itq mean, lsh mean\n" in said and "64 bits: S5VH, ConMH-style" in said


def test_a_table_without_a_pair_to_compare_has_no_verdict(table, tmp_path):
    assert table(*LSH)["verdict"].empty
    assert {path.stem for path in tmp_path.rglob("tables/*.csv")} == {"s5vh_retrieval"}


def test_a_table_without_records_is_refused(table):
    with pytest.raises(FileNotFoundError, match="records of profile smoke: expected all seeds of at least one method, found none"): table(HALF)
