"""Generation on the policy's own weights: key-value caches, and waves of tokens on their way round the pipeline.

Slots are dealt to groups; each group's next token travels the stages as one wave, and while one group's is under way the others' are
computed: with as many groups as stages, no stage waits. What a group does next is a pure function of the tokens it was told, so every
rank of a replica plans the same waves, knows their shapes without asking, and stops at the same moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from engine.config import Llama
from engine.megatron.attention import Attend, Flight, rope_angles
from engine.megatron.prefix import Shared, attend_behind, decode_behind
from engine.megatron.seat import Grid


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn; see triton_kernels.draw. Log-probs are those of the whole tempered distribution (greedy: at temperature 1)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Wave:
    """One forward of one group: a token for each row that decodes, rows 0 ... decode - 1, then whole prompts. R rows draw a token next."""

    tokens: list[int]
    positions: list[int]
    decode: int
    reach: int  # positions that the decoding rows look back over, their own included
    prompts: list[int]  # lengths
    rows: list[list[int]]  # the rows that each prompt is written to
    wanted_R: list[int]  # the token after which each row draws
    keys_R2: np.ndarray  # int32


class Group(Protocol):
    """The slots of one cache, as the pipeline knows them."""

    def plan(self) -> Wave | None:
        """What to compute next; None when all is done."""
        ...

    def absorb(self, tokens_R: list[int], logprobs_R: list[float]) -> list[tuple[int, int, int]]:
        """Take what the last wave drew. Returns the moves (from row, to row, positions) that keep the live rows in front."""
        ...


@dataclass
class Prefill:
    """A group of one sequence that is computed and not continued."""

    tokens: list[int]

    def plan(self) -> Wave | None:
        """All of it, once."""
        tokens, self.tokens = self.tokens, []
        if not tokens:
            return None
        count = len(tokens)
        return Wave(tokens, list(range(count)), 0, 1, [count], [[0]], [count - 1], np.zeros((1, 2), np.int32))

    def absorb(self, tokens_R: list[int], logprobs_R: list[float]) -> list[tuple[int, int, int]]:
        """Nobody asks what is drawn behind it."""
        return []


class Cache:
    """Keys and values of this rank's layers, each [slots, KV, positions, K]. With a `prefix`, a cache of one slot, every slot goes on from
    its positions, and its own are counted from there."""

    def __init__(self, layers: Sequence[int], slots: int, heads: int, positions: int, size: int, like: Tensor, prefix: Cache | None = None):
        self.layers = {
            layer: (like.new_zeros(slots, heads, positions, size), like.new_zeros(slots, heads, positions, size)) for layer in layers
        }
        self.positions, self.first = positions, prefix.positions if prefix else 0
        self.shared: dict[int, Shared] = {layer: (pair[0][0], pair[1][0]) for layer, pair in prefix.layers.items()} if prefix else {}

    def move(self, source: int, target: int, positions: int) -> None:
        for pair in self.layers.values():
            for kept in pair:
                kept[target, :, :positions] = kept[source, :, :positions]


@dataclass
class Landing:
    """Where a wave's keys and values go, and how its tokens are drawn; rides in the flight."""

    cache: Cache
    wave: Wave
    drawing: Drawing
    rows_n: Tensor
    positions_n: Tensor
    mask_n: Tensor  # [n, 1, 1, reach], what each decoding row may look at
    keys_R2: Tensor

    @staticmethod
    def of(cache: Cache, wave: Wave, drawing: Drawing, positions_T: Tensor) -> Landing:
        positions_n = positions_T[: wave.decode]
        reach = torch.arange(wave.reach, device=positions_T.device)
        rows_n, keys = torch.arange(wave.decode, device=positions_T.device), torch.from_numpy(wave.keys_R2).to(positions_T.device)
        return Landing(cache, wave, drawing, rows_n, positions_n, (reach <= positions_n[:, None])[:, None, None], keys)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, flight: Flight, attend: Attend) -> Tensor:
        """Attention of rows that decode over what is cached, of prompts over themselves; both leave their keys and values behind."""
        keys, values = self.cache.layers[layer]
        n = self.wave.decode
        ends = np.cumsum([n, *self.wave.prompts])
        for rows, start, end in zip(self.wave.rows, ends[:-1], ends[1:], strict=True):
            keys[rows, :, : end - start] = key[start:end].transpose(0, 1)
            values[rows, :, : end - start] = value[start:end].transpose(0, 1)
        shared = self.cache.shared.get(layer)
        parts = [self._decode(keys, values, query[:n], key[:n], value[:n], shared)] if n else []
        if len(query) > n:
            rest = (query[n:], key[n:], value[n:])
            parts.append(attend_behind(shared, *rest, flight.lengths) if shared else attend(*rest, flight))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode(self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, shared: Shared | None) -> Tensor:
        n, heads, size = query.shape
        keys[self.rows_n, :, self.positions_n] = key
        values[self.rows_n, :, self.positions_n] = value
        grouped = query.view(n, keys.shape[1], -1, size)  # a key's query heads stand in a row: nothing is expanded
        keys, values = (kept[:n, :, : self.wave.reach] for kept in (keys, values))
        if shared:
            return decode_behind(shared, grouped, keys, values, self.mask_n).reshape(n, heads, size)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask_n).reshape(n, heads, size)


