"""The shape of a model, and the weights that a run starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary scaling: wavelengths beyond `original_length / low` are stretched by `factor`, those below
    `original_length / high` kept."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192


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
    head: Literal["lm", "scalar"] = "lm"  # scalar: one value a token instead of logits (reward models and critics)
    family: str = "llama"  # the row of engine/models/families.py

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.heads={self.heads} must be a multiple of model.kv_heads={self.kv_heads}")
        if not self.head_dim:
            if self.hidden % self.heads:
                raise ValueError(f"model.hidden={self.hidden} must be a multiple of model.heads={self.heads}, or set model.head_dim")
            object.__setattr__(self, "head_dim", self.hidden // self.heads)
        if self.tied and self.head == "scalar":
            raise ValueError("model.tied=True ties the vocabulary's output layer, which model.head='scalar' has none of; set tied=False")

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
        """Of keys and values of `positions` tokens, on one of `tp` ranks that hold `layers` of the layers."""
        return 2 * layers * (self.kv_heads // tp) * positions * self.head_dim * itemsize

    def with_scalar_head(self) -> ModelShape:
        """The same layers under a scalar head."""
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
        """(0, c1, c2) such that a sequence of L tokens costs c1 L + c2 L^2: multiply-adds of the matrices and of causal attention's two
        products, L^2 * heads * head_dim a layer, in units of the latter's."""
        return 0, max(1, self.matrix_parameters // (self.layers * self.heads * self.head_dim)), 1


@dataclass(frozen=True)
class Model:
    """Which weights to start from: `path` (a folder, a Hugging Face id, or smollm2-135m-instruct), or random ones of shape `init`."""

    path: str = ""
    init: ModelShape | None = None
    tokenizer: str = ""  # default: the model's own; "bytes" is the built-in byte-level one
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    head: Literal["auto", "scalar"] = "auto"  # scalar: a language model's output layer gives way to a fresh scalar head; auto: its own

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.init):
            raise ValueError("model: give either path (existing weights) or init (a Llama shape with random weights)")

    def with_head(self, own: ModelShape) -> ModelShape:
        """`own`, the shape of the weights, under the head that is asked for."""
        return own.with_scalar_head() if self.head == "scalar" else own


def padded_vocab(vocab: int, tp: int) -> int:
    """`vocab` rounded up so that each of `tp` shards keeps its rows 16-byte aligned, by the same padding for tp 1, 2, 4 and 8."""
    multiple = math.lcm(64, 8 * tp)
    return -(-vocab // multiple) * multiple
