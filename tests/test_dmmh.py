"DMMH in the shared training loop: deterministic, resumed exactly, recorded; the papers' files to a score."

import numpy as np
import pytest
import torch

from s5vh_nb.basics.config import BaselineConfig, DMMHConfig, replace
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.pair_files import write_official_pairs
from s5vh_nb.datasets.synthetic import synthetic_pairs
from s5vh_nb.evidence.runs import encode_splits
from s5vh_nb.evidence.scoring import score
from s5vh_nb.evidence.store import Store
from s5vh_nb.learning import training
from s5vh_nb.models.dmmh import DMMH
from s5vh_nb.models.methods import fit_baseline

CONFIG = train_config("emoji", "smoke", epochs=4)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def data():
    return load("emoji")


def train(data, config=CONFIG, **options):
    return training.train(config, data, progress=False, **{"device": "cpu", **options})


def codes(run, data):
    return run.model.encode(*data.query.arrays)


def interrupted(data, path, monkeypatch, config=CONFIG, at=2, **options):
    "A training that dies in epoch `at`; its checkpoint is left."
    whole = training.train_epoch

    def dies(run, *rest):
        if run.epoch == at:
            raise KeyboardInterrupt
        return whole(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_epoch", dies)
        train(data, config, checkpoint=path, every=1, **options)


def test_an_interrupted_run_resumes_to_the_same_codes(data, tmp_path, monkeypatch):
    whole = train(data)
    interrupted(data, tmp_path / "run.pt", monkeypatch)
    torch.rand(3)  # another process would have drawn other numbers
    resumed = train(data, checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(codes(resumed, data), codes(whole, data)) and resumed.history == whole.history


def test_seeds_and_epochs_draw_their_own_dropout(data):
    "With one batch that holds all pairs, the seed decides the weights and dropout alone."

    def losses(dropout):
        still = dict(dropout=dropout, batch=1024, lr=1e-12, lr_end=1e-12, epochs=2)
        return [h["loss"] for h in train(data, replace(CONFIG, **still)).history]

    without, noisy = losses(0.0), losses(0.5)
    assert abs(without[0] - without[1]) < 1e-5 < abs(noisy[0] - noisy[1])
    runs = [train(data, replace(CONFIG, seed=seed, epochs=1)) for seed in (1, 2)]
    assert not torch.equal(*(codes(run, data) for run in runs))


@cuda
def test_captured_steps_are_deterministic_and_resume_exactly(data, tmp_path, monkeypatch):
    "8 steps per epoch: the first one is ordinary, the others replay a graph."
    whole = train(data, device="cuda")
    interrupted(data, tmp_path / "run.pt", monkeypatch, device="cuda")
    resumed = train(data, device="cuda", checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.equal(codes(resumed, data), codes(whole, data)) and resumed.history == whole.history


@cuda
def test_captured_steps_are_the_ordinary_steps(data, monkeypatch):
    captured = train(data, replace(CONFIG, precision="float32"), device="cuda")

    def ordinary_step(run, past_warmup, inputs):
        return lambda rows: training.step(run, past_warmup, *(x[rows] for x in inputs), rows)

    monkeypatch.setattr(training, "make_step", ordinary_step)
    ordinary = train(data, replace(CONFIG, precision="float32"), device="cuda")
    losses = [[h["loss"] for h in run.history] for run in (captured, ordinary)]
    assert np.allclose(*losses, atol=1e-5)


def test_learning_helps(data):
    "Trained codes beat untrained ones and baselines without labels, and a missing modality costs."

    def scored(hasher, single=False):
        return score(encode_splits(hasher, data, single), data).metrics

    run = train(data, train_config("emoji", "quick", bits=16, epochs=4))
    trained, untrained = scored(run.model, single=True), scored(DMMH(run.config.model))
    itq = scored(fit_baseline("itq", data.train, 16, "pair"))
    assert trained["mAP"] > itq["mAP"] > untrained["mAP"]
    assert trained["mAP"] > max(trained["mAP image"], trained["mAP text"])


@pytest.mark.parametrize("version", ["7.3", "5"])
def test_the_papers_files_end_to_end(tmp_path, version):
    "A folder with a small file in the official layout: found, trained on, scored, recorded, read again."
    made = synthetic_pairs("mirflickr25k", n=(120, 200, 40), di=64, dt=32)
    write_official_pairs(tmp_path / "data", "mirflickr25k", made, version)
    options = dict(root=tmp_path, data_root=str(tmp_path / "data"), device="cpu", progress=False)
    store = Store("dmmh/test", "smoke", **options)
    config = train_config("mirflickr25k", "smoke", bits=16)
    for asked in (config, BaselineConfig("mirflickr25k", "supervised", bits=16)):
        record = store.get(asked)
        assert record.metrics["mAP lowest"] <= record.metrics["mAP"] <= record.metrics["mAP highest"]
        assert {"mAP image", "mAP text"} <= set(record.metrics)
        assert Store("dmmh/test", "smoke", may_train=False, **options).get(asked) == record
    assert record.config["view"] == "pair"


def test_a_share_of_the_papers_files(tmp_path):
    "Fewer training pairs, read from a file: rows of the database still, as many labels, the same ones again."
    made = synthetic_pairs("mirflickr25k", n=(120, 200, 40), di=64, dt=32)
    write_official_pairs(tmp_path, "mirflickr25k", made)
    whole = load("mirflickr25k", tmp_path)
    part, again, other = (training.training_share(whole, 0.25, seed) for seed in (3, 3, 4))
    assert len(part.train) == 30
    assert np.array_equal(whole.database.probe[part.train_ids], part.train.probe)
    assert np.array_equal(part.train_ids, again.train_ids)
    assert not np.array_equal(part.train_ids, other.train_ids)
    run = train(whole, train_config("mirflickr25k", "smoke", bits=16, share=0.25, batch=10))
    assert run.objective.labels.shape == (30, 24) and run.config.share == 0.25


def test_a_network_of_one_modality_has_no_single_queries(tmp_path):
    store = Store("dmmh/test", "smoke", root=tmp_path, device="cpu", progress=False)
    record = store.get(train_config("emoji", "smoke", bits=16, modality="image"))
    assert "mAP image" not in record.metrics
    assert set(store.archive.codes(record)) == {"query", "database"}


def test_the_width_must_fit(data):
    small = dict(bits=16, width=16, image_hidden=16, text_hidden=16)
    net = DMMH(DMMHConfig(di=data.widths["di"], dt=data.widths["dt"], **small))
    image, text = data.query.arrays
    with pytest.raises(ValueError, match=r"text: expected features of shape \(b, 1613\)"):
        net.encode(image, image)
    with pytest.raises(ValueError, match="text: expected 300 rows"):
        net.encode(image, text[:5])
