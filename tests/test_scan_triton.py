"GPU kernels against float64: every dtype, odd shapes and strides, both directions, chunks of time, the same bits twice; needs a GPU."
import pytest, torch

from s5vh_nb.scan import causal_conv1d, selective_scan

if not torch.cuda.is_available(): pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")
from s5vh_nb.scan_triton import causal_conv1d_triton, selective_scan_triton

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def arguments(b=3, d=6, t=5, n=4, groups=None, dtype=torch.float32, absent=(), layout="token", seed=0):
    "Inputs (b, d, t); layout: time before channels in memory, channels before time, or every second element."
    draw = lambda *shape, r=torch.Generator().manual_seed(seed): torch.randn(*shape, generator=r)
    def laid(v):                                        # (..., time last)
        v = v.cuda().to(dtype)
        if layout == "token": return v.movedim(-1, 1).contiguous().movedim(1, -1)
        return v if layout == "channel" else torch.stack([v, v], -1).flatten(-2)[..., ::2]
    of_group = draw(d, n).cuda() if groups == "constant" else None
    B, C = (laid(draw(b, n, t) if groups is None else draw(b, groups, n, t)) if of_group is None else of_group.clone() for _ in "BC")
    full = dict(u=laid(draw(b, d, t)), delta=laid(draw(b, d, t)), A=-torch.exp(draw(d, n)/2).cuda(), B=B, C=C,
                D=draw(d).cuda(), z=laid(draw(b, d, t)), delta_bias=(draw(d) - 1).cuda())
    return {name: None if name in absent else v.requires_grad_() for name, v in full.items()}


def outcome(function, given, **options):
    "Output and gradients of everything given, by name."
    out = function(**given, **options)
    given = {name: v for name, v in given.items() if v is not None}
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape).to(out.dtype)
    return {"output": out.detach(), **dict(zip(given, torch.autograd.grad(out, list(given.values()), weights)))}


def reference(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, reversed_channels=0):
    "The reference backend between two flips of the last channels; B and C get a group per channel, so that theirs flip too."
    d, flips = u.shape[1], u.shape[1] - reversed_channels
    def turn(v): return None if v is None else torch.cat([v[:, :flips], v[:, flips:].flip(-1)], 1)
    def per_channel(v):
        if v.dim() == 2: return v
        return turn(v[:, None].expand(-1, d, -1, -1) if v.dim() == 3 else v.repeat_interleave(d//v.shape[1], 1))
    B, C = per_channel(B), per_channel(C)
    return turn(selective_scan(turn(u), turn(delta), A, B, C, D, turn(z), delta_bias, delta_softplus, backend="reference"))


def agree(given, dtype=torch.float32, softplus=True, reversed_channels=0):
    options = dict(delta_softplus=softplus, reversed_channels=reversed_channels)
    exact = outcome(reference, {name: None if v is None else v.detach().double().requires_grad_() for name, v in given.items()}, **options)
    for name, mine in outcome(selective_scan_triton, given, **options).items():
        assert mine.shape == exact[name].shape and mine.dtype == (given[name].dtype if name in given else dtype)
        assert (mine - exact[name]).norm() <= TOLERANCE[dtype]*exact[name].norm(), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("b,d,t,n", [(1, 1, 1, 1), (2, 7, 2, 3), (3, 33, 13, 16), (2, 512, 25, 16), (1, 5, 64, 64), (2, 40, 301, 16),
                                     (1, 2, 3000, 2)])
def test_shapes_and_dtypes(b, d, t, n, dtype): agree(arguments(b, d, t, n, dtype=dtype), dtype)


def test_many_sequences(): agree(arguments(b=512, d=256, t=3, n=16))  # several to a program


@pytest.mark.parametrize("layout", ["channel", "every second"])
def test_strides(layout): agree(arguments(layout=layout))


@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_absent(absent): agree(arguments(absent=absent), softplus="delta_bias" not in absent)


@pytest.mark.parametrize("groups", [1, 2, 3, "constant"])
def test_groups(groups): agree(arguments(groups=groups))


@pytest.mark.parametrize("d,t,groups,reversed_channels", [(6, 5, None, 6), (6, 13, 2, 3), (66, 130, 2, 33)])
def test_directions(d, t, groups, reversed_channels): agree(arguments(d=d, t=t, groups=groups), reversed_channels=reversed_channels)


def test_directions_are_whole_groups():
    with pytest.raises(ValueError, match="reversed_channels"): selective_scan_triton(**arguments(groups=2), reversed_channels=2)


def test_last_state():
    given = arguments(t=200)
    both = selective_scan_triton, lambda **k: selective_scan(**k, backend="reference")
    states = [function(**given, delta_softplus=True, return_last_state=True)[1] for function in both]
    assert (states[0] - states[1]).norm() <= 2e-5*states[1].norm()


def test_same_bits_twice():
    given = arguments(8, 96, 130, 16, dtype=torch.bfloat16)
    first, second = (outcome(selective_scan_triton, given, delta_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_against_mamba_ssm():
    theirs = pytest.importorskip("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    given = arguments(4, 64, 25, 16, layout="channel")
    mine, other = outcome(selective_scan_triton, given, delta_softplus=True), outcome(theirs, given, delta_softplus=True)
    for name in mine: assert (mine[name] - other[name]).norm() <= 2e-5*other[name].norm(), name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("b,d,t,width,activation,bias,reversed_channels", [
    (1, 1, 1, 4, "silu", True, 0), (2, 5, 7, 4, "silu", False, 5), (3, 200, 35, 3, None, True, 70), (2, 512, 13, 4, "silu", True, 256)])
def test_convolution(b, d, t, width, activation, bias, reversed_channels, dtype):
    draw = lambda *shape, r=torch.Generator().manual_seed(0): torch.randn(*shape, generator=r).cuda()
    given = dict(x=draw(b, t, d).to(dtype).transpose(1, 2), weight=draw(d, width), bias=draw(d) if bias else None)
    given = {name: None if v is None else v.requires_grad_() for name, v in given.items()}
    turn = lambda v: torch.cat([v[:, :d - reversed_channels], v[:, d - reversed_channels:].flip(-1)], 1)
    exact = outcome(lambda x, weight, bias: turn(causal_conv1d(turn(x), weight, bias, activation, backend="torch")),
                    {name: None if v is None else v.detach().double().requires_grad_() for name, v in given.items()})
    for name, mine in outcome(causal_conv1d_triton, given, activation=activation, reversed_channels=reversed_channels).items():
        assert (mine - exact[name]).norm() <= TOLERANCE[dtype]*exact[name].norm(), name
