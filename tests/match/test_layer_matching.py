"""Estimators against known truths, the null against zero, and the choice of pairs against brute force."""

import builtins
import io
import math
from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertsteer_nnsight.match.layer_matching import LayerPair, LayerScores, match_layers
from expertsteer_nnsight.match.layer_scores import SCORES, _whitened


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def shared(n, d_e, d_t, k, rho, seed, rotate=True, std=3.0):
    """Gaussian states with k shared dimensions, correlation rho, `std` times the others; true MI -k/2 log(1-rho²)."""
    z = randn(n, k, seed=seed)
    w = rho * z + math.sqrt(1 - rho**2) * randn(n, k, seed=seed + 1)
    x, y = randn(n, d_e, seed=seed + 2), randn(n, d_t, seed=seed + 3)
    x[:, :k], y[:, :k] = std * z, std * w
    return (x @ rotation(d_e, seed + 4), y @ rotation(d_t, seed + 5)) if rotate else (x, y)


def one(x, y, score, **options):
    return float(match_layers({0: x}, {0: y}, score, **{"permutations": 0, **options}).matrix)


# -------------------------------------------------------------------------------------------------- mutual information


@pytest.mark.parametrize(("k", "rho"), [(5, 0.8), (20, 0.474), (10, 0.6), (20, 0.9), (3, 0.95)])
@pytest.mark.parametrize("rotate", [True, False])  # False: the axes are coordinates, which unit variances would destroy
def test_gaussian_mi_is_within_ten_per_cent_of_the_truth(k, rho, rotate):
    truth = -k / 2 * math.log(1 - rho**2)
    found = [one(*shared(1000, 256, 256, k, rho, 10 * seed, rotate), "gaussian_mi") for seed in range(2)]
    assert np.mean(found) == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("score", ["gaussian_mi", "cca_mi", "cka"])
@pytest.mark.parametrize(("n", "d_e", "d_t"), [(1000, 256, 256), (400, 96, 320), (60, 200, 7)])
def test_null_covers_zero(score, n, d_e, d_t):
    x, y = shared(n, d_e, d_t, 5, 0.8, 3)
    null = match_layers({0: x}, {0: y}, score, permutations=60).null.flatten()
    assert abs(null.mean()) < 3 * null.std() / math.sqrt(len(null))
    low, high = np.quantile(null, [0.05, 0.95])
    assert low < 0 < high


@pytest.mark.parametrize(("n", "p", "q", "rho"), [(60, 3, 3, 0.0), (60, 3, 3, 0.9), (100, 2, 5, 0.6)])
def test_bias_is_exact_at_any_true_value(n, p, q, rho):
    """With no dimension left out, the corrected plug-in is unbiased; the uncorrected one is off by 0.05 to 0.1."""
    k, draws = min(p, q), 400
    e, t = {}, {}
    for i in range(draws):
        e[i], t[i] = shared(n, p, q, k, rho, 10 * i, std=1.0)
    grid = SCORES["gaussian_mi"].grid
    whiten = [[_whitened(x, 5) for x in side.values()] for side in (e, t)]
    found = torch.stack(
        [grid([a], [b], torch.arange(n), torch.arange(n)) for a, b in zip(*whiten, strict=True)]
    ).flatten()
    truth = -k / 2 * math.log(1 - rho**2)
    assert abs(found.mean() - truth) < 3 * found.std() / math.sqrt(draws)
    assert 3 * found.std() / math.sqrt(draws) < 0.6 * p * q / (2 * n)  # so the test can see the correction


@pytest.mark.parametrize("score", ["gaussian_mi", "cca_mi", "ksg"])
def test_mi_does_not_see_rotation_scale_or_shift(score):
    x, y = shared(300, 30, 24, 5, 0.8, 5)
    moved = 1e-3 * x @ rotation(30, 9) + 7
    # the cap on outlier coordinates must not bite in either basis
    assert one(moved, 40 * y, score) == pytest.approx(one(x, y, score), abs=1e-6)


