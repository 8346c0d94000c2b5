"""Token generation on the policy's own weights, with KV caches and pipeline parallelism.

Sequences are divided into groups. The next tokens of a group pass through the pipeline stages as one batch, while other stages compute the
batches of other groups: with as many groups as stages, no stage is idle. A group plans its next batch from its sampled tokens alone.
Every rank of a replica therefore plans the same batches, knows their shapes without communication, and stops at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import lcm
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelShape
from engine.distributed.world import World
from engine.megatron.attention import Attend, PackedForward, rope_angles, rope_frequencies
from engine.megatron.backend import Grid
from engine.megatron.graphs import Graphs
from engine.megatron.prefix_attention import PrefixKV, decode_attention_with_prefix, prefill_attention
from engine.megatron.tokens import Pending, TokenSender
from triton_kernels import decode_attention
from triton_kernels.launch import by_kernel
from triton_kernels.tiles import power_of_2


@dataclass(frozen=True)
class TokenSampling:
    """Sampling parameters; see triton_kernels.draw.

    Log-probs are of the distribution at `temperature`, before top_k and top_p; at temperature 0 (greedy) they are at temperature 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class DecodeBatch:
    """One forward pass of one group: one token for each decode row (cache rows 0 ... decode_rows - 1), then whole prompts to prefill.

    R rows sample a token at the end of it.
    """

    tokens: list[int]
    positions: list[int]
    decode_rows: int
    max_context: int  # most positions that a decode row attends to, its own included
    prompts: list[int]  # lengths
    rows: list[list[int]]  # cache rows that each prompt is written to
    sampled_R: list[int]  # index into `tokens` after which each row samples
    keys_R2: np.ndarray  # int32


class SequenceGroup(Protocol):
    """The sequences of one KV cache; decides what each batch computes."""

    def plan(self) -> DecodeBatch | None:
        """The next batch; None when all sequences are finished."""
        ...

    def update(self, tokens_R: list[int], logprobs_R: list[float]) -> list[tuple[int, int, int]]:
        """Append the tokens sampled by the last batch. Returns the cache moves (from row, to row, positions) that keep live rows first."""
        ...


@dataclass
class Prefill:
    """A group of one sequence that is prefilled and not continued."""

    tokens: list[int]

    def plan(self) -> DecodeBatch | None:
        """The whole sequence once, then None."""
        tokens, self.tokens = self.tokens, []
        if not tokens:
            return None
        count = len(tokens)
        return DecodeBatch(tokens, list(range(count)), 0, 1, [count], [[0]], [count - 1], np.zeros((1, 2), np.int32))

    def update(self, tokens_R: list[int], logprobs_R: list[float]) -> list[tuple[int, int, int]]:
        """Discards the sampled token."""
        return []


class KVCache:
    """Keys and values of this rank's layers, each [slots, KV, positions, K].

    prefix: a cache of one slot which every slot of this cache continues; positions in this cache are counted from its end.
    """

    def __init__(
        self, layers: Sequence[int], slots: int, heads: int, positions: int, size: int, like: Tensor, prefix: KVCache | None = None
    ):
        self.layers = {
            layer: (like.new_zeros(slots, heads, positions, size), like.new_zeros(slots, heads, positions, size)) for layer in layers
        }
        self.slots, self.positions, self.first_position = slots, positions, prefix.positions if prefix else 0
        self.prefix_kv: dict[int, PrefixKV] = {layer: (pair[0][0], pair[1][0]) for layer, pair in prefix.layers.items()} if prefix else {}

    def move(self, source: int, target: int, positions: int) -> None:
        """Copy the first `positions` positions of slot `source` to slot `target`."""
        for pair in self.layers.values():
            for cached in pair:
                cached[target, :, :positions] = cached[source, :, :positions]


