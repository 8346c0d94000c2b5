"""rope on CPU: its torch reference against float64, as an operator, under torch.compile, and its errors for invalid input."""

from __future__ import annotations

import pytest
import torch

from tests.support.layers import angles, check_rope, check_rope_qkv, drawn, passes
from triton_kernels import rope, rope_qkv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "heads", "size"), [(0, 2, 8), (1, 1, 2), (17, 9, 64), (6, 3, 80)])
def test_against_float64(tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    check_rope(tokens, heads, size, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "groups", "queries", "size"), [(0, 1, 1, 8), (1, 2, 1, 2), (17, 3, 3, 64), (6, 1, 16, 80)])
def test_a_product_against_float64(tokens: int, groups: int, queries: int, size: int, dtype: torch.dtype) -> None:
    check_rope_qkv(tokens, groups, queries, size, dtype)


def test_outputs_do_not_share_the_products_memory() -> None:
    """Attention saves query, key and value for backward; none of them may keep the projection output alive."""
    qkv = drawn(5, 2, 6, 8)
    three = rope_qkv(qkv, *angles(5, 8))
    assert all(x.untyped_storage().nbytes() == x.nbytes and x.is_contiguous() for x in three)
    assert torch.equal(three[2], qkv[:, :, -1])


def test_the_negative_angle_inverts_the_rotation() -> None:
    x, (cos, sin) = drawn(9, 2, 16), angles(9, 16)
    torch.testing.assert_close(rope(rope(x, cos, sin), cos, -sin), x, rtol=1e-6, atol=1e-6)


def test_a_score_depends_only_on_the_distance() -> None:
    """<x rotated by m, y rotated by n> depends only on m - n, which makes the embedding relative."""
    query, key = drawn(1, 1, 32), drawn(1, 1, 32, seed=1)
    turns = torch.arange(8)[:, None] * 10000 ** -(torch.arange(0, 32, 2) / 32)
    turned = [rope(x.expand(8, 1, 32), turns.cos(), turns.sin())[:, 0] for x in (query, key)]
    scores = turned[0] @ turned[1].T
    for distance in range(-7, 8):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-5)


def test_operator() -> None:
    arguments = (drawn(3, 2, 10).requires_grad_(), *angles(3, 10))
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.trivet.rope.default, (*arguments, inverse))
    torch.library.opcheck(torch.ops.trivet.rope.default, (drawn(2, 3, 10).transpose(0, 1).requires_grad_(), *angles(3, 10), False))


def test_operator_of_a_product() -> None:
    qkv, (cos, sin) = drawn(3, 2, 5, 10).requires_grad_(), angles(3, 10)
    torch.library.opcheck(torch.ops.trivet.rope_qkv.default, (qkv, cos, sin))
    torch.library.opcheck(torch.ops.trivet.rope_qkv.default, (drawn(2, 3, 5, 10).transpose(0, 1).requires_grad_(), cos, sin))
    grads = drawn(3, 6, 10), drawn(3, 2, 10), drawn(2, 3, 10).transpose(0, 1)
    torch.library.opcheck(torch.ops.trivet.rope_qkv_backward.default, (*grads, cos, sin))


def test_compiles_in_one_graph() -> None:
    cos, sin = angles(5, 12)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return rope(x + 1, cos, sin) * 2

    compiled = passes(torch.compile(layer, fullgraph=True, backend="aot_eager"), [drawn(5, 2, 12)])
    assert all(torch.equal(a, b) for a, b in zip(compiled, passes(layer, [drawn(5, 2, 12)]), strict=True))


def test_bad_input_is_named() -> None:
    x, (cos, sin) = drawn(3, 2, 8), angles(3, 8)
    with pytest.raises(ValueError, match="cos has dtype float64; use bfloat16, float16 or float32"):
        rope(x, cos.double(), sin)
    with pytest.raises(ValueError, match=r"sin has shape \[2, 4\] where \[3, 4\] is needed, a row for each token of x"):
        rope(x, cos, sin[:2])
    with pytest.raises(ValueError, match=r"x has shape \[3, 2, 7\]; use \[tokens, heads, head size\] with an even head size"):
        rope(x[..., :7], cos, sin)
    qkv = drawn(3, 2, 4, 8)
    with pytest.raises(ValueError, match=r"cos has shape \[2, 4\] where \[3, 4\] is needed, a row for each token of qkv"):
        rope_qkv(qkv, cos[:2], sin)
    with pytest.raises(ValueError, match=r"qkv has shape \[3, 2, 2, 8\]; use \[tokens, key-value heads, queries of each \+ 2, head size\]"):
        rope_qkv(qkv[:, :, :2], cos, sin)
