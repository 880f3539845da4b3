"""Retrieval against oracles that share no code with it: brute force, faiss, scikit-learn, random draws."""

import itertools
import re

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.metrics import average_precision_score, precision_recall_curve

from s5vh_nb.evidence.statistics import interval, near, paired_bootstrap
from s5vh_nb.models.codes import pack, relax, sign_ste, unpack
from s5vh_nb.search import scores
from s5vh_nb.search.hamming import (
    hamming_distances,
    hamming_distances_by_definition,
    hamming_search,
    radius_search,
)
from s5vh_nb.search.scores import (
    TIES,
    average_precision,
    average_precision_by_definition,
    distance_histograms,
    gmap,
    histogram_ap,
    map_at_k,
    precision_at_k,
    precision_recall,
    precision_recall_by_rank,
    recall_at_k,
)

EXTREMES = "lowest", "highest"
DENOMINATORS = "k", "hits", "relevant"


def unpacked_distances(q, db):
    return (np.unpackbits(q, axis=1)[:, None] != np.unpackbits(db, axis=1)[None]).sum(2)


def ranking_ap(rel, N, denominator):
    "One ranking of 0/1 in numpy."
    precision = np.cumsum(rel) / np.arange(1, len(rel) + 1)
    by = {"k": N, "hits": rel[:N].sum(), "relevant": min(N, rel.sum())}
    return float((rel * precision)[:N].sum() / max(1, by[denominator]))


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


@given(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.sampled_from(DENOMINATORS), st.data())
@settings(deadline=None, max_examples=60)
def test_the_definition_equals_another_formulation(relevance, denominator, data):
    N = data.draw(st.integers(1, len(relevance)))
    expected = ranking_ap(np.array(relevance), N, denominator)
    assert average_precision_by_definition(relevance, N, denominator) == pytest.approx(expected, abs=1e-12)
    whole = average_precision_by_definition(relevance, None, denominator)
    assert whole == average_precision_by_definition(relevance, len(relevance), denominator)


@given(retrieval_sets(most=40, few_bits=True), st.sampled_from(DENOMINATORS), st.data())
@settings(deadline=None, max_examples=60)
def test_ties_by_order_are_the_definition_on_a_stable_ranking(sets, denominator, data):
    q, db, y_q, y_db = sets
    N = data.draw(st.integers(1, len(db)) | st.none())
    ours = average_precision(*sets, [N], ties="order", denominator=denominator)[N]
    for i, distances in enumerate(hamming_distances_by_definition(q, db)):
        relevance = (y_db == y_q[i])[np.argsort(distances, kind="stable")].astype(int).tolist()
        expected = average_precision_by_definition(relevance, N, denominator)
        assert ours[i] == pytest.approx(expected, abs=1e-12)


@given(retrieval_sets(most=7, few_bits=True), st.sampled_from(DENOMINATORS), st.data())
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


@given(retrieval_sets(most=300, few_bits=True), st.sampled_from(DENOMINATORS), st.data())
@settings(deadline=None, max_examples=60)
def test_any_order_lies_between_the_extremes(sets, denominator, data):
    N = data.draw(st.integers(1, len(sets[1])) | st.none())
    ap = {ties: average_precision(*sets, [N], ties=ties, denominator=denominator)[N] for ties in TIES}
    for inner in "expected", "order":
        assert (ap["lowest"] <= ap[inner] + 1e-12).all() and (ap[inner] <= ap["highest"] + 1e-12).all()
    assert (ap["lowest"] >= 0).all() and (ap["highest"] <= 1 + 1e-12).all()


@given(retrieval_sets(most=100), st.sampled_from(DENOMINATORS), st.data())
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


def without_ties():
    "A query, its database, whose item i is i+1 bits away from it, and the labels of both."
    db = np.packbits(np.tril(np.ones((64, 64), np.uint8)), axis=1)
    return np.zeros((1, 8), np.uint8), db, [1], (np.random.default_rng(2).random(64) < 0.3).astype(int)


@pytest.mark.parametrize("denominator", ["hits", "relevant"])
def test_the_whole_database_has_scikit_learns_average_precision_without_ties(denominator):
    data = without_ties()
    ours = average_precision(*data, [None], denominator=denominator)[None]
    np.testing.assert_allclose(ours, average_precision_score(data[-1], -np.arange(64)), atol=1e-12)


@pytest.mark.parametrize("ties", TIES)
def test_the_curve_by_rank_is_scikit_learns_without_ties(ties):
    data = without_ties()
    theirs = precision_recall_curve(data[-1], -np.arange(64.0))[:2]  # from all items to none
    for ours, curve in zip(precision_recall_by_rank(*data, ties=ties), theirs):
        np.testing.assert_allclose(ours, curve[-2::-1], atol=1e-12)


