"""GPU kernels against float64.

Every dtype, odd shapes and strides, both directions, chunks of time, the same bits twice. Needs a GPU.
"""

import pytest
import torch

from s5vh_nb.ops.dispatch import causal_conv1d, selective_scan
from s5vh_nb.ops.reference import conv_torch, scan_reference
from s5vh_nb.ops.triton_scan import causal_conv1d_triton, selective_scan_triton

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton")

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def random_numbers(seed=0):
    "A function that draws."
    r = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=r)


def lay_out(v, layout, dtype):
    "`v` (..., t) on the GPU: time before channels in memory, channels before time, or every second element."
    v = v.cuda().to(dtype)
    if layout == "token":
        return v.movedim(-1, 1).contiguous().movedim(1, -1)
    return v if layout == "channel" else torch.stack([v, v], -1).flatten(-2)[..., ::2]


def arguments(b=3, d=6, t=5, n=4, groups=None, dtype=torch.float32, absent=(), layout="token", seed=0):
    draw = random_numbers(seed)

    def by_step(*shape):
        return lay_out(draw(*shape), layout, dtype)

    if groups == "constant":
        B = draw(d, n).cuda()
        C = B.clone()
    else:
        B, C = (by_step(b, n, t) if groups is None else by_step(b, groups, n, t) for _ in range(2))
    full = dict(
        u=by_step(b, d, t),
        delta=by_step(b, d, t),
        A=-torch.exp(draw(d, n) / 2).cuda(),
        B=B,
        C=C,
        D=draw(d).cuda(),
        z=by_step(b, d, t),
        delta_bias=(draw(d) - 1).cuda(),
    )
    return {name: None if name in absent else v.requires_grad_() for name, v in full.items()}


def outcome(function, given, **options):
    "Output and gradients of everything given, by name."
    out = function(**given, **options)
    given = {name: v for name, v in given.items() if v is not None}
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
    gradients = torch.autograd.grad(out, list(given.values()), weights.view(out.shape).to(out.dtype))
    return {"output": out.detach(), **dict(zip(given, gradients))}


def in_float64(given):
    return {name: None if v is None else v.detach().double().requires_grad_() for name, v in given.items()}


def agree(given, dtype=torch.float32, softplus=True, reversed_channels=0):
    options = dict(delta_softplus=softplus, reversed_channels=reversed_channels)
    exact = outcome(scan_reference, in_float64(given), **options)
    for name, mine in outcome(selective_scan_triton, given, **options).items():
        expected_dtype = given[name].dtype if name in given else dtype
        assert mine.shape == exact[name].shape and mine.dtype == expected_dtype
        assert (mine - exact[name]).norm() <= TOLERANCE[dtype] * exact[name].norm(), name


SHAPES = [
    (1, 1, 1, 1),
    (2, 7, 2, 3),
    (3, 33, 13, 16),
    (2, 512, 25, 16),
    (1, 5, 64, 64),
    (2, 40, 301, 16),
    (2, 34, 71, 20),
    (171, 96, 130, 16),
    (512, 256, 65, 16),
    (1, 2, 3000, 2),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("b,d,t,n", SHAPES)
def test_shapes_and_dtypes(b, d, t, n, dtype):
    agree(arguments(b, d, t, n, dtype=dtype), dtype)


def test_many_sequences():
    agree(arguments(b=512, d=256, t=3, n=16))


@pytest.mark.parametrize("layout", ["channel", "every second"])
def test_strides(layout):
    agree(arguments(layout=layout))


@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_absent(absent):
    agree(arguments(absent=absent), softplus="delta_bias" not in absent)


@pytest.mark.parametrize("groups", [1, 2, 3, "constant"])
def test_groups(groups):
    agree(arguments(groups=groups))


@pytest.mark.parametrize("d,t,groups,reversed_channels", [(6, 5, None, 6), (6, 13, 2, 3), (66, 130, 2, 33)])
def test_directions(d, t, groups, reversed_channels):
    agree(arguments(d=d, t=t, groups=groups), reversed_channels=reversed_channels)


def test_directions_are_whole_groups():
    with pytest.raises(ValueError, match="reversed_channels"):
        selective_scan_triton(**arguments(groups=2), reversed_channels=2)


def test_last_state():
    given = arguments(t=200)
    options = dict(delta_softplus=True, return_last_state=True)
    mine, theirs = (scan(**given, **options)[1] for scan in (selective_scan_triton, scan_reference))
    assert (mine - theirs).norm() <= 2e-5 * theirs.norm()


@pytest.mark.parametrize("t,groups,reversed_channels", [(1, None, 0), (25, 2, 3), (300, 2, 3)])
def test_from_a_state(t, groups, reversed_channels):
    "Without gradients: with them the torch backend takes over, and the kernels refuse."
    given = {name: v.detach() for name, v in arguments(t=t, n=12, groups=groups).items()}
    state = torch.randn(3, 6, 12, device="cuda")
    options = dict(delta_softplus=True, return_last_state=True, reversed_channels=reversed_channels)
    mine = selective_scan_triton(**given, **options, initial_state=state)
    exact = scan_reference(**in_float64(given), **options, initial_state=state.double())
    for a, b in zip(mine, exact, strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm()
    assert torch.equal(selective_scan(**given, **options, initial_state=state)[0], mine[0])
    learning = arguments(t=t, n=12, groups=groups)
    for wanted in (learning, given | {"initial_state": state.requires_grad_()}):
        with pytest.raises(ValueError, match="initial_state: expected None where gradients are wanted"):
            selective_scan_triton(**{"initial_state": state} | wanted, **options)
    out, _ = selective_scan(**learning, **options, initial_state=state)
    assert torch.autograd.grad(out.sum(), learning["B"])[0].norm() > 0


def test_same_bits_twice():
    given = arguments(8, 96, 130, 16, dtype=torch.bfloat16)
    first, second = (outcome(selective_scan_triton, given, delta_softplus=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dispatch_takes_the_kernels():
    given = arguments()
    assert torch.equal(selective_scan(**given), selective_scan_triton(**given))
    x, weight = torch.randn(2, 6, 5, device="cuda"), torch.randn(6, 4, device="cuda")
    assert torch.equal(causal_conv1d(x, weight), causal_conv1d_triton(x, weight))


def test_against_mamba_ssm():
    theirs = pytest.importorskip("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    given = arguments(4, 64, 25, 16, layout="channel")
    mine = outcome(selective_scan_triton, given, delta_softplus=True)
    other = outcome(theirs, given, delta_softplus=True)
    for name in mine:
        assert (mine[name] - other[name]).norm() <= 2e-5 * other[name].norm(), name


CONVOLUTIONS = [
    (1, 1, 1, 4, "silu", True, 0),
    (2, 5, 7, 4, "silu", False, 5),
    (3, 200, 35, 3, None, True, 70),
    (2, 512, 13, 4, "silu", True, 256),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("b,d,t,width,activation,bias,reversed_channels", CONVOLUTIONS)
def test_convolution(b, d, t, width, activation, bias, reversed_channels, dtype):
    draw = random_numbers()
    x = draw(b, t, d).cuda().to(dtype).transpose(1, 2)
    given = dict(x=x, weight=draw(d, width).cuda(), bias=draw(d).cuda() if bias else None)
    given = {name: None if v is None else v.requires_grad_() for name, v in given.items()}
    options = dict(activation=activation, reversed_channels=reversed_channels)
    exact = outcome(conv_torch, in_float64(given), **options)
    for name, mine in outcome(causal_conv1d_triton, given, **options).items():
        assert (mine - exact[name]).norm() <= TOLERANCE[dtype] * exact[name].norm(), name
