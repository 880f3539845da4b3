"""Baselines: bit order against faiss and `codes`, lazy features, blocks, seeds, bad input."""
import faiss, numpy as np, pytest, torch

from s5vh_nb import baselines
from s5vh_nb.baselines import PAIR_METHODS, fit_baseline, fit_lsh, fit_matrix, fit_pair_baseline, itq_rotation
from s5vh_nb.codes import pack
from s5vh_nb.datasets import synthetic_like
from s5vh_nb.multimodal import PairSplit, synthetic_pairs

RNG = np.random.default_rng(0)
VIDEOS = RNG.normal(size=(120, 6, 5)).astype(np.float32)
FITS = [(method, view, bits) for method in ("lsh", "itq") for view in ("mean", "flat") for bits in (8, 64)] # 5 or 30 numbers, lifted at 64

@pytest.mark.parametrize("method, view, bits", FITS)
def test_same_seed_same_codes_and_another_seed_others(method, view, bits):
    codes = [fit_baseline(method, VIDEOS, bits, view, seed=seed).encode(VIDEOS[:20]) for seed in (0, 0, 1)]
    assert codes[0].shape == (20, bits//8) and codes[0].dtype == np.uint8
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()

def test_codes_have_packbits_order_and_faiss_has_the_other():
    bits = 16
    index = faiss.IndexLSH(30, bits, True)              # its directions come from the same generator, set to our seed
    index.rrot.init(7)
    hasher = fit_baseline("lsh", VIDEOS, bits, "flat", seed=7)
    x = VIDEOS.reshape(120, -1) - hasher.mean
    theirs = np.unpackbits(index.sa_encode(x), axis=1, bitorder="little")
    ours = hasher.encode(VIDEOS)
    np.testing.assert_array_equal(np.unpackbits(ours, axis=1), theirs)
    np.testing.assert_array_equal(ours, pack(torch.from_numpy(x @ hasher.directions)).numpy())

def test_names_tell_what_was_done():
    names = [fit_baseline(*args).name for args in (("lsh", VIDEOS, 64, "mean"), ("itq", VIDEOS, 64, "mean"), ("itq", VIDEOS, 8, "flat"))]
    assert names == ["LSH, time mean", "ITQ (Nystroem-lifted), time mean", "ITQ, flattened"]
    assert fit_baseline("itq", VIDEOS[:, 0], 64, "flat").name == "ITQ (Nystroem-lifted)"       # vectors have no view

def test_order_matters_flat_and_not_in_the_mean():
    for view, same in (("mean", True), ("flat", False)):
        hasher = fit_baseline("lsh", VIDEOS, 64, view)
        differ = np.unpackbits(hasher.encode(VIDEOS) ^ hasher.encode(VIDEOS[:, ::-1]), axis=1).mean()
        assert (differ < 0.001) == same

@pytest.mark.parametrize("method, view, bits", FITS)
def test_lazy_features_and_tensors_give_the_codes_of_arrays(method, view, bits):
    lazy = synthetic_like("ucf101", n=(120, 120, 30), d=6).train.features
    array = lazy[:]
    expected = fit_baseline(method, array, bits, view).encode(array)
    for features in lazy, torch.from_numpy(array):
        np.testing.assert_array_equal(fit_baseline(method, features, bits, view).encode(features), expected)

def test_small_blocks_change_nothing(monkeypatch):
    hasher = fit_baseline("itq", VIDEOS, 8, "flat")
    expected = hasher.encode(VIDEOS)
    monkeypatch.setattr(baselines, "row_blocks", lambda x: [slice(i, i + 7) for i in range(0, len(x), 7)])
    np.testing.assert_array_equal(fit_baseline("itq", VIDEOS, 8, "flat").encode(VIDEOS), expected)

def test_a_fit_sees_a_random_part_of_what_is_too_large(monkeypatch):
    monkeypatch.setattr(baselines, "FIT_NUMBERS", 30*40)
    some, other = (fit_matrix(VIDEOS, "flat", seed) for seed in (0, 1))
    assert some.shape == (40, 30) and (some != other).any()
    rows = {row.tobytes() for row in VIDEOS.reshape(120, -1)}
    assert len({row.tobytes() for row in some} & rows) == 40                                   # 40 different training rows

def test_the_fit_leaves_its_input_alone():
    before = VIDEOS.copy()
    for method, view, bits in FITS: fit_baseline(method, VIDEOS, bits, view)
    np.testing.assert_array_equal(VIDEOS, before)

def test_itq_finds_the_rotation_of_a_cubes_corners():
    corners = np.where(RNG.random((500, 4)) < 0.5, 1., -1.)
    hidden = itq_rotation(corners, seed=9, steps=0)                                            # a random rotation
    losses = []
    for seed in range(5):
        p = corners @ hidden @ itq_rotation(corners @ hidden, seed)
        losses.append(((np.where(p > 0, 1, -1) - p)**2).sum(1).mean())
    assert min(losses) < 1e-12                                              # local minima exist; some start finds the corners

def test_no_step_of_itq_raises_the_loss():
    v = VIDEOS.reshape(120, -1)
    projections = [v @ itq_rotation(v, 0, steps) for steps in range(12)]
    losses = [((np.where(p > 0, 1, -1) - p)**2).sum(1).mean() for p in projections]
    assert (np.diff(losses) <= 1e-6).all() and losses[-1] < losses[0] - 0.1

def test_lsh_works_beyond_the_width():
    _, directions = fit_lsh(VIDEOS.mean(1), 64, 0)
    assert directions.shape == (5, 64) and len(np.unique(np.abs(directions), axis=1).T) == 64

@pytest.mark.parametrize("arguments, message", [
    (dict(method="pq"), "method: expected 'itq' or 'lsh', found 'pq'"),
    (dict(view="max"), "view: expected one of"),
    (dict(bits=12), "bits: expected a positive multiple of 8, found 12"),
    (dict(bits=0), "bits: expected a positive multiple of 8, found 0"),
    (dict(bits="8"), "bits: expected a positive multiple of 8, found '8'"),
    (dict(train=VIDEOS[:5]), "train: expected at least 8 videos, found 5"),
    (dict(train=VIDEOS[:0], method="lsh"), "train: expected at least 1 videos, found 0"),
    (dict(train=VIDEOS[:, 0]), "train: expected features"),
    (dict(train=np.where(VIDEOS > 2, np.nan, VIDEOS)), "features: expected finite numbers"),
])
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message): fit_baseline(**{**dict(method="itq", train=VIDEOS, bits=8), **arguments})

