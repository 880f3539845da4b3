"Claims: the verdict rule on made-up intervals; both notebooks, and the one of speed, on made-up records, and with none at all."
import shutil
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from s5vh_nb import claims, records, runs
from s5vh_nb.claims import Claim
from s5vh_nb.config import PAIR_VARIANTS, BaselineConfig, train_config
from s5vh_nb.report import Interval

ROOT = Path(__file__).resolve().parent.parent
NONE = {"not run yet", "not testable here"}


@pytest.mark.parametrize("ends, wanted, said", [
    ((.01, .2), (0, np.inf), "holds"), ((-.2, -.01), (0, np.inf), "does not hold"), ((-.1, .2), (0, np.inf), "undecided"),
    ((0, .2), (0, np.inf), "undecided"), ((1.5, 5), (1, 6), "holds"), ((1.5, 7), (1, 6), "undecided"), ((7, 8), (1, 6), "does not hold"),
    ((-3, .5), (1, 6), "does not hold"), ((0, 7), (1, 6), "undecided"),
    ((.8, 1.05), (-np.inf, 1.1), "holds"), ((1.2, 1.3), (-np.inf, 1.1), "does not hold"), ((np.nan, np.nan), (0, np.inf), "undecided")])
def test_verdict(ends, wanted, said): assert claims.verdict(Interval(np.mean(ends), *ends), wanted) == said


GOOD, OPEN, BAD = (Interval(m, m - .1, m + .1) for m in (.2, .05, -.2))


@pytest.mark.parametrize("effects, seeds, said, shown", [
    ([GOOD, GOOD], 5, "holds", 0), ([GOOD, GOOD], 2, "holds (two seeds)", 0), ([GOOD, OPEN], 1, "undecided", 1),
    ([OPEN, BAD, GOOD], 1, "does not hold (one seed)", 1), ([GOOD], None, "holds", 0),
    ([GOOD, None], 5, "holds so far", 0), ([None, OPEN], 1, "undecided so far", 1), ([BAD, None], 5, "does not hold", 0),
    ([GOOD, None], 1, "holds so far (one seed)", 0), ([None], 5, "not run yet", None), ([], 5, "not testable here", None),
    ([Interval(.3, np.nan, np.nan), Interval(.1, np.nan, np.nan)], 1, "undecided", 1)])
def test_a_claim_is_as_strong_as_its_weakest_comparison(effects, seeds, said, shown):
    claim = Claim("A beats B", "A less B", "s5vh/retrieval", "made up", dict(enumerate(effects)), seeds)
    assert (claims.conclusion(claim), claims.weakest(claim)) == (said, shown)
    line = claims.table([claim]).iloc[0]
    assert line.verdict == said and np.isnan(line.effect) == (shown is None)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A project that has the published figures and no runs; new ones are forbidden."
    shutil.copytree(ROOT/"results"/"published", tmp_path/"results"/"published")
    monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path))
    monkeypatch.setenv("S5VH_NB_NO_TRAINING", "1")
    matplotlib.use("Agg")
    return tmp_path


def pretend(quality, name="spoken-digits", looks=(.1, .2), **changes):
    "The record of a run that never was: a share of the items gets the code of its class, the others have random bits."
    config, data, rng = train_config(name, "smoke", bits=16, **changes), runs.load_data(name), np.random.default_rng(0)
    words = np.random.default_rng(1).integers(0, 256, (64, 2), np.uint8)
    def codes(split):
        first = split.labels if split.labels.ndim == 1 else split.labels.argmax(1)
        return np.where(rng.random(len(first))[:, None] < quality, words[first], rng.integers(0, 256, (len(first), 2), np.uint8))
    found = {"query": codes(data.query), "database": codes(data.database)}
    history = [{"epoch": e, "map@5": value} for e, value in enumerate(looks)] or [{"epoch": e} for e in (0, 1)]
    metrics = runs.scores(found, data)
    return runs.store(runs.settle(config, data), "smoke", data, "cpu", found, metrics=metrics, seconds={"train": 0}, history=history)


def test_effect_of_made_up_runs(home):
    good, bad = [pretend(.9)], [pretend(.5, beta=0.)]
    assert claims.found([train_config("spoken-digits", "smoke", bits=16)], "smoke") == good
    two = [train_config("spoken-digits", "smoke", bits=16, seed=s) for s in (1, 2)]
    assert claims.found(two, "smoke") is None                                   # one of two seeds is not enough
    over = claims.effect(claims.gain(good, bad), "smoke")
    assert 0 < over.low < over.mean < over.high
    assert claims.effect(claims.gain(good, None), "smoke") is None is claims.effect(claims.percent(None, bad, "smoke"), "smoke")
    share = claims.effect(claims.percent(good, bad, "smoke"), "smoke")
    assert share.mean == pytest.approx(100*over.mean/claims.score_of(bad, "smoke").mean())


