"""docs/benchmarks.md and its plot, from the saved results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks import batching, fidelity, forward, journal, overhead, quiet, results
from broker import client

DOCS = Path(__file__).parent.parent / "docs"
PLOT = "benchmarks.png"

Record = dict[str, Any]


def write() -> Path:
    """Write the document and the plot; of what was not measured here, the document's section stays."""
    before = sections(_GPU_UNMEASURED)
    if (path := DOCS / "benchmarks.md").exists():
        before |= sections(path.read_text())
    parts = [
        render(record) if (record := results.load(name)) is not None else before.get(title, "")
        for name, title, render in (
            ("overhead", "Added latency", _overhead),
            ("forward", "Forwarding", _forward),
            ("memory", "Memory", _memory),
            ("journal", "Journal and recovery", _journal),
            ("vllm_throughput", "Throughput of real vLLM", _vllm),
            ("batching", "Continuous against static batching", _batching),
            ("prefixes", "Shared prompts on real vLLM", _prefixes),
            ("hostile", "A small KV cache on real vLLM", _hostile),
            ("adapters", "Adapters", _adapters),
            ("gpu_adapters", "Adapters and sleep on a GPU", _gpu_adapters),
            ("planner", "Planner", _planner),
            ("dispatch_policies", "Dispatch policies", _policies),
            ("fidelity", "The simulator against a fleet", _fidelity),
            ("dispatcher", "Dispatcher", _dispatcher),
            ("heartbeats", "Heartbeats", _heartbeats),
            ("handing", "Handing out", _handing),
            ("takeover", "Takeover", _takeover),
            ("routing", "Intent routing", _routing),
        )
    ]
    if (record := results.load("overhead")) is not None:
        plot(record, results.load("vllm_throughput"))
    head = _HEAD.format(foreign=quiet.FOREIGN, tries=quiet.TRIES)
    path.write_text("\n".join([head, *filter(None, parts)]))
    return path


def sections(document: str) -> dict[str, str]:
    """The document's sections, from their heading to the line before the next, by title."""
    found = re.findall(r"^## (.+)\n([\s\S]*?)(?=^## |\Z)", document, re.MULTILINE)
    return {title: f"## {title}\n{text.rstrip()}\n" for title, text in found}


_HEAD = """\
# Benchmarks

`make bench` runs them all and writes this page; `python -m benchmarks NAME` runs one. The two sides of a
comparison are measured in turns within one run. Figures are medians over the rounds, with their range in
brackets. A run during which other processes used more than {foreign:g} cores is repeated, {tries} times at
most.

![Added latency, and throughput of vLLM](benchmarks.png)
"""

_OVERHEAD = """\
## Added latency

The sim engine served directly over HTTP, against the same behind ingress, queue and worker: {ttft_ms} ms to
the first token, {itl_ms} ms between tokens, {tokens} tokens, {rounds} rounds. Every request is synced to
disk before it is acknowledged (`sync_interval: always`), every frame journaled. "Added" is the difference
of the two sides' percentiles. TTFT runs from the write of the request to the read of the first event with
text. Load generator, nats-server, ingress and worker share the cores. "Floor" is what the broker alone takes
on this machine at that rate of requests, while nothing else is asked of it: publish to disk, pull, one frame
back (`benchmarks/floor.py`). Other processes used
{cores_used_by_others:.2f} cores at most.
"""

_FORWARD = """\
## Forwarding

SSE events of {streams} streams through one ingress process, against the sim's app served directly, each
alone on one core. On the other core runs the load and, for Headrace, nats-server and a source of prebuilt
frames. Paced means {paced[itl_ms]:g} ms between two tokens of a stream, saturated {saturated[itl_ms]:g} ms;
ingress then used {saturated[headrace_core_used][median]:.0%} of its core.
"""

_MEMORY = """\
## Memory

Resident MiB of each process at rest, and with {streams:,} streams that idle after their first token (sim
engine).
"""

_JOURNAL = """\
## Journal and recovery

What they cost where nothing is lost: a fleet as it is ("on"), against one ("off") whose stream `REPLIES`
stores nothing, and which lacks the code that recovers from losses: what a worker holds is not told, no round
trip stands before the acknowledgement, no frame is kept to be published again, no scheduler leads or watches,
frames do not name their tokens, and the ingress neither orders them nor gives events their ids
(`benchmarks/bare.py` has the whole list). {rounds} rounds each. Saturated: {saturated[streams]} streams of an
engine that takes no time, {saturated[tokens]} tokens each, one frame a token; both cores are used up, the
load's share included. Paced: {paced[ttft_ms]} ms to the first token, {paced[itl_ms]} ms between tokens,
{paced[tokens]} tokens. Other processes used {cores_used_by_others:.2f} cores at most.
"""

