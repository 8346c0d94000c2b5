"""Attention with a shared prefix on a GPU: the checks of tests/unit/test_prefix_attention.py."""

from __future__ import annotations

from tests.unit.test_prefix_attention import test_attention_with_a_prefix

__all__ = ["test_attention_with_a_prefix"]
