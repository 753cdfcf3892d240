from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.config import SimConfig
from workers.engines.step_model import IntegrityError, Sequence, State, StepModel, block_hashes


def config(**changes: object) -> SimConfig:
    small = {"kv_blocks": 12, "block_size": 4, "context_tokens": 48, "max_num_batched_tokens": 16}
    return SimConfig.model_validate(small | {"max_num_seqs": 4} | changes)


def sequence(prompt: list[int], max_tokens: int, block_size: int = 4) -> Sequence:
    return Sequence(len(prompt), max_tokens, block_hashes(prompt, block_size))


def run(model: StepModel[Sequence], limit: int = 10_000) -> list[float]:
    """Step until idle; the durations."""
    durations = []
    while step := model.begin():
        durations.append(step.duration_ms)
        model.check()
        model.finish()
        model.check()
        assert len(durations) < limit, "the model makes no progress"
    return durations


def test_a_prompt_is_prefilled_in_chunks_of_the_token_budget() -> None:
    model: StepModel[Sequence] = StepModel(config(beta0=1, beta1=0.1, beta2=0.01, beta3=0.5, beta4=0))
    seq = sequence(list(range(20)), max_tokens=2)
    model.add(seq)
    # 16 tokens, then 4 after 16, then a decode step over 20 tokens and its own.
    assert run(model) == pytest.approx([1 + 1.6 + 0.01 * 16 * 16, 1 + 0.4 + 0.01 * 4 * 20, 1 + 0.5 * 21])
    assert seq.state is State.FINISHED
    assert seq.generated == 2


def test_decoding_goes_on_while_another_prompt_is_prefilled() -> None:
    model: StepModel[Sequence] = StepModel(config())
    first, second = sequence([1], max_tokens=8), sequence(list(range(20)), max_tokens=1)
    model.add(first)
    model.begin()
    model.finish()
    model.add(second)
    step = model.begin()
    assert step is not None
    assert [(seq, seq.chunk) for seq in step.batch] == [(first, 1), (second, 15)]
    assert model.finish() == [first]


def test_no_more_than_max_num_seqs_run_and_the_others_wait_in_order() -> None:
    model: StepModel[Sequence] = StepModel(config(max_num_seqs=2))
    seqs = [sequence([n], max_tokens=1) for n in range(5)]
    for seq in seqs:
        model.add(seq)
    order = []
    while step := model.begin():
        assert len(model.running) <= 2
        order.append(step.admitted)
        model.finish()
    assert order == [seqs[0:2], seqs[2:4], seqs[4:]]


def test_a_known_prefix_is_not_computed_again_but_for_its_last_token() -> None:
    model: StepModel[Sequence] = StepModel(config())
    prompt = list(range(16))
    first, again = sequence(prompt, max_tokens=1), sequence(prompt, max_tokens=1)
    model.add(first)
    run(model)
    model.add(again)
    step = model.begin()
    assert step is not None
    assert (first.cached, again.cached, again.chunk) == (0, 12, 4)


def test_running_sequences_share_the_blocks_of_their_prefix() -> None:
    model: StepModel[Sequence] = StepModel(config())
    prompt = list(range(16))
    for tail in (98, 99):
        model.add(sequence([*prompt, tail], max_tokens=1))
    model.begin()
    model.finish()
    model.begin()
    # Four shared, and one each for what comes after.
    assert model.pool.total - model.pool.available == 6
    model.check()


def test_the_least_recently_used_prefix_is_evicted_from_its_end() -> None:
    model: StepModel[Sequence] = StepModel(config(kv_blocks=6, context_tokens=24))
    old, new = list(range(16)), list(range(100, 112))
    for prompt in (old, new):
        model.add(sequence(prompt, max_tokens=1))
        run(model)
    hashes = block_hashes(old, 4)
    assert [key in model.pool.idle for key in hashes] == [True, True, True, False]
    assert all(key in model.pool.idle for key in block_hashes(new, 4))


