"""The real broker: NATS with JetStream.

JetStream's request API is spoken directly where nats-py's helpers would cost a barrier or a wait:
standing pulls (`CONSUMER.MSG.NEXT`), publishing without waiting for the acknowledgement, and reading
a journal in one round trip (`DIRECT.GET` with `batch`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import random
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

import nats
import nats.errors
import nats.js.errors
import orjson
from nats.aio.msg import Msg
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    before_sleep_log,
    retry_if_exception_type,
    wait_exponential,
)

from broker import base, errors, subjects, tail, topology
from broker.clock import Clock
from broker.config import BrokerConfig
from broker.connection import Connection
from broker.messages import ServiceClass

_log = logging.getLogger(__name__)

_PULL_EXPIRES = 10.0
_STORE_FAILED = 10077
_NO_MESSAGE = 10037
_IN_PROCESS = 10158  # a message of the same id is being stored just now
_NO_CONSUMER = 10014
_WRONG_LAST_SEQUENCE = 10071
_RECEIPT = "$JS.ACK."
_NOT_LITERAL = set("*> \t\r\n")
_NOT_THERE = (10043, 10057)  # of a delete: the message is not, or no longer, there; or a write failed
_NO_ROOM = (10002, 10023, 10047)  # an account's, or the server's storage is used up
_DISK_FULL = "no space left on device"
_READ_BATCH = 256
_AT_ONCE = 16 * 2**20
"""Bytes that one request has the server send: who is sent more than its `max_pending` faster than it reads is
cut off."""
_PULL_OVER = 2.0
"""Seconds after its end by which the server has said so of a pull, if it does."""
_BYTES_ARE_USED_UP = ("batch completed", "message size exceeds maxbytes")
_NO_ANSWER = 0.05
"""Seconds after which a listener that does not answer is known to be there: the server says at once, in
0.3 ms, that there is none."""
_TAIL_SECONDS = 12.0
_TAIL_BYTES = 32 * 2**20
"""Frames kept to be published again: a cluster takes up to 9 s to elect a journal's new leader."""
_ELECTION = 10.0
"""Seconds for which a stream without a leader is waited for."""
_MAKING = 10.0
"""Seconds for a stream to be made, by a slow disk too: nobody waits for it but who starts."""
_TRIES = 3
_STORED_BY = 1.0
"""Seconds by which a change that was on its way is stored."""
_CLOCK_EVERY = 30.0
"""Seconds after which the broker is asked for the time again: quartz drifts by some ms meanwhile."""
_CLOCK_AGAIN = 1.0
"""The same where it has not answered."""
_RECOVER_AFTER = 0.5
"""Seconds between a pull that was refused and the next try."""


async def connect(config: BrokerConfig, name: str, *, make_streams: bool = True) -> NatsBroker:
    """Connect to `config.url`, make the streams, and return a broker that reconnects by itself.

    Without `make_streams` they stay as they are: an operator's command knows nothing of a fleet's limits.
    Raises errors.Unavailable when no server answers within `config.timeout`.
    """
    broker = NatsBroker(config, name, make_streams)
    await broker.open()
    return broker


