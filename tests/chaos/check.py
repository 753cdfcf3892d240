"""Was an answer what it had to be? Pure: what a client saw in, what is wrong with it out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from workers.engines import sim


class End(StrEnum):
    """How a request ended for its client."""

    COMPLETE = "complete"
    REFUSED = "refused"  # 429 or 503, before any output: try again later
    LEFT = "left"  # the client went away on purpose
    INTERRUPTED = "interrupted"  # it began, or was accepted, and ended in an error
    HUNG = "hung"  # nothing came for too long


@dataclass(frozen=True, slots=True)
class Ask:
    """What was asked for, and so what has to come."""

    request_id: str
    path: str
    prompt: str
    tokens: int
    choices: int = 1
    stream: bool = True
    service_class: str = "standard"
    tenant: str = "default"
    timeout: int = 0  # seconds within which it is to have ended; 0 = any

    @property
    def prompt_ids(self) -> list[int]:
        chat = self.path == "/v1/chat/completions"
        return sim.tokenize(sim.chat_prompt([("user", self.prompt)]) if chat else self.prompt)

    def expected(self, choice: int) -> list[int]:
        return sim.expected_tokens(self.prompt_ids, self.tokens, choice)


class Tokens(NamedTuple):
    """Tokens of one choice that came in one event, at monotonic time `at`."""

    at: float
    choice: int
    ids: tuple[int, ...]
    text: str


@dataclass(slots=True)
class Transcript:
    """What one client saw of one request. Written by the client's task.

    Attributes:
        visits: when an ingress was asked, in monotonic time, and its URL, in order.
        worker: who answered first, as far as it was told.
        breaks: monotonic times at which a connection broke, or could not be made.
        cut: how many of them once the answer had begun to come over that connection.
        finishes: (choice, reason) as they came.
        usages: the `usage` objects that came.
        dones: how many `[DONE]` came.
        fault: the code of the error that ended it.
    """

    ask: Ask
    started: float
    ended: float = 0.0
    end: End | None = None
    visits: list[tuple[float, str]] = field(default_factory=list)
    worker: str = ""
    breaks: list[float] = field(default_factory=list)
    cut: int = 0
    tokens: list[Tokens] = field(default_factory=list)
    finishes: list[tuple[int, str]] = field(default_factory=list)
    usages: list[dict[str, object]] = field(default_factory=list)
    dones: int = 0
    fault: str = ""

    @property
    def ingresses(self) -> list[str]:
        return [url for _, url in self.visits]

    def ingress(self, at: float) -> str:
        """The one that was asked last, as of then; "" = none was."""
        return next((url for since, url in reversed(self.visits) if since <= at), "")


class Problem(NamedTuple):
    """`tokens` lost, doubled, out of place or foreign; 1 of whatever else is wrong."""

    kind: str
    tokens: int
    detail: str


def check(seen: Transcript) -> list[Problem]:
    """What is wrong with an answer; nothing for one that is complete, was refused, or was left midway."""
    problems = [problem for choice in range(seen.ask.choices) for problem in _tokens(seen, choice)]
    strays = {part.choice for part in seen.tokens} - set(range(seen.ask.choices))
    if strays:
        problems.append(Problem("foreign", len(strays), f"choices {sorted(strays)} were not asked for"))
    if seen.end in (End.INTERRUPTED, End.HUNG, None):
        problems.append(Problem(str(seen.end or "unended"), 1, seen.fault or "no end came"))
    elif seen.end is End.COMPLETE:
        problems += _closing(seen)
    elif seen.end is End.REFUSED and seen.tokens:
        problems.append(Problem("interrupted", 1, f"refused ({seen.fault}) after output had come"))
    return problems


def _tokens(seen: Transcript, choice: int) -> list[Problem]:
    """Each token says its number: so each that is missing, repeated or out of order can be named."""
    wanted = seen.ask.expected(choice)
    place = {token: number for number, token in enumerate(wanted)}
    came = [token for part in seen.tokens if part.choice == choice for token in part.ids]
    foreign = [token for token in came if token not in place]
    places = [place[token] for token in came if token in place]
    due = len(wanted) if seen.end is End.COMPLETE else max(places, default=-1) + 1
    missing = sorted(set(range(due)) - set(places))
    doubled = len(places) - len(set(places))
    once = list(dict.fromkeys(places))
    swapped = sum(a > b for a, b in itertools.pairwise(once))
    found = [
        Problem("lost", len(missing), f"choice {choice} lacks tokens {missing[:20]}"),
        Problem("doubled", doubled, f"choice {choice} has {doubled} tokens twice: {_twice(places)}"),
        Problem("reordered", swapped, f"choice {choice} came as {once[:80]}"),
        Problem("foreign", len(foreign), f"choice {choice} has tokens of another answer: {foreign[:20]}"),
    ]
    text = "".join(part.text for part in seen.tokens if part.choice == choice)
    if came and text != sim.text_of(came):
        found.append(Problem("text", 1, f"choice {choice} reads {text!r:.400}, not what its tokens say"))
    return [problem for problem in found if problem.tokens]


def _twice(places: list[int]) -> list[int]:
    return sorted({number for number in places if places.count(number) > 1})[:20]


def _closing(seen: Transcript) -> list[Problem]:
    ask = seen.ask
    found = []
    if sorted(seen.finishes) != [(choice, "length") for choice in range(ask.choices)]:
        found.append(Problem("finish", 1, f"each choice must finish once, for its length: {seen.finishes}"))
    if ask.stream and seen.dones != 1:
        found.append(Problem("done", 1, f"{seen.dones} [DONE] came"))
    prompt, output = len(ask.prompt_ids), ask.tokens * ask.choices
    wanted = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    told = [{name: usage.get(name) for name in wanted} for usage in seen.usages]
    if told != [wanted]:
        found.append(Problem("usage", 1, f"usage must be {wanted} once, and was {told}"))
    return found


class Silence(NamedTuple):
    """Seconds in which nothing came that could have, and the monotonic time at which something did."""

    seconds: float
    until: float


def recovery_gap(
    seen: Transcript, fault_at: float, pace: float, within: float, still: Sequence[Silence] = ()
) -> Silence | None:
    """The longest silence around a fault: from a stream's last token before to its first after, less `pace`,
    what lies between two tokens anyway, and what of it lies `still`, when nothing could have come. None where
    the fault came before its first token or after its last. A silence that begins later than `within`
    seconds after the fault is another's."""
    times = sorted(part.at for part in seen.tokens)
    if not times or not times[0] <= fault_at <= times[-1]:
        return None
    silences = [
        Silence(max(0.0, later - sooner - pace - sum(_common(sooner, later, one) for one in still)), later)
        for sooner, later in itertools.pairwise(times)
        if later >= fault_at and sooner <= fault_at + within
    ]
    return max(silences, default=Silence(0.0, fault_at))


def _common(since: float, until: float, still: Silence) -> float:
    return max(0.0, min(until, still.until) - max(since, still.until - still.seconds))
