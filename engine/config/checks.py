"""Launch checks: errors and warnings from settings and model shapes alone, before any weight is loaded or memory allocated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from engine.config import Model, ModelShape, Parallel, Run, even_split, padded_vocab

MAX_END_EXCESS = 0.1  # warn if the first or last stage has more parameters than the others by more than this fraction
MAX_BUBBLE = 1 / 3  # warn if the pipeline bubble is a larger fraction of the step
MAX_ACTIVATION_BYTES = 30e9  # warn if a GPU holds more bytes of activations

Shape = Callable[[Model], ModelShape]  # the shape of a model's weights or of its `init`, regardless of Model.head


@dataclass(frozen=True)
class Launch:
    """A run on `world_size` ranks, a multiple of tp * pp."""

    run: Run
    world_size: int
    shape: Shape
    on_gpu: bool = True

    @cached_property
    def model(self) -> ModelShape:
        return self.run.model.with_head(self.shape(self.run.model))

    @property
    def dp(self) -> int:
        return self.world_size // self.run.parallel.model_ranks

    @property
    def itemsize(self) -> int:
        """Bytes per element of the compute dtype."""
        dtype = self.run.model.dtype
        return 4 if dtype == "fp32" or (dtype == "auto" and not self.on_gpu) else 2


@dataclass(frozen=True)
class Limit:
    """A value derived from settings. `setting`: these settings as text; `suggest(value)`: settings that give another value."""

    value: int
    setting: str
    suggest: Callable[[int], str]

    @staticmethod
    def by(name: str, value: int) -> Limit:
        return Limit(value, f"{name}={value}", lambda other: f"{name}={other}")


@dataclass(frozen=True)
class Requirements:
    """Requirements of an algorithm on a launch."""

    head: Literal["lm", "scalar"]
    longest_sequence: Limit  # predicted tokens of one sequence
    sequences_per_update: Limit  # sequences (or pairs, which share a microbatch) per optimizer step, over all ranks
    seqs_per_unit: int = 1  # sequences that must share a microbatch
    context: int = 0  # tokens that must fit in the model's context; 0: the longest sequence
    problems: Iterable[str] = ()  # errors specific to the algorithm
    warnings: Iterable[str] = ()


def problems(run: Run, shape: Shape, world_size: int, *, on_gpu: bool = True, tokens: int | None = None) -> list[str]:
    """Return one line per reason why `run` cannot start on `world_size` ranks: the field, its value and one that works.

    tokens  size of the run's tokenizer; None: unknown

    Whether the run fits into memory is not checked.
    """
    launch = Launch(run, world_size, shape, on_gpu)
    try:
        run.parallel.check(launch.model, world_size)
    except ValueError as error:
        return [str(error)]  # the other checks assume a valid grid
    requirements: Requirements = run.algorithm.requirements(launch)
    messages = [
        _wrong_head(launch, requirements),
        tokenizer_problem(run.model, launch.model.vocab, tokens or 0),
        _no_room(launch, requirements),
        _too_few(launch, requirements),
    ]
    return [*filter(None, messages), *requirements.problems]


def _wrong_head(launch: Launch, requirements: Requirements) -> str:
    try:
        check_head(launch.model, requirements.head, f"model {launch.run.model.path or 'init'}")
    except ValueError as error:
        return str(error)
    return ""


def tokenizer_problem(model: Model, vocab: int, tokens: int) -> str:
    """Why a tokenizer of `tokens` ids does not fit the `vocab` rows of the embedding of `model`; "" if it does."""
    if tokens <= vocab:
        return ""
    whose = f"model.tokenizer={model.tokenizer}" if model.tokenizer else "the model's own tokenizer"
    way_out = "leave model.tokenizer empty to use the model's own" if model.tokenizer else "its folder is damaged: download it again"
    return f"{whose} has {tokens} tokens, more than the model's vocabulary of {vocab}; {way_out}"


def _no_room(launch: Launch, requirements: Requirements) -> str:
    longest, budget, tp = requirements.longest_sequence, launch.run.microbatch_tokens, launch.run.parallel.tp
    over = (requirements.context or longest.value) - launch.model.max_length
    if over > 0:
        shorter = longest.suggest(longest.value - over)
        return f"{longest.setting} exceeds the model's context of {launch.model.max_length} tokens; use {shorter}"
    if longest.value > budget:
        need = -(-longest.value // tp) * tp
        shorter = f", or {longest.suggest(budget)}" if budget else ""
        of = f" (a multiple of parallel.tp={tp})" if budget != launch.run.tokens_per_microbatch else ""
        return f"{longest.setting} exceeds tokens_per_microbatch={budget}{of}; use tokens_per_microbatch={need}{shorter}"
    return ""


def _too_few(launch: Launch, requirements: Requirements) -> str:
    update, pp, dp = requirements.sequences_per_update, launch.run.parallel.pp, launch.dp
    if update.value >= pp * dp:
        return ""
    where = f"the parallel.pp={pp} stages of each of {dp} replicas" if pp > 1 else f"{dp} replicas"
    return f"{update.setting} gives {update.value} samples per optimizer step, too few for {where}; use {update.suggest(pp * dp)}"


def check_head(model: ModelShape, head: Literal["lm", "scalar"], name: str, setting: str = "model") -> None:
    """Raise ValueError if the head of `model` is not `head`. `name` and `setting`: of the model, for the message."""
    if model.head != head:
        kinds = {"lm": "a language model", "scalar": "a reward model"}
        way_out = {"lm": f"choose one, with {setting}.head=auto", "scalar": f"to train one from it, use {setting}.head=scalar"}
        raise ValueError(f"{name} is {kinds[model.head]}, but {kinds[head]} is needed; {way_out[head]}")


def check_generation(parallel: Parallel) -> None:
    """Raise ValueError for a grid that cannot generate on GPUs."""
    if parallel.pp == 2 and parallel.vpp > 1:
        # Each rank is both the next and the previous stage of the other. NCCL orders all messages between two ranks, so they deadlock.
        raise ValueError(
            f"parallel.pp=2 with parallel.vpp={parallel.vpp} cannot generate on GPUs; use parallel.vpp=1 or a larger parallel.pp"
        )


def critic_problems(launch: Launch, model: Model) -> Iterator[str]:
    """Yield reasons why `model` cannot be the critic: its head, the policy's grid, or its vocabulary."""
    field, critic, grid = "algorithm.critic.model", model.with_head(launch.shape(model)), launch.run.parallel
    try:
        check_head(critic, "scalar", f"{field} {model.path or 'init'}", field)
    except ValueError as error:
        yield str(error)

    def fits_both(parallel: Parallel) -> bool:
        return parallel.fits_model(launch.model, launch.world_size) and parallel.with_even_stages().fits_model(critic, launch.world_size)

    if not fits_both(grid):
        ways = " or ".join(grid.alternatives(launch.model, fits_both)) or "a critic of other sizes"
        yield (
            f"{field}: parallel.pp={grid.pp} x parallel.vpp={grid.vpp} must divide its {critic.layers} layers, and parallel.tp={grid.tp} "
            f"its {critic.kv_heads} key-value heads; use {ways}"
        )
    if critic.vocab != launch.model.vocab:
        yield (
            f"{field} {model.path or 'init'} has a vocabulary of {critic.vocab} and the policy one of {launch.model.vocab}, but both must "
            f"use the same token ids; use a critic with a vocabulary of {launch.model.vocab}"
        )


