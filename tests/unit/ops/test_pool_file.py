"""A pool's file: what it makes of sizes, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker.messages import PATHS, ModelCard
from ops import pool_file
from ops.settings import SettingsError

MIB = 2**20
SIM = 'name = "a"\nengine = "sim"\nhot_bytes = 8\n'


def load(tmp_path: Path, text: str) -> list[pool_file.Base]:
    file = tmp_path / "pool.toml"
    file.write_text(text)
    return pool_file.bases(pool_file.load(file), None, {})


def model(directory: Path, size: int) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    (directory / "model.safetensors").write_bytes(bytes(size))
    (directory / "pytorch_model.bin").write_bytes(bytes(size))  # the same weights once more
    return directory


def test_a_vllm_base_is_measured(tmp_path: Path) -> None:
    weights = model(tmp_path / "m", 1000)
    section = f'[[base]]\nname = "m"\nmodel = "{weights}"\n'
    (base,) = load(tmp_path, f'[pool]\nmemory = "1GiB"\n{section}')
    assert base.hot == 1200 + 512 * MIB
    assert base.asleep == 1000
    assert not base.can_sleep
    assert base.card.context_tokens == 4096
    assert set(base.card.paths) < set(PATHS)
    assert base.settings["vllm.served_name"] == "m"
    own = 'settings = { "vllm.kv_cache_bytes" = 5000, "vllm.max_model_len" = 100, "vllm.sleep" = true }'
    (base,) = load(tmp_path, f'[pool]\nmemory = "1GiB"\n{section}{own}')
    assert base.hot == 1200 + 5000
    assert base.can_sleep
    assert base.card.context_tokens == 100


def test_what_stands_there_is_taken(tmp_path: Path) -> None:
    text = f'[pool]\nmemory = 8\nsleep_memory = "1KB"\n[[base]]\n{SIM}warm_bytes = 1\nsleep_bytes = 7'
    (base,) = load(tmp_path, text)
    assert (base.hot, base.warm, base.asleep) == (8, 1, 7)
    assert base.settings == {"worker.engine": "sim", "sim.model": "a"}


def test_settings_of_all_are_those_of_each_unless_it_has_its_own(tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    other = SIM.replace('"a"', '"b"')
    own = 'settings = { "sim.context_tokens" = 200 }\n'
    file.write_text(f"[pool]\nmemory = 8\n[[base]]\n{SIM}[[base]]\n{other}{own}")
    bases = pool_file.bases(pool_file.load(file), None, {"sim.context_tokens": "100"})
    assert [base.card.context_tokens for base in bases] == [100, 200]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "pool"),
        ("[pool]\nmemory = 1", "base"),
        ("pool = [", "is no TOML"),
        (f'[pool]\nmemory = "much"\n[[base]]\n{SIM}', 'pool.memory = "much"'),
        (f"[pool]\nmemory = 8\ndwell = -1\n[[base]]\n{SIM}", "pool.dwell = -1"),
        (f"[pool]\nmemory = 8\nsize = 1\n[[base]]\n{SIM}", "pool.size = 1 (from {file}): unknown key. Known"),
        (f'[pool]\nmemory = 8\n[[base]]\n{SIM}paths = "x"', 'base.0.paths = "x"'),
        (
            "[pool]\nmemory = 8\n[[base]]\n" + SIM.replace('"sim"', '"cuda"'),
            "base.0.engine = \"cuda\" (from {file}): Input should be 'vllm' or 'sim'",
        ),
        (f"[pool]\nmemory = 8\n[[base]]\n{SIM}[[base]]\n{SIM}", "a stands there twice"),
        (f"[pool]\nmemory = 7\n[[base]]\n{SIM}", "base a: it takes 8 bytes, and pool.memory = 7"),
        (
            "[pool]\nmemory = 15\n[[base]]\n" + SIM + "keep = true\n[[base]]\n" + SIM.replace('"a"', '"b"'),
            "base b: it takes 8 bytes beside 8 of those that are kept",
        ),
        (
            f"[pool]\nmemory = 8\n[[base]]\n{SIM}keep = true\n[[base]]\n{SIM.replace('a', 'b', 1)}",
            "unknown key",
        ),
        ('[pool]\nmemory = 8\n[[base]]\nname = "a"\nengine = "sim"', "give it hot_bytes"),
        ('[pool]\nmemory = 8\n[[base]]\nname = "a"\nmodel = "nowhere"', "is no directory with a model"),
        (
            f'[pool]\nmemory = 8\n[[base]]\n{SIM}settings = {{ "worker.name" = "x" }}',
            "the pool sets it itself",
        ),
        (f'[pool]\nmemory = 8\n[[base]]\n{SIM}settings = {{ "sim.nope" = 1 }}', "base a: sim.nope"),
    ],
)
def test_a_mistake_is_told_with_key_and_value(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load(tmp_path, text)
    assert said.replace("{file}", str(tmp_path / "pool.toml")) in str(raised.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        pool_file.load(tmp_path / "none.toml")


def test_two_that_are_kept_must_fit_together(tmp_path: Path) -> None:
    kept = SIM + "keep = true\n"
    with pytest.raises(SettingsError, match="are kept take 16 bytes"):
        load(tmp_path, f"[pool]\nmemory = 15\n[[base]]\n{kept}[[base]]\n" + kept.replace('"a"', '"b"'))


def test_the_example_is_one() -> None:
    example = Path(__file__).parents[3] / "examples/pool.toml"
    assert len(pool_file.load(example).base) == 2


def test_what_the_file_gives_is_truer_than_what_was_announced_once(tmp_path: Path) -> None:
    once = ModelCard(id="a", base="a", context_tokens=77, paths=("/v1/embeddings",))
    weights = model(tmp_path / "m", 1000)
    section = f'[pool]\nmemory = "1GiB"\n[[base]]\nname = "a"\nmodel = "{weights}"\n'
    (base,) = load(tmp_path, section)
    assert base.known(None) == base.card
    assert base.known(once) == once, "files alone tell less than an engine did"
    (base,) = load(tmp_path, section + 'settings = { "vllm.max_model_len" = 100 }')
    assert base.known(once) == once.model_copy(update={"context_tokens": 100})
    (base,) = load(tmp_path, section + 'paths = ["/v1/completions"]')
    assert base.known(once) == once.model_copy(update={"paths": ("/v1/completions",)})
