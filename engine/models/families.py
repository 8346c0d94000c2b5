"""Model families: one row for each Hugging Face `model_type` that the engine reads and writes.

A row reads and writes config.json, and maps the weights of one layer between Hugging Face tensors and megatron-core parameters. To add a
family, write its row here and its test in tests/distributed/test_weights.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from engine.config import ModelShape, RopeScaling, padded_vocab
from engine.config.model import LARGEST, NORM_EPS, ROPE_THETA, check_number, check_size
from engine.files import read_object

EMBEDDING, FINAL_NORM, OUTPUT = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
REFUSED = {  # fields of config.json that change what the model computes
    "auto_map": "the folder wants to run code of its own, which never happens here; remove it if the model is a plain one",
    "quantization_config": "weights must be floating point; fetch the model that was quantised",
}
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


def read_shape(folder: Path) -> ModelShape:
    """The shape that a folder's config.json describes. Raises ValueError if it cannot be read or is not supported."""
    path = folder / "config.json"
    config = read_object(path, "a model's config")
    try:
        return from_hf(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def from_hf(config: dict[str, Any]) -> ModelShape:
    """The shape that a Hugging Face config.json describes. Raises ValueError, naming the field, for an unsupported family or setting."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type={model_type!r:.60} is not supported; use one of {', '.join(FAMILIES)}")
    for name in ("auto_map", "quantization_config"):
        if config.get(name) is not None:
            raise ValueError(f"config.json: {name} is not supported: {REFUSED[name]}")
    family = FAMILIES[model_type]
    head = _head(config, family)
    tied = _field(config, "tie_word_embeddings", bool, False)
    try:
        return replace(family.from_hf(config), head=head, tied=head == "lm" and tied)
    except ValueError as error:
        raise ValueError(f"config.json: {error}" if not str(error).startswith("config.json") else str(error)) from None


def _field(config: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of a config, of type `kind`, or `default` where it is absent or null."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ValueError(f"config.json: {name}={value!r:.60} must be a {kind.__name__}")
    return value


def _size(config: dict[str, Any], name: str, largest: str, default: int | None = None) -> int:
    """A whole number of a config. Raises ValueError if it is missing without a default, or out of the range of `largest`."""
    value = config.get(name) if config.get(name) is not None else default
    if value is None:
        raise ValueError(f"config.json: {name} is missing; fetch the model again")
    check_size(f"config.json: {name}", value, LARGEST[largest])
    return value


def _number(config: dict[str, Any], name: str, bounds: tuple[float, float], default: float) -> float:
    value = default if config.get(name) is None else config[name]
    check_number(f"config.json: {name}", value, bounds)
    return value


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
    if family.classifier not in _field(config, "architectures", list, []):
        return "lm"
    labels = len(_field(config, "id2label", dict, {}) or (0, 1))  # two are transformers' default, which it does not write down
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
            raise ValueError(f"config.json: {name}={config[name]!r:.60} is not supported; this engine needs {supported!r}")
    rope = _field(config, "rope_parameters", dict, {}) or _field(config, "rope_scaling", dict, {})
    heads = _size(config, "num_attention_heads", "heads")
    return ModelShape(
        layers=_size(config, "num_hidden_layers", "layers"),
        hidden=_size(config, "hidden_size", "hidden"),
        ffn=_size(config, "intermediate_size", "ffn"),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", "kv_heads", heads),
        vocab=_size(config, "vocab_size", "vocab"),
        head_dim=0 if config.get("head_dim") is None else _size(config, "head_dim", "head_dim"),
        rope_theta=float(_number(config | rope, "rope_theta", ROPE_THETA, 10000.0)),
        rope_scaling=_rope_scaling(rope),
        norm_eps=_number(config, "rms_norm_eps", NORM_EPS, 1e-6),
        max_length=_size(config, "max_position_embeddings", "max_length", 8192),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor={rope['partial_rotary_factor']!r:.60} is not supported; it must be 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config.json: rope scaling {kind!r:.60} is not supported; use 'llama3' or none")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [name for name in names if name not in rope]:
        raise ValueError(f"config.json: rope scaling 'llama3' needs {', '.join(missing)}; fetch the model again")
    return RopeScaling(*(rope[name] for name in names))


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
