from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from xrfm import RFM

from expertsteer_nnsight.directions.labels import auc, group_positions
from expertsteer_nnsight.directions.rfm import RecursiveFeatureMachine

QUIET = pytest.mark.filterwarnings("ignore:A class has:UserWarning", "ignore:The direction's correlation:UserWarning")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planted(n=120, d=40, seed=0, strength=2.0):
    """Classes that differ along one direction of isotropic noise."""
    g = torch.Generator().manual_seed(seed)
    y = (torch.arange(n) % 2).double()
    v = torch.randn(d, generator=g, dtype=torch.float64)
    v /= v.norm()
    return torch.randn(n, d, generator=g, dtype=torch.float64) + strength * torch.outer(2 * y - 1, v), y, v


def xor(n=400, d=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    return X, ((X[:, 0] * X[:, 1]) > 0).double()


def cosine(a, b):
    return float(torch.as_tensor(a) @ torch.as_tensor(b) / (torch.as_tensor(a).norm() * torch.as_tensor(b).norm()))


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "d", "length", "n_iter", "center_grads"),
    [(80, 30, 10.0, 5, False), (60, 150, 10.0, 3, False), (70, 70, 5.0, 2, True)],
)
def test_agrees_with_xrfm(n, d, length, n_iter, center_grads):
    X, y, _ = planted(n, d)
    ours = RecursiveFeatureMachine.paper(
        bandwidth=length, n_iter=n_iter, validation_fraction=0, center_grads=center_grads
    ).fit(X, y)
    theirs = RFM("l2_high_dim", bandwidth=length, device="cpu", tuning_metric="mse", verbose=False)
    quiet = {"early_stop_rfm": False, "return_best_params": False, "get_agop_best_model": True}
    theirs.fit((X, y[:, None]), (X, y[:, None]), reg=1e-3, iters=n_iter, center_grads=center_grads, **quiet)
    agop = ours.agop_factor_.T @ ours.agop_factor_
    agop /= agop.max()
    assert (agop - theirs.agop_best_model).norm() < 1e-4 * agop.norm()
    top = torch.linalg.eigh(theirs.agop_best_model)[1][:, -1]
    assert abs(cosine(top, ours.directions_[0])) > 1 - 1e-6
    torch.testing.assert_close(ours.predict(X[:5] + 0.1), theirs.predict(X[:5] + 0.1)[:, 0], rtol=1e-5, atol=1e-7)
    assert ours.n_iter_ == n_iter


TYPED = "the tests check annotations at run time, so that -1 as a bool is refused by __init__; users' runs do not"


@parametrize_with_checks(
    [RecursiveFeatureMachine()],
    expected_failed_checks=lambda _: {"check_do_not_raise_errors_in_init_or_set_params": TYPED},
)
@QUIET  # the checks use few rows, without structure
def test_scikit_learn_contract(estimator, check):
    check(estimator)


# --- what it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(200, 30), (100, 300)])
def test_recovers_a_planted_direction(n, d):
    X, y, v = planted(n, d)
    rfm = RecursiveFeatureMachine().fit(X, y)
    assert cosine(rfm.directions_[0], v) > 0.9 * cosine(X[y == 1].mean(0) - X[y == 0].mean(0), v)  # the best one here
    assert cosine(rfm.directions_[0], v) > 0.65
    assert rfm.directions_.shape == (1, d)
    assert rfm.validation_score_ > 0.9
    assert 0.2 < rfm.sign_correlation_ <= 1


@pytest.mark.filterwarnings("ignore:The direction's correlation:UserWarning")
def test_xor_plane_where_the_mean_difference_sees_nothing():
    X, y = xor()
    rfm = RecursiveFeatureMachine(n_components=2).fit(X, y)
    torch.testing.assert_close(rfm.directions_ @ rfm.directions_.T, torch.eye(2, dtype=torch.float64))
    # singular values of the plane's two axes seen from the two directions: cosines of the principal angles
    assert float(torch.linalg.svdvals(rfm.directions_[:, :2]).min()) > 0.95
    test, label = xor(seed=1)
    assert auc(label, rfm.predict(test)) > 0.85
    assert abs(auc(label, test @ (X[y == 1].mean(0) - X[y == 0].mean(0))) - 0.5) < 0.1