_JOURNAL_CPU = """\
Where it goes: microseconds of CPU time that each process spends on a token, saturated.
"""

_JOURNAL_MEMORY = """\
The journal is bounded by `broker.journal_bytes` ({limit_mib:.0f} MiB) and `broker.journal_age`; past that the
oldest frames go. {streams:,} streams of {tokens} tokens, a frame each, put {mib:.0f} MiB into it, as the
bound counts: {frame:.0f} bytes a frame. So there is room for {capacity:,.0f} such streams, or for the last
{tokens_kept:,.0f} tokens of the fleet. What a process keeps of its own frames, to publish them again, is
bounded by {tail_mib:.0f} MiB and {tail_s:.0f} s. Resident MiB, saturated:
"""

_VLLM = """\
## Throughput of real vLLM

Tokens a second of {model} on vLLM's CPU build, {tokens} tokens a request, greedy, closed loop, {rounds}
rounds: `AsyncLLM` called directly, against HTTP through ingress, queue and worker. Two engines with the
same options, loaded in turn. On CPU the engine's threads fill every core, and what the other processes of a
side use is taken from it: "serving ms" is their CPU time for a token, without the engine's; on the direct
side the load is a part of it. With a GPU that time is no longer the engine's. Other processes used
{cores_used_by_others:.2f} cores at most.
"""

_BATCHING = """\
## Continuous against static batching

Real vLLM on CPU, {rounds} rounds of {requests} requests with {least} to {most} output tokens (exponential,
{mean_tokens:.0f} on average), batches of {batch}. The first row offers all requests at once. The others are
Poisson arrivals at {rate_per_s:.2f} requests/s, {load:.0%} of what continuous batching can do. A static
batch waits {wait:g} s at most for company and answers when its longest member is done. vLLM drops finished
members from its steps, so that this baseline computes no padding: it is kinder than the classic one. The
ratio says how many times better continuous is.
"""


_ROUTING = """\
## Intent routing

`model: auto` with [examples/routes.toml](../examples/routes.toml): a router learned from {examples}
examples, on {texts} texts that it has not seen (`tests/data/intents.jsonl`), against regular expressions as
one would write them by hand (`benchmarks/routing.py`) and the commonest route. All texts are by the hands
that made the repository, and short. With a margin of {margin:g}, {default_share:.0%} of the texts go to the
default; of the others {accuracy_above_margin:.1%} are right. A decision takes {short_ms[p50]:.2f} ms (p50),
{short_ms[p99]:.2f} ms (p99) for these texts, and {long_ms[p50]:.2f} ms, {long_ms[p99]:.2f} ms for texts of
6,000 characters, with words that the router meets for the first time among them.
"""

_CONFUSION = "Texts by the route that is meant (down) and the one that scores best (across):\n"


def _origin(record: Record) -> str:
    box = record["machine"]
    return (
        f"`{record['command']}`, {record['date']}: {box['cpu']}, {box['cores']} cores, "
        f"{box['memory_gib']} GiB, Linux {box['kernel']}, Python {box['python']}."
    )


def _section(text: str, head: list[str], rows: list[list[str]], record: Record) -> str:
    return f"{text}\n{_table(head, rows)}\n{_origin(record)}\n"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _range(value: dict[str, float], digits: int = 2) -> str:
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def _against(value: float, target: float | None, *, least: bool = False) -> str:
    if target is None:
        return ""
    met = value >= target if least else value <= target
    return f"{'≥' if least else '≤'} {target:g}: {'met' if met else '**missed**'}"


_TARGETS = {
    ("32", "ttft", 50): 1.5,
    ("32", "ttft", 99): 3.0,
    ("200", "ttft", 50): 2.0,
    ("200", "ttft", 99): 6.0,
    **{(str(streams), "itl", 99): 2.0 for streams in overhead.STREAMS},
}


def _overhead(record: Record) -> str:
    rows = []
    for streams, found in record["streams"].items():
        for name in ("ttft", "itl"):
            for p in overhead.PERCENTILES:
                added = found[f"added_{name}_p{p}_ms"]
                rows.append(
                    [
                        streams,
                        f"{name.upper()} p{p}",
                        f"{found[f'direct_{name}_p{p}_ms']['median']:.2f}",
                        f"{found[f'headrace_{name}_p{p}_ms']['median']:.2f}",
                        _range(added),
                        _range(found[f"floor_p{p}_ms"]) if name == "ttft" else "",
                        _against(added["median"], _TARGETS.get((streams, name, p))),
                    ]
                )
    head = ["streams", "ms", "direct", "Headrace", "added", "floor", "target"]
    return _section(_OVERHEAD.format_map(record), head, rows, record)


