"""A llama-architecture GGUF file rewritten as a Hugging Face LlamaForCausalLM folder with fp32 weights.

The layouts are those of llama.cpp's convert_hf_to_gguf.py, undone. Whatever this module does not know it refuses: a wrong guess would
leave a model that still talks, only worse.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.config import ModelShape
from engine.files import follow_umask, refusing, sha256
from engine.models.families import to_hf
from engine.models.gguf_header import check_gguf

LAYER_WEIGHTS = {
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

TOKEN_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}

SUPPORTED = {  # key -> the values this module understands; None: the key may be absent
    "general.architecture": ("llama",),
    "llama.rope.scaling.type": ("none", None),
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm",),
    "tokenizer.ggml.add_bos_token": (False, None),
}


def convert(source: Path, folder: Path) -> dict[str, Any]:
    """Write model.safetensors, config, tokenizer and chat template of the GGUF file `source` into the existing `folder`.

    Returns where the weights come from: source, its sha256, tensor types, dtype, name and licence. Raises ValueError for an architecture,
    tokenizer or tensor that is not supported, and for weights that are not finite.
    """
    check_gguf(source)
    with refusing(source, "fetch the file again"):
        reader = GGUFReader(source)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    _refuse_unsupported(metadata, source)
    with refusing(source, "it is not a plain Llama model"):
        shape = _shape(metadata, tied="output.weight" not in {tensor.name for tensor in reader.tensors})

    weights = _weights(reader, shape, source)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    follow_umask(folder / "model.safetensors")
    _write_config(metadata, shape, folder)
    with refusing(source, "its tokenizer is not supported"):
        _write_tokenizer(metadata, folder)
    return {
        "source": source.name,
        "source_sha256": sha256(source),
        "tensor_types": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "dtype": "float32",
        "name": metadata.get("general.name"),
        "licence": metadata.get("general.license"),
    }


def _refuse_unsupported(metadata: dict[str, Any], source: Path) -> None:
    for key, understood in SUPPORTED.items():
        value = metadata.get(key)
        if value not in understood:
            raise ValueError(
                f"{source.name}: {key}={value!r} is not supported, only {understood[0]!r}; use a Hugging Face folder of this model"
            )


def _shape(metadata: dict[str, Any], tied: bool) -> ModelShape:
    # GGUF keeps epsilon as float32; its shortest decimal is the number that was meant (1e-5, not 9.99999975e-06).
    epsilon = float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])))
    return ModelShape(
        layers=metadata["llama.block_count"],
        hidden=metadata["llama.embedding_length"],
        ffn=metadata["llama.feed_forward_length"],
        heads=metadata["llama.attention.head_count"],
        kv_heads=metadata["llama.attention.head_count_kv"],
        vocab=len(metadata["tokenizer.ggml.tokens"]),
        head_dim=metadata.get("llama.attention.key_length", 0),
        rope_theta=metadata["llama.rope.freq_base"],
        norm_eps=epsilon,
        tied=tied,
        max_length=metadata["llama.context_length"],
    )


def _weights(reader: GGUFReader, shape: ModelShape, source: Path) -> dict[str, np.ndarray]:
    names = _hf_names(shape)
    found = {tensor.name for tensor in reader.tensors}
    if found != set(names):
        odd = sorted(found ^ set(names))
        raise ValueError(f"{source.name}: {len(odd)} tensors are unknown or missing, such as {odd[0]!r}; this is not a plain Llama model")
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
    weights = {}
    for tensor in reader.tensors:
        with refusing(source, f"{tensor.name!r} cannot be read: use a Hugging Face folder of this model"):
            weight = dequantize(tensor.data, tensor.tensor_type)
        if not np.isfinite(weight).all():
            raise ValueError(f"{source.name}: {tensor.name!r} holds values that are not finite; fetch the file again")
        rotary = heads.get(tensor.name.split(".")[-2])
        weights[names[tensor.name]] = _unpermute(weight, rotary) if rotary else np.ascontiguousarray(weight, np.float32)
    return weights


def _hf_names(shape: ModelShape) -> dict[str, str]:
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not shape.tied:
        names["output.weight"] = "lm_head.weight"
    for layer in range(shape.layers):
        names |= {f"blk.{layer}.{gguf}.weight": f"model.layers.{layer}.{hf}.weight" for gguf, hf in LAYER_WEIGHTS.items()}
    return names


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H K, D] of q or k, from llama.cpp's rotary pairs (0, 1), (2, 3), ... to Hugging Face's (0, K/2), (1, K/2 + 1), ..."""
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, hidden), np.float32)


def _write_config(metadata: dict[str, Any], shape: ModelShape, folder: Path) -> None:
    ids = {f"{name}_token_id": id for name, id in _token_ids(metadata).items() if name != "unk"}
    write_json(folder / "config.json", to_hf(shape) | ids | {"dtype": "float32"})
    write_json(folder / "generation_config.json", ids)


def _token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    keys = {name: f"tokenizer.ggml.{gguf}_token_id" for name, gguf in TOKEN_NAMES.items()}
    return {name: metadata[key] for name, key in keys.items() if key in metadata}


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    _tokenizer(tokens, metadata["tokenizer.ggml.token_type"], metadata["tokenizer.ggml.merges"]).save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": tokens[id] for name, id in _token_ids(metadata).items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | named)
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _tokenizer(tokens: list[str], types: list[int], merges: list[str]) -> Tokenizer:
    """Byte-level BPE behind llama.cpp's "smollm" pre-tokenizer: every digit stands alone, then GPT-2's regex."""
    odd = set(types) - {TokenType.NORMAL, TokenType.CONTROL}
    if odd or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"the GGUF vocabulary has {'tokens of types ' + str(sorted(odd)) if odd else 'a token twice'}; this is not supported"
        )
    vocab = {token: id for id, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    digits, regex = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, regex])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    assert tokenizer.get_vocab_size(with_added_tokens=True) == len(tokens), "control tokens must not grow the vocabulary"
    return tokenizer


def write_json(path: Path, value: Any) -> None:
    """`value` as readable UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
