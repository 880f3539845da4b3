"What only a GPU runs: all layers in one step, a norm and the layer behind it, encoding by a CUDA graph. Skipped without one."
import copy

import pytest, torch
from torch import nn

from s5vh_nb import datasets, training
from s5vh_nb.basics import Captured
from s5vh_nb.config import S5VHConfig, train_config
from s5vh_nb.losses import reconstruction_loss
from s5vh_nb.mixers import RWKV, Bidirectional, Layers, Mamba, RetNet, norm_linear
from s5vh_nb.s5vh import S5VH, take
from s5vh_nb.scan import use_backend

if not torch.cuda.is_available(): pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"directions": "forward"}, {"directions": "backward"}])
def test_layers_in_one_step_are_the_plain_layers(options):
    torch.manual_seed(0)
    net = Layers(*[Bidirectional(lambda: Mamba(32), **options) for _ in range(2)])
    for p in net.parameters(): nn.init.normal_(p, std=.3)                # gains and biases too
    x, plain = torch.randn(3, 13, 32), copy.deepcopy(net).double()       # on the CPU Layers are the plain ones
    exact = plain(x.double())
    wanted = [exact, *torch.autograd.grad(exact.square().sum(), list(plain.parameters()))]
    y = net.cuda()(x.cuda())
    for mine, theirs in zip([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))], wanted, strict=True):
        assert (mine.cpu() - theirs).norm() <= 1e-4*theirs.norm()


@pytest.mark.parametrize("kind", [RetNet, RWKV])
def test_a_mixer_that_torch_compiles(kind):
    "The same numbers as step by step, in a second layer too."
    torch.manual_seed(0)
    x = torch.randn(3, 13, 64, device="cuda")
    for mix in (kind(64).cuda(), kind(64).cuda()):
        def graded(y): return [y, *torch.autograd.grad(y.square().sum(), list(mix.parameters()))]
        with use_backend("torch"): wanted = graded(mix(x))
        for mine, theirs in zip(graded(mix(x)), wanted, strict=True): assert (mine - theirs).norm() <= 1e-4*theirs.norm()


def test_a_silenced_direction_in_one_layer():
    torch.manual_seed(0)
    net, x = Layers(*[Bidirectional(lambda: Mamba(16)) for _ in range(2)]), torch.randn(2, 5, 16)
    net[1].directions = "forward"
    wanted = net(x)
    assert (net.cuda()(x.cuda()).cpu() - wanted).norm() <= 1e-4*wanted.norm()


@pytest.mark.parametrize("options", [{}, {"directions": "backward"}])
def test_layers_in_half_precision(options):
    "The papers' width, also with a view of 25 frames; autocast rounds to eight bits."
    torch.manual_seed(0)
    net = Layers(*[Bidirectional(lambda: Mamba(192), **options) for _ in range(2)])
    for layer in net:
        for norm, _ in layer.ways(): nn.init.normal_(norm.weight, 1, .2), nn.init.normal_(norm.bias, std=.2)
    x, plain, weights = torch.randn(5, 25, 192), copy.deepcopy(net).double(), torch.randn(5, 25, 192)
    exact = plain(x.double())
    wanted = [exact, *torch.autograd.grad((exact*weights).sum(), list(plain.parameters()))]
    with torch.autocast("cuda", torch.bfloat16): y = net.cuda()(x.cuda())
    for mine, theirs in zip([y, *torch.autograd.grad((y*weights.cuda()).sum(), list(net.parameters()))], wanted, strict=True):
        assert mine.dtype == torch.float32 and (mine.cpu() - theirs).norm() <= 2e-2*theirs.norm()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("m,rows", [(16, 13), (100, 64), (256, 256)])
def test_norm_and_linear(m, rows, half):
    torch.manual_seed(0)
    norm, linear, x = nn.LayerNorm(m, eps=1e-6).cuda(), nn.Linear(m, rows).cuda(), torch.randn(3, 9, m, device="cuda").requires_grad_()
    for p in norm.parameters(): nn.init.normal_(p)
    given, weights = [x, *norm.parameters(), *linear.parameters()], torch.randn(3, 4, rows, device="cuda")
    def graded(y): return [y, *torch.autograd.grad((y*weights).sum(), given)]
    with torch.autocast("cuda", torch.bfloat16, enabled=half): y = norm_linear(x[:, 5:], norm, linear)
    for mine, theirs in zip(graded(y), graded(linear(norm(x[:, 5:]))), strict=True):
        assert mine.dtype == (torch.bfloat16 if half and mine is y else torch.float32)
        assert (mine - theirs).norm() <= (2e-2 if half else 1e-4)*theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [13, 4096, 5000])