def _forward(record: Record) -> str:
    rows = []
    for pace in forward.PACES:
        found = record[pace]
        for what, unit in (("events_per_s", "events/s"), ("events_per_cpu_s", "events per CPU second")):
            ratio = found[f"{what}_ratio"]
            target = 0.6 if (pace, what) == ("saturated", "events_per_s") else None
            rows.append(
                [
                    pace,
                    unit,
                    f"{found[f'direct_{what}']['median']:,.0f}",
                    f"{found[f'headrace_{what}']['median']:,.0f}",
                    _range(ratio),
                    _against(ratio["median"], target, least=True),
                ]
            )
    head = ["pace", "", "direct", "ingress", "ratio", "target"]
    return _section(_FORWARD.format_map(record), head, rows, record)


def _memory(record: Record) -> str:
    targets = {"ingress": 150.0, "worker": 120.0}
    rows = [
        [name, f"{record['rss_mib_before'][name]:.0f}", f"{mib:.0f}", _against(mib, targets.get(name))]
        for name, mib in record["rss_mib"].items()
    ]
    head = ["process", "at rest", "with the streams", "target"]
    return _section(_MEMORY.format_map(record), head, rows, record)


_ADAPTERS = """\
## Adapters

Real vLLM on CPU with {count} adapters in memory and two slots, one request at a time: from the worker's
taking a request to vLLM's first step with it. `slotted`: its adapter has a slot. `swap`: its adapter is in
memory and another has the slot. `cold`: it is in the object store only. `wanted`: likewise, but announced
beforehand, as an ingress does while the request is queued. The engine with its worker takes {base:,.0f} MiB,
with {count} adapters {with_adapters:,.0f}; an engine for each would take {an_engine_each:,.0f}.
"""

_ZIPF = """\

The sim engine with {slots} slots; adapters drawn by Zipf's law, {tokens} tokens a request, for
{seconds:g} s. "turns": workers hold back what has no slot, an adapter's turn being 2 s where others
wait; "none": the engine is handed everything and passes over what has no slot. The last row's adapters
have a slot each.
"""


_GPU_UNMEASURED = """\
## Adapters and sleep on a GPU

Not measured yet: no figure on this page comes from a GPU. On a machine with one

    make GPU=1 bench ARGS=gpu_adapters

measures on the demo model, `ARGS='gpu_adapters --model DIR'` on another, and puts the figures here: until
the first step and the first token of requests whose adapter is in the machine's memory, and another has its
slot, or in the object store only; what traffic of 20 adapters makes of 8 slots; and how long vLLM takes to
sleep and to wake, and what memory of the GPU it gives free, against a new process.
"""

_GPU_ADAPTERS = """\
## Adapters and sleep on a GPU

{model} on {gpu}, with {adapters} adapters in the machine's memory and {slots} slots, one request at a time:
from the worker's taking a request to vLLM's first step with it, and to its first token. What a step does to
copy an adapter into its slot is in the latter only. The rows are those [above](#adapters); the requests of
`swap` made {swaps:.0f} swaps.
"""

_GPU_ZIPF = """\
Requests of these adapters, drawn by Zipf's law, {tokens} tokens each, by {in_flight} clients that ask one
after the other, for {seconds:g} s:
"""

_GPU_SLEEP = """\
vLLM's sleep (level 1) and back, {naps} times, by the worker's commands. The GPU's memory in use:
{before_mib:,.0f} MiB before, {asleep_mib:,.0f} MiB asleep, so that {freed_mib:,.0f} MiB came free. Against it
a worker's process, started {starts} times with the same settings; the very first start on a machine
compiles, too, what the later ones find on its disk. The request whose first token is awaited is in the queue
from the beginning.
"""

_PLANNER = """\
## Planner

One plan for {workers:,} workers of {slots} slots each and {adapters} adapters, with {replicas} replicas
placed; {rounds} rounds.
"""


_POLICIES = """\
## Dispatch policies

Simulated (`headrace sim examples/fleet.toml`, [simulator.md](simulator.md)), each policy on the same
requests: {workers} workers with {step_tokens} tokens a step and {kv_tokens:,} tokens of KV cache, one of
{groups} prefixes of {prefix} tokens and {prompt:.0f} more in each prompt, one token as an answer;
{seconds:.0f} s counted. "Good" are first tokens within {goal_ms:.0f} ms, which is the requests' deadline
too: lanes refuse what can't meet it, the others never refuse. The fleet is full at {full} requests a
second; what lanes do at twice that rate, against what they do at it: {kept:.2f} (target ≥ 0.95).
"""

