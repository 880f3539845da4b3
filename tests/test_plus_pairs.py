"Plus for image-text pairs: a step by hand, resumed runs, files, missing modalities, faults; and it learns."

import dataclasses

import numpy as np
import pytest
import torch

from s5vh_nb.basics.config import PairNeighbourConfig, replace
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.evidence.scoring import score
from s5vh_nb.learning import objectives, training
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.models.dmmh import DMMH
from s5vh_nb.models.methods import fit_baseline

N, DI, DT, BITS = 30, 6, 9, 8
SMALL = dict(bits=BITS, width=8, image_hidden=8, text_hidden=8, batch=10, epochs=3, neighbours=4)


def pairs(labels=None):
    "Random pairs; every column of the labels has an item."
    rng = np.random.default_rng(0)
    image = rng.normal(size=(N, DI)) * np.arange(1, DI + 1)
    inputs = {"image": image.astype("float32"), "text": (rng.random((N, DT)) < 0.4).astype("float32")}
    labels = np.eye(3, dtype="uint8")[np.arange(N) % 3] if labels is None else labels
    train = Split(inputs, labels, "toy")
    query = Split({name: x[:9] + 5 for name, x in inputs.items()}, train.labels[:9], "queries")
    return Dataset("emoji", train, train, query, ("a", "b", "c"), "random numbers")


def configuration(**changes):
    return train_config("emoji", "quick", "plus", **{**SMALL, **changes})


def train(config, data, **options):
    return training.train(config, data, device="cpu", progress=False, **options)


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def affinities_by_hand(data, c):
    "The sum over all paths of neighbours, one step at a time, from features balanced one modality at a time."
    parts = [np.asarray(x, float) for x in data.train.arrays]
    parts = [part / np.sqrt(part.var(0).sum()) for part in parts]
    parts[1] = parts[1] * c.text_weight
    z = np.concatenate(parts, 1)
    z = z - z.mean(0)
    graph = np.zeros((N, N))
    for i in range(N):
        cosines = [
            z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j]) if i != j else -2 for j in range(N)
        ]
        for j in np.argsort(cosines)[-c.neighbours :]:
            graph[i, j] += max(0, cosines[j]) ** 3
            graph[j, i] += max(0, cosines[j]) ** 3
    degree = graph.sum(1)
    step = c.damping * graph / np.sqrt(degree[:, None] * degree)
    found, term = np.zeros((N, N)), np.eye(N)
    for _ in range(600):
        term = step @ term
        found += term
    return found * (1 - np.eye(N))


@pytest.mark.parametrize("weight", [0.0, 0.8])
def test_a_step_by_hand(weight, double, monkeypatch):
    data, b = pairs(), 7
    config = training.resolve(configuration(neighbour_weight=weight, dropout=0.0), data)
    c, run = config.objective, new_run(config, data, torch.device("cpu"))
    training.fit_objective(run, data)
    affinity = affinities_by_hand(data, c)
    if weight:
        np.testing.assert_allclose(run.objective.affinities, affinity, rtol=2e-3, atol=1e-4)  # half precision
        affinity = run.objective.affinities.double().numpy()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(N, generator=generator)[:b]
    views = [torch.randn(2 * b, width, generator=generator) for width in (DI, DT)]
    given = iter(zip(*(x.chunk(2) for x in views)))
    monkeypatch.setattr(objectives, "draw_pair_view", lambda *_: next(given))

    h = run.model(*views)
    leaf = h.detach().requires_grad_()
    codes = leaf + (torch.where(leaf > 0, 1.0, -1.0) - leaf).detach()
    near = affinity[rows][:, rows]
    loss = 0
    for i in range(2 * b):
        cosines = [codes[i] @ codes[j] / codes[i].norm() / codes[j].norm() for j in range(2 * b)]
        below = torch.logsumexp(torch.stack([s for j, s in enumerate(cosines) if j != i]) / c.temperature, 0)
        for j in set(range(2 * b)) - {i}:
            share = near[i % b, j % b] / near[i % b].sum() / 2
            pi = (1 - weight) * (j == (i + b) % (2 * b)) + weight * share
            loss = loss - pi * (cosines[j] / c.temperature - below) / (2 * b)
    loss.backward()
    h.backward(leaf.grad)
    expected = {name: p.grad.clone() for name, p in run.model.named_parameters()}

    batch = [torch.as_tensor(x)[rows].double() for x in data.train.arrays]
    terms = training.step(run, False, *batch, rows)
    torch.testing.assert_close(terms["loss"], loss.detach(), rtol=0, atol=1e-10)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-10, msg=name)