def test_gaussian_mi_does_not_see_any_invertible_map_when_nothing_is_left_out():
    x, y = shared(400, 6, 5, 5, 0.7, 5, std=1.0)
    moved = x @ (torch.eye(6, dtype=torch.float64) + 0.3 * randn(6, 6, seed=1))
    assert one(moved, y, "gaussian_mi") == pytest.approx(one(x, y, "gaussian_mi"), abs=1e-8)


@pytest.mark.parametrize("score", ["gaussian_mi", "cca_mi", "ksg", "cka"])
def test_symmetric(score):
    x, y = shared(300, 30, 12, 5, 0.8, 5)
    assert one(x, y, score) == pytest.approx(one(y, x, score), abs=1e-8)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.9])
def test_ksg_in_two_dimensions(rho):
    x, y = shared(2000, 1, 1, 1, rho, 4)
    assert one(x, y, "ksg") == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.1)


def test_ksg_against_a_written_out_count():
    x, y = shared(60, 1, 1, 1, 0.9, 4)
    dx, dy = ((z - z.T).abs() / (z - z.mean()).norm() for z in (x, y))
    radius = torch.maximum(dx, dy).sort(1).values[:, 3:4]  # the zeroth is the point itself
    counts = torch.stack([(dx < radius).sum(1), (dy < radius).sum(1)]).double()
    known = torch.digamma(torch.tensor([3.0, 60.0], dtype=torch.float64)).sum()
    assert one(x, y, "ksg") == pytest.approx(float(known - torch.digamma(counts).mean(1).sum()), abs=1e-9)


def test_ksg_sees_what_linear_scores_do_not():
    x = randn(1000, 1, seed=1)
    y = x**2 + 0.1 * randn(1000, 1, seed=2)
    assert one(x, y, "ksg") > 0.8
    assert one(x, y, "gaussian_mi") < 0.05


def test_cca_mi_errs_low_but_finds_most():
    x, y = shared(1000, 256, 256, 5, 0.8, 1)
    assert 0.85 * 2.554 < one(x, y, "cca_mi") < 2.6


@pytest.mark.parametrize("score", ["gaussian_mi", "cca_mi", "ridge_r2", "cka", "mutual_knn", "ksg"])
def test_equal_and_rank_deficient_layers_stay_finite(score):
    x = randn(200, 2, seed=1) @ randn(2, 30, seed=2)
    x[:3] = x[0]  # repeated texts
    assert math.isfinite(one(x, x.clone(), score))
    assert abs(one(x, x.clone(), score)) > 0.5


# -------------------------------------------------------------------------------------------------------- other scores


def test_cka_is_one_for_a_rotated_copy_and_zero_for_independent_data():
    x = randn(120, 300, seed=1)
    assert one(x, 5 * x @ rotation(300, 2) + 1, "cka") == pytest.approx(1, abs=1e-9)
    assert abs(one(x, randn(120, 300, seed=3), "cka")) < 0.02  # the biased one gives 0.7


def test_cka_against_the_written_out_unbiased_hsic():
    x, y = shared(30, 6, 9, 3, 0.8, 2)

    def hsic(a, b):
        n = len(a)
        k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (a, b))
        k, m = k - k.diag().diag(), m - m.diag().diag()
        cross = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)
        return cross / (n * (n - 3))

    assert one(x, y, "cka") == pytest.approx(float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()), abs=1e-10)


def test_mutual_knn():
    x = randn(200, 40, seed=1)
    assert one(x, 3 * x @ rotation(40, 2), "mutual_knn") == 1
    null = match_layers({0: x}, {0: x}, "mutual_knn", permutations=20).null
    assert float(null.mean()) == pytest.approx(10 / 199, abs=0.005)


def test_mutual_knn_null_equals_the_score_of_reordered_rows():
    x, y = shared(80, 20, 20, 5, 0.9, 1)
    order = torch.as_tensor(np.random.default_rng(0).permutation(80))
    method = SCORES["mutual_knn"]
    reordered = method.grid([method.prepare(x)], [method.prepare(y)], order, order)
    assert float(reordered) == one(x, y[order], "mutual_knn")


