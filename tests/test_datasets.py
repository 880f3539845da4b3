"Data sets: bad files and arguments, reading little of large files, pinned fingerprints, the image network."

import dataclasses
import os
import pickle
import re
import sys
import time
import types

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse
import torch
from PIL import Image
from torch import nn

from s5vh_nb.datasets import rows, splits
from s5vh_nb.datasets.animated_emoji import animated_emoji_names, emoji_filmstrip
from s5vh_nb.datasets.asl_source import get_asl_words
from s5vh_nb.datasets.catalog import CATALOG, DATA_ROOT, available, load
from s5vh_nb.datasets.emoji import emoji
from s5vh_nb.datasets.features import (
    bag_of_words,
    group_split,
    hashed_words,
    vgg_fc7,
    vgg_features,
    vgg_input,
)
from s5vh_nb.datasets.pair_files import load_official_pairs, write_official_pairs
from s5vh_nb.datasets.rows import HDF5Rows, RowStore, to_tensor
from s5vh_nb.datasets.splits import Dataset, Split
from s5vh_nb.datasets.synthetic import Difficulty, difficulty_of, synthetic_like, synthetic_pairs
from s5vh_nb.datasets.video_files import load_official, write_official

pytestmark = pytest.mark.filterwarnings("ignore:.*not the sizes of:UserWarning")  # most sets here are small

FEATS, LABELS = "ucf_train_feats.h5", "ucf_train_labels.mat"
PAIRS = "mir_cnn_twt.mat"
SMALL = dict(n=(120, 120, 40), d=8)


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch):
    "Whatever folder of data sets this machine names, these tests name their own."
    monkeypatch.delenv(DATA_ROOT, raising=False)


@pytest.fixture
def root(tmp_path):
    "A small UCF101 in the official layout."
    write_official(tmp_path, "ucf101", synthetic_like("ucf101", **SMALL))
    return tmp_path


@pytest.fixture(params=["7.3", "5"])
def pairs_root(tmp_path, request):
    "A small MIR-Flickr25K in the official layout, in either format."
    write_official_pairs(tmp_path, "mirflickr25k", synthetic_pairs("mirflickr25k"), request.param)
    return tmp_path


def rewrite(path, array, key="feats"):
    with h5py.File(path, "w") as f:
        f[key] = array


def dangle(path, key="feats"):
    with h5py.File(path, "w") as f:
        f[key] = h5py.SoftLink("/elsewhere")


def features(n=120, t=25, d=8):
    return np.ones((n, t, d), np.float32)


def onehot(n=120, classes=101):
    return np.eye(classes)[np.arange(n) % classes]


def v73(path, array, key="labels"):
    "As MATLAB writes it: transposed, after a block of its own."
    with h5py.File(path, "w", userblock_size=512) as f:
        f[key] = array.T


def cut_v73(path):
    v73(path, onehot())
    os.truncate(path, 5000)


def patch(path, at, what):
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(what)


def with_feats(array, key="feats"):
    return lambda root: rewrite(root / FEATS, array, key)


def with_labels(x):
    return lambda root: scipy.io.savemat(root / LABELS, {"labels": x})


def with_file(name, change):
    return lambda root: change(root / name)


NONE_THERE = "key 'feats', found the keys []"
NO_MATLAB = "a MATLAB file (v5 or v7.3), found: "
CUT = "a complete HDF5 file, found: "
TEXT = b"no such thing at all " * 20

# What is done to the files, the error, what it must name
FAULTS = {
    "features missing": (with_file(FEATS, os.remove), FileNotFoundError, FEATS, "no such file"),
    "query features missing": (
        with_file("ucf_test_feats.h5", os.remove),
        FileNotFoundError,
        "ucf_test_feats.h5",
        "nothing there",
    ),
    "labels missing": (with_file(LABELS, os.remove), FileNotFoundError, LABELS, "nothing there"),
    "key missing": (
        with_feats(features(), "features"),
        ValueError,
        FEATS,
        "key 'feats', found the keys ['features']",
    ),
    "label key missing": (
        lambda r: scipy.io.savemat(r / LABELS, {"label": onehot()}),
        ValueError,
        LABELS,
        "matrices called labels, found variables called label",
    ),
    "key is a folder": (with_feats(features(), "feats/x"), ValueError, FEATS, NONE_THERE),
    "key without a shape": (with_feats(h5py.Empty("f4")), ValueError, FEATS, NONE_THERE),
    "link that leads nowhere": (with_file(FEATS, dangle), ValueError, FEATS, NONE_THERE),
    "rank 2": (with_feats(features()[0]), ValueError, FEATS, "rank 3 (n, t, d), found shape (25, 8)"),
    "integers": (
        with_feats(features().astype(int)),
        ValueError,
        FEATS,
        "floating-point numbers, found int64",
    ),
    "empty split": (with_feats(features(n=0)), ValueError, FEATS, "at least one item and one feature"),
    "t differs": (
        with_feats(features(t=30)),
        ValueError,
        "ucf_test_feats.h5: shape of frames",
        "expected (30, 8) as in ucf_train_feats.h5, found (25, 8)",
    ),
    "d differs": (
        with_feats(features(d=9)),
        ValueError,
        "ucf_test_feats.h5: shape of frames",
        "expected (25, 9) as in ucf_train_feats.h5, found (25, 8)",
    ),
    "labels too short": (
        with_labels(onehot(119)),
        ValueError,
        FEATS,
        "expected 120 rows, one for each item, found 119",
    ),
    "labels transposed": (
        with_labels(onehot().T),
        ValueError,
        LABELS,
        "equally many classes, found [120, 101]",
    ),
    "labels of rank 3": (
        with_labels(onehot()[None]),
        ValueError,
        LABELS,
        "a matrix of numbers, found float64 of shape (1, 120, 101)",
    ),
    "labels of rank 3, v7.3": (
        lambda r: v73(r / LABELS, onehot()[None]),
        ValueError,
        LABELS,
        "rank 2 (n, width)",
    ),
    "labels are counts": (
        with_labels(3 * onehot()),
        ValueError,
        LABELS,
        "only 0 and 1, or only -1 and 1, found values such as [3",
    ),
    "labels are NaN": (
        with_labels(onehot() * np.nan),
        ValueError,
        LABELS,
        "only 0 and 1, or only -1 and 1, found values such as [nan]",
    ),
    "not HDF5": (lambda r: (r / FEATS).write_bytes(b"no such thing"), ValueError, FEATS, CUT),
    "empty file": (lambda r: (r / FEATS).write_bytes(b""), ValueError, FEATS, CUT),
    "not MATLAB": (lambda r: (r / LABELS).write_bytes(TEXT), ValueError, LABELS, NO_MATLAB),
    "labels truncated": (lambda r: os.truncate(r / LABELS, 500), ValueError, LABELS, NO_MATLAB),
    "labels truncated, v7.3": (with_file(LABELS, cut_v73), ValueError, LABELS, CUT),
    "labels that lead nowhere, v7.3": (
        lambda r: dangle(r / LABELS, "labels"),
        ValueError,
        LABELS,
        "matrices called labels, found variables called nothing",
    ),
    "labels without a shape, v7.3": (
        lambda r: rewrite(r / LABELS, h5py.Empty("u1"), "labels"),
        ValueError,
        LABELS,
        "matrices called labels, found variables called nothing",
    ),
    "labels of an unknown version": (
        lambda r: patch(r / LABELS, 124, b"\x00\x09"),
        ValueError,
        LABELS,
        NO_MATLAB,
    ),
    "class numbers in one of two files": (
        with_labels(np.arange(120)[:, None]),
        ValueError,
        f"{LABELS}[labels]",
        "equally many classes, found [1, 101]",
    ),
    "labels are a cell array": (
        with_labels(np.array([[1], [2.0]], object)),
        ValueError,
        f"{LABELS}[labels]",
        "a matrix of numbers, found a cell array",
    ),
    "labels are a struct": (
        with_labels({"y": onehot()}),
        ValueError,
        f"{LABELS}[labels]",
        "a matrix of numbers, found a struct",
    ),
    "labels are complex": (
        with_labels(onehot() * 1j),
        ValueError,
        f"{LABELS}[labels]",
        "a matrix of numbers, found complex128 of shape (120, 101)",
    ),
    "labels are an empty array": (
        with_labels(np.zeros((0, 101))),
        ValueError,
        f"{LABELS}[labels]",
        "a matrix of numbers, found float64 of shape (0, 101)",
    ),
    "labels are text": (
        with_labels(["walk", "swim"]),
        ValueError,
        f"{LABELS}[labels]",
        "a matrix of numbers, found text",
    ),
}


