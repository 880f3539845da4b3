"""Encoding in other people's hands: threads, casts, kinds of input, saved networks that are not there."""

import contextlib
import dataclasses
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from s5vh_nb.basics.config import DMMHConfig, PlusConfig, S5VHConfig
from s5vh_nb.datasets.splits import Split
from s5vh_nb.models import codes, s5vh
from s5vh_nb.models.baselines import fit_lsh, itq_rotation
from s5vh_nb.models.codes import _Watched, pack, unpack
from s5vh_nb.models.dmmh import DMMH
from s5vh_nb.models.methods import fit_baseline
from s5vh_nb.models.mixers import MIXERS
from s5vh_nb.models.plus import Plus
from s5vh_nb.models.s5vh import S5VH, positions
from s5vh_nb.ops import streams
from s5vh_nb.ops.dispatch import use_backend

VIDEOS = S5VHConfig(d=13, bits=16, m=16, depth=2, decoder_m=16)
PAIRS = DMMHConfig(di=12, dt=9, bits=16, width=16, image_hidden=16, cnn_width=8)
every_mixer = pytest.mark.parametrize("mixer", MIXERS)
both_networks = pytest.mark.parametrize("kind", ["videos", "pairs"])


def network(kind, n=12, **changes):
    "A network, and inputs for it."
    torch.manual_seed(0)
    if kind == "videos":
        return S5VH(S5VHConfig(**{**vars(VIDEOS), **changes})), (torch.randn(n, 9, 13),)
    return DMMH(PAIRS), (torch.randn(n, 12), torch.randn(n, 9))


@both_networks
def test_threads_share_a_network_in_training_mode(kind):
    "The right codes in every thread, and nothing of the network changes, batch statistics included."
    net, inputs = network(kind, 40)
    before = {name: v.clone() for name, v in net.state_dict().items()}
    expected, found = net.eval().encode(*inputs), []
    net.train()

    def encode():
        found.extend(net.encode(*inputs, batch=4) for _ in range(5))

    threads = [threading.Thread(target=encode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30 and all(torch.equal(codes, expected) for codes in found)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(v, before[name]) for name, v in net.state_dict().items())


def test_encoding_leaves_the_mode_of_every_part():
    "Also where a part of a network is in evaluation mode for good, and where an input is refused."
    net, inputs = network("pairs")
    net.image.mlp.eval()
    modes = [module.training for module in net.modules()]
    net.encode(*inputs)
    with pytest.raises(ValueError, match="features"):
        net.encode(inputs[0] / 0, inputs[1])
    assert [module.training for module in net.modules()] == modes


@both_networks
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_follow_the_parameters(kind, dtype):
    net, inputs = network(kind, 200)
    expected, cast = unpack(net.encode(*inputs)), net.to(dtype)
    for given in (inputs, [x.double().numpy() for x in inputs]):
        same = (unpack(cast.encode(*given)) == expected).float().mean()
        assert same > (0.999 if dtype == torch.float64 else 0.9)


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_mixer_encodes_after_a_cast(mixer, dtype):
    if mixer == "LSTM" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch has no bfloat16 LSTM for this processor")
    net, inputs = network("videos", mixer=mixer)
    assert net.to(dtype).encode(*inputs).shape == (12, 2)


WRONG = {
    "DataFrame": (lambda x: pd.DataFrame(x.numpy()), r"found DataFrame \(pass its .to_numpy"),
    "sparse": (lambda x: scipy.sparse.csr_matrix(x.numpy()), r"found csr_matrix .*\(pass its .toarray"),
    "sparse tensor": (lambda x: x.to_sparse(), "found Tensor"),
    "text": (lambda x: x.numpy().astype(str), "found ndarray of <U"),
    "objects": (lambda x: x.numpy().astype(object), "found ndarray of object"),
    "complex": (lambda x: x + 0j, "found Tensor of torch.complex64"),
    "list": (lambda x: x.tolist(), "found list"),
    "scalar": (lambda x: x[0, 0], "found Tensor"),
}


@pytest.mark.parametrize("make,found", WRONG.values(), ids=WRONG)
def test_kinds_of_input_that_are_no_array_are_named(make, found):
    net, (image, text) = network("pairs")
    data = Split({"image": image.numpy(), "text": text.numpy()}, None, "here")
    for encode in (net.encode, fit_baseline("lsh", data, 8, "pair").encode):
        with pytest.raises(TypeError, match="image: expected a tensor, .*" + found):
            encode(make(image), text)
        with pytest.raises(TypeError, match="text: expected a tensor, .*" + found):
            encode(image, make(text))


@both_networks
def test_arrays_and_tensors_of_any_real_numbers_encode_alike(kind):
    net, inputs = network(kind)
    whole = [(10 * x).round() for x in inputs]
    expected = net.encode(*whole)
    for dtype in (np.int8, np.int64, np.float16, np.float64, ">f4"):
        assert torch.equal(net.encode(*[x.numpy().astype(dtype) for x in whole]), expected)
    assert torch.equal(net.encode(*[x.to(torch.int16) for x in whole]), expected)


@both_networks
@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1e30, 1e38])
def test_numbers_near_the_limit_of_float32_are_refused(kind, factor):
    "Their squares overflow, and the code would not depend on them any more."
    net, inputs = network(kind)
    message = r"features(, projected)?: expected finite numbers of at most 1e\+15"
    for given in ([x * factor for x in inputs], [x.double().numpy() * factor for x in inputs]):
        with pytest.raises(ValueError, match=message):
            net.encode(*given)
    names = ("frames",) if kind == "videos" else ("image", "text")
    data = Split({name: x.numpy() for name, x in zip(names, inputs)}, None, "here")
    hasher = fit_baseline("itq", data, 8, "mean" if kind == "videos" else "pair")
    with pytest.raises(ValueError, match=message):
        hasher.encode(*[x * factor for x in inputs])


