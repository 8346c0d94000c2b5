"""Generation on the policy's own weights: key-value caches, and batches of tokens on their way round the pipeline.

Slots are dealt to groups; each group's next token travels the stages as one batch, and while one group's is under way the others' are
computed: with as many groups as stages, no stage waits. What a group does next is a pure function of the tokens it was told, so every
rank of a replica plans the same batches, knows their shapes without asking, and stops at the same moment.
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
from engine.megatron.prefix_attention import Shared, decode_attention_with_prefix, prefill_attention
from engine.megatron.tokens import Pending, TokenSender
from triton_kernels import decode_attention
from triton_kernels.launch import by_kernel
from triton_kernels.tiles import power_of_2


@dataclass(frozen=True)
class TokenSampling:
    """How tokens are drawn; see triton_kernels.draw. Log-probs are those of the whole tempered distribution (greedy: at temperature 1)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class DecodeBatch:
    """One forward of one group: a token for each row that decodes, rows 0 ... decode - 1, then whole prompts. R rows draw a token next."""

    tokens: list[int]
    positions: list[int]
    decode_rows: int
    max_context: int  # positions that the decoding rows look back over, their own included
    prompts: list[int]  # lengths
    rows: list[list[int]]  # the rows that each prompt is written to
    sampled_R: list[int]  # the token after which each row draws
    keys_R2: np.ndarray  # int32


class SequenceGroup(Protocol):
    """The slots of one cache, as the pipeline knows them."""

    def plan(self) -> DecodeBatch | None:
        """What to compute next; None when all is done."""
        ...

    def absorb(self, tokens_R: list[int], logprobs_R: list[float]) -> list[tuple[int, int, int]]:
        """Take what the last batch drew. Returns the moves (from row, to row, positions) that keep the live rows in front."""
        ...


@dataclass
class Prefill:
    """A group of one sequence that is computed and not continued."""

    tokens: list[int]

    def plan(self) -> DecodeBatch | None:
        """All of it, once."""
        tokens, self.tokens = self.tokens, []
        if not tokens:
            return None
        count = len(tokens)
        return DecodeBatch(tokens, list(range(count)), 0, 1, [count], [[0]], [count - 1], np.zeros((1, 2), np.int32))

    def absorb(self, tokens_R: list[int], logprobs_R: list[float]) -> list[tuple[int, int, int]]:
        """Nobody asks what is drawn behind it."""
        return []


class KVCache:
    """Keys and values of this rank's layers, each [slots, KV, positions, K]. With a `prefix`, a cache of one slot, every slot goes on from
    its positions, and its own are counted from there."""

    def __init__(
        self, layers: Sequence[int], slots: int, heads: int, positions: int, size: int, like: Tensor, prefix: KVCache | None = None
    ):
        self.layers = {
            layer: (like.new_zeros(slots, heads, positions, size), like.new_zeros(slots, heads, positions, size)) for layer in layers
        }
        self.slots, self.positions, self.first = slots, positions, prefix.positions if prefix else 0
        self.shared: dict[int, Shared] = {layer: (pair[0][0], pair[1][0]) for layer, pair in prefix.layers.items()} if prefix else {}

    def move(self, source: int, target: int, positions: int) -> None:
        for pair in self.layers.values():
            for kept in pair:
                kept[target, :, :positions] = kept[source, :, :positions]


