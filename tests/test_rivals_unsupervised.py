"""MFH, MAH, MVLH and MvDH: their steps against independent formulations, and what their codes are worth."""

from itertools import product

import numpy as np
import pytest
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

from s5vh_nb.datasets.catalog import load
from s5vh_nb.models import unsupervised_pairs as unsupervised
from s5vh_nb.models.baselines import balance, fit_matrix
from s5vh_nb.models.methods import RIVALS, fit_baseline
from s5vh_nb.models.multiview import neighbour_weights
from s5vh_nb.search.scores import average_precision

EMOJI = load("emoji")
X, DI = fit_matrix(EMOJI.train.take(slice(200)), "pair", 0)[0], EMOJI.widths["di"]
VIEWS = np.split(X * balance(X, DI), [DI], axis=1)  # of 200 pairs
METHODS = ("mfh", "mah", "mvlh", "mvdh")


def random_codes(n, k, seed=0):
    return np.where(np.random.default_rng(seed).random((n, k)) < 0.5, -1.0, 1.0)


def mean_ap(hasher):
    codes = [hasher.encode(*split.arrays) for split in (EMOJI.query, EMOJI.database)]
    labels = EMOJI.query.labels, EMOJI.database.labels
    return average_precision(*codes, *labels, (None,), denominator="hits")[None].mean()


@pytest.mark.parametrize("method", METHODS)
def test_codes_are_far_better_than_chance_and_each_pair_has_its_own(method):
    hasher = fit_baseline(method, EMOJI.train, 32, "pair")
    shuffled = [x[::-1] for x in EMOJI.database.arrays]
    codes = hasher.encode(*EMOJI.database.arrays)
    np.testing.assert_array_equal(hasher.encode(*shuffled), codes[::-1])
    assert 0.3 < np.unpackbits(codes, axis=1).mean() < 0.7
    assert mean_ap(hasher) > 0.25  # random codes: 0.14


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides_the_codes(method):
    fits = [RIVALS[method].fit(VIEWS, None, 16, seed) for seed in (0, 0, 1)]
    codes = [fit.function(VIEWS) > 0 for fit in fits]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert fits[0].objective == fits[1].objective
    assert (codes[0] == codes[2]).all() == (method == "mfh")  # MFH has no random start


@pytest.mark.parametrize("bits", [1, 8, 32, 100])
@pytest.mark.parametrize("method", ["mvlh", "mvdh"])
def test_the_objective_never_rises(method, bits):
    values = np.array(RIVALS[method].fit(VIEWS, None, bits, 3).objective)
    assert len(values) > 1 and (np.diff(values) <= 1e-9 * values[:-1]).all()


@pytest.mark.parametrize("bits", [2, 16, 64])
def test_mah_ends_far_below_its_start(bits):
    values = np.array(RIVALS["mah"].fit(VIEWS, None, bits, 3).objective)
    assert (np.diff(values[12:]) <= 0).all() and values[-1] < values[0] / 2


