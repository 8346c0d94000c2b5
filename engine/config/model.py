"""The shape of a model, and the choice of initial weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

# The largest sizes that are accepted. A larger one is a mistake, which would only be noticed when memory runs out.
LARGEST = {
    "layers": 4096,
    "hidden": 1 << 20,
    "ffn": 1 << 22,
    "heads": 1 << 16,
    "kv_heads": 1 << 16,
    "vocab": 1 << 24,
    "head_dim": 1 << 14,
    "max_length": (1 << 31) - 1,
}
ROPE_THETA, NORM_EPS = (1.0, 1e18), (1e-30, 1.0)  # accepted ranges


def check_size(setting: str, value: Any, largest: int) -> None:
    """Raise ValueError unless `value` is a whole number from 1 to `largest`."""
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{setting}={value!r:.60} must be a whole number from 1 to {largest}")


def check_number(setting: str, value: Any, bounds: tuple[float, float]) -> None:
    """Raise ValueError unless `value` is a number within `bounds`; NaN is not."""
    if type(value) not in (int, float) or not bounds[0] <= value <= bounds[1]:
        raise ValueError(f"{setting}={value!r:.60} must be a number from {bounds[0]:g} to {bounds[1]:g}")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rotary scaling: wavelengths above `original_length / low` tokens are multiplied by `factor`, those below
    `original_length / high` are unchanged, and those between are interpolated."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        check_number("rope_scaling.factor", self.factor, (1.0, 1e6))
        check_number("rope_scaling.low", self.low, (1e-6, 1e6))
        check_number("rope_scaling.high", self.high, (1e-6, 1e6))
        check_size("rope_scaling.original_length", self.original_length, LARGEST["max_length"])
        if self.high <= self.low:
            raise ValueError(f"rope_scaling.high={self.high} must be more than rope_scaling.low={self.low}; Llama 3 has 4 and 1")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer. `ffn` is the width of one of SwiGLU's two branches."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = 0  # 0: hidden / heads
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    max_length: int = 8192
    head: Literal["lm", "scalar"] = "lm"  # scalar: one value per token instead of logits (reward models and critics)
    family: str = "llama"  # a row of engine/models/families.py

    def __post_init__(self) -> None:
        for name, largest in LARGEST.items():
            if name != "head_dim" or self.head_dim != 0:
                check_size(f"model.{name}", getattr(self, name), largest)
        check_number("model.rope_theta", self.rope_theta, ROPE_THETA)
        check_number("model.norm_eps", self.norm_eps, NORM_EPS)
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if not self.head_dim:
            if self.hidden % self.heads:
                raise ValueError(f"model.hidden={self.hidden} must be a multiple of model.heads={self.heads}, or set model.head_dim")
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: rotary embeddings turn pairs of values")
        if self.tied and self.head == "scalar":
            raise ValueError(
                "model.tied=True shares the output layer's weight, but model.head='scalar' has no output layer; set tied=False"
            )

    @property
    def parameters(self) -> int:
        """Parameters of one replica, without padding."""
        head_rows = 1 if self.head == "scalar" else 0 if self.tied else self.vocab
        return self.layers * self.layer_parameters + self.hidden * (self.vocab + head_rows) + self.hidden

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden

    def kv_cache_bytes(self, layers: int, tp: int, positions: int, itemsize: int) -> int:
        """Bytes of the keys and values of `positions` tokens in `layers` layers, on one of `tp` ranks. `itemsize`: bytes of an element."""
        return 2 * layers * (self.kv_heads // tp) * positions * self.head_dim * itemsize

    def with_scalar_head(self) -> ModelShape:
        """The same shape with a scalar head."""
        return replace(self, head="scalar", tied=False)

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied by: without the embedding, which is looked up, unless it is also the output layer."""
        return self.parameters - (0 if self.tied else self.hidden * self.vocab)

    def forward_flops(self, lengths_N: np.ndarray) -> float:
        """Floating-point operations of a forward pass over sequences of `lengths_N` tokens; forward and backward are three times as many.

        2 per token and matrix parameter, and 4 per head dimension and pair of positions of causal attention. Padding and recomputation
        are not counted, nor are norms, softmax and activations (PaLM, arXiv 2204.02311, appendix B, but for the causal mask).
        """
        lengths_N = lengths_N.astype(float)
        pairs = (lengths_N * (lengths_N + 1) / 2).sum()
        return float(2.0 * self.matrix_parameters * lengths_N.sum() + 4.0 * self.layers * self.heads * self.head_dim * pairs)

    @property
    def cost(self) -> tuple[int, int, int]:
        """(0, c1, c2) such that a sequence of L tokens costs c1 L + c2 L^2. c1 counts the multiply-adds of the weight matrices, and c2
        those of the two products of causal attention, L^2 * heads * head_dim per layer; the unit is layers * heads * head_dim of them."""
        return 0, max(1, self.matrix_parameters // (self.layers * self.heads * self.head_dim)), 1


@dataclass(frozen=True)
class Model:
    """Initial weights: those at `path` (a folder, a Hugging Face id, or smollm2-135m-instruct), or random weights of shape `init`."""

    path: str = ""
    init: ModelShape | None = None
    tokenizer: str = ""  # "": the model's own; "bytes": the built-in byte-level tokenizer
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    head: Literal["auto", "scalar"] = "auto"  # scalar: replace the output layer by a new scalar head; auto: keep the model's head

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.init):
            raise ValueError("model: give either path (existing weights) or init (the shape of a model with random weights)")

    def with_head(self, own: ModelShape) -> ModelShape:
        """`own`, the shape of the weights at `path`, with the head that this config selects."""
        return own.with_scalar_head() if self.head == "scalar" else own


def padded_vocab(vocab: int, tp: int) -> int:
    """`vocab` rounded up so that each of `tp` shards is 16-byte aligned; the padding is the same for tp 1, 2, 4 and 8."""
    multiple = math.lcm(64, 8 * tp)
    return -(-vocab // multiple) * multiple
