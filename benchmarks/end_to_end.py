"""`python -m benchmarks.end_to_end`: seconds from states on disk to a receipt, for one concept on the packaged pair."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import expertsteer_nnsight as es
from expertsteer_nnsight.models.packaged import load


def main() -> None:
    """Reads the states once without counting, then prints the seconds of each step."""
    expert, target = load("gemma-3-270m"), load("SmolLM2-135M-Instruct")
    pairs, probe = es.example("sentiment_pairs").split("train"), es.example("sentiment_probe")
    words = es.Words(probe["test_prompts"], probe["positive_words"], probe["negative_words"])
    neutral, texts = probe["neutral_texts"][:8], (expert, target, pairs, es.example("general"))
    with tempfile.TemporaryDirectory() as cache:
        first = es.ExpertSteer.recommended()
        first.fit(*texts, cache=Path(cache))
        first.controls(*texts, cache=Path(cache))
        times = [time.perf_counter()]
        steer = es.ExpertSteer.recommended()
        plan = steer.fit(*texts, cache=Path(cache))
        times.append(time.perf_counter())
        controls = steer.controls(*texts, cache=Path(cache))
        times.append(time.perf_counter())
        plan = es.calibrate(plan, target, neutral)
        times.append(time.perf_counter())
        receipt = es.receipt(plan, target, words, neutral, controls)
        times.append(time.perf_counter())
    print(receipt)
    names = ("fit", "controls", "calibrate", "receipt")
    for name, start, end in zip(names, times, times[1:], strict=False):
        print(f"{name}: {end - start:.0f} s")
    print(f"all: {times[-1] - times[0]:.0f} s")


if __name__ == "__main__":
    main()