def test_mah_steps_follow_the_gradient():
    "V times the quotient: the gradient's positive part below, the negative part above."
    rng = np.random.default_rng(0)
    gamma, eta = 3.0, 0.7
    kernels = [rbf_kernel(v, gamma=1 / euclidean_distances(v).mean() ** 2).astype(float) for v in VIEWS]
    graphs = [neighbour_weights(v, 5) for v in VIEWS]
    now = unsupervised._Mah(*rng.random((2, 200, 6)), np.array([0.3, 0.7]))
    G = np.array([[np.trace(K @ other) for other in kernels] for K in kernels])
    after = unsupervised._mah_step(now, kernels, G, graphs, gamma, eta)
    entries = np.arange(10), np.arange(10) % 6
    K, W = (0.3 * first + 0.7 * second for first, second in (kernels, [w.toarray() for w in graphs]))
    D = np.diag(W.sum(1))

    def objective(U, V):
        smooth = np.trace(V.T @ (D - W) @ V)
        return np.square(K - V @ U.T).sum() + gamma * smooth + eta * np.square(U.T @ U - np.eye(6)).sum()

    def slope(now, name):
        "By differences, for ten of the entries."
        out = []
        for entry in zip(*entries):
            values = []
            for step in (1e-4, -1e-4):
                moved = now._asdict()[name].copy()
                moved[entry] += step
                moved = now._replace(**{name: moved})
                values.append(objective(moved.U, moved.V))
            out.append((values[0] - values[1]) / 2e-4)
        return np.array(out)

    U, V = now.U, now.V
    below = (V @ U.T @ U + gamma * D @ V)[entries]  # half of the gradient's positive part
    expected = V[entries] * (1 - slope(now, "V") / 2 / below)
    np.testing.assert_allclose(after.V[entries], expected, rtol=1e-5)
    V = after.V
    below = (U @ V.T @ V + 2 * eta * U @ U.T @ U)[entries]
    expected = U[entries] * (1 - slope(now._replace(V=V), "U") / 2 / below)
    np.testing.assert_allclose(after.U[entries], expected, rtol=1e-5)


def test_one_sweep_after_another_ends_at_the_best_code_of_orthogonal_factors():
    "With orthogonal rows of U the bits do not interact: the best of all 16 codes, for every item."
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.normal(size=(20, 4)))[0].T * [[1], [2], [3], [4]]
    x = rng.normal(size=(50, 20))
    codes = random_codes(50, 4)
    unsupervised._improve(codes, [x], [U], [1.0], 10)
    every = np.array(list(product((-1.0, 1.0), repeat=4)))
    best = every[np.square(x[:, None] - every @ U).sum(2).argmin(1)]
    np.testing.assert_array_equal(codes, best)


def test_mvdh_without_its_clusters_is_a_binary_factorisation():
    "With alpha = 0 and one view twice, the codes are those of that view alone."
    x = VIEWS[0].astype(float) - VIEWS[0].mean(0)
    graph = unsupervised._anchor_graph(x, np.random.default_rng(0), 50)
    F = unsupervised._clusters(graph, 5, 0)
    codes, alone = random_codes(200, 12), random_codes(200, 12)
    now = unsupervised._Mvdh([], F, np.full(2, 0.5))
    for _ in range(4):
        unsupervised._mvdh_step(codes, now, [x, x], graph, 0.0, 1e-3, 1e6, 1e-2, 100.0)
        unsupervised._improve(alone, [x], [unsupervised._factors(alone, x, 1e-2)], [1.0], 20)
    np.testing.assert_array_equal(codes, alone)


def test_mvdh_moves_its_clusters_as_the_dense_formula_does():
    xs = [view.astype(float) - view.mean(0) for view in VIEWS]
    rng, weights = np.random.default_rng(0), dict(alpha=0.2, beta=0.3, gamma=5.0, delta=1e-2)
    graph = unsupervised._anchor_graph(np.concatenate(xs, axis=1), rng, 50)
    F = unsupervised._clusters(graph, 5, 0) + 0.01
    codes = random_codes(200, 12)
    now = unsupervised._Mvdh([], F, np.full(2, 0.5))
    after = unsupervised._mvdh_step(codes, now, xs, graph, **weights, weigh=100.0)
    L = np.eye(200) - (graph @ graph.T).toarray()
    inner = np.linalg.inv(codes.T @ codes + 1e-2 * np.eye(12))
    M = L + 0.2 / 0.3 * (np.eye(200) - codes @ inner @ codes.T)
    expected = F * 5 * F / (0.3 * M @ F + 5 * F @ F.T @ F)
    assert (expected > 0).all()
    np.testing.assert_allclose(after.F, expected, rtol=1e-6)
    assert after.theta.sum() == pytest.approx(1) and (after.theta >= 0).all()


def test_a_small_training_set_has_fewer_anchors_and_clusters():
    few = [view[:20] for view in VIEWS]
    for method in METHODS:
        assert RIVALS[method].fit(few, None, 8, 0).function(few).shape == (20, 8)