@pytest.mark.parametrize(
    "net, taken",
    [
        (S5VH(VIDEOS), torch.bfloat16),
        (S5VH(VIDEOS).double(), torch.float64),
        (Plus(PlusConfig(d=13, bits=16, m=16, time_steps=7)), torch.float32),
    ],
)
def test_features_of_half_precision(net, taken, monkeypatch):
    "Under autocast a network that begins with a product of float32 weights takes them as they are."
    x, own, seen = torch.randn(12, 9, 13).bfloat16(), next(net.parameters()).dtype, []
    first = "h" if type(net) is Plus else "project"  # what gets the features
    call = getattr(type(net), first)
    monkeypatch.setattr(type(net), first, lambda self, x: seen.append(x.dtype) or call(self, x))
    with torch.autocast("cpu", torch.bfloat16):
        mine, wide = net.encode(x), net.encode(x.to(own))
    assert torch.equal(mine, wide) and seen[0] == taken
    net.encode(x)
    assert seen[-1] == own


def test_frames_without_numbers_are_named_by_the_network():
    for shape in ((3, 0, 13), (3, 9, 0)):
        for net in (S5VH(VIDEOS), Plus(PlusConfig(d=13, bits=16, m=16, time_steps=7))):
            with pytest.raises(ValueError, match="frames: expected shape"):
                net.encode(torch.zeros(shape))


