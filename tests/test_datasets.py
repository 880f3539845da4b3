"Datasets: bad files and bad arguments, each with an error that says where, what was expected and what was found."
import os, pickle, time

import h5py, numpy as np, pytest, scipy.io, scipy.sparse, torch

from s5vh_nb import datasets
from s5vh_nb.datasets import LazyFeatures, Split, VideoDataset, load, synthetic_like, to_tensor, write_official

pytestmark = pytest.mark.filterwarnings("ignore:.*not the sizes of:UserWarning") # most sets here are small

FEATS, LABELS = "ucf_train_feats.h5", "ucf_train_labels.mat"

@pytest.fixture
def root(tmp_path):
    "A small UCF101 in the official layout."
    write_official(tmp_path, "ucf101", synthetic_like("ucf101", n=(120, 120, 40), d=8))
    return tmp_path

def rewrite(path, array, key="feats"):
    with h5py.File(path, "w") as f: f[key] = array

def dangle(path, key="feats"):
    with h5py.File(path, "w") as f: f[key] = h5py.SoftLink("/elsewhere")

def features(n=120, t=25, d=8): return np.ones((n, t, d), np.float32)
def onehot(n=120, classes=101): return np.eye(classes)[np.arange(n) % classes]

def v73(path, array, key="labels"): # as MATLAB writes it: transposed, after a block of its own
    with h5py.File(path, "w", userblock_size=512) as f: f[key] = array.T

def patch(path, at, what):
    with open(path, "r+b") as f: f.seek(at); f.write(what)

def with_labels(x): return lambda root: scipy.io.savemat(root/LABELS, {"labels": x})

# What is done to the files, the error, what it must name
FAULTS = {
    "features missing": (lambda r: (r/FEATS).unlink(), FileNotFoundError, FEATS, "no such file"),
    "query features missing": (lambda r: (r/"ucf_test_feats.h5").unlink(), FileNotFoundError, "ucf_test_feats.h5", "nothing there"),
    "labels missing": (lambda r: (r/LABELS).unlink(), FileNotFoundError, LABELS, "nothing there"),
    "key missing": (lambda r: rewrite(r/FEATS, features(), "features"), ValueError, FEATS, "key 'feats', found the keys ['features']"),
    "label key missing": (lambda r: scipy.io.savemat(r/LABELS, {"label": onehot()}), ValueError, LABELS, "found the keys ['label']"),
    "key is a folder": (lambda r: rewrite(r/FEATS, features(), "feats/x"), ValueError, FEATS, "key 'feats', found the keys []"),
    "key without a shape": (lambda r: rewrite(r/FEATS, h5py.Empty("f4")), ValueError, FEATS, "key 'feats', found the keys []"),
    "link that leads nowhere": (lambda r: dangle(r/FEATS), ValueError, FEATS, "key 'feats', found the keys []"),
    "rank 2": (lambda r: rewrite(r/FEATS, features()[0]), ValueError, FEATS, "rank 3 (n, t, d), found shape (25, 8)"),
    "integers": (lambda r: rewrite(r/FEATS, features().astype(int)), ValueError, FEATS, "floating-point numbers, found int64"),
    "empty split": (lambda r: rewrite(r/FEATS, features(n=0)), ValueError, FEATS, "at least one video, frame and feature"),
    "t differs": (lambda r: rewrite(r/FEATS, features(t=30)), ValueError, "(t, d)",
                  "expected (30, 8) as in ucf_train_feats.h5, found (25, 8)"),
    "d differs": (lambda r: rewrite(r/FEATS, features(d=9)), ValueError, "(t, d)",
                  "expected (25, 9) as in ucf_train_feats.h5, found (25, 8)"),
    "labels too short": (with_labels(onehot(119)), ValueError, FEATS, "expected 120 rows, one for each video, found 119"),
    "labels transposed": (with_labels(onehot().T), ValueError, LABELS, "equally many classes, found [120, 101]"),
    "labels of rank 3": (with_labels(onehot()[None]), ValueError, LABELS, "rank 2 (n, classes)"),
    "labels are counts": (with_labels(3*onehot()), ValueError, LABELS, "only 0 and 1, found values such as [3"),
    "labels are NaN": (with_labels(onehot()*np.nan), ValueError, LABELS, "only 0 and 1, found values such as [nan]"),
    "not HDF5": (lambda r: (r/FEATS).write_text("no such thing"), ValueError, FEATS, "a complete HDF5 file, found: "),
    "empty file": (lambda r: (r/FEATS).write_bytes(b""), ValueError, FEATS, "a complete HDF5 file, found: "),
    "not MATLAB": (lambda r: (r/LABELS).write_text("no such thing at all " * 20), ValueError, LABELS,
                   "a MATLAB file (v5 or v7.3), found: "),
    "labels truncated": (lambda r: os.truncate(r/LABELS, 500), ValueError, LABELS, "a MATLAB file (v5 or v7.3), found: "),
    "labels truncated, v7.3": (lambda r: (v73(r/LABELS, onehot()), os.truncate(r/LABELS, 5000)), ValueError, LABELS,
                               "a complete HDF5 file, found: "),
    "labels that lead nowhere, v7.3": (lambda r: dangle(r/LABELS, "labels"), ValueError, LABELS, "the key 'labels', found the keys []"),
    "labels without a shape, v7.3": (lambda r: rewrite(r/LABELS, h5py.Empty("u1"), "labels"), ValueError, LABELS,
                                     "the key 'labels', found the keys []"),
    "labels of an unknown version": (lambda r: patch(r/LABELS, 124, b"\x00\x09"), ValueError, LABELS,
                                     "a MATLAB file (v5 or v7.3), found: "),
    "labels are class numbers": (with_labels(np.arange(120)[:, None]), ValueError, LABELS, "only 0 and 1, found values such as [2]"),
    "labels are -1 and 1": (with_labels(2*onehot() - 1), ValueError, LABELS, "only 0 and 1, found values such as [-1.]"),
    "labels are text": (with_labels(["walk", "swim"]), ValueError, LABELS, "rank 2 (n, classes), found shape (2,)"),
    "labels are sparse": (with_labels(scipy.sparse.csc_matrix(onehot())), ValueError, LABELS, "rank 2 (n, classes), found shape ()"),
}

