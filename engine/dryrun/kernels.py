"""What our own kernels cost, where it is more than to read their inputs once and write their outputs once.

A rehearsal never runs their bodies: what those multiply, say to other ranks and take for a while is written down here, as the kernel does
it on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from torch import Tensor

from engine.dryrun.costs import Call, Cost, moved, size_of
from engine.dryrun.work import Collective, Matmul, Work
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
    """A product and a softmax a chunk. The last chunk is multiplied whole, however few its rows."""
    hidden, weight, chunk, keep = (call.given[name] for name in ("hidden", "weight", "chunk", "keep"))
    itemsize = call.given["logits_dtype"].itemsize
    work, padding = _padded(hidden, chunk)
    softmax = Cost(Work())
    for rows in _chunks(len(hidden), chunk):
        softmax = _softmax(call, rows, len(weight), itemsize)
        work += _product(chunk, *weight.T.shape) + softmax.work
    return Cost(work, padding + softmax.scratch + (0 if keep else chunk * len(weight) * itemsize))


def _linear_logprob_backward(call: Call) -> Cost:
    """The logits' gradient a chunk, after the logits themselves where they were not kept, and the products it goes into."""
    hidden, weight, kept, chunk = (call.given[name] for name in ("hidden", "weight", "kept", "chunk"))
    dtype = call.given["logits_dtype"]
    vocab, width = weight.shape
    work, scratch = Cost(Work()) if kept is not None else _padded(hidden, chunk)
    for rows in _chunks(len(hidden), chunk):
        if kept is None:
            work += _product(chunk, width, vocab)
        work += Work(traffic=rows * vocab * (dtype.itemsize + weight.element_size()), kernels=1)
        if call.given["needs_hidden"]:
            work += _product(rows, vocab, width)
        if call.given["needs_weight"]:
            work += _product(vocab, rows, width, accumulates=True)
    if kept is None:
        scratch += chunk * vocab * dtype.itemsize
    if kept is not None or dtype != weight.dtype:
        scratch += min(chunk, len(hidden)) * vocab * weight.element_size()
    if call.given["needs_weight"] and call.given["weight_grad"] is None:
        work += Work(traffic=weight.numel() * (8 + weight.element_size()), kernels=2)  # made 0, and rounded at the end
        scratch += weight.numel() * 4
    return Cost(work, scratch)


def _chunks(rows: int, chunk: int) -> list[int]:
    return [min(chunk, rows - start) for start in range(0, rows, chunk)]


def _product(m: int, k: int, n: int, accumulates: bool = False) -> Work:
    return Work(Counter({Matmul(m, k, n, accumulates): 1}), kernels=1)


def _padded(hidden: Tensor, chunk: int) -> Cost:
    """The rows of a last chunk that is not whole are copied to where there is room for one."""
    size = chunk * hidden.shape[1] * hidden.element_size()
    return Cost(Work(traffic=2 * size, kernels=1), size) if len(hidden) % chunk else Cost(Work())


KERNELS: dict[str, Callable[[Call], Cost]] = {
    "attention": _attention,
    "attention_backward": _attention_backward,
    "rmsnorm_backward": _rmsnorm_backward,
    "logprob": _logprob,
    "linear_logprob": _linear_logprob,
    "linear_logprob_backward": _linear_logprob_backward,
}
