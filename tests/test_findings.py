"What the README says of the evidence, from made-up tables: numbers are counted, words follow signs."

import pandas as pd
import pytest

from s5vh_nb.evidence.findings import findings

SETS = ("spoken-digits", "asl-words")
PARTS = ("alignment", "second direction", "Mamba instead of the Transformer")
DEPTH = "stochastic depth"


def claims(*verdicts):
    return pd.DataFrame({"claim": [f"S5VH beats {i}" for i in range(len(verdicts))], "verdict": verdicts})


def lines(*gains, names=("gain", "low", "high"), **columns):
    "A line per gain, with an interval of 0.02 around it."
    ends = [dict(zip(names, (gain, gain - 0.01, gain + 0.01))) for gain in gains]
    return pd.DataFrame(ends).assign(**columns)


def parts(depth, others, rival):
    "The table of parts of two data sets, each with these gains."
    rows = [(DEPTH, "in S5VH", depth), ("S5VH instead of ConMH-style", f"with {DEPTH}", rival)]
    rows += [(part, f"with {DEPTH}", others) for part in PARTS]
    tables = [
        lines(gain, part=part, when=when, dataset=d, bits=16) for part, when, gain in rows for d in SETS
    ]
    return pd.concat(tables)


RIVALS = dict(names=("gain", "gain low", "gain high"))
COPIES = {"extractor": ["lite0", "lite0", "random", "random"], "edit": ["cropped", "darker"] * 2}
TABLES = {
    "s5vh_claims": claims("holds", "holds so far", "does not hold (one seed)", "undecided", "not run yet"),
    "dmmh_claims": claims("holds", "undecided so far", "not testable here"),
    "s5vh_gain_parts": parts(0.05, -0.02, -0.03),
    "s5vh_audit": pd.DataFrame(
        {
            "place": ["1 2 10", "10", "6"],
            "as released": ["the whole release", DEPTH, "best evaluation"],
            "dataset": SETS[0],
            "bits": 64,
            "effect on GmAP": [0.09, 0.06, -0.03],
        }
    ),
    "s5vh_retrieval_verdict": lines(
        0.05, -0.03, 0.0, **{"best rival": ["ConMH-style", "ITQ, flattened", "ITQ, time mean"]}, **RIVALS
    ),
    "s5vh_retrieval_plus": lines(
        0.125, 0.02, -0.02, dataset=["asl-words", "animated-emoji", "asl-words"], **RIVALS
    ),
    "beyond_copies_gains": pd.concat(
        [
            lines(0.1, 0.0, -0.1, 0.1, rival="ITQ, flattened", row="S5VH", bits=64, **COPIES),
            lines(-0.1, -0.1, 0.0, 0.1, rival="ITQ, flattened", row="Plus", bits=64, **COPIES),
            lines(0.1, rival="ITQ, flattened", row="S5VH", bits=16, extractor="lite0", edit="cropped"),
            lines(
                0.1, rival="ITQ, flattened", row="S5VH", bits=64, extractor="lite0", edit="mean of the edits"
            ),
            lines(0.1, rival="ITQ, time mean", row="S5VH", bits=64, extractor="lite0", edit="cropped"),
        ]
    ),
    "dmmh_claims_details": pd.concat(
        [
            lines(0.1, 0.2, names=("effect", "low", "high"), claim="DMMH beats ITQ"),
            lines(0.1, 0.0, names=("effect", "low", "high"), claim="DMMH beats itself with a Transformer"),
            pd.DataFrame({"claim": ["DMMH beats BSTH"]}),  # not run yet
            lines(-0.1, 0.0, names=("effect", "low", "high"), claim="Mamba helps"),
        ]
    ),
}


@pytest.fixture
def said(tmp_path):
    "A function of tables that differ from those above: the sentences."

    def of(**changed):
        for name, table in (TABLES | changed).items():
            table.to_csv(tmp_path / f"{name}.csv", index=False)
        return findings(tmp_path)

    return of