_FIDELITY = """\
## The simulator against a fleet

One workload on {workers} sim workers as processes, with nats-server, scheduler and ingress, asked over HTTP
("measured"), and in the simulator ("simulated"): {requests:,} requests counted, of
`benchmarks/fidelity.toml`. "Error p90": by how much the time to the first token was off what the dispatcher
foretold at the send, nine of ten at most. Other processes used {cores_used_by_others:.2f} cores at
most, in this run or the next.
"""

_REFUSALS = """\
Bursts of more than that fleet can serve at once (`benchmarks/refusals.toml`). Who is refused asks again at
once, without a deadline, and waits: "right" are those who were told so within {right:.0%}.
"""

_DISPATCHER = """\
## Dispatcher

Decisions of `scheduler/dispatch` by itself, {decisions:,} each: a request arrives, is sent, has its first
token and ends, and its worker tells its state at each. "Credit" is a fleet in which whoever comes goes on at
once, "deep" one before which 20,000 requests wait. Of {rounds} rounds the quickest is told, and what the
slowest did a second: what else a host does makes its guests slower, and never quicker. Growth is against the
smallest fleet, of the same kind.
"""

_HANDING = """\
## Handing out

What the way through the scheduler adds: a fleet that dispatches ("on") against one whose workers pull
("off"), with the load of "Added latency": {ttft_ms} ms to the first token, {itl_ms} ms between tokens,
{tokens} tokens, {rounds} rounds. "Floor" is what one more process on the way adds on this machine that passes
messages on and decides nothing, at that rate of requests and with no fleet beside it (`benchmarks/floor.py`).
Other processes used {cores_used_by_others:.2f} cores at most.
"""

_HEARTBEATS = """\
## Heartbeats

What a scheduler that dispatches takes of a core to hear its fleet, each worker of which tells every
{every_s:g} s how it is, over nats-server; nothing is asked of them. Growth is against the smallest fleet.
"Silence": the longest time between two words of the scheduler, after {silence_s:g} s of which workers pull
by themselves. Other processes used {cores_used_by_others:.2f} cores at most.
"""

_TAKEOVER = """\
## Takeover

How long nobody leads when a scheduler is struck, of two, on one nats-server, with one sim worker and {rate:g}
requests a second; seconds from the strike, the median over all such strikes with the range. "Word": the next
leader's first. "Hands out": the first request that it sends a worker. "Longest wait": of a request that comes
within the next 3 s, for its first frame: workers pull by themselves meanwhile. Where both are killed, their
processes' own start lies between. Other processes used {cores_used_by_others:.2f} cores at most.
"""

_SIMULATED = """\
{workers:,} workers with {rate:,.0f} requests a second, in proportion, under lanes: {requests:,} requests in
{wall_s:.0f} s (CPU time {cpu_s:.0f} s, target ≤ 600), with {peak_mib:,} MiB of memory at most (target ≤
4,096), where the engines' blocks have the dispatcher's 128 tokens: p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms,
hits {hit_rate:.3f}.
"""


_FAIRNESS = """\
Eight tenants on eight workers, alone and beside one that asks for some hundred times as much as each of them;
by itself that one is served {alone_s:,.0f} requests a second. TTFT of the eight.
A flood leaves no worker idle: who comes finds a step under way, where alone they found none, and the more so
the fewer they are:
"""


def _dispatcher(record: Record) -> str:
    rows = []
    smallest_of: dict[str, Record] = {}
    for case, found in record.items():
        workers, _, kind = case.partition("_")
        if not workers.isdecimal():
            continue
        least = {"100": 5000, "1000": 1000}.get(workers)
        smallest = smallest_of.setdefault(kind, found)
        rows.append(
            [
                f"{int(workers):,}",
                kind,
                f"{found['a_second']:,}",
                _against(found["a_second"], least, least=True),
                f"{found['slowest']:,}",
                f"{found['p50_ms']:.2f}",
                f"{found['p99_ms']:.2f}",
                _against(found["p99_ms"], 1.0),
                f"{1e6 / found['a_second']:.0f}",
                f"{smallest['a_second'] / found['a_second']:.2f}",
                f"{1000 * found['heartbeat_ms']:.1f}",
                f"{found['heartbeat_ms'] / smallest['heartbeat_ms']:.2f}",
            ]
        )
    head = ["workers", "", "decisions/s", "target", "slowest", "p50, ms", "p99, ms", "target"]
    head += ["a decision, us", "growth", "a heartbeat, us", "growth"]
    return _section(_DISPATCHER.format_map(record), head, rows, record)


