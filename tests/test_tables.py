"Paper 1's tables from made-up records: retrieval, gain, schedule; a claim about the lead over rivals."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from s5vh_nb.basics.config import VARIANTS, BaselineConfig
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.experiments import (
    EXPERIMENTS,
    NO_DEPTH,
    WITH_DEPTH,
    WITHOUT_DEPTH,
    config_of,
    schedule_row,
    share_row,
)
from s5vh_nb.evidence.report import expected

LSH = [BaselineConfig(method="lsh", view="flat", bits=16, seed=seed) for seed in (1, 2)]
ROOT = Path(__file__).resolve().parent.parent
HALF = BaselineConfig(method="lsh", view="mean", bits=16)  # one of two seeds


def network(bits=16, seed=1, **changes):
    return train_config("spoken-digits", "smoke", bits=bits, seed=seed, **changes)


@pytest.fixture
def tables(cells, pretend, checkout):
    "A function of runs: what the retrieval notebook then saves for two seeds and two lengths, by name."

    def of(*configs):
        for config in configs:
            pretend(config)
        cells("s5vh/retrieval", seeds=[1, 2], bits=[16, 64])
        return {path.stem: pd.read_csv(path) for path in checkout.rglob("tables/*.csv")}

    return of


def test_a_method_without_all_seeds_is_named_and_left_out(tables, capsys):
    found = tables(*LSH, HALF, network(), network(seed=2))
    rows = found["s5vh_retrieval"][["bits", "method"]].values.tolist()
    assert rows == [[16, "S5VH"], [16, "LSH, flattened"]]
    verdict = found["s5vh_retrieval_verdict"]
    assert verdict[["bits", "best rival", "seeds"]].values.tolist() == [[16, "LSH, flattened", 2]]
    printed = capsys.readouterr().out
    names, lines = (
        "ConMH-style; SSTH-style; SSTH; BTH; ConMH; AutoSSVH; WSCH; "
        "ITQ, flattened; ITQ, time mean; LSH, time mean; Plus",
        printed.splitlines(),
    )
    assert lines[0] == f"left out, not all seeds run: {names} (spoken-digits, 16 bits)"
    assert lines[1].startswith("left out, not all seeds run: S5VH; ")
    assert lines[1].endswith(" (spoken-digits, 64 bits)")


def test_a_table_without_a_pair_to_compare_has_no_verdict(tables):
    assert set(tables(*LSH)) == {"s5vh_retrieval"}


def test_a_short_run_stands_beside_what_is_expected(cells, pretend, checkout, capsys):
    pretend_rows(pretend, "s5vh/retrieval", {"S5VH": 0.8, "ConMH-style": 0.2})
    places = (f"s5vh/retrieval,smoke,spoken-digits,16,{row}" for row in ("S5VH,0,.01", "ConMH-style,.5,.6"))
    lines = "\n".join(["artefact,profile,dataset,bits,row,GmAP,tolerance", *places])
    (checkout / "results" / "expected.csv").write_text(lines, encoding="utf-8")
    cells("s5vh/retrieval")
    *_, as_expected, better, short = capsys.readouterr().out.splitlines()
    assert as_expected == "Not as expected: the GmAP of S5VH."
    assert (
        better == "S5VH is better than 1 of 1 rivals here."
    )  # no record of the full profile in this project
    assert short.endswith("they show that the notebook runs, not which row is ahead.")


def test_expected_values_are_those_of_the_main_job():
    main, rows = EXPERIMENTS["s5vh/retrieval"], pd.read_csv(ROOT / "results" / "expected.csv")
    names, lengths = main.datasets["quick"], main.bits["quick"]
    places = [(name, bits, row) for name in names for bits in lengths for row in main.rows_in("quick")]
    assert rows[["dataset", "bits", "row"]].apply(tuple, axis=1).tolist() == places
    assert set(rows.epochs.dropna()) == {main.epochs["quick"]}


def test_expected_values_follow_from_their_records():
    "Each expected score is the mean over the seeds of one configuration, whose records are kept."
    rows, by_config = pd.read_csv(ROOT / "results" / "expected.csv"), {}
    for record in Archive(ROOT / "results" / "expected", "quick").records():
        config = str({name: value for name, value in record.config.items() if name != "seed"})
        by_config.setdefault(config, []).append(record.metrics["GmAP"])
    means = sorted(round(np.mean(scores), 4) for scores in by_config.values())
    assert means == sorted(rows.GmAP) and {len(scores) for scores in by_config.values()} == {*rows.seeds}


def test_quick_is_long_enough_to_stand_where_the_full_profile_does():
    "S5VH's expected lead over ITQ lies in the interval that the full profile has for it."
    scores = expected("s5vh/retrieval", "quick", ROOT).GmAP
    lead = scores["spoken-digits", 64, "S5VH"] - scores["spoken-digits", 64, "ITQ, flattened"]
    details = pd.read_csv(ROOT / "results" / "full" / "tables" / "s5vh_claims_details.csv")
    known = details.set_index(["claim", "data", "setting"])
    there = known.loc[("S5VH beats ITQ, flattened", "spoken-digits", "64 bits")]
    assert there.low < lead < there.high


