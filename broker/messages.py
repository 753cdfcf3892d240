"""The types that travel between the services. Ingress, workers and scheduler meet only here."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from broker import errors, subjects

OUTCOME = Literal["finished", "failed", "cancelled"]

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
"""What Headrace offers of an engine's HTTP API; a model's card lists those that it serves."""


MAX_BODY = 64 * 2**20
"""Bytes of a request body: no engine takes more."""


class ServiceClass(enum.StrEnum):
    """Queue classes, most urgent first; iteration order is priority order."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it lies in the queue.

    Attributes:
        subject: base, class, tenant and model.
        request_id: unique for a tenant; last token of `reply_to`.
        reply_to: subject of the frames, `out.<tenant>.<mailbox>.<request>`.
        path: of the engine's HTTP API, e.g. `/v1/chat/completions`.
        body: the caller's JSON, untouched; empty while it lies in the object store.
        body_object: its name there, where it is too large for a message, or "". See `bodies`.
        deadline_ms: unix time in ms after which the request is worth nothing; 0 = none.
        dedup_key: the caller's idempotency key; the request id where there is none.
        traceparent: W3C trace context, or "".
        asked: the model that the caller named, where `subject.model` was chosen for it; else "".
        prefix: hashes of the prompt's beginning, `kvstate.prefix`; "" = nobody made any.
        budget: most output tokens; 0 = the caller sets no bound.
    """

    subject: subjects.RequestSubject
    request_id: str
    reply_to: str
    path: str
    body: bytes
    deadline_ms: int = 0
    dedup_key: str = ""
    traceparent: str = ""
    body_object: str = ""
    asked: str = ""
    prefix: str = ""
    budget: int = 0

    @property
    def key(self) -> str:
        """`<tenant>.<request>` as subject tokens: what a cancel names."""
        return f"{subjects.token(self.subject.tenant)}.{subjects.token(self.request_id)}"

    def late(self, now_ms: float) -> bool:
        """Whether its deadline has passed by that unix time."""
        return 0 < self.deadline_ms <= now_ms

    def headers(self) -> dict[str, str]:
        head = {
            subjects.MSG_ID: subjects.dedup_id(self.subject.tenant, self.dedup_key or self.request_id),
            subjects.REPLY_TO: self.reply_to,
            subjects.PATH: self.path,
            subjects.TENANT: subjects.token(self.subject.tenant),
            subjects.REQUEST_ID: subjects.token(self.request_id),
        }
        if self.deadline_ms:
            head[subjects.DEADLINE] = str(self.deadline_ms)
        if self.traceparent:
            head[subjects.TRACEPARENT] = self.traceparent
        if self.body_object:
            head[subjects.BODY_OBJECT] = self.body_object
        if self.asked:
            head[subjects.ASKED] = subjects.token(self.asked)
        if self.prefix:
            head[subjects.PREFIX] = self.prefix
        if self.budget:
            head[subjects.BUDGET] = str(self.budget)
        return head


_BUDGET_DIGITS = 9
_DEADLINE_DIGITS = 15  # ms until the year 33,658; int() refuses thousands of digits with an error of its own


def parse_request(subject: str, headers: Mapping[str, str] | None, body: bytes) -> Request:
    """Read a queued message. `Tenant` and `Request-Id` are optional: the subjects carry both.

    Raises errors.MalformedMessage naming the header that is missing or unreadable.
    """
    head = headers or {}
    try:
        parsed = subjects.parse_request(subject)
        ServiceClass(parsed.service_class)
    except ValueError as exc:
        raise errors.MalformedMessage(str(exc)) from exc
    if len(str(parsed)) > subjects.MAX:
        raise errors.MalformedMessage(
            f"the names in the subject take more than {subjects.MAX} bytes, percent-encoded"
        )
    reply_to = head.get(subjects.REPLY_TO, "")
    if not subjects.is_reply(reply_to):
        raise errors.MalformedMessage(
            f"header {subjects.REPLY_TO} must be out.<tenant>.<mailbox>.<request> of at most {subjects.MAX} "
            f"bytes, not {reply_to!r:.200}"
        )
    tokens = reply_to.split(".")
    try:
        request_id = subjects.name(tokens[3])
        request_id.encode()
    except ValueError as exc:
        raise errors.MalformedMessage(f"header {subjects.REPLY_TO} is no UTF-8: {reply_to!r:.200}") from exc
    if tokens[1] != subjects.token(parsed.tenant):
        raise errors.MalformedMessage(
            f"header {subjects.REPLY_TO} names tenant {tokens[1]!r:.200}, the subject {parsed.tenant!r}"
        )
    if not head.get(subjects.MSG_ID):
        raise errors.MalformedMessage(
            f"header {subjects.MSG_ID} is missing: set it to <tenant>:<request>, so that a repeat runs once"
        )
    path = head.get(subjects.PATH, "")
    if not path.startswith("/"):
        raise errors.MalformedMessage(
            f"header {subjects.PATH} must be an API path such as /v1/chat/completions, not {path!r:.200}"
        )
    deadline = head.get(subjects.DEADLINE, "0")
    if not (deadline.isascii() and deadline.isdigit() and len(deadline) <= _DEADLINE_DIGITS):
        raise errors.MalformedMessage(
            f"header {subjects.DEADLINE} must be unix time in ms, not {deadline!r:.99}"
        )
    asked = head.get(subjects.ASKED, "")
    try:
        asked = subjects.name(asked)
        asked.encode()
    except ValueError as exc:
        raise errors.MalformedMessage(f"header {subjects.ASKED} is no UTF-8: {asked!r:.200}") from exc
    body_object = head.get(subjects.BODY_OBJECT, "")
    if body_object and (body or not subjects.may_name(parsed.tenant, body_object)):
        raise errors.MalformedMessage(
            f"header {subjects.BODY_OBJECT} must be {subjects.token(parsed.tenant)}.<unique> with an empty "
            f"body, not {body_object!r:.200} with {len(body)} bytes"
        )
    return Request(
        subject=parsed,
        request_id=request_id,
        reply_to=reply_to,
        path=path,
        body=body,
        deadline_ms=int(deadline),
        dedup_key=head[subjects.MSG_ID].partition(":")[2],
        traceparent=head.get(subjects.TRACEPARENT, ""),
        body_object=body_object,
        asked=asked,
        prefix=head.get(subjects.PREFIX, ""),
        budget=_number(head.get(subjects.BUDGET, "")),
    )


def _number(text: str) -> int:
    """A hint is worth no error: what can't be read is as if it were not there."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _BUDGET_DIGITS else 0


