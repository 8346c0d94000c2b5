"""What our own kernels cost, where it is more than to read their inputs once and write their outputs once.

A rehearsal never runs their bodies: what those multiply, say to other ranks and take for a while is written down here, as the kernel does
it on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor

from engine.dryrun.costs import Call, Cost, moved, size_of
from engine.dryrun.types import Collective, Matmul, Work
from triton_kernels.linear_logprob import product_rows
from triton_kernels.rmsnorm import PARTS, WIDEST
from triton_kernels.shard import SEGMENTS
from triton_kernels.tiles import parts

FLASH_BLOCK = 128  # rows that flash attention's backward pads each sequence by


def causal_pairs(lengths: list[int]) -> int:
    """Of a token and one that it may look at, in sequences of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def _attention(call: Call) -> Cost:
    """Two products of a query's K numbers a pair and head."""
    _, heads, size = call.given["query"].shape
    return Cost(Work(attention=4.0 * heads * size * causal_pairs(call.given["lengths"]), kernels=1))


def _attention_backward(call: Call) -> Cost:
    """Five products, the scores made again. flash-attn 2's mha_varlen_bwd: a preparing and a finishing kernel, fp32 sums of the queries'
    gradients, and keys' and values' gradients by query head, summed up afterwards."""
    query, key, lengths = call.given["query"], call.given["key"], call.given["lengths"]
    tokens, heads, size = query.shape
    grouped = heads != key.shape[1]
    sums = (tokens + FLASH_BLOCK * len(lengths)) * heads * (size + 1) * 4
    by_head = 2 * query.nbytes if grouped else 0
    work = Work(attention=10.0 * heads * size * causal_pairs(lengths), kernels=5 if grouped else 3)
    return Cost(work, sums + by_head)


def _rmsnorm_backward(call: Call) -> Cost:
    """Each program leaves its part of the weight's gradient, and these are summed up. A wide row is read twice."""
    total = call.given["total"]
    rows, width = total.shape
    partial = parts(rows, max(1, parts(rows, PARTS))) * width * 4
    wide = width * total.element_size() > WIDEST
    traffic = moved(call) + 2 * partial + (size_of([call.given["grad"], total]) if wide else 0)
    return Cost(Work(traffic=traffic, kernels=4 if wide else 3), partial)


def _logprob(call: Call) -> Cost:
    logits = call.given["logits"]
    rows, columns = logits.shape
    return _softmax(call, rows, columns, logits.element_size())


def _softmax(call: Call, rows: int, columns: int, itemsize: int) -> Cost:
    """Rows of logits read once; the segments of all ranks gathered, and merged."""
    group = call.given["group"]
    whole = SEGMENTS * (4 if call.given["entropy"] else 3) * rows * 4
    said = Counter({Collective("all_gather", call.axes[group], whole, waits=True): 1}) if group else Counter()
    return Cost(Work(traffic=rows * columns * itemsize + 2 * whole, kernels=2, collectives=said), whole)


def _linear_logprob(call: Call) -> Cost:
    """Products in blocks, the last one padded, and a softmax a chunk."""
    hidden, weight, chunk, keep = (call.given[name] for name in ("hidden", "weight", "chunk", "keep"))
    itemsize = call.given["logits_dtype"].itemsize
    work, scratch = _logits(hidden, weight, chunk, 0 if keep else itemsize)
    softmax = Cost(Work())
    for rows in _chunks(len(hidden), chunk):
        softmax = max(softmax, part := _softmax(call, rows, len(weight), itemsize), key=lambda cost: cost.scratch)
        work += part.work
    return Cost(work, scratch + softmax.scratch)


def _linear_logprob_backward(call: Call) -> Cost:
    """The logits again where they were not kept, their gradient a chunk, and the products it goes into."""
    hidden, weight, kept, chunk = (call.given[name] for name in ("hidden", "weight", "kept", "chunk"))
    itemsize = call.given["logits_dtype"].itemsize
    work, scratch = Cost(Work()) if kept is not None else _logits(hidden, weight, chunk, itemsize)
    gradients = _gradients(call, spoiled=kept is None)
    return Cost(work + gradients.work, scratch + gradients.scratch)


