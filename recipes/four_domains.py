"""Does an expert's knowledge reach the target? The paper's experiment, for any expert, target and task of lm-evaluation-harness.

    python -m recipes.four_domains --data FOLDER                      # what runs on two cores; hours, goes on where it stopped
    python -m recipes.four_domains --data FOLDER --scale paper --remote --dry-run    # names, shapes and sizes, without weights
    python -m recipes.four_domains --data FOLDER --expert HUB_ID --target HUB_ID --domains medical
    python -m recipes.four_domains --data FOLDER --parts fit          # then `--parts measure` on another machine

For each domain: contrast pairs from training items (the question with its right and with a wrong option), a fit on anchors that are
none of them, a dose chosen on validation items for every arm alike, and the accuracy on test items, against the same model
unsteered, item by item. Plans are kept in plans/; every evaluation is a line of results.jsonl with what became of each item.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import expertsteer_nnsight as es
from expertsteer_nnsight.packaged_models import load
from expertsteer_nnsight.texts import texts_hash
from recipes.domain_settings import SCALES, Domain
from recipes.domain_tables import Line, place, read_lines, report
from recipes.domain_texts import Tasks, texts_of

PARTS = ("fit", "measure", "expert")


class Models(dict[str, Any]):
    """The expert and the target of a domain, each loaded when it is first asked for."""

    def __init__(self, domain: Domain, args: Any) -> None:
        self._of = {"expert": (domain.expert, not args.remote_expert), "target": (domain.target, not args.remote)}

    def __missing__(self, role: str) -> Any:
        name, here = self._of[role]
        return self.setdefault(role, load(name, here=here))


def fitted(
    domain: Domain, models: Models, pairs: es.ContrastPairs, anchors: list[str], args: Any
) -> dict[str, list[es.SteeringPlan]]:
    """The plans of every arm that is a plan, all at the layers of the recommended one unless they are the paper's."""
    expert, target = models["expert"], models["target"]
    key = texts_hash([domain.expert, domain.target, *pairs.texts, *anchors])[:8]
    where: dict[str, Any] = {"cache": args.out / "states" / f"{domain.name}-{key}"}
    far = {"remote_expert": args.remote_expert, "remote_target": args.remote}
    paper = es.ExpertSteer.paper(random_state=args.seed)
    papers = [paper.fit(expert, target, pairs, anchors, **where, **far)]  # first: its layers hold those of the others
    steer = es.ExpertSteer.recommended(random_state=args.seed)
    arms = {"expert": [steer.fit(expert, target, pairs, anchors, **where, **far)]}
    controls = steer.controls(
        expert, target, pairs, anchors, untrained=args.untrained, draws=args.draws, **where, **far
    )
    arms |= {k: v if isinstance(v, list) else [v] for k, v in controls.items()}  # type: ignore[misc]
    at = [(p.expert, p.target) for p in steer.pairs_]
    rfm = es.ExpertSteer.recommended(direction="rfm", layers=at, random_state=args.seed)
    arms["expert_rfm"] = [rfm.fit(expert, target, pairs, anchors, **where, **far)]
    return {**arms, "paper": papers}


def kept_plans(domain: Domain, models: Models, tasks: Tasks, args: Any) -> list[tuple[str, int, es.SteeringPlan]]:
    """Arm, draw and plan at dose 1, of every arm that is a plan: read from plans/, or fitted and calibrated and kept there."""
    pairs, anchors = texts_of(tasks, domain.fit, args.seed, args.anchors)
    told = (domain.expert, domain.target, args.seed, args.kl, args.untrained, args.draws)
    folder = args.out / "plans" / f"{domain.name}-{texts_hash([str(told), *pairs.texts, *anchors])[:8]}"
    if not folder.exists():
        arms = fitted(domain, models, pairs, anchors, args)
        neutral = es.example("sentiment_probe")["neutral_texts"][:8]
        every = [(name, i, plan) for name, plans in arms.items() for i, plan in enumerate(plans)]
        doses = es.calibrate([plan for _, _, plan in every], models["target"], neutral, args.kl, remote=args.remote)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            for n, ((name, i, _), plan) in enumerate(zip(every, doses, strict=True)):
                plan.save(Path(made) / f"{n:02}-{name}-{i}.safetensors")
            os.rename(made, folder)  # the folder appears whole or not at all
            Path(made).mkdir()
    files = [(path.stem.split("-"), path) for path in sorted(folder.glob("*.safetensors"))]
    return [(name, int(draw), es.SteeringPlan.load(path)) for (_, name, draw), path in files]


