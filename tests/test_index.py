"An index of codes, on this machine and on Milvus: exact answers, files, faults, and the commands."

import contextlib
import importlib.util
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s5vh_nb.basics.config import BaselineConfig, to_dict
from s5vh_nb.basics.files import only_run, write_text
from s5vh_nb.cli import command
from s5vh_nb.cli.command import main
from s5vh_nb.search import index as index_module
from s5vh_nb.search.hamming import hamming_distances, hamming_search
from s5vh_nb.search.index import EFFORTS, Found, HashIndex, as_table, check_ids, merge_found, recall_at
from s5vh_nb.search.milvus import MilvusIndex, open_index

with_milvus = pytest.mark.skipif(
    importlib.util.find_spec("pymilvus") is None or importlib.util.find_spec("milvus_lite") is None,
    reason="the extra milvus is not installed",
)


def random_codes(n, bits=16, seed=0):
    "Packed codes whose last bits are zero where `bits` is no multiple of 8."
    return np.packbits(np.random.default_rng(seed).integers(0, 2, (n, bits)), axis=1)


def by_definition(queries, codes, ids, top, radius, allowed):
    "As `search`, from the whole matrix of distances: sorted by distance, then by id."
    rows = np.flatnonzero(np.isin(ids, allowed))
    found = [np.full((len(queries), top), -1) for _ in range(2)]
    ties = np.zeros(len(queries), int)
    for i, distances in enumerate(hamming_distances(queries, codes[rows]) if len(rows) else ()):
        order = np.lexsort((ids[rows], distances))
        order = order[distances[order] <= radius][:top]
        found[0][i, : len(order)], found[1][i, : len(order)] = distances[order], ids[rows][order]
        ties[i] = (distances == distances[order[-1]]).sum() if len(order) else 0
    return Found(*found, ties)


def equal(one, other):
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def small():
    "An index of 300 codes of 16 bits with two fields, and its codes."
    codes, index = random_codes(300), HashIndex(16)
    index.add(codes, metadata={"path": [f"clip é {i}.mp4" for i in range(300)], "label": np.arange(300) % 3})
    return index, codes


