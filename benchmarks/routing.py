"""`model: auto`: how often the learned router is right on texts it has not seen, against keyword rules and
the majority's route; and what a decision costs an ingress."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from ingress.intent import Router
from ops import routes, routes_file

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "routes.toml"
HELD_OUT = ROOT / "tests" / "data" / "intents.jsonl"
LONG = 6000
"""Characters of a long text."""

# What one would write by hand: the first rule that is met decides.
RULES: dict[str, str] = {
    "translate": r"translat|übersetz|tradu|(in|into|to) (english|german|french|spanish|italian|japanese)"
    r"|(french|german|english|japanese) (word )?for|how do you say|what does '",
    "summarise": r"summar|tl;?dr|key points|main (points|ideas|findings)|shorten|condense|recap|overview"
    r"|sum up|in short|short version|in a nutshell|gist",
    "extract": r"extract|classify|(list|find|get|return) (all|every|the)|pull (out|the)|parse|identif"
    r"|label|tag |spam|sentiment|mentioned|named",
    "code": r"python|javascript|java\b|function|\bcode|\bbug|\bsql\b|script|error|\bgit\b|c\+\+|rust"
    r"|docker|\bclass\b|\bloop|compil|unit test|endpoint|exception|regex|def |array",
    "math": r"solve|calculat|comput|equation|integral|derivative|probabil|percent|%|prove|sum of"
    r"|how many|\d ?[*/+^-] ?\d|x\^|=|average|median|prime|square",
    "write": r"write|poem|story|draft|compose|essay|letter|slogan|novel|haiku|improve"
    r"|make (this|my|the) .*(sound|more)",
}
OTHERWISE = "chat"


def held_out() -> list[routes_file.Labelled]:
    return routes_file.labelled(HELD_OUT)


def by_keywords(text: str) -> str:
    lower = text.lower()
    return next((route for route, rule in RULES.items() if re.search(rule, lower)), OTHERWISE)


def majority(found: Sequence[routes_file.Labelled]) -> str:
    return Counter(each.route for each in found).most_common(1)[0][0]


def run(quick: bool) -> dict[str, Any]:
    file = routes_file.read(EXAMPLES)
    found = held_out()
    names = [each.name for each in file.routes]
    meant = [each.route for each in found]
    judged: dict[str, Any] = {}
    routers = {}
    for title, embeddings in (("learned", True), ("words alone", False)):
        trained = routes.train(file, "auto", embeddings=embeddings)
        routers[title] = Router(trained.learned, trained.tables)
        judged[title] = _judged(meant, found, routers[title].route)
    judged["keyword rules"] = _judged(meant, found, by_keywords)
    judged["majority"] = _judged(meant, found, lambda _: majority(found))
    router = routers["learned"]
    guessed = [router.route(each.text) for each in found]
    ranked = [router.ranked(each.text, "auto")[0] for each in found]
    to_default = [index for index, (_, reason) in enumerate(ranked) if ": default" in reason]
    sure = [index for index in range(len(found)) if index not in set(to_default)]
    rounds = 5 if quick else 50
    whole = " ".join(each.text for each in found)
    longs = [whole[at : at + LONG] for at in range(0, len(whole) - LONG, 61)]
    measured = {
        "examples": len(file.examples),
        "texts": len(found),
        "routes": names,
        "accuracy": judged,
        "confusion": routes_file.confusion(names, meant, guessed),
        "margin": file.margin,
        "default_share": len(to_default) / len(found),
        "accuracy_above_margin": sum(guessed[i] == meant[i] for i in sure) / max(1, len(sure)),
        "short_ms": _timed(file, [each.text for each in found] * rounds),
        "long_ms": _timed(file, longs * max(1, rounds // 5)),
    }
    results.say(f"  accuracy {judged}, ms {measured['short_ms']}, long {measured['long_ms']}")
    return measured


def _judged(
    meant: Sequence[str], found: Sequence[routes_file.Labelled], guess: Callable[[str], str]
) -> float:
    return routes_file.accuracy(meant, [guess(each.text) for each in found])


def _timed(file: routes_file.RoutesFile, texts: Sequence[str]) -> dict[str, float]:
    """Of a router that has seen no text before, as after an ingress's start."""
    trained = routes.train(file, "auto")
    router = Router(trained.learned, trained.tables)
    took = []
    for text in texts:
        started = time.perf_counter()
        router.ranked(text, "auto")
        took.append(1000 * (time.perf_counter() - started))
    return {"p50": results.percentile(took, 50), "p99": results.percentile(took, 99), "max": max(took)}


if __name__ == "__main__":
    results.main("routing", run)
