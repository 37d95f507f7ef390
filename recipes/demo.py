"""The main job: steer one model with a direction from another, and measure what the expert added.

    python -m recipes.demo                                   # the packaged pair, no model hub needed
    python -m recipes.demo --expert HUB_ID --target HUB_ID   # any two causal models of the hub

Writes plan.safetensors, receipt.json and report.png, and keeps the models' states beside them, so that a second run, or one
after a crash, reads nothing twice. The test prompts serve for nothing but the receipt.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nnsight
import torch
from nnsight.modeling.transformers import TransformersModel
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from expertsteer_nnsight.calibration import with_total
from expertsteer_nnsight.identity import ModelIdentity, fingerprint
from expertsteer_nnsight.packaged_models import model_path
from expertsteer_nnsight.plotting import figure, plot_layer_scores, plot_receipt
from expertsteer_nnsight.texts import check_disjoint, encode


def load(name: str) -> TransformersModel:
    """A model by hub id or folder, in float32 for the packaged ones."""
    return TransformersModel(name, task="text-generation", dispatch=True)


def read_states(
    models: dict[str, Any], texts: dict[str, Any], layers: dict[str, Any], folder: Path
) -> dict[tuple[str, str], Any]:
    """States of every model for every set of texts that it needs."""
    found = {}
    for name, model in models.items():
        for kind, content in texts.items():
            found[name, kind] = es.collect(model, content, layers[name], cache=folder / f"{kind}-{fingerprint(model)}")
    return found


def fit_arms(
    states: dict[tuple[str, str], Any], pairs: Any, draws: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Plans of all arms, their layer pairs, and the fitted recommended estimator."""
    labels, groups = pairs.labels, pairs.groups
    arms: dict[str, Any] = {}
    layer_pairs: dict[str, list[tuple[int | None, int]]] = {}

    bar = tqdm(total=7, desc="fitting arms", unit="arm")

    def fit(name: str, steer: es.ExpertSteer, expert: str, anchors: str = "general") -> es.ExpertSteer:
        steer.set_params(random_state=seed)
        arms[name] = steer.fit_activations(
            states[expert, "pairs"], labels, states[expert, anchors], states["target", anchors], groups=groups
        )
        layer_pairs[name] = [(p.expert, p.target) for p in steer.pairs_]
        bar.update()
        return steer

    recommended = fit("recommended", es.ExpertSteer.recommended(permutations=20), "expert")
    same = [(p.expert, p.target) for p in recommended.pairs_]
    # the same layers for the controls, so that the expert's weights are all that differs
    fit("untrained", es.ExpertSteer.recommended(layers=same), "untrained")
    # in-domain texts alone: on the validation prompts the general ones beside them took a quarter of the effect away
    fit("in_domain", es.ExpertSteer.in_domain(layers=same), "expert", "in_domain")
    fit("in_domain_untrained", es.ExpertSteer.in_domain(layers=same), "untrained", "in_domain")
    fit("paper", es.ExpertSteer.paper(), "expert")
    own = [(t, t) for _, t in same]
    fit("native", es.ExpertSteer.recommended(aligner=es.IdentityAligner(), layers=own), "target")
    layer_pairs["native"] = [(None, t) for _, t in same]
    by_pair = [
        es.permuted_directions(
            recommended.aligners_[0], states["expert", "general"][e], states["target", "general"][t], direction.vector,
            direction.space, draws, seed,
        )
        for (e, t), direction in zip(same, recommended.directions_, strict=True)
    ]  # fmt: skip
    # a plan keeps its vectors in the order of layers, the pairs in that of their scores
    order = sorted(range(len(same)), key=lambda i: same[i][1])
    arms["permuted"] = [arms["recommended"].with_directions([by_pair[i][n] for i in order]) for n in range(draws)]
    layer_pairs["permuted"] = layer_pairs["recommended"]
    bar.update()
    bar.close()
    arms["random"] = es.random_plans(arms["recommended"], draws, seed)
    return arms, layer_pairs, recommended


def continuations(target: Any, plans: dict[str, Any], prompts: Sequence[str], tokens: int) -> dict[str, list[str]]:
    """The same prompts continued without a plan and with each of `plans`."""
    result = {}
    width = max(len(encode(target.tokenizer, p)[0]) for p in prompts)
    for name, plan in plans.items():
        model = target if plan is None else plan.attach(target)
        with torch.no_grad(), model.generate(list(prompts), max_new_tokens=tokens, do_sample=False) as tracer:
            ids = nnsight.save(tracer.result)
        result[name] = [
            target.tokenizer.decode(row[width:], skip_special_tokens=True).replace("\n", " ") for row in ids
        ]
    return result


