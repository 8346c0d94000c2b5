"""Predict the time of generation as rollout/sampler.py does it: continuous batching, with one group of sequences per pipeline stage."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from engine.config import ModelShape, padded_vocab
from engine.dryrun.clock import CostModel
from engine.dryrun.types import Collective, Matmul, Work

# Approximate kernels of one decoding layer: norms, products, rotary embedding, cache writes, collectives, copies to contiguous memory.
LAYER_KERNELS = 40
HEAD_KERNELS = 30
REPLAY_CALLS = 10  # host calls per stage with CUDA graphs: input copy, messages, replay, output copy
TOKEN_BYTES = 16  # token and log-prob of one sequence, as sent to the other stages


class GenerationTime(NamedTuple):
    """Predicted generation on one replica."""

    prefill: float  # seconds
    decode: float  # seconds
    rounds: int  # decoding steps
    tokens: int  # sampled tokens

    @property
    def seconds(self) -> float:
        return self.prefill + self.decode


def decode_work(
    model: ModelShape, tp: int, layers: int, rows: int, reach: float, *, prompts: Sequence[int] = (), head: bool, width: int = 2
) -> Work:
    """Return the Work of one rank in one decoding step.

    layers   layers of this rank's stage
    rows     sequences that advance by one token
    reach    mean number of cached positions that each attends to
    prompts  tokens of each prompt that is prefilled in the same step
    head     whether the stage has the output layer
    width    bytes of an element
    """
    tokens, sampled = rows + sum(prompts), rows + len(prompts)
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
    collectives = Counter({gather: 1, Collective("all_reduce", "tp", 8 * sampled, True): 4} if tp > 1 else {})
    # fp32 logits pass through memory four times: written, divided by the temperature, sampled from, and read for the log-prob.
    return work + Work(Counter({Matmul(sampled, model.hidden, vocab): 1}), 0.0, 4 * 4.0 * sampled * vocab, HEAD_KERNELS, collectives)


def round_seconds(clock: CostModel, model: ModelShape, rows: int, reach: float, prompts: Sequence[int] = (), *, graphs: bool) -> float:
    """Seconds until each group of `rows` sequences has its next token. There is one group per pipeline stage, so all stages compute at the
    same time and wait only for messages.

    prompts  tokens of each prompt that one group prefills in the same step
    graphs   whether steps without prompts are replayed as CUDA graphs
    """
    parallel, hardware = clock.parallel, clock.hardware
    stages = parallel.pp * parallel.vpp
    layers = list(parallel.stages) or [model.layers * (i + 1) // stages - model.layers * i // stages for i in range(stages)]
    seconds = 0.0
    for i, n in enumerate(layers):
        head = i == stages - 1
        work = decode_work(model, parallel.tp, n, rows, reach, prompts=prompts, head=head, width=hardware.width)
        launched = n * hardware.decode_layer + head * HEAD_KERNELS * hardware.dispatch
        seconds += clock.parts(work, REPLAY_CALLS * hardware.dispatch if graphs and not prompts else launched).seconds
    return_tokens = clock.hop(rows * TOKEN_BYTES) if parallel.pp > 1 else 0.0
    return seconds + stages * clock.hop((rows + sum(prompts)) / parallel.tp * model.hidden * hardware.width) + return_tokens


def generation_time(
    clock: CostModel, model: ModelShape, prompts: Sequence[int], responses: Sequence[int], slots: int, *, graphs: bool
) -> GenerationTime:
    """Predict generation on one replica.

    prompts, responses  tokens of each prompt and of its response; requests start in this order, each as soon as a slot is free
    slots               sequences at once in each pipeline group
    graphs              whether decoding uses CUDA graphs
    """
    groups = clock.parallel.pp
    waiting = list(zip(prompts, responses, strict=True))[::-1]
    live: list[tuple[int, int]] = []  # (step in which it ends, its final length)
    now, prefill, decode = 0, 0.0, 0.0
    while waiting or live:
        admitted = [waiting.pop() for _ in range(min(len(waiting), slots * groups - len(live)))]
        for prompt, response in admitted:
            heapq.heappush(live, (now + response, prompt + response))
        rows = -(-len(live) // groups)
        until = live[0][0]
        reach = sum(length - (end - (now + until) / 2) for end, length in live) / len(live)
        decode_only = round_seconds(clock, model, rows, reach, graphs=graphs)
        if admitted:
            admitted_prompts = [prompt for prompt, _ in admitted]
            lengths = [sum(admitted_prompts) // len(admitted_prompts)] * -(-len(admitted_prompts) // groups)
            prefill += max(0.0, round_seconds(clock, model, rows, reach, lengths, graphs=graphs) - decode_only)
        decode += (until - now) * decode_only
        now = until
        while live and live[0][0] <= now:
            heapq.heappop(live)
    return GenerationTime(prefill, decode, now, sum(responses))
