from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors, subjects
from broker.messages import Request, ServiceClass, parse_request
from broker.subjects import RequestSubject

SUBJECT = "req.llama.standard.acme.llama-ada"
HEADERS = {
    "Nats-Msg-Id": "acme:r1",
    "Reply-To": "out.acme.box.r1",
    "Path": "/v1/chat/completions",
    "Deadline": "1764000000000",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}

names = st.text(min_size=1, max_size=60)  # three of the longest still fit into a subject


def test_a_request_as_a_direct_publisher_sends_it() -> None:
    assert parse_request(SUBJECT, HEADERS, b"{}") == Request(
        subject=RequestSubject("llama", "standard", "acme", "llama-ada"),
        request_id="r1",
        reply_to="out.acme.box.r1",
        path="/v1/chat/completions",
        body=b"{}",
        deadline_ms=1764000000000,
        dedup_key="r1",
        traceparent=HEADERS["traceparent"],
    )


def test_what_may_be_left_out() -> None:
    needed = {name: HEADERS[name] for name in ("Nats-Msg-Id", "Reply-To", "Path")}
    request = parse_request(SUBJECT, needed, b"")
    assert (request.deadline_ms, request.traceparent) == (0, "")


@given(names, st.sampled_from(ServiceClass), names, names, names, names, st.integers(0, 10**14))
def test_headers_round_trip(
    base: str, service_class: str, tenant: str, model: str, request_id: str, mailbox: str, deadline: int
) -> None:
    request = Request(
        subject=RequestSubject(base, service_class, tenant, model),
        request_id=request_id,
        reply_to=subjects.reply(tenant, mailbox, request_id),
        path="/v1/completions",
        body=b"\x00\xff",
        deadline_ms=deadline,
        dedup_key="key:with:colons",
    )
    assert parse_request(str(request.subject), request.headers(), request.body) == request


def test_the_request_id_is_the_dedup_key_where_there_is_none() -> None:
    request = Request(RequestSubject("b", "batch", "a.b", "m"), "r 1", "out.a%2Eb.box.r%201", "/v1/x", b"")
    assert request.headers() == {
        "Nats-Msg-Id": "a%2Eb:r 1",
        "Reply-To": "out.a%2Eb.box.r%201",
        "Path": "/v1/x",
        "Tenant": "a%2Eb",
        "Request-Id": "r%201",
    }


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Nats-Msg-Id", None),
        ("Nats-Msg-Id", ""),
        ("Reply-To", None),
        ("Reply-To", ""),
        ("Reply-To", "out.acme.r1"),
        ("Reply-To", "out.acme.box.r1.x"),
        ("Reply-To", "out.acme..r1"),
        ("Reply-To", "req.acme.box.r1"),
        ("Reply-To", "out.acme.box.*"),
        ("Reply-To", "out.acme.box.>"),
        ("Reply-To", "out.acme.box.r 1"),
        ("Reply-To", "out.acme.box.r\r\n1"),
        ("Reply-To", "out.acme.box.%FF"),
        ("Reply-To", "out.acme.box.%ED%A0%80"),
        ("Reply-To", "out.other.box.r1"),
        ("Body-Object", "acme.r1"),
        ("Path", None),
        ("Path", ""),
        ("Path", "v1/chat/completions"),
        ("Deadline", ""),
        ("Deadline", "soon"),
        ("Deadline", "-1"),
        ("Deadline", "1.5"),
        ("Deadline", "٣"),
        ("Deadline", "²"),
        ("Deadline", "9" * 5000),
    ],
)
def test_a_bad_header_is_named(header: str, value: str | None) -> None:
    headers = {name: given for name, given in HEADERS.items() if name != header}
    if value is not None:
        headers[header] = value
    with pytest.raises(errors.MalformedMessage, match=f"header {header}"):
        parse_request(SUBJECT, headers, b"{}")


def test_a_body_in_the_object_store() -> None:
    request = parse_request(SUBJECT, HEADERS | {"Body-Object": "acme.r-1_x"}, b"")
    assert (request.body, request.body_object) == (b"", "acme.r-1_x")
    assert request.headers()["Body-Object"] == "acme.r-1_x"


@pytest.mark.parametrize(
    "name", ["other.r1", "acme", "acme.", "acmer1", "acme.*", "acme.r1.x", "acme.r1\n", ".r1"]
)
def test_a_body_that_is_not_the_tenants_own_is_refused(name: str) -> None:
    with pytest.raises(errors.MalformedMessage, match=r"header Body-Object must be acme\.<unique>"):
        parse_request(SUBJECT, HEADERS | {"Body-Object": name}, b"")


def test_no_headers_at_all() -> None:
    with pytest.raises(errors.MalformedMessage):
        parse_request(SUBJECT, None, b"{}")


@pytest.mark.parametrize(
    "subject", ["req.llama.standard.acme", "req.llama.urgent.acme.m", "usage.a.b", "req.%FF.batch.a.m"]
)
def test_a_bad_subject(subject: str) -> None:
    with pytest.raises(errors.MalformedMessage):
        parse_request(subject, HEADERS, b"{}")


@given(st.dictionaries(st.sampled_from([*HEADERS, "Other"]), st.text()), st.text())
def test_garbage_is_malformed_and_nothing_else(headers: dict[str, str], subject: str) -> None:
    for tried in (SUBJECT, subject):
        with contextlib.suppress(errors.MalformedMessage):
            assert parse_request(tried, headers, b"").path == headers["Path"]
