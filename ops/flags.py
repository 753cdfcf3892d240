"""The flags of `headrace models`, `adapters`, `placement`, `routes` and `sim`. Only the standard library, as
in `ops.cli`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

Parents = Sequence[argparse.ArgumentParser]
Target = tuple[str, int]


class _Actions:
    """The actions of one command; each takes `parents`' flags."""

    def __init__(self, command: argparse.ArgumentParser, parents: Parents) -> None:
        self._made = command.add_subparsers(dest="action", required=True, metavar="ACTION")
        self._parents = list(parents)

    def add(
        self, called: str, help: str, *, named: bool = True, json: bool = False
    ) -> argparse.ArgumentParser:
        action = self._made.add_parser(called, parents=self._parents, help=help)
        if named:
            action.add_argument("name", type=name, metavar="NAME")
        if json:
            action.add_argument("--json", action="store_true", help="one JSON object a line, with everything")
        return action


def add_models(models: argparse.ArgumentParser, parents: Parents) -> None:
    actions = _Actions(models, parents)
    actions.add("list", "every name that a request may ask for", named=False, json=True)
    actions.add("show", "everything that is known of one", json=True)
    _add_set(actions.add("set", "declare what no worker tells of a model"))
    alias = actions.add("alias", "a name that leads to others, by weight")
    alias.add_argument("targets", type=target, nargs="+", metavar="TARGET[=WEIGHT]", help="support@4=10")
    router = actions.add("router", "a name whose requests are routed by what they need")
    router.add_argument("targets", type=name, nargs="+", metavar="CANDIDATE")
    remove = actions.add("remove", "an alias, a router, or what was declared of a base")
    remove.add_argument("--force", action="store_true", help="even if other names lead to it")


def _add_set(action: argparse.ArgumentParser) -> None:
    """What is left out stays as it is; `-` and 0 take it back."""
    for flag, text in (
        ("capabilities", "chat, tools, json_schema, …; -: its base's"),
        ("languages", "BCP 47: en, de, …; -: any"),
        ("tenants", "who may use it; -: everyone"),
        ("fallbacks", "models that serve when it can't, in order"),
    ):
        action.add_argument(f"--{flag}", type=names, metavar="A,B|-", help=text)
    action.add_argument("--context", type=number, metavar="N", help="tokens of prompt and answer; 0: its own")
    for part in ("input", "cached", "output"):
        action.add_argument(f"--price-{part}", type=amount, metavar="X", help="USD per million tokens")
    action.add_argument("--no-price", action="store_true", help="it has none")
    action.add_argument("--latency-class", metavar="C", help="of requests that name none; -: standard")
    action.add_argument(
        "--min-replicas", type=number, metavar="N", help="workers that keep an adapter loaded"
    )
    action.add_argument(
        "--wakes",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="its first worker is started for waiting requests, by KEDA for one: no fallback takes them",
    )
    action.add_argument("--source", metavar="TEXT", help="where it is from")
    action.add_argument("--declare", action="store_true", help="a base that no worker serves yet")


def add_adapters(adapters: argparse.ArgumentParser, parents: Parents) -> None:
    actions = _Actions(adapters, parents)
    push = actions.add("push", "check a LoRA adapter, store it as a new version, and serve it")
    push.add_argument("directory", type=Path, metavar="DIR", help="as PEFT saves it")
    push.add_argument("--base", type=name, metavar="B", help="the model that it changes")
    push.add_argument("--source", default="", metavar="TEXT", help="where it is from")
    push.add_argument("--no-activate", action="store_true", help="NAME goes on to mean the version before")
    actions.add("list", "adapters, their versions, and where they are loaded", named=False, json=True)
    actions.add("show", "versions, files and workers of one", json=True)
    rollback = actions.add("rollback", "have NAME mean an earlier version, or any")
    rollback.add_argument("version", type=whole, nargs="?", metavar="VERSION", help="default: the one before")
    remove = actions.add("remove", "a version that is not the current one, or all, and the files")
    remove.add_argument("version", type=whole, nargs="?", metavar="VERSION")
    remove.add_argument("--force", action="store_true", help="even if other names lead to it")
    sweep = actions.add("sweep", "delete files that pushes which broke off have left", named=False)
    sweep.add_argument(
        "--age", type=number, default=3600, metavar="S", help="if older than so many seconds; default 3600"
    )


def add_placement(placement: argparse.ArgumentParser, parents: Parents) -> None:
    actions = _Actions(placement, parents)
    actions.add("show", "the plan of each base, and how far the workers are", named=False, json=True)
    explain = actions.add(
        "explain", "why the plan is as it is, for all models or one", named=False, json=True
    )
    explain.add_argument("name", type=name, nargs="?", metavar="MODEL", help="a base, or an adapter")


def add_routes(routes: argparse.ArgumentParser, parents: Parents) -> None:
    actions = _Actions(routes, parents)
    learn = actions.add("learn", "learn a router from examples; it serves at once", named=False)
    learn.add_argument("file", type=Path, metavar="FILE", help="TOML, as examples/routes.toml")
    learn.add_argument("--eval", action="store_true", help="say how good it would be, and store nothing")
    learn.add_argument(
        "--held-out", type=Path, metavar="JSONL", help="try it on these: route and text a line"
    )
    learn.add_argument("--no-embeddings", action="store_true", help="go by the examples' words alone")
    actions.add("list", "the routers", named=False)
    actions.add("show", "a router's routes")
    test = actions.add("test", "where a text would go, and why", named=False)
    test.add_argument("text", metavar="TEXT")
    actions.add("remove", "forget a router")
    for action in (learn, test):
        action.add_argument("--router", type=name, default="auto", metavar="NAME", help="default auto")


def add_sim(sim: argparse.ArgumentParser) -> None:
    sim.add_argument("file", type=Path, metavar="FILE", help="TOML, as examples/fleet.toml")
    sim.add_argument(
        "--policy", type=names, metavar="A,B", help="those of the file's policies; default: all that it names"
    )
    sim.add_argument("--scale", type=factor, metavar="X", help="so many times the requests a second")
    sim.add_argument("--json", action="store_true", help="one JSON object, with each class and tenant")
    sim.add_argument("--plots", type=Path, metavar="DIR", help="draw them there too; needs matplotlib")


def name(given: str) -> str:
    if not given:
        raise argparse.ArgumentTypeError("it must not be empty")
    return given


def names(given: str) -> list[str]:
    """`a,b`; `-` is none."""
    found = [] if given == "-" else [name.strip() for name in given.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{given!r} is not a list of names with commas between, or -")
    return list(dict.fromkeys(found))


def target(given: str) -> Target:
    """`<model>=<weight>`, or `<model>` of weight 1."""
    model, equals, weight = given.rpartition("=")
    if not (equals and weight.isdecimal()):
        return name(given), 1
    if not model or len(weight) > 6:
        raise argparse.ArgumentTypeError(f"{given!r} is not TARGET=WEIGHT, with a weight from 0 to 999999")
    return model, int(weight)


def number(given: str) -> int:
    if not given.isdecimal() or len(given) > 9:
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number from 0 on")
    return int(given)


def factor(given: str) -> float:
    value = amount(given)
    if not value:
        raise argparse.ArgumentTypeError(f"{given!r} is not a number above 0, such as 1.5")
    return value


def whole(given: str) -> int:
    if not given.isdecimal() or len(given) > 18 or int(given) < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is not a whole number from 1 on")
    return int(given)


def amount(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not (value >= 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{given!r} is not an amount from 0 on, such as 0.15")
    return value
