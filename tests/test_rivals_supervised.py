"Rivals with labels, against other formulations: gradients, dense matrices, another eigenproblem."

import numpy as np
import pytest
import torch

from s5vh_nb.datasets.splits import Split
from s5vh_nb.datasets.synthetic import synthetic_pairs
from s5vh_nb.models import supervised_pairs
from s5vh_nb.models.baselines import balance, fit_matrix
from s5vh_nb.models.methods import RIVALS, fit_baseline

NAMES = ("fomh", "mfkh", "dmvh", "sapmh", "fdmh", "dcmvh")
DATA = synthetic_pairs("mirflickr25k")
PAIRS = DATA.train.take(slice(200))
X, _ = fit_matrix(PAIRS, "pair", 0)
DI = PAIRS.image.shape[1]
VIEWS = np.split(X * balance(X, DI), [DI], axis=1)
LABELS = PAIRS.labels.astype(float)
S = 2 * LABELS @ LABELS.T - 1


@pytest.mark.parametrize("name", NAMES)
def test_a_code_depends_on_the_pair_and_the_seed_alone(name):
    hasher = fit_baseline(name, PAIRS, 24, "pair", 3)
    codes = hasher.encode(*DATA.query.take(slice(40)).arrays)
    np.testing.assert_array_equal(hasher.encode(*DATA.query.take(slice(7, 9)).arrays), codes[7:9])
    again = fit_baseline(name, PAIRS, 24, "pair", 3)
    np.testing.assert_array_equal(again.encode(*DATA.query.take(slice(40)).arrays), codes)
    assert again.objective == hasher.objective and np.isfinite(hasher.objective).all()
    assert 0 < np.unpackbits(codes, axis=1).mean() < 1
    other = fit_baseline(name, PAIRS, 24, "pair", 4)
    assert (other.encode(*DATA.query.take(slice(40)).arrays) != codes).any()


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_needed(name):
    without = Split(PAIRS.inputs, None, "pairs without labels")
    with pytest.raises(ValueError, match="labels to learn from"):
        fit_baseline(name, without, 16, "pair")


@pytest.mark.parametrize("name", NAMES)
def test_labels_in_another_order_give_other_codes(name):
    mixed = np.random.default_rng(0).permutation(200)
    codes = [RIVALS[name].fit(VIEWS, labels, 16, 0).function(VIEWS) > 0 for labels in (LABELS, LABELS[mixed])]
    assert (codes[0] != codes[1]).mean() > 0.01


@pytest.mark.parametrize("name", ("dmvh", "fdmh"))
@pytest.mark.parametrize("bits", (8, 48))
@pytest.mark.parametrize("seed", (0, 1))
def test_where_it_is_proved_the_objective_never_rises(name, bits, seed):
    objective = np.array(RIVALS[name].fit(VIEWS, LABELS, bits, seed).objective)
    assert len(objective) > 1 and (np.diff(objective) <= 1e-9 * objective[:-1]).all()


def test_more_bits_than_anchors_are_refused():
    with pytest.raises(ValueError, match="bits: expected at most 40 for MFKH on these pairs, found 64"):
        fit_baseline("mfkh", PAIRS.take(slice(40)), 64, "pair")


def tensors(rng, *shapes):
    return [torch.tensor(rng.normal(size=shape), requires_grad=True) for shape in shapes]


def no_slope(value, tensor, at):
    "The gradient of `value` in `tensor` is 0 at `at`, and not 0 nearby."
    slopes = []
    for point in (at, at + 0.1):
        tensor.data = torch.tensor(point)
        slopes.append(torch.autograd.grad(value(), tensor)[0].abs().max().item())
    assert slopes[0] < 1e-7 * slopes[1], slopes


def test_fomh_solves_for_each_unknown():
    rng, bits = np.random.default_rng(0), 12
    alpha, beta = 1e-3, 0.1
    mu, gamma = (0.3, 0.7), 1e-2
    phis, B = [rng.normal(size=(200, 30)) for _ in range(2)], np.sign(rng.normal(size=(200, bits)))
    D, *Ws = tensors(rng, (200, bits), (30, bits), (30, bits))
    similar = torch.tensor(S)

    def value():
        near = sum(
            ((torch.tensor(B) - torch.tensor(phi) @ W) ** 2).sum() / m for phi, W, m in zip(phis, Ws, mu)
        )
        products = ((torch.tensor(B) @ D.T - bits * similar) ** 2).sum()
        size = sum((W**2).sum() for W in Ws)
        return near + alpha * products + beta * ((torch.tensor(B) - D) ** 2).sum() + gamma * size

    arrays = (D.detach().numpy(), phis, [W.detach().numpy() for W in Ws], mu, LABELS, alpha, beta, gamma)
    assert np.isclose(supervised_pairs._fomh_objective(B, *arrays), value().item())
    no_slope(value, D, supervised_pairs._fomh_reals(B, LABELS, alpha, beta))
    sums = [phi.T @ phi for phi in phis], [phi.T @ B for phi in phis]
    for W, found in zip(Ws, supervised_pairs._projections(*sums, np.array(mu) * gamma)):
        no_slope(value, W, found)


