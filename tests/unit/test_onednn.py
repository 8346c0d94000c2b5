"""aten::mm with oneDNN: products equal float64's for all strides, and no other operation changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.megatron.onednn import use_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def onednn() -> Iterator[None]:
    with use_onednn():
        yield


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


OPERANDS = {
    "plain": (random(7, 5), random(5, 6)),
    "transposed": (random(5, 7).T, random(6, 5).T),
    "a column and a row": (random(7, 1), random(1, 6)),
    "strided": (random(9, 12)[1::2, 2:7], random(5, 12)[:, ::2]),
    "not aligned": (random(36)[1:].view(7, 5), random(31)[1:].view(5, 6)),
    "broadcast": (random(1, 5).expand(7, 5), random(1, 1).expand(5, 6)),
    "no rows": (random(0, 5), random(5, 6)),
    "nothing to sum": (random(7, 0), random(0, 6)),
    "batched rows": (random(3, 7, 5), random(5, 6)),
}


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("name", OPERANDS)
def test_products_equal_float64(name: str) -> None:
    a, b = OPERANDS[name]
    actual = a @ b
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    if a.dim() == 2:
        assert torch.equal(torch.mm(a, b, out=torch.full_like(actual, torch.nan)), actual)
    torch.testing.assert_close(actual.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("onednn")
def test_gradients_use_onednn() -> None:
    a, b = random(7, 5).requires_grad_(), random(5, 6).requires_grad_()
    (a @ b).square().sum().backward()
    c, d = (x.detach().double().requires_grad_() for x in (a, b))
    (c @ d).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad.double(), c.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(b.grad.double(), d.grad, rtol=1e-5, atol=1e-5)


def computed_by() -> set[str]:
    with torch.profiler.profile() as profile:
        _ = random(7, 5) @ random(5, 6)
    return {event.key for event in profile.key_averages()}


def test_onednn_is_used_only_inside_the_backend() -> None:
    before = computed_by()
    with use_onednn():
        with use_onednn():
            assert "mkldnn::_linear_pointwise" in computed_by()
        assert "mkldnn::_linear_pointwise" in computed_by()
    assert computed_by() == before


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_other_dtypes_are_unchanged(dtype: torch.dtype) -> None:
    assert (torch.ones(2, 3, dtype=dtype) @ torch.ones(3, 2, dtype=dtype)).tolist() == [[3, 3], [3, 3]]


@pytest.mark.usefixtures("onednn")
def test_shapes_that_do_not_fit_still_raise() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        _ = random(2, 3) @ random(2, 3)
