"""`python -m benchmarks.live`: prompts per second of a live expert, beside the target alone and the expert alone, in one run.

A prompt's forward through the target, the same through the expert, and both with the expert's activation in the target. Steps take
turns, and what is told is the median. The fit is timed from activations that are in the cache already.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nnsight
import torch

import expertsteer_nnsight as es
from expertsteer_nnsight.models.packaged import load

LAYERS = (15, 22)
BATCH = 16


def last_logits(
    model: Any, prompts: Sequence[str], plan: Callable[[Sequence[str]], es.SteeringPlan] | None = None
) -> torch.Tensor:
    """Logits after each prompt `[prompt, vocabulary]`, batch by batch; steered by the plan of each batch."""
    found = []
    for i in range(0, len(prompts), BATCH):
        some = list(prompts[i : i + BATCH])
        made = None if plan is None else plan(some)
        with torch.no_grad(), model.trace(some, use_cache=False, logits_to_keep=1):
            if made is not None:
                made.apply(model)
            logits = nnsight.save(model.output.logits[:, -1])
        found.append(logits)
    return torch.cat(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96, help="how many (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of each step (default: %(default)s)")
    args = parser.parse_args(argv)
    expert, target = load("gemma-3-270m"), load("SmolLM2-135M-Instruct")
    texts = es.example("general")
    prompts = [f"Question: Is this true? {text}\nAnswer:" for text in texts[-args.prompts :]]
    with tempfile.TemporaryDirectory() as cache:
        live = es.LiveExpert(layers=[LAYERS]).fit(expert, target, texts[:300], cache=Path(cache), progress=False)
        start = time.perf_counter()
        live.fit(expert, target, texts[:300], cache=Path(cache), progress=False)
        fitted = time.perf_counter() - start
    steps: dict[str, Callable[[], torch.Tensor]] = {
        "target alone": lambda: last_logits(target, prompts),
        "expert alone": lambda: last_logits(expert, prompts),
        "live expert": lambda: last_logits(target, prompts, live.plan),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(mine[1:]) for name, mine in seconds.items()}  # the first turn warms up
    for name, mine in median.items():
        print(f"{name:>12}: {len(prompts) / mine:6.1f} prompts a second")
    ratio = median["live expert"] / (median["target alone"] + median["expert alone"])
    print(f"live expert / (target alone + expert alone): {ratio:.2f}")
    print(f"fit of one layer pair on {len(texts[:300])} cached anchors: {fitted:.1f} s")


if __name__ == "__main__":
    main()
