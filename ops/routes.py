"""`headrace routes`: what `model: auto` and other routers go by, learned, listed, tried, removed."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable

from broker import base, client, entries, errors, routes, subjects
from broker.config import BrokerConfig
from broker.entries import ModelEntry
from ingress.intent import Router
from ops import logs, routes_file, routes_learn
from ops.errors import RoutesError
from ops.letters import table

_INSTALL = "pip install 'headrace[routes]'"


def run(args: argparse.Namespace, config: BrokerConfig) -> int:
    """The exit status: 0 done, 1 not."""
    logs.hold_back_broker()
    if args.action == "learn":
        file = routes_file.read(args.file)
        trained = train(file, args.router, embeddings=not args.no_embeddings)
        _judge(file, trained, args)
        if args.eval:
            return 0
        return asyncio.run(_with(config, lambda broker: _store(broker, file, trained)))
    action = {"list": _list, "show": _show, "test": _test, "remove": _remove}[args.action]
    return asyncio.run(_with(config, lambda broker: action(broker, args)))


async def _with(config: BrokerConfig, act: Callable[[base.Broker], Awaitable[int]]) -> int:
    async with await client.connect(config, "headrace routes", make_streams=False) as broker:
        return await act(broker)


def train(file: routes_file.RoutesFile, name: str, *, embeddings: bool = True) -> routes_learn.Trained:
    """Raises RoutesError where what it learns with is not installed."""
    known = None
    if embeddings:
        folder = routes_learn.installed()
        if folder is None:
            raise RoutesError(
                f"the embeddings are not installed: {_INSTALL}, or go by the examples' words alone: "
                "--no-embeddings"
            )
        known = routes_learn.embeddings(folder)
    return routes_learn.train(name, file.default, file.margin, file.routes, file.examples, known)


def _judge(file: routes_file.RoutesFile, trained: routes_learn.Trained, args: argparse.Namespace) -> None:
    names = [each.name for each in file.routes]
    meant = [names[each.route] for each in file.examples]
    guessed = [names[guess] for guess in trained.guesses]
    share = routes_file.accuracy(meant, guessed)
    print(f"{share:.1%} of {len(meant)} examples by cross-validation")
    if args.held_out is not None:
        router = Router(trained.learned, trained.tables)
        found = routes_file.labelled(args.held_out)
        meant = [each.route for each in found]
        guessed = [router.route(each.text) for each in found]
        print(f"{routes_file.accuracy(meant, guessed):.1%} of {len(meant)} texts of {args.held_out}")
    if args.eval:
        print("meant down, guessed across:")
        print(routes_file.matrix(names, routes_file.confusion(names, meant, guessed)))


async def _store(broker: base.Broker, file: routes_file.RoutesFile, trained: routes_learn.Trained) -> int:
    name = trained.learned.name

    def declared(entry: ModelEntry | None) -> ModelEntry:
        if entry is not None and entry.kind != "router":
            raise RoutesError(
                f"{name!r} is the name of a model of kind {entry.kind}: choose another --router"
            )
        targets = tuple(entries.Target(model=model) for model in file.models)
        now = int(broker.now_ms())
        if entry is None:
            return ModelEntry(name=name, kind="router", targets=targets, updated_ms=now)
        return entry.model_copy(update={"targets": targets, "updated_ms": now})

    await entries.change(broker, name, declared)
    learned = trained.learned.model_copy(update={"learned_ms": int(broker.now_ms())})
    stored = await routes.put(broker, learned, trained.tables)
    print(f"router {name}, version {stored.version}: {', '.join(r.name for r in stored.routes)}")
    for model in file.models:
        if not await _known(broker, model):
            _tell(f"no model is called {model!r} yet: its texts go to {file.default!r} until there is one")
    return 0


async def _known(broker: base.Broker, model: str) -> bool:
    name = entries.split(model)[0]
    buckets = ((subjects.KV_MODELS, model), (subjects.KV_CATALOGUE, model), (subjects.KV_CATALOGUE, name))
    for bucket, key in buckets:
        if (await broker.get(bucket, subjects.token(key))).data is not None:
            return True
    return False


async def _all(broker: base.Broker) -> dict[str, tuple[routes.Learned, bytes]]:
    found: dict[str, tuple[routes.Learned, bytes]] = {}

    def take(name: str, learned: routes.Learned | None, tables: bytes) -> None:
        if learned is not None:
            found[name] = (learned, tables)

    subscription = await routes.Watch(broker, take).start()
    await subscription.close()
    return found


async def _named(broker: base.Broker, name: str) -> tuple[routes.Learned, bytes]:
    found = await _all(broker)
    if name not in found:
        there = ", ".join(sorted(found)) or "none"
        raise errors.NotFound(f"no router is called {name!r}; there are: {there}")
    return found[name]


async def _list(broker: base.Broker, _: argparse.Namespace) -> int:
    rows = [
        (each.name, str(each.version), ", ".join(route.name for route in each.routes), each.default)
        for each, _tables in (await _all(broker)).values()
    ]
    if rows:
        print(table(["NAME", "VERSION", "ROUTES", "DEFAULT"], sorted(rows)))
    else:
        _tell("no routers: headrace routes learn FILE makes one")
    return 0


async def _show(broker: base.Broker, args: argparse.Namespace) -> int:
    learned, _ = await _named(broker, args.name)
    print(f"{learned.name}, version {learned.version}, of {learned.examples} examples")
    print(f"embeddings  {learned.embeddings or 'none, words alone'}")
    print(f"default     {learned.default}, where no route leads by {learned.margin:g}")
    print(table(["ROUTE", "MODEL"], [(route.name, route.model) for route in learned.routes]))
    return 0


async def _test(broker: base.Broker, args: argparse.Namespace) -> int:
    learned, tables = await _named(broker, args.router)
    for model, reason in Router(learned, tables).ranked(args.text, learned.name):
        print(f"{model}  ({reason})")
    return 0


async def _remove(broker: base.Broker, args: argparse.Namespace) -> int:
    gone = await routes.remove(broker, args.name)
    if not gone:
        raise errors.NotFound(f"no router is called {args.name!r}")
    entry = await entries.read(broker, args.name)
    if entry is not None and entry.kind == "router":
        await entries.change(broker, args.name, lambda _: None)
    print(f"removed {args.name}")
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
