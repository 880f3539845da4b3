"What only a GPU runs: layers side by side, the fused norm, encoding by a CUDA graph. Skipped without one."
import copy

import pytest, torch
from torch import nn

from s5vh_nb.config import S5VHConfig
from s5vh_nb.mixers import Bidirectional, Layers, Mamba
from s5vh_nb.s5vh import S5VH

if not torch.cuda.is_available(): pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")
from s5vh_nb.scan import _folded_torch, _norm_torch
from s5vh_nb.scan_triton import norm_folded_triton, residual_norm_triton


def graded(outputs, given): return [*outputs, *torch.autograd.grad(sum((y.float()*torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape)).sum() for y in outputs), given)]


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"directions": "forward"}, {"directions": "backward"}])
def test_layers_side_by_side_are_the_plain_layers(options):
    torch.manual_seed(0)
    net = Layers(*[Bidirectional(lambda: Mamba(32), **options) for _ in range(2)])
    for p in net.parameters(): nn.init.normal_(p, std=.3)                # gains and biases too
    x, plain = torch.randn(3, 13, 32), copy.deepcopy(net).double()       # on the CPU Layers are the plain ones
    exact = plain(x.double())
    wanted = [exact, *torch.autograd.grad(exact.square().sum(), list(plain.parameters()))]
    y = net.cuda()(x.cuda())
    for mine, theirs in zip([y, *torch.autograd.grad(y.square().sum(), list(net.parameters()))], wanted, strict=True):
        assert (mine.cpu() - theirs).norm() <= 1e-4*theirs.norm()


def test_a_silenced_direction_in_one_layer():
    torch.manual_seed(0)
    net, x = Layers(*[Bidirectional(lambda: Mamba(16)) for _ in range(2)]), torch.randn(2, 5, 16)
    net[1].directions = "forward"
    wanted = net(x)
    assert (net.cuda()(x.cuda()).cpu() - wanted).norm() <= 1e-4*wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [16, 100, 256])
@pytest.mark.parametrize("alone", [False, True])
def test_sum_and_norm(m, dtype, alone):
    torch.manual_seed(0)
    x, y = torch.randn(3, 7, m, device="cuda").requires_grad_(), torch.randn(3, 7, m, device="cuda").to(dtype).requires_grad_()
    given, y = ([x], None) if alone else ([x, y], y)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16): wanted = graded(_norm_torch(x, y, 1e-6), given)
    for mine, theirs in zip(graded(residual_norm_triton(x, y, 1e-6, dtype), given), wanted, strict=True):
        assert mine.dtype == theirs.dtype and (mine - theirs).norm() <= (1e-5 if dtype == torch.float32 else 2e-2)*theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("m", [16, 100, 256])
def test_gain_and_bias_in_the_weights(m, dtype):
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 2*m, m, device="cuda").transpose(0, 1).requires_grad_(), *(torch.randn(3, 2, m, device="cuda").requires_grad_() for _ in range(2))]
    for mine, theirs in zip(*(graded((fold(*given, dtype),), given) for fold in (norm_folded_triton, _folded_torch)), strict=True):
        assert mine.dtype == theirs.dtype and (mine - theirs).norm() <= (1e-5 if dtype == torch.float32 else 2e-2)*theirs.norm()


@pytest.mark.parametrize("half", [False, True])
def test_codes_of_a_graph_are_those_of_one_block(half):
    "Twelve blocks: three ordinary ones, then replays; the last is smaller."
    torch.manual_seed(0)
    model, x = S5VH(S5VHConfig(d=8, m=32, depth=2, decoder_m=16, bits=32)).cuda(), torch.randn(45, 25, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=half): alone, blocks = model.encode(x, batch=45), model.encode(x, batch=4)
    assert (alone != blocks).float().mean() < .01                        # products of another shape may round otherwise
    with pytest.raises(ValueError, match="finite"): model.encode(torch.full_like(x, torch.nan), batch=4)
