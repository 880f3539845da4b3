"""The scan's backends agree on every shape, stride and dtype.

Its compiled kernels do not depend on threads and are compiled once.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import s5vh_nb
from s5vh_nb.ops import dispatch
from s5vh_nb.ops.dispatch import (
    causal_conv1d,
    frame_error,
    mamba_layers,
    norm_linear,
    selective_scan,
    use_backend,
)
from s5vh_nb.ops.reference import conv_torch, scan_reference

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
    "Output, last state, and the gradient of every argument, which reaches it through both."
    given = [v for v in args.values() if v is not None]
    options = dict(options, delta_softplus=softplus, return_last_state=True, backend=backend)
    out, last = selective_scan(**args, **options)
    total = sum((v * torch.linspace(-1, 1, v.numel()).to(v).view(v.shape)).sum() for v in (out, last))
    return [out.detach(), last.detach(), *torch.autograd.grad(total, given)]


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


BOTH_WAYS = [((1, 1), 6), ((2, 2), 3), ((6, 3), 2), ((6, 6), 1), (("constant", 3), 2), (("constant",) * 2, 1)]


@pytest.mark.parametrize("groups,reversed_channels", BOTH_WAYS)
def test_both_directions(groups, reversed_channels):
    agree(arguments(groups=groups), reversed_channels=reversed_channels)


@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_absent_parts(absent, softplus):
    agree(arguments(absent=absent), softplus)


def test_the_reference_is_the_reference_backend():
    args = arguments()
    assert torch.equal(scan_reference(**args), selective_scan(**args, backend="reference"))


@pytest.mark.parametrize(
    "groups,reversed_channels", [((None, None), 0), ((2, 1), 0), ((2, 2), 3), ((6, 6), 1)]
)
def test_initial_state(groups, reversed_channels):
    for b, t in ((3, 5), (40, 1)):
        args = arguments(b, t=t, groups=groups)
        args["initial_state"] = torch.randn(b, 6, 4, dtype=torch.float64).requires_grad_()
        agree(args, reversed_channels=reversed_channels)
        strided = args["initial_state"].detach().transpose(1, 2).contiguous().transpose(1, 2)
        agree({**args, "initial_state": strided.requires_grad_()}, reversed_channels=reversed_channels)


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
@pytest.mark.parametrize("used", ["output", "state"])
def test_gradients_through_one_of_the_two_results(backend, used):
    args = arguments()
    args["initial_state"] = torch.randn(3, 6, 4, dtype=torch.float64).requires_grad_()
    out, last = selective_scan(**args, delta_softplus=True, return_last_state=True, backend=backend)
    alone = selective_scan(**args, delta_softplus=True, return_last_state=True, backend="reference")
    places = 0 if used == "output" else 1
    given = [v for name, v in args.items() if used == "output" or name not in ("C", "D", "z")]
    mine, theirs = ((out, last)[places], alone[places])
    grads = [torch.autograd.grad(v.sin().sum(), given) for v in (mine, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pieces_make_the_whole_to_the_bit(backend, dtype):
    "Also one step at a time, from a state that is kept in float32 where the inputs are in half precision."
    args = {name: v.detach().to(dtype) for name, v in arguments(b=9, d=70, t=12, n=16).items()}
    options = dict(delta_softplus=True, return_last_state=True, backend=backend)
    whole, last = selective_scan(**args, **options)
    for size in (1, 5):
        state, outs = None, []
        for start in range(0, 12, size):
            by_step = ("u", "delta", "B", "C", "z")
            piece = {k: v[..., start : start + size] if k in by_step else v for k, v in args.items()}
            out, state = selective_scan(**piece, **options, initial_state=state)
            outs.append(out)
        if backend == "numba":
            assert torch.equal(torch.cat(outs, -1), whole) and torch.equal(state, last)
        torch.testing.assert_close(torch.cat(outs, -1), whole)
        torch.testing.assert_close(state, last)


def test_scans_with_states_need_a_backend_that_has_them():
    "On a GPU `auto` is then torch, also where Triton or mamba_ssm is asked for by `use_backend`."
    args = arguments()
    for name in ("triton", "mamba_ssm"):
        with pytest.raises(
            ValueError, match="backend: expected 'auto' or one of 'reference', 'torch', 'numba'"
        ):
            selective_scan(**args, return_last_state=True, backend=name)
        with use_backend(name):
            out, last = selective_scan(**args, return_last_state=True)
            assert out.requires_grad and last.requires_grad
    on_gpu = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, dtype=torch.float32)
    assert dispatch._pick("auto", on_gpu, dispatch._SCANS_WITH_STATES) == "torch"
    assert dispatch._pick("auto", on_gpu, dispatch._SCANS) == ("triton" if find_spec("triton") else "torch")


def test_the_original_kernels_get_the_arguments_of_their_function(monkeypatch):
    "Which a machine without a GPU can only look at."
    calls, name = [], "mamba_ssm.ops.selective_scan_interface"

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        calls.append(delta_softplus)
        return scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)

    monkeypatch.setitem(sys.modules, name, SimpleNamespace(selective_scan_fn=selective_scan_fn))
    monkeypatch.setattr(dispatch, "_check_gpu_backend", lambda *_: None)
    given = {key: v.detach() for key, v in arguments(groups=(2, 2)).items()}
    options = dict(delta_softplus=True, return_last_state=True, reversed_channels=3)
    for mine, theirs in zip(
        *(selective_scan(**given, **options, backend=b) for b in ("mamba_ssm", "reference"))
    ):
        assert torch.equal(mine, theirs)
    assert calls == [True]


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
    options = dict(activation=activation, reversed_channels=reversed_channels, backend=backend)
    out = causal_conv1d(x, W, beta if bias else None, **options)
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
    (dict(A=torch.zeros(6, 4, dtype=torch.complex64)), "A: expected floating-point numbers"),
    (dict(A=torch.tensor(-1.0)), r"A: expected shape \(6, n\), found \(\)"),
    (dict(A=-1.0), "A: expected a tensor, found float"),
    (dict(D=[1.0] * 6), "D: expected a tensor, found list"),
    (dict(z=np.zeros((3, 6, 5))), "z: expected a tensor, found ndarray"),
    (dict(initial_state=torch.zeros(3, 4, 6)), r"initial_state: expected shape \(3, 6, 4\)"),
    (dict(C=torch.zeros(3, 4, 4, 5)), "C: expected shape"),
    (dict(D=torch.zeros(5)), "D: expected shape"),
    (dict(z=torch.zeros(3, 6, 1)), "z: expected shape"),
    (dict(delta_bias=torch.zeros(1)), "delta_bias: expected shape"),
    (dict(reversed_channels=2), "reversed_channels: expected whole groups of 6 channels"),
    (dict(B=torch.zeros(3, 2, 4, 5), reversed_channels=3), "reversed_channels: expected whole groups of 6"),
    (dict(B=torch.zeros(3, 2, 4, 5), C=torch.zeros(3, 3, 4, 5)), r"B and C: .* found \[2, 3\]"),
    (dict(backend="fast"), "backend: expected 'auto' or one of"),
]


@pytest.mark.parametrize("change,message", BAD)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**arguments(), **change})


@pytest.mark.parametrize("name", arguments())
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_numbers_that_are_no_floats_are_refused(name, dtype):
    "Whole numbers would be cut off: the output has the type of `u`."
    args = {key: v.detach() for key, v in arguments().items()}
    with pytest.raises(ValueError, match=f"^{name}: expected floating-point numbers .*found {dtype}"):
        selective_scan(**{**args, name: args[name].to(dtype)})


def test_bad_arguments_of_the_convolution_are_named():
    good = dict(x=torch.zeros(2, 6, 5), weight=torch.zeros(6, 4), bias=torch.zeros(6))
    bad = {
        "x": (np.zeros((2, 6, 5)), torch.zeros(6, 5), torch.zeros(2, 6, 5, dtype=torch.int32)),
        "weight": ([[1.0]], torch.zeros(5, 4), torch.zeros(6, 4, dtype=torch.int64)),
        "bias": ([0.0] * 6, torch.zeros(()), torch.zeros(6, dtype=torch.bool)),
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                causal_conv1d(**{**good, name: value})


def test_the_convolution_begins_like_the_original_function():
    "`causal_conv1d_fn(x, weight, bias)`: no activation; further arguments go by name."
    x, weight, bias = torch.randn(2, 6, 5), torch.randn(6, 4), torch.randn(6)
    plain = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=3, groups=6)[..., :5]
    torch.testing.assert_close(causal_conv1d(x, weight, bias), plain)
    for name in ("silu", "swish"):
        expected = torch.nn.functional.silu(plain)
        torch.testing.assert_close(causal_conv1d(x, weight, bias, activation=name), expected)
    with pytest.raises(TypeError):
        causal_conv1d(x, weight, bias, "silu")  # the original has seq_idx there


def test_the_reference_backend_reaches_the_convolution():
    x, weight = torch.randn(2, 6, 5), torch.randn(6, 4)
    with use_backend("reference"):
        assert torch.equal(causal_conv1d(x, weight), conv_torch(x, weight))


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_gpu_backends_say_what_is_missing(backend):
    with pytest.raises((ImportError, ValueError), match=f"backend='{backend}': expected"):
        selective_scan(**{k: v.detach() for k, v in arguments().items()}, backend=backend)


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
kernels, jit = [], compiled.jit
compiled.jit = lambda *a, **k: kernels.append(jit(*a, **k)) or kernels[-1]
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
