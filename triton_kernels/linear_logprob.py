"""log p(target) from hidden states: output layer and softmax fused, one chunk of rows at a time, in fp32.

logits = hidden @ weight.T, then triton_kernels/logprob.py on one chunk of them. In backward, a chunk's logit gradient is turned into the
gradients of hidden and weight before the next chunk is computed. Rows whose log-probs are not requested are dropped before the product.

On a device the forward product is split into blocks of PRODUCT_ROWS rows and the last block is padded. Every product then has the same
shape, so that a row's results do not depend, bit for bit, on the number of other rows. Backward does not pad: a row's gradient does not
depend on other rows in exact arithmetic, but its bits may. A chunk consists of several blocks; its statistics, gradients and collective
are computed at once. The weight's gradient is summed in fp32 over chunks, and over microbatches if the caller passes an accumulator. With
a single chunk and no accumulator it is written in the weight's dtype directly.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from triton_kernels.launch import by_kernel
from triton_kernels.logprob import ENTROPY, LOGP, LSE, check_target, write_grads, write_stats
from triton_kernels.operator import operator
from triton_kernels.shard import Shard

Mode = Literal["save", "recompute", "nograd"]

PRODUCT_ROWS = 1024  # of a forward product: 1024 FLOPs per byte of the weight, and little padding
CHUNK_ROWS = (8192, 4096)  # the first one with fp32 logits of at most CHUNK_BYTES, else the last
CHUNK_BYTES = 1 << 30


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    rows: Tensor | None = None,
    group: str = "",
    vocab_start: int = 0,
    vocab_valid: int | None = None,
    inv_temp: float = 1.0,
    entropy: bool = False,
    mode: Mode = "save",
    chunk: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Natural-log probability of each row's target, differentiable in `hidden_ND` and `weight_VD`.

    hidden_ND    [N, D], float; the same on every rank of the group
    weight_VD    [V, D], this rank's rows of the output layer: ids vocab_start ... vocab_start + V
    target_N     [N], int64 ids of the whole vocabulary
    rows         [M], int64, without duplicates: the rows to compute; the others are 0 and cost nothing. None: all
    group        name of the process group over which the vocabulary is sharded, in rank order; "": not sharded
    vocab_valid  ids from this one on are padding and have probability 0. None: no padding
    inv_temp     1 / temperature, > 0
    mode         "save" saves the logits of the computed rows for backward (three products in all), "recompute" recomputes them (four),
                 "nograd" is detached from autograd
    chunk        rows at a time: the most rows of logits in memory, except those that "save" saves. None: 8192 if their fp32 logits take at
                 most 1 GiB, else 4096
    logits_dtype torch.float32, or the weight's dtype: for bf16 half the memory, and logits rounded to 8 bits (1e-2 nats)
    weight_grad  [V, D], float32: backward adds the weight's gradient to it, and autograd gets none for the weight

    Returns (logp_N, entropy_N or None, lse_N), float32. The gradient of `hidden_ND` is this rank's part; the full gradient is its sum over
    the group. Raises ValueError for wrong dtypes and shapes, and in host memory for a target outside the vocabulary. On a device, where
    this check would synchronize, that row's logp is NaN.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is unknown; use save, recompute or nograd")
    chunk = chunk_rows(len(weight_VD)) if chunk is None else chunk
    check_linear(hidden_ND, weight_VD, target_N, inv_temp, chunk, logits_dtype, weight_grad)
    if mode == "nograd":
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    keep = mode == "save" and torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    selected = (hidden_ND, target_N) if rows is None else (hidden_ND.index_select(0, rows), target_N.index_select(0, rows))
    stats, _ = _linear_logprob(
        selected[0], weight_VD, selected[1], weight_grad, group, vocab_start, vocab_valid, inv_temp, entropy, keep, chunk, logits_dtype
    )
    if rows is not None:
        stats = stats.new_zeros((3, len(target_N))).index_copy(1, rows, stats[:3])
    return stats[LOGP], stats[ENTROPY] if entropy else None, stats[LSE]


def check_linear(
    hidden: Tensor, weight: Tensor, target: Tensor, inv_temp: float, chunk: int, logits_dtype: torch.dtype, weight_grad: Tensor | None
) -> None:
    """Raises ValueError unless these are valid arguments of linear_logprob."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, D] and [V, D] with the same D")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}; both must be float32, bfloat16 or float16")
    if logits_dtype not in (torch.float32, weight.dtype):
        raise ValueError(f"logits_dtype={logits_dtype} must be torch.float32 or the weight's {weight.dtype}")
    if weight_grad is not None and (weight_grad.dtype != torch.float32 or weight_grad.shape != weight.shape):
        raise ValueError(f"weight_grad is {weight_grad.dtype} {tuple(weight_grad.shape)}; pass torch.float32 {tuple(weight.shape)}")
    if chunk < 1 or (chunk > PRODUCT_ROWS and chunk % PRODUCT_ROWS):
        raise ValueError(f"chunk={chunk} must be 1 to {PRODUCT_ROWS} rows or a multiple of {PRODUCT_ROWS}")
    check_target(target, len(hidden), inv_temp)


