"""RLVR: settings in config.py, one training step in step.py."""

from engine.algorithms.rlvr.config import RLVR, Critic

__all__ = ["RLVR", "Critic"]