class _Translated:
    """nats-py's errors to ours, in one place. A class, since it stands on the per-token path."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: object) -> None:
        if isinstance(exc, nats.errors.MaxPayloadError):
            raise errors.TooLarge("the message is larger than the broker takes") from exc
        # nats.errors.Error: its timeouts, closed and lost connections, and JetStream's API errors.
        if isinstance(exc, (nats.errors.Error, TimeoutError, OSError)):
            raise errors.Unavailable(f"the broker did not answer: {_reason(exc)}") from exc


_translated = _Translated()


def _reason(exc: BaseException) -> str:
    return str(exc) or type(exc).__name__


def _without_credentials(url: str) -> str:
    return re.sub(r"//[^,]*@", "//", url)


class NatsBroker(base.Broker):
    """One connection. See `base.Broker` for the contract."""

    def __init__(self, config: BrokerConfig, name: str, make_streams: bool = True) -> None:
        super().__init__()
        self._config = config
        self._name = name
        self._make_streams = make_streams
        self._nc = Connection()
        self._js = self._nc.jetstream(timeout=config.timeout)
        self._acks: dict[str, asyncio.Future[base.Stored]] = {}
        self._ack_numbers = itertools.count()
        self._ack_inbox = ""
        self._inbox = self._nc.new_inbox()
        self._inboxes = itertools.count()
        self._pullers: set[_Puller] = set()
        self._watches: set[_Watch] = set()
        self._naks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._outage: set[str] = set()  # kinds of error logged since the connection was lost
        self._reconnecting: asyncio.Task[None] | None = None
        self._tail = tail.Tail(_TAIL_SECONDS, _TAIL_BYTES)
        self._heard = tail.Tail(_TAIL_SECONDS, _TAIL_BYTES)  # others' frames
        self._repeats: set[asyncio.Task[None]] = set()
        self._repeating: set[str] = set()  # replies that are being published again
        self._clock = Clock()
        self._following: asyncio.Task[None] | None = None

    async def open(self) -> None:
        try:
            await self._open()
        except errors.Unavailable as exc:
            await self.close()  # it may be connected, and without its streams it is of no use
            url = _without_credentials(self._config.url)
            raise errors.Unavailable(f"no broker at {url}: {exc.message}") from exc
        except asyncio.CancelledError:
            await self.close()  # else nats-py would try to reconnect for ever, whoever cancels it
            raise

    async def _open(self) -> None:
        with _translated:
            # `connect` with endless reconnects would also try for ever at first.
            await asyncio.wait_for(
                self._nc.connect(
                    servers=self._config.url.split(","),
                    name=self._name,
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=0.1,  # type: ignore[arg-type]  # it is slept: a float will do
                    connect_timeout=2,
                    ping_interval=5,
                    max_outstanding_pings=2,
                    pending_size=16 * 2**20,
                    error_cb=self._on_error,
                    disconnected_cb=self._on_disconnected,
                    reconnected_cb=self._on_reconnected,
                    # Subjects are built by `subjects`, which makes legal tokens only.
                    skip_subject_validation=True,
                ),
                max(self._config.timeout, 2.0),
            )
            inbox = self._nc.new_inbox()
            self._ack_inbox = inbox + "."
            await self.subscribe(inbox + ".*", self._on_ack)
            await self.subscribe(subjects.ALL_AGAIN, self._on_again)
            await self.subscribe(subjects.JOURNAL_ELECTED, self._on_journal_elected)
            if self._make_streams:
                patient = self._nc.jetstream(timeout=max(self._config.timeout, _MAKING))
                await topology.ensure(patient, self._config)
        await self._learn_clock()
        self._keep_clock(_CLOCK_EVERY if self._clock.known else _CLOCK_AGAIN)

    async def _learn_clock(self) -> None:
        """Without its streams the broker can't tell the time: who doesn't make them does without it."""
        end = time.monotonic() + max(self._config.timeout, _MAKING)
        while not await self._read_clock() and self._make_streams:
            if time.monotonic() > end:
                raise errors.Unavailable("it does not tell the time")
            await asyncio.sleep(_CLOCK_AGAIN)

    def _keep_clock(self, after: float) -> None:
        """Follow it, from so many seconds on."""
        if self._following is not None:
            self._following.cancel()
        self._following = asyncio.create_task(self._follow_clock(after))

    async def _follow_clock(self, after: float) -> None:
        while True:
            await asyncio.sleep(after)
            after = _CLOCK_EVERY if await self._read_clock() else _CLOCK_AGAIN

    async def _read_clock(self) -> bool:
        """Whether the broker told the time: each answer of JetStream's that describes a stream does."""
        if not self._nc.is_connected:
            return False  # the question would wait, with those before it
        asked = time.monotonic()
        try:
            answer = await self._api(f"STREAM.INFO.{subjects.REQUESTS}", {})
            at = datetime.fromisoformat(answer["ts"])
        except (errors.Unavailable, KeyError, TypeError, ValueError):
            return False
        self._clock.told(asked, at.timestamp() * 1000, time.monotonic())
        return True

    def now_ms(self) -> float:
        return self._clock.at_ms(time.monotonic()) if self._clock.known else time.time() * 1000

    @property
    def connected(self) -> bool:
        return self._nc.is_connected

    @property
    def max_payload(self) -> int:
        return self._nc.max_payload

    @property
    def _at_once(self) -> int:
        return max(_AT_ONCE, self._nc.max_payload + 2**20)  # less than a message would be sent nothing

    @property
    def ack_wait(self) -> float:
        return self._config.ack_wait

    # Core messages

    async def publish(
        self, subject: str, data: bytes = b"", headers: dict[str, str] | None = None, reply: str = ""
    ) -> None:
        # nats-py leaves headers out of its check, and the server cuts a connection that sends too much.
        if headers and len(data) + _header_size(headers) > self._nc.max_payload:
            raise errors.TooLarge("the message is larger than the broker takes")
        with _translated:
            await self._nc.publish(subject, data, reply, headers)
        if subject.startswith("out."):
            self._tail.add(subject, data, asyncio.get_running_loop().time())

    def heard(self, subject: str, data: bytes) -> None:
        self._heard.add(subject, data, asyncio.get_running_loop().time())

    def _on_again(self, message: base.Message) -> None:
        """Somebody misses frames that the journal has not."""
        key = message.subject.partition(".")[2]
        if (self._tail.of(key) or self._heard.of(key)) and key not in self._repeating:
            self._repeat([key], self._tail, self._heard, answer=message.reply)

    def _on_journal_elected(self, _: base.Message) -> None:
        """What was published since the journal's last leader went is in no journal: ours, and what we heard
        of workers that may have gone since."""
        self.disturbed = now = asyncio.get_running_loop().time()
        keys = dict.fromkeys([*self._tail.keys(now), *self._heard.keys(now)])
        self._repeat(list(keys), self._tail, self._heard)

    def _repeat(self, keys: list[str], *tails: tail.Tail, answer: str = "") -> None:
        self._repeating.update(keys)
        task = asyncio.create_task(self._publish_again(keys, tails, answer))
        self._repeats.add(task)
        task.add_done_callback(self._repeats.discard)

    async def _publish_again(self, keys: list[str], tails: tuple[tail.Tail, ...], answer: str) -> None:
        """One reply after the other, each without a pause: its newest frame has to be the journal's too."""
        try:
            for key in keys:
                for subject, data in [frame for tail in tails for frame in tail.of(key)]:
                    await self._nc.publish(subject, data)
                await asyncio.sleep(0)
                self._repeating.discard(key)
            if answer:
                await self._nc.publish(answer, b"")  # behind the frames, on the same connection
        except nats.errors.Error as exc:
            _log.warning("frames were not published again: %s", _reason(exc))
        finally:
            self._repeating.difference_update(keys)

    async def sync(self) -> None:
        with _translated:
            await self._nc.flush(max(1, round(self._config.timeout)))

    async def subscribe(self, subject: str, handler: Callable[[base.Message], None]) -> _Subscription:
        async def on_message(msg: Msg) -> None:
            handler(base.Message(msg.subject, msg.data, msg.headers, msg.reply))

        with _translated:
            inner = await self._nc.subscribe(subject, cb=on_message)
        self._nc.handlers[inner._id] = handler
        return _Subscription(inner, lambda: self._nc.handlers.pop(inner._id, None))

    async def ask(self, subject: str, data: bytes = b"", timeout: float = 2.0) -> bytes:
        with _translated:
            return (await self._nc.request(subject, data, timeout)).data

    async def listens(self, subject: str) -> bool:
        try:
            with _translated:
                await self._nc.request(subject, timeout=_NO_ANSWER)
        except errors.Unavailable as exc:
            if isinstance(exc.__cause__, nats.errors.NoRespondersError):
                return False
            if not self._nc.is_connected:
                raise
        return True

    # The durable queue

    @property
    def inbox(self) -> str:
        return self._inbox

    async def enqueue(
        self, subject: str, data: bytes, headers: dict[str, str] | None = None
    ) -> asyncio.Future[base.Stored]:
        if not self._nc.is_connected:
            # nats-py would buffer it and send it after the caller has been told 503.
            raise errors.Unavailable("the broker can't be reached")
        number = str(next(self._ack_numbers))
        future: asyncio.Future[base.Stored] = asyncio.get_running_loop().create_future()
        self._acks[number] = future
        late = asyncio.get_running_loop().call_later(2 * self._config.timeout, self._unconfirmed, future)

        def answered(ack: asyncio.Future[base.Stored]) -> None:
            late.cancel()
            self._acks.pop(number, None)
            _ = ack.cancelled() or ack.exception()  # else asyncio logs it where nobody waits any more

        future.add_done_callback(answered)
        try:
            await self.publish(subject, data, headers, self._ack_inbox + number)
        except errors.HeadraceError:
            future.cancel()
            raise
        return future

    def _unconfirmed(self, future: asyncio.Future[base.Stored]) -> None:
        if not future.done():
            future.set_exception(errors.Unconfirmed("the broker did not say whether it accepted"))

    def _on_ack(self, msg: base.Message) -> None:
        future = self._acks.get(msg.subject[len(self._ack_inbox) :])
        if future is None or future.done():
            return
        if msg.headers and msg.headers.get("Status") == "503":
            future.set_exception(errors.Unavailable("no stream takes the request: JetStream is not ready"))
            return
        answer = orjson.loads(msg.data)
        fault = answer.get("error")
        if fault is None:
            future.set_result(base.Stored(answer["seq"], answer.get("duplicate", False)))
        elif fault.get("err_code") == _IN_PROCESS:
            future.set_exception(errors.Unconfirmed("the broker is storing a request of this id"))
        elif fault.get("err_code") == _STORE_FAILED and fault["description"].startswith("maximum"):
            future.set_exception(errors.Overloaded("the queue is full: try again later", retry_after=1.0))
        elif fault.get("err_code") in _NO_ROOM:
            future.set_exception(errors.Unavailable(f"the broker's storage is full: {fault['description']}"))
        else:
            future.set_exception(errors.Unavailable(f"the broker refused it: {fault['description']}"))

    async def pull(
        self,
        base_model: str,
        service_class: ServiceClass,
        handler: Callable[[base.Delivery], None],
        lapsed: Callable[[], None],
    ) -> base.Puller:
        config = topology.consumer(base_model, service_class, self._config)
        ensure = functools.partial(self._js.add_consumer, subjects.REQUESTS, config)
        inbox = f"{self._inbox}.{next(self._inboxes)}"
        name = f"{subjects.REQUESTS}.{config.durable_name}"
        await self._insist(ensure)
        with _translated:
            puller = _Puller(self, inbox, name, handler, lapsed, ensure)
            puller.subscription = await self.subscribe(inbox, puller.on_message)
        self._pullers.add(puller)
        return puller

    async def hand_on(self, receipt: str) -> None:
        await self._say_of(receipt, b"-NAK")

    async def prolong(self, receipt: str) -> None:
        await self._say_of(receipt, b"+WPI")

    async def _say_of(self, receipt: str, verdict: bytes) -> None:
        # It came from a third party: nothing but an ack subject may be published to for it.
        if not receipt.startswith(_RECEIPT) or set(receipt) & _NOT_LITERAL:
            raise errors.MalformedMessage(f"{receipt!r:.200} names no delivery")
        if not self._nc.is_connected:
            # nats-py would buffer it, and by the time it is sent the message may run elsewhere.
            raise errors.Unavailable("the broker can't be reached")
        await self.publish(receipt, verdict)

    def delivery(self, message: base.Message) -> _Delivery:
        if not message.reply.startswith(_RECEIPT) or set(message.reply) & _NOT_LITERAL:
            raise errors.MalformedMessage(f"{message.reply!r:.200} names no delivery")
        try:
            return _Delivery(self, message)
        except (ValueError, IndexError):
            raise errors.MalformedMessage(f"{message.reply!r:.200} names no delivery") from None

    async def hand_back(self, delivery: base.Delivery, delay: float) -> None:
        # As JetStream reads it, in nanoseconds.
        await self.publish(delivery.receipt, b'-NAK {"delay": %d}' % (delay * 1e9))

    async def delivered(self, base_model: str, service_class: ServiceClass) -> dict[int, str]:
        consumer = subjects.consumer(base_model, service_class)
        info = await self._api(f"CONSUMER.INFO.{subjects.REQUESTS}.{consumer}", {}, may_fail=(_NO_CONSUMER,))
        newest = info.get("delivered", {"stream_seq": 0})
        found: dict[int, str] = {}
        start, wanted = 1, subjects.request_filter(base_model, service_class)
        while start <= newest["stream_seq"]:
            page = await self.read(subjects.REQUESTS, wanted, start, _READ_BATCH)
            seqs = [record.seq for record in page if record.seq <= newest["stream_seq"]]
            for seq in seqs:
                # Of a receipt the server reads the message's sequence and a delivery's within the known ones.
                place = f"1.{seq}.{newest['consumer_seq']}.0.0"
                found[seq] = f"{_RECEIPT}{subjects.REQUESTS}.{consumer}.{place}"
            if len(seqs) < _READ_BATCH:
                break
            start = seqs[-1] + 1
        return found

    async def bounce(self, inbox: str) -> _Subscription:
        if not inbox.startswith("_INBOX.") or set(inbox) & _NOT_LITERAL:
            raise errors.MalformedMessage(f"{inbox!r:.200} is no inbox")
        return await self.subscribe(f"{inbox}.*", self._hand_back)

    def _hand_back(self, msg: base.Message) -> None:
        if msg.reply.startswith(_RECEIPT):
            nak = asyncio.create_task(_Delivery(self, msg).nak())
            self._naks.add(nak)
            nak.add_done_callback(self._naks.discard)

    async def _insist(self, act: Callable[[], Awaitable[Any]]) -> None:
        """A cluster leaves one of several who make the same consumer at once without an answer, and all of
        them while the queue has no leader."""

        def enough(state: RetryCallState) -> bool:
            exc = state.outcome.exception() if state.outcome else None
            silent = self._nc.is_connected and isinstance(exc and exc.__cause__, TimeoutError)
            elects = silent and (state.seconds_since_start or 0.0) < _ELECTION
            return state.attempt_number >= _TRIES and not elects

        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(errors.Unavailable), stop=enough, reraise=True
        ):
            with attempt, _translated:
                await act()

    async def delete(self, stream: str, seq: int) -> bool:
        # no_erase: the bytes need no overwriting, and the caller waits for this.
        answer = await self._api(
            f"STREAM.MSG.DELETE.{stream}", {"seq": seq, "no_erase": True}, may_fail=_NOT_THERE
        )
        return bool(answer.get("success"))

    async def purge(self, stream: str, subject: str) -> None:
        await self._api(f"STREAM.PURGE.{stream}", {"filter": subject})

    # Reading streams

    async def read(self, stream: str, subject: str, start: int = 1, limit: int = 1000) -> list[base.Record]:
        records: list[base.Record] = []
        while len(records) < limit:
            page = {
                "seq": start,
                "next_by_subj": subject,
                "batch": min(_READ_BATCH, limit - len(records)),
                "max_bytes": self._at_once,
            }
            pending = 0
            async for msg in self._direct(stream, page):
                records.append(_record(msg))
                pending = int((msg.headers or {}).get("Nats-Num-Pending", "0"))
            if not pending:
                break
            start = records[-1].seq + 1
        return records

    async def _direct(self, stream: str, page: dict[str, Any]) -> AsyncIterator[Msg]:
        """Messages of one batched direct get; its end is a 204 (or 404 when there is nothing)."""
        inbox = self._nc.new_inbox()
        with _translated:
            subscription = await self._nc.subscribe(inbox)
            try:
                await self._nc.publish(f"$JS.API.DIRECT.GET.{stream}", orjson.dumps(page), reply=inbox)
                while True:
                    msg = await subscription.next_msg(timeout=self._config.timeout)
                    if _is_stored(msg):
                        yield msg
                        continue
                    status = (msg.headers or {}).get("Status", "")
                    if status in ("204", "404"):
                        return
                    text = (msg.headers or {}).get("Description", "")
                    if status == "503":  # its text holds the subject asked, on a line of its own
                        text = "there is no such stream, or JetStream is not ready"
                    raise errors.Unavailable(f"stream {stream} can't be read: {status} {text}")
            finally:
                await subscription.unsubscribe()

    async def last(self, stream: str, subject: str, *, leader: bool = False) -> base.Record | None:
        if leader:
            return await self._get(stream, None, subject)
        with _translated:
            msg = await self._nc.request(
                f"$JS.API.DIRECT.GET.{stream}",
                orjson.dumps({"last_by_subj": subject}),
                self._config.timeout,
            )
        return _record(msg) if _is_stored(msg) else None

    async def record(self, stream: str, seq: int) -> base.Record | None:
        return await self._get(stream, seq, None)

    async def _get(self, stream: str, seq: int | None, subject: str | None) -> base.Record | None:
        """From the leader: direct gets are answered by any replica."""
        with _translated:
            try:
                msg = await self._js.get_msg(stream, seq, subject)
            except nats.js.errors.NotFoundError as exc:
                if exc.err_code != _NO_MESSAGE:
                    raise
                return None
        assert msg.seq is not None
        assert msg.subject is not None
        assert msg.time is not None
        return base.Record(msg.seq, msg.subject, msg.data or b"", msg.headers, msg.time.timestamp() * 1000)

    async def counts(self, stream: str, subject: str) -> dict[str, int]:
        found: dict[str, int] = {}
        while True:
            asked = {"subjects_filter": subject, "offset": len(found)}
            answer = await self._api(f"STREAM.INFO.{stream}", asked)
            page: dict[str, int] = answer.get("state", {}).get("subjects") or {}
            found.update(page)
            if not page or len(found) >= answer.get("total", 0):
                return found

    async def _api(self, call: str, body: dict[str, Any], may_fail: tuple[int, ...] = ()) -> dict[str, Any]:
        return await self._request(f"$JS.API.{call}", orjson.dumps(body), None, may_fail)

    async def _request(
        self, subject: str, data: bytes, headers: dict[str, str] | None, may_fail: tuple[int, ...]
    ) -> dict[str, Any]:
        """JetStream's answer. A fault other than those of `may_fail` raises errors.Unavailable."""
        with _translated:
            msg = await self._nc.request(subject, data, self._config.timeout, headers=headers)
        answer: dict[str, Any] = orjson.loads(msg.data)
        fault = answer.get("error")
        if fault is not None and (
            fault.get("err_code") not in may_fail or _DISK_FULL in fault["description"]
        ):
            raise errors.Unavailable(f"the broker refused {subject}: {fault.get('description')}")
        return answer

    # Key-value buckets

    async def put(self, bucket: str, key: str, value: bytes) -> None:
        with _translated:
            await self._js.publish(f"$KV.{bucket}.{_kv_key(key)}", value)

    async def get(self, bucket: str, key: str) -> base.Value:
        found = await self._get(f"KV_{bucket}", None, f"$KV.{bucket}.{_kv_key(key)}")
        if found is None:
            return base.Value(None, 0)
        removed = "KV-Operation" in (found.headers or {})
        return base.Value(None if removed else found.data, found.seq)

    async def swap(self, bucket: str, key: str, value: bytes, expected: int) -> int | None:
        if not self._nc.is_connected:
            # Buffered, it would be set behind the back of a caller who was told that it failed.
            raise errors.Unavailable("the broker can't be reached")
        head = {"Nats-Expected-Last-Subject-Sequence": str(expected)}
        answer = await self._request(f"$KV.{bucket}.{_kv_key(key)}", value, head, (_WRONG_LAST_SEQUENCE,))
        return None if "error" in answer else answer["seq"]

    async def remove(self, bucket: str, key: str) -> None:
        with _translated:
            await self._js.publish(f"$KV.{bucket}.{_kv_key(key)}", headers={"KV-Operation": "DEL"})

    async def watch(self, bucket: str, handler: Callable[[str, bytes | None], None]) -> base.Subscription:
        watch = _Watch(self, bucket, handler)
        # Live changes first, then all there is: a change in between comes twice, never not at all.
        watch.subscription = await self.subscribe(f"$KV.{bucket}.>", watch.on_message)
        self._watches.add(watch)
        await watch.replay()
        return watch

    # Connection

    async def close(self) -> None:
        self._closing = True
        for task in (self._reconnecting, self._following):
            if task is not None:
                task.cancel()
        for watch in list(self._watches):
            watch.stop()
        if self._nc.is_connected:
            await self._leave_frames()
            try:
                await self._nc.flush(timeout=1)
            except (nats.errors.Error, TimeoutError) as exc:
                _log.warning("the last messages may not have left: %s", exc)
        for future in list(self._acks.values()):
            future.cancel()
        if not (self._nc.is_connected or self._nc.is_closed):
            # nats-py would write its buffer to the transport that is gone, and stop half closed.
            self._nc._pending.clear()
            self._nc._pending_data_size = 0
        if not self._nc.is_closed:
            await self._nc.close()

    async def _leave_frames(self) -> None:
        """See the journal have what was said lately, which is known to nobody once this process has gone."""
        loop = asyncio.get_running_loop()
        keys, end, without = self._tail.keys(loop.time()), loop.time() + _ELECTION, False
        while keys and self._nc.is_connected and loop.time() < end:
            try:
                await self.last(subjects.REPLIES, "out.nobody", leader=True)
                break
            except errors.Unavailable:
                without = True  # what it was not there for, its successor is told
        if without:
            await self._publish_again(keys, (self._tail,), "")

    async def _on_error(self, exc: Exception) -> None:
        kind = type(exc).__name__
        if not self._nc.is_connected:
            if kind in self._outage:
                return  # ten attempts a second to reconnect fail alike
            self._outage.add(kind)
        _log.warning("nats: %s", _reason(exc), extra={"error": kind})

    async def _on_disconnected(self) -> None:
        if self._closing:
            return
        _log.warning("the broker connection is lost; reconnecting")
        for future in list(self._acks.values()):
            self._unconfirmed(future)

    async def _on_reconnected(self) -> None:
        if self._closing:
            return
        _log.info("the broker is back")
        self._outage.clear()
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        self._reconnecting = asyncio.create_task(self._restore())
        self._keep_clock(0.0)  # another node's may be another
        self.reconnected()
        # What was on its way when the connection broke may have arrived or not.
        self._repeat(self._tail.keys(asyncio.get_running_loop().time()), self._tail)

    async def _restore(self) -> None:
        """What a restarted server forgot: streams, consumers, standing pulls; what we missed: changes.

        Tried until it is done: a server answers pings before its JetStream is ready.
        """
        again = AsyncRetrying(
            retry=retry_if_exception_type(Exception),
            wait=wait_exponential(multiplier=0.1, max=2.0),
            before_sleep=before_sleep_log(_log, logging.WARNING),
        )
        async for attempt in again:
            with attempt, _translated:
                if self._make_streams:
                    await topology.ensure(self._js, self._config)
                for puller in list(self._pullers):
                    await puller.restore()
                for watch in list(self._watches):
                    await watch.replay()