QUEUED_EPOCH = 0
"""The epoch of the note that a request is queued: before every attempt at it."""

LAST_EPOCH = 999_999_999
"""The epoch of an end that comes from outside: past every attempt, whose frames a reader drops then."""


class FrameKind(enum.StrEnum):
    BEAT = "beat"
    """A worker has the request, and its first output takes more than a moment."""
    HEAD = "head"
    """HTTP status and headers; the payload is the first body bytes, where they were ready."""
    DATA = "data"
    END = "end"
    ERROR = "error"


TERMINAL = frozenset({FrameKind.END, FrameKind.ERROR})


@dataclass(slots=True)
class Frame:
    """One reply frame: `<one-line JSON meta>\\n<payload>`.

    Attributes:
        epoch: delivery attempt, from 1; a reader drops frames of an earlier one.
        seq: frame number within the epoch, from 0.
        off: output tokens of choice 0 before this frame.
        ids: output token ids of choice 0 that this frame's payload carries.
        choices: `[index, off, ids]` for each further choice with tokens in it (`n > 1`).
        payload: the engine's own response bytes; for `error`, an OpenAI error object.
        extra: further meta by kind — head: `status`, `headers`, `worker`, `at`, `timing` (milliseconds
            `queue`, `ttft` and `predicted`, prompt tokens `prompt` and `cached`); beat: `worker`, `at`;
            end: `usage`, `at`; error: `status`, `code`, `at`. `at` is unix time in ms, with fractions.
    """

    epoch: int
    seq: int
    kind: FrameKind
    off: int = 0
    ids: list[int] = field(default_factory=list)
    choices: list[list[Any]] = field(default_factory=list)
    payload: bytes = b""
    extra: dict[str, Any] = field(default_factory=dict)


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


def _fits(name: str) -> str:
    if not subjects.fits(name):
        raise ValueError(f"a name has 1 to {subjects.MAX_NAME} bytes, not {name!r:.80}")
    return name


