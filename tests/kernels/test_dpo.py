"""dpo_norm and seq_logps on CPU: their torch references, as operators, and their errors for invalid input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.check_dpo import (  # noqa: F401 (collected here as tests)
    test_against_float64,
    test_batch_invariance,
    test_bf16,
    test_empty_input,
    test_far_margins,
    test_masked_tokens_are_not_read,
    test_seq_logps,
)
from tests.support.float64 import normal, packed
from triton_kernels import dpo_norm, seq_logps


def small(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    cu_seqlens, mask = packed([4, 0, -2, 5])
    pairs = torch.tensor([[0, 3], [3, 2], [1, 0]])
    logp = normal(11, 1).to(dtype).requires_grad_()
    return {"logp": logp, "ref": normal(11, 2).to(dtype), "mask": mask, "cu_seqlens": cu_seqlens, "pairs": pairs}


def test_operators_keep_the_rules_of_torch() -> None:
    inputs = tuple(small().values())
    logp, _, mask, cu_seqlens, pairs = inputs
    torch.library.opcheck(torch.ops.trivet.dpo_norm.default, (*inputs, 5.0, 0.1, True, False))
    torch.library.opcheck(torch.ops.trivet.dpo_norm_backward.default, (torch.ones(3), torch.ones(3, 2), mask, cu_seqlens, pairs))
    torch.library.opcheck(torch.ops.trivet.seq_logps.default, (logp, mask, cu_seqlens))
    torch.library.opcheck(torch.ops.trivet.seq_logps_backward.default, (torch.ones(4), mask, cu_seqlens))


def test_gradcheck() -> None:
    inputs = small(torch.float64)
    logp = inputs.pop("logp")
    assert torch.autograd.gradcheck(lambda x: dpo_norm(x, **inputs, beta=0.7, label_smoothing=0.1)[0], logp)
    assert torch.autograd.gradcheck(lambda x: seq_logps(x, inputs["mask"], inputs["cu_seqlens"])[0], logp)


def test_compiles_whole() -> None:
    inputs = small()
    logp = inputs.pop("logp")

    def loss(x: Tensor) -> Tensor:
        pairs, metrics = dpo_norm(x, **inputs, beta=5.0)
        return pairs.sum() + metrics.margin.sum() + seq_logps(x, inputs["mask"], inputs["cu_seqlens"])[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logp), loss(logp))
    assert torch.equal(torch.autograd.grad(compiled(logp), logp)[0], torch.autograd.grad(loss(logp), logp)[0])


def test_strided_inputs() -> None:
    inputs = small()
    expected, _ = dpo_norm(**inputs, beta=5.0)
    spread: dict[str, Any] = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in inputs.items()}
    assert not any(tensor.is_contiguous() for tensor in spread.values())
    assert torch.equal(dpo_norm(**spread, beta=5.0)[0], expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pairs": torch.tensor([[0, 3], [4, 2]])}, r"pairs\[1\]=\[4, 2\] names a sequence .* use indices in \[0, 4\)"),
        ({"pairs": torch.tensor([[0, -1]])}, r"pairs\[0\]=\[0, -1\]"),
        ({"pairs": torch.tensor([0, 3])}, r"pairs is int64 \[2\] on cpu; it must be int32 or int64 \[P, 2\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 6, 11])}, r"cu_seqlens\[2\]=4 is less than cu_seqlens\[1\]=5"),
        ({"cu_seqlens": torch.tensor([0, 4, 4, 6, 10])}, r"must run from 0 to T=11"),
        ({"cu_seqlens": torch.tensor([1, 4, 4, 6, 11])}, r"must run from 0 to T=11"),
        ({"cu_seqlens": torch.tensor([0.0, 11.0])}, r"cu_seqlens is float32 \[2\]"),
        ({"logp": torch.zeros(11, dtype=torch.float16)}, r"logp is float16 \[11\] on cpu; it must be float32 or bfloat16 \[T\] = \[11\]"),
        ({"logp": torch.zeros(1, 11)}, r"logp is float32 \[1, 11\]"),
        ({"ref": torch.zeros(4)}, r"ref is float32 \[4\] on cpu; it must be float32 or bfloat16 \[T\] = \[11\]"),
        ({"ref_is": "sums"}, r"ref is float32 \[11\] on cpu; it must be float32 or bfloat16 \[S\] = \[4\]"),
        ({"ref_is": "means"}, r"ref_is='means' must be"),
        ({"mask": torch.ones(11)}, r"mask is float32 \[11\] on cpu; it must be bool or uint8"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must be in \[0, 0.5\)"),
    ],
)
def test_bad_input_is_answered_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_norm(**{**small(), "beta": 5.0, **wrong})