def _linear_policy_loss(call: Call) -> Cost:
    """Forward and backward of linear_logprob a chunk, and between them each token's slope."""
    hidden, weight, chunk = (call.given[name] for name in ("hidden", "weight", "chunk"))
    itemsize, tokens = call.given["logits_dtype"].itemsize, len(hidden)
    work, scratch = _logits(hidden, weight, chunk, itemsize)
    work += Work(traffic=12 * 4 * tokens, kernels=5)  # slopes made 0, totals added up, statistics copied out
    slopes = 6 if call.given["advantage"] is None else 2
    softmax = 0
    for rows in _chunks(tokens, chunk):
        part = _softmax(call, rows, len(weight), itemsize)
        work += part.work + Work(traffic=12 * 4 * rows, kernels=slopes)
        softmax = max(softmax, part.scratch)
    gradients = _gradients(call, spoiled=True)
    return Cost(work + gradients.work, scratch + softmax + gradients.scratch)


def _logits(hidden: Tensor, weight: Tensor, chunk: int, itemsize: int) -> Cost:
    """hidden @ weight.T in blocks, with a buffer of one chunk of logits of `itemsize` bytes (0: they are kept)."""
    vocab, width = weight.shape
    rows, block = len(hidden), product_rows(hidden, chunk)
    work = Work()
    for _ in range(0, rows, block):
        work += _product(block, width, vocab)
    padding = block * width * hidden.element_size() if rows % block else 0
    if padding:  # the rows of a last block that is not whole are copied to where there is room for one
        work += Work(traffic=2 * padding, kernels=1)
    buffer = parts(min(rows, chunk), block) * block
    return Cost(work, padding + buffer * vocab * itemsize)


def _gradients(call: Call, spoiled: bool) -> Cost:
    """The logits' gradient a chunk, in a buffer unless they may be spoiled and are of its type, and the products it goes into."""
    hidden, weight, chunk, dtype = (call.given[name] for name in ("hidden", "weight", "chunk", "logits_dtype"))
    needs_hidden, needs_weight = call.given["needs_hidden"], call.given["needs_weight"]
    (vocab, width), own = weight.shape, weight.element_size()
    work, scratch, accumulates = Work(), 0, call.given["weight_grad"] is not None
    for rows in _chunks(len(hidden), chunk) if needs_hidden or needs_weight else ():
        work += Work(traffic=rows * vocab * (dtype.itemsize + own), kernels=1)
        if needs_hidden:
            work += _product(rows, vocab, width)
        if needs_weight:
            work += _product(vocab, rows, width, accumulates=accumulates)
            accumulates = True
    if work.kernels and (not spoiled or dtype != weight.dtype):
        scratch += min(chunk, len(hidden)) * vocab * own
    if needs_weight and call.given["weight_grad"] is None and len(hidden) > chunk:  # in fp32, and rounded at the end
        work += Work(traffic=weight.numel() * (4 + own), kernels=1)
        scratch += weight.numel() * 4
    return Cost(work, scratch)


def _chunks(rows: int, chunk: int) -> list[int]:
    return [min(chunk, rows - start) for start in range(0, rows, chunk)]


def _product(m: int, k: int, n: int, accumulates: bool = False) -> Work:
    return Work(Counter({Matmul(m, k, n, accumulates): 1}), kernels=1)


KERNELS: dict[str, Callable[[Call], Cost]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "rmsnorm_backward": _rmsnorm_backward,
    "logprob": _logprob,
    "linear_logprob": _linear_logprob,
    "linear_logprob_backward": _linear_logprob_backward,
    "linear_policy_loss": _linear_policy_loss,
}
