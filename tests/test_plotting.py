"""What the figures draw, read back from the artists. `test_layer_matching` and `test_receipts` draw what they make."""

from __future__ import annotations

import io
import math
import sys

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError

from expertsteer_nnsight.directions.rfm import RecursiveFeatureMachine
from expertsteer_nnsight.measure.receipts import Receipt
from expertsteer_nnsight.plotting import figure, plot_doses, plot_receipt, plot_spectrum, plot_tokens

pytest.importorskip("matplotlib")
TOKENS = ["The", " train", " $_$", " costs", "5", "\n"]  # the third is no mathematics, and cannot be read as such


@pytest.fixture(scope="module")
def machine():
    g = torch.Generator().manual_seed(0)
    y = (torch.arange(80) % 2).double()
    X = torch.randn(80, 12, generator=g, dtype=torch.float64)
    X[:, 0] += 2 * (2 * y - 1)
    return RecursiveFeatureMachine().fit(X, y)


def rendered(fig):
    fig.savefig(io.BytesIO())  # canvas.draw() does nothing outside of pyplot


def cells(ax):
    return [text.get_text() for text in ax.texts]


def test_a_spectrum_is_drawn_with_its_cumulative_share(machine):
    left, right = plot_spectrum(machine, most=5).axes
    (share,), (cumulative,) = left.get_lines(), right.get_lines()
    assert np.allclose(share.get_ydata(), machine.spectrum_shares_[:5])
    assert np.allclose(cumulative.get_ydata(), machine.spectrum_shares_[:5].cumsum(0))
    assert list(share.get_xdata()) == [1, 2, 3, 4, 5] and left.get_yscale() == "log"
    assert left.get_xlabel() == "eigenvector of the AGOP, 5 of 12"
    (_, whole) = plot_spectrum(machine).axes
    assert math.isclose(whole.get_lines()[0].get_ydata()[-1], 1) and whole.get_ylim()[1] > 1
    with pytest.raises(ValueError, match="most is 0"):
        plot_spectrum(machine, most=0)
    with pytest.raises(NotFittedError):
        plot_spectrum(RecursiveFeatureMachine())


def test_a_spectrum_with_eigenvalues_of_zero_is_drawn(machine):
    flat = RecursiveFeatureMachine()
    flat.spectrum_shares_ = torch.tensor([1.0, 0.0, 0.0])
    made = plot_spectrum(flat)
    rendered(made)
    assert made.axes[0].get_ylim()[0] > 0


def test_one_prompt_is_drawn_as_bars_above_its_tokens():
    values = [0.1, 0.4, math.nan, 0.2, 0.3, 0.0]
    ax = plot_tokens(values, TOKENS, label="KL, nats").axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.1, 0.4, 0.0, 0.2, 0.3, 0.0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["The", "·train", "·$_$", "·costs", "5", "\\n"]
    assert ax.get_ylabel() == "KL, nats"
    rendered(ax.figure)


def test_prompts_are_drawn_as_rows_and_what_is_beyond_their_ends_is_empty():
    rows = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([4.0])]
    ax = plot_tokens(rows, [TOKENS[:3], ["A"]], label="KL, nats").axes[0]
    (image,) = ax.get_images()
    grid = image.get_array()
    assert grid.filled(-1).tolist() == [[0, 1, 2], [4, -1, -1]] and image.get_clim() == (0, 4)
    assert cells(ax) == ["The", "·train", "·$_$", "A"]
    rendered(ax.figure)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["1", "2"]
    signed = plot_tokens([[-3.0, 1.0], [2.0, 0.0]], [["a", "b"]] * 2).axes[0].get_images()[0]
    assert signed.get_clim() == (-3, 3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padded_tokens", [True, False])
def test_padding_is_left_out_on_either_side(side, padded_tokens):
    pad = 2
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :pad] = False
    tokens = [list("abcde"), ["<pad>", "<pad>", *"xyz"]]
    values = torch.arange(10.0).reshape(2, 5)
    if side == "right":
        mask, values, tokens = mask.flip(1), values.flip(1), [row[::-1] for row in tokens]
    if not padded_tokens:
        tokens = [[t for t in row if t != "<pad>"] for row in tokens]
    ax = plot_tokens(values, tokens, mask).axes[0]
    real = values[1][mask[1]].tolist()
    assert ax.get_images()[0].get_array().filled(-1)[1].tolist() == [*real, -1, -1]
    assert "<pad>" not in cells(ax) and len(cells(ax)) == 8
    one = plot_tokens(values[1], tokens[1], mask[1]).axes[0]
    assert [bar.get_height() for bar in one.patches] == real


