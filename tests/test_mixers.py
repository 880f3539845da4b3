"""Sequence mixers, beyond the contract test of their notebook.

Odd sizes, state dicts, half precision, and a whole layer against the reference scan.
"""

import copy
import functools

import pytest
import torch

from s5vh_nb.models import mamba
from s5vh_nb.models.mamba import Bidirectional, Mamba
from s5vh_nb.models.mixers import LSTM, MIXERS
from s5vh_nb.ops import compiled
from s5vh_nb.ops.dispatch import causal_conv1d, selective_scan

every_mixer = pytest.mark.parametrize("make", MIXERS.values(), ids=MIXERS.keys())


@every_mixer
@pytest.mark.parametrize("b,t,m", [(1, 1, 8), (2, 33, 48), (1, 300, 16)])
def test_sizes(make, b, t, m):
    y = make(m)(torch.randn(b, t, m))
    assert y.shape == (b, t, m) and y.isfinite().all()


@every_mixer
def test_layers_train_copy_and_reload(make):
    torch.manual_seed(0)
    layer, x = Bidirectional(functools.partial(make, 16)), torch.randn(4, 6, 16)
    twin, blank = copy.deepcopy(layer), Bidirectional(lambda: make(16))
    blank.load_state_dict(layer.state_dict())
    layer(x).square().mean().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert torch.equal(twin(x), blank(x)) and not torch.equal(layer(x), twin(x))


@every_mixer
def test_the_seed_fixes_the_start(make):
    nets = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        nets.append(make(16)(torch.ones(1, 5, 16)))
    assert torch.equal(nets[0], nets[1]) and not torch.equal(nets[0], nets[2])


@every_mixer
def test_bfloat16_autocast_stays_close(make):
    torch.manual_seed(0)
    net, x = make(32), torch.randn(2, 9, 32)
    if make is LSTM and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch has no bfloat16 LSTM for this processor")
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    y.float().sum().backward()
    assert (y.float() - net(x)).abs().max() < 0.05 * net(x).abs().max()


DIRECTIONS = [(False, "both"), (True, "both"), (False, "forward"), (True, "backward")]


@pytest.mark.parametrize("tied,directions", DIRECTIONS)
def test_state_dicts_name_every_tensor_once(tied, directions):
    state = Bidirectional(lambda: Mamba(16), tied, directions).state_dict()
    assert len({v.data_ptr() for v in state.values()}) == len(state)
    parts = {name.split(".")[0] for name in state}
    sides = ["forward", "backward"] if directions == "both" else [directions]
    mixers = sides[:1] if tied else sides
    assert parts == {f"norm_{side}" for side in sides} | {f"mix_{side}" for side in mixers}


def test_switching_off_a_direction_of_a_trained_layer():
    layer, x = Bidirectional(lambda: Mamba(16)), torch.randn(2, 5, 16)
    both, pieces = layer(x), []
    for layer.directions in ("forward", "backward"):
        pieces.append(layer(x) - x)
    torch.testing.assert_close(both, x + pieces[0] + pieces[1])


def test_mamba_gradients_against_the_reference_scan(monkeypatch):
    torch.manual_seed(0)
    net = Mamba(16, d_state=5, d_conv=3, expand=3, dt_rank=2).double()
    x = torch.randn(3, 6, 16).double().requires_grad_()

    def gradients():
        return torch.autograd.grad(net(x).sin().sum(), [x, *net.parameters()])

    fast = gradients()
    reference = functools.partial(selective_scan, backend="reference")
    monkeypatch.setattr(mamba, "selective_scan", reference)
    monkeypatch.setattr(mamba, "causal_conv1d", functools.partial(causal_conv1d, backend="torch"))
    for mine, theirs in zip(fast, gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name,heads", [("RetNet", 3), ("RWKV", 5), ("Transformer", 5)])
def test_heads_must_fit(name, heads):
    with pytest.raises(ValueError, match="heads: expected"):
        MIXERS[name](16, heads)


def test_no_copies_reach_the_scan(monkeypatch):
    copies, strided = [], compiled._strided

    def watched(x):
        copies.append(x.stride(2) != 1)
        return strided(x)

    monkeypatch.setattr(compiled, "_strided", watched)
    Mamba(16)(torch.randn(2, 5, 16).requires_grad_()).sum().backward()
    assert len(copies) >= 7 and not any(copies)


@torch.no_grad()
def test_angles_of_retnet_in_half_precision():
    "bfloat16 has no number for most frames beyond 256."
    torch.manual_seed(0)
    net, x = MIXERS["RetNet"](32), torch.randn(1, 600, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x).float()
    assert (y - net(x))[:, -1].norm() < 0.03 * net(x)[:, -1].norm()
