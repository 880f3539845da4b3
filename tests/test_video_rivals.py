"""A training step of ConMH, BTH and SSTH equals that of their public code: loss, and every gradient.

Networks and losses are rebuilt here from the public code's description, with none of the package's code: one
video list at a time, layer by layer and step by step, in float64. Weights and draws are given from outside.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s5vh_nb.basics.config import SLGConfig, TrainConfig, from_dict, to_dict
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.learning.objectives import SLGObjective, objective_class
from s5vh_nb.learning.training import step, train
from s5vh_nb.learning.video_rivals import (
    BTH,
    CONMH,
    SSTH,
    BTHConfig,
    BTHLoss,
    BTHNetwork,
    BTHObjective,
    ConMH,
    ConMHConfig,
    SSTHConfig,
    SSTHLoss,
    SSTHNetwork,
    SSTHObjective,
    _links,
)
from s5vh_nb.models.codes import network_class

T, D, BATCH, BITS = 8, 7, 6, 16
MODULE = "s5vh_nb.learning.video_rivals"


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def toy_data(n=BATCH):
    frames = np.random.default_rng(0).normal(size=(n, T, D)).astype("float32")
    train = Split({"frames": frames}, np.zeros(n, np.int64), "toy")
    return Dataset("spoken-digits", train, train, train, ("one",), "random numbers")


def new(variant, **sizes):
    "A run whose weights are all random, its batch, and copies of the weights by name."
    sizes |= dict(d=D, bits=BITS, batch=BATCH)
    config = train_config("spoken-digits", "full", f"{MODULE}:{variant}", **sizes)
    run = new_run(config, toy_data(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    for p in run.model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    copies = {name: p.detach().clone().requires_grad_() for name, p in run.model.named_parameters()}
    return run, torch.as_tensor(toy_data().train.frames).double(), copies


def assert_equal_step(run, copies, loss, terms, blind=()):
    "The same loss and the same gradients; `blind` names weights that the loss does not depend on."
    loss.backward()
    torch.testing.assert_close(terms["loss"], loss.detach(), rtol=0, atol=1e-10)
    for name, p in run.model.named_parameters():
        theirs = copies[name].grad
        if name in blind:
            assert p.grad.abs().max() < 1e-12, name
        else:
            assert theirs.abs().max() > 1e-7, name
            torch.testing.assert_close(p.grad, theirs, rtol=0, atol=1e-10, msg=name)


class Rounded(torch.autograd.Function):
    "Round; the gradient passes."

    @staticmethod
    def forward(ctx, y):
        return torch.round(y)

    @staticmethod
    def backward(ctx, grad):
        return grad


def binary(x):
    return 2 * Rounded.apply(((x + 1) / 2).clamp(0, 1)) - 1


def under(weights, prefix):
    return {name[len(prefix) :]: v for name, v in weights.items() if name.startswith(prefix)}


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def sinusoids(t, m):
    rows = [[p / 10000 ** (2 * (j // 2) / m) for j in range(m)] for p in range(t)]
    return torch.tensor([[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in rows])


def attended(x, w, heads, bias, dropped=1.0):
    "Softmax attention, head by head; `bias` (3 * inner,) of queries, keys and values."
    q, k, v = (x @ w["qkv.weight"].T + bias).chunk(3, -1)
    outs = []
    for qh, kh, vh in zip(*(part.chunk(heads, -1) for part in (q, k, v))):
        scores = torch.softmax(qh @ kh.transpose(1, 2) / math.sqrt(qh.shape[-1]), -1)
        outs.append(scores * dropped @ vh)
    return linear(torch.cat(outs, -1), w, "out")


@pytest.mark.parametrize(
    "variant, parts",
    [
        (CONMH, (ConMHConfig, ConMH, SLGConfig, SLGObjective)),
        (BTH, (BTHConfig, BTHNetwork, BTHLoss, BTHObjective)),
        (SSTH, (SSTHConfig, SSTHNetwork, SSTHLoss, SSTHObjective)),
    ],
    ids=["ConMH", "BTH", "SSTH"],
)
def test_a_configuration_names_its_classes(variant, parts):
    "So a record, a checkpoint and a saved network find them again."
    config = TrainConfig(**variant.changes)
    found = type(config.model), network_class(config.model), type(config.objective), objective_class(config)
    assert found == parts
    assert from_dict(to_dict(config)) == config


# ConMH


def vision_layers(x, w, depth, heads):
    "Layers of a vision Transformer, norms first; keys have no bias."
    for i in range(depth):
        first, second = under(w, f"layers.{2 * i}."), under(w, f"layers.{2 * i + 1}.")
        a = under(first, "mix_forward.")
        q, _, v = a["qkv.bias"].chunk(3)
        bias = torch.cat([q, torch.zeros_like(q), v])
        norms = [(n["norm_forward.weight"], n["norm_forward.bias"]) for n in (first, second)]
        x = x + attended(F.layer_norm(x, x.shape[-1:], *norms[0], 1e-6), a, heads, bias)
        up = F.gelu(linear(F.layer_norm(x, x.shape[-1:], *norms[1], 1e-6), second, "mix_forward.0"))
        x = x + linear(up, second, "mix_forward.2")
    return x


def normed(x, w, name, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def conmh_codes(x, hidden, w, depth, heads):
    "Codes of the frames that are not hidden; hidden (b, t) bool."
    e, h = under(w, "encoder."), under(w, "hash.")
    z = linear(x, e, "embed")
    z = (z + sinusoids(T, z.shape[-1]))[~hidden].reshape(len(x), -1, z.shape[-1])
    z = linear(normed(vision_layers(z, e, depth, heads), e, "norm", 1e-6), e, "head")
    return binary(normed(linear(z, h, "linear"), h, "norm", 1e-5))


def conmh_frames(codes, hidden, w, depth, heads):
    "The hidden frames, decoded from the codes of the visible ones."
    d = under(w, "decoder.")
    v = linear(codes, d, "embed")
    p = sinusoids(T, v.shape[-1]).expand(len(codes), -1, -1)
    shown, masked = (p[m].reshape(len(codes), -1, v.shape[-1]) for m in (~hidden, hidden))
    z = vision_layers(torch.cat([v + shown, d["mask_token"] + masked], 1), d, depth, heads)
    return linear(normed(z[:, shown.shape[1] :], d, "norm", 1e-6), d, "head")


def debiased(a, b, tau_plus, temperature):
    "The contrast, video by video."
    h, total, n = [F.normalize(v, dim=0) for v in (*a, *b)], 0, 2 * len(a) - 2
    for i in range(len(h)):
        partner = (i + len(a)) % len(h)
        alike = torch.exp(h[i] @ h[partner] / temperature)
        others = sum(torch.exp(h[i] @ h[j] / temperature) for j in range(len(h)) if j not in (i, partner))
        others = ((others - tau_plus * n * alike) / (1 - tau_plus)).clamp(min=n * math.exp(-1 / temperature))
        total = total - torch.log(alike / (alike + others))
    return total / len(h)


def test_conmh_takes_the_step_of_its_public_code():
    "With heads that do not fill the width, as theirs."
    run, x, w = new("CONMH", m=20, depth=2, heads=3, decoder_m=12, decoder_depth=2, decoder_heads=2)
    order = torch.rand(BATCH, T, generator=torch.Generator().manual_seed(1)).argsort(1)
    shown = T - int(0.75 * T)
    loss, h = 0, []
    for visible in (order[:, :shown], order[:, -shown:]):
        hidden = torch.ones(BATCH, T, dtype=torch.bool).scatter_(1, visible, False)
        codes = conmh_codes(x, hidden, w, 2, 3)
        frames = conmh_frames(codes, hidden, w, 2, 2)
        loss = loss + ((frames - x[hidden].reshape(frames.shape)) ** 2).mean()
        h.append(codes.mean(1))
    loss = loss + debiased(*h, 0.1, 0.5)
    none = torch.zeros(BATCH, T, dtype=torch.bool)
    everything = conmh_codes(x, none, w, 2, 3).mean(1)
    torch.testing.assert_close(run.model.eval().h(x), everything, rtol=0, atol=1e-12)
    run.model.train()
    assert_equal_step(run, w, loss, step(run, False, x, torch.arange(BATCH), order))


def test_conmh_has_the_shape_of_its_public_code():
    "The sizes that the release has for FCVID: weights of its encoder and of all, without keys' biases."
    config = train_config("spoken-digits", "full", f"{MODULE}:CONMH", d=4096, bits=64).model
    with torch.device("meta"):
        net = ConMH(config)
    layer = 3 * 252 * 256 + 2 * 252 + 252 * 256 + 256 + 2 * (4 * 256 * 256) + 4 * 256 + 256 + 4 * 256
    encoder = 4096 * 256 + 256 + 12 * layer + 2 * 256 + 256 * 256 + 256
    assert sum(p.numel() for p in net.encoder.parameters()) == encoder + 12 * 252
    assert (config.depth, len(net.encoder.layers), len(net.decoder.layers)) == (12, 24, 4)


# BTH


def bert_norm(x, w, name):
    "By the deviation of a sample."
    away = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt((away**2).sum(-1, keepdim=True) / (x.shape[-1] - 1))
    return w[f"{name}.weight"] * away / (deviation + 1e-6) + w[f"{name}.bias"]


def bth(x, w, dropped):
    "Codes, frames and latent vectors of the frames; `dropped`: a factor for each place with dropout."
    z = linear(x, w, "embed")
    z = (z + sinusoids(T, z.shape[-1])) * dropped[0]
    layer = under(w, "layers.0.")
    z = z + dropped[2] * attended(bert_norm(z, layer, "norm"), layer, 1, layer["qkv.bias"], dropped[1][:, 0])
    up = linear(bert_norm(z, layer, "norm_up"), layer, "up")
    up = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    z = dropped[5] * (z + dropped[4] * linear(dropped[3] * up, layer, "down"))
    codes = binary(linear(z, w, "hash"))
    return codes, linear(codes, w, "restore"), z


@pytest.mark.parametrize("true_frames", [False, True], ids=["as released", "as written"])
def test_bth_takes_the_step_of_its_public_code(true_frames, monkeypatch):
    "Partners, changed frames and dropped places are given."
    m = 12
    run, x, w = new("BTH", m=m, true_frames=true_frames)
    generator = torch.Generator().manual_seed(1)
    rows, others = torch.arange(BATCH), torch.tensor([1, 1, 4, 0, 5, 2])
    alike = torch.tensor([True, False, False, True, True, False])
    both = torch.cat([x, x[others]])
    changed = both * (torch.rand(2 * BATCH, T, 1, generator=generator) < 0.7)
    run.objective.frames = x
    run.objective.anchors.copy_(torch.randn(run.objective.anchors.shape, generator=generator))
    run.objective.nearest = torch.tensor([0, 4, 2, 2, 1, 3])
    monkeypatch.setattr(run.objective, "_partners", lambda rows: (others, alike))
    monkeypatch.setattr(run.objective, "_change", lambda x: changed)
    shapes = [(T, m), (1, T, T), (T, m), (T, 4 * m), (T, m), (T, m)]
    dropped = [(torch.rand(2 * BATCH, *shape, generator=generator) < 0.9) / 0.9 for shape in shapes]
    given = iter(dropped)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x * next(given))

    parts, restored, pulled = [], 0, 0
    for half, numbers in ((slice(0, BATCH), rows), (slice(BATCH, None), others)):
        codes, frames, z = bth(changed[half], w, [factor[half] for factor in dropped])
        target = both[half] if true_frames else changed[half]
        restored = restored + ((frames - target) ** 2).sum() / (2 * T * D * BATCH)
        own = run.objective.anchors[run.objective.nearest[numbers]]
        pulled = pulled + ((z.mean(1) - own) ** 2).sum() / (m * BATCH)
        parts.append(codes.mean(1))
    similarity = (parts[0] * parts[1]).sum(1) / BITS
    wanted = torch.where(alike, 1.0, -1.0)
    loss = 0.92 * restored + 0.08 * ((wanted - similarity) ** 2).sum() / BATCH + 0.8 * pulled
    assert_equal_step(run, w, loss, step(run, False, x, rows, torch.zeros(BATCH, T)))


def test_bth_links_are_those_of_its_public_code():
    "Alike 1, apart 2: from the tables of three, four and five nearest anchors, video by video."
    rng = np.random.default_rng(0)
    anchors = rng.normal(size=(30, 4))
    videos = anchors[rng.integers(0, 30, 150)] + 0.4 * rng.normal(size=(150, 4))
    squares = ((videos[:, None] - anchors) ** 2).sum(2)

    def table(q):
        near = np.sort(squares, 1)[:, :q]
        width = np.mean(np.sqrt(near[:, -1])) / np.sqrt(2)
        Z = np.where(squares <= near[:, -1:], np.exp(-squares / (2 * width**2)), 0)
        Z /= Z.sum(1, keepdims=True)
        return (Z / Z.sum(0) @ Z.T > 1e-5).astype(int)

    theirs = 2 * (table(5) - table(4)) + table(3)
    ours = _links(torch.as_tensor(videos), torch.as_tensor(anchors)).numpy()
    for kind in (0, 1, 2):
        assert np.array_equal(ours == kind, theirs == kind) and (theirs == kind).any(), kind


def test_bth_goes_on_as_if_it_had_not_stopped(tmp_path):
    "Anchors and latent vectors are in the checkpoint; links and frames are made again."
    torch.set_default_dtype(torch.float32)
    small = dict(m=8, d=D, bits=8, batch=32, videos_per_anchor=8, epochs=4)
    config = train_config("spoken-digits", "full", f"{MODULE}:BTH", **small)
    data, file = toy_data(64), tmp_path / "bth.zip"
    options = dict(device="cpu", progress=False)
    whole = train(config, data, **options)

    def stop(run):
        if run.epoch == 2:
            raise KeyboardInterrupt

    halted = train_config("spoken-digits", "full", f"{MODULE}:BTH", **small, evaluate_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(halted, data, **options, checkpoint=file, every=1, evaluate=stop)
    again = train(halted, data, **options, checkpoint=file, resume=True)
    assert again.model.fingerprint == whole.model.fingerprint


@pytest.mark.parametrize("variant", ["BTH", "SSTH"])
def test_videos_of_different_lengths_are_refused(variant):
    data = toy_data()
    some = Split(data.train.inputs, data.train.labels, "toy", lengths=np.array([T, T, 3, T, T, T]))
    config = train_config("spoken-digits", "smoke", f"{MODULE}:{variant}", d=D)
    with pytest.raises(
        ValueError, match=f"spoken-digits: lengths: expected one for all videos, for {variant}"
    ):
        train(config, dataclasses.replace(data, train=some), device="cpu", progress=False)


# SSTH


def lstm_step(h, m, given, w, s, stats=None):
    "Gate and memory of a step with peepholes; the memory is normalised by the batch, or by given statistics."
    gates = linear(h, w, "own") + given
    i, f, g, o = gates.chunk(4, -1)
    i, f = (torch.sigmoid(gate + w["peep"][j] * m) for j, gate in enumerate((i, f)))
    m = f * m + i * torch.tanh(g)
    mean, variance = stats or (m.mean(0), ((m - m.mean(0)) ** 2).mean(0))
    m = w[f"norms.{s}.weight"] * (m - mean) / torch.sqrt(variance + 1e-10) + w[f"norms.{s}.bias"]
    return torch.sigmoid(o + w["peep"][2] * m), m


def read(x, w, stats=None):
    "Output and memory of the last step; the state that is handed on is binary."
    h = m = torch.zeros(len(x), BITS)
    for s in range(T):
        code = binary(h) if s else h
        gate, m = lstm_step(code, m, x[:, s] @ w["given.weight"].T, w, s, stats and stats[s])
        h = gate * m
    return h, m


def played(h, m, w, steps):
    cells, out = under(w, "cells."), []
    for s in range(steps):
        gate, m = lstm_step(h, m, 0, cells, s)
        h = gate * torch.tanh(m)
        out.append(linear(h, w, "head"))
    return out


def test_ssth_takes_the_step_of_its_public_code():
    "Its loss is a sum; ours is divided by the numbers of the frames."
    run, x, w = new("SSTH", frames=T)
    h, m = read(x, under(w, "reader."))
    code, loss = binary(h), 0
    for s, (ahead, behind) in enumerate(
        zip(played(code, m, under(w, "forth."), T), played(code, m, under(w, "back."), T))
    ):
        loss = loss + ((ahead - x[:, s]) ** 2).sum() + ((behind - x[:, T - 1 - s]) ** 2).sum()
    loss = loss + 200 * ((played(code, m, under(w, "mean."), 1)[0] - x.mean(1)) ** 2).sum()
    terms = step(run, False, x, torch.arange(BATCH), torch.zeros(BATCH, T))
    assert_equal_step(run, w, loss / 3 / x.numel(), terms)


def test_ssth_hashes_by_running_statistics():
    run, x, w = new("SSTH", frames=T)
    generator = torch.Generator().manual_seed(1)
    for norm in run.model.reader.norms:
        norm.running_mean.copy_(0.3 * torch.randn(BITS, generator=generator))
        norm.running_var.copy_(0.5 + torch.rand(BITS, generator=generator))
    stats = [(norm.running_mean, norm.running_var) for norm in run.model.reader.norms]
    h, _ = read(x, under(w, "reader."), stats)
    torch.testing.assert_close(run.model.eval().h(x), h.detach(), rtol=0, atol=1e-12)