def report(recommended: es.ExpertSteer, receipt: es.Receipt, path: Path) -> None:
    """Layer scores with the chosen pairs, and effect against cost of every arm."""
    fig, (left, right) = figure(13, 5, columns=2)
    plot_layer_scores(recommended.scores_, recommended.pairs_, ax=left)
    plot_receipt(receipt, ax=right)
    fig.savefig(path, dpi=130)


def verdict(receipt: es.Receipt) -> str:
    """Whether the expert added anything, in a sentence."""
    effect = {name: arm["effect"] for name, arm in receipt.arms.items()}
    best = effect["recommended"]
    noise = max(effect["permuted"], effect["random"])
    shown = "the expert added" if best > max(2 * effect["untrained"], noise) else "nothing shows that the expert added"
    return (
        f"recommended has {best / effect['native']:.2f} of the native effect; untrained has {effect['untrained']:.2f} nats and "
        f"chance up to {noise:.2f}, so {shown} something here."
    )


def main(argv: Sequence[str] | None = None) -> es.Receipt:
    """Runs the whole of it and returns the receipt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", help="hub id or folder (default: the packaged gemma-3-270m)")
    parser.add_argument("--target", help="hub id or folder (default: the packaged SmolLM2-135M-Instruct)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where to write (default: %(default)s)")
    parser.add_argument(
        "--draws", type=int, default=20, help="draws of the permuted and random arms (default: %(default)s)"
    )
    parser.add_argument("--kl", type=float, default=1.0, help="KL budget in nats (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: %(default)s)")
    args = parser.parse_args(argv)
    started = time.time()

    models: dict[str, Any] = {"expert": load(args.expert or str(model_path("gemma-3-270m")))}
    models["untrained"] = es.untrained_like(models["expert"], args.seed)
    models["target"] = load(args.target or str(model_path("SmolLM2-135M-Instruct")))
    pairs = es.example("sentiment_pairs").split("train")
    probe_data = es.example("sentiment_probe")
    probe = es.Probe(
        probe_data["test_prompts"],
        probe_data["positive_words"],
        probe_data["negative_words"],
        probe_data["neutral_texts"][:8],
    )
    texts = {"pairs": pairs.texts, "general": es.example("general"), "in_domain": es.example("sentiment_in_domain")}
    check_disjoint([*texts["general"], *texts["in_domain"]], [*es.example("sentiment_pairs").texts, *probe.prompts])
    expert_layers, target_layers = es.ExpertSteer.paper().wanted_layers(
        ModelIdentity.of(models["expert"]), ModelIdentity.of(models["target"])
    )
    layers = {"expert": expert_layers, "untrained": expert_layers, "target": target_layers}
    states = read_states(models, texts, layers, args.out / "states")
    arms, layer_pairs, recommended = fit_arms(states, pairs, args.draws, args.seed)
    receipt = es.measure(models["target"], arms, probe, args.kl, layer_pairs=layer_pairs)

    best = receipt.arms["recommended"]
    info = {**arms["recommended"].info, "receipt": {k: v for k, v in receipt.to_dict().items() if k != "probe"}}
    plan = es.SteeringPlan(
        with_total(arms["recommended"], best["strength_plus"]).vectors, arms["recommended"].target, info
    )
    away = with_total(-plan, best["strength_minus"])
    args.out.mkdir(parents=True, exist_ok=True)
    plan.save(args.out / "plan.safetensors")
    receipt.save(args.out / "receipt.json")
    report(recommended, receipt, args.out / "report.png")

    prompts = probe.prompts[:4]
    shown = continuations(models["target"], {"unsteered": None, "towards": plan, "away": away}, prompts, 24)
    for i, prompt in enumerate(prompts):
        print(f"\n{prompt}")
        for name, rows in shown.items():
            print(f"  {name:>9}: {rows[i]}")
    print(f"\n{receipt}\n\n{verdict(receipt)}")
    print(f"Wrote plan.safetensors, receipt.json and report.png to {args.out} in {time.time() - started:.0f} s.")
    return receipt


if __name__ == "__main__":
    main()
