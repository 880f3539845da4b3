"Runs and the store: evaluations, interruptions, measurements, transfers, processes side by side."

import functools
import re
import time

import pytest
import torch

from s5vh_nb.basics.config import BaselineConfig, TransferConfig, replace, to_dict
from s5vh_nb.basics.profiles import PUBLISHED, train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.evidence import runs
from s5vh_nb.evidence import store as store_module
from s5vh_nb.evidence.archive import pack
from s5vh_nb.evidence.identity import run_name
from s5vh_nb.evidence.scoring import score
from s5vh_nb.evidence.store import NO_TRAINING, Store
from s5vh_nb.learning.training import train

CONFIG = train_config("spoken-digits", "smoke", epochs=4, evaluate_every=2)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(scope="module")
def data():
    return load("spoken-digits")


# Evaluations during training


@pytest.mark.parametrize("device", DEVICES)
def test_evaluations_change_nothing(data, device):
    "On a GPU they come between replays of a captured step."
    alone = train(CONFIG, data, device=device, progress=False)
    evaluate = functools.partial(runs.evaluate, data=data)
    evaluated = train(CONFIG, data, device=device, evaluate=evaluate, progress=False)
    assert ["mAP@5" in epoch for epoch in evaluated.history] == [True, True, False, True]
    terms = [{name: epoch[name] for name in alone.history[0]} for epoch in evaluated.history]
    assert terms == alone.history
    codes = [run.model.encode(data.query.frames) for run in (alone, evaluated)]
    assert torch.equal(*codes)


def test_a_run_interrupted_at_an_evaluation_resumes_with_the_same_curve(data, tmp_path):
    def interrupted(run):
        if run.epoch == 3:
            raise KeyboardInterrupt
        return runs.evaluate(run, data)

    evaluate, checkpoint = functools.partial(runs.evaluate, data=data), tmp_path / "run.pt"
    again = functools.partial(train, replace(CONFIG, evaluate_every=1), data, device="cpu", progress=False)
    whole = again(evaluate=evaluate)
    with pytest.raises(KeyboardInterrupt):
        again(evaluate=interrupted, checkpoint=checkpoint, every=1)
    assert again(evaluate=evaluate, checkpoint=checkpoint, resume=True).history == whole.history


def test_a_database_smaller_than_the_smallest_cut_is_named(data):
    codes = torch.zeros(4, 2, dtype=torch.uint8).numpy()
    expected = "spoken-digits: database: expected at least 5 items, for the smallest cut, found 4"
    with pytest.raises(ValueError, match=expected):
        score({"query": codes, "database": codes}, data)


# Checkpoints


