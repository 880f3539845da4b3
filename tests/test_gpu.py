"What only a GPU runs: fused layers, a norm and the layer behind it, encoding and training by CUDA graphs."

import copy
import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from s5vh_nb.basics.config import PlusConfig, S5VHConfig, replace
from s5vh_nb.basics.profiles import PUBLISHED, train_config
from s5vh_nb.datasets.catalog import load
from s5vh_nb.learning import training
from s5vh_nb.learning.losses import reconstruction_loss
from s5vh_nb.learning.objectives import SLGObjective
from s5vh_nb.models import codes
from s5vh_nb.models.mamba import Bidirectional, Layers, Mamba
from s5vh_nb.models.mixers import LSTM, RWKV, RetNet
from s5vh_nb.models.plus import Plus
from s5vh_nb.models.s5vh import S5VH, take
from s5vh_nb.ops.dispatch import norm_linear, use_backend
from s5vh_nb.ops.streams import GraphedCall, SideStream
from s5vh_nb.ops.triton_scan import scan_backward, scan_forward

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")


def layers(n, m, **options):
    return Layers(*[Bidirectional(lambda: Mamba(m), **options) for _ in range(n)])


def with_gradients(y, loss, given):
    "`y` and the gradients of `loss` with respect to what is given."
    return [y, *torch.autograd.grad(loss, list(given))]


def assert_near(mine, theirs, tolerance):
    "Each tensor of `mine` lies within a relative tolerance of its counterpart, by its norm."
    for a, b in zip(mine, theirs, strict=True):
        assert (a.cpu() - b.cpu()).norm() <= tolerance * b.norm()


