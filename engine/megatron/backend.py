"""Runs megatron-core, which hard-codes "cuda", on CPU and on meta tensors, and creates its process groups.

megatron's source is neither forked nor patched. Inside `cpu_backend`, a TorchFunctionMode rewrites the device of tensor factories, and the
torch.cuda functions that megatron calls are replaced. On GPUs devices are left alone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.overrides import TorchFunctionMode

from engine.config import Parallel
from engine.distributed.world import World
from engine.megatron import weight_gradient
from engine.megatron.onednn import use_onednn

TESTED_VERSIONS = ("0.16.1", "0.19.2")  # the latter for Python 3.12 and newer

# The parts of megatron-core that the engine depends on: (module, attribute, required parameters, what it is used for).
Site = tuple[str, str, tuple[str, ...], str]
APEX = "fused_weight_gradient_mlp_cuda"  # a module of Apex's, as a name in megatron's tensor_parallel/layers.py
TORCH_STRATEGY, SAVING = "dist_checkpointing.strategies.torch", "checkpoints without spawned writer processes"
SITES: tuple[Site, ...] = (
    ("models.gpt", "GPTModel._postprocess", ("hidden_states", "labels", "packed_seq_params"), "the last stage returns log-probs"),
    ("models.gpt", "GPTModel.shared_embedding_or_output_weight", (), "tied output weights"),
    ("models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec", ("normalization",), "the layer spec whose norms and attention are replaced"),
    ("transformer.attention", "SelfAttentionSubmodules", ("core_attention",), "our packed attention"),
    ("transformer.attention", "SelfAttention.forward", ("packed_seq_params",), "passing PackedForward to attention"),
    ("transformer.transformer_layer", "TransformerLayer.forward", (), "residual additions fused into the norms"),
    ("tensor_parallel", "checkpoint", ("function", "distribute_saved_activations"), "recomputing the MLP"),
    ("tensor_parallel.layers", "_grad_accum_fusion_available", (), "weight-gradient accumulation fused into the matrix product"),
    ("transformer.mlp", "MLPSubmodules", ("activation_func",), "our SwiGLU"),
    ("transformer.transformer_block", "TransformerBlockSubmodules", ("layer_specs", "layer_norm"), "our norms"),
    ("transformer.transformer_block", "get_num_layers_to_build", ("config", "vp_stage"), "the number of layers of a stage"),
    ("pipeline_parallel", "get_forward_backward_func", (), "the schedules"),
    ("pipeline_parallel.schedules", "forward_step", ("input_tensor", "vp_stage", "is_last_stage"), "single stages, for the dry run"),
    ("pipeline_parallel.schedules", "backward_step", ("output_tensor_grad",), "single stages, for the dry run"),
    ("parallel_state", "get_global_memory_buffer", (), "the buffers that all stages of a process share"),
    ("distributed", "finalize_model_grads", ("model", "num_tokens"), "the one division by the global count"),
    ("optimizer.optimizer", "ChainedOptimizer.prepare_grads", (), "checking the gradient norm before the step"),
    ("optimizer.optimizer", "ChainedOptimizer.step_with_ready_grads", (), "checking the gradient norm before the step"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.load_parameter_state_from_fully_reshardable", (), "resuming with another layout"),
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32", ("parameters", "max_norm", "total_norm"), "clipping"),
    ("dist_checkpointing", "save", ("sharded_strategy",), "checkpoints"),
    (TORCH_STRATEGY, "TorchDistSaveShardedStrategy.async_save", ("sharded_state_dict",), SAVING),
    (TORCH_STRATEGY, "MCoreSavePlanner", (), SAVING),
    (TORCH_STRATEGY, "mcore_to_pyt_state_dict", (), SAVING),
    (TORCH_STRATEGY, "_replace_state_dict_keys_with_sharded_keys", (), SAVING),
    ("tensor_parallel.random", "model_parallel_cuda_manual_seed", ("seed", "force_reset_rng"), "random-number-generator states"),
    ("tensor_parallel.random", "CudaRNGStatesTracker.fork", (), "no random-number-generator states in CUDA graphs"),
    ("tensor_parallel.random", "_get_all_rng_states", (), "no random-number-generator states in CUDA graphs"),
    ("parallel_state", "initialize_model_parallel", ("create_gloo_process_groups",), "process groups"),
)


def moved_sites(sites: tuple[Site, ...] = SITES) -> list[str]:
    """One message for each part of SITES that the installed megatron-core lacks or has changed; empty if it has all of them."""
    return [line for site in sites if (line := _moved(*site))]


def _moved(module: str, path: str, parameters: tuple[str, ...], why: str) -> str | None:
    name = f"megatron.core.{module}.{path}"
    try:
        attribute: Any = importlib.import_module(f"megatron.core.{module}")
        for part in path.split("."):
            attribute = getattr(attribute, part)
    except (ImportError, AttributeError) as error:
        return f"{name} is gone ({error}); it is needed for: {why}"
    missing = [p for p in parameters if p not in inspect.signature(attribute).parameters]
    return f"{name} no longer takes {', '.join(missing)}; it is needed for: {why}" if missing else None


class _Redirect(TorchFunctionMode):
    """Replaces device="cuda" by `device`. Tensor.type() returns the names of GPU types, by which megatron groups gradients."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs = {**kwargs, "device": self.device}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return "torch.cuda." + func(*args).rsplit(".", 1)[-1]
        return func(*args, **kwargs)


