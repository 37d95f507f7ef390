"""Steer a model that runs on NDIF, with an expert that runs here or there.

    NDIF_API_KEY=... python -m recipes.steer_on_ndif                       # the public service
    NDIF_HOST=http://... python -m recipes.steer_on_ndif --target ORG/NAME  # a server of your own, which loads it

What leaves this machine: the texts, the source of the traced blocks with the paths of their files, and the plan that
steers. What comes back is a tensor of hidden states, a few numbers a token, or token ids.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import nnsight
from nnsight import CONFIG

import expertsteer_nnsight as es
from expertsteer_nnsight.models.packaged import load


def running(remote: es.Remote) -> str:
    """The first text-generating model in the host's list."""
    for found in remote.models():
        # as `load` asks for it
        mine = found.get("task") == "text-generation" and found.get("revision") in (None, "main")
        if mine and found.get("application_state") == "RUNNING":
            return found["repo_id"]
    raise SystemExit(
        f"No model is in {remote.address}'s list of running ones, which may be a minute old: name one with --target."
    )


def write_on(
    target: Any, plan: es.SteeringPlan | None, prompts: list[str], tokens: int, remote: es.Remote
) -> list[str]:
    """Continuations of the prompts, steered in every decode step."""
    model = target if plan is None else plan.attach(target)
    with model.generate(prompts, max_new_tokens=tokens, do_sample=False, backend=remote.backend(target)) as tracer:
        ids = nnsight.save(tracer.result)
    return target.tokenizer.batch_decode(ids, skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> es.SteeringPlan:
    """Fits, calibrates and generates; returns the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="hub id of the model to steer (default: the first that runs on the host)")
    parser.add_argument("--expert", help="hub id or folder (default: Gemma-3-270M out of its wheel, which runs here)")
    parser.add_argument("--remote-expert", action="store_true", help="the expert runs on the host too")
    parser.add_argument("--anchors", type=int, default=300, help="texts that both models read (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens a prompt (default: %(default)s)")
    args = parser.parse_args(argv)

    CONFIG.APP.REMOTE_LOGGING = False  # nnsight's spinner, which would stand between the results
    remote = es.Remote()
    name = args.target or running(remote)
    print(f"Steering {name} on {remote.address}.")
    target = load(name, here=False)
    expert = load(args.expert or "gemma-3-270m", here=not args.remote_expert)
    pairs, probe = es.example("sentiment_pairs").split("train"), es.example("sentiment_probe")
    plan = es.ExpertSteer.recommended().fit(
        expert, target, pairs, es.example("general")[: args.anchors],
        remote_expert=remote if args.remote_expert else False, remote_target=remote,
    )  # fmt: skip
    # at the strength that costs 1 nat of KL each; computed on the server
    towards, away = es.calibrate([plan, -plan], target, probe["neutral_texts"][:4], remote=remote, progress=True)
    prompts = list(probe["test_prompts"][:3])
    for name, arm in (("unsteered", None), ("towards", towards), ("away", away)):
        for text in write_on(target, arm, prompts, args.tokens, remote):
            print(f"{name:>9}: {text!r}")
    sent = remote.traffic
    print(f"{sent.jobs} jobs, {sent.sent / 1e6:.2f} MB sent, {sent.received / 1e6:.2f} MB received.")
    return towards


if __name__ == "__main__":
    main()