OPTIONS = [{}, {"tied": True}, {"directions": "forward"}, {"directions": "backward"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("t", [13, 200])  # the scan takes the second in chunks
def test_fused_layers_are_the_plain_layers(t, options):
    torch.manual_seed(0)
    net = layers(3, 32, **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)  # gains and biases too
    x, plain = torch.randn(3, t, 32), copy.deepcopy(net).double()  # on the CPU layers are the plain ones
    exact = plain(x.double())
    wanted = with_gradients(exact, exact.square().sum(), plain.parameters())
    y = net.cuda()(x.cuda())
    assert_near(with_gradients(y, y.square().sum(), net.parameters()), wanted, 1e-4)
    with torch.no_grad():  # the scan writes over its step sizes, gates over signals, sums over sums
        there = x.cuda()
        assert_near([net(there)], [exact], 1e-4)
        assert torch.equal(there.cpu(), x) and net(there, overwrite=True) is there
        assert_near([there], [exact], 1e-4)


@pytest.mark.parametrize("kind", [RetNet, RWKV])
def test_a_mixer_that_torch_compiles(kind):
    "The same numbers as step by step, in a second layer too."
    torch.manual_seed(0)
    x = torch.randn(3, 13, 64, device="cuda")
    for mix in (kind(64).cuda(), kind(64).cuda()):

        def outcome():
            y = mix(x)
            return with_gradients(y, y.square().sum(), mix.parameters())

        with use_backend("torch"):
            wanted = outcome()
        assert_near(outcome(), wanted, 1e-4)


def test_a_direction_switched_off_in_one_layer():
    torch.manual_seed(0)
    net, x = layers(2, 16), torch.randn(2, 5, 16)
    net[1].directions = "forward"
    wanted = net(x)
    assert_near([net.cuda()(x.cuda())], [wanted], 1e-4)


@pytest.mark.parametrize("options", [{}, {"directions": "backward"}])
def test_layers_in_half_precision(options):
    "The papers' width, also with a view of 25 frames; autocast rounds to eight bits."
    torch.manual_seed(0)
    net = layers(2, 192, **options)
    for layer in net:
        for norm, _ in layer.branches():
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias, std=0.2)
    x, plain = torch.randn(5, 25, 192), copy.deepcopy(net).double()
    weights = torch.randn(5, 25, 192)
    exact = plain(x.double())
    wanted = with_gradients(exact, (exact * weights).sum(), plain.parameters())
    with torch.autocast("cuda", torch.bfloat16):
        y = net.cuda()(x.cuda())
    found = with_gradients(y, (y * weights.cuda()).sum(), net.parameters())
    assert all(v.dtype == torch.float32 for v in found)
    assert_near(found, wanted, 2e-2)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("m,rows", [(16, 13), (100, 64), (256, 256)])
def test_norm_and_linear(m, rows, half):
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(m, eps=1e-6).cuda(), nn.Linear(m, rows).cuda()
    x = torch.randn(3, 9, m, device="cuda").requires_grad_()
    for p in norm.parameters():
        nn.init.normal_(p)
    given = [x, *norm.parameters(), *linear.parameters()]
    weights = torch.randn(3, 4, rows, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        y = norm_linear(x[:, 5:], norm, linear)
    exact = linear(norm(x[:, 5:]))
    found = with_gradients(y, (y * weights).sum(), given)
    wanted = with_gradients(exact, (exact * weights).sum(), given)
    assert found[0].dtype == (torch.bfloat16 if half else torch.float32)
    assert all(v.dtype == torch.float32 for v in found[1:])
    assert_near(found, wanted, 2e-2 if half else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [13, 4096, 5000])
def test_error_of_rebuilt_frames(d, dtype):
    torch.manual_seed(0)
    x = torch.randn(8, 25, d, device="cuda", dtype=dtype)
    hidden = torch.rand(16, 25, device="cuda").argsort(1)[:, :12]
    predicted = torch.randn(16, 12, d, device="cuda", dtype=dtype).requires_grad_()
    exact = predicted.detach().double().requires_grad_()
    mine = reconstruction_loss(predicted, x, hidden)
    wanted = 2 * (exact - take(x, hidden).double()).square().mean()
    assert (mine - wanted).abs() <= 1e-5 * wanted
    grad, exact_grad = torch.autograd.grad(mine, predicted)[0], torch.autograd.grad(wanted, exact)[0]
    assert grad.dtype == dtype
    assert_near([grad], [exact_grad], 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("half", [False, True])
def test_codes_of_a_graph_are_those_of_one_block(half):
    "Twelve blocks: an ordinary one, then replays; the last is smaller. Other shapes may round otherwise."
    torch.manual_seed(0)
    model = S5VH(S5VHConfig(d=8, m=32, depth=2, decoder_m=16, bits=32)).cuda()
    x = torch.randn(45, 25, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        alone, blocks = model.encode(x, batch=45), model.encode(x, batch=4)
    assert (alone != blocks).float().mean() < 0.01
    with pytest.raises(ValueError, match="finite"):
        model.encode(torch.full_like(x, torch.nan), batch=4)


def small():
    torch.manual_seed(0)
    return S5VH(S5VHConfig(d=8, m=32, depth=2, decoder_m=16, bits=32)).cuda()


def same_as_a_copy(model, x, times=4):
    "The codes of a call, replayed ones too, are those of a copy, which has no graphs yet."
    wanted = copy.deepcopy(model).encode(x)
    assert all(torch.equal(model.encode(x), wanted) for _ in range(times))
    return wanted


def test_graphs_of_earlier_calls_hold_while_a_network_stays_as_it_was():
    "They follow updates; after a change of numbers, precision, backend, attributes or hooks others are made."
    model, x = small(), torch.randn(2000, 25, 8, device="cuda")
    first = same_as_a_copy(model, x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-1)
    updated = same_as_a_copy(model, x)
    assert (updated != first).float().mean() > 0.1
    others = []
    with torch.autocast("cuda", torch.bfloat16):
        others.append(same_as_a_copy(model, x))
    with training.matmul_precision("tf32"):
        others.append(same_as_a_copy(model, x))
    with use_backend("torch"):  # its codes are hardly ever others
        assert not codes._ENCODERS[model].watched.is_as_it_was()
        same_as_a_copy(model, x)
    for layer in model.encoder.layers:
        layer.directions = "forward"
    others.append(same_as_a_copy(model, x))
    for layer in model.encoder.layers:
        layer.directions = "both"
    for p in model.parameters():
        p.data = p.data.half()
    others.append(same_as_a_copy(model, x))
    assert all((other != updated).any() for other in others)
    assert torch.equal(same_as_a_copy(model.half(), x), others[-1])
    hook = model.hash.register_forward_hook(lambda module, inputs, out: -out)
    assert (same_as_a_copy(model, x) != others[-1]).float().mean() > 0.9
    hook.remove()
    assert torch.equal(same_as_a_copy(model, x), others[-1])
    there = model.cpu().encode(x.cpu())  # the graphs' weights have left the GPU
    assert model not in codes._ENCODERS and (there != others[-1]).float().mean() < 0.02
    assert torch.equal(same_as_a_copy(model.cuda(), x), others[-1])


def test_other_parts_in_the_place_of_earlier_ones():
    "A network whose first layer takes other features now, then with shorter codes in the same memory."
    model = small()
    same_as_a_copy(model, torch.randn(9, 25, 8, device="cuda"))
    model.config, model.encoder.embed = replace(model.config, d=5), torch.nn.Linear(5, 32, device="cuda")
    x = torch.randn(9, 25, 5, device="cuda")
    assert same_as_a_copy(model, x).shape == (9, 4)
    for name, p in [*model.hash.linear.named_parameters()]:
        setattr(model.hash.linear, name, nn.Parameter(p.data[:8]))
    model.hash.norm = nn.LayerNorm(8, device="cuda")
    assert same_as_a_copy(model, x).shape == (9, 1)


@pytest.mark.parametrize("make", [small, lambda: Plus(PlusConfig(d=8, bits=32, time_steps=25)).cuda()])
def test_features_of_half_precision(make):
    "They are taken as they are, where products are of half precision, and else made float32."
    model, x = make(), torch.randn(9, 25, 8, device="cuda").bfloat16()
    for half in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            for _ in range(4):
                assert (model.encode(x) != model.encode(x.float())).float().mean() < (0.02 if half else 1e-9)


def test_encoding_in_inference_mode():
    "Its graphs serve other calls as well."
    model, x = small(), torch.randn(9, 25, 8, device="cuda")
    with torch.inference_mode():
        inside = same_as_a_copy(model, x)
    assert torch.equal(same_as_a_copy(model, x), inside)


def test_graphs_go_with_their_network():
    "Memory and entry are free once nobody holds the network; a first one is for what stays, such as streams."
    x, held = torch.randn(2000, 25, 8, device="cuda"), []
    for _ in range(3):
        model = small()
        assert all(model.encode(x) is not None for _ in range(4)) and model in codes._ENCODERS
        del model
        gc.collect()
        torch.cuda.empty_cache()
        held.append((len(codes._ENCODERS), torch.cuda.memory_reserved()))
    entries, reserved = zip(*held)
    assert len(set(entries)) == 1 and reserved[2] <= reserved[1]


def test_threads_share_the_graphs_of_a_network():
    model = small()
    inputs = [torch.randn(9, 25, 8, device="cuda") for _ in range(8)]
    alone = [model.encode(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for mine, wanted in zip(pool.map(model.encode, inputs), alone):
                assert torch.equal(mine, wanted)


@torch.no_grad()
def test_slices_of_videos_are_the_whole():
    "100 videos of 600 frames are two slices."
    torch.manual_seed(0)
    net, x = layers(2, 32).cuda(), torch.randn(100, 600, 32, device="cuda")
    for factors in (None, torch.rand(2, 100, device="cuda")):
        of_parts = [None] * 5 if factors is None else factors.split(20, 1)
        alone = [net(part, factors=own) for part, own in zip(x.split(20), of_parts)]
        assert_near([net(x, factors=factors)], [torch.cat(alone)], 1e-6)
        assert_near([net(x.clone(), factors, overwrite=True)], [torch.cat(alone)], 1e-6)


def test_gradients_of_a_captured_step():
    "Side streams in a CUDA graph, at the papers' size: on every replay the gradients of the plain layers."
    torch.manual_seed(0)
    net = layers(4, 256).cuda()
    x, weights = torch.randn(256, 13, 256, device="cuda"), torch.randn(256, 13, 256, device="cuda")

    def gradients(x):
        return torch.autograd.grad((net(x) * weights).sum(), list(net.parameters()))

    with use_backend("torch"):
        wanted = gradients(x)
    step = GraphedCall(gradients)
    for _ in range(8):
        assert_near(step(x), wanted, 1e-3)


def test_inputs_of_another_kind_get_an_ordinary_call():
    ones = torch.ones(3, device="cuda")
    total = GraphedCall(lambda a, b: a + (0 if b is None else b))
    for k in range(6):
        assert torch.equal(total(ones, k * ones), (1 + k) * ones)
    assert torch.equal(total(ones, None), ones)
    assert torch.equal(total(ones[:2], ones[:2]), 2 * ones[:2])
    assert total(ones.double(), ones.double()).dtype == torch.float64
    for n in (4, 5, 6, 7, 8) * 4:  # more shapes than have graphs
        x = torch.randn(n, device="cuda")
        assert torch.equal(total(x, x), 2 * x)
    assert len(total.graphs) == 4


# three layers, so that some are dropped
CONFIG = train_config("spoken-digits", "smoke", epochs=4, warmup=1, precision="float32", depth=3)
TERMS = ("loss", "reconstruction", "contrast", "alignment")


def digits(ragged):
    "The data set, or one whose training videos have 12 to 25 frames."
    data = load("spoken-digits")
    if not ragged:
        return data
    train = dataclasses.replace(data.train, lengths=12 + np.arange(len(data.train)) % 14)
    return dataclasses.replace(data, train=train, database=train)


PLUS = train_config("spoken-digits", "smoke", "plus", epochs=4, precision="float32")


def trained(ragged=False, config=CONFIG, **options):
    return training.train(config, digits(ragged), progress=False, **{"device": "cuda", **options})


def stopped(monkeypatch, path, **options):
    "Train until the third epoch, which fails; the checkpoint has two."
    epoch = training.train_epoch

    def dies(run, *rest):
        if run.epoch == 2:
            raise KeyboardInterrupt
        return epoch(run, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_epoch", dies)
        trained(checkpoint=path, every=1, **options)


def losses(run):
    return torch.tensor([[h[name] for name in TERMS if name in h] for h in run.history])


def ordinary_step(run, past_warmup, inputs):
    "In place of `make_step`: nothing is captured."

    def take_step(rows, *others):
        return training.step(run, past_warmup, *(x[rows] for x in inputs), rows, *others)

    return take_step


@pytest.mark.parametrize("ragged", [False, True])
def test_captured_steps_of_plus_draw_new_views(monkeypatch, ragged):
    "The draws of views and dropout in a captured step are those of an ordinary one."
    captured = trained(ragged, PLUS)
    monkeypatch.setattr(training, "make_step", ordinary_step)
    ordinary = trained(ragged, PLUS)
    assert torch.allclose(losses(captured), losses(ordinary), rtol=1e-3)
    codes = [run.model.encode(load("spoken-digits").query.frames) for run in (captured, ordinary)]
    assert (codes[0] == codes[1]).float().mean() > 0.95


@pytest.mark.parametrize("ragged", [False, True])
def test_captured_steps_are_the_ordinary_steps(monkeypatch, ragged):
    "Before and after the warm-up, with labels that move and a learning rate that falls."
    captured = trained(ragged)
    monkeypatch.setattr(training, "make_step", ordinary_step)
    ordinary = trained(ragged)
    assert torch.allclose(losses(captured), losses(ordinary), rtol=1e-3)
    labels = [run.objective.soft_labels for run in (captured, ordinary)]
    assert torch.allclose(*labels, atol=1e-4)


RIVALS = [(kind, name) for kind, names in PUBLISHED.items() for name in names]


@pytest.mark.parametrize("kind, name", RIVALS)
def test_captured_steps_of_rivals(monkeypatch, kind, name):
    "As published: their draws and what they keep from step to step, too."
    data = digits(False) if kind == "videos" else load("emoji")
    config = train_config(data.name, "smoke", name, epochs=4, precision="float32")
    captured = training.train(config, data, device="cuda", progress=False)
    monkeypatch.setattr(training, "make_step", ordinary_step)
    ordinary = training.train(config, data, device="cuda", progress=False)
    both = [[h["loss"] for h in run.history] for run in (captured, ordinary)]
    np.testing.assert_allclose(*both, rtol=1e-3)
    codes = [run.model.encode(*data.query.arrays) for run in (captured, ordinary)]
    assert (codes[0] == codes[1]).float().mean() > 0.95


@pytest.mark.parametrize("past_warmup", [False, True])
def test_a_step_with_dropped_layers_is_that_on_a_cpu(past_warmup, monkeypatch):
    "Loss, gradients and labels with the same draws, which the refresh of labels has, too."
    config = replace(CONFIG, relaxation="tanh", d=13)
    x, order = torch.randn(5, 25, 13), torch.rand(5, 25).argsort(1)
    kept = 1 - torch.linspace(0, 0.5, 3)[:, None]
    drawn = {b: (torch.rand(3, b) < kept) / kept for b in (5, 10)}
    asked, found = [], []

    def draw_factors(layers, b):
        asked.append(b)
        return drawn[b].to(layers.kept.device) if len(layers) == 3 else None

    monkeypatch.setattr(Layers, "draw_factors", draw_factors)
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        torch.manual_seed(0)
        model, objective = S5VH(config.model), SLGObjective(config, 5)
        objective.centers.copy_(torch.randn_like(objective.centers).sign())
        objective.soft_labels.copy_(torch.randn_like(objective.soft_labels).softmax(1))
        model, objective = model.to(device, dtype), objective.to(device, dtype)
        parts = [x.to(device, dtype), torch.arange(5, device=device), order.to(device)]
        loss = objective(model, *parts, past_warmup=past_warmup)["loss"]
        found.append([*with_gradients(loss, loss, model.parameters()), objective.soft_labels])
    assert_near(*reversed(found), 1e-3)
    assert (drawn[10] == 0).any() and (5 in asked) == past_warmup


def test_dropped_layers_go_on_as_drawn_after_a_stop(tmp_path, monkeypatch):
    "The same seed gives the same training, also where it was stopped."
    whole, again = trained(), trained()
    assert whole.history == again.history
    stopped(monkeypatch, tmp_path / "run.pt")
    resumed = trained(checkpoint=tmp_path / "run.pt", resume=True)
    assert torch.allclose(losses(resumed), losses(whole), rtol=1e-5)


@pytest.mark.parametrize("mixer", ["Mamba", "Transformer", "RetNet"])
def test_the_loss_of_videos_of_different_lengths_is_that_on_a_cpu(mixer):
    config = replace(CONFIG, mixer=mixer, relaxation="tanh", depth=1, d=13)
    lengths = torch.tensor([25, 4, 13, 24, 7])
    x, drawn = torch.randn(5, 25, 13), torch.rand(5, 25)
    order = drawn.masked_fill(torch.arange(25) >= lengths[:, None], 2).argsort(1)
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        torch.manual_seed(0)
        model, objective = S5VH(config.model).to(device, dtype), SLGObjective(config, 5).to(device, dtype)
        parts = [x.to(device, dtype), *(v.to(device) for v in (torch.arange(5), order, lengths))]
        loss = objective(model, *parts, past_warmup=True)["loss"]
        found.append(with_gradients(loss, loss, model.parameters()))
    assert_near(*reversed(found), 1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_features_that_do_not_fit_are_fetched_meanwhile(precision, monkeypatch):
    "Threads read the next batches, also while a step is captured; features on the GPU give the same numbers."
    config = replace(CONFIG, precision=precision)
    moved = trained(config=config)
    monkeypatch.setattr(training, "move_if_they_fit", lambda inputs, device, precision: inputs)
    fetched = trained(config=config)
    assert fetched.history == moved.history
    assert torch.equal(fetched.objective.soft_labels, moved.objective.soft_labels)


@pytest.mark.parametrize("first,then", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_goes_on_elsewhere(first, then, tmp_path, monkeypatch):
    stopped(monkeypatch, tmp_path / "run.pt", device=first)
    run = trained(device=then, checkpoint=tmp_path / "run.pt", resume=True)
    assert len(run.history) == CONFIG.epochs and run.history[-1]["loss"] < run.history[0]["loss"]


def test_after_an_error_in_a_recording_others_can_be_made():
    "An error leaves work of a side stream behind, and random numbers that were asked for in the recording."
    beside = SideStream(torch.device("cuda"))

    def broken(x):
        y = beside(lambda: torch.rand_like(x) + x)
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("as if")
        beside.join(y)
        return y

    call, x = GraphedCall(broken), torch.zeros(3, device="cuda")
    for _ in range(2):
        call(x)
    with pytest.raises(torch.OutOfMemoryError, match="as if"):
        call(x)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(3, device="cuda")
    sound = GraphedCall(lambda x: torch.rand_like(x) + x)
    results = {tuple(sound(x).tolist()) for _ in range(5)}
    assert len(results) == 5  # other numbers each time


def test_gradients_of_more_than_two_billion_numbers():
    "The parts of the gradients of B and C are more than 32 bits count; the last are those of a small batch."
    b, t, d, n = 2200, 1000, 1024, 16
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of GPU memory")
    torch.manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    u, delta, z, dy = (numbers(b, t, d) for _ in range(4))
    B, C = numbers(b, t, 1, n), numbers(b, t, 1, n)
    A, bias = -torch.rand(d, n, device="cuda"), torch.full((d,), -4.0, device="cuda")

    def gradients(rows):
        inputs = *(x[rows] for x in (u, delta)), A, *(x[rows] for x in (B, C)), None, z[rows], bias
        made = scan_forward(*inputs, True, d, True, False)
        return scan_backward(dy[rows], *inputs, made.saved, True, d)

    few = slice(b - 4, b)
    for mine, theirs in zip(gradients(slice(None))[:4], gradients(few)[:4], strict=True):
        assert_near([mine[few].float()], [theirs.float().cpu()], 1e-3)


def test_an_lstm_of_more_than_two_billion_gates():
    "Gradients of the last two of 64 videos, each of 40,000 frames, are those that these have alone."
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of GPU memory")
    torch.manual_seed(0)
    net, x = LSTM(256).cuda(), torch.randn(64, 40_000, 256, device="cuda")
    weights = list(net.parameters())
    of_all = torch.autograd.grad(net(x)[62:].square().mean(), weights)
    of_few = torch.autograd.grad(net(x[62:]).square().mean(), weights)
    assert_near(of_all, [grad.cpu() for grad in of_few], 1e-3)


@pytest.mark.parametrize("directions", ["forward", "both"])
@torch.no_grad()
def test_layers_in_pieces_are_the_whole_network(directions):
    "Each piece takes up the states that the one before has left."
    torch.manual_seed(0)
    net = S5VH(S5VHConfig(d=13, bits=16, m=32, depth=2, decoder_m=16, directions=directions)).cuda().eval()
    x, found, start = torch.randn(3, 400, 13, device="cuda"), [], 0
    whole, states = net.encoder(x), net.encoder.layers.allocate_inference_cache(3)
    for size in (1, 199, 7, 193):
        seen = x[:, start : start + size] if directions == "forward" else x[:, start:]
        z, states = net.encoder.step(seen, start, states, size)
        found.append(z)
        start += size
    assert_near([torch.cat(found, 1)], [whole.cpu()], 1e-4)