def _fidelity(record: Record) -> str:
    sides = record["simulated"], record["measured"]
    rows = [
        [
            name,
            *(f"{side[key]:,.{digits}f}" for side in sides),
            f"{sides[1][key] / sides[0][key]:.2f}",
            _near(sides[1][key] / sides[0][key]) if key in record["ratios"] else "",
        ]
        for name, key, digits in (
            ("TTFT p50, ms", "p50_ms", 1),
            ("TTFT p90, ms", "p90_ms", 1),
            ("TTFT p99, ms", "p99_ms", 1),
            ("prefix hits", "hit_rate", 3),
            ("error p90, ms", "error_p90_ms", 1),
        )
    ]
    head = ["", "simulated", "measured", "ratio", "target"]
    values = {**record, "requests": sides[0]["requests"]}
    text = _section(_FIDELITY.format_map(values), head, rows, record)
    told = [
        [
            name,
            str(of["requests"]),
            str(of["refused"]),
            f"{of['told_p50_s']:.1f}",
            f"{of['waited_p50_s']:.1f}",
            f"{of['right']:.0%}",
            _against(of["right"], 0.5, least=True),
        ]
        for name, of in record["refusals"].items()
    ]
    head = ["", "requests", "refused", "told p50, s", "waited p50, s", "right", "target"]
    return "\n".join([text, _REFUSALS.format(right=fidelity.RIGHT), _table(head, told)])


def _near(ratio: float) -> str:
    return f"within 10 %: {'met' if abs(ratio - 1) <= 0.1 else '**missed**'}"


def _handing(record: Record) -> str:
    rows = [
        [
            streams,
            f"TTFT p{p}, ms",
            f"{found[f'on_ttft_p{p}_ms']['median']:.2f}",
            f"{found[f'off_ttft_p{p}_ms']['median']:.2f}",
            _range(found[f"added_ttft_p{p}_ms"]),
            _range(found[f"floor_p{p}_ms"]),
            _against(found[f"added_ttft_p{p}_ms"]["median"], 0.5 if p == 50 else None),
        ]
        for streams, found in record["streams"].items()
        for p in (journal.PERCENTILES if int(streams) > 1 else (50,))  # one has too few requests for more
    ]
    head = ["streams", "", "on", "off", "added", "floor", "target"]
    return _section(_HANDING.format_map(record), head, rows, record)


def _heartbeats(record: Record) -> str:
    smallest = next(iter(record["fleets"].values()))["us"]
    rows = [
        [
            f"{int(workers):,}",
            f"{found['heartbeats_per_s']:,}",
            f"{found['cores']:.2f}",
            f"{found['us']:.0f}",
            f"{found['us'] / smallest:.2f}",
            f"{found['silence_s']:.2f}",
        ]
        for workers, found in record["fleets"].items()
    ]
    head = ["workers", "heartbeats/s", "cores", "a heartbeat, us", "growth", "silence, s"]
    return _section(_HEARTBEATS.format_map(record), head, rows, record)


def _takeover(record: Record) -> str:
    rows = [
        [
            kind,
            str(record["strikes"][kind]),
            *(_range(found[name]) if name in found else "" for name in ("word", "sent", "wait")),
            _against(found["sent"]["high"], 1.0) if kind.startswith("leader") else "",
        ]
        for kind, found in record["struck"].items()
    ]
    head = ["struck", "times", "word, s", "hands out, s", "longest wait, s", "target"]
    return _section(_TAKEOVER.format_map(record), head, rows, record)


def _policies(record: Record) -> str:
    rows = [
        [
            rate,
            name,
            f"{found['ttft_ms']['p50']:,.1f}",
            f"{found['ttft_ms']['p99']:,.1f}",
            f"{found['hit_rate']:.3f}",
            f"{found['goodput']:,.0f}",
            f"{found['shed'] / found['requests']:.1%}",
            _policy_goals(found, at["push_fresh"]) if (rate, name) == ("950", "lanes") else "",
        ]
        for rate, at in (record["rates"] | record["beyond"]).items()
        for name, found in at.items()
    ]
    head = ["requests/s", "policy", "TTFT p50, ms", "p99, ms", "prefix hits", "good/s", "refused", "target"]
    *_, full, twice = record["beyond"]
    kept = record["beyond"][twice]["lanes"]["goodput"] / record["beyond"][full]["lanes"]["goodput"]
    text = _section(_POLICIES.format(**record, full=full, kept=kept), head, rows, record)
    return "\n".join([text, _SIMULATED.format(**record["speed"]), *_fairness(record["fairness"])])


