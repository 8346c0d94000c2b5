"""Literal types of settings that modules of several floors use."""

from typing import Literal

Kl = Literal["k1", "k2", "k3"]  # estimators of KL(policy, reference): engine/advantages.py
Whiten = Literal["batch", "rank", "none"]  # over which tokens advantages are whitened: engine/advantages.py
TooLong = Literal["error", "truncate", "drop"]  # what to do with a sequence over max_length: engine/data/corpus.py
BadRows = Literal["error", "drop"]  # what to do with a row that cannot be used: engine/data/corpus.py
Average = Literal["token", "sequence"]  # what a policy loss is averaged over: engine/losses.py
CudaGraphs = Literal["auto", "on", "off"]  # for decoding: engine/megatron/graphs.py
