"""Every subject, stream, consumer, bucket and header name, and nothing else.

    req.<base>.<class>.<tenant>.<model>   requests, durable            (stream REQUESTS)
    out.<tenant>.<mailbox>.<request>      reply frames, journaled      (stream REPLIES)
    usage.<tenant>.<model>                one event a request          (stream USAGE)
    dead.<reason>                         requests that failed for good (stream DEAD)
    cancel.<tenant>.<request>             stop a request, queued or running (core)
    taken.<tenant>.<request>              a worker has taken a request over from another (core)
    again.<tenant>.<request>              publish a reply's latest frames once more (core)
    fleet.<worker>                        heartbeat and credit         (core)
    held.<worker>                         what it took and let go      (core)
    roster.<worker>                       it is to tell all it holds   (core)
    dispatch                              a scheduler hands requests out (core)
    run.<worker>                          a queued request, handed to it (core)
    credit.<worker>                       what it could take, on change (core)
    explain                               why a request went where it did, answered (core)
    ctl.<worker>                          a command to it, answered    (core)
    want.<base>.<model>                   a request for an adapter was queued: fetch it (core)
    pool.<host>                           what the instance pool of a host runs (core)
    $O.payloads.M.<name>, .C.<nuid>       request bodies over max_payload (object store `payloads`)
    $O.artifacts.M.<name>, .C.<nuid>      adapters' files              (object store `artifacts`)

Each `<...>` is one subject token. Names that are no legal token are percent-encoded by `token`.
"""

from __future__ import annotations

import base64
import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

REQUESTS = "REQUESTS"
REPLIES = "REPLIES"
USAGE = "USAGE"
DEAD = "DEAD"

KV_MODELS = "models"
KV_LEASES = "leases"
KV_CATALOGUE = "catalogue"
"""What operators declare of models: see `entries`. `models` is what workers were seen to serve."""
KV_PLACEMENT = "placement"
KV_ROUTES = "routes"

PAYLOADS = "payloads"
"""Object store of request bodies that no message holds. A bucket of its own, beside `artifacts`: everything
in it goes by its age, so that what a crash leaves behind needs no janitor, while artifacts stay."""

ARTIFACTS = "artifacts"
"""Object store of adapters' files. What is in it stays until its version is removed."""

JOURNAL_ELECTED = f"$JS.EVENT.ADVISORY.STREAM.LEADER_ELECTED.{REPLIES}"
"""Where a cluster says that the journal has a new leader."""

ALL_REQUESTS = "req.>"
ALL_REPLIES = "out.>"
ALL_USAGE = "usage.>"
ALL_DEAD = "dead.>"
ALL_HEARTBEATS = "fleet.*"
ALL_CANCELS = "cancel.*.*"
ALL_TAKEN = "taken.*.*"
ALL_HELD = "held.*"
ALL_POOLS = "pool.*"
ALL_WANTS = "want.*.*"
ALL_CREDITS = "credit.*"
ALL_CACHED = "cached.*"
ALL_COMMANDS = "ctl.*"
DISPATCH = "dispatch"
EXPLAIN = "explain"

LEADER = "leader"
"""Key in `KV_LEASES`: the scheduler that leads."""
SHARES = "shares"
"""And of the keys `<SHARES>-<base>`: what its tenants were served lately, for who leads next."""
ALL_AGAIN = "again.*.*"

# Header names of a request message.
MSG_ID = "Nats-Msg-Id"
REPLY_TO = "Reply-To"
PATH = "Path"
TENANT = "Tenant"
DEADLINE = "Deadline"
REQUEST_ID = "Request-Id"
TRACEPARENT = "traceparent"
RESERVED = "Nats-"
"""What the headers begin with that a server reads or writes itself."""
BODY_OBJECT = "Body-Object"
ASKED = "Asked-Model"
PREFIX = "Prefix"
BUDGET = "Budget"
OF_REQUESTS = frozenset(
    {MSG_ID, REPLY_TO, PATH, TENANT, DEADLINE, REQUEST_ID, TRACEPARENT, BODY_OBJECT, ASKED, PREFIX, BUDGET}
)

