"""A run as a typed Python value: frozen dataclasses that check themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from engine.config.overrides import override as override

CLASSIFIER = "LlamaForSequenceClassification"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary scaling: wavelengths beyond `original_length / low` are stretched by `factor`, those below
    `original_length / high` kept."""

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama-family model. `ffn` is the width of one of SwiGLU's two branches."""

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
    head: Literal["lm", "scalar"] = "lm"  # scalar: no vocabulary at the end but one value a token, of a reward model or a critic

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

    def cache_bytes(self, layers: int, tp: int, positions: int, itemsize: int) -> int:
        """Of keys and values of `positions` tokens, on one of `tp` ranks that hold `layers` of the layers."""
        return 2 * layers * (self.kv_heads // tp) * positions * self.head_dim * itemsize

    def with_scalar_head(self) -> Llama:
        """The same layers under a scalar head."""
        return replace(self, head="scalar", tied=False)

    @property
    def cost(self) -> tuple[int, int, int]:
        """(0, c1, c2) such that a sequence of L tokens costs c1 L + c2 L^2: multiply-adds of the matrices and of causal attention's two
        products, L^2 * heads * head_dim a layer, in units of the latter's."""
        matrices = self.parameters - self.hidden * self.vocab * (0 if self.tied else 1)  # an embedding is looked up
        return 0, max(1, matrices // (self.layers * self.heads * self.head_dim)), 1

    @staticmethod
    def from_hf(config: dict[str, Any]) -> Llama:
        """Read a Hugging Face config.json. Raises ValueError for what this engine cannot represent, rather than guess."""
        kind = config.get("model_type")
        if kind != "llama":
            raise ValueError(f"config.json: model_type={kind!r} is not supported; use a Llama-architecture model (model_type 'llama')")
        for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if config.get(name, wanted) != wanted:
                raise ValueError(f"config.json: {name}={config[name]!r} is not supported; this engine needs {wanted!r}")
        head = _head(config)
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
        return Llama(
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
            tied=head == "lm" and config.get("tie_word_embeddings", False),
            max_length=config.get("max_position_embeddings", 8192),
            head=head,
        )

    def head_to_hf(self) -> dict[str, Any]:
        """What config.json says of the head: LlamaForCausalLM, or LlamaForSequenceClassification of one label."""
        if self.head == "lm":
            return {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": self.tied}
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return {"architectures": [CLASSIFIER], "tie_word_embeddings": False} | labels

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers reads."""
        scaling = self.rope_scaling
        rope = None if scaling is None else {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original_length,
        }  # fmt: skip
        return {
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope,
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_length,
            **self.head_to_hf(),
        }


def _head(config: dict[str, Any]) -> Literal["lm", "scalar"]:
    if CLASSIFIER not in (config.get("architectures") or ()):
        return "lm"
    labels = len(config.get("id2label") or (0, 1))  # two are transformers' default, which it does not write down
    if labels != 1:
        raise ValueError(f"config.json: {labels} labels (id2label) are not supported; this engine needs one, the reward")
    return "scalar"


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config.json: rope scaling {kind!r} is not supported; use 'llama3' or none")
    return RopeScaling(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"])


@dataclass(frozen=True)
class Model:
    """Which weights to start from: `path` (a folder, a Hugging Face id, or smollm2-135m-instruct), or random ones of shape `init`."""

    path: str = ""
    init: Llama | None = None
    tokenizer: str = ""  # default: the model's own; "bytes" is the built-in byte-level one
    dtype: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 on GPUs, fp32 on CPUs
    head: Literal["auto", "scalar"] = "auto"  # scalar: a language model's output layer gives way to a fresh scalar head; auto: its own

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.init):
            raise ValueError("model: give either path (existing weights) or init (a Llama shape with random weights)")

    def headed(self, own: Llama) -> Llama:
        """`own`, the shape of the weights, under the head that is asked for."""
        return own.with_scalar_head() if self.head == "scalar" else own


@dataclass(frozen=True)
class Optim:
    """AdamW. Norms and biases never decay. `warmup` is a share of all steps."""

    lr: float
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        if not 0 <= self.lr <= 1:
            raise ValueError(f"optim.lr={self.lr} must be from 0 to 1: AdamW moves a weight by about that much a step; use 1e-6, say")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optim.warmup={self.warmup} is a share of all steps, from 0 to below 1; use 0.03, say")
        if not self.clip >= 0:
            raise ValueError(f"optim.clip={self.clip} must not be negative; use 1.0, or 0 for no clipping")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of `step` (from 0) of `steps`: linear warm-up to `lr`, then the schedule down to 0."""
        warmup = round(self.warmup * steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - warmup) / max(1, steps - warmup)
        return self.lr * (1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


Recompute = Literal["none", "swiglu", "selective", "full"]  # in backward: nothing, SwiGLU's output, MLPs, layers; slower, and smaller


@dataclass(frozen=True)
class Parallel:
    """The grid. Data parallelism is what is left of the world: dp = world size / (tp * pp)."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1  # virtual stages a pipeline rank holds (interleaved 1F1B)
    count_embedding: bool = False  # the embedding takes a layer's slot when layers are dealt to stages
    count_loss: bool = False  # and so does the output layer
    stages: tuple[int, ...] = ()  # or deal by hand: layers of each of the pp * vpp stages, in order
    recompute: Recompute = "none"
    tp_comm_overlap: bool = False  # overlap tensor-parallel communication with matrix products; GPUs of one node only
    distributed_optimizer: bool = True  # optimizer state sharded over data-parallel ranks

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp={self.vpp} needs parallel.pp of at least 2, or vpp=1")

    def check(self, model: Llama, world_size: int) -> None:
        """Raise ValueError unless this grid can hold `model` on `world_size` ranks; the message names values that can."""
        if fault := self._fault(model, world_size):
            raise ValueError(f"{fault}; use {self._way_out(model, world_size)}")

    def evenly(self) -> Parallel:
        """The same grid for another model, whose layers are dealt evenly."""
        return replace(self, stages=(), count_embedding=False, count_loss=False)

    def dealt(self, model: Llama) -> list[int]:
        """Layers of each of the pp * vpp stages, in order; pipeline rank r holds stages r, r + pp, ..."""
        count = self.pp * self.vpp
        layers = list(self.stages) or [self._slots(model) // count] * count
        layers[0] -= 0 if self.stages else self.count_embedding
        layers[-1] -= 0 if self.stages else self.count_loss
        return layers

    def most_layers(self, model: Llama) -> int:
        """Layers of the pipeline rank that holds most."""
        dealt = self.dealt(model)
        return max(sum(dealt[rank :: self.pp]) for rank in range(self.pp))

    def _slots(self, model: Llama) -> int:
        return model.layers + self.count_embedding + self.count_loss

    def _fault(self, model: Llama, world_size: int) -> str:
        """Why this grid cannot hold `model`; "" when it can."""
        ranks, count, slots = self.tp * self.pp, self.pp * self.vpp, self._slots(model)
        if model.heads % self.tp or model.kv_heads % self.tp or model.ffn % self.tp:
            sizes = f"model.heads={model.heads}, model.kv_heads={model.kv_heads} and model.ffn={model.ffn}"
            return f"parallel.tp={self.tp} must divide {sizes}"
        if self.stages and (len(self.stages) != count or sum(self.stages) != model.layers or min(self.stages) < 0):
            given = f"parallel.stages={list(self.stages)}"
            return f"{given} must give the layers of pp x vpp = {count} stages, in sum model.layers={model.layers}"
        if not self.stages and slots % count:
            counted = " and ".join(["embedding"] * self.count_embedding + ["loss"] * self.count_loss)
            more = f" ({slots} slots with {counted} counted)" if counted else ""
            return f"parallel.pp={self.pp} x parallel.vpp={self.vpp} must divide model.layers={model.layers}{more}"
        if world_size % ranks:
            return f"the world has {world_size} ranks, which parallel.tp={self.tp} x parallel.pp={self.pp} = {ranks} must divide"
        return ""

    def holds(self, model: Llama, world_size: int) -> bool:
        """Whether this grid can hold `model` on `world_size` ranks."""
        return not self._fault(model, world_size)

    def alternatives(self, model: Llama, holds: Callable[[Parallel], bool]) -> list[str]:
        """Values of tp, of pp and of vpp, the others left as they are, for which `holds`."""
        ways = []
        for name, most in (("tp", model.kv_heads), ("pp", model.layers + 2), ("vpp", model.layers + 2)):
            least = 2 if name == "pp" and self.vpp > 1 else 1
            upper = 1 if name == "vpp" and self.pp == 1 else most  # virtual stages want a pipeline
            if good := [n for n in range(least, upper + 1) if holds(replace(self, **{name: n}))]:
                ways.append(f"parallel.{name}={_one_of(good)}")
        return ways

    def _way_out(self, model: Llama, world_size: int) -> str:
        """Values of one setting, the others left as they are, that do."""

        def fits(**change: Any) -> bool:
            return replace(self, **change).holds(model, world_size)

        ways = self.alternatives(model, lambda other: other.holds(model, world_size))
        if not self.stages and fits(count_embedding=True, count_loss=True):
            ways.append("parallel.count_embedding=true with count_loss=true")
        below = world_size - world_size % (self.tp * self.pp)
        if good := [n for n in (below, below + self.tp * self.pp) if n and self.holds(model, n)]:
            ways.append(f"{_one_of(good)} ranks")
        by_hand = spread(model.layers, self.pp * self.vpp)
        if (len(by_hand) <= 16 or not ways) and fits(stages=tuple(by_hand)):
            ways.append(f"parallel.stages={by_hand}")
        if not ways:
            grids = ((tp, pp) for tp in range(model.kv_heads, 0, -1) for pp in range(self.pp, 0, -1))
            tp, pp = next((tp, pp) for tp, pp in grids if fits(tp=tp, pp=pp, vpp=1, stages=()))
            ways.append(f"parallel.tp={tp} with parallel.pp={pp} and vpp=1")
        return ", or ".join(ways)


def spread(layers: int, stages: int) -> list[int]:
    """Layers dealt to stages as evenly as can be, the outer ones lighter: they have the embedding and the loss besides."""
    share, left = divmod(layers, stages)
    first = (stages - left) // 2
    return [share + (first <= stage < first + left) for stage in range(stages)]


def padded_vocab(vocab: int, tp: int) -> int:
    """`vocab` rounded up so that each of `tp` shards keeps its rows 16-byte aligned, by the same padding for tp 1, 2, 4 and 8."""
    multiple = math.lcm(64, 8 * tp)
    return -(-vocab // multiple) * multiple


def _one_of(values: list[int]) -> str:
    return ", ".join(map(str, values[:-1])) + (" or " if len(values) > 1 else "") + str(values[-1])


@dataclass(frozen=True)
class Logging:
    """Where numbers go besides the terminal and metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str = ""  # set it to log to Weights & Biases


@dataclass(frozen=True)
class Run:
    """One training run, whole. `algorithm` is a config from engine/algorithms; its `start(policy, run)` gives collect and loss."""

    model: Model
    algorithm: Any
    optim: Optim
    parallel: Parallel = field(default_factory=Parallel)
    out: str = "runs/run"
    steps: int = 0  # 0: as many as the algorithm's epochs take
    tokens_per_microbatch: int = 4096
    seed: int = 0
    save_every: int = 0  # 0: only at the end
    keep_last: int = 2
    eval_every: int = 0  # 0: only at the start and the end, where there is held-out data
    deterministic: bool = False  # the same bits in every run on the same machine and layout, on GPUs too, at the cost of speed
    logging: Logging = field(default_factory=Logging)

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("tokens_per_microbatch", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def microbatch_tokens(self) -> int:
        """How many real tokens a microbatch can hold: every rank of a tensor-parallel group holds equally many."""
        return self.tokens_per_microbatch // self.parallel.tp * self.parallel.tp

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: everything but where and how it is computed, saved and logged."""
        elsewhere = {"parallel", "tokens_per_microbatch", "out", "save_every", "keep_last", "eval_every", "deterministic", "logging"}
        return {name: value for name, value in to_dict(self).items() if name not in elsewhere}


def step_folder(out: Path, step: int) -> Path:
    """Where a run's checkpoint of `step` is."""
    return out / f"step-{step:08d}"


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; nested dataclasses carry their class name under "is"."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {"is": type(value).__name__} | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)
