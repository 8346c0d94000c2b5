"""Shapes of models and row counts of datasets that recipes name. Nothing is downloaded."""

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
# From config.json of each model on the hub.
SHAPES = {
    "405b": ModelShape(layers=126, hidden=16384, ffn=53248, heads=128, **_LLAMA_31),
    "70b": ModelShape(layers=80, hidden=8192, ffn=28672, heads=64, **_LLAMA_31),
    "8b": ModelShape(layers=32, hidden=4096, ffn=14336, heads=32, **_LLAMA_31),
    SMOLLM2: ModelShape(layers=30, hidden=576, ffn=1536, heads=9, kv_heads=3, vocab=49152, rope_theta=100000.0, tied=True),
}
TULU_VOCAB = 128264  # Llama 3.1's 128,256 tokens and eight more

# Rows of the train split: num_examples on the dataset card.
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
    """Shape of `model`: from config.json in its folder or in the hub's local cache, otherwise guessed from its name.

    Raises ValueError if the name contains no known size.
    """
    return model.init or _stored(model.path) or _by_name(model.path)


def guess_note(model: Model) -> str:
    """A sentence on what `shape_of` guessed from the name of `model`; "" if it did not have to guess."""
    if model.init or _stored(model.path):
        return ""
    shape = _by_name(model.path)
    return f"{model.path} is not on this machine; its name suggests {shape.layers} layers of hidden size {shape.hidden}, as on the hub"


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
            f"model.path={path!r} is not on this machine, and its name contains no known size ({', '.join(SHAPES)}); "
            "give a folder with config.json"
        )
    shape = replace(SHAPES[size], vocab=TULU_VOCAB) if "tulu-3" in name else SHAPES[size]
    return shape.with_scalar_head() if name.endswith("-rm") else shape


def dataset_rows(sources: tuple[Source, ...]) -> int | None:
    """Samples in one epoch over `sources`, weights applied; None if a source is neither a local file nor listed in ROWS."""
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
