"Image-text sets: bad files and bad arguments, reading little of large files, and the image network's plumbing."
import dataclasses, os, sys, types

import h5py, numpy as np, pandas as pd, pytest, scipy.io, scipy.sparse, torch
from PIL import Image
from torch import nn

from s5vh_nb import datasets, multimodal
from s5vh_nb.multimodal import (LazyMatrix, emoji, group_split, load_official_pairs, synthetic_pairs, vgg_features, vgg_fc7,
                                write_official_pairs)

FILE = "mir_cnn_twt.mat"

@pytest.fixture(params=["7.3", "5"])
def root(tmp_path, request):
    "A small MIR-Flickr25K in the official layout, in either format."
    write_official_pairs(tmp_path, "mirflickr25k", synthetic_pairs("mirflickr25k"), request.param)
    return tmp_path

def matrices(path):
    "The nine matrices of a file of either format, (n, width) each."
    if h5py.is_hdf5(path):
        with h5py.File(path) as f: return {k: v[()].T for k, v in f.items()}
    return {k: v for k, v in scipy.io.loadmat(path).items() if k[0] != "_"}

def rewrite(root, **changes):
    "Change matrices of the file, in its own format: each value is a function of the matrix; None removes it."
    path = root/FILE
    lazy, found = h5py.is_hdf5(path), matrices(path)
    for key, change in changes.items(): found[key] = None if change is None else change(found[key])
    found = {k: v for k, v in found.items() if v is not None}
    if not lazy: return scipy.io.savemat(path, found)
    with h5py.File(path, "w", userblock_size=512) as f:
        for key, x in found.items(): f[key] = np.ascontiguousarray(x.T)

def hole(x): return x + np.where(np.arange(len(x)) == 33, np.nan, 0)[:, None]
def every(letters, change): return {f"{m}_{r}": change for m in letters for r in ("tr", "db", "te")}
def from_database(key):
    "A change that puts database pair 7 in the place of query 3."
    return lambda root: (lambda x: np.concatenate([x[:3], matrices(root/FILE)[key.replace("te", "db")][7:8], x[4:]]))

