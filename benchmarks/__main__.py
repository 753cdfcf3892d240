"""`python -m benchmarks [NAME ...] [--quick]`: run them all, or those named, and write docs/benchmarks.md.

A quick run only shows that they work: it writes no document. One that this machine can't run has failed only
if it was named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from benchmarks import report, results
from broker import processes

NAMES = (
    "overhead",
    "forward",
    "memory",
    "journal",
    "vllm_throughput",
    "batching",
    "prefixes",
    "hostile",
    "adapters",
    "gpu_adapters",
    "planner",
    "dispatch_policies",
    "fidelity",
    "dispatcher",
    "heartbeats",
    "handing",
    "takeover",
    "routing",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: do they work?")
    parser.add_argument("--model", metavar="DIR", help="weights for gpu_adapters, in place of the demo model")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    flags = ["--quick"] if args.quick else []
    own = {"gpu_adapters": ["--model", args.model] if args.model else []}
    statuses = {name: _run(name, [*flags, *own.get(name, [])]) for name in args.names or NAMES}
    fine = {0} if args.names else {0, results.SKIPPED}
    failed = [name for name, status in statuses.items() if status not in fine]
    if not args.quick:
        results.say(f"written: {report.write()}")
    if failed:
        results.say(f"failed: {', '.join(failed)}")
    return bool(failed)


def _run(name: str, flags: list[str]) -> int:
    """In a process of its own: what one benchmark leaves in memory is no other's. The exit status."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    return subprocess.run(command, preexec_fn=processes.bound_to_me(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
