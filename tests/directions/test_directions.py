from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsRegressor

from expertsteer_nnsight.directions.find import Direction, find_direction, held_out_auc
from expertsteer_nnsight.directions.labels import auc
from expertsteer_nnsight.directions.rfm import RecursiveFeatureMachine

METHODS = ["rfm", "mean_difference", "pca", "logistic", "lda"]
COVECTORS = ["rfm", "logistic", "lda"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pairs(n=80, d=30, seed=0, strength=2.0, matched=1.0, nuisance=0.0):
    """`n` contrast pairs: `matched` scales what the two share, `nuisance` six loud directions of no meaning."""
    g = torch.Generator().manual_seed(seed)
    v = torch.zeros(d, dtype=torch.float64)
    v[0] = 1.0
    noise = torch.randn(2 * n, d, generator=g, dtype=torch.float64)
    shared = torch.randn(n, d, generator=g, dtype=torch.float64).repeat_interleave(2, 0)
    y = torch.arange(2 * n) % 2
    loud = torch.randn(6, d, generator=g, dtype=torch.float64) / d**0.5
    X = noise + matched * shared + strength * torch.outer(2.0 * y - 1, v)
    X = X + nuisance * torch.randn(2 * n, 6, generator=g, dtype=torch.float64) @ loud + 10
    return X, y, v, torch.arange(2 * n) // 2


def cosine(a, b):
    a, b = (torch.as_tensor(np.asarray(t), dtype=torch.float64) for t in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


# --- all methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labels", [(0, 1), (1, 0), (-1, 1)])
def test_sign_points_to_the_larger_label(method, labels):
    X, y, v, group = pairs(40, 30, strength=3.0)
    positive = 1 if labels[1] > labels[0] else -1
    direction = find_direction(X, torch.tensor(labels)[y], method, groups=group, folds=0)
    assert positive * cosine(direction.vector, v) > 0.7
    assert direction.vector.dtype == torch.float64
    assert float(direction.vector.norm()) == pytest.approx(1)
    assert direction.space == ("covector" if method in COVECTORS else "displacement")
    assert direction.kind == ("gradient" if method in COVECTORS else "pattern")
    assert direction.details["correlation"] > 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("d", [20, 150])
def test_recovers_the_planted_direction_and_reads_it_on_new_rows(method, d):
    X, y, v, group = pairs(60, d, strength=2.5, matched=0.5)
    direction = find_direction(X, y, method, groups=group, folds=3)
    assert cosine(direction.vector, v) > 0.65
    test, label, _, _ = pairs(60, d, seed=1, strength=2.5, matched=0.5)
    assert direction.auc(test, label) > 0.9
    assert direction.details["held_out_auc"] == pytest.approx(direction.auc(test, label), abs=0.1)
    assert direction.details["held_out_auc"] == held_out_auc(X, y, method, groups=group, folds=3)


@pytest.mark.parametrize("method", METHODS)
def test_does_not_depend_on_units_or_origin(method):
    X, y, _, group = pairs(40, 30)
    a = find_direction(X, y, method, groups=group, folds=0).vector
    b = find_direction(X * 1e3 - 50, y, method, groups=group, folds=0).vector
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_numpy_lists_and_float32(method):
    X, y, _, group = pairs(40, 20)
    a = find_direction(X, y, method, groups=group, folds=0).vector
    names = [f"pair {int(g):03}" for g in group]
    b = find_direction(X.numpy(), y.tolist(), method, groups=names, folds=0).vector
    torch.testing.assert_close(a, b)
    c = find_direction(X.float(), y.bool(), method, groups=names, folds=0).vector
    assert cosine(a, c) > 1 - 1e-5


@pytest.mark.parametrize("method", ["rfm", "mean_difference", "pca"])
def test_real_valued_labels(method):
    X, _, v, group = pairs(60, 10, strength=0, matched=0)
    X[:, 0] *= 3
    y = torch.tanh((X @ v - 30) / 3)
    direction = find_direction(X, y, method, groups=group, folds=3)
    assert cosine(direction.vector, v) > 0.9
    assert direction.details["held_out_correlation"] > 0.8
    assert "held_out_auc" not in direction.details


def test_loud_nuisance_defeats_the_mean_difference_only():
    X, y, v, _ = pairs(200, 80, strength=2.0, matched=0, nuisance=30.0)
    X, test, y, label = X[:200], X[200:], y[:200], y[200:]
    found = {m: find_direction(X, y, m, folds=0) for m in (*COVECTORS, "mean_difference")}
    read = {m: cosine(f.vector, v) for m, f in found.items()}
    assert min(read[m] for m in COVECTORS) > read["mean_difference"] + 0.1
    held_out = {m: held_out_auc(X, y, m, folds=3) for m in found}
    assert min(held_out[m] for m in COVECTORS) > held_out["mean_difference"] + 0.1
    assert found["lda"].auc(test, label) > 0.95


# --- one method each --------------------------------------------------------------------------------------------------


def test_mean_difference_is_what_it_says():
    X, y, _, _ = pairs()
    expected = X[y == 1].mean(0) - X[y == 0].mean(0)
    torch.testing.assert_close(find_direction(X, y, "mean_difference", folds=0).vector, expected / expected.norm())
    uneven = slice(40, None, 1)
    X, y = torch.cat([X, X[y == 1][uneven] + 1]), torch.cat([y, y[y == 1][uneven]])
    expected = X[y == 1].mean(0) - X[y == 0].mean(0)
    torch.testing.assert_close(find_direction(X, y, "mean_difference", folds=0).vector, expected / expected.norm())


def test_pca_needs_matched_pairs():
    X, y, v, group = pairs(100, 30, strength=1.5, matched=4.0)
    assert cosine(find_direction(X, y, "pca", groups=group, folds=0).vector, v) > 0.9
    assert abs(cosine(find_direction(X, y, "pca", folds=0).vector, v)) < 0.5  # the topic is louder than the class
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    unmatched = find_direction(X, y, "pca", groups=group[torch.argsort(y[order]).argsort()], folds=0)
    assert abs(cosine(unmatched.vector, v)) < 0.9


def test_pca_of_pairs_against_explicit_differences():
    X, y, _, group = pairs(40, 12)
    D = X[1::2] - X[::2]
    both = torch.cat([D, -D])  # the limit of random signs
    top = torch.linalg.eigh(both.T @ both)[1][:, -1]
    assert abs(cosine(find_direction(X, y, "pca", groups=group, folds=0).vector, top)) > 0.99
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    shuffled = find_direction(X[order], y[order], "pca", groups=group[order], folds=0).vector
    torch.testing.assert_close(shuffled, find_direction(X, y, "pca", groups=group, folds=0).vector)


@pytest.mark.parametrize("shrinkage", [0.05, 0.7, 1.0])
@pytest.mark.parametrize(("n", "d"), [(30, 100), (60, 20)])
def test_lda_against_the_explicit_covariance(n, d, shrinkage):
    X, y, _, _ = pairs(n, d)
    within = X - torch.stack([X[y == c].mean(0) for c in (0, 1)])[y]
    S = within.T @ within / len(X)
    S = (1 - shrinkage) * S + shrinkage * S.trace() / d * torch.eye(d)
    w = torch.linalg.solve(S, X[y == 1].mean(0) - X[y == 0].mean(0))
    found = find_direction(X, y, "lda", shrinkage=shrinkage, folds=0)
    assert cosine(found.vector, w) > 1 - 1e-9
    assert found.details["shrinkage"] == shrinkage


@pytest.mark.parametrize(("n", "d"), [(30, 100), (60, 20)])
def test_lda_shrinkage_is_ledoit_and_wolfs(n, d):
    X, y, _, _ = pairs(n, d)
    within = X - torch.stack([X[y == c].mean(0) for c in (0, 1)])[y]
    S, shrinkage = ledoit_wolf(within.numpy(), assume_centered=True)
    found = find_direction(X, y, "lda", folds=0)
    assert found.details["shrinkage"] == pytest.approx(shrinkage)
    assert cosine(found.vector, np.linalg.solve(S, (X[y == 1].mean(0) - X[y == 0].mean(0)).numpy())) > 1 - 1e-9
    if d < n:
        sk = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(X.numpy(), y.numpy())
        assert cosine(found.vector, sk.coef_[0]) > 1 - 1e-9


def test_lda_of_classes_without_spread_is_their_difference():
    X = torch.tensor([[0.0, 0.0, 1.0], [3.0, 4.0, 1.0]]).repeat(5, 1)
    direction = find_direction(X, [0, 1] * 5, "lda", folds=0)
    torch.testing.assert_close(direction.vector, torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("d", [20, 200])
def test_logistic_solves_the_penalised_problem(d):
    X, y, _, _ = pairs(30, d)
    rows = (X - X.mean(0)) / (X - X.mean(0)).norm(dim=1).median()
    w = torch.zeros(d + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=2000, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        margin = (2.0 * y - 1) * (rows @ w[:-1] + w[-1])
        value = 5.0 * torch.nn.functional.softplus(-margin).sum() + w[:-1].square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    found = find_direction(X, y, "logistic", C=5.0, folds=0)
    assert cosine(found.vector, w[:-1].detach()) > 1 - 1e-5
    assert found.details["C"] == 5.0


def test_logistic_chooses_a_small_C_for_noise_and_a_larger_one_for_signal():
    X, y, _, group = pairs(60, 200, strength=0.1)
    noise = find_direction(X, y, "logistic", groups=group, folds=0).details["C"]
    X, y, _, group = pairs(60, 200, strength=5.0)
    assert noise < find_direction(X, y, "logistic", groups=group, folds=0).details["C"]


def test_rfm_passes_settings_and_groups():
    X, y, _, group = pairs(60, 20)
    direction = find_direction(X, y, "rfm", groups=group, folds=0, n_iter=1, bandwidth=2.0, random_state=5)
    rfm = RecursiveFeatureMachine(2.0, n_iter=1, random_state=5).fit(X, y, groups=group)
    torch.testing.assert_close(direction.vector, torch.as_tensor(rfm.directions_[0]))
    assert direction.details["bandwidth"] == 2.0
    assert direction.details["sign_correlation"] == rfm.sign_correlation_
    assert direction.details["spectrum_share"] == float(rfm.spectrum_shares_[0])
    same = find_direction(X, y, rfm, groups=group, folds=0)
    assert torch.equal(same.vector, direction.vector)
    assert same.method == "RecursiveFeatureMachine"


@pytest.mark.parametrize("method", ["rfm", "pca"])
def test_several_components(method):
    X, y, v, group = pairs(60, 20)
    several = find_direction(X, y, method, groups=group, n_components=3, folds=3)
    torch.testing.assert_close(several.vector @ several.vector.T, torch.eye(3, dtype=torch.float64))
    one = find_direction(X, y, method, groups=group, folds=3)
    torch.testing.assert_close(several.vector[0], one.vector)
    assert several.details["held_out_auc"] == one.details["held_out_auc"]
    along = X @ several.vector.T
    assert all(np.corrcoef(along[:, k], y)[0, 1] > 0 for k in range(3))
    assert cosine(one.vector, v) > 0.7


# --- your own ---------------------------------------------------------------------------------------------------------


def test_callable():
    X, y, v, _ = pairs(40, 10)

    def mine(states, labels, power=1):
        return -(states[labels == 1].mean(0) - states[labels == 0].mean(0)) * power  # the sign is put right

    displacement = find_direction(X, y, mine, power=3, folds=3)
    assert (displacement.space, displacement.method) == ("displacement", "mine")
    torch.testing.assert_close(displacement.vector, find_direction(X, y, "mean_difference", folds=0).vector)
    assert displacement.details["held_out_auc"] > 0.9
    covector = find_direction(X, y, mine, kind="gradient", folds=0)
    assert covector.space == "covector"
    torch.testing.assert_close(covector.pattern(X).vector, find_direction(X, y, mine, kind="pattern", folds=0).vector)
    assert cosine(find_direction(X, y, lambda s, t: v.tolist(), folds=0).vector, v) == pytest.approx(1)


def test_estimator_with_coefficients():
    X, y, v, _ = pairs(80, 10)
    ridge = Ridge()
    direction = find_direction(X, y, ridge, alpha=2.0, folds=3)
    assert direction.space == "covector"
    assert not hasattr(ridge, "coef_")  # a clone is fitted
    assert cosine(direction.vector, Ridge(alpha=2.0).fit(X.numpy(), y.numpy()).coef_) == pytest.approx(1)
    assert cosine(direction.vector, v) > 0.7


# --- gradient and pattern ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 2])
def test_pattern_against_the_explicit_covariance(k):
    X, y, _, group = pairs(60, 12, nuisance=3.0)
    settings = {} if k is None else {"n_components": k}
    gradient = find_direction(X, y, "rfm", groups=group, folds=0, **settings)
    expected = gradient.vector @ torch.cov(X.T)
    pattern = gradient.pattern(X)
    torch.testing.assert_close(pattern.vector, expected / expected.norm(dim=-1, keepdim=True))
    assert (pattern.space, pattern.kind) == ("displacement", "pattern")
    asked = find_direction(X, y, "rfm", kind="pattern", groups=group, folds=0, **settings)
    torch.testing.assert_close(asked.vector, pattern.vector)
    assert cosine(gradient.vector.reshape(-1, 12)[0], pattern.vector.reshape(-1, 12)[0]) > 0


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), loud=st.floats(1, 20), d=st.sampled_from([8, 150]))
def test_pattern_of_lda_is_the_mean_difference(seed, loud, d):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g, dtype=torch.float64) + loud * torch.eye(d, dtype=torch.float64)[0]
    y = torch.arange(400) % 2
    shift = torch.randn(d, generator=g, dtype=torch.float64) * d**0.5
    X = torch.randn(400, d, generator=g, dtype=torch.float64) @ mixing + torch.outer(y.double(), shift)
    pattern = find_direction(X, y, "lda", kind="pattern", folds=0)
    assert cosine(pattern.vector, find_direction(X, y, "mean_difference", folds=0).vector) > 0.97


def test_negation():
    X, y, _, group = pairs(40, 10)
    direction = find_direction(X, y, "lda", groups=group, folds=3)
    back = -direction
    assert torch.equal(back.vector, -direction.vector)
    assert back.auc(X, y) == pytest.approx(1 - direction.auc(X, y))
    assert back.details["held_out_auc"] == 1 - direction.details["held_out_auc"]
    assert back.details["correlation"] == -direction.details["correlation"]
    assert back.details["shrinkage"] == direction.details["shrinkage"]
    assert back.space == direction.space
    assert (-back).details == pytest.approx(direction.details)


def test_direction_is_unit_readable_and_frozen():
    direction = Direction(torch.tensor([3.0, 4.0]), "covector", details={"correlation": 0.51234})
    torch.testing.assert_close(direction.vector, torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert repr(direction) == "Direction(given gradient, covector, shape=(2,), correlation=0.512)"
    with pytest.raises(AttributeError):
        direction.space = "displacement"  # type: ignore[misc]
    with pytest.raises(ValueError, match="zero vector, which has no direction"):
        Direction(torch.zeros(3), "covector")
    with pytest.raises(ValueError, match=r"vector must be \[d\] or \[k, d\]"):
        Direction(torch.zeros(3, 2, 2), "covector")


# --- held out ---------------------------------------------------------------------------------------------------------


def test_held_out_scores_see_no_group_twice():
    # the pair, not the class, decides the states: split pairs would give each answer away
    g = torch.Generator().manual_seed(0)
    copies = torch.randn(40, 300, generator=g, dtype=torch.float64).repeat_interleave(4, 0)
    y = (torch.arange(40) % 2).repeat_interleave(4)
    group = torch.arange(40).repeat_interleave(4)
    X = copies + 0.01 * torch.randn(160, 300, generator=g, dtype=torch.float64)
    assert held_out_auc(X, y, "lda") > 0.95
    assert abs(held_out_auc(X, y, "lda", groups=group) - 0.5) < 0.25
    fooled, grouped = (find_direction(X, y, "logistic", groups=g, folds=0).details["C"] for g in (None, group))
    assert fooled > grouped  # the penalty is chosen on grouped folds too


def test_held_out_folds_use_every_row_once():
    X, y, _, group = pairs(25, 5)
    seen = []

    def spy(states, labels):
        seen.append(states[:, 0])
        return torch.ones(5)

    find_direction(X, y, spy, groups=group)
    everything, *trained = seen
    assert len(trained) == 5
    tested = [v for fold in trained for v in set(everything.tolist()) - set(fold.tolist())]
    assert sorted(tested) == sorted(everything.tolist())


def test_held_out_auc_of_noise_is_a_half():
    X, y, _, group = pairs(100, 40, strength=0.0)
    assert abs(held_out_auc(X, y, "mean_difference", groups=group) - 0.5) < 0.12
    assert auc(y.double(), X @ find_direction(X, y, "mean_difference", folds=0).vector) > 0.65  # the same rows flatter


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "rmf"}, "Unknown method 'rmf': use rfm, mean_difference, pca, logistic, lda"),
        ({"y": [0, 1] * 10}, "one label for each of the 80 rows of X, but has 20"),
        ({"y": [1] * 80}, "y is 1 in all 80 rows"),
        ({"y": [0, float("nan")] * 40}, "y contains NaN"),
        ({"y": range(80), "method": "lda"}, "lda needs two classes, but y has 80 distinct values"),
        ({"y": range(80), "method": "logistic"}, "needs two classes"),
        ({"groups": [1, 2, 3]}, "groups must have one entry"),
        ({"method": "pca", "groups": [0, 0, 1, 1, *range(2, 78)]}, None),
        ({"method": "pca", "groups": list(range(80))}, "two groups with both classes, but found 0"),
        ({"method": "pca", "n_components": 99}, "asked for 99 components, but the rows have"),
        ({"method": "pca", "kind": "gradient"}, "pca is a displacement and has no gradient"),
        ({"method": "mean_difference", "kind": "gradient"}, "has no gradient"),
        ({"method": lambda X, y: torch.ones(3)}, r"gave shape \(3,\), but X has width 10"),
        ({"method": lambda X, y: torch.zeros(10)}, "zero vector"),
        ({"method": KNeighborsRegressor()}, "neither directions_ nor coef_"),
    ],
)
def test_errors(change, message):
    X, y, _, _ = pairs(40, 10)
    arguments = {"X": X, "y": y, "method": "mean_difference", "folds": 0, **change}
    if message is None:
        find_direction(**arguments)
        return
    with pytest.raises(ValueError, match=message):
        find_direction(**arguments)