def test_the_sequence_admitted_last_makes_room_and_later_computes_all_of_it_again() -> None:
    model: StepModel[Sequence] = StepModel(config(kv_blocks=4, context_tokens=16))
    first, last = Sequence(7, max_tokens=9), Sequence(7, max_tokens=9)
    model.add(first)
    model.add(last)
    preempted: list[Sequence] = []
    while not preempted:
        step = model.begin()
        assert step is not None
        preempted, before = step.preempted, last.generated
        model.finish()
    assert preempted == [last]
    assert (last.state, last.computed, last.generated) == (State.WAITING, 0, before)
    assert before > 0
    while last.state is State.WAITING:
        step = model.begin()
        model.finish()
    assert last.computed == 7 + before
    run(model)
    assert (first.generated, last.generated) == (9, 9)
    assert model.pool.available == 4


def test_a_sequence_that_could_never_end_is_refused() -> None:
    model: StepModel[Sequence] = StepModel(config())
    with pytest.raises(ValueError, match="12 blocks of 4"):
        model.add(Sequence(40, max_tokens=10))
    model.add(Sequence(40, max_tokens=9))
    run(model)


def test_an_abort_in_the_middle_of_a_step_frees_the_blocks_and_emits_nothing() -> None:
    model: StepModel[Sequence] = StepModel(config())
    seq = sequence(list(range(8)), max_tokens=4)
    model.add(seq)
    model.begin()
    model.abort(seq)
    model.abort(seq)
    model.check()
    assert model.finish() == []
    assert model.pool.available == 12
    assert model.begin() is None


def test_a_salt_keeps_prefixes_apart() -> None:
    prompt = list(range(8))
    assert not set(block_hashes(prompt, 4)) & set(block_hashes(prompt, 4, salt=1))
    assert block_hashes(prompt, 4)[:1] == block_hashes(prompt[:7], 4)


@pytest.mark.parametrize("damage", ["private", "refs", "blank", "idle"])
def test_the_check_finds_a_lost_block(damage: str) -> None:
    model: StepModel[Sequence] = StepModel(config())
    seq = sequence(list(range(6)), max_tokens=4)
    model.add(seq)
    model.begin()
    model.check()
    if damage == "private":
        seq.private -= 1
    elif damage == "refs":
        model.pool.refs[seq.held[0]] += 1
    elif damage == "blank":
        model.pool.blank += 1
    else:
        model.pool.idle[seq.held[0]] = None
    with pytest.raises(IntegrityError):
        model.check()


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    kv_blocks=st.integers(4, 14),
    budget=st.integers(16, 40),
    max_num_seqs=st.integers(1, 6),
    abort_rate=st.sampled_from([0.0, 0.02, 0.2]),
)
def test_invariants(seed: int, kv_blocks: int, budget: int, max_num_seqs: int, abort_rate: float) -> None:
    """Whatever comes: no block leaks, none is invented, and each sequence gets exactly its tokens."""
    rng = random.Random(seed)
    room = kv_blocks * 4
    model: StepModel[Sequence] = StepModel(
        config(
            kv_blocks=kv_blocks,
            context_tokens=room,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
        )
    )
    stem = list(range(room))
    seqs = []
    for _ in range(rng.randint(1, 12)):
        size = rng.randint(1, room - 1)
        shared = rng.randint(0, size)
        prompt = stem[:shared] + [rng.randint(1000, 1003) for _ in range(size - shared)]
        seqs.append(sequence(prompt, rng.randint(1, room - size)))
    todo = list(seqs)
    emitted: Counter[int] = Counter()
    while todo or model.running or model.waiting:
        while todo and rng.random() < 0.5:
            model.add(todo.pop())
        step = model.begin()
        model.check()
        if step is not None:
            assert sum(seq.chunk for seq in step.batch) <= budget
            assert len(model.running) <= max_num_seqs
            assert not set(step.batch) & set(step.preempted)
        if rng.random() < abort_rate:
            model.abort(rng.choice(seqs))
            todo = [seq for seq in todo if seq.state is State.NEW]
        for seq in model.finish():
            emitted[id(seq)] += 1
            assert seq.generated == emitted[id(seq)]
        model.check()
    for seq in seqs:
        assert seq.state in (State.FINISHED, State.ABORTED)
        assert emitted[id(seq)] == seq.generated
        assert (seq.generated == seq.max_tokens) == (seq.state is State.FINISHED)
    assert model.pool.available == kv_blocks