class Measuring:
    """Evaluates arms of one domain, and keeps a line for each evaluation.

    Args:
        domain: the domain.
        models: the expert and the steered model.
        tasks: where tasks come from.
        args: of the command line.
    """

    def __init__(self, domain: Domain, models: Models, tasks: Tasks, args: Any) -> None:
        self.domain, self.models, self.tasks, self.args = domain, models, tasks, args
        self.path = args.out / "results.jsonl"
        self.lines = read_lines(self.path)
        self.place = place(domain, args)

    def line(
        self, task: str, split: str, arm: str, draw: int, dose: float, plan: Any, instruction: str | None = None
    ) -> Line:
        """One evaluation, measured unless it is there."""
        key = {**self.place, "task": task, "split": split, "arm": arm, "draw": draw, "dose": dose}
        for known in self.lines:
            if all(known[name] == value for name, value in key.items()):
                return known
        from lm_eval import evaluator

        from expertsteer_nnsight.interop.lm_eval import SteeredLM

        of_expert = arm == "expert_itself"
        remote = self.args.remote_expert if of_expert else self.args.remote
        lm = SteeredLM(
            self.models["expert" if of_expert else "target"], plan, remote=remote, batch_size=self.args.batch_size
        )
        asked = self.tasks(task, split)
        asked.set_fewshot_seed(seed=self.args.seed)
        # not simple_evaluate, which takes seconds each time to list the machine's packages
        found: Any = evaluator.evaluate(
            lm,
            {"tasks": {task: asked}},
            limit=self.args.validation if split == "validation" else self.args.limit,
            bootstrap_iters=0,
            system_instruction=instruction,
        )
        samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
        metrics = [m for m in ("acc", "acc_norm", "acc_mutual_info") if m in samples[0]]
        made = {**key, "n": len(samples), **{m: [int(s[m]) for s in samples] for m in metrics}}
        self.lines.append(made)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(made) + "\n")
        return made

    def unsteered(self) -> None:
        """The model as it is, and with an instruction."""
        for task in self.domain.tasks:
            self.line(task, "test", "unsteered", 0, 0.0, None)
            self.line(task, "test", "prompted", 0, 0.0, None, self.domain.instruction)

    def expert_itself(self) -> None:
        """What there is to transfer: the expert's own answers."""
        for task in self.domain.tasks:
            self.line(task, "test", "expert_itself", 0, 0.0, None)

    def arm(self, name: str, draw: int, plan: es.SteeringPlan) -> None:
        """One plan: the dose that does best on validation items, then the test items at it."""
        for task, metric in self.domain.tasks.items():
            tried = [(self._share(task, name, draw, dose, plan, metric), -dose) for dose in self.args.doses]
            dose = -max(tried)[1]
            self.line(task, "test", name, draw, dose, dose * plan)

    def _share(self, task: str, name: str, draw: int, dose: float, plan: es.SteeringPlan, metric: str) -> float:
        if len(self.args.doses) == 1:
            return 0.0
        return float(np.mean(self.line(task, "validation", name, draw, dose, dose * plan)[metric]))