# And what it has besides on its way from the dispatcher to a worker.
SUBJECT = "Subject"
RECEIPT = "Receipt"
SENT = "Sent"
STORED = "Stored"
"""The body is to be read from the queue."""
RELAYED = frozenset({SUBJECT, RECEIPT, SENT, STORED})

MAX = 3000
"""Bytes of a subject. The server closes a connection that sends it a line of more than 4,096, and a line
holds a second subject for the answer."""

MAX_NAME = 256
"""Bytes of a model's, a tenant's or a worker's name: percent-encoded, three of them fit a subject."""

ROLLUP = "Nats-Rollup"
"""Header by which a message takes the place of those before it under its subject; the value is `sub`."""

# Unreserved characters of RFC 3986, less '.', which separates NATS tokens.
_UNSAFE = re.compile(rb"[^A-Za-z0-9_\-]")


@lru_cache(maxsize=4096)
def token(name: str) -> str:
    """`name` as one legal NATS subject token: UTF-8, percent-encoded outside `[A-Za-z0-9_-]`.

    Raises ValueError for the empty name, which has no token.
    """
    if not name:
        raise ValueError("an empty name can't be a subject token")
    raw = name.encode("utf-8", "surrogatepass")
    return _UNSAFE.sub(lambda m: b"%%%02X" % m[0][0], raw).decode("ascii")


def fits(name: str) -> bool:
    """Whether a name may be one of a subject's tokens."""
    return 0 < len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME


def name(tok: str) -> str:
    """The exact inverse of `token`."""
    return unquote_to_bytes(tok).decode("utf-8", "surrogatepass")


class RequestSubject(NamedTuple):
    """The decoded tokens of `req.<base>.<class>.<tenant>.<model>`."""

    base: str
    service_class: str
    tenant: str
    model: str

    def __str__(self) -> str:
        return "req." + ".".join(token(part) for part in self)


def parse_request(subject: str) -> RequestSubject:
    """Raises ValueError when `subject` is no request subject, or a name in it no UTF-8."""
    parts = subject.split(".")
    if len(parts) != 5 or parts[0] != "req" or not all(parts):
        raise ValueError(f"{subject!r} is not req.<base>.<class>.<tenant>.<model>")
    parsed = RequestSubject(*(name(part) for part in parts[1:]))
    "".join(parsed).encode()  # raises on a lone surrogate, which no JSON could name again
    return parsed


def request_filter(base: str, service_class: str) -> str:
    return f"req.{token(base)}.{token(service_class)}.>"


def consumer(base: str, service_class: str) -> str:
    """Durable consumer of one (base, class) queue."""
    return f"{token(base)}_{token(service_class)}"


def reply(tenant: str, mailbox: str, request_id: str) -> str:
    return f"out.{token(tenant)}.{token(mailbox)}.{token(request_id)}"


def replies_to(tenant: str, request_id: str) -> str:
    """All frames of one request, whoever it replies to."""
    return f"out.{token(tenant)}.*.{token(request_id)}"


def is_reply(subject: str) -> bool:
    """Whether `subject` is a literal `out.<tenant>.<mailbox>.<request>`, and not too long for one."""
    parts = subject.split(".")
    legal = len(parts) == 4 and parts[0] == "out" and all(parts) and not set(subject) & set("*> \t\r\n")
    return legal and len(subject.encode("utf-8", "surrogatepass")) <= MAX


def may_answer(request: str, reply: str) -> bool:
    """Whether who may publish under `request` may be told things on `reply`: the tenants must agree,
    or a message could make a worker write into another tenant's reply."""
    tenant = request.split(".")[3:4]
    return is_reply(reply) and [reply.split(".")[1]] == tenant


def mailbox(mailbox: str) -> str:
    """All frames for one ingress, whatever the tenant."""
    return f"out.*.{token(mailbox)}.*"


def cancel(tenant: str, request_id: str) -> str:
    return f"cancel.{token(tenant)}.{token(request_id)}"


def cancelled(subject: str) -> str:
    """`<tenant>.<request>` of a cancel, as `messages.Request.key` spells it: a direct publisher may
    encode less than `token` does. Raises ValueError when it is no UTF-8."""
    _, tenant, request = subject.split(".")
    return f"{token(name(tenant))}.{token(name(request))}"


def taken(key: str) -> str:
    """`key` as `messages.Request.key` spells it."""
    return f"taken.{key}"


