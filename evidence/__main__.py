"""python -m evidence --data FOLDER: runs what is missing of the study, and prints its tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from evidence.concepts import REPORTING, TUNING, WRITTEN, Data
from evidence.models import PAIRS
from evidence.report import publish, summary
from evidence.shares import Table
from evidence.study import Results, run


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the data sets; left out, they are fetched")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evidence"), help="results and states (default: %(default)s)"
    )
    parser.add_argument("--pairs", nargs="*", choices=list(PAIRS), default=list(PAIRS), help="models (default: all)")
    parser.add_argument("--concepts", nargs="*", choices=[*TUNING, *REPORTING, *WRITTEN], default=[*TUNING, *REPORTING])
    parser.add_argument(
        "--anchors",
        type=int,
        default=0,
        help="generic texts of the data sets beside the project's own; with --slice, "
        "how many of the project's own, all if 0 (default: %(default)s)",
    )
    parser.add_argument(
        "--draws",
        type=int,
        default=10,
        help="of permuted and random arms (default: %(default)s)",
    )
    parser.add_argument("--items", type=int, help="of the test items, the first so many (default: all)")
    parser.add_argument("--only-base", action="store_true", help="vary no factor")
    parser.add_argument(
        "--slice", action="store_true", help="the project's own concept and texts, the first pair, no factors"
    )
    parser.add_argument(
        "--publish", type=Path, metavar="PAGE", help="write the tables into a page, and results beside it"
    )
    parser.add_argument(
        "--redraw", action="store_true", help="with --publish: measure nothing, take the results that are there"
    )
    args = parser.parse_args(argv)
    if args.slice and args.publish:
        parser.error("--publish writes the whole study's page: leave --slice out.")
    if args.redraw and not args.publish:
        parser.error("--redraw needs a page: --publish PAGE.")
    if args.slice:
        args.concepts, args.pairs, args.only_base = ["sentiment"], ["gemma-smol"], True
    if args.redraw:
        lines = Results(args.out / "results.jsonl").lines
        if not lines:
            parser.error(f"there are no results in {args.out} to draw: measure first, or name another --out.")
        publish(lines, args.publish)
        return
    results = run(
        Data(args.data),
        args.out,
        args.pairs,
        args.concepts,
        vary=not args.only_base,
        anchors=args.anchors,
        draws=args.draws,
        own=args.slice,
        items=args.items,
    )
    print(summary(Table(results.lines)))
    if args.publish:
        publish(results.lines, args.publish)


if __name__ == "__main__":
    main()