@pytest.mark.parametrize("spoil, error, where, message", FAULTS.values(), ids=list(FAULTS))
def test_bad_video_files(root, spoil, error, where, message):
    load("ucf101", root)  # sound before
    spoil(root)
    with pytest.raises(error) as found:
        load("ucf101", root)
    assert where in str(found.value) and message in str(found.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_holes_in_videos_are_found_when_read(root, bad):
    x = features()
    x[77, 3, 2] = bad
    rewrite(root / FEATS, x)
    data = load("ucf101", root)
    message = r"ucf_train_feats.h5\[feats\]: expected finite numbers .*, found (nan|inf) in row 77"
    with pytest.raises(ValueError, match=message):
        to_tensor(data.train.frames)
    with pytest.raises(ValueError, match=message):
        data.train.frames[[3, 77]]
    data.train.frames[:77]  # the rest can be read


@pytest.mark.filterwarnings("error:overflow")
@pytest.mark.parametrize("large, found", [(-3e38, "3e+38"), (2e15, "2e+15"), (1e300, "inf")])
def test_numbers_that_would_overflow_are_found_when_read(root, large, found):
    "Their squares are infinite: training would end with a message on something else."
    x = features().astype(float)
    x[77, 3, 2] = large
    rewrite(root / FEATS, x)
    message = (
        rf"feats.h5\[feats\]: expected finite numbers of at most 1e\+15, found {re.escape(found)} in row 77"
    )
    with pytest.raises(ValueError, match=message):
        to_tensor(load("ucf101", root).train.frames)
    if abs(large) < 1e100:
        with pytest.raises(ValueError, match="mine: frames: expected finite numbers of at most"):
            Split({"frames": x.astype(np.float32)}, None, "mine")


def matlab(path, matlab_class, array, **attributes):
    "A variable as MATLAB writes it to a v7.3 file: an array, or a group where `array` is a dictionary."
    with h5py.File(path, "w", userblock_size=512) as f:
        made = f.create_group("labels") if isinstance(array, dict) else f.create_dataset("labels", data=array)
        for name, part in array.items() if isinstance(array, dict) else ():
            made[name] = part
        made.attrs["MATLAB_class"] = np.bytes_(matlab_class)
        made.attrs.update(attributes)


def sparse_parts(x):
    x = scipy.sparse.csc_array(x)
    return {"data": x.data, "ir": x.indices.astype(np.uint64), "jc": x.indptr.astype(np.uint64)}


@pytest.mark.parametrize(
    "write, found",
    [
        (lambda p: matlab(p, "cell", np.full((2, 120), h5py.Reference(), h5py.ref_dtype)), "a cell array"),
        (lambda p: matlab(p, "struct", {"y": onehot().T}), "a struct"),
        (lambda p: matlab(p, "char", np.full((4, 120), 97, np.uint16), MATLAB_int_decode=2), "text"),
        (lambda p: matlab(p, "double", np.uint64([0, 101]), MATLAB_empty=1), "an empty array"),
        (lambda p: matlab(p, "table", np.zeros((1, 6), np.uint32)), "a variable of class table"),
    ],
    ids=["cell", "struct", "text", "empty", "table"],
)
def test_kinds_of_variables_in_a_v73_file(root, write, found):
    "Some of them are numbers in the file; nobody would see from the result that they are no labels."
    write(root / LABELS)
    with pytest.raises(ValueError) as error:
        load("ucf101", root)
    assert f"{LABELS}[labels]: expected a matrix of numbers, found {found}" in str(error.value)


def test_damaged_sparse_matrix(root):
    matlab(root / LABELS, "double", {"ir": np.uint64([0])}, MATLAB_sparse=np.uint64(120))
    with pytest.raises(
        ValueError, match=r"labels.mat\[labels\]: expected all parts of a sparse matrix, found"
    ):
        load("ucf101", root)


FORMS = {  # of the same labels
    "-1 and 1": lambda path, y: scipy.io.savemat(path, {"labels": 2.0 * y - 1}),
    "sparse": lambda path, y: scipy.io.savemat(path, {"labels": scipy.sparse.csc_matrix(y)}),
    "sparse, v7.3": lambda path, y: matlab(path, "double", sparse_parts(y), MATLAB_sparse=np.uint64(len(y))),
    "a column": lambda path, y: scipy.io.savemat(path, {"labels": y.argmax(1)[:, None] + 1}),
    "a row": lambda path, y: scipy.io.savemat(path, {"labels": y.argmax(1) + 1}),
    "a column, v7.3": lambda path, y: v73(path, y.argmax(1)[:, None] + 1.0),
    "classes renamed": lambda path, y: scipy.io.savemat(path, {"labels": 7 * y.argmax(1)[:, None] - 9}),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_labels_of_one_meaning_are_read(root, form):
    data = load("ucf101", root)
    for part, split in (("train", data.train), ("test", data.query)):
        form(root / f"ucf_{part}_labels.mat", onehot()[split.labels])
    read = load("ucf101", root)
    np.testing.assert_array_equal(read.train.labels, data.train.labels)
    np.testing.assert_array_equal(read.query.labels, data.query.labels)
    assert (read.n_classes, read.fingerprint) == (data.n_classes, data.fingerprint)


@pytest.mark.parametrize("values", [(0, 1), (-1, 1), (1, 1)])
def test_a_column_of_two_meanings_is_refused(root, values):
    for part, n in (("train", 120), ("test", 40)):
        column = np.where(np.arange(n) % 2, *values)[:, None]
        scipy.io.savemat(root / f"ucf_{part}_labels.mat", {"labels": column})
    with pytest.raises(ValueError, match=r"ucf_test_labels.mat\[labels\]: expected class numbers from 1, or"):
        load("ucf101", root)


def test_label_widths_must_agree(tmp_path):
    write_official(tmp_path, "activitynet", synthetic_like("activitynet", n=(30, 50, 20), d=8))
    scipy.io.savemat(tmp_path / "q_label.mat", {"q_label": onehot(20, 199)})
    message = (
        r"re_label.mat\[re_label\], .*q_label.mat\[q_label\]: expected equally many classes, found \[200"
    )
    with pytest.raises(ValueError, match=message):
        load("activitynet", tmp_path)


def test_v73_labels_multi_hot_and_a_video_without_class(root):
    y = onehot()
    y[5, 7], y[6] = 1, 0  # video 5 has two classes, video 6 none
    v73(root / LABELS, y)
    data = load("ucf101", root)
    assert data.query.labels.shape == (40, 101) and data.query.labels.dtype == np.uint8
    np.testing.assert_array_equal(data.train.labels, y)
    told = {f"{LABELS}: 1 videos {what}" for what in ("without a class", "with several classes")}
    assert told <= set(data.notes)


def test_old_matlab_files_are_read(root):
    scipy.io.savemat(root / LABELS, {"labels": onehot()}, format="4")
    np.testing.assert_array_equal(load("ucf101", root).train.labels, onehot().argmax(1))


D4096, D2048 = (f"feature width d: {d} in the paper" for d in (4096, 2048))
OTHER_SIZES = [  # name, videos, width, notes
    (
        "ucf101",
        (9537, 9537, 40),
        8,
        ["ucf_test_feats.h5: videos: 3783 in the paper, 40 here", f"{D4096}, 8 here"],
    ),
    (
        "activitynet",
        (9722, 20, 1000),
        2,
        ["test_feats.h5: videos: 3758 in the paper, 20 here", f"{D2048}, 2 here"],
    ),
    ("hmdb51", (3570, 3570, 1530), 1, [f"{D4096}, 1 here"]),
]


@pytest.mark.parametrize("name, n, d, told", OTHER_SIZES)
def test_other_sizes_than_the_papers_are_told(tmp_path, name, n, d, told):
    write_official(tmp_path, name, synthetic_like(name, n=n, d=d))
    with pytest.warns(UserWarning) as warned:
        data = load(name, tmp_path)
    assert list(data.notes) == told
    message = f"{tmp_path}: not the sizes of {name} in the paper: {'; '.join(told)}"
    assert [str(w.message) for w in warned] == [message]


def test_protocol_is_enforced_on_writing(tmp_path):
    with pytest.raises(ValueError, match="ucf101: database: expected the protocol's splits to be the same"):
        write_official(tmp_path, "ucf101", synthetic_like("fcvid", n=(30, 20, 20), d=8))


def test_lazy_features_pickle_and_read_in_small_blocks(root, monkeypatch):
    x = pickle.loads(pickle.dumps(load("ucf101", root).train.frames))
    lengths, read = [], HDF5Rows.read

    def logged(self, start, stop, device="cpu"):
        lengths.append(stop - start)
        return read(self, start, stop, device)

    whole = rows.row_blocks
    monkeypatch.setattr(HDF5Rows, "read", logged)
    monkeypatch.setattr(rows, "row_blocks", lambda x: whole(x, block_bytes=10 * 25 * 8 * 4))
    np.testing.assert_array_equal(to_tensor(x).numpy(), synthetic_like("ucf101", **SMALL).train.frames[:])
    assert max(lengths) == 10


def test_a_file_that_was_written_since_is_refused(root):
    x, out = load("ucf101", root).train.frames, np.empty((2, 25, 8), np.float32)
    rewrite(root / FEATS, features())
    for read in (lambda: x[:3], lambda: x.leading(4), lambda: x.read_into(np.arange(2), out)):
        with pytest.raises(ValueError, match="expected the file as it was when it was first read"):
            read()


def test_half_precision_files_are_read_as_float32(root):
    rewrite(root / FEATS, features().astype(np.float16))
    assert load("ucf101", root).train.frames[:2].dtype == np.float32


# Files of pairs


def matrices(path):
    "The nine matrices of a file of either format, (n, width) each."
    if h5py.is_hdf5(path):
        with h5py.File(path) as f:
            return {k: v[()].T for k, v in f.items()}
    return {k: v for k, v in scipy.io.loadmat(path).items() if k[0] != "_"}


def change(root, **changes):
    "Change matrices of the file, in its own format: each value is a function of the matrix; None removes it."
    path = root / PAIRS
    lazy, found = h5py.is_hdf5(path), matrices(path)
    for key, function in changes.items():
        found[key] = None if function is None else function(found[key])
    found = {k: v for k, v in found.items() if v is not None}
    if not lazy:
        scipy.io.savemat(path, found)
        return
    with h5py.File(path, "w", userblock_size=512) as f:
        for key, x in found.items():
            f[key] = np.ascontiguousarray(x.T)


def hole(x):
    return x + np.where(np.arange(len(x)) == 33, np.nan, 0)[:, None]


def every(letters, function):
    return {f"{part}_{role}": function for part in letters for role in ("tr", "db", "te")}


def query_from_database(root):
    "Database pair 7 takes the place of query 3."
    found = matrices(root / PAIRS)
    change(root, **{f"{p}_te": lambda x, p=p: np.r_[x[:3], found[f"{p}_db"][7:8], x[4:]] for p in "ITL"})


def changing(**changes):
    return lambda root: change(root, **changes)


PAIR_FAULTS = {
    "no file": (with_file(PAIRS, os.remove), FileNotFoundError, f"{PAIRS}, here or in mirflickr25k/"),
    "key missing": (
        changing(T_db=None),
        ValueError,
        f"{PAIRS}: expected matrices called I_tr, I_db, I_te",
    ),
    "one matrix transposed": (
        changing(I_db=np.transpose),
        ValueError,
        "[I_db, T_db, L_db]: expected equally many rows (is a matrix transposed",
    ),
    "a modality too short": (
        changing(T_te=lambda x: x[:-1]),
        ValueError,
        "[I_te, T_te, L_te]: expected equally many rows",
    ),
    "labels too short": (
        changing(L_tr=lambda x: x[:-1]),
        ValueError,
        "found (200, 64), (200, 40), (199, 24)",
    ),
    "widths differ": (
        changing(T_te=lambda x: x[:, :-1]),
        ValueError,
        "[T_tr, T_db, T_te]: expected equally many columns",
    ),
    "label columns differ": (
        changing(L_te=lambda x: x[:, :-1]),
        ValueError,
        "[L_tr, L_db, L_te]: expected equally many columns",
    ),
    "labels are counts": (
        changing(L_db=lambda x: 2 * x),
        ValueError,
        f"{PAIRS}[L_db]: expected only 0 and 1, or only -1 and 1, found values such as [2",
    ),
    "labels are -1, 0 and 1": (
        changing(L_db=lambda x: 2.0 * x - 1 + (np.arange(len(x)) == 3)[:, None]),
        ValueError,
        "expected only 0 and 1, or only -1 and 1, found values such as [-1",
    ),
    "one label": (
        changing(**every("L", lambda x: x[:, :1])),
        ValueError,
        f"{PAIRS}[L_te]: expected class numbers from 1, or a column for each class, found",
    ),
    "labels are NaN": (
        changing(L_te=lambda x: hole(x.astype(float))),
        ValueError,
        f"{PAIRS}[L_te]: expected",
    ),
    "text is a cell": (changing(T_te=lambda x: np.full(x.shape, b"x")), ValueError, f"{PAIRS}[T_te]"),
    "a query from the database": (
        query_from_database,
        ValueError,
        "expected items that aren't in mir_cnn_twt.mat, database, "
        "found 1 of 50 that are, such as query 3 = item 7",
    ),
    "empty queries": (
        changing(**{f"{part}_te": lambda x: x[:0] for part in "ITL"}),
        ValueError,
        "(0, 64)",
    ),
    "truncated": (lambda r: os.truncate(r / PAIRS, (r / PAIRS).stat().st_size // 2), ValueError, PAIRS),
    "cut to its head": (lambda r: os.truncate(r / PAIRS, 700), ValueError, PAIRS),
    "not MATLAB": (lambda r: (r / PAIRS).write_bytes(TEXT), ValueError, f"{PAIRS}: expected {NO_MATLAB}"),
    "empty file": (lambda r: (r / PAIRS).write_bytes(b""), ValueError, f"{PAIRS}: expected {NO_MATLAB}"),
}


@pytest.mark.parametrize("spoil, error, message", PAIR_FAULTS.values(), ids=list(PAIR_FAULTS))
def test_bad_pair_files(pairs_root, spoil, error, message):
    load("mirflickr25k", pairs_root)  # sound before
    spoil(pairs_root)
    with pytest.raises(error) as found:
        load("mirflickr25k", pairs_root)
    assert message in str(found.value)


@pytest.mark.parametrize("version, where", [("7.3", f"{PAIRS}[I_db]"), ("5", f"{PAIRS}, database: image")])
def test_holes_in_pairs_are_found_when_read(tmp_path, version, where):
    write_official_pairs(tmp_path, "mirflickr25k", synthetic_pairs("mirflickr25k", di=100), version)
    at = (np.arange(400) == 333)[:, None] & (np.arange(100) == 99)
    change(tmp_path, I_db=lambda x: x + np.where(at, np.inf, 0))
    with pytest.raises(ValueError) as found:
        load_official_pairs("mirflickr25k", tmp_path).database.image[300:340]
    assert f"{where}: expected finite numbers of at most 1e+15, found inf in row 333" in str(found.value)


@pytest.mark.parametrize("letters", ["I", "TL", "ITL"])
def test_whole_kinds_of_matrices_turned(pairs_root, letters):
    data = load_official_pairs("mirflickr25k", pairs_root)
    before, text = data.fingerprint, data.query.text[[3, 1]]
    change(pairs_root, **every(letters, np.transpose))
    turned = load_official_pairs("mirflickr25k", pairs_root)
    new = [note for note in turned.notes if note not in data.notes]
    assert [note.startswith("stored with items as columns and turned: ") for note in new] == [True]
    assert turned.fingerprint == before
    np.testing.assert_array_equal(turned.query.text[[3, 1]], text)


def test_other_numbers_and_doubles(pairs_root):
    for letter, kind in {"T": np.uint8, "I": float, "L": bool}.items():
        change(pairs_root, **every(letter, lambda x: x.astype(kind)))
    data, made = load_official_pairs("mirflickr25k", pairs_root), synthetic_pairs("mirflickr25k")
    assert data.database.text.dtype == data.database.image.dtype == np.float32
    assert data.database.labels.dtype == np.uint8
    np.testing.assert_array_equal(data.database.text[:], made.database.text)
    np.testing.assert_array_equal(data.train_ids, made.train_ids)


def test_training_set_elsewhere_is_noted(pairs_root):
    change(pairs_root, I_tr=lambda x: np.concatenate([x[:2] + 1, x[2:]]))
    data = load_official_pairs("mirflickr25k", pairs_root)
    assert data.train_ids is None
    assert "2 of 200 training pairs are not in the retrieval set" in data.notes


def test_rare_duplicates_are_noted(tmp_path):
    made = synthetic_pairs("mirflickr25k", n=(50, 200, 200))
    for what in ("image", "text", "labels"):
        getattr(made.query, what)[11] = getattr(made.database, what)[40]
    write_official_pairs(tmp_path, "mirflickr25k", made)
    notes = load_official_pairs("mirflickr25k", tmp_path).notes
    assert "1 of 200 queries are equal to a pair of the retrieval set" in notes


def test_sizes_of_table_1_are_noted(pairs_root):
    notes = load_official_pairs("mirflickr25k", pairs_root).notes
    told = {"train pairs: 5000 in the paper, 200 here", "image width: 4096 in the paper, 64 here"}
    assert told <= set(notes)
    assert not any(note.startswith("labels:") for note in notes)  # 24 here, too


def test_sparse_texts(tmp_path):
    made = synthetic_pairs("mirflickr25k")
    write_official_pairs(tmp_path, "mirflickr25k", made, "5")
    change(tmp_path, **every("T", scipy.sparse.csc_array))
    np.testing.assert_array_equal(load_official_pairs("mirflickr25k", tmp_path).query.text, made.query.text)


@pytest.mark.parametrize("turn", [False, True], ids=["columns", "rows"])
def test_class_numbers_of_pairs(pairs_root, turn):
    "One number for each pair; with other numbers the labels are the same."

    def numbered(factor, shift):
        def change_labels(x):
            y = factor * x.argmax(1)[:, None] + shift
            return y.T if turn else y

        return change_labels

    before = matrices(pairs_root / PAIRS)
    change(pairs_root, **every("L", numbered(1, 1)))
    first = load_official_pairs("mirflickr25k", pairs_root)
    for key in ("L_tr", "L_db", "L_te"):
        change(pairs_root, **{key: lambda _, key=key: numbered(-3, 100)(before[key])})
    second = load_official_pairs("mirflickr25k", pairs_root)
    same = [one.labels @ one.labels.T for one in (first.query, second.query)]
    np.testing.assert_array_equal(*same)
    assert first.n_classes == second.n_classes == len(np.unique(before["L_db"].argmax(1)))
    assert (first.query.labels.sum(1) == 1).all()


def test_labels_of_minus_one(pairs_root):
    before = load_official_pairs("mirflickr25k", pairs_root).database.labels
    change(pairs_root, **every("L", lambda x: 2.0 * x - 1))
    np.testing.assert_array_equal(load_official_pairs("mirflickr25k", pairs_root).database.labels, before)


def test_loading_reads_little(tmp_path, monkeypatch):
    made = synthetic_pairs("nuswide", n=(50, 400, 30), di=1024)
    write_official_pairs(tmp_path, "nuswide", made)
    read, part = [], HDF5Rows.part

    def logged(self, rows, columns=slice(None)):
        x = part(self, rows, columns)
        read.append((self.key, x.size))
        return x

    monkeypatch.setattr(HDF5Rows, "part", logged)
    data = load_official_pairs("nuswide", tmp_path)
    assert sum(n for key, n in read if key[0] == "I") == 64 * 480  # probes, and nothing else
    read.clear()
    data.database.image[10:14]
    assert read == [("I_db", 4 * 1024)]


def test_emoji_survives_the_papers_layout(tmp_path):
    data = emoji()
    write_official_pairs(tmp_path, "mirflickr25k", data, "5")
    back = load_official_pairs("mirflickr25k", tmp_path)
    for role, split in back.splits.items():
        for what in ("image", "text", "labels"):
            np.testing.assert_array_equal(getattr(split, what)[:], getattr(data.splits[role], what))


# The catalog

NO_SUCH_FILE = "nowhere: expected train_feats.h5, here or in activitynet/"


@pytest.mark.parametrize(
    "name, root, error, message",
    [
        ("spoken-digit", None, ValueError, "did you mean 'spoken-digits'"),
        ("nuswid", None, ValueError, "did you mean 'nuswide'"),
        (
            "UCF-101",
            None,
            ValueError,
            "dataset: expected one of spoken-digits, spoken-pairs, moving-digits, animated-emoji",
        ),
        ("", None, ValueError, "dataset: expected one of"),
        (None, None, ValueError, "dataset: expected one of"),
        ("hmdb51", None, ValueError, "data_root: expected the folder that holds hmdb_train_feats.h5"),
        ("nuswide", None, ValueError, "data_root: expected the folder that holds nus_cnn_twt.mat"),
        ("activitynet", "nowhere", FileNotFoundError, NO_SUCH_FILE),
    ],
)
def test_sets_that_cannot_be_loaded(name, root, error, message):
    with pytest.raises(error) as found:
        load(name, root)
    assert message in str(found.value)


def test_folders_below_the_data_root(tmp_path):
    folders = {"hmdb": "hmdb51", "fcvid": "fcvid", ".": "ucf101"}  # the release's, the set's, the root itself
    for folder, name in folders.items():
        n = (60, 60, 20) if name != "fcvid" else (60, 20, 20)
        write_official(tmp_path / folder, name, synthetic_like(name, n=n, d=4))
    write_official_pairs(tmp_path / "mscoco", "mscoco", synthetic_pairs("mscoco"))
    assert available("videos", tmp_path) == ["ucf101", "hmdb51", "fcvid"]
    assert available("pairs", str(tmp_path)) == ["mscoco"]
    assert load("hmdb51", tmp_path).folder == tmp_path / "hmdb"
    assert load("hmdb51", tmp_path).fingerprint == load("hmdb51", tmp_path / "hmdb").fingerprint
    assert load("mscoco", tmp_path).folder == tmp_path / "mscoco"


def test_a_home_folder_in_paths(root, monkeypatch):
    "Only a shell replaces ~, and not in `-p data_root=~/data` or in quotes."
    monkeypatch.setenv("HOME", str(root.parent))
    home = f"~/{root.name}"
    data = load("ucf101", home)
    assert data is load("ucf101", root) and data.folder == root
    assert load_official("ucf101", home).folder == root
    monkeypatch.setenv(DATA_ROOT, home)
    assert load("ucf101") is data and available("videos", None) == ["ucf101"]
    assert HDF5Rows(f"{home}/{FEATS}").path == root / FEATS
    write_official_pairs(f"{home}/pairs", "mirflickr25k", synthetic_pairs("mirflickr25k"))
    assert load_official_pairs("mirflickr25k", f"{home}/pairs").folder == root / "pairs"
    Image.new("RGB", (300, 260)).save(root / "black.png")
    assert torch.equal(vgg_input(f"{home}/black.png"), vgg_input(root / "black.png"))
    with pytest.raises(ValueError, match=f"{root}/clone: expected a git clone"):
        get_asl_words(f"{home}/made", f"{home}/clone")
    assert (root / "made").is_dir() and not (root / "made" / "asl_words.npz").exists()


def test_nothing_available(tmp_path):
    message = "data_root .*: expected a folder with .* mirflickr25k, nuswide, mscoco, found none"
    with pytest.raises(ValueError, match=message):
        available("pairs", tmp_path)
    with pytest.raises(
        ValueError, match="data_root None: expected a folder with the files of at least one of ucf101"
    ):
        available("videos", None)


def test_the_same_files_are_loaded_once(root):
    data = load("ucf101", root)
    assert load("ucf101", str(root)) is data and load("emoji") is load("emoji", root)
    before = data.fingerprint
    write_official(root, "ucf101", synthetic_like("ucf101", **SMALL, seed=1))
    assert load("ucf101", root).fingerprint != before
    (root / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=LABELS):
        load("ucf101", root)


def test_rows_of_the_catalog():
    for name, entry in CATALOG.items():
        assert entry.kind in ("videos", "pairs") and entry.summary
        assert entry.source in ("bundled", "one command", "own", "files", "random numbers")
        assert bool(entry.files) == (entry.source in ("one command", "own", "files"))
        if entry.source == "bundled":
            data = load(name)
            assert (data.name, data.kind) == (name, entry.kind)
    assert CATALOG["ucf101"].files == (FEATS, LABELS, "ucf_test_feats.h5", "ucf_test_labels.mat")


# Pinned: another split, another rounding or another order of draws is other data and must not pass unnoticed
FINGERPRINTS = {
    "spoken-digits": "736f2b3773978628",
    "spoken-pairs": "0784d4f1b39c1521",
    "moving-digits": "fb2d95a9bd943647",
    "animated-emoji": "f7b01ba5928fa56a",
    "emoji": "b52df5e4190f01d5",
    "spoken-long-which:100": "bc5c98349f0e64e4",
    "spoken-long-which:400": "ff17574acbd93bda",
    "spoken-long-which:1000": "6128807ba73d4e8a",
    "spoken-long-which:4000": "106e3a303b146938",
    "spoken-long-order:100": "bedc040f9fb1911f",
    "spoken-long-order:400": "4787b74709c72352",
    "spoken-long-order:1000": "be366a55bdd8c11e",
    "spoken-long-order:4000": "a9c95472a1508598",
    "synthetic-like:ucf101": "recipe-72475477f38727d5",
    "synthetic-like:hmdb51": "recipe-10baa8bbf2d3fbe3",
    "synthetic-like:fcvid": "recipe-165ae8e84df96172",
    "synthetic-like:activitynet": "recipe-494bebcd7e7f29ae",
    "synthetic:classes=20+order=0.5+noise=2+redundancy=0.8": "0ec4c06aba51f4bb",
    "synthetic:classes=50+order=1+noise=5+redundancy=0": "a356b73f2eabb6d2",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_are_the_same_everywhere(name):
    assert load(name).fingerprint == FINGERPRINTS[name]


def test_animated_emoji():
    "No drawing is on both sides, whatever its skin tone and gender; every class has queries and an answer."
    data, names = load("animated-emoji"), animated_emoji_names()
    assert np.array_equal(np.sort([*data.train.ids, *data.query.ids]), np.arange(1513))
    assert not set(data.train.groups) & set(data.query.groups)
    plain = {}
    for split in (data.train, data.query):
        for i, group in zip(split.ids, split.groups):
            plain.setdefault(
                re.sub(r"(: |, )[\w-]+ skin tone|^(wo)?m[ae]n |^person ", "", names[i]), set()
            ).add(group)
    mixed = {name: groups for name, groups in plain.items() if len(groups) > 1}
    assert not mixed, mixed
    for split in (data.train, data.query):
        assert set(split.labels) == set(range(19))
    sheet = np.stack([emoji_filmstrip(i) for i in range(1513)])
    assert sheet.shape == (1513, 32, 128, 3) and (sheet.std((1, 2, 3)) > 5).all()
    tones = [i for i, name in enumerate(names) if name.startswith("woman running:")]
    assert len(tones) == 5 and all(np.array_equal(sheet[i], sheet[tones[0]]) for i in tones)


class MadeOn(RowStore):
    "The numbers of a synthetic set, made on a device; without its recipe, so that a fingerprint reads them."

    def __init__(self, frames, device):
        self.frames, self.shape = frames, frames.shape
        self.device = device

    def read(self, start, stop, device="cpu"):
        return self.frames.read(start, stop, self.device).to(device)


def fingerprint_on(name, device):
    "The fingerprint of the numbers themselves, as the training benchmark's records have it."
    data = load(f"synthetic-like:{name}")
    made = {
        s: dataclasses.replace(s, inputs={"frames": MadeOn(s.frames, device)})
        for s in (data.train, data.query)
    }
    train = made[data.train]
    return dataclasses.replace(data, train=train, database=train, query=made[data.query]).fingerprint


def test_numbers_of_a_synthetic_set():
    assert fingerprint_on("hmdb51", "cpu") == "sampled-edfdede71b65026b"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_numbers_of_a_synthetic_set_on_a_gpu():
    assert fingerprint_on("ucf101", "cuda") == "sampled-9ae578b08b98f7fa"


def test_large_data_has_a_sampled_fingerprint(root, monkeypatch):
    data = load("ucf101", root)
    whole = data.fingerprint
    assert len(whole) == 16 and int(whole, 16) >= 0
    monkeypatch.setattr(splits, "_CONTENT_LIMIT", 1000)
    sampled = dataclasses.replace(data).fingerprint
    assert sampled.startswith("sampled-") and sampled != f"sampled-{whole}"


# What the sets are like


def test_no_recording_or_handwriting_on_both_sides():
    for name in ("spoken-digits", "moving-digits"):
        data = load(name)
        database, query = ({x.tobytes() for x in split.frames} for split in (data.database, data.query))
        assert not database & query


@pytest.mark.parametrize("kind", ["which", "order"])
def test_long_sequences_hold_recordings_of_their_own_split(kind):
    "Each place is silent or holds one of the split's recordings, of a digit of the class."
    recordings = {role: split for role, split in load("spoken-digits").splits.items() if role != "database"}
    data = load(f"spoken-long-{kind}:1000")
    for role, split in recordings.items():
        digit_of = {x.tobytes(): y for x, y in zip(split.frames, split.labels)}
        places = getattr(data, role).frames.reshape(-1, 40, 25, 13)
        for x, y in zip(places[::7], getattr(data, role).labels[::7]):
            said = [digit_of.get(place.tobytes()) for place in x]
            assert all((np.abs(place) < 0.1).all() for place, a in zip(x, said) if a is None)
            spoken = [str(a) for a in said if a is not None]
            wanted = data.classes[y].replace(", then", " and").split(" and ")
            if kind == "order":
                assert spoken == wanted and said[3:] == [None] * 37
            else:
                assert all(sorted({*map(str, said[i : i + 4])} - {"None"}) == wanted for i in range(0, 40, 4))


def test_emoji_protocol():
    data = emoji()
    assert not set(data.query.ids) & set(data.database.ids)
    assert not set(data.query.groups) & set(data.database.groups)
    np.testing.assert_array_equal(data.database.ids[data.train_ids], data.train.ids)
    assert emoji().fingerprint == data.fingerprint


def test_synthetic_shapes_cost_nothing_until_read():
    start = time.process_time()
    data = synthetic_like("fcvid")
    assert data.query.frames.shape == (45600, 25, 4096) and data.database is data.query
    assert time.process_time() - start < 2
    assert "never for quality" in data.origin


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_synthetic_is_made_on_the_gpu():
    x = synthetic_like("ucf101", **SMALL).train.frames
    on_gpu = to_tensor(x, "cuda", torch.bfloat16)
    assert on_gpu.is_cuda and torch.equal(on_gpu, to_tensor(x, "cuda", torch.bfloat16))
    assert abs(on_gpu.float().std().item() - 2**0.5) < 0.1  # unit centers plus unit noise


# Splits and datasets put together by hand


def test_splits_that_do_not_belong_together():
    x, y = features(6), np.arange(6)
    train = Split({"frames": x}, y, "a")
    six = tuple("abcdef")

    def dataset(query, classes=six):
        return Dataset("toy", train, train, query, classes, "")

    with pytest.raises(ValueError, match="b: labels: expected labels to judge retrieval by"):
        dataset(Split({"frames": x}, None, "b"))
    with pytest.raises(ValueError, match="a: labels: expected 5 classes, found 0..5"):
        dataset(train, six[:5])
    with pytest.raises(ValueError, match="b: labels: expected the form of a"):
        dataset(Split({"frames": x}, np.eye(6, dtype=np.uint8), "b"))
    with pytest.raises(ValueError, match="float32, found float64"):
        Split({"frames": x.astype(float)}, y, "a")
    with pytest.raises(ValueError, match="int64 or"):
        Split({"frames": x}, y.astype(np.int32), "a")


def test_videos_without_labels_can_be_searched_for():
    x = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    all_videos, some = Split({"frames": x}, None, "all"), Split({"frames": x[[4, 2]]}, None, "some")
    np.testing.assert_array_equal(splits.find_items(some, all_videos), [4, 2])


ONE = np.ones((2, 3), np.float32)
LABEL = np.ones((2, 2), np.uint8)


@pytest.mark.parametrize(
    "parts, message",
    [
        (([[1.0], [2.0]], ONE, LABEL), "mine: image: expected an array or a row store, found list"),
        ((ONE, ONE[:, 0], LABEL), "mine: text: expected rank 2 (n, width)"),
        ((ONE, ONE.T, LABEL), "mine: text: expected 2 rows, one for each item, found 3"),
        ((ONE, ONE.astype(float), LABEL), "mine: text: expected float32, found float64"),
        (
            (ONE, ONE * np.nan, LABEL),
            "mine: text: expected finite numbers of at most 1e+15, found nan",
        ),
        ((ONE, ONE, [[1], [0]]), "mine: labels: expected an array or None, found list"),
        (
            (ONE, ONE, np.ones((2, 1), np.int64)),
            "mine: labels: expected (n,) int64 or (n, classes) uint8, found (2, 1)",
        ),
        ((ONE, ONE, np.full((2, 1), 2, np.uint8)), "mine: labels: expected only 0 and 1, found the value 2"),
        ((ONE, ONE, LABEL[:, :1]), "mine: labels: expected class numbers from 1, or a column for each class"),
    ],
)
def test_bad_parts(parts, message):
    "What a user puts together by hand."
    inputs = dict(zip(("image", "text"), parts))
    with pytest.raises(ValueError) as found:
        Split(inputs, parts[2], "mine")
    assert message in str(found.value)


def test_videos_are_no_pairs():
    videos = Split({"frames": np.ones((2, 3, 4), np.float32)}, None, "my videos")
    message = r"my videos: inputs: expected \('image', 'text'\), found \('frames',\)"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(emoji(), query=videos)
    with pytest.raises(ValueError, match="emoji: a part: expected a Split, found ndarray"):
        dataclasses.replace(emoji(), query=ONE)


@pytest.mark.parametrize(
    "first, message",
    [
        (799, "train_ids: expected rows of the database, 0..1597, found 799..1598"),
        (-1, "train_ids: expected rows of the database, 0..1597, found -1..798"),
        (0, "train_ids: expected the rows of the database that are the training items"),
    ],
)
def test_bad_training_rows(first, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(emoji(), train_ids=np.arange(800) + first)


def test_labels_that_judge_nothing():
    data, y = emoji(), np.zeros((300, 33), np.uint8)
    message = "emoji.npz: labels: expected a class that the database has too, to judge by, found none"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(data, query=dataclasses.replace(data.query, labels=y))


# Features of captions and image files


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: write_official_pairs("unused", "nuswide", emoji(), "7"),
            "version: expected '7.3' or '5', found '7'",
        ),
        (lambda: group_split(np.arange(10), 0), "n_query: expected"),
        (lambda: group_split(np.arange(10), 10), "n_query: expected"),
        (lambda: group_split([], 1), "groups: expected one group for each item, (n,), found shape (0,)"),
        (
            lambda: group_split(np.zeros((9, 2)), 3),
            "groups: expected one group for each item, (n,), found shape (9, 2)",
        ),
        (lambda: bag_of_words([]), "captions: expected a sequence of texts"),
        (lambda: bag_of_words(None), "captions: expected a sequence of texts, found None"),
        (
            lambda: bag_of_words(["the", "of a"]),
            "captions, vocabulary: expected at least one word, each once, found: empty vocabulary",
        ),
        (
            lambda: bag_of_words(["a dog"], ["dog", "dog"]),
            "captions, vocabulary: expected at least one word, each once, found: Duplicate",
        ),
        (lambda: bag_of_words(["a dog"], "dog"), "vocabulary: expected a sequence of texts, found 'dog'"),
        (lambda: bag_of_words(["a dog"], size=0), "size: expected at least 1 word, found 0"),
        (lambda: hashed_words("a text"), "captions: expected a sequence of texts"),
        (lambda: hashed_words(["a text"], 0), "size: expected at least 1 column, found 0"),
        (lambda: vgg_features([]), "paths: expected a sequence of image files, found []"),
        (lambda: vgg_features("a.jpg"), "paths: expected a sequence of image files, found 'a.jpg'"),
        (lambda: vgg_input("missing.jpg"), "missing.jpg: expected an image file, found nothing there"),
        (lambda: synthetic_pairs("nuswid"), "(did you mean 'nuswide'?)"),
        (
            lambda: load_official_pairs("coco", "unused"),
            "dataset: expected one of mirflickr25k, nuswide, mscoco, found 'coco'",
        ),
        (
            lambda: synthetic_like("ucf101", n=(100, 200, 50)),
            "n: expected equal sizes where splits of ucf101 are the same videos",
        ),
        (lambda: synthetic_like("ucf101", n=(100, 50)), "n: expected three sizes"),
        (lambda: synthetic_like("ucf101", n=(0, 0, 50)), "n: expected three sizes"),
        (
            lambda: Difficulty(20.5, 0.5, 2, 0),
            "classes: expected 2 to 120, the orders of the scenes, found 20.5",
        ),
        (lambda: Difficulty(20, 1 / 3, 2, 0), "order: expected at most six digits and no exponent"),
        (lambda: Difficulty(20, 0.5, 1e-5, 0), "noise: expected at most six digits and no exponent"),
        (lambda: Difficulty(20, 0.5, 1e6, 0), "as in the name of the set, found 1000000.0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, FileNotFoundError)) as found:
        call()
    assert message in str(found.value)


def test_a_made_up_set_has_the_numbers_of_its_name():
    for i in range(1000):
        made = Difficulty(2 + i % 119, i / 1000, 7 * i / 1000, i / 1000)
        assert difficulty_of(made.name) == made


def test_captions_of_a_table():
    "A column with numbers of its own, as a filter leaves it."
    column = pd.Series(["a dog", "two cats", "a cat"], [3, 5, 9])
    x, vocabulary = bag_of_words(column)
    assert vocabulary == ("cat", "cats", "dog") and x.tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert hashed_words(column, 64).sum() == 3
    with pytest.raises(ValueError, match=r"captions\[1\]: expected a text, found (None|nan)"):
        bag_of_words(column.where(column != "two cats", None))


def tiny_vgg16(weights=None):
    "A stand-in with the structure of torchvision's VGG-16, and narrow layers."
    if weights is not None:
        raise OSError("no network")
    net = nn.Module()
    net.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    net.avgpool = nn.AdaptiveAvgPool2d(7)
    widths = (4 * 49, 16, 12, 10)
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Dropout()) for a, b in zip(widths, widths[1:])]
    net.classifier = nn.Sequential(*[module for layer in layers for module in layer][:-2])
    return net


@pytest.fixture
def torchvision(monkeypatch):
    "A stand-in for torchvision, which need not be installed here."
    models = types.ModuleType("torchvision.models")
    models.vgg16 = tiny_vgg16
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


def test_vgg_features(torchvision, tmp_path):
    torch.manual_seed(0)
    net = tiny_vgg16()
    torch.save(net.state_dict(), tmp_path / "vgg.pth")
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("RGB", (300 + 10 * i, 260), (50 * i, 0, 200)).save(path)
    found = vgg_features(paths, tmp_path / "vgg.pth", device="cpu", batch=2)
    assert found.shape == (5, 12) and found.dtype == np.float32
    assert found.min() >= 0  # after the rectifier of fc7
    x = torch.stack([vgg_input(path) for path in paths])
    hidden = net.classifier[0](net.avgpool(net.features(x)).flatten(1)).relu()
    np.testing.assert_allclose(found, net.classifier[3](hidden).relu().detach(), rtol=1e-5, atol=1e-6)


def half_and_half(levels):
    "A picture whose left half is dark, (240, 320) numbers of two levels."
    return np.repeat(np.array([levels], levels.dtype), 160, axis=1)[[0] * 240]


def test_sixteen_bits_are_the_same_picture(tmp_path):
    Image.fromarray(half_and_half(np.uint8([40, 200]))).save(tmp_path / "8.png")
    Image.fromarray(half_and_half(np.uint16([40 * 257, 200 * 257 + 256]))).save(tmp_path / "16.png")
    with Image.open(tmp_path / "16.png") as image:
        assert image.mode.startswith("I;16")
    assert torch.equal(vgg_input(tmp_path / "16.png"), vgg_input(tmp_path / "8.png"))


@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_pictures_are_turned_as_the_camera_was(tmp_path, orientation, turns):
    "A phone stores its sensor's rows and notes how it was held."
    stored = half_and_half(np.uint8([40, 200]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "phone.png", exif=exif)
    Image.fromarray(np.ascontiguousarray(np.rot90(stored, turns))).save(tmp_path / "seen.png")
    assert torch.equal(vgg_input(tmp_path / "phone.png"), vgg_input(tmp_path / "seen.png"))


def test_pictures_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(half_and_half(np.float32([0.1, 0.9]))).save(tmp_path / "depth.tiff")
    with pytest.raises(
        ValueError, match="depth.tiff: expected 8 or 16 bits a colour.*, found pillow's mode F"
    ):
        vgg_input(tmp_path / "depth.tiff")


def test_a_picture_that_is_cut(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 20_000)
    with pytest.raises(ValueError, match="cut.png: expected an image file, found: "):
        vgg_input(tmp_path / "cut.png")


def test_vgg_weights_that_cannot_be_had(torchvision, tmp_path):
    said = "weights: expected a name that torchvision can download .* found 'IMAGENET1K_V1': no network"
    with pytest.raises(ValueError, match=said):
        vgg_fc7()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="wrong.pth"):
        vgg_fc7(tmp_path / "wrong.pth")


def test_no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="torchvision: expected one that fits torch"):
        vgg_fc7()
