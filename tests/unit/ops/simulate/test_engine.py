"""The simulator's engine against the step model that it leaps over: the same tokens at the same times."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.simulate.engine import Engine
from workers.config import SimConfig
from workers.engines.step_model import Sequence, State, StepModel, block_hashes


def config(**changes: object) -> SimConfig:
    small = {"kv_blocks": 24, "block_size": 4, "context_tokens": 96, "max_num_batched_tokens": 16}
    return SimConfig.model_validate(small | {"max_num_seqs": 6, "beta3": 0.07, "beta4": 0.3} | changes)


@dataclass(frozen=True)
class Ask:
    """A request: it comes at `at`, and is aborted at `leaves`, if it runs then."""

    at: float
    prompt: int
    output: int
    family: int = 0
    adapter: str = ""
    leaves: float | None = None

    def sequence(self, number: int) -> Sequence:
        """The first half of its prompt is its family's, the rest its own."""
        ids = [self.family] * (self.prompt // 2) + [10 + number] * (self.prompt - self.prompt // 2)
        return Sequence(self.prompt, self.output, block_hashes(ids, 4), self.adapter)


@dataclass
class Seen:
    """What became of each request."""

    first: dict[int, float] = field(default_factory=dict)
    end: dict[int, float] = field(default_factory=dict)
    made: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int | None] = field(default_factory=dict)
    steps: int = 0
    preemptions: int = 0

    def note(self, number: int, seq: Sequence, now: float) -> None:
        if seq.generated >= 1 and number not in self.first:
            self.first[number] = now
        if seq.state is State.FINISHED:
            self.end[number] = now

    def close(self, seqs: list[Sequence]) -> Seen:
        self.made = {number: seq.generated for number, seq in enumerate(seqs)}
        self.cached = {number: seq.cached for number, seq in enumerate(seqs)}
        return self

    def check(self, other: Seen) -> None:
        """It is the same, but for times' rounding."""
        assert self.first == pytest.approx(other.first, abs=1e-9)
        assert self.end == pytest.approx(other.end, abs=1e-9)
        assert replace(self, first={}, end={}) == replace(other, first={}, end={})


def events(asks: list[Ask]) -> list[tuple[float, int, bool]]:
    """(when, request, whether it comes) in order of time."""
    come = [(ask.at, number, True) for number, ask in enumerate(asks)]
    go = [(ask.leaves, number, False) for number, ask in enumerate(asks) if ask.leaves is not None]
    return sorted(come + go)


def by_steps(asks: list[Ask], conf: SimConfig) -> Seen:
    """One step after another."""
    model: StepModel[Sequence] = StepModel(conf)
    seqs = [ask.sequence(number) for number, ask in enumerate(asks)]
    seen, now, queue = Seen(), 0.0, events(asks)
    while queue or model.running or model.waiting:
        step = model.begin()
        end = now + step.duration_ms / 1000 if step is not None else queue[0][0]
        while queue and queue[0][0] <= end:
            _, number, comes = queue.pop(0)
            if comes:
                model.add(seqs[number])
            else:
                model.abort(seqs[number])
        now = end
        for seq in model.finish():
            seen.note(seqs.index(seq), seq, now)
        model.check()
    seen.steps, seen.preemptions = model.steps, model.preemptions
    return seen.close(seqs)


def by_leaps(asks: list[Ask], conf: SimConfig) -> Seen:
    engine: Engine[Sequence] = Engine(conf)
    seqs = [ask.sequence(number) for number, ask in enumerate(asks)]
    seen, queue = Seen(), events(asks)
    while queue or not engine.idle:
        if queue and queue[0][0] <= engine.ends:
            now, number, comes = queue.pop(0)
            if comes:
                engine.add(seqs[number], now)
            else:
                engine.abort(seqs[number], now)
            if not engine.idle or (queue and queue[0][0] == now):
                continue
        else:
            now = engine.ends
            for seq in engine.finish():
                seen.note(seqs.index(seq), seq, now)
        engine.begin(now)
        engine.model.check()
    seen.steps, seen.preemptions = engine.steps, engine.model.preemptions
    return seen.close(seqs)


ASKS = st.lists(
    st.builds(
        Ask,
        at=st.integers(0, 40_000).map(lambda n: n * 0.0000371),
        prompt=st.integers(1, 40),
        output=st.integers(1, 50),
        family=st.integers(0, 2),
        adapter=st.sampled_from(["", "", "a", "b", "c"]),
    ),
    min_size=1,
    max_size=14,
)


@given(asks=ASKS, seqs=st.integers(1, 8), blocks=st.sampled_from([24, 26, 40, 400]), slots=st.integers(1, 3))
@settings(max_examples=300)
def test_leaps_change_nothing(asks: list[Ask], seqs: int, blocks: int, slots: int) -> None:
    conf = config(max_num_seqs=seqs, kv_blocks=blocks, adapter_slots=slots, kappa=0.1)
    by_leaps(asks, conf).check(by_steps(asks, conf))


@given(asks=ASKS, leaves=st.lists(st.integers(1, 40_000).map(lambda n: n * 0.0000517), max_size=14))
@settings(max_examples=200)
def test_nor_where_requests_are_aborted(asks: list[Ask], leaves: list[float]) -> None:
    gone = [
        Ask(a.at, a.prompt, a.output, a.family, a.adapter, a.at + leave)
        for a, leave in zip(asks, leaves, strict=False)
    ]
    asks = gone + asks[len(gone) :]
    by_leaps(asks, config()).check(by_steps(asks, config()))


def test_a_lone_answer_is_two_events() -> None:
    engine: Engine[Sequence] = Engine(config(kv_blocks=4000, context_tokens=4096))
    seq = Sequence(4, 3000)
    engine.add(seq, 0.0)
    assert engine.begin(0.0) == ([seq], [])
    assert engine.finish() == [seq]
    engine.begin(0.02)
    assert engine.finish() == [seq]
    assert (seq.generated, engine.steps) == (3000, 3000)


def test_kv_room_shrinks_in_the_middle_of_a_leap() -> None:
    engine: Engine[Sequence] = Engine(config(beta0=10, beta3=0, beta4=0))
    engine.add(Sequence(4, 50), 0.0)
    engine.begin(0.0)
    engine.finish()
    now = engine.ends
    engine.begin(now)
    before = engine.kv_free(now)
    assert engine.kv_free(now + 0.0951) == pytest.approx(before - 9)


def test_what_can_never_run_is_refused() -> None:
    engine: Engine[Sequence] = Engine(config())
    with pytest.raises(ValueError, match="need more than"):
        engine.add(Sequence(90, 50), 0.0)
    assert engine.idle
