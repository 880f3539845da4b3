"Runs: watched ones that are interrupted, measurements that fail or belong to other data, processes side by side."
import functools

import pytest
import torch

from s5vh_nb import datasets, records, runs, training
from s5vh_nb.config import BaselineConfig, replace, train_config

CONFIG = train_config("spoken-digits", "smoke", epochs=4, watch=2)
DEVICES = ["cpu"] + ["cuda"]*torch.cuda.is_available()


@pytest.fixture(scope="module")
def data(): return datasets.load("spoken-digits")


@pytest.fixture
def home(tmp_path, monkeypatch): monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path))


@pytest.mark.parametrize("device", DEVICES)
def test_a_watched_run_learns_what_an_unwatched_one_learns(data, device):
    "On a GPU the looks come between replays of a captured step."
    alone = training.train(CONFIG, data, device=device, progress=False)
    watched = training.train(CONFIG, data, device=device, look=functools.partial(runs.look, data=data), progress=False)
    assert ["map@5" in h for h in watched.history] == [True, True, False, True]
    assert [{name: h[name] for name in alone.history[0]} for h in watched.history] == alone.history
    assert torch.equal(watched.model.encode(data.query.features), alone.model.encode(data.query.features))


def test_a_run_interrupted_at_a_look_resumes_with_the_same_curve(data, tmp_path):
    def interrupted(run):
        if run.epoch == 3: raise KeyboardInterrupt
        return runs.look(run, data)

    train = functools.partial(training.train, replace(CONFIG, watch=1), data, device="cpu", progress=False)
    whole = train(look=functools.partial(runs.look, data=data))
    with pytest.raises(KeyboardInterrupt): train(look=interrupted, checkpoint=tmp_path/"run.pt", every=1)
    assert train(look=functools.partial(runs.look, data=data), checkpoint=tmp_path/"run.pt", resume=True).history == whole.history


def test_a_measurement_that_fails_leaves_no_record_and_is_made_again(home):
    def fails(model, data): raise ArithmeticError("no")

    with pytest.raises(ArithmeticError): runs.ask_about(CONFIG, "size", fails, "smoke", device="cpu", progress=False)
    assert not records.read_all("smoke")
    def size(model, data): return {"size": sum(p.numel() for p in model.parameters())}
    again = runs.ask_about(CONFIG, "size", size, "smoke", device="cpu", progress=False)
    assert again.metrics["size"] > 0 and [record.name for record in records.read_all("smoke")] == [again.name]


def test_a_measurement_of_other_data_is_refused(home):
    record = runs.ask_about(CONFIG, "nothing", lambda model, data: {}, "smoke", device="cpu", progress=False)
    path = records.path_of(record.name, "smoke")
    path.write_text(path.read_text().replace(record.data["fingerprint"], "0"*16))
    with pytest.raises(ValueError, match="data: expected the fingerprint"): runs.ask_about(CONFIG, "nothing", None, "smoke", device="cpu")


def test_processes_side_by_side_finish_and_name_the_run_that_failed(home):
    good = [BaselineConfig(bits=16, method=method) for method in ("itq", "lsh")]
    bad = train_config("spoken-digits", "smoke", bits=16, n_centers=5000)
    name = records.run_name(runs.describe(runs.settle(bad, runs.load_data(bad.dataset))))
    with pytest.raises(RuntimeError, match=f"1 of 3 runs failed: {name}: .*n_centers"):
        runs.ask_all([bad, *good], "smoke", device="cpu", workers=2)
    assert len(records.read_all("smoke")) == 2
    assert [r.config["method"] for r in runs.ask_all(good, "smoke", device="cpu", workers=2)] == ["itq", "lsh"]


def test_a_checkpoint_belongs_to_the_code_that_made_it(tmp_path, monkeypatch):
    "Not to its comments."
    monkeypatch.setattr(records, "__file__", str(tmp_path/"records.py"))
    stamps = []
    for text in ("x = 1", "x = 1  # one", "x = 2"):
        (tmp_path/"mixers.py").write_text(text)
        stamps.append(runs.code_stamp())
    assert stamps[0] == stamps[1] != stamps[2]
    monkeypatch.setattr(runs, "CODE", stamps[2])
    assert stamps[2] in runs.checkpoint_of(CONFIG).name


def test_a_database_smaller_than_the_smallest_cut_is_named(data):
    codes = torch.zeros(4, 2, dtype=torch.uint8).numpy()
    with pytest.raises(ValueError, match="spoken-digits: database: expected at least 5 videos, for the smallest cut, found 4"):
        runs.scores({"query": codes, "database": codes}, data)


def test_a_run_asked_for_twice_is_made_once(home, monkeypatch):
    monkeypatch.setattr(runs, "_side_by_side", None)                    # two processes would train it twice
    one, again = runs.ask_all([CONFIG, replace(CONFIG, watch=0)], "smoke", device="cpu", workers=2)
    assert one.name == again.name and len(records.read_all("smoke")) == 1


def test_a_measurement_has_a_name(home):
    with pytest.raises(ValueError, match="what: expected the name of a measurement"): runs.ask_about(CONFIG, " ", None, "smoke")
