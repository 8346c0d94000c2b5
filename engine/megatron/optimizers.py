"""Everything about the optimizer: gradient buffers, building AdamW, one step, its state in checkpoints, and its cost.

To add an optimizer, build it in `make_optimizer`; the other functions say what the rest of the engine needs of it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from engine.config import Optim, Parallel
from engine.megatron.model import PackedModel

# Optimizer state is stored in the shape of the parameters, so that any grid can load it. megatron writes into the dict that it is given.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def wrap_ddp(chunks: list[PackedModel], parallel: Parallel) -> list[DistributedDataParallel]:
    """Wrap each stage in megatron's DDP, with fp32 gradient buffers that are reduced over replicas during backward. The parameters of a
    sharded optimizer are gathered during the next forward, those of a virtual stage during the forward of the stage before it."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=True,
        overlap_param_gather=parallel.distributed_optimizer,
    )
    # Buckets of later stages are reduced only after all of backward: there is nothing left to overlap with.
    stages = [DistributedDataParallel(c.config, config, c, disable_bucketing=i > 0) for i, c in enumerate(chunks)]
    shared = chunks[0].config
    shared.finalize_model_grads_func = finalize_model_grads
    shared.no_sync_func = _each(stages, "no_sync")
    shared.grad_sync_func = _each(stages, "start_grad_sync")
    if parallel.distributed_optimizer and len(stages) > 1:
        functions: Any = [partial(start_param_gather, stage) for stage in stages]
        shared.param_sync_func = functions
    return stages


def _each(stages: list[DistributedDataParallel], name: str) -> Any:
    """megatron's schedules take a list of functions for virtual stages, and a single function otherwise."""
    functions = [getattr(stage, name) for stage in stages]
    return functions if len(functions) > 1 else functions[0]


def start_param_gather(stage: DistributedDataParallel, *_: Any) -> None:
    """Start the all-gather of the parameters that this stage's forward needs first, unless it was started since the last step; each bucket
    starts the next. megatron itself starts it only when a forward waits for it, and the waits of all pipeline stages add up."""
    first = stage.bucket_groups[-1]  # in the order of backward
    if stage.ddp_config.overlap_param_gather and not first.param_gather_dispatched:
        first.start_param_sync()


def make_optimizer(stages: list[DistributedDataParallel], optim: Optim, parallel: Parallel, dtype: torch.dtype) -> Any:
    """AdamW with fp32 master weights, sharded over replicas with parallel.distributed_optimizer. Norms and biases do not decay."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_eps=optim.eps,
        clip_grad=optim.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.distributed_optimizer,
    )
    optimizer: Any = get_megatron_optimizer(config, list(stages), use_gloo_process_groups=False)
    for chained in optimizer.chained_optimizers:
        if isinstance(chained.optimizer, torch.optim.AdamW):  # Apex and Transformer Engine have their own
            _allocate_state(chained.optimizer)
    return optimizer


def _allocate_state(adamw: torch.optim.AdamW) -> None:
    """Allocate the state before the first step: megatron's checkpoints of torch's AdamW require it when they are loaded."""
    for group in adamw.param_groups:
        group["fused"], group["foreach"] = True, False
        for parameter in group["params"]:
            adamw.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def state_of(optimizer: Any) -> list[Tensor]:
    """Every tensor of an optimizer: its weights (master weights, or views of the model's) and moments."""
    inner = [chained.optimizer for chained in optimizer.chained_optimizers]
    weights = [weight for each in inner for group in each.param_groups for weight in group["params"]]
    return weights + [x for each in inner for state in each.state.values() for x in state.values() if isinstance(x, Tensor)]


def finish_param_gather(stages: list[DistributedDataParallel]) -> None:
    """Finish gathering the parameters of the last step, before they are read outside of a forward pass."""
    for stage in stages:
        if stage.ddp_config.overlap_param_gather:
            stage.start_param_sync(force_sync=True)


@torch.no_grad()
def step(optimizer: Any, optim: Optim, lr: float) -> float:
    """Clip gradients and step; returns the global gradient norm before clipping. If it is not finite, nothing changes."""
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = lr, optim.weight_decay * group["wd_mult"]
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return norm
    for inner in optimizer.chained_optimizers:
        if optim.max_grad_norm and (parameters := inner.get_parameters()):
            clip_grad_by_total_norm_fp32(parameters, max_norm=optim.max_grad_norm, total_norm=norm)
    optimizer.step_with_ready_grads()
    return norm


def kind(optimizer: Any) -> str:
    """The setting `distributed_optimizer=...` of the optimizer, because megatron stores its state differently for each; "" for None."""
    if optimizer is None:
        return ""
    return f"distributed_optimizer={optimizer.chained_optimizers[0].config.use_distributed_optimizer}"


def sharded_state(optimizer: Any, model_state: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    """megatron's sharded state dict of the optimizer: the shard of each state tensor that this rank holds. `model_state`: the model's."""
    return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=dict(SHARDING))


def load_state(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Copy a state that was loaded by `sharded_state` into the optimizer."""
    for inner in optimizer.chained_optimizers:
        _load_inner(inner, loaded)


def _load_inner(optimizer: Any, loaded: dict[str, Any]) -> None:
    """megatron's loader of sharded state fails on the step counters of torch's AdamW, and would give all parameters one shared counter: the
    counters are removed while it loads, and each parameter gets its own afterwards."""
    moments = loaded.pop("param_state", None)
    loaded.pop("param_state_sharding_type", None)
    optimizer.load_state_dict(loaded)
    steps = {key: state.pop("step") for key, state in optimizer.optimizer.state.items() if "step" in state}
    if moments is not None:
        optimizer.load_parameter_state_from_fully_reshardable(moments)
    for key, step in steps.items():
        optimizer.optimizer.state[key]["step"] = step.clone()


def step_bytes(gradients: int, state: int, weights: int, shares: int) -> float:
    """Bytes that one optimizer step reads and writes on a rank. It zeroes and scales all gradients (3 accesses); computes the norm of its
    share of them, clips and steps (4); reads and writes its state; and writes its share of the weights.

    gradients, weights  bytes on the rank
    state               bytes of the optimizer state on the rank
    shares              number of ranks that the optimizer is sharded over; 1: not sharded
    """
    return 3 * gradients + 2 * state + (4 * gradients + weights) / shares
