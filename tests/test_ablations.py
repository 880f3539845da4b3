"Ablations and transfers: rows really learn and change what they say they change; records of other data are refused."
import functools

import pytest
import torch

from s5vh_nb import ablations, datasets, records, runs, training
from s5vh_nb.config import VARIANTS, BaselineConfig, train_config, variant

LAYERS = {"Mamba, both": {}, "Mamba, tied": dict(tied=True), "Mamba, backward": dict(directions="backward"),
          **{name: dict(mixer=name) for name in ("LSTM", "RetNet", "RWKV")},
          "Transformer": dict(mixer="Transformer", directions="forward")}
TERMS = {"reconstruction": "reconstruction", "alpha": "contrast", "beta": "alignment"}      # weight -> what the history calls its term


@pytest.fixture(scope="module")
def few():
    "64 recordings."
    data = datasets.load("spoken-digits")
    part = datasets.Split(data.train.features[:64], data.train.labels[:64], "the first 64")
    return datasets.VideoDataset("spoken-digits", part, part, part, 10, data.origin)


@pytest.fixture
def home(tmp_path, monkeypatch): monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path))


def trained(data, profile="smoke", **changes):
    "Weights before and after a short training, and its history."
    config = train_config("spoken-digits", profile, **{"epochs": 2, "n_centers": 4, "batch": 32, "watch": 0, **changes})
    before = training.start(training.replace(config, **data.widths), data, torch.device("cpu")).model.state_dict()
    run = training.train(config, data, device="cpu", progress=False)
    return before, run.model.state_dict(), run.history


@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS)
def test_every_temporal_layer_learns(few, changes):
    "Of quick's size; in the released code three of these kept no weights from one pass to the next."
    before, after, history = trained(few, "quick", **changes)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("weight", TERMS)
def test_a_single_loss_is_alone(few, weight):
    before, after, history = trained(few, **{other: 0. for other in TERMS if other != weight})
    assert set(history[-1]) == {"epoch", "loss", TERMS[weight]}
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"encoder", "hash"} | ({"decoder"} if weight == "reconstruction" else set())


def test_centers_differ_as_the_rows_say(few):
    def centers(**changes):
        config = training.replace(train_config("spoken-digits", "smoke", bits=64, n_centers=32, **changes), **few.widths)
        run = training.start(config, few, torch.device("cpu"))
        training.prepare(run, few, progress=False)
        return run.objective.centers
    found = [centers(centers=kind) for kind in ("semantic", "plain", "hadamard", "random")]
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert not centers(beta=0.).any()


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "paper"])
def test_a_variant_is_another_run(name):
    config = train_config("spoken-digits", "smoke")
    assert records.run_name(runs.describe(variant(config, name))) != records.run_name(runs.describe(config))


def test_a_row_that_changes_an_unknown_field_is_refused(home):
    rows = {"base": {}, "none": dict(bta=0.)}
    with pytest.raises(ValueError, match="did you mean 'beta'"): ablations.ask_rows(rows, "smoke", ["spoken-digits"], [16], [1])
    assert not records.read_all("smoke")


def test_rows_of_different_seeds_are_not_compared(home):
    one = runs.ask(BaselineConfig(bits=16), "smoke", device="cpu")
    with pytest.raises(ValueError, match="zip"): ablations.gain([one, one], [one], "smoke")


def test_a_transfer_from_other_data_is_refused(home):
    ask = functools.partial(runs.ask_transfer, BaselineConfig(bits=16), "spoken-pairs", "smoke", device="cpu", progress=False)
    record = ask()
    path = records.path_of(record.name, "smoke")
    path.write_text(path.read_text().replace(record.data["source"]["fingerprint"], "0"*16))
    with pytest.raises(ValueError, match="source: expected .* the data here"): ask()


def test_a_transfer_is_not_trained_where_that_is_forbidden(home, monkeypatch):
    monkeypatch.setenv("S5VH_NB_NO_TRAINING", "1")
    with pytest.raises(FileNotFoundError, match="itq-from-spoken-digits-spoken-pairs-16bit"):
        runs.ask_transfer(BaselineConfig(bits=16), "spoken-pairs", "smoke", device="cpu")


def test_codes_of_another_run_are_refused(home):
    ours, other = (runs.ask(BaselineConfig(bits=16, seed=seed), "smoke", progress=False) for seed in (1, 2))
    ours, other = (records.path_of(record.name, "smoke") for record in (ours, other))
    other.with_suffix(".npz").replace(ours.with_suffix(".npz"))
    with pytest.raises(ValueError, match=f"codes of {ours.stem}: expected those of the record"):
        ablations.per_query(records.load(ours), "smoke")
