"""What a request needs, read from every API's form, and from garbage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import orjson
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
        (
            "/v1/messages",
            {"messages": [{"content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
            {"chat", "vision"},
        ),
        (
            "/v1/responses",
            {"input": [{"type": "function_call_output", "output": [{"type": "input_image"}]}]},
            {"chat", "vision"},
        ),
        ("/v1/messages", {"tools": [{}], "tool_choice": {"type": "none"}}, {"chat"}),
        ("/v1/messages", {"tools": [{}], "tool_choice": {"type": "any"}}, {"chat", "tools"}),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema"}}}, {"chat", "json_schema"}),
        (CHAT, {"functions": [{"name": "f"}]}, {"chat", "tools"}),
        (CHAT, {"functions": [{"name": "f"}], "function_call": "none"}, {"chat"}),
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


@pytest.mark.parametrize(("path", "name"), [("/v1/embeddings", "input"), ("/v1/completions", "prompt")])
def test_of_several_prompts_the_longest_counts(path: str, name: str) -> None:
    needs = Needs(path, {name: ["four short words here", *["two words"] * 1000]})
    assert (needs.least_tokens, needs.likely_tokens) == (4, 21 // 4 + 4)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_what_is_only_counted_needs_no_context(path: str) -> None:
    body = {"messages": [{"content": "word " * 100}], "tokens": [1] * 100, "max_tokens": 5}
    assert (Needs(path, body).least_tokens, Needs(path, body).likely_tokens) == (0, 0)


def test_an_answer_of_any_length_is_a_number_for_json() -> None:
    needs = Needs(CHAT, {"messages": [], "max_tokens": 2**64 - 1})
    assert needs.likely_tokens == 2**31


class Counted(list[Any]):
    """A list that counts how many of its items were looked at."""

    seen = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            Counted.seen += 1
            yield item


@pytest.mark.parametrize(
    "body",
    [
        {"messages": Counted([{}] * 50_000)},
        {"messages": Counted([{"content": Counted([{"text": "a"}] * 5000)}] * 20)},
        {"prompt": Counted(["a"] * 50_000)},
        {"prompt": Counted([0] * 50_000)},
        {"input": Counted([[0]] * 50_000)},
        {"messages": Counted([0] * 50_000)},
        {"system": Counted([{"content": Counted([{}] * 5000)}] * 20)},
    ],
)
def test_a_body_of_very_many_items_is_read_up_to_a_bound(body: dict[str, Any]) -> None:
    Counted.seen = 0
    needs = Needs(CHAT, body)
    assert needs.capabilities
    assert needs.least_tokens >= 0
    assert needs.likely_tokens >= 0
    assert isinstance(needs.opening + needs.question, str)
    assert Counted.seen <= 4 * 10_000


@pytest.mark.parametrize(
    "of",
    [
        lambda n: {"prompt": [7, n]},
        lambda n: {"prompt": [[7, n]]},
        lambda n: {"messages": [{"content": [{"type": "image_url", "image_url": {"url": f"data:{n}"}}]}]},
        lambda n: {"previous_response_id": f"resp_{n}"},
    ],
)
def test_conversations_that_begin_without_text_are_told_apart(of: Callable[[int], dict[str, Any]]) -> None:
    assert len({Needs(CHAT, of(n)).opening for n in range(9)}) == 9
    first, more = of(1), [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    later = {**first, "messages": [*first["messages"], *more]} if "messages" in first else first
    assert Needs(CHAT, first).opening == Needs(CHAT, later).opening


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
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
    assert 2 * needs.least_tokens <= len(orjson.dumps(body))


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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("今日の天気はどうですか", {"ja"}),
        ("今日の天気 weather はどうですか", set()),
        ("Please translate to English: Какая сегодня погода в городе", set()),
        ("Wat is die beste manier om die hond te leer om nie op die bed te slaap nie", set()),
        ("Translate: el perro está en la casa y no se lo que es para el", set()),
        ("Какая сегодня погода 今", set()),
    ],
)
def test_only_a_script_of_its_own_is_sure(text: str, found: set[str]) -> None:
    assert Needs(CHAT, {"prompt": text}).sure_languages == found
    assert Needs(CHAT, {"prompt": text}, declared="de").sure_languages == {"de"}
    assert {"ru", "uk"} <= language.surely("Какая сегодня погода?")
