"""`headrace dead` over the in-memory broker: what is told of a letter, what goes back, what is left alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from broker import base, errors, objects, subjects
from broker.config import BrokerConfig
from broker.letters import dead_letter
from broker.memory import MemoryBroker
from broker.messages import Attempt, DeadLetter, parse_request
from ops import cli, dead, letters
from ops.errors import NotReplayable
from ops.letters import Letter

FAULT = errors.WorkerLost("it killed 3 workers")
SUBJECT = "req.llama.standard.acme.llama"
BODY = b'{"model":"llama","prompt":"Hi"}'
HISTORY = (Attempt(epoch=1, worker="w1", at_ms=1_795_000_000_000, what="worker lost"),)


def headers(request: str = "r1", **more: str) -> dict[str, str]:
    return {
        "Nats-Msg-Id": f"acme:{request}",
        "Reply-To": f"out.acme.box.{request}",
        "Path": "/v1/completions",
        "Deadline": "1",
        "traceparent": "00-ab-cd-01",
        **more,
    }


def letter(seq: int = 7, **changes: Any) -> Letter:
    content = DeadLetter(
        reason="worker_lost",
        message="it killed 3 workers",
        subject=SUBJECT,
        headers=headers(),
        body=base64.b64encode(BODY).decode(),
        failed_ms=1_795_000_000_500,
    ).model_copy(update=changes)
    data = content.model_dump_json().encode()
    return Letter.read(base.Record(seq, "dead.worker_lost", data, None, 1_795_000_000_501.25))


def garbage(data: bytes) -> Letter:
    return Letter.read(base.Record(3, "dead.odd", data, None, 1_795_000_000_000.0))


async def bury(broker: base.Broker, *requests: str, fault: errors.HeadraceError = FAULT) -> None:
    for request in requests:
        await dead_letter(broker, SUBJECT, headers(request), BODY, fault, 1, HISTORY)


async def headrace(broker: base.Broker, *arguments: str) -> int:
    args = cli.parser().parse_args(["dead", *arguments])
    return await dead._ACTIONS[args.action](broker, args)


async def left(broker: base.Broker) -> list[int]:
    return [record.seq for record in await broker.read(subjects.DEAD, subjects.ALL_DEAD)]


async def queued(broker: base.Broker) -> list[base.Record]:
    return await broker.read(subjects.REQUESTS, subjects.ALL_REQUESTS)


# Words


def test_a_letter_in_one_row() -> None:
    row = letters.summary(letter())
    assert row == (7, row.when, "worker_lost", "acme", "llama", "r1", "it killed 3 workers")
    assert datetime.fromisoformat(row.when).timestamp() == 1_795_000_000
    assert datetime.fromisoformat(row.when).tzinfo is not None


def test_what_cannot_be_told_is_left_out() -> None:
    row = letters.summary(letter(subject="req.x", headers={"Path": "/"}, failed_ms=10**30))
    assert (row.tenant, row.model, row.request, row.when) == ("", "", "", "")
    told = letters.table((), [row])
    assert told.split() == ["7", "-", "worker_lost", "-", "-", "-", "it", "killed", "3", "workers"]


@pytest.mark.parametrize("data", [b"garbage", b"\xff\x1b[2J", b"{}", b""])
def test_what_is_no_letter_is_shown_as_it_is(data: bytes) -> None:
    found = garbage(data)
    assert letters.summary(found).reason == "odd"
    assert letters.summary(found).message == f"no letter: {data!r}"
    assert "\x1b" not in letters.describe(found, True)
    with pytest.raises(NotReplayable):
        letters.revived(found)


def test_a_terminal_obeys_no_letter() -> None:
    evil = "\x1b]0;x\x07\u202e"
    found = letter(
        message=evil,
        subject=f"req.b.standard.{subjects.token(evil)}.m",
        headers=headers(**{evil: evil}),
        body=base64.b64encode(evil.encode()).decode(),
        history=(Attempt(epoch=1, worker=evil, at_ms=1, what=evil),),
    )
    told = letters.describe(found, True)
    assert all(c.isprintable() or c == "\n" for c in told)
    # Tenant, message, a header's name and value, the attempt's two, and the body.
    assert told.count(r"\x1b]0;x\x07\u202e") == 7


def test_show_has_everything() -> None:
    told = letters.describe(letter(history=HISTORY), False)
    for part in (
        SUBJECT,
        "worker_lost",
        "acme",
        "r1",
        "out.acme.box.r1",
        "traceparent",
        f"{len(BODY)} bytes",
    ):
        assert part in told
    when = datetime.fromtimestamp(1_795_000_000).astimezone().isoformat()
    assert f"1      w1      {when}  worker lost" in told
    assert "prompt" not in told


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (BODY, '{\n  "model": "llama",\n  "prompt": "Hi"\n}'),
        (b"no JSON\nbut text", "no JSON\nbut text"),
        (b"\xff\x00", r"\xff\x00"),
        (b"[" * 500 + b"]" * 500, "[" * 500 + "]" * 500),
    ],
)
def test_a_body_is_printed_as_what_it_is(body: bytes, shown: str) -> None:
    told = letters.describe(letter(body=base64.b64encode(body).decode()), True)
    assert told.endswith("\n\n" + shown)


def test_a_body_in_the_store_is_told_where() -> None:
    head = headers(**{"Body-Object": "acme.b1"})
    told = letters.describe(letter(headers=head, body=""), True)
    assert told.endswith("\n\nthe body is the object acme.b1 of bucket payloads")
    assert "of bucket" not in letters.describe(letter(headers=head), True)  # that is why it is no request


# Back into the queue


def test_what_goes_back_is_new_and_has_time() -> None:
    stored_by_a_server = {"Nats-Subject": "x", "Nats-Sequence": "1", "Nats-Expected-Stream": "OTHER"}
    subject, body, head = letters.revived(letter(headers=headers(**stored_by_a_server)))
    assert (subject, body) == (SUBJECT, BODY)
    assert head.pop("Nats-Msg-Id") == "acme:dead:7:1795000000501"
    kept = headers()
    assert head == {name: kept[name] for name in ("Reply-To", "Path", "traceparent")}


@pytest.mark.parametrize("fault", [{"Deadline": "soon"}, {"Nats-Msg-Id": ""}])
def test_a_fault_that_replaying_mends_is_none(fault: dict[str, str]) -> None:
    subject, body, head = letters.revived(letter(headers=headers(**fault)))
    assert parse_request(subject, head, body).request_id == "r1"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"subject": "req.llama.urgent.acme.llama"}, "would die again: 'urgent'"),
        ({"subject": "req.x"}, "would die again: 'req.x' is not req"),
        ({"headers": headers(**{"Reply-To": ""})}, "would die again: header Reply-To"),
        ({"headers": headers(**{"Reply-To": "out.mallory.box.1"})}, "would die again: .*tenant"),
        ({"headers": headers(Path="")}, "would die again: header Path"),
        ({"headers": {}, "body": ""}, "headers and body were not kept: it killed"),
        ({"body": "*"}, "would die again"),
    ],
)
def test_what_would_die_again_stays(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(NotReplayable, match=why):
        letters.revived(letter(**changes))


async def test_a_letter_too_large_to_keep_cannot_go_back(anyio_backend: object) -> None:
    broker = MemoryBroker()
    await dead_letter(broker, SUBJECT, headers(Path=""), bytes(2**20 - 400), FAULT)
    assert await headrace(broker, "replay", "1") == 1
    assert await left(broker) == [1]


async def test_a_request_goes_back_though_its_id_is_known(
    anyio_backend: object, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = MemoryBroker()
    first = await (await broker.enqueue(SUBJECT, BODY, headers()))
    await broker.delete(subjects.REQUESTS, first.seq)
    await bury(broker, "r1")
    assert await headrace(broker, "replay", "1") == 0
    (record,) = await queued(broker)
    request = parse_request(record.subject, record.headers, record.data)
    assert (request.reply_to, request.deadline_ms, request.body) == ("out.acme.box.r1", 0, BODY)
    assert await left(broker) == []
    assert capsys.readouterr().out == "1: in the queue as 2\n"


async def test_a_replay_that_could_not_delete_its_letter_is_repeated_as_one(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def lost(*_: object) -> bool:
        raise errors.Unavailable("gone")

    broker = MemoryBroker()
    await bury(broker, "r1", "r2")
    with monkeypatch.context() as patched:
        patched.setattr(broker, "delete", lost)
        assert await headrace(broker, "replay", "--all") == 1
    told = capsys.readouterr().err
    assert "1: in the queue as 1, but the letter could not be deleted: gone" in told
    assert "0 done, 1 not" in told  # and the second was not tried
    assert await headrace(broker, "replay", "--all") == 0
    assert capsys.readouterr().out == (
        "1: in the queue as 1, where an earlier replay put it\n2: in the queue as 2\n"
    )
    assert (len(await queued(broker)), await left(broker)) == (2, [])


async def test_each_letter_is_told_and_the_rest_goes_on(
    anyio_backend: object, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = MemoryBroker()
    await bury(broker, "r1")
    await dead_letter(broker, "req.x", {}, b"?", errors.MalformedMessage("no request"))
    await bury(broker, "r3")
    assert await headrace(broker, "replay", "1", "2", "99", "3", "3") == 1
    told = capsys.readouterr()
    assert told.out == "1: in the queue as 1\n3: in the queue as 2\n"
    assert [line.partition(" would")[0] for line in told.err.splitlines()] == [
        "headrace dead: 2: it",
        "headrace dead: 99: there is no such letter",
        "headrace dead: 2 done, 2 not",
    ]
    assert await left(broker) == [2]


async def test_a_full_queue_ends_it(anyio_backend: object, capsys: pytest.CaptureFixture[str]) -> None:
    broker = MemoryBroker(BrokerConfig(max_queued=2))
    await bury(broker, "r1", "r2", "r3", "r4")
    assert await headrace(broker, "replay", "--all") == 1
    assert await left(broker) == [3, 4]
    told = capsys.readouterr().err
    assert "3: the stream is full" in told
    assert "2 done, 1 not" in told


async def test_what_dies_meanwhile_is_left_for_the_next_time(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = MemoryBroker()
    put_back = dead.replay

    async def dies_again(to: base.Broker, one: Letter) -> str:
        await bury(broker, "r1")
        return await put_back(to, one)

    monkeypatch.setattr(dead, "replay", dies_again)
    await bury(broker, "r1", "r2")
    assert await headrace(broker, "replay", "--reason", "worker_lost") == 0
    assert await left(broker) == [3, 4]


@pytest.mark.parametrize("action", [["list"], ["replay", "--all"], ["drop", "--all"]])
async def test_nothing_to_do_is_said(
    anyio_backend: object, capsys: pytest.CaptureFixture[str], action: list[str]
) -> None:
    assert await headrace(MemoryBroker(), *action) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("headrace dead: no dead letters")


# List and drop


async def test_the_newest_are_listed_last(anyio_backend: object, capsys: pytest.CaptureFixture[str]) -> None:
    broker = MemoryBroker()
    await bury(broker, *(f"r{n}" for n in range(1, 41)))
    await dead_letter(broker, "req.x", {}, b"?", errors.MalformedMessage("no request"))
    assert await headrace(broker, "list", "--limit", "2") == 0
    told = capsys.readouterr()
    head, *rows = told.out.splitlines()
    assert head.split() == ["SEQ", "WHEN", "REASON", "TENANT", "MODEL", "REQUEST", "MESSAGE"]
    assert [row.split()[0] for row in rows] == ["40", "41"]
    assert "the newest 2 of 41" in told.err


@pytest.mark.parametrize(
    ("filters", "seqs"),
    [
        (["--reason", "malformed_message"], [2]),
        (["--tenant", "acme"], [1, 3]),
        (["--tenant", "nobody"], []),
        (["--reason", "worker_lost", "--limit", "1"], [3]),
    ],
)
async def test_a_list_for_programs(
    anyio_backend: object, capsys: pytest.CaptureFixture[str], filters: list[str], seqs: list[int]
) -> None:
    broker = MemoryBroker()
    await bury(broker, "r1")
    await dead_letter(broker, "req.x", {}, b"?", errors.MalformedMessage("no request"))
    await bury(broker, "r3")
    assert await headrace(broker, "list", "--json", *filters) == 0
    assert [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()] == seqs


@pytest.mark.parametrize(
    ("which", "rest"), [(["1", "2"], [3]), (["--reason", "worker_lost"], [2]), (["--all"], [])]
)
async def test_what_is_dropped_is_gone(anyio_backend: object, which: list[str], rest: list[int]) -> None:
    broker = MemoryBroker()
    await bury(broker, "r1")
    await dead_letter(broker, "req.x", {}, b"?", errors.MalformedMessage("no request"))
    await bury(broker, "r3")
    assert await headrace(broker, "drop", "--yes", *which) == 0
    assert await left(broker) == rest
    assert await queued(broker) == []


async def test_a_body_that_no_message_held_is_dropped_with_its_letter(anyio_backend: object) -> None:
    broker = MemoryBroker()
    await objects.put(broker, subjects.PAYLOADS, "acme.one", b"a large body")
    large = headers("r1") | {subjects.BODY_OBJECT: "acme.one"}
    await dead_letter(broker, SUBJECT, large, b"", FAULT, 1, HISTORY)
    assert await headrace(broker, "drop", "--yes", "1") == 0
    with pytest.raises(objects.Missing):
        await objects.get(broker, subjects.PAYLOADS, "acme.one", 100)


async def test_a_body_that_a_queued_replay_needs_stays_when_the_letter_is_dropped(
    anyio_backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replay was broken off before it had deleted the letter."""

    async def lost(*_: object) -> bool:
        raise errors.Unavailable("gone")

    broker = MemoryBroker()
    await objects.put(broker, subjects.PAYLOADS, "acme.one", b"a large body")
    large = headers("r1") | {subjects.BODY_OBJECT: "acme.one"}
    await dead_letter(broker, SUBJECT, large, b"", FAULT, 1, HISTORY)
    with monkeypatch.context() as patched:
        patched.setattr(broker, "delete", lost)
        assert await headrace(broker, "replay", "1") == 1
    assert await headrace(broker, "drop", "--yes", "1") == 0
    assert (len(await queued(broker)), await left(broker)) == (1, [])
    assert await objects.get(broker, subjects.PAYLOADS, "acme.one", 100) == b"a large body"


