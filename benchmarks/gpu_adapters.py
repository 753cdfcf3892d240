"""On a GPU: many adapters on one vLLM, and its sleep against a new process.

- One request at a time, with more adapters than slots: the times that `benchmarks/adapters.py` takes on CPU,
  from the worker's taking a request to vLLM's first step with it, and to its first token.
- Clients that ask one request after the other, of adapters drawn by Zipf's law.
- The way to sleep (vLLM's level 1) and back, through the worker's commands: until it tells that it sleeps,
  and from the command to wake until the first token of a request that was queued with it. Against it:
  from the start of a worker's process until the first token of a request that waits for it.

Needs a GPU and vLLM's CUDA build, and says so where it has them not. `--cpu` tries the code on vLLM's CPU
build, in small numbers and without sleep: no figures to publish.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import adapters, fleet, results, stages
from broker import subjects
from broker.messages import Answer, Command, UsageEvent
from ops import demo_model
from tests.waiting import until
from workers.config import VllmConfig
from workers.engines import vllm
from workers.engines.base import Engine

LIMIT = 300.0
"""Seconds for a large model to fall asleep or to wake, or for what a process had of the GPU to come free."""
SLACK = 256
"""MiB that may be in use beyond what was, when it has."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured. `count`: adapters; `in_flight`: clients of the Zipf traffic; `naps`: ways to
    sleep and back."""

    count: int = adapters.ADAPTERS
    slots: int = adapters.SLOTS
    rounds: int = 25
    in_flight: int = 32
    seconds: float = 60.0
    starts: int = 3
    naps: int = 10


QUICK = Size(rounds=2, seconds=5.0, starts=1, naps=2)
TRIAL = Size(count=5, slots=2, rounds=2, in_flight=6, seconds=20.0, starts=1, naps=0)


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    driver: str
    total_mib: int
    used_mib: int


def run(model: Path | None, size: Size, *, cpu: bool) -> dict[str, Any]:
    """`model`: its directory; None = the demo model. Raises results.NotHere, unless `cpu`."""
    found = [] if cpu else gpus()
    if not cpu:
        _cuda_build()
    model = model.resolve() if model else demo_model.ensure(Path(".data"), progress=True).resolve()
    gpu = f"{len(found)} x {found[0].name}, driver {found[0].driver}" if found else "none"
    return {"gpu": gpu, **asyncio.run(measure(model, size, gpu=not cpu))}


def gpus() -> list[Gpu]:
    """As the driver tells. Raises results.NotHere when there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise results.NotHere("there is no GPU here: nvidia-smi, which comes with its driver, is not found")
    fields = "name,driver_version,memory.total,memory.used"
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise results.NotHere(f"nvidia-smi does not answer: {exc}") from exc
    if asked.returncode or not asked.stdout.strip():
        said = " ".join((asked.stdout + asked.stderr).split())
        raise results.NotHere(f"there is no GPU here: nvidia-smi says {said!r:.200}")
    return parse(asked.stdout)


def parse(text: str) -> list[Gpu]:
    """The lines that nvidia-smi answers with, a GPU each."""
    lines = [[word.strip() for word in line.split(",")] for line in text.strip().splitlines()]
    return [Gpu(name, driver, int(total), int(used)) for name, driver, total, used in lines]


def _cuda_build() -> None:
    """Raises results.NotHere where vLLM's CUDA build is not installed."""
    try:
        metadata.version("vllm")  # the CPU build goes by another name
    except metadata.PackageNotFoundError:
        raise results.NotHere(
            "vLLM's CUDA build is not installed here: make GPU=1 bench ARGS=gpu_adapters"
        ) from None


async def measure(model: Path, size: Size, *, gpu: bool) -> dict[str, Any]:
    settings = {"model": str(model), "adapter_slots": size.slots, "sleep": gpu}
    settings["adapters_in_memory"] = 2 * size.count
    in_use = _used() if gpu else 0
    starts = []
    for _ in range(size.starts):
        starts.append(await start(model.name, settings))
        if gpu:  # else the next engine may find too little
            await until(lambda: _used() <= in_use + SLACK, LIMIT)
    engine = await vllm.start(VllmConfig.model_validate(settings))
    try:
        async with stages.staged(engine) as stage:
            found = {
                "model": model.name,
                "slots": size.slots,
                "tokens": adapters.TOKENS,
                "seconds": size.seconds,
                "in_flight": size.in_flight,
                "start_s": results.spread(starts),
                "starts": size.starts,
                **await adapters.first_steps(stage, model, size.count, size.rounds),
                "zipf": await traffic(stage, engine, model, size),
            }
            if gpu:
                found["sleep"] = summary(await naps(stage, model, size.naps))
    finally:
        await engine.close()
    return found


