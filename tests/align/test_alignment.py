"""Aligners against scikit-learn, SciPy and explicit formulas, and the invariants of method.md, section 7."""

import functools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from expertsteer_nnsight.align import linear
from expertsteer_nnsight.align.aligner import Aligner
from expertsteer_nnsight.align.autoencoder import AutoencoderAligner
from expertsteer_nnsight.align.closed_form import (
    CovarianceAligner,
    IdentityAligner,
    ProcrustesAligner,
    RidgeAligner,
)
from expertsteer_nnsight.align.controls import PermutedAligner, RandomAligner, permuted_directions

KINDS = ("displacement", "covector")
LINEAR = [
    RidgeAligner(),
    RidgeAligner(alpha=0.1, max_rank=3),
    ProcrustesAligner(),
    ProcrustesAligner(n_components=4, scale=False),
    AutoencoderAligner(),
    CovarianceAligner(),
    PermutedAligner(),
    PermutedAligner(ProcrustesAligner(), random_state=1),
    RandomAligner(),
]
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=15, deadline=None)


def pairs(n=60, d_expert=9, d_target=6, noise=0.5, seed=0):
    """Anchors with a planted linear map W0 and off-centre, unequal scales."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d_expert)) * np.linspace(3, 0.5, d_expert)
    W0 = rng.standard_normal((d_expert, d_target))
    Y = X @ W0 + noise * rng.standard_normal((n, d_target))
    return X + 5, Y - 20, W0


def normed(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def centred(X):
    return X - X.mean(0)


class SquareIdentity(IdentityAligner):
    """scikit-learn's checks pass one column as y, and the identity needs y as wide as X: here X stands in for it."""

    def fit(self, X, y=None):
        return super().fit(X, None if y is None else X)

    def score(self, X, y):
        return super().score(X, X)


