"""Seconds of generation as rollout/sampler.py does it: waves of tokens round the pipeline, slots filled anew as sequences end."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from engine.config import ModelShape, padded_vocab
from engine.dryrun.clock import CostModel
from engine.dryrun.types import Collective, Matmul, Work

LAYER_KERNELS = (
    40  # of a layer's forward in decoding: norms, products, rotary embedding, cache writes, collectives, views made whole. Counted roughly
)
HEAD_KERNELS = 30
REPLAY_CALLS = 10  # host calls per stage with CUDA graphs: input copy, messages, replay, output copy
TOKEN_BYTES = 16  # a row's token and log-prob, as they are sent to the other stages


class GenerationTime(NamedTuple):
    """Generation on one replica, in seconds, and what it was made of."""

    prefill: float
    decode: float
    rounds: int  # tokens of the longest chain of sequences in one slot
    tokens: int  # drawn

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def decode_work(
    model: ModelShape, tp: int, layers: int, rows: int, reach: float, *, prompts: Sequence[int] = (), head: bool, width: int = 2
) -> Work:
    """What one rank does when `rows` sequences advance by a token, each looking back over `reach` positions on average, and whole prompts
    are taken in: `layers` layers, and the output layer where `head`. `width`: bytes of an element."""
    tokens, drawn = rows + sum(prompts), rows + len(prompts)
    tokens += -tokens % tp
    query, key, ffn = model.heads * model.head_dim // tp, model.kv_heads * model.head_dim // tp, model.ffn // tp
    shapes = [
        Matmul(tokens, model.hidden, query + 2 * key),
        Matmul(tokens, query, model.hidden),
        Matmul(tokens, model.hidden, 2 * ffn),
        Matmul(tokens, ffn, model.hidden),
    ]
    matmuls: Counter[Matmul] = Counter()
    for shape in shapes:
        matmuls[shape] += layers
    cache = 2 * rows * reach * key
    passing = tokens * (10 * model.hidden / tp + 6 * (query + 2 * key) + 6 * ffn)  # norms, residuals, rotary embedding, SwiGLU
    attention = 4.0 * query * sum(length * (length + 1) / 2 for length in prompts)
    gather, scatter = (Collective(kind, "tp", tokens * model.hidden * width, True) for kind in ("all_gather", "reduce_scatter"))
    work = Work(
        matmuls,
        layers * attention,
        layers * width * (cache + passing),
        layers * LAYER_KERNELS,
        Counter({gather: 2, scatter: 2} if tp > 1 else {}),
    )
    for each in work.collectives:
        work.collectives[each] *= layers
    if not head:
        return work
    vocab = padded_vocab(model.vocab, tp) // tp
    told = Counter({gather: 1, Collective("all_reduce", "tp", 8 * drawn, True): 4} if tp > 1 else {})
    # fp32 logits: written, tempered, drawn from, looked up.
    return work + Work(Counter({Matmul(drawn, model.hidden, vocab): 1}), 0.0, 4 * 4.0 * drawn * vocab, HEAD_KERNELS, told)


def round_seconds(clock: CostModel, model: ModelShape, rows: int, reach: float, prompts: Sequence[int] = (), *, graphs: bool) -> float:
    """Until every group of `rows` sequences, one group a pipeline stage, has its next token: each wave goes through all stages, and no
    stage waits but for the messages. `prompts`: what one group takes in beside. `graphs`: waves without prompts are replayed."""
    parallel, hardware = clock.parallel, clock.hardware
    stages = parallel.pp * parallel.vpp
    layers = list(parallel.stages) or [model.layers * (i + 1) // stages - model.layers * i // stages for i in range(stages)]
    seconds = 0.0
    for i, n in enumerate(layers):
        head = i == stages - 1
        work = decode_work(model, parallel.tp, n, rows, reach, prompts=prompts, head=head, width=hardware.width)
        launched = n * hardware.decode_layer + head * HEAD_KERNELS * hardware.dispatch
        seconds += clock.parts(work, REPLAY_CALLS * hardware.dispatch if graphs and not prompts else launched).seconds
    drawn = clock.hop(rows * TOKEN_BYTES) if parallel.pp > 1 else 0.0
    return seconds + stages * clock.hop((rows + sum(prompts)) / parallel.tp * model.hidden * hardware.width) + drawn


def generation_time(
    clock: CostModel, model: ModelShape, prompts: Sequence[int], responses: Sequence[int], slots: int, *, graphs: bool
) -> GenerationTime:
    """One replica answers prompts[i] tokens with responses[i] tokens, at most `slots` at once on each of its pipeline groups, in order,
    the next as soon as a slot is free. `graphs`: it decodes in CUDA graphs."""
    groups = clock.parallel.pp
    waiting = list(zip(prompts, responses, strict=True))[::-1]
    live: list[tuple[int, int]] = []  # (the round in which it ends, its length then)
    now, prefill, decode = 0, 0.0, 0.0
    while waiting or live:
        came = [waiting.pop() for _ in range(min(len(waiting), slots * groups - len(live)))]
        for prompt, response in came:
            heapq.heappush(live, (now + response, prompt + response))
        rows = -(-len(live) // groups)
        until = live[0][0]
        reach = sum(length - (end - (now + until) / 2) for end, length in live) / len(live)
        alone = round_seconds(clock, model, rows, reach, graphs=graphs)
        if came:
            taken = [prompt for prompt, _ in came]
            lengths = [sum(taken) // len(taken)] * -(-len(taken) // groups)
            prefill += max(0.0, round_seconds(clock, model, rows, reach, lengths, graphs=graphs) - alone)
        decode += (until - now) * alone
        now = until
        while live and live[0][0] <= now:
            heapq.heappop(live)
    return GenerationTime(prefill, decode, now, sum(responses))