def warnings(run: Run, shape: Shape, world_size: int, *, node: int = 8, tokens: float | None = None) -> list[str]:
    """Return one line per inefficient or surprising setting of a launch. The launch must have no `problems`.

    node    GPUs per node
    tokens  mean tokens of a sequence; None: all are assumed to have the maximum length
    """
    launch = Launch(run, world_size, shape)
    requirements: Requirements = run.algorithm.requirements(launch)
    messages = [
        _across_nodes(run.parallel, node),
        _heavy_ends(run.parallel, launch.model),
        _padded(run.parallel, launch.model),
        _uneven(launch, requirements),
        _bubble(launch, requirements, tokens or requirements.longest_sequence.value),
        _split_pairs(launch, requirements),
        _activation_memory(launch),
    ]
    return [*filter(None, messages), *requirements.warnings]


def _across_nodes(parallel: Parallel, node: int) -> str:
    if node % parallel.tp == 0:
        return ""
    best = max(n for n in range(1, parallel.tp) if node % n == 0 and parallel.tp % n == 0)
    return (
        f"parallel.tp={parallel.tp} spans several nodes of {node} GPUs, so every layer communicates over the network between nodes; "
        f"use parallel.tp={best} and a larger parallel.pp"
    )


def _heavy_ends(parallel: Parallel, model: ModelShape) -> str:
    """Warn if the embedding or output layer unbalances the stages' parameters: memory of both end stages, compute of the last."""
    if parallel.pp == 1:
        return ""
    vocabulary = model.hidden * model.vocab / model.layer_parameters
    layers = parallel.layers_per_stage(model)
    ends = (layers[0] + vocabulary, layers[-1] + (vocabulary if model.head == "lm" else 0))
    excess = max(ends) / max(layers) - 1
    if excess <= MAX_END_EXCESS:
        return ""
    slots = round(vocabulary)
    better = even_split(model.layers + 2 * slots, len(layers))
    better[0], better[-1] = better[0] - slots, better[-1] - slots
    way_out = f"parallel.stages={better}" if min(better) >= 0 else "a smaller parallel.pp"
    return (
        f"the embedding and the output layer have as many parameters as {vocabulary:.1f} layers each, so their stages have {excess:.0%} "
        f"more parameters than the others; use {way_out}"
    )


