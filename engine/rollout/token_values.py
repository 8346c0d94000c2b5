"""What a model says of each token of a batch, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch.distributed as dist
from torch import Tensor

from engine.batching.build import batch, scatter
from engine.megatron.policy import Policy
from engine.types import Sample, Step


def token_values(policy: Policy, samples: Sequence[Sample], budget: int, read: Callable[[Step], list[Tensor]]) -> list[np.ndarray]:
    """float32 [L], or [2, L], for each sample, equal on every rank; `read` is a verb of `policy`, such as logprobs or values.

    Raises FloatingPointError, naming the sample, where it is not finite.
    """
    step = batch(samples, budget, **policy.batch_options)
    mine = {i: values.numpy() for i, values in enumerate(scatter(read(step), step, len(samples))) if values is not None}
    parts = [mine]
    if policy.grid.dp > 1:
        parts = [{} for _ in range(policy.grid.dp)]
        dist.all_gather_object(parts, mine, group=policy.grid.dp_group)
    whole = {i: values for part in parts for i, values in part.items()}
    for i in range(len(samples)):
        if not np.isfinite(whole[i]).all():
            place = tuple(np.argwhere(~np.isfinite(whole[i]))[0])
            problem = f"the model returned {whole[i][place]} at token {place[-1]} of sample {i}"
            raise FloatingPointError(f"{problem}; lower its learning rate and resume")
    return [whole[i] for i in range(len(samples))]
