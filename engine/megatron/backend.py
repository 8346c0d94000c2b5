"""Lets megatron-core, which says "cuda" throughout, run where this world's tensors live: on CPU, or on meta tensors.

No fork and no patch of megatron's source: a TorchFunctionMode rewrites the device of tensor factories, and the few functions of
torch.cuda that megatron calls are replaced while the seat is taken. On GPUs none of this happens.
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

# Where the engine takes hold of megatron-core: (module, attribute, parameters that must be there, what for).
Site = tuple[str, str, tuple[str, ...], str]
APEX = "fused_weight_gradient_mlp_cuda"  # a module of Apex's, as a name in megatron's tensor_parallel/layers.py
TORCH_STRATEGY, SAVING = "dist_checkpointing.strategies.torch", "checkpoints without spawned writers"
SITES: tuple[Site, ...] = (
    ("models.gpt", "GPTModel._postprocess", ("hidden_states", "labels", "packed_seq_params"), "the last stage returns log-probs"),
    ("models.gpt", "GPTModel.shared_embedding_or_output_weight", (), "tied output weights"),
    ("models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec", ("normalization",), "the layer whose norms and attention we swap"),
    ("transformer.attention", "SelfAttentionSubmodules", ("core_attention",), "our packed attention"),
    ("transformer.attention", "SelfAttention.forward", ("packed_seq_params",), "the packed_forward reaches attention"),
    ("transformer.transformer_layer", "TransformerLayer.forward", (), "a layer's additions within its norms"),
    ("tensor_parallel", "checkpoint", ("function", "distribute_saved_activations"), "recomputing the MLP"),
    ("tensor_parallel.layers", "_grad_accum_fusion_available", (), "weight gradients accumulated by the product"),
    ("transformer.mlp", "MLPSubmodules", ("activation_func",), "our SwiGLU"),
    ("transformer.transformer_block", "TransformerBlockSubmodules", ("layer_specs", "layer_norm"), "our norms"),
    ("transformer.transformer_block", "get_num_layers_to_build", ("config", "vp_stage"), "layers of a stage"),
    ("pipeline_parallel", "get_forward_backward_func", (), "the schedules"),
    ("pipeline_parallel.schedules", "forward_step", ("input_tensor", "vp_stage", "is_last_stage"), "one stage by itself, for the dry run"),
    ("pipeline_parallel.schedules", "backward_step", ("output_tensor_grad",), "one stage by itself, for the dry run"),
    ("parallel_state", "get_global_memory_buffer", (), "the memory that all stages of a process share"),
    ("distributed", "finalize_model_grads", ("model", "num_tokens"), "the one division by the global count"),
    ("optimizer.optimizer", "ChainedOptimizer.prepare_grads", (), "the gradient norm is known before the step is taken"),
    ("optimizer.optimizer", "ChainedOptimizer.step_with_ready_grads", (), "the gradient norm is known before the step is taken"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.load_parameter_state_from_fully_reshardable", (), "resuming on another grid"),
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32", ("parameters", "max_norm", "total_norm"), "clipping"),
    ("dist_checkpointing", "save", ("sharded_strategy",), "checkpoints"),
    (TORCH_STRATEGY, "TorchDistSaveShardedStrategy.async_save", ("sharded_state_dict",), SAVING),
    (TORCH_STRATEGY, "MCoreSavePlanner", (), SAVING),
    (TORCH_STRATEGY, "mcore_to_pyt_state_dict", (), SAVING),
    (TORCH_STRATEGY, "_replace_state_dict_keys_with_sharded_keys", (), SAVING),
    ("tensor_parallel.random", "model_parallel_cuda_manual_seed", ("seed", "force_reset_rng"), "random states"),
    ("tensor_parallel.random", "CudaRNGStatesTracker.fork", (), "no random states in CUDA graphs"),
    ("tensor_parallel.random", "_get_all_rng_states", (), "no random states in CUDA graphs"),
    ("parallel_state", "initialize_model_parallel", ("create_gloo_process_groups",), "the grid"),
)


def moved_sites(sites: tuple[Site, ...] = SITES) -> list[str]:
    """One line for each site of the installed megatron-core that is no longer where the engine expects it; empty when all are."""
    return [line for site in sites if (line := _moved(*site))]


def _moved(module: str, path: str, parameters: tuple[str, ...], why: str) -> str | None:
    where = f"megatron.core.{module}.{path}"
    try:
        found: Any = importlib.import_module(f"megatron.core.{module}")
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        return f"{where} is gone ({error}); it is needed for: {why}"
    missing = [p for p in parameters if p not in inspect.signature(found).parameters]
    return f"{where} no longer takes {', '.join(missing)}; it is needed for: {why}" if missing else None


class _Redirect(TorchFunctionMode):
    """device="cuda" becomes `device`, and tensors answer type() as if they lived on a GPU (megatron groups gradients by that string)."""

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


def _stand_ins(device: torch.device) -> dict[str, Callable[..., Any]]:
    # Distinct function objects: dynamo's rule table refuses one object under two names.
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
    """While it is open, megatron-core computes on `world.device`, and its linear layers accumulate weight gradients by weight_gradient.py.
    On GPUs the latter is all it does."""
    with ExitStack() as stack:
        if world.backend != "cuda":
            _redirect(world, stack)
        stack.enter_context(_accumulating(world))
        yield


def _redirect(world: World, stack: ExitStack) -> None:
    for name, stand_in in _stand_ins(world.device).items():
        stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        if hasattr(torch.cuda.random, name):
            stack.enter_context(mock.patch.object(torch.cuda.random, name, stand_in))
    if world.backend == "cpu":
        stack.enter_context(use_onednn())
    stack.enter_context(_Redirect(world.device))


@contextmanager
def _accumulating(world: World) -> Iterator[None]:
    """Put weight_gradient.py where megatron's linear layers look for Apex's module. Where Apex is installed, its own stays on GPUs; on
    other devices it cannot compute, and is put back afterwards."""
    from megatron.core.tensor_parallel import layers

    with ExitStack() as stack:
        if world.backend != "cuda" or not layers._grad_accum_fusion_available:
            stack.enter_context(mock.patch.object(layers, APEX, weight_gradient, create=True))
            stack.enter_context(mock.patch.object(layers, "_grad_accum_fusion_available", True))
        yield


@dataclass(frozen=True)
class Grid:
    """This rank's place in the grid of tensor, pipeline and data parallel ranks, and its group along each axis."""

    tp_rank: int
    tp: int
    tp_group: ProcessGroup
    pp_rank: int
    pp: int
    pp_group: ProcessGroup
    pp_host_group: ProcessGroup  # the same ranks, for messages between hosts
    dp_rank: int
    dp: int
    dp_group: ProcessGroup
    owned: tuple[ProcessGroup, ...] = ()  # every group that making this grid made; none for a policy that found it there

    @property
    def last_stage(self) -> int:
        """The global rank that holds the end of the model in this rank's pipeline."""
        return dist.get_global_rank(self.pp_group, self.pp - 1)