@dataclass
class KVWrite:
    """Where a batch's keys and values go, and how its tokens are drawn; rides in the packed_forward."""

    cache: KVCache
    sampling: TokenSampling
    positions_n: Tensor  # of the rows that decode, 0 ... n - 1; -1: a row that pads, whose keys and values go where nobody looks
    keys_R2: Tensor
    reach: int  # as the batch's
    prompts: Sequence[int] = ()
    rows: Sequence[list[int]] = ()

    @cached_property
    def rows_n(self) -> Tensor:
        return torch.arange(len(self.positions_n), device=self.positions_n.device)

    @cached_property
    def lengths_n(self) -> Tensor:
        """Positions that each decoding row looks back over, its own included."""
        return self.positions_n + 1

    @cached_property
    def mask_n(self) -> Tensor:
        """[n, 1, 1, reach], what each decoding row may look at."""
        return (torch.arange(self.reach, device=self.positions_n.device) < self.lengths_n[:, None])[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, packed_forward: PackedForward, attend: Attend) -> Tensor:
        """Attention of rows that decode over what is cached, of prompts over themselves; both leave their keys and values behind."""
        keys, values = self.cache.layers[layer]
        n = len(self.positions_n)
        ends = np.cumsum([n, *self.prompts])
        for rows, start, end in zip(self.rows, ends[:-1], ends[1:], strict=True):
            # A slice: to index with a list copies it to the device, which the host waits for.
            assert rows == list(range(rows[0], rows[-1] + 1)), rows
            keys[rows[0] : rows[-1] + 1, :, : end - start] = key[start:end].transpose(0, 1)
            values[rows[0] : rows[-1] + 1, :, : end - start] = value[start:end].transpose(0, 1)
        shared = self.cache.shared.get(layer)
        parts = [self._decode(keys, values, query[:n], key[:n], value[:n], shared)] if n else []
        if len(query) > n:
            rest = (query[n:], key[n:], value[n:])
            parts.append(prefill_attention(shared, *rest, packed_forward.lengths) if shared else attend(*rest, packed_forward))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode(self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, shared: Shared | None) -> Tensor:
        keys[self.rows_n, :, self.positions_n] = key
        values[self.rows_n, :, self.positions_n] = value
        if by_kernel(query) and not shared:
            return decode_attention(query, keys, values, self.lengths_n)
        n, heads, size = query.shape
        grouped = query.view(n, keys.shape[1], -1, size)  # a key's query heads stand in a row: nothing is expanded
        keys, values = (kept[:n, :, : self.reach] for kept in (keys, values))
        if shared:
            return decode_attention_with_prefix(shared, grouped, keys, values, self.mask_n).reshape(n, heads, size)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask_n).reshape(n, heads, size)


@dataclass
class StageInput:
    """A batch as this rank computes it."""

    live: int  # R, rows that draw a token
    tokens: int  # T, the padding's included
    draws: int  # R, the padding's included
    through: Callable[[int], Tensor]  # one of this rank's stages: its number -> its output
    hidden: Tensor | None = None  # [T / tp, 1, D], where the hidden states of the stage before have to be; None: anywhere


class PendingTokens(NamedTuple):
    """What a step will have drawn."""

    pending: Pending  # padding rows at the end
    live: int


def prefill_step(
    chunks: Sequence[Any],
    cache: KVCache,
    batch: DecodeBatch,
    sampling: TokenSampling,
    model: ModelShape,
    multiple: int,
    device: torch.device,
) -> StageInput:
    """A batch that takes prompts in, its tokens padded to a multiple. Sequences of its packed_forward are the prompts (and the padding)."""
    extra = -len(batch.tokens) % multiple
    tokens_T = torch.tensor(batch.tokens + [0] * extra, device=device)
    positions_T = torch.tensor(batch.positions + list(range(extra)), device=device)
    lengths = [*batch.prompts, extra] if extra else batch.prompts
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    cos, sin = rope_angles(positions_T + cache.first, rope_frequencies(model).to(device))
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
    draws = len(batch.sampled_R)
    return StageInput(
        draws, len(tokens_T), draws, lambda stage: chunks[stage](tokens_T[None], None, None, packed_seq_params=packed_forward)
    )


PADDING = np.array([[0], [-1], [0]])  # token, position and key of a row that pads


