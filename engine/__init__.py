"""Trivet: a post-training engine for LLMs. Start with train.py (the training loop) and types.py (the data types)."""

from engine.check_install import check_kernels

check_kernels()
