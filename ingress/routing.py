"""Which model serves a request: from the name that its caller gave to what is queued.

Pure: names, needs and the catalogue's present state in, a choice with its reasons out. A name is

- a base, or an adapter's `<name>` or `<name>@<version>`: served as it is, or refused where it lacks what the
  request needs;
- an alias: a share of the conversations goes to each of its targets that can serve;
- a router, or `auto`: the text decides, among those that can serve.

The result is a list in order of preference. Who stands first serves, unless it is down or full, and its
caller takes another.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from broker import entries, errors
from broker.entries import AUTO, ModelEntry
from broker.messages import ModelCard, ServiceClass
from ingress import capability, sticky
from ingress.intent import Router
from ingress.needs import Needs

_MOST = 32
"""Options of one name, and names in an error message."""
_DEEPEST = 8
"""Names that may lead to one another: an alias of an alias of …"""


class View(Protocol):
    """The catalogue as of now."""

    @property
    def declared(self) -> Mapping[str, ModelEntry]: ...
    @property
    def learned(self) -> Mapping[str, Router]: ...
    @property
    def unreadable(self) -> Collection[str]: ...
    def card(self, model: str) -> ModelCard | None: ...
    def cards(self) -> Mapping[str, ModelCard]: ...
    def served(self, model: str) -> bool: ...
    def up(self, base: str) -> bool: ...
    def full(self, base: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `conversation` as `sticky.key` makes it, called where ways part only; `fallback`: whether
    another model may serve where the first is down or full."""

    tenant: str
    conversation: Callable[[], str]
    fallback: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """A model that can serve the request. `model` is what is queued, a base or `<adapter>@<version>`; `why`
    the steps that led to it, empty where its caller named it; `suits` as `capability.suits` has it."""

    model: str
    base: str
    why: tuple[str, ...] = ()
    latency_class: ServiceClass | None = None
    suits: int = 1


def resolve(asked: str, needs: Needs, caller: Caller, view: View) -> Choice:
    """Raises errors.UnknownModel, errors.Incapable."""
    return chosen(options(asked, needs, caller, view), caller, view)


def options(asked: str, needs: Needs, caller: Caller, view: View) -> tuple[Choice, ...]:
    """All that may serve, the first choice first; never empty.

    Raises errors.UnknownModel, errors.Incapable.
    """
    entry = view.declared.get(asked)
    known = asked == AUTO or asked in view.learned or asked in view.unreadable
    if entry is None and not known and not entries.split(asked)[1]:
        # Nothing is declared of it: the fast path. A token has two bytes of the body at least.
        card = view.card(asked)
        fits = card is not None and (not card.context_tokens or needs.size <= 2 * card.context_tokens)
        if card is not None and fits and card.id == card.base:
            return (Choice(card.id, card.base),)
    return _Search(needs, caller, view).named(asked)


def chosen(found: tuple[Choice, ...], caller: Caller, view: View) -> Choice:
    """The first that is up and has room, where the caller takes others than the first; else the first one
    that is up; else the first."""
    first = found[0]
    if not caller.fallback or len(found) == 1:
        return first
    up = [each for each in found if view.up(each.base)]
    best = next((each for each in up if not view.full(each.base)), up[0] if up else first)
    if best.model == first.model:
        return first
    state = "has no room" if view.up(first.base) else "is served by no worker now"
    why = (*first.why[:1], f"{first.model} {state}", *best.why[-1:], f"fallback to {best.model}")
    return dataclasses.replace(best, why=why, latency_class=first.latency_class)


def allowed(name: str, tenant: str, view: View) -> bool:
    """Whether a tenant may know of a name. Of what stands in an entry that can't be read, nobody may: it may
    have a list of tenants."""
    if name in view.unreadable or entries.split(name)[0] in view.unreadable:
        return False
    entry = _entry(name, view)
    return entry is None or not entry.tenants or tenant in entry.tenants


def _entry(name: str, view: View) -> ModelEntry | None:
    entry = view.declared.get(name)
    if entry is None:
        adapter = view.declared.get(entries.split(name)[0])
        entry = adapter if adapter is not None and adapter.kind == "adapter" else None
    return entry


