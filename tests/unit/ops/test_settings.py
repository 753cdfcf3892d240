"""Where settings come from, which source wins, and what a wrong one says."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from ops import settings
from ops.settings import SettingsError, load


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_defaults_need_no_source() -> None:
    assert load(environ={}) == settings.Settings()


def test_flags_win_over_variables_over_the_file() -> None:
    Path("headrace.toml").write_text("[ingress]\nport = 1\nmax_body = 2000\nkeepalive = 3\n")
    environ = {"HEADRACE_INGRESS__PORT": "2", "HEADRACE_INGRESS__MAX_BODY": "3000"}
    loaded = load(flags={"ingress.port": "3"}, environ=environ)
    assert (loaded.ingress.port, loaded.ingress.max_body, loaded.ingress.keepalive) == (3, 3000, 3)


def test_another_file_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text('data = "elsewhere"\n')
    assert load(tmp_path / "other.toml", environ={}).data == Path("elsewhere")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(environ={}).data = Path("x")  # type: ignore[misc]


def test_free_tables_take_json_and_single_keys() -> None:
    environ = {"HEADRACE_VLLM__EXTRA": '{"seed": 1}', "HEADRACE_VLLM__EXTRA__TRUST_REMOTE_CODE": "true"}
    assert load(environ=environ).vllm.extra == {"seed": 1, "trust_remote_code": True}


@pytest.mark.parametrize(
    ("variable", "text", "parts"),
    [
        (
            "HEADRACE_INGRESS__PORT",
            "http",
            ['ingress.port = "http"', "HEADRACE_INGRESS__PORT", "integer 0 to 65535"],
        ),
        ("HEADRACE_INGRESS__PORT", "70000", ['ingress.port = "70000"', "integer 0 to 65535"]),
        ("HEADRACE_WORKER__ENGINE", "tpu", ['worker.engine = "tpu"', "vllm | sim | http"]),
        ("HEADRACE_SIM__BETA0", "-1", ["sim.beta0", "number ≥ 0"]),
        ("HEADRACE_INGRESS", "3", ["ingress = ", "table"]),
        ("HEADRACE_VLLM__EXTRA", "seed", ["vllm.extra", "table of string or integer"]),
        (
            "HEADRACE_INGRESS__PROT",
            "1",
            ['ingress.prot = "1"', "unknown key; did you mean port?", "max_body"],
        ),
        ("HEADRACE_INGRES__PORT", "1", ["HEADRACE_INGRES__PORT", "did you mean ingress?"]),
        ("HEADRACE_PORT", "1", ["HEADRACE_PORT", "unknown key"]),
    ],
)
def test_a_wrong_variable_is_named_with_what_is_allowed(variable: str, text: str, parts: list[str]) -> None:
    with pytest.raises(SettingsError) as raised:
        load(environ={variable: text})
    for part in parts:
        assert part in str(raised.value)


def test_everything_wrong_is_told_at_once_with_its_source() -> None:
    Path("headrace.toml").write_text("ingress = { port = -1 }\nwrong = true\n")
    with pytest.raises(SettingsError) as raised:
        load(flags={"sim.beta0": "x"}, environ={})
    told = str(raised.value).splitlines()
    assert len(told) == 3
    assert any("ingress.port = -1 (from headrace.toml)" in line for line in told)
    assert any("wrong = true (from headrace.toml): unknown key" in line for line in told)
    assert any('sim.beta0 = "x" (from --set sim.beta0)' in line for line in told)


def test_a_section_that_is_no_table_is_told_even_where_a_variable_goes_into_it() -> None:
    Path("headrace.toml").write_text("ingress = 5\n")
    with pytest.raises(SettingsError, match=r"ingress = 5 .*Allowed: table"):
        load(environ={"HEADRACE_INGRESS__PORT": "1"})


def test_files_that_cannot_be_read() -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml: No such file"):
        load(Path("nowhere.toml"), environ={})
    Path("headrace.toml").write_text("[ingress\n")
    with pytest.raises(SettingsError, match=r"headrace\.toml is no TOML: .*line 1"):
        load(environ={})


def test_the_http_engine_needs_an_address() -> None:
    with pytest.raises(SettingsError, match=r"needs http\.url"):
        load(flags={"worker.engine": "http"}, environ={})
    assert load(flags={"worker.engine": "http", "http.url": "http://x"}, environ={}).http.url == "http://x"


@pytest.mark.parametrize(
    "text", ["acme=s3cret, other=x", "acme=s3cret\nother=x\n", '{"acme": "s3cret", "other": "x"}']
)
def test_api_keys_come_from_the_environment_or_a_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    direct = load(environ={"HEADRACE_INGRESS__API_KEYS": text})
    Path("headrace.toml").write_text(f'[ingress]\napi_keys = "@{tmp_path}/keys"\n')
    by_file = load(environ={})
    for loaded in (direct, by_file):
        keys = {tenant: key.get_secret_value() for tenant, key in loaded.ingress.api_keys.items()}
        assert keys == {"acme": "s3cret", "other": "x"}
        assert "s3cret" not in repr(loaded) + loaded.model_dump_json()


@pytest.mark.parametrize(
    "text", ['{"acme": ""}', '{"acme": " "}', '{"": "key"}', '{"acme": "k", "other": "k"}']
)
def test_api_keys_that_would_let_others_in_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="api_keys"):
        load(environ={"HEADRACE_INGRESS__API_KEYS": text})


def test_api_keys_stand_in_no_file_and_no_flag() -> None:
    with pytest.raises(SettingsError, match="is a secret") as raised:
        load(flags={"ingress.api_keys": "acme=s3cret"}, environ={})
    assert "s3cret" not in str(raised.value)
    Path("headrace.toml").write_text('[ingress.api_keys]\nacme = "s3cret"\n')
    with pytest.raises(SettingsError, match=r"must not stand in headrace\.toml") as raised:
        load(environ={})
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("text", ["s3cret", '{"acme": ["s3cret"]}', '{"acme": "s3cret"', "@/nowhere"])
def test_bad_api_keys_are_not_shown(text: str) -> None:
    with pytest.raises(SettingsError, match=r"ingress\.api_keys") as raised:
        load(environ={"HEADRACE_INGRESS__API_KEYS": text})
    assert "s3cret" not in str(raised.value)


def test_a_misspelt_secret_is_not_shown() -> None:
    with pytest.raises(SettingsError, match="unknown key") as raised:
        load(environ={"HEADRACE_INGRESS__APIKEYS": "acme=s3cret"})
    assert "s3cret" not in str(raised.value)