@pytest.mark.parametrize("x, message", [
    (VIDEOS[:, :5], "features: expected videos of shape"),
    (VIDEOS[:0], "features: expected at least one video"),
    (VIDEOS[:3]*np.inf, "features: expected finite numbers"),
])
def test_bad_queries_are_named(x, message):
    with pytest.raises(ValueError, match=message): fit_baseline("itq", VIDEOS, 8, "flat").encode(x)

PAIRS = synthetic_pairs("mirflickr25k").train

def part(n=None, text=PAIRS.text): return PairSplit(PAIRS.image[:n], text[:n], PAIRS.labels[:n], "random pairs")

@pytest.mark.parametrize("arguments, message", [
    (dict(method="pca"), "method: expected one of itq, lsh, cca-itq, supervised, found 'pca'"),
    (dict(bits=12), "bits: expected a positive multiple of 8, found 12"),
    (dict(bits=16.), "bits: expected a positive multiple of 8, found 16.0"),
    (dict(bits=48), "bits: expected at most 40 for cca-itq"),
    (dict(train=part(8), bits=8), "bits: expected at most as many as each modality has independent directions"), # centred, 8 pairs span 7
    (dict(train=part(text=np.zeros_like(PAIRS.text)), bits=8),
     "bits: expected at most as many as each modality has independent directions"),
])
def test_bad_pairs_are_named(arguments, message):
    with pytest.raises(ValueError) as found: fit_pair_baseline(**{**dict(method="cca-itq", train=part(), bits=16), **arguments})
    assert message in str(found.value)

@pytest.mark.parametrize("method", PAIR_METHODS)
def test_bad_pair_queries_are_named(method):
    hasher = fit_pair_baseline(method, part(), 16)
    assert hasher.encode(*PAIRS.inputs).shape == (200, 2)
    for queries, message in (((PAIRS.image[:0], PAIRS.text[:0]), "features: expected at least one pair, found none"),
                             ((PAIRS.image, PAIRS.text[:5]), "features: expected as many texts as images"),
                             ((PAIRS.text, PAIRS.image), "features: expected as many texts as images, of widths"),
                             ((PAIRS.image, PAIRS.text*np.nan), "features: expected finite numbers")):
        with pytest.raises(ValueError, match=message): hasher.encode(*queries)
