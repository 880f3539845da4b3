"Videos that arrive frame by frame, and videos of different lengths: their codes are those of whole videos."

import h5py
import numpy as np
import pytest
import torch

from s5vh_nb.basics.config import S5VHConfig
from s5vh_nb.datasets.rows import HDF5Rows
from s5vh_nb.models.codes import unpack
from s5vh_nb.models.mamba import Mamba
from s5vh_nb.models.mixers import MIXERS
from s5vh_nb.models.s5vh import S5VH, Stream

DIRECTIONS = ("both", "forward", "backward")


def network(**options):
    torch.manual_seed(0)
    return S5VH(S5VHConfig(**{**dict(d=13, bits=16, m=16, depth=2, decoder_m=16), **options}))


def test_steps_of_mamba_are_its_forward_pass_with_gradients():
    torch.manual_seed(0)
    net = Mamba(16, d_state=5, d_conv=3, expand=3, dt_rank=2).double()
    x = torch.randn(3, 6, 16, dtype=torch.float64).requires_grad_()
    outputs, states = [], net.allocate_inference_cache(3)
    for frame in x.split(1, 1):
        y, *states = net.step(frame, *states)
        outputs.append(y)
    results = torch.cat(outputs, 1), net(x)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(y.sin().sum(), [x, *net.parameters()]) for y in results]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b", [1, 7])
def test_a_stream_has_the_codes_of_every_prefix(b, dtype):
    "In training mode, too, and its memory does not grow."
    net, x = network(directions="forward").to(dtype), torch.randn(b, 40, 13)
    stream, sizes = net.stream(b), set()
    assert isinstance(stream, Stream)
    for s in range(40):
        frame = x[:, s].numpy() if s % 2 else x[:, s]
        assert torch.equal(stream.update(frame), net.encode(x[:, : s + 1]))
        sizes.add(sum(v.numel() for state in stream.states for v in state) + stream.votes.numel())
    assert len(sizes) == 1 and net.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streams_of_cast_networks_count_beyond_their_precision(dtype):
    "In 16 bits the sum of votes would stand still after some hundreds of frames."
    net, x = network(directions="forward").to(dtype), torch.randn(2, 13)
    stream = net.stream(2)
    for _ in range(300):
        codes = stream.update(x)
    assert stream.votes.abs().max() > 256 and stream.votes.dtype == torch.float32
    same = unpack(codes) == unpack(net.encode(x[:, None].expand(-1, 300, -1)))
    assert same.float().mean() > 0.9


def test_a_frame_that_is_refused_does_not_count():
    net, x = network(directions="forward"), torch.randn(1, 9, 13)
    stream = net.stream()
    for s in range(9):
        with pytest.raises(ValueError, match="features: expected finite numbers"):
            stream.update(x[:, s] / 0)
        with pytest.raises(ValueError, match=r"frame: expected shape \(1, 13\), found \(1, 12\)"):
            stream.update(x[:, s, 1:])
        with pytest.raises(TypeError, match="frame: expected a tensor"):
            stream.update(x[:, s].tolist())
        codes = stream.update(x[:, s])
    assert torch.equal(codes, net.encode(x))


OTHERS = [dict(directions="both"), dict(directions="backward"), dict(directions="forward", mixer="LSTM")]


@pytest.mark.parametrize("options", OTHERS)
def test_networks_that_cannot_stream_say_so(options):
    found = f"found {options['directions']!r} with {options.get('mixer', 'Mamba')}"
    with pytest.raises(ValueError, match="frame by frame: expected .*directions='forward'.*" + found):
        network(**options).stream()


LENGTHS = [9, 3, 1, 9, 12, 3, 70, 12, 65]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_code_does_not_depend_on_padding(mixer, directions):
    "Bit by bit: not on its length, not on what it holds, and not on the videos beside it."
    net, x = network(mixer=mixer, directions=directions), torch.randn(len(LENGTHS), 80, 13)
    alone = torch.cat([net.encode(x[[i], :t]) for i, t in enumerate(LENGTHS)])
    for longest, filling in ((80, 0.0), (70, torch.nan), (75, 1e30)):
        padded = x[:, :longest].clone()
        for video, t in zip(padded, LENGTHS):
            video[t:] = filling
        assert torch.equal(net.encode(padded, lengths=LENGTHS), alone)
        assert torch.equal(net.encode(padded[::2], lengths=LENGTHS[::2], batch=2), alone[::2])


def test_lengths_and_videos_of_every_kind(tmp_path):
    net, x = network(), torch.randn(len(LENGTHS), 70, 13)
    with h5py.File(tmp_path / "videos.h5", "w") as f:
        f["feats"] = x.numpy()
    expected = net.encode(x, lengths=LENGTHS)
    with h5py.File(tmp_path / "videos.h5") as f:
        for videos in (x, x.numpy(), HDF5Rows(tmp_path / "videos.h5"), f["feats"]):
            for lengths in (LENGTHS, tuple(LENGTHS), torch.tensor(LENGTHS), np.array(LENGTHS, np.uint8)):
                assert torch.equal(net.encode(videos, lengths=lengths), expected)
    whole = [70] * len(LENGTHS)
    assert torch.equal(net.encode(x, lengths=whole), net.encode(x))


@pytest.mark.parametrize("bits", [4, 12])
def test_codes_that_fill_no_byte(bits):
    net, x = network(bits=bits, directions="forward"), torch.randn(len(LENGTHS), 70, 13)
    alone = torch.cat([net.encode(x[[i], :t]) for i, t in enumerate(LENGTHS)])
    assert torch.equal(net.encode(x, lengths=LENGTHS), alone)
    stream = net.stream(len(x))
    for s in range(5):
        assert torch.equal(stream.update(x[:, s]), net.encode(x[:, : s + 1]))


WRONG = [[3] * 8, [[3]] * 9, 3, [0] * 9, [71] * 9, [3.0] * 9, [True] * 9]


@pytest.mark.parametrize("lengths", WRONG)
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths: expected 9 whole numbers from 1 to 70, found"):
        network().encode(torch.randn(9, 70, 13), lengths=lengths)


def test_no_videos_are_refused_with_lengths_too():
    with pytest.raises(ValueError, match="features: expected at least one item"):
        network().encode(torch.randn(0, 70, 13), lengths=torch.zeros(0, dtype=torch.int64))