@torch.no_grad()
def test_what_is_watched_of_a_network():
    "Numbers in weights may change; modules, attributes, hooks, and where and how weights lie may not."
    net = S5VH(VIDEOS)
    watched = _Watched(net, "cpu")
    linear, norm = net.hash.linear, net.hash.norm
    linear.weight.mul_(2)
    net.train().eval()
    assert watched.is_as_it_was()

    def other_attribute():
        norm.eps = 1e-3

    def new_attribute():
        norm.scale = torch.ones(3)

    def shorter():
        linear.weight = torch.nn.Parameter(linear.weight.data[:8])

    def turned():
        linear.weight = torch.nn.Parameter(linear.weight.data.t())

    def other_module():
        net.hash.norm = torch.nn.Identity()

    def other_kind():
        linear.__class__ = torch.nn.Identity

    def other_configuration():
        net.config = S5VHConfig(**{**vars(VIDEOS), "bits": 8})

    for change in (
        other_attribute,
        new_attribute,
        shorter,
        turned,
        other_module,
        other_kind,
        other_configuration,
    ):
        watched = _Watched(net, "cpu")
        assert watched.is_as_it_was()
        change()
        assert not watched.is_as_it_was(), change.__name__
    watched = _Watched(net, "cpu")
    handle = net.register_forward_hook(lambda module, inputs, out: None)
    assert not watched.is_as_it_was()
    handle.remove()
    assert watched.is_as_it_was()
    with torch.autocast("cpu", torch.bfloat16):
        assert not watched.is_as_it_was()
    with use_backend("reference"):
        assert not watched.is_as_it_was()


def test_a_watched_network_can_be_forgotten():
    net = S5VH(VIDEOS)
    watched, alive = _Watched(net, "cpu"), weakref.ref(net)
    del net
    gc.collect()
    assert watched.parts and alive() is None


def test_an_encoder_goes_when_its_network_leaves_the_gpu():
    net = S5VH(VIDEOS)
    encoder = codes._Encoder(net, "cpu")
    encoder.watched, codes._ENCODERS[net] = _Watched(net, "cpu"), encoder
    net.float()
    assert net in codes._ENCODERS  # nothing has changed
    net.hash.linear.weight.data = net.hash.linear.weight.data.clone()
    net.encode(torch.randn(2, 5, 13))
    assert net not in codes._ENCODERS
    encoder.watched, codes._ENCODERS[net] = _Watched(net, "cpu"), encoder
    net.double()
    assert net not in codes._ENCODERS


@torch.no_grad()
def test_features_that_are_copied_are_projected_in_parts(monkeypatch):
    net, x, sizes = S5VH(VIDEOS).eval(), torch.randn(7, 5, 13), []
    net.encoder.embed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(s5vh, "_COPIED", 15)
    with torch.autocast("cpu", torch.bfloat16):
        parts, whole = net.project(x)[0], net.encoder.project(x)
        net.project(x.bfloat16())
    assert sizes == [3, 3, 1, 7, 7] and torch.allclose(parts, whole, atol=1e-2)


def test_positions_stay_where_graphs_read_them():
    first = positions(25, 64)
    for t in range(1, 200):
        assert len(positions(t, 64)) == len(positions(t, 32)) == t
    assert positions(25, 64).data_ptr() == first.data_ptr()
    assert torch.equal(positions(200, 64)[:25], first)


def test_no_garbage_is_collected_while_threads_record_in_turns(monkeypatch):
    "An end of the first recording may not switch it on within the second."
    fakes = dict(current_stream=lambda: None, current_device=lambda: 0, Stream=lambda device: object())
    fakes |= dict(set_stream=lambda stream: None, graph=lambda *args: contextlib.nullcontext())
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(streams, "_SIDE_STREAMS", {})
    inside, seen = threading.Event(), []

    def first():
        with streams.recording(None):
            inside.set()
            time.sleep(0.2)

    def second():
        inside.wait()
        with streams.recording(None):
            seen.append(gc.isenabled())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda work: work(), (first, second)))
    assert seen == [False] and gc.isenabled()


def test_networks_made_elsewhere_leave_ordinary_ones_alone():
    pairs = dataclasses.replace(PAIRS, width=24)  # of which nothing is kept yet
    with torch.device("meta"):
        DMMH(pairs)
    net = DMMH(pairs)
    assert {x.device.type for x in (*net.parameters(), *net.buffers())} == {"cpu"}
    assert len(net.encode(torch.randn(2, 12), torch.randn(2, 9))) == 2