@operator("linear_logprob")
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    weight_grad: Tensor | None,
    group: str,
    vocab_start: int,
    vocab_valid: int | None,
    inv_temp: float,
    entropy: bool,
    keep: bool,
    chunk: int,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(stats [5, N], the logits of all rows if `keep`, else [0, V]). `weight_grad` is only used by backward."""
    shard = Shard.of(len(weight), group, vocab_start, vocab_valid)
    shard.check(target)
    stats = hidden.new_empty((5, len(target)), dtype=torch.float32)
    kept = hidden.new_empty(_kept_shape(hidden, weight, chunk, keep), dtype=logits_dtype)
    buffer = None if keep else logits_buffer(hidden, weight, chunk, logits_dtype)
    for part in chunks(len(target), chunk):
        logits = write_logits(kept[part.start :] if buffer is None else buffer, hidden[part], weight, chunk)
        write_stats(stats[:, part], logits, target[part], shard, inv_temp, entropy)
    return stats, kept


@_linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, target: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, keep, chunk, logits_dtype = settings
    stats = hidden.new_empty((5, target.shape[0]), dtype=torch.float32)
    return stats, hidden.new_empty(_kept_shape(hidden, weight, chunk, keep), dtype=logits_dtype)


@operator("linear_logprob_backward", mutates=("weight_grad",))
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    stats: Tensor,
    grad_stats: Tensor,
    kept: Tensor | None,
    weight_grad: Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    group: str,
    vocab_start: int,
    vocab_valid: int | None,
    inv_temp: float,
    entropy: bool,
    chunk: int,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight, each empty if it is not needed or was added to weight_grad. If `kept` is None, logits are
    recomputed."""
    shard = Shard.of(len(weight), group, vocab_start, vocab_valid)
    grad_stats = grad_stats.contiguous()
    gradients = Gradients(hidden, weight, weight_grad, needs_hidden, needs_weight, chunk)
    buffer = logits_buffer(hidden, weight, chunk, logits_dtype) if kept is None else kept
    for part in chunks(len(target), chunk):
        logits = write_logits(buffer, hidden[part], weight, chunk) if kept is None else kept[part]
        grad_logits = gradients.buffer_for(logits, reuse=kept is None)
        write_grads(grad_logits, logits, target[part], stats[:, part], grad_stats[:, part], shard, inv_temp, entropy)
        gradients.add(part, grad_logits)
    return gradients.hidden_grad, gradients.new_weight_grad()


@_linear_logprob_backward.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    weight_grad, needs_hidden, needs_weight = rest[4:7]
    grad_hidden = hidden.new_empty(hidden.shape if needs_hidden else (0,))
    return grad_hidden, weight.new_empty(weight.shape if needs_weight and weight_grad is None else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # save_for_backward would object that other microbatches change weight_grad
    hidden, weight, target, ctx.weight_grad, *settings = inputs
    *settings, keep, chunk, logits_dtype = settings
    stats, kept = output
    ctx.settings = *settings, chunk, logits_dtype
    ctx.save_for_backward(hidden, weight, target, stats, kept if keep else None)
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # no zeros of the size of the logits


def _backward(ctx: Any, grad_stats: Tensor, _: Tensor) -> Any:
    hidden, weight, target, stats, kept = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs_input_grad[:2]
    grad_hidden, grad_weight = _linear_logprob_backward(
        hidden, weight, target, stats, grad_stats, kept, ctx.weight_grad, needs_hidden, needs_weight, *ctx.settings
    )
    returns_weight = needs_weight and ctx.weight_grad is None
    return grad_hidden if needs_hidden else None, grad_weight if returns_weight else None, *[None] * 10


_linear_logprob.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.trivet.linear_logprob)
def _flop(hidden: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.trivet.linear_logprob_backward)
def _backward_flop(hidden: tuple[int, ...], weight: tuple[int, ...], *rest: Any, **_: Any) -> int:
    kept, _, needs_hidden, needs_weight = rest[3:7]
    return _flop(hidden, weight) * ((kept is None) + needs_hidden + needs_weight)


