"The variant plus: its step by hand, ragged videos, resumed runs, files, what is refused, and that it learns."

import dataclasses

import numpy as np
import pytest
import torch

from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.evidence.scoring import score
from s5vh_nb.learning import objectives, training
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.models.codes import pack
from s5vh_nb.models.methods import fit_baseline
from s5vh_nb.models.plus import Plus, pretrained

N, T, D, BITS = 30, 7, 4, 8
SMALL = dict(bits=BITS, m=8, depth=1, time_steps=T, batch=10, epochs=3, dropout=0.0)
LENGTHS = np.random.default_rng(2).integers(3, T + 1, N)


def videos(lengths=None, extra=0, filling=0):
    "Random videos; with lengths, what lies behind each end depends on `filling` alone."
    rng = np.random.default_rng(0)
    x = np.random.default_rng(10 + filling).normal(size=(N, T + extra, D)).astype("float32")
    for i, video in enumerate(x):
        length = T if lengths is None else lengths[i]
        video[:length] = rng.normal(size=(length, D))
    train = Split({"frames": x}, np.arange(N) % 3, "toy", lengths=lengths)
    return Dataset("spoken-digits", train, train, train.take(slice(9)), ("a", "b", "c"), "random numbers")


def configuration(**changes):
    return train_config("spoken-digits", "quick", "plus", **{**SMALL, **changes})


