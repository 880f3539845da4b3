"""FMMVH, DMMVH and FGCMH: one training step held against plain formulas, in float64."""

import numpy as np
import pytest
import torch

from s5vh_nb.basics.config import from_dict, replace, to_dict
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.learning import fusing_pairs
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.learning.objectives import objective_class
from s5vh_nb.learning.resolve import resolve
from s5vh_nb.learning.training import train
from s5vh_nb.models.codes import network_class

SIZES = dict(width=6, bits=8, batch=24, epochs=2)
OF = {
    "FMMVH": {},
    "DMMVH": dict(image_hidden=9, text_hidden=7),
    "FGCMH": dict(image_hidden=9, text_hidden=7, anchors=8, nearest=3),
}


@pytest.fixture(scope="module")
def pairs():
    "24 training pairs of 10 and 6 numbers with 4 labels, and some more."
    draw = np.random.default_rng(0)
    y = (draw.random((40, 4)) < 0.3) | (np.arange(4) == np.arange(40)[:, None] % 4)
    x = {"image": draw.normal(size=(40, 10)), "text": draw.normal(size=(40, 6))}
    whole = Split({name: v.astype(np.float32) for name, v in x.items()}, y.astype(np.uint8), "made up")
    parts = whole.take(np.arange(24)), whole.take(np.arange(24, 36)), whole.take(np.arange(36, 40))
    return Dataset("emoji", *parts, tuple("abcd"), "random numbers")


@pytest.fixture
def run(request, pairs):
    "A run of that variant with its objective fitted, in float64."
    config = train_config(
        "emoji", variant=f"s5vh_nb.learning.fusing_pairs:{request.param}", **SIZES, **OF[request.param]
    )
    made = new_run(resolve(config, pairs), pairs, torch.device("cpu"))
    made.model.double(), made.objective.double()
    made.objective.fit(made.model, pairs, progress=False)
    made.model.train()
    return made


def inputs(pairs):
    return [torch.as_tensor(x).double() for x in (*pairs.train.arrays, pairs.train.labels)]