FAULTS = {
    "no file": (lambda r: (r/FILE).unlink(), FileNotFoundError, f"{FILE}, here or in mirflickr25k/"),
    "key missing": (lambda r: rewrite(r, T_db=None), ValueError, f"{FILE}: expected the keys I_tr, I_db, I_te"),
    "one matrix transposed": (lambda r: rewrite(r, I_db=np.transpose), ValueError,
                              "[I_db, T_db, L_db]: expected equally many rows (is a matrix transposed"),
    "a modality too short": (lambda r: rewrite(r, T_te=lambda x: x[:-1]), ValueError, "[I_te, T_te, L_te]: expected equally many rows"),
    "labels too short": (lambda r: rewrite(r, L_tr=lambda x: x[:-1]), ValueError, "found (200, 64), (200, 40), (199, 24)"),
    "widths differ": (lambda r: rewrite(r, T_te=lambda x: x[:, :-1]), ValueError, "[T_tr, T_db, T_te]: expected equally many columns"),
    "label columns differ": (lambda r: rewrite(r, L_te=lambda x: x[:, :-1]), ValueError,
                             "[L_tr, L_db, L_te]: expected equally many columns"),
    "labels are counts": (lambda r: rewrite(r, L_db=lambda x: 2*x), ValueError,
                          f"{FILE}[L_db]: expected only 0 and 1, found values such as [2"),
    "labels are -1 and 1": (lambda r: rewrite(r, L_db=lambda x: 2.*x - 1), ValueError, "expected only 0 and 1, found values such as [-1"),
    "labels are NaN": (lambda r: rewrite(r, L_te=lambda x: hole(x.astype(float))), ValueError, f"{FILE}[L_te]: expected"),
    "text is a cell": (lambda r: rewrite(r, T_te=lambda x: np.full(x.shape, b"x")), ValueError, f"{FILE}[T_te]"),
    "a query from the database": (lambda r: rewrite(r, **{k: from_database(k)(r) for k in ("I_te", "T_te", "L_te")}), ValueError,
                                  "expected pairs that aren't in mir_cnn_twt.mat, database, "
                                  "found 1 of 50 that are, such as query 3 = pair 7"),
    "empty queries": (lambda r: rewrite(r, **{k: lambda x: x[:0] for k in ("I_te", "T_te", "L_te")}), ValueError,
                      "at least one pair and one feature"),
    "truncated": (lambda r: os.truncate(r/FILE, (r/FILE).stat().st_size//2), ValueError, FILE),
    "cut to its head": (lambda r: os.truncate(r/FILE, 700), ValueError, FILE),
    "not MATLAB": (lambda r: (r/FILE).write_text("no such thing at all " * 20), ValueError,
                   f"{FILE}: expected a MATLAB file (v5 or v7.3), found: "),
    "empty file": (lambda r: (r/FILE).write_bytes(b""), ValueError, f"{FILE}: expected a MATLAB file (v5 or v7.3), found: "),
}

@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files(root, fault):
    load_official_pairs("mirflickr25k", root)                # sound before
    spoil, error, message = FAULTS[fault]
    spoil(root)
    with pytest.raises(error) as found: load_official_pairs("mirflickr25k", root)
    assert message in str(found.value)

@pytest.mark.parametrize("version, where", [("7.3", f"{FILE}[I_db]"), ("5", f"{FILE}, database: image")])
def test_holes_are_found_when_read(tmp_path, version, where):
    write_official_pairs(tmp_path, "mirflickr25k", synthetic_pairs("mirflickr25k", di=100), version)
    rewrite(tmp_path, I_db=lambda x: x + np.where((np.arange(400) == 333)[:, None] & (np.arange(100) == 99), np.inf, 0))
    with pytest.raises(ValueError) as found: load_official_pairs("mirflickr25k", tmp_path).database.image[300:340]
    assert f"{where}: expected finite numbers, found NaN or infinity in pair 333" in str(found.value)

@pytest.mark.parametrize("letters", ["I", "TL", "ITL"])
def test_whole_modalities_turned(root, letters):
    data = load_official_pairs("mirflickr25k", root)
    before, text = data.fingerprint, data.query.text[[3, 1]]
    rewrite(root, **every(letters, np.transpose))
    turned = load_official_pairs("mirflickr25k", root)
    assert [note.startswith("stored with items as columns and turned: ") for note in turned.notes if note not in data.notes] == [True]
    assert turned.fingerprint == before
    np.testing.assert_array_equal(turned.query.text[[3, 1]], text)

def test_other_numbers_and_doubles(root):
    kinds = {"T": np.uint8, "I": float, "L": bool}
    for letter, kind in kinds.items(): rewrite(root, **every(letter, lambda x: x.astype(kind)))
    data, made = load_official_pairs("mirflickr25k", root), synthetic_pairs("mirflickr25k")
    assert data.database.text.dtype == data.database.image.dtype == np.float32 and data.database.labels.dtype == np.uint8
    np.testing.assert_array_equal(data.database.text[:], made.database.text)
    np.testing.assert_array_equal(data.train_ids, made.train_ids)

def test_training_set_elsewhere_is_noted(root):
    rewrite(root, I_tr=lambda x: np.concatenate([x[:2] + 1, x[2:]]))
    data = load_official_pairs("mirflickr25k", root)
    assert data.train_ids is None and "2 of 200 training pairs are not in the retrieval set" in data.notes

def test_rare_duplicates_are_noted(tmp_path):
    made = synthetic_pairs("mirflickr25k", n=(50, 200, 200))
    for what in ("image", "text", "labels"): getattr(made.query, what)[11] = getattr(made.database, what)[40]
    write_official_pairs(tmp_path, "mirflickr25k", made)
    assert "1 of 200 queries are equal to a pair of the retrieval set" in load_official_pairs("mirflickr25k", tmp_path).notes

def test_sizes_of_table_1_are_noted(root):
    notes = load_official_pairs("mirflickr25k", root).notes
    assert "train pairs: 5000 in the paper, 200 here" in notes and "image width: 4096 in the paper, 64 here" in notes
    assert not any(note.startswith("labels:") for note in notes)            # 24 here, too

def test_sparse_matrix_is_refused(tmp_path):
    write_official_pairs(tmp_path, "mirflickr25k", synthetic_pairs("mirflickr25k"), "5")
    rewrite(tmp_path, T_te=scipy.sparse.csc_array)
    with pytest.raises(ValueError, match=r"mir_cnn_twt.mat\[T_te\]: expected a dense matrix of numbers"):
        load_official_pairs("mirflickr25k", tmp_path)

def test_loading_reads_little(tmp_path, monkeypatch):
    made = synthetic_pairs("nuswide", n=(50, 400, 30), di=1024)
    write_official_pairs(tmp_path, "nuswide", made)
    read, part = [], LazyMatrix.part
    def counted(self, rows, columns): x = part(self, rows, columns); read.append((self.key, x.size)); return x
    monkeypatch.setattr(LazyMatrix, "part", counted)
    data = load_official_pairs("nuswide", tmp_path)
    assert sum(n for key, n in read if key[0] == "I") == 64*480            # probes, and nothing else
    read.clear()
    data.database.image[10:14]
    assert read == [("I_db", 4*1024)]

def test_emoji_survives_the_papers_layout(tmp_path):
    data = emoji()
    write_official_pairs(tmp_path, "mirflickr25k", data, "5")
    back = load_official_pairs("mirflickr25k", tmp_path)
    for role in ("train", "database", "query"):
        for what in ("image", "text", "labels"):
            np.testing.assert_array_equal(getattr(getattr(back, role), what)[:], getattr(getattr(data, role), what))

def test_emoji_protocol():
    data = emoji()
    assert not set(data.query.ids) & set(data.database.ids) and not set(data.query.groups) & set(data.database.groups)
    np.testing.assert_array_equal(data.database.ids[data.train_ids], data.train.ids)
    assert emoji().fingerprint == data.fingerprint

@pytest.mark.parametrize("call, message", [
    (lambda: load_official_pairs("nuswide", None), "root: expected the folder that holds nus_cnn_twt.mat"),
    (lambda: write_official_pairs("unused", "nuswide", None, "7"), "version: expected '7.3' or '5', found '7'"),
    (lambda: group_split(np.arange(10), 0), "n_query: expected"),
    (lambda: group_split(np.arange(10), 10), "n_query: expected"),
    (lambda: multimodal.bag_of_words([]), "captions: expected a sequence of texts"),
    (lambda: multimodal.bag_of_words(None), "captions: expected a sequence of texts, found None"),
    (lambda: multimodal.bag_of_words(["the", "of a"]),
     "captions, vocabulary: expected at least one word, each once, found: empty vocabulary"),
    (lambda: multimodal.bag_of_words(["a dog"], ["dog", "dog"]),
     "captions, vocabulary: expected at least one word, each once, found: Duplicate"),
    (lambda: multimodal.bag_of_words(["a dog"], "dog"), "vocabulary: expected a sequence of texts, found 'dog'"),
    (lambda: multimodal.bag_of_words(["a dog"], size=0), "size: expected at least 1 word, found 0"),
    (lambda: multimodal.hashed_words("a text"), "captions: expected a sequence of texts"),
    (lambda: multimodal.hashed_words(["a text"], 0), "size: expected at least 1 column, found 0"),
    (lambda: group_split([], 1), "groups: expected one group for each item, (n,), found shape (0,)"),
    (lambda: group_split(np.zeros((9, 2)), 3), "groups: expected one group for each item, (n,), found shape (9, 2)"),
    (lambda: vgg_features([]), "paths: expected a sequence of image files, found []"),
    (lambda: vgg_features("a.jpg"), "paths: expected a sequence of image files, found 'a.jpg'"),
    (lambda: synthetic_pairs("nuswid"), "(did you mean 'nuswide'?)"),
    (lambda: load_official_pairs("coco", "unused"), "dataset: expected one of mirflickr25k, nuswide, mscoco, found 'coco'"),
    (lambda: multimodal.vgg_input("missing.jpg"), "missing.jpg: expected an image file, found nothing there"),
])
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, FileNotFoundError)) as found: call()
    assert message in str(found.value)

