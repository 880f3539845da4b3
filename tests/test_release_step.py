"""Two training steps equal the release's, in float64: loss, every gradient, every updated weight and label.

The release's network, losses, label refresh and AdamW step are rebuilt here from its description, with none
of the package's code: one video list at a time, the recurrence frame by frame. Weights, views and dropped
branches are given from outside. Positions in brackets count the places of the audit.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from s5vh_nb.basics.config import replace
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.learning.checkpoints import new_run
from s5vh_nb.learning.training import step
from s5vh_nb.models.mamba import Layers

T, D, BATCH, CENTERS = 10, 7, 6, 5
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


def binary(x):
    "-1 or +1: a hard sigmoid, rounded; nothing passes where the sigmoid is flat."
    return 2 * Rounded.apply(((x + 1) / 2).clamp(0, 1)) - 1


def mamba(x, w):
    "One Mamba block on (b, t, m), frame by frame."
    d, n = w["A_log"].shape
    r = w["dt_proj.weight"].shape[1]
    signal, gate = (x @ w["in_proj.weight"].T).split(d, -1)
    padded = torch.cat([torch.zeros(len(x), 3, d, dtype=x.dtype), signal], 1)
    taps = w["conv1d.weight"][:, 0]  # (d, 4)
    state, outs = torch.zeros(len(x), d, n, dtype=x.dtype), []
    for s in range(x.shape[1]):
        u = F.silu((padded[:, s : s + 4] * taps.T).sum(1) + w["conv1d.bias"])  # (b, d)
        projected = u @ w["x_proj.weight"].T
        step_size = F.softplus(projected[:, :r] @ w["dt_proj.weight"].T + w["dt_proj.bias"])  # (b, d)
        B, C = projected[:, r : r + n], projected[:, r + n :]
        decay = torch.exp(-step_size[..., None] * torch.exp(w["A_log"]))
        state = decay * state + (step_size * u)[..., None] * B[:, None]
        outs.append(((state * C[:, None]).sum(-1) + w["D"] * u) * F.silu(gate[:, s]))
    return torch.stack(outs, 1) @ w["out_proj.weight"].T


def layer(x, w, kept):
    "Both directions, each with its own norm; `kept` (b,) is 0 where the branch is dropped, else 1/(1-p)."
    m = x.shape[-1:]
    ahead = mamba(
        F.layer_norm(x, m, w["norm_forward.weight"], w["norm_forward.bias"], 1e-6), under(w, "mix_forward.")
    )
    flipped = F.layer_norm(x.flip(1), m, w["norm_backward.weight"], w["norm_backward.bias"], 1e-6)
    back = mamba(flipped, under(w, "mix_backward.") or under(w, "mix_forward.")).flip(1)
    return x + kept[:, None, None] * (ahead + back)


def under(weights, prefix):
    return {name[len(prefix) :]: v for name, v in weights.items() if name.startswith(prefix)}


def sinusoids(t, m):
    rows = [[p / 10000 ** (2 * (j // 2) / m) for j in range(m)] for p in range(t)]
    return torch.tensor(
        [[math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(row)] for row in rows]
    ).double()


def embed(x, mask, w, kept):
    "Frame embeddings of the frames that are not masked; mask (b, t) is true where hidden."
    z = x @ w["embed.weight"].T + w["embed.bias"]
    z = z + sinusoids(T, z.shape[-1])
    z = z[~mask].reshape(len(x), -1, z.shape[-1])
    for i in range(len(kept)):
        z = layer(z, under(w, f"layers.{i}."), kept[i])
    z = F.layer_norm(z, z.shape[-1:], w["norm.weight"], w["norm.bias"], 1e-6)
    return z @ w["head.weight"].T + w["head.bias"]


def hash_codes(z, w, normed=True):
    bits = z @ w["linear.weight"].T + w["linear.bias"]
    return binary(F.layer_norm(bits, bits.shape[-1:], w["norm.weight"], w["norm.bias"]) if normed else bits)


def rebuild(codes, mask, w):
    "The masked frames: visible ones first, then as many mask tokens, not sorted in time."
    v = codes @ w["embed.weight"].T
    p = sinusoids(T, v.shape[-1]).expand(len(codes), -1, -1)
    visible = v + p[~mask].reshape(len(codes), -1, v.shape[-1])
    hidden = w["mask_token"] + p[mask].reshape(len(codes), -1, v.shape[-1])
    z = layer(torch.cat([visible, hidden], 1), under(w, "layers.0."), torch.ones(len(codes)).double())
    z = F.layer_norm(z[:, visible.shape[1] :], z.shape[-1:], w["norm.weight"], w["norm.bias"], 1e-6)
    return z @ w["head.weight"].T + w["head.bias"]


def contrast(a, b, tau_plus, temperature):
    "Debiased contrast, video by video."
    h = [F.normalize(v, dim=0) for v in (*a, *b)]
    total, n = 0, 2 * len(a) - 2
    for i in range(len(h)):
        partner = (i + len(a)) % len(h)
        positive = torch.exp(h[i] @ h[partner] / temperature)
        negatives = sum(torch.exp(h[i] @ h[j] / temperature) for j in range(len(h)) if j not in (i, partner))
        others = ((negatives - tau_plus * n * positive) / (1 - tau_plus)).clamp(
            min=n * math.exp(-1 / temperature)
        )
        total = total - torch.log(positive / (positive + others))
    return total / len(h)


def soft_cross_entropy(logits, labels):
    return -(labels * F.log_softmax(logits, 1)).sum(1).mean()


def loss_of(w, config, x, masks, labels, known, dropped, main_phase):
    """Loss and new labels of a step.

    `w`: all weights by name, `known` (b,): 1 where a label is given and stays, `dropped`: the draws of
    refresh and views.
    """
    c, k = config.objective, config.model.bits
    encoder, hasher, decoder = under(w, "model.encoder."), under(w, "model.hash."), under(w, "model.decoder.")
    classes = w.get("objective.classifier.weight", w["objective.centers"])
    if main_phase:
        with torch.no_grad():
            everything = torch.zeros(len(x), T, dtype=torch.bool)
            codes = hash_codes(
                embed(x, everything, encoder, dropped["refresh"]), hasher, c.refresh_with_norm
            )  # [5]
            logits = codes.mean(1) @ classes.T / (k * 0.5 if c.refresh_with_norm else 1)
            rate = c.refresh * (1 - known[:, None])
            labels = (1 - rate) * labels + rate * torch.softmax(logits, 1)
    rebuilt, h = 0, []
    for mask, kept in zip(masks, dropped["views"]):
        codes = hash_codes(embed(x, mask, encoder, kept), hasher)
        frames = rebuild(codes, mask, decoder)
        rebuilt = rebuilt + ((frames - x[mask].reshape(frames.shape)) ** 2).mean()
        h.append(codes.mean(1))
    aligned = sum(0.5 * soft_cross_entropy(v @ classes.T / (k * 0.5), labels) for v in h)
    return rebuilt + c.alpha * contrast(*h, c.tau_plus, c.temperature) + c.beta * aligned, labels


def adamw(weight, grads, lr, decay, betas=(0.9, 0.999), eps=1e-8):
    "A step of AdamW after those whose gradients come first."
    m = v = 0
    for grad in grads:
        m, v = betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
    m, v = m / (1 - betas[0] ** len(grads)), v / (1 - betas[1] ** len(grads))
    return weight * (1 - lr * decay) - lr * m / (torch.sqrt(v) + eps)


def toy_data():
    rng = np.random.default_rng(0)
    train = Split(
        {"frames": rng.normal(size=(BATCH, T, D)).astype("float32")}, np.zeros(BATCH, np.int64), "toy"
    )
    return Dataset("spoken-digits", train, train, train, ("one",), "random numbers")


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("main_phase", [False, True], ids=["warm-up", "main"])
@pytest.mark.parametrize("name", ["paper", "released", "labels"])
def test_two_steps_equal_the_release(name, main_phase, monkeypatch):
    "With labels for half of the videos, too: these stay, and nothing else is different."
    sizes = dict(d=D, m=16, depth=3, decoder_m=16, bits=8, n_centers=CENTERS, drop_path=0.5, batch=BATCH)
    if name == "labels":
        config = train_config("spoken-digits", "full", **sizes, labelled=0.5)
    else:
        config = train_config("spoken-digits", "full", name, **sizes)
    config = replace(config, start="released") if name == "released" else config
    run = new_run(config, toy_data(), CPU)
    known = torch.tensor([1.0, 0, 0, 1, 1, 0]) if name == "labels" else torch.zeros(BATCH)
    if name == "labels":
        run.objective.known.copy_(known)
    generator = torch.Generator().manual_seed(3)
    run.objective.centers.copy_(torch.where(torch.rand(CENTERS, 8, generator=generator) < 0.5, -1.0, 1.0))
    run.objective.soft_labels.copy_(torch.softmax(torch.randn(BATCH, CENTERS, generator=generator), 1))
    x = torch.as_tensor(toy_data().train.frames).double()
    kept, shown = 1 - torch.linspace(0, 0.5, 3)[:, None], T - int(config.objective.mask_ratio * T)

    weights = {f"model.{name}": p for name, p in run.model.named_parameters()}
    weights |= {f"objective.{name}": p for name, p in run.objective.named_parameters()}
    theirs = {name: p.detach().clone() for name, p in weights.items()}
    grads = {name: [] for name in weights}
    for rows in torch.tensor([[4, 2, 0, 5, 1, 3], [1, 5, 3, 0, 2, 4]]):
        draws = [(torch.rand(3, b, generator=generator) < kept) / kept for b in (BATCH, 2 * BATCH)]
        given = iter(draws if main_phase else draws[1:])
        monkeypatch.setattr(Layers, "draw_factors", lambda self, b: next(given) if len(self) == 3 else None)
        order, masks = torch.rand(BATCH, T, generator=generator).argsort(1), []
        for visible in (order[:, :shown], order[:, -shown:]):
            masks.append(torch.ones(BATCH, T, dtype=torch.bool).scatter_(1, visible, False))
        labels = run.objective.soft_labels[rows].clone()
        dropped = {"refresh": draws[0], "views": draws[1].split(BATCH, 1)}
        theirs = {name: p.requires_grad_() for name, p in theirs.items()}
        everything = theirs | {"objective.centers": run.objective.centers.clone()}
        loss, new_labels = loss_of(
            everything, config, x[rows], masks, labels, known[rows], dropped, main_phase
        )
        loss.backward()

        terms = step(run, main_phase, x[rows], rows, order)
        torch.testing.assert_close(terms["loss"], loss.detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(run.objective.soft_labels[rows], new_labels, rtol=0, atol=1e-10)
        moved = (new_labels != labels).any(1).double()
        assert torch.equal(moved, 1 - known[rows]) if main_phase else not moved.any()
        for name, p in weights.items():
            grads[name].append(theirs[name].grad)
            torch.testing.assert_close(p.grad, grads[name][-1], rtol=0, atol=1e-10, msg=f"gradient of {name}")
            theirs[name] = adamw(theirs[name].detach(), grads[name], config.lr, config.weight_decay)
            torch.testing.assert_close(p.detach(), theirs[name], rtol=0, atol=1e-10, msg=f"{name} after it")


def test_dropped_branches_change_the_step(monkeypatch):
    "The comparison above would notice a branch that is not dropped."
    sizes = dict(d=D, m=16, depth=3, decoder_m=16, bits=8, n_centers=CENTERS, drop_path=0.5, batch=BATCH)
    losses = []
    for factors in (None, torch.tensor([[1.0] * 12, [0.0] * 12, [2.0] * 12])):
        run = new_run(train_config("spoken-digits", "full", **sizes), toy_data(), CPU)
        run.objective.soft_labels.fill_(1 / CENTERS)
        monkeypatch.setattr(Layers, "draw_factors", lambda self, b: factors if len(self) == 3 else None)
        x = torch.as_tensor(toy_data().train.frames).double()
        order = torch.arange(T).expand(BATCH, -1)
        losses.append(step(run, False, x, torch.arange(BATCH), order)["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3
