"""`python -m tests.chaos`: a run of some minutes, its figures in `results/`, and 1 if anything was lost."""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import signal
import sys
from pathlib import Path

import orjson
import uvloop

from tests.chaos import driver, report
from tests.chaos.stage import SIZES

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="decides the faults and what is asked")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=driver.CLIENTS)
    parser.add_argument("--only", choices=SIZES, default="", help="the part that is struck")
    args = parser.parse_args()
    # What was started ends with this process; by an exception it is also waited for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    data = RESULTS / f"seed-{args.seed}"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    logging.basicConfig(filename=data / "driver.log")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        told, trouble = runner.run(driver.run(args.seed, args.minutes, data, args.clients, only=args.only))
    (data / "figures.json").write_bytes(orjson.dumps(told, option=orjson.OPT_INDENT_2))
    print(report.table(told))
    if trouble:
        (data / "trouble.txt").write_text(trouble + "\n")
        print(f"\n{trouble}\n\nlogs, figures.json and trouble.txt: {data}")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
