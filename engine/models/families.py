"""Model families: one row for each Hugging Face `model_type` that the engine reads and writes.

A row reads and writes config.json, and maps the weights of one layer between Hugging Face tensors and megatron-core parameters. To add a
family, write its row here and its test in tests/distributed/test_weights.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from engine.config import ModelShape, RopeScaling, padded_vocab

EMBEDDING, FINAL_NORM, OUTPUT = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
SCALAR_HEAD = "score.weight"  # the name in ...ForSequenceClassification


@dataclass(frozen=True)
class Slice:
    """`length` rows (dim 0) or columns (dim 1) of the Hugging Face tensor `name`, starting at `source_offset`, which a rank holds at
    `offset` of its parameter."""

    name: str
    dim: int
    source_offset: int
    offset: int
    length: int


@dataclass(frozen=True)
class ModelFamily:
    """How one `model_type` maps to the engine.

    from_hf        config.json -> shape; raises ValueError for a setting that the engine cannot compute exactly
    to_hf          shape -> config.json, without what `head_to_hf` adds
    layer_tensors  shape -> name and shape of every Hugging Face tensor of one layer, names relative to the layer
    layer_slices   (shape, tp, rank) -> for each megatron-core parameter of one layer, the slices that a tensor-parallel rank holds
    """

    model_type: str
    causal_lm: str  # the Hugging Face classes
    classifier: str
    from_hf: Callable[[dict[str, Any]], ModelShape]
    to_hf: Callable[[ModelShape], dict[str, Any]]
    layer_tensors: Callable[[ModelShape], dict[str, tuple[int, ...]]]
    layer_slices: Callable[[ModelShape, int, int], dict[str, list[Slice]]]


def from_hf(config: dict[str, Any]) -> ModelShape:
    """The shape that a Hugging Face config.json describes. Raises ValueError for an unsupported family or setting."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type={model_type!r} is not supported; use one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    head = _head(config, family)
    shape = family.from_hf(config)
    return replace(shape, head=head, tied=head == "lm" and config.get("tie_word_embeddings", False))


def to_hf(shape: ModelShape) -> dict[str, Any]:
    """The config.json of `shape`, as transformers reads it."""
    return {"model_type": shape.family} | FAMILIES[shape.family].to_hf(shape) | head_to_hf(shape)


def head_to_hf(shape: ModelShape) -> dict[str, Any]:
    """The fields of config.json that describe the head: a causal language model, or a sequence classifier with one label."""
    family = FAMILIES[shape.family]
    if shape.head == "lm":
        return {"architectures": [family.causal_lm], "tie_word_embeddings": shape.tied}
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {"architectures": [family.classifier], "tie_word_embeddings": False} | labels


def _head(config: dict[str, Any], family: ModelFamily) -> Literal["lm", "scalar"]:
    if family.classifier not in (config.get("architectures") or ()):
        return "lm"
    labels = len(config.get("id2label") or (0, 1))  # two are transformers' default, which it does not write down
    if labels != 1:
        raise ValueError(f"config.json: {labels} labels (id2label) are not supported; this engine needs one, the reward")
    return "scalar"


