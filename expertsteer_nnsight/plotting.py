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
    """Effect (nats of log-odds) of every arm against its cost in NLL on neutral text (nats a token) at equal KL."""
    if ax is None:
        fig, ax = figure(7, 5)
    else:
        fig = ax.figure
    base = receipt.unsteered["nll"]
    for number, (name, arm) in enumerate(receipt.arms.items()):
        cost = arm["nll"] - base
        if "effects" in arm:
            ax.plot(
                [cost] * len(arm["effects"]), [abs(e) for e in arm["effects"]], ".", ms=4, color=f"C{number}", alpha=0.4
            )
        ax.plot(cost, arm["effect"], "_" if "effects" in arm else "o", ms=9, mew=2, color=f"C{number}", label=name)
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set_xlabel("rise of the NLL on neutral text (nats a token)")
    ax.set_ylabel("effect on held-out prompts (nats of log-odds)")
    ax.set_title(
        f"effect against cost at KL p95 = {receipt.kl_budget:.2f} nats; dots: draws, bar: their 95th percentile",
        fontsize=9,
    )
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
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
