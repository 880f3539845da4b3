"BSTH and ACMVH: one training step against the published forward passes and losses, written out."

import numpy as np
import pytest
import torch
from torch import tanh
from torch.nn import functional as F

from s5vh_nb.basics.config import TrainConfig, from_dict, replace, to_dict
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.learning.deep_pairs import (
    ACMVHConfig,
    ACMVHLoss,
    ACMVHNetwork,
    BSTHConfig,
    BSTHLoss,
    BSTHNetwork,
    BSTHObjective,
    _cooccurrence,
    _prototype_loss,
    _Prototypes,
)
from s5vh_nb.learning.objectives import MetricObjective
from s5vh_nb.learning.training import train

N, K, M = 12, 8, 16
DI, DT, CLASSES = 20, 14, 5
SIZES = dict(di=DI, dt=DT, bits=K, width=M, image_hidden=24, text_hidden=18, n_classes=CLASSES)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def drop(x, *_, **__):
    "What stands for dropout, in both: known factors, of mean 1."
    return x * (1 + torch.sin(torch.arange(float(x.numel())).view(x.shape)) / 2)


def pairs():
    rng = np.random.default_rng(0)
    labels = (rng.random((N, CLASSES)) < 0.3) | (np.arange(CLASSES) == np.arange(N)[:, None] % CLASSES)
    inputs = {"image": rng.normal(size=(N, DI)), "text": rng.normal(size=(N, DT))}
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    train = Split(inputs, labels.astype(np.uint8), "toy")
    query = Split({name: x[:3] + 1 for name, x in inputs.items()}, train.labels[:3], "toy")
    return Dataset("emoji", train, train, query, tuple("abcde"), "random numbers")


def a_run(name):
    config = replace(train_config("emoji", "paper", name.lower()), **SIZES)
    torch.manual_seed(1)
    network, made = {"BSTH": (BSTHNetwork, BSTHObjective), "ACMVH": (ACMVHNetwork, MetricObjective)}[name]
    model, objective = network(config.model), made(config, N)
    objective.fit(model, pairs(), progress=False)
    for p in [*model.parameters(), *objective.parameters()]:
        p.data += 0.1 * torch.randn_like(p)  # norms, and the gates' weights, are not at their start
    return model, objective


def labels_and_similarity(objective):
    "Y, and S, which the public code has in single precision, too."
    labels = objective.labels
    return labels, 2 * torch.sigmoid((labels @ labels.T).float()) - 1


def leaves(*modules):
    return {name: p.detach().clone().requires_grad_() for m in modules for name, p in m.named_parameters()}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def batch_norm(w, name, x):
    scaled = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def layer_norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
        + w[f"{name}.bias"]
    )


def mlp(w, name, x):
    for i in (0, 3):
        x = tanh(batch_norm(w, f"{name}.mlp.{i + 1}", linear(w, f"{name}.mlp.{i}", x)))
    return x


def transformer(w, name, z, layers, drop):
    "Post-norm, one head: (b, tokens, m) -> (b, tokens, m)."
    for i in range(layers):
        at, m = f"{name}.layers.{i}", z.shape[-1]
        joint = z @ w[f"{at}.self_attn.in_proj_weight"].T + w[f"{at}.self_attn.in_proj_bias"]
        q, k, v = joint.split(m, -1)
        attended = torch.softmax(q @ k.transpose(1, 2) / m**0.5, -1) @ v
        z = layer_norm(w, f"{at}.norm1", z + drop(linear(w, f"{at}.self_attn.out_proj", attended)))
        wide = linear(w, f"{at}.linear1", z)
        wide = wide / 2 * (1 + torch.erf(wide / 2**0.5))
        z = layer_norm(w, f"{at}.norm2", z + drop(linear(w, f"{at}.linear2", drop(wide))))
    return layer_norm(w, f"{name}.norm", z)


def of_each_token(w, name, z):
    "A Linear of its own for each token: (b, tokens, m) -> (b, tokens, out)."
    weight = w[f"{name}.weight"].view(z.shape[1], -1, z.shape[2])
    return torch.stack([z[:, j] @ weight[j].T for j in range(z.shape[1])], 1) + w[f"{name}.bias"].view(
        z.shape[1], -1
    )


def bsth(w, image, text):
    "The relaxed codes."
    spots = torch.arange(K)[:, None] / 10000 ** (torch.arange(0, M, 2) / M)
    places, tokens = torch.stack([spots.sin(), spots.cos()], -1).flatten(1), []
    for name, x in (("image", image), ("text", text)):
        concepts = linear(w, f"{name}.dilation.linear", mlp(w, name, x)).view(len(x), K, M)
        tokens.append(transformer(w, f"{name}.layers", drop(concepts + places), 2, drop))
    hidden = of_each_token(w, "cnn.conv", sum(tokens)).flatten(1)
    hidden = tanh(batch_norm(w, "cnn.norm", hidden)).view(len(image), K, -1)
    return tanh(of_each_token(w, "hash.conv", hidden))[..., 0]


def acmvh(w, image, text):
    "The relaxed codes."
    parts = []
    for name, x in (("image", image), ("text", text)):
        x = mlp(w, name, x)
        parts.append(x / (1 + torch.exp(-linear(w, f"{name}.gate", x))))
    fused = parts[0] * w["confidence"][0] + parts[1] * w["confidence"][1]
    return tanh(
        linear(w, "hash.0", linear(w, "dilation.3", drop(linear(w, "dilation.0", fused).clamp(min=0))))
    )


def mse(a, b):
    return (a - b).square().sum() / a.numel()