def test_nan_states_and_pattern_of_a_displacement():
    X, y, _, _ = pairs(40, 10)
    with pytest.raises(ValueError, match="is a displacement: use it"):
        find_direction(X, y, "mean_difference", folds=0).pattern(X)
    with pytest.raises(ValueError, match="X has width 9, but the direction 10"):
        find_direction(X, y, "lda", folds=0).pattern(X[:, :9])
    with pytest.raises(ValueError, match="AUC needs two classes"):
        held_out_auc(X, X[:, 0], "mean_difference")
    with pytest.raises(TypeError, match="power"):
        find_direction(X, y, "lda", power=2)
    X[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 80 rows"):
        find_direction(X, y)


@pytest.mark.parametrize("method", ["lda", "mean_difference", "logistic"])
def test_copies_of_a_row_are_not_tested_where_one_is_learnt_from(method):
    gen = torch.Generator().manual_seed(0)
    X = torch.randn(40, 64, generator=gen)
    y = [1, 0] * 20  # of noise
    rows, labels = torch.cat([X, X, X]), y * 3
    leaking = find_direction(rows, labels, method).details["held_out_auc"]
    assert leaking > 0.9
    honest = find_direction(rows, labels, method, same=[*range(40)] * 3).details.get("held_out_auc", 0.5)
    assert honest < 0.85
    shuffled = [find_direction(torch.randn(120, 64, generator=gen), labels, method, same=range(120)) for _ in range(3)]
    assert all(one.details["held_out_auc"] < 0.85 for one in shuffled)


@pytest.mark.filterwarnings("ignore:A class has", "ignore:The direction's correlation")
@pytest.mark.parametrize(("method", "rows"), [("pca", 4), ("rfm", 6), ("lda", 4), ("logistic", 4)])
def test_few_pairs_give_a_direction_without_what_needs_more_of_them(method, rows):
    X = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))
    groups = [i // 2 for i in range(rows)]
    found = find_direction(X, [1, 0] * (rows // 2), method, groups=groups)
    expected = find_direction(X, [1, 0] * (rows // 2), method, groups=groups, folds=0)
    torch.testing.assert_close(found.vector, expected.vector)
    assert set(expected.details) <= set(found.details)


def test_what_is_wrong_with_the_method_or_the_names_is_said_whatever_is_held_out():
    X, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), [1, 0] * 4
    with pytest.raises(ValueError, match="Unknown method 'ldaa'"):
        held_out_auc(X, y, "ldaa")
    with pytest.raises(ValueError, match=r"same must have one entry for each of the 8 rows, but has shape \(3,\)"):
        find_direction(X, y, "lda", same=[0, 1, 2])
