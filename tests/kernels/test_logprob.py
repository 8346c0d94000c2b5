"""logprob against float64, forward and backward: on one rank, sharded with equal bits, compiled, and with invalid input.

These run the torch reference; tests/kernels/interpreted/test_logprob.py runs the same checks on the kernels.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support import jobs_kernels_logprob as jobs
from tests.support.pool import ranks
from triton_kernels import linear_logprob, logprob
from triton_kernels.aot import AotCase
from triton_kernels.logprob import _stages, aot_cases, merge_parts, segment_parts
from triton_kernels.shard import Shard


def problem(rows: int, vocab: int, scale: float = 4.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [rows, vocab], targets [rows] and upstream gradients [3, rows] of (logp, entropy, lse)."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=draw) * scale
    return logits, torch.randint(0, vocab, (rows,), generator=draw), torch.randn(3, rows, generator=draw)


def reference(logits: Tensor, target: Tensor, upstream: Tensor, inv_temp: float = 1.0) -> tuple[Tensor, Tensor]:
    """((logp, entropy, lse) [3, N], the gradient of logits) in float64."""
    logits = logits.detach().double().requires_grad_()
    log_p = torch.log_softmax(logits * inv_temp, -1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    results = torch.stack([log_p.gather(1, target[:, None])[:, 0], entropy, torch.logsumexp(logits * inv_temp, -1)])
    (results * upstream.double()).sum().backward()
    assert logits.grad is not None
    return results.detach(), logits.grad


def run(logits: Tensor, target: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same, from logprob."""
    logits = logits.detach().requires_grad_()
    logp, entropy, lse = logprob(logits, target, entropy=True, **options)
    assert entropy is not None
    results = torch.stack([logp, entropy, lse])
    (results * upstream).sum().backward()
    assert logits.grad is not None
    return results.detach(), logits.grad


