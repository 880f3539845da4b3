"""A training step of AutoSSVH and of WSCH equals the original's, in float64: loss and every gradient.

Networks and losses of the public programs are rebuilt here from their description, with none of the package's
code: attention head by head, the recurrence frame by frame, losses video by video. Weights, views, noise,
clusters and the drawn negatives are given from outside.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s5vh_nb.basics.config import TrainConfig, from_dict, replace, to_dict
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.learning import clustered_videos as ours
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.learning.clustered_videos import (
    AUTOSSVH,
    AUTOSSVH_RELEASED,
    WSCH,
    AutoSSVH,
    AutoSSVHConfig,
    AutoSSVHLoss,
    AutoSSVHObjective,
    WSCHConfig,
    WSCHLoss,
    WSCHNetwork,
    WSCHObjective,
)
from s5vh_nb.learning.objectives import objective_class
from s5vh_nb.learning.resolve import resolve
from s5vh_nb.learning.training import step, train

N, T, D, BITS = 9, 20, 7, 8
CPU = torch.device("cpu")


class Rounded(torch.autograd.Function):
    "Round to the nearest integer; the gradient passes where the input is not 0."

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return torch.round(y)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (y != 0)


class Selected(torch.autograd.Function):
    "Tokens times who was selected; the gradient of the selection is reversed."

    @staticmethod
    def forward(ctx, tokens, chosen):
        ctx.save_for_backward(tokens, chosen)
        return tokens * chosen[..., None]

    @staticmethod
    def backward(ctx, grad):
        tokens, chosen = ctx.saved_tensors
        return grad * chosen[..., None], -(grad * tokens).sum(-1)


def under(weights, prefix):
    return {name[len(prefix) :]: v for name, v in weights.items() if name.startswith(prefix)}


def linear(x, w, name):
    bias = w.get(f"{name}.bias")
    return x @ w[f"{name}.weight"].T + (0 if bias is None else bias)


def normed(x, w, name, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def hashed(z, w, first, last):
    "Frame codes in {-1, +1}: a hard sigmoid, rounded; nothing passes where the sigmoid is flat."
    bits = normed(linear(z, w, first), w, last, 1e-5)
    return 2 * Rounded.apply(((bits + 1) / 2).clamp(0, 1)) - 1


def attention(x, w, heads):
    "Head by head; only queries and values have a bias, where there is one."
    q, k, v = (x @ part.T for part in w["qkv.weight"].chunk(3))
    if "qkv.bias" in w:
        of_queries, _, of_values = w["qkv.bias"].chunk(3)
        q, v = q + of_queries, v + of_values
    width, outs = q.shape[-1] // heads, []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        weights = torch.softmax(q[..., own] @ k[..., own].mT / math.sqrt(width), -1)
        outs.append(weights @ v[..., own])
    return linear(torch.cat(outs, -1), w, "out")


def contrast(a, b, tau_plus, temperature):
    "Debiased contrast, video by video."
    h = [F.normalize(v, dim=0) for v in (*a, *b)]
    total, n = 0, 2 * len(a) - 2
    for i in range(len(h)):
        partner = (i + len(a)) % len(h)
        positive = torch.exp(h[i] @ h[partner] / temperature)
        negatives = sum(torch.exp(h[i] @ h[j] / temperature) for j in range(len(h)) if j not in (i, partner))
        others = (negatives - tau_plus * n * positive) / (1 - tau_plus)
        total = total - torch.log(positive / (positive + others.clamp(min=n * math.exp(-1 / temperature))))
    return total / len(h)


def masks_of(order, ratio):
    "True where a frame is hidden, (b, t) for each view."
    shown = T - int(ratio * T)
    views = order[:, :shown], order[:, -shown:]
    return [torch.ones(order.shape, dtype=torch.bool).scatter_(1, view, False) for view in views]


def autossvh_tokens(x, w, m):
    table = [[s / 10000 ** (2 * (j // 2) / m) for j in range(m)] for s in range(T)]
    table = [[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in table]
    return linear(x, w, "encoder.embed") + torch.tensor(table)


def transformer(x, w, depth, heads):
    "Layers of a Transformer, a LayerNorm and a linear layer."
    for i in range(depth):
        mix, feed = under(w, f"layers.{2 * i}."), under(w, f"layers.{2 * i + 1}.")
        x = x + attention(normed(x, mix, "norm_forward", 1e-6), under(mix, "mix_forward."), heads)
        hidden = F.gelu(linear(normed(x, feed, "norm_forward", 1e-6), feed, "mix_forward.0"))
        x = x + linear(hidden, feed, "mix_forward.2")
    return linear(normed(x, w, "norm", 1e-6), w, "head")


def hardest(tokens, noise, w):
    "The sampled tokens (b, v, m) of one view: the grades and their noise decide."
    inner = linear(F.gelu(linear(tokens, w, "feed.0")), w, "feed.2")
    noisy = torch.sigmoid(linear(tokens + normed(inner, w, "norm", 1e-5), w, "grade"))[..., 0] + noise
    soft = torch.softmax((noisy - noisy.mean()) / noisy.std() / 0.5, 1)
    shown = T // 2
    best = soft.topk(shown, dim=1).indices
    hard = torch.zeros_like(soft).scatter_(1, best, 1.0)
    picked = Selected.apply(tokens, hard - soft.detach() + soft)
    return picked[hard > 0].reshape(len(tokens), shown, -1)


def set_contrast(h, nearest, centroids, temperatures, negatives):
    "Each video's own prototype against those of the batch and the drawn others, video by video."
    total, ids = 0, [*nearest.tolist(), *negatives]
    for i, code in enumerate(F.normalize(h, dim=1)):
        logits = torch.stack([code @ centroids[j] / temperatures[j] for j in ids])
        total = total + torch.logsumexp(logits, 0) - logits[i]
    return total / len(h)


def autossvh_loss(w, config, x, masks, noises, clusters, negatives):
    "The loss of a step; `clusters`: for each size the batch's cluster numbers, centroids and temperatures."
    m, c, w = config.model, config.objective, w | under(w, "conmh.")
    tokens, rebuilt, voted, h = autossvh_tokens(x, w, m.m), 0, 0, []
    for view in range(2):
        if c.sampler == "grades":
            shown = hardest(tokens, noises[view], under(w, "grades."))
        else:
            shown = tokens[~masks[view]].reshape(len(x), -1, m.m)
        z = transformer(shown, under(w, "encoder."), m.depth, m.heads)
        codes = hashed(z, w, "hash.linear", "hash.norm")
        table = w["positions"].expand(len(x), -1, -1)
        if c.sampler == "grades":
            places, wanted, first = table, x, 0
        else:
            hidden = masks[view]
            places = torch.cat([table[~hidden], table[hidden]]).split(
                [int((~hidden).sum()), int(hidden.sum())]
            )
            places = torch.cat([part.reshape(len(x), -1, m.decoder_m) for part in places], 1)
            wanted, first = x[hidden].reshape(len(x), -1, D), codes.shape[1]
        tail = w["decoder.mask_token"].expand(len(x), T - codes.shape[1], -1)
        z = torch.cat([linear(codes, w, "decoder.embed"), tail], 1) + places
        frames = transformer(z, under(w, "decoder."), m.decoder_depth, m.decoder_heads)[:, first:]
        rebuilt = rebuilt + ((frames - wanted) ** 2).mean()
        h.append(codes.mean(1))
        for of_size, drawn in zip(clusters, negatives[view]):
            voted = voted + set_contrast(h[-1], *of_size, drawn) / (2 * len(clusters))
    return rebuilt + c.alpha * contrast(*h, c.tau_plus, c.temperature) + c.beta * voted


def ssd(x, w):
    "WSCH's selective layer on (b, v, m): frame by frame, two channels beside each other in a convolution."
    heads = len(w["D"])
    z = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * w["norm.weight"]
    signal, gate = linear(z, w, "split").chunk(2, -1)
    padded = torch.cat([torch.zeros(len(x), 3, signal.shape[-1]), signal], 1)
    pairs = padded.unflatten(-1, (-1, 2))  # (b, v + 3, m, 2)
    taps = w["conv.weight"].unflatten(0, (-1, 2))  # (m, 2, 2, 4)
    states, outs = torch.zeros(len(x), heads, signal.shape[-1] // heads, 64), []
    for s in range(x.shape[1]):
        u = torch.einsum("bsgi,gois->bgo", pairs[:, s : s + 4], taps).flatten(1)  # (b, 2m)
        parts = linear(u, w, "project")
        delta = F.softplus(parts[:, :heads] + w["dt_bias"])  # (b, h)
        B, C = parts[:, heads : heads + 64], parts[:, heads + 64 :]
        u = u.unflatten(1, (heads, -1))
        decay = torch.exp(-delta * torch.exp(w["A_log"]))[..., None, None]
        states = decay * states + (delta[..., None] * u)[..., None] * B[:, None, None]
        outs.append(((states * C[:, None, None]).sum(-1) + w["D"][:, None] * u).flatten(1))
    return x + linear(torch.stack(outs, 1) * F.silu(gate), w, "out")


def attended(z, w):
    return z + attention(normed(z, w, "0", 1e-5), under(w, "1."), 4)


def wsch_loss(w, config, x, masks, centers, turn):
    "The loss of a step; `turn`: 'start', 'clusters' or 'contrast'."
    c, rebuilt, drawn, h = config.objective, 0, 0, []
    for hidden in masks:
        z = x[~hidden].reshape(len(x), -1, D)
        z = ssd(linear(normed(z, w, "embed.0", 1e-5), w, "embed.1"), under(w, "embed.2."))
        codes = hashed(attended(z, under(w, "attend.")), w, "hash.0", "hash.1")
        wanted = x[hidden].reshape(len(x), -1, D)
        tail = w["mask_token"].expand(len(x), wanted.shape[1], -1)
        z = attended(linear(torch.cat([codes, tail], 1), w, "widen"), under(w, "attend_again."))
        frames = linear(z[:, codes.shape[1] :], w, "head")
        cosine = (frames * wanted).sum(-1) / (frames.norm(dim=-1) * wanted.norm(dim=-1))
        rebuilt = rebuilt + 1 - cosine.mean()
        h.append(F.normalize(codes.mean(1), dim=1))
        logits = torch.stack([v @ centers.T / centers.norm(dim=1) for v in h[-1]]) / c.cluster_temperature
        drawn = drawn + (torch.logsumexp(logits, 1) - logits.amax(1)).mean()
    of_clusters = c.cluster_weight * drawn if turn == "clusters" else 0
    of_contrast = c.contrast_weight * contrast(*h, c.tau_plus, c.temperature) if turn == "contrast" else 0
    return rebuilt + of_clusters + of_contrast


def toy_data(n=N):
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, T, D))[np.arange(n) % 3]
    x = (kinds + 0.5 * rng.normal(size=(n, T, D))).astype("float32")
    train = Split({"frames": x}, np.arange(n) % 3, "toy")
    return Dataset("spoken-digits", train, train, train, ("one", "two", "three"), "random numbers")


def small_run(name, **changes):
    "A run with random weights, its weights by name, and copies of them that take the other gradients."
    config = train_config("spoken-digits", "smoke", f"{ours.__name__}:{name}", bits=BITS, **changes)
    run = new_run(resolve(config, toy_data()), toy_data(), CPU)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        run.weights += 0.2 * torch.randn(run.weights.shape, generator=generator)
    weights = dict(run.model.named_parameters())
    return run, weights, {name: p.detach().clone().requires_grad_() for name, p in weights.items()}, generator


def check_step(run, past_warmup, batch, weights, theirs, loss):
    "One step of the engine has this loss and the gradients of these copies."
    loss.backward()
    terms = step(run, past_warmup, *batch)
    torch.testing.assert_close(terms["loss"], loss.detach(), rtol=0, atol=1e-10)
    for name, p in weights.items():
        if p.requires_grad:
            torch.testing.assert_close(
                p.grad, theirs[name].grad, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )
            assert p.grad.any(), name


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


ROWS = torch.tensor([4, 2, 0, 5, 1, 3])


@pytest.mark.parametrize("main_phase", [False, True], ids=["warm-up", "main"])
@pytest.mark.parametrize("name", ["AUTOSSVH", "AUTOSSVH_RELEASED"])
def test_a_step_of_autossvh_equals_the_original(name, main_phase, double, monkeypatch):
    run, weights, theirs, generator = small_run(name, depth=2, decoder_depth=2, clusters=(3, 4))
    x = torch.as_tensor(toy_data().train.frames).double()[ROWS]
    order = torch.rand(len(ROWS), T, generator=generator).argsort(1)
    noise = 0.3 * torch.randn(2 * len(ROWS), T, generator=generator)
    monkeypatch.setattr(ours, "_draw_noise", lambda *_: noise)
    negatives, clusters = [[[], []], [[], []]], []
    if main_phase:
        run.objective.before_epoch(run.model, toy_data(), 5)
        o = run.objective
        for nearest, centroids, temperatures in o.prototypes():
            clusters.append((nearest[ROWS], centroids.clone(), temperatures.clone()))
        others = [sorted(set(range(len(c))) - set(n.tolist())) for n, c, _ in clusters]
        negatives = [others, [of[:1] for of in others]]  # the second view has fewer
        drawn = iter(
            [
                [
                    torch.isin(torch.arange(len(c)), torch.tensor(of, dtype=torch.long))
                    for (_, c, _), of in zip(clusters, view)
                ]
                for view in negatives
            ]
        )
        given = [torch.stack(both) for both in zip(*drawn)]
        calls = iter(given)
        monkeypatch.setattr(ours, "_draw_negatives", lambda *_: next(calls))
    loss = autossvh_loss(
        theirs,
        run.config,
        x,
        masks_of(order, run.config.objective.mask_ratio),
        noise.chunk(2),
        clusters,
        negatives,
    )
    check_step(run, main_phase, (x, ROWS, order), weights, theirs, loss)


@pytest.mark.parametrize("turn", ["start", "clusters", "contrast"])
def test_a_step_of_wsch_equals_the_original(turn, double):
    run, weights, theirs, generator = small_run("WSCH", warmup=2)
    x = torch.as_tensor(toy_data().train.frames).double()[ROWS]
    order = torch.rand(len(ROWS), T, generator=generator).argsort(1)
    for epoch in range(("start", "", "clusters", "contrast").index(turn) + 1):
        run.objective.before_epoch(run.model, toy_data(), epoch)
    c = run.config.objective
    masks = masks_of(order, c.start_ratio if turn == "start" else c.mask_ratio)
    centers = run.objective.centers.clone()
    assert centers.any() == (turn != "start")
    loss = wsch_loss(theirs, run.config, x, masks, centers if turn != "start" else torch.ones(2, BITS), turn)
    check_step(run, turn != "start", (x, ROWS, order), weights, theirs, loss)


def made(name, **changes):
    "A configuration with two epochs of warm-up and four after them."
    where = f"{ours.__name__}:{name}"
    return train_config("spoken-digits", "smoke", where, bits=BITS, batch=4, epochs=6, warmup=2, **changes)


def test_networks_have_the_sizes_of_the_originals():
    "As counted there; keys have a bias here, which changes nothing, and an unused number is left out."
    weights = sum(p.numel() for p in AutoSSVH(AutoSSVHConfig()).parameters())
    assert weights == 12_386_402 + 12 * 252 + 2 * 192 - 1
    assert sum(p.numel() for p in WSCHNetwork(WSCHConfig()).parameters()) == 23_531_824


def fields_of(config):
    "Those of a run, its network and its objective by name."
    return vars(config) | vars(config.model) | vars(config.objective)


def test_variants_are_what_the_authors_train():
    "Numbers of their public code: AutoSSVH's configs/AutoSSVH_ucf.py and model/AutoSSVH.py, WSCH's run.py."
    autossvh = dict(m=256, depth=12, heads=6, decoder_m=192, decoder_depth=2, decoder_heads=3, frames=25)
    autossvh |= dict(epochs=350, batch=128, lr=1e-4, weight_decay=0.0, mask_ratio=0.5, warmup=50)
    autossvh |= dict(alpha=1.0, beta=0.2, temperature=0.5, tau_plus=0.1)
    autossvh |= dict(clusters=(250, 400, 600), cluster_temperature=0.2)
    for variant, sampler in ((AUTOSSVH, "grades"), (AUTOSSVH_RELEASED, "random")):
        config = TrainConfig(**variant.changes)
        found, theirs = fields_of(config), autossvh | dict(sampler=sampler)
        assert {name: found[name] for name in theirs} == theirs
        assert objective_class(config) is AutoSSVHObjective
    wsch = dict(m=1024, decoder_m=1024, epochs=100 + 2 * 300, warmup=100, batch=128)
    wsch |= dict(lr=1e-4, lr_end=1e-4, weight_decay=0.0, start_ratio=0.9, mask_ratio=0.6, n_clusters=800)
    wsch |= dict(cluster_weight=0.02, contrast_weight=1.0, cluster_temperature=0.2)
    wsch |= dict(temperature=0.5, tau_plus=0.1)
    config = TrainConfig(**WSCH.changes)
    found = fields_of(config)
    assert {name: found[name] for name in wsch} == wsch
    assert objective_class(config) is WSCHObjective


@pytest.mark.parametrize(
    "name, shown, changes",
    [
        ("AUTOSSVH", 0, dict(mask_ratio=0.97)),  # the sampler rounds down, a random view does not
        ("AUTOSSVH", 20, dict(mask_ratio=0.0)),
        ("AUTOSSVH_RELEASED", 20, dict(mask_ratio=0.04)),
        ("WSCH", 20, dict(start_ratio=0.01)),
        ("WSCH", 20, dict(mask_ratio=0.0)),
    ],
)
def test_views_without_hidden_or_shown_frames_are_refused(name, shown, changes):
    with pytest.raises(ValueError, match=rf"share of hidden frames: expected .* \(shows {shown}\)"):
        train(made(name, **changes), toy_data(), device="cpu", progress=False)


@pytest.mark.parametrize("name, sampled, random", [("AUTOSSVH", 4, 5), ("AUTOSSVH_RELEASED", 4, 5)])
def test_the_check_counts_the_frames_that_are_shown(name, sampled, random, double):
    "A share of .76 of 20 frames: 15 are hidden at random, and the sampler takes 4."
    run, *_ = small_run(name, mask_ratio=0.76)
    seen = []
    run.model.conmh.hash.register_forward_hook(lambda module, args, codes: seen.append(codes.shape[1]))
    order = torch.rand(N, T).argsort(1)
    run.objective(
        run.model,
        torch.as_tensor(toy_data().train.frames).double(),
        torch.arange(N),
        order,
        past_warmup=False,
    )
    counted = (ours._n_sampled if name == "AUTOSSVH" else ours._n_random)(T, 0.76)
    assert seen == [counted] == [sampled if name == "AUTOSSVH" else random]


@pytest.mark.parametrize(
    "settings, field, value",
    [
        (AutoSSVHLoss, "temperature", 0.0),
        (AutoSSVHLoss, "cluster_temperature", 0.0),
        (AutoSSVHLoss, "alpha", -1.0),
        (AutoSSVHLoss, "beta", math.inf),
        (AutoSSVHLoss, "tau_plus", 1.0),
        (AutoSSVHLoss, "mask_ratio", 1.0),
        (AutoSSVHLoss, "clusters", 3),
        (WSCHLoss, "cluster_weight", -1.0),
        (WSCHLoss, "contrast_weight", -1.0),
        (WSCHLoss, "temperature", 0.0),
        (WSCHLoss, "cluster_temperature", 0.0),
        (WSCHLoss, "start_ratio", -0.1),
        (WSCHConfig, "d", 0),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .*, found {value}"):
        settings(**{field: value})


@pytest.mark.parametrize("name", ["AUTOSSVH", "AUTOSSVH_RELEASED", "WSCH"])
def test_a_run_that_was_cut_goes_on(name, tmp_path):
    "Clusters, centers and whose turn it is are as in a run without a break."
    file, options = tmp_path / "run.pt", dict(device="cpu", progress=False, every=1)
    data, config = toy_data(), replace(made(name), evaluate_every=1)

    def stop_in_the_fifth(run):
        if run.epoch == 5:
            raise KeyboardInterrupt

    whole = train(config, data, **options)
    with pytest.raises(KeyboardInterrupt):
        train(config, data, checkpoint=file, evaluate=stop_in_the_fifth, **options)
    resumed = train(config, data, checkpoint=file, resume=True, **options)
    assert resumed.history == whole.history
    assert torch.equal(resumed.weights, whole.weights)


@pytest.mark.parametrize("name", ["AUTOSSVH", "WSCH"])
def test_two_seeds_learn_differently_and_save(name, tmp_path):
    "A saved network gives the same codes; another seed gives others."
    data = toy_data()
    runs = [train(replace(made(name), seed=seed), data, device="cpu", progress=False) for seed in (1, 2)]
    codes = [run.model.encode(data.query.frames) for run in runs]
    assert not torch.equal(*codes)
    runs[0].model.save_pretrained(tmp_path)
    again = type(runs[0].model).from_pretrained(tmp_path)
    assert torch.equal(again.encode(data.query.frames), codes[0])
    assert again.config == runs[0].model.config


def test_a_configuration_survives_json():
    "The numbers of clusters are a tuple, which JSON does not know."
    config = made("AUTOSSVH", clusters=(3, 5))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(ValueError, match="clusters: expected numbers of clusters, each at least 2"):
        replace(config, clusters=(1,))


def test_clusters_are_at_most_half_the_videos():
    "Small sets have fewer than asked for."
    run, *_ = small_run("AUTOSSVH", clusters=(3, 600))
    assert run.objective.sizes == [3, N // 2]
    run, *_ = small_run("WSCH", n_clusters=800)
    assert run.objective.centers.shape == (N // 2, BITS)
