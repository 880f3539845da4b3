"Claims: the rule on made-up intervals; notebooks of claims and of speed on made-up records, and none."

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from s5vh_nb.basics.config import BaselineConfig
from s5vh_nb.evidence.claims import Claim, claims_table, conclusion, weakest
from s5vh_nb.evidence.experiments import config_of
from s5vh_nb.evidence.judge import (
    effect,
    epochs_saved,
    gain,
    gain_colour,
    gain_terms,
    percent_terms,
    plot_gains,
    scores_of,
    verdict,
)
from s5vh_nb.evidence.report import VERDICTS
from s5vh_nb.evidence.statistics import Interval
from s5vh_nb.evidence.study import open_study

NONE = {"not run yet", "not testable here"}


@pytest.mark.parametrize(
    "ends, wanted, found",
    [
        ((0.01, 0.2), (0, np.inf), "holds"),
        ((-0.2, -0.01), (0, np.inf), "does not hold"),
        ((-0.1, 0.2), (0, np.inf), "undecided"),
        ((0, 0.2), (0, np.inf), "undecided"),
        ((1.5, 5), (1, 6), "holds"),
        ((1.5, 7), (1, 6), "undecided"),
        ((7, 8), (1, 6), "does not hold"),
        ((-3, 0.5), (1, 6), "does not hold"),
        ((0, 7), (1, 6), "undecided"),
        ((0.8, 1.05), (-np.inf, 1.1), "holds"),
        ((1.2, 1.3), (-np.inf, 1.1), "does not hold"),
        ((np.nan, np.nan), (0, np.inf), "undecided"),
    ],
)
def test_verdict(ends, wanted, found):
    assert verdict(Interval(np.mean(ends), *ends), wanted) == found


GOOD, OPEN, BAD = (Interval(mean, mean - 0.1, mean + 0.1) for mean in (0.2, 0.05, -0.2))
WIDE = [Interval(mean, np.nan, np.nan) for mean in (0.3, 0.1)]  # of one seed, where a t-interval is none


@pytest.mark.parametrize(
    "effects, seeds, found, at",
    [
        ([GOOD, GOOD], 5, "holds", 0),
        ([GOOD, GOOD], 2, "holds (two seeds)", 0),
        ([GOOD, OPEN], 1, "undecided", 1),
        ([OPEN, BAD, GOOD], 1, "does not hold (one seed)", 1),
        ([GOOD], None, "holds", 0),
        ([GOOD, None], 5, "holds so far", 0),
        ([None, OPEN], 1, "undecided so far", 1),
        ([BAD, None], 5, "does not hold", 0),
        ([GOOD, None], 1, "holds so far (one seed)", 0),
        ([None], 5, "not run yet", None),
        ([], 5, "not testable here", None),
        (WIDE, 1, "undecided", 1),
    ],
)
def test_a_claim_is_as_strong_as_its_weakest_comparison(effects, seeds, found, at):
    claim = Claim("A beats B", "A less B", "s5vh/retrieval", "made up", dict(enumerate(effects)), seeds)
    assert (conclusion(claim), weakest(claim)) == (found, at)
    line = claims_table([claim]).iloc[0]
    assert line.verdict == found
    assert (line.effect is None) == (at is None)


def config(row, artefact="s5vh/temporal", dataset="spoken-digits", seed=1):
    "A run of an artefact in profile smoke."
    return config_of(open_study(artefact, "smoke").rows[row], dataset, "smoke", 16, seed)


BASE, WITHOUT_ALIGNMENT = "TR + CL + CA", "TR + CL"


def test_effects_of_made_up_runs(pretend):
    study = open_study("s5vh/losses", "smoke", seeds=[1])
    place = study.datasets[0], 16
    for row, quality in ((BASE, 0.9), (WITHOUT_ALIGNMENT, 0.5)):
        pretend(config(row, "s5vh/losses"), quality)
    good, bad = (study.find(*place, row) for row in (BASE, WITHOUT_ALIGNMENT))
    two_seeds = open_study("s5vh/losses", "smoke", seeds=[1, 2])
    assert two_seeds.find(*place, BASE) is None  # the record of one of two seeds is not enough
    over = gain(good, bad, study.store)
    assert 0 < over.low < over.mean < over.high
    assert gain(good, None, study.store) is None is effect(percent_terms(None, bad, study.store), study.store)
    share = effect(percent_terms(good, bad, study.store), study.store)
    assert share.mean == pytest.approx(100 * over.mean / scores_of(bad, study.store).mean())


