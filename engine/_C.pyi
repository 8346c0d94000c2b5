from collections.abc import Sequence

import numpy as np

def pack(
    lengths: np.ndarray, groups: np.ndarray | None, ranks: int, token_budget: int, total_multiple: int, microbatch_multiple: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """lengths, groups int64 [N] -> order int64 [N], offsets int64 [ranks * M + 1], M."""

def collate(
    tokens: Sequence[np.ndarray], masks: Sequence[np.ndarray], total: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S times int32 [L + 1] and uint8 [L] -> tokens_T, targets_T, positions_T (int64), mask_T (uint8), cu_seqlens (int32)."""

def collate_values(values: Sequence[np.ndarray], total: int) -> np.ndarray:
    """S times float32 [L] -> values_T float32, zero where padded."""