def test_a_table_without_records_is_refused(tables):
    expected = "results/smoke: expected all seeds of at least one row of s5vh/retrieval, found none"
    with pytest.raises(FileNotFoundError, match=expected):
        tables(HALF)


LEADS = {
    "a lead that shrinks": ({16: 0.8, 64: 0.6}, {16: 0.5, 64: 0.5}, "holds (one seed)"),
    "a lead that grows": ({16: 0.8, 64: 0.9}, {16: 0.5, 64: 0.3}, "does not hold (one seed)"),
    "no lead, least behind at few bits": ({16: 0.6, 64: 0.4}, {16: 0.7, 64: 0.9}, "does not hold (one seed)"),
}


@pytest.mark.parametrize("ours, rival, found", LEADS.values(), ids=LEADS)
def test_a_lead_at_few_bits_must_be_a_lead(cells, pretend, ours, rival, found):
    for bits, quality in ours.items():
        pretend(network(bits), quality)
        for name in ("conmh-style", "ssth-style"):
            pretend(network(bits, **VARIANTS[name]), rival[bits])
        for view in ("flat", "mean"):
            pretend(BaselineConfig(view=view, bits=bits), rival[bits])
    table = cells("s5vh/claims", bits=[16, 64])["table"].set_index("claim")
    assert table.verdict["its lead is largest at few bits"] == found


def test_the_audit_says_what_records_there_are(cells, pretend):
    "Its first sentences, from the base alone, and with rows that are better or worse than what they replace."
    pretend(network(), 0.6)
    depth, alone, together, _, rivals = cells("s5vh/audit")["to_know"]
    assert "; a training without it has not been run yet. " in depth
    assert depth.endswith("'released' together have not been run yet.")
    assert alone == "No other deviation has been run alone yet."
    assert together.endswith("; alone, the first has not been run yet, and the second has not been run yet.")
    assert rivals.endswith("and with RWKV this has not been run yet.")
    pretend(network(drop_path=0.0), 0.2)
    pretend(network(tied=True), 0.7)
    pretend(network(centers="hadamard"), 0.6)
    pretend(network(mixer="LSTM"), 0.5)
    pretend(network(mixer="LSTM", frozen=True), 0.3)
    found = cells("s5vh/audit")
    depth, alone, _, _, rivals = found["to_know"]
    assert "; it raises GmAP by 0." in depth
    assert alone.startswith(
        "Of 2 other deviations that were tried alone, 1 has a measurable effect; it is that of"
    )
    assert "'one set of weights for both directions', which raises GmAP by 0." in alone
    assert "; with LSTM this lowers GmAP by 0." in rivals
    assert set(found["table"].place) == {"10", "3", "12", "4", "6"}


def test_the_audit_has_four_rows_on_a_second_set(cells, pretend, checkout, capsys):
    two, experiment = ["spoken-digits", "spoken-pairs"], EXPERIMENTS["s5vh/audit"]
    assert experiment.datasets["full"] == ("spoken-digits", "asl-words")
    everywhere = ["base", "released", "released start", NO_DEPTH]
    assert [row for row in experiment.rows if experiment.runs_on(row, two[1], two)] == everywhere
    pretend(network(), 0.6)
    for row, quality in {"base": 0.5, "released": 0.8, NO_DEPTH: 0.9}.items():
        pretend(config_of(experiment.rows[row], two[1], "smoke", 16, 1), quality)
    cells("s5vh/audit", dataset=two)
    table = pd.read_csv(checkout / "results" / "smoke" / "tables" / "s5vh_audit_sets.csv")
    assert set(table.dataset) == {two[1]}
    effects = table.set_index("as released")["effect on GmAP"]
    assert effects["the whole release"] > 0 > effects["stochastic depth"]
    printed = capsys.readouterr().out
    assert "On spoken-pairs, stochastic depth lowers GmAP by 0." in printed
    assert "The start values alone have not been run yet." in printed


def pretend_rows(pretend, experiment, qualities):
    "Keep a made-up record for each of these rows."
    for row, quality in qualities.items():
        pretend(config_of(EXPERIMENTS[experiment].rows[row], "spoken-digits", "smoke", 16, 1), quality)


DEPTH_ADDS = {
    "S5VH" + WITH_DEPTH: 0.8,
    "S5VH" + WITHOUT_DEPTH: 0.4,
    "S5VH without alignment" + WITH_DEPTH: 0.7,
    "S5VH without alignment" + WITHOUT_DEPTH: 0.5,
    "S5VH with one direction" + WITH_DEPTH: 0.75,
    "ConMH-style" + WITH_DEPTH: 0.7,
    "ConMH-style" + WITHOUT_DEPTH: 0.8,
}


