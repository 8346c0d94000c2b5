"""Attention behind a shared prefix, on a GPU: what tests/unit/test_prefix_attention.py says of the host."""

from __future__ import annotations

from tests.unit.test_prefix_attention import test_attention_behind_a_prefix

__all__ = ["test_attention_behind_a_prefix"]
