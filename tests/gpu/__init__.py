"""Kernel tests that need a GPU: real sizes, real matrix products, real memory. `make gpu` runs these and tests/kernels/interpreted."""