ONE = np.ones((2, 3), np.float32)

@pytest.mark.parametrize("parts, message", [
    (([[1.], [2.]], ONE, np.ones((2, 1), np.uint8)), "mine: image: expected an array or a row store, found list"),
    ((ONE, ONE[:, 0], np.ones((2, 1), np.uint8)), "mine: text: expected rank 2 (n, width)"),
    ((ONE, ONE.T, np.ones((2, 1), np.uint8)), "mine: text: expected 2 rows, as many as images, found 3"),
    ((ONE, ONE.astype(float), np.ones((2, 1), np.uint8)), "mine: text: expected float32, found float64"),
    ((ONE, ONE*np.nan, np.ones((2, 1), np.uint8)), "mine: text: expected finite numbers, found NaN or infinity in pair 0"),
    ((ONE, ONE, [[1], [0]]), "mine: labels: expected an array (n, classes) uint8, found list"),
    ((ONE, ONE, np.ones((2, 1), np.int64)), "mine: labels: expected (n, classes) uint8, found shape (2, 1), int64"),
    ((ONE, ONE, np.full((2, 1), 2, np.uint8)), "mine: labels: expected only 0 and 1, found the value 2"),
])
def test_bad_parts(parts, message):
    "What a user puts together by hand."
    with pytest.raises(ValueError) as found: multimodal.PairSplit(*parts, "mine")
    assert message in str(found.value)