def test_labels_make_no_difference():
    other = np.eye(3, dtype="uint8")[np.arange(N)[::-1] // 10]
    runs = [train(configuration(), pairs(labels)) for labels in (None, other)]
    assert torch.equal(runs[0].weights, runs[1].weights)
    assert set(runs[0].objective.state_dict()) == {"spread"}


def test_a_resumed_run_is_the_whole_run(tmp_path):
    data, config = pairs(), dataclasses.replace(configuration(), evaluate_every=1)
    whole, path = train(config, data), tmp_path / "run.pt"

    def stop(run):
        if run.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, data, checkpoint=path, every=1, evaluate=stop)
    rest = train(config, data, checkpoint=path, every=1, resume=True)
    assert rest.history == whole.history and torch.equal(rest.weights, whole.weights)


def test_files_and_missing_modalities(tmp_path):
    data = pairs()
    model = train(configuration(), data).model
    image, text = data.query.arrays
    codes = model.encode(image, text)
    assert codes.shape == (9, BITS // 8) and codes.dtype == torch.uint8
    model.save_pretrained(tmp_path)
    again = DMMH.from_pretrained(tmp_path)
    for given in ((image, text), (image, None), (None, text)):
        assert torch.equal(again.encode(*given), model.encode(*given))
    assert torch.equal(model.export_program().module()(*map(torch.as_tensor, (image, text))), codes)
    with pytest.raises(ValueError, match="encode: expected image, text or both, found neither"):
        model.encode()
    with pytest.raises(ValueError, match=r"text: expected features of shape \(b, 9\)"):
        model.encode(image, text[:, :4])


def test_it_beats_itq_without_labels():
    data = load("emoji")
    config = train_config("emoji", "full", "plus", bits=16, epochs=8)
    hashers = [train(config, data).model, fit_baseline("itq", data.train, 16, "pair", seed=1)]
    ours, theirs = (
        score(
            {part: np.asarray(hasher.encode(*getattr(data, part).arrays)) for part in ("query", "database")},
            data,
        )
        for hasher in hashers
    )
    assert ours.metrics["mAP"] > theirs.metrics["mAP"] + 0.03


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PairNeighbourConfig(drop=1.0), "drop: expected a number in [0, 1), found 1.0"),
        (lambda: PairNeighbourConfig(neighbour_weight=2.0), "neighbour_weight: expected a share in [0, 1]"),
        (lambda: train_config("emoji", variant="released"), "variant: expected one of paper, plus"),
        (lambda: train(configuration(), load("spoken-digits")), "data: expected pairs, for DMMHConfig"),
        (
            lambda: replace(train_config("spoken-digits"), objective=PairNeighbourConfig()),
            "model: expected DMMHConfig, which PairNeighbourConfig trains, found S5VHConfig",
        ),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_no_room_for_all_pairs_is_named(monkeypatch):
    monkeypatch.setattr("s5vh_nb.models.baselines._FIT_NUMBERS", 10 * (DI + DT))
    with pytest.raises(ValueError, match="training items: expected at most 10, for which there is room"):
        train(configuration(), pairs())
    train(configuration(neighbour_weight=0.0, epochs=1), pairs())