@pytest.mark.parametrize("name", ("BSTH", "ACMVH"))
def test_a_step_is_the_published_one(name, monkeypatch):
    model, objective = a_run(name)
    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    monkeypatch.setattr(F, "dropout", drop)
    image, text = (torch.as_tensor(x).double() for x in pairs().train.arrays)
    terms = objective(model, image, text, torch.arange(N), past_warmup=False)
    terms["loss"].backward()

    w = leaves(model, objective)
    h = {"BSTH": bsth, "ACMVH": acmvh}[name](w, image, text)
    labels, S = labels_and_similarity(objective)
    unit = h / h.square().sum(1, keepdim=True).sqrt()
    loss = mse(1 / (1 + torch.exp(-linear(w, "classifier", h))), labels) + mse(unit @ unit.T, S)
    if name == "BSTH":
        loss = loss + 0.01 * mse(h, objective.targets)
    loss.backward()
    assert abs(terms["loss"].item() - loss.item()) < 1e-12
    ours = dict([*model.named_parameters(), *objective.named_parameters()])
    assert set(ours) == set(w)
    for key, p in ours.items():
        torch.testing.assert_close(p.grad, w[key].grad, rtol=1e-10, atol=1e-10)


def test_a_step_of_the_prototypes_is_the_published_one(monkeypatch):
    torch.manual_seed(0)
    net, c = _Prototypes(CLASSES, K), BSTHLoss()
    net.layers.layers[0].self_attn.dropout = 0.0
    monkeypatch.setattr(F, "dropout", drop)
    labels = torch.as_tensor(pairs().train.labels).double()
    shares = torch.stack(
        [
            torch.stack([(a * b).mean() if i != j else torch.tensor(1.0) for j, b in enumerate(labels.T)])
            for i, a in enumerate(labels.T)
        ]
    )
    torch.testing.assert_close(_cooccurrence(labels), shares)
    ours = _prototype_loss(net, labels, shares, c)
    ours.backward()

    w = leaves(net)
    z = transformer(w, "layers", w["embedding"][None], 1, drop)
    P = tanh(of_each_token(w, "hash.conv", z))[0]
    Z, unit = labels @ P, P / P.norm(dim=1, keepdim=True)
    loss = 100 * mse(Z, Z.sign()) + mse(unit @ unit.T, shares) + 0.01 * Z.sum(1).mean()
    loss = loss + 0.001 * mse(torch.sigmoid(linear(w, "classifier", Z)), labels)
    loss.backward()
    assert abs(ours.item() - loss.item()) < 1e-12
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.grad, w[key].grad, rtol=1e-10, atol=1e-10)


def test_prototypes_depend_on_steps_and_seed_alone(monkeypatch):
    "What was drawn before has no effect on them, and they have none on what is drawn later, on any device."
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs got another seed"))

    def targets(steps, seed=0):
        config = replace(train_config("emoji", "paper", "bsth"), **SIZES)
        objective = BSTHObjective(replace(config, prototype_steps=steps, seed=seed), N)
        torch.rand(7)
        state = torch.random.get_rng_state()
        objective.fit(None, pairs(), progress=False)
        assert torch.equal(torch.random.get_rng_state(), state)
        return objective.targets

    first = targets(100)
    assert torch.equal(targets(100), first)
    assert not torch.equal(targets(100, seed=1), first) and not torch.equal(targets(0), first)


def test_bsth_with_dropout_is_trained_by_one_process(monkeypatch):
    "Several would all drop the same attention weights."
    config, data = replace(train_config("emoji", "smoke", "bsth"), **SIZES), pairs()
    monkeypatch.setattr("s5vh_nb.learning.deep_pairs.n_processes", lambda: 2)
    with pytest.raises(ValueError, match="processes: expected one, for BSTH with dropout .*, found 2"):
        train(config, data, device="cpu", progress=False)
    BSTHObjective.check_data(replace(config, dropout=0.0), data)


@pytest.mark.parametrize("name", ("BSTH", "ACMVH"))
def test_one_modality_programs_and_saving(name, tmp_path):
    torch.set_default_dtype(torch.float32)
    model = a_run(name)[0].eval()
    image, text = (torch.as_tensor(x) for x in pairs().train.arrays)
    codes = model.encode(image, text)
    torch.testing.assert_close(model.export_program().module()(image, text), codes)
    model.save_pretrained(tmp_path)
    assert (type(model).from_pretrained(tmp_path).encode(image, text) == codes).all()
    assert (model.encode(image) != codes).any() and (model.encode(text=text) != codes).any()
    assert from_dict(to_dict(model.config)) == model.config


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="centers: expected one of prototypes"):
        BSTHLoss(centers="semantic")
    with pytest.raises(ValueError, match="width: expected an even number above 0, found 15"):
        BSTHConfig(width=15)
    with pytest.raises(
        ValueError, match="model: expected ACMVHConfig, which ACMVHLoss trains, found BSTHConfig"
    ):
        TrainConfig(model=BSTHConfig(), objective=ACMVHLoss())
    with pytest.raises(ValueError, match="dropout: expected a share in"):
        ACMVHConfig(dropout=1.0)
    for shape in (BSTHConfig, ACMVHConfig):
        for name in ("di", "dt", "image_hidden", "text_hidden"):
            with pytest.raises(ValueError, match=f"{name}: expected a positive number, found 0"):
                shape(**{name: 0})
    for name in ("prototype_steps", "cooccurrence", "binary", "readable", "balance"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number of at least 0, found -1"):
            BSTHLoss(**{name: -1})
