"""The main job: steer one model with a direction from another, and measure what the expert added.

    python -m recipes.demo                                   # the packaged pair, no model hub needed
    python -m recipes.demo --expert HUB_ID --target HUB_ID   # any two causal models of the hub

Writes plan.safetensors, receipt.json and report.png, and keeps the models' states beside them, so that a second run, or one
after a crash, reads nothing twice. The test prompts serve for nothing but the receipt.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import expertsteer_nnsight as es
from expertsteer_nnsight.models.packaged import load
from expertsteer_nnsight.plotting import figure, plot_doses, plot_layer_scores, plot_receipt
from expertsteer_nnsight.states.shards import VERSION as STATES
from expertsteer_nnsight.texts.overlap import check_disjoint
from recipes.pair import print_continuations


def _say(what: str) -> None:
    print(what, flush=True)


def fit_arms(
    expert: Any, target: Any, pairs: Any, anchors: int, untrained: int, draws: int, seed: int, states: Path
) -> tuple[es.ExpertSteer, dict[str, Any]]:
    """The fitted recommended estimator, and what its plan is compared with."""
    general = es.example("general")[:anchors]
    _say("Fitting: both models read the texts.")
    recommended = es.ExpertSteer.recommended(permutations=20, random_state=seed)
    recommended.fit(expert, target, pairs, general, cache=states / "recommended")
    _say(f"Fitting the controls: {untrained} experts with random weights read the texts too.")
    controls: dict[str, Any] = recommended.controls(
        expert, target, pairs, general, untrained=untrained, draws=draws, cache=states / "recommended"
    )
    _say("Fitting the paper's settings.")
    paper = es.ExpertSteer.paper(random_state=seed)
    with warnings.catch_warnings():
        # it pairs layers that have least in common, where no direction tells the labels apart: the receipt shows what it does
        warnings.filterwarnings("ignore", "The direction's correlation with the labels")
        controls["paper"] = paper.fit(expert, target, pairs, general, cache=states / "paper")
    return recommended, controls


def report(recommended: es.ExpertSteer, receipt: es.Receipt, path: Path) -> None:
    """Layer scores with the chosen pairs, effect against cost of every arm, and effect against dose."""
    fig, (left, middle, right) = figure(19, 5, columns=3)
    plot_layer_scores(recommended.scores_, recommended.pairs_, ax=left)
    plot_receipt(receipt, ax=middle)
    plot_doses(receipt, ax=right)
    fig.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> es.Receipt:
    """Runs the whole of it and returns the receipt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", help="hub id or folder (default: the packaged gemma-3-270m)")
    parser.add_argument("--target", help="hub id or folder (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where to write (default: %(default)s)")
    parser.add_argument(
        "--draws", type=int, default=20, help="draws of the permuted and random arms (default: %(default)s)"
    )
    parser.add_argument("--anchors", type=int, default=1500, help="texts that both models read (default: %(default)s)")
    parser.add_argument("--untrained", type=int, default=5, help="untrained experts (default: %(default)s)")
    parser.add_argument("--kl", type=float, default=1.0, help="KL budget in nats (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: %(default)s)")
    args = parser.parse_args(argv)
    started = time.time()

    expert = load(args.expert or "gemma-3-270m")
    target = load(args.target or "SmolLM2-135M-Instruct")
    pairs, probe = es.example("sentiment_pairs").split("train"), es.example("sentiment_probe")
    words = es.Words(probe["test_prompts"], probe["positive_words"], probe["negative_words"])
    neutral = probe["neutral_texts"][:8]
    check_disjoint(es.example("general"), [*es.example("sentiment_pairs").texts, *words.prompts])
    recommended, controls = fit_arms(
        expert, target, pairs, args.anchors, args.untrained, args.draws, args.seed, args.out / f"states-{STATES}"
    )
    _say("Calibrating all arms to one KL, and measuring them.")
    towards, away = es.calibrate([recommended.plan_, -recommended.plan_], target, neutral, args.kl)
    receipt = es.receipt(towards, target, words, neutral, controls)

    args.out.mkdir(parents=True, exist_ok=True)
    receipt.plan.save(args.out / "plan.safetensors")
    receipt.save(args.out / "receipt.json")
    report(recommended, receipt, args.out / "report.png")

    prompts = probe["test_prompts"][:4]
    plans = {"unsteered": None, "towards": towards, "away": away}
    print_continuations(target, plans, prompts, 24)
    print(f"\n{receipt}\n")
    print(f"Wrote plan.safetensors, receipt.json and report.png to {args.out} in {time.time() - started:.0f} s.")
    return receipt


if __name__ == "__main__":
    main()