def test_xor_warns_that_the_sign_means_nothing():
    X, y = xor(150)
    mirrored, pair = torch.cat([X, -X]), np.tile(np.arange(150), 2)  # no direction correlates with the labels
    with pytest.warns(UserWarning, match="sign is not to be trusted"):
        rfm = RecursiveFeatureMachine().fit(mirrored, torch.cat([y, y]), groups=pair)
    assert abs(rfm.sign_correlation_) < 1e-9


def test_real_valued_labels():
    X, _, v = planted(200, 25)
    y = torch.tanh(X @ v) + 3
    rfm = RecursiveFeatureMachine().fit(X, y)
    assert cosine(rfm.directions_[0], v) > 0.95
    assert rfm.validation_score_ > 0.8  # R^2
    assert rfm.score(X, y) > 0.9


def test_paper_preset_is_the_reference_and_fails_loudly_on_large_states():
    preset = RecursiveFeatureMachine.paper()
    assert (preset.bandwidth, preset.n_iter, preset.reg, preset.adaptive) == ((1.0, 10.0, 100.0), 8, 1e-3, False)
    X, y, v = planted(200, 30)
    assert cosine(preset.fit(X, y).directions_[0], v) > 0.7
    with pytest.raises(ValueError, match=r"median distance .* use adaptive=True"):
        RecursiveFeatureMachine.paper().fit(X * 1e5, y)


def test_auc_ties_are_broken_by_the_squared_error():
    X, y, _ = planted(200, 10, strength=5.0)  # AUC is 1 from the start
    rfm = RecursiveFeatureMachine(bandwidth=(0.01, 3.0)).fit(X, y)
    assert rfm.validation_score_ == 1.0
    assert rfm.bandwidth_ == 3.0