def _unasked(_: str) -> str:
    raise AssertionError("nobody is there to answer")


def _ended(_: str) -> str:
    raise EOFError


@pytest.mark.parametrize(
    ("terminal", "answer", "rest"),
    [
        (False, _unasked, [1]),
        (True, lambda _: "n", [1]),
        (True, lambda _: "", [1]),
        (True, _ended, [1]),
        (True, lambda _: "y", []),
    ],
)
async def test_nothing_is_dropped_unless_it_is_meant(
    anyio_backend: object,
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    answer: Callable[[str], str],
    rest: list[int],
) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    broker = MemoryBroker()
    await bury(broker, "r1")
    assert await headrace(broker, "drop", "1") == (1 if rest else 0)
    assert await left(broker) == rest


async def test_a_letter_that_is_not_there_is_an_error(anyio_backend: object) -> None:
    broker = MemoryBroker()
    await bury(broker, "r1")
    with pytest.raises(errors.NotFound, match="no dead letter 2"):
        await headrace(broker, "show", "2")


@pytest.mark.parametrize(
    "arguments",
    [
        ["dead"],
        ["dead", "replay"],
        ["dead", "drop", "--yes"],
        ["dead", "drop", "1", "--all"],
        ["dead", "replay", "--reason", "x", "--all"],
        ["dead", "replay", "0"],
        ["dead", "show", "9" * 30],
        ["dead", "list", "--limit", "-1"],
        ["dead", "list", "--reason", ""],
    ],
)
def test_wrong_flags_are_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.parser().parse_args(arguments)
    assert raised.value.code == 2
