from collections.abc import Sequence
from typing import Any

import numpy as np

def plan(
    lengths: np.ndarray,
    group_ids: np.ndarray | None,
    step_ids: np.ndarray | None,
    trained: np.ndarray | None,
    ranks: int,
    token_budget: int,
    cost: tuple[int, int, int],
    seq_multiple: int,
    total_multiple: int,
    microbatch_multiple: int,
    sync: str,
    on_oversize: str,
) -> dict[str, Any]:
    """int64 [N] each; the arrays and numbers of batching.Plan by name, its denominators as trained_*.

    Arrays are contiguous and have exactly this dtype; nothing is converted. Raises ValueError, with argument and value, for any other array
    and for a number out of range."""

def collate(
    order: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    totals: np.ndarray,
    seq_multiple: int,
    starts: np.ndarray | None,
    tokens: np.ndarray | list[np.ndarray],
    mask: np.ndarray | list[np.ndarray],
    fields: Sequence[tuple[np.ndarray | list[np.ndarray], bool, np.ndarray]],
    tokens_out: np.ndarray,
    targets_out: np.ndarray,
    positions_out: np.ndarray,
    mask_out: np.ndarray,
    threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Writes the *_out of one rank, and the last of each of `fields`: (values, whether each token has its own, where they go). Returns
    cu_seqlens (int32, one more than segments for each microbatch), the sequence of each segment (int32, -1: padding) and how many segments
    each microbatch has (int64).

    Raises ValueError as `plan` does, and for an output that is read-only or shares memory with another argument."""

def flatten_ints(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """int32 numbers end to end, and where each row begins, int64 [N + 1]."""

def flatten_flags(rows: list[list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """uint8, 1 for what is true."""

def flatten_floats(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """float32."""