def make_grid(parallel: Parallel, world: World, seed: int = 0) -> Grid:
    """Lay tensor, pipeline and data parallel groups over the world; the seat must be taken. A second policy of the same grid shares it.

    Raises ValueError when the process already has another grid, RuntimeError when megatron-core is one the engine cannot hold on to.
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
    have = (state.get_tensor_model_parallel_world_size(), state.get_pipeline_model_parallel_world_size())
    if have != (parallel.tp, parallel.pp):
        raise ValueError(
            f"this process runs a grid of tp={have[0]}, pp={have[1]}; parallel.tp={parallel.tp}, pp={parallel.pp} must equal it"
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
    """A gloo group for every pipeline of a world of `size` ranks, in megatron-core's order of ranks. All ranks must call it."""
    apart = size // pp
    for first in range(apart):
        dist.new_group(list(range(first, size, apart)), backend="gloo")


def host_group_of(pipeline: ProcessGroup) -> ProcessGroup:
    """The group that make_host_groups made for the ranks of `pipeline`."""
    ranks = dist.get_process_group_ranks(pipeline)
    return next(g for g in _groups() if g is not pipeline and dist.get_backend(g) == "gloo" and dist.get_process_group_ranks(g) == ranks)


def _axis(group: Any) -> tuple[int, int, ProcessGroup]:
    return group.rank(), group.size(), group


def _groups() -> set[ProcessGroup]:
    return set(dist.distributed_c10d._world.pg_map)


def leave_grid(grid: Grid) -> None:
    """Forget a grid, so that another can be made in this process. megatron would leave its groups behind, each with threads of its own."""
    from megatron.core import parallel_state

    if grid.owned:
        parallel_state.destroy_model_parallel()
        for group in grid.owned:
            dist.destroy_process_group(group)