def _fairness(found: Record) -> list[str]:
    rows = []
    for rate, of in found["rates"].items():
        ratios = [of[f"beside_p{p}_ms"] / of[f"alone_p{p}_ms"] for p in (50, 99)]
        rows.append(
            [
                rate,
                *(f"{of[f'{side}_p{p}_ms']:.1f}" for p in (50, 99) for side in ("alone", "beside")),
                f"{ratios[0]:.2f}",
                f"{ratios[1]:.2f}",
                _against(ratios[1], 1.1),
                f"{of['served_s']:,.0f}",
            ]
        )
    head = [
        "requests/s",
        "p50 alone, ms",
        "beside",
        "p99 alone, ms",
        "beside",
        "p50 ratio",
        "p99 ratio",
        "target",
    ]
    return [_FAIRNESS.format(**found), _table([*head, "served/s"], rows)]


def _policy_goals(lanes: Record, fresh: Record) -> str:
    goals = {
        "p50 ≤ 25": lanes["ttft_ms"]["p50"] <= 25,
        "p99 ≤ 85": lanes["ttft_ms"]["p99"] <= 85,
        "hits ≥ .93": lanes["hit_rate"] >= 0.93,
        "within 10 % of fresh": all(lanes["ttft_ms"][p] <= 1.1 * fresh["ttft_ms"][p] for p in ("p50", "p99")),
    }
    return ", ".join(f"{goal}: {'met' if met else 'missed'}" for goal, met in goals.items())


def _journal(record: Record) -> str:
    speed = {f"saturated, {record['saturated']['streams']}": record["saturated"]}
    speed |= {f"paced, {streams}": found for streams, found in record["paced"]["streams"].items()}
    rows = [
        [
            name,
            "tokens/s",
            f"{found['on_tokens_per_s']['median']:,.0f}",
            f"{found['off_tokens_per_s']['median']:,.0f}",
            f"ratio {_range(found['tokens_per_s_ratio'], 3)}",
            _against(found["tokens_per_s_ratio"]["median"], 0.95, least=True),
        ]
        for name, found in speed.items()
    ]
    rows += [
        [
            f"paced, {streams}",
            f"TTFT p{p}, ms",
            f"{found[f'on_ttft_p{p}_ms']['median']:.2f}",
            f"{found[f'off_ttft_p{p}_ms']['median']:.2f}",
            f"added {_range(found[f'added_ttft_p{p}_ms'])}",
            _against(found[f"added_ttft_p{p}_ms"]["median"], _TTFT_TARGETS.get((streams, p))),
        ]
        for streams, found in record["paced"]["streams"].items()
        for p in journal.PERCENTILES
    ]
    head = ["streams", "", "on", "off", "cost", "target"]
    parts = [_JOURNAL.format_map(record), _table(head, rows), _journal_cpu(record["saturated"])]
    return "\n".join([*parts, _journal_memory(record["memory"]), _origin(record) + "\n"])


_TTFT_TARGETS = {(streams, p): 0.3 for streams in ("32", "200") for p in (50, 99)}


def _journal_cpu(found: Record) -> str:
    sides = [found[f"{side}_us_per_token"] for side in journal.SIDES]
    rows = [
        [
            name,
            *(f"{side[name]['median']:.1f}" for side in sides),
            _range(found["added_us_per_token"][name], 1),
        ]
        for name in journal.PARTS
    ]
    return _JOURNAL_CPU + "\n" + _table(["process", *journal.SIDES, "added"], rows)


def _journal_memory(found: Record) -> str:
    stored = found["after"]["bytes"] - found["before"]["bytes"]
    frames = found["after"]["messages"] - found["before"]["messages"]
    text = _JOURNAL_MEMORY.format(
        streams=found["streams"],
        tokens=found["tokens"],
        limit_mib=found["limit"] / 2**20,
        mib=stored / 2**20,
        frame=stored / frames,
        capacity=found["limit"] / stored * found["streams"],
        tokens_kept=found["limit"] / stored * found["streams"] * found["tokens"],
        tail_mib=client._TAIL_BYTES / 2**20,
        tail_s=client._TAIL_SECONDS,
    )
    rows = [
        [name, *(f"{found[at][key]:.0f}" for at in ("before", "after", "full"))]
        for name, key in (("nats-server", "nats_mib"), ("worker", "worker_mib"))
    ]
    head = ["process", "journal empty", f"after {found['streams']:,} streams", "journal full"]
    return text + "\n" + _table(head, rows)


def _vllm(record: Record) -> str:
    rows = [
        [
            streams,
            f"{found['direct_tokens_per_s']['median']:.0f}",
            f"{found['headrace_tokens_per_s']['median']:.0f}",
            f"{found['direct_serving_ms_per_token']['median']:.2f}",
            f"{found['headrace_serving_ms_per_token']['median']:.2f}",
            _range(found["ratio"], 3),
            _against(found["ratio"]["median"], 0.95, least=True),
        ]
        for streams, found in record["streams"].items()
    ]
    head = ["streams", "AsyncLLM", "Headrace", "serving ms, AsyncLLM", "Headrace's", "ratio", "target"]
    return _section(_VLLM.format_map(record), head, rows, record)