# --- symmetries -------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), wide=st.booleans())
def test_equivariant_under_rotation_and_shift(seed, wide):
    X, y, _ = planted(80, 120 if wide else 20, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    R = torch.linalg.qr(torch.randn(X.shape[1], X.shape[1], generator=g, dtype=torch.float64))[0]
    a = RecursiveFeatureMachine(n_iter=3).fit(X, y)
    b = RecursiveFeatureMachine(n_iter=3).fit(X @ R + 7, y)
    assert (a.bandwidth_, a.n_iter_) == (b.bandwidth_, b.n_iter_)
    torch.testing.assert_close(b.directions_, a.directions_ @ R, rtol=0, atol=1e-6)
    torch.testing.assert_close(b.spectrum_, a.spectrum_, rtol=1e-6, atol=1e-9 * float(a.spectrum_[0]))


@pytest.mark.parametrize("factor", [1e-3, 1e4])
@pytest.mark.parametrize("scale", ["median", None])
def test_adaptive_bandwidth_does_not_see_the_scale(factor, scale):
    X, y, _ = planted(100, 60)
    a, b = (RecursiveFeatureMachine(scale=scale, n_iter=3).fit(Z, y) for Z in (X, X * factor))
    torch.testing.assert_close(a.directions_, b.directions_, rtol=0, atol=1e-7)
    torch.testing.assert_close(a.predict(X), b.predict(X * factor), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(a.spectrum_, b.spectrum_ * factor**2, rtol=1e-6, atol=1e-9 * float(a.spectrum_[0]))


@pytest.mark.parametrize("refit", [True, False])
def test_sign_follows_the_labels(refit):
    X, y, v = planted(100, 60)
    a, b = (RecursiveFeatureMachine(refit=refit).fit(X, labels) for labels in (y, 1 - y))
    torch.testing.assert_close(a.directions_, -b.directions_, rtol=0, atol=1e-9)
    assert cosine(a.directions_[0], v) > 0
    c = RecursiveFeatureMachine(refit=refit).fit(X, 2 * y - 1)  # 0/1 or -1/1 is the same problem
    torch.testing.assert_close(a.directions_, c.directions_, rtol=0, atol=1e-9)


# --- numerics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "scale", "n_iter"), [(6, "median", 3), (60, "median", 2), (60, None, 0)])
def test_agop_is_that_of_the_predictor(d, scale, n_iter):
    X, y, _ = planted(70, d, strength=1.0)
    X = X * 3 + 5
    rfm = RecursiveFeatureMachine(2.0, scale=scale, n_iter=n_iter, validation_fraction=0).fit(X, y)
    h = 1e-6  # the kernel has a cusp at each training row, whose own term cancels in the central difference
    steps = torch.cat([X[:, None] + s * h * torch.eye(d, dtype=X.dtype) for s in (1, -1)]).reshape(-1, d)
    up, down = rfm.predict(steps).reshape(2, len(X), d)
    G = (up - down) / (2 * h)
    agop = rfm.agop_factor_.T @ rfm.agop_factor_
    assert (agop - G.T @ G).norm() < 1e-5 * agop.norm()
    assert rfm.agop_factor_.shape == (min(X.shape), d)
    torch.testing.assert_close(rfm.spectrum_, torch.linalg.eigvalsh(agop).flip(0)[: min(X.shape)], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rfm.spectrum_shares_.sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("d", [10, 300])
def test_duplicate_rows(d):
    X, y, _ = planted(80, d)
    X = X * 1000 + 12345  # rounding makes the distance of equal rows non-zero unless it is dealt with
    once = RecursiveFeatureMachine(3.0, n_iter=3, reg=1e-3, validation_fraction=0).fit(X, y)
    # every row twice is the same kernel regression with half the ridge
    twice = RecursiveFeatureMachine(3.0, n_iter=3, reg=2e-3, validation_fraction=0)
    twice.fit(torch.cat([X, X]), torch.cat([y, y]))
    torch.testing.assert_close(once.directions_, twice.directions_, rtol=0, atol=1e-6)
    torch.testing.assert_close(once.predict(X), twice.predict(X), rtol=0, atol=1e-6)


def test_equal_rows_with_opposite_labels():
    X, y, _ = planted(80, 10)
    X[1] = X[0]
    rfm = RecursiveFeatureMachine().fit(X, y)
    assert torch.isfinite(rfm.directions_).all()
    assert torch.isfinite(rfm.predict(X)).all()


def test_no_matrix_of_the_width_squared():
    X, y, _ = planted(70, 60_000)  # d x d would take 29 GB
    assert RecursiveFeatureMachine(n_iter=1).fit(X, y).directions_.shape == (1, 60_000)


# --- the split --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=5, max_size=40), seed=st.integers(0, 9), fraction=st.floats(0.05, 0.9)
)
def test_positions_never_split_a_group(sizes, seed, fraction):
    group = np.repeat(np.arange(len(sizes)), sizes)
    y = np.random.default_rng(seed).integers(0, 2, len(group)).astype(float)
    y[0], y[-1] = 0.0, 1.0
    shuffle = np.random.default_rng(seed).permutation(len(group))
    position = group_positions(y[shuffle], group[shuffle], seed)
    held = set(group[shuffle][position < fraction])
    assert held.isdisjoint(group[shuffle][position >= fraction])
    assert ((position > 0) & (position < 1)).all()
    np.testing.assert_array_equal(position, group_positions(1 - y[shuffle], group[shuffle], seed))


def test_split_is_stratified_and_keeps_pairs():
    X, y, _ = planted(200, 10)
    y = torch.sort(y)[0]
    y[:150] = 0
    assert y[RecursiveFeatureMachine().fit(X + 3 * y[:, None], y).validation_indices_].sum() == 10  # a fifth of 50
    pair = np.arange(200) // 2
    X, y, _ = planted(200, 10)
    held = RecursiveFeatureMachine().fit(X, y, groups=[f"pair {p}" for p in pair]).validation_indices_
    assert len(held) == 40
    assert (np.bincount(pair[held], minlength=100) % 2 == 0).all()


def test_given_validation_is_never_trained_on():
    X, y, _ = planted(100, 20)
    Xv, yv, _ = planted(60, 20)
    a = RecursiveFeatureMachine(3.0, n_iter=0).fit(X, y, validation=(Xv, yv))
    b = RecursiveFeatureMachine(3.0, n_iter=0, validation_fraction=0).fit(X, y)
    torch.testing.assert_close(a.predict(Xv), b.predict(Xv), rtol=1e-9, atol=1e-9)
    assert a.validation_score_ == pytest.approx(auc(yv, a.predict(Xv)))
    assert np.isnan(b.validation_score_)
    assert len(a.validation_indices_) == 0


def test_without_refit_the_held_out_rows_do_not_matter():
    X, y, _ = planted(100, 20)
    rfm = RecursiveFeatureMachine(3.0, n_iter=0, refit=False, scale=None).fit(X, y)
    kept = np.setdiff1d(np.arange(100), rfm.validation_indices_)
    alone = RecursiveFeatureMachine(3.0, n_iter=0, validation_fraction=0, scale=None).fit(X[kept], y[kept])
    torch.testing.assert_close(rfm.directions_, alone.directions_, rtol=0, atol=1e-9)
    refit = RecursiveFeatureMachine(3.0, n_iter=0, scale=None).fit(X, y)
    everything = RecursiveFeatureMachine(3.0, n_iter=0, validation_fraction=0, scale=None).fit(X, y)
    torch.testing.assert_close(refit.directions_, everything.directions_, rtol=0, atol=1e-9)
    assert refit.validation_score_ == rfm.validation_score_
    held = rfm.validation_indices_
    assert (
        rfm.sign_correlation_
        == pytest.approx(np.corrcoef(y[held], X[held] @ rfm.directions_[0])[0, 1])
        == pytest.approx(refit.sign_correlation_)
    )


# --- containers, settings, errors -------------------------------------------------------------------------------------


def test_containers():
    X, y, _ = planted(80, 100)
    a = RecursiveFeatureMachine().fit(X, y)
    b = RecursiveFeatureMachine().fit(X.numpy(), y.numpy().tolist())
    assert isinstance(b.directions_, np.ndarray) and isinstance(b.predict(X.numpy()), np.ndarray)
    np.testing.assert_allclose(a.directions_.numpy(), b.directions_)
    half = X.to(torch.float32)
    c = RecursiveFeatureMachine().fit(half, y.bool())
    assert c.directions_.dtype == torch.float64 and c.predict(half).dtype == torch.float32
    assert cosine(c.directions_[0], a.directions_[0]) > 1 - 1e-6


def test_same_seed_same_fit():
    X, y, _ = planted(80, 100)
    rfm = RecursiveFeatureMachine(random_state=3).fit(X, y)
    again = clone(rfm).fit(X, y)
    assert torch.equal(rfm.directions_, again.directions_)
    other = RecursiveFeatureMachine(random_state=4).fit(X, y)
    assert not np.array_equal(rfm.validation_indices_, other.validation_indices_)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bandwidth": -1.0}, "bandwidth must be positive, but is -1.0"),
        ({"bandwidth": ()}, "bandwidth must be positive"),
        ({"reg": 0.0}, "reg must be positive"),
        ({"n_iter": -1}, "n_iter must be 0 or more"),
        ({"scale": "mean"}, "scale must be"),
        ({"validation_fraction": 1.0}, "below 1"),
        ({"validation_fraction": 0}, "3 values to choose from"),
        ({"n_components": 0}, "1 or more"),
        ({"n_components": 21}, "ask for fewer"),
    ],
)
def test_settings_out_of_range(change, message):
    X, y, _ = planted(80, 20)
    with pytest.raises(ValueError, match=message):
        RecursiveFeatureMachine(**change).fit(X, y)


