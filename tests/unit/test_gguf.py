"""Conversion of a small GGUF file, written in llama.cpp's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
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