def test_gain_is_taken_apart(cells, pretend, capsys):
    pretend_rows(pretend, "s5vh/gain", DEPTH_ADDS)
    parts = cells("s5vh/gain")["parts"].set_index(["part", "when"])
    words = parts["it is"].to_dict()
    assert words["stochastic depth", "in S5VH"] == "better (one seed)"
    assert words["stochastic depth", "in ConMH-style"] == "worse (one seed)"
    assert words["alignment", "without stochastic depth"] == "worse (one seed)"
    assert ("stochastic depth", "in S5VH with one direction") not in words  # one of its two rows is missing
    assert ("second direction", "interaction") not in words
    gains = parts.gain["S5VH instead of ConMH-style"]
    both = gains["with stochastic depth"] - gains["without stochastic depth"]
    assert gains["interaction"] == pytest.approx(both)
    printed = capsys.readouterr().out
    assert "in 3 networks: spoken-digits" in printed and "(better in 2, worse in 1 of 3)" in printed
    assert "one of these parts: stochastic depth in 1 of 1 cases" in printed


def test_gain_of_some_rows_has_no_parts(cells, pretend, checkout):
    pretend_rows(pretend, "s5vh/gain", {"ConMH-style" + WITH_DEPTH: 0.5, "ITQ, flattened": 0.5})
    assert cells("s5vh/gain")["parts"].empty
    assert not list(checkout.rglob("tables/*.csv")) and list(checkout.rglob("gain.png"))


NETWORKS = {name: name + WITH_DEPTH for name in ("S5VH", "ConMH-style", "SSTH-style")}
ALL = {NETWORKS["S5VH"]: 0.9, NETWORKS["ConMH-style"]: 0.5, NETWORKS["SSTH-style"]: 0.4}
HALF_OF_THEM = {share_row(NETWORKS["S5VH"], 1 / 2): 0.6, share_row(NETWORKS["ConMH-style"], 1 / 2): 0.5}


def test_schedule_and_size(cells, pretend, capsys):
    shorter = {schedule_row(NETWORKS["SSTH-style"], 15): 0.7}
    pretend_rows(pretend, "s5vh/schedule", {**ALL, **shorter, **HALF_OF_THEM, "ITQ, flattened": 0.5})
    found = cells("s5vh/schedule")
    best = found["best"].iloc[0]
    assert [best.network, best["best epochs"], best["whole schedule"]] == [NETWORKS["SSTH-style"], 15, 2]
    assert best["whole less best"] < 0 and best["it is"] == "better (one seed)"
    points = found["points"]
    assert set(points.steps[points.network != NETWORKS["SSTH-style"]]) == {2 * 18}
    leads = found["leads"].set_index("clips").gain
    trend = found["trends"].set_index("what").loc["S5VH less ConMH-style"]
    assert trend["per doubling"] == pytest.approx(leads[2250] - leads[1125])
    reached = leads[2250] + np.log2(9537 / 2250) * trend["per doubling"]
    assert trend["line at 9537"] == pytest.approx(reached)
    assert "it is better in 2 and worse in 0 of 2 trainings" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [["ITQ, flattened"], [NETWORKS["S5VH"]], list(HALF_OF_THEM)[:1]])
def test_schedule_of_some_rows(cells, pretend, rows):
    pretend_rows(pretend, "s5vh/schedule", dict.fromkeys(rows, 0.5))
    pretend_rows(pretend, "s5vh/schedule/epochs", {"S5VH as released": 0.5})
    found = cells("s5vh/schedule")
    assert found["best"].empty and found["leads"].empty and found["trends"].empty
    assert len(found["comparisons"]) == (3 if NETWORKS["S5VH"] in rows else 0)


def test_along_one_training(cells, pretend, capsys):
    "Both sides at equal epochs, and at the best of each; the end is that of the records, not of the curves."
    scores = {"S5VH": (0.9, (0.3, 0.5, 0.2)), "without contrast": (0.4, (0.1, 0.1, 0.6))}
    for row, (quality, curve) in scores.items():
        config = config_of(EXPERIMENTS["s5vh/schedule/epochs"].rows[row], "spoken-digits", "smoke", 16, 1)
        pretend(config, quality, curve)
    lines = cells("s5vh/schedule")["comparisons"].set_index("at")
    assert list(lines.index) == ["epoch 1", "epoch 3, the last", "best of each"]
    assert lines.gain["epoch 1"] == pytest.approx(0.2) and lines.gain["best of each"] == pytest.approx(-0.1)
    assert lines.gain["epoch 3, the last"] > 0.3 and lines["S5VH is"].iloc[1] == "better (one seed)"
    printed = capsys.readouterr().out
    assert "The GmAP of S5VH is highest: spoken-digits after 2 epochs, 0.500 (0.200 at the end)." in printed
    assert "at the end: S5VH is better than S5VH without contrast (+" in printed