class _Search:
    """One request's way through the names. Each name is looked at once, so that a mesh of aliases costs no
    more than its names."""

    def __init__(self, needs: Needs, caller: Caller, view: View) -> None:
        self._needs = needs
        self._caller = caller
        self._view = view
        self._known: dict[str, tuple[Choice, ...]] = {}
        self._trail: list[str] = []
        self._lacking: dict[str, list[str]] = {}
        self._broken: dict[str, str] = {}

    def named(self, asked: str) -> tuple[Choice, ...]:
        found = self._options(asked)
        if found:
            return found
        if asked in self._broken and not self._lacking:
            raise errors.UnknownModel(self._broken[asked], param="model")
        if self._lacking:
            raise self._incapable(asked)
        if self._broken:
            reasons = "; ".join(self._broken.values())[:500]
            raise errors.UnknownModel(
                f"model {asked[:200]!r} leads to none that is served: {reasons}", param="model"
            )
        usable = self._usable()
        known = ", ".join(itertools.islice((name for name in usable if name != asked), _MOST))
        known = known or "none yet: no worker has announced itself"
        state = "leads to none that is served" if asked in usable else "is not served"
        raise errors.UnknownModel(f"model {asked[:200]!r} {state}; known models: {known}", param="model")

    # Names

    def _options(self, name: str) -> tuple[Choice, ...]:
        if name in self._known:
            return self._known[name]
        if name in self._trail or len(self._trail) >= _DEEPEST:
            return ()  # a circle, or as good as one
        self._trail.append(name)
        found = self._of_kind(name)
        self._trail.pop()
        unique: dict[str, Choice] = {}
        for each in found:
            unique.setdefault(each.model, each)
        self._known[name] = tuple(itertools.islice(unique.values(), _MOST))
        return self._known[name]

    def _of_kind(self, name: str) -> list[Choice]:
        entry = self._entry(name)
        if not self._may(name):
            return []
        if entry is not None and entry.kind == "alias":
            return self._alias(entry)
        if name == AUTO or name in self._view.learned or (entry is not None and entry.kind == "router"):
            return self._router(name, entry)
        leaf = self._leaf(name, entry)
        if leaf is None and name in self._lacking:
            return []  # the caller named it, and is told
        if leaf is not None:
            return [leaf, *self._fallbacks(name, entry)]
        return self._instead(name, entry)

    def _entry(self, name: str) -> ModelEntry | None:
        return _entry(name, self._view)

    def _may(self, name: str) -> bool:
        return allowed(name, self._caller.tenant, self._view)

    def _leaf(self, name: str, entry: ModelEntry | None) -> Choice | None:
        """A base or an adapter, if it can serve; else `_lacking` or `_broken` has why not."""
        view = self._view
        model, base = name, name
        if entry is not None and entry.kind == "adapter":
            number = entries.split(name)[1] if name != entry.name else entry.current
            if entry.version(number) is None:
                self._broken[name] = _no_version(entry, number)
                return None
            model, base = entries.versioned(entry.name, number), entry.base
        card = view.card(base)
        if card is None:
            if entry is not None:
                needed = f"base {base!r}" if self._may(base) else "a base"
                self._broken[name] = (
                    f"adapter {name!r} needs {needed}, which no worker has ever served: start one"
                    if entry.kind == "adapter"
                    else f"model {name!r} is declared, but no worker has ever served it: start one"
                )
            return None
        if entry is None and card.id != card.base and entries.split(name)[1]:
            return None  # what workers still hold of an adapter that was removed
        about = capability.profile(entry, view.declared.get(card.base), card)
        if missing := capability.lacks(about, self._needs):
            self._lacking[name] = missing
            return None
        latency_class = entry.latency_class if entry is not None else None
        return Choice(model, card.base, (), latency_class, capability.suits(about, self._needs))

    def _fallbacks(self, name: str, entry: ModelEntry | None) -> list[Choice]:
        if entry is None or not self._caller.fallback:
            return []
        return [each for other in entry.fallbacks for each in self._options(other)]

    def _instead(self, name: str, entry: ModelEntry | None) -> list[Choice]:
        """Fallbacks of a name that has nothing of its own to serve it: they say so."""
        return [
            _because(f"{name} was never served; fallback to {each.model}", each, entry)
            for each in self._fallbacks(name, entry)
        ]

    # Several

    def _alias(self, entry: ModelEntry) -> list[Choice]:
        found = [(target, self._options(target.model)) for target in entry.targets if target.weight]
        able = [(target, options) for target, options in found if options]
        best = max((options[0].suits > 0 for _, options in able), default=False)
        able = [(target, options) for target, options in able if (options[0].suits > 0) is best]
        if not able:
            return self._instead(entry.name, entry)
        weights = [(target.model, target.weight) for target, _ in able]
        order = able
        if len(able) > 1:
            ranked = sticky.order(self._caller.conversation(), entry.name, weights)
            order = [able[index] for index in ranked]
        whole = sum(weight for _, weight in weights)
        reasons = [
            f"alias {entry.name}: {target.model}"
            + (f", {target.weight} of {whole}" if len(weights) > 1 else "")
            for target, _ in order
        ]
        found_here = [
            _because(reason, option, entry)
            for (_, options), reason in zip(order, reasons, strict=True)
            for option in options
        ]
        return [*found_here, *self._fallbacks(entry.name, entry)]

    def _router(self, name: str, entry: ModelEntry | None) -> list[Choice]:
        learned = self._view.learned.get(name)
        if learned is None:
            names = [target.model for target in entry.targets] if entry is not None else []
            ranked = [(other, f"{name}: no routes learned, the first that can") for other in names]
            ranked = ranked or [
                (other, f"{name}: no routes learned, the best that can") for other in self._bases()
            ]
        else:
            ranked = learned.ranked(self._needs.question, name)
        found = [
            _because(reason, option, entry)
            for other, reason in ranked
            if other != name
            for option in self._options(other)
        ]
        if not found:
            return self._instead(name, entry)
        found.sort(key=lambda option: option.suits == 0)  # stable
        return [*found, *self._fallbacks(name, entry)]

    def _bases(self) -> list[str]:
        """Every base, those first that surely suit and are served now."""
        view = self._view
        names = [name for name, card in view.cards().items() if card.id == card.base]
        leaves = [(name, leaf) for name in names for leaf in self._options(name)[:1]]
        leaves.sort(key=lambda found: (-found[1].suits, not view.served(found[1].base), found[0]))
        return [name for name, _ in leaves]

    # Refusals

    def _incapable(self, asked: str) -> errors.Incapable:
        lacking = self._lacking.get(asked)
        if lacking is not None:
            text = f"model {asked[:200]!r} lacks {_joined(lacking)}"
        else:
            ways = [f"{name} lacks {_joined(missing)}" for name, missing in self._lacking.items()]
            text = f"no model behind {asked[:200]!r} can serve this: {'; '.join(ways[:8])}"
        able = {name: found[0].suits for name in self._usable() if (found := self._options(name))}
        sure = [name for name, suits in able.items() if suits == 2]
        if sure:
            hint = f"these have it: {', '.join(sure[:_MOST])}"
        elif able:
            hint = f"it is not known of these whether they have it: {', '.join(list(able)[:_MOST])}"
        else:
            hint = "no model here has it"
        return errors.Incapable(f"{text}; {hint}", param="model")

    def _usable(self) -> list[str]:
        """Names that this caller may use."""
        view = self._view
        names: Iterable[str] = {
            *(name for name, card in view.cards().items() if _plain(card)),
            *view.declared,
        }
        return sorted(name for name in names if self._may(name))


def _because(reason: str, option: Choice, entry: ModelEntry | None) -> Choice:
    latency_class = entry.latency_class if entry is not None else None
    return dataclasses.replace(
        option, why=(reason, *option.why), latency_class=latency_class or option.latency_class
    )


def _plain(card: ModelCard) -> bool:
    return card.id == card.base or not entries.split(card.id)[1]


def _joined(words: list[str]) -> str:
    return " and ".join(words)


def _no_version(entry: ModelEntry, number: int) -> str:
    there = ", ".join(str(version.number) for version in entry.versions[-8:]) or "none"
    if number:
        return f"adapter {entry.name!r} has no version {number}; there are: {there}"
    return f"adapter {entry.name!r} has no current version: push or roll back to one; there are: {there}"
