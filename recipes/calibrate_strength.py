"""Give a plan's strength a unit: the KL divergence that it costs, and the effect that a dose of it has.

    python -m recipes.calibrate_strength

Dose 1 is the strength at which 95 % of the tokens of neutral texts have a KL(steered || unsteered) below the budget. Every strength
that was tried stays in `plan.info["calibration"]["curve"]`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import expertsteer_nnsight as es
from expertsteer_nnsight.measure.calibration import neutral_tokens
from expertsteer_nnsight.measure.scoring import costs, encoded
from expertsteer_nnsight.plotting import figure, plot_tokens
from expertsteer_nnsight.steering.plan import total_strength
from recipes import pair

DOSES = (0.25, 0.5, 1.0, 1.5, 2.0)


def dose_rows(towards: es.SteeringPlan, away: es.SteeringPlan, doses: Sequence[float]) -> list[tuple[float, ...]]:
    """Dose, total strength, 95th percentile of the KL, NLL and effect (towards minus away), a row for each dose."""
    model, plans = pair.target(), [dose * plan for dose in doses for plan in (towards, away)]
    kl, nll = costs(model, plans, neutral_tokens(model, pair.neutral()))
    odds = pair.words().score(model, plans).mean(1)[1:]
    p95, nll = kl[1:].quantile(0.95, dim=1), nll[1:].mean(1)
    return [
        (dose, total_strength(plans[2 * i]), float(p95[2 * i]), float(nll[2 * i]), float(odds[2 * i] - odds[2 * i + 1]))
        for i, dose in enumerate(doses)
    ]


def main(argv: Sequence[str] | None = None) -> es.SteeringPlan:
    """Prints the tables, saves the figure and returns the calibrated plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl", type=float, default=1.0, help="budget in nats (default: %(default)s)")
    parser.add_argument("--doses", type=float, nargs="+", default=DOSES, help="in units of the budget's strength")
    parser.add_argument("--out", type=Path, default=pair.FIGURES, help="where the figure goes (default: %(default)s)")
    args = parser.parse_args(argv)
    model, plan = pair.target(), pair.plan()
    towards, away = es.calibrate([plan, -plan], model, pair.neutral(), args.kl)

    fig, (left, right) = figure(14, 3.6, columns=2)
    for name, one in (("towards", towards), ("away", away)):
        strengths, kls = zip(*one.info["calibration"]["curve"], strict=True)
        print(
            f"{name}: KL by strength  " + "  ".join(f"{s:.3f}: {kl:.2f}" for s, kl in zip(strengths, kls, strict=True))
        )
        left.loglog(strengths, kls, "o-", ms=4, label=name)
    left.axhline(args.kl, color="0.6", lw=0.8, ls=":")
    left.set(xlabel="total strength (residual norms)", ylabel="95th percentile of the KL (nats)")
    left.legend(fontsize=8, frameon=False)
    text = encoded(model, pair.neutral()[:1])
    tokens = [model.tokenizer.decode([i]) for i in text[0].ids[text[0].prefix :]]
    plot_tokens(costs(model, [towards], text)[0][1], tokens, label="KL(steered || unsteered), nats", ax=right)
    args.out.mkdir(parents=True, exist_ok=True)
    fig.savefig(args.out / "calibrate_strength.png", dpi=120)

    print(f"{'dose':>5}{'strength':>10}{'KL p95':>8}{'NLL':>7}{'effect, nats':>14}")
    rows = dose_rows(towards, away, args.doses)
    for dose, strength, kl, nll, effect in rows:
        print(f"{dose:>5.2f}{strength:>10.3f}{kl:>8.2f}{nll:>7.2f}{effect:>14.2f}")
    more = [last / first for first, last in zip(rows[0], rows[-1], strict=True)]
    print(
        f"Read where more strength stops paying: {more[0]:.3g} times the dose has {more[4]:.2g} times the effect, and "
        f"{more[2]:.2g} times the KL. The curve, and where in a text the KL falls, are in {args.out / 'calibrate_strength.png'}."
    )
    return towards


if __name__ == "__main__":
    main()