@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files(root, fault):
    load("ucf101", root)                                    # sound before
    spoil, error, *parts = FAULTS[fault]
    spoil(root)
    with pytest.raises(error) as found: load("ucf101", root)
    for part in parts: assert part in str(found.value)

@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_holes_are_found_when_read(root, bad):
    x = features(); x[77, 3, 2] = bad
    rewrite(root/FEATS, x)
    data = load("ucf101", root)
    message = r"ucf_train_feats.h5\[feats\]: features: expected finite numbers, found NaN or infinity in video 77"
    with pytest.raises(ValueError, match=message): to_tensor(data.train.features)
    with pytest.raises(ValueError, match=message): data.train.features[[3, 77]]
    data.train.features[:77]                                # the rest can be read

@pytest.mark.parametrize("name, root, error, message", [
    ("spoken-digit", None, ValueError, "did you mean 'spoken-digits'"),
    ("UCF-101", None, ValueError, "dataset: expected one of spoken-digits, spoken-pairs, moving-digits, ucf101, hmdb51"),
    ("", None, ValueError, "dataset: expected one of"),
    (None, None, ValueError, "dataset: expected one of"),
    ("hmdb51", None, ValueError, "root: expected the folder that holds hmdb_train_feats.h5"),
    ("activitynet", "nowhere", FileNotFoundError, "nowhere: expected train_feats.h5, here or in activitynet/")])
def test_bad_arguments(name, root, error, message):
    with pytest.raises(error) as found: load(name, root)
    assert message in str(found.value)

def test_splits_that_do_not_belong_together():
    x, y = features(6), np.arange(6)
    a = Split(x, y, "a")
    with pytest.raises(ValueError, match="b: labels: expected labels to judge retrieval by"):
        VideoDataset("toy", a, a, Split(x, None, "b"), 6, "")
    with pytest.raises(ValueError, match="a: labels: expected 5 classes, found 0..5"): VideoDataset("toy", a, a, a, 5, "")
    with pytest.raises(ValueError, match="b: labels: expected the form of a"):
        VideoDataset("toy", a, a, Split(x, np.eye(6, dtype=np.uint8), "b"), 6, "")
    with pytest.raises(ValueError, match="float32, found float64"): Split(x.astype(float), y, "a")
    with pytest.raises(ValueError, match="int64 or"): Split(x, y.astype(np.int32), "a")

def test_label_widths_must_agree(tmp_path):
    write_official(tmp_path, "activitynet", synthetic_like("activitynet", n=(30, 50, 20), d=8))
    scipy.io.savemat(tmp_path/"q_label.mat", {"q_label": onehot(20, 199)})
    with pytest.raises(ValueError, match=r"re_label.mat, q_label.mat: expected equally many classes, found \[200, 199\]"):
        load("activitynet", tmp_path)

def test_v73_labels_multi_hot_and_a_video_without_class(root):
    y = onehot(); y[5, 7], y[6] = 1, 0                      # video 5 has two classes, video 6 none
    v73(root/LABELS, y)
    data = load("ucf101", root)
    assert data.query.labels.shape == (40, 101) and data.query.labels.dtype == np.uint8
    np.testing.assert_array_equal(data.train.labels, y)
    assert {f"ucf_train_labels.mat: 1 videos {what}" for what in ("without a class", "with several classes")} <= set(data.notes)

