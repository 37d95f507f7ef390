"""lm-evaluation-harness on traces against its own `hf` model: the same numbers, and how much faster or slower.

    python -m benchmarks.harness --data FOLDER --limit 100

For each model and task: the largest difference of a log-likelihood, both accuracies, seconds of either (medians of runs taken in
turns), and their throughput as a ratio (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from expertsteer_nnsight.interop.lm_eval import SteeredLM
from expertsteer_nnsight.models.packaged import load
from recipes.domain_texts import Tasks

TASKS = ("local_arc_easy", "local_financial_phrasebank", "local_svamp")
MODELS = ("SmolLM2-135M-Instruct", "gemma-3-270m")


def evaluated(lm: Any, tasks: Tasks, task: str, limit: int) -> tuple[float, list[float], dict[str, float]]:
    """Seconds, log-likelihoods and accuracies."""
    from lm_eval import evaluator

    asked = tasks(task)
    asked.set_fewshot_seed(seed=0)
    started = time.perf_counter()
    found: Any = evaluator.evaluate(lm, {"tasks": {task: asked}}, limit=limit, bootstrap_iters=0)
    seconds = time.perf_counter() - started
    samples = sorted(found["samples"][task], key=lambda s: s["doc_id"])
    accuracies = {
        k.split(",")[0]: v for k, v in found["results"][task].items() if k.startswith("acc") and "stderr" not in k
    }
    return seconds, [r[0] for s in samples for r in s["filtered_resps"]], accuracies


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the question sets")
    parser.add_argument("--limit", type=int, default=100, help="items a task (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of either (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts a forward (default: %(default)s)")
    args = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    tasks = Tasks(args.data)
    print(f"{torch.get_num_threads()} threads, batches of {args.batch_size}")
    for name in MODELS:
        model = load(name)
        hf: Any = HFLM
        sides = (
            SteeredLM(model, batch_size=args.batch_size),
            hf(model._module, tokenizer=model.tokenizer, batch_size=args.batch_size),
        )
        for task in TASKS:
            runs = [[evaluated(lm, tasks, task, args.limit) for lm in sides] for _ in range(args.repeats)]
            (_, mine, ours), (_, known, theirs) = runs[0]
            gap = max(abs(a - b) for a, b in zip(mine, known, strict=True))
            times = [statistics.median(run[side][0] for run in runs) for side in (0, 1)]
            ratio = statistics.median(run[1][0] / run[0][0] for run in runs)
            same = "equal" if ours == theirs else f"{ours} and {theirs}"
            print(
                f"{name} {task}: {len(mine)} log-likelihoods, largest difference {gap:.1e}, accuracies {same} ({ours['acc']:.3f}), "
                f"{times[0]:.1f} s and {times[1]:.1f} s, throughput {ratio:.2f}"
            )


if __name__ == "__main__":
    main()