async def start(base: str, settings: dict[str, Any]) -> float:
    """Seconds from a worker's start as a process until the first token of a request that waits for it."""
    async with stages.queued(base) as stage:
        flags = {f"vllm__{name}": value for name, value in settings.items()}
        began = time.monotonic()
        with fleet.worker(stage.url, worker__adapter_cache=stage.scratch / "adapters", **flags) as process:
            stage.alive = lambda: process.poll() is None
            took = await stage.first_token(base) - began
    results.say(f"  process to first token: {took:.2f} s")
    return took


async def traffic(stage: stages.Stage, engine: Engine, model: Path, size: Size) -> dict[str, Any]:
    """Adapters drawn by Zipf's law, all in memory, by clients that each ask one request after the other."""
    models = await stage.push(size.count, model)
    await stage.each(models)
    dice = adapters.Zipf(models)
    end = time.monotonic() + size.seconds

    async def client() -> list[UsageEvent]:
        events = []
        while time.monotonic() < end:
            events.append(await stage.ask(dice.draw(), adapters.TOKENS))
        return events

    with stages.watched(engine) as watch:
        answered = await asyncio.gather(*(client() for _ in range(size.in_flight)))
    found = watch.figures([event for events in answered for event in events])
    results.say(f"  {found}")
    return found


@dataclass(frozen=True, slots=True)
class Nap:
    """Seconds, and MiB in use on all GPUs. `token_s` and `awake_s` count from the command to wake."""

    sleep_s: float
    awake_s: float
    token_s: float
    before_mib: int
    asleep_mib: int


async def naps(stage: stages.Stage, model: Path, count: int) -> list[Nap]:
    (adapter,) = await stage.push(1, model)
    taken = []
    for _ in range(count):
        await stage.each([stage.base_model, adapter])  # it serves both, after each wake too
        taken.append(await _nap(stage))
        results.say(f"  {taken[-1]}")
    await stage.each([stage.base_model, adapter])
    return taken


async def _nap(stage: stages.Stage) -> Nap:
    before = await asyncio.to_thread(_used)
    began = time.monotonic()
    await _command(stage, "sleep")
    await _reached(stage, "asleep")
    sleep = time.monotonic() - began
    asleep = await asyncio.to_thread(_used)
    began = time.monotonic()
    first = asyncio.create_task(stage.first_token(stage.base_model))
    await _command(stage, "wake")
    await _reached(stage, "serving")
    awake = time.monotonic() - began
    return Nap(sleep, awake, await first - began, before, asleep)


def _used() -> int:
    return sum(gpu.used_mib for gpu in gpus())


async def _command(stage: stages.Stage, do: str) -> None:
    """Raises RuntimeError when the worker refuses."""
    command = Command.model_validate({"do": do})
    told = await stage.broker.ask(subjects.ctl(stages.WORKER), command.model_dump_json().encode())
    answer = Answer.model_validate_json(told)
    if not answer.ok:
        raise RuntimeError(answer.message)


async def _reached(stage: stages.Stage, state: str) -> None:
    """Until the worker tells that it is in `state`."""

    def told() -> bool:
        if not stage.alive():
            raise RuntimeError("the worker ended")
        return stage.beat is not None and stage.beat.state == state

    await until(told, LIMIT)


def summary(taken: Sequence[Nap]) -> dict[str, Any]:
    return {
        "naps": len(taken),
        "sleep_s": results.spread([nap.sleep_s for nap in taken]),
        "awake_s": results.spread([nap.awake_s for nap in taken]),
        "token_s": results.spread([nap.token_s for nap in taken]),
        "before_mib": statistics.median(nap.before_mib for nap in taken),
        "asleep_mib": statistics.median(nap.asleep_mib for nap in taken),
    }


def main() -> None:
    parser = results.parser("gpu_adapters")
    parser.add_argument("--model", type=Path, metavar="DIR", help="the weights, in place of the demo model's")
    parser.add_argument("--cpu", action="store_true", help="try the code on vLLM's CPU build: no figures")
    args = parser.parse_args()
    size = TRIAL if args.cpu else QUICK if args.quick else Size()
    quick = args.quick or args.cpu
    results.measure("gpu_adapters", lambda: run(args.model, size, cpu=args.cpu), quick=quick)


if __name__ == "__main__":
    main()
