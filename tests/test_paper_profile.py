"""Profile `paper` from end to end: all four official layouts, by the real command and the real notebook.

Only the network and the schedule are smoke's, so that it takes seconds.
"""

import h5py
import numpy as np
import pandas as pd
import pytest

from s5vh_nb import config, datasets, records, reproduce, runs, training

# train, database, query
SIZES = {"ucf101": (130, 130, 40), "hmdb51": (120, 120, 40), "fcvid": (120, 150, 150), "activitynet": (120, 110, 30)}
REDUCED = config.PROFILES["smoke"] | {"n_centers": 100, "epochs": 3}
STARTUP = f"""
from s5vh_nb import config
config.PROFILES["paper"] = {REDUCED}
"""

def signs(c, k): return np.random.default_rng(0).choice([-1., 1.], (c, k))

pytestmark = pytest.mark.filterwarnings("ignore:.*not the sizes of:UserWarning")

@pytest.fixture
def data_root(tmp_path):
    "Few videos of random numbers under true names, keys and widths; centers for one set in the right number, for another in the wrong one."
    for name, n in SIZES.items(): datasets.write_official(tmp_path/"data"/name, name, datasets.synthetic_like(name, n=n))
    for name in ("hmdb51", "ucf101"):
        with h5py.File(tmp_path/"data"/name/"hash_center_16.h5", "w") as f: f["matrix"] = signs(config.DATASETS[name]["n_centers"], 16)
    return tmp_path/"data"

@pytest.fixture
def home(project): return project(("nbs/s5vh/retrieval.ipynb", "results/published"), STARTUP)

def reproduce_retrieval(data_root):
    given = [word for value in (f"data_root={data_root}", "bits=16", "seeds=1") for word in ("-p", value)]
    return reproduce.main(["reproduce", "s5vh/retrieval", "--profile", "paper", "--device", "cpu", *given])

def test_retrieval_of_all_four_sets(home, data_root, capfd):
    assert reproduce_retrieval(data_root) == 0
    warned = capfd.readouterr().err
    for name in SIZES: assert f"{data_root/name}: not the sizes of {name} in the paper: " in warned
    made = {record.name: record for record in records.read_all("paper")}
    def name_of(name):
        asked = config.train_config(name, "paper", bits=16, seed=1, **REDUCED)
        return records.run_name(runs.describe(runs.settle(asked, runs.load_data(name, str(data_root)))))
    by_name = {name: made[name_of(name)] for name in SIZES}
    for name, (train, database, query) in SIZES.items():
        record, layout = by_name[name], datasets.OFFICIAL[name]
        assert [record.data[split] for split in ("train", "database", "query")] == [train, database, query]
        assert record.config["model"]["d"] == layout.d
        assert f"{layout.train.feats}: videos: {layout.train.size} in the paper, {train} here" in record.data["notes"]
        assert record.config["objective"]["alpha"] == config.DATASETS[name]["alpha"] and len(record.history) == 3
        assert record.metrics["gmap"] > 3/layout.n_classes                     # the stand-in's classes are easy: far above chance
    kinds = {name: record.config["objective"]["centers"] for name, record in by_name.items()}
    its_own = training.stamp(data_root/"hmdb51"/"hash_center_16.h5")
    assert kinds == dict.fromkeys(SIZES, "semantic") | {"hmdb51": its_own}      # ucf101's file has 101
    table, beside = (pd.read_csv(home/"results"/"paper"/"tables"/f"s5vh_{name}.csv") for name in ("retrieval", "retrieval_published"))
    for name in SIZES:
        assert {"S5VH", "ITQ, flattened"} <= {row.removesuffix(" (Nystroem-lifted)") for row in table[table.dataset == name].method}
    assert set(beside.dataset) == set(SIZES)
    assert str(data_root) not in (home/"results"/"paper"/"executed"/"s5vh_retrieval.ipynb").read_text()

@pytest.fixture
def ucf(tmp_path):
    datasets.write_official(tmp_path, "ucf101", datasets.synthetic_like("ucf101", n=(120, 120, 20), d=4))
    return tmp_path

def write_centers(folder, matrix):
    with h5py.File(folder/"hash_center_16.h5", "w") as f: f["matrix"] = matrix

SMALL = config.train_config("ucf101", "paper", bits=16, m=16, depth=1, decoder_m=16, epochs=1)

def train(folder, **changes): return training.train(config.replace(SMALL, **changes), data_root=folder, device="cpu", progress=False)

@pytest.mark.parametrize("matrix, said", [
    (signs(100, 16), r"hash_center_16.h5\[matrix\]: expected shape \(101, 16\), 101 centers of 16 bits, found \(100, 16\)"),
    (np.zeros((101, 16)), r"hash_center_16.h5\[matrix\]: expected only -1 and \+1"),
    (np.ones((101, 16)), r"hash_center_16.h5\[matrix\]: expected 101 distinct rows, found 1")])
def test_a_run_stops_at_a_bad_file_of_centers(ucf, matrix, said):
    write_centers(ucf, matrix)
    with pytest.raises(ValueError, match=said): train(ucf)

def test_centers_in_a_folder_of_several_sets_are_refused(ucf):
    datasets.write_official(ucf, "hmdb51", datasets.synthetic_like("hmdb51", n=(100, 100, 20), d=4))
    write_centers(ucf, signs(101, 16))
    with pytest.raises(ValueError, match=r"hash_center_16.h5: expected one data set in its folder .*, found ucf101, hmdb51"): train(ucf)

def test_runs_that_ask_for_other_centers_do_not_look_at_the_file(ucf):
    write_centers(ucf, np.zeros((101, 16)))
    data = datasets.load("ucf101", ucf)
    assert training.settled(SMALL, data).objective.centers.startswith("file:")
    for changes in (dict(n_centers=50), dict(centers="hadamard"), dict(beta=0.), dict(wired=False), dict(bits=24)):
        assert training.settled(config.replace(SMALL, **changes), data).objective.centers == changes.get("centers", "semantic")

def test_other_centers_are_another_run(ucf, tmp_path, monkeypatch):
    "A file that comes, changes or goes never meets a record or a checkpoint made without it."
    monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path/"home"))
    def ask(): return runs.ask(SMALL, "paper", data_root=str(ucf), device="cpu", progress=False).name
    names = [ask()]
    for seed in (1, 2):
        write_centers(ucf, np.random.default_rng(seed).choice([-1, 1], (101, 16)))
        names.append(ask())
    (ucf/"hash_center_16.h5").unlink()
    assert len(set(names)) == 3 and ask() == names[0]
