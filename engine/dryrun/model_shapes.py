"""What recipes name and a machine without network cannot look up: shapes of models, rows of data sets. Nothing is ever downloaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import Model, ModelShape, RopeScaling
from engine.data.rows import Source
from engine.models.families import read_shape
from engine.models.hub import SMOLLM2

_LLAMA_31: dict[str, Any] = {
    "kv_heads": 8,
    "vocab": 128256,
    "rope_theta": 500000.0,
    "rope_scaling": RopeScaling(),
    "max_length": 131072,
}
# Their config.json, as read on the hub.
SHAPES = {
    "405b": ModelShape(layers=126, hidden=16384, ffn=53248, heads=128, **_LLAMA_31),
    "70b": ModelShape(layers=80, hidden=8192, ffn=28672, heads=64, **_LLAMA_31),
    "8b": ModelShape(layers=32, hidden=4096, ffn=14336, heads=32, **_LLAMA_31),
    SMOLLM2: ModelShape(layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, vocab=49152, rope_theta=100000.0, tied=True),
}
TULU_VOCAB = 128264  # eight tokens more than Llama 3.1's

# Rows of the train split: num_examples of their dataset cards.
ROWS = {
    "allenai/tulu-3-sft-mixture": 939343,
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": 271409,
    "allenai/llama-3.1-tulu-3-70b-preference-mixture": 334367,
    "allenai/llama-3.1-tulu-3-405b-preference-mixture": 360924,
    "allenai/RLVR-GSM": 7473,
    "allenai/RLVR-MATH": 7500,
    "allenai/RLVR-GSM-MATH-IF-Mixed-Constraints": 29946,
}


def shape_of(model: Model) -> ModelShape:
    """The shape of the weights that `model` names, as its folder's config.json says it, or the hub's where it lies on this machine; else
    by what the name contains. Raises ValueError for a name that says nothing."""
    return model.init or _stored(model.path) or _by_name(model.path)


def guess_note(model: Model) -> str:
    """What `shape` assumes of `model`; "" where it knows."""
    if model.init or _stored(model.path):
        return ""
    found = _by_name(model.path)
    return f"{model.path} is not on this machine; by its name it has {found.layers} layers of {found.hidden}, as the hub's config.json says"


def _stored(path: str) -> ModelShape | None:
    from huggingface_hub import try_to_load_from_cache  # slow to import

    folder = Path(path).expanduser()
    if folder.is_dir():
        return read_shape(folder)
    if path.count("/") == 1 and isinstance(config := try_to_load_from_cache(path, "config.json"), str):
        return read_shape(Path(config).parent)
    return None


def _by_name(path: str) -> ModelShape:
    name = path.lower()
    size = next((size for size in SHAPES if size == name or size in name.split("-")), None)
    if size is None:
        raise ValueError(
            f"model.path={path!r} is not on this machine, and its name tells no shape ({', '.join(SHAPES)}); give a folder with config.json"
        )
    found = replace(SHAPES[size], vocab=TULU_VOCAB) if "tulu-3" in name else SHAPES[size]
    return found.with_scalar_head() if name.endswith("-rm") else found


def dataset_rows(sources: tuple[Source, ...]) -> int | None:
    """Samples of one epoch over `sources`, weights applied; None where one is neither a file at hand nor known."""
    total = 0
    for source in sources:
        path = Path(source.path)
        if source.is_file and path.is_file():
            with path.open("rb") as file:
                count = sum(1 for line in file if line.strip())
        elif source.path in ROWS:
            count = ROWS[source.path]
        else:
            return None
        total += round(source.weight * (min(count, source.limit) if source.limit else count))
    return total
