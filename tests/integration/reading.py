"""Clients that read streams, and come back for the rest."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.waiting import LIMIT

CHAT = "/v1/chat/completions"


def connected(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=LIMIT, trust_env=False)


def chat(content: str, tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"model": "sim", "max_tokens": tokens, "stream": True, "messages": messages} | more


def where(request_id: str) -> str:
    return f"/v1/requests/{request_id}/stream"


class Reader:
    """An SSE client: the data of each whole event, the id of the last, and how many comments came."""

    def __init__(self) -> None:
        self.data: list[bytes] = []
        self.comments = 0
        self.last = ""
        self._rest = b""

    def feed(self, part: bytes) -> None:
        *blocks, self._rest = (self._rest + part).split(b"\n\n")
        for block in blocks:
            for line in block.split(b"\n"):
                name, _, value = line.partition(b": ")
                if name == b"data":
                    self.data.append(value)
                elif name == b"id":
                    self.last = value.decode()
                elif not name and value:
                    self.comments += 1

    async def read(
        self, http: httpx.AsyncClient, method: str, url: str, until_events: float = float("inf"), **more: Any
    ) -> httpx.Response:
        """Read on to the end, or leave once there are that many events."""
        async with http.stream(method, url, **more) as response:
            assert response.status_code == 200, await response.aread()
            async for part in response.aiter_raw():
                self.feed(part)
                if len(self.data) >= until_events:
                    break
        self._rest = b""
        return response

    async def resume(self, http: httpx.AsyncClient, request_id: str, **more: Any) -> httpx.Response:
        headers = {"Last-Event-ID": self.last} if self.last else {}
        return await self.read(http, "GET", where(request_id), headers=headers, **more)

    @property
    def text(self) -> str:
        *chunks, done = self.data
        assert done == b"[DONE]"
        deltas = (choice["delta"] for chunk in chunks for choice in json.loads(chunk)["choices"])
        return "".join(delta.get("content") or "" for delta in deltas)
