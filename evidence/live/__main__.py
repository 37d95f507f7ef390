"""How much of an expert's knowledge a live expert passes on: choice tasks and factors, free answers, any text, private context.

    python -m evidence.live --data FOLDER                                   # goes on where it stopped
    python -m evidence.live --redraw --publish docs/live_evidence.md        # the page again, without a model

Each part adds its lines to one file, and measures none twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from tqdm.auto import tqdm

from evidence.live import choices, context, factors, generation, texts
from evidence.live.results import Results
from evidence.models import PAIRS
from evidence.report import filled_with
from expertsteer_nnsight.states.shards import VERSION as STATES

PARTS = {"choices": choices, "factors": factors, "generation": generation, "texts": texts, "context": context}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="results and activations (%(default)s)")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--pairs", nargs="*", choices=list(PAIRS), default=list(PAIRS), help="models")
    parser.add_argument("--tasks", nargs="*", choices=choices.TASKS, default=list(choices.TASKS))
    parser.add_argument("--kinds", nargs="*", choices=texts.KINDS, default=list(texts.KINDS), help="of text")
    parser.add_argument("--limit", type=int, default=choices.TEST, help="test items of a task, at most (%(default)s)")
    parser.add_argument(
        "--publish", type=Path, metavar="PAGE", help="write the tables into a page, and the lines beside it"
    )
    parser.add_argument("--redraw", action="store_true", help="measure nothing, take the results that are there")
    args = parser.parse_args(argv)
    if not args.redraw and args.data is None and set(args.parts) != {"context"}:
        parser.error("--data is missing: name the folder of the data sets.")
    results, data = Results(args.out / "live.jsonl"), args.data or Path()
    states = args.out / f"live_states-{STATES}"
    if not args.redraw:
        for pair, task in product(args.pairs, args.tasks if "choices" in args.parts else ()):
            choices.measure(pair, task, data, results, states, args.limit)
        for pair, task in product(args.pairs, factors.TASKS if "factors" in args.parts else ()):
            if task in args.tasks:
                factors.measure(pair, task, data, results, states)
        for pair, task in product(args.pairs, generation.TASKS if "generation" in args.parts else ()):
            if task in args.tasks:
                generation.measure(pair, task, data, results, states)
        work = list(product(args.pairs, args.kinds if "texts" in args.parts else ()))
        for pair, kind in tqdm(work, desc="texts", disable=not work):
            texts.measure(pair, kind, data, results, states)
        for pair, kind in product(args.pairs, context.KINDS if "context" in args.parts else ()):
            context.measure(pair, kind, results, states)
    made = {name: table for part in PARTS.values() for name, table in part.tables(results.lines).items()}
    print("\n\n".join(f"{name}\n\n{text}" for name, text in made.items()))
    if args.publish:
        page = filled_with(args.publish.read_text(), made)
        folder = args.publish.with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / "live.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results.lines))
        args.publish.write_text(page)


if __name__ == "__main__":
    main()
