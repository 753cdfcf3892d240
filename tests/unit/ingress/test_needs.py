"""What a request needs, read from every API's form, and from garbage."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingress import language
from ingress.needs import Needs

CHAT = "/v1/chat/completions"
IMAGE = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}},
    {"type": "text", "text": "hi"},
]


@pytest.mark.parametrize(
    ("path", "body", "found"),
    [
        (CHAT, {}, {"chat"}),
        ("/v1/completions", {"prompt": "x"}, {"completions"}),
        ("/v1/embeddings", {"input": "x"}, {"embeddings"}),
        ("/tokenize", {"prompt": "x"}, set()),
        (CHAT, {"tools": [{}]}, {"chat", "tools"}),
        (CHAT, {"tools": []}, {"chat"}),
        (CHAT, {"tools": [{}], "tool_choice": "none"}, {"chat"}),
        (CHAT, {"response_format": {"type": "json_schema"}}, {"chat", "json_schema"}),
        (CHAT, {"response_format": {"type": "text"}}, {"chat"}),
        ("/v1/responses", {"text": {"format": {"type": "json_schema"}}}, {"chat", "json_schema"}),
        (CHAT, {"structured_outputs": {"json": {}}}, {"chat", "json_schema"}),
        (CHAT, {"messages": [{"role": "user", "content": IMAGE}]}, {"chat", "vision"}),
        ("/v1/responses", {"input": [{"content": [{"type": "input_image"}]}]}, {"chat", "vision"}),
        ("/v1/messages", {"messages": [{"content": [{"type": "image"}]}]}, {"chat", "vision"}),
    ],
)
def test_capabilities(path: str, body: dict[str, Any], found: set[str]) -> None:
    assert Needs(path, body).capabilities == found


@pytest.mark.parametrize(
    ("body", "opening", "question"),
    [
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}, "\0s\0q", "q"),
        ({"system": "s", "messages": [{"role": "user", "content": [{"text": "q"}]}]}, "s\0q", "q"),
        ({"instructions": "s", "input": "q"}, "s\0q", "q"),
        ({"prompt": ["q", "r"]}, "\0q", "q"),
        ({"prompt": [1, 2]}, "", ""),
    ],
)
def test_a_conversation_is_known_by_how_it_began(body: dict[str, Any], opening: str, question: str) -> None:
    needs = Needs(CHAT, body)
    assert (needs.opening, needs.question) == (opening, question)


@given(st.lists(st.text(), min_size=1), st.text())
def test_later_turns_change_neither_opening_nor_question(turns: list[str], system: str) -> None:
    messages = [{"role": "system", "content": system}]
    first: Needs | None = None
    for number, turn in enumerate(turns):
        messages.append({"role": "user" if number % 2 == 0 else "assistant", "content": turn})
        needs = Needs(CHAT, {"messages": list(messages)})
        first = first or needs
        assert (needs.opening, needs.question) == (first.opening, first.question)


def test_tokens_are_counted_low_for_refusals_and_likely_for_choices() -> None:
    needs = Needs(CHAT, {"messages": [{"content": "four short words here"}], "max_tokens": 50})
    assert needs.least_tokens == 4
    assert needs.likely_tokens == 21 // 4 + 4 + 50
    assert Needs("/v1/completions", {"prompt": [[1, 2, 3], [1]]}).least_tokens == 3
    assert Needs("/v1/completions", {"prompt": "a b c", "truncate_prompt_tokens": 2}).least_tokens == 0
    thought = "<think>" + "word " * 50 + "</think>one"
    assert Needs(CHAT, {"messages": [{"role": "assistant", "content": thought}]}).least_tokens == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "messages",
    "input",
    "prompt",
    "tools",
    "response_format",
    "text",
    "system",
    "max_tokens",
    "instructions",
]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(st.fixed_dictionaries({"content": JSON}))))
def test_garbage_needs_something_or_nothing_and_never_fails(body: dict[str, Any]) -> None:
    needs = Needs(CHAT, body)
    assert "chat" in needs.capabilities
    assert needs.least_tokens >= 0
    assert isinstance(needs.question + needs.opening, str)
    assert isinstance(needs.languages, frozenset)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Wie ist das Wetter und was soll ich mit dem Rad machen?", {"de"}),
        ("Where is the station, and how do I get to it from here?", {"en"}),
        ("Je ne sais pas si vous êtes dans la maison avec nous", {"fr"}),
        ("No sé cómo está el perro pero los gatos no se ven muy bien", {"es"}),
        ("今日の天気はどうですか", {"ja"}),
        ("오늘 날씨 어때요", {"ko"}),
        ("hello", set()),
        ("", set()),
        ("x = [1, 2, 3]; print(x)", set()),
        (
            "The house is big and the garden is for you. Das Haus ist groß und der Garten ist für dich.",
            set(),
        ),
    ],
)
def test_a_language_is_told_where_it_is_sure(text: str, found: set[str]) -> None:
    assert language.of(text) == found
    assert "zh" in language.of("今天天气怎么样")
    assert {"ru", "uk"} <= language.of("Какая сегодня погода")
