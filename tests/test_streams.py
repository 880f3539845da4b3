"Videos that arrive over time, and videos of different lengths: their codes are those of whole videos."

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


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [1, 3, 2]])
def test_steps_of_mamba_are_its_forward_pass_with_gradients(sizes):
    torch.manual_seed(0)
    net = Mamba(16, d_state=5, d_conv=3, expand=3, dt_rank=2).double()
    x = torch.randn(3, 6, 16, dtype=torch.float64).requires_grad_()
    outputs, states = [], net.allocate_inference_cache(3)
    for frames in x.split(sizes, 1):
        y, *states = net.step(frames, *states)
        outputs.append(y)
    results = torch.cat(outputs, 1), net(x)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(y.sin().sum(), [x, *net.parameters()]) for y in results]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def pieces(x, sizes):
    "x (b, t, d) in pieces of random lengths, drawn from `sizes`."
    rest, found = x, []
    while rest.shape[1]:
        size = sizes[torch.randint(len(sizes), ()).item()]
        found.append(rest[:, :size])
        rest = rest[:, size:]
    return found


def held(stream):
    "Numbers that a stream holds in memory, views with all of what they look at."
    kept = [stream.votes, stream.waiting, *(v for state in stream.states for v in state)]
    return sum(v.untyped_storage().nbytes() for v in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b", [1, 7])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_stream_has_the_codes_of_every_prefix(b, dtype, chunk):
    "However it is cut. In training mode, too, and its memory does not grow."
    net, x = network(directions="forward").to(dtype), torch.randn(b, 60, 13)
    stream, sizes, seen = net.stream(b, chunk), set(), 0
    assert isinstance(stream, Stream)
    for i, piece in enumerate(pieces(x, (1, 2, 3, 9))):
        stream.push(piece.numpy() if i % 2 else piece)
        seen += piece.shape[1]
        assert torch.equal(stream.codes(), net.encode(x[:, :seen]))
        sizes.add(held(stream) - stream.waiting.untyped_storage().nbytes())
        assert stream.waiting.untyped_storage().nbytes() < 4 * b * 13 * x.to(dtype).element_size()
    assert len(sizes) == 1 and net.training and seen == 60


@pytest.mark.parametrize("depth", [1, 3])
def test_layers_in_pieces_are_the_whole_network(depth):
    "The embeddings, in float64: for any pieces of a network that looks back, with all ahead of the other."
    x = torch.randn(3, 50, 13, dtype=torch.float64)
    for options in (dict(directions="forward"), dict(directions="both"), dict(tied=True)):
        net = network(depth=depth, **options).double().eval()
        whole, states = net.encoder(x), net.encoder.layers.allocate_inference_cache(3)
        start, found = 0, []
        for piece in pieces(x, (1, 2, 5, 17)):
            size = piece.shape[1]
            seen = piece if options.get("directions") == "forward" else x[:, start:]
            z, states = net.encoder.step(seen, start, states, size)
            found.append(z)
            start += size
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, dict(tied=True)])
def test_a_stream_of_both_directions_comes_near(options):
    "It has the codes of the whole where all frames to come lie ahead; few bits differ where none do."
    net, x = network(**options, bits=64, m=32).eval(), torch.randn(20, 60, 13)
    whole, drift, sizes = unpack(net.encode(x)), [], set()
    for ahead in (0, 4, 60):
        stream = net.stream(20, 6, ahead)
        for piece in pieces(x, (1, 5, 11)):
            stream.push(piece)
        drift.append((unpack(stream.codes()) != whole).float().mean().item())
        sizes.add(stream.waiting.shape[1] < 6 + ahead)
    assert drift[-1] == 0 < drift[0] < 0.3 and sizes == {True}


def test_asking_for_codes_changes_nothing():
    net, x = network(), torch.randn(2, 30, 13)
    asked, silent = net.stream(2, 4, 3), net.stream(2, 4, 3)
    for frame in x.split(1, 1):
        for stream in (asked, silent):
            stream.push(frame)
        asked.codes()
    assert torch.equal(asked.codes(), silent.codes())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 300])
def test_streams_of_cast_networks_count_beyond_their_precision(dtype, size):
    "In 16 bits the sum of votes would stand still after some hundreds of frames."
    net, x = network(directions="forward").to(dtype), torch.randn(2, 1, 13).expand(-1, 300, -1)
    stream = net.stream(2)
    for piece in x.split(size, 1):
        stream.push(piece)
    assert stream.votes.abs().max() > 256 and stream.votes.dtype == torch.float32
    same = unpack(stream.codes()) == unpack(net.encode(x))
    assert same.float().mean() > 0.9


def test_frames_that_are_refused_do_not_count():
    net, x = network(directions="forward"), torch.randn(1, 9, 13)
    stream = net.stream()
    with pytest.raises(ValueError, match="stream: expected at least one frame, found none"):
        stream.codes()
    for piece in x.split(3, 1):
        with pytest.raises(ValueError, match="features: expected finite numbers"):
            stream.push(piece / 0)
        with pytest.raises(
            ValueError, match=r"frames: expected shape \(1, s, 13\), s at least 1, found \(1, 3, 12\)"
        ):
            stream.push(piece[..., 1:])
        with pytest.raises(ValueError, match="frames: expected shape"):
            stream.push(piece[:, :0])
        with pytest.raises(TypeError, match="frames: expected a tensor"):
            stream.push(piece.tolist())
        stream.push(piece)
    assert torch.equal(stream.codes(), net.encode(x))


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_a_stream_has_at_least_one_video(size):
    with pytest.raises(ValueError, match="batch_size: expected a number of videos, at least 1, found"):
        network(directions="forward").stream(size)


OTHERS = [
    dict(directions="backward"),
    dict(directions="forward", mixer="LSTM"),
    dict(directions="forward", mixer="Transformer"),
]


@pytest.mark.parametrize("options", OTHERS)
def test_networks_that_cannot_stream_say_so(options):
    found = f"found {options['directions']!r} with {options.get('mixer', 'Mamba')}"
    with pytest.raises(ValueError, match="stream: expected .*directions='forward' or 'both'.*" + found):
        network(**options).stream()


def test_both_directions_need_a_chunk():
    with pytest.raises(ValueError, match="chunk: expected a number of frames, .* found None"):
        network().stream()
    for chunk in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"chunk: expected a number of frames, .* found {chunk}"):
            network(directions="forward").stream(chunk=chunk)
    for chunk, ahead in ((5, -1), (5, 1.5), (None, 2)):
        with pytest.raises(ValueError, match=f"ahead: expected 0, .* found {ahead}"):
            network(directions="forward").stream(1, chunk, ahead)


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
        stream.push(x[:, [s]])
        assert torch.equal(stream.codes(), net.encode(x[:, : s + 1]))


WRONG = [[3] * 8, [[3]] * 9, 3, [0] * 9, [71] * 9, [3.0] * 9, [True] * 9]


@pytest.mark.parametrize("lengths", WRONG)
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths: expected 9 whole numbers from 1 to 70, found"):
        network().encode(torch.randn(9, 70, 13), lengths=lengths)


def test_no_videos_are_refused_with_lengths_too():
    with pytest.raises(ValueError, match="features: expected at least one item"):
        network().encode(torch.randn(0, 70, 13), lengths=torch.zeros(0, dtype=torch.int64))
