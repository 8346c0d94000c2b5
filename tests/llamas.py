"""The shapes of the models that Tülu 3's recipes name, so that no test has to fetch them."""

from __future__ import annotations

from dataclasses import replace

from engine.config import Llama, Model, RopeScaling

_SIZES = {"8B": (32, 4096, 14336, 32), "70B": (80, 8192, 28672, 64), "405B": (126, 16384, 53248, 128)}  # layers, hidden, ffn, heads


def shape(model: Model) -> Llama:
    """Of Llama 3.1's base models, and of Tülu 3's, whose vocabulary has 8 more; -RM is a reward model."""
    size = next(size for size in _SIZES if f"-{size}" in model.path)
    vocab = 128264 if "Tulu" in model.path else 128256
    base = Llama(*_SIZES[size], 8, vocab, rope_theta=5e5, rope_scaling=RopeScaling(), max_length=131072)
    return replace(base, head="scalar") if model.path.endswith("-RM") else base
