"Baselines: bit order against faiss and `codes`, lazy features, blocks, seeds, bad input."

import dataclasses

import faiss
import numpy as np
import pytest
import torch

from s5vh_nb.datasets.catalog import load
from s5vh_nb.datasets.splits import Split
from s5vh_nb.datasets.synthetic import synthetic_like, synthetic_pairs
from s5vh_nb.models import baselines
from s5vh_nb.models.baselines import Hasher, fit_lsh, fit_matrix, itq_rotation
from s5vh_nb.models.codes import pack
from s5vh_nb.models.methods import METHODS, RIVALS, fit_baseline

RNG = np.random.default_rng(0)
VIDEOS = RNG.normal(size=(120, 6, 5)).astype(np.float32)  # 5 or 30 numbers a video: lifted at 64 bits
FITS = [(method, view, bits) for method in ("lsh", "itq") for view in ("mean", "flat") for bits in (8, 64)]
PAIRS = synthetic_pairs("mirflickr25k").train


def videos(frames=VIDEOS):
    return Split({"frames": frames}, None, "random videos")


def pairs(n=None, text=PAIRS.text):
    return Split({"image": PAIRS.image[:n], "text": text[:n]}, PAIRS.labels[:n], "random pairs")


@pytest.mark.parametrize("method, view, bits", FITS)
def test_same_seed_same_codes_and_another_seed_others(method, view, bits):
    hashers = [fit_baseline(method, videos(), bits, view, seed) for seed in (0, 0, 1)]
    codes = [hasher.encode(VIDEOS[:20]) for hasher in hashers]
    assert all(isinstance(hasher, Hasher) for hasher in hashers)
    assert codes[0].shape == (20, bits // 8) and codes[0].dtype == np.uint8
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()


def test_codes_have_packbits_order_and_faiss_has_the_other():
    bits = 16
    index = faiss.IndexLSH(30, bits, True)  # its directions come from the same generator, set to our seed
    index.rrot.init(7)
    hasher = fit_baseline("lsh", videos(), bits, "flat", seed=7)
    x = VIDEOS.reshape(120, -1) - hasher.function.mean
    theirs = np.unpackbits(index.sa_encode(x), axis=1, bitorder="little")
    ours = hasher.encode(VIDEOS)
    np.testing.assert_array_equal(np.unpackbits(ours, axis=1), theirs)
    np.testing.assert_array_equal(ours, pack(torch.from_numpy(x @ hasher.function.directions)).numpy())


def test_names_say_what_was_done():
    arguments = [("lsh", 64, "mean"), ("itq", 64, "mean"), ("itq", 8, "flat")]
    names = [fit_baseline(method, videos(), bits, view).name for method, bits, view in arguments]
    assert names == ["LSH, time mean", "ITQ (Nystroem-lifted), time mean", "ITQ, flattened"]
    names = [fit_baseline(method, pairs(), 8, "pair").name for method in METHODS["pairs"]]
    assert names == ["ITQ", "LSH", "CCA-ITQ", "supervised linear", *(rival.name for rival in RIVALS.values())]


def test_order_matters_flat_and_not_in_the_mean():
    for view, same in (("mean", True), ("flat", False)):
        hasher = fit_baseline("lsh", videos(), 64, view)
        differ = np.unpackbits(hasher.encode(VIDEOS) ^ hasher.encode(VIDEOS[:, ::-1]), axis=1).mean()
        assert (differ < 0.001) == same


def test_tensors_of_any_kind_and_one_bit():
    hasher, x = fit_baseline("lsh", videos(), 16, "mean"), torch.from_numpy(VIDEOS[:9])
    halves = x.bfloat16()
    np.testing.assert_array_equal(hasher.encode(halves), hasher.encode(halves.float().numpy()))
    np.testing.assert_array_equal(hasher.encode(x.clone().requires_grad_()), hasher.encode(x))
    data = load("emoji")
    assert fit_baseline("supervised", data.train, 1, "pair").encode(*data.query.arrays).shape[1] == 1


@pytest.mark.parametrize("method, view, bits", FITS)
def test_lazy_features_and_tensors_give_the_codes_of_arrays(method, view, bits):
    lazy = synthetic_like("ucf101", n=(120, 120, 30), d=6).train
    array = lazy.frames[:]
    hasher = fit_baseline(method, videos(array), bits, view)
    expected = hasher.encode(array)
    np.testing.assert_array_equal(fit_baseline(method, lazy, bits, view).encode(lazy.frames), expected)
    np.testing.assert_array_equal(hasher.encode(torch.from_numpy(array)), expected)


@pytest.mark.parametrize("view, split", [("flat", videos()), ("pair", pairs())])
def test_small_blocks_change_nothing(monkeypatch, view, split):
    expected = fit_baseline("itq", split, 8, view).encode(*split.arrays)
    monkeypatch.setattr(baselines, "row_blocks", lambda x: [slice(i, i + 7) for i in range(0, len(x), 7)])
    np.testing.assert_array_equal(fit_baseline("itq", split, 8, view).encode(*split.arrays), expected)


def test_a_fit_gets_a_random_part_of_what_is_too_large(monkeypatch):
    monkeypatch.setattr(baselines, "_FIT_NUMBERS", 30 * 40)
    (some, keep), (other, _) = (fit_matrix(videos(), "flat", seed) for seed in (0, 1))
    assert some.shape == (40, 30) and (some != other).any()
    np.testing.assert_array_equal(some, VIDEOS.reshape(120, -1)[keep])


def test_labels_follow_the_part_that_a_fit_gets(monkeypatch):
    "With labels that the features hold, part of the pairs is enough for the supervised fit."
    classes = np.arange(200) % 4
    labels = np.eye(4, dtype=np.uint8)[classes]
    noise = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)
    image = labels + 0.01 * noise
    split = Split({"image": image, "text": image.copy()}, labels, "separable pairs")
    monkeypatch.setattr(baselines, "_FIT_NUMBERS", 8 * 60)
    codes = fit_baseline("supervised", split, 8, "pair").encode(*split.arrays)
    assert len({row.tobytes() for row in codes}) == 4
    assert all(len(np.unique(codes[classes == c], axis=0)) == 1 for c in range(4))