def test_videos_are_no_pairs():
    emoji = datasets.load("emoji")
    videos = datasets.Split(np.ones((2, 3, 4), np.float32), None, "my videos")
    with pytest.raises(ValueError, match="emoji: my videos: expected a PairSplit, found Split"): dataclasses.replace(emoji, query=videos)

@pytest.mark.parametrize("rows, message", [(np.arange(800) + 799, "train_ids: expected rows of the database, 0..1597, found 799..1598"),
                                           (np.arange(800) - 1, "train_ids: expected rows of the database, 0..1597, found -1..798"),
                                           (np.arange(800), "train_ids: expected the rows of the database that are the training pairs")])
def test_bad_training_rows(rows, message):
    with pytest.raises(ValueError, match=message): dataclasses.replace(emoji(), train_ids=rows)

def test_labels_that_judge_nothing():
    data, y = emoji(), np.zeros((300, 33), np.uint8)
    with pytest.raises(ValueError, match="emoji: labels: expected one that a query and a pair of the database have"):
        dataclasses.replace(data, query=dataclasses.replace(data.query, labels=y))

def test_captions_of_a_table():
    "A column with numbers of its own, as a filter leaves it."
    column = pd.Series(["a dog", "two cats", "a cat"], [3, 5, 9])
    x, vocabulary = multimodal.bag_of_words(column)
    assert vocabulary == ("cat", "cats", "dog") and x.tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert multimodal.hashed_words(column, 64).sum() == 3
    with pytest.raises(ValueError, match=r"captions\[1\]: expected a text, found (None|nan)"):
        multimodal.bag_of_words(column.where(column != "two cats", None))

def tiny_vgg16(weights=None):
    "A stand-in with the structure of torchvision's VGG-16, and narrow layers."
    if weights is not None: raise OSError("no network")
    net = nn.Module()
    net.features, net.avgpool = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), nn.AdaptiveAvgPool2d(7)
    net.classifier = nn.Sequential(nn.Linear(4*49, 16), nn.ReLU(), nn.Dropout(),
                                   nn.Linear(16, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 10))
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
    torch.save(net.state_dict(), tmp_path/"vgg.pth")
    paths = [tmp_path/f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths): Image.new("RGB", (300 + 10*i, 260), (50*i, 0, 200)).save(path)
    found = vgg_features(paths, tmp_path/"vgg.pth", device="cpu", batch=2)
    assert found.shape == (5, 12) and found.dtype == np.float32 and found.min() >= 0         # after the rectifier of fc7
    x = torch.stack([multimodal.vgg_input(path) for path in paths])
    hidden = net.classifier[0](net.avgpool(net.features(x)).flatten(1)).relu()
    np.testing.assert_allclose(found, net.classifier[3](hidden).relu().detach(), rtol=1e-5, atol=1e-6)

def test_vgg_weights_that_cannot_be_had(torchvision, tmp_path):
    said = "weights: expected a name that torchvision can download .* found 'IMAGENET1K_V1': no network"
    with pytest.raises(ValueError, match=said): vgg_fc7()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path/"wrong.pth")
    with pytest.raises(ValueError, match="wrong.pth"): vgg_fc7(tmp_path/"wrong.pth")

def test_no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="torchvision: expected one that fits torch"): vgg_fc7()

def test_load_finds_them_by_name(root):
    assert datasets.load("emoji").fingerprint == emoji().fingerprint
    assert len(datasets.load("mirflickr25k", root).query) == 50
    assert set(multimodal.LOADERS) <= set(datasets.LOADERS)