@dataclass
class KVWrite:
    """Where a batch's keys and values are written, and how its tokens are sampled; a field of PackedForward.

    n is the number of decode rows, padding rows included.
    """

    cache: KVCache
    sampling: TokenSampling
    positions_n: Tensor  # of decode rows 0 ... n - 1; -1: a padding row, which writes to the last position of its own slot
    keys_R2: Tensor  # random keys, int32
    max_context: int  # as in DecodeBatch
    prompts: Sequence[int] = ()
    rows: Sequence[list[int]] = ()

    @cached_property
    def rows_n(self) -> Tensor:
        return torch.arange(len(self.positions_n), device=self.positions_n.device)

    @cached_property
    def lengths_n(self) -> Tensor:
        """Positions that each decode row attends to, its own included."""
        return self.positions_n + 1

    @cached_property
    def mask_n(self) -> Tensor:
        """[n, 1, 1, max_context], True where a decode row attends."""
        return (torch.arange(self.max_context, device=self.positions_n.device) < self.lengths_n[:, None])[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, packed_forward: PackedForward, attend: Attend) -> Tensor:
        """Decode rows attend to their cache, prompts to themselves (and to the prefix); keys and values of both are cached.

        query [T, H, K], key and value [T, KV, K] -> [T, H, K]
        """
        keys, values = self.cache.layers[layer]
        n = len(self.positions_n)
        ends = np.cumsum([n, *self.prompts])
        for rows, start, end in zip(self.rows, ends[:-1], ends[1:], strict=True):
            # A slice, because indexing with a list copies it to the device and synchronizes.
            assert rows == list(range(rows[0], rows[-1] + 1)), rows
            keys[rows[0] : rows[-1] + 1, :, : end - start] = key[start:end].transpose(0, 1)
            values[rows[0] : rows[-1] + 1, :, : end - start] = value[start:end].transpose(0, 1)
        prefix = self.cache.prefix_kv.get(layer)
        parts = [self._decode(keys, values, query[:n], key[:n], value[:n], prefix)] if n else []
        if len(query) > n:
            prompts = (query[n:], key[n:], value[n:])
            parts.append(prefill_attention(prefix, *prompts, packed_forward.lengths) if prefix else attend(*prompts, packed_forward))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode(self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, prefix: PrefixKV | None) -> Tensor:
        keys[self.rows_n, :, self.positions_n] = key
        values[self.rows_n, :, self.positions_n] = value
        if by_kernel(query) and not prefix:
            return decode_attention(query, keys, values, self.lengths_n)
        n, heads, size = query.shape
        grouped = query.view(n, keys.shape[1], -1, size)  # query heads of a KV head are adjacent: keys need no copies
        keys, values = (cached[:n, :, : self.max_context] for cached in (keys, values))
        if prefix:
            return decode_attention_with_prefix(prefix, grouped, keys, values, self.mask_n).reshape(n, heads, size)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask_n).reshape(n, heads, size)


@dataclass
class StageInput:
    """A batch, ready to run on this rank."""

    live_rows: int  # R, rows that sample a token
    tokens: int  # T, with padding
    sampled_rows: int  # R, with padding
    forward: Callable[[int], Tensor]  # virtual stage of this rank -> its output
    hidden: Tensor | None = None  # [T / tp, 1, D], the buffer to receive the previous stage's hidden states in; None: any


class PendingTokens(NamedTuple):
    """The sampled tokens of a batch, which may not have arrived yet."""

    pending: Pending  # padding rows are last
    live_rows: int


def prefill_step(
    chunks: Sequence[Any],
    cache: KVCache,
    batch: DecodeBatch,
    sampling: TokenSampling,
    model: ModelShape,
    multiple: int,
    device: torch.device,
) -> StageInput:
    """A batch with prompts, padded to a multiple of `multiple` tokens.

    The sequences of its PackedForward are the prompts, and the padding if there is any.
    """
    extra = -len(batch.tokens) % multiple
    tokens_T = torch.tensor(batch.tokens + [0] * extra, device=device)
    positions_T = torch.tensor(batch.positions + list(range(extra)), device=device)
    lengths = [*batch.prompts, extra] if extra else batch.prompts
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    cos, sin = rope_angles(positions_T + cache.first_position, rope_frequencies(model).to(device))
    keys_R2 = torch.from_numpy(batch.keys_R2).to(device)
    longest = max(lengths, default=0)
    packed_forward = PackedForward(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
        cos_TK=cos,
        sin_TK=sin,
        rows_M=torch.tensor(batch.sampled_R, device=device),
        kv_write=KVWrite(cache, sampling, positions_T[: batch.decode_rows], keys_R2, batch.max_context, batch.prompts, batch.rows),
    )
    sampled_rows = len(batch.sampled_R)
    return StageInput(
        sampled_rows, len(tokens_T), sampled_rows, lambda stage: chunks[stage](tokens_T[None], None, None, packed_seq_params=packed_forward)
    )


