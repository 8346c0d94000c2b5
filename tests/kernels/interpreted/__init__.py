"""Kernels in Triton's interpreter. These tests need a process of their own: TRITON_INTERPRET=1 pytest tests/kernels/interpreted."""
