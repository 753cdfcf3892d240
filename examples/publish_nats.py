"""Stream a chat from Headrace over NATS, with nothing but nats-py (`pip install nats-py`).

    python examples/publish_nats.py "Why is the sky blue?" --model SmolLM2-135M-Instruct
    python examples/publish_nats.py "Tell me a long story." --model SmolLM2-135M-Instruct --cancel-after 20

docs/nats.md explains the subjects, headers and frames; docs/asyncapi.yaml defines them.
"""

import argparse
import asyncio
import json
import re
import sys
import time
import uuid

import nats
import nats.errors


def token(name: str) -> str:
    """A name as one NATS subject token: percent-encoded outside [A-Za-z0-9_-]."""
    return re.sub(rb"[^A-Za-z0-9_-]", lambda byte: b"%%%02X" % byte[0][0], name.encode()).decode()


class Frames:
    """Puts reply frames in order, each once: by delivery attempt (`epoch`), then number (`seq`).

    A new attempt starts again at seq 0; what it repeats, by output-token offset (`off`), is dropped. Simpler
    than docs/nats.md: a frame that was missed is not read back from REPLIES, but waited for.
    """

    def __init__(self):
        self.epoch = self.next_seq = self.tokens = 0
        self.headed = False
        self.held = {}

    def add(self, data: bytes) -> list[tuple[dict, bytes]]:
        """(meta, payload) of every frame whose turn has come."""
        line, _, payload = data.partition(b"\n")
        meta = json.loads(line)
        self.held[meta["epoch"], meta["seq"]] = meta, payload
        newest = max((epoch for epoch, seq in self.held if seq == 0), default=0)
        if newest > self.epoch:
            self.epoch, self.next_seq = newest, 0
        ready = []
        while frame := self.held.pop((self.epoch, self.next_seq), None):
            self.next_seq += 1
            if self.is_new(frame[0]):
                ready.append(frame)
        return ready

    def is_new(self, meta: dict) -> bool:
        if meta["kind"] == "head":
            repeated, self.headed = self.headed, True
        else:
            repeated = meta["kind"] == "data" and meta["off"] < self.tokens
            if meta["kind"] == "data" and meta["off"] > self.tokens:
                raise SystemExit(
                    f"\nthe answer goes on at token {meta['off']}, but {self.tokens} came: ask again"
                )
        if not repeated:
            self.tokens = meta["off"] + len(meta.get("ids", []))
        return not repeated


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

        frames, text, status, printed = Frames(), Text(), 0, 0
        while True:
            message = await replies.next_msg(timeout=args.timeout)
            for meta, payload in frames.add(message.data):
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
    except (nats.errors.Error, OSError) as fault:  # no server, no stream, a full queue
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
