"""Retrieval against oracles that share no code with it: brute force, faiss, scikit-learn, random draws."""

import itertools

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from s5vh_nb.search.hamming import hamming_distances, hamming_distances_by_definition, hamming_search
from s5vh_nb.search.scores import (
    TIES,
    average_precision,
    average_precision_by_definition,
    distance_histograms,
    map_at_k,
    precision_recall,
)

EXTREMES = "lowest", "highest"


def unpacked_distances(q, db):
    return (np.unpackbits(q, axis=1)[:, None] != np.unpackbits(db, axis=1)[None]).sum(2)


def ranking_ap(rel, N, denominator):
    "One ranking of 0/1 in numpy."
    precision = np.cumsum(rel) / np.arange(1, len(rel) + 1)
    return float((rel * precision)[:N].sum() / (N if denominator == "k" else max(1, rel[:N].sum())))


def orders(distances, rel):
    "All rankings (0/1 by rank) that the distances allow."
    groups = [[int(r) for r in rel[distances == d]] for d in np.unique(distances)]
    for ranking in itertools.product(*[sorted(set(itertools.permutations(g))) for g in groups]):
        yield np.array(sum(map(list, ranking), []))


def random_codes(rng, sizes, nbytes):
    return [rng.integers(0, 256, (m, nbytes), dtype=np.uint8) for m in sizes]


@st.composite
def retrieval_sets(draw, most=40, few_bits=False):
    "Packed codes and labels; few_bits gives many ties."
    nbytes = draw(st.integers(1, 2 if few_bits else 20))
    nq, n = draw(st.integers(1, 4)), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q, db = random_codes(rng, (nq, n), nbytes)
    if few_bits:
        q, db = q & 3, db & 3  # at most 5 distances
    classes = draw(st.integers(1, 4))
    return q, db, rng.integers(0, classes, nq), rng.integers(0, classes, n)


@given(retrieval_sets(), st.data())
@settings(deadline=None, max_examples=60)
def test_packing_and_search_agree_with_unpacked_bits(sets, data):
    q, db = sets[:2]
    expected = unpacked_distances(q, db)
    np.testing.assert_array_equal(hamming_distances(q, db), expected)
    np.testing.assert_array_equal(hamming_distances_by_definition(q, db), expected)
    top = data.draw(st.integers(1, len(db)))
    distances, ids = hamming_search(q, db, top)
    np.testing.assert_array_equal(ids, np.argsort(expected, axis=1, kind="stable")[:, :top])
    np.testing.assert_array_equal(distances, np.take_along_axis(expected, ids, 1))
    assert distances.dtype == np.int32 and ids.dtype == np.int64


def test_search_agrees_with_faiss():
    rng = np.random.default_rng(0)
    q, db = random_codes(rng, (30, 700), 16)
    index = faiss.IndexBinaryFlat(128)
    index.add(db)
    theirs, their_ids = index.search(q, 50)
    ours, our_ids = hamming_search(q, db, 50)
    np.testing.assert_array_equal(ours, theirs)
    for i in range(30):
        # inside a tie faiss may choose others; nearer than the last distance all must agree
        sure = theirs[i] < theirs[i, -1]
        assert set(our_ids[i, sure]) == set(their_ids[i, sure])


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.sampled_from(["k", "hits"]), st.data())
@settings(deadline=None, max_examples=60)
def test_the_definition_equals_another_formulation(relevance, denominator, data):
    N = data.draw(st.integers(1, len(relevance)))
    expected = ranking_ap(np.array(relevance), N, denominator)
    assert average_precision_by_definition(relevance, N, denominator) == pytest.approx(expected, abs=1e-12)
    whole = average_precision_by_definition(relevance, None, denominator)
    assert whole == average_precision_by_definition(relevance, len(relevance), denominator)


@given(retrieval_sets(most=40, few_bits=True), st.sampled_from(["k", "hits"]), st.data())
@settings(deadline=None, max_examples=60)
def test_ties_by_order_are_the_definition_on_a_stable_ranking(sets, denominator, data):
    q, db, y_q, y_db = sets
    N = data.draw(st.integers(1, len(db)) | st.none())
    ours = average_precision(*sets, [N], ties="order", denominator=denominator)[N]
    for i, distances in enumerate(hamming_distances_by_definition(q, db)):
        relevance = (y_db == y_q[i])[np.argsort(distances, kind="stable")].astype(int).tolist()
        expected = average_precision_by_definition(relevance, N, denominator)
        assert ours[i] == pytest.approx(expected, abs=1e-12)