def test_old_matlab_files_are_read(root):
    scipy.io.savemat(root/LABELS, {"labels": onehot()}, format="4")
    np.testing.assert_array_equal(load("ucf101", root).train.labels, onehot().argmax(1))

@pytest.mark.parametrize("name, n, d, told", [
    ("ucf101", (9537, 9537, 40), 8,
     ["ucf_test_feats.h5: videos: 3783 in the paper, 40 here", "feature width d: 4096 in the paper, 8 here"]),
    ("activitynet", (9722, 20, 1000), 2,
     ["test_feats.h5: videos: 3758 in the paper, 20 here", "feature width d: 2048 in the paper, 2 here"]),
    ("hmdb51", (3570, 3570, 1530), 1, ["feature width d: 4096 in the paper, 1 here"])])
def test_other_sizes_than_the_papers_are_told(tmp_path, name, n, d, told):
    write_official(tmp_path, name, synthetic_like(name, n=n, d=d))
    with pytest.warns(UserWarning) as warned: data = load(name, tmp_path)
    assert list(data.notes) == told
    assert [str(w.message) for w in warned] == [f"{tmp_path}: not the sizes of {name} in the paper: {'; '.join(told)}"]

def test_release_folder_names(tmp_path):
    write_official(tmp_path/"ucf", "ucf101", synthetic_like("ucf101", n=(120, 120, 40), d=8))
    assert load("ucf101", tmp_path).fingerprint == load("ucf101", tmp_path/"ucf").fingerprint

def test_protocol_is_enforced_on_writing(tmp_path):
    with pytest.raises(ValueError, match="ucf101: database: expected the protocol's splits to be the same object"):
        write_official(tmp_path, "ucf101", synthetic_like("fcvid", n=(30, 20, 20), d=8))

def test_lazy_features_pickle_and_read_in_small_blocks(root, monkeypatch):
    data = load("ucf101", root)
    x = pickle.loads(pickle.dumps(data.train.features))
    largest, read = [], LazyFeatures.read
    monkeypatch.setattr(LazyFeatures, "read", lambda self, a, b, device="cpu": largest.append(b - a) or read(self, a, b, device))
    whole = datasets.row_blocks
    monkeypatch.setattr(datasets, "row_blocks", lambda features: whole(features, block_bytes=10*25*8*4))
    np.testing.assert_array_equal(to_tensor(x).numpy(), synthetic_like("ucf101", n=(120, 120, 40), d=8).train.features[:])
    assert max(largest) == 10

def test_half_precision_files_are_read_as_float32(root):
    rewrite(root/FEATS, features().astype(np.float16))
    assert load("ucf101", root).train.features[:2].dtype == np.float32

def test_large_data_has_a_sampled_fingerprint(root, monkeypatch):
    whole = load("ucf101", root).fingerprint
    assert len(whole) == 16 and int(whole, 16) >= 0
    monkeypatch.setattr(datasets, "CONTENT_LIMIT", 1000)
    sampled = load("ucf101", root).fingerprint
    assert sampled.startswith("sampled-") and sampled != f"sampled-{whole}"

# Pinned: another split, another rounding or another order of draws is other data and must not pass unnoticed
@pytest.mark.parametrize("name, fingerprint", [
    ("spoken-digits", "736f2b3773978628"), ("spoken-pairs", "0784d4f1b39c1521"), ("moving-digits", "fb2d95a9bd943647"),
    ("synthetic-like:fcvid", "recipe-165ae8e84df96172")])
def test_fingerprints_are_the_same_everywhere(name, fingerprint):
    assert load(name).fingerprint == fingerprint

def test_no_recording_or_handwriting_on_both_sides():
    for name in ("spoken-digits", "moving-digits"):
        data = load(name)
        train, query = ({row.tobytes() for row in s.features} for s in (data.database, data.query))
        assert not train & query

def test_synthetic_shapes_cost_nothing_until_read():
    start = time.process_time()
    data = load("synthetic-like:fcvid")
    assert data.query.features.shape == (45600, 25, 4096) and data.database is data.query
    assert time.process_time() - start < 2
    assert "never for quality" in data.origin

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_synthetic_is_made_on_the_gpu():
    x = synthetic_like("ucf101", n=(120, 120, 40), d=8).train.features
    on_gpu = to_tensor(x, "cuda", torch.bfloat16)
    assert on_gpu.is_cuda and torch.equal(on_gpu, to_tensor(x, "cuda", torch.bfloat16))
    assert abs(on_gpu.float().std().item() - 2**.5) < .1    # unit centers plus unit noise

@pytest.mark.parametrize("n, said", [((100, 200, 50), "equal sizes where splits of ucf101 are the same videos"), ((100, 50), "three sizes"),
                                     ((0, 0, 50), "three sizes")])
def test_sizes_that_the_protocol_cannot_have(n, said):
    with pytest.raises(ValueError, match=f"n: expected {said}"): synthetic_like("ucf101", n=n)
