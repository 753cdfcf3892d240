"""The checker sees what is wrong: each test corrupts an answer that it passes otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from tests.chaos.check import Ask, End, Problem, Silence, Tokens, Transcript, check, recovery_gap
from workers.engines import sim

PACE = 0.02


def answer(choices: int = 1, tokens: int = 30, path: str = "/v1/chat/completions") -> Transcript:
    """A complete answer, a token an event, the choices by turns."""
    ask = Ask("r1", path, "why?", tokens, choices)
    seen = Transcript(ask, started=100.0, ended=110.0, end=End.COMPLETE, dones=1)
    expected = [ask.expected(choice) for choice in range(choices)]
    for number in range(tokens):
        for choice in range(choices):
            token = expected[choice][number]
            at = 101.0 + number * PACE
            seen.tokens.append(Tokens(at, choice, (token,), sim.text_of([token])))
    seen.finishes = [(choice, "length") for choice in range(choices)]
    prompt, output = len(ask.prompt_ids), tokens * choices
    seen.usages = [
        {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output, "more": 1}
    ]
    return seen


def found(seen: Transcript) -> dict[str, int]:
    return {problem.kind: problem.tokens for problem in check(seen)}


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_right_answer_passes(choices: int, path: str) -> None:
    assert check(answer(choices, path=path)) == []


def test_tokens_that_come_many_at_once_pass() -> None:
    seen = answer()
    ids = tuple(token for part in seen.tokens for token in part.ids)
    seen.tokens = [Tokens(101.0, 0, ids, sim.text_of(ids))]
    assert check(seen) == []


def test_what_the_sim_answers_is_what_is_expected() -> None:
    ask = Ask("r1", "/v1/chat/completions", "why?", 3)
    assert ask.expected(0) == sim.expected_tokens(sim.tokenize("<|user|>why?\n<|assistant|>"), 3)
    plain = dataclasses.replace(ask, path="/v1/completions")
    assert plain.expected(1) == sim.expected_tokens(sim.tokenize("why?"), 3, 1)


def lose_one(seen: Transcript) -> None:
    del seen.tokens[7]


def lose_the_first(seen: Transcript) -> None:
    del seen.tokens[:2]


def lose_the_last(seen: Transcript) -> None:
    del seen.tokens[-3:]


def lose_all(seen: Transcript) -> None:
    seen.tokens.clear()


def double_one(seen: Transcript) -> None:
    seen.tokens.insert(8, seen.tokens[7])


def double_all(seen: Transcript) -> None:
    seen.tokens *= 2


def swap_two(seen: Transcript) -> None:
    seen.tokens[7], seen.tokens[8] = seen.tokens[8], seen.tokens[7]


def another_answers_token(seen: Transcript) -> None:
    token = sim.expected_tokens(sim.tokenize("another prompt"), 8)[7]
    seen.tokens[7] = Tokens(seen.tokens[7].at, 0, (token,), sim.text_of([token]))


def text_without_its_token(seen: Transcript) -> None:
    seen.tokens.insert(3, Tokens(seen.tokens[2].at, 0, (), " and"))


def token_without_its_text(seen: Transcript) -> None:
    seen.tokens[7] = seen.tokens[7]._replace(text="")


def no_usage(seen: Transcript) -> None:
    seen.usages.clear()


def usage_twice(seen: Transcript) -> None:
    seen.usages *= 2


def usage_of_the_last_part_only(seen: Transcript) -> None:
    seen.usages = [seen.usages[0] | {"completion_tokens": 12}]


def prompt_grown_by_a_continuation(seen: Transcript) -> None:
    seen.usages = [seen.usages[0] | {"prompt_tokens": 99}]


def no_done(seen: Transcript) -> None:
    seen.dones = 0


def done_twice(seen: Transcript) -> None:
    seen.dones = 2


def finished_twice(seen: Transcript) -> None:
    seen.finishes *= 2


def stopped_early(seen: Transcript) -> None:
    seen.finishes = [(0, "stop")]


@pytest.mark.parametrize(
    ("corrupt", "problems"),
    [
        (lose_one, {"lost": 1}),
        (lose_the_first, {"lost": 2}),
        (lose_the_last, {"lost": 3}),
        (lose_all, {"lost": 30}),
        (double_one, {"doubled": 1}),
        (double_all, {"doubled": 30}),
        (swap_two, {"reordered": 1}),
        (another_answers_token, {"lost": 1, "foreign": 1}),
        (text_without_its_token, {"text": 1}),
        (token_without_its_text, {"text": 1}),
        (no_usage, {"usage": 1}),
        (usage_twice, {"usage": 1}),
        (usage_of_the_last_part_only, {"usage": 1}),
        (prompt_grown_by_a_continuation, {"usage": 1}),
        (no_done, {"done": 1}),
        (done_twice, {"done": 1}),
        (finished_twice, {"finish": 1}),
        (stopped_early, {"finish": 1}),
    ],
)
def test_a_corrupted_answer_does_not(corrupt: Callable[[Transcript], None], problems: dict[str, int]) -> None:
    seen = answer()
    corrupt(seen)
    assert found(seen) == problems


def test_choices_are_told_apart() -> None:
    seen = answer(choices=2)
    seen.tokens[6] = seen.tokens[6]._replace(choice=1)
    assert {(p.kind, p.tokens) for p in check(seen)} == {("lost", 1), ("foreign", 1)}
    stray = answer(choices=2)
    stray.tokens.append(stray.tokens[0]._replace(choice=2))
    assert found(stray) == {"foreign": 1}


class TestAnAnswerThatIsNotComplete:
    @pytest.mark.parametrize("end", [End.INTERRUPTED, End.HUNG])
    def test_is_a_problem_of_its_own(self, end: End) -> None:
        seen = answer()
        seen.end, seen.fault = end, "worker_lost"
        del seen.tokens[10:]
        assert check(seen) == [Problem(str(end), 1, "worker_lost")]

    def test_never_ended(self) -> None:
        seen = answer()
        seen.end = None
        assert found(seen) == {"unended": 1}

    def test_may_be_left_midway_but_not_with_a_hole(self) -> None:
        seen = answer()
        seen.end = End.LEFT
        del seen.tokens[10:]
        assert check(seen) == []
        del seen.tokens[4]
        assert found(seen) == {"lost": 1}

    def test_may_be_refused_but_not_after_output(self) -> None:
        seen = answer()
        seen.end, seen.fault = End.REFUSED, "overloaded"
        assert found(seen) == {"interrupted": 1}
        seen.tokens.clear()
        assert check(seen) == []


def gap(seen: Transcript, fault_at: float, within: float, still: Sequence[Silence] = ()) -> float:
    found = recovery_gap(seen, fault_at, PACE, within, still)
    assert found is not None
    return found.seconds


class TestTheRecoveryGap:
    def test_is_the_silence_around_the_fault_less_the_pace(self) -> None:
        seen = answer()
        seen.tokens[10:] = [part._replace(at=part.at + 0.7) for part in seen.tokens[10:]]
        fault_at = seen.tokens[9].at + 0.001
        assert gap(seen, fault_at, within=0.5) == pytest.approx(0.7)

    def test_may_begin_a_moment_after_the_fault(self) -> None:
        seen = answer()
        seen.tokens[15:] = [part._replace(at=part.at + 0.7) for part in seen.tokens[15:]]
        assert gap(seen, seen.tokens[5].at, within=0.5) == pytest.approx(0.7)
        assert gap(seen, seen.tokens[5].at, within=0.1) == pytest.approx(0.0)

    def test_does_not_count_what_could_not_come(self) -> None:
        """However late the silence begins in that time, and whatever else struck meanwhile."""
        seen = answer()
        seen.tokens[10:] = [part._replace(at=part.at + 2.0) for part in seen.tokens[10:]]
        began, fault_at = seen.tokens[9].at, seen.tokens[9].at + 0.3
        assert gap(seen, fault_at, 0.5, [Silence(1.5, began + 1.5)]) == pytest.approx(0.5)
        assert gap(seen, fault_at, 0.5, [Silence(1.5, began + 1.2)]) == pytest.approx(0.8)
        assert gap(seen, fault_at, 0.5, [Silence(1.5, began + 9.0)]) == pytest.approx(2.0)

    def test_needs_a_token_before_and_one_after(self) -> None:
        seen = answer()
        assert recovery_gap(seen, seen.tokens[0].at - 0.1, PACE, within=0.5) is None
        assert recovery_gap(seen, seen.tokens[-1].at + 0.1, PACE, within=0.5) is None
        seen.tokens.clear()
        assert recovery_gap(seen, 101.0, PACE, within=0.5) is None
