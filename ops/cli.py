"""`headrace`: the command line, and where the parts of a fleet are composed.

Only the standard library is imported here at once: each command loads what it runs, so that a sim
worker never loads torch and `--help` is quick.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ops.flags import add_adapters, add_models, add_placement, add_routes, add_sim, name, whole

if TYPE_CHECKING:
    from ops.settings import Settings

# Flags that are settings: (flag, dotted key, help). What has none is set with --set.
_FLAGS = {
    "nats": ("broker.url", "URL of the NATS server, or several with commas between"),
    "data": ("data", "directory of the queue, the demo model and the logs"),
    "log-level": ("log_level", "debug | info | warning | error"),
    "host": ("ingress.host", "address to listen on"),
    "port": ("ingress.port", "HTTP port; 0 = a free one"),
    "engine": ("worker.engine", "vllm | sim | http"),
    "model": ("vllm.model", "directory with the weights; none = the demo model"),
    "url": ("http.url", "the server that the http engine stands before"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 failed, 2 wrong flags or settings."""
    args = parser().parse_args(argv)
    flags = flags_of(args)

    from broker import errors
    from ops import settings

    try:
        loaded = settings.load(args.config, flags)
        return int(_COMMANDS[args.command](args, loaded, flags) or 0)
    except settings.SettingsError as exc:
        print(f"headrace {args.command}: the settings are wrong\n{exc}", file=sys.stderr)
        return 2
    except errors.HeadraceError as exc:
        print(f"headrace {args.command}: {exc}", file=sys.stderr)
        return 1


def flags_of(args: argparse.Namespace) -> dict[str, str]:
    """The settings among the flags: dotted key -> text."""
    flags = dict(args.set)
    for flag, (key, _) in _FLAGS.items():
        if (value := getattr(args, flag.replace("-", "_"), None)) is not None:
            flags[key] = value
    return flags


def _up(args: argparse.Namespace, settings: Settings, flags: dict[str, str]) -> int:
    from broker import processes
    from ops import autoscale, up

    if args.with_parent:
        processes.die_with_parent(signal.SIGTERM)
    workers, bounds = args.workers, None
    if args.autoscale is not None:
        bounds = autoscale.Range(*args.autoscale)
        workers = bounds.within(workers)
    options = up.Options(
        workers,
        args.ingresses,
        args.nats_host,
        args.nats_port,
        args.config,
        flags,
        autoscale=bounds,
        pool=args.pool,
    )
    return up.run(settings, options)


def _worker(args: argparse.Namespace, settings: Settings, flags: dict[str, str]) -> int:
    if args.pool is None:
        return _service(args, settings, flags)
    from ops import pool, service

    return service.run("pool", settings, pool.part(args.pool, args.config, flags), args.ready_fd)


def _service(args: argparse.Namespace, settings: Settings, _: dict[str, str]) -> int:
    from ops import parts, service

    part = args.command.replace("-", "_")
    return service.run(args.command, settings, getattr(parts, part), args.ready_fd)


def _demo_model(_: argparse.Namespace, settings: Settings, __: dict[str, str]) -> None:
    from ops import demo_model

    print(demo_model.ensure(settings.data, progress=True))


def _config(args: argparse.Namespace, settings: Settings, _: dict[str, str]) -> None:
    from ops import reference

    print(reference.markdown() if args.markdown else settings.model_dump_json(indent=2))


def _dead(args: argparse.Namespace, settings: Settings, _: dict[str, str]) -> int:
    from ops import dead

    return dead.run(args, settings.broker)


def _placement(args: argparse.Namespace, settings: Settings, _: dict[str, str]) -> int:
    from ops import placement

    return placement.run(args, settings.broker)


def _explain(args: argparse.Namespace, settings: Settings, _: dict[str, str]) -> int:
    from ops import explain

    return explain.run(args, settings.broker)


def _routes(args: argparse.Namespace, settings: Settings, _: dict[str, str]) -> int:
    from ops import routes

    return routes.run(args, settings.broker)


def _models(args: argparse.Namespace, settings: Settings, _: dict[str, str]) -> int:
    from ops import models

    return models.run(args, settings.broker)


def _adapters(args: argparse.Namespace, settings: Settings, _: dict[str, str]) -> int:
    from ops import adapters

    return adapters.run(args, settings.broker)


def _sim(args: argparse.Namespace, _: Settings, __: dict[str, str]) -> int:
    from ops.simulate import command

    return command.run(args)