def _batching(record: Record) -> str:
    throughput = record["throughput"]
    rows = [
        [
            "tokens/s, all at once",
            _range(throughput["static_tokens_per_s"], 0),
            _range(throughput["continuous_tokens_per_s"], 0),
            _range(throughput["ratio"]),
        ]
    ]
    rows += [
        [
            f"latency {name}, s, at {record['load']:.0%} load",
            _range(found["static_s"]),
            _range(found["continuous_s"]),
            _range(found["ratio"]),
        ]
        for name, found in record["latency"].items()
    ]
    text = _BATCHING.format(**record, least=batching.MIN_TOKENS, most=batching.MAX_TOKENS, wait=batching.WAIT)
    return _section(text, ["", "static", "continuous", "ratio"], rows, record)


def _planner(record: Record) -> str:
    rows = [
        [
            name,
            f"{record[key]['p50_ms']:.1f}",
            f"{record[key]['p99_ms']:.1f}",
            _against(record[key]["p50_ms"], 50.0),
        ]
        for name, key in (
            ("from nothing", "from_nothing"),
            ("nothing changed", "nothing_changed"),
            ("a worker left", "a_worker_left"),
        )
    ]
    return _section(_PLANNER.format(**record), ["plan", "p50, ms", "p99, ms", "target"], rows, record)


def _adapters(record: Record) -> str:
    vllm, fit = record["vllm"], record["all_fit"]
    targets = {"swap": 100.0, "wanted": 100.0}
    waits = [
        [
            name,
            str(found["count"]),
            f"{found['p50']:.1f}",
            f"{found['p99']:.1f}",
            _against(found["p99"], targets.get(name)),
        ]
        for name, found in vllm["wait_ms"].items()
    ]
    runs = [
        [
            f"{found['adapters']}, {'turns' if found['turns'] else 'none'}",
            f"{found['rate']:.0f}",
            f"{found['swaps_per_minute']:.0f}" if found["turns"] else "not known",
            f"{found['skipped']:,}",
            *(f"{found[f'wait_{p}_ms']:.0f}" for p in ("p50", "p99", "max")),
        ]
        for found in [*record["zipf"], fit]
    ]
    head = ["adapters", "requests/s", "swaps a minute", "skipped", "wait p50, ms", "p99", "longest"]
    text = _ADAPTERS.format(count=vllm["adapters"], **vllm["memory_mib"])
    first = _table(["until the first step", "requests", "p50, ms", "p99, ms", "target"], waits)
    return "\n".join([text, first, _ZIPF.format_map(record), _table(head, runs), _origin(record) + "\n"])


def _gpu_adapters(record: Record) -> str:
    waits = [
        [
            name,
            str(step["count"]),
            *(f"{found[p]:.1f}" for found in (step, record["first_token_ms"][name]) for p in ("p50", "p99")),
            _against(step["p99"], 100.0 if name in ("swap", "wanted") else None),
        ]
        for name, step in record["wait_ms"].items()
    ]
    head = ["", "requests", "step p50, ms", "p99, ms", "token p50, ms", "p99, ms", "target (step p99)"]
    busy, slept = record["zipf"], record["sleep"]
    traffic = [
        f"{busy['requests']:,}",
        f"{busy['swaps_per_minute']:.0f}",
        f"{busy['skipped']:,}",
        *(f"{busy[f'wait_{p}_ms']:.0f}" for p in ("p50", "p99", "max")),
        _against(busy["skipped"], 0.0),
    ]
    ways = [
        ["command to sleep, until it sleeps", slept["sleep_s"]],
        ["command to wake, until it serves", slept["awake_s"]],
        ["command to wake, until the first token", slept["token_s"]],
        ["start of a process, until the first token", record["start_s"]],
    ]
    freed = slept["before_mib"] - slept["asleep_mib"]
    return "\n".join(
        [
            _GPU_ADAPTERS.format_map(record),
            _table(head, waits),
            _GPU_ZIPF.format_map(record),
            _table(
                [
                    "requests",
                    "swaps a minute",
                    "skipped",
                    "wait p50, ms",
                    "p99",
                    "longest",
                    "target (skipped)",
                ],
                [traffic],
            ),
            _GPU_SLEEP.format(**slept, starts=record["starts"], freed_mib=freed),
            _table(["", "s"], [[name, _range(seconds)] for name, seconds in ways]),
            _origin(record) + "\n",
        ]
    )