def _header_size(headers: Mapping[str, str]) -> int:
    """Bytes of `NATS/1.0`, one `key: value` line each, and the empty line."""
    return 12 + sum(len(key.encode()) + len(value.encode()) + 4 for key, value in headers.items())


def _kv_key(token: str) -> str:
    """KV keys may hold no '%'; tokens hold no '='."""
    return token.replace("%", "=")


def _is_stored(msg: Msg) -> bool:
    """A stored message, not a status of the server's: whoever published it may have set a `Status` too."""
    return "Nats-Sequence" in (msg.headers or {})


def _record(msg: Msg) -> base.Record:
    head = msg.headers or {}
    stored_ms = datetime.fromisoformat(head["Nats-Time-Stamp"]).timestamp() * 1000
    return base.Record(int(head["Nats-Sequence"]), head["Nats-Subject"], msg.data, head, stored_ms)


class _Subscription:
    def __init__(self, inner: Any, closed: Callable[[], object]) -> None:
        self._inner = inner
        self._closed = closed

    async def close(self) -> None:
        self._closed()
        await self.stop()

    async def stop(self) -> None:
        """Have the server send no more; what is on its way still reaches the handler."""
        try:
            await self._inner.unsubscribe()
        except (nats.errors.BadSubscriptionError, nats.errors.ConnectionClosedError):
            return  # closed before, or together with its connection