def describe(domain: Domain, tasks: Tasks, args: Any) -> str:
    """Names and shapes of a domain, resolved without weights."""
    said = [f"{domain.name}:"]
    for role, name in (("expert", domain.expert), ("target", domain.target)):
        identity = es.Residual(load(name, here=False))
        said.append(f"  {role} {name}: {identity.n_layers} layers, width {identity.hidden_size}")
    pairs, anchors = texts_of(tasks, domain.fit, args.seed, args.anchors)
    said.append(
        f"  {len(pairs)} pairs of {domain.fit}, {len(anchors)} anchors; the first pair: {pairs.texts[:2]!r:.300}"
    )
    for task, metric in domain.tasks.items():
        counts = {split: len(list(tasks(task, split).eval_docs)) for split in ("validation", "test")}
        said.append(f"  {task}: {counts['validation']} validation and {counts['test']} test items, by {metric}")
    return "\n".join(said)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the question sets that recipes/tasks reads")
    parser.add_argument(
        "--scale", choices=list(SCALES), default="small", help="models and tasks (default: %(default)s)"
    )
    parser.add_argument("--domains", nargs="*", help="names (default: all)")
    parser.add_argument("--tasks", nargs="*", help="of these domains, those to measure (default: all)")
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=PARTS,
        default=list(PARTS),
        help="fit plans, measure them, measure the expert itself",
    )
    parser.add_argument("--expert", help="in place of the domain's: a hub id, a folder or a packaged model")
    parser.add_argument("--target", help="in place of the domain's")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/four_domains"), help="where to write (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="test on the first so many items (default: all)")
    parser.add_argument(
        "--validation", type=int, help="choose doses on the first so many validation items (default: all)"
    )
    parser.add_argument(
        "--doses", type=float, nargs="*", default=[0.25, 1.0], help="in units of the KL budget's (default: 0.25 1)"
    )
    parser.add_argument("--kl", type=float, default=1.0, help="KL budget in nats (default: %(default)s)")
    parser.add_argument(
        "--anchors", type=int, help="general texts that both models read (default: all that come with the package)"
    )
    parser.add_argument("--untrained", type=int, default=2, help="untrained experts (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=2, help="draws of permuted and random (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts a forward (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    parser.add_argument(
        "--remote", nargs="?", const=True, default=False, help="run the target on NDIF (a host, or nnsight's)"
    )
    parser.add_argument("--remote-expert", nargs="?", const=True, default=False, help="the same for the expert")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, with names and shapes resolved")
    parser.add_argument(
        "--redraw", action="store_true", help="measure nothing: table and figure of the results in --out"
    )
    args = parser.parse_args(argv)
    every = [replace(d, expert=args.expert or d.expert, target=args.target or d.target) for d in SCALES[args.scale]]
    unknown = sorted(set(args.domains or ()) - {d.name for d in every})
    if unknown:
        parser.error(f"no such domain: {', '.join(unknown)}; there are {', '.join(d.name for d in every)}.")
    offered = {task for domain in every for task in domain.tasks}
    if args.tasks is not None:
        if unknown := sorted({*args.tasks} - offered):
            parser.error(f"no such task: {', '.join(unknown)}; there are {', '.join(sorted(offered))}.")
        every = [replace(d, tasks={t: m for t, m in d.tasks.items() if t in args.tasks}) for d in every]
    if not args.doses:
        parser.error("--doses needs at least one dose.")
    chosen = [d for d in every if not args.domains or d.name in args.domains]
    if args.redraw:
        report(every, args)
        return
    named = [name for domain in chosen for name in (domain.fit, *domain.tasks)]
    tasks = Tasks(args.data, every=not all(name.startswith("local_") for name in named))
    if args.dry_run:
        print("\n".join(describe(domain, tasks, args) for domain in chosen))
        return
    for domain in chosen:
        run(domain, tasks, args)
    if args.parts != ["fit"]:
        report(every, args)


def run(domain: Domain, tasks: Tasks, args: Any) -> None:
    """Fits, calibrates and evaluates one domain."""
    models = Models(domain, args)
    measuring = Measuring(domain, models, tasks, args)
    plans = kept_plans(domain, models, tasks, args) if {"fit", "measure"} & {*args.parts} else []
    if "measure" in args.parts:
        measuring.unsteered()
        for name, i, plan in tqdm(plans, desc=domain.name, unit="plan"):
            measuring.arm(name, i, plan)
    if "expert" in args.parts:
        measuring.expert_itself()


if __name__ == "__main__":
    main()