def test_tokens_of_a_vocabulary_are_shown_alike():
    assert cells(plot_tokens([[1.0, 2.0, 3.0]], [["Ġthe", "▁the", " the"]]).axes[0]) == ["·the"] * 3


def test_long_prompts_stand_upright_and_figures_stay_small():
    made = plot_tokens(torch.rand(2, 60), [["token"] * 60] * 2)
    assert {text.get_rotation() for text in made.axes[0].texts} == {90.0} and made.get_size_inches()[0] < 20


def test_values_that_do_not_fit_the_tokens_are_refused():
    with pytest.raises(ValueError, match="Prompt 1 has 2 values and 1 tokens"):
        plot_tokens([[1.0], [1.0, 2.0]], [["a"], ["b"]])
    with pytest.raises(ValueError, match="values of 1 prompts and tokens of 2"):
        plot_tokens([[1.0]], [["a"], ["b"]])
    with pytest.raises(ValueError, match="2 values, but 1 entries in the mask"):
        plot_tokens([1.0, 2.0], ["a", "b"], [True])
    with pytest.raises(ValueError, match="0 prompts"):
        plot_tokens([], [])


def arm(effect, nll, **changes):
    return {
        "effect": effect,
        "interval": [effect - 1, effect + 1],
        "effects": [effect],
        "draws": 1,
        "nll": nll,
        **changes,
    }


@pytest.fixture
def receipt():
    arms = {
        "expert": arm(3.0, 2.5),
        "random": arm(1.0, 2.4, interval=None, effects=[-1.0, 0.5], draws=2),
        "prompted": arm(2.0, None),
    }
    doses = {"expert": [[0.5, 1.5, 1.0, 2.0], [1.0, 3.0, 2.0, 4.0]]}
    return Receipt(arms, {"score": 0.0, "nll": 2.0}, 1.0, "nats", doses=doses)


def test_a_receipt_draws_every_arm_at_its_cost(receipt):
    ax = plot_receipt(receipt).axes[0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["expert", "random", "prompted"]
    points = [line.get_xydata().tolist() for line in ax.get_lines()]
    assert [[0.5, 3.0]] in points and any(
        np.allclose(p, [[0.4, 1.0], [0.4, 0.5]]) for p in points
    )  # |effect| of the draws
    assert "effect" in ax.get_ylabel() and "nats" in ax.get_ylabel()


def test_doses_begin_at_no_effect(receipt):
    ax = plot_doses(receipt).axes[0]
    assert ax.get_lines()[0].get_xydata().tolist() == [[0, 0], [0.5, 1.5], [1, 3]]


def test_figures_go_where_they_are_asked_to_and_stay_out_of_pyplot(machine, receipt):
    from matplotlib import pyplot

    pyplot.switch_backend("agg")
    fig, axes = figure(8, 3, columns=4)
    assert plot_spectrum(machine, ax=axes[0]) is fig and plot_receipt(receipt, ax=axes[1]) is fig
    assert plot_tokens([[1.0], [2.0]], [["a"], ["b"]], ax=axes[2]) is fig
    assert plot_tokens([1.0], ["a"], ax=axes[3]) is fig and axes[3].patches
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("draw", [lambda m: plot_spectrum(m), lambda m: plot_tokens([1.0], ["a"])])
def test_without_matplotlib(machine, monkeypatch, draw):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'expertsteer_nnsight\[plot\]'"):
        draw(machine)
