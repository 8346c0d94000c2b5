"""One microbatch through one stage with nobody before or behind it: what megatron's schedules do between receiving and sending."""

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

# megatron-core before 0.17 also takes a model_type, which it does not look at.
backward_step: Any = schedules.backward_step
if "model_type" in inspect.signature(backward_step).parameters:
    backward_step = partial(backward_step, model_type=None)


class SingleStage:
    """`packed`, whose T is a multiple of tp, through the virtual stage `chunk` of `policy`. Gradients are added up, not reduced."""

    def __init__(self, policy: Policy, chunk: int, packed: Packed, *, token_loss: bool = False):
        """`token_loss`: the loss is a sum over tokens, of which the output layer makes the gradient in its forward pass."""
        self.policy, self.packed, self.chunk = policy, packed, chunk
        self.terms = nll_terms if token_loss else None
        self.stage, self.model = policy.stages[chunk], policy.chunks[chunk]
        self.received: Tensor | None = None
        self.sent: Any = None
        self.learner = policy.optimizer is not None
        if self.learner and self.stage.remove_forward_pre_hook_handles:
            self.stage.disable_forward_pre_hook(param_sync=False)  # it gathers the weights, which is done once a step
        get_global_memory_buffer().buffer.clear()

    @property
    def shared(self) -> int:
        """Bytes of the buffer that all microbatches and stages of a process gather sequence-parallel tensors in."""
        return sum(tensor.nbytes for tensor in get_global_memory_buffer().buffer.values())

    @torch.no_grad()
    def infer(self) -> None:
        """Forward, keeping nothing."""
        self.stage.eval()
        self._forward(learns=False)
        self._forget()

    def forward(self) -> None:
        """Forward, keeping what backward needs: from here on the output is another rank's."""
        self.stage.train()
        self._forward(learns=True)
        if not self.model.post_process:
            schedules.deallocate_output_tensor(self.sent, self.model.config.deallocate_pipeline_outputs)

    def backward(self) -> None:
        """Backward, the gradients into their buffers."""
        grad = None if self.model.post_process else self._hidden()
        with self._silent():
            backward_step(self.received, self.sent, grad, config=self.model.config)
        self._forget()

    def _forward(self, learns: bool) -> None:
        config = self.model.config
        self.received = None if self.model.pre_process else self._hidden().requires_grad_(learns)
        packed_forwards = iter(
            [self.policy._packed_forward(self.packed, every=False, temperature=1.0, terms=self.terms if learns else None)]
        )
        with self._silent():
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

    def _forget(self) -> None:
        self.received = self.sent = None
        self.model.set_input_tensor(None)  # type: ignore[arg-type]

    def _hidden(self) -> Tensor:
        """As it travels between stages: each tensor-parallel rank has its tokens."""
        config, rows = self.model.config, len(self.packed.tokens_T) // self.policy.grid.tp
        return torch.empty(rows, 1, config.hidden_size, dtype=config.pipeline_dtype, device=self.policy.world.device)

    def _silent(self) -> Any:
        return self.stage.no_sync() if self.learner else nullcontext()


def _total(packed: Packed, output_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A loss that reads every output, and no value: on meta tensors there is none."""
    return output_T.sum(), torch.tensor(0, dtype=torch.int), {}