def test_ridge_r2_of_a_linear_map_and_of_noise():
    x = randn(600, 8, seed=1) @ randn(8, 40, seed=2)
    assert one(x, x @ randn(40, 60, seed=3), "ridge_r2") == pytest.approx(1, abs=1e-3)
    assert one(x, randn(600, 60, seed=4), "ridge_r2") < 0.02


@pytest.mark.parametrize("score", ["cka", "mutual_knn", "gaussian_mi", "ridge_r2"])
def test_massive_coordinates_do_not_hide_the_rest(score):
    x, y = shared(500, 128, 128, 5, 0.9, 1)
    loud_x, loud_y = x.clone(), y.clone()
    loud_x[:, 3] = 1000 * randn(500, seed=7)
    loud_y[:, 5] = 1000 * randn(500, seed=8)
    assert one(loud_x, loud_y, score) > 0.4 * one(x, y, score)


# ------------------------------------------------------------------------------------------------------------ the grid


@pytest.mark.parametrize("score", ["gaussian_mi", "cca_mi", "cka", "mutual_knn", "ridge_r2", "ksg"])
def test_planted_diagonal(score):
    n, steps = 240, 5
    h, E, T = randn(n, 5, seed=0), {}, {}
    for i in range(steps):
        h = 0.6 * h + 0.8 * randn(n, 5, seed=10 + i)  # a chain: the further apart, the less in common
        E[2 * i] = 3 * h @ rotation(40, 20 + i)[:5] + 0.3 * randn(n, 40, seed=30 + i)
        T[3 * i] = 3 * h @ rotation(64, 40 + i)[:5] + 0.3 * randn(n, 64, seed=50 + i)
    scores = match_layers(E, T, score, permutations=4 if score == "ksg" else 20)
    assert scores.matrix.argmax(0).tolist() == list(range(steps))
    assert scores.matrix.argmax(1).tolist() == list(range(steps))
    assert {(p.expert, p.target) for p in scores.pairs(5, "highest", "grid", band=None)} == {
        (2 * i, 3 * i) for i in range(steps)
    }
    assert (scores.z().diag() > 5).all()
    assert (scores.p_values().diag() == 1 / (len(scores.null) + 1)).all()


def test_grid_cells_equal_single_pairs_and_batched_null_equals_reordered_rows():
    E = {1: randn(100, 12, seed=1), 4: randn(100, 12, seed=2)}
    T = {0: E[1] @ randn(12, 30, seed=3), 7: randn(100, 30, seed=4), 9: E[4][:, :3]}
    order = torch.as_tensor(np.random.default_rng(1).permutation(100))
    for name, method in SCORES.items():
        matrix = match_layers(E, T, name, permutations=0).matrix
        alone = [[one(E[i], T[j], name) for j in sorted(T)] for i in sorted(E)]
        torch.testing.assert_close(matrix, torch.tensor(alone, dtype=torch.float64), rtol=1e-9, atol=1e-9)
        e, t, shuffled = (
            [method.prepare(x) for x in side] for side in (E.values(), T.values(), [y[order] for y in T.values()])
        )
        split = torch.arange(100)
        torch.testing.assert_close(
            method.grid(e, t, order, split), method.grid(e, shuffled, split, split), atol=1e-8, rtol=0
        )


def test_permutations_follow_random_state_and_leave_the_matrix_alone():
    x, y = shared(80, 10, 10, 2, 0.5, 1)
    a, b, c = (match_layers({0: x}, {0: y}, "cca_mi", 5, s) for s in (1, 1, 2))
    assert torch.equal(a.null, b.null)
    assert not torch.equal(a.null, c.null)
    few = match_layers({0: x}, {0: y}, "cca_mi", 2, 1)
    assert torch.equal(few.matrix, a.matrix)
    assert torch.equal(few.null, a.null[:2])
    state = torch.random.get_rng_state()
    match_layers({0: x}, {0: y})
    assert torch.equal(state, torch.random.get_rng_state())