@QUIET
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda X, y: (X, y[:-1]), "one label for each of the 80 rows of X, but has 79"),
        (lambda X, y: (X, y * 0 + 1), "y is 1 in all 80 rows"),
        (lambda X, y: (X, ["a", "b"] * 40), "y must be numbers, but holds 'a'"),
        (lambda X, y: (X, y.where(y > 0, float("nan"))), "y contains NaN"),
        (lambda X, y: (X.where(X > 0, float("inf")), y), "X has NaN or infinity"),
        (lambda X, y: (X * 0, y), "leaves no gradient"),
        (lambda X, y: (X[:2], y[:2]), "too few to hold out"),
        (lambda X, y: (X, y, range(3)), r"groups must have one entry for each of the 80 rows, but has shape \(3,\)"),
        (lambda X, y: (X, y, None, (X, 2 * y - 1)), "validation labels are not the two of y"),
    ],
)
def test_data_that_cannot_be_used(spoil, message):
    X, y, _ = planted(80, 20)
    with pytest.raises(ValueError, match=message):
        RecursiveFeatureMachine().fit(*spoil(X, y))


def test_few_rows_warn_once_and_enough_do_not():
    X, y, _ = planted(58, 10, strength=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RecursiveFeatureMachine().fit(X, y)
    assert ["A class has 29 rows" in str(w.message) for w in caught] == [True]
    X, y, _ = planted(60, 10, strength=4)
    RecursiveFeatureMachine().fit(X, y)  # a warning would be an error


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
def test_auc_is_scikit_learns(pairs):
    from sklearn.metrics import roc_auc_score

    y, s = (torch.tensor([float(p[i]) for p in pairs]) for i in (0, 1))
    if len(y.unique()) == 2:
        assert auc(y, s) == pytest.approx(roc_auc_score(y, s))
    else:
        assert np.isnan(auc(y, s))