@given(retrieval_sets(most=7, few_bits=True), st.data())
@settings(deadline=None, max_examples=60)
def test_precision_and_recall_equal_brute_force(sets, data):
    q, db, y_q, y_db = sets
    N = data.draw(st.integers(1, len(db)))
    kinds = "expected", *EXTREMES
    ours = {ties: [f(*sets, [N], ties=ties)[N] for f in (precision_at_k, recall_at_k)] for ties in kinds}
    for i, d in enumerate(unpacked_distances(q, db)):
        rankings = list(orders(d, y_q[i] == y_db))
        for which, by in enumerate((N, max(1, rankings[0].sum()))):
            values = [r[:N].sum() / by for r in rankings]
            expected = [np.mean(values), min(values), max(values)]
            np.testing.assert_allclose([ours[ties][which][i] for ties in kinds], expected, atol=1e-12)


@given(retrieval_sets(most=40, few_bits=True), st.data())
@settings(deadline=None, max_examples=60)
def test_precision_and_recall_by_order_are_those_of_a_stable_ranking(sets, data):
    q, db, y_q, y_db = sets
    N = data.draw(st.integers(1, len(db)) | st.none())
    precision, recall = (f(*sets, [N], ties="order")[N] for f in (precision_at_k, recall_at_k))
    for i, distances in enumerate(unpacked_distances(q, db)):
        relevance = (y_db == y_q[i])[np.argsort(distances, kind="stable")]
        assert precision[i] == pytest.approx(relevance[:N].mean())
        assert recall[i] == pytest.approx(relevance[:N].sum() / max(1, relevance.sum()))


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("empty", ["zero", "skip"])
def test_the_curve_by_rank_is_the_mean_of_every_cut(ties, empty):
    q, db = random_codes(np.random.default_rng(8), (300, 40), 1)  # two tiles of queries
    y_q, y_db = np.arange(300) % 5, np.arange(40) % 4  # nothing is relevant to a fifth of the queries
    options = dict(ties=ties, empty=empty)
    curves = precision_recall_by_rank(q, db, y_q, y_db, **options)
    for f, curve in zip((precision_at_k, recall_at_k), curves):
        values = f(q, db, y_q, y_db, range(1, 41), **options).values()
        np.testing.assert_allclose(curve, [np.nanmean(v) for v in values], atol=1e-12)
        assert np.isnan(next(iter(values))).sum() == (60 if empty == "skip" else 0)


@given(retrieval_sets(most=100), st.integers(0, 170))
@settings(deadline=None, max_examples=60)
def test_radius_search_is_faiss_with_the_next_radius(sets, radius):
    q, db = sets[:2]
    ours = radius_search(q, db, radius)
    index = faiss.IndexBinaryFlat(8 * db.shape[1])
    index.add(db)
    limits, distances, ids = index.range_search(q, radius + 1)
    np.testing.assert_array_equal(ours.limits, limits.astype(int))
    rows = np.repeat(np.arange(len(q)), np.diff(ours.limits))
    nearest_first = np.lexsort((ids, distances, rows))
    np.testing.assert_array_equal(ours.ids, ids[nearest_first])
    np.testing.assert_array_equal(ours.distances, distances[nearest_first])


