"Hash centers: properties over many sizes, threads and dtypes, centers from a file, faults."

import os
import warnings

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s5vh_nb.learning.admm import ADMM, improve_center, improve_center_reference, merit
from s5vh_nb.learning.centers import (
    balanced_bits,
    hadamard,
    hash_centers,
    quality,
    read_centers,
    semantic_targets,
    semantic_vectors,
    start_centers,
    sweep_centers,
    wanted_distance,
)

QUICK = ADMM(growth=2.0, inner=3)


def features(n=60, d=12, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def smallest(H):
    H = H.astype(int)
    return (H.shape[1] - (H @ H.T)[np.triu_indices(len(H), 1)].max()) // 2


def problem(c, k, init="hadamard", seed=0, n=200):
    "Start, wanted inner products and semantic vectors of a set."
    W, _ = semantic_vectors(features(n), c)
    return start_centers(c, k, init, np.random.default_rng(seed)), semantic_targets(W, k), W


@settings(max_examples=25, deadline=None)
@given(
    c=st.integers(2, 40),
    k=st.sampled_from([7, 8, 12, 16, 24, 36, 56]),
    init=st.sampled_from(["hadamard", "random"]),
    semantic=st.booleans(),
    seed=st.integers(0, 5),
)
def test_any_size_gives_distinct_signs(c, k, init, semantic, seed):
    options = dict(init=init, semantic=semantic, seed=seed, admm=QUICK, progress=False)
    found = hash_centers(features(), c, k, **options)
    assert found.centers.dtype == np.int8 and found.centers.shape == (c, k)
    assert set(np.unique(found.centers)) <= {-1, 1}
    assert len(np.unique(found.centers, axis=0)) == c
    assert found.labels.dtype == np.int64 and sorted(set(found.labels)) == list(range(c))
    assert found.distance == smallest(found.centers) >= 1
    assert found.objective == pytest.approx(quality(found.centers, found.semantics))
    assert found.objective >= max(found.history[1:]) - 1e-9


@pytest.mark.parametrize("c,k", [(20, 16), (12, 24), (9, 6)])
def test_the_fast_solver_finds_the_center_of_the_reference(c, k):
    start, S, _ = problem(c, k, "random")
    for i in range(0, c, 3):
        arguments = start, i, S[i], k // 4
        options = dict(p=ADMM(growth=1.3, inner=4))
        fast = improve_center(*arguments, **options)
        assert np.array_equal(fast, improve_center_reference(*arguments, **options))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_that_work_ahead_find_the_set_of_one(threads):
    "More threads, even than cores, discard what a moved center spoils: the same centers and qualities."
    start, S, W = problem(20, 16)

    def swept(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return sweep_centers(start, S, W, wanted_distance(20, 16), p=QUICK, progress=False)
        finally:
            torch.set_num_threads(before)

    (alone, history), (found, other) = swept(1), swept(threads)
    assert np.array_equal(alone, found) and history == other and not np.array_equal(alone, start)


@pytest.mark.parametrize("c,k", [(20, 16), (33, 16), (40, 24)])
def test_a_center_never_gets_worse_and_keeps_its_distance(c, k):
    H, S, _ = problem(c, k)
    distance = wanted_distance(c, k)
    for i in range(c):
        others = np.delete(H, i, 0), np.delete(S[i], i), float(k - 2 * distance)
        new = improve_center(H, i, S[i], distance, p=QUICK)
        assert merit(new, *others, 1.0) <= merit(H[i], *others, 1.0)
        H[i] = new
    assert smallest(balanced_bits(H, S, distance)) >= min(distance, smallest(H))


def test_every_flip_raises_the_quality():
    H, S, W = problem(15, 16, "random", seed=1, n=60)
    even = balanced_bits(H, S, 1)
    assert quality(even, W) > quality(H, W) and np.abs(even.sum(0)).max() == 1  # c is odd
    assert (balanced_bits(even, S, 1) == even).all()


def test_semantics_lower_the_mismatch():
    x = features(300, 6)

    def mismatch(semantic):
        r = hash_centers(x, 24, 32, semantic=semantic, progress=False)
        H = r.centers.astype(float)
        return np.abs(H @ H.T / H.shape[1] - r.semantics @ r.semantics.T).mean()

    assert mismatch(True) < 0.8 * mismatch(False)


def test_sweeps_stop():
    H, S, W = problem(6, 8, n=60)
    best, history = sweep_centers(H, S, W, wanted_distance(6, 8), progress=False)
    assert len(history) <= 20 and quality(best, W) == max(history)
    assert len(sweep_centers(H, S, W, 2, progress=False, sweeps=1)[1]) == 1


def test_what_may_be_passed():
    x = features().astype(np.float32)
    kinds = x, torch.from_numpy(x), np.stack([x, x], 1)
    alike = [hash_centers(v, 7, 16, seed=3, progress=False) for v in kinds]
    assert all((r.centers == alike[0].centers).all() for r in alike)
    assert all((r.labels == alike[0].labels).all() for r in alike)
    assert (hash_centers(x, 7, 16, seed=4, progress=False).labels != alike[0].labels).any()
    assert x.flags.owndata and (x == features().astype(np.float32)).all()  # left alone


def test_all_samples_their_own_center():
    found = hash_centers(features(16), 16, 8, progress=False)
    assert sorted(found.labels) == list(range(16))


def test_hadamard_leaves_out_the_orders_that_it_says():
    left = [k for k in range(8, 257, 8) if not len(hadamard(k))]
    assert 56 in left
    for k in left:
        assert (start_centers(4, k, "hadamard", np.random.default_rng(0)).sum(1) == 0).all()
    for k in set(range(8, 257, 8)) - set(left):
        assert (hadamard(k) @ hadamard(k).T == k * np.eye(k)).all()


def rows(n=100, k=16):
    return start_centers(n, k, "random", np.random.default_rng(0))


@pytest.mark.parametrize("c, k", [(100, 16), (101, 64), (200, 32)])
def test_given_centers_are_used_in_the_order_that_agrees_best(c, k):
    made = hash_centers(features(500), c, k, seed=1, progress=False, admm=QUICK)
    given = np.random.default_rng(0).permutation(made.centers)
    options = dict(seed=1, given=given, progress=False)
    found = hash_centers(features(500), c, k, semantic=False, **options)
    wanted = semantic_targets(made.semantics, k)

    def mismatch(H):
        return ((H.astype(float) @ H.T - wanted) ** 2)[~np.eye(c, dtype=bool)].mean()

    assert found.centers.dtype == np.int8
    assert (np.unique(found.centers, axis=0) == np.unique(given, axis=0)).all()
    assert mismatch(found.centers) < 0.6 * mismatch(given) + 0.4 * mismatch(made.centers)
    assert (found.labels == made.labels).all() and len(found.history) == 1
    assert found.objective == pytest.approx(quality(given, made.semantics))
    assert (hash_centers(features(500), c, k, **options).centers == found.centers).all()


@pytest.mark.parametrize("dtype", ["int8", "int64", "float32", "float64"])
def test_centers_from_a_file(tmp_path, dtype):
    with h5py.File(tmp_path / "hash_center_16.h5", "w") as f:
        f["matrix"] = rows().astype(dtype)
    found = read_centers(tmp_path / "hash_center_16.h5", 100, 16)
    assert found.dtype == np.int8 and (found == rows()).all()


MATRIX = "hash_center_16.h5[matrix]"
NO_SIGNS = f"{MATRIX}: expected only -1 and +1, found values such as ["
CENTER_FAULTS = {  # fault -> the file's content and the message
    "transposed": (
        {"matrix": rows().T},
        f"{MATRIX}: expected shape (100, 16), 100 centers of 16 bits, found (16, 100)",
    ),
    "other c": ({"matrix": rows(99)}, "100 centers of 16 bits, found (99, 16)"),
    "other k": ({"matrix": rows(100, 32)}, "found (100, 32)"),
    "key missing": (
        {"centers": rows()},
        "hash_center_16.h5: expected the key 'matrix', found the keys ['centers']",
    ),
    "key is a folder": (
        {"matrix/x": rows()},
        "hash_center_16.h5: expected the key 'matrix', found the keys []",
    ),
    "a number": ({"matrix": 1.0}, "found ()"),
    "0 and 1": ({"matrix": rows() > 0}, f"{NO_SIGNS}False]"),
    "not binary": ({"matrix": 0.5 * rows()}, NO_SIGNS),
    "NaN": ({"matrix": np.where(rows() > 0, rows(), np.nan)}, f"{NO_SIGNS}nan]"),
    "infinite": ({"matrix": rows() * np.inf}, NO_SIGNS),
    "text": ({"matrix": np.full((100, 16), b"+1")}, f"{NO_SIGNS}b'+1']"),
    "alike": (
        {"matrix": np.concatenate([rows(98), rows(2)])},
        f"{MATRIX}: expected 100 distinct rows, found 98",
    ),
}


@pytest.mark.parametrize("fault", CENTER_FAULTS)
def test_bad_center_files(tmp_path, fault):
    content, message = CENTER_FAULTS[fault]
    with h5py.File(tmp_path / "hash_center_16.h5", "w") as f:
        for key, value in content.items():
            f[key] = value
    with pytest.raises(ValueError) as error:
        read_centers(tmp_path / "hash_center_16.h5", 100, 16)
    assert message in str(error.value)


def test_center_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "hash_center_16.h5"
    with pytest.raises(FileNotFoundError, match="hash_center_16.h5: expected a file, found nothing there"):
        read_centers(path, 100, 16)
    with h5py.File(path, "w") as f:
        f["matrix"] = rows()
    os.truncate(path, 5000)
    with pytest.raises(ValueError, match="hash_center_16.h5: expected a complete HDF5 file"):
        read_centers(path, 100, 16)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(given=rows(5, 24)), "given: expected shape (5, 16), 5 centers of 16 bits, found (5, 24)"),
        (dict(given=np.zeros((5, 16))), "given: expected only -1 and +1, found values such as [0.]"),
        (dict(given=np.ones((5, 16))), "given: expected 5 distinct rows, found 1"),
        (dict(bits=True), "bits: expected a positive whole number, found True"),
        (dict(bits=0), "bits: expected a positive whole number, found 0"),
        (dict(n_centers=1), "n_centers: expected 2 to 60, the number of samples, found 1"),
        (dict(n_centers=61), "n_centers: expected 2 to 60, the number of samples, found 61"),
        (
            dict(n_centers=257, bits=8, features=features(300)),
            "n_centers: expected at most 2^8, the number of codes, found 257",
        ),
        (
            dict(features=np.zeros((60, 3))),
            "n_centers: expected at most 1, the number of distinct samples, found 5",
        ),
        (
            dict(features=np.full((60, 3), np.inf)),
            "features: expected finite numbers, found 180 that are NaN or infinite",
        ),
        (dict(features=np.zeros(60)), "features: expected shape (n, d) or (n, t, d), found (60,)"),
        (dict(init="sylvester"), "init: expected one of hadamard, random, found 'sylvester'"),
    ],
)
def test_faults_are_named(change, message):
    with pytest.raises(ValueError) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        hash_centers(**(dict(features=features(), n_centers=5, bits=16) | change))
    assert message in str(error.value)