@parametrize_with_checks(
    [
        RidgeAligner(),
        RidgeAligner(alpha=0.1, max_rank=1),
        ProcrustesAligner(),
        AutoencoderAligner(),
        AutoencoderAligner(solver="adam", max_epochs=2),
        CovarianceAligner(),
        SquareIdentity(),
        PermutedAligner(),
        RandomAligner(),
    ],
    # the tests' type-checking hook refuses the values that this check gives to __init__; without the hook it passes
    expected_failed_checks=lambda aligner: (
        {"check_do_not_raise_errors_in_init_or_set_params": "typed parameters"} if aligner.get_params() else {}
    ),
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


# The contract


@pytest.mark.parametrize("aligner", [*LINEAR, IdentityAligner()], ids=repr)
def test_same_container_out(aligner):
    X, Y, _ = pairs(d_target=9)
    a = clone(aligner).fit(X, Y)
    b = clone(aligner).fit(torch.as_tensor(X), torch.as_tensor(Y))
    out = b.transform(torch.as_tensor(X, dtype=torch.float32))
    assert isinstance(a.transform(X), np.ndarray) and out.dtype == torch.float32
    assert_allclose(out.numpy(), a.transform(X), rtol=1e-4, atol=1e-4)
    for kind in KINDS:
        one, two = a.map_direction(X[0], kind), b.map_direction(torch.as_tensor(X[:2]), kind)
        assert isinstance(one, np.ndarray) and one.shape == (9,)
        assert isinstance(two, torch.Tensor) and two.shape == (2, 9)
        assert_allclose(one, two[0].numpy(), atol=1e-9)
        assert_allclose(np.linalg.norm(one), 1)
    assert a.score(X, Y) == pytest.approx(b.score(torch.as_tensor(X), torch.as_tensor(Y)))


@pytest.mark.parametrize("aligner", LINEAR, ids=repr)
def test_displacement_is_a_difference_of_transforms(aligner):
    X, Y, _ = pairs()
    v = np.random.default_rng(1).standard_normal((3, 9))
    a = clone(aligner).fit(X, Y)
    moved = a.transform(X[:3] + v) - a.transform(X[:3])
    assert_allclose(a.map_direction(v, "displacement"), normed(moved), atol=1e-9)
    assert_allclose(a.map_direction(-7 * v, "displacement"), -normed(moved), atol=1e-9)


@pytest.mark.parametrize(
    "aligner", [a for a in LINEAR if not isinstance(a, CovarianceAligner | PermutedAligner)], ids=repr
)
def test_covector_reads_the_target_as_it_reads_the_way_back(aligner):
    X, Y, _ = pairs()
    w = np.random.default_rng(1).standard_normal(9)
    a = clone(aligner).fit(X, Y)
    back = centred(Y) @ a.reverse_coef_.numpy()
    w_target = a.map_direction(w, "covector")
    ratio = (back @ w) / (centred(Y) @ w_target)
    assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert ratio[0] > 0


def test_kinds_differ_and_both_are_right_under_an_exact_map():
    X, Y, W0 = pairs(d_target=9, noise=0)
    a = RidgeAligner(alpha=1e-12).fit(X, Y)
    v = np.random.default_rng(2).standard_normal(9)
    assert_allclose(a.map_direction(v, "displacement"), normed(v @ W0), atol=1e-6)
    assert_allclose(a.map_direction(v, "covector"), normed(np.linalg.solve(W0, v)), atol=1e-6)


def test_score_is_pooled_r2():
    X, Y, _ = pairs()
    a = RidgeAligner().fit(X[:40], Y[:40])
    expected = 1 - ((Y[40:] - a.transform(X[40:])) ** 2).sum() / ((Y[40:] - Y[:40].mean(0)) ** 2).sum()
    assert a.score(X[40:], Y[40:]) == pytest.approx(expected)
    assert 0.8 < expected < 1


@pytest.mark.parametrize(
    "aligner", [RidgeAligner(), ProcrustesAligner(), AutoencoderAligner(), CovarianceAligner()], ids=repr
)
@few
@given(seed=seeds, size=st.floats(-1e3, 1e3))
def test_shift_of_the_states_changes_no_direction(aligner, seed, size):
    X, Y, _ = pairs(seed=seed)
    rng = np.random.default_rng(seed)
    v, c, e = rng.standard_normal(9), size * rng.standard_normal(9), size * rng.standard_normal(6)
    a, b = clone(aligner).fit(X, Y), clone(aligner).fit(X + c, Y + e)
    for kind in KINDS:
        assert_allclose(a.map_direction(v, kind), b.map_direction(v, kind), atol=1e-6)
    if not isinstance(aligner, AutoencoderAligner):
        assert_allclose(a.transform(X) + e, b.transform(X + c), atol=1e-6 * (1 + abs(size)))


@pytest.mark.parametrize(
    "aligner", [RidgeAligner(), RidgeAligner(max_rank=2), ProcrustesAligner(), CovarianceAligner()], ids=repr
)
@pytest.mark.parametrize("n", [60, 7])
@few
@given(seed=seeds)
def test_rotations_of_either_space_carry_through(aligner, n, seed):
    X, Y, _ = pairs(n=n, seed=seed)
    rng = np.random.default_rng(seed)
    Q, R = (np.linalg.qr(rng.standard_normal((d, d)))[0] for d in (9, 6))
    v = rng.standard_normal(9)
    a, b = clone(aligner).fit(X, Y), clone(aligner).fit(X @ Q, Y @ R)
    for kind in KINDS:
        assert_allclose(b.map_direction(v @ Q, kind), a.map_direction(v, kind) @ R, atol=1e-6)


def test_errors_say_what_was_found():
    X, Y, _ = pairs()
    with pytest.raises(ValueError, match="expert_states has 60 rows and target_states 59"):
        RidgeAligner().fit(X, Y[:59])
    with pytest.raises(ValueError, match="target_states has NaN or infinity in 1 of 60 rows"):
        RidgeAligner().fit(X, np.where(np.arange(60)[:, None] == 3, np.nan, Y))
    a = RidgeAligner().fit(X, Y)
    with pytest.raises(ValueError, match="width 6, but RidgeAligner was fitted on expert states of width 9"):
        a.map_direction(Y[0], "displacement")
    with pytest.raises(ValueError, match="zero vector"):
        a.map_direction(np.zeros(9), "displacement")
    with pytest.raises(ValueError, match=r"target_states has shape \(60, 5\)"):
        a.score(X, Y[:, :5])
    with pytest.raises(ValueError, match="do not vary"):
        a.score(X[:1], a.target_mean_[None].numpy())
    with pytest.raises(ValueError, match="the expert has 9 and the target 6"):
        IdentityAligner().fit(X, Y)
    with pytest.raises(ValueError, match="from 1 to 6"):
        ProcrustesAligner(n_components=7).fit(X, Y)
    with pytest.raises(ValueError, match="max_rank is 0"):
        RidgeAligner(max_rank=0).fit(X, Y)
    with pytest.raises(ValueError, match=r"alpha is -1\.0"):
        RidgeAligner(alpha=-1.0).fit(X, Y)
    with pytest.raises(ValueError, match="above 0"):
        CovarianceAligner(alpha=0).fit(X, Y)
    with pytest.raises(ValueError, match="equal widths"):
        AutoencoderAligner(init="identity").fit(X, Y)
    with pytest.raises(ValueError, match="width is 4, but target_states has width 6"):
        AutoencoderAligner(width=4).fit(X, Y)
    with pytest.raises(ValueError, match="decoder takes 6"):
        AutoencoderAligner().fit(X, Y).inverse_transform(X)
    with pytest.raises(ValueError, match="at least one draw"):
        permuted_directions(RidgeAligner(), X, Y, X[0], "covector", draws=0)


@pytest.mark.parametrize("aligner", [RidgeAligner(), ProcrustesAligner(), CovarianceAligner()], ids=repr)
def test_a_direction_outside_of_the_anchors_is_refused(aligner):
    X, Y, _ = pairs(n=5)
    outside = scipy.linalg.null_space(centred(X))[:, 0]
    a = clone(aligner).fit(X, Y)
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"The {kind} maps to zero"):
            a.map_direction(outside, kind)


