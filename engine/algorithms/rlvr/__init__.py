"""RLVR."""

from engine.algorithms.rlvr.step import *  # noqa: F403
