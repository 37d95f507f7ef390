"""Figures, returned and never shown. matplotlib is imported when one is drawn."""

from __future__ import annotations

from typing import Any


def figure(*size: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, outside of pyplot's registry.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("Figures need matplotlib: pip install 'expertsteer_nnsight[plot]'.") from None
    fig = Figure(figsize=size, layout="constrained")
    return fig, fig.subplots(1, columns)


def plot_receipt(receipt: Any, ax: Any = None) -> Any:
    """Effect (nats of log-odds) of every arm, with its cost in NLL beside it; many draws as dots."""
    if ax is None:
        fig, ax = figure(7, 0.5 * len(receipt.arms) + 1.5)
    else:
        fig = ax.figure
    names = list(receipt.arms)[::-1]
    base = receipt.unsteered["nll"]
    for row, name in enumerate(names):
        arm = receipt.arms[name]
        if "effects" in arm:
            ax.plot([abs(e) for e in arm["effects"]], [row] * len(arm["effects"]), "o", ms=4, color="0.7", mew=0)
            ax.plot(arm["effect"], row, "|", ms=16, mew=2, color="0.35")
        else:
            ax.barh(row, arm["effect"], height=0.55, color="C0" if "untrained" not in name else "C1")
        ax.annotate(f" NLL +{arm['nll'] - base:.2f}", (max(arm["effect"], 0), row + 0.32), fontsize=7, color="0.35")
    ax.set_yticks(range(len(names)), names)
    ax.axvline(0, color="0.5", lw=0.8)
    ax.set_xlabel(f"effect on held-out prompts (nats of log-odds) at KL p95 = {receipt.kl_budget:.2f}")
    ax.set_title("dots and bar: |effect| of draws and its 95th percentile", fontsize=8, color="0.35")
    return fig