# Ridge


@pytest.mark.parametrize("n", [60, 7], ids=["primal", "dual"])
def test_ridge_is_scikit_learns(n):
    X, Y, _ = pairs(n=n)
    a = RidgeAligner(alpha=0.3).fit(X, Y)
    for source, other, coef in ((X, Y, a.coef_), (Y, X, a.reverse_coef_)):
        penalty = 0.3 * np.trace(centred(source).T @ centred(source)) / source.shape[1]
        ridge = Ridge(alpha=penalty).fit(source, other)
        assert_allclose(coef.numpy(), ridge.coef_.T, atol=1e-10)
        if source is X:
            assert_allclose(a.transform(X), ridge.predict(X), atol=1e-10)
            assert_allclose(a.intercept_.numpy(), ridge.intercept_, atol=1e-10)


@pytest.mark.parametrize("n", [30, 7], ids=["primal", "dual"])
def test_gcv_is_the_hat_matrix_formula(n):
    X, Y, _ = pairs(n=n, noise=3.0)
    grid = np.geomspace(1e-4, 1e2, 13)
    errors = []
    for alpha in grid:
        penalty = alpha * np.trace(centred(X).T @ centred(X)) / 9
        H = centred(X) @ np.linalg.solve(centred(X).T @ centred(X) + penalty * np.eye(9), centred(X).T) + 1 / n
        errors.append(((Y - H @ Y) ** 2).sum() / n / (1 - np.trace(H) / n) ** 2)
    U, s, _ = linear.thin_svd(torch.as_tensor(centred(X)))
    penalties = torch.as_tensor(grid) * (s**2).sum() / 9
    target = torch.as_tensor(centred(Y))
    assert_allclose(linear.gcv_errors(s, U.T @ target, target, penalties).numpy(), errors, rtol=1e-6)
    a = RidgeAligner(alpha_range=(1e-4, 1e2), n_alphas=13).fit(X, Y)
    assert a.alpha_ == pytest.approx(grid[np.argmin(errors)])