def test_a_checkpoint_belongs_to_the_code_that_made_it(tmp_path, monkeypatch):
    "To all that training reaches, but not to comments, docstrings and other modules."
    monkeypatch.setattr(runs.s5vh_nb, "__file__", str(tmp_path / "__init__.py"))

    def digest(**modules):
        for name, text in modules.items():
            path = tmp_path.joinpath(*name.split("_")).with_suffix(".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return runs._code_digest.__wrapped__(("learning.training", "models.net"))

    training = "from .losses import a\nfrom s5vh_nb.ops.scan import (\n    b,\n)\n"
    rest = dict(
        ops_scan="y = 1", cli_command="z = 1", models_net="from ..ops.layer import c", ops_layer="w = 1"
    )
    first = digest(learning_training=training, learning_losses="x = 1", **rest)
    assert digest(learning_losses="'''A docstring.'''\nx = 1  # one") == first
    assert digest(cli_command="z = 2") == first
    edits = (
        dict(learning_losses="x = 2"),
        dict(ops_scan="y = 2"),
        dict(ops_layer="w = 2"),
        dict(models_net=""),
    )
    assert len({first, *(digest(**edit) for edit in edits)}) == 5


@pytest.mark.parametrize("dataset, kind", [("spoken-digits", "videos"), ("emoji", "pairs")])
def test_the_code_of_a_training_has_that_of_its_network_and_objective(dataset, kind, monkeypatch):
    seen = []
    monkeypatch.setattr(runs, "_code_digest", seen.append)
    for variant in ("paper", "plus", *PUBLISHED[kind]):
        config = train_config(dataset, "smoke", variant=variant)
        runs.training_digest(config)
        for name in (config.model.network, config.objective.objective):
            assert name.partition(":")[0] in {f"s5vh_nb.{module}" for module in seen[-1]}


def test_a_checkpoint_is_named_by_its_run_and_its_code(store):
    record = store.get(CONFIG)
    checkpoints = [path.name for path in (store.root / "results" / "checkpoints").iterdir()]
    assert checkpoints == [f"{record.name}-{runs.training_digest(record.configuration)}.pt"]


# Measurements


def refuse(subject):
    raise ArithmeticError("no")


def size(subject):
    return {"metrics": {"size": sum(p.numel() for p in subject.hasher.parameters())}}


def test_a_measurement_that_fails_leaves_no_record_and_is_made_again(store):
    with pytest.raises(ArithmeticError):
        store.measure(CONFIG, "size", refuse)
    assert not store.archive.records()
    again = store.measure(CONFIG, "size", size)
    assert again.metrics["size"] > 0
    assert [record.name for record in store.archive.records()] == [again.name]


def edit(store, record, old, new):
    "Replace a text in the record's file."
    path = store.archive.path_of(record.name)
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")


def test_a_measurement_of_other_data_is_refused(store):
    record = store.measure(CONFIG, "nothing", lambda subject: {"metrics": {}})
    edit(store, record, record.data["fingerprint"], "0" * 16)
    with pytest.raises(ValueError, match="data: expected the fingerprint"):
        store.measure(CONFIG, "nothing", None)


def test_a_measurement_has_a_name(store):
    with pytest.raises(ValueError, match="label: expected the name of a measurement"):
        store.measure(CONFIG, " ", None)


def test_a_network_that_was_kept_takes_no_time_from_its_measurement(store):
    record = store.get(CONFIG)
    slow = store.measure(CONFIG, "slow", lambda subject: size(subject) if not time.sleep(0.2) else None)
    assert slow.seconds["train"] == record.seconds["train"] and slow.seconds["measure"] >= 0.2


def test_only_runs_are_made_or_measured(store):
    fitted = BaselineConfig(bits=16, method="lsh")
    moved = TransferConfig("spoken-pairs", fitted)
    store.transfer(fitted, "spoken-pairs")
    assert store.find(moved) and store.find(moved, "never made") is None
    for ask in (store.get, functools.partial(store.measure, label="size", measure=size)):
        with pytest.raises(TypeError, match="config: expected"):
            ask(moved)


def test_codes_that_are_kept_no_more_are_made_again(store):
    "Those of queries that lack a modality, too."
    config = train_config("emoji", "smoke", bits=16)

    def describe(subject):
        return {"metrics": {part: int(codes.sum()) for part, codes in subject.codes.items()}}

    store.get(config)
    kept = store.measure(config, "kept", describe).metrics
    pack(store.root, "smoke")
    for path in store.archive.runs.iterdir():
        path.unlink()
    assert set(kept) == {"query", "query_image", "query_text", "database"}
    assert store.measure(config, "made", describe).metrics == kept


# Many runs


@pytest.mark.parametrize("workers", [1, 2])
def test_one_failure_is_named_when_the_others_are_done(store, workers):
    good = [BaselineConfig(bits=16, method=method) for method in ("itq", "lsh")]
    bad = train_config("spoken-digits", "smoke", bits=16, n_centers=5000)
    name = run_name(runs.complete(bad, store.data(bad.dataset)))
    with pytest.raises(RuntimeError, match=f"1 of 3 runs failed: {name}: .*n_centers"):
        store.get_many([bad, *good], workers=workers)
    assert len(store.archive.records()) == 2
    found = store.get_many(good, workers=workers)
    assert [record.configuration.method for record in found] == ["itq", "lsh"]


def test_processes_may_make_what_the_store_may(store, monkeypatch):
    monkeypatch.setenv(NO_TRAINING, "1")
    may = Store("s5vh/codes", "smoke", root=store.root, device="cpu", may_train=True, progress=False)
    assert len(may.get_many([BaselineConfig(bits=16, method=m) for m in ("itq", "lsh")], workers=2)) == 2


def test_a_run_asked_for_twice_is_made_once(store, monkeypatch):
    monkeypatch.setattr(Store, "_quiet", None)  # two processes would train it twice
    one, again = store.get_many([CONFIG, replace(CONFIG, evaluate_every=0)], workers=2)
    assert one.name == again.name
    assert len(store.archive.records()) == 1


def test_a_folder_that_cannot_be_written_to_is_found_before_training(store, monkeypatch):
    "As in a read-only checkout; it is said once for many runs."
    monkeypatch.setattr(store_module, "learn", None)
    store.archive.runs.parent.mkdir(parents=True)
    store.archive.runs.touch()  # a file where the folder should be
    for ask in (
        lambda: store.get(CONFIG),
        lambda: store.get_many([CONFIG, replace(CONFIG, seed=2)]),
        lambda: store.measure(CONFIG, "size", size),
        lambda: store.transfer(CONFIG, "spoken-pairs"),
    ):
        with pytest.raises(OSError, match="expected a folder that can be written to"):
            ask()


def test_what_is_no_configuration_is_named(store):
    for ask in (store.find, store.get, lambda config: store.get_many([config])):
        with pytest.raises(TypeError, match="config: expected TrainConfig or .*, found dict"):
            ask(to_dict(CONFIG))
    with pytest.raises(TypeError, match="TrainConfig or BaselineConfig, found TransferConfig"):
        store.transfer(TransferConfig("spoken-pairs", ITQ), "spoken-pairs")


def test_arrays_of_another_run_are_refused(store):
    ours, other = (store.get(BaselineConfig(bits=16, seed=seed)) for seed in (1, 2))
    paths = [store.archive.path_of(record.name).with_suffix(".npz") for record in (ours, other)]
    paths[1].replace(paths[0])
    with pytest.raises(ValueError, match=f"arrays of {ours.name}: expected those of the record"):
        store.per_query(ours)


# Transfers

ITQ = BaselineConfig(bits=16)


def test_a_transfer_from_other_data_is_refused(store):
    record = store.transfer(ITQ, "spoken-pairs")
    edit(store, record, record.data["source"]["fingerprint"], "0" * 16)
    with pytest.raises(ValueError, match="spoken-digits: data: expected the fingerprint 0000"):
        store.transfer(ITQ, "spoken-pairs")
    with pytest.raises(ValueError, match="spoken-digits: data"):
        store.find(TransferConfig("spoken-pairs", ITQ))


def test_a_transfer_to_items_of_other_widths_is_refused(store):
    with pytest.raises(ValueError, match=re.escape("moving-digits, widths: expected {'d': 13}")):
        store.transfer(ITQ, "moving-digits")


def test_nothing_is_made_where_that_is_forbidden(checkout, monkeypatch):
    monkeypatch.setenv(NO_TRAINING, "1")
    store = Store("tests", "smoke", root=checkout, device="cpu", progress=False)
    with pytest.raises(FileNotFoundError, match="itq-spoken-digits-16bit"):
        store.get_many([ITQ])
    with pytest.raises(FileNotFoundError, match="itq-size-spoken-digits-16bit"):
        store.measure(ITQ, "size", size)
    with pytest.raises(FileNotFoundError, match="itq-from-spoken-digits-spoken-pairs-16bit"):
        store.transfer(ITQ, "spoken-pairs")
    assert not store.archive.records()