def again(reply: str) -> str:
    """Where the frames under `reply`, out.<tenant>.<mailbox>.<request>, are asked for once more."""
    _, tenant, _, request = reply.split(".")
    return f"again.{tenant}.{request}"


def heartbeat(worker: str) -> str:
    return f"fleet.{token(worker)}"


def held(worker: str) -> str:
    return f"held.{token(worker)}"


def roster(worker: str) -> str:
    return f"roster.{token(worker)}"


def cached(worker: str) -> str:
    return f"cached.{token(worker)}"


def inventory(worker: str) -> str:
    return f"inventory.{token(worker)}"


def run(worker: str) -> str:
    return f"run.{token(worker)}"


def shares(base: str) -> str:
    """Key in `KV_LEASES`."""
    return f"{SHARES}-{token(base)}"


def credit(worker: str) -> str:
    return f"credit.{token(worker)}"


def ctl(name: str) -> str:
    """Commands to the worker, or the pool, of that name."""
    return f"ctl.{token(name)}"


def want(base: str, model: str) -> str:
    return f"want.{token(base)}.{token(model)}"


def wants(base: str) -> str:
    """Every `want` of one base."""
    return f"want.{token(base)}.*"


def pool(host: str) -> str:
    return f"pool.{token(host)}"


def usage(tenant: str, model: str) -> str:
    return f"usage.{token(tenant)}.{token(model)}"


def usage_id(tenant: str, request_id: str, seq: int) -> str:
    """`Nats-Msg-Id` of a usage event: a request is counted once, whoever tells of its end."""
    return f"{token(tenant)}:{token(request_id)}:{seq}"


def replay_id(tenant: str, letter: int, stored_ms: float) -> str:
    """`Nats-Msg-Id` of a dead letter's request, put back: new, and the same however often it is tried."""
    return dedup_id(tenant, f"dead:{letter}:{stored_ms:.0f}")


def letter_id(seq: int) -> str:
    """`Nats-Msg-Id` of a dead letter: who buries the message `seq` of REQUESTS again makes no second one."""
    return f"{REQUESTS}:{seq}"


def objects(bucket: str) -> str:
    """Stream behind an object store."""
    return f"OBJ_{bucket}"


def all_objects(bucket: str) -> str:
    return f"$O.{bucket}.>"


def object_meta(bucket: str, name: str) -> str:
    """Where an object's description is stored, as every NATS client spells it."""
    return f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


def all_object_metas(bucket: str) -> str:
    return f"$O.{bucket}.M.*"


def all_object_chunks(bucket: str) -> str:
    return f"$O.{bucket}.C.*"


def object_name(meta: str) -> str:
    """The inverse of `object_meta`; of what is no such subject, its last token."""
    token = meta.rpartition(".")[2]
    try:
        return base64.urlsafe_b64decode(token).decode()
    except ValueError:
        return token


def object_chunks(bucket: str, nuid: str) -> str:
    """Where an object's bytes are stored. Raises ValueError for a `nuid` that is no token of plain letters:
    descriptions are anybody's, and a wildcard in one would name other objects' bytes."""
    if _UNSAFE.search(nuid.encode("utf-8", "surrogatepass")) or not nuid:
        raise ValueError(f"{nuid!r} can't name an object's chunks")
    return f"$O.{bucket}.C.{nuid}"


def body_object(tenant: str, unique: str) -> str:
    """Name of a stored body. `unique` must not come again: a repeat of a request that took the first one's
    object could take it away from under it."""
    return f"{token(tenant)}.{unique}"


_OBJECT_REST = re.compile(r"[A-Za-z0-9_\-]{1,128}")


def may_name(tenant: str, name: str) -> bool:
    """Whether a request of `tenant` may have the stored body `name`: it is `<tenant token>.<unique>`."""
    owner, _, rest = name.partition(".")
    return owner == token(tenant) and _OBJECT_REST.fullmatch(rest) is not None


def dead(reason: str) -> str:
    return f"dead.{token(reason)}"


def dedup_id(tenant: str, key: str) -> str:
    """`Nats-Msg-Id`. Dedup is stream-wide, and one tenant's key must never meet another's.

    The tenant is encoded, so that its name can't hold the separator.
    """
    return f"{token(tenant)}:{key}"