PADDING = np.array([[0], [-1], [0]])  # token, position and random key of a padding row


class DecodeRunner:
    """Runs the decode-only batches of one group.

    Inputs are copied into static tensors, in one copy from the host per batch. With `graphs`, batch sizes are rounded up to a few sizes,
    and each is captured as a CUDA graph.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        cache: KVCache,
        sampling: TokenSampling,
        model: ModelShape,
        tp: int,
        world: World,
        graphs: Graphs | None,
    ):
        self.chunks, self.cache, self.sampling, self.tp = chunks, cache, sampling, tp
        self.graphs = None if cache.prefix_kv else graphs  # with a prefix, tensor shapes depend on max_context
        self.frequencies = rope_frequencies(model).to(world.device)
        self.host = torch.empty(3 * cache.slots, dtype=torch.int64, pin_memory=world.on_gpu)
        self.inputs = self.host.to(world.device)
        config = chunks[0].config
        self.hidden = torch.empty(cache.slots // tp, 1, config.hidden_size, dtype=config.pipeline_dtype, device=world.device)
        self.max_context = 0
        self.computed: set[tuple[int, int]] = set()  # (stage, rows) that have run eagerly
        self.captured: dict[tuple[int, int], Callable[[], Tensor]] = {}

    def step(self, batch: DecodeBatch) -> StageInput:
        """Copy the inputs of `batch` to the device."""
        rows = self._padded(batch.decode_rows)
        inputs = self.host[: 3 * rows].view(3, rows).numpy()
        inputs[:] = PADDING
        inputs[:, : batch.decode_rows] = batch.tokens, batch.positions, batch.keys_R2.view(np.int64)[:, 0]
        if self.inputs is not self.host:
            self.inputs[: 3 * rows].copy_(self.host[: 3 * rows], non_blocking=True)
        self.max_context = batch.max_context
        return StageInput(batch.decode_rows, rows, rows, partial(self._forward, rows), self.hidden[: rows // self.tp])

    def _padded(self, rows: int) -> int:
        """`rows` rounded up to a multiple of tp, and with graphs to one of a few sizes."""
        unit = lcm(self.tp, min(8, power_of_2(rows))) if self.graphs else self.tp
        return min(rows + -rows % unit, self.cache.slots)

    def _forward(self, rows: int, stage: int) -> Tensor:
        """The first batch of a shape runs eagerly, so that work done once, such as kernel compilation, is not captured."""
        shape = stage, rows
        if shape not in self.captured:
            if self.graphs is None or shape not in self.computed:
                self.computed.add(shape)
                return self._compute(rows, stage)
            self.captured[shape] = self.graphs.capture(partial(self._compute, rows, stage))
        return self.captured[shape]()

    def _compute(self, rows: int, stage: int) -> Tensor:
        tokens_n, positions_n, keys_n = self.inputs[: 3 * rows].view(3, rows)
        kv_write = KVWrite(self.cache, self.sampling, positions_n, keys_n.view(torch.int32).view(rows, 2), self.max_context)
        cos, sin = rope_angles(positions_n + self.cache.first_position, self.frequencies)
        packed_forward = PackedForward(qkv_format="thd", cos_TK=cos, sin_TK=sin, rows_M=kv_write.rows_n, kv_write=kv_write)
        return self.chunks[stage](tokens_n[None], None, None, packed_seq_params=packed_forward)


def layers_of(chunks: Sequence[Any]) -> list[int]:
    """The layer numbers of this rank's attention modules, which are the keys of KVCache.layers."""
    return [layer.self_attention.core_attention.layer for chunk in chunks for layer in chunk.decoder.layers]


