"""Figures, returned and never shown. matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import Any

import numpy as np


def figure(width: float | int, height: float | int, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, outside of pyplot's registry.

    Args:
        width: in inches, like the height.
        height: of the whole figure.
        columns: axes side by side.
        rows: of axes.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Figures need matplotlib: pip install 'expertsteer_nnsight[plot]'.") from None
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(rows, columns)


def plot_receipt(receipt: Any, ax: Any = None) -> Any:
    """Effect of every arm, with its interval, against its cost in NLL on neutral text (nats a token) at equal KL.

    Small dots are single draws: |effect| of the arms told by a distribution, effects of the others. The arm of an instruction
    has no such cost and is drawn as a line.

    Raises:
        ImportError: matplotlib is missing.
    """
    fig, ax = (ax.figure, ax) if ax is not None else figure(7, 5)
    base, handles = receipt.unsteered["nll"], []
    for number, (name, arm) in enumerate(receipt.arms.items()):
        color = f"C{number}"
        if arm["nll"] is None:
            handles.append(ax.axhline(arm["effect"], color=color, lw=1, ls="--", label=name))
            continue
        cost, null = arm["nll"] - base, arm["interval"] is None
        if arm["draws"] > 1:
            draws = [abs(e) if null else e for e in arm["effects"]]
            ax.plot([cost] * len(draws), draws, ".", ms=4, color=color, alpha=0.4)
        if null:
            handles += ax.plot(cost, arm["effect"], "_", ms=9, mew=2, color=color, label=name)
        else:
            low, high = arm["interval"]
            error = [[max(0.0, arm["effect"] - low)], [max(0.0, high - arm["effect"])]]
            place = {"x": cost, "y": arm["effect"], "yerr": error}
            handles.append(ax.errorbar(**place, fmt="o", ms=6, capsize=3, lw=1.2, color=color, label=name))
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xlabel("rise of the NLL on neutral text (nats a token)")
    ax.set_ylabel(f"effect on held-out items ({receipt.unit})")
    ax.set_title(
        f"effect against cost at KL p95 = {receipt.kl_budget:.2f} nats; whiskers: 95 % intervals;\n"
        "bars: 95th percentile of |effect| over draws",
        fontsize=9,
    )
    # in the order of the arms: matplotlib's own puts error bars last
    ax.legend(handles=handles, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return fig


def plot_doses(receipt: Any, ax: Any = None) -> Any:
    """Effect against dose, with bootstrap intervals; dose 1 is the strength that meets the KL budget.

    Raises:
        ValueError: the receipt has no doses.
        ImportError: matplotlib is missing.
    """
    if not receipt.doses:
        raise ValueError("No doses were measured: call receipt(..., doses=(0.25, 0.5, 1.5)).")
    fig, ax = (ax.figure, ax) if ax is not None else figure(6, 4.5)
    for number, (name, rows) in enumerate(receipt.doses.items()):
        dose, effect, low, high = zip(*[(0.0, 0.0, 0.0, 0.0), *rows], strict=True)
        ax.plot(dose, effect, "o-", ms=4, color=f"C{number}", label=name)
        ax.fill_between(dose, low, high, color=f"C{number}", alpha=0.15, lw=0)
    ax.axhline(0, color="0.6", lw=0.8)
    ax.axvline(1, color="0.6", lw=0.8, ls=":")
    ax.set_xlabel(f"dose (1: KL p95 = {receipt.kl_budget:.2f} nats)")
    ax.set_ylabel(f"effect on held-out items ({receipt.unit})")
    ax.legend(fontsize=8, frameon=False)
    return fig


def plot_layer_scores(scores: Any, pairs: Any = None, ax: Any = None) -> Any:
    """Heat map of `LayerScores` (in the unit of the score), expert layers upwards, with `pairs` circled.

    Args:
        scores: what `match_layers` returned.
        pairs: `LayerPair`s.
        ax: matplotlib axes to draw on; None makes a figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    if ax is None:
        fig, ax = figure(6.4, 4.8)
    else:
        fig = ax.figure
    image = ax.imshow(scores.matrix.numpy(), origin="lower", aspect="auto", cmap="viridis")
    fig.colorbar(image, ax=ax, label=scores._label())
    for axis, layers in ((ax.xaxis, scores.target_layers), (ax.yaxis, scores.expert_layers)):
        step = -(-len(layers) // 12)
        axis.set_ticks(range(0, len(layers), step), labels=[str(layer) for layer in layers[::step]])
    ax.set_xlabel("target layer")
    ax.set_ylabel("expert layer")
    if pairs:
        x = [scores.target_layers.index(pair.target) for pair in pairs]
        y = [scores.expert_layers.index(pair.expert) for pair in pairs]
        ax.scatter(x, y, s=60, facecolors="none", edgecolors="red", linewidths=1.5)
    return fig


def plot_spectrum(machine: Any, most: int = 20, ax: Any = None) -> Any:
    """Eigenvalues of a fitted `RecursiveFeatureMachine`'s AGOP as shares of their sum, with the cumulative share.

    A cumulative share that begins near 1 means that the labels hang on one direction; a slow rise, that they need a subspace.

    Args:
        machine: the fitted machine.
        most: how many eigenvalues, at most.
        ax: matplotlib axes to draw on; `None` makes a figure.

    Raises:
        ValueError: fewer than one eigenvalue is asked for.
        NotFittedError: the machine is not fitted.
    """
    from sklearn.utils.validation import check_is_fitted

    check_is_fitted(machine, "spectrum_shares_")
    if most < 1:
        raise ValueError(f"most is {most}: at least one eigenvalue must be drawn.")
    fig, ax = (ax.figure, ax) if ax is not None else figure(6, 4)
    every = _numbers(machine.spectrum_shares_)
    shares = every[:most]
    number = np.arange(1, len(shares) + 1)
    whole = ax.twinx()
    (share,) = ax.semilogy(number, shares, "o-", ms=4, lw=1, color="C0", label="share")
    (sum_,) = whole.plot(number, shares.cumsum(), "s--", ms=3, lw=1, color="C1", label="cumulative share")
    ax.set_xlim(0.4, len(shares) + 0.6)
    ax.set_ylim(bottom=max(1e-6, shares.min() / 2))  # below are zeros, as rounding leaves them
    whole.set_ylim(0, 1.03)
    ax.set_xticks(number[:: -(-len(number) // 10)])
    ax.set_xlabel(f"eigenvector of the AGOP, {len(shares)} of {len(every)}")
    ax.set_ylabel("share of the sum of eigenvalues, log scale")
    whole.set_ylabel("cumulative share")
    whole.legend(handles=[share, sum_], fontsize=8, loc="center right", frameon=False)
    return fig


def plot_tokens(values: Any, tokens: Any, mask: Any = None, label: str = "", ax: Any = None) -> Any:
    """A value for each token, such as KL(steered || unsteered): where in the text an effect appears.

    One prompt is drawn as bars above its tokens, several as a heat map with a row each and the tokens in the cells. A missing
    value (NaN) and what lies beyond the end of a shorter prompt stay empty.

    Args:
        values: `[token]` of one prompt, or `[prompt, token]`: a tensor, or a list for each prompt, of unequal lengths if need be.
        tokens: texts of the tokens, in the same shape.
        mask: true at real tokens, in the shape of `values`; padding, on whichever side, is left out. `tokens` may then have
            entries for the padding too, or none.
        label: what the values are, with their unit.
        ax: matplotlib axes to draw on; `None` makes a figure.

    Raises:
        ValueError: no tokens, or not one for each value.
    """
    one = len(tokens) > 0 and isinstance(tokens[0], str)
    rows, names = _token_rows([values] if one else values, [tokens] if one else tokens, [mask] if one else mask)
    width = max(map(len, rows))
    if one:
        fig, ax = (ax.figure, ax) if ax is not None else figure(min(24, max(5, 0.32 * width + 1)), 3.4)
        ax.bar(range(width), np.nan_to_num(rows[0]), width=0.8, color="C0")
        ax.axhline(0, color="0.6", lw=0.8)
        ax.set_xticks(range(width), labels=names[0], rotation=90, fontsize=8)
        for text in ax.get_xticklabels():
            text.set_parse_math(False)  # a token may be a dollar sign
        ax.set_xlim(-0.6, width - 0.4)
        ax.set_ylabel(label)
        return fig
    grid = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        grid[i, : len(row)] = row
    known = grid[np.isfinite(grid)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    signed = low < 0
    reach = max(-low, high)
    longest = max(len(name) for row in names for name in row)
    upright = width > 16  # of long prompts the tokens stand, or the figure would be yards wide
    if ax is None:
        cell = (0.26, 0.085 * longest + 0.2) if upright else (0.085 * longest + 0.2, 0.36)
        fig, ax = figure(min(30, max(5, cell[0] * width + 1.4)), min(20, cell[1] * len(rows) + 1.0))
    else:
        fig = ax.figure
    ax.set_facecolor("0.88")  # what is empty is no small value
    image = ax.imshow(
        np.ma.masked_invalid(grid),
        aspect="auto",
        cmap="RdBu_r" if signed else "Blues",
        vmin=-reach if signed else 0.0,
        vmax=reach or 1.0,
    )
    fig.colorbar(image, ax=ax, label=label, fraction=0.05, pad=0.02)
    ax.set_xticks(np.arange(width + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=1)
    ax.tick_params(which="minor", length=0)
    for i, row in enumerate(names):
        for j, name in enumerate(row):
            red, green, blue, _ = image.to_rgba(grid[i, j]) if np.isfinite(grid[i, j]) else (1.0, 1.0, 1.0, 1.0)
            color = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black"
            ax.text(
                j, i, name, ha="center", va="center", fontsize=8, color=color, rotation=90 if upright else 0, clip_on=True,
                parse_math=False,
            )  # fmt: skip
    ax.set_xticks(range(0, width, -(-width // 12)))
    ax.set_yticks(range(len(rows)), labels=[str(i + 1) for i in range(len(rows))])
    ax.set_xlabel("token")
    ax.set_ylabel("prompt")
    return fig


def _token_rows(values: Any, tokens: Any, mask: Any) -> tuple[list[np.ndarray], list[list[str]]]:
    """Values and tokens of each prompt, without padding."""
    if not len(tokens) or len(values) != len(tokens):
        raise ValueError(
            f"There are values of {len(values)} prompts and tokens of {len(tokens)}: give one row for each."
        )
    rows, names = [], []
    for i, (value, text) in enumerate(zip(values, tokens, strict=True)):
        row, name = _numbers(value), [_shown(t) for t in text]
        if mask is not None and mask[i] is not None:
            real = _numbers(mask[i]).astype(bool)
            if len(real) != len(row):
                raise ValueError(f"Prompt {i} has {len(row)} values, but {len(real)} entries in the mask.")
            if len(name) == len(row):
                name = [t for t, keep in zip(name, real, strict=True) if keep]
            row = row[real]
        if not len(row) or len(row) != len(name):
            raise ValueError(
                f"Prompt {i} has {len(row)} values and {len(name)} tokens: give one value for each token, or a mask that "
                f"tells the padding."
            )
        rows.append(row)
        names.append(name)
    return rows, names


def _numbers(x: Any) -> np.ndarray:
    x = x.detach().cpu().double() if hasattr(x, "detach") else x
    return np.asarray(x, dtype=np.float64)


def _shown(token: str) -> str:
    """A token as a label: spaces, which vocabularies mark in ways of their own, as dots."""
    for space in (" ", "Ġ", "▁"):
        token = token.replace(space, "·")
    return token.replace("\n", "\\n").replace("Ċ", "\\n")
