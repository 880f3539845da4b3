"Networks as programs of torch's own operations, and as ONNX files: their codes are those of the networks."

import functools
import importlib
import io

import pytest
import torch
from torch.export import Dim

from s5vh_nb.basics.config import DMMHConfig, S5VHConfig
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.models.codes import network_class
from s5vh_nb.models.dmmh import DMMH
from s5vh_nb.models.mamba import Bidirectional, Layers, Mamba
from s5vh_nb.models.mixers import MIXERS
from s5vh_nb.models.s5vh import S5VH, positions
from s5vh_nb.ops.dispatch import use_backend

without_onnx = not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime")))


def videos(**options):
    torch.manual_seed(0)
    return S5VH(S5VHConfig(**{**dict(d=13, bits=12, m=16, depth=1, decoder_m=16), **options}))


def pairs(mixer):
    torch.manual_seed(0)
    sizes = dict(di=12, dt=9, bits=16, width=16, image_hidden=16, cnn_width=8, layers=1)
    return DMMH(DMMHConfig(mixer=mixer, **sizes))


@pytest.fixture(scope="module")
def exported():
    "A network, and its program, which went through a file."
    net, file = videos(), io.BytesIO()
    torch.export.save(net.export_program(), file)
    file.seek(0)
    return net, torch.export.load(file)


SHAPES = (1, 1, 13), (3, 3, 13), (1, 70, 13), (5, 1, 13), (32, 16, 13), (16, 32, 13)


def test_numbers_of_videos_and_frames_are_free(exported):
    "Also where they equal a width inside the network. A network in training mode stays in it."
    net, program = exported[0], exported[1].module()
    for x in map(torch.randn, SHAPES):
        assert torch.equal(program(x), net.encode(x))
    assert net.training


@pytest.fixture(scope="module")
def mixed():
    "A network with a layer of every mixer, and its program."
    net = videos()
    makes = [functools.partial(make, 16) for make in MIXERS.values()]
    net.encoder.layers = Layers(*[Bidirectional(make, directions="backward") for make in makes])
    return net, net.export_program()


def test_they_are_free_with_every_mixer(mixed):
    net, program = mixed[0], mixed[1].module()
    for x in map(torch.randn, SHAPES):
        assert torch.equal(program(x), net.encode(x))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_layer_by_frames_is_the_layer(mixer):
    "The loop of a program against chunks and kernels, also where the last chunk is short."
    torch.manual_seed(0)
    net, x = MIXERS[mixer](16).double(), torch.randn(2, 5, 16).double()
    program = torch.export.export(net, (x,), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)).module()
    for x in (torch.randn(3, 70, 16).double(), torch.randn(1, 1, 16).double()):
        torch.testing.assert_close(program(x), net(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["conmh", "bth", "ssth", "autossvh", "wsch"])
def test_video_networks_of_others_are_programs_and_refuse_other_shapes(variant):
    "Numbers of videos are free, and of frames, too, but for SSTH."
    torch.manual_seed(0)
    config = train_config("spoken-digits", "smoke", variant, d=13, bits=12).model
    net = network_class(config)(config)
    program = net.export_program().module()
    for b, t in ((1, 25), (32, 25)) if variant == "ssth" else ((1, 1), (3, 70), (16, 16)):
        x = torch.randn(b, t, 13)
        assert torch.equal(program(x), net.encode(x))
    for shape in ((2, 25, 12), (2, 0, 13), (25, 13)):
        with pytest.raises(ValueError, match=r"frames: expected shape \(n, t, 13\), t at least 1"):
            net.encode(torch.zeros(shape))


@pytest.mark.parametrize("mixer", ["LSTM", "none"])
def test_numbers_of_pairs_are_free(mixer):
    net = pairs(mixer)
    program = net.export_program().module()
    for n in (1, 3, 16, 32):
        image, text = torch.randn(n, 12), torch.randn(n, 9)
        assert torch.equal(program(image, text), net.encode(image, text))


NEEDS_TORCH_2_13 = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="a strict export is taken for torch.compile"
)


@pytest.mark.parametrize(
    "strict,backend", [(False, "reference"), pytest.param(True, "auto", marks=NEEDS_TORCH_2_13)]
)
def test_networks_and_layers_go_through_torch_export(strict, backend):
    parts = (videos(mixer="Transformer").eval(), torch.randn(3, 7, 13)), (Mamba(8), torch.randn(2, 5, 8))
    for net, x in parts:
        with use_backend(backend):
            program = torch.export.export(net, (x,), strict=strict).module()
        found, expected = program(x), net(x)
        torch.testing.assert_close(getattr(found, "h", found), getattr(expected, "h", expected))


def test_an_export_leaves_nothing_behind(exported):
    "Positions are kept; those of a program that is being exported must not be."
    net, x = exported[0], torch.randn(3, 3, 13)
    assert type(positions(3, 16)) is torch.Tensor
    assert torch.equal(net.encode(x), videos().encode(x))


@pytest.mark.skipif(without_onnx, reason="the extra dev is not installed")
def test_onnxruntime_computes_the_same_codes(mixed, tmp_path):
    import onnxruntime

    net, program = mixed
    torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    for x in map(torch.randn, SHAPES):
        (codes,) = session.run(None, {"frames": x.numpy()})
        assert torch.equal(torch.from_numpy(codes), net.encode(x))
