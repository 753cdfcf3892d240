"""What ingress reads of a request, and what it refuses."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import errors
from broker.messages import ServiceClass
from ingress import admit
from ingress.config import IngressConfig

KEYS: dict[str, Any] = {"acme": "k-1", "other": "schlüssel"}


def test_it_reads_model_stream_and_class() -> None:
    body = orjson.dumps({"model": "a b*ü", "stream": True, "service_tier": "flex", "else": [1]})
    assert admit.read_body(body, None) == admit.Asked("a b*ü", True, ServiceClass.BATCH, orjson.loads(body))
    assert admit.read_body(b'{"model":"m"}', None) == admit.Asked("m", False, None, {"model": "m"})


def test_the_header_goes_before_the_tier() -> None:
    body = orjson.dumps({"model": "m", "service_tier": "flex"})
    assert admit.read_body(body, " Interactive ").service_class is ServiceClass.INTERACTIVE


@given(st.binary(max_size=64))
def test_garbage_is_refused_as_ours(body: bytes) -> None:
    with pytest.raises(errors.InvalidRequest):
        admit.read_body(body, None)


@given(
    st.text(max_size=20).map(
        lambda text: orjson.dumps({"model": "m", "prompt": text.replace("\0", "\\u0000")})
    )
)
def test_an_escaped_backslash_makes_no_nul(body: bytes) -> None:
    admit.read_body(body, None)


@given(st.text(max_size=20), st.text(max_size=20))
def test_a_nul_character_is_refused_wherever_it_stands(before: str, after: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="NUL"):
        admit.read_body(orjson.dumps({"model": "m", "prompt": f"{before}\0{after}"}), None)


def test_a_name_is_bounded_by_its_bytes() -> None:
    assert admit.read_body(orjson.dumps({"model": "ü" * 128}), None).model == "ü" * 128
    with pytest.raises(errors.InvalidType, match="256 bytes"):
        admit.read_body(orjson.dumps({"model": "ü" * 129}), None)


def test_a_request_id_is_the_callers_or_new() -> None:
    assert admit.request_id({b"x-request-id": b"mine"}) == "mine"
    new = admit.request_id({})
    assert new.startswith("req_")
    assert new != admit.request_id({})
    for bad in (b"", b"a b", b"\xfc", b"x" * 129, b"a\n"):
        assert admit.request_id({b"x-request-id": bad}).startswith("req_")
        with pytest.raises(errors.InvalidRequest):
            admit.check_request_id({b"x-request-id": bad})
    admit.check_request_id({})


def test_an_invalid_trace_context_counts_as_none() -> None:
    valid = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert admit.traceparent({b"traceparent": valid}) == valid.decode()
    for invalid in (b"x" * 60_000, valid + b"\n", valid.upper(), b""):
        assert admit.traceparent({b"traceparent": invalid}) == ""
    assert admit.traceparent({}) == ""


def test_the_deadline_is_the_callers_or_the_classs() -> None:
    config = IngressConfig(deadlines={ServiceClass.BATCH: 50.0})
    assert admit.timeout({}, ServiceClass.BATCH, config) == 50.0
    assert admit.timeout({b"x-headrace-timeout": b"1.5"}, ServiceClass.BATCH, config) == 1.5


@pytest.mark.parametrize("text", [b"", b"soon", b"0", b"-1", b"nan", b"inf", b"1e9"])
def test_a_bad_timeout_is_refused(text: bytes) -> None:
    with pytest.raises(errors.InvalidType, match="X-Headrace-Timeout"):
        admit.timeout({b"x-headrace-timeout": text}, ServiceClass.BATCH, IngressConfig())


class TestTenants:
    def test_everyone_is_anonymous_and_on_loopback_may_name_another(self) -> None:
        tenants = admit.Tenants(IngressConfig(host="127.0.0.1"))
        assert tenants.of({}) == "anonymous"
        assert tenants.of({b"x-headrace-tenant": " täm.*> ".encode()}) == "täm.*>"
        for bad in (b"", b"  ", b"x" * 257):
            with pytest.raises(errors.InvalidRequest, match="1 to 256 bytes"):
                tenants.of({b"x-headrace-tenant": bad})

    @pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "", "gateway"])
    def test_elsewhere_nobody_may(self, host: str) -> None:
        tenants = admit.Tenants(IngressConfig(host=host))
        assert tenants.of({}) == "anonymous"
        with pytest.raises(errors.InvalidRequest, match="loopback"):
            tenants.of({b"x-headrace-tenant": b"acme"})

    @pytest.mark.parametrize("host", ["localhost", "::1", "127.0.0.2"])
    def test_every_loopback_address_counts(self, host: str) -> None:
        assert admit.Tenants(IngressConfig(host=host)).of({b"x-headrace-tenant": b"acme"}) == "acme"

    @pytest.mark.parametrize(
        ("headers", "tenant"),
        [
            ({b"authorization": b"Bearer k-1"}, "acme"),
            ({b"authorization": b"bearer   k-1 "}, "acme"),
            ({b"x-api-key": b"k-1"}, "acme"),
            ({b"x-api-key": "schlüssel".encode(), b"x-headrace-tenant": b"acme"}, "other"),
        ],
    )
    def test_a_key_names_its_tenant(self, headers: dict[bytes, bytes], tenant: str) -> None:
        assert admit.Tenants(IngressConfig(api_keys=KEYS)).of(headers) == tenant

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {b"x-headrace-tenant": b"acme"},
            {b"authorization": b"k-1"},
            {b"authorization": b"Digest k-1"},
            {b"authorization": b"Bearer"},
            {b"authorization": b"Bearer k-1x"},
            {b"x-api-key": b"K-1"},
            {b"x-api-key": b"\xff"},
        ],
    )
    def test_no_key_no_entry(self, headers: dict[bytes, bytes]) -> None:
        with pytest.raises(errors.Unauthorized):
            admit.Tenants(IngressConfig(api_keys=KEYS)).of(headers)


def test_a_fallback_is_taken_unless_the_request_or_its_tenants_setting_says_no() -> None:
    config = IngressConfig(no_fallback=("strict",))
    assert admit.fallback({}, "acme", config)
    assert admit.fallback({b"x-headrace-fallback": b" ON "}, "acme", config)
    assert not admit.fallback({b"x-headrace-fallback": b"off"}, "acme", config)
    assert not admit.fallback({b"x-headrace-fallback": b"on"}, "strict", config)
    with pytest.raises(errors.InvalidType, match="on or off"):
        admit.fallback({b"x-headrace-fallback": b"maybe"}, "acme", config)


def test_a_language_is_its_primary_subtag() -> None:
    assert admit.language({}) == ""
    assert admit.language({b"x-headrace-language": b"pt-BR"}) == "pt"
    with pytest.raises(errors.InvalidType, match="language tag"):
        admit.language({b"x-headrace-language": b"german?"})