class _Watch:
    """One KV watch: live changes by core subscription, the state by reading the stream.

    A change that the server has taken and not stored when it is subscribed and read is in neither, since a
    stream stores behind the subscribers' backs: so it is read once more a moment later.
    """

    def __init__(self, broker: NatsBroker, bucket: str, handler: Callable[[str, bytes | None], None]) -> None:
        self._broker = broker
        self._bucket = bucket
        self._prefix = len(f"$KV.{bucket}.")
        self._handler = handler
        self._heard: set[str] = set()  # subjects that changed since we listen: the state read may be older
        self._again: asyncio.Task[None] | None = None
        self.subscription: base.Subscription | None = None

    def on_message(self, msg: base.Message) -> None:
        self._heard.add(msg.subject)
        self._tell(msg)

    def _tell(self, msg: base.Message | base.Record) -> None:
        key = msg.subject[self._prefix :].replace("=", "%")
        removed = (msg.headers or {}).get("KV-Operation") in ("DEL", "PURGE")
        self._handler(key, None if removed else msg.data)

    async def replay(self) -> None:
        """All there is; and once more, soon."""
        self.stop()
        self._heard.clear()  # what changed while we were cut off was heard by nobody
        await self._read()
        self._again = asyncio.create_task(self._read_again())

    async def _read(self) -> None:
        records = await self._broker.read(f"KV_{self._bucket}", f"$KV.{self._bucket}.>", limit=100_000)
        for record in records:
            if record.subject not in self._heard:
                self._tell(record)

    async def _read_again(self) -> None:
        await asyncio.sleep(_STORED_BY)
        with contextlib.suppress(errors.Unavailable):  # a reconnect reads it all again
            await self._read()

    def stop(self) -> None:
        if self._again is not None:
            self._again.cancel()

    async def close(self) -> None:
        self.stop()
        self._broker._watches.discard(self)
        if self.subscription is not None:
            await self.subscription.close()