def test_fomh_sums_remember_all_batches():
    "W of the last round is that of all batches at once, given their codes."
    rng = np.random.default_rng(0)
    phi, B = rng.normal(size=(200, 30)), np.sign(rng.normal(size=(200, 12)))
    halves = slice(0, 100), slice(100, 200)
    sums = [sum(phi[half].T @ phi[half] for half in halves)], [sum(phi[half].T @ B[half] for half in halves)]
    found = supervised_pairs._projections(*sums, [0.5 * 1e-2])[0]
    wide = np.concatenate([phi, np.sqrt(0.5 * 1e-2) * np.eye(30)])
    np.testing.assert_allclose(
        found, np.linalg.lstsq(wide, np.concatenate([B, np.zeros((30, 12))]))[0], atol=1e-9
    )


def test_mfkh_is_the_eigenproblem_after_whitening():
    "As the authors solve it: whiten the covariance, then the eigenvectors of the smallest eigenvalues."
    rng = np.random.default_rng(0)
    K, K_anchors = rng.normal(size=(200, 30)), np.eye(30)
    L = supervised_pairs._label_laplacian(VIEWS, LABELS)
    W = supervised_pairs._mfkh_projection(K, K_anchors, L, 8, 1.0)
    values, vectors = np.linalg.eigh(np.cov(K.T, bias=True))
    white = vectors / np.sqrt(values)
    cost = K.T @ L.toarray() @ K + K_anchors
    by_hand = white @ np.linalg.eigh(white.T @ cost @ white)[1][:, :8]
    np.testing.assert_allclose(np.abs(W), np.abs(by_hand), atol=1e-5)


def test_the_graph_by_its_definition():
    L = supervised_pairs._label_laplacian(VIEWS, LABELS, 3).toarray()
    x = np.concatenate([view / np.linalg.norm(view, axis=1, keepdims=True) for view in VIEWS], axis=1)
    joined = np.zeros((200, 200), bool)
    for i in range(200):
        alike = [j for j in range(200) if j != i and LABELS[i] @ LABELS[j] > 0]
        for j in sorted(alike, key=lambda j: np.square(x[i] - x[j]).sum())[:3]:
            joined[i, j] = joined[j, i] = True
    np.testing.assert_array_equal(joined, (L != 0) & ~np.eye(200, dtype=bool))


def test_sapmh_solves_for_each_unknown():
    rng, bits = np.random.default_rng(0), 12
    mu, lam = (0.3, 0.7), 0.1
    theta, rho = 1e-2, 1e-3
    phis, B = [rng.normal(size=(200, 30)) for _ in range(2)], np.sign(rng.normal(size=(200, bits)))
    H, W, *Us = tensors(rng, (200, 16), (16, bits), (16, 30), (16, 30))
    codes, similar = torch.tensor(B), torch.tensor(S)

    def value():
        views = sum(m * ((torch.tensor(phi) - H @ U) ** 2).sum() for phi, U, m in zip(phis, Us, mu))
        near = theta * ((codes - H @ W) ** 2).sum() + rho * ((codes @ (H @ W).T - bits * similar) ** 2).sum()
        return views + near + lam * sum((U**2).sum() for U in Us)

    wanted = theta * B + rho * bits * S @ B
    bases = [U.detach().numpy().copy() for U in Us]
    start = W.detach().numpy().copy()
    common = supervised_pairs._sapmh_common(phis, bases, start, B, wanted, mu, theta, rho)
    no_slope(value, H, common)
    H.data = torch.tensor(common)
    no_slope(value, W, supervised_pairs._sapmh_projection(common, B, wanted, theta, rho))
    for U, found in zip(Us, supervised_pairs._sapmh_bases(phis, common, mu, lam)):
        no_slope(value, U, found)


def test_sapmh_weights_stand_for_the_norms():
    "At the same point, gradients of m ||x||^2 with m = 1 / (2 ||x||) are those of ||x||."
    x = torch.tensor(np.random.default_rng(0).normal(size=(20, 5)), requires_grad=True)
    m = 1 / (2 * x.detach().norm())
    slopes = [torch.autograd.grad(value, x)[0] for value in (m * (x**2).sum(), x.norm())]
    torch.testing.assert_close(*slopes)