def test_the_fit_leaves_its_input_alone():
    before, split = VIDEOS.copy(), pairs()
    pair_before = [x.copy() for x in split.arrays]
    for method, view, bits in FITS:
        fit_baseline(method, videos(), bits, view)
    for method in METHODS["pairs"]:
        fit_baseline(method, split, 8, "pair")
    np.testing.assert_array_equal(VIDEOS, before)
    for x, y in zip(split.arrays, pair_before):
        np.testing.assert_array_equal(x, y)


def quantization_loss(p):
    return ((np.where(p > 0, 1, -1) - p) ** 2).sum(1).mean()


def test_itq_finds_the_rotation_of_a_cubes_corners():
    "There are local minima; some start finds the corners."
    corners = np.where(RNG.random((500, 4)) < 0.5, 1.0, -1.0)
    turned = corners @ itq_rotation(corners, seed=9, steps=0)  # by a random rotation
    losses = [quantization_loss(turned @ itq_rotation(turned, seed)) for seed in range(5)]
    assert min(losses) < 1e-12


def test_no_step_of_itq_raises_the_loss():
    v = VIDEOS.reshape(120, -1)
    losses = [quantization_loss(v @ itq_rotation(v, 0, steps)) for steps in range(12)]
    assert (np.diff(losses) <= 1e-6).all() and losses[-1] < losses[0] - 0.1


def test_lsh_works_beyond_the_width():
    _, directions = fit_lsh(VIDEOS.mean(1), 64, 0)
    assert directions.shape == (5, 64) and len(np.unique(np.abs(directions), axis=1).T) == 64