def _padded(parallel: Parallel, model: ModelShape) -> str:
    padded = padded_vocab(model.vocab, parallel.tp)
    if padded == model.vocab:
        return ""
    return (
        f"model.vocab={model.vocab} with parallel.tp={parallel.tp} gives {model.vocab / parallel.tp:g} rows per rank; it is padded to "
        f"{padded}, {padded // parallel.tp} per rank, so that each shard is 16-byte aligned; padding rows are never sampled or exported"
    )


def _uneven(launch: Launch, requirements: Requirements) -> str:
    update, dp = requirements.sequences_per_update, launch.dp
    if update.value % dp == 0:
        return ""
    even = -(-update.value // dp) * dp
    return (
        f"{update.setting} gives {update.value} samples per optimizer step, not a multiple of the {dp} replicas, which therefore get equal "
        f"numbers of tokens, not of samples; use {update.suggest(even)} for equal numbers of samples"
    )


def _bubble(launch: Launch, requirements: Requirements, tokens: float) -> str:
    parallel = launch.run.parallel
    microbatches = math.ceil(
        requirements.sequences_per_update.value * requirements.seqs_per_unit * tokens / (launch.dp * launch.run.microbatch_tokens)
    )
    if parallel.vpp > 1:
        microbatches = -(-microbatches // parallel.pp) * parallel.pp
    idle = (parallel.pp - 1) / (parallel.vpp * microbatches + parallel.pp - 1)
    if idle <= MAX_BUBBLE:
        return ""
    return (
        f"{requirements.sequences_per_update.setting} gives {microbatches} microbatches per replica, so the parallel.pp={parallel.pp} "
        f"stages are idle {idle:.0%} of the time; raise parallel.vpp or the batch size, or lower parallel.pp or tokens_per_microbatch"
    )


def _split_pairs(launch: Launch, requirements: Requirements) -> str:
    need, budget = requirements.seqs_per_unit * requirements.longest_sequence.value, launch.run.microbatch_tokens
    if need <= budget:
        return ""
    return (
        f"both sequences of a pair share a microbatch, and with {requirements.longest_sequence.setting} they can have {need} tokens, more "
        f"than tokens_per_microbatch={budget}; such a pair raises an error when the data is read; use tokens_per_microbatch={need}"
    )


def _activation_memory(launch: Launch) -> str:
    """Warn if activations take much memory. Per token, a layer saves for backward: its input, the residual sum after attention and the
    outputs of both norms; the QKV projection, and queries and keys after the rotary embedding; the output of attention; gate, up and their
    product. The dry run measures them exactly."""
    run, model, grid = launch.run, launch.model, launch.run.parallel
    if grid.recompute != "none":
        return ""
    query, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = launch.itemsize * run.microbatch_tokens / grid.tp * (4 * model.hidden + 3 * query + 3 * kv + 3 * model.ffn)
    # Forward passes that the first rank holds at once.
    in_flight = grid.pp if grid.vpp == 1 else 2 * (grid.pp - 1) + (grid.vpp - 1) * grid.pp + 1
    saved = in_flight * model.layers / (grid.pp * grid.vpp) * layer
    if saved <= MAX_ACTIVATION_BYTES:
        return ""
    return (
        f"parallel.recompute=none with tokens_per_microbatch={run.tokens_per_microbatch} keeps about {saved / 1e9:.0f} GB of activations "
        "on each GPU of the first stage; parallel.recompute=selective keeps less than half of that, but takes about a quarter longer; "
        "parallel.recompute=swiglu keeps a fifth less at nearly the same speed"
    )