class _Puller:
    """Standing pulls of one worker on one queue. All state belongs to the event loop's callbacks."""

    def __init__(
        self,
        broker: NatsBroker,
        inbox: str,
        consumer: str,
        handler: Callable[[base.Delivery], None],
        lapsed: Callable[[], None],
        ensure: Callable[[], Awaitable[Any]],
    ) -> None:
        self._broker = broker
        self._inbox = inbox
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{consumer}"
        self._handler = handler
        self._lapsed = lapsed
        self._ensure = ensure
        self._closed = False
        self.subscription: _Subscription | None = None
        self._recovering: asyncio.Task[None] | None = None
        self._asked: deque[tuple[float, int]] = deque()  # when each pull is over, and what is left of it

    @property
    def outstanding(self) -> int:
        """One whose bytes are used up to the last the server ends without a word: it is over in its time."""
        now = time.monotonic()
        while self._asked and self._asked[0][0] <= now:
            self._asked.popleft()
        return sum(left for _, left in self._asked)

    async def ask(self, n: int) -> None:
        if self._closed or n <= 0:
            return
        if not self._broker.connected:
            # nats-py would buffer it, and `restore` makes the owner ask anew.
            raise errors.Unavailable("the broker can't be reached")
        asked = time.monotonic() + _PULL_EXPIRES + _PULL_OVER, n
        pull = {"batch": n, "expires": int(_PULL_EXPIRES * 1e9)}
        if n * self._broker.max_payload > self._broker._at_once:
            # Never twice the same, else messages of one size would use up each pull's to the last.
            pull["max_bytes"] = self._broker._at_once - random.randrange(2**16)
        self._asked.append(asked)
        try:
            await self._broker.publish(self._subject, orjson.dumps(pull), reply=self._inbox)
        except errors.HeadraceError:
            with contextlib.suppress(ValueError):
                self._asked.remove(asked)
            raise

    def on_message(self, msg: base.Message) -> None:
        if not msg.reply.startswith(_RECEIPT):
            self._on_status(msg.headers or {})
            return
        self._take_off(1)
        if self._closed:
            self._broker._hand_back(msg)
        else:
            self._handler(_Delivery(self._broker, msg))

    def _on_status(self, head: Mapping[str, str]) -> None:
        """408 = expired, and 409 as its bytes are used up: asks come back. Anything else (409 = the consumer
        moved or went, 503 = nobody answers) would come again at once: the consumer is looked after first."""
        status = head.get("Status", "")
        if status == "100":
            return
        given_up = head.get("Nats-Pending-Messages", "")
        if given_up.isdecimal():
            self._take_off(int(given_up))
        else:
            self._asked.clear()
        if self._closed:
            return
        if status == "408" or head.get("Description", "").lower() in _BYTES_ARE_USED_UP:
            self._lapsed()
        elif self._recovering is None or self._recovering.done():
            _log.warning("a pull ended: %s", head.get("Description") or status)
            self._recovering = asyncio.create_task(self._recover())

    def _take_off(self, n: int) -> None:
        """From the pulls that stand, the oldest first: in that order the server serves them."""
        while n and self._asked:
            over, left = self._asked.popleft()
            if left > n:
                self._asked.appendleft((over, left - n))
            n = max(0, n - left)

    async def _recover(self) -> None:
        # Without a connection there is nothing to try: after a reconnect the broker restores every pull.
        while self._broker.connected and not self._closed:
            await asyncio.sleep(_RECOVER_AFTER)
            try:
                await self.restore()
            except errors.Unavailable as exc:
                _log.warning("the queue can't be pulled from: %s", exc.message)
            else:
                return

    async def restore(self) -> None:
        """After a reconnect the server knows our pulls no more, and perhaps not the consumer."""
        self._asked.clear()
        with _translated:
            await self._ensure()
        self._lapsed()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._broker._pullers.discard(self)
        if self._recovering is not None:
            self._recovering.cancel()
        if self.subscription is not None:
            # The server drops pulls that nobody listens to. What it has sent already is still heard,
            # and handed back at once instead of lying out its ack wait.
            await self.subscription.stop()


class _Delivery:
    """A message with JetStream's `$JS.ACK...` reply subject; its tokens are the metadata."""

    __slots__ = (
        "_broker",
        "attempt",
        "data",
        "enqueued_ms",
        "headers",
        "pending",
        "receipt",
        "seq",
        "subject",
    )

    def __init__(self, broker: NatsBroker, msg: base.Message) -> None:
        self._broker = broker
        self.receipt = msg.reply
        # $JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<delivered>.<seq>.<cseq>.<ns>.<pending>[.<token>]
        tokens = msg.reply.split(".")
        at = 4 if len(tokens) == 9 else 6
        self.subject = msg.subject
        self.headers = msg.headers
        self.data = msg.data
        self.attempt = int(tokens[at])
        self.seq = int(tokens[at + 1])
        self.enqueued_ms = int(tokens[at + 3]) / 1e6
        self.pending = int(tokens[at + 4])

    async def ack(self) -> None:
        await self._broker.publish(self.receipt, b"+ACK")

    async def nak(self) -> None:
        await self._broker.publish(self.receipt, b"-NAK")

    async def in_progress(self) -> None:
        await self._broker.publish(self.receipt, b"+WPI")