def test_only_supervised_methods_use_labels():
    data = load("emoji")
    other = dataclasses.replace(data.train, labels=np.ascontiguousarray(data.train.labels[::-1]))
    for method in METHODS["pairs"]:
        hashers = [fit_baseline(method, split, 16, "pair") for split in (data.train, other)]
        codes = [hasher.encode(*data.query.arrays) for hasher in hashers]
        uses_labels = RIVALS[method].supervised if method in RIVALS else method == "supervised"
        assert np.array_equal(*codes) != uses_labels


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(method="pq"), "method: expected one of itq, lsh, supervised, found 'pq'"),
        (dict(method="cca-itq"), "method: expected one of itq, lsh, supervised, found 'cca-itq'"),
        (dict(view="max"), "view: expected one of mean, flat, pair, found 'max'"),
        (dict(view="pair"), "view: expected one for videos, found 'pair'"),
        (dict(bits=True), "bits: expected a positive whole number, found True"),
        (dict(bits=0), "bits: expected a positive whole number, found 0"),
        (dict(bits="8"), "bits: expected a positive whole number, found '8'"),
        (dict(train=videos(VIDEOS[:5])), "train: expected at least 8 videos, found 5"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_baseline(**{**dict(method="itq", train=videos(), bits=8), **arguments})


@pytest.mark.parametrize(
    "x, message",
    [
        (VIDEOS[:, :5], r"frames: expected shape \(n, 6, 5\), as in training, found \(120, 5, 5\)"),
        (VIDEOS[:0], "features: expected at least one item"),
        (VIDEOS[:3] * np.inf, "features: expected finite numbers"),
    ],
)
def test_bad_queries_are_named(x, message):
    with pytest.raises(ValueError, match=message):
        fit_baseline("itq", videos(), 8, "flat").encode(x)


INDEPENDENT = "bits: expected at most as many as each modality has independent directions"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(method="pca"), "method: expected one of itq, lsh, cca-itq, supervised"),
        (dict(view="mean"), "view: expected one for pairs, found 'mean'"),
        (dict(bits=True), "bits: expected a positive whole number, found True"),
        (dict(bits=16.0), "bits: expected a positive whole number, found 16.0"),
        (dict(bits=48), "bits: expected at most 40 for cca-itq"),
        (dict(method="itq", bits=112), "bits: expected at most 104 for itq"),
        (dict(train=pairs(8), bits=8), INDEPENDENT),  # centred, 8 pairs span 7 dimensions
        (dict(train=pairs(text=np.zeros_like(PAIRS.text)), bits=8), INDEPENDENT),
    ],
)
def test_bad_pairs_are_named(arguments, message):
    with pytest.raises(ValueError) as found:
        fit_baseline(**{**dict(method="cca-itq", train=pairs(), bits=16, view="pair"), **arguments})
    assert message in str(found.value)


@pytest.mark.parametrize("method", METHODS["pairs"])
def test_bad_pair_queries_are_named(method):
    image, text = PAIRS.arrays
    hasher = fit_baseline(method, pairs(), 16, "pair")
    assert hasher.encode(image, text).shape == (200, 2)
    bad = {
        "features: expected at least one item, found none": (image[:0], text[:0]),
        "text: expected 200 rows, as many as images, found 5": (image, text[:5]),
        "image: expected shape": (text, image),
        "features: expected finite numbers": (image, text * np.nan),
        "inputs: expected image and text, found 1": (image,),
        "inputs: expected image and text, found 3": (image, text, text),
    }
    for message, queries in bad.items():
        with pytest.raises(ValueError, match=message):
            hasher.encode(*queries)
    with pytest.raises(
        TypeError,
        match="image: expected a tensor, an array or a row store, dense and of real numbers, found NoneType",
    ):
        hasher.encode(None, None)
