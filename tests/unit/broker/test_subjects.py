from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import subjects
from broker.messages import ServiceClass

# Lone surrogates included: JSON can carry them into a model's name.
names = st.text(st.characters(), min_size=1)
texts = st.text(min_size=1)
LEGAL = re.compile(r"[A-Za-z0-9_%-]+")


@given(names)
def test_any_name_becomes_one_legal_token_and_back(name: str) -> None:
    token = subjects.token(name)
    assert LEGAL.fullmatch(token)
    assert subjects.name(token) == name


@given(names, names)
def test_two_names_never_share_a_token(one: str, other: str) -> None:
    assert (subjects.token(one) == subjects.token(other)) == (one == other)


def test_what_tokens_look_like() -> None:
    assert subjects.token("llama-3_1B") == "llama-3_1B"
    assert subjects.token("Qwen/Qwen3.5 *>") == "Qwen%2FQwen3%2E5%20%2A%3E"
    assert subjects.token("100%") == "100%25"
    assert subjects.token("é") == "%C3%A9"


def test_the_empty_name_has_no_token() -> None:
    with pytest.raises(ValueError, match="empty"):
        subjects.token("")


@given(texts, st.sampled_from(ServiceClass), texts, texts)
def test_request_subjects_round_trip(base: str, service_class: str, tenant: str, model: str) -> None:
    subject = subjects.RequestSubject(base, service_class, tenant, model)
    assert subjects.parse_request(str(subject)) == subject
    assert len(str(subject).split(".")) == 5
    assert str(subject).startswith(subjects.request_filter(base, service_class).removesuffix(">"))


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "req",
        "req.a.b.c",
        "req.a.b.c.d.e",
        "req.a..c.d",
        "out.a.b.c.d",
        "req.a.b.c.%FF",
        "req.a.b.c.%ED%A0%80",
        ".req.a.b.c.d",
    ],
)
def test_other_subjects_are_refused(subject: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        subjects.parse_request(subject)


@given(names, names, names)
def test_reply_subjects_lie_under_their_mailbox(tenant: str, mailbox: str, request: str) -> None:
    tokens = subjects.reply(tenant, mailbox, request).split(".")
    pattern = subjects.mailbox(mailbox).split(".")
    assert len(tokens) == len(pattern)
    assert all(want in ("*", have) for want, have in zip(pattern, tokens, strict=True))


@given(names, names)
def test_a_cancel_names_its_request(tenant: str, request: str) -> None:
    key = f"{subjects.token(tenant)}.{subjects.token(request)}"
    assert subjects.cancelled(subjects.cancel(tenant, request)) == key


def test_a_cancel_may_encode_less_than_a_token_does() -> None:
    assert subjects.cancelled("cancel.a@b.r:1") == "a%40b.r%3A1"
    with pytest.raises(ValueError, match=r"."):
        subjects.cancelled("cancel.acme.%FF")


@pytest.mark.parametrize(
    ("request_subject", "reply", "may"),
    [
        ("req.m.batch.acme.m", "out.acme.box.r1", True),
        ("req.m.batch.acme.m", "out.other.box.r1", False),
        ("req.m.batch", "out.acme.box.r1", False),
        ("req.m.batch.acme.m", "out.acme.box", False),
        ("req.m.batch.acme.m", "out.acme.box.*", False),
        ("req.m.batch.acme.m", "dead.acme.box.r1", False),
        ("req.m.batch.acme.m", "", False),
    ],
)
def test_a_reply_goes_to_the_tenant_that_asked(request_subject: str, reply: str, may: bool) -> None:
    assert subjects.may_answer(request_subject, reply) is may


@given(names, names)
def test_a_stored_body_is_its_tenants_alone(tenant: str, other: str) -> None:
    assert subjects.may_name(other, subjects.body_object(tenant, "0a-_Z")) == (tenant == other)


@pytest.mark.parametrize("nuid", ["", "*", ">", "a.b", "a b", "a\r\n", "\ud800"])
def test_chunks_are_named_by_a_plain_token(nuid: str) -> None:
    with pytest.raises(ValueError, match="can't name"):
        subjects.object_chunks("payloads", nuid)


@given(names, names, names, names)
def test_one_tenants_dedup_key_never_meets_anothers(
    tenant: str, key: str, other_tenant: str, other_key: str
) -> None:
    same = subjects.dedup_id(tenant, key) == subjects.dedup_id(other_tenant, other_key)
    assert same == ((tenant, key) == (other_tenant, other_key))


@given(names, names)
def test_a_consumer_name_is_legal(base: str, service_class: str) -> None:
    assert LEGAL.fullmatch(subjects.consumer(base, service_class))