@pytest.mark.parametrize("k", [1, 7, 12, 36, 48])
def test_codes_of_any_length_have_the_scores_of_their_bits(k):
    rng = np.random.default_rng(k)
    bits = [rng.integers(0, 2, (m, k)) for m in (20, 200)]
    q, db = (np.packbits(b, axis=1) for b in bits)
    labels = rng.integers(0, 4, 20), rng.integers(0, 4, 200)
    d = (bits[0][:, None] != bits[1]).sum(2)
    np.testing.assert_array_equal(hamming_distances(q, db), d)
    np.testing.assert_array_equal(hamming_search(q, db, 50)[1], np.argsort(d, axis=1, kind="stable")[:, :50])
    for counts, chosen in zip(
        distance_histograms(q, db, *labels, bits=k), (d >= 0, labels[0][:, None] == labels[1])
    ):
        expected = [np.bincount(row[some], minlength=k + 1) for row, some in zip(d, chosen)]
        np.testing.assert_array_equal(counts, expected)
    precision, recall = precision_recall(q, db, *labels, bits=k)
    assert precision.shape == recall.shape == (k + 1,) and recall[-1] == 1 > recall[k // 4]


def test_padding_that_is_not_zero_is_named():
    codes = np.array([[255, 255]], np.uint8)
    for change in (dict(query_codes=codes), dict(db_codes=codes)):
        data = dict(query_codes=codes & 0xF0, db_codes=codes & 0xF0, query_labels=[0], db_labels=[0]) | change
        with pytest.raises(ValueError, match=f"{next(iter(change))}: expected zeros after the 12 bits"):
            distance_histograms(**data, bits=12)
    for bits in (8, 17, 0, True, 12.0):
        with pytest.raises(ValueError, match="bits: expected"):
            precision_recall(codes, codes, [0], [0], bits=bits)


def test_arrays_and_tensors_are_alike():
    rng = np.random.default_rng(9)
    real, (q, db) = rng.standard_normal((5, 20)), random_codes(rng, (6, 30), 2)
    for f, x in ((sign_ste, real), (lambda x: relax(x, "tanh"), real), (pack, real), (unpack, q)):
        assert torch.equal(f(x), f(torch.from_numpy(x)))
    hot = [np.eye(3)[rng.integers(0, 3, m)] for m in (6, 30)]
    arrays = q, db, *hot
    codes = [torch.from_numpy(v) for v in (q, db)]
    tensors = *codes, torch.from_numpy(hot[0]).requires_grad_(), torch.from_numpy(hot[1]).bfloat16()
    for f in (hamming_distances, hamming_distances_by_definition):
        np.testing.assert_array_equal(f(*codes), f(q, db))
    for f in (lambda q, db: hamming_search(q, db, 9), lambda q, db: radius_search(q, db, 5)):
        for one, other in zip(f(*codes), f(q, db)):
            np.testing.assert_array_equal(one, other)
    for f in (average_precision, precision_at_k, recall_at_k):
        for one, other in zip(f(*tensors, torch.tensor([3, 9])).values(), f(*arrays, [3, 9]).values()):
            np.testing.assert_array_equal(one, other)
    for f in (precision_recall, precision_recall_by_rank, distance_histograms):
        for one, other in zip(f(*tensors), f(*arrays)):
            np.testing.assert_array_equal(one, other)
    counts = distance_histograms(*arrays)
    assert torch.equal(histogram_ap(*counts, 9), histogram_ap(*(c.numpy() for c in counts), 9))
    values = torch.rand(3, 9, requires_grad=True)
    for f in (lambda x: interval(x[0]), lambda x: paired_bootstrap(x, x.flip(1)), lambda x: near(x[0])):
        np.testing.assert_array_equal(f(values), f(values.detach()))
    assert gmap(torch.tensor([0.5, 0.125], requires_grad=True)) == gmap([0.5, 0.125])
    ones = np.ones(300, np.uint8)  # their sum does not fit into a byte
    for relevance in (ones, torch.from_numpy(ones), ones > 0, ones.astype(float)):
        assert average_precision_by_definition(relevance, None, "hits") == 1.0


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("denominator", DENOMINATORS)
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
    (dict(query_codes=CODES[:, :0]), "query_codes: expected at least one video with at least one byte"),
    (dict(query_codes=CODES[:, :1]), "query_codes: expected codes of 2 bytes, as in db_codes, found 1 bytes"),
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
    (dict(ks=[True]), "ks: expected cuts of 1..4"),
    (dict(ks=[-1]), "ks: expected cuts of 1..4"),
    (dict(ks="12"), "ks: expected cuts of 1..4"),
    (dict(ks=np.array(2)), "ks: expected a list of cuts, found 2"),
    (dict(query_codes=CODES.tolist()), "query_codes: expected packed codes, uint8"),
    (dict(query_codes=[[0], [0, 1]]), "query_codes: expected an array, a tensor, or lists of equal length"),
    (dict(query_labels=[[0], [0, 1]]), "query_labels: expected an array, a tensor, or lists of equal length"),
    (dict(query_labels=np.eye(4)[:, :0], db_labels=np.eye(4)[:, :0]), "query_labels: expected int (videos,)"),
    (dict(query_labels=csr_array(np.eye(4))), "query_labels: expected int (videos,)"),
    (dict(query_labels=2**64 - 1 - LABELS.astype(np.uint64)), "query_labels: expected int (videos,)"),
    (dict(db_labels=2 * np.eye(4) - 1, query_labels=np.eye(4)), "db_labels: expected multi-hot labels of 0"),
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
    with pytest.raises(ValueError, match=re.escape(message)):
        map_at_k(**{**GOOD, **change})


@pytest.mark.parametrize("top", [5, 0, -1, True, 2.0])
def test_a_search_of_another_depth_is_named(top):
    with pytest.raises(ValueError, match="top: expected 1..4"):
        hamming_search(CODES, CODES, top)


@pytest.mark.parametrize("radius", [-1, True, 2.0])
def test_a_radius_that_is_none_is_named(radius):
    with pytest.raises(ValueError, match="radius: expected a whole number of bits, at least 0"):
        radius_search(CODES, CODES, radius)


@pytest.mark.parametrize("score", [precision_at_k, recall_at_k])
def test_bad_input_of_precision_and_recall_is_named(score):
    for change, message in (
        (dict(ks=[True]), "ks: expected cuts"),
        (dict(ties="best"), "ties: expected one of"),
        (dict(empty="nan"), "empty: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            score(**{**GOOD, **change})
    with pytest.raises(ValueError, match="db_labels: expected an item relevant"):
        precision_recall_by_rank(CODES, CODES, LABELS + 9, LABELS, empty="skip")


def test_codes_whose_signs_add_up_to_no_half_are_counted():
    "2049 is no number of half precision, in which a GPU counts shorter codes."
    codes = np.packbits(np.random.default_rng(0).random((9, 2049)) < 0.5, axis=1)
    labels = np.arange(9) % 2
    words = scores._label_words(labels, labels, (9, 9))
    both = scores._histograms_by_product(codes, codes, words, 2049, "cpu")
    counts, relevant = scores.distance_histograms(codes, codes, labels, labels, bits=2049)
    assert torch.equal(both[:, ::2] + both[:, 1::2], counts) and torch.equal(both[:, 1::2], relevant)
