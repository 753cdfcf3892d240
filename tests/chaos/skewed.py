"""`python skewed.py SECONDS ARGUMENT...` is `headrace ARGUMENT...` where the clock is so much ahead."""

from __future__ import annotations

import runpy
import sys
import time

ahead, true = float(sys.argv.pop(1)), time.time
time.time = lambda: true() + ahead
runpy.run_module("ops", run_name="__main__", alter_sys=True)
