"""Cost of this project's kernels that do more than read their inputs once and write their outputs once.

A simulation on meta tensors does not run their bodies, so their products, collectives and temporary buffers are listed here, as on a GPU.
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

FLASH_BLOCK = 128  # flash attention's backward pads each sequence by this number of rows


def causal_pairs(lengths: list[int]) -> int:
    """Number of (query, key) pairs under the causal mask, in sequences of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def _attention(call: Call) -> Cost:
    """Two products of depth K per pair and head."""
    _, heads, size = call.given["query"].shape
    return Cost(Work(attention=4.0 * heads * size * causal_pairs(call.given["lengths"]), kernels=1))


def _attention_backward(call: Call) -> Cost:
    """Five products per pair and head, recomputed scores included. As in flash-attn 2's mha_varlen_bwd: one kernel before and one after,
    fp32 gradients of the queries, and gradients of keys and values per query head, which are then summed."""
    query, key, lengths = call.given["query"], call.given["key"], call.given["lengths"]
    tokens, heads, size = query.shape
    grouped = heads != key.shape[1]
    sums = (tokens + FLASH_BLOCK * len(lengths)) * heads * (size + 1) * 4
    by_head = 2 * query.nbytes if grouped else 0
    work = Work(attention=10.0 * heads * size * causal_pairs(lengths), kernels=5 if grouped else 3)
    return Cost(work, sums + by_head)


def _rmsnorm_backward(call: Call) -> Cost:
    """Each program writes a partial weight gradient, and another kernel sums them. Wide rows are read twice."""
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
    """Logits are read once; the per-segment statistics of all ranks are gathered and merged."""
    group = call.given["group"]
    statistics = SEGMENTS * (4 if call.given["entropy"] else 3) * rows * 4
    collectives = Counter({Collective("all_gather", call.axes[group], statistics, waits=True): 1}) if group else Counter()
    return Cost(Work(traffic=rows * columns * itemsize + 2 * statistics, kernels=2, collectives=collectives), statistics)


def _linear_logprob(call: Call) -> Cost:
    """Products in blocks, the last one padded, and a softmax per chunk."""
    hidden, weight, chunk, keep = (call.given[name] for name in ("hidden", "weight", "chunk", "keep"))
    itemsize = call.given["logits_dtype"].itemsize
    work, scratch = _logits(hidden, weight, chunk, 0 if keep else itemsize)
    softmax = Cost(Work())
    for rows in _chunks(len(hidden), chunk):
        softmax = max(softmax, part := _softmax(call, rows, len(weight), itemsize), key=lambda cost: cost.scratch)
        work += part.work
    return Cost(work, scratch + softmax.scratch)


def _linear_logprob_backward(call: Call) -> Cost:
    """Recompute the logits unless they were kept; then per chunk their gradient and the products with it."""
    hidden, weight, kept, chunk = (call.given[name] for name in ("hidden", "weight", "kept", "chunk"))
    itemsize = call.given["logits_dtype"].itemsize
    work, scratch = Cost(Work()) if kept is not None else _logits(hidden, weight, chunk, itemsize)
    gradients = _gradients(call, spoiled=kept is None)
    return Cost(work + gradients.work, scratch + gradients.scratch)


def _linear_policy_loss(call: Call) -> Cost:
    """Forward and backward of linear_logprob per chunk, and between them the derivative of the loss by each token's log-prob."""
    hidden, weight, chunk = (call.given[name] for name in ("hidden", "weight", "chunk"))
    itemsize, tokens = call.given["logits_dtype"].itemsize, len(hidden)
    work, scratch = _logits(hidden, weight, chunk, itemsize)
    work += Work(traffic=12 * 4 * tokens, kernels=5)  # derivatives zeroed, totals summed, statistics copied out
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
    if padding:  # the rows of an incomplete last block are copied to a buffer of a full block
        work += Work(traffic=2 * padding, kernels=1)
    buffer = parts(min(rows, chunk), block) * block
    return Cost(work, padding + buffer * vocab * itemsize)


def _gradients(call: Call, spoiled: bool) -> Cost:
    """Per chunk the gradient of the logits and the products with it. The gradient overwrites the logits if `spoiled` (they may be
    overwritten) and of the same dtype; otherwise it takes a buffer."""
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
    if needs_weight and call.given["weight_grad"] is None and len(hidden) > chunk:  # accumulated in fp32 and cast at the end
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
