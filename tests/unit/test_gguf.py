"""Conversion of a small GGUF file, written in llama.cpp's format."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter, TokenType
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from engine.config import ModelShape
from engine.models.families import from_hf
from engine.models.gguf import convert

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 16, 24, 4, 2, 4
TOKENS = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ1", "ab"]


def llama_weights() -> dict[str, np.ndarray]:
    """Random weights of a one-layer Llama, with llama.cpp's names and Hugging Face's row order."""
    draw = np.random.default_rng(0).standard_normal
    shapes = {
        "token_embd": (len(TOKENS), HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (FFN, HIDDEN),
        "blk.0.ffn_up": (FFN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
    }
    return {f"{name}.weight": draw(shape).astype(np.float32) for name, shape in shapes.items()}


def llama_cpp_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """The permutation of q and k in convert_hf_to_gguf.py: rows i and i + K/2 of a head become adjacent."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.transpose(0, 2, 1, 3).reshape(weight.shape)


def write_gguf(path: Path, weights: dict[str, np.ndarray], **changes: Any) -> Path:
    """Writes `weights` as llama.cpp does. `changes` replace entries of the metadata."""
    says = {
        "architecture": "llama",
        "model": "gpt2",
        "pre": "smollm",
        "add_bos": False,
        "types": [TokenType.CONTROL] + [TokenType.NORMAL] * 258,
    }
    says |= changes
    writer = GGUFWriter(path, says["architecture"])
    for key, (value, kind) in says.get("extra", {}).items():
        writer.add_key_value(key, value, kind)
    writer.add_license("apache-2.0")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model(says["model"])
    writer.add_tokenizer_pre(says["pre"])
    writer.add_add_bos_token(says["add_bos"])
    writer.add_token_list(TOKENS)
    writer.add_token_types(says["types"])
    writer.add_token_merges(["Ġ 1", "a b"])
    writer.add_eos_token_id(0)
    heads = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KV_HEADS}
    for name, weight in weights.items():
        writer.add_tensor(name, llama_cpp_rows(weight, heads[name]) if name in heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_weights_have_hugging_face_names_and_row_order(tmp_path: Path, folder: Path):
    weights = llama_weights()
    convert(write_gguf(tmp_path / "tiny.gguf", weights), folder)
    converted = load_file(folder / "model.safetensors")
    assert len(converted) == len(weights)
    for hf, gguf in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.0.input_layernorm": "blk.0.attn_norm",
        "model.layers.0.self_attn.q_proj": "blk.0.attn_q",
        "model.layers.0.self_attn.k_proj": "blk.0.attn_k",
        "model.layers.0.self_attn.v_proj": "blk.0.attn_v",
        "model.layers.0.self_attn.o_proj": "blk.0.attn_output",
        "model.layers.0.post_attention_layernorm": "blk.0.ffn_norm",
        "model.layers.0.mlp.gate_proj": "blk.0.ffn_gate",
        "model.layers.0.mlp.up_proj": "blk.0.ffn_up",
        "model.layers.0.mlp.down_proj": "blk.0.ffn_down",
    }.items():
        np.testing.assert_array_equal(converted[f"{hf}.weight"], weights[f"{gguf}.weight"], err_msg=hf)


def test_logits_equal_those_of_transformers_own_gguf_reader(tmp_path: Path, folder: Path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source = write_gguf(tmp_path / "tiny.gguf", llama_weights())
    convert(source, folder)
    ours = LlamaForCausalLM.from_pretrained(folder)
    theirs = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=ours)
    reference = LlamaForCausalLM(LlamaConfig(**theirs["config"] | {"vocab_size": len(TOKENS)}))
    reference.load_state_dict(theirs["tensors"], strict=False)
    tokens = torch.arange(50)[None] * 5
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens).logits, reference(tokens).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_config_equals_the_metadata(tmp_path: Path, folder: Path, tied: bool):
    weights = llama_weights() | ({} if tied else {"output.weight": np.ones((len(TOKENS), HIDDEN), np.float32)})
    convert(write_gguf(tmp_path / "tiny.gguf", weights), folder)
    config = json.loads((folder / "config.json").read_text())
    assert from_hf(config) == ModelShape(
        layers=1, hidden=HIDDEN, ffn=FFN, heads=HEADS, kv_heads=KV_HEADS, vocab=len(TOKENS),
        rope_theta=50000.0, norm_eps=1e-6, tied=tied, max_length=128,
    )  # fmt: skip
    assert config["eos_token_id"] == 0
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def test_digits_are_separate_tokens_despite_merges(tmp_path: Path, folder: Path):
    convert(write_gguf(tmp_path / "tiny.gguf", llama_weights()), folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("ab 11<|end|>").tokens == ["ab", "Ġ", "1", "1", "<|end|>"]


def test_the_source_of_the_weights_is_recorded(tmp_path: Path, folder: Path):
    record = convert(write_gguf(tmp_path / "tiny.gguf", llama_weights()), folder)
    assert (record["source"], record["tensor_types"], record["licence"]) == ("tiny.gguf", {"F32": 11}, "apache-2.0")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "gemma"}, "general.architecture='gemma' is not supported"),
        ({"model": "llama"}, "tokenizer.ggml.model='llama' is not supported"),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre='llama-bpe' is not supported"),
        ({"add_bos": True}, "tokenizer.ggml.add_bos_token=True is not supported"),
        ({"types": [TokenType.BYTE] * 259}, "tokens of types"),
    ],
)
def test_unknown_metadata_is_refused(tmp_path: Path, folder: Path, changes: dict[str, Any], says: str):
    source = write_gguf(tmp_path / "tiny.gguf", llama_weights(), **changes)
    with pytest.raises(ValueError, match=says):
        convert(source, folder)


