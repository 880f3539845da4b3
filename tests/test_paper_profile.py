"""Profile `paper` from end to end: all four official layouts, by the real command and the real notebook.

Only the network and the schedule are smoke's, so that it takes seconds.
"""

import hashlib

import h5py
import numpy as np
import pandas as pd
import pytest

from s5vh_nb.basics.config import replace
from s5vh_nb.basics.profiles import DATASETS, PROFILES, train_config
from s5vh_nb.cli.command import main
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.synthetic import synthetic_like
from s5vh_nb.datasets.video_files import OFFICIAL, write_official
from s5vh_nb.evidence.archive import Archive
from s5vh_nb.evidence.identity import run_name
from s5vh_nb.evidence.runs import complete
from s5vh_nb.evidence.store import Store
from s5vh_nb.learning.resolve import resolve
from s5vh_nb.learning.training import train

SIZES = {  # train, database, query
    "ucf101": (130, 130, 40),
    "hmdb51": (120, 120, 40),
    "fcvid": (120, 150, 150),
    "activitynet": (120, 110, 30),
}
REDUCED = PROFILES["smoke"] | {"n_centers": 100, "epochs": 3}
STARTUP = f"""
import pkgutil

from s5vh_nb.basics import profiles
profiles.PROFILES["paper"] = {REDUCED}
for names in profiles.PUBLISHED.values():
    for where in names.values():
        smaller = pkgutil.resolve_name(where).smaller
        smaller["paper"] = smaller["smoke"]
"""

pytestmark = pytest.mark.filterwarnings("ignore:.*not the sizes of:UserWarning")


def signs(c, k, seed=0):
    return np.random.default_rng(seed).choice([-1.0, 1.0], (c, k))


def write_centers(folder, matrix):
    path = folder / "hash_center_16.h5"
    with h5py.File(path, "w") as file:
        file["matrix"] = matrix
    return path


@pytest.fixture
def data_root(tmp_path):
    "Few random videos under true names, keys and widths; centers for one set, too many for another."
    for name, n in SIZES.items():
        write_official(tmp_path / "data" / name, name, synthetic_like(name, n=n))
    for name in ("hmdb51", "ucf101"):
        write_centers(tmp_path / "data" / name, signs(DATASETS[name]["n_centers"], 16))
    return tmp_path / "data"


@pytest.fixture
def home(project):
    return project(("nbs/s5vh/retrieval.ipynb", "results/published"), STARTUP)


def reproduce_retrieval(data_root):
    given = [f"data_root={data_root}", "bits=16", "seeds=1"]
    words = [word for value in given for word in ("-p", value)]
    return main(["reproduce", "s5vh/retrieval", "--profile", "paper", "--device", "cpu", *words])


def check_record(archive, record, name, data_root):
    sizes, layout = SIZES[name], OFFICIAL[name]
    config = record.configuration
    assert tuple(record.data[split] for split in ("train", "database", "query")) == sizes
    assert config.model.d == layout.d
    note = f"{layout.train.feats}: videos: {layout.train.size} in the paper, {sizes[0]} here"
    assert note in record.data["notes"]
    assert config.objective.alpha == DATASETS[name]["alpha"]
    content = (data_root / "hmdb51" / "hash_center_16.h5").read_bytes()
    of_the_file = f"file:{hashlib.sha256(content).hexdigest()[:16]}"  # ucf101's file has 101, not 100
    assert config.objective.centers == (of_the_file if name == "hmdb51" else "semantic")
    assert archive.arrays(record)["loss"].shape[1] == 3
    assert record.metrics["GmAP"] > 3 / layout.n_classes  # its classes are easy: far above chance


def check_tables(folder):
    names = ("retrieval", "retrieval_published")
    table, beside = (pd.read_csv(folder / f"s5vh_{name}.csv") for name in names)
    for name in SIZES:
        assert {"S5VH", "ITQ, flattened"} <= set(table[table.dataset == name].method)
    assert set(beside.dataset) == set(SIZES)


def test_retrieval_of_all_four_sets(home, data_root, capfd):
    assert reproduce_retrieval(data_root) == 0
    printed, archive = capfd.readouterr().err, Archive(home, "paper")
    for name in SIZES:
        assert f"{data_root / name}: not the sizes of {name} in the paper: " in printed
        asked = train_config(name, "paper", bits=16, seed=1, **REDUCED)
        record = archive.find(run_name(complete(asked, load(name, data_root))))
        check_record(archive, record, name, data_root)
    check_tables(home / "results" / "paper" / "tables")
    copy = home / "results" / "paper" / "executed" / "s5vh_retrieval.ipynb"
    assert str(data_root) not in copy.read_text("utf-8")


# Files of centers


@pytest.fixture
def ucf(tmp_path):
    "A small UCF101 in the official layout."
    folder = tmp_path / "ucf"
    write_official(folder, "ucf101", synthetic_like("ucf101", n=(120, 120, 20), d=4))
    return folder


SMALL = train_config("ucf101", "paper", bits=16, m=16, depth=1, decoder_m=16, epochs=1)
SHAPE = r"expected shape \(101, 16\), 101 centers of 16 bits, found \(100, 16\)"


@pytest.mark.parametrize(
    "matrix, found",
    [
        (signs(100, 16), rf"hash_center_16.h5\[matrix\]: {SHAPE}"),
        (np.zeros((101, 16)), r"hash_center_16.h5\[matrix\]: expected only -1 and \+1"),
        (np.ones((101, 16)), r"hash_center_16.h5\[matrix\]: expected 101 distinct rows, found 1"),
    ],
)
def test_a_run_stops_at_a_bad_file_of_centers(ucf, matrix, found):
    write_centers(ucf, matrix)
    with pytest.raises(ValueError, match=found):
        train(SMALL, data_root=ucf, device="cpu", progress=False)


def test_centers_in_a_folder_of_two_sets_are_refused(ucf):
    write_official(ucf, "hmdb51", synthetic_like("hmdb51", n=(100, 100, 20), d=4))
    write_centers(ucf, signs(101, 16))
    expected = r"hash_center_16.h5: expected one data set in its folder .*, found ucf101, hmdb51"
    with pytest.raises(ValueError, match=expected):
        train(SMALL, data_root=ucf, device="cpu", progress=False)


def test_runs_that_ask_for_other_centers_ignore_the_file(ucf):
    write_centers(ucf, np.zeros((101, 16)))
    data = load("ucf101", ucf)
    assert resolve(SMALL, data).objective.centers.startswith("file:")
    others = (
        dict(n_centers=50),
        dict(centers="hadamard"),
        dict(beta=0.0),
        dict(centers_in_loss=False),
        dict(bits=24),
    )
    for changes in others:
        expected = changes.get("centers", "semantic")
        assert resolve(replace(SMALL, **changes), data).objective.centers == expected


def test_other_centers_are_another_run(ucf, checkout):
    "A file that comes, changes or goes never meets a record or a checkpoint made without it."
    options = dict(root=checkout, data_root=str(ucf), device="cpu", progress=False)
    store = Store("tests", "paper", **options)
    names = [store.get(SMALL).name]
    for seed in (1, 2):
        path = write_centers(ucf, signs(101, 16, seed))
        names.append(store.get(SMALL).name)
    path.unlink()
    assert len(set(names)) == 3
    assert store.get(SMALL).name == names[0]
