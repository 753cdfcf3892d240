"""`headrace up` with sim workers: one command, one tree of processes, nothing left behind."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import LIMIT

READY = re.compile(r"ready  (\S+)  (nats://\S+:\d+)  model (\S+)\n")


@dataclass
class Up:
    process: subprocess.Popen[str]
    urls: list[str]
    nats: str
    model: str
    curl: str

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def part(self, name: str) -> psutil.Process:
        return next(p for p in self.tree() if f" {name} " in " ".join([*p.cmdline(), ""]))


def command(data: Path, *arguments: str) -> list[str]:
    own = ["--engine", "sim", "--port", "0", "--nats-port", "0", "--data", str(data)]
    return [sys.executable, "-m", "ops", "up", *own, *arguments]


@contextlib.contextmanager
def running(data: Path, *arguments: str) -> Iterator[Up]:
    data.mkdir(exist_ok=True)
    with (data / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command(data, *arguments), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    tree: list[psutil.Process] = []
    try:
        line = process.stdout.readline()
        ready = READY.fullmatch(line)
        assert ready, f"no ready line but {line!r}: {(data / 'stderr').read_text()}"
        up = Up(process, ready[1].split(","), ready[2], ready[3], process.stdout.readline())
        tree = up.tree()
        yield up
    finally:
        process.kill()
        process.wait(LIMIT)
        process.stdout.close()
    gone(tree)


def wait(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < limit, f"never came true: {inspect.getsource(condition).strip()}"
        time.sleep(0.01)


def gone(processes: list[psutil.Process]) -> None:
    """Wait until all have ended. A zombie has ended; who must reap it is gone."""
    wait(lambda: not any(alive(process) for process in processes))


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def complete(
    url: str, model: str, tokens: int = 3, timeout: float = LIMIT, service_tier: str = "auto"
) -> dict[str, Any]:
    body = {"model": model, "max_tokens": tokens, "messages": [{"role": "user", "content": "hello"}]}
    body["service_tier"] = service_tier
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        answer = json.load(response)
    assert isinstance(answer, dict)
    return answer


def test_one_command_serves_and_tells_how_to_call_it(tmp_path: Path) -> None:
    with running(tmp_path / "data") as up:
        assert up.model == "sim"
        assert complete(up.urls[0], up.model)["usage"]["completion_tokens"] == 3
        curl = shlex.split(up.curl)
        assert curl[:3] == ["curl", "-N", f"{up.urls[0]}/v1/chat/completions"]
        assert json.loads(curl[-1])["model"] == "sim"
        assert {p.cmdline()[4] for p in up.tree() if "ops" in p.cmdline()} == {
            "ingress",
            "worker",
            "scheduler",
        }


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_leaves_nothing(tmp_path: Path, sig: signal.Signals) -> None:
    with running(tmp_path / "data", "--log-level", "info") as up:
        tree = up.tree()
        up.process.send_signal(sig)
        assert up.process.wait(LIMIT) == 0
        assert not any(alive(process) for process in tree)
    log = [json.loads(line) for line in (tmp_path / "data/stderr").read_text().splitlines()[1:]]
    ended = [line["msg"].split()[0] for line in log if line["msg"].endswith(" ended")]
    assert ended == ["ingress", "worker", "scheduler"]


def test_sigkill_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "data") as up:
        tree = up.tree()
        up.process.kill()
        gone(tree)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    slow = ["--set", "sim.ttft_ms=20000", "--set", "sim.itl_ms=20000", "--set", "ingress.keepalive=0.1"]
    with running(tmp_path / "data", *slow) as up:
        host, port = up.urls[0].removeprefix("http://").split(":")
        body = b'{"model": "sim", "stream": true, "prompt": "x"}'
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert client.recv(12) == b"HTTP/1.1 200"
            tree = up.tree()
            up.process.send_signal(signal.SIGTERM)
            told(tmp_path / "data/stderr", "draining; a second signal ends it at once")
            up.process.send_signal(signal.SIGTERM)
            assert up.process.wait(LIMIT) == 128 + signal.SIGTERM
            gone(tree)


def told(log: Path, text: str) -> None:
    wait(lambda: text in log.read_text())


def test_open_streams_finish_before_it_ends(tmp_path: Path) -> None:
    pace = ["--set", "sim.ttft_ms=50", "--set", "sim.itl_ms=50"]
    with running(tmp_path / "data", *pace) as up:
        body = {"model": "sim", "stream": True, "max_tokens": 30, "prompt": "x"}
        request = urllib.request.Request(
            f"{up.urls[0]}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=LIMIT) as stream:
            assert stream.readline().startswith(b"data: ")
            up.process.send_signal(signal.SIGTERM)
            assert b"data: [DONE]" in stream.read()
        assert up.process.wait(LIMIT) == 0


@pytest.mark.parametrize("part", ["worker", "ingress", "nats-server"])
def test_a_part_that_dies_is_started_again(tmp_path: Path, part: str) -> None:
    with running(tmp_path / "data") as up:
        if part == "nats-server":
            victim = next(p for p in up.tree() if p.name() == "nats-server")
        else:
            victim = up.part(part)
        victim.kill()
        limit = time.monotonic() + LIMIT
        while True:
            try:
                complete(up.urls[0], up.model, timeout=5)
                break
            except OSError:
                assert time.monotonic() < limit
                time.sleep(0.05)
        assert up.process.poll() is None
        assert "ended; starting it again" in (tmp_path / "data/stderr").read_text()


def test_several_workers_and_ingresses(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--workers", "2", "--ingresses", "2") as up:
        assert len(up.urls) == 2
        for url in up.urls:
            complete(url, up.model)
        assert sum(" worker " in " ".join(p.cmdline()) for p in up.tree()) == 2


def test_a_second_start_uses_what_is_there(tmp_path: Path) -> None:
    for _ in range(2):
        with running(tmp_path / "data") as up:
            complete(up.urls[0], up.model)
            up.process.send_signal(signal.SIGTERM)
            assert up.process.wait(LIMIT) == 0


def failing(data: Path, *arguments: str) -> str:
    done = subprocess.run(
        command(data, *arguments), capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("flag", ["--port", "--nats-port"])
def test_a_taken_port_is_named_with_its_flag(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = failing(tmp_path, flag, port)
        assert f"port {port} on 127.0.0.1 can't be used" in error
        assert f"name another with {flag}," in error


def test_a_data_directory_in_use_is_told(tmp_path: Path) -> None:
    with running(tmp_path / "data"):
        assert "in use by a live nats-server" in failing(tmp_path / "data")


def test_a_data_directory_that_cannot_be_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert f"{file}/data" in failing(file / "data")


def test_a_part_that_cannot_start_shows_why(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = failing(tmp_path, "--set", f"worker.metrics_port={port}")
    assert "worker ended 3 times before the fleet was ready" in error
    assert error.count(f"port {port} on 127.0.0.1 can't be used (Address already in use)") == 3


def test_other_machines_may_join(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--nats-host", "0.0.0.0") as up:
        host, _, port = up.nats.removeprefix("nats://").rpartition(":")
        assert host == socket.gethostname()
        server = next(p for p in up.tree() if p.name() == "nats-server")
        listening = [c.laddr for c in server.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert any(address.port == int(port) and address.ip in ("0.0.0.0", "::") for address in listening)
        complete(up.urls[0], up.model)


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 loopback here")
def test_serves_on_ipv6(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--host", "::1", "--nats-host", "::1") as up:
        assert up.urls[0].startswith("http://[::1]:")
        assert up.nats.startswith("nats://[::1]:")
        complete(up.urls[0], up.model)


def test_every_part_says_where_its_metrics_are(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--workers", "2") as up:
        file = tmp_path / "data/metrics.json"

        def metrics() -> dict[str, str]:
            return {group["labels"]["part"]: group["targets"][0] for group in json.loads(file.read_text())}

        wait(lambda: metrics().keys() == {"ingress", "worker", "worker-2", "scheduler"})
        for part, target in metrics().items():
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=LIMIT) as answer:
                assert b"\nheadrace_" in answer.read(), part
        before = metrics()["worker"]
        up.part("worker").kill()
        wait(lambda: metrics()["worker"] != before)
        with urllib.request.urlopen(f"http://{metrics()['worker']}/metrics", timeout=LIMIT) as answer:
            assert b"headrace_running" in answer.read()


POOL = """
[pool]
name = "p"
memory = 1
idle_least = 600
lost_after = 0.3
turn_factor = 0
[[base]]
name = "one"
engine = "sim"
hot_bytes = 1
[[base]]
name = "two"
engine = "sim"
hot_bytes = 1
"""


def test_a_pool_in_place_of_the_workers(tmp_path: Path) -> None:
    (tmp_path / "pool.toml").write_text(POOL)
    with running(tmp_path / "data", "--pool", str(tmp_path / "pool.toml")) as up:
        assert up.model == "one"
        assert "worker.name=p-one" not in " ".join(word for p in up.tree() for word in p.cmdline())
        for model in ("one", "two", "one"):
            assert complete(up.urls[0], model)["model"] == model
        targets = json.loads((tmp_path / "data/metrics.json").read_text())
        assert {group["labels"]["part"] for group in targets} == {"ingress", "pool", "scheduler"}
        engines = json.loads((tmp_path / "data/metrics-p.json").read_text())
        assert [group["labels"]["part"] for group in engines] == ["p-one"]
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(LIMIT) == 0


def test_a_pool_file_with_a_mistake_is_told(tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(POOL.replace("hot_bytes = 1", "hot_bytes = 2", 1))
    made = subprocess.run(
        command(tmp_path / "data", "--pool", str(file)), capture_output=True, text=True, timeout=LIMIT
    )
    assert made.returncode == 2
    assert "base one: it takes 2 bytes, and pool.memory = 1" in made.stderr


def test_the_logs_of_the_last_run_are_kept_and_no_others(tmp_path: Path) -> None:
    logs = tmp_path / "data/logs"
    runs = []
    for _ in range(3):
        with running(tmp_path / "data") as up:
            runs.append(up.part("worker").pid)
            up.process.send_signal(signal.SIGTERM)
            assert up.process.wait(LIMIT) == 0
    names = {f"{name}.log{old}" for name in ("ingress", "nats", "scheduler", "worker") for old in ("", ".1")}
    assert {path.name for path in logs.iterdir()} == names
    for log, pid in (("worker.log.1", runs[1]), ("worker.log", runs[2])):
        assert {json.loads(line)["pid"] for line in (logs / log).read_text().splitlines()} == {pid}
    assert (logs / "nats.log").read_text().count("Server is ready") == 1


def test_drains_with_its_parent(tmp_path: Path) -> None:
    data = tmp_path / "data"
    code = (
        "import subprocess, sys\n"
        "up = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)\n"
        "print(up.pid, up.stdout.readline().decode(), flush=True)\n"
        "up.wait()\n"
    )
    arguments = [sys.executable, "-c", code, *command(data, "--with-parent")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        up = psutil.Process(int(parent.stdout.readline().split()[0]))
        tree = [up, *up.children(recursive=True)]
        assert len(tree) >= 5
        os.kill(parent.pid, signal.SIGKILL)
    gone(tree)


def test_it_tells_the_steps_of_its_pools_and_who_gives_way(tmp_path: Path) -> None:
    slow = [f"sim.{key}" for key in ("max_num_seqs=1", "beta0=20", "beta1=0", "beta2=0")]
    sets = [part for setting in slow for part in ("--set", setting)]
    with running(tmp_path / "data", *sets) as up, ThreadPoolExecutor() as threads:

        def said(text: str) -> list[dict[str, Any]]:
            _, *lines = (tmp_path / "data" / "stderr").read_text().splitlines()
            return [line for line in map(json.loads, lines) if text in line["msg"]]

        wait(lambda: bool(said("interactive, standard, batch requests: 1 workers, whose steps take up to ")))
        long = threads.submit(complete, up.urls[0], up.model, 150, service_tier="batch")
        wait(lambda: metric(tmp_path, "headrace_dispatched_total") == 1)
        urgent = complete(up.urls[0], up.model, 3, service_tier="interactive")
        assert urgent["usage"]["completion_tokens"] == 3
        assert not long.done()
        (line,) = said(
            "a batch request is to give way, and to go on later: request 2, interactive, needs its room"
        )
        assert line["worker"]
        assert long.result(LIMIT)["usage"]["completion_tokens"] == 150
        assert metric(tmp_path, "headrace_preempted_total") == 1
        assert metric(tmp_path, 'headrace_step_seconds{base="sim",class="interactive"}') > 0


def metric(tmp_path: Path, name: str) -> float:
    """Of the scheduler."""
    targets = json.loads((tmp_path / "data" / "metrics.json").read_text())
    (target,) = (each["targets"][0] for each in targets if each["labels"]["part"] == "scheduler")
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=LIMIT) as response:
        lines = response.read().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)