class DecodeRunner:
    """The batches of one group in which every row decodes. They are computed on tensors that stay where they are, of few shapes where
    `graphs` are captured, and all that the device is told of a batch is one copy from the host."""

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
        self.graphs = None if cache.shared else graphs  # shapes behind a prefix depend on how far rows look back
        self.frequencies = rope_frequencies(model).to(world.device)
        self.host = torch.empty(3 * cache.slots, dtype=torch.int64, pin_memory=world.on_gpu)
        self.told = self.host.to(world.device)
        config = chunks[0].config
        self.hidden = torch.empty(cache.slots // tp, 1, config.hidden_size, dtype=config.pipeline_dtype, device=world.device)
        self.reach = 0
        self.computed: set[tuple[int, int]] = set()  # (stage, rows)
        self.captured: dict[tuple[int, int], Callable[[], Tensor]] = {}

    def step(self, batch: DecodeBatch) -> StageInput:
        """Tell the device of `batch`."""
        rows = self._padded(batch.decode_rows)
        told = self.host[: 3 * rows].view(3, rows).numpy()
        told[:] = PADDING
        told[:, : batch.decode_rows] = batch.tokens, batch.positions, batch.keys_R2.view(np.int64)[:, 0]
        if self.told is not self.host:
            self.told[: 3 * rows].copy_(self.host[: 3 * rows], non_blocking=True)
        self.reach = batch.max_context
        return StageInput(batch.decode_rows, rows, rows, partial(self._through, rows), self.hidden[: rows // self.tp])

    def _padded(self, rows: int) -> int:
        """Rows that so many are computed as: a multiple of tp, and where shapes are captured one of few."""
        unit = lcm(self.tp, min(8, power_of_2(rows))) if self.graphs else self.tp
        return min(rows + -rows % unit, self.cache.slots)

    def _through(self, rows: int, stage: int) -> Tensor:
        """Captured when a shape comes for the second time: what runs only once, such as a kernel's compilation, is done by then."""
        shape = stage, rows
        if shape not in self.captured:
            if self.graphs is None or shape not in self.computed:
                self.computed.add(shape)
                return self._compute(rows, stage)
            self.captured[shape] = self.graphs.capture(partial(self._compute, rows, stage))
        return self.captured[shape]()

    def _compute(self, rows: int, stage: int) -> Tensor:
        tokens_n, positions_n, keys_n = self.told[: 3 * rows].view(3, rows)
        kv_write = KVWrite(self.cache, self.sampling, positions_n, keys_n.view(torch.int32).view(rows, 2), self.reach)
        cos, sin = rope_angles(positions_n + self.cache.first, self.frequencies)
        packed_forward = PackedForward(qkv_format="thd", cos_TK=cos, sin_TK=sin, rows_M=kv_write.rows_n, kv_write=kv_write)
        return self.chunks[stage](tokens_n[None], None, None, packed_seq_params=packed_forward)


def layers_of(chunks: Sequence[Any]) -> list[int]:
    """The numbers of this rank's layers, as its attention modules know them."""
    return [layer.self_attention.core_attention.layer for chunk in chunks for layer in chunk.decoder.layers]


class PipelineDecoder:
    """The pipeline as generation sees it: group after group, stage after stage, and the tokens back to every stage."""

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
        self.sending: list[tuple[Any, Tensor]] = []  # gloo's sends wait for their receiver: kept until it has come

    @torch.no_grad()
    def run(self, groups: Sequence[SequenceGroup], caches: Sequence[KVCache]) -> None:
        """Until every group's plan is empty. The same calls on every rank of a replica; nothing is said to other replicas."""
        decoders = [DecodeRunner(self.chunks, cache, self.sampling, self.model, self.grid.tp, self.world, self.graphs) for cache in caches]
        drawn: dict[int, PendingTokens] = {}
        while True:
            steps: dict[int, StageInput] = {}
            for stage in range(len(self.chunks)):
                for g, (group, decoder) in enumerate(zip(groups, decoders, strict=True)):
                    if stage == 0:
                        self._absorb(group, decoder.cache, drawn.pop(g, None))
                        if (batch := group.plan()) is None:
                            continue
                        steps[g] = self._step(decoder, batch)
                    if g in steps and (found := self._run_stage(stage, steps[g])):
                        drawn[g] = found
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

    def _absorb(self, group: SequenceGroup, cache: KVCache, drawn: PendingTokens | None) -> None:
        if drawn is None:
            return
        tokens, logprobs = (row[: drawn.live] for row in drawn.pending().tolist())
        for move in group.absorb([int(token) for token in tokens], logprobs):
            cache.move(*move)

    def _run_stage(self, stage: int, step: StageInput) -> PendingTokens | None:
        """One batch through one of this rank's stages; what it drew, behind the last of them."""
        grid, chunk = self.grid, self.chunks[stage]
        first, last = grid.pp_rank == 0 and stage == 0, grid.pp_rank == grid.pp - 1 and stage == len(self.chunks) - 1
        if not first:
            hidden = step.hidden
            if hidden is None:
                shape = (step.tokens // grid.tp, 1, self.model.hidden)
                hidden = torch.empty(shape, dtype=chunk.config.pipeline_dtype, device=self.world.device)
            dist.recv(hidden, self._peer(-1), group=grid.pp_group)
            chunk.set_input_tensor(hidden)
        # Nothing in here makes a tensor by a device's name: the seat need not look at every call, 140 a layer.
        with torch._C.DisableTorchFunction():
            out = step.through(stage)
        if not last:
            self._send(out.contiguous())
        if stage < len(self.chunks) - 1:
            return None
        return PendingTokens(self.tokens.send(out) if last else self.tokens.receive(step.draws), step.live)

    def _send(self, hidden: Tensor) -> None:
        self.sending.append((dist.isend(hidden, self._peer(1), group=self.grid.pp_group), hidden))
        while len(self.sending) > 4 * self.grid.pp:
            self.sending.pop(0)[0].wait()

    def _peer(self, step: int) -> int:
        return dist.get_global_rank(self.grid.pp_group, (self.grid.pp_rank + step) % self.grid.pp)