def flight_of(cache: Cache, wave: Wave, drawing: Drawing, model: Llama, multiple: int, device: torch.device) -> tuple[Tensor, Flight]:
    """The tokens of a wave [T], padded to a multiple, and the flight that carries them. Its sequences are the prompts (and the padding)."""
    extra = -len(wave.tokens) % multiple
    tokens_T = torch.tensor(wave.tokens + [0] * extra, device=device)
    positions_T = torch.tensor(wave.positions + list(range(extra)), device=device)
    lengths = [*wave.prompts, extra] if extra else wave.prompts
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device)
    cos, sin = rope_angles(positions_T + cache.first, model)
    longest = max(lengths, default=0)
    flight = Flight(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
        cos_TK=cos,
        sin_TK=sin,
        rows_M=torch.tensor(wave.wanted_R, device=device),
        landing=Landing.of(cache, wave, drawing, positions_T),
    )
    return tokens_T, flight


def layers_of(chunks: Sequence[Any]) -> list[int]:
    """The numbers of this rank's layers, as its attention modules know them."""
    return [layer.self_attention.core_attention.layer for chunk in chunks for layer in chunk.decoder.layers]


class Ring:
    """The pipeline as generation sees it: group after group, stage after stage, and the tokens back to every stage."""

    def __init__(self, chunks: Sequence[Any], model: Llama, grid: Grid, drawing: Drawing, device: torch.device):
        self.chunks, self.model, self.grid, self.drawing, self.device = chunks, model, grid, drawing, device
        self.sending: list[tuple[Any, Tensor]] = []  # gloo's sends wait for their receiver: kept until it has come

    @torch.no_grad()
    def run(self, groups: Sequence[Group], caches: Sequence[Cache]) -> None:
        """Until every group's plan is empty. The same calls on every rank of a replica; nothing is said to other replicas."""
        drawn: dict[int, tuple[Tensor, Any]] = {}
        while True:
            flights: dict[int, tuple[Wave, Tensor, Flight]] = {}
            for stage in range(len(self.chunks)):
                for g, (group, cache) in enumerate(zip(groups, caches, strict=True)):
                    if stage == 0:
                        self._absorb(group, cache, drawn.pop(g, None))
                        if (wave := group.plan()) is None:
                            continue
                        flights[g] = (wave, *flight_of(cache, wave, self.drawing, self.model, self.grid.tp, self.device))
                    if g in flights:
                        drawn[g] = self._fly(stage, *flights[g])
            if not flights:
                break
        for work, _ in self.sending:
            work.wait()
        self.sending.clear()

    def _absorb(self, group: Group, cache: Cache, drawn: tuple[Tensor, Any] | None) -> None:
        if drawn is None:
            return
        both, work = drawn
        if work is not None:
            work.wait()
        tokens, logprobs = both.tolist()
        for move in group.absorb([int(token) for token in tokens], logprobs):
            cache.move(*move)

    def _fly(self, stage: int, wave: Wave, tokens_T: Tensor, flight: Flight) -> tuple[Tensor, Any]:
        """One wave through one of this rank's stages; (what it drew, or will have drawn: [2, R] float64, what to wait for)."""
        grid, chunk = self.grid, self.chunks[stage]
        first, last = grid.pp_rank == 0 and stage == 0, grid.pp_rank == grid.pp - 1 and stage == len(self.chunks) - 1
        if not first:
            hidden = torch.empty(len(tokens_T) // grid.tp, 1, self.model.hidden, dtype=chunk.config.pipeline_dtype, device=self.device)
            dist.recv(hidden, self._peer(-1), group=grid.pp_group)
            chunk.set_input_tensor(hidden)
        # Nothing in here makes a tensor by a device's name: the seat need not look at every call, 140 a layer.
        with torch._C.DisableTorchFunction():
            out = chunk(tokens_T[None], None, None, packed_seq_params=flight)
        if not last:
            self._send(out.contiguous())
        if grid.pp == 1:
            return out, None
        if stage < len(self.chunks) - 1:
            return out, None
        both = out if last else torch.empty(2, len(wave.wanted_R), dtype=torch.float64, device=self.device)
        return both, dist.broadcast(both, grid.last_stage, group=grid.pp_group, async_op=True)

    def _send(self, hidden: Tensor) -> None:
        self.sending.append((dist.isend(hidden, self._peer(1), group=self.grid.pp_group), hidden))
        while len(self.sending) > 4 * self.grid.pp:
            self.sending.pop(0)[0].wait()

    def _peer(self, step: int) -> int:
        return dist.get_global_rank(self.grid.pp_group, (self.grid.pp_rank + step) % self.grid.pp)