Name = Annotated[str, AfterValidator(_fits)]
"""What becomes a token of subjects."""


class Credit(_Wire):
    """What a worker could take now."""

    requests: int = 0
    slots_free: int = 0
    slots_total: int = 0
    prefill_tokens_free: int = 0
    step_tokens: int = 0
    kv_tokens_free: int = 0
    kv_tokens_total: int = 0
    kv_block_tokens: int = Field(16, description="tokens for which room is given out together")
    running: int = 0
    waiting: int = 0
    held: int = Field(0, description="requests that the worker has, in its engine or not")
    prefill_tokens_held: int = Field(
        0, description="prompt tokens of theirs that no step, nor the one under way, has computed"
    )


class ModelCard(_Wire):
    """One model that a worker serves. `base` shares its weights; an adapter names another `id`."""

    id: str
    base: str
    context_tokens: int = 0
    paths: tuple[str, ...] = ()


class AdapterState(_Wire):
    """One adapter version in a worker. `model` is `<name>@<version>`."""

    model: str
    state: Literal["fetching", "on_disk", "loading", "ready", "draining", "failed"]
    reason: str = Field("", description="why it failed")
    running: int = Field(0, description="requests that it has in the engine")
    waiting: int = Field(0, description="requests that wait in the worker for it, or for a slot")
    size: int = Field(0, description="bytes of its files")


class Heartbeat(_Wire):
    """`fleet.<worker>`, every 100 ms and on change. `started_ms` tells two lives of one name apart."""

    worker: Name
    engine: str
    base: Name
    models: tuple[ModelCard, ...]
    started_ms: int
    seq: int
    state: Literal["serving", "draining", "asleep", "gone"]
    credit: Credit
    metrics_url: str = ""
    inbox: str = Field("", description="where what it pulls is delivered")
    told: int = Field(0, description="`number` of this worker's last message on `held.<worker>`")
    host: str = Field("", description="name of its machine")
    adapters: tuple[AdapterState, ...] = ()
    slots: int = Field(0, description="adapters that may run at once; 0 = it serves none")
    max_rank: int = Field(0, description="largest rank of an adapter that it takes")
    adapters_in_memory: int = Field(
        0, description="adapters that may be loaded at once; 0 = it does not say, and `slots` are"
    )
    dispatched: tuple[int, int] = Field((0, 0), description="epoch and number of the last `Sent` it got")
    cached: int = Field(
        0, description="`number` of the last message on `cached.<worker>`; 0 = its engine tells nothing"
    )


UNTOLD = -1
"""A count that an engine does not tell."""


class News(_Wire):
    """`credit.<worker>`, with each first token and end: what a worker could take, for who dispatches."""

    worker: Name
    credit: Credit
    dispatched: tuple[int, int] = Field(description="as in the heartbeat")
    first: tuple[tuple[int, int], ...] = Field(
        (),
        description="sequence and cached prompt tokens (-1: untold) of each with a first token since",
    )
    done: tuple[tuple[int, int, int, int], ...] = Field(
        (),
        description="sequence, prompt, cached (-1: untold) and output tokens of each that ended since",
    )


class Cached(_Wire):
    """`cached.<worker>`: what a worker's engine has taken into its prefix cache and evicted since the message
    before, or all that is there, as hashes of prompts' blocks.

    `number` counts a life's messages from 1. After a gap, or when it first hears of the worker, the scheduler
    that dispatches asks for all.
    """

    worker: Name
    started_ms: int = Field(description="as in the heartbeat")
    number: int
    whole: bool = Field(False, description="`taken` is all that is there: the answer to `inventory.<worker>`")
    taken: str = Field("", description="in the form of the header `Prefix`, of any number of hashes")
    evicted: str = Field("", description="likewise")


class Steps(_Wire):
    """How long one that comes waits for an engine's step under way, at most: of the workers of one pool."""

    base: str
    classes: tuple[ServiceClass, ...] = Field(description="whose workers they are")
    workers: int
    tokens: int = Field(description="prompt tokens in a step, at most")
    ms: float = Field(description="for a full step of the slowest, as the dispatcher learned")


