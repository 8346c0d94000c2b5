"""Packed sequences: checks and helpers shared by the kernels over tokens [T] and cu_seqlens [S + 1], and by their references.

Shapes, dtypes and devices are checked when a function is called. Values are checked inside the operator, and only in host memory: reading
them on a GPU would synchronize, so index tensors on a GPU are not checked.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from triton_kernels.launch import by_kernel, jit, tl


def check_floats(shape: str, like: Tensor, size: int, **tensors: Tensor) -> None:
    """Raise ValueError unless each tensor is float [size] on the device of `like`. `shape` names the size in the message: "T", "S".

    Kernels take float32 and bfloat16; references also take float64, and return it.
    """
    for name, tensor in tensors.items():
        supported = (torch.float32, torch.bfloat16) if by_kernel(tensor) else (torch.float32, torch.bfloat16, torch.float64)
        if tensor.dtype not in supported or tensor.shape != (size,) or tensor.device != like.device:
            raise ValueError(f"{name} is {_kind(tensor)}; it must be float32 or bfloat16 [{shape}] = [{size}] on {like.device}")


def check_packed(mask_T: Tensor, cu_seqlens: Tensor, **tokens: Tensor) -> None:
    """Raise ValueError unless `tokens` are float [T], the mask bool or uint8 [T], and cu_seqlens indices [S + 1], on one device."""
    like = next(iter(tokens.values()))
    check_floats("T", like, like.numel(), **tokens)
    if mask_T.dtype not in (torch.bool, torch.uint8) or mask_T.shape != like.shape or mask_T.device != like.device:
        raise ValueError(f"mask is {_kind(mask_T)}; it must be bool or uint8 [T] = [{len(like)}] on {like.device}")
    check_indices("cu_seqlens", cu_seqlens, ("S + 1",), like)


def check_indices(name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor) -> None:
    """Raise ValueError unless `tensor` is int32 or int64, on the host or `like`'s device. A string in `shape` allows any size."""
    fits = tensor.dim() == len(shape) and all(isinstance(n, str) or n == size for n, size in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype not in (torch.int32, torch.int64) or tensor.device.type not in ("cpu", like.device.type):
        expected = ", ".join(map(str, shape))
        raise ValueError(f"{name} is {_kind(tensor)}; it must be int32 or int64 [{expected}] on cpu or {like.device}")


def checked_cu_seqlens(cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """`cu_seqlens` on the device of `like` [T]. If it is on the host, raises ValueError unless it ascends from 0 to T."""
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        for s, (start, end) in enumerate(pairwise(ends)):
            if end < start:
                raise ValueError(f"cu_seqlens[{s + 1}]={end} is less than cu_seqlens[{s}]={start}; pass the running sum of the lengths")
        if not ends or ends[0] != 0 or ends[-1] != len(like):
            raise ValueError(f"cu_seqlens={ends[:1]} ... {ends[-1:]} must run from 0 to T={len(like)}; pass the running sum of the lengths")
    return cu_seqlens.to(like.device).contiguous()


def checked_pairs(pairs_P2: Tensor, sequences: int, like: Tensor) -> Tensor:
    """`pairs_P2` on the device of `like`. If it is on the host, raises ValueError for a sequence index out of range."""
    if pairs_P2.device.type == "cpu":
        for p, pair in enumerate(pairs_P2.tolist()):
            if not all(0 <= s < sequences for s in pair):
                raise ValueError(f"pairs[{p}]={pair} names a sequence that cu_seqlens does not have; use indices in [0, {sequences})")
    return pairs_P2.to(like.device).contiguous()


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def result_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64 input."""
    return torch.promote_types(tensor.dtype, torch.float32)


def as_bytes(mask_T: Tensor) -> Tensor:
    """A bool or uint8 mask as contiguous uint8, for kernels."""
    return mask_T.contiguous().view(torch.uint8)


def segment_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence of each token, int64 [T]."""
    lengths_S = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths_S), device=cu_seqlens.device), lengths_S, output_size=tokens)


def segment_sum(values_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sum over each sequence, in float64 [S]."""
    totals_S = torch.zeros(len(cu_seqlens) - 1, dtype=torch.float64, device=values_T.device)
    return totals_S.index_add_(0, segment_of(cu_seqlens, len(values_T)), values_T.double())


@jit
def segment(CU_SEQLENS, s):
    """First token of sequence `s`, and the one after its last."""
    return tl.load(CU_SEQLENS + s).to(tl.int64), tl.load(CU_SEQLENS + s + 1).to(tl.int64)