@given(retrieval_sets(most=7, few_bits=True), st.sampled_from(["k", "hits"]), st.data())
@settings(deadline=None, max_examples=60)
def test_expected_lowest_and_highest_equal_brute_force(sets, denominator, data):
    q, db, y_q, y_db = sets
    N = data.draw(st.integers(1, len(db)))
    kinds = "expected", *EXTREMES
    ours = {ties: average_precision(*sets, [N], ties=ties, denominator=denominator)[N] for ties in kinds}
    for i, d in enumerate(unpacked_distances(q, db)):
        rankings = orders(d, y_q[i] == y_db)  # distinct 0/1 rankings of a set are equally likely
        values = [average_precision_by_definition(r.tolist(), N, denominator) for r in rankings]
        expected = [np.mean(values), min(values), max(values)]
        np.testing.assert_allclose([ours[ties][i] for ties in kinds], expected, atol=1e-12)


@given(retrieval_sets(most=300, few_bits=True), st.sampled_from(["k", "hits"]), st.data())
@settings(deadline=None, max_examples=60)
def test_any_order_lies_between_the_extremes(sets, denominator, data):
    N = data.draw(st.integers(1, len(sets[1])) | st.none())
    ap = {ties: average_precision(*sets, [N], ties=ties, denominator=denominator)[N] for ties in TIES}
    for inner in "expected", "order":
        assert (ap["lowest"] <= ap[inner] + 1e-12).all() and (ap[inner] <= ap["highest"] + 1e-12).all()
    assert (ap["lowest"] >= 0).all() and (ap["highest"] <= 1 + 1e-12).all()


@given(retrieval_sets(most=100), st.sampled_from(["k", "hits"]), st.data())
@settings(deadline=None, max_examples=30)
def test_database_order_changes_only_ties_by_order(sets, denominator, data):
    q, db, y_q, y_db = sets
    shuffled = np.array(data.draw(st.permutations(range(len(db)))))
    for ties in ("expected", *EXTREMES):
        options = dict(ks=[1, None], ties=ties, denominator=denominator)
        before = average_precision(q, db, y_q, y_db, **options)
        after = average_precision(q, db[shuffled], y_q, y_db[shuffled], **options)
        for N in before:
            np.testing.assert_array_equal(before[N], after[N])


@pytest.mark.parametrize("denominator", ["k", "hits"])
def test_expected_ap_equals_random_draws_at_a_realistic_size(denominator):
    rng = np.random.default_rng(1)
    q, db = random_codes(rng, (1, 1500), 2)
    y_db, N = rng.integers(0, 5, 1500), 100
    d, rel = unpacked_distances(q, db)[0], (y_db == 3)
    sample = []
    for _ in range(4000):
        order = np.lexsort((rng.random(1500), d))
        sample.append(ranking_ap(rel[order].astype(int), N, denominator))
    ours = map_at_k(q, db, [3], y_db, [N], denominator=denominator)[N]
    assert abs(ours - np.mean(sample)) < 4 * np.std(sample) / len(sample) ** 0.5


def test_whole_database_by_hits_is_scikit_learns_average_precision_without_ties():
    # item i is i+1 bits away from the zero code
    db = np.packbits(np.tril(np.ones((64, 64), np.uint8)), axis=1)
    rel = np.random.default_rng(2).random(64) < 0.3
    query = np.zeros((1, 8), np.uint8)
    ours = average_precision(query, db, [1], rel.astype(int), [None], denominator="hits")[None]
    np.testing.assert_allclose(ours, average_precision_score(rel, -np.arange(64)), atol=1e-12)


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("denominator", ["k", "hits"])
def test_one_hot_rows_mean_the_same_as_class_numbers(ties, denominator):
    rng = np.random.default_rng(3)
    q, db = random_codes(rng, (20, 300), 4)
    y_q, y_db = rng.integers(0, 70, 20), rng.integers(0, 70, 300)  # 70 classes need two words
    hot = np.eye(70)
    options = dict(ks=[7, None], ties=ties, denominator=denominator)
    assert map_at_k(q, db, y_q, y_db, **options) == map_at_k(q, db, hot[y_q], hot[y_db], **options)


@pytest.mark.parametrize("names", [(0, 1, 2), (1, 2, 3), (7, -4, 0)])
def test_one_column_of_class_numbers(names):
    "As many files have them: the classes' names change nothing, and the column means what its numbers mean."
    rng = np.random.default_rng(3)
    codes, labels = random_codes(rng, (20, 300), 4), [rng.integers(0, 3, n) for n in (20, 300)]
    renamed = [np.array(names)[y] for y in labels]
    expected = map_at_k(*codes, *labels, ks=[5, None])
    assert map_at_k(*codes, *renamed, ks=[5, None]) == expected
    assert map_at_k(*codes, *(y[:, None] for y in renamed), ks=[5, None]) == expected