def run_cells(name):
    "The cells of a notebook in this process, in smoke; what they leave."
    space = {}
    for cell in nbformat.read(ROOT/"nbs"/f"{name}.ipynb", as_version=4).cells:
        if cell.cell_type == "code": exec(cell.source.replace('profile = "quick"', 'profile = "smoke"'), space)
    return space


def run_notebook(name): return run_cells(name)["table"].set_index("claim")


def test_notebook_of_paper_1(home):
    assert set(run_notebook("s5vh/claims").verdict) == NONE
    assert not list((home/"results"/"smoke").rglob("runs/*"))
    pretend(.9), pretend(.5, beta=0.), pretend(.95, mixer="LSTM")
    table = run_notebook("s5vh/claims")
    decided = table.verdict[~table.verdict.isin(NONE)].index.tolist()
    assert decided == ["Mamba beats LSTM", "center alignment helps",
                       "with alignment training converges faster", "with alignment training ends better"]
    assert table.verdict["center alignment helps"] == "holds (one seed)" and table.low["center alignment helps"] > 0
    assert table.verdict["with alignment training converges faster"] == "undecided"  # equal curves, and a t-interval of one seed is none
    assert table.verdict["Mamba beats LSTM"] == "does not hold (one seed)" and table.notebook["Mamba beats LSTM"] == "s5vh/temporal"
    saved = pd.read_csv(home/"results"/"smoke"/"tables"/"s5vh_claims.csv")
    assert saved.verdict.tolist() == table.verdict.tolist() and (home/"figures"/"smoke"/"s5vh"/"claims.png").exists()


def test_separated_centers_are_judged_by_their_record(home):
    data, metrics = runs.load_data("spoken-digits"), {"shortest": {"semantic": 3}, "wanted": 4}
    config = runs.settle(train_config("spoken-digits", "smoke", bits=16), data)
    runs.store(config, "smoke", data, "cpu", None, "centers", metrics=metrics, seconds={})
    table = run_notebook("s5vh/claims")
    assert table.effect["centers are well separated"] == -1 and table.verdict["centers are well separated"] == "does not hold (one seed)"


def test_runs_that_nobody_looked_at_have_no_curve(home):
    "Looks are not part of a run's name, so a record may lack them."
    blind, seen = pretend(.9, looks=()), pretend(.5, beta=0.)
    table = run_notebook("s5vh/claims")
    assert table.verdict["with alignment training converges faster"] == "not run yet"
    assert table.verdict["with alignment training ends better"] == "holds (one seed)"
    with pytest.raises(ValueError, match=f"history of {blind.name}: expected looks with map@5") as error: run_notebook("s5vh/convergence")
    assert seen.name not in str(error.value)


def test_notebook_of_paper_2(home):
    table = run_notebook("dmmh/claims")
    assert set(table[table.notebook != "dmmh/arithmetic"].verdict) == NONE
    assert table.verdict["thirteen baselines"] == "does not hold" and table.effect["thirteen baselines"] == 12
    pretend(.8, "emoji"), pretend(.9, "emoji", mixer="none")
    assert run_notebook("dmmh/claims").verdict["Mamba helps"] == "does not hold (one seed)"


def test_times_of_a_gpu_are_shown_where_there_is_none(home):
    "Records of measurements are enough to draw the artefact of speed again; as long as some of the GPU's are missing, it is left out."
    data, times = runs.load_data("emoji"), dict(ms=2., ms_single=1., peak_mb=3., pairs=512, weights_mb=4.)
    def measured(config, where):
        runs.store(runs.settle(config, data), "smoke", data, "cpu", None, f"speed on {where}", metrics=times, seconds={"train": 0})
    changes = [PAIR_VARIANTS[row] for row in ("DMMH", "without Mamba", "with Transformer", "plain MLPs")]
    networks = [train_config("emoji", "smoke", bits=16, **change) for change in changes]
    for change in changes: pretend(.8, "emoji", **change)
    for config in networks: measured(config, "cpu")
    for config in (BaselineConfig("emoji", method, bits=16) for method in ("supervised", "itq")):
        runs.store(runs.settle(config, data), "smoke", data, "cpu", None, metrics={"map": .4}, seconds={"train": 0})
        measured(config, "cpu")
    for config in networks[:3]: measured(config, "cuda")
    if not torch.cuda.is_available(): assert set(run_cells("dmmh/speed")["table"].on) == {"cpu"}
    measured(networks[3], "cuda")
    assert run_cells("dmmh/speed")["table"].on.value_counts().to_dict() == {"cpu": 6, "cuda": 4}