def train(config, data, **options):
    return training.train(config, data, device="cpu", progress=False, **options)


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def loss_by_hand(w, linear, views, affinity, c):
    "The loss of two views, (2b, s, d) together, of a network without layers; everything written out."
    place, j = torch.arange(T)[:, None], torch.arange(8)
    angle = place / 10000 ** (2 * (j // 2) / 8)
    positions = torch.where(j % 2 == 0, torch.sin(angle), torch.cos(angle))
    z = views @ w["embed.weight"].T + w["embed.bias"] + positions
    z = (z - z.mean(2, keepdim=True)) / torch.sqrt(z.var(2, unbiased=False, keepdim=True) + 1e-5)
    z = (z * w["norm.weight"] + w["norm.bias"]).reshape(len(views), -1)
    h = w["gain"] * (z @ w["head.weight"].T + w["head.bias"])
    h = h + (views.reshape(len(views), -1) - linear["mean"]) @ linear["directions"]
    h = (h - h.mean(0)) / torch.sqrt(h.var(0, unbiased=False) + 1e-5)
    clipped = h.clamp(-1, 1)
    codes = clipped + (torch.where(h > 0, 1.0, -1.0) - clipped).detach()
    norms = codes.norm(dim=1)
    cosines = codes @ codes.T / (norms[:, None] * norms)
    total, b = 0, len(affinity)
    for i in range(2 * b):
        others = [j for j in range(2 * b) if j != i]
        below = torch.logsumexp(cosines[i, others] / c.temperature, 0)
        for j in others:
            pi = (1 - c.neighbour_weight) * ((i - j) % b == 0)
            pi = pi + c.neighbour_weight * affinity[i % b, j % b] / (2 * affinity[i % b].sum())
            total = total - pi * (cosines[i, j] / c.temperature - below)
    return total / (2 * b)


def test_a_step_by_hand(double, monkeypatch):
    config, data = configuration(depth=0, d=D), videos()
    run = new_run(config, data, torch.device("cpu"))
    training.fit_objective(run, data)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(N, generator=generator)[:10]
    views = torch.randn(20, T, D, generator=generator)
    given = iter(views.chunk(2))
    monkeypatch.setattr(objectives, "draw_view", lambda *_: next(given))

    theirs = {name: p.detach().clone().requires_grad_() for name, p in run.model.named_parameters()}
    linear = {name: b.clone() for name, b in run.model.linear.named_buffers()}
    affinity = run.objective.affinities.double()[rows][:, rows]
    loss = loss_by_hand(theirs, linear, views, affinity, config.objective)
    loss.backward()

    x = torch.as_tensor(data.train.frames).double()[rows]
    terms = training.step(run, False, x, rows, torch.arange(T).expand(10, -1))
    torch.testing.assert_close(terms["loss"], loss.detach(), rtol=0, atol=1e-10)
    for name, p in run.model.named_parameters():
        grad = theirs[name].grad
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-10, msg=f"gradient of {name}")
        step = grad / (grad.abs() + 1e-8)  # AdamW's first
        updated = theirs[name].detach() * (1 - config.lr * config.weight_decay) - config.lr * step
        torch.testing.assert_close(p.detach(), updated, rtol=0, atol=1e-10, msg=f"{name} after the step")
    assert all(torch.equal(b, linear[name]) for name, b in run.model.linear.named_buffers())


def test_every_weight_learns():
    run = train(configuration(epochs=1, weight_decay=0.0), videos())  # decay would move every weight
    fresh = new_run(run.config, videos(), torch.device("cpu"))
    for (name, p), (_, q) in zip(run.model.named_parameters(), fresh.model.named_parameters()):
        assert not torch.equal(p, q), name


def test_padding_does_not_count():
    runs = [train(configuration(), videos(LENGTHS, extra, filling)) for extra, filling in ((0, 0), (7, 1))]
    assert runs[0].history == runs[1].history and torch.equal(runs[0].weights, runs[1].weights)
    whole = videos(LENGTHS).train
    again = videos(LENGTHS, 7, 1).train
    codes = [run.model.encode(s.frames, lengths=s.lengths) for run, s in zip(runs, (whole, again))]
    assert torch.equal(*codes)
    alone = runs[0].model.encode(whole.frames[4:5, : LENGTHS[4]])
    assert torch.equal(alone, codes[0][4:5])
    holes = np.where(
        np.arange(again.frames.shape[1])[:, None] < again.lengths[:, None, None], again.frames, np.nan
    )
    assert torch.equal(runs[0].model.encode(holes, lengths=again.lengths), codes[0])


def test_a_resumed_run_is_the_whole_run(tmp_path):
    data, config = videos(), configuration(dropout=0.3)
    whole = train(config, data)

    class Stop(Exception):
        pass

    def stop(run):
        if run.epoch == 2:
            raise Stop

    path = tmp_path / "run.pt"
    with pytest.raises(Stop):
        train(dataclasses.replace(config, evaluate_every=1), data, checkpoint=path, every=1, evaluate=stop)
    rest = train(dataclasses.replace(config, evaluate_every=1), data, checkpoint=path, every=1, resume=True)
    assert torch.equal(rest.weights, whole.weights)
    assert torch.equal(rest.model.encode(data.query.frames), whole.model.encode(data.query.frames))


def test_files_and_programs(tmp_path):
    run = train(configuration(), videos())
    x = torch.as_tensor(videos().query.frames)
    codes = run.model.encode(x)
    run.model.save_pretrained(tmp_path)
    assert torch.equal(Plus.from_pretrained(tmp_path).encode(x), codes)
    program = run.model.export_program().module()
    assert torch.equal(program(x), codes)
    longer = torch.randn(5, 11, D)
    assert torch.equal(program(longer), run.model.encode(longer))


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_what_is_known_before_training(lengths):
    "Features' spread, linear hash and affinities, video by video and in NumPy."
    data, config = videos(lengths), configuration(d=D, time_steps=5)
    run = new_run(config, data, torch.device("cpu"))
    training.fit_objective(run, data)
    ends = np.full(N, T) if lengths is None else lengths
    at = np.linspace(0, 1, 5)
    x = np.stack(
        [
            np.stack([np.interp(at * (end - 1), np.arange(end), f) for f in video[:end].T], 1)
            for video, end in zip(data.train.frames, ends)
        ]
    )
    np.testing.assert_allclose(run.objective.spread, x.std((0, 1), ddof=1), rtol=1e-5)
    centred = (x - config.model.centring * x.mean(1, keepdims=True)).reshape(N, -1)
    itq = fit_baseline(
        "itq",
        Split({"frames": centred.reshape(N, 5, D).astype("float32")}, data.train.labels, "x"),
        BITS,
        "flat",
        1,
    )
    z = (centred - centred.mean(0)) @ itq.function.directions
    found = run.model.linear(torch.as_tensor(x, dtype=torch.float32)).numpy()
    np.testing.assert_allclose(found, z / np.sqrt((z**2).mean()), atol=1e-3)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    cosines = z @ z.T - 2 * np.eye(N)
    w = np.zeros((N, N))
    for i in range(N):
        nearest = cosines[i].argsort()[-10:]
        w[i, nearest] = cosines[i, nearest].clip(0) ** 3
    w = w + w.T
    p = w / np.sqrt(np.outer(w.sum(0), w.sum(0)))
    paths = sum(0.9**l * np.linalg.matrix_power(p, l) for l in range(1, 200))
    np.testing.assert_allclose(run.objective.affinities, paths - np.diag(paths.diagonal()), atol=5e-3)


def test_a_network_is_trained_further():
    "The linear hash of the network stays, so that with a tiny learning rate the codes do, too."
    first = train(configuration(), videos())
    other = configuration(seed=2, lr=1e-9, lr_end=1e-9, weight_decay=0.0, epochs=1)
    further = train(other, videos(), start=first.model)
    x = videos().train.frames
    assert (further.model.encode(x) == first.model.encode(x)).float().mean() > 0.8
    assert torch.equal(further.model.linear.directions, first.model.linear.directions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(bits=21, time_steps=5), "bits: expected at most 20 for the linear hash of these videos"),
        (dict(bits=29, time_steps=12), "bits: expected at most 28"),
    ],
)
def test_too_few_videos_or_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        train(configuration(**changes), videos())