def test_ridge_of_many_rows_is_scikit_learns():
    rng = np.random.default_rng(0)
    # columns whose scales span six decades, as those of a model's states do, and two that are the same
    X = rng.normal(size=(200, 70)) * np.geomspace(1e3, 1e-3, 70)
    X[:, 1] = X[:, 0]
    Y = X @ rng.normal(size=(70, 4)) + rng.normal(size=(200, 4))
    for alpha in ("gcv", 1e-6, 0.1):
        a = RidgeAligner(alpha=alpha).fit(X, Y)
        penalty = a.alpha_ * np.trace(centred(X).T @ centred(X)) / 70
        assert_allclose(a.transform(X), Ridge(alpha=penalty, solver="svd").fit(X, Y).predict(X), rtol=1e-6, atol=1e-4)


def test_gcv_chooses_near_the_best_leave_one_out_penalty():
    X, Y, _ = pairs(n=40, noise=6.0)
    grid = np.geomspace(1e-3, 1e2, 11)
    unit_penalty = np.trace(centred(X).T @ centred(X)) / 9
    loo = [
        sum(
            (
                (Ridge(alpha=g * unit_penalty).fit(np.delete(X, i, 0), np.delete(Y, i, 0)).predict(X[[i]]) - Y[i]) ** 2
            ).sum()
            for i in range(40)
        )
        for g in grid
    ]
    a = RidgeAligner(alpha_range=(1e-3, 1e2), n_alphas=11).fit(X, Y)
    assert 0 < np.argmin(loo) < 10
    assert abs(np.argmin(loo) - np.argmin(abs(grid - a.alpha_))) <= 1