def test_rows_are_compared_at_the_seeds_that_both_have(store):
    first, second = (store.get(BaselineConfig(bits=16, seed=seed)) for seed in (1, 2))
    assert gain([first, second], [second], store).mean == 0
    assert gain([first, second], [second, first], store) == Interval(0, 0, 0)  # in any order
    alone = effect(percent_terms([second], [second], store), store)
    assert effect(percent_terms([second], [first, second], store), store) == alone
    with pytest.raises(ValueError, match="seeds of the rows: expected some that all have"):
        gain([first], [second], store)


def test_curves_are_compared_at_the_seeds_that_both_have(pretend, store):
    ours, theirs = (
        [pretend(config(row, seed=seed)) for seed in (1, 2)] for row in ("Mamba, both", "Mamba, tied")
    )
    assert epochs_saved(ours, theirs[1:], store).mean == 0
    blind = pretend(config("Mamba, tied", seed=2), evaluations=())
    assert epochs_saved(ours, [theirs[0], blind], store) is None
    assert epochs_saved(ours[:1], theirs[1:], store) is None


def test_a_gain_of_nothing_is_drawn_as_undecided():
    assert [gain_colour(x) for x in (GOOD, OPEN, BAD, Interval(0, 0, 0))] == [
        VERDICTS[found] for found in ("holds", "undecided", "does not hold", "undecided")
    ]


def test_rows_of_different_data_are_not_compared(pretend, store):
    digits, pairs = (pretend(BaselineConfig(name, bits=16)) for name in ("spoken-digits", "spoken-pairs"))
    with pytest.raises(ValueError, match="data of the rows: expected one set"):
        effect(gain_terms([digits], [pairs]), store)


def run(cells, name):
    return cells(name)["table"].set_index("claim")


def test_notebook_of_paper_1(cells, pretend, checkout):
    assert set(run(cells, "s5vh/claims").verdict) == NONE
    assert not list((checkout / "results" / "smoke").rglob("runs/*"))
    pretend(config("Mamba, both"), 0.9)
    pretend(config(WITHOUT_ALIGNMENT, "s5vh/losses"), 0.5)
    pretend(config("LSTM, both"), 0.95)
    table = run(cells, "s5vh/claims")
    decided = table.verdict[~table.verdict.isin(NONE)]
    assert decided.to_dict() == {
        "Mamba beats LSTM": "does not hold (one seed)",
        "center alignment helps": "holds (one seed)",
        "with alignment training converges faster": "undecided",  # a t-interval of one seed is none
        "with alignment training ends better": "holds (one seed)",
    }
    assert table.low["center alignment helps"] > 0
    assert table.notebook["Mamba beats LSTM"] == "s5vh/temporal"
    saved = pd.read_csv(checkout / "results" / "smoke" / "tables" / "s5vh_claims.csv")
    assert saved.verdict.tolist() == table.verdict.tolist()
    assert (checkout / "figures" / "smoke" / "s5vh" / "claims.png").exists()


ROUTE, NEW = "spoken-pairs to spoken-digits, 64 bits", "animated-emoji:even to animated-emoji:odd, 16 bits"
BOTH, MORE = "spoken-digits, spoken-pairs", "spoken-digits, spoken-pairs, animated-emoji:even"
MOVED, DEPTH = "after transfer it beats ITQ, time mean", "S5VH now has stochastic depth"
CHANGES = [  # claim, data, findings and seeds now -> why its verdict of then changed; None: it is the same
    ((MOVED, BOTH, {ROUTE: GOOD}, 5), DEPTH),  # undecided then
    ((MOVED, BOTH, {ROUTE: BAD, NEW: None}, 5), DEPTH),
    ((MOVED, MORE, {ROUTE: BAD, NEW: BAD}, 5), DEPTH),
    ((MOVED, MORE, {ROUTE: OPEN, NEW: BAD}, 5), "more sets or settings are compared now"),
    ((MOVED, MORE, {ROUTE: None, NEW: BAD}, 5), "what decided then has not been run again"),
    ((MOVED, MORE, {ROUTE: OPEN, NEW: GOOD}, 5), None),
    ((MOVED, "spoken-digits", {ROUTE: BAD}, 5), None),  # on less data
    ((MOVED, BOTH, {ROUTE: None}, 5), None),
    (("Mamba beats RetNet", "spoken-digits", {"64 bits": OPEN}, 3), f"{DEPTH} (3 seeds, not 5)"),
    (
        ("time grows at most linearly with t", "random features", {"batch 1, t up to 200": BAD}, None),
        "measured in another way",
    ),
]


