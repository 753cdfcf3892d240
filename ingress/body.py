"""The texts, images and turns of a request's body, in whichever API's form, read once and within bounds: a
body may hold millions of messages, and whoever reads it holds up every other request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_IMAGES = ("image_url", "input_image", "image", "video_url", "input_video")
_MOST_TEXT = 4000
"""Characters of a text that are looked at for its language or intent, half from each end: what is asked
stands before or after what it is asked of."""
_MOST_ITEMS = 10_000
"""Messages, parts and prompts of one body that are read, all together: some 10 ms."""
_MOST_MARKED = 1000
"""Values that tell one beginning without text from another."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: `content` as it stands, `text` what there is to read of it."""

    role: str
    text: str
    content: Any


class Reading:
    """What was read of a body.

    Attributes:
        system: texts of what the model is told before the conversation.
        turns: the messages.
        prompts: bare prompts, each a sequence of its own.
        image: whether there is an image or video.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = _MOST_ITEMS
        self.image = False
        self.system = [*self._texts(body.get("instructions")), *self._texts(body.get("system"))]
        self.turns: list[Turn] = []
        self.prompts: list[str] = []
        for name in ("messages", "prompt", "input"):
            value = body.get(name)
            if isinstance(value, str) and name != "messages":
                self.prompts.append(value)
            for item in self._items(value):
                if isinstance(item, dict) and name != "prompt":
                    self.turns.append(self._turn(item))
                elif isinstance(item, str) and name != "messages":
                    self.prompts.append(item)

    def _items(self, value: object) -> Iterator[Any]:
        for item in value if isinstance(value, list) else ():
            if not self._left:
                return
            self._left -= 1
            yield item

    def _turn(self, message: Mapping[str, Any]) -> Turn:
        role, content = message.get("role", "user"), message.get("content")
        text = " ".join(self._texts(content))
        self._look(message.get("output"))  # of a tool, in OpenAI's Responses
        if role == "assistant":
            text = text.rpartition("</think>")[2]  # chat templates drop what a model thought at earlier turns
        return Turn(role if isinstance(role, str) else "", text, content)

    def _texts(self, content: object) -> list[str]:
        if isinstance(content, str):
            return [content]
        found = []
        for part in self._items(content):
            if isinstance(part, dict):
                self.image = self.image or part.get("type") in _IMAGES
                self._look(part.get("content"))  # of a tool's result, in Anthropic's Messages
                if isinstance(text := part.get("text"), str):
                    found.append(text)
        return found

    def _look(self, parts: object) -> None:
        for part in self._items(parts):
            self.image = self.image or (isinstance(part, dict) and part.get("type") in _IMAGES)


def cut(text: str) -> str:
    half = _MOST_TEXT // 2
    return text if len(text) <= _MOST_TEXT else f"{text[:half]} {text[-half:]}"


def mark(value: object) -> str:
    """What tells a JSON value from others, bounded: its first leaves, and of long texts length and ends."""
    found: list[str] = []
    waiting = [iter([value])]
    while waiting and len(found) < _MOST_MARKED:
        each = next(waiting[-1], _END)
        if each is _END:
            waiting.pop()
        elif isinstance(each, dict):
            found.append("{")
            waiting.append(iter(each.values()))
        elif isinstance(each, list):
            found.append("[")
            waiting.append(iter(each))
        elif isinstance(each, str):
            found.append(f"{len(each)} {cut(each)}")
        else:
            found.append(str(each))
    return "\0".join(found)


_END = object()
