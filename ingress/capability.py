"""Whether a model has what a request needs: what is declared of it, against `needs.Needs`."""

from __future__ import annotations

from dataclasses import dataclass

from broker.entries import Capability, ModelEntry
from broker.messages import ModelCard
from ingress.needs import Needs

_WORDS: dict[Capability, str] = {
    "chat": "chat",
    "completions": "completions",
    "embeddings": "embeddings",
    "tools": "tools",
    "json_schema": "JSON schemas",
    "vision": "vision",
    "reasoning": "reasoning",
}
SHOWN: dict[str, Capability] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
"""Capabilities that an engine's paths tell, where none are declared."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of a model. What is None, empty or 0 is not known, and no reason to refuse.

    Attributes:
        declared: what an operator says it can do.
        shown: which of chat, completions and embeddings its engine serves.
    """

    declared: frozenset[Capability] | None
    shown: frozenset[Capability]
    context_tokens: int
    languages: frozenset[str]


def profile(entry: ModelEntry | None, base: ModelEntry | None, card: ModelCard) -> Profile:
    """Of a base (`base` is its entry as well), or of an adapter with its base's entry and card."""
    declared = entry.capabilities if entry is not None else None
    if declared is None and base is not None:
        declared = base.capabilities
    context = [known for each in (entry, base) if each is not None and (known := each.context_tokens)]
    languages = entry.languages if entry is not None else ()
    if not languages and base is not None:
        languages = base.languages
    return Profile(
        None if declared is None else frozenset(declared),
        frozenset(SHOWN[path] for path in card.paths if path in SHOWN),
        context[0] if context else card.context_tokens,
        frozenset(languages),
    )


def lacks(known: Profile, needs: Needs) -> list[str]:
    """What the model surely lacks, in words; empty = it may serve the request."""
    missing: list[str] = []
    if known.declared is not None:
        missing += [_WORDS[each] for each in sorted(needs.capabilities - known.declared)]
    if known.context_tokens and needs.least_tokens >= known.context_tokens:
        missing.append(f"a context of more than {known.context_tokens} tokens")
    if known.languages and needs.sure_languages and not known.languages & needs.sure_languages:
        missing.append(f"language {' or '.join(sorted(needs.sure_languages))}")
    return missing


def suits(known: Profile, needs: Needs) -> int:
    """How surely the model has what is needed, for a choice among several: 2 = all that is known of it says
    so, 1 = nothing speaks against it, 0 = its engine serves other paths, the prompt may be too long, or be in
    a language that it isn't said to have."""
    shown = needs.capabilities & {"chat", "completions", "embeddings"}
    if known.declared is None and known.shown and shown - known.shown:
        return 0
    if known.context_tokens and needs.likely_tokens > known.context_tokens:
        return 0
    if known.languages and needs.languages and not known.languages & needs.languages:
        return 0
    return 2 if known.declared is not None or needs.capabilities <= known.shown else 1
