"""Attention behind a shared prefix, on a GPU: what tests/test_prefix.py says of the host."""

from __future__ import annotations

from tests.test_prefix import test_attention_behind_a_prefix

__all__ = ["test_attention_behind_a_prefix"]
