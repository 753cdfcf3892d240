"""`headrace dead`: what the fleet gave up on, looked at, put back into the queue, or dropped."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

import orjson

from broker import base, bodies, client, errors, subjects
from broker.config import BrokerConfig
from broker.messages import Request, parse_request
from ops import logs
from ops.errors import NotReplayable
from ops.letters import Letter, Row, describe, revived, summary, table

_PAGE = 16
"""Letters read at once: each may be as large as the broker's `max_payload`."""

Act = Callable[[base.Broker, Letter], Awaitable[str]]


def run(args: argparse.Namespace, config: BrokerConfig) -> int:
    """The exit status: 0 all done, 1 one or more letters were not, or the broker is not there."""
    # Letters are done one by one, each told as it is done: an interrupt has nothing to tidy up.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logs.hold_back_broker()
    return asyncio.run(_run(args, config))


async def _run(args: argparse.Namespace, config: BrokerConfig) -> int:
    async with await client.connect(config, "headrace dead", make_streams=False) as broker:
        return await _ACTIONS[args.action](broker, args)


async def _list(broker: base.Broker, args: argparse.Namespace) -> int:
    rows: deque[Row] = deque(maxlen=args.limit)
    found = 0
    async for letter in walk(broker, _subject(args)):
        row = summary(letter)
        if args.tenant in (None, row.tenant):
            rows.append(row)
            found += 1
    if args.json:
        for row in rows:
            print(orjson.dumps(row._asdict()).decode())
    elif rows:
        print(table([name.upper() for name in Row._fields], rows))
    if found > len(rows):
        _tell(f"the newest {len(rows)} of {found} dead letters; --limit shows more")
    elif not found:
        _tell("no dead letters")
    return 0


async def _show(broker: base.Broker, args: argparse.Namespace) -> int:
    letter = await find(broker, args.seq)
    if letter is None:
        raise errors.NotFound(f"there is no dead letter {args.seq}")
    print(describe(letter, args.body))
    return 0


async def _replay(broker: base.Broker, args: argparse.Namespace) -> int:
    return await _each(broker, args, replay)


async def _drop(broker: base.Broker, args: argparse.Namespace) -> int:
    count = len(args.seqs) or sum((await broker.counts(subjects.DEAD, _subject(args))).values())
    if count and not (args.yes or _confirmed(count)):
        _tell("nothing was dropped")
        return 1
    return await _each(broker, args, drop)


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        _tell("this can't be undone: say --yes")
        return False
    try:
        return input(f"Drop {count} dead letters for good? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


_ACTIONS: dict[str, Callable[[base.Broker, argparse.Namespace], Awaitable[int]]] = {
    "list": _list,
    "show": _show,
    "replay": _replay,
    "drop": _drop,
}


async def _each(broker: base.Broker, args: argparse.Namespace, act: Act) -> int:
    """Do `act` with every chosen letter, and say what became of it. A fault of the broker's ends it."""
    done = failed = 0
    try:
        async for seq, letter in _chosen(broker, args):
            try:
                if letter is None:
                    raise errors.NotFound("there is no such letter")
                print(f"{seq}: {await act(broker, letter)}", flush=True)
                done += 1
            except errors.HeadraceError as exc:
                _tell(f"{seq}: {exc.message}")
                failed += 1
                if exc.retry:
                    break  # the next one would meet the same
    finally:
        if done or failed:
            _tell(f"{done} done, {failed} not")
    if not (done or failed):
        _tell("no dead letters: nothing to do")
    return 1 if failed else 0


async def _chosen(broker: base.Broker, args: argparse.Namespace) -> AsyncIterator[tuple[int, Letter | None]]:
    """The letters that are named, or all there are now: what dies meanwhile is not taken along."""
    for seq in dict.fromkeys(args.seqs):
        yield seq, await find(broker, seq)
    if args.seqs:
        return
    newest = await broker.last(subjects.DEAD, _subject(args))
    if newest is not None:
        async for letter in walk(broker, _subject(args), newest.seq):
            yield letter.seq, letter


def _subject(args: argparse.Namespace) -> str:
    return subjects.dead(args.reason) if args.reason else subjects.ALL_DEAD


def _tell(text: str) -> None:
    """To the operator, not into a pipe."""
    print(f"headrace dead: {text}", file=sys.stderr, flush=True)


# Letters


async def walk(broker: base.Broker, subject: str, until: float = float("inf")) -> AsyncIterator[Letter]:
    """Those under `subject` up to sequence `until`, oldest first; a page at a time in memory."""
    async for record in _records(broker, subjects.DEAD, subject):
        if record.seq > until:
            return
        yield Letter.read(record)


async def _records(broker: base.Broker, stream: str, subject: str) -> AsyncIterator[base.Record]:
    start = 1
    while page := await broker.read(stream, subject, start, _PAGE):
        for record in page:
            yield record
        start = page[-1].seq + 1


async def find(broker: base.Broker, seq: int) -> Letter | None:
    page = await broker.read(subjects.DEAD, subjects.ALL_DEAD, seq, 1)
    return Letter.read(page[0]) if page and page[0].seq == seq else None


async def replay(broker: base.Broker, letter: Letter) -> str:
    """Put the request back, and delete the letter once the queue has it; what was done, in words.

    Ended between the two, both are there. Replayed again within the dedup window, the same message id
    makes that one request; later it would run twice. Raises NotReplayable, errors.TooLarge,
    errors.Overloaded, errors.Unavailable.
    """
    subject, body, headers = revived(letter)
    try:
        await bodies.load(broker, parse_request(subject, headers, body))
    except errors.BodyLost as exc:
        raise NotReplayable(exc.message) from exc
    stored = await (await broker.enqueue(subject, body, headers))
    place = f"in the queue as {stored.seq}"
    try:
        await broker.delete(subjects.DEAD, letter.seq)
    except errors.Unavailable as exc:
        raise errors.Unavailable(f"{place}, but the letter could not be deleted: {exc.message}") from exc
    return f"{place}, where an earlier replay put it" if stored.duplicate else place


async def drop(broker: base.Broker, letter: Letter) -> str:
    if not await broker.delete(subjects.DEAD, letter.seq):
        return "gone already"
    with contextlib.suppress(NotReplayable):
        subject, body, headers = revived(letter)
        request = parse_request(subject, headers, body)
        if not await _needed(broker, request):
            await bodies.discard(broker, request)
    return "dropped"


async def _needed(broker: base.Broker, request: Request) -> bool:
    """Whether a message in the queue names the same stored body: a replay that was broken off leaves both."""
    if not request.body_object:
        return False
    async for record in _records(broker, subjects.REQUESTS, str(request.subject)):
        if (record.headers or {}).get(subjects.BODY_OBJECT) == request.body_object:
            return True
    return False
