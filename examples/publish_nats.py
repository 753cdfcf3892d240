"""Stream a chat from Headrace over NATS, with nothing but nats-py (`pip install nats-py`).

    python examples/publish_nats.py "Why is the sky blue?" --model SmolLM2-135M-Instruct
    python examples/publish_nats.py "Tell me a long story." --model SmolLM2-135M-Instruct --cancel-after 20

docs/nats.md explains the subjects, headers and frames; docs/asyncapi.yaml defines them.
"""

import argparse
import asyncio
import contextlib
import json
import re
import sys
import time
import uuid

import nats
import nats.errors

SILENCE = 2.0  # seconds without a frame whose turn it is, after which the journal is read


def token(name: str) -> str:
    """A name as one NATS subject token: percent-encoded outside [A-Za-z0-9_-]."""
    return re.sub(rb"[^A-Za-z0-9_-]", lambda byte: b"%%%02X" % byte[0][0], name.encode()).decode()


class Lost(Exception):
    """The answer can't be put together: a part of it is missing."""


class Frames:
    """Puts reply frames in order, each once: by delivery attempt (`epoch`), then number (`seq`).

    A new attempt starts again at seq 0; what it repeats, by output-token offset (`off`), is dropped. While it
    has said nothing but that it is there, the one before may still come to its end.
    """

    def __init__(self):
        self.epoch = self.next_seq = self.tokens = 0
        self.before = 0, 0  # the attempt before that said something, and its next number
        self.headed = self.spoke = False
        self.held = {}

    def add(self, data: bytes) -> list[tuple[dict, bytes]]:
        """(meta, payload) of every frame whose turn has come. Raises Lost when the answer has a hole."""
        line, _, payload = data.partition(b"\n")
        meta = json.loads(line)
        self.held[meta["epoch"], meta["seq"]] = meta, payload
        if meta["seq"] == 0 and meta["epoch"] > self.epoch:
            if self.spoke:
                self.before = self.epoch, self.next_seq
            self.epoch, self.next_seq, self.spoke = meta["epoch"], 0, False
        ready = self.following(self.epoch, self.next_seq)
        self.next_seq += len(ready)
        self.spoke = self.spoke or any(meta["kind"] != "beat" for meta, _ in ready)
        late = [] if self.spoke else self.following(*self.before)
        if late and late[-1][0]["kind"] == "end":
            ready += late
        return [frame for frame in ready if self.is_new(frame[0])]

    def following(self, epoch: int, seq: int) -> list[tuple[dict, bytes]]:
        """The frames of an attempt from number `seq` on, as far as they are here without a hole."""
        found = []
        while frame := self.held.get((epoch, seq + len(found))):
            found.append(frame)
        return found

    @property
    def gap(self) -> bool:
        """Whether there are frames here behind one that is not."""
        return max(self.held, default=(0, 0)) > (self.epoch, self.next_seq)

    def is_new(self, meta: dict) -> bool:
        if meta["kind"] not in ("head", "data"):
            return True
        off, ids = meta["off"], meta.get("ids", [])
        if off > self.tokens or (meta["kind"] == "head" and self.tokens):
            raise Lost(f"the answer goes on at token {off}, after {self.tokens} of them")
        repeated = off < self.tokens or (meta["kind"] == "head" and self.headed)
        self.headed = True
        self.tokens = max(self.tokens, off + len(ids))
        return not repeated


async def received(connection, subscription, frames: Frames, timeout: float):
    """(meta, payload) of each frame in its turn. When nothing more has come for a while, what did not come is
    looked for. Raises Lost when it is nowhere, nats.errors.TimeoutError after `timeout` seconds."""
    end, heard, looked = time.monotonic() + timeout, time.monotonic(), None
    while True:
        try:
            wait = max(0.01, heard + SILENCE - time.monotonic())
            came = [(await subscription.next_msg(timeout=wait)).data]
        except nats.errors.TimeoutError:
            heard = time.monotonic()
            if heard > end:
                raise
            place = frames.epoch, frames.next_seq
            if frames.gap and looked == place:
                raise Lost("a part of the answer is lost") from None
            looked = place
            came = await journal(connection.jetstream(), subscription.subject)
            _, tenant, _, request = subscription.subject.split(".")
            await connection.publish(f"again.{tenant}.{request}", b"{}")  # for what is not there either
        for data in came:
            for frame in frames.add(data):
                heard = time.monotonic()
                yield frame