@pytest.mark.parametrize("names", [(0, 1), (1, -1), (1, 1)])
def test_one_column_of_two_meanings_is_refused(names):
    rng = np.random.default_rng(3)
    codes = random_codes(rng, (4, 30), 4)
    columns = [np.array(names)[np.arange(n) % 2][:, None] for n in (4, 30)]
    with pytest.raises(
        ValueError, match="query_labels, db_labels: expected class numbers from 1, or a column"
    ):
        map_at_k(*codes, *columns, ks=[5])


def test_multi_hot_relevance_is_at_least_one_shared_label():
    rng = np.random.default_rng(4)
    q, db = random_codes(rng, (9, 200), 2)
    hot_q, hot_db = (rng.random((m, 33)) < 0.06 for m in (9, 200))
    counts, relevant = distance_histograms(*(torch.from_numpy(v) for v in (q, db, hot_q, hot_db)))
    d, rel = unpacked_distances(q, db), hot_q.astype(int) @ hot_db.T.astype(int) > 0
    for i in range(9):
        np.testing.assert_array_equal(counts[i], np.bincount(d[i], minlength=17))
        np.testing.assert_array_equal(relevant[i], np.bincount(d[i][rel[i]], minlength=17))


def test_order_does_not_depend_on_the_tiles():
    rng = np.random.default_rng(5)
    q, db = random_codes(rng, (3000, 2000), 2)  # 3000 x 2000 ranks: two tiles
    y_q, y_db = rng.integers(0, 9, 3000), rng.integers(0, 9, 2000)
    whole = average_precision(q, db, y_q, y_db, [None], ties="order")[None]
    some = average_precision(q[1490:1510], db, y_q[1490:1510], y_db, [None], ties="order")[None]
    np.testing.assert_array_equal(whole[1490:1510], some)


def test_precision_recall_ends_at_chance_and_full_recall():
    q, db = random_codes(np.random.default_rng(6), (10, 50), 3)
    precision, recall = precision_recall(q, db, [0] * 10, [0] * 20 + [1] * 30)
    assert precision.shape == recall.shape == (25,)
    assert precision[-1] == pytest.approx(0.4) and recall[-1] == 1 and (np.diff(recall) >= 0).all()


CODES, LABELS = np.zeros((4, 2), np.uint8), np.arange(4)
GOOD = dict(query_codes=CODES, db_codes=CODES, query_labels=LABELS, db_labels=LABELS, ks=[2])
BAD = [
    (dict(query_codes=CODES.astype(float)), "query_codes: expected packed codes, uint8"),
    (dict(db_codes=CODES[0]), "db_codes: expected packed codes, uint8"),
    (dict(db_codes=CODES[:0]), "db_codes: expected at least one video"),
    (dict(query_codes=CODES[:, :0]), "query_codes: expected at least one video with at least 8 bits"),
    (dict(query_codes=CODES[:, :1]), "query_codes: expected codes of 16 bits, as in db_codes, found 8 bits"),
    (dict(query_labels=LABELS[:3]), "query_labels: expected 4 rows, one a code, found 3"),
    (dict(db_labels=LABELS[:3]), "db_labels: expected 4 rows"),
    (dict(db_labels=LABELS + 0.5), "db_labels: expected int"),
    (dict(db_labels=np.eye(4)), "query_labels: expected shape"),
    (dict(query_labels=np.eye(4), db_labels=np.eye(5)[:4]), "query_labels: expected shape"),
    (
        dict(query_labels=np.eye(4), db_labels=np.eye(4) * 2),
        "db_labels: expected multi-hot labels of 0 and 1",
    ),
    (dict(ks=[0]), "ks: expected cuts of 1..4"),
    (dict(ks=[5]), "ks: expected cuts of 1..4"),
    (dict(ks=[2.5]), "ks: expected cuts of 1..4"),
    (dict(ks=[]), "ks: expected at least one cut"),
    (dict(ks=2), "ks: expected a list of cuts, found 2"),
    (dict(ties="best"), "ties: expected one of"),
    (dict(denominator="N"), "denominator: expected one of"),
    (dict(empty="nan"), "empty: expected one of"),
    (
        dict(query_labels=LABELS + 9, empty="skip"),
        "db_labels: expected an item relevant to at least one query",
    ),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        map_at_k(**{**GOOD, **change})


def test_a_search_deeper_than_the_database_is_named():
    with pytest.raises(ValueError, match="top: expected 1..4"):
        hamming_search(CODES, CODES, 5)
