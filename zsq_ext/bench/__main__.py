"""`python -m zsq_ext.bench --suite families --json FILE`: `zsq bench` where typer and rich are not installed."""

import argparse
import sys

from zsq_ext import bench
from zsq_ext.core.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", default="families", choices=list(bench.SUITES))
    parser.add_argument("--only", help="one family")
    parser.add_argument("--inductor", action="store_true", help="also time torch.compile of the eager peers")
    parser.add_argument("--seconds", type=float, help="how long each op is timed in each case, peers included")
    parser.add_argument("--json", help="where the rows go; without it they are only printed")
    args = parser.parse_args()
    result = bench.run(args.suite, Progress(), only=args.only, inductor=args.inductor, seconds=args.seconds)
    if args.json:
        bench.save(result, args.json)
    for line in bench.lines(result):
        sys.stdout.write("  ".join(line) + "\n")
    sys.stdout.write(bench.legend(result) + "\n")


if __name__ == "__main__":
    main()