def check_close(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of each number, or of 1 for the small ones."""
    assert got.shape == expected.shape
    assert not got.isnan().any()
    error = (got.double() - expected).abs() / expected.abs().clamp_min(1.0)
    assert float(error.max() if error.numel() else 0.0) <= tolerance


def check_against_float64(rows: int, vocab: int, inv_temp: float = 1.0) -> None:
    logits, target, upstream = problem(rows, vocab)
    expected, expected_grad = reference(logits, target, upstream, inv_temp)
    results, grad = run(logits, target, upstream, inv_temp=inv_temp)
    check_close(results, expected)
    check_close(grad, expected_grad)
    logp, entropy, lse = logprob(logits, target, inv_temp=inv_temp)
    assert entropy is None
    assert torch.equal(torch.stack([logp, lse]), results[[0, 2]])


def check_extremes() -> None:
    """-inf logits, logits of ±80, a target with probability 1, one with probability 0, a masked one of finfo.min, rows of equal logits."""
    inf = torch.inf
    logits = torch.zeros(6, 40)
    logits[0, ::2] = -inf
    logits[1] = torch.linspace(-80, 80, 40)
    logits[2, 7] = 80.0
    logits[3, 30:] = -inf
    logits[4, 1:] = torch.finfo(torch.float32).min
    target = torch.tensor([1, 0, 7, 39, 0, 3])
    upstream = torch.ones(3, 6).index_fill(1, torch.tensor([3]), 0.5)
    expected, expected_grad = reference(logits, target, upstream)
    results, grad = run(logits, target, upstream)
    assert results[0, 3] == -inf
    assert expected[0, 3] == -inf
    check_close(results[:, [0, 1, 2, 4, 5]], expected[:, [0, 1, 2, 4, 5]])
    check_close(grad, expected_grad)


def check_padding(inv_temp: float = 0.7) -> None:
    """Columns from vocab_valid on do not affect results, whatever their values, and get no gradient."""
    logits, target, upstream = problem(5, 1000)
    padded = torch.cat([logits, torch.full((5, 24), 1e4)], 1)
    expected, expected_grad = reference(logits, target, upstream, inv_temp)
    results, grad = run(padded, target, upstream, inv_temp=inv_temp, vocab_valid=1000)
    check_close(results, expected)
    check_close(grad[:, :1000], expected_grad)
    assert not grad[:, 1000:].any()


def check_strides() -> None:
    """Odd row strides, one row repeated (stride 0), and a slice with an unaligned start."""
    logits, target, upstream = problem(4, 1000)
    expected = run(logits, target, upstream)
    for width in (1001, 1003):
        held = torch.full((4, width), torch.nan)
        held[:, 1:1001].copy_(logits)
        for actual, wanted in zip(run(held[:, 1:1001], target, upstream), expected, strict=True):
            assert torch.equal(actual, wanted)
    repeated, _ = run(logits[1:2].expand(4, 1000), target[1].expand(4), upstream)
    assert torch.equal(repeated, expected[0][:, 1:2].expand(3, 4))


def check_far_rows() -> None:
    """Two rows 2^31 + 2 elements apart: the second is read from the right address."""
    try:
        memory = torch.empty(2**31 + 1002, dtype=torch.bfloat16)  # only two rows are ever written
    except RuntimeError:
        pytest.skip("this machine promises no 4 GiB")
    rows = memory.as_strided((2, 1000), (2**31 + 2, 1))
    logits, target, upstream = problem(2, 1000)
    rows.copy_(logits)
    results, grad = run(rows, target, upstream)
    expected, expected_grad = run(logits.bfloat16(), target, upstream)
    assert torch.equal(results, expected)
    assert torch.equal(grad, expected_grad)


def check_low_precision(dtype: torch.dtype) -> None:
    """16-bit logits are exact in fp32: only the gradient is rounded."""
    logits, target, upstream = problem(5, 1000)
    logits = logits.to(dtype)
    expected, expected_grad = reference(logits, target, upstream)
    results, grad = run(logits, target, upstream)
    assert grad.dtype == dtype
    check_close(results, expected)
    check_close(grad, expected_grad, 1e-2)


def check_batch_invariance() -> None:
    """A row's bits do not depend on other rows, and are the same in every run."""
    logits, target, upstream = problem(9, 4104)
    together, grad = run(logits, target, upstream)
    again, _ = run(logits, target, upstream)
    assert torch.equal(together, again)
    for part in (slice(0, 1), slice(3, 4), slice(2, 9)):
        alone, alone_grad = run(logits[part], target[part], upstream[:, part])
        assert torch.equal(alone, together[:, part])
        assert torch.equal(alone_grad, grad[part])


def check_shards(vocab: int, sizes: tuple[int, ...]) -> None:
    """The segments of 1, 2, 4 and 8 ranks have the same bits, in the same order."""
    logits, target, _ = problem(3, vocab)
    full = segment_parts(logits, target, Shard.of(vocab, "", 0, None), 0.7, True)
    for size in sizes:
        width = vocab // size
        shards = [Shard(rank * width, width, 0, vocab, size, "") for rank in range(size)]
        cut = [segment_parts(logits[:, s.start : s.start + width].contiguous(), target, s, 0.7, True) for s in shards]
        results = torch.cat(cut)
        assert torch.equal(results[:, [0, 1, 3]], full[:, [0, 1, 3]])
        assert torch.equal(results[:, 2].sum(0), full[:, 2].sum(0))  # the target's logit, and zeros


def check_other_shards(size: int) -> None:
    """If ranks do not divide 8, segments differ but results are correct."""
    logits, target, upstream = problem(3, 1008)
    width = 1008 // size
    shards = [Shard(rank * width, width, 0, 1008, size, "") for rank in range(size)]
    parts = torch.cat([segment_parts(logits[:, s.start : s.start + width], target, s, 1.0, True) for s in shards])
    stats = torch.empty(5, 3)
    merge_parts(stats, parts, target, shards[0], 1.0, True)
    check_close(stats[:3], reference(logits, target, upstream)[0])


def check_empty_and_infinite() -> None:
    """No rows, and rows in which all logits are -inf."""
    results, grad = run(*problem(0, 50))
    assert results.shape == (3, 0)
    assert grad.shape == (0, 50)
    logp, _, _ = logprob(torch.full((2, 50), -torch.inf), torch.zeros(2, dtype=torch.int64))
    assert logp.isnan().all()


@pytest.mark.parametrize(("rows", "vocab"), [(17, 1000), (1, 4104), (3, 16033), (2, 3)])
def test_float64(rows: int, vocab: int) -> None:
    check_against_float64(rows, vocab)
    check_against_float64(rows, vocab, inv_temp=1 / 0.7)


def test_extremes() -> None:
    check_extremes()


def test_padding() -> None:
    check_padding()


def test_strides() -> None:
    check_strides()


def test_far_rows() -> None:
    check_far_rows()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    check_low_precision(dtype)


def test_batch_invariance() -> None:
    check_batch_invariance()


@pytest.mark.parametrize(("vocab", "sizes"), [(1000, (2, 4, 8)), (4104, (2, 4, 8)), (4100, (2, 4)), (4102, (2,))])
def test_shards(vocab: int, sizes: tuple[int, ...]) -> None:
    check_shards(vocab, sizes)


@pytest.mark.parametrize("size", [3, 6, 16])
def test_other_numbers_of_shards(size: int) -> None:
    check_other_shards(size)


def test_no_rows_and_infinite_logits() -> None:
    check_empty_and_infinite()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_on_several_ranks(size: int) -> None:
    """Forward: the bits of one rank. Backward: each rank gets its columns of the full gradient."""
    logits, target, upstream = problem(7, 1016)
    target = target % 1003
    alone, grad = run(logits, target, upstream, inv_temp=0.7, vocab_valid=1003)
    results = ranks(size).run(jobs.sharded_rows, logits=logits, target=target, upstream=upstream, inv_temp=0.7, vocab_valid=1003)
    for actual, _ in results:
        assert torch.equal(actual, alone)
    assert torch.equal(torch.cat([part for _, part in results], 1), grad)


@pytest.mark.parametrize(("vocab", "ahead"), [(128256, 3), (32016, 1), (32008, 1), (32001, 1)])
def test_prefetching_is_the_same_for_every_number_of_ranks(vocab: int, ahead: int) -> None:
    """And without prefetching if segments are not 16-byte aligned, even if rows are: an eighth of 32016 is 4002."""
    results = {_stages(vocab // ranks, *divmod(vocab // ranks, 8 // ranks)) for ranks in (1, 2, 4, 8) if vocab % ranks == 0}
    assert results == {ahead}


def test_the_operator_passes_opcheck() -> None:
    logits, target, _ = problem(5, 100)
    arguments = (logits.requires_grad_(), target % 90, "", 0, 97, 0.7, True)
    torch.library.opcheck(torch.ops.trivet.logprob.default, arguments)
    stats = torch.ops.trivet.logprob(*arguments).detach()
    torch.library.opcheck(torch.ops.trivet.logprob_backward.default, (logits.detach(), arguments[1], stats, stats, *arguments[2:]))


def test_the_linear_operator_passes_opcheck() -> None:
    hidden, weight, target = torch.randn(5, 8, requires_grad=True), torch.randn(100, 8, requires_grad=True), torch.arange(5)
    for weight_grad in (None, torch.zeros(100, 8)):
        for keep in (False, True):
            arguments = (hidden, weight, target, weight_grad, "", 0, None, 0.7, True, keep, 2, torch.float32)
            torch.library.opcheck(torch.ops.trivet.linear_logprob.default, arguments)
            stats, kept = (each.detach() for each in torch.ops.trivet.linear_logprob(*arguments))
            given = (hidden.detach(), weight.detach(), target, stats, stats, kept if keep else None, weight_grad, True, True)
            options = ("", 0, None, 0.7, True, 2, torch.float32)
            torch.library.opcheck(torch.ops.trivet.linear_logprob_backward.default, (*given, *options))


def loss(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    logp, entropy, _ = linear_logprob(hidden, weight, target, entropy=True, chunk=2, **options)
    assert entropy is not None
    rows_logp, _, lse = logprob(hidden @ weight.T, target, inv_temp=0.7)
    return (logp - 0.1 * entropy).sum() + (rows_logp + lse).sum()


@pytest.mark.parametrize("how", [{}, {"mode": "recompute"}, {"rows": torch.tensor([2, 4])}, {"weight_grad": torch.zeros(100, 8)}], ids=str)
def test_compiled(how: dict[str, Any]) -> None:
    """One graph, the same results."""
    draw = torch.Generator().manual_seed(0)
    arguments = torch.randn(5, 8, generator=draw), torch.randn(100, 8, generator=draw)
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        hidden, weight = (each.clone().requires_grad_() for each in arguments)
        how = how | {"weight_grad": torch.zeros(100, 8)} if "weight_grad" in how else how
        total = function(hidden, weight, torch.arange(5), **how)
        total.backward()
        results.append([total.detach(), hidden.grad, weight.grad, how.get("weight_grad", torch.zeros(0))])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("complaint", "change"),
    [
        ("logits are torch.float64; use float32", {"logits": torch.zeros(3, 5, dtype=torch.float64)}),
        ("pass [N, V] with contiguous columns", {"logits": torch.zeros(5, 3).T}),
        ("target is torch.int32 (3,); pass torch.int64 (3,)", {"target": torch.zeros(3, dtype=torch.int32)}),
        ("target is torch.int64 (2,); pass torch.int64 (3,)", {"target": torch.zeros(2, dtype=torch.int64)}),
        ("target[2]=5 is outside the vocabulary 0 ... 4", {"target": torch.tensor([0, 4, 5])}),
        ("target[1]=-100 is outside the vocabulary 0 ... 3", {"target": torch.tensor([0, -100, 5]), "vocab_valid": 4}),
        ("inv_temp=0.0 must be positive", {"inv_temp": 0.0}),
    ],
)
def test_bad_input_is_named(complaint: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"logits": torch.zeros(3, 5), "target": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=re.escape(complaint)):
        logprob(arguments.pop("logits"), arguments.pop("target"), **arguments)


def test_bad_input_of_a_rank_is_named() -> None:
    assert ranks(2).run(jobs.misplaced)[1] == "vocab_start=5 of rank 1 must be 4: ranks hold 4 ids each, in order"


@pytest.mark.parametrize("case", {case.kernel: case for case in aot_cases()}.values(), ids=lambda case: case.name)
def test_row_offsets_have_64_bits(case: AotCase) -> None:
    """In Triton's first IR of a kernel, the row index is extended to 64 bits before it is used."""
    source = ASTSource(case.kernel, case.signature, case.constexprs)
    form = str(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"])
    row = re.search(r"(%\w+) = tt.get_program_id x", form)
    assert row is not None
    uses = [line for line in form.splitlines() if re.search(rf"{row[1]}\b", line) and "get_program_id" not in line]
    assert uses
    assert all("arith.extsi" in line and "to i64" in line for line in uses)