_COMMANDS = {
    "up": _up,
    "ingress": _service,
    "worker": _worker,
    "scheduler": _service,
    "sim-engine": _service,
    "demo-model": _demo_model,
    "config": _config,
    "dead": _dead,
    "placement": _placement,
    "explain": _explain,
    "routes": _routes,
    "models": _models,
    "adapters": _adapters,
    "sim": _sim,
}


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", type=Path, metavar="FILE", help="settings; default ./headrace.toml")
    common.add_argument(
        "--set",
        type=_pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting, by dotted key",
    )
    _add(common, "log-level")
    joins = argparse.ArgumentParser(add_help=False)
    joins.add_argument("--ready-fd", type=int, metavar="N", help="write one JSON line there when ready")

    top = argparse.ArgumentParser(prog="headrace", description="An LLM inference platform: OpenAI over NATS.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser("up", parents=[common], help="a whole fleet on this machine")
    _add(up, "engine", "model", "url", "host", "port", "data")
    up.add_argument("--workers", type=_count, default=1, metavar="N")
    up.add_argument("--ingresses", type=_count, default=1, metavar="N", help="on --port and those after it")
    up.add_argument(
        "--nats-host",
        default="127.0.0.1",
        metavar="HOST",
        help="address of the nats-server; 0.0.0.0 lets other machines join. It asks for no password",
    )
    up.add_argument("--nats-port", type=_port, default=4222, metavar="PORT", help="0 = a free one")
    scaled = up.add_mutually_exclusive_group()
    scaled.add_argument(
        "--autoscale",
        type=_range,
        metavar="MIN:MAX",
        help="so many workers as the load asks for, within these; it begins with --workers",
    )
    _add_pool(scaled, "in place of the workers")
    up.add_argument("--with-parent", action="store_true", help="drain when the parent process ends")

    ingress = commands.add_parser("ingress", parents=[common, joins], help="serve HTTP for a fleet")
    _add(ingress, "nats", "host", "port")
    worker = commands.add_parser("worker", parents=[common, joins], help="run an engine for a fleet")
    _add(worker, "nats", "engine", "model", "url", "data")
    _add_pool(worker, "in place of one engine")
    scheduler = commands.add_parser("scheduler", parents=[common, joins], help="look after a fleet")
    _add(scheduler, "nats")
    sim = commands.add_parser("sim-engine", parents=[common, joins], help="the sim engine alone, over HTTP")
    _add(sim, "host", "port")
    model = commands.add_parser("demo-model", parents=[common], help="fetch and convert the demo model")
    _add(model, "data")
    config = commands.add_parser("config", parents=[common], help="check the settings and print them")
    config.add_argument("--markdown", action="store_true", help="print the reference of all settings instead")
    _add_dead(commands.add_parser("dead", help="requests that failed for good: look, put back, drop"), common)
    nats = argparse.ArgumentParser(add_help=False)
    _add(nats, "nats")
    models = commands.add_parser("models", help="the catalogue: bases, adapters, aliases, routers")
    add_models(models, [common, nats])
    adapters = commands.add_parser("adapters", help="LoRA adapters: push, list, roll back, remove")
    add_adapters(adapters, [common, nats])
    placement = commands.add_parser("placement", help="which worker holds which adapter, and why")
    add_placement(placement, [common, nats])
    explain = commands.add_parser(
        "explain", parents=[common, nats], help="why a request waited, and went to the worker it went to"
    )
    explain.add_argument("request", type=name, metavar="REQUEST", help="its id, as in X-Request-Id")
    explain.add_argument("--tenant", type=name, metavar="T", help="default: whoever's is the newest")
    explain.add_argument("--json", action="store_true")
    routes = commands.add_parser("routes", help="what `model: auto` and routers go by: learn, try")
    add_routes(routes, [common, nats])
    add_sim(
        commands.add_parser("sim", parents=[common], help="simulate a fleet under its dispatcher, or others")
    )
    return top


def _add_dead(dead: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    actions = dead.add_subparsers(dest="action", required=True, metavar="ACTION")

    listing = actions.add_parser("list", parents=[common], help="the newest dead letters, newest last")
    listing.add_argument("--reason", type=name, metavar="R", help="an error code, as in `dead.<reason>`")
    listing.add_argument("--tenant", metavar="T")
    listing.add_argument("--limit", type=whole, default=100, metavar="N", help="default 100")
    listing.add_argument("--json", action="store_true", help="one JSON object a line")
    show = actions.add_parser("show", parents=[common], help="everything that is known of one")
    show.add_argument("seq", type=whole, metavar="SEQ")
    show.add_argument("--body", action="store_true", help="the request's body too")
    replay = actions.add_parser("replay", parents=[common], help="put requests back into the queue")
    drop = actions.add_parser("drop", parents=[common], help="delete letters")
    drop.add_argument("--yes", action="store_true", help="don't ask")
    for action in (replay, drop):
        which = action.add_mutually_exclusive_group(required=True)
        which.add_argument("seqs", type=whole, nargs="*", default=[], metavar="SEQ")
        which.add_argument("--reason", type=name, metavar="R", help="all that died of it")
        which.add_argument("--all", action="store_true")
    for action in (listing, show, replay, drop):
        _add(action, "nats")


def _add(to: argparse.ArgumentParser, *flags: str) -> None:
    for flag in flags:
        key, text = _FLAGS[flag]
        to.add_argument(f"--{flag}", metavar=flag.upper(), help=f"{text} [{key}]")


def _add_pool(to: argparse._ActionsContainer, what: str) -> None:
    to.add_argument(
        "--pool", type=Path, metavar="FILE", help=f"an instance pool {what}: several bases that take turns"
    )


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, e.g. ingress.port=8001")
    return key, value


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not MIN:MAX, e.g. 1:4")
    bounds = _count(least), _count(most)
    if bounds[0] > bounds[1]:
        raise argparse.ArgumentTypeError(f"{text!r} has more workers at least than at most")
    return bounds


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1000")
    return int(text)
