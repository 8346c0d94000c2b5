"""Trivet: the post-training engine. Start at train.py (the loop) and types.py (what travels through it)."""

from engine.check_install import check_kernels

check_kernels()
