"""What it costs to import the package, and to start its command line.

    python -m benchmarks.imports

Each in new processes, in turns; medians of user and system time.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

RUNS = 15
CASES = {
    "import nnsight": ["-c", "import nnsight"],
    "import expertsteer_nnsight": ["-c", "import expertsteer_nnsight"],
    "from expertsteer_nnsight import SteeringPlan": ["-c", "from expertsteer_nnsight import SteeringPlan"],
    "expertsteer --help": ["-m", "expertsteer_nnsight.cli", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """CPU time of a Python process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-W", "ignore", *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Prints the median of each case, and its ratio to nnsight's own import."""
    for arguments in CASES.values():
        seconds(arguments)  # files that are read for the first time
    found = [[seconds(arguments) for arguments in CASES.values()] for _ in range(RUNS)]
    for name, column in zip(CASES, zip(*found, strict=True), strict=True):
        ratio = statistics.median(mine / row[0] for mine, row in zip(column, found, strict=True))
        print(f"{name:<46}{statistics.median(column):>6.2f} s, ratio {ratio:.2f} (median of {RUNS})")


if __name__ == "__main__":
    main()