@given(
    n=st.integers(1, 1500),
    bits=st.sampled_from([4, 8, 12, 16, 24, 32, 64, 72, 128]),
    top=st.integers(1, 40),
    radius=st.none() | st.integers(0, 80),
    seed=st.integers(0, 99),
    some=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_exact_search_is_its_definition(n, bits, top, radius, seed, some):
    "In any order of adding, with any filter; ids decide between ties."
    rng = np.random.default_rng(seed)
    codes, queries = random_codes(n, bits, seed), random_codes(5, bits, seed + 1)
    ids = rng.choice(10 * n, n, replace=False)
    index = HashIndex(bits)
    for part in np.array_split(np.arange(n), 3):
        if len(part):
            index.add(codes[part], ids[part])
    allowed = ids[rng.random(n) < 0.3] if some else ids
    found = index.search(queries, top, radius, allowed if some else None)
    equal(found, by_definition(queries, codes, ids, top, 999 if radius is None else radius, allowed))


def test_a_search_deeper_than_a_run_of_codes(monkeypatch):
    "Candidates are tidied up many times, on one thread and on several."
    codes, queries = random_codes(20_000, 24), random_codes(70, 24, 1)
    index = HashIndex(24)
    index.add(codes)
    for threads in (1, 3):
        monkeypatch.setattr(index_module.torch, "get_num_threads", lambda: threads)
        found = index.search(queries, 700)
        equal(found[:2], hamming_search(queries, codes, 700))
    equal(found[2:], [(hamming_distances(queries, codes) == found.distances[:, -1:]).sum(1)])


def test_distances_are_those_of_faiss():
    codes, queries = random_codes(5000, 64), random_codes(40, 64, 1)
    ours, flat = HashIndex(64), faiss.IndexBinaryFlat(64)
    ours.add(codes)
    flat.add(codes)
    np.testing.assert_array_equal(ours.search(queries, 30).distances, flat.search(queries, 30)[0])


def test_items_come_and_go(small):
    index, codes = small
    rest = np.setdiff1d(np.arange(300), [0, 7, 299])
    index.remove([7, 299, 0])
    assert len(index) == 297
    equal(index.search(codes[:9], 5), by_definition(codes[:9], codes, np.arange(300), 5, 16, rest))
    assert index.about([298, 4])["path"].tolist() == ["clip é 298.mp4", "clip é 4.mp4"]
    np.testing.assert_array_equal(index.codes([298, 4]), codes[[298, 4]])
    assert index.add(codes[:1], metadata={"path": ["new"], "label": [9]}).tolist() == [299]
    index.remove(index.ids)
    assert len(index) == 0 and index.add(codes[:2]).tolist() == [0, 1]  # now without metadata
    assert index.about([1]).shape == (1, 0)


@pytest.mark.parametrize("step", ["_as_words", "np.concatenate", "np.ascontiguousarray"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_interrupted_add_adds_nothing(small, monkeypatch, step, error):
    "And what is added again gets its own ids."
    index, codes = small
    index.approximate("hnsw")

    def broken(*_):
        raise error

    more = {"path": ["a", "b"], "label": [0, 1]}
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(f"{index_module.__name__}.{step}", broken)
        index.add(random_codes(2, seed=9), [1000, 400], more)
    assert len(index) == len(index.metadata) == index._words.shape[1] == 300
    assert index.kind == "hnsw" and index.search(codes[:9], 5).ids.max() < 300
    index.add(random_codes(2, seed=9), [1000, 400], more)
    np.testing.assert_array_equal(index.codes([1000, 400]), random_codes(2, seed=9))
    assert index.about([400])["path"].tolist() == ["b"]


def test_filters(small):
    index, codes = small
    for filter, allowed in (
        ({"label": 2}, np.arange(2, 300, 3)),
        ({"label": [0, 2], "path": [f"clip é {i}.mp4" for i in (3, 4, 5)]}, [3, 5]),
        ({"label": {1}}, np.arange(1, 300, 3)),
        ({"label": 7}, []),
        ([9, 2, 4, 1000], [2, 4, 9]),
        ([], []),
    ):
        expected = by_definition(codes[:9], codes, np.arange(300), 5, 16, allowed)
        equal(index.search(codes[:9], 5, filter=filter), expected)
        index.approximate("hnsw")  # a filter makes it exact
        equal(index.search(codes[:9], 5, filter=filter), expected)


@given(
    n=st.integers(1, 400),
    shards=st.integers(1, 5),
    top=st.integers(1, 40),
    radius=st.none() | st.integers(0, 8),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_merged_shards_are_the_whole_index(n, shards, top, radius, seed):
    "Of uneven sizes, with many ties, and without what a shard that does not answer has."
    rng = np.random.default_rng(seed)
    codes, queries, where = random_codes(n, 8, seed), random_codes(5, 8, seed + 1), rng.integers(0, shards, n)
    ids, parts = rng.choice(10 * n, n, replace=False), []
    for shard in np.unique(where):
        index = HashIndex(8)
        index.add(codes[where == shard], ids[where == shard])
        parts.append(index.search(queries, top, radius))
    within = 999 if radius is None else radius
    equal(merge_found(parts), by_definition(queries, codes, ids, top, within, ids))
    if len(parts) > 1:
        there = ids[where != where.max()]
        equal(merge_found(parts[:-1]), by_definition(queries, codes, ids, top, within, there))


def test_shards_that_do_not_fit(small):
    index, codes = small
    found = index.search(codes[:3], 5)
    for parts in ([], [found, index.search(codes[:3], 6)], [found, index.search(codes[:2], 5)]):
        with pytest.raises(ValueError, match="parts: expected at least one, all of the same queries"):
            merge_found(parts)
    with pytest.raises(ValueError, match="parts: expected each id in one of them only"):
        merge_found([found, found])


# Approximate kinds


@pytest.mark.parametrize("kind, effort", [("ivf", 17), ("hnsw", 400), ("multihash", 4)])
def test_kinds_with_all_effort_are_nearly_exact(small, kind, effort):
    index, codes = small
    queries = random_codes(50, seed=1)
    exact = index.search(queries, 10)
    index.approximate(kind, effort)
    found = index.search(queries, 10)
    assert index.kind == kind and recall_at(found, exact) > 0.99
    order = np.lexsort((found.ids, found.distances), axis=1)
    np.testing.assert_array_equal(order, np.broadcast_to(np.arange(10), order.shape))
    near = index.search(queries, 10, radius=2)
    assert ((near.ids >= 0) == (near.distances >= 0)).all() and near.distances.max() <= 2
    index.remove([5])
    assert index.kind == "exact" and 5 not in index.search(codes[5:6], 10).ids


def test_recall_counts_any_of_the_ties():
    exact = Found(np.array([[0, 1, 1], [2, -1, -1]]), np.array([[4, 5, 6], [7, -1, -1]]), np.array([4, 1]))
    found = Found(np.array([[0, 1, 2], [-1, -1, -1]]), np.array([[4, 8, 9], [-1, -1, -1]]), np.array([1, 0]))
    assert recall_at(exact, exact) == 1
    assert recall_at(found, exact) == pytest.approx((2 / 3 + 0) / 2)


def test_the_fastest_with_enough_recall_is_chosen(small, monkeypatch):
    index = small[0]
    clock = iter(np.cumsum([1.0] * 200))  # every call takes as long as any other ...
    monkeypatch.setattr(index_module.time, "perf_counter", lambda: next(clock))
    table = index.choose(recall=1, queries=random_codes(20, seed=1))
    assert len(table) == 1 + sum(map(len, EFFORTS.values()))
    assert table["chosen"].tolist().index(True) == 0 and index.kind == "exact"  # ... so the first one wins
    slow = iter(np.cumsum([0.0, 9.0] * 3 + [0.0, 1.0] * 200))  # the exact search is the slow one
    monkeypatch.setattr(index_module.time, "perf_counter", lambda: next(slow))
    table = index.choose(recall=0.9, queries=random_codes(20, seed=1))
    chosen = table[table["chosen"]].iloc[0]
    first = table[(table["recall"] >= 0.9) & (table["kind"] != "exact")].iloc[0]
    assert (
        (index.kind, index.effort) == (chosen["kind"], chosen["effort"]) == (first["kind"], first["effort"])
    )
    assert (table["MB"] >= table["MB"][0]).all()
    little = iter(np.cumsum([0.0, 1.9] * 3 + [0.0, 1.0] * 200))  # too little to leave the exact search
    monkeypatch.setattr(index_module.time, "perf_counter", lambda: next(little))
    index.choose(recall=0.9, queries=random_codes(20, seed=1))
    assert index.kind == "exact"


def test_a_choice_that_fails_changes_nothing(small):
    index = small[0]
    index.approximate("hnsw", 40)
    for call in (
        lambda: index.choose(top=0),
        lambda: index.choose(top=10**9),
        lambda: index.choose(queries=random_codes(3, 32)),
        lambda: index.choose(recall=0),
        lambda: index.approximate("ivf", -1),
    ):
        with pytest.raises(ValueError):
            call()
        assert (index.kind, index.effort) == ("hnsw", 40)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("kind, effort", [("exact", 0), ("ivf", 2)])
def test_an_interrupted_choice_changes_nothing(small, monkeypatch, error, kind, effort):
    index, build = small[0], index_module._build
    index.approximate(kind, effort)
    before = index.search(CODES, 5)

    def broken(kind, codes):
        if kind == "multihash":
            raise error
        return build(kind, codes)

    monkeypatch.setattr(index_module, "_build", broken)
    with pytest.raises(error):
        index.choose()
    assert (index.kind, index.effort) == (kind, effort)
    equal(index.search(CODES, 5), before)


def test_all_kinds_search_on_as_many_threads_as_torch(small, monkeypatch):
    index, before = small[0], faiss.omp_get_max_threads()
    index.approximate("hnsw")
    monkeypatch.setattr(index_module.torch, "get_num_threads", lambda: before + 1)
    index.search(CODES)
    assert faiss.omp_get_max_threads() == before + 1
    faiss.omp_set_num_threads(before)


# Files


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", ["exact", *EFFORTS])
def test_a_file_holds_all_of_an_index(small, tmp_path, mmap, kind):
    index, codes = small
    index.approximate(kind)
    index.save(tmp_path / "new" / "x.index")
    again = HashIndex.load(tmp_path / "new" / "x.index", mmap)
    assert (again.bits, again.kind, again.effort) == (16, index.kind, index.effort)
    equal(again.search(codes[:9], 5), index.search(codes[:9], 5))
    pd.testing.assert_frame_equal(again.metadata, index.metadata)
    before = (tmp_path / "new" / "x.index").read_bytes()
    again.add(codes[:1], metadata={"path": ["more"], "label": [1]})
    assert (tmp_path / "new" / "x.index").read_bytes() == before
    again.save(tmp_path / "new" / "x.index")  # over the file that it is mapped from
    assert len(HashIndex.load(tmp_path / "new" / "x.index", mmap)) == 301


def test_a_mapped_index_stays_in_the_file(tmp_path):
    index, n = HashIndex(64), 200_000
    index.add(random_codes(n, 64))
    index.save(tmp_path / "x.index")
    size = (tmp_path / "x.index").stat().st_size
    assert size < 1.01 * n * (8 + 8)
    mapped = HashIndex.load(tmp_path / "x.index", mmap=True)
    assert all(isinstance(array.base, np.memmap) for array in (mapped._words, mapped.ids))


def test_an_empty_index_has_a_file(tmp_path):
    HashIndex(12).save(tmp_path / "x.index")
    index = HashIndex.load(tmp_path / "x.index", mmap=True)
    assert (len(index), index.bits) == (0, 12)
    assert index.add(random_codes(3, 12)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("left", [0, 5, 40, 300, -1])
def test_a_file_cut_short_is_named(small, tmp_path, left):
    path = tmp_path / "x.index"
    small[0].save(path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{path}: expected the whole file of an index"):
        HashIndex.load(path)
    assert main(["search", str(path), "--id", "1"]) == 2


def test_other_files_are_named(tmp_path):
    path = tmp_path / "x.index"
    with pytest.raises(FileNotFoundError, match="x.index: expected a file that `HashIndex.save` wrote"):
        HashIndex.load(path)
    index_module.save_file({"a": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="x.index: expected the whole file of an index"):
        HashIndex.load(path)


def test_a_file_with_more_codes_than_ids_is_named(small, tmp_path):
    small[0].ids = small[0].ids[:-1]
    small[0].metadata = small[0].metadata[:-1]
    small[0].save(tmp_path / "x.index")
    with pytest.raises(ValueError, match="x.index: expected a code for each id"):
        HashIndex.load(tmp_path / "x.index")


def test_a_file_with_an_effort_that_never_ends_is_named(small, tmp_path):
    small[0].approximate("multihash", 8)
    assert (small[0].search(CODES, 3).ids >= 0).all()
    small[0].effort = 9
    small[0].save(tmp_path / "x.index")
    with pytest.raises(ValueError, match="x.index: effort: expected a whole number from 0 to 8"):
        HashIndex.load(tmp_path / "x.index")


@contextlib.contextmanager
def files_of_at_most(size):
    "As on a full disk: the system refuses to write more into a file."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_load_during_saves_gives_one_whole_index(tmp_path):
    "Two indexes take turns in a file; every item that is read belongs to the same one."
    path, pair = tmp_path / "x.index", [HashIndex(8), HashIndex(8)]
    for i, index in enumerate(pair):
        n = 2000 + 3000 * i
        index.add(np.full((n, 1), i, np.uint8), np.arange(n) + i * 10**6, {"label": [i] * n})
    pair[0].save(path)
    stop = threading.Event()

    def save():
        while not stop.is_set():
            for index in pair:
                index.save(path)

    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(save)
        try:
            for i in range(300):
                index = HashIndex.load(path, mmap=i % 2 == 0)
                label = int(len(index) == 5000)
                assert (index.ids == np.arange(2000 + 3000 * label) + label * 10**6).all()
                assert (index.metadata["label"] == label).all() and (index.codes(index.ids) == label).all()
        finally:
            stop.set()
        saving.result()


def test_a_full_disk_leaves_the_old_file(small, tmp_path):
    path = tmp_path / "x.index"
    small[0].save(path)
    before = path.read_bytes()
    small[0].add(random_codes(5000), metadata={"path": ["x"] * 5000, "label": [0] * 5000})
    with files_of_at_most(8192), pytest.raises(OSError, match=f"{path}: expected to write the whole file"):
        small[0].save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.index"]


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_the_umask_says_who_may_read(small, tmp_path, umask):
    before = os.umask(umask)
    try:
        small[0].save(tmp_path / "x.index")
        write_text(tmp_path / "x.txt", "text")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("x.index", "x.txt"), 0o666 & ~umask)


def test_a_process_killed_while_saving_leaves_the_old_file(small, tmp_path):
    path = tmp_path / "x.index"
    small[0].save(path)
    before = path.read_bytes()
    program = f"""
import os, signal
from s5vh_nb.search import index
def half(arrays, path, about):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
index.save_file = half
index.HashIndex(16).save({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", program])
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before and len(HashIndex.load(path)) == 300


# Bad input

CODES = random_codes(4)
BAD = [
    (lambda index: index.add(CODES.astype(float)), "codes: expected packed codes, uint8"),
    (lambda index: index.add(CODES[0]), "codes: expected packed codes, uint8"),
    (lambda index: index.add(CODES[:0]), "codes: expected at least one video"),
    (
        lambda index: index.add(random_codes(4, 32)),
        "codes: expected codes of 2 bytes, for the 16 bits of the",
    ),
    (lambda index: index.add(CODES, [1, 2, 3]), "ids: expected 4, one a code, found 3"),
    (lambda index: index.add(CODES, [500, 501, 500, 502]), "ids: expected each id once, found [500] more"),
    (
        lambda index: index.add(CODES, [500, 501, 7, 502], META),
        "ids: expected ids that the index does not ha",
    ),
    (lambda index: index.add(CODES, [500, 501, -1, 502]), "ids: expected whole numbers from 0"),
    (lambda index: index.add(CODES, list("abcd")), "ids: expected whole numbers, (items,)"),
    (lambda index: index.add(CODES), "metadata: expected the fields ['path', 'label'] of the items before"),
    (
        lambda index: index.add(CODES, None, {"path": ["a"], "label": [1]}),
        "metadata: expected 4 values a fie",
    ),
    (
        lambda index: index.add(CODES, None, {"path": list("abcd"), "label": ["cat", "", "cat", "dog"]}),
        "metadata 'label': expected numbers, as the items before have, found text",
    ),
    (
        lambda index: index.add(CODES, None, {"path": list("abcd"), "label": [True] * 4}),
        "metadata 'label': expected numbers, as the items before have, found true or false",
    ),
    (
        lambda index: index.add(CODES, None, {"path": [1.5] * 4, "label": [0] * 4}),
        "metadata 'path': expected text, as the items before have, found numbers",
    ),
    (lambda index: index.remove([7, 300]), "ids: expected ids of"),
    (lambda index: index.codes([300]), "ids: expected ids of"),
    (lambda index: index.about([7, 7]), "ids: expected each id once"),
    (lambda index: index.search(random_codes(4, 32)), "queries: expected codes of 2 bytes, for the 16 bits"),
    (lambda index: index.search(CODES.astype(float)), "queries: expected packed codes, uint8"),
    (lambda index: index.search(CODES, 0), "top: expected a whole number from 1, found 0"),
    (lambda index: index.search(CODES, 2.0), "top: expected a whole number from 1, found 2.0"),
    (lambda index: index.search(CODES, 10**9), "top: expected at most 16384, found 1000000000"),
    (lambda index: index.search(CODES, filter={"label": None}), "filter 'label': expected texts, finite"),
    (lambda index: index.search(CODES, filter={"label": [[1]]}), "filter 'label': expected texts, finite"),
    (lambda index: index.search(CODES, filter={"label": np.nan}), "filter 'label': expected texts, finite"),
    (lambda index: index.search(CODES, filter={"path": "\ud800"}), "filter 'path': expected texts, finite"),
    (lambda index: index.search(CODES, radius=-1), "radius: expected a whole number of bits from 0, or None"),
    (lambda index: index.search(CODES, filter={"labels": 1}), "filter: expected one of"),
    (lambda index: index.search(CODES, filter=["a"]), "filter: expected whole numbers"),
]
META = {"path": list("abcd"), "label": [0] * 4}


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input_is_named(small, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(small[0])
    assert len(small[0]) == 300 and len(small[0].metadata) == 300


def test_bad_settings_are_named(small):
    index = small[0]
    for call, message in (
        (lambda: HashIndex(0), "bits: expected"),
        (lambda: index.approximate("hsnw"), "did you mean 'hnsw'?"),
        (lambda: index.approximate("hnsw", 0), "effort: expected a whole number from 1 to"),
        (lambda: index.approximate("ivf", 0), "effort: expected a whole number from 1 to"),
        (lambda: index.approximate("multihash", 9), "effort: expected a whole number from 0 to 8, for 'mul"),
        (lambda: index.approximate("multihash", -1), "effort: expected a whole number from 0 to 8"),
        (lambda: index.choose(recall=95), "recall: expected a share above 0, at most 1, found 95"),
        (lambda: HashIndex(12).add(random_codes(4)), "codes: expected zeros after the 12 bits"),
        (lambda: as_table({"id": [1]}, 1), "metadata: expected fields other than id, code"),
        (lambda: as_table({"x": [1, "a"]}, 2), "metadata 'x': expected only text, or only numbers"),
        (lambda: as_table({"x": [None, "a"]}, 2), "metadata 'x': expected only text, or only numbers"),
        (lambda: as_table({1: [1], "1": [2]}, 1), "metadata: expected fields whose names differ"),
        (
            lambda: as_table({"x": np.zeros((2, 3))}, 2),
            "metadata 'x': expected one value an item, (2,), found",
        ),
        (lambda: as_table({"x": ["a", "b\ud800"]}, 2), "metadata 'x': expected text that UTF-8 can hold"),
        (lambda: as_table({"x\udfff": [1]}, 1), "metadata: expected names that UTF-8 can hold"),
        (lambda: check_ids([2**64 - 1]), "ids: expected whole numbers from 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("call", ["search", "choose", "approximate"])
def test_search_before_add_is_named(call):
    given = {"search": {"queries": CODES}, "choose": {}, "approximate": {"kind": "hnsw"}}[call]
    with pytest.raises(ValueError, match="index: expected at least one item .`add` comes before"):
        getattr(HashIndex(16), call)(**given)


# Milvus


@pytest.fixture(params=["file", pytest.param("milvus", marks=with_milvus)])
def empty(request, tmp_path):
    "A new index of each class, for codes of 16 bits."
    if request.param == "file":
        yield HashIndex(16)
    else:
        index = MilvusIndex(tmp_path / "new.db", 16)
        yield index
        index.close()


def test_no_id_follows_the_largest_one(empty):
    empty.add(CODES[:1], [2**63 - 2])
    assert empty.add(CODES[1:2]).tolist() == [2**63 - 1]
    with pytest.raises(ValueError, match=f"ids: expected whole numbers from 0, below .*, found .*{2**63}"):
        empty.add(CODES[2:3])
    assert len(empty) == 2 and empty.about([2**63 - 1]).shape == (1, 0)
    np.testing.assert_array_equal(empty.codes([2**63 - 1]), CODES[1:2])


def test_in_a_filter_true_is_no_number(empty):
    metadata = {"ok": [True, False, True, False], "n": [1, 0, 2, 1], "x": [1.0, 0.5, 1.5, 2.0]}
    empty.add(CODES, metadata=metadata | {"text": ["1", "True", "true", "0"]})
    for filter, expected in (
        ({"ok": True}, {0, 2}),
        ({"ok": np.False_}, {1, 3}),
        ({"ok": [1, 0, 1.0, "True"]}, set()),
        ({"ok": [1, True]}, {0, 2}),
        ({"n": True}, set()),
        ({"n": [1.0, False]}, {0, 3}),
        ({"x": 1}, {0}),
        ({"x": [np.float32(0.5), True]}, {1}),
        ({"text": [1, True, 0]}, set()),
        ({"text": ["1", "True"]}, {0, 1}),
        ({"n": 2**70}, set()),
    ):
        assert set(empty.search(CODES[:1], 4, filter=filter).ids[0].tolist()) - {-1} == expected, filter


def test_in_a_filter_large_whole_numbers_are_exact():
    index = HashIndex(16)
    index.add(CODES, metadata={"n": [2**53, 2**53 + 1, 2**53 + 2, 5]})
    found = index.search(CODES[:1], 4, filter={"n": [2**53 + 1, 5.0, 0.5]})
    assert set(found.ids[0].tolist()) - {-1} == {1, 3}


def test_filters_find_any_text(empty):
    "Of one line, which is all that Milvus can look for."
    texts = ["a\tb", "a\\tb", "ä", 'a"b', "a\x07b", "a\0b", "\\", "{a}", "\u2028", "😀"]
    empty.add(random_codes(len(texts)), metadata={"größe": texts, 'a"\\b': texts})
    for i, text in enumerate(texts):
        for name in ("größe", 'a"\\b'):
            assert set(empty.search(CODES[:1], 10, filter={name: text}).ids[0].tolist()) - {-1} == {i}, text
    assert set(empty.search(CODES[:1], 10, filter={"größe": texts[:3]}).ids[0].tolist()) - {-1} == {0, 1, 2}


def test_a_number_of_neighbours_of_any_type(empty):
    "Twice 200 is more than a uint8 holds."
    codes = random_codes(300)
    empty.add(codes)
    equal(empty.search(codes[:2], np.uint8(200)), empty.search(codes[:2], 200))


def test_items_without_fields_stay_so(empty):
    empty.add(CODES[:2])
    assert empty.add(CODES[2:]).tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"metadata: expected the fields \[\] of the items before, found"):
        empty.add(CODES, metadata={"x": [1] * 4})
    assert len(empty) == 4


@pytest.fixture
def embedded(small, tmp_path):
    "The small index again, in a file of Milvus Lite."
    index = MilvusIndex(tmp_path / "x.db", 16)
    index.add(small[1], metadata={name: column.tolist() for name, column in small[0].metadata.items()})
    yield index
    index.close()


@with_milvus
def test_milvus_finds_what_the_exact_index_finds(small, embedded):
    index, queries = small[0], random_codes(70, seed=1)
    for top, options in (
        (1, {}),
        (7, {}),
        (400, {}),  # more than there are
        (7, {"radius": 3}),
        (7, {"filter": {"label": [0, 2], "path": [f"clip é {i}.mp4" for i in range(50)]}}),
        (7, {"filter": np.arange(100)}),
        (7, {"filter": {"label": 9}}),
        (7, {"filter": []}),
    ):
        equal(embedded.search(queries, top, **options), index.search(queries, top, **options))
    for each in small[0], embedded:
        each.remove([3, 250, 7])
    equal(embedded.search(queries, 7), index.search(queries, 7))
    assert len(embedded) == 297 and embedded.bits == 16
    np.testing.assert_array_equal(embedded.codes([9, 4]), index.codes([9, 4]))
    assert embedded.about([9, 4]).to_dict("records") == index.about([9, 4]).to_dict("records")


@with_milvus
def test_milvus_sees_ties_far_beyond_the_neighbours(tmp_path):
    "All items are alike, so every search meets as many ties as there are items, and the ids decide."
    index = MilvusIndex(tmp_path / "x.db", 8)
    index.add(np.zeros((700, 1), np.uint8), np.random.default_rng(0).permutation(700))
    found = index.search(np.zeros((2, 1), np.uint8), 3)
    index.close()
    equal(found, Found(np.zeros((2, 3)), [[0, 1, 2]] * 2, [700, 700]))


@with_milvus
def test_milvus_names_the_same_bad_input(embedded):
    for call, message in BAD:
        message = message.replace("['path', 'label']", "['label', 'path']")
        with pytest.raises(ValueError, match=re.escape(message)):
            call(embedded)
    assert len(embedded) == 300


@with_milvus
def test_milvus_names_search_before_add_and_other_bits(tmp_path):
    for call in (lambda: MilvusIndex(tmp_path / "x.db"), lambda: open_index(tmp_path / "x.db")):
        with pytest.raises(
            FileNotFoundError, match="x.db: expected an index .`bits` makes a new one., found"
        ):
            call()
    with pytest.raises(ValueError, match="lists: expected 0 or None for a file, .* found 64"):
        MilvusIndex(tmp_path / "x.db", 16, lists=64)
    with pytest.raises(ValueError, match="lists: expected a whole number from 0, or None, found -1"):
        MilvusIndex("http://host:19530", 16, lists=-1)
    for name in ("shards", "replicas"):
        with pytest.raises(ValueError, match=f"{name}: expected None for a file, which is whole"):
            MilvusIndex(tmp_path / "x.db", 16, **{name: 2})
        with pytest.raises(ValueError, match=f"{name}: expected a whole number from 1, or None, found 0"):
            MilvusIndex("http://host:19530", 16, **{name: 0})
    for name in ("a b.db", "ä.db", 34 * "x" + ".db"):
        with pytest.raises(ValueError, match=f"place: expected a file name of at most 36 .*, found '{name}'"):
            MilvusIndex(tmp_path / name, 16)
    assert not list(tmp_path.iterdir())
    index = MilvusIndex(tmp_path / "x.db", 16)
    with pytest.raises(ValueError, match="index: expected at least one item .`add` comes before `search`"):
        index.search(CODES)
    index.close()
    with pytest.raises(ValueError, match="bits: expected 16, as the index in .*x.db has, found 32"):
        MilvusIndex(tmp_path / "x.db", 32)
    with pytest.raises(ValueError, match="place: expected a file NAME.db or a URL"):
        MilvusIndex(tmp_path / "x.index", 16)


@with_milvus
def test_milvus_names_texts_that_it_can_not_look_for(embedded):
    for text in ("a\nb", "a\rb"):
        with pytest.raises(ValueError, match="filter: expected texts of one line, for Milvus, found"):
            embedded.search(CODES, filter={"path": text})


@with_milvus
def test_milvus_lets_go_of_a_file_that_it_refuses(embedded):
    "Unless another index of this process has it open."
    place = embedded.place
    program = f"from s5vh_nb.search.milvus import open_index; print(len(open_index({place!r})))"
    with pytest.raises(ValueError, match="bits: expected 16"):
        MilvusIndex(place, 32)
    other = MilvusIndex(place)
    other.close()
    assert len(embedded) == 300
    embedded.close()
    with pytest.raises(ValueError, match="bits: expected 16"):
        MilvusIndex(place, 32)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert done.stdout == "300\n", done.stderr


@with_milvus
def test_a_file_of_another_process_is_named(tmp_path):
    "And opens once that process has gone."
    path = tmp_path / "x.db"
    program = f"""
import numpy as np
from s5vh_nb.search.milvus import MilvusIndex
MilvusIndex({str(path)!r}, 16).add(np.zeros((3, 2), np.uint8))
print("ready", flush=True)
input()
"""
    words = [sys.executable, "-c", program]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    with subprocess.Popen(words, **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(
            OSError, match=f"{path}: expected a file of Milvus Lite that no other process has"
        ):
            open_index(path)
        other.communicate("\n")
    index = open_index(path)
    assert len(index) == 3
    index.close()


@with_milvus
def test_the_log_of_milvus_is_not_printed(tmp_path):
    program = f"""
from s5vh_nb.search.milvus import MilvusIndex
for place in {str(tmp_path / "no" / "x.db")!r}, "http://127.0.0.1:1":
    try:
        MilvusIndex(place, 16, timeout=0.5)
    except OSError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr, done.stdout.count("expected a")) == (0, "", 2)


@with_milvus
def test_a_broken_file_and_a_silent_server_are_named(tmp_path):
    path = tmp_path / "x.db"
    path.write_bytes(b"no database" * 100)
    with pytest.raises(OSError, match=f"{path}: expected a file of Milvus Lite"):
        MilvusIndex(path, 16)
    url = "http://127.0.0.1:1"
    with pytest.raises(
        OSError, match=f"{url}: expected a Milvus server that answers within 0.5 seconds, fou"
    ):
        MilvusIndex(url, 16, timeout=0.5)


@pytest.mark.parametrize("place", ["x.db", "http://127.0.0.1:1"])
def test_milvus_that_is_not_installed_is_named(monkeypatch, place, capsys):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    message = re.escape(f"{place}: expected the package pymilvus (pip install 's5vh_nb[milvus]'), found")
    with pytest.raises(ModuleNotFoundError, match=message):
        MilvusIndex(place, 16)
    assert main(["search", place, "--id", "1"]) == 2
    assert re.search(message, capsys.readouterr().err)


class Recorder:
    "A client that notes what it is asked for; a server with no collections."

    lists, loaded = 0, False  # of the collection

    def __init__(self, *place, **options):
        self.calls = {"open": (place, options)}

    def has_collection(self, name, **options):
        return False

    def describe_collection(self, name, **options):
        made = self.calls["create_collection"][1]
        return {
            "description": self.calls["create_schema"][1]["description"],
            "num_shards": made["num_shards"],
        }

    def get_load_state(self, name, **options):
        from pymilvus.client.types import LoadState

        return {"state": LoadState.Loaded if self.loaded else LoadState.NotLoad}

    def describe_index(self, name, **options):
        return {"nlist": str(self.lists)} if self.lists else {"index_type": "BIN_FLAT"}

    def __getattr__(self, method):
        def call(*args, **options):
            self.calls[method] = args, options
            return self

        return call


@with_milvus
@pytest.mark.parametrize("lists, kind", [(0, "BIN_FLAT"), (64, "BIN_IVF_FLAT")])
def test_what_a_cluster_is_asked_for(monkeypatch, lists, kind):
    "The settings of a collection, by the documentation of Milvus; there is no cluster here."
    monkeypatch.setattr("pymilvus.MilvusClient", Recorder)
    monkeypatch.setattr(Recorder, "lists", lists)
    with pytest.raises(ValueError, match="bits: expected the length of the codes, for a new index"):
        MilvusIndex("http://host:19530")
    index = MilvusIndex("http://host:19530", 20, lists=lists, shards=4, replicas=2, token="me:secret")
    calls = index._client.calls
    assert calls["open"] == (("http://host:19530",), {"token": "me:secret", "timeout": 10.0})
    assert calls["add_field"][1]["dim"] == 24  # whole bytes
    created = calls["create_collection"][1]
    assert (created["num_shards"], created["consistency_level"]) == (4, "Strong")
    assert calls["load_collection"][1]["replica_number"] == 2
    more = {"params": {"nlist": 64}} if lists else {}
    assert calls["prepare_index_params"][1] == {"index_type": kind, "metric_type": "HAMMING", **more}


class Full(Recorder):
    "A server with a collection."

    lists, loaded = 64, True

    def has_collection(self, name, **options):
        return True

    def describe_collection(self, name, **options):
        return {"description": "20 bits", "num_shards": 4}


@with_milvus
def test_a_loaded_collection_keeps_its_copies(monkeypatch):
    "To ask for another number is an error of some servers, and others search less meanwhile."
    monkeypatch.setattr("pymilvus.MilvusClient", Full)
    assert "load_collection" not in open_index("http://host:19530")._client.calls
    calls = MilvusIndex("http://host:19530", replicas=3)._client.calls
    assert calls["load_collection"][1]["replica_number"] == 3
    monkeypatch.setattr(Full, "loaded", False)
    calls = open_index("http://host:19530")._client.calls
    assert calls["load_collection"][1]["replica_number"] is None


@with_milvus
def test_other_shards_than_those_of_the_collection_are_named(monkeypatch):
    monkeypatch.setattr("pymilvus.MilvusClient", Full)
    assert MilvusIndex("http://host:19530", shards=4).bits == 20
    with pytest.raises(ValueError, match="shards: expected 4, as the index in .* has, found 2"):
        MilvusIndex("http://host:19530", shards=2)


@with_milvus
def test_other_lists_than_those_of_the_collection_are_named(monkeypatch):
    monkeypatch.setattr("pymilvus.MilvusClient", Full)
    for lists in (None, 64):
        assert MilvusIndex("http://host:19530", lists=lists).bits == 20
    for lists in (0, 65):
        with pytest.raises(ValueError, match=f"lists: expected 64, as the index in .* has, found {lists}"):
            MilvusIndex("http://host:19530", lists=lists)


@with_milvus
def test_a_collection_without_its_index_is_dropped(tmp_path, monkeypatch):
    import pymilvus

    def fail(*_, **__):
        raise pymilvus.MilvusException(message="no memory")

    with monkeypatch.context() as broken:
        broken.setattr(pymilvus.MilvusClient, "create_index", fail)
        with pytest.raises(OSError, match="x.db: expected a file of Milvus Lite .* found: no memory"):
            MilvusIndex(tmp_path / "x.db", 16)
    index = MilvusIndex(tmp_path / "x.db", 16)
    index.add(CODES)
    assert index.search(CODES, 1).distances.tolist() == [[0]] * 4
    index.close()


# Commands


@pytest.fixture
def files(checkout):
    "The files that the examples of the commands name."
    np.save("codes.npy", random_codes(40))
    np.save("queries.npy", random_codes(2, seed=1))
    np.savez("more.npz", codes=random_codes(9, seed=2), ids=np.arange(100, 109))
    lines = [f"clip{i}.mp4,{i % 4}" for i in range(40)]
    (checkout / "manifest.csv").write_text("\n".join(["path,label", *lines]), encoding="utf-8")
    return checkout


def examples(command, capsys):
    "The command lines in the help of a command."
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return re.findall(r"^  s5vh-nb (.+)$", capsys.readouterr().out, re.MULTILINE)


def test_the_examples_of_the_help_work(files, capsys):
    lines = examples("index", capsys) + examples("search", capsys)
    lines = [line for line in lines if "--model" not in line]  # see test_way
    assert len(lines) == 6
    for line in lines:
        if ".db" in line and importlib.util.find_spec("milvus_lite") is None:
            continue
        assert main(shlex.split(line)) == 0, line
    out = capsys.readouterr().out
    assert "videos.index: 40 items added, 40 in all, 16 bits" in out
    assert "videos.index: 9 items added, 49 in all, 16 bits" in out


def test_a_table_of_neighbours(files, capsys):
    (files / "few.csv").write_text("id,name\n5,a\n3,b\n9,c\n1,3\n", encoding="utf-8")
    np.save("few.npy", np.array([[0], [1], [3], [1]], np.uint8))
    assert main(["index", "few.npy", "few.index", "--manifest", "few.csv"]) == 0
    capsys.readouterr()
    assert main(["search", "few.index", "--id", "5", "--top", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["query", "rank", "id", "distance", "name"],
        ["5", "1", "5", "0", "a"],
        ["5", "2", "1", "1", "3"],
        "query 5: 1 more at distance 1".split(),
    ]
    assert main(["search", "few.index", "--id", "5", "--where", "name=3"]) == 0
    assert capsys.readouterr().out.split()[5:] == ["5", "1", "1", "1", "3"]
    for value in ("z", "nan"):
        assert main(["search", "few.index", "--id", "5", "--where", f"name={value}"]) == 0
        assert capsys.readouterr().out == "nothing found\n"


def test_true_and_false_on_the_command_line(files, capsys):
    (files / "few.csv").write_text("id,ok\n5,True\n3,False\n", encoding="utf-8")
    np.save("few.npy", np.array([[0], [1]], np.uint8))
    assert main(["index", "few.npy", "few.index", "--manifest", "few.csv"]) == 0
    capsys.readouterr()
    assert main(["search", "few.index", "--id", "5", "--where", "ok=false"]) == 0
    assert capsys.readouterr().out.split()[5:] == ["5", "1", "3", "1", "False"]


def test_indexing_on_a_server_leaves_nothing_here(files, monkeypatch, capsys):
    def silent(place, bits, **given):
        assert given == {"shards": 4, "replicas": 2, "lists": 64}
        raise OSError(f"{place}: no answer")

    monkeypatch.setattr(command, "MilvusIndex", silent)
    before = set(files.iterdir())
    line = "index codes.npy http://host:19530 --shards 4 --replicas 2 --lists 64"
    assert main(line.split()) == 2
    assert "http://host:19530: no answer" in capsys.readouterr().err and set(files.iterdir()) == before


def test_bits_of_a_file_and_of_the_command(files, capsys):
    np.savez("told.npz", codes=random_codes(4, 12), bits=12)
    for words, bits in ([], 12), (["--bits", "16"], 16):
        assert main(["index", "told.npz", f"{bits}.index", *words]) == 0
        assert f"4 items added, 4 in all, {bits} bits" in capsys.readouterr().out


def test_indexing_waits_for_another_run(files):
    "Both add to the index that the other one leaves."
    with only_run(files):
        adding = threading.Thread(target=main, args=(["index", "codes.npy", "both.index"],))
        adding.start()
        adding.join(0.3)
        assert adding.is_alive()
        first = HashIndex(16)
        first.add(np.zeros((1, 2), np.uint8))
        first.save("both.index")
    adding.join()
    assert len(HashIndex.load("both.index")) == 1 + len(np.load("codes.npy"))


def test_commands_name_what_is_wrong(files, capsys):
    (files / "text.npy").write_text("text", encoding="utf-8")
    (files / "empty.npy").touch()
    (files / "half.npz").write_bytes((files / "more.npz").read_bytes()[:200])
    np.save("floats.npy", np.zeros((3, 8)))
    (files / "more.csv").write_text("path,label\na.mp4,cat,\n", encoding="utf-8")
    np.savez("one.npz", codes=np.load("codes.npy"), source="my camera")
    np.savez("pair.npz", codes=np.load("codes.npy"), bits=[16, 16])
    (files / "fitted").mkdir()
    fitted = json.dumps(to_dict(BaselineConfig()))
    (files / "fitted" / "config.json").write_text(fitted, encoding="utf-8")
    assert main(["index", "codes.npy", "a.index"]) == 0
    for line, message in (
        ("index nowhere.npy b.index", "nowhere.npy"),
        ("index text.npy b.index", "text.npy: expected packed codes"),
        ("index empty.npy b.index", "empty.npy: expected packed codes"),
        ("index half.npz b.index", "half.npz: expected packed codes"),
        ("index floats.npy b.index", "floats.npy: expected packed codes"),
        ("index codes.npy b.index --bits 40", "codes: expected codes of 5 bytes"),
        ("index codes.npy b.index --manifest nowhere.csv", "nowhere.csv"),
        ("index codes.npy b.index --manifest floats.npy", "floats.npy: expected a table (CSV, UTF-8)"),
        ("index codes.npy b.index --manifest empty.npy", "empty.npy: expected a table (CSV, UTF-8)"),
        ("index codes.npy b.index --manifest more.csv", "more.csv: expected 2 values in a row"),
        (
            "index one.npz b.index",
            "metadata: expected 40 values a field, one an item, found {'source': 'one value'}",
        ),
        ("index pair.npz b.index", "pair.npz: bits: expected a whole number, found [16, 16]"),
        ("index codes.npy b.db --recall 0.9", "--recall: expected an index file"),
        ("index codes.npy b.db --recall 0", "--recall: expected an index file"),
        ("index codes.npy b.index --recall 0", "recall: expected a share above 0"),
        ("index codes.npy b.index --bits 0", "bits: expected"),
        ("index codes.npy a.index --bits 0", "a.index: expected codes of 0 bits, found 16"),
        ("--import s5vh_nb.nothing list", "--import: expected a module, found 's5vh_nb.nothing'"),
        ("search a.index --caption x --model fitted", "config.json: expected the configuration of a network"),
        ("index codes.npy b.db --replicas 2", "--replicas: expected the URL of a Milvus server, found b.db"),
        ("index codes.npy b.index --shards 2 --lists 9", "--shards --lists: expected the URL of a Milvus"),
        ("search nowhere.index --id 1", "nowhere.index: expected a file"),
        ("search a.index --id 99", "ids: expected ids of this index"),
        ("search a.index --codes floats.npy", "floats.npy: expected packed codes"),
        ("search a.index --id 1 --where label", "--where: expected FIELD=VALUE"),
        ("search a.index --id 1 --where label=1", "filter: expected one of"),
        ("search a.index --id 1 --where a=1 --where a=2", "--where: expected each field once, found a twice"),
        ("search a.index --id 1 --top 0", "top: expected a whole number from 1"),
    ):
        capsys.readouterr()
        assert main(shlex.split(line)) == 2, line
        assert message in capsys.readouterr().err, line
    assert not (files / "b.index").exists()
    assert json.dumps(sorted(p.name for p in files.glob("*.tmp*"))) == "[]"
