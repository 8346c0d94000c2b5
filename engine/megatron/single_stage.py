"""Run one microbatch through one pipeline stage in isolation: what megatron's schedules do between receive and send."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.pipeline_parallel import schedules
from torch import Tensor

from engine.losses import nll_terms
from engine.megatron.microbatch import forward_step
from engine.megatron.policy import Policy
from engine.types import Packed

# megatron-core before 0.17 also takes a model_type, which it ignores.
backward_step: Any = schedules.backward_step
if "model_type" in inspect.signature(backward_step).parameters:
    backward_step = partial(backward_step, model_type=None)


class SingleStage:
    """Runs `packed`, whose T is a multiple of tp, through virtual stage `chunk` of `policy`. Gradients are accumulated, not reduced."""

    def __init__(self, policy: Policy, chunk: int, packed: Packed, *, token_loss: bool = False):
        """`token_loss`: the output layer computes the gradient of the loss in its forward pass; see types.TokenLoss."""
        self.policy, self.packed, self.chunk = policy, packed, chunk
        self.terms = nll_terms if token_loss else None
        self.stage, self.model = policy.stages[chunk], policy.chunks[chunk]
        self.received: Tensor | None = None
        self.sent: Any = None
        self.trainable = policy.optimizer is not None
        if self.trainable and self.stage.remove_forward_pre_hook_handles:
            self.stage.disable_forward_pre_hook(param_sync=False)  # the hook gathers the weights, which happens once per step
        get_global_memory_buffer().buffer.clear()

    @property
    def shared(self) -> int:
        """Bytes of the buffers for gathering sequence-parallel tensors, shared by all microbatches and stages of a process."""
        return sum(tensor.nbytes for tensor in get_global_memory_buffer().buffer.values())

    @torch.no_grad()
    def infer(self) -> None:
        """Forward pass without saving activations."""
        self.stage.eval()
        self._forward(training=False)
        self._release()

    def forward(self) -> None:
        """Forward pass that saves activations for backward. The output is released as if it had been sent to the next stage."""
        self.stage.train()
        self._forward(training=True)
        if not self.model.post_process:
            schedules.deallocate_output_tensor(self.sent, self.model.config.deallocate_pipeline_outputs)

    def backward(self) -> None:
        """Backward pass, which adds gradients to their buffers."""
        grad = None if self.model.post_process else self._hidden()
        with self._no_sync():
            backward_step(self.received, self.sent, grad, config=self.model.config)
        self._release()

    def _forward(self, training: bool) -> None:
        config = self.model.config
        self.received = None if self.model.pre_process else self._hidden().requires_grad_(training)
        packed_forwards = iter(
            [self.policy._packed_forward(self.packed, every=False, temperature=1.0, terms=self.terms if training else None)]
        )
        with self._no_sync():
            self.sent, _ = schedules.forward_step(
                lambda packed_forwards, stage: forward_step(_total, packed_forwards, stage),
                packed_forwards,
                self.stage,
                1,
                self.received,
                [],
                config,
                cp_group_size=1,
                vp_stage=self.model.vp_stage,
                is_last_stage=self.model.post_process,
            )

    def _release(self) -> None:
        self.received = self.sent = None
        self.model.set_input_tensor(None)  # type: ignore[arg-type]

    def _hidden(self) -> Tensor:
        """Hidden states as sent between stages: each tensor-parallel rank has its share of the tokens."""
        config, rows = self.model.config, len(self.packed.tokens_T) // self.policy.grid.tp
        return torch.empty(rows, 1, config.hidden_size, dtype=config.pipeline_dtype, device=self.policy.world.device)

    def _no_sync(self) -> Any:
        return self.stage.no_sync() if self.trainable else nullcontext()


def _total(packed: Packed, output_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A loss that depends on every output but needs no values, which meta tensors do not have."""
    return output_T.sum(), torch.tensor(0, dtype=torch.int), {}
