"""Profile `paper` of paper 2 from end to end: all three official layouts in both formats, by the real command and the real notebooks.

Only the network and the schedule are smoke's, so that it takes seconds.
"""

import pandas as pd
import pytest

from s5vh_nb import config, multimodal, records, reproduce

SIZES = (60, 110, 30) # train (inside the database), database, query
VERSIONS = {"mirflickr25k": "7.3", "nuswide": "5", "mscoco": "7.3"}
STARTUP = f"""
from s5vh_nb import config
config.PAIR_PROFILES["paper"] = {config.PAIR_PROFILES["smoke"] | {"epochs": 2, "batch": 30}}
"""
GIVEN = ("-p", "bits=16", "-p", "seeds=1")

@pytest.fixture
def data_root(tmp_path):
    "Few pairs of random numbers under true names and keys, narrow, with the true number of labels; two files in folders of their own."
    for name, version in VERSIONS.items():
        folder = tmp_path/"data"/("" if name == "mscoco" else name)
        multimodal.write_official_pairs(folder, name, multimodal.synthetic_pairs(name, n=SIZES, di=32, dt=24), version)
    return tmp_path/"data"

@pytest.fixture
def home(project): return project(("nbs/dmmh", "results/published"), STARTUP)

def test_tables_of_all_three_sets(home, data_root, capfd):
    "Table 1 tells the sizes, Table 2 has our rows and the paper's, its claims are judged; no output names the folder of the data."
    tables = home/"results"/"paper"/"tables"
    artefacts = [f"dmmh/{name}" for name in ("table1", "table2", "evaluation", "claims")]
    assert reproduce.main(["reproduce", *artefacts, "--profile", "paper", "--device", "cpu", "-p", f"data_root={data_root}", *GIVEN]) == 0
    warned = capfd.readouterr().err
    for name, layout in ((name, multimodal.PAIR_LAYOUTS[name]) for name in VERSIONS):
        told = f"{layout.file}: not the sizes of {name} in the paper: train pairs: {layout.train} in the paper, 60 here"
        assert told in warned
    sizes = pd.read_csv(tables/"dmmh_table1.csv")
    assert sizes.source.tolist() == ["paper", "here"]*3 and sizes.query("source == 'here'").retrieval.tolist() == [110]*3
    assert set(pd.read_csv(tables/"dmmh_table1_notes.csv").dataset) == set(VERSIONS)
    beside = pd.read_csv(tables/"dmmh_table2_published.csv")
    assert (beside.source == "paper").sum() == 13 and (beside.source == "here").sum() == 8
    assert not beside[[f"{name} 16" for name in VERSIONS]].isna().any(axis=None)
    assert len(pd.read_csv(tables/"dmmh_evaluation.csv")) == 3*8                # eight conventions; the keywords' two are emoji's alone
    claims = pd.read_csv(tables/"dmmh_claims.csv")
    assert claims.data[claims.claim == "it reaches its published mAP"].tolist() == list(VERSIONS)
    waiting = {name: set(rows.verdict) & {"not run yet", "not testable here"} for name, rows in claims.groupby("notebook")}
    assert waiting == {"dmmh/table2": set(), "dmmh/arithmetic": set(), "dmmh/ablations": {"not run yet"}, "dmmh/speed": {"not run yet"}}
    found = [r for r in records.read_all("paper") if r.metrics["row"] == "DMMH"]
    assert {r.data["name"] for r in found} == set(VERSIONS) and all("in the paper" in r.data["notes"] for r in found)
    assert not [path.name for path in (home/"results"/"paper"/"executed").iterdir() if str(data_root) in path.read_text()]

def test_ablations_and_speed_of_a_set(home, data_root):
    given = ("-p", f"data_root={data_root}", "-p", "dataset=mscoco", *GIVEN)
    assert reproduce.main(["reproduce", "dmmh/ablations", "dmmh/speed", "--profile", "paper", "--device", "cpu", *given]) == 0
    table = pd.read_csv(home/"results"/"paper"/"tables"/"dmmh_ablations.csv")
    assert table.row.is_unique and len(table) > 18 and table.dataset.unique().tolist() == ["mscoco"]
    assert ((table.low <= table.gain) & (table.gain <= table.high)).all() and (table.gain[table.row != "DMMH"] != 0).any()
    assert len(pd.read_csv(home/"results"/"paper"/"tables"/"dmmh_ablations_missing.csv")) == 2
    speed = pd.read_csv(home/"results"/"paper"/"tables"/"dmmh_speed.csv")
    assert len(speed) == 6 and not speed.isna().any(axis=None) and set(speed.on) == {"cpu"}