def test_it_needs_videos():
    with pytest.raises(ValueError, match="data: expected videos, for PlusConfig, found 'emoji'"):
        train(configuration(), load("emoji"))


def test_a_table_too_large_for_memory(monkeypatch):
    monkeypatch.setattr("s5vh_nb.learning.neighbours.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match="training items: expected fewer: 0.0 GB are needed"):
        train(configuration(), videos())


def test_it_learns_more_than_its_linear_start():
    "On real recordings, with a small network and few epochs; its layers add to the linear hash."
    data = load("spoken-digits")
    run = train(train_config("spoken-digits", "smoke", "plus", bits=16, m=32, epochs=6), data)
    found = {}
    for name, codes_of in (
        ("plus", run.model.encode),
        ("linear", lambda x: pack(run.model.linear(torch.as_tensor(x)))),
    ):
        codes = {"query": data.query, "database": data.database}
        found[name] = score({k: np.asarray(codes_of(s.frames)) for k, s in codes.items()}, data).metrics
    assert found["plus"]["GmAP"] > found["linear"]["GmAP"] + 0.02
    assert run.history[-1]["loss"] < run.history[0]["loss"]


@pytest.mark.parametrize("name,lead", [("spoken-digits", 0.1), ("spoken-pairs", 0.05)])
def test_the_networks_that_come_with_the_package(name, lead):
    "They are the main table's configuration, and ahead of ITQ as the records have it."
    data, net = load(name), pretrained(name)
    assert net.config == dataclasses.replace(
        train_config(name, "full", "plus", bits=64).model, d=net.config.d
    )
    itq = fit_baseline("itq", data.train, 64, "flat", seed=1)
    found = [
        score({k: m.encode(getattr(data, k).frames) for k in ("query", "database")}, data) for m in (net, itq)
    ]
    assert found[0].metrics["GmAP"] > found[1].metrics["GmAP"] + lead
