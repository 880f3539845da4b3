"""The scan's backends agree on every shape, stride and dtype.

Its compiled kernels do not depend on threads and are compiled once.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import s5vh_nb
from s5vh_nb.ops.dispatch import (
    causal_conv1d,
    frame_error,
    mamba_layers,
    norm_linear,
    selective_scan,
    use_backend,
)
from s5vh_nb.ops.reference import scan_reference

PACKAGE = Path(s5vh_nb.__file__).parent


def arguments(b=3, d=6, t=5, n=4, groups=(None, None), dtype=torch.float64, absent=(), seed=0):
    r = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=r, dtype=dtype)

    def matrix(g):
        return draw(b, n, t) if g is None else draw(d, n) if g == "constant" else draw(b, g, n, t)

    full = dict(
        u=draw(b, d, t),
        delta=draw(b, d, t),
        A=-torch.exp(draw(d, n) / 2),
        B=matrix(groups[0]),
        C=matrix(groups[1]),
        D=draw(d),
        z=draw(b, d, t),
        delta_bias=draw(d),
    )
    return {name: None if name in absent else v.requires_grad_() for name, v in full.items()}


def outcome(backend, args, softplus=True, **options):
    "Output, last state, and the gradient of every argument."
    given = [v for v in args.values() if v is not None]
    options = dict(options, delta_softplus=softplus, return_last_state=True, backend=backend)
    out, last = selective_scan(**args, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), last, *torch.autograd.grad((out * weights).sum(), given)]


def agree(args, softplus=True, backends=("torch", "numba"), rtol=1e-9, **options):
    expected = outcome("reference", args, softplus, **options)
    for backend in backends:
        for mine, theirs in zip(outcome(backend, args, softplus, **options), expected, strict=True):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
            assert (mine - theirs).abs().max() <= rtol * max(1, theirs.abs().max())


SHAPES = [(1, 1, 1, 1), (1, 7, 1, 64), (40, 3, 2, 5), (2, 70, 3, 1), (9, 300, 3, 2), (2, 130, 9, 16)]


@pytest.mark.parametrize("b,d,t,n", SHAPES)
def test_odd_shapes(b, d, t, n):
    agree(arguments(b, d, t, n))


GROUPS = [(1, 1), (2, 2), (6, 6), (None, 3), ("constant", None), ("constant", "constant")]


@pytest.mark.parametrize("groups", GROUPS)
def test_groups(groups):
    agree(arguments(groups=groups))


@pytest.mark.parametrize("groups,reversed_channels", [((1, 1), 6), ((2, 2), 3), ((6, 3), 2), ((6, 6), 1)])
def test_both_directions(groups, reversed_channels):
    agree(arguments(groups=groups), reversed_channels=reversed_channels)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_absent_parts(absent, softplus):
    agree(arguments(absent=absent), softplus)


def test_the_reference_is_the_reference_backend():
    args = arguments()
    assert torch.equal(scan_reference(**args), selective_scan(**args, backend="reference"))


def relayout(v, kind):
    "The same numbers in another memory layout."
    if v is None or v.dim() < 3:
        return v
    if kind == "token-major":
        return v.detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_()
    if kind == "slices":
        return torch.stack([v.detach(), v.detach()], 2).flatten(1, 2)[:, ::2].requires_grad_()
    wide = v.new_zeros(*v.shape[:-1], 2 * v.shape[-1])
    wide[..., ::2] = v.detach()
    return wide[..., ::2].requires_grad_()


@pytest.mark.parametrize("kind", ["token-major", "slices", "every second"])
@pytest.mark.parametrize("b,d,t", [(3, 6, 5), (1, 6, 5), (3, 1, 5), (3, 6, 1)])
def test_strides_do_not_matter(kind, b, d, t):
    args = arguments(b, d, t)
    other = {name: relayout(v, kind) for name, v in args.items()}
    for mine, theirs in zip(outcome("numba", other), outcome("numba", args), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("dtype,rtol", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, rtol):
    float32 = "A", "D", "delta_bias"
    args = {
        name: v.detach().to(torch.float32 if name in float32 else dtype).requires_grad_()
        for name, v in arguments(4, 33, 20, 16).items()
    }
    agree(args, rtol=rtol)
    assert selective_scan(**args).dtype == dtype and outcome("numba", args)[1].dtype == torch.float32


def test_extreme_step_sizes_stay_finite_and_nan_is_not_hidden():
    args = {name: v.detach().float() for name, v in arguments(2, 20, 6, 4).items()}
    args["delta"][:, :10], args["delta"][:, 10:] = 500, -500  # forget all; keep all
    agree({name: v.requires_grad_() for name, v in args.items()}, rtol=1e-4)
    for name in ("u", "delta", "A", "B", "z"):
        broken = {key: v.detach().clone() for key, v in args.items()}
        broken[name].view(-1)[0] = float("nan")
        assert selective_scan(**broken, delta_softplus=True).isnan().any(), name


@pytest.mark.parametrize("b,d", [(2, 200), (50, 300)])
def test_threads_do_not_change_a_bit(b, d):
    args = {name: v.detach().float().requires_grad_() for name, v in arguments(b, d, 6, 8).items()}
    outcomes, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outcomes.append(outcome("numba", args) + list(conv_outcome("numba", args["u"])))
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other, strict=True))


def conv_outcome(backend, x, width=4, bias=True, activation="silu", reversed_channels=0):
    x, r = x.detach().requires_grad_(), torch.Generator().manual_seed(1)
    shapes = (x.shape[1], width), (x.shape[1],)
    W, beta = (torch.randn(*shape, generator=r).to(x.dtype).requires_grad_() for shape in shapes)
    out = causal_conv1d(x, W, beta if bias else None, activation, reversed_channels, backend=backend)
    given = [x, W, beta][: 2 + bias]
    return out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), given)


KINDS = [(4, True, "silu"), (4, False, "silu"), (3, True, None), (1, True, "silu"), (6, False, None)]


@pytest.mark.parametrize("b,d,t", [(1, 1, 1), (3, 70, 2), (40, 5, 9)])
@pytest.mark.parametrize("width,bias,activation", KINDS)
def test_convolution(b, d, t, width, bias, activation):
    inputs = (
        torch.randn(b, d, t, dtype=torch.float64),
        torch.randn(b, t, d, dtype=torch.float64).transpose(1, 2),
    )
    for x in inputs:
        for reversed_channels in (0, d // 2, d):
            options = width, bias, activation, reversed_channels
            both = (conv_outcome(backend, x, *options) for backend in ("numba", "torch"))
            for mine, theirs in zip(*both, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


BAD = [
    (dict(delta=None), "delta: expected a tensor, found NoneType"),
    (dict(u=torch.zeros(3, 6)), "u: expected shape"),
    (dict(delta=torch.zeros(3, 6, 4)), "delta: expected shape"),
    (dict(A=torch.zeros(6, 4, dtype=torch.complex64)), "A: expected real"),
    (dict(C=torch.zeros(3, 4, 4, 5)), "C: expected shape"),
    (dict(D=torch.zeros(5)), "D: expected shape"),
    (dict(z=torch.zeros(3, 6, 1)), "z: expected shape"),
    (dict(delta_bias=torch.zeros(1)), "delta_bias: expected shape"),
    (dict(reversed_channels=2), "reversed_channels: expected whole groups of 6 channels"),
    (dict(backend="fast"), "backend: expected 'auto' or one of"),
]


@pytest.mark.parametrize("change,message", BAD)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**arguments(), **change})


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_gpu_backends_say_what_is_missing(backend):
    with pytest.raises((ImportError, ValueError), match=f"backend='{backend}': expected"):
        selective_scan(**arguments(), backend=backend)


def test_fused_layers_are_the_plain_ones_on_a_cpu():
    "Also where a GPU backend is asked for: `use_backend` chooses among what can run."
    torch.manual_seed(0)
    norm, linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)
    x, predicted = torch.randn(2, 5, 8), torch.randn(4, 2, 8)
    hidden = torch.stack([torch.randperm(5)[:2] for _ in range(4)])
    for name in ("auto", "triton"):
        with use_backend(name):
            assert torch.equal(norm_linear(x, norm, linear), linear(norm(x)))
            assert torch.equal(
                mamba_layers(x, lambda x, factors: x.sin(), dict, backward=1, eps=1e-6), x.sin()
            )
            true = torch.stack([x[i % 2, hidden[i]] for i in range(4)])
            error = torch.nn.functional.mse_loss(predicted, true)
            assert torch.equal(frame_error(predicted, x, hidden), error)


PROGRAM = """
import torch
from s5vh_nb.ops import compiled, dispatch
kernels, njit = [], compiled.njit
compiled.njit = lambda *a, **k: lambda f: kernels.append(njit(*a, **k)(f)) or kernels[-1]
dispatch.causal_conv1d(torch.ones(1, 2, 3), torch.ones(2, 4))
print(sum(sum(k.stats.cache_hits.values()) for k in kernels), len(kernels))
"""


def cache_hits(home, package_root):
    "Run PROGRAM with its cache folder below `home`: how many kernels it loaded, of how many."
    folders = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(package_root)}
    env = {**os.environ, **folders, "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, cwd=home, check=True, capture_output=True, encoding="utf-8")
    return done.stdout.split()


@pytest.fixture
def sealed(tmp_path):
    "A home folder, and a copy of the package where no cache can be written: each __pycache__ is a file."
    root, home = tmp_path / "root", tmp_path / "home"
    home.mkdir()
    shutil.copytree(PACKAGE, root / "s5vh_nb", ignore=shutil.ignore_patterns("data", "__pycache__"))
    for folder in {module.parent for module in (root / "s5vh_nb").rglob("*.py")}:
        (folder / "__pycache__").touch()
    return home, root


def test_kernels_are_compiled_once_also_beside_an_unwritable_package(sealed):
    assert cache_hits(*sealed) == ["0", "1"]
    assert cache_hits(*sealed) == ["1", "1"]


def test_without_any_cache_folder_kernels_are_compiled_anyway(sealed):
    (sealed[0] / "cache").touch()
    assert cache_hits(*sealed) == ["0", "1"]