def _replacements(device: torch.device) -> dict[str, Callable[..., Any]]:
    # Distinct function objects, because torch.compile's rule table rejects one object under two names.
    return {
        "current_device": lambda: device,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.manual_seed(seed) and None,
        "synchronize": lambda *a, **k: None,
        "current_stream": lambda *a, **k: SimpleNamespace(wait_event=lambda _: None, wait_stream=lambda _: None),
        "_lazy_init": lambda *a, **k: None,
        "_lazy_call": lambda call, **k: None,
    }


@contextmanager
def cpu_backend(world: World) -> Iterator[None]:
    """Context in which megatron-core computes on `world.device`, and its linear layers accumulate weight gradients with weight_gradient.py.

    On GPUs it only does the latter.
    """
    with ExitStack() as stack:
        if world.backend != "cuda":
            _redirect(world, stack)
        stack.enter_context(_accumulating(world))
        yield


def _redirect(world: World, stack: ExitStack) -> None:
    for name, replacement in _replacements(world.device).items():
        stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        if hasattr(torch.cuda.random, name):
            stack.enter_context(mock.patch.object(torch.cuda.random, name, replacement))
    if world.backend == "cpu":
        stack.enter_context(use_onednn())
    stack.enter_context(_Redirect(world.device))


@contextmanager
def _accumulating(world: World) -> Iterator[None]:
    """Replace Apex's module in megatron's linear layers by weight_gradient.py, until the context exits.

    If Apex is installed, its module stays in use on GPUs; it does not support other devices.
    """
    from megatron.core.tensor_parallel import layers

    with ExitStack() as stack:
        if world.backend != "cuda" or not layers._grad_accum_fusion_available:
            stack.enter_context(mock.patch.object(layers, APEX, weight_gradient, create=True))
            stack.enter_context(mock.patch.object(layers, "_grad_accum_fusion_available", True))
        yield


@dataclass(frozen=True)
class Grid:
    """This rank's tensor, pipeline and data parallel ranks and process groups."""

    tp_rank: int
    tp: int
    tp_group: ProcessGroup
    pp_rank: int
    pp: int
    pp_group: ProcessGroup
    pp_host_group: ProcessGroup  # the same ranks, gloo: for tensors in host memory
    dp_rank: int
    dp: int
    dp_group: ProcessGroup
    owned: tuple[ProcessGroup, ...] = ()  # the groups that make_grid created; empty if they existed before

    @property
    def last_stage(self) -> int:
        """The global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp - 1)


def make_grid(parallel: Parallel, world: World, seed: int = 0) -> Grid:
    """Create the tensor, pipeline and data parallel groups. Call it inside cpu_backend; policies with the same layout share the groups.

    Raises ValueError if the process already has groups of another layout, and RuntimeError if the megatron-core version is not supported.
    """
    import megatron.core
    from megatron.core import parallel_state as state
    from megatron.core import tensor_parallel

    if megatron.core.__version__ not in TESTED_VERSIONS and (moved := moved_sites()):
        tested = " and ".join(TESTED_VERSIONS)
        raise RuntimeError(f"megatron-core {megatron.core.__version__} (tested: {tested}): " + "; ".join(moved))
    before = _groups()
    if not state.model_parallel_is_initialized():
        virtual = parallel.vpp if parallel.vpp > 1 else None
        state.initialize_model_parallel(
            parallel.tp, parallel.pp, virtual_pipeline_model_parallel_size=virtual, create_gloo_process_groups=False
        )
        if world.on_gpu and parallel.pp > 1:
            make_host_groups(parallel.pp, world.size)
    existing = (state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size())
    if existing != (parallel.tp, parallel.pp):
        raise ValueError(
            f"parallel.tp={parallel.tp}, parallel.pp={parallel.pp} must equal this process's layout: tp={existing[0]}, pp={existing[1]}"
        )
    pipeline: Any = state.get_pipeline_model_parallel_group()
    host_group = host_group_of(pipeline) if world.on_gpu and parallel.pp > 1 else pipeline
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Grid(
        *_axis(state.get_tensor_model_parallel_group()),
        *_axis(pipeline),
        host_group,
        *_axis(state.get_data_parallel_group()),
        owned=tuple(_groups() - before),
    )


def make_host_groups(pp: int, size: int) -> None:
    """Create a gloo group for every pipeline of a world of `size` ranks, in megatron-core's order of ranks. All ranks must call it."""
    stride = size // pp
    for first in range(stride):
        dist.new_group(list(range(first, size, stride)), backend="gloo")


def host_group_of(pipeline: ProcessGroup) -> ProcessGroup:
    """The group that make_host_groups created for the ranks of `pipeline`."""
    ranks = dist.get_process_group_ranks(pipeline)
    return next(g for g in _groups() if g is not pipeline and dist.get_backend(g) == "gloo" and dist.get_process_group_ranks(g) == ranks)


def _axis(group: Any) -> tuple[int, int, ProcessGroup]:
    return group.rank(), group.size(), group


def _groups() -> set[ProcessGroup]:
    return set(dist.distributed_c10d._world.pg_map)


def leave_grid(grid: Grid) -> None:
    """Destroy the groups of a grid, so that this process can create another. megatron alone would leak them and their threads."""
    from megatron.core import parallel_state

    if grid.owned:
        parallel_state.destroy_model_parallel()
        for group in grid.owned:
            dist.destroy_process_group(group)
