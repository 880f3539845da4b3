"DMMH through the shared engine: deterministic, exact when interrupted, recorded, from the papers' files to a score."
import dataclasses

import numpy as np
import pytest
import torch

from s5vh_nb import baselines, datasets, dmmh, multimodal, runs, training
from s5vh_nb.config import BaselineConfig, DMMHConfig, replace, train_config

CONFIG = train_config("emoji", "smoke", epochs=4)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

@pytest.fixture(scope="module")
def data(): return datasets.load("emoji")

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("S5VH_NB_HOME", str(tmp_path))
    runs.load_data.cache_clear()
    return tmp_path

def train(data, config=CONFIG, **options): return training.train(config, data, progress=False, **{"device": "cpu", **options})
def codes(run, data): return run.model.encode(*data.query.inputs)

def interrupted(data, path, monkeypatch, config=CONFIG, at=2, **options):
    "A training that dies in epoch `at`; its checkpoint is left."
    whole = training.train_epoch
    def dies(run, *rest):
        if run.epoch == at: raise KeyboardInterrupt
        return whole(run, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_epoch", dies)
        train(data, config, checkpoint=path, every=1, **options)

def test_an_interrupted_run_resumes_to_the_same_codes(data, tmp_path, monkeypatch):
    whole = train(data)
    interrupted(data, tmp_path/"run.pt", monkeypatch)
    torch.rand(3)                                        # another process would have drawn other numbers
    resumed = train(data, checkpoint=tmp_path/"run.pt", resume=True)
    assert torch.equal(codes(resumed, data), codes(whole, data)) and resumed.history == whole.history

def test_seeds_and_epochs_draw_their_own_dropout(data):
    "With one batch that holds all pairs, the seed decides the weights and dropout alone."
    still = [train(data, replace(CONFIG, dropout=0., batch=1024, lr=1e-12, lr_end=1e-12, epochs=2)).history[i]["loss"] for i in (0, 1)]
    noisy = [train(data, replace(CONFIG, dropout=.5, batch=1024, lr=1e-12, lr_end=1e-12, epochs=2)).history[i]["loss"] for i in (0, 1)]
    assert abs(still[0] - still[1]) < 1e-5 < abs(noisy[0] - noisy[1])
    assert not torch.equal(*(codes(train(data, replace(CONFIG, seed=s, epochs=1)), data) for s in (1, 2)))

@cuda
def test_captured_steps_are_deterministic_and_resume_exactly(data, tmp_path, monkeypatch):
    "8 steps per epoch: the first one is ordinary, the others replay a graph."
    whole = train(data, device="cuda")
    interrupted(data, tmp_path/"run.pt", monkeypatch, device="cuda")
    resumed = train(data, device="cuda", checkpoint=tmp_path/"run.pt", resume=True)
    assert torch.equal(codes(resumed, data), codes(whole, data)) and resumed.history == whole.history

@cuda
def test_captured_steps_are_the_ordinary_steps(data, monkeypatch):
    captured = train(data, replace(CONFIG, precision="float32"), device="cuda")
    def ordinary_step(run, warm, inputs): return lambda rows: training.step(run, warm, *(x[rows] for x in inputs), rows)
    monkeypatch.setattr(training, "make_step", ordinary_step)
    ordinary = train(data, replace(CONFIG, precision="float32"), device="cuda")
    assert np.allclose([h["loss"] for h in captured.history], [h["loss"] for h in ordinary.history], atol=1e-5)

def test_learning_helps(data):
    "Trained codes beat untrained ones and rivals that see no label, and a missing modality costs."
    run = train(data, train_config("emoji", "quick", bits=16, epochs=4))
    trained = runs.scores(runs.encode_splits(run.model.encode, data, alone=True), data)
    untrained = runs.scores(runs.encode_splits(dmmh.DMMH(run.config.model).encode, data, alone=False), data)
    itq = baselines.fit_pair_baseline("itq", data.train, 16)
    assert trained["map"] > runs.scores(runs.encode_splits(itq.encode, data, alone=False), data)["map"] > untrained["map"]
    assert trained["map"] > max(trained["map_image"], trained["map_text"])

def test_a_baseline_that_sees_no_labels_sees_no_labels(data):
    other = dataclasses.replace(data.train, labels=np.ascontiguousarray(data.train.labels[::-1]))
    for method in ("itq", "lsh", "cca-itq", "supervised"):
        same = np.array_equal(*(baselines.fit_pair_baseline(method, split, 16).encode(*data.query.inputs) for split in (data.train, other)))
        assert same == (method != "supervised")

@pytest.mark.parametrize("version", ["7.3", "5"])
def test_the_papers_files_end_to_end(home, version):
    "A folder with a small file in the official layout: found, trained on, scored, recorded, read again."
    made = multimodal.synthetic_pairs("mirflickr25k", n=(120, 200, 40), di=64, dt=32)
    multimodal.write_official_pairs(home/"data", "mirflickr25k", made, version)
    root = str(home/"data")
    assert runs.default_pairs("paper", root) == ["mirflickr25k"]
    config = train_config("mirflickr25k", "smoke", bits=16)
    for asked in (config, BaselineConfig("mirflickr25k", "supervised", bits=16)):
        record = runs.ask(asked, "paper", data_root=root, device="cpu", progress=False)
        assert record.metrics["map_lowest"] <= record.metrics["map"] <= record.metrics["map_highest"]
        assert ("map_image" in record.metrics) == (asked is config)
        assert runs.ask(asked, "paper", data_root=root, device="cpu") == record
    assert record.config["view"] == "pair"

def test_a_share_of_the_papers_files(tmp_path):
    "Fewer training pairs, read from a file: rows of the database still, as many labels, and the same ones again."
    multimodal.write_official_pairs(tmp_path, "mirflickr25k", multimodal.synthetic_pairs("mirflickr25k", n=(120, 200, 40), di=64, dt=32))
    whole = datasets.load("mirflickr25k", tmp_path)
    part, again, other = (training.training_share(whole, .25, seed) for seed in (3, 3, 4))
    assert len(part.train) == 30 and np.array_equal(whole.database.probe[part.train_ids], part.train.probe)
    assert np.array_equal(part.train_ids, again.train_ids) and not np.array_equal(part.train_ids, other.train_ids)
    run = train(whole, train_config("mirflickr25k", "smoke", bits=16, share=.25, batch=10))
    assert run.objective.labels.shape == (30, 24) and run.config.share == .25

def test_a_network_of_one_modality_has_no_queries_alone(home):
    record = runs.ask(train_config("emoji", "smoke", bits=16, modality="image"), "smoke", device="cpu", progress=False)
    assert "map_image" not in record.metrics and set(runs.codes_of(record, "smoke")) == {"query", "database"}

def test_the_width_must_fit(data):
    net = dmmh.DMMH(DMMHConfig(di=data.di, dt=data.dt, bits=16, width=16, image_hidden=16, text_hidden=16))
    with pytest.raises(ValueError, match=r"text: expected features of shape \(b, 1613\)"): net.encode(data.query.image, data.query.image)
    with pytest.raises(ValueError, match="text: expected 300 rows"): net.encode(data.query.image, data.query.text[:5])