def test_why_verdicts_changed(cells):
    changes = cells("s5vh/claims")["changes"]
    for (says, *now), cause in CHANGES:
        lines = changes([Claim(says, "A less B", "made up", *now)])
        assert [line["cause"] for line in lines] == [cause] * (cause is not None), (says, now)


def test_verdicts_of_then_are_those_of_their_comparisons(cells):
    space = cells("s5vh/claims")
    details = space["DETAILS"].set_index(["claim", "data", "setting"]).effect
    judged = space["THEN"].dropna(subset="effect")
    for then in judged.itertuples():
        assert details[then.claim, then.data, then.weakest] == pytest.approx(then.effect, abs=1e-4)
    assert set(zip(judged.claim, judged.data)) == set(details.index.droplevel("setting"))


def test_separated_centers_are_judged_by_their_record(cells, keep):
    keep(config("semantic", "s5vh/centers"), {"shortest": {"semantic": 3}, "wanted": 4}, "centers")
    line = run(cells, "s5vh/claims").loc["centers are well separated"]
    assert (line.effect, line.verdict) == (-1, "does not hold (one seed)")


def test_runs_without_evaluations_have_no_curve(cells, pretend):
    "Evaluations are not part of a run's name, so a record may lack them."
    blind = pretend(config("Mamba, both"), 0.9, evaluations=())
    seen = pretend(config(WITHOUT_ALIGNMENT, "s5vh/losses"), 0.5)
    table = run(cells, "s5vh/claims")
    assert table.verdict["with alignment training converges faster"] == "not run yet"
    assert table.verdict["with alignment training ends better"] == "holds (one seed)"
    expected = f"history of {blind.name}: expected evaluations during training"
    with pytest.raises(ValueError, match=expected) as error:
        cells("s5vh/convergence")
    assert seen.name not in str(error.value)


def test_notebook_of_paper_2(cells, pretend):
    table = run(cells, "dmmh/claims")
    assert set(table[table.notebook != "dmmh/arithmetic"].verdict) == NONE
    line = table.loc["thirteen baselines"]
    assert (line.effect, line.verdict) == (12, "does not hold")
    for row, quality in (("DMMH", 0.8), ("without Mamba", 0.9)):
        pretend(config(row, "dmmh/ablations/mixers", "emoji"), quality)
    assert run(cells, "dmmh/claims").verdict["Mamba helps"] == "does not hold (one seed)"


def test_times_of_a_gpu_are_shown_where_there_is_none(cells, keep, pretend):
    "Records of measurements are enough to draw them; while some are missing, the GPU is left out."
    times = dict(ms=2.0, ms_single=1.0, peak_mb=3.0, pairs=512, weights_mb=4.0)
    rows = {row: config(row, "dmmh/speed", "emoji") for row in open_study("dmmh/speed", "smoke").rows}
    networks = [made for made in rows.values() if not isinstance(made, BaselineConfig)]
    for made in rows.values():
        pretend(made, 0.8)
        keep(made, times, "speed on cpu")
    for made in networks[:3]:
        keep(made, times, "speed on cuda")
    if not torch.cuda.is_available():
        assert set(cells("dmmh/speed")["table"].on) == {"cpu"}
    keep(networks[3], times, "speed on cuda")
    assert cells("dmmh/speed")["table"].on.value_counts().to_dict() == {"cpu": 6, "cuda": 4}


def test_gains_over_a_base_that_is_missing_are_left_out():
    rows = [("A", 16, "x", 0.5, 0.01, 0.0, 0.02), ("B", 16, "x", 0.5, np.nan, np.nan, np.nan)]
    fig = plot_gains(
        pd.DataFrame(rows, columns=["dataset", "bits", "row", "GmAP", "gain", "low", "high"]), "base"
    )
    fig.draw_without_rendering()
    assert [len(ax.lines) for ax in fig.axes] == [3, 1]  # a gain, its interval, zero; zero
    plt.close(fig)
