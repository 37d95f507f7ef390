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
from expertsteer_nnsight.models.packaged import load
from expertsteer_nnsight.texts.texts import texts_hash
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


def plans_folder(domain: Domain, pairs: es.ContrastPairs, anchors: list[str], neutral: list[str], args: Any) -> Path:
    """Where the plans of a domain are kept: its name has a hash of all that they depend on."""
    presets = [es.ExpertSteer.paper().settings, es.ExpertSteer.recommended().settings, es.__version__]
    told = (domain.expert, domain.target, args.seed, args.kl, args.untrained, args.draws, *presets)
    return args.out / "plans" / f"{domain.name}-{texts_hash([str(told), *pairs.texts, *anchors, *neutral])[:8]}"


def kept_plans(
    domain: Domain, models: Models, tasks: Tasks, args: Any
) -> tuple[str, list[tuple[str, int, es.SteeringPlan]]]:
    """The folder's name, and arm, draw and plan at dose 1 of every arm that is a plan.

    They are read from plans/, or fitted and calibrated and kept there.

    Raises:
        ValueError: they are not there, and `--parts` has no `fit`.
    """
    pairs, anchors = texts_of(tasks, domain.fit, args.seed, args.anchors)
    neutral = list(es.example("sentiment_probe")["neutral_texts"][:8])
    folder = plans_folder(domain, pairs, anchors, neutral, args)
    if not folder.exists():
        if "fit" not in args.parts:
            found = ", ".join(sorted(path.name for path in folder.parent.glob("*"))) or "nothing"
            raise ValueError(
                f"There is no {folder} ({folder.parent} has {found}): run --parts fit with these settings, or bring it here."
            )
        arms = fitted(domain, models, pairs, anchors, args)
        every = [(name, i, plan) for name, plans in arms.items() for i, plan in enumerate(plans)]
        doses = es.calibrate([plan for _, _, plan in every], models["target"], neutral, args.kl, remote=args.remote)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            for n, ((name, i, _), plan) in enumerate(zip(every, doses, strict=True)):
                plan.save(Path(made) / "plans" / f"{n:02}-{name}-{i}.safetensors")
            os.rename(Path(made) / "plans", folder)  # the folder appears whole or not at all
    files = [(path.stem.split("-"), path) for path in sorted(folder.glob("*.safetensors"))]
    return folder.name, [(name, int(draw), es.SteeringPlan.load(path)) for (_, name, draw), path in files]


class Measuring:
    """Evaluates arms of one domain, and keeps a line for each evaluation.

    Args:
        domain: the domain.
        models: the expert and the steered model.
        tasks: where tasks come from.
        args: of the command line.
        plans: what tells plans from those of another fit.
    """

    def __init__(self, domain: Domain, models: Models, tasks: Tasks, args: Any, plans: str = "") -> None:
        self.plans = plans
        self.domain, self.models, self.tasks, self.args = domain, models, tasks, args
        self.path = args.out / "results.jsonl"
        self.lines = read_lines(self.path)
        self.place = place(domain, args)

    def line(
        self, task: str, split: str, arm: str, draw: int, dose: float, plan: Any, instruction: str | None = None
    ) -> Line:
        """One evaluation, measured unless it is there."""
        limit = self.args.validation if split == "validation" else self.args.limit
        key = {**self.place, "task": task, "split": split, "items": self.tasks.items(task, split, limit), "arm": arm}
        key |= {"draw": draw, "dose": dose, "by": instruction or (self.plans if plan is not None else "")}
        for known in self.lines:
            if key.items() <= known.items():
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
            limit=limit,
            bootstrap_iters=0,
            system_instruction=instruction,
        )
        samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
        metrics = [m for m in ("acc", "acc_norm", "acc_mutual_info") if m in samples[0]]
        made = {**key, "n": len(samples), **{m: [int(s[m]) for s in samples] for m in metrics}}
        self.lines.append(made)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(made, separators=(",", ":")) + "\n")
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
    unknown = sorted({*(args.tasks or ())} - offered)
    if unknown:
        parser.error(f"no such task: {', '.join(unknown)}; there are {', '.join(sorted(offered))}.")
    if not args.doses:
        parser.error("--doses needs at least one dose.")
    asked = offered if args.tasks is None else {*args.tasks}
    chosen = [replace(d, tasks={t: m for t, m in d.tasks.items() if t in asked}) for d in every]
    chosen = [d for d in chosen if d.tasks and (not args.domains or d.name in args.domains)]
    if not chosen:
        parser.error("none of these domains has one of these tasks.")
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
    if "measure" in args.parts:
        report(every, args)


def run(domain: Domain, tasks: Tasks, args: Any) -> None:
    """Fits, calibrates and evaluates one domain."""
    models = Models(domain, args)
    name, plans = kept_plans(domain, models, tasks, args) if {"fit", "measure"} & {*args.parts} else ("", [])
    measuring = Measuring(domain, models, tasks, args, name)
    if "measure" in args.parts:
        measuring.unsteered()
        for arm, draw, plan in tqdm(plans, desc=domain.name, unit="plan"):
            measuring.arm(arm, draw, plan)
    if "expert" in args.parts:
        measuring.expert_itself()


if __name__ == "__main__":
    main()