class Gradients:
    """The gradients of hidden [N, D] and weight [V, D], accumulated chunk by chunk from those of the logits.

    Without an accumulator, the first chunk writes the weight's gradient: in the weight's dtype if it is the only chunk, else in fp32.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, weight_grad: Tensor | None, needs_hidden: bool, needs_weight: bool, chunk: int):
        self.hidden, self.weight = hidden, weight
        self.needs_hidden, self.needs_weight = needs_hidden, needs_weight
        self.added = weight_grad is not None
        self.hidden_grad = hidden.new_empty(hidden.shape if needs_hidden else (0,))
        self.is_started = self.added
        if weight_grad is None:
            dtype = weight.dtype if len(hidden) <= chunk else torch.float32
            weight_grad = weight.new_empty(weight.shape if needs_weight else (0,), dtype=dtype)
        self.weight_grad = weight_grad
        self.buffer: Tensor | None = None

    def buffer_for(self, logits: Tensor, reuse: bool) -> Tensor:
        """Memory for the gradient of a chunk's logits, in the weight's dtype: the logits' own if `reuse` allows it and dtypes are equal,
        else a buffer that all chunks share."""
        if reuse and logits.dtype == self.weight.dtype:
            return logits
        if self.buffer is None:
            self.buffer = torch.empty_like(logits, dtype=self.weight.dtype)
        return self.buffer[: len(logits)]

    def add(self, part: slice, grad_logits: Tensor) -> None:
        """Accumulate the gradients of the rows `part`."""
        if self.needs_hidden:
            torch.mm(grad_logits, self.weight, out=self.hidden_grad[part])
        if self.needs_weight:
            multiply(self.weight_grad, grad_logits.T, self.hidden[part], add=self.is_started)
            self.is_started = True

    def new_weight_grad(self) -> Tensor:
        """The weight's gradient in its dtype; empty if it was not needed or was added to the caller's accumulator."""
        if self.added:
            return self.weight.new_empty(0)
        return (self.weight_grad if self.is_started else self.weight_grad.zero_()).to(self.weight.dtype)


def multiply(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, accumulated in fp32."""
    if out.dtype == b.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif b.device.type == "cpu":  # torch has no mixed-precision product on CPU
        multiply(out, a.float(), b.float(), add=add)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def write_logits(buffer: Tensor, hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Write hidden @ weight.T into the first rows of `buffer`, accumulated in fp32; returns those rows.

    With kernels, it is computed in blocks of one size. The last block is padded, and the buffer must have room for it.
    """
    count, block = len(hidden), product_rows(hidden, chunk)
    for start in range(0, count, block):
        rows = hidden[start : start + block]
        if len(rows) < block:
            rows = F.pad(rows, (0, 0, 0, block - len(rows)))
        multiply(buffer[start : start + block], rows, weight.T)
    return buffer[:count]


def product_rows(hidden: Tensor, chunk: int) -> int:
    """Rows of every forward product. On the host, where nothing is padded, all rows."""
    return min(PRODUCT_ROWS, chunk) if by_kernel(hidden) else max(1, len(hidden))


def logits_buffer(hidden: Tensor, weight: Tensor, chunk: int, logits_dtype: torch.dtype) -> Tensor:
    """Memory for the logits of one chunk."""
    rows = min(chunk, len(hidden))
    return hidden.new_empty((_padded(rows, product_rows(hidden, chunk)) if by_kernel(hidden) else rows, len(weight)), dtype=logits_dtype)


def chunk_rows(vocab: int) -> int:
    """Rows of a chunk for `vocab` columns. More rows need fewer passes over the weight and its gradient, but more memory."""
    return next((rows for rows in CHUNK_ROWS if rows * vocab * 4 <= CHUNK_BYTES), CHUNK_ROWS[-1])


def _kept_shape(hidden: Tensor, weight: Tensor, chunk: int, keep: bool) -> tuple[int, int]:
    """Shape of the logits that forward saves: whole blocks, of which chunks consist."""
    rows = hidden.shape[0]
    if by_kernel(hidden):
        rows = _padded(rows, product_rows(hidden, chunk))
    return (rows if keep else 0), weight.shape[0]


def _padded(rows: int, block: int) -> int:
    return -(-rows // block) * block


def chunks(count: int, chunk: int) -> list[slice]:
    """Slices of `chunk` rows that cover `count` rows."""
    return [slice(i, min(i + chunk, count)) for i in range(0, count, chunk)]