def test_one_shuffle_for_all_layers():
    x, y = shared(80, 10, 10, 2, 0.5, 1)
    null = match_layers({0: x, 1: x}, {0: y, 1: y}, permutations=3).null
    assert torch.allclose(null, null[:, :1, :1].expand(3, 2, 2), atol=1e-12)


def test_callable_score_gets_states_as_given():
    def first_entries(x, y):
        return x[0, 0] + y[0, 0]

    E = {0: torch.tensor([[1.0], [2.0]]), 3: np.array([[5.0], [6.0]])}
    scores = match_layers(E, {2: torch.tensor([[10.0], [20.0]], dtype=torch.float16)}, first_entries, permutations=4)
    assert scores.matrix.tolist() == [[11.0], [15.0]]
    assert scores.score == "first_entries"
    assert scores.expert_layers == (0, 3)
    assert set(scores.null[:, 0, 0].tolist()) <= {11.0, 21.0}
    with pytest.raises(ValueError, match="NaN or infinity for 2 pairs"):
        match_layers(E, {0: E[0]}, lambda x, y: math.nan)


# ----------------------------------------------------------------------------------------------------- choice of pairs


def made(matrix, null=None, **kw):
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    e, t = matrix.shape
    null = matrix.new_empty(0, e, t) if null is None else null
    options = {"expert_layers": tuple(range(e)), "target_layers": tuple(range(t)), **kw}
    return LayerScores(score="cka", matrix=matrix, null=null, n_texts=9, **options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pairs_against_brute_force(data):
    e, t = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    matrix = np.array(data.draw(st.permutations(range(e * t))), dtype=float).reshape(e, t)
    select = data.draw(st.sampled_from(["lowest", "highest"]))
    per = data.draw(st.sampled_from(["target", "expert", "grid"]))
    reuse = data.draw(st.booleans())
    low, high = sorted(data.draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    depth_e, depth_t = data.draw(st.integers(e, 9)), data.draw(st.integers(t, 9))
    scores = made(matrix, expert_depth=depth_e, target_depth=depth_t)
    rows = [i for i in range(e) if low - 1e-9 <= i / max(depth_e - 1, 1) <= high + 1e-9]
    columns = [j for j in range(t) if low - 1e-9 <= j / max(depth_t - 1, 1) <= high + 1e-9]
    best = min if select == "lowest" else max
    expected = []
    if per == "target":
        expected = [best((matrix[i, j], i, j) for i in rows) for j in columns if rows]
    elif per == "expert":
        expected = [best((matrix[i, j], i, j) for j in columns) for i in rows if columns]
    else:
        r, c = list(rows), list(columns)
        cells = [(matrix[i, j], i, j) for i in r for j in c]
        while cells:
            s, i, j = best(cells)
            expected.append((s, i, j))
            cells = [x for x in cells if (x != (s, i, j) if reuse else x[1] != i and x[2] != j)]
    expected = [LayerPair(i, j, s) for s, i, j in sorted(expected, reverse=select == "highest")]
    if not expected:
        with pytest.raises(ValueError, match="lies in band"):
            scores.pairs(1, select, per, (low, high), reuse)
        return
    k = data.draw(st.integers(1, len(expected)))
    assert scores.pairs(k, select, per, (low, high), reuse) == expected[:k]
    with pytest.raises(ValueError, match=f"has {len(expected)} to choose from"):
        scores.pairs(len(expected) + 1, select, per, (low, high), reuse)


def test_ties_go_to_the_lower_layers():
    assert made(np.zeros((3, 3))).pairs(2, band=None) == [LayerPair(0, 0, 0.0), LayerPair(0, 1, 0.0)]


def test_band_uses_the_depth_of_the_model_where_known():
    class Activations(UserDict):
        n_layers = 11

    x = {layer: randn(40, 4, seed=layer) for layer in range(5)}
    scores = match_layers(Activations(x), x, "cka", permutations=0)
    assert (scores.expert_depth, scores.target_depth) == (11, None)
    chosen = scores.pairs(3, per="grid", band=(0.2, 0.75), reuse=True)
    assert {p.expert for p in chosen} <= {2, 3, 4}  # of 0..10
    assert {p.target for p in chosen} <= {1, 2, 3}  # of 0..4


def test_p_values_and_z_from_a_known_null():
    null = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)[:, None, None].expand(4, 1, 2)
    scores = made([[2.0, 9.0]], null)
    assert scores.p_values().tolist() == [[3 / 5, 1 / 5]]
    assert scores.z()[0, 1] == pytest.approx((9 - 1.5) / float(null[:, 0, 0].std()))
    with pytest.raises(ValueError, match=r"permutations=20"):
        made([[1.0]]).z()


def test_repr():
    x, y = shared(60, 9, 9, 3, 0.9, 1)
    text = repr(match_layers({2: x, 3: x[:, :4]}, {5: y}, permutations=5))
    assert "gaussian_mi (nats), 2 expert x 1 target layers, 60 texts" in text
    assert "95 %" in text
    assert "highest  " in text
    assert "95 %" not in repr(made([[1.0]]))


# ----------------------------------------------------------------------------------------------------- plot and errors


def test_plot_marks_pairs_and_leaves_no_open_figure():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    scores = made(np.arange(28.0).reshape(4, 7), expert_layers=(0, 2, 4, 6))
    figure = scores.plot([LayerPair(4, 1, 0.0)])
    axes = figure.axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[1.0, 2.0]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2", "4", "6"]
    figure.savefig(io.BytesIO())  # canvas.draw() does nothing outside of pyplot
    assert not scores.plot().axes[0].collections
    assert len(scores.plot(pairs=scores.pairs(k=3)).axes[0].collections[0].get_offsets()) == 3
    assert scores.plot(ax=axes) is figure
    assert pyplot.get_fignums() == []


def test_plot_without_matplotlib(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kw):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'expertsteer_nnsight\[plot\]'"):
        made([[1.0]]).plot()


def test_errors_say_what_was_found():
    x = randn(50, 4, seed=1)
    with pytest.raises(ValueError, match=r"T\[7\] has 49 texts but E\[3\] has 50"):
        match_layers({3: x}, {7: x[1:]})
    with pytest.raises(ValueError, match=r"T\[9\] has 49 texts but E\[3\] has 50"):
        match_layers({3: x}, {7: x, 9: x[1:]})
    with pytest.raises(ValueError, match=r"'gaussian_mi' needs 40 texts or more, but E\[3\] has 39"):
        match_layers({3: x[:39]}, {7: x[:39]})
    with pytest.raises(
        ValueError, match="'mi' is unknown: use one of gaussian_mi, cca_mi, ksg, cka, mutual_knn, ridge_r2"
    ):
        match_layers({3: x}, {7: x}, "mi")
    with pytest.raises(ValueError, match=r"E\[0\] is the same for all 50 texts"):
        match_layers({0: torch.ones(50, 4)}, {7: x})
    with pytest.raises(ValueError, match=r"T has layers \[\]"):
        match_layers({3: x}, {})
    with pytest.raises(ValueError, match=r"counted from 0"):
        match_layers({-1: x}, {0: x})
    with pytest.raises(ValueError, match=r"T\[0\] has NaN"):
        match_layers({1: x}, {0: x * math.nan})
    with pytest.raises(ValueError, match="0 or more"):
        match_layers({1: x}, {0: x}, permutations=-1)
    with pytest.raises(ValueError, match=r"No expert layer lies in band=\(0.1, 0.9\): the expert layers are \[0, 1\]"):
        made(np.eye(2)).pairs()
    with pytest.raises(ValueError, match=r"k=5 pairs were asked for.*has 4 to choose from"):
        made(np.eye(4)).pairs(band=None)