def tensor_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face model."""
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab, shape.hidden), FINAL_NORM: (shape.hidden,)}
    if shape.head == "scalar":
        tensors[SCALAR_HEAD] = (1, shape.hidden)
    elif not shape.tied:
        tensors[OUTPUT] = (shape.vocab, shape.hidden)
    layer = FAMILIES[shape.family].layer_tensors(shape)
    return tensors | {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in layer.items()}


def slices(parameter: str, shape: ModelShape, tp: int, rank: int) -> list[Slice]:
    """What tensor-parallel rank `rank` of `tp` holds in `parameter` (megatron-core's name, with layers counted over the whole model)."""
    if parameter == "embedding.word_embeddings.weight":
        return _vocab(EMBEDDING, shape, tp, rank)
    if parameter == "output_layer.weight" and shape.head == "scalar":
        return [Slice(SCALAR_HEAD, 0, 0, 0, 1)]
    if parameter == "output_layer.weight":
        return _vocab(EMBEDDING if shape.tied else OUTPUT, shape, tp, rank)
    if parameter == "decoder.final_layernorm.weight":
        return [Slice(FINAL_NORM, 0, 0, 0, shape.hidden)]
    _, _, layer, part = parameter.split(".", 3)
    return [replace(each, name=f"model.layers.{layer}.{each.name}") for each in _layer_slices(shape, tp, rank)[part]]


@lru_cache
def _layer_slices(shape: ModelShape, tp: int, rank: int) -> dict[str, list[Slice]]:
    return FAMILIES[shape.family].layer_slices(shape, tp, rank)


def _vocab(name: str, shape: ModelShape, tp: int, rank: int) -> list[Slice]:
    """Rows beyond the vocabulary are padding, which no slice names."""
    shard = padded_vocab(shape.vocab, tp) // tp
    length = min(shard, shape.vocab - rank * shard)
    return [Slice(name, 0, rank * shard, 0, length)] if length > 0 else []


def _qkv(shape: ModelShape, tp: int, rank: int) -> list[Slice]:
    """megatron-core's order: for each key-value head the query heads that share it, then its key, then its value."""
    query, size = shape.heads // shape.kv_heads * shape.head_dim, shape.head_dim
    rows, offset = [], 0
    for group in range(rank * shape.kv_heads // tp, (rank + 1) * shape.kv_heads // tp):
        for name, source, length in (("q", group * query, query), ("k", group * size, size), ("v", group * size, size)):
            rows.append(Slice(f"self_attn.{name}_proj.weight", 0, source, offset, length))
            offset += length
    return rows


def _llama_from_hf(config: dict[str, Any]) -> ModelShape:
    for name, supported in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if config.get(name, supported) != supported:
            raise ValueError(f"config.json: {name}={config[name]!r} is not supported; this engine needs {supported!r}")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
    return ModelShape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocab=config["vocab_size"],
        head_dim=config.get("head_dim") or 0,
        rope_theta=theta,
        rope_scaling=_rope_scaling(rope),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        max_length=config.get("max_position_embeddings", 8192),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config.json: rope scaling {kind!r} is not supported; use 'llama3' or none")
    return RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])


def _llama_to_hf(shape: ModelShape) -> dict[str, Any]:
    scaling = shape.rope_scaling
    rope = None if scaling is None else {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original_length,
    }  # fmt: skip
    return {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "rope_theta": shape.rope_theta,
        "rope_scaling": rope,
        "rms_norm_eps": shape.norm_eps,
        "max_position_embeddings": shape.max_length,
    }


def _llama_layer_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "input_layernorm.weight": (shape.hidden,),
        "post_attention_layernorm.weight": (shape.hidden,),
        "self_attn.q_proj.weight": (query, shape.hidden),
        "self_attn.k_proj.weight": (kv, shape.hidden),
        "self_attn.v_proj.weight": (kv, shape.hidden),
        "self_attn.o_proj.weight": (shape.hidden, query),
        "mlp.gate_proj.weight": (shape.ffn, shape.hidden),
        "mlp.up_proj.weight": (shape.ffn, shape.hidden),
        "mlp.down_proj.weight": (shape.hidden, shape.ffn),
    }


def _llama_layer_slices(shape: ModelShape, tp: int, rank: int) -> dict[str, list[Slice]]:
    heads, ffn = shape.heads // tp * shape.head_dim, shape.ffn // tp
    return {
        "input_layernorm.weight": [Slice("input_layernorm.weight", 0, 0, 0, shape.hidden)],
        "pre_mlp_layernorm.weight": [Slice("post_attention_layernorm.weight", 0, 0, 0, shape.hidden)],
        "self_attention.linear_qkv.weight": _qkv(shape, tp, rank),
        "self_attention.linear_proj.weight": [Slice("self_attn.o_proj.weight", 1, rank * heads, 0, heads)],
        # Gate, then up, within each rank.
        "mlp.linear_fc1.weight": [Slice(f"mlp.{name}_proj.weight", 0, rank * ffn, i * ffn, ffn) for i, name in enumerate(("gate", "up"))],
        "mlp.linear_fc2.weight": [Slice("mlp.down_proj.weight", 1, rank * ffn, 0, ffn)],
    }


LLAMA = ModelFamily(
    model_type="llama",
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    from_hf=_llama_from_hf,
    to_hf=_llama_to_hf,
    layer_tensors=_llama_layer_tensors,
    layer_slices=_llama_layer_slices,
)
FAMILIES = {family.model_type: family for family in (LLAMA,)}