class Dispatch(_Wire):
    """`dispatch`, every 100 ms: a scheduler hands out the requests of `bases`; their workers pull none.

    One that stops says it once more, with no bases: then nothing is delivered to its inbox any more.
    """

    scheduler: Name
    epoch: int = Field(description="grows with each scheduler that leads")
    bases: tuple[str, ...]
    inbox: str = Field("", description="where what it pulls is delivered")
    steps: tuple[Steps, ...] = Field((), description="of each pool; as of the last second")


class Sent(_Wire):
    """Header `Sent` of a request on `run.<worker>`: who sends it, and what was expected of it."""

    epoch: int
    number: int = Field(description="of the dispatcher's sends, to whomever; 0 = it is not counted")
    queued_ms: float = 0.0
    predicted_ms: float = Field(0.0, description="from the queue's acceptance to the first token")
    hit_tokens: int = Field(0, description="prompt tokens that the worker was expected to have cached")
    why: str = ""


class Command(_Wire):
    """`ctl.<worker>`: what a worker, or a pool, is told to do. Answered by an `Answer`."""

    do: Literal["load", "unload", "drain", "sleep", "wake", "start", "stop", "preempt"]
    model: str = Field("", description="`<name>@<version>` of an adapter; of a pool, the base")
    request: str = Field("", description="to preempt: `<tenant>.<request>`, as in its cancel's subject")
    reason: str = ""


class Answer(_Wire):
    """What became of a `Command`. `ok` says that it was taken on, not that it is done."""

    ok: bool
    message: str = ""


class Instance(_Wire):
    """One base in a host's pool: cold = no process, warm = its weights rest in memory, hot = it serves."""

    base: str
    state: Literal["cold", "starting", "warm", "waking", "hot", "draining", "failed"]
    worker: str = ""
    memory: int = Field(0, description="bytes that it takes in this state")
    resident: int = Field(0, description="bytes of the machine's memory that its processes take, measured")
    reason: str = ""
    failing: bool = Field(False, description="it failed, and has not served since")


class PoolBeat(_Wire):
    """`pool.<host>`: what the instance pool of a host runs, each second and on change."""

    host: str
    name: str = Field(description="takes commands on `ctl.<name>`")
    memory: int = Field(description="bytes that its instances may take together")
    used: int = Field(description="bytes that they take")
    instances: tuple[Instance, ...] = ()
    seq: int = 0


class Held(_Wire):
    """`held.<worker>`: what a worker took and let go of since its message before, or all that it holds.

    A worker dies without a word; whoever leads then gives back what it held. `number` counts a life's
    messages from 1, so that one which was lost shows.
    """

    started_ms: int = Field(description="as in the heartbeat")
    number: int
    full: bool = Field(False, description="`take` is all that it holds: the answer to `roster.<worker>`")
    take: tuple[tuple[int, int, str], ...] = Field((), description="sequence, attempt, ack subject of each")
    drop: tuple[tuple[int, int], ...] = Field((), description="sequence, attempt of each")


class Latency(_Wire):
    """Seconds spent in each part of a request's life; None where the part was never reached."""

    queue: float | None = None
    engine_wait: float | None = None
    prefill: float | None = None
    ttft: float | None = None
    decode: float | None = None
    total: float | None = None


class UsageEvent(_Wire):
    """`usage.<tenant>.<model>`: one a request, whatever its end."""

    request_id: str
    tenant: str
    model: str = Field(description="that served it: a base, or `<adapter>@<version>`")
    asked: str = Field("", description="the model that the caller named, where another was chosen for it")
    base: str
    service_class: str
    path: str
    worker: str
    outcome: OUTCOME
    status: int
    code: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    gpu_seconds: float = Field(0.0, description="engine time, shared equally by the requests running at once")
    epoch: int = 1
    finished_ms: int
    latency: Latency = Latency()


class Attempt(_Wire):
    """One attempt at a request that failed for good: who had it, and what became of it."""

    epoch: int
    worker: str
    at_ms: int
    what: str


class DeadLetter(_Wire):
    """`dead.<reason>`: a message that nobody could be told about, or that failed for good."""

    reason: str
    message: str
    subject: str
    headers: dict[str, str]
    body: str = Field(description="the body, base64; empty where the headers name one in the object store")
    failed_ms: int
    history: tuple[Attempt, ...] = ()