async def journal(jetstream, subject: str) -> list[bytes]:
    """The frames that the stream REPLIES keeps under `subject`."""
    found, seq = [], 1
    with contextlib.suppress(nats.errors.Error):  # there are no more, or nobody answers now
        while True:
            kept = await jetstream.get_msg("REPLIES", seq, subject=subject, direct=True, next=True)
            found.append(kept.data)
            seq = kept.seq + 1
    return found


class Text:
    """Finds the text in the bytes of an SSE stream, however they were cut into frames."""

    def __init__(self):
        self.rest = b""

    def feed(self, payload: bytes) -> list[str]:
        *events, self.rest = (self.rest + payload).split(b"\n\n")
        pieces = []
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                for choice in json.loads(event[6:])["choices"]:
                    pieces.append(choice["delta"].get("content") or "")
        return [piece for piece in pieces if piece]


async def chat(args: argparse.Namespace) -> int:
    """Print the answer as it comes; the exit status."""
    request = uuid.uuid4().hex
    tenant = token(args.tenant)
    reply_to = f"out.{tenant}.{uuid.uuid4().hex}.{request}"
    subject = f"req.{token(args.base or args.model)}.{args.service_class}.{tenant}.{token(args.model)}"
    body = {
        "model": args.model,
        "messages": [{"role": "user", "content": args.prompt}],
        "max_tokens": args.max_tokens,
        "stream": True,
    }
    headers = {
        "Nats-Msg-Id": f"{tenant}:{request}",  # publishing this again stores and runs nothing twice
        "Reply-To": reply_to,
        "Path": "/v1/chat/completions",
        "Deadline": str(int((time.time() + args.timeout) * 1000)),
    }

    connection = await nats.connect(args.nats, max_reconnect_attempts=3, reconnect_time_wait=0.5)
    try:
        replies = await connection.subscribe(reply_to)  # first listen, then ask
        stored = await connection.jetstream().publish(subject, json.dumps(body).encode(), headers=headers)
        print(f"stored in {stored.stream} as message {stored.seq}", file=sys.stderr)

        text, status, printed = Text(), 0, 0
        async for meta, payload in received(connection, replies, Frames(), args.timeout):
            if meta["kind"] in ("beat", "head"):
                print(f"worker {meta['worker']}", file=sys.stderr)
            if meta["kind"] == "error":
                fault = json.loads(payload)["error"]
                print(f"\n{meta['status']} {meta['code']}: {fault['message']}", file=sys.stderr)
                return 0 if meta["code"] == "cancelled" and args.cancel_after else 1
            if meta["kind"] == "end":
                print(f"\n{json.dumps(meta['usage'])}", file=sys.stderr)
                return 0 if status == 200 else 1
            status = meta.get("status", status)
            if status != 200:  # the engine refused the request: this is its error object
                print(payload.decode(), file=sys.stderr)
                continue
            for piece in text.feed(payload):
                print(piece, end="", flush=True)
                printed += 1
                if printed == args.cancel_after:
                    cancel = {"at": int(time.time() * 1000), "seq": stored.seq}
                    await connection.publish(f"cancel.{tenant}.{request}", json.dumps(cancel).encode())
    finally:
        await connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt")
    parser.add_argument("--nats", default="nats://127.0.0.1:4222", help="URL of the NATS server")
    parser.add_argument("--model", required=True, help="base model or adapter")
    parser.add_argument("--base", help="base model of an adapter; the model itself when absent")
    parser.add_argument("--tenant", default="anonymous")
    parser.add_argument(
        "--class", dest="service_class", default="interactive", choices=["interactive", "standard", "batch"]
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=120.0, help="deadline of the request, in seconds")
    parser.add_argument(
        "--cancel-after", type=int, default=0, metavar="N", help="cancel after N pieces of text"
    )
    try:
        return asyncio.run(chat(parser.parse_args()))
    except nats.errors.TimeoutError:
        print("\nno answer in time", file=sys.stderr)
    except Lost as fault:
        print(f"\n{fault}: ask again", file=sys.stderr)
    except (nats.errors.Error, OSError) as fault:  # no server, no stream, a full queue
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