def weights_of(run):
    "Copies of all weights by name, with gradients of their own."
    named = [*run.model.named_parameters(), *run.objective.named_parameters()]
    return {name: p.detach().clone().requires_grad_() for name, p in named}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def batch_normed(w, name, x):
    spread = ((x - x.mean(0)) ** 2).mean(0)
    return (x - x.mean(0)) / (spread + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def mse(a, b):
    return ((a - b) ** 2).mean()


def overlap_loss(h, y):
    "How far the cosines of codes are from the overlap of their labels, which is float32 everywhere."
    length, overlap = (h**2).sum(1).sqrt(), (y @ y.T).float()
    return mse(h @ h.T / length[:, None] / length, 2 / (1 + torch.exp(-overlap)) - 1)


def label_loss(w, name, x, y):
    return mse(1 / (1 + torch.exp(-linear(w, name, x))), y)


def gated(w, image, text):
    "Codes of modalities in (-1, 1): gates on both side by side, then the hash layer."
    x = torch.cat([image, text], 1)
    return torch.tanh(linear(w, "hash", x / (1 + torch.exp(-linear(w, "gating.gate", x)))))


def fmmvh(w, run, image, text, y):
    h = gated(w, torch.tanh(linear(w, "image.0", image)), torch.tanh(linear(w, "text.0", text)))
    return overlap_loss(h, y) + label_loss(w, "classifier", h, y)


def dmmvh(w, run, image, text, y):
    def two_layers(name, x):
        for i in (0, 3):
            x = torch.tanh(batch_normed(w, f"{name}.{i + 1}", linear(w, f"{name}.{i}", x)))
        return x

    h = gated(w, two_layers("image", image), two_layers("text", text))
    apart = torch.stack([((h - row) ** 2).sum(1) for row in h]) / 32  # a share of the 8 bits
    n, found = len(h), []
    for i in range(n):
        near = [j for j in range(n) if j != i and y[i] @ y[j] > 0]
        far = [j for j in range(n) if y[i] @ y[j] == 0]
        found += [(apart[i, s] - apart[i, d] + 0.25).clamp(min=0) for s in near for d in far]
    return torch.stack(found).mean() + 0.01 * ((h.abs() - 1) ** 2).mean()


def on_anchors(graph, x):
    "Weights on the nearest three anchors, one item at a time."
    z = torch.zeros(len(x), len(graph.anchors), dtype=x.dtype)
    for i, row in enumerate(x):
        apart = ((graph.anchors - row) ** 2).sum(1)
        nearest = apart.argsort()[:3]
        near = torch.exp(-apart[nearest] / graph.scale)
        z[i, nearest] = near / near.sum()
    return z


def normalised(z):
    "The graph of all items of a batch as a matrix: half a loop, half the anchor graph."
    return (torch.eye(len(z), dtype=z.dtype) + z @ torch.diag(1 / z.sum(0)) @ z.T) / 2


def fgcmh(w, run, image, text, y):
    def layer(name, graph, f):
        return torch.tanh(batch_normed(w, f"{name}.norm", linear(w, f"{name}.linear", graph @ f)))

    of_image, of_text = (
        on_anchors(part.graph, x) for part, x in zip((run.model.image, run.model.text), (image, text))
    )
    for name in ("first", "second"):
        image = layer(f"image.{name}", normalised(of_image), image)
        text = layer(f"text.{name}", normalised(of_text), text)
    share = w["balance"].exp() / w["balance"].exp().sum()
    f, graph = share[0] * image + share[1] * text, normalised(share[0] * of_image + share[1] * of_text)
    for i in range(2):
        f = layer(f"shared.{i}", graph, f)
    f = graph @ f
    alone = sum(label_loss(w, f"classifiers.{name}", x, y) for name, x in (("image", image), ("text", text)))
    h = torch.tanh(linear(w, "hash", f))
    return overlap_loss(h, y) + label_loss(w, "classifiers.fused", f, y) + alone


@pytest.mark.parametrize(
    "run, plain", [("FMMVH", fmmvh), ("DMMVH", dmmvh), ("FGCMH", fgcmh)], indirect=["run"]
)
def test_a_training_step_is_that_of_the_formulas(run, plain, pairs):
    image, text, y = inputs(pairs)
    if "balance" in dict(run.model.named_parameters()):
        run.model.balance.data = torch.tensor([0.3, -0.4], dtype=torch.float64)
    w = weights_of(run)
    expected = plain(w, run, image, text, y)
    expected.backward()
    found = run.objective(run.model, image, text, torch.arange(24))["loss"]
    found.backward()
    assert abs(found - expected) < 1e-10
    for name, p in [*run.model.named_parameters(), *run.objective.named_parameters()]:
        assert w[name].grad.abs().max() > 0 or name.endswith("bias"), name
        torch.testing.assert_close(p.grad, w[name].grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("run", ["FGCMH"], indirect=True)
def test_running_means_after_three_batches(run, pairs):
    image, text, _ = inputs(pairs)
    graph, layer = run.model.image.graph, run.model.image.first.convolution
    sums = sizes = 0
    for rows in torch.arange(24).split(8):
        run.model(image[rows], text[rows])
        z = on_anchors(graph, image[rows])
        sums = 0.9 * sums + 0.1 * z.T @ image[rows]
        sizes = 0.9 * sizes + 0.1 * z.sum(0)
    torch.testing.assert_close(layer.sums, sums, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.sizes, sizes, rtol=0, atol=1e-12)


@pytest.mark.parametrize("run", ["FGCMH"], indirect=True)
def test_new_pairs_see_the_training_pairs_through_the_anchors(run, pairs):
    image, text, _ = inputs(pairs)
    graph, layer = run.model.image.graph, run.model.image.first.convolution
    run.model(image, text)
    run.model.eval()
    z, new = on_anchors(graph, image), torch.as_tensor(pairs.query.image).double()
    row = on_anchors(graph, new) @ torch.diag(1 / z.sum(0)) @ z.T  # their edges to the training pairs
    torch.testing.assert_close(layer(new, graph(new)), (new + row @ image) / 2, rtol=0, atol=1e-10)
    together = run.model(image[:6], text[:6])
    torch.testing.assert_close(run.model(image[:2], text[:2]), together[:2])


def test_fewer_pairs_than_anchors_are_refused(pairs):
    config = train_config("emoji", variant="s5vh_nb.learning.fusing_pairs:FGCMH", **SIZES)
    made = replace(config, anchors=25)
    objective = new_run(resolve(made, pairs), pairs, torch.device("cpu")).objective
    with pytest.raises(ValueError, match="emoji: training pairs: expected at least 25"):
        objective.check_data(made, pairs)


@pytest.mark.parametrize("run", ["FMMVH", "DMMVH", "FGCMH"], indirect=True)
def test_saved_networks_and_programs_give_the_same_codes(run, pairs, tmp_path):
    model, parts = run.model.float(), (pairs.query.image, pairs.query.text)
    model(*(torch.as_tensor(x) for x in pairs.train.arrays))
    codes = model.eval().encode(*parts)
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path).encode(*parts), codes)
    program = model.export_program().module()
    assert torch.equal(program(*(torch.as_tensor(x) for x in parts)), codes)