class PipelineDecoder:
    """Runs the batches of all groups through the pipeline stages, and returns sampled tokens to every stage."""

    def __init__(
        self,
        chunks: Sequence[Any],
        model: ModelShape,
        grid: Grid,
        sampling: TokenSampling,
        world: World,
        tokens: TokenSender,
        graphs: Graphs | None = None,
    ):
        self.chunks, self.model, self.grid, self.sampling, self.world, self.graphs = chunks, model, grid, sampling, world, graphs
        self.tokens = tokens
        self.sending: list[tuple[Any, Tensor]] = []  # gloo sends complete when they are received; buffers stay alive until then

    @torch.no_grad()
    def run(self, groups: Sequence[SequenceGroup], caches: Sequence[KVCache]) -> None:
        """Run until every group's plan is None. All ranks of a replica must call it with equal groups; replicas do not communicate."""
        decoders = [DecodeRunner(self.chunks, cache, self.sampling, self.model, self.grid.tp, self.world, self.graphs) for cache in caches]
        sampled: dict[int, PendingTokens] = {}
        while True:
            steps: dict[int, StageInput] = {}
            for stage in range(len(self.chunks)):
                for g, (group, decoder) in enumerate(zip(groups, decoders, strict=True)):
                    if stage == 0:
                        self._update(group, decoder.cache, sampled.pop(g, None))
                        if (batch := group.plan()) is None:
                            continue
                        steps[g] = self._step(decoder, batch)
                    if g in steps and (pending := self._run_stage(stage, steps[g])):
                        sampled[g] = pending
            if not steps:
                break
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()
        self.tokens.finish()

    def _step(self, decoder: DecodeRunner, batch: DecodeBatch) -> StageInput:
        if not batch.prompts:
            return decoder.step(batch)
        return prefill_step(self.chunks, decoder.cache, batch, self.sampling, self.model, self.grid.tp, self.world.device)

    def _update(self, group: SequenceGroup, cache: KVCache, sampled: PendingTokens | None) -> None:
        if sampled is None:
            return
        tokens, logprobs = (row[: sampled.live_rows] for row in sampled.pending().tolist())
        for move in group.update([int(token) for token in tokens], logprobs):
            cache.move(*move)

    def _run_stage(self, stage: int, step: StageInput) -> PendingTokens | None:
        """Run a batch through one of this rank's virtual stages. Returns its sampled tokens after the last of them, else None."""
        grid, chunk = self.grid, self.chunks[stage]
        first, last = grid.pp_rank == 0 and stage == 0, grid.pp_rank == grid.pp - 1 and stage == len(self.chunks) - 1
        if not first:
            hidden = step.hidden
            if hidden is None:
                shape = (step.tokens // grid.tp, 1, self.model.hidden)
                hidden = torch.empty(shape, dtype=chunk.config.pipeline_dtype, device=self.world.device)
            dist.recv(hidden, self._peer(-1), group=grid.pp_group)
            chunk.set_input_tensor(hidden)
        # No call in here creates a tensor by device name, so the CPU backend need not intercept its 140 calls per layer.
        with torch._C.DisableTorchFunction():
            out = step.forward(stage)
        if not last:
            self._send(out.contiguous())
        if stage < len(self.chunks) - 1:
            return None
        return PendingTokens(self.tokens.send(out) if last else self.tokens.receive(step.sampled_rows), step.live_rows)

    def _send(self, hidden: Tensor) -> None:
        self.sending.append((dist.isend(hidden, self._peer(1), group=self.grid.pp_group), hidden))
        while len(self.sending) > 4 * self.grid.pp:
            self.sending.pop(0)[0].wait()

    def _peer(self, step: int) -> int:
        return dist.get_global_rank(self.grid.pp_group, (self.grid.pp_rank + step) % self.grid.pp)
