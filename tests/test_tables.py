"Paper 1's tables from pretended records: retrieval from some of its runs, where no run may be made; a claim about the lead over rivals."
import shutil
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest

from s5vh_nb import runs
from s5vh_nb.config import BaselineConfig, TrainConfig, train_config, variant

ROOT = Path(__file__).resolve().parent.parent
WORDS = np.random.default_rng(1).integers(0, 256, (10, 2), np.uint8)                    # a code for each class


def pretend(config, quality=0.):
    "The record of a run that never was: a share of the items gets the code of its class, the others have random bits."
    data, rng = runs.load_data(config.dataset), np.random.default_rng(config.seed)
    def draw(y): return np.where(rng.random(len(y))[:, None] < quality, WORDS[y], rng.integers(0, 256, (len(y), 2), np.uint8))
    codes = {"query": draw(data.query.labels), "database": draw(data.database.labels)}
    row = "S5VH" if isinstance(config, TrainConfig) else f"{config.method.upper()}, {dict(flat='flattened', mean='time mean')[config.view]}"
    history = [{"epoch": 0, "reconstruction": 1., "contrast": 1., "alignment": 1.}]
    metrics = {"row": row, **runs.scores(codes, data)}
    runs.store(runs.settle(config, data), "smoke", data, "cpu", codes, metrics=metrics, history=history, seconds={"train": 1.})


@pytest.fixture
def draw(tmp_path, monkeypatch):
    "A function that runs the cells of a notebook in smoke, where no run may be made, and returns what they leave."
    matplotlib.use("Agg")
    shutil.copytree(ROOT/"results"/"published", tmp_path/"results"/"published")
    monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path))
    monkeypatch.setenv("S5VH_NB_NO_TRAINING", "1")

    def run(name, **given):
        space = {}
        for cell in nbformat.read(ROOT/"nbs"/"s5vh"/f"{name}.ipynb", as_version=4).cells:
            if cell.cell_type == "code": exec(cell.source, space)
            if "parameters" in cell.metadata.get("tags", []): space.update(profile="smoke", **given)
        return space
    return run


@pytest.fixture
def table(draw):
    "The retrieval notebook after these runs, with two seeds and two lengths."
    def of(*made):
        for config in made: pretend(config)
        return draw("retrieval", seeds=[1, 2], bits=[16, 64])
    return of


LSH = [BaselineConfig(method="lsh", view="flat", bits=16, seed=s) for s in (1, 2)]
HALF = BaselineConfig(method="lsh", view="mean", bits=16)                               # one of two seeds


def test_a_method_without_all_seeds_is_named_and_left_out(table, capsys):
    found = table(*LSH, HALF, *(train_config("spoken-digits", "smoke", bits=16, seed=s) for s in (1, 2)))
    assert found["table"][["bits", "method"]].values.tolist() == [[16, "S5VH"], [16, "LSH, flattened"]]
    assert found["verdict"][["bits", "best rival", "seeds"]].values.tolist() == [[16, "LSH, flattened", 2]]
    said = capsys.readouterr().out
    assert "spoken-digits, 16 bits: ConMH-style, SSTH-style, itq flat, itq mean, lsh mean\n" in said
    assert "64 bits: S5VH, ConMH-style" in said


def test_a_table_without_a_pair_to_compare_has_no_verdict(table, tmp_path):
    assert table(*LSH)["verdict"].empty
    assert {path.stem for path in tmp_path.rglob("tables/*.csv")} == {"s5vh_retrieval"}


def test_a_table_without_records_is_refused(table):
    with pytest.raises(FileNotFoundError, match="records of profile smoke: expected all seeds of at least one method, found none"):
        table(HALF)


@pytest.mark.parametrize("ours, rival, said", [
    ({16: .8, 64: .6}, {16: .5, 64: .5}, "holds (one seed)"), ({16: .8, 64: .9}, {16: .5, 64: .3}, "does not hold (one seed)"),
    ({16: .6, 64: .4}, {16: .7, 64: .9}, "does not hold (one seed)")],
    ids=["a lead that shrinks", "a lead that grows", "no lead, least behind at few bits"])
def test_a_lead_at_few_bits_must_be_a_lead(draw, ours, rival, said):
    for k in ours:
        config = train_config("spoken-digits", "smoke", bits=k)
        pretend(config, ours[k])
        for name in ("conmh", "ssth"): pretend(variant(config, name), rival[k])
        for view in ("flat", "mean"): pretend(BaselineConfig(view=view, bits=k), rival[k])
    table = draw("claims", bits=[16, 64])["table"].set_index("claim")
    assert table.verdict["its lead is largest at few bits"] == said
