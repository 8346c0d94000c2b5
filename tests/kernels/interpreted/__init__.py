"""Tests of kernels in Triton's interpreter. They need their own process: TRITON_INTERPRET=1 pytest tests/kernels/interpreted."""