def test_findings_count(said):
    found = said()
    assert found["Claims"] == (
        "S5VH's claims hold in 2 of 4 checks, fail at one setting or more in 1 and are undecided in 1. "
        "Beside these, 1 waits for runs. "
        "DMMH's claims hold in 1 of 2 checks, fail at one setting or more in 0 and are undecided in 1. "
        "Beside these, 1 cannot be tested here."
    )
    depth = found["Stochastic depth"]
    assert "better in 2 of 2 cases, by up to 0.050 GmAP, and worse in 0. On spoken-digits at 64" in depth
    assert depth.endswith("bits, no other single difference between code and paper changes GmAP as much.")
    gain = found["Where the gain comes from"]
    assert gain.startswith(
        "With stochastic depth in every network, on spoken-digits and asl-words at 16 bits: S"
    )
    assert "S5VH is better than a ConMH-style Transformer in 0 of 2 cases and worse in 2." in gain
    assert "better with center alignment in 0 of 2 (worse in 2), with a second direction in 0 of 2" in gain
    best = found["The best method"]
    assert best.startswith(
        "S5VH is better than the best of its rivals, picked by these same scores, in 1 of 3"
    )
    assert "worse in 1. There ITQ, which trains no network, is ahead. In these cases" in best
    assert "has stochastic depth, and rivals as published are still being run. Our own" in best
    assert (
        "in 2 of 3 cases, by up to 0.125 GmAP, and worse in 1: better in 1 of 2 on asl-words, whose" in best
    )
    assert best.endswith("; better in 1 of 1 on animated-emoji, where nothing was chosen.")
    assert found["Copies of a video"] == (
        "From copies of animated emoji (2 edits, 2 frame extractors) S5VH's codes of 64 bits find the "
        "original better than ITQ's in 2 of 4 combinations and worse in 1. "
        "Plus is better than ITQ in 1 and worse in 2."
    )
    assert found["DMMH"] == (
        "DMMH is better than 1 of 2 rivals at every code length. The exception is DMMH with a Transformer. "
        "No rival is better than DMMH at any length. "
        "DMMH is better without its Mamba layers in 1 of 2 (worse in 0) and "
        "with a Transformer in their place in 0 of 2 (worse in 1)."
    )


def test_words_follow_signs(said):
    "Where more runs turn an effect round, no sentence keeps its old words."
    audit = TABLES["s5vh_audit"].assign(**{"effect on GmAP": [0.09, -0.01, -0.03]})
    beaten = lines(-0.05, -0.03, **{"best rival": ["ConMH-style", "ITQ, flattened"]}, **RIVALS)
    found = said(
        s5vh_gain_parts=parts(-0.05, 0.02, 0.03),
        s5vh_audit=audit,
        s5vh_retrieval_verdict=beaten,
        s5vh_retrieval_plus=lines(-0.2, dataset="animated-emoji", **RIVALS),
        s5vh_claims=claims("holds"),
    )
    assert "better in 0 of 2 cases and worse in 2. On spoken-digits" in found["Stochastic depth"]
    assert found["Stochastic depth"].endswith("another difference changes GmAP most: best evaluation.")
    gain = found["Where the gain comes from"]
    assert "in 2 of 2 cases and worse in 0." in gain
    assert gain.endswith("and with Mamba in place of a Transformer in 2 of 2 (worse in 0).")
    assert "worse in 2. There ConMH-style and ITQ are ahead. In these cases" in found["The best method"]
    assert "alone has stochastic depth. Our own" in found["The best method"]
    assert found["The best method"].endswith(
        "worse in 1: better in 0 of 1 on animated-emoji, where nothing was chosen."
    )
    assert found["Claims"].startswith(
        "S5VH's claims hold in 1 of 1 checks, fail at one setting or more in 0 and are undecided in 0. DMMH's"
    )
    rivals = lines(0.1, -0.1, names=("effect", "low", "high"), claim=["DMMH beats ITQ", "DMMH beats LSH"])
    stands = said(dmmh_claims_details=rivals)["DMMH"]
    assert stands.endswith("The exception is LSH. At some length DMMH is worse than LSH.")
    ahead = said(s5vh_retrieval_verdict=lines(0.05, **{"best rival": "ITQ, flattened"}, **RIVALS))
    assert "in 1 of 1 cases and worse in 0. In these cases" in ahead["The best method"]


def test_nothing_is_said_of_what_has_not_been_run(said):
    "Empty tables, and data sets of which a part is missing."
    empty = {name: table.iloc[:0] for name, table in TABLES.items() if not name.endswith("claims")}
    assert set(said(**empty)) == {"Claims"}
    some = TABLES["s5vh_gain_parts"]
    without = some[(some.part != "alignment") | (some.dataset != "asl-words")]
    gain = said(s5vh_gain_parts=without)["Where the gain comes from"]
    assert "center alignment in 0 of 1 (worse in 1), with a second direction in 0 of 2" in gain
    without = some[some.part != "alignment"]
    assert "alignment" not in said(s5vh_gain_parts=without)["Where the gain comes from"]


def test_unknown_verdicts_and_missing_tables_are_named(said, tmp_path):
    with pytest.raises(ValueError, match="verdict: expected one that begins with one of .*, found 'maybe'"):
        said(s5vh_claims=claims("maybe"))
    said()
    (tmp_path / "s5vh_audit.csv").unlink()
    with pytest.raises(FileNotFoundError, match="s5vh_audit.csv: expected a table"):
        findings(tmp_path)