def test_arrays_into_a_network_itself_are_named():
    for kind in ("videos", "pairs"):
        net, inputs = network(kind)
        with pytest.raises(TypeError, match="expected a tensor, found ndarray"):
            net(*[x.numpy() for x in inputs])


def test_codes_are_packed_from_arrays_and_tensors_alike():
    h = torch.randn(9, 24)
    assert torch.equal(pack(h.numpy()), pack(h)) and torch.equal(unpack(pack(h).numpy()), unpack(pack(h)))


def test_baselines_take_tensors_and_name_lists():
    x = torch.randn(30, 8)
    for mine, theirs in zip(fit_lsh(x, 8, 0), fit_lsh(x.numpy(), 8, 0)):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(itq_rotation(x, 0), itq_rotation(x.numpy(), 0))
    with pytest.raises(TypeError, match="train: expected a Split .*found list"):
        fit_baseline("itq", [[1.0, 2.0]], 8)


@pytest.fixture
def saved(tmp_path):
    network("videos")[0].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_network_is_loaded_to_a_device_by_name_or_object(saved):
    for device in ("cpu", torch.device("cpu"), torch.device("cpu", 0)):
        assert next(S5VH.from_pretrained(saved, map_location=device).parameters()).device.type == "cpu"
    with pytest.raises(ValueError, match="^device: expected 'cpu', .*found 'gpu'"):
        S5VH.from_pretrained(saved, map_location="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda:0")])
def test_a_gpu_that_is_not_there_is_not_blamed_on_the_file(saved, device):
    with pytest.raises(ValueError, match="^device: expected 'cpu'"):
        S5VH.from_pretrained(saved, map_location=device)


def test_a_missing_folder_is_not_a_name_on_the_hub(saved, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    here = saved.parent.name
    for name in (saved / "x", f"{saved}x", Path("x"), "./x", "../x", "~/x", f"{here}/x", f"{here}/x/y"):
        message = f"{name}: expected a folder with a saved network, found no folder"
        with pytest.raises(FileNotFoundError, match=f"^{message}"):
            S5VH.from_pretrained(name)
    with pytest.raises(
        ValueError, match="HashNetwork.from_pretrained: expected the class of the saved network"
    ):
        codes.HashNetwork.from_pretrained("~/model")
    monkeypatch.setenv("HOME", str(saved.parent))
    assert S5VH.from_pretrained("~/model").config == VIDEOS


@pytest.mark.parametrize("name", ["nowhere", "nobody/nothing", "not a name"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_said_to_be_neither(name):
    expected = (
        f"^{name}: expected a folder with a saved network, or the name of one on the Hub, found neither"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        S5VH.from_pretrained(name, local_files_only=True)


def test_missing_weights_are_named(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="model.safetensors: expected the weights, found no such file"
    ):
        S5VH.from_pretrained(saved)


@both_networks
def test_a_network_prints_as_one_line(kind):
    "With its sizes, what differs from the default, and its weights; its parts print as torch's."
    net, _ = network(kind)
    shape = {
        "videos": "S5VH, d=13, bits=16, m=16, depth=2, decoder_m=16, decoder_depth=1, mixer='Mamba'",
        "pairs": "DMMH, di=12, dt=9, bits=16, width=16, image_hidden=16, text_hidden=1024, mixer='Mamba', "
        "layers=2, cnn_width=8",
    }[kind]
    size = sum(w.numel() for w in net.parameters())
    assert str(net) == repr(net) == f"{shape}: {size:,} weights, float32 on cpu"
    assert repr(net.to("meta")).endswith(f"{size:,} weights, float32 on meta")
    for part in net.children():
        assert repr(part) == torch.nn.Module.__repr__(part)