def test_unknown_and_missing_tensors_are_refused(tmp_path: Path, folder: Path):
    weights = llama_weights()
    more = write_gguf(tmp_path / "more.gguf", weights | {"rope_freqs.weight": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        convert(more, folder)
    weights.pop("blk.0.ffn_up.weight")
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight"):
        convert(write_gguf(tmp_path / "fewer.gguf", weights), folder)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, folder: Path):
    weights = llama_weights()
    weights["blk.0.attn_v.weight"][1, 2] = np.nan
    with pytest.raises(ValueError, match=r"blk\.0\.attn_v\.weight.*not finite"):
        convert(write_gguf(tmp_path / "tiny.gguf", weights), folder)


# Files that are damaged or made to attack.

LLAMA = ("llama.block_count", "llama.attention.head_count", "tokenizer.ggml.tokens", "llama.rope.freq_base")


def at(offset: int, code: str, value: int) -> Callable[[bytes], bytes]:
    """Overwrite a number of the file."""
    return lambda content: content[:offset] + struct.pack("<" + code, value) + content[offset + struct.calcsize(code) :]


def behind(mark: bytes, code: str, value: int, skip: int = 0) -> Callable[[bytes], bytes]:
    """Overwrite the number that follows a name."""
    return lambda content: at(content.index(mark) + len(mark) + skip, code, value)(content)


NORM, TOKENS_KEY = b"output_norm.weight", b"tokenizer.ggml.tokens"
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "magic": at(0, "I", 0),
    "version 1": at(4, "I", 1),
    "version of the other byte order": at(4, "I", 3 << 24),
    "tensors 2^63": at(8, "Q", 1 << 63),
    "tensors one too many": lambda content: at(8, "Q", struct.unpack_from("<Q", content, 8)[0] + 1)(content),
    "keys 2^60": at(16, "Q", 1 << 60),
    "keys none": at(16, "Q", 0),
    "name 2^62 long": at(24, "Q", 1 << 62),
    "name not UTF-8": at(32, "B", 0xFF),
    "key of an unknown type": behind(b"general.license", "I", 77),
    "key an array of text": behind(b"general.license", "I", 9),
    "text 2^40 long": behind(b"general.license", "Q", 1 << 40, skip=4),
    "array of an unknown type": behind(TOKENS_KEY, "I", 77, skip=4),
    "array of arrays": behind(TOKENS_KEY, "I", 9, skip=4),
    "array of 2^60": behind(TOKENS_KEY, "Q", 1 << 60, skip=8),
    "array of one more": behind(TOKENS_KEY, "Q", len(TOKENS) + 1, skip=8),
    "array of numbers": behind(TOKENS_KEY, "I", 0, skip=4),
    "no dimensions": behind(NORM, "I", 0),
    "2^31 dimensions": behind(NORM, "I", 1 << 31),
    "size 0": behind(NORM, "Q", 0, skip=4),
    "size 2^63": behind(NORM, "Q", 1 << 63, skip=4),
    "size of one more": behind(NORM, "Q", HIDDEN + 1, skip=4),
    "type unknown": behind(NORM, "I", 99, skip=12),
    "type with blocks": behind(NORM, "I", 2, skip=12),
    "type of other width": behind(NORM, "I", 28, skip=12),
    "offset beyond the end": behind(NORM, "Q", 1 << 40, skip=16),
    "offset 2^64 - 32": behind(NORM, "Q", (1 << 64) - 32, skip=16),
    "offset unaligned": behind(NORM, "Q", 1, skip=16),
    "offset of another tensor": behind(NORM, "Q", 0, skip=16),
    **{f"cut at {share} %": (lambda content, share=share: content[: len(content) * share // 100]) for share in range(1, 100, 7)},
    "zeros": lambda content: bytes(len(content)),
}
VALUES: dict[str, tuple[Any, GGUFValueType]] = {
    "general.alignment": (3, GGUFValueType.UINT32),
    "llama.attention.key_length": (-16, GGUFValueType.INT32),
    "llama.attention.key_length ": (3, GGUFValueType.INT32),
    "tokenizer.ggml.padding_token_id": (10**6, GGUFValueType.UINT32),
    "tokenizer.ggml.bos_token_id": ("x", GGUFValueType.STRING),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(name: str, tmp_path: Path, folder: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama_weights())
    path.write_bytes(DAMAGES[name](path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        convert(path, folder)
    assert "tiny.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", VALUES)
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(key: str, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError) as caught:
        convert(write_gguf(tmp_path / "tiny.gguf", llama_weights(), extra={key.strip(): VALUES[key]}), folder)
    assert "tiny.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", LLAMA)
def test_a_missing_key_is_refused_in_one_line(key: str, tmp_path: Path, folder: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama_weights())
    path.write_bytes(path.read_bytes().replace(key.encode(), key[:-1].encode() + b"_"))
    with pytest.raises(ValueError, match=r"tiny\.gguf: .*" + re.escape(key)):
        convert(path, folder)
