"""Figures, returned and never shown. matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import Any


def figure(width: float | int, height: float | int, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, outside of pyplot's registry.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Figures need matplotlib: pip install 'expertsteer_nnsight[plot]'.") from None
    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(1, columns)


def plot_receipt(receipt: Any, ax: Any = None) -> Any:
    """Effect of every arm, with its interval, against its cost in NLL on neutral text (nats a token) at equal KL.

    Small dots are single draws: |effect| of the arms told by a distribution, effects of the others. The arm of an instruction
    has no such cost and is drawn as a line.
    """
    fig, ax = (ax.figure, ax) if ax is not None else figure(7, 5)
    base = receipt.unsteered["nll"]
    for number, (name, arm) in enumerate(receipt.arms.items()):
        color = f"C{number}"
        if arm["nll"] is None:
            ax.axhline(arm["effect"], color=color, lw=1, ls="--", label=name)
            continue
        cost, null = arm["nll"] - base, arm["interval"] is None
        if arm["draws"] > 1:
            draws = [abs(e) if null else e for e in arm["effects"]]
            ax.plot([cost] * len(draws), draws, ".", ms=4, color=color, alpha=0.4)
        if null:
            ax.plot(cost, arm["effect"], "_", ms=9, mew=2, color=color, label=name)
        else:
            low, high = arm["interval"]
            error = [[max(0.0, arm["effect"] - low)], [max(0.0, high - arm["effect"])]]
            ax.errorbar(cost, arm["effect"], yerr=error, fmt="o", ms=6, capsize=3, color=color, label=name)
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xlabel("rise of the NLL on neutral text (nats a token)")
    ax.set_ylabel(f"effect on held-out items ({receipt.unit})")
    ax.set_title(
        f"effect against cost at KL p95 = {receipt.kl_budget:.2f} nats; whiskers: 95 % intervals;\n"
        "bars: 95th percentile of |effect| over draws",
        fontsize=9,
    )
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return fig


def plot_doses(receipt: Any, ax: Any = None) -> Any:
    """Effect against dose, with bootstrap intervals; dose 1 is the strength that meets the KL budget.

    Raises:
        ValueError: the receipt has no doses.
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
    """Heat map of `LayerScores` (in the unit of the score), expert layers upwards, with `pairs` circled."""
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
