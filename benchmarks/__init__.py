"""Benchmarks. `engine` is imported first: it raises an error if `triton_kernels` belongs to another distribution."""

import engine  # noqa: F401