def test_the_parts_of_each():
    "What a configuration names is what trains."
    parts = {
        "FMMVH": (fusing_pairs.GatedPairs, fusing_pairs.GatedPairConfig, fusing_pairs.GatedMetricConfig),
        "DMMVH": (fusing_pairs.GatedPairs, fusing_pairs.GatedPairConfig, fusing_pairs.TripletConfig),
        "FGCMH": (fusing_pairs.GraphPairs, fusing_pairs.GraphPairConfig, fusing_pairs.GuidedConfig),
    }
    variants = dict(FMMVH=fusing_pairs.FMMVH, DMMVH=fusing_pairs.DMMVH, FGCMH=fusing_pairs.FGCMH)
    for name, (network, shape, settings) in parts.items():
        model, objective = (variants[name].changes[part] for part in ("model", "objective"))
        assert (type(model), type(objective)) == (shape, settings)
        assert network_class(model) is network
    config = train_config("emoji", variant="s5vh_nb.learning.fusing_pairs:DMMVH")
    assert from_dict(to_dict(config)) == config
    assert objective_class(config) is fusing_pairs.TripletObjective
    guided = train_config("emoji", variant="s5vh_nb.learning.fusing_pairs:FGCMH")
    assert objective_class(guided) is fusing_pairs.GuidedObjective
    with pytest.raises(ValueError, match="margin: expected a finite number of at least 0"):
        replace(config, margin=-0.1)
    with pytest.raises(ValueError, match="triplets, quantization: expected at least one weight above 0"):
        fusing_pairs.TripletConfig(triplets=0, quantization=0)
    with pytest.raises(ValueError, match="classification, guidance: expected at least one weight above 0"):
        fusing_pairs.GuidedConfig(similarity=0, classification=0, guidance=0)


@pytest.mark.parametrize("term, still", [("classification", ["fused"]), ("guidance", ["image", "text"])])
def test_classifiers_without_a_term_are_not_trained(term, still, pairs):
    config = train_config("emoji", variant="s5vh_nb.learning.fusing_pairs:FGCMH", **SIZES, **OF["FGCMH"])
    run = train(replace(config, **{term: 0.0}), pairs, device="cpu", progress=False)
    assert term not in run.history[0]
    trained = {name for name, net in run.objective.classifiers.items() if net.weight.requires_grad}
    assert trained == {"fused", "image", "text"} - set(still)


def test_running_means_survive_an_interruption(pairs, tmp_path, monkeypatch):
    config = train_config("emoji", variant="s5vh_nb.learning.fusing_pairs:FGCMH", **SIZES, **OF["FGCMH"])
    whole = train(config, pairs, device="cpu", progress=False)

    def stop(objective, model, data, epoch):
        if epoch == 1:
            raise InterruptedError

    options = dict(device="cpu", progress=False, checkpoint=tmp_path / "run.pt", every=1)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(fusing_pairs.GuidedObjective, "before_epoch", stop)
        train(config, pairs, **options)
    again = train(config, pairs, resume=True, **options)
    assert len(again.history) == 2
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