def test_error_of_rebuilt_frames(d, dtype):
    torch.manual_seed(0)
    x, hidden = torch.randn(8, 25, d, device="cuda", dtype=dtype), torch.rand(16, 25, device="cuda").argsort(1)[:, :12]
    predicted = torch.randn(16, 12, d, device="cuda", dtype=dtype).requires_grad_()
    exact = predicted.detach().double().requires_grad_()
    mine, wanted = reconstruction_loss(predicted, x, hidden), 2*(exact - take(x, hidden).double()).square().mean()
    assert (mine - wanted).abs() <= 1e-5*wanted
    mine, wanted = torch.autograd.grad(mine, predicted)[0], torch.autograd.grad(wanted, exact)[0]
    assert mine.dtype == dtype and (mine - wanted).norm() <= (1e-6 if dtype == torch.float32 else 4e-3)*wanted.norm()


@pytest.mark.parametrize("half", [False, True])
def test_codes_of_a_graph_are_those_of_one_block(half):
    "Twelve blocks: an ordinary one, then replays; the last is smaller."
    torch.manual_seed(0)
    model, x = S5VH(S5VHConfig(d=8, m=32, depth=2, decoder_m=16, bits=32)).cuda(), torch.randn(45, 25, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=half): alone, blocks = model.encode(x, batch=45), model.encode(x, batch=4)
    assert (alone != blocks).float().mean() < .01                        # products of another shape may round otherwise
    with pytest.raises(ValueError, match="finite"): model.encode(torch.full_like(x, torch.nan), batch=4)


def test_gradients_of_a_captured_step():
    "Streams side by side in a CUDA graph, at the papers' size: the gradients are those of the plain layers on every replay."
    torch.manual_seed(0)
    net = Layers(*[Bidirectional(lambda: Mamba(256)) for _ in range(4)]).cuda()
    x, weights = torch.randn(256, 13, 256, device="cuda"), torch.randn(256, 13, 256, device="cuda")
    with use_backend("torch"): wanted = torch.autograd.grad((net(x)*weights).sum(), list(net.parameters()))
    step = Captured(lambda x: torch.autograd.grad((net(x)*weights).sum(), list(net.parameters())))
    for _ in range(8):
        for mine, theirs in zip(step(x), wanted, strict=True): assert (mine - theirs).norm() <= 1e-3*theirs.norm()


def test_inputs_of_another_kind_get_an_ordinary_call():
    ones = torch.ones(3, device="cuda")
    total = Captured(lambda a, b: a + (0 if b is None else b))
    for k in range(6): assert torch.equal(total(ones, k*ones), (1 + k)*ones)
    assert torch.equal(total(ones, None), ones) and torch.equal(total(ones[:2], ones[:2]), 2*ones[:2])
    assert total(ones.double(), ones.double()).dtype == torch.float64


CONFIG = train_config("spoken-digits", "smoke", epochs=4, warmup=1, precision="float32")
def trained(**options): return training.train(CONFIG, datasets.load("spoken-digits"), progress=False, **{"device": "cuda", **options})
def losses(run): return torch.tensor([[h[name] for name in ("loss", "reconstruction", "contrast", "alignment")] for h in run.history])


def test_captured_steps_are_the_ordinary_steps(monkeypatch):
    "Both phases, with labels that move and a learning rate that falls."
    captured = trained()
    def ordinary_step(run, warm, inputs):
        return lambda rows, *order: training.step(run, warm, *(x[rows] for x in inputs), rows, *order)
    monkeypatch.setattr(training, "make_step", ordinary_step)
    ordinary = trained()
    assert torch.allclose(losses(captured), losses(ordinary), rtol=1e-3)
    assert torch.allclose(captured.objective.soft_labels, ordinary.objective.soft_labels, atol=1e-4)


def test_features_that_do_not_fit_are_fetched_meanwhile(monkeypatch):
    "Another thread pins the next batch, also while a step is captured; the numbers are those of features that lie on the GPU."
    held = trained()
    monkeypatch.setattr(training, "place", lambda features, device, precision: features)
    fetched = trained()
    assert fetched.history == held.history and torch.equal(fetched.objective.soft_labels, held.objective.soft_labels)


@pytest.mark.parametrize("first,then", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_goes_on_elsewhere(first, then, tmp_path, monkeypatch):
    epoch = training.train_epoch
    def dies(run, *rest):
        if run.epoch == 2: raise KeyboardInterrupt
        return epoch(run, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "train_epoch", dies)
        trained(device=first, checkpoint=tmp_path/"run.pt", every=1)
    run = trained(device=then, checkpoint=tmp_path/"run.pt", resume=True)
    assert len(run.history) == CONFIG.epochs and run.history[-1]["loss"] < run.history[0]["loss"]