_PREFIXES = """\
## Shared prompts on real vLLM

{model} on two vLLM workers (CPU, one thread each), chats that begin with one of {prompts} system prompts by
Zipf's law, {prompt_tokens} tokens with the question, {tokens} tokens as an answer; {clients} clients that ask
one after the other. A worker's KV cache has room for {cache_tokens:,} tokens: for what it runs and about half
of the prompts. Workers that pull ("FIFO"), against the scheduler that hands out, in turn on the same workers,
{rounds} rounds of {requests} requests, each with prompts of its own; percentiles over all. Other processes
used {cores_used_by_others:.2f} cores meanwhile.
"""

_HOSTILE = """\
## A small KV cache on real vLLM

{model} on one vLLM worker (CPU) whose KV cache has room for {kv_tokens:,} tokens. Asked all at once:
{requests} requests, long prompts (300 to 900 words), long answers ({mean_answer} tokens on average, as
nobody is told) and bursts of eight short ones. The engine's figures after each step during which requests
waited outside of it. "Wait" are the steps that ended between the worker's taking a request and the engine's
first step with it. KV use is counted from when it first was 85 %. Every answer was complete. Other processes
used {cores_used_by_others:.2f} cores meanwhile.
"""


def _prefixes(record: Record) -> str:
    names = {"fifo": "FIFO", "dispatched": "handed out"}
    rows = [
        [
            names[side],
            f"{found['hit_rate']:.1%}",
            f"{found['ttft_p50_ms']:,.0f}",
            f"{found['ttft_p99_ms']:,.0f}",
            f"{found['requests_per_s']:.2f}",
        ]
        for side, found in record["sides"].items()
    ]
    ratio = record["ratio"]
    rows.append(["FIFO : handed out", "", f"{ratio['ttft_p50_ms']:.2f}", f"{ratio['ttft_p99_ms']:.2f}", ""])
    head = ["", "prompt tokens from the cache", "TTFT p50, ms", "p99, ms", "requests/s"]
    return _section(_PREFIXES.format_map(record), head, rows, record)


def _hostile(record: Record) -> str:
    rows = [
        [
            side,
            f"{found['seconds']:.0f}",
            f"{found['preemptions']}",
            f"{found['kv_use']:.1%} ({found['kv_use_p10']:.1%})",
            f"{found['waiting']:.2f} ({found['waiting_p99']:.0f})",
            f"{found['wait_steps']:.1f} ({found['wait_steps_p99']:.0f})",
            _against(100 * found["kv_use"], 85, least=True) if side == "dispatched" else "",
        ]
        for side, found in record["sides"].items()
    ]
    text = _HOSTILE.format(**record, requests=record["sides"]["dispatched"]["requests"])
    head = ["", "s", "preemptions", "KV use (p10)", "waiting in the engine (p99)", "wait, steps (p99)"]
    head += ["target, % of KV"]
    return _section(text, head, rows, record)


def plot(latency: Record, throughput: Record | None) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3 if throughput else 2, figsize=(12 if throughput else 8, 3.6))
    for axis, name in zip(axes, ("ttft", "itl"), strict=False):
        _bars(
            axis,
            list(latency["streams"]),
            {
                f"p{p}": [found[f"added_{name}_p{p}_ms"] for found in latency["streams"].values()]
                for p in overhead.PERCENTILES
            },
        )
        axis.set(title=f"added {name.upper()}, ms", xlabel="concurrent streams (sim engine)")
    if throughput:
        found = throughput["streams"]
        sides = {"AsyncLLM": "direct_tokens_per_s", "Headrace": "headrace_tokens_per_s"}
        _bars(
            axes[2],
            list(found),
            {label: [value[side] for value in found.values()] for label, side in sides.items()},
        )
        axes[2].set(title="vLLM on CPU, tokens/s", xlabel="concurrent streams")
    figure.tight_layout()
    figure.savefig(DOCS / PLOT, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _bars(axis: Any, groups: list[str], series: dict[str, list[dict[str, float]]]) -> None:
    """Grouped bars of medians with the range over rounds as whiskers."""
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        at = [index + (number - (len(series) - 1) / 2) * width for index in range(len(groups))]
        medians = [value["median"] for value in values]
        below = [value["median"] - value["low"] for value in values]
        above = [value["high"] - value["median"] for value in values]
        axis.bar(at, medians, width, yerr=[below, above], capsize=3, label=label)
    axis.set_xticks(range(len(groups)), groups)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.legend()


def _routing(record: Record) -> str:
    rows = [[name, f"{share:.1%}"] for name, share in record["accuracy"].items()]
    names = record["routes"]
    confusion = [
        [name, *(str(n or "") for n in row)] for name, row in zip(names, record["confusion"], strict=True)
    ]
    table = _table(["by", "right"], rows)
    text = f"{_ROUTING.format(**record)}\n{table}\n\n{_CONFUSION}"
    return _section(text, ["", *names], confusion, record)