def test_ridge_recovers_an_exact_map():
    X, Y, W0 = pairs(noise=0)
    errors = [abs(RidgeAligner(alpha=alpha).fit(X, Y).coef_.numpy() - W0).max() for alpha in (1e-2, 1e-5, 1e-10, 0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-2] < 1e-8
    assert RidgeAligner().fit(X, Y).alpha_ == pytest.approx(1e-6)


def test_rank_is_reduced_as_in_reduced_rank_regression():
    X, Y, _ = pairs(noise=2.0)
    full, low = RidgeAligner(alpha=0.0).fit(X, Y), RidgeAligner(alpha=0.0, max_rank=2).fit(X, Y)
    assert np.linalg.matrix_rank(low.coef_.numpy()) == np.linalg.matrix_rank(low.reverse_coef_.numpy()) == 2
    # at alpha = 0 it is the best rank-2 map: Eckart-Young on the fitted values
    s = np.linalg.svd(centred(X) @ full.coef_.numpy(), compute_uv=False)
    best = ((Y - full.transform(X)) ** 2).sum() + (s[2:] ** 2).sum()
    assert ((Y - low.transform(X)) ** 2).sum() == pytest.approx(best)
    same = RidgeAligner(alpha=0.0, max_rank=99).fit(X, Y)
    assert_allclose(same.coef_.numpy(), full.coef_.numpy(), atol=1e-10)


# Procrustes


def test_procrustes_is_scipys():
    X, Y, _ = pairs(d_target=9)
    R, scale = scipy.linalg.orthogonal_procrustes(centred(X), centred(Y))
    a = ProcrustesAligner().fit(X, Y)
    assert_allclose(ProcrustesAligner(scale=False).fit(X, Y).coef_.numpy(), R, atol=1e-10)
    assert_allclose(a.coef_.numpy(), a.scale_ * R, atol=1e-10)
    assert a.scale_ == pytest.approx(scale / (centred(X) ** 2).sum())
    assert a.n_components_ == 9
    v = normed(X[0])
    assert_allclose(a.map_direction(v, "covector"), a.map_direction(v, "displacement"), atol=1e-10)


@pytest.mark.parametrize("n", [60, 7])
def test_procrustes_recovers_a_planted_rotation(n):
    X, *_ = pairs(n=n)
    R = np.linalg.qr(np.random.default_rng(3).standard_normal((9, 9)))[0]
    a = ProcrustesAligner().fit(X, 2.5 * X @ R + 4)
    assert_allclose(a.transform(X), 2.5 * X @ R + 4, atol=1e-8)
    assert a.score(X, 2.5 * X @ R + 4) == pytest.approx(1)
    if n == 60:
        assert_allclose(a.coef_.numpy(), 2.5 * R, atol=1e-8)


def test_whitened_procrustes_maps_between_widths():
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((200, 4)) * [4, 3, 2, 1]
    X = Z @ np.linalg.qr(rng.standard_normal((12, 4)))[0].T + 1
    Y = Z @ np.linalg.qr(rng.standard_normal((7, 4)))[0].T - 1
    a = ProcrustesAligner().fit(X, Y)  # the rank, 4, is less than a tenth of the anchors
    assert a.n_components_ == 4
    assert_allclose(a.transform(X), Y, atol=1e-8)
    assert_allclose(centred(Y) @ a.reverse_coef_.numpy(), centred(X), atol=1e-8)
    noisy = X + 0.1 * rng.standard_normal(X.shape), Y + 0.1 * rng.standard_normal(Y.shape)
    assert ProcrustesAligner().fit(*noisy).n_components_ == 7
    assert ProcrustesAligner().fit(noisy[0][:50], noisy[1][:50]).n_components_ == 5
    b = ProcrustesAligner(n_components=3, scale=False).fit(*noisy)
    mapped = b.transform(noisy[0])
    top = np.linalg.eigvalsh(np.cov(noisy[1].T))[::-1][:3]
    assert_allclose(np.linalg.eigvalsh(np.cov(mapped.T))[::-1][:3], top, rtol=1e-8)  # un-whitened into the target
    assert b.score(*noisy) > 0.9


def test_a_whitened_rotation_is_not_decided_by_one_large_coordinate():
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((400, 8))
    X, Y = (np.c_[Z @ np.linalg.qr(rng.standard_normal((8, 8)))[0], 300 * rng.standard_normal(400)] for _ in range(2))
    X, Y = X + 0.05 * rng.standard_normal(X.shape), Y + 0.05 * rng.standard_normal(Y.shape)
    fitted = [ProcrustesAligner(whiten=whiten).fit(X, Y) for whiten in (True, None)]
    assert [a.n_components_ for a in fitted] == [9, 9]
    v = np.linalg.lstsq(Z, X, rcond=None)[0][0]  # what the first hidden coordinate does to X, and what it must become
    truth = np.linalg.lstsq(Z, Y, rcond=None)[0][0]
    right, plain = (abs(float(normed(a.map_direction(v, "displacement")) @ normed(truth))) for a in fitted)
    assert right > 0.95 and right > plain - 0.02
    with pytest.raises(ValueError, match="unequal widths"):
        ProcrustesAligner(whiten=False).fit(X[:, :5], Y)


# Auto-encoder


def test_closed_form_is_the_pca_optimum():
    X, Y, _ = pairs()
    a = AutoencoderAligner().fit(X, Y)
    discarded = np.linalg.eigvalsh(np.cov(X.T, bias=True))[: 9 - 6].sum()
    assert a.reconstruction_loss(X) == pytest.approx(discarded)
    assert a.reconstruction_score(X) == pytest.approx(1 - discarded / X.var(0).sum())
    assert_allclose(a.coef_.T.numpy() @ a.coef_.numpy(), np.eye(6), atol=1e-10)
    by_width = AutoencoderAligner(width=6).fit(X)
    assert_allclose(by_width.transform(X), a.transform(X), atol=1e-12)
    assert AutoencoderAligner(init="pca").fit(X, Y).reconstruction_loss(X) == pytest.approx(discarded)


@pytest.mark.parametrize("n", [60, 7])
def test_a_wider_target_reconstructs_exactly(n):
    X, Y, _ = pairs(n=n, d_target=15)
    a = AutoencoderAligner().fit(X, Y)
    assert_allclose(a.inverse_transform(a.transform(X)), X, atol=1e-9)


def test_any_invertible_change_of_code_leaves_the_loss():
    X, Y, _ = pairs()
    a = AutoencoderAligner().fit(X, Y)
    before, v = a.reconstruction_loss(X), a.map_direction(X[0], "displacement")
    A = torch.as_tensor(np.random.default_rng(0).standard_normal((6, 6)))
    a.coef_, a.intercept_, a.reverse_coef_ = a.coef_ @ A, a.intercept_ @ A, torch.linalg.solve(A, a.reverse_coef_)
    assert a.reconstruction_loss(X) == pytest.approx(before)
    assert abs(a.map_direction(X[0], "displacement") @ v) < 0.95


def test_two_seeds_reconstruct_alike_and_point_elsewhere():
    X, Y, _ = pairs(n=200, d_expert=60, d_target=40)
    a, b = (AutoencoderAligner(random_state=seed).fit(X, Y) for seed in (0, 1))
    assert a.reconstruction_loss(X) == pytest.approx(b.reconstruction_loss(X))
    for kind in KINDS:
        assert abs(a.map_direction(X[0], kind) @ b.map_direction(X[0], kind)) < 0.5
    assert a.score(X, Y) < 0.1
    again = AutoencoderAligner(random_state=0).fit(X, Y + 100)  # nothing but the width of y counts
    assert_allclose(again.transform(X), a.transform(X))


@pytest.mark.parametrize("init", ["random", "pca"])
@pytest.mark.parametrize("seed", [0, 1])
def test_adam_comes_within_one_percent_of_the_optimum(init, seed):
    X, Y, _ = pairs(n=300, d_expert=24, d_target=8, seed=seed)
    best = AutoencoderAligner().fit(X, Y).reconstruction_loss(X)
    a = AutoencoderAligner(solver="adam", init=init, random_state=seed).fit(X, Y)
    assert best * (1 - 1e-9) <= a.reconstruction_loss(X) < 1.01 * best
    assert 0 < a.n_epochs_ <= 1000


def test_adam_does_not_depend_on_the_unit_of_the_states():
    X, Y, _ = pairs()
    a, b = (AutoencoderAligner(solver="adam", max_epochs=4, batch_size=16).fit(unit * X, Y) for unit in (1, 1000))
    assert_allclose(b.inverse_transform(b.transform(1000 * X)), 1000 * a.inverse_transform(a.transform(X)), rtol=1e-6)
    assert_allclose(b.transform(1000 * X), a.transform(X), atol=1e-6)


@pytest.mark.parametrize("solver", ["closed_form", "adam"])
def test_identity_start_keeps_the_basis(solver):
    X, Y, _ = pairs(d_target=9)
    a = AutoencoderAligner(solver=solver, init="identity", max_epochs=5).fit(X, Y)
    assert a.reconstruction_score(X) > 0.999
    assert a.map_direction(X[0], "displacement") @ normed(X[0]) > 0.999


# Covariance


@pytest.mark.parametrize("n", [60, 7])
def test_covariance_is_the_explicit_one_and_ridge_otherwise(n):
    X, Y, _ = pairs(n=n)
    v = np.random.default_rng(1).standard_normal(9)
    a, ridge = CovarianceAligner(alpha=0.2).fit(X, Y), RidgeAligner(alpha=0.2).fit(X, Y)
    explicit = np.array([np.cov(y, X @ v)[0, 1] for y in Y.T])
    assert_allclose(a.map_direction(v, "covector"), normed(explicit), atol=1e-10)
    assert_allclose(a.map_direction(v, "displacement"), ridge.map_direction(v, "displacement"), atol=1e-9)
    assert_allclose(a.transform(X), ridge.transform(X), atol=1e-9)


def test_covariance_recovers_a_planted_concept():
    rng = np.random.default_rng(0)
    concept = rng.standard_normal(2000)
    in_expert, in_target = rng.standard_normal(30), rng.standard_normal(20)
    X = 10 + rng.standard_normal((2000, 30)) + np.outer(concept, in_expert)
    Y = 50 * rng.standard_normal(20) + 3 * rng.standard_normal((2000, 20)) + np.outer(concept, in_target)
    a = CovarianceAligner().fit(X, Y)
    assert a.map_direction(in_expert, "covector") @ normed(in_target) > 0.98


# Controls


def test_shuffled_pairs_do_not_predict():
    X, Y, _ = pairs(n=300, d_expert=50, d_target=40)
    train, test = slice(0, 200), slice(200, 300)
    assert RidgeAligner().fit(X[train], Y[train]).score(X[test], Y[test]) > 0.9
    for seed in range(5):
        control = PermutedAligner(RidgeAligner(alpha=0.01), random_state=seed).fit(X[train], Y[train])
        assert control.score(X[test], Y[test]) <= 0
    unfitted = RidgeAligner()
    PermutedAligner(unfitted).fit(X, Y)
    assert not hasattr(unfitted, "coef_")


@given(n=st.integers(2, 50), seed=seeds)
@few
def test_shuffle_keeps_no_pair(n, seed):
    order = linear.shuffle(n, np.random.RandomState(seed)).numpy()
    assert (np.sort(order) == np.arange(n)).all()
    assert (order != np.arange(n)).all()


def test_random_map_has_the_targets_mean_and_variance():
    X, Y, _ = pairs()
    Z = RandomAligner().fit(X, Y).transform(X)
    assert_allclose(Z.mean(0), Y.mean(0))
    assert Z.var(0).sum() == pytest.approx(Y.var(0).sum())
    v = X[0]
    a, b = (RandomAligner(random_state=seed).fit(X, Y).map_direction(v, "displacement") for seed in (0, 1))
    assert abs(a @ b) < 0.99
    assert_allclose(a, RandomAligner(random_state=0).fit(X, Y).map_direction(v, "displacement"))


def test_identity_changes_nothing():
    X, Y, _ = pairs(d_target=9)
    a = IdentityAligner().fit(X, Y)
    out = a.transform(X)
    assert_allclose(out, X)
    assert not np.shares_memory(out, X)
    assert_allclose(a.map_direction(X[0], "covector"), normed(X[0]))


def test_the_quick_svd_of_tall_matrices_is_the_svd():
    X = torch.as_tensor(np.random.default_rng(0).standard_normal((200, 70)) * np.logspace(0, -4, 70))
    (U, s, Vt), (_, exact, _) = linear.quick_svd(X), linear.thin_svd(X)
    assert_allclose(s, exact, rtol=1e-6)
    assert_allclose((U * s) @ Vt, X, atol=1e-9)
    assert_allclose(U.T @ U, torch.eye(70), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [60, 7])
@pytest.mark.parametrize(
    "aligner",
    [
        RidgeAligner(alpha=0.05),
        RidgeAligner(alpha=0.05, max_rank=2),
        CovarianceAligner(),
        ProcrustesAligner(),
        PermutedAligner(RidgeAligner(alpha=0.1)),
    ],
    ids=repr,
)
def test_permuted_directions_equal_refits(aligner, n, kind):
    X, Y, _ = pairs(n=n)
    v = np.random.default_rng(1).standard_normal(9)
    fast = permuted_directions(aligner, X, Y, v, kind, draws=3, random_state=4)
    rng = np.random.RandomState(4)
    for row in fast:
        refit = clone(aligner).fit(X, Y[linear.shuffle(n, rng).numpy()])
        assert_allclose(row, refit.map_direction(v, kind), atol=1e-8)
    first = PermutedAligner(aligner, random_state=4).fit(X, Y).map_direction(v, kind)
    assert_allclose(fast[0], first, atol=1e-8)
    assert not hasattr(aligner, "n_features_in_")


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_directions_keep_the_penalty_of_the_true_pairs(kind, monkeypatch):
    X, Y, _ = pairs()
    fitted = RidgeAligner().fit(X, Y)
    alpha = fitted.alpha_ if kind == "displacement" else fitted.reverse_alpha_
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", functools.wraps(svd)(lambda *a, **k: calls.append(1) or svd(*a, **k)))
    gcv = permuted_directions(RidgeAligner(), X, torch.as_tensor(Y), torch.as_tensor(X[0]), kind, draws=50)
    assert len(calls) == 1  # one factorisation for all draws
    fixed = permuted_directions(RidgeAligner(alpha=alpha), X, Y, X[0], kind, draws=50)
    assert isinstance(gcv, torch.Tensor) and gcv.shape == (50, 6)
    assert_allclose(gcv.numpy(), fixed, atol=1e-10)


def test_base_class_is_no_aligner():
    X, Y, _ = pairs()
    with pytest.raises(NotImplementedError, match="use one of the aligners"):
        Aligner().fit(X, Y)
